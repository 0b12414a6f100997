# SPDX-License-Identifier: Apache-2.0
"""What is published of a model's folder: which files, whether they work, and no tokens and local paths in them."""

import io
import json
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from huggingface_hub import ModelCard
from PIL import ExifTags, Image
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files

from .. import configuration_vit_scratch, image_processing_vit_scratch, modeling_vit_scratch
from ..common.errors import InputError
from ..common.records import license_problem
from ..modeling_vit_scratch import ViTScratchForImageClassification


# The modules that auto_map names, and whatever they import of each other: as transformers finds what it saves.
_NAMED = tuple(
    Path(module.__file__) for module in (configuration_vit_scratch, image_processing_vit_scratch, modeling_vit_scratch)
)
CODE = tuple(sorted({*_NAMED, *(Path(file) for named in _NAMED for file in get_relative_import_files(named))}))
# A commit removes weights of earlier versions and of other libraries, which a loader may prefer, and the pickle of the
# stock Trainer, which contains its token.
OUTDATED = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|training_args\.bin")
# Folders of checkpoints to resume from, here or in a repository.
CHECKPOINT = re.compile(r"(checkpoint-\d+|last-checkpoint)/")

_MODEL_FILES = {
    "config.json", "preprocessor_config.json", "README.md", "LICENSE", "NOTICE", "results.json", "training_args.json",
    "uncertainty.json", "uncertainty.safetensors",
}  # fmt: skip
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_FIGURES = {".png", ".jpg", ".jpeg", ".svg", ".webp"}
# Files without text, which may be large.
_BINARY = _FIGURES - {".svg"} | {".pt", ".pth", ".bin", ".distcp", ".onnx"}
# Folders of figures and records.
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
# In a card: a picture, in Markdown or HTML, and the path that its example loads the model from.
_SHOWN = re.compile(r"""!\[[^\]]*\]\(\s*<?([^)\s>]+)|<img\b[^>]*?\bsrc\s*=\s*["']([^"']+)""")
_LOCATION = re.compile(r"""(\bpipeline\([^)\n]*?\bmodel=|\bfrom_pretrained\()(["'])([^"'\n]+)\2""")

# After the rules of gitleaks (github.com/gitleaks/gitleaks, config/gitleaks.toml): tokens by their form, private keys,
# passwords in URLs, and whatever long word with a digit is called a key or a password.
_TOKEN = re.compile(
    r"""
    \b(?:hf_(?:oauth_)?[A-Za-z0-9]{20,} | api_org_[A-Za-z0-9]{30,}                       # Hugging Face
    | gh[a-z]_[A-Za-z0-9]{30,} | github_pat_\w{40,} | gl(?:pat|dt|rt|ptt)-[\w-]{20,}   # GitHub, GitLab
    | (?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16} | AIza[\w-]{30,}                               # Amazon, Google
    | sk-(?=[\w-]*\d)[\w-]{24,} | [sr]k_(?:test|live)_\w{10,} | xox[a-z]-[\w-]{20,}  # OpenAI, Anthropic, Stripe, Slack
    | npm_[A-Za-z0-9]{30,} | pypi-[\w-]{50,} | eyJ[\w-]{15,}\.eyJ[\w-]{15,}\.[\w-]{10,})  # registries, JWT
    | -----BEGIN[ A-Z0-9]*[ ]PRIVATE[ ]KEY(?:[ ]BLOCK)?-----(?:[^-]+-----END[ A-Z0-9]*-----)?
    | (?<=://)[^\s/:@"'<>]+:[^\s/:@"'<>]+(?=@)
    | (?i:token|secret|passw(?:or)?d|credential|(?:api|access)_?key)\\?["']?\s*[:=]\s*\\?["']?
      (?P<value>(?=[A-Za-z/+_-]*\d)(?=[\d/+_-]*[A-Za-z])[\w/+-]{16,}={0,2})
    """,
    re.VERBOSE,
)
# Not after a letter, as in and/or, nor in a URL.
_POSIX_PATH = re.compile(r"(?<![\w./:~-])(?:file://)?/(?P<root>[\w.@+-]+)(?:/[\w.@+=-]+)+")
_WINDOWS_PATH = re.compile(r"\b[A-Za-z]:(?:\\{1,2}(?:[\w.@+ -]+\\{1,2})+|/(?:[\w.@+ -]+/)+)[\w.@+-]+")
_HOME_PATH = re.compile(r"(?<![\w./:~-])~[\w.-]*(?:/[\w.@+=-]+)+")
# Also where this machine has no such folder: of clusters, containers and notebooks.
_PRIVATE_ROOTS = {
    "Users", "Volumes", "app", "content", "data", "datasets", "export", "gpfs", "home", "kaggle", "lustre", "media",
    "mnt", "nas", "net", "nfs", "nobackup", "private", "project", "projects", "root", "scratch", "share", "shared",
    "srv", "storage", "tmp", "work", "workspace", "workspaces",
}  # fmt: skip
_COMMON_ROOTS = {"bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "proc", "sbin", "sys", "usr"}
_GPS = "GPSInfo of EXIF"
_SECRET_NAME = re.compile(r"token|secret|password|api_?key", re.IGNORECASE)


@dataclass(frozen=True)
class Upload:
    """A file to upload: its path in the repository, and a local file or its content."""

    path: str
    content: Path | bytes

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def text(self) -> str:
        """Its text: of weights and images the metadata, of optimizers nothing."""
        suffix = PurePosixPath(self.path).suffix.lower()
        if suffix in _BINARY:
            return _text_of_image(self.content) if suffix in _FIGURES else ""
        if suffix == ".safetensors":
            try:
                with safe_open(self.content, framework="pt") as file:
                    return json.dumps(file.metadata() or {})
            except SafetensorError:  # a damaged file, which check_model reports
                return ""
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return content.decode("utf-8", errors="replace")


def _text_of_image(content: Path | bytes) -> str:
    """Comments and EXIF of an image, a line each; a GPS position by its name alone. Nothing of one that is damaged."""
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            image.load()  # a PNG may have its text at the end
            exif = image.getexif()
            values = [*image.info.values(), *exif.values(), *exif.get_ifd(ExifTags.IFD.Exif).values()]
            gps = [_GPS] if exif.get_ifd(ExifTags.IFD.GPSInfo) else []
    except Exception:  # parsers of damaged blocks raise anything
        return ""
    values = (value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value) for value in values)
    return "\n".join([*values, *gps])


