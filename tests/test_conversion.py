# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of every format: read with their own numbers, written back as they came, refused where damaged."""

import argparse
import json
import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import golden_checkpoints
import jax_oracle
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from modeling_vit_scratch import (
    ViTScratchBackbone,
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchModel,
)
from modeling_vit_scratch.checkpoint.conversion import load_checkpoint, save_checkpoint
from modeling_vit_scratch.checkpoint.files import CheckpointError, open_tensors, write_tensors


GOLDEN = json.loads(golden_checkpoints.FILE.read_text())["cases"]
LIMIT = 1e-5


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()


def logits(model: nn.Module, pixel_values: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return model.eval()(pixel_values).logits.numpy()


def assert_same_file(path: Path, expected: Path) -> None:
    """The same names, and for each the same type, shape and bytes."""
    got, wanted = open_tensors(path), open_tensors(expected)
    assert set(got) == set(wanted)
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype, name
        assert got[name].shape == wanted[name].shape, name
        assert got[name].contiguous().view(torch.uint8).equal(wanted[name].contiguous().view(torch.uint8)), name


# The official .npz ----------------------------------------------------------------------------------------------------

NPZ_CASES = {
    "old names": {},
    "new names": {"names": jax_oracle.NEW},
    "representation": {"representation": 20},
    "mean over patches": {"token": False},
    "patches are no squares": {"patch": (2, 4)},
    "gray": {"channels": 1},
    "hybrid": {"stem": (1, 2), "patch": (1, 1)},
    "hybrid of three stages": {"stem": (2, 1, 1), "patch": (1, 1), "grid": (2, 2)},
    "hybrid root": {"stem": (), "patch": (2, 2)},
}


def npz_images(parameters: dict[str, np.ndarray], side: int = 4, stride: int = 1) -> np.ndarray:
    height, width = (side * stride * n for n in parameters["embedding/kernel"].shape[:2])
    channels = parameters["conv_root/kernel" if "conv_root/kernel" in parameters else "embedding/kernel"].shape[2]
    return np.random.RandomState(1).uniform(-1, 1, (2, height, width, channels)).astype(np.float32)


def to_torch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("case", NPZ_CASES)
def test_npz_gives_the_numbers_of_the_official_code_and_goes_back(case, tmp_path):
    parameters = jax_oracle.random_parameters(**NPZ_CASES[case])
    np.savez(tmp_path / "theirs.npz", **parameters)
    ours = ViTScratchForImageClassification.from_pretrained(tmp_path / "theirs.npz")
    side, stem = NPZ_CASES[case].get("grid", (4, 4))[0], NPZ_CASES[case].get("stem")
    images = npz_images(parameters, side, 1 if stem is None else 4 * 2 ** max(len(stem) - 1, 0))
    assert ours.config.image_hw == images.shape[1:3]
    for scale in (1.0, 0.003):  # dark images make the epsilons of the stem's norms matter
        pixels = images * np.float32(scale)
        assert abs(logits(ours, to_torch(pixels)) - jax_oracle.forward(parameters, pixels)).max() < LIMIT
    save_checkpoint(ours, tmp_path / "back.npz")
    assert_same_file(tmp_path / "back.npz", tmp_path / "theirs.npz")
    ours.save_pretrained(tmp_path / "folder")  # and through our own folder
    save_checkpoint(ViTScratchForImageClassification.from_pretrained(tmp_path / "folder"), tmp_path / "again.npz")
    assert_same_file(tmp_path / "again.npz", tmp_path / "theirs.npz")


def test_npz_is_compressed_or_not_and_its_name_does_not_matter(tmp_path):
    parameters = jax_oracle.random_parameters()
    np.savez_compressed(tmp_path / "theirs.npz", **parameters)
    (tmp_path / "theirs.npz").rename(tmp_path / "weights.bin")
    assert load_checkpoint(tmp_path / "weights.bin").format == "npz"


def test_npz_in_bfloat16(tmp_path):
    parameters = jax_oracle.random_parameters()
    halves = {name: torch.from_numpy(value).bfloat16() for name, value in parameters.items()}
    np.savez(tmp_path / "theirs.npz", **{name: t.view(torch.int16).numpy().view("V2") for name, t in halves.items()})
    ours = ViTScratchForImageClassification.from_pretrained(tmp_path / "theirs.npz", dtype=torch.float32)
    rounded = {name: t.float().numpy() for name, t in halves.items()}
    images = npz_images(parameters)
    assert abs(logits(ours, to_torch(images)) - jax_oracle.forward(rounded, images)).max() < LIMIT
    assert ViTScratchForImageClassification.from_pretrained(tmp_path / "theirs.npz").dtype == torch.bfloat16
    save_checkpoint(load_checkpoint(tmp_path / "theirs.npz"), tmp_path / "back.npz")
    with np.load(tmp_path / "back.npz") as back, np.load(tmp_path / "theirs.npz") as theirs:
        assert all(back[name].tobytes() == theirs[name].tobytes() for name in theirs.files)
        assert {back[name].dtype for name in back.files} == {np.dtype("V2")}
    np.savez(tmp_path / "uint.npz", **{name: t.view(torch.int16).numpy().view(np.uint16) for name, t in halves.items()})
    other = ViTScratchForImageClassification.from_pretrained(tmp_path / "uint.npz", dtype=torch.float32)
    assert (logits(other, to_torch(images)) == logits(ours, to_torch(images))).all()


def big_vision(parameters: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """The same parameters with big_vision's scanned layers and its place for positions."""
    scanned = {}
    for name, value in parameters.items():
        if "encoderblock_0/" in name:
            parts = [parameters[name.replace("encoderblock_0", f"encoderblock_{i}")] for i in range(layers)]
            scanned[name.replace("encoderblock_0", "encoderblock")] = np.stack(parts)
        elif "encoderblock_" not in name:
            scanned[name.replace("Transformer/posembed_input/pos_embedding", "pos_embedding")] = value
    return scanned


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
def test_big_vision_scanned_layers(prefix, tmp_path):
    parameters = jax_oracle.random_parameters(names=jax_oracle.NEW, token=False, layers=3)
    images = npz_images(parameters)
    scanned = {prefix + name: value for name, value in big_vision(parameters, 3).items()}
    np.savez(tmp_path / "theirs.npz", **scanned)
    ours = ViTScratchForImageClassification.from_pretrained(tmp_path / "theirs.npz")
    assert ours.config.num_hidden_layers == 3
    assert abs(logits(ours, to_torch(images)) - jax_oracle.forward(parameters, images)).max() < LIMIT
    save_checkpoint(ours, tmp_path / "back.npz")
    assert_same_file(tmp_path / "back.npz", tmp_path / "theirs.npz")


def test_big_vision_optimizer_state_is_left_over(tmp_path):
    parameters = jax_oracle.random_parameters()
    scanned = {f"params/{name}": value for name, value in parameters.items()} | {"opt/0/mu/head/bias": np.zeros(5)}
    np.savez(tmp_path / "theirs.npz", **scanned)
    checkpoint = load_checkpoint(tmp_path / "theirs.npz")
    assert any("opt/0/mu/head/bias" in note and "optimizer" in note for note in checkpoint.notes)


def test_big_vision_class_token_without_position(tmp_path):
    parameters = jax_oracle.random_parameters(names=jax_oracle.NEW)
    parameters["pos_embedding"] = parameters.pop("Transformer/posembed_input/pos_embedding")[:, 1:]
    images = npz_images(parameters)
    np.savez(tmp_path / "theirs.npz", **parameters)
    ours = ViTScratchForImageClassification.from_pretrained(tmp_path / "theirs.npz")
    assert not ours.config.cls_token_position
    expected = jax_oracle.forward(parameters, images, positions_after_token=False)
    assert abs(logits(ours, to_torch(images)) - expected).max() < LIMIT


def test_big_vision_sincos_positions(tmp_path):
    parameters = jax_oracle.random_parameters(names=jax_oracle.NEW, token=False, width=24)
    del parameters["Transformer/posembed_input/pos_embedding"]
    np.savez(tmp_path / "theirs.npz", **parameters)
    ours = ViTScratchForImageClassification.from_pretrained(tmp_path / "theirs.npz", image_size=16)
    y, x = np.mgrid[:4, :4]  # posemb_sincos_2d of big_vision, MoCo v3's
    omega = 1.0 / (10_000 ** (np.arange(6) / 5))
    y, x = np.outer(y.ravel(), omega), np.outer(x.ravel(), omega)
    positions = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)[None]
    images = npz_images(parameters)
    expected = jax_oracle.forward({**parameters, "pos_embedding": positions}, images)
    assert abs(logits(ours, to_torch(images)) - expected).max() < LIMIT
    save_checkpoint(ours, tmp_path / "back.npz")
    assert_same_file(tmp_path / "back.npz", tmp_path / "theirs.npz")


def test_old_flax_kept_the_axes_of_group_norm(tmp_path):
    parameters = jax_oracle.random_parameters(stem=(1,), patch=(1, 1))
    for name in parameters:
        if "/gn" in f"/{name}":
            parameters[name] = parameters[name].reshape(1, 1, 1, -1)
    images = npz_images(parameters, stride=4)
    np.savez(tmp_path / "theirs.npz", **parameters)
    ours = ViTScratchForImageClassification.from_pretrained(tmp_path / "theirs.npz")
    assert abs(logits(ours, to_torch(images)) - jax_oracle.forward(parameters, images)).max() < LIMIT
    save_checkpoint(ours, tmp_path / "back.npz")
    assert_same_file(tmp_path / "back.npz", tmp_path / "theirs.npz")


def test_npz_without_head_and_with_a_zero_head(tmp_path, caplog):
    transformers.utils.logging.enable_propagation()
    parameters = jax_oracle.random_parameters(representation=20)
    parameters["head/kernel"][:] = 0
    np.savez(tmp_path / "zero.npz", **parameters)
    ViTScratchForImageClassification.from_pretrained(tmp_path / "zero.npz")
    assert "all zeros" in caplog.text
    headless = {name: value for name, value in parameters.items() if not name.startswith("head/")}
    np.savez(tmp_path / "headless.npz", **headless)
    ours = ViTScratchForImageClassification.from_pretrained(tmp_path / "headless.npz")
    images = npz_images(parameters)
    assert abs(logits(ours, to_torch(images)) - jax_oracle.forward(headless, images)).max() < LIMIT
    assert "num_labels" in caplog.text


# timm and torchvision, by what they computed (golden_checkpoints.py) --------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_and_torchvision_numbers_and_round_trip(case, suffix, tmp_path):
    theirs = golden_checkpoints.weights(GOLDEN[case]["shapes"])
    file = tmp_path / ("model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin")
    if suffix == ".safetensors":
        save_file(theirs, file)
    else:
        torch.save({"model": theirs, "epoch": 3}, file)
    if GOLDEN[case]["config"]:
        (tmp_path / "config.json").write_text(json.dumps(GOLDEN[case]["config"]))
    heads = {} if GOLDEN[case]["config"] else {"num_attention_heads": 2}
    ours = ViTScratchForImageClassification.from_pretrained(tmp_path, **heads)
    got = logits(ours, golden_checkpoints.images(GOLDEN[case]["image"]))
    assert abs(got - np.array(GOLDEN[case]["output"])).max() < LIMIT
    save_checkpoint(ours, tmp_path / "back.safetensors")
    save_file(theirs, tmp_path / "theirs.safetensors")
    assert_same_file(tmp_path / "back.safetensors", tmp_path / "theirs.safetensors")
    if GOLDEN[case]["config"]:
        processor = ours.image_processor
        assert (processor.image_mean, processor.image_std, processor.crop_pct) == (
            (0.1, 0.2, 0.3),
            (0.4, 0.5, 0.6),
            0.95,
        )
        assert int(processor.resample) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_act", "gelu_pytorch_tanh"), ("layer_norm_eps", 1e-5), ("use_distillation_head", False)],
)
def test_the_golden_numbers_notice_a_wrong_configuration(field, value, tmp_path):
    case = GOLDEN["timm:deit_base_distilled_patch16_224"]
    save_file(golden_checkpoints.weights(case["shapes"]), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(case["config"]))
    wrong = ViTScratchForImageClassification.from_pretrained(tmp_path, **{field: value})
    assert abs(logits(wrong, golden_checkpoints.images(case["image"])) - np.array(case["output"])).max() > LIMIT


