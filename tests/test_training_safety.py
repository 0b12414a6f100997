# SPDX-License-Identifier: Apache-2.0
"""Runs that get killed, filled up or sick: what is on the disk afterwards, what is told, and how they go on."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import run_forked, start_script
from safetensors.torch import load_file
from tiny_images import ROOT, build, class_folders, difference, flags, load_script, weights

from modeling_vit_scratch.common import files, processes
from modeling_vit_scratch.common.errors import InputError, TrainingInterrupted, TrainingStopped
from modeling_vit_scratch.common.processes import launcher
from modeling_vit_scratch.image_decoding_vit_scratch import ImageDecodeError
from modeling_vit_scratch.training import trainer as trainer_module
from modeling_vit_scratch.training import trainer_overrides


FINETUNE = ROOT / "scripts" / "finetune.py"


def stepwise(folder, *more):
    """A run that saves at every second step."""
    return flags(folder, "--save_strategy", "steps", "--save_steps", "2", "--max_steps", "6", *more)


# ---------------------------------------------------------------------------------------------------------------------
# Kills


def train_until(moment, *words):
    """A run that is killed at the n-th thing that happens to a file while it saves."""
    left = moment

    def counted(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for module, name in ((os, "fsync"), (os, "replace"), (os, "rmdir"), (os, "unlink"), (torch, "save")):
        setattr(module, name, counted(getattr(module, name)))
    build(*words).train()


@pytest.mark.parametrize("moment", [9, 33, 58])
def test_a_run_that_is_killed_while_it_saves_goes_on_from_the_checkpoint_before(pets, tmp_path, moment):
    more = stepwise(pets, "--save_total_limit", "1", "--dataloader_num_workers", "0")
    process = multiprocessing.get_context("fork").Process(target=train_until, args=(moment, tmp_path / "out", *more))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    for checkpoint in files.find_checkpoints(tmp_path / "out"):
        assert files.damage(checkpoint) is None
    latest, _ = files.latest_whole(tmp_path / "out")
    assert (latest is None) == (moment < 30)  # the first checkpoint is whole after about thirty
    resume = [] if latest is None else ["--resume_from_checkpoint", "True"]
    straight, resumed = build(tmp_path / "straight", *more), build(tmp_path / "out", *more, *resume)
    straight.train()
    resumed.train(resume_from_checkpoint=None if latest is None else True)
    assert difference(weights(resumed), weights(straight)) == 0.0
    assert not (tmp_path / "out" / files.STAGING).exists()
    assert [path.name for path in files.find_checkpoints(tmp_path / "out")] == ["checkpoint-6"]


def test_the_best_checkpoint_is_found_in_a_folder_that_was_moved(pets, tmp_path, monkeypatch):
    more = [
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "2",
        "--load_best_model_at_end",
        "True",
        "--save_total_limit",
        "1",
    ]
    more += ["--metric_for_best_model", "loss", "--greater_is_better", "True"]  # the first is the best
    run = build(tmp_path / "a", *stepwise(pets), *more, "--max_steps", "4")
    run.train()
    best = Path(run.state.best_model_checkpoint).name
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b" / files.STAGING).mkdir()
    (tmp_path / "b" / files.STAGING / "mine.txt").write_text("not of the run")
    monkeypatch.chdir(tmp_path)
    resumed = build(Path("b"), *stepwise(pets), *more, "--max_steps", "6", "--resume_from_checkpoint", "True")
    resumed.train(resume_from_checkpoint=True)
    assert best == "checkpoint-2"
    assert Path(resumed.state.best_model_checkpoint).resolve() == tmp_path / "b" / best
    assert (tmp_path / "b" / files.STAGING / "mine.txt").exists()


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("model.safetensors", "model.safetensors has 100 of"),
        ("optimizer.pt", "optimizer.pt has 100 of"),
        ("scheduler.pt", "scheduler.pt has other content than was written"),
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
    elif "content" in told:
        damaged.write_bytes(bytes(damaged.stat().st_size))
    else:
        damaged.unlink()
    resumed = build(tmp_path / "out", *stepwise(pets), "--resume_from_checkpoint", "True")
    assert Path(resumed.args.resume_from_checkpoint).name == "checkpoint-4"
    resumed.train(resume_from_checkpoint=True)
    assert f"checkpoint-6 is damaged, {told}" in capsys.readouterr().err
    assert difference(weights(resumed), weights(straight)) == 0.0
    assert files.damage(tmp_path / "out" / "checkpoint-6") is None


def test_a_resumed_run_with_other_settings_tells_them(pets, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "git_commit", lambda: "abc")
        build(tmp_path / "out", *stepwise(pets)).train()
    monkeypatch.setattr(trainer_module, "git_commit", lambda: "def")
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
        "commit of the code: def now, abc in the checkpoint's run",
    ]
    same = build(tmp_path / "out", *stepwise(pets), "--max_steps", "8", "--learning_rate", "0.01", "--seed", "7",
                 "--resume_from_checkpoint", "True")  # fmt: skip
    same.train(resume_from_checkpoint=True)
    assert "settings" not in capsys.readouterr().err


def finetune(rank, words):
    sys.argv = ["finetune.py", *words]
    load_script("finetune").main()


def test_one_of_two_processes_is_killed_and_the_run_goes_on_exactly(tmp_path):
    class_folders(tmp_path / "pets", each=9)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    words = [*flags(str(tmp_path / "pets")), "--variant", "test/4", "--use_cpu", "--max_steps", "24"]
    words += ["--per_device_train_batch_size", "4", "--save_strategy", "steps", "--save_steps", "3"]
    launch += [str(FINETUNE), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    process = subprocess.Popen([*launch, "--output_dir", "out"], cwd=tmp_path, env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "checkpoint-6").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    victims = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(victims[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == 1
    run_forked(finetune, 2, [*words, "--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", "True"])
    run_forked(finetune, 2, [*words, "--output_dir", str(tmp_path / "straight")])
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


@pytest.fixture
def orphan(pets, tmp_path, monkeypatch):
    """Builds a trainer whose parent ends at its third step."""

    def build_orphan():
        trainer = build(tmp_path / "out", *flags(pets, "--max_steps", "4", "--dataloader_num_workers", "0"))
        step = trainer.training_step

        def orphaned(*args, **kwargs):
            if trainer.state.global_step == 2:
                monkeypatch.setattr(os, "getppid", lambda: 1)
            return step(*args, **kwargs)

        trainer.training_step = orphaned
        return trainer

    return build_orphan


def test_the_end_of_the_launcher_counts_as_sigterm(orphan, monkeypatch, capfd):
    monkeypatch.setattr(processes, "launcher", os.getppid)
    with pytest.raises(TrainingInterrupted, match=r"step 3 of 4.*checkpoint-3: to go on") as stopped:
        orphan().train()
    assert stopped.value.number == signal.SIGTERM
    assert "The launcher has ended: saving a checkpoint" in capfd.readouterr().err


def test_the_end_of_a_shell_is_nobodys_business(orphan, monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):  # exported by hand, or left by another launcher
        monkeypatch.setenv(name, "no")
    trainer = orphan()
    trainer.train()
    assert trainer.state.global_step == 4


def test_launchers_are_known_by_what_they_run(tmp_path):
    # In place of the real ones, which take seconds to start: what starts a child, tells its id, and waits.
    code = "import subprocess; print(subprocess.Popen(['sleep', '30']).pid, flush=True); input()"
    (tmp_path / "torch" / "distributed").mkdir(parents=True)
    for package in ("torch", "torch/distributed"):
        (tmp_path / package / "__init__.py").touch()
    for name in ("accelerate", "torchrun", "train.py", "torch/distributed/run.py"):
        (tmp_path / name).write_text(code)
    python, is_launcher = sys.executable, {}
    for command in (
        [python, "accelerate", "launch", "train.py"], [python, str(tmp_path / "torchrun"), "train.py"],
        [python, "-u", "-m", "torch.distributed.run", "train.py"], [python, "train.py", "accelerate"],
        ["sh", "-c", 'sleep 30 & echo "$!"; read line', "accelerate", "launch"],
    ):  # fmt: skip
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=tmp_path, **pipes) as parent:
            child = int(parent.stdout.readline())
            is_launcher[" ".join(command[-2:])] = launcher(child) == parent.pid
            os.kill(child, signal.SIGKILL)
            parent.communicate("\n")
    assert list(is_launcher.values()) == [True, True, True, False, False], is_launcher


def test_resuming_a_run_that_was_complete_takes_no_further_step(pets, tmp_path):
    # Five batches: the sixth step, the last, is in the middle of the second epoch.
    complete = build(tmp_path / "out", *stepwise(pets, "--ema_decay", "0.9"))
    complete.train()
    again = build(tmp_path / "again", *stepwise(pets, "--ema_decay", "0.9"))
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    assert again.state.global_step == 6
    assert difference(weights(again), weights(complete)) == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Full disks


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_stops_the_run_and_leaves_what_was_there(pets, tmp_path, file):
    # In place of a disk, a limit on the size of a file: the system's own errors, in a process of its own.
    script = tmp_path / "fill.py"
    script.write_text(f"""
