# SPDX-License-Identifier: Apache-2.0
"""The figures of scripts/visualize.py: each is a function from a model and photos to arrays and how to draw them."""

import difflib
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Trainer

from ..common.errors import InputError
from ..data.dataset import ImageClassificationDataset
from ..data.streams import StreamDataset
from ..modeling_vit_scratch import ViTScratchPreTrainedModel
from . import figures
from .attention import attention_distances, head_maps, patch_distances, rollout_maps
from .descriptions import LIMITS
from .embeddings import patch_filters, position_similarity
from .gradcam import grad_cam
from .photos import as_pixels, batches, encoder, read_photo


MAX_PHOTOS_IN_SHEET = 3


@dataclass(frozen=True)
class Subject:
    """A model with its image processor and name, the files of photos, and options of the command line."""

    model: ViTScratchPreTrainedModel
    processor: Any
    name: str
    photos: list[str]
    label: str | None = None
    batch_size: int = 8

    @property
    def pools_cls(self) -> bool:
        return encoder(self.model).config.pooling == "cls"

    def read(self, limit: int) -> Iterator[Tensor]:
        """`pixel_values` (1, C, H, W) of each of the first photos."""
        if not self.photos:
            raise InputError("This figure is of photos: give images or folders of images after the model.")
        return (read_photo(file, self.model, self.processor) for file in self.photos[:limit])

    def as_photo(self, pixel_values: Tensor) -> np.ndarray:
        """(1, C, H, W) to (H, W, 3), uint8."""
        return as_pixels(pixel_values, self.processor)[0]


@dataclass(frozen=True)
class Picture:
    """Arrays, and `draw(figure, width)` for a page of `size`, in inches."""

    arrays: dict[str, np.ndarray]
    size: tuple[float, float]
    draw: Callable[[Any, float], None]

    def save(self, file: Path) -> None:
        """Raises InputError as `figures.save_figure`."""
        figures.save_figure(lambda figure: self.draw(figure, self.size[0]), self.size, file)


