# SPDX-License-Identifier: Apache-2.0
"""
Vision Transformers of transformers beside its ViT: each opens with the numbers and gradients of transformers' own class
on images of several sizes, and is written back as it came.
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from conversion.verification import largest_difference
from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchModel
from modeling_vit_scratch.acceleration.speed_up import speed_up
from modeling_vit_scratch.checkpoint.conversion import load_checkpoint, save_checkpoint
from modeling_vit_scratch.checkpoint.files import CheckpointError


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "patch_size": 4}
PICTURE = SMALL | {"image_size": 16}
DINO = {name: value for name, value in PICTURE.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}
PAIR = {"vision_config": PICTURE, "text_config": TEXT, "num_labels": 3}
NAFLEX = SMALL | {"num_patches": 16}
SIZES = [(16, 16), (24, 12)]

# The class, its configuration, and what of ours must be as it says.
MODELS = {
    "dinov3": ("DINOv3ViTModel", PICTURE | {"num_register_tokens": 4}, {"position_embedding": "rope_2d"}),
    "dinov3 plus": (
        "DINOv3ViTModel",
        PICTURE | {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu", "patch_size": [4, 2]},
        {"use_gated_mlp": True, "key_bias": False, "hidden_act": "silu"},
    ),
    "dinov3 7b": (
        "DINOv3ViTModel",
        PICTURE | {"query_bias": False, "value_bias": False, "num_register_tokens": 4, "rope_theta": 50.0},
        {"qkv_bias": False, "rope_theta": 50.0},
    ),
    "dinov3 all biases": ("DINOv3ViTModel", PICTURE | {"key_bias": True}, {"key_bias": True, "num_register_tokens": 0}),
    "dinov2 giant": ("Dinov2Model", DINO | {"use_swiglu_ffn": True}, {"use_gated_mlp": True, "hidden_act": "silu"}),
    "dinov2 head": ("Dinov2ForImageClassification", DINO | {"num_labels": 3}, {"pooling": "cls_mean"}),
    "dinov2 registers, giant, head": (
        "Dinov2WithRegistersForImageClassification",
        DINO | {"num_labels": 3, "use_swiglu_ffn": True, "num_register_tokens": 2}, {"pooling": "cls_mean"},
    ),
    "ijepa": ("IJepaModel", PICTURE, {"pooling": "mean"}),
    "ijepa head": ("IJepaForImageClassification", PICTURE | {"num_labels": 3}, {"pooling": "mean"}),
    "msn head": ("ViTMSNForImageClassification", PICTURE | {"num_labels": 3}, {"pooling": "cls"}),
    "siglip": ("SiglipVisionModel", PICTURE, {"pooling": "map", "hidden_act": "gelu_pytorch_tanh"}),
    "siglip whole": ("SiglipModel", PAIR, {"pooling": "map"}),
    "siglip head": ("SiglipForImageClassification", PAIR, {"pooling": "mean"}),
    "siglip without pooling": ("SiglipVisionModel", PICTURE | {"vision_use_head": False}, {"pooling": "mean"}),
    "siglip2": ("Siglip2VisionModel", NAFLEX, {"position_embedding_interpolation": "bilinear_antialias"}),
    "siglip2 head": ("Siglip2ForImageClassification", PAIR | {"vision_config": NAFLEX}, {"pooling": "mean"}),
    "clip": ("CLIPVisionModel", PICTURE, {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "use_pre_norm": True}),
    "clip whole": ("CLIPModel", PAIR, {"norm_after_pooling": True}),
    "clip projection": ("CLIPVisionModelWithProjection", PICTURE, {"patch_bias": False}),
    "clip head": ("CLIPForImageClassification", PAIR, {"pooling": "mean", "use_final_norm": False}),
    "metaclip": ("MetaClip2VisionModel", PICTURE, {"pooling": "cls"}),
    "metaclip head": ("MetaClip2ForImageClassification", PAIR, {"pooling": "mean"}),
    "aimv2": ("Aimv2VisionModel", PICTURE | {"use_head": False}, {"norm_type": "rmsnorm", "layer_norm_eps": 1e-5}),
    "aimv2 biases": (
        "Aimv2VisionModel", PICTURE | {"use_head": False, "qkv_bias": True, "mlp_bias": True}, {"proj_bias": True},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()


def original(name: str, folder) -> torch.nn.Module:
    """transformers' own model in the folder, with weights far from where they start: zeros and ones hide mistakes."""
    kind, options, _ = MODELS[name]
    kind, generator = getattr(transformers, kind), torch.Generator().manual_seed(0)
    theirs = kind(kind.config_class(**options)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(folder)
    return theirs


def as_naflex(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """SigLIP 2 takes patches (B, N, height * width * C), as its image processor cuts them."""
    (batch, channels, height, width), patch = images.shape, SMALL["patch_size"]
    grid = height // patch, width // patch
    patches = images.reshape(batch, channels, grid[0], patch, grid[1], patch).permute(0, 2, 4, 3, 5, 1)
    patches = patches.reshape(batch, grid[0] * grid[1], -1)
    mask = torch.ones(patches.shape[:2], dtype=torch.long)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([grid] * batch)}


def run_theirs(theirs: torch.nn.Module, images: torch.Tensor):
    if hasattr(theirs, "text_model") or hasattr(theirs, "visual_projection"):
        theirs = theirs.vision_model
    if "Siglip2" in type(theirs).__name__:
        return theirs(**as_naflex(images))
    resizes = not type(theirs).__name__.startswith(("Dino", "DINO", "Aimv2"))
    return theirs(images, **({"interpolate_pos_encoding": True} if resizes else {}))


def outputs(model_outputs) -> dict[str, torch.Tensor]:
    fields = ("logits", "last_hidden_state", "pooler_output")
    return {field: model_outputs[field] for field in fields if model_outputs.get(field) is not None}


@pytest.mark.parametrize("name", MODELS)
def test_numbers_and_gradients_are_those_of_transformers(name, tmp_path):
    theirs, (kind, _, says) = original(name, tmp_path), MODELS[name]
    head = "Classification" in kind
    ours = (ViTScratchForImageClassification if head else ViTScratchModel).from_pretrained(tmp_path).eval()
    assert {field: getattr(ours.config, field) for field in says} == says
    # AIMv2 adds the positions of its own grid to any image.
    for size in SIZES[:1] if "aimv2" in name else SIZES:
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
        own, other = images.clone().requires_grad_(), images.clone().requires_grad_()
        got, wanted = outputs(ours(own)), outputs(run_theirs(theirs, other))
        compared = [field for field in wanted if field in got]
        assert compared
        for field in compared:
            assert (got[field] - wanted[field]).abs().max() < 1e-5 * wanted[field].abs().max().clamp(min=1), field
        for value in (got, wanted):
            sum(value[field].square().mean() for field in compared).backward()
        assert (own.grad - other.grad).abs().max() < 1e-5 * other.grad.abs().max().clamp(min=1)
        assert other.grad.abs().max() > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_it_is_written_back_as_it_came(name, tmp_path):
    theirs = original(name, tmp_path / "theirs")
    save_checkpoint(load_checkpoint(tmp_path / "theirs"), tmp_path / "back")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "back"))
    assert after
    for key, value in after.items():
        source = next(k for k in (key, f"vision_model.{key}", key.removeprefix("vit.")) if k in before)
        assert value.shape == before[source].shape
        assert torch.equal(value, before[source])
    kind = getattr(transformers, json.loads((tmp_path / "back" / "config.json").read_text())["architectures"][0])
    again, report = kind.from_pretrained(tmp_path / "back", output_loading_info=True)
    unused = {
        k for k in report["missing_keys"] if not any(part in k for part in ("head", "post_layernorm", "register"))
    }
    assert not unused
    assert not report["unexpected_keys"]
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    got, wanted = outputs(run_theirs(again.eval(), images)), outputs(run_theirs(theirs, images))
    assert all(torch.equal(got[field], wanted[field]) for field in got)


