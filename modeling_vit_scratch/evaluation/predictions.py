# SPDX-License-Identifier: Apache-2.0
"""The model, and its logits for every image, computed once, by one process or several."""

import time
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import SizeDict

from ..common.errors import InputError
from ..common.pretrained import load_pretrained, require_finite
from ..data.collation import ImageCollator, Normalize, input_size, prepare_workers
from ..data.dataset import Examples, ImageClassificationDataset, StoredImage
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from ..modeling_vit_scratch import ViTScratchForImageClassification
from .arguments import EvaluationArguments


MULTI_LABEL = "multi_label_classification"


def load_model(arguments: EvaluationArguments) -> tuple[ViTScratchForImageClassification, ViTScratchImageProcessor]:
    """The model and its image processor. Raises InputError if it can't be loaded, or has no classifier."""
    name, hub = arguments.model, {"revision": arguments.model_revision, "cache_dir": arguments.cache_dir}
    model, processor, missing = load_pretrained(ViTScratchForImageClassification, f"MODEL {name}", name, hub)
    if missing or not model.num_labels or not any(p.any() for p in model.classifier.parameters()):
        raise InputError(f"MODEL {name} has no trained classifier. Train one with scripts/finetune.py.")
    problem, outputs = model.config.problem_type, model.num_labels
    if problem == "regression" and outputs == 1:
        arguments.problem_type = problem
        names = ("calibrate", "label_issues", "examples", "label_map")
        if given := " ".join(f"--{name}" for name in names if getattr(arguments, name)):
            raise InputError(f"{given}: MODEL {name} predicts a number, and that is for labels. Leave it out.")
    elif problem == "regression" or outputs < 2:
        raise InputError(f"MODEL {name} does not classify: it has problem_type={problem!r} and {outputs} outputs.")
    if arguments.label_issues and problem == MULTI_LABEL:
        raise InputError("--label_issues is for images with one label each.")
    if arguments.threshold is not None and problem != MULTI_LABEL:
        raise InputError(
            f"--threshold {arguments.threshold:g} is for models that give an image any number of labels. MODEL {name} "
            "gives each image its likeliest label. Leave it out."
        )
    model.config.calibrated = arguments.calibrated
    return model, processor


class Predictions(NamedTuple):
    """Of N images in V views."""

    logits: np.ndarray  # (N, V, K), float32, not divided by any temperature
    labels: np.ndarray  # (N,), or 0 and 1 (N, K)
    images_per_second: float | None  # from reading to logits, without the first batch; None if there was only one
    features: np.ndarray  # (N, D), float32, what the classifier sees of the first view


class ViewsDataset(ImageClassificationDataset):
    """`crops` views of an image, "pixel_values" (V, C, H, W): with the mirror image, 5 corners and centre, or both."""

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
    arguments: EvaluationArguments,
) -> Predictions:
    """Logits of every image, in the order of the examples. The model's temperature is not applied."""
    count, crops, config = len(examples), arguments.crops, model.config
    dataset = ViewsDataset(examples, processor, config.num_channels, crops, input_size(processor, config))
    batch_size = min(arguments.per_device_eval_batch_size, -(-count // accelerator.num_processes))
    loader = DataLoader(dataset, batch_size, num_workers=arguments.dataloader_num_workers, collate_fn=ImageCollator())
    prepare_workers(loader)
    loader, normalize = accelerator.prepare_data_loader(loader), Normalize(processor)
    model, was_calibrated = model.to(accelerator.device).eval(), config.calibrated
    logits = np.full((count, crops, config.num_labels), np.nan, dtype=np.float32)
    features = np.zeros((count, model.classifier.in_features), dtype=np.float32)
    seen_by_classifier: list[torch.Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda layer, inputs: seen_by_classifier.append(inputs[0]))
    seen, start = np.zeros(count, dtype=bool), None
    is_quiet = None if accelerator.is_main_process else True  # None: where there is no terminal
    bar = tqdm(total=count, desc="evaluating", unit=" images", disable=is_quiet, leave=False)
    config.calibrated = False
    try:
        with torch.inference_mode(), bar:
            for batch in loader:
                views = batch["pixel_values"]  # (B, V, C, H, W)
                found = model(normalize(views.flatten(0, 1))).logits.unflatten(0, views.shape[:2])  # (B, V, K)
                own = batch["keys"][:, 2].contiguous(), found, seen_by_classifier.pop()[::crops].contiguous()
                indices, found, pooled = accelerator.gather(own)
                # Processes get equally many images: some come twice, and are written to the same row.
                rows = indices.cpu().numpy()
                logits[rows], features[rows] = found.float().cpu().numpy(), pooled.float().cpu().numpy()
                seen[rows] = True
                bar.update(int(seen.sum()) - bar.n)
                start = start or (time.perf_counter(), int(seen.sum()))
    finally:
        config.calibrated = was_calibrated
        hook.remove()
    if not seen.all():
        raise RuntimeError(f"{int((~seen).sum())} of {count} images were not evaluated: this is a bug.")
    require_finite(torch.from_numpy(logits))
    rest = count - start[1]
    rate = rest / (time.perf_counter() - start[0]) if rest else None
    return Predictions(logits, np.asarray(examples.labels), rate, features)
