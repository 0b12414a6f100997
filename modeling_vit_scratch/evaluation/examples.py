# SPDX-License-Identifier: Apache-2.0
"""A few images that a model gets right and a few that it gets wrong, at random, and where it looks (rollout)."""

from pathlib import Path

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor

from ..data.dataset import ImageClassificationDataset
from ..data.pixels import Normalize
from ..modeling_vit_scratch import ViTScratchForImageClassification
from ..visualization.attention import rollout_maps
from ..visualization.figures import over_photo
from ..visualization.photos import as_pixels
from .data import EvaluationData
from .report import Report


_NAME = 18  # letters of a class that are shown


def draw_examples(
    report: Report,
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


def _told(report: Report, row: int, kind: str) -> str:
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
