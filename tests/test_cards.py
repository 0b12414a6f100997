# SPDX-License-Identifier: Apache-2.0
"""Model cards: their metadata survives huggingface_hub's reader, and no number is printed without a record."""

import configparser
import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from matplotlib.axes import Axes
from PIL import Image
from tiny_images import ROOT, load_script

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.cards.records import CardOptions, _license_of, read_records
from modeling_vit_scratch.cards.values import FILTERS, render, template_values
from modeling_vit_scratch.cards.writing import card_text, draw_curves, stored_options, template_text
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.common.records import digests
from modeling_vit_scratch.evaluation.metrics import confidences, confusion, per_class, score
from modeling_vit_scratch.evaluation.uncertainty import fit_thresholds
from modeling_vit_scratch.hub.contents import collect, prepare_card


NAMES = ["zero", "one", "two"]
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
    "model": {"num_parameters": 20451, "started_from": "scratch", "base_model": None},
    "training": {
        "epochs": 40.0, "steps": 960, "batch_size": 64, "optimizer": "adamw_torch_fused", "learning_rate": 0.001,
        "label_smoothing": 0.0, "weight_decay": 0.05,
    },
    "command": "python scripts/finetune.py",
    "git_commit": "0123456789abcdef",
    "versions": {"python": "3.12.1", "torch": "2.13.0"},
    "hardware": "CPU, 2 cores, a processor",
    "wall_time_seconds": 61.5,
}  # fmt: skip
HISTORY = [
    log
    for step in (10, 20, 30)
    for log in ({"step": step, "loss": 1 / step}, {"step": step, "eval_loss": 2 / step, "eval_accuracy": step / 100})
]


def values_and_labels(n=60):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, n)
    logits = generator.normal(size=(n, 3)) + 1.5 * np.eye(3)[labels]
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), labels


def report(folder, is_multi_label=False, **changes):
    """What scripts/evaluate.py leaves, with numbers from its own functions."""
    values, labels = values_and_labels()
    if is_multi_label:
        labels = np.eye(3, dtype=int)[labels]
    results, classes = score(values, labels, resamples=20), per_class(values, labels, NAMES)
    kind = "of_each_label_rows_true_columns_predicted" if is_multi_label else "rows_true_columns_predicted"
    matrix = {kind: confusion(values, labels).tolist()}
    confident, hits = confidences(values, labels)
    record = {
        "metric": results[0]["metric"], "value": results[0]["value"], "n": 60,
        "results": results, "confidence_level": 0.95, "bootstrap_resamples": 20, "seed": 3,
        "threshold": 0.5 if is_multi_label else None,
        "model": {"name": "pets", "num_parameters": 20451},
        "dataset": {
            "name": "other digits", "hub_id": "user/digits", "license": "cc0-1.0", "url": None, "note": None,
            "images": "the test split of the data", "broken_images": [], "seen_in_training": False,
        },
        "temperature": 1.0, "views": 1, "per_class": classes, "confusion_matrix": {"labels": NAMES, **matrix},
        "reliability": {"mean_confidence": float(confident.mean()), "mean_accuracy": float(hits.mean())},
        "throughput": {"images_per_second": 123.4, "note": "all of it"},
        "command": "python scripts/evaluate.py pets user/digits", "git_commit": None,
        "versions": {"python": "3.12.1"}, "hardware": "CPU, 2 cores, a processor",
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(changed(record, changes)))
    for name in ("confusion_matrix.png", "reliability.png"):
        Image.new("RGB", (3, 3)).save(folder / name)


