# SPDX-License-Identifier: Apache-2.0
"""Errors that users can fix, collected for one message, and how a message is printed; also one on a lost worker."""

import mmap
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class InputError(ValueError):
    """A mistake that the user can fix. The message names the value, the limit and the way out."""


class TrainingStopped(RuntimeError):
    """Training can't continue. If this is shared, all processes stop with it and only the first one prints it."""

    def __init__(self, message: str, is_shared: bool = False) -> None:
        super().__init__(message)
        self.is_shared = is_shared


class TrainingInterrupted(KeyboardInterrupt):
    """The user stopped training with a signal of this number."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


class Problems:
    """Collects mistakes for one message, each once."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        if message not in self.messages:
            self.messages.append(message)

    @contextmanager
    def collected(self, prefix: str = "") -> Iterator[None]:
        """Adds a ValueError, such as an InputError, as a mistake."""
        try:
            yield
        except ValueError as error:
            self.add(f"{prefix}{error}")

    def as_error(self) -> InputError:
        if len(self.messages) == 1:
            return InputError(self.messages[0])
        lines = [f"  {number}. {message}" for number, message in enumerate(self.messages, start=1)]
        return InputError("\n".join([f"{len(lines)} problems:", *lines]))


def listed(names: Sequence[Any], limit: int = 10) -> str:
    """The first names, and how many more there are."""
    return ", ".join(map(str, names[:limit])) + (f" and {len(names) - limit:,} more" if len(names) > limit else "")


def on_screen(text: str) -> str:
    """A name or a label on one line, without control characters, which a terminal would obey."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def without_worker_traceback(error: Exception) -> str:
    """The message without the traceback of a worker process that torch puts before it."""
    message = str(error).strip()
    return message.rsplit(f"{type(error).__name__}: ", 1)[-1] if "Original Traceback" in message else message


# Which image each worker process reads, in memory that processes share which are forked after this.
_SLOT, _SLOTS = 512, 64
_IN_HAND = mmap.mmap(-1, _SLOT * _SLOTS)


def take_in_hand(name: str) -> None:
    """Notes in a worker process which image it reads, for the message if that kills it."""
    from torch.utils.data import get_worker_info

    if (worker := get_worker_info()) is not None:
        start, text = worker.id % _SLOTS * _SLOT, f"{os.getpid()} {name}".encode(errors="replace")
        _IN_HAND[start : start + _SLOT] = text[:_SLOT].ljust(_SLOT, b"\0")


def lost_worker(error: Exception, when: str = "") -> str | None:
    """A message if a worker process has ended, or could not start or share its images; else None."""
    text = str(error)
    if isinstance(error, BlockingIOError) or "can't start new thread" in text:
        return f"The system allows this user no more processes and threads{when} (ulimit -u)."
    ended = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", text)
    if ended is None and "shared memory" in text:
        return f"There is no shared memory left{when} (/dev/shm). In a container: docker run --shm-size 2g."
    if ended is None:
        return None
    killed = re.search(r"killed by signal: (\w+)", text)
    reason = f"was killed by the system ({killed[1]})" if killed else "ended unexpectedly"
    slots = (_IN_HAND[start : start + _SLOT] for start in range(0, _SLOT * _SLOTS, _SLOT))
    notes = (slot.rstrip(b"\0").decode(errors="replace").partition(" ") for slot in slots)
    images = [name for number, _, name in notes if name and number in ended[1].split(", ")]
    reading = f" while it read {', '.join(images)}" if images else ""
    return (
        f"A process that reads images {reason}{when}{reading}. Usually the memory was full, or in a container the "
        "shared memory (docker run --shm-size). If it is the same image again, move that away: its decoder crashes."
    )
