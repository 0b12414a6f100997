# SPDX-License-Identifier: Apache-2.0
"""Grad-CAM (Selvaraju et al., arXiv:1610.02391): which patches speak for a class."""

import numpy as np
import torch
from torch import Tensor, nn

from ..common.errors import InputError
from ..modeling_vit_scratch import ViTScratchPreTrainedModel
from .photos import encoder, evaluating


def grad_cam(
    model: ViTScratchPreTrainedModel, pixel_values: Tensor, classes: list[int] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Grad-CAM maps of the last layer's tokens after its first LayerNorm: each channel is weighted by the mean, over the
    patches, of the gradient of the class's logit; channels are summed, and negative values cut. (After that layer's
    attention, patches have no gradient in a model that pools by the class token.)

    Args:
        model: with a classifier.
        pixel_values: (B, C, H, W), from the image processor.
        classes: of each image. Default: the predicted one.

    Returns:
        Maps (B, rows, columns), float32, not below 0; the classes (B,); the logits (B, K).

    Raises:
        InputError: if the model has no classifier, or no such class.
    """
    num_labels = getattr(model, "num_labels", 0)
    if not num_labels or not hasattr(model, "classifier"):
        raise InputError("Grad-CAM explains a class, and the model has no classifier. Fine-tune it first.")
    unknown = [label for label in classes or [] if not 0 <= label < num_labels]
    if unknown:
        raise InputError(f"There is no class {unknown[0]}: the model has the classes 0 to {num_labels - 1}.")
    base, tokens = encoder(model), []

    def start_here(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        tokens.append(output.detach().requires_grad_())
        return tokens[0]

    handle = base.layers[-1].layernorm_before.register_forward_hook(start_here)
    try:
        with torch.enable_grad(), evaluating(model):
            logits = model(pixel_values.to(base.device)).logits
            chosen = logits.argmax(dim=1) if classes is None else torch.tensor(classes, device=logits.device)
            total = logits.gather(1, chosen[:, None]).sum()  # an image's logit depends on its own tokens alone
            (gradient,) = torch.autograd.grad(total, tokens[0])
    finally:
        handle.remove()
    prefix = base.config.num_prefix_tokens
    weights = gradient[:, prefix:].float().mean(dim=1)  # (B, D)
    maps = torch.einsum("bnd,bd->bn", tokens[0].detach()[:, prefix:].float(), weights).relu()
    maps = maps.unflatten(1, base.embeddings.patch_embeddings.grid(pixel_values))
    return maps.cpu().numpy(), chosen.cpu().numpy(), logits.detach().float().cpu().numpy()
