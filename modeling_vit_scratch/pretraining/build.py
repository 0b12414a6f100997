# SPDX-License-Identifier: Apache-2.0
"""Builds the trainer that pretrains, and the encoder that is saved from it for fine-tuning."""

from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..augmentation.masking import MaskingCollator, corrupted_patches, masked_squares, visible_patches
from ..common.errors import InputError
from ..configuration_vit_scratch import ViTScratchConfig
from ..data.splits import ImageData
from ..modeling_vit_scratch import ViTScratchForMaskedImageModeling, ViTScratchModel
from ..training.arguments import ModelArguments
from ..training.build import Objective, build_model, build_trainer
from ..training.trainer import ImageTrainer
from ..training.trainer_overrides import ImageTrainingArguments
from .arguments import MPP_TARGETS, PretrainingArguments
from .models import MaskedAutoencoder, MaskedPatchPrediction


def build_pretraining(
    model_arguments: ModelArguments, options: PretrainingArguments, data: ImageData, arguments: ImageTrainingArguments
) -> tuple[ImageTrainer, list[str]]:
    """
    The trainer, and lines for the user on the initial model. Raises InputError if that can't be loaded, or the
    objective does not fit it or the flags.
    """
    channels = data.source.num_channels
    if options.is_supervised:
        labels = {"label_names": data.label_names, "is_multi_label": data.is_multi_label}
        model, processor, lines = build_model(
            model_arguments, num_channels=channels, seed=arguments.seed, has_representation=True, **labels
        )
        return build_trainer(model, processor, data, arguments), lines
    if arguments.recipe_arguments.loss != "softmax" or arguments.recipe_arguments.class_weights:
        raise InputError("--loss and --class_weights are about labels, and this objective has none. Leave them out.")
    classifier, processor, lines = build_model(model_arguments, [], channels, arguments.seed)
    try:
        model = build_pretraining_model(classifier.config, options, processor)
        collator = build_masking(options, model.config)
    except ValueError as error:
        raise InputError(f"--objective {options.objective}: {error}") from error
    missing = model.vit.load_state_dict(classifier.vit.state_dict(), strict=False).missing_keys
    if set(missing) - {"embeddings.mask_token"}:
        raise InputError(f"--model_name_or_path lacks weights of the encoder, e.g. {min(missing)}.")
    # No objective takes the labels, which only count the images; the Trainer would not find them by itself.
    arguments.label_names, arguments.prediction_loss_only = ["labels"], True
    # SimMIM's model is saved as a whole, for masked image modeling.
    finished = None if isinstance(model, ViTScratchForMaskedImageModeling) else encoder_of
    objective = Objective(collator, mean_loss, description=collator.description, finished_model=finished)
    return build_trainer(model, processor, data, arguments, objective), lines


def encoder_of(model: PreTrainedModel, weights: dict[str, Tensor]) -> ViTScratchModel:
    """The encoder of a pretraining model, given its weights."""
    encoder = ViTScratchModel(model.config, add_pooling_layer=False)
    encoder.load_state_dict({name: weights[f"vit.{name}"] for name in encoder.state_dict()})
    return encoder


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """
    For `Trainer(compute_loss_func=)`: the mean over all images of an update, from `outputs["loss"]`, the mean over this
    batch. `labels` (B,) are only counted; `num_items_in_batch` are the images of the update, None for this batch alone.
    """
    loss = outputs["loss"]
    return loss if num_items_in_batch is None else loss * (len(labels) / num_items_in_batch)


def build_pretraining_model(
    config: ViTScratchConfig, options: PretrainingArguments, processor: BaseImageProcessor
) -> PreTrainedModel:
    """The encoder with the decoder of the objective. Raises ValueError if the configuration does not fit."""
    if options.objective == "simmim":
        return ViTScratchForMaskedImageModeling(config)
    if options.objective == "mpp":
        return MaskedPatchPrediction(config, options.mpp_target, *pixel_statistics(processor, config.num_channels))
    width = options.decoder_hidden_size or max(min(512, config.hidden_size * 2 // 3 // 32 * 32), 32)
    layers = options.decoder_num_hidden_layers or max(min(8, config.num_hidden_layers * 2 // 3), 1)
    return MaskedAutoencoder(
        config,
        decoder_hidden_size=width,
        decoder_num_hidden_layers=layers,
        decoder_num_attention_heads=options.decoder_num_attention_heads or max(width // 32, 1),
        norm_pix_loss=options.norm_pix_loss,
    )


def build_masking(options: PretrainingArguments, config: ViTScratchConfig) -> MaskingCollator:
    """The collator that masks patches for the objective."""
    ratio, patch = options.mask_ratio, config.patch_hw
    share = f"{100 * ratio:g} %"
    if options.objective == "mpp":
        description = f"{share} of patch embeddings corrupted, their {MPP_TARGETS[options.mpp_target]} predicted"
        return MaskingCollator(corrupted_patches(ratio), patch, f"{description} (the paper, B.1.2)")
    if options.objective == "simmim":
        square = options.mask_patch_size
        description = f"{share} of squares of {square} pixels masked, their pixels predicted (SimMIM)"
        return MaskingCollator(masked_squares(ratio, square, patch), patch, description)
    return MaskingCollator(visible_patches(ratio), patch, f"{share} of patches hidden, their pixels predicted (MAE)")


def pixel_statistics(processor: BaseImageProcessor, num_channels: int) -> tuple[list[float], list[float]]:
    """The processor's mean and standard deviation of pixels from 0 to 1, for each channel."""
    if not processor.do_normalize:
        return [0.0] * num_channels, [1.0] * num_channels
    mean, std = processor.image_mean, processor.image_std
    return tuple(np.broadcast_to(values, num_channels).tolist() for values in (mean, std))
