# SPDX-License-Identifier: Apache-2.0
"""
From a source to examples to learn from: columns, labels, held-out split and a check of every file.

Everything that can be wrong with data is looked for before training starts, and told in one message.
"""

import itertools
import math
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
from sklearn.model_selection import train_test_split
from tqdm.auto import tqdm

from ..common.errors import InputError, Problems
from ..image_decoding_vit_scratch import ImageDecodeError
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from .arguments import DataArguments
from .columns import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    find_column,
    is_class_label,
    is_label_list,
    multi_hot,
    read_label_lists,
    stratify,
)
from .dataset import Examples
from .sources import FOLDER_COLUMN, Source, listed, read_place, read_source
from .stream_sources import read_stream
from .streams import ImageStream


def check_files(splits: dict[str, Examples], problems: Problems) -> None:
    """Adds the images that can't be read to the problems."""
    reasons = list(find_broken(splits).values())
    if reasons:
        problems.add(
            f"{len(reasons)} of {sum(map(len, splits.values()))} images can't be read. Repair or remove them, or let "
            "others take the place of up to N in training with --verify_images False --max_broken_images N:"
            + listed_below(reasons)
        )


def listed_below(reasons: list[str]) -> str:
    """The first of them, each on a line, and how many more there are."""
    rest = f"\n       and {len(reasons) - 10} more" if len(reasons) > 10 else ""
    return "".join(f"\n       {reason}" for reason in reasons[:10]) + rest


def find_broken(splits: dict[str, Examples]) -> dict[tuple[str, int], str]:
    """
    Decodes every image, in threads: decoding does not hold Python's lock. Returns why some can't be read, by split and
    index.
    """
    decoder = ViTScratchImageProcessor()
    places = [(split, index) for split, examples in splits.items() for index in range(len(examples))]

    def broken(place: tuple[str, int]) -> str | None:
        split, index = place
        try:
            splits[split].decode(index, decoder)
        except (ImageDecodeError, ValueError) as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = list(tqdm(pool.map(broken, places), total=len(places), desc="checking images", unit="", leave=False))
    return {place: reason for place, reason in zip(places, reasons) if reason is not None}


@dataclass(frozen=True)
class ImageData:
    """
    What training needs to know of the data. `label_names` are in the order of the class indices, [] without any;
    `shuffle_buffer_size` is for a stream; `is_multi_label` where an image has any number of labels, and not one.
    """

    source: Source
    label_names: list[str]
    train: Examples | ImageStream
    validation: Examples
    split: str
    shuffle_buffer_size: int = 1
    is_multi_label: bool = False

    @property
    def num_train(self) -> int | None:
        """How many training images there are; None where a stream does not say."""
        return self.train.count if isinstance(self.train, ImageStream) else len(self.train)

    def describe(self) -> str:
        """One line for people."""
        kind = "labels, any number of them for an image" if self.is_multi_label else "labels"
        labels = f"{len(self.label_names)} {kind}: {listed(self.label_names)}" if self.label_names else "no labels"
        number = "streamed" if self.num_train is None else f"{self.num_train:,}"
        return (
            f"{self.source.name}: {number} training and {len(self.validation):,} held-out images "
            f"({self.split}); {labels}."
        )


