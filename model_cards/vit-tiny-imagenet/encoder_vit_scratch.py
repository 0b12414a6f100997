# SPDX-License-Identifier: Apache-2.0
# modeling_vit_scratch 0.2.0
"""
The Vision Transformer, equations 1 to 4 of the paper: read from top to bottom.

"The paper" is Dosovitskiy et al., An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale, ICLR 2021
(arXiv:2010.11929v2); its code is github.com/google-research/vision_transformer. The interface is that of transformers'
ViT, on whose structure this file leans, as on timm's. The kinds of positions are in `positions_vit_scratch.py`, the
ResNet of the hybrid models in `stem_vit_scratch.py`, what later networks added in `parts_vit_scratch.py`, heads, losses
and initialisation in `modeling_vit_scratch.py`.

Shapes, written where the rank changes:

    B images         C, H, W channels, height, width of an image in pixels
    N patches        rows, columns: the grid of patches, N = rows * columns
    T tokens         class token (if any), registers (if any), then the N patches row by row
    D width          A heads, E = D / A width of a head
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

from .compatibility_vit_scratch import ALL_ATTENTION_FUNCTIONS
from .configuration_vit_scratch import ViTScratchConfig
from .parts_vit_scratch import (
    ViTScratchAttentionPooling,
    ViTScratchDropPath,
    ViTScratchGatedMLP,
    ViTScratchLayerScale,
    ViTScratchQueryValueBias,
    normalization,
)
from .positions_vit_scratch import ViTScratchPositionEmbeddings, ViTScratchRelativePositions, ViTScratchRotaryPositions
from .stem_vit_scratch import ViTScratchStem


# Pixels to tokens: equation 1 -----------------------------------------------------------------------------------------


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, N, C * height * width), each patch channel by channel, as a convolution's kernel has it."""
    batch, channels, (height, width) = *images.shape[:2], patch
    rows, columns = images.shape[2] // height, images.shape[3] // width
    patches = images.reshape(batch, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
    return patches.flatten(3).flatten(1, 2)


class ViTScratchPatchProjection(nn.Conv2d):
    """
    E of equation 1: a convolution whose stride is its kernel, computed as one matrix product over the patches. That is
    faster than a convolution, since it needs none of the memory layouts that libraries copy images to.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, rows, columns)"""
        (batch, _, height, width), kernel = pixels.shape, self.kernel_size
        tokens = F.linear(patchify(pixels, kernel), self.weight.flatten(1), self.bias)  # (B, N, D)
        return tokens.transpose(1, 2).reshape(batch, -1, height // kernel[0], width // kernel[1])


class ViTScratchPatchEmbeddings(nn.Module):
    """Cuts the image, or what the stem makes of it, into patches and maps each to a token: x_p E of equation 1."""

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__()
        self.num_channels, self.patch = config.num_channels, config.patch_hw
        self.stem = None if config.stem_layers is None else ViTScratchStem(config)
        channels = self.num_channels if self.stem is None else self.stem.out_channels
        kernel = (self.patch[0] // config.stem_stride, self.patch[1] // config.stem_stride)
        options = {"kernel_size": kernel, "stride": kernel, "bias": config.patch_bias}
        self.projection = ViTScratchPatchProjection(channels, config.hidden_size, **options)
        self.layernorm = normalization(config) if config.use_patch_norm else nn.Identity()

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
        return self.layernorm(self.projection(pixels).flatten(2).transpose(1, 2))  # (B, D, rows, columns) -> (B, N, D)


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
        has_positions = config.position_embedding not in ("none", "relative_1d", "rope_2d")
        self.position_embeddings = ViTScratchPositionEmbeddings(config) if has_positions else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layernorm = normalization(config) if config.use_pre_norm else nn.Identity()

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, T, D); where `bool_masked_pos` (B, N) is true, the mask token replaces the patch."""
        tokens = self.patch_embeddings(pixel_values)  # (B, N, D)
        if bool_masked_pos is not None:
            tokens = self.mask(tokens, bool_masked_pos.flatten(1))
        # Under autocast the patches are in half precision, and so is the sum of all branches, as in the authors'
        # big_vision with dtype_mm; one token in float32 would make it float32, with twice the bytes in every layer.
        prefix = (self.cls_token, self.distillation_token, self.register_tokens)
        prefix = [token.to(tokens.dtype) for token in prefix if token is not None]
        tokens = torch.cat([*(token.expand(tokens.shape[0], -1, -1) for token in prefix), tokens], dim=1)  # (B, T, D)
        if self.position_embeddings is not None:
            tokens = self.position_embeddings(tokens, grid=self.patch_embeddings.grid(pixel_values))
        return self.layernorm(self.dropout(tokens))

    def mask(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Puts the mask token where the mask (B, N) is true: (B, N, D) -> (B, N, D)."""
        if self.mask_token is None:
            raise ValueError("bool_masked_pos needs a mask token: build the model with use_mask_token=True.")
        if mask.shape != tokens.shape[:2]:
            wanted, got = tuple(tokens.shape[:2]), tuple(mask.shape)
            raise ValueError(f"bool_masked_pos must have the shape (batch, patches) = {wanted}, got {got}.")
        return torch.where(mask[..., None].bool(), self.mask_token.to(tokens.dtype), tokens)


# The encoder: equations 2 and 3 ---------------------------------------------------------------------------------------


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    dropout: float = 0.0, position_bias: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(q k^T / sqrt(E)) v, equations 6 and 7, spelled out: the one implementation with weights to show."""
    scores = query @ key.transpose(2, 3) * scaling  # (B, A, T, T)
    for bias in (position_bias, attention_mask):
        scores = scores if bias is None else scores + bias
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights  # (B, T, A, E), (B, A, T, T)


class ViTScratchAttention(nn.Module):
    """Multi-head self-attention, the paper's appendix A, with the three projections of equation 5 in one."""

    is_causal = False

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__()
        self.config, self.heads, width = config, config.num_attention_heads, config.hidden_size
        self.scaling, self.attention_dropout = (width // self.heads) ** -0.5, config.attention_probs_dropout_prob
        has_key_bias = config.key_bias or not config.qkv_bias
        self.qkv = nn.Linear(width, 3 * width, config.qkv_bias) if has_key_bias else ViTScratchQueryValueBias(width)
        self.q_norm = normalization(config, width // self.heads) if config.qk_norm else nn.Identity()
        self.k_norm = normalization(config, width // self.heads) if config.qk_norm else nn.Identity()
        kind = config.position_embedding
        self.relative_positions = ViTScratchRelativePositions(config) if kind == "relative_1d" else None
        self.rotary_positions = ViTScratchRotaryPositions(config) if kind == "rope_2d" else None
        self.proj = nn.Linear(width, width, bias=config.proj_bias)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, grid: tuple[int, int] | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D), and the weights (B, A, T, T) if they were computed."""
        batch, tokens, _ = hidden_states.shape
        # Cut along D, their gradients are put together in one copy; cut along an axis of their own, it takes two.
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)  # equation 5: (B, T, D) each
        query = self.q_norm(query.reshape(batch, tokens, self.heads, -1).transpose(1, 2))  # (B, A, T, E)
        key = self.k_norm(key.reshape(batch, tokens, self.heads, -1).transpose(1, 2))
        value = value.reshape(batch, tokens, self.heads, -1).transpose(1, 2)
        if self.rotary_positions is not None:
            query, key = self.rotary_positions(query, grid=grid), self.rotary_positions(key, grid=grid)
        implementation = self.config._attn_implementation
        if self.relative_positions is not None:
            if "flash" in (implementation or ""):
                raise ValueError(f"{implementation!r} can't add relative positions. Use attn_implementation='sdpa'.")
            kwargs["position_bias"] = self.relative_positions(query, grid=grid) * self.scaling
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if kwargs.get("output_attentions"):  # true weights, whichever implementation is chosen
            attend = eager_attention_forward
        kwargs.update(scaling=self.scaling, dropout=self.attention_dropout if self.training else 0.0)
        attended, weights = attend(self, query, key, value, attention_mask, **kwargs)  # (B, T, A, E)
        return self.dropout(self.proj(attended.reshape(batch, tokens, -1))), weights  # equation 8


class ViTScratchMLP(nn.Module):
    """The two-layer MLP of equation 3, with dropout after both layers (B.1)."""

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        activated = self.dropout(self.activation(self.fc1(hidden_states)))
        return self.dropout(self.fc2(activated))


class ViTScratchLayer(GradientCheckpointingLayer):
    """One layer of the pre-norm encoder: equations 2 and 3."""

    def __init__(self, config: ViTScratchConfig, index: int) -> None:
        super().__init__()
        has_scale = config.layer_scale_init_value is not None
        self.layernorm_before = normalization(config)
        self.attention = ViTScratchAttention(config)
        self.layer_scale_attention = ViTScratchLayerScale(config) if has_scale else nn.Identity()
        self.layernorm_after = normalization(config)
        self.mlp = ViTScratchGatedMLP(config) if config.use_gated_mlp else ViTScratchMLP(config)
        self.layer_scale_mlp = ViTScratchLayerScale(config) if has_scale else nn.Identity()
        self.drop_path = ViTScratchDropPath(config.drop_path_rate * index / max(config.num_hidden_layers - 1, 1))

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        """(B, T, D) -> (B, T, D); `kwargs` are those of the attention."""
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.layer_scale_attention(attended))  # equation 2
        transformed = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.layer_scale_mlp(transformed))  # equation 3


# All of it, and the vector that stands for the image: equation 4 ------------------------------------------------------


class ViTScratchEncoder(PreTrainedModel):
    """Equations 1 to 4 in a row. `ViTScratchModel` is this with pooling and the outputs of transformers."""

    config: ViTScratchConfig

    def __init__(self, config: ViTScratchConfig, use_mask_token: bool = False) -> None:
        super().__init__(config)
        self.embeddings = ViTScratchEmbeddings(config, use_mask_token)
        self.layers = nn.ModuleList(ViTScratchLayer(config, index) for index in range(config.num_hidden_layers))
        num_later = config.num_hidden_layers - 1 if config.position_embedding_placement == "every_layer" else 0
        self.later_position_embeddings = nn.ModuleList(ViTScratchPositionEmbeddings(config) for _ in range(num_later))
        has_norm = config.use_final_norm and not config.norm_after_pooling
        self.layernorm = normalization(config) if has_norm else nn.Identity()

    def positions_before(self, index: int) -> nn.Module | None:
        """Table 8: positions may enter again before every later layer, each layer's own or those of the first."""
        placement = self.config.position_embedding_placement
        if index == 0 or placement == "stem":
            return None
        is_shared = placement == "every_layer_shared"
        return self.embeddings.position_embeddings if is_shared else self.later_position_embeddings[index - 1]

    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, attention_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        """(B, C, H, W) -> (B, T, D); mask and `kwargs` are the attention's."""
        grid = self.embeddings.patch_embeddings.grid(pixel_values)
        hidden_states = self.embeddings(pixel_values, bool_masked_pos=bool_masked_pos)  # equation 1
        for index, layer in enumerate(self.layers):
            if (positions := self.positions_before(index)) is not None:
                hidden_states = positions(hidden_states, grid=grid)
            hidden_states = layer(hidden_states, attention_mask=attention_mask, grid=grid, **kwargs)
        return self.layernorm(hidden_states)  # equation 4, for every token


class ViTScratchPooler(nn.Module):
    """One vector for an image: the class token or another pooling, then the tanh layer of 3.1 if there is one."""

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__()
        self.pooling, self.num_prefix_tokens = config.pooling, config.num_prefix_tokens
        is_map, size = config.pooling == "map", config.representation_size
        self.attention = ViTScratchAttentionPooling(config, ViTScratchMLP(config)) if is_map else None
        has_norm, width = config.norm_after_pooling, config.pooled_width
        self.layernorm = normalization(config, width) if has_norm else nn.Identity()
        self.dense = nn.Linear(width, size) if size else None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, D, twice that for "cls_mean", or representation_size)"""
        patches = hidden_states[:, self.num_prefix_tokens :]
        mask = None if attention_mask is None else attention_mask[:, self.num_prefix_tokens :]  # (B, N)
        if self.pooling == "cls":
            pooled = hidden_states[:, 0]  # equation 4: y = LN(z_L^0)
        elif self.attention is not None:
            pooled = self.attention(patches, mask)
        elif mask is None:
            pooled = patches.mean(dim=1)
        else:
            kept = mask[..., None].to(patches.dtype)
            pooled = (patches * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
        if self.pooling == "cls_mean":
            pooled = torch.cat([hidden_states[:, 0], pooled], dim=-1)
        pooled = self.layernorm(pooled)
        return pooled if self.dense is None else torch.tanh(self.dense(pooled))
