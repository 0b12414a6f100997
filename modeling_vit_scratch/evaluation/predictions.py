# SPDX-License-Identifier: Apache-2.0
"""The logits of every image, computed once, by one process or several."""

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
from ..data.collation import ImageCollator, Normalize, input_size
from ..data.dataset import Examples, ImageClassificationDataset, StoredImage
from ..modeling_vit_scratch import ViTScratchForImageClassification


@dataclass(frozen=True)
class Predictions:
    """
    Attributes:
        logits: (N, V, K) of V views, float32, not divided by any temperature.
        labels: (N,), or 0 and 1 (N, K).
        images_per_second: from reading to logits, without the first batch; None if there was only one.
    """

    logits: np.ndarray
    labels: np.ndarray
    images_per_second: float | None


class ViewsDataset(ImageClassificationDataset):
    """
    ImageClassificationDataset with `crops` views of each image, "pixel_values" (V, C, H, W): 2 are the image and its
    mirror image; 5 are corners and centre; 10 are both.
    """

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
    Logits of every image, in the order of the examples. The model's temperature is not applied.

    Args:
        model, processor: of the same checkpoint.
        examples: images and labels.
        accelerator: of this process.
        batch_size, num_workers: per process.
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
    model.config.calibrated, is_main = False, accelerator.is_main_process
    bar = tqdm(total=count, desc="evaluating", unit=" images", disable=not is_main, leave=False)
    try:
        with torch.inference_mode(), bar:
            for batch in loader:
                indices, values = accelerator.gather(_forward(model, normalize, batch))
                # Processes get equally many images: some come twice, and are written to the same row.
                rows = indices.cpu().numpy()
                logits[rows] = values.float().cpu().numpy()
                seen[rows] = True
                bar.update(int(seen.sum()) - bar.n)
                start = start or (time.perf_counter(), int(seen.sum()))
    finally:
        model.config.calibrated = was_calibrated
    if not seen.all():
        raise RuntimeError(f"{int((~seen).sum())} of {count} images were not evaluated: this is a bug.")
    rest = count - start[1]
    rate = rest / (time.perf_counter() - start[0]) if rest else None
    return Predictions(logits, np.asarray(examples.labels), rate)


def _forward(
    model: ViTScratchForImageClassification, normalize: Normalize | None, batch: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (B,) and logits (B, V, K)."""
    views = batch["pixel_values"]  # (B, V, C, H, W)
    pixel_values = views.flatten(0, 1)
    pixel_values = pixel_values if normalize is None else normalize(pixel_values)
    return batch["keys"][:, 2].contiguous(), model(pixel_values).logits.unflatten(0, views.shape[:2])