def collect(folder: Path, card: Upload | None = None) -> tuple[list[Upload], dict[str, str]]:
    """
    The files of a model's folder to publish, with this version's code and, in place of its README.md, the `card`; and
    the paths that are left out with the reasons. A link that leads out of the folder is an InputError.
    """
    uploads, left_out, shown = [], {}, _shown_figures(folder)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        path = file.relative_to(folder).as_posix()
        if path in {module.name for module in CODE}:
            continue
        if _is_wanted(PurePosixPath(path), shown):
            if not file.resolve().is_relative_to(folder.resolve()):
                raise InputError(
                    f"{file} is a link to {file.resolve()}: put a copy of that file in its place, or remove it."
                )
            uploads.append(card if card is not None and path == card.path else Upload(path, file))
        else:
            left_out[path] = next((why for pattern, why in _REASONS if pattern.fullmatch(path)), "no part of a model")
    tops = {upload.path.split("/")[0] for upload in uploads}
    # Of a folder without uploads, only its own path.
    left_out = {
        path if "/" not in path or path.split("/")[0] in tops else f"{path.split('/')[0]}/": reason
        for path, reason in left_out.items()
    }
    uploads += [Upload(module.name, module.read_bytes()) for module in CODE]
    return sorted(uploads, key=lambda upload: upload.path), left_out


