# SPDX-License-Identifier: Apache-2.0
"""
"I don't know": what `evaluate.py --calibrate` leaves in a model's folder beside its temperature, and what `predict.py`
makes of it. uncertainty.json has two thresholds, uncertainty.safetensors the features of images that the model knows.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.hub import cached_file

from .errors import InputError
from .files import atomic_write, write_text
from .records import digests


RECORD, ARRAYS = "uncertainty.json", "uncertainty.safetensors"


class Novelty(NamedTuple):
    """Mahalanobis distances from the nearest class (Lee et al., arXiv:1807.03888)."""

    whitening: Tensor  # (D, D): turns features into ones whose classes have unit covariance
    means: Tensor  # (K, D) of the classes, after that
    distances: Tensor  # (N,) of held-out images, sorted

    def distances_of(self, features: Tensor) -> Tensor:
        """(B, D) to (B,)."""
        return torch.cdist(features @ self.whitening, self.means).amin(dim=1)

    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) to distances (B,), and the percentages of held-out images that are nearer to their class, (B,)."""
        distances = self.distances_of(features)
        return distances, 100.0 * torch.searchsorted(self.distances, distances) / len(self.distances)


class Uncertainty(NamedTuple):
    set_threshold: float  # the probability from which a label is in the set of an image
    score_threshold: float | None  # the score from which the likeliest label is an answer; None: not known
    novelty: Novelty
    fingerprint: str


def store(folder: Path, record: dict[str, Any], novelty: Novelty, temperature: float) -> None:
    """Writes both files, for the weights that are in the folder."""
    with atomic_write(folder / ARRAYS) as unfinished:
        save_file(novelty._asdict(), unfinished)
    record = {**record, "fitted_to": {"weights": digests(folder), "temperature": temperature}}
    write_text(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def load(name: str, hub: dict[str, Any], temperature: float) -> Uncertainty | None:
    """What a model has of it, if anything. Raises InputError if that is of other weights or another temperature."""
    if Path(name).is_file():
        return None
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    files = [cached_file(name, file, **quiet, **hub) for file in (RECORD, ARRAYS)]
    if None in files:
        return None
    text = Path(files[0]).read_text(encoding="utf-8")
    record = json.loads(text)
    if record["fitted_to"] != {"weights": digests(Path(files[0]).parent), "temperature": temperature}:
        raise InputError(
            f"its {RECORD} was fitted to other weights or another temperature. Fit it again with scripts/evaluate.py "
            f"--calibrate, or remove it: {files[0]}"
        )
    fingerprint = hashlib.sha256(text.encode() + Path(files[1]).read_bytes()).hexdigest()
    return Uncertainty(record["set_threshold"], record["score_threshold"], Novelty(**load_file(files[1])), fingerprint)