def changed(record, changes):
    """The record with changes; of facts, those that are given change; None takes out."""
    record = copy.deepcopy(record)
    for key, value in changes.items():
        record[key] = {**record[key], **value} if key in ("dataset", "model") and value else value
    return {key: value for key, value in record.items() if key not in changes or changes[key] is not None}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A finished model without records."""
    folder = tmp_path_factory.mktemp("saved") / "pets"
    config = ViTScratchConfig.from_variant("test/4", id2label=dict(enumerate(NAMES)))
    ViTScratchForImageClassification(config).save_pretrained(folder)
    ViTScratchImageProcessor(size={"height": 16, "width": 24}).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    """A copy of it, where the working directory is: "pets"."""
    for file in saved.iterdir():
        (tmp_path / "pets").mkdir(exist_ok=True)
        (tmp_path / "pets" / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path / "pets"


def train(folder, **changes):
    (folder / "results.json").write_text(json.dumps(changed(RECORD, changes)))


def configure(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def write(*flags):
    load_script("card").main(["pets", *map(str, flags)])
    return ModelCard.load("pets/README.md")


def refused(*flags):
    with pytest.raises(InputError) as caught:
        write(*flags)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Metadata


def test_metadata_is_what_the_hub_reads(folder):
    train(folder)
    report(folder / "evaluation" / "digits")
    write("--license", "apache-2.0", "--base_model", "user/vit", "--hub_model_id", "me/vit-pets")
    data = metadata_load(folder / "README.md")
    expected = {
        "license": "apache-2.0", "library_name": "transformers", "pipeline_tag": "image-classification",
        "base_model": "user/vit", "tags": ["vision", "vit", "custom_code"],
        "metrics": ["accuracy", "brier_score", "f1"],
    }  # fmt: skip
    assert {key: data[key] for key in expected} == expected
    assert set(data) == {*expected, "model-index"}
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "vit-pets"
    evaluated = [result for result in results if result.dataset_type == "user/digits"]
    record = json.loads((folder / "evaluation" / "digits" / "results.json").read_text())
    theirs = {one["metric"]: one for one in record["results"]}
    assert {result.metric_type for result in evaluated} == {
        "accuracy", "nll", "brier_score", "f1", "expected_calibration_error",
    }  # fmt: skip
    for result in evaluated:
        ours = {"f1": "macro_f1", "brier_score": "brier", "expected_calibration_error": "ece"}
        one = theirs[ours.get(result.metric_type, result.metric_type)]
        interval = one.get("wilson_interval") or one["interval"]
        assert result.metric_value == round(one["value"], 4)
        assert result.metric_args["confidence_interval"] == [round(bound, 4) for bound in interval]
        assert (result.metric_args["n"], result.metric_args["confidence_level"]) == (60, 0.95)
        assert (result.task_type, result.dataset_split) == ("image-classification", "test")
    # Of other images than the evaluation's, the result of the training is listed too.
    held_out = [result for result in results if result.dataset_type == "digits-of-scikit-learn"]
    assert {result.metric_type: result.metric_value for result in held_out} == {
        "accuracy": 0.9877, "top5_accuracy": 1.0, "f1": 0.95,
    }  # fmt: skip
    assert held_out[0].metric_name == "Accuracy (n = 270)"


def test_a_card_survives_loading_and_saving(folder, tmp_path):
    train(folder)
    report(folder / "evaluation" / "digits")
    loaded = write()
    loaded.save(tmp_path / "b.md")
    assert (tmp_path / "b.md").read_text().strip() == (folder / "README.md").read_text().strip()
    assert loaded.data.to_dict() == metadata_load(tmp_path / "b.md")


def test_the_data_of_the_hub_are_linked_and_unknown_licences_left_out(folder):
    train(folder, dataset={"hub_id": "user/pets", "license": "See our site!"})
    data = write().data
    assert (data.datasets, data.license, data.get("base_model")) == (["user/pets"], None, None)
    assert data.eval_results[0].dataset_type == "user/pets"


def test_results_on_images_that_it_was_trained_on_are_no_results(folder):
    train(folder)
    report(folder / "evaluation" / "digits", dataset={"seen_in_training": True})
    card = write()
    assert {result.dataset_name for result in card.data.eval_results} == {"digits of scikit-learn"}
    assert "Accuracy on 270 held-out images: **98.77 %**" in card.text
    assert "The model was trained on some or all of these images" in card.text


# ---------------------------------------------------------------------------------------------------------------------
# No number without a record


@pytest.mark.parametrize("key", ["value", "n", "metrics", "selection", "seed", "dataset", "command", "versions"])
def test_no_card_without_the_record_of_the_training(folder, key):
    train(folder, **{key: None})
    assert f"No card without a record: results.json lacks {key}" in refused()
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize("key", ["results", "n", "per_class", "reliability", "temperature", "confidence_level"])
def test_no_card_without_the_record_of_an_evaluation(folder, key):
    train(folder)
    report(folder / "evaluation" / "digits", **{key: None})
    assert f"evaluation/digits/results.json lacks {key}" in refused()


def test_a_number_goes_with_its_record(folder):
    train(folder)
    report(folder / "evaluation" / "digits")
    record = json.loads((folder / "evaluation" / "digits" / "results.json").read_text())
    brier = next(one for one in record["results"] if one["metric"] == "brier")
    assert f"| Brier score | {brier['value']:.4f} |" in write().text
    record["results"].remove(brier)
    (folder / "evaluation" / "digits" / "results.json").write_text(json.dumps(record))
    assert "| Brier score |" not in write().text
    (folder / "evaluation" / "digits" / "results.json").unlink()
    text = write().text
    assert "other digits" not in text
    assert "| Accuracy | 98.77 % |" in text
    (folder / "results.json").unlink()
    assert "has neither results.json of a training nor an evaluation" in refused()


def test_every_number_that_people_read_is_one_of_a_record(folder):
    """Each number of the evaluation is changed, and must change in the card: none is made up or of another record."""
    train(folder)
    report(folder / "evaluation" / "digits")
    before = write().text
    record = json.loads((folder / "evaluation" / "digits" / "results.json").read_text())
    for one in record["results"]:
        one["value"] /= 2
        one["interval"] = [0.123, 0.456]
        one.pop("wilson_interval", None)
    for row in record["per_class"]:
        row.update(precision=0.11, recall=0.22, f1=0.33, n=row["n"] + 1)
    (folder / "evaluation" / "digits" / "results.json").write_text(json.dumps(record))
    after = write().text
    section = re.compile(r"### On .*?\n## Limits", re.DOTALL)
    old, new = (set(re.findall(r"\d+\.\d+", section.search(text)[0])) for text in (before, after))
    assert old & new <= {"0.0000"}
    assert after.count("| 11.00 % | 22.00 % | 33.00 % |") == 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"confusion_matrix": {"labels": ["a", "b", "c"]}}, "one with other labels"),
        ({"model": {"num_parameters": 5}}, "one with 5 parameters, and this one has 20,451"),
        ({"model": {"weights": {"model.safetensors": "0" * 64}}}, "of other weights"),
    ],
)
def test_the_report_of_another_model_is_refused(folder, changes, told):
    train(folder)
    report(folder / "evaluation" / "digits", **changes)
    assert told in refused()


def test_the_report_of_other_weights_is_not_published(folder):
    train(folder)
    write()
    publish = load_script("publish").main
    publish(["pets", "me/pets"])  # a dry run
    report(folder / "evaluation" / "digits", model={"weights": digests(folder)})
    publish(["pets", "me/pets"])
    report(folder / "evaluation" / "old", model={"weights": {"model.safetensors": "0" * 64}})
    with pytest.raises(InputError, match=r"^evaluation/old/results\.json is of other weights than those in pets\."):
        publish(["pets", "me/pets"])


def test_the_report_of_these_weights_is_taken(folder):
    train(folder)
    report(folder / "evaluation" / "digits", model={"weights": digests(folder)})
    assert "### On other digits" in write().text


def test_what_is_no_record_is_refused(folder):
    (folder / "results.json").write_text("[1")
    assert "results.json can't be read" in refused()
    (folder / "results.json").write_text("[1]")
    assert "is no record" in refused()
    (folder / "config.json").unlink()
    assert "has no config.json" in refused()


# ---------------------------------------------------------------------------------------------------------------------
# What people read


def test_what_people_read_of_the_training(folder):
    train(folder)
    text = write().text
    for part in (
        "# pets", "3 classes: zero, one, two", "trained from scratch", "| Accuracy | 98.77 % |",
        "on 270 held-out images", "| seed | 7 |", "The weights are those of the last step.",
        "1,527 training images and 270 held-out images", "A note on the data.",
        "cc-by-4.0 (that of the data it was trained on)",
        "python scripts/finetune.py", "62 s on CPU, 2 cores", "commit 0123456789abcdef", "torch 2.13.0",
        "| learning rate | 0.001 |", "| input | 16 x 24 pixels, RGB |", 'model="pets"', "| parameters | 20,451 |",
        "| resizing | to 16 x 24 (bilinear) |",
    ):  # fmt: skip
        assert part in text, part
    assert "label smoothing" not in text  # there was none


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
         "to shortest edge 256 (bilinear) |\n| centre crop | 224 x 224 |\n| pixel values | 0 to 1, minus 0.5, divided"),
        ({"size": {"height": 16, "width": 24}, "crop_pct": 0.9, "resample": 3, "do_normalize": False},
         "16 x 24 (bicubic), after a centre crop of 0.9 of the shorter side |\n| pixel values | 0 to 1 |"),
        ({"size": {"height": 16, "width": 24}, "image_mean": [0.1, 0.2, 0.3]}, "minus 0.1, 0.2, 0.3, divided by 0.5 |"),
    ],
)  # fmt: skip
def test_how_images_are_prepared(folder, settings, told):
    train(folder)
    ViTScratchImageProcessor(**settings).save_pretrained(folder)
    assert told in write().text


def test_a_card_has_no_gaps(folder):
    for changes in ({}, {"git_commit": None, "dataset": {"license": None, "url": None, "note": None}}):
        train(folder, **changes)
        report(folder / "evaluation" / f"digits{len(changes)}")
        text = (write() and folder / "README.md").read_text()
        assert not re.search(
            r"more information|\bTODO\b|\bNone\b|\bnull\b|\{\w*\}|\[\]|\bnan\b", text.split("```bibtex")[0], re.I
        )
        assert not re.search(r"\n#+ [^\n]*\n+#", re.sub(r"## Evaluation\n", "", text)), "an empty section"


def test_the_example_of_use_is_three_lines_that_run(folder, monkeypatch):
    train(folder)
    configure(folder, temperature=1.5)
    text = write().text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len(code.splitlines()) == 3
    Image.new("RGB", (30, 20), "red").save("photo.jpg")
    exec(code, {"print": (printed := []).append})
    assert {answer["label"] for answer in printed[0]} == set(NAMES)
    assert "`trust_remote_code=True`" in text
    assert "a temperature of 1.5" in text


def test_limits_are_those_of_the_record(folder):
    train(folder, selection="the checkpoint with the best accuracy on these same images (step 5)")
    report(folder / "evaluation" / "digits", dataset={"broken_images": ["a.jpg", "b.jpg"]}, temperature=2.0)
    values, labels = values_and_labels()
    limits = write().text.split("## Limits")[1].split("## Terms")[0]
    matrix = confusion(values, labels)
    np.fill_diagonal(matrix, 0)
    row, column = np.unravel_index(matrix.argmax(), matrix.shape)
    for part in (
        "always answers with one of its classes", "16 x 24 pixels", "one run with one seed (7)",
        "chosen by their score on the 270 held-out images", "2 images could not be read and were not counted",
        "on only 60 images",
        f"{NAMES[row]} taken for {NAMES[column]} ({matrix[row, column]} of {(labels == row).sum()})",
        "with a temperature of 2. The model has 1,",
    ):  # fmt: skip
        assert part in limits, part
    assert "confident" not in limits  # the difference is within the interval of the accuracy
    for confidence, verdict in ((0.97, "overconfident"), (0.41, "underconfident")):
        shutil.rmtree(folder / "evaluation")
        accuracy = (values.argmax(1) == labels).mean()
        means = {"mean_confidence": confidence, "mean_accuracy": float(accuracy)}
        report(folder / "evaluation" / "digits", reliability=means)
        told = f"its mean confidence is {100 * confidence:.2f} %, its accuracy {100 * accuracy:.2f} %"
        assert f"it is {verdict}: {told}" in write().text
    train(folder)
    (folder / "evaluation" / "digits" / "results.json").unlink()
    limits = write().text.split("## Limits")[1].split("## Terms")[0]
    assert len(re.findall("^- ", limits, re.M)) == 4


def test_sets_and_the_score_to_answer_from_are_those_of_the_record(folder):
    train(folder)
    values, labels = values_and_labels()
    fitted = fit_thresholds(values, labels, np.arange(20), np.arange(20, 60), 0.9, 0.5)
    report(folder / "evaluation" / "digits", uncertainty=fitted)
    text = write().text
    assert f"a coverage of 90.00 %: on 20 other images it was {100 * fitted['measured_coverage']:.2f} %" in text
    assert f"a score of at least {fitted['score_threshold']:g} have an accuracy of 50.00 % or more" in text
    shutil.rmtree(folder / "evaluation")
    report(folder / "evaluation" / "digits", uncertainty={**fitted, "score_threshold": None, "share_kept": None})
    assert "40 images did not show a score from which the accuracy is 50.00 %." in write().text
    shutil.rmtree(folder / "evaluation")
    report(folder / "evaluation" / "digits")
    assert "coverage" not in write().text


def test_several_labels(folder):
    configure(folder, problem_type="multi_label_classification")
    train(folder, metric="mean_average_precision", metrics={"mean_average_precision": 0.98765432, "micro_f1": 0.9})
    report(folder / "evaluation" / "digits", is_multi_label=True)
    card = write()
    for part in (
        "which of 3 labels an image has", "the scores don't sum to 1", "Mean average precision on 60 images",
        "| label | average precision | precision | recall | F1 | images |", "if its probability is at least 0.5",
    ):  # fmt: skip
        assert part in card.text, part
    assert "always answers" not in card.text
    averages = {r.metric_args.get("average") for r in card.data.eval_results if r.metric_type == "f1"}
    assert averages == {"micro", "macro", "samples"}
    assert "multi-label-classification" in card.data.tags


def test_an_encoder(folder):
    train(
        folder, metric="loss", value=0.5, metrics={"loss": 0.5, "probe_knn_accuracy": 0.75},
        pretraining={"objective": "mae", "description": "75 % of patches hidden"},
        training={**RECORD["training"], "loss": "softmax"},
    )  # fmt: skip
    card = write()
    for part in ("75 % of patches hidden", "knn accuracy 75.00 %", "| Loss | 0.5000 |", "he2022masked", "pool=True"):
        assert part in card.text, part
    for part in ("evaluate.py", "| loss |"):  # it has no classifier to evaluate, and its loss is not that of classes
        assert part not in card.text, part
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert card.data.eval_results is None


def test_a_model_from_elsewhere_has_a_card_of_its_evaluation(folder):
    report(folder / "evaluation" / "digits")
    card = write("--license", "mit")
    assert "There is no record of its training." in card.text
    assert "## Training" not in card.text
    assert "co2_eq_emissions" not in card.data
    assert "| parameters | 20,451 |" in card.text


def test_an_evaluation_without_bootstrap_or_with_a_score_that_is_not_defined(folder):
    train(folder)
    report(folder / "evaluation" / "digits", bootstrap_resamples=0)
    file = folder / "evaluation" / "digits" / "results.json"
    record = json.loads(file.read_text())
    for one in record["results"]:
        one["interval"] = None
        one["value"] = float("nan") if one["metric"] == "nll" else one["value"]
    file.write_text(json.dumps(record))
    card = write()
    assert "Intervals are Wilson's for accuracies and exact match. The other metrics have none" in card.text
    assert "nan" not in str(card).lower()
    assert re.search(r"\| Brier score \| [\d.]+ \|  \| 60 \|", card.text)
    assert "confidence_interval" not in next(r for r in card.data.eval_results if r.metric_type == "f1").metric_args


def test_many_classes_are_not_all_listed(folder):
    labels = [f"class {i}" for i in range(50)]
    configure(folder, id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)})
    train(folder)
    rows = [{"label": n, "precision": 0.5, "recall": 0.5, "f1": i / 50, "n": i} for i, n in enumerate(labels)]
    matrix = np.diag(range(50)).tolist()
    report(
        folder / "evaluation" / "digits", per_class=rows,
        confusion_matrix={"labels": labels, "rows_true_columns_predicted": matrix},
    )  # fmt: skip
    text = write().text
    assert "class 9 and 40 more" in text
    assert "The 10 of 49 classes with the lowest F1" in text
    assert "| class 10 |" in text
    assert "| class 11 |" not in text
    assert "there were no images of: class 0." in text
    assert "there were fewer than 10 images of: class 1, " in text


def test_names_do_nothing_to_the_page(folder):
    labels = ["a|b", "<script>alert(1)</script>", "x*y_z`q`\n# no"]
    configure(folder, id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)})
    train(folder, dataset={"name": "pets | <b>", "url": None})
    report(
        folder / "evaluation" / "digits",
        confusion_matrix={"labels": labels, "rows_true_columns_predicted": np.eye(3, dtype=int).tolist()},
    )
    text = write().text
    assert "<script>" not in text.replace("\\<script", "")
    assert r"a\|b" in text
    assert "\n# no" not in text


# ---------------------------------------------------------------------------------------------------------------------
# The template


def test_the_template_has_all_sections_and_no_numbers_of_its_own():
    text = template_text()
    card = text[text.index("# {{ name }}") : text.index("```bibtex")]
    prose = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", "", card, flags=re.DOTALL)
    # Channels, indices, digits, and the largest value of a pixel.
    code = " ".join(re.findall(r"\{\{.*?\}\}|\{%.*?%\}", card, flags=re.DOTALL))
    assert set(re.findall(r"(?<![\w.])\d+", code)) <= {"0", "1", "3", "255"}
    # top_k; F1; the width of figures; the paper's figures; scores that don't sum to 1; pixel values from 0; CO2; Apache
    assert set(re.findall(r"\d+", prose)) <= {"3", "1", "49", "6", "7", "0", "2"}
    for section in ("Use", "Architecture", "Training data", "Training", "Evaluation", "Transfer", "Limits"):
        assert f"\n## {section}\n" in card
    assert "\n## Environmental impact\n" in card


def test_the_template_is_shown_and_help_lists_its_names(folder, capsys):
    load_script("card").main(["--template"])
    assert capsys.readouterr().out == template_text()
    train(folder)
    report(folder / "evaluation" / "digits")
    names = set(template_values(read_records(folder, CardOptions()))) | set(FILTERS)
    told = load_script("card").build_parser().format_help()
    assert {name for name in names if not re.search(rf"\b{name}\b", told.split("names that a template")[1])} == set()
    # What is computed is listed too, beside the keys of the records.
    values = template_values(read_records(folder, CardOptions()))
    record = json.loads((folder / "evaluation" / "digits" / "results.json").read_text())
    computed = {*values["evaluations"][0]} - {*record} | {*values["training"]} - {*RECORD}
    computed -= {
        "resumed_from",
        "pretraining",
        "threshold",
        "throughput",
        "examples",
        "training",
        "git_commit",
        "uncertainty",
    }  # of other records
    assert {name for name in computed if not re.search(rf"\b{name}\b", told)} == set()


def test_the_templates_are_part_of_the_package():
    """Every file of the package that is no code is named in setup.cfg, or an installed package would lack it."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    data = {
        path
        for package, patterns in setup["options.package_data"].items()
        for pattern in patterns.split()
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    files = {path for path in (ROOT / "modeling_vit_scratch").rglob("*") if path.is_file()}
    assert {path for path in files - data if path.suffix not in (".py", ".pyc")} == set()
    assert {path.name for path in data} >= {"template.md", "transfer.md"}


