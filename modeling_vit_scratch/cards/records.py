# SPDX-License-Identifier: Apache-2.0
"""
What a card is written from, read and checked: the configuration, the record of the training (results.json), those of
evaluations (results.json in evaluation/ or below), that of a transfer table (transfer/transfer.json), and what a person
adds. Without a record there is no number.
"""

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers.image_processing_utils import BaseImageProcessor

from ..common.errors import InputError
from ..common.weights import digests
from ..configuration_vit_scratch import ViTScratchConfig
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from .emissions import Estimate, estimate
from .transfer import FIGURE, FOLDER, Transfer, check_transfer
from .transfer import RECORD as TRANSFER


RECORD, CARD = "results.json", "README.md"
LICENSE = re.compile(r"[a-z0-9.-]+")
# Within the model's folder: where evaluations are, and the figure of the training.
EVALUATIONS, CURVES, SHEET = "evaluation", "figures/learning_curves.png", "figures/sheet.png"
# What a record must have before anything is printed: keys, and keys in them.
_TRAINING: dict[str, tuple[str, ...]] = {
    "metric": (),
    "value": (),
    "n": (),
    "metrics": (),
    "selection": (),
    "seed": (),
    "dataset": ("name", "num_labels", "num_training_images", "num_held_out_images", "held_out"),
    "model": ("num_parameters", "started_from"),
    "training": ("epochs", "steps", "batch_size", "optimizer", "learning_rate"),
    "command": (),
    "versions": (),
    "hardware": (),
    "wall_time_seconds": (),
}
_EVALUATION: dict[str, tuple[str, ...]] = {
    "metric": (),
    "value": (),
    "n": (),
    "results": (),
    "confidence_level": (),
    "bootstrap_resamples": (),
    "seed": (),
    "model": ("name", "num_parameters"),
    "dataset": ("name", "images", "broken_images"),
    "temperature": (),
    "views": (),
    "per_class": (),
    "confusion_matrix": ("labels",),
    "reliability": ("mean_confidence", "mean_accuracy"),
    "command": (),
    "versions": (),
    "hardware": (),
}


