# SPDX-License-Identifier: Apache-2.0
"""Images as they are stored, with their labels, and the torch data set that makes of them what the network takes."""

import functools
import itertools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor

from ..image_decoding_vit_scratch import ImageDecodeError
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from .decoding import Augmentation, PhotoPart, StoredImage, to_pixels


# Keeps the random numbers that choose another image apart from those of the augmentation.
_REPLACEMENT = 0x62726F6B

_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Examples:
    """
    Images as stored, and a class index for each; or where an image may have several labels, 0 and 1 for every label.

    Attributes:
        images: one column, "image", of undecoded `datasets.Image`.
        labels: indices into the label names; or (N, K), uint8.
    """

    images: datasets.Dataset
    labels: list[int] | np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: list[int]) -> "Examples":
        is_array = isinstance(self.labels, np.ndarray)
        labels = self.labels[indices] if is_array else [self.labels[index] for index in indices]
        return Examples(self.images.select(indices), labels)

    def index(self, number: int) -> int:
        """Numbers beyond the last index are the same images again: see `loader.RepeatedAugmentation`."""
        return number % len(self)

    def label(self, number: int) -> int | np.ndarray:
        return self.labels[self.index(number)]

    def another(self, generator: np.random.Generator) -> int:
        """The index of any image."""
        return int(generator.integers(len(self)))

    def name(self, index: int) -> str:
        """The image's file, or its number where it has none."""
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
        """The image, upright, with the decoder's channels. Raises ImageDecodeError with the name of a broken file."""
        return self.stored([index])[0].decode(decoder)


