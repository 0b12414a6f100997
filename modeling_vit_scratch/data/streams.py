# SPDX-License-Identifier: Apache-2.0
"""
Images that are read while training goes on: `--streaming`, for data that is larger than the disk.

A stream is a list of shards (files) and an order of their records, which is a function of the seed and the epoch. Order
and pixels depend neither on how many worker processes there are nor on where a run was stopped.
"""

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..common.errors import InputError, TrainingStopped
from .columns import multi_hot
from .dataset import ImageClassificationDataset, own_loader
from .decoding import StoredImage
from .listing import is_whole_number


# Keeps the random order of records apart from other random numbers with the same seed and epoch.
_STREAM = 0x73747265
# The number of a record: its shard, times this, plus its row there. A number holds for any order and any epoch.
ROWS_PER_SHARD = 1 << 32


class Record(NamedTuple):
    """An image as stored, which a worker process decodes: bytes or a path, and what it is called."""

    epoch: int
    number: int
    content: bytes | str | None
    name: str
    label: int | np.ndarray  # the index of a class; or (K,), 0 and 1, where an image may have several labels


@dataclass(frozen=True)
class Shard:
    """
    One file of a stream.

    Attributes:
        rows: undecoded, of this shard only.
        name: for people.
        count: how many rows there are, if that can be known without reading them.
        folder: what paths in a table are relative to.
    """

    rows: datasets.IterableDataset
    name: str
    count: int | None = None
    folder: str = ""


@dataclass(frozen=True)
class ImageStream:
    """
    Shards, and what is an image and what a label in their rows.

    Attributes:
        image_column, label_column: of the rows.
        label_names: in the order of the class indices; [] where labels are of no use: all are then 0.
        is_multi_label: whether each row has a list of labels.
        label_separator: what stands between the labels, if they are text.
    """

    shards: list[Shard]
    image_column: str
    label_column: str | None
    label_names: list[str]
    is_multi_label: bool = False
    label_separator: str | None = None

    @property
    def count(self) -> int | None:
        """How many records there are in an epoch; None where that is not known before the end."""
        counts = [shard.count for shard in self.shards]
        return None if None in counts else sum(counts)

    def read(self, shard: int, start: int = 0, epoch: int = 0) -> Iterator[Record]:
        """
        The records of a shard from row `start` on. Raises InputError for a label without a name, TrainingStopped where
        the shard can't be read.
        """
        source, rows, row = self.shards[shard], iter(self.shards[shard].rows.skip(start)), start
        while True:
            try:
                values = next(rows, None)
            except (OSError, ValueError, RuntimeError, pyarrow.ArrowException) as error:  # each reader has its own
                raise TrainingStopped(
                    f"{source.name} can't be read after row {row}: {str(error).strip() or type(error).__name__}. Mend "
                    "it or the connection, and go on from the latest checkpoint with --resume_from_checkpoint True."
                ) from error
            if values is None:
                return
            content, name = self._content(values[self.image_column], source, row)
            label = 0
            if self.label_names:
                read = self._labels if self.is_multi_label else self._label
                label = read(values[self.label_column], name)
            yield Record(epoch, shard * ROWS_PER_SHARD + row, content, name, label)
            row += 1

    def name(self, number: int) -> str:
        """What the record with this number is called, for people."""
        shard, row = divmod(number, ROWS_PER_SHARD)
        return f"{self.shards[shard].name}, row {row}"

    @staticmethod
    def _content(value: Any, shard: Shard, row: int) -> tuple[bytes | str | None, str]:
        name = f"{shard.name}, row {row}"
        if isinstance(value, dict):  # how `datasets` stores an image: either may be missing
            path = value.get("path")
            name = f"{name} ({path})" if path else name
            return value["bytes"] if value.get("bytes") is not None else path, name
        if isinstance(value, str):
            return str(Path(shard.folder, value)), str(Path(shard.folder, value))
        return value, name

    def _labels(self, value: Any, name: str) -> np.ndarray:
        if self.label_separator is not None and isinstance(value, str | None):
            value = [word.strip() for word in (value or "").split(self.label_separator) if word.strip()]
        if not isinstance(value, list):
            raise InputError(f"{name}: column {self.label_column!r} has {value!r}, which is no list of labels.")
        return multi_hot([[self._label(label, name) for label in value]], len(self.label_names))[0]

    def _label(self, value: Any, name: str) -> int:
        known = len(self.label_names)
        if isinstance(value, str) and value in self.label_names:
            return self.label_names.index(value)
        if isinstance(value, str) and is_whole_number(value):  # in CSV, which has no other type than text
            value = int(value)
        if isinstance(value, int) and 0 <= value < known:
            return value
        raise InputError(
            f"{name}: the label {value!r} in column {self.label_column!r} is none of the {known} label names, nor a "
            f"number from 0 to {known - 1}. Mend it, or give other --label_names_file."
        )


