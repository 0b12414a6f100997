# SPDX-License-Identifier: Apache-2.0
"""Cards as training and evaluation write them, one after the other; and the examples that an evaluation draws."""

import csv
import json
import re
import sys

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.metrics import accuracy_score
from tiny_images import CLASSES, class_folders, image, load_script

from modeling_vit_scratch.evaluation.report import choose_examples
from startup.status import run_command_line


def run(script, *argv):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", [f"scripts/{script}.py", *map(str, argv)])
        return run_command_line(load_script(script).main)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where relative paths start: "photos", a "model" trained on them and evaluated on those that were held out."""
    folder = tmp_path_factory.mktemp("runs")
    class_folders(folder / "photos", each=12)
    for file in class_folders(folder / "other" / "test", each=3).glob("*/*.png"):
        image(CLASSES.index(file.parent.name), 100 + int(file.stem)).save(file)  # other images than the training's
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        flags = ["--train_dir", "photos", "--variant", "test/4", "--train_val_split", "0.25", "--num_train_epochs", "3"]
        flags += ["--per_device_train_batch_size", "16", "--logging_steps", "1", "--save_strategy", "no"]
        flags += ["--eval_strategy", "epoch", "--load_best_model_at_end", "False"]
        assert run("finetune", *flags, "--output_dir", "model", "--report_to", "none", "--disable_tqdm", "True") == 0
        (folder / "before.md").write_text((folder / "model" / "README.md").read_text())
        flags = ["--examples", "2", "--examples_credit", "made up", "--bootstrap_resamples", "20"]
        assert run("evaluate", "model", "photos", *flags) == 0
    return folder


def test_training_leaves_a_card_with_its_curves(place):
    text = (place / "before.md").read_text()
    record = json.loads((place / "model" / "results.json").read_text())
    assert f"| Accuracy | {100 * record['value']:.2f} % |" in text
    assert "![Learning curves](figures/learning_curves.png)" in text
    assert f"| adam betas | {record['training']['adam_betas'][0]:g}, " in text
    assert str(place) not in text
    with Image.open(place / "model" / "figures" / "learning_curves.png") as figure:
        assert figure.width > figure.height > 300


def test_evaluation_puts_its_results_into_the_card(place):
    card = ModelCard.load(place / "model" / "README.md")
    rows = list(csv.DictReader((place / "model" / "evaluation" / "photos" / "predictions.csv").open()))
    accuracy = accuracy_score([row["label"] for row in rows], [row["prediction"] for row in rows])
    assert len(rows) == 9
    assert f"on 9 images of photos that it was not trained on: **{100 * accuracy:.2f} %**" in card.text
    result = next(result for result in card.data.eval_results if result.metric_type == "accuracy")
    assert result.metric_value == round(accuracy, 4)
    assert result.metric_args["n"] == 9
    assert len([one for one in card.data.eval_results if one.metric_type == "accuracy"]) == 1
    wrong = sum(row["label"] != row["prediction"] for row in rows)
    told = f"{min(2, 9 - wrong)} images that it gets right and {min(2, wrong)} that it gets wrong, chosen at random"
    assert told in card.text
    assert "\nImages: made up.\n" in card.text
    for name in ("examples", "confusion_matrix", "reliability"):
        assert f"evaluation/photos/{name}.png" in card.text
        assert (place / "model" / "evaluation" / "photos" / f"{name}.png").is_file()


def test_terminal_and_card_show_the_same_intervals(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    flags = ["--output_dir", tmp_path / "out", "--bootstrap_resamples", "20"]
    assert run("evaluate", "model", "photos", *flags) == 0
    printed = dict(re.findall(r"^(\w[^%\n]*?) +[\d.]+(?: %)?   (\S.* to .*\S)$", capsys.readouterr().out, re.M))
    card = load_script("card")
    card.main(["model", "--evaluation", str(tmp_path / "out"), "--dry_run"])
    section = capsys.readouterr().out.split("### On photos, out")[1].split("### On")[0]
    shown = dict(re.findall(r"^\| ([^|]+) \| [\d.]+(?: %)? \| (.* to .*) \| 9 \|$", section, re.M))
    assert len(printed) >= 5
    assert shown == printed


def test_the_images_of_the_examples_are_right_and_wrong_as_the_figure_says(place):
    folder = place / "model" / "evaluation" / "photos"
    rows = list(csv.DictReader((folder / "predictions.csv").open()))
    facts = json.loads((folder / "results.json").read_text())["examples"]
    correct = [rows[index]["label"] == rows[index]["prediction"] for index in facts["rows"]]
    assert correct == [True] * facts["right"] + [False] * facts["wrong"]


@pytest.mark.parametrize(
    ("data", "split", "seen"),
    [("photos", "auto", False), ("photos", "train", True), ("photos", "all", True), ("other/test", "auto", None)],
)
def test_a_report_knows_whether_the_model_was_trained_on_its_images(place, tmp_path, monkeypatch, data, split, seen):
    monkeypatch.chdir(place)
    before = (place / "model" / "README.md").read_text()
    flags = ["--split", split, "--output_dir", tmp_path / "out", "--bootstrap_resamples", "0"]
    assert run("evaluate", "model", data, *flags) == 0
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["dataset"]["seen_in_training"] is seen
    assert record["examples"] is None
    assert (place / "model" / "README.md").read_text() == before  # the report is elsewhere


def test_a_card_that_was_changed_by_hand_or_is_of_other_weights_stays(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    file, flags = place / "model" / "README.md", ["--bootstrap_resamples", "0", "--output_dir"]
    ours = file.read_text()
    try:
        file.write_text(ours.replace("## Use", "## How I use it"))
        assert run("evaluate", "model", "other/test", *flags, "model/evaluation/hand") == 0
        assert "The card stays as it is: model/README.md was written or changed by hand" in capsys.readouterr().out
        assert "## How I use it" in file.read_text()
        file.write_text(ours)
        weights = place / "model" / "model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert run("evaluate", "model", "other/test", *flags, "model/evaluation/weights") == 0
        assert "of other weights than those in model" in capsys.readouterr().out
        assert file.read_text() == ours
        weights.write_bytes(content)
    finally:
        file.write_text(ours)


def test_a_card_that_fails_does_not_cost_the_model(place, tmp_path, monkeypatch, capsys):
    def fail(history, file):
        raise OSError("no fonts")

    monkeypatch.chdir(place)
    monkeypatch.setattr("modeling_vit_scratch.cards.writing.draw_curves", fail)
    flags = ["--train_dir", "photos", "--variant", "test/4", "--max_steps", "1", "--save_strategy", "no"]
    flags += ["--eval_strategy", "no", "--load_best_model_at_end", "False", "--report_to", "none"]
    assert run("finetune", *flags, "--disable_tqdm", "True", "--output_dir", tmp_path / "model") == 0
    assert "warning: no card was written (OSError: no fonts)" in capsys.readouterr().out
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "model" / "README.md").exists()


def test_examples_are_drawn_at_random_and_never_one_twice():
    correct = np.random.default_rng(0).random(200) < 0.7
    right, wrong = choose_examples(correct, 5, seed=1)
    assert len(set(right)) == len(set(wrong)) == 5
    assert correct[right].all()
    assert not correct[wrong].any()
    assert choose_examples(correct, 5, seed=1) == (right, wrong)
    assert choose_examples(correct, 5, seed=2) != (right, wrong)
    assert choose_examples(np.ones(3, dtype=bool), 5, seed=1) == ([0, 1, 2], [])


def test_nobodys_images_are_shown_without_saying_whose(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert run("evaluate", "model", "other/test", "--examples", "2", "--output_dir", tmp_path / "out") == 2
    assert "Say whose they are: --examples_credit" in capsys.readouterr().err
    assert run("evaluate", "model", "other/test", "--examples", "9", "--output_dir", tmp_path / "out") == 2
    assert "--examples 9 must be at most 8" in capsys.readouterr().err


def test_examples_of_several_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "pets", each=4)
    lines = [
        json.dumps({"file_name": f"{name}/{i}.png", "labels": labels})
        for name, labels in (("cat", ["furry", "small"]), ("zebra", ["furry"]), ("brown bear", []))
        for i in range(4)
    ]
    (tmp_path / "pets" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    flags = [
        "--train_dir",
        "pets",
        "--variant",
        "test/4",
        "--max_steps",
        "2",
        "--save_strategy",
        "no",
        "--report_to",
        "none",
    ]
    flags += ["--eval_strategy", "no", "--load_best_model_at_end", "False", "--disable_tqdm", "True"]
    assert run("finetune", *flags, "--output_dir", "model") == 0
    flags = ["--split", "all", "--examples", "3", "--examples_credit", "made up", "--bootstrap_resamples", "0"]
    assert run("evaluate", "model", "pets", *flags) == 0
    card = ModelCard.load("model/README.md")
    assert "evaluation/pets/precision_recall.png" in card.text
    assert "evaluation/pets/examples.png" in card.text
    assert "The model was trained on some or all of these images" in card.text
    with Image.open("model/evaluation/pets/examples.png") as figure:
        assert figure.width > 200


@pytest.mark.parametrize("objective", ["mae", "simmim", "mpp", "dino"])
def test_pretrained_without_labels_fine_tuned_described_and_published(tmp_path, monkeypatch, capsys, objective):
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "photos", each=4)
    common = ["--train_dir", "photos", "--max_steps", "2", "--per_device_train_batch_size", "4", "--report_to", "none"]
    common += ["--disable_tqdm", "True", "--save_strategy", "no", "--eval_strategy", "no"]
    flags = ["--objective", objective, "--variant", "test/4", "--output_dir", "encoder"]
    assert run("pretrain", *common, *flags) == 0
    flags = ["--model_name_or_path", "encoder", "--load_best_model_at_end", "False", "--output_dir", "pets"]
    assert run("finetune", *common, *flags) == 0
    assert "warning" not in capsys.readouterr().out
    record = json.loads((tmp_path / "encoder" / "results.json").read_text())
    for folder in ("encoder", "pets"):
        assert run("card", folder, "--license", "mit") == 0
        assert run("publish", folder, f"me/{folder}") == 0, capsys.readouterr()
        assert "Nothing was uploaded" in capsys.readouterr().out
    card = ModelCard.load("pets/README.md")
    assert "It was fine-tuned from encoder on photos." in card.text
    assert (
        f"a run without labels on photos from random weights reached loss {record['value']:.4f} on {record['n']} images"
        in card.text
    )
    assert card.data.pipeline_tag == "image-classification"
    assert ModelCard.load("encoder/README.md").data.pipeline_tag == "image-feature-extraction"
