# SPDX-License-Identifier: Apache-2.0
"""
Renews the code of a model's folder, here or on the Hub, after a check that its numbers stay the same.

Folders keep the code that they were saved with, and newer transformers may not run it any more.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from ..common.errors import InputError
from ..common.files import write_text
from ..configuration_vit_scratch import AUTO_MAP, CODE_VERSION
from .commit import commit, prepare
from .contents import CODE, Upload


# The two versions of the code may round otherwise.
TOLERANCE = 1e-5
# Runs the code of the folder: this package is not imported. Two sizes, so that positions are resampled too.
_RUN = """
import os, sys, torch, transformers
transformers.logging.set_verbosity_error()
folder, result = sys.argv[1:]
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
auto = next(name for name, path in config.auto_map.items() if path.endswith("." + config.architectures[0]))
torch.manual_seed(0)
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval().float()
patch = config.patch_size if isinstance(config.patch_size, (list, tuple)) else [config.patch_size] * 2
size = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
outputs = []
with torch.no_grad():
    for height, width in (size, (size[0] + patch[0], size[1] + 2 * patch[1])):
        found = model(torch.randn(2, config.num_channels, height, width))
        outputs += [value for value in found.values() if isinstance(value, torch.Tensor)]
if os.path.exists(folder + "/preprocessor_config.json"):
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    image = torch.randint(256, (config.num_channels, 61, 47), dtype=torch.uint8)
    outputs.append(processor(image, return_tensors="pt")["pixel_values"])
torch.save(outputs, result)
"""


@dataclass(frozen=True)
class Renewal:
    """
    What renewing would do.

    Attributes:
        folder: the model's, or its copy from the Hub.
        uploads: the files that change.
        old_version: of the folder's code; "unknown" before 0.2.0.
        difference: the largest one between outputs of the old and of the new code; None if the old code fails.
        error: how the old code fails.
    """

    folder: Path
    uploads: list[Upload]
    old_version: str
    difference: float | None = None
    error: str | None = None

    def describe(self) -> list[str]:
        if not self.uploads:
            return [f"Its code is that of version {CODE_VERSION} already."]
        lines = [f"Code of version {self.old_version}, to be replaced by version {CODE_VERSION}:"]
        lines += [f"  {upload.path}" for upload in self.uploads]
        if self.difference is None:
            return [*lines, f"The old code does not run here, so there is nothing to compare with: {self.error}"]
        return [*lines, f"Outputs of the old and the new code differ by at most {self.difference:.1e}."]


def plan_renewal(source: str, revision: str | None = None) -> Renewal:
    """
    Compares a folder's outputs under its own code and under this one.

    Args:
        source: a folder, or USER/NAME of a model on the Hub.
        revision: the branch there.

    Raises:
        InputError: if it is no model of ours, if the new code does not run it, or if it gives other numbers.
    """
    folder = Path(source)
    if not folder.is_dir():
        if source.count("/") != 1:
            raise InputError(f"{source} is no folder, nor USER/NAME of a model on the Hub.")
        folder = Path(snapshot_download(source, revision=revision))
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if config.get("model_type") != "vit_scratch" or not config.get("architectures"):
        raise InputError(f"{source} is no folder of a vit_scratch model: its config.json does not say so.")
    old_version = config.get("code_version", "unknown")
    new_config = {**config, "auto_map": config.get("auto_map", {}) | AUTO_MAP, "code_version": CODE_VERSION}
    uploads = [Upload(path.name, path) for path in CODE]
    uploads += [Upload("config.json", (json.dumps(new_config, indent=2) + "\n").encode())]
    uploads = [upload for upload in uploads if _is_new(folder / upload.path, upload)]
    if not any(upload.path.endswith(".py") for upload in uploads) and config == new_config:
        return Renewal(folder, [], old_version)

    with tempfile.TemporaryDirectory() as temporary:
        renewed = Path(temporary) / "renewed"
        renewed.mkdir()
        for path in folder.iterdir():
            if path.name not in {upload.path for upload in uploads}:
                (renewed / path.name).symlink_to(path.resolve())
        for upload in uploads:
            (renewed / upload.path).write_text(upload.text(), encoding="utf-8")
        try:
            new = _outputs(renewed)
        except RuntimeError as error:
            raise InputError(f"{source} does not run with the code of version {CODE_VERSION}: {error}") from error
        try:
            old = _outputs(folder)
        except RuntimeError as error:
            return Renewal(folder, uploads, old_version, error=str(error))
    difference = max(float((a - b).abs().max()) for a, b in zip(old, new, strict=True))
    if not difference <= TOLERANCE:
        raise InputError(
            f"{source} gives other numbers with the code of version {CODE_VERSION}: they differ by up to "
            f"{difference:.1e}, and {TOLERANCE:.0e} is the limit. Nothing was changed; please report it."
        )
    return Renewal(folder, uploads, old_version, difference)


def renew(source: str, renewal: Renewal, revision: str | None = None, create_pr: bool = False) -> str:
    """
    Writes the files that change: into the folder, or in one commit to the repository.

    Returns:
        Where they are: the folder, or the URL of the commit or pull request.

    Raises:
        InputError, ConnectionLost: as `commit`.
    """
    if Path(source).is_dir():
        for upload in renewal.uploads:
            write_text(renewal.folder / upload.path, upload.text())
        return source
    remote = prepare(source, revision=revision, create_pr=create_pr)
    # No files, so that the weights stay: they are not among those that are committed.
    return commit(dataclasses.replace(remote, files=()), renewal.uploads, f"Code of {CODE_VERSION}", create_pr)


def _is_new(file: Path, upload: Upload) -> bool:
    return not file.is_file() or file.read_text("utf-8") != upload.text()


def _outputs(folder: Path) -> list:
    """The outputs of the folder's model under the folder's own code. Raises RuntimeError with the last line of it."""
    import torch

    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "outputs.pt"
        environment = {**os.environ, "HF_MODULES_CACHE": temporary, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-W", "ignore", "-c", _RUN, str(folder.resolve()), str(result)]
        run = subprocess.run(command, cwd=temporary, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError((run.stderr.strip().splitlines() or ["it was killed"])[-1])
        return torch.load(result, weights_only=True)