def test_a_template_of_ones_own_changes_one_section_and_stays(folder, tmp_path):
    train(folder)
    mine = tmp_path / "mine.md"
    mine.write_text(
        '{% extends "template.md" %}\n{% block limits %}\n{{ super() }}\n'
        "- Photographed in one street, see {{ training.dataset.name }}.\n{% endblock %}\n"
    )
    load_script("card").main(["pets", "--template", str(mine), "--dry_run"])
    assert not (folder / "card_template.md").exists()
    text = write("--template", mine).text
    assert "another seed gives other numbers.\n" in text.lower()
    assert "\n- Photographed in one street, see digits of scikit-learn.\n\n## Terms" in text
    assert "Photographed" in write("--license", "mit").text
    assert "card_template.md" not in {upload.path for upload in collect(folder)[0]}
    (folder / "card_template.md").unlink()
    assert "Photographed" not in write().text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("# {{ name }}\n{{ trainig.seed }}", r"mine\.md, line 2: 'trainig' is undefined"),
        ("{% if trainig %}{% endif %}", r"mine\.md, line 1: 'trainig' is undefined"),
        ("{{ training.sed }}", r"mine\.md, line 1: .* has no attribute 'sed'"),
        (
            "\n\n{{ training.dataset.hub_id }}",
            r"mine\.md, line 3: the records of this model have no hub_id\. Put a cond",
        ),
        ("{{ transfer.model }}", r"mine\.md, line 1: the records of this model have no transfer"),
        ("{{ training.dataset.hub_id | number }}", r"mine\.md, line 1: the records of this model have no hub_id"),
        ("{% for row in emissions %}{% endfor %}", r"mine\.md, line 1: the records of this model have no emissions"),
        ("{{ name | percent }}", r"mine\.md, line 1: "),
        ("ok\n{% if %}", r"mine\.md, line 2: Expected an expression"),
        ("{{ name | shout }}", r"mine\.md, line 1: No filter named 'shout'"),
        ('{% extends "temlate.md" %}', r"temlate\.md"),
        ("---\na: [\n---\n", r"mine\.md: the Hub would not take the metadata"),
        ("---\nmodel-index: 7\n---\n", r"mine\.md: the Hub would not take the metadata"),
        ("{{ name.__class__.__mro__ }}", r"mine\.md, line 1: access to attribute '__class__' .* is unsafe"),
    ],
)
def test_mistakes_in_a_template_are_told_with_their_line(folder, tmp_path, text, told):
    train(folder)
    (tmp_path / "mine.md").write_text(text)
    assert re.search(told, refused("--template", tmp_path / "mine.md"))
    assert not (folder / "README.md").exists()
    assert not (folder / "card_template.md").exists()


