# SPDX-License-Identifier: Apache-2.0
"""Examples to a batch. Mixup and CutMix live here because they need the batch."""

import math
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate


# Keeps these random numbers apart from those of the images' own augmentation, which has the same seed and epoch.
_STREAM = 0x6D6978


def mixup(pixel_values: Tensor, targets: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """
    weight x + (1 - weight) x', where x' is the image before in the batch (Zhang et al., arXiv:1710.09412).

    Args:
        pixel_values: (B, C, H, W).
        targets: probabilities (B, K).
    """

    def mix(values: Tensor) -> Tensor:
        return values.roll(1, 0).mul_(1.0 - weight).add_(values * weight)

    return mix(pixel_values), mix(targets)


def cutmix(pixel_values: Tensor, targets: Tensor, weight: float, column: int, row: int) -> tuple[Tensor, Tensor]:
    """
    A rectangle of about (1 - weight) of the area comes from the image before in the batch (Yun et al.,
    arXiv:1905.04899). It is cut at the border; the labels are mixed by the area that is left of it.

    Args:
        pixel_values: (B, C, H, W).
        targets: probabilities (B, K).
        weight: 0 to 1.
        column, row: the centre of the rectangle in pixels.
    """
    height, width = pixel_values.shape[-2:]
    half = 0.5 * math.sqrt(1.0 - weight)
    half_width, half_height = int(half * width), int(half * height)
    left, right = max(column - half_width, 0), min(column + half_width, width)
    top, bottom = max(row - half_height, 0), min(row + half_height, height)
    mixed = pixel_values.clone()
    mixed[..., top:bottom, left:right] = pixel_values.roll(1, 0)[..., top:bottom, left:right]
    kept = 1.0 - (right - left) * (bottom - top) / (width * height)
    return mixed, targets.roll(1, 0).mul_(1.0 - kept).add_(targets * kept)


class MixingCollator:
    """
    Batches with Mixup, CutMix, or one of them by chance, and labels that are probabilities, (B, K), rows of sum 1.

    The arithmetic is torchvision's (`transforms.v2.MixUp` and `CutMix`): one weight for a batch, drawn from
    Beta(alpha, alpha), and each image with the one before it. The random numbers are a function of the seed, the epoch
    and the images of the batch: the same after a resumption, and for any number of worker processes. Every batch of a
    process is mixed for itself, so the number of processes and of accumulated batches matters, as everywhere.

    Examples without the key "key", those of the evaluation, are batched as they are.

    Args:
        num_labels: K.
        mixup_alpha, cutmix_alpha: 0 for none of it. Both: each is as likely.
        label_smoothing: this share of the probability is spread over all labels. Here, since the Trainer's own can't
            smooth probabilities.
    """

    def __init__(
        self, num_labels: int, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0, label_smoothing: float = 0.0
    ) -> None:
        if min(mixup_alpha, cutmix_alpha) < 0 or max(mixup_alpha, cutmix_alpha) == 0:
            raise ValueError(
                f"mixup_alpha={mixup_alpha:g} and cutmix_alpha={cutmix_alpha:g} must not be negative, and one must be "
                "above 0."
            )
        self.num_labels, self.label_smoothing = num_labels, label_smoothing
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        parts = [f"{name} {alpha:g}" for name, alpha in (("Mixup", mixup_alpha), ("CutMix", cutmix_alpha)) if alpha]
        self.description = " or ".join(parts)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """
        Args:
            examples: of "pixel_values" (C, H, W), "labels", and "key": seed, epoch and index of the image.

        Returns:
            "pixel_values" (B, C, H, W) and "labels": (B, K) with keys, (B,) without.
        """
        if "key" not in examples[0]:
            return default_collate(examples)
        keys = [example["key"] for example in examples]
        batch = default_collate([{name: example[name] for name in ("pixel_values", "labels")} for example in examples])
        targets = F.one_hot(batch["labels"], self.num_labels).float()
        if self.label_smoothing:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / self.num_labels
        seed, epoch, _ = keys[0]
        generator = np.random.default_rng((_STREAM, seed, epoch, *(index for _, _, index in keys)))
        pixel_values, labels = self.mix(batch["pixel_values"], targets, generator)
        return {"pixel_values": pixel_values, "labels": labels}

    def mix(self, pixel_values: Tensor, targets: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """pixel_values (B, C, H, W) and targets (B, K), mixed with what the generator gives."""
        both = self.mixup_alpha and self.cutmix_alpha
        use_cutmix = generator.random() < 0.5 if both else bool(self.cutmix_alpha)
        alpha = self.cutmix_alpha if use_cutmix else self.mixup_alpha
        weight = float(generator.beta(alpha, alpha))
        if not use_cutmix:
            return mixup(pixel_values, targets, weight)
        height, width = pixel_values.shape[-2:]
        return cutmix(pixel_values, targets, weight, int(generator.integers(width)), int(generator.integers(height)))
