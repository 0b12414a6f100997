# SPDX-License-Identifier: Apache-2.0
"""
From a source to training and held-out examples: columns, labels, the split, and a check of every file. All mistakes in
the data are found before training starts, and reported in one message.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..common.errors import InputError, Problems, listed
from ..common.flags import DataArguments
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from .copies import ImagesOfBothSides, find_copies, read_groups
from .dataset import Examples, StoredImage, multi_hot
from .held_out import Earlier, choose_folds, choose_held_out, images_record, notes
from .listing import is_class_label, is_label_list, left_out_line, path_beside, split_labels
from .sources import FOLDER_COLUMN, Source, find_columns, read_source
from .streams import ImageStream


@dataclass(frozen=True)
class ImageData:
    """The data of a training."""

    source: Source
    label_names: list[str]  # in the order of the class indices; [] if there are none
    train: Examples | ImageStream
    validation: Examples
    split: str  # which images are held out
    shuffle_buffer_size: int = 1
    is_multi_label: bool = False  # any number of labels for each image
    is_regression: bool = False  # a number for each image; the one label name is that of the column
    images: dict[str, Any] | None = None  # see `held_out`; None where no file was read
    notes: list[str] = field(default_factory=list)  # for the user
    overlap: dict[str, Any] = field(default_factory=dict)  # of both sides: see `copies`
    near_copies: list[tuple[StoredImage, StoredImage]] = field(default_factory=list)  # held out and training

    @property
    def num_train(self) -> int | None:
        """Training images; None where a stream does not know their number."""
        return self.train.count if isinstance(self.train, ImageStream) else len(self.train)

    def describe(self) -> str:
        kind = "labels, any number of them for an image" if self.is_multi_label else "labels"
        labels = f"numbers to predict: {listed(self.label_names)}" if self.is_regression else "no labels"
        if self.label_names and not self.is_regression:
            labels = f"{len(self.label_names)} {kind}: {listed(self.label_names)}"
        number = "streamed" if self.num_train is None else f"{self.num_train:,}"
        images = f"{number} training and {len(self.validation):,} held-out images ({self.split})"
        lines = [f"{self.source.name}: {images}; {labels}.", self.overlap.get("sentence"), *self.notes]
        return "\n".join(filter(None, lines))


def check_for_probes(data: ImageData) -> None:
    """Raises InputError unless each image has one label."""
    if len(data.label_names) < 2 or data.is_multi_label:
        has = "any number of them" if data.is_multi_label else "none"
        raise InputError(f"Probes judge features by one label for each image, and these images have {has}.")


def read_data(
    arguments: DataArguments,
    seed: int,
    problems: Problems,
    cache_dir: str | None = None,
    needs_labels: bool = True,
    earlier: Earlier | None = None,
) -> ImageData:
    """
    Reads, splits and checks the data; all processes of a run call it, and the first one looks at the images. `seed` is
    that of `--max_train_samples` and `--max_eval_samples`. Without `needs_labels`, images without labels are of class
    0, which has no name. `earlier` are the images behind the model that the run starts or goes on from. Raises
    InputError with `problems` and everything that is wrong with the data.
    """
    process = PartialState()
    with process.local_main_process_first():  # it fills the caches
        source = read_source(arguments, cache_dir, problems, needs_labels)
    if source is None:
        raise problems.as_error()
    source = replace(source, num_channels=arguments.num_channels or source.num_channels)
    train, validation = source.train, None
    if isinstance(train, datasets.Dataset):
        train = read_split("training", train, arguments, problems, needs_labels)
    if arguments.folds:
        source = replace(source, validation=None)
    if source.validation is not None:
        has_names = train is None or bool(train.label_names)
        validation = read_split("validation", source.validation, arguments, problems, needs_labels and has_names)
    elif arguments.streaming and arguments.validation_dir is None:
        problems.add(
            "A stream has no part that can be held out at random before it is read. Give --validation_dir, in any form."
        )
    has_own_validation = source.validation is not None or arguments.validation_dir is not None or arguments.streaming
    if train is None or (has_own_validation and validation is None):
        raise problems.as_error()

    is_stream = isinstance(train, ImageStream)
    train = train if is_stream else _usable_labels(train, needs_labels, problems)
    parts = [] if is_stream else [train.examples()]
    if validation is not None:
        parts.append(_held_out_examples(train, validation, problems))
    found = [None]
    if (validation is None or arguments.verify_images) and process.is_main_process:  # files that are read anyway
        found = [find_copies(parts, arguments.verify_images, source.num_channels)]
    copies, count = broadcast_object_list(found)[0], 0 if is_stream else len(parts[0])
    groups = [group for split in (train, validation) for group in getattr(split, "groups", None) or []]
    images = ImagesOfBothSides(parts, copies, groups, train.label_names, arguments, problems)
    if copies is not None and earlier is not None and not is_stream:
        earlier = earlier.resolve(source.name, train.rows(), copies.ids[:count], train.is_multi_label)
    left_out, held_out = images.with_two_labels(), list(range(count, count + len(parts[-1])))
    if validation is None:
        held_out = hold_out(train, copies.ids, arguments, problems, earlier, images.kept_together(earlier))
        held_out = [index for index in held_out if index not in left_out]
    kept = sorted(set(range(count)).difference(left_out, held_out))
    kept = sample(kept, arguments.max_train_samples, seed)
    evaluated = sample(held_out, arguments.max_eval_samples, seed)
    kept, overlap, near = images.compare(kept, evaluated, validation is not None)
    num_classes = 0 if is_stream else len(set(train.used()))
    if arguments.folds and train.is_regression:
        problems.add("--folds is for labels, and these images have numbers. Leave it out.")
    if len(kept) < num_classes and not train.is_multi_label:
        way_out = "Add images, or raise --max_train_samples." if arguments.max_train_samples else "Add images."
        problems.add(f"{len(kept)} training images are fewer than the {num_classes} classes. {way_out}")
    images.check_files([*kept, *evaluated])
    if problems.messages:
        raise problems.as_error()
    split = "the validation split of the data"
    if validation is None:
        of_each = f" of each {'label' if train.is_multi_label else 'class'}" if train.label_names else ""
        other = f", split seed {arguments.split_seed}" if arguments.split_seed else ""
        share = f"{100 * arguments.train_val_split:.3g} %"
        if arguments.folds:
            share = f"fold {arguments.fold + 1} of {arguments.folds}, {100 / arguments.folds:.3g} %"
        split = f"{share}{of_each}, chosen by a hash of each file{other}"
    record, lines = None, [*filter(None, [left_out_line(source.left_out)])]
    if copies is not None:
        labels = images.labels
        sides = [([copies.ids[i] for i in side], [labels[i] for i in side]) for side in (kept, held_out)]
        record = images_record(None if is_stream else sides[0], sides[1], earlier)
        lines += notes(record, sides[0][0], earlier)
    first = 0 if validation is None else count
    train_part = train if is_stream else parts[0].select(kept)
    held_out_part = parts[-1].select([index - first for index in evaluated])
    names, buffer_size = train.label_names, arguments.shuffle_buffer_size
    is_multi_label = train.is_multi_label and bool(names)
    return ImageData(
        source, names, train_part, held_out_part, split, buffer_size, is_multi_label, train.is_regression, record,
        lines, overlap, near,
    )  # fmt: skip


@dataclass(frozen=True)
class LabelledSplit:
    """A split as read."""

    images: datasets.Dataset
    label_names: list[str]  # the split's own; without any, all images are of class 0
    indices: list[int] | list[list[int]] | list[float]  # of each image's label, or labels, in these names; or numbers
    is_ordered: bool  # whether the data define the order of the names
    is_multi_label: bool = False
    is_regression: bool = False  # all images have one label, the column's name, and a number
    groups: list[Any] | None = None  # of each image; None for one that is in none

    def used(self) -> list[int]:
        """The labels of all images, one after the other."""
        if self.is_regression:
            return [0] * len(self.indices)
        return list(itertools.chain.from_iterable(self.indices)) if self.is_multi_label else self.indices

    def rows(self) -> list[list[int]]:
        """The labels of each image."""
        return self.indices if self.is_multi_label else [[index] for index in self.used()]

    def examples(self, new_index: dict[int, int] | None = None, num_labels: int | None = None) -> Examples:
        """With the indices of these names, or with their `new_index` among `num_labels` others."""
        if self.is_regression:
            return Examples(self.images, self.indices)
        if new_index is None:
            new_index, num_labels = {index: index for index in self.used()}, len(self.label_names)
        if self.is_multi_label:
            rows = [[new_index[index] for index in row] for row in self.indices]
            return Examples(self.images, multi_hot(rows, num_labels))
        return Examples(self.images, [new_index[index] for index in self.indices])


def read_split(
    split: str, dataset: datasets.Dataset, arguments: DataArguments, problems: Problems, needs_labels: bool
) -> LabelledSplit | None:
    """A split with its labels; None if its columns can't be read: see the problems."""
    features = {column: feature for column, feature in dataset.features.items() if column != FOLDER_COLUMN}
    columns = find_columns(arguments, features, split, problems, needs_labels)
    if columns is None:
        return None
    if len(dataset) == 0:
        problems.add(f"The {split} split has no images.")
        return None
    images, groups = _read_images(dataset, columns[0], split, problems), None
    labels = [], [0] * len(dataset), False
    is_float = getattr(features.get(columns[1]), "dtype", "").startswith("float")
    if columns[1] is not None and (arguments.problem_type or is_float):
        numbers = read_numbers(dataset, columns[1], split, problems)
        labels = numbers and ([columns[1]], numbers, True, False, True)
    elif columns[1] is not None:
        labels = read_labels(dataset, columns[1], arguments.label_separator, split, problems)
    if images is not None and (arguments.group_column_name or arguments.group_from):
        groups = read_groups(dataset, images, arguments, split, problems)
    if images is None or labels is None:
        return None
    return LabelledSplit(images, *labels, groups=groups)


