# SPDX-License-Identifier: Apache-2.0
"""The names that a template may use: the records, and what follows from their numbers."""

import math
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from .. import __version__
from ..common.records import METRIC_TITLES, NUM_BINS, interval_of
from .metadata import base_model, license_of, metadata, task
from .records import Evaluation, ModelRecords
from .transfer import transfer_values


# Settings that change nothing at these values, and say nothing.
_NEUTRAL: dict[str, Any] = {
    "label_smoothing": 0, "layer_decay": 1, "head_learning_rate_multiplier": 1, "processes": 1, "broken_images": 0,
    "gradient_accumulation_steps": 1, "gradient_clipping": 0, "weight_decay": 0,
}  # fmt: skip
_HIDDEN = {"recipe", "recipe_source", "recipe_differs", "samples_seen_by_process"}
# Tables have up to so many classes, and of more the worst.
_ALL_CLASSES_UP_TO, _WORST_CLASSES = 20, 10
# Of fewer images of a class, its scores are mostly chance; of fewer images in all, the interval is worth a warning.
_FEW_IMAGES_OF_A_CLASS, _FEW_IMAGES = 10, 1000
_FIGURES = {
    "confusion_matrix.png": "Confusion matrix", "precision_recall.png": "Precision and recall",
    "reliability.png": "Reliability diagram",
}  # fmt: skip


def template_values(records: ModelRecords) -> dict[str, Any]:
    """
    Every name that a template may use, as scripts/card.py --help lists them. Plain values without methods that do
    anything, since a template may be somebody else's; None is what no record says.
    """
    options, training, config = records.options, records.training, records.config
    evaluations = [_evaluation(one, records) for one in records.evaluations]
    unseen = [values for values, one in zip(evaluations, records.evaluations) if one.is_unseen]
    license = license_of(records)
    versions = (training or records.evaluations[0].record)["versions"]
    return {
        "card_data": Markup(metadata(records).to_yaml()),
        "name": records.name,
        "location": records.location,
        "task": task(records),
        "is_encoder": records.is_encoder,
        "is_multi_label": records.is_multi_label,
        "labels": [] if records.is_encoder else [str(config.id2label[index]) for index in range(config.num_labels)],
        "num_parameters": records.num_parameters,
        "config": config.to_dict()
        | {"image_hw": config.image_hw, "patch_hw": config.patch_hw, "grid_hw": config.grid_hw},
        "processor": _processor(records),
        "training": None if training is None else _training(training),
        "evaluations": evaluations,
        "best_evaluation": unseen[0] if unseen else None,
        "transfer": None if records.transfer is None else transfer_values(records.transfer),
        "emissions": records.emissions,
        "figures": sorted(records.figures),
        "sheet_credit": records.sheet_credit,
        "license": license,
        "license_name": options.license_name,
        "license_link": options.license_link,
        "license_is_of_data": license is not None and options.license is None,
        "base_model": base_model(records),
        "version": versions.get("modeling_vit_scratch", __version__),
    }


def _processor(records: ModelRecords) -> dict[str, Any] | None:
    if records.processor is None:
        return None
    values = {"crop_pct": None, "do_center_crop": False, "crop_size": None} | records.processor.to_dict()
    for key in ("image_mean", "image_std"):
        each = values[key] if isinstance(values[key], (list, tuple)) else [values[key]]
        values[key] = list(each[:1] if len(set(each)) == 1 else each)  # one value for channels that are all alike
    return values | {"interpolation": Image.Resampling(records.processor.resample).name.lower()}


