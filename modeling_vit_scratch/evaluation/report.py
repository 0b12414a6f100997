# SPDX-License-Identifier: Apache-2.0
"""The report: results.json, predictions.csv and the message for the screen; and the temperature of --calibrate."""

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from sklearn.metrics import precision_recall_curve
from transformers.dynamic_module_utils import custom_object_save

from ..common import uncertainty
from ..common.errors import InputError, on_screen
from ..common.records import NUM_BINS, digests, format_score, interval_of, provenance, title_of
from ..configuration_vit_scratch import ViTScratchConfig
from ..data.sources import listed
from ..modeling_vit_scratch import ViTScratchForImageClassification
from . import metrics
from .arguments import EvaluationArguments
from .data import EvaluationData
from .metrics import answers, confidences, confusion, per_class, probabilities, reliability, score, value_of
from .predictions import MULTI_LABEL, Predictions
from .uncertainty import fit_novelty, fit_thresholds


EXAMPLES_FIGURE = "examples.png"
# A temperature at the end of this range corrects nothing: with every image right, the likelihood has no maximum.
TEMPERATURES = (0.05, 20.0)


@dataclass(frozen=True)
class Report:
    """
    The scores of a model: `record` is that of results.json; `logits` (N, V, K), `probabilities` (N, K) and `labels`
    (N,) or (N, K) are of the N images with the indices `rows` (N,) among all. `novelty` is there with sets of labels.
    """

    record: dict[str, Any]
    logits: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    novelty: uncertainty.Novelty | None


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
    threshold = arguments.threshold or 0.5
    temperature, description = config.temperature if config.calibrated else 1.0, data.description
    seed, resamples, calibration = arguments.seed, arguments.bootstrap_resamples, None
    thresholds, novelty = None, None

    def score_at(temperature: float) -> list[dict[str, Any]]:
        values = probabilities(predictions.logits[rows], temperature, is_multi_label)
        return score(values, labels[rows], threshold, resamples, seed)

    if arguments.calibrate:
        fitted_rows, rows = calibration_split(len(labels), seed)
        fitted = fit_temperature(predictions.logits[fitted_rows, 0], labels[fitted_rows])
        before, after = score_at(1.0), score_at(fitted)
        # Fitted to few images it may make others worse: then it is reported, and not stored.
        is_better = value_of(after, "nll") < value_of(before, "nll")
        temperature = fitted if is_better else temperature
        calibration = {
            "fitted_to": len(fitted_rows), "fitted_temperature": fitted, "is_stored": is_better,
            "without_temperature": before, "with_fitted_temperature": after,
        }  # fmt: skip
        if not is_multi_label:
            values = probabilities(predictions.logits, fitted if is_better else config.temperature)
            wanted = arguments.coverage or 0.9, arguments.min_accuracy or 0.95
            thresholds = fit_thresholds(values, labels, fitted_rows, rows, *wanted)
            features = predictions.features
            novelty = fit_novelty(features[fitted_rows], labels[fitted_rows], features[rows])
        else:
            own = fit_label_thresholds(
                probabilities(predictions.logits[fitted_rows], temperature, True), labels[fitted_rows]
            )
            values, others = probabilities(predictions.logits[rows], temperature, True), labels[rows]
            scores = [metrics.multi_label_scores(values, others, values >= one)["macro_f1"] for one in (threshold, own)]
            calibration |= {"label_thresholds": own, "macro_f1_at_one_threshold": scores[0], "macro_f1": scores[1]}
        description += f"; the half of them that the temperature was not fitted to, chosen with seed {seed}"
    results, labels, logits = score_at(temperature), labels[rows], predictions.logits[rows]
    values = probabilities(logits, temperature, is_multi_label)
    confidence, correct = confidences(values, labels)
    diagram = reliability(confidence, correct)
    matrix_kind = "of_each_label_rows_true_columns_predicted" if is_multi_label else "rows_true_columns_predicted"
    examples, source = None, data.source
    if arguments.examples:
        is_right = (answers(values, labels, threshold) == labels).reshape(len(labels), -1).all(axis=1)
        right, wrong = choose_examples(is_right, arguments.examples, seed)
        examples = {  # rows of predictions.csv, from 0
            "figure": EXAMPLES_FIGURE, "right": len(right), "wrong": len(wrong), "rows": [*right, *wrong],
            "chosen": f"chosen at random with seed {seed}",
            "credit": arguments.examples_credit or ", ".join(filter(None, (source.name, source.license, source.url))),
        }  # fmt: skip
    is_local = Path(arguments.model).exists()
    record = {
        "metric": results[0]["metric"], "value": results[0]["value"], "n": len(labels), "results": results,
        "confidence_level": 0.95, "bootstrap_resamples": resamples, "seed": seed,
        "problem_type": MULTI_LABEL if is_multi_label else "single_label_classification",
        "threshold": threshold if is_multi_label else None,
        "model": {
            "name": Path(arguments.model).resolve().name if is_local else arguments.model,
            "num_parameters": model.num_parameters(),
            "weights": (digests(Path(arguments.model)) if is_local else None) or None,
        },
        "dataset": {
            "name": source.name, "hub_id": source.hub_id, "license": source.license, "url": source.url,
            "note": source.note, "images": description, "broken_images": sorted(data.broken.values()),
            "seen_in_training": data.seen_in_training,
        },
        "temperature": temperature, "calibration": calibration, "uncertainty": thresholds, "views": arguments.crops,
        "per_class": per_class(values, labels, names, threshold),
        "confusion_matrix": {"labels": names, matrix_kind: confusion(values, labels, threshold).tolist()},
        "reliability": {
            "edges": np.linspace(0.0, 1.0, NUM_BINS + 1).tolist(), "n": diagram.counts.tolist(),
            **{
                name: [None if np.isnan(mean) else float(mean) for mean in getattr(diagram, name)]
                for name in ("confidence", "accuracy")
            },
            "mean_confidence": float(confidence.mean()), "mean_accuracy": float(correct.mean()),
        },
        "examples": examples,
        "throughput": {
            "images_per_second": predictions.images_per_second,
            "batch_size": arguments.per_device_eval_batch_size, "processes": accelerator.num_processes,
            "note": "reading, preparing and computing, without the first batch",
        },
        **provenance("numpy", "scipy", "scikit-learn", "evaluate"),
    }  # fmt: skip
    return Report(record, logits, values, labels, rows, novelty)