def test_a_template_that_is_not_there(folder):
    train(folder)
    assert "--template nothing.md is no file" in refused("--template", "nothing.md")


def test_text_from_records_is_escaped_in_every_template():
    text = render(
        {"labels": ["a|b", "<i>"], "none": None},
        "mine",
        "{{ labels[0] }} {{ labels | names }}{% if none %}x{% endif %}",
    )
    assert text == "a\\|b a\\|b, \\<i\\>\n"


def test_commands_of_earlier_runs_stay_in_their_fence(folder):
    run = {
        "data": "x", "started_from": "scratch", "metric": "loss", "value": 0.5, "n": 3, "seed": 1, "hardware": "CPU",
        "training": {"<b>": 3}, "wall_time_seconds": 2.0, "versions": {}, "command": "a\n```\n# Owned\n````\nb",
    }  # fmt: skip
    train(folder, earlier=[run])
    text = write().text
    assert "\n`````bash\na\n```\n# Owned\n````\nb\n`````\n" in text
    assert "a run without labels on x from random weights reached loss 0.5000 on 3 images" in text
    assert "\\<b\\> 3" in text
    assert "<b>" not in text.replace("\\<b\\>", "")


def test_the_finished_card_is_what_the_code_writes_of_its_records(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "model_cards" / "digits", tmp_path / "outputs" / "demo" / "digits")
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs", "demo", "digits")
    options = stored_options(folder)
    assert options is not None, "changed by hand"
    told = "copy it to outputs/demo/digits, run scripts/card.py outputs/demo/digits, and copy README.md back"
    assert card_text(read_records(folder, CardOptions().over(options))) == (folder / "README.md").read_text(), told
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 400_000
    assert {upload.path for upload in collect(folder)[0] if not upload.path.endswith(".py")} == {
        file.relative_to(folder).as_posix() for file in files
    }
    assert prepare_card(folder, None, "me/digits", (None,) * 3)[1] == []
    assert not re.search(r"-dirty|/tmp/|/home/", (folder / "README.md").read_text())


