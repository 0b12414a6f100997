# SPDX-License-Identifier: Apache-2.0
"""The image processor, from a decoded image or from a file to `pixel_values`, beside transformers' own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from ..image_processing_vit_scratch import ViTScratchImageProcessor
from .timing import OURS


def processor_ways(images: list[Any], image_size: int) -> dict[str, Callable[[], torch.Tensor]]:
    """
    Processors with the same settings, image by image. Each way gives (N, 3, S, S).

    Args:
        images: decoded ones, or the paths of files: ours opens those itself, for transformers' Pillow does.
        image_size: S.
    """
    size = {"height": image_size, "width": image_size}
    ours, stock = ViTScratchImageProcessor(size=size), ViTImageProcessorPil(size=size)

    def opened(image: Any) -> Image.Image:
        return Image.open(image).convert("RGB") if isinstance(image, Path) else image

    def run(processor: Any, prepare: Callable[[Any], Any]) -> torch.Tensor:
        values = [processor(prepare(image), return_tensors="pt")["pixel_values"] for image in images]
        return torch.cat(values)

    return {
        OURS: lambda: run(ours, lambda image: str(image) if isinstance(image, Path) else image),
        "transformers, Pillow": lambda: run(stock, opened),
    }


def difference(ways: dict[str, Callable[[], torch.Tensor]]) -> float:
    """The largest between ours and transformers' values, which have a range of -1 to 1."""
    ours, theirs = (way() for way in ways.values())
    return (ours - theirs).abs().max().item()
