# SPDX-License-Identifier: Apache-2.0
"""
A classifier as a program that runs without PyTorch's Python, or without PyTorch: made by transformers' own exporters,
compared with the model on real images, and only then given its name.
"""

import fnmatch
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim
from transformers import exporters
from transformers.exporters import ExportedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..common.errors import InputError
from ..modeling_vit_scratch import ViTScratchForImageClassification


# Of logits, between the program and the model.
TOLERANCE = 1e-4
# With 8-bit weights: of the spread of the logits, and the share of images with the same best label.
INT8_TOLERANCE, INT8_AGREEMENT = 0.15, 0.8
# What `save` writes.
WRITTEN = (
    "export.json", "config.json", "preprocessor_config.json", "*_vit_scratch.py", "model.pt2", "model.onnx",
    "model.onnx.data", "openvino_model.xml", "openvino_model.bin",
)  # fmt: skip
MAX_BATCH, MAX_ROWS = 1024, 256


@dataclass(frozen=True)
class Format:
    """What a program is made with: the exporter's and its configuration's names in transformers, and other packages."""

    exporter: str
    config: str
    packages: tuple[str, ...] = ()
    # What the runtime is told so that it computes in float32; by itself OpenVINO takes bfloat16 where the CPU has it.
    exact: dict[str, Any] | None = None


FORMATS = {
    "torch": Format("DynamoExporter", "DynamoConfig"),
    "onnx": Format("OnnxExporter", "OnnxConfig", ("onnx", "onnxscript", "onnxruntime")),
    "openvino": Format(
        "OpenVINOExporter", "OpenVINOConfig", ("openvino",), {"config": {"INFERENCE_PRECISION_HINT": "f32"}}
    ),
}


def missing_packages(name: str) -> list[str]:
    """What has to be installed first for a format."""
    return [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]


def export(
    model: ViTScratchForImageClassification, name: str, any_size: bool = False, int8: bool = False
) -> ExportedModel:
    """
    The program of a model, for batches of 1 to 1,024 images.

    Args:
        model: in float32, on the CPU. Its temperature becomes part of the program.
        name: of a format in `FORMATS`.
        any_size: whether height and width stay open: any that the patch divides, from two patches on.
        int8: whether the weights of the matrix products become 8-bit integers. With "onnx".

    Raises:
        InputError: if the model can't be exported so.
    """
    form, config, patch = FORMATS[name], model.config, model.config.patch_hw
    shapes: dict[int, Any] = {0: Dim("batch", min=1, max=MAX_BATCH)}
    if any_size:
        shapes |= {
            axis + 2: patch[axis] * Dim(side, min=2, max=MAX_ROWS) for axis, side in enumerate(("rows", "columns"))
        }
    settings: dict[str, Any] = {"dynamic_shapes": {"pixel_values": shapes}}
    if int8:
        from onnxruntime.quantization import QuantType

        # Unsigned: processors with AVX2 and no VNNI add products of signed weights in 16 bits, which overflow.
        config_of_weights = exporters.OnnxRuntimeDynamicConfig(weight_type=QuantType.QUInt8)
        settings["quantizer"] = exporters.OnnxRuntimeQuantizer(config_of_weights)
    example = torch.zeros(2, config.num_channels, *config.image_hw)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on untested versions: what comes out is compared
            exporter, options = getattr(exporters, form.exporter)(), getattr(exporters, form.config)(**settings)
            exported = exporter.export(model.eval(), {"pixel_values": example}, config=options)
    except Exception as error:  # whatever a compiler raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"The {name} exporter can't make a program of this model: {reason}") from error
    return exported.to(**form.exact) if form.exact else exported


@dataclass(frozen=True)
class Comparison:
    """
    Of a program with its model, on n images.

    Attributes:
        n: images.
        difference: the largest of the logits.
        relative_difference: the root of the mean square of all of them, in parts of the logits' standard deviation.
        agreement: the share of images with the same best label.
    """

    n: int
    difference: float
    relative_difference: float
    agreement: float


