# SPDX-License-Identifier: Apache-2.0
# modeling_vit_scratch 0.2.0
"""
Parts that the paper's network lacks and later ones have; `encoder_vit_scratch.py` puts them in where the configuration
says so. Shapes are those of its legend.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_vit_scratch import ViTScratchConfig


def normalization(config: ViTScratchConfig, width: int | None = None) -> nn.Module:
    """The layer that `config.norm_type` names, by default for tokens."""
    kind = nn.RMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return kind(width or config.hidden_size, eps=config.layer_norm_eps)


class ViTScratchQueryValueBias(nn.Linear):
    """The projection of equation 5 with a bias (2 D,) for queries and values: DINOv3's keys have none."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width, bias=False)
        self.bias = nn.Parameter(torch.empty(2 * width))

    def forward(self, hidden_states: Tensor) -> Tensor:
        query, value = self.bias.chunk(2)
        return F.linear(hidden_states, self.weight, torch.cat([query, torch.zeros_like(query), value]))


class ViTScratchGatedMLP(nn.Module):
    """An MLP whose activated branch scales the other (Shazeer, arXiv:2002.05202); both are in `fc1`, the gate first."""

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        gate, value = self.fc1(hidden_states).chunk(2, dim=-1)
        return self.dropout(self.fc2(self.dropout(self.activation(gate) * value)))


class ViTScratchLayerScale(nn.Module):
    """A learned scale for every channel of a residual branch (Touvron et al., arXiv:2103.17239)."""

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__()
        self.init_value = config.layer_scale_init_value
        self.weight = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.weight.to(hidden_states.dtype)


class ViTScratchDropPath(nn.Module):
    """Leaves out a residual branch for a random part of the images (Huang et al., arXiv:1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return hidden_states
        keep = hidden_states.new_empty(hidden_states.shape[0], 1, 1).bernoulli_(1.0 - self.rate)
        return hidden_states * keep / (1.0 - self.rate)


class ViTScratchAttentionPooling(nn.Module):
    """A learned query attends to the patches, and an MLP follows (Zhai et al., arXiv:2106.04560, 3.4)."""

    def __init__(self, config: ViTScratchConfig, mlp: nn.Module) -> None:
        super().__init__()
        self.heads, width = config.num_attention_heads, config.hidden_size
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layernorm, self.mlp = normalization(config), mlp

    def forward(self, patches: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, N, D), and zero in the mask (B, N) for patches that are not attended to -> (B, D)"""
        query, _, _ = self.qkv(self.probe).chunk(3, dim=-1)
        _, key, value = self.qkv(patches).chunk(3, dim=-1)
        query = query.expand(patches.shape[0], -1, -1)
        heads = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))  # (B, A, ., E)
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        attended = F.scaled_dot_product_attention(*heads, attn_mask=mask)  # (B, A, 1, E)
        pooled = self.proj(attended.flatten(1))  # (B, D)
        return pooled + self.mlp(self.layernorm(pooled))
