# SPDX-License-Identifier: Apache-2.0
"""Metrics against scikit-learn and by hand; the record against what it must and must not hold."""

import json
import subprocess
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, top_k_accuracy_score
from tiny_images import build, class_folders
from transformers import EvalPrediction

from modeling_vit_scratch.cards.run_record import build_record, result_message, write_record
from modeling_vit_scratch.common import records as provenance_module
from modeling_vit_scratch.common.records import command_line, git_commit
from modeling_vit_scratch.evaluation.classification_metric import ImageClassificationMetric
from modeling_vit_scratch.evaluation.compute_metrics import build_compute_metrics, rank_labels
from modeling_vit_scratch.training.arguments import ModelArguments


def test_by_hand():
    # Six classes, four images: right, second, sixth, and right again.
    ranked = [[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [0, 1, 2, 3, 4], [5, 4, 3, 2, 1]]
    scores = ImageClassificationMetric(6).compute(predictions=ranked, references=[0, 0, 5, 5])
    # F1: class 0 has 1 of 2 found and 1 of 2 right, class 1 none, class 5 1 of 2 found and all right.
    assert scores == pytest.approx({"accuracy": 0.5, "top5_accuracy": 0.75, "macro_f1": (1 / 2 + 0 + 2 / 3) / 3})


def test_against_scikit_learn_on_logits():
    generator = np.random.default_rng(0)
    labels, logits = generator.integers(0, 9, 200), generator.normal(size=(200, 9))
    ranked = rank_labels(torch.from_numpy(logits), torch.from_numpy(labels))
    ours = ImageClassificationMetric(9).compute(predictions=ranked, references=labels)
    theirs = {
        "accuracy": accuracy_score(labels, logits.argmax(1)),
        "top5_accuracy": top_k_accuracy_score(labels, logits, k=5, labels=range(9)),
        "macro_f1": f1_score(labels, logits.argmax(1), average="macro"),
    }
    assert ours == pytest.approx(theirs)


def test_it_is_a_metric_of_evaluate_and_top_5_of_few_classes_is_not_told():
    metric = ImageClassificationMetric(3)
    assert isinstance(metric, evaluate.Metric)
    for ranked, label in (([2, 0, 1], 2), ([0, 1, 2], 1)):
        metric.add(predictions=ranked, references=label)
    scores = metric.compute()
    assert set(scores) == {"accuracy", "macro_f1"}
    assert scores["accuracy"] == 0.5
    together = evaluate.combine([ImageClassificationMetric(3)])
    assert together.compute(predictions=[[1, 0, 2]], references=[1])["accuracy"] == 1.0


def test_in_batches_and_at_once_and_twice():
    ranked, labels = np.array([[0, 1], [1, 0], [0, 1]]), np.array([0, 0, 0])
    compute = build_compute_metrics(2)
    expected = {"accuracy": 2 / 3, "macro_f1": pytest.approx(0.4), "images": 3}
    for _ in range(2):  # nothing is left over from the evaluation before
        assert compute(EvalPrediction(ranked, labels)) == expected
    assert compute(EvalPrediction(torch.tensor(ranked[:1]), torch.tensor(labels[:1])), compute_result=False) == {}
    assert compute(EvalPrediction(torch.tensor(ranked[1:]), torch.tensor(labels[1:])), compute_result=True) == expected


@pytest.mark.parametrize(("num_labels", "is_multi_label"), [(3, False), (6, False), (3, True)])
def test_the_names_that_are_known_before_training_are_those_of_the_scores(num_labels, is_multi_label):
    compute = build_compute_metrics(num_labels, is_multi_label)
    names = set(compute.names)
    labels = np.eye(num_labels, dtype=np.float32)
    ranked = labels if is_multi_label else np.tile(np.arange(5), (num_labels, 1))
    scores = compute(EvalPrediction(ranked, labels if is_multi_label else np.arange(num_labels)))
    assert names == set(scores) - {"images"}


# ---------------------------------------------------------------------------------------------------------------------
# The record


@pytest.fixture
def run(tmp_path):
    """A trainer after one step on twelve images, its record, and the folders."""
    class_folders(tmp_path / "pets" / "train")
    trainer = build(tmp_path / "out", "--train_dir", str(tmp_path / "pets" / "train"), "--max_steps", "1")
    trainer.train()
    return trainer, trainer.evaluate(), tmp_path


def record_of(run, **model_arguments):
    trainer, scores, _ = run
    data = SimpleNamespace(
        source=SimpleNamespace(name="pets", hub_id=None, license=None, url=None, note=None),
        label_names=["a", "b", "c"], num_train=9, validation=range(3), split="25 % of each class",
        is_multi_label=False, images=None, overlap=None,
    )  # fmt: skip
    return build_record(trainer, data, ModelArguments(**model_arguments), scores, wall_time=1.25)


def test_a_record_says_what_was_found_and_how(run, monkeypatch):
    trainer, scores, tmp_path = run
    monkeypatch.setattr(
        "sys.argv", ["/home/me/vit/scripts/finetune.py", "--train_dir", str(tmp_path / "pets" / "train")]
    )
    record = record_of(run, variant="test/4")
    assert (record["metric"], record["value"], record["n"]) == ("accuracy", scores["eval_accuracy"], 3)
    assert record["metrics"] == {"accuracy": scores["eval_accuracy"], "macro_f1": scores["eval_macro_f1"]}
    assert record["selection"] == "the checkpoint with the best accuracy on these same images (step 1)"
    assert (record["seed"], record["wall_time_seconds"]) == (42, 1.2)
    assert record["dataset"]["num_training_images"] == 9
    assert record["dataset"]["is_multi_label"] is False
    assert record["training"]["batch_size"] == 4
    assert record["training"]["warmup_steps"] == trainer.args.get_warmup_steps(1)
    assert record["model"] == {
        "num_parameters": trainer.model.num_parameters(),
        "started_from": "scratch",
        "base_model": None,
        "license": None,
    }
    assert {"python", "torch", "transformers"} <= record["versions"].keys()
    assert "cores" in record["hardware"] or "x " in record["hardware"]
    assert record["command"] == "python scripts/finetune.py --train_dir train"
    write_record(record, tmp_path)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == record
    assert str(tmp_path) not in text
    assert "/home" not in text


def test_where_a_record_says_the_weights_come_from(run):
    tmp_path = run[2]
    assert record_of(run, model_name_or_path=str(tmp_path / "pets"))["model"]["started_from"] == "pets"
    assert record_of(run)["earlier"] == []
    first = record_of(run)
    (tmp_path / "pets").mkdir(exist_ok=True)
    write_record({**first, "earlier": [{"seed": 0}]}, tmp_path / "pets")
    before, last = record_of(run, model_name_or_path=str(tmp_path / "pets"))["earlier"]
    assert before == {"seed": 0}
    assert last["started_from"] == "scratch"
    assert all(last[name] == first[name] for name in ("value", "n", "command", "wall_time_seconds", "training"))
    facts = record_of(run, model_name_or_path="someone/vit")["model"]
    assert (facts["started_from"], facts["base_model"]) == ("someone/vit", "someone/vit")


def test_commands_are_told_without_folders_and_tokens(monkeypatch):
    argv = [
        "a/b/finetune.py",
        "--train_dir=/data/x y/pets",
        "--token",
        "hf_abcdefghijkl",
        "--output_dir",
        "out/pets",
        "a*.tar",
    ]
    expected = "python scripts/finetune.py --train_dir=pets --token TOKEN --output_dir out/pets 'a*.tar'"
    assert command_line(argv) == expected
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command_line(["finetune.py"]) == "accelerate launch --multi_gpu --num_processes 2 scripts/finetune.py"


def test_the_commit_is_that_of_this_library_or_none(tmp_path, monkeypatch):
    module = tmp_path / "modeling_vit_scratch" / "common" / "provenance.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(provenance_module, "__file__", str(module))
    assert git_commit.__wrapped__() is None

    def git(*words):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        run = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True, text=True
        )
        return run.stdout.strip()

    git("init")
    assert git_commit.__wrapped__() is None  # no commit yet
    git("add", ".")
    git("commit", "-m", "first")
    assert git_commit.__wrapped__() == git("rev-parse", "HEAD")
    module.write_text("changed")
    assert git_commit.__wrapped__() == git("rev-parse", "HEAD") + "-dirty"


def test_what_a_user_sees_last():
    record = {"metric": "accuracy", "value": 0.98518, "n": 270, "selection": "the last step"}
    record["training"] = {"broken_images": 0}
    text = result_message(record, "outputs/digits", "examples/3_7.png")
    for part in (
        "accuracy: 98.52 % on 270 images",
        "outputs/digits",
        'classify("examples/3_7.png")',
        "trust_remote_code=True",
    ):
        assert part in text
    assert "could not be read" not in text
    assert "(the last step).\nHardly apart.\nThe model is in" in result_message(
        record, "outputs/digits", None, "Hardly apart."
    )
    record["training"]["broken_images"] = 2
    assert "2 training images could not be read" in result_message(record, "outputs/digits")
