# SPDX-License-Identifier: Apache-2.0
"""Ours against theirs: a converted model beside the implementation that its checkpoint was made for."""

import importlib.util
import os

import torch
from torch import Tensor, nn

from modeling_vit_scratch.checkpoint.conversion import Checkpoint
from modeling_vit_scratch.checkpoint.formats import TIMM, TORCHVISION, TRANSFORMERS
from modeling_vit_scratch.checkpoint.layouts import split
from modeling_vit_scratch.checkpoint.their_files import their_configs


def largest_difference(checkpoint: Checkpoint, model: nn.Module) -> tuple[float, float] | str:
    """
    The largest difference between the outputs of the source's implementation and ours, on the same random images in
    float32 on the CPU, and the largest output; or the reason why there is nothing to compare with.
    """
    theirs = reference_model(checkpoint)
    if isinstance(theirs, str):
        return theirs
    theirs = theirs.float().eval()
    height, width = checkpoint.config.image_hw
    images = torch.randn(2, checkpoint.config.num_channels, height, width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, got = model_output(theirs, images), model_output(model.float().eval(), images)
        if expected.dim() == 2 and got.dim() == 3:  # timm's features are those of the class token
            got = got[:, 0]
    return (expected - got).abs().max().item(), expected.abs().max().item()


def reference_model(checkpoint: Checkpoint) -> nn.Module | str:
    """The implementation that a checkpoint was made for, with its weights; or the reason why it can't be had."""
    builders = {TIMM.name: _timm_model, TRANSFORMERS.name: _transformers_model, TORCHVISION.name: _torchvision_model}
    if checkpoint.format not in builders:
        return f"the implementation for the {checkpoint.format} format is no installable package"
    if importlib.util.find_spec(checkpoint.format) is None:
        return f"{checkpoint.format} is not installed"
    return builders[checkpoint.format](checkpoint)


def model_output(model: nn.Module, images: Tensor) -> Tensor:
    """The logits of anybody's classifier; of an encoder, the hidden states."""
    output = model(images)
    if torch.is_tensor(output):
        return output
    return output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    tensors = {name: checkpoint.file[name] for theirs, _ in checkpoint.rows.values() for name in theirs}
    return split(tensors, checkpoint.config.source_format.get("joins", {}))


def _transformers_model(checkpoint: Checkpoint) -> nn.Module | str:
    import transformers

    folder, dialect = os.path.dirname(checkpoint.source), checkpoint.config.source_format
    if dialect["model_type"].startswith("siglip2"):
        return "SigLIP 2's code takes patches, not images"
    written = their_configs(TRANSFORMERS, checkpoint.config, dialect, None, checkpoint.rows)["config.json"]
    model_class = getattr(transformers, written["architectures"][0])
    if os.path.isfile(os.path.join(folder, "config.json")):
        if model_class.__name__.startswith("ViTMAE"):
            return _without_masking(model_class.from_pretrained(folder, mask_ratio=0.0))
        return model_class.from_pretrained(folder)
    config = transformers.CONFIG_MAPPING[dialect["model_type"]](**written)
    return model_class.from_pretrained(None, config=config, state_dict=_tensors(checkpoint))


def _without_masking(model: nn.Module) -> nn.Module:
    """ViTMAE shuffles the patches at random, even if it masks none."""
    forward = model.forward

    def ordered(images: Tensor) -> Tensor:
        patches = model.embeddings.patch_embeddings.num_patches
        return forward(images, noise=torch.arange(patches).float().expand(len(images), -1)).last_hidden_state

    model.forward = ordered
    return model


def _timm_model(checkpoint: Checkpoint) -> nn.Module:
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    folder, name = os.path.split(checkpoint.source)
    if name == "model.safetensors" and os.path.isfile(os.path.join(folder, "config.json")):
        return timm.create_model(f"local-dir:{folder}", pretrained=True)
    dialect = checkpoint.config.source_format
    written = their_configs(TIMM, checkpoint.config, dialect, None, checkpoint.rows)["config.json"]
    model = timm.create_model(written["architecture"], num_classes=written["num_classes"], **written["model_args"])
    model.load_state_dict(checkpoint_filter_fn(_tensors(checkpoint), model, adapt_layer_scale=True))
    return model


def _torchvision_model(checkpoint: Checkpoint) -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    config = checkpoint.config
    model = VisionTransformer(
        config.image_hw[0], config.patch_hw[0], config.num_hidden_layers, config.num_attention_heads,
        config.hidden_size, config.intermediate_size, num_classes=config.num_labels,
        representation_size=config.representation_size,
    )  # fmt: skip
    model.load_state_dict(_tensors(checkpoint))
    return model
