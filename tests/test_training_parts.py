# SPDX-License-Identifier: Apache-2.0
"""The parts of the trainer, each alone: step guard, run folder, Hub pusher; see test_training_optimization, too."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState
from transformers.trainer_utils import HubStrategy

from modeling_vit_scratch.common.errors import InputError, TrainingStopped
from modeling_vit_scratch.common.files import damage, find_checkpoints, read_manifest
from modeling_vit_scratch.common.processes import Processes
from modeling_vit_scratch.hub import commit as pushing
from modeling_vit_scratch.hub.commit import HubPusher
from modeling_vit_scratch.training.safety import RunFolder, StepGuard


def arguments(folder="out", **more):
    options = {
        "output_dir": str(folder), "save_total_limit": 2, "save_strategy": "steps", "should_save": True,
        "local_process_index": 0, "process_index": 0, "world_size": 1, "learning_rate": 0.1, "max_broken_images": 0,
        "hub_model_id": None, "hub_strategy": HubStrategy.EVERY_SAVE, "hub_always_push": False, "hub_revision": None,
        "hub_private_repo": None,
    }  # fmt: skip
    return SimpleNamespace(**{**options, **more})


# ---------------------------------------------------------------------------------------------------------------------
# Step guard


def guard(lines=None, processes=None, **more):
    lines = [] if lines is None else lines
    folder = SimpleNamespace(
        arguments=arguments(**more),
        processes=processes or Processes(60),
        log=lines.append,
        resume_advice=lambda: "Go on.",
    )
    return StepGuard(folder, folder.arguments.max_broken_images, lambda i: f"{i}.png")


def begin(guard, losses, indices=((0, 1), (2, 3))):
    guard.begin_step([{"keys": torch.tensor([(42, 0, index) for index in part])} for part in indices])
    for loss in losses:
        guard.add_loss(torch.tensor(loss))


@pytest.mark.parametrize(
    ("losses", "norm", "found"),
    [
        ([1.0, float("inf")], 1.0, "The loss is inf"),
        ([1.0, 2.0], float("nan"), "The gradient's norm is nan"),
        ([float("nan"), 2.0], float("inf"), "The loss is nan"),
    ],
)
def test_a_step_that_is_not_finite_is_named_with_its_images(losses, norm, found):
    checked = guard()
    begin(checked, [1.0, 2.0])
    checked.check(1, 9, torch.tensor(3.0))
    checked.stop_if_bad()
    begin(checked, losses, ((4, 5), (6,)))
    with pytest.raises(TrainingStopped, match=f"{found} at step 2 of 9(?s:.*)Go on.$") as stopped:
        checked.check(2, 9, torch.tensor(norm))
    lines = str(stopped.value).splitlines()
    assert [line.split(": ")[1] for line in lines if "batch" in line] == ["4.png, 5.png", "6.png"]
    assert stopped.value.is_shared == (norm != 1.0)  # a gradient is that of all processes
    checked.stop_if_bad()  # told once


def test_an_optimizer_that_skips_is_told_and_the_run_stops_one_step_later():
    checked, optimizer = guard(), SimpleNamespace()
    begin(checked, [float("nan")], ((0,),))
    checked.check(1, 9, torch.tensor(1.0), skipping=optimizer)
    assert optimizer.found_inf == 1.0
    begin(checked, [1.0], ((1,),))
    with pytest.raises(TrainingStopped, match=r"at step 1 of 9(?s:.*)0\.png"):
        checked.check(2, 9, torch.tensor(1.0), skipping=optimizer)


def test_a_scaler_of_float16_may_overflow_the_gradient_but_not_the_loss():
    checked = guard()
    begin(checked, [1.0, 1.0])
    checked.check(1, 9, torch.tensor(float("inf")), is_scaled=True)
    begin(checked, [1.0, float("nan")])
    with pytest.raises(TrainingStopped, match="The loss is nan") as stopped:
        checked.check(2, 9, torch.tensor(float("inf")), is_scaled=True)
    assert not stopped.value.is_shared


def test_images_that_can_not_be_read_are_counted_over_all_processes_each_once():
    class Two(Processes):
        """This process and another one, which has found image 7."""

        def maximum(self, value):
            return 1

        def gather(self, value):
            return [value, {7: "7.png is cut off"}]

    lines = []
    checked = guard(lines, Two(60), max_broken_images=2)
    checked.begin_step([{"broken": [(3, "3.png is cut off")]}, {}])
    assert (set(checked.broken_images), len(lines)) == ({3, 7}, 2)
    checked.begin_step([{"broken": [(3, "3.png is cut off")]}])
    assert len(lines) == 2
    with pytest.raises(TrainingStopped, match="3 training images can't be read, more than --max_broken_images 2"):
        checked.begin_step([{"broken": [(4, "4.png is cut off")]}])


# ---------------------------------------------------------------------------------------------------------------------
# Run folder


def run_folder(folder, lines=None, size=1000, **more):
    return RunFolder(arguments(folder, **more), Processes(60), ([] if lines is None else lines).append, size)


def save(run, step, best=None, settings=None):
    """A checkpoint as the Trainer writes one."""
    state = TrainerState(global_step=step, best_global_step=best)
    with run.new_checkpoint(state, {"settings": settings or {}, "broken_images": {}}) as folder:
        assert run.is_writing_checkpoint
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"x" * step)
        if best == step:
            state.best_model_checkpoint = str(folder)
        if run.arguments.should_save:
            state.save_to_json(str(folder / "trainer_state.json"))
    run.rotate(state)
    return state


def test_checkpoints_get_their_names_when_they_are_whole_and_old_ones_go(tmp_path):
    run = run_folder(tmp_path)
    for step in (2, 4, 6):
        state = save(run, step)
        assert not run.is_writing_checkpoint
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-4"]
    assert damage(tmp_path / "checkpoint-6") is None
    assert not run.staging.exists()
    state = save(run, 8, best=8)
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-8")
    stored = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert stored["best_model_checkpoint"] == str(tmp_path / "checkpoint-8")
    assert damage(tmp_path / "checkpoint-8") is None


def test_one_process_writes_the_state_and_the_name(tmp_path):
    # Several would write into each other's file. A process of another machine has its own disk, and its own name.
    run = run_folder(tmp_path, should_save=False, local_process_index=1)
    save(run, 4, best=4)
    assert not find_checkpoints(tmp_path)
    assert not (run.staging / "checkpoint-4" / "trainer_state.json").exists()
    elsewhere = run_folder(tmp_path / "b", should_save=False, local_process_index=0)
    save(elsewhere, 4)
    assert [path.name for path in find_checkpoints(tmp_path / "b")] == ["checkpoint-4"]


def test_what_fails_in_the_middle_leaves_no_checkpoint(tmp_path):
    run = run_folder(tmp_path)
    save(run, 2)
    state = TrainerState(global_step=4)
    message = r"At step 4, checkpoint-4 could not be written(?s:.*)checkpoint-2: to go"
    with pytest.raises(TrainingStopped, match=message), run.new_checkpoint(state, {}):
        raise OSError("No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    with pytest.raises(ZeroDivisionError), run.new_checkpoint(state, {}):
        raise ZeroDivisionError  # a bug is no full disk
    assert not run.is_writing_checkpoint


def test_a_model_moves_into_a_folder_whole(tmp_path):
    with run_folder(tmp_path).new_model(tmp_path, 3) as staged:
        staged.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (staged / name).write_text(name)
        assert not (tmp_path / "config.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_resumption_finds_the_latest_whole_checkpoint_and_compares_settings(tmp_path):
    lines = []
    run = run_folder(tmp_path, lines)
    assert (run.checkpoint_to_resume(None), run.checkpoint_to_resume(False)) == (None, None)
    assert run.resume_advice().startswith("No checkpoint was saved yet")
    with pytest.raises(InputError, match="There is no checkpoint to resume from"):
        run.checkpoint_to_resume(True)
    for step in (2, 4):
        save(run, step, settings={"--seed": 1})
    (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(b"")
    checkpoint = run.checkpoint_to_resume(True)
    assert checkpoint == str(tmp_path / "checkpoint-2")
    assert lines == [f"warning: {tmp_path}/checkpoint-4 is damaged, model.safetensors has 0 of 4 bytes. Passed over."]
    manifest = read_manifest(checkpoint)
    run.compare_settings(checkpoint, manifest, {"--seed": 1})
    assert len(lines) == 1
    run.compare_settings(checkpoint, manifest, {"--seed": 2})
    assert lines[1].endswith("\n    --seed: 2 now, 1 in the checkpoint's run")
    run.compare_settings(checkpoint, {"files": {}}, {"--seed": 2})
    assert "does not say which settings" in lines[2]


def test_what_a_killed_run_left_is_removed_and_room_is_looked_for(tmp_path, monkeypatch):
    lines = []
    run = run_folder(tmp_path, lines)
    (run.staging / "checkpoint-9").mkdir(parents=True)
    run.prepare()
    assert not run.staging.exists()
    assert lines == [f"Removed {run.staging}: unfinished files of a run that was killed."]
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2999))
    run.prepare()
    assert "the checkpoints of this run may take 0.0 MB" in lines[1]
    run_folder(tmp_path, size=10**9, save_strategy="no").prepare()
    with pytest.raises(InputError, match=r"takes about 3\.0 GB(?s:.*)--save_strategy no"):
        run_folder(tmp_path, size=3 * 10**9).prepare()


# ---------------------------------------------------------------------------------------------------------------------
# Hub pusher


@pytest.fixture
def pusher(tmp_path, monkeypatch):
    """Pushes into a list, after `release` is set; and what it printed and when it began."""
    commits, release = [], threading.Event()

    def commit(remote, uploads, message, strict):
        assert release.wait(20)
        commits.append((message, sorted(upload.path for upload in uploads)))
        return "url"

    monkeypatch.setattr(pushing, "prepare", lambda name, private, revision: SimpleNamespace(repo_id=f"me/{name}"))
    monkeypatch.setattr(pushing, "look_up", lambda *args: None)
    monkeypatch.setattr(pushing, "commit", commit)
    monkeypatch.setattr(pushing, "collect", lambda folder: ([pushing.Upload("model.safetensors", folder / "x")], {}))
    monkeypatch.setattr(pushing, "leaks_in", lambda *args: [])
    lines, begun = [], []
    made = HubPusher(arguments(tmp_path / "run"), lines.append, lambda: begun.append(1), pushing.link_folder)
    return SimpleNamespace(
        made=made, commits=commits, release=release, lines=lines, begun=begun, folder=tmp_path / "run"
    )


def checkpoint(pusher, step):
    folder = pusher.folder / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "run.json"):
        (folder / name).write_text("{}")
    return folder


def test_a_push_waits_for_none_but_the_latest_is_made_up_for(pusher):
    (pusher.folder / "_upload-old").mkdir(parents=True)
    assert pusher.made.prepare() == "me/run"
    assert not (pusher.folder / "_upload-old").exists()
    assert pusher.made.is_done()
    pusher.made.push_checkpoint(checkpoint(pusher, 2))
    pusher.made.push_checkpoint(checkpoint(pusher, 4))  # one is under way
    assert (pusher.made.is_done(), pusher.begun) == (False, [1])
    threading.Timer(0.2, pusher.release.set).start()
    pusher.made.push_unpushed()
    assert [message for message, _ in pusher.commits] == [f"Training in progress, step {step}" for step in (2, 4)]
    assert pusher.lines[0] == "Waiting for the push to me/run that is under way."
    pusher.made.push_unpushed()  # all of it is there
    assert len(pusher.commits) == 2
    assert not list(Path(pusher.folder).glob("_upload-*"))


def test_what_a_strategy_does_not_ask_for_is_not_pushed(pusher):
    pusher.made.arguments.hub_strategy = HubStrategy.END
    pusher.made.push_checkpoint(checkpoint(pusher, 2))
    pusher.made.push_unpushed()
    assert (pusher.commits, pusher.begun) == ([], [])


def test_all_checkpoints_are_pushed_once(pusher):
    pusher.release.set()
    pusher.made.prepare()
    pusher.made.arguments.hub_strategy = HubStrategy.ALL_CHECKPOINTS
    for step in (2, 4):
        pusher.made.push_checkpoint(checkpoint(pusher, step))
        pusher.made.wait_until_done()
    names = [[path for path in paths if "/" in path] for _, paths in pusher.commits]
    assert names == [[f"checkpoint-{step}/{name}" for name in ("model.safetensors", "run.json")] for step in (2, 4)]
