# SPDX-License-Identifier: Apache-2.0
"""Builds the trainer that pretrains, and the encoder that is saved from it for fine-tuning."""

from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..augmentation.masking import MaskingCollator, corrupted_patches, masked_squares, visible_patches
from ..augmentation.multi_crop import MultiCrop
from ..common.errors import InputError
from ..configuration_vit_scratch import ViTScratchConfig
from ..data.collation import ImageCollator, input_size
from ..data.splits import ImageData
from ..modeling_vit_scratch import (
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchModel,
)  # fmt: skip
from ..training.arguments import ModelArguments
from ..training.build import Objective, build_model, build_trainer
from ..training.trainer import ImageTrainer, ImageTrainingArguments
from .arguments import CROP_SCALES, MPP_TARGETS, PretrainingArguments
from .dino import DinoSteps, SelfDistillation
from .models import MaskedAutoencoder, MaskedPatchPrediction


def build_pretraining(
    model_arguments: ModelArguments, options: PretrainingArguments, data: ImageData, arguments: ImageTrainingArguments
) -> tuple[ImageTrainer, list[str]]:
    """The trainer, and lines for the user on the initial model. Raises InputError if model, flags or data don't fit."""
    channels = data.source.num_channels
    if data.is_regression:
        raise InputError("The label column has numbers to predict, which scripts/finetune.py learns.")
    if options.is_supervised:
        labels, is_multi_label = data.label_names, data.is_multi_label
        model, processor, lines = build_model(
            model_arguments, labels, channels, arguments.seed, has_representation=True, is_multi_label=is_multi_label
        )
        return build_trainer(model, processor, data, arguments), lines
    if arguments.recipe_arguments.loss != "softmax" or arguments.recipe_arguments.class_weights:
        raise InputError("--loss and --class_weights are about labels, and this objective has none. Leave them out.")
    classifier, processor, lines = build_model(model_arguments, [], channels, arguments.seed)
    # No objective takes the labels, which only count the images; the Trainer would not find them by itself.
    arguments.label_names, arguments.prediction_loss_only = ["labels"], True
    if options.objective == "dino":
        model, objective = build_dino(classifier, options, processor, arguments, data.source.augmentation == "photo")
        return build_trainer(model, processor, data, arguments, objective), lines
    if options.objective == "distillation":
        model, collator, loss = classifier, ImageCollator(), None  # the teacher's
        description = "the teacher's features, by a linear layer on the student's"
    else:
        try:
            model, collator = build_masked_model(classifier.config, options, processor)
        except ValueError as error:
            raise InputError(f"--objective {options.objective}: {error}") from error
        model.vit.load_state_dict(classifier.vit.state_dict(), strict=False)  # which has a pooler, and no mask token
        loss, description = mean_loss, collator.description
    # SimMIM's model is saved as a whole, for masked image modeling.
    finished = None if isinstance(model, ViTScratchForMaskedImageModeling) else encoder_of
    objective = Objective(collator, loss, description=description, finished_model=finished)
    return build_trainer(model, processor, data, arguments, objective), lines


def encoder_of(model: PreTrainedModel, weights: dict[str, Tensor]) -> ViTScratchModel:
    """The encoder of a pretraining model, given its weights."""
    encoder = ViTScratchModel(model.config, add_pooling_layer=any(name.startswith("vit.pooler.") for name in weights))
    encoder.load_state_dict({name: weights[f"vit.{name}"] for name in encoder.state_dict()})
    return encoder


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """The share of a batch in the mean over all images of an update, from its own mean; for `compute_loss_func`."""
    loss = outputs["loss"]
    return loss if num_items_in_batch is None else loss * (len(labels) / num_items_in_batch)


def build_dino(
    classifier: ViTScratchForImageClassification, options: PretrainingArguments, processor: BaseImageProcessor,
    arguments: ImageTrainingArguments, is_photo: bool,
) -> tuple[SelfDistillation, Objective]:  # fmt: skip
    """Student and teacher, which begin with the encoder of a classifier. Raises InputError for other channels."""
    config = classifier.config
    if config.num_channels not in (1, 3) or not getattr(processor, "do_eight_bits", True):
        raise InputError("--objective dino changes colours of grey and colour images, and these are of another kind.")
    size = input_size(processor, config)
    local_size = tuple(max(round(3 / 7 * side / patch), 1) * patch for side, patch in zip(size, config.patch_hw))
    local_scale, global_scale = next(scales for side, scales in CROP_SCALES.items() if max(size) <= side)
    options.local_crops_scale = options.local_crops_scale or local_scale
    options.global_crops_scale = options.global_crops_scale or global_scale
    scales = options.global_crops_scale, options.local_crops_scale
    crops = MultiCrop(size, local_size, options.local_crops_number, processor.resample, *scales, is_photo)
    model = SelfDistillation(config, options.out_dim)
    model.vit.load_state_dict(classifier.vit.state_dict())
    model.start_student()
    steps = DinoSteps(model, options, arguments.weight_decay)
    description = (
        f"what a teacher says about other crops, {options.out_dim:,} outputs (DINO); momentum "
        f"{options.momentum_teacher:g} to 1, weight decay to {options.weight_decay_end:g}, temperature from "
        f"{options.warmup_teacher_temp:g} to {options.teacher_temp:g} in {options.warmup_teacher_temp_epochs:g} epochs"
        f", last layer frozen for {options.freeze_last_layer:g} epochs"
    )
    objective = Objective(
        ImageCollator(), steps.loss, description=description, finished_model=encoder_of, augmentation=crops,
        callbacks=(steps,),
    )  # fmt: skip
    return model, objective


def build_masked_model(
    config: ViTScratchConfig, options: PretrainingArguments, processor: BaseImageProcessor
) -> tuple[PreTrainedModel, MaskingCollator]:
    """The encoder with the objective's decoder, and the collator that masks. Raises ValueError if they don't fit."""
    ratio, patch, share = options.mask_ratio, config.patch_hw, f"{100 * options.mask_ratio:g} %"
    if options.objective == "simmim":
        square = options.mask_patch_size
        description = f"{share} of squares of {square} pixels masked, their pixels predicted (SimMIM)"
        masking = masked_squares(ratio, square, patch)
        return ViTScratchForMaskedImageModeling(config), MaskingCollator(masking, patch, description)
    if options.objective == "mpp":
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        statistics = (np.broadcast_to(values, config.num_channels).tolist() for values in (mean, std))
        what = f"{share} of patch embeddings corrupted, their {MPP_TARGETS[options.mpp_target]} predicted"
        collator = MaskingCollator(corrupted_patches(ratio), patch, f"{what} (the paper, B.1.2)")
        return MaskedPatchPrediction(config, options.mpp_target, *statistics), collator
    width = options.decoder_hidden_size or max(min(512, config.hidden_size * 2 // 3 // 32 * 32), 32)
    layers = options.decoder_num_hidden_layers or max(min(8, config.num_hidden_layers * 2 // 3), 1)
    heads = options.decoder_num_attention_heads or max(width // 32, 1)
    description = f"{share} of patches hidden, their pixels predicted (MAE)"
    collator = MaskingCollator(visible_patches(ratio), patch, description)
    return MaskedAutoencoder(config, width, layers, heads, options.norm_pix_loss), collator
