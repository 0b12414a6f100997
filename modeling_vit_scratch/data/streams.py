# SPDX-License-Identifier: Apache-2.0
"""
Images that are read while training goes on: `--streaming`, for data that is larger than the disk.

A stream is a list of shards (files) and an order of their records, which is a function of the seed and the epoch. Order
and pixels depend neither on how many worker processes there are nor on where a run was stopped.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet

from ..common.errors import InputError, TrainingStopped
from .labels import multi_hot
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
