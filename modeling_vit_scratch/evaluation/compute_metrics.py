# SPDX-License-Identifier: Apache-2.0
"""Metrics during training, by `evaluate` and scikit-learn. They work offline: nothing is loaded from the Hub."""

import warnings
from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    mean_absolute_error,
    r2_score,
    root_mean_squared_error,
)
from transformers import EvalPrediction


TOP_K = 5


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


def regression_scores(values: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """RMSE, MAE and R2 of numbers (N,)."""
    measures = {"rmse": root_mean_squared_error, "mae": mean_absolute_error}
    measures |= {"r2": r2_score} if len(targets) > 1 else {}
    return {name: float(measure(targets, values)) for name, measure in measures.items()}


def multi_label_scores(values: np.ndarray, labels: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    """
    Mean average precision (over labels that an image has), F1 (macro and samples: over labels or images with a label or
    an answer), and exact match: of logits or probabilities, labels and answers (N, K); 0 where there is none.
    """
    present, mean = labels.any(axis=0), 0.0
    if present.any():
        mean = average_precision_score(labels[:, present], values[:, present], average="macro")
    scores = {"mean_average_precision": float(mean)}
    for average in ("micro", "macro", "samples"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty mean
            value = f1_score(labels, answers, average=average, zero_division=np.nan)
        scores[f"{average}_f1"] = float(np.nan_to_num(value))
    return scores | {"exact_match": float((labels == answers).all(axis=1).mean())}


def rank_labels(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """For `Trainer(preprocess_logits_for_metrics=)`: logits (B, K) to the best classes (B, up to 5), best first."""
    return logits.topk(min(TOP_K, logits.shape[-1]), dim=-1).indices


def build_compute_metrics(
    num_labels: int, is_multi_label: bool = False, is_regression: bool = False
) -> Callable[..., dict[str, float]]:
    """For `Trainer(compute_metrics=)`, with and without `batch_eval_metrics`: metrics and the number of `images`."""
    metric, images = ImageClassificationMetric(num_labels, is_multi_label, is_regression), 0

    def compute_metrics(prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        nonlocal images
        parts = prediction.predictions, prediction.label_ids
        ranked, labels = (torch.as_tensor(part).cpu().numpy() for part in parts)
        metric.add_batch(predictions=ranked, references=labels.reshape(-1, 1) if is_regression else labels)
        images += len(labels)
        if not compute_result:
            return {}
        scores, images = {**metric.compute(), "images": images}, 0
        return scores

    return compute_metrics
