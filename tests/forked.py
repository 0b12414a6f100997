# SPDX-License-Identifier: Apache-2.0
"""Several processes for a test, quickly: forked ones need not import torch and transformers anew."""

import ctypes
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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


@dataclass
class Program:
    """`python WORDS` in a process that is forked from this one. What it prints goes to the file `log`."""

    process: multiprocessing.Process
    log: Path

    def wait(self, timeout: float = 240) -> int:
        """Its exit status, negative for a signal. Kills it where it takes longer than `timeout` seconds."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return self.process.exitcode

    @property
    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8")


def _run_script(words: list[str], folder: Path, log: Path, host: str, environment: dict[str, str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, name in ((1, "stdout"), (2, "stderr")):  # pytest has put others in their place
        os.dup2(output, stream)
        setattr(sys, name, os.fdopen(stream, "w", buffering=1, encoding="utf-8"))
    if host:  # Python has os.setns from 3.12 on
        with open(f"/run/netns/{host}", "rb") as namespace:
            assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0
    os.chdir(folder)
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def start_script(words: list[str], folder: Path, log: Path, host: str = "", **environment: str) -> Program:
    """Starts a script with its arguments in `folder`, in the network namespace `host` if there is one."""
    given = ([*map(str, words)], folder, log, host, environment)
    process = multiprocessing.get_context("fork").Process(target=_run_script, args=given)
    process.start()
    return Program(process, log)


def run_script(words: list[str], folder: Path, processes: int = 1, **environment: str) -> list[str]:
    """What the script prints in each of so many processes, which see what torchrun tells them. All must end well."""
    port, programs = str(free_port()), []
    with tempfile.TemporaryDirectory() as logs:
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_PORT": port}
            own |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
            given = environment | (own if processes > 1 else {})
            programs.append(start_script(words, folder, Path(logs, f"{rank}.log"), **given))
        statuses = [program.wait() for program in programs]
        printed = [program.printed for program in programs]
    assert not any(statuses), "\n".join([str(statuses), *printed])
    return printed


def run_in_child(function: Callable[[], Any], as_nobody: bool = False) -> tuple[int, str]:
    """
    The status of `function()` in a forked process, 1 with a traceback after an exception, and what it has printed. As
    nobody, root's permissions are given up, and HOME is not there.
    """
    with tempfile.TemporaryFile() as printed:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
                sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
                if as_nobody:
                    os.environ["HOME"] = "/nonexistent"
                    if os.geteuid() == 0:
                        os.setegid(65534)
                        os.seteuid(65534)
                status = function() or 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        printed.seek(0)
        return status, printed.read().decode(errors="replace")
