# SPDX-License-Identifier: Apache-2.0
"""
From probabilities (N, K), of N images and K labels, to metrics in float64, each with a 95 % interval. `labels` are
classes (N,), or 0 and 1 (N, K), where an image gets every label whose probability reaches the threshold.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, logsumexp
from scipy.stats import binomtest, bootstrap
from sklearn import metrics

from ..common.records import NUM_BINS
from .arguments import TOP_K


# A probability below this counts as this in a logarithm: the smallest normal float64.
_TINY = np.finfo(np.float64).tiny
# Metrics that are the share of images that are right.
_SHARES = ("accuracy", "top5_accuracy", "exact_match")

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
# Left out is what is not defined: labels that no image has, images with neither label nor prediction.
MULTI_LABEL_DEFINITIONS = {
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


def probabilities(logits: np.ndarray, temperature: float = 1.0, is_multi_label: bool = False) -> np.ndarray:
    """
    Logits (N, K), or (N, V, K) of V views of each image, to probabilities (N, K): softmax or sigmoid of the logits
    over the temperature, then the mean over the views.
    """
    logits = np.asarray(logits, dtype=np.float64) / temperature
    values = expit(logits) if is_multi_label else np.exp(logits - logsumexp(logits, axis=-1, keepdims=True))
    return values if values.ndim == 2 else values.mean(axis=1)


def negative_log_likelihoods(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each image, (N,), in nats; with labels (N, K) the mean of its K binary ones."""
    values = np.clip(values, _TINY, 1.0)
    if labels.ndim == 1:
        return -np.log(values[np.arange(len(labels)), labels])
    others = np.clip(1.0 - values, _TINY, 1.0)
    return -np.where(labels == 1, np.log(values), np.log(others)).mean(axis=1)


