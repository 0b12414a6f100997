# SPDX-License-Identifier: Apache-2.0
"""
A repository on the Hub: its state, commits that are made completely or not at all, and the pushes of a training run,
without the tokens, paths, pickles and logs that the stock Trainer pushes.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, get_token, is_offline_mode
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from ..common.errors import InputError
from ..common.files import MANIFEST, latest_whole
from ..configuration_vit_scratch import ViTScratchConfig
from .contents import CHECKPOINT, OUTDATED, Upload, collect, leaks_in, prepare_card, without_leaks


if TYPE_CHECKING:  # scripts/publish.py starts without it
    from transformers import TrainingArguments


# Attempts at a commit when the connection is lost, and seconds between them.
ATTEMPTS = 3
WAIT = 2.0
# The folder of a Space's code, which marks a Space as ours, or this file; and the files of a new repository.
PAGE, EXPORT = "page", "export.json"
_EMPTY = {".gitattributes", "README.md", "LICENSE"}
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token with the role write (hf.co/settings/tokens)."


class ConnectionLost(InputError):
    """The Hub can't be reached or fails: the same request may work later."""


@dataclass(frozen=True)
class Remote:
    """The state of a repository, as far as this user can see it."""

    repo_id: str
    exists: bool = False
    private: bool | None = None
    revision: str | None = None  # the branch; None for main
    head: str | None = None  # its latest commit; None if there is no such branch
    files: tuple[str, ...] = ()
    repo_type: str = "model"  # or "space"

    def outdated(self, uploads: list[Upload]) -> list[str]:
        """Files of an earlier version that a commit removes: weights and pickles of a model, code of a Space."""
        new = {upload.path for upload in uploads}
        folders = f"{PAGE}|onnx|examples" if EXPORT in self.files else PAGE
        pattern = re.compile(f"({folders})/.*") if self.repo_type == "space" else OUTDATED
        is_whole = self.repo_type == "space" or "config.json" in new
        return [path for path in self.files if is_whole and pattern.fullmatch(path) and path not in new]


def check_can_publish(name: str) -> None:
    """Raises InputError for an invalid name of a repository, without a token, and in offline mode. Asks no Hub."""
    with _explained(name):
        validate_repo_id(name)
        if get_token() is None:
            raise errors.LocalTokenNotFoundError
        if is_offline_mode():
            raise errors.OfflineModeIsEnabled


def look_up(repo_id: str, revision: str | None = None, repo_type: str = "model") -> Remote:
    """As `_look_up`; asks again when the connection is lost."""
    for number in range(1, ATTEMPTS):
        with contextlib.suppress(ConnectionLost):
            return _look_up(repo_id, revision, repo_type)
        time.sleep(WAIT * number)
    return _look_up(repo_id, revision, repo_type)


def _look_up(repo_id: str, revision: str | None, repo_type: str) -> Remote:
    """Raises InputError if the repository holds something else than a model or Space of this library."""
    api = HfApi()
    with _explained(repo_id):
        try:
            info = api.repo_info(repo_id, repo_type=repo_type)
        except errors.RepositoryNotFoundError:
            return Remote(repo_id, revision=revision, repo_type=repo_type)
        files = tuple(file.rfilename for file in info.siblings or ())
        if repo_type == "space":
            is_ours = EXPORT in files or any(path.startswith(f"{PAGE}/") for path in files) or set(files) <= _EMPTY
            kind = None if is_ours else "another app"
        elif "config.json" in files:
            config = json.loads(Path(api.hf_hub_download(repo_id, "config.json", revision=info.sha)).read_text("utf-8"))
            kind = config.get("model_type") if isinstance(config, dict) else None
        else:
            others = {path for path in files if not CHECKPOINT.match(path)}
            kind = None if others <= _EMPTY else "no config.json"
        if kind not in (None, ViTScratchConfig.model_type):
            raise InputError(
                f"{repo_id} exists and holds something else ({kind}). Nothing was changed. Choose another name."
            )
        remote = Remote(repo_id, True, info.private, revision, info.sha, files, repo_type)
        if revision is None:
            return remote
        try:
            info = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
        except errors.RevisionNotFoundError:
            return replace(remote, head=None)
        return replace(remote, head=info.sha, files=tuple(file.rfilename for file in info.siblings or ()))


