# SPDX-License-Identifier: Apache-2.0
"""
From probabilities to scores, in float64: what is right, how sure it was, and how far a score may be off by chance.

N images, K labels. A problem is of one label for each image (softmax) or of several (sigmoid, see `multi_label`).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import expit, logsumexp
from scipy.stats import binomtest, bootstrap
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support


NUM_BINS = 15  # Guo et al., arXiv:1706.04599
TOP_K = 5
# A probability below this counts as this in a logarithm: the smallest normal float64.
_TINY = np.finfo(np.float64).tiny

DEFINITIONS = {
    "accuracy": "sklearn.metrics.accuracy_score of the likeliest class",
    "top5_accuracy": "sklearn.metrics.top_k_accuracy_score(k=5)",
    "nll": "sklearn.metrics.log_loss, in nats",
    "brier": "sklearn.metrics.brier_score_loss(scale_by_half=False): the sum over the classes of (p - y)^2, 0 to 2",
    "macro_f1": "sklearn.metrics.f1_score(average='macro'): over the classes that occur in labels or answers",
    "ece": "Guo et al., arXiv:1706.04599: the probability of the likeliest class against whether it is right, in 15 "
    "equal bins",
    "adaptive_ece": "Nixon et al., arXiv:1904.01685: the same in 15 bins of equal numbers of images",
}


def probabilities(logits: np.ndarray, temperature: float = 1.0, is_multi_label: bool = False) -> np.ndarray:
    """
    Logits (N, K), or (N, V, K) of V views of each image, to probabilities (N, K): softmax or sigmoid of the logits
    over the temperature, then the mean over the views.
    """
    logits = np.asarray(logits, dtype=np.float64) / temperature
    values = expit(logits) if is_multi_label else np.exp(logits - logsumexp(logits, axis=-1, keepdims=True))
    return values if values.ndim == 2 else values.mean(axis=1)


def negative_log_likelihoods(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """
    Of each image, (N,), in nats: -log p of its class; with labels (N, K) of 0 and 1, the mean of the K binary ones.
    """
    values = np.clip(values, _TINY, 1.0)
    if labels.ndim == 1:
        return -np.log(values[np.arange(len(labels)), labels])
    others = np.clip(1.0 - values, _TINY, 1.0)
    return -np.where(labels == 1, np.log(values), np.log(others)).mean(axis=1)


def brier_scores(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """
    Of each image, (N,): the sum over the classes of (p - y)^2, from 0 to 2 (Brier 1950); with labels (N, K) the mean
    over the K labels, from 0 to 1.
    """
    if labels.ndim == 1:
        return (values**2).sum(axis=1) - 2 * values[np.arange(len(labels)), labels] + 1.0
    return ((values - labels) ** 2).mean(axis=1)


@dataclass(frozen=True)
class Reliability:
    """
    What a reliability diagram shows: confidences in bins, and how often they were right.

    Attributes:
        edges: (bins + 1,); a bin has its upper edge and not its lower one.
        counts, confidence, accuracy: (bins,); means over the bin, NaN where it is empty.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def expected_error(self) -> float:
        """ECE: the mean of `|accuracy - confidence|` over the bins, weighted by their counts."""
        filled = self.counts > 0
        gaps = np.abs(self.accuracy[filled] - self.confidence[filled])
        return float((gaps * self.counts[filled]).sum() / self.counts.sum())


def reliability(
    confidence: np.ndarray, correct: np.ndarray, bins: int = NUM_BINS, equal_mass: bool = False
) -> Reliability:
    """
    Bins of equal width from 0 to 1 (Guo et al., arXiv:1706.04599), or of equal numbers of images (the adaptive ECE of
    Nixon et al., arXiv:1904.01685).

    Args:
        confidence: (N,), 0 to 1.
        correct: (N,), whether it was right.
        bins: how many.
        equal_mass: the second kind.
    """
    edges = np.linspace(0.0, 1.0, bins + 1)
    if equal_mass:
        # By rank, so that equal confidences do not empty a bin.
        rank = np.argsort(np.argsort(confidence, kind="stable"), kind="stable")
        which = rank * bins // len(confidence)
        inner = [confidence[which >= number].min(initial=1.0) for number in range(1, bins)]
        edges = np.array([0.0, *inner, 1.0])
    else:
        which = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(which, values, minlength=bins) / counts for values in (confidence, correct)]
    return Reliability(edges, counts, *means)