def brier_scores(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Brier score of each image, (N,): the sum over classes of (p - y)^2, 0 to 2; for (N, K) the mean, 0 to 1."""
    if labels.ndim == 1:
        return (values**2).sum(axis=1) - 2 * values[np.arange(len(labels)), labels] + 1.0
    return ((values - labels) ** 2).mean(axis=1)


@dataclass(frozen=True)
class Reliability:
    """Confidences in bins, and how often they were right: (bins,), means over the bin, NaN where it is empty."""

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def expected_error(self) -> float:
        """ECE: the mean of `|accuracy - confidence|` over the bins, weighted by their counts."""
        filled = self.counts > 0
        errors = np.abs(self.accuracy[filled] - self.confidence[filled])
        return float((errors * self.counts[filled]).sum() / self.counts.sum())


def reliability(
    confidence: np.ndarray, correct: np.ndarray, bins: int = NUM_BINS, equal_mass: bool = False
) -> Reliability:
    """
    The diagram of confidences (N,), 0 to 1, that were `correct` (N,) or not, in bins of equal width (Guo et al.,
    arXiv:1706.04599) or, with `equal_mass`, of equal numbers of images (Nixon et al., arXiv:1904.01685).
    """
    if equal_mass:
        # By rank, so that equal confidences do not empty a bin.
        rank = np.argsort(np.argsort(confidence, kind="stable"), kind="stable")
        index = rank * bins // len(confidence)
    else:
        index = _bin_index(confidence, bins)
    counts = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(index, values, minlength=bins) / counts for values in (confidence, correct)]
    return Reliability(counts, *means)


def _bin_index(confidence: np.ndarray, bins: int = NUM_BINS) -> np.ndarray:
    """The bins of equal width, each with its upper edge and without its lower one."""
    return np.clip(np.searchsorted(np.linspace(0.0, 1.0, bins + 1), confidence, side="left") - 1, 0, bins - 1)


def answers(values: np.ndarray, labels: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """The likeliest class, (N,); for labels (N, K) 1 for each label whose probability reaches the threshold."""
    return values.argmax(axis=1) if labels.ndim == 1 else (values >= threshold).astype(np.int64)


def confidences(values: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The probability of the likeliest class, (N,), or of every label, (N * K,), and whether it is right."""
    if labels.ndim == 1:
        return values.max(axis=1), values.argmax(axis=1) == labels
    return values.ravel(), labels.ravel()


# --- Scores with intervals --------------------------------------------------------------------------------------------


# A value for each image, of which the metric is the mean; or a function of the indices of images.
Measure = np.ndarray | Callable[[np.ndarray], float]


def score(
    values: np.ndarray, labels: np.ndarray, threshold: float = 0.5, resamples: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """
    The metrics of probabilities (N, K) as entries of results.json, each with its definition and a 95 % percentile
    bootstrap interval over images (0 resamples: none). That of an accuracy of 1 is [1, 1], which says nothing; shares
    of images have Wilson's interval too.
    """
    if labels.ndim == 1:
        definitions, measures, known = DEFINITIONS, _measure_classes(values, labels), {}
    else:
        definitions = MULTI_LABEL_DEFINITIONS
        measures, known = _measure_labels(values, labels.astype(np.int64), threshold)
    results, n = [], len(labels)
    for metric in (metric for metric in definitions if metric in measures):
        measure = measures[metric]
        data, statistic = (measure, np.mean) if isinstance(measure, np.ndarray) else (np.arange(n), measure)
        interval = _bootstrap(data, statistic, resamples, seed) if resamples and n > 1 else None
        result = {"metric": metric, "value": float(statistic(data)), "n": n, "interval": interval}
        if metric in _SHARES:
            bounds = binomtest(int(data.sum()), n).proportion_ci(method="wilson")
            result["wilson_interval"] = float(bounds.low), float(bounds.high)
        results.append({**result, **known.get(metric, {}), "definition": definitions[metric]})
    return results


def value_of(results: list[dict[str, Any]], metric: str) -> float:
    """The value of a metric in the entries of results.json."""
    return next(result["value"] for result in results if result["metric"] == metric)


def _measure_classes(values: np.ndarray, labels: np.ndarray) -> dict[str, Measure]:
    (confidence, correct), best, num_labels = confidences(values, labels), values.argmax(axis=1), values.shape[1]

    def macro_f1(rows: np.ndarray) -> float:
        """Over the classes that occur in either: scikit-learn's default, which is too slow for a thousand resamples."""
        found = np.bincount(labels[rows][correct[rows]], minlength=num_labels)
        total = np.bincount(labels[rows], minlength=num_labels) + np.bincount(best[rows], minlength=num_labels)
        return float((2 * found[total > 0] / total[total > 0]).mean())

    measures: dict[str, Measure] = {
        "accuracy": correct.astype(np.float64),
        "nll": negative_log_likelihoods(values, labels),
        "brier": brier_scores(values, labels),
        "macro_f1": macro_f1,
        "ece": lambda rows: reliability(confidence[rows], correct[rows]).expected_error,
        "adaptive_ece": lambda rows: reliability(confidence[rows], correct[rows], equal_mass=True).expected_error,
    }
    if num_labels > TOP_K:
        top = np.argpartition(-values, TOP_K - 1, axis=1)[:, :TOP_K]
        measures["top5_accuracy"] = (top == labels[:, None]).any(axis=1).astype(np.float64)
    return measures


def _measure_labels(
    values: np.ndarray, labels: np.ndarray, threshold: float
) -> tuple[dict[str, Measure], dict[str, dict[str, Any]]]:
    """The measures, and of how many images or labels some of them are the means."""
    answers, (n, num_labels), images = (values >= threshold).astype(np.int64), values.shape, np.arange(len(values))
    each_label = _average_precision(values, labels, images)
    pooled = _average_precision(values.reshape(-1, 1), labels.reshape(-1, 1), np.repeat(images, num_labels))
    right, either = labels * answers, labels + answers  # twice the first over the second is F1
    has_either = either.any(axis=1)
    f1_of_image = np.divide(2 * right.sum(1), either.sum(1), out=np.zeros(n), where=has_either)
    bin_index = _bin_index(values.ravel())

    def mean_average_precision(counts: np.ndarray) -> float:
        found = each_label(counts)
        return 0.0 if np.isnan(found).all() else float(np.nanmean(found))

    def macro_f1(counts: np.ndarray) -> float:
        hits, total = 2 * (counts @ right), counts @ either
        return float((hits[total > 0] / total[total > 0]).mean()) if total.any() else 0.0

    def expected_error(counts: np.ndarray) -> float:
        weights = np.repeat(counts, num_labels)
        errors = np.bincount(bin_index, weights * (labels.ravel() - values.ravel()), minlength=NUM_BINS)
        return float(np.abs(errors).sum() / weights.sum())

    # As functions of (N,), how often a resample has each image: much faster than scikit-learn on the images themselves.
    of_counts: dict[str, Callable[[np.ndarray], float]] = {
        "mean_average_precision": mean_average_precision,
        "micro_average_precision": lambda counts: float(pooled(counts)[0]),
        "micro_f1": lambda counts: _ratio(2 * (counts @ right).sum(), (counts @ either).sum()),
        "macro_f1": macro_f1,
        "samples_f1": lambda counts: _ratio(counts @ f1_of_image, counts @ has_either),
        "ece": expected_error,
    }
    measures: dict[str, Measure] = {
        "exact_match": (answers == labels).all(axis=1).astype(np.float64),
        "hamming_loss": (answers != labels).mean(axis=1),
        "nll": negative_log_likelihoods(values, labels),
        "brier": brier_scores(values, labels),
    }
    for metric, statistic in of_counts.items():
        measures[metric] = lambda rows, statistic=statistic: statistic(np.bincount(rows, minlength=n))
    known: dict[str, dict[str, Any]] = {
        "samples_f1": {"n": int(has_either.sum())},
        "mean_average_precision": {"num_labels": int(labels.any(axis=0).sum())},
        "macro_f1": {"num_labels": int(either.any(axis=0).sum())},
    }
    return measures, known


def _bootstrap(data: np.ndarray, statistic: Callable[..., Any], resamples: int, seed: int) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic."""
    vectorized = statistic is np.mean
    batch = max(1, 10_000_000 // len(data)) if vectorized else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all resamples equal, or a class that a resample lacks
        result = bootstrap(
            (data,), statistic, n_resamples=resamples, batch=batch, vectorized=vectorized, method="percentile",
            rng=np.random.default_rng(seed),
        )  # fmt: skip
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _average_precision(
    values: np.ndarray, labels: np.ndarray, images: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """
    scikit-learn's average precision of each column of values and labels (M, C), with rows about `images` (M,): a
    function from (N,), how often a resample has each image, to (C,), NaN without the label. Values are sorted once.
    """
    order = np.argsort(-values, axis=0, kind="stable")
    ranked, images = np.take_along_axis(values, order, axis=0), images[order]
    labels = np.take_along_axis(labels, order, axis=0).astype(bool)
    # No threshold lies between equal values: they all have the precision at the last of them.
    is_last = np.vstack([ranked[1:] != ranked[:-1], np.ones((1, values.shape[1]), dtype=bool)])
    ends = np.where(is_last, np.arange(len(values))[:, None], len(values))
    ends = np.minimum.accumulate(ends[::-1], axis=0)[::-1]

    def of_counts(counts: np.ndarray) -> np.ndarray:
        weights = counts[images]
        found = np.where(labels, weights, 0)
        seen, right = weights.cumsum(axis=0), found.cumsum(axis=0)
        precision = np.divide(right, seen, out=np.zeros(seen.shape), where=seen > 0)
        total = (found * np.take_along_axis(precision, ends, axis=0)).sum(axis=0)
        return np.divide(total, right[-1], out=np.full(total.shape, np.nan), where=right[-1] > 0)

    return of_counts


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def per_class(values: np.ndarray, labels: np.ndarray, names: list[str], threshold: float = 0.5) -> list[dict[str, Any]]:
    """
    Precision, recall and F1 of each class, 0 where not defined, and its number of images, `n`. For labels (N, K) also
    the average precision, None where no image has the label, and how many images get it, `predicted`.
    """
    given, rows = answers(values, labels, threshold), []
    parts = metrics.precision_recall_fscore_support(labels, given, labels=range(len(names)), zero_division=0)
    for index, (name, p, r, f, n) in enumerate(zip(names, *parts)):
        row = {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "n": int(n)}
        if labels.ndim == 2:
            average = float(metrics.average_precision_score(labels[:, index], values[:, index])) if n else None
            row = {"label": name, "average_precision": average, **row, "predicted": int(given[:, index].sum())}
        rows.append(row)
    return rows


def confusion(values: np.ndarray, labels: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Images by class (rows) and predicted class (columns), (K, K); without and with each of K labels, (K, 2, 2)."""
    given = answers(values, labels, threshold)
    if labels.ndim == 2:
        return metrics.multilabel_confusion_matrix(labels, given)
    return metrics.confusion_matrix(labels, given, labels=range(values.shape[1]))


def regression_scores(values: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """RMSE, MAE and R2 of numbers (N,)."""
    measures = {"rmse": metrics.root_mean_squared_error, "mae": metrics.mean_absolute_error}
    measures |= {"r2": metrics.r2_score} if len(targets) > 1 else {}
    return {name: float(measure(targets, values)) for name, measure in measures.items()}


def multi_label_scores(values: np.ndarray, labels: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    """
    Mean average precision (over labels that an image has), F1 (macro and samples: over labels or images with a label or
    an answer), and exact match: of logits or probabilities, labels and answers (N, K); 0 where there is none.
    """
    present, mean = labels.any(axis=0), 0.0
    if present.any():
        mean = metrics.average_precision_score(labels[:, present], values[:, present], average="macro")
    scores = {"mean_average_precision": float(mean)}
    for average in ("micro", "macro", "samples"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty mean
            value = metrics.f1_score(labels, answers, average=average, zero_division=np.nan)
        scores[f"{average}_f1"] = float(np.nan_to_num(value))
    return scores | {"exact_match": float((labels == answers).all(axis=1).mean())}
