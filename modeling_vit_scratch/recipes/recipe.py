# SPDX-License-Identifier: Apache-2.0
"""Recipes, made from rows of a table, and their adaptation to another batch size."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """The settings of a run, for `--recipe`."""

    name: str
    what: str  # the kind of training
    trained_on: str  # the name of the data, for people
    source: str  # of the numbers
    batch_size: int  # images in an optimizer step, over all processes and accumulated batches
    fields: dict[str, Any]  # values of flags
    data: str  # flags of the published run's data
    model: str = "any"  # the starting point, if that is no --variant
    expected: str = "not published"  # the published result, or one measured here
    price: str = "not published"
    differs: str = ""  # from the published run
    script: str = "finetune"  # in scripts/

    def describe(self) -> str:
        """What a user wants to know before the run."""
        lines = [
            f"{self.name}: {self.source}",
            f"    accelerate launch scripts/{self.script}.py --recipe {self.name} {self.data}",
            f"    expected: {self.expected}",
            f"    price: {self.price}",
        ]
        return "\n".join(lines + ([f"    differs from the published run: {self.differs}"] if self.differs else []))


_ATTRIBUTES = {field.name for field in dataclasses.fields(Recipe)} - {"fields"}


def rows(shared: dict[str, Any], columns: str = "", *values: tuple[Any, ...]) -> list[Recipe]:
    """
    Recipes that share settings.

    Args:
        shared: attributes of `Recipe` and values of flags. Texts may contain columns in braces, and {slug}, the variant
            as it is written in names.
        columns: names of attributes and flags that differ; those in capitals are for texts only.
        values: of the columns, a tuple for each recipe. Without columns there is one recipe.
    """
    recipes = []
    for row in values or [()]:
        cells = dict(zip(columns.split(), row, strict=True))
        variant = cells.get("variant", cells.get("model", ""))
        cells["slug"] = variant.lower().replace("/", "").replace("+", "_")
        whole = {
            name: value.format(**cells) if isinstance(value, str) else value
            for name, value in {**shared, **cells}.items()
            if name.islower() and name != "slug"
        }
        attributes = {name: value for name, value in whole.items() if name in _ATTRIBUTES}
        flags = {name: value for name, value in whole.items() if name not in _ATTRIBUTES}
        recipes.append(Recipe(**attributes, fields=flags))
    return recipes


def recipe_table(recipes: Iterable[Recipe]) -> str:
    """The output of `--recipe list`: a line for each recipe."""
    lines = [("name", "what", "model", "data", "length", "batch", "rate", "source")]
    for one in recipes:
        fields, source = one.fields, one.source.split(";")[0]
        is_in_steps = "max_steps" in fields
        length = f"{fields['max_steps']:,} steps" if is_in_steps else f"{fields['num_train_epochs']:g} epochs"
        rate, model = f"{fields['learning_rate']:g}", fields.get("variant", one.model)
        lines.append((one.name, one.what, model, one.trained_on, length, f"{one.batch_size}", rate, source))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def scale_learning_rate(rate: float, from_batch_size: int, to_batch_size: int, optimizer: str) -> float:
    """
    Scales a learning rate with the batch size for SGD (Goyal et al., arXiv:1706.02677), and with its square root for
    Adam and similar optimizers (Malladi et al., arXiv:2205.10287).
    """
    ratio = to_batch_size / from_batch_size
    return rate * (ratio if optimizer == "sgd" else math.sqrt(ratio))


def fit_batch_size(
    recipe: Recipe, per_device: int, processes: int, accumulation: int | None = None
) -> tuple[int, dict[str, Any]]:
    """
    Fits a recipe to this machine by accumulated batches, and changes fields if its batch size can't be reached.

    Args:
        recipe: the recipe.
        per_device: images in a batch of one device.
        processes: the number of devices.
        accumulation: batches for one step; None for those that come closest to the recipe.

    Returns:
        The accumulated batches, and for another total than the recipe's the fields that change: the learning rate, and
        steps for the same number of images.
    """
    together = per_device * processes
    if accumulation is None:
        accumulation = max(1, round(recipe.batch_size / together))
    total, fields, changed = together * accumulation, recipe.fields, {}
    if total == recipe.batch_size:
        return accumulation, changed
    rate, optimizer = fields["learning_rate"], fields.get("optim", "adamw_torch_fused")
    changed["learning_rate"] = scale_learning_rate(rate, recipe.batch_size, total, optimizer)
    for name, kind in (("max_steps", int), ("warmup_steps", float)):
        if fields.get(name, 0) >= 1:
            changed[name] = kind(max(1, round(fields[name] * recipe.batch_size / total)))
    return accumulation, changed
