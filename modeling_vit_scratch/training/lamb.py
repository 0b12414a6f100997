# SPDX-License-Identifier: Apache-2.0
"""LAMB (You et al., arXiv:1904.00962), with which DeiT III is trained: Adam's step, each scaled to its weight."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """
    LAMB as in apex's FusedLAMB and timm's Lamb, which the published recipes ran on: the gradients of all parameters are
    clipped together to a norm; decay is added to Adam's step; and in groups with decay, each step is scaled by the norm
    of the weight over its own. Groups without decay take Adam's step.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: of the running means of the gradient and of its square.
        eps: added to the root of the latter.
        weight_decay: of each group.
        max_grad_norm: what the gradients of all groups together are clipped to; 0 for no clipping.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and max_grad_norm >= 0 and all(0 <= b < 1 for b in betas)):
            raise ValueError(f"LAMB can't run with {lr=}, {betas=}, {eps=}, {weight_decay=}, {max_grad_norm=}.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.max_grad_norm = max_grad_norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step; with a closure, returns its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = self._clipping()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step(group, parameters, scale)
        return loss

    def _clipping(self) -> Tensor | float:
        """What gradients are divided by: at least 1. Stays on the device."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not gradients or not self.max_grad_norm:
            return 1.0
        return (torch.nn.utils.get_total_norm(gradients) / self.max_grad_norm).clamp(min=1.0)

    def _step(self, group: dict[str, Any], parameters: list[Tensor], scale: Tensor | float) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states, (beta1, beta2) = [self.state[parameter] for parameter in parameters], group["betas"]
        means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        gradients = torch._foreach_div([parameter.grad for parameter in parameters], scale)
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        for state in states:
            state["step"] += 1
        step = states[0]["step"].item()  # on the CPU: nothing waits
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(means, 1 - beta1**step)
        torch._foreach_div_(updates, denominators)
        if group["weight_decay"]:
            torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
            norms, lengths = torch._foreach_norm(parameters), torch._foreach_norm(updates)
            ratios = [
                torch.where((norm > 0) & (length > 0), norm / length, 1.0) for norm, length in zip(norms, lengths)
            ]
            torch._foreach_mul_(updates, ratios)
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])
