# SPDX-License-Identifier: Apache-2.0
"""The script as users run it: which images, what is written, several processes, what pipelines say afterwards."""

import csv
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from forked import run_script
from sklearn.model_selection import train_test_split
from tiny_images import CLASSES, ROOT, build, class_folders, load_script
from transformers import pipeline

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.checkpoint.conversion import save_checkpoint
from modeling_vit_scratch.training.arguments import ModelArguments
from modeling_vit_scratch.training.build import build_model
from startup.status import run_command_line


SCRIPT = ROOT / "scripts" / "evaluate.py"


def evaluate_script(monkeypatch, *argv):
    """Runs the script in this process. Returns its exit status."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, argv)])
    return run_command_line(load_script("evaluate").main)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a tiny model in "model", and other images than those that it was trained on in "test"."""
    folder = tmp_path_factory.mktemp("evaluated")
    class_folders(folder / "pets", each=8)
    class_folders(folder / "test", each=9)
    flags = ["--train_dir", str(folder / "pets"), "--train_val_split", "0.25", "--max_steps", "4", "--seed", "7"]
    trainer = build(folder / "model", *flags, "--eval_strategy", "no", "--save_strategy", "no")
    with torch.no_grad():  # a classifier that knows nothing, but is sure of it
        trainer.model.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
    trainer.save_model()
    facts = {"name": "pets", "num_training_images": 18, "num_held_out_images": 6}
    record = {"dataset": {**facts, "held_out": "25 % of each class, chosen with seed 7"}}
    (folder / "model" / "results.json").write_text(json.dumps(record))
    return folder


def copy_of(trained, tmp_path):
    return Path(shutil.copytree(trained / "model", tmp_path / "model"))


def predictions_in(folder):
    return list(csv.DictReader((folder / "predictions.csv").read_text().splitlines()))


