# SPDX-License-Identifier: Apache-2.0
"""Fresh networks, and saved ones whose classifier is kept, put in order or replaced: never silently."""

import json
from pathlib import Path

import pytest
import torch
from transformers import ViTImageProcessorPil

from modeling_vit_scratch import (
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchImageProcessor,
)
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.training.arguments import ModelArguments
from modeling_vit_scratch.training.build import build_model, load_encoder


NAMES = ["cat", "dog", "owl"]


@pytest.fixture
def saved(tmp_path):
    """A saved model of three labels, with its processor."""
    config = ViTScratchConfig.from_variant("test/4", id2label=dict(enumerate(NAMES)))
    model = ViTScratchForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "saved")
    ViTScratchImageProcessor(size={"height": 16, "width": 24}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(
        tmp_path / "saved"
    )
    return model, str(tmp_path / "saved")


def start(label_names, num_channels=3, seed=0, **arguments):
    return build_model(ModelArguments(**arguments), label_names, num_channels, seed)


def test_a_mistyped_folder_is_not_asked_for_on_the_hub(saved, monkeypatch):
    folder = Path(saved[1])
    monkeypatch.chdir(folder.parent.parent)
    for name in (f"{folder}z", f"{folder.parent.name}/savedz"):
        with pytest.raises(InputError, match=r"no such file or folder\. Did you mean .*/saved\?"):
            start(NAMES, model_name_or_path=name)


def test_from_scratch():
    model, processor, lines = start(NAMES, num_channels=1, variant="test/4", image_size=[8, 16], patch_size=[2])
    config = model.config
    assert (config.image_hw, config.patch_hw, config.num_channels) == ((8, 16), (2, 2), 1)
    assert config.id2label == dict(enumerate(NAMES))
    assert config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    assert config.problem_type == "single_label_classification"
    assert dict(processor.size) == {"height": 8, "width": 16}
    assert processor.num_channels == 1
    assert lines == [f"From scratch: test/4, {model.num_parameters():,} parameters, images of 8 x 16 pixels."]


def test_fresh_weights_follow_the_seed():
    one, again, other = (start(NAMES, variant="test/4", seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])


def test_from_the_configuration_of_another_model(saved):
    model, _, lines = start(["a", "b"], config_name=saved[1], image_size=[32])
    assert (model.config.num_labels, model.config.image_hw, model.config.hidden_size) == (2, (32, 32), 32)
    assert model.config.id2label == {0: "a", 1: "b"}
    assert "From scratch" in lines[0]


@pytest.mark.parametrize("image_size", [None, [32]])
def test_weights_that_are_stored_in_16_bits_are_trained_in_32(saved, tmp_path, image_size):
    saved[0].bfloat16().save_pretrained(tmp_path / "half")
    ViTScratchImageProcessor(size={"height": 16, "width": 24}).save_pretrained(tmp_path / "half")
    arguments = ModelArguments(model_name_or_path=str(tmp_path / "half"), image_size=image_size)
    models = [
        build_model(arguments, NAMES, 3, 0)[0],
        build_model(arguments, ["a"], 3, 0)[0],
        load_encoder(arguments)[0],
    ]
    for model in models:
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    weight = models[0].vit.embeddings.patch_embeddings.projection.weight
    assert torch.equal(weight, saved[0].vit.embeddings.patch_embeddings.projection.weight.float())
    models[1].save_pretrained(tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["dtype"] == "float32"


def test_the_same_labels_keep_the_classifier(saved, pixel_values):
    theirs, folder = saved
    model, processor, lines = start(NAMES, model_name_or_path=folder)
    assert "kept: the 3 labels are the same" in lines[0]
    assert torch.equal(model.eval()(pixel_values).logits, theirs(pixel_values).logits)
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    assert model.config.problem_type == "single_label_classification"


def test_the_same_labels_in_another_order_keep_their_rows(saved, pixel_values):
    theirs, folder = saved
    names = ["owl", "cat", "dog"]
    model, _, lines = start(names, model_name_or_path=folder)
    assert "put in the order of the data's labels" in lines[0]
    ours, theirs = model.eval()(pixel_values).logits, theirs(pixel_values).logits
    for index, name in enumerate(names):
        assert torch.equal(ours[:, index], theirs[:, NAMES.index(name)])
    assert model.config.id2label == dict(enumerate(names))
    assert model.config.label2id["owl"] == 0


@pytest.mark.parametrize("names", [["ant", "bee", "emu"], ["ant", "bee"], ["ant", "bee", "fly", "emu"]])
def test_other_labels_get_a_fresh_classifier_that_starts_at_zero(saved, pixel_values, names, tmp_path):
    theirs, folder = saved
    model, _, lines = start(names, model_name_or_path=folder)
    assert f"A fresh classifier for {len(names)} labels, starting at zero: it had 3 other labels." in lines[0]
    assert torch.equal(model.eval()(pixel_values).logits, torch.zeros(2, len(names)))
    for key, tensor in theirs.vit.state_dict().items():
        assert torch.equal(model.vit.state_dict()[key], tensor)
    loss = model(pixel_values, labels=torch.tensor([0, len(names) - 1])).loss
    assert loss.item() == pytest.approx(torch.tensor(len(names)).log().item())
    model.save_pretrained(tmp_path / "again")
    again = ViTScratchForImageClassification.from_pretrained(tmp_path / "again")
    assert again.config.id2label == dict(enumerate(names))


@pytest.mark.parametrize("names", [["emu", "owl", "ant", "cat"], ["owl", "cat"]])
def test_labels_that_both_have_keep_their_rows_and_the_others_start_at_zero(saved, pixel_values, names):
    theirs, folder = saved
    model, _, lines = start(names, model_name_or_path=folder)
    new = len(names) - 2
    assert f"Rows of its classifier: 2 of 3 kept, by name; {new} new, starting at zero." in lines[0]
    ours, logits = model.eval()(pixel_values).logits, theirs(pixel_values).logits
    for index, name in enumerate(names):
        expected = logits[:, NAMES.index(name)] if name in NAMES else torch.zeros(2)
        torch.testing.assert_close(ours[:, index], expected)
    assert (model.num_labels, model.config.num_labels, model.config.id2label) == (
        len(names), len(names), dict(enumerate(names))
    )  # fmt: skip


def test_a_model_without_classifier_gets_one(tmp_path, pixel_values):
    theirs = ViTScratchForMaskedImageModeling(ViTScratchConfig.from_variant("test/4")).eval()
    theirs.save_pretrained(tmp_path)
    model, processor, lines = start(["a", "b"], model_name_or_path=str(tmp_path))
    assert "it had none" in lines[0]
    ours = model.eval().vit(pixel_values).last_hidden_state
    assert torch.equal(ours, theirs.vit(pixel_values).last_hidden_state)
    assert dict(processor.size) == {"height": 16, "width": 24}  # it had no processor either


def test_the_head_of_pretraining_goes_as_a_whole_and_a_kept_one_stays_as_a_whole(tmp_path, pixel_values):
    options = {"representation_size": 8, "use_distillation_token": True, "use_distillation_head": True}
    labels = {0: "a", 1: "b", 2: "c"}
    theirs = ViTScratchForImageClassification(
        ViTScratchConfig.from_variant("test/4", id2label=labels, **options)
    ).eval()
    theirs.save_pretrained(tmp_path)
    model, _, lines = start(["x", "y"], model_name_or_path=str(tmp_path))
    assert "it had 3 other labels. The representation layer" in lines[0]
    assert (model.config.representation_size, model.config.use_distillation_head) == (None, False)
    assert model(pixel_values).logits.tolist() == [[0, 0], [0, 0]]
    model.save_pretrained(tmp_path / "new")
    again = ViTScratchForImageClassification.from_pretrained(tmp_path / "new")  # the folder is whole
    assert again.state_dict().keys() == model.state_dict().keys()
    kept, _, lines = start(["c", "a", "b"], model_name_or_path=str(tmp_path))
    assert "kept" in lines[0]
    torch.testing.assert_close(kept.eval()(pixel_values).logits, theirs(pixel_values).logits[:, [2, 0, 1]])


def test_another_size_of_image_and_patch_is_served_as_it_was_trained(saved, tmp_path):
    model, processor, lines = start(NAMES, model_name_or_path=saved[1], image_size=[32, 40], patch_size=[8])
    assert "kept" in lines[0]
    assert (model.config.image_hw, model.config.patch_hw) == ((32, 40), (8, 8))
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    processor.save_pretrained(tmp_path / "new")
    pixels = ViTScratchImageProcessor.from_pretrained(tmp_path / "new")(torch.zeros(3, 9, 9), return_tensors="pt")
    assert pixels["pixel_values"].shape == (1, 3, 32, 40)
    assert model(**pixels).logits.shape == (1, 3)
    with pytest.raises(InputError, match="image_size"):
        start(NAMES, model_name_or_path=saved[1], image_size=[33])


def test_an_image_processor_of_ones_own(tmp_path):
    ViTImageProcessorPil(size={"height": 16, "width": 24}).save_pretrained(tmp_path)
    processor = start(NAMES, variant="test/4", image_processor_name=str(tmp_path))[1]
    assert type(processor).__name__ in ("ViTImageProcessorPil", "ViTImageProcessor")  # the latter with torchvision


def test_code_of_an_image_processor_runs_only_on_request(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from transformers import ViTImageProcessorPil\n\n\nclass Mine(ViTImageProcessorPil):\n    pass\n"
    )
    settings = {"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "mine.Mine"}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    arguments = {"variant": "test/4", "image_processor_name": str(tmp_path)}
    with pytest.raises(InputError, match="--image_processor_name"):
        start(NAMES, **arguments)
    assert type(start(NAMES, **arguments, trust_remote_code=True)[1]).__name__ == "Mine"


@pytest.mark.parametrize("flag", ["model_name_or_path", "config_name", "image_processor_name"])
def test_what_can_not_be_loaded_is_named(flag, tmp_path):
    with pytest.raises(InputError, match=f"--{flag} {tmp_path / 'nothing'} can't be loaded"):
        start(
            NAMES,
            **({"variant": "test/4"} if flag == "image_processor_name" else {}),
            **{flag: str(tmp_path / "nothing")},
        )


def test_a_model_of_another_kind_is_refused(tmp_path):
    model = ViTScratchForImageClassification(ViTScratchConfig.from_variant("test/4"))
    weights = {key: value for key, value in model.state_dict().items() if "layers.1" not in key}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(InputError, match=r"lacks 12 of the network's weights, e\.g\. vit\.layers\.1"):
        start(NAMES, model_name_or_path=str(tmp_path))
