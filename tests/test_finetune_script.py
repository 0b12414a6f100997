# SPDX-License-Identifier: Apache-2.0
"""The scripts as users run them: the whole way to a served model, several processes, Ctrl-C, and wrong commands."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from forked import run_script, start_script
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_images import CLASSES, ROOT, class_folders, load_script

from modeling_vit_scratch import ViTScratchForImageClassification
from startup.status import run_command_line


FINETUNE = ROOT / "scripts" / "finetune.py"


def environment(with_package=True):
    """For another process; without the package, not even an installed copy can be found."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT) if with_package else ""}
    return {name: value for name, value in variables.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def command(folder, *flags):
    return ["--train_dir", str(folder), "--variant", "test/4", "--per_device_train_batch_size", "4", *map(str, flags)]


def finetune(monkeypatch, *argv):
    """Runs the script in this process. Returns its exit status."""
    monkeypatch.setattr(sys, "argv", [str(FINETUNE), *argv])
    return run_command_line(load_script("finetune").main)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two epochs: a relative --output_dir, held-out examples, and what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    class_folders(folder / "pets", each=8)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        flags = ["--output_dir", "out/pets", "--num_train_epochs", "2", "--export_examples", "examples"]
        assert finetune(monkeypatch, *command(folder / "pets", *flags)) == 0
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# From the command to a served model


def test_the_folder_has_all_that_the_model_needs(finished):
    names = {path.name for path in (finished / "out" / "pets").iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "preprocessor_config.json", "README.md", "results.json",
        "trainer_state.json", "configuration_vit_scratch.py", "modeling_vit_scratch.py",
        "image_decoding_vit_scratch.py", "image_processing_vit_scratch.py",
    }  # fmt: skip
    config = json.loads((finished / "out" / "pets" / "config.json").read_text())
    assert config["problem_type"] == "single_label_classification"
    assert config["id2label"] == {str(index): name for index, name in enumerate(CLASSES)}
    assert {"AutoConfig", "AutoModelForImageClassification", "AutoImageProcessor"} <= config["auto_map"].keys()


def test_record_and_card_agree_and_tell_nothing_of_this_machine(finished):
    record = json.loads((finished / "out" / "pets" / "results.json").read_text())
    assert (record["n"], record["seed"], record["training"]["steps"]) == (3, 42, 12)
    card = ModelCard.load(finished / "out" / "pets" / "README.md")
    assert card.data.eval_results[0].metric_value == round(record["value"], 4)
    assert 'model="out/pets"' in card.text
    for file in ("README.md", "results.json", "config.json", "preprocessor_config.json"):
        assert str(finished) not in (finished / "out" / "pets" / file).read_text()


def test_three_lines_serve_the_folder_without_the_package(finished):
    examples = sorted((finished / "examples").iterdir())
    assert len(examples) == 3
    program = (
        "import sys\n"
        "from transformers import pipeline\n"
        "classify = pipeline('image-classification', model='out/pets', trust_remote_code=True)\n"
        "print(type(classify.model).__name__)\n"
        "for image in sys.argv[1:]:\n"
        "    for answer in classify(image, top_k=2):\n"
        "        print(image, answer['label'], answer['score'])\n"
    )
    # -I would hide the environment's own packages too; an empty PYTHONPATH and another folder hide this repository.
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, examples)],
        cwd=finished, env=environment(with_package=False), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kind, *lines = done.stdout.splitlines()
    assert kind == "ViTScratchForImageClassification"
    assert len(lines) == 6
    model = ViTScratchForImageClassification.from_pretrained(finished / "out" / "pets")
    for line in lines:
        assert any(name in line for name in model.config.id2label.values())
        assert 0.0 <= float(line.split()[-1]) <= 1.0


