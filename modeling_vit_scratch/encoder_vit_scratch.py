# SPDX-License-Identifier: Apache-2.0
"""
The Vision Transformer, from pixels to logits: read from top to bottom.

"The paper" is Dosovitskiy et al., An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale, ICLR 2021
(arXiv:2010.11929v2); its code is github.com/google-research/vision_transformer. The interface is that of transformers'
ViT, on whose structure this file leans, as on timm's.

Shapes, written where the rank changes:

    B images         C, H, W channels, height, width of an image in pixels
    N patches        rows, columns: the grid of patches, N = rows * columns
    T tokens         class token (if any), registers (if any), then the N patches row by row
    D width          A heads, E = D / A width of a head, Q queries: T, or 1 for the class token alone
    K labels
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_vit_scratch import ViTScratchConfig
from .positions_vit_scratch import ViTScratchPositionEmbeddings, ViTScratchRelativePositions
from .stem_vit_scratch import ViTScratchStem


# Pixels to tokens: equation 1 -----------------------------------------------------------------------------------------


GELUS = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}  # by torch's names: the exact one, and that of the paper's code
PLAIN = (nn.Linear, nn.Conv2d, *(type(ACT2FN[name]) for name in GELUS))


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is what it was built as: no adapter, quantisation or hook that going around it would miss."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook")
    return (type(layer) in PLAIN or getattr(layer, "is_plain", False)) and not hooked


class ViTScratchPatchEmbeddings(nn.Module):
    """Cuts the image, or what the stem makes of it, into patches and maps each to a token: x_p E of equation 1."""

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__()
        self.num_channels, self.patch = config.num_channels, config.patch_hw
        self.stem = None if config.stem_layers is None else ViTScratchStem(config)
        channels = self.num_channels if self.stem is None else self.stem.out_channels
        kernel = (self.patch[0] // config.stem_stride, self.patch[1] // config.stem_stride)
        self.projection = nn.Conv2d(channels, config.hidden_size, kernel_size=kernel, stride=kernel)

    def grid(self, pixel_values: Tensor) -> tuple[int, int]:
        """Rows and columns of patches. Raises ValueError for an image that the patch does not divide."""
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != self.num_channels:
            wanted = f"(batch, {self.num_channels} channels, height, width)"
            raise ValueError(
                f"pixel_values must have the shape {wanted}, got {shape}. The image processor makes it so."
            )
        for side, size, patch in zip(("height", "width"), shape[2:], self.patch):
            if size % patch or size < patch:
                fits = " or ".join(str(n) for n in (size // patch * patch, -(-size // patch) * patch) if n)
                raise ValueError(
                    f"Patches of {patch} don't divide the image {side} {size}. Resize or pad it to {fits}."
                )
        return shape[2] // self.patch[0], shape[3] // self.patch[1]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)"""
        pixels = pixel_values if self.stem is None else self.stem(pixel_values)
        if not is_plain(self.projection):
            return self.projection(pixels).flatten(2).transpose(1, 2)  # (B, D, rows, columns) -> (B, N, D)
        # A convolution whose stride is its kernel is a dense layer on every patch, and a product of matrices needs none
        # of the other layouts of images that libraries for convolutions copy to.
        height, width = self.projection.kernel_size
        patches = pixels.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, C, rows, height, columns, width)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C * height * width)
        return F.linear(patches, self.projection.weight.flatten(1), self.projection.bias)


