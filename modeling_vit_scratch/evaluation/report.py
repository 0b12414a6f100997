# SPDX-License-Identifier: Apache-2.0
"""From predictions to a report: scores, tables, and the temperature of --calibrate."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from transformers.dynamic_module_utils import custom_object_save

from ..common.errors import InputError
from ..common.pretrained import load_pretrained
from ..common.records import digests, provenance
from ..configuration_vit_scratch import ViTScratchConfig
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from ..modeling_vit_scratch import ViTScratchForImageClassification
from .arguments import EvaluationArguments
from .data import EvaluationData
from .metrics import (
    Reliability,
    Score,
    confidences,
    confusion,
    label_confusions,
    per_class,
    per_label,
    probabilities,
    reliability,
    score,
    score_labels,
)
from .predictions import Predictions


MULTI_LABEL = "multi_label_classification"
EXAMPLES_FIGURE = "examples.png"
# A temperature at the end of this range corrects nothing: with every image right, the likelihood has no maximum.
TEMPERATURES = (0.05, 20.0)


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
            "gives each image its likeliest label. Leave it out."
        )
    model.config.calibrated = arguments.calibrated
    return model, processor


@dataclass(frozen=True)
class Report:
    """
    The scores of a model on images.

    Attributes:
        record: the content of results.json.
        scores, reliability, confusion: of these images.
        logits: (N, V, K) of V views, not divided by the temperature.
        probabilities: (N, K).
        labels: (N,), or 0 and 1 (N, K).
        rows: (N,), indices of the images.
        label_names: of the model.
        threshold: minimum probability of a label; None where each image has one label.
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
    """All scores of the predictions; with --calibrate of the images that the temperature was not fitted to."""
    config, labels, rows = model.config, predictions.labels, np.arange(len(predictions.labels))
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    is_multi_label = config.problem_type == MULTI_LABEL
    threshold = (arguments.threshold or 0.5) if is_multi_label else None
    temperature, description = config.temperature if config.calibrated else 1.0, data.description
    seed, resamples, calibration = arguments.seed, arguments.bootstrap_resamples, None

    def scores_at(temperature: float) -> list[Score]:
        values = probabilities(predictions.logits[rows], temperature, is_multi_label)
        if is_multi_label:
            return score_labels(values, labels[rows], threshold, resamples, seed)
        return score(values, labels[rows], resamples, seed)

    if arguments.calibrate:
        fitted_rows, rows = calibration_split(len(labels), seed)
        fitted = fit_temperature(predictions.logits[fitted_rows, 0], labels[fitted_rows])
        before, after = scores_at(1.0), scores_at(fitted)
        # Fitted to few images it may make others worse: then it is reported, and not stored.
        is_better = _nll(after) < _nll(before)
        temperature = fitted if is_better else temperature
        calibration = {
            "fitted_to": len(fitted_rows),
            "fitted_temperature": fitted,
            "is_stored": is_better,
            "without_temperature": [one.as_dict() for one in before],
            "with_fitted_temperature": [one.as_dict() for one in after],
        }
        description += f"; the half of them that the temperature was not fitted to, chosen with seed {seed}"
    scores, labels, logits = scores_at(temperature), labels[rows], predictions.logits[rows]
    values = probabilities(logits, temperature, is_multi_label)
    if is_multi_label:
        table, matrix = per_label(values, labels, names, threshold), label_confusions(values, labels, threshold)
        matrix_kind, is_right = "of_each_label_rows_true_columns_predicted", (values >= threshold) == labels
        is_right = is_right.all(axis=1)
    else:
        table, matrix = per_class(values, labels, names), confusion(values, labels)
        matrix_kind, is_right = "rows_true_columns_predicted", values.argmax(axis=1) == labels
    confidence, correct = confidences(values, labels)
    diagram = reliability(confidence, correct)
    is_local = Path(arguments.model).exists()
    record = {
        "metric": scores[0].metric,
        "value": scores[0].value,
        "n": len(labels),
        "results": [one.as_dict() for one in scores],
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
            "url": data.source.url, "note": data.source.note, "images": description,
            "broken_images": sorted(data.broken.values()), "seen_in_training": data.seen_in_training,
        },
        "temperature": temperature,
        "calibration": calibration,
        "views": arguments.crops,
        "per_class": table,
        "confusion_matrix": {"labels": names, matrix_kind: matrix.tolist()},
        "reliability": {
            "edges": diagram.edges.tolist(), "n": diagram.counts.tolist(),
            "confidence": _none_for_nan(diagram.confidence), "accuracy": _none_for_nan(diagram.accuracy),
            "mean_confidence": float(confidence.mean()), "mean_accuracy": float(correct.mean()),
        },
        "examples": _examples_record(is_right, arguments.examples, seed, data.credit(arguments)),
        "throughput": {
            "images_per_second": predictions.images_per_second,
            "batch_size": arguments.per_device_eval_batch_size,
            "processes": accelerator.num_processes,
            "note": "reading, preparing and computing, without the first batch",
        },
        **provenance("numpy", "scipy", "scikit-learn", "evaluate"),
    }  # fmt: skip
    return Report(record, scores, diagram, matrix, logits, values, labels, rows, names, threshold)


