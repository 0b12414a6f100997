# SPDX-License-Identifier: Apache-2.0
"""What happens beside the steps: the epoch of the training set, Ctrl-C and SIGTERM, the progress bar."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from accelerate.utils import gather
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from ..common.processes import Processes, launcher
from ..data.dataset import ImageClassificationDataset
from .arguments import ImageTrainingArguments


class SetEpoch(TrainerCallback):
    """Tells the training set its epoch. The data loader does so too, but not when it resumes in the middle of one."""

    def __init__(self, train_set: ImageClassificationDataset) -> None:
        self.train_set = train_set

    def on_epoch_begin(
        self, args: ImageTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.train_set.set_epoch(int(state.epoch or 0))


class SamplesSeen(TrainerCallback):
    """
    Counts the training images that go through the model, in each process, from the start or the resumption on. One that
    fills up a last batch counts, too. The trainer adds to `own`.
    """

    def __init__(self) -> None:
        self.own, self.by_process = 0, []

    def on_train_end(
        self, args: ImageTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.by_process = gather(torch.tensor([self.own], device=args.device)).tolist()


class SaveOnSignal(TrainerCallback):
    """
    The first Ctrl-C or SIGTERM finishes the step and saves a checkpoint from which training can go on exactly; a second
    one stops at once. Several processes agree on the step, whichever of them the signal has reached.

    A launcher, `timeout` or a terminal may send one wish twice: what comes within a second of the first is the first.
    `accelerate launch` of one process passes nothing on: it ends, and its run would train on with nobody to stop it. So
    the end of the launcher counts as SIGTERM, but not that of a shell.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes, self.process = processes, os.getpid()
        self.number, self._time, self._agreed = 0, 0.0, 0
        self.is_urgent = False  # whether there was a second one
        self._handlers: dict[int, Any] = {}
        self._launcher = launcher()

    def on_train_begin(
        self, args: ImageTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.number, self._agreed, self.is_urgent = 0, 0, False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._request)

    def restore(self) -> None:
        """Signals do again what they did before training."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _request(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a worker process that has just been forked
        if self.number:
            if time.monotonic() - self._time > 1.0:
                self.number, self.is_urgent = number, True
                raise KeyboardInterrupt
            return
        self.number, self._time = number, time.monotonic()
        self._announce("Ctrl-C" if number == signal.SIGINT else "SIGTERM")

    def _announce(self, what: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            # Not print, which fails if the signal came while something else was printing.
            os.write(2, f"\n{what}: saving a checkpoint after this step. Once more to stop at once.\n".encode())

    def _agree(self) -> bool:
        if not self.number and self._launcher not in (None, os.getppid()):
            self.number, self._time = signal.SIGTERM, time.monotonic()
            self._announce("The launcher has ended")
        self._agreed = self._agreed or self.processes.largest(self.number)
        self.number = self._agreed or self.number
        return self._agreed > 0

    def on_step_end(
        self, args: ImageTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The last step of an epoch is left to on_epoch_end: a checkpoint from before the evaluation would skip it.
        if self._agree() and state.epoch % 1 != 0:
            control.should_save = True

    def on_epoch_end(
        self, args: ImageTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._agree():
            control.should_save = True

    def on_save(
        self, args: ImageTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._agree():
            raise KeyboardInterrupt


class Progress(ProgressCallback):
    """The stock progress bar, with one short line for each report."""

    def on_log(
        self,
        args: ImageTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        probes = {name.removeprefix("probe_"): value for name, value in logs.items() if name.startswith("probe_")}
        part = "held out" if "eval_loss" in logs else "training" if "loss" in logs else "probe" if probes else None
        if part is None or not state.is_world_process_zero or self.training_bar is None:
            return
        names = ("loss", "accuracy", "top5_accuracy", "mean_average_precision", "micro_f1", "macro_f1")
        names = (*names, "grad_norm", "learning_rate")
        values = {name: logs.get(f"eval_{name}", logs.get(name)) for name in names} | probes
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)
        self.training_bar.write(f"epoch {logs['epoch']:<6.4g} {part}  {shown}")
