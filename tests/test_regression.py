# SPDX-License-Identifier: Apache-2.0
"""Numbers in place of labels: what is read, learned, measured, predicted, and what is refused."""

import csv
import json

import numpy as np
import pytest
import torch
from forked import run_script
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from tiny_images import ROOT, build, image
from transformers import pipeline

from modeling_vit_scratch.common.errors import InputError


TARGETS = [20.5 + 3.25 * number for number in range(12)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of images with a table of numbers, in two formats, and a trainer that has learned them a little."""
    folder = tmp_path_factory.mktemp("regression")
    rows = [{"file_name": f"{number}.png", "age": target} for number, target in enumerate(TARGETS)]
    for number in range(len(rows)):
        image(number % 3, number).save(folder / f"{number}.png")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = [f"{row['file_name']},{row['age']}" for row in rows]
    (folder / "table.csv").write_text("\n".join(["file_name,age", *lines]))
    flags = ["--train_dir", str(folder), "--label_column_name", "age", "--train_val_split", "0.3", "--max_steps", "4"]
    trainer = build(folder / "model", *flags, "--save_strategy", "no", "--eval_strategy", "no")
    first = trainer.evaluate()
    trainer.train()
    trainer.save_model()
    return folder, trainer, first


def test_it_starts_at_the_mean_and_measures_as_scikit_learn(trained):
    _, trainer, first = trained
    held_out, train = trainer.eval_dataset.examples.labels, trainer.train_dataset.examples.labels
    assert sorted([*held_out, *train]) == TARGETS
    mean = np.full(len(held_out), np.mean(train))
    assert first["eval_rmse"] == pytest.approx(root_mean_squared_error(held_out, mean), rel=1e-5)
    assert first["eval_loss"] == pytest.approx(first["eval_rmse"] ** 2, rel=1e-4)
    values = trainer.predict(trainer.eval_dataset).predictions[:, 0]
    scores = trainer.evaluate()
    assert scores["eval_mae"] == pytest.approx(mean_absolute_error(held_out, values), rel=1e-4)
    assert scores["eval_r2"] == pytest.approx(r2_score(held_out, values), rel=1e-4)
    config = trainer.model.config
    assert (config.problem_type, config.id2label, trainer.args.metric_for_best_model) == (
        "regression", {0: "age"}, "loss"
    )  # fmt: skip


def test_all_commands_and_the_pipeline_give_the_same_number(trained, tmp_path):
    folder, _, _ = trained
    words = [folder / "model", folder / "table.csv"]
    run_script([ROOT / "scripts" / "predict.py", *words, "--output", "p.csv"], tmp_path)
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert list(rows[0]) == ["image", "prediction"]
    predicted = [float(row["prediction"]) for row in rows]
    more = ["--label_column_name", "age", "--split", "all", "--output_dir", "report"]
    printed = run_script([ROOT / "scripts" / "evaluate.py", *words, *more], tmp_path)[0]
    report = json.loads((tmp_path / "report" / "regression.json").read_text())["results"]
    found = {result["metric"]: result for result in report}
    assert found["rmse"]["value"] == pytest.approx(root_mean_squared_error(TARGETS, predicted), rel=1e-4)
    assert found["mae"]["interval"][0] < found["mae"]["value"] < found["mae"]["interval"][1]
    assert "R2" in printed
    answer = pipeline("image-classification", model=str(folder / "model"), trust_remote_code=True)
    (one,) = answer(str(folder / "3.png"))
    assert one["label"] == "age"
    assert one["score"] == pytest.approx(predicted[3], abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mixup", "0.2", "--balanced_sampling"], "--mixup --balanced_sampling: needs labels"),
        (["--class_weights", "balanced"], "--class_weights: needs labels"),
        (["--folds", "3"], "--folds is for labels, and these images have numbers"),
        (["--problem_type", "regression", "--label_column_name", "file_name"], "regression needs a finite number"),
    ],
)
def test_what_needs_labels_is_refused(trained, tmp_path, flags, message):
    start = ["--train_dir", str(trained[0]), "--label_column_name", "age", "--train_val_split", "0.3"]
    with pytest.raises(InputError, match=message):
        build(tmp_path, *start, *flags)


def test_numbers_of_a_csv_file_are_names_unless_a_flag_says_otherwise(trained, tmp_path):
    start = ["--train_dir", str(trained[0] / "table.csv"), "--label_column_name", "age", "--train_val_split", "0.3"]
    trainer = build(tmp_path, *start, "--problem_type", "regression")
    assert trainer.train_dataset[0]["labels"].dtype == torch.float32
    with pytest.raises(InputError, match="Classes with one image"):
        build(tmp_path, *start)
