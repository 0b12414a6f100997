# SPDX-License-Identifier: Apache-2.0
"""
Draws the pictures of the guide: one photo on its way through a network, from pixels to a label.

    python docs/make_pictures.py                     fine-tunes the network first: two minutes on two quiet cores
    python docs/make_pictures.py --model FOLDER      with the network that an earlier call has left

The network is model_cards/vit-tiny-imagenet, which has learned its filters and positions from 100,000 photos; it then
learned to tell crops of three photos apart, which scikit-learn and matplotlib install (see docs/guide/ten_steps.md for
their authors). There is no text in the pictures but signs, so that they serve every language.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
# 112 pixels and patches of 8 make the grid of B/16 at 224 pixels, 14 x 14. One thread, so that sums have one order.
TRAINING = (
    "--model_name_or_path model_cards/vit-tiny-imagenet --image_size 112 --num_train_epochs 3 --learning_rate 3e-4 "
    "--per_device_train_batch_size 32 --config_overrides drop_path_rate=0 "
    "--eval_strategy no --save_strategy no --load_best_model_at_end False --dataloader_num_workers 0 --seed 0"
)
CROPS, CROP_PIXELS = 128, 128
MAX_BYTES = 60_000
WIDTH = 7.0  # inches
# The patch that asks, in row and column: on the edge of the blossom.
ASKING = (4, 6)


def photos() -> dict[str, Image.Image]:
    """The three photos by the name of their class."""
    from matplotlib.cbook import get_sample_data
    from sklearn.datasets import load_sample_image

    found = {name: Image.fromarray(load_sample_image(f"{file}.jpg")) for name, file in
             (("palace", "china"), ("flower", "flower"))}  # fmt: skip
    with get_sample_data("grace_hopper.jpg") as file:
        found["portrait"] = Image.open(file).convert("RGB")
    return found


def cut(photo: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A random square of 35 to 100 % of the shorter side."""
    side = int(generator.uniform(0.35, 1.0) * min(photo.size))
    left, top = (int(generator.integers(0, size - side + 1)) for size in photo.size)
    square = photo.crop((left, top, left + side, top + side))
    return square.resize((CROP_PIXELS, CROP_PIXELS), Image.Resampling.LANCZOS)


def train(folder: Path) -> Path:
    """Cuts the photos, a folder for each, and trains on the pieces. Returns the folder of the model."""
    generator = np.random.default_rng(0)
    for name, photo in photos().items():
        (folder / "crops" / name).mkdir(parents=True)
        for number in range(CROPS):
            cut(photo, generator).save(folder / "crops" / name / f"{number}.png")
    command = [sys.executable, str(ROOT / "scripts" / "finetune.py"), "--train_dir", str(folder.absolute() / "crops")]
    words = [*command, *TRAINING.split(), "--output_dir", str(folder.absolute() / "model")]
    subprocess.run(words, check=True, cwd=ROOT)
    return folder / "model"


class Journey:
    """A photo in a network: everything that the pictures show, as arrays."""

    def __init__(self, model: Any, processor: Any, photo: Image.Image) -> None:
        from modeling_vit_scratch.visualization.arrays import as_pixels, head_maps, rollout_maps, watch_attention

        self.model, self.photo, config = model.eval(), photo, model.config
        self.grid, self.patch = config.grid_hw, config.patch_hw
        self.pixel_values = processor(photo, return_tensors="pt")["pixel_values"]
        self.pixels = as_pixels(self.pixel_values, processor)[0]  # (H, W, 3)
        self.weights: list[np.ndarray] = []  # of each layer (A, T, T)
        watch_attention(model, self.pixel_values, lambda index, weights: self.weights.append(weights[0].numpy()))
        self.head_maps = head_maps(model, self.pixel_values)[0]  # (L, A, rows, columns)
        self.rollout = rollout_maps(model, self.pixel_values)[0]  # (rows, columns)
        with torch.no_grad():
            self.patch_tokens = model.vit.embeddings.patch_embeddings(self.pixel_values)[0].numpy()  # (N, D)
            outputs = model(self.pixel_values, output_hidden_states=True)
            self.states = np.stack([state[0].numpy() for state in outputs.hidden_states])  # (L + 1, T, D)
            self.scores = outputs.logits[0].softmax(dim=-1).numpy()  # (K,)
            layer = model.vit.layers[0]
            before = torch.from_numpy(self.states[0])[None]
            attended = before + layer.attention(layer.layernorm_before(before))[0]
            self.mlp_inputs = layer.mlp.fc1(layer.layernorm_after(attended))[0].numpy()  # (T, MLP width)
            self.mlp_adds = layer.mlp(layer.layernorm_after(attended))[0].numpy()  # (T, D)

    @property
    def asking(self) -> int:
        """The index of the token that asks: the class token is number 0."""
        return 1 + ASKING[0] * self.grid[1] + ASKING[1]

    def patches(self) -> np.ndarray:
        """(rows, columns, patch height, patch width, 3)"""
        (rows, columns), (height, width) = self.grid, self.patch
        return self.pixels.reshape(rows, height, columns, width, 3).swapaxes(1, 2)

    def likeness(self) -> np.ndarray:
        """
        How alike the token that asks is to every patch, after 0 to L layers: cosines (L + 1, rows, columns) of their
        differences from the mean patch, since what all share hides what they don't.
        """
        patches = self.states[:, 1:] - self.states[:, 1:].mean(axis=1, keepdims=True)
        unit = patches / np.linalg.norm(patches, axis=-1, keepdims=True)
        cosines = np.einsum("ltd,ld->lt", unit, unit[:, self.asking - 1])
        return cosines.reshape(-1, *self.grid)


