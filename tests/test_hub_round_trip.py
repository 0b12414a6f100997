# SPDX-License-Identifier: Apache-2.0
"""From a run to a loopback Hub to a stranger who has not got the package, and back."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from loopback_hub import LoopbackHub, Repository
from PIL import Image
from test_publishing import CARD, CODE_NAMES, connect
from test_remote_code import HIDDEN
from tiny_images import build, difference, flags, load_script, weights

from modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.common.errors import InputError, TrainingInterrupted
from modeling_vit_scratch.data.held_out import read_earlier
from modeling_vit_scratch.hub.commit import checkpoint_uploads
from modeling_vit_scratch.hub.contents import CODE


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with LoopbackHub() as server:
        connect(monkeypatch, server, tmp_path / "hub-cache")
        yield server


def quick(pets: str, *more: str) -> list[str]:
    """Flags of a run that starts no processes to read images."""
    return flags(pets, "--dataloader_num_workers", "0", *more)


def run(monkeypatch, script: str, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"scripts/{script}.py", *argv, "--report_to", "none", "--disable_tqdm", "True"])
    load_script(script).main()


# Two strangers, as fresh as each other: the first one is a process that splits off before anything is asked of the Hub.
STRANGER = """
import json, os, numpy, torch
from PIL import Image
from transformers import (AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
    AutoModelForMaskedImageModeling, Trainer, TrainingArguments, pipeline)
name, first, out = "owner/pets", sys.argv[1], {}
trust = {"trust_remote_code": True}

if (child := os.fork()) > 0:
    status = os.waitpid(child, 0)[1]
    assert status == 0, status
    assert not [module for module in sys.modules if module.startswith("transformers_modules")]
    trust["cache_dir"] = "another_cache"
    batch = AutoImageProcessor.from_pretrained("owner/tuned", **trust)(Image.open("photo.png"), return_tensors="pt")
    model = AutoModelForImageClassification.from_pretrained("owner/tuned", **trust).eval()
    with torch.no_grad():
        print(json.dumps({"logits": model(**batch).logits.tolist(), "package": "modeling_vit_scratch" in sys.modules}))
    sys.exit()

pixels = numpy.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=numpy.uint8)
photo = Image.fromarray(pixels)
photo.save("photo.png")

config = AutoConfig.from_pretrained(name, **trust)
processor = AutoImageProcessor.from_pretrained(name, **trust)
batch = processor(photo, return_tensors="pt")
with torch.no_grad():
    model = AutoModelForImageClassification.from_pretrained(name, **trust).eval()
    out["logits"] = model(**batch).logits.tolist()
    out["pooled"] = AutoModel.from_pretrained(name, **trust).eval()(**batch).pooler_output.shape
    painter = AutoModelForMaskedImageModeling.from_pretrained(name, **trust).eval()
    out["painted"] = painter(**batch).reconstruction.shape
    out["map"] = AutoBackbone.from_pretrained(name, **trust).eval()(**batch).feature_maps[0].shape
    for revisions in ({"revision": first}, {"revision": "experiment", "code_revision": first}):
        pinned = AutoModelForImageClassification.from_pretrained(name, **revisions, **trust).eval()
        out.setdefault("pinned", []).append(pinned(**batch).logits.tolist())
for settings in ({"revision": "experiment"}, {"token": False, "cache_dir": "nobody"}):
    try:
        AutoModelForImageClassification.from_pretrained(name, **settings, **trust)
    except (RuntimeError, OSError) as error:
        out.setdefault("errors", []).append(str(error))

classify = pipeline("image-classification", model=name, **trust)
url = os.environ["HF_ENDPOINT"] + "/owner/photos/resolve/main/photo.png"
out["answers"] = {
    "image": classify(photo, top_k=3),
    "batch": classify([photo] * 3, batch_size=2, top_k=2),
    "file": classify("photo.png", top_k=1),
    "url": classify(url, top_k=1),
    "generator": list(classify((photo for _ in range(3)), batch_size=2, top_k=1)),
}
extract = pipeline("image-feature-extraction", model=name, pool=True, return_tensors=True, **trust)
out["features"] = [extract(given).shape for given in (photo, "photo.png", url)]
out["feature_batch"] = len(extract([photo] * 3, batch_size=2))

