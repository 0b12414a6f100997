# SPDX-License-Identifier: Apache-2.0
"""
Losses, class weights, learning rates and decay of parameters, LAMB, and the average of the weights.

A loss is a sum over images divided by the images of the whole update: neither accumulation nor the number of processes
changes it. Schedules and other optimizers are the stock ones. `--lr_scheduler_type cosine`, and `polynomial` with
`--lr_scheduler_kwargs '{"lr_end": 1e-5}'`, are `create_learning_rate_schedule` of the paper's code to 1e-9 (tested);
`--optim sgd --optim_args momentum=0.9` is its optimizer.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, TrainerState

from ..common.errors import InputError
from ..distillation.teacher import PROJECTION


class ClassificationLoss:
    """
    For `Trainer(compute_loss_func=)`, in float32: "softmax", cross-entropy; "sigmoid", binary cross-entropy summed over
    classes, as in the pretraining of the paper and AugReg (big_vision, utils.py: sigmoid_xent); "bce", its mean, with
    a target of 1 for every class in a mixed image (Wightman et al., arXiv:2110.00476, and DeiT III).

    `label_smoothing` is the fraction of the probability spread over all classes, for labels that are classes. With
    `class_weights` (K,) a mixed image has the mean weight of its classes by their fractions.
    """

    def __init__(
        self, kind: str, num_labels: int, label_smoothing: float = 0.0, class_weights: np.ndarray | None = None
    ) -> None:
        self.kind, self.num_labels, self.label_smoothing = kind, num_labels, label_smoothing
        weights = np.ones(num_labels) if class_weights is None else class_weights
        self.class_weights = torch.tensor(weights, dtype=torch.float32)

    def __call__(
        self, outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """
        From "logits" (B, K) and labels: classes (B,) or their probabilities (B, K). `num_items_in_batch` are the
        entries of `labels` in all batches of the update, None for this batch alone.
        """
        logits, is_classes = outputs["logits"].float(), not torch.is_floating_point(labels)
        targets = labels.float()
        if is_classes:
            targets = F.one_hot(labels.long(), self.num_labels).float()
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / self.num_labels
        weights = self.class_weights.to(logits.device)
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
    Binary cross-entropy of images with any number of labels, for `Trainer(compute_loss_func=)`, in float32: its sum
    over labels for "sigmoid", else the mean. `label_smoothing` is the fraction of the probability spread over "has the
    label" and "does not"; `positive_weights` (K,) are torch's `pos_weight`.
    """

    def __init__(self, kind: str, label_smoothing: float = 0.0, positive_weights: np.ndarray | None = None) -> None:
        self.kind, self.label_smoothing = kind, label_smoothing
        self.positive_weights = None if positive_weights is None else torch.tensor(positive_weights).float()

    def __call__(
        self, outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As `ClassificationLoss`, with labels (B, K) from 0 to 1."""
        logits, weights = outputs["logits"].float(), self.positive_weights
        targets = labels.float() * (1 - self.label_smoothing) + self.label_smoothing / 2
        weights = None if weights is None else weights.to(logits.device)
        total = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="sum")
        count = labels.numel() if num_items_in_batch is None else num_items_in_batch
        total = total / (count.to(total.device) if torch.is_tensor(count) else count)
        return total * labels.shape[1] if self.kind == "sigmoid" else total


def positive_weights(given: list[str], labels: np.ndarray) -> np.ndarray:
    """
    The weights (K,) of `--class_weights` for images with several labels (N, K), 0 or 1: torch's `pos_weight`.
    "balanced" is the ratio of images without and with a label, or 1 if that is 0 or infinite. Raises InputError for
    other values than that or K positive numbers.
    """
    if given != ["balanced"]:
        return _read_weights(given, labels.shape[1])
    counts = labels.sum(axis=0, dtype=np.float64)
    others, both = len(labels) - counts, (counts > 0) & (counts < len(labels))
    return np.divide(others, counts, out=np.ones_like(counts), where=both)


def class_weights(given: list[str], labels: list[int], num_labels: int) -> np.ndarray:
    """
    The weights (K,) of `--class_weights`, with a mean over the training images of 1. "balanced" is the inverse of a
    class's frequency, 0 without training images. Raises InputError for other values than that or K positive numbers.

    The sum of weighted losses is divided by the number of images. `torch.nn.CrossEntropyLoss(weight)` divides by the
    weights in the batch, so that the weight of an image depends on its batch; over the whole training set both agree.
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
        raise InputError(f"--class_weights {' '.join(given)}: these are no numbers. {way_out}") from error
    if len(weights) != num_labels:
        raise InputError(f"--class_weights has {len(weights)} values for {num_labels} labels. {way_out}")
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise InputError(f"--class_weights {' '.join(given)}: not all are positive. {way_out}")
    return weights


def decay_parameter_names(model: nn.Module) -> list[str]:
    """
    The kernels of dense layers and convolutions, as in the paper's code: no biases, norms, scales, tokens or positions.
    The stock Trainer decays the last two.
    """
    kernels = (nn.Linear, nn.Conv2d)
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kernels)]


