# SPDX-License-Identifier: Apache-2.0
"""
The attention of a model: weights of every head, their mean distance, and rollout through all layers.

The weights are exact under every attention implementation: hooks make each layer compute them with eager attention.
They are processed layer by layer, so that those of one layer are in memory at a time. Half precision rounds weights so
that rows no longer sum to 1: rows are divided by their sum, in float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..modeling_vit_scratch import ViTScratchPreTrainedModel
from ..page.attention import roll_out
from .photos import encoder, evaluating


@torch.no_grad()
def watch_attention(
    model: ViTScratchPreTrainedModel, pixel_values: Tensor, callback: Callable[[int, Tensor], None]
) -> tuple[int, int]:
    """
    Runs the encoder in evaluation mode, and passes on the attention weights of one layer after the other.

    Args:
        model: of this package.
        pixel_values: (B, C, H, W), from the image processor.
        callback: gets the layer's index, from 0, and its weights (B, A, T, T), float32, with rows that sum to 1.

    Returns:
        Rows and columns of patches.
    """
    base = encoder(model)

    def ask(module: nn.Module, arguments: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return arguments, {**kwargs, "output_attentions": True}

    def pass_on(index: int, module: nn.Module, arguments: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        attended, weights = output
        weights = weights.float()
        callback(index, weights / weights.sum(dim=-1, keepdim=True))
        return attended, None  # frees the weights before those of the next layer

    handles = []
    try:
        for index, layer in enumerate(base.layers):
            handles.append(layer.attention.register_forward_pre_hook(ask, with_kwargs=True))
            handles.append(layer.attention.register_forward_hook(partial(pass_on, index)))
        with evaluating(model):
            base(pixel_values.to(base.device), output_attentions=False, output_hidden_states=False)
    finally:
        for handle in handles:
            handle.remove()
    return base.embeddings.patch_embeddings.grid(pixel_values)


def pooled_rows(weights: Tensor, num_prefix_tokens: int, pooling: str) -> Tensor:
    """
    The attention to patches of the tokens that are pooled, (B, ..., T, T) -> (B, ..., N): the class token's row or,
    with mean pooling, the mean of the patches' rows.
    """
    rows = weights[..., 0, :] if pooling == "cls" else weights[..., num_prefix_tokens:, :].mean(dim=-2)
    return rows[..., num_prefix_tokens:]


def head_maps(model: ViTScratchPreTrainedModel, pixel_values: Tensor) -> np.ndarray:
    """
    The attention of every head of every layer to the patches: of the class token or, with mean pooling, the mean over
    the patches that attend.

    Args:
        model, pixel_values: as in `watch_attention`.

    Returns:
        (B, L, A, rows, columns), float32. The rest of the sum 1 goes to class token, distillation token and registers.
    """
    config, maps = encoder(model).config, []

    def keep(index: int, weights: Tensor) -> None:
        maps.append(pooled_rows(weights, config.num_prefix_tokens, config.pooling).cpu())

    grid = watch_attention(model, pixel_values, keep)
    return torch.stack(maps, dim=1).unflatten(-1, grid).numpy()


def patch_distances(grid: tuple[int, int], patch: tuple[int, int]) -> np.ndarray:
    """Distances between the centres of all patches in pixels, (N, N), float64; patches row by row."""
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return np.hypot(np.subtract.outer(y, y) * patch[0], np.subtract.outer(x, x) * patch[1])


def mean_distance(weights: Tensor, distances: Tensor, num_prefix_tokens: int) -> Tensor:
    """
    Mean attention distance, (B, A, T, T) weights and (N, N) distances -> (B, A). Only attention between patches counts,
    with rows divided by their sum; a patch that attends to no patch counts as 0.
    """
    weights = weights[..., num_prefix_tokens:, num_prefix_tokens:]
    means = torch.einsum("baqk,qk->baq", weights, distances.to(weights))
    return (means / weights.sum(dim=-1).clamp(min=torch.finfo(weights.dtype).tiny)).mean(dim=-1)


def attention_distances(model: ViTScratchPreTrainedModel, pixel_values: Tensor) -> np.ndarray:
    """
    Mean attention distance of every head (the paper, D.7): the distance in pixels between a patch and all patches,
    weighted by its attention, averaged over patches. Figures 7 and 11 average it over 128 images.

    The paper's authors don't divide rows by their sum after leaving out the class token (issue 162 of
    google-research/vision_transformer): their values are smaller where heads attend to it.

    Args:
        model, pixel_values: as in `watch_attention`.

    Returns:
        (B, L, A), float32, in pixels of the input.
    """
    config, found = encoder(model).config, []
    grid = encoder(model).embeddings.patch_embeddings.grid(pixel_values)
    distances = torch.from_numpy(patch_distances(grid, config.patch_hw))

    def measure(index: int, weights: Tensor) -> None:
        found.append(mean_distance(weights, distances, config.num_prefix_tokens).cpu())

    watch_attention(model, pixel_values, measure)
    return torch.stack(found, dim=1).numpy()


def attention_rollout(model: ViTScratchPreTrainedModel, pixel_values: Tensor) -> np.ndarray:
    """
    Attention rollout (Abnar & Zuidema, arXiv:2005.00928; the paper, D.8) through all layers, over all tokens: see
    `page.attention.roll_out`.

    Args:
        model, pixel_values: as in `watch_attention`.

    Returns:
        (B, T, T), float64: row t says how much of each input token is in output token t, and sums to 1.
    """
    rollout: Tensor | None = None

    def multiply(index: int, weights: Tensor) -> None:
        nonlocal rollout
        rollout = roll_out(weights, rollout)

    watch_attention(model, pixel_values, multiply)
    return rollout.cpu().numpy()


def rollout_maps(model: ViTScratchPreTrainedModel, pixel_values: Tensor) -> np.ndarray:
    """
    How much of each patch is in the pooled tokens, by `attention_rollout`: Figures 6 and 14 of the paper.

    Args:
        model, pixel_values: as in `watch_attention`.

    Returns:
        (B, rows, columns), float64. The rest of the sum 1 comes from the tokens before the patches.
    """
    config = encoder(model).config
    rollout = torch.from_numpy(attention_rollout(model, pixel_values))
    maps = pooled_rows(rollout, config.num_prefix_tokens, config.pooling)
    return maps.unflatten(-1, encoder(model).embeddings.patch_embeddings.grid(pixel_values)).numpy()