def find_model(model: str) -> ModelInfo:
    """Any model on the Hub. Raises InputError if this user can see none of that name."""
    with _explained(model):
        return HfApi().model_info(model)


def check_permission(repo_id: str, repo_type: str = "model") -> None:
    """Raises InputError if this machine's token may not write to an existing repository. Changes nothing."""
    with _explained(repo_id):
        HfApi().auth_check(repo_id, repo_type=repo_type, write=True)


def prepare(
    name: str, private: bool | None = None, revision: str | None = None, create_pr: bool = False,
    repo_type: str = "model", space_sdk: str = "gradio",
) -> Remote:  # fmt: skip
    """The repository to commit to, NAME or USER/NAME, and its branch, which are created if they don't exist."""
    check_can_publish(name)
    api = HfApi()
    with _explained(name):
        user = api.whoami()["name"]
    repo_id = name if "/" in name else f"{user}/{name}"
    remote = look_up(repo_id, revision, repo_type)
    with _explained(repo_id):
        if not remote.exists:
            sdk = space_sdk if repo_type == "space" else None
            api.create_repo(repo_id, private=private, repo_type=repo_type, space_sdk=sdk)
            remote = look_up(repo_id, revision, repo_type)
        elif private and not remote.private:
            raise InputError(
                f"{repo_id} exists and everybody can read it. Make it private on its settings page first, choose "
                "another name, or don't ask for a private one."
            )
        elif not create_pr:
            check_permission(repo_id, repo_type)
        if remote.head is None:
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
            remote = look_up(repo_id, revision, repo_type)
    return remote


