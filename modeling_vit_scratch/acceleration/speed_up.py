# SPDX-License-Identifier: Apache-2.0
"""
Makes a model faster, or undoes it. The network's own files stay what one reads; the faster code is here:

* The last layer of a classifier computes the class token alone, also in training. The other tokens need keys and values
  only: 7 % fewer operations at 12 layers, with the same logits and gradients.
* Linear layers keep their weights in blocks for oneDNN, on a CPU without gradients (`blocked_linear.py`).
* GELU works in place, without gradients: it saves a CPU 4 % of its time.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.activations import GELUActivation, GELUTanh
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..encoder_vit_scratch import ViTScratchAttention, ViTScratchLayer, ViTScratchMLP, eager_attention_forward
from ..modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchModel
from .blocked_linear import BlockedLinear, is_available


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


# Arguments of a classifier that ask for nothing beside logits and loss.
_LOGITS_ONLY = {"pixel_values", "labels", "num_items_in_batch", "return_dict", "interpolate_pos_encoding"}


class ClassTokenAttention(ViTScratchAttention):
    """Attention with queries of the first `num_queries` tokens only, if given: (B, T, D) -> (B, Q, D)."""

    def forward(
        self, hidden_states: Tensor, *args: Any, num_queries: int | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if num_queries is None:
            return super().forward(hidden_states, *args, **kwargs)
        heads = (hidden_states.shape[0], -1, self.heads, hidden_states.shape[-1] // self.heads)
        query, key, value = (part.reshape(heads).transpose(1, 2) for part in self._project(hidden_states, num_queries))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        attended, weights = attend(
            self, self.q_norm(query), self.k_norm(key), value, None, scaling=self.scaling, dropout=dropout
        )
        return self.dropout(self.proj(attended.flatten(2))), weights  # (B, Q, A, E) -> (B, Q, D)

    def _project(self, hidden_states: Tensor, num_queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> queries (B, Q, D), keys and values (B, T, D)"""
        if type(self.qkv) not in (nn.Linear, BlockedLinear) or is_modified(self.qkv):
            query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
            return query[:, :num_queries], key, value
        width, weight, bias = hidden_states.shape[-1], self.qkv.weight, self.qkv.bias
        q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
        query = F.linear(hidden_states[:, :num_queries], weight[:width], q_bias)
        return query, *F.linear(hidden_states, weight[width:], kv_bias).chunk(2, dim=-1)


class ClassTokenLayer(ViTScratchLayer):
    """A layer that computes the first `num_queries` tokens only, if given: (B, T, D) -> (B, Q, D)."""

    def forward(self, hidden_states: Tensor, *args: Any, num_queries: int | None = None, **kwargs: Any) -> Tensor:
        if num_queries is None:
            return super().forward(hidden_states, *args, **kwargs)
        attended, _ = self.attention(self.layernorm_before(hidden_states), num_queries=num_queries)
        hidden_states = hidden_states[:, :num_queries] + self.drop_path(self.layer_scale_attention(attended))
        transformed = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.layer_scale_mlp(transformed))


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
    if type(last) is not ClassTokenLayer or type(attention := last.attention) is not ClassTokenAttention:
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


class InPlaceMLP(ViTScratchMLP):
    """An MLP whose GELU overwrites its input, if no gradient needs that and nobody else may hold it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        approximation = _gelu_approximation(self.activation)
        is_stock = type(self.fc1) in (nn.Linear, BlockedLinear) and approximation is not None
        if not is_stock or torch.is_grad_enabled() or is_traced or any(map(is_modified, (self.fc1, self.activation))):
            return super().forward(hidden_states)
        activated = torch.ops.aten.gelu_(self.fc1(hidden_states), approximate=approximation)
        return self.dropout(self.fc2(self.dropout(activated)))


def _gelu_approximation(activation: nn.Module) -> str | None:
    """torch's name for the kind of GELU; None for other activations."""
    if type(activation) is GELUActivation and activation.act is F.gelu:
        return "none"
    return "tanh" if type(activation) is GELUTanh else None


Model = TypeVar("Model", bound=nn.Module)

_FASTER = (BlockedLinear, InPlaceMLP, ClassTokenLayer, ClassTokenAttention)


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
            module.__class__ = InPlaceMLP
        elif _has_class_token_to_compute_alone(module):
            module.layers[-1].__class__, module.layers[-1].attention.__class__ = ClassTokenLayer, ClassTokenAttention
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
