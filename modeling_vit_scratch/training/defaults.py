# SPDX-License-Identifier: Apache-2.0
"""
Defaults that depend on the command. This is the only place that decides them; the flags have all others.

A later one of these replaces an earlier one: from scratch, the data set, pretraining and its objective, a saved model,
a recipe. What the command line says replaces them all.
"""

import argparse
import os
from typing import Any

from ..common.flags import first_look
from ..recipes.recipe import Recipe, fit_batch_size
from ..recipes.table import find_recipe


FROM_SCRATCH: dict[str, Any] = {"variant": "S/16", "learning_rate": 1e-3}
# The built-in data sets: their name alone is a good command. Their accuracy is that of the last epoch, so that nothing
# is chosen on the held-out images.
DATA_SETS: dict[str, dict[str, Any]] = {
    # So small that reading them is no work for another process.
    "digits": {
        "variant": "Mi/4",
        "image_size": [8],
        "num_train_epochs": 40.0,
        "dataloader_num_workers": 0,
        "load_best_model_at_end": False,
    },
    # A defect is a small part of a cell: most of the cell must stay in view.
    "elpv": {"variant": "Mi/8", "smallest_area": 0.7, "num_train_epochs": 40.0, "load_best_model_at_end": False},
}
PRETRAINING: dict[str, Any] = {"train_val_split": 0.05, "load_best_model_at_end": False}
# Random crops and Adam's second decay as published. Without labels there is no accuracy.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "supervised": {},
    "mpp": {"metric_for_best_model": "loss"},
    "simmim": {"metric_for_best_model": "loss", "smallest_area": 0.67},
    "mae": {"metric_for_best_model": "loss", "smallest_area": 0.2, "adam_beta2": 0.95},
}
# Four patches of a digit say nothing about each other; sixteen do.
DIGITS_WITHOUT_LABELS: dict[str, Any] = {"variant": "Mi/2"}
# A saved model or a config.json has an architecture.
SAVED_ARCHITECTURE: dict[str, Any] = {"variant": None, "image_size": None, "patch_size": None}
FINE_TUNING: dict[str, Any] = {"learning_rate": 1e-4}


def defaults_for(source: str, given: argparse.Namespace, objective: str | None = None) -> dict[str, Any]:
    """
    The defaults that a command changes, but for its recipe.

    Args:
        source: the name of a data set; "" for others.
        given: `model_name_or_path`, `config_name` and `variant` of the command line, None where they are not there.
        objective: of pretraining; None for fine-tuning.
    """
    chosen = {**FROM_SCRATCH, **DATA_SETS.get(source, {})}
    if objective is not None:
        chosen |= {**PRETRAINING, **OBJECTIVES.get(objective, {})}
        if source == "digits" and objective != "supervised":
            chosen |= DIGITS_WITHOUT_LABELS
    if given.model_name_or_path or given.config_name:
        chosen |= SAVED_ARCHITECTURE
        if given.model_name_or_path and objective is None:
            chosen |= FINE_TUNING
    elif given.variant and given.variant != chosen["variant"]:
        chosen |= {"image_size": None, "patch_size": None}  # these go with the default variant
    return chosen


def recipe_defaults(
    argv: list[str], per_device: int, is_saved_architecture: bool
) -> tuple[Recipe | None, dict[str, Any], str | None]:
    """
    The numbers of the recipe that the command line names.

    Args:
        argv: the command line.
        per_device: the default batch size of a device.
        is_saved_architecture: whether it starts from a saved model or configuration: the recipe's variant is not used.

    Returns:
        The recipe; its fields, with the accumulation that makes its batch and what changes if that is not possible; and
        a message for the user. Without a recipe None, {} and None.

    Raises:
        ValueError: if there is no such recipe.
    """
    given = first_look(argv, "recipe", "per_device_train_batch_size", "gradient_accumulation_steps")
    if given.recipe is None:
        return None, {}, None
    recipe = find_recipe(given.recipe)
    fields = {"image_size": None, "patch_size": None, **recipe.fields}
    if "variant" in fields and is_saved_architecture:
        for name in ("variant", "config_overrides"):
            fields.pop(name, None)
    elif "variant" not in fields:
        fields.pop("patch_size")
    per_device = _count(given.per_device_train_batch_size) or per_device
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation, changed = fit_batch_size(recipe, per_device, processes, _count(given.gradient_accumulation_steps))
    message = _describe(recipe, per_device, processes, accumulation, changed)
    return recipe, {**fields, "gradient_accumulation_steps": accumulation, **changed}, message


def _count(text: str | None) -> int | None:
    """A positive number, or None: the parser reports the others."""
    return int(text) if text is not None and text.isdecimal() and int(text) > 0 else None


def _describe(recipe: Recipe, per_device: int, processes: int, accumulation: int, changed: dict[str, Any]) -> str:
    total = per_device * processes * accumulation
    batch = f"    batch: {total} = {per_device} images x {processes} processes x {accumulation} accumulated"
    if not changed:
        return f"Recipe {recipe.describe()}\n{batch}, as in the recipe"
    scaled = ", ".join(f"{name} {value:g}" for name, value in changed.items())
    return f"Recipe {recipe.describe()}\n{batch}; the recipe's is {recipe.batch_size}, so: {scaled}"
