# SPDX-License-Identifier: Apache-2.0
"""
The stock Trainer for runs that get killed, filled up or sick.

A checkpoint is whole or not there; a signal ends the run at the end of a step, with a checkpoint; a step that is no
number never reaches the weights; whatever else stops a run is told in one message, with what to do.
"""

import dataclasses
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from ..common.errors import InputError, TrainingInterrupted, TrainingStopped, lost_worker, without_worker_traceback
from ..common.processes import Processes
from ..data.loader import release_workers
from ..image_processing_vit_scratch import ImageDecodeError
from . import run_folder as checkpoints
from .callbacks import SaveOnSignal


# The arguments of the Trainer that decide the weights a run ends with, on the same hardware.
DECIDING_ARGUMENTS = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "torch_compile",
    "dataloader_drop_last",
    "smallest_area",
    "images_on_device",
    "max_broken_images",
)
# How many numbers an optimizer keeps for each weight, where it is known.
_OPTIMIZER_STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "lamb": 2, "sgd": 1}
# What torch and safetensors say where a file can't be written, in place of an OSError.
_WRITING_FAILED = re.compile(r"PytorchStreamWriter|unexpected pos|file write failed|iostream error", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class LookedAt:
    """
    A step, before the optimizer's, and whether it is sick.

    Attributes:
        number: counted from 1.
        losses, norm: of the batches that are accumulated, (N,), and of their gradient, ().
        keys: what the batches are made of.
        is_sick: on the host; of a GPU, only after `arrival`.
    """

    number: int
    losses: torch.Tensor
    norm: torch.Tensor
    keys: list[torch.Tensor | None]
    is_sick: torch.Tensor
    arrival: torch.cuda.Event | None = None


class SafeTrainer(Trainer):
    """
    See the module. Batches may hold, beside what the model takes, "keys" (B, 3) int64: seed, epoch and index of each
    image, and "broken": pairs of the index of an image that can't be read, and the reason.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.accelerator.dataloader_config.non_blocking = True  # the host does not wait while a batch is sent
        self.processes = Processes(self.args.ddp_timeout)
        self.save_on_signal = SaveOnSignal(self.processes)
        self.add_callback(self.save_on_signal)
        # Images of the training set that could not be read so far, by index: why.
        self.broken_images: dict[int, str] = {}
        self.is_staging = False
        # Of the batches that are accumulated to the latest step: what they are made of, (B, 3) each, and their losses.
        self.last_keys: list[torch.Tensor | None] = []
        self._losses: list[torch.Tensor] = []
        self._looked_at: LookedAt | None = None

    # -----------------------------------------------------------------------------------------------------------------
    # Starting and ending

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """
        As in Trainer. `True` resumes from the latest checkpoint that is whole.

        Raises:
            InputError: if there is none, or the disk has no room for one.
            TrainingStopped: if training can't go on.
            TrainingInterrupted: after Ctrl-C or SIGTERM, when the checkpoint is written.
        """
        output_dir = self.args.output_dir
        if self.args.should_save and checkpoints.remove_leftovers(output_dir):
            self._tell(f"Removed {Path(output_dir, checkpoints.STAGING)}: what a run that was killed had not finished.")
        latest, passed_over = checkpoints.latest_whole(output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = None if latest is None else str(latest)
            if latest is None:
                raise InputError(f"There is no checkpoint to resume from in {output_dir}.")
        if resume_from_checkpoint:
            if latest is not None and Path(resume_from_checkpoint).resolve() == latest.resolve():
                for checkpoint, reason in passed_over.items():
                    self._tell(f"warning: {checkpoint} is damaged, {reason}. Passed over.")
            self.prepare_resumption(str(resume_from_checkpoint))
        self._check_room()
        try:
            with self._explained():
                outcome = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
                self._stop_if_sick()
                return outcome
        finally:
            # Those of streams and of repeated images are not accelerate's.
            release_workers([*self.accelerator._dataloaders, self.callback_handler.train_dataloader])
            self.save_on_signal.signals.restore()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Trainer, with clear errors."""
        with self._explained():
            self._stop_if_sick()
            return super().evaluate(*args, **kwargs)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what torch raises for a signal, a lost reader or a lost process into a message for people."""
        try:
            yield
        except TrainingStopped:
            raise
        except (KeyboardInterrupt, RuntimeError) as error:
            if isinstance(error, KeyboardInterrupt) or self.save_on_signal.number:
                # Where the launcher ends all processes, the others may be gone first: not an error either.
                raise TrainingInterrupted(
                    f"Interrupted at step {self.state.global_step} of {self.state.max_steps}. {self._how_to_go_on()}",
                    self.save_on_signal.number or signal.SIGINT,
                ) from error
            if lost := lost_worker(error, f" at step {self.state.global_step + 1}"):
                raise TrainingStopped(
                    f"{lost} Ways out: a lower --dataloader_num_workers ({self.args.dataloader_num_workers} now) or "
                    f"--per_device_train_batch_size ({self.args.per_device_train_batch_size} now). "
                    + self._how_to_go_on()
                ) from error
            if self.args.world_size > 1 and _is_lost_contact(error):
                raise TrainingStopped(
                    f"Process {self.args.process_index} of {self.args.world_size} has lost the others at step "
                    f"{self.state.global_step + 1}: one of them has ended, see its message. {self._how_to_go_on()}"
                ) from error
            raise

    def _how_to_go_on(self) -> str:
        checkpoint, _ = checkpoints.latest_whole(self.args.output_dir)
        if checkpoint is None:
            return "No checkpoint was saved yet: run the same command to start again."
        return (
            f"The latest checkpoint is {checkpoint}: to go on, add --resume_from_checkpoint True to the same command."
        )

    def _tell(self, line: str) -> None:
        """One line for people, from one process, beside the progress bar."""
        if self.is_world_process_zero():
            tqdm.write(line, file=sys.stderr)

    # -----------------------------------------------------------------------------------------------------------------
    # What decides the run

    def settings(self) -> dict[str, Any]:
        """What decides the numbers of this run. A checkpoint has it, so that a resumed run can tell what is not so."""
        arguments = self.args.to_dict()
        recipe = dataclasses.asdict(self.args.recipe_arguments)
        return {
            **{f"--{name}": arguments[name] for name in DECIDING_ARGUMENTS},
            **{f"--{name}": value for name, value in recipe.items() if name not in ("recipe", "told")},
            "processes": self.args.world_size,
            "training images": self._count_images(),
            "augmentation": self.train_dataset.augmentation.description,
            "device": self.args.device.type,
            "torch": torch.__version__,
        }

    def _count_images(self) -> int | None:
        try:
            return len(self.train_dataset)
        except TypeError:  # a stream
            return None

    def prepare_resumption(self, checkpoint: str) -> None:
        """Takes over which images are broken, and tells what is not as in the run that wrote the checkpoint."""
        manifest = checkpoints.read_manifest(checkpoint)
        self.broken_images = {int(index): reason for index, reason in manifest.get("broken_images", {}).items()}
        if "settings" not in manifest:
            self._tell(f"warning: {checkpoint} does not say which settings its run had. Give the same ones again.")
            return
        different = checkpoints.differences(manifest["settings"], self.settings())
        if different:
            lines = "".join(f"\n    {line}" for line in different)
            self._tell(
                f"warning: {Path(checkpoint).name} is of a run with other settings. This one goes on with its own, and "
                f"does not end with the weights of a run without a stop:{lines}"
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        # The Trainer writes a checkpoint into this folder, and looks there for others to remove.
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, checkpoints.STAGING) if self.is_staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in Trainer; the checkpoint gets its name when all of it is on the disk, and then older ones go."""
        self._stop_if_sick()
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        staged, checkpoint = folder / checkpoints.STAGING / name, folder / name
        with self._writing(name, folder):
            self.is_staging = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.is_staging = False
            self.write_place(staged)
            self.processes.wait()  # for what the others write, such as their random state
            if self.state.best_model_checkpoint == str(staged):
                checkpoints.set_best_checkpoint(staged, self.state, checkpoint)
            if self.args.should_save:
                self._publish(staged, checkpoint)
        self.processes.wait()
        if self.args.local_process_index == 0 and staged.is_dir():
            self._publish(staged, checkpoint)  # on the disk of another machine
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            keep = {str(checkpoint), self.state.best_model_checkpoint or str(checkpoint)}
            checkpoints.rotate(folder, self.args.save_total_limit, keep)
            shutil.rmtree(folder / checkpoints.STAGING, ignore_errors=True)

    def _publish(self, staged: Path, checkpoint: Path) -> None:
        checkpoints.write_manifest(staged, {"settings": self.settings(), "broken_images": self.broken_images})
        checkpoints.publish(staged, checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer; every file of the model is whole or not there. Never pushes: `push_to_hub` does."""
        folder = Path(output_dir or self.args.output_dir)
        if self.is_staging:  # as part of a checkpoint
            self.write_model(str(folder))
            return
        staged = folder / checkpoints.STAGING / "model"
        with self._writing("the model", folder):
            write = self.write_finished_model if output_dir is None else self.write_model
            write(str(staged))
            if self.args.should_save:
                checkpoints.publish_files(staged, folder)
                shutil.rmtree(folder / checkpoints.STAGING)
        self.processes.wait()

    def write_model(self, folder: str) -> None:
        """Writes the model's files, with which training can go on."""
        super().save_model(folder, _internal_call=True)

    def write_finished_model(self, folder: str) -> None:
        """Writes the model's files, with which nothing but the model is to be used."""
        self.write_model(folder)

    def write_place(self, folder: Path) -> None:
        """Writes into a checkpoint where in its data every process is, if the number of the step does not say that."""

    @contextmanager
    def _writing(self, what: str, folder: Path) -> Iterator[None]:
        """Turns what a full disk raises into a message, and removes what could not be finished."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _WRITING_FAILED.search(str(error)):
                raise
            free = shutil.disk_usage(folder).free
            if self.args.should_save:
                shutil.rmtree(folder / checkpoints.STAGING, ignore_errors=True)
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise TrainingStopped(
                f"At step {self.state.global_step}, {what} could not be written to {folder}: {reason}.\n"
                f"{_megabytes(free)} were free there; a checkpoint takes about "
                f"{_megabytes(self.checkpoint_size())}. The unfinished files are removed, what was saved before is "
                "intact.\nMake room, e.g. by removing old runs, or save fewer checkpoints: a lower --save_total_limit "
                f"({self.args.save_total_limit} now), a higher --save_steps. {self._how_to_go_on()}"
            ) from error

    def checkpoint_size(self) -> int:
        """About how many bytes a checkpoint takes: the weights, and with training what the optimizer knows of them."""
        weights = sum(weight.numel() * weight.element_size() for weight in self.model.state_dict().values())
        trained = sum(
            weight.numel() * weight.element_size() for weight in self.model.parameters() if weight.requires_grad
        )
        states = 0 if self.args.save_only_model else _OPTIMIZER_STATES.get(self.args.optimizer_name, 0)
        average = 0 if self.args.recipe_arguments.ema_decay is None else weights
        return weights + states * trained + average

    def _check_room(self) -> None:
        """A disk that is too small is told of before the first step. Raises InputError if nothing fits."""
        if not self.args.should_save or self.args.save_strategy == "no":
            return
        folder = Path(self.args.output_dir).resolve()
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
        size, there = self.checkpoint_size(), len(checkpoints.find_checkpoints(folder))
        if free < size:
            raise InputError(
                f"A checkpoint takes about {_megabytes(size)}, but {_megabytes(free)} are free in {folder}. Make room, "
                "choose another --output_dir, or leave out checkpoints: --save_strategy no."
            )
        # While the newest is written, the one that it replaces is still there.
        needed = max((self.args.save_total_limit or 1) + 1 - there, 1) * size
        if free < needed:
            self._tell(
                f"warning: {_megabytes(free)} are free in {folder}, and the checkpoints of this run may take "
                f"{_megabytes(needed)}. If the disk gets full, the run stops. A lower --save_total_limit needs less."
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer, which takes one step too many where it resumes from the last one in the middle of an epoch."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """As in Trainer; remembers of which images the batches of a step are."""
        try:
            batches, num_items = super().get_batch_samples(epoch_iterator, *args, **kwargs)
        except ImageDecodeError as error:
            raise TrainingStopped(
                f"{without_worker_traceback(error)}\nRepair or remove this file, or let other images take the place of "
                f"up to N such files with --max_broken_images N. {self._how_to_go_on()}"
            ) from error
        self.last_keys, self._losses = [batch.get("keys") for batch in batches], []
        if self.args.max_broken_images:
            self._count_broken([pair for batch in batches for pair in batch.get("broken", ())])
        return batches, num_items

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # What is for us, and not for the model.
        return super()._prepare_inputs({name: inputs[name] for name in inputs if name not in ("keys", "broken")})

    def _count_broken(self, pairs: list[tuple[int, str]]) -> None:
        """Tells of images that could not be read. Raises TrainingStopped when they are too many."""
        found = {index: reason for index, reason in pairs if index not in self.broken_images}
        if not self.processes.largest(len(found)):
            return
        for index, reason in (pair for part in self.processes.everyones(found) for pair in part.items()):
            if index not in self.broken_images:
                self.broken_images[index] = reason
                self._tell(f"broken image {len(self.broken_images)}, another one takes its place: {reason}")
        if len(self.broken_images) > self.args.max_broken_images:
            lines = "".join(f"\n    {reason}" for reason in self.broken_images.values())
            raise TrainingStopped(
                f"{len(self.broken_images)} training images can't be read, more than --max_broken_images "
                f"{self.args.max_broken_images}:{lines}\nRepair or remove them, or raise the limit. "
                + self._how_to_go_on(),
                is_shared=True,
            )

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in Trainer; the loss is looked at when the step is complete, see `_get_grad_norm`."""
        loss = super().training_step(model, *args, **kwargs)
        self._losses.append(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """
        As in Trainer, which calls it between the gradient and the optimizer's step. Raises TrainingStopped for a loss
        or a gradient that is no number.

        Looking at a number means to wait for the device. Where the optimizer can leave out a step by itself, it is told
        to do so on the device, and the run stops when the next step has its gradient: nothing waits.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm)
        norm = torch.as_tensor(grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm).detach()
        losses = torch.stack(self._losses).float()
        # With float16 a gradient may overflow: the scaler leaves out that step, and lowers its scale.
        is_scaled = getattr(self.accelerator, "scaler", None) is not None
        looked_at = losses if is_scaled else torch.cat([losses, norm.to(losses).reshape(1)])
        is_sick, arrival = looked_at.isfinite().all().logical_not(), None
        self._stop_if_sick()  # the step before
        if optimizer := self._skipping_optimizer():
            optimizer.found_inf = is_sick.float()
            if is_sick.is_cuda:
                is_sick = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(is_sick, non_blocking=True)
                arrival = torch.cuda.Event()
                arrival.record()
        self._looked_at = LookedAt(self.state.global_step + 1, losses, norm, self.last_keys, is_sick, arrival)
        if optimizer is None:
            self._stop_if_sick()
        return grad_norm

    def _skipping_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer, if it leaves out a step that its `found_inf` is 1 for: torch's fused ones, on a GPU."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # inside of accelerate's, torch's own
        is_able = getattr(optimizer, "_step_supports_amp_scaling", False) and self.accelerator.scaler is None
        return optimizer if is_able and self.args.device.type == "cuda" and not self.is_fsdp_enabled else None

    def _stop_if_sick(self) -> None:
        """Raises TrainingStopped if the step that was looked at last is."""
        step, self._looked_at = self._looked_at, None
        if step is None:
            return
        if step.arrival is not None:
            step.arrival.synchronize()
        if step.is_sick:
            is_scaled = getattr(self.accelerator, "scaler", None) is not None
            self._stop_sick(step, is_everywhere=not (is_scaled or step.norm.isfinite()))

    def _stop_sick(self, step: LookedAt, is_everywhere: bool) -> None:
        """Every process names its images. They have one gradient: where that is sick, all of them are here."""
        losses, norm = step.losses.tolist(), float(step.norm)
        who = f"process {self.args.process_index}, " if self.args.world_size > 1 else ""
        lines = [
            f"    {who}batch {number} of {len(losses)}, loss {loss:.4g}: {', '.join(self._names(keys))}"
            for number, (loss, keys) in enumerate(zip(losses, step.keys), start=1)
        ]
        sick_loss = next((loss for loss in losses if not torch.tensor(loss).isfinite()), None)
        if is_everywhere:
            everyones = self.processes.everyones((sick_loss, lines))
            lines = [line for _, part in everyones for line in part]
            sick_loss = next((loss for loss, _ in everyones if loss is not None), None)
        found = f"The gradient's norm is {norm:g}" if sick_loss is None else f"The loss is {sick_loss:g}"
        raise TrainingStopped(
            f"{found} at step {step.number} of {self.state.max_steps}. The weights are those of the "
            "step before. The images of this step:\n" + "\n".join(lines) + "\nUsual ways out: a lower --learning_rate "
            f"({self.args.learning_rate:g} now), more --warmup_steps, --max_grad_norm 1, --bf16 False. "
            + self._how_to_go_on(),
            is_shared=is_everywhere,
        )

    def _names(self, keys: torch.Tensor | None) -> list[str]:
        return ["?"] if keys is None else [self.train_dataset.name(int(index)) for index in keys[:, 2]]


def _is_lost_contact(error: RuntimeError) -> bool:
    if isinstance(error, torch.distributed.DistError):
        return True
    return re.search(r"closed by peer|connection reset|gloo/transport|broken pipe", str(error), re.I) is not None


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