class ImageClassificationDataset(torch.utils.data.Dataset):
    """
    Map-style dataset: `{"pixel_values": (C, H, W), "labels": int}`, or "labels" of 0. and 1., (K,), where an image may
    have several; and for training "key", the (seed, epoch, index) that everything random is a function of.

    The pixels are uint8, of the size that the model takes, and are normalised on the device: see `pixels`. The only
    exception is a processor of another library, which gives what it gives, normalised.

    Args:
        examples: images and labels.
        processor: the model's image processor: training and serving see the same pixels.
        num_channels: of the model, for a processor that does not decode images itself.
        augmentation: a random change of the image, which has the model's size afterwards.
        seed: of the augmentation.
        with_keys: whether examples have a "key" without an augmentation too.
        fast_decode: decode and resize the fast way: see `decoding`. For an augmentation that begins with
            `PhotoAugmentation`.
        max_broken_images: how many images may be replaced by others because they can't be read. The Trainer counts
            them; an example that took the place of others has "broken", by index why these can't be read.
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
        """
        Changes the random numbers. Called at the start of every epoch, also of one that is resumed in its middle.

        Held-out images, which are not augmented, stay in epoch 0, and so do their masks in pretraining.
        """
        if self.augmentation is not None:
            self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """
        The examples of a batch: torch's loader prefers this. A few at a time, since rows may hold whole files, and of
        these first what is little work and then what is much: decoding a photo drives all else from the caches.
        """
        groups = [indices[first : first + _ROWS_AT_ONCE] for first in range(0, len(indices), _ROWS_AT_ONCE)]
        return [example for group in groups for example in self._examples(group)]

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        return self.examples.name(index)

    def _examples(self, indices: list[int]) -> list[dict[str, Any]]:
        begun = [self._begin(index, stored) for index, stored in zip(indices, self.examples.stored(indices))]
        return [self._example(*self._first_readable(index, one)) for index, one in zip(indices, begun)]

    def _example(self, index: int, pixel_values: torch.Tensor, broken: dict[int, str]) -> dict[str, Any]:
        labels = self.examples.label(index)
        labels = torch.from_numpy(labels).float() if isinstance(labels, np.ndarray) else labels
        example = {"pixel_values": pixel_values, "labels": labels}
        if self.with_keys:
            example["key"] = (self.seed, int(self._epoch), index)
        return {**example, "broken": broken} if broken else example

    def _begin(self, index: int, stored: StoredImage) -> Callable[[], torch.Tensor]:
        """
        What is left to do for the pixels (C, H, W); it may raise ImageDecodeError. With --fast_decode, all that comes
        before the decoding of a JPEG photo is done here.
        """
        if self.augmentation is None:
            return partial(self._fit, stored)
        if not self.fast_decode:
            return lambda: self._as_it_is(self.augmentation(stored.decode(self.decoder), self._generator(index)))
        try:
            photo = stored.open_photo(self.decoder)
            part = self.augmentation(photo, self._generator(index))
        except ImageDecodeError as error:
            return partial(_fail, error)
        # What is decoded is large, and not to be kept until its turn comes.
        part = part.to_image() if photo.is_decoded and isinstance(part, PhotoPart) else part
        return partial(self._as_it_is, part)

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, int(self._epoch), index))

    def _first_readable(
        self, index: int, pixels: Callable[[], torch.Tensor]
    ) -> tuple[int, torch.Tensor, dict[int, str]]:
        """
        The image, or within the limit of broken ones another in its place: always the same in an epoch, after a
        resumption too. Returns its index, its pixels, and what could not be read.
        """
        broken: dict[int, str] = {}
        wanted, others = index, None
        for attempt in itertools.count(1):
            try:
                return index, pixels(), broken
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

    def _fit(self, stored: StoredImage) -> torch.Tensor:
        """The image as the processor decodes, resizes and crops it."""
        if not self.is_ours:
            return self.processor(stored.decode(self.decoder), return_tensors="pt")["pixel_values"][0]
        return stored.fit(self.processor)

    def _as_it_is(self, image: Image.Image | PhotoPart) -> torch.Tensor:
        """The image, which has its size already."""
        if self.is_ours:
            return image.pixels() if isinstance(image, PhotoPart) else to_pixels(image)
        image = image.to_image() if isinstance(image, PhotoPart) else image
        # None of it is a setting that every processor knows.
        done = {name: False for name in ("do_resize", "do_center_crop") if hasattr(self.processor, name)}
        return self.processor(image, return_tensors="pt", **done)["pixel_values"][0]


def _fail(error: ImageDecodeError) -> torch.Tensor:
    raise error


def own_loader(
    dataset: Dataset, arguments: TrainingArguments, collator: Callable[..., Any], **batching: Any
) -> DataLoader:
    """
    A loader for batches that are one process's own already, from a sampler that knows of the other processes.

    `batching`: the arguments of torch's DataLoader that say which examples make a batch. The rest is the flags'.
    """
    loader = DataLoader(
        dataset,
        collate_fn=collator,
        num_workers=arguments.dataloader_num_workers,
        pin_memory=arguments.dataloader_pin_memory,
        persistent_workers=arguments.dataloader_persistent_workers,
        multiprocessing_context=arguments.dataloader_multiprocessing_context,
        prefetch_factor=arguments.dataloader_prefetch_factor,
        **batching,
    )
    # As for one process: accelerate would deal the batches once more.
    return prepare_data_loader(
        loader, arguments.device, num_processes=1, process_index=0, put_on_device=True, non_blocking=True
    )


# ---------------------------------------------------------------------------------------------------------------------
# Repeated augmentation


class RepeatedAugmentation(Sampler[int]):
    """
    The images of one process in an epoch with repeated augmentation (Hoffer et al., arXiv:1901.09335; Berman et al.,
    arXiv:1902.05509): DeiT's `RASampler` and timm's `RepeatAugSampler`.

    The images are shuffled, each is put `repeats` times in a row, and these are dealt to the processes in turn: of an
    image, different processes get different versions. An epoch stays as long as it would be without: it sees only one
    in `repeats` of the images. (DeiT's own is up to 255 images shorter: it ends at a multiple of 256.)

    Gives numbers: `index + repetition * count`, so that each repetition has random numbers of its own.

    Args:
        count: how many images there are.
        repeats: of each.
        seed: of the shuffling, together with the epoch.
        rank, world_size: this process, and how many there are.
    """

    def __init__(self, count: int, repeats: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.count, self.repeats, self.seed, self.rank, self.world_size = count, repeats, seed, rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Changes the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.count / self.world_size)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        places = torch.arange(len(self)) * self.world_size + self.rank
        places %= self.count * self.repeats  # fewer images than processes: from the start again
        numbers = order[places // self.repeats] + places % self.repeats * self.count
        return iter(numbers.tolist())


def repeating_loader(
    dataset: ImageClassificationDataset, arguments: TrainingArguments, repeats: int, collator: Callable[..., Any]
) -> DataLoader:
    """The loader of this process, with each image `repeats` times: --aug_repeats."""
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    sampler = RepeatedAugmentation(len(dataset), repeats, seed, arguments.process_index, arguments.world_size)
    batching = {"batch_size": arguments.train_batch_size, "drop_last": arguments.dataloader_drop_last}
    return own_loader(dataset, arguments, collator, sampler=sampler, **batching)


# ---------------------------------------------------------------------------------------------------------------------
# Worker processes


def prepare_workers(loader: DataLoader) -> None:
    """Tells the processes that read images to leave signals to the one that trains: it needs them to finish a step."""
    loader = getattr(loader, "base_dataloader", loader)  # inside of accelerate's, torch's own
    loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)


def _start_worker(prepare: Callable[[int], None] | None, number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare is not None:
        prepare(number)


def _end_with_parent() -> None:
    """SIGTERM from the process that trains ends this one; from anyone else, e.g. a launcher, it does not."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(0)
