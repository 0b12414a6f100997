# SPDX-License-Identifier: Apache-2.0
"""Runs a model over images, in one process or several, and gathers the logits of each image exactly once."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import SizeDict

from ..common.errors import InputError
from ..data.collation import ImageCollator
from ..data.dataset import Examples, ImageClassificationDataset
from ..data.decoding import StoredImage
from ..data.pixels import Normalize, input_size
from ..modeling_vit_scratch import ViTScratchForImageClassification


@dataclass(frozen=True)
class Predictions:
    """
    Attributes:
        logits: (N, V, K), float32: of V views of each image, not divided by any temperature.
        labels: (N,), or (N, K) of 0 and 1.
        images_per_second: of reading, preparing and computing, without the first batch; None if there was but one.
    """

    logits: np.ndarray
    labels: np.ndarray
    images_per_second: float | None


class ViewsDataset(ImageClassificationDataset):
    """As ImageClassificationDataset, with several views of each image: "pixel_values" (V, C, H, W)."""

    def __init__(
        self, examples: Examples, processor: BaseImageProcessor, num_channels: int, crops: int, size: tuple[int, int]
    ) -> None:
        super().__init__(examples, processor, num_channels, with_keys=True)
        self.crops, self.size = crops, size
        if crops > 2 and not self.is_ours:
            raise InputError(f"--crops {crops} needs the image processor of this library. Take --crops 1 or 2.")

    def _fit(self, stored: StoredImage) -> torch.Tensor:
        views = self._cut(stored) if self.crops > 2 else super()._fit(stored)[None]
        return torch.cat([views, views.flip(-1)]) if self.crops in (2, 10) else views

    def _cut(self, stored: StoredImage) -> torch.Tensor:
        """Corners and centre, as Krizhevsky et al. (2012) took 224 pixels of 256: the input is 7/8 of what is cut."""
        height, width = self.size
        scaled = SizeDict(height=round(height * 8 / 7), width=round(width * 8 / 7))
        settings = {"do_resize": True, "size": scaled, "crop_pct": None, "do_center_crop": False, "crop_size": None}
        pixels = stored.fit(self.processor, **settings)
        bottom, right = scaled.height - height, scaled.width - width
        corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
        return torch.stack([pixels[:, top : top + height, left : left + width] for top, left in corners])


def predict(
    model: ViTScratchForImageClassification,
    processor: BaseImageProcessor,
    examples: Examples,
    accelerator: Accelerator,
    batch_size: int = 128,
    num_workers: int = 0,
    crops: int = 1,
) -> Predictions:
    """
    Logits of every image, in the order of the examples.

    Processes get equally many images, so the last batch is filled up with images that were there already. Each row is
    put where its index says; whatever was there twice counts once.

    Args:
        model: its temperature is not applied here.
        processor: the model's.
        examples: images and labels.
        accelerator: of this process.
        batch_size: per process.
        num_workers: processes that read images.
        crops: views of each image: 1, 2, 5 or 10.
    """
    size, count = input_size(processor, model.config), len(examples)
    dataset = ViewsDataset(examples, processor, model.config.num_channels, crops, size)
    batch_size = min(batch_size, -(-count // accelerator.num_processes))
    loader = DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=ImageCollator())
    loader, normalize = accelerator.prepare_data_loader(loader), Normalize.from_processor(processor)
    model, was_calibrated = model.to(accelerator.device).eval(), model.config.calibrated
    logits = np.full((count, crops, model.config.num_labels), np.nan, dtype=np.float32)
    seen, start = np.zeros(count, dtype=bool), None
    model.config.calibrated = False
    try:
        with (
            torch.inference_mode(),
            tqdm(
                total=count, desc="evaluating", unit=" images", disable=not accelerator.is_main_process, leave=False
            ) as bar,
        ):
            for batch in loader:
                indices, values = accelerator.gather(_forward(model, normalize, batch))
                rows = indices.cpu().numpy()
                logits[rows] = values.float().cpu().numpy()
                seen[rows] = True
                bar.update(int(seen.sum()) - bar.n)
                if start is None:
                    start = (time.perf_counter(), int(seen.sum()))
    finally:
        model.config.calibrated = was_calibrated
    if not seen.all():
        raise RuntimeError(f"{int((~seen).sum())} of {count} images were not evaluated: this is a bug.")
    done = count - start[1]
    rate = done / (time.perf_counter() - start[0]) if done else None
    return Predictions(logits, np.asarray(examples.labels), rate)


def _forward(
    model: ViTScratchForImageClassification, normalize: Normalize | None, batch: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (B,) and logits (B, V, K)."""
    pixel_values = batch["pixel_values"]  # (B, V, C, H, W)
    shape = pixel_values.shape[:2]
    pixel_values = pixel_values.flatten(0, 1)
    pixel_values = pixel_values if normalize is None else normalize(pixel_values)
    return batch["keys"][:, 2].contiguous(), model(pixel_values).logits.unflatten(0, shape)
