# SPDX-License-Identifier: Apache-2.0
"""The same network as other people implement it, with the same weights, where it is installed."""

import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from conversion.verification import model_output, reference_model
from modeling_vit_scratch.checkpoint.conversion import load_checkpoint, save_checkpoint
from modeling_vit_scratch.checkpoint.formats import TIMM, TORCHVISION, TRANSFORMERS
from modeling_vit_scratch.modeling_vit_scratch import ViTScratchForImageClassification


VIT_PYTORCH = "vit-pytorch"
PEERS = (TRANSFORMERS.name, TIMM.name, TORCHVISION.name, VIT_PYTORCH)
# It has two more LayerNorms on the patches and no bias on its queries, keys and values.
VIT_PYTORCH_NOTE = "another architecture of the same sizes, with weights of its own"
# Of logits in float32, as a share of the largest.
TOLERANCE = 1e-4


def build_peers(
    ours: ViTScratchForImageClassification, folder: str, names: Sequence[str] = PEERS
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """
    Everybody's implementation of our model, in float32 on the CPU.

    Args:
        ours: plain enough that others have it too.
        folder: for the weights in the formats of the others; can be removed afterwards.
        names: which of `PEERS`.

    Returns:
        The models by name, and for each that can't be had, or does not compute what ours does, the reason.
    """
    models, missing = {}, {}
    for name in names:
        try:
            theirs = _vit_pytorch(ours) if name == VIT_PYTORCH else _converted(ours, Path(folder, name), name)
        except Exception as error:  # whatever other people's code raises here, the rest can be measured
            theirs = f"{type(error).__name__}: {str(error).strip() or '-'}".splitlines()[0]
        (missing if isinstance(theirs, str) else models)[name] = theirs
    return models, missing


def _converted(ours: ViTScratchForImageClassification, path: Path, name: str) -> nn.Module | str:
    save_checkpoint(ours, path, name)
    theirs = reference_model(load_checkpoint(path, {"num_attention_heads": ours.config.num_attention_heads}))
    if isinstance(theirs, nn.Module):
        check_equal(name, ours, theirs)
    return theirs


def check_equal(name: str, ours: nn.Module, theirs: nn.Module) -> None:
    """Raises RuntimeError if the logits of two random images differ by more than `TOLERANCE` of the largest."""
    config = ours.config
    images = torch.randn(2, config.num_channels, *config.image_hw, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, got = model_output(ours.eval(), images), model_output(theirs.eval(), images)
    difference, largest = (expected - got).abs().max().item(), expected.abs().max().item()
    if not difference <= TOLERANCE * largest:
        raise RuntimeError(
            f"{name} does not compute what ours does: logits differ by {difference:.1e}, the largest is {largest:.1e}. "
            "It is not timed. Please report this with the versions of both."
        )


def _vit_pytorch(ours: ViTScratchForImageClassification) -> nn.Module | str:
    config = ours.config
    try:
        vit_pytorch = importlib.import_module("vit_pytorch")
    except (ImportError, RuntimeError) as error:
        return str(error).strip().splitlines()[0]
    return vit_pytorch.ViT(
        image_size=config.image_hw, patch_size=config.patch_hw, num_classes=config.num_labels,
        dim=config.hidden_size, depth=config.num_hidden_layers, heads=config.num_attention_heads,
        mlp_dim=config.intermediate_size, channels=config.num_channels,
        dim_head=config.hidden_size // config.num_attention_heads,
    )  # fmt: skip


def random_batch(model: nn.Module, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) as the image processor makes them, and labels (B,): the same for everybody."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    images = torch.randn(size, config.num_channels, *config.image_hw, generator=generator)
    labels = torch.randint(config.num_labels, (size,), generator=generator)
    return images.to(device), labels.to(device)
