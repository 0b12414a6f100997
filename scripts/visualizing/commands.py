# SPDX-License-Identifier: Apache-2.0
"""The figures of scripts/visualize.py: each is a function from a model and photos to arrays and how to draw them."""

import difflib
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Trainer

from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.configuration_vit_scratch import ViTScratchConfig
from modeling_vit_scratch.data.dataset import ImageClassificationDataset
from modeling_vit_scratch.data.streams import StreamDataset
from modeling_vit_scratch.modeling_vit_scratch import ViTScratchPreTrainedModel
from modeling_vit_scratch.page.pictures import MAX_TILES
from modeling_vit_scratch.visualization import arrays, figures
from modeling_vit_scratch.visualization.figures import TITLES
from startup.figures import LIMITS


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
    def config(self) -> ViTScratchConfig:
        return self.model.base_model.config

    def read(self, limit: int) -> Iterator[Tensor]:
        """`pixel_values` (1, C, H, W) of each of the first photos."""
        if not self.photos:
            raise InputError("This figure is of photos: give images or folders of images after the model.")
        return (arrays.read_photo(file, self.model, self.processor) for file in self.photos[:limit])

    def as_photo(self, pixel_values: Tensor) -> np.ndarray:
        """(1, C, H, W) to (H, W, 3), uint8."""
        return arrays.as_pixels(pixel_values, self.processor)[0]


@dataclass(frozen=True)
class Picture:
    """Arrays, and how they are drawn: `paint` gets an empty figure of `size`, in inches, or a subfigure."""

    arrays: dict[str, np.ndarray]
    size: tuple[float, float]
    paint: Callable[[Any], None]
    title: str | None = None
    caption: str = ""

    def draw(self, figure: Any, width: float) -> None:  # in inches
        self.paint(figure)
        if self.title is not None:
            figures.describe(figure, width, self.title, self.caption)

    def save(self, file: Path) -> None:
        figures.save_figure(lambda figure: self.draw(figure, self.size[0]), self.size, file)


