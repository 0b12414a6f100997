# SPDX-License-Identifier: Apache-2.0
"""What happens to mistakes: they are collected, told in one message without a traceback, and give an exit status."""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable

from ..image_processing_vit_scratch import ImageDecodeError


# No room on the disk, none left of a quota, or a limit on the size of a file (ulimit -f).
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(ValueError):
    """A mistake that the user can mend. The message names the value, the limit and the way out: no traceback needed."""


class TrainingStopped(RuntimeError):
    """
    Training can't go on, e.g. after a loss that is no number. The message says where, and what to do.

    Args:
        message: for people.
        is_shared: whether all processes of the run stop with this same message, so that one of them tells it.
    """

    def __init__(self, message: str, is_shared: bool = False) -> None:
        super().__init__(message)
        self.is_shared = is_shared


class TrainingInterrupted(KeyboardInterrupt):
    """The user stopped training, by a signal of this number. The message says how to go on."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


class Problems:
    """Collects mistakes, so that one message tells them all."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Notes a mistake; the same one is noted once."""
        if message not in self.messages:
            self.messages.append(message)

    def as_error(self) -> InputError:
        """All of them in one message."""
        if len(self.messages) == 1:
            return InputError(self.messages[0])
        lines = [f"  {number}. {message}" for number, message in enumerate(self.messages, start=1)]
        return InputError("\n".join([f"{len(lines)} problems:", *lines]))


def run_command_line(main: Callable[[], int | None]) -> int:
    """
    Runs a script's main.

    Returns:
        The exit status: what main returns, or 0; 2 for a mistake that the user can mend; 1 if training had to stop or
        the disk is full; 130 after Ctrl-C, 143 after SIGTERM. Any other exception is a bug, and passes
        through with its traceback.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        status = main()
    except InputError as error:
        if is_first:  # every process reads the same command line and the same data
            print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainingStopped, ImageDecodeError) as error:
        if is_first or not getattr(error, "is_shared", False):
            print(f"\nerror: {without_worker_traceback(error)}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        print(f"\nerror: {error.filename or 'A file'} could not be written: {error.strerror}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interruption:
        if is_first:
            print(f"\n{str(interruption) or 'Interrupted.'}", file=sys.stderr)
        return 128 + getattr(interruption, "number", signal.SIGINT)
    return status or 0


def without_worker_traceback(error: Exception) -> str:
    """The message itself: torch puts the traceback of a worker process before it."""
    message = str(error).strip()
    return message.rsplit(f"{type(error).__name__}: ", 1)[-1] if "Original Traceback" in message else message


def lost_worker(error: RuntimeError, when: str = "") -> str | None:
    """What to tell of a worker process that has ended, if that is the error: torch says so in its message alone."""
    if "DataLoader worker" not in str(error):
        return None
    killed = re.search(r"killed by signal: (\w+)", str(error))
    reason = f"was killed by the system ({killed[1]})" if killed else "ended unexpectedly"
    return (
        f"A process that reads images {reason}{when}. Usually the memory was full, or in a container the shared memory "
        "(docker run --shm-size)."
    )
