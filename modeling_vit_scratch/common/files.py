# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, after a full disk, a kill or a power cut too."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


MANIFEST = "run.json"
STATE = "trainer_state.json"
# Where files are until they are complete. The search for checkpoints does not see it, and uploads leave out "_*".
STAGING = "_partial"


def find_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a folder, whole or not, the latest step first."""
    if not Path(output_dir).is_dir():
        return []
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).iterdir()]
    steps = [(int(match[1]), path) for match, path in found if match and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def damage(checkpoint: str | os.PathLike[str]) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    folder = Path(checkpoint)
    if not (folder / STATE).is_file():
        return f"it has no {STATE}"
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}, which is written last"
    try:
        sizes = read_manifest(folder)["files"]
    except (ValueError, KeyError):
        return f"{MANIFEST} can't be read"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} of {size:,} bytes"
    return None


def latest_whole(output_dir: str | os.PathLike[str]) -> tuple[Path | None, dict[Path, str]]:
    """The latest checkpoint that is whole, or None; and what is wrong with each later one."""
    damaged: dict[Path, str] = {}
    for checkpoint in find_checkpoints(output_dir):
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint, damaged
        damaged[checkpoint] = reason
    return None, damaged


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_manifest(folder: Path, metadata: dict[str, Any]) -> None:
    """Completes a checkpoint: all of it reaches the disk, then run.json with the metadata and the size of each file."""
    sync_tree(folder)
    files = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    (folder / MANIFEST).write_text(json.dumps({**metadata, "files": files}, indent=2), encoding="utf-8")
    sync_file(folder / MANIFEST)
    sync_folder(folder)


def read_manifest(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_manifest` has written; without metadata for a checkpoint of another program."""
    file = Path(checkpoint, MANIFEST)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"files": {}}


def publish(staged: Path, checkpoint: Path) -> None:
    """Gives a complete folder its name. An earlier checkpoint of the same step is removed."""
    if checkpoint.exists():
        remove(checkpoint)
    os.replace(staged, checkpoint)
    sync_folder(checkpoint.parent)


def publish_files(staged: Path, folder: Path) -> None:
    """Moves complete files into a folder, one by one: config.json, which makes the folder a model, comes last."""
    sync_tree(staged)
    for file in sorted(staged.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)
    sync_folder(folder)
    shutil.rmtree(staged)


def rotate(output_dir: Path, limit: int | None, keep: set[str]) -> None:
    """Removes the checkpoints of the lowest steps until there are at most `limit`; those to keep always stay."""
    if not limit or limit < 1:
        return
    others = [checkpoint for checkpoint in find_checkpoints(output_dir) if str(checkpoint) not in keep]
    for checkpoint in others[max(0, limit - len(keep)) :]:
        remove(checkpoint)


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint. It loses its name first: a kill in the middle leaves nothing that looks like one."""
    renamed = checkpoint.parent / STAGING / "removed"
    renamed.parent.mkdir(exist_ok=True)
    shutil.rmtree(renamed, ignore_errors=True)
    os.replace(checkpoint, renamed)
    shutil.rmtree(renamed)
