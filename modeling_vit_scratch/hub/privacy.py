# SPDX-License-Identifier: Apache-2.0
"""Finds and removes what must not be published: tokens, and local paths, which can name the user."""

import re
from pathlib import Path
from typing import Any


# Of Hugging Face, GitHub and Amazon.
_TOKEN = re.compile(r"\b(?:hf_(?:oauth_)?[A-Za-z0-9]{20,}|gh[a-z]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16})\b")
# Not after a letter, as in and/or, nor in a URL.
_POSIX_PATH = re.compile(r"(?<![\w./:~-])(?:file://)?/(?P<root>[\w.@+-]+)(?:/[\w.@+=-]+)+")
_WINDOWS_PATH = re.compile(r"\b[A-Za-z]:\\{1,2}(?:[\w.@+ -]+\\{1,2})+[\w.@+-]+")
_PRIVATE_ROOTS = {"Users", "Volumes", "home", "mnt", "private", "root", "scratch", "tmp"}
_COMMON_ROOTS = {"bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "proc", "sbin", "sys", "usr"}
_SECRET_NAME = re.compile(r"token|secret|password|api_?key", re.IGNORECASE)


def find_leaks(text: str, token: str | None = None) -> list[str]:
    """
    The tokens and local paths in a text.

    Args:
        text: of a file.
        token: of this user, found whatever it looks like.

    Returns:
        A description of each; of a token only its beginning.
    """
    found = [match[0] for match in _TOKEN.finditer(text)]
    if token and token in text and token not in found:
        found.append(token)
    leaks = [f"a token ({secret[:6]}...)" for secret in dict.fromkeys(found)]
    paths = [match[0] for match in _POSIX_PATH.finditer(text) if _is_of_this_machine(match["root"])]
    paths += [match[0] for match in _WINDOWS_PATH.finditer(text)]
    return leaks + [f"the local path {path}" for path in dict.fromkeys(paths)]


def without_leaks(text: str) -> str:
    """The text with TOKEN in place of each token, and each local path cut to its last part."""
    text = _TOKEN.sub("TOKEN", text)
    text = _POSIX_PATH.sub(lambda path: Path(path[0]).name if _is_of_this_machine(path["root"]) else path[0], text)
    return _WINDOWS_PATH.sub(lambda path: path[0].rsplit("\\", 1)[-1], text)


def shareable(settings: Any) -> Any:
    """Settings as JSON values, without secrets (by their names), tokens and local paths, at any depth."""
    if isinstance(settings, dict):
        return {key: shareable(value) for key, value in settings.items() if not _is_secret(str(key), value)}
    if isinstance(settings, (list, tuple)):
        return [shareable(value) for value in settings]
    if settings is None or isinstance(settings, (bool, int, float)):
        return settings
    return without_leaks(str(settings))


def _is_secret(name: str, value: Any) -> bool:
    return isinstance(value, str) and _SECRET_NAME.search(name) is not None


def _is_of_this_machine(root: str) -> bool:
    return root not in _COMMON_ROOTS and (root in _PRIVATE_ROOTS or Path("/", root).is_dir())
