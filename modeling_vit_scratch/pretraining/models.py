# SPDX-License-Identifier: Apache-2.0
"""
Models for pretraining without labels: masked patch prediction (the paper, B.1.2) and MAE. SimMIM, the third, is
`ViTScratchForMaskedImageModeling`. All take normalised pixels of any size that the patch divides.

Shapes are as in `encoder_vit_scratch.py`; of N patches V are visible, and P = C * patch area is the values in a patch.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..configuration_vit_scratch import ViTScratchConfig
from ..encoder_vit_scratch import ViTScratchLayer, patchify
from ..modeling_vit_scratch import ViTScratchModel, ViTScratchPreTrainedModel, unpatchify
from ..positions_vit_scratch import grid_places, sincos_positions
from .arguments import MPP_TARGETS


@dataclass
class PretrainingOutput(ModelOutput):
    """`loss`, a scalar, the mean over images; `predictions` (B, N, ...) for every patch. Both are float32."""

    loss: Tensor | None = None
    predictions: Tensor | None = None


def mean_over_images(losses: Tensor, chosen: Tensor) -> Tensor:
    """The mean over the chosen patches of each image, then over images; both arguments are (B, N)."""
    chosen = chosen.to(losses.dtype)
    return ((losses * chosen).sum(1) / chosen.sum(1).clamp(min=1)).mean()


def _check_patches_are_hidden(config: ViTScratchConfig, objective: str) -> None:
    if config.stem_layers is not None:
        raise ValueError(
            f"{objective} hides patches, but a ResNet stem sees the pixels around each patch: take a variant without "
            "one."
        )


class MaskedPatchPrediction(ViTScratchPreTrainedModel):
    """
    The paper's self-supervision (B.1.2): predicts the content of patches whose embeddings are corrupted.

    The target is "mean_color", the 3-bit mean colour of the patch, one of 8^C = 512 classes; "downsized", the same for
    each of 4 x 4 parts of the patch; or "full_patch", its normalised values, with a squared error. `image_mean` and
    `image_std` (C,) normalise pixels from 0 to 1. Raises ValueError for another target, for a patch that 4 does not
    divide if it is downsized, and for a hybrid.
    """

    def __init__(self, config: ViTScratchConfig, target: str, image_mean: list[float], image_std: list[float]) -> None:
        super().__init__(config)
        _check_patches_are_hidden(config, "Masked patch prediction")
        if target not in MPP_TARGETS:
            raise ValueError(f"The target {target!r} is none of {', '.join(MPP_TARGETS)}.")
        if target == "downsized" and any(side % 4 for side in config.patch_hw):
            raise ValueError(f"A patch of {config.patch_hw} can't be downsized to 4 x 4: 4 must divide its sides.")
        self.target, self.colors = target, 8**config.num_channels
        values = config.num_channels * math.prod(config.patch_hw)
        outputs = {"mean_color": self.colors, "downsized": 16 * self.colors, "full_patch": values}
        self.vit = ViTScratchModel(config, add_pooling_layer=False, use_mask_token=True)
        self.decoder = nn.Linear(config.hidden_size, outputs[target])
        self.image_mean, self.image_std = image_mean, image_std
        self.post_init()

    def forward(self, pixel_values: Tensor, corrupted: Tensor, replaced: Tensor, source: Tensor) -> PretrainingOutput:
        """
        From pixels (B, C, H, W) to the loss on the patches in `corrupted` (B, N) and predictions (B, N, classes),
        (B, N, 16, classes) or (B, N, P). Patches in `replaced` (B, N) become the mask token. The others get the
        embedding of the patch in `source` (B, N) int64, which may be their own.
        """
        grid, patch = self.vit.embeddings.patch_embeddings.grid(pixel_values), self.config.patch_hw
        patches = patchify(pixel_values, patch)
        # The embedding of another patch is the embedding of its pixels.
        seen = unpatchify(patches.gather(1, source[..., None].expand_as(patches)), grid, patch)
        states = self.vit(seen, bool_masked_pos=replaced).last_hidden_state[:, self.config.num_prefix_tokens :]
        predictions, patches = self.decoder(states).float(), patches.float()
        if self.target == "full_patch":
            losses = F.mse_loss(predictions, patches, reduction="none").mean(-1)  # (B, N)
        else:
            colors = self.mean_colors(patches, parts=4 if self.target == "downsized" else 1)  # (B, N, 16 or 1)
            logits = predictions.unflatten(2, (-1, self.colors))  # (B, N, 16 or 1, classes)
            losses = F.cross_entropy(logits.flatten(0, 2), colors.flatten(), reduction="none").view_as(colors).mean(-1)
            predictions = logits if self.target == "downsized" else predictions
        return PretrainingOutput(mean_over_images(losses, corrupted), predictions)

    def mean_colors(self, patches: Tensor, parts: int) -> Tensor:
        """
        3-bit mean colours of parts x parts pieces of each patch: normalised (B, N, P) -> classes (B, N, parts^2). The
        first channel has the highest bits, which the paper leaves open.
        """
        channels, patch = self.config.num_channels, self.config.patch_hw
        pixels = patches.unflatten(2, (channels, parts, patch[0] // parts, parts, patch[1] // parts))
        means = pixels.mean((4, 6)).flatten(3)  # (B, N, C, parts^2)
        mean, std = (means.new_tensor(values).view(-1, 1) for values in (self.image_mean, self.image_std))
        levels = ((means * std + mean) * 8).long().clamp(0, 7)
        weights = 8 ** torch.arange(channels - 1, -1, -1, device=levels.device)
        return (levels * weights.view(-1, 1)).sum(2)


class MaskedAutoencoder(ViTScratchPreTrainedModel):
    """
    A masked autoencoder (He et al., arXiv:2111.06377): the encoder sees only visible patches, and a small decoder with
    mask tokens at the other positions predicts the pixels of these. The sizes of the decoder are the paper's for B, L
    and H; its MLP is four times as wide. `norm_pix_loss` normalises targets by the mean and variance of each patch.

    Raises ValueError for a hybrid, and for positions that enter at every layer, where a subset of patches has no grid.
    """

    def __init__(
        self, config: ViTScratchConfig, decoder_hidden_size: int = 512, decoder_num_hidden_layers: int = 8,
        decoder_num_attention_heads: int = 16, norm_pix_loss: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(config)
        _check_patches_are_hidden(config, "MAE")
        if config.position_embedding in ("relative_1d", "rope_2d") or config.position_embedding_placement != "stem":
            raise ValueError(
                "MAE encodes some of the patches, so positions must enter once, with the embeddings: take "
                "position_embedding='learned_1d', 'learned_2d' or 'sincos_2d', and position_embedding_placement='stem'."
            )
        small = copy.deepcopy(config)
        small.hidden_size, small.intermediate_size = decoder_hidden_size, 4 * decoder_hidden_size
        small.num_hidden_layers, small.num_attention_heads = decoder_num_hidden_layers, decoder_num_attention_heads
        small.drop_path_rate = 0.0
        small.validate_vit()
        self.norm_pix_loss = norm_pix_loss
        self.vit = ViTScratchModel(config, add_pooling_layer=False)
        self.decoder_embed = nn.Linear(config.hidden_size, decoder_hidden_size)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_hidden_size))
        self.decoder_layers = nn.ModuleList(ViTScratchLayer(small, i) for i in range(decoder_num_hidden_layers))
        self.decoder_norm = nn.LayerNorm(decoder_hidden_size, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(decoder_hidden_size, config.num_channels * math.prod(config.patch_hw))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MaskedAutoencoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)

    def forward(self, pixel_values: Tensor, visible: Tensor) -> PretrainingOutput:
        """
        From pixels (B, C, H, W) and the patches that the encoder sees, `visible` (B, V) int64, to predictions (B, N, P)
        and the loss, the squared error on hidden patches.
        """
        grid = self.vit.embeddings.patch_embeddings.grid(pixel_values)
        predictions = self.decode(self.encode(pixel_values, visible), visible, grid).float()
        target = patchify(pixel_values.float(), self.config.patch_hw)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        hidden = torch.ones(target.shape[:2], device=target.device).scatter(1, visible, 0.0)  # (B, N)
        return PretrainingOutput(mean_over_images((predictions - target).square().mean(-1), hidden), predictions)

    def encode(self, pixel_values: Tensor, visible: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, prefix tokens + V, D)"""
        tokens, prefix = self.vit.embeddings(pixel_values), self.config.num_prefix_tokens  # (B, T, D)
        kept = F.pad(visible + prefix, (prefix, 0))
        kept[:, :prefix] = torch.arange(prefix, device=kept.device)
        tokens = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
        for layer in self.vit.layers:
            tokens = layer(tokens)
        return self.vit.layernorm(tokens)

    def decode(self, states: Tensor, visible: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, prefix tokens + V, D) -> (B, N, P)"""
        states, prefix = self.decoder_embed(states), self.config.num_prefix_tokens
        width, count = states.shape[2], math.prod(grid)
        patches = self.mask_token.to(states.dtype).expand(states.shape[0], count, -1)
        patches = patches.scatter(1, visible[..., None].expand(-1, -1, width), states[:, prefix:])
        positions = sincos_positions(*grid_places(self.config.grid_hw, grid, states.device), width)
        states = torch.cat([states[:, :prefix], patches + positions.to(states.dtype)], dim=1)
        for layer in self.decoder_layers:
            states = layer(states)
        return self.decoder_pred(self.decoder_norm(states))[:, prefix:]