def transfer_table(place, **changes):
    """What scripts/transfer.py leaves, for one data set."""
    cells = [
        {
            "data": "pets", "start": start, "how": "fine-tuned", "metric": "accuracy", "mean": mean, "std": 0.012,
            "n": 3, "num_training_images": 1527, "num_held_out_images": 270, "learning_rate": 0.001, "hardware": "GPU",
            "versions": {"torch": "2", "transformers": "5"}, "command": f"python scripts/finetune.py --{start}",
        }
        for start, mean in (("scratch", 0.75), ("pretrained", 0.9))
    ]  # fmt: skip
    place.mkdir(parents=True, exist_ok=True)
    record = {"model": "pets", "weights": {}, "notes": {"pets": "Two kinds"}, "cells": cells, **changes}
    (place / "transfer.json").write_text(json.dumps(record))
    Image.new("RGB", (3, 3)).save(place / "transfer.png")


def test_a_transfer_table_is_taken_into_the_card_and_published(folder, tmp_path):
    train(folder)
    transfer_table(tmp_path / "table")
    (tmp_path / "table" / "runs").mkdir()
    text = write("--transfer", "table").text
    assert "| pets | 1,527, 270 | 75.0 ± 1.2 % | 90.0 ± 1.2 % | +15.0 |" in text
    assert "python scripts/finetune.py --scratch\npython scripts/finetune.py --pretrained\n" in text
    assert "(transfer/transfer.png)" in text
    assert "## Transfer" in write("--license", "mit").text  # it stays
    uploads = {upload.path for upload in collect(folder)[0]}
    assert {"transfer/transfer.json", "transfer/transfer.png"} <= uploads
    transfer_table(tmp_path / "table", weights={"model.safetensors": "0" * 64})
    assert "is of other weights than those in pets" in refused("--transfer", "table")
    transfer_table(tmp_path / "table", cells=[])
    assert "has no cells of a transfer table" in refused("--transfer", "table")
    assert "can't be read" in refused("--transfer", "nowhere")


