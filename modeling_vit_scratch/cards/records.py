# SPDX-License-Identifier: Apache-2.0
"""
What a card is written from, read and checked: the configuration, the record of the training (results.json), those of
evaluations (results.json in evaluation/ or below), that of a transfer table (transfer/transfer.json), codecarbon's
emissions.csv, and what a person adds. Without a record there is no number.
"""

import csv
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers.image_processing_utils import BaseImageProcessor

from ..common.errors import InputError
from ..common.records import digests, license_problem
from ..configuration_vit_scratch import ViTScratchConfig
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from .transfer import FOLDER as TRANSFER_FOLDER
from .transfer import RECORD as TRANSFER_RECORD
from .transfer import check_transfer


RECORD, CARD, EMISSIONS = "results.json", "README.md", "emissions.csv"
# Within the model's folder: where evaluations are, and figures of the model itself.
EVALUATIONS, FIGURES = "evaluation", "figures"
CURVES, SHEET_CREDIT = "figures/learning_curves.png", "figures/sheet.txt"
# What a record must have before anything is printed: keys, and keys in them.
_TRAINING: dict[str, tuple[str, ...]] = {
    "metric": (), "value": (), "n": (), "metrics": (), "selection": (), "seed": (),
    "dataset": ("name", "num_labels", "num_training_images", "num_held_out_images", "held_out"),
    "model": ("num_parameters", "started_from"),
    "training": ("epochs", "steps", "batch_size", "optimizer", "learning_rate"),
    "command": (), "versions": (), "hardware": (), "wall_time_seconds": (),
}  # fmt: skip
_EVALUATION: dict[str, tuple[str, ...]] = {
    "metric": (), "value": (), "n": (), "results": (), "confidence_level": (), "bootstrap_resamples": (), "seed": (),
    "model": ("name", "num_parameters"),
    "dataset": ("name", "images", "broken_images"),
    "temperature": (), "views": (), "per_class": (),
    "confusion_matrix": ("labels",),
    "reliability": ("mean_confidence", "mean_accuracy"),
    "command": (), "versions": (), "hardware": (),
}  # fmt: skip
# What it may have besides. It is None where a record lacks it, so that a template can ask for it.
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "git_commit": (), "resumed_from": (), "threshold": (), "examples": (),
    "pretraining": ("objective", "description"),
    "dataset": ("hub_id", "license", "url", "note", "seen_in_training"),
    "model": ("base_model",),
    "training": ("recipe", "recipe_source", "recipe_differs", "broken_images"),
    "throughput": ("images_per_second", "note"),
}  # fmt: skip


@dataclass(frozen=True)
class CardOptions:
    """
    What no record says and a person may add. It is kept in the card, so that the next one has it too.

    Attributes:
        license: of the model, the Hub's name of one. Default: that of the data, which a model does not inherit
            everywhere.
        license_name, license_link: of a license that is "other".
        base_model: the id on the Hub of what the training started from.
        hub_model_id: where it is published.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | None = None
    hub_model_id: str | None = None

    def check(self) -> None:
        """Raises InputError for a value that the Hub doesn't take."""
        problem = self.license and license_problem(self.license, self.license_name, self.license_link)
        if problem:
            raise InputError(f"--license {self.license}: {problem}")
        for key in ("base_model", "hub_model_id"):
            if (value := getattr(self, key)) is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
                raise InputError(f"--{key} {value}: give USER/NAME, as the Hub has it.")

    def given(self) -> dict[str, Any]:
        """Those that are there."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def over(self, earlier: dict[str, Any]) -> "CardOptions":
        """With those of an earlier card where this one has none."""
        known = {field.name for field in fields(self)}
        return CardOptions(**{**{key: value for key, value in earlier.items() if key in known}, **self.given()})


@dataclass(frozen=True)
class Evaluation:
    """
    A report of scripts/evaluate.py.

    Attributes:
        record: its results.json.
        folder: of it, within that of the model: "evaluation/pets".
        figures: the names of the pictures beside it.
        title: the name of the data, and of the folder if other reports are about the same data.
    """

    record: dict[str, Any]
    folder: str
    figures: frozenset[str] = frozenset()
    title: str = ""

    @property
    def is_unseen(self) -> bool:
        """Whether nothing is known of the model having been trained on some of these images."""
        return not self.record["dataset"].get("seen_in_training")

    @property
    def main(self) -> dict[str, Any]:
        """The main result."""
        return next(one for one in self.record["results"] if one["metric"] == self.record["metric"])


@dataclass(frozen=True)
class ModelRecords:
    """
    All that a card is written from.

    Attributes:
        name: the title.
        location: what to load the model from, in the example of use: a path or a Hub id.
        config: of the model.
        num_parameters: of it.
        processor: what prepares its images; None if that is not known.
        training: the record of the training; None of a model that came from elsewhere.
        evaluations: in the order of their folders.
        transfer: the record of a transfer table; None without.
        emissions: what codecarbon reports of the training: `grams` of CO2 equivalent, `kwh`, the `country` whose
            electricity it assumes, and its `version`; None without its emissions.csv.
        figures: the pictures in the folder, as paths within it.
        sheet_credit: whose photos figures/sheet.png shows, as Markdown; None if nobody said.
        options: what a person has added.
    """

    name: str
    location: str
    config: ViTScratchConfig
    num_parameters: int
    processor: BaseImageProcessor | None
    training: dict[str, Any] | None
    evaluations: list[Evaluation]
    transfer: dict[str, Any] | None
    emissions: dict[str, Any] | None
    figures: frozenset[str]
    sheet_credit: str | None
    options: CardOptions

    @property
    def is_encoder(self) -> bool:
        """Whether it has no classifier. Where it is still being trained, its configuration does not know yet."""
        if self.training is not None:
            return (self.training["pretraining"] or {}).get("objective", "supervised") != "supervised"
        architecture = (self.config.architectures or [""])[0]
        return bool(architecture) and not architecture.endswith("ForImageClassification")

    @property
    def is_multi_label(self) -> bool:
        """Whether an image has any number of labels."""
        return self.config.problem_type == "multi_label_classification"


def read_records(
    folder: Path, options: CardOptions, reports: Iterable[Path] = (), transfer: Path | None = None
) -> ModelRecords:
    """
    Everything that is in the folder of a finished model, checked as in `gather`.

    Args:
        folder: of the model.
        options: what a person adds.
        reports: folders of reports that lie elsewhere: see `copy_report`.
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
    places |= {_target(place, folder).relative_to(folder): place for place in reports}
    evaluations = [
        Evaluation(read_json(place / RECORD), where.as_posix(), _pictures(place))
        for where, place in sorted(places.items())
    ]
    if transfer is None and (folder / TRANSFER_FOLDER / TRANSFER_RECORD).is_file():
        transfer = folder / TRANSFER_FOLDER
    return gather(folder, config, processor, training, evaluations, options, transfer)