def test_facebooks_own_names(tmp_path):
    """DeiT III's gammas, DINOv2's registers with a position for the class token, its mask token."""
    theirs = golden_checkpoints.weights(GOLDEN["timm:deit3_base_patch16_224"]["shapes"])
    renamed = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for name, t in theirs.items()}
    save_file(renamed, tmp_path / "deit3.safetensors")
    ours = ViTScratchForImageClassification.from_pretrained(tmp_path / "deit3.safetensors", num_attention_heads=2)
    expected = np.array(GOLDEN["timm:deit3_base_patch16_224"]["output"])
    assert abs(logits(ours, golden_checkpoints.images([3, 16, 16])) - expected).max() < LIMIT
    save_checkpoint(ours, tmp_path / "back.safetensors")
    assert_same_file(tmp_path / "back.safetensors", tmp_path / "deit3.safetensors")

    case = GOLDEN["timm:vit_small_patch14_reg4_dinov2"]
    theirs = golden_checkpoints.weights(case["shapes"])
    # as timm's own reader merges them: the class token's position is added to the class token
    place = torch.full((1, 1, 16), 0.25)
    theirs["register_tokens"], theirs["mask_token"] = theirs.pop("reg_token"), torch.ones(1, 16)
    theirs["cls_token"] = theirs["cls_token"] - place
    theirs["pos_embed"] = torch.cat([place, theirs["pos_embed"]], dim=1)
    save_file(theirs, tmp_path / "dinov2.safetensors")
    ours = ViTScratchForImageClassification.from_pretrained(tmp_path / "dinov2.safetensors", num_attention_heads=2)
    got = logits(ours, golden_checkpoints.images(case["image"]))
    assert abs(got - np.array(case["output"])).max() < LIMIT
    save_checkpoint(ours, tmp_path / "back.safetensors")
    assert_same_file(tmp_path / "back.safetensors", tmp_path / "dinov2.safetensors")


