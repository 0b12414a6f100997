# SPDX-License-Identifier: Apache-2.0
"""From arguments to a model, data sets, an objective and the trainer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoImageProcessor, PreTrainedModel, ProgressCallback, set_seed
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..acceleration.speed_up import speed_up
from ..augmentation.on_device import build_device_images
from ..augmentation.photo import build_augmentation
from ..checkpoint.classifier import fit_classifier, label_fields
from ..common.errors import InputError
from ..common.pretrained import default_processor, load_pretrained, loading
from ..configuration_vit_scratch import ViTScratchConfig
from ..data.collation import ImageCollator, MixingCollator, input_size
from ..data.dataset import ImageClassificationDataset
from ..data.splits import ImageData
from ..data.streams import ImageStream, StreamBatches, StreamDataset, check_stream
from ..evaluation.compute_metrics import build_compute_metrics, rank_labels
from ..evaluation.probes import build_probe
from ..modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchModel, ViTScratchPreTrainedModel
from .arguments import ImageTrainingArguments, config_fields, sizes
from .callbacks import Progress, SetEpoch, WeightAverage
from .flags import ModelArguments
from .optimization import build_loss
from .trainer import ImageTrainer


@dataclass(frozen=True)
class Objective:
    """What a run learns."""

    data_collator: ImageCollator
    compute_loss_func: Callable[..., torch.Tensor] | None  # for the Trainer; None for the model's own loss
    metrics: dict[str, Any] = field(default_factory=dict)  # the Trainer's arguments for metrics beside the loss
    description: str | None = None  # for people; None for classification
    # Builds the model that is saved in the end from the trained one and its weights. None: it is the trained one.
    finished_model: Callable[[PreTrainedModel, dict[str, torch.Tensor]], PreTrainedModel] | None = None


def build_trainer(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    data: ImageData,
    arguments: ImageTrainingArguments,
    objective: Objective | None = None,
) -> ImageTrainer:
    """
    The trainer with its data sets and callbacks, whose runs resume bit for bit. The default objective is
    classification. Raises InputError if the flags don't fit the data or the model.
    """
    objective = objective or classification(data, arguments)
    train_set, held_out = build_datasets(data, processor, model.config, arguments, objective)
    batches = StreamBatches.from_arguments(train_set, arguments) if isinstance(train_set, StreamDataset) else None
    decay, warmup = arguments.recipe_arguments.ema_decay, arguments.recipe_arguments.ema_warmup
    trainer = ImageTrainer(
        speed_up(model),
        arguments,
        average=None if decay is None else WeightAverage(decay, warmup),
        stream_batches=batches,
        objective=objective.description,
        finished_model=objective.finished_model,
        data_collator=objective.data_collator,
        compute_loss_func=objective.compute_loss_func,
        train_dataset=train_set,
        eval_dataset=held_out,
        processing_class=processor,
        callbacks=[SetEpoch(train_set)],
        **objective.metrics,
    )
    if isinstance(objective.data_collator, MixingCollator):
        trainer.label_smoother = None  # the collator smooths: the Trainer can't smooth probabilities
    logging.disable_progress_bar()  # the bar of each checkpoint that is written, not the training bar
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress)
    if arguments.probe:
        trainer.add_callback(build_probe(trainer, data))
    return trainer


def classification(data: ImageData, arguments: ImageTrainingArguments) -> Objective:
    """Classification with the loss and the mixing of the flags. Raises InputError if the loss does not fit the data."""
    recipe, smoothing = arguments.recipe_arguments, arguments.label_smoothing_factor
    collator = ImageCollator()
    if recipe.mixup or recipe.cutmix:
        smoothing = 0.0 if data.is_multi_label else smoothing  # the loss smooths several labels
        collator = MixingCollator(len(data.label_names), recipe.mixup, recipe.cutmix, smoothing)
    if data.is_multi_label and arguments.metric_for_best_model == "accuracy":
        arguments.metric_for_best_model = "mean_average_precision"
    metrics = {
        "compute_metrics": build_compute_metrics(len(data.label_names), data.is_multi_label),
        "preprocess_logits_for_metrics": None if data.is_multi_label else rank_labels,
    }
    return Objective(collator, build_loss(data, arguments), metrics)


def build_datasets(
    data: ImageData,
    processor: BaseImageProcessor,
    config: ViTScratchConfig,
    arguments: ImageTrainingArguments,
    objective: Objective,
) -> tuple[Dataset, Dataset]:
    """The augmented training set and the held-out set. Raises InputError if the flags don't fit the data."""
    kind, channels = data.source.augmentation, config.num_channels
    augmentation = build_augmentation(kind, input_size(processor, config), processor.resample, channels, arguments)
    # An objective without labels draws its masks from the keys of images, of held-out ones too.
    keys = {"seed": arguments.seed, "with_keys": objective.description is not None}
    held_out = ImageClassificationDataset(data.validation, processor, channels, **keys)
    if arguments.images_on_device:
        if isinstance(data.train, ImageStream):
            raise InputError("--images_on_device keeps all images, and --streaming never has them all. Keep one.")
        if kind != "photo":
            raise InputError(f"--images_on_device augments photos. Leave it out for {data.source.name}.")
        train_set = ImageClassificationDataset(data.train, processor, channels)
        return build_device_images(train_set, held_out, augmentation, arguments)
    train_set = ImageClassificationDataset(
        data.train,
        processor,
        channels,
        augmentation,
        seed=arguments.seed,
        fast_decode=arguments.fast_decode and kind == "photo",
        max_broken_images=arguments.max_broken_images,
    )
    if isinstance(data.train, ImageStream):
        check_stream(data.train, arguments, arguments.recipe_arguments.aug_repeats)
        train_set = StreamDataset(data.train, train_set, data.shuffle_buffer_size)
    return train_set, held_out


