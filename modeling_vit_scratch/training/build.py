# SPDX-License-Identifier: Apache-2.0
"""From arguments to a model, data sets, an objective and the trainer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoImageProcessor, PreTrainedModel, TrainerCallback, TrainerState, set_seed
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..acceleration.speed_up import speed_up
from ..augmentation.on_device import build_device_images
from ..augmentation.photo import build_augmentation
from ..common.errors import InputError
from ..common.pretrained import default_processor, load_pretrained, loading
from ..configuration_vit_scratch import ViTScratchConfig
from ..data.collation import ImageCollator, MixingCollator, input_size
from ..data.dataset import Augmentation, ImageClassificationDataset, measured
from ..data.splits import ImageData
from ..data.streams import ImageStream, StreamBatches, StreamDataset, check_stream
from ..distillation.loss import Distillation, add_distillation_token
from ..distillation.teacher import Teacher
from ..evaluation.compute_metrics import build_compute_metrics, rank_labels
from ..modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchModel, ViTScratchPreTrainedModel
from ..recipes.from_data import FEW_HELD_OUT, settings_from_data
from .adaptation import adapt, is_temporary, merge_adapters, store_features
from .arguments import ModelArguments
from .optimization import ClassificationLoss, MultiLabelLoss, WeightAverage, class_weights, is_head, positive_weights
from .progress import add_progress
from .trainer import ImageTrainer, ImageTrainingArguments


@dataclass(frozen=True)
class Objective:
    """What a run learns: arguments of `ImageTrainer`, and of the Trainer for metrics beside the loss."""

    data_collator: ImageCollator
    compute_loss_func: Callable[..., torch.Tensor] | None  # None for the model's own loss
    metrics: dict[str, Any] = field(default_factory=dict)
    description: str | None = None  # for people; None for classification
    finished_model: Callable[[PreTrainedModel, dict[str, torch.Tensor]], PreTrainedModel] | None = None
    augmentation: Augmentation | None = None  # in place of the flags', of held-out images too
    callbacks: tuple[TrainerCallback, ...] = ()


def build_trainer(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    data: ImageData,
    arguments: ImageTrainingArguments,
    objective: Objective | None = None,
) -> ImageTrainer:
    """The trainer, by default of a classifier. Raises InputError if the flags don't fit the data or the model."""
    set_from_data(arguments, data, model)
    if data.is_regression and model.classifier.bias.item() == model.config.head_bias_init:  # new: it starts at the mean
        nn.init.zeros_(model.classifier.weight)
        nn.init.constant_(model.classifier.bias, float(np.mean(data.train.labels)))
    if data.source.num_channels not in (1, 3) and processor.do_eight_bits:
        processor = measured(processor, data.train)
    objective = objective or classification(data, arguments)
    train_set, held_out = build_datasets(data, processor, model.config, arguments, objective)
    recipe, loss = arguments.recipe_arguments, objective.compute_loss_func
    kind = recipe.distillation_type if objective.description is None else "features"
    if recipe.distills and kind == "token":
        model = add_distillation_token(model)
    adapt(model, recipe)
    if recipe.distills:
        labels = None if kind == "features" else data.label_names
        teacher = Teacher(recipe.teacher_model, processor, model.config, labels, arguments.device)
        loss = Distillation(model, teacher, kind, recipe.distillation_alpha, recipe.distillation_tau, loss)
    if objective.description is None:
        train_set, held_out = store_features(model, (train_set, held_out), processor, arguments)
    merge = merge_adapters if any(map(is_temporary, model.state_dict())) else None
    batches = StreamBatches.from_arguments(train_set, arguments) if isinstance(train_set, StreamDataset) else None
    decay, warmup = recipe.ema_decay, recipe.ema_warmup
    try:
        trainer = ImageTrainer(
            speed_up(model), arguments, average=None if decay is None else WeightAverage(decay, warmup),
            stream_batches=batches, objective=objective.description, images=data.images,
            finished_model=objective.finished_model or merge, data_collator=objective.data_collator,
            compute_loss_func=loss, train_dataset=train_set, eval_dataset=held_out,
            processing_class=processor, callbacks=[SetEpoch(train_set), *objective.callbacks], **objective.metrics,
        )  # fmt: skip
    except (ValueError, ImportError) as error:  # transformers says what is wrong with its flags
        raise InputError(str(error)) from error
    if isinstance(objective.data_collator, MixingCollator):
        trainer.label_smoother = None  # the collator smooths: the Trainer can't smooth probabilities
    logging.disable_progress_bar()  # the bar of each checkpoint that is written, not the training bar
    add_progress(trainer)
    if arguments.probe:
        from ..evaluation.probes import build_probe  # imports much of scikit-learn

        trainer.add_callback(build_probe(trainer, data))
    return trainer


