# SPDX-License-Identifier: Apache-2.0
"""A threshold for each label of a multi-label model: found by evaluate.py, stored, and applied by predict.py."""

import csv
import json

import numpy as np
import pytest
from forked import run_script
from sklearn.metrics import f1_score
from tiny_images import ROOT, build, image

from modeling_vit_scratch import ViTScratchConfig
from modeling_vit_scratch.common.pretrained import load_pretrained
from modeling_vit_scratch.evaluation.report import fit_label_thresholds
from modeling_vit_scratch.modeling_vit_scratch import ViTScratchForImageClassification
from modeling_vit_scratch.training.arguments import ModelArguments
from modeling_vit_scratch.training.build import build_model


def test_each_threshold_has_the_best_f1_of_all():
    generator = np.random.default_rng(0)
    labels = (generator.random((200, 4)) < [0.5, 0.2, 0.05, 0.0]).astype(int)
    values = (0.3 * labels + 0.7 * generator.random((200, 4))).round(2)  # with ties
    thresholds = fit_label_thresholds(values, labels)
    assert thresholds[3] == 0.5  # no image has this label
    for label in range(3):
        best = max(f1_score(labels[:, label], values[:, label] >= level) for level in np.unique(values))
        assert f1_score(labels[:, label], values[:, label] >= thresholds[label]) == pytest.approx(best)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A multi-label model, and images with labels that its scores hardly reach."""
    place, rows = tmp_path_factory.mktemp("labels"), []
    for number in range(40):
        label = number % 3
        image(label, number).save(place / f"{number}.png")
        rows.append(
            {"file_name": f"{number}.png", "labels": [["red"], ["green", "red"], []][(label + (number % 4 == 0)) % 3]}
        )
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trainer = build(place / "model", "--train_dir", str(place), "--max_steps", "5", "--learning_rate", "1e-3")
    trainer.train()
    trainer.save_model()
    return place


def test_evaluate_stores_what_predict_applies_and_training_drops(folder, tmp_path):
    scripts, model = ROOT / "scripts", folder / "model"
    words = [scripts / "evaluate.py", model, folder, "--split", "all", "--calibrate", "--output_dir", "report"]
    words += ["--threshold", "0.99"]  # which no score reaches
    printed = run_script([*words, "--bootstrap_resamples", "0"], tmp_path)[0]
    report = json.loads((tmp_path / "report" / "results.json").read_text())["calibration"]
    assert "Thresholds of labels, fitted to the same (green " in printed
    is_better = report["macro_f1"] > report["macro_f1_at_one_threshold"]
    assert is_better
    config = ViTScratchConfig.from_pretrained(model)
    assert getattr(config, "label_thresholds", None) == (report["label_thresholds"] if is_better else None)
    config.label_thresholds = [0.4, 0.6]  # whatever was found
    config.save_pretrained(model)
    run_script([scripts / "predict.py", model, folder, "--output", "p.csv", "--top_k", "2"], tmp_path)
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert list(rows[0]) == ["image", "label", "score", "label_2", "score_2", "set"]
    for row in rows:
        scores = {row["label"]: float(row["score"]), row["label_2"]: float(row["score_2"])}
        reached = [name for name in scores if scores[name] >= {"green": 0.4, "red": 0.6}[name]]  # the best first
        assert json.loads(row["set"]) == reached
    plain, _, _ = load_pretrained(ViTScratchForImageClassification, "MODEL", str(model), {})
    assert plain.config.label_thresholds == [0.4, 0.6]
    again = build_model(ModelArguments(model_name_or_path=str(model)), ["green", "red"], 3, 0, is_multi_label=True)[0]
    assert not hasattr(again.config, "label_thresholds")