class ViTScratchEmbeddings(nn.Module):
    """Equation 1: z_0 = [x_class; x_p E] + E_pos, with distillation token and registers after the class token."""

    def __init__(self, config: ViTScratchConfig, use_mask_token: bool = False) -> None:
        super().__init__()
        width, registers = config.hidden_size, config.num_register_tokens
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if config.use_cls_token else None
        self.distillation_token = nn.Parameter(torch.empty(1, 1, width)) if config.use_distillation_token else None
        self.register_tokens = nn.Parameter(torch.empty(1, registers, width)) if registers else None
        self.mask_token = nn.Parameter(torch.empty(1, 1, width)) if use_mask_token or config.use_mask_token else None
        self.patch_embeddings = ViTScratchPatchEmbeddings(config)
        has_positions = config.position_embedding not in ("none", "relative_1d")
        self.position_embeddings = ViTScratchPositionEmbeddings(config) if has_positions else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, T, D)"""
        tokens = self.patch_embeddings(pixel_values)  # (B, N, D)
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise ValueError("bool_masked_pos needs a mask token: build the model with use_mask_token=True.")
            wanted, got = tuple(tokens.shape[:2]), tuple(bool_masked_pos.flatten(1).shape)
            if wanted != got:
                raise ValueError(f"bool_masked_pos must have the shape (batch, patches) = {wanted}, got {got}.")
            mask_token = self.mask_token.to(tokens.dtype)
            tokens = torch.where(bool_masked_pos.flatten(1)[..., None].bool(), mask_token, tokens)
        # Under autocast the patches are in half precision, and so is the sum of all branches, as in the authors'
        # big_vision with dtype_mm; one token in float32 would make it float32, with twice the bytes in every layer.
        prefix = (self.cls_token, self.distillation_token, self.register_tokens)
        prefix = [token.to(tokens.dtype) for token in prefix if token is not None]
        tokens = torch.cat([*(token.expand(tokens.shape[0], -1, -1) for token in prefix), tokens], dim=1)  # (B, T, D)
        if self.position_embeddings is not None:
            tokens = self.position_embeddings(tokens, *self.patch_embeddings.grid(pixel_values))
        return self.dropout(tokens)


# The encoder: equations 2 and 3 ---------------------------------------------------------------------------------------


def dense(
    inputs: int, outputs: int, bias: bool = True, kernel_init: Callable | None = None, bias_std: float = 0.0,
    bias_mean: float = 0.0,
) -> nn.Linear:  # fmt: skip
    """A linear layer that remembers its initialisation, xavier by default: transformers asks layers, not names."""
    layer = nn.Linear(inputs, outputs, bias)
    layer.kernel_init, layer.bias_std, layer.bias_mean = kernel_init or init.xavier_uniform_, bias_std, bias_mean
    return layer


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    dropout: float = 0.0, position_bias: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(q k^T / sqrt(E)) v, equations 6 and 7, spelled out: the one implementation with weights to show."""
    scores = query @ key.transpose(2, 3) * scaling  # (B, A, Q, T)
    for bias in (position_bias, attention_mask):
        scores = scores if bias is None else scores + bias
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights  # (B, Q, A, E), (B, A, Q, T)


