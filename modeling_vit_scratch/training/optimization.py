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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.errors import InputError
from ..data.splits import ImageData
from ..data.streams import ImageStream
from .arguments import ImageTrainingArguments
from .flags import LOSSES


class ClassificationLoss:
    """
    For `Trainer(compute_loss_func=)`; in float32.

    Args:
        kind: "softmax", cross-entropy; "sigmoid", binary cross-entropy summed over classes, with which the paper and
            AugReg were pre-trained (big_vision, utils.py: sigmoid_xent); "bce", its mean over classes, where every
            class that has a part in a mixed image is a whole one (Wightman et al., arXiv:2110.00476, and DeiT III).
        num_labels: K.
        label_smoothing: of labels that are classes: this share of the probability is spread over all.
        class_weights: (K,), see `class_weights`. An image counts as much as its class does, a mixed one as its classes
            do by their shares. Default: all count alike.
    """

    def __init__(
        self, kind: str, num_labels: int, label_smoothing: float = 0.0, class_weights: np.ndarray | None = None
    ) -> None:
        if kind not in LOSSES:
            raise ValueError(f"The loss {kind!r} is none of {', '.join(LOSSES)}.")
        self.kind, self.num_labels, self.label_smoothing = kind, num_labels, label_smoothing
        self.class_weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)

    def __call__(
        self, outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """
        Args:
            outputs: with `logits` (B, K).
            labels: classes (B,), or probabilities of the classes (B, K).
            num_items_in_batch: the entries of `labels` in all batches of the update; None for this batch alone.
        """
        logits, is_classes = outputs["logits"].float(), not torch.is_floating_point(labels)
        targets = labels.float()
        if is_classes:
            targets = F.one_hot(labels.long(), self.num_labels).float()
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / self.num_labels
        weights = torch.ones(self.num_labels) if self.class_weights is None else self.class_weights
        weights = weights.to(logits.device)
        if self.kind == "softmax":
            losses = -(targets * weights * logits.log_softmax(dim=1)).sum(dim=1)  # (B,), as torch weights it
        else:
            present = targets if self.kind == "sigmoid" else targets.gt(0).float()
            entropies = F.binary_cross_entropy_with_logits(logits, present, reduction="none")  # (B, K)
            losses = (targets @ weights) * (entropies.sum(dim=1) if self.kind == "sigmoid" else entropies.mean(dim=1))
        if num_items_in_batch is None:
            return losses.mean()
        images = num_items_in_batch if is_classes else num_items_in_batch / self.num_labels
        return losses.sum() / (images.to(losses.device) if torch.is_tensor(images) else images)


class MultiLabelLoss:
    """
    Binary cross-entropy of every label for itself, for `Trainer(compute_loss_func=)`; in float32.

    Args:
        kind: "sigmoid" for the sum over the labels of an image, anything else for the mean.
        label_smoothing: this share of the probability is spread over "has it" and "has it not".
        positive_weights: (K,), how much more it counts that an image has the label than that it has not: see
            `positive_weights`. Default: as much.
    """

    def __init__(self, kind: str, label_smoothing: float = 0.0, positive_weights: np.ndarray | None = None) -> None:
        self.kind, self.label_smoothing = kind, label_smoothing
        self.positive_weights = None if positive_weights is None else torch.tensor(positive_weights).float()

    def __call__(
        self, outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """
        Args:
            outputs: with `logits` (B, K).
            labels: (B, K), 0 to 1.
            num_items_in_batch: the entries of `labels` in all batches of the update; None for this batch alone.
        """
        logits, weights = outputs["logits"].float(), self.positive_weights
        targets = labels.float() * (1 - self.label_smoothing) + self.label_smoothing / 2
        weights = None if weights is None else weights.to(logits.device)
        total = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="sum")
        count = labels.numel() if num_items_in_batch is None else num_items_in_batch
        total = total / (count.to(total.device) if torch.is_tensor(count) else count)
        return total * labels.shape[1] if self.kind == "sigmoid" else total


def positive_weights(given: list[str], labels: np.ndarray) -> np.ndarray:
    """
    The weights of `--class_weights` where images have several labels: torch's `pos_weight`.

    Args:
        given: "balanced", for the images without a label over those with it; or K positive numbers.
        labels: of the training images, (N, K), 0 and 1.

    Returns:
        (K,) float64; "balanced" gives a label that no training image has, or all have, 1.

    Raises:
        ValueError: for anything else.
    """
    if given != ["balanced"]:
        return _read_weights(given, labels.shape[1])
    counts = labels.sum(axis=0, dtype=np.float64)
    others, both = len(labels) - counts, (counts > 0) & (counts < len(labels))
    return np.divide(others, counts, out=np.ones_like(counts), where=both)


def class_weights(given: list[str], labels: list[int], num_labels: int) -> np.ndarray:
    """
    The weights of `--class_weights`, such that their mean over the training images is 1.

    The sum of weighted losses is then divided by the number of images. Over the whole training set that is
    `torch.nn.CrossEntropyLoss(weight)`; in a batch it is better. Torch divides by the weights of the batch, so that an
    image would count more in one batch than in another, and alone as much as any: here it always counts the same.

    Args:
        given: "balanced", for the inverse of the number of images that a class has; or K numbers in the order of the
            labels, of which the ratios count.
        labels: of the training images.
        num_labels: K.

    Returns:
        (K,) float64. Where the training set lacks a class, "balanced" gives it 0.

    Raises:
        ValueError: for anything else.
    """
    counts = np.bincount(labels, minlength=num_labels).astype(np.float64)
    if given == ["balanced"]:
        weights = np.divide(1.0, counts, out=np.zeros_like(counts), where=counts > 0)
    else:
        weights = _read_weights(given, num_labels)
    return weights * (counts.sum() / (weights @ counts))


def _read_weights(given: list[str], num_labels: int) -> np.ndarray:
    way_out = f"Give 'balanced', or {num_labels} positive numbers, one for each label in their order."
    try:
        weights = np.array([float(word) for word in given])
    except ValueError as error:
        raise ValueError(f"--class_weights {' '.join(given)}: these are no numbers. {way_out}") from error
    if len(weights) != num_labels:
        raise ValueError(f"--class_weights has {len(weights)} values for {num_labels} labels. {way_out}")
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise ValueError(f"--class_weights {' '.join(given)}: not all are positive. {way_out}")
    return weights


def build_loss(data: ImageData, arguments: ImageTrainingArguments) -> ClassificationLoss | MultiLabelLoss | None:
    """What --loss and --class_weights ask for; None for the model's own loss. Raises InputError if it can't be had."""
    recipe, smoothing = arguments.recipe_arguments, arguments.label_smoothing_factor
    if not data.is_multi_label and (recipe.mixup or recipe.cutmix):
        smoothing = 0.0  # the labels of mixed images are smooth already
    if recipe.loss == "softmax" and not recipe.class_weights and not (data.is_multi_label and smoothing):
        return None
    weights = None
    if recipe.class_weights:
        if isinstance(data.train, ImageStream):
            raise InputError("--class_weights need the labels of all training images, which a stream does not have.")
        try:
            if data.is_multi_label:
                weights = positive_weights(recipe.class_weights, data.train.labels)
            else:
                weights = class_weights(recipe.class_weights, data.train.labels, len(data.label_names))
        except ValueError as error:
            raise InputError(str(error)) from error
    if data.is_multi_label:
        return MultiLabelLoss(recipe.loss, smoothing, weights)
    return ClassificationLoss(recipe.loss, len(data.label_names), smoothing, weights)


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
