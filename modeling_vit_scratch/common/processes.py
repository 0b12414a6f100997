# SPDX-License-Identifier: Apache-2.0
"""Who started a run, and what its processes tell each other to do the same thing at the same step."""

import itertools
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import distributed


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
