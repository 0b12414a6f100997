# SPDX-License-Identifier: Apache-2.0
"""Loaders, the order of repeated images, and worker processes: how they start and obey signals."""

import functools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments

from .dataset import ImageClassificationDataset


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
