# SPDX-License-Identifier: Apache-2.0
"""Which files of a model's folder are published, and why the others are left out. Unknown files are left out."""

import json
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files

from .. import configuration_vit_scratch, image_processing_vit_scratch, modeling_vit_scratch
from .privacy import find_leaks


# The modules that auto_map names, and whatever they import of each other: as transformers finds what it saves.
_NAMED = tuple(
    Path(module.__file__) for module in (configuration_vit_scratch, image_processing_vit_scratch, modeling_vit_scratch)
)
CODE = tuple(sorted({*_NAMED, *(Path(file) for named in _NAMED for file in get_relative_import_files(named))}))
# A commit removes weights of earlier versions and of other libraries, which a loader may prefer, and the pickle of the
# stock Trainer, which contains its token.
OUTDATED = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|training_args\.bin")
# Where checkpoints to resume from are, here or in a repository.
CHECKPOINT = re.compile(r"(checkpoint-\d+|last-checkpoint)/")

_MODEL_FILES = {
    "config.json", "preprocessor_config.json", "README.md", "LICENSE", "NOTICE", "results.json", "training_args.json",
}  # fmt: skip
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_FIGURES = {".png", ".jpg", ".jpeg", ".svg", ".webp"}
# A picture in a card, in Markdown or HTML.
_SHOWN = re.compile(r"""!\[[^\]]*\]\(\s*<?([^)\s>]+)|<img\b[^>]*?\bsrc\s*=\s*["']([^"']+)""")
# Files without text, which may be large.
_BINARY = _FIGURES - {".svg"} | {".pt", ".pth", ".bin", ".distcp"}
# Subfolders with figures and records.
_FIGURE_FOLDERS = {"figures", "evaluation", "transfer"}
_REASONS = (
    (re.compile(r"(.*/)?[._].*"), "hidden or temporary"),
    (re.compile(rf"{CHECKPOINT.pattern}.*"), "a checkpoint to resume from, with the optimizer's state"),
    (re.compile(r"(.*/)?training_args\.bin"), "a pickle that may contain tokens and local paths"),
    (re.compile(r".*\.(bin|pt|pth|pkl|pickle|ckpt|joblib|npy|npz)"), "a pickle or array, not weights as safetensors"),
    (re.compile(r"(.*/)?predictions\.csv"), "names the files that were evaluated"),
    (re.compile(r"(runs|logs|wandb|mlruns)/.*|.*\.log|(.*/)?events\.out\..*"), "a log"),
    (re.compile(r"trainer_state\.json|(stream_\d+|run)\.json|average\.safetensors"), "the state of a training run"),
)


@dataclass(frozen=True)
class Upload:
    """A file to upload: its path in the repository, and a local file or its content."""

    path: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def text(self) -> str:
        """Its text: of weights the metadata, of images and optimizers nothing."""
        suffix = PurePosixPath(self.path).suffix
        if suffix in _BINARY:
            return ""
        if suffix == ".safetensors":
            try:
                with safe_open(self.content, framework="pt") as file:
                    return json.dumps(file.metadata() or {})
            except SafetensorError:  # a damaged file, which check_model reports
                return ""
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return content.decode("utf-8", errors="replace")


def collect(folder: Path, code: bool = True) -> tuple[list[Upload], dict[str, str]]:
    """
    Chooses the files of a folder to publish.

    Args:
        folder: of a model.
        code: whether to add the code files of this version, in place of the folder's own.

    Returns:
        The uploads, and the paths that are left out with the reasons. The path of a folder ends with a slash.
    """
    uploads, left_out, shown = [], {}, shown_figures(folder)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        path = file.relative_to(folder).as_posix()
        if path in {module.name for module in CODE}:
            continue
        if _is_wanted(PurePosixPath(path), shown):
            uploads.append(Upload(path, file))
        else:
            reason = next((reason for pattern, reason in _REASONS if pattern.fullmatch(path)), "no part of a model")
            left_out[path] = reason
    has_uploads = {upload.path.split("/")[0] for upload in uploads}
    left_out = {_folder_or_file(path, has_uploads): reason for path, reason in left_out.items()}
    if code:
        uploads += [Upload(module.name, module.read_bytes()) for module in CODE]
    return sorted(uploads, key=lambda upload: upload.path), left_out


def shown_figures(folder: Path) -> set[str]:
    """The local pictures that the card of a folder shows, as paths within the folder; they may not exist."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    links = {unquote(markdown or html).split("#")[0].split("?")[0] for markdown, html in _SHOWN.findall(text)}
    paths = {posixpath.normpath(link) for link in links if not re.match(r"[a-z][a-z0-9+.-]*:|/", link, re.IGNORECASE)}
    return {path for path in paths if not path.startswith("..")}


def _folder_or_file(path: str, has_uploads: set[str]) -> str:
    """The path itself, or that of its folder if nothing of the folder is published."""
    top, slash, _ = path.partition("/")
    return path if not slash or top in has_uploads else f"{top}/"


def _is_wanted(path: PurePosixPath, shown: set[str]) -> bool:
    if any(part.startswith((".", "_")) for part in path.parts):
        return False
    if path.suffix.lower() in _FIGURES and path.as_posix() in shown:
        return True
    if len(path.parts) == 1:
        return path.name in _MODEL_FILES or _WEIGHTS.fullmatch(path.name) is not None or path.suffix in _FIGURES
    return path.parts[0] in _FIGURE_FOLDERS and (
        path.suffix in _FIGURES or path.name in ("results.json", "transfer.json")
    )


def leaks_in(uploads: list[Upload], token: str | None = None) -> list[str]:
    """One line for each upload with a token or a local path. The library's own code files are not searched."""
    lines = []
    for upload in uploads:
        found = [] if upload.path.endswith(".py") else find_leaks(upload.text(), token)
        if found:
            lines.append(
                f"{upload.path} has {' and '.join(found[:3])}{' and more' if len(found) > 3 else ''}. "
                "Take it out of the file before you publish it."
            )
    return lines
