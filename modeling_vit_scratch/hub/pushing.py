# SPDX-License-Identifier: Apache-2.0
"""Pushes a training run to the Hub, without the tokens, paths, pickles and logs that the stock Trainer pushes."""

import contextlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import get_token
from transformers import TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy

from ..common.errors import InputError
from ..common.files import MANIFEST, latest_whole
from .commit import Remote, commit, look_up, prepare
from .contents import Upload, collect, leaks_in, prepare_card, without_leaks


# Prefix of the folders with the files of a push until it is done: training may remove the checkpoint meanwhile.
_COPIES = "_upload-"


class HubPusher:
    """
    The pushes of a run, in its first process; to transformers' Trainer it is a `PushInProgress`. Each is one commit, in
    a thread of its own during training. One that fails is a warning; the next one has it all.
    """

    def __init__(
        self, arguments: TrainingArguments, log: Callable[[str], None], on_push_begin: Callable[[], None],
        copy_model: Callable[[Path, Path], None],
    ) -> None:  # fmt: skip
        self.arguments, self.log, self.on_push_begin, self.copy_model = arguments, log, on_push_begin, copy_model
        self.folder = Path(arguments.output_dir)
        self.remote: Remote | None = None
        self._thread: threading.Thread | None = None
        self._pushed: set[str] = set()  # names of the checkpoints that are on the Hub
        self._unpushed: Path | None = None  # the latest checkpoint, until its push has succeeded

    def prepare(self) -> str:
        """Creates the repository and its branch, if they don't exist, and returns the repository's id."""
        for leftover in self.folder.glob(f"{_COPIES}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        name = self.arguments.hub_model_id or self.folder.absolute().name
        try:
            self.remote = prepare(name, self.arguments.hub_private_repo, self.arguments.hub_revision)
        except InputError as error:
            raise InputError(f"--push_to_hub to {name}: {error}") from error
        return self.remote.repo_id

    def describe(self) -> str | None:
        if self.remote is None:
            return None
        is_at_the_end = self.arguments.hub_strategy == HubStrategy.END or self.arguments.save_strategy == "no"
        when = "at the end" if is_at_the_end else "at every save and at the end"
        who = "only you and who you allow can" if self.remote.private else "everybody can"
        has_model = "config.json" in self.remote.files
        before = f" The model that is there stays in its history: {self.remote.head[:7]}." if has_model else ""
        branch = f", branch {self.remote.revision}" if self.remote.revision else ""
        return f"Pushed to {self.remote.repo_id}{branch}, which {who} read, {when}.{before}"

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Pushes copies of a whole checkpoint in the background, as --hub_strategy and --hub_always_push say."""
        if self.arguments.hub_strategy == HubStrategy.END:
            return
        self._unpushed = checkpoint
        if not self.is_done() and not self.arguments.hub_always_push:
            return  # the next push has it all
        self.on_push_begin()
        message = f"Training in progress, step {checkpoint.name.removeprefix('checkpoint-')}"
        copies = Path(tempfile.mkdtemp(prefix=_COPIES, dir=self.folder))
        try:
            model = copies / "model"
            self.copy_model(checkpoint, model)
            # With weights that are sharded over processes, a checkpoint is to resume from and no model.
            uploads = collect(model)[0] if any(model.glob("model*.safetensors")) else []
            waiting = self._waiting_checkpoints(checkpoint)
            for source, name in waiting.items():
                link_folder(source, copies / source.name)
                uploads += checkpoint_uploads(copies / source.name, name)
        except OSError as error:  # e.g. a full disk: no reason to stop
            shutil.rmtree(copies, ignore_errors=True)
            self.log(f"warning: not pushed ({message}): {error}. Training goes on.")
            return
        names = {source.name for source in (*waiting, checkpoint)}
        self._thread = threading.Thread(
            target=self._push_copies, args=(self._thread, copies, uploads, names, message), daemon=True
        )
        self._thread.start()

    def _waiting_checkpoints(self, latest: Path) -> dict[Path, str]:
        """The checkpoints that belong to the next push, with their names in the repository."""
        if self.arguments.hub_strategy == HubStrategy.CHECKPOINT:
            return {} if latest.name in self._pushed else {latest: "last-checkpoint"}
        if self.arguments.hub_strategy != HubStrategy.ALL_CHECKPOINTS:
            return {}
        waiting = {path: path.name for path in self.folder.glob("checkpoint-*") if path.name not in self._pushed}
        return {path: name for path, name in waiting.items() if (path / MANIFEST).is_file()}

    def _push_copies(
        self, before: threading.Thread | None, copies: Path, uploads: list[Upload], names: set[str], message: str
    ) -> None:
        """In a thread of its own: whatever goes wrong is a warning, and stops nothing."""
        if before is not None:
            before.join()
        try:
            self._commit(uploads, message)
        except Exception as error:
            self.log(f"warning: not pushed ({message}): {error} Training goes on; the next push has it all.")
        else:
            self._pushed |= names
            if self._unpushed is not None and self._unpushed.name in names:
                self._unpushed = None
        finally:
            shutil.rmtree(copies, ignore_errors=True)

    def is_done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def wait_until_done(self) -> None:
        if not self.is_done():
            self.log(f"Waiting for the push to {self.remote.repo_id} that is under way.")
            self._thread.join()

    def push_unpushed(self) -> None:
        """Pushes the latest checkpoint of a run that stops, if it is not on the Hub. Ctrl-C ends the waiting."""
        with contextlib.suppress(KeyboardInterrupt):
            self.wait_until_done()
            if self._unpushed is not None and self._unpushed.is_dir():
                self.push_checkpoint(self._unpushed)
                self.wait_until_done()

    def push_model(self, message: str) -> str:
        """Pushes the finished model in the folder, with its card, record and figures; returns the commit's URL."""
        self.wait_until_done()
        architecture = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        card, lines = prepare_card(self.folder, architecture, self.remote.repo_id, (None,) * 3)
        uploads, _ = collect(self.folder, card=card)
        latest, _ = latest_whole(self.folder)
        for source, name in self._waiting_checkpoints(latest).items() if latest else ():
            uploads += checkpoint_uploads(source, name)
        again = f"python scripts/publish.py {self.folder} {self.remote.repo_id} --yes"
        again += f" --revision {self.arguments.hub_revision}" if self.arguments.hub_revision else ""
        again += " --private" if self.arguments.hub_private_repo else ""
        try:
            url = self._commit(uploads, message)
        except InputError as error:
            again += " --license NAME" if any("licence" in line for line in lines) else ""
            raise InputError(
                f"Not pushed: {error}\nThe model is saved in {self.folder}. To publish it: {again}"
            ) from error
        for line in lines:
            self.log(f"warning: {line}")
        if lines:
            self.log(f"To publish it again: {again}")
        self.log(f"Pushed to {url}")
        return url

    def _commit(self, uploads: list[Upload], message: str) -> str:
        if leaks := leaks_in(uploads, get_token()):
            raise InputError(" ".join(leaks))
        # Looked at again: the last push may have removed what was there before.
        return commit(look_up(self.remote.repo_id, self.arguments.hub_revision), uploads, message, strict=False)


def checkpoint_uploads(folder: Path, name: str) -> list[Upload]:
    """All files of a checkpoint to resume from. Its JSON files keep their sizes, which are in its manifest."""
    uploads = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        path = f"{name}/{file.relative_to(folder).as_posix()}"
        if file.suffix == ".json":
            content = file.read_bytes()
            uploads.append(Upload(path, without_leaks(content.decode()).encode().ljust(len(content))))
        elif file.name != TRAINING_ARGS_NAME:
            uploads.append(Upload(path, file))
    return uploads


def link_folder(folder: Path, target: Path) -> None:
    """Copies a folder, with hard links where the file system has them."""

    def link_or_copy(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # a file system without links
            shutil.copy2(source, target)

    shutil.copytree(folder, target, copy_function=link_or_copy)
