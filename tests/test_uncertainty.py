# SPDX-License-Identifier: Apache-2.0
"""Sets of labels, a score to answer from, and novelty: what they promise is true, in files as in numbers."""

import csv
import itertools
import json
import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch
from scipy.stats import betabinom, binom
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from tiny_images import build, class_folders, load_script

from modeling_vit_scratch import ViTScratchConfig
from modeling_vit_scratch.evaluation.metrics import probabilities
from modeling_vit_scratch.evaluation.report import calibration_split, fit_temperature
from modeling_vit_scratch.evaluation.uncertainty import fit_novelty, fit_thresholds, score_threshold, set_threshold
from modeling_vit_scratch.hub.contents import collect
from startup.status import run_command_line


@pytest.fixture(scope="module")
def digits():
    """Digits in random order, and the logits of a classifier that 100 of them were enough for; those 100 first."""
    data, order = load_digits(), np.random.default_rng(0).permutation(1797)
    values, labels = data.data[order], data.target[order]
    model = LogisticRegression(C=0.001, max_iter=1000).fit(values[:100], labels[:100])
    return values, labels, model.decision_function(values)


# mapie 1.6.0: SplitConformalClassifier(conformity_score="lac"), its quantile of 400 scores and the sizes of 1,297 sets.
@pytest.mark.parametrize(
    ("coverage", "quantile", "size"),
    [(0.8, 0.74395122, 0.9159599), (0.9, 0.83047497, 1.2960678), (0.97, 0.88009268, 1.9329221)],
)
def test_the_threshold_of_sets_is_that_of_mapie(digits, coverage, quantile, size):
    labels, values = digits[1], probabilities(digits[2])
    threshold = set_threshold(values[np.arange(100, 500), labels[100:500]], coverage)
    assert threshold == pytest.approx(1 - quantile, abs=1e-6)
    assert (values[500:] >= threshold).sum(axis=1).mean() == pytest.approx(size, abs=1e-6)


def test_over_200_splits_sets_and_answers_are_as_right_as_they_promise(digits):
    labels, logits = digits[1][100:], 3.0 * digits[2][100:]  # overconfident
    random, hits, answered, broken = np.random.default_rng(1), [], 0, 0
    for _ in range(200):
        order = random.permutation(len(labels))
        used, new = order[:600], order[600:]
        first, second = (used[half] for half in calibration_split(600, 0))
        values = probabilities(logits, fit_temperature(logits[first], labels[first]))
        record = fit_thresholds(values, labels, first, second, 0.9, 0.95)
        assert (record["n"], record["n_measured"]) == (300, 300)
        hits.append((values[new, labels[new]] >= record["set_threshold"]).sum())
        if record["score_threshold"] is not None:
            kept = values[new].max(axis=1) >= record["score_threshold"]
            answered += 1
            broken += (values[new].argmax(axis=1) == labels[new])[kept].mean() < 0.95
    # Of 300 exchangeable images, how many of 1,097 new ones have their label (Vovk, arXiv:1209.2673), without the
    # likeliest label of sets that would be empty.
    law = betabinom(1097, 271, 30)
    assert abs(np.mean(hits) - law.mean()) < 4 * law.std() / np.sqrt(200)
    assert np.mean((law.ppf(0.025) <= hits) & (hits <= law.ppf(0.975))) > 0.9
    assert answered > 100
    assert broken <= binom.ppf(0.999, 200, 0.05)


def test_more_coverage_makes_larger_sets_and_more_accuracy_fewer_answers(digits):
    labels, values = digits[1][100:], probabilities(digits[2][100:])
    first, second = calibration_split(len(labels), 0)
    records = [fit_thresholds(values, labels, first, second, x, x) for x in (0.85, 0.9, 0.95)]
    for key, sign in (("set_threshold", -1), ("mean_set_size", 1), ("score_threshold", 1), ("share_kept", -1)):
        assert all(sign * (b[key] - a[key]) >= 0 for a, b in itertools.pairwise(records)), key
    assert all(record["measured_coverage"] > record["coverage"] - 0.03 for record in records)
    assert all(record["accuracy_of_kept"] > record["min_accuracy"] - 0.02 for record in records)
    assert set_threshold(np.linspace(0.1, 0.8, 8), 0.9) == 0.0  # 9 are needed: all labels are in the set
    assert set_threshold(np.linspace(0.1, 0.9, 9), 0.9) == pytest.approx(0.1)


def test_a_score_is_answered_from_only_where_enough_images_show_it():
    def half(n, right):
        return np.linspace(0.5, 1.0, n), np.arange(n) >= n - right

    assert score_threshold(half(58, 58), half(58, 58), 0.95) is None  # 0.95 ** 58 > 0.05
    assert score_threshold(half(59, 59), half(59, 59), 0.95) == 0.0
    found = score_threshold(half(400, 200), half(400, 200), 0.9)
    assert 0.7 < found < 0.75  # half of them are wrong, those with the lowest scores


