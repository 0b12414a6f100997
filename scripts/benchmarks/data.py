# SPDX-License-Identifier: Apache-2.0
"""The way from photo files to a normalised training batch, beside Pillow and transformers' processor."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from benchmarks.timing import OURS
from modeling_vit_scratch.augmentation.photo import PhotoAugmentation
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.data.collation import ImageCollator, Normalize
from modeling_vit_scratch.data.dataset import Examples, ImageClassificationDataset
from modeling_vit_scratch.image_processing_vit_scratch import ViTScratchImageProcessor


RESAMPLE = Image.Resampling.BILINEAR  # of both processors
PHOTO_SIZES = {"12 megapixels": (4000, 3000), "500 x 375": (500, 375)}


@dataclass(frozen=True)
class DataBenchmark:
    """
    What is compared, on one set of photos. Every way makes a float32 batch (B, 3, S, S), normalised to -1..1.

    Attributes:
        files: photos.
        image_size: S.
        smallest_area: of the random parts that training takes.
    """

    files: list[Path]
    image_size: int = 224
    smallest_area: float = 0.35

    def ways(self) -> dict[str, Callable[[], torch.Tensor]]:
        """By name. The random parts are the same in all of them."""
        stock = ViTImageProcessorPil(size={"height": self.image_size, "width": self.image_size})
        size = (self.image_size, self.image_size)

        def whole_resized_by_pillow(photo: Image.Image, index: int) -> Image.Image:
            return photo.resize(size, RESAMPLE)

        def augmented_by_pillow(photo: Image.Image, index: int) -> Image.Image:
            return self._augmentation(photo, np.random.default_rng((0, 0, index)))

        def as_it_is(photo: Image.Image, index: int) -> Image.Image:
            return photo

        def stock_batch(change: Callable[[Image.Image, int], Image.Image], do_resize: bool = False) -> torch.Tensor:
            photos = (change(Image.open(file).convert("RGB"), index) for index, file in enumerate(self.files))
            arrays = [stock(photo, do_resize=do_resize, return_tensors="pt") for photo in photos]
            return torch.cat([array["pixel_values"] for array in arrays])

        return {
            OURS: self._our_way(fast_decode=True),
            "ours with --fast_decode False": self._our_way(fast_decode=False),
            "Pillow: part, flip; transformers: normalise": lambda: stock_batch(augmented_by_pillow),
            "Pillow: resize; transformers: normalise": lambda: stock_batch(whole_resized_by_pillow),
            # The processor as it is called without a thought: it resizes what has its size already.
            "Pillow: resize; transformers: all": lambda: stock_batch(whole_resized_by_pillow, do_resize=True),
            "transformers: all": lambda: stock_batch(as_it_is, do_resize=True),
        }

    def difference(self) -> dict[str, float]:
        """Between fast and full decoding of the same random parts, in levels from 0 to 255."""
        fast, full = (self._our_way(fast_decode)() * 127.5 for fast_decode in (True, False))
        difference = (fast - full).abs()
        return {"mean": difference.mean().item(), "maximum": difference.max().item()}

    @property
    def _augmentation(self) -> PhotoAugmentation:
        return PhotoAugmentation((self.image_size, self.image_size), RESAMPLE, self.smallest_area)

    def _our_way(self, fast_decode: bool) -> Callable[[], torch.Tensor]:
        """As in training, with the normalisation on the CPU."""
        processor = ViTScratchImageProcessor(size={"height": self.image_size, "width": self.image_size})
        images = datasets.Dataset.from_dict({"image": [str(file) for file in self.files]})
        examples = Examples(images.cast_column("image", datasets.Image(decode=False)), [0] * len(self.files))
        train_set = ImageClassificationDataset(
            examples, processor, augmentation=self._augmentation, fast_decode=fast_decode
        )
        collate, normalize = ImageCollator(), Normalize(processor)
        return lambda: normalize(collate(train_set.__getitems__(list(range(len(train_set)))))["pixel_values"])


def make_photos(folder: Path, size: tuple[int, int], count: int) -> list[Path]:
    """
    JPEG files that cost what photos cost: random shapes at every scale, each with the strength of its size as in
    photographs, and the noise of a sensor. The same for everybody.

    Args:
        folder: for the files.
        size: (width, height) in pixels.
        count: how many.
    """
    files = []
    for number in range(count):
        generator = np.random.default_rng((0x70686F74, number))
        pixels = np.full((size[1], size[0], 3), 128.0, np.float32)
        side = 4
        while side < size[0] // 2:
            shapes = generator.normal(0, 1, (side * size[1] // size[0] + 1, side, 3)).astype(np.float32)
            for channel in range(3):
                layer = Image.fromarray(0.7 * shapes[..., 0] + 0.3 * shapes[..., channel])
                pixels[..., channel] += 110 / side**0.5 * np.asarray(layer.resize(size, Image.Resampling.BICUBIC))
            side *= 2
        pixels += generator.normal(0, 3, pixels.shape).astype(np.float32)
        files.append(folder / f"{size[0]}x{size[1]}_{number}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    return files


def photo_sets(train_dir: str | None, folder: Path, count: int) -> dict[str, list[Path]]:
    """The photos to measure on by the name of the set: a user's, or of both `PHOTO_SIZES`, made in the folder."""
    if train_dir is not None:
        return {train_dir: find_photos(train_dir, count)}
    return {name: make_photos(folder, size, count) for name, size in PHOTO_SIZES.items()}


def find_photos(folder: str, count: int) -> list[Path]:
    """The first photos of a folder, with those below. Raises InputError if there is none."""
    known = set(Image.registered_extensions())
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in known)[:count]
    if not files:
        raise InputError(f"--train_dir {folder}: there is no image in it. Give a folder of photos.")
    return files


def summarize_files(files: list[Path]) -> dict[str, Any]:
    """How many there are and how large."""
    sizes = [Image.open(file).size for file in files]
    return {
        "photos": len(files),
        "megapixels": float(np.median([width * height for width, height in sizes])) / 1e6,
        "kilobytes": float(np.median([file.stat().st_size for file in files])) / 1e3,
    }
