# SPDX-License-Identifier: Apache-2.0
"""From a command line to a report: results.json, predictions.csv, figures, and a table for the screen."""

import csv
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from transformers.image_processing_utils import BaseImageProcessor

from .. import __version__
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from ..modeling_vit_scratch import ViTScratchForImageClassification
from ..training.errors import InputError
from ..training.record import command_line, git_commit, hardware
from ..training.sources import listed
from ..training.stored_model import load_stored_model
from .arguments import EvaluationArguments
from .calibration import fit_temperature, store_temperature
from .data import EvaluationData, halves
from .examples import FIGURE, draw_examples, example_facts
from .metrics import (
    NO_PERCENT,
    TITLES,
    Reliability,
    Score,
    confidences,
    confusion,
    per_class,
    probabilities,
    reliability,
    score,
)
from .multi_label import label_confusions, per_label, score_labels
from .predictions import Predictions
from .weights import digests


MULTI_LABEL = "multi_label_classification"


def load_model(arguments: EvaluationArguments) -> tuple[ViTScratchForImageClassification, ViTScratchImageProcessor]:
    """
    The model and its image processor.

    Raises:
        InputError: if it can't be loaded, or has no classifier.
    """
    name, hub = arguments.model, {"revision": arguments.model_revision, "cache_dir": arguments.cache_dir}
    model, processor, missing = load_stored_model(ViTScratchForImageClassification, f"MODEL {name}", name, hub)
    if missing or not model.num_labels or not any(p.any() for p in model.classifier.parameters()):
        raise InputError(f"MODEL {name} has no trained classifier. Train one with scripts/finetune.py.")
    if model.config.problem_type == "regression" or model.num_labels < 2:
        raise InputError(
            f"MODEL {name} does not classify: it has problem_type={model.config.problem_type!r} and "
            f"{model.num_labels} outputs."
        )
    if arguments.threshold is not None and model.config.problem_type != MULTI_LABEL:
        raise InputError(
            f"--threshold {arguments.threshold:g} is for models that give an image any number of labels. MODEL {name} "
            "gives each its likeliest one. Leave it out."
        )
    model.config.calibrated = arguments.calibrated
    return model, processor


@dataclass(frozen=True)
class Report:
    """
    What is written: `record` as results.json, the rest for figures and predictions. `threshold` is that of answers
    where images have any number of labels, else None; `rows` are the indices of the images.
    """

    record: dict[str, Any]
    scores: list[Score]
    reliability: Reliability
    confusion: np.ndarray
    logits: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    label_names: list[str]
    threshold: float | None


