# SPDX-License-Identifier: Apache-2.0
"""The metrics of training as one of `evaluate`'s metrics, by scikit-learn."""

from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score

from .arguments import TOP_K
from .metrics import multi_label_scores, regression_scores


class ImageClassificationMetric(evaluate.Metric):
    """
    Accuracy, top-5 accuracy (with more than five classes) and macro F1, of the best classes, best first, (N, k), and
    the true ones (N,). With several labels, `multi_label_scores` at 0.5 of logits (N, K) and labels 0 and 1 (N, K).
    """

    def __init__(self, num_labels: int, is_multi_label: bool = False, is_regression: bool = False) -> None:
        self.num_labels, self.is_multi_label, self.is_regression = num_labels, is_multi_label, is_regression
        super().__init__(keep_in_memory=True)

    def _build_data_dir(self) -> str:
        return ""  # the library's folder in HOME, which a container may lack, would hold nothing

    def _info(self) -> evaluate.MetricInfo:
        predictions, references = datasets.List(datasets.Value("int64")), datasets.Value("int64")
        if self.is_multi_label or self.is_regression:
            predictions = references = datasets.List(datasets.Value("float32"))
        features = datasets.Features({"predictions": predictions, "references": references})
        return evaluate.MetricInfo(description="Metrics of image classification.", citation="", features=features)

    def _compute(self, predictions: list[list[float]], references: list[Any]) -> dict[str, float]:
        ranked, labels = np.asarray(predictions), np.asarray(references)
        if self.is_regression:
            return regression_scores(ranked[:, 0], labels[:, 0])
        if self.is_multi_label:
            return multi_label_scores(ranked, labels > 0.5, ranked >= 0)
        scores = {"accuracy": float(accuracy_score(labels, ranked[:, 0]))}
        if self.num_labels > TOP_K:
            scores["top5_accuracy"] = float((ranked[:, :TOP_K] == labels[:, None]).any(axis=1).mean())
        # Over the classes that occur, in the labels or in the predictions: scikit-learn's own default.
        scores["macro_f1"] = float(f1_score(labels, ranked[:, 0], average="macro", zero_division=0))
        return scores
