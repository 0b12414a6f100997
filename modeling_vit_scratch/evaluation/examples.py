# SPDX-License-Identifier: Apache-2.0
"""A few images that a model gets right and a few that it gets wrong, at random, and where it looks (rollout)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor

from ..modeling_vit_scratch import ViTScratchForImageClassification
from ..training.examples import ImageClassificationDataset
from ..training.pixels import Normalize
from ..visualization.attention import rollout_maps
from ..visualization.figures import over_photo
from ..visualization.photos import as_pixels
from .data import EvaluationData


if TYPE_CHECKING:
    from .report import Report

FIGURE = "examples.png"
_NAME = 18  # letters of a class that are shown


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
        "figure": FIGURE, "right": len(right), "wrong": len(wrong), "rows": [*right, *wrong],
        "chosen": f"chosen at random with seed {seed}", "credit": credit,
    }  # fmt: skip


def draw_examples(
    report: "Report",
    data: EvaluationData,
    model: ViTScratchForImageClassification,
    processor: BaseImageProcessor,
    file: Path,
) -> None:
    """
    Writes the figure: for each image what the model sees, and this lit where it looks.

    Args:
        report: with `examples` in its record.
        data: that the report is of.
        model, processor: that it is of.
        file: .png to write.
    """
    from matplotlib.figure import Figure

    facts, rows = report.record["examples"], report.record["examples"]["rows"]
    groups = [("right", rows[: facts["right"]]), ("wrong", rows[facts["right"] :])]
    groups = [(kind, chosen) for kind, chosen in groups if chosen]
    columns = max(len(chosen) for _, chosen in groups)
    dataset = ImageClassificationDataset(data.examples, processor, model.config.num_channels)
    normalize = Normalize.from_processor(processor)
    figure = Figure(figsize=(1.5 * max(columns, 2) + 0.4, 3.7 * len(groups)), layout="constrained")
    grid = figure.subplots(2 * len(groups), columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for (kind, chosen), pair in zip(groups, grid.reshape(len(groups), 2, columns)):
        for (plain, lit), row in zip(pair.T, chosen):
            pixel_values = dataset[int(report.rows[row])]["pixel_values"][None]  # (1, C, H, W)
            pixel_values = pixel_values if normalize is None else normalize(pixel_values)
            photo = as_pixels(pixel_values, processor)[0]
            plain.imshow(photo, interpolation="nearest")
            light = over_photo(rollout_maps(model, pixel_values)[0], *photo.shape[:2])
            lit.imshow(photo / 255 * light[..., None], interpolation="nearest")
            plain.set_title(_told(report, row, kind), fontsize=7.5)
    record = report.record
    figure.suptitle(f"{record['model']['name']} on {record['dataset']['name']}", fontsize=9)
    figure.savefig(file, dpi=120)


def _told(report: "Report", row: int, kind: str) -> str:
    """What an image is and what the model takes it for."""
    names, values, labels = report.label_names, report.probabilities[row], report.labels[row]
    if report.threshold is None:
        best = int(values.argmax())
        answer = f"{_short(names[best])}, {100 * values[best]:.0f} %"
        return answer if kind == "right" else f"{_short(names[labels])},\ntaken for {answer}"
    has, gets = (_short(", ".join(names[k] for k in np.flatnonzero(some)) or "none") for some in
                 (labels, values >= report.threshold))  # fmt: skip
    return has if kind == "right" else f"{has},\ntaken for {gets}"


def _short(text: str) -> str:
    return text if len(text) <= _NAME else text[: _NAME - 1] + "…"
