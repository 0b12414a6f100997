# SPDX-License-Identifier: Apache-2.0
"""Draws with matplotlib, an extra; in viridis and magma, which read the same in grey and to the colour-blind."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..common.errors import InputError
from ..common.files import writing_problem


STYLE = {
    "font.size": 9.0, "axes.titlesize": 9.0, "figure.titlesize": 11.0, "axes.spines.top": False,
    "axes.spines.right": False, "savefig.dpi": 150, "figure.constrained_layout.w_pad": 0.08,  # inches
    "figure.constrained_layout.h_pad": 0.08, "svg.hashsalt": "vit",  # the same names in the file every time
}  # fmt: skip
CAPTION_POINTS = 7.5
TITLES = {
    "filters": "Patch embedding filters: principal components",
    "positions": "Position embedding similarity",
    "distance": "Mean attention distance",
    "rollout": "Attention rollout",
    "heads": "Attention of every head",
    "gradcam": "Grad-CAM",
}


def check_drawing(file: Path, arrays: Path | None = None) -> None:
    """Raises InputError without matplotlib, for another suffix than its own, and if a foreign file is in the way."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError('Pictures are drawn with matplotlib: pip install -e ".[plot]"') from error
    if file.suffix.lower().lstrip(".") not in Figure().canvas.get_supported_filetypes():
        raise InputError(f"A picture can't be written as {file.name}. Let it end in .png, .pdf or .svg.")
    if file.exists() and b"matplotlib" not in file.read_bytes().lower():
        raise InputError(f"{file} is there already, and is no figure of this command. Give another --output.")
    for name, written in (("--output", file), ("--save_arrays", arrays)):
        if written is not None and (reason := writing_problem(written.parent)):
            raise InputError(f"{name} {written}: {reason}")
    if arrays is not None and arrays.exists():
        raise InputError(f"--save_arrays {arrays} is there already. Give another name.")


def save_figure(draw: Callable[[Any], None], size: tuple[float, float], file: Path) -> None:
    """Writes what `draw` draws into an empty figure, `size` in inches; the same figure gives the same file."""
    check_drawing(file)
    import matplotlib
    from matplotlib.figure import Figure

    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(file.suffix.lower())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata=undated)


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


# --- Many images ------------------------------------------------------------------------------------------------------


def draw_grid(grid: Any, title: str, file: Path, titles: list[list[str]] | None = None) -> None:
    """
    Writes a grid of images, rows of (H, W, 3), as a PNG; `titles`: of each, or else the columns are epochs. Raises
    InputError without matplotlib.
    """
    rows, columns = len(grid), len(grid[0])
    size = 1.5 if titles is None else 2.4  # inches

    def draw(figure: Any) -> None:
        figure.suptitle(title, fontsize=8, wrap=True)
        axes = figure.subplots(rows, columns, squeeze=False)
        for row, column in np.ndindex(rows, columns):
            axes[row, column].imshow(grid[row][column])
            axes[row, column].set_axis_off()
            if titles is not None:
                axes[row, column].set_title(titles[row][column], fontsize=7)
            elif row == 0:
                axes[row, column].set_title("as it is" if column == 0 else f"epoch {column}", fontsize=8)

    save_figure(draw, (size * columns, size * rows + 0.6), file)
