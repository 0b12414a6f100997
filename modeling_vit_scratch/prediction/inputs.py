# SPDX-License-Identifier: Apache-2.0
"""
What the INPUTs of a command line stand for: a stream of items in an order that never changes.

Nothing is decoded, and nothing is held but the names in one folder: a million images are listed in constant memory.
"""

import csv
import fnmatch
import json
import os
import re
import stat
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet

from ..common.errors import InputError, Problems
from ..data.arguments import SOURCE_DEFAULTS
from ..data.columns import IMAGE_COLUMNS, find_column
from ..data.sources import image_endings, read_digits, read_elpv
from .arguments import PredictionArguments


STANDARD_INPUT = "-"
_URLS = ("http://", "https://")
_TABLES, _LISTS = (".csv", ".jsonl", ".json"), (".txt", ".lst")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Parquet rows that are read at a time.
_ROWS = 64


class Item(NamedTuple):
    """
    An image, and where it is.

    Attributes:
        name: what it is called in the output: its path as it was given, SHARD/MEMBER, or TABLE#ROW.
        place: a file or URL; for a row, the table that `Rows` knows.
        start: in a .tar, the byte that the image begins at; in a table, the row.
        size: in a .tar, how many bytes it has.
        fault: why it can't be read, where that shows as it is listed.
    """

    name: str
    place: str
    start: int | None = None
    size: int | None = None
    fault: str | None = None


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
            problems.add(str(error))
    if problems.messages:
        raise problems.as_error()


def _list_one(given: str, rows: "Rows") -> Iterator[Item]:
    if given == STANDARD_INPUT:
        yield from _list_lines(sys.stdin, "")
    elif given.startswith(_URLS):
        yield Item(given, given)
    elif os.path.lexists(given) and (given not in SOURCE_DEFAULTS or os.path.isfile(given)):
        yield from _list_path(given, rows)
    elif any(sign in given for sign in "*?["):
        found = False
        for path in match(given):
            found = True
            yield from _list_path(path, rows)
        if not found:
            raise InputError(f"INPUT {given}: nothing matches this pattern.")
    elif Path(given).suffix.lower() in image_endings():
        yield Item(given, given)  # one missing photo among others is no reason to stop
    elif _HUB_NAME.fullmatch(given) and Path(given).suffix.lower() not in (*_TABLES, *_LISTS, ".parquet", ".tar"):
        yield from rows.list_hub(given)
    else:
        raise InputError(f"INPUT {given} does not exist.")


def _list_path(path: str, rows: "Rows") -> Iterator[Item]:
    ending = Path(path).suffix.lower()
    if os.path.isdir(path):
        yield from _list_folder(path)
    elif ending == ".parquet":
        yield from rows.list_parquet(path)
    elif ending == ".tar":
        yield from _list_shard(path)
    elif ending in _TABLES:
        yield from _list_table(path, rows.image_column_name)
    elif ending in _LISTS:
        with _opened(path) as file:
            yield from _list_lines(file, os.path.dirname(path))
    else:
        yield _file(path, path)


def _file(name: str, path: str) -> Item:
    """A pipe or a device would be waited for without end."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return Item(name, path)  # whoever reads it tells why that can't be done
    return Item(name, path, fault=None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "it is no regular file")


# ---------------------------------------------------------------------------------------------------------------------
# Folders and patterns


def _list_folder(folder: str) -> Iterator[Item]:
    endings, is_empty, left_out = image_endings(), True, []
    for path in walk(folder):
        if isinstance(path, Item):
            is_empty = False
            yield path
        elif Path(path).suffix.lower() in endings:
            is_empty = False
            yield _file(path, path)
        elif len(left_out) < 3:
            left_out.append(os.path.basename(path))
    if is_empty:
        others = f"; it has others: {', '.join(left_out)}. Give these by their names" if left_out else ""
        raise InputError(f"INPUT {folder} has no files with the ending of an image{others}.")


def walk(folder: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str | Item]:
    """
    All files in a folder at any depth, in the order of their names, folder by folder; hidden ones are left out. Links
    are followed, but not in circles. A folder that can't be read is an item with a fault.
    """
    try:
        facts = os.stat(folder)
        names = _names_in(folder)
    except OSError as error:
        yield Item(folder, folder, fault=f"the folder can't be read: {error.strerror}")
        return
    place = (facts.st_dev, facts.st_ino)
    if place in above:
        return
    for name, is_folder in names:
        path = os.path.join(folder, name)
        if is_folder:
            yield from walk(path, (*above, place))
        else:
            yield path


def _names_in(folder: str) -> list[tuple[str, bool]]:
    """What is in a folder and not hidden, sorted, and whether it is a folder itself."""
    with os.scandir(folder) as entries:
        return sorted((entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith("."))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; whoever opens it tells
        return False


def match(pattern: str) -> Iterator[str]:
    """As `glob.iglob(pattern, recursive=True)`, but sorted, and with no more than a folder's names in memory."""
    root = os.sep if pattern.startswith(os.sep) else ""
    yield from _match(root, [part for part in pattern.split(os.sep) if part])


