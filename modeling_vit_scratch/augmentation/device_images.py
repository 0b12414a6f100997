# SPDX-License-Identifier: Apache-2.0
"""
All images of a run decoded once, and kept as 8-bit pixels in the memory of the device that trains.

For data that fits: 100,000 images of 64 x 64 are 1.2 GB, and as much once more for what an epoch makes of them. After
the start nothing is read, decoded or sent. `device_augmentation` augments all images of an epoch at its beginning, some
thousand at a time: launching its many small operations for every batch would take longer than learning from it.
"""

from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainingArguments

from ..common.errors import InputError
from ..data.dataset import ImageClassificationDataset
from ..image_decoding_vit_scratch import ImageDecodeError
from .batches import BatchAugmentation, batch_augmentation, to_device


# Keeps these random numbers apart from those of other augmentations, which have the same seed and epoch.
_STREAM = 0x64657669
# Of what is free on the device: the rest is for the network.
_SHARE_OF_MEMORY = 0.7
# Images that are augmented at a time.
_CHUNK = 4096


class DeviceImages(torch.utils.data.Dataset):
    """
    What `ImageClassificationDataset` is, but that `__getitems__` gives a whole batch, on the device, as
    `collation.ImageCollator` returns it.

    Args:
        images: without augmentation: they are kept as the processor resizes and crops them.
        pixels: of all of them, uint8 (N, C, H, W), on the device: see `decode_images`.
        augmentation: of batches; None for held-out images.
        seed: of the augmentation.
    """

    fast_decode = False

    def __init__(
        self,
        images: ImageClassificationDataset,
        pixels: Tensor,
        augmentation: BatchAugmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.examples, self.processor, self.with_keys = images.examples, images.processor, images.with_keys
        self.pixels, self.augmentation, self.seed = pixels, augmentation, seed
        labels = torch.as_tensor(images.examples.labels)
        self.labels = (labels.float() if labels.ndim == 2 else labels).to(pixels.device)
        self._epoch, self._augmented, self._augmented_epoch = 0, pixels, None

    def set_epoch(self, epoch: int) -> None:
        """Changes the random numbers: a row of them for each image, the same for any batches that it may be in."""
        if self.augmentation is not None:
            self._epoch = epoch

    def _pixels_of_epoch(self) -> Tensor:
        """uint8 (N, C, H, W)."""
        if self.augmentation is None or self._augmented_epoch == self._epoch:
            return self._augmented
        generator = np.random.default_rng((_STREAM, self.seed, self._epoch))
        draws = generator.random((len(self), self.augmentation.num_draws), dtype=np.float32)
        if self._augmented_epoch is None:
            self._augmented = torch.empty_like(self.pixels)
        for first in range(0, len(self), _CHUNK):
            part = slice(first, first + _CHUNK)
            self._augmented[part] = self.augmentation(self.pixels[part], draws[part])
        self._augmented_epoch = self._epoch
        return self._augmented

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As in `ImageClassificationDataset`."""
        batch = self.__getitems__([index])
        example = {"pixel_values": batch["pixel_values"][0], "labels": batch["labels"][0]}
        return {**example, "key": tuple(batch["keys"][0].tolist())} if "keys" in batch else example

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """`pixel_values` uint8 (B, C, H, W), `labels` (B, ...), and perhaps `keys` (B, 3), these on the host."""
        rows = torch.tensor(indices)
        places = to_device(rows.numpy(), self.pixels)
        batch = {"pixel_values": self._pixels_of_epoch()[places], "labels": self.labels[places]}
        if self.augmentation is not None or self.with_keys:
            run = torch.tensor([[self.seed, self._epoch]]).expand(len(rows), 2)
            batch["keys"] = torch.cat((run, rows[:, None]), dim=1)
        return batch

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        return self.examples.name(index)


def build_device_images(
    train: ImageClassificationDataset, held_out: ImageClassificationDataset, arguments: TrainingArguments
) -> tuple[DeviceImages, DeviceImages]:
    """
    Decodes what --images_on_device asks for, with --dataloader_num_workers; after that, there is no work for them.

    Args:
        train, held_out: without augmentation.

    Raises:
        InputError: if they don't fit, an image is broken, or there is no such augmentation for batches.
    """
    wishes = arguments.recipe_arguments
    try:
        augmentation = batch_augmentation(
            arguments.smallest_area, wishes.auto_augment, wishes.color_jitter, wishes.random_erasing
        )
    except ValueError as error:
        raise InputError(f"--images_on_device: {error}") from error
    first = train[0]["pixel_values"]
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
    loader = DataLoader(
        images, batch_size=256, num_workers=arguments.dataloader_num_workers, collate_fn=_pixels_of, shuffle=False
    )
    pixels = torch.empty((len(images), *images[0]["pixel_values"].shape), dtype=torch.uint8, device=arguments.device)
    is_quiet = arguments.disable_tqdm or arguments.process_index > 0
    bar, first = tqdm(total=len(images), desc="decoding", unit=" images", disable=is_quiet, leave=False), 0
    try:
        for part in loader:
            pixels[first : first + len(part)] = part.to(arguments.device)
            first += len(part)
            bar.update(len(part))
    except ImageDecodeError as error:
        raise InputError(f"{str(error).splitlines()[-1]} (--images_on_device decodes all before it starts.)") from error
    finally:
        bar.close()
    return pixels


def _pixels_of(examples: list[dict[str, Any]]) -> Tensor:
    return torch.stack([example["pixel_values"] for example in examples])


def _free_memory(device: torch.device) -> int:
    """In bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
