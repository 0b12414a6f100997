# SPDX-License-Identifier: Apache-2.0
"""
One call that makes a model faster, and one that undoes it.

The network computes what its page says, and every tool sees it do so. What is faster and not what one reads is here:

* the last layer of a classifier computes the class token alone (`class_token.py`), also in training;
* linear layers have their weights in blocks for oneDNN, on a CPU without gradients (`blocked_linear.py`);
* the MLP's GELU works in place, without gradients (`mlp.py`).
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


# Their hooks move weights, count operations or record what was asked for, and need not see every token.
_LIBRARIES = ("torch.", "transformers.", "accelerate.")
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def _hooks(layer: nn.Module) -> tuple[Mapping, ...]:
    return layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks


def _are_of_users(hooks: Iterable[Mapping]) -> bool:
    functions = (function for mapping in hooks if mapping for function in mapping.values())
    return any(not (getattr(function, "__module__", None) or "").startswith(_LIBRARIES) for function in functions)


def is_modified(layer: nn.Module) -> bool:
    """Whether a layer has hooks, or another forward than its class: whoever computes in its place would miss them."""
    return any(_hooks(layer)) or "forward" in layer.__dict__ or (any(_GLOBAL_HOOKS) and _are_of_users(_GLOBAL_HOOKS))


def is_watched(layers: Iterable[nn.Module]) -> bool:
    """Whether a hook or forward of a user is on one of the layers, and so has to see every token."""
    for layer in layers:
        if "forward" in layer.__dict__ or (any(_hooks(layer)) and _are_of_users(_hooks(layer))):
            return True
    return any(_GLOBAL_HOOKS) and _are_of_users(_GLOBAL_HOOKS)


# What else a request may have without asking for more than logits and loss.
_HARMLESS = {"pixel_values", "labels", "num_items_in_batch", "return_dict", "interpolate_pos_encoding"}


class ClassTokenAttention(ViTScratchAttention):
    """Attention whose first `num_queries` tokens alone have queries, if that is given: (B, T, D) -> (B, Q, D)."""

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
    """A layer that computes its first `num_queries` tokens alone, if that is given: (B, T, D) -> (B, Q, D)."""

    def forward(self, hidden_states: Tensor, *args: Any, num_queries: int | None = None, **kwargs: Any) -> Tensor:
        if num_queries is None:
            return super().forward(hidden_states, *args, **kwargs)
        attended, _ = self.attention(self.layernorm_before(hidden_states), num_queries=num_queries)
        hidden_states = hidden_states[:, :num_queries] + self.drop_path(self.layer_scale_attention(attended))
        transformed = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.layer_scale_mlp(transformed))


def can_compute_class_token_alone(encoder: nn.Module) -> bool:
    """Whether the last layer of an encoder is the network's own, and its class token is what is pooled."""
    if type(encoder) is not ViTScratchModel or encoder.pooler is None or encoder.config.pooling != "cls":
        return False
    if encoder.config.position_embedding == "relative_1d":  # the last layer's would have no gradient, which DDP refuses
        return False
    last = encoder.layers[-1]
    return type(last) is ViTScratchLayer and type(last.attention) is ViTScratchAttention


def only_pooled_output(encoder: ViTScratchModel) -> dict[str, int]:
    """
    What to call an encoder with, beside the pixels, by someone who reads nothing but its `pooler_output` (and, for a
    distillation head, the second token): empty where that needs every token of the last layer or is no faster.
    """
    config, last = encoder.config, encoder.layers[-1]
    if type(last) is not ClassTokenLayer or type(attention := last.attention) is not ClassTokenAttention:
        return {}
    if last.training and (attention.attention_dropout or attention.dropout.p or last.mlp.dropout.p):
        return {}  # dropout would draw other numbers for fewer tokens
    if config.output_hidden_states or config.output_attentions:
        return {}
    if is_watched([encoder, encoder.layernorm, *encoder.pooler.modules(), *last.modules()]):
        return {}
    return {"num_queries": 2 if config.use_distillation_head else 1}


def ask_for_class_token(
    model: ViTScratchForImageClassification, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """A forward pre-hook of a classifier: where nothing but logits and loss is asked for, the class token is enough."""
    asked = {name for name, value in kwargs.items() if value is not None and value is not False}
    if len(args) > 2 or asked - _HARMLESS:
        return None
    return args, {**kwargs, **only_pooled_output(model.vit)}


class InPlaceMLP(ViTScratchMLP):
    """An MLP whose GELU writes over what it reads, where no gradient needs that."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        approximation = gelu_approximation(self.activation)
        if torch.is_grad_enabled() or is_traced or approximation is None or self._may_be_kept():
            return super().forward(hidden_states)
        activated = torch.ops.aten.gelu_(self.fc1(hidden_states), approximate=approximation)
        return self.dropout(self.fc2(self.dropout(activated)))

    def _may_be_kept(self) -> bool:
        """Whether somebody else may have what the first layer returns, or wants to see the activation."""
        is_known = type(self.fc1) in (nn.Linear, BlockedLinear)
        return not is_known or is_modified(self.fc1) or is_modified(self.activation)


def gelu_approximation(activation: nn.Module) -> str | None:
    """torch's name for the kind of GELU, None for anything else."""
    if type(activation) is GELUActivation and activation.act is F.gelu:
        return "none"
    return "tanh" if type(activation) is GELUTanh else None


Model = TypeVar("Model", bound=nn.Module)

_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    BlockedLinear: nn.Linear,
    InPlaceMLP: ViTScratchMLP,
    ClassTokenLayer: ViTScratchLayer,
    ClassTokenAttention: ViTScratchAttention,
}


def speed_up(model: Model) -> Model:
    """
    Makes a model faster, in place, until `undo_speed_up`. Nothing of it is saved: state dict, configuration and the
    files of `save_pretrained` stay as they are.

    Logits and gradients are those of before, up to the rounding of another order of sums. Whatever is asked for beside
    logits and loss (hidden states, attentions, masks) is computed as before, and so is training with dropout. Layers
    with adapters, hooks, quantisation or a replaced forward stay as they are, also when they get these later.

    Args:
        model: of any kind here, or a module that contains one.
    """
    for module in list(model.modules()):
        if type(module) is nn.Linear and is_available() and not is_modified(module):
            module.__class__ = BlockedLinear
        elif type(module) is ViTScratchMLP:
            module.__class__ = InPlaceMLP
        elif can_compute_class_token_alone(module):
            module.layers[-1].__class__, module.layers[-1].attention.__class__ = ClassTokenLayer, ClassTokenAttention
        is_classifier = getattr(type(module), "forward", None) is ViTScratchForImageClassification.forward
        if is_classifier and ask_for_class_token not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(ask_for_class_token, with_kwargs=True)
    return model


def undo_speed_up(model: Model) -> Model:
    """Makes a model, in place, what it was before `speed_up`."""
    for module in model.modules():
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
            module.__dict__.pop("_blocked", None)
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is ask_for_class_token]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    return model
