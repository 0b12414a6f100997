# SPDX-License-Identifier: Apache-2.0
"""The images that a model is evaluated on; those that it was trained on only if that is asked for."""

import csv
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from accelerate.utils import broadcast_object_list

from ..common.errors import InputError, Problems, listed
from ..common.flags import BUILT_IN, DataArguments, fill
from ..data.copies import find_broken, find_copies, identities, listed_below
from ..data.dataset import Examples
from ..data.held_out import Earlier, read_earlier
from ..data.listing import left_out_line
from ..data.sources import Source, read_source
from ..data.splits import LabelledSplit, hold_out, read_split, sample
from .arguments import EvaluationArguments


@dataclass(frozen=True)
class EvaluationData:
    """Labelled images; the labels are indices into the model's."""

    source: Source
    examples: Examples
    description: str  # which images of the data set these are
    seen_in_training: bool | None  # whether the model was trained on them; None if that is not known
    broken: dict[int, str]  # file names of images that can't be read, by index

    def without_broken(self) -> "EvaluationData":
        """The images that can be read; all processes use what the first has found."""
        (broken,) = broadcast_object_list([self.broken])
        readable = [index for index in range(len(self.examples)) if index not in broken]
        return replace(self, examples=self.examples.select(readable), broken=broken) if broken else self


def read_evaluation_data(
    arguments: EvaluationArguments, label_names: list[str], is_multi_label: bool, verify: bool = True
) -> EvaluationData:
    """The images for a model with these labels; `verify` decodes each. Raises InputError with all that is wrong."""
    try:
        return _read(arguments, label_names, is_multi_label, verify)
    except InputError as error:
        raise InputError(re.sub(r"--(train_dir|dataset_name)\b", "DATASET", str(error))) from error


def place_or_name(dataset: str) -> tuple[str | None, str | None]:
    """What somebody gives as a data set, as --train_dir or as --dataset_name: one of both, the other is None."""
    path = Path(dataset).expanduser()
    is_local = (path.exists() or "*" in dataset or path.is_absolute()) and dataset not in BUILT_IN
    return (dataset, None) if is_local else (None, dataset)


def _read(arguments: EvaluationArguments, label_names: list[str], is_multi_label: bool, verify: bool) -> EvaluationData:
    problems, options = Problems(), fill(DataArguments, vars(arguments))
    options.train_dir, options.dataset_name = place_or_name(arguments.dataset)
    source = _read_source(arguments, options, problems)
    if source is None:
        raise problems.as_error()
    if arguments.examples and not source.license and not arguments.examples_credit:
        problems.add(
            f"--examples {arguments.examples} puts images of {source.name} into a figure that cards show, and their "
            "licence is unknown. Say whose they are: --examples_credit 'photos by Jane Doe, CC BY 4.0'."
        )
    if verify and (line := left_out_line(source.left_out)):
        print(line, file=sys.stderr)
    split, description, seen = _choose_images(arguments, options, source, problems)
    if split is None or problems.messages:
        raise problems.as_error()
    if is_multi_label and not split.is_multi_label:
        split = replace(split, indices=[[index] for index in split.indices], is_multi_label=True)
    if split.is_multi_label and not is_multi_label:
        raise InputError(
            "The data have a list of labels for each image, and MODEL gives each image one. Evaluate it on images with "
            "one label, or fine-tune it on such lists."
        )
    if split.is_regression != (arguments.problem_type is not None):
        raise InputError("MODEL predicts numbers and the data have labels, or the other way round. Give other data.")
    label_indices = None if split.is_regression else _match_labels(split, label_names, arguments, problems)
    if problems.messages:
        raise problems.as_error()
    examples = split.examples(label_indices, len(label_names))
    examples = examples.select(sample(range(len(examples)), arguments.max_eval_samples, arguments.seed))
    if len(examples) < len(split.indices):
        description += f"; {len(examples):,} of them, chosen with seed {arguments.seed}"
    reasons = find_broken(examples) if verify else {}
    if reasons and (len(reasons) > arguments.max_broken_images or len(reasons) == len(examples)):
        raise InputError(
            f"{len(reasons)} of {len(examples)} images can't be read. Repair or remove them, or leave them out "
            f"with --max_broken_images {len(reasons)}:{listed_below(list(reasons.values()))}"
        )
    broken = {index: Path(examples.name(index)).name for index in reasons}
    return EvaluationData(source, examples, description, seen, broken)


def _read_source(arguments: EvaluationArguments, options: DataArguments, problems: Problems) -> Source | None:
    if arguments.split in ("auto", "train", "validation", "all"):
        return read_source(options, arguments.cache_dir, problems)
    name, split = arguments.dataset, arguments.split
    if options.train_dir is not None or name in BUILT_IN:
        problems.add(f"--split {split}: only data sets of the Hub have other splits than auto, train, validation, all.")
        return None
    try:
        images = datasets.load_dataset(name, arguments.dataset_config_name, split=split, cache_dir=arguments.cache_dir)
    except Exception as error:  # the library raises a dozen types here, all of them about the name or the connection
        problems.add(f"DATASET {name}, --split {split}, can't be read: {str(error).strip()}")
        return None
    return Source(name=name, train=images, hub_id=name, license=images.info.license or None)


