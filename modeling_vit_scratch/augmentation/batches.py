# SPDX-License-Identifier: Apache-2.0
"""
The augmentation of `augmentation` and `policies` for a whole batch at once, on the device that trains.

Images of one size that are small, such as CIFAR's or Tiny ImageNet's, take longer to augment one by one on the CPU than
to learn from on a GPU. Operations that only map colours give the same bits here as in `policies`; those that resample
differ by rounding, see `tests/test_training_device_augmentation.py`.

Nothing here waits for the device. All random numbers come from outside, a row of them for each image, so that an image
looks the same whenever (seed, epoch, index) are the same.
"""

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .policies import (
    GREY,
    TORCHVISION_TRIVIALAUGMENT,
    ColorJitter,
    RandAugment,
    RandomErasing,
    TrivialAugmentWide,
    auto_augment,
)


class BatchAugmentation(Protocol):
    """
    Any callable (images, draws) -> images, both uint8 (B, C, H, W) on one device; `draws` are `num_draws` numbers for
    each image, (B, num_draws), float32, uniform from 0 to below 1, on the host. `description` is for cards.
    """

    description: str
    num_draws: int

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor: ...


class BatchChain:
    """One augmentation after the other, each with random numbers of its own."""

    def __init__(self, *steps: BatchAugmentation) -> None:
        self.steps, self.num_draws = steps, sum(step.num_draws for step in steps)
        self.description = "; ".join(step.description for step in steps)

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        first = 0
        for step in self.steps:
            images = step(images, draws[:, first : first + step.num_draws])
            first += step.num_draws
        return images


def to_device(values: np.ndarray, like: Tensor) -> Tensor:
    """Without waiting: float32 or int64 beside the images."""
    values = torch.from_numpy(np.ascontiguousarray(values))
    return (values.pin_memory() if like.is_cuda else values).to(like.device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# Operations: each takes uint8 (B, C, H, W) and the strength of each image, (B,) float32, as in `policies.OPERATIONS`


def _sample(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear, float32: at x and y (B, H, W), in pixels from the left and top edges; beyond the last centre, it."""
    height, width = images.shape[-2:]
    grid = torch.stack((x * (2 / width) - 1, y * (2 / height) - 1), dim=-1)
    return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


def _affine(images: Tensor, *coefficients: Tensor | float) -> Tensor:
    """The pixel at (x, y) comes from (a x + b y + c, d x + e y + f); what is outside the image is grey."""
    height, width = images.shape[-2:]
    a, b, c, d, e, f = (value[:, None, None] if isinstance(value, Tensor) else value for value in coefficients)
    columns, rows = (torch.arange(side, device=images.device) + 0.5 for side in (width, height))
    columns, rows = columns[None, None, :], rows[None, :, None]
    shape = (len(images), height, width)
    x, y = (a * columns + b * rows + c).expand(shape), (d * columns + e * rows + f).expand(shape)
    is_inside = ((x >= 0) & (x < width) & (y >= 0) & (y < height))[:, None]
    # Pillow cuts off what is behind the point; a little is added, since what should be whole may lie just below.
    return torch.where(is_inside, (_sample(images, x, y) + 1e-3).floor(), float(GREY)).to(torch.uint8)


def _rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Around the centre, against the clock."""
    height, width = images.shape[-2:]
    cosine, sine = torch.deg2rad(-degrees).cos(), torch.deg2rad(-degrees).sin()
    c = width / 2 - cosine * (width / 2) - sine * (height / 2)
    f = height / 2 + sine * (width / 2) - cosine * (height / 2)
    return _affine(images, cosine, sine, c, -sine, cosine, f)


def _luma(images: Tensor) -> Tensor:
    """(B, 1, H, W), int32, 0 to 255: Pillow's conversion to mode L."""
    if images.shape[1] == 1:
        return images.int()
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _blend(images: Tensor, degenerate: Tensor | float, change: Tensor) -> Tensor:
    """From the degenerate image through the image and beyond: Pillow's `Image.blend`."""
    factor = (1 + change)[:, None, None, None]
    return (degenerate + factor * (images.float() - degenerate)).clamp_(0, 255).to(torch.uint8)


def _contrast(images: Tensor, change: Tensor) -> Tensor:
    # Whole numbers, and their mean in float64: as exact as Pillow's.
    mean = (_luma(images).double().mean((1, 2, 3), keepdim=True) + 0.5).floor().float()
    return _blend(images, mean, change)


def _sharpness(images: Tensor, change: Tensor) -> Tensor:
    """Against Pillow's SMOOTH, which leaves the border as it is."""
    smooth = images.float()
    if min(images.shape[-2:]) > 2:
        kernel = torch.ones(1, 1, 3, 3, device=images.device)
        kernel[..., 1, 1] = 5
        inner = F.conv2d(smooth.flatten(0, 1)[:, None], kernel) / 13
        smooth = smooth.clone()
        smooth[..., 1:-1, 1:-1] = (inner + 0.5).floor().view_as(smooth[..., 1:-1, 1:-1])
    return _blend(images, smooth, change)


def _histogram(images: Tensor) -> Tensor:
    """(B, C, 256), int64."""
    counts = torch.zeros(*images.shape[:2], 256, dtype=torch.int64, device=images.device)
    levels = images.flatten(2).long()
    return counts.scatter_add_(2, levels, torch.ones((), dtype=torch.int64, device=images.device).expand_as(levels))


def _look_up(images: Tensor, table: Tensor) -> Tensor:
    """(B, C, 256), any type with values from 0 to 255."""
    return table.to(torch.uint8).gather(2, images.flatten(2).long()).view_as(images)


def _auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    """Each channel to the full range: `ImageOps.autocontrast`."""
    low, high = (reduce(images.flatten(2), 2).double()[..., None] for reduce in (torch.amin, torch.amax))
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1)  # 255.0 / x would be 255 times a reciprocal
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    table = (levels * scale - low * scale).clamp(0, 255).floor()
    return _look_up(images, torch.where(high > low, table, levels))


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    """Each channel to an even histogram: `ImageOps.equalize`."""
    counts, levels = _histogram(images), torch.arange(256, device=images.device)
    last = counts.gather(2, images.flatten(2).amax(2, keepdim=True).long())
    step = (images.shape[-2] * images.shape[-1] - last) // 255
    before = counts.cumsum(2) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    return _look_up(images, torch.where(step > 0, table, levels))


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    kept = 255 - (2 ** (8 - bits.clamp(max=8).int()) - 1)
    return images & kept.to(torch.uint8)[:, None, None, None]


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images < threshold[:, None, None, None], images, 255 - images)


