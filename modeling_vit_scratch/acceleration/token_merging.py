# SPDX-License-Identifier: Apache-2.0
"""
Token Merging (Bolya et al., arXiv:2210.09461): every layer joins the tokens that are most alike, so that the next ones
have less to compute. Without training; each token counts in attention for as many as it stands for.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..encoder_vit_scratch import ViTScratchLayer
from ..modeling_vit_scratch import ViTScratchModel, ViTScratchPreTrainedModel


class _Groups:
    """
    What the tokens of a pass stand for.

    Attributes:
        size: (B, T), how many tokens of the image each one is the mean of.
        token: (B, T of the image), which one each token of the image has become part of.
    """

    def __init__(self, hidden_states: Tensor) -> None:
        batch, tokens, _ = hidden_states.shape
        self.size = hidden_states.new_ones(batch, tokens)
        self.token = torch.arange(tokens, device=hidden_states.device).expand(batch, -1)

    def merge(self, hidden_states: Tensor, target: Tensor, remaining: int) -> Tensor:
        """The means of the groups: (B, T, D) -> (B, remaining, D). `target` (B, T) says where each token goes."""
        batch, _, width = hidden_states.shape
        total = hidden_states.new_zeros(batch, remaining, width)
        total = total.scatter_add(1, target[..., None].expand(-1, -1, width), hidden_states * self.size[..., None])
        self.size = self.size.new_zeros(batch, remaining).scatter_add(1, target, self.size)
        self.token = target.gather(1, self.token)
        return total / self.size[..., None]

    def restore(self, hidden_states: Tensor) -> Tensor:
        """Gives every token of the image what its group has: (B, T, D) -> (B, T of the image, D)."""
        return hidden_states.gather(1, self.token[..., None].expand(-1, -1, hidden_states.shape[-1]))


def merge_tokens(model: ViTScratchPreTrainedModel, tokens_per_layer: int) -> None:
    """
    Changes a model in place, until this is called again: with 0, it is what it was.

    Everything that the model returns keeps its shape: after the last layer, tokens that were joined have the same
    values. The class token, the distillation token and registers stay alone.

    Args:
        model: of any kind here, with position embeddings in the stem or none.
        tokens_per_layer: r of the paper, how many tokens go in every layer but the last, as far as there are pairs.

    Raises:
        ValueError: for a negative number, relative positions, or positions before every layer.
    """
    encoder = model if isinstance(model, ViTScratchModel) else model.vit
    config = model.config
    if tokens_per_layer < 0:
        raise ValueError(f"tokens_per_layer={tokens_per_layer} must be at least 0.")
    is_placed_again = config.position_embedding_placement != "stem"
    if tokens_per_layer and (config.position_embedding == "relative_1d" or is_placed_again):
        raise ValueError(
            "Tokens that stand for several places have no position of their own: they can't be merged with "
            f"position_embedding={config.position_embedding!r}, placement {config.position_embedding_placement!r}."
        )
    state: dict[str, _Groups] = {}
    for index, layer in enumerate(encoder.layers):
        layer.__dict__.pop("forward", None)
        if tokens_per_layer:
            is_last = index == len(encoder.layers) - 1
            count = 0 if is_last else tokens_per_layer
            layer.forward = partial(_forward, layer, state, index == 0, is_last, count)


def _forward(
    layer: ViTScratchLayer, state: dict[str, _Groups], is_first: bool, is_last: bool, count: int,
    hidden_states: Tensor, attention_mask: Any, grid: tuple[int, int], num_queries: int | None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """`ViTScratchLayer.forward` with proportional attention (the paper's equation 1), and a merge before the MLP."""
    if attention_mask is not None or kwargs.get("output_attentions"):
        raise ValueError("Merged tokens have neither masks nor attention weights: merge_tokens(model, 0) undoes it.")
    groups = state["groups"] = _Groups(hidden_states) if is_first else state["groups"]
    attention = layer.attention
    query, key, value = attention.project(layer.layernorm_before(hidden_states), num_queries)
    query, key = attention.q_norm(query), attention.k_norm(key)
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=None if is_first else groups.size.log()[:, None, None],
        dropout_p=attention.attention_dropout if attention.training else 0.0, scale=attention.scaling,
    )  # fmt: skip
    attended = attention.dropout(attention.proj(attended.transpose(1, 2).flatten(2)))
    hidden_states = hidden_states[:, :num_queries] + layer.drop_path(layer.layer_scale_attention(attended))
    target, remaining = match(key.mean(dim=1), count, attention.config.num_prefix_tokens)
    if remaining < hidden_states.shape[1] and num_queries is None:
        hidden_states = groups.merge(hidden_states, target, remaining)
    transformed = layer.mlp(layer.layernorm_after(hidden_states))
    hidden_states = hidden_states + layer.drop_path(layer.layer_scale_mlp(transformed))
    return groups.restore(hidden_states) if is_last and num_queries is None else hidden_states


def match(keys: Tensor, count: int, num_prefix_tokens: int) -> tuple[Tensor, int]:
    """
    Bipartite soft matching, 3.1 of the paper: of the tokens at even places each names the one at an odd place whose key
    is most like its own (cosine), and the `count` pairs that are most alike are joined.

    Args:
        keys: (B, T, E), the mean of the heads.
        count: pairs to join, no more than there are patches at even places.
        num_prefix_tokens: tokens at the beginning that stay alone.

    Returns:
        Where each token goes, (B, T), in the order that the tokens had; and how many there are then.
    """
    batch, tokens = keys.shape[:2]
    even = torch.arange(0, tokens, 2, device=keys.device)
    partners = int((torch.arange(1, tokens, 2) >= num_prefix_tokens).sum())
    count = min(count, int((even >= num_prefix_tokens).sum()) if partners else 0)
    if not count:
        return torch.arange(tokens, device=keys.device).expand(batch, -1), tokens
    keys = F.normalize(keys, dim=-1)
    alike = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)  # (B, even places, odd places)
    alike[:, : (num_prefix_tokens + 1) // 2] = -torch.inf
    alike[:, :, : num_prefix_tokens // 2] = -torch.inf
    best, partner = alike.max(dim=-1)
    joined = best.argsort(dim=-1, descending=True, stable=True)[:, :count]  # (B, count), indices of even places
    stays = torch.ones(batch, tokens, dtype=torch.bool, device=keys.device).scatter(1, 2 * joined, False)
    target = stays.long().cumsum(dim=1) - 1
    partner = 2 * partner.gather(1, joined) + 1
    return target.scatter(1, 2 * joined, target.gather(1, partner)), tokens - count