@torch.inference_mode()
def compare(model: ViTScratchForImageClassification, run: Callable[..., Any], pixel_values: torch.Tensor) -> Comparison:
    """Runs both on images (n, C, H, W), together and one by one, so that the batch is seen to be open."""
    expected = model(pixel_values=pixel_values).logits
    together = _logits(run(pixel_values=pixel_values))
    alone = torch.cat([_logits(run(pixel_values=image[None])) for image in pixel_values])
    difference = max((got - expected).abs().max().item() for got in (together, alone))
    spread = max(expected.std(correction=0).item(), torch.finfo(expected.dtype).tiny)
    relative = (together - expected).square().mean().sqrt().item() / spread
    agreement = (together.argmax(-1) == expected.argmax(-1)).float().mean().item()
    return Comparison(len(pixel_values), difference, relative, agreement)


def _logits(output: Any) -> torch.Tensor:
    return torch.as_tensor(output["logits"] if isinstance(output, dict) else output.logits)


def check(comparison: Comparison, name: str, int8: bool = False) -> None:
    """Raises InputError if a program is not its model's: in float32 to rounding, with 8-bit weights nearly."""
    agreement = comparison.agreement
    if int8:
        if not comparison.relative_difference <= INT8_TOLERANCE or agreement < INT8_AGREEMENT:
            raise InputError(
                f"With weights of 8 bits the program is too far from the model: on {comparison.n} images logits differ"
                f" by {comparison.relative_difference:.0%} of their spread ({INT8_TOLERANCE:.0%} is allowed), and"
                f" {agreement:.0%} have the same best label ({INT8_AGREEMENT:.0%} are asked for). Nothing was written."
                " Compare on images of the kind that the model is for, with --images, or leave out --int8."
            )
    elif not comparison.difference <= TOLERANCE or agreement < 1:
        raise InputError(
            f"The {name} program does not compute what the model does: on {comparison.n} images logits differ by up to "
            f"{comparison.difference:.1e} ({TOLERANCE:.0e} is allowed), the best label of "
            f"{1 - agreement:.1%} of them. Nothing was written. Please report it with the versions of "
            f"{', '.join(('torch', 'transformers', *FORMATS[name].packages))}."
        )


def check_output(folder: Path, overwrite: bool, inputs: Iterable[str | os.PathLike[str]]) -> None:
    """
    Raises InputError if writing the folder would replace what no export wrote: an input, or anything else.

    Args:
        folder: where the program will be.
        overwrite: whether an earlier program there may be replaced.
        inputs: what is read; names of the Hub among them do no harm.
    """
    for source in (Path(source).resolve() for source in inputs if os.path.exists(source)):
        if folder.resolve() in (source, *source.parents):
            raise InputError(f"OUTPUT {folder} is or holds {source}, which is read. Give another name.")
    if not folder.exists() and not folder.is_symlink():
        return
    if not overwrite:
        raise InputError(f"{folder} is there already. Give --overwrite to replace it, or another name.")
    names = sorted(os.listdir(folder)) if folder.is_dir() and not folder.is_symlink() else [folder.name]
    foreign = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in WRITTEN)]
    if foreign or (names and "export.json" not in names):
        listed = ", ".join(foreign or names)
        raise InputError(
            f"{folder} is no program that export.py wrote: it holds {listed[:200]}. --overwrite replaces nothing else;"
            " give another name."
        )


def save(exported: ExportedModel, processor: BaseImageProcessor, folder: str | os.PathLike[str]) -> None:
    """
    Writes program, configuration, image processor and their code; the folder gets its name when all is there. One that
    is there is replaced: see `check_output`.
    """
    folder = Path(folder)
    staged = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    staged.mkdir(parents=True)
    try:
        exported.save_pretrained(staged)
        processor.save_pretrained(staged)
        check_output(folder, True, ())
        if folder.exists():
            shutil.rmtree(folder)
        staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
