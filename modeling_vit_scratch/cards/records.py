# SPDX-License-Identifier: Apache-2.0
"""The records that a card is written from, read and checked. Without a record there is no number."""

import csv
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.image_processing_utils import BaseImageProcessor

from ..common.errors import InputError
from ..common.records import digests, license_note, license_problem
from ..configuration_vit_scratch import ViTScratchConfig
from ..image_processing_vit_scratch import ViTScratchImageProcessor


RECORD, TRANSFER_RECORD, CARD, EMISSIONS = "results.json", "transfer.json", "README.md", "emissions.csv"
# Folders within the model's: evaluations, a transfer table, figures of the model itself.
EVALUATIONS, TRANSFER, FIGURES = "evaluation", "transfer", "figures"
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
    "git_commit": (), "resumed_from": (), "threshold": (), "examples": (), "uncertainty": (),
    "pretraining": ("objective", "description"),
    "dataset": ("hub_id", "license", "url", "note", "seen_in_training", "overlap"),
    "model": ("base_model", "license"),
    "training": ("recipe", "recipe_source", "recipe_differs", "broken_images"),
    "throughput": ("images_per_second", "note"),
}  # fmt: skip


@dataclass(frozen=True)
class CardOptions:
    """What a person may add to the records, as for scripts/card.py. The card keeps it for the next one."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | None = None
    hub_model_id: str | None = None

    def check(self) -> None:
        if self.license and (problem := license_problem(self.license, self.license_name, self.license_link)):
            raise InputError(f"--license {self.license}: {problem}")
        for key in ("base_model", "hub_model_id"):
            if (value := getattr(self, key)) is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
                raise InputError(f"--{key} {value}: give USER/NAME, as the Hub has it.")

    def given(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    def over(self, earlier: dict[str, Any]) -> "CardOptions":
        """These options; where they are None, those of an earlier card."""
        known = {field.name for field in fields(self)}
        return CardOptions(**{**{key: value for key, value in earlier.items() if key in known}, **self.given()})


@dataclass(frozen=True)
class ModelRecords:
    """All that a card is written from. What has no record is None."""

    folder: Path
    config: ViTScratchConfig
    processor: BaseImageProcessor | None
    training: dict[str, Any] | None
    # Each report with `folder` (relative to the model's), `title`, and `figures` (names of the pictures in its folder).
    evaluations: list[dict[str, Any]]
    options: CardOptions
    transfer: dict[str, Any] | None = None
    emissions: dict[str, Any] | None = None  # `grams` of CO2 equivalent, `kwh`, `country` and codecarbon's `version`
    figures: frozenset[str] = frozenset()  # of the model and of the transfer table, as paths within the folder
    sheet_credit: str | None = None  # whose photos figures/sheet.png shows, as Markdown


def read_records(
    folder: Path, options: CardOptions, reports: Iterable[Path] = (), transfer: Path | None = None
) -> ModelRecords:
    """Reads the folder of a finished model, and folders of reports and of a transfer table that lie elsewhere."""
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
    paths = {file.parent.relative_to(folder): file.parent for file in (folder / EVALUATIONS).rglob(RECORD)}
    paths |= {report_folder(path, folder).relative_to(folder): path for path in reports}
    evaluations = [
        {**read_json(path / RECORD), "folder": name.as_posix(), "figures": _pictures(path)}
        for name, path in sorted(paths.items())
    ]
    if transfer is None and (folder / TRANSFER / TRANSFER_RECORD).is_file():
        transfer = folder / TRANSFER
    return gather(ModelRecords(folder, config, processor, training, evaluations, options), transfer)


def gather(records: ModelRecords, transfer: Path | None = None) -> ModelRecords:
    """Checks that records are whole and about this model, and adds what else the folder has."""
    folder, training, evaluations = records.folder, records.training, records.evaluations
    if training is None and not evaluations:
        raise InputError(
            f"No card without a record: {folder} has neither {RECORD} of a training nor an evaluation. Run "
            f"scripts/evaluate.py {folder} DATASET first."
        )
    if training is not None:
        missing = _missing(training, _TRAINING)
        if not {"metric", "metrics"} & set(missing) and training["metric"] not in training["metrics"]:
            missing.append(f"metrics.{training['metric']}")
        if missing:
            raise InputError(f"No card without a record: {RECORD} lacks {', '.join(missing)}. Train or evaluate again.")
        training = _completed(training)
    for one in evaluations:
        _check_evaluation(one, records.config, training, folder)
    names = [one["dataset"]["name"] for one in evaluations]
    titles = [
        name if names.count(name) == 1 else f"{name}, {one['folder'].removeprefix(f'{EVALUATIONS}/')}"
        for name, one in zip(names, evaluations)
    ]
    figures = {f"{FIGURES}/{name}" for name in _pictures(folder / FIGURES)}
    transfer_record = None
    if transfer is not None:
        file = transfer / TRANSFER_RECORD
        transfer_record = read_json(file)
        if not transfer_record.get("cells") or "weights" not in transfer_record:
            raise InputError(f"{file} has no cells of a transfer table: make it with scripts/transfer.py.")
        if _is_of_other_weights(transfer_record["weights"], folder):
            raise InputError(
                f"{file} is of other weights than those in {folder}: their SHA-256 differ. Remove it, or run "
                f"scripts/transfer.py --model_name_or_path {folder}."
            )
        figures |= {f"{TRANSFER}/{name}" for name in _pictures(transfer)}
    credit = folder / SHEET_CREDIT
    return replace(
        records,
        training=training,
        evaluations=[{**_completed(one), "title": title} for title, one in zip(titles, evaluations)],
        transfer=transfer_record,
        emissions=_read_emissions(folder / EMISSIONS, training),
        figures=frozenset(figures),
        sheet_credit=" ".join(credit.read_text(encoding="utf-8").split()) if credit.is_file() else None,
    )


def _pictures(folder: Path) -> list[str]:
    return [file.name for file in folder.glob("*.png")]


def _read_emissions(file: Path, training: dict[str, Any] | None) -> dict[str, Any] | None:
    """The last row of codecarbon's file, unless it took another time than the training: then it is of another run."""
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


