# SPDX-License-Identifier: Apache-2.0
"""A classifier as a program, made by transformers' exporters, and written only if it computes what the model does."""

import fnmatch
import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.export import Dim
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import exporters
from transformers.exporters import ExportedModel
from transformers.image_processing_utils import BaseImageProcessor

from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.common.files import writing_problem
from modeling_vit_scratch.data.collation import ImageCollator, Normalize
from modeling_vit_scratch.data.dataset import ImageClassificationDataset
from modeling_vit_scratch.evaluation.arguments import EvaluationArguments
from modeling_vit_scratch.evaluation.data import EvaluationData, read_evaluation_data
from modeling_vit_scratch.modeling_vit_scratch import ViTScratchForImageClassification


TOLERANCE = 1e-4  # of logits, between the program and the model
# With 8-bit weights: of the spread of the logits, and the share of images with the same best label.
INT8_TOLERANCE, INT8_AGREEMENT = 0.15, 0.8
# What `save` writes.
WRITTEN = (
    "export.json", "config.json", "preprocessor_config.json", "*_vit_scratch.py", "model.pt2", "model.onnx",
    "model.onnx.data", "openvino_model.xml", "openvino_model.bin", "onnx", "examples", "index.html", "pixels.js",
    "card.md",
)  # fmt: skip
MAX_BATCH, MAX_ROWS = 1024, 256
BATCH = 32  # of images that are counted or compared
# For each format its name in transformers, as in DynamoExporter and DynamoConfig, and what has to be installed.
FORMATS = {"torch": "Dynamo", "onnx": "Onnx", "openvino": "OpenVINO"}
PACKAGES = {"torch": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
PACKAGES["web"] = PACKAGES["onnx"]
PACKAGES["openvino in int8"] = ("openvino", "nncf")


def missing_packages(name: str) -> list[str]:
    return [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]


def export(
    model: ViTScratchForImageClassification, name: str, any_size: bool = False, int8: bool = False,
    calibration: list[torch.Tensor] | None = None,
) -> ExportedModel:  # fmt: skip
    """
    The program of a model in float32 on the CPU, for batches of 1 to 1,024 images. With `any_size` it takes all that
    the patch divides, from two patches on. `int8`: with weights of 8 bits. `calibration`: images of (1, C, H, W), for
    products of 8 bits, by OpenVINO. Raises InputError if the model can't be exported so.
    """
    config, patch = model.config, model.config.patch_hw
    shapes: dict[int, Any] = {0: Dim("batch", min=1, max=MAX_BATCH)}
    if any_size:
        shapes[2] = patch[0] * Dim("rows", min=2, max=MAX_ROWS)
        shapes[3] = patch[1] * Dim("columns", min=2, max=MAX_ROWS)
    settings: dict[str, Any] = {"dynamic_shapes": {"pixel_values": shapes}}
    if int8:
        settings["quantizer"] = quantizer()
    if calibration is not None:
        settings["quantizer"] = calibrated_quantizer(calibration)
    example = torch.zeros(2, config.num_channels, *config.image_hw)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on untested versions: what comes out is compared
            options = getattr(exporters, f"{FORMATS[name]}Config")(**settings)
            exporter = getattr(exporters, f"{FORMATS[name]}Exporter")()
            exported = exporter.export(model.eval(), {"pixel_values": example}, config=options)
    except Exception as error:  # whatever a compiler raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"The {name} exporter can't make a program of this model: {reason}") from error
    if name == "onnx":  # each node has the lines of code that it comes from, with paths of this machine
        for node in exported.program.graph:
            node.metadata_props.clear()
    if name == "openvino":  # by itself it takes bfloat16 where the CPU has it
        return exported.to(config={"INFERENCE_PRECISION_HINT": "f32"})
    return exported


def quantizer() -> exporters.OnnxRuntimeQuantizer:
    from onnxruntime.quantization import QuantType

    # Unsigned: processors with AVX2 and no VNNI add products of signed weights in 16 bits, which overflow.
    return exporters.OnnxRuntimeQuantizer(exporters.OnnxRuntimeDynamicConfig(weight_type=QuantType.QUInt8))


def calibrated_quantizer(images: list[torch.Tensor]) -> Any:
    """NNCF's for transformers, with SmoothQuant (https://arxiv.org/abs/2211.10438), 0.5 as in the paper."""
    os.environ.setdefault("NNCF_DEV", "1")  # the only switch that it has for messages to its makers
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters

    nncf.set_log_level(logging.WARNING)
    # NNCF's own 0.95 left the logits of vit-tiny-imagenet farther from the model's on images of its training.
    smooth = AdvancedQuantizationParameters(smooth_quant_alphas=AdvancedSmoothQuantParameters(matmul=0.5))
    config = exporters.NNCFQuantizationConfig(
        preset=nncf.QuantizationPreset.MIXED, subset_size=len(images), advanced_parameters=smooth
    )
    return exporters.NNCFOpenVINOQuantizer(config, [{"pixel_values": image} for image in images])


class Comparison(NamedTuple):
    """The logits of a program and its model, on n images."""

    n: int
    difference: float  # the largest
    relative_difference: float  # the root of the mean square, in standard deviations of the logits
    agreement: float  # the share of images with the same best label


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
            f"{', '.join(('torch', 'transformers', *PACKAGES[name]))}."
        )


