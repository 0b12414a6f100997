# SPDX-License-Identifier: Apache-2.0
"""
Where the network looks: attention of every head, its mean distance, and its way through all layers.

The weights are the true ones under every attention implementation: while they are watched, each layer computes them
with eager attention. They are taken layer by layer, and only what is asked for is kept. Half precision rounds weights,
so that their rows no longer sum to 1: rows are divided by their sum, in float32.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..modeling_vit_scratch import ViTScratchPreTrainedModel
from ..page.attention import roll_out
from .photos import encoder, evaluating


@torch.no_grad()
def watch_attention(
    model: ViTScratchPreTrainedModel, pixel_values: Tensor, look: Callable[[int, Tensor], None]
) -> tuple[int, int]:
    """
    Runs the encoder, without dropout, and shows the attention weights of one layer after the other.

    Args:
        model: of this package.
        pixel_values: (B, C, H, W), as the image processor makes them.
        look: gets the layer's index, from 0, and its weights (B, A, T, T), float32, rows that sum to 1.

    Returns:
        Rows and columns of patches.
    """
    base = encoder(model)

    def ask(module: nn.Module, arguments: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return arguments, {**kwargs, "output_attentions": True}

    def show(index: int) -> Callable:
        def hook(module: nn.Module, arguments: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
            attended, weights = output
            weights = weights.float()
            look(index, weights / weights.sum(dim=-1, keepdim=True))
            return attended, None  # so that the weights of one layer are gone before the next one's

        return hook

    handles = []
    try:
        for index, layer in enumerate(base.layers):
            handles.append(layer.attention.register_forward_pre_hook(ask, with_kwargs=True))
            handles.append(layer.attention.register_forward_hook(show(index)))
        with evaluating(model):
            base(pixel_values.to(base.device), output_attentions=False, output_hidden_states=False)
    finally:
        for handle in handles:
            handle.remove()
    return base.embeddings.patch_embeddings.grid(pixel_values)


def looking_rows(weights: Tensor, num_prefix_tokens: int, pooling: str) -> Tensor:
    """
    How the tokens that represent the image look at the patches, (B, ..., T, T) -> (B, ..., N): the class token's row
    or, in a model that pools by the mean, the mean of the patches' rows.
    """
    rows = weights[..., 0, :] if pooling == "cls" else weights[..., num_prefix_tokens:, :].mean(dim=-2)
    return rows[..., num_prefix_tokens:]


def head_maps(model: ViTScratchPreTrainedModel, pixel_values: Tensor) -> np.ndarray:
    """
    The attention of every head of every layer to the patches: of the class token, or, in a model that pools by the
    mean, the mean over the patches that look.

    Args:
        model, pixel_values: as in `watch_attention`.

    Returns:
        (B, L, A, rows, columns), float32. What a map lacks of the sum 1 goes to class token, distillation token and
        registers.
    """
    config, maps = encoder(model).config, []

    def look(index: int, weights: Tensor) -> None:
        maps.append(looking_rows(weights, config.num_prefix_tokens, config.pooling).cpu())

    rows, columns = watch_attention(model, pixel_values, look)
    return torch.stack(maps, dim=1).unflatten(-1, (rows, columns)).numpy()


def patch_distances(grid: tuple[int, int], patch: tuple[int, int]) -> np.ndarray:
    """Pixels from the centre of each patch to that of each other, (N, N), float64, patches row by row."""
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return np.hypot(np.subtract.outer(y, y) * patch[0], np.subtract.outer(x, x) * patch[1])


def mean_distance(weights: Tensor, distances: Tensor, num_prefix_tokens: int) -> Tensor:
    """
    Mean distance of what patches attend to, (B, A, T, T) weights and (N, N) distances -> (B, A).

    Only attention from patches to patches has a distance: rows and columns of the tokens before them are left out, and
    what is left of each row is divided by its sum. A patch that attends to no patch at all counts as 0.
    """
    weights = weights[..., num_prefix_tokens:, num_prefix_tokens:]
    reach = torch.einsum("baqk,qk->baq", weights, distances.to(weights))
    return (reach / weights.sum(dim=-1).clamp(min=torch.finfo(weights.dtype).tiny)).mean(dim=-1)


def attention_distances(model: ViTScratchPreTrainedModel, pixel_values: Tensor) -> np.ndarray:
    """
    Mean attention distance of every head (the paper, D.7): the distance in pixels between a patch that looks and all
    patches, weighted by attention, averaged over the patches that look. Figures 7 and 11 average it over 128 images.

    The paper's authors leave out the class token's row and column as here, but don't divide what is left by its sum
    (google-research/vision_transformer, issue 162): their values are smaller where heads attend to the class token.

    Args:
        model, pixel_values: as in `watch_attention`.

    Returns:
        (B, L, A), float32, in pixels of the input.
    """
    config, found = encoder(model).config, []
    grid = encoder(model).embeddings.patch_embeddings.grid(pixel_values)
    distances = torch.from_numpy(patch_distances(grid, config.patch_hw))

    def look(index: int, weights: Tensor) -> None:
        found.append(mean_distance(weights, distances, config.num_prefix_tokens).cpu())

    watch_attention(model, pixel_values, look)
    return torch.stack(found, dim=1).numpy()


def attention_rollout(model: ViTScratchPreTrainedModel, pixel_values: Tensor) -> np.ndarray:
    """
    Attention rollout (Abnar & Zuidema, arXiv:2005.00928; the paper, D.8): the weights of a layer, averaged over its
    heads, plus the identity for the residual connection, with rows that sum to 1 again; multiplied over all layers.

    Every token takes part, class token, distillation token and registers too: what flows through them is counted.

    Args:
        model, pixel_values: as in `watch_attention`.

    Returns:
        (B, T, T), float64: row t says how much of each input token is in output token t, and sums to 1.
    """
    rollout: Tensor | None = None

    def look(index: int, weights: Tensor) -> None:
        nonlocal rollout
        rollout = roll_out(weights, rollout)

    watch_attention(model, pixel_values, look)
    return rollout.cpu().numpy()


def rollout_maps(model: ViTScratchPreTrainedModel, pixel_values: Tensor) -> np.ndarray:
    """
    How much of each patch is in what represents the image, by `attention_rollout`: Figures 6 and 14 of the paper.

    Args:
        model, pixel_values: as in `watch_attention`.

    Returns:
        (B, rows, columns), float64: the class token's row of the rollout or, in a model that pools by the mean, the
        mean of the patches' rows. What a map lacks of the sum 1 comes from the tokens before the patches.
    """
    config = encoder(model).config
    rollout = torch.from_numpy(attention_rollout(model, pixel_values))
    maps = looking_rows(rollout, config.num_prefix_tokens, config.pooling)
    return maps.unflatten(-1, encoder(model).embeddings.patch_embeddings.grid(pixel_values)).numpy()