def build_model(
    arguments: ModelArguments,
    label_names: list[str],
    num_channels: int,
    seed: int,
    has_representation: bool = False,
    is_multi_label: bool = False,
) -> tuple[ViTScratchForImageClassification, BaseImageProcessor, list[str]]:
    """
    The model that training starts from: a new one, or a saved one whose classifier is adapted to the labels.

    Args:
        arguments: of the command line.
        label_names: in the order of the class indices, for the configuration. [] for no classifier.
        num_channels: of a new network.
        seed: of new weights.
        has_representation: gives a new network the tanh layer of the paper's pretraining (3.1), as wide as the encoder,
            unless the command line says otherwise.
        is_multi_label: whether images have any number of labels.

    Returns:
        Model, image processor, and a line for the user on the origin of weights and classifier.

    Raises:
        InputError: if the model can't be loaded, or does not fit.
    """
    set_seed(seed)
    overrides, labels = _overrides(arguments), label_fields(label_names, is_multi_label)
    if arguments.model_name_or_path is not None:
        model, processor, missing = _load(ViTScratchForImageClassification, arguments, optional="classifier.")
        bias = overrides.get("head_bias_init", 0.0)
        head = fit_classifier(model, label_names, bool(missing), bias, is_multi_label)
        line = f"From {arguments.model_name_or_path}: {model.num_parameters():,} parameters. {head}"
        return model, processor, [line]
    if arguments.config_name is not None:
        origin = arguments.config_name
        with loading(f"--config_name {origin}"):
            config = ViTScratchConfig.from_pretrained(origin, cache_dir=arguments.cache_dir, **labels, **overrides)
    else:
        origin = arguments.variant
        config = ViTScratchConfig.from_variant(origin, num_channels=num_channels, **labels, **overrides)
    if has_representation and "representation_size" not in overrides:
        config.representation_size = config.hidden_size
    model = ViTScratchForImageClassification(config)
    height, width = config.image_hw
    line = f"From scratch: {origin}, {model.num_parameters():,} parameters, images of {height} x {width} pixels."
    return model, _given_processor(arguments) or default_processor(config), [line]


def load_encoder(
    arguments: ModelArguments, random_seed: int | None = None
) -> tuple[ViTScratchModel, BaseImageProcessor]:
    """
    The encoder of --model_name_or_path, with its representation layer if it has one; with `random_seed`, the same
    network with random weights. Raises InputError if it can't be loaded, or lacks weights.
    """
    model, processor, _ = _load(ViTScratchModel, arguments)
    if random_seed is not None:
        set_seed(random_seed)
        model = ViTScratchModel(model.config)
    return model, processor


def _load(
    kind: type[ViTScratchPreTrainedModel], arguments: ModelArguments, optional: str | None = None
) -> tuple[Any, BaseImageProcessor, set[str]]:
    """Model, image processor, and missing weights, which must have the `optional` prefix (InputError)."""
    name, hub = arguments.model_name_or_path, {"revision": arguments.model_revision, "cache_dir": arguments.cache_dir}
    # Weights stored in 16 bits become float32: most steps of training are too small for 16 bits.
    overrides = {"dtype": torch.float32, **_overrides(arguments)}
    model, processor, missing = load_pretrained(kind, f"--model_name_or_path {name}", name, hub, **overrides)
    needed = {key for key in missing if optional is None or not key.startswith(optional)}
    if needed:
        raise InputError(
            f"--model_name_or_path {name} lacks {len(needed)} of the network's weights, e.g. {min(needed)}. Give a "
            "model of this library."
        )
    return model, _given_processor(arguments) or processor, missing


def _overrides(arguments: ModelArguments) -> dict[str, Any]:
    """The fields of the configuration that the command line sets."""
    return sizes(arguments) | config_fields(arguments.config_overrides)


def _given_processor(arguments: ModelArguments) -> BaseImageProcessor | None:
    """The image processor of --image_processor_name."""
    name = arguments.image_processor_name
    if name is None:
        return None
    with loading(f"--image_processor_name {name}"):
        return AutoImageProcessor.from_pretrained(
            name, cache_dir=arguments.cache_dir, trust_remote_code=arguments.trust_remote_code
        )
