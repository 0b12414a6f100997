# SPDX-License-Identifier: Apache-2.0
"""The files of a report: results.json, predictions.csv and figures; and its message for the screen."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor

from ..common.records import NO_PERCENT, interval_of, title_of
from ..data.sources import listed
from ..modeling_vit_scratch import ViTScratchForImageClassification
from .arguments import EvaluationArguments
from .data import EvaluationData
from .report import EXAMPLES_FIGURE, Report, store_temperature


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
    paths = [data.examples.images[row]["image"]["path"] for row in report.rows.tolist()]
    images = [Path(path).name if path else str(row) for path, row in zip(paths, report.rows.tolist())]
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
        from .figures import draw_examples, draw_report
    except ImportError:
        print('No figures: they are drawn with matplotlib, pip install -e ".[plot]"')
        return files
    files += draw_report(report, folder)
    if report.record["examples"]:
        files.append(folder / EXAMPLES_FIGURE)
        draw_examples(report, data, model, processor, files[-1])
    return files


def _prediction_rows(report: Report, images: list[str]) -> Iterator[list[str]]:
    """Rows of predictions.csv. With several labels, all that an image has and gets, and the score of every label."""
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


def report_message(report: Report, data: EvaluationData, arguments: EvaluationArguments, files: list[Path]) -> str:
    """The report in some lines for the screen, with the names of its files."""
    record = report.record
    lines = [
        f"{record['model']['name']} on {record['dataset']['name']}: {record['n']:,} images.",
        f"Images: {record['dataset']['images']}.",
        "",
    ]
    intervals = [interval_of(result) for result in record["results"]]
    lines.append(f"{'':<28}{'value':>9}" + ("   95 % interval" if any(intervals) else ""))
    for result, interval in zip(record["results"], intervals):
        show = "{:.4f}".format if result["metric"] in NO_PERCENT else lambda x: f"{100 * x:.2f} %"
        line = f"{title_of(result['metric']):<28}{show(result['value']):>9}"
        lines.append(line if interval is None else f"{line}   {show(interval[0])} to {show(interval[1])}")
    key, title = ("f1", "F1") if report.threshold is None else ("average_precision", "average precision")
    worst = sorted((row for row in record["per_class"] if row["n"]), key=lambda row: row[key])[:5]
    lines += ["", f"Lowest {title}: " + ", ".join(f"{row['label']} {row[key]:.3f} (n {row['n']})" for row in worst)]
    if report.threshold is not None:
        lines.append(f"Minimum probability of a label: {report.threshold:g} (--threshold).")
        absent = [row["label"] for row in record["per_class"] if not row["n"]]
        if absent:
            lines.append(f"No image has {listed(absent)}: left out of the mean average precision.")
    if data.broken:
        names = listed(list(data.broken.values()))
        lines.append(f"{len(data.broken)} images can't be read and were left out: {names}.")
    rate = record["throughput"]["images_per_second"]
    if rate:
        lines.append(f"{rate:,.0f} images per second on {record['hardware']}.")
    if record["temperature"] != 1.0:
        lines.append(f"Temperature: {record['temperature']:.4f}.")
    if record["calibration"]:
        lines.append(_calibration_message(record["calibration"], arguments.model))
    return "\n".join([*lines, "Written: " + ", ".join(map(str, files))])


def _calibration_message(calibration: dict[str, Any], model: str) -> str:
    before, after = (
        {one["metric"]: one["value"] for one in calibration[name]}
        for name in ("without_temperature", "with_fitted_temperature")
    )
    if calibration["is_stored"]:
        outcome = f"It is in {model}/config.json."
    else:
        outcome = "It does not help, and was not stored. More images may give a better one."
    return (
        f"Temperature {calibration['fitted_temperature']:.4f}, fitted to {calibration['fitted_to']:,} other images: "
        f"NLL {before['nll']:.4f} to {after['nll']:.4f}, ECE {before['ece']:.2%} to {after['ece']:.2%}. {outcome}"
    )
