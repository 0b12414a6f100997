# SPDX-License-Identifier: Apache-2.0
"""From arrays to pictures, with Pillow alone."""

import numpy as np
from PIL import Image


# Pixels of the longer side of a picture on the page.
SIDE = 640
# How bright a patch of no weight is.
SHADE = 0.18


def enlarge(pixels: np.ndarray, side: int = SIDE) -> Image.Image:
    """(H, W, 3) uint8 as a picture whose longer side is `side`; small ones by whole pixels, so that one sees them."""
    image = Image.fromarray(pixels)
    scale = side / max(image.size)
    size = tuple(max(round(edge * scale), 1) for edge in image.size)
    return image.resize(size, Image.Resampling.NEAREST if scale >= 3 else Image.Resampling.BICUBIC)


def over(weights: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (rows, columns) as smooth as a picture of `size` (width, height): 0 to 1, by its largest weight."""
    scaled = np.asarray(weights, np.float32) / max(float(weights.max()), np.finfo(np.float32).tiny)
    smooth = Image.fromarray(scaled).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(smooth).clip(0, 1)


def lit(photo: np.ndarray, weights: np.ndarray, side: int = SIDE) -> Image.Image:
    """The photo (H, W, 3), lit where the map (rows, columns) is large, as in the paper's Figure 6."""
    image = Image.fromarray(photo)
    scale = side / max(image.size)
    image = image.resize(tuple(max(round(edge * scale), 1) for edge in image.size), Image.Resampling.BICUBIC)
    light = SHADE + (1 - SHADE) * over(weights, image.size)[..., None]
    return Image.fromarray((np.asarray(image) * light).round().astype(np.uint8))
