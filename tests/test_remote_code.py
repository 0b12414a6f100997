# SPDX-License-Identifier: Apache-2.0
"""A saved folder in a fresh process that has not got the package: what every Hub user does."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stranger import STEPS

import modeling_vit_scratch
from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessor


ROOT = Path(modeling_vit_scratch.__file__).parent.parent

# Hides an installed package, as if it had never been there. Editable installs and the current folder included.
HIDDEN = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_vit_scratch":
            raise ModuleNotFoundError(f"{name} is hidden", name=name)
sys.meta_path.insert(0, Hide())
"""


def run_without_package(code: str, folder: Path, tmp_path: Path) -> str:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", HIDDEN + code, str(folder)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "my-model"
    torch.manual_seed(0)
    labels = {0: "cat", 1: "dog", 2: "owl"}
    model = ViTScratchForImageClassification(
        ViTScratchConfig.from_variant("test/4", id2label=labels, num_register_tokens=1, position_embedding="learned_2d")
    )
    model.save_pretrained(path)
    ViTScratchImageProcessor(size={"height": 16, "width": 24}).save_pretrained(path)
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path / "photo.png")
    return path


def test_the_folder_holds_weights_configs_and_all_code_files(folder):
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "photo.png", "compatibility_vit_scratch.py",
        "configuration_vit_scratch.py", "encoder_vit_scratch.py", "image_decoding_vit_scratch.py",
        "image_processing_vit_scratch.py", "modeling_vit_scratch.py", "parts_vit_scratch.py",
        "positions_vit_scratch.py", "stem_vit_scratch.py", "variants_vit_scratch.py",
    }  # fmt: skip


def test_every_auto_class_and_both_pipelines_load_the_folder(folder, tmp_path):
    code = """
import json, torch
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import AutoModelForMaskedImageModeling, pipeline
folder = sys.argv[1]
trust = {"trust_remote_code": True}
processor = AutoImageProcessor.from_pretrained(folder, **trust)
pixels = processor(folder + "/photo.png", return_tensors="pt")["pixel_values"]
out = {"type": AutoConfig.from_pretrained(folder, **trust).model_type}
model = AutoModelForImageClassification.from_pretrained(folder, **trust).eval()
out["logits"] = model(pixels).logits.tolist()
out["pooled"] = AutoModel.from_pretrained(folder, **trust).eval()(pixels).pooler_output.shape
out["painted"] = AutoModelForMaskedImageModeling.from_pretrained(folder, **trust).eval()(pixels).reconstruction.shape
backbone = AutoBackbone.from_config(AutoConfig.from_pretrained(folder, **trust), **trust)
out["map"] = backbone(pixels).feature_maps[0].shape
classify = pipeline("image-classification", model=folder, **trust)
out["labels"] = classify([folder + "/photo.png"] * 2, batch_size=2, top_k=2)
extract = pipeline("image-feature-extraction", model=folder, pool=True, return_tensors=True, **trust)
out["features"] = extract(folder + "/photo.png").shape
model.save_pretrained(folder + "-again"); processor.save_pretrained(folder + "-again")
out["package"] = "modeling_vit_scratch" in sys.modules
print(json.dumps(out))
"""
    out = json.loads(run_without_package(code, folder, tmp_path).splitlines()[-1])
    model = ViTScratchForImageClassification.from_pretrained(folder).eval()
    pixels = ViTScratchImageProcessor.from_pretrained(folder)(folder / "photo.png", return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(pixels).logits
    np.testing.assert_array_equal(np.float32(out["logits"]), logits)
    assert out["type"] == "vit_scratch"
    assert out["pooled"] == [1, 32]
    assert out["painted"] == [1, 3, 16, 24]
    assert out["map"] == [1, 32, 4, 6]
    assert out["features"] == [1, 32]
    assert not out["package"]
    best = logits.softmax(-1)[0].topk(2)
    for answer in out["labels"]:
        assert [item["label"] for item in answer] == [model.config.id2label[i] for i in best.indices.tolist()]
        np.testing.assert_allclose([item["score"] for item in answer], best.values, rtol=1e-5)
    # What such a process saves is as complete as what it loaded.
    again = folder.with_name("my-model-again")
    assert {path.name for path in folder.iterdir()} - {path.name for path in again.iterdir()} == {"photo.png"}
    config = json.loads((again / "config.json").read_text())
    assert config["auto_map"] == json.loads((folder / "config.json").read_text())["auto_map"]


@pytest.mark.parametrize("first", ["modeling_vit_scratch", "transformers"])
def test_with_the_package_imported_the_auto_classes_need_no_trust(first, folder, tmp_path):
    # Whichever of the two is imported first, in the package's own code or in that of others.
    code = f"""
import {first}
import modeling_vit_scratch
import json, sys
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import AutoModelForMaskedImageModeling, pipeline
folder = sys.argv[1]
kinds = (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling)
found = [type(kind.from_pretrained(folder)) for kind in kinds]
found += [type(AutoBackbone.from_config(AutoConfig.from_pretrained(folder)))]
classify = pipeline("image-classification", model=folder)
found += [type(classify.model), type(classify.image_processor)]
assert classify(folder + "/photo.png")[0]["label"] in ("cat", "dog", "owl")
classify.save_pretrained(sys.argv[2])
print(json.dumps([f"{{kind.__module__}} {{kind.__name__}}" for kind in found]))
"""
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "saved")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    names = [name.removeprefix("modeling_vit_scratch.") for name in json.loads(result.stdout.splitlines()[-1])]
    models = ("Model", "ForImageClassification", "ForMaskedImageModeling", "Backbone", "ForImageClassification")
    assert names == [
        "configuration_vit_scratch ViTScratchConfig", "image_processing_vit_scratch ViTScratchImageProcessor",
        *(f"modeling_vit_scratch ViTScratch{model}" for model in models),
        "image_processing_vit_scratch ViTScratchImageProcessor",
    ]  # fmt: skip
    # and what is saved has its code with it
    assert "AutoModelForImageClassification" in json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    assert (tmp_path / "saved" / "modeling_vit_scratch.py").is_file()


def test_importing_the_package_drags_in_nothing_heavy():
    heavy = {"datasets", "sklearn", "evaluate", "accelerate", "scipy", "torchvision", "matplotlib"}
    stock = "transformers.models.vit.modeling_vit, transformers.models.vit.image_processing_pil_vit"
    code = f"""
import sys, {stock}
before = set(sys.modules)
import modeling_vit_scratch
print("more:", *({heavy} & (set(sys.modules) - before)))
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.split() == ["more:"]


def test_all_that_strangers_do_works_with_this_transformers(folder, tmp_path):
    # The steps that version_matrix.py compares between versions.
    code = (ROOT / "tests" / "stranger.py").read_text(encoding="utf-8").replace("sys.argv[2]", '"photo.png"')
    (tmp_path / "photo.png").write_bytes((folder / "photo.png").read_bytes())
    steps = json.loads(run_without_package(code, folder, tmp_path).splitlines()[-1])
    assert [step for step in STEPS if isinstance(steps[step], str)] == []
    assert steps["image processor"][-1]
    assert steps["Trainer"][-1]
    assert steps["saved again"][-1] == steps["logits, attentions"][0]


def test_an_older_transformers_is_told_in_one_sentence(monkeypatch):
    path = ROOT / "modeling_vit_scratch" / "compatibility_vit_scratch.py"
    monkeypatch.setattr("transformers.__version__", "4.56.2")
    with pytest.raises(
        ImportError, match=r"needs transformers 4\.57 or newer, and 4\.56\.2 is installed\. Update it: pip"
    ):
        runpy.run_path(str(path))
