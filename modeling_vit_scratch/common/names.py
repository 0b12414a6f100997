# SPDX-License-Identifier: Apache-2.0
"""Titles of metrics, and the check of licence names."""

import re
from typing import Any


# A record's main result is the first of these that it has.
METRIC_TITLES = {
    "accuracy": "accuracy", "mean_average_precision": "mean average precision", "top5_accuracy": "top-5 accuracy",
    "micro_f1": "micro F1", "macro_f1": "macro F1", "samples_f1": "samples F1", "exact_match": "exact match",
    "micro_average_precision": "micro average precision", "hamming_loss": "Hamming loss", "nll": "NLL (nats)",
    "brier": "Brier score", "ece": "ECE, 15 equal bins", "adaptive_ece": "ECE, bins of equal numbers",
}  # fmt: skip
# Bins of the expected calibration error (Guo et al., arXiv:1706.04599).
NUM_BINS = 15
# All others are fractions of 1.
NO_PERCENT = ("loss", "nll", "brier")


def title_of(metric: str) -> str:
    """The capitalized title; a metric without one keeps its name."""
    title = METRIC_TITLES.get(metric, metric)
    return title[:1].upper() + title[1:]


def interval_of(result: dict[str, Any]) -> list[float] | None:
    """
    The interval to show for a result of results.json: for fractions of images Wilson's, which is informative even where
    all are right; for others the bootstrap's; None if it has none.
    """
    return result.get("wilson_interval") or result.get("interval")


_IDENTIFIER = re.compile(r"[a-z0-9.-]+")


def license_problem(license: Any, name: str | None = None, link: str | None = None) -> str | None:
    """
    A message if the licence of a model is not valid, else None. It has to be an identifier of the Hub, e.g. apache-2.0,
    or "other" with a name and a link.
    """
    if not isinstance(license, str) or not _IDENTIFIER.fullmatch(license):
        return "it is no name of the Hub's, e.g. apache-2.0, cc-by-4.0 (hf.co/docs/hub/repositories-licenses)."
    if license == "other" and not (name and link):
        flags = "--license other --license_name NAME --license_link URL"
        return f"add license_name and license_link: scripts/card.py FOLDER {flags}."
    return None
