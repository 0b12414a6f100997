# SPDX-License-Identifier: Apache-2.0
"""What convert.py does: reads a checkpoint, adapts it, verifies it and writes it, and prints each step."""

import os
from pathlib import Path
from typing import Any

import torch

from modeling_vit_scratch.checkpoint.conversion import load_checkpoint, save_checkpoint
from modeling_vit_scratch.checkpoint.formats import FORMATS, NATIVE
from modeling_vit_scratch.common.errors import InputError, listed
from modeling_vit_scratch.common.files import share
from modeling_vit_scratch.modeling_vit_scratch import (
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchModel,
)


def _check_output(source: str | os.PathLike, output: Path, overwrite: bool) -> None:
    if os.path.exists(source):
        read, written = Path(source).resolve(), output.resolve()
        if written == read or written in read.parents or (read in written.parents and output.exists()):
            raise InputError(f"{output} is, holds or is part of {source}, which is read. Give another name.")
    names = sorted(os.listdir(output)) if output.is_dir() else []
    if not overwrite and (names or output.is_file()):
        some = f", with {listed(names, 8)}" if names else ""
        raise InputError(
            f"{output} is there already{some}. Give another name, or --overwrite to write over what has the same names."
        )


def _times(folder: Path) -> dict[str, int]:
    """Name and time of everything in a folder; empty for a file."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} if folder.is_dir() else {}


def convert(
    source: str | os.PathLike, output: str | os.PathLike, format: str = NATIVE.name, verify: bool = False,
    inexact: bool = False, overwrite: bool = False, **overrides: Any,
) -> None:  # fmt: skip
    """
    Reads, adapts and writes a checkpoint, and prints what it finds and does, a line each. The options are those of
    `scripts/convert.py`, and `overrides` as `from_pretrained` takes them. Raises ValueError as `load_checkpoint` and
    `save_checkpoint`, and if the output is the source or is there already.
    """
    output = Path(output)
    _check_output(source, output, overwrite)
    before = _times(output)
    checkpoint = load_checkpoint(source, overrides)
    print(checkpoint.describe())
    cls: type = ViTScratchModel
    if "decoder.weight" in checkpoint:
        cls = ViTScratchForMaskedImageModeling
    elif "classifier.weight" in checkpoint or "num_labels" in overrides or "id2label" in overrides:
        cls = ViTScratchForImageClassification
    if verify:
        from conversion.verification import largest_difference  # it imports what is compared with

        result = largest_difference(checkpoint, cls.from_pretrained(checkpoint, dtype=torch.float32))
        if isinstance(result, str):
            print(f"Not verified: {result}.")
        else:
            print(f"Verified: largest difference {result[0]:.2e}, where the largest value is {result[1]:.2e}.")
    model = cls.from_pretrained(checkpoint, **overrides)
    if format == NATIVE.name:
        model.save_pretrained(output)
        share(*Path(output).glob("*.safetensors"))
    else:
        save_checkpoint(model, output, format, exact=not inexact)
    print(f"Written: {output} ({FORMATS[format].title}, {cls.__name__}, {model.num_parameters():,} parameters).")
    if left := sorted(name for name, time in _times(output).items() if before.get(name) == time):
        print(f"Left as they were, and not about these weights: {', '.join(left)}.")