def test_a_finished_model_is_a_starting_point(finished, monkeypatch, tmp_path, capsys):
    folder = class_folders(tmp_path / "two", classes=CLASSES[1:])
    flags = ["--train_dir", str(folder), "--model_name_or_path", str(finished / "out" / "pets"), "--max_steps", "1"]
    assert finetune(monkeypatch, *flags, "--output_dir", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "Rows of its classifier: 2 of 3 kept, by name; 0 new" in printed
    assert "Held-out accuracy" in printed
    assert "fine-tuned from pets" in (tmp_path / "out" / "README.md").read_text()


def test_a_finished_run_is_not_written_over_and_can_be_resumed(finished, monkeypatch, capsys, tmp_path):
    shutil.copytree(finished / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    flags = command(finished / "pets", "--output_dir", "out/pets", "--num_train_epochs", "2")
    assert finetune(monkeypatch, *flags) == 2
    assert "already has a model" in capsys.readouterr().err
    before = load_file(tmp_path / "out" / "pets" / "model.safetensors")
    samples = json.loads((tmp_path / "out" / "pets" / "results.json").read_text())["training"]["samples_seen"]
    assert finetune(monkeypatch, *flags, "--resume_from_checkpoint", "True") == 0
    after = load_file(tmp_path / "out" / "pets" / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    record = json.loads((tmp_path / "out" / "pets" / "results.json").read_text())
    assert record["resumed_from"] == "checkpoint-12"
    assert record["training"]["samples_seen"] == samples > 0  # with those before the stop


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def test_two_processes_give_the_weights_of_one_and_count_every_image_once(tmp_path):
    class_folders(tmp_path / "pets", each=8)  # 21 to train on, 3 to hold out: neither is a multiple of two
    flags = command(tmp_path / "pets", "--max_steps", "6", "--optim", "sgd", "--learning_rate", "0.05")
    flags += ["--dataloader_drop_last", "True", "--load_best_model_at_end", "False"]
    one = run_script([FINETUNE, *flags, "--output_dir", "one", "--per_device_train_batch_size", "8"], tmp_path)
    more = [*flags, "--output_dir", "two", "--per_device_train_batch_size", "4"]
    two = run_script([FINETUNE, *more], tmp_path, processes=2, ACCELERATE_MIXED_PRECISION="no")
    records = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert [record["n"] for record in records] == [3, 3]
    assert [record["training"]["processes"] for record in records] == [1, 2]
    assert [record["training"]["batch_size"] for record in records] == [8, 8]
    assert records[0]["metrics"] == records[1]["metrics"]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert max((ours[key] - theirs[key]).abs().max().item() for key in theirs) < 1e-6
    assert "".join(two).count("Held-out accuracy") == 1
    assert "accelerate launch --multi_gpu --num_processes 2" in records[1]["command"]
    assert "unused" not in "".join(two)
    assert "pin_memory" not in "".join(one + two)


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(tmp_path):
    class_folders(tmp_path / "pets", each=8)
    flags = ["--output_dir", "out", "--num_train_epochs", "9999", "--dataloader_num_workers", "2"]
    argv = [sys.executable, str(FINETUNE), *command(tmp_path / "pets", *flags)]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            argv, cwd=tmp_path, env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("out/checkpoint-*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers that read the images too
        assert process.wait(timeout=60) == 130
    text = (tmp_path / "log").read_text()
    assert "to go on, add --resume_from_checkpoint True" in text
    assert text.count("Ctrl-C: saving a checkpoint") == 1
    assert "Traceback" not in text


def test_wrong_commands_and_data_end_with_2_and_one_message(tmp_path):
    class_folders(tmp_path / "pets")
    (tmp_path / "pets" / "cat" / "zero.png").write_bytes(b"")
    (tmp_path / "pets" / "empty").mkdir()
    flags = ["--train_val_split", "7", "--hub_token", "hf_x"]
    run = start_script([FINETUNE, *command("pets", *flags)], tmp_path, tmp_path / "log")
    assert run.wait() == 2
    assert "Traceback" not in run.printed
    for part in ("4 problems", "--train_val_split 7", "--hub_token", "'empty' has no images", "zero.png"):
        assert part in run.printed
    assert not (tmp_path / "outputs").exists()


def test_a_sick_loss_and_a_file_that_breaks_end_with_1(tmp_path, monkeypatch, capsys):
    class_folders(tmp_path / "pets")
    flags = command(tmp_path / "pets", "--output_dir", tmp_path / "a", "--learning_rate", "1e38", "--warmup_steps", "0")
    assert finetune(monkeypatch, *flags, "--optim", "sgd", "--max_grad_norm", "0") == 1
    assert "The loss is nan at step" in capsys.readouterr().err
    (tmp_path / "pets" / "cat" / "9.png").write_bytes(b"broken")
    for workers in (0, 1):
        more = [
            "--output_dir",
            tmp_path / f"b{workers}",
            "--verify_images",
            "False",
            "--dataloader_num_workers",
            workers,
        ]
        assert finetune(monkeypatch, *command(tmp_path / "pets", *more)) == 1
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert str(tmp_path / "pets" / "cat" / "9.png") in errors[0]
