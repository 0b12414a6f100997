# SPDX-License-Identifier: Apache-2.0
"""
The files of a run. While it is unfinished, they are in the folder OUTPUT.parts:

    job.json              settings, model and inputs; the run exists once this file does
    items.jsonl           the images, one a line
    123456-123468.part    the rows of batches 123456 to 123467, as Parquet

A file is complete or not there. A run with the same job.json does only what is missing. In the end the parts become
OUTPUT, in one of three formats, and OUTPUT.errors.csv.
"""

import csv
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from ..common import files
from ..common.errors import InputError
from ..common.files import atomic_write, write_text
from ..data.listing import Item
from .model import Prediction
from .reading import Batch


JOB, ITEMS, LOCK = "job.json", "items.jsonl", "lock"
# Images that a process takes at a time, and writes as one part; a kill costs these, or those of so many seconds.
BLOCK, SECONDS = 512, 30.0
ROW_GROUP = 16_384  # rows of OUTPUT: about 50 MB with the embeddings of B/16
_PART = re.compile(r"(\d+)-(\d+)\.part")


class Job:
    """An unfinished run, in the folder OUTPUT.parts. `count`, the number of images, is known once it is open."""

    def __init__(self, output: str | os.PathLike[str], batch_size: int) -> None:
        self.output, self.batch_size, self.count = Path(output), batch_size, 0
        self.folder = self.output.with_name(f"{self.output.name}.parts")
        self.errors = self.output.with_name(f"{self.output.name}.errors.csv")
        self._lock: IO[str] | None = None

    def start(
        self, items: Iterable[Item], settings: dict[str, Any], overwrite: bool, inputs: Iterable[str] = (),
        backend: Callable[[int], str] = lambda count: "torch",
    ) -> bool:  # fmt: skip
        """Begins the job or, with the same settings, continues it; whether it was there. `backend` takes the count."""
        if not self.settings() and not overwrite:
            for path in filter(os.path.exists, (self.output, self.errors)):
                raise InputError(f"--output {self.output}: {path} is there already. Give --overwrite to replace it, or "
                                 "another name.")  # fmt: skip
        if self.errors.exists() and not self.errors.read_bytes().startswith(b"image,reason\n"):
            raise InputError(f"{self.errors} is no list of errors of this command, and is kept. Give another --output.")
        for path in filter(os.path.exists, inputs):
            self._check_not_written(path, os.stat(path))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = files.lock(self.folder / LOCK, f"--output {self.output}")
        listed = self.folder / f"_{ITEMS}"
        try:
            self.count, digest, stamps = self._write_items(listed, items)
            if not self.count:
                raise InputError("The inputs have no images in them.")
            settings = {**settings, "backend": backend(self.count)}
        except BaseException:
            listed.unlink(missing_ok=True)
            self._remove_if_empty()
            raise
        settings = json.loads(json.dumps({**settings, "images": self.count, "list of images": digest}))
        settings["files of images (sizes, times)"] = stamps
        before = self.settings()
        if before and before != settings and not overwrite:
            names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
            lines = [
                f"{self.folder} belongs to a run with other settings, which this command can't continue:",
                *(f"    {name}: {settings.get(name)} now, {before.get(name)} then" for name in names),
                "Give its settings and inputs again, or --overwrite to start anew, or another --output.",
            ]
            raise InputError("\n".join(lines))
        if before != settings:
            self._clear()
        os.replace(listed, self.folder / ITEMS)
        if before != settings:
            write_text(self.folder / JOB, json.dumps(settings, indent=2) + "\n")
        for file in self.folder.glob(".*.unfinished"):  # of a process that was killed as it wrote
            file.unlink()
        return before == settings

    def _check_not_written(self, path: str, status: os.stat_result) -> None:
        for written in (self.output, self.errors):
            if written.exists() and os.path.samestat(written.stat(), status):
                raise InputError(f"{written} would be written over, and it is {path}, an input. Give another --output.")

    def _write_items(self, file: Path, items: Iterable[Item]) -> tuple[int, str, str]:
        """Writes the list of images; their number, and the SHA-256 of the list, and of sizes and times of the files."""
        count, digest, files, last = 0, hashlib.sha256(), hashlib.sha256(), None
        with open(file, "wb") as opened:
            for item in items:
                count += 1
                if item.path != last and os.path.exists(item.path):
                    status = os.stat(item.path)
                    self._check_not_written(item.path, status)
                    files.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
                last = item.path
                # Without trailing defaults; ASCII, so that names that are not UTF-8 survive.
                values = list(item)
                while values[-1] is None:
                    values.pop()
                line = json.dumps(values).encode("ascii") + b"\n"
                opened.write(line)
                digest.update(line)
        return count, digest.hexdigest(), files.hexdigest()

    def settings(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / JOB).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InputError(
                f"{self.folder / JOB} is not JSON: {error}. Remove {self.folder}, and start again."
            ) from error

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
        missing = sum(min(end * self.batch_size, self.count) - first * self.batch_size for first, end in self.missing())
        return self.count - missing

    def share(
        self, missing: list[tuple[int, int]], rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[int, list[Item]]]:
        """Numbers and items of the batches of a process: `missing` ranges are dealt out in blocks, in turn."""
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
        """All rows in order. Parts overlap if one process went on after others were killed. InputError if damaged."""
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