def filters(subject: Subject) -> Picture:
    """Figure 7, left, of the paper."""
    found = patch_filters(subject.model)
    height, width = found.components.shape[1:3]
    count, explained = len(found.components), found.explained.sum()
    caption = (
        f"{subject.name}: the first {count} components of {found.num_filters} filters of {height} × {width} pixels, "
        f"{explained:.0%} of their variance. Each is scaled to the full range of colours."
    )
    arrays = {"components": found.components, "explained": found.explained}
    size = (6.0, 6.0 * -(-count // 7) / 7 * height / width + 0.9)
    return Picture(arrays, size, partial(figures.draw_filters, filters=found, caption=caption))


def positions(subject: Subject) -> Picture:
    """Figure 7, centre, and D.4 of the paper."""
    similarity = position_similarity(subject.model)
    rows, columns = similarity.shape[:2]
    shown = [min(rows, figures.MAX_TILES), min(columns, figures.MAX_TILES)]
    part = "" if shown == [rows, columns] else f", {shown[0]} × {shown[1]} of them shown"
    caption = (
        f"{subject.name}: {encoder(subject.model).config.position_embedding} embeddings of {rows} × {columns} patches"
        f"{part}. A tile compares its patch's embedding with those of all patches."
    )
    # Each tile has the shape of the whole grid.
    aspect = shown[0] * rows / (shown[1] * columns)
    wide = min(5.2, 7.5 / aspect)
    size = (max(wide + 1.2, 4.2), wide * aspect + 1.3)
    draw = partial(figures.draw_positions, similarity=similarity, caption=caption)
    return Picture({"similarity": similarity}, size, draw)


def distance(subject: Subject) -> Picture:
    """Figure 7, right, and D.7 of the paper."""
    base, rows, uniforms, sizes = encoder(subject.model), [], [], set()
    photos, number = subject.read(LIMITS["distance"]), min(len(subject.photos), LIMITS["distance"])
    with tqdm(total=number, desc="Measuring", unit=" photos", disable=None) as progress:
        for batch in batches(photos, subject.batch_size):
            rows.append(attention_distances(subject.model, batch))
            grid = base.embeddings.patch_embeddings.grid(batch)
            uniforms += [patch_distances(grid, base.config.patch_hw).mean()] * len(batch)
            sizes.add(tuple(batch.shape[2:]))
            progress.update(len(batch))
    per_photo, uniform = np.concatenate(rows).astype(np.float64), float(np.mean(uniforms))  # (photos, L, A)
    mean = per_photo.mean(axis=0)
    first, *others = sorted(sizes)
    seen = f"{first[0]} × {first[1]}" + (f" to {others[-1][0]} × {others[-1][1]}" if others else "")
    caption = (
        f"{subject.name}: a dot for each of {mean.shape[1]} heads, mean over {number} photo{'s' * (number > 1)} of "
        f"{seen} pixels. Attention between patches only, the rest left out and rows divided by their sum."
    )
    arrays = {"distances": mean, "distances_of_photos": per_photo, "uniform": np.asarray(uniform)}
    draw = partial(figures.draw_distances, distances=mean, uniform=uniform, caption=caption)
    return Picture(arrays, (6.0, 4.4), draw)


def rollout(subject: Subject, limit: int = LIMITS["rollout"]) -> Picture:
    """Figures 6 and 14, and D.8 of the paper."""
    pixel_values = list(subject.read(limit))
    maps = [rollout_maps(subject.model, one)[0] for one in pixel_values]
    represents = "the class token" if subject.pools_cls else "the mean of the patches"
    caption = (
        f"{subject.name}: how much of each patch is in {represents}, by attention of all layers. Right: a patch of 2 "
        "counts twice the mean."
    )
    photos, titles = list(map(subject.as_photo, pixel_values)), (figures.TITLES["rollout"], "attention")
    return _picture_of_photos("rollout", photos, maps, overlay=figures.lit, titles=titles, caption=caption)


def heads(subject: Subject) -> Picture:
    """Every head of every layer for one photo."""
    (pixel_values,) = list(subject.read(1))
    maps, photo = head_maps(subject.model, pixel_values)[0], subject.as_photo(pixel_values)
    layers, count, rows, columns = maps.shape
    looks = "the class token" if subject.pools_cls else "all patches, on average,"
    caption = f"{subject.name}: where {looks} looked, by layer and head. Each map is scaled by its largest weight."
    tile = min(0.9, 13 / max(layers * rows / columns, count))
    wide = count * tile
    beside = wide * figures.photo_part(count)
    high = max(layers * tile * rows / columns, beside * photo.shape[0] / photo.shape[1])
    size = (max(wide + beside + 1.0, 4.5), max(high + 1.3, 2.5))
    draw = partial(figures.draw_heads, photo=photo, maps=maps, caption=caption)
    return Picture({"attention": maps, "photo": photo}, size, draw)


def gradcam(subject: Subject, limit: int = LIMITS["gradcam"]) -> Picture:
    """Grad-CAM for the predicted class or --label."""
    index = _class_index(subject.model, subject.label)
    photos, maps, labels = [], [], []
    for pixel_values in subject.read(limit):
        found, (label,), (logits,) = grad_cam(subject.model, pixel_values, None if index is None else [index])
        photos.append(subject.as_photo(pixel_values))
        maps.append(found[0])
        labels.append(_label_text(subject.model, int(label), logits))
    chosen = "the predicted class" if index is None else f"the class {subject.model.config.id2label[index]!r}"
    caption = (
        f"{subject.name}: which patches speak for {chosen}, with the score of each photo. Last layer, before its "
        "attention. Right: a patch of 2 counts twice the mean."
    )
    titles = (figures.TITLES["gradcam"], "Grad-CAM")
    return _picture_of_photos(
        "gradcam", photos, maps, overlay=figures.coloured, titles=titles, caption=caption, labels=labels
    )


def sheet(subject: Subject) -> Picture:
    """All figures of a model on one page."""
    makers = {"filters": filters, "positions": positions, "distance": distance}
    makers |= {name: partial(FIGURES[name], limit=MAX_PHOTOS_IN_SHEET) for name in ("rollout", "gradcam")}
    subject.read(1)  # raises at once if there is no photo
    pictures: dict[str, Picture | str] = {}
    for name, make in {**makers, "heads": heads}.items():
        try:
            pictures[name] = make(subject)
        except InputError as error:
            if name not in ("positions", "gradcam") or (name == "gradcam" and subject.label is not None):
                raise
            pictures[name] = str(error)
    found = {name: picture.arrays for name, picture in pictures.items() if isinstance(picture, Picture)}
    arrays = {f"{name}_{key}": array for name, parts in found.items() for key, array in parts.items()}
    return Picture(arrays, (17.0, 11.5), partial(_draw_sheet, name=subject.name, pictures=pictures))


FIGURES: dict[str, Callable[..., Picture]] = {
    figure.__name__: figure for figure in (filters, positions, distance, rollout, heads, gradcam, sheet)
}


def _draw_sheet(figure: Any, width: float, name: str, pictures: dict[str, Picture | str]) -> None:
    figure.suptitle(f"{name}: what is inside", fontsize=14, weight="bold")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.35], hspace=0.03)
    parts = [*above.subfigures(1, 3, wspace=0.03), *below.subfigures(1, 3, wspace=0.03)]
    for part, (kind, picture) in zip(parts, pictures.items()):
        if isinstance(picture, Picture):
            picture.draw(part, width / 3 - 0.3)
        else:
            figures.draw_message(part, width / 3, figures.TITLES[kind], picture)