def is_head(name: str) -> bool:
    """Whether a weight belongs to a classifier."""
    return name.startswith(("classifier.", "distillation_classifier."))


def is_temporary(name: str) -> bool:
    """Whether a weight serves training alone: of an adapter, or of the projection that a teacher's features need."""
    return ".lora_" in name or name.startswith(PROJECTION)


def layer_number(name: str, num_layers: int) -> int:
    """As in BEiT (Bao et al., arXiv:2106.08254) and MAE: 0 for embeddings, 1 to L for layers, L + 1 after them."""
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
    An optimizer's groups of trainable parameters: "params", "weight_decay", "lr" and "layer", e.g. "embeddings",
    "layer 3", "head". The Trainer reports the rate of the first group, so those with the full rate come first.
    `layer_decay` is the rate of a layer relative to the next one.
    """
    num_layers, decaying = model.config.num_hidden_layers, set(decay_parameter_names(model))
    labels = {0: "embeddings", num_layers + 2: "head"}
    labels[num_layers + 1] = "everything else" if layer_decay == 1.0 else "after the layers"
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        number = num_layers + 2 if is_head(name) else layer_number(name, num_layers)
        rate = head_learning_rate_multiplier if is_head(name) else layer_decay ** (num_layers + 1 - number)
        if layer_decay == 1.0 and rate == 1.0:
            number = num_layers + 1  # one group for all with the same rate
        decay, label = weight_decay if name in decaying else 0.0, labels.get(number, f"layer {number}")
        new = {"params": [], "weight_decay": decay, "lr": learning_rate * rate, "layer": label}
        groups.setdefault((number, name in decaying), new)["params"].append(parameter)
    # The last layers first, a head with its own rate last; kernels before the rest.
    order = sorted(groups, key=lambda key: (key[0] > num_layers + 1, -key[0], not key[1]))
    return [groups[key] for key in order]


def describe_groups(groups: list[dict[str, Any]]) -> str:
    """A table of the parameters that decay and those that don't, with their learning rates."""
    rows: dict[tuple[str, float], dict[bool, int]] = {}
    decay = max((group["weight_decay"] for group in groups), default=0.0)
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        row = rows.setdefault((group["layer"], group["lr"]), {True: 0, False: 0})
        row[group["weight_decay"] > 0] += count
    lines = [f"{'parameters':<18}{'learning rate':>14}{f'decay {decay:g}':>16}{'no decay':>12}"]
    lines += [f"{layer:<18}{rate:>14.3g}{row[True]:>16,}{row[False]:>12,}" for (layer, rate), row in rows.items()]
    return "\n".join(lines)


def describe_trained(model: PreTrainedModel, optimizer_states: int) -> str | None:
    """How many parameters are trained, and what that saves; None if all are."""
    total, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    if trained == total:
        return None
    here, all_of_them = (4 * (1 + optimizer_states) * count / 1e6 for count in (trained, total))  # in float32
    return (
        f"Trained: {trained:,} of {total:,} parameters ({100 * trained / total:.2g} %); their gradients and optimizer "
        f"states take {here:,.1f} MB, those of all {all_of_them:,.1f} MB."
    )


