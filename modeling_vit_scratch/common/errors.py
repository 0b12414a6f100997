# SPDX-License-Identifier: Apache-2.0
"""Errors that users can fix: collected, printed as one message without a traceback, and an exit status."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .workers import lost_worker


# A full disk, a full quota, or a limit on the size of a file (ulimit -f).
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a user can change about a file or folder.
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


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


def on_screen(text: str) -> str:
    """A name or a label on one line, without control characters, which a terminal would obey."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def run_command_line(main: Callable[[], int | None]) -> int:
    """Runs a script's main, and returns its exit status. Exceptions that are bugs keep their traceback."""
    is_first = os.environ.get("RANK", "0") == "0"
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # letters of a class name that the terminal doesn't have
    try:
        if half_set := _half_set_cluster():
            is_first = True
            raise InputError(half_set)
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever read the output has ended: the rest goes there at exit
        return 128 + getattr(signal, "SIGPIPE", 13)
    except InputError as error:
        if is_first:  # every process reads the same command line and the same data
            _print_error(f"error: {error}")
        return 2
    except Exception as error:
        from ..image_decoding_vit_scratch import ImageDecodeError  # here: it imports torch, which --help does not need

        if isinstance(error, OSError) and error.errno in FULL_DISK:
            print(f"\nerror: {error.filename or 'A file'} could not be written: {error.strerror}.", file=sys.stderr)
        elif isinstance(error, OSError) and error.errno in NO_ACCESS and error.filename is not None:
            if is_first:
                print(f"\nerror: {error.filename2 or error.filename}: {error.strerror}.", file=sys.stderr)
            return 2
        elif isinstance(error, (TrainingStopped, ImageDecodeError)):
            if is_first or not getattr(error, "is_shared", False):
                _print_error(f"\nerror: {without_worker_traceback(error)}")
        elif isinstance(error, (RuntimeError, BlockingIOError)) and (lost := lost_worker(error)):
            print(f"\nerror: {lost} A lower --dataloader_num_workers needs less.", file=sys.stderr)
        else:
            raise
        return 1
    except KeyboardInterrupt as interruption:
        if is_first:
            print(f"\n{str(interruption) or 'Interrupted.'}", file=sys.stderr)
        return 128 + getattr(interruption, "number", signal.SIGINT)
    return status or 0


def _half_set_cluster() -> str | None:
    """A message if a launcher's variables are there in part, such as a RANK that is left over in a shell."""
    needed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = {name: os.environ[name] for name in needed[:3] if name in os.environ}
    is_alone = all(values.get(name, alone) == alone for name, alone in zip(needed, ("0", "-1", "1")))
    is_whole = all(map(os.environ.get, needed)) and all(map(str.isdecimal, values.values()))
    if is_alone or (is_whole and int(values["RANK"]) < int(values["WORLD_SIZE"])):
        return None
    given = " ".join(f"{name}={value}" for name, value in values.items())
    return (
        f"{given} in the environment: one of several processes needs {', '.join(needed)}, and a RANK below WORLD_SIZE. "
        f"Start it with `accelerate launch`, or for a process on its own: unset {' '.join(values)}."
    )


def _print_error(message: str) -> None:
    print("\n".join(map(on_screen, message.split("\n"))), file=sys.stderr)


def without_worker_traceback(error: Exception) -> str:
    """The message without the traceback of a worker process that torch puts before it."""
    message = str(error).strip()
    return message.rsplit(f"{type(error).__name__}: ", 1)[-1] if "Original Traceback" in message else message
