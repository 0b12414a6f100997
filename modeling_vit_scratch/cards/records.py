# SPDX-License-Identifier: Apache-2.0
"""
results.json, the record of a run: its results, and what it takes to get them again; and the records that a card is
written from, read and checked. Without a record there is no number.
"""

import csv
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..common.errors import InputError
from ..common.files import write_text
from ..common.records import METRIC_TITLES, digests, format_score, license_problem, provenance
from ..configuration_vit_scratch import ViTScratchConfig
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from ..recipes.table import find_recipe
from ..training.arguments import LAMB, ModelArguments


if TYPE_CHECKING:  # reading a record needs none of them
    from ..data.splits import ImageData
    from ..training.trainer import ImageTrainer, ImageTrainingArguments


RECORD, TRANSFER_RECORD, CARD, EMISSIONS = "results.json", "transfer.json", "README.md", "emissions.csv"
# Folders within the model's: evaluations, a transfer table, figures of the model itself.
EVALUATIONS, TRANSFER, FIGURES = "evaluation", "transfer", "figures"
CURVES, SHEET_CREDIT = "figures/learning_curves.png", "figures/sheet.txt"


# --- The record of a run ----------------------------------------------------------------------------------------------


def build_record(
    trainer: "ImageTrainer", data: "ImageData", model_arguments: ModelArguments, scores: dict[str, float],
    wall_time: float, pretraining: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """
    The record of a run, without secrets and paths of this machine. `scores` are those of `Trainer.evaluate`,
    `wall_time` is that of training with its evaluations, in seconds, or of the part after `resumed_from`. `pretraining`
    has the objective and its flags. Without labels, the main result is the loss on held-out images with the masks of
    the first epoch.
    """
    is_supervised = pretraining is None or pretraining["objective"] == "supervised"
    if is_supervised:
        # Without the loss: with label smoothing or mixing it is no number to compare.
        metrics = {name: scores[f"eval_{name}"] for name in METRIC_TITLES if f"eval_{name}" in scores}
        n = int(scores["eval_images"])
    else:
        metrics, n = {"loss": scores["eval_loss"]}, len(data.validation)
    main, arguments, state = next(iter(metrics)), trainer.args, trainer.state
    selection = "the last step"
    if arguments.load_best_model_at_end and state.best_model_checkpoint:
        name = arguments.metric_for_best_model.removeprefix("eval_")
        # The evaluation after training repeats the best one.
        equal = len({log["step"] for log in state.log_history if log.get(f"eval_{name}") == state.best_metric})
        tie = f", and of {equal} such the lowest loss" if equal > 1 and name != "loss" else ""
        selection = f"the checkpoint with the best {name}{tie} on these same images (step {state.best_global_step})"
    record = {
        "metric": main,
        "value": metrics[main],
        "n": n,
        "metrics": metrics,
        "selection": selection,
        "seed": arguments.seed,
        "dataset": dataset_metadata(data),
        "model": model_metadata(trainer.model, model_arguments),
        "earlier": _earlier_runs(model_arguments.model_name_or_path),
        "training": training_metadata(trainer),
        **provenance(),
        "wall_time_seconds": round(wall_time, 1),
        "resumed_from": Path(arguments.resume_from_checkpoint or "").name or None,
    }
    if pretraining is None:
        return record
    objective = dict(pretraining)
    if not is_supervised:
        encoder = trainer.model.vit.named_parameters()
        record["model"]["num_parameters"] = sum(p.numel() for name, p in encoder if name != "embeddings.mask_token")
        objective["description"] = trainer.objective
    last_logs = [log for log in state.log_history if log.get("step") == state.global_step]
    record["metrics"] |= {name: value for log in last_logs for name, value in log.items() if name.startswith("probe_")}
    return record | {"pretraining": objective}


def write_record(record: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    write_text(Path(folder, RECORD), json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def result_message(
    record: dict[str, Any], folder: str | os.PathLike[str], example: Path | None = None, warning: str | None = None
) -> str:
    """The last lines that training prints: the result, a warning about it, where the model is, and how to use it."""
    value = format_score(record["value"], record["metric"])
    title, broken = METRIC_TITLES.get(record["metric"], record["metric"]), record["training"]["broken_images"]
    replaced = f"\n{broken} training images could not be read: others took their places." if broken else ""
    warned = "" if warning is None else f"\n{warning}"
    ended = record["training"].get("ended_early")
    early = f"\nEnded early {ended}. To train on, raise it, with --resume_from_checkpoint True." if ended else ""
    found = record.get("dataset", {}).get("overlap")
    overlap = f"\n{found['sentence']}" if found else ""
    if "pretraining" in record:
        use = f"""To go on from it:

    accelerate launch scripts/finetune.py --model_name_or_path {folder} --train_dir PHOTOS"""
    else:
        use = f"""To use it:

    from transformers import pipeline
    classify = pipeline("image-classification", model="{folder}", trust_remote_code=True)
    print(classify("{example or "image.png"}"))"""
    return f"""
Held-out {title}: {value} on {record["n"]:,} images ({record["selection"]}).{early}{replaced}{overlap}{warned}
The model is in {folder}. {use}
"""


def dataset_metadata(data: "ImageData") -> dict[str, Any]:
    return {
        **{key: getattr(data.source, key) for key in ("name", "hub_id", "license", "url", "note")},
        "num_labels": len(data.label_names),
        "is_multi_label": data.is_multi_label,
        "num_training_images": data.num_train,
        "num_held_out_images": len(data.validation),
        "held_out": data.split,
        "images": data.images,
        "overlap": data.overlap or None,
    }


def model_metadata(model: PreTrainedModel, arguments: ModelArguments) -> dict[str, Any]:
    from ..training.optimization import is_temporary  # here: reading a record needs no optimizer

    start = arguments.model_name_or_path
    is_local = start is not None and Path(start).exists()
    return {
        "num_parameters": sum(p.numel() for name, p in model.named_parameters() if not is_temporary(name)),
        "started_from": "scratch" if start is None else Path(start).resolve().name if is_local else start,
        "base_model": None if is_local else start,
        "license": None if start is None else _license_of(Path(start, "README.md") if is_local else start),
    }


def _license_of(card: str | Path) -> dict[str, str] | None:
    """The licence in a model card, a file's or that of a Hub id, with name and link if it has its own; None without."""
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data
    except Exception:  # no card, no connection, no YAML
        return None
    named = {name: data.get(name) for name in ("license", "license_name", "license_link") if data.get(name)}
    return named if isinstance(named.get("license"), str) else None


def _earlier_runs(start: str | None) -> list[dict[str, Any]]:
    """The runs that led to the model in a folder, the first one first."""
    try:
        record = json.loads(Path(start or "", RECORD).read_text(encoding="utf-8"))
        names = ("metric", "value", "n", "seed", "training", "command", "versions", "hardware", "wall_time_seconds")
        run = {"data": record["dataset"]["name"], "started_from": record["model"]["started_from"]}
        return [*record.get("earlier", []), run | {name: record[name] for name in names}]
    except (OSError, ValueError, KeyError, TypeError):  # no record, or not one of ours
        return []


def training_metadata(trainer: "ImageTrainer") -> dict[str, Any]:
    arguments: ImageTrainingArguments = trainer.args
    recipe = arguments.recipe_arguments
    published = None if recipe.recipe is None else find_recipe(recipe.recipe)
    is_adam = arguments.optim == LAMB or "adam" in arguments.optimizer_name
    is_multi_label = trainer.model.config.problem_type == "multi_label_classification"
    schedule = (arguments.lr_scheduler_kwargs or {}).items()
    # As the launcher has set it, too: `accelerate launch --mixed_precision bf16`.
    # accelerate has no float16 on a CPU, and says nothing.
    mixed = trainer.accelerator.mixed_precision if trainer.accelerator.native_amp else "no"
    precision = {"bf16": "bfloat16", "fp16": "float16"}.get(mixed, "float32")
    return {
        "epochs": round(trainer.state.epoch or 0.0, 2),
        "steps": trainer.state.global_step,
        "ended_early": trainer.early_end.reason,
        "samples_seen": trainer.samples_before + sum(trainer.samples_by_process),
        "samples_seen_by_process": trainer.samples_by_process,
        "batch_size": trainer.get_total_train_batch_size(arguments),
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "optimizer": arguments.optimizer_name,
        "optimizer_settings": arguments.optim_args,
        "adam_betas": [arguments.adam_beta1, arguments.adam_beta2] if is_adam else None,
        "adam_epsilon": arguments.adam_epsilon if is_adam else None,
        "learning_rate": arguments.learning_rate,
        "schedule": arguments.lr_scheduler_type.value,
        "schedule_settings": ", ".join(f"{key} {value:g}" for key, value in schedule) or None,
        "warmup_steps": arguments.get_warmup_steps(trainer.state.max_steps),
        "weight_decay": arguments.weight_decay,
        "gradient_clipping": arguments.max_grad_norm,
        "label_smoothing": arguments.label_smoothing_factor,
        "loss": "bce" if is_multi_label and recipe.loss == "softmax" else recipe.loss,
        "class_weights": recipe.class_weights,
        "augmentation": trainer.augmentation_of_images,
        "mixing": None if trainer.objective else trainer.data_collator.description,
        "recipe": recipe.recipe,
        "recipe_source": published and published.source,
        "recipe_differs": (published and published.differs) or None,
        "layer_decay": recipe.layer_decay,
        "head_learning_rate_multiplier": recipe.head_learning_rate_multiplier,
        "weight_average": recipe.ema_decay,
        "frozen": recipe.freeze,
        "lora_rank": recipe.lora_rank,
        **(trainer.distillation.metadata() if trainer.distillation else {}),
        "precision": precision,
        "processes": arguments.world_size,
        "broken_images": len(trainer.step_guard.broken_images),
    }


# --- Records for a card -----------------------------------------------------------------------------------------------


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
        if is_of_other_weights(transfer_record["weights"], folder):
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
    if is_of_other_weights(record["model"].get("weights"), folder):
        raise InputError(f"{file} is of other weights than those in {folder}: their SHA-256 differ. {again}")


def is_of_other_weights(theirs: dict[str, str] | None, folder: Path) -> bool:
    """Whether the digests differ from those of the folder; False if either is not known."""
    return bool(theirs) and digests(folder) not in ({}, theirs)
