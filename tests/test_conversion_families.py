# SPDX-License-Identifier: Apache-2.0
"""
Networks that their tensors do not tell from others: config.json and names decide. They open exactly, or are refused by
name.
`model_zoo.json` is what scripts/experiments/model_zoo.py found in all of timm's Vision Transformers.
"""

import json
from pathlib import Path

import golden_checkpoints
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.checkpoint.architecture import usual_heads
from modeling_vit_scratch.checkpoint.conversion import load_checkpoint, save_checkpoint
from modeling_vit_scratch.checkpoint.families import TIMM_ROWS, TRANSFORMERS_ROWS, find_family
from modeling_vit_scratch.checkpoint.files import CheckpointError


ZOO = json.loads(Path(__file__).with_name("model_zoo.json").read_text())
GOLDEN = json.loads(golden_checkpoints.FILE.read_text())["cases"]
DEIT = GOLDEN["timm:deit_base_patch16_224"]
HEADS = {"num_attention_heads": 2}


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()


def folder_of(folder: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(model: torch.nn.Module, images: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return model.eval()(images).logits.numpy()


def assert_golden(source: Path, case: str, **arguments) -> ViTScratchForImageClassification:
    model = ViTScratchForImageClassification.from_pretrained(source, **HEADS, **arguments)
    got = logits(model, golden_checkpoints.images(GOLDEN[case]["image"]))
    assert np.abs(got - np.array(GOLDEN[case]["output"])).max() < 1e-5
    return model


# All of timm's names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", ZOO["exact"])
def test_what_was_exact_is_read_as_it_was(found):
    width, heads, activation, epsilon = (part.split(" ")[-1] for part in found.split(", "))
    for name in ZOO["exact"][found]:
        family = find_family({"architecture": f"{name}.some_tag"}, "model.safetensors")
        assert not family.row.refused, name
        fields = family.row.fields
        assert fields.get("num_attention_heads", usual_heads(int(width))) == int(heads), name
        assert fields.get("hidden_act", "gelu") == activation, name
        assert float(epsilon) == fields.get("layer_norm_eps", ViTScratchConfig().layer_norm_eps)


@pytest.mark.parametrize("reason", ZOO["refused"])
def test_what_was_refused_is_refused_for_its_reason(reason, tmp_path):
    for name in ZOO["refused"][reason]:
        family = find_family({"architecture": name}, "model.safetensors")
        assert family.row.refused == reason, name
    # Before a tensor is looked at, and for the name alone.
    folder_of(tmp_path, golden_checkpoints.weights(DEIT["shapes"]), architecture=name)
    with pytest.raises(CheckpointError) as error:
        ViTScratchForImageClassification.from_pretrained(tmp_path, **HEADS)
    assert f"{name} of timm {reason}." in str(error.value)


def test_the_stored_table_is_whole():
    assert not ZOO["WRONG"]
    assert sum(map(len, ZOO["exact"].values())) > 170
    assert sum(map(len, ZOO["refused"].values())) > 280
    known = [*ZOO["exact"].values(), *ZOO["refused"].values()]
    used = {find_family({"architecture": name}, "").row.pattern for names in known for name in names}
    assert used == {row.pattern for row in TIMM_ROWS}


# config.json decides --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("mlcd", "rotary"), ("beit", "relative positions"), ("resnet", "no architecture that this package knows")],
)  # fmt: skip
def test_transformers_models_are_refused_by_their_own_name(model_type, reason, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not even a file of tensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(CheckpointError, match=f"{model_type} of transformers .*{reason}"):
        ViTScratchForImageClassification.from_pretrained(tmp_path)
    assert {row.refused for row in TRANSFORMERS_ROWS} > {""}


def test_what_names_say_is_in_the_configuration(tmp_path):
    for name, field, value in (
        ("vit_base_patch16_gap_224", "num_attention_heads", 16),
        ("vit_so400m_patch16_siglip_gap_256", "hidden_act", "gelu_pytorch_tanh"),
        ("vit_giantopt_patch16_siglip_gap_256", "num_attention_heads", 16),
        ("deit_base_patch16_224", "hidden_act", "gelu"),
    ):
        tensors = golden_checkpoints.weights({
            name: [{16: 768, 48: 2304}.get(size, size) for size in shape] if name != "pos_embed" else [1, 17, 768]
            for name, shape in DEIT["shapes"].items()
        })  # fmt: skip
        checkpoint = load_checkpoint(folder_of(tmp_path, tensors, architecture=name))
        assert getattr(checkpoint.config, field) == value
        assert not any(note.startswith(("Heads", "Architecture")) for note in checkpoint.notes)
        # What config.json says of this one model goes before what the name says of its kind.
        own = {"num_heads": 8, "act_layer": "relu"}
        config = load_checkpoint(folder_of(tmp_path, tensors, architecture=name, model_args=own)).config
        assert (config.num_attention_heads, config.hidden_act) == (8, "relu")


def test_an_unknown_name_is_read_with_a_warning_or_refused_by_it(tmp_path):
    tensors = golden_checkpoints.weights(DEIT["shapes"])
    folder_of(tmp_path, tensors, architecture="vit_of_tomorrow_patch16_224")
    assert_golden(tmp_path, "timm:deit_base_patch16_224")
    notes = load_checkpoint(tmp_path, HEADS).notes
    assert any("vit_of_tomorrow_patch16_224 of timm is unknown here" in note for note in notes)
    folder_of(tmp_path, {**tensors, "blocks.0.attn.new": torch.ones(1)}, architecture="vit_of_tomorrow_patch16_224")
    with pytest.raises(CheckpointError, match=r"\(vit_of_tomorrow_patch16_224 of timm\).*unexpected"):
        load_checkpoint(tmp_path, HEADS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"block_fn": "ResPostBlock"}, "block_fn"), ({"norm_layer": "rmsnorm"}, "rms"), ({"act_layer": "mish"}, "mish"),
     ({"pool_include_prefix": True}, "pool_include_prefix"), ({"global_pool": "map"}, "map")],
)  # fmt: skip
def test_arguments_that_change_what_is_computed_are_refused(arguments, words, tmp_path):
    tensors = golden_checkpoints.weights(DEIT["shapes"])
    folder_of(tmp_path, tensors, architecture="deit_base_patch16_224", model_args=arguments)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(tmp_path, HEADS)