def _nll(scores: list[Score]) -> float:
    return next(one.value for one in scores if one.metric == "nll")


def _none_for_nan(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


# ---------------------------------------------------------------------------------------------------------------------
# Examples


def choose_examples(is_right: np.ndarray, number: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of up to `number` right images and as many wrong ones, at random; `is_right` is (N,)."""
    generator, chosen = np.random.default_rng(seed), []
    for kind in (True, False):
        rows = np.flatnonzero(is_right == kind)
        chosen.append(sorted(generator.choice(rows, min(number, len(rows)), replace=False).tolist()))
    return chosen[0], chosen[1]


def _examples_record(is_right: np.ndarray, number: int, seed: int, credit: str) -> dict[str, Any] | None:
    """The entry of results.json; None without examples. `rows` are those of predictions.csv, from 0."""
    if number < 1:
        return None
    right, wrong = choose_examples(is_right, number, seed)
    return {
        "figure": EXAMPLES_FIGURE, "right": len(right), "wrong": len(wrong), "rows": [*right, *wrong],
        "chosen": f"chosen at random with seed {seed}", "credit": credit,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Calibration


def calibration_split(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two random halves of `count` images, sorted indices: to fit a temperature to, and to report on."""
    if count < 4:
        raise InputError(f"--calibrate needs two halves of the images, and there are {count} images.")
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[: count // 2]), np.sort(order[count // 2 :])


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """
    The temperature with the lowest negative log-likelihood on held-out images (Guo et al., arXiv:1706.04599). The
    likelihood is concave in 1 / T, so there is one maximum.

    Args:
        logits: (N, K), not divided by any temperature.
        labels: classes (N,), or 0 and 1 (N, K).

    Raises:
        InputError: if the maximum lies outside of `TEMPERATURES`.
    """
    logits = np.asarray(logits, dtype=np.float64)

    def loss(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        if labels.ndim == 1:
            return float((logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels]).mean())
        return float((np.logaddexp(0.0, scaled) - labels * scaled).mean())

    low, high = map(math.log, TEMPERATURES)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-8})
    if min(found.x - low, high - found.x) < 1e-3:
        raise InputError(
            f"No temperature fits: the best lies outside of {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g}. Either "
            f"(nearly) all of the {len(labels)} images are right, or the labels have nothing to do with the logits. "
            "Take more images, or leave out --calibrate."
        )
    return math.exp(found.x)


def store_temperature(folder: str | os.PathLike[str], temperature: float) -> None:
    """Writes the temperature into config.json, and the code that applies it beside it: older code would not."""
    config = ViTScratchConfig.from_pretrained(folder)
    config.temperature = temperature
    config.save_pretrained(folder)
    # transformers copies the code of an object, not of a class: the smallest model will do.
    smallest = ViTScratchForImageClassification(type(config).from_variant("test/4", num_labels=2))
    custom_object_save(smallest, folder)
