# SPDX-License-Identifier: Apache-2.0
"""
Makes a model faster, or undoes it. The network's own files stay what one reads; the faster layers are here, with the
same numbers up to rounding:

* `FasterLayer` and `FasterAttention`: the last layer of a classifier computes the class token alone, also in training.
  The other tokens need keys and values only: 7 % fewer operations at 12 layers.
* `FasterAttention`, in training in bfloat16 on a CPU: two matrix products and a softmax. PyTorch's fused attention
  takes two to five times as long for its backward pass there, and is faster everywhere else.
* `BlockedLinear`, on a CPU without gradients: weights that are reordered once into the blocks of oneDNN. For float32
  PyTorch calls MKL, which leaves a tenth of an AMD core unused; for bfloat16 it calls oneDNN, which reorders the
  weights in every pass. torch.compile with freezing does the same, but needs a compiler.
* `FasterMLP`, without gradients: GELU within the product before it or in place. It saves a CPU 4 % of its time.
"""

import functools
import time
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.activations import GELUActivation, GELUTanh
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..encoder_vit_scratch import ViTScratchAttention, ViTScratchLayer, ViTScratchMLP, eager_attention_forward
from ..modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchModel


# Hooks of these libraries move weights, count operations or record outputs. They need not see every token.
_LIBRARIES = ("torch.", "transformers.", "accelerate.")
# Layers of these compute each token by itself. Others may scale all tokens of a batch by the largest.
_LAYERS = ("torch.nn.", "transformers.activations", "peft.", __name__.partition(".")[0])
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks,
)  # fmt: skip


# Hooks are looked for in every pass, so that those added after `speed_up` count too: a microsecond for a layer.
def _hooks(layer: nn.Module) -> tuple[Mapping, ...]:
    return layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks


def _has_user_hooks(hooks: Iterable[Mapping]) -> bool:
    functions = (function for mapping in hooks if mapping for function in mapping.values())
    return any(not (getattr(function, "__module__", None) or "").startswith(_LIBRARIES) for function in functions)


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer is of another library, or has weights of a type of its own, as quantisers make them."""
    is_plain = type(getattr(layer, "weight", None)) in (nn.Parameter, Tensor, type(None))
    return not is_plain or not type(layer).__module__.startswith(_LAYERS)


def is_modified(layer: nn.Module) -> bool:
    """Whether a layer is quantised or has hooks or a replaced forward, which faster code would skip."""
    return is_quantised(layer) or any(_hooks(layer)) or "forward" in layer.__dict__ or _has_user_hooks(_GLOBAL_HOOKS)


def has_user_hooks(layers: Iterable[nn.Module]) -> bool:
    """Whether a user's hook or forward on one of the layers has to see every token."""
    is_hooked = any("forward" in layer.__dict__ or _has_user_hooks(_hooks(layer)) for layer in layers)
    return is_hooked or _has_user_hooks(_GLOBAL_HOOKS)


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


# Multiplications. A call of oneDNN takes ten microseconds more, which fewer of them in float32 would not make up for.
SMALL = 4_000_000


@functools.cache
def is_available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this PyTorch and processor can do it for weights of this type. The operators are inductor's."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        ones = torch.ones(2, 2, dtype=dtype)
        blocked = torch.ops.mkldnn._reorder_linear_weight(ones, None)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(ones, blocked, ones[0], "none", [], ""), 3 * ones)
    except (AttributeError, RuntimeError):
        return False


class BlockedLinear(nn.Linear):
    """
    A linear layer that is faster on a CPU without gradients, and otherwise unchanged. The reordered weight is a second
    copy that is in no state dict, and is made again when the weight has changed.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)"""
        return self.product(inputs) if self.fits(inputs) else super().forward(inputs)

    def fits(self, inputs: Tensor) -> bool:
        """Whether `product` can be called, and is worth its call."""
        if torch.is_grad_enabled() or _is_traced() or torch.is_autocast_enabled("cpu"):
            return False
        weight = self.weight
        is_here = inputs.device.type == weight.device.type == "cpu" and inputs.dtype == weight.dtype
        is_small = weight.dtype == torch.float32 and inputs.numel() * self.out_features < SMALL
        return is_here and not is_small and is_available(weight.dtype)

    def product(self, inputs: Tensor, activation: str = "none", kind: str = "") -> Tensor:
        """As `forward`, from the blocked weight; oneDNN's `activation` comes while the results are in the cache."""
        return torch.ops.mkldnn._linear_pointwise(inputs, self._blocked_weight(), self.bias, activation, [], kind)

    def _blocked_weight(self) -> Tensor:
        weight = self.weight.detach()
        # A tensor made in inference mode has no version counter, but can't be trained either.
        state = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        known, blocked, _ = self.__dict__.get("_blocked", (None, None, None))
        if known != state:
            blocked = torch.ops.mkldnn._reorder_linear_weight(weight, None)
            # One assignment, for other threads; it keeps the weight, so that nothing else gets its address.
            self.__dict__["_blocked"] = (state, blocked, weight)
        return blocked

    def train(self, mode: bool = True) -> "BlockedLinear":
        """As in torch, but drops the copy: training may change the weight without a new version."""
        self.__dict__.pop("_blocked", None)
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # Reordered tensors can't be copied or pickled; a copy or another process reorders again.
        return {name: value for name, value in self.__dict__.items() if name != "_blocked"}


