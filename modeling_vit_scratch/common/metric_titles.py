# SPDX-License-Identifier: Apache-2.0
"""What the numbers of records are called, for people."""

# In the order in which a record's main result is chosen: the first that there is.
METRIC_TITLES = {
    "accuracy": "accuracy", "mean_average_precision": "mean average precision", "top5_accuracy": "top-5 accuracy",
    "micro_f1": "micro F1", "macro_f1": "macro F1", "samples_f1": "samples F1", "exact_match": "exact match",
    "micro_average_precision": "micro average precision", "hamming_loss": "Hamming loss", "nll": "NLL (nats)",
    "brier": "Brier score", "ece": "ECE, 15 equal bins", "adaptive_ece": "ECE, bins of equal numbers",
}  # fmt: skip
# The others are fractions of one.
NO_PERCENT = ("loss", "nll", "brier")


def title_of(metric: str) -> str:
    """The title at the beginning of a line; a metric without one keeps its name."""
    title = METRIC_TITLES.get(metric, metric)
    return title[:1].upper() + title[1:]
