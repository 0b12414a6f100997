# SPDX-License-Identifier: Apache-2.0
"""
Who looks at a layer or has changed it: what is faster goes around nobody.

Asked in every pass, so that hooks which come after `speed_up` count too; that takes a microsecond for a layer.
"""

from collections.abc import Iterable, Mapping

from torch import nn
from torch.nn.modules import module as torch_module


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
