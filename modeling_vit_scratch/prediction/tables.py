# SPDX-License-Identifier: Apache-2.0
"""The rows of a job's parts, the columns of the output, and its three formats."""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from ..common.files import atomic_write


ROW_GROUP = 16_384  # rows: about 50 MB with the embeddings of B/16
_PART_COLUMNS = {
    "image": pyarrow.string(),
    "fault": pyarrow.string(),
    "labels": pyarrow.list_(pyarrow.int32()),
    "scores": pyarrow.list_(pyarrow.float32()),
    "embedding": pyarrow.list_(pyarrow.float32()),
}


def part_rows(
    names: list[str], errors: list[str | None], labels: np.ndarray, scores: np.ndarray, embeddings: np.ndarray | None
) -> pyarrow.Table:
    """
    The rows of a part.

    Args:
        names, errors: (N,).
        labels, scores: (N, k), best first.
        embeddings: (N, D), or None.
    """
    columns = {
        "image": list(map(printable, names)),
        "fault": [None if error is None else printable(error) for error in errors],
        "labels": _lists(labels.astype(np.int32)),
        "scores": _lists(scores.astype(np.float32)),
        "embedding": _lists(np.zeros((len(names), 0), np.float32) if embeddings is None else embeddings),
    }
    return pyarrow.table(columns, schema=pyarrow.schema(_PART_COLUMNS))


def _lists(values: np.ndarray) -> pyarrow.ListArray:
    """(N, k) to N lists of length k."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pyarrow.ListArray.from_arrays(offsets, pyarrow.array(values.ravel()))


def printable(text: str) -> str:
    """A name with bytes that are not UTF-8, written as in Python: caf\\xe9.jpg."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def output_columns(top_k: int, has_embeddings: bool, width: int) -> pyarrow.Schema:
    """image, label, score, label_2, score_2 and so on, embedding."""
    fields = [("image", pyarrow.string())]
    for rank in range(1, top_k + 1):
        end = "" if rank == 1 else f"_{rank}"
        fields += [(f"label{end}", pyarrow.string()), (f"score{end}", pyarrow.float32())]
    if has_embeddings:
        fields.append(("embedding", pyarrow.list_(pyarrow.float32(), width)))
    return pyarrow.schema(fields)


def to_output(rows: pyarrow.Table, label_names: list[str], schema: pyarrow.Schema) -> pyarrow.Table:
    """The readable images of a part, in the columns of the output."""
    rows = rows.filter(pyarrow.compute.is_null(rows["fault"]))
    top_k = sum(name.startswith("label") for name in schema.names)
    labels, scores = (
        rows[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(len(rows), top_k)
        for name in ("labels", "scores")
    )
    names, columns = np.array(label_names, dtype=object), [rows["image"].combine_chunks()]
    for rank in range(top_k):
        columns += [pyarrow.array(names[labels[:, rank]], pyarrow.string()), pyarrow.array(scores[:, rank])]
    if "embedding" in schema.names:
        values = rows["embedding"].combine_chunks().flatten()
        columns.append(pyarrow.FixedSizeListArray.from_arrays(values, schema.field("embedding").type.list_size))
    return pyarrow.table(columns, schema=schema)


def write_output(file: Path, tables: Iterable[pyarrow.Table], schema: pyarrow.Schema) -> int:
    """
    Writes the format of the file's suffix; how the rows are split into tables does not change its bytes.

    Returns:
        The number of rows.
    """
    write = {".parquet": _write_parquet, ".csv": _write_csv, ".jsonl": _write_jsonl}[file.suffix.lower()]
    with atomic_write(file) as unfinished:
        return write(unfinished, tables, schema)


def _write_parquet(file: Path, tables: Iterable[pyarrow.Table], schema: pyarrow.Schema) -> int:
    count, waiting = 0, schema.empty_table()
    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in tables:
            count += len(table)
            waiting = pyarrow.concat_tables([waiting, table])
            while len(waiting) >= ROW_GROUP:
                writer.write_table(waiting.slice(0, ROW_GROUP).combine_chunks(), ROW_GROUP)
                waiting = waiting.slice(ROW_GROUP)
        if len(waiting):
            writer.write_table(waiting.combine_chunks(), ROW_GROUP)
    return count


def _write_csv(file: Path, tables: Iterable[pyarrow.Table], schema: pyarrow.Schema) -> int:
    """Scores with six decimals, an embedding as a JSON list."""
    count = 0
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(schema.names)
        for row in _rows(tables):
            count += 1
            writer.writerow([json.dumps(value) if isinstance(value, list) else value for value in row.values()])
    return count


def _write_jsonl(file: Path, tables: Iterable[pyarrow.Table], schema: pyarrow.Schema) -> int:
    count = 0
    with open(file, "w", encoding="utf-8") as opened:
        for row in _rows(tables):
            count += 1
            opened.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


def _rows(tables: Iterable[pyarrow.Table]) -> Iterator[dict[str, Any]]:
    for table in tables:
        for row in table.to_pylist():
            yield {name: _rounded(name, value) for name, value in row.items()}


def _rounded(name: str, value: Any) -> Any:
    """Scores with six decimals; an embedding with the fewest digits that give its float32 back."""
    if name.startswith("score"):
        return round(value, 6)
    return [float(str(np.float32(number))) for number in value] if isinstance(value, list) else value


def write_errors(file: Path, parts: Iterable[pyarrow.Table]) -> int:
    """
    Writes image and reason of the broken images; without any there is no file.

    Returns:
        The number of broken images.
    """
    count = 0
    with atomic_write(file) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(["image", "reason"])
        for rows in parts:
            broken = rows.filter(pyarrow.compute.is_valid(rows["fault"]))
            count += len(broken)
            writer.writerows(zip(broken["image"].to_pylist(), broken["fault"].to_pylist()))
    if not count:
        file.unlink()
    return count