def bare(axes: Any, title: str = "", below: str = "") -> None:
    """No ticks and no frame."""
    axes.set(xticks=[], yticks=[], title=title)
    axes.set_xlabel(below, fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)


def show_grid(axes: Any, journey: Journey, gap: int = 2) -> None:
    from modeling_vit_scratch.visualization.figures import tiles

    axes.imshow(np.nan_to_num(tiles(journey.patches() / 255, gap), nan=1.0))


def mark(axes: Any, journey: Journey, scale: float = 1.0) -> None:
    """A frame around the patch that asks, on a map of patches or, with the patch's size as scale, on the photo."""
    from matplotlib.patches import Rectangle

    row, column = ASKING
    offset = 0.5 if scale == 1.0 else 0.0
    corner = (column * scale - offset, row * scale - offset)
    axes.add_patch(Rectangle(corner, scale, scale, fill=False, edgecolor="#00e5ff", linewidth=1.6))


def draw_pixels(figure: Any, journey: Journey) -> None:
    plain, small, *channels = figure.subplots(1, 5, width_ratios=[1.5, 1, 1, 1, 1])
    plain.imshow(journey.photo)
    bare(plain, below="{1} × {0}".format(*journey.photo.size))
    small.imshow(journey.pixels)
    bare(small, below="{} × {} × 3".format(*journey.pixels.shape[:2]))
    for axes, values, name in zip(channels, journey.pixel_values[0], "RGB"):
        shown = axes.imshow(values, cmap="gray", vmin=-1, vmax=1)
        bare(axes, below=name)
    figure.colorbar(shown, ax=channels, shrink=0.55, ticks=[-1, 0, 1])


def draw_patches(figure: Any, journey: Journey) -> None:
    whole, one, row = figure.subplots(1, 3, width_ratios=[1.5, 0.8, 1.6])
    show_grid(whole, journey)
    rows, columns = journey.grid
    height, width = journey.patch
    bare(whole, below=f"N = {rows} × {columns} = {rows * columns}")
    patch = journey.patches()[ASKING]
    one.imshow(patch)
    bare(one, below=f"{height} × {width} × 3")
    vector = journey.pixel_values[0].unflatten(1, (rows, height)).unflatten(3, (columns, width))
    vector = vector[:, ASKING[0], :, ASKING[1]].flatten().numpy()
    row.bar(
        np.arange(len(vector)), vector, width=1.0, color=np.repeat(["#d62728", "#2ca02c", "#1f77b4"], height * width)
    )
    row.set(xlim=(0, len(vector)), ylim=(-1, 1), xticks=[0, len(vector)], yticks=[-1, 0, 1])
    row.set_box_aspect(0.8)
    row.set_xlabel(f"$x_p$: {len(vector)}", fontsize=9)


