# SPDX-License-Identifier: Apache-2.0
"""Which images a model is evaluated on: never on those that it was trained on unless that is asked for."""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate.utils import broadcast_object_list

from ..common.errors import InputError, Problems
from ..data.arguments import BUILT_IN, DataArguments
from ..data.checking import find_broken, listed_below
from ..data.dataset import Examples
from ..data.sources import Source, listed, read_source
from ..data.splits import LabelledSplit, hold_out, read_split, sample
from .arguments import EvaluationArguments
from .label_map import read_label_map


@dataclass(frozen=True)
class EvaluationData:
    """
    Images with labels that are indices into the model's.

    Attributes:
        source: where they are from.
        examples: the images.
        which: in words, which images of the data these are.
        seen_in_training: whether the model was trained on some of them; None where nothing is known of that.
        broken: the files of those that can't be read, by their index.
    """

    source: Source
    examples: Examples
    which: str
    seen_in_training: bool | None = None
    broken: dict[int, str] = field(default_factory=dict)

    def credit(self, arguments: EvaluationArguments) -> str:
        """Whose images these are."""
        if arguments.examples_credit:
            return arguments.examples_credit
        return ", ".join(filter(None, (self.source.name, self.source.license, self.source.url)))

    def without_broken(self) -> "EvaluationData":
        """The images that can be read. With several processes, what the first has found."""
        found = [self.broken]
        broadcast_object_list(found)
        broken = found[0]
        readable = [index for index in range(len(self.examples)) if index not in broken]
        return replace(self, examples=self.examples.select(readable), broken=broken) if broken else self


def read_evaluation_data(
    arguments: EvaluationArguments, label_names: list[str], is_multi_label: bool, verify: bool = True
) -> EvaluationData:
    """
    Reads, chooses and checks the images.

    Args:
        arguments: the command line's.
        label_names: the model's, in the order of its logits.
        is_multi_label: whether the model gives an image any number of labels.
        verify: whether to decode every image: one process of several is enough.

    Raises:
        InputError: with everything that is wrong with the data.
    """
    problems, record, broken = Problems(), training_record(arguments.model), {}
    wishes = _data_arguments(arguments)
    try:
        source = _read(arguments, wishes, problems)
        if source is None:
            raise problems.as_error()
        if arguments.examples and not source.license and not arguments.examples_credit:
            problems.add(
                f"--examples {arguments.examples} puts images of {source.name} into a figure that cards show, and no "
                "licence of them is known. Say whose they are: --examples_credit 'photos by Jane Doe, CC BY 4.0'."
            )
        split, which, seen = _choose(arguments, wishes, source, record, problems)
        if split is None or problems.messages:
            raise problems.as_error()
        examples = _match(split, label_names, is_multi_label, arguments, problems)
        examples = sample(examples, arguments.max_eval_samples, arguments.seed)
        if verify and not problems.messages:
            reasons = find_broken({"": examples})
            broken = {index: Path(examples.name(index)).name for _, index in reasons}
            if len(broken) > arguments.max_broken_images or len(broken) == len(examples):
                problems.add(
                    f"{len(broken)} of {len(examples)} images can't be read. Repair or remove them, or leave them out "
                    f"with --max_broken_images {len(broken)}:{listed_below(list(reasons.values()))}"
                )
        if problems.messages:
            raise problems.as_error()
    except InputError as error:
        raise InputError(re.sub(r"--(train_dir|dataset_name)\b", "DATASET", str(error))) from error
    if len(examples) < len(split.indices):
        which += f"; {len(examples):,} of them, chosen with seed {arguments.seed}"
    return EvaluationData(source, examples, which, seen, broken)


def training_record(model: str) -> dict[str, Any] | None:
    """The results.json that training left in the model's folder."""
    file = Path(model, "results.json")
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}. Repair it, or remove it.") from error


def _data_arguments(arguments: EvaluationArguments) -> DataArguments:
    place = Path(arguments.dataset).expanduser()
    is_own = place.exists() or "*" in arguments.dataset or place.is_absolute()
    is_own = is_own and arguments.dataset not in BUILT_IN
    return DataArguments(
        dataset_name=None if is_own else arguments.dataset,
        train_dir=arguments.dataset if is_own else None,
        dataset_config_name=arguments.dataset_config_name,
        image_column_name=arguments.image_column_name,
        label_column_name=arguments.label_column_name,
        label_separator=arguments.label_separator,
    )


def _read(arguments: EvaluationArguments, wishes: DataArguments, problems: Problems) -> Source | None:
    is_named = arguments.split not in ("auto", "train", "validation", "all")
    if not is_named:
        return read_source(wishes, arguments.cache_dir, problems)
    if wishes.train_dir is not None or arguments.dataset in BUILT_IN:
        problems.add(
            f"--split {arguments.split}: only data sets of the Hub have other splits than auto, train, validation, all."
        )
        return None
    name = arguments.dataset
    try:
        split = datasets.load_dataset(
            name, arguments.dataset_config_name, split=arguments.split, cache_dir=arguments.cache_dir
        )
    except Exception as error:  # the library raises a dozen types here, all of them about the name or the connection
        problems.add(f"DATASET {name}, --split {arguments.split}, can't be read: {str(error).strip()}")
        return None
    return Source(name=name, train=split, hub_id=name, license=split.info.license or None)


