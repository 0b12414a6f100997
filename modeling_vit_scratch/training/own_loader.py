# SPDX-License-Identifier: Apache-2.0
"""A loader for batches that are one process's own already, from a sampler that knows of the other processes."""

from collections.abc import Callable
from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset

from .arguments import ImageTrainingArguments


def own_loader(
    dataset: Dataset, arguments: ImageTrainingArguments, collator: Callable[..., Any], **batching: Any
) -> DataLoader:
    """`batching`: the arguments of torch's DataLoader that say which examples make a batch. The rest is the flags'."""
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