# ---------------------------------------------------------------------------------------------------------------------
# Figures, earlier runs and emissions


def test_the_figures_of_what_is_inside_are_shown_with_their_credit(folder):
    train(folder)
    assert "## What is inside" not in write().text
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / "sheet.png").write_bytes(b"")
    assert "![Filters, position embeddings and attention](figures/sheet.png)" in write().text
    (folder / "figures" / "sheet.txt").write_text("Photo:\nsomebody.")
    assert "`python scripts/visualize.py sheet`.\nPhoto: somebody." in write().text


def test_earlier_runs_are_listed(folder):
    settings = {**RECORD["training"], "epochs": 7.0, "mixing": "Mixup 0.8"}
    names = ("metric", "n", "seed", "versions", "hardware")
    run = {name: RECORD[name] for name in names} | {
        "data": RECORD["dataset"]["name"],
        "started_from": "scratch",
        "training": settings,
    }
    run |= {"value": 0.5, "wall_time_seconds": 1000.0, "command": "python scripts/pretrain.py --before"}
    other = {**run, "started_from": "first", "hardware": "1 x NVIDIA H200", "command": "python scripts/second.py"}
    train(folder, model={**RECORD["model"], "started_from": "second"}, earlier=[run, other])
    text = write().text
    assert "trained from scratch, in 3 runs, on [digits of scikit-learn]" in text
    assert (
        text.index("scripts/finetune.py") < text.index("scripts/second.py") < text.index("scripts/pretrain.py --before")
    )
    assert "from random weights reached accuracy 50.00 % on 270 images (seed 7, 1,000 s on CPU" in text
    assert text.count("run after it: epochs 7, mixing Mixup 0.8.") == 1  # the first run's are those of the second