def _solarize_add(images: Tensor, amount: Tensor) -> Tensor:
    brighter = (images.int() + amount.int()[:, None, None, None]).clamp(max=255)
    return torch.where(images < 128, brighter.to(torch.uint8), images)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Identity": lambda images, _: images,
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": lambda images, _: 255 - images,
    "ShearX": lambda images, slope: _affine(images, 1.0, slope, 0.0, 0.0, 1.0, 0.0),
    "ShearY": lambda images, slope: _affine(images, 1.0, 0.0, 0.0, slope, 1.0, 0.0),
    "TranslateX": lambda images, pixels: _affine(images, 1.0, 0.0, pixels, 0.0, 1.0, 0.0),
    "TranslateY": lambda images, pixels: _affine(images, 1.0, 0.0, 0.0, 0.0, 1.0, pixels),
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": lambda images, change: _blend(images, _luma(images).float(), change),
    "Contrast": _contrast,
    "Brightness": lambda images, change: _blend(images, 0.0, change),
    "Sharpness": _sharpness,
}


def operate(images: Tensor, names: tuple[str, ...], chosen: np.ndarray, strengths: np.ndarray) -> Tensor:
    """
    One operation on each image.

    Args:
        images: uint8 (B, C, H, W).
        names: of operations.
        chosen: (B,), which of the names; on the host, so that it is known here how many images each operation has.
        strengths: (B,).
    """
    order = np.argsort(chosen, kind="stable")
    counts = np.bincount(chosen, minlength=len(names)).tolist()
    place, strength = to_device(order, images), to_device(strengths[order].astype(np.float32), images)
    parts = zip(names, images[place].split(counts), strength.split(counts))
    changed = torch.cat([OPERATIONS[name](part, value) for name, part, value in parts if len(part)])
    return torch.empty_like(images).index_copy_(0, place, changed)


