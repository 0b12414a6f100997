# SPDX-License-Identifier: Apache-2.0
"""Weights for other sizes than they were trained with: another image, patch, number of channels or labels."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import listed
from ..configuration_vit_scratch import ViTScratchConfig
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from ..modeling_vit_scratch import ViTScratchForImageClassification
from ..positions_vit_scratch import resample_positions


def resize_matrix(old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """The matrix that resizes an image bilinearly, pixels row by row, in float64: (new pixels, old pixels)."""
    basis = torch.eye(math.prod(old), dtype=torch.float64).view(-1, 1, *old)
    return F.interpolate(basis, size=new, mode="bilinear", align_corners=False).flatten(1).T


def resize_patch_kernel(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """
    A patch kernel for patches of another size, (D, C, height, width) -> (D, C, new height, new width), by FlexiViT's
    pseudo-inverse (Beyer et al., arXiv:2212.08013, 3.4): a patch that is resized bilinearly gives, where it grows, the
    token that it gave before.
    """
    old = tuple(kernel.shape[2:])
    if old == tuple(size):
        return kernel
    matrix = resize_matrix(old, size)  # B, so that a patch x becomes B x
    change = torch.linalg.pinv(matrix.T)  # of least norm among those with <B x, w'> = <x, w>
    resized = kernel.flatten(2).double() @ change.T
    return resized.unflatten(2, size).to(kernel.dtype)


def adapt_channels(kernel: Tensor, channels: int) -> Tensor:
    """
    A first kernel for another number of channels, (D, C, height, width) -> (D, channels, height, width).

    One channel gets the sum: a gray image gives what it gave as RGB with equal channels. Several are the old ones in
    turn, scaled so that equal channels give what they gave.
    """
    old = kernel.shape[1]
    if old == channels:
        return kernel
    if channels == 1:
        return kernel.double().sum(dim=1, keepdim=True).to(kernel.dtype)
    repeated = kernel.repeat(1, -(-channels // old), 1, 1)[:, :channels]
    return (repeated.double() * (old / channels)).to(kernel.dtype)


def resize_positions(weight: Tensor, old: tuple[int, int], new: tuple[int, int], interpolation: str) -> Tensor:
    """Position embeddings on another grid, (1, P + rows * columns, D); those of P tokens before the patches stay."""
    placed = weight.shape[1] - math.prod(old)
    grid = resample_positions(weight[:, placed:].double().unflatten(1, old), *new, interpolation)
    return torch.cat([weight[:, :placed], grid.flatten(1, 2).to(weight.dtype)], dim=1)


def adapt(
    source: Mapping[str, Tensor], config: ViTScratchConfig, cls: type, arguments: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """
    The state dict for `cls(config, **arguments)`, from a `Checkpoint` of another size; it lacks only what is new and
    can't come from the checkpoint. And a line for each thing done. Raises ValueError if a tensor has another shape than
    the model's and there is no way to adapt it.
    """
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in cls(config, **(arguments or {})).state_dict().items()}
    prefix = "" if any(name.startswith("vit.") for name in wanted) else "vit."
    state, fresh, notes = {}, [], _notes(source.config, config)
    dropped_layer = source.config.representation_size is not None and config.representation_size is None
    has_other_pixels = (source.config.patch_hw, source.config.num_channels) != (config.patch_hw, config.num_channels)
    for name in wanted:
        full, shape = prefix + name, wanted[name]
        is_head = full.startswith(("classifier.", "distillation_classifier."))
        if is_head and (full not in source or config.num_labels != source.config.num_labels or dropped_layer):
            state[name] = torch.zeros(shape, dtype=next((t.dtype for t in state.values()), torch.float32))
        elif full not in source or (full.startswith("decoder.") and has_other_pixels):
            fresh.append(name)
        else:
            state[name] = _fit(full, source[full], shape, source.config, config)
    if issubclass(cls, ViTScratchForImageClassification):
        notes += _head_notes(source, config, state, dropped_layer)
    if fresh:
        notes.append(f"New, initialised at random: {listed(fresh, 6)}.")
    if unused := [name for name in source if name.removeprefix(prefix) not in wanted]:
        notes.append(f"Not used by {cls.__name__}: {listed(unused, 6)}.")
    return state, notes


def _fit(name: str, stored: Tensor, shape: torch.Size, old: ViTScratchConfig, new: ViTScratchConfig) -> Tensor:
    """What differs is seen from the configurations: other grids and patches can have tensors of the same shape."""
    tensor, interpolation = stored, new.position_embedding_interpolation
    if "position" in name and old.grid_hw == new.grid_hw:
        pass
    elif name.endswith("position_embeddings.row_weight"):
        tensor = resample_positions(tensor, new.grid_hw[0], 1, interpolation)
    elif name.endswith("position_embeddings.column_weight"):
        tensor = resample_positions(tensor, 1, new.grid_hw[1], interpolation)
    elif "position_embeddings." in name:
        tensor = resize_positions(tensor, old.grid_hw, new.grid_hw, interpolation)
    elif name.endswith("relative_positions.weight"):
        raise ValueError(
            f"position_embedding='relative_1d' has a table for {_size(old.grid_hw)} patches, which is not adapted to"
            f" {_size(new.grid_hw)}. The model takes images of {_size(new.image_hw)} pixels as it is: leave image_size"
            " and patch_size out."
        )
    elif name.endswith("patch_embeddings.projection.weight"):
        if new.stem_layers is None and old.stem_layers is None:
            tensor = adapt_channels(tensor, new.num_channels)
        tensor = resize_patch_kernel(tensor, tuple(shape[2:]))
    elif name.endswith("stem.root_conv.weight"):
        tensor = adapt_channels(tensor, new.num_channels)
    if tensor.shape != shape:
        raise ValueError(
            f"{name} has the shape {tuple(tensor.shape)} in the checkpoint and {tuple(shape)} in the model, and there"
            " is no way to adapt it. Only image_size, patch_size, num_channels and num_labels can differ, and"
            " representation_size=None takes that layer away."
        )
    # Copied, since a view's strides would make a convolution round otherwise than after saving and loading.
    return stored if tensor is stored else tensor.clone(memory_format=torch.contiguous_format)


def _size(pair: tuple[int, int]) -> str:
    return f"{pair[0]} x {pair[1]}"


def _notes(old: ViTScratchConfig, new: ViTScratchConfig) -> list[str]:
    notes = []
    if old.patch_hw != new.patch_hw:
        sizes = f"{_size(old.patch_hw)} to {_size(new.patch_hw)}"
        notes.append(f"Patch kernel: resized from {sizes} pixels, FlexiViT's pseudo-inverse.")
    if old.num_channels != new.num_channels:
        how = "summed" if new.num_channels == 1 else "repeated in turn and scaled"
        about = " (about the same only: the stem standardises its weights)" if new.stem_layers is not None else ""
        notes.append(f"Input channels: {old.num_channels} to {new.num_channels}, the kernel's {how}{about}.")
    if old.grid_hw != new.grid_hw and new.position_embedding != "none":
        grids = (
            f"grid {_size(old.grid_hw)} to {_size(new.grid_hw)}, images {_size(old.image_hw)} to {_size(new.image_hw)}"
        )
        is_computed = new.position_embedding == "sincos_2d"
        how = "computed for the new grid" if is_computed else f"resampled, {new.position_embedding_interpolation}"
        notes.append(f"Positions: {how}; {grids}.")
    elif old.image_hw != new.image_hw:
        notes.append(
            f"Images: {_size(old.image_hw)} to {_size(new.image_hw)}; the grid of patches stays {_size(old.grid_hw)}."
        )
    if old.representation_size is not None and new.representation_size is None:
        notes.append(f"Representation layer: {old.representation_size} wide in the checkpoint, taken away.")
    return notes


def _head_notes(
    source: Mapping[str, Tensor], config: ViTScratchConfig, state: dict[str, Tensor], dropped: bool
) -> list[str]:
    if "classifier.weight" not in state:
        line = "Classifier: none in the checkpoint, so the model gives features. num_labels=… adds a new one of zeros."
        return [line] if config.num_labels == 0 and "classifier.weight" not in source else []
    labels = source.config.num_labels
    if "classifier.weight" in source and labels == config.num_labels and not dropped:
        if state["classifier.weight"].any():
            return []
        return ["Classifier: all zeros in the checkpoint, so the logits say nothing before training."]
    config.temperature = 1.0  # it was fitted to the old one
    had = f"the checkpoint's has {labels}" if "classifier.weight" in source else "the checkpoint has none"
    hint = " It stands on the representation layer; representation_size=None takes that away, as the paper does (3.1)."
    hint = "" if config.representation_size is None else hint
    return [f"Classifier: new, zeros, {config.num_labels} labels ({had}).{hint}"]


def adapted_processor(
    processor: ViTScratchImageProcessor, old: ViTScratchConfig, new: ViTScratchConfig
) -> ViTScratchImageProcessor:
    """The image processor for a model's new size: the same way of resizing and cropping, to other numbers."""
    settings = processor.to_dict()
    if old.image_hw != new.image_hw:
        height, width = new.image_hw
        crop, size = settings.get("crop_size"), settings.get("size") or {}
        if settings.get("do_center_crop") and crop and size:
            short = size.get("shortest_edge") or size.get("height")
            settings["crop_pct"] = min((crop.get("height") or crop.get("shortest_edge")) / short, 1.0)
            settings.update(do_center_crop=None, crop_size=None)
        settings["size"] = {"height": height, "width": width}
    if old.num_channels != new.num_channels:
        settings["num_channels"] = new.num_channels
        for name in ("image_mean", "image_std"):
            values = settings[name]
            values = list(values) if isinstance(values, (list, tuple)) else [values] * old.num_channels
            mean = sum(values) / len(values)
            repeated = [values[i % len(values)] for i in range(new.num_channels)]
            settings[name] = [mean] if new.num_channels == 1 else repeated
    return type(processor)(**settings)