def _read_images(dataset: datasets.Dataset, column: str, split: str, problems: Problems) -> datasets.Dataset | None:
    """One column, "image". Paths in a table are made relative to the working directory."""
    images, feature = dataset.select_columns([column]), dataset.features[column]
    if isinstance(feature, datasets.Value) and "string" in feature.dtype:
        folders = dataset[FOLDER_COLUMN] if FOLDER_COLUMN in dataset.column_names else [""] * len(dataset)
        paths = [path_beside(folder, path or "") for folder, path in zip(folders, dataset[column])]
        images = datasets.Dataset.from_dict({column: paths})
    try:
        images = images.cast_column(column, datasets.Image(decode=False))
    except Exception:  # pyarrow's errors have no common type
        problems.add(
            f"Column {column!r} of the {split} split holds {feature}: images must be paths, encoded files (bytes), or "
            "the Image type of `datasets`."
        )
        return None
    return images if column == "image" else images.rename_column(column, "image")


def read_numbers(dataset: datasets.Dataset, column: str, split: str, problems: Problems) -> list[float] | None:
    """The numbers of a column, for regression. None if there is another value: see the problems."""
    numbers = []
    for row, value in enumerate(dataset[column]):
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            numbers.append(math.nan)
        if not math.isfinite(numbers[-1]):
            problems.add(
                f"Column {column!r} of the {split} split has {value!r} in row {row}, and regression needs a finite "
                "number for each image. Correct or remove it."
            )
            return None
    return numbers


