# SPDX-License-Identifier: Apache-2.0
"""A classifier with its image processor: scores of a photo, and its attention maps."""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from .attention import attention_maps, position_similarity
from .pictures import SIDE, as_pixels


class PhotoError(ValueError):
    """A photo that can't be read or that the model can't take. The message names it and says why."""


@dataclass(frozen=True)
class Explanation:
    """Scores and maps of a photo; what the model does not have is None."""

    scores: list[tuple[str, float]]  # label and score, best first
    photo: np.ndarray  # (H, W, 3) uint8, the part that the model sees, in the size of the page
    pixels: np.ndarray  # (h, w, 3) uint8, the input of the model
    patch: tuple[int, int] | None = None  # height and width in `pixels`
    rollout: np.ndarray | None = None  # (L, rows, columns), up to each layer
    heads: np.ndarray | None = None  # (L, A, rows, columns)
    positions: np.ndarray | None = None  # similarity of position embeddings, (rows, columns, rows, columns)


class Viewer:
    """An image classifier of transformers with its image processor, and the name on the page."""

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model, self.processor, self.name, self.config = model.eval(), processor, name, model.config
        with contextlib.suppress(ValueError, AttributeError):  # of models without attention
            model.set_attn_implementation("eager")  # the one that every model of transformers gives weights of
        self.pipeline = pipeline("image-classification", model=model, image_processor=processor)
        self.scorer = self.model  # or something faster with the same logits, for photos without maps
        self.is_probability = self.config.problem_type != "regression"

    def read(self, file: str, name: str) -> Image.Image:
        """An upright photo in the mode that the model takes. Raises PhotoError if it can't be read."""
        try:
            if hasattr(self.processor, "decode"):  # this project's: transparency, 16 bits, gray models
                image = self.processor.decode(file, name=name)
            else:
                with Image.open(file) as opened:
                    image = ImageOps.exif_transpose(opened).convert("RGB")
            if isinstance(image, Image.Image):
                return image
            reason = f"the model takes {self.config.num_channels} channels"
        except Exception as error:  # whatever Pillow, its plugins and damaged files raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            reason = reason.replace(file, name) if file else "the file does not exist"
            reason = reason.removeprefix(f"{name} cannot be read as an image: ")
        raise PhotoError(f"{name} cannot be read as an image: {reason.rstrip('.')}. Take a JPEG, PNG or WebP file.")

    @torch.inference_mode()
    def classify(self, image: Image.Image, name: str) -> list[tuple[str, float]]:
        """The scores of transformers' pipeline: (label, score), best first. Raises PhotoError as `explain`."""
        return self._scores(self._forward(image, name)[1])

    @torch.inference_mode()
    def explain(self, image: Image.Image, name: str) -> Explanation:
        """Scores and maps of a photo. Raises PhotoError if the model can't take it."""
        pixel_values, outputs = self._forward(image, name, output_attentions=True)
        pixels = as_pixels(pixel_values[0].numpy(), self.processor)
        height, width = pixels.shape[:2]
        photo = (seen_part(image, self.processor, (height, width)) or Image.fromarray(pixels)).convert("RGB")
        photo.thumbnail((SIDE, SIDE))
        explanation = Explanation(self._scores(outputs), np.asarray(photo), pixels)
        patch = _pair(getattr(self.config, "patch_size", None))
        if patch is None or height % patch[0] or width % patch[1]:
            return explanation
        grid = (height // patch[0], width // patch[1])
        pools_mean = getattr(self.config, "pooling", None) in ("mean", "map") or getattr(
            self.config, "use_mean_pooling", False
        )
        rollout, heads = attention_maps(outputs.get("attentions"), grid, pools_mean)
        positions = position_similarity(self.model, grid)
        return replace(explanation, patch=patch, rollout=rollout, heads=heads, positions=positions)

    def details(self) -> list[str]:
        """The size of the model in a few words."""
        config, size = self.config, self.config.num_labels
        details = [f"{self.model.num_parameters():,} parameters"]
        if image := _pair(getattr(config, "image_size", None)):
            details.append(f"{image[0]} × {image[1]} pixels")
        if patch := _pair(getattr(config, "patch_size", None)):
            details.append(f"patches of {patch[0]} × {patch[1]}")
        layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
        if isinstance(layers, int) and isinstance(heads, int):
            details.append(f"{layers} layers of {heads} heads")
        return [*details, f"{size} {'class' if size == 1 else 'classes'}"]

    def _forward(self, image: Image.Image, name: str, **options: Any) -> tuple[torch.Tensor, Any]:
        """`pixel_values` of the photo, and the model's outputs."""
        try:
            pixel_values = self.processor(images=[image], return_tensors="pt")["pixel_values"]
            run = self.model if options else self.scorer
            return pixel_values, run(pixel_values.to(self.model.device, self.model.dtype), **options)
        except (ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise PhotoError(f"{name}: the model can't take this photo. {reason}") from error

    def _scores(self, outputs: Any) -> list[tuple[str, float]]:
        entries = self.pipeline.postprocess({"logits": outputs.logits.cpu()}, top_k=self.config.num_labels)
        return [(str(entry["label"]), entry["score"]) for entry in entries]


def seen_part(image: Image.Image, processor: Any, size: tuple[int, int]) -> Image.Image | None:
    """
    The part of an image, in its own resolution, that the processor's crop to `size` (height, width) leaves. None if it
    adds a border, or if its settings are not known here.
    """
    crop_pct = getattr(processor, "crop_pct", None)
    if crop_pct is None and not getattr(processor, "do_center_crop", False):
        return image
    resized = {key: value for key, value in dict(getattr(processor, "size", None) or {}).items() if value}
    if crop_pct is not None:  # the shorter side to size / crop_pct
        scales = [max(int(size[0] / crop_pct) / image.height, int(size[1] / crop_pct) / image.width)] * 2
    elif not getattr(processor, "do_resize", True):
        scales = [1.0, 1.0]
    elif set(resized) == {"shortest_edge"}:
        scales = [resized["shortest_edge"] / min(image.size)] * 2
    elif set(resized) == {"height", "width"}:
        scales = [resized["height"] / image.height, resized["width"] / image.width]
    else:
        return None
    height, width = size[0] / scales[0], size[1] / scales[1]
    if height > image.height + 1 or width > image.width + 1:
        return None
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (max(left, 0), max(top, 0), min(left + width, image.width), min(top + height, image.height))
    return image.crop(tuple(round(edge) for edge in box))


def load(source: str, trust_remote_code: bool = False, revision: str = "main") -> Viewer:
    """
    A classifier from a folder or the Hub, by the Auto classes. Raises OSError, ValueError or KeyError if it can't be
    loaded, or has no trained classifier.
    """
    options = {"trust_remote_code": trust_remote_code, "revision": revision}
    model, info = AutoModelForImageClassification.from_pretrained(source, output_loading_info=True, **options)
    if info["missing_keys"]:
        raise ValueError(f"it has no trained classifier (no {min(info['missing_keys'])}). Fine-tune it first.")
    processor = AutoImageProcessor.from_pretrained(source, **options)
    return Viewer(model, processor, Path(source).name if Path(source).exists() else source)


def _pair(size: Any) -> tuple[int, int] | None:
    """Height and width of a size in a configuration."""
    if not size:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
