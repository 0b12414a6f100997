# SPDX-License-Identifier: Apache-2.0
"""
--images_on_device: all images decoded once, kept as 8-bit pixels in the memory of the device, and augmented there, for
many small images: 100,000 of 64 x 64 are 1.2 GB, and as much once more for those of an epoch. They are augmented at the
start of an epoch, some thousand at a time: many small operations for every batch would take longer than learning.

Operations that only map colours give the same bits as in `photo`; those that resample differ by rounding.
Nothing here waits for the device. Random numbers are a row for each image: it depends on (seed, epoch, index) alone.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainingArguments

from ..common.errors import InputError
from ..data.collation import ImageCollator, prepare_workers
from ..data.dataset import Augmentation, ImageClassificationDataset
from ..image_decoding_vit_scratch import ImageDecodeError
from . import photo


# Keeps these random numbers apart from others with the same seed and epoch.
_STREAM = 0x64657669
# The fraction of the free memory of the device that images may take: the rest is for the network.
_SHARE_OF_MEMORY = 0.7
# Images that are augmented at a time.
_CHUNK = 4096
# Random rectangles that are tried for an image, as in torchvision and timm.
_ATTEMPTS = 10


def to_device(values: np.ndarray, like: Tensor) -> Tensor:
    """An array on the device of the images, without waiting."""
    values = torch.from_numpy(np.ascontiguousarray(values))
    return (values.pin_memory() if like.is_cuda else values).to(like.device, non_blocking=True)


# Operations: uint8 (B, C, H, W) and the strength of each image, (B,) float32, as in `photo.OPERATIONS`


def _sample(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear, float32, at x and y (B, H, W) in pixels from the left and top edges; the border is repeated."""
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
    # Pillow cuts off decimals; a little is added, since what should be a whole number may lie just below.
    return torch.where(is_inside, (_sample(images, x, y) + 1e-3).floor(), float(photo.GREY)).to(torch.uint8)


def _rotate(images: Tensor, degrees: Tensor) -> Tensor:
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


def _look_up(images: Tensor, table: Tensor) -> Tensor:
    """The table is (B, C, 256)."""
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
    values, levels = images.flatten(2).long(), torch.arange(256, device=images.device)
    counts = torch.zeros(*images.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    last = counts.gather(2, values.amax(2, keepdim=True))
    step = (images.shape[-2] * images.shape[-1] - last) // 255
    before = counts.cumsum(2) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    return _look_up(images, torch.where(step > 0, table, levels))


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    kept = 256 - 2 ** (8 - bits.clamp(max=8).int())
    return images & kept.to(torch.uint8)[:, None, None, None]


def _solarize_add(images: Tensor, amount: Tensor) -> Tensor:
    brighter = (images.int() + amount.int()[:, None, None, None]).clamp(max=255)
    return torch.where(images < 128, brighter.to(torch.uint8), images)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Identity": lambda images, _: images, "AutoContrast": _auto_contrast, "Equalize": _equalize,
    "Invert": lambda images, _: 255 - images,
    "ShearX": lambda images, slope: _affine(images, 1.0, slope, 0.0, 0.0, 1.0, 0.0),
    "ShearY": lambda images, slope: _affine(images, 1.0, 0.0, 0.0, slope, 1.0, 0.0),
    "TranslateX": lambda images, pixels: _affine(images, 1.0, 0.0, pixels, 0.0, 1.0, 0.0),
    "TranslateY": lambda images, pixels: _affine(images, 1.0, 0.0, 0.0, 0.0, 1.0, pixels),
    "Rotate": _rotate, "Posterize": _posterize,
    "Solarize": lambda images, threshold: torch.where(images < threshold[:, None, None, None], images, 255 - images),
    "SolarizeAdd": _solarize_add,
    "Color": lambda images, change: _blend(images, _luma(images).float(), change),
    "Contrast": _contrast, "Brightness": lambda images, change: _blend(images, 0.0, change), "Sharpness": _sharpness,
}  # fmt: skip


