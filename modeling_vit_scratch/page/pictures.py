# SPDX-License-Identifier: Apache-2.0
"""From arrays to pictures, with Pillow alone."""

import base64
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageDraw


# Pixels of the longer side: of a picture, and (roughly) of the overview of all heads.
SIDE, TILES_SIDE = 720, 840
MAX_TILES = 14  # rows or columns; a larger grid is sampled evenly
# Nine colours of matplotlib's magma, which reads the same in grey and to the colour-blind.
MAGMA = np.array(
    [(0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122), (229, 80, 100), (251, 135, 97),
     (254, 194, 135), (252, 253, 191)],
    dtype=np.float32,
)  # fmt: skip
# This fraction of the patches has the brightest colour: a single outlier would leave all others dark.
BRIGHTEST = 0.03


def colours(values: np.ndarray) -> np.ndarray:
    """Magma: values (...), 0 to 1, to colours (..., 3), 0 to 255."""
    position = values.clip(0, 1) * (len(MAGMA) - 1)
    below = np.minimum(position.astype(int), len(MAGMA) - 2)
    return MAGMA[below] + (MAGMA[below + 1] - MAGMA[below]) * (position - below)[..., None]


def top(weights: np.ndarray) -> float:
    """The weight with the brightest colour in a map (rows, columns)."""
    return max(float(np.quantile(weights, 1 - BRIGHTEST)), float(np.finfo(np.float32).tiny))


def heat(photo: Image.Image, weights: np.ndarray) -> Image.Image:
    """The photo in grey, in colours where the map (rows, columns) is large."""
    scaled = Image.fromarray(np.asarray(weights / top(weights), np.float32).clip(0, 1))
    glow = np.asarray(scaled.resize(photo.size, Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    grey = np.asarray(photo.convert("L"), np.float32)[..., None] * 0.6
    return Image.fromarray((grey + (colours(glow[..., 0]) - grey) * 0.75 * glow).round().astype(np.uint8))


def sized(pixels: np.ndarray, side: int) -> Image.Image:
    """(H, W, 3) uint8 as a picture whose longer side is `side`."""
    scale = side / max(pixels.shape[:2])
    height, width = (max(round(edge * scale), 1) for edge in pixels.shape[:2])
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


class Overview:
    """Maps (L, A, rows, columns) of all heads, over a photo (H, W, 3): heads from left to right, layers downwards."""

    def __init__(self, photo: np.ndarray, heads: np.ndarray) -> None:
        self.layers, self.heads = heads.shape[:2]
        tile = sized(photo, max(TILES_SIDE // max(self.layers, self.heads, 8), 24))
        self.step = (tile.width + 4, tile.height + 4)
        self.picture = Image.new("RGBA", (self.heads * self.step[0], self.layers * self.step[1]))
        for layer, head in np.ndindex(self.layers, self.heads):
            self.picture.paste(heat(tile, heads[layer, head]), (head * self.step[0] + 2, layer * self.step[1] + 2))

    def at(self, x: int, y: int) -> tuple[int, int]:
        """Layer and head, from 1, at a pixel."""
        layer, head = y // self.step[1] + 1, x // self.step[0] + 1
        return min(max(layer, 1), self.layers), min(max(head, 1), self.heads)

    def marked(self, layers: range, head: int | None) -> Image.Image:
        """The picture with a frame around a head (None: all heads) of layers; all are counted from 1."""
        width, height = self.step
        left, right = (0, self.heads) if head is None else (head - 1, head)
        box = (left * width, (layers[0] - 1) * height, right * width - 1, layers[-1] * height - 1)
        picture = self.picture.copy()
        ImageDraw.Draw(picture).rounded_rectangle(box, radius=3, outline=(99, 102, 241, 255), width=2)
        return picture


def patches(pixels: np.ndarray, patch: tuple[int, int] | None) -> Image.Image:
    """The input of the model, (h, w, 3) uint8, with visible pixels, and with gaps between patches if it has any."""
    height, width = pixels.shape[:2]
    scale = max(SIDE // max(height, width), 1)
    image = Image.fromarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1)).convert("RGBA")
    if patch is None:
        return image
    rows, columns, (down, across) = height // patch[0], width // patch[1], (patch[0] * scale, patch[1] * scale)
    gap = max(min(down, across) // 10, 1)
    spread = Image.new("RGBA", (columns * (across + gap) - gap, rows * (down + gap) - gap))
    for row, column in np.ndindex(rows, columns):
        box = (column * across, row * down, (column + 1) * across, (row + 1) * down)
        spread.paste(image.crop(box), (column * (across + gap), row * (down + gap)))
    return spread


def positions(similarity: np.ndarray) -> Image.Image:
    """Cosine similarities (rows, columns, rows, columns), -1 to 1, as a tile for each patch: the paper's Figure 7."""
    rows, columns = (np.linspace(0, n - 1, min(n, MAX_TILES)).round().astype(int) for n in similarity.shape[:2])
    tile = SIDE // max(len(rows), len(columns))
    image = Image.new("RGBA", (len(columns) * (tile + 3) - 3, len(rows) * (tile + 3) - 3))
    for (i, row), (j, column) in ((a, b) for a in enumerate(rows) for b in enumerate(columns)):
        shown = Image.fromarray(colours((similarity[row, column] + 1) / 2).astype(np.uint8))
        image.paste(shown.resize((tile, tile), Image.Resampling.NEAREST), (j * (tile + 3), i * (tile + 3)))
    return image


def as_pixels(pixel_values: np.ndarray, processor: Any) -> np.ndarray:
    """Undoes a processor's normalisation: (..., C, H, W) -> (..., H, W, 3), uint8."""
    values = np.moveaxis(pixel_values, -3, -1).astype(np.float64)
    if getattr(processor, "do_normalize", False):
        values = values * np.asarray(processor.image_std) + np.asarray(processor.image_mean)
    if getattr(processor, "do_rescale", True):
        values = values / getattr(processor, "rescale_factor", 1 / 255)
    pixels = values.round().clip(0, 255).astype(np.uint8)
    return pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)


def thumbnail(image: Image.Image, side: int = 112) -> str:
    """A small JPEG as a data: URI."""
    small, buffer = image.convert("RGB"), BytesIO()
    small.thumbnail((side, side))
    small.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
