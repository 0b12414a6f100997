# SPDX-License-Identifier: Apache-2.0
"""
Images that are read while training goes on: `--streaming`, for data that is larger than the disk.

A stream is a list of shards (files) and an order of their records, which is a function of the seed and the epoch. Order
and pixels depend neither on how many worker processes there are nor on where a run was stopped.
"""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet

from .arguments import DataArguments
from .columns import IMAGE_COLUMNS, LABEL_COLUMNS, find_column, is_class_label
from .errors import InputError, Problems, TrainingStopped
from .multi_label import is_label_list, multi_hot
from .sources import VALIDATION_SPLITS, Source, own_files, place_name


# Keeps the random order of records apart from other random numbers with the same seed and epoch.
_STREAM = 0x73747265
# The number of a record: its shard, times this, plus its row there. A number holds for any order and any epoch.
ROWS_PER_SHARD = 1 << 32
# Records that are looked at before training, so that wrong labels are told early.
CHECKED_RECORDS = 32


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


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_stream(
    arguments: DataArguments, cache_dir: str | None, problems: Problems, needs_labels: bool = True
) -> Source | None:
    """
    Opens what the command line names. Of Parquet files the numbers of rows are read, of all a few records.

    Returns:
        A source whose `train` is an ImageStream; None if that can't be had. Why not is then among the problems. The
        held-out images of a Hub data set are copied to the cache, undecoded; without such, `validation` is None.
    """
    if arguments.train_dir is not None:
        return _read_own(arguments, cache_dir, problems, needs_labels)
    return _read_hub(arguments, cache_dir, problems, needs_labels)


def _read_own(arguments: DataArguments, cache_dir: str | None, problems: Problems, needs_labels: bool) -> Source | None:
    place = arguments.train_dir
    if Path(place).expanduser().is_dir():
        problems.add(
            f"--train_dir {place} is a folder: --streaming reads files of many images, e.g. {place}/'*.parquet' or "
            f"{place}/'*.tar'. Leave out --streaming for a folder of images."
        )
        return None
    found = own_files("--train_dir", place, problems)
    if found is None:
        return None
    reader, files = found
    names = [str(file) for file in files]
    try:
        rows = datasets.load_dataset_builder(reader, data_files=names, cache_dir=cache_dir).as_streaming_dataset(
            "train"
        )
        shards = _shards(rows, names)
    except Exception as error:  # a broken file raises whatever its parser raises
        problems.add(f"--train_dir {place} can't be read as {reader}: {str(error).strip()}")
        return None
    stream = _build(shards, rows.features, arguments, problems, needs_labels)
    return None if stream is None else Source(name=place_name(place), train=stream)


def _read_hub(arguments: DataArguments, cache_dir: str | None, problems: Problems, needs_labels: bool) -> Source | None:
    name = arguments.dataset_name
    try:
        builder = datasets.load_dataset_builder(name, arguments.dataset_config_name, cache_dir=cache_dir)
        splits = builder.as_streaming_dataset()
        if "train" not in splits:
            problems.add(f"--dataset_name {name} has no train split; it has: {', '.join(splits)}.")
            return None
        files = (getattr(builder.config, "data_files", None) or {}).get("train", [])
        shards = _shards(splits["train"], [str(file) for file in files])
    except Exception as error:  # the library raises a dozen types here, all of them about the name or the connection
        problems.add(f"--dataset_name {name} can't be streamed: {str(error).strip()}")
        return None
    stream = _build(shards, splits["train"].features, arguments, problems, needs_labels)
    if stream is None:
        return None
    held_out = next((splits[split] for split in VALIDATION_SPLITS if split in splits), None)
    is_local = Path(name).exists()
    return Source(
        name=Path(name).resolve().name if is_local else name,
        train=stream,
        validation=None if held_out is None else _stored(_undecoded(held_out), cache_dir),
        hub_id=None if is_local else name,
        license=builder.info.license or None,
        url=None if is_local else f"https://huggingface.co/datasets/{name}",
    )


def _shards(rows: datasets.IterableDataset, files: list[str]) -> list[Shard]:
    """One for each file; where `datasets` shards in another way, its own, with unknown counts."""
    rows, count = _undecoded(rows), rows.num_shards
    if count != len(files):
        return [Shard(rows.shard(count, index), f"shard {index}") for index in range(count)]
    counts: list[int | None] = [None] * count
    if all(file.endswith(".parquet") for file in files):
        with ThreadPoolExecutor(16) as pool:  # mostly waiting, where files are far away
            counts = list(pool.map(_parquet_rows, files))
    return [
        Shard(rows.shard(count, index), Path(file).name, counts[index], str(Path(file).parent))
        for index, file in enumerate(files)
    ]


def _parquet_rows(file: str) -> int:
    """From the end of the file: no image is read."""
    with fsspec.open(file, "rb") as opened:
        return pyarrow.parquet.ParquetFile(opened).metadata.num_rows


def _undecoded(rows: datasets.IterableDataset) -> datasets.IterableDataset:
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _stored(rows: datasets.IterableDataset, cache_dir: str | None) -> datasets.Dataset:
    """A copy in the cache. Loading the split by its name would fetch all the others, too."""
    return datasets.Dataset.from_generator(lambda: iter(rows), features=rows.features, cache_dir=cache_dir)


def _build(
    shards: list[Shard],
    features: datasets.Features | None,
    arguments: DataArguments,
    problems: Problems,
    needs_labels: bool,
) -> ImageStream | None:
    first = next(iter(shards[0].rows), None)
    if first is None:
        problems.add(f"{shards[0].name} has no rows. Remove it.")
        return None
    features, columns = features or {}, list(first)
    is_image = [column for column in columns if isinstance(features.get(column), datasets.Image)]
    is_label = [column for column in columns if is_class_label(features.get(column))]
    image = find_column("image", arguments.image_column_name, is_image, IMAGE_COLUMNS, columns, "training", problems)
    # Where labels are of no use, one that can't be told is none, not a mistake.
    noted = problems if needs_labels or arguments.label_column_name or arguments.label_names_file else Problems()
    label = find_column("label", arguments.label_column_name, is_label, LABEL_COLUMNS, columns, "training", noted)
    names = label and _label_names(features.get(label), label, arguments.label_names_file, noted)
    if image is None or (names is None and noted is problems):
        return None
    is_multi_label = arguments.label_separator is not None or is_label_list(features.get(label))
    stream = ImageStream(shards, image, label, names or [], is_multi_label, arguments.label_separator)
    try:
        for _ in itertools.islice(stream.read(0), CHECKED_RECORDS):
            pass
    except (InputError, TrainingStopped) as error:
        problems.add(str(error))
        return None
    return stream


def _label_names(feature: Any, column: str, file: str | None, problems: Problems) -> list[str] | None:
    feature = getattr(feature, "feature", feature)  # of a list
    known = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    if file is None:
        if known is None:
            problems.add(
                f"Column {column!r} does not say which labels there are, and a stream can't be read through before "
                "training. Give --label_names_file FILE, a text file with a name in each line, in the order of numbers."
            )
        return known
    if not Path(file).is_file():
        problems.add(f"--label_names_file {file} is not a file. Give a text file with one name in a line.")
        return None
    names = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        problems.add(
            f"--label_names_file {file}: {len(names)} names, {len(set(names))} of them different. Give each once."
        )
        return None
    if known is not None and len(known) != len(names):
        problems.add(
            f"--label_names_file {file} has {len(names)} names, but column {column!r} has {len(known)} labels."
        )
        return None
    return names
