# SPDX-License-Identifier: Apache-2.0
"""The figures of a report: confusion matrix or precision-recall curves, reliability diagram, classes, and examples."""

from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score, precision_recall_curve
from transformers.image_processing_utils import BaseImageProcessor

from modeling_vit_scratch.data.collation import Normalize
from modeling_vit_scratch.data.dataset import ImageClassificationDataset
from modeling_vit_scratch.evaluation.data import EvaluationData
from modeling_vit_scratch.evaluation.metrics import value_of
from modeling_vit_scratch.evaluation.report import EXAMPLES_FIGURE, Report
from modeling_vit_scratch.modeling_vit_scratch import ViTScratchForImageClassification
from modeling_vit_scratch.visualization.arrays import as_pixels, rollout_maps
from modeling_vit_scratch.visualization.figures import lit


# Blue and orange of Okabe and Ito, which colour-blind people can tell apart.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#666666"
_WHITE_TO_BLUE = LinearSegmentedColormap.from_list("white_to_blue", ["#ffffff", "#56B4E9", "#003f63"])
# Okabe and Ito's without black, and without yellow, which is hard to see on white.
_COLOURS = (_BLUE, _ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_NUMBERS_UP_TO = 20  # classes of which each cell is labelled
_NAMES_UP_TO = 60  # classes of which each row is labelled
_NAME_LENGTH = 18  # letters of a class above an example


def draw_report(
    report: Report,
    data: EvaluationData,
    model: ViTScratchForImageClassification,
    processor: BaseImageProcessor,
    folder: Path,
) -> list[Path]:
    """Writes the figures into the folder, and returns the files."""
    is_multi_label = report.record["threshold"] is not None
    first = ("precision_recall", _curves) if is_multi_label else ("confusion_matrix", _confusion)
    files = []
    for name, draw in (first, ("reliability", _reliability), ("per_class", _per_class)):
        files.append(folder / f"{name}.png")
        draw(report).savefig(files[-1], dpi=150)
    if report.record["examples"]:
        files.append(folder / EXAMPLES_FIGURE)
        _examples(report, data, model, processor).savefig(files[-1], dpi=120)
    return files


def _shorten(text: str, length: int = 32) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _title(report: Report) -> str:
    record = report.record
    return f"{record['model']['name']} on {record['dataset']['name']}, n = {record['n']:,}"


def _confusion(report: Report) -> Figure:
    matrix = report.record["confusion_matrix"]
    counts, names = np.array(matrix["rows_true_columns_predicted"]), list(map(_shorten, matrix["labels"]))
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    size = min(max(4.5, 0.45 * len(names) + 2), 11)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap=_WHITE_TO_BLUE, vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="true", title=_title(report))
    if len(names) <= _NAMES_UP_TO:
        font = 9 if len(names) <= _NUMBERS_UP_TO else 6
        is_long = max(map(len, names)) > 3
        axes.set_xticks(range(len(names)), names, fontsize=font, rotation=90 if is_long else 0)
        axes.set_yticks(range(len(names)), names, fontsize=font)
    else:
        axes.set(xlabel="predicted class number", ylabel="true class number")
    if len(names) <= _NUMBERS_UP_TO:
        for row, column in np.argwhere(counts > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    return figure


def _reliability(report: Report) -> Figure:
    record, of_labels = report.record, report.record["threshold"] is not None
    edges, counts, accuracy, confidences = (
        np.array(record["reliability"][name], dtype=float) for name in ("edges", "n", "accuracy", "confidence")
    )
    share, confidence = ("share with the label", "probability of a label") if of_labels else ("accuracy", "confidence")
    figure = Figure(figsize=(4.8, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    left, width, filled = edges[:-1], np.diff(edges), counts > 0
    bars = {"align": "edge", "edgecolor": "white"}
    points = {"color": _ORANGE, "markersize": 4, "label": f"at its mean {'probability' if of_labels else 'confidence'}"}
    upper.bar(left[filled], accuracy[filled], width[filled], color=_BLUE, label=f"{share} in the bin", **bars)
    upper.plot(confidences[filled], accuracy[filled], "o", clip_on=False, **points)
    upper.plot([0, 1], [0, 1], "--", color=_GREY, linewidth=1, label="perfect calibration")
    ece, temperature = value_of(record["results"], "ece"), record["temperature"]
    upper.set(ylabel=share, xlim=(0, 1), ylim=(0, 1.02))
    upper.set_title(f"{_title(report)}\nECE {100 * ece:.2f} %, temperature {temperature:.3g}", fontsize=10)
    upper.legend(loc="upper left", fontsize=8, frameon=False)
    lower.bar(left, counts, width, color=_GREY, **bars)
    lower.set(xlabel=confidence, ylabel="images")
    if of_labels:  # mostly labels that an image has not
        lower.set_yscale("symlog", linthresh=10)
        lower.set_ylabel("images x labels")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _curves(report: Report) -> Figure:
    """A precision-recall curve of all labels together, and of each if they are few; points are at the threshold."""
    values, labels, record = report.probabilities, report.labels, report.record
    names, threshold = list(map(_shorten, record["confusion_matrix"]["labels"])), record["threshold"]
    figure = Figure(figsize=(7.6, 5.2), layout="constrained")
    axes = figure.subplots()
    present = [column for column in range(len(names)) if labels[:, column].any()]
    curves = [(names[column], labels[:, column], values[:, column]) for column in present]
    if len(curves) > len(_COLOURS):
        for _, y, p in curves:
            precision, recall, _ = precision_recall_curve(y, p, drop_intermediate=True)
            axes.step(recall, precision, where="post", color=_GREY, linewidth=0.5, alpha=0.25)
        axes.plot([], [], color=_GREY, linewidth=0.5, label=f"each of {len(curves)} labels")
        curves = []
    colours, together = [*_COLOURS[: len(curves)], "black"], ("all labels together", labels.ravel(), values.ravel())
    for colour, (name, y, p) in zip(colours, [*curves, together]):
        if not y.any():
            continue
        precision, recall, _ = precision_recall_curve(y, p, drop_intermediate=True)
        width, label = 2.0 if colour == "black" else 1.2, f"{name}: {average_precision_score(y, p):.3f}"
        axes.step(recall, precision, where="post", color=colour, linewidth=width, label=label)
        given = p >= threshold
        if given.any():
            right = (given & (y == 1)).sum()
            axes.plot(right / y.sum(), right / given.sum(), "o", color=colour, markersize=6, clip_on=False)
    mean = value_of(record["results"], "mean_average_precision")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(f"{_title(report)}\nmean average precision {100 * mean:.2f} % of {len(present)} labels", fontsize=10)
    style = {"fontsize": 8, "title_fontsize": 8, "frameon": False, "alignment": "left"}
    title = f"average precision; points:\nanswers from {threshold:g} on"
    figure.legend(loc="outside right upper", title=title, **style)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _per_class(report: Report) -> Figure:
    key, title, kind, threshold = "f1", "F1", "classes", report.record["threshold"]
    if threshold is not None:
        key, title, kind = "average_precision", "average precision", "labels"
    table = sorted((row for row in report.record["per_class"] if row["n"]), key=lambda row: row[key])
    shown = table[:40]
    figure = Figure(figsize=(6.4, max(2.6, 0.26 * len(shown) + 1.4)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(shown))
    axes.barh(rows, [row[key] for row in shown], color="#56B4E9", label=title)
    axes.plot([row["precision"] for row in shown], rows, "D", color=_BLUE, markersize=5, label="precision")
    axes.plot([row["recall"] for row in shown], rows, "o", color=_ORANGE, markersize=5, label="recall")
    axes.set_yticks(rows, [f"{_shorten(row['label'])} ({row['n']})" for row in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set(xlim=(0, 1.02), xlabel="score" if threshold is None else f"score (threshold {threshold:g})")
    more = f"\nthe {len(shown)} {kind} with the lowest {title}" if len(table) > len(shown) else ""
    axes.set_title(f"{_title(report)}{more}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _examples(
    report: Report, data: EvaluationData, model: ViTScratchForImageClassification, processor: BaseImageProcessor
) -> Figure:
    """The examples in the record: each image as the model sees it, and lit by attention rollout."""
    examples = report.record["examples"]
    rows, num_right = examples["rows"], examples["right"]
    groups = [(kind, chosen) for kind, chosen in (("right", rows[:num_right]), ("wrong", rows[num_right:])) if chosen]
    columns = max(len(chosen) for _, chosen in groups)
    dataset = ImageClassificationDataset(data.examples, processor, model.config.num_channels)
    normalize = Normalize(processor)
    figure = Figure(figsize=(1.5 * max(columns, 2) + 0.4, 3.7 * len(groups)), layout="constrained")
    grid = figure.subplots(2 * len(groups), columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for (kind, chosen), pair in zip(groups, grid.reshape(len(groups), 2, columns)):
        for (plain, looks), row in zip(pair.T, chosen):
            pixel_values = normalize(dataset[int(report.rows[row])]["pixel_values"][None])  # (1, C, H, W)
            photo = as_pixels(pixel_values, processor)[0]
            plain.imshow(photo, interpolation="nearest")
            looks.imshow(lit(photo, rollout_maps(model, pixel_values)[0]), interpolation="nearest")
            label, prediction = _label_and_prediction(report, row)
            plain.set_title(prediction if kind == "right" else f"{label},\ntaken for {prediction}", fontsize=7.5)
    figure.suptitle(f"{report.record['model']['name']} on {report.record['dataset']['name']}", fontsize=9)
    return figure


def _label_and_prediction(report: Report, row: int) -> tuple[str, str]:
    names, threshold = report.record["confusion_matrix"]["labels"], report.record["threshold"]
    values, labels = report.probabilities[row], report.labels[row]
    if threshold is None:
        best = int(values.argmax())
        prediction = f"{_shorten(names[best], _NAME_LENGTH)}, {100 * values[best]:.0f} %"
        return _shorten(names[labels], _NAME_LENGTH), prediction
    label, prediction = (", ".join(names[k] for k in np.flatnonzero(row)) for row in (labels, values >= threshold))
    return _shorten(label or "none", _NAME_LENGTH), _shorten(prediction or "none", _NAME_LENGTH)
