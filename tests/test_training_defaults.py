# SPDX-License-Identifier: Apache-2.0
"""Defaults that follow from the images, and the best of equal checkpoints."""

from types import SimpleNamespace

import pytest
import torch
from tiny_images import CLASSES, build, class_folders
from transformers import TrainerState

from modeling_vit_scratch.recipes.table import STARTS, settings_from_data
from modeling_vit_scratch.training.trainer_overrides import TrainerOverrides


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return str(class_folders(tmp_path_factory.mktemp("pets"), each=8))


def planned(start, images, **more):
    given = {"width": 256, "has_fresh_head": True} | more
    return {name: value for name, (value, _) in settings_from_data(start, images, **given).items()}


@pytest.mark.parametrize("start", STARTS)
def test_more_images_mean_larger_batches_fewer_epochs_and_no_fewer_steps(start):
    sizes = [10, 100, 300, 1000, 3000, 10_000, 100_000]
    found = [planned(start, images) for images in sizes]
    batches = [one["per_device_train_batch_size"] for one in found]
    epochs = [one["num_train_epochs"] for one in found]
    assert batches == sorted(batches)
    assert (batches[0], batches[-1]) == (16, 64)
    assert epochs == sorted(epochs, reverse=True)
    steps = [count * -(-images // batch) for images, batch, count in zip(sizes, batches, epochs)]
    rule = STARTS[start]
    assert all(0.9 * rule.steps < step for step, count in zip(steps, epochs) if count < rule.epochs[1])
    assert all(step < 1.1 * rule.steps for step, count in zip(steps, epochs) if count > rule.epochs[0])


def test_rates_follow_from_start_and_width_and_processes_share_a_batch():
    assert planned("checkpoint", 300)["learning_rate"] == 3e-4
    assert planned("checkpoint", 300, width=768)["learning_rate"] == 1e-4  # B/16
    assert planned("scratch", 300, width=384)["learning_rate"] == planned("scratch", 300)["learning_rate"] == 1e-3
    assert planned("checkpoint", 300)["head_learning_rate_multiplier"] == 10
    assert "head_learning_rate_multiplier" not in planned("checkpoint", 300, has_fresh_head=False)
    one, two = planned("checkpoint", 1000), planned("checkpoint", 1000, processes=2)
    assert one.pop("per_device_train_batch_size") == 2 * two.pop("per_device_train_batch_size") == 32
    assert one == two


def settings(trainer):
    arguments, multiplier = trainer.args, trainer.args.recipe_arguments.head_learning_rate_multiplier
    return arguments.per_device_train_batch_size, arguments.num_train_epochs, arguments.learning_rate, multiplier


def run(pets, folder, *more):
    # In `tiny_images.build`, the last of two values counts; a batch of 4 is a flag.
    return build(folder, "--train_dir", pets, *more)


def test_flags_override_and_are_said_to(pets, tmp_path, monkeypatch):
    monkeypatch.setattr("tiny_images.BATCH", ())
    others = str(class_folders(tmp_path / "others", CLASSES[:2]))
    run(others, tmp_path / "start", "--max_steps", "1").save_model()
    start = ("--model_name_or_path", str(tmp_path / "start"))
    trainer = run(pets, tmp_path / "a", *start)
    assert settings(trainer) == (16, 60, 3e-4, 10)
    (message,) = [line for line in trainer.describe() if line.startswith("Chosen for these images")]
    assert "--num_train_epochs 60: about 600 steps from a checkpoint" in message
    assert message.count("\n") == 5
    assert "--metric_for_best_model loss: an accuracy on 3 held-out images" in message
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("loss", False)
    trainer = run(pets, tmp_path / "b", *start, "--learning_rate", "0.02", "--head_learning_rate_multiplier", "3")
    assert settings(trainer) == (16, 60, 0.02, 3)
    assert "learning_rate" not in trainer.args.recipe_arguments.message
    # The length or the batch by a flag: fixed defaults, as they were.
    for flags, expected in (
        (("--num_train_epochs", "4"), (64, 4, 1e-4, 1)),
        (("--max_steps", "7"), (64, 10, 1e-4, 1)),
        (("--per_device_train_batch_size", "8"), (8, 10, 1e-4, 1)),
    ):
        trainer = run(pets, tmp_path / flags[1], *start, *flags)
        assert settings(trainer) == expected
        assert trainer.args.recipe_arguments.message is None
    assert settings(run(pets, tmp_path / "c")) == (16, 200, 1e-3, 1)
    assert settings(run(pets, tmp_path / "d", *start, "--freeze", "encoder")) == (16, 100, 1e-2, 1)
    assert settings(run(pets, tmp_path / "e", *start, "--lora_rank", "2"))[2:] == (1e-3, 3)


def test_a_classifier_that_is_kept_learns_as_fast_as_the_rest(pets, tmp_path, monkeypatch):
    monkeypatch.setattr("tiny_images.BATCH", ())
    trainer = run(pets, tmp_path / "start", "--max_steps", "1")
    torch.nn.init.normal_(trainer.model.classifier.weight)
    trainer.save_model()
    assert settings(run(pets, tmp_path / "a", "--model_name_or_path", str(tmp_path / "start")))[3] == 1


def test_of_equal_checkpoints_the_one_with_the_lowest_loss_is_the_best():
    class Trainer(TrainerOverrides):
        args = SimpleNamespace(metric_for_best_model="accuracy", greater_is_better=True, save_strategy="epoch")

    from transformers import Trainer as Stock

    class Ours(Trainer, Stock):
        def __init__(self):
            self.state, self.control = TrainerState(), None
            self.early_end = SimpleNamespace(after_evaluation=lambda *_: None)

    trainer = Ours()
    evaluations = [(0.5, 1.3), (0.8, 0.9), (0.8, 1.1), (0.8, 0.7), (0.6, 0.1), (0.8, 0.7)]
    found = []
    for step, (accuracy, loss) in enumerate(evaluations, start=1):
        metrics = {"eval_accuracy": accuracy, "eval_loss": loss}
        trainer.state.global_step = step
        trainer.state.log_history.append(metrics | {"step": step})
        found.append(trainer._determine_best_metric(metrics, None))
    assert found == [True, True, False, True, False, False]
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.8, 4)
