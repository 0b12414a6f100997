# SPDX-License-Identifier: Apache-2.0
"""The image processor, from a decoded image or from a file to `pixel_values`, beside transformers' own."""

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from benchmarks.timing import OURS
from modeling_vit_scratch.image_processing_vit_scratch import ViTScratchImageProcessor, fast_resize


FAST, THEIRS = "ours with do_fast_resize", "transformers, Pillow"
FLOOR, FAST_FLOOR = "Pillow's resizing alone", "resizing of do_fast_resize alone"


def processor_ways(images: list[Any], image_size: int) -> dict[str, Callable[[], Iterator[torch.Tensor]]]:
    """
    Processors with the same settings, image by image. Each way gives N tensors of (1, 3, S, S).

    Args:
        images: decoded ones, or the paths of files: ours opens those itself, and Pillow for transformers'.
        image_size: S.
    """
    size = {"height": image_size, "width": image_size}
    ours, fast = ViTScratchImageProcessor(size=size), ViTScratchImageProcessor(size=size, do_fast_resize=True)
    stock = ViTImageProcessorPil(size=size)

    def as_path(image: Any) -> Any:
        return str(image) if isinstance(image, Path) else image

    def opened(image: Any) -> Image.Image:
        return Image.open(image).convert("RGB") if isinstance(image, Path) else image

    def run(processor: Any, prepare: Callable[[Any], Any]) -> Iterator[torch.Tensor]:
        return (processor(prepare(image), return_tensors="pt")["pixel_values"] for image in images)

    return {OURS: lambda: run(ours, as_path), FAST: lambda: run(fast, as_path), THEIRS: lambda: run(stock, opened)}


def resizing_alone(images: list[Image.Image], image_size: int) -> dict[str, Callable[[], Iterator[Image.Image]]]:
    """What no way can be faster than: of decoded images, the step that exactness, or speed, leaves no choice in."""
    size, resample = (image_size, image_size), ViTScratchImageProcessor.resample
    return {
        FLOOR: lambda: (image.resize(size, resample) for image in images),
        FAST_FLOOR: lambda: (fast_resize(image, size, resample) for image in images),
    }


def to_time(ways: dict[str, Callable[[], Iterator[Any]]]) -> dict[str, Callable[[], Any]]:
    """The same, where each result makes way for the next one, as in a loop over images."""
    return {name: lambda way=way: deque(way(), maxlen=0) for name, way in ways.items()}


def differences(ways: dict[str, Callable[[], Iterator[torch.Tensor]]]) -> dict[str, float]:
    """
    The largest between our exact and transformers' values, which have a range of -1 to 1; and from these of the fast
    way, in levels from 0 to 255: the mean and the largest.
    """
    ours, fast, theirs = (torch.cat(list(ways[name]())) for name in (OURS, FAST, THEIRS))
    levels = 127.5 * (fast - theirs).abs()
    return {
        "largest_difference": (ours - theirs).abs().max().item(),
        "fast_mean_levels": levels.mean().item(),
        "fast_largest_levels": levels.max().item(),
    }


def times_faster(seconds: dict[str, list[float]]) -> dict[str, float | list[float]]:
    """How many times faster the fast way is than transformers': the median of the rounds' ratios, and quartiles."""
    low, median, high = np.percentile(np.divide(seconds[THEIRS], seconds[FAST]), [25, 50, 75]).tolist()
    return {"fast_times_faster": median, "fast_times_faster_quartiles": [low, high]}