def choose_examples(is_right: np.ndarray, number: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of up to `number` right images and as many wrong ones, at random; `is_right` is (N,)."""
    generator, chosen = np.random.default_rng(seed), []
    for kind in (True, False):
        rows = np.flatnonzero(is_right == kind)
        chosen.append(sorted(generator.choice(rows, min(number, len(rows)), replace=False).tolist()))
    return chosen[0], chosen[1]


def calibration_split(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two random halves of `count` images, sorted indices: to fit a temperature to, and to report on."""
    if count < 4:
        raise InputError(f"--calibrate needs two halves of the images, and there are {count} images.")
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[: count // 2]), np.sort(order[count // 2 :])


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """
    The temperature with the lowest negative log-likelihood on held-out images (Guo et al., arXiv:1706.04599), from
    logits (N, K) and labels (N,) or (N, K). The likelihood is concave in 1 / T, so there is one maximum. Raises
    InputError if it lies outside of `TEMPERATURES`.
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


def fit_label_thresholds(values: np.ndarray, labels: np.ndarray) -> list[float]:
    """Of each label the threshold of the best F1, from probabilities and labels (N, K); 0.5 without an image of it."""
    thresholds = []
    for scores, has in zip(values.T, labels.T):
        precision, recall, levels = precision_recall_curve(has, scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        thresholds.append(float(levels[f1[:-1].argmax()]) if has.any() else 0.5)
    return thresholds


def has_better_thresholds(calibration: dict[str, Any]) -> bool:
    """Whether thresholds of each label have a better macro F1 than one for all, on images they were not fitted to."""
    return calibration.get("macro_f1", 0.0) > calibration.get("macro_f1_at_one_threshold", 0.0)


def write_report(
    report: Report, data: EvaluationData, model: ViTScratchForImageClassification, arguments: EvaluationArguments
) -> list[Path]:
    """Writes all but the figures into --output_dir, and a temperature that helps into the model. Returns the files."""
    folder, record = Path(arguments.output_dir), report.record
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "results.json", folder / "predictions.csv"]
    files[0].write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    paths = [data.examples.images[row]["image"]["path"] for row in report.rows.tolist()]
    images = [Path(path).name if path else str(row) for path, row in zip(paths, report.rows.tolist())]
    with open(files[1], "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(_prediction_rows(report, images))
    if arguments.save_logits:
        files.append(folder / "predictions.npz")
        # Logits of every view, not divided by the temperature.
        arrays = {"image": np.array(images), "logits": report.logits, "labels": report.labels}
        names = np.array(record["confusion_matrix"]["labels"])
        np.savez_compressed(files[-1], **arrays, label_names=names, temperature=record["temperature"])
    folder = Path(arguments.model)
    if calibration := record["calibration"]:
        config = ViTScratchConfig.from_pretrained(folder)
        if calibration["is_stored"]:
            config.temperature = record["temperature"]
        if has_better_thresholds(calibration):
            config.label_thresholds = calibration["label_thresholds"]
        if calibration["is_stored"] or has_better_thresholds(calibration):
            config.save_pretrained(folder)
            custom_object_save(model, folder)  # older code would not apply it
    if report.novelty is not None:
        thresholds = {**record["uncertainty"], "data": record["dataset"]["name"]}
        uncertainty.store(folder, thresholds, report.novelty, config.temperature)
        files += [folder / uncertainty.RECORD, folder / uncertainty.ARRAYS]
    return files


def _prediction_rows(report: Report, images: list[str]) -> Iterator[list[str]]:
    """Rows of predictions.csv. With several labels, all that an image has and gets, and the score of every label."""
    names, threshold = report.record["confusion_matrix"]["labels"], report.record["threshold"]
    if threshold is None:
        yield ["image", "label", "prediction", "score"]
        for image, values, label in zip(images, report.probabilities, report.labels):
            best = int(values.argmax())
            yield [image, names[label], names[best], f"{values[best]:.8f}"]
        return
    yield ["image", "labels", "predictions", *names]
    for image, values, labels in zip(images, report.probabilities, report.labels):
        has, gets = ("|".join(names[k] for k in np.flatnonzero(row)) for row in (labels, values >= threshold))
        yield [image, has, gets, *(f"{value:.8f}" for value in values)]


def report_message(record: dict[str, Any], model: str, files: list[Path]) -> str:
    """The record in some lines for the screen, with the path of the model and the names of the files."""
    title = f"{record['model']['name']} on {record['dataset']['name']}: {record['n']:,} images."
    lines = [title, f"Images: {record['dataset']['images']}.", ""]
    intervals = [interval_of(result) for result in record["results"]]
    lines.append(f"{'':<28}{'value':>9}" + ("   95 % interval" if any(intervals) else ""))
    for result, interval in zip(record["results"], intervals):
        metric = result["metric"]
        ends = " to ".join(format_score(end, metric) for end in interval or ())
        lines.append(f"{title_of(metric):<28}{format_score(result['value'], metric):>9}   {ends}".rstrip())
    threshold = record["threshold"]
    key, title = ("f1", "F1") if threshold is None else ("average_precision", "average precision")
    worst = sorted((row for row in record["per_class"] if row["n"]), key=lambda row: row[key])[:5]
    entries = (f"{on_screen(row['label'])} {row[key]:.3f} (n {row['n']})" for row in worst)
    lines += ["", f"Lowest {title}: {', '.join(entries)}"]
    if threshold is not None:
        lines.append(f"Minimum probability of a label: {threshold:g} (--threshold).")
        absent = [row["label"] for row in record["per_class"] if not row["n"]]
        if absent:
            lines.append(f"No image has {listed(absent)}: left out of the mean average precision.")
    if broken := record["dataset"]["broken_images"]:
        lines.append(f"{len(broken)} images can't be read and were left out: {listed(broken)}.")
    if rate := record["throughput"]["images_per_second"]:
        lines.append(f"{rate:,.0f} images per second on {record['hardware']}.")
    if record["temperature"] != 1.0:
        lines.append(f"Temperature: {record['temperature']:.4f}.")
    if calibration := record["calibration"]:
        outcome = "It does not help, and was not stored. More images may give a better one."
        if calibration["is_stored"]:
            outcome = f"It is in {model}/config.json."
        before, after = calibration["without_temperature"], calibration["with_fitted_temperature"]
        lines.append(
            f"Temperature {calibration['fitted_temperature']:.4f}, fitted to {calibration['fitted_to']:,} other "
            f"images: NLL {value_of(before, 'nll'):.4f} to {value_of(after, 'nll'):.4f}, "
            f"ECE {value_of(before, 'ece'):.2%} to {value_of(after, 'ece'):.2%}. {outcome}"
        )
        if record["dataset"]["seen_in_training"]:
            lines.append(
                "MODEL was trained on these images, and is surer of them than of others: what was fitted to them "
                "promises too much. Calibrate on images that it has not seen."
            )
        if "label_thresholds" in calibration:
            stored = "They are" if has_better_thresholds(calibration) else "They do not help, and are not"
            names = record["confusion_matrix"]["labels"]
            each = listed([f"{on_screen(name)} {x:.3g}" for name, x in zip(names, calibration["label_thresholds"])])
            before, after = calibration["macro_f1_at_one_threshold"], calibration["macro_f1"]
            lines.append(
                f"Thresholds of labels, fitted to the same ({each}): macro F1 {before:.2%} to {after:.2%}. {stored} in "
                f"{model}/config.json, for predict.py."
            )
    if thresholds := record["uncertainty"]:
        lines.append(
            f"Sets of labels for a coverage of {thresholds['coverage']:.4g}: of {thresholds['n_measured']:,} other "
            f"images {thresholds['measured_coverage']:.2%} have their label in it, and sets have "
            f"{thresholds['mean_set_size']:.2f} labels on average."
        )
        outcome = f"is reached with no score, as far as {thresholds['n']:,} images can tell. More may help."
        if thresholds["score_threshold"] is not None:
            kept = f"{thresholds['share_kept']:.2%} of the others have it"
            outcome = f"is reached from a score of {thresholds['score_threshold']:.4f} on; {kept}."
        lines.append(f"An accuracy of {thresholds['min_accuracy']:.4g} {outcome} predict.py writes both.")
    return "\n".join([*lines, "Written: " + ", ".join(map(str, files))])