examples = [{"pixel_values": batch["pixel_values"][0], "labels": i % 3} for i in range(4)]
model = AutoModelForImageClassification.from_pretrained(name, **trust)
arguments = TrainingArguments("tuned", max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True,
    learning_rate=0.01, save_strategy="no", push_to_hub=True, hub_model_id="owner/tuned")
trainer = Trainer(model, arguments, train_dataset=examples, processing_class=processor)
trainer.train()
trainer.push_to_hub()
with torch.no_grad():
    out["tuned"] = trainer.model.eval()(**batch).logits.tolist()
out["package"] = "modeling_vit_scratch" in sys.modules
print(json.dumps(out), flush=True)
os._exit(0)
"""


def test_from_a_run_to_a_stranger_and_back(hub, pets, tmp_path, monkeypatch, capfd):
    output, data = tmp_path / "pets-model", [*quick(pets), "--variant", "test/4", "--per_device_train_batch_size", "4"]
    run(
        monkeypatch, "finetune", *data, "--output_dir", str(output), "--num_train_epochs", "1",
        "--save_strategy", "epoch", "--push_to_hub", "--hub_model_id", "pets", "--hub_private_repo", "True",
        "--license", "mit",
    )  # fmt: skip
    repository = hub.repositories["owner/pets"]
    assert repository.private
    # During training the weights; when it has ended the rest.
    assert repository.titles() == ["End of training", "Training in progress, step 5", "initial commit"]
    files = repository.files()
    belonging = {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", "results.json"}
    assert set(files) == belonging | CODE_NAMES | {"training_args.json", ".gitattributes"}
    everything = b"".join(files.values())
    for secret in (str(tmp_path), "hf_owner"):
        assert secret.encode() not in everything
    assert json.loads(files["training_args.json"])["output_dir"] == "pets-model"
    there, here = read_earlier("owner/pets", revision="main"), read_earlier(str(output))
    assert there.records == here.records
    assert there.held_out  # a run that starts from the Hub knows what was held out
    assert read_earlier("owner/nothing") is None
    assert not list(output.rglob("training_args.bin"))
    assert {path.name for path in output.glob("_*")} <= {"_lock"}  # the run's own, until its process ends
    assert f"Pushed to {hub.url}/owner/pets/commit/{repository.resolve('main')}" in capfd.readouterr().err
    card = ModelCard(files["README.md"].decode())
    assert 'model="owner/pets"' in card.text
    assert card.data.license == "mit"
    card.validate()

    # A later version of the weights, a branch with the first weights and code of its own, and a picture with a URL,
    # which pipelines ask for without a token.
    first = repository.resolve("main")
    model = ViTScratchForImageClassification.from_pretrained(output).eval()
    before = model.classifier.bias.clone()
    with torch.no_grad():
        model.classifier.bias += torch.tensor([0.0, 1.0, 2.0])
    model.save_pretrained(output)
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    load_script("publish").main([str(output), "owner/pets", "--yes"])
    repository.add("experiment", files | {CODE[-1].name: b"raise RuntimeError('the code of the branch')"}, "experiment")
    hub.repositories["owner/photos"] = Repository("owner", private=False)
    photo.save(tmp_path / "photo.png")
    hub.repositories["owner/photos"].add("main", {"photo.png": (tmp_path / "photo.png").read_bytes()}, "photo")

    code = HIDDEN + STRANGER
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "fresh"),
                   "OMP_NUM_THREADS": "1", **hub.environment()}  # fmt: skip
    (tmp_path / "elsewhere").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", code, first], cwd=tmp_path / "elsewhere", env=environment, capture_output=True,
        text=True, timeout=100,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    out, second = map(json.loads, result.stdout.splitlines()[-2:])
    assert not out["package"]
    assert not second["package"]
    assert "the code of the branch" in out["errors"][0]
    assert "is not a valid model identifier" in out["errors"][1]  # private, and asked for without a token
    inputs = ViTScratchImageProcessor.from_pretrained(output)(photo, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
        np.testing.assert_array_equal(np.float32(out["logits"]), logits)
        model.classifier.bias.copy_(before)
        for pinned in out["pinned"]:
            np.testing.assert_array_equal(np.float32(pinned), model(**inputs).logits)
    assert out["pooled"] == [1, 32]
    assert out["painted"] == [1, 3, 16, 24]
    assert out["map"] == [1, 32, 4, 6]
    assert out["features"] == [[1, 32]] * 3
    assert out["feature_batch"] == 3
    best = logits.softmax(-1)[0].topk(3)
    labels = [model.config.id2label[index] for index in best.indices.tolist()]
    answers = out["answers"]
    assert [item["label"] for item in answers["image"]] == labels
    np.testing.assert_allclose([item["score"] for item in answers["image"]], best.values, rtol=1e-5)
    assert [[item["label"] for item in answer] for answer in answers["batch"]] == [labels[:2]] * 3
    for (best_one,) in (answers["file"], answers["url"], *answers["generator"]):
        assert best_one["label"] == labels[0]
        assert best_one["score"] == pytest.approx(float(best.values[0]), rel=1e-5)
    assert len(answers["generator"]) == 3
    # The second stranger has what the first one made of the model.
    np.testing.assert_array_equal(second["logits"], out["tuned"])
    assert np.abs(np.float32(out["tuned"]) - logits.numpy()).max() > 0.01
    assert set(hub.repositories["owner/tuned"].files()) >= CODE_NAMES | {"model.safetensors", "config.json"}


def test_checkpoints_can_be_pushed_to_resume_elsewhere(hub, pets, tmp_path):
    output = tmp_path / "run"
    arguments = quick(pets, "--num_train_epochs", "2", "--save_total_limit", "1", "--push_to_hub")
    arguments[arguments.index("--save_strategy") + 1] = "epoch"
    trainer = build(
        output, *arguments, "--hub_strategy", "checkpoint", "--hub_always_push", "True", "--hub_revision", "v1"
    )
    assert trainer.hub_model_id == "owner/run"
    trainer.train()
    repository = hub.repositories["owner/run"]
    assert repository.titles("v1")[:2] == ["Training in progress, step 10", "Training in progress, step 5"]
    assert repository.titles() == ["initial commit"]
    files = repository.files("v1")
    local = {path.name: path.read_bytes() for path in (output / "checkpoint-10").iterdir()}
    pushed = {
        path.removeprefix("last-checkpoint/"): files[path] for path in files if path.startswith("last-checkpoint/")
    }
    assert set(pushed) == set(local)
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.json"} <= set(pushed)
    for name, content in pushed.items():
        assert len(content) == len(local[name]), name
        assert str(tmp_path).encode() not in content, name
    assert files["model.safetensors"] == local["model.safetensors"]
    assert not list(output.glob("_upload-*"))

    # On another machine, from the first of the two: the same bits.
    wanted = {"revision": repository.history("v1")[1], "allow_patterns": "last-checkpoint/*"}
    elsewhere = Path(snapshot_download("owner/run", local_dir=tmp_path / "elsewhere", **wanted))
    other = build(elsewhere / "run", *quick(pets, "--num_train_epochs", "2"))
    other.train(resume_from_checkpoint=str(elsewhere / "last-checkpoint"))
    assert difference(weights(other), weights(trainer)) == 0.0


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("end", set()),
        ("every_save", set()),
        ("all_checkpoints", {"checkpoint-1", "checkpoint-2"}),
        # Stopped by a signal at the second step, before its checkpoint is pushed; "checkpoint" is above.
        ("stopped", {"checkpoint-1", "checkpoint-2"}),
    ],
)
def test_each_strategy_pushes_what_it_says(hub, pets, tmp_path, strategy, folders):
    arguments = quick(pets, "--max_steps", "2", "--save_steps", "1", "--push_to_hub", "--hub_always_push", "True")
    arguments[arguments.index("--save_strategy") + 1] = "steps"
    is_stopped = strategy == "stopped"
    trainer = build(tmp_path / "run", *arguments, "--hub_strategy", "all_checkpoints" if is_stopped else strategy)
    if is_stopped:
        step = trainer.training_step

        def terminated(*args, **kwargs):
            if trainer.state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*args, **kwargs)

        trainer.training_step = terminated
        with pytest.raises(TrainingInterrupted):
            trainer.train()
    else:
        trainer.train()
        (tmp_path / "run" / "README.md").write_text(CARD)
        trainer.push_to_hub()
    repository = hub.repositories["owner/run"]
    steps = ["Training in progress, step 2", "Training in progress, step 1"] if strategy != "end" else []
    end = [] if is_stopped else ["End of training"]
    assert repository.titles() == [*end, *steps, "initial commit"]
    assert {path.split("/")[0] for path in repository.files() if "/" in path} == folders
    assert "model.safetensors" in repository.files()


def test_paths_in_a_pushed_checkpoint_are_shortened_in_place(tmp_path):
    state = {"best_model_checkpoint": f"{tmp_path}/checkpoint-5", "global_step": 5}
    text = json.dumps(state, indent=2)
    (tmp_path / "trainer_state.json").write_text(text)
    (tmp_path / "training_args.bin").write_bytes(b"secret")
    (upload,) = checkpoint_uploads(tmp_path, "last-checkpoint")
    assert upload.path == "last-checkpoint/trainer_state.json"
    assert len(upload.content) == len(text)
    assert json.loads(upload.content) == {"best_model_checkpoint": "checkpoint-5", "global_step": 5}


def test_a_push_that_fails_during_training_does_not_stop_it(hub, pets, tmp_path, capsys):
    output = tmp_path / "run"
    arguments = quick(pets, "--max_steps", "2", "--push_to_hub")
    arguments[arguments.index("--save_strategy") + 1] = "epoch"
    trainer = build(output, *arguments)
    hub.losses["POST", "/commit/"] = 1000
    trainer.train()
    assert trainer.state.global_step == 2
    assert "warning: not pushed (Training in progress, step 2): The connection" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"The model is saved in .*scripts/publish\.py .*run owner/run --yes"):
        trainer.push_to_hub()
    assert (output / "model.safetensors").exists()
    assert hub.repositories["owner/run"].titles() == ["initial commit"]


def test_what_stands_in_the_way_of_a_push_is_told_before_training(hub, pets, tmp_path, monkeypatch):
    wishes = flags(pets, "--push_to_hub", "--hub_model_id")
    hub.repositories["owner/bert"] = Repository("owner", private=False)
    hub.repositories["owner/bert"].add("main", {"config.json": b'{"model_type": "bert"}'}, "bert")
    for name, expected in {"owner/bert": "holds something else", "other/new": "may not write to other/new"}.items():
        with pytest.raises(InputError, match=f"--push_to_hub to {name}: .*{expected}"):
            build(tmp_path / "run", *wishes, name)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="no token"):
        build(tmp_path / "run", *wishes, "owner/new")
    for wrong, expected in {
        ("--hub_model_id", "owner/x"): "nothing is pushed without --push_to_hub",
        ("--push_to_hub", "--hub_model_id", "a/b/c"): "is no name for a repository",
        ("--push_to_hub", "--hub_token", "hf_owner"): "--hub_token: whoever sees",
        ("--license", "See our site!"): "--license See our site!: it is no name of the Hub's",
    }.items():
        with pytest.raises(InputError, match=expected):
            run(
                monkeypatch,
                "finetune",
                *flags(pets),
                "--variant",
                "test/4",
                "--output_dir",
                str(tmp_path / "x"),
                *wrong,
            )
