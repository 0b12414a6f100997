# SPDX-License-Identifier: Apache-2.0
"""How every script ends: errors that users can fix are printed without a traceback, and the exit status says which."""

import errno
import os
import signal
import sys
from collections.abc import Callable

from modeling_vit_scratch.common.errors import (
    InputError,
    TrainingStopped,
    lost_worker,
    on_screen,
    without_worker_traceback,
)


# A full disk, a full quota, or a limit on the size of a file (ulimit -f).
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a user can change about a file or folder.
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


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
        # Here: it imports torch, which --help does not need.
        from modeling_vit_scratch.image_decoding_vit_scratch import ImageDecodeError

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