def test_timms_former_representation_layer(tmp_path):
    """vit_base_patch16_224_in21k and its kin, before timm dropped pre_logits: a tanh layer, then the head."""
    case = GOLDEN["timm:vit_base_patch16_224.dino"]  # without a head it gives what the layer stands on
    more = golden_checkpoints.weights(
        {"pre_logits.fc.weight": [12, 16], "pre_logits.fc.bias": [12], "head.weight": [3, 12]}
    )
    tensors = {**golden_checkpoints.weights(case["shapes"]), **more, "head.bias": torch.ones(3)}
    torch.save(tensors, tmp_path / "in21k.pth")
    ours = ViTScratchForImageClassification.from_pretrained(tmp_path / "in21k.pth", num_attention_heads=2)
    layer = torch.tanh(torch.tensor(case["output"]) @ more["pre_logits.fc.weight"].T + more["pre_logits.fc.bias"])
    expected = (layer @ more["head.weight"].T + 1).numpy()
    assert abs(logits(ours, golden_checkpoints.images(case["image"])) - expected).max() < LIMIT
    save_checkpoint(ours, tmp_path / "back.pth")
    assert_same_file(tmp_path / "back.pth", tmp_path / "in21k.pth")


def test_training_checkpoints_of_mae_and_dino(tmp_path):
    case = GOLDEN["timm:vit_base_patch16_224.dino"]
    theirs = golden_checkpoints.weights(case["shapes"])
    decoder = {
        "mask_token": torch.ones(1, 1, 8),
        "decoder_embed.weight": torch.ones(8, 16),
        "decoder_pos_embed": torch.ones(1),
    }
    torch.save({"model": {**theirs, **decoder}, "args": argparse.Namespace(lr=1.0)}, tmp_path / "mae.pth")
    backbone = {f"module.backbone.{name}": t for name, t in theirs.items()} | {
        "module.head.mlp.0.weight": torch.ones(2)
    }
    torch.save({"student": None, "teacher": backbone, "epoch": 1}, tmp_path / "dino.pth")
    for name in ("mae.pth", "dino.pth"):
        ours = ViTScratchForImageClassification.from_pretrained(tmp_path / name, num_attention_heads=2)
        assert abs(logits(ours, golden_checkpoints.images([3, 16, 16])) - np.array(case["output"])).max() < LIMIT
        assert any("only pre-training uses" in note for note in load_checkpoint(tmp_path / name, HEADS).notes)