def draw_projection(figure: Any, journey: Journey) -> None:
    from modeling_vit_scratch.visualization.figures import tiles, to_unit

    weight = journey.model.vit.embeddings.patch_embeddings.projection.weight.detach().numpy()  # (D, 3, h, w)
    filters, tokens = figure.subplots(1, 2, width_ratios=[1, 1.6])
    shown = to_unit(weight[:48].transpose(0, 2, 3, 1), axis=(1, 2, 3)).reshape(8, 6, *journey.patch, 3)
    filters.imshow(np.nan_to_num(tiles(shown), nan=1.0))
    bare(filters, below=f"E: 48 / {len(weight)}")
    show_matrix(tokens, journey.patch_tokens)
    tokens.set(ylabel="N", xlabel="D", title="$x_p E$")


def show_matrix(axes: Any, matrix: np.ndarray) -> None:
    """Tokens as rows, in red and blue; 0 is white."""
    limit = float(np.quantile(np.abs(matrix), 0.98))
    axes.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set(yticks=[0, len(matrix) - 1], xticks=[0, matrix.shape[1] - 1])
    axes.set_yticklabels([1, len(matrix)])
    axes.set_xticklabels([1, matrix.shape[1]])


def draw_class_token(figure: Any, journey: Journey) -> None:
    """The sequence as a strip: the class token, the first patches, the last ones."""
    count = 12
    patches = journey.patches().reshape(-1, *journey.patch, 3)
    middle = journey.grid[0] // 2 * journey.grid[1] + 1
    picks = [*range(middle, middle + count - 3), None, len(patches) - 2, len(patches) - 1]
    cells = figure.subplots(1, count + 1)
    cells[0].imshow(np.full((*journey.patch, 3), 0.85))
    cells[0].text(
        (journey.patch[1] - 1) / 2, (journey.patch[0] - 1) / 2, "class", ha="center", va="center", fontsize=7.5
    )
    bare(cells[0], below="0")
    for axes, pick in zip(cells[1:], picks):
        if pick is None:
            axes.text(0.5, 0.5, "···", ha="center", va="center", transform=axes.transAxes)
            axes.set_box_aspect(1)
            bare(axes)
        else:
            axes.imshow(patches[pick])
            bare(axes, below=str(pick + 1))


def draw_positions(figure: Any, journey: Journey) -> None:
    """Likeness of positions: the network's own, learned, and the fixed ones."""
    from modeling_vit_scratch import ViTScratchConfig, ViTScratchModel
    from modeling_vit_scratch.visualization.arrays import position_similarity
    from modeling_vit_scratch.visualization.figures import tiles

    config = ViTScratchConfig.from_variant("Mi/8", image_size=112, num_hidden_layers=1, position_embedding="sincos_2d")
    places = np.linspace(1, journey.grid[0] - 2, 4).round().astype(int)
    panels = figure.subplots(1, 2)
    for axes, (name, model) in zip(panels, (("learned_1d", journey.model), ("sincos_2d", ViTScratchModel(config)))):
        similarity = position_similarity(model)[np.ix_(places, places)]
        shown = axes.imshow(tiles(similarity, 2), vmin=-1, vmax=1, cmap="viridis")
        bare(axes, below=name)
    figure.colorbar(shown, ax=list(panels), shrink=0.7, ticks=[-1, 0, 1])


def draw_attention(figure: Any, journey: Journey, layer: int = 1, head: int = 0) -> None:
    """One patch asks, one head answers."""
    photo, scores, lit = figure.subplots(1, 3)
    weights = journey.weights[layer][head, journey.asking]
    values = weights[1:].reshape(journey.grid)
    photo.imshow(journey.pixels)
    mark(photo, journey, journey.patch[0])
    bare(photo, below="$q_i$")
    shown = scores.imshow(values, cmap="magma", vmin=0)
    mark(scores, journey)
    bare(scores, below=f"$A_{{i0}}$ = {weights[0]:.2f},  $\\sum_{{j>0}} A_{{ij}}$ = {weights[1:].sum():.2f}")
    figure.colorbar(shown, ax=scores, shrink=0.7)
    light(lit, journey, values)
    mark(lit, journey, journey.patch[0])
    bare(lit, below="$A_{ij}$")


def light(axes: Any, journey: Journey, values: np.ndarray) -> None:
    """The photo, lit where a map of patches is large."""
    from modeling_vit_scratch.visualization.figures import over_photo

    axes.imshow(journey.pixels / 255 * over_photo(values, *journey.pixels.shape[:2])[..., None])


def draw_heads(figure: Any, journey: Journey, layer: int = 1) -> None:
    """The same patch asks all heads of the layer."""
    heads = journey.weights[layer]
    for number, (axes, weights) in enumerate(zip(figure.subplots(1, len(heads)), heads), start=1):
        axes.imshow(weights[journey.asking, 1:].reshape(journey.grid), cmap="magma", vmin=0)
        mark(axes, journey)
        bare(axes, below=f"h = {number}")