def confidences(values: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    What a reliability diagram compares: the probability of the likeliest class and whether it is right, (N,); with
    labels (N, K) the probability of each of them and whether the image has it, (N * K,).
    """
    if labels.ndim == 1:
        return values.max(axis=1), values.argmax(axis=1) == labels
    return values.ravel(), labels.ravel()


@dataclass(frozen=True)
class Score:
    """
    A metric, its value, and its 95 % percentile bootstrap interval over images; `more` is for results.json alone.
    """

    metric: str
    value: float
    n: int
    interval: tuple[float, float] | None
    wilson_interval: tuple[float, float] | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """As results.json has it."""
        facts = {"metric": self.metric, "value": self.value, "n": self.n, "interval": self.interval}
        facts |= {} if self.wilson_interval is None else {"wilson_interval": self.wilson_interval}
        return facts | self.more


def interval_of(result: dict[str, Any]) -> list[float] | None:
    """
    The interval to show for a result of results.json: for fractions of images Wilson's, which also says something where
    all are right; for others the bootstrap's; None if it has none.
    """
    return result.get("wilson_interval") or result.get("interval")


def score(
    values: np.ndarray, labels: np.ndarray, resamples: int = 1000, seed: int = 0, bins: int = NUM_BINS
) -> list[Score]:
    """
    Every score, each with a bootstrap interval: images are drawn anew with replacement, `resamples` times.

    The bootstrap interval of an accuracy of 1 is [1, 1], which is no news; accuracies therefore have Wilson's too.

    Args:
        values: probabilities (N, K).
        labels: classes (N,).
        resamples: 0 for no intervals.
        seed: of the resamples.
        bins: of ECE.
    """
    confidence, correct = confidences(values, labels)
    best = values.argmax(axis=1)
    means = {
        "accuracy": correct.astype(np.float64),
        **_top_k(values, labels),
        "nll": negative_log_likelihoods(values, labels),
        "brier": brier_scores(values, labels),
    }
    others = {"macro_f1": lambda rows: _macro_f1(labels[rows], best[rows], values.shape[1])}
    for name, equal_mass in (("ece", False), ("adaptive_ece", True)):

        def error(rows: np.ndarray, equal_mass: bool = equal_mass) -> float:
            return reliability(confidence[rows], correct[rows], bins, equal_mass).expected_error

        others[name] = error
    n, scores = len(labels), []
    for name, of_image in means.items():
        interval = bootstrap_interval(of_image, np.mean, resamples, seed, vectorized=True)
        wilson_interval = wilson(of_image) if name in ("accuracy", "top5_accuracy") else None
        more = {"definition": DEFINITIONS[name]}
        scores.append(Score(name, float(of_image.mean()), n, interval, wilson_interval, more))
    for name, statistic in others.items():
        interval = bootstrap_interval(np.arange(n), statistic, resamples, seed, vectorized=False)
        more = {"definition": DEFINITIONS[name]}
        scores.append(Score(name, float(statistic(np.arange(n))), n, interval, more=more))
    return scores


def wilson(of_image: np.ndarray) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, from what is 0 or 1 of each image."""
    bounds = binomtest(int(of_image.sum()), len(of_image)).proportion_ci(method="wilson")
    return float(bounds.low), float(bounds.high)


def _top_k(values: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Top-5 needs more than five classes to say anything."""
    if values.shape[1] <= TOP_K:
        return {}
    best = np.argpartition(-values, TOP_K - 1, axis=1)[:, :TOP_K]
    return {"top5_accuracy": (best == labels[:, None]).any(axis=1).astype(np.float64)}


def bootstrap_interval(
    data: np.ndarray, statistic: Callable[..., Any], resamples: int, seed: int, vectorized: bool
) -> tuple[float, float] | None:
    """The 95 % percentile interval of a statistic, by scipy; None without resamples or of one image."""
    if resamples < 1 or len(data) < 2:
        return None
    batch = max(1, 10_000_000 // len(data)) if vectorized else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all resamples equal, or a class that a resample lacks
        result = bootstrap(
            (data,), statistic, n_resamples=resamples, batch=batch, vectorized=vectorized, method="percentile",
            rng=np.random.default_rng(seed),
        )  # fmt: skip
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _macro_f1(labels: np.ndarray, predictions: np.ndarray, num_labels: int) -> float:
    """Over the classes that occur in either: scikit-learn's default, which is too slow for a thousand resamples."""
    found = np.bincount(labels[labels == predictions], minlength=num_labels)
    total = np.bincount(labels, minlength=num_labels) + np.bincount(predictions, minlength=num_labels)
    return float((2 * found[total > 0] / total[total > 0]).mean())


def per_class(values: np.ndarray, labels: np.ndarray, names: list[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and number of images of each class."""
    parts = precision_recall_fscore_support(labels, values.argmax(axis=1), labels=range(len(names)), zero_division=0)
    return [
        {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "n": int(n)}
        for name, p, r, f, n in zip(names, *parts)
    ]


def confusion(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(K, K): images of the row's class that were taken for the column's."""
    return confusion_matrix(labels, values.argmax(axis=1), labels=range(values.shape[1]))
