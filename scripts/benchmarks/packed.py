# SPDX-License-Identifier: Apache-2.0
"""
Images of many sizes in one pass without padding, their tokens in one sequence (Dehghani et al., arXiv:2307.06304).

All tokens share the matrix products. Attention runs for each image alone: a block-diagonal mask without its wasted
products.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_vit_scratch.modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchModel


PACKED = "vit_scratch_packed"


@dataclass(frozen=True)
class Block:
    """Images of one size, adjacent in the sequence: `count` times `length` tokens from `start` on."""

    start: int
    count: int
    length: int
    grid: tuple[int, int]

    def of(self, sequence: Tensor) -> Tensor:
        """The block's part of a sequence (1, T, ...) as a batch (count, length, ...)."""
        return sequence[0, self.start : self.start + self.count * self.length].unflatten(0, (self.count, self.length))


def packed_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float,
    dropout: float = 0.0, *, blocks: Sequence[Block], **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention within each image: queries, keys and values (1, A, T, E) of all of them -> (1, T, A, E)."""
    attended = []
    for block in blocks:
        batch = (block.of(part.transpose(1, 2)).transpose(1, 2) for part in (query, key, value))  # (count, A, ., E)
        result = F.scaled_dot_product_attention(*batch, dropout_p=dropout, scale=scaling)
        attended.append(result.transpose(1, 2).flatten(0, 1))  # (count * length, A, E)
    return torch.cat(attended)[None], None


ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention_forward)


def classify_packed(
    model: ViTScratchForImageClassification, images: Sequence[Tensor], labels: Tensor | None = None
) -> ImageClassifierOutput:
    """
    Classifies images of any sizes in one pass, with the result that each has alone.

    Args:
        model: a classifier. In training it must have no drop path, which drops whole sequences.
        images: N normalised tensors (C, H, W), any H and W that the patch divides.
        labels: as for the model, in the order of the images.

    Returns:
        `logits` (N, K), and with labels the `loss`.

    Raises:
        ValueError: if there is no image, or one that the model can't take; for positions inside the attention, relative
            or rotary; for drop path.
    """
    config, vit = model.config, model.vit
    if (kind := config.position_embedding) in ("relative_1d", "rope_2d"):
        raise ValueError(f"position_embedding={kind!r} can't pack images: it needs a batch for each size.")
    if model.training and config.drop_path_rate:
        raise ValueError(
            f"drop_path_rate={config.drop_path_rate:g} leaves out whole images, and packed ones are one sequence. Set "
            "it to 0 to train on packed images, or call model.eval()."
        )
    if not images:
        raise ValueError("There is no image to pack.")
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(tuple(image.shape), []).append(index)
    hidden_states, blocks = _embed(vit, [torch.stack([images[index] for index in same]) for same in by_size.values()])
    implementation = config._attn_implementation
    config._attn_implementation = PACKED
    try:
        for index, layer in enumerate(vit.layers):
            if (positions := vit.positions_before(index)) is not None:
                placed = (positions(block.of(hidden_states), grid=block.grid).flatten(0, 1) for block in blocks)
                hidden_states = torch.cat(list(placed))[None]
            hidden_states = layer(hidden_states, blocks=blocks)
    finally:
        config._attn_implementation = implementation
    sequence = vit.layernorm(hidden_states)  # equation 4
    parts = [block.of(sequence) for block in blocks]
    logits = model.classifier(torch.cat([vit.pooler(part) for part in parts]))
    if model.distillation_classifier is not None:
        logits = (logits + model.distillation_classifier(torch.cat([part[:, 1] for part in parts]))) / 2
    order = torch.tensor([index for same in by_size.values() for index in same], device=logits.device)
    logits = logits[torch.argsort(order)]
    loss = None if labels is None else model.loss_function(labels, logits, config)
    if config.calibrated and not model.training:
        logits = logits / config.temperature
    return ImageClassifierOutput(loss=loss, logits=logits)


def _embed(vit: ViTScratchModel, batches: list[Tensor]) -> tuple[Tensor, list[Block]]:
    """Equation 1 for each size: all tokens (1, T, D), and their blocks."""
    patches, tokens, blocks, start = vit.embeddings.patch_embeddings, [], [], 0
    for batch in batches:
        grid = patches.grid(batch)  # or an error
        tokens.append(vit.embeddings(batch.to(patches.projection.weight.dtype)))
        blocks.append(Block(start, *tokens[-1].shape[:2], grid))
        start += len(batch) * blocks[-1].length
    return torch.cat([batch.flatten(0, 1) for batch in tokens])[None], blocks