def commit(remote: Remote, uploads: list[Upload], message: str, create_pr: bool = False, strict: bool = True) -> str:
    """
    Publishes files in one commit, or as a pull request, and returns its URL; outdated files are removed. If `strict`,
    refuses when somebody else has committed since `remote` was looked up.
    """
    disable_progress_bars()  # here: libraries that were imported meanwhile may have enabled them
    api, outdated = HfApi(), remote.outdated(uploads)
    branch = {"repo_type": remote.repo_type, "revision": remote.revision}
    options = {"create_pr": create_pr, "parent_commit": remote.head if strict and not create_pr else None}
    for number in range(1, ATTEMPTS + 1):
        # New objects for each attempt: they remember what they have uploaded.
        operations = [CommitOperationAdd(upload.path, upload.content) for upload in uploads]
        operations += [CommitOperationDelete(path) for path in outdated]
        try:
            with _explained(remote.repo_id):
                info = api.create_commit(remote.repo_id, operations, commit_message=message, **options, **branch)
            return str(info.pr_url if create_pr else info.commit_url)
        except ConnectionLost as error:
            # A pull request may have been opened even if the response was lost: never open a second one.
            if create_pr:
                raise ConnectionLost(f"{error} Look among the pull requests before you try again.") from error
            if number == ATTEMPTS:
                raise ConnectionLost(
                    f"{error} Tried {ATTEMPTS} times. If {remote.repo_id} does not show the commit, nothing was "
                    "changed: a commit publishes all files or none."
                ) from error
        time.sleep(WAIT * number)
        with contextlib.suppress(ConnectionLost), _explained(remote.repo_id):
            latest = api.list_repo_commits(remote.repo_id, **branch)[0]
            if latest.commit_id != remote.head and latest.title == message:  # only the response was lost
                folder = "spaces/" if remote.repo_type == "space" else ""
                return f"{api.endpoint}/{folder}{remote.repo_id}/commit/{latest.commit_id}"
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns errors of huggingface_hub into InputError with one readable message."""
    try:
        yield
    # HTTPError is that of the HTTP library below; an upload of a large file wraps the error in a RuntimeError.
    except (errors.HTTPError, OSError, RuntimeError, errors.HFValidationError) as error:
        explanation = _explain(name, error.__cause__ if isinstance(error, RuntimeError) else error)
        if explanation is None:
            raise
        raise explanation from error


def _explain(name: str, error: BaseException | None) -> InputError | None:
    status, answer = None, ""
    if isinstance(error, errors.HfHubHTTPError):
        status, answer = error.response.status_code, (error.server_message or "").strip().rstrip(".")
        answer = f" ({answer})" if answer else ""
    if isinstance(error, errors.HFValidationError):
        message = f"{name} is no name for a repository. Give USER/NAME: letters, digits, '-', '_' and '.', at most 96."
    elif isinstance(error, errors.LocalTokenNotFoundError) or (status == 401 and get_token() is None):
        message = f"There is no token for the Hub on this machine. {_LOG_IN}"
    elif isinstance(error, errors.OfflineModeIsEnabled):
        message = "HF_HUB_OFFLINE is set. Unset it to publish."
    elif status == 401:
        message = f"The Hub does not accept the token of this machine{answer}. {_LOG_IN}"
    elif status == 403:
        message = (
            f"The token of this machine may not write to {name}{answer}. Use a token with the role write, choose a "
            "name of your own, or ask the organization."
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        message = f"There is no repository {name} that the token of this machine may see. {_LOG_IN}"
    elif isinstance(error, errors.RevisionNotFoundError):
        message = f"{name} has no such branch or commit."
    elif status in (409, 412):
        message = f"{name} was changed by somebody else meanwhile{answer}. Look at the change, then run this again."
    elif status is not None and (status == 429 or status >= 500):
        return ConnectionLost(f"The Hub answers {status}{answer}.")
    elif status is not None:
        message = f"The Hub refuses {name} with {status}{answer}."
    elif isinstance(error, (errors.HTTPError, ConnectionError, TimeoutError, errors.LocalEntryNotFoundError)):
        reason = str(error).strip().rstrip(".") or type(error).__name__
        return ConnectionLost(f"The connection to the Hub was lost ({reason}).")
    else:
        return None
    return InputError(message)


# --- The pushes of a run ----------------------------------------------------------------------------------------------


# Prefix of the folders with the files of a push until it is done: training may remove the checkpoint meanwhile.
_COPIES = "_upload-"


class HubPusher:
    """
    The pushes of a run, in its first process; to transformers' Trainer it is a `PushInProgress`. Each is one commit, in
    a thread of its own during training. One that fails is a warning; the next one has it all.
    """

    def __init__(
        self, arguments: "TrainingArguments", log: Callable[[str], None], on_push_begin: Callable[[], None],
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
        is_at_the_end = self.arguments.hub_strategy == "end" or self.arguments.save_strategy == "no"
        when = "at the end" if is_at_the_end else "at every save and at the end"
        who = "only you and who you allow can" if self.remote.private else "everybody can"
        has_model = "config.json" in self.remote.files
        before = f" The model that is there stays in its history: {self.remote.head[:7]}." if has_model else ""
        branch = f", branch {self.remote.revision}" if self.remote.revision else ""
        return f"Pushed to {self.remote.repo_id}{branch}, which {who} read, {when}.{before}"

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Pushes copies of a whole checkpoint in the background, as --hub_strategy and --hub_always_push say."""
        if self.arguments.hub_strategy == "end":
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
        if self.arguments.hub_strategy == "checkpoint":
            return {} if latest.name in self._pushed else {latest: "last-checkpoint"}
        if self.arguments.hub_strategy != "all_checkpoints":
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
        elif file.name != "training_args.bin":
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