def report_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_scores_are_those_of_the_pipeline(trained, tmp_path, monkeypatch):
    model, out = copy_of(trained, tmp_path), tmp_path / "out"
    assert evaluate_script(monkeypatch, model, trained / "test", "--output_dir", out, "--calibrate") == 0
    report = report_of(out)
    assert (report["n"], report["temperature"] != 1.0) == (14, True)
    assert ViTScratchConfig.from_pretrained(model).temperature == report["temperature"]
    nll = next(one["value"] for one in report["results"] if one["metric"] == "nll")
    assert nll != next(one["value"] for one in report["calibration"]["without_temperature"] if one["metric"] == "nll")
    classify = pipeline("image-classification", str(model), trust_remote_code=True)
    plain = ViTScratchForImageClassification.from_pretrained(model, calibrated=False)
    uncalibrated = pipeline("image-classification", plain, image_processor=classify.image_processor)
    differences = []
    for row, number in zip(predictions_in(out), sorted_half(27)):
        label = CLASSES[number // 9]
        assert (row["label"], row["image"]) == (label, f"{number % 9}.png")
        file = str(trained / "test" / label / row["image"])
        best = classify(file)[0]
        assert (best["label"], pytest.approx(best["score"], abs=1e-6)) == (row["prediction"], float(row["score"]))
        differences.append(abs(uncalibrated(file)[0]["score"] - best["score"]))
    assert max(differences) > 1e-3
    for name in ("confusion_matrix.png", "reliability.png", "per_class.png"):
        assert (out / name).stat().st_size > 5000
    assert str(tmp_path) not in (out / "results.json").read_text()


def test_help_explains_every_flag(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate_script(monkeypatch, "--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "95 % intervals. 0: no intervals." in text
    assert "--calibrate" in text


def test_a_temperature_that_does_not_help_is_told_and_not_stored(trained, tmp_path, monkeypatch, capsys):
    model = copy_of(trained, tmp_path)
    monkeypatch.setattr("modeling_vit_scratch.evaluation.report.fit_temperature", lambda logits, labels: 0.1)
    flags = ("--output_dir", tmp_path / "out", "--calibrate", "--bootstrap_resamples", "0")
    assert evaluate_script(monkeypatch, model, trained / "test", *flags) == 0
    report = report_of(tmp_path / "out")
    assert (report["temperature"], report["calibration"]["is_stored"]) == (1.0, False)
    assert report["calibration"]["fitted_temperature"] == 0.1
    assert report["results"] == report["calibration"]["without_temperature"]
    assert ViTScratchConfig.from_pretrained(model).temperature == 1.0
    printed = capsys.readouterr().out
    assert "was not stored" in printed
    assert "MODEL was trained on these images" not in printed
    flags = ("--output_dir", tmp_path / "seen", "--calibrate", "--bootstrap_resamples", "0", "--split", "train")
    assert evaluate_script(monkeypatch, model, trained / "pets", *flags) == 0
    assert "MODEL was trained on these images" in capsys.readouterr().out


def sorted_half(count, seed=42):
    """The half of the images that --calibrate reports on."""
    from modeling_vit_scratch.evaluation.report import calibration_split

    fitted, rest = calibration_split(count, seed)
    assert sorted([*fitted, *rest]) == list(range(count))
    return rest.tolist()


def test_two_processes_count_each_image_once(trained, tmp_path, monkeypatch):
    model, *flags = [str(trained / "model"), str(trained / "test"), "--per_device_eval_batch_size", "4"]
    run_script([SCRIPT, model, *flags, "--output_dir", tmp_path / "two"], tmp_path, processes=2)
    assert evaluate_script(monkeypatch, model, *flags, "--output_dir", tmp_path / "one") == 0
    reports = [report_of(tmp_path / name) for name in ("two", "one")]
    assert reports[0]["throughput"]["processes"] == 2
    assert reports[0]["n"] == sum(map(sum, reports[0]["confusion_matrix"]["rows_true_columns_predicted"])) == 27
    for name in ("confusion_matrix", "per_class"):
        assert reports[0][name] == reports[1][name]
    for ours, theirs in zip(*(report["results"] for report in reports)):
        assert ours["value"] == pytest.approx(theirs["value"], abs=1e-6)


def test_an_old_record_still_says_what_was_held_out(trained, tmp_path, monkeypatch, capsys):
    assert evaluate_script(monkeypatch, trained / "model", trained / "pets", "--output_dir", tmp_path / "a") == 0
    report = report_of(tmp_path / "a")
    assert report["n"] == 6
    assert report["dataset"]["images"] == "held out from training: 25 % of each class, chosen with seed 7"
    chosen = [(row["label"], row["image"]) for row in predictions_in(tmp_path / "a")]
    # The record is from before there were identities: the order of the files and the seed decide, by scikit-learn.
    files = [(name, f"{number}.png") for name in CLASSES for number in range(8)]
    labels = [name for name, _ in files]
    assert chosen == sorted(train_test_split(files, test_size=6, stratify=labels, random_state=7)[1])
    assert evaluate_script(monkeypatch, trained / "model", trained / "pets", "--output_dir", tmp_path / "a") == 2
    assert "already has a report" in capsys.readouterr().err
    more = Path(shutil.copytree(trained / "pets", tmp_path / "more" / "pets"))
    shutil.copy(more / "cat" / "0.png", more / "cat" / "8.png")
    assert evaluate_script(monkeypatch, trained / "model", more, "--output_dir", tmp_path / "c") == 0
    assert "it can't be told which of them it has seen" in report_of(tmp_path / "c")["dataset"]["images"]


def test_twice_the_same(trained, tmp_path, monkeypatch):
    for name in ("a", "b"):
        assert evaluate_script(monkeypatch, trained / "model", trained / "test", "--output_dir", tmp_path / name) == 0
    first, second = report_of(tmp_path / "a"), report_of(tmp_path / "b")
    for report in (first, second):
        del report["throughput"], report["command"]
    assert first == second


@pytest.mark.parametrize("crops", [2, 10])
def test_views(trained, tmp_path, monkeypatch, crops):
    out = tmp_path / "out"
    assert evaluate_script(monkeypatch, trained / "model", trained / "test", "--output_dir", out, "--crops", crops) == 0
    report = report_of(out)
    assert (report["views"], report["n"]) == (crops, 27)


def test_labels_are_matched_by_name(trained, tmp_path, monkeypatch, capsys):
    only = class_folders(tmp_path / "only", classes=("zebra",), each=3)
    assert evaluate_script(monkeypatch, trained / "model", only, "--output_dir", tmp_path / "a") == 0
    assert [row["n"] for row in report_of(tmp_path / "a")["per_class"]] == [0, 0, 3]
    (only / "zebra").rename(only / "yak")
    assert evaluate_script(monkeypatch, trained / "model", only, "--output_dir", tmp_path / "b") == 2
    assert "does not know 1 labels of the data: yak" in capsys.readouterr().err
    (only / "yak" / "0.png").write_bytes(b"broken")
    (only / "yak").rename(only / "cat")
    assert evaluate_script(monkeypatch, trained / "model", only, "--output_dir", tmp_path / "c") == 2
    assert "0.png" in capsys.readouterr().err


def test_mistakes_are_told_together(trained, tmp_path, monkeypatch, capsys):
    flags = ["--bootstrap_resamples", "-1", "--crops", "3", "--cropss", "2"]
    assert evaluate_script(monkeypatch, tmp_path, trained / "test", *flags) == 2
    told = capsys.readouterr().err
    for part in ("--bootstrap_resamples -1", "--crops", "Did you mean --crops?"):
        assert part in told
    assert evaluate_script(monkeypatch, "nowhere/x", trained / "test", "--output_dir", tmp_path / "o") == 2
    assert "MODEL nowhere/x can't be loaded" in capsys.readouterr().err


def test_this_script_does_not_hide_the_library_from_the_others(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate"]:
        monkeypatch.delitem(sys.modules, name)
    assert importlib.import_module("evaluate").Metric.__name__ == "Metric"


# ---------------------------------------------------------------------------------------------------------------------
# The temperature in the model


def test_logits_are_divided_outside_of_training_and_the_loss_never(config, pixel_values):
    model, labels = ViTScratchForImageClassification(config).eval(), torch.tensor([0, 2])
    torch.nn.init.normal_(model.classifier.weight)
    plain = model(pixel_values, labels=labels)
    config.temperature = 2.5
    divided = model(pixel_values, labels=labels)
    assert torch.equal(divided.logits, plain.logits / 2.5)
    assert torch.equal(divided.loss, plain.loss)
    assert torch.equal(model.train()(pixel_values).logits, plain.logits)
    config.calibrated = False
    assert torch.equal(model.eval()(pixel_values).logits, plain.logits)
    with pytest.raises(ValueError, match="temperature=0"):
        ViTScratchConfig(temperature=0)


def test_other_formats_have_it_in_the_classifier_and_a_new_classifier_has_none(config, pixel_values, tmp_path):
    config.temperature = 2.0
    model = ViTScratchForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight)
    save_checkpoint(model, tmp_path / "model.npz", "npz", exact=False)
    again = ViTScratchForImageClassification.from_pretrained(tmp_path / "model.npz", image_size=[16, 24])
    assert again.config.temperature == 1.0
    assert torch.equal(again.classifier.weight, model.classifier.weight / 2.0)
    model.save_pretrained(tmp_path / "folder")
    start = ModelArguments(model_name_or_path=str(tmp_path / "folder"))
    assert build_model(start, ["x", "y"], 3, seed=0)[0].config.temperature == 1.0
    kept = build_model(start, list(config.id2label.values()), 3, seed=0)[0]
    assert kept.config.temperature == 1.0