def _training(record: dict[str, Any]) -> dict[str, Any]:
    """results.json of the training, and what follows from it."""
    earlier, last = [], record["training"]
    for run in reversed(record.get("earlier") or []):
        settings = [
            (key.replace("_", " "), value)
            for key, value in run["training"].items()
            if value is not None and key not in _HIDDEN and value != last.get(key)
        ]
        earlier.append({**run, "settings": settings})
        last = run["training"]
    first = earlier[-1] if earlier else record["model"]
    # Runs on the same labelled images are one training from scratch; on others, a fine-tuning.
    is_one_training = all(run["data"] == record["dataset"]["name"] and run["metric"] != "loss" for run in earlier)
    # The loss of a pretraining without labels is that of its objective.
    hidden = _HIDDEN | ({"loss"} if record["metric"] == "loss" else set())
    runs_from_scratch = len(earlier) + 1 if first["started_from"] == "scratch" and is_one_training else 0
    return {
        **record,
        "selection": record["selection"].replace("these same images", "the held-out images").replace("_", " "),
        "selected_on_held_out": "same images" in record["selection"],
        "held_out_from_same_source": "chosen with seed" in record["dataset"]["held_out"],
        "results": [
            {"metric": key, "value": value}
            for key, value in record["metrics"].items()
            if key in METRIC_TITLES or key == record["metric"]
        ],
        "probes": [
            (key.removeprefix("probe_").replace("_", " "), value)
            for key, value in record["metrics"].items()
            if key.startswith("probe_")
        ],
        "settings": [
            (key.replace("_", " "), value)
            for key, value in record["training"].items()
            if value is not None and key not in hidden and not (key in _NEUTRAL and value == _NEUTRAL[key])
        ],
        "earlier": earlier,  # the last first
        "runs_from_scratch": runs_from_scratch,
    }


def _evaluation(evaluation: Evaluation, records: ModelRecords) -> dict[str, Any]:
    """results.json of an evaluation, and what follows from it."""
    record, is_multi_label = evaluation.record, evaluation.record["threshold"] is not None
    key, title = ("average_precision", "average precision") if is_multi_label else ("f1", "F1")
    classes = [row for row in record["per_class"] if row["n"]]
    by_score = sorted(classes, key=lambda row: row[key])
    # A metric may have no value, e.g. for labels that no image has.
    results = [{**one, "interval": interval_of(one)} for one in record["results"] if not math.isnan(one["value"])]
    main = {**evaluation.main, "interval": interval_of(evaluation.main)}
    figures = {file: alt for file, alt in _FIGURES.items() if file in evaluation.figures}
    if len(record["per_class"]) > _ALL_CLASSES_UP_TO and "per_class.png" in evaluation.figures:
        figures["per_class.png"] = "Scores of classes"
    examples = record["examples"]
    return {
        **record,
        "title": evaluation.title,
        "folder": evaluation.folder,
        "is_multi_label": is_multi_label,
        "results": results,
        "metrics": [one["metric"] for one in results],
        "main": main,
        "num_bins": NUM_BINS,
        "classes": classes if len(classes) <= _ALL_CLASSES_UP_TO else by_score[:_WORST_CLASSES],
        "num_classes": len(classes),
        "class_metric": title,
        "most_frequent": None if is_multi_label else max(classes, key=lambda row: row["n"], default=None),
        "figures": list(figures.items()),
        "examples": examples if examples and examples["figure"] in evaluation.figures else None,
        # For the limits
        "is_small": record["n"] < _FEW_IMAGES and main["interval"] is not None,
        "absent": [row["label"] for row in record["per_class"] if not row["n"]],
        "few": [row["label"] for row in classes if row["n"] < _FEW_IMAGES_OF_A_CLASS],
        "few_images": _FEW_IMAGES_OF_A_CLASS,
        "worst": {**by_score[0], "score": by_score[0][key]} if by_score and by_score[0][key] < 1 else None,
        "confusions": _confusions(record),
        "calibration": _calibration(record),
    }


def _confusions(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The three most frequent confusions: the images of a class that were taken for another."""
    matrix, labels = record["confusion_matrix"].get("rows_true_columns_predicted"), record["confusion_matrix"]["labels"]
    if matrix is None:  # of several labels
        return []
    counts = np.array(matrix)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:3]
    pairs = [(int(row), int(column)) for row, column in zip(*np.unravel_index(order, counts.shape))]
    return [
        {
            "label": labels[row],
            "prediction": labels[column],
            "n": matrix[row][column],
            "of": record["per_class"][row]["n"],
        }
        for row, column in pairs
        if counts[row, column]
    ]


def _calibration(record: dict[str, Any]) -> str | None:
    """Whether confidence and accuracy differ by more than chance makes them; None if not, or if that is not known."""
    confidence, accuracy = record["reliability"]["mean_confidence"], record["reliability"]["mean_accuracy"]
    main = next((one for one in record["results"] if one["metric"] == "accuracy"), {})
    interval = main.get("wilson_interval")
    if interval is None or interval[0] <= confidence <= interval[1]:
        return None
    return "overconfident" if confidence > accuracy else "underconfident"