def check_for_probes(data: ImageData) -> None:
    """Raises InputError unless each image has one label, which is what probes judge features by."""
    if len(data.label_names) < 2 or data.is_multi_label:
        has = "any number of them" if data.is_multi_label else "none"
        raise InputError(f"Probes judge features by one label for each image, and these images have {has}.")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_data(
    arguments: DataArguments,
    seed: int,
    problems: Problems,
    cache_dir: str | None = None,
    verify: bool = True,
    needs_labels: bool = True,
) -> ImageData:
    """
    Reads, splits and checks the data.

    Args:
        arguments: the command line's.
        seed: of the held-out split and of `--max_train_samples`.
        problems: the mistakes found so far.
        cache_dir: where to keep what is downloaded.
        verify: whether to decode every image: one process of several is enough.
        needs_labels: if not, images without labels will do; all are then of class 0, which has no name.

    Raises:
        InputError: with `problems` and everything that is wrong with the data.
    """
    if arguments.streaming:
        return _read_streamed(arguments, seed, problems, cache_dir, verify, needs_labels)
    source = read_source(arguments, cache_dir, problems, needs_labels)
    if source is None:
        raise problems.as_error()
    train = read_split("training", source.train, arguments, problems, needs_labels)
    validation = None
    if source.validation is not None:
        has_names = train is None or bool(train.names)
        validation = read_split("validation", source.validation, arguments, problems, needs_labels and has_names)
    if train is None or (source.validation is not None and validation is None):
        raise problems.as_error()

    if train.is_multi_label and not needs_labels:  # nothing there can judge by several labels
        train = LabelledSplit(train.images, [], [0] * len(train.images), False)
    counts = Counter(train.used())
    if needs_labels:
        _check_classes(train, problems)
    elif len(counts) < 2 or min(counts.values()) < 2:  # labels that nothing can be split or judged by
        train = LabelledSplit(train.images, [], [0] * len(train.images), False)
    names = train.names
    if validation is not None:
        split = "the validation split of the data"
        validation_examples = _held_out_examples(train, validation, problems)
        train_examples = train.examples()
    else:
        of_each = f" of each {'label' if train.is_multi_label else 'class'}" if names else ""
        split = f"{100 * arguments.train_val_split:.3g} %{of_each}, chosen with seed {seed}"
        train_examples, validation_examples = hold_out(train, arguments.train_val_split, seed, problems)
    train_examples = sample(train_examples, arguments.max_train_samples, seed)
    validation_examples = sample(validation_examples, arguments.max_eval_samples, seed)
    if len(train_examples) < len(counts) and not train.is_multi_label:
        problems.add(
            f"{len(train_examples)} training images are fewer than the {len(counts)} classes. Add images"
            + (", or raise --max_train_samples." if arguments.max_train_samples else ".")
        )
    if arguments.verify_images and verify:
        check_files({"training": train_examples, "validation": validation_examples}, problems)
    if problems.messages:
        raise problems.as_error()
    return ImageData(source, names, train_examples, validation_examples, split, is_multi_label=train.is_multi_label)


def _read_streamed(
    arguments: DataArguments, seed: int, problems: Problems, cache_dir: str | None, verify: bool, needs_labels: bool
) -> ImageData:
    """A stream to train on, and held-out images that are read as always."""
    source, validation = read_stream(arguments, cache_dir, problems, needs_labels), None
    held_out = source and source.validation
    if arguments.validation_dir is not None:
        held_out = read_place("--validation_dir", arguments.validation_dir, cache_dir, problems, needs_labels)
    elif source is not None and held_out is None:
        problems.add(
            "A stream has no part that can be held out at random before it is read. Give --validation_dir, in any form."
        )
    if held_out is not None:
        has_names = source is None or bool(source.train.label_names)
        validation = read_split("validation", held_out, arguments, problems, needs_labels and has_names)
    if source is None or validation is None:
        raise problems.as_error()
    names = source.train.label_names
    if not names:
        validation = LabelledSplit(validation.images, [], [0] * len(validation.images), False)
    elif not validation.is_ordered:  # numbers as labels
        numbered = {str(number): name for number, name in enumerate(names)}
        told = [name if name in names else numbered.get(name, name) for name in validation.names]
        validation = replace(validation, names=told)
    is_multi_label = bool(names) and source.train.is_multi_label
    indices = [[index] if is_multi_label else index for index in range(len(names))]
    train = LabelledSplit(validation.images, names, indices, is_ordered=True, is_multi_label=is_multi_label)
    examples = _held_out_examples(train, validation, problems) if names else validation.examples()
    examples = sample(examples, arguments.max_eval_samples, seed)
    if arguments.verify_images and verify:
        check_files({"validation": examples}, problems)
    if problems.messages:
        raise problems.as_error()
    split = "the validation split of the data"
    return ImageData(source, names, source.train, examples, split, arguments.shuffle_buffer_size, is_multi_label)


