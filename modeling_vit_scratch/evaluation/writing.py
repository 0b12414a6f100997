# SPDX-License-Identifier: Apache-2.0
"""What a report leaves: results.json, predictions.csv, figures, and a table for the screen."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor

from ..common.names import NO_PERCENT, title_of
from ..data.sources import listed
from ..modeling_vit_scratch import ViTScratchForImageClassification
from .arguments import EvaluationArguments
from .calibration import store_temperature
from .data import EvaluationData
from .examples import draw_examples
from .metrics import interval_of
from .report import EXAMPLES_FIGURE, Report


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
        files.append(folder / EXAMPLES_FIGURE)
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
    intervals = [interval_of(result) for result in record["results"]]
    lines.append(f"{'':<28}{'value':>9}" + ("   95 % interval" if any(intervals) else ""))
    for result, interval in zip(record["results"], intervals):
        show = (lambda x: f"{x:.4f}") if result["metric"] in NO_PERCENT else (lambda x: f"{100 * x:.2f} %")
        line = f"{title_of(result['metric']):<28}{show(result['value']):>9}"
        if interval is not None:
            line += f"   {show(interval[0])} to {show(interval[1])}"
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
