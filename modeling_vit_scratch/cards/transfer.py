# SPDX-License-Identifier: Apache-2.0
"""What a card says of the weights on other data: the table of scripts/transfer.py, from its record."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.weights import digests
from ..training.errors import InputError
from ..transfer.summary import markdown
from .words import paragraphs, picture


# Within the model's folder.
FOLDER, RECORD, FIGURE = "transfer", "transfer.json", "transfer.png"


@dataclass(frozen=True)
class Transfer:
    """transfer.json, and whether there is the picture of it."""

    record: dict[str, Any]
    has_figure: bool


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


def take_transfer(place: Path, folder: Path) -> None:
    """Copies record and picture into the model's folder."""
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    for file in (place / RECORD, place / FIGURE):
        if file.is_file() and file.resolve() != (target / file.name).resolve():
            shutil.copyfile(file, target / file.name)


def transfer(found: Transfer | None) -> str | None:
    """The section; None without a record."""
    if found is None:
        return None
    figure = picture(f"{FOLDER}/{FIGURE}", "Fine-tuned and frozen, from these weights and from none")
    return paragraphs("## Transfer", markdown(found.record).strip(), figure if found.has_figure else None)
