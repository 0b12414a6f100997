# SPDX-License-Identifier: Apache-2.0
"""
Attention maps and the similarity of position embeddings, of any Vision Transformer: a Space has this file and models of
any kind.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def attention_maps(
    attentions: Any, grid: tuple[int, int], pools_mean: bool
) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """
    Attention rollout up to each layer, (L, rows, columns), float64; and the weights of every head, (L, A, rows,
    columns), float32, from the weights (1, A, T, T) of each layer. None and None if these are not between all tokens,
    e.g. with windows. `grid`: rows and columns of patches, the last of the T tokens. `pools_mean`: whether the model
    pools by the mean of the patches, and not by the first token.
    """
    num_patches = grid[0] * grid[1]
    if not attentions or any(weights is None for weights in attentions):
        return None, None
    num_tokens = attentions[0].shape[-1]
    prefix = num_tokens - num_patches
    is_global = all((len(layer), *layer.shape[2:]) == (1, num_tokens, num_tokens) for layer in attentions)
    if not is_global or not 0 <= prefix < num_patches + 32:  # the class token and registers, not another grid
        return None, None

    def to_patches(weights: Tensor) -> Tensor:
        rows = weights[..., prefix:, :].mean(dim=-2) if pools_mean or prefix == 0 else weights[..., 0, :]
        return rows[..., prefix:].unflatten(-1, grid)

    heads, rollouts, rollout = [], [], None
    for layer in attentions:
        weights = layer[0].float().cpu()
        weights = weights / weights.sum(dim=-1, keepdim=True)  # half precision rounds them
        heads.append(to_patches(weights))
        rollout = roll_out(weights, rollout)
        rollouts.append(to_patches(rollout))
    return torch.stack(rollouts).numpy(), torch.stack(heads).numpy()


def roll_out(weights: Tensor, before: Tensor | None) -> Tensor:
    """
    Attention rollout (Abnar & Zuidema, arXiv:2005.00928) through one more layer: its weights (..., A, T, T), averaged
    over heads, plus the identity for the residual connection, with rows that sum to 1, times the rollout of the layers
    before, (..., T, T), float64.
    """
    mixing = weights.mean(dim=-3).double()
    mixing = mixing + torch.eye(mixing.shape[-1], dtype=mixing.dtype, device=mixing.device)
    mixing = mixing / mixing.sum(dim=-1, keepdim=True)
    return mixing if before is None else mixing @ before


def position_similarity(model: torch.nn.Module, grid: tuple[int, int]) -> np.ndarray | None:
    """
    Cosine similarity of the position embeddings of patches, (rows, columns, rows, columns), float64, 0 for one of
    zeros; None for a model that has none.
    """
    found = torch.empty(0)
    for name, module in model.named_modules():
        if hasattr(module, "patch_positions"):  # this project's: kinds of embeddings, on any grid
            found = module.patch_positions(*grid, next(model.parameters()).device)[0]
            break
        if name.endswith("embeddings") and isinstance(getattr(module, "position_embeddings", None), torch.nn.Parameter):
            found = module.position_embeddings[0, -grid[0] * grid[1] :]
            break
    if found.ndim != 2 or len(found) != grid[0] * grid[1]:
        return None
    vectors = torch.nn.functional.normalize(found.detach().double().cpu(), dim=-1)
    return (vectors @ vectors.T).clamp(-1, 1).reshape(*grid, *grid).numpy()
