# SPDX-License-Identifier: Apache-2.0
"""One temperature for all logits, fitted to held-out images (Guo et al., arXiv:1706.04599), and where it is kept."""

import math
import os

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from transformers.dynamic_module_utils import custom_object_save

from ..common.errors import InputError
from ..configuration_vit_scratch import ViTScratchConfig
from ..modeling_vit_scratch import ViTScratchForImageClassification


# Beyond these a temperature is no correction: with every image right, the likelihood has no maximum.
LIMITS = (0.05, 20.0)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """
    The temperature with the least negative log-likelihood, in float64. The likelihood is concave in 1 / T, so there is
    one maximum.

    Args:
        logits: (N, K), not divided by any temperature.
        labels: classes (N,), or 0 and 1 (N, K).

    Raises:
        InputError: if the maximum lies outside of `LIMITS`.
    """
    logits = np.asarray(logits, dtype=np.float64)

    def loss(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        if labels.ndim == 1:
            return float((logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels]).mean())
        return float((np.logaddexp(0.0, scaled) - labels * scaled).mean())

    low, high = map(math.log, LIMITS)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-8})
    if min(found.x - low, high - found.x) < 1e-3:
        raise InputError(
            f"No temperature fits: the best would lie outside of {LIMITS[0]:g} to {LIMITS[1]:g}. Either (nearly) all "
            f"of the {len(labels)} images are right, or the labels have nothing to do with the logits. Take more "
            "images, or leave out --calibrate."
        )
    return math.exp(found.x)


def store_temperature(folder: str | os.PathLike[str], temperature: float) -> None:
    """Writes it into config.json, with the code beside it that applies it: older code would not."""
    config = ViTScratchConfig.from_pretrained(folder)
    config.temperature = temperature
    config.save_pretrained(folder)
    custom_object_save(ViTScratchForImageClassification(_smallest(config)), folder)


def _smallest(config: ViTScratchConfig) -> ViTScratchConfig:
    """transformers copies the code of an object, not of a class: here is one that costs nothing."""
    return type(config).from_variant("test/4", num_labels=2)
