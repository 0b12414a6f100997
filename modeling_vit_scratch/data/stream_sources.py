# SPDX-License-Identifier: Apache-2.0
"""Opens what --streaming reads: Parquet, WebDataset, JSON lines and CSV files, and data sets of the Hub."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow.parquet

from ..common.errors import InputError, Problems, TrainingStopped
from .arguments import DataArguments
from .columns import IMAGE_COLUMNS, LABEL_COLUMNS, find_column, is_class_label, is_label_list
from .listing import read_rows
from .sources import VALIDATION_SPLITS, Source, own_files, place_name
from .streams import ImageStream, Shard


# Records that are looked at before training, so that wrong labels are told early.
CHECKED_RECORDS = 32


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
        if reader == "csv":
            rows = datasets.IterableDataset.from_generator(_csv_rows, gen_kwargs={"files": names})
        else:
            builder = datasets.load_dataset_builder(reader, data_files=names, cache_dir=cache_dir)
            rows = builder.as_streaming_dataset("train")
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


def _csv_rows(files: list[str]) -> Iterator[dict[str, Any]]:
    """Text as it stands in the files: "007" is not 7."""
    for file in files:
        yield from read_rows(file)


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
