# SPDX-License-Identifier: Apache-2.0
"""
From arrays to pictures. Every function draws into a matplotlib figure or a part of one; matplotlib comes with the extra
`plot`, and is not imported before something is drawn. Colours are viridis and magma, which read the same in grey and to
the colour-blind.
"""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..common.errors import InputError
from .embeddings import Filters


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
# Of a grid with more rows or columns, so many are shown, evenly spread.
MAX_TILES = 14


def check_drawing(file: Path) -> None:
    """Raises InputError without matplotlib, and for a file whose suffix is of no format that it writes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError('Pictures are drawn with matplotlib: pip install -e ".[plot]"') from error
    if file.suffix.lower().lstrip(".") not in Figure().canvas.get_supported_filetypes():
        raise InputError(f"A picture can't be written as {file.name}. Let it end in .png, .pdf or .svg.")


def save_figure(draw: Callable[[Any], None], size: tuple[float, float], file: Path) -> None:
    """
    Draws a figure and writes it, in the format of the file's suffix.

    Args:
        draw: gets the empty figure.
        size: width and height in inches.
        file: .png, .pdf or .svg; its folder is made.

    Raises:
        InputError: as `check_drawing`.
    """
    check_drawing(file)
    import matplotlib

    # The same picture is the same file: no date in it.
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(file.suffix.lower())
    with matplotlib.rc_context(STYLE):
        figure = new_figure(size)
        draw(figure)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata=undated)


def new_figure(size: tuple[float, float]) -> Any:
    """An empty figure of so many inches that gives every label its room."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # inches
    return figure


def tiles(images: np.ndarray, gap: int = 1) -> np.ndarray:
    """Rows and columns of pictures in one, (R, C, h, w[, 3]) -> (R * (h + gap) - gap, ...), with NaN between them."""
    rows, columns, height, width, *colours = images.shape
    canvas = np.full((rows * (height + gap), columns * (width + gap), *colours), np.nan)
    for row, column in np.ndindex(rows, columns):
        top, left = row * (height + gap), column * (width + gap)
        canvas[top : top + height, left : left + width] = images[row, column]
    return canvas[: canvas.shape[0] - gap, : canvas.shape[1] - gap]


def to_unit(array: np.ndarray, axis: tuple[int, ...] | None = None) -> np.ndarray:
    """Shifted and scaled to 0..1 over the axes; what is constant becomes 0."""
    low, high = array.min(axis=axis, keepdims=True), array.max(axis=axis, keepdims=True)
    return np.divide(array - low, high - low, out=np.zeros(array.shape), where=high > low)


