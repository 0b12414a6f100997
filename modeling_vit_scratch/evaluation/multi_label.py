# SPDX-License-Identifier: Apache-2.0
"""
Scores of models that give each image any number of labels. N images, K labels; `labels` are 0 and 1, (N, K).

An answer is "has it" where the probability reaches the threshold. Every score is scikit-learn's: `DEFINITIONS` says
which, and what it leaves out because it is not defined there: labels that no image has, images without label and
answer.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.metrics import (
    average_precision_score,
    hamming_loss,
    multilabel_confusion_matrix,
    precision_recall_fscore_support,
)

from .compute_metrics import multi_label_scores
from .metrics import NUM_BINS, Score, bootstrap_interval, brier_scores, negative_log_likelihoods, reliability, wilson


DEFINITIONS = {
    "mean_average_precision": "sklearn.metrics.average_precision_score(average='macro') over the labels that some "
    "image has",
    "micro_average_precision": "sklearn.metrics.average_precision_score(average='micro')",
    "micro_f1": "sklearn.metrics.f1_score(average='micro')",
    "macro_f1": "sklearn.metrics.f1_score(average='macro', zero_division=numpy.nan), over the labels that some image "
    "has or gets",
    "samples_f1": "sklearn.metrics.f1_score(average='samples', zero_division=numpy.nan), over the n images that have "
    "or get a label",
    "exact_match": "sklearn.metrics.accuracy_score: all labels of an image right",
    "hamming_loss": "sklearn.metrics.hamming_loss: the share of wrong answers among N x K",
    "nll": "the mean over images and labels of sklearn.metrics.log_loss, in nats",
    "brier": "the mean over images and labels of (p - y)^2: sklearn.metrics.brier_score_loss of each label",
    "ece": "Guo et al., arXiv:1706.04599: the probability of each of the N x K pairs of image and label against "
    "whether the image has it, in 15 equal bins",
}


class AveragePrecision:
    """
    scikit-learn's average precision of each column, for images that are drawn several times or not at all: the values
    are sorted once for all resamples.

    Args:
        values, labels: (M, C).
        images: (M,), which image a row is about.
    """

    def __init__(self, values: np.ndarray, labels: np.ndarray, images: np.ndarray) -> None:
        order = np.argsort(-values, axis=0, kind="stable")
        ranked, self.images = np.take_along_axis(values, order, axis=0), images[order]
        self.labels = np.take_along_axis(labels, order, axis=0).astype(bool)
        # Of equal values, no threshold lies between: they all have the precision at the last of them.
        places = np.arange(len(values))[:, None]
        is_last = np.vstack([ranked[1:] != ranked[:-1], np.ones((1, values.shape[1]), dtype=bool)])
        ends = np.where(is_last, places, len(values))
        self.ends = np.minimum.accumulate(ends[::-1], axis=0)[::-1]

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """(C,), NaN where no image has the label; `counts` (N,) says how often each image is there."""
        weights = counts[self.images]
        found = np.where(self.labels, weights, 0)
        seen, right = weights.cumsum(axis=0), found.cumsum(axis=0)
        precision = np.divide(right, seen, out=np.zeros(seen.shape), where=seen > 0)
        total = (found * np.take_along_axis(precision, self.ends, axis=0)).sum(axis=0)
        return np.divide(total, right[-1], out=np.full(total.shape, np.nan), where=right[-1] > 0)


def score_labels(
    values: np.ndarray,
    labels: np.ndarray,
    threshold: float = 0.5,
    resamples: int = 1000,
    seed: int = 0,
    bins: int = NUM_BINS,
) -> list[Score]:
    """
    Every score, each with a bootstrap interval: images are drawn anew with replacement, `resamples` times.

    Args:
        values: probabilities (N, K).
        labels: 0 and 1, (N, K).
        threshold: the least probability of an answer.
        resamples: 0 for no intervals.
        seed: of the resamples.
        bins: of ECE.
    """
    labels, (n, number) = labels.astype(np.int64), values.shape
    answers = (values >= threshold).astype(np.int64)
    images = np.arange(n)
    exact = multi_label_scores(values, labels, answers)
    per_label = AveragePrecision(values, labels, images)
    pooled = AveragePrecision(values.reshape(-1, 1), labels.reshape(-1, 1), np.repeat(images, number))
    right, either = labels * answers, labels + answers  # twice the first over the second is F1
    of_image = np.divide(2 * right.sum(1), either.sum(1), out=np.zeros(n), where=either.any(axis=1))
    diagram = reliability(values.ravel(), labels.ravel(), bins)
    width = np.clip(np.searchsorted(diagram.edges, values.ravel(), side="left") - 1, 0, bins - 1)

    def micro_f1(counts: np.ndarray) -> float:
        return _ratio(2 * (counts @ right).sum(), (counts @ either).sum())

    def macro_f1(counts: np.ndarray) -> float:
        hits, total = 2 * (counts @ right), counts @ either
        return float((hits[total > 0] / total[total > 0]).mean()) if total.any() else 0.0

    def expected_error(counts: np.ndarray) -> float:
        weights = np.repeat(counts, number)
        gaps = np.bincount(width, weights * (labels.ravel() - values.ravel()), minlength=bins)
        return float(np.abs(gaps).sum() / weights.sum())

    def average_precision(counts: np.ndarray) -> float:
        found = per_label(counts)
        return 0.0 if np.isnan(found).all() else float(np.nanmean(found))

    means = {
        "exact_match": (answers == labels).all(axis=1).astype(np.float64),
        "hamming_loss": (answers != labels).mean(axis=1),
        "nll": negative_log_likelihoods(values, labels),
        "brier": brier_scores(values, labels),
    }
    counted: dict[str, tuple[float, Callable[[np.ndarray], float]]] = {
        "mean_average_precision": (exact["mean_average_precision"], average_precision),
        "micro_average_precision": (_micro_average_precision(labels, values), lambda counts: float(pooled(counts)[0])),
        "micro_f1": (exact["micro_f1"], micro_f1),
        "macro_f1": (exact["macro_f1"], macro_f1),
        "samples_f1": (exact["samples_f1"], lambda counts: _ratio(counts @ of_image, counts @ either.any(axis=1))),
        "ece": (diagram.expected_error, expected_error),
    }
    over = {"mean_average_precision": int(labels.any(axis=0).sum()), "macro_f1": int(either.any(axis=0).sum())}
    scores = []
    for name in DEFINITIONS:
        wilson_interval = None
        if name in means:
            value = float(means[name].mean()) if name != "hamming_loss" else float(hamming_loss(labels, answers))
            interval = bootstrap_interval(means[name], np.mean, resamples, seed, vectorized=True)
            wilson_interval = wilson(means[name]) if name == "exact_match" else None
        else:
            value, statistic = counted[name]

            def of_rows(rows: np.ndarray, statistic: Callable[[np.ndarray], float] = statistic) -> float:
                return statistic(np.bincount(rows, minlength=n))

            interval = bootstrap_interval(images, of_rows, resamples, seed, vectorized=False)
        counted_images = int(either.any(axis=1).sum()) if name == "samples_f1" else n
        facts = {"num_labels": over[name]} if name in over else {}
        facts["definition"] = DEFINITIONS[name]
        scores.append(Score(name, value, counted_images, interval, wilson_interval, facts))
    return scores


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _micro_average_precision(labels: np.ndarray, values: np.ndarray) -> float:
    return float(average_precision_score(labels, values, average="micro")) if labels.any() else float("nan")


def per_label(values: np.ndarray, labels: np.ndarray, names: list[str], threshold: float) -> list[dict[str, Any]]:
    """
    Of each label its average precision, None where no image has it; precision, recall and F1 of the answers, which
    scikit-learn sets to 0 where they are not defined; and how many images have it, `n`, and get it, `predicted`.
    """
    answers = (values >= threshold).astype(np.int64)
    parts = precision_recall_fscore_support(labels, answers, average=None, zero_division=0)
    rows = []
    for column, (name, p, r, f, n) in enumerate(zip(names, *(np.atleast_1d(part) for part in parts))):
        average = float(average_precision_score(labels[:, column], values[:, column])) if n else None
        row = {"label": name, "average_precision": average, "precision": float(p), "recall": float(r), "f1": float(f)}
        rows.append({**row, "n": int(n), "predicted": int(answers[:, column].sum())})
    return rows


def label_confusions(values: np.ndarray, labels: np.ndarray, threshold: float) -> np.ndarray:
    """(K, 2, 2): of each label the images without and with it (rows), by the answer (columns)."""
    return multilabel_confusion_matrix(labels, (values >= threshold).astype(np.int64))
