# SPDX-License-Identifier: Apache-2.0
"""
Random changes of training images: PIL image in, PIL image of the model's size out, one resampling in between. All
random numbers come from the generator that is passed in, so they depend on (seed, epoch, index) alone.

Operations of policies do what the code that a dialect is named after does, and are tested against its output; but in
all dialects, geometric ones are bilinear, and pixels from outside the image and erased ones are grey, 128, which is 0
after the usual normalisation.
"""

import math
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from transformers import TrainingArguments

from ..common.errors import InputError
from ..common.flags import PHOTO_SMALLEST_AREA
from ..data.dataset import Augmentation, Photo, PhotoPart, reduction


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


# --- Policies, for images of mode L or RGB ----------------------------------------------------------------------------


GREY = 128
BILINEAR = Image.Resampling.BILINEAR


def _grey(image: Image.Image) -> int | tuple[int, ...]:
    bands = len(image.getbands())
    return GREY if bands == 1 else (GREY,) * bands


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, resample=BILINEAR, fillcolor=_grey(image))


def _map_levels(image: Image.Image, to: Callable[[int], int]) -> Image.Image:
    return image.point([to(level) for level in range(256)] * len(image.getbands()))


def _erased(image: Image.Image, left: int, top: int, right: int, bottom: int) -> Image.Image:
    image = image.copy()
    image.paste(_grey(image), (left, top, right, bottom))
    return image


# Each takes the image and a strength: a slope, pixels, degrees, bits to keep, a threshold, or the change of a factor
# from 1.
OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "Identity": lambda image, _: image, "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image), "Invert": lambda image, _: ImageOps.invert(image),
    "ShearX": lambda image, slope: _affine(image, 1, slope, 0, 0, 1, 0),
    "ShearY": lambda image, slope: _affine(image, 1, 0, 0, slope, 1, 0),
    "TranslateX": lambda image, pixels: _affine(image, 1, 0, pixels, 0, 1, 0),
    "TranslateY": lambda image, pixels: _affine(image, 1, 0, 0, 0, 1, pixels),
    "Rotate": lambda image, degrees: image.rotate(degrees, resample=BILINEAR, fillcolor=_grey(image)),
    # PIL's refuses to keep no bit.
    "Posterize": lambda image, bits: _map_levels(image, lambda level: level >> 8 - int(bits) << 8 - int(bits)),
    "Solarize": lambda image, threshold: ImageOps.solarize(image, threshold),
    "SolarizeAdd": lambda image, by: _map_levels(image, lambda level: min(255, level + int(by) * (level < 128))),
    "Color": lambda image, change: ImageEnhance.Color(image).enhance(1 + change),
    "Contrast": lambda image, change: ImageEnhance.Contrast(image).enhance(1 + change),
    "Brightness": lambda image, change: ImageEnhance.Brightness(image).enhance(1 + change),
    "Sharpness": lambda image, change: ImageEnhance.Sharpness(image).enhance(1 + change),
}  # fmt: skip


# Strength at a fraction of the greatest magnitude on an image whose side is given, and whether its sign is random.
_Scale = tuple[Callable[[float, int], float], bool]
_NOTHING: _Scale = (lambda fraction, side: 0.0, False)
_FACTORS = ("Brightness", "Color", "Contrast", "Sharpness")


def _scales(
    shear: float, shift: Callable[[int], float], rotation: float, change: float, whole: Callable[[float], float] = float
) -> dict[str, _Scale]:
    """Operations that grow with the magnitude and have a random sign. `whole` rounds shifts."""
    return {
        **dict.fromkeys(("ShearX", "ShearY"), (lambda fraction, side: shear * fraction, True)),
        **dict.fromkeys(("TranslateX", "TranslateY"), (lambda fraction, side: whole(shift(side) * fraction), True)),
        "Rotate": (lambda fraction, side: rotation * fraction, True),
        **dict.fromkeys(_FACTORS, (lambda fraction, side: change * fraction, True)),
    }


def _torchvision_scales(
    shear: float, shift: Callable[[int], float], rotation: float, change: float, bits: int
) -> dict[str, _Scale]:
    return {
        "Identity": _NOTHING,
        **_scales(shear, shift, rotation, change, whole=int),
        "Posterize": (lambda fraction, side: 8 - round(bits * fraction), False),
        "Solarize": (lambda fraction, side: 255.0 * (1 - fraction), False),
        **dict.fromkeys(("AutoContrast", "Equalize"), _NOTHING),
    }


