# SPDX-License-Identifier: Apache-2.0
"""Products of 8 bits, with scales from calibration images, and what they change on other images."""

import argparse
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers.exporters import ExportedModel

from exporting.export import BATCH, check, compare, export
from modeling_vit_scratch.common.errors import InputError, Problems
from modeling_vit_scratch.common.flags import DataArguments
from modeling_vit_scratch.data.collation import ImageCollator, Normalize
from modeling_vit_scratch.data.dataset import Examples, ImageClassificationDataset
from modeling_vit_scratch.data.sources import read_source
from modeling_vit_scratch.data.splits import LabelledSplit, read_split
from modeling_vit_scratch.evaluation.data import place_or_name
from modeling_vit_scratch.image_processing_vit_scratch import ViTScratchImageProcessor
from modeling_vit_scratch.modeling_vit_scratch import ViTScratchForImageClassification


# How many of the images that do not calibrate are compared on. Of fewer, one image is more than a point.
MIN_COMPARED, MAX_COMPARED = 100, 1000
SEED = 0


class Calibrated(NamedTuple):
    """The program in int8, the same in float32, and some of the images they were compared on, (8, C, H, W)."""

    program: ExportedModel
    exact: ExportedModel
    pixel_values: torch.Tensor


class Difference(NamedTuple):
    """What int8 changes on n images."""

    n: int
    agreement: float  # the share of images with the same best label
    right: tuple[int, int] | None  # in float32 and in int8; None where the images have no labels of the model

    def __str__(self) -> str:
        line = f"{self.agreement:.2%} of {self.n:,} images that did not calibrate have the same best label in int8."
        if self.right is None:
            return line
        exact, int8 = (f"{right:,} ({right / self.n:.2%})" for right in self.right)
        return f"{line} Right: {exact} in float32, {int8} in int8."


def check_flags(arguments: argparse.Namespace) -> None:
    """Raises InputError for flags of int8 that do not go together."""
    if arguments.int8 and arguments.format not in ("onnx", "openvino"):
        raise InputError(f"--int8 goes with --format onnx or openvino, not with {arguments.format}.")
    if arguments.int8 and arguments.format == "openvino" and not arguments.calibration_dir:
        raise InputError("--format openvino --int8 is calibrated on images of yours: give --calibration_dir DIR.")
    if arguments.calibration_dir and not (arguments.int8 and arguments.format == "openvino"):
        raise InputError("--calibration_dir goes with --format openvino --int8. Give both, or leave it out.")
    if arguments.calibration_dir and arguments.images:
        raise InputError("--images: with --calibration_dir, the images of DIR are compared on. Leave --images out.")
    if arguments.calibration_images < 1 or not 0 <= arguments.min_agreement <= 1:
        raise InputError(
            f"--calibration_images {arguments.calibration_images} must be at least 1, --min_agreement "
            f"{arguments.min_agreement:g} from 0 to 1."
        )


def calibrate(
    model: ViTScratchForImageClassification, processor: ViTScratchImageProcessor, arguments: argparse.Namespace
) -> Calibrated:
    """
    The program of a model in int8, calibrated on images of `arguments.calibration_dir` and compared with the model on
    others of these. Prints the comparison; raises InputError if it is below `arguments.min_agreement`.
    """
    examples, has_labels = read_images(arguments.calibration_dir, model)
    count = arguments.calibration_images
    if len(examples) < count + MIN_COMPARED:
        least = max(len(examples) - MIN_COMPARED, 0)
        way_out = f"Give more images{f', or --calibration_images {least}' if least else ''}."
        raise InputError(
            f"--calibration_dir {arguments.calibration_dir} has {len(examples):,} images: --calibration_images {count} "
            f"calibrate, and at least {MIN_COMPARED} others are compared on. {way_out}"
        )
    order = np.random.default_rng(SEED).permutation(len(examples)).tolist()
    dataset = ImageClassificationDataset(examples, processor, model.config.num_channels)
    normalize = Normalize(processor)

    def batches(indices: list[int], what: str) -> Any:
        loader = DataLoader(Subset(dataset, indices), BATCH, collate_fn=ImageCollator())
        for batch in tqdm(loader, desc=what, unit=" batches", leave=False, disable=None):
            yield normalize(batch["pixel_values"]), batch["labels"]

    images = [image[None] for pixels, _ in batches(order[:count], "reading") for image in pixels]
    exact = export(model, "openvino", arguments.any_size)
    check(compare(model, exact, torch.cat(images[:8])), "openvino")
    program = export(model, "openvino", arguments.any_size, calibration=images)
    n, same, right, compared = 0, 0, [0, 0], []
    for pixels, labels in batches(order[count : count + MAX_COMPARED], "comparing"):
        logits = [torch.as_tensor(run(pixel_values=pixels).logits) for run in (exact, program)]
        best = [one.argmax(-1) for one in logits]
        is_same = (best[0] == best[1]) & logits[1].isfinite().all(-1)
        n, same = n + len(pixels), same + int(is_same.sum())
        right = [number + int((one == labels).sum()) for number, one in zip(right, best)]
        compared = compared or [pixels[:8].clone()]
    difference = Difference(n, same / n, tuple(right) if has_labels else None)
    print(difference)
    check_agreement(difference, arguments.min_agreement)
    return Calibrated(program, exact, compared[0])


def check_agreement(difference: Difference, minimum: float) -> None:
    """Raises InputError if fewer than this share of images have the same best label."""
    if difference.agreement < minimum:
        raise InputError(
            f"In int8 the program is too far from the model: {difference.agreement:.2%} of {difference.n:,} images "
            f"have the same best label, and --min_agreement asks for {minimum:.2%}. Nothing was written. Calibrate on "
            "more images, of the kind that the model is for; or, if as many as above are right, allow it with "
            f"--min_agreement {int(1000 * difference.agreement) / 1000:g}."
        )


def read_images(place: str, model: ViTScratchForImageClassification) -> tuple[Examples, bool]:
    """The images of a place that evaluate.py reads, with or without labels; whether these are labels of the model."""
    if model.config.problem_type == "regression":
        raise InputError("--calibration_dir: int8 is judged by the best labels, and MODEL predicts a number.")
    problems = Problems()
    train_dir, dataset_name = place_or_name(place)
    options = DataArguments(train_dir=train_dir, dataset_name=dataset_name)
    source = read_source(options, None, problems, needs_labels=False)
    split = source and read_split("training", source.train, options, problems, needs_labels=False)
    if split is None or problems.messages:
        raise problems.as_error()
    known = {str(name): index for index, name in model.config.id2label.items()}
    is_plain = bool(split.label_names) and not split.is_multi_label and not split.is_regression
    names = {index: split.label_names[index] for index in set(split.used())} if is_plain else {}
    if is_plain and known.keys() >= set(names.values()):
        return split.examples({index: int(known[name]) for index, name in names.items()}, model.num_labels), True
    return LabelledSplit(split.images, [], [0] * len(split.images), is_ordered=False).examples({0: 0}, 1), False
