# SPDX-License-Identifier: Apache-2.0
"""Callbacks: the training set's epoch, a checkpoint at Ctrl-C and SIGTERM, the progress bar, the average of weights."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..common.errors import InputError, TrainingInterrupted
from ..common.processes import Processes, StopSignals
from ..data.dataset import ImageClassificationDataset


class SetEpoch(TrainerCallback):
    """Sets the epoch of the training set. The data loader does not if it resumes in the middle of an epoch."""

    def __init__(self, train_set: ImageClassificationDataset) -> None:
        self.train_set = train_set

    def on_epoch_begin(self, args: Any, state: TrainerState, *_: Any, **kwargs: Any) -> None:
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
        """The number of the signal that asked to stop, in this process or in any; 0 if there is none."""
        return self._agreed or self.signals.number

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        self._agreed = 0
        self.signals.start()

    def _agree(self) -> bool:
        self._agreed = self._agreed or self.processes.maximum(self.signals.poll())
        return self._agreed > 0

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The last step of an epoch is left to on_epoch_end: a checkpoint from before the evaluation would skip it.
        if self._agree() and state.epoch % 1 != 0:
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self._agree():
            control.should_save = True

    def on_save(self, *_: Any, **kwargs: Any) -> None:
        if self._agree():
            raise TrainingInterrupted("Stopped after a checkpoint.", self._agreed)


def _announce(what: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        # Not print, which fails if the signal came while something else was printing.
        os.write(2, f"\n{what}: saving a checkpoint after this step. Once more to stop at once.\n".encode())


class Progress(ProgressCallback):
    """The stock progress bar, with one short line for each report."""

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
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


class WeightAverage(TrainerCallback):
    """
    An exponential moving average (EMA) of the weights, which is evaluated and becomes the final model (Polyak
    averaging; the paper, section 4.1, uses 0.9999).

    After every optimizer step, average = decay * average + (1 - decay) * weights, in float32, on the weights' device. A
    checkpoint holds both the weights and the average (average.safetensors), so that a run resumes bit for bit. With
    FSDP2 every process averages its own shards; a checkpoint holds them in average_fsdp_0, a folder of
    torch.distributed.checkpoint, from which any number of processes can resume.

    The trainer calls `save` in every process, sets `start_from`, and evaluates inside of `applied_to`.

    Args:
        decay: above 0 and below 1.
        warmup: lowers the decay to at most (1 + n) / (10 + n) at step n, as TensorFlow's ExponentialMovingAverage
            does. Without it, a run of fewer than 1 / (1 - decay) steps ends close to its initial weights.
    """

    FILE, SHARDS = "average.safetensors", "average_fsdp_0"

    def __init__(self, decay: float, warmup: bool = True) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"The decay {decay:g} of the weights' average must lie between 0 and 1, e.g. 0.9999.")
        self.decay, self.warmup = decay, warmup
        self.average: dict[str, torch.Tensor] = {}
        self.start_from: str | None = None  # a checkpoint
        self.is_active = False

    def decay_at(self, step: int) -> float:
        """The decay at an optimizer step."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    def on_train_begin(self, *_: Any, model: nn.Module, **kwargs: Any) -> None:
        self.average = {name: weight.detach().float().clone() for name, weight in _weights(model).items()}
        if self.start_from is not None:
            self._load(self.start_from)
        self.is_active = True

    @torch.no_grad()
    def on_step_end(self, args: Any, state: TrainerState, *_: Any, model: nn.Module, **kwargs: Any) -> None:
        average, weights = (list(map(_own, tensors.values())) for tensors in (self.average, _weights(model)))
        weights = [weight.detach().float() for weight in weights]
        torch._foreach_lerp_(average, weights, 1.0 - self.decay_at(state.global_step))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """The model becomes the average, or that of the best checkpoint if the Trainer has loaded it."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(state.best_model_checkpoint)
        _fill(model, self.average)
        self.is_active = False

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights inside of the `with` block, and its own afterwards."""
        if not self.is_active:
            yield
            return
        own = {name: weight.detach().clone() for name, weight in _weights(model).items()}
        _fill(model, self.average)
        try:
            yield
        finally:
            _fill(model, own)

    def save(self, folder: str, is_writer: bool = True) -> None:
        """
        Writes the average into a checkpoint: from the writer's process, or with shards from all. After training it
        writes nothing, since the model is the average.
        """
        if not self.is_active:
            return
        if self.is_sharded:
            writer = checkpoint.FileSystemWriter(Path(folder, self.SHARDS))
            checkpoint.save({"model": self.average}, storage_writer=writer)
        elif is_writer:
            save_file({name: weight.contiguous() for name, weight in self.average.items()}, Path(folder, self.FILE))

    @property
    def is_sharded(self) -> bool:
        """Whether every process has only a part of the average."""
        return any(isinstance(weight, DTensor) for weight in self.average.values())

    def _load(self, folder: str) -> None:
        path = Path(folder, self.SHARDS if self.is_sharded else self.FILE)
        if not path.exists():
            raise InputError(
                f"The checkpoint {folder} has no average of the weights ({path.name}): its run had no --ema_decay. "
                "Go on without it, too, or start a new run."
            )
        if self.is_sharded:
            checkpoint.load({"model": self.average}, storage_reader=checkpoint.FileSystemReader(path))
            return
        stored = load_file(path)
        for name, weight in self.average.items():
            weight.copy_(stored[name])


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    All parameters, also frozen ones: the average is a whole model. This network has no buffers that change.

    FSDP2 may keep whole weights after an evaluation; resharding makes changes of the shards count.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The local shard of a tensor, in shared memory; without FSDP the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _fill(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    for name, weight in _weights(model).items():
        _own(weight).copy_(_own(values[name]))
