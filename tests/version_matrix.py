# SPDX-License-Identifier: Apache-2.0
"""
Runs a stranger's steps (stranger.py) with each version of transformers that a model folder is for.

    python tests/version_matrix.py                             all versions; writes docs/versions.md
    python tests/version_matrix.py 4.57.6 5.24.0 --folder outputs/photos --output matrix.md

Builds an environment for each version under --environments, and one of torch and torchvision that all of them share:
about 6 GB for the first run, 150 MB for each version. Every step's numbers are compared with those of the newest
version, to the last digit. Exit code 1 if a step failed or differs.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


HERE = Path(__file__).parent
# For the Trainer; the newest does not go with version 4.
ACCELERATE = {"4.57.6": "accelerate==1.10.1"}
VERSIONS = ("4.57.6", "5.0.0", "5.8.1", "5.12.1", "5.17.0", "5.20.2", "5.23.0", "5.24.0")
EXPLANATION = """\
# Versions of transformers

A model folder works with transformers 4.57 and every later version. This table comes from
`python tests/version_matrix.py`, which does in an environment of each version what a stranger does with the folder
`{folder}`: the Auto classes with `trust_remote_code=True`, both pipelines, attentions under both
implementations, masks, a step with gradient checkpointing, a step of the Trainer, saving and loading again. "same"
means: the same numbers as with transformers {newest}, to the last digit.

{table}

Last run: {date}, {torch}, Python {python}, {machine}.

`AutoImageProcessor` of transformers 5.8 to 5.17 needs torchvision, for every model; `pipeline` does not. A version
older than 4.57 ends in an error that names it.
"""


def make_environment(folder: Path, packages: list[str], shared: Path | None = None) -> Path:
    """The interpreter of an environment; made if it is not there. `shared` is one whose packages it sees too."""
    python, finished = folder / "bin" / "python", folder / "finished"
    if not finished.exists():
        print(f"Installing {' '.join(packages)} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        if shared is not None:
            site, other = (next(path.glob("lib/python*/site-packages")).resolve() for path in (folder, shared))
            (site / "shared.pth").write_text(f"{other}\n")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        finished.touch()
    return python


def run_stranger(python: Path, folder: Path, photo: Path, cache: Path) -> dict[str, Any]:
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [str(python), "-W", "ignore", str(HERE / "stranger.py"), str(folder), str(photo)]
    result = subprocess.run(command, cwd=cache, env=environment, capture_output=True, text=True)
    if result.returncode:
        return {"error": " ".join(result.stderr.splitlines()[-1:])}
    return json.loads(result.stdout.splitlines()[-1])


def compare(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """For each version and step: "same" as the last version, "other numbers", or the error."""
    newest = list(found.values())[-1]
    words = {}
    for version, steps in found.items():
        words[version] = {}
        for step in [step for step in newest if step not in ("transformers", "torch")]:
            value = steps.get(step, steps.get("error", "missing"))
            equal = "same" if value == newest[step] else "other numbers"
            words[version][step] = value if isinstance(value, str) else equal
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="versions of transformers, the newest last")
    parser.add_argument("--folder", type=Path, default=HERE.parent / "model_cards" / "vit-tiny-imagenet")
    parser.add_argument("--environments", type=Path, default=HERE.parent / "outputs" / "versions")
    parser.add_argument("--torch", default="torch==2.14.1 torchvision==0.29.1", help="what all versions share")
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs" / "versions.md")
    arguments = parser.parse_args()

    environments = arguments.environments.absolute()
    make_environment(environments / "shared", arguments.torch.split())
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        photo, folder = Path(temporary) / "photo.png", arguments.folder.absolute()
        rows, columns = np.mgrid[:120, :150]
        Image.fromarray(np.stack([rows * 2, columns, rows ^ columns], axis=-1).astype(np.uint8)).save(photo)
        for version in arguments.versions:
            packages = [f"transformers=={version}", ACCELERATE.get(version, "accelerate")]
            python = make_environment(environments / version, packages, environments / "shared")
            cache = Path(temporary) / version
            cache.mkdir()
            found[version] = run_stranger(python, folder, photo, cache)
    words = compare(found)
    steps = list(words[arguments.versions[-1]])
    table = ["| transformers | " + " | ".join(steps) + " |", "|---" * (len(steps) + 1) + "|"]
    table += [f"| {version} | " + " | ".join(words[version][step] for step in steps) + " |" for version in words]
    text = EXPLANATION.format(
        folder=os.path.relpath(arguments.folder, HERE.parent), newest=arguments.versions[-1], table="\n".join(table),
        date=datetime.date.today(), torch=arguments.torch.replace("==", " "), python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
    )  # fmt: skip
    arguments.output.write_text(text, encoding="utf-8")
    print("\n".join(table))
    sys.exit(any(word != "same" for row in words.values() for word in row.values()))


if __name__ == "__main__":
    main()
