# SPDX-License-Identifier: Apache-2.0
"""Metrics during training, by `evaluate` and scikit-learn. They work offline: nothing is loaded from the Hub."""

import warnings
from collections.abc import Callable

import datasets
import evaluate
import numpy as np
import torch
from sklearn.metrics import accuracy_score, average_precision_score, f1_score
from transformers import EvalPrediction


TOP_K = 5


class ImageClassificationMetric(evaluate.Metric):
    """
    Accuracy, top-5 accuracy (with more than five classes) and macro F1.

    `compute(predictions=, references=)` takes the classes of the highest logits, best first, (N, k), and the true
    classes (N,).
    """

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, top-5 accuracy and macro F1 of ranked predictions.",
            citation="",
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        ranked, labels = np.asarray(predictions), np.asarray(references)  # (N, k), (N,)
        scores = {"accuracy": float(accuracy_score(labels, ranked[:, 0]))}
        if self.num_labels > TOP_K:
            scores["top5_accuracy"] = float((ranked[:, :TOP_K] == labels[:, None]).any(axis=1).mean())
        # Over the classes that occur, in the labels or in the predictions: scikit-learn's own default.
        scores["macro_f1"] = float(f1_score(labels, ranked[:, 0], average="macro", zero_division=0))
        return scores


class MultiLabelMetric(evaluate.Metric):
    """
    `multi_label_scores` with the threshold 0.5, for images with any number of labels.

    `compute(predictions=, references=)` takes logits (N, K), and labels of 0 and 1, (N, K).
    """

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        values = datasets.List(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description="Mean average precision, micro, macro and samples F1 and exact match.",
            citation="",
            features=datasets.Features({"predictions": values, "references": values}),
        )

    def _compute(self, predictions: list[list[float]], references: list[list[float]]) -> dict[str, float]:
        logits, labels = np.asarray(predictions), np.asarray(references) > 0.5
        return multi_label_scores(logits, labels, logits >= 0)


def multi_label_scores(values: np.ndarray, labels: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    """
    Mean average precision, micro, macro and samples F1 and exact match. Average precision is over the labels that some
    image has, F1 over the labels (macro) or images (samples) with a label or an answer; 0 where there is none.

    Args:
        values: logits or probabilities (N, K).
        labels, answers: 0 and 1, (N, K).
    """
    present = labels.any(axis=0)
    scores = {"mean_average_precision": 0.0}
    if present.any():
        mean = average_precision_score(labels[:, present], values[:, present], average="macro")
        scores["mean_average_precision"] = float(mean)
    for average in ("micro", "macro", "samples"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty mean
            value = f1_score(labels, answers, average=average, zero_division=np.nan)
        scores[f"{average}_f1"] = float(np.nan_to_num(value))
    return scores | {"exact_match": float((labels == answers).all(axis=1).mean())}


def rank_labels(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """For `Trainer(preprocess_logits_for_metrics=)`: logits (B, K) to the best classes (B, up to 5), best first."""
    return logits.topk(min(TOP_K, logits.shape[-1]), dim=-1).indices


def build_compute_metrics(num_labels: int, is_multi_label: bool = False) -> Callable[..., dict[str, float]]:
    """
    For `Trainer(compute_metrics=)`, with and without `batch_eval_metrics`: the metrics, and the number of `images`.
    Predictions are those of `rank_labels`, or logits if images have several labels.
    """
    metric, images = MultiLabelMetric() if is_multi_label else ImageClassificationMetric(num_labels), 0

    def compute_metrics(prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        nonlocal images
        ranked, labels = (
            torch.as_tensor(part).cpu().numpy() for part in (prediction.predictions, prediction.label_ids)
        )
        metric.add_batch(predictions=ranked, references=labels)
        images += len(labels)
        if not compute_result:
            return {}
        scores, images = {**metric.compute(), "images": images}, 0
        return scores

    return compute_metrics
