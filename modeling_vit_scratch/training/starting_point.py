# SPDX-License-Identifier: Apache-2.0
"""What training starts from: a fresh network, or a saved one whose classifier is made to fit the data."""

from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor, set_seed
from transformers.image_processing_utils import BaseImageProcessor

from ..common.errors import InputError
from ..common.stored_model import default_processor, load_stored_model, loading
from ..configuration_vit_scratch import ViTScratchConfig
from ..modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchModel
from .arguments import config_fields, pixels
from .flags import ModelArguments


def build_model(
    arguments: ModelArguments,
    label_names: list[str],
    num_channels: int,
    seed: int,
    has_representation: bool = False,
    is_multi_label: bool = False,
) -> tuple[ViTScratchForImageClassification, BaseImageProcessor, list[str]]:
    """
    The network and its image processor.

    Args:
        arguments: the command line's.
        label_names: in the order of the class indices; they go into the configuration. [] for no classifier.
        num_channels: of a fresh network.
        seed: of fresh weights.
        has_representation: whether a fresh network gets the tanh layer that the paper pretrains with (3.1), as wide as
            the encoder, where the command line does not say.
        is_multi_label: whether an image has any number of labels, and not one.

    Returns:
        Model, image processor, and what to tell the user: a line on where the weights and the classifier come from.

    Raises:
        InputError: if the starting point can't be loaded, or does not fit.
    """
    set_seed(seed)
    overrides = {name: pixels(getattr(arguments, name)) for name in ("image_size", "patch_size")}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    overrides |= config_fields(arguments.config_overrides)
    if arguments.model_name_or_path is not None:
        return _from_checkpoint(arguments, label_names, overrides, is_multi_label)
    labels = _label_fields(label_names, is_multi_label)
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
    return model, _wanted_processor(arguments) or default_processor(config), [line]


def _from_checkpoint(
    arguments: ModelArguments, label_names: list[str], overrides: dict[str, Any], is_multi_label: bool
) -> tuple[ViTScratchForImageClassification, BaseImageProcessor, list[str]]:
    name = arguments.model_name_or_path
    # Also weights that are stored in 16 bits: most steps of training are smaller than these can tell apart.
    overrides = {"dtype": torch.float32, **overrides}
    model, processor, missing = load_stored_model(
        ViTScratchForImageClassification, f"--model_name_or_path {name}", name, _hub(arguments), **overrides
    )
    needed = {key for key in missing if not key.startswith("classifier.")}
    if needed:
        raise InputError(
            f"--model_name_or_path {name} lacks {len(needed)} of the network's weights, e.g. {min(needed)}. Give a "
            "model of this library."
        )
    bias = overrides.get("head_bias_init", 0.0)
    head = _fit_head(model, label_names, bool(missing), bias, is_multi_label)
    processor = _wanted_processor(arguments) or processor
    return model, processor, [f"From {name}: {model.num_parameters():,} parameters. {head}"]


def load_encoder(
    arguments: ModelArguments, random_seed: int | None = None
) -> tuple[ViTScratchModel, BaseImageProcessor]:
    """
    The encoder of --model_name_or_path, with the representation layer before a classifier if it has one.

    Args:
        arguments: the command line's.
        random_seed: if there is one, the same network with fresh weights of this seed.

    Raises:
        InputError: if it can't be loaded, or lacks weights.
    """
    name, overrides = arguments.model_name_or_path, {"dtype": torch.float32}
    for field in ("image_size", "patch_size"):
        if (size := pixels(getattr(arguments, field))) is not None:
            overrides[field] = size
    overrides |= config_fields(arguments.config_overrides)
    model, processor, missing = load_stored_model(
        ViTScratchModel, f"--model_name_or_path {name}", name, _hub(arguments), **overrides
    )
    if missing:
        raise InputError(f"{name} lacks {len(missing)} weights, e.g. {min(missing)}.")
    if random_seed is not None:
        set_seed(random_seed)
        model = ViTScratchModel(model.config)
    return model, _wanted_processor(arguments) or processor


def _fit_head(
    model: ViTScratchForImageClassification, label_names: list[str], is_fresh: bool, bias: float, is_multi_label: bool
) -> str:
    """
    Gives the classifier one row for each label, in the data's order; keeps the rows if the labels are the same, and
    both or neither of an image's labels exclude each other.
    """
    config = model.config
    theirs = [config.id2label[index] for index in range(config.num_labels)]
    same_problem = is_multi_label == (config.problem_type == "multi_label_classification")
    keeps = not is_fresh and len(set(theirs)) == len(theirs) and set(theirs) == set(label_names) and same_problem
    had_representation = not keeps and config.representation_size is not None
    if keeps:
        order = [theirs.index(name) for name in label_names]
        heads = [head for head in (model.classifier, model.distillation_classifier) if head is not None]
        with torch.no_grad():
            for parameter in (parameter for head in heads for parameter in head.parameters()):
                parameter.copy_(parameter[order])
    else:
        # The whole head goes, with the tanh layer that pre-training had before it: the paper, 3.2.
        model.vit.pooler.dense, config.representation_size = None, None
        model.distillation_classifier, config.use_distillation_head = None, False
        head = nn.Linear(config.hidden_size, len(label_names), dtype=model.dtype) if label_names else nn.Identity()
        for parameter, value in zip(head.parameters(), (0.0, bias)):
            nn.init.constant_(parameter, value)
        config.head_bias_init = bias
        model.classifier, model.num_labels = head, len(label_names)
    for field, value in _label_fields(label_names, is_multi_label).items():
        setattr(config, field, value)
    config.temperature = 1.0  # it was fitted to the weights as they were
    if not label_names:
        return "Its encoder is taken, without a classifier."
    if not keeps:
        was = "it had none" if is_fresh or not theirs else f"it had {len(theirs)} other labels"
        if not is_fresh and set(theirs) == set(label_names) and not same_problem:
            was = f"the old one was for {'one label' if is_multi_label else 'several labels'} of an image"
        gone = " The representation layer of its pre-training is gone with the old one." if had_representation else ""
        return f"A fresh classifier for {len(label_names)} labels, starting at zero: {was}.{gone}"
    if theirs != label_names:
        return f"Its classifier is kept, with its {len(theirs)} rows put in the order of the data's labels."
    return f"Its classifier is kept: the {len(theirs)} labels are the same."


def _label_fields(label_names: list[str], is_multi_label: bool) -> dict[str, Any]:
    problem = "multi_label_classification" if is_multi_label else "single_label_classification"
    return {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
        # Never left to be guessed from the type of the labels.
        "problem_type": problem if label_names else None,
    }


def _hub(arguments: ModelArguments) -> dict[str, Any]:
    return {"revision": arguments.model_revision, "cache_dir": arguments.cache_dir}


def _wanted_processor(arguments: ModelArguments) -> BaseImageProcessor | None:
    """The one of --image_processor_name."""
    name = arguments.image_processor_name
    if name is None:
        return None
    with loading(f"--image_processor_name {name}"):
        return AutoImageProcessor.from_pretrained(
            name, cache_dir=arguments.cache_dir, trust_remote_code=arguments.trust_remote_code
        )
