# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, after a full disk, a kill or a power cut too."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(file: str | os.PathLike[str]) -> Iterator[Path]:
    """
    A path beside `file` to write to. It takes the name of `file` when all of it is on the disk; if writing fails, it is
    removed and what was there before stays.
    """
    file = Path(file)
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        yield unfinished
        sync_file(unfinished)
        os.replace(unfinished, file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def write_text(file: str | os.PathLike[str], text: str) -> None:
    """Writes a text file in UTF-8: all of it or nothing."""
    with atomic_write(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def sync_file(file: Path) -> None:
    """Returns when the content of a file is on the disk."""
    with open(file, "r+b") as opened:
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Returns when the names in a folder are on the disk."""
    if os.name != "posix":
        return  # elsewhere a folder can't be opened
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Both, for everything below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_file(path)
        else:
            sync_folder(path)
    sync_folder(folder)
