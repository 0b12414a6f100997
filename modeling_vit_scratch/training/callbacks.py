# SPDX-License-Identifier: Apache-2.0
"""Callbacks: the epoch of the training set, a checkpoint at Ctrl-C and SIGTERM, the progress bar."""

import os
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from ..common.errors import TrainingInterrupted
from ..common.processes import Processes, StopSignals
from ..data.dataset import ImageClassificationDataset
from .arguments import ImageTrainingArguments


class SetEpoch(TrainerCallback):
    """Gives the training set its epoch. The data loader does so too, but not when it resumes in the middle of one."""

    def __init__(self, train_set: ImageClassificationDataset) -> None:
        self.train_set = train_set

    def on_epoch_begin(
        self, args: ImageTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.train_set.set_epoch(int(state.epoch or 0))


class SaveOnSignal(TrainerCallback):
    """
    Ctrl-C or SIGTERM finishes the step, saves a checkpoint from which training resumes exactly, and ends the run.
    Several processes agree on the step, whichever of them got the signal. The trainer calls `signals.restore`.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes, self.signals, self._agreed = processes, StopSignals(_announce), 0

    @property
    def number(self) -> int:
        """Of the signal that asks to stop, known to all processes or to this one alone; 0 if there is none."""
        return self._agreed or self.signals.number

    def on_train_begin(
        self, args: ImageTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._agreed = 0
        self.signals.start()

    def _agree(self) -> bool:
        self._agreed = self._agreed or self.processes.largest(self.signals.poll())
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
            raise TrainingInterrupted("Stopped after a checkpoint.", self._agreed)


def _announce(what: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        # Not print, which fails if the signal came while something else was printing.
        os.write(2, f"\n{what}: saving a checkpoint after this step. Once more to stop at once.\n".encode())


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
