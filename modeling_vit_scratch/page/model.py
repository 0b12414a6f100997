# SPDX-License-Identifier: Apache-2.0
"""A classifier with its image processor: scores of a photo, and its attention maps."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
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
    """
    Scores and maps of a photo.

    Attributes:
        scores: (label, score), best first.
        photo: (H, W, 3) uint8, the part of the photo that the model sees, in the size of the page.
        pixels: (h, w, 3) uint8, the input of the model.
        patch: height and width of a patch in `pixels`; None if the model has none.
        rollout: (L, rows, columns), up to each layer; None if the model has no attention maps.
        heads: (L, A, rows, columns); None with `rollout`.
    """

    scores: list[tuple[str, float]]
    photo: np.ndarray
    pixels: np.ndarray
    patch: tuple[int, int] | None
    rollout: np.ndarray | None
    heads: np.ndarray | None


class Viewer:
    """
    An image classifier of transformers.

    Args:
        model, processor: of the same checkpoint.
        name: on the page.
    """

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model, self.processor, self.name, self.config = model.eval(), processor, name, model.config
        with contextlib.suppress(ValueError, AttributeError):  # of models without attention
            model.set_attn_implementation("eager")  # the one that every model of transformers gives weights of
        self.pipeline = pipeline("image-classification", model=model, image_processor=processor)
        self.device = next(model.parameters()).device
        self.is_probability = self.config.problem_type != "regression"

    def read(self, file: str, name: str) -> Image.Image:
        """
        Reads an upright photo in the mode that the model takes.

        Raises:
            PhotoError: if it can't be read.
        """
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
        """
        The scores of transformers' pipeline: (label, score), best first.

        Raises:
            PhotoError: if the model can't take it.
        """
        with photo_errors(name):
            pixel_values = self._pixel_values(image)
            return self._scores(self.model(pixel_values.to(self.device, self.model.dtype)).logits)

    @torch.inference_mode()
    def explain(self, image: Image.Image, name: str) -> Explanation:
        """
        Scores and maps of a photo.

        Raises:
            PhotoError: if the model can't take it.
        """
        with photo_errors(name):
            pixel_values = self._pixel_values(image)
            outputs = self.model(pixel_values.to(self.device, self.model.dtype), output_attentions=True)
        patch, maps = self._patch(pixel_values), None
        if patch is not None:
            grid = (pixel_values.shape[2] // patch[0], pixel_values.shape[3] // patch[1])
            maps = attention_maps(outputs.get("attentions"), grid, self._pools_mean())
        rollout, heads = (None, None) if maps is None else (part.numpy() for part in maps)
        pixels = as_pixels(pixel_values[0].numpy(), self.processor)
        photo = seen_part(image, self.processor, pixels.shape[:2]) or Image.fromarray(pixels)
        photo = photo.convert("RGB")
        photo.thumbnail((SIDE, SIDE))
        return Explanation(self._scores(outputs.logits), np.asarray(photo), pixels, patch, rollout, heads)

    def positions(self, explanation: Explanation) -> np.ndarray | None:
        """Similarity of the position embeddings, (rows, columns, rows, columns); None if the model has none."""
        if explanation.patch is None:
            return None
        height, width = explanation.pixels.shape[:2]
        similarity = position_similarity(self.model, (height // explanation.patch[0], width // explanation.patch[1]))
        return None if similarity is None else similarity.numpy()

    def details(self) -> list[str]:
        """The size of the model in a few words."""
        config, size = self.config, self.config.num_labels
        details = [f"{sum(parameter.numel() for parameter in self.model.parameters()):,} parameters"]
        image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
        details += [f"{' × '.join(map(str, _pair(image)))} pixels"] if image else []
        details += [f"patches of {' × '.join(map(str, _pair(patch)))}"] if patch else []
        layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
        if isinstance(layers, int) and isinstance(heads, int):
            details.append(f"{layers} layers of {heads} heads")
        return [*details, f"{size} {'class' if size == 1 else 'classes'}"]

    def _pixel_values(self, image: Image.Image) -> torch.Tensor:
        return self.processor(images=[image], return_tensors="pt")["pixel_values"]

    def _scores(self, logits: torch.Tensor) -> list[tuple[str, float]]:
        entries = self.pipeline.postprocess({"logits": logits.cpu()}, top_k=self.config.num_labels)
        return [(str(entry["label"]), entry["score"]) for entry in entries]

    def _patch(self, pixel_values: torch.Tensor) -> tuple[int, int] | None:
        size = getattr(self.config, "patch_size", None)
        height, width = pixel_values.shape[2:]
        if not size or height % _pair(size)[0] or width % _pair(size)[1]:
            return None
        return _pair(size)

    def _pools_mean(self) -> bool:
        return getattr(self.config, "pooling", None) == "mean" or getattr(self.config, "use_mean_pooling", False)


@contextlib.contextmanager
def photo_errors(name: str) -> Iterator[None]:
    """Turns errors of processor and model into PhotoError."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PhotoError(f"{name}: the model can't take this photo. {reason}") from error


def seen_part(image: Image.Image, processor: Any, size: tuple[int, int]) -> Image.Image | None:
    """
    The part of an image that is left after the processor's crop.

    Args:
        image: the original.
        processor: its image processor.
        size: height and width of the processor's output.

    Returns:
        The part in the original resolution; None if the processor adds a border or its settings are not known here.
    """
    crop_pct, crops = getattr(processor, "crop_pct", None), bool(getattr(processor, "do_center_crop", False))
    if crop_pct is None and not crops:
        return image
    resized = {key: value for key, value in dict(getattr(processor, "size", None) or {}).items() if value}
    if crop_pct is not None:  # the shorter side to size / crop_pct
        scale = max(int(size[0] / crop_pct) / image.height, int(size[1] / crop_pct) / image.width)
        scales = (scale, scale)
    elif not getattr(processor, "do_resize", True):
        scales = (1.0, 1.0)
    elif set(resized) == {"shortest_edge"}:
        scale = resized["shortest_edge"] / min(image.size)
        scales = (scale, scale)
    elif set(resized) == {"height", "width"}:
        scales = (resized["height"] / image.height, resized["width"] / image.width)
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
    Loads a classifier by the Auto classes.

    Args:
        source: a folder or a Hub id.
        trust_remote_code, revision: as in `from_pretrained`.

    Raises:
        OSError, ValueError, KeyError: if it can't be loaded, or has no trained classifier.
    """
    options = {"trust_remote_code": trust_remote_code, "revision": revision}
    model, info = AutoModelForImageClassification.from_pretrained(source, output_loading_info=True, **options)
    if info["missing_keys"]:
        raise ValueError(f"it has no trained classifier (no {min(info['missing_keys'])}). Fine-tune it first.")
    processor = AutoImageProcessor.from_pretrained(source, **options)
    return Viewer(model, processor, Path(source).name if Path(source).exists() else source)


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[-1]))