# transformers ---------------------------------------------------------------------------------------------------------

TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
    "num_labels": 3,
}  # fmt: skip
VIT = {**TINY, "intermediate_size": 64, "image_size": (16, 24)}
MAE = {**TINY, "intermediate_size": 64, "mask_ratio": 0.0}
DINO = {**TINY, "mlp_ratio": 2}
THEIRS = {
    "ViT": (transformers.ViTForImageClassification, transformers.ViTConfig, VIT, {}),
    "ViT, tanh and no qkv bias": (
        transformers.ViTForImageClassification, transformers.ViTConfig,
        {**VIT, "hidden_act": "gelu_pytorch_tanh", "qkv_bias": False, "layer_norm_eps": 1e-3}, {},
    ),
    "ViT with pooler": (transformers.ViTModel, transformers.ViTConfig, VIT, {}),
    "ViT with mask token": (transformers.ViTModel, transformers.ViTConfig, VIT, {"use_mask_token": True}),
    "ViT without pooler": (transformers.ViTModel, transformers.ViTConfig, VIT, {"add_pooling_layer": False}),
    "ViT, masked": (
        transformers.ViTForMaskedImageModeling, transformers.ViTConfig,
        {**VIT, "image_size": 16, "encoder_stride": 4}, {},
    ),
    "DeiT": (transformers.DeiTForImageClassification, transformers.DeiTConfig, VIT, {}),
    "DeiT with teacher": (transformers.DeiTForImageClassificationWithTeacher, transformers.DeiTConfig, VIT, {}),
    "DeiT encoder": (transformers.DeiTModel, transformers.DeiTConfig, VIT, {}),
    "MAE": (transformers.ViTMAEModel, transformers.ViTMAEConfig, MAE, {}),
    "MSN": (transformers.ViTMSNModel, transformers.ViTMSNConfig, {**TINY, "intermediate_size": 64}, {}),
    "DINOv2": (transformers.Dinov2Model, transformers.Dinov2Config, DINO, {}),
    "DINOv2 with registers": (
        transformers.Dinov2WithRegistersModel, transformers.Dinov2WithRegistersConfig, DINO, {}
    ),
}  # fmt: skip


def make_theirs(case: str) -> nn.Module:
    model_class, config_class, fields, arguments = THEIRS[case]
    theirs = model_class(config_class(**fields), **arguments).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return theirs


def our_class(theirs: nn.Module) -> type:
    name = type(theirs).__name__
    if "ForImageClassification" in name:
        return ViTScratchForImageClassification
    return ViTScratchForMaskedImageModeling if "Masked" in name else ViTScratchModel


def compare(ours: nn.Module, theirs: nn.Module) -> float:
    size = theirs.config.image_size
    images, arguments = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size)), {}
    if "MAE" in type(theirs).__name__:
        arguments["noise"] = torch.arange(16.0).expand(2, -1)
    with torch.inference_mode():
        got, expected = ours.eval()(images), theirs(images, **arguments)
    fields = [
        name
        for name in ("logits", "reconstruction", "last_hidden_state", "pooler_output")
        if getattr(expected, name, None) is not None
    ]
    return max((getattr(got, name) - getattr(expected, name)).abs().max().item() for name in fields)


@pytest.mark.parametrize("old_names", [True, False])
@pytest.mark.parametrize("case", THEIRS)
def test_transformers_numbers_and_round_trip(case, old_names, tmp_path):
    theirs = make_theirs(case)
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=old_names)
    ours = our_class(theirs).from_pretrained(tmp_path / "theirs")
    assert compare(ours, theirs) < LIMIT
    save_checkpoint(ours, tmp_path / "back")
    assert_same_file(tmp_path / "back" / "model.safetensors", tmp_path / "theirs" / "model.safetensors")
    arguments = {**THEIRS[case][3], **({"mask_ratio": 0.0} if case == "MAE" else {})}
    again, info = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True, **arguments)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert compare(ours, again.eval()) < LIMIT