def draw_mlp(figure: Any, journey: Journey) -> None:
    """What enters GELU, and how long the vector is that the MLP adds to each patch."""
    curve, change = figure.subplots(1, 2, width_ratios=[1.5, 1])
    x = torch.linspace(-8, 4, 200)
    counts, edges = np.histogram(journey.mlp_inputs, bins=60, range=(-8, 4))
    curve.bar(edges[:-1], counts / counts.max() * 2, width=np.diff(edges), align="edge", color="0.85")
    curve.plot(x, torch.nn.functional.gelu(x), color="#1f77b4")
    curve.set(xlim=(-8, 4), ylim=(-0.5, 4), xlabel="$x$", ylabel="GELU($x$)")
    lengths = np.linalg.norm(journey.mlp_adds[1:], axis=1).reshape(journey.grid)
    shown = change.imshow(lengths, cmap="magma", vmin=0)
    bare(change, below="‖MLP(LN($z'_1$))‖")
    figure.colorbar(shown, ax=change, shrink=0.8)


def draw_layers(figure: Any, journey: Journey) -> None:
    """How alike all patches become to the one that asks, layer by layer."""
    panels = figure.subplots(1, len(journey.states))
    for number, (axes, values) in enumerate(zip(panels, journey.likeness())):
        shown = axes.imshow(values, cmap="viridis", vmin=-1, vmax=1)
        mark(axes, journey)
        bare(axes, below=f"ℓ = {number}")
    figure.colorbar(shown, ax=list(panels), shrink=0.5, ticks=[-1, 0, 1])


def draw_label(figure: Any, journey: Journey) -> None:
    """Where the class token's information comes from, and what it says."""
    lit, heat, scores = figure.subplots(1, 3)
    light(lit, journey, journey.rollout)
    bare(lit)
    shown = heat.imshow(journey.rollout / journey.rollout.mean(), cmap="magma", vmin=0)
    bare(heat)
    figure.colorbar(shown, ax=heat, shrink=0.7)
    names = [journey.model.config.id2label[index] for index in range(len(journey.scores))]
    scores.barh(names, journey.scores, color="#1f77b4")
    scores.set(xlim=(0, 1), xticks=[0, 0.5, 1])
    scores.set_box_aspect(0.9)
    scores.invert_yaxis()


# Name of the file: how it is drawn, and its height in inches.
DRAWINGS: dict[str, tuple[Callable[[Any, Journey], None], float]] = {
    "01_pixels": (draw_pixels, 1.5),
    "02_patches": (draw_patches, 2.7),
    "03_projection": (draw_projection, 3.0),
    "04_class_token": (draw_class_token, 0.85),
    "05_positions": (draw_positions, 3.1),
    "06_self_attention": (draw_attention, 2.3),
    "07_heads": (draw_heads, 1.4),
    "08_mlp": (draw_mlp, 2.5),
    "09_layers": (draw_layers, 1.3),
    "10_label": (draw_label, 2.2),
}


def save(name: str, journey: Journey, folder: Path) -> Path:
    """Draws one picture, in as many colours as its size allows."""
    from modeling_vit_scratch.visualization.figures import save_figure

    draw, height = DRAWINGS[name]
    file = folder / f"{name}.png"
    file.unlink(missing_ok=True)  # in few colours it is no figure that save_figure knows for its own
    save_figure(lambda figure: draw(figure, journey), (WIDTH, height), file)
    with Image.open(file) as picture:
        drawn = picture.convert("RGB")
    for colours in (256, 192, 128, 96, 64):
        drawn.quantize(colours, kmeans=4, dither=Image.Dither.NONE).save(file, optimize=True)
        if file.stat().st_size <= MAX_BYTES:
            break
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the network to draw; default: train it")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "outputs" / "guide", help="where training writes")
    parser.add_argument("--output_dir", type=Path, default=PICTURES, help="where the pictures go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    from modeling_vit_scratch.visualization.arrays import open_model

    model, processor = open_model(str(arguments.model or train(arguments.work_dir)))
    journey = Journey(model, processor, photos()["flower"])
    for name in DRAWINGS:
        file = save(name, journey, arguments.output_dir)
        print(f"{file} ({file.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
