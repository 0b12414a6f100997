# SPDX-License-Identifier: Apache-2.0
"""What records and cards share: titles of metrics, licence names, and the provenance of a result. Imports no torch."""

import os
import platform
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any


# A record's main result is the first of these that it has.
METRIC_TITLES = {
    "accuracy": "accuracy", "mean_average_precision": "mean average precision", "top5_accuracy": "top-5 accuracy",
    "micro_f1": "micro F1", "macro_f1": "macro F1", "samples_f1": "samples F1", "exact_match": "exact match",
    "micro_average_precision": "micro average precision", "hamming_loss": "Hamming loss", "nll": "NLL (nats)",
    "brier": "Brier score", "ece": "ECE, 15 equal bins", "adaptive_ece": "ECE, bins of equal numbers",
    "rmse": "RMSE", "mae": "MAE", "r2": "R2",
}  # fmt: skip
# Bins of the expected calibration error (Guo et al., arXiv:1706.04599).
NUM_BINS = 15
# All others are fractions of 1.
NO_PERCENT = ("loss", "nll", "brier", "rmse", "mae", "r2")


def title_of(metric: str) -> str:
    """The capitalized title; a metric without one keeps its name."""
    title = METRIC_TITLES.get(metric, metric)
    return title[:1].upper() + title[1:]


def format_score(value: float, metric: str) -> str:
    """The value of a metric, most of them as percentages: 98.89 %."""
    return f"{value:.4f}" if metric in NO_PERCENT else f"{100 * value:.2f} %"


def interval_of(result: dict[str, Any]) -> list[float] | None:
    """The interval of a result: for fractions of images Wilson's, even where all are right; else the bootstrap's."""
    return result.get("wilson_interval") or result.get("interval")


def license_problem(license: Any, name: str | None = None, link: str | None = None) -> str | None:
    """A message unless the licence is an identifier of the Hub, e.g. apache-2.0, or "other" with a name and a link."""
    if not isinstance(license, str) or not re.fullmatch(r"[a-z0-9.-]+", license):
        return "it is no name of the Hub's, e.g. apache-2.0, cc-by-4.0 (hf.co/docs/hub/repositories-licenses)."
    if license == "other" and not (name and link):
        flags = "--license other --license_name NAME --license_link URL"
        return f"add license_name and license_link: scripts/card.py FOLDER {flags}."
    return None


def license_note(license: str | None, base: dict[str, str] | None) -> str | None:
    """What to say of a licence that gives more than `base`, that of the weights which training started from."""
    if base is None or license in (None, base["license"]) or not is_restrictive(base["license"]):
        return None
    name = base.get("license_name") or base["license"]
    return (
        f"The weights that training started from are under {name}, which restricts what may be done with them. "
        f"--license {license} does not change that: leave it out to keep theirs, or make sure that you may."
    )


def is_restrictive(license: str) -> bool:
    """Whether a licence forbids some use, such as commercial use, or has terms of its own."""
    return license == "other" or bool({"nc", "nd"} & set(license.split("-")))


def provenance(*packages: str) -> dict[str, Any]:
    """`command`, `git_commit`, `versions` (also of `packages`) and `hardware`, to reproduce a result."""
    from .. import __version__  # here: the package's __init__ imports torch

    versions = {"modeling_vit_scratch": __version__, "python": platform.python_version()}
    packages = ("torch", "transformers", "accelerate", "datasets", "pillow", *packages)
    versions |= {package: version(package) for package in packages}
    return {"command": command_line(), "git_commit": git_commit(), "versions": versions, "hardware": hardware()}


def command_line(argv: list[str] | None = None) -> str:
    """The command of this process for a card: only the last part of absolute paths, and no tokens."""
    script, *flags = sys.argv if argv is None else argv
    processes = os.environ.get("WORLD_SIZE", "1")
    # Without --multi_gpu, accelerate starts one process on a machine without GPU.
    launch = f"accelerate launch --multi_gpu --num_processes {processes}" if processes != "1" else "python"
    words = [f"'{word}'" if re.search(r"[*?\s]", word) else word for word in map(_without_folder, flags)]
    return " ".join([launch, f"scripts/{Path(script).name}", *words])


def _without_folder(word: str) -> str:
    name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if re.fullmatch(r"hf_\w{8,}", value):
        value = "TOKEN"
    elif Path(value).expanduser().is_absolute():
        value = Path(value).name
    return name + equals + value


@cache
def git_commit() -> str | None:
    """The commit of this library at the first call, "-dirty" if files were changed; None outside of its repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> str:
    """The accelerators, or the processor and its cores."""
    import torch  # here: tools that only read records start without it

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpu_info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpu_info.read_text()) if cpu_info.exists() else []
    return f"CPU, {os.cpu_count()} cores, {names[0] if names else platform.processor() or platform.machine()}"


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of weights in a folder, by name."""
    from huggingface_hub.utils.sha import sha_fileobj  # here: tools that only read records start without it

    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with open(file, "rb") as stream:
            found[file.name] = sha_fileobj(stream).hex()
    return found
