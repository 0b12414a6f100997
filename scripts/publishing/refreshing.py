# SPDX-License-Identifier: Apache-2.0
"""Renews the code of a model's folder, which newer transformers may not run, if its numbers stay the same."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download

from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.common.files import write_text
from modeling_vit_scratch.configuration_vit_scratch import AUTO_MAP, CODE_VERSION
from modeling_vit_scratch.hub.commit import commit, find_model, prepare
from modeling_vit_scratch.hub.contents import CODE, Upload
from publishing.checks import changed_code


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


class Renewal(NamedTuple):
    """What renewing would do to a folder, or to the copy of one from the Hub."""

    folder: Path
    uploads: list[Upload]  # the files that change
    lines: list[str]  # for the user


def plan_renewal(source: str, revision: str | None = None) -> Renewal:
    """Compares the outputs of a folder, or of USER/NAME on the Hub, under its own code and under this one."""
    folder = Path(source)
    if not folder.is_dir():
        if source.count("/") != 1:
            raise InputError(f"{source} is no folder, nor USER/NAME of a model on the Hub.")
        find_model(source)  # its errors are sentences
        folder = Path(snapshot_download(source, revision=revision))
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if config.get("model_type") != "vit_scratch" or not config.get("architectures"):
        raise InputError(f"{source} is no folder of a vit_scratch model: its config.json does not say so.")
    new_config = {**config, "auto_map": config.get("auto_map", {}) | AUTO_MAP, "code_version": CODE_VERSION}
    uploads = [Upload(path.name, path) for path in CODE if path.name in changed_code(folder)]
    if config != new_config:
        uploads.append(Upload("config.json", (json.dumps(new_config, indent=2) + "\n").encode()))
    if not uploads:
        return Renewal(folder, [], [f"Its code is that of version {CODE_VERSION} already."])
    old_version = config.get("code_version", "unknown")  # before 0.2.0
    lines = [f"Code of version {old_version}, to be replaced by version {CODE_VERSION}:"]
    lines += [f"  {upload.path}" for upload in uploads]
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
            lines.append(f"The old code does not run here, so there is nothing to compare with: {error}")
            return Renewal(folder, uploads, lines)
    difference = max(float((a - b).abs().max()) for a, b in zip(old, new, strict=True))
    if not difference <= TOLERANCE:
        raise InputError(
            f"{source} gives other numbers with the code of version {CODE_VERSION}: they differ by up to "
            f"{difference:.1e}, and {TOLERANCE:.0e} is the limit. Nothing was changed; please report it."
        )
    lines.append(f"Outputs of the old and the new code differ by at most {difference:.1e}.")
    return Renewal(folder, uploads, lines)


def refresh_code(arguments: argparse.Namespace) -> None:
    """What publish.py --refresh_code does."""
    if arguments.repo_id or arguments.space or arguments.private or arguments.license:
        raise InputError("--refresh_code takes a folder or a Hub id, --yes, --revision and --create_pr, nothing else.")
    renewal = plan_renewal(arguments.folder, arguments.revision)
    print(*renewal.lines, sep="\n")
    if renewal.uploads and not arguments.yes:
        print("Nothing was changed. To write the new files, add --yes.")
    elif renewal.uploads:
        print(f"Renewed: {renew(arguments.folder, renewal, arguments.revision, arguments.create_pr)}")


def renew(source: str, renewal: Renewal, revision: str | None = None, create_pr: bool = False) -> str:
    """Writes the files that change into the folder, or in one commit or pull request, and returns where they are."""
    if Path(source).is_dir():
        for upload in renewal.uploads:
            write_text(renewal.folder / upload.path, upload.text())
        return source
    remote = prepare(source, revision=revision, create_pr=create_pr)
    # No files, so that the weights stay: they are not among those that are committed.
    return commit(replace(remote, files=()), renewal.uploads, f"Code of {CODE_VERSION}", create_pr)


def _outputs(folder: Path) -> list[torch.Tensor]:
    """The outputs of a folder's model under its own code. Raises RuntimeError with the last line of what it prints."""
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "outputs.pt"
        environment = {**os.environ, "HF_MODULES_CACHE": temporary, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-W", "ignore", "-c", _RUN, str(folder.resolve()), str(result)]
        run = subprocess.run(command, cwd=temporary, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError((run.stderr.strip().splitlines() or ["it was killed"])[-1])
        return torch.load(result, weights_only=True)
