# SPDX-License-Identifier: Apache-2.0
"""Several processes for a test, quickly: forked ones need not import torch and transformers anew."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def _run(rank: int, function: Callable, processes: int, port: int, arguments: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_PORT=str(port))
    os.environ.update(LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true")
    AcceleratorState._reset_state(reset_partial_state=True)  # the test's own process may have been asked before
    function(rank, *arguments)


def run_forked(function: Callable, processes: int, *arguments: Any) -> None:
    """`function(rank, *arguments)` in that many processes, with the environment that torchrun would give them."""
    given = (function, processes, free_port(), arguments)
    torch.multiprocessing.start_processes(_run, given, nprocs=processes, start_method="fork")