def read_labels(
    dataset: datasets.Dataset, column: str, separator: str | None, split: str, problems: Problems
) -> tuple[list[str], list[int] | list[list[int]], bool, bool] | None:
    """The fields of `LabelledSplit` after `images`. None if the column can't be read: see the problems."""
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
    # Text files of a WebDataset end in a newline.
    rows = [row and [one.rstrip("\r\n") if isinstance(one, str) else one for one in row] for row in rows]
    missing = sum(row is None or None in row for row in rows)
    start, problem = f"Column {column!r} of the {split} split", None
    if missing and is_multi_label:
        problem = (
            f"{missing} images of the {split} split have no labels in column {column!r}, or one that is null. Use an "
            "empty list for images with no labels; remove images whose labels are unknown."
        )
    elif missing:
        problem = f"{missing} images of the {split} split have no label in column {column!r}. Remove them first."
    elif not all(isinstance(label, str | int) for row in rows for label in row):
        problem = f"{start} holds {feature}: labels must be one name or whole number for each image, or a list of them."
    elif repeated := [row for row in rows if len(set(row)) < len(row)]:
        problem = (
            f"{start} has a label twice for one image: {str(repeated[0])[:80]}. It must list the labels that an image "
            "has, not 0 or 1 for each: [1, 4] and not [0, 1, 0, 0, 1]."
        )
    if problem is not None:
        problems.add(problem)
        return None
    if has_names:
        names = list(getattr(feature, "feature", feature).names)
    else:
        distinct = sorted({label for row in rows for label in row})
        names, index = [str(label) for label in distinct], {label: number for number, label in enumerate(distinct)}
        rows = [[index[label] for label in row] for row in rows]
    return names, rows if is_multi_label else [row[0] for row in rows], has_names, is_multi_label


