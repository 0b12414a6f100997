# SPDX-License-Identifier: Apache-2.0
"""The model that training starts from: a new network, or a stored one whose classifier is fitted to the data."""

from typing import Any

import torch
from transformers import AutoImageProcessor, set_seed
from transformers.image_processing_utils import BaseImageProcessor

from ..checkpoint.classifier import fit_classifier, label_fields
from ..common.errors import InputError
from ..common.stored_model import default_processor, load_stored_model, loading
from ..configuration_vit_scratch import ViTScratchConfig
from ..modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchModel, ViTScratchPreTrainedModel
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
        num_channels: of a new network.
        seed: of new weights.
        has_representation: whether a new network gets the tanh layer that the paper pretrains with (3.1), as wide as
            the encoder, where the command line does not say.
        is_multi_label: whether an image has any number of labels, and not one.

    Returns:
        Model, image processor, and a line for the user on where the weights and the classifier come from.

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
    The encoder of --model_name_or_path, with the representation layer before a classifier if it has one.

    Args:
        arguments: the command line's.
        random_seed: if there is one, the same network with random weights of this seed.

    Raises:
        InputError: if it can't be loaded, or lacks weights.
    """
    model, processor, _ = _load(ViTScratchModel, arguments)
    if random_seed is not None:
        set_seed(random_seed)
        model = ViTScratchModel(model.config)
    return model, processor


def _load(
    kind: type[ViTScratchPreTrainedModel], arguments: ModelArguments, optional: str | None = None
) -> tuple[Any, BaseImageProcessor, set[str]]:
    """Model, image processor, and missing weights. Raises InputError if one is missing that has not this prefix."""
    name, hub = arguments.model_name_or_path, {"revision": arguments.model_revision, "cache_dir": arguments.cache_dir}
    # Also weights that are stored in 16 bits: most steps of training are smaller than these can tell apart.
    overrides = {"dtype": torch.float32, **_overrides(arguments)}
    model, processor, missing = load_stored_model(kind, f"--model_name_or_path {name}", name, hub, **overrides)
    needed = {key for key in missing if optional is None or not key.startswith(optional)}
    if needed:
        raise InputError(
            f"--model_name_or_path {name} lacks {len(needed)} of the network's weights, e.g. {min(needed)}. Give a "
            "model of this library."
        )
    return model, _given_processor(arguments) or processor, missing


def _overrides(arguments: ModelArguments) -> dict[str, Any]:
    """The fields of the configuration that the command line sets."""
    sizes = {name: pixels(getattr(arguments, name)) for name in ("image_size", "patch_size")}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    return sizes | config_fields(arguments.config_overrides)


def _given_processor(arguments: ModelArguments) -> BaseImageProcessor | None:
    """The image processor of --image_processor_name."""
    name = arguments.image_processor_name
    if name is None:
        return None
    with loading(f"--image_processor_name {name}"):
        return AutoImageProcessor.from_pretrained(
            name, cache_dir=arguments.cache_dir, trust_remote_code=arguments.trust_remote_code
        )
