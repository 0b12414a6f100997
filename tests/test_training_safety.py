# SPDX-License-Identifier: Apache-2.0
"""Runs that get killed, filled up or sick: what is on the disk afterwards, what is told, and how they go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_images import ROOT, build, class_folders, difference, flags, weights

from modeling_vit_scratch.training import checkpoints
from modeling_vit_scratch.training.errors import TrainingInterrupted


FINETUNE = ROOT / "scripts" / "finetune.py"


def stepwise(folder, *more):
    """A run that saves at every second step."""
    return flags(folder, "--save_strategy", "steps", "--save_steps", "2", "--max_steps", "6", *more)


# ---------------------------------------------------------------------------------------------------------------------
# Kills


# A user's script that is killed at the n-th thing that happens to a file while it saves: n is its last argument.
KILLED = """
import os, signal, sys
import torch
sys.path.insert(0, sys.argv[1])
from tiny_images import build

left = int(sys.argv[-1])
def counted(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
for module, name in ((os, "fsync"), (os, "replace"), (os, "rmdir"), (os, "unlink"), (torch, "save")):
    setattr(module, name, counted(getattr(module, name)))
build(*sys.argv[2:-1]).train()
"""


@pytest.mark.parametrize("moment", [9, 33, 58])
def test_a_run_that_is_killed_while_it_saves_goes_on_from_the_checkpoint_before(pets, tmp_path, moment):
    more = stepwise(pets, "--save_total_limit", "1", "--dataloader_num_workers", "0")
    argv = [sys.executable, "-c", KILLED, str(ROOT / "tests"), str(tmp_path / "out"), *more, str(moment)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for checkpoint in checkpoints.find_checkpoints(tmp_path / "out"):
        assert checkpoints.damage(checkpoint) is None
    latest, _ = checkpoints.latest_whole(tmp_path / "out")
    assert (latest is None) == (moment < 30)  # the first checkpoint is whole after about thirty
    resume = [] if latest is None else ["--resume_from_checkpoint", "True"]
    straight, resumed = build(tmp_path / "straight", *more), build(tmp_path / "out", *more, *resume)
    straight.train()
    resumed.train(resume_from_checkpoint=None if latest is None else True)
    assert difference(weights(resumed), weights(straight)) == 0.0
    assert not (tmp_path / "out" / checkpoints.STAGING).exists()
    assert [path.name for path in checkpoints.find_checkpoints(tmp_path / "out")] == ["checkpoint-6"]


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("model.safetensors", "model.safetensors has 100 of"),
        ("optimizer.pt", "optimizer.pt has 100 of"),
        ("trainer_state.json", "it has no trainer_state.json"),
        ("rng_state.pth", "rng_state.pth is missing"),
        ("run.json", "it has no run.json"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_told(pets, tmp_path, capsys, file, told):
    straight = build(tmp_path / "out", *stepwise(pets))
    straight.train()
    damaged = tmp_path / "out" / "checkpoint-6" / file
    if "100" in told:
        os.truncate(damaged, 100)
    else:
        damaged.unlink()
    resumed = build(tmp_path / "out", *stepwise(pets), "--resume_from_checkpoint", "True")
    assert Path(resumed.args.resume_from_checkpoint).name == "checkpoint-4"
    resumed.train(resume_from_checkpoint=True)
    assert f"checkpoint-6 is damaged, {told}" in capsys.readouterr().err
    assert difference(weights(resumed), weights(straight)) == 0.0
    assert checkpoints.damage(tmp_path / "out" / "checkpoint-6") is None


def test_a_resumed_run_with_other_settings_tells_them(pets, tmp_path, capsys):
    build(tmp_path / "out", *stepwise(pets)).train()
    other = build(tmp_path / "out", *stepwise(pets), "--max_steps", "8", "--learning_rate", "0.01", "--seed", "7",
                  "--resume_from_checkpoint", "True")  # fmt: skip
    capsys.readouterr()
    other.train(resume_from_checkpoint=True)
    told = capsys.readouterr().err.splitlines()
    block = [line.strip() for line in told if line.startswith("    ")]
    assert block == [
        "--learning_rate: 0.01 now, 0.001 in the checkpoint's run",
        "--max_steps: 8 now, 6 in the checkpoint's run",
        "--seed: 7 now, 42 in the checkpoint's run",
    ]
    same = build(tmp_path / "out", *stepwise(pets), "--max_steps", "8", "--learning_rate", "0.01", "--seed", "7",
                 "--resume_from_checkpoint", "True")  # fmt: skip
    same.train(resume_from_checkpoint=True)
    assert "settings" not in capsys.readouterr().err


def test_one_of_two_processes_is_killed_and_the_run_goes_on_exactly(tmp_path):
    class_folders(tmp_path / "pets", each=9)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launch += [str(FINETUNE), *flags(str(tmp_path / "pets")), "--variant", "test/4", "--use_cpu", "--max_steps", "60"]
    launch += ["--per_device_train_batch_size", "4", "--save_strategy", "steps", "--save_steps", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(name, *more):
        return subprocess.run([*launch, "--output_dir", name, *more], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, timeout=240)  # fmt: skip

    process = subprocess.Popen([*launch, "--output_dir", "out"], cwd=tmp_path, env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "checkpoint-6").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    victims = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(victims[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == 1
    resumed, straight = run("out", "--resume_from_checkpoint", "True"), run("straight")
    assert resumed.returncode == 0, resumed.stderr
    assert straight.returncode == 0, straight.stderr
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "straight"))
    assert difference(ours, theirs) == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Signals


def test_sigterm_saves_ends_with_143_and_goes_on_exactly(pets, tmp_path):
    trainer = build(tmp_path / "out", *flags(pets, "--max_steps", "6"))
    step = trainer.training_step

    def terminated(*args, **kwargs):
        if trainer.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    trainer.training_step = terminated
    with pytest.raises(TrainingInterrupted, match=r"step 3 of 6.*checkpoint-3: to go on") as stopped:
        trainer.train()
    assert stopped.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resumed, straight = (
        build(tmp_path / "again", *flags(pets, "--max_steps", "6")),
        build(tmp_path / "straight", *flags(pets, "--max_steps", "6")),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    straight.train()
    assert difference(weights(resumed), weights(straight)) == 0.0