# --- Splitting --------------------------------------------------------------------------------------------------------


def _usable_labels(train: LabelledSplit, needs_labels: bool, problems: Problems) -> LabelledSplit:
    """Reports labels that nothing can be learned from; if none are needed, drops what no split or probe can use."""
    counts, number = Counter(train.used()), len(train.indices)
    if not needs_labels:
        is_usable = not train.is_multi_label and len(counts) > 1 and min(counts.values()) > 1
        return train if is_usable else LabelledSplit(train.images, [], [0] * number, is_ordered=False)
    if train.is_multi_label and len(train.label_names) < 2:
        problems.add(
            f"The {number} training images have lists of labels with {len(train.label_names)} different labels; at "
            "least two are needed. For an image to have one label or not, make two classes of it."
        )
    elif len(counts) == 1 and not train.is_multi_label and not train.is_regression:
        problems.add(
            f"All {number} training images are of one class, {train.label_names[next(iter(counts))]!r}. Two classes "
            "are the least there is to learn."
        )
    return train


def _held_out_examples(train: LabelledSplit | ImageStream, validation: LabelledSplit, problems: Problems) -> Examples:
    """The validation images, with the class indices of the training split."""
    if isinstance(train, ImageStream) and not validation.is_ordered:  # whose labels may be numbers
        numbered = {str(number): name for number, name in enumerate(train.label_names)}
        names = [name if name in train.label_names else numbered.get(name, name) for name in validation.label_names]
        validation = replace(validation, label_names=names)
    if not train.label_names or not (validation.label_names or validation.is_multi_label):
        return Examples(validation.images, [0] * len(validation.indices))
    if train.is_regression != validation.is_regression:
        problems.add("One of the splits has numbers to predict, the other one labels. Align them.")
    elif validation.is_regression:
        return validation.examples()
    if train.is_multi_label != validation.is_multi_label:
        several, one = ("training", "validation") if train.is_multi_label else ("validation", "training")
        problems.add(f"The {several} split has a list of labels for each image, the {one} split one label. Align them.")
        return Examples(validation.images, [0] * len(validation.indices))
    trained = {train.label_names[index] for index in train.used()}
    counts = Counter(validation.label_names[index] for index in validation.used())
    if unknown := sorted(name for name in counts if name not in trained):
        names = listed([f"{name!r} ({counts[name]} images)" for name in unknown])
        problems.add(
            f"The validation split has classes that no training image has: {names}. Add such, or remove these."
        )
    ours = [name for name in train.label_names if name in validation.label_names]
    theirs = [name for name in validation.label_names if name in train.label_names]
    if train.is_ordered and validation.is_ordered and ours != theirs:
        problems.add(
            f"The splits have their classes in different orders: training {listed(ours)}; validation {listed(theirs)}. "
            "Save both with the same ClassLabel, or store names in place of numbers."
        )
    ours = {name: index for index, name in enumerate(train.label_names)}
    position = {index: ours.get(name, -1) for index, name in enumerate(validation.label_names)}
    return validation.examples(position, len(train.label_names))


