# SPDX-License-Identifier: Apache-2.0
"""
Metrics during training, by `evaluate` and scikit-learn. They work offline: nothing is loaded from the Hub. The two are
imported when there is something to measure: by then a run has begun to train.
"""

from collections.abc import Callable

import torch
from transformers import EvalPrediction

from .arguments import TOP_K


# The keys of `metrics.multi_label_scores`.
MULTI_LABEL = ("mean_average_precision", "micro_f1", "macro_f1", "samples_f1", "exact_match")


def rank_labels(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """For `Trainer(preprocess_logits_for_metrics=)`: logits (B, K) to the best classes (B, up to 5), best first."""
    return logits.topk(min(TOP_K, logits.shape[-1]), dim=-1).indices


def build_compute_metrics(
    num_labels: int, is_multi_label: bool = False, is_regression: bool = False
) -> Callable[..., dict[str, float]]:
    """
    For `Trainer(compute_metrics=)`, with and without `batch_eval_metrics`: metrics and the number of `images`. Its
    attribute `names` has the names of metrics that are the same for any images; empty for regression.
    """
    metric, images = None, 0

    def compute_metrics(prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        nonlocal metric, images
        if metric is None:
            from .classification_metric import ImageClassificationMetric

            metric = ImageClassificationMetric(num_labels, is_multi_label, is_regression)
        parts = prediction.predictions, prediction.label_ids
        ranked, labels = (torch.as_tensor(part).cpu().numpy() for part in parts)
        metric.add_batch(predictions=ranked, references=labels.reshape(-1, 1) if is_regression else labels)
        images += len(labels)
        if not compute_result:
            return {}
        scores, images = {**metric.compute(), "images": images}, 0
        return scores

    names = MULTI_LABEL if is_multi_label else ("accuracy", "macro_f1", *(["top5_accuracy"] * (num_labels > TOP_K)))
    compute_metrics.names = () if is_regression else names
    return compute_metrics
