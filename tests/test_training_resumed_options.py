# SPDX-License-Identifier: Apache-2.0
"""A resumed run does what its own command line says, and its record says what its optimizer holds."""

import json
import os
import shutil

import pytest
import torch
from forked import run_in_child
from safetensors.torch import load_file
from tiny_images import build, class_folders, difference, flags, weights

from modeling_vit_scratch.cards.records import training_metadata
from modeling_vit_scratch.common import files
from modeling_vit_scratch.common.errors import InputError


STEPS = ("--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4", "--dataloader_num_workers", "0")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Images, and the folder of a run of four steps with checkpoints at two and four."""
    folder = tmp_path_factory.mktemp("first")
    pets = str(class_folders(folder / "pets", each=8))
    build(folder / "out", *flags(pets, *STEPS)).train()
    return pets, folder / "out"


def resume(first, folder, *more, step=2):
    pets, before = first
    shutil.copytree(before / f"checkpoint-{step}", folder / "out" / f"checkpoint-{step}")
    trainer = build(folder / "out", *flags(pets, *STEPS, "--resume_from_checkpoint", "True", *more))
    trainer.train(resume_from_checkpoint=True)
    return trainer


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--learning_rate", "0.03", "--lr_scheduler_type", "linear"),
        ("--weight_decay", "0.3", "--adam_beta1", "0.5", "--adam_beta2", "0.9", "--adam_epsilon", "0.001"),
        ("--warmup_steps", "3", "--max_steps", "9", "--optim", "adamw_torch"),
    ],
)
def test_the_record_of_a_resumed_run_equals_what_its_optimizer_holds(first, tmp_path, more):
    trainer = resume(first, tmp_path, *more)
    record, optimizer = training_metadata(trainer), trainer.optimizer
    fresh = build(tmp_path / "fresh", *flags(first[0], *STEPS, *more)).create_optimizer()
    for group, own in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        assert group["initial_lr"] == record["learning_rate"] == own["lr"]
        assert list(group["betas"]) == record["adam_betas"]
        assert group["eps"] == record["adam_epsilon"]
        assert {**group, "params": 0, "lr": 0} == {**own, "params": 0, "lr": 0, "initial_lr": own["lr"]}
    assert optimizer.param_groups[0]["weight_decay"] == record["weight_decay"]
    # transformers' own schedule for these flags, at the last step.
    _, schedule = fresh, trainer.lr_scheduler
    assert optimizer.param_groups[0]["lr"] == schedule.base_lrs[0] * schedule.lr_lambdas[0](trainer.state.global_step)


def test_a_lower_learning_rate_holds_from_the_first_step_on(first, tmp_path):
    trainer = resume(first, tmp_path, "--learning_rate", "1e-12")
    before = torch.load(first[1] / "checkpoint-2" / "optimizer.pt")["param_groups"][0]["lr"]
    assert before > 1e-5
    assert difference(weights(trainer), load_file(first[1] / "checkpoint-2" / "model.safetensors")) < 1e-10


@pytest.mark.parametrize(
    "more",
    [
        ("--optim", "sgd"), ("--optim", "lamb"), ("--layer_decay", "0.7"), ("--head_learning_rate_multiplier", "3"),
        ("--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "steps"),
    ],
)  # fmt: skip
def test_what_the_checkpoint_can_not_go_on_with_is_refused(first, tmp_path, more):
    with pytest.raises(InputError, match="or schedule is of another kind, has other groups"):
        resume(first, tmp_path, *more)


def test_a_checkpoint_without_an_optimizer_is_refused(first, tmp_path):
    before = shutil.copytree(first[1] / "checkpoint-2", tmp_path / "before" / "checkpoint-2")
    metadata = files.read_manifest(before)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "run.json"):  # as with --save_only_model
        (before / name).unlink()
    files.write_manifest(before, metadata)
    with pytest.raises(InputError, match="was not saved"):
        resume((first[0], tmp_path / "before"), tmp_path)


def test_intervals_and_the_best_checkpoint_are_those_of_the_resumed_run(first, tmp_path):
    state = first[1] / "checkpoint-2" / "trainer_state.json"
    assert json.loads(state.read_text())["save_steps"] == 2
    trainer = resume(first, tmp_path, "--save_steps", "1", "--save_total_limit", "9", "--metric_for_best_model", "loss")
    assert [path.name for path in files.find_checkpoints(tmp_path / "out")] == [f"checkpoint-{n}" for n in (4, 3, 2)]
    assert "--metric_for_best_model" in trainer.changed


def test_a_checkpoint_with_other_content_of_the_same_size_is_damaged(first, tmp_path):
    shutil.copytree(first[1], tmp_path / "out")
    with open(tmp_path / "out" / "checkpoint-4" / "optimizer.pt", "r+b") as file:
        file.seek(20_000)
        file.write(bytes(2_000))
    assert files.damage(tmp_path / "out" / "checkpoint-4") is None
    latest, damaged = files.latest_whole(tmp_path / "out", read=True)
    assert (latest.name, *damaged.values()) == ("checkpoint-2", "optimizer.pt has other content than was written")
    trainer = build(tmp_path / "out", *flags(first[0], *STEPS, "--resume_from_checkpoint", "auto"))
    assert trainer.args.resume_from_checkpoint == str(tmp_path / "out" / "checkpoint-2")
    new = build(tmp_path / "new", *flags(first[0], "--resume_from_checkpoint", "auto"))
    assert new.args.resume_from_checkpoint is None


def test_two_runs_do_not_share_a_folder(first, tmp_path):
    trainer = build(tmp_path / "out", *flags(first[0], *STEPS))
    lock = files.lock(tmp_path / "out" / "_lock", "it")

    def start():
        with pytest.raises(InputError, match=r"Another run is at work on --output_dir"):
            trainer.train()

    status, printed = run_in_child(start)
    assert status == 0, printed
    del lock
    assert os.listdir(tmp_path / "out") == []
    # Another run has ended after this one has read its command line.
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="has left its model in --output_dir"):
        trainer.train()
