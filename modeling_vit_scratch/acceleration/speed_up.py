# SPDX-License-Identifier: Apache-2.0
"""
Makes a model faster, or undoes it. The network's own files stay what one reads; the faster code is here:

* The last layer of a classifier computes the class token alone, also in training. The other tokens need keys and values
  only: 7 % fewer operations at 12 layers, with the same logits and gradients.
* Linear layers keep their weights in blocks for oneDNN, on a CPU without gradients.
* GELU works in place or within the product before it, without gradients: it saves a CPU 4 % of its time and more.
* Attention is two products and a softmax, in training in bfloat16 on a CPU.
"""

from typing import Any, TypeVar

from torch import nn

from ..encoder_vit_scratch import ViTScratchAttention, ViTScratchLayer, ViTScratchMLP
from ..modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchModel
from .layers import (
    BlockedLinear,
    FasterAttention,
    FasterLayer,
    FasterMLP,
    has_user_hooks,
    is_available,
    is_modified,
    is_quantised,
)


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
