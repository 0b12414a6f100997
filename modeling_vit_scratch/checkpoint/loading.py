# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint of any format to a model of the wanted size: `from_pretrained`, once the package is imported."""

import copy
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging
from transformers.utils.hub import cached_file

from ..common.pretrained import load_processor
from ..configuration_vit_scratch import ViTScratchConfig
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from ..modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchModel
from .adaptation import adapt, adapted_processor
from .conversion import Checkpoint, load_checkpoint
from .files import SUFFIXES, CheckpointError, find_files, is_sharded, open_tensors
from .formats import NATIVE


logger = logging.get_logger(__name__)

# Arguments of transformers' from_pretrained that say where a file is, and go to the Hub's client.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
# Arguments that mean a way of loading that is transformers' alone.
_TRANSFORMERS_ONLY = ("state_dict", "gguf_file", "key_mapping", "quantization_config")


def from_pretrained(cls: type, load: Callable[..., Any], source: Any, *args: Any, **kwargs: Any) -> Any:
    """
    The models' `from_pretrained`, once the package is imported: transformers' (`load`, bound to `cls`), and

    - `source` may be a checkpoint of any format in `FORMATS`: a file, a folder or a Hub id, or a `Checkpoint`;
    - what the stored weights don't fit is adapted, and a warning says it: `image_size=(H, W)` resamples positions,
      `patch_size` resizes the patch kernel as FlexiViT does, `num_channels` adapts the first kernel, `num_labels` gives
      a new classifier of zeros, `representation_size=None` takes the tanh layer before it away. (For a folder of this
      package another `num_labels` and nothing else needs `ignore_mismatched_sizes=True`, as in transformers.)
    - `source_image_size` is what stored positions are for, where they are on a rectangle and the file doesn't say;
    - the image processor that fits is `model.image_processor`, and is saved with the model.

    Raises:
        CheckpointError: if a checkpoint can't be read exactly.
        ValueError: if there is no way to adapt it.
    """
    source_image_size = kwargs.pop("source_image_size", None)
    if source is None or any(kwargs.get(name) is not None for name in _TRANSFORMERS_ONLY):
        return load(source, *args, **kwargs)
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}
    is_own, own_config = (False, None) if isinstance(source, Checkpoint) else _is_own(source, hub)
    if is_own:
        stored = own_config and ViTScratchConfig.from_dict(own_config)
        if stored is not None and kwargs.get("variant") is None:
            _refuse_absurd(source, stored, hub)
        differences = _differences(cls, stored, kwargs)
        if differences == {"num_labels"} and "classifier.weight" in open_tensors(find_files(source, **hub)[0]):
            # Programs rely on transformers here: an error, or with ignore_mismatched_sizes=True a new classifier.
            if "config" not in kwargs:
                kwargs = {"zero_init_head": True, "head_bias_init": 0.0, "temperature": 1.0, **kwargs}
            differences = set()
        if not differences:
            return load(source, *args, **kwargs)

    given = {**kwargs, "source_image_size": source_image_size}
    checkpoint = source if isinstance(source, Checkpoint) else load_checkpoint(source, given, **hub)
    logger.info(checkpoint.describe())
    config, rest = _target_config(checkpoint.config, kwargs)
    arguments = {name: rest[name] for name in ("add_pooling_layer", "use_mask_token") if name in rest}
    state, notes = adapt(checkpoint, config, cls, arguments)
    for note in checkpoint.notes + notes:
        logger.warning(note)
    for name in (*_HUB_ARGUMENTS, "ignore_mismatched_sizes"):
        rest.pop(name, None)
    model = load(None, *args, config=config, state_dict=state, **rest)
    result = model[0] if isinstance(model, tuple) else model
    result.config.name_or_path = result.name_or_path = str(getattr(source, "source", source))
    if checkpoint.format == NATIVE.name:  # a checkpoint of training can be a folder without one
        processor = load_processor(os.path.dirname(checkpoint.source) or os.curdir, {}, checkpoint.config)
    else:
        processor = ViTScratchImageProcessor(**checkpoint.processor)
    result.image_processor = adapted_processor(processor, checkpoint.config, config)
    return model


def _is_own(source: Any, hub: Mapping[str, Any]) -> tuple[bool, dict[str, Any] | None]:
    """Whether to leave a source to transformers, to load it or to say what is wrong with it; and its config.json."""
    if os.path.isfile(source) or os.fspath(source).endswith(SUFFIXES):
        return False, None
    folder = os.path.join(source, hub.get("subfolder") or "")
    if is_sharded(folder):
        return False, None
    names = os.listdir(folder) if os.path.isdir(folder) else []
    if "config.json" not in names and any(name.endswith(SUFFIXES) for name in names):
        return "adapter_config.json" in names, None
    try:
        path = cached_file(source, "config.json", **hub)
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True, None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds no dictionary of settings, but a {type(config).__name__}.")
    return config.get("model_type") == ViTScratchConfig.model_type, config


def _refuse_absurd(source: Any, config: ViTScratchConfig, hub: Mapping[str, Any]) -> None:
    """What weights lack is made anew: a config.json that describes far more than they are must not fill the memory."""
    try:
        file = open_tensors(find_files(source, **hub)[0])
    except CheckpointError:  # transformers tells what is wrong
        return
    stored = sum(map(math.prod, file.shapes.values()))
    with torch.device("meta"):
        described = ViTScratchModel(config).num_parameters()
    if described > 10 * stored + 100_000_000:
        raise CheckpointError(
            f"{source}: its config.json describes at least {described:,} parameters, and its weights have {stored:,}. "
            "One of the two is damaged, or is meant to fill the memory."
        )


def _differences(cls: type, old: ViTScratchConfig | None, kwargs: Mapping[str, Any]) -> set[str]:
    """Which of what can be adapted the caller wants otherwise than a folder of this package has it."""
    if old is None or kwargs.keys().isdisjoint({"config", *_overridable()}):  # a configuration takes its time to check
        return set()
    new, _ = _target_config(old, kwargs)
    fields = ["image_hw", "patch_hw", "num_channels"]
    if issubclass(cls, ViTScratchForImageClassification):
        fields += ["num_labels", "representation_size"]
    return {name for name in fields if getattr(old, name) != getattr(new, name)}


def _target_config(config: ViTScratchConfig, kwargs: Mapping[str, Any]) -> tuple[ViTScratchConfig, dict[str, Any]]:
    """The configuration that the caller wants, and the arguments that are none of its fields."""
    rest = dict(kwargs)
    target = rest.pop("config", None)
    if isinstance(target, PreTrainedConfig):
        return copy.deepcopy(target), rest
    if target is not None:
        config = ViTScratchConfig.from_pretrained(target)
    known = _overridable()
    overrides = {name: rest.pop(name) for name in list(rest) if name in known}
    if overrides.get("num_labels") == config.num_labels:
        del overrides["num_labels"]
    return ViTScratchConfig.from_dict(config.to_dict(), **overrides), rest


def _overridable() -> set[str]:
    """The arguments of `from_pretrained` that are fields of the configuration."""
    known = {"num_labels", "output_attentions", "output_hidden_states", "return_dict", "name_or_path"}
    return known | {name for name in ViTScratchConfig.__dataclass_fields__ if not name.startswith("_")} - {"dtype"}