def over_photo(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map of patches (rows, columns) as smooth as a photo (height, width), 0 to 1 by its largest value."""
    values = values / max(values.max(), np.finfo(float).tiny)
    smooth = Image.fromarray(values.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(smooth).clip(0, 1)


def describe(figure: Any, title: str, caption: str, width: float) -> None:
    """Title above, and below, in lines that fit `width` inches, how to read it."""
    figure.suptitle(title, weight="bold")
    characters = int(width * 72 / CAPTION_POINTS / 0.58)  # a letter is a good half as wide as high
    figure.supxlabel(textwrap.fill(caption, characters), fontsize=CAPTION_POINTS, color="0.35")


def draw_filters(figure: Any, filters: Filters, caption: str, width: float) -> None:
    """The components in rows of seven, each scaled to the full range of colours."""
    components = to_unit(filters.components, axis=(1, 2, 3))
    if components.shape[-1] != 3:  # neither colours nor one gray: the mean over channels
        components = np.repeat(components.mean(axis=-1, keepdims=True), 3, axis=-1)
    rows = -(-len(components) // 7)
    padded = np.full((rows * 7, *components.shape[1:]), np.nan)
    padded[: len(components)] = components
    axes = figure.subplots()
    axes.imshow(np.nan_to_num(tiles(padded.reshape(rows, 7, *components.shape[1:])), nan=1.0))
    axes.set_axis_off()
    describe(figure, TITLES["filters"], caption, width)


def spread(size: int) -> np.ndarray:
    """Which of `size` rows or columns are shown."""
    return np.linspace(0, size - 1, min(size, MAX_TILES)).round().astype(int)


def label_tiles(axes: Any, rows: np.ndarray, columns: np.ndarray, tile: tuple[int, int], gap: int) -> None:
    """Ticks in the middle of tiles, counted from 1; every second one where there are many."""
    for axis, names, size in ((axes.yaxis, rows, tile[0]), (axes.xaxis, columns, tile[1])):
        step = 1 + (len(names) > 16)
        axis.set_ticks(np.arange(0, len(names), step) * (size + gap) + (size - 1) / 2, names[::step] + 1)
        axis.set_tick_params(length=0, labelsize=7)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def draw_positions(figure: Any, similarity: np.ndarray, caption: str, width: float) -> None:
    """A map for each patch, at its place."""
    rows, columns = spread(similarity.shape[0]), spread(similarity.shape[1])
    low = -1.0 if similarity.min() < 0 else np.floor(similarity.min() * 10) / 10
    gap = 1 + min(similarity.shape[2:]) // 12
    axes = figure.subplots()
    shown = axes.imshow(tiles(similarity[np.ix_(rows, columns)], gap), vmin=low, vmax=1, cmap="viridis")
    label_tiles(axes, rows, columns, similarity.shape[2:], gap)
    axes.set(xlabel="input patch column", ylabel="input patch row")
    figure.colorbar(shown, ax=axes, label="cosine similarity", shrink=0.8)
    describe(figure, TITLES["positions"], caption, width)


def draw_distances(figure: Any, distances: np.ndarray, uniform: float, caption: str, width: float) -> None:
    """A dot for each head of each layer, (L, A), in the colour of its rank; and where uniform attention would be."""
    axes = figure.subplots()
    layers, heads = distances.shape
    depth = np.arange(1, layers + 1)
    size = float(np.clip(260 / layers, 12, 36))
    ranks = np.broadcast_to(np.linspace(0, 1, heads), distances.shape)
    axes.scatter(
        np.repeat(depth, heads), np.sort(distances, axis=1).ravel(), c=ranks.ravel(), s=size, cmap="viridis", vmax=1.12,
        linewidths=0.4, edgecolors="white", zorder=3,
    )  # fmt: skip
    axes.plot(depth, distances.mean(axis=1), color="0.3", linewidth=1.2, label="mean of the heads", zorder=2)
    axes.axhline(uniform, color="0.3", linewidth=1, linestyle=(0, (4, 3)), label="if attention were uniform", zorder=1)
    axes.set(xlabel="network depth (layer)", ylabel="mean attention distance (pixels)")
    axes.set_ylim(0, 1.12 * max(distances.max(), uniform))
    axes.set_xticks(depth[:: 1 + (layers - 1) // 16])
    axes.grid(color="0.92", zorder=0)
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    describe(figure, TITLES["distance"], caption, width)


def draw_rollout(figure: Any, photos: list[np.ndarray], maps: list[np.ndarray], caption: str, width: float) -> None:
    """For each photo: itself, lit where the model looks, and the map."""
    axes = figure.subplots(len(photos), 3, squeeze=False)
    for (plain, lit, heat), photo, values in zip(axes, photos, maps):
        plain.imshow(photo)
        lit.imshow(photo / 255 * over_photo(values, *photo.shape[:2])[..., None])
        draw_map(figure, heat, values, photo)
    finish_photos(figure, axes, ("input", "attention", "patches, mean = 1"))
    describe(figure, TITLES["rollout"], caption, width)


def draw_gradcam(
    figure: Any, photos: list[np.ndarray], maps: list[np.ndarray], labels: list[str], caption: str, width: float
) -> None:
    """For each photo: itself, coloured where it speaks for the label, and the map."""
    import matplotlib

    axes = figure.subplots(len(photos), 3, squeeze=False)
    for (plain, coloured, heat), photo, values, label in zip(axes, photos, maps, labels):
        plain.imshow(photo)
        plain.set_xlabel(label, fontsize=7.5, labelpad=3)
        strength = over_photo(values, *photo.shape[:2])
        part = 0.75 * np.sqrt(strength)[..., None]
        coloured.imshow(photo / 255 * (1 - part) + matplotlib.colormaps["magma"](strength)[..., :3] * part)
        draw_map(figure, heat, values, photo)
    finish_photos(figure, axes, ("input", "Grad-CAM", "patches, mean = 1"))
    describe(figure, TITLES["gradcam"], caption, width)


def draw_map(figure: Any, axes: Any, values: np.ndarray, photo: np.ndarray) -> None:
    """A map of patches in its own size on the photo's place, divided by its mean, with its scale."""
    height, width = photo.shape[:2]
    relative = values / max(values.mean(), np.finfo(float).tiny)
    top = max(float(relative.max()), 1.0)
    shown = axes.imshow(relative, cmap="magma", extent=(0, width, height, 0), vmin=0, vmax=top)
    bar = figure.colorbar(shown, cax=axes.inset_axes([1.03, 0, 0.05, 1]))  # as high as the map
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=2)


def finish_photos(figure: Any, axes: np.ndarray, titles: tuple[str, ...]) -> None:
    """Names of the columns over the first row; no ticks, no frames."""
    for row in axes:
        for place in row:
            place.set(xticks=[], yticks=[])
            for spine in place.spines.values():
                spine.set_visible(False)
    for place, title in zip(axes[0], titles):
        place.set_title(title, fontsize=8)


def photo_part(heads: int) -> float:
    """How wide the photo is beside the maps of so many heads, in parts of their width."""
    return max(0.18, 1.2 / heads)


def draw_heads(figure: Any, photo: np.ndarray, maps: np.ndarray, caption: str, width: float) -> None:
    """The photo, and a map for each head (columns) of each layer (rows), (L, A, rows, columns), by its own largest."""
    layers, heads, *tile = maps.shape
    scaled = maps / np.maximum(maps.max(axis=(2, 3), keepdims=True), np.finfo(np.float32).tiny)
    gap = 1 + min(tile) // 12
    plain, axes = figure.subplots(1, 2, width_ratios=[photo_part(heads), 1])
    plain.imshow(photo)
    plain.set_title("input", fontsize=8)
    plain.set_anchor("N")
    plain.set_axis_off()
    axes.imshow(tiles(scaled, gap), cmap="magma", vmin=0, vmax=1)
    axes.set_anchor("N")
    label_tiles(axes, np.arange(layers), np.arange(heads), tuple(tile), gap)
    axes.set(xlabel="head", ylabel="layer")
    describe(figure, TITLES["heads"], caption, width)


def draw_message(figure: Any, title: str, message: str, width: float) -> None:
    """Why there is no picture here."""
    axes = figure.subplots()
    axes.set_axis_off()
    axes.text(0.5, 0.5, textwrap.fill(message, int(width * 10)), ha="center", va="center", color="0.35")
    figure.suptitle(title, weight="bold")