def hold_out(
    split: LabelledSplit,
    ids: list[str],
    arguments: DataArguments,
    problems: Problems,
    earlier: Earlier | None = None,
    groups: list[Any] | None = None,
) -> list[int]:
    """What `choose_held_out` holds out. If that can't be done, no image, and the reason is among the problems."""
    fraction, rows = 1 / arguments.folds if arguments.folds else arguments.train_val_split, split.rows()
    different = {(identity, label) for identity, row in zip(ids, rows) for label in row}
    counts = Counter(label for _, label in different)
    parts = Counter(label for _, label in {(g, label) for g, row in zip(groups or ids, rows) for label in row})
    if not 0.0 < fraction < 1.0 or (
        split.label_names and len(counts) < 2 and not split.is_multi_label and not split.is_regression
    ):
        return []
    if not split.is_multi_label:
        few = [(counts[index], split.label_names[index]) for index in sorted(counts) if split.label_names]
        if single := [split.label_names[index] for index in sorted(parts) if split.label_names and parts[index] < 2]:
            problems.add(
                f"Classes with one image, or copies of one, or one group, can't be in both the training and the "
                f"held-out part: {listed(single)}. Add images, or give --validation_dir."
            )
            return []
        count, name = min(few, default=(len(set(ids)), "all"))
        if int(fraction * count + 0.5) >= count:
            problems.add(
                f"--train_val_split {fraction:g} leaves none of the {count} images of class {name!r} to train on. "
                f"Choose {1 - 1 / count:.2g} at most, or give --validation_dir."
            )
            return []
    if arguments.folds:
        chosen = choose_folds(rows, ids, arguments.folds, arguments.split_seed, groups)[arguments.fold]
    else:
        chosen = choose_held_out(rows, ids, fraction, arguments.split_seed, earlier, groups)
    if not 0 < len(chosen) < len(ids):
        use, share = "train on" if chosen else "hold out", f"--train_val_split {fraction:g} of {len(ids)} images"
        problems.add(f"{share} leaves none to {use}. Add images, or choose another.")
    return chosen


def sample(indices: Sequence[int], maximum: int | None, seed: int) -> list[int]:
    """The indices, or at random as many of them."""
    if maximum is None or not 1 <= maximum < len(indices):
        return list(indices)
    chosen = np.random.default_rng(seed).choice(len(indices), size=maximum, replace=False)
    return [indices[position] for position in sorted(chosen.tolist())]


def export_examples(data: ImageData, folder: str | None, maximum: int = 10) -> Path | None:
    """Writes held-out images, spread over the split, as INDEX_LABEL.png, and returns the first file."""
    if folder is None:
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    decoder, count = ViTScratchImageProcessor(num_channels=data.source.num_channels), len(data.validation)
    indices = np.unique(np.linspace(0, count - 1, min(maximum, count)).round().astype(int)).tolist()
    files = []
    for index in indices:
        labels = data.validation.labels[index]
        labels = np.flatnonzero(labels).tolist() if isinstance(labels, np.ndarray) else [labels]
        label = re.sub(r"[^\w.+-]+", "-", "+".join(data.label_names[one] for one in labels) or "none")[:100]
        files.append(Path(folder, f"{index}_{label}.png"))
        data.validation.decode(index, decoder).save(files[-1])
    return files[0]
