# SPDX-License-Identifier: Apache-2.0
"""
transformers' Trainer and its arguments, for images: with a step guard, a run folder, a Hub pusher and an average of the
weights. The private methods of the Trainer that it replaces are in trainer_overrides.py.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather, recursively_apply, send_to_device
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.training_args import OptimizerNames

from ..acceleration.speed_up import precision_advice
from ..augmentation.fewer_tokens import FewerTokens
from ..common.errors import InputError, TrainingInterrupted, TrainingStopped, without_worker_traceback
from ..common.files import STATE, read_manifest
from ..common.flags import available_cores, flag
from ..common.processes import Processes
from ..common.records import git_commit
from ..data.collation import Normalize, mix, process_loader
from ..data.streams import StreamBatches
from ..distillation.teacher import Distillation
from ..hub.commit import HubPusher, link_folder
from ..hub.contents import shareable
from ..image_decoding_vit_scratch import ImageDecodeError
from .arguments import LAMB, RecipeArguments, TrainingFlags
from .optimization import (
    Lamb,
    WeightAverage,
    decay_parameter_names,
    describe_groups,
    describe_trained,
    parameter_groups,
)
from .safety import BestCheckpoint, EarlyEnd, RunFolder, SaveOnSignal, StepGuard, check_same_model, errors_explained
from .trainer_overrides import TrainerOverrides, WorkerProcesses


# The arguments of the Trainer that decide the weights a run ends with, on the same hardware.
DECIDING_ARGUMENTS = (
    "seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
    "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "bf16",
    "fp16", "torch_compile", "dataloader_drop_last", "smallest_area", "images_on_device", "max_broken_images",
    "metric_for_best_model", "train_sampling_strategy",
)  # fmt: skip
# Of `RecipeArguments`: what no number of the run follows from.
NOT_SETTINGS = ("recipe", "message", "plan", "open_flags", "teacher_model")
# Numbers that an optimizer keeps for each weight, if known.
_OPTIMIZER_STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "lamb": 2, "sgd": 1}


@dataclass
class ImageTrainingArguments(TrainingFlags, TrainingArguments):
    """The arguments of transformers' Trainer, with the defaults of image classification."""

    remove_unused_columns: bool = flag(False, "Has nothing to remove here.")
    logging_nan_inf_filter: bool = flag(False, "Report NaN losses as 0. Here, such a loss stops the run.")
    ddp_find_unused_parameters: bool | None = flag(
        False, "Search for unused parameters with several processes: there are none."
    )
    do_train: bool = flag(True, "Always.")
    recipe_arguments: RecipeArguments = field(init=False, default_factory=RecipeArguments)

    def __post_init__(self) -> None:
        # Without an accelerator the Trainer needs this for a process group on the CPU, and not to pin memory.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = self.save_strategy == self.eval_strategy != "no"
        if self.bf16 is None:
            native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
            self.bf16 = native and not self.fp16 and not self.use_cpu
        if self.disable_tqdm is None:  # a bar in a log file is a line for each step
            self.disable_tqdm = not sys.stderr.isatty()
        if self.dataloader_num_workers is None:
            cores = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            self.dataloader_num_workers = 0 if cores < 2 else min(2 if self.use_cpu else 8, cores)
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        optimizer = self.optim
        if optimizer == LAMB:  # transformers accepts the names of its own optimizers only
            self.optim = OptimizerNames.ADAMW_TORCH
        super().__post_init__()
        if optimizer == LAMB:
            self.optim = LAMB

    @property
    def optimizer_name(self) -> str:
        """The value of --optim."""
        return OptimizerNames(self.optim).value if self.optim != LAMB else LAMB


