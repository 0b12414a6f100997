# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as training scripts leave them: the network is found in what is around it, and what is left is said."""

import argparse
import datetime
import json
import pathlib
import re
import sys
import types

import golden_checkpoints
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchModel
from modeling_vit_scratch.checkpoint.conversion import load_checkpoint
from modeling_vit_scratch.checkpoint.files import CheckpointError, open_tensors


GOLDEN = json.loads(golden_checkpoints.FILE.read_text())["cases"]
HEADS = {"num_attention_heads": 2}


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()


def theirs(case: str = "timm:deit_base_patch16_224") -> dict[str, torch.Tensor]:
    return golden_checkpoints.weights(GOLDEN[case]["shapes"])


def assert_opens(file: pathlib.Path, case: str = "timm:deit_base_patch16_224") -> list[str]:
    """With the numbers of the golden case; the notes."""
    model = ViTScratchForImageClassification.from_pretrained(file, **HEADS).eval()
    with torch.inference_mode():
        got = model(golden_checkpoints.images(GOLDEN[case]["image"])).logits
    assert np.abs(got.numpy() - np.array(GOLDEN[case]["output"])).max() < 1e-5
    return load_checkpoint(file, HEADS).notes


def prefixed(prefix: str, case: str = "timm:deit_base_patch16_224", **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in theirs(case).items()} | more


@pytest.mark.parametrize(
    "prefix", ["model.", "net.", "_orig_mod.module.", "module._orig_mod.", "encoder.visual.trunk.", "timm_model."]
)
@pytest.mark.parametrize("case", ["timm:deit_base_patch16_224", "torchvision:vit"])
def test_any_prefix_in_either_kind_of_file(prefix, case, tmp_path):
    torch.save(prefixed(prefix, case), tmp_path / "model.pth")
    save_file(prefixed(prefix, case), tmp_path / "model.safetensors")
    for name in ("model.pth", "model.safetensors"):
        assert not any("Left out" in note for note in assert_opens(tmp_path / name, case))


