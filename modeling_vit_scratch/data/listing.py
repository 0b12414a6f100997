# SPDX-License-Identifier: Apache-2.0
"""
The files that a path stands for, in an order that never changes, and the columns of tables. Nothing is decoded, and no
more is held than the names in one folder: a million images are listed in constant memory.
"""

import codecs
import csv
import importlib
import importlib.util
import json
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image

from ..common.errors import InputError, Problems


URLS = ("http://", "https://")
TABLES, LISTS = (".csv", ".jsonl", ".json"), (".txt", ".lst")
# Usual column names, for tables whose types do not say which column is which.
_IMAGE = ["image", "images", "img", "jpg", "jpeg", "png", "webp", "file_name", "filename", "file", "path", "image_path"]
USUAL_NAMES = {"image": _IMAGE, "label": ["label", "labels", "class", "category", "target", "cls"]}


class Item(NamedTuple):
    """An image, and where it is."""

    name: str  # in the output: its path as it was given, SHARD/MEMBER, or TABLE#ROW
    path: str  # of a file or URL; for a row, the table
    start: int | None = None  # in a .tar, the byte that the image begins at; in a table, the row
    size: int | None = None  # in a .tar, in bytes
    error: str | None = None  # why it can't be read, where that shows as it is listed


def image_endings() -> set[str]:
    """The endings of the formats that Pillow reads, in lower case and with the dot; with pi-heif, its own."""
    if importlib.util.find_spec("pi_heif") is not None:
        importlib.import_module("pi_heif").register_heif_opener()
    readable = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return readable | {".mpo", ".npy"}  # Pillow opens the first as JPEG, numpy the second


def item_of_file(name: str, path: str) -> Item:
    """The item of a file. A pipe or a device has an error: reading it would wait without end."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return Item(name, path)  # whoever reads it reports that
    except ValueError as error:  # a zero byte
        return Item(name, path, error=f"it is no path: {error}")
    return Item(name, path, error=None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "it is no regular file")


# --- Folders and patterns ---------------------------------------------------------------------------------------------


def list_folder(folder: str, left_out: Counter[str] | None = None) -> Iterator[Item]:
    """See `images_in`. Raises InputError if there are none."""
    left_out, is_empty = Counter() if left_out is None else left_out, True
    for item in images_in(folder, left_out):
        is_empty = False
        yield item
    if is_empty:
        raise InputError(f"{folder} has no files with the ending of an image. {left_out_line(left_out) or ''}".rstrip())


def images_in(folder: str, left_out: Counter[str]) -> Iterator[Item]:
    """The images in a folder at any depth, by their endings. Other files are counted in `left_out`, by theirs."""
    endings = image_endings()
    for item in walk(folder):
        ending = Path(item.path).suffix.lower()
        if item.error or ending in endings:
            yield item if item.error else item_of_file(item.name, item.path)
        else:
            left_out[ending or "without an ending"] += 1


def left_out_line(left_out: Counter[str]) -> str | None:
    """What `images_in` left out, for the user."""
    if not left_out:
        return None
    kinds = ", ".join(f"{count:,} {ending}" for ending, count in sorted(left_out.most_common(8)))
    more = " pip install pi-heif reads .heic, .heif and .hif." if {".heic", ".heif", ".hif"} & set(left_out) else ""
    return f"Left out: {sum(left_out.values()):,} files in the folders ({kinds}).{more}"


def walk(folder: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Item]:
    """The files at any depth, sorted by folder, without hidden ones. Links are followed, but not in circles."""
    try:
        status, names = os.stat(folder), sorted(os.listdir(folder))
    except OSError as error:
        yield Item(folder, folder, error=f"the folder can't be read: {error.strerror}")
        return
    identity = status.st_dev, status.st_ino
    for path in (os.path.join(folder, name) for name in names if identity not in above and not is_hidden(name)):
        if os.path.isdir(path):
            yield from walk(path, (*above, identity))
        else:
            yield Item(path, path)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out: .NAME, and what macOS puts into archives."""
    return name.startswith(".") or name == "__MACOSX"


# --- Lists and tables -------------------------------------------------------------------------------------------------


def list_lines(file: IO[str], folder: str) -> Iterator[Item]:
    """A path or URL in each line; paths are relative to the folder."""
    for line in file:
        if name := line.rstrip("\r\n"):
            yield _beside(folder, name)


def list_table(path: str, image_column: str | None) -> Iterator[Item]:
    """The images of a CSV or JSON lines file. Paths are relative to its folder."""
    column, number = None, 0
    try:
        for row in read_rows(path):
            number += 1
            if column is None:
                column = image_column_of(path, image_column, dict.fromkeys(name for name in row if name is not None))
            name = row[column]
            if not isinstance(name, str) or not name:
                raise ValueError(f"column {column!r} holds {name!r}, and not a path")
            yield _beside(os.path.dirname(path), name)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        kind = "CSV" if path.lower().endswith(".csv") else "JSON lines"
        raise InputError(f"{path} can't be read as {kind}, row {number}: {error}.") from error


def read_rows(path: str) -> Iterator[dict[str, Any]]:
    """Of a CSV file, as text, or JSON lines. InputError if it can't be opened, ValueError or csv.Error if damaged."""
    with opened(path) as file:
        if path.lower().endswith(".csv"):
            yield from csv.DictReader(file)
            return
        for line in file:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("a row is no object with named values")
            yield row