import resource, sys
from tiny_images import build
from transformers import TrainerCallback
from pathlib import Path
from startup.status import run_command_line

class Fill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            size = Path(args.output_dir, "checkpoint-2", {file!r}).stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 4096, size - 4096))

def main():
    trainer = build(*sys.argv[1:])
    trainer.add_callback(Fill())
    trainer.train()

sys.exit(run_command_line(main))
""")
    run = start_script([script, tmp_path / "out", *stepwise(pets)], tmp_path, tmp_path / "log")
    assert run.wait() == 1, run.printed
    error = run.printed[run.printed.index("error: ") :]
    assert error.startswith(f"error: At step 4, checkpoint-4 could not be written to {tmp_path / 'out'}: ")
    assert "checkpoint-2: to go on, add --resume_from_checkpoint True" in error
    assert "Traceback" not in run.printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-2", "_lock"}  # until the process ends
    assert files.damage(tmp_path / "out" / "checkpoint-2") is None


def test_a_disk_with_no_room_for_a_checkpoint_is_told_before_the_first_step(pets, tmp_path, monkeypatch):
    trainer = build(tmp_path / "out", *stepwise(pets))
    expected = 3 * sum(weight.nbytes for weight in trainer.model.parameters())  # AdamW has two numbers for each
    assert trainer.run_folder.checkpoint_size == expected
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, expected - 1))
    with pytest.raises(InputError, match=r"are free in .*--save_strategy no"):
        trainer.train()
    assert trainer.state.global_step == 0


# ---------------------------------------------------------------------------------------------------------------------
# Sick steps


@pytest.mark.parametrize("is_skipped", [False, True], ids=["at once", "one step later"])
@pytest.mark.parametrize("clip", ["0", "1"])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_sick_step_is_told_with_all_its_images_and_never_reaches_the_weights(
    pets, tmp_path, kind, clip, is_skipped, monkeypatch
):
    if is_skipped:  # as on a GPU: torch's fused optimizers can leave out a step on a CPU too
        monkeypatch.setattr(trainer_overrides, "skipping_optimizer", lambda trainer: trainer.optimizer.optimizer)
    more = ["--gradient_accumulation_steps", "2", "--max_grad_norm", clip, "--max_steps", "9"]
    more += ["--save_steps", "3" if is_skipped else "1"]  # nothing is saved before a step is known to be healthy
    trainer = build(tmp_path / "out", *flags(pets, *more, "--save_strategy", "steps"))
    healthy, calls, files = trainer.model.loss_function, [], []

    def sick(*args, **kwargs):
        loss = healthy(*args, **kwargs)
        if not trainer.model.training:  # the try before the first step
            return loss
        calls.append(weights(trainer))
        if len(calls) == 3:  # the first batch of the second step
            files.extend(trainer.step_guard._names(torch.cat(trainer.step_guard.last_keys)))
            if kind == "loss":
                return loss * float("inf")
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    trainer.model.loss_function = sick
    told = "The loss is inf" if kind == "loss" else "The gradient's norm is nan"
    then = "No checkpoint was saved yet" if is_skipped else "checkpoint-1: to go on"
    with pytest.raises(TrainingStopped, match=f"{told} at step 2 of 9(?s:.*){then}") as stopped:
        trainer.train()
    assert not multiprocessing.active_children()  # no reader waits for the garbage collector
    assert len(files) == len(set(files)) == 8
    assert all(file in str(stopped.value) and Path(file).is_file() for file in files)
    assert difference(weights(trainer), calls[2]) == 0.0
    assert len(calls) == (5 if is_skipped else 4)  # 5: an epoch, which ends with one batch


# ---------------------------------------------------------------------------------------------------------------------
# Broken images


def break_some(folder, count):
    files = sorted(Path(folder).rglob("*.png"))[::5][:count]
    for file in files:
        file.write_bytes(b"broken")
    return files


def test_broken_images_are_replaced_alike_for_any_workers_and_after_resumption(pets, tmp_path, capsys):
    data = [pets, "--validation_dir", str(class_folders(tmp_path / "held out"))]
    files = break_some(pets, 3)
    more = ["--train_dir", *data, "--verify_images", "False", "--max_broken_images", "3", "--max_steps", "9"]
    more += ["--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "4", "--save_total_limit", "9"]
    runs = {}
    for workers in ("0", "2"):
        runs[workers] = build(tmp_path / workers, *more, "--dataloader_num_workers", workers)
        runs[workers].train()
        told = [line for line in capsys.readouterr().err.splitlines() if "broken image" in line]
        assert len(told) == 3
        assert all(sum(str(file) in line for line in told) == 1 for file in files)
        assert len(runs[workers].step_guard.broken_images) == 3
    resumed = build(tmp_path / "again", *more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "0" / "checkpoint-4"))
    for run in (runs["2"], resumed):
        assert difference(weights(run), weights(runs["0"])) == 0.0
    assert resumed.step_guard.broken_images == runs["0"].step_guard.broken_images
    known = json.loads((tmp_path / "0" / "checkpoint-4" / "run.json").read_text())["broken_images"]
    told = [line for line in capsys.readouterr().err.splitlines() if "broken image" in line]
    assert len(told) == 3 - len(known)  # what the checkpoint knows is not told again


@pytest.mark.parametrize(("limit", "told"), [("0", "--max_broken_images N"), ("1", "more than --max_broken_images 1")])
def test_one_broken_image_too_many_stops_the_run(pets, tmp_path, limit, told):
    data = [pets, "--validation_dir", str(class_folders(tmp_path / "held out"))]
    files = break_some(pets, 2)
    more = ["--verify_images", "False", "--max_broken_images", limit, "--dataloader_num_workers", "1"]
    with pytest.raises(TrainingStopped, match=told) as stopped:
        build(tmp_path / "out", "--train_dir", *data, *more).train()
    assert sum(str(file) in str(stopped.value) for file in files) == int(limit) + 1
    assert "Traceback" not in str(stopped.value)


def test_nothing_takes_the_place_of_a_held_out_image(pets, tmp_path):
    held_out = str(class_folders(tmp_path / "held out"))
    (file,) = break_some(held_out, 1)
    more = ["--validation_dir", held_out, "--verify_images", "False", "--max_broken_images", "9"]
    with pytest.raises(ImageDecodeError, match="no other can take its place: repair or remove it") as caught:
        build(tmp_path / "out", "--train_dir", pets, *more).evaluate()
    assert str(file) in str(caught.value)


def test_a_reader_that_is_killed_is_told_so(pets, tmp_path):
    trainer = build(tmp_path / "out", *flags(pets, "--dataloader_num_workers", "1"))
    read = trainer.train_dataset._example
    trainer.train_dataset._example = lambda *image: (
        os.kill(os.getpid(), signal.SIGKILL) if int(trainer.train_dataset._epoch) == 1 else read(*image)
    )
    with pytest.raises(
        TrainingStopped, match=r"reads images (was killed by the system|ended).*--dataloader_num_workers \(1 now"
    ):
        trainer.train()
