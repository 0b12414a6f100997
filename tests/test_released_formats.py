# SPDX-License-Identifier: Apache-2.0
"""
Folders that were saved by earlier versions, and what those computed from them: today's numbers are the same.

There is no version of the format in config.json, and none is needed while this rule holds. A field that is new has a
default that computes what was computed without it. A field's meaning, a key of the weights, or a default never changes
under its name; where that can't be helped, the old name is still read. When a commit changes what is on disk, the
commit after it adds a model that has the change to FORMATS in released_formats/make.py, and its folder, made with the
code of the first: both go to main together.
"""

import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import logging as transformers_logging

import modeling_vit_scratch
from modeling_vit_scratch import ViTScratchImageProcessor


RELEASED = Path(__file__).parent / "released_formats"
FOLDERS = sorted(path.parent for path in RELEASED.glob("*/config.json"))
# Of the library that wrote it.
NOT_OURS = {"transformers_version"}


@pytest.fixture
def warnings_of_transformers(caplog):
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield lambda: [record.getMessage() for record in caplog.records]
    transformers_logging.disable_propagation()


def answer(outputs) -> np.ndarray:
    return (outputs["logits"] if "logits" in outputs else outputs["reconstruction"]).numpy()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_of_an_earlier_version_computes_what_it_computed_then(folder, tmp_path, warnings_of_transformers):
    stored, expected = (json.loads((folder / name).read_text()) for name in ("config.json", "expected.json"))
    kind = getattr(modeling_vit_scratch, stored["architectures"][0])
    processor = ViTScratchImageProcessor.from_pretrained(folder)
    photo = Image.open(folder / "photo.png")
    pixels = processor(photo if processor.num_channels == 3 else photo.convert("L"), return_tensors="pt")
    np.testing.assert_allclose(pixels["pixel_values"], np.float32(expected["pixel_values"]), rtol=0, atol=1e-6)

    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert {title: names for title, names in info.items() if names} == {}
    then = np.float32(expected["answer"])
    with torch.no_grad():
        np.testing.assert_allclose(answer(model.eval()(**pixels)), then, rtol=1e-5, atol=2e-6)
    # Nothing that the folder says is read as something else.
    now = json.loads(model.config.to_json_string(use_diff=False))
    changed = {name for name, value in stored.items() if now.get(name) != value} - NOT_OURS
    assert changed <= ({"dtype"} if stored["dtype"] != "float32" else set())

    # What is saved today of an old model is the same model.
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        np.testing.assert_allclose(answer(kind.from_pretrained(tmp_path / "again").eval()(**pixels)), then, 1e-5, 2e-6)
    assert warnings_of_transformers() == []


def test_every_format_has_its_folder_and_each_is_small():
    specification = importlib.util.spec_from_file_location("make", RELEASED / "make.py")
    make = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(make)
    assert {folder.name for folder in FOLDERS} == set(make.FORMATS)
    for folder in FOLDERS:
        assert json.loads((folder / "expected.json").read_text())["commit"] == make.FORMATS[folder.name][0]
        assert sum(file.stat().st_size for file in folder.iterdir()) < 60_000


def test_every_field_of_the_configuration_is_in_a_folder():
    """A new field needs a new folder: see the docstring of this file."""
    stored = set().union(*(json.loads((folder / "config.json").read_text()) for folder in FOLDERS))
    fields = {name for name in modeling_vit_scratch.ViTScratchConfig.__annotations__ if not name.startswith("_")}
    assert fields <= stored
    # The same for the processor, whose settings are its class's attributes.
    stored = set().union(*(json.loads((folder / "preprocessor_config.json").read_text()) for folder in FOLDERS))
    assert set(json.loads(ViTScratchImageProcessor().to_json_string())) <= stored