def _choose(
    arguments: EvaluationArguments,
    wishes: DataArguments,
    source: Source,
    record: dict[str, Any] | None,
    problems: Problems,
) -> tuple[LabelledSplit | None, str, bool | None]:
    """The images, in words which they are, and whether the model was trained on some; None where that is not known."""
    wish, facts = arguments.split, (record or {}).get("dataset", {})
    is_same = facts.get("name") == source.name
    if source.validation is not None and wish in ("auto", "validation"):
        which = "the validation split of the data"
        split = read_split("validation", source.validation, wishes, problems, True)
        return split, which, False if is_same and facts.get("held_out") == which else None
    split = read_split("training", source.train, wishes, problems, True)
    if split is None:
        return None, "", None
    trained, held = facts.get("num_training_images"), facts.get("num_held_out_images")
    found = re.match(r"([\d.]+) %.* with seed (\d+)", str(facts.get("held_out")))
    is_all = is_same and trained is not None and len(split.indices) in (trained, trained + (held or 0))
    if wish not in ("auto", "train", "validation"):
        return split, "all images" if wish == "all" else f"the {wish} split of the data", is_all or None
    if source.validation is not None:  # and --split train
        return split, "the training split of the data", is_same or None
    total, fraction, seed = len(split.indices), arguments.train_val_split, arguments.seed
    if fraction is None and is_same and found and total == (trained or 0) + (held or 0):
        fraction, seed = float(found[1]) / 100, int(found[2])
    if fraction is None and wish == "auto":
        if is_same and total == trained:
            problems.add(
                f"These {total:,} images are the ones that MODEL was trained on: its results.json has their name and "
                "number. Give images that it has not seen, or --split train if you want this."
            )
        return split, "all images", None
    if fraction is None:
        problems.add(
            f"--split {wish}: MODEL has no record of a training on these {total:,} images. Give --train_val_split and "
            "--seed of its training, or --split all."
        )
        return None, "", None
    kept, held_out = hold_out(replace(split), fraction, seed, problems)
    if is_same and found and arguments.train_val_split is None and len(held_out) != held:
        problems.add(f"{len(held_out)} images would be held out, but training held out {held}. Give --train_val_split.")
    chosen, role = (kept, "trained on; held out were") if wish == "train" else (held_out, "held out from training:")
    of_each = "label" if split.is_multi_label else "class"
    which = f"{role} {100 * fraction:.3g} % of each {of_each}, chosen with seed {seed}"
    labels = chosen.labels
    indices = [np.flatnonzero(row).tolist() for row in labels] if split.is_multi_label else labels
    is_known = is_same and found is not None and len(held_out) == held
    return replace(split, images=chosen.images, indices=indices), which, wish == "train" if is_known else None


def _match(
    split: LabelledSplit,
    label_names: list[str],
    is_multi_label: bool,
    arguments: EvaluationArguments,
    problems: Problems,
) -> Examples:
    """With the indices of the model's labels."""
    if split.is_multi_label and not is_multi_label:
        problems.add(
            "The data have a list of labels for each image, and MODEL gives each image one. Evaluate it on images with "
            "one label, or fine-tune it on such lists."
        )
        return split.examples()
    if is_multi_label and not split.is_multi_label:
        split = replace(split, indices=[[index] for index in split.indices], is_multi_label=True)
    if arguments.match_labels == "index":
        if len(split.names) != len(label_names):
            problems.add(
                f"--match_labels index is for the same labels in the same order, and the data have "
                f"{len(split.names)}, the model {len(label_names)}. Give --label_map."
            )
            return split.examples()
        return split.examples(dict(enumerate(range(len(label_names)))), len(label_names))
    renamed = read_label_map(arguments.label_map, label_names, problems) if arguments.label_map else {}
    names = [renamed.get(name, name) for name in split.names]
    unknown = [names[index] for index in sorted(set(split.used())) if names[index] not in label_names]
    if unknown:
        problems.add(
            f"The model does not know {len(unknown)} labels of the data: {listed(unknown)}. It knows: "
            f"{listed(label_names)}. Say which is which with --label_map FILE, or give --match_labels index if the "
            "order is the same."
        )
        return split.examples()
    ours = {name: index for index, name in enumerate(label_names)}
    return split.examples({index: ours.get(name, -1) for index, name in enumerate(names)}, len(label_names))


def halves(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of the images at random, sorted: to fit a temperature to, and to report on."""
    if count < 4:
        raise InputError(f"--calibrate needs two halves of the images, and there are {count} images.")
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[: count // 2]), np.sort(order[count // 2 :])
