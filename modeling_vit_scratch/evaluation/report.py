# SPDX-License-Identifier: Apache-2.0
"""From a command line to a report: results.json, predictions.csv, figures, and a table for the screen."""

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from .. import __version__
from ..common.errors import InputError
from ..common.pretrained import load_pretrained
from ..common.provenance import command_line, digests, git_commit, hardware
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from ..modeling_vit_scratch import ViTScratchForImageClassification
from .arguments import EvaluationArguments
from .calibration import fit_temperature
from .data import EvaluationData, halves
from .metrics import Reliability, Score, confidences, confusion, per_class, probabilities, reliability, score
from .multi_label import label_confusions, per_label, score_labels
from .predictions import Predictions


MULTI_LABEL = "multi_label_classification"
EXAMPLES_FIGURE = "examples.png"


def load_model(arguments: EvaluationArguments) -> tuple[ViTScratchForImageClassification, ViTScratchImageProcessor]:
    """
    The model and its image processor.

    Raises:
        InputError: if it can't be loaded, or has no classifier.
    """
    name, hub = arguments.model, {"revision": arguments.model_revision, "cache_dir": arguments.cache_dir}
    model, processor, missing = load_pretrained(ViTScratchForImageClassification, f"MODEL {name}", name, hub)
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


def choose(correct: np.ndarray, number: int, seed: int) -> tuple[list[int], list[int]]:
    """
    Indices of up to `number` images that are right and as many that are wrong, drawn at random.

    Args:
        correct: (N,), whether an image is right.
        number: of each kind.
        seed: of the draw.
    """
    generator, chosen = np.random.default_rng(seed), []
    for kind in (True, False):
        rows = np.flatnonzero(correct == kind)
        chosen.append(sorted(generator.choice(rows, min(number, len(rows)), replace=False).tolist()))
    return chosen[0], chosen[1]


def example_facts(correct: np.ndarray, number: int, seed: int, credit: str) -> dict[str, Any] | None:
    """What the record says of the figure; None without one. `rows` are those of predictions.csv, from 0."""
    if number < 1:
        return None
    right, wrong = choose(correct, number, seed)
    return {
        "figure": EXAMPLES_FIGURE, "right": len(right), "wrong": len(wrong), "rows": [*right, *wrong],
        "chosen": f"chosen at random with seed {seed}", "credit": credit,
    }  # fmt: skip
