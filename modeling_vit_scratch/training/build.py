# SPDX-License-Identifier: Apache-2.0
"""From a model and data to the trainer: augmentation, mixing, metrics, callbacks."""

from typing import Any

from transformers import PreTrainedModel, ProgressCallback
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..acceleration.speed_up import speed_up
from ..augmentation.device_images import DeviceImages, build_device_images
from ..augmentation.photo import DigitAugmentation, PhotoAugmentation
from ..augmentation.policies import Chain, ColorJitter, RandomErasing, auto_augment
from ..common.errors import InputError
from ..configuration_vit_scratch import ViTScratchConfig
from ..data.collation import ImageCollator, MixingCollator
from ..data.dataset import Augmentation, ImageClassificationDataset
from ..data.pixels import input_size
from ..data.splits import ImageData, check_for_probes
from ..data.streaming import StreamDataset, StreamPlace, check_stream
from ..data.streams import ImageStream
from ..evaluation.compute_metrics import build_compute_metrics, rank_labels
from ..evaluation.probes import Probe, balanced_subset
from .arguments import ImageTrainingArguments
from .callbacks import Progress, SamplesSeen, SetEpoch
from .losses import ClassificationLoss, MultiLabelLoss, class_weights, positive_weights
from .optimization import WeightAverage
from .trainer import ImageTrainer


def build_trainer(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    data: ImageData,
    arguments: ImageTrainingArguments,
    kind: type[ImageTrainer] = ImageTrainer,
    **settings: Any,
) -> ImageTrainer:
    """
    The trainer, with the data as the model takes it and with the callbacks that make a run resumable bit by bit.

    Args:
        model, processor, data, arguments: what to train, on what, and how.
        kind: the class of the trainer.
        settings: of the trainer, where it does not learn to classify: `data_collator`, `compute_loss_func`.
    """
    channels = model.config.num_channels
    collator = settings.pop("data_collator", None)
    has_masks = collator is not None
    if not has_masks:
        collator = build_collator(data, arguments)
        settings |= {
            "compute_metrics": build_compute_metrics(len(data.label_names), data.is_multi_label),
            "preprocess_logits_for_metrics": None if data.is_multi_label else rank_labels,
            "compute_loss_func": build_loss(data, arguments),
        }
        if data.is_multi_label and arguments.metric_for_best_model == "accuracy":
            arguments.metric_for_best_model = "mean_average_precision"
    elif arguments.recipe_arguments.loss != "softmax" or arguments.recipe_arguments.class_weights:
        raise InputError("--loss and --class_weights are about labels, and this objective has none. Leave them out.")
    augmentation = build_augmentation(data.source.augmentation, processor, model.config, arguments)
    held_out = ImageClassificationDataset(
        data.validation, processor, channels, seed=arguments.seed, with_keys=has_masks
    )
    stream_place = None
    if arguments.images_on_device:
        train_set, held_out = keep_on_device(data, held_out, arguments)
    else:
        train_set = ImageClassificationDataset(
            data.train,
            processor,
            channels,
            augmentation,
            seed=arguments.seed,
            fast_decode=arguments.fast_decode and data.source.augmentation == "photo",
            max_broken_images=arguments.max_broken_images,
        )
    if isinstance(data.train, ImageStream):
        check_stream(data.train, arguments)
        train_set, stream_place = StreamDataset(data.train, train_set, data.shuffle_buffer_size), StreamPlace()
    decay, warmup = arguments.recipe_arguments.ema_decay, arguments.recipe_arguments.ema_warmup
    average = None if decay is None else WeightAverage(decay, warmup)
    samples = SamplesSeen()
    trainer = kind(
        model=speed_up(model),
        args=arguments,
        data_collator=collator,
        train_dataset=train_set,
        eval_dataset=held_out,
        processing_class=processor,
        callbacks=[SetEpoch(train_set), samples, *([] if average is None else [average])],
        **settings,
    )
    trainer.average, trainer.samples = average, samples
    if stream_place is not None:
        trainer.stream_place = stream_place
        trainer.add_callback(stream_place)
    if isinstance(collator, MixingCollator):
        trainer.label_smoother = None  # the collator smooths: the Trainer can't smooth probabilities
    logging.disable_progress_bar()  # a bar for each checkpoint that is written; the training bar is another one
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress)
    if arguments.probe:
        trainer.add_callback(build_probe(trainer, data))
    return trainer