def test_the_name_of_a_file_says_what_it_is(tmp_path):
    tensors = golden_checkpoints.weights(DEIT["shapes"])
    torch.save(tensors, tmp_path / "vit_base_patch16_rpn_224-sw-3b07e89d.pth")
    with pytest.raises(CheckpointError, match="vit_base_patch16_rpn_224 of timm normalises after each branch"):
        load_checkpoint(tmp_path / "vit_base_patch16_rpn_224-sw-3b07e89d.pth", HEADS)
    torch.save(tensors, tmp_path / "deit_base_patch16_224-b5f2ef4d.pth")
    notes = load_checkpoint(tmp_path / "deit_base_patch16_224-b5f2ef4d.pth", HEADS).notes
    assert "Architecture: deit_base_patch16_224 of timm, by the name of the file." in notes
    torch.save(tensors, tmp_path / "mine.pth")
    assert any(
        "no config.json beside the file names it" in n for n in load_checkpoint(tmp_path / "mine.pth", HEADS).notes
    )


def test_config_json_is_about_the_one_file_beside_it(tmp_path):
    tensors = golden_checkpoints.weights(DEIT["shapes"])
    save_file(tensors, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_rope_ape_224"}))
    with pytest.raises(CheckpointError, match="rotary"):
        load_checkpoint(tmp_path / "weights.safetensors", HEADS)
    save_file(tensors, tmp_path / "others.safetensors")  # a folder of downloads
    load_checkpoint(tmp_path / "weights.safetensors", HEADS)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="rotary"):
        load_checkpoint(tmp_path / "model.safetensors", HEADS)


