# SPDX-License-Identifier: Apache-2.0
"""The configuration: what it accepts, what it refuses and how it says so, and the named variants."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, ViTConfig

from modeling_vit_scratch import VARIANTS, ViTScratchConfig, ViTScratchForImageClassification


# With 1000 labels. B/16, L/16, H/14 and hybrids: also in the test of the paper's code. Others: transformers' ViT.
PARAMETERS = {
    "test/4": 52_552,
    "Mi/2": 548_872,
    "Mi/4": 556_936,
    "Mi/8": 570_760,
    "Mi/16": 626_056,
    "Ti/16": 5_717_416,
    "S/16": 22_050_664,
    "S/32": 22_878_952,
    "B/8": 86_576_872,
    "B/16": 86_567_656,
    "B/32": 88_224_232,
    "L/16": 304_326_632,
    "L/32": 306_535_400,
    "H/14": 632_045_800,
    "R+Ti/16": 6_337_704,
    "R26+S/32": 36_431_912,
    "R26+B/32": 101_383_976,
    "R50+B/16": 98_659_112,
    "R50+L/32": 328_994_856,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_its_exact_parameter_count(name):
    config = ViTScratchConfig.from_variant(name, num_labels=1000)
    with torch.device("meta"):
        model = ViTScratchForImageClassification(config)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_a_vit_config_is_accepted_as_it_is():
    theirs = ViTConfig(hidden_size=48, num_attention_heads=3, patch_size=32, layer_norm_eps=1e-12, num_labels=7)
    ours = ViTScratchConfig(**theirs.to_dict())
    shared = [
        name for name in ViTConfig.__annotations__ if name not in ("encoder_stride", "pooler_output_size", "pooler_act")
    ]
    assert len(shared) > 10
    for name in shared:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.model_type, ours.num_labels) == ("vit_scratch", 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"hidden_size": 30, "num_attention_heads": 4},
            r"num_attention_heads=4 must divide hidden_size=30.*is (3|5)\.",
        ),
        ({"image_size": 35, "patch_size": 8}, r"patch height 8 must divide the image height 35.*32 or 40"),
        ({"image_size": [32, 35], "patch_size": 8}, r"patch width 8 must divide the image width 35.*32 or 40"),
        ({"image_size": 8, "patch_size": 16}, r"An image height of 16 would work"),
        ({"image_size": 0}, r"image_size=0 must be a positive number"),
        ({"image_size": [1, 2, 3]}, r"image_size=\[1, 2, 3\] must be"),
        ({"position_embedding": "learned"}, r"position_embedding='learned' is unknown.*'learned_1d', 'learned_2d'"),
        ({"position_embedding_placement": "all"}, r"is unknown.*'every_layer_shared'"),
        ({"position_embedding_interpolation": "nearest"}, r"'bilinear', 'bicubic', 'bicubic_antialias'"),
        ({"pooling": "max"}, r"pooling='max' is unknown.*'cls', 'mean'"),
        ({"problem_type": "multi_label"}, r"problem_type='multi_label' is unknown.*'multi_label_classification'"),
        ({"hidden_act": "gelu_tanh"}, r"hidden_act='gelu_tanh' is unknown.*'gelu_pytorch_tanh'"),
        ({"hidden_dropout_prob": -0.1}, r"hidden_dropout_prob=-0.1 must be at least 0 and below 1"),
        ({"attention_probs_dropout_prob": 1.0}, r"attention_probs_dropout_prob=1.0 must be"),
        ({"drop_path_rate": -1}, r"drop_path_rate=-1 must be"),
        ({"layer_norm_eps": 0}, r"layer_norm_eps=0 must be positive"),
        ({"initializer_range": -1.0}, r"initializer_range=-1.0 must not be negative"),
        ({"num_register_tokens": -1}, r"num_register_tokens=-1 must not be negative"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0 must be at least 1"),
        ({"num_channels": 0}, r"num_channels=0 must be at least 1"),
        ({"representation_size": 0}, r"representation_size=0 must be at least 1"),
        ({"position_embedding": "none", "position_embedding_placement": "every_layer"}, r"no meaning.*'none'"),
        ({"position_embedding": "sincos_2d", "hidden_size": 66, "num_attention_heads": 3}, r"that 4 divides, not 66"),
        ({"use_cls_token": False}, r"pooling='cls' needs the class token.*pooling='mean'"),
        ({"num_labels": -1}, r"num_labels=-1 must not be negative"),
        ({"num_labels": 3, "id2label": {0: "cat", 1: "dog"}}, r"num_labels=3 contradicts id2label, which has 2"),
        ({"id2label": {0: "cat", 2: "dog"}}, r"keys of id2label must be 0 to 1"),
        ({"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 1, "dog": 0}}, r"label2id must be the inverse"),
        ({"hiden_size": 64}, r"no field 'hiden_size'. Did you mean 'hidden_size'"),
    ],
)
def test_what_cannot_work_is_refused_with_value_limit_and_way_out(arguments, message):
    with pytest.raises(ValueError, match=message):
        ViTScratchConfig(**arguments)


def test_a_field_set_later_is_checked_by_the_model(config):
    config.num_attention_heads = 5
    with pytest.raises(ValueError, match="num_attention_heads=5 must divide hidden_size=32"):
        ViTScratchForImageClassification(config)


def test_an_unknown_variant_names_the_known_ones():
    with pytest.raises(ValueError, match=r"no variant 'B16'\. Did you mean 'B/16'\?.*H/14") as caught:
        ViTScratchConfig.from_variant("B16")
    assert "test/4" not in str(caught.value)
    config = ViTScratchConfig.from_variant("B/16", patch_size=14, num_labels=10)
    assert (config.patch_size, config.hidden_size, config.num_labels) == (14, 768, 10)


def test_save_and_load_give_the_same_configuration(tmp_path):
    ours = ViTScratchConfig(
        hidden_size=48, num_attention_heads=3, image_size=[32, 48], patch_size=[4, 8], pooling="mean",
        use_cls_token=True,
        id2label={0: "cat", 1: "dog", 2: "owl"}, num_register_tokens=2, representation_size=5, drop_path_rate=0.1,
    )  # fmt: skip
    ours.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == ours.to_dict() | {"_name_or_path": str(tmp_path)}
    assert loaded.label2id == {"cat": 0, "dog": 1, "owl": 2}
    written = json.loads((tmp_path / "config.json").read_text())
    assert set(written["auto_map"]) == {
        "AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoModelForMaskedImageModeling", "AutoBackbone",
        "AutoImageProcessor",
    }  # fmt: skip


def test_overrides_at_load_are_checked_with_the_rest(tmp_path):
    ViTScratchConfig.from_variant("test/4", id2label={0: "cat", 1: "dog"}).save_pretrained(tmp_path)
    loaded = ViTScratchConfig.from_pretrained(tmp_path, num_labels=5)
    assert loaded.id2label == {i: f"LABEL_{i}" for i in range(5)}
    loaded = ViTScratchConfig.from_pretrained(tmp_path, id2label={0: "a", 1: "b", 2: "c"})
    assert loaded.label2id == {"a": 0, "b": 1, "c": 2}
    loaded = ViTScratchConfig.from_pretrained(tmp_path, num_hidden_layers=3, pooling="mean")
    assert loaded.stage_names == ["stem", "stage1", "stage2", "stage3"]
    assert loaded.out_features == ["stage3"]
    # The mean of patches can be taken of weights that have a class token; the class token can't of weights without.
    assert loaded.use_cls_token is True
    ViTScratchConfig.from_variant("test/4", pooling="mean").save_pretrained(tmp_path / "mean")
    assert ViTScratchConfig.from_pretrained(tmp_path / "mean").use_cls_token is False
    assert ViTScratchConfig.from_pretrained(tmp_path / "mean", pooling="cls").use_cls_token is True
    with pytest.raises(ValueError, match="must divide hidden_size=32"):
        ViTScratchConfig.from_pretrained(tmp_path, num_attention_heads=7)


def test_the_map_of_another_repository_is_not_carried_along():
    config = ViTScratchConfig(auto_map={"AutoModel": "someone/else--modeling_vit_scratch.ViTScratchModel"})
    assert config.auto_map["AutoModel"] == "modeling_vit_scratch.ViTScratchModel"


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 6),
    head_width=st.integers(1, 6),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    patch=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    registers=st.integers(0, 3),
    pooling=st.sampled_from(["cls", "mean"]),
)
def test_any_architecture_that_fits_survives_its_own_json(heads, head_width, rows, columns, patch, registers, pooling):
    config = ViTScratchConfig(
        hidden_size=4 * heads * head_width, num_attention_heads=heads, patch_size=list(patch), pooling=pooling,
        image_size=[rows * patch[0], columns * patch[1]], num_register_tokens=registers, num_hidden_layers=1,
    )  # fmt: skip
    again = ViTScratchConfig(**json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()
    assert again.grid_hw == (rows, columns)