def check_output(folder: Path, overwrite: bool, inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Raises InputError if the folder holds an input, an earlier program without `overwrite`, or anything else."""
    for source in (Path(source).resolve() for source in inputs if os.path.exists(source)):
        if folder.resolve() in (source, *source.parents):
            raise InputError(f"OUTPUT {folder} is or holds {source}, which is read. Give another name.")
    if reason := writing_problem(folder.parent):
        raise InputError(f"OUTPUT {folder}: {reason}")
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


def save(parts: Iterable[Any], folder: str | os.PathLike[str], size: int = 0) -> None:
    """
    Writes the parts (program, processor) by their `save_pretrained`, all or nothing, in place of an earlier program.
    Raises InputError if the disk has no room for `size` bytes: torch's own writer would end the process.
    """
    folder = Path(folder)
    staged = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    staged.mkdir(parents=True)
    if (free := shutil.disk_usage(staged).free) < size:
        staged.rmdir()
        raise InputError(f"{folder} takes about {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free. Make room.")
    try:
        for part in parts:
            part.save_pretrained(staged)
        check_output(folder, True, ())
        if folder.exists():
            shutil.rmtree(folder)
        staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def photographs() -> list[Image.Image]:
    """Two photographs of 640 x 427 pixels that come with scikit-learn, and their quarters: ten images."""
    from sklearn.datasets import load_sample_images

    whole = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    quarters = []
    for photo in whole:
        x, y = photo.width // 2, photo.height // 2
        corners = ((0, 0, x, y), (x, 0, photo.width, y), (0, y, x, photo.height), (x, y, photo.width, photo.height))
        quarters += [photo.crop(corner) for corner in corners]
    return whole + quarters


def labelled_images(model: ViTScratchForImageClassification, arguments: EvaluationArguments) -> EvaluationData | None:
    """The images of `arguments.dataset`, with labels of the model; None without a data set."""
    if not arguments.dataset:
        return None
    if model.config.problem_type not in (None, "single_label_classification"):
        raise InputError(f"--dataset counts right labels, and this model is for {model.config.problem_type}.")
    names = [str(model.config.id2label[index]) for index in range(model.num_labels)]
    return read_evaluation_data(arguments, names, is_multi_label=False)


def count_right(
    model: ViTScratchForImageClassification, processor: BaseImageProcessor, data: EvaluationData,
    runs: dict[str, Callable[..., Any]],
) -> str:  # fmt: skip
    """A sentence: how many of the labelled images each of `runs` (models or programs) gets right."""
    dataset = ImageClassificationDataset(data.examples, processor, model.config.num_channels)
    normalize, right = Normalize(processor), dict.fromkeys(runs, 0)
    loader = DataLoader(dataset, BATCH, collate_fn=ImageCollator())
    for batch in tqdm(loader, desc="counting right labels", unit=" batches", leave=False, disable=None):
        pixel_values = normalize(batch["pixel_values"])
        for name, run in runs.items():
            with torch.inference_mode():
                best = torch.as_tensor(run(pixel_values=pixel_values).logits).argmax(-1)
            right[name] += int((best == batch["labels"]).sum())
    count = len(data.examples)
    counts = ", ".join(f"{number:,} by {name} ({number / count:.2%})" for name, number in right.items())
    return f"Of {count:,} images ({data.description}) right: {counts}."
