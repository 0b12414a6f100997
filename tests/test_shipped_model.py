# SPDX-License-Identifier: Apache-2.0
"""The model in model_cards/: whole, small, loaded offline with and without the package, and as its records say."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_sample_images
from tiny_images import ROOT, load_script

from modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.cards.records import CardOptions, read_records
from modeling_vit_scratch.cards.values import FINE_TUNED, find, gain_in_words, in_words, names_of
from modeling_vit_scratch.cards.writing import card_text, stored_options
from modeling_vit_scratch.hub.contents import CODE, collect
from modeling_vit_scratch.recipes.table import RECIPES


FOLDER = ROOT / "model_cards" / "vit-tiny-imagenet"
WITHOUT_THE_PACKAGE = """
import sys
sys.modules["modeling_vit_scratch"] = None  # its import fails
import numpy, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
image = Image.fromarray(numpy.load(sys.argv[2]))
inputs = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)(image, return_tensors="pt")
with torch.inference_mode():
    numpy.save(sys.argv[3], model(**inputs).logits.numpy())
"""


@pytest.fixture(scope="module")
def record():
    return json.loads((FOLDER / "results.json").read_text())


def test_the_folder_is_what_would_be_published():
    uploads, left_out = collect(FOLDER)
    paths = {upload.path for upload in uploads}
    assert {"README.md", "config.json", "preprocessor_config.json", "model.safetensors", "results.json"} <= paths
    assert (FOLDER / "model.safetensors").stat().st_size <= 16_000_000
    assert not any(name.endswith((".bin", ".pt", ".npz")) for name in left_out)


def test_it_is_ready_to_be_published(capsys):
    load_script("publish").main([str(FOLDER), "me/vit-tiny-imagenet"])  # raises for whatever is wrong with it
    assert "Nothing was uploaded" in capsys.readouterr().out


def test_its_card_is_what_the_code_writes_of_its_records():
    options = stored_options(FOLDER)
    assert options is not None, "changed by hand"
    text = card_text(read_records(FOLDER, CardOptions().over(options)))
    assert text == (FOLDER / "README.md").read_text(), "run scripts/card.py model_cards/vit-tiny-imagenet"


@pytest.mark.parametrize("file", CODE, ids=lambda file: file.name)
def test_its_code_is_that_of_the_package(file):
    renew = "cp modeling_vit_scratch/*_vit_scratch.py model_cards/vit-tiny-imagenet/"
    assert (FOLDER / file.name).read_bytes() == file.read_bytes(), f"The package's is newer: {renew}"


def test_the_weights_are_stored_in_16_bits_and_compute_in_32(record):
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 (no dict) == {torch.bfloat16}
    model = ViTScratchForImageClassification.from_pretrained(FOLDER)
    assert model.dtype == torch.float32
    assert model.num_parameters() == record["model"]["num_parameters"]
    assert len(model.config.id2label) == record["dataset"]["num_labels"] == 200


def test_it_loads_without_the_package_and_gives_the_same_logits(tmp_path):
    array = load_sample_images().images[0]
    np.save(tmp_path / "image.npy", array)
    argv = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(FOLDER), tmp_path / "image.npy", tmp_path / "logits.npy"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(argv, env=offline, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    inputs = ViTScratchImageProcessor.from_pretrained(FOLDER)(Image.fromarray(array), return_tensors="pt")
    with torch.inference_mode():
        logits = ViTScratchForImageClassification.from_pretrained(FOLDER).eval()(**inputs).logits
    assert np.array_equal(np.load(tmp_path / "logits.npy"), logits.numpy())


def test_the_recipes_are_those_of_its_runs(record):
    for run, name in ((record["earlier"][0], "tiny_imagenet"), (record, "tiny_imagenet_96")):
        recipe, settings = RECIPES[name], run["training"]
        assert settings["recipe"] == name
        assert recipe.batch_size == settings["batch_size"]
        for ours, theirs in (
            ("num_train_epochs", "epochs"),
            ("learning_rate", "learning_rate"),
            ("weight_decay", "weight_decay"),
            ("ema_decay", "weight_average"),
            ("label_smoothing_factor", "label_smoothing"),
            ("max_grad_norm", "gradient_clipping"),
        ):
            assert recipe.fields[ours] == settings[theirs]
        assert settings["mixing"] == f"Mixup {recipe.fields['mixup']:g} or CutMix {recipe.fields['cutmix']:g}"
        assert f"{100 * run['value']:.2f} %" in recipe.expected
        assert f"{run['wall_time_seconds']:.0f} s" in recipe.price


def test_the_tables_of_readme_and_measurements_are_those_of_the_record():
    record = json.loads((FOLDER / "transfer" / "transfer.json").read_text())
    readme = (ROOT / "README.md").read_text()
    measurements = (ROOT / "docs" / "measurements.md").read_text()
    for name in names_of(record):
        row = find(record, name, FINE_TUNED)
        assert len(row["scratch"]["values"]) == len(row["pretrained"]["values"]) == (2 if name == "clothing-96" else 3)
        cells = f"| {in_words(row['scratch'])} | {in_words(row['pretrained'])} |"
        assert f"{cells} {gain_in_words(row)} |" in measurements
        assert name == "clothing-96" or cells in readme
    linear = [find(record, name, "linear") for name in ("elpv", "clothing", "digits", "cifar10")]
    for start in ("pretrained", "scratch"):
        *first, last = (f"{100 * row[start]['mean']:.1f}" for row in linear)
        assert f"{', '.join(first)} and {last} %" in " ".join(measurements.split())