def _shown_figures(folder: Path) -> set[str]:
    """The local pictures that the card of a folder shows, as paths within the folder; they may not exist."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    links = {unquote(markdown or html).split("#")[0].split("?")[0] for markdown, html in _SHOWN.findall(text)}
    paths = {posixpath.normpath(link) for link in links if not re.match(r"[a-z][a-z0-9+.-]*:|/", link, re.IGNORECASE)}
    return {path for path in paths if not path.startswith("..")}


def _is_wanted(path: PurePosixPath, shown: set[str]) -> bool:
    if any(part.startswith((".", "_")) for part in path.parts):
        return False
    if path.suffix.lower() in _FIGURES and path.as_posix() in shown:
        return True
    if len(path.parts) == 1:
        return path.name in _MODEL_FILES or _WEIGHTS.fullmatch(path.name) is not None or path.suffix in _FIGURES
    is_record = path.suffix in _FIGURES or path.name in ("results.json", "transfer.json")
    return path.parts[0] in _FIGURE_FOLDERS and is_record


def prepare_card(
    folder: Path, architecture: str | None, repo_id: str, terms: tuple[str | None, ...], text: str | None = None
) -> tuple[Upload | None, list[str]]:
    """
    The card to publish, None if it can't be read, and its problems. `text` replaces the folder's README.md, `terms` the
    card's licence, its name and its link.
    """
    file = folder / "README.md"
    if text is None and not file.is_file():
        return None, ["There is no README.md. Write one, or run scripts/card.py, which writes it from the records."]
    try:
        card = ModelCard(file.read_text(encoding="utf-8") if text is None else text)
    except Exception as error:  # of the YAML reader, of model-index, of the text's encoding
        return None, [f"The metadata of README.md can't be read: {' '.join(str(error).split())}"]
    data, lines = card.data, []
    if terms[0] is not None and (terms[0] != data.license or any(terms[1:])):
        data.license, data.license_name, data.license_link = terms
    if data.license is None:
        lines.append(
            "README.md names no licence. Add --license, e.g. apache-2.0: without a licence nobody may use the model."
        )
    elif problem := license_problem(data.license, data.get("license_name"), data.get("license_link")):
        lines.append(f"The licence {data.license}: {problem}")
    if data.library_name != "transformers":
        lines.append(f"library_name in README.md is {data.library_name}; the Hub needs transformers.")
    is_classifier = architecture == ViTScratchForImageClassification.__name__
    task = "image-classification" if is_classifier else "image-feature-extraction"
    if architecture is not None and data.pipeline_tag != task:
        lines.append(f"pipeline_tag in README.md is {data.pipeline_tag}; this model is for {task}.")
    absent = sorted(path for path in _shown_figures(folder) if not (folder / path).is_file())
    lines += [f"README.md shows {path}, which is not in {folder}." for path in absent]
    card.text = _LOCATION.sub(lambda found: f"{found[1]}{found[2]}{repo_id}{found[2]}", card.text)
    return Upload("README.md", str(card).encode()), lines


def leaks_in(uploads: list[Upload], token: str | None = None) -> list[str]:
    """One line for each upload with a token or a local path. The library's own code files are not searched."""
    lines = []
    for upload in uploads:
        found = [] if upload.path.endswith(".py") else find_leaks(upload.text(), token)
        if found:
            leaks = " and ".join(found[:3]) + (" and more" if len(found) > 3 else "")
            lines.append(f"{upload.path} has {leaks}. Take it out of the file before you publish it.")
    return lines


def find_leaks(text: str, token: str | None = None) -> list[str]:
    """The local paths in a text, and tokens, with their beginnings alone: also `token`, whatever it looks like."""
    found = [match["value"] or match[0] for match in _TOKEN.finditer(text)]
    if token and token in text and token not in found:
        found.append(token)
    leaks = [f"a token ({secret[:6]}...)" for secret in dict.fromkeys(found)]
    paths = [match[0] for match in _POSIX_PATH.finditer(text) if _is_of_this_machine(match["root"])]
    paths += [match[0] for pattern in (_WINDOWS_PATH, _HOME_PATH) for match in pattern.finditer(text)]
    leaks += [f"the local path {path}" for path in dict.fromkeys(paths)]
    return leaks + (["the place where a photo was taken"] if _GPS in text else [])


def without_leaks(text: str) -> str:
    """The text with TOKEN in place of each token, and each local path cut to its last part."""
    text = _TOKEN.sub(lambda found: found[0].replace(found["value"] or found[0], "TOKEN"), text)
    text = _POSIX_PATH.sub(lambda path: Path(path[0]).name if _is_of_this_machine(path["root"]) else path[0], text)
    for pattern in (_WINDOWS_PATH, _HOME_PATH):
        text = pattern.sub(lambda path: re.split(r"[\\/]", path[0])[-1], text)
    return text


def shareable(settings: Any) -> Any:
    """Settings as JSON values, without secrets (by their names), tokens and local paths, at any depth."""
    if isinstance(settings, dict):
        return {
            key: shareable(value)
            for key, value in settings.items()
            if not (isinstance(value, str) and _SECRET_NAME.search(str(key)))
        }
    if isinstance(settings, (list, tuple)):
        return [shareable(value) for value in settings]
    return settings if settings is None or isinstance(settings, (bool, int, float)) else without_leaks(str(settings))


def _is_of_this_machine(root: str) -> bool:
    return root not in _COMMON_ROOTS and (root in _PRIVATE_ROOTS or Path("/", root).is_dir())
