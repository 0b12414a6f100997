# SPDX-License-Identifier: Apache-2.0
"""
Folders of checkpoints that are whole or not there: how one gets its name, which one is whole, what is left of others.

A checkpoint is written in a folder that nobody takes for one, reaches the disk, and only then gets its name, by a
renaming that happens or does not. The last file in it, run.json, has the size of every other one: a checkpoint that was
damaged afterwards is known by it. It also has what decides the numbers of the run (see `differences`).
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState

from ..common.files import sync_file, sync_folder, sync_tree


MANIFEST = "run.json"
STATE = "trainer_state.json"
# Where things are until they are complete. The search for checkpoints does not see it, and uploads leave out "_*".
STAGING = "_partial"


def find_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a folder, whole or not, the latest step first."""
    if not Path(output_dir).is_dir():
        return []
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).iterdir()]
    steps = [(int(match[1]), path) for match, path in found if match and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def damage(checkpoint: str | os.PathLike[str]) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    folder = Path(checkpoint)
    if not (folder / STATE).is_file():
        return f"it has no {STATE}"
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}, which is written last"
    try:
        sizes = read_manifest(folder)["files"]
    except (ValueError, KeyError):
        return f"{MANIFEST} can't be read"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} of {size:,} bytes"
    return None


def latest_whole(output_dir: str | os.PathLike[str]) -> tuple[Path | None, dict[Path, str]]:
    """The latest checkpoint that is whole, or None; and what is wrong with each one after it."""
    passed_over: dict[Path, str] = {}
    for checkpoint in find_checkpoints(output_dir):
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint, passed_over
        passed_over[checkpoint] = reason
    return None, passed_over


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Makes a checkpoint whole: everything in it reaches the disk, then run.json with the sizes and the facts."""
    sync_tree(folder)
    files = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=2), encoding="utf-8")
    sync_file(folder / MANIFEST)
    sync_folder(folder)


def read_manifest(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_manifest` has written; nothing for a checkpoint of another program."""
    file = Path(checkpoint, MANIFEST)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"files": {}}


def publish(staged: Path, checkpoint: Path) -> None:
    """Gives a complete folder its name. One of the same step, e.g. from before an evaluation, makes way."""
    if checkpoint.exists():
        discard(checkpoint)
    os.replace(staged, checkpoint)
    sync_folder(checkpoint.parent)


def publish_files(staged: Path, folder: Path) -> None:
    """Puts complete files into a folder, each at once: config.json, which makes the folder a model, comes last."""
    sync_tree(staged)
    for file in sorted(staged.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)
    sync_folder(folder)
    shutil.rmtree(staged)


def rotate(output_dir: Path, limit: int | None, keep: set[str]) -> None:
    """Removes the checkpoints of the lowest steps until there are no more than `limit`; those to keep always stay."""
    if not limit or limit < 1:
        return
    others = [checkpoint for checkpoint in find_checkpoints(output_dir) if str(checkpoint) not in keep]
    for checkpoint in others[max(0, limit - len(keep)) :]:
        discard(checkpoint)


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint. It loses its name first: a kill in the middle leaves nothing that looks like one."""
    grave = checkpoint.parent / STAGING / "removed"
    grave.parent.mkdir(exist_ok=True)
    shutil.rmtree(grave, ignore_errors=True)
    os.replace(checkpoint, grave)
    shutil.rmtree(grave)


def remove_leftovers(output_dir: str | os.PathLike[str]) -> bool:
    """Removes what a run that was killed had not finished. Returns whether there was something."""
    staging = Path(output_dir, STAGING)
    had_some = staging.is_dir() and any(staging.iterdir())
    shutil.rmtree(staging, ignore_errors=True)
    return had_some


def set_best_checkpoint(staged: Path, state: TrainerState, checkpoint: Path) -> None:
    """What is written about the best checkpoint, if it is this one: its name to be."""
    state.best_model_checkpoint = str(checkpoint)
    if (staged / STATE).is_file():
        state.save_to_json(str(staged / STATE))


# ---------------------------------------------------------------------------------------------------------------------
# What decides the numbers of a run


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each setting that a resumed run has and the first one had otherwise."""
    before, now = (json.loads(json.dumps(settings)) for settings in (before, now))  # a tuple comes back as a list
    if before.pop("--lamb", False):  # as --optim lamb was once given
        before["--optim"] = "lamb"
    return [
        f"{name}: {_shown(now.get(name))} now, {_shown(before.get(name))} in the checkpoint's run"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
