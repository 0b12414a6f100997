# SPDX-License-Identifier: Apache-2.0
"""What must not be on both sides of a split, training and held out: the same image, a near copy of it, its group."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from ..common.errors import Problems
from ..common.flags import DataArguments, LabelFlags
from .copies import Copies, listed_below
from .dataset import Examples, StoredImage
from .held_out import Earlier


MAX_PAIRS = 100  # of near copies in a record


def read_groups(
    dataset: datasets.Dataset, images: datasets.Dataset, arguments: LabelFlags, split: str, problems: Problems
) -> list[Any] | None:
    """The group of each image, from --group_column_name or --group_from; None if that can't be read."""
    column, pattern = arguments.group_column_name, arguments.group_from
    if column in dataset.column_names:
        return list(dataset[column])
    if column is not None:
        names = ", ".join(map(repr, dataset.column_names))
        problems.add(f"--group_column_name {column}: the {split} split has no such column. Its columns: {names}.")
        return None
    try:
        expression = re.compile(pattern)
    except re.error as error:
        problems.add(f"--group_from {pattern!r} is no regular expression: {error}.")
        return None
    paths = [str((row or {}).get("path")) for row in images["image"]]
    matches = [expression.search(path.replace("\\", "/")) for path in paths]
    if missing := [path for path, match in zip(paths, matches) if match is None]:
        problems.add(
            f"--group_from {pattern!r} matches {len(paths) - len(missing)} of the {len(paths)} paths of the {split} "
            f"split; not, for example, {missing[0]}. Let it match all."
        )
    return [match and (match.groups() or match[0]) for match in matches]


@dataclass(frozen=True)
class ImagesOfBothSides:
    """All images of a run, numbered: those of the training split, then those of a validation split of its own."""

    parts: Sequence[Examples]
    copies: Copies | None  # None if no image was looked at
    groups: list[Any]  # of each image; [] if there are none
    label_names: list[str]
    arguments: DataArguments
    problems: Problems

    @property
    def labels(self) -> list[Any]:
        return [label for part in self.parts for label in part.labels]

    def image(self, index: int) -> StoredImage:
        first = len(self.parts[0])
        part, index = (self.parts[0], index) if index < first else (self.parts[1], index - first)
        return part.stored([index])[0]

    def with_two_labels(self) -> set[int]:
        """The images to leave out because a copy has another label. That there are any is a problem without flags."""
        found = {} if self.copies is None or self.arguments.allow_overlap else self.copies.with_two_labels(self.labels)
        if not found or self.arguments.drop_overlap:
            return set(found)
        pairs = {index: other for index, other in found.items() if other < index}
        self._refuse(f"{len(found)} images are there with two different labels. Correct these", pairs)
        return set()

    def kept_together(self, earlier: Earlier | None) -> list[int] | None:
        """The groups of images that are on one side; None where only equal files are. A resumed run is as it was."""
        is_same_run = earlier is not None and earlier.is_same_run
        if self.arguments.allow_overlap or (is_same_run and not self.groups):
            return None
        return self.copies.groups(self.groups)

    def compare(
        self, train: list[int], held_out: list[int], is_given: bool
    ) -> tuple[list[int], dict[str, Any], list[tuple[StoredImage, StoredImage]]]:
        """
        The training images to keep, the record of what is on both sides, and pairs of near copies. What is on both
        sides of a given split is a problem without flags.
        """
        arguments, copies = self.arguments, self.copies
        start = "Whether held-out images are in the training set is not known"
        if arguments.streaming:
            return train, {"sentence": f"{start}: a stream is not read before training."}, []
        if copies is None:
            return train, {"sentence": f"{start}: no file was read before training (--verify_images False)."}, []
        groups = self.groups if len(self.groups) == len(copies.ids) else [None] * len(copies.ids)
        of_held_out = {groups[index] for index in held_out} - {None}
        if is_given and arguments.drop_overlap:
            exact, near = copies.across(held_out, train)
            train = [i for i in train if i not in exact | near and groups[i] not in of_held_out]
        exact, near = copies.across(train, held_out)
        if is_given and not arguments.allow_overlap:
            if exact:
                self._refuse(f"{len(exact)} of the {len(held_out)} held-out images are training images, too", exact)
            if both := of_held_out.intersection(groups[index] for index in train):
                names = ", ".join(sorted(map(str, both))[:10])
                self.problems.add(f"{len(both)} groups are on both sides, e.g. {names}. {_WAY_OUT}.")
        count = f"{len(exact):,} of {len(held_out):,} held-out images are in the training set"
        known = "near copies were not looked for" if copies.near is None else f"{len(near):,} near copies"
        pairs = [tuple(map(self.image, pair)) for pair in list(near.items())[:MAX_PAIRS]]
        record = {
            "sentence": f"{count}, {known}.{' Their score is too high.' if exact else ''}",
            "in_training": len(exact),
            "near_copies": None if copies.near is None else len(near),
            "near_pairs": [["/".join(image.name.split("/")[-2:]) for image in pair] for pair in pairs],
        }
        return train, record, pairs

    def check_files(self, used: list[int]) -> None:
        """Adds the images that can't be read to the problems."""
        if self.copies and (reasons := [self.copies.broken[index] for index in used if index in self.copies.broken]):
            self.problems.add(
                f"{len(reasons)} of {len(used)} images can't be read. Repair or remove them, or let others take the "
                "place of up to N in training with --verify_images False --max_broken_images N:" + listed_below(reasons)
            )

    def _refuse(self, what: str, pairs: dict[int, int]) -> None:
        labels = self.labels

        def named(index: int) -> str:
            if isinstance(labels[index], float):
                return f"{self.image(index).name} ({labels[index]:g})"
            own = np.flatnonzero(labels[index]) if isinstance(labels[index], np.ndarray) else [labels[index]]
            return f"{self.image(index).name} ({', '.join(self.label_names[one] for one in own) or 'no label'})"

        names = [f"{named(index)} is {named(other)}" for index, other in pairs.items()]
        self.problems.add(f"{what}. {_WAY_OUT}:{listed_below(names)}")


_WAY_OUT = (
    "Leave what is on both sides, or has two labels, out of training with --drop_overlap, or accept it with "
    "--allow_overlap"
)
