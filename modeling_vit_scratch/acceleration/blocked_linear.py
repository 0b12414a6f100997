# SPDX-License-Identifier: Apache-2.0
"""
Faster inference on a CPU: linear layers with weights that are reordered once into the blocks of oneDNN.

For float32 PyTorch calls MKL, which leaves a tenth of an AMD core unused; for bfloat16 it calls oneDNN, which reorders
the weights in every pass. torch.compile with freezing does the same, but needs a compiler.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn


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
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if torch.is_grad_enabled() or is_traced or torch.is_autocast_enabled("cpu") or not self._fits(inputs):
            return super().forward(inputs)
        return torch.ops.mkldnn._linear_pointwise(inputs, self._blocked_weight(), self.bias, "none", [], "")

    def _fits(self, inputs: Tensor) -> bool:
        weight = self.weight
        is_here = inputs.device.type == weight.device.type == "cpu" and inputs.dtype == weight.dtype
        is_small = weight.dtype == torch.float32 and inputs.numel() * self.out_features < SMALL
        return is_here and not is_small and is_available(weight.dtype)

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
