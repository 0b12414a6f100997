# SPDX-License-Identifier: Apache-2.0
"""What a recipe is, how rows of a table become recipes, and what changes with another batch size."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """
    A run.

    Attributes:
        name: for `--recipe`.
        what: the kind of training.
        trained_on: the data, for people.
        source: where the numbers are from.
        batch_size: images in one step of the optimizer, over all processes and accumulated batches.
        fields: values of flags.
        data: the flags to go with it: what it was published for.
        model: what it starts from, where that is no --variant.
        expected: the published result, or what was measured here.
        price: what it costs, where that is known.
        differs: from the published run.
        script: which of scripts/ runs it.
    """

    name: str
    what: str
    trained_on: str
    source: str
    batch_size: int
    fields: dict[str, Any]
    data: str
    model: str = "any"
    expected: str = "not published"
    price: str = "not published"
    differs: str = ""
    script: str = "finetune"

    @property
    def command(self) -> str:
        """How to run it."""
        return f"accelerate launch scripts/{self.script}.py --recipe {self.name} {self.data}"

    @property
    def length(self) -> str:
        """Of the training."""
        if "max_steps" in self.fields:
            return f"{self.fields['max_steps']:,} steps"
        return f"{self.fields['num_train_epochs']:g} epochs"

    def describe(self) -> str:
        """What a person wants to know before it runs."""
        lines = [f"{self.name}: {self.source}", f"    {self.command}"]
        lines += [f"    expected: {self.expected}", f"    price: {self.price}"]
        return "\n".join(lines + ([f"    differs from the published run: {self.differs}"] if self.differs else []))


_ATTRIBUTES = {field.name for field in dataclasses.fields(Recipe)} - {"fields"}


def rows(shared: dict[str, Any], columns: str = "", *values: tuple[Any, ...]) -> list[Recipe]:
    """
    Recipes that have much in common.

    Args:
        shared: attributes of `Recipe` and values of flags that all of them have. Text may have columns in braces, and
            {slug}, the variant as it stands in names.
        columns: the names of what differs, too; those in capitals are for the braces only.
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
    """What `--recipe list` prints: a line for each."""
    lines = [("name", "what", "model", "data", "length", "batch", "rate", "source")]
    for one in recipes:
        rate, model = f"{one.fields['learning_rate']:g}", one.fields.get("variant", one.model)
        lines.append(
            (one.name, one.what, model, one.trained_on, one.length, f"{one.batch_size}", rate, one.source.split(";")[0])
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


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
