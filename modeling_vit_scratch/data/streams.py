# SPDX-License-Identifier: Apache-2.0
"""
Images that are read while training goes on: --streaming, for data that is larger than the disk. The main process reads
records, worker processes decode them. Neither the number of workers nor a resumption changes order or pixels.
"""

import copy
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerState, TrainingArguments

from ..common.errors import InputError, TrainingStopped
from .dataset import ImageClassificationDataset, StoredImage, multi_hot
from .listing import is_whole_number, path_beside, split_labels


# Keeps these random numbers apart from others with the same seed and epoch.
_STREAM = 0x73747265
# The number of a record is its shard times this, plus its row.
ROWS_PER_SHARD = 1 << 32

Blocks = dict[int, tuple[int, int]]  # the epoch and the number of the first record of each


class Record(NamedTuple):
    """An image as stored, which a worker process decodes."""

    epoch: int
    number: int
    image: StoredImage
    label: int | np.ndarray  # the index of a class; or (K,), 0 and 1, where an image may have several labels


@dataclass(frozen=True)
class Shard:
    rows: datasets.IterableDataset  # undecoded
    name: str
    count: int | None = None  # of rows, if it is known without reading them
    folder: str = ""  # of paths in a table


@dataclass(frozen=True)
class ImageStream:
    """Shards, and which columns hold images and labels."""

    shards: list[Shard]
    image_column: str
    label_column: str | None
    label_names: list[str]  # in the order of the class indices; [] where labels are not needed: all are then 0
    is_multi_label: bool = False
    label_separator: str | None = None  # between several labels in a text
    is_ordered, is_regression = True, False  # as in `LabelledSplit`

    @property
    def count(self) -> int | None:
        """The number of records in an epoch; None if it is not known before the end."""
        counts = [shard.count for shard in self.shards]
        return None if None in counts else sum(counts)

    def used(self) -> list[int]:
        return list(range(len(self.label_names)))

    def read(self, shard: int, start: int = 0, epoch: int = 0) -> Iterator[Record]:
        """The records from row `start` on. Raises InputError for a wrong label, TrainingStopped for a broken shard."""
        source, rows = self.shards[shard], iter(self.shards[shard].rows.skip(start))
        for row in itertools.count(start):
            try:
                values = next(rows, None)
            except (OSError, ValueError, RuntimeError, pyarrow.ArrowException) as error:  # each reader has its own
                cause = str(error).strip() or type(error).__name__
                raise TrainingStopped(
                    f"{source.name} can't be read after row {row}: {cause}. Repair it or the connection, and go on "
                    "from the latest checkpoint with --resume_from_checkpoint True."
                ) from error
            if values is None:
                return
            number, content = shard * ROWS_PER_SHARD + row, values[self.image_column]
            name = self.name(number)
            if isinstance(content, dict):  # how `datasets` stores an image: either may be missing
                path = content.get("path")
                name = f"{name} ({path})" if path else name
                content = path if content.get("bytes") is None else content["bytes"]
            elif isinstance(content, str):
                content = name = path_beside(source.folder, content)
            label = self._label(values[self.label_column], name) if self.label_names else 0
            yield Record(epoch, number, StoredImage(content, name), label)

    def name(self, number: int) -> str:
        shard, row = divmod(number, ROWS_PER_SHARD)
        return f"{self.shards[shard].name}, row {row}"

    def _label(self, value: Any, name: str) -> int | np.ndarray:
        if not self.is_multi_label:
            return self._index(value, name)
        if self.label_separator is not None and isinstance(value, str | None):
            value = split_labels(value, self.label_separator)
        if not isinstance(value, list):
            raise InputError(f"{name}: column {self.label_column!r} has {value!r}, which is no list of labels.")
        return multi_hot([[self._index(label, name) for label in value]], len(self.label_names))[0]

    def _index(self, value: Any, name: str) -> int:
        known = len(self.label_names)
        if isinstance(value, str):
            value = value.rstrip("\r\n")
            if value in self.label_names:
                return self.label_names.index(value)
            value = int(value) if is_whole_number(value) else value  # in CSV, which has no other type than text
        if isinstance(value, int) and 0 <= value < known:
            return value
        raise InputError(
            f"{name}: the label {value!r} in column {self.label_column!r} is none of the {known} label names, nor a "
            f"number from 0 to {known - 1}. Correct it, or give another --label_names_file."
        )


