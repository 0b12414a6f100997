# SPDX-License-Identifier: Apache-2.0
"""A trained network of any family that shows a student what it makes of the same images."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.image_processing_utils import BaseImageProcessor

from ..common.errors import InputError
from ..common.pretrained import hash_weights, loading, refuse_missing_path
from ..configuration_vit_scratch import ViTScratchConfig
from ..data.collation import normalization
from ..data.sources import listed
from ..modeling_vit_scratch import ViTScratchModel


_TOKENS = ("cls_token", "class_token", "class_embedding")  # transformers' names of the class token


class Teacher:
    """
    Any classifier of transformers, or an encoder if `labels` is None, for pixels that the student's processor has
    normalised. Raises InputError if it can't be loaded, lacks weights or labels, or takes images of other channels.
    """

    def __init__(
        self, name: str, processor: BaseImageProcessor, student: ViTScratchConfig, labels: list[str] | None,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        what = f"--teacher_model {name}"
        refuse_missing_path(what, name)
        kind = AutoModel if labels is None else AutoModelForImageClassification
        with loading(what):
            model, info = kind.from_pretrained(name, output_loading_info=True, dtype=torch.float32)
            own = AutoImageProcessor.from_pretrained(name)
        # Features are taken before a pooling layer, which an encoder may lack.
        missing = [key for key in info["missing_keys"] if labels is not None or ".pooler." not in f".{key}"]
        if missing:
            raise InputError(f"{what} lacks weights, e.g. {min(missing)}: it was not trained for this. Give another.")
        self.channels = getattr(model.config, "num_channels", 3)
        if student.num_channels not in (1, self.channels):
            raise InputError(f"{what} takes {self.channels} channels, the images have {student.num_channels}.")
        self.order = None if labels is None else _match_labels(what, model.config, labels, student.problem_type)
        # (x - student's offset) / student's scale are pixel values: exactly x for the same processor.
        (scale, offset), (own_scale, own_offset) = normalization(processor), normalization(own)
        self.scale = (own_scale / scale).to(device)
        self.shift = (own_offset - offset * (own_scale / scale)).to(device)
        self.size, self.model = _input_size(own), model.to(device).eval().requires_grad_(False)
        self.has_class_token = any(key.endswith(_TOKENS) for key, _ in model.named_parameters())
        self.name = Path(name).resolve().name if Path(name).exists() else name
        self.digest = hash_weights(model).hexdigest()[:16]
        with loading(what):  # it would fail so in the first step
            self.width = self(torch.zeros(1, student.num_channels, *student.image_hw, device=device)).shape[1]

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        """The student's pixels (B, C, H, W) -> logits of its labels (B, K), or features (B, D), float32."""
        images = (pixel_values * self.scale + self.shift).expand(-1, self.channels, -1, -1)
        if self.size is not None and self.size != images.shape[-2:]:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        outputs = self.model(pixel_values=images)
        if self.order is not None:
            return outputs.logits[:, self.order].float()
        if isinstance(self.model, ViTScratchModel):
            return outputs.pooler_output.float()
        states = outputs.last_hidden_state.float()  # (B, T, D), of a convolutional network (B, D, rows, columns)
        if states.ndim == 4:
            return states.mean((2, 3))
        return states[:, 0] if self.has_class_token else states.mean(1)


def _match_labels(what: str, config: Any, labels: list[str], problem: str) -> list[int]:
    """The teacher's class of each label, by name."""
    names = [config.id2label[index] for index in range(config.num_labels)]
    if "multi_label_classification" in (problem, config.problem_type):
        raise InputError(f"{what}: with several labels for an image, only --distillation_type features works.")
    unmatched = [label for label in labels if names.count(label) != 1]
    if unmatched:
        raise InputError(
            f"{what} must have each label once, and has not, for {len(unmatched)} of {len(labels)}: "
            f"{listed(unmatched)}. It has {listed(names)}. --distillation_type features needs no classes."
        )
    return [names.index(label) for label in labels]


def _input_size(processor: BaseImageProcessor) -> tuple[int, int] | None:
    """Height and width of what a processor makes, a square for a shorter side; None for any size."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    size = {} if size is None else dict(size)
    side = size.get("shortest_edge")
    height, width = size.get("height") or side, size.get("width") or side
    return None if height is None else (height, width)
