# SPDX-License-Identifier: Apache-2.0
"""
When a model should not answer with one label: sets of labels that have the right one at a chosen rate, the score from
which answers are right at a chosen rate, and how far an image is from those that the model knows. Of two halves of the
images, the first gave the temperature; the second, which the guarantees are about, gives the thresholds.
"""

import math
from typing import Any

import numpy as np
import torch
from scipy.stats import binom
from sklearn.covariance import LedoitWolf

from ..common.uncertainty import Novelty
from .metrics import confidences


CONFIDENCE = 0.95


def set_threshold(probabilities: np.ndarray, coverage: float) -> float:
    """
    The probability from which a label is in the set, from those of the right labels (N,). A new image has its label in
    the set with at least this probability: split conformal prediction, LAC (Sadinle et al., arXiv:1609.00451).
    """
    count = len(probabilities) + 1
    rank = count - math.ceil(count * coverage - 1e-9)  # minus rounding
    return float(np.sort(probabilities)[rank - 1]) if rank else 0.0  # of too few images: all labels


def score_threshold(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], accuracy: float
) -> float | None:
    """
    The lowest score from which answers are this accurate, but for a chance of 5 %: by Clopper-Pearson's bound, tested
    on the scores of the `second` images, and whether they are right, (N,) and (N,), in a fixed sequence that the
    `first` choose (Angelopoulos et al., arXiv:2110.01052). None if that holds for no score.
    """
    candidates = np.unique([0.0, *np.quantile(first[0], np.linspace(0, 1, 101)[:-1], method="lower")])

    def p_values(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
        kept = confidence >= candidates[:, None]
        return binom.sf((kept & correct).sum(axis=1) - 1, kept.sum(axis=1), accuracy)

    order = np.argsort(p_values(*first), kind="stable")
    passed = np.logical_and.accumulate(p_values(*second)[order] <= 1 - CONFIDENCE)
    return float(candidates[order][passed].min()) if passed.any() else None


def fit_novelty(features: np.ndarray, labels: np.ndarray, others: np.ndarray) -> Novelty:
    """Classes from features (N, D) and labels (N,), with one covariance; the usual distances from `others` (M, D)."""
    used, index = np.unique(labels, return_inverse=True)
    means = np.stack([features[index == label].mean(axis=0) for label in range(len(used))])
    covariance = LedoitWolf(assume_centered=True).fit(features - means[index]).covariance_
    covariance += 1e-6 * np.eye(len(covariance))  # of one image per class it would be 0
    whitening, means, others = (
        torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        for values in (np.linalg.cholesky(np.linalg.inv(covariance)), means, others)
    )
    novelty = Novelty(whitening, means @ whitening, torch.empty(0))
    return novelty._replace(distances=novelty.distances_of(others).sort().values)


def fit_thresholds(
    values: np.ndarray, labels: np.ndarray, first: np.ndarray, second: np.ndarray, coverage: float, accuracy: float
) -> dict[str, Any]:
    """Both thresholds, from probabilities (N, K) and labels (N,) of two halves, and what they do to the first one."""
    confidence, correct = confidences(values, labels)
    of_label = values[np.arange(len(labels)), labels]
    threshold = set_threshold(of_label[second], coverage)
    score = score_threshold(*((confidence[half], correct[half]) for half in (first, second)), accuracy)
    record = {
        "coverage": coverage, "set_threshold": threshold,
        "measured_coverage": float(((of_label >= threshold) | correct)[first].mean()),
        "mean_set_size": float((values[first] >= threshold).sum(axis=1).clip(min=1).mean()),
        "min_accuracy": accuracy, "score_threshold": score, "n": len(second), "n_measured": len(first),
        "share_kept": None, "accuracy_of_kept": None,
    }  # fmt: skip
    if score is not None:
        kept = confidence[first] >= score  # some: the candidates are scores of these images, or 0
        record |= {"share_kept": float(kept.mean()), "accuracy_of_kept": float(correct[first][kept].mean())}
    return record
