# SPDX-License-Identifier: Apache-2.0
"""Loads a pretrained model with its image processor, for training, evaluation, prediction and figures."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from ..configuration_vit_scratch import ViTScratchConfig
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from ..modeling_vit_scratch import ViTScratchPreTrainedModel
from .errors import InputError


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turns errors of loading into InputError. `what`: flag and name, e.g. "MODEL outputs/pets"."""
    try:
        yield
    except Exception as error:  # parsers of damaged, foreign and hostile files raise anything
        raise InputError(f"{what} can't be loaded: {str(error).strip() or type(error).__name__}") from error


def load_pretrained(
    kind: type[ViTScratchPreTrainedModel], what: str, name: str, hub: dict[str, Any], **overrides: Any
) -> tuple[Any, ViTScratchImageProcessor, set[str]]:
    """The model, its image processor, and the names of missing weights. `what` is the model's name in messages."""
    refuse_missing_path(what, name)
    with loading(what):
        model, info = kind.from_pretrained(name, output_loading_info=True, **hub, **overrides)
        # If weights were adapted or converted, the loader has the processor that fits.
        processor = model.image_processor or load_processor(name, hub, model.config)
    return model, processor, set(info["missing_keys"])


def refuse_missing_path(what: str, name: str) -> None:
    """Raises InputError for what can be no Hub id, such as outputs/petz beside a folder outputs/pets."""
    path = Path(name).expanduser()
    is_local = path.is_absolute() or len(path.parts) > 2 or (len(path.parts) == 2 and Path(path.parts[0]).is_dir())
    if not is_local or path.exists():
        return
    others = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, others, n=1)
    hint = f" Did you mean {path.parent / near[0]}?" if near else ""
    raise InputError(f"{what} can't be loaded: there is no such file or folder.{hint}")


def require_finite(outputs: Tensor) -> None:
    """Raises InputError where a model's outputs are NaN or infinite, which would have a label too."""
    if not outputs.isfinite().all():
        raise InputError(
            "MODEL's outputs are NaN or infinite: its weights are damaged, or too large for its dtype. Take weights of "
            "an earlier checkpoint, or float32."
        )


def hash_weights(model: PreTrainedModel) -> Any:
    """SHA-256 of the weights, from hashlib."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest


def load_processor(name: str, hub: dict[str, Any], config: ViTScratchConfig) -> ViTScratchImageProcessor:
    """The image processor of a model, or the default one if it has none."""
    try:
        return ViTScratchImageProcessor.from_pretrained(name, **hub)
    except OSError:  # missing, or a failure: a broken connection must not silently change the pixels
        if cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False, **hub):
            raise
    return default_processor(config)


def default_processor(config: ViTScratchConfig) -> ViTScratchImageProcessor:
    height, width = config.image_hw
    return ViTScratchImageProcessor(num_channels=config.num_channels, size={"height": height, "width": width})
