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

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_vit_scratch import ViTScratchConfig


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


def resample_positions(positions: Tensor, rows: int, columns: int, interpolation: str) -> Tensor:
    """
    Resamples a grid of position embeddings (3.2 of the paper), (1, rows', columns', D) -> (1, rows, columns, D).

    `interpolation`: `"bilinear"` with corners aligned, which is the `scipy.ndimage.zoom(order=1)` of the paper's code;
    `"bicubic"`, as transformers; `"bicubic_antialias"`, as timm; `"bicubic_align_corners"`, as torchvision;
    `"bicubic_offset"`, as the authors of DINO and DINOv2, who scale as if to 0.1 patches more.
    """
    values = (positions if positions.dtype == torch.float64 else positions.float()).permute(0, 3, 1, 2)
    if interpolation == "bicubic_offset":
        scales = [(new + 0.1) / old for new, old in zip((rows, columns), values.shape[2:])]
        resampled = torch.ops.aten.upsample_bicubic2d(values, (rows, columns), False, *scales)
    else:
        align_corners = interpolation in ("bilinear", "bicubic_align_corners")
        options = {"mode": interpolation.split("_")[0], "antialias": interpolation == "bicubic_antialias"}
        resampled = F.interpolate(values, size=(rows, columns), align_corners=align_corners, **options)
    return resampled.permute(0, 2, 3, 1).to(positions.dtype)


def axis_places(stored: int, size: int, device: torch.device) -> Tensor:
    """Where `size` patches lie on an axis that is stored for another number of them, corners aligned: (size,)."""
    return torch.arange(size, device=device) * (stored - 1) / torch.sym_max(size - 1, 1)


