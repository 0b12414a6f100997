# SPDX-License-Identifier: Apache-2.0
"""The flags of a recipe: its name, augmentation, rates of layers, average of weights; and what a name stands for."""

import argparse
import os
from dataclasses import dataclass, field
from typing import Any

from ..augmentation.policies import AUTO_AUGMENT_HELP, ColorJitter, RandomErasing, auto_augment
from ..common.errors import Problems
from ..recipes.paper import RECIPES, find_recipe
from ..recipes.recipe import Recipe, fit_batch_size


LOSSES = ("softmax", "sigmoid", "bce")


@dataclass
class RecipeArguments:
    """How the network learns, beyond what the Trainer has flags for."""

    _argument_group_name = "recipe: named runs, augmentation, rates of layers, average of weights"

    recipe: str | None = field(
        default=None,
        metadata={
            "help": "A named run, with its numbers from a paper or its code. They replace the defaults here, and flags "
            "replace them; the batch is made by accumulation, and for another one rate and steps are scaled. "
            "`--recipe NAME --help` shows its numbers. Names: " + ", ".join(RECIPES) + ". Example: bv_s16_90ep"
        },
    )
    auto_augment: str | None = field(
        default=None,
        metadata={"help": f"A policy of random operations on an image: {AUTO_AUGMENT_HELP}. Example: ta_wide"},
    )
    color_jitter: float = field(
        default=0.0,
        metadata={"help": "Change brightness, contrast and saturation by up to this share. 0: not. Example: 0.3"},
    )
    random_erasing: float = field(
        default=0.0, metadata={"help": "Make a random rectangle grey, with this probability. Example: 0.25"}
    )
    aug_repeats: int = field(
        default=1,
        metadata={
            "help": "Repeated augmentation: each image so many times in a row, differently augmented, and dealt to the "
            "processes in turn. An epoch is as long as ever, and sees one in so many of the images. Not with "
            "--streaming. Example: 3"
        },
    )
    mixup: float = field(
        default=0.0,
        metadata={
            "help": "Mix pairs of images and their labels, with a weight from Beta(alpha, alpha): the alpha. 0: not. "
            "With --cutmix too, each batch gets one of them. Example: 0.2"
        },
    )
    cutmix: float = field(
        default=0.0,
        metadata={"help": "Put a rectangle of one image into another and mix their labels: the alpha. Example: 1.0"},
    )
    loss: str = field(
        default="softmax",
        metadata={
            "help": "softmax: cross-entropy. sigmoid: binary cross-entropy summed over the classes, as the paper "
            "pre-trained; goes with --config_overrides head_bias_init=-6.9. bce: its mean over the classes, where "
            "every class in a mixed image counts as a whole one, as in DeiT III. Where images have any number of "
            "labels, it is binary in any case: sigmoid for the sum over the labels, otherwise their mean.",
            "choices": LOSSES,
        },
    )
    class_weights: list[str] | None = field(
        default=None,
        metadata={
            "help": "Let images of some classes count more: balanced, for the inverse of how many a class has, or a "
            "number for each label, in their order. The mean over training images is made 1. Where images have any "
            "number of labels: how much more having a label counts than not having it. Example: balanced"
        },
    )
    layer_decay: float = field(
        default=1.0,
        metadata={
            "help": "Each layer learns at the rate of the next one times this, which spares what was learnt before. 1: "
            "all alike. Example: 0.75"
        },
    )
    head_learning_rate_multiplier: float = field(
        default=1.0, metadata={"help": "The classifier learns at --learning_rate times this. Example: 10"}
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Keep an exponential moving average of the weights with this decay; it is what is evaluated, and "
            "what the model is in the end. Example: 0.9999"
        },
    )
    ema_warmup: bool = field(
        default=True,
        metadata={"help": "Begin with a lower decay, so that --ema_decay suits short runs too: (1 + n) / (10 + n)."},
    )

    told: str | None = field(init=False, default=None)  # what the user is told of the recipe; not a flag

    def check(self, problems: Problems) -> None:
        """Adds what is wrong to the problems."""
        for make, value in (
            (auto_augment, self.auto_augment),
            (ColorJitter, self.color_jitter),
            (RandomErasing, self.random_erasing),
        ):
            try:
                if value:
                    make(value)
            except ValueError as error:
                problems.add(str(error))
        if self.aug_repeats < 1:
            problems.add(f"--aug_repeats {self.aug_repeats} must be at least 1, for every image once.")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                problems.add(f"--{name} {getattr(self, name):g} must not be negative.")
        if not 0 < self.layer_decay <= 1:
            problems.add(f"--layer_decay {self.layer_decay:g} must be above 0 and at most 1.")
        if not self.head_learning_rate_multiplier > 0:
            problems.add(f"--head_learning_rate_multiplier {self.head_learning_rate_multiplier:g} must be above 0.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            problems.add(f"--ema_decay {self.ema_decay:g} must lie between 0 and 1, e.g. 0.9999.")


def add_recipe_defaults(parser: argparse.ArgumentParser, argv: list[str], from_checkpoint: bool) -> str | None:
    """
    Sets the numbers of the recipe that the command line names as the parser's defaults, which flags replace.

    Args:
        parser: that knows all flags.
        argv: the command line.
        from_checkpoint: whether it starts from a saved model: then a recipe's architecture is not taken.

    Returns:
        What to tell the user, or None without a recipe.

    Raises:
        ValueError: for a recipe that does not exist, or that names a field that does not.
    """
    seen = _first_look(argv)
    if seen.recipe is None:
        return None
    recipe = find_recipe(seen.recipe)
    fields = {"image_size": None, "patch_size": None, **recipe.fields}
    if "variant" in fields and from_checkpoint:
        for name in ("variant", "config_overrides"):
            fields.pop(name, None)
    elif "variant" not in fields:
        fields.pop("patch_size")
    known = {action.dest for action in parser._actions}
    if unknown := sorted(set(fields) - known):
        raise ValueError(
            f"--recipe {recipe.name} is for scripts/{recipe.script}.py: there are no fields {', '.join(unknown)} here."
        )
    per_device = _count(seen.per_device_train_batch_size) or parser.get_default("per_device_train_batch_size")
    given = _count(seen.gradient_accumulation_steps)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation, changed = fit_batch_size(recipe, per_device, processes, given)
    parser.set_defaults(**{**fields, "gradient_accumulation_steps": accumulation, **changed})
    return _tell(recipe, per_device, processes, accumulation, changed)


def _first_look(argv: list[str]) -> argparse.Namespace:
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("recipe", "per_device_train_batch_size", "gradient_accumulation_steps"):
        first_look.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?")
    return first_look.parse_known_args(argv)[0]


def _count(text: str | None) -> int | None:
    """A positive number, or None: what is wrong with the others, the real parser tells."""
    return int(text) if text is not None and text.isdecimal() and int(text) > 0 else None


def _tell(recipe: Recipe, per_device: int, processes: int, accumulation: int, changed: dict[str, Any]) -> str:
    total = per_device * processes * accumulation
    batch = f"    batch: {total} = {per_device} images x {processes} processes x {accumulation} accumulated"
    if not changed:
        return f"Recipe {recipe.describe()}\n{batch}, as in the recipe"
    scaled = ", ".join(f"{name} {value:g}" for name, value in changed.items())
    return f"Recipe {recipe.describe()}\n{batch}; the recipe's is {recipe.batch_size}, so: {scaled}"