def report_folder(report: Path, folder: Path) -> Path:
    if not (report / RECORD).is_file():
        raise InputError(f"{report} has no {RECORD}: give the --output_dir of scripts/evaluate.py.")
    inside = (folder / EVALUATIONS).resolve()
    if report.resolve().is_relative_to(inside):
        return folder / EVALUATIONS / report.resolve().relative_to(inside)
    target = folder / EVALUATIONS / report.resolve().name
    if (target / RECORD).is_file() and (target / RECORD).read_bytes() != (report / RECORD).read_bytes():
        raise InputError(f"{target} has another report in it. Remove it, or give {report} another name.")
    return target


def copy_records(folder: Path, reports: Sequence[Path], transfer: Path | None) -> None:
    copies = [(report, RECORD, report_folder(report, folder)) for report in reports]
    copies += [] if transfer is None else [(transfer, TRANSFER_RECORD, folder / TRANSFER)]
    for source, record, target in copies:
        if target.resolve() != source.resolve():
            target.mkdir(parents=True, exist_ok=True)
            for file in (source / record, *source.glob("*.png")):
                shutil.copyfile(file, target / file.name)


def read_json(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} can't be read: {error}. Repair it, or remove it.") from error
    if not isinstance(record, dict):
        raise InputError(f"{file} is no record. Repair it, or remove it.")
    return record


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


def _check_evaluation(
    record: dict[str, Any], config: ViTScratchConfig, training: dict[str, Any] | None, folder: Path
) -> None:
    file, missing = f"{record['folder']}/{RECORD}", _missing(record, _EVALUATION)
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
    again = f"Remove {folder / record['folder']}, or evaluate again."
    if record["confusion_matrix"]["labels"] != [str(config.id2label[index]) for index in range(config.num_labels)]:
        raise InputError(f"{file} is of another model: one with other labels. {again}")
    if training is not None and record["model"]["num_parameters"] != training["model"]["num_parameters"]:
        raise InputError(
            f"{file} is of another model: one with {record['model']['num_parameters']:,} parameters, and this one has "
            f"{training['model']['num_parameters']:,}. {again}"
        )
    if _is_of_other_weights(record["model"].get("weights"), folder):
        raise InputError(f"{file} is of other weights than those in {folder}: their SHA-256 differ. {again}")


def _is_of_other_weights(theirs: dict[str, str] | None, folder: Path) -> bool:
    """Whether the digests differ from those of the folder; False if either is not known."""
    return bool(theirs) and digests(folder) not in ({}, theirs)


def stale_reports(folder: Path) -> list[str]:
    """A message for each report, in a folder to publish, that is of other weights."""
    return [
        f"{file.relative_to(folder).as_posix()} is of other weights than those in {folder}. Remove it, or evaluate "
        "again, and write the card anew."
        for file in sorted((folder / EVALUATIONS).rglob(RECORD))
        if _is_of_other_weights(read_json(file).get("model", {}).get("weights"), folder)
    ]


def license_notes(folder: Path, card: str | None) -> list[str]:
    """What to say of a card whose licence gives more than that of the weights that training started from."""
    try:
        base = json.loads((folder / "results.json").read_text("utf-8"))["model"]["license"]
        note = license_note(ModelCard(card).data.license, base)
    except (OSError, ValueError, KeyError, TypeError):  # no card, or no record of ours
        return []
    return [note] if note else []
