# SPDX-License-Identifier: Apache-2.0
"""Who started a run, what its processes agree on, and how Ctrl-C and SIGTERM stop it where it can be resumed."""

import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from torch import distributed

from .errors import TrainingInterrupted


# What Python runs where a launcher runs: a script or a module.
LAUNCHERS = (
    "accelerate", "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli",
    "torchrun", "torch.distributed.run", "torch.distributed.launch",
)  # fmt: skip


def launcher(child: int | None = None) -> int | None:
    """
    The id of the process that has started this one (or that child), if it is accelerate's or torch's launcher.

    A shell is none, whatever variables it exports, and may end: under nohup, setsid or tmux its runs go on.
    """
    try:
        parent = psutil.Process(child).parent()
        words = [] if parent is None else parent.cmdline()
    except psutil.Error:
        return None
    program = next(itertools.dropwhile(lambda word: word.startswith("-"), words[1:]), "")  # python -u -m program
    return parent.pid if Path(program).name in LAUNCHERS else None


class Processes:
    """
    The processes of a run as one. Alone, a process agrees with itself and waits for nobody.

    They talk through the host, in a gloo group of their own: asking costs a round trip, and no wait for an accelerator
    that still computes. Every process has to ask the same questions in the same order.
    """

    def __init__(self, timeout: int) -> None:
        self.timeout = timedelta(seconds=timeout)
        self._group: distributed.ProcessGroup | None = None

    @property
    def are_several(self) -> bool:
        return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1

    def largest(self, value: int) -> int:
        """The largest of everyone's values."""
        if not self.are_several:
            return value
        values = torch.tensor(value)
        distributed.all_reduce(values, op=distributed.ReduceOp.MAX, group=self._gloo())
        return int(values)

    def everyones(self, value: Any) -> list[Any]:
        """Everyone's value, in the order of the processes."""
        if not self.are_several:
            return [value]
        values: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value, group=self._gloo())
        return values

    def wait(self) -> None:
        """Returns when all have got here."""
        if self.are_several:
            distributed.barrier(group=self._gloo())

    def _gloo(self) -> distributed.ProcessGroup:
        if self._group is None:
            self._group = distributed.new_group(backend="gloo", timeout=self.timeout)
        return self._group


def has_lost_contact(error: RuntimeError) -> bool:
    """Whether that is the error of a process whose partners have ended."""
    if isinstance(error, distributed.DistError):
        return True
    return re.search(r"closed by peer|connection reset|gloo/transport|broken pipe", str(error), re.I) is not None


class StopSignals:
    """
    Handles SIGINT and SIGTERM between `start` and `restore`, or inside of a `with` block.

    A launcher, `timeout` or a terminal may send one request twice: what comes within a second of the first is the
    first. `accelerate launch` of one process passes nothing on: it ends, and its run would go on with nobody to stop
    it. So the end of the launcher counts as SIGTERM, but not that of a shell.

    Args:
        on_request: called with what has happened, at the first request.
        at_once: the first request raises, too.

    Attributes:
        number: of the signal that asks to stop; 0 if there is none.
        is_urgent: whether a request has raised.
    """

    def __init__(self, on_request: Callable[[str], None] | None = None, at_once: bool = False) -> None:
        self.at_once, self.is_urgent = at_once, False
        self._on_request, self._process, self._launcher = on_request, os.getpid(), launcher()
        self.number, self._time = 0, 0.0
        self._handlers: dict[int, Any] = {}

    def start(self) -> "StopSignals":
        """Signals are requests from now on. In a thread that is not the main one, Python handles none."""
        self.number, self.is_urgent = 0, False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def restore(self) -> None:
        """Signals do again what they did before."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def __enter__(self) -> "StopSignals":
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.restore()

    def poll(self) -> int:
        """`number`, after a look whether the launcher is still there."""
        if not self.number and self._launcher not in (None, os.getppid()):
            self._request(signal.SIGTERM, "The launcher has ended")
        return self.number

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Raises TrainingInterrupted at the second request, or at the first with `at_once`."""
        if os.getpid() != self._process:
            return  # a worker process that has just been forked
        if self.number and time.monotonic() - self._time <= 1.0:
            return
        if self.number or self.at_once:
            self.number, self._time, self.is_urgent = number, time.monotonic(), True
            raise TrainingInterrupted("Stopped at once.", number)
        self._request(number, "Ctrl-C" if number == signal.SIGINT else "SIGTERM")

    def _request(self, number: int, what: str) -> None:
        self.number, self._time = number, time.monotonic()
        if self._on_request is not None:
            self._on_request(what)
