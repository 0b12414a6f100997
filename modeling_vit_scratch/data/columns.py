# SPDX-License-Identifier: Apache-2.0
"""Which column of a table holds the images, and which the labels."""

from typing import Any

import datasets
import numpy as np

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


def is_label_list(feature: Any) -> bool:
    """Whether a column of this type holds a list of names or whole numbers for each image."""
    if not isinstance(feature, datasets.List | datasets.LargeList):
        return False
    inner = feature.feature
    is_value = isinstance(inner, datasets.Value) and ("string" in inner.dtype or "int" in inner.dtype)
    return is_value or isinstance(inner, datasets.ClassLabel)


def read_label_lists(
    dataset: datasets.Dataset, column: str, separator: str | None, split: str, problems: Problems
) -> tuple[list[str], list[list[int]], bool] | None:
    """
    Names, the indices of each image's labels, and whether the data itself gives the order of the names.

    Args:
        dataset: with `column` of lists, or with a `separator` of text: "cat|dog", of which nothing means no label.
        split, problems: for the message, where the labels can't be read; then the result is None.
    """
    feature, values = dataset.features[column], list(dataset[column])
    if separator is not None:
        if not all(value is None or isinstance(value, str) for value in values):
            problems.add(f"--label_separator is for text, and column {column!r} of the {split} split holds {feature}.")
            return None
        words = [(value or "").split(separator) for value in values]
        values = [[word.strip() for word in row if word.strip()] for row in words]
    missing = sum(value is None or any(label is None for label in value) for value in values)
    if missing:
        problems.add(
            f"{missing} images of the {split} split have no labels in column {column!r}, or one that is null. An image "
            "that has none of the labels has an empty list; remove those of which it is not known."
        )
        return None
    twice = next((row for row in values if len(set(row)) < len(row)), None)
    if twice is not None:
        problems.add(
            f"Column {column!r} of the {split} split has a label twice for one image: {str(twice)[:80]}. It must list "
            "the labels that an image has, not 0 or 1 for each: [1, 4] and not [0, 1, 0, 0, 1]."
        )
        return None
    if separator is None and isinstance(feature.feature, datasets.ClassLabel):
        return list(feature.feature.names), values, True
    distinct = sorted({label for row in values for label in row})
    index = {value: position for position, value in enumerate(distinct)}
    return [str(value) for value in distinct], [[index[label] for label in row] for row in values], False


def multi_hot(lists: list[list[int]], num_labels: int) -> np.ndarray:
    """(N, K) uint8: 1 for the labels that an image has. Negative indices are left out."""
    hot = np.zeros((len(lists), num_labels), dtype=np.uint8)
    for row, indices in zip(hot, lists):
        row[[index for index in indices if index >= 0]] = 1
    return hot


def stratify(labels: np.ndarray, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """
    Two parts at random, the second with this fraction of the images and, as nearly as can be, of those of every label:
    iterative stratification (Sechidis et al. 2011, algorithm 1). The rarest label is shared out first, image by image,
    each to the part that lacks most of it.

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

    def place(index: int, lack: np.ndarray) -> None:
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
            place(index, wanted[:, rarest])
    for index in order[part[order] < 0].tolist():
        place(index, room)
    return np.flatnonzero(part == 0).tolist(), np.flatnonzero(part == 1).tolist()
