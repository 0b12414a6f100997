# SPDX-License-Identifier: Apache-2.0
"""The model of a figure, and photos as the model sees them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.errors import InputError
from ..common.pretrained import load_pretrained
from ..data.listing import URLS, list_folder
from ..modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchModel, ViTScratchPreTrainedModel
from ..page import pictures


def encoder(model: ViTScratchPreTrainedModel) -> ViTScratchModel:
    """The encoder of a model with a head; the model itself, if it is one."""
    return getattr(model, "vit", model)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has its own mode again."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


def open_model(
    source: str, revision: str = "main", image_size: tuple[int, int] | None = None
) -> tuple[ViTScratchPreTrainedModel, Any]:
    """
    A saved model in float32 on the accelerator, if there is one, and its image processor. Without a classifier in the
    checkpoint, the model is an encoder.

    Args:
        source: what `from_pretrained` reads: a folder, a Hub id, a checkpoint of another library.
        revision: branch, tag or commit on the Hub.
        image_size: height and width, if not the model's own; positions are resampled.

    Raises:
        InputError: if it can't be loaded.
    """
    overrides = {} if image_size is None else {"image_size": list(image_size)}
    model, processor, missing = load_pretrained(
        ViTScratchForImageClassification, f"The model {source}", source, {"revision": revision}, dtype=torch.float32,
        **overrides,
    )  # fmt: skip
    needed = {key for key in missing if not key.startswith(("classifier.", "vit.pooler."))}
    if needed:
        raise InputError(f"{source} lacks {len(needed)} of the network's weights, e.g. {min(needed)}.")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return (model.vit if missing else model), processor


def find_photos(sources: list[str]) -> list[str]:
    """
    Images by path or URL; for a folder all images below it, in the order of their names.

    Raises:
        InputError: if a path does not exist, or a folder has no image.
    """
    found = []
    for source in sources:
        if os.path.isdir(source):
            found += [item.path for item in list_folder(source)]
        elif source.startswith(URLS) or os.path.exists(source):
            found.append(source)
        else:
            raise InputError(f"There is no file {source}. Give images, or folders of images.")
    return found


def read_photo(file: str, model: ViTScratchPreTrainedModel, processor: Any) -> Tensor:
    """
    `pixel_values` (1, C, H, W) of one image.

    Raises:
        ImageDecodeError: if it can't be read.
        InputError: if the model can't take it, e.g. because the processor's size is not divisible into patches.
    """
    pixel_values = processor(file, return_tensors="pt")["pixel_values"]
    try:
        encoder(model).embeddings.patch_embeddings.grid(pixel_values)
    except ValueError as error:
        raise InputError(f"{file}: {error} --image_size sets it.") from error
    return pixel_values


def batches(tensors: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Batches of up to `size` consecutive images (1, C, H, W) of the same shape."""
    batch: list[Tensor] = []
    for tensor in tensors:
        if batch and (len(batch) == size or tensor.shape != batch[0].shape):
            yield torch.cat(batch)
            batch = []
        batch.append(tensor)
    if batch:
        yield torch.cat(batch)


def as_pixels(pixel_values: Tensor, processor: Any) -> np.ndarray:
    """Undoes the processor's normalisation: (B, C, H, W) -> (B, H, W, 3), uint8."""
    return pictures.as_pixels(pixel_values.double().cpu().numpy(), processor)