class Writer:
    """Collects consecutive batches, and writes them as a part of the job; `waiting` are not on the disk yet."""

    def __init__(self, job: Job, label_names: list[str], is_regression: bool) -> None:
        self._job, self._labels = job, (label_names, is_regression)
        self._rows, self._first, self._end, self._since = [], 0, 0, time.monotonic()

    @property
    def waiting(self) -> int:
        return self._end - self._first

    def add(self, batch: Batch, prediction: Prediction) -> None:
        if batch.number != self._end:
            self.flush()
            self._first = batch.number
        self._rows.append(part_rows(batch.names, batch.errors, prediction, *self._labels))
        self._end = batch.number + 1
        if self.waiting * self._job.batch_size >= BLOCK or time.monotonic() - self._since >= SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self._job.write_part(self._first, self._end, pyarrow.concat_tables(self._rows))
        self._rows, self._first, self._since = [], self._end, time.monotonic()


def part_rows(
    names: list[str], errors: list[str | None], prediction: Prediction, label_names: Sequence[str] = (),
    is_regression: bool = False,
) -> pyarrow.Table:  # fmt: skip
    """Rows of names (N,), errors (N,) and a prediction of N images: the columns of the output, and "fault"."""
    faults = [None if error is None else printable(error) for error in errors]
    columns = {"image": list(map(printable, names)), "fault": pyarrow.array(faults, pyarrow.string())}
    of_labels = np.array(label_names, dtype=object)
    for rank, (labels, scores) in enumerate(zip(prediction.labels.T, prediction.scores.T)):
        end = f"_{rank + 1}" if rank else ""
        if not is_regression:
            columns[f"label{end}"] = of_labels[labels]
        columns["prediction" if is_regression else f"score{end}"] = scores.astype(np.float32)
    if prediction.sets is not None:
        sets = [of_labels[row[row >= 0]].tolist() for row in prediction.sets]
        columns["set"] = pyarrow.array(sets, pyarrow.list_(pyarrow.string()))
    names = ("abstain", "novelty", "novelty_percentile")
    columns |= {name: values for name in names if (values := getattr(prediction, name)) is not None}
    if (values := prediction.embeddings) is not None:
        columns["embedding"] = pyarrow.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])
    return pyarrow.table(columns)


def printable(text: str) -> str:
    """A name with bytes that are not UTF-8, written as in Python: caf\\xe9.jpg."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def write_output(file: Path, parts: Iterable[pyarrow.Table]) -> None:
    """Parquet, CSV, with lists as JSON, or JSON lines; the same bytes however rows are split into parts."""
    tables = (rows.filter(pyarrow.compute.is_null(rows["fault"])).drop_columns("fault") for rows in parts)
    ending, first = file.suffix.lower(), next(tables)
    tables = itertools.chain([first], tables)
    with atomic_write(file) as unfinished:
        if ending == ".parquet":
            _write_parquet(unfinished, tables, first.schema)
            return
        with open(unfinished, "w", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened, lineterminator="\n")
            if ending == ".csv":
                writer.writerow(first.column_names)
            for row in _rows(tables):
                if ending == ".csv":
                    lists = {name: _json(value) for name, value in row.items() if isinstance(value, list)}
                    writer.writerow({**row, **lists}.values())
                else:
                    opened.write(_json(row) + "\n")


def _write_parquet(file: Path, tables: Iterable[pyarrow.Table], schema: pyarrow.Schema) -> None:
    waiting = schema.empty_table()
    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in tables:
            waiting = pyarrow.concat_tables([waiting, table])
            while len(waiting) >= ROW_GROUP:
                writer.write_table(waiting.slice(0, ROW_GROUP).combine_chunks(), ROW_GROUP)
                waiting = waiting.slice(ROW_GROUP)
        if len(waiting):
            writer.write_table(waiting.combine_chunks(), ROW_GROUP)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _rows(tables: Iterable[pyarrow.Table]) -> Iterator[dict[str, Any]]:
    """Scores have six decimals; an embedding has the fewest digits that give its float32 back."""
    for table in tables:
        for row in table.to_pylist():
            for name, value in row.items():
                if name.startswith(("score", "novelty", "prediction")):
                    row[name] = round(value, 6)
                elif name == "embedding":
                    row[name] = [float(str(np.float32(number))) for number in value]
            yield row


def write_errors(file: Path, parts: Iterable[pyarrow.Table]) -> tuple[int, int]:
    """Writes image and reason of the broken images, if there are any. Returns how many are readable, and broken."""
    num_images = num_broken = 0
    with atomic_write(file) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(["image", "reason"])
        for rows in parts:
            broken = rows.filter(pyarrow.compute.is_valid(rows["fault"]))
            num_images, num_broken = num_images + len(rows), num_broken + len(broken)
            writer.writerows(zip(broken["image"].to_pylist(), broken["fault"].to_pylist()))
    if not num_broken:
        file.unlink()
    return num_images - num_broken, num_broken
