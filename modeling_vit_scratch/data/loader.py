# SPDX-License-Identifier: Apache-2.0
"""Loaders and their worker processes: how these start, what signals do to them, and how they end."""

import functools
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from transformers import TrainingArguments


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


def prepare_workers(loader: DataLoader) -> None:
    """Tells the processes that read images to leave signals to the one that trains: it needs them to finish a step."""
    loader = getattr(loader, "base_dataloader", loader)  # inside of accelerate's, torch's own
    loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)
    loader.running = weakref.WeakSet()
    loader._get_iterator = functools.partial(_start_reading, weakref.ref(loader))  # a loader must not hold itself


def _start_reading(loader: weakref.ref[DataLoader]) -> Iterator:
    """What DataLoader does, which remembers its iterators only while their processes are persistent."""
    loader = loader()
    iterator = type(loader)._get_iterator(loader)
    loader.running.add(iterator)
    return iterator


def release_workers(loaders: list[DataLoader]) -> None:
    """
    Ends the processes that read images, now. Persistent ones, and those of a run that failed, would stay until somebody
    collects garbage; what torch ends them with may then be gone already, and it waits for each for five seconds.
    """
    for loader in loaders:
        loader = getattr(loader, "base_dataloader", loader)
        for iterator in [*getattr(loader, "running", ())]:
            if isinstance(iterator, _MultiProcessingDataLoaderIter):
                iterator._shutdown_workers()
        if getattr(loader, "_iterator", None) is not None:
            loader._iterator = None


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