@dataclass(frozen=True)
class LabelledSplit:
    """
    A split as read: class indices into its own names, or a list of them for each image. `is_ordered`: the data says in
    which order the names are.
    """

    images: datasets.Dataset
    names: list[str]
    indices: list[int] | list[list[int]]
    is_ordered: bool
    is_multi_label: bool = False

    def used(self) -> list[int]:
        """The labels of all images, one after the other."""
        return list(itertools.chain.from_iterable(self.indices)) if self.is_multi_label else self.indices

    def examples(self, position: dict[int, int] | None = None, num_labels: int | None = None) -> Examples:
        """With the indices of these names, or those that `position` gives them among `num_labels` others."""
        indices = self.indices
        if position is not None and self.is_multi_label:
            indices = [[position[index] for index in row] for row in indices]
        elif position is not None:
            indices = [position[index] for index in indices]
        if self.is_multi_label:
            indices = multi_hot(indices, len(self.names) if num_labels is None else num_labels)
        return Examples(self.images, indices)


def read_split(
    split: str, dataset: datasets.Dataset, arguments: DataArguments, problems: Problems, needs_labels: bool
) -> LabelledSplit | None:
    columns = [column for column in dataset.column_names if column != FOLDER_COLUMN]
    is_image = [column for column in columns if isinstance(dataset.features[column], datasets.Image)]
    is_label = [column for column in columns if is_class_label(dataset.features[column])]
    image_column = find_column("image", arguments.image_column_name, is_image, IMAGE_COLUMNS, columns, split, problems)
    # Where labels are of no use, a column that can't be told is none, not a mistake.
    noted = problems if needs_labels or arguments.label_column_name else Problems()
    label_column = find_column("label", arguments.label_column_name, is_label, LABEL_COLUMNS, columns, split, noted)
    if image_column is None or (label_column is None and noted is problems):
        return None
    if len(dataset) == 0:
        problems.add(f"The {split} split has no images.")
        return None
    images = _image_column(dataset, image_column, split, problems)
    if label_column is None:
        return None if images is None else LabelledSplit(images, [], [0] * len(images), False)
    separator = arguments.label_separator
    is_multi_label = separator is not None or is_label_list(dataset.features[label_column])
    if is_multi_label:
        labels = read_label_lists(dataset, label_column, separator, split, problems)
    else:
        labels = _label_column(dataset, label_column, split, problems)
    return None if images is None or labels is None else LabelledSplit(images, *labels, is_multi_label)


def _image_column(dataset: datasets.Dataset, column: str, split: str, problems: Problems) -> datasets.Dataset | None:
    """One column "image" of undecoded images. Paths in a table become relative to where we are, not to the table."""
    images = dataset.select_columns([column])
    is_path = isinstance(dataset.features[column], datasets.Value) and "string" in dataset.features[column].dtype
    if is_path:
        folders = dataset[FOLDER_COLUMN] if FOLDER_COLUMN in dataset.column_names else [""] * len(dataset)
        paths = [str(Path(folder, path or "")) for folder, path in zip(folders, dataset[column])]
        images = datasets.Dataset.from_dict({column: paths})
    try:
        images = images.cast_column(column, datasets.Image(decode=False))
    except Exception:  # pyarrow's errors have no common type
        problems.add(
            f"Column {column!r} of the {split} split holds {dataset.features[column]}: images must be paths, encoded "
            "files (bytes), or the Image type of `datasets`."
        )
        return None
    return images if column == "image" else images.rename_column(column, "image")


def _label_column(
    dataset: datasets.Dataset, column: str, split: str, problems: Problems
) -> tuple[list[str], list[int], bool] | None:
    """Names, index of each image, and whether the data itself gives the order of the names."""
    feature, values = dataset.features[column], list(dataset[column])
    is_class_label = isinstance(feature, datasets.ClassLabel)
    missing = sum(value is None or (is_class_label and value < 0) for value in values)
    if missing:
        problems.add(f"{missing} images of the {split} split have no label in column {column!r}. Remove them first.")
        return None
    if is_class_label:
        return list(feature.names), values, True
    if not all(isinstance(value, str | int) for value in values):
        problems.add(
            f"Column {column!r} of the {split} split holds {feature}: labels must be one name or whole number for each "
            "image, or a list of them."
        )
        return None
    distinct = sorted(set(values))
    index = {value: position for position, value in enumerate(distinct)}
    return [str(value) for value in distinct], [index[value] for value in values], False


# ---------------------------------------------------------------------------------------------------------------------
# Checking and splitting


