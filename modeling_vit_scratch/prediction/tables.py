# SPDX-License-Identifier: Apache-2.0
"""What is written: rows of a job's parts, the columns of the output, and its three formats."""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from ..common.files import atomic_write


# Rows in a row group of a .parquet: about 50 MB with the embeddings of B/16.
ROW_GROUP = 16_384
_PART_COLUMNS = {
    "image": pyarrow.string(),
    "fault": pyarrow.string(),
    "labels": pyarrow.list_(pyarrow.int32()),
    "scores": pyarrow.list_(pyarrow.float32()),
    "embedding": pyarrow.list_(pyarrow.float32()),
}


def part_rows(
    names: list[str], faults: list[str | None], labels: np.ndarray, scores: np.ndarray, embeddings: np.ndarray | None
) -> pyarrow.Table:
    """
    Rows as a part has them.

    Args:
        names, faults: (N,).
        labels, scores: (N, k), best first.
        embeddings: (N, D), or None.
    """
    columns = {
        "image": list(map(printable, names)),
        "fault": [None if fault is None else printable(fault) for fault in faults],
        "labels": _lists(labels.astype(np.int32)),
        "scores": _lists(scores.astype(np.float32)),
        "embedding": _lists(np.zeros((len(names), 0), np.float32) if embeddings is None else embeddings),
    }
    return pyarrow.table(columns, schema=pyarrow.schema(_PART_COLUMNS))


def _lists(values: np.ndarray) -> pyarrow.ListArray:
    """(N, k) as N lists of k."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pyarrow.ListArray.from_arrays(offsets, pyarrow.array(values.ravel()))


def printable(text: str) -> str:
    """A name with bytes that are no UTF-8 as text, where these are written as in Python: caf\\xe9.jpg."""
    return os.fsencode(text).decode("utf-8", "backslashreplace") if not _is_text(text) else text


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def output_columns(top_k: int, has_embeddings: bool, width: int) -> pyarrow.Schema:
    """image, label, score, label_2, score_2 and so on, embedding."""
    fields = [("image", pyarrow.string())]
    for place in range(1, top_k + 1):
        end = "" if place == 1 else f"_{place}"
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
    for place in range(top_k):
        columns += [pyarrow.array(names[labels[:, place]], pyarrow.string()), pyarrow.array(scores[:, place])]
    if "embedding" in schema.names:
        values = rows["embedding"].combine_chunks().flatten()
        columns.append(pyarrow.FixedSizeListArray.from_arrays(values, schema.field("embedding").type.list_size))
    return pyarrow.table(columns, schema=schema)


def write_output(file: Path, tables: Iterable[pyarrow.Table], schema: pyarrow.Schema) -> int:
    """
    Writes the format that the ending names. The bytes do not depend on how the rows are cut into tables.

    Returns:
        How many rows there are.
    """
    write, count = {".parquet": _write_parquet, ".csv": _write_csv, ".jsonl": _write_jsonl}[file.suffix.lower()], 0

    def counted() -> Iterator[pyarrow.Table]:
        nonlocal count
        for table in tables:
            count += len(table)
            yield table

    with atomic_write(file) as unfinished:
        write(unfinished, counted(), schema)
    return count


def _write_parquet(file: Path, tables: Iterable[pyarrow.Table], schema: pyarrow.Schema) -> None:
    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        waiting = schema.empty_table()
        for table in tables:
            waiting = pyarrow.concat_tables([waiting, table])
            while len(waiting) >= ROW_GROUP:
                writer.write_table(waiting.slice(0, ROW_GROUP).combine_chunks(), ROW_GROUP)
                waiting = waiting.slice(ROW_GROUP)
        if len(waiting):
            writer.write_table(waiting.combine_chunks(), ROW_GROUP)


def _write_csv(file: Path, tables: Iterable[pyarrow.Table], schema: pyarrow.Schema) -> None:
    """Scores with six decimals, an embedding as a JSON list."""
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(schema.names)
        for row in _rows(tables):
            writer.writerow([json.dumps(value) if isinstance(value, list) else value for value in row.values()])


def _write_jsonl(file: Path, tables: Iterable[pyarrow.Table], schema: pyarrow.Schema) -> None:
    with open(file, "w", encoding="utf-8") as opened:
        for row in _rows(tables):
            opened.write(json.dumps(row, ensure_ascii=False) + "\n")


def _rows(tables: Iterable[pyarrow.Table]) -> Iterator[dict[str, Any]]:
    for table in tables:
        for row in table.to_pylist():
            yield {name: _shown(name, value) for name, value in row.items()}


def _shown(name: str, value: Any) -> Any:
    """float32 in as few digits as tell it from its neighbours; scores in six decimals."""
    if name.startswith("score"):
        return round(value, 6)
    return [float(str(np.float32(number))) for number in value] if isinstance(value, list) else value


def write_errors(file: Path, parts: Iterable[pyarrow.Table]) -> int:
    """
    image, reason: the broken images. Without any there is no file.

    Returns:
        How many there are.
    """
    count = 0
    with atomic_write(file) as unfinished:
        with open(unfinished, "w", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened, lineterminator="\n")
            writer.writerow(["image", "reason"])
            for rows in parts:
                broken = rows.filter(pyarrow.compute.is_valid(rows["fault"]))
                count += len(broken)
                writer.writerows(zip(broken["image"].to_pylist(), broken["fault"].to_pylist()))
    if not count:
        file.unlink()
    return count