def gather(
    folder: Path,
    config: ViTScratchConfig,
    processor: BaseImageProcessor | None,
    training: dict[str, Any] | None,
    evaluations: list[Evaluation],
    options: CardOptions,
    transfer: Path | None = None,
) -> ModelRecords:
    """
    The records, if they have all that a card tells and are about this model.

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
        training = _completed(training)
    for one in evaluations:
        _check_evaluation(one, config, training, folder)
    names = [one.record["dataset"]["name"] for one in evaluations]
    titles = [
        name if names.count(name) == 1 else f"{name}, {one.folder.removeprefix(f'{EVALUATIONS}/')}"
        for name, one in zip(names, evaluations)
    ]
    evaluations = [replace(one, title=title, record=_completed(one.record)) for title, one in zip(titles, evaluations)]
    figures = {f"{FIGURES}/{name}" for name in _pictures(folder / FIGURES)}
    transfer_record = None
    if transfer is not None:
        transfer_record = read_json(transfer / TRANSFER_RECORD)
        check_transfer(transfer_record, transfer, folder)
        figures |= {f"{TRANSFER_FOLDER}/{name}" for name in _pictures(transfer)}
    credit = folder / SHEET_CREDIT
    return ModelRecords(
        name=(options.hub_model_id or folder.resolve().name).split("/")[-1],
        # A path that depends on this machine helps nobody.
        location=options.hub_model_id or (folder.as_posix() if not folder.is_absolute() else folder.name),
        config=config,
        num_parameters=(training or evaluations[0].record)["model"]["num_parameters"],
        processor=processor,
        training=training,
        evaluations=evaluations,
        transfer=transfer_record,
        emissions=_read_emissions(folder / EMISSIONS, training),
        figures=frozenset(figures),
        sheet_credit=" ".join(credit.read_text(encoding="utf-8").split()) if credit.is_file() else None,
        options=options,
    )


def _pictures(folder: Path) -> frozenset[str]:
    return frozenset(file.name for file in folder.glob("*.png"))


def _read_emissions(file: Path, training: dict[str, Any] | None) -> dict[str, Any] | None:
    """
    What codecarbon reports of the training (`--report_to codecarbon`): its file has a row for every run in this folder.
    The last one counts if it took as long as the training; otherwise it is of an earlier run.
    """
    if training is None or not file.is_file():
        return None
    try:
        with open(file, newline="", encoding="utf-8") as stream:
            last = list(csv.DictReader(stream))[-1]
        seconds, grams, kwh = float(last["duration"]), 1000 * float(last["emissions"]), float(last["energy_consumed"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{file} can't be read ({type(error).__name__}: {error}). Repair it, or remove it.") from error
    if abs(seconds - training["wall_time_seconds"]) > 5 + 0.05 * seconds:
        return None
    rounded = {"grams": float(f"{grams:.3g}"), "kwh": float(f"{kwh:.3g}")}
    return rounded | {"country": last.get("country_name") or None, "version": last.get("codecarbon_version") or None}


def copy_report(place: Path, folder: Path) -> None:
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
    """Where in the folder of the model a report is, or will be. Errors as in `copy_report`."""
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
    """A record. Raises InputError if it is none."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} can't be read: {error}. Repair it, or remove it.") from error
    if not isinstance(record, dict):
        raise InputError(f"{file} is no record. Repair it, or remove it.")
    return record


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _completed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with None for each optional value that it lacks."""
    parts = {
        key: {**dict.fromkeys(_OPTIONAL[key]), **record[key]} for key in _OPTIONAL if isinstance(record.get(key), dict)
    }
    return {**dict.fromkeys(_OPTIONAL), **record, **parts}


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
