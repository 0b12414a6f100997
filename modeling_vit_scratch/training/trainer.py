# SPDX-License-Identifier: Apache-2.0
"""
transformers' Trainer for images. It has a step guard, a run folder, a Hub pusher and an average of the weights; what it
replaces of the Trainer's private methods stands in trainer_overrides.py.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather, recursively_apply, send_to_device
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import TrainOutput

from ..common.errors import InputError, TrainingInterrupted, TrainingStopped, lost_worker, without_worker_traceback
from ..common.files import STATE, read_manifest
from ..common.processes import Processes, has_lost_contact
from ..data.loader import repeating_loader
from ..data.pixels import Normalize, mix
from ..data.streaming import StreamDataset, StreamPlace, stream_loader
from ..hub.privacy import shareable
from ..hub.pushing import HubPusher, link_folder
from ..image_processing_vit_scratch import ImageDecodeError
from .arguments import LAMB, ImageTrainingArguments
from .callbacks import SaveOnSignal, WeightAverage
from .optimization import Lamb, decay_parameter_names, describe_groups, parameter_groups
from .run_folder import RunFolder, check_same_model, checkpoint_size, run_settings
from .step_guard import StepGuard
from .trainer_overrides import TrainerOverrides, WorkerProcesses


class ImageTrainer(TrainerOverrides, Trainer):
    """
    See the module. Everything else, distributed training included, is the stock Trainer's.

    Args:
        model, args: what to train, and how.
        average: of the weights: it is evaluated, and in the end it is the model.
        stream_position: of a training set that is a stream.
        objective: what it learns, in words, if that is not to classify.
        finished_model: from the model and its weights to what is saved in the end and pushed. Default: the model.
        others: further arguments of the Trainer.

    Attributes:
        settings: what decides the numbers of this run.
        samples_by_process: training images that went through the model in each process, since the start or the
            resumption; those that fill up a last batch count, too. Known after training.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: ImageTrainingArguments,
        average: WeightAverage | None = None,
        stream_position: StreamPlace | None = None,
        objective: str | None = None,
        finished_model: Callable[[PreTrainedModel, dict[str, torch.Tensor]], PreTrainedModel] | None = None,
        **others: Any,
    ) -> None:
        self.pusher = HubPusher(args, self.log_line, self._on_push_begin, self.copy_model)  # the Trainer prepares it
        super().__init__(model, args, **others)
        self.accelerator.dataloader_config.non_blocking = True  # the host does not wait while a batch is sent
        self.average, self.stream_position = average, stream_position
        self.objective, self.finished_model = objective, finished_model
        self.processes, self.workers, self.resumed_step = Processes(args.ddp_timeout), WorkerProcesses(), 0
        self.run_folder = RunFolder(args, self.processes, self.log_line, checkpoint_size(model, args))
        self.step_guard = StepGuard(
            args,
            self.processes,
            image_name=lambda index: self.train_dataset.name(index),
            log=self.log_line,
            resume_advice=self.run_folder.resume_advice,
        )
        kind = None if objective is None else f"{type(model).__name__}, {objective}"
        self.settings = run_settings(args, self.train_dataset, kind)
        self.save_on_signal = SaveOnSignal(self.processes)
        self._samples, self.samples_by_process = 0, []
        for callback in (average, self.save_on_signal, stream_position):
            if callback is not None:
                self.add_callback(callback)

    def log_line(self, line: str) -> None:
        """Prints a line for people, from one process, beside the progress bar."""
        if self.args.process_index == 0:
            tqdm.write(line, file=sys.stderr)

    # -----------------------------------------------------------------------------------------------------------------
    # What is told before training

    def describe(self) -> list[str]:
        """Where it pushes, the recipe, the augmentation, which weights decay and which learning rates there are."""
        recipe = self.args.recipe_arguments.message
        parts = [self.pusher.describe(), recipe, self.describe_sharding(), self.describe_augmentation()]
        return [*filter(None, parts), describe_groups(self.parameter_groups())]

    def describe_sharding(self) -> str | None:
        """A line where FSDP was asked for and can't be had: accelerate says nothing."""
        wanted = self.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
        if not wanted or self.is_fsdp_enabled:
            return None
        return "FSDP shards over accelerators only: on a CPU every process keeps the whole model (DDP)."

    def describe_augmentation(self) -> str:
        """One line on what happens to training images, one by one and in batches; and one on the objective."""
        mixing = self.data_collator.description if self.objective is None else None
        line = f"Augmentation: {'; '.join(filter(None, [self.augmentation_of_images, mixing]))}."
        return line if self.objective is None else f"{line}\nObjective: {self.objective}."

    @property
    def augmentation_of_images(self) -> str:
        """In words, for people and records; without what is done to batches."""
        repeats, description = self.args.recipe_arguments.aug_repeats, self.train_dataset.augmentation.description
        return description if repeats == 1 else f"each image {repeats} times in a row; {description}"

    # -----------------------------------------------------------------------------------------------------------------
    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """
        As in Trainer. `True` resumes from the latest checkpoint that is whole. A run that has to stop pushes its latest
        checkpoint first, if it pushes.

        Raises:
            InputError: if there is no such checkpoint, it is of another model, or the disk has no room for one.
            TrainingStopped: if training can't go on.
            TrainingInterrupted: after Ctrl-C or SIGTERM, when the checkpoint is written.
        """
        self.run_folder.prepare()
        checkpoint = self.run_folder.checkpoint_to_resume(resume_from_checkpoint)
        if checkpoint is not None:
            self._prepare_resumption(checkpoint)
        try:
            try:
                with self._errors_explained():
                    outcome = super().train(resume_from_checkpoint=checkpoint, **kwargs)
                    self.step_guard.stop_if_bad()
                    samples = torch.tensor([self._samples], device=self.args.device)
                    self.samples_by_process = gather(samples).tolist()
                    return outcome
            finally:
                self.workers.release()
                self.save_on_signal.signals.restore()
        except (TrainingInterrupted, TrainingStopped):
            if not self.save_on_signal.signals.is_urgent:
                self.pusher.push_unpushed()
            raise

    def _prepare_resumption(self, checkpoint: str) -> None:
        """Checks that a checkpoint is of this model, warns of other settings, and tells the parts to go on from it."""
        check_same_model(self.model.config, checkpoint)
        manifest = read_manifest(checkpoint)
        self.run_folder.compare_settings(checkpoint, manifest, self.settings)
        broken = manifest.get("broken_images", {})
        self.step_guard.broken_images = {int(index): reason for index, reason in broken.items()}
        self.resumed_step = json.loads(Path(checkpoint, STATE).read_text(encoding="utf-8"))["global_step"]
        for part in (self.average, self.stream_position):
            if part is not None:
                part.start_from = checkpoint

    @contextmanager
    def _errors_explained(self) -> Iterator[None]:
        """Turns what torch raises for a signal, a lost worker or a lost process into a message for people."""
        try:
            yield
        except TrainingStopped:
            raise
        except (KeyboardInterrupt, RuntimeError) as error:
            state, arguments, advice = self.state, self.args, self.run_folder.resume_advice()
            if isinstance(error, KeyboardInterrupt) or self.save_on_signal.number:
                # Where the launcher ends all processes, the others may be gone first: not an error either.
                raise TrainingInterrupted(
                    f"Interrupted at step {state.global_step} of {state.max_steps}. {advice}",
                    self.save_on_signal.number or signal.SIGINT,
                ) from error
            if lost := lost_worker(error, f" at step {state.global_step + 1}"):
                raise TrainingStopped(
                    f"{lost} Ways out: a lower --dataloader_num_workers ({arguments.dataloader_num_workers} now) or "
                    f"--per_device_train_batch_size ({arguments.per_device_train_batch_size} now). {advice}"
                ) from error
            if arguments.world_size > 1 and has_lost_contact(error):
                raise TrainingStopped(
                    f"Process {arguments.process_index} of {arguments.world_size} has lost the others at step "
                    f"{state.global_step + 1}: one of them has ended, see its message. {advice}"
                ) from error
            raise

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> tuple[int, ...]:
        """As in Trainer. Resumed from its last step, a run has no epoch left: the Trainer would take one more step."""
        epochs, steps_per_epoch, *others, max_steps = super().set_initial_training_values(*args, **kwargs)
        if self.resumed_step >= max_steps:
            epochs = max_steps // steps_per_epoch
        return epochs, steps_per_epoch, *others, max_steps

    def get_batch_samples(self, epoch_iterator: Iterator, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """As in Trainer; the step guard learns of which images the batches of a step are."""
        try:
            batches, num_items = super().get_batch_samples(epoch_iterator, *args, **kwargs)
        except ImageDecodeError as error:
            raise TrainingStopped(
                f"{without_worker_traceback(error)}\nRepair or remove this file, or let other images take the place of "
                f"up to N such files with --max_broken_images N. {self.run_folder.resume_advice()}"
            ) from error
        self.step_guard.begin_step(batches)
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As in Trainer, of a batch as the loader gives it."""
        inputs = self.prepare_batch(inputs)
        self._samples += len(inputs["pixel_values"])
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_guard.add_loss(loss)
        return loss

    def prepare_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """From a batch of the loader to what the model takes: on its device, normalised and mixed, see `pixels`."""
        batch = {name: value for name, value in batch.items() if name not in ("keys", "broken")}
        batch = send_to_device(batch, self.args.device)
        weights, boxes = (batch.pop(name, None) for name in ("mixing_weights", "mixing_boxes"))
        if self._normalize is not None:
            batch["pixel_values"] = self._normalize(batch["pixel_values"])
        if weights is not None:
            batch["pixel_values"] = mix(batch["pixel_values"], weights, boxes)
        return batch

    @cached_property
    def _normalize(self) -> Normalize | None:
        return Normalize.from_processor(self.processing_class)

    # -----------------------------------------------------------------------------------------------------------------
    # The optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Kernels only: see `optimization.decay_parameter_names`."""
        return decay_parameter_names(model)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer gets: see `optimization.parameter_groups`."""
        arguments, recipe = self.args, self.args.recipe_arguments
        multipliers = recipe.layer_decay, recipe.head_learning_rate_multiplier
        return parameter_groups(self.model, arguments.learning_rate, arguments.weight_decay, *multipliers)

    def get_optimizer_cls_and_kwargs(
        self, args: ImageTrainingArguments, model: nn.Module | None = None
    ) -> tuple[Any, Any]:
        """As in Trainer, or LAMB; with groups of its own where layers or the head have rates of their own."""
        if args.optim == LAMB:
            betas = (args.adam_beta1, args.adam_beta2)
            kind, settings = Lamb, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
        else:
            kind, settings = super().get_optimizer_cls_and_kwargs(args, model)
        if kind is torch.optim.SGD and "fused=true" in (args.optim_args or "").replace(" ", "").lower():
            settings["fused"] = True  # which the Trainer drops
        if args.recipe_arguments.layer_decay != 1.0 or args.recipe_arguments.head_learning_rate_multiplier != 1.0:
            if is_optimizer_factory(kind) or "params" in settings or "model" in settings:
                raise InputError(
                    f"--optim {args.optimizer_name} makes groups of parameters of its own. Leave out --layer_decay and "
                    "--head_learning_rate_multiplier, or take --optim adamw_torch_fused or sgd."
                )
            settings["params"] = self.parameter_groups()
        return kind, settings

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Trainer, with clear errors; with --ema_decay, of the averaged weights."""
        with self._errors_explained():
            self.step_guard.stop_if_bad()
            with nullcontext() if self.average is None else self.average.applied_to(self.model):
                return super().evaluate(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """
        As in Trainer. With several processes the last batches are filled up with images that were there before, which
        the Trainer leaves out of the metrics, but not out of the loss. Here the loss is the mean without them.
        """
        inputs = self.prepare_batch(inputs)
        number, state = len(inputs["pixel_values"]), self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return super().prediction_step(model, inputs, *args, **kwargs)
        own = min(max(state.remainder - self.args.process_index * number, 1), number)  # all processes have to compute
        inputs = {name: value[:own] if torch.is_tensor(value) else value for name, value in inputs.items()}
        loss, *predictions = super().prediction_step(model, inputs, *args, **kwargs)

        def filled_up(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor, tensor[:1].expand(number - own, *tensor.shape[1:])])

        return loss, *(recursively_apply(filled_up, part) for part in predictions)

    # -----------------------------------------------------------------------------------------------------------------
    # Loaders

    def get_train_dataloader(self) -> DataLoader:
        """As in Trainer. Streams and repeated augmentation have loaders of their own."""
        repeats = self.args.recipe_arguments.aug_repeats
        if isinstance(self.train_dataset, StreamDataset):
            loader, self.stream_position.batches = stream_loader(self.train_dataset, self.args, self.data_collator)
        elif repeats > 1:
            loader = repeating_loader(self.train_dataset, self.args, repeats, self.data_collator)
        else:
            loader = super().get_train_dataloader()
        return self.workers.add(loader)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """As in Trainer, where --dataloader_drop_last leaves out held-out images too; here it spares them."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return self.workers.add(super().get_eval_dataloader(*args, **kwargs))
        finally:
            self.args.dataloader_drop_last = drop_last

    # -----------------------------------------------------------------------------------------------------------------
    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        As in Trainer; every file of the model is whole or not there. Without a folder it is the finished model, which
        is not to be trained further. Never pushes: `push_to_hub` does.
        """
        if self.run_folder.is_writing_checkpoint:
            self._write_model(Path(output_dir))
            return
        folder = Path(output_dir or self.args.output_dir)
        with self.run_folder.new_model(folder, self.state.global_step) as staged:
            if output_dir is not None or self.finished_model is None:
                self._write_model(staged)
                return
            weights = self.accelerator.get_state_dict(self.model)  # with sharded weights, every process takes part
            if self.args.should_save:
                self._write_finished_model(staged, weights)

    def _write_model(self, folder: Path) -> None:
        """Writes the model's files, with which training can go on; during training with the average beside them."""
        if self.is_fsdp_enabled:
            self._write_sharded_model(folder)
        else:
            super().save_model(str(folder), _internal_call=True)
        if self.args.should_save:
            self._write_arguments(folder)
        if self.average is not None:
            self.average.save(str(folder), is_writer=self.args.should_save)

    def _write_sharded_model(self, folder: Path) -> None:
        """
        As the Trainer does with FSDP, but that checkpoints have the configuration, with which their shards can be
        loaded, and that the finished model is whole. FSDP2 gives the model a class of torch's, whose code the Trainer
        would save with it.
        """
        plugin = self.accelerator.state.fsdp_plugin
        if not self.run_folder.is_writing_checkpoint:
            plugin.set_state_dict_type("FULL_STATE_DICT")
        is_whole = "FULL_STATE_DICT" in str(plugin.state_dict_type)
        weights = self.accelerator.get_state_dict(self.model) if is_whole else None  # every process takes part
        if not self.args.should_save:
            return
        if is_whole:
            sharded = type(self.model)
            self.model.__class__ = next(kind for kind in sharded.__mro__ if not issubclass(kind, FSDPModule))
            try:
                self.model.save_pretrained(folder, state_dict=weights)
            finally:
                self.model.__class__ = sharded
        self.model.config.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)

    def _write_finished_model(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        self.finished_model(self.model, weights).save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
        self._write_arguments(folder)

    def _write_arguments(self, folder: Path) -> None:
        """Writes every argument that is no secret and no local path, in place of the Trainer's pickle of them all."""
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        text = json.dumps(shareable(self.args.to_dict()), indent=2, sort_keys=True, ensure_ascii=False)
        (folder / "training_args.json").write_text(text + "\n", encoding="utf-8")

    # -----------------------------------------------------------------------------------------------------------------
    # The Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in Trainer, which calls this before training; raises InputError if nothing can be pushed."""
        if self.is_world_process_zero():
            self.hub_model_id, self.push_in_progress = self.pusher.prepare(), self.pusher

    def _on_push_begin(self) -> None:
        self.callback_handler.on_push_begin(self.args, self.state, self.control)

    def copy_model(self, checkpoint: Path, folder: Path) -> None:
        """Puts the finished model of a checkpoint into a new folder. Takes no random numbers from training."""
        file = checkpoint / "model.safetensors"
        if self.finished_model is None or not file.is_file():
            link_folder(checkpoint, folder)
            return
        with torch.random.fork_rng(devices=[]):  # for the weights that it has before it gets these
            self._write_finished_model(folder, load_file(file))

    def push_to_hub(self, commit_message: str = "End of training") -> str | None:
        """
        Saves the model and pushes it with everything that belongs to it: card, record, figures.

        Returns:
            The URL of the commit; None in all processes but the first.

        Raises:
            InputError: if the push fails. The model is saved then.
        """
        self._on_push_begin()
        if self.hub_model_id is None:
            self.init_hf_repo()
        self.save_model(_internal_call=True)
        return self.pusher.push_model(commit_message) if self.is_world_process_zero() else None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the card is written from the record of the run."""
