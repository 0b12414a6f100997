# SPDX-License-Identifier: Apache-2.0
"""
Images as they are stored, with their labels, and the torch data set that makes of them what the network takes.

Training decodes JPEG photos at 1/2, 1/4 or 1/8 of the sides, and resizes with torch's 8-bit kernels: at most one level
away from Pillow, but where bicubic enlarges one side and reduces the other. Evaluations decode in full with Pillow.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from transformers.image_processing_utils import BaseImageProcessor

from ..common.errors import take_in_hand
from ..image_decoding_vit_scratch import ImageDecodeError, decode_errors, is_scalable_jpeg, open_image, orientation_of
from ..image_processing_vit_scratch import TORCH_FILTERS, ViTScratchImageProcessor, resize_interleaved


# Keeps the random numbers that choose another image apart from those of the augmentation.
_REPLACEMENT = 0x62726F6B
# Rows that are read at a time: they may hold whole files.
_ROWS_AT_ONCE = 16
# The EXIF orientations whose x (y) axis runs against one of the axes that are stored, and those with swapped sides.
_X_IS_REVERSED, _Y_IS_REVERSED, _IS_TURNED = {2, 3, 6, 7}, {3, 4, 7, 8}, {5, 6, 7, 8}

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


class Augmentation(Protocol):
    """
    Any callable (image, generator) -> image that can be pickled for worker processes; `description` is for cards. Of
    crops of an image, lists by the names that the network takes them under: see `augmentation.multi_crop`.
    """

    description: str

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Image.Image: ...


@dataclass(frozen=True)
class StoredImage:
    """Path or bytes of an image file, None where a table has neither; `name` is for messages."""

    content: str | bytes | None
    name: str

    def decode(self, decoder: ViTScratchImageProcessor) -> Image.Image | np.ndarray:
        """The image, upright. Raises ImageDecodeError."""
        return self._read(decoder.decode)

    def fit(self, processor: ViTScratchImageProcessor, **settings: Any) -> torch.Tensor:
        """uint8 (C, H, W), decoded, resized and cropped: see the processor's `fit`."""
        return torch.from_numpy(np.stack(self._read(processor.fit, **settings)))

    def open(self, decoder: ViTScratchImageProcessor) -> "Photo":
        """As `decode`, but JPEG files are not decoded yet."""
        return Photo(self._content(), decoder, self.name)

    def _read(self, function: Callable[..., Any], **settings: Any) -> Any:
        try:
            return function(self._content(), name=self.name, **settings)
        except ValueError as error:  # also another number of channels
            raise ImageDecodeError(str(error)) from error

    def _content(self) -> str | bytes:
        if self.content is None:
            raise ImageDecodeError(f"{self.name} is missing: the row has neither bytes nor a path")
        return self.content


