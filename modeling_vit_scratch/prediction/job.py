# SPDX-License-Identifier: Apache-2.0
"""
The folder OUTPUT.parts, in which an unfinished run is: what it is about, all items, and what is predicted so far.

    job.json              settings, model and inputs; the run exists once this file does
    items.jsonl           every item, one a line
    123456-123468.part    rows of these batches, 123456 to 123467, as Parquet

A file is whole or not there. A run that finds a job.json like its own does only what is missing.
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
# A process takes so many images at a time, and writes them when it has them.
BLOCK = 512
_PART = re.compile(r"(\d+)-(\d+)\.part")


class Job:
    """
    Args:
        output: the file to be.
        batch_size: images in a batch.

    Attributes:
        folder: OUTPUT.parts.
        count: of all items, once the job is open.
    """

    def __init__(self, output: str | os.PathLike[str], batch_size: int) -> None:
        self.output, self.batch_size, self.count = Path(output), batch_size, 0
        self.folder = self.output.with_name(f"{self.output.name}.parts")
        self.errors = self.output.with_name(f"{self.output.name}.errors.csv")
        self._lock: IO[str] | None = None

    @property
    def num_batches(self) -> int:
        return -(-self.count // self.batch_size)

    # -----------------------------------------------------------------------------------------------------------------
    # Opening

    def start(self, items: Iterable[Item], facts: dict[str, Any], overwrite: bool) -> bool:
        """
        Lists the items, and begins the job or finds it begun. For one process; the others `join`.

        Args:
            items: all of them.
            facts: what decides the bytes of the output, by what to call it.
            overwrite: whether an output that is there, or a job that is another, makes way.

        Returns:
            Whether the job was there already.

        Raises:
            InputError: if there are no items, another run is at work, or something is in the way.
        """
        if self.output.exists() and not self.facts() and not overwrite:
            raise InputError(
                f"--output {self.output} is there already. Give --overwrite to replace it, or another name."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            self.count, digest = _write_items(self.folder / f"_{ITEMS}", items)
            if not self.count:
                raise InputError("The inputs have no images in them.")
        except BaseException:
            (self.folder / f"_{ITEMS}").unlink(missing_ok=True)
            self._remove_if_unused()
            raise
        facts = json.loads(json.dumps({**facts, "images": self.count, "list of images": digest}))
        before = self.facts()
        if before and before != facts:
            if not overwrite:
                raise InputError(self._differences(before, facts))
            self._clear()
            before = None
        os.replace(self.folder / f"_{ITEMS}", self.folder / ITEMS)
        if not before:
            self._clear()
            write_text(self.folder / JOB, json.dumps(facts, indent=2) + "\n")
        for file in self.folder.glob(".*.unfinished"):  # of a process that was killed as it wrote
            file.unlink()
        return bool(before)

    def facts(self) -> dict[str, Any] | None:
        """Those that an unfinished job was begun with."""
        try:
            return json.loads((self.folder / JOB).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InputError(
                f"{self.folder / JOB} is not JSON: {error}. Remove {self.folder}, and start again."
            ) from error

    def _take_lock(self) -> None:
        """It goes with the process, however that ends; worker processes do not inherit it."""
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
            f"{self.folder} is of a run of another kind, which can't go on with this command:\n"
            + "\n".join(lines)
            + "\nGive its settings and inputs again, or --overwrite to start anew, or another --output."
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Items

    def missing(self) -> list[tuple[int, int]]:
        """What is not predicted yet: ranges of batches, first and last + 1."""
        gaps, place = [], 0
        for first, end in self.parts():
            if first > place:
                gaps.append((place, first))
            place = max(place, end)
        if place < self.num_batches:
            gaps.append((place, self.num_batches))
        return gaps

    def share(
        self, gaps: list[tuple[int, int]], rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[int, list[Item]]]:
        """
        The batches that a process has to do, in their order: number and items. The gaps, the same for all processes,
        are dealt out in blocks, one to each process in turn.
        """
        dealt, block = itertools.count(), max(1, BLOCK // self.batch_size)
        with open(self.folder / ITEMS, encoding="ascii") as file:
            place = 0
            for first, end in gaps:
                for start in range(first, end, block):
                    if next(dealt) % world_size != rank:
                        continue
                    lines = itertools.islice(file, (start - place) * self.batch_size, None)
                    for place in range(start, min(start + block, end)):
                        yield place, [Item(*json.loads(line)) for line in itertools.islice(lines, self.batch_size)]
                        place += 1

    # -----------------------------------------------------------------------------------------------------------------
    # Parts

    def parts(self) -> list[tuple[int, int]]:
        """What is predicted: ranges of batches, first and last + 1, sorted."""
        found = (_PART.fullmatch(name) for name in os.listdir(self.folder))
        return sorted((int(match[1]), int(match[2])) for match in found if match)

    def write_part(self, first: int, end: int, rows: pyarrow.Table) -> None:
        """Writes rows of batches; all of them, or after a kill or a power cut none."""
        file = self.folder / f"{first:06d}-{end:06d}.part"
        with atomic_write(file) as unfinished, open(unfinished, "wb") as opened:
            pyarrow.parquet.write_table(rows, opened)

    def read_parts(self) -> Iterator[pyarrow.Table]:
        """
        All rows, in the order of the items. Parts overlap where one process went on after others had been killed.

        Raises:
            InputError: for a damaged part.
        """
        place = 0
        for first, end in self.parts():
            if end <= place:
                continue
            file = self.folder / f"{first:06d}-{end:06d}.part"
            try:
                rows = pyarrow.parquet.read_table(file)
            except (OSError, pyarrow.ArrowException) as error:
                raise InputError(f"{file} is damaged: {error}. Remove it, and run the same command again.") from error
            yield rows.slice((max(place, first) - first) * self.batch_size)
            place = end

    # -----------------------------------------------------------------------------------------------------------------
    # Ending

    def remove(self) -> None:
        """After the output is written. What is not of this module stays."""
        self._clear()
        (self.folder / ITEMS).unlink(missing_ok=True)
        self._remove_if_unused()

    def _clear(self) -> None:
        """The manifest goes first: a kill in the middle leaves nothing that looks like a job."""
        (self.folder / JOB).unlink(missing_ok=True)
        for first, end in self.parts():
            (self.folder / f"{first:06d}-{end:06d}.part").unlink()

    def _remove_if_unused(self) -> None:
        if self._lock is not None:
            (self.folder / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def _write_items(file: Path, items: Iterable[Item]) -> tuple[int, str]:
    """How many there are, and the SHA-256 of the list."""
    count, digest = 0, hashlib.sha256()
    with open(file, "wb") as opened:
        for item in items:
            count += 1
            # Without trailing defaults; ASCII, so that names that are no UTF-8 survive.
            values = list(item)
            while values[-1] is None:
                values.pop()
            line = json.dumps(values).encode("ascii") + b"\n"
            opened.write(line)
            digest.update(line)
    return count, digest.hexdigest()