def test_transformers_labels_and_processor_come_along(tmp_path):
    theirs = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            **{key: value for key, value in VIT.items() if key != "num_labels"},
            id2label={0: "cat", 1: "dog"},
            label2id={"cat": 0, "dog": 1},
        )
    )
    theirs.save_pretrained(tmp_path)
    settings = {
        "size": {"height": 16, "width": 24},
        "resample": 3,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [1.0, 2.0, 3.0],
    }
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({**settings, "image_processor_type": "ViTImageProcessor"})
    )
    ours = ViTScratchForImageClassification.from_pretrained(tmp_path)
    assert ours.config.id2label == {0: "cat", 1: "dog"}
    assert ours.image_processor.image_mean == (0.1, 0.2, 0.3)
    assert int(ours.image_processor.resample) == 3
    assert (ours.image_processor.size["height"], ours.image_processor.size["width"]) == (16, 24)


def test_transformers_in_shards_and_without_config(tmp_path):
    theirs = make_theirs("ViT")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert compare(ViTScratchForImageClassification.from_pretrained(tmp_path / "shards"), theirs) < LIMIT
    theirs = make_theirs("DINOv2")
    torch.save(theirs.state_dict(), tmp_path / "alone.pth")
    assert compare(ViTScratchModel.from_pretrained(tmp_path / "alone.pth", num_attention_heads=4), theirs) < LIMIT


def test_mae_decoder_is_left_over_and_said(tmp_path, caplog):
    transformers.utils.logging.enable_propagation()
    config = transformers.ViTMAEConfig(
        **MAE, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2
    )
    transformers.ViTMAEForPreTraining(config).save_pretrained(tmp_path / "mae")
    ViTScratchModel.from_pretrained(tmp_path / "mae")
    assert "MAE's decoder" in caplog.text


def test_every_class_reads_foreign_checkpoints(tmp_path):
    theirs = make_theirs("ViT")
    theirs.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 16, 24)
    with torch.inference_mode():
        states = theirs.vit(images).last_hidden_state
        backbone = ViTScratchBackbone.from_pretrained(tmp_path).eval()(images).feature_maps[-1]
        assert (backbone.flatten(2).transpose(1, 2) - states[:, 1:]).abs().max() < LIMIT
        masked = ViTScratchForMaskedImageModeling.from_pretrained(tmp_path).eval()
        assert (masked.vit(images).last_hidden_state - states).abs().max() < LIMIT
        model, info = ViTScratchModel.from_pretrained(tmp_path, output_loading_info=True)
        assert (model.eval()(images).last_hidden_state - states).abs().max() < LIMIT
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_hub_id_is_recognised_by_its_config(tmp_path):
    """From the Hub's cache, as it lies there after a download."""
    theirs = make_theirs("ViT")
    case = GOLDEN["timm:deit_base_patch16_224"]
    for name in ("google/vit-base-patch16-224", "timm/deit_base_patch16_224.fb_in1k"):
        folder = tmp_path / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        if name.startswith("google"):
            theirs.save_pretrained(snapshot)
        else:
            save_file(golden_checkpoints.weights(case["shapes"]), snapshot / "model.safetensors")
            (snapshot / "config.json").write_text(json.dumps(case["config"]))
    ours = ViTScratchForImageClassification.from_pretrained("google/vit-base-patch16-224", cache_dir=tmp_path)
    assert compare(ours, theirs) < LIMIT
    assert ours.name_or_path == "google/vit-base-patch16-224"
    ours = ViTScratchForImageClassification.from_pretrained("timm/deit_base_patch16_224.fb_in1k", cache_dir=tmp_path)
    assert abs(logits(ours, golden_checkpoints.images(case["image"])) - np.array(case["output"])).max() < LIMIT


def test_other_architectures_are_refused_by_name(tmp_path):
    config = {**TINY, "intermediate_size": 64}
    transformers.BeitModel(transformers.BeitConfig(**config)).save_pretrained(tmp_path / "beit")
    with pytest.raises(CheckpointError, match="beit"):
        ViTScratchModel.from_pretrained(tmp_path / "beit")
    save_file({"transformer.h.0.attn.weight": torch.ones(2)}, tmp_path / "gpt.safetensors")
    with pytest.raises(CheckpointError, match="no Vision Transformer"):
        ViTScratchModel.from_pretrained(tmp_path / "gpt.safetensors")


# Damage ---------------------------------------------------------------------------------------------------------------

HEADS = {"num_attention_heads": 2}


