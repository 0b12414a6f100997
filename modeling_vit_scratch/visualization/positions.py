# SPDX-License-Identifier: Apache-2.0
"""What the network knows of places: which position embeddings are alike (Figure 7, centre, and D.4 of the paper)."""

import numpy as np
import torch

from ..common.errors import InputError
from ..modeling_vit_scratch import ViTScratchPreTrainedModel
from ..page.attention import cosine_similarity
from .photos import encoder


@torch.no_grad()
def position_similarity(model: ViTScratchPreTrainedModel, grid: tuple[int, int] | None = None) -> np.ndarray:
    """
    Cosine similarity of each patch's position embedding with every other's.

    Args:
        model: with `position_embedding` `"learned_1d"`, `"learned_2d"` or `"sincos_2d"`; where positions enter again
            before later layers, those of the stem are taken.
        grid: rows and columns of patches, for which the model resamples its positions. Default: the stored grid.

    Returns:
        (rows, columns, rows, columns), float64, -1 to 1: `[r, c]` is the map for the patch in row r and column c. An
        embedding of nothing but zeros is like no other: 0.

    Raises:
        InputError: if the model has no embedding of places.
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
            f"The model has position_embedding={kind!r}: {why}, and there are no embeddings of places to compare. "
            "Models with learned_1d, learned_2d or sincos_2d have them."
        )
    rows, columns = base.config.grid_hw if grid is None else grid
    vectors = positions.patch_positions(rows, columns, base.device)[0]  # (N, D)
    return cosine_similarity(vectors, (rows, columns)).numpy()
