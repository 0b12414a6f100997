# SPDX-License-Identifier: Apache-2.0
"""Real images to compare a program with its model on: a user's, labelled ones, or two photographs of scikit-learn."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.image_processing_utils import BaseImageProcessor

from ..common.errors import InputError
from ..data.collation import ImageCollator, Normalize
from ..data.dataset import ImageClassificationDataset
from ..evaluation.arguments import EvaluationArguments
from ..evaluation.data import read_evaluation_data
from ..modeling_vit_scratch import ViTScratchForImageClassification


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


def to_pixel_values(images: list[Any], processor: BaseImageProcessor) -> torch.Tensor:
    """Images (n, C, H, W) for the model. Raises ImageDecodeError for a broken file."""
    return torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])


def count_right(
    model: ViTScratchForImageClassification,
    processor: BaseImageProcessor,
    arguments: EvaluationArguments,
    runs: dict[str, Callable[..., Any]],
) -> tuple[int, dict[str, int], str]:
    """
    The number of labelled images, how many of them each of `runs` (models or programs) gets right, and which
    images these are. Raises InputError for what is wrong with the data, or a model with several labels for an image.
    """
    if model.config.problem_type not in (None, "single_label_classification"):
        raise InputError(f"--dataset counts right labels, and this model is for {model.config.problem_type}.")
    names = [str(model.config.id2label[index]) for index in range(model.num_labels)]
    data = read_evaluation_data(arguments, names, is_multi_label=False)
    dataset = ImageClassificationDataset(data.examples, processor, model.config.num_channels)
    normalize, right = Normalize.from_processor(processor), dict.fromkeys(runs, 0)
    loader = DataLoader(dataset, arguments.per_device_eval_batch_size, collate_fn=ImageCollator())
    for batch in tqdm(loader, desc="counting right labels", unit=" batches", leave=False):
        pixel_values = batch["pixel_values"] if normalize is None else normalize(batch["pixel_values"])
        for name, run in runs.items():
            with torch.inference_mode():
                best = torch.as_tensor(run(pixel_values=pixel_values).logits).argmax(-1)
            right[name] += int((best == batch["labels"]).sum())
    return len(data.examples), right, data.description