def _choose_images(
    arguments: EvaluationArguments, options: DataArguments, source: Source, problems: Problems
) -> tuple[LabelledSplit | None, str, bool | None]:
    """The images, their description, and whether the model was trained on them (None: not known)."""
    choice, fraction = arguments.split, arguments.train_val_split
    earlier = read_earlier(arguments.model, revision=arguments.model_revision, cache_dir=arguments.cache_dir)
    if source.validation is not None and choice in ("auto", "validation"):
        description = "the validation split of the data"
        split = read_split("validation", source.validation, options, problems, True)
        record = (earlier and earlier.by_seed) or {}
        if split is None or (record.get("name"), record.get("held_out")) == (source.name, description):
            return split, description, False
        return split, description, None if earlier is None else earlier.has_seen(identities(split.examples()))
    split = read_split("training", source.train, options, problems, True)
    if split is None:
        return None, "", None
    whole = "all images" if choice in ("auto", "all") else f"the {choice} split of the data"
    if earlier is None and fraction is None and choice not in ("train", "validation"):
        return split, whole, None
    ids, total = identities(split.examples()), len(split.indices)
    earlier = (earlier or Earlier(arguments.model)).resolve(source.name, split.rows(), ids, split.is_multi_label)
    if choice not in ("auto", "train", "validation"):
        return split, whole, earlier.has_seen(ids)
    if source.validation is not None:  # and --split train
        return split, "the training split of the data", earlier.has_seen(ids)
    per = "label" if split.is_multi_label else "class"
    if fraction is not None:
        groups = None if options.allow_overlap else find_copies([split.examples()]).groups(split.groups or [])
        held_out = hold_out(split, ids, options, problems, earlier, groups)
        how = f"{100 * fraction:.3g} % of each {per}, chosen by a hash of each file"
    else:
        held_out, how = [index for index, one in enumerate(ids) if one in earlier.held_out], earlier.how
        if not earlier.is_data_of(ids) and choice != "auto":
            problems.add(
                f"--split {choice}: MODEL has no record of a training on these {total:,} images. Give "
                "--train_val_split and --split_seed of its training, or --split all."
            )
        elif not earlier.is_data_of(ids):
            held_out = [index for index, one in enumerate(ids) if one not in earlier.trained_on]
            if 2 * len(held_out) < total:
                problems.add(
                    f"MODEL was trained on {total - len(held_out):,} or more of these {total:,} images: its record has "
                    "them. Give images that it has not seen, or --split all if you want this."
                )
            whole += f" but {total - len(held_out)} that MODEL was trained on" if len(held_out) < total else ""
            if earlier.by_seed is not None:
                whole += "; from its record, which is of an earlier version, it can't be told which of them it has seen"
            how = None
    chosen = sorted(set(range(total)) - set(held_out)) if choice == "train" else held_out
    role = "trained on; held out were" if choice == "train" else "held out from training:"
    seen = earlier.has_seen([ids[index] for index in chosen])
    part = replace(split, images=split.images.select(chosen), indices=[split.indices[index] for index in chosen])
    return part, whole if how is None else f"{role} {how}", seen


def _match_labels(
    split: LabelledSplit, label_names: list[str], arguments: EvaluationArguments, problems: Problems
) -> dict[int, int]:
    """From the indices of the data's labels to those of the model's."""
    if arguments.match_labels == "index":
        if len(split.label_names) != len(label_names):
            problems.add(
                f"--match_labels index is for the same labels in the same order, and the data have "
                f"{len(split.label_names)}, the model {len(label_names)}. Give --label_map."
            )
        return {index: index for index in range(len(label_names))}
    renamed = _read_label_map(arguments.label_map, label_names, problems) if arguments.label_map else {}
    names = [renamed.get(name, name) for name in split.label_names]
    known = {name: index for index, name in enumerate(label_names)}
    unknown = [names[index] for index in sorted(set(split.used())) if names[index] not in known]
    if unknown:
        problems.add(
            f"The model does not know {len(unknown)} labels of the data: {listed(unknown)}. It knows: "
            f"{listed(label_names)}. Say which is which with --label_map FILE, or give --match_labels index if the "
            "order is the same."
        )
    return {index: known.get(name, -1) for index, name in enumerate(names)}


def _read_label_map(file: str, label_names: list[str], problems: Problems) -> dict[str, str]:
    """From labels of the data to the model's, e.g. n01440764 to "tench, Tinca tinca"; the file may number these."""
    path = Path(file)
    if not path.is_file():
        problems.add(f"--label_map {file} is not a file.")
        return {}
    try:
        pairs = _read_pairs(path)
    except (ValueError, OSError, csv.Error) as error:
        problems.add(f"--label_map {file} can't be read: {error}.")
        return {}
    known, renamed = set(label_names), {str(theirs).strip(): str(ours).strip() for theirs, ours in pairs}
    for theirs, name in renamed.items():
        if name not in known and name.isdecimal() and int(name) < len(label_names):
            renamed[theirs] = label_names[int(name)]
    if unknown := [name for name in renamed.values() if name not in known]:
        problems.add(
            f"--label_map {file}: {len(unknown)} labels on its right side are none of the {len(label_names)} of the "
            f"model, nor a number below that, e.g. {unknown[0]!r}."
        )
    return renamed


def _read_pairs(path: Path) -> list[tuple[Any, Any]]:
    """From the columns of a .csv, text lines split at the first tab or space, or JSON, also keras's class index."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        table = json.loads(text)
        if not isinstance(table, dict):
            raise ValueError("it must be an object, {label of the data: label of the model}")
        # Keras's index is the other way round: {"0": ["n01440764", "tench"]}.
        return [(value[0], key) if isinstance(value, list) and value else (key, value) for key, value in table.items()]
    lines = [line for line in text.splitlines() if line.strip()]
    pairs = [line.split("\t" if "\t" in line else None, maxsplit=1) for line in lines]
    pairs = list(csv.reader(lines)) if path.suffix == ".csv" else pairs
    wrong = next((number for number, pair in enumerate(pairs, start=1) if len(pair) != 2), None)
    if wrong is not None:
        raise ValueError(f"line {wrong} has no two columns")
    return pairs