def read_csv(path: str) -> dict[str, list[Any]]:
    """The columns: text, or whole numbers if all are; None where there is nothing. Raises what `read_rows` raises."""
    columns: dict[str, list[Any]] = {}
    for number, row in enumerate(read_rows(path), start=1):
        if None in row:
            raise ValueError(f"row {number} has {len(row) + len(row[None]) - 1} values for {len(row) - 1} columns")
        for name, value in row.items():
            columns.setdefault(name, []).append(value or None)
    for name, values in columns.items():
        if all(value is None or is_whole_number(value) for value in values) and any(values):
            columns[name] = [None if value is None else int(value) for value in values]
    return columns


def is_whole_number(text: str) -> bool:
    """Whether it is a whole number in the usual way of writing: 7, and not 007 or +7."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdecimal() and len(digits) < 19 and str(int(text)) == text


def opened(path: str) -> IO[str]:
    try:
        with open(path, "rb") as file:
            is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding, errors = ("utf-16", "strict") if is_utf16 else ("utf-8-sig", "surrogateescape")
        return open(path, encoding=encoding, errors=errors, newline="")
    except OSError as error:
        raise InputError(f"{path} can't be opened: {error.strerror}.") from error


def _beside(folder: str, name: str) -> Item:
    return Item(name, name) if name.startswith(URLS) else item_of_file(name, path_beside(folder, name))


def path_beside(folder: str, name: str) -> str:
    return name if name.startswith(URLS) else os.path.join(folder, name)


def find_column(
    kind: str, named: str | None, features: Mapping[str, Any], split: str, problems: Problems
) -> str | None:
    """
    The "image" or "label" column: the one that the user named, the only one of the right type, or the only one with a
    usual name. A type in `features` is None where it is not known.
    """
    flag, listing = f"--{kind}_column_name", ", ".join(map(repr, features))
    if named in features:
        return named
    if named is not None:
        problems.add(f"{flag} {named}: the {split} split has no such column. Its columns: {listing}.")
        return None
    is_right = is_class_label if kind == "label" else lambda feature: isinstance(feature, _datasets().Image)
    candidates = [column for column, feature in features.items() if feature is not None and is_right(feature)]
    candidates = candidates or [column for column in features if column.lower() in USUAL_NAMES[kind]]
    if len(candidates) == 1:
        return candidates[0]
    several = f"several columns could be the {kind}s: {', '.join(candidates)}"
    found = several if candidates else f"no {kind} column found"
    problems.add(f"The {split} split: {found}. Name it with {flag}. Its columns: {listing}.")
    return None


def image_column_of(table: str, named: str | None, features: Mapping[str, Any]) -> str:
    """See `find_column`. Raises InputError if no column, or more than one, could hold the images."""
    problems = Problems()
    if (column := find_column("image", named, features, table, problems)) is None:
        raise InputError(f"{table}: " + "; ".join(problems.messages))
    return column


def is_class_label(feature: Any) -> bool:
    """Whether a column of this type holds a `ClassLabel`, or a list of them."""
    return isinstance(getattr(feature, "feature", feature), _datasets().ClassLabel)


def is_label_list(feature: Any) -> bool:
    """Whether a column of this type holds lists of names or whole numbers."""
    datasets = _datasets()
    if not isinstance(feature, datasets.List | datasets.LargeList):
        return False
    inner = feature.feature
    is_value = isinstance(inner, datasets.Value) and ("string" in inner.dtype or "int" in inner.dtype)
    return is_value or isinstance(inner, datasets.ClassLabel)


def _datasets() -> Any:
    import datasets  # not before it is needed: it imports pandas, and a prediction of files has no columns

    return datasets


def split_labels(text: str | None, separator: str) -> list[str]:
    """The labels in a text, "cat|dog"; none in an empty one."""
    return [word.strip() for word in (text or "").split(separator) if word.strip()]


def list_shard(path: str) -> Iterator[Item]:
    """The images in a .tar by where they begin: nothing is unpacked, so no name in it can lead anywhere."""
    endings, is_empty, after = image_endings(), True, "its start"
    try:
        with tarfile.open(path, "r:") as archive:
            while True:
                try:
                    member = archive.next()
                except (tarfile.TarError, OSError, EOFError, ValueError) as error:
                    yield Item(path, path, error=f"the shard can't be read after {after}: {error}")
                    return
                if member is None:
                    # tarfile ends in silence at a damaged header, and where a file is cut between two members.
                    archive.fileobj.seek(archive.offset)
                    if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                        is_empty = False
                        yield Item(path, path, error=f"the shard is cut short or damaged after {after}")
                    break
                archive.members = []  # or all would be kept
                after = member.name
                if Path(member.name).suffix.lower() in endings and not os.path.basename(member.name).startswith("."):
                    is_empty, is_file = False, member.isreg() and not member.issparse()
                    error = None if is_file else "it is no regular file in its shard"
                    yield Item(f"{path}/{member.name}", path, member.offset_data, member.size, error)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise InputError(
            f"{path} can't be read as an uncompressed .tar: {error}. Compressed ones have to be unpacked first."
        ) from error
    if is_empty:
        raise InputError(f"{path} has no images in it.")