def a_file_of(format: str, folder: Path, change=lambda tensors: None) -> Path:
    """A small checkpoint of a format, after a change to its dictionary of tensors."""
    if format == "npz":
        tensors = jax_oracle.random_parameters()
        change(tensors)
        np.savez(folder / "model.npz", **tensors)
        return folder / "model.npz"
    if format == "transformers":
        tensors = {name: t.clone() for name, t in make_theirs("ViT").state_dict().items()}
        tensors["vit.embeddings.position_embeddings"] = tensors["vit.embeddings.position_embeddings"][:, :17].clone()
    else:
        case = "timm:deit_base_patch16_224" if format == "timm" else "torchvision:vit"
        tensors = golden_checkpoints.weights(GOLDEN[case]["shapes"])
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.mark.parametrize("format", ["npz", "timm", "transformers", "torchvision"])
def test_every_missing_key_is_named(format, tmp_path):
    whole = a_file_of(format, tmp_path)
    heads = {"num_attention_heads": 4 if format == "transformers" else 2}
    names = list(open_tensors(whole))
    load_checkpoint(whole, heads)
    for name in names:
        damaged = a_file_of(format, tmp_path, lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(damaged, heads)
        assert str(damaged) in str(error.value)
        if "cls" not in name and "class_token" not in name and "pos" not in name:
            parts = (name, *({"query", "key", "value"} & set(name.split("/"))))
            assert any(part in str(error.value) for part in parts) or "is made of" in str(error.value), name


@pytest.mark.parametrize("format", ["npz", "timm", "transformers", "torchvision"])
def test_unexpected_keys_and_wrong_shapes_are_listed(format, tmp_path):
    heads = {"num_attention_heads": 4 if format == "transformers" else 2}
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): stranger"):
        load_checkpoint(a_file_of(format, tmp_path, lambda t: t.update(stranger=next(iter(t.values())) + 0)), heads)
    norm = {"npz": "Transformer/encoder_norm/scale", "timm": "norm.weight", "torchvision": "encoder.ln.weight"}
    name = norm.get(format, "vit.layernorm.weight")
    with pytest.raises(CheckpointError, match=rf"wrong shape \(1\): {name}"):
        load_checkpoint(
            a_file_of(
                format,
                tmp_path,
                lambda t: t.update({name: t[name][:-1].copy() if format == "npz" else t[name][:-1].clone()}),
            ),
            heads,
        )


