# SPDX-License-Identifier: Apache-2.0
"""The table of scripts/transfer.py, from its record: what the weights of a model gain on other data."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.records import digests
from .rendering import TRANSFER_TEMPLATE, render


# What a run starts from, and how its result was had: fine-tuned, or by a probe.
PRETRAINED, SCRATCH = "pretrained", "scratch"
FINE_TUNED = "fine-tuned"
# Of the probes, those that the table shows; the record has all.
SHOWN_PROBES = {"fewshot_5": "5 images a class", "fewshot_10": "10 images a class", "linear": "linear, all images"}
# Within the model's folder.
FOLDER, RECORD, FIGURE = "transfer", "transfer.json", "transfer.png"


def check_transfer(record: dict[str, Any], place: Path, folder: Path) -> None:
    """Raises InputError for what is no transfer table, or of other weights than those in the model's folder."""
    if not record.get("cells") or "weights" not in record:
        raise InputError(f"{place / RECORD} has no cells of a transfer table: make it with scripts/transfer.py.")
    ours = digests(folder)
    if record["weights"] and ours and record["weights"] != ours:
        raise InputError(
            f"{place / RECORD} is of other weights than those in {folder}: their SHA-256 differ. Remove it, or run "
            f"scripts/transfer.py --model_name_or_path {folder}."
        )


def copy_transfer(place: Path, folder: Path) -> None:
    """Copies record and picture into the model's folder."""
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    for file in (place / RECORD, place / FIGURE):
        if file.is_file() and file.resolve() != (target / file.name).resolve():
            shutil.copyfile(file, target / file.name)


def find(record: dict[str, Any], data: str, how: str) -> dict[str, dict[str, Any]]:
    """The cells of a row by start."""
    return {cell["start"]: cell for cell in record["cells"] if (cell["data"], cell["how"]) == (data, how)}


def names_of(record: dict[str, Any]) -> list[str]:
    """The data sets, as on the command line."""
    return list(dict.fromkeys(cell["data"] for cell in record["cells"]))


def in_words(cell: dict[str, Any]) -> str:
    """Mean and standard deviation of a cell: 74.8 ± 0.4 %."""
    spread = "" if cell["std"] is None else f" ± {100 * cell['std']:.1f}"
    return f"{100 * cell['mean']:.1f}{spread} %"


def gain_in_words(row: dict[str, dict[str, Any]]) -> str:
    """What the pretrained weights gain, in percentage points: +6.6."""
    return f"{100 * (row[PRETRAINED]['mean'] - row[SCRATCH]['mean']):+.1f}"


def markdown(record: dict[str, Any]) -> str:
    """The tables, what they were measured on and the commands, as on a card."""
    return render({"transfer": transfer_values(record)}, TRANSFER_TEMPLATE)


def transfer_values(record: dict[str, Any]) -> dict[str, Any]:
    """What `transfer` is in a template."""
    data = names_of(record)
    rows = {name: find(record, name, FINE_TUNED) for name in data}
    is_accuracy = {cell["metric"] for row in rows.values() for cell in row.values()} == {"accuracy"}
    probes = {how: title for how, title in SHOWN_PROBES.items() if any(cell["how"] == how for cell in record["cells"])}
    probed = {name: [find(record, name, how) for how in probes] for name in data}
    last_probes = [cells[-1] for cells in probed.values() if cells and cells[-1]]
    commands = [row[start]["command"] for row in (*rows.values(), *last_probes) for start in (SCRATCH, PRETRAINED)]
    rates = _group(
        ((row[SCRATCH]["learning_rate"], row[PRETRAINED]["learning_rate"]), name) for name, row in rows.items()
    )
    machines = _group((_machine(cell), cell["data"]) for cell in record["cells"])
    return {
        "model": record["model"],
        "metric": "accuracy" if is_accuracy else "result",
        "rows": [
            {
                "data": name,
                "metric": None if is_accuracy else row[PRETRAINED]["metric"],
                "num_training_images": row[PRETRAINED]["num_training_images"],
                "num_held_out_images": row[PRETRAINED]["num_held_out_images"],
                "scratch": in_words(row[SCRATCH]),
                "pretrained": in_words(row[PRETRAINED]),
                "gain": gain_in_words(row),
            }
            for name, row in rows.items()
        ],
        "probes": list(probes.values()),
        "probe_rows": [
            {
                "data": name,
                "cells": [f"{in_words(row[SCRATCH])}, {in_words(row[PRETRAINED])}" if row else "–" for row in cells],
            }
            for name, cells in probed.items()
        ],
        "num_seeds": sorted({cell["n"] for cell in record["cells"]}),
        "learning_rates": [
            {"scratch": scratch, "pretrained": pretrained, "data": names}
            for (scratch, pretrained), names in rates.items()
        ],
        "tried": list(dict.fromkeys(rate for row in rows.values() for rate in row[SCRATCH].get("tried", {}))),
        "machines": [{"name": name, "data": names} for name, names in machines.items()],
        "notes": record["notes"],
        "commands": "\n".join(commands),
    }


def _group(pairs: Iterable[tuple[Any, str]]) -> dict[Any, list[str] | None]:
    """The data sets by what they have in common; None for them where all have the same."""
    groups: dict[Any, dict[str, None]] = {}
    for key, data in pairs:
        groups.setdefault(key, {})[data] = None
    return {key: list(data) if len(groups) > 1 else None for key, data in groups.items()}


def _machine(cell: dict[str, Any]) -> str:
    return f"{cell['hardware']}; torch {cell['versions']['torch']}, transformers {cell['versions']['transformers']}"
