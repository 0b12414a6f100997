# SPDX-License-Identifier: Apache-2.0
"""What the network gets to see: a picture of training images before and after augmentation and mixing."""

from pathlib import Path

import numpy as np
from transformers import Trainer

from ..common.errors import InputError
from ..data.dataset import ImageClassificationDataset
from ..data.streaming import StreamDataset
from .figures import check_drawing, new_figure
from .photos import as_pixels


def augmentation_grid(trainer: Trainer, rows: int = 6, epochs: int = 6) -> np.ndarray:
    """
    Training images as training makes them, with the random numbers of the run itself.

    Args:
        trainer: that was built from a command line.
        rows: images, spread over the training set.
        epochs: how many, from the first on.

    Returns:
        (rows, 1 + epochs, H, W, 3), uint8: in each row the image without augmentation, then as in each epoch; mixed, if
        the run mixes, with the image of the row above.
    """
    train_set, collate = trainer.train_dataset, trainer.data_collator
    if isinstance(train_set, StreamDataset):
        raise InputError(
            "A picture shows the same images in several epochs, which a stream can't. Leave out --streaming."
        )
    indices = np.linspace(0, len(train_set) - 1, min(rows, len(train_set))).round().astype(int).tolist()
    plain = ImageClassificationDataset(train_set.examples, train_set.processor, trainer.model.config.num_channels)
    batches = [collate([plain[index] for index in indices])]
    for epoch in range(epochs):
        train_set.set_epoch(epoch)
        batches.append(collate([train_set[index] for index in indices]))
    train_set.set_epoch(0)
    # The Trainer's own step between the loader and the model: what is normalised and mixed on the device.
    columns = [trainer.prepare_batch(batch)["pixel_values"].cpu() for batch in batches]
    return np.stack([as_pixels(column, train_set.processor) for column in columns], axis=1)


def draw_grid(grid: np.ndarray, title: str, file: Path) -> None:
    """Writes the grid as a PNG. Raises InputError without matplotlib."""
    check_drawing(file)
    rows, columns = grid.shape[:2]
    figure = new_figure((1.5 * columns, 1.5 * rows + 0.6))
    figure.suptitle(title, fontsize=8, wrap=True)
    axes = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        for column in range(columns):
            axes[row, column].imshow(grid[row, column])
            axes[row, column].set_axis_off()
            if row == 0:
                axes[row, column].set_title("as it is" if column == 0 else f"epoch {column}", fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
