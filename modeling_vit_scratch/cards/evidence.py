# SPDX-License-Identifier: Apache-2.0
"""What a card says of how good a model is and where it fails: from the records of evaluations, or of the training."""

import math
import re
from typing import Any

import numpy as np

from ..common.metric_titles import METRIC_TITLES, title_of
from ..evaluation.metrics import NUM_BINS
from .metadata import interval_of
from .records import Evaluation, Facts
from .words import by, count, name, names, paragraphs, picture, score, share, table


_ALL_CLASSES_UP_TO = 20
_WORST = 10
# Of fewer images of a class, its scores are mostly chance.
_FEW_OF_A_CLASS = 10
_FEW = 1000


def evaluation(facts: Facts) -> str:
    """A part for each report; without any, what training found on held-out images."""
    parts = [_report(one) for one in facts.evaluations] or [_of_training(facts)]
    return paragraphs("## Evaluation", *parts)


def _of_training(facts: Facts) -> str:
    record = facts.training
    rows = [(title_of(key), score(key, value)) for key, value in record["metrics"].items() if key in METRIC_TITLES]
    if not rows:
        rows = [(name(record["metric"]), f"{record['value']:.4f}")]
    rows += [
        (f"{name(key.removeprefix('probe_').replace('_', ' '))} on frozen features", share(value))
        for key, value in record["metrics"].items()
        if key.startswith("probe_")
    ]
    return paragraphs(
        table((f"on {count(record['n'])} held-out images", ""), rows),
        f"One run, seed {record['seed']}, no intervals: `scripts/evaluate.py` gives them.",
    )


def _report(one: Evaluation) -> str:
    record, dataset = one.record, one.record["dataset"]
    url = dataset.get("url")
    title = f"[{name(one.title)}]({url})" if url else name(one.title)
    level = f"{100 * record['confidence_level']:g} % interval"
    rows = []
    for result in record["results"]:
        if math.isnan(result["value"]):  # e.g. of labels that no image has
            continue
        interval = interval_of(result)
        shown = "" if interval is None else " to ".join(score(result["metric"], bound) for bound in interval)
        n = count(result["n"])
        rows.append((title_of(result["metric"]), score(result["metric"], result["value"]), shown, n))
    which = re.sub(r"^all images", "all there are", dataset["images"])
    told = [f"{count(record['n'])} images: {name(which)}."]
    if dataset.get("seen_in_training"):
        told.append("**The model was trained on some or all of them: these numbers say nothing about new images.**")
    if record.get("threshold") is None:
        most = max(record["per_class"], key=lambda row: row["n"])
        told.append(f"Always answering {name(most['label'])} would be right for {share(most['n'] / record['n'])}.")
    if record["views"] != 1:
        told.append(f"Means over {count(record['views'])} views of each image, which the pipeline does not do.")
    if record.get("threshold") is not None:
        told.append(f"A label counts as given from a probability of {record['threshold']:g} on.")
    return paragraphs(
        f"### On {title}",
        " ".join(told),
        table(("", "value", level, "n"), rows),
        _notes(record),
        _classes(record),
        _figures(one),
        _examples(one),
        f"```bash\n{record['command']}\n```",
        _speed(record),
    )


def _notes(record: dict[str, Any]) -> str:
    told = []
    if record["bootstrap_resamples"]:
        told.append(
            f"Intervals: percentile bootstrap over the images, {count(record['bootstrap_resamples'])} resamples, seed "
            f"{record['seed']}; of shares of images that are right, Wilson's."
        )
    else:
        told.append("Intervals: Wilson's, of shares of images that are right; there was no bootstrap for the others.")
    metrics = {result["metric"] for result in record["results"]}
    if metrics & {"nll", "brier"}:
        told.append("NLL and Brier score: less is better.")
    if "ece" in metrics:
        told.append(
            "ECE: by how much the probability of an answer misses how often it is right, the mean over "
            f"{NUM_BINS} bins."
        )
    return " ".join(told)


def _classes(record: dict[str, Any]) -> str:
    is_multi_label = record.get("threshold") is not None
    rows = [row for row in record["per_class"] if row["n"]]
    main, kind = ("average_precision", "labels") if is_multi_label else ("f1", "classes")
    title = None
    if len(rows) > _ALL_CLASSES_UP_TO:
        number, rows = len(rows), sorted(rows, key=lambda row: row[main])[:_WORST]
        word = "average precision" if is_multi_label else "F1"
        title = f"The {len(rows)} of {count(number)} {kind} with the lowest {word}:"
    head = (["average precision"] if is_multi_label else []) + ["precision", "recall", "F1", "images"]
    keys = ([main] if is_multi_label else []) + ["precision", "recall", "f1"]
    cells = [[name(row["label"]), *(share(row[key]) for key in keys), count(row["n"])] for row in rows]
    return paragraphs(title, table((kind[:-1] if kind == "labels" else "class", *head), cells))


_FIGURES = {
    "confusion_matrix.png": "Confusion matrix", "precision_recall.png": "Precision and recall",
    "reliability.png": "Reliability diagram",
}  # fmt: skip


def _figures(one: Evaluation) -> str | None:
    shown = {path: told for path, told in _FIGURES.items() if path in one.figures}
    if len(one.record["per_class"]) > _ALL_CLASSES_UP_TO and "per_class.png" in one.figures:
        shown["per_class.png"] = "Scores of classes"
    width = "49%" if len(shown) > 1 else None
    return "\n".join(picture(f"{one.folder}/{path}", told, width) for path, told in shown.items()) or None


