# SPDX-License-Identifier: Apache-2.0
"""
One call that makes a model faster, and one that undoes it.

The network computes what its page says, and every tool sees it do so. What is faster and not what one reads is here:

* the last layer of a classifier computes the class token alone (`class_token.py`), also in training;
* linear layers have their weights in blocks for oneDNN, on a CPU without gradients (`blocked_linear.py`);
* the MLP's GELU works in place, without gradients (`mlp.py`).
"""

from typing import TypeVar

from torch import nn

from ..encoder_vit_scratch import ViTScratchAttention, ViTScratchLayer, ViTScratchMLP
from ..modeling_vit_scratch import ViTScratchForImageClassification
from .blocked_linear import BlockedLinear, is_available
from .class_token import ClassTokenAttention, ClassTokenLayer, ask_for_class_token, can_compute_class_token_alone
from .hooks import is_modified
from .mlp import InPlaceMLP


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