def test_the_emissions_are_those_that_codecarbon_reports(folder):
    train(folder)
    assert "co2_eq_emissions" not in write().data
    rows = [
        "duration,emissions,energy_consumed,country_name,codecarbon_version",
        "900.0,9.9,9.9,Norway,3.3.2",
        "62.25,0.00125,0.0025,Norway,3.3.2",
    ]
    (folder / "emissions.csv").write_text("\n".join(rows))
    card = write()
    assert card.data.co2_eq_emissions == {
        "emissions": 1.25, "source": "codecarbon 3.3.2", "training_type": "pre-training",
        "hardware_used": RECORD["hardware"], "geographical_location": "Norway",
    }  # fmt: skip
    told = "codecarbon 3.3.2 reports 0.0025 kWh of electricity and 1.25 g of CO2 equivalent for this training"
    assert f"{told}, with the electricity of Norway." in card.text
    assert "emissions.csv" not in {upload.path for upload in collect(folder)[0]}
    (folder / "emissions.csv").write_text("\n".join(rows[:2]))  # of another run, which took 900 s
    assert "codecarbon" not in write().text
    (folder / "emissions.csv").write_text("duration\nlong")
    assert "emissions.csv can't be read" in refused()


def test_the_learning_curve_ends_with_the_last_step_and_not_with_the_best_checkpoint(tmp_path, monkeypatch):
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda *args, **more: (drawn.append((more["label"], args[1:])), plot(*args, **more))
    )
    end = [{"step": 30, "train_runtime": 9.0}, {"step": 30, "eval_loss": 0.01, "eval_accuracy": 0.99}]
    draw_curves([*HISTORY, *end], tmp_path / "curves.png")
    curves = {label: list(zip(*args[:2])) for label, args in drawn}
    assert curves["Accuracy"] == [(10, 0.1), (20, 0.2), (30, 0.3)]
    assert curves["held-out images"] == [(10, 0.2), (20, 0.1), (30, 2 / 30)]


