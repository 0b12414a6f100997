# SPDX-License-Identifier: Apache-2.0
"""--folds: every image is held out once, by a model of its own; a run that ended early goes on."""

import csv
import json
import shutil
import statistics
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_images import CLASSES, class_folders, load_script

from modeling_vit_scratch.data.held_out import choose_folds
from startup.status import run_command_line


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), min_size=6, max_size=90), st.integers(2, 6))
def test_folds_are_disjoint_and_complete_and_cut_no_group(images, count):
    rows, groups = [[label] for label, _ in images], [group for _, group in images]
    ids = [f"{index:016x}" for index in range(len(images))]
    folds = choose_folds(rows, ids, count, 0, groups)
    assert len(folds) == count
    assert sorted(index for fold in folds for index in fold) == list(range(len(images)))
    for group in set(groups):
        assert sum(any(groups[index] == group for index in fold) for fold in folds) == 1
    alone = choose_folds(rows, ids, count, 0, None)
    for label in range(3):
        sizes = [sum(rows[index] == [label] for index in fold) for fold in alone]
        assert max(sizes) - min(sizes) <= 1


def test_the_command_trains_each_fold_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    def finetune(*flags):
        words = ["--train_dir", str(tmp_path / "pets"), "--variant", "test/4", "--max_steps", "2", "--folds", "3"]
        words += ["--output_dir", str(tmp_path / "out"), "--dataloader_num_workers", "0", "--report_to", "none",
                  "--save_strategy", "steps", "--save_steps", "1",
                  "--eval_strategy", "no", "--load_best_model_at_end", "False"]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["finetune.py", *words, *flags])
        return run_command_line(load_script("finetune").main)

    class_folders(tmp_path / "pets", each=5)
    assert finetune() == 0
    printed = capsys.readouterr().out
    assert "fold 2 of 3, 33.3 % of each class" in printed
    result = json.loads((tmp_path / "out" / "folds.json").read_text())
    assert sum(result["n"]) == 15
    assert result["mean"] == statistics.mean(result["values"])
    assert result["standard_deviation"] == statistics.stdev(result["values"])
    with open(tmp_path / "out" / "out_of_fold.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["image"] for row in rows}) == len(rows) == 15
    hits = [max(CLASSES, key=lambda name: float(row[name])) == row["label"] for row in rows]
    assert sum(hits) == pytest.approx(sum(n * value for n, value in zip(result["n"], result["values"])))
    assert all(f"/{row['label']}/" in row["image"] for row in rows)
    assert finetune() == 2
    assert "has folds of another run" in capsys.readouterr().err
    kept = (tmp_path / "out" / "fold1" / "model.safetensors").stat().st_mtime_ns
    before = (tmp_path / "out" / "out_of_fold.csv").read_bytes()
    # As a kill in the middle of fold 2 leaves it.
    for file in (tmp_path / "out" / "fold2").iterdir():
        if file.is_file():
            file.unlink()
    shutil.rmtree(tmp_path / "out" / "fold2" / "checkpoint-2")
    shutil.rmtree(tmp_path / "out" / "fold3")
    assert finetune("--resume_from_checkpoint", "True") == 0
    assert (tmp_path / "out" / "fold1" / "model.safetensors").stat().st_mtime_ns == kept
    assert (tmp_path / "out" / "out_of_fold.csv").read_bytes() == before
    records = [json.loads((tmp_path / "out" / f"fold{number}" / "results.json").read_text()) for number in (1, 2, 3)]
    assert [record["resumed_from"] for record in records] == [None, "checkpoint-1", None]
