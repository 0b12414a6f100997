# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM ask a run to stop where it can be resumed; a second one stops it at once."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from .errors import TrainingInterrupted
from .processes import launcher


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
