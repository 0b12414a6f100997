# SPDX-License-Identifier: Apache-2.0
"""
What happens to the pixels of a batch on the device: uint8 becomes what the image processor would give, and is mixed.

Workers send 8 bits for each value, a quarter of float32. What a batch is mixed with is drawn in `collation`.
"""

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration_vit_scratch import ViTScratchConfig
from ..image_processing_vit_scratch import ViTScratchImageProcessor


class Normalize:
    """
    uint8 (B, C, H, W) to float32, value * scale + offset for each channel: the processor's own arithmetic, so that the
    result is bit for bit what the processor gives, whatever the precision of the network.

    Args:
        scale, offset: (C,), or (1,) for any number of channels.
    """

    def __init__(self, scale: np.ndarray, offset: np.ndarray) -> None:
        self.scale, self.offset = (
            torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1) for values in (scale, offset)
        )

    @classmethod
    def from_processor(cls, processor: BaseImageProcessor | None) -> "Normalize | None":
        """With the settings of this library's processor; None for any other, which has to normalise itself."""
        if not isinstance(processor, ViTScratchImageProcessor):
            return None
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        mean, std = np.broadcast_arrays(np.atleast_1d(np.float64(mean)), np.atleast_1d(np.float64(std)))
        return cls(factor / std, -mean / std)

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """uint8 (B, C, H, W) to float32 on the same device; other types are normalised already and stay as they are."""
        if pixel_values.dtype != torch.uint8:
            return pixel_values
        self.scale, self.offset = self.scale.to(pixel_values.device), self.offset.to(pixel_values.device)
        # Rounded twice, as in the processor: a fused multiply-add would give other last bits.
        return pixel_values.float().mul_(self.scale).add_(self.offset)


def mix(pixel_values: Tensor, weights: Tensor, boxes: Tensor) -> Tensor:
    """
    Mixes each image with the one before it in the batch: inside its box it keeps its weight of itself, outside all.

    Mixup (Zhang et al., arXiv:1710.09412) is the box of the whole image, CutMix (Yun et al., arXiv:1905.04899) the
    weight 0. Never waits for the device: nothing of the arguments is read back.

    Args:
        pixel_values: normalised, (B, C, H, W).
        weights: (B,), 0 to 1.
        boxes: (B, 4), left, top, right and bottom in pixels.
    """
    height, width = pixel_values.shape[-2:]
    rows, columns = (torch.arange(length, device=pixel_values.device) for length in (height, width))
    left, top, right, bottom = boxes[:, :, None].unbind(1)  # (B, 1) each
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None, :]
    kept = torch.where(inside, weights[:, None, None].to(pixel_values.dtype), 1.0)[:, None]  # (B, 1, H, W)
    return pixel_values.roll(1, 0).mul_(1.0 - kept).add_(pixel_values * kept)


def input_size(processor: BaseImageProcessor, config: ViTScratchConfig) -> tuple[int, int]:
    """Height and width of what the processor makes."""
    size = processor.crop_size if processor.do_center_crop else processor.size
    if size is not None and size["height"] and size["width"]:
        return size["height"], size["width"]
    return config.image_hw
