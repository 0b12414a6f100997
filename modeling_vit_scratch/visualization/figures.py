# SPDX-License-Identifier: Apache-2.0
"""
The figures of scripts/visualize.py: what they show, for --help, and the tools to draw them.

matplotlib comes with the extra `plot` and is imported only to draw. Colours are viridis and magma, which read the same
in grey and to the colour-blind.
"""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..common.errors import InputError


STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "figure.titlesize": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 150,
    "svg.hashsalt": "vit",  # names within the file that are the same every time
}
CAPTION_POINTS = 7.5
TITLES = {
    "filters": "Patch embedding filters: principal components",
    "positions": "Position embedding similarity",
    "distance": "Mean attention distance",
    "rollout": "Attention rollout",
    "heads": "Attention of every head",
    "gradcam": "Grad-CAM",
}
# A larger grid is sampled evenly.
MAX_TILES = 14
# Figures of photos. The paper averages the attention distance over 128 (Figure 11); the others fit on a page.
LIMITS = {"distance": 128, "rollout": 8, "heads": 1, "gradcam": 8, "sheet": 128}

DESCRIPTIONS: dict[str, str] = {
    "filters": """
What the first layer looks for (Figure 7, left, of the paper).

The patch embedding multiplies each patch with as many filters as tokens are wide. Their first 28 principal
components are shown, the strongest first: a trained model has plain colours, edges and waves, of low frequency
before high, as one would choose to describe a small patch; a model that has learned nothing shows noise. Of a
hybrid, the filters are those of the ResNet's first convolution.
""",
    "positions": """
What the model knows about positions (Figure 7, centre, and D.4 of the paper).

Each tile belongs to one patch, and shows the cosine similarity of its position embedding with that of every patch.
In trained models neighbours are similar and, even with learned 1-D embeddings, rows and columns appear. In untrained
ones there are only single points.
""",
    "distance": """
How far each head looks (Figure 7, right, and D.7 of the paper).

A dot is a head of a layer: the distance in pixels between a patch and what it attends to, weighted by attention,
averaged over patches and photos. In trained models some heads of the first layers look at neighbours, as a
convolution would, and others at the whole image; in the last layers nearly all look far. A head on the dashed line
looks as far as one that attends to all patches alike. The paper takes 128 photos; give a folder.
""",
    "rollout": """
What the model looks at, through all layers (Figures 6 and 14, and D.8 of the paper).

Attention rollout (Abnar & Zuidema, 2020): the attention of a layer, averaged over heads, mixes tokens, and the
residual connection keeps them; the product over all layers says how much of each patch is in what represents the
image. A photo is lit where the map is large. It shows where information can have come from, not what speaks for
a class: see gradcam. A map that is the same for every photo is that of a model that has learned little.
""",
    "heads": """
What every head of every layer looks at, in one photo.

A map for each head: the attention of the class token to the patches or, in a model that pools by the mean, the mean
attention of all patches. Each is scaled by its own largest weight, so that maps show places, not amounts. Look for
heads with a fixed pattern, heads that follow objects, and heads that are alike.
""",
    "gradcam": """
Which patches speak for a class.

Grad-CAM (Selvaraju et al., 2017), on the tokens of the last layer before its attention: channels weighted by the
gradient of the class's logit, summed, negative values cut. By default the class is the one that the model
predicts; --label names another, to see what would speak for it. It is a rough map, in patches.
""",
    "sheet": """
All figures of a model on one page.

Filters, position similarity and attention distance above; attention rollout and Grad-CAM of the first three photos
and every head for the first one below. Where a model has no such figure, the sheet says why. Each figure is
explained in its own --help.
""",
}


def check_drawing(file: Path) -> None:
    """Raises InputError without matplotlib, or if it can't write files with this suffix."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError('Pictures are drawn with matplotlib: pip install -e ".[plot]"') from error
    if file.suffix.lower().lstrip(".") not in Figure().canvas.get_supported_filetypes():
        raise InputError(f"A picture can't be written as {file.name}. Let it end in .png, .pdf or .svg.")


def save_figure(draw: Callable[[Any], None], size: tuple[float, float], file: Path) -> None:
    """
    Writes a figure; the same figure gives the same file.

    Args:
        draw: gets the empty figure.
        size: width and height in inches.
        file: .png, .pdf or .svg; its folder is created.

    Raises:
        InputError: as `check_drawing`.
    """
    check_drawing(file)
    import matplotlib

    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(file.suffix.lower())
    with matplotlib.rc_context(STYLE):
        figure = new_figure(size)
        draw(figure)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata=undated)


def new_figure(size: tuple[float, float]) -> Any:
    """An empty figure, `size` in inches, that leaves room for every label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # inches
    return figure


def tiles(images: np.ndarray, gap: int = 1) -> np.ndarray:
    """Joins a grid of images, (R, C, h, w[, 3]) -> (R * (h + gap) - gap, ...), with NaN between them."""
    rows, columns, height, width, *colours = images.shape
    canvas = np.full((rows * (height + gap), columns * (width + gap), *colours), np.nan)
    for row, column in np.ndindex(rows, columns):
        top, left = row * (height + gap), column * (width + gap)
        canvas[top : top + height, left : left + width] = images[row, column]
    return canvas[: canvas.shape[0] - gap, : canvas.shape[1] - gap]


def to_unit(array: np.ndarray, axis: tuple[int, ...] | None = None) -> np.ndarray:
    """Scales to 0..1 over the axes; a constant becomes 0."""
    low, high = array.min(axis=axis, keepdims=True), array.max(axis=axis, keepdims=True)
    return np.divide(array - low, high - low, out=np.zeros(array.shape), where=high > low)


def over_photo(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales a map of patches (rows, columns) to a photo (height, width), smoothly, with the maximum 1."""
    values = values / max(values.max(), np.finfo(float).tiny)
    smooth = Image.fromarray(values.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(smooth).clip(0, 1)


def lit(photo: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A photo (H, W, 3), uint8, bright where a map of patches is large; floats from 0 to 1."""
    return photo / 255 * over_photo(values, *photo.shape[:2])[..., None]


def coloured(photo: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A photo (H, W, 3), uint8, in colours where a map of patches is large; floats from 0 to 1."""
    import matplotlib

    strength = over_photo(values, *photo.shape[:2])
    part = 0.75 * np.sqrt(strength)[..., None]
    return photo / 255 * (1 - part) + matplotlib.colormaps["magma"](strength)[..., :3] * part


def describe(figure: Any, width: float, title: str, caption: str) -> None:
    """Writes title and caption over and under a figure that is `width` inches wide."""
    figure.suptitle(title, weight="bold")
    characters = int(width * 72 / CAPTION_POINTS / 0.58)  # a letter is a good half as wide as high
    figure.supxlabel(textwrap.fill(caption, characters), fontsize=CAPTION_POINTS, color="0.35")


def label_tiles(axes: Any, rows: np.ndarray, columns: np.ndarray, tile: tuple[int, int], gap: int) -> None:
    """Labels rows and columns of tiles, from 1; only every second one if there are many."""
    for axis, names, size in ((axes.yaxis, rows, tile[0]), (axes.xaxis, columns, tile[1])):
        step = 1 + (len(names) > 16)
        axis.set_ticks(np.arange(0, len(names), step) * (size + gap) + (size - 1) / 2, names[::step] + 1)
        axis.set_tick_params(length=0, labelsize=7)
    axes.spines[["left", "bottom"]].set_visible(False)
