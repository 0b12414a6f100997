# SPDX-License-Identifier: Apache-2.0
"""Pictures of many images: augmentation by epoch, near copies, doubtful labels."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from ..data.dataset import StoredImage
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from .figures import save_figure


MAX_PAIRS_IN_SHEET = 24


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


def draw_near_copies(pairs: list[tuple[StoredImage, StoredImage]], folder: str) -> list[str]:
    """Draws held-out images beside the training images that they look like, if there are any. A line for the user."""
    if not pairs or importlib.util.find_spec("matplotlib") is None:
        return []
    decoder, shown, file = ViTScratchImageProcessor(), pairs[:MAX_PAIRS_IN_SHEET], Path(folder, "near_copies.png")
    grid = [[np.asarray(image.decode(decoder)) for image in pair] for pair in shown]
    titles = [
        [f"{part}: {Path(image.name).name}" for part, image in zip(("held out", "training"), pair)] for pair in shown
    ]
    draw_grid(grid, f"{len(shown)} of {len(pairs)} near copies", file, titles)
    return [f"Look at the near copies: {file}"]