def build_report(
    arguments: EvaluationArguments,
    model: ViTScratchForImageClassification,
    data: EvaluationData,
    predictions: Predictions,
    accelerator: Accelerator,
) -> Report:
    """Every score of the predictions; with --calibrate of the half that the temperature was not fitted to."""
    config, labels, rows = model.config, predictions.labels, np.arange(len(predictions.labels))
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    is_multi_label = config.problem_type == MULTI_LABEL
    threshold = (arguments.threshold or 0.5) if is_multi_label else None
    temperature, which = config.temperature if config.calibrated else 1.0, data.which
    seed, resamples, calibration = arguments.seed, arguments.bootstrap_resamples, None

    def scores_at(value: float) -> list[Score]:
        """Of the images in `rows`, with this temperature."""
        values = probabilities(predictions.logits[rows], value, is_multi_label)
        if is_multi_label:
            return score_labels(values, labels[rows], threshold, resamples, seed)
        return score(values, labels[rows], resamples, seed)

    if arguments.calibrate:
        fitted, rows = halves(len(labels), seed)
        candidate = fit_temperature(predictions.logits[fitted, 0], labels[fitted])
        before, after = scores_at(1.0), scores_at(candidate)
        # Fitted to few images it may well make others worse: then it is told, and not stored.
        helps = _nll(after) < _nll(before)
        temperature = candidate if helps else temperature
        calibration = {
            "fitted_to": len(fitted),
            "fitted_temperature": candidate,
            "is_stored": helps,
            "without_temperature": [one.facts() for one in before],
            "with_fitted_temperature": [one.facts() for one in after],
        }
        which += f"; the half of them that the temperature was not fitted to, chosen with seed {seed}"
    scores, labels = scores_at(temperature), labels[rows]
    values = probabilities(predictions.logits[rows], temperature, is_multi_label)
    if is_multi_label:
        table, matrix = per_label(values, labels, names, threshold), label_confusions(values, labels, threshold)
        matrix_facts = {"labels": names, "of_each_label_rows_true_columns_predicted": matrix.tolist()}
    else:
        table, matrix = per_class(values, labels, names), confusion(values, labels)
        matrix_facts = {"labels": names, "rows_true_columns_predicted": matrix.tolist()}
    sureness, hits = confidences(values, labels)
    diagram = reliability(sureness, hits)
    correct = values.argmax(axis=1) == labels if threshold is None else ((values >= threshold) == labels).all(axis=1)
    is_local = Path(arguments.model).exists()
    record = {
        "metric": scores[0].metric,
        "value": scores[0].value,
        "n": len(labels),
        "results": [one.facts() for one in scores],
        "confidence_level": 0.95,
        "bootstrap_resamples": resamples,
        "seed": seed,
        "problem_type": MULTI_LABEL if is_multi_label else "single_label_classification",
        "threshold": threshold,
        "model": {
            "name": Path(arguments.model).resolve().name if is_local else arguments.model,
            "num_parameters": model.num_parameters(),
            "weights": (digests(Path(arguments.model)) if is_local else None) or None,
        },
        "dataset": {
            "name": data.source.name, "hub_id": data.source.hub_id, "license": data.source.license,
            "url": data.source.url, "note": data.source.note, "images": which,
            "broken_images": sorted(data.broken.values()), "seen_in_training": data.seen_in_training,
        },
        "temperature": temperature,
        "calibration": calibration,
        "views": arguments.crops,
        "per_class": table,
        "confusion_matrix": matrix_facts,
        "reliability": {
            "edges": diagram.edges.tolist(), "n": diagram.counts.tolist(),
            "confidence": _or_none(diagram.confidence), "accuracy": _or_none(diagram.accuracy),
            "mean_confidence": float(sureness.mean()), "mean_accuracy": float(hits.mean()),
        },
        "examples": example_facts(correct, arguments.examples, seed, data.credit(arguments)),
        "throughput": {
            "images_per_second": predictions.images_per_second,
            "batch_size": arguments.per_device_eval_batch_size,
            "processes": accelerator.num_processes,
            "note": "reading, preparing and computing, without the first batch",
        },
        "command": command_line(),
        "git_commit": git_commit(),
        "versions": {
            "modeling_vit_scratch": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "accelerate", "datasets", "pillow")},
            **{name: version(name) for name in ("numpy", "scipy", "scikit-learn", "evaluate")},
        },
        "hardware": hardware(),
    }  # fmt: skip
    return Report(record, scores, diagram, matrix, predictions.logits[rows], values, labels, rows, names, threshold)


def _nll(scores: list[Score]) -> float:
    return next(one.value for one in scores if one.metric == "nll")


