# SPDX-License-Identifier: Apache-2.0
# modeling_vit_scratch 0.2.0
"""
The stem of the hybrid models (3.1 of the paper): a ResNet before the patches are cut.

It is BiT's, as in models_resnet.py of the paper's code. "The paper" is Dosovitskiy et al. (arXiv:2010.11929v2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_vit_scratch import ViTScratchConfig


class ViTScratchStemConvolution(nn.Conv2d):
    """A convolution with standardised weights (Qiao et al., arXiv:1903.10520), padded as TensorFlow's "SAME"."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, bias=False)
        # An input that the stride divides lacks max(kernel - stride, 0) pixels; the odd one goes below and right.
        before, lacking = max(kernel - stride, 0) // 2, max(kernel - stride, 0)
        self.pads = (before, lacking - before, before, lacking - before)

    def forward(self, pixels: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.weight.float(), dim=(1, 2, 3), correction=0, keepdim=True)
        weight = ((self.weight.float() - mean) / (std + 1e-5)).to(self.weight.dtype)
        return F.conv2d(F.pad(pixels, self.pads), weight, stride=self.stride)


def stem_normalization(channels: int, weight_init: float = 1.0) -> nn.GroupNorm:
    """GroupNorm with Flax's epsilon."""
    layer = nn.GroupNorm(32, channels, eps=1e-6)
    layer.weight_init = weight_init
    return layer


class ViTScratchStemUnit(GradientCheckpointingLayer):
    """A bottleneck unit of the ResNet: (B, inputs, H, W) -> (B, 4 * width, H / stride, W / stride)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.has_shortcut = inputs != 4 * width or stride != 1
        if self.has_shortcut:
            self.shortcut_conv = ViTScratchStemConvolution(inputs, 4 * width, 1, stride)
            self.shortcut_norm = stem_normalization(4 * width)
        self.conv1, self.norm1 = ViTScratchStemConvolution(inputs, width, 1), stem_normalization(width)
        self.conv2, self.norm2 = ViTScratchStemConvolution(width, width, 3, stride), stem_normalization(width)
        self.conv3 = ViTScratchStemConvolution(width, 4 * width, 1)
        self.norm3 = stem_normalization(4 * width, weight_init=0.0)

    def forward(self, pixels: Tensor) -> Tensor:
        residual = self.shortcut_norm(self.shortcut_conv(pixels)) if self.has_shortcut else pixels
        pixels = F.relu(self.norm1(self.conv1(pixels)))
        pixels = F.relu(self.norm2(self.conv2(pixels)))
        return F.relu(residual + self.norm3(self.conv3(pixels)))


class ViTScratchStem(nn.Module):
    """The ResNet of the hybrid models (3.1; BiT's, as in models_resnet.py of the paper's code)."""

    def __init__(self, config: ViTScratchConfig) -> None:
        super().__init__()
        channels = config.stem_width
        self.root_conv = ViTScratchStemConvolution(config.num_channels, channels, 7, stride=2)
        self.root_norm = stem_normalization(channels)
        self.stages = nn.ModuleList()
        for stage, num_units in enumerate(config.stem_layers):
            width, units = config.stem_width * 2**stage, nn.ModuleList()
            for unit in range(num_units):
                units.append(ViTScratchStemUnit(channels, width, stride=2 if stage > 0 and unit == 0 else 1))
                channels = 4 * width
            self.stages.append(units)
        self.out_channels = channels

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H / stem_stride, W / stem_stride)"""
        pixels = F.relu(self.root_norm(self.root_conv(pixels)))
        # After ReLU the zeros that pad are the -inf of "SAME" pooling.
        pixels = F.max_pool2d(F.pad(pixels, (0, 1, 0, 1)), kernel_size=3, stride=2)
        for units in self.stages:
            for unit in units:
                pixels = unit(pixels)
        return pixels