def filters(subject: Subject) -> Picture:
    """Figure 7, left, of the paper: components in rows of seven."""
    found = arrays.patch_filters(subject.model)
    count, height, width, channels = found.components.shape
    rows = -(-count // 7)
    caption = (
        f"{subject.name}: the first {count} components of {found.num_filters} filters of {height} × {width} pixels, "
        f"{found.explained.sum():.0%} of their variance. Each is scaled to the full range of colours."
    )

    def paint(figure: Any) -> None:
        scaled = figures.to_unit(found.components, axis=(1, 2, 3))
        if channels != 3:  # neither colours nor one gray: the mean over channels
            scaled = np.repeat(scaled.mean(axis=-1, keepdims=True), 3, axis=-1)
        padded = np.full((rows * 7, height, width, 3), np.nan)
        padded[:count] = scaled
        axes = figure.subplots()
        axes.imshow(np.nan_to_num(figures.tiles(padded.reshape(rows, 7, height, width, 3)), nan=1.0))
        axes.set_axis_off()

    drawn = {"components": found.components, "explained": found.explained}
    size = (6.0, 6.0 * rows / 7 * height / width + 0.9)
    return Picture(drawn, size, paint, TITLES["filters"], caption)


def positions(subject: Subject) -> Picture:
    """Figure 7, centre, and D.4 of the paper: a map for each patch, at the patch's position."""
    similarity = arrays.position_similarity(subject.model)
    rows, columns, *tile = similarity.shape
    shown = [np.linspace(0, n - 1, min(n, MAX_TILES)).round().astype(int) for n in (rows, columns)]
    high, wide = map(len, shown)
    part = "" if (high, wide) == (rows, columns) else f", {high} × {wide} of them shown"
    caption = (
        f"{subject.name}: {subject.config.position_embedding} embeddings of {rows} × {columns} patches"
        f"{part}. A tile compares its patch's embedding with those of all patches."
    )

    def paint(figure: Any) -> None:
        low = -1.0 if similarity.min() < 0 else np.floor(similarity.min() * 10) / 10
        gap = 1 + min(tile) // 12
        axes = figure.subplots()
        image = axes.imshow(figures.tiles(similarity[np.ix_(*shown)], gap), vmin=low, vmax=1, cmap="viridis")
        figures.label_tiles(axes, *shown, tile, gap)
        axes.set(xlabel="input patch column", ylabel="input patch row")
        figure.colorbar(image, ax=axes, label="cosine similarity", shrink=0.8)

    aspect = high * rows / (wide * columns)  # each tile has the shape of the whole grid
    width = min(5.2, 7.5 / aspect)
    size = (max(width + 1.2, 4.2), width * aspect + 1.3)
    return Picture({"similarity": similarity}, size, paint, TITLES["positions"], caption)


def distance(subject: Subject) -> Picture:
    """Figure 7, right, and D.7 of the paper: a dot for each head of each layer."""
    found, uniforms, sizes = [], [], set()
    photos, number = subject.read(LIMITS["distance"]), min(len(subject.photos), LIMITS["distance"])
    with tqdm(total=number, desc="Measuring", unit=" photos", disable=None) as progress:
        for batch in arrays.batches(photos, subject.batch_size):
            found.append(arrays.attention_distances(subject.model, batch))
            distances = arrays.patch_distances(arrays.patch_grid(subject.model, batch), subject.config.patch_hw)
            uniforms += [distances.mean()] * len(batch)
            sizes.add(tuple(batch.shape[2:]))
            progress.update(len(batch))
    per_photo, uniform = np.concatenate(found).astype(np.float64), float(np.mean(uniforms))  # (photos, L, A)
    mean = per_photo.mean(axis=0)
    layers, heads = mean.shape
    seen = " to ".join(f"{height} × {width}" for height, width in sorted({min(sizes), max(sizes)}))
    caption = (
        f"{subject.name}: a dot for each of {heads} heads, mean over {number} photo{'s' * (number > 1)} of "
        f"{seen} pixels. Attention between patches only, the rest left out and rows divided by their sum."
    )

    def paint(figure: Any) -> None:
        axes, depth = figure.subplots(), np.arange(1, layers + 1)
        ranks = np.broadcast_to(np.linspace(0, 1, heads), mean.shape)
        axes.scatter(
            np.repeat(depth, heads), np.sort(mean, axis=1).ravel(), c=ranks.ravel(), cmap="viridis", vmax=1.12,
            s=float(np.clip(260 / layers, 12, 36)), linewidths=0.4, edgecolors="white", zorder=3,
        )  # fmt: skip
        axes.plot(depth, mean.mean(axis=1), color="0.3", linewidth=1.2, label="mean of the heads", zorder=2)
        dashed = {"linestyle": (0, (4, 3)), "label": "if attention were uniform"}
        axes.axhline(uniform, color="0.3", linewidth=1, zorder=1, **dashed)
        axes.set(xlabel="network depth (layer)", ylabel="mean attention distance (pixels)")
        axes.set_ylim(0, 1.12 * max(mean.max(), uniform))
        axes.set_xticks(depth[:: 1 + (layers - 1) // 16])
        axes.grid(color="0.92", zorder=0)
        axes.legend(frameon=False, loc="lower right", fontsize=8)

    drawn = {"distances": mean, "distances_of_photos": per_photo, "uniform": np.asarray(uniform)}
    return Picture(drawn, (6.0, 4.4), paint, TITLES["distance"], caption)


def rollout(subject: Subject, limit: int = LIMITS["rollout"]) -> Picture:
    """Figures 6 and 14, and D.8 of the paper."""
    pixel_values = list(subject.read(limit))
    maps = [arrays.rollout_maps(subject.model, one)[0] for one in pixel_values]
    represents = "the class token" if subject.config.pooling in ("cls", "cls_mean") else "the mean of the patches"
    caption = (
        f"{subject.name}: how much of each patch is in {represents}, by attention of all layers. Right: a patch of 2 "
        "counts twice the mean."
    )
    return _picture_of_photos("rollout", caption, list(map(subject.as_photo, pixel_values)), maps)


def gradcam(subject: Subject, limit: int = LIMITS["gradcam"]) -> Picture:
    """Grad-CAM for the predicted class or --label."""
    index = _class_index(subject.model, subject.label)
    photos, maps, labels = [], [], []
    for pixel_values in subject.read(limit):
        found, (label,), (logits,) = arrays.grad_cam(subject.model, pixel_values, None if index is None else [index])
        photos.append(subject.as_photo(pixel_values))
        maps.append(found[0])
        labels.append(_label_text(subject.model, int(label), logits))
    chosen = "the predicted class" if index is None else f"the class {subject.model.config.id2label[index]!r}"
    caption = (
        f"{subject.name}: which patches speak for {chosen}, with the score of each photo. Last layer, before its "
        "attention. Right: a patch of 2 counts twice the mean."
    )
    return _picture_of_photos("gradcam", caption, photos, maps, labels)


def _picture_of_photos(
    name: str, caption: str, photos: list[np.ndarray], maps: list[np.ndarray], labels: list[str] | None = None
) -> Picture:
    """A row for each photo: itself with its label, the overlay of photo and map, and the map divided by its mean."""
    overlay, title = (figures.lit, "attention") if name == "rollout" else (figures.coloured, "Grad-CAM")

    def paint(figure: Any) -> None:
        grid = figure.subplots(len(photos), 3, squeeze=False)
        for row, (photo, values) in enumerate(zip(photos, maps)):
            height, wide = photo.shape[:2]
            plain, over, heat = grid[row]
            plain.imshow(photo)
            if labels is not None:
                plain.set_xlabel(labels[row], fontsize=7.5, labelpad=3)
            over.imshow(overlay(photo, values))
            relative = values / max(values.mean(), np.finfo(float).tiny)
            top = max(float(relative.max()), 1.0)
            image = heat.imshow(relative, cmap="magma", extent=(0, wide, height, 0), vmin=0, vmax=top)
            bar = figure.colorbar(image, cax=heat.inset_axes([1.03, 0, 0.05, 1]))  # as high as the map
            bar.outline.set_visible(False)
            bar.ax.tick_params(labelsize=7, length=2)
            for axes in grid[row]:
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
        for axes, column in zip(grid[0], ("input", title, "patches, mean = 1")):
            axes.set_title(column, fontsize=8)

    heights = [min(2.0 * photo.shape[0] / photo.shape[1], 3.0) + 0.2 for photo in photos]
    drawn = {f"{name}_{index}": array for index, array in enumerate(maps)}  # photos may differ in size
    return Picture(drawn, (7.0, max(sum(heights) + 1.0, 2.2)), paint, TITLES[name], caption)


def heads(subject: Subject) -> Picture:
    """A photo, and maps of its heads (columns) and layers (rows)."""
    pixel_values = next(subject.read(1))
    maps, photo = arrays.head_maps(subject.model, pixel_values)[0], subject.as_photo(pixel_values)
    layers, count, rows, columns = maps.shape
    looks = "the class token" if subject.config.pooling in ("cls", "cls_mean") else "all patches, on average,"
    caption = f"{subject.name}: where {looks} looked, by layer and head. Each map is scaled by its largest weight."
    photo_part = max(0.18, 1.2 / count)  # the width of the photo, as a fraction of that of the maps

    def paint(figure: Any) -> None:
        scaled = maps / np.maximum(maps.max(axis=(2, 3), keepdims=True), np.finfo(np.float32).tiny)
        gap = 1 + min(rows, columns) // 12
        plain, axes = figure.subplots(1, 2, width_ratios=[photo_part, 1])
        plain.imshow(photo)
        plain.set_title("input", fontsize=8)
        plain.set_anchor("N")
        plain.set_axis_off()
        axes.imshow(figures.tiles(scaled, gap), cmap="magma", vmin=0, vmax=1)
        axes.set_anchor("N")
        figures.label_tiles(axes, np.arange(layers), np.arange(count), (rows, columns), gap)
        axes.set(xlabel="head", ylabel="layer")

    tile = min(0.9, 13 / max(layers * rows / columns, count))
    wide = count * tile
    beside = wide * photo_part
    high = max(layers * tile * rows / columns, beside * photo.shape[0] / photo.shape[1])
    size = (max(wide + beside + 1.0, 4.5), max(high + 1.3, 2.5))
    return Picture({"attention": maps, "photo": photo}, size, paint, TITLES["heads"], caption)


def sheet(subject: Subject) -> Picture:
    """All figures of a model on one page; where it has no such figure, the reason."""
    pictures: dict[str, Picture | str] = {}
    for name in ("filters", "positions", "distance", "rollout", "gradcam", "heads"):
        options = {"limit": 3} if name in ("rollout", "gradcam") else {}
        try:
            pictures[name] = FIGURES[name](subject, **options)
        except InputError as error:
            if name not in ("positions", "gradcam") or (name == "gradcam" and subject.label is not None):
                raise
            pictures[name] = str(error)

    def paint(figure: Any) -> None:
        figure.suptitle(f"{subject.name}: what is inside", fontsize=14, weight="bold")
        above, below = figure.subfigures(2, 1, height_ratios=[1, 1.35], hspace=0.03)
        parts, width = [*above.subfigures(1, 3, wspace=0.03), *below.subfigures(1, 3, wspace=0.03)], 17.0 / 3
        for part, (name, picture) in zip(parts, pictures.items()):
            if isinstance(picture, Picture):
                picture.draw(part, width - 0.3)
                continue
            axes = part.subplots()
            axes.set_axis_off()
            axes.text(0.5, 0.5, textwrap.fill(picture, int(width * 10)), ha="center", va="center", color="0.35")
            part.suptitle(TITLES[name], weight="bold")

    drawn = {}
    for name, picture in pictures.items():
        if isinstance(picture, Picture):
            drawn |= {f"{name}_{key}": array for key, array in picture.arrays.items()}
    return Picture(drawn, (17.0, 11.5), paint)


FIGURES: dict[str, Callable[..., Picture]] = {
    figure.__name__: figure for figure in (filters, positions, distance, rollout, heads, gradcam, sheet)
}


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


def augmentation_grid(trainer: Trainer, rows: int = 6, epochs: int = 6) -> np.ndarray:
    """Training images, (rows, 1 + epochs, H, W, 3), uint8: without augmentation, then as the run sees them."""
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
    return np.stack([arrays.as_pixels(column, train_set.processor) for column in columns], axis=1)
