# SPDX-License-Identifier: Apache-2.0
"""The images of the INPUTs of a command line, in an order that never changes, and the rows of tables."""

import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from ..common.errors import InputError, Problems
from ..common.flags import BUILT_IN
from ..data.listing import (
    LISTS,
    TABLES,
    URLS,
    Item,
    image_column_of,
    image_endings,
    item_of_file,
    list_folder,
    list_lines,
    list_shard,
    list_table,
    list_text_file,
    match,
)
from ..data.sources import read_digits, read_elpv
from .arguments import PredictionArguments


STANDARD_INPUT = "-"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_ROWS_AT_A_TIME = 64  # of a Parquet file


class Rows:
    """Tables of images, read row by row."""

    def __init__(self, arguments: PredictionArguments) -> None:
        self._arguments, self.image_column_name = arguments, arguments.image_column_name
        self._tables: dict[str, tuple[Any, str]] = {}  # and their columns of images
        # The Parquet file that is being read, its next row, and the values from there on.
        self._reading: tuple[str, int, Iterator[Any]] | None = None
        # The last damaged row group: the file, its rows, and the reason.
        self._damaged: tuple[str, range, str] | None = None

    def list_parquet(self, path: str) -> Iterator[Item]:
        file, _ = self._parquet(path)
        yield from (Item(f"{path}#{row}", path, row) for row in range(file.metadata.num_rows))

    def list_hub(self, name: str) -> Iterator[Item]:
        table, _ = self._hub(name)
        yield from (Item(f"{name}#{row}", name, row) for row in range(len(table)))

    def read(self, item: Item) -> bytes | str | None:
        """The file in a row as bytes, or its path. Rows of Parquet files are best read in their order."""
        if item.path.lower().endswith(".parquet"):
            value, folder = self._parquet_value(item.path, item.start), os.path.dirname(item.path)
        else:
            table, column = self._hub(item.path)
            value, folder = table[item.start][column], ""
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        return os.path.join(folder, value) if isinstance(value, str) else value

    def _parquet(self, path: str) -> tuple[pyarrow.parquet.ParquetFile, str]:
        if path not in self._tables:
            try:
                file = pyarrow.parquet.ParquetFile(path, memory_map=True)
                features = datasets.Features.from_arrow_schema(file.schema_arrow)
            except (OSError, ValueError, pyarrow.ArrowException) as error:
                raise InputError(f"{path} can't be read as Parquet: {_first_line(error)}") from error
            column = image_column_of(path, self.image_column_name, features)
            self._tables = {path: (file, column)}  # one open file at a time
        return self._tables[path]

    def _parquet_value(self, path: str, row: int) -> Any:
        if self._damaged is not None and self._damaged[0] == path and row in self._damaged[1]:
            raise ValueError(self._damaged[2])
        try:
            if self._reading is None or self._reading[0] != path or self._reading[1] > row:
                self._reading = (path, *self._values_from_group(path, row))
            _, next_row, values = self._reading
            value = next(itertools.islice(values, row - next_row, None)).as_py()
        except (OSError, ValueError, StopIteration, pyarrow.ArrowException) as error:
            group, rows = self._row_group(path, row)
            reason = f"row group {group} can't be read: {_first_line(error)}"
            self._reading, self._damaged = None, (path, range(row, rows.stop), reason)
            raise ValueError(reason) from error
        self._reading = (path, row + 1, values)
        return value

    def _row_group(self, path: str, row: int) -> tuple[int, range]:
        """The row group that holds a row, and all its rows."""
        metadata, group, first = self._parquet(path)[0].metadata, 0, 0
        while first + metadata.row_group(group).num_rows <= row:
            first += metadata.row_group(group).num_rows
            group += 1
        return group, range(first, first + metadata.row_group(group).num_rows)

    def _values_from_group(self, path: str, row: int) -> tuple[int, Iterator[Any]]:
        """The first row of the row group that holds a row, and the values from there to the end."""
        (file, column), (first_group, rows) = self._parquet(path), self._row_group(path, row)
        # Group by group: rows of a damaged one must not be counted with those of the next.
        batches = (
            batch for group in range(first_group, file.num_row_groups)
            for batch in file.iter_batches(_ROWS_AT_A_TIME, [group], [column], use_threads=False)
        )  # fmt: skip
        return rows.start, (value for batch in batches for value in batch.column(0))

    def _hub(self, name: str) -> tuple[datasets.Dataset, str]:
        if name not in self._tables:
            table = _read_built_in(name) if name in BUILT_IN else self._load(name)
            column = image_column_of(name, self.image_column_name, table.features)
            table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
            self._tables[name] = table, column
        return self._tables[name]

    def _load(self, name: str) -> datasets.Dataset:
        options = self._arguments
        try:
            splits = datasets.load_dataset(name, options.dataset_config_name, cache_dir=options.cache_dir)
        except Exception as error:  # the library raises a dozen types, all about the name or the connection
            raise InputError(f"{name} does not exist here, and as a data set of the Hub it can't be read: "
                             f"{str(error).strip()}") from error  # fmt: skip
        if options.split is None and len(splits) == 1:
            return next(iter(splits.values()))
        if options.split not in splits:
            given = "Give one with --split" if options.split is None else f"--split {options.split} is none of them"
            raise InputError(f"{name} has the splits {', '.join(splits)}. {given}.")
        return splits[options.split]


def _read_built_in(name: str) -> datasets.Dataset:
    problems = Problems()
    source = read_digits() if name == "digits" else read_elpv(problems)
    if source is None:
        raise problems.as_error()
    return source.train


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def list_inputs(arguments: PredictionArguments, rows: Rows) -> Iterator[Item]:
    """
    All images, input after input. Tables are opened in `rows`.

    Raises:
        InputError: with all mistakes in the inputs, after the images of the others.
    """
    problems = Problems()
    for given in arguments.inputs:
        try:
            yield from _list_one(given, rows)
        except InputError as error:
            problems.add(f"INPUT {error}")
    if problems.messages:
        raise problems.as_error()


def _list_one(given: str, rows: Rows) -> Iterator[Item]:
    if given == STANDARD_INPUT:
        yield from list_lines(sys.stdin, "")
    elif given.startswith(URLS):
        yield Item(given, given)
    elif os.path.lexists(given) and (given not in BUILT_IN or os.path.isfile(given)):
        yield from _list_path(given, rows)
    elif any(sign in given for sign in "*?["):
        found = False
        for path in match(given):
            found = True
            yield from _list_path(path, rows)
        if not found:
            raise InputError(f"{given}: nothing matches this pattern.")
    elif Path(given).suffix.lower() in image_endings():
        yield Item(given, given)  # one missing photo among others is no reason to stop
    elif _HUB_NAME.fullmatch(given) and Path(given).suffix.lower() not in (*TABLES, *LISTS, ".parquet", ".tar"):
        yield from rows.list_hub(given)
    else:
        raise InputError(f"{given} does not exist.")


def _list_path(path: str, rows: Rows) -> Iterator[Item]:
    ending = Path(path).suffix.lower()
    if os.path.isdir(path):
        yield from list_folder(path)
    elif ending == ".parquet":
        yield from rows.list_parquet(path)
    elif ending == ".tar":
        yield from list_shard(path)
    elif ending in TABLES:
        yield from list_table(path, rows.image_column_name)
    elif ending in LISTS:
        yield from list_text_file(path)
    else:
        yield item_of_file(path, path)
