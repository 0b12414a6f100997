# SPDX-License-Identifier: Apache-2.0
"""
The folder OUTPUT.parts of an unfinished run: its settings, the list of images, and what is predicted so far.

    job.json              settings, model and inputs; the run exists once this file does
    items.jsonl           the images, one a line
    123456-123468.part    the rows of batches 123456 to 123467, as Parquet

A file is complete or not there. A run with the same job.json does only what is missing.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from ..common.errors import InputError
from ..common.files import atomic_write, write_text
from ..data.listing import Item


try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs apart there
    fcntl = None

JOB, ITEMS, LOCK = "job.json", "items.jsonl", "lock"
# Images that a process takes at a time, and writes as one part.
BLOCK = 512
_PART = re.compile(r"(\d+)-(\d+)\.part")


class Job:
    """
    An unfinished run.

    Args:
        output: the file to write.
        batch_size: images in a batch.

    Attributes:
        folder: OUTPUT.parts.
        count: number of images, once the job is open.
    """

    def __init__(self, output: str | os.PathLike[str], batch_size: int) -> None:
        self.output, self.batch_size, self.count = Path(output), batch_size, 0
        self.folder = self.output.with_name(f"{self.output.name}.parts")
        self.errors = self.output.with_name(f"{self.output.name}.errors.csv")
        self._lock: IO[str] | None = None

    def start(self, items: Iterable[Item], settings: dict[str, Any], overwrite: bool) -> bool:
        """
        Lists the images, and begins the job or continues the one in the folder. Called by one process.

        Args:
            items: all images.
            settings: what decides the bytes of the output, by its name in messages.
            overwrite: whether to replace an existing output, or a job with other settings.

        Returns:
            Whether the job was there already.

        Raises:
            InputError: if there are no images, another run is at work, or something is in the way.
        """
        if self.output.exists() and not self.settings() and not overwrite:
            raise InputError(
                f"--output {self.output} is there already. Give --overwrite to replace it, or another name."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._acquire_lock()
        try:
            self.count, digest = _write_items(self.folder / f"_{ITEMS}", items)
            if not self.count:
                raise InputError("The inputs have no images in them.")
        except BaseException:
            (self.folder / f"_{ITEMS}").unlink(missing_ok=True)
            self._remove_if_empty()
            raise
        settings = json.loads(json.dumps({**settings, "images": self.count, "list of images": digest}))
        before = self.settings()
        if before and before != settings:
            if not overwrite:
                raise InputError(self._differences(before, settings))
            self._clear()
            before = None
        os.replace(self.folder / f"_{ITEMS}", self.folder / ITEMS)
        if not before:
            self._clear()
            write_text(self.folder / JOB, json.dumps(settings, indent=2) + "\n")
        for file in self.folder.glob(".*.unfinished"):  # of a process that was killed as it wrote
            file.unlink()
        return bool(before)

    def settings(self) -> dict[str, Any] | None:
        """The settings of the job in the folder; None if there is none."""
        try:
            return json.loads((self.folder / JOB).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InputError(
                f"{self.folder / JOB} is not JSON: {error}. Remove {self.folder}, and start again."
            ) from error

    def _acquire_lock(self) -> None:
        """The lock ends with the process, however that ends; worker processes do not inherit it."""
        if fcntl is None:
            return
        self._lock = open(self.folder / LOCK, "w", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock = None
            raise InputError(f"Another run is at work on --output {self.output}. Wait for it, or stop it.") from error

    def _differences(self, before: dict[str, Any], now: dict[str, Any]) -> str:
        lines = [
            f"    {name}: {now.get(name)} now, {before.get(name)} then"
            for name in {**before, **now} if before.get(name) != now.get(name)
        ]  # fmt: skip
        return (
            f"{self.folder} belongs to a run with other settings, which this command can't continue:\n"
            + "\n".join(lines)
            + "\nGive its settings and inputs again, or --overwrite to start anew, or another --output."
        )

    def parts(self) -> list[tuple[int, int]]:
        """The batches that are predicted: ranges from first to end (exclusive), sorted."""
        found = (_PART.fullmatch(name) for name in os.listdir(self.folder))
        return sorted((int(match[1]), int(match[2])) for match in found if match)

    def missing(self) -> list[tuple[int, int]]:
        """The batches that are not predicted: ranges from first to end (exclusive)."""
        ranges, position, num_batches = [], 0, -(-self.count // self.batch_size)
        for first, end in [*self.parts(), (num_batches, num_batches)]:
            if first > position:
                ranges.append((position, first))
            position = max(position, end)
        return ranges

    def num_predicted(self) -> int:
        """Images whose rows are on the disk."""
        missing = sum(min(end * self.batch_size, self.count) - first * self.batch_size for first, end in self.missing())
        return self.count - missing

    def share(
        self, missing: list[tuple[int, int]], rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[int, list[Item]]]:
        """
        The batches that a process predicts, in their order: number and items. All processes pass the same `missing`,
        which is dealt out in blocks, one to each process in turn.
        """
        dealt, block = itertools.count(), max(1, BLOCK // self.batch_size)
        with open(self.folder / ITEMS, encoding="ascii") as file:
            position = 0
            for first, end in missing:
                for start in range(first, end, block):
                    if next(dealt) % world_size != rank:
                        continue
                    lines = itertools.islice(file, (start - position) * self.batch_size, None)
                    for position in range(start, min(start + block, end)):
                        yield position, [Item(*json.loads(line)) for line in itertools.islice(lines, self.batch_size)]
                        position += 1

    def _part(self, first: int, end: int) -> Path:
        return self.folder / f"{first:06d}-{end:06d}.part"

    def write_part(self, first: int, end: int, rows: pyarrow.Table) -> None:
        """Writes rows of batches; all of them, or after a kill or a power cut none."""
        with atomic_write(self._part(first, end)) as unfinished, open(unfinished, "wb") as opened:
            pyarrow.parquet.write_table(rows, opened)

    def read_parts(self) -> Iterator[pyarrow.Table]:
        """
        All rows, in the order of the items. Parts overlap where one process continued after others had been killed.

        Raises:
            InputError: for a damaged part.
        """
        position = 0
        for first, end in self.parts():
            if end <= position:
                continue
            file = self._part(first, end)
            try:
                rows = pyarrow.parquet.read_table(file)
            except (OSError, pyarrow.ArrowException) as error:
                raise InputError(f"{file} is damaged: {error}. Remove it, and run the same command again.") from error
            yield rows.slice((max(position, first) - first) * self.batch_size)
            position = end

    def remove(self) -> None:
        """Removes the job after the output is written; foreign files in the folder stay."""
        self._clear()
        (self.folder / ITEMS).unlink(missing_ok=True)
        self._remove_if_empty()

    def _clear(self) -> None:
        """job.json goes first: a kill in the middle leaves nothing that looks like a job."""
        (self.folder / JOB).unlink(missing_ok=True)
        for first, end in self.parts():
            self._part(first, end).unlink()

    def _remove_if_empty(self) -> None:
        if self._lock is not None:
            (self.folder / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def _write_items(file: Path, items: Iterable[Item]) -> tuple[int, str]:
    """Writes the list of images; their number, and the SHA-256 of the list."""
    count, digest = 0, hashlib.sha256()
    with open(file, "wb") as opened:
        for item in items:
            count += 1
            # Without trailing defaults; ASCII, so that names that are not UTF-8 survive.
            values = list(item)
            while values[-1] is None:
                values.pop()
            line = json.dumps(values).encode("ascii") + b"\n"
            opened.write(line)
            digest.update(line)
    return count, digest.hexdigest()
