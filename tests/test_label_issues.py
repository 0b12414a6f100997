# SPDX-License-Identifier: Apache-2.0
"""--label_issues: flipped labels are among the most doubtful; the figures are cleanlab's."""

import csv
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits
from tiny_images import CLASSES, build, class_folders, image, load_script

from evaluating.label_issues import label_quality, out_of_fold
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.evaluation.during_training import Features
from startup.status import run_command_line


cleanlab = pytest.importorskip("cleanlab")


def test_of_five_per_cent_flipped_digits_most_are_the_most_doubtful():
    digits, random = load_digits(), np.random.default_rng(0)
    labels, count = digits.target.copy(), round(0.05 * len(digits.target))
    flipped = random.choice(len(labels), count, replace=False)
    labels[flipped] = (labels[flipped] + random.integers(1, 10, count)) % 10
    probabilities = out_of_fold(Features(digits.data.astype(np.float32), labels))
    assert probabilities.sum(axis=1) == pytest.approx(1.0)
    scores, is_issue = label_quality(probabilities, labels)
    assert np.isin(np.argsort(scores)[:count], flipped).mean() >= 0.85
    theirs = cleanlab.filter.find_label_issues(labels, probabilities, return_indices_ranked_by="self_confidence")
    assert sorted(theirs.tolist()) == np.flatnonzero(is_issue).tolist()
    assert scores[theirs].tolist() == sorted(scores[is_issue].tolist())


def test_each_image_is_judged_by_a_classifier_that_has_not_seen_it():
    random = np.random.default_rng(0)  # features that tell nothing: only the image itself would give its label away
    features = Features(random.normal(size=(60, 200)).astype(np.float32), np.arange(60) % 2)
    assert (out_of_fold(features).argmax(axis=1) == features.labels).mean() < 0.75
    with pytest.raises(InputError, match="a class with one image"):
        out_of_fold(Features(features.values[:3], np.array([0, 0, 1])))


def test_the_command_writes_a_table_and_a_sheet(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    place = class_folders(tmp_path / "pets", each=8)
    build(tmp_path / "model", "--train_dir", str(place), "--max_steps", "1").save_model()
    image(2, 99).save(place / "cat" / "flipped.png")
    words = [
        "evaluate.py",
        str(tmp_path / "model"),
        str(place),
        "--label_issues",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", words)
    assert run_command_line(load_script("evaluate").main) == 0
    assert "labels are doubtful. Look at them: " in capsys.readouterr().out
    with open(tmp_path / "out" / "label_issues.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 25
    assert rows[0]["image"].endswith("cat/flipped.png")
    assert (rows[0]["label"], rows[0]["likely"]) == CLASSES[1:]
    qualities = [float(row["quality"]) for row in rows]
    assert qualities == sorted(qualities)
    assert (tmp_path / "out" / "label_issues.png").stat().st_size > 10_000
    assert run_command_line(load_script("evaluate").main) == 2  # it is there already