class ImageTrainer(TrainerOverrides, Trainer):
    """
    The stock Trainer but for these methods. `objective` is in words, None for classification. `finished_model` builds
    the model that is saved in the end from the trained one and its weights; None: it is that one. `images` is the
    record that every checkpoint gets of the images: see `data.held_out`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: ImageTrainingArguments,
        average: WeightAverage | None = None,
        stream_batches: StreamBatches | None = None,
        objective: str | None = None,
        finished_model: Callable[[PreTrainedModel, dict[str, torch.Tensor]], PreTrainedModel] | None = None,
        images: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        self.pusher = HubPusher(args, self.log_line, self._on_push_begin, self.copy_model)  # the Trainer prepares it
        super().__init__(model, args, **others)
        self.accelerator.dataloader_config.non_blocking = True  # the host does not wait while a batch is sent
        self.normalize, self.average, self.stream_batches = Normalize(self.processing_class), average, stream_batches
        self.objective, self.finished_model, self.images = objective, finished_model, images
        loss = self.compute_loss_func
        self.distillation = loss if isinstance(loss, Distillation) else None
        self.fewer_tokens = FewerTokens(model, args.recipe_arguments)
        self.processes, self.workers, self.resumed_step = Processes(args.ddp_timeout), WorkerProcesses(), 0
        self.changed: set[str] = set()  # names of settings that were others in the run that is resumed
        self.run_folder = RunFolder(args, self.processes, self.log_line, self._checkpoint_size())
        self.step_guard = StepGuard(self.run_folder, args.max_broken_images, self.train_dataset.name)
        self.settings = self._run_settings()
        self.save_on_signal = SaveOnSignal(self.processes)
        self.early_end = EarlyEnd(args.max_hours, args.early_stopping_patience, self.processes)
        # Images trained on since the start or resumption, padding of last batches included: here; by each process.
        self._samples, self.samples_before, self.samples_by_process = 0, 0, []
        for callback in (average, self.early_end, self.save_on_signal, stream_batches):
            if callback is not None:
                self.add_callback(callback)

    def log_line(self, line: str) -> None:
        """Prints a line from one process, above the progress bar."""
        if self.args.process_index == 0:
            tqdm.write(line, file=sys.stderr)

    def _run_settings(self) -> dict[str, Any]:
        """Everything that decides the numbers of this run, by flag or name."""
        values, recipe = self.args.to_dict(), dataclasses.asdict(self.args.recipe_arguments)
        kind = {} if self.objective is None else {"objective": f"{type(self.model).__name__}, {self.objective}"}
        return {
            **{f"--{name}": values[name] for name in DECIDING_ARGUMENTS},
            **{f"--{name}": value for name, value in recipe.items() if name not in NOT_SETTINGS},
            "teacher": self.distillation and self.distillation.metadata(),
            "processes": self.args.world_size,
            "training images": None if self.stream_batches is not None else len(self.train_dataset),
            "augmentation": self.train_dataset.augmentation.description,
            "device": self.args.device.type,
            "input images and labels": self.images and self.images["digest"],
            "input fast_decode": self.args.fast_decode,
            **{f"input {name}": value for name, value in self.processing_class.to_dict().items() if name != "auto_map"},
            "CPU threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit of the code": git_commit(),
            **kind,
        }

    def _checkpoint_size(self) -> int:
        """The approximate bytes of a checkpoint: weights, their average, and the optimizer's states."""
        weights = sum(weight.nbytes for weight in self.model.state_dict().values())
        trained = sum(weight.nbytes for weight in self.model.parameters() if weight.requires_grad)
        states = 0 if self.args.save_only_model else _OPTIMIZER_STATES.get(self.args.optimizer_name, 0)
        return weights + states * trained + (0 if self.average is None else weights)

    # --- Messages before training -------------------------------------------------------------------------------------

    def describe(self) -> list[str]:
        """The Hub repository, the recipe, the augmentation, decay and learning rates."""
        recipe = self.args.recipe_arguments.message
        trained = describe_trained(self.model, _OPTIMIZER_STATES.get(self.args.optimizer_name, 0))
        parts = [self.pusher.describe(), recipe, self.describe_sharding(), self.describe_augmentation(), trained]
        half = precision_advice(self.args.device, self.args.bf16 or self.args.fp16, "--bf16 True")
        parts += [self.distillation and self.distillation.describe(), half]
        return [*filter(None, parts), describe_groups(self._parameter_groups())]

    def describe_sharding(self) -> str | None:
        """A warning if FSDP was asked for and is not available: accelerate gives none."""
        wanted = self.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
        if not wanted or self.is_fsdp_enabled:
            return None
        return "FSDP shards over accelerators only: on a CPU every process keeps the whole model (DDP)."

    def describe_augmentation(self) -> str:
        """The augmentation of images and batches, and the objective."""
        mixing = self.data_collator.description if self.objective is None else None
        line = f"Augmentation: {'; '.join(filter(None, [self.augmentation_of_images, mixing]))}."
        return line if self.objective is None else f"{line}\nObjective: {self.objective}."

    @property
    def augmentation_of_images(self) -> str:
        """The augmentation of single images, in words."""
        repeats, description = self.args.recipe_arguments.aug_repeats, self.train_dataset.augmentation.description
        if self.args.recipe_arguments.balanced_sampling:
            return f"every class equally often; {description}"
        return description if repeats == 1 else f"each image {repeats} times in a row; {description}"

    # --- Training -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """
        As in Trainer; True resumes from the latest whole checkpoint. Raises InputError without one that fits,
        TrainingStopped if it can't go on, TrainingInterrupted after Ctrl-C or SIGTERM; --push_to_hub pushes first.
        """
        self.run_folder.prepare(resumes=bool(resume_from_checkpoint))
        checkpoint = self.run_folder.checkpoint_to_resume(resume_from_checkpoint)
        if checkpoint is not None:
            self._prepare_resumption(checkpoint)
        try:
            try:
                with errors_explained(self):
                    outcome = super().train(resume_from_checkpoint=checkpoint, **kwargs)
                    self.step_guard.stop_if_bad()
                    self.count_samples()
                return outcome
            finally:
                self.is_in_train = False  # which the Trainer leaves after an error
                self.workers.release()
                self.save_on_signal.signals.restore()
        except (TrainingInterrupted, TrainingStopped):
            if not self.save_on_signal.signals.is_urgent:
                self.pusher.push_unpushed()
            raise

    def count_samples(self) -> int:
        """Of all processes, into `samples_by_process`. Returns the number with that of the run that is resumed."""
        self.samples_by_process = gather(torch.tensor([self._samples], device=self.args.device)).tolist()
        return self.samples_before + sum(self.samples_by_process)

    def _prepare_resumption(self, checkpoint: str) -> None:
        check_same_model(self.model.config, checkpoint)
        manifest = read_manifest(checkpoint)
        self.changed = self.run_folder.compare_settings(checkpoint, manifest, self.settings)
        if "--lora_rank" in self.changed:  # the Trainer would load whatever weights have the same names
            raise InputError(f"--resume_from_checkpoint {checkpoint}: its run had another --lora_rank. Give the same.")
        self.samples_before = manifest.get("samples_seen", 0)
        broken = manifest.get("broken_images", {})
        self.step_guard.broken_images = {int(index): reason for index, reason in broken.items()}
        state = json.loads(Path(checkpoint, STATE).read_text(encoding="utf-8"))
        self.resumed_step = state["global_step"]
        self.add_callback(BestCheckpoint(self.run_folder.path, Path(checkpoint), state.get("best_model_checkpoint")))
        for part in (self.average, self.stream_batches):
            if part is not None:
                part.start_from = checkpoint

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> tuple[int, ...]:
        """As in Trainer, but a run resumed from its last step has no epoch left: the Trainer takes one more step."""
        size = self._train_batch_size * self.args.world_size
        if self.args.dataloader_drop_last and self.stream_batches is None and len(self.train_dataset) < size:
            raise InputError(f"--dataloader_drop_last: {len(self.train_dataset)} images make no batch of {size}.")
        epochs, steps_per_epoch, *others, max_steps = super().set_initial_training_values(*args, **kwargs)
        if self.resumed_step >= max_steps:
            epochs = max_steps // steps_per_epoch
        return epochs, steps_per_epoch, *others, max_steps

    def get_batch_samples(self, epoch_iterator: Iterator, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """As in Trainer; the step guard gets the images of the step."""
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
        """As in Trainer, for a batch of the loader."""
        inputs = self.prepare_batch(inputs)
        self._samples += len(inputs["pixel_values"])
        if self.distillation is not None:
            self._show_teacher(inputs["pixel_values"])
        share = self.state.global_step / self.state.max_steps
        inputs["pixel_values"] = self.fewer_tokens.resize(inputs["pixel_values"], share)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_guard.add_loss(loss)
        return loss

    def _show_teacher(self, pixel_values: torch.Tensor) -> None:
        with self.accelerator.autocast():
            self.distillation.watch(pixel_values)

    def prepare_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Moves a batch of the loader to the device, normalises and mixes it: see `collation`."""
        batch = {name: value for name, value in batch.items() if name not in ("keys", "broken")}
        batch = send_to_device(batch, self.args.device)
        weights, boxes = (batch.pop(name, None) for name in ("mixing_weights", "mixing_boxes"))
        batch |= {name: self.normalize(value) for name, value in batch.items() if name.endswith("pixel_values")}
        if weights is not None:
            repeats = self.args.recipe_arguments.aug_repeats
            batch["pixel_values"] = mix(batch["pixel_values"], weights, boxes, repeats)
        return batch

    # --- The optimizer ------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decay_parameter_names(model)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        arguments, recipe = self.args, self.args.recipe_arguments
        multipliers = recipe.layer_decay, recipe.head_learning_rate_multiplier
        return parameter_groups(self.model, arguments.learning_rate, arguments.weight_decay, *multipliers)

    def get_optimizer_cls_and_kwargs(self, args: Any, model: nn.Module | None = None) -> tuple[Any, Any]:
        """As in Trainer, or LAMB; with our groups if layers or the head have their own learning rates."""
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
                    f"--optim {args.optimizer_name} makes its own groups of parameters. Leave out --layer_decay and "
                    "--head_learning_rate_multiplier, or take --optim adamw_torch_fused or sgd."
                )
            settings["params"] = self._parameter_groups()
        return kind, settings

    # --- Evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Trainer, with clear errors; with --ema_decay, of the averaged weights."""
        with errors_explained(self):
            self.step_guard.stop_if_bad()
            with nullcontext() if self.average is None else self.average.applied_to(self.model):
                return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in Trainer. Outside of training, the processes that read images end with it."""
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            if not self.is_in_train:
                self.workers.release()

    def try_evaluation(self) -> None:
        """Evaluates a batch before training: what fails then fails at once. Raises InputError for an unknown metric."""
        handler, arguments = self.callback_handler, self.args
        size = min(arguments.eval_batch_size, 8) if arguments.use_cpu else arguments.eval_batch_size
        images = Subset(self.eval_dataset, range(min(len(self.eval_dataset), size * arguments.world_size)))
        generator = torch.Generator()  # of its own: the loader draws a seed
        first = DataLoader(images, size, collate_fn=self.data_collator, generator=generator)
        callbacks, handler.callbacks = handler.callbacks, []
        try:
            metrics = self.evaluation_loop(self.accelerator.prepare_data_loader(first), "Evaluation").metrics
        finally:
            handler.callbacks = callbacks
        name = arguments.metric_for_best_model
        if name is not None and f"eval_{name.removeprefix('eval_')}" not in metrics:
            names = ", ".join(key.removeprefix("eval_") for key in metrics if key != "eval_images")
            raise InputError(f"--metric_for_best_model {name}: this run measures {names}. Choose one of these.")

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """As in Trainer. The last batches of several processes are padded; the loss leaves out the padding, too."""
        kwargs["ignore_keys"] = kwargs.get("ignore_keys") or ["hidden_states", "attentions"]
        inputs = self.prepare_batch(inputs)
        if self.distillation is not None and self.objective is not None:  # without labels, its loss is the only one
            self._show_teacher(inputs["pixel_values"])
        number, state = len(inputs["pixel_values"]), self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return super().prediction_step(model, inputs, *args, **kwargs)
        own = min(max(state.remainder - self.args.process_index * number, 1), number)  # every process has to compute
        inputs = {name: value[:own] if torch.is_tensor(value) else value for name, value in inputs.items()}
        loss, *predictions = super().prediction_step(model, inputs, *args, **kwargs)

        def padded(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor, tensor[:1].expand(number - own, *tensor.shape[1:])])

        return loss, *(recursively_apply(padded, part) for part in predictions)

    # --- Loaders ------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """As in Trainer, or a loader for streams, --aug_repeats or --balanced_sampling."""
        recipe = self.args.recipe_arguments
        if self.stream_batches is not None or recipe.aug_repeats > 1 or recipe.balanced_sampling:
            loader = process_loader(self.train_dataset, self.args, self.data_collator, self.stream_batches)
        else:
            loader = super().get_train_dataloader()
        return self.workers.add(loader)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """As in Trainer, but --dataloader_drop_last keeps all held-out images."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return self.workers.add(super().get_eval_dataloader(*args, **kwargs))
        finally:
            self.args.dataloader_drop_last = drop_last

    # --- Saving -------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer, but each file atomically, without a push. Without `output_dir`, writes the finished model."""
        if self.run_folder.is_writing_checkpoint:
            self._write_model(Path(output_dir))
            return
        folder = Path(output_dir or self.args.output_dir)
        with self.run_folder.new_model(folder, self.state.global_step) as staged:
            if output_dir is not None or self.finished_model is None:
                self._write_model(staged)
                return
            weights = self.accelerator.get_state_dict(self.model)  # every process takes part: weights may be sharded
            if self.args.should_save:
                self._write_finished_model(staged, weights)

    def _write_model(self, folder: Path) -> None:
        if self.is_fsdp_enabled:
            self._write_sharded_model(folder)
        else:
            super().save_model(str(folder), _internal_call=True)
        if self.args.should_save:
            self._write_arguments(folder)
        if self.average is not None:
            self.average.save(str(folder), is_writer=self.args.should_save)

    def _write_sharded_model(self, folder: Path) -> None:
        # As the Trainer with FSDP, but checkpoints have the configuration that their shards need to be loaded, and the
        # finished model is whole. FSDP2 changes the model's class; the Trainer would save the code of that class.
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
        """Writes the arguments without secrets and local paths, in place of the Trainer's pickle."""
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        text = json.dumps(shareable(self.args.to_dict()), indent=2, sort_keys=True, ensure_ascii=False)
        (folder / "training_args.json").write_text(text + "\n", encoding="utf-8")

    # --- The Hub ------------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Called by the Trainer before training. Raises InputError if nothing can be pushed."""
        if self.is_world_process_zero():
            self.hub_model_id, self.push_in_progress = self.pusher.prepare(), self.pusher

    def _on_push_begin(self) -> None:
        self.callback_handler.on_push_begin(self.args, self.state, self.control)

    def copy_model(self, checkpoint: Path, folder: Path) -> None:
        """Puts the finished model of a checkpoint into a new folder. Leaves training's random state as it is."""
        file = checkpoint / "model.safetensors"
        if self.finished_model is None or not file.is_file():
            link_folder(checkpoint, folder)
            return
        with torch.random.fork_rng(devices=[]):  # for the initial weights of the new model
            self._write_finished_model(folder, load_file(file))

    def push_to_hub(self, commit_message: str = "End of training") -> str | None:
        """Saves the model, pushes it with its card, returns the URL of the commit. Raises InputError if that fails."""
        self._on_push_begin()
        if self.hub_model_id is None:
            self.init_hf_repo()
        self.save_model(_internal_call=True)
        return self.pusher.push_model(commit_message) if self.is_world_process_zero() else None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the card is written from the record of the run."""
