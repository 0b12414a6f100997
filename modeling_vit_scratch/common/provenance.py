# SPDX-License-Identifier: Apache-2.0
"""The provenance of a result: command, commit, versions and hardware."""

import hashlib
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__


def provenance(*packages: str) -> dict[str, Any]:
    """`command`, `git_commit`, `versions` (also of `packages`) and `hardware`, to reproduce a result."""
    packages = ("torch", "transformers", "accelerate", "datasets", "pillow", *packages)
    return {
        "command": command_line(),
        "git_commit": git_commit(),
        "versions": {
            "modeling_vit_scratch": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "hardware": hardware(),
    }


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


def git_commit() -> str | None:
    """The commit of this library, with "-dirty" if files were changed; None outside of its repository."""
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
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        digest = hashlib.sha256()
        with open(file, "rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
        found[file.name] = digest.hexdigest()
    return found
