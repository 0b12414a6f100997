# SPDX-License-Identifier: Apache-2.0
"""
Which patches are hidden in pretraining. Masks depend on (seed, epoch, index) alone, whatever the number of workers,
processes or accumulated batches. They are drawn for batches, since the size of a mask is that of its image.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.collation import ImageCollator


# Keeps these random numbers apart from others with the same seed and epoch.
_STREAM = 0x6D61736B

# From rows and columns of patches and a generator to the arrays that an objective takes, without the batch dimension.
DrawMask = Callable[[int, int, np.random.Generator], dict[str, np.ndarray]]


def corrupted_patches(ratio: float = 0.5, replaced: float = 0.8, swapped: float = 0.1) -> DrawMask:
    """
    The paper's B.1.2: half of the patch embeddings are corrupted. Of these 80 % become the mask token, 10 % the
    embedding of another random patch of the image, and 10 % stay as they are.

    Draws `corrupted`, `replaced` (N,) bool, and `source` (N,) int64: the patch whose embedding each patch gets.
    """

    def draw(rows: int, columns: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
        patches = rows * columns
        corrupted = np.zeros(patches, bool)
        corrupted[generator.permutation(patches)[: min(max(round(ratio * patches), 1), patches)]] = True
        fate, distance = generator.random(patches), generator.integers(1, max(patches, 2), patches)
        is_swapped = corrupted & (fate >= replaced) & (fate < replaced + swapped)
        itself = np.arange(patches)
        source = np.where(is_swapped, (itself + distance) % patches, itself)
        return {"corrupted": corrupted, "replaced": corrupted & (fate < replaced), "source": source}

    return draw


def masked_squares(ratio: float, square: int, patch: tuple[int, int]) -> DrawMask:
    """
    SimMIM (Xie et al., arXiv:2111.09886, and its code): masks this fraction, rounded up, of squares of pixels.

    Draws `bool_masked_pos` (N,). Where squares don't fill the image, the last ones are cut. Raises ValueError if the
    patch, (height, width) in pixels, does not divide the square.
    """
    if square % patch[0] or square % patch[1]:
        raise ValueError(
            f"Masked squares of {square} pixels are not made of whole patches of {patch[0]} x {patch[1]}. "
            f"Give a multiple of {math.lcm(*patch)}."
        )
    height, width = square // patch[0], square // patch[1]

    def draw(rows: int, columns: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
        shape = (-(-rows // height), -(-columns // width))
        squares = np.zeros(math.prod(shape), bool)
        squares[generator.permutation(squares.size)[: min(math.ceil(squares.size * ratio), squares.size)]] = True
        mask = squares.reshape(shape).repeat(height, axis=0).repeat(width, axis=1)[:rows, :columns]
        return {"bool_masked_pos": mask.flatten()}

    return draw


def visible_patches(ratio: float) -> DrawMask:
    """
    MAE (He et al., arXiv:2111.06377): hides this fraction of the patches. Draws `visible` (V,) int64, the patches that
    stay, in ascending order.
    """

    def draw(rows: int, columns: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
        kept = max(int(rows * columns * (1 - ratio)), 1)
        return {"visible": np.sort(generator.permutation(rows * columns)[:kept])}

    return draw


class MaskingCollator(ImageCollator):
    """Batches with a mask for each image, from one of the functions above; `patch` is (height, width) in pixels."""

    def __init__(self, draw: DrawMask, patch: tuple[int, int], description: str) -> None:
        self.draw, self.patch, self.description = draw, patch, description

    def __call__(self, examples: list[dict[str, Any]] | dict[str, Tensor]) -> dict[str, Tensor]:
        """As `ImageCollator`, with masks (B, ...). All examples, also held-out ones, need a "key"."""
        batch = super().__call__(examples)
        height, width = batch["pixel_values"].shape[-2:]
        grid = height // self.patch[0], width // self.patch[1]
        masks = [self.draw(*grid, np.random.default_rng((_STREAM, *key))) for key in batch["keys"].tolist()]
        return batch | {name: torch.from_numpy(np.stack([mask[name] for mask in masks])) for name in masks[0]}
