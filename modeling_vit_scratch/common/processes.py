# SPDX-License-Identifier: Apache-2.0
"""The launcher of a run, agreement between its processes, and stopping on Ctrl-C and SIGTERM."""

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


# The script or module that Python runs in a launcher.
LAUNCHERS = (
    "accelerate", "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli",
    "torchrun", "torch.distributed.run", "torch.distributed.launch",
)  # fmt: skip


def launcher(child: int | None = None) -> int | None:
    """The id of the parent of this process (or of `child`), if that is accelerate's or torch's launcher, no shell."""
    try:
        parent = psutil.Process(child).parent()
        words = [] if parent is None else parent.cmdline()
    except psutil.Error:
        return None
    program = next(itertools.dropwhile(lambda word: word.startswith("-"), words[1:]), "")  # python -u -m program
    return parent.pid if Path(program).name in LAUNCHERS else None


class Processes:
    """Communication between the processes of a run, on the host: it does not wait for an accelerator's work."""

    def __init__(self, timeout: int) -> None:
        self.timeout = timedelta(seconds=timeout)
        self._group: distributed.ProcessGroup | None = None

    @property
    def are_several(self) -> bool:
        return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1

    def maximum(self, value: int) -> int:
        if not self.are_several:
            return value
        values = torch.tensor(value)
        distributed.all_reduce(values, op=distributed.ReduceOp.MAX, group=self._gloo())
        return int(values)

    def gather(self, value: Any) -> list[Any]:
        if not self.are_several:
            return [value]
        values: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value, group=self._gloo())
        return values

    def wait(self) -> None:
        if self.are_several:
            distributed.barrier(group=self._gloo())

    def _gloo(self) -> distributed.ProcessGroup:
        if self._group is None:
            self._group = distributed.new_group(backend="gloo", timeout=self.timeout)
        return self._group


def has_lost_contact(error: RuntimeError) -> bool:
    messages = r"closed by peer|connection reset|gloo/transport|broken pipe"
    return isinstance(error, distributed.DistError) or re.search(messages, str(error), re.I) is not None


# SIGHUP: the terminal is gone. SIGUSR1: a cluster's time is nearly up (SLURM's --signal=USR1@60).
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class StopSignals:
    """
    Handles SIGNALS between `start` and `restore`, or inside of `with`. The first signal sets `number` and calls
    `on_request` with a description. The second, or with `at_once` the first, sets `is_urgent` and raises. `timeout` or
    a terminal may send a signal twice: within a second they count once. `accelerate launch` of one process passes none
    on, so its end counts as SIGTERM.
    """

    def __init__(self, on_request: Callable[[str], None] | None = None, at_once: bool = False) -> None:
        self.at_once, self.is_urgent = at_once, False
        self._on_request, self._process, self._launcher = on_request, os.getpid(), launcher()
        self.number, self._time = 0, 0.0
        self._handlers: dict[int, Any] = {}

    def start(self) -> "StopSignals":
        """Starts to handle signals; only in the main thread, as Python does."""
        self.number, self.is_urgent = 0, False
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                    self._handlers[number] = signal.signal(number, self._handle)
        return self

    def restore(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    __enter__ = start

    def __exit__(self, *_: Any) -> None:
        self.restore()

    def poll(self) -> int:
        """`number`, after a check that the launcher is still there."""
        if not self.number and self._launcher not in (None, os.getppid()):
            self._request(signal.SIGTERM, "The launcher has ended")
        return self.number

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Raises TrainingInterrupted at the second signal, or at the first with `at_once`."""
        if os.getpid() != self._process:
            return  # a worker process that has just been forked
        if self.number and time.monotonic() - self._time <= 1.0:
            return
        if self.number or self.at_once:
            self.number, self._time, self.is_urgent = number, time.monotonic(), True
            raise TrainingInterrupted("Stopped at once.", number)
        self._request(number, "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    def _request(self, number: int, what: str) -> None:
        self.number, self._time = number, time.monotonic()
        if self._on_request is not None:
            self._on_request(what)
