# SPDX-License-Identifier: Apache-2.0
"""
Losses of classification beside the model's own: the paper's sigmoid, DeiT III's binary one, and weights of classes.

Each is a sum over images divided by the images of the whole update, so that neither accumulation nor the number of
processes changes it.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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
