# SPDX-License-Identifier: Apache-2.0
"""Which column of a table holds the images, and which the labels."""

from typing import Any

import datasets

from ..common.errors import Problems


# What columns are called where their type does not tell.
IMAGE_COLUMNS = (
    "image",
    "images",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "file_name",
    "filename",
    "file",
    "path",
    "image_path",
)
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "cls")


def is_class_label(feature: Any) -> bool:
    """Whether it says what it is: `ClassLabel`, or a list of such, where images have several."""
    return isinstance(getattr(feature, "feature", feature), datasets.ClassLabel)


def find_column(
    kind: str,
    wish: str | None,
    of_type: list[str],
    usual: tuple[str, ...],
    columns: list[str],
    split: str,
    problems: Problems,
) -> str | None:
    """The column that the user names; else the only one of the right type; else the only one with a usual name."""
    flag, listing = f"--{kind}_column_name", ", ".join(map(repr, columns))
    if wish is not None:
        if wish not in columns:
            problems.add(f"{flag} {wish}: the {split} split has no such column. Its columns: {listing}.")
        return wish if wish in columns else None
    candidates = of_type or [column for column in columns if column.lower() in usual]
    if len(candidates) == 1:
        return candidates[0]
    found = (
        f"several columns could be the {kind}s: {', '.join(candidates)}" if candidates else f"no {kind} column found"
    )
    problems.add(f"The {split} split: {found}. Name it with {flag}. Its columns: {listing}.")
    return None
