# SPDX-License-Identifier: Apache-2.0
"""
The stock Trainer's pushes to the Hub, with what it leaves in them taken out: tokens, local paths, pickles, logs.

Each push is one commit. One during training happens beside it; if it fails, that is told, and the next one has it all.
"""

import contextlib
import json
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, TrainOutput

from ..common.errors import InputError, TrainingInterrupted, TrainingStopped
from ..hub.checks import prepare_card
from ..hub.commit import Remote, commit, look_up, prepare
from ..hub.contents import Upload, collect, leaks_in
from ..hub.privacy import shareable, without_leaks
from .run_folder import latest_whole
from .safe_trainer import SafeTrainer


TRAINING_ARGUMENTS = "training_args.json"
# Where the files of a push are until it is done: training may remove the checkpoint meanwhile.
_COPIES = "_upload-"
_MODEL = "model"


class PushingTrainer(SafeTrainer):
    """See the module."""

    remote: Remote | None = None
    # What uploads, and the steps whose checkpoints are on the Hub or are not there yet.
    _push: threading.Thread | None = None
    _unpushed: Path | None = None

    def init_hf_repo(self) -> None:
        """
        Makes sure that there is a repository to push to, before training; with --hub_revision if there is no such
        branch.

        Raises:
            InputError: if this user may not push there, or if the repository holds something else.
        """
        if not self.is_world_process_zero():
            return
        for leftover in Path(self.args.output_dir).glob(f"{_COPIES}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._pushed: set[str] = set()
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        try:
            self.remote = prepare(name, self.args.hub_private_repo, self.args.hub_revision)
        except InputError as error:
            raise InputError(f"--push_to_hub to {name}: {error}") from error
        self.hub_model_id = self.remote.repo_id

    def describe_pushes(self) -> str | None:
        """One line on where and when to, None if not at all."""
        if self.remote is None:
            return None
        when = "at the end"
        if self.args.hub_strategy != HubStrategy.END and self.args.save_strategy != "no":
            when = "at every save and at the end"
        who = "only you and who you allow can" if self.remote.private else "everybody can"
        before = (
            f" The model that is there stays in its history: {self.remote.head[:7]}." if self.remote.has_model else ""
        )
        branch = f", branch {self.remote.revision}" if self.remote.revision else ""
        return f"Pushed to {self.hub_model_id}{branch}, which {who} read, {when}.{before}"

    # -----------------------------------------------------------------------------------------------------------------
    # No pickle with a token in it

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As in Trainer, with the arguments as JSON, without secrets and local paths, in place of a pickle of them."""
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return  # the Trainer calls this in every process
        folder = Path(output_dir or self.args.output_dir)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        self.write_arguments(folder)

    def write_arguments(self, folder: Path) -> None:
        """Writes training_args.json: every argument that is no secret."""
        arguments = shareable(self.args.to_dict())
        text = json.dumps(arguments, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / TRAINING_ARGUMENTS).write_text(text + "\n", encoding="utf-8")

    # -----------------------------------------------------------------------------------------------------------------
    # During training

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        As in Trainer, in one commit for each push, and not before the checkpoint has its name. Uploads copies, which
        stay while training goes on and removes old checkpoints.
        """
        strategy = self.args.hub_strategy
        if self.is_staging or not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        checkpoint, before = Path(checkpoint_folder), self._push
        self._unpushed = checkpoint
        if self._is_pushing() and not self.args.hub_always_push:
            return  # the next push has it all
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        folder = Path(tempfile.mkdtemp(prefix=_COPIES, dir=self.args.output_dir))
        try:
            self.copy_model(checkpoint, folder / _MODEL)
            # With weights that are sharded over processes, a checkpoint is to resume from and no model.
            is_model = any((folder / _MODEL).glob("model*.safetensors"))
            uploads = collect(folder / _MODEL)[0] if is_model else []
            waiting = self._waiting_checkpoints(checkpoint)
            for source, name in waiting.items():
                _copy(source, folder / source.name)
                uploads += whole_checkpoint(folder / source.name, name)
        except OSError as error:  # e.g. a full disk: no reason to stop
            shutil.rmtree(folder, ignore_errors=True)
            self._tell(f"warning: not pushed ({message}): {error}. Training goes on.")
            return
        names = {source.name for source in (*waiting, checkpoint)}
        self._push = threading.Thread(
            target=self._push_copies, args=(before, folder, uploads, names, message), daemon=True
        )
        self._push.start()

    def copy_model(self, checkpoint: Path, folder: Path) -> None:
        """Puts what people are to load of a checkpoint into a new folder. Takes no random numbers from training."""
        _copy(checkpoint, folder)

    def _waiting_checkpoints(self, latest: Path) -> dict[Path, str]:
        """The checkpoints that belong to the next push, with their names in the repository."""
        if self.args.hub_strategy == HubStrategy.CHECKPOINT:
            return {} if latest.name in self._pushed else {latest: "last-checkpoint"}
        if self.args.hub_strategy != HubStrategy.ALL_CHECKPOINTS:
            return {}
        folder = Path(self.args.output_dir)
        waiting = {path: path.name for path in folder.glob("checkpoint-*") if path.name not in self._pushed}
        return {path: name for path, name in waiting.items() if (path / "run.json").is_file()}

    def _push_copies(
        self, before: threading.Thread | None, folder: Path, uploads: list[Upload], names: set[str], message: str
    ) -> None:
        """In a thread of its own: whatever goes wrong is told, and stops nothing."""
        if before is not None:
            before.join()
        try:
            self._commit(uploads, message)
        except Exception as error:
            self._tell(f"warning: not pushed ({message}): {error} Training goes on; the next push has it all.")
        else:
            self._pushed |= names
            if self._unpushed is not None and self._unpushed.name in names:
                self._unpushed = None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _is_pushing(self) -> bool:
        return self._push is not None and self._push.is_alive()

    def _finish_current_push(self) -> None:
        """As in Trainer; tells that it waits."""
        if self._is_pushing():
            self._tell(f"Waiting for the push to {self.hub_model_id} that is under way.")
            self._push.join()

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in SafeTrainer. A run that has to stop pushes its latest checkpoint first; Ctrl-C ends the waiting."""
        try:
            return super().train(*args, **kwargs)
        except (TrainingInterrupted, TrainingStopped):
            if not self.save_on_signal.signals.is_urgent:
                with contextlib.suppress(KeyboardInterrupt):
                    self._finish_current_push()
                    if self._unpushed is not None and self._unpushed.is_dir():
                        self._push_from_checkpoint(str(self._unpushed))
                        self._finish_current_push()
            raise

    # -----------------------------------------------------------------------------------------------------------------
    # At the end

    def push_to_hub(self, commit_message: str = "End of training") -> str | None:
        """
        Saves the model and pushes it with everything that belongs to it: card, record, figures.

        Returns:
            The URL of the commit; None in all processes but the first.

        Raises:
            InputError: if the push fails. The model is saved then.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        folder = Path(self.args.output_dir)
        architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        card, lines = prepare_card(folder, architecture, self.hub_model_id, license=None)
        uploads = [card if upload.path == "README.md" and card else upload for upload in collect(folder)[0]]
        latest, _ = latest_whole(folder)
        for source, name in self._waiting_checkpoints(latest).items() if latest else ():
            uploads += whole_checkpoint(source, name)
        again = f"python scripts/publish.py {folder} {self.hub_model_id} --yes"
        again += f" --revision {self.args.hub_revision}" if self.args.hub_revision else ""
        again += " --private" if self.args.hub_private_repo else ""
        try:
            url = self._commit(uploads, commit_message)
        except InputError as error:
            again += " --license NAME" if any("licence" in line for line in lines) else ""
            raise InputError(f"Not pushed: {error}\nThe model is saved in {folder}. To publish it: {again}") from error
        for line in lines:
            self._tell(f"warning: {line}")
        if lines:
            self._tell(f"To publish it again: {again}")
        self._tell(f"Pushed to {url}")
        return url

    def _commit(self, uploads: list[Upload], message: str) -> str:
        leaks = leaks_in(uploads, get_token())
        if leaks:
            raise InputError(" ".join(leaks))
        # Looked at again: the last push may have removed what was there before.
        return commit(look_up(self.hub_model_id, self.args.hub_revision), uploads, message, strict=False)


def whole_checkpoint(folder: Path, name: str) -> list[Upload]:
    """
    All of a checkpoint, to resume from on another machine. Local paths and tokens in its JSON files are replaced by
    shorter words and spaces: the sizes that it remembers stay right.

    Args:
        folder: of the checkpoint.
        name: that it gets in the repository.
    """
    uploads = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        path = f"{name}/{file.relative_to(folder).as_posix()}"
        if file.suffix == ".json":
            content = file.read_bytes()
            uploads.append(Upload(path, without_leaks(content.decode()).encode().ljust(len(content))))
        elif file.name != TRAINING_ARGS_NAME:
            uploads.append(Upload(path, file))
    return uploads


def _copy(folder: Path, target: Path) -> None:
    """A folder of the same files, which takes no room where the file system has links."""
    shutil.copytree(folder, target, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