def _check_classes(train: LabelledSplit, problems: Problems) -> None:
    used = sorted(set(train.used()))
    if train.is_multi_label:
        if len(train.names) < 2:
            problems.add(
                f"The {len(train.indices)} training images have lists of labels with {len(train.names)} different "
                "labels; at least two are needed. For an image to have one label or not, make two classes of it."
            )
    elif len(used) == 1:
        problems.add(
            f"All {len(train.indices)} training images are of one class, {train.names[used[0]]!r}. Two classes are the "
            "least there is to learn."
        )


def _held_out_examples(train: LabelledSplit, validation: LabelledSplit, problems: Problems) -> Examples:
    """The validation images, with class indices in the order of the training split's names."""
    if not train.names or not (validation.names or validation.is_multi_label):
        return Examples(validation.images, [0] * len(validation.indices))
    if train.is_multi_label != validation.is_multi_label:
        several, one = ("training", "validation") if train.is_multi_label else ("validation", "training")
        problems.add(f"The {several} split has a list of labels for each image, the {one} split one label. Align them.")
        return Examples(validation.images, [0] * len(validation.indices))
    trained = {train.names[index] for index in train.used()}
    counts = Counter(validation.names[index] for index in validation.used())
    unknown = sorted(name for name in counts if name not in trained)
    if unknown:
        named = listed([f"{name!r} ({counts[name]} images)" for name in unknown])
        problems.add(
            f"The validation split has classes that no training image has: {named}. Add such, or remove these."
        )
    ours = [name for name in train.names if name in validation.names]
    theirs = [name for name in validation.names if name in train.names]
    if train.is_ordered and validation.is_ordered and ours != theirs:
        problems.add(
            f"The splits have their classes in different orders: training {listed(ours)}; validation {listed(theirs)}. "
            "Save both with the same ClassLabel, or store names in place of numbers."
        )
    ours = {name: index for index, name in enumerate(train.names)}
    position = {index: ours.get(name, -1) for index, name in enumerate(validation.names)}
    return validation.examples(position, len(train.names))


def hold_out(train: LabelledSplit, fraction: float, seed: int, problems: Problems) -> tuple[Examples, Examples]:
    """
    The same share of every class, at random; of labels of which images have several, as nearly as can be. Where that
    can't be done, nothing: the problems will raise.
    """
    examples, counts = train.examples(), Counter(train.used())
    if not 0.0 < fraction < 1.0 or (train.names and len(counts) < 2 and not train.is_multi_label):
        return examples, examples.select([])
    if train.is_multi_label:
        kept, held = stratify(examples.labels, fraction, seed)
        if not kept or not held:
            problems.add(
                f"--train_val_split {fraction:g} of {len(examples)} images leaves none to "
                f"{'hold out' if kept else 'train on'}. Add images, or choose another."
            )
        return examples.select(kept), examples.select(held)
    single = [train.names[index] for index, count in sorted(counts.items()) if count < 2 and train.names]
    if single:
        problems.add(
            f"Classes with one image can't be in both the training and the held-out part: {listed(single)}. Add "
            "images, or give --validation_dir."
        )
        return examples, examples.select([])
    held_out = max(math.ceil(fraction * len(examples)), len(counts))
    if held_out > len(examples) - len(counts):
        problems.add(
            f"--train_val_split {fraction:g} leaves {len(examples) - held_out} of {len(examples)} images to train on, "
            f"but there are {len(counts)} classes. Choose {1 - len(counts) / len(examples):.2g} at most, or give "
            "--validation_dir."
        )
        return examples, examples.select([])
    kept, held = train_test_split(
        np.arange(len(examples)), test_size=held_out, stratify=train.indices, random_state=seed
    )
    return examples.select(sorted(kept.tolist())), examples.select(sorted(held.tolist()))


def sample(examples: Examples, maximum: int | None, seed: int) -> Examples:
    if maximum is None or not 1 <= maximum < len(examples):
        return examples
    chosen = np.random.default_rng(seed).choice(len(examples), size=maximum, replace=False)
    return examples.select(sorted(chosen.tolist()))


def export_examples(data: ImageData, folder: str | None, maximum: int = 10) -> Path | None:
    """
    Writes held-out images, spread over the whole split, as INDEX_LABEL.png.

    Returns:
        The first file; None if no folder is wanted.
    """
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