def _or_none(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def write_report(
    report: Report,
    data: EvaluationData,
    arguments: EvaluationArguments,
    model: ViTScratchForImageClassification,
    processor: BaseImageProcessor,
) -> list[Path]:
    """Writes everything into --output_dir, and a temperature that helps into the model. Returns the files."""
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "results.json", folder / "predictions.csv"]
    files[0].write_text(json.dumps(report.record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    images = [_image_name(data, row) for row in report.rows.tolist()]
    with open(files[1], "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(_prediction_rows(report, images))
    if arguments.save_logits:
        files.append(folder / "predictions.npz")
        np.savez_compressed(
            files[-1],
            image=np.array(images),
            logits=report.logits,  # of every view, not divided by the temperature
            labels=report.labels,
            label_names=np.array(report.label_names),
            temperature=report.record["temperature"],
        )
    if arguments.calibrate and report.record["calibration"]["is_stored"]:
        store_temperature(arguments.model, report.record["temperature"])
    try:
        from .figures import draw_report
    except ImportError:
        print('No figures: they are drawn with matplotlib, pip install -e ".[plot]"')
        return files
    files += draw_report(report, folder)
    if report.record["examples"]:
        files.append(folder / FIGURE)
        draw_examples(report, data, model, processor, files[-1])
    return files


def _image_name(data: EvaluationData, row: int) -> str:
    """The name of its file, or the number of its row."""
    path = data.examples.images[row]["image"]["path"]
    return Path(path).name if path else str(row)


def _prediction_rows(report: Report, images: list[str]) -> Iterator[list[str]]:
    """The table of predictions.csv. Of several labels, all that an image has and gets, and the score of every one."""
    names = report.label_names
    if report.threshold is None:
        yield ["image", "label", "prediction", "score"]
        for image, values, label in zip(images, report.probabilities, report.labels):
            best = int(values.argmax())
            yield [image, names[label], names[best], f"{values[best]:.8f}"]
        return
    yield ["image", "labels", "predictions", *names]
    for image, values, labels in zip(images, report.probabilities, report.labels):
        has, gets = ("|".join(names[k] for k in np.flatnonzero(row)) for row in (labels, values >= report.threshold))
        yield [image, has, gets, *(f"{value:.8f}" for value in values)]


def tell_report(report: Report, data: EvaluationData, arguments: EvaluationArguments, files: list[Path]) -> str:
    """The table for the screen, and where the rest is."""
    record = report.record
    lines = [f"{record['model']['name']} on {record['dataset']['name']}: {record['n']:,} images."]
    lines += [f"Images: {record['dataset']['images']}.", ""]
    has_interval = report.scores[0].interval is not None
    lines.append(f"{'':<28}{'value':>9}" + ("   95 % interval" if has_interval else ""))
    for one in report.scores:
        show = (lambda x: f"{x:.4f}") if one.metric in NO_PERCENT else (lambda x: f"{100 * x:.2f} %")
        line = f"{TITLES[one.metric]:<28}{show(one.value):>9}"
        if one.interval is not None:
            line += f"   {show(one.interval[0])} to {show(one.interval[1])}"
        lines.append(line)
    main, title = ("f1", "F1") if report.threshold is None else ("average_precision", "average precision")
    worst = sorted((row for row in record["per_class"] if row["n"]), key=lambda row: row[main])[:5]
    lines += ["", f"Lowest {title}: " + ", ".join(f"{row['label']} {row[main]:.3f} (n {row['n']})" for row in worst)]
    if report.threshold is not None:
        lines.append(f"A label is given from a probability of {report.threshold:g} on (--threshold).")
        absent = [row["label"] for row in record["per_class"] if not row["n"]]
        if absent:
            lines.append(f"No image has {listed(absent)}: left out of the mean average precision.")
    if data.broken:
        lines.append(
            f"{len(data.broken)} images can't be read and were left out: {listed(list(data.broken.values()))}."
        )
    rate = record["throughput"]["images_per_second"]
    if rate:
        lines.append(f"{rate:,.0f} images per second on {record['hardware']}.")
    if record["temperature"] != 1.0:
        lines.append(f"Temperature: {record['temperature']:.4f}.")
    if record["calibration"]:
        lines.append(_tell_calibration(record["calibration"], arguments.model))
    return "\n".join([*lines, "Written: " + ", ".join(map(str, files))])


def _tell_calibration(calibration: dict[str, Any], model: str) -> str:
    without, fitted = (
        {one["metric"]: one["value"] for one in calibration[name]}
        for name in ("without_temperature", "with_fitted_temperature")
    )
    told = (
        f"Temperature {calibration['fitted_temperature']:.4f}, fitted to {calibration['fitted_to']:,} other images: "
        f"NLL {without['nll']:.4f} to {fitted['nll']:.4f}, ECE {without['ece']:.2%} to {fitted['ece']:.2%}."
    )
    if calibration["is_stored"]:
        return f"{told} It is in {model}/config.json."
    return f"{told} It does not help, and was not stored. More images may give a better one."
