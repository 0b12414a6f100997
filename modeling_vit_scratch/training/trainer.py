# SPDX-License-Identifier: Apache-2.0
"""The stock Trainer with a few changes: what decays, that every held-out image counts, sick losses, Ctrl-C, cards."""

import json
import math
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import TrainOutput, get_last_checkpoint
from transformers.utils import logging

from ..configuration_vit_scratch import ViTScratchConfig
from .arguments import FinetuneArguments
from .augmentation import Augmentation, DigitAugmentation, PhotoAugmentation
from .collation import MixingCollator
from .data import ImageClassificationDataset, ImageData
from .errors import InputError, TrainingInterrupted, TrainingStopped
from .metrics import build_compute_metrics, rank_labels
from .optimization import WeightAverage, decay_parameter_names, describe_groups, parameter_groups
from .policies import Chain, ColorJitter, RandomErasing, auto_augment


class FinetuneTrainer(Trainer):
    """See the module. Everything else, distributed training included, is the stock Trainer's."""

    average: WeightAverage | None = None

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Kernels only: see `optimization.decay_parameter_names`."""
        return decay_parameter_names(model)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer gets: see `optimization.parameter_groups`."""
        arguments, rates = self.args, self.args.recipe_arguments
        return parameter_groups(
            self.model,
            arguments.learning_rate,
            arguments.weight_decay,
            rates.layer_decay,
            rates.head_learning_rate_multiplier,
        )

    def get_optimizer_cls_and_kwargs(self, args: FinetuneArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        """As in Trainer, with groups of its own where layers or the head have rates of their own."""
        kind, settings = super().get_optimizer_cls_and_kwargs(args, model)
        if args.recipe_arguments.layer_decay != 1.0 or args.recipe_arguments.head_learning_rate_multiplier != 1.0:
            if is_optimizer_factory(kind) or "params" in settings or "model" in settings:
                raise InputError(
                    f"--optim {args.optim.value} makes groups of parameters of its own. Leave out --layer_decay and "
                    "--head_learning_rate_multiplier, or take --optim adamw_torch_fused or sgd."
                )
            settings["params"] = self.parameter_groups()
        return kind, settings

    def describe(self) -> list[str]:
        """What to tell before it starts: the recipe, the augmentation, what decays and which rates there are."""
        recipe = self.args.recipe_arguments.told
        return [*([recipe] if recipe else []), self.describe_augmentation(), describe_groups(self.parameter_groups())]

    def describe_augmentation(self) -> str:
        """One line on what happens to training images, one by one and in batches."""
        parts = [self.train_dataset.augmentation.description, getattr(self.data_collator, "description", None)]
        return f"Augmentation: {'; '.join(filter(None, parts))}."

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Trainer; with --ema_decay, of the averaged weights."""
        if self.average is None:
            return super().evaluate(*args, **kwargs)
        with self.average.applied_to(self.model):
            return super().evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer; during training with the average beside the weights."""
        super().save_model(output_dir, _internal_call=_internal_call)
        if self.average is not None and self.args.should_save:
            self.average.save(output_dir or self.args.output_dir)

    def get_train_dataloader(self) -> DataLoader:
        """As in Trainer, with a generator of its own: see `_separated`."""
        return _separated(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """As in Trainer, where --dataloader_drop_last leaves out held-out images too; here it spares them."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return _separated(super().get_eval_dataloader(*args, **kwargs))
        finally:
            self.args.dataloader_drop_last = drop_last

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in Trainer. Raises TrainingStopped for a loss that is no number, before it reaches the weights."""
        loss = super().training_step(model, *args, **kwargs)
        if not math.isfinite(loss.item()):
            step, last_step = self.state.global_step + 1, self.state.max_steps
            raise TrainingStopped(
                f"The loss is {loss.item()} at step {step} of {last_step}. Usual ways out: a lower --learning_rate "
                f"({self.args.learning_rate:g} now), more --warmup_steps, --bf16 False. {self._how_to_go_on()}"
            )
        return loss

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As in Trainer. Raises InputError for a checkpoint of another model, TrainingInterrupted after Ctrl-C."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        if isinstance(resume_from_checkpoint, str):
            _check_same_model(self.model.config, resume_from_checkpoint)
            if self.average is not None:
                self.average.start_from = resume_from_checkpoint
        on_interrupt = signal.getsignal(signal.SIGINT)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except (KeyboardInterrupt, RuntimeError) as interrupt:
            # Worker processes that were not forked from this one end at Ctrl-C, which torch calls a RuntimeError.
            requested = any(getattr(callback, "is_requested", False) for callback in self.callback_handler.callbacks)
            if isinstance(interrupt, RuntimeError) and not requested:
                raise
            raise TrainingInterrupted(
                f"Interrupted at step {self.state.global_step} of {self.state.max_steps}. {self._how_to_go_on()}"
            ) from interrupt
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, on_interrupt)

    def _how_to_go_on(self) -> str:
        folder = self.args.output_dir
        checkpoint = get_last_checkpoint(folder) if Path(folder).is_dir() else None
        if checkpoint is None:
            return "No checkpoint was saved yet: run the same command to start again."
        return (
            f"The latest checkpoint is {checkpoint}: to go on, add --resume_from_checkpoint True to the same command."
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the card is written from the record of the run, and a push must not replace it."""


def build_trainer(
    model: PreTrainedModel, processor: BaseImageProcessor, data: ImageData, arguments: FinetuneArguments
) -> FinetuneTrainer:
    """The trainer, with the data as the model takes it and with the callbacks that make a run resumable bit by bit."""
    channels, collator = model.config.num_channels, build_collator(len(data.label_names), arguments)
    augmentation = build_augmentation(data.source.augmentation, processor, model.config, arguments)
    train_set = ImageClassificationDataset(
        data.train, processor, channels, augmentation, seed=arguments.seed, with_keys=collator is not None
    )
    decay, warmup = arguments.recipe_arguments.ema_decay, arguments.recipe_arguments.ema_warmup
    average = None if decay is None else WeightAverage(decay, warmup)
    trainer = FinetuneTrainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=train_set,
        eval_dataset=ImageClassificationDataset(data.validation, processor, channels),
        processing_class=processor,
        compute_metrics=build_compute_metrics(len(data.label_names)),
        preprocess_logits_for_metrics=rank_labels,
        callbacks=[SetEpoch(train_set), *([] if average is None else [average]), SaveOnInterrupt()],
    )
    trainer.average = average
    if collator is not None:
        trainer.label_smoother = None  # the collator smooths: the Trainer can't smooth probabilities
    logging.disable_progress_bar()  # a bar for each checkpoint that is written; the training bar is another one
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress)
    return trainer


def build_augmentation(
    kind: str, processor: BaseImageProcessor, config: ViTScratchConfig, arguments: FinetuneArguments
) -> Augmentation:
    """What images of a kind ("photo" or "digit") go through, in the order of timm and torchvision."""
    size, wishes = input_size(processor, config), arguments.recipe_arguments
    photo = PhotoAugmentation(size, processor.resample, arguments.smallest_area)
    steps: list[Augmentation] = [DigitAugmentation(size) if kind == "digit" else photo]
    if wishes.auto_augment:
        steps.append(auto_augment(wishes.auto_augment))
    if wishes.color_jitter:
        steps.append(ColorJitter(wishes.color_jitter))
    if wishes.random_erasing:
        steps.append(RandomErasing(wishes.random_erasing))
    if len(steps) > 1 and config.num_channels not in (1, 3):
        raise InputError(
            f"Augmentation policies know grey and colour images, not {config.num_channels} channels. Leave out "
            "--auto_augment, --color_jitter and --random_erasing."
        )
    return Chain(*steps) if len(steps) > 1 else steps[0]


def build_collator(num_labels: int, arguments: FinetuneArguments) -> MixingCollator | None:
    """What mixes the batches; None where nothing is to be mixed."""
    wishes = arguments.recipe_arguments
    if not wishes.mixup and not wishes.cutmix:
        return None
    return MixingCollator(num_labels, wishes.mixup, wishes.cutmix, arguments.label_smoothing_factor)


def input_size(processor: BaseImageProcessor, config: ViTScratchConfig) -> tuple[int, int]:
    """Height and width of what the processor makes."""
    size = processor.crop_size if processor.do_center_crop else processor.size
    if size is not None and size["height"] and size["width"]:
        return size["height"], size["width"]
    return config.image_hw


def _separated(loader: DataLoader) -> DataLoader:
    """
    The loader, with a generator of its own. It draws a seed for its workers in every epoch, or once if they stay alive:
    from the global generator, dropout would depend on how many workers there are.
    """
    getattr(loader, "base_dataloader", loader).generator = torch.Generator()  # inside of accelerate's, torch's own
    return loader


def _check_same_model(config: ViTScratchConfig, checkpoint: str) -> None:
    """The Trainer loads whatever has the right shape, also weights that were trained for other labels."""
    ours = json.loads(config.to_json_string())
    theirs = json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))
    ignored = {"transformers_version", "dtype", "auto_map", "architectures", "_name_or_path", "use_cache"}
    different = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    different = [name for name in different if name not in ignored]
    if different:
        raise InputError(
            f"--resume_from_checkpoint {checkpoint} is of another model: {', '.join(different)} differ. Give the flags "
            "and the data of the first run, or start a new one in another --output_dir."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Callbacks


class SetEpoch(TrainerCallback):
    """Tells the training set its epoch. The data loader does so too, but not when it resumes in the middle of one."""

    def __init__(self, train_set: ImageClassificationDataset) -> None:
        self.train_set = train_set

    def on_epoch_begin(
        self, args: FinetuneArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.train_set.set_epoch(int(state.epoch or 0))


class SaveOnInterrupt(TrainerCallback):
    """
    The first Ctrl-C finishes the step and saves a checkpoint from which training can go on exactly; a second one stops
    at once. With several processes, each would stop at a step of its own: there the first one stops at once.
    """

    def __init__(self) -> None:
        self.is_requested, self.process = False, os.getpid()

    def on_train_begin(
        self, args: FinetuneArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a worker process: it still has to read the images of this step
        self.is_requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nCtrl-C: saving a checkpoint after this step. Once more to stop at once.", flush=True)

    def on_step_end(self, args: FinetuneArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The last step of an epoch is left to on_epoch_end: a checkpoint from before the evaluation would skip it.
        if self.is_requested and state.epoch % 1 != 0:
            control.should_save = True

    def on_epoch_end(
        self, args: FinetuneArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.is_requested:
            control.should_save = True

    def on_save(self, args: FinetuneArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.is_requested:
            raise KeyboardInterrupt


class Progress(ProgressCallback):
    """The stock progress bar, with one short line for each report."""

    def on_log(
        self,
        args: FinetuneArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        part = "held out" if "eval_loss" in logs else "training" if "loss" in logs else None
        if part is None or not state.is_world_process_zero or self.training_bar is None:
            return
        names = ("loss", "accuracy", "top5_accuracy", "macro_f1", "grad_norm", "learning_rate")
        values = {name: logs.get(f"eval_{name}", logs.get(name)) for name in names}
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)
        self.training_bar.write(f"epoch {logs['epoch']:<6.4g} {part}  {shown}")