@pytest.mark.parametrize("name", ["dinov3 plus", "siglip", "clip", "aimv2"])
def test_saved_as_ours_and_sped_up_it_gives_the_same(name, tmp_path):
    original(name, tmp_path)
    ours = ViTScratchForImageClassification.from_pretrained(tmp_path, num_labels=3)
    images = torch.randn(2, 3, 16, 16)
    ours.classifier.weight.data.normal_()
    wanted = ours.eval()(images)
    ours.save_pretrained(tmp_path / "ours")
    again = ViTScratchForImageClassification.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        plain = again(images, output_attentions=True)
        assert torch.allclose(plain.logits, wanted.logits, atol=1e-6)
        assert torch.allclose(plain.attentions[0].sum(-1), torch.ones(()), atol=1e-5)
        assert torch.allclose(speed_up(again)(images).logits, wanted.logits, atol=1e-5)


@pytest.mark.parametrize("pooling", ["map", "cls_mean"])
def test_pooling_leaves_out_what_is_masked(pooling):
    model = ViTScratchModel(ViTScratchConfig.from_variant("test/4", pooling=pooling)).eval()
    states, mask = torch.randn(2, model.config.num_prefix_tokens + 24, 32), torch.ones(2, 24).long()
    mask = torch.cat([torch.ones(2, model.config.num_prefix_tokens).long(), mask], dim=1)
    mask[:, -5:] = 0
    with torch.no_grad():
        assert torch.allclose(model.pooler(states, mask), model.pooler(states[:, :-5]), atol=1e-6)
        assert not torch.allclose(model.pooler(states, mask), model.pooler(states), atol=1e-4)


def test_a_pooling_of_no_projection_and_positions_of_no_grid_are_said(tmp_path):
    config = transformers.Aimv2VisionConfig(**PICTURE)  # as aimv2-large-patch14-224-lit
    theirs = transformers.Aimv2VisionModel(config).eval()
    theirs.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 16, 16)
    ours = ViTScratchModel.from_pretrained(tmp_path).eval()
    assert torch.allclose(ours(images).last_hidden_state, theirs(images).last_hidden_state, atol=1e-5)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "x.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    for source in (tmp_path, tmp_path / "bare" / "x.safetensors"):
        checkpoint = load_checkpoint(source, {"num_attention_heads": 2})
        difference, largest = largest_difference(checkpoint, ours)
        assert difference < 1e-5 * largest
    assert any("AIMv2's pooling" in note for note in load_checkpoint(tmp_path).notes)
    config.is_native = True
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="positions for the size of each image"):
        load_checkpoint(tmp_path)