def _picture_of_photos(name: str, photos: list[np.ndarray], maps: list[np.ndarray], **drawing: Any) -> Picture:
    """One array for each photo: photos may differ in size."""
    heights = [min(2.0 * photo.shape[0] / photo.shape[1], 3.0) + 0.2 for photo in photos]
    draw = partial(figures.draw_photos, photos=photos, maps=maps, **drawing)
    arrays = {f"{name}_{index}": array for index, array in enumerate(maps)}
    return Picture(arrays, (7.0, max(sum(heights) + 1.0, 2.2)), draw)


def _class_index(model: ViTScratchPreTrainedModel, label: str | None) -> int | None:
    if label is None:
        return None
    names = {name: int(index) for name, index in model.config.label2id.items()}
    if label in names:
        return names[label]
    if label.isdecimal():
        return int(label)
    near = difflib.get_close_matches(label, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    some = ", ".join(list(names)[:10]) + (", …" if len(names) > 10 else "")
    raise InputError(f"--label {label}: the model has no such class.{hint} Its {len(names)} classes: {some}.")


def _label_text(model: ViTScratchPreTrainedModel, label: int, logits: np.ndarray) -> str:
    """The label, cut to fit under its photo, and its score."""
    name, values = textwrap.shorten(model.config.id2label[label], 22, placeholder=" …"), torch.from_numpy(logits)
    if model.config.problem_type == "regression":
        return f"{name}: {logits[label]:.3g}"
    is_multiple = model.config.problem_type == "multi_label_classification"
    score = (values.sigmoid() if is_multiple else values.softmax(dim=0))[label]
    return f"{name} {score:.0%}"


# ---------------------------------------------------------------------------------------------------------------------
# Training images


def augmentation_grid(trainer: Trainer, rows: int = 6, epochs: int = 6) -> np.ndarray:
    """
    Training images as the run sees them, with the random numbers of the run.

    Args:
        trainer: of the run.
        rows: images, evenly spaced in the training set.
        epochs: the first ones.

    Returns:
        (rows, 1 + epochs, H, W, 3), uint8: each image without augmentation, then as in each epoch; mixed, if the run
        mixes, with the image of the row above.
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
    rows, columns = grid.shape[:2]

    def draw(figure: Any) -> None:
        figure.suptitle(title, fontsize=8, wrap=True)
        axes = figure.subplots(rows, columns, squeeze=False)
        for row, column in np.ndindex(rows, columns):
            axes[row, column].imshow(grid[row, column])
            axes[row, column].set_axis_off()
        for column in range(columns):
            axes[0, column].set_title("as it is" if column == 0 else f"epoch {column}", fontsize=8)

    figures.save_figure(draw, (1.5 * columns, 1.5 * rows + 0.6), file)