def set_from_data(arguments: ImageTrainingArguments, data: ImageData, model: PreTrainedModel) -> None:
    """Sets the flags that the command leaves to the number of images, with a message; see `recipes.from_data`."""
    recipe = arguments.recipe_arguments
    if not recipe.plan or data.num_train is None:
        return
    heads = (weight for name, weight in model.named_parameters() if is_head(name) and name.endswith("weight"))
    is_fresh = any(not row.any() for weight in heads for row in weight)  # the row of a label, at least
    found = settings_from_data(recipe.plan, data.num_train, model.config.hidden_size, is_fresh, arguments.world_size)
    lines = ["Chosen for these images, where no flag says otherwise:"]
    for name, (value, reason) in found.items():
        if name in recipe.open_flags:
            setattr(arguments if hasattr(arguments, name) else recipe, name, value)
            lines.append(f"    --{name} {value:g}: {reason}")
    held_out = len(data.validation)
    if "metric_for_best_model" in recipe.open_flags and held_out < FEW_HELD_OUT:
        arguments.metric_for_best_model, arguments.greater_is_better = "loss", False
        lines.append(f"    --metric_for_best_model loss: an accuracy on {held_out} held-out images is mostly chance")
    recipe.message = "\n".join(lines)


def classification(data: ImageData, arguments: ImageTrainingArguments) -> Objective:
    """Classification with the loss and the mixing of the flags. Raises InputError if they don't fit the data."""
    recipe, smoothing, count = arguments.recipe_arguments, arguments.label_smoothing_factor, len(data.label_names)
    if data.is_regression:
        return regression(arguments)
    collator, loss, weights = ImageCollator(), None, None
    if recipe.mixup or recipe.cutmix:  # the collator smooths classes, the loss several labels
        spread = 0.0 if data.is_multi_label else smoothing
        collator = MixingCollator(count, recipe.mixup, recipe.cutmix, spread, recipe.aug_repeats)
        smoothing = smoothing if data.is_multi_label else 0.0
    if recipe.balanced_sampling and (isinstance(data.train, ImageStream) or data.is_multi_label):
        raise InputError("--balanced_sampling needs one label of each training image, known before. Leave it out.")
    if recipe.class_weights:
        if isinstance(data.train, ImageStream):
            raise InputError("--class_weights need the labels of all training images, which a stream does not have.")
        given, labels = recipe.class_weights, data.train.labels
        weights = positive_weights(given, labels) if data.is_multi_label else class_weights(given, labels, count)
    is_own = recipe.loss != "softmax" or recipe.class_weights or recipe.distills  # not the model's or the Trainer's
    if data.is_multi_label and (is_own or smoothing):
        loss = MultiLabelLoss(recipe.loss, smoothing, weights)
    elif not data.is_multi_label and is_own:
        loss = ClassificationLoss(recipe.loss, count, smoothing, weights)
    if data.is_multi_label and arguments.metric_for_best_model == "accuracy":
        arguments.metric_for_best_model = "mean_average_precision"
    rank = None if data.is_multi_label else rank_labels
    metrics = {"compute_metrics": build_compute_metrics(count, data.is_multi_label)}
    return Objective(collator, loss, {**metrics, "preprocess_logits_for_metrics": rank})


def regression(arguments: ImageTrainingArguments) -> Objective:
    """A number for each image, with the mean squared error. Raises InputError for flags that need labels."""
    recipe = arguments.recipe_arguments
    names = ("mixup", "cutmix", "class_weights", "balanced_sampling", "teacher_model")
    given = {name: getattr(recipe, name) for name in names}
    given |= {"loss": recipe.loss != "softmax", "label_smoothing_factor": arguments.label_smoothing_factor}
    if wrong := " ".join(f"--{name}" for name, value in {**given, "probe": arguments.probe}.items() if value):
        raise InputError(f"{wrong}: needs labels, and these images have numbers to predict. Leave it out.")
    if arguments.metric_for_best_model == "accuracy":
        arguments.metric_for_best_model, arguments.greater_is_better = "loss", False
    return Objective(ImageCollator(), None, {"compute_metrics": build_compute_metrics(1, is_regression=True)})