class ViTScratchAttention(nn.Module):
    """Multi-head self-attention, the paper's appendix A, with the three projections of equation 5 in one."""

    is_causal = False

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__()
        width, self.config, self.heads = config.hidden_size, config, config.num_attention_heads
        self.scaling, self.attention_dropout = (width // self.heads) ** -0.5, config.attention_probs_dropout_prob
        # The gain makes up for fusing: xavier's bound is that of three separate D x D matrices, as in the paper's code.
        self.qkv = dense(
            width, 3 * width, config.qkv_bias, kernel_init=partial(init.xavier_uniform_, gain=math.sqrt(2))
        )
        has_norm, eps = config.qk_norm, config.layer_norm_eps
        self.q_norm = nn.LayerNorm(width // self.heads, eps=eps) if has_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // self.heads, eps=eps) if has_norm else nn.Identity()
        is_relative = config.position_embedding == "relative_1d"
        self.relative_positions = ViTScratchRelativePositions(config) if is_relative else None
        self.proj = dense(width, width)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def project(self, hidden_states: Tensor, num_queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> queries (B, A, Q, E), keys and values (B, A, T, E)."""
        if num_queries is None or not is_plain(self.qkv):
            query, key, value = self.split_heads(self.qkv(hidden_states), 3)
            return query[:, :, :num_queries], key, value
        width, weight, bias = hidden_states.shape[-1], self.qkv.weight, self.qkv.bias
        q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
        (query,) = self.split_heads(F.linear(hidden_states[:, :num_queries], weight[:width], q_bias), 1)
        key, value = self.split_heads(F.linear(hidden_states, weight[width:], kv_bias), 2)
        return query, key, value

    def split_heads(self, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, T, parts * D) -> parts of (B, A, T, E)"""
        # Cut along D, their gradients are put together in one copy; cut along an axis of their own, it takes two.
        return tuple(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projected.chunk(parts, dim=-1))

    def forward(
        self, hidden_states: Tensor, attention_mask: Any, grid: tuple[int, int], num_queries: int | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, Q, D), and the weights (B, A, Q, T) if they were computed."""
        query, key, value = self.project(hidden_states, num_queries)
        query, key = self.q_norm(query), self.k_norm(key)
        implementation = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if kwargs.get("output_attentions"):  # true weights, whichever implementation is chosen
            attend = eager_attention_forward
        if self.relative_positions is not None:
            if "flash" in (implementation or ""):
                raise ValueError(f"{implementation!r} can't add relative positions. Use attn_implementation='sdpa'.")
            kwargs["position_bias"] = self.relative_positions(query, *grid) * self.scaling
        kwargs.update(scaling=self.scaling, dropout=self.attention_dropout if self.training else 0.0)
        attended, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return self.dropout(self.proj(attended.flatten(2))), weights  # (B, Q, A, E) -> (B, Q, D)


class ViTScratchMLP(nn.Module):
    """The two-layer MLP of equation 3, with dropout after both layers (B.1)."""

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__()
        self.fc1 = dense(config.hidden_size, config.intermediate_size, bias_std=1e-6)
        self.activation = ACT2FN[config.hidden_act]
        self.gelu = GELUS.get(config.hidden_act)
        self.fc2 = dense(config.intermediate_size, config.hidden_size, bias_std=1e-6)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        expanded = self.fc1(hidden_states)
        if torch.is_grad_enabled() or self.gelu is None or not (is_plain(self.fc1) and is_plain(self.activation)):
            activated = self.activation(expanded)
        else:  # in place: the widest tensor of a layer need not be there twice, which takes a CPU 4 % of its time
            activated = torch.ops.aten.gelu_(expanded, approximate=self.gelu)
        return self.dropout(self.fc2(self.dropout(activated)))


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


class ViTScratchLayer(GradientCheckpointingLayer):
    """One layer of the pre-norm encoder: equations 2 and 3."""

    def __init__(self, config: ViTScratchConfig, index: int) -> None:
        super().__init__()
        has_scale = config.layer_scale_init_value is not None
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ViTScratchAttention(config)
        self.layer_scale_attention = ViTScratchLayerScale(config) if has_scale else nn.Identity()
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViTScratchMLP(config)
        self.layer_scale_mlp = ViTScratchLayerScale(config) if has_scale else nn.Identity()
        self.drop_path = ViTScratchDropPath(config.drop_path_rate * index / max(config.num_hidden_layers - 1, 1))

    def forward(
        self, hidden_states: Tensor, attention_mask: Any, grid: tuple[int, int], num_queries: int | None, **kwargs: Any
    ) -> Tensor:
        """(B, T, D) -> (B, Q, D)"""
        residual = hidden_states[:, :num_queries]
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, grid, num_queries, **kwargs)
        hidden_states = residual + self.drop_path(self.layer_scale_attention(attended))  # equation 2
        transformed = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.layer_scale_mlp(transformed))  # equation 3


# The model and its heads: equation 4 ----------------------------------------------------------------------------------


class ViTScratchPooler(nn.Module):
    """One vector for an image: the class token or the mean of patches, then the tanh layer of 3.1 if there is one."""

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__()
        self.pooling, self.num_prefix_tokens = config.pooling, config.num_prefix_tokens
        has_norm = config.norm_after_pooling
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_norm else nn.Identity()
        size = config.representation_size
        self.dense = dense(config.hidden_size, size, kernel_init=lecun_normal_) if size else None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, D or representation_size)"""
        patches = hidden_states[:, self.num_prefix_tokens :]
        if self.pooling == "cls":
            pooled = hidden_states[:, 0]
        elif attention_mask is None:
            pooled = patches.mean(dim=1)
        else:
            kept = attention_mask[:, self.num_prefix_tokens :, None].to(patches.dtype)
            pooled = (patches * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
        pooled = self.layernorm(pooled)
        return pooled if self.dense is None else torch.tanh(self.dense(pooled))


def lecun_normal_(weight: Tensor) -> Tensor:
    """Flax's default for a kernel: variance 1 / fan-in, cut at two standard deviations of the uncut normal."""
    std = weight[0].numel() ** -0.5 / 0.87962566103423978  # the standard deviation that is left by the cut
    return init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
