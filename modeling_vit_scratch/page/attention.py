# SPDX-License-Identifier: Apache-2.0
"""
Where any Vision Transformer looks, from the attention weights that it gives.

`visualization/attention.py` watches the layers of this package's models; a Space has models only, of whatever kind.
"""

from typing import Any

import torch
from torch import Tensor


def attention_maps(attentions: Any, grid: tuple[int, int], pools_mean: bool = False) -> tuple[Tensor, Tensor] | None:
    """
    Maps over the patches of one image, for each layer.

    Args:
        attentions: of the model's output: for each layer the weights (1, A, T, T).
        grid: rows and columns of patches, the last of the T tokens.
        pools_mean: whether the image is represented by the mean of its patches; if not, by the first token. Without
            tokens before the patches it is.

    Returns:
        Attention rollout (Abnar & Zuidema, arXiv:2005.00928) through the first layers up to each, (L, rows, columns),
        float64; and the weights of every head, (L, A, rows, columns), float32. None if these are no weights between all
        tokens of an image, as with windows or convolutions.
    """
    num_patches = grid[0] * grid[1]
    if not attentions or any(weights is None or weights.ndim != 4 for weights in attentions):
        return None
    num_tokens = attentions[0].shape[-1]
    if any(weights.shape[0] != 1 or weights.shape[2:] != (num_tokens, num_tokens) for weights in attentions):
        return None
    prefix = num_tokens - num_patches
    if not 0 <= prefix < num_patches + 32:  # the class token and registers, not another grid
        return None

    def to_patches(weights: Tensor) -> Tensor:
        rows = weights[..., prefix:, :].mean(dim=-2) if pools_mean or prefix == 0 else weights[..., 0, :]
        return rows[..., prefix:].unflatten(-1, grid)

    heads, rollouts, rollout = [], [], torch.eye(num_tokens, dtype=torch.float64)
    for layer in attentions:
        weights = layer[0].float().cpu()
        weights = weights / weights.sum(dim=-1, keepdim=True)  # half precision rounds them
        heads.append(to_patches(weights))
        # Half of each token stays by the residual connection.
        rollout = (weights.mean(dim=0).double() @ rollout + rollout) / 2
        rollouts.append(to_patches(rollout))
    return torch.stack(rollouts), torch.stack(heads)


@torch.no_grad()
def position_similarity(model: torch.nn.Module, grid: tuple[int, int]) -> Tensor | None:
    """
    How alike the position embeddings of patches are: cosines (rows, columns, rows, columns), float64. None for a model
    that has no embedding of each place.
    """
    found = None
    for name, module in model.named_modules():
        if hasattr(module, "patch_positions"):  # this project's: kinds of embeddings, on any grid
            found = module.patch_positions(*grid, next(model.parameters()).device)[0]
            break
        if name.endswith("embeddings") and isinstance(getattr(module, "position_embeddings", None), torch.nn.Parameter):
            found = module.position_embeddings[0, -grid[0] * grid[1] :]
            break
    if found is None or found.ndim != 2 or len(found) != grid[0] * grid[1]:
        return None
    vectors = torch.nn.functional.normalize(found.double().cpu(), dim=-1)
    return (vectors @ vectors.T).clamp(-1, 1).reshape(*grid, *grid)
