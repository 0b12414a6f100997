# SPDX-License-Identifier: Apache-2.0
"""
Learning rates, batch size and length of a run whose command names neither its length nor its batch.

A run is a budget of steps, and a batch grows with the square root of the number of images: so a hundred images are seen
60 times each, and ten thousand 5 times. Rates fall with the width of the network. What this was measured on, beside a
grid of other settings and a linear probe: docs/measurements.md, by scripts/experiments/defaults.py.
"""

import math
from dataclasses import dataclass
from typing import Any


# A command that gives one of these keeps the fixed defaults.
LENGTH_AND_BATCH = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
FEW_HELD_OUT = 500  # fewer choose a checkpoint by their loss
SMALLEST_BATCH, LARGEST_BATCH = 16, 64
FRESH_HEAD_MULTIPLIER = 10.0  # it starts at zero, the rest is trained already


@dataclass(frozen=True)
class Start:
    """What a run starts from, or trains: its budget, and its learning rate at a width."""

    name: str
    steps: int
    epochs: tuple[int, int]  # at least and at most: each ends with an evaluation and a checkpoint
    learning_rate: float
    width: int  # above which the rate falls as 1 / width
    head_multiplier: float = 1.0  # of a fresh classifier


STARTS = {
    "checkpoint": Start("from a checkpoint", 600, (5, 60), 3e-4, 256, FRESH_HEAD_MULTIPLIER),
    "adapters": Start("adapters", 600, (5, 60), 1e-3, 256, 3.0),
    "head": Start("the classifier alone", 1500, (20, 100), 1e-2, 10**9),
    "scratch": Start("from scratch", 2400, (30, 200), 1e-3, 384),
}


def settings_from_data(
    start: str, images: int, width: int, has_fresh_head: bool, processes: int = 1
) -> dict[str, tuple[Any, str]]:
    """By flag the value and the reason, for so many training images and a network of this width."""
    rule = STARTS[start]
    batch = min(max(2 ** round(math.log2(images) / 2), SMALLEST_BATCH), LARGEST_BATCH)
    per_device = max(1, batch // processes)
    steps_per_epoch = -(-images // (per_device * processes))
    epochs = min(max(round(rule.steps / steps_per_epoch), rule.epochs[0]), rule.epochs[1])
    rate = float(f"{rule.learning_rate * min(1.0, rule.width / width):.2g}")
    among = "" if processes == 1 else f", shared by {processes} processes"
    found: dict[str, tuple[Any, str]] = {
        "per_device_train_batch_size": (
            per_device, f"about the square root of {images:,} images, {SMALLEST_BATCH} to {LARGEST_BATCH}{among}"
        ),
        "num_train_epochs": (
            float(epochs), f"about {rule.steps:,} steps {rule.name}, in {rule.epochs[0]} to {rule.epochs[1]} epochs"
        ),
        "learning_rate": (rate, f"{rule.name}, for a width of {width}"),
    }  # fmt: skip
    if rule.head_multiplier != 1.0 and has_fresh_head:
        found["head_learning_rate_multiplier"] = (rule.head_multiplier, "the classifier is new, the encoder is not")
    return found