@pytest.mark.parametrize("format", ["npz", "timm"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_files_that_are_cut_short(format, part, tmp_path):
    whole = a_file_of(format, tmp_path)
    content = whole.read_bytes()
    whole.write_bytes(content[: int(part * len(content))])
    with pytest.raises(CheckpointError, match=whole.name):
        ViTScratchModel.from_pretrained(whole, num_attention_heads=2)


def test_torch_files_that_are_cut_short_or_hold_code(tmp_path):
    theirs = golden_checkpoints.weights(GOLDEN["timm:deit_base_patch16_224"]["shapes"])
    torch.save(theirs, tmp_path / "model.pth")
    content = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "model.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load_checkpoint(tmp_path / "model.pth")
    torch.save({"model": theirs, "hook": subprocess.run}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="can run code"):
        load_checkpoint(tmp_path / "code.pth")
    torch.save(theirs, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load_checkpoint(tmp_path / "old.pth", HEADS).format == "timm"


def test_files_that_are_something_else(tmp_path):
    np.savez(tmp_path / "objects.npz", **{"embedding/kernel": np.array([{}], dtype=object)})
    contents = {
        "page.npz": b"<!DOCTYPE html><html></html>",
        "pointer.npz": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "text.npz": b"hello, world, this is no checkpoint",
        "zip.npz": None,
    }
    for name, content in contents.items():
        if content is None:
            with zipfile.ZipFile(tmp_path / name, "w") as archive:
                archive.writestr("photo.png", "no")
        else:
            (tmp_path / name).write_bytes(content)
    for name in ("objects.npz", *contents, "missing.npz"):
        with pytest.raises(CheckpointError, match=name.split(".")[0]):
            load_checkpoint(tmp_path / name)
    np.save(tmp_path / "array.npy", np.ones(3))
    with pytest.raises(CheckpointError, match="single array"):
        load_checkpoint(tmp_path / "array.npy")


def test_what_the_file_does_not_say_is_asked_for_or_told(tmp_path):
    whole = a_file_of("timm", tmp_path)
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        load_checkpoint(whole)
    wide = golden_checkpoints.weights(
        {
            n: [128 if s == 16 else 384 if s == 48 else s for s in shape]
            for n, shape in GOLDEN["timm:deit_base_patch16_224"]["shapes"].items()
            if n != "pos_embed"
        }
        | {"pos_embed": [1, 17, 128]}
    )
    save_file(wide, tmp_path / "wide.safetensors")
    checkpoint = load_checkpoint(tmp_path / "wide.safetensors")
    assert checkpoint.config.num_attention_heads == 2
    assert any("num_attention_heads" in note for note in checkpoint.notes)

    # 25 positions: 4 x 6 patches and a class token, or 5 x 5 patches?
    rectangle = golden_checkpoints.weights(GOLDEN["timm:vit_base_patch16_224"]["shapes"])
    save_file(rectangle, tmp_path / "rectangle.safetensors")
    assert any("source_image_size" in n for n in load_checkpoint(tmp_path / "rectangle.safetensors", HEADS).notes)
    expected = np.array(GOLDEN["timm:vit_base_patch16_224"]["output"])
    said = {"source_image_size": (16, 24), **HEADS}
    ours = ViTScratchForImageClassification.from_pretrained(tmp_path / "rectangle.safetensors", **said)
    assert abs(logits(ours, golden_checkpoints.images([3, 16, 24])) - expected).max() < LIMIT
    for positions in (24, 22):
        rectangle["pos_embed"] = rectangle["pos_embed"][:, :positions].clone()
        save_file(rectangle, tmp_path / "rectangle.safetensors")
        with pytest.raises(CheckpointError, match="source_image_size"):
            load_checkpoint(tmp_path / "rectangle.safetensors", HEADS)
    with pytest.raises(CheckpointError, match="don't fit"):
        load_checkpoint(tmp_path / "rectangle.safetensors", said)


# Writing --------------------------------------------------------------------------------------------------------------


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    def model(**fields):
        return ViTScratchForImageClassification(ViTScratchConfig.from_variant("test/4", num_labels=3, **fields))

    for format, fields, reason in (
        ("timm", {"representation_size": 8}, "pre_logits"),
        ("npz", {}, "hidden_act"),
        ("npz", {"hidden_act": "gelu_pytorch_tanh", "num_register_tokens": 2}, "register_tokens"),
        ("npz", {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3}, "layer_norm_eps"),
        ("transformers", {"pooling": "mean"}, "pooling"),
        ("transformers", {"position_embedding": "sincos_2d"}, "position_embedding"),
        ("torchvision", {"layer_scale_init_value": 1e-5}, "layer_scale"),
        ("torchvision", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
        ("timm", {"position_embedding": "learned_2d"}, "learned_2d"),
        ("timm", {"use_gated_mlp": True}, "use_gated_mlp"),
        ("transformers", {"pooling": "map"}, "pooling='cls'"),
        ("transformers", {"stem_layers": [1], "image_size": 32}, "stem"),
        ("onnx", {}, "onnx"),
    ):
        with pytest.raises(ValueError, match=reason):
            save_checkpoint(model(**fields), tmp_path / "never", format)
        assert not (tmp_path / "never").exists()
    with pytest.raises(ValueError, match=r"\.gguf"):
        save_checkpoint(model(), tmp_path / "model.gguf", "timm")


@pytest.mark.parametrize("format", ["transformers", "timm", "torchvision", "npz"])
def test_a_model_of_ours_goes_out_and_comes_back(format, tmp_path):
    ours = ViTScratchForImageClassification(ViTScratchConfig.from_variant("test/4", num_labels=3, image_size=16))
    path = tmp_path / ("out.npz" if format == "npz" else "out")
    save_checkpoint(ours, path, format, exact=False)
    arguments = {"num_attention_heads": 4} if format == "torchvision" else {}
    again = ViTScratchForImageClassification.from_pretrained(path, hidden_act="gelu", layer_norm_eps=1e-6, **arguments)
    images = torch.randn(2, 3, 16, 16)
    assert (logits(ours, images) == logits(again, images)).all()


def test_writing_never_leaves_half_a_file(tmp_path):
    class Broken(dict):
        def __getitem__(self, name):
            raise RuntimeError("out of memory")

    write_tensors(tmp_path / "model.npz", {"a": torch.ones(2)})
    with pytest.raises(RuntimeError):
        write_tensors(tmp_path / "model.npz", Broken(a=1))
    assert [file.name for file in tmp_path.iterdir()] == ["model.npz"]
    assert open_tensors(tmp_path / "model.npz")["a"].tolist() == [1, 1]


# The hybrid models and the counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "count"),
    [
        ("B/8", 86_576_872), ("B/16", 86_567_656), ("B/32", 88_224_232), ("L/16", 304_326_632), ("L/32", 306_535_400),
        ("H/14", 632_045_800), ("S/16", 22_050_664), ("S/32", 22_878_952), ("Ti/16", 5_717_416), ("R+Ti/16", 6_337_704),
        ("R26+S/32", 36_431_912), ("R26+B/32", 101_383_976), ("R50+B/16", 98_659_112), ("R50+L/32", 328_994_856),
    ],
)  # fmt: skip
def test_parameter_counts_of_the_official_model_test(variant, count):
    with torch.device("meta"):
        model = ViTScratchForImageClassification(ViTScratchConfig.from_variant(variant, num_labels=1000))
    assert model.num_parameters() == count


def hybrid(**fields) -> ViTScratchConfig:
    more = {"stem_layers": [1, 2], "stem_width_factor": 0.5, "patch_size": 8, "image_size": [16, 24], **fields}
    return ViTScratchConfig.from_variant("test/4", num_labels=3, **more)


def test_hybrid_compiles_exports_trains_and_takes_other_sizes():
    model = ViTScratchForImageClassification(hybrid()).eval()
    for size in ((16, 24), (32, 8)):
        images = torch.randn(2, 3, *size)
        expected = model(images).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(images).logits, expected)
    exported = torch.export.export(model, (torch.randn(2, 3, 16, 24),)).module()
    images = torch.randn(2, 3, 16, 24)
    assert torch.allclose(exported(images).logits, model(images).logits, atol=1e-6)
    with pytest.raises(ValueError, match="8 or 16"):
        model(torch.randn(1, 3, 12, 16))
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
        model.train()(images, labels=torch.tensor([0, 2])).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))
    assert torch.isfinite(model.eval().bfloat16()(images).logits).all()


