# SPDX-License-Identifier: Apache-2.0
"""The figures: what is drawn is what was computed, whole, from any model, the same every time; mistakes in one line."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_visualization_arrays import network, photos
from tiny_images import load_script
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_vit_scratch import ViTScratchForMaskedImageModeling, ViTScratchImageProcessor
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.visualization import figures
from modeling_vit_scratch.visualization.arrays import (
    as_pixels,
    attention_distances,
    batches,
    find_photos,
    grad_cam,
    head_maps,
    open_model,
    position_similarity,
    read_photo,
    rollout_maps,
)
from startup.figures import DESCRIPTIONS, LIMITS
from startup.status import run_command_line
from visualizing.commands import FIGURES, Subject


matplotlib = pytest.importorskip("matplotlib")
agg = pytest.importorskip("matplotlib.backends.backend_agg")
pytest.importorskip("matplotlib.figure")
script = load_script("visualize")


@pytest.fixture
def folder(tmp_path) -> str:
    """A saved model with registers for images of 16 rows and 24 columns."""
    model = network("registers", id2label={0: "brown bear", 1: "cat", 2: "zebra"})
    model.save_pretrained(tmp_path / "model")
    ViTScratchImageProcessor(size={"height": 16, "width": 24}).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Runs the script in an empty folder; its exit status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, flags)])
        try:
            status = run_command_line(script.main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_every_figure_draws_the_arrays_of_the_library(folder, pets, call):
    model, processor = open_model(folder)
    files = find_photos([pets])
    assert len(files) == 24
    pixel_values = [read_photo(file, model, processor) for file in files[:8]]
    distances = np.concatenate([attention_distances(model, read_photo(file, model, processor)) for file in files])
    expected = {
        "positions": {"similarity": position_similarity(model)},
        "distance": {"distances": distances.mean(axis=0), "distances_of_photos": distances},
        "rollout": {f"rollout_{i}": rollout_maps(model, values)[0] for i, values in enumerate(pixel_values)},
        "heads": {"attention": head_maps(model, pixel_values[0])[0]},
        "gradcam": {f"gradcam_{i}": grad_cam(model, values, [1])[0][0] for i, values in enumerate(pixel_values)},
    }
    for name in FIGURES:
        few = [pets] if name in LIMITS else []
        few += ["--label", "cat"] if name in ("gradcam", "sheet") else []
        few += ["--batch_size", "5"] if name == "distance" else []
        status, out, err = call(name, folder, *few, "--save_arrays", f"{name}.npz")
        assert status == 0, err
        assert f"Drawn in outputs/figures/{name}.png\n" in out
        with Image.open(f"outputs/figures/{name}.png") as picture:
            assert picture.width > 600
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 100
        arrays = dict(np.load(f"{name}.npz"))
        for key, theirs in expected.get(name, {}).items():
            assert np.abs(arrays[key] - theirs).max() < 1e-4, key
        if name == "sheet":
            parts = {key.split("_")[0] for key in arrays}
            assert parts == set(FIGURES) - {"sheet"}
    assert "Of 24 photos, the first 8 are taken." in call("rollout", folder, pets)[1]


def test_the_same_command_gives_the_same_files(folder, pets, call):
    for suffix in ("png", "svg", "pdf"):
        first, again = (f"{name}.{suffix}" for name in ("first", "again"))
        for file in (first, again):
            flags = ["--image_size", "24", "16", "--save_arrays", f"{file}.npz"]
            status, _, err = call("rollout", folder, f"{pets}/cat/1.png", "--output", file, *flags)
            assert status == 0, err
        assert Path(first).read_bytes() == Path(again).read_bytes()
        ours, theirs = np.load(f"{first}.npz")["rollout_0"], np.load(f"{again}.npz")["rollout_0"]
        assert ours.shape == (6, 4)
        assert np.array_equal(ours, theirs)
    assert "in place of an older one" in call("filters", folder, "--output", "first.png")[1]


def test_no_attention_implementation_is_asked_for_its_weights(pets):
    model = network()
    expected = [head_maps(model, photos(model)), rollout_maps(model, photos(model)), grad_cam(model, photos(model))[0]]

    def without_weights(module, query, key, value, mask, **kwargs):
        implementation = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return implementation(module, query, key, value, mask, **kwargs)[0], None

    ALL_ATTENTION_FUNCTIONS.register("flash_without_weights", without_weights)
    try:
        for implementation in ("eager", "sdpa", "flash_without_weights"):
            model.config._attn_implementation = implementation
            found = (
                head_maps(model, photos(model)),
                rollout_maps(model, photos(model)),
                grad_cam(model, photos(model))[0],
            )
            for ours, theirs in zip(found, expected):
                assert np.abs(ours - theirs).max() < 1e-5 * max(1, theirs.max())
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("flash_without_weights")


def test_checkpoints_of_others_and_models_without_a_head(pets, tmp_path, call):
    theirs = ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32)
    ViTForImageClassification(theirs).save_pretrained(tmp_path / "theirs")
    status, _, err = call("sheet", tmp_path / "theirs", pets, "--save_arrays", "theirs.npz")
    assert status == 0, err
    assert np.load("theirs.npz")["heads_attention"].shape == (3, 2, 2, 2)

    hybrid = network("hybrid", position_embedding="none", num_labels=0, pooling="mean")
    hybrid.save_pretrained(tmp_path / "hybrid")
    status, _, err = call("sheet", tmp_path / "hybrid", pets, "--save_arrays", "hybrid.npz")
    assert status == 0, err
    arrays = np.load("hybrid.npz")
    assert arrays["filters_components"].shape == (28, 7, 7, 3)
    assert not [key for key in arrays if key.startswith(("positions", "gradcam"))]

    ViTScratchForMaskedImageModeling(network().config).save_pretrained(tmp_path / "painter")
    assert call("heads", tmp_path / "painter", f"{pets}/cat")[0] == 0
    status, _, err = call("gradcam", tmp_path / "painter", f"{pets}/cat")
    assert (status, "the model has no classifier" in err) == (2, True)


def test_photos_are_shown_as_the_model_sees_them(folder, pets):
    model, processor = open_model(folder)
    file = f"{pets}/cat/1.png"
    shown = as_pixels(read_photo(file, model, processor), processor)
    with Image.open(file) as photo:
        theirs = np.asarray(photo.convert("RGB").resize((24, 16), processor.resample))
    assert np.array_equal(shown[0], theirs)
    gray = ViTScratchImageProcessor(size={"height": 8, "width": 8}, num_channels=1, image_mean=[0.2], image_std=[0.7])
    pixels = as_pixels(gray(file, return_tensors="pt")["pixel_values"], gray)
    with Image.open(file) as photo:
        theirs = np.asarray(photo.convert("L").resize((8, 8), gray.resample))
    assert np.array_equal(pixels[0], np.stack([theirs] * 3, axis=-1))


def test_images_of_several_sizes_are_batched_with_their_like():
    sizes = [(16, 24), (16, 24), (16, 24), (24, 16), (16, 24)]
    tensors = [torch.full((1, 3, *size), float(i)) for i, size in enumerate(sizes)]
    assert [batch[:, 0, 0, 0].tolist() for batch in batches(iter(tensors), 2)] == [[0, 1], [2], [3], [4]]


def drawn(name: str, subject: Subject):
    picture = FIGURES[name](subject)
    figure = matplotlib.figure.Figure(figsize=picture.size, layout="constrained")
    picture.draw(figure, picture.size[0])
    return picture, figure


def test_what_is_drawn_is_what_was_computed(folder, pets):
    model, processor = open_model(folder)
    subject = Subject(model, processor, "tiny", find_photos([pets])[:2])
    picture, figure = drawn("positions", subject)
    canvas = figure.axes[0].images[0].get_array()
    assert canvas.shape == (4 * 5 - 1, 6 * 7 - 1)
    for row, column in np.ndindex(4, 6):
        tile = canvas[row * 5 : row * 5 + 4, column * 7 : column * 7 + 6]
        assert np.array_equal(tile, picture.arrays["similarity"][row, column])
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["1", "2", "3", "4"]

    picture, figure = drawn("distance", subject)
    points = figure.axes[0].collections[0].get_offsets().reshape(2, 4, 2)
    assert np.array_equal(points[..., 0], [[1] * 4, [2] * 4])
    assert np.array_equal(points[..., 1], np.sort(picture.arrays["distances"], axis=1))
    mean, uniform = (line.get_ydata() for line in figure.axes[0].lines)
    assert np.allclose(mean, picture.arrays["distances"].mean(axis=1))
    pairs = [(a, b) for a in range(24) for b in range(24)]
    theirs = np.mean([4 * np.hypot(a // 6 - b // 6, a % 6 - b % 6) for a, b in pairs])
    assert np.allclose(uniform, theirs)

    picture, figure = drawn("rollout", subject)
    lit, heat = figure.axes[1].images[0].get_array(), figure.axes[2].images[0].get_array()
    values = picture.arrays["rollout_0"]
    assert np.allclose(heat, values / values.mean())
    photo = as_pixels(read_photo(subject.photos[0], model, processor), processor)[0]
    assert np.array_equal(figure.axes[0].images[0].get_array(), photo)
    assert (lit <= photo / 255 + 1e-9).all()
    picture, figure = drawn("gradcam", subject)
    scores = torch.softmax(model(read_photo(subject.photos[0], model, processor)).logits[0], dim=0)
    assert figure.axes[0].get_xlabel() == f"{model.config.id2label[int(scores.argmax())]} {scores.max().item():.0%}"


LAYOUTS = [
    {"num_hidden_layers": 3, "num_attention_heads": 4},
    {"num_hidden_layers": 32, "num_attention_heads": 16},
    {"image_size": [8, 96], "num_hidden_layers": 3},
    {"image_size": [128, 8], "pooling": "mean"},
]


@pytest.mark.parametrize("fields", LAYOUTS, ids=["few", "many", "wide", "tall"])
def test_no_label_is_cut_off(fields, pets):
    model = network(id2label={0: "a label of very, very many words and of no end in sight", 1: "b", 2: "c"}, **fields)
    height, width = model.config.image_hw
    processor = ViTScratchImageProcessor(size={"height": height, "width": width})
    subject = Subject(model, processor, "a-model-with-a-long-name-patch4", find_photos([pets])[:2], label="0")
    with matplotlib.rc_context(figures.STYLE):
        for name in FIGURES:
            picture, figure = drawn(name, subject)
            canvas = agg.FigureCanvasAgg(figure)
            canvas.draw()
            box = figure.get_tightbbox(canvas.get_renderer())
            assert min(box.x0, box.y0) >= 0, (name, box)
            assert box.x1 <= picture.size[0], (name, box)
            assert box.y1 <= picture.size[1], (name, box)
            assert 4 <= max(picture.size) <= 30, (name, picture.size)


def test_mistakes_are_told_in_one_message(folder, pets, tmp_path, call, monkeypatch):
    network(position_embedding="relative_1d").save_pretrained(tmp_path / "relative")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    cat = f"{pets}/cat/1.png"
    mistakes = {
        ("rollout", folder, "nowhere.jpg"): (2, "There is no file nowhere.jpg"),
        ("distance", folder, "empty"): (2, "empty has no files with the ending of an image"),
        ("heads", folder, "broken.png"): (1, "broken.png cannot be read as an image"),
        ("positions", str(tmp_path / "relative")): (2, "position_embedding='relative_1d'"),
        ("filters", "no/such-model"): (2, "no/such-model can't be loaded"),
        ("filters", folder, "--output", "x.docx"): (2, "can't be written as x.docx"),
        ("filters", folder, "--save_arrays", "x.csv"): (2, "written as .npz"),
        ("filters", folder, "--image_size", "1", "2", "3"): (2, "--image_size 1 2 3: give one number"),
        ("heads", folder, cat, "--image_size", "17"): (2, "17"),
        ("distance", folder, cat, "--batch_size", "0"): (2, "--batch_size 0"),
        ("gradcam", folder, cat, "--label", "zebar"): (2, "Did you mean 'zebra'?"),
        ("gradcam", folder, cat, "--label", "3"): (2, "There is no class 3"),
        ("sheet", folder, cat, "--label", "dog"): (2, "no such class"),
        ("rollout", folder): (2, "required: photo"),
        ("filters", folder, "--nonsense"): (2, "unrecognized arguments: --nonsense"),
    }
    for flags, (status, message) in mistakes.items():
        got, _, err = call(*flags)
        assert got == status, (flags, err)
        assert message in err
        assert "Traceback" not in err
        assert not list(tmp_path.rglob("outputs"))
    with pytest.raises(InputError, match="give images"):
        FIGURES["rollout"](Subject(*open_model(folder), "tiny", []))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = call("filters", folder)
    assert (status, "pip install" in err) == (2, True)


def test_help_names_the_figure_of_the_paper(call):
    for name, said in {
        "filters": "Figure 7, left",
        "positions": "Figure 7, centre",
        "distance": "Figure 7, right",
    }.items():
        status, out, _ = call(name, "--help")
        assert (status, said in out) == (0, True)
    assert "Figures 6 and 14" in call("rollout", "--help")[1]
    assert "scripts/finetune.py" in call("augmentation", "--help")[1]
    assert all(name in call("--help")[1] for name in FIGURES)
    assert list(DESCRIPTIONS) == list(FIGURES)