def test_the_time_of_a_resumed_run_is_that_of_its_last_part(folder):
    train(folder, resumed_from="checkpoint-480")
    text = write().text
    assert "62 s (the part after checkpoint-480) on CPU" in text


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_what_a_person_adds_stays_and_what_a_person_writes_is_not_written_over(folder):
    train(folder)
    write("--license", "mit", "--base_model", "user/vit")
    again = write("--hub_model_id", "me/pets")
    assert again.data.license == "mit"
    assert again.data.base_model == "user/vit"
    assert 'model="me/pets"' in again.text
    file = folder / "README.md"
    file.write_text(file.read_text().replace("A Vision Transformer", "My model"))
    assert "was written or changed by hand" in refused()
    assert "My model" in file.read_text()
    assert "My model" not in write("--overwrite").text
    for flags in (("--license", "My own!"), ("--base_model", "vit"), ("--license", "other")):
        assert flags[1] in refused(*flags)


def test_a_licence_that_is_other_has_a_name_and_a_link(folder):
    train(folder)
    card = write("--license", "other", "--license_name", "pets-terms", "--license_link", "https://example.org/terms")
    data = (card.data.license, card.data.license_name, card.data.license_link)
    assert data == ("other", "pets-terms", "https://example.org/terms")
    assert "The model: [pets-terms](https://example.org/terms)." in card.text
    assert prepare_card(folder, "ViTScratchForImageClassification", "me/pets", (None,) * 3)[1] == []
    train(folder, dataset={"license": "other"})
    (folder / "README.md").unlink()
    assert write().data.license is None


def test_a_licence_follows_the_weights(folder, tmp_path, capsys):
    terms = {"license": "other", "license_name": "pets-terms", "license_link": "https://example.org/terms"}
    lines = "\n".join(f"{name}: {value}" for name, value in terms.items())
    (tmp_path / "README.md").write_text(f"---\n{lines}\n---\n# pets\n")
    assert _license_of(tmp_path / "README.md") == terms
    (tmp_path / "README.md").unlink()
    assert _license_of(tmp_path / "README.md") is None

    train(folder, model={"license": terms})
    card = write()
    assert {name: card.data.get(name) for name in terms} == terms
    assert "The weights that it started from, scratch: [pets-terms](https://example.org/terms)." in card.text
    assert capsys.readouterr().err == ""
    assert write("--license", "apache-2.0").data.license == "apache-2.0"
    assert "under pets-terms, which restricts" in capsys.readouterr().err
    (folder / "README.md").unlink()
    train(folder, model={"license": {"license": "apache-2.0"}})
    assert write().data.license == "cc-by-4.0"  # the data's
    train(folder, model={"license": {"license": "cc-by-nc-4.0"}})
    assert write().data.license == "cc-by-nc-4.0"


def test_a_dry_run_writes_nothing(folder, tmp_path, capsys):
    train(folder)
    report(tmp_path / "elsewhere")
    before = sorted(folder.rglob("*"))
    load_script("card").main(["pets", "--dry_run", "--evaluation", "elsewhere"])
    shown = capsys.readouterr().out
    assert "### On other digits" in shown
    assert 'src="evaluation/elsewhere/reliability.png"' in shown
    assert sorted(folder.rglob("*")) == before


def test_reports_from_elsewhere_are_copied_and_the_folder_can_be_published(folder, tmp_path):
    train(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    report(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "predictions.csv").write_text("image,label\n")
    write("--evaluation", tmp_path / "elsewhere")
    pictures = {"evaluation/elsewhere/confusion_matrix.png", "evaluation/elsewhere/reliability.png"}
    pictures |= {"figures/learning_curves.png"}
    uploads = {upload.path for upload in collect(folder)[0]}
    assert pictures | {"evaluation/elsewhere/results.json", "README.md"} <= uploads
    assert not (folder / "evaluation" / "elsewhere" / "predictions.csv").exists()
    card, lines = prepare_card(folder, "ViTScratchForImageClassification", "me/pets", (None,) * 3)
    assert lines == []
    assert b'model="me/pets"' in card.content
    assert set(re.findall(r'(?:\]\(|src=")([\w/]+\.png)', card.text())) == pictures
    (folder / "evaluation" / "elsewhere" / "reliability.png").unlink()
    lines = prepare_card(folder, "ViTScratchForImageClassification", "me/pets", (None,) * 3)[1]
    assert lines == [f"README.md shows evaluation/elsewhere/reliability.png, which is not in {folder}."]
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "results.json").write_text((folder / "results.json").read_text())
    assert "evaluation/training/results.json lacks results" in refused("--evaluation", tmp_path / "training")
    report(tmp_path / "more" / "elsewhere", seed=4)
    assert "has another report in it" in refused("--evaluation", tmp_path / "more" / "elsewhere")
    assert "has no results.json" in refused("--evaluation", tmp_path / "nowhere")