def keep_on_device(
    data: ImageData, held_out: ImageClassificationDataset, arguments: ImageTrainingArguments
) -> tuple[DeviceImages, DeviceImages]:
    """
    The training images and the held-out ones, for --images_on_device.

    Raises:
        InputError: for data that it is not for.
    """
    if isinstance(data.train, ImageStream):
        raise InputError("--images_on_device keeps all images, and --streaming never has them all. Keep one of them.")
    if data.source.augmentation != "photo":
        raise InputError(f"--images_on_device augments photos. Leave it out for {data.source.name}.")
    train = ImageClassificationDataset(data.train, held_out.processor, held_out.decoder.num_channels)
    return build_device_images(train, held_out, arguments)


def build_probe(trainer: ImageTrainer, data: ImageData) -> Probe:
    """
    What --probe asks for: it learns from images of the training part, without augmentation, and is tested on held-out
    ones. Of a stream, which can't be chosen from, it learns from half of the held-out images.

    Raises:
        InputError: for images without labels.
    """
    arguments, processor, held_out = trainer.args, trainer.processing_class, data.validation
    check_for_probes(data)
    maximum, seed = arguments.probe_images, arguments.seed
    if isinstance(data.train, ImageStream):
        chosen = balanced_subset(held_out.labels, 2 * maximum, seed)
        bank, queries = held_out.select(chosen[::2]), held_out.select(chosen[1::2])
    else:
        bank, queries = (
            examples.select(balanced_subset(examples.labels, maximum, seed)) for examples in (data.train, held_out)
        )
    channels = trainer.model.config.num_channels
    bank, queries = (ImageClassificationDataset(examples, processor, channels) for examples in (bank, queries))
    return Probe(trainer, arguments.probe, bank, queries, len(data.label_names), arguments.probe_steps)


def build_augmentation(
    kind: str, processor: BaseImageProcessor, config: ViTScratchConfig, arguments: ImageTrainingArguments
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


def build_loss(data: ImageData, arguments: ImageTrainingArguments) -> ClassificationLoss | MultiLabelLoss | None:
    """What --loss and --class_weights ask for; None for the model's own. Raises InputError if it can't be had."""
    wishes, num_labels = arguments.recipe_arguments, len(data.label_names)
    smoothing = 0.0 if wishes.mixup or wishes.cutmix else arguments.label_smoothing_factor  # mixed ones are smooth
    if data.is_multi_label:
        smoothing = arguments.label_smoothing_factor
    if wishes.loss == "softmax" and not wishes.class_weights and not (data.is_multi_label and smoothing):
        return None
    weights = None
    if wishes.class_weights:
        if isinstance(data.train, ImageStream):
            raise InputError("--class_weights need the labels of all training images, which a stream does not tell.")
        try:
            if data.is_multi_label:
                weights = positive_weights(wishes.class_weights, data.train.labels)
            else:
                weights = class_weights(wishes.class_weights, data.train.labels, num_labels)
        except ValueError as error:
            raise InputError(str(error)) from error
    if data.is_multi_label:
        return MultiLabelLoss(wishes.loss, smoothing, weights)
    return ClassificationLoss(wishes.loss, num_labels, smoothing, weights)


def build_collator(data: ImageData, arguments: ImageTrainingArguments) -> ImageCollator:
    """What makes batches, and mixes them where that is wanted."""
    wishes = arguments.recipe_arguments
    if not wishes.mixup and not wishes.cutmix:
        return ImageCollator()
    smoothing = 0.0 if data.is_multi_label else arguments.label_smoothing_factor  # the loss smooths several labels
    return MixingCollator(len(data.label_names), wishes.mixup, wishes.cutmix, smoothing)
