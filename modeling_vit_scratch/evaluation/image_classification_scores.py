# SPDX-License-Identifier: Apache-2.0
"""The scores of `metrics` as a metric of `evaluate`: `evaluate.load` of this file's path, with no connection."""

import datasets
import evaluate
import numpy as np

from modeling_vit_scratch.evaluation.metrics import score


class ImageClassificationScores(evaluate.Metric):
    """
    Accuracy, top-5 accuracy, macro F1, NLL, Brier score and ECE of probabilities.

    `compute(predictions=, references=)` takes probabilities (N, K) and the true classes (N,).
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, top-5 accuracy, macro F1, NLL, Brier score and ECE (15 bins) of probabilities.",
            citation="",
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[list[float]], references: list[int]) -> dict[str, float]:
        scores = score(np.asarray(predictions), np.asarray(references), resamples=0)
        return {one.metric: one.value for one in scores}