@dataclass(frozen=True)
class Wishes:
    """
    What no record says and a person may add. It is kept in the card, so that the next one has it too.

    Attributes:
        license: of the model, the Hub's name of one; without, that of the data is taken, which a model does not
            inherit everywhere.
        base_model: the id on the Hub of what the training started from.
        hub_model_id: where it is published.
        power_watts: that training drew.
        carbon_intensity: of its electricity, grams of CO2 equivalent per kWh.
    """

    license: str | None = None
    base_model: str | None = None
    hub_model_id: str | None = None
    power_watts: float | None = None
    carbon_intensity: float | None = None

    def check(self) -> None:
        """Raises InputError for what is none."""
        for key in ("power_watts", "carbon_intensity"):
            if (value := getattr(self, key)) is not None and not 0 <= value < float("inf"):
                raise InputError(f"--{key} {value:g} must be a number from 0 on.")
        if self.license is not None and not LICENSE.fullmatch(self.license):
            raise InputError(
                f"--license {self.license} is no name of the Hub's, e.g. apache-2.0, cc-by-4.0: "
                "hf.co/docs/hub/repositories-licenses"
            )
        for key in ("base_model", "hub_model_id"):
            if (value := getattr(self, key)) is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
                raise InputError(f"--{key} {value}: give USER/NAME, as the Hub has it.")

    def given(self) -> dict[str, Any]:
        """Those that are there."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def over(self, earlier: dict[str, Any]) -> "Wishes":
        """With those of an earlier card where this one has none."""
        known = {field.name for field in fields(self)}
        return Wishes(**{**{key: value for key, value in earlier.items() if key in known}, **self.given()})


@dataclass(frozen=True)
class Evaluation:
    """
    A report of scripts/evaluate.py.

    Attributes:
        record: its results.json.
        folder: of it, within that of the model: "evaluation/pets".
        figures: the names of the pictures beside it.
        title: what it is about: the data, and the name of the folder if others are about the same data.
    """

    record: dict[str, Any]
    folder: str
    figures: frozenset[str] = frozenset()
    title: str = ""

    @property
    def is_unseen(self) -> bool:
        """Whether nothing is known of the model having been trained on some of these images."""
        return not self.record["dataset"].get("seen_in_training")

    def score(self, metric: str) -> dict[str, Any] | None:
        """What the record says of a metric; None if nothing."""
        return next((one for one in self.record["results"] if one["metric"] == metric), None)

    @property
    def main(self) -> dict[str, Any]:
        """The main result."""
        return self.score(self.record["metric"])


@dataclass(frozen=True)
class Facts:
    """
    All that a card tells.

    Attributes:
        name: the title.
        location: what to load the model from, in the example of use: a path or a Hub id.
        config: of the model.
        num_parameters: of it.
        processor: what prepares its images; None if that is not known.
        training: the record of the training; None of a model that came from elsewhere.
        evaluations: in the order of their folders.
        has_curves: whether the figure of the training is in the folder.
        wishes: what a person has added.
        cost: of the training; None without a record of it.
        transfer: the record of a transfer table; None without.
        has_sheet: whether the figures of what is inside (`visualize.py sheet`) are in the folder.
        sheet_credit: whose photos these show: figures/sheet.txt.
    """

    name: str
    location: str
    config: ViTScratchConfig
    num_parameters: int
    processor: BaseImageProcessor | None
    training: dict[str, Any] | None
    evaluations: list[Evaluation]
    has_curves: bool
    wishes: Wishes
    cost: Estimate | None
    transfer: Transfer | None = None
    has_sheet: bool = False
    sheet_credit: str | None = None

    @property
    def labels(self) -> list[str]:
        """In the order of the logits; [] of a model without a classifier."""
        if self.is_encoder:
            return []
        return [str(self.config.id2label[index]) for index in range(self.config.num_labels)]

    @property
    def is_encoder(self) -> bool:
        """Whether it has no classifier. Where it is still being trained, its configuration does not know yet."""
        if self.training is not None:
            return self.training.get("pretraining", {}).get("objective", "supervised") != "supervised"
        architecture = (self.config.architectures or [""])[0]
        return bool(architecture) and not architecture.endswith("ForImageClassification")

    @property
    def is_multi_label(self) -> bool:
        """Whether an image has any number of labels."""
        return self.config.problem_type == "multi_label_classification"

    @property
    def best_evidence(self) -> Evaluation | None:
        """The evaluation to begin with: the first on images that it was not trained on."""
        return next((one for one in self.evaluations if one.is_unseen), None)


def gather(
    folder: Path,
    config: ViTScratchConfig,
    processor: BaseImageProcessor | None,
    training: dict[str, Any] | None,
    evaluations: list[Evaluation],
    wishes: Wishes,
    transfer: Transfer | None = None,
) -> Facts:
    """
    The facts, if the records have all that a card tells and are about this model.

    Raises:
        InputError: with everything that is missing: then there is no card, rather than one with gaps.
    """
    if training is None and not evaluations:
        raise InputError(
            f"No card without a record: {folder} has neither {RECORD} of a training nor an evaluation. Run "
            f"scripts/evaluate.py {folder} DATASET first."
        )
    if training is not None:
        _check_training(training)
    for one in evaluations:
        _check_evaluation(one, config, training, folder)
    names = [one.record["dataset"]["name"] for one in evaluations]
    titles = [
        name if names.count(name) == 1 else f"{name}, {one.folder.removeprefix(f'{EVALUATIONS}/')}"
        for name, one in zip(names, evaluations)
    ]
    evaluations = [replace(one, title=title) for one, title in zip(evaluations, titles)]
    cost = None if training is None else estimate(training, wishes.power_watts, wishes.carbon_intensity)
    # A path that depends on this machine helps nobody.
    location = wishes.hub_model_id or (folder.as_posix() if not folder.is_absolute() else folder.name)
    return Facts(
        name=(wishes.hub_model_id or folder.resolve().name).split("/")[-1],
        location=location,
        config=config,
        num_parameters=(training or evaluations[0].record)["model"]["num_parameters"],
        processor=processor,
        training=training,
        evaluations=evaluations,
        has_curves=(folder / CURVES).is_file(),
        has_sheet=(folder / SHEET).is_file(),
        sheet_credit=_credit(folder / SHEET),
        wishes=wishes,
        cost=cost,
        transfer=transfer,
    )


def _credit(sheet: Path) -> str | None:
    file = sheet.with_suffix(".txt")
    return " ".join(file.read_text(encoding="utf-8").split()) if file.is_file() else None


def read_facts(folder: Path, wishes: Wishes, others: Iterable[Path] = (), transfer: Path | None = None) -> Facts:
    """
    As `gather`, with everything that is in the folder of a finished model.

    Args:
        folder: of the model.
        wishes: what a person adds.
        others: folders of reports that lie elsewhere: see `take`.
        transfer: the folder of a transfer table that lies elsewhere.

    Raises:
        InputError: also if the folder has no configuration, or if a file can't be read.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json: it is no finished model. Train or convert one into it.")
    try:
        config = ViTScratchConfig.from_pretrained(folder)
        has_processor = (folder / "preprocessor_config.json").is_file()
        processor = ViTScratchImageProcessor.from_pretrained(folder) if has_processor else None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder} can't be read: {str(error).strip()}") from error
    file = folder / RECORD
    training = read_json(file) if file.is_file() else None
    if training is not None and "results" in training:
        raise InputError(f"{file} is of an evaluation, not of a training. Move it into {folder / EVALUATIONS}/NAME/.")
    places = {file.parent.relative_to(folder): file.parent for file in (folder / EVALUATIONS).rglob(RECORD)}
    places |= {_target(place, folder).relative_to(folder): place for place in others}
    evaluations = [_read_evaluation(place, where.as_posix()) for where, place in sorted(places.items())]
    return gather(folder, config, processor, training, evaluations, wishes, _read_transfer(transfer, folder))


