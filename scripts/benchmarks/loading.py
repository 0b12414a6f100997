# SPDX-License-Identifier: Apache-2.0
"""From the start of Python to a model with its weights, in fresh processes: ours beside transformers' ViT."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from transformers import ViTForImageClassification

from benchmarks.models import plain_model
from benchmarks.timing import OURS
from modeling_vit_scratch.checkpoint.conversion import save_checkpoint
from modeling_vit_scratch.checkpoint.formats import TRANSFORMERS
from modeling_vit_scratch.modeling_vit_scratch import ViTScratchForImageClassification


# What a process does: it names the class, and then loads the folder that it is given.
_IMPORTS = {
    OURS: "from modeling_vit_scratch import ViTScratchForImageClassification as Model",
    "transformers": "from transformers import ViTForImageClassification as Model",
}
_LOAD = "; import sys; Model.from_pretrained(sys.argv[1])"


def save_models(folder: Path, variant: str) -> dict[str, Path]:
    """The same weights as ours and as transformers' ViT, each in a folder. Raises InputError for an unknown variant."""
    model = plain_model(variant, image_size=224)
    model.save_pretrained(folder / "ours")
    save_checkpoint(model, folder / "transformers", TRANSFORMERS.name)
    return {OURS: folder / "ours", "transformers": folder / "transformers"}


def import_ways() -> dict[str, Callable[[], None]]:
    """A process for each, that has the class and nothing else."""
    return {name: _process(code) for name, code in _IMPORTS.items()}


def load_ways(folders: dict[str, Path]) -> dict[str, Callable[[], None]]:
    """A process for each, that has the class and the weights: the files are in the system's memory."""
    return {name: _process(_IMPORTS[name] + _LOAD, str(folder)) for name, folder in folders.items()}


def _process(code: str, *words: str) -> Callable[[], None]:
    # With compiled modules on the disk, as after any first run.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def run() -> None:
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"The process that is timed has failed:\n{done.stderr}")

    return run


def in_process_ways(folders: dict[str, Path]) -> dict[str, Callable[[], object]]:
    """Only `from_pretrained`, in this process, where everything is imported already."""
    classes = {OURS: ViTScratchForImageClassification, "transformers": ViTForImageClassification}
    return {name: lambda name=name: classes[name].from_pretrained(folders[name]) for name in folders}
