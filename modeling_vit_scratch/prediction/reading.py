# SPDX-License-Identifier: Apache-2.0
"""From items to batches of pixels. The main process hands out items; worker processes read and decode them."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..common.errors import InputError
from ..data.collation import prepare_workers
from ..data.listing import Item
from ..image_decoding_vit_scratch import ImageDecodeError
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from .inputs import Rows


MAX_BYTES = 1 << 30  # of an encoded image in a shard or a table


class Batch(NamedTuple):
    """
    Attributes:
        number: of the batch in the run: its first image is number * batch size.
        names: (B,).
        pixels: (B, C, H, W), uint8; zeros for images that can't be read.
        errors: (B,), why an image can't be read, or None.
    """

    number: int
    names: list[str]
    pixels: torch.Tensor
    errors: list[str | None]


def pixel_size(processor: ViTScratchImageProcessor) -> tuple[int, int]:
    """
    Height and width of every image that the processor makes.

    Raises:
        InputError: if they depend on the image.
    """
    size = processor.crop_size if processor.do_center_crop else processor.size if processor.do_resize else None
    if size is None or not (size.height and size.width):
        raise InputError(
            "The image processor of MODEL makes images of different sizes, which fit into no batch. Give it a size "
            "with height and width, or do_center_crop, in its preprocessor_config.json."
        )
    return size.height, size.width


class ItemDataset(Dataset):
    """
    Batches of pixels, resized and cropped by the processor and not yet normalised.

    Args:
        processor: of the model.
        fast_decode: whether to decode and resize as with the processor's `do_fast_resize`.
    """

    def __init__(self, processor: ViTScratchImageProcessor, fast_decode: bool) -> None:
        self.processor, self.fast_decode = processor, fast_decode
        channels = processor.num_channels if processor.do_convert_rgb else len(np.atleast_1d(processor.image_mean))
        self.shape = (channels, *pixel_size(processor))

    def __getitems__(self, batch: tuple[int, list[tuple[Item, Any]]]) -> Batch:
        number, items = batch
        pixels, errors = torch.zeros((len(items), *self.shape), dtype=torch.uint8), []
        for row, (item, content) in enumerate(items):
            reason = item.error
            if reason is None:
                try:
                    pixels[row] = self._read(item, content)
                except ValueError as error:  # ImageDecodeError, or an image that does not fit the processor
                    reason = _reason(error, item.name)
            errors.append(reason)
        return Batch(number, [item.name for item, _ in items], pixels, errors)

    def _read(self, item: Item, content: Any) -> torch.Tensor:
        if isinstance(content, ValueError):
            raise content
        name, source = item.name, item.path if item.start is None else content
        if item.size is not None:
            source = _read_member(item)
        if source is None:
            raise ImageDecodeError(f"{name} cannot be read as an image: the row has neither bytes nor a path")
        bands = self.processor.fit(source, name=name, do_fast_resize=self.fast_decode)
        if len(bands) != self.shape[0]:
            raise ValueError(f"it has {len(bands)} channels, and the model takes {self.shape[0]}")
        return torch.from_numpy(np.stack(bands))


def _read_member(item: Item) -> bytes:
    if item.size > MAX_BYTES:
        raise ValueError(f"it has {item.size:,} bytes, and {MAX_BYTES:,} are the limit for an image in a shard")
    try:
        with open(item.path, "rb") as file:
            file.seek(item.start)
            content = file.read(item.size)
    except OSError as error:
        raise ValueError(f"its shard can't be read: {error.strerror}") from error
    if len(content) < item.size:
        raise ValueError(f"the shard ends after {len(content):,} of its {item.size:,} bytes")
    return content


def _reason(error: ValueError, name: str) -> str:
    """The message without the name, which has a column of its own, in one line."""
    lines = str(error).removeprefix(name).removeprefix(" cannot be read as an image").lstrip(": ").splitlines()
    return lines[0] if lines else type(error).__name__


class Batches:
    """A batch sampler for torch: numbers and items of a process's batches, with the contents of rows of tables."""

    def __init__(self, items: Iterable[tuple[int, list[Item]]], rows: Rows) -> None:
        self._items, self._rows = items, rows

    def __iter__(self) -> Iterator[tuple[int, list[tuple[Item, Any]]]]:
        for number, items in self._items:
            yield number, [(item, self._content(item)) for item in items]

    def _content(self, item: Item) -> Any:
        if item.start is None or item.size is not None or item.error is not None:
            return None
        try:
            content = self._rows.read(item)
        except ValueError as error:
            return ValueError(str(error))
        if isinstance(content, bytes) and len(content) > MAX_BYTES:
            return ValueError(f"it has {len(content):,} bytes, and {MAX_BYTES:,} are the limit for an image in a table")
        return content


def build_loader(batches: Batches, dataset: ItemDataset, num_workers: int, pin_memory: bool) -> Iterable[Batch]:
    """Batches in their order, read ahead by the worker processes."""
    loader = DataLoader(
        dataset, batch_sampler=batches, collate_fn=_identity, num_workers=num_workers, pin_memory=pin_memory
    )
    if num_workers:
        prepare_workers(loader)
    return loader


def _identity(batch: Batch) -> Batch:
    return batch
