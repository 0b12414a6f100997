# SPDX-License-Identifier: Apache-2.0
"""Figures of the embeddings: principal components of the patch filters, and similarity of position embeddings."""

from dataclasses import dataclass

import numpy as np
import torch

from ..common.errors import InputError
from ..modeling_vit_scratch import ViTScratchPreTrainedModel
from ..page.attention import cosine_similarity
from .photos import encoder


# Figure 7 shows 28: 4 rows of 7.
NUM_COMPONENTS = 28


@dataclass(frozen=True)
class Filters:
    """
    Principal components of the first layer's filters, the strongest first.

    Attributes:
        components: (n, height, width, C), float64, of length 1; the largest entry is positive.
        explained: (n,), fractions of the filters' variance.
        num_filters: number of filters.
    """

    components: np.ndarray
    explained: np.ndarray
    num_filters: int


def patch_filters(model: ViTScratchPreTrainedModel, num_components: int = NUM_COMPONENTS) -> Filters:
    """
    Principal components of the patch embedding's filters (Figure 7, left, of the paper): the rows of E in equation 1,
    less their mean. In a hybrid they are those of the stem's root convolution, standardised as in the forward pass.

    Args:
        model: of this package.
        num_components: the maximum; there are never more than filters, or than pixels times channels.
    """
    embeddings = encoder(model).embeddings.patch_embeddings
    if embeddings.stem is None:
        weight = embeddings.projection.weight.detach().double()
    else:
        weight = embeddings.stem.root_conv.weight.detach().double()
        std, mean = torch.std_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (weight - mean) / (std + 1e-5)
    points = weight.cpu().numpy()  # (D, C, height, width)
    num_filters, *shape = points.shape
    points = points.reshape(num_filters, -1)
    _, strengths, components = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    signs = np.sign(np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1))
    components = (components * signs)[:num_components].reshape(-1, *shape)
    variance = strengths**2
    explained = variance[:num_components] / max(variance.sum(), np.finfo(float).tiny)
    return Filters(components.transpose(0, 2, 3, 1), explained, num_filters)


@torch.no_grad()
def position_similarity(model: ViTScratchPreTrainedModel, grid: tuple[int, int] | None = None) -> np.ndarray:
    """
    Cosine similarity of all pairs of position embeddings (Figure 7, centre, and D.4 of the paper).

    Args:
        model: with `position_embedding` `"learned_1d"`, `"learned_2d"` or `"sincos_2d"`; if positions are added again
            before later layers, those of the stem are taken.
        grid: rows and columns of patches, for which positions are resampled. Default: the stored grid.

    Returns:
        (rows, columns, rows, columns), float64, -1 to 1: `[r, c]` is the map for the patch in row r and column c. 0 for
        an embedding of zeros.

    Raises:
        InputError: if the model has no position embeddings.
    """
    base = encoder(model)
    positions = base.embeddings.position_embeddings
    if positions is None:
        kind = base.config.position_embedding
        why = {
            "none": "it does not know where a patch is",
            "relative_1d": "it embeds distances between patches, inside its attention",
        }[kind]
        raise InputError(
            f"The model has position_embedding={kind!r}: {why}, and there are no position embeddings to compare. "
            "Models with learned_1d, learned_2d or sincos_2d have them."
        )
    rows, columns = base.config.grid_hw if grid is None else grid
    vectors = positions.patch_positions(rows, columns, base.device)[0]  # (N, D)
    return cosine_similarity(vectors, (rows, columns)).numpy()