# torchvision/transforms/autoaugment.py: RandAugment._augmentation_space, 31 magnitudes from 0 to 30; and
# TrivialAugmentWide._augmentation_space (Müller and Hutter, arXiv:2103.10158).
TORCHVISION_RANDAUGMENT = _torchvision_scales(0.3, lambda side: 150.0 / 331.0 * side, 30.0, 0.9, bits=4)
TORCHVISION_TRIVIALAUGMENT = _torchvision_scales(0.99, lambda side: 32.0, 135.0, 0.99, bits=6)
# timm/data/auto_augment.py: _RAND_INCREASING_TRANSFORMS, magnitudes from 0 to 10.
TIMM_RANDAUGMENT: dict[str, _Scale] = {
    **dict.fromkeys(("AutoContrast", "Equalize", "Invert"), _NOTHING),
    **_scales(shear=0.3, shift=lambda side: 0.45 * side, rotation=30.0, change=0.9),
    "Posterize": (lambda fraction, side: 4 - int(4 * fraction), False),
    "Solarize": (lambda fraction, side: 256 - min(256, int(256 * fraction)), False),
    "SolarizeAdd": (lambda fraction, side: min(128, int(110 * fraction)), False),
}
# big_vision/pp/archive/autoaugment.py: distort_image_with_randaugment, magnitudes from 0; AugReg goes to 20, where
# solarising and posterising do nothing again.
BIG_VISION_RANDAUGMENT: dict[str, _Scale] = {
    **dict.fromkeys(("AutoContrast", "Equalize", "Invert"), _NOTHING),
    **_scales(shear=0.3, shift=lambda side: 100.0, rotation=30.0, change=0.0),
    **dict.fromkeys(_FACTORS, (lambda fraction, side: 1.8 * fraction - 0.9, False)),
    "Posterize": (lambda fraction, side: int(4 * fraction), False),
    "Solarize": (lambda fraction, side: int(256 * fraction), False),
    "SolarizeAdd": (lambda fraction, side: int(110 * fraction), False),
    "Cutout": (lambda fraction, side: int(40 * fraction), False),
}


def _operate(
    image: Image.Image, name: str, scale: _Scale, fraction: float, generator: np.random.Generator
) -> Image.Image:
    strength_at, is_signed = scale
    strength = strength_at(fraction, image.height if name == "TranslateY" else image.width)
    if is_signed and generator.random() < 0.5:
        strength = -strength
    if name == "Cutout":
        x, y, half = int(generator.integers(image.width)), int(generator.integers(image.height)), int(strength)
        return _erased(image, x - half, y - half, x + half, y + half)
    return OPERATIONS[name](image, strength)


class RandAugment:
    """
    Random operations, drawn with replacement, all at the same magnitude (Cubuk et al., arXiv:1909.13719). Timm's `mstd`
    is `magnitude_std`, its `p` the `probability` of each operation.
    """

    # By dialect: the operations, the magnitude whose fraction is 1, and the greatest magnitude.
    SCALES = {
        "torchvision": (TORCHVISION_RANDAUGMENT, 30.0, 30.0),
        "timm": (TIMM_RANDAUGMENT, 10.0, 10.0),
        "big_vision": (BIG_VISION_RANDAUGMENT, 10.0, math.inf),
    }
    scales = property(lambda self: self.SCALES[self.dialect][0])  # a policy is pickled, and its functions can't be

    def __init__(
        self, dialect: str, num_operations: int = 2, magnitude: float = 9.0, magnitude_std: float = 0.0,
        probability: float = 1.0,
    ) -> None:  # fmt: skip
        self.dialect, self.num_operations, self.magnitude = dialect, num_operations, magnitude
        self.magnitude_std, self.probability = magnitude_std, probability
        _, self.unit, self.most = self.SCALES[dialect]
        if not 0 <= magnitude <= self.most:
            raise ValueError(
                f"The magnitude {magnitude:g} must be between 0 and {self.most:g} for {dialect}'s RandAugment."
            )
        if num_operations < 1 or not 0 <= probability <= 1 or magnitude_std < 0:
            raise ValueError(
                f"RandAugment needs at least 1 operation, a probability from 0 to 1 and a spread of at least 0, not "
                f"{num_operations}, {probability:g} and {magnitude_std:g}."
            )
        noise = f" ± {magnitude_std:g}" if magnitude_std else ""
        chance = f", each with probability {probability:g}" if probability < 1 else ""
        self.description = (
            f"RandAugment as in {dialect}: {num_operations} operations at magnitude {magnitude:g}{noise}{chance}"
        )

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        for name in generator.choice(list(self.scales), size=self.num_operations):
            if generator.random() < self.probability:
                magnitude = self.magnitude
                if self.magnitude_std:
                    magnitude = min(max(generator.normal(magnitude, self.magnitude_std), 0.0), self.most)
                image = _operate(image, str(name), self.scales[name], magnitude / self.unit, generator)
        return image