def _match(folder: str, parts: list[str], above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    head, rest = parts[0], parts[1:]
    if not any(sign in head for sign in "*?["):
        path = os.path.join(folder, head)
        if os.path.lexists(path):
            yield from _match(path, rest) if rest else [path]
        return
    try:
        facts = os.stat(folder or ".")
        names = _names_in(folder or ".")
    except OSError:
        return
    if head == "**":
        place = (facts.st_dev, facts.st_ino)
        if place in above:
            return
        if rest:  # no folder in between
            yield from _match(folder, rest)
        for name, is_folder in names:
            path = os.path.join(folder, name)
            if is_folder:
                yield from _match(path, parts, (*above, place))
            elif not rest:
                yield path
        return
    for name, is_folder in names:
        if fnmatch.fnmatchcase(name, head) and (is_folder or not rest):
            path = os.path.join(folder, name)
            yield from _match(path, rest) if rest else [path]


# ---------------------------------------------------------------------------------------------------------------------
# Lists and tables of paths


def _opened(path: str) -> IO[str]:
    try:
        return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise InputError(f"INPUT {path} can't be opened: {error.strerror}.") from error


def _beside(folder: str, name: str) -> Item:
    if name.startswith(_URLS):
        return Item(name, name)
    return _file(name, os.path.join(folder, name))


def _list_lines(file: IO[str], folder: str) -> Iterator[Item]:
    for line in file:
        if name := line.rstrip("\r\n"):
            yield _beside(folder, name)


def _list_table(path: str, wish: str | None) -> Iterator[Item]:
    """Paths are relative to the folder of the table, as in training."""
    is_csv, column, number = path.lower().endswith(".csv"), None, 0
    with _opened(path) as file:
        try:
            for row in csv.DictReader(file) if is_csv else map(json.loads, file):
                number += 1
                if column is None:
                    if not isinstance(row, dict):
                        raise ValueError("a row is no object with named values")
                    column = _find_image_column(path, wish, [], [name for name in row if name is not None])
                name = row[column]
                if not isinstance(name, str) or not name:
                    raise ValueError(f"column {column!r} holds {name!r}, and not a path")
                yield _beside(os.path.dirname(path), name)
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            if isinstance(error, InputError):
                raise
            kind = "CSV" if is_csv else "JSON lines"
            raise InputError(f"INPUT {path} can't be read as {kind}, row {number}: {error}.") from error


def _find_image_column(table: str, wish: str | None, of_type: list[str], columns: list[str]) -> str:
    problems = Problems()
    column = find_column("image", wish, of_type, IMAGE_COLUMNS, columns, table, problems)
    if column is None:
        raise InputError(f"INPUT {table}: " + "; ".join(problems.messages))
    return column


# ---------------------------------------------------------------------------------------------------------------------
# Shards


def _list_shard(path: str) -> Iterator[Item]:
    """The images in a .tar by where they begin: nothing is unpacked, so no name in it can lead anywhere."""
    endings, is_empty, after = image_endings(), True, "its start"
    try:
        with tarfile.open(path, "r:") as archive:
            while True:
                try:
                    member = archive.next()
                except (tarfile.TarError, OSError, EOFError, ValueError) as error:
                    yield Item(path, path, fault=f"the shard can't be read after {after}: {error}")
                    return
                if member is None:
                    # tarfile ends in silence at a damaged header, and where a file is cut between two members.
                    archive.fileobj.seek(archive.offset)
                    if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                        is_empty = False
                        yield Item(path, path, fault=f"the shard is cut short or damaged after {after}")
                    break
                archive.members = []  # or all would be kept
                after = member.name
                if Path(member.name).suffix.lower() not in endings or os.path.basename(member.name).startswith("."):
                    continue
                is_empty = False
                name, fault = f"{path}/{member.name}", None
                if not member.isreg() or member.issparse():
                    fault = "it is no regular file in its shard"
                yield Item(name, path, member.offset_data, member.size, fault)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise InputError(
            f"INPUT {path} can't be read as an uncompressed .tar: {error}. Compressed ones have to be unpacked first."
        ) from error
    if is_empty:
        raise InputError(f"INPUT {path} has no images in it.")


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
        if item.place.lower().endswith(".parquet"):
            value = self._next_row(item.place, item.start)
            folder = os.path.dirname(item.place)
        else:
            table, column = self._hub(item.place)
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
                raise InputError(f"INPUT {path} can't be read as Parquet: {reason}") from error
            is_image = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
            column = _find_image_column(path, self.image_column_name, is_image, list(features))
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
            if name in SOURCE_DEFAULTS:
                source = read_digits() if name == "digits" else read_elpv(problems)
                if source is None:
                    raise problems.as_error()
                table = source.train
            else:
                table = self._load(name)
            is_image = [column for column, feature in table.features.items() if isinstance(feature, datasets.Image)]
            column = _find_image_column(name, self.image_column_name, is_image, table.column_names)
            table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
            self._tables[name] = table, column
        return self._tables[name]

    def _load(self, name: str) -> datasets.Dataset:
        wishes = self._arguments
        try:
            splits = datasets.load_dataset(name, wishes.dataset_config_name, cache_dir=wishes.cache_dir)
        except Exception as error:  # the library raises a dozen types, all about the name or the connection
            raise InputError(f"INPUT {name} does not exist here, and as a data set of the Hub it can't be read: "
                             f"{str(error).strip()}") from error  # fmt: skip
        if wishes.split is None and len(splits) == 1:
            return next(iter(splits.values()))
        if wishes.split not in splits:
            given = "Give one with --split" if wishes.split is None else f"--split {wishes.split} is none of them"
            raise InputError(f"INPUT {name} has the splits {', '.join(splits)}. {given}.")
        return splits[wishes.split]