class RecordOrder:
    """
    The records that a process trains on, in their order: that of the shards, new in each epoch, then shuffled in blocks
    of `buffer_size`. While a block is given out the next is read, so memory holds about one.

    If rows are counted (Parquet), each process has an equal part of all, at most one record longer than another. If
    not, it has every world_size-th shard if that divides their number, or else every world_size-th row, and repeats
    without end; an epoch is then one round of a process.
    """

    def __init__(self, stream: ImageStream, seed: int, buffer_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.stream, self.seed, self.buffer_size = stream, seed, buffer_size
        self.rank, self.world_size = rank, world_size

    def counted(self, epoch: int, first: int = 0) -> Iterator[Record]:
        """The records of an epoch from the `first` on, if the rows are counted."""
        block = first // self.buffer_size
        start, stop = (rank * self.stream.count // self.world_size for rank in (self.rank, self.rank + 1))
        records = self._rows(epoch, start + block * self.buffer_size, stop)
        return itertools.islice(self._shuffled(records, block, epoch, {}), first % self.buffer_size, None)

    def endless(self, first: int = 0, blocks: Blocks | None = None) -> Iterator[Record]:
        """If they are not, the records round after round. Reading begins at the last of `blocks` before `first`."""
        blocks = {} if blocks is None else blocks
        block = max((number for number in blocks if number * self.buffer_size <= first), default=0)
        records = self._rounds(*blocks.get(block, (0, None)))
        return itertools.islice(self._shuffled(records, block, 0, blocks), first - block * self.buffer_size, None)

    def _shards(self, epoch: int) -> list[int]:
        return np.random.default_rng((_STREAM, self.seed, epoch)).permutation(len(self.stream.shards)).tolist()

    def _rows(self, epoch: int, start: int, stop: int) -> Iterator[Record]:
        before = 0
        for shard in self._shards(epoch):
            count = self.stream.shards[shard].count
            first, last = max(start - before, 0), min(stop - before, count)
            if first < last:
                yield from itertools.islice(self.stream.read(shard, first, epoch), last - first)
            before += count

    def _rounds(self, epoch: int, number: int | None) -> Iterator[Record]:
        """This process's records without end, from the one of this number in an epoch on, or from its start."""
        by_shard = len(self.stream.shards) % self.world_size == 0
        while True:
            order, is_empty = self._shards(epoch), number is None
            resumed, row = divmod(order[0] * ROWS_PER_SHARD if number is None else number, ROWS_PER_SHARD)
            first = order.index(resumed)
            for position, shard in enumerate(order[first:], start=first):
                if not by_shard or position % self.world_size == self.rank:
                    for record in self.stream.read(shard, row, epoch):
                        if by_shard or (record.number + position) % self.world_size == self.rank:
                            is_empty = False
                            yield record
                row = 0
            if is_empty:
                raise TrainingStopped(f"Process {self.rank} finds no image in its shards. Take fewer processes.")
            epoch, number = epoch + 1, None

    def _shuffled(self, records: Iterator[Record], number: int, epoch: int, blocks: Blocks) -> Iterator[Record]:
        """Shuffles block after block, from the one with this number on; notes in `blocks` where each begins."""
        block = list(itertools.islice(records, self.buffer_size))
        while block:
            blocks[number] = block[0].epoch, block[0].number
            order = np.random.default_rng((_STREAM, self.seed, epoch, self.rank, number)).permutation(len(block))
            following: list[Record] = []
            for index in order.tolist():
                following.extend(itertools.islice(records, 1))
                record, block[index] = block[index], None
                yield record
            block, number = following, number + 1


@dataclass(frozen=True)
class RecordExamples:
    """The records of a batch, by their numbers: in place of `Examples`."""

    records: dict[int, Record]

    def index(self, number: int) -> int:
        return number

    def label(self, number: int) -> int | np.ndarray:
        return self.records[number].label

    def another(self, generator: np.random.Generator) -> int:
        """Any record of the batch; others are not in memory."""
        return int(generator.choice(list(self.records)))

    def stored(self, numbers: list[int]) -> list[StoredImage]:
        return [self.records[number].image for number in numbers]


class StreamDataset(Dataset):
    """As `images`, which decode and augment, but its indices are the records that `StreamBatches` gives."""

    def __init__(self, stream: ImageStream, images: ImageClassificationDataset, buffer_size: int) -> None:
        self.stream, self.images, self.buffer_size, self.epoch = stream, images, buffer_size, 0

    @property
    def augmentation(self) -> Any:
        return self.images.augmentation

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def name(self, number: int) -> str:
        return self.stream.name(number)

    def __len__(self) -> int:
        if self.stream.count is None:  # torch asks for a TypeError
            raise TypeError("The number of records of this stream is not known.")
        return self.stream.count

    def __getitems__(self, records: list[Record]) -> list[dict[str, Any]]:
        examples = []
        for epoch, group in itertools.groupby(records, key=lambda record: record.epoch):
            batch = {record.number: record for record in group}
            images = copy.copy(self.images)
            images.examples, images._epoch = RecordExamples(batch), torch.tensor(epoch)
            examples += images.__getitems__(list(batch))
        return examples


class StreamBatches(TrainerCallback):
    """
    The batches of this process, as lists of records: torch's batch sampler. A callback of the Trainer, to resume where
    a checkpoint, `start_from`, left the stream without reading again what came before.

    If the records are counted, every process takes as many steps in an epoch as the smallest part has; one record of a
    larger part may be left out. If not, there is no end and no epoch.
    """

    def __init__(self, dataset: StreamDataset, order: RecordOrder, batch_size: int, drop_last: bool = False) -> None:
        self.dataset, self.order, self.batch_size, self.drop_last = dataset, order, batch_size, drop_last
        self.blocks: Blocks = {}
        self.skipped, self.start_from = (-1, 0), None

    @classmethod
    def from_arguments(cls, dataset: StreamDataset, arguments: TrainingArguments) -> "StreamBatches":
        rank, world_size = arguments.process_index, arguments.world_size
        order = RecordOrder(dataset.stream, arguments.seed, dataset.buffer_size, rank, world_size)
        return cls(dataset, order, arguments.train_batch_size, arguments.dataloader_drop_last)

    @property
    def is_endless(self) -> bool:
        return self.order.stream.count is None

    def skip(self, epoch: int, batches: int) -> None:
        """Leaves the first batches of this epoch empty: accelerate skips them."""
        self.skipped = epoch, batches

    def __len__(self) -> int:
        if self.is_endless:
            raise TypeError("This stream has no end.")
        smallest = self.order.stream.count // self.order.world_size
        return smallest // self.batch_size if self.drop_last else math.ceil(smallest / self.batch_size)

    def __iter__(self) -> Iterator[list[Record]]:
        epoch = self.dataset.epoch
        skipped = self.skipped[1] if self.skipped[0] == epoch else 0
        first = skipped * self.batch_size
        records = self.order.endless(first, self.blocks) if self.is_endless else self.order.counted(epoch, first)
        following = itertools.count() if self.is_endless else range(len(self) - skipped)
        yield from ([] for _ in range(skipped))
        yield from (list(itertools.islice(records, self.batch_size)) for _ in following)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.start_from is None or args.ignore_data_skip:
            return
        epoch, steps = 0, state.global_step
        if self.is_endless:
            self.load(Path(self.start_from))
        else:
            epoch, steps = divmod(steps, math.ceil(len(self) / args.gradient_accumulation_steps))
        self.skip(epoch, steps * args.gradient_accumulation_steps)

    def save(self, folder: Path, batches: int) -> None:
        """Writes where an endless stream was after so many batches."""
        if not self.is_endless:
            return
        block = max(block for block in self.blocks if block * self.order.buffer_size <= batches * self.batch_size)
        position = {"block": block, "first": self.blocks[block], "run": self._run()}
        self._file(folder).write_text(json.dumps(position), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote. Raises InputError if that belongs to another order of records."""
        if not self._file(folder).is_file():
            return
        position, now = json.loads(self._file(folder).read_text(encoding="utf-8")), self._run()
        if position["run"] != now:
            start = f"--resume_from_checkpoint {folder} has read its stream in another order"
            way_out = "Give the flags and the number of processes of the first run."
            raise InputError(f"{start}: then {position['run']}, now {now}. {way_out}")
        self.blocks = {position["block"]: tuple(position["first"])}

    def _file(self, folder: Path) -> Path:
        return folder / f"stream_{self.order.rank}.json"

    def _run(self) -> dict[str, int]:
        order = self.order
        names = {"shards": len(order.stream.shards), "seed": order.seed, "processes": order.world_size}
        return {**names, "shuffle_buffer_size": order.buffer_size}


def check_stream(stream: ImageStream, arguments: TrainingArguments, repeats: int = 1) -> None:
    """Raises InputError if the stream can't do what the flags ask for; `repeats` is --aug_repeats."""
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
