# SPDX-License-Identifier: Apache-2.0
"""A stream of images as torch's DataLoader takes it: the main process reads records, worker processes decode them."""

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..common.errors import InputError
from .dataset import ImageClassificationDataset
from .decoding import StoredImage
from .loader import own_loader
from .streams import ImageStream, Record, RecordOrder


@dataclass(frozen=True)
class Records:
    """The records of a batch, found by their numbers, in the place of `examples.Examples`."""

    records: dict[int, Record]

    def __len__(self) -> int:
        return len(self.records)

    def index(self, number: int) -> int:
        return number

    def label(self, number: int) -> int:
        return self.records[number].label

    def name(self, number: int) -> str:
        return self.records[number].name

    def another(self, generator: np.random.Generator) -> int:
        """The number of any record of the batch: others are not at hand."""
        return int(generator.choice(list(self.records)))

    def stored(self, numbers: list[int]) -> list[StoredImage]:
        return [StoredImage(self.records[number].content, self.name(number)) for number in numbers]


class StreamDataset(Dataset):
    """
    What `examples.ImageClassificationDataset` makes of an image, for records in place of indices: see `StreamBatches`.

    Args:
        stream: where the records come from.
        images: the data set that decodes and augments; of its examples none is read.
        buffer_size: how many records are shuffled among themselves.
    """

    def __init__(self, stream: ImageStream, images: ImageClassificationDataset, buffer_size: int) -> None:
        self.stream, self.images, self.buffer_size, self.epoch = stream, images, buffer_size, 0

    @property
    def augmentation(self) -> Any:
        return self.images.augmentation

    def set_epoch(self, epoch: int) -> None:
        """Changes the order and the random numbers."""
        self.epoch = epoch

    def name(self, number: int) -> str:
        """What to call an image in a message."""
        return self.stream.name(number)

    def __len__(self) -> int:
        """Raises TypeError, as torch asks for, where the records can't be counted before they are read."""
        if self.stream.count is None:
            raise TypeError("This stream does not say how many records it has.")
        return self.stream.count

    def __getitems__(self, records: list[Record]) -> list[dict[str, Any]]:
        """Examples of records. Their keys are (seed, epoch, number of the record)."""
        examples = []
        for epoch, group in itertools.groupby(records, key=lambda record: record.epoch):
            batch = {record.number: record for record in group}
            images = copy.copy(self.images)
            images.examples, images._epoch = Records(batch), torch.tensor(epoch)
            examples += images.__getitems__(list(batch))
        return examples


