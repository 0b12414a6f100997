# SPDX-License-Identifier: Apache-2.0
"""
Repeated augmentation (Hoffer et al., arXiv:1901.09335; Berman et al., arXiv:1902.05509), as in DeiT and DeiT III: each
image several times in a row, differently augmented.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments

from .dataset import ImageClassificationDataset
from .loader import own_loader


class RepeatedAugmentation(Sampler[int]):
    """
    The images of one process in an epoch: DeiT's `RASampler` and timm's `RepeatAugSampler`.

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