class FasterMLP(ViTScratchMLP):
    """An MLP whose GELU is part of the product or overwrites its input, if no gradient and nobody else needs that."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        approximation = _gelu_approximation(self.activation)
        is_stock = type(self.fc1) in (nn.Linear, BlockedLinear) and approximation is not None
        if (
            not is_stock
            or torch.is_grad_enabled()
            or _is_traced()
            or any(map(is_modified, (self.fc1, self.activation)))
        ):
            return super().forward(hidden_states)
        if type(self.fc1) is BlockedLinear and self.fc1.fits(hidden_states):
            activated = self.fc1.product(hidden_states, "gelu", approximation)
        else:
            activated = torch.ops.aten.gelu_(self.fc1(hidden_states), approximate=approximation)
        return self.dropout(self.fc2(self.dropout(activated)))


def _gelu_approximation(activation: nn.Module) -> str | None:
    """torch's name for the kind of GELU; None for other activations."""
    if type(activation) is GELUActivation and activation.act is F.gelu:
        return "none"
    return "tanh" if type(activation) is GELUTanh else None


# The spelled-out products keep their weights (B, A, T, T) for the backward pass, which the fused attention does not.
MOST_TOKENS = 640


class FasterAttention(ViTScratchAttention):
    """The same attention, with queries of the `only_first` Q tokens, if given."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, only_first: int | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T or Q, D), and the weights (B, A, T or Q, T) if they were computed."""
        dropout = self.attention_dropout if self.training else 0.0
        is_plain = attention_mask is None and not dropout and not kwargs.get("output_attentions")
        use_products = is_plain and self._is_fused_attention_slow(hidden_states)
        if only_first is None and not use_products:
            return super().forward(hidden_states, attention_mask, **kwargs)
        heads = (hidden_states.shape[0], -1, self.heads, hidden_states.shape[-1] // self.heads)
        query, key, value = (part.reshape(heads).transpose(1, 2) for part in self._project(hidden_states, only_first))
        query, key, weights = self.q_norm(query), self.k_norm(key), None
        if use_products and query.dtype == key.dtype == value.dtype == torch.bfloat16:
            attended = attention_by_products(query, key, value, self.scaling)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            attended, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=dropout)
        return self.dropout(self.proj(attended.flatten(2))), weights  # (B, Q, A, E) -> (B, Q, D)

    def _is_fused_attention_slow(self, hidden_states: Tensor) -> bool:
        """In training in bfloat16 on a CPU; False if it is not PyTorch's, or has positions of its own to add."""
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        return (
            torch.bfloat16 in (autocast, hidden_states.dtype) and hidden_states.device.type == "cpu"
            and torch.is_grad_enabled() and not _is_traced()
            and hidden_states.shape[1] <= MOST_TOKENS and self.config._attn_implementation == "sdpa"
            and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
            and self.relative_positions is None and self.rotary_positions is None
        )  # fmt: skip

    def _project(self, hidden_states: Tensor, only_first: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> queries (B, T or Q, D), keys and values (B, T, D)"""
        if only_first is None or type(self.qkv) not in (nn.Linear, BlockedLinear) or is_modified(self.qkv):
            query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
            return query[:, :only_first], key, value
        width, weight, bias = hidden_states.shape[-1], self.qkv.weight, self.qkv.bias
        q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
        query = F.linear(hidden_states[:, :only_first], weight[:width], q_bias)
        return query, *F.linear(hidden_states, weight[width:], kv_bias).chunk(2, dim=-1)


def attention_by_products(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(q k^T scaling) v of three (B, A, T, E), as (B, T, A, E). The softmax is summed up in float32."""
    with torch.autocast("cpu", enabled=False):
        weights = torch.softmax(query * scaling @ key.transpose(2, 3), dim=-1)  # (B, A, T, T)
        return (weights @ value).transpose(1, 2)


class FasterLayer(ViTScratchLayer):
    """A layer that computes the first `num_queries` tokens only, if given: (B, T, D) -> (B, Q, D)."""

    def forward(self, hidden_states: Tensor, *args: Any, num_queries: int | None = None, **kwargs: Any) -> Tensor:
        if num_queries is None:
            return super().forward(hidden_states, *args, **kwargs)
        attended, _ = self.attention(self.layernorm_before(hidden_states), only_first=num_queries)
        hidden_states = hidden_states[:, :num_queries] + self.drop_path(self.layer_scale_attention(attended))
        transformed = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.layer_scale_mlp(transformed))