# ---------------------------------------------------------------------------------------------------------------------
# Augmentations


class BatchPhoto:
    """`augmentation.PhotoAugmentation`: a random part, enlarged to the whole (bilinear), mirrored half of the time."""

    _ATTEMPTS = 10

    def __init__(self, smallest_area: float) -> None:
        self.smallest_area, self.num_draws = smallest_area, 2 * self._ATTEMPTS + 3
        self.description = f"a random part of at least {100 * smallest_area:g} % of the area, mirrored half of the time"

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        height, width = images.shape[-2:]
        left, top, right, bottom = (to_device(edge, images)[:, None] for edge in self.boxes((height, width), draws).T)
        is_mirrored = to_device(draws[:, -1] < 0.5, images)[:, None]
        x, y = (((torch.arange(side, device=images.device) + 0.5) / side)[None] for side in (width, height))
        x = torch.where(is_mirrored, 1 - x, x)
        # Of the part alone: its outermost pixels are repeated, not mixed with what was cut off.
        x = (left + x * (right - left)).clamp(left + 0.5, right - 0.5)[:, None, :].expand(-1, height, -1)
        y = (top + y * (bottom - top)).clamp(top + 0.5, bottom - 0.5)[:, :, None].expand(-1, -1, width)
        return _sample(images, x, y).add_(0.5).to(torch.uint8)

    def boxes(self, size: tuple[int, int], draws: np.ndarray) -> np.ndarray:
        """(B, 4) float32, whole numbers: left, top, right and bottom of the part, for images of a (height, width)."""
        height, width = size
        areas, shapes = draws[:, : self._ATTEMPTS], draws[:, self._ATTEMPTS : 2 * self._ATTEMPTS]
        areas = height * width * (self.smallest_area + (1 - self.smallest_area) * areas)
        shapes = width / height * np.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * shapes)
        widths, heights = np.round(np.sqrt(areas * shapes)), np.round(np.sqrt(areas / shapes))
        is_inside = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        first, rows = is_inside.argmax(1), np.arange(len(draws))
        is_found = is_inside.any(1)  # else all of it, which has the result's shape
        part_width = np.where(is_found, widths[rows, first], width)
        part_height = np.where(is_found, heights[rows, first], height)
        left = np.floor(draws[:, -3] * (width - part_width + 1))
        top = np.floor(draws[:, -2] * (height - part_height + 1))
        return np.stack((left, top, left + part_width, top + part_height), axis=1).astype(np.float32)