def build_datasets(
    data: ImageData,
    processor: BaseImageProcessor,
    config: ViTScratchConfig,
    arguments: ImageTrainingArguments,
    objective: Objective,
) -> tuple[Dataset, Dataset]:
    """The augmented training set and the held-out set. Raises InputError if the flags don't fit the data."""
    kind, channels = data.source.augmentation, config.num_channels
    size = input_size(processor, config)
    augmentation = objective.augmentation
    augmentation = augmentation or build_augmentation(kind, size, processor.resample, channels, arguments)
    # An objective without labels draws its masks from the keys of images, of held-out ones too.
    keys = {"seed": arguments.seed, "with_keys": objective.description is not None}
    held_out = ImageClassificationDataset(data.validation, processor, channels, objective.augmentation, **keys)
    keeps_values = not getattr(processor, "do_eight_bits", True)
    if arguments.images_on_device:
        if keeps_values:
            raise InputError("--images_on_device keeps 8 bits of a pixel. Leave it out for arrays.")
        if isinstance(data.train, ImageStream):
            raise InputError("--images_on_device keeps all images, and --streaming never has them all. Keep one.")
        if kind != "photo":
            raise InputError(f"--images_on_device augments photos. Leave it out for {data.source.name}.")
        train_set = ImageClassificationDataset(data.train, processor, channels)
        return build_device_images(train_set, held_out, augmentation, arguments)
    fast, broken = arguments.fast_decode and kind == "photo" and not keeps_values, arguments.max_broken_images
    reading = {"seed": arguments.seed, "fast_decode": fast, "max_broken_images": broken}
    train_set = ImageClassificationDataset(data.train, processor, channels, augmentation, **reading)
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
    is_regression: bool = False,
) -> tuple[ViTScratchForImageClassification, BaseImageProcessor, list[str]]:
    """
    A new model, or a saved one with its classifier adapted to the labels (none without labels), its image processor,
    and a line for the user. `has_representation`: with the tanh layer of the paper's pretraining (3.1), if it is new.
    """
    set_seed(seed)
    problem = "multi_label_classification" if is_multi_label else "single_label_classification"
    problem = "regression" if is_regression else problem
    overrides, labels = arguments.config_fields(), label_fields(label_names, problem)
    overrides |= {} if num_channels in (1, 3) else {"num_channels": num_channels}
    if arguments.model_name_or_path is not None:
        model, processor, missing = _load(ViTScratchForImageClassification, arguments, overrides, "classifier.")
        bias = overrides.get("head_bias_init", 0.0)
        head = fit_classifier(model, label_names, bool(missing), bias, problem)
        line = f"From {arguments.model_name_or_path}: {model.num_parameters():,} parameters. {head}"
        return model, processor, [line]
    if arguments.config_name is not None:
        origin = arguments.config_name
        with loading(f"--config_name {origin}"):
            config = ViTScratchConfig.from_pretrained(origin, cache_dir=arguments.cache_dir, **labels, **overrides)
    else:
        origin = arguments.variant
        config = ViTScratchConfig.from_variant(origin, **{"num_channels": num_channels, **labels, **overrides})
    if has_representation and "representation_size" not in overrides:
        config.representation_size = config.hidden_size
    model = ViTScratchForImageClassification(config)
    height, width = config.image_hw
    line = f"From scratch: {origin}, {model.num_parameters():,} parameters, images of {height} x {width} pixels."
    return model, _given_processor(arguments) or default_processor(config), [line]


def load_encoder(
    arguments: ModelArguments, random_seed: int | None = None
) -> tuple[ViTScratchModel, BaseImageProcessor]:
    """The encoder of --model_name_or_path; with `random_seed`, the same network with random weights."""
    model, processor, _ = _load(ViTScratchModel, arguments, arguments.config_fields())
    if random_seed is not None:
        set_seed(random_seed)
        model = ViTScratchModel(model.config)
    return model, processor


def _load(
    kind: type[ViTScratchPreTrainedModel],
    arguments: ModelArguments,
    fields: dict[str, Any],
    optional: str | None = None,
) -> tuple[Any, BaseImageProcessor, set[str]]:
    """Model, image processor, and missing weights. Raises InputError if any lacks the `optional` prefix."""
    name, hub = arguments.model_name_or_path, {"revision": arguments.model_revision, "cache_dir": arguments.cache_dir}
    # Weights stored in 16 bits become float32: most steps of training are too small for 16 bits.
    overrides = {"dtype": torch.float32, **fields}
    model, processor, missing = load_pretrained(kind, f"--model_name_or_path {name}", name, hub, **overrides)
    needed = {key for key in missing if not optional or not key.startswith(optional)}
    if needed:
        raise InputError(
            f"--model_name_or_path {name} lacks {len(needed)} of the network's weights, e.g. {min(needed)}. Give a "
            "model of this library."
        )
    return model, _given_processor(arguments) or processor, missing


