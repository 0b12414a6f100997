# SPDX-License-Identifier: Apache-2.0
"""What is looked at: a model from anywhere, and photos as it sees them."""

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


def encoder(model: ViTScratchPreTrainedModel) -> ViTScratchModel:
    """The encoder of a model with a head; the model itself, if it is one."""
    return getattr(model, "vit", model)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model without dropout; afterwards as it was."""
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
    A saved model in float32 on the accelerator, if there is one, and the image processor that fits.

    Args:
        source: whatever `from_pretrained` reads: a folder, a Hub id, a checkpoint of another library.
        revision: branch, tag or commit on the Hub.
        image_size: height and width to look at, if not the model's own; its positions are resampled.

    Returns:
        The model, without a classifier if the checkpoint has none, and the processor.

    Raises:
        InputError: if it can't be loaded, with the reason.
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
    The images that paths and URLs name; of a folder every image in it and below, in the order of their names.

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
        InputError: if the model can't look at it, e.g. since its patches don't divide what the processor makes.
    """
    pixel_values = processor(file, return_tensors="pt")["pixel_values"]
    try:
        encoder(model).embeddings.patch_embeddings.grid(pixel_values)
    except ValueError as error:
        raise InputError(f"{file}: {error} --image_size sets it.") from error
    return pixel_values


def batches(tensors: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Joins images (1, C, H, W) to batches of at most `size`: neighbours of the same shape."""
    batch: list[Tensor] = []
    for tensor in tensors:
        if batch and (len(batch) == size or tensor.shape != batch[0].shape):
            yield torch.cat(batch)
            batch = []
        batch.append(tensor)
    if batch:
        yield torch.cat(batch)


def as_pixels(pixel_values: Tensor, processor: Any) -> np.ndarray:
    """What the model sees, for people: normalised (B, C, H, W) -> (B, H, W, 3), uint8."""
    values = pixel_values.permute(0, 2, 3, 1).double().cpu().numpy()  # (B, H, W, C)
    if processor.do_normalize:
        values = values * np.asarray(processor.image_std) + np.asarray(processor.image_mean)
    if processor.do_rescale:
        values = values / processor.rescale_factor
    pixels = values.round().clip(0, 255).astype(np.uint8)
    return pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)