class RecordOrder:
    """
    Which records a process trains on, and when.

    In each epoch the shards come in a new order. Where their rows can be counted before (Parquet), each process has an
    equal part of all rows in that order, so it reads its own shards and parts of two more; a part is at most one record
    longer than another. Where they can't, each process has every world_size-th shard if that divides their number, or
    else every world_size-th row of all, and goes round without end; an epoch is then one round of a process.

    Then the records are shuffled: each `buffer_size` of them that follow one another among themselves. While one such
    block is given out the next is read, so memory holds about one.
    """

    def __init__(self, stream: ImageStream, seed: int, buffer_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.stream, self.seed, self.buffer_size = stream, seed, buffer_size
        self.rank, self.world_size = rank, world_size

    def part(self) -> tuple[int, int]:
        """First and last + 1 of the rows of this process, in an epoch's order of shards."""
        count = self.stream.count
        return self.rank * count // self.world_size, (self.rank + 1) * count // self.world_size

    def counted(self, epoch: int, first: int = 0) -> Iterator[Record]:
        """The records of an epoch from the `first` on, where the rows are counted."""
        block = first // self.buffer_size
        row, end = self.part()
        walk = self._walk_part(epoch, row + block * self.buffer_size, end)
        shuffled = itertools.chain.from_iterable(self._shuffled(walk, block, epoch))
        return itertools.islice(shuffled, first - block * self.buffer_size, None)

    def endless(self, first: int = 0, places: dict[int, tuple[int, int]] | None = None) -> Iterator[Record]:
        """
        The records from the `first` on, round after round, where the rows are not counted.

        Args:
            places: of each block read so far the epoch and the number of its first record, which is filled, and from
                which reading begins. Without it, all is read again from the start.
        """
        places = {} if places is None else places
        block = max((place for place in places if place * self.buffer_size <= first), default=0)
        walk = self._walk_round(*places.get(block, (0, None)))
        shuffled = itertools.chain.from_iterable(self._shuffled(walk, block, 0, places))
        return itertools.islice(shuffled, first - block * self.buffer_size, None)

    def _shards(self, epoch: int) -> list[int]:
        return np.random.default_rng((_STREAM, self.seed, epoch)).permutation(len(self.stream.shards)).tolist()

    def _walk_part(self, epoch: int, row: int, end: int) -> Iterator[Record]:
        before = 0
        for shard in self._shards(epoch):
            count = self.stream.shards[shard].count
            start, stop = max(row - before, 0), min(end - before, count)
            if start < stop:
                yield from itertools.islice(self.stream.read(shard, start, epoch), stop - start)
            before += count

    def _walk_round(self, epoch: int, number: int | None) -> Iterator[Record]:
        by_shard = len(self.stream.shards) % self.world_size == 0
        while True:
            order, is_empty = self._shards(epoch), True
            for position, shard in enumerate(order):
                start = 0
                if number is not None:
                    if shard != number // ROWS_PER_SHARD:
                        continue
                    start, number = number % ROWS_PER_SHARD, None
                if by_shard and position % self.world_size != self.rank:
                    continue
                for record in self.stream.read(shard, start, epoch):
                    if by_shard or (record.number + position) % self.world_size == self.rank:
                        is_empty = False
                        yield record
            if is_empty and start == 0:
                raise TrainingStopped(f"Process {self.rank} finds no image in its shards. Take fewer processes.")
            epoch += 1

    def _shuffled(
        self, walk: Iterator[Record], number: int, epoch: int, places: dict[int, tuple[int, int]] | None = None
    ) -> Iterator[Iterator[Record]]:
        block = list(itertools.islice(walk, self.buffer_size))
        while block:
            if places is not None:
                places[number] = block[0].epoch, block[0].number
            order = np.random.default_rng((_STREAM, self.seed, epoch, self.rank, number)).permutation(len(block))
            following: list[Record] = []
            yield self._give_out(block, order.tolist(), walk, following)
            block, number = following, number + 1

    @staticmethod
    def _give_out(
        block: list[Record | None], order: list[int], walk: Iterator[Record], following: list[Record]
    ) -> Iterator[Record]:
        for index in order:
            following.extend(itertools.islice(walk, 1))
            record, block[index] = block[index], None
            yield record


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
