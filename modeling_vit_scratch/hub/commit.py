# SPDX-License-Identifier: Apache-2.0
"""A repository on the Hub: its state, and commits that are made completely or not at all."""

import contextlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, get_token, is_offline_mode
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from ..common.errors import InputError
from ..configuration_vit_scratch import ViTScratchConfig
from .contents import CHECKPOINT, OUTDATED, Upload


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
