# SPDX-License-Identifier: Apache-2.0
"""From a command line to a trainer that pretrains, and from what it trained to the folder that is fine-tuned."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..augmentation.masking import MaskingCollator, corrupted_patches, masked_squares, visible_patches
from ..common.errors import InputError
from ..configuration_vit_scratch import ViTScratchConfig
from ..data.splits import ImageData
from ..modeling_vit_scratch import ViTScratchForMaskedImageModeling, ViTScratchModel
from .arguments import ImageTrainingArguments
from .build import build_trainer
from .flags import MPP_TARGETS, ModelArguments, PretrainingArguments
from .objectives import MaskedAutoencoder, MaskedPatchPrediction
from .starting_point import build_model
from .trainer import ImageTrainer


class PretrainingTrainer(ImageTrainer):
    """The trainer of objectives without labels: the loss is a mean over images, and what is left is the encoder."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The labels only count the images; no objective takes them, so that the Trainer would not find them.
        self.label_names, self.args.prediction_loss_only = ["labels"], True

    def describe_augmentation(self) -> str:
        """One line on what happens to training images, and one on what is predicted."""
        return f"Augmentation: {self.augmentation_of_images}.\nObjective: {self.data_collator.description}."

    def write_finished_model(self, folder: str) -> None:
        """Checkpoints have all that training needs. The finished folder has what fine-tuning and serving need."""
        weights = self.accelerator.get_state_dict(self.model)  # with sharded weights, every process takes part
        if self.args.should_save:
            finished_model(self.model, weights).save_pretrained(folder)
            self.processing_class.save_pretrained(folder)
            self.write_arguments(Path(folder))

    def copy_model(self, checkpoint: Path, folder: Path) -> None:
        """As in PushingTrainer: the finished model, as far as it is learned."""
        file = checkpoint / "model.safetensors"
        if isinstance(self.model, ViTScratchForMaskedImageModeling) or not file.is_file():
            super().copy_model(checkpoint, folder)
            return
        with torch.random.fork_rng(devices=[]):  # for the weights that it has before it gets these
            finished_model(self.model, load_file(file)).save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
        self.write_arguments(folder)

    def settings(self) -> dict[str, Any]:
        """As in ImageTrainer, with the objective: the class of its model and what the collator tells of its masks."""
        return {**super().settings(), "objective": f"{type(self.model).__name__}, {self.data_collator.description}"}


def finished_model(objective: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    """
    What of an objective is worth keeping: SimMIM's model, which people load as one for masked image modeling, and of
    the others the encoder.

    Args:
        objective: the model that was trained.
        weights: its state dict.
    """
    if isinstance(objective, ViTScratchForMaskedImageModeling):
        finished = ViTScratchForMaskedImageModeling(objective.config)  # not the same one, which may be sharded
        finished.load_state_dict(weights)
        return finished
    encoder = ViTScratchModel(objective.config, add_pooling_layer=False)
    encoder.load_state_dict({name: weights[f"vit.{name}"] for name in encoder.state_dict()})
    return encoder


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """
    For `Trainer(compute_loss_func=)`: the mean over all images of an update.

    Args:
        outputs: with `loss`, the mean over the images of this batch.
        labels: (B,), read for their number only.
        num_items_in_batch: the number of images in all batches of the update; None for this batch alone.
    """
    loss = outputs["loss"]
    return loss if num_items_in_batch is None else loss * (len(labels) / num_items_in_batch)


def build_pretraining(
    model_arguments: ModelArguments, wishes: PretrainingArguments, data: ImageData, arguments: ImageTrainingArguments
) -> tuple[ImageTrainer, list[str]]:
    """
    The trainer, and what to tell the user of the starting point.

    Raises:
        InputError: if the starting point can't be loaded, or the objective does not fit it.
    """
    channels = data.source.num_channels
    if wishes.is_supervised:
        model, processor, told = build_model(
            model_arguments,
            data.label_names,
            channels,
            arguments.seed,
            has_representation=True,
            is_multi_label=data.is_multi_label,
        )
        return build_trainer(model, processor, data, arguments), told
    classifier, processor, told = build_model(model_arguments, [], channels, arguments.seed)
    try:
        model = build_objective(classifier.config, wishes, processor)
        collator = build_masking(wishes, model.config)
    except ValueError as error:
        raise InputError(f"--objective {wishes.objective}: {error}") from error
    missing = model.vit.load_state_dict(classifier.vit.state_dict(), strict=False).missing_keys
    if set(missing) - {"embeddings.mask_token"}:
        raise InputError(f"--model_name_or_path lacks weights of the encoder, e.g. {min(missing)}.")
    trainer = build_trainer(
        model, processor, data, arguments, PretrainingTrainer, data_collator=collator, compute_loss_func=mean_loss
    )
    return trainer, told


def build_objective(
    config: ViTScratchConfig, wishes: PretrainingArguments, processor: BaseImageProcessor
) -> PreTrainedModel:
    """The encoder of that configuration with what the objective adds. Raises ValueError if they don't go together."""
    if wishes.objective == "simmim":
        return ViTScratchForMaskedImageModeling(config)
    if wishes.objective == "mpp":
        return MaskedPatchPrediction(config, wishes.mpp_target, *pixel_statistics(processor, config.num_channels))
    width = wishes.decoder_hidden_size or max(min(512, config.hidden_size * 2 // 3 // 32 * 32), 32)
    return MaskedAutoencoder(
        config,
        decoder_hidden_size=width,
        decoder_num_hidden_layers=wishes.decoder_num_hidden_layers or max(min(8, config.num_hidden_layers * 2 // 3), 1),
        decoder_num_attention_heads=wishes.decoder_num_attention_heads or max(width // 32, 1),
        norm_pix_loss=wishes.norm_pix_loss,
    )


def build_masking(wishes: PretrainingArguments, config: ViTScratchConfig) -> MaskingCollator:
    """What hides patches for the objective."""
    ratio, patch = wishes.mask_ratio, config.patch_hw
    share = f"{100 * ratio:g} %"
    if wishes.objective == "mpp":
        told = f"{share} of patch embeddings corrupted, their {MPP_TARGETS[wishes.mpp_target]} predicted"
        return MaskingCollator(corrupted_patches(ratio), patch, f"{told} (the paper, B.1.2)")
    if wishes.objective == "simmim":
        square = wishes.mask_patch_size
        told = f"{share} of squares of {square} pixels masked, their pixels predicted (SimMIM)"
        return MaskingCollator(masked_squares(ratio, square, patch), patch, told)
    return MaskingCollator(visible_patches(ratio), patch, f"{share} of patches hidden, their pixels predicted (MAE)")


def pixel_statistics(processor: BaseImageProcessor, num_channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by which the processor normalises pixels between 0 and 1, one for each channel."""
    if not processor.do_normalize:
        return [0.0] * num_channels, [1.0] * num_channels
    return tuple(
        np.broadcast_to(values, num_channels).tolist() for values in (processor.image_mean, processor.image_std)
    )