class Photo:
    """
    An image file of which a part is wanted. A JPEG is decoded when part and size are known, any other at once. `width`
    and `height` are those of the whole image, upright. Raises ImageDecodeError.
    """

    def __init__(self, content: str | bytes, decoder: ViTScratchImageProcessor, name: str) -> None:
        with decode_errors(name):
            image = open_image(content)
        self.is_decoded = not isinstance(image, JpegImageFile)
        self.image = decoder.decode(image, name=name) if self.is_decoded else image
        self._decoder, self._name = decoder, name
        self._orientation = 1 if self.is_decoded else orientation_of(image)
        self.width, self.height = self.image.size[::-1] if self._orientation in _IS_TURNED else self.image.size

    def decode(self, size: tuple[int, int], box: Box) -> tuple[Image.Image, Box]:
        """The image, upright, at the scale for a (width, height) of the box, and the box in it. For a JPEG, once."""
        if self.is_decoded:
            return self.image, box
        left, top, right, bottom = box
        with decode_errors(self._name):
            scale = reduction((right - left, bottom - top), size) if is_scalable_jpeg(self.image) else 1
            if scale > 1:
                width, height = self.image.size
                self.image.draft(None, (width // scale, height // scale))
        image = self._decoder.decode(self.image, name=self._name)
        # A side that the scale does not divide is rounded up, at the end of the stored axis.
        x = image.width - self.width / scale if self._orientation in _X_IS_REVERSED else 0.0
        y = image.height - self.height / scale if self._orientation in _Y_IS_REVERSED else 0.0
        return image, (x + left / scale, y + top / scale, x + right / scale, y + bottom / scale)


def reduction(part: tuple[float, float], size: tuple[int, int]) -> int:
    """The greatest of 8, 4, 2 and 1 by which a part can be reduced to no less than the size; both (width, height)."""
    factor = min(part[0] / size[0], part[1] / size[1])
    return next((scale for scale in (8, 4, 2) if factor >= scale), 1)


@dataclass(frozen=True)
class PhotoPart:
    """A part of a photo, resized, and mirrored or not; not decoded yet."""

    photo: Photo
    size: tuple[int, int]  # (width, height)
    resample: int  # the PIL filter; those that torch lacks are Pillow's
    # In pixels of the whole image. Edges that a JPEG's scale does not divide move by half a decoded pixel at most.
    box: tuple[int, int, int, int]
    is_mirrored: bool = False

    def pixels(self) -> torch.Tensor:
        """uint8 (C, H, W). Once. Raises ImageDecodeError."""
        image, box = self.photo.decode(self.size, self.box)
        box = tuple(round(edge) for edge in box)
        if self.resample in TORCH_FILTERS:
            pixels = resize_interleaved(_interleaved(image, box), self.size, self.resample)[0]
            pixels = pixels[: len(image.getbands())].numpy()
        else:
            pixels = to_pixels(image.crop(box).resize(self.size, self.resample)).numpy()
        return torch.from_numpy(np.ascontiguousarray(pixels[..., ::-1] if self.is_mirrored else pixels))

    def to_image(self) -> Image.Image:
        """The same as a PIL image of mode L, RGB or RGBA."""
        return Image.fromarray(self.pixels().permute(1, 2, 0).squeeze(-1).contiguous().numpy())


def _interleaved(image: Image.Image, box: tuple[int, int, int, int]) -> torch.Tensor:
    """uint8 (1, H, W, C). For RGB a view of Pillow's memory, whose fourth channel is padding."""
    left, top, right, bottom = box
    if image.mode == "RGB":
        with contextlib.suppress(ValueError):  # more than 16 MB are not in one piece
            memory = torch.from_dlpack(pyarrow.array(image).values)
            return memory.view(1, image.height, image.width, 4)[:, top:bottom, left:right]
    return torch.from_numpy(np.array(image.crop(box)).reshape(1, bottom - top, right - left, -1))


def to_pixels(image: Image.Image) -> torch.Tensor:
    """uint8 (C, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(band) for band in image.split()]))


@dataclass(frozen=True)
class Examples:
    """Images as stored, and their labels."""

    images: datasets.Dataset  # one column, "image", of undecoded `datasets.Image`
    # Class indices; numbers to predict; or where an image may have several labels, (N, K) uint8, 0 and 1.
    labels: list[int] | list[float] | np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: list[int]) -> "Examples":
        is_array = isinstance(self.labels, np.ndarray)
        labels = self.labels[indices] if is_array else [self.labels[index] for index in indices]
        return Examples(self.images.select(indices), labels)

    def index(self, number: int) -> int:
        """Numbers beyond the last index are the same images again: see `RepeatedAugmentation`."""
        return number % len(self)

    def label(self, number: int) -> int | np.ndarray:
        return self.labels[self.index(number)]

    def another(self, generator: np.random.Generator) -> int:
        return int(generator.integers(len(self)))

    def name(self, index: int) -> str:
        return self.stored([index])[0].name

    def stored(self, indices: list[int]) -> list[StoredImage]:
        """The images of these rows, read in one call: much faster than one call for each."""
        indices = [self.index(number) for number in indices]
        rows = self.images[indices]["image"]
        return [
            StoredImage(None, f"image {index}")
            if row is None
            else StoredImage(row["path"] if row["bytes"] is None else row["bytes"], row["path"] or f"image {index}")
            for index, row in zip(indices, rows)
        ]

    def decode(self, index: int, decoder: ViTScratchImageProcessor) -> Image.Image:
        return self.stored([index])[0].decode(decoder)


def measured(processor: ViTScratchImageProcessor, examples: Examples, maximum: int = 1000) -> ViTScratchImageProcessor:
    """
    The processor for arrays, with their values as they are, and the mean and standard deviation of each channel, in
    float64 over the pixels of up to `maximum` images that are spread evenly over the examples.
    """
    settings = {**processor.to_dict(), "do_eight_bits": False, "rescale_factor": 1.0}
    decoder, count, total, squares = type(processor)(**settings), 0, 0.0, 0.0
    for index in np.unique(np.linspace(0, len(examples) - 1, min(maximum, len(examples))).round().astype(int)):
        pixels = np.asarray(examples.decode(int(index), decoder), dtype=np.float64).reshape(-1, processor.num_channels)
        count, total, squares = count + len(pixels), total + pixels.sum(axis=0), squares + (pixels**2).sum(axis=0)
    std = np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0.0))
    statistics = {"image_mean": (total / count).tolist(), "image_std": np.where(std > 0, std, 1.0).tolist()}
    return type(processor)(**{**settings, **statistics})


def multi_hot(lists: list[list[int]], num_labels: int) -> np.ndarray:
    """(N, K) uint8: 1 for the labels that an image has. Negative indices are left out."""
    hot = np.zeros((len(lists), num_labels), dtype=np.uint8)
    for row, indices in zip(hot, lists):
        row[[index for index in indices if index >= 0]] = 1
    return hot


class ImageClassificationDataset(torch.utils.data.Dataset):
    """
    Map-style dataset: `{"pixel_values": (C, H, W), "labels": int}`, or "labels" of 0. and 1., (K,), where an image may
    have several; with an augmentation or `with_keys` also "key", the (seed, epoch, index) that all random numbers
    depend on. The pixels are uint8, for `collation.Normalize`; a processor of another library normalises by itself.

    `fast_decode`, at reduced scale, is for an augmentation that begins with `PhotoAugmentation`. Up to
    `max_broken_images` that can't be read are replaced by others, whose "broken" has the reasons by index.
    """

    def __init__(
        self,
        examples: Examples,
        processor: BaseImageProcessor,
        num_channels: int = 3,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        with_keys: bool = False,
        fast_decode: bool = False,
        max_broken_images: int = 0,
    ) -> None:
        self.examples, self.processor, self.augmentation, self.seed = examples, processor, augmentation, seed
        self.with_keys, self.fast_decode = with_keys or augmentation is not None, fast_decode
        self.max_broken_images = max_broken_images
        self.is_ours = isinstance(processor, ViTScratchImageProcessor)
        self.decoder = processor if self.is_ours else ViTScratchImageProcessor(num_channels=num_channels)
        # In shared memory, where worker processes that outlive an epoch see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Changes the random numbers. Held-out images and their masks in pretraining stay in epoch 0."""
        if self.augmentation is not None:
            self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.__getitem__, range(len(self)))  # numbers beyond the last index are images, too

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """The examples of a batch: torch's loader prefers this."""
        examples = []
        # A few at a time, and first what is little work: decoding a photo drives all else from the caches.
        for first in range(0, len(indices), _ROWS_AT_ONCE):
            group = indices[first : first + _ROWS_AT_ONCE]
            images = self.examples.stored(group)
            begun = [self._begin(index, image) for index, image in zip(group, images)]
            for index, image, pixels in zip(group, images, begun):
                take_in_hand(image.name)
                examples.append(self._example(index, pixels))
        return examples

    def name(self, index: int) -> str:
        return self.examples.name(index)

    def _begin(self, index: int, stored: StoredImage) -> Callable[[], Any]:
        """Does what comes before decoding; the function returned decodes, and may raise ImageDecodeError."""
        take_in_hand(stored.name)
        if self.augmentation is None:
            return partial(self._fit, stored)
        generator = np.random.default_rng((self.seed, int(self._epoch), index))
        if not self.fast_decode:
            return lambda: self._to_pixels(self.augmentation(stored.decode(self.decoder), generator))
        try:
            photo = stored.open(self.decoder)
            part = self.augmentation(photo, generator)
        except ImageDecodeError as error:
            return partial(_fail, error)
        # A decoded photo is large: it is not kept until its turn comes.
        part = part.to_image() if photo.is_decoded and isinstance(part, PhotoPart) else part
        return partial(self._to_pixels, part)

    def _example(self, index: int, pixels: Callable[[], Any]) -> dict[str, Any]:
        """The image, or in place of a broken one another: always the same in an epoch, after a resumption too."""
        broken: dict[int, str] = {}
        wanted, others = index, None
        for attempt in itertools.count(1):
            try:
                pixel_values = pixels()
                break
            except ImageDecodeError as error:
                if self.max_broken_images == 0 and self.augmentation is None:
                    raise ImageDecodeError(
                        f"{error}. An evaluation or a probe needs this image, and no other can take its place: repair "
                        "or remove it. (--max_broken_images is about training.)"
                    ) from error
                broken[self.examples.index(index)] = str(error)
                if len(broken) > self.max_broken_images or attempt == 100:
                    raise
                others = others or np.random.default_rng((_REPLACEMENT, self.seed, int(self._epoch), wanted))
                index = self.examples.another(others)
                pixels = self._begin(index, *self.examples.stored([index]))
        labels = self.examples.label(index)
        labels = labels if isinstance(labels, int) else torch.as_tensor(labels, dtype=torch.float32)
        values = pixel_values if isinstance(pixel_values, dict) else {"pixel_values": pixel_values}
        example = {**values, "labels": labels}
        if self.with_keys:
            example["key"] = (self.seed, int(self._epoch), index)
        return {**example, "broken": broken} if broken else example

    def _fit(self, stored: StoredImage) -> torch.Tensor:
        if self.is_ours:
            return stored.fit(self.processor)
        return self.processor(stored.decode(self.decoder), return_tensors="pt")["pixel_values"][0]

    def _to_pixels(self, image: Image.Image | PhotoPart | np.ndarray | dict[str, list[Image.Image]]) -> Any:
        if isinstance(image, dict):  # crops
            return {name: torch.stack(list(map(self._to_pixels, crops))) for name, crops in image.items()}
        if isinstance(image, np.ndarray):
            return torch.from_numpy(image)
        if self.is_ours:
            return image.pixels() if isinstance(image, PhotoPart) else to_pixels(image)
        image = image.to_image() if isinstance(image, PhotoPart) else image
        # Not every processor has both settings.
        done = {name: False for name in ("do_resize", "do_center_crop") if hasattr(self.processor, name)}
        return self.processor(image, return_tensors="pt", **done)["pixel_values"][0]


def _fail(error: ImageDecodeError) -> torch.Tensor:
    raise error


class FeatureDataset(ImageClassificationDataset):
    """The images of a data set as features (N, D), in place of pixels."""

    def __init__(self, images: ImageClassificationDataset, features: torch.Tensor) -> None:
        none = SimpleNamespace(description="none: the features of each image are computed once")
        super().__init__(images.examples, images.processor, augmentation=none, seed=images.seed)
        self.features = features

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        labels = map(self.examples.label, indices)
        labels = [one if isinstance(one, int) else torch.as_tensor(one, dtype=torch.float32) for one in labels]
        return [
            {"pixel_values": feature, "labels": label, "key": (self.seed, int(self._epoch), index)}
            for index, label, feature in zip(indices, labels, self.features[list(map(self.examples.index, indices))])
        ]
