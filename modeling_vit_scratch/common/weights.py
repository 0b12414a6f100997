# SPDX-License-Identifier: Apache-2.0
"""Which weights a report is about, so that nobody takes it for one of others."""

import hashlib
from pathlib import Path


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of weights in the folder, by its name: what `sha256sum` says."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        digest = hashlib.sha256()
        with open(file, "rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
        found[file.name] = digest.hexdigest()
    return found
