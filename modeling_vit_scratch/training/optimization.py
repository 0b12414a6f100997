# SPDX-License-Identifier: Apache-2.0
"""
Which weights learn how fast, which decay, and LAMB.

Schedules and all other optimizers are the stock ones: `--lr_scheduler_type cosine`, and `polynomial` with
`--lr_scheduler_kwargs '{"lr_end": 1e-5}'`, are `create_learning_rate_schedule` of the paper's code to 1e-9 (tested);
`--optim sgd --optim_args momentum=0.9` is its optimizer.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


HEADS = ("classifier.", "distillation_classifier.")


def decay_parameter_names(model: nn.Module) -> list[str]:
    """
    The kernels of dense layers and of convolutions: what the paper's code decays. No biases, norms, scales, tokens or
    positions; the stock Trainer decays the last two.
    """
    kernels = (nn.Linear, nn.Conv2d)
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kernels)]


def layer_number(name: str, num_layers: int) -> int:
    """
    Where a parameter is, from input to output: 0 for the embeddings, 1 to L for the layers of the encoder, L + 1 for
    all after them, as in BEiT (Bao et al., arXiv:2106.08254) and MAE.
    """
    if match := re.search(r"(?:^|\.)layers\.(\d+)\.", name):
        return int(match[1]) + 1
    if match := re.search(r"(?:^|\.)later_position_embeddings\.(\d+)\.", name):
        return int(match[1]) + 2  # the first is added before the second layer
    return 0 if re.search(r"(?:^|\.)embeddings\.", name) else num_layers + 1


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    head_learning_rate_multiplier: float = 1.0,
) -> list[dict[str, Any]]:
    """
    What an optimizer takes: the trainable parameters by learning rate and decay, those with the full rate first, since
    the Trainer reports the rate of the first group.

    Args:
        model: with `config.num_hidden_layers`.
        learning_rate: of the last layer.
        weight_decay: of the kernels; everything else has none.
        layer_decay: the rate of each layer is that of the next times this.
        head_learning_rate_multiplier: the classifier's rate is the learning rate times this.

    Returns:
        Groups with "params", "weight_decay", "lr", and for people "layer", e.g. "embeddings", "layer 3", "head".
    """
    num_layers, decaying = model.config.num_hidden_layers, set(decay_parameter_names(model))
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_head = name.startswith(HEADS)
        number = num_layers + 2 if is_head else layer_number(name, num_layers)
        rate = head_learning_rate_multiplier if is_head else layer_decay ** (num_layers + 1 - number)
        if layer_decay == 1.0 and rate == 1.0:
            number = num_layers + 1  # one group for all that learns alike
        group = groups.setdefault(
            (number, name in decaying),
            {
                "params": [],
                "weight_decay": weight_decay if name in decaying else 0.0,
                "lr": learning_rate * rate,
                "layer": _layer_label(number, num_layers, layer_decay),
            },
        )
        group["params"].append(parameter)
    # The last layers first, but for a head with a rate of its own; kernels before the rest.
    order = sorted(groups, key=lambda key: (key[0] > num_layers + 1, -key[0], not key[1]))
    return [groups[key] for key in order]


def _layer_label(number: int, num_layers: int, layer_decay: float) -> str:
    if number == num_layers + 2:
        return "head"
    if number == num_layers + 1:
        return "everything else" if layer_decay == 1.0 else "after the layers"
    return "embeddings" if number == 0 else f"layer {number}"


def describe_groups(groups: list[dict[str, Any]]) -> str:
    """A small table: what decays and what does not, and at which rate it learns."""
    rows: dict[tuple[str, float], dict[bool, int]] = {}
    decay = max((group["weight_decay"] for group in groups), default=0.0)
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        row = rows.setdefault((group["layer"], group["lr"]), {True: 0, False: 0})
        row[group["weight_decay"] > 0] += count
    lines = [f"{'parameters':<18}{'learning rate':>14}{f'decay {decay:g}':>16}{'no decay':>12}"]
    lines += [f"{layer:<18}{rate:>14.3g}{row[True]:>16,}{row[False]:>12,}" for (layer, rate), row in rows.items()]
    return "\n".join(lines)


class Lamb(torch.optim.Optimizer):
    """
    LAMB (You et al., arXiv:1904.00962), with which DeiT III is trained, as in apex's FusedLAMB and timm's Lamb: the
    gradients of all parameters are clipped together to a norm; decay is added to Adam's step; and in groups with decay,
    each step is scaled by the norm of the weight over its own. Groups without decay take Adam's step.

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
        with torch.enable_grad():
            loss = None if closure is None else closure()
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