@pytest.mark.parametrize(
    ("content", "left"),
    [
        (prefixed("module.", n_averaged=torch.tensor(7)), "beside 'module': n_averaged."),
        (prefixed("model.") | {"criterion.weight": torch.ones(3)}, "beside 'model': criterion."),
        ({"state_dict": theirs(), "best_acc1": torch.tensor(71.3), "epoch": 3}, "beside 'state_dict': best_acc1."),
        ({"state_dict": prefixed("module."), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, "optimizer."),
        ({"model": {"a": {"deep": {"place": theirs()}}}}, None),
        ({"state_dict": prefixed("model.") | {"loss.weight": torch.ones(1)}, "hyper_parameters": {"lr": 0.1}}, "loss"),
    ],
    ids=["average", "criterion", "pytorch/examples", "optimizer", "deep", "lightning"],
)
def test_what_lies_beside_is_set_aside_and_said(content, left, tmp_path):
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    notes = [note for note in assert_opens(tmp_path / "checkpoint.pth.tar") if note.startswith("Left out")]
    assert len(notes) == (left is not None)
    assert left is None or left in notes[0]


def test_teachers_and_averages_are_taken_and_two_strangers_are_not(tmp_path):
    other = {name: tensor + 1 for name, tensor in theirs().items()}
    for content in (
        {"student": {f"module.{name}": t for name, t in other.items()}, "teacher": theirs()},
        {"model": other, "model_ema": theirs()},
        {"state_dict": prefixed("ema.module.") | {f"net.{name}": t for name, t in other.items()}},
        prefixed("teacher.") | {f"student.{name}": t for name, t in other.items()},
    ):
        torch.save(content, tmp_path / "two.pth")
        assert any("Left out" in note for note in assert_opens(tmp_path / "two.pth"))
    torch.save({"first": theirs(), "second": other}, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match=r"2 networks in it, 'first\.', 'second\.'"):
        load_checkpoint(tmp_path / "two.pth")


def test_dinov2s_teacher_checkpoint(tmp_path):
    """backbone. beside dino_head. and ibot_head., and layers in chunks: blocks.CHUNK.LAYER."""
    case = "timm:vit_small_patch14_dinov2"
    backbone = {re.sub(r"^blocks\.", "blocks.0.", name): tensor for name, tensor in theirs(case).items()}
    backbone = {f"backbone.{name}": tensor for name, tensor in backbone.items()}
    heads = {
        f"{head}.{name}": torch.ones(2)
        for head in ("dino_head", "ibot_head")
        for name in ("mlp.0.weight", "last_layer.weight_g")
    }
    torch.save({"teacher": {**backbone, "backbone.mask_token": torch.zeros(1, 16), **heads}}, tmp_path / "teacher.pth")
    notes = assert_opens(tmp_path / "teacher.pth", case)
    assert any(
        "dino_head (2 tensors), teacher.ibot_head" in note and "only pre-training uses" in note for note in notes
    )
    config = load_checkpoint(tmp_path / "teacher.pth", HEADS).config
    assert (config.position_embedding_interpolation, config.use_mask_token) == ("bicubic_offset", True)


def test_torchvision_with_a_head_of_ones_own(tmp_path):
    """`model.heads = nn.Linear(...)`, as fine-tuning guides have it, alone or after a dropout."""
    case = "torchvision:vit"
    for head in ("heads.", "heads.0.", "heads.1."):
        tensors = {name.replace("heads.head.", head): tensor for name, tensor in theirs(case).items()}
        torch.save(tensors, tmp_path / "model.pth")
        assert_opens(tmp_path / "model.pth", case)


class _Renamed:
    """A class of a package that is not here, under the name that pickles know."""

    def __init__(self, name: str, base: type) -> None:
        module, _, kind = name.rpartition(".")
        self.module, self.value = module, type(kind, (base,), {"__module__": module})

    def __enter__(self) -> type:
        parts = self.module.split(".")
        self.made = [".".join(parts[: n + 1]) for n in range(len(parts))]
        sys.modules.update({name: types.ModuleType(name) for name in self.made})
        setattr(sys.modules[self.module], self.value.__name__, self.value)
        return self.value

    def __exit__(self, *_: object) -> None:
        for name in self.made:
            del sys.modules[name]


def test_plain_values_beside_the_weights_are_read(tmp_path):
    more = {
        "acc": np.float64(71.3), "step": np.int32(3), "path": pathlib.Path("a/b"),
        "rng": np.random.RandomState(0).get_state(),
        "args": argparse.Namespace(lr=np.float32(1.0), out=pathlib.Path("x")), "when": datetime.datetime(2024, 1, 1),
        "more": types.SimpleNamespace(a=1), "names": np.array(["a", "b"]), "flag": np.bool_(True),
    }  # fmt: skip
    torch.save({"model": theirs(), **more}, tmp_path / "values.pth")
    assert_opens(tmp_path / "values.pth")
    with _Renamed("lightning.fabric.utilities.data.AttributeDict", dict) as attribute_dict:
        torch.save({"state_dict": theirs(), "hyper_parameters": attribute_dict(lr=1)}, tmp_path / "lightning.ckpt")
    assert_opens(tmp_path / "lightning.ckpt")
    with _Renamed("omegaconf.dictconfig.DictConfig", dict) as unknown:
        torch.save({"state_dict": theirs(), "config": unknown(a=1)}, tmp_path / "unknown.ckpt")
    with pytest.raises(CheckpointError, match=r"can run code \(omegaconf\.dictconfig\.DictConfig\)\. Save") as error:
        open_tensors(tmp_path / "unknown.ckpt")
    assert "weights_only" not in str(error.value)


def test_a_file_that_holds_itself_ends(tmp_path):
    content: dict = {"state_dict": theirs()}
    content["model"] = content["again"] = content
    torch.save(content, tmp_path / "itself.pt")
    assert_opens(tmp_path / "itself.pt")
    level: dict = {}
    for _ in range(60):  # 2 ** 60 ways
        level = {"a": level, "b": level}
    torch.save(level, tmp_path / "doubled.pt")
    with pytest.raises(CheckpointError, match="no dictionary of tensors"):
        open_tensors(tmp_path / "doubled.pt")


CONFIG = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                                image_size=16, patch_size=4, num_labels=3)  # fmt: skip


def test_transformers_in_a_module_of_ones_own(tmp_path):
    classifier, encoder = transformers.ViTForImageClassification(CONFIG).eval(), transformers.ViTModel(CONFIG).eval()
    images, four = torch.randn(2, 3, 16, 16), {"num_attention_heads": 4}
    lightning = {f"model.{name}": tensor for name, tensor in classifier.state_dict().items()}
    torch.save({"state_dict": lightning}, tmp_path / "lightning.ckpt")
    ours = ViTScratchForImageClassification.from_pretrained(tmp_path / "lightning.ckpt", layer_norm_eps=1e-12, **four)
    with torch.inference_mode():
        assert (ours.eval()(images).logits - classifier(images).logits).abs().max() < 1e-5
    module = nn.Module()
    module.vit, module.head = encoder, nn.Linear(32, 3)
    torch.save(module.state_dict(), tmp_path / "own.pth")
    ours = ViTScratchModel.from_pretrained(tmp_path / "own.pth", layer_norm_eps=1e-12, **four)
    with torch.inference_mode():
        assert (ours.eval()(images).last_hidden_state - encoder(images).last_hidden_state).abs().max() < 1e-5
    notes = load_checkpoint(tmp_path / "own.pth", four).notes
    assert any(note == "Left out, beside 'vit': head (2 tensors)." for note in notes)


@pytest.mark.parametrize("old_names", [True, False])
def test_vit_msns_classifier(old_names, tmp_path):
    """transformers saves its layers without the `vit.` that the rest has."""
    config = transformers.ViTMSNConfig(**{key: getattr(CONFIG, key) for key in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size",
        "num_labels")})  # fmt: skip
    msn = transformers.ViTMSNForImageClassification(config).eval()
    msn.save_pretrained(tmp_path, save_original_format=old_names)
    ours = ViTScratchForImageClassification.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert (ours(images).logits - msn(images).logits).abs().max() < 1e-5