class StreamBatches:
    """
    The batches of this process, as lists of records: torch's batch sampler.

    In an epoch that is counted every process takes the same number of steps: as many as the smallest part has. A last
    batch that is not full is smaller. What a larger part has beyond that, at most one record for each process and fewer
    than there are processes, is left out of that epoch. Where nothing can be counted there is no end and no epoch.
    """

    def __init__(self, dataset: StreamDataset, order: RecordOrder, batch_size: int, drop_last: bool = False) -> None:
        self.dataset, self.order, self.batch_size, self.drop_last = dataset, order, batch_size, drop_last
        self.places: dict[int, tuple[int, int]] = {}
        self.skipped = (-1, 0)

    @property
    def is_endless(self) -> bool:
        return self.order.stream.count is None

    def skip(self, epoch: int, batches: int) -> None:
        """
        The first batches of this epoch are not to be read: they are given out empty, for accelerate to skip them, which
        is all that it can do to a batch sampler.
        """
        self.skipped = epoch, batches

    def __len__(self) -> int:
        if self.is_endless:
            raise TypeError("This stream has no end.")
        smallest = self.order.stream.count // self.order.world_size
        return smallest // self.batch_size if self.drop_last else math.ceil(smallest / self.batch_size)

    def __iter__(self) -> Iterator[list[Record]]:
        epoch = self.dataset.epoch
        skipped = self.skipped[1] if self.skipped[0] == epoch else 0
        for _ in range(skipped):
            yield []
        first = skipped * self.batch_size
        if self.is_endless:
            records, left = self.order.endless(first, self.places), None
        else:
            records, left = self.order.counted(epoch, first), len(self) - skipped
        for _ in itertools.count() if left is None else range(left):
            yield list(itertools.islice(records, self.batch_size))

    def save(self, folder: Path, batches: int) -> None:
        """Writes where an endless stream was after so many batches: without, it would be read again from its start."""
        block = max(block for block in self.places if block * self.order.buffer_size <= batches * self.batch_size)
        place = {"block": block, "first": self.places[block], "run": self._run()}
        _place_file(folder, self.order.rank).write_text(json.dumps(place), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote. Raises InputError if that is of another order of records."""
        file = _place_file(folder, self.order.rank)
        if not file.is_file():
            return
        place = json.loads(file.read_text(encoding="utf-8"))
        if place["run"] != self._run():
            raise InputError(
                f"--resume_from_checkpoint {folder} has read its stream in another order: then {place['run']}, now "
                f"{self._run()}. Give the flags and the number of processes of the first run."
            )
        self.places = {place["block"]: tuple(place["first"])}

    def _run(self) -> dict[str, int]:
        order = self.order
        names = {"shards": len(order.stream.shards), "seed": order.seed, "processes": order.world_size}
        return {**names, "shuffle_buffer_size": order.buffer_size}


def _place_file(folder: Path, rank: int) -> Path:
    return folder / f"stream_{rank}.json"


class StreamPlace(TrainerCallback):
    """
    Resumes a stream where a checkpoint left it, without reading again what came before.

    Attributes:
        batches: of the loader. start_from: the checkpoint. The trainer sets both.
    """

    batches: StreamBatches | None = None
    start_from: str | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.start_from is None or args.ignore_data_skip:
            return
        epoch, steps = 0, state.global_step
        if self.batches.is_endless:
            self.batches.load(Path(self.start_from))
        else:
            epoch, steps = divmod(steps, math.ceil(len(self.batches) / args.gradient_accumulation_steps))
        self.batches.skip(epoch, steps * args.gradient_accumulation_steps)

    def save(self, folder: Path, batches: int) -> None:
        """Writes into a checkpoint where the stream was after so many batches, if it can't be computed."""
        if self.batches.is_endless:
            self.batches.save(folder, batches)


def check_stream(stream: ImageStream, arguments: TrainingArguments, repeats: int = 1) -> None:
    """Raises InputError where the stream can't give what the flags ask for; `repeats` is --aug_repeats."""
    if repeats > 1:
        raise InputError("--aug_repeats shuffles all images, which a stream can't. Leave out one of the two.")
    if stream.count is None:
        flags = [] if arguments.max_steps > 0 else ["--max_steps N"]
        strategies = ("eval_strategy", "save_strategy", "logging_strategy")
        flags += [f"--{name} steps" for name in strategies if getattr(arguments, name) == "epoch"]
        if flags:
            raise InputError(
                "The rows of this stream are counted only when they are read (those of Parquet files are known "
                f"before), so it has no epochs. Give {' '.join(flags)}."
            )
    elif stream.count < arguments.world_size * (arguments.train_batch_size if arguments.dataloader_drop_last else 1):
        raise InputError(
            f"{stream.count} images make no batch of {arguments.train_batch_size} for each of {arguments.world_size} "
            "processes. Take fewer processes or a smaller --per_device_train_batch_size."
        )


def stream_loader(
    dataset: StreamDataset, arguments: TrainingArguments, collator: Callable[..., Any]
) -> tuple[DataLoader, StreamBatches]:
    """The loader of this process, and where its batches come from."""
    order = RecordOrder(
        dataset.stream, arguments.seed, dataset.buffer_size, arguments.process_index, arguments.world_size
    )
    batches = StreamBatches(dataset, order, arguments.train_batch_size, arguments.dataloader_drop_last)
    return own_loader(dataset, arguments, collator, batch_sampler=batches), batches