def test_a_file_without_positions_gets_no_advice_that_opens_it_wrong(tmp_path):
    """DINOv3 and its like: without their rotary positions they are other networks."""
    tensors = golden_checkpoints.weights({k: v for k, v in DEIT["shapes"].items() if k != "pos_embed"})
    save_file(tensors, tmp_path / "bare.safetensors")
    for given in ({}, {"position_embedding": "none"}, {"position_embedding": "sincos_2d"}):
        with pytest.raises(CheckpointError, match="rotary") as error:
            load_checkpoint(tmp_path / "bare.safetensors", {**HEADS, **given})
        assert "position_embedding=" not in str(error.value)
    # timm itself can have none, and says so.
    folder_of(tmp_path, tensors, architecture="vit_base_patch16_224", model_args={"pos_embed": "none"})
    model = ViTScratchForImageClassification.from_pretrained(tmp_path, image_size=16, **HEADS)
    assert model.config.position_embedding == "none"
    save_checkpoint(model, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_args"]["pos_embed"] == "none"


# Layouts --------------------------------------------------------------------------------------------------------------


def test_registers_with_positions(tmp_path):
    """timm's default gives a position to every token: the same network as with them added to the tokens."""
    case = "timm:vit_base_patch16_224.avg"
    theirs = golden_checkpoints.weights(GOLDEN[case]["shapes"])
    places = torch.randn(1, 3, 16)
    theirs["cls_token"] = theirs["cls_token"] - places[:, :1]
    theirs["reg_token"] = theirs["reg_token"] - places[:, 1:]
    theirs["pos_embed"] = torch.cat([places, theirs["pos_embed"]], dim=1)
    config = {**GOLDEN[case]["config"], "model_args": {**GOLDEN[case]["config"]["model_args"], "no_embed_class": False}}
    folder_of(tmp_path, theirs, **config)
    model = assert_golden(tmp_path, case)
    assert (model.config.num_register_tokens, model.config.cls_token_position) == (2, True)
    save_checkpoint(model, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in theirs.items()}
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["model_args"]["no_embed_class"] is False
    assert written["architecture"] == "vit_base_patch16_224"
    assert_golden(tmp_path / "back", case)


def test_a_class_token_with_a_position_beside_registers_goes_to_timm_and_back(tmp_path):
    config = ViTScratchConfig.from_variant("test/4", num_labels=3, num_register_tokens=4, image_size=16)
    ours = ViTScratchForImageClassification(config)
    save_checkpoint(ours, tmp_path, "timm")
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["pos_embed"].shape == (1, 1 + 4 + 16, 32)  # as timm's VisionTransformer wants it
    assert not tensors["pos_embed"][:, 1:5].any()
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["no_embed_class"] is False
    images = torch.randn(2, 3, 16, 16)
    assert np.array_equal(
        logits(ViTScratchForImageClassification.from_pretrained(tmp_path), images), logits(ours, images)
    )


@pytest.mark.parametrize("format", ["transformers", "torchvision"])
def test_a_class_token_without_a_position_gets_one_of_zeros(format, tmp_path):
    config = ViTScratchConfig.from_variant("test/4", num_labels=3, cls_token_position=False, image_size=16)
    ours = ViTScratchForImageClassification(config)
    save_checkpoint(ours, tmp_path, format)
    again = ViTScratchForImageClassification.from_pretrained(tmp_path, num_attention_heads=4)
    images = torch.randn(2, 3, 16, 16)
    assert np.array_equal(logits(again, images), logits(ours, images))
    if format == "transformers":
        theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path)
        assert np.abs(logits(theirs, images) - logits(ours, images)).max() < 1e-5


def test_evas_biases(tmp_path):
    """Queries and values have one each, keys none: a bias of the keys changes no score relative to the others."""
    tensors = golden_checkpoints.weights(DEIT["shapes"])
    for layer in range(2):
        query, _, value = tensors.pop(f"blocks.{layer}.attn.qkv.bias").chunk(3)
        tensors |= {f"blocks.{layer}.attn.q_bias": query.clone(), f"blocks.{layer}.attn.v_bias": value.clone()}
    save_file(tensors, tmp_path / "eva_giant_patch14_224.safetensors")
    assert_golden(tmp_path / "eva_giant_patch14_224.safetensors", "timm:deit_base_patch16_224")


def test_a_patch_projection_that_is_no_convolution_is_an_error(tmp_path):
    tensors = golden_checkpoints.weights({**DEIT["shapes"], "patch_embed.proj.weight": [16, 48]})
    save_file(tensors, tmp_path / "flat.safetensors")
    with pytest.raises(CheckpointError, match=r"shape \(16, 48\)"):
        load_checkpoint(tmp_path / "flat.safetensors", HEADS)
