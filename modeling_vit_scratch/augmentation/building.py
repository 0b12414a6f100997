# SPDX-License-Identifier: Apache-2.0
"""From flags to what every training image goes through."""

from transformers import TrainingArguments

from ..common.errors import InputError
from ..data.decoding import Augmentation
from .photo import DigitAugmentation, PhotoAugmentation
from .policies import Chain, ColorJitter, RandomErasing, auto_augment


def build_augmentation(
    kind: str, size: tuple[int, int], resample: int, num_channels: int, arguments: TrainingArguments
) -> Augmentation:
    """
    The augmentation of single images, in the order of timm and torchvision.

    Args:
        kind: "photo" or "digit".
        size: (height, width) of the result in pixels.
        resample: the PIL filter of the image processor.
        num_channels: of the images.
        arguments: of the run.

    Raises:
        InputError: for policies on images that are neither grey nor in colour.
    """
    recipe = arguments.recipe_arguments
    photo = PhotoAugmentation(size, resample, arguments.smallest_area)
    steps: list[Augmentation] = [DigitAugmentation(size) if kind == "digit" else photo]
    if recipe.auto_augment:
        steps.append(auto_augment(recipe.auto_augment))
    if recipe.color_jitter:
        steps.append(ColorJitter(recipe.color_jitter))
    if recipe.random_erasing:
        steps.append(RandomErasing(recipe.random_erasing))
    if len(steps) > 1 and num_channels not in (1, 3):
        raise InputError(
            f"Augmentation policies know grey and colour images, not {num_channels} channels. Leave out "
            "--auto_augment, --color_jitter and --random_erasing."
        )
    return Chain(*steps) if len(steps) > 1 else steps[0]