def sincos_positions(y: Tensor, x: Tensor, width: int) -> Tensor:
    """The fixed positions of MoCo v3: sines and cosines of column x and row y, (rows,), (columns,) -> (1, N, width)."""
    omega = 10_000 ** -(torch.arange(width // 4, device=y.device) / max(width // 4 - 1, 1))
    y_angle = torch.outer(y, omega)[:, None].expand(-1, x.shape[0], -1)  # (rows, columns, width / 4)
    x_angle = torch.outer(x, omega).expand(y.shape[0], -1, -1)
    return torch.cat([x_angle.sin(), x_angle.cos(), y_angle.sin(), y_angle.cos()], dim=-1).flatten(0, 1)[None]


class ViTScratchPositionEmbeddings(nn.Module):
    """E_pos of equation 1, in the kinds of the paper's D.4. Stored for the grid of `config.image_size`."""

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__()
        self.kind, self.interpolation = config.position_embedding, config.position_embedding_interpolation
        self.width, self.rows, self.columns = config.hidden_size, *config.grid_hw
        # Of the tokens before the patches, class and distillation token may have a position; registers never do.
        num_classifying = int(config.use_cls_token) + int(config.use_distillation_token)
        self.num_placed = num_classifying if self.kind == "learned_1d" and config.cls_token_position else 0
        self.num_unplaced = config.num_prefix_tokens - self.num_placed
        if self.kind == "learned_1d":
            self.weight = nn.Parameter(torch.empty(1, self.num_placed + self.rows * self.columns, self.width))
        elif self.kind == "learned_2d":
            self.row_weight = nn.Parameter(torch.empty(1, self.rows, 1, self.width // 2))
            self.column_weight = nn.Parameter(torch.empty(1, 1, self.columns, self.width // 2))

    def patch_positions(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """(1, N, D)"""
        if self.kind == "sincos_2d":  # a place in the image keeps its position, whatever the grid
            y, x = axis_places(self.rows, rows, device), axis_places(self.columns, columns, device)
            return sincos_positions(y, x, self.width)
        if self.kind == "learned_1d":
            stored = self.weight[:, self.num_placed :].unflatten(1, (self.rows, self.columns))
        else:
            shape = (1, self.rows, self.columns, self.width // 2)
            stored = torch.cat([self.row_weight.expand(shape), self.column_weight.expand(shape)], dim=-1)
        # A size that torch.export leaves open is always resampled; on the stored grid that changes nothing.
        is_open = isinstance(rows, torch.SymInt) or isinstance(columns, torch.SymInt)
        if is_open or (rows, columns) != (self.rows, self.columns):
            stored = resample_positions(stored, rows, columns, self.interpolation)
        return stored.flatten(1, 2)

    def forward(self, hidden_states: Tensor, rows: int, columns: int) -> Tensor:
        """Adds the positions, of whatever grid, to the tokens that have one: (B, T, D) -> (B, T, D)."""
        patches = self.patch_positions(rows, columns, hidden_states.device)
        positions = F.pad(patches, (0, 0, self.num_unplaced, 0))
        if self.num_placed:
            positions = torch.cat([self.weight[:, : self.num_placed], positions], dim=1)
        return hidden_states + positions.to(hidden_states.dtype)


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


class ViTScratchRelativePositions(nn.Module):
    """
    1-D relative attention of the paper's D.4: the product of each query with an embedding of its distance to each key,
    counted in patches row by row. Tokens that are not patches have no distance.
    """

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__()
        self.rows, self.columns, self.num_prefix_tokens = *config.grid_hw, config.num_prefix_tokens
        head_width = config.hidden_size // config.num_attention_heads
        self.weight = nn.Parameter(torch.empty(2 * self.rows * self.columns - 1, head_width))

    def forward(self, query: Tensor, rows: int, columns: int) -> Tensor:
        """(B, A, Q, E) -> (B, A, Q, T). On another grid, distances are those of the places on the stored one."""
        y, x = axis_places(self.rows, rows, query.device), axis_places(self.columns, columns, query.device)
        place = (y[:, None] * self.columns + x).flatten()  # (N,)
        distance = place[:, None] - place + (self.rows * self.columns - 1)  # (N, N), counted from 0
        below, above = distance.floor().long(), distance.ceil().long()
        table = torch.lerp(self.weight[below].float(), self.weight[above].float(), (distance - below)[..., None])
        asking = query[:, :, self.num_prefix_tokens :]  # no patch at all where only the class token asks
        bias = torch.einsum("baqe,qke->baqk", asking, table[: asking.shape[2]].to(query.dtype))
        return F.pad(bias, (self.num_prefix_tokens, 0, query.shape[2] - asking.shape[2], 0))


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


class ViTScratchPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of every model here."""

    config_class = ViTScratchConfig
    config: ViTScratchConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTScratchPatchEmbeddings", "ViTScratchEmbeddings", "ViTScratchLayer"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ViTScratchLayer, "attentions": ViTScratchAttention}
    _input_embed_layer = "patch_embeddings"

    # The package sets the loader, which reads other formats and adapts to other sizes. Alone, this file does without.
    checkpoint_loader: Callable | None = None
    image_processor: Any = None  # the one that fits, where that loader knows it

    def __init__(self, config: ViTScratchConfig, *args: Any, **kwargs: Any) -> None:
        config.validate_vit()
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "PreTrainedModel":
        """As in transformers; with the package, also what its `checkpoint.loading.from_pretrained` adds."""
        load, own_loader = super().from_pretrained, ViTScratchPreTrainedModel.checkpoint_loader
        if own_loader is None:
            return load(pretrained_model_name_or_path, *args, **kwargs)
        return own_loader(cls, load, pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers; with the image processor that the loader found or adapted, if there is one."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(save_directory)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As in the paper's code. The functions of `init` leave alone what a checkpoint has filled."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            getattr(module, "kernel_init", init.xavier_uniform_)(module.weight)
            if module.bias is not None:
                init.normal_(module.bias, getattr(module, "bias_mean", 0.0), getattr(module, "bias_std", 0.0))
        elif isinstance(module, nn.Conv2d):
            lecun_normal_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            init.constant_(module.weight, module.weight_init)
            init.zeros_(module.bias)
        elif isinstance(module, (ViTScratchPositionEmbeddings, ViTScratchRelativePositions)):
            for weight in module.parameters():
                init.normal_(weight, std=std)
        elif isinstance(module, ViTScratchEmbeddings):
            for token in (module.cls_token, module.distillation_token, module.mask_token):
                if token is not None:
                    init.zeros_(token)
            if module.register_tokens is not None:
                init.normal_(module.register_tokens, std=std)  # equal registers would stay equal
        elif isinstance(module, ViTScratchLayerScale):
            init.constant_(module.weight, module.init_value)
        else:
            super()._init_weights(module)


def is_watched(layer: nn.Module) -> bool:
    """Whether a user's forward hook looks at what the layer computes, and so must see all of it."""
    known = ("torch.distributed", "transformers.", "accelerate.")  # these move weights, or record what is asked for
    hooks = [hook for module in layer.modules() for hook in module._forward_hooks.values()]
    return any(not getattr(hook, "__module__", "").startswith(known) for hook in hooks)


class ViTScratchModel(ViTScratchPreTrainedModel):
    """
    The encoder without a head.

    Args:
        config: the architecture.
        add_pooling_layer: whether to compute `pooler_output`.
        use_mask_token: whether there is a mask token, for `bool_masked_pos`.
    """

    def __init__(self, config: ViTScratchConfig, add_pooling_layer: bool = True, use_mask_token: bool = False) -> None:
        super().__init__(config)
        self.embeddings = ViTScratchEmbeddings(config, use_mask_token)
        self.layers = nn.ModuleList(ViTScratchLayer(config, index) for index in range(config.num_hidden_layers))
        # Table 8: positions may enter again before every later layer, each layer's own or those of the stem.
        num_later = config.num_hidden_layers - 1 if config.position_embedding_placement == "every_layer" else 0
        self.later_position_embeddings = nn.ModuleList(ViTScratchPositionEmbeddings(config) for _ in range(num_later))
        has_norm = not config.norm_after_pooling
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_norm else nn.Identity()
        self.pooler = ViTScratchPooler(config) if add_pooling_layer else None
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, attention_mask: Tensor | None = None,
        pooled_output_only: bool = False, **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:  # fmt: skip
        """
        Args:
            pixel_values: (B, C, H, W), normalised as the image processor does; any H and W that the patch divides.
            bool_masked_pos: (B, N) or (B, rows, columns), true where the mask token replaces the patch.
            attention_mask: (B, T), zero for tokens that no token attends to.
            pooled_output_only: promise to use `pooler_output` only. The last layer then computes no more than the class
                token needs, and `last_hidden_state` is (B, 1, D); with a distillation head, that token too: (B, 2, D).
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`. The weights of `output_attentions` are
                true under every attention implementation. transformers' `interpolate_pos_encoding` changes nothing:
                every size works.

        Returns:
            `last_hidden_state` (B, T, D) after the final LayerNorm, `pooler_output` (B, D) or (B, representation_size).

        Raises:
            ValueError: if `pixel_values` have the wrong type or shape, or a mask doesn't fit them.
        """
        if pixel_values is None or not torch.is_floating_point(pixel_values):
            got = None if pixel_values is None else pixel_values.dtype
            raise ValueError(
                f"pixel_values must be normalised floating-point numbers, got {got}: use the image processor."
            )
        kwargs.pop("interpolate_pos_encoding", None)
        wants_states = kwargs.pop("output_hidden_states", self.config.output_hidden_states)
        wants_weights = kwargs.setdefault("output_attentions", self.config.output_attentions)

        grid = self.embeddings.patch_embeddings.grid(pixel_values)
        # A model in half precision takes the float32 pixels of the image processor.
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states = self.embeddings(pixel_values, bool_masked_pos)  # equation 1
        mask = None
        if attention_mask is not None:
            wanted, got = tuple(hidden_states.shape[:2]), tuple(attention_mask.shape)
            if wanted != got:
                raise ValueError(f"attention_mask must have the shape (batch, tokens) = {wanted}, got {got}.")
            config = copy.copy(self.config)  # it says which form of mask the attention implementation takes
            config._attn_implementation = "eager" if wants_weights else config._attn_implementation
            mask = create_bidirectional_mask(config=config, inputs_embeds=hidden_states, attention_mask=attention_mask)

        # Where only the class token is wanted, the last layer computes only its query, projection and MLP: the same
        # logits and gradients with 7 % fewer operations at 12 layers.
        cls_only = pooled_output_only and self.config.pooling == "cls" and mask is None
        cls_only = cls_only and not (wants_weights or wants_states or is_watched(self.layers[-1]))
        placement = self.config.position_embedding_placement
        for index, layer in enumerate(self.layers):
            if placement == "every_layer" and index > 0:
                hidden_states = self.later_position_embeddings[index - 1](hidden_states, *grid)
            elif placement == "every_layer_shared" and index > 0:
                hidden_states = self.embeddings.position_embeddings(hidden_states, *grid)
            num_wanted = 2 if self.config.use_distillation_head else 1
            num_queries = num_wanted if cls_only and index == len(self.layers) - 1 else None
            hidden_states = layer(hidden_states, mask, grid, num_queries, **kwargs)

        sequence = self.layernorm(hidden_states)  # equation 4, for every token
        pooled = None if self.pooler is None else self.pooler(sequence, attention_mask)
        return BaseModelOutputWithPooling(last_hidden_state=sequence, pooler_output=pooled)


def image_classification_loss(
    labels: Tensor, logits: Tensor, config: ViTScratchConfig, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """
    The loss that `config.problem_type` names, in float32.

    Args:
        labels: for `"single_label_classification"` (the default if K > 1), classes (B,) of any integer type, or
            probabilities of the classes (B, K), e.g. from mixup. For `"multi_label_classification"`, 0 to 1 (B, K). For
            `"regression"` (the default if K = 1), numbers (B,) or (B, K).
        logits: (B, K).
        config: the model's; read, never written.
        num_items_in_batch: what the sum of losses is divided by, as `Trainer` counts it: the entries of `labels` that
            are not -100, over all batches that make one update. Default: those of this batch.

    Raises:
        ValueError: if the labels don't fit the problem type.
    """
    problem = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    is_classes = problem == "single_label_classification" and not torch.is_floating_point(labels)
    if labels.numel() != (logits.shape[0] if is_classes else logits.numel()):
        raise ValueError(
            f"Labels of shape {tuple(labels.shape)}, {labels.dtype}, don't fit logits of shape {tuple(logits.shape)}, "
            f"problem_type={config.problem_type!r}. Give integer classes (batch,) or probabilities (batch, labels); "
            "several labels for an image need config.problem_type='multi_label_classification'."
        )
    logits = logits.float()
    targets = labels.flatten().long() if is_classes else labels.view_as(logits).float()
    if problem == "regression":
        total = F.mse_loss(logits, targets, reduction="sum")
    elif problem == "multi_label_classification":
        total = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    else:
        total = F.cross_entropy(logits, targets, reduction="sum")
        if not is_classes:
            total = total * logits.shape[1]  # an image has one loss, but its K probabilities are K entries
            unsure = config.problem_type is None and not torch.compiler.is_compiling()
            if unsure and (targets.sum(dim=1) - 1).abs().max() > 1e-2:
                way_out = "Set config.problem_type: 'multi_label_classification' takes several labels for an image."
                raise ValueError(f"The rows of float labels must sum to 1 to be probabilities of classes. {way_out}")
    count = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if torch.is_tensor(count) else count)


class ViTScratchForImageClassification(ViTScratchPreTrainedModel):
    """The encoder with a linear classifier on its pooled output (3.1)."""

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__(config)
        self.num_labels, width = config.num_labels, config.representation_size or config.hidden_size
        self.vit = ViTScratchModel(config)
        start = {"kernel_init": init.zeros_ if config.zero_init_head else None, "bias_mean": config.head_bias_init}
        self.classifier = dense(width, self.num_labels, **start) if self.num_labels else nn.Identity()
        has_second = config.use_distillation_head and self.num_labels
        second = dense(config.hidden_size, self.num_labels, **start) if has_second else None
        self.distillation_classifier = second
        self.loss_function = image_classification_loss  # set here: transformers would choose by the name of the class
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None, **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:  # fmt: skip
        """
        Args:
            pixel_values, attention_mask, kwargs: as in `ViTScratchModel.forward`.
            labels, num_items_in_batch: as in `image_classification_loss`.

        Returns:
            `logits` (B, K), outside of training divided by the temperature; with labels, `loss`, a float32 scalar, of
            the logits before that.
        """
        outputs = self.vit(pixel_values, attention_mask=attention_mask, pooled_output_only=True, **kwargs)
        logits, loss = self.classifier(outputs.pooler_output), None
        if self.distillation_classifier is not None:
            logits = (logits + self.distillation_classifier(outputs.last_hidden_state[:, 1])) / 2
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, num_items_in_batch=num_items_in_batch)
        if self.config.calibrated and not self.training:
            logits = logits / self.config.temperature
        more = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return ImageClassifierOutput(loss=loss, logits=logits, **more)


class ViTScratchForMaskedImageModeling(ViTScratchPreTrainedModel):
    """The encoder with a linear decoder that paints masked patches (SimMIM, Xie et al., arXiv:2111.09886)."""

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__(config)
        if config.stem_layers is not None:
            raise ValueError(
                "Masked image modeling masks tokens, and a ResNet stem has seen the pixels around each: "
                "take stem_layers=None."
            )
        self.vit = ViTScratchModel(config, add_pooling_layer=False, use_mask_token=True)
        self.decoder = dense(config.hidden_size, config.num_channels * math.prod(config.patch_hw))
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedImageModelingOutput:  # fmt: skip
        """
        Args: as in `ViTScratchModel.forward`.

        Returns:
            `reconstruction` (B, C, H, W); with `bool_masked_pos`, `loss`, the mean absolute error on masked pixels.
        """
        outputs = self.vit(pixel_values, bool_masked_pos, attention_mask, **kwargs)
        grid, patch = self.vit.embeddings.patch_embeddings.grid(pixel_values), self.config.patch_hw
        patches = self.decoder(outputs.last_hidden_state[:, self.config.num_prefix_tokens :])  # (B, N, C * patch area)
        patches = patches.unflatten(2, (-1, *patch)).unflatten(1, grid)  # (B, rows, columns, C, patch height, width)
        reconstruction = patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)
        loss = None
        if bool_masked_pos is not None:
            mask = bool_masked_pos.reshape(-1, 1, *grid).to(reconstruction.device)
            mask = mask.repeat_interleave(patch[0], dim=2).repeat_interleave(patch[1], dim=3)  # (B, 1, H, W)
            error = F.l1_loss(reconstruction.float(), pixel_values.float(), reduction="none")
            loss = (error * mask).sum() / (mask.sum() * self.config.num_channels).clamp(min=1)
        more = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return MaskedImageModelingOutput(loss=loss, reconstruction=reconstruction, **more)


class ViTScratchBackbone(BackboneMixin, ViTScratchPreTrainedModel):
    """The encoder as a backbone: feature maps of the layers named in `config.out_features`."""

    _keys_to_ignore_on_load_unexpected = [r"pooler\.", r"classifier\.", r"decoder\.", r"mask_token"]

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__(config)
        self.vit = ViTScratchModel(config, add_pooling_layer=False)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """
        Args: as in `ViTScratchModel.forward`.

        Returns:
            `feature_maps`, for each of `out_features` (B, D, rows, columns) after the final LayerNorm.
        """
        outputs = self.vit(pixel_values, **kwargs)
        grid, prefix = self.vit.embeddings.patch_embeddings.grid(pixel_values), self.config.num_prefix_tokens
        states = [s for stage, s in zip(self.stage_names, outputs.hidden_states) if stage in self.out_features]
        maps = tuple(self.vit.layernorm(s)[:, prefix:].transpose(1, 2).unflatten(2, grid) for s in states)
        return BackboneOutput(maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


# The hybrids' stem: 3.1 -----------------------------------------------------------------------------------------------


class ViTScratchStemConvolution(nn.Conv2d):
    """A convolution with standardised weights (Qiao et al., arXiv:1903.10520), padded as TensorFlow's "SAME"."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, bias=False)
        # An input that the stride divides lacks max(kernel - stride, 0) pixels; the odd one goes below and right.
        before, lacking = max(kernel - stride, 0) // 2, max(kernel - stride, 0)
        self.pads = (before, lacking - before, before, lacking - before)

    def forward(self, pixels: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.weight.float(), dim=(1, 2, 3), correction=0, keepdim=True)
        weight = ((self.weight.float() - mean) / (std + 1e-5)).to(self.weight.dtype)
        return F.conv2d(F.pad(pixels, self.pads), weight, stride=self.stride)


def stem_normalization(channels: int, weight_init: float = 1.0) -> nn.GroupNorm:
    """GroupNorm with Flax's epsilon."""
    layer = nn.GroupNorm(32, channels, eps=1e-6)
    layer.weight_init = weight_init
    return layer


class ViTScratchStemUnit(GradientCheckpointingLayer):
    """A bottleneck unit of the ResNet: (B, inputs, H, W) -> (B, 4 * width, H / stride, W / stride)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.has_shortcut = inputs != 4 * width or stride != 1
        if self.has_shortcut:
            self.shortcut_conv = ViTScratchStemConvolution(inputs, 4 * width, 1, stride)
            self.shortcut_norm = stem_normalization(4 * width)
        self.conv1, self.norm1 = ViTScratchStemConvolution(inputs, width, 1), stem_normalization(width)
        self.conv2, self.norm2 = ViTScratchStemConvolution(width, width, 3, stride), stem_normalization(width)
        self.conv3 = ViTScratchStemConvolution(width, 4 * width, 1)
        self.norm3 = stem_normalization(4 * width, weight_init=0.0)

    def forward(self, pixels: Tensor) -> Tensor:
        residual = self.shortcut_norm(self.shortcut_conv(pixels)) if self.has_shortcut else pixels
        pixels = F.relu(self.norm1(self.conv1(pixels)))
        pixels = F.relu(self.norm2(self.conv2(pixels)))
        return F.relu(residual + self.norm3(self.conv3(pixels)))


class ViTScratchStem(nn.Module):
    """The ResNet of the hybrid models (3.1; BiT's, as in models_resnet.py of the paper's code)."""

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__()
        channels = config.stem_width
        self.root_conv = ViTScratchStemConvolution(config.num_channels, channels, 7, stride=2)
        self.root_norm = stem_normalization(channels)
        self.stages = nn.ModuleList()
        for stage, num_units in enumerate(config.stem_layers):
            width, units = config.stem_width * 2**stage, nn.ModuleList()
            for unit in range(num_units):
                units.append(ViTScratchStemUnit(channels, width, stride=2 if stage > 0 and unit == 0 else 1))
                channels = 4 * width
            self.stages.append(units)
        self.out_channels = channels

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H / stem_stride, W / stem_stride)"""
        pixels = F.relu(self.root_norm(self.root_conv(pixels)))
        # After ReLU the zeros that pad are the -inf of "SAME" pooling.
        pixels = F.max_pool2d(F.pad(pixels, (0, 1, 0, 1)), kernel_size=3, stride=2)
        for units in self.stages:
            for unit in units:
                pixels = unit(pixels)
        return pixels


__all__ = [
    "ViTScratchBackbone", "ViTScratchForImageClassification", "ViTScratchForMaskedImageModeling", "ViTScratchModel",
    "ViTScratchPreTrainedModel",
]  # fmt: skip