class Lamb(torch.optim.Optimizer):
    """
    LAMB (You et al., arXiv:1904.00962), the optimizer of DeiT III, as in apex's FusedLAMB and timm's Lamb. It clips all
    gradients together to `max_grad_norm`, if that is not 0, and takes Adam's step. In groups with decay, the decay is
    added to the step, which is then scaled by the norm of its weight over its own. Other arguments are AdamW's.
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
        trained = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        gradients, scale = [parameter.grad for parameters in trained for parameter in parameters], 1.0
        if gradients and self.max_grad_norm:  # the scale stays on the device
            scale = (torch.nn.utils.get_total_norm(gradients) / self.max_grad_norm).clamp(min=1.0)
        for group, parameters in zip(self.param_groups, trained):
            if parameters:
                self._step(group, parameters, scale)
        return loss

    def _step(self, group: dict[str, Any], parameters: list[Tensor], scale: Tensor | float) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                mean, square = torch.zeros_like(parameter), torch.zeros_like(parameter)
                self.state[parameter] = {"step": torch.zeros(()), "exp_avg": mean, "exp_avg_sq": square}
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
            pairs = zip(norms, lengths)
            ratios = [torch.where((norm > 0) & (length > 0), norm / length, 1.0) for norm, length in pairs]
            torch._foreach_mul_(updates, ratios)
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])


class WeightAverage(TrainerCallback):
    """
    An exponential moving average of the weights, which is evaluated and becomes the final model (Polyak averaging; the
    paper, section 4.1, uses 0.9999): after every step, average = decay * average + (1 - decay) * weights, in float32.

    `warmup` lowers the decay to at most (1 + n) / (10 + n) at step n, as TensorFlow's ExponentialMovingAverage does.
    Without it, a run of fewer than 1 / (1 - decay) steps ends close to its initial weights.

    The trainer calls `save` in every process, sets `start_from`, and evaluates inside of `applied_to`. With FSDP2 every
    process averages its own shards and writes them, so that any number of processes can resume.
    """

    FILE, SHARDS = "average.safetensors", "average_fsdp_0"

    def __init__(self, decay: float, warmup: bool = True) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"The decay {decay:g} of the weights' average must lie between 0 and 1, e.g. 0.9999.")
        self.decay, self.warmup = decay, warmup
        self.average: dict[str, Tensor] = {}
        self.start_from: str | None = None  # a checkpoint
        self.is_active = False

    def on_train_begin(self, *_: Any, model: nn.Module, **kwargs: Any) -> None:
        self.average = {name: weight.detach().float().clone() for name, weight in _weights(model).items()}
        if self.start_from is not None:
            self._load(self.start_from)
        self.is_active = True

    @torch.no_grad()
    def on_step_end(self, args: Any, state: TrainerState, *_: Any, model: nn.Module, **kwargs: Any) -> None:
        average, weights = (list(map(_own, tensors.values())) for tensors in (self.average, _weights(model)))
        weights = [weight.detach().float() for weight in weights]
        step = state.global_step
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        torch._foreach_lerp_(average, weights, 1.0 - decay)

    def on_train_end(self, args: Any, state: TrainerState, *_: Any, model: nn.Module, **kwargs: Any) -> None:
        """The model becomes the average, or that of the best checkpoint if the Trainer has loaded it."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(state.best_model_checkpoint)
        _fill(model, self.average)
        self.is_active = False

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights inside of the `with` block, and its own afterwards."""
        if not self.is_active:
            yield
            return
        own = {name: weight.detach().clone() for name, weight in _weights(model).items()}
        _fill(model, self.average)
        try:
            yield
        finally:
            _fill(model, own)

    def save(self, folder: str, is_writer: bool = True) -> None:
        """Writes the average into a checkpoint: from the writer's process, or with shards from all."""
        if not self.is_active:
            return  # after training, the model is the average
        if self.is_sharded:
            writer = checkpoint.FileSystemWriter(Path(folder, self.SHARDS))
            checkpoint.save({"model": self.average}, storage_writer=writer)
        elif is_writer:
            save_file({name: weight.contiguous() for name, weight in self.average.items()}, Path(folder, self.FILE))

    @property
    def is_sharded(self) -> bool:
        """Whether every process has a part of the average."""
        return any(isinstance(weight, DTensor) for weight in self.average.values())

    def _load(self, folder: str) -> None:
        path = Path(folder, self.SHARDS if self.is_sharded else self.FILE)
        if not path.exists():
            raise InputError(
                f"The checkpoint {folder} has no average of the weights ({path.name}): its run had no --ema_decay. "
                "Go on without it, too, or start a new run."
            )
        if self.is_sharded:
            checkpoint.load({"model": self.average}, storage_reader=checkpoint.FileSystemReader(path))
            return
        stored = load_file(path)
        for name, weight in self.average.items():
            weight.copy_(stored[name])


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, also frozen ones: the average is a whole model. This network has no buffers that change."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation it may keep whole weights, and changes of its shards would not count
    return dict(model.named_parameters())


def _own(tensor: Tensor) -> Tensor:
    """The local shard of a tensor, in shared memory; without FSDP the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _fill(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, weight in _weights(model).items():
        _own(weight).copy_(_own(values[name]))
