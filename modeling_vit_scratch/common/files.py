# SPDX-License-Identifier: Apache-2.0
"""
Files and training checkpoints that are whole or not there, also after a full disk, a kill or a power cut. The last file
of a checkpoint, run.json, lists sizes and checksums of all others, so that a damaged one is found.
"""

import json
import os
import shutil
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import InputError


try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs apart there
    fcntl = None


def lock(file: Path, what: str) -> IO[str] | None:
    """A lock that ends with this process; None where there are none. InputError if another process has it."""
    if fcntl is None:
        return None
    file.parent.mkdir(parents=True, exist_ok=True)
    opened = open(file, "a", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        opened.close()
        raise InputError(f"Another run is at work on {what}. Wait for it, or stop it.") from error
    except OSError:
        opened.close()
        return None
    weakref.finalize(opened, file.unlink, missing_ok=True)
    return opened


def writing_problem(folder: str | os.PathLike[str]) -> str | None:
    """Why nothing can be written into a folder, which may not be there yet; None if it can."""
    folder = Path(folder).absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids) and there.is_dir():
        return None
    return f"{there} is no folder that you can write into."


@contextmanager
def atomic_write(file: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `file`, which it replaces when it is on the disk, or not at all if writing fails."""
    file = Path(file)
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        yield unfinished
        share(unfinished)
        sync(unfinished)
        os.replace(unfinished, file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(file.parent)


def share(*paths: Path) -> None:
    """Gives files the permissions of any new file: safetensors writes them for their owner alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in paths:
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


def write_text(file: str | os.PathLike[str], text: str) -> None:
    with atomic_write(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def sync(*paths: Path) -> None:
    """Waits until files, and the names in folders, are on the disk."""
    for path in paths:
        is_folder = path.is_dir()
        if is_folder and os.name != "posix":
            continue  # other systems can't open a folder
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


MANIFEST = "run.json"
STATE = "trainer_state.json"
# The folder of incomplete files. It is no checkpoint, and uploads leave out "_*".
STAGING = "_partial"


def find_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a folder, whole or not, the latest step first."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in Path(output_dir).glob("checkpoint-*")}
    found = [path for path, step in steps.items() if step.isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(steps[path]), reverse=True)


def damage(checkpoint: str | os.PathLike[str], read: bool = False) -> str | None:
    """How a checkpoint is damaged; None if it is whole. With `read`, the content of its files is compared, too."""
    folder = Path(checkpoint)
    if not (folder / STATE).is_file():
        return f"it has no {STATE}"
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}, which is written last"
    try:
        manifest = read_manifest(folder)
        sizes, checksums = manifest["files"], manifest.get("checksums", {})
    except (ValueError, KeyError):
        return f"{MANIFEST} can't be read"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} of {size:,} bytes"
        if read and name in checksums and checksum(file) != checksums[name]:
            return f"{name} has other content than was written"
    return None


def checksum(file: Path) -> int:
    """CRC-32 of a file: against damage, not against forgery."""
    value = 0
    with open(file, "rb") as opened:
        while chunk := opened.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value


def latest_whole(output_dir: str | os.PathLike[str], read: bool = False) -> tuple[Path | None, dict[Path, str]]:
    """The latest whole checkpoint, or None; and how each later one is damaged. `read` as in `damage`."""
    damaged: dict[Path, str] = {}
    for checkpoint in find_checkpoints(output_dir):
        reason = damage(checkpoint, read)
        if reason is None:
            return checkpoint, damaged
        damaged[checkpoint] = reason
    return None, damaged


def write_manifest(folder: Path, metadata: dict[str, Any]) -> None:
    """Completes a checkpoint: syncs it to the disk, then run.json with metadata, and size and checksum of each file."""
    share(*folder.rglob("*"))
    sync(*folder.rglob("*"), folder)
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    content = {**metadata, "files": sizes, "checksums": {name: checksum(file) for name, file in files.items()}}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2), encoding="utf-8")
    sync(folder / MANIFEST, folder)


def read_manifest(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of run.json; without metadata if another program has written the checkpoint."""
    file = Path(checkpoint, MANIFEST)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"files": {}}


def publish(staged: Path, checkpoint: Path, metadata: dict[str, Any]) -> None:
    """Completes a checkpoint, and gives it its final name, in place of an earlier one of the same step."""
    write_manifest(staged, metadata)
    if checkpoint.exists():
        remove(checkpoint)
    os.replace(staged, checkpoint)
    sync(checkpoint.parent)


def publish_files(staged: Path, folder: Path) -> None:
    """Moves complete files into a folder, one by one. config.json, which makes it a model, comes last."""
    share(*staged.rglob("*"))
    sync(*staged.rglob("*"), staged)
    for file in sorted(staged.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)
    sync(folder)


def remove_staging(folder: Path) -> bool:
    """Removes what a run left in the folder of incomplete files, and nothing else. Returns whether there was any."""
    found = [path for name in ("checkpoint-*", "model", "removed") for path in (folder / STAGING).glob(name)]
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    if (folder / STAGING).is_dir() and not any((folder / STAGING).iterdir()):
        (folder / STAGING).rmdir()
    return bool(found)


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint. It is renamed first: a kill in the middle leaves nothing that looks like one."""
    renamed = checkpoint.parent / STAGING / "removed"
    renamed.parent.mkdir(exist_ok=True)
    shutil.rmtree(renamed, ignore_errors=True)
    os.replace(checkpoint, renamed)
    shutil.rmtree(renamed)
