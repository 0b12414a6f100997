# SPDX-License-Identifier: Apache-2.0
"""What a recipe is, and what becomes of it with another batch size."""

import math
from dataclasses import dataclass
from typing import Any


IMAGENET = "--dataset_name ILSVRC/imagenet-1k"
LINEAR = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-5, "power": 1.0}}
COSINE = {"lr_scheduler_type": "cosine"}


@dataclass(frozen=True)
class Recipe:
    """
    A run.

    Attributes:
        name: for `--recipe`.
        source: where the numbers are from.
        batch_size: images in one step of the optimizer, over all processes and accumulated batches.
        fields: values of fields of the command line.
        data: the flags to go with it: what it was published for.
        expected: the published result, or what was measured here.
        price: what it costs, where that is known.
        differs: from the published run.
        script: which of scripts/ runs it.
    """

    name: str
    source: str
    batch_size: int
    fields: dict[str, Any]
    data: str
    expected: str = "not published"
    price: str = "not published"
    differs: str = ""
    script: str = "finetune"

    @property
    def command(self) -> str:
        """How to run it."""
        return f"accelerate launch scripts/{self.script}.py --recipe {self.name} {self.data}"

    def describe(self) -> str:
        """What a person wants to know before it runs."""
        lines = [f"{self.name}: {self.source}", f"    {self.command}"]
        lines += [f"    expected: {self.expected}", f"    price: {self.price}"]
        return "\n".join(lines + ([f"    differs from the published run: {self.differs}"] if self.differs else []))


def slug(variant: str) -> str:
    """The variant in the name of a recipe."""
    return variant.lower().replace("/", "").replace("+", "_")


def scale_learning_rate(rate: float, from_batch_size: int, to_batch_size: int, optimizer: str) -> float:
    """
    The rate for another batch size: in proportion to it for SGD (Goyal et al., arXiv:1706.02677), to its square root
    for Adam and its kin (Malladi et al., arXiv:2205.10287).
    """
    ratio = to_batch_size / from_batch_size
    return rate * (ratio if optimizer == "sgd" else math.sqrt(ratio))


def fit_batch_size(
    recipe: Recipe, per_device: int, processes: int, accumulation: int | None = None
) -> tuple[int, dict[str, Any]]:
    """
    How a recipe's batch is made on this machine, and what changes if it can't be.

    Args:
        per_device: images in a batch of one device.
        processes: how many devices there are.
        accumulation: batches for one step; None to choose what comes closest to the recipe.

    Returns:
        The accumulated batches, and for a total other than the recipe's the fields that change: the learning rate, and
        steps such that as many images are seen.
    """
    together = per_device * processes
    if accumulation is None:
        accumulation = max(1, round(recipe.batch_size / together))
    total, fields = together * accumulation, {}
    if total != recipe.batch_size:
        fields["learning_rate"] = scale_learning_rate(
            recipe.fields["learning_rate"], recipe.batch_size, total, recipe.fields.get("optim", "adamw_torch_fused")
        )
        if recipe.fields.get("max_steps", -1) > 0:
            fields["max_steps"] = max(1, round(recipe.fields["max_steps"] * recipe.batch_size / total))
        if recipe.fields.get("warmup_steps", 0.0) >= 1:
            fields["warmup_steps"] = float(max(1, round(recipe.fields["warmup_steps"] * recipe.batch_size / total)))
    return accumulation, fields
