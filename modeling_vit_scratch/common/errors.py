# SPDX-License-Identifier: Apache-2.0
"""Errors that users can fix: collected, printed as one message without a traceback, and an exit status."""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


# A full disk, a full quota, or a limit on the size of a file (ulimit -f).
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    """Collects mistakes for one message."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Adds a mistake once."""
        if message not in self.messages:
            self.messages.append(message)

    def require(self, condition: bool, message: str) -> None:
        """Adds a mistake unless the condition holds."""
        if not condition:
            self.add(message)

    @contextmanager
    def collected(self, prefix: str = "") -> Iterator[None]:
        """Adds a ValueError, such as an InputError, as a mistake."""
        try:
            yield
        except ValueError as error:
            self.add(f"{prefix}{error}")

    def as_error(self) -> InputError:
        """All mistakes in one error."""
        if len(self.messages) == 1:
            return InputError(self.messages[0])
        lines = [f"  {number}. {message}" for number, message in enumerate(self.messages, start=1)]
        return InputError("\n".join([f"{len(lines)} problems:", *lines]))


def run_command_line(main: Callable[[], int | None]) -> int:
    """
    Runs a script's main. Returns its exit status or 0; 2 for a mistake that the user can fix; 1 if training had to stop
    or the disk is full; 130 after Ctrl-C, 143 after SIGTERM. Other exceptions are bugs and keep their traceback.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        status = main()
    except InputError as error:
        if is_first:  # every process reads the same command line and the same data
            print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        from ..image_decoding_vit_scratch import ImageDecodeError  # here: it imports torch, which --help does not need

        if isinstance(error, OSError) and error.errno in FULL_DISK:
            print(f"\nerror: {error.filename or 'A file'} could not be written: {error.strerror}.", file=sys.stderr)
        elif not isinstance(error, (TrainingStopped, ImageDecodeError)):
            raise
        elif is_first or not getattr(error, "is_shared", False):
            print(f"\nerror: {without_worker_traceback(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interruption:
        if is_first:
            print(f"\n{str(interruption) or 'Interrupted.'}", file=sys.stderr)
        return 128 + getattr(interruption, "number", signal.SIGINT)
    return status or 0


def without_worker_traceback(error: Exception) -> str:
    """The message without the traceback of a worker process that torch puts before it."""
    message = str(error).strip()
    return message.rsplit(f"{type(error).__name__}: ", 1)[-1] if "Original Traceback" in message else message


def lost_worker(error: RuntimeError, when: str = "") -> str | None:
    """A message if the error is a worker process that has ended, which only torch's message says; else None."""
    if "DataLoader worker" not in str(error):
        return None
    killed = re.search(r"killed by signal: (\w+)", str(error))
    reason = f"was killed by the system ({killed[1]})" if killed else "ended unexpectedly"
    return (
        f"A process that reads images {reason}{when}. Usually the memory was full, or in a container the shared memory "
        "(docker run --shm-size)."
    )
