# SPDX-License-Identifier: Apache-2.0
"""What a run prints while it trains: a bar on a terminal, a line an epoch in a log file, and how long it takes."""

import math
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState

from .trainer import ImageTrainer


# The first steps are slower than the others: memory, kernels and readers are new.
_WARM_STEPS, _TIMED_STEPS = 2, 8
_LONG_SECONDS = 30 * 60
_HEARTBEAT_SECONDS = 10 * 60
_UNDECIDED = 0.1  # how much of ln K the losses of a guess differ by
_LAST_LOSSES = 10  # one batch can be far from the mean
_NAMES = ("loss", "accuracy", "top5_accuracy", "mean_average_precision", "micro_f1", "macro_f1", "rmse", "mae", "r2")
_ENTROPIES = ("teacher_entropy", "mean_teacher_entropy")  # of --objective dino


def add_progress(trainer: ImageTrainer) -> None:
    """Puts our lines in the place of the Trainer's."""
    shown = LogLines() if trainer.args.disable_tqdm else Progress()
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    for callback in (shown, TimeEstimate(trainer)):
        trainer.add_callback(callback)


def report_line(logs: dict[str, float]) -> str | None:
    """One line for a report of the Trainer: training, held-out or probe metrics. None for other reports."""
    probes = {name.removeprefix("probe_"): value for name, value in logs.items() if name.startswith("probe_")}
    part = "held out" if "eval_loss" in logs else "training" if "loss" in logs else "probe" if probes else None
    if part is None:
        return None
    names = (*_NAMES, *_ENTROPIES, "grad_norm", "learning_rate")
    values = {name: logs.get(f"eval_{name}", logs.get(name)) for name in names} | probes
    shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)
    return f"epoch {logs['epoch']:<6.4g} {part}  {shown}"


class Progress(ProgressCallback):
    """The stock progress bar, with one short line for each report."""

    def on_log(self, args: Any, state: TrainerState, *_: Any, logs: dict[str, float], **kwargs: Any) -> None:
        line = report_line(logs)
        if line is not None and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(line)


class LogLines(TrainerCallback):
    """No bar: one line an epoch with the mean training loss since the last line and the held-out metrics."""

    def __init__(self) -> None:
        self.losses, self.printed_at, self.is_training, self.entropies = [], 0.0, False, []

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        self.losses, self.printed_at, self.is_training = [], time.monotonic(), True

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        self.is_training = False

    def on_log(self, args: Any, state: TrainerState, *_: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.entropies = [f"{name} {logs[name]:.4g}" for name in _ENTROPIES if name in logs]
        is_due = time.monotonic() - self.printed_at > _HEARTBEAT_SECONDS
        if "eval_loss" in logs or any(name.startswith("probe_") for name in logs) or is_due:
            self._print(state, logs)

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not control.should_evaluate and self.losses:
            self._print(state, {})

    def _print(self, state: TrainerState, logs: dict[str, float]) -> None:
        if not self.is_training or not state.is_world_process_zero:
            return
        parts = [", ".join([f"loss {sum(self.losses) / len(self.losses):.4g}", *self.entropies])] if self.losses else []
        held_out = [f"{name} {logs[f'eval_{name}']:.4g}" for name in _NAMES if f"eval_{name}" in logs]
        parts += [f"held out: {', '.join(held_out)}"] if held_out else []
        parts += [f"{name.removeprefix('probe_')} {logs[name]:.4g}" for name in logs if name.startswith("probe_")]
        step = f"epoch {state.epoch:.4g}, step {state.global_step:,} of {state.max_steps:,}"
        print(f"{step}: {'; '.join(parts)}", flush=True)
        self.losses, self.printed_at = [], time.monotonic()


class TimeEstimate(TrainerCallback):
    """After the first steps one line says how long the run takes and, if that is long, what is shorter."""

    def __init__(self, trainer: ImageTrainer) -> None:
        self.trainer, self.steps, self.started = trainer, 0, 0.0

    def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
        if self.steps == _WARM_STEPS:
            self.started = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        is_due = self.steps == _WARM_STEPS + _TIMED_STEPS and state.max_steps > 4 * self.steps
        if is_due and state.is_world_process_zero:
            seconds = (time.monotonic() - self.started) / _TIMED_STEPS
            image_hw = self.trainer.model.config.image_hw
            tqdm.write(time_line(seconds, state.max_steps - state.global_step, image_hw))


def time_line(seconds: float, steps: int, image_hw: tuple[int, int]) -> str:
    """How long so many steps of so many seconds take, without evaluations."""
    total = seconds * steps
    line = f"About {duration(total)} to go: {steps:,} steps of {seconds:.2g} seconds, and the evaluations."
    if total < _LONG_SECONDS:
        return line
    height, width = image_hw
    return (
        f"{line} Shorter: smaller images (--image_size, now {height} x {width}: half of it takes about a quarter of "
        "the time), fewer epochs (--num_train_epochs), a smaller network (--variant) or pretrained weights "
        "(--model_name_or_path), which need fewer epochs."
    )


def undecided_line(trainer: ImageTrainer, held_out_loss: float) -> str | None:
    """A line if scores hardly differ: the softmax loss of a guess is ln K. None if they differ, or for other losses."""
    config = trainer.model.config
    is_plain = trainer.objective is None and trainer.compute_loss_func is None
    if not is_plain or config.problem_type != "single_label_classification" or config.num_labels < 2:
        return None
    guess, losses = math.log(config.num_labels), [log["loss"] for log in trainer.state.log_history if "loss" in log]
    losses = losses[-_LAST_LOSSES:] or [guess]
    if abs(held_out_loss / guess - 1) > _UNDECIDED or sum(losses) / len(losses) / guess < 1 - _UNDECIDED:
        return None
    return (
        f"The scores of the {config.num_labels} classes are hardly apart: the loss is {held_out_loss:.3g} on held-out "
        f"images, and that of a guess is {guess:.3g}. Train longer (--num_train_epochs), try another --learning_rate "
        f"({trainer.args.learning_rate:g} now), or start from pretrained weights (--model_name_or_path)."
    )


def duration(seconds: float) -> str:
    """In the unit that people would take."""
    if seconds < 90:
        return f"{math.ceil(seconds)} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{seconds / 3600:.1f} hours"
