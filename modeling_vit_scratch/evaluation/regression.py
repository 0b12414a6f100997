# SPDX-License-Identifier: Apache-2.0
"""The report on a model that predicts a number: RMSE, MAE and R2 with 95 % intervals, and every prediction."""

import csv
import json
from pathlib import Path

import numpy as np

from ..common.files import write_text
from ..common.records import provenance, title_of
from .arguments import EvaluationArguments
from .data import EvaluationData
from .metrics import regression_scores
from .predictions import Predictions


def write_regression(data: EvaluationData, predictions: Predictions, arguments: EvaluationArguments) -> str:
    """Writes regression.json and predictions.csv into --output_dir; returns lines for the screen."""
    values, targets = predictions.logits.mean(axis=1)[:, 0], np.asarray(predictions.labels)
    scores, generator = regression_scores(values, targets), np.random.default_rng(arguments.seed)
    draws = generator.integers(len(values), size=(arguments.bootstrap_resamples, len(values)))
    resampled = [regression_scores(values[rows], targets[rows]) for rows in draws]
    lines = [f"{Path(arguments.model).name} on {data.source.name}: {len(values):,} images ({data.description})."]
    results = []
    for name, value in scores.items():
        ends = np.quantile([one[name] for one in resampled], [0.025, 0.975]).tolist() if resampled else None
        results.append({"metric": name, "value": value, "n": len(values), "interval": ends})
        interval = f"   95 % interval {ends[0]:.4f} to {ends[1]:.4f}" if ends else ""
        lines.append(f"{title_of(name):<8}{value:>10.4f}{interval}")
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"results": results, "seen_in_training": data.seen_in_training, **provenance("scikit-learn")}
    write_text(folder / "regression.json", json.dumps(record, indent=2) + "\n")
    with open(folder / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        rows = ([data.examples.name(index), *pair] for index, pair in enumerate(zip(targets, values)))
        csv.writer(file).writerows([["image", "label", "prediction"], *rows])
    return "\n".join([*lines, f"Written: {folder / 'regression.json'}, {folder / 'predictions.csv'}"])
