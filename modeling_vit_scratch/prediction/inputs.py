# SPDX-License-Identifier: Apache-2.0
"""
The images that the INPUTs of a command line stand for, in an order that never changes, and the rows of their tables.
"""

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
from ..data.arguments import BUILT_IN
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
# Parquet rows that are read at a time.
_ROWS = 64


def list_inputs(arguments: PredictionArguments, rows: "Rows") -> Iterator[Item]:
    """
    All images, input after input.

    Args:
        arguments: the command line's.
        rows: the tables; those that the inputs name are opened in it.

    Raises:
        InputError: with everything that is wrong with the inputs, after all that is right has been listed.
    """
    problems = Problems()
    for given in arguments.inputs:
        try:
            yield from _list_one(given, rows)
        except InputError as error:
            problems.add(f"INPUT {error}")
    if problems.messages:
        raise problems.as_error()


def _list_one(given: str, rows: "Rows") -> Iterator[Item]:
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


def _list_path(path: str, rows: "Rows") -> Iterator[Item]:
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


class Rows:
    """
    Tables of images, read row after row.

    Args:
        arguments: the command line's.
    """

    def __init__(self, arguments: PredictionArguments) -> None:
        self._arguments, self.image_column_name = arguments, arguments.image_column_name
        self._tables: dict[str, tuple[Any, str]] = {}
        # The Parquet file that is being read: its name, the next row, and the rows themselves.
        self._reading: tuple[str, int, Iterator[Any]] | None = None
        # Rows that are lost with a damaged row group: the file, first and last + 1, and why.
        self._lost: tuple[str, int, int, str] | None = None

    def list_parquet(self, path: str) -> Iterator[Item]:
        file, _ = self._parquet(path)
        yield from (Item(f"{path}#{row}", path, row) for row in range(file.metadata.num_rows))

    def list_hub(self, name: str) -> Iterator[Item]:
        table, _ = self._hub(name)
        yield from (Item(f"{name}#{row}", name, row) for row in range(len(table)))

    def read(self, item: Item) -> bytes | str | None:
        """What a row holds: the file as bytes, or its path. Rows of Parquet files are best read in their order."""
        if item.path.lower().endswith(".parquet"):
            value = self._next_row(item.path, item.start)
            folder = os.path.dirname(item.path)
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
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise InputError(f"{path} can't be read as Parquet: {reason}") from error
            column = image_column_of(path, self.image_column_name, features)
            self._tables = {path: (file, column)}  # one open file at a time
        return self._tables[path]

    def _next_row(self, path: str, row: int) -> Any:
        if self._lost is not None and self._lost[0] == path and self._lost[1] <= row < self._lost[2]:
            raise ValueError(self._lost[3])
        try:
            if self._reading is None or self._reading[0] != path or self._reading[1] > row:
                self._reading = (path, *self._from_group_of(path, row))
            _, following, values = self._reading
            for _ in range(row - following):
                next(values)
            value = next(values).as_py()
        except (OSError, ValueError, StopIteration, pyarrow.ArrowException) as error:
            reason = (str(error).strip().splitlines() or ["it is damaged"])[0]
            group, first = self._group_of(path, row)
            end = first + self._parquet(path)[0].metadata.row_group(group).num_rows
            self._reading, self._lost = None, (path, row, end, f"row group {group} can't be read: {reason}")
            raise ValueError(self._lost[3]) from error
        self._reading = (path, row + 1, values)
        return value

    def _group_of(self, path: str, row: int) -> tuple[int, int]:
        """The row group that holds a row, and its first row."""
        metadata, group, first = self._parquet(path)[0].metadata, 0, 0
        while first + metadata.row_group(group).num_rows <= row:
            first += metadata.row_group(group).num_rows
            group += 1
        return group, first

    def _from_group_of(self, path: str, row: int) -> tuple[int, Iterator[Any]]:
        """The first row of the row group that holds a row, and the values from there to the end."""
        (file, column), (group, first) = self._parquet(path), self._group_of(path, row)
        # Group by group: rows of a damaged one must not be counted with those of the next.
        batches = (
            batch for one in range(group, file.num_row_groups)
            for batch in file.iter_batches(_ROWS, [one], [column], use_threads=False)
        )  # fmt: skip
        return first, (value for batch in batches for value in batch.column(0))

    def _hub(self, name: str) -> tuple[datasets.Dataset, str]:
        if name not in self._tables:
            problems = Problems()
            if name in BUILT_IN:
                source = read_digits() if name == "digits" else read_elpv(problems)
                if source is None:
                    raise problems.as_error()
                table = source.train
            else:
                table = self._load(name)
            column = image_column_of(name, self.image_column_name, table.features)
            table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
            self._tables[name] = table, column
        return self._tables[name]

    def _load(self, name: str) -> datasets.Dataset:
        wishes = self._arguments
        try:
            splits = datasets.load_dataset(name, wishes.dataset_config_name, cache_dir=wishes.cache_dir)
        except Exception as error:  # the library raises a dozen types, all about the name or the connection
            raise InputError(f"{name} does not exist here, and as a data set of the Hub it can't be read: "
                             f"{str(error).strip()}") from error  # fmt: skip
        if wishes.split is None and len(splits) == 1:
            return next(iter(splits.values()))
        if wishes.split not in splits:
            given = "Give one with --split" if wishes.split is None else f"--split {wishes.split} is none of them"
            raise InputError(f"{name} has the splits {', '.join(splits)}. {given}.")
        return splits[wishes.split]
