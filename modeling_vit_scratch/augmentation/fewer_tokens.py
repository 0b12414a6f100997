# SPDX-License-Identifier: Apache-2.0
"""Training on fewer tokens, which takes less time: small images that grow, and patches that are left out at random."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.errors import InputError
from ..configuration_vit_scratch import ViTScratchConfig


# Shares of the training after which images have their full size, and no patch is left out any more.
FULL_SIZE_AFTER, ALL_PATCHES_AFTER = 2 / 3, 0.9


def image_size(start: int, full: tuple[int, int], patch: tuple[int, int], progress: float) -> tuple[int, int]:
    """(height, width), multiples of the patch, after this share of the training; `start`: the longer side at first."""
    least = start / max(full)
    scale = least + (1 - least) * min(1.0, progress / FULL_SIZE_AFTER)
    return tuple(max(1, round(scale * side / size)) * size for side, size in zip(full, patch))


class FewerTokens:
    """
    Makes the images of training batches smaller at first (as Tan and Le, arXiv:2104.00298), and leaves out a share of
    the patches of each image after they have got their positions (PatchDropout, Liu et al., arXiv:2208.07220).

    Args:
        model: whose embeddings get a hook for the patches. It does nothing in evaluation.
        recipe: `progressive_image_size`, the longer side of the first images in pixels or None; `patch_drop_rate`.
            Raises InputError where the model or other flags don't allow them.
    """

    def __init__(self, model: nn.Module, recipe: Any) -> None:
        config: ViTScratchConfig = model.config
        self.start, self.rate, self.progress = recipe.progressive_image_size, recipe.patch_drop_rate, 0.0
        self.full, self.patch, self.num_prefix_tokens = config.image_hw, config.patch_hw, config.num_prefix_tokens
        start, rate = self.start, self.rate
        needs_all = recipe.freeze == "encoder" or (recipe.distills and recipe.distillation_type == "features")
        if (start or rate) and (needs_all or not hasattr(model, "vit") or not hasattr(model, "classifier")):
            raise InputError(
                "--progressive_image_size and --patch_drop_rate are for the training of a classifier, whose encoder is "
                "not frozen and does not learn a teacher's features. Leave them out."
            )
        if start is not None and not (0 < start < max(self.full) and start % max(self.patch) == 0):
            raise InputError(
                f"--progressive_image_size {start}: give a multiple of the patch, {max(self.patch)}, below the image "
                f"size, {max(self.full)}."
            )
        if rate and (
            config.position_embedding in ("relative_1d", "rope_2d") or config.position_embedding_placement != "stem"
        ):
            raise InputError("--patch_drop_rate goes with positions that are added once, before the first layer.")
        if rate:
            model.vit.embeddings.register_forward_hook(self.drop_patches)

    def resize(self, pixel_values: Tensor, progress: float) -> Tensor:
        """Images (B, C, H, W) at the size of this share of the training."""
        self.progress = progress
        if self.start is None or progress >= FULL_SIZE_AFTER:
            return pixel_values
        size = image_size(self.start, self.full, self.patch, progress)
        return F.interpolate(pixel_values, size=size, mode="bilinear", antialias=True)

    def drop_patches(self, embeddings: nn.Module, args: tuple, tokens: Tensor) -> Tensor | None:
        """A forward hook: (B, T, D) -> (B, fewer, D), other patches in each image."""
        if not embeddings.training or self.progress >= ALL_PATCHES_AFTER:
            return None
        prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        kept = max(1, round(patches.shape[1] * (1 - self.rate)))
        chosen = torch.rand(patches.shape[:2], device=tokens.device).argsort(dim=1)[:, :kept, None]
        return torch.cat([prefix, patches.gather(1, chosen.expand(-1, -1, patches.shape[2]))], dim=1)