# The call -------------------------------------------------------------------------------------------------------------

# Arguments of a classifier that ask for nothing beside logits and loss.
_LOGITS_ONLY = {"pixel_values", "labels", "num_items_in_batch", "return_dict", "interpolate_pos_encoding"}


def _has_class_token_to_compute_alone(encoder: nn.Module) -> bool:
    if type(encoder) is not ViTScratchModel or encoder.pooler is None or encoder.config.pooling != "cls":
        return False
    last = encoder.layers[-1]
    # The last layer's relative positions would have no gradient, which DDP refuses; rotary ones need all tokens.
    is_relative = encoder.config.position_embedding in ("relative_1d", "rope_2d")
    return type(last) is ViTScratchLayer and type(last.attention) is ViTScratchAttention and not is_relative


def only_pooled_output(encoder: ViTScratchModel) -> dict[str, int]:
    """
    Keyword arguments for an encoder of which only `pooler_output` is read, and with a distillation head the second
    token. Empty if every token of the last layer is needed, or the encoder was not sped up.
    """
    config, last = encoder.config, encoder.layers[-1]
    if type(last) is not FasterLayer or type(attention := last.attention) is not FasterAttention:
        return {}
    if last.training and (attention.attention_dropout or attention.dropout.p or last.mlp.dropout.p):
        return {}  # dropout would draw other numbers for fewer tokens
    if config.output_hidden_states or config.output_attentions or any(map(is_quantised, last.modules())):
        return {}
    if has_user_hooks([encoder, encoder.layernorm, *encoder.pooler.modules(), *last.modules()]):
        return {}
    return {"num_queries": 2 if config.use_distillation_head else 1}


def _class_token_hook(
    model: ViTScratchForImageClassification, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """A forward pre-hook of a classifier: computes the class token alone if only logits and loss are asked for."""
    asked = {name for name, value in kwargs.items() if value is not None and value is not False}
    if len(args) > 2 or asked - _LOGITS_ONLY:
        return None
    return args, {**kwargs, **only_pooled_output(model.vit)}


Model = TypeVar("Model", bound=nn.Module)

_FASTER = (BlockedLinear, FasterMLP, FasterLayer, FasterAttention)


def speed_up(model: Model) -> Model:
    """
    Makes a model faster, in place, until `undo_speed_up`. State dict, configuration and saved files stay the same.

    Logits and gradients stay the same up to rounding. Calls that ask for hidden states, attentions or masks, training
    with dropout, and layers with adapters, hooks, quantisation or a replaced forward run the network's own code.

    Make the call last. Of weights that somebody changes through `.data` later, which PyTorch does not count as a
    change, it learns at the next `model.eval()` or `model.train()`.

    Args:
        model: of any kind here, or a module that contains one.
    """
    for module in list(model.modules()):
        if type(module) is nn.Linear and is_available() and not is_modified(module):
            module.__class__ = BlockedLinear
        elif type(module) is ViTScratchMLP:
            module.__class__ = FasterMLP
        elif _has_class_token_to_compute_alone(module):
            module.layers[-1].__class__ = FasterLayer
        elif type(module) is ViTScratchAttention:
            module.__class__ = FasterAttention
        is_classifier = getattr(type(module), "forward", None) is ViTScratchForImageClassification.forward
        if is_classifier and _class_token_hook not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_class_token_hook, with_kwargs=True)
    return model


def undo_speed_up(model: Model) -> Model:
    """Undoes `speed_up`, in place."""
    for module in model.modules():
        if type(module) in _FASTER:
            module.__class__ = type(module).__base__
            module.__dict__.pop("_blocked", None)
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _class_token_hook]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    return model


# Precision ------------------------------------------------------------------------------------------------------------


# From this gain on, bfloat16 is worth the digits that it loses.
WORTH_IT = 1.5


@functools.cache
def bfloat16_gain() -> float:
    """How many times as fast this CPU multiplies matrices in bfloat16 as in float32: measured, in some milliseconds."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix, times = torch.ones(512, 512, dtype=dtype), []
        for _ in range(6):
            begin = time.perf_counter()
            F.linear(matrix, matrix)
            times.append(time.perf_counter() - begin)
        best[dtype] = min(times)
    return best[torch.float32] / best[torch.bfloat16]


def precision_advice(device: torch.device, has_half: bool, flag: str) -> str | None:
    """A line for who computes on a CPU in the slower one of float32 and bfloat16; `flag`: what asks for bfloat16."""
    if device.type != "cpu":
        return None
    gain = bfloat16_gain()
    if has_half and gain < 1:
        return (
            f"{flag}: this processor multiplies bfloat16 {1 / gain:.1f} times more slowly than float32. Leave it out."
        )
    if not has_half and gain > WORTH_IT:
        return f"{flag} would take less time: this processor multiplies bfloat16 {gain:.1f} times as fast."
    return None
