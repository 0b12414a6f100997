# SPDX-License-Identifier: Apache-2.0
"""
Random changes of training images: PIL image in, PIL image of the model's size out, one resampling in between. All
random numbers come from the generator that is passed in, so they depend on (seed, epoch, index) alone.
"""

import math

import numpy as np
from PIL import Image
from transformers import TrainingArguments

from ..common.errors import InputError
from ..common.flags import PHOTO_SMALLEST_AREA
from ..data.dataset import Augmentation, Photo, PhotoPart, reduction
from .auto_augment import ColorJitter, RandomErasing, auto_augment


class PhotoAugmentation:
    """
    A random part of the image, resized to (height, width), and mirrored half of the time (Szegedy et al.,
    arXiv:1409.4842, section 6). The areas are fractions; the usual 0.08 is for a million images.
    """

    def __init__(
        self, size: tuple[int, int], resample: int, smallest_area: float = PHOTO_SMALLEST_AREA,
        largest_area: float = 1.0,
    ) -> None:  # fmt: skip
        self.size, self.resample, self.smallest_area, self.largest_area = size, resample, smallest_area, largest_area
        self.description = f"a random part of at least {100 * smallest_area:g} % of the area, mirrored half of the time"

    def __call__(
        self, image: Image.Image | Photo | np.ndarray, generator: np.random.Generator
    ) -> Image.Image | PhotoPart | np.ndarray:
        """An array (H, W, C) of any number of channels becomes (C, height, width)."""
        size, is_array = self.size[::-1], isinstance(image, np.ndarray)
        width, height = image.shape[1::-1] if is_array else (image.width, image.height)
        box, is_mirrored = self.draw(width, height, generator)
        if is_array:
            bands = map(Image.fromarray, np.ascontiguousarray(np.moveaxis(image, -1, 0)))
            pixels = np.stack([np.asarray(band.crop(box).resize(size, self.resample)) for band in bands])
            return np.ascontiguousarray(pixels[..., ::-1] if is_mirrored else pixels)
        if isinstance(image, Photo):
            return PhotoPart(image, size, self.resample, box, is_mirrored)
        image = image.crop(box).resize(size, self.resample)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_mirrored else image

    def draw(self, width: int, height: int, generator: np.random.Generator) -> tuple[tuple[int, int, int, int], bool]:
        """The box of a part, and whether it is mirrored."""
        return self._random_box(width, height, generator), generator.random() < 0.5

    def _random_box(self, width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
        """Left, top, right, bottom as in torchvision's `RandomResizedCrop`, but multiples of a JPEG decoder's scale."""
        result_shape = self.size[1] / self.size[0]
        for _ in range(10):
            area = width * height * generator.uniform(self.smallest_area, self.largest_area)
            shape = result_shape * math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
            part_width, part_height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            is_inside = 0 < part_width <= width and 0 < part_height <= height
            if is_inside:
                break
        if not is_inside:  # a very long image: the largest centred part of the result's shape
            part_width = max(1, round(min(width, height * result_shape)))
            part_height = max(1, round(min(height, width / result_shape)))
        scale = reduction((part_width, part_height), self.size[::-1])
        columns, rows = part_width // scale, part_height // scale
        spare = width // scale - columns, height // scale - rows
        left, top = (int(generator.integers(count + 1)) if is_inside else count // 2 for count in spare)
        return scale * left, scale * top, scale * (left + columns), scale * (top + rows)


class DigitAugmentation:
    """
    A small rotation, zoom and shift in one bilinear resampling to (height, width). Never mirrored, since digits have a
    direction. Maxima: `rotation` in degrees to either side, `zoom` and `shift` as fractions of the image.
    """

    def __init__(self, size: tuple[int, int], rotation: float = 10.0, zoom: float = 0.1, shift: float = 0.09) -> None:
        self.size, self.rotation, self.zoom, self.shift = size, rotation, zoom, shift
        self.description = f"rotation to {rotation:g} degrees, zoom to {100 * zoom:g} %, shift to {100 * shift:g} %"

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        angle, zoom, right, down = generator.uniform(-1.0, 1.0, size=4)
        angle, zoom = math.radians(angle * self.rotation), 1.0 + zoom * self.zoom
        (height, width), scale = self.size, (image.height / self.size[0], image.width / self.size[1])
        cosine, sine = math.cos(angle) / zoom, math.sin(angle) / zoom
        # PIL takes the pixel (x, y) of the result from (a x + b y + c, d x + e y + f) in the image.
        a, b, d, e = cosine * scale[1], -sine * scale[1], sine * scale[0], cosine * scale[0]
        c = image.width * (0.5 + right * self.shift) - a * width / 2 - b * height / 2
        f = image.height * (0.5 + down * self.shift) - d * width / 2 - e * height / 2
        return image.transform(
            (width, height), Image.Transform.AFFINE, (a, b, c, d, e, f), resample=Image.Resampling.BILINEAR
        )


class Chain:
    """One augmentation after the other, with the same generator."""

    def __init__(self, *steps: Augmentation) -> None:
        self.steps = steps
        self.description = "; ".join(step.description for step in steps)

    def __call__(self, image: Image.Image | Photo, generator: np.random.Generator) -> Image.Image:
        for step in self.steps:
            image = step(image, generator)
            image = image.to_image() if isinstance(image, PhotoPart) else image
        return image


def build_augmentation(
    kind: str, size: tuple[int, int], resample: int, num_channels: int, arguments: TrainingArguments
) -> Augmentation:
    """
    The augmentation of the flags, in the order of timm and torchvision, for a "photo" or "digit" of (height, width).
    Raises InputError for policies on images that are neither grey nor in colour.
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