def test_configurations_that_cannot_work():
    for fields, reason in (
        ({"patch_size": 4}, "reduces the image 8 times"),
        ({"stem_layers": [1, 0]}, "at least 1 unit"),
        ({"stem_width_factor": 0.3}, "multiple of 0.5"),
    ):
        with pytest.raises(ValueError, match=reason):
            hybrid(**fields)
    for fields, reason in (
        ({"use_distillation_head": True}, "use_distillation_token"),
        ({"use_distillation_token": True, "pooling": "mean"}, "class token"),
        ({"norm_after_pooling": True, "pooling": "map"}, "'map'"),
        ({"position_embedding": "rope_2d", "num_attention_heads": 16}, "4 divides"),
    ):
        with pytest.raises(ValueError, match=reason):
            ViTScratchConfig.from_variant("test/4", **fields)
    with pytest.raises(ValueError, match="Masked image modeling"):
        ViTScratchForMaskedImageModeling(hybrid())


def test_a_fresh_stem_is_the_identity_of_its_shortcuts():
    """As in models_resnet.py: the last norm of a unit starts at zero."""
    model = ViTScratchForImageClassification(hybrid())
    scales = {
        name: p for name, p in model.named_parameters() if "stem" in name and "norm" in name and name.endswith("weight")
    }
    assert all((p == (0 if "norm3" in name else 1)).all() for name, p in scales.items())


# Scripts and imports --------------------------------------------------------------------------------------------------


SCRIPT = Path(__file__).parent.parent / "scripts" / "convert.py"


@pytest.fixture
def convert(monkeypatch, capsys):
    """Runs the script in this process: arguments to exit status and what it prints, warnings included."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        status = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def test_convert_script(convert, tmp_path, caplog):
    transformers.utils.logging.enable_propagation()
    theirs = make_theirs("ViT")
    theirs.save_pretrained(tmp_path / "theirs")
    labels = tmp_path / "labels.txt"
    labels.write_text("cat\ndog\n")
    options = ("--image_size", 32, 40, "--labels", labels, "--verify")
    status, printed = convert(tmp_path / "theirs", tmp_path / "ours", *options)
    assert status == 0, printed
    assert "transformers checkpoint; width 32" in printed
    assert "Written" in printed
    assert float(printed.split("largest difference ")[1].split(",")[0]) < LIMIT
    assert "Positions: resampled, bicubic; grid 4 x 6 to 8 x 10" in caplog.text
    ours = ViTScratchForImageClassification.from_pretrained(tmp_path / "ours")
    assert ours.config.image_hw == (32, 40)
    assert ours.config.id2label == {0: "cat", 1: "dog"}
    settings = json.loads((tmp_path / "ours" / "preprocessor_config.json").read_text())
    assert settings["size"] == {"height": 32, "width": 40}


def test_convert_script_through_our_folder_and_back(convert, tmp_path):
    np.savez(tmp_path / "in.npz", **jax_oracle.random_parameters(representation=20))
    for source, output, *more in (("in.npz", "own"), ("own", "out.npz", "--format", "npz")):
        status, printed = convert(tmp_path / source, tmp_path / output, *more)
        assert status == 0, printed
    assert_same_file(tmp_path / "out.npz", tmp_path / "in.npz")


def test_convert_script_writes_over_nothing_without_being_asked(convert, tmp_path):
    np.savez(tmp_path / "in.npz", **jax_oracle.random_parameters())
    trained = tmp_path / "trained"
    ViTScratchForImageClassification(ViTScratchConfig.from_variant("test/4", num_labels=2)).save_pretrained(trained)
    (trained / "results.json").write_text("{}")
    (trained / "checkpoint-40").mkdir()
    before = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    status, printed = convert(tmp_path / "in.npz", trained)
    assert status == 1
    assert "is there already, with checkpoint-40, compatibility_vit_scratch.py, config.json" in printed
    assert {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()} == before
    (tmp_path / "out.npz").write_text("mine")
    assert convert(tmp_path / "in.npz", tmp_path / "out.npz", "--format", "npz")[0] == 1
    assert (tmp_path / "out.npz").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert convert(tmp_path / "in.npz", tmp_path / "empty")[0] == 0
    status, printed = convert(tmp_path / "in.npz", trained, "--overwrite")
    assert status == 0, printed
    assert "Left as they were, and not about these weights: checkpoint-40, results.json." in printed
    assert ViTScratchForImageClassification.from_pretrained(trained).num_labels == 5


def test_convert_script_never_writes_over_its_source(convert, tmp_path):
    source = tmp_path / "models" / "in"
    ViTScratchForImageClassification(ViTScratchConfig.from_variant("test/4", num_labels=2)).save_pretrained(source)
    before = (source / "model.safetensors").read_bytes()
    for output, more in (
        (source, ()), (tmp_path / "models", ()), (source / "model.safetensors", ("--format", "timm")),
        (tmp_path / "models" / ".." / "models" / "in", ()),
    ):  # fmt: skip
        status, printed = convert(source, output, "--overwrite", *more)
        assert status == 1
        assert "which is read" in printed
    assert (source / "model.safetensors").read_bytes() == before
    assert convert(source, source / "timm.safetensors", "--format", "timm")[0] == 0  # a new file beside it


def test_convert_script_fails_in_a_sentence(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent)}
    command = [sys.executable, SCRIPT, tmp_path / "broken.npz", tmp_path / "never"]
    failed = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert "broken.npz" in failed.stderr


def test_importing_the_package_does_not_import_the_readers():
    code = "import sys, modeling_vit_scratch as m; print([n for n in sys.modules if 'scratch.checkpoint' in n])"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
