# SPDX-License-Identifier: Apache-2.0
"""How fast a program is beside its model, in turns."""

from typing import Any

import torch
from transformers.exporters import ExportedModel

from ..common.timing import summarize, time_in_turns
from ..modeling_vit_scratch import ViTScratchForImageClassification


PROGRAM, MODEL = "the program", "the model, eager"


def measure_speed(
    model: ViTScratchForImageClassification,
    exported: ExportedModel,
    pixel_values: torch.Tensor,
    batch_size: int,
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """The summary of `timing.summarize`, for a batch that repeats the images (n, C, H, W)."""
    batch = pixel_values.repeat(-(-batch_size // len(pixel_values)), 1, 1, 1)[:batch_size].contiguous()

    def run_model() -> torch.Tensor:
        with torch.inference_mode():
            return model(pixel_values=batch).logits

    seconds = time_in_turns({PROGRAM: lambda: exported(pixel_values=batch), MODEL: run_model}, rounds)
    return summarize(seconds, batch_size, PROGRAM)