class TrivialAugmentWide:
    """One random operation at one of 31 random magnitudes: no settings (Müller and Hutter, arXiv:2103.10158)."""

    description = "TrivialAugment (wide) as in torchvision"
    scales, num_operations, probability = TORCHVISION_TRIVIALAUGMENT, 1, 1.0

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        name = str(generator.choice(list(self.scales)))
        return _operate(image, name, self.scales[name], int(generator.integers(31)) / 30, generator)


class ThreeAugment:
    """3-Augment of DeiT III (Touvron et al., arXiv:2204.07118, section 3.3), without its `ColorJitter(0.3)`."""

    description = "one of grey, solarised and blurred (3-Augment)"

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        choice = generator.integers(3)
        if choice == 0:
            return image.convert("L").convert(image.mode)
        if choice == 1:
            return ImageOps.solarize(image, 128)
        return image.filter(ImageFilter.GaussianBlur(radius=generator.uniform(0.1, 2.0)))


class ColorJitter:
    """Torchvision's `ColorJitter(strength, strength, strength)`: each change in random order."""

    def __init__(self, strength: float) -> None:
        if not 0 < strength <= 1:
            raise ValueError(f"The strength {strength:g} of colour jitter must be above 0 and at most 1.")
        self.strength = strength
        self.description = f"brightness, contrast and saturation changed by up to {100 * strength:g} %"

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        for index in generator.permutation(3):
            change = generator.uniform(-self.strength, self.strength)
            image = OPERATIONS[("Brightness", "Contrast", "Color")[index]](image, change)
        return image


class RandomErasing:
    """A rectangle of 2 to 33 % of the area and of shape 0.3 to 3.3 (Zhong et al., arXiv:1708.04896; as in timm)."""

    def __init__(self, probability: float) -> None:
        if not 0 < probability <= 1:
            raise ValueError(f"The probability {probability:g} of random erasing must be above 0 and at most 1.")
        self.probability = probability
        self.description = f"a random rectangle erased with probability {probability:g}"

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        if generator.random() >= self.probability:
            return image
        for _ in range(10):
            area = image.width * image.height * generator.uniform(0.02, 1 / 3)
            shape = math.exp(generator.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if width < image.width and height < image.height:
                top = int(generator.integers(image.height - height + 1))
                left = int(generator.integers(image.width - width + 1))
                return _erased(image, left, top, left + width, top + height)
        return image


def auto_augment(name: str) -> Augmentation:
    """A policy by its name in torchvision, DeiT III, timm or big_vision. Raises ValueError for any other."""
    if name in ("ra", "ta_wide", "3a"):
        return {"ra": RandAugment("torchvision"), "ta_wide": TrivialAugmentWide(), "3a": ThreeAugment()}[name]
    if match := re.fullmatch(r"randaug\((\d+),\s*(\d+)\)", name):
        return RandAugment("big_vision", int(match[1]), float(match[2]))
    if not name.startswith("rand-"):
        raise ValueError(
            f"There is no augmentation policy {name!r}. Choose ra, ta_wide (RandAugment(2, 9) and TrivialAugment, as "
            "in torchvision), 3a (3-Augment, as in DeiT III), timm's rand-m9-mstd0.5-inc1 (also -n and -p), or "
            "big_vision's randaug(2,10)."
        )
    # The mini-language of `timm.data.auto_augment.rand_augment_transform`.
    settings = {"m": 10.0, "n": 2.0, "p": 0.5, "mstd": 0.0, "inc": 0.0}
    for part in name.split("-")[1:]:
        match = re.fullmatch(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)", part)
        if match is None:
            raise ValueError(f"{part!r} in {name!r} is not understood. Parts are m9, n2, p0.5, mstd0.5 and inc1.")
        settings[match[1]] = float(match[2])
    if settings["inc"] != 1:
        raise ValueError(f"{name!r} must have -inc1: operations that grow stronger with the magnitude, all of them.")
    return RandAugment("timm", int(settings["n"]), settings["m"], settings["mstd"], settings["p"])


# --- The augmentation of the flags ------------------------------------------------------------------------------------


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
