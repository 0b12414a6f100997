# SPDX-License-Identifier: Apache-2.0
"""The Trainer for images: what decays, that every held-out image counts, the average of the weights, cards."""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers.trainer_optimizer import is_optimizer_factory

from ..common.errors import InputError
from ..configuration_vit_scratch import ViTScratchConfig
from ..data.loader import prepare_workers, repeating_loader
from ..data.pixels import Normalize, mix
from ..data.streaming import StreamDataset, StreamPlace, stream_loader
from .arguments import LAMB, ImageTrainingArguments
from .callbacks import SamplesSeen
from .lamb import Lamb
from .optimization import WeightAverage, decay_parameter_names, describe_groups, parameter_groups
from .pushing import PushingTrainer


class ImageTrainer(PushingTrainer):
    """See the module. Everything else, distributed training included, is the stock Trainer's."""

    average: WeightAverage | None = None
    stream_place: StreamPlace | None = None
    samples: SamplesSeen | None = None

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

    def describe(self) -> list[str]:
        """What to tell before it starts: the recipe, the augmentation, what decays and which rates there are."""
        recipe = self.args.recipe_arguments.told
        parts = [self.describe_pushes(), recipe, self.describe_sharding(), self.describe_augmentation()]
        return [*filter(None, parts), describe_groups(self.parameter_groups())]

    def describe_sharding(self) -> str | None:
        """A line where FSDP was asked for and can't be had: accelerate says nothing."""
        wanted = self.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
        if not wanted or self.is_fsdp_enabled:
            return None
        return "FSDP shards over accelerators only: on a CPU every process keeps the whole model (DDP)."

    def describe_augmentation(self) -> str:
        """One line on what happens to training images, one by one and in batches."""
        parts = [self.augmentation_of_images, getattr(self.data_collator, "description", None)]
        return f"Augmentation: {'; '.join(filter(None, parts))}."

    @property
    def augmentation_of_images(self) -> str:
        """In words, for people and records; without what is done to batches."""
        repeats, description = self.args.recipe_arguments.aug_repeats, self.train_dataset.augmentation.description
        return description if repeats == 1 else f"each image {repeats} times in a row; {description}"

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Trainer; with --ema_decay, of the averaged weights."""
        if self.average is None:
            return super().evaluate(*args, **kwargs)
        with self.average.applied_to(self.model):
            return super().evaluate(*args, **kwargs)

    def write_model(self, folder: str) -> None:
        """
        As in SafeTrainer; during training with the average beside the weights. With FSDP the Trainer writes shards
        alone into its checkpoints, and no model in the end if it is told to shard: here the first get the
        configuration, with which they can be loaded, and the last is whole.
        """
        if self.is_fsdp_enabled and not self.is_staging:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        super().write_model(folder)
        if self.is_fsdp_enabled and self.args.should_save:
            self.model.config.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)
        if self.average is not None:
            self.average.save(folder, is_writer=self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As in Trainer, with the code of the model: FSDP2 gives it a class of torch's, whose files it would copy."""
        sharded = type(self.model)
        self.model.__class__ = next(kind for kind in sharded.__mro__ if not issubclass(kind, FSDPModule))
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model.__class__ = sharded

    def write_place(self, folder: Path) -> None:
        """As in SafeTrainer: where a stream was."""
        if self.stream_place is not None:
            self.stream_place.save(folder, self.state.global_step * self.args.gradient_accumulation_steps)

    def get_train_dataloader(self) -> DataLoader:
        """As in Trainer, with a generator of its own: see `_separated`. Streams and repeats have their own loaders."""
        if isinstance(self.train_dataset, StreamDataset):
            loader, self.stream_place.batches = stream_loader(self.train_dataset, self.args, self.data_collator)
            return _separated(loader)
        repeats = self.args.recipe_arguments.aug_repeats
        if repeats > 1:
            return _separated(repeating_loader(self.train_dataset, self.args, repeats, self.data_collator))
        return _separated(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """As in Trainer, where --dataloader_drop_last leaves out held-out images too; here it spares them."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return _separated(super().get_eval_dataloader(*args, **kwargs))
        finally:
            self.args.dataloader_drop_last = drop_last

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As in SafeTrainer; then what is left to do on the device: see `pixels`."""
        inputs = super()._prepare_inputs(inputs)
        weights, boxes = (inputs.pop(name, None) for name in ("mixing_weights", "mixing_boxes"))
        if self.model.training and self.samples is not None:
            self.samples.own += len(inputs["pixel_values"])
        if self._normalize is not None:
            inputs["pixel_values"] = self._normalize(inputs["pixel_values"])
        if weights is not None:
            inputs["pixel_values"] = mix(inputs["pixel_values"], weights, boxes)
        return inputs

    @cached_property
    def _normalize(self) -> Normalize | None:
        return Normalize.from_processor(self.processing_class)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """
        As in Trainer. With several processes the last batches are filled up with images that were there before, which
        the Trainer leaves out of the metrics, but not out of the loss. Here the loss is the mean without them.
        """
        number, state = len(inputs["pixel_values"]), self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return super().prediction_step(model, inputs, *args, **kwargs)
        own = min(max(state.remainder - self.args.process_index * number, 1), number)  # all processes have to compute
        inputs = {name: value[:own] if torch.is_tensor(value) else value for name, value in inputs.items()}
        loss, *predictions = super().prediction_step(model, inputs, *args, **kwargs)

        def filled_up(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor, tensor[:1].expand(number - own, *tensor.shape[1:])])

        return loss, *(recursively_apply(filled_up, part) for part in predictions)

    def prepare_resumption(self, checkpoint: str) -> None:
        """As in SafeTrainer. Raises InputError for a checkpoint of another model."""
        _check_same_model(self.model.config, checkpoint)
        super().prepare_resumption(checkpoint)
        if self.average is not None:
            self.average.start_from = checkpoint
        if self.stream_place is not None:
            self.stream_place.start_from = checkpoint

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the card is written from the record of the run."""


def _separated(loader: DataLoader) -> DataLoader:
    """
    The loader, with a generator of its own. It draws a seed for its workers in every epoch, or once if they stay alive:
    from the global generator, dropout would depend on how many workers there are.
    """
    getattr(loader, "base_dataloader", loader).generator = torch.Generator()  # inside of accelerate's, torch's own
    prepare_workers(loader)
    return loader


def _check_same_model(config: ViTScratchConfig, checkpoint: str) -> None:
    """The Trainer loads whatever has the right shape, also weights that were trained for other labels."""
    ours = json.loads(config.to_json_string())
    theirs = json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))
    theirs = {"temperature": 1.0, "calibrated": True, **theirs}  # checkpoints of before there was one
    ignored = {"transformers_version", "dtype", "auto_map", "architectures", "_name_or_path", "use_cache"}
    different = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    different = [name for name in different if name not in ignored]
    if different:
        raise InputError(
            f"--resume_from_checkpoint {checkpoint} is of another model: {', '.join(different)} differ. Give the flags "
            "and the data of the first run, or start a new one in another --output_dir."
        )