def _examples(one: Evaluation) -> str | None:
    facts = one.record.get("examples")
    if not facts or facts["figure"] not in one.figures:
        return None
    told = (
        f"{count(facts['right'])} images that it gets right and {count(facts['wrong'])} that it gets wrong, "
        f"{name(facts['chosen'])}; bright is where it looks (attention rollout). Images: {name(facts['credit'])}."
    )
    return paragraphs(picture(f"{one.folder}/{facts['figure']}", "Examples right and wrong"), told)


def _speed(record: dict[str, Any]) -> str | None:
    speed = record.get("throughput", {})
    if not speed.get("images_per_second"):
        return None
    return f"{speed['images_per_second']:,.0f} images per second on {name(record['hardware'])}: {speed['note']}."


# ---------------------------------------------------------------------------------------------------------------------
# Limits


def limits(facts: Facts) -> str:
    """Where it fails and what is not known, a line each: only what a record says."""
    lines = []
    height, width = facts.config.image_hw
    if facts.is_encoder:
        lines.append("It names nothing by itself: its features are worth what a classifier makes of them.")
        lines.append("Its loss is of the pretraining task, and no measure of how good the features are.")
    elif not facts.is_multi_label:
        lines.append(
            "It always answers with one of its classes, also for images that show something else or nothing at all."
        )
    lines.append(
        f"It sees {by((height, width))} pixels: what can't be told from a picture of that size, it can't tell."
    )
    if facts.training is not None:
        lines += _of_the_run(facts.training)
    for one in facts.evaluations:
        lines += _of_the_report(one, facts)
    return paragraphs("## Limits", "\n".join(f"- {line}" for line in dict.fromkeys(lines)))


def _of_the_run(record: dict[str, Any]) -> list[str]:
    lines = [f"One run with one seed ({record['seed']}): another seed gives other numbers."]
    if "same images" in record["selection"]:
        lines.append(
            f"Its weights were chosen by how well they do on the {count(record['n'])} held-out images, so that it "
            "looks a little better on these than it is."
        )
    dataset = record["dataset"]
    if "chosen with seed" in dataset["held_out"]:
        lines.append(
            f"The held-out images are of the same source as those it was trained on ({name(dataset['name'])}): images "
            "from elsewhere may be harder."
        )
    return lines


def _of_the_report(one: Evaluation, facts: Facts) -> list[str]:
    record, where = one.record, f"On {name(one.title)}"
    lines = []
    interval = interval_of(one.main)
    if record["n"] < _FEW and interval is not None:
        low, high = (score(record["metric"], bound) for bound in interval)
        lines.append(
            f"{where} it was tested on {count(record['n'])} images only: by chance alone, its "
            f"{METRIC_TITLES[record['metric']]} on all such images may be anything from {low} to {high}."
        )
    absent = [row["label"] for row in record["per_class"] if not row["n"]]
    few = [row["label"] for row in record["per_class"] if 0 < row["n"] < _FEW_OF_A_CLASS]
    if absent:
        lines.append(f"{where} no image was there of: {names(absent)}. Nothing is known of these.")
    if few:
        lines.append(
            f"{where} fewer than {_FEW_OF_A_CLASS} images were there of: {names(few)}. These scores say little."
        )
    lines += _worst(record, where)
    lines += _calibration(record, where, facts)
    if broken := len(record["dataset"]["broken_images"]):
        lines.append(f"{where} {count(broken)} image{'s' * (broken > 1)} could not be read: not counted.")
    return lines


def _worst(record: dict[str, Any], where: str) -> list[str]:
    main, title = ("average_precision", "average precision") if record.get("threshold") is not None else ("f1", "F1")
    rows = sorted((row for row in record["per_class"] if row["n"]), key=lambda row: row[main])
    lines = []
    if rows and rows[0][main] < 1:
        worst = rows[0]
        lines.append(
            f"{where} it is worst at {name(worst['label'])}: {title} {share(worst[main])}, of {count(worst['n'])} "
            "images."
        )
    matrix = record["confusion_matrix"].get("rows_true_columns_predicted")
    if matrix is None:
        return lines
    counts, labels = np.array(matrix), record["confusion_matrix"]["labels"]
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:3]
    pairs = [(row, column) for row, column in zip(*np.unravel_index(order, counts.shape)) if counts[row, column] > 0]
    if pairs:
        told = ", ".join(
            f"{name(labels[row])} for {name(labels[column])} ({count(matrix[row][column])} of "
            f"{count(record['per_class'][row]['n'])})"
            for row, column in pairs
        )
        lines.append(f"{where} it most often takes {told}.")
    return lines


def _calibration(record: dict[str, Any], where: str, facts: Facts) -> list[str]:
    lines = []
    confidence, accuracy = record["reliability"]["mean_confidence"], record["reliability"]["mean_accuracy"]
    main = next((score for score in record["results"] if score["metric"] == "accuracy"), {})
    interval = main.get("wilson_interval")
    # Inside of the interval, chance alone may have made the difference.
    if interval is not None and not interval[0] <= confidence <= interval[1]:
        verdict = "too sure" if confidence > accuracy else "not sure enough"
        lines.append(
            f"{where} it is {verdict}: the mean probability of its answers is {share(confidence)}, and "
            f"{share(accuracy)} of them are right."
        )
    ours = facts.config.temperature
    if record["temperature"] != ours:
        lines.append(
            f"{where} NLL, Brier score and ECE are with a temperature of {record['temperature']:.4g}, and the model "
            f"has one of {ours:.4g}: its probabilities are others. Its answers are the same."
        )
    return lines
