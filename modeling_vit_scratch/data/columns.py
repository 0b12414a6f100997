# SPDX-License-Identifier: Apache-2.0
"""Which columns of a table hold images and labels, what the labels are, and a held-out part with some of each label."""

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np

from ..common.errors import Problems
from .arguments import DataArguments


# Usual column names, for tables whose types do not say which column is which.
USUAL_NAMES = {
    "image": (
        "image", "images", "img", "jpg", "jpeg", "png", "webp", "file_name", "filename", "file", "path", "image_path",
    ),
    "label": ("label", "labels", "class", "category", "target", "cls"),
}  # fmt: skip


def find_column(
    kind: str, named: str | None, features: Mapping[str, Any], split: str, problems: Problems
) -> str | None:
    """
    The "image" or "label" column: the one that the user named; else the only one of the right type; else the only one
    with a usual name. `features` are the types of all columns, None where they are not known.
    """
    flag, listing = f"--{kind}_column_name", ", ".join(map(repr, features))
    if named is not None:
        if named not in features:
            problems.add(f"{flag} {named}: the {split} split has no such column. Its columns: {listing}.")
        return named if named in features else None
    is_right = is_image if kind == "image" else is_class_label
    candidates = [column for column, feature in features.items() if is_right(feature)]
    candidates = candidates or [column for column in features if column.lower() in USUAL_NAMES[kind]]
    if len(candidates) == 1:
        return candidates[0]
    found = (
        f"several columns could be the {kind}s: {', '.join(candidates)}" if candidates else f"no {kind} column found"
    )
    problems.add(f"The {split} split: {found}. Name it with {flag}. Its columns: {listing}.")
    return None


def find_columns(
    arguments: DataArguments, features: Mapping[str, Any], split: str, problems: Problems, needs_labels: bool
) -> tuple[str, str | None] | None:
    """The image and the label column; None if one is missing. Without `needs_labels` the label column may be None."""
    image = find_column("image", arguments.image_column_name, features, split, problems)
    needs_labels = needs_labels or arguments.label_column_name is not None
    label_problems = problems if needs_labels else Problems()
    label = find_column("label", arguments.label_column_name, features, split, label_problems)
    return None if image is None or (label is None and needs_labels) else (image, label)


def is_image(feature: Any) -> bool:
    """Whether a column of this type holds images."""
    return isinstance(feature, datasets.Image)


def is_class_label(feature: Any) -> bool:
    """Whether a column of this type holds a `ClassLabel`, or a list of them, for each image."""
    return isinstance(getattr(feature, "feature", feature), datasets.ClassLabel)


def is_label_list(feature: Any) -> bool:
    """Whether a column of this type holds a list of names or whole numbers for each image."""
    if not isinstance(feature, datasets.List | datasets.LargeList):
        return False
    inner = feature.feature
    is_value = isinstance(inner, datasets.Value) and ("string" in inner.dtype or "int" in inner.dtype)
    return is_value or isinstance(inner, datasets.ClassLabel)


def split_labels(text: str | None, separator: str) -> list[str]:
    """The labels in a text, "cat|dog"; none in an empty one."""
    return [word.strip() for word in (text or "").split(separator) if word.strip()]


def read_labels(
    dataset: datasets.Dataset, column: str, separator: str | None, split: str, problems: Problems
) -> tuple[list[str], list[int] | list[list[int]], bool, bool] | None:
    """
    Reads a column of names, whole numbers or class labels, of lists of these, or, with a `separator`, of text.

    Returns:
        Label names; the index of each image's label, or a list of them; whether the data define the order of the names;
        and whether images may have several labels. None if that can't be read: the reasons are among the problems.
    """
    feature, rows = dataset.features[column], list(dataset[column])
    is_multi_label = separator is not None or is_label_list(feature)
    has_names = separator is None and is_class_label(feature)
    if separator is not None:
        if not all(value is None or isinstance(value, str) for value in rows):
            problems.add(f"--label_separator is for text, and column {column!r} of the {split} split holds {feature}.")
            return None
        rows = [split_labels(value, separator) for value in rows]
    elif not is_multi_label:
        rows = [[None] if has_names and (value or 0) < 0 else [value] for value in rows]
    missing = sum(row is None or None in row for row in rows)
    if missing and is_multi_label:
        problems.add(
            f"{missing} images of the {split} split have no labels in column {column!r}, or one that is null. Use an "
            "empty list for images with no labels; remove images whose labels are unknown."
        )
        return None
    if missing:
        problems.add(f"{missing} images of the {split} split have no label in column {column!r}. Remove them first.")
        return None
    if not all(isinstance(label, str | int) for row in rows for label in row):
        problems.add(
            f"Column {column!r} of the {split} split holds {feature}: labels must be one name or whole number for each "
            "image, or a list of them."
        )
        return None
    repeated = next((row for row in rows if len(set(row)) < len(row)), None)
    if repeated is not None:
        problems.add(
            f"Column {column!r} of the {split} split has a label twice for one image: {str(repeated)[:80]}. It must "
            "list the labels that an image has, not 0 or 1 for each: [1, 4] and not [0, 1, 0, 0, 1]."
        )
        return None
    if has_names:
        names = list(getattr(feature, "feature", feature).names)
    else:
        distinct = sorted({label for row in rows for label in row})
        names, index = [str(label) for label in distinct], {label: number for number, label in enumerate(distinct)}
        rows = [[index[label] for label in row] for row in rows]
    return names, rows if is_multi_label else [row[0] for row in rows], has_names, is_multi_label


def multi_hot(lists: list[list[int]], num_labels: int) -> np.ndarray:
    """(N, K) uint8: 1 for the labels that an image has. Negative indices are left out."""
    hot = np.zeros((len(lists), num_labels), dtype=np.uint8)
    for row, indices in zip(hot, lists):
        row[[index for index in indices if index >= 0]] = 1
    return hot


def stratify(labels: np.ndarray, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """
    Splits images at random into two parts, the second with this fraction of the images and, as nearly as possible, of
    those of every label: iterative stratification (Sechidis et al. 2011, algorithm 1). The rarest label is distributed
    first, image by image, each to the part that lacks most of it.

    Args:
        labels: (N, K), 0 and 1.
        fraction: 0 to 1.
        seed: of the order of the images, and of ties.

    Returns:
        The indices of both parts, sorted.
    """
    generator, shares = np.random.default_rng(seed), np.array([1.0 - fraction, fraction])
    left = labels.sum(axis=0, dtype=np.int64)  # images of each label that are in no part yet
    room, wanted = shares * len(labels), shares[:, None] * left  # (2,), (2, K)
    part = np.full(len(labels), -1)
    order = generator.permutation(len(labels))

    def assign(index: int, lack: np.ndarray) -> None:
        best = np.flatnonzero(np.isclose(lack, lack.max()))
        best = best[np.isclose(room[best], room[best].max())]
        chosen = best[0] if len(best) == 1 else generator.choice(best)
        part[index] = chosen
        room[chosen] -= 1
        wanted[chosen] -= labels[index]
        left[:] -= labels[index]

    while left.any():
        rarest = int(np.where(left > 0, left, len(labels) + 1).argmin())
        for index in order[(labels[order, rarest] == 1) & (part[order] < 0)].tolist():
            assign(index, wanted[:, rarest])
    for index in order[part[order] < 0].tolist():
        assign(index, room)
    return np.flatnonzero(part == 0).tolist(), np.flatnonzero(part == 1).tolist()