def operate(images: Tensor, names: tuple[str, ...], chosen: np.ndarray, strengths: np.ndarray) -> Tensor:
    """One operation on each image: (B,) indices into the names, on the host, and strengths (B,)."""
    order = np.argsort(chosen, kind="stable")
    counts = np.bincount(chosen, minlength=len(names)).tolist()
    rows, strength = to_device(order, images), to_device(strengths[order].astype(np.float32), images)
    parts = zip(names, images[rows].split(counts), strength.split(counts))
    changed = torch.cat([OPERATIONS[name](part, value) for name, part, value in parts if len(part)])
    return torch.empty_like(images).index_copy_(0, rows, changed)


# Augmentations: callables (images, draws) -> images, uint8 (B, C, H, W). `draws` are random numbers from 0 to below 1,
# (B, num_draws), float32, on the host.


class _BatchStep:
    """What one step of an augmentation, `one`, does, for batches."""

    def __init__(self, one: Any) -> None:
        self.one = one


class BatchPhoto(_BatchStep):
    """`PhotoAugmentation`, bilinear; the size stays."""

    num_draws = 2 * _ATTEMPTS + 3

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        height, width = images.shape[-2:]
        left, top, right, bottom = (to_device(edge, images)[:, None] for edge in self.boxes((height, width), draws).T)
        is_mirrored = to_device(draws[:, -1] < 0.5, images)[:, None]
        x, y = (((torch.arange(side, device=images.device) + 0.5) / side)[None] for side in (width, height))
        x = torch.where(is_mirrored, 1 - x, x)
        # The outermost pixels of the part are repeated, not mixed with what was cut off.
        x = (left + x * (right - left)).clamp(left + 0.5, right - 0.5)[:, None, :].expand(-1, height, -1)
        y = (top + y * (bottom - top)).clamp(top + 0.5, bottom - 0.5)[:, :, None].expand(-1, -1, width)
        return _sample(images, x, y).add_(0.5).to(torch.uint8)

    def boxes(self, size: tuple[int, int], draws: np.ndarray) -> np.ndarray:
        """(B, 4) float32, whole numbers: left, top, right, bottom of the part of images of this (height, width)."""
        height, width = size
        areas, shapes = draws[:, :_ATTEMPTS], draws[:, _ATTEMPTS : 2 * _ATTEMPTS]
        areas = height * width * (self.one.smallest_area + (1 - self.one.smallest_area) * areas)
        shapes = width / height * np.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * shapes)
        widths, heights = np.round(np.sqrt(areas * shapes)), np.round(np.sqrt(areas / shapes))
        is_inside = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        boxes = _first_inside(size, widths, heights, is_inside, draws[:, -3:-1])
        return np.where(is_inside.any(1)[:, None], boxes, np.float32([0, 0, width, height]))


class BatchErasing(_BatchStep):
    """`RandomErasing`."""

    num_draws = 2 * _ATTEMPTS + 3

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        height, width = images.shape[-2:]
        left, top, right, bottom = (to_device(edge, images)[:, None] for edge in self.boxes((height, width), draws).T)
        columns, rows = (torch.arange(side, device=images.device)[None] for side in (width, height))
        is_erased = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None]
        return images.masked_fill(is_erased[:, None], photo.GREY)

    def boxes(self, size: tuple[int, int], draws: np.ndarray) -> np.ndarray:
        """As in `BatchPhoto`, of what is erased; all 0 where nothing is."""
        height, width = size
        areas = height * width * (0.02 + (1 / 3 - 0.02) * draws[:, :_ATTEMPTS])
        shapes = np.exp(math.log(0.3) * (1 - 2 * draws[:, _ATTEMPTS : 2 * _ATTEMPTS]))
        heights, widths = np.round(np.sqrt(areas * shapes)), np.round(np.sqrt(areas / shapes))
        is_inside = (widths < width) & (heights < height)
        boxes = _first_inside(size, widths, heights, is_inside, draws[:, -2:])
        happens = (draws[:, -3] < self.one.probability) & is_inside.any(1)
        return np.where(happens[:, None], boxes, np.float32(0))