def _given_processor(arguments: ModelArguments) -> BaseImageProcessor | None:
    """The image processor of --image_processor_name."""
    name = arguments.image_processor_name
    if name is None:
        return None
    with loading(f"--image_processor_name {name}"):
        return AutoImageProcessor.from_pretrained(
            name, cache_dir=arguments.cache_dir, trust_remote_code=arguments.trust_remote_code
        )


def fit_classifier(
    model: ViTScratchForImageClassification, label_names: list[str], is_fresh: bool, bias: float, problem: str
) -> str:
    """Gives the classifier a row for each label, in their order, kept or zero; returns a line that says which."""
    config, is_multi_label = model.config, problem == "multi_label_classification"
    old = [config.id2label[index] for index in range(config.num_labels)]
    same_problem = problem == (config.problem_type or "single_label_classification")
    is_known, had_representation = not is_fresh and same_problem, config.representation_size is not None
    rows = {name: old.index(name) for name in label_names if is_known and old.count(name) == 1}
    if rows:
        for part in ("classifier", "distillation_classifier"):
            if (head := getattr(model, part)) is not None:
                setattr(model, part, _head_of_rows(head, [rows.get(name) for name in label_names], bias))
    else:
        # The whole head is replaced, with the tanh layer that pretraining had before it: the paper, 3.2.
        model.vit.pooler.dense, config.representation_size = None, None
        model.distillation_classifier, config.use_distillation_head = None, False
        head = nn.Linear(config.hidden_size, len(label_names), dtype=model.dtype) if label_names else nn.Identity()
        for parameter, value in zip(head.parameters(), (0.0, bias)):
            nn.init.constant_(parameter, value)
        config.head_bias_init, model.classifier = bias, head
    model.num_labels = len(label_names)
    for name, value in label_fields(label_names, problem).items():
        setattr(config, name, value)
    config.temperature = 1.0  # it was fitted to the weights as they were, and so were these
    vars(config).pop("label_thresholds", None)
    if not label_names:
        return "Its encoder is taken, without a classifier."
    if rows and old == label_names:
        return f"Its classifier is kept: the {len(old)} labels are the same."
    if len(rows) == len(old) == len(label_names):
        return f"Its classifier is kept, with its {len(old)} rows put in the order of the data's labels."
    if rows:
        new = len(label_names) - len(rows)
        return f"Rows of its classifier: {len(rows)} of {len(old)} kept, by name; {new} new, starting at zero."
    was = "it had none" if is_fresh or not old else f"it had {len(old)} other labels"
    if not is_fresh and set(old) == set(label_names) and not same_problem:
        was = f"the old one was for {'one label' if is_multi_label else 'several labels'} of an image"
    gone = " The representation layer of its pre-training is gone with the old one." if had_representation else ""
    return f"A fresh classifier for {len(label_names)} labels, starting at zero: {was}.{gone}"


def _head_of_rows(head: nn.Linear, rows: list[int | None], bias: float) -> nn.Linear:
    """A classifier with these rows of another one; None: a new row of zeros, with this bias."""
    chosen = nn.utils.skip_init(nn.Linear, head.in_features, len(rows), dtype=head.weight.dtype)
    with torch.no_grad():
        for ours, theirs, value in ((chosen.weight, head.weight, 0.0), (chosen.bias, head.bias, bias)):
            for index, row in enumerate(rows):
                ours[index] = value if row is None else theirs[row]
    return chosen


def label_fields(label_names: list[str], problem: str) -> dict[str, Any]:
    """The fields of a configuration that follow from the labels, in the order of the class indices."""
    return {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
        # Never left to be guessed from the type of the labels.
        "problem_type": problem if label_names else None,
    }


class SetEpoch(TrainerCallback):
    """Sets the epoch of the training set. The data loader does not if it resumes in the middle of an epoch."""

    def __init__(self, train_set: ImageClassificationDataset) -> None:
        self.train_set = train_set

    def on_epoch_begin(self, args: Any, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self.train_set.set_epoch(int(state.epoch or 0))
