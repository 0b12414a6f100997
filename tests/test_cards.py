# SPDX-License-Identifier: Apache-2.0
"""Model cards: their metadata survives huggingface_hub's reader, and no number is printed without a record."""

import copy
import re

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

from modeling_vit_scratch import ViTScratchConfig
from modeling_vit_scratch.checkpoint.cards import build_card, write_card


RECORD = {
    "metric": "accuracy",
    "value": 0.98765432,
    "n": 270,
    "metrics": {"accuracy": 0.98765432, "top5_accuracy": 1.0, "macro_f1": 0.95},
    "selection": "the last step",
    "seed": 7,
    "dataset": {
        "name": "digits of scikit-learn", "hub_id": None, "license": "cc-by-4.0", "url": "https://example.org/digits",
        "note": "A note on the data.", "num_labels": 3, "num_training_images": 1527, "num_held_out_images": 270,
        "held_out": "15 % of each class, chosen with seed 7",
    },
    "model": {"num_parameters": 452074, "started_from": "scratch", "base_model": None},
    "training": {
        "epochs": 40.0, "steps": 960, "batch_size": 64, "optimizer": "adamw_torch_fused", "learning_rate": 0.001,
        "label_smoothing": 0.0,
    },
    "command": "python scripts/finetune.py",
    "git_commit": "0123456789abcdef",
    "versions": {"python": "3.12.1", "torch": "2.13.0"},
    "hardware": "CPU, 2 cores",
    "wall_time_seconds": 61.5,
}  # fmt: skip


@pytest.fixture
def config():
    return ViTScratchConfig.from_variant("test/4", id2label={0: "zero", 1: "one", 2: "two"})


def record(**changes):
    """RECORD with changes; a dictionary changes the entries it has."""
    changed = copy.deepcopy(RECORD)
    for key, value in changes.items():
        changed[key] = {**changed[key], **value} if isinstance(value, dict) else value
    return changed


def card(config, **changes):
    return build_card(config, record(**changes), name="digits", location="outputs/digits")


def test_metadata_of_a_written_card_is_what_the_hub_reads(config, tmp_path):
    write_card(tmp_path / "digits", config, RECORD)
    data = metadata_load(tmp_path / "digits" / "README.md")
    assert data["pipeline_tag"] == "image-classification"
    assert data["library_name"] == "transformers"
    assert data["license"] == "cc-by-4.0"
    assert "custom_code" in data["tags"]
    assert "datasets" not in data  # it is not on the Hub
    assert "base_model" not in data
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "digits"
    assert {(r.metric_type, r.metric_value) for r in results} == {
        ("accuracy", 0.9877),
        ("f1", 0.95),
        ("top5_accuracy", 1.0),
    }
    accuracy = next(result for result in results if result.metric_type == "accuracy")
    assert accuracy.task_type == "image-classification"
    assert accuracy.dataset_name == "digits of scikit-learn"
    assert accuracy.dataset_args == {"n": 270}
    assert accuracy.metric_name == "Accuracy (n = 270)"


def test_a_card_survives_loading_and_saving(config, tmp_path):
    (tmp_path / "a").mkdir()
    write_card(tmp_path / "a", config, RECORD)
    loaded = ModelCard.load(tmp_path / "a" / "README.md")
    loaded.save(tmp_path / "b.md")
    assert (tmp_path / "b.md").read_text() == (tmp_path / "a" / "README.md").read_text()
    assert loaded.data.to_dict() == metadata_load(tmp_path / "b.md")


def test_hub_data_and_a_base_model_are_linked(config):
    data = card(
        config, dataset={"hub_id": "user/pets"}, model={"base_model": "user/vit", "started_from": "user/vit"}
    ).data
    assert data.datasets == ["user/pets"]
    assert data.base_model == "user/vit"
    assert data.eval_results[0].dataset_type == "user/pets"


def test_what_people_read(config):
    text = card(config).text
    for part in (
        "# digits", "3 classes: zero, one, two", "trained from scratch", "| Accuracy | 98.77 % |",
        "on 270 held-out images",
        "One run, seed 7. Weights: the last step.", "1,527 images to train on", "A note on the data.", "cc-by-4.0",
        "python scripts/finetune.py", "62 s on CPU, 2 cores", "commit 0123456789abcdef", "torch 2.13.0",
        "| learning rate | 0.001 |", "| image size, patch size | 16 x 24, 4 x 4 |", 'model="outputs/digits"',
    ):  # fmt: skip
        assert part in text, part


def test_a_card_is_short_and_has_no_gaps(config):
    for changes in ({}, {"git_commit": None, "dataset": {"license": None, "url": None, "note": None}}):
        text = str(card(config, **changes))
        assert len(text.splitlines()) < 120
        assert not re.search(r"more information|\bTODO\b|\bNone\b|\bnull\b|\{\w*\}|\[\]", text, re.IGNORECASE), text


def test_the_example_of_use_is_three_lines(config):
    code = re.search(r"```python\n(.*?)```", card(config).text, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line]) == 3
    compile(code, "card", "exec")


def test_the_time_of_a_resumed_run_is_that_of_its_last_part(config):
    assert "62 s (after checkpoint-480) on CPU" in card(config, resumed_from="checkpoint-480").text


def test_data_of_unknown_license_gives_no_license(config):
    assert card(config, dataset={"license": None}).data.license is None
    assert card(config, dataset={"license": "See our site!"}).data.license is None


def test_many_labels_are_not_all_listed():
    config = ViTScratchConfig.from_variant("test/4", id2label={i: f"class {i}" for i in range(1000)})
    assert "class 9 and 990 more" in card(config).text


def test_an_absolute_folder_is_named_and_not_located(config, tmp_path):
    text = str(write_card(tmp_path / "digits", config, RECORD))
    assert str(tmp_path) not in text
    assert 'model="digits"' in text
    assert 'model="user/digits"' in str(write_card(tmp_path / "digits", config, RECORD, hub_model_id="user/digits"))


@pytest.mark.parametrize(
    "key", ["value", "n", "metrics", "selection", "seed", "dataset", "command", "hardware", "versions"]
)
def test_no_number_without_a_record(config, key):
    incomplete = {k: v for k, v in RECORD.items() if k != key}
    with pytest.raises(ValueError, match=rf"No card without a record: results\.json lacks {key}"):
        build_card(config, incomplete, "digits", "digits")


def test_no_number_without_its_parts(config, tmp_path):
    with pytest.raises(ValueError, match=r"lacks metrics\.accuracy"):
        build_card(config, {**RECORD, "metrics": {"macro_f1": 0.5}}, "x", "x")
    with pytest.raises(ValueError, match="No card"):
        write_card(tmp_path, config, {})
    assert not (tmp_path / "README.md").exists()