def _first_inside(
    size: tuple[int, int], widths: np.ndarray, heights: np.ndarray, is_inside: np.ndarray, corners: np.ndarray
) -> np.ndarray:
    """The first rectangle that fits, of those tried for each image (B, _ATTEMPTS), at random corners (B, 2)."""
    rows, first = np.arange(len(widths)), is_inside.argmax(1)
    width, height = widths[rows, first], heights[rows, first]
    left = np.floor(corners[:, 0] * (size[1] - width + 1))
    top = np.floor(corners[:, 1] * (size[0] - height + 1))
    return np.stack((left, top, left + width, top + height), axis=1).astype(np.float32)


class BatchRandAugment(_BatchStep):
    """`RandAugment`, all dialects but big_vision's, which has Cutout; and `TrivialAugmentWide`."""

    def __init__(self, policy: photo.RandAugment | photo.TrivialAugmentWide) -> None:
        super().__init__(policy)
        self.names, self.num_draws = tuple(policy.scales), 4 * policy.num_operations
        if missing := [name for name in self.names if name not in OPERATIONS]:
            raise InputError(
                f"--images_on_device: {policy.description} has {', '.join(missing)}, which is not made for whole "
                "batches."
            )

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        for first in range(0, self.num_draws, 4):
            chosen, strengths = self.choose(images.shape[-2:], draws[:, first : first + 4])
            images = operate(images, ("Identity", *self.names), chosen, strengths)
        return images

    def choose(self, size: tuple[int, int], draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Operations (B,), 0 for none and then the names, and strengths (B,), for images of a (height, width)."""
        chosen = 1 + (draws[:, 0] * len(self.names)).astype(np.int64)
        height, width = size
        strengths = np.zeros(len(draws))
        for row, (number, fraction, sign) in enumerate(zip(chosen, self._fractions(draws[:, 1]), draws[:, 2])):
            name = self.names[number - 1]
            strength_at, is_signed = self.one.scales[name]
            strength = strength_at(fraction, height if name == "TranslateY" else width)
            strengths[row] = -strength if is_signed and sign < 0.5 else strength
        return np.where(draws[:, 3] < self.one.probability, chosen, 0), strengths

    def _fractions(self, draws: np.ndarray) -> list[float]:
        if isinstance(self.one, photo.TrivialAugmentWide):
            return (np.floor(draws * 31) / 30).tolist()
        noise = torch.special.ndtri(torch.from_numpy(draws.astype(np.float64)).clamp(1e-9, 1 - 1e-9)).numpy()
        magnitudes = self.one.magnitude + self.one.magnitude_std * noise
        return (magnitudes.clip(0.0, self.one.most) / self.one.unit).tolist()


class BatchColorJitter(_BatchStep):
    """`ColorJitter`."""

    num_draws = 6

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        orders, names = draws[:, :3].argsort(1), ("Brightness", "Contrast", "Color")
        for step in range(3):
            images = operate(images, names, orders[:, step], self.one.strength * (2 * draws[:, 3 + step] - 1))
        return images


_BATCH_KINDS = {
    photo.PhotoAugmentation: BatchPhoto, photo.ColorJitter: BatchColorJitter, photo.RandomErasing: BatchErasing,
    photo.RandAugment: BatchRandAugment, photo.TrivialAugmentWide: BatchRandAugment,
}  # fmt: skip


class BatchChain:
    """The steps of an augmentation, for batches. Raises InputError for a step that is not made for batches."""

    def __init__(self, augmentation: Augmentation) -> None:
        self.description, self.steps = augmentation.description, []
        for step in augmentation.steps if isinstance(augmentation, photo.Chain) else (augmentation,):
            if type(step) not in _BATCH_KINDS:
                raise InputError(
                    f"--images_on_device: {step.description} is not made for whole batches. ra, ta_wide and timm's "
                    "rand-... are."
                )
            self.steps.append(_BATCH_KINDS[type(step)](step))
        self.num_draws = sum(step.num_draws for step in self.steps)

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        ends = np.cumsum([step.num_draws for step in self.steps])
        for step, own in zip(self.steps, np.split(draws, ends, axis=1)):
            images = step(images, own)
        return images


class DeviceImages(ImageClassificationDataset):
    """The images of a data set with their `pixels`, uint8 (N, C, H, W), on the device: see `decode_images`."""

    def __init__(
        self, images: ImageClassificationDataset, pixels: Tensor, augmentation: BatchChain | None = None, seed: int = 0
    ) -> None:
        super().__init__(
            images.examples, images.processor, augmentation=augmentation, seed=seed, with_keys=images.with_keys
        )
        labels = torch.as_tensor(images.examples.labels)
        self.labels = (labels.float() if labels.ndim == 2 else labels).to(pixels.device)
        self.pixels, self._augmented, self._augmented_epoch = pixels, pixels, None

    def _pixels_of_epoch(self) -> Tensor:
        epoch = int(self._epoch)
        if self.augmentation is None or self._augmented_epoch == epoch:
            return self._augmented
        generator = np.random.default_rng((_STREAM, self.seed, epoch))
        draws = generator.random((len(self), self.augmentation.num_draws), dtype=np.float32)
        if self._augmented_epoch is None:
            self._augmented = torch.empty_like(self.pixels)
        for first in range(0, len(self), _CHUNK):
            part = slice(first, first + _CHUNK)
            self._augmented[part] = self.augmentation(self.pixels[part], draws[part])
        self._augmented_epoch = epoch
        return self._augmented

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.__getitems__([index])
        example = {"pixel_values": batch["pixel_values"][0], "labels": batch["labels"][0]}
        return {**example, "key": tuple(batch["keys"][0].tolist())} if "keys" in batch else example

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A whole batch, as `ImageCollator` makes it; "keys" are on the host."""
        rows = torch.tensor(indices)
        device_rows = to_device(rows.numpy(), self.pixels)
        batch = {"pixel_values": self._pixels_of_epoch()[device_rows], "labels": self.labels[device_rows]}
        if self.with_keys:
            run = torch.tensor([[self.seed, int(self._epoch)]]).expand(len(rows), 2)
            batch["keys"] = torch.cat((run, rows[:, None]), dim=1)
        return batch


def build_device_images(
    train: ImageClassificationDataset, held_out: ImageClassificationDataset, augmentation: Augmentation,
    arguments: TrainingArguments,
) -> tuple[DeviceImages, DeviceImages]:  # fmt: skip
    """
    Decodes the images of two data sets without augmentation. Afterwards the run needs no worker processes. Raises
    InputError if they don't fit, an image is broken, or the augmentation is not made for batches.
    """
    augmentation, first = BatchChain(augmentation), train[0]["pixel_values"]
    if first.dtype != torch.uint8:
        raise InputError("--images_on_device needs this library's image processor. Leave out --image_processor_name.")
    size, free = (2 * len(train) + len(held_out)) * first.numel(), _free_memory(arguments.device)
    if size > _SHARE_OF_MEMORY * free:
        raise InputError(
            f"--images_on_device: {len(train) + len(held_out):,} images of {' x '.join(map(str, first.shape))} values "
            f"take {size / 1e9:.3g} GB, those to train on twice, and {arguments.device} has {free / 1e9:.3g} GB free, "
            f"of which it may take {100 * _SHARE_OF_MEMORY:g} %. Leave it out, or give a smaller --image_size."
        )
    pixels = [decode_images(images, arguments) for images in (train, held_out)]
    arguments.dataloader_num_workers, arguments.dataloader_persistent_workers = 0, False
    arguments.dataloader_prefetch_factor, arguments.dataloader_pin_memory = None, False
    return DeviceImages(train, pixels[0], augmentation, arguments.seed), DeviceImages(held_out, pixels[1])


def decode_images(images: ImageClassificationDataset, arguments: TrainingArguments) -> Tensor:
    """uint8 (N, C, H, W) on the device. Raises InputError for a broken image."""
    loader = DataLoader(images, 256, num_workers=arguments.dataloader_num_workers, collate_fn=ImageCollator())
    prepare_workers(loader)
    pixels = torch.empty((len(images), *images[0]["pixel_values"].shape), dtype=torch.uint8, device=arguments.device)
    is_quiet = arguments.disable_tqdm or arguments.process_index > 0
    try:
        for number, batch in enumerate(tqdm(loader, desc="decoding", unit=" batches", disable=is_quiet, leave=False)):
            pixels[256 * number : 256 * (number + 1)] = batch["pixel_values"]
    except ImageDecodeError as error:
        raise InputError(f"{str(error).splitlines()[-1]} (--images_on_device decodes all before it starts.)") from error
    return pixels


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
