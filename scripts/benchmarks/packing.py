# SPDX-License-Identifier: Apache-2.0
"""Images of many sizes: packed into one sequence, padded to the longest, or one by one."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.packed import classify_packed
from modeling_vit_scratch.configuration_vit_scratch import ViTScratchConfig
from modeling_vit_scratch.modeling_vit_scratch import ViTScratchForImageClassification


OURS = "packed"
ASPECTS = (4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 1.0)  # width over height, of cameras and telephones
SMALLEST, LARGEST = 64, 288  # sides of squares of the areas between which images lie, in pixels


def mixed_images(config: ViTScratchConfig, count: int, seed: int = 0) -> list[Tensor]:
    """Images (C, H, W) with the aspect ratios of photos and any area, sides rounded to whole patches."""
    generator, numbers = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    images = []
    for _ in range(count):
        side, aspect = generator.uniform(SMALLEST, LARGEST), generator.choice(ASPECTS)
        lengths = (side / aspect**0.5, side * aspect**0.5)
        sizes = (max(round(length / patch), 1) * patch for length, patch in zip(lengths, config.patch_hw))
        images.append(torch.randn(config.num_channels, *sizes, generator=numbers))
    return images


def classify_padded(model: ViTScratchForImageClassification, images: list[Tensor]) -> Tensor:
    """Logits (N, K) of a plain classifier, by the usual way: tokens are padded to the longest image and masked."""
    vit = model.vit
    embedded = [vit.embeddings(image[None].to(vit.dtype)) for image in images]
    longest = max(tokens.shape[1] for tokens in embedded)
    hidden_states = torch.cat([F.pad(tokens, (0, 0, 0, longest - tokens.shape[1])) for tokens in embedded])
    lengths = torch.tensor([tokens.shape[1] for tokens in embedded])
    mask = (torch.arange(longest) < lengths[:, None])[:, None, None]  # (N, 1, 1, T)
    for layer in vit.layers:
        hidden_states = layer(hidden_states, mask)
    return model.classifier(vit.pooler(vit.layernorm(hidden_states)))


def packing_ways(model: ViTScratchForImageClassification, images: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """By name; each gives the logits (N, K)."""

    def without_gradients(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.inference_mode()(run)

    return {
        OURS: without_gradients(lambda: classify_packed(model, images).logits),
        "padded to the longest, masked": without_gradients(lambda: classify_padded(model, images)),
        "one by one": without_gradients(lambda: torch.cat([model(image[None]).logits for image in images])),
    }


def difference(ways: dict[str, Callable[[], Tensor]]) -> float:
    """The largest between the logits of any two ways."""
    logits = torch.stack([way() for way in ways.values()])
    return (logits.amax(0) - logits.amin(0)).max().item()