def test_other_images_are_further_from_the_classes(digits):
    values, labels = digits[0].astype(np.float32), digits[1]
    novelty = fit_novelty(values[:800], labels[:800], values[800:1300])
    distances, usual = novelty(torch.from_numpy(values[1300:]))
    assert usual.mean() == pytest.approx(50, abs=5)
    assert (np.diff(usual[distances.argsort()]) >= 0).all()
    assert novelty(torch.from_numpy(values[1300:, ::-1].copy()))[1].median() > 90  # upside down
    alone = fit_novelty(values[:10], np.arange(10), values[10:20])  # no class has two images
    assert torch.isfinite(alone.distances).all()


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A folder with photos in test/, and a model that evaluate.py --calibrate has been run on."""
    folder = tmp_path_factory.mktemp("uncertain")
    class_folders(folder / "pets", each=8)
    class_folders(folder / "test", each=20)
    flags = ["--train_dir", str(folder / "pets"), "--max_steps", "4", "--eval_strategy", "no", "--save_strategy", "no"]
    trainer = build(folder / "model", *flags)
    with torch.no_grad():
        trainer.model.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
    trainer.save_model()
    words = [str(folder / "model"), str(folder / "test"), "--calibrate", "--coverage", "0.8", "--min_accuracy", "0.1"]
    assert run("evaluate", *words, "--bootstrap_resamples", "0") == 0
    return folder


def run(script, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        return run_command_line(load_script(script).main)


def test_predict_writes_what_evaluate_has_fitted(calibrated, tmp_path):
    model = calibrated / "model"
    report = json.loads((model / "evaluation" / "test" / "results.json").read_text())
    stored = json.loads((model / "uncertainty.json").read_text())
    assert report["uncertainty"].items() <= stored.items()
    assert stored["fitted_to"]["temperature"] == ViTScratchConfig.from_pretrained(model).temperature
    assert {"uncertainty.json", "uncertainty.safetensors"} <= {upload.path for upload in collect(model)[0]}
    with open(model / "evaluation" / "test" / "predictions.csv", newline="") as file:
        stored["score_threshold"] = float(np.median([float(row["score"]) for row in csv.DictReader(file)]))
    (model / "uncertainty.json").write_text(json.dumps(stored))
    flags = "--top_k", "3", "--embeddings", "--dataloader_num_workers", "0", "--per_device_eval_batch_size", "8"
    for name in ("a.parquet", "a.csv", "a.jsonl"):
        assert run("predict", model, calibrated / "test", "--output", tmp_path / name, *flags) == 0
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    header, first, *_ = (tmp_path / "a.csv").read_text().splitlines()
    assert "score_3,set,abstain,novelty,novelty_percentile,embedding" in header
    assert f'"{json.dumps(table[0]["set"])}"'.replace('"', '""')[1:-1] in first
    for row, line in zip(table, lines, strict=True):
        scores = [row["score"], row["score_2"], row["score_3"]]
        labels = [row["label"], row["label_2"], row["label_3"]]
        size = max(1, sum(score >= stored["set_threshold"] for score in scores))
        assert row["set"] == labels[:size] == line["set"]
        assert row["abstain"] == (row["score"] < stored["score_threshold"]) == line["abstain"]
        assert line["novelty"] == pytest.approx(row["novelty"], abs=1e-5)
    assert {row["abstain"] for row in table} == {True, False}
    assert len({len(row["set"]) for row in table}) > 1
    novel = [row["novelty_percentile"] for row in table]
    assert min(novel) < 20 < 80 < max(novel)
    assert run("predict", model, calibrated / "test", "--output", tmp_path / "b.csv", "--calibrated", "False") == 0
    assert (tmp_path / "b.csv").read_text().startswith("image,label,score\n")


def test_thresholds_of_other_weights_are_refused(calibrated, tmp_path, capsys):
    config = json.loads((calibrated / "model" / "config.json").read_text())
    (calibrated / "model" / "config.json").write_text(json.dumps({**config, "temperature": 3.5}))
    try:
        assert run("predict", calibrated / "model", calibrated / "test", "--output", tmp_path / "a.csv") == 2
    finally:
        (calibrated / "model" / "config.json").write_text(json.dumps(config))
    assert "uncertainty.json was fitted to other weights or another temperature" in capsys.readouterr().err
    assert run("evaluate", calibrated / "model", calibrated / "test", "--coverage", "0.8") == 2
    assert "--coverage is fitted by --calibrate" in capsys.readouterr().err