def _read_transfer(place: Path | None, folder: Path) -> Transfer | None:
    """The one there, or that of the model's folder, if it has one."""
    if place is None and not (folder / FOLDER / TRANSFER).is_file():
        return None
    place = place or folder / FOLDER
    record = read_json(place / TRANSFER)
    check_transfer(record, place, folder)
    return Transfer(record, (place / FIGURE).is_file())


def _read_evaluation(place: Path, where: str) -> Evaluation:
    figures = frozenset(file.name for file in place.glob("*.png"))
    return Evaluation(read_json(place / RECORD), where, figures)


def take(place: Path, folder: Path) -> None:
    """
    Copies a report, its record and figures, into the folder of the model, as evaluation/ and its name. Does nothing if
    it is there.

    Raises:
        InputError: if it is no report, or if there is another one of that name.
    """
    target = _target(place, folder)
    if target.resolve() != place.resolve():
        target.mkdir(parents=True, exist_ok=True)
        for file in (place / RECORD, *place.glob("*.png")):
            shutil.copyfile(file, target / file.name)


def _target(place: Path, folder: Path) -> Path:
    """Where in the folder of the model a report is, or will be. Errors as in `take`."""
    if not (place / RECORD).is_file():
        raise InputError(f"{place} has no {RECORD}: give the --output_dir of scripts/evaluate.py.")
    inside = (folder / EVALUATIONS).resolve()
    if place.resolve().is_relative_to(inside):
        return folder / EVALUATIONS / place.resolve().relative_to(inside)
    target = folder / EVALUATIONS / place.resolve().name
    if (target / RECORD).is_file() and (target / RECORD).read_bytes() != (place / RECORD).read_bytes():
        raise InputError(f"{target} has another report in it. Remove it, or give {place} another name.")
    return target


def read_json(file: Path) -> dict[str, Any]:
    """Raises InputError if it is none."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} can't be read: {error}. Repair it, or remove it.") from error
    if not isinstance(record, dict):
        raise InputError(f"{file} is no record. Repair it, or remove it.")
    return record


def _missing(record: dict[str, Any], required: dict[str, tuple[str, ...]]) -> list[str]:
    missing = [key for key in required if record.get(key) is None]
    parts = [(key, part) for key in required if key not in missing for part in required[key]]
    return missing + [f"{key}.{part}" for key, part in parts if part not in record[key]]


def _check_training(record: dict[str, Any]) -> None:
    missing = _missing(record, _TRAINING)
    if not {"metric", "metrics"} & set(missing) and record["metric"] not in record["metrics"]:
        missing.append(f"metrics.{record['metric']}")
    if missing:
        raise InputError(f"No card without a record: {RECORD} lacks {', '.join(missing)}. Train or evaluate again.")


def _check_evaluation(
    evaluation: Evaluation, config: ViTScratchConfig, training: dict[str, Any] | None, folder: Path
) -> None:
    record, file = evaluation.record, f"{evaluation.folder}/{RECORD}"
    missing = _missing(record, _EVALUATION)
    if "results" not in missing:
        results = record["results"]
        missing += [
            f"results.{one.get('metric', number)}.{part}"
            for number, one in enumerate(results)
            for part in ("metric", "value", "n")
            if one.get(part) is None
        ]
        if "metric" not in missing and all(one.get("metric") != record["metric"] for one in results):
            missing.append(f"results.{record['metric']}")
    if missing:
        raise InputError(f"No card without a record: {file} lacks {', '.join(missing)}. Evaluate again.")
    again = f"Remove {folder / evaluation.folder}, or evaluate again."
    labels = [str(config.id2label[index]) for index in range(config.num_labels)]
    if record["confusion_matrix"]["labels"] != labels:
        raise InputError(f"{file} is of another model: one with other labels. {again}")
    if training is not None and record["model"]["num_parameters"] != training["model"]["num_parameters"]:
        raise InputError(
            f"{file} is of another model: one with {record['model']['num_parameters']:,} parameters, and this one has "
            f"{training['model']['num_parameters']:,}. {again}"
        )
    if is_of_others(record, folder):
        raise InputError(f"{file} is of other weights than those in {folder}: their SHA-256 differ. {again}")


def is_of_others(record: dict[str, Any], folder: Path) -> bool:
    """Whether a report is of other weights than those in the folder; False where one of them is not known."""
    evaluated, ours = record.get("model", {}).get("weights"), digests(folder)
    return bool(evaluated and ours and evaluated != ours)


def stale_reports(folder: Path) -> list[str]:
    """What is wrong with the reports in a folder that is to be published, a line each."""
    return [
        f"{file.relative_to(folder).as_posix()} is of other weights than those in {folder}. Remove it, or evaluate "
        "again, and write the card anew."
        for file in sorted((folder / EVALUATIONS).rglob(RECORD))
        if is_of_others(read_json(file), folder)
    ]
