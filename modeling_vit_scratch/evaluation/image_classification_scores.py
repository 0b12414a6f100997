# SPDX-License-Identifier: Apache-2.0
"""The scores of `metrics` and `multi_label` as metrics of `evaluate`: `evaluate.load` of this file's path, offline."""

import datasets
import evaluate
import numpy as np

from .metrics import score
from .multi_label import score_labels


class ImageClassificationScores(evaluate.Metric):
    """
    Accuracy, top-5 accuracy, macro F1, NLL, Brier score and ECE of probabilities; `evaluate.load(path, "multi_label")`
    gives those of images with any number of labels: average precision, F1, exact match, Hamming loss, ...

    `compute(predictions=, references=)` takes probabilities (N, K) and the true classes (N,), or 0 and 1 (N, K); for
    several labels also `threshold=`, the least probability of an answer, 0.5 by default.
    """

    def _info(self) -> evaluate.MetricInfo:
        value, one = datasets.List(datasets.Value("float64")), datasets.Value("int64")
        references = datasets.List(one) if self.config_name == "multi_label" else one
        return evaluate.MetricInfo(
            description="Scores of the probabilities of image classes, or of any number of labels.",
            citation="",
            features=datasets.Features({"predictions": value, "references": references}),
        )

    def _compute(
        self, predictions: list[list[float]], references: list[int] | list[list[int]], threshold: float = 0.5
    ) -> dict[str, float]:
        values, labels = np.asarray(predictions), np.asarray(references)
        is_multi_label = self.config_name == "multi_label"
        scores = score_labels(values, labels, threshold, 0) if is_multi_label else score(values, labels, resamples=0)
        return {one.metric: one.value for one in scores}
