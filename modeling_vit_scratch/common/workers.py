# SPDX-License-Identifier: Apache-2.0
"""Worker processes that read images: how many, which image each has in hand, and how one was lost. Imports no torch."""

import math
import mmap
import os
import re
from pathlib import Path


def available_cores() -> int:
    """The cores that this process may use, by its affinity and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or a quota of "max"
        return cores


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