class BatchRandAugment:
    """`policies.RandAugment`, all dialects but big_vision's, which has Cutout; and `policies.TrivialAugmentWide`."""

    def __init__(self, policy: RandAugment | TrivialAugmentWide) -> None:
        self.policy, self.description = policy, policy.description
        if isinstance(policy, TrivialAugmentWide):
            self.scales, self.num_operations, self.probability = TORCHVISION_TRIVIALAUGMENT, 1, 1.0
        else:
            self.scales, self.num_operations = policy.SCALES[policy.dialect][0], policy.num_operations
            self.probability = policy.probability
        self.names = tuple(self.scales)
        if missing := [name for name in self.names if name not in OPERATIONS]:
            raise ValueError(f"{policy.description} has {', '.join(missing)}, which is not made for whole batches.")
        self.num_draws = 4 * self.num_operations

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        for first in range(0, self.num_draws, 4):
            chosen, strengths = self.choose(images.shape[-2:], draws[:, first : first + 4])
            images = operate(images, ("Identity", *self.names), chosen, strengths)
        return images

    def choose(self, size: tuple[int, int], draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Which operation and how strong, (B,) each, of four numbers for each image. 0 is none, then come the names.

        Args:
            size: (height, width) of the images in pixels.
        """
        chosen = 1 + (draws[:, 0] * len(self.names)).astype(np.int64)
        height, width = size
        strengths = np.zeros(len(draws))
        for place, (number, fraction, sign) in enumerate(zip(chosen, self._fractions(draws[:, 1]), draws[:, 2])):
            name = self.names[number - 1]
            strength_at, is_signed = self.scales[name]
            strength = strength_at(fraction, height if name == "TranslateY" else width)
            strengths[place] = -strength if is_signed and sign < 0.5 else strength
        return np.where(draws[:, 3] < self.probability, chosen, 0), strengths

    def _fractions(self, draws: np.ndarray) -> list[float]:
        """Of the greatest magnitude."""
        if isinstance(self.policy, TrivialAugmentWide):
            return (np.floor(draws * 31) / 30).tolist()
        _, unit, most = self.policy.SCALES[self.policy.dialect]
        noise = torch.special.ndtri(torch.from_numpy(draws.astype(np.float64)).clamp(1e-9, 1 - 1e-9)).numpy()
        magnitudes = self.policy.magnitude + self.policy.magnitude_std * noise
        return (magnitudes.clip(0.0, most) / unit if self.policy.magnitude_std else magnitudes / unit).tolist()


class BatchColorJitter:
    """`policies.ColorJitter`."""

    _NAMES = ("Brightness", "Contrast", "Color")
    num_draws = 6

    def __init__(self, jitter: ColorJitter) -> None:
        self.strength, self.description = jitter.strength, jitter.description

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        orders = draws[:, :3].argsort(1)
        for step in range(3):
            images = operate(images, self._NAMES, orders[:, step], self.strength * (2 * draws[:, 3 + step] - 1))
        return images


class BatchErasing:
    """`policies.RandomErasing`."""

    _ATTEMPTS = 10
    num_draws = 2 * _ATTEMPTS + 3

    def __init__(self, erasing: RandomErasing) -> None:
        self.probability, self.description = erasing.probability, erasing.description

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        height, width = images.shape[-2:]
        left, top, right, bottom = (to_device(edge, images)[:, None] for edge in self.boxes((height, width), draws).T)
        columns, rows = (torch.arange(side, device=images.device)[None] for side in (width, height))
        is_erased = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None]
        return images.masked_fill(is_erased[:, None], GREY)

    def boxes(self, size: tuple[int, int], draws: np.ndarray) -> np.ndarray:
        """(B, 4) float32, whole numbers: left, top, right and bottom of what is erased; all 0 where nothing is."""
        height, width = size
        areas = height * width * (0.02 + (1 / 3 - 0.02) * draws[:, : self._ATTEMPTS])
        shapes = np.exp(math.log(0.3) * (1 - 2 * draws[:, self._ATTEMPTS : 2 * self._ATTEMPTS]))
        heights, widths = np.round(np.sqrt(areas * shapes)), np.round(np.sqrt(areas / shapes))
        is_inside = (widths < width) & (heights < height)
        first, rows = is_inside.argmax(1), np.arange(len(draws))
        happens = (draws[:, -3] < self.probability) & is_inside.any(1)
        part_width, part_height = widths[rows, first], heights[rows, first]
        left = np.floor(draws[:, -2] * (width - part_width + 1))
        top = np.floor(draws[:, -1] * (height - part_height + 1))
        boxes = np.stack((left, top, left + part_width, top + part_height), axis=1)
        return np.where(happens[:, None], boxes, 0).astype(np.float32)


def batch_augmentation(
    smallest_area: float, policy: str | None = None, color_jitter: float = 0.0, random_erasing: float = 0.0
) -> BatchChain:
    """
    What photos go through: the flags' names, and the order, of `finetuning.build_augmentation`.

    Raises:
        ValueError: for a policy that is not made for whole batches.
    """
    steps: list[BatchAugmentation] = [BatchPhoto(smallest_area)]
    if policy:
        made = auto_augment(policy)
        if not isinstance(made, RandAugment | TrivialAugmentWide):
            raise ValueError(f"{made.description} is not made for whole batches. ra, ta_wide and timm's rand-... are.")
        steps.append(BatchRandAugment(made))
    if color_jitter:
        steps.append(BatchColorJitter(ColorJitter(color_jitter)))
    if random_erasing:
        steps.append(BatchErasing(RandomErasing(random_erasing)))
    return BatchChain(*steps)
