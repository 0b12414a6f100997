# SPDX-License-Identifier: Apache-2.0
"""The page of scripts/app.py, without a browser: its numbers against others' arithmetic, its messages, any model."""

import socket
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import load_script
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.checkpoint.conversion import save_checkpoint
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.page import pictures
from modeling_vit_scratch.page.model import PhotoError, Viewer, load, seen_part
from modeling_vit_scratch.visualization.arrays import head_maps, position_similarity, rollout_maps


LABELS = {0: "brown bear", 1: "cat", 2: "<b>zebra</b>"}


def tiny(**fields) -> tuple[ViTScratchForImageClassification, ViTScratchImageProcessor]:
    fields = fields if "num_labels" in fields else {"id2label": LABELS, **fields}
    model = ViTScratchForImageClassification(ViTScratchConfig.from_variant("test/4", **fields))
    return model, ViTScratchImageProcessor(size={"height": 16, "width": 24})


def photo(size: tuple[int, int] = (60, 40)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("page") / "pets"
    model, processor = tiny(temperature=2.0)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture
def layout():
    pytest.importorskip("gradio", reason='needs gradio: pip install -e ".[app]"')
    from modeling_vit_scratch.page import layout

    return layout


@pytest.mark.parametrize(
    "fields",
    [{}, {"pooling": "mean", "use_cls_token": False}, {"num_register_tokens": 3, "position_embedding": "sincos_2d"}],
    ids=["class token", "mean", "registers"],
)
def test_maps_are_those_of_visualization(fields):
    model, processor = tiny(**fields)
    explanation = Viewer(model, processor, "pets").explain(photo(), "photo.png")
    pixel_values = processor(photo(), return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(explanation.rollout[-1], rollout_maps(model, pixel_values)[0], atol=1e-7)
    np.testing.assert_allclose(explanation.heads, head_maps(model, pixel_values)[0], atol=1e-6)
    np.testing.assert_allclose(explanation.positions, position_similarity(model), atol=1e-12)
    assert explanation.photo.shape == (40, 60, 3)
    assert explanation.pixels.shape == (16, 24, 3)


def test_scores_are_those_of_the_pipeline(folder):
    viewer = load(str(folder))
    expected = pipeline("image-classification", model=str(folder), device="cpu")(photo(), top_k=3)
    for scores in (viewer.explain(photo(), "photo.png").scores, viewer.classify(photo(), "photo.png")):
        assert [label for label, _ in scores] == [entry["label"] for entry in expected]
        np.testing.assert_allclose([score for _, score in scores], [entry["score"] for entry in expected], rtol=1e-5)


def test_models_of_others():
    small = {"num_labels": 3, "image_size": 64, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "intermediate_size": 64}
    processor = ViTImageProcessorPil(size={"height": 64, "width": 64})
    model = ViTForImageClassification(ViTConfig(**small)).eval()
    explanation = Viewer(model, processor, "vit").explain(photo(), "photo.png")
    with torch.no_grad():
        theirs = model(**processor(photo(), return_tensors="pt"), output_attentions=True).attentions
    for heads, weights in zip(explanation.heads, theirs):
        np.testing.assert_allclose(heads, weights[0, :, 0, 1:].reshape(4, 4, 4), atol=1e-6)
    assert explanation.positions.shape == (4, 4, 4, 4)

    small.pop("intermediate_size")
    registers = Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(num_register_tokens=4, **small))
    assert Viewer(registers, processor, "dino").explain(photo(), "photo.png").heads.shape == (2, 4, 4, 4)

    config = ConvNextConfig(num_labels=3, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    explanation = Viewer(ConvNextForImageClassification(config), processor, "convnext").explain(photo(), "photo.png")
    assert explanation.heads is None
    assert explanation.rollout is None
    assert len(explanation.scores) == 3


def test_broken_photos_are_named(tmp_path, folder):
    viewer = load(str(folder))
    broken = tmp_path / "x.jpg"
    broken.write_bytes(b"no picture")
    for processor in (viewer.processor, ViTImageProcessorPil()):
        viewer.processor = processor
        with pytest.raises(PhotoError, match=r"^summer \(1\)\.jpg cannot be read as an image: ") as caught:
            viewer.read(str(broken), "summer (1).jpg")
        assert str(tmp_path) not in str(caught.value)
        assert str(caught.value).count("summer") <= 2
        assert str(caught.value).count("cannot be read") == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 32, "width": 32}},
        {"size": {"height": 32, "width": 32}, "crop_pct": 0.8},
        {"size": {"height": 24, "width": 40}, "crop_pct": 0.9},
        {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
        {"size": {"height": 40, "width": 40}, "do_center_crop": True, "crop_size": {"height": 20, "width": 32}},
    ],
)
@pytest.mark.parametrize("size", [(300, 200), (200, 300)])
def test_the_seen_part_is_what_the_processor_leaves(settings, size):
    # On a photo whose columns count up in red, and rows in green, each pixel says where it comes from.
    ramp = np.zeros((size[1], size[0], 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1])[:, None]
    image, processor = Image.fromarray(ramp), ViTScratchImageProcessor(do_normalize=False, do_rescale=False, **settings)
    left = processor(image, return_tensors="np")["pixel_values"][0]
    seen = np.asarray(seen_part(image, processor, left.shape[1:]), np.float32)
    for channel, pixels in ((0, left.shape[2]), (1, left.shape[1])):
        first, last = left[channel].min(), left[channel].max()
        step = (last - first) / (pixels - 1)  # from one of the processor's pixels to the next
        assert abs(first - step / 2 - seen[..., channel].min()) <= step
        assert abs(last + step / 2 - seen[..., channel].max()) <= step


def test_the_seen_part_of_a_small_photo_that_gets_a_border_is_not_known():
    crop = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    assert seen_part(photo(), ViTScratchImageProcessor(size={"shortest_edge": 20}, **crop), (32, 32)) is None


def test_the_script_opens_what_people_have_and_says_what_it_can_not(tmp_path, folder):
    app = load_script("app")
    assert app.open_viewer(str(folder), "main", False).name == "pets"
    model, _ = tiny(hidden_act="gelu_pytorch_tanh")
    save_checkpoint(model, tmp_path / "pets.npz", format="npz")
    assert app.open_viewer(str(tmp_path / "pets.npz"), "main", False).explain(photo(), "photo.png").heads is not None
    model, processor = tiny(num_labels=0)
    model.save_pretrained(tmp_path / "features")
    tiny()[0].vit.save_pretrained(tmp_path / "encoder")
    processor.save_pretrained(tmp_path / "encoder")
    for source in (tmp_path / "features", tmp_path / "encoder", tmp_path / "nothing"):
        with pytest.raises(InputError, match=f"The model {source} "):
            app.open_viewer(str(source), "main", False)
    (tmp_path / "broken.npz").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"The model .*broken\.npz can't be loaded: "):
        app.open_viewer(str(tmp_path / "broken.npz"), "main", False)


def test_a_port_that_is_taken_is_said(layout, folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(InputError, match=f"--server_port {port}: no page can be served there"):
            load_script("app").main([str(folder), "--server_port", port])


def test_a_server_that_does_not_start_in_time_is_said(layout, folder, monkeypatch):
    def late(page, **options):
        raise httpx.ReadTimeout("timed out")

    monkeypatch.setattr(layout, "launch", late)
    with pytest.raises(InputError, match=r"no page can be served there\. timed out"):
        load_script("app").main([str(folder)])


def test_the_page_has_photos_to_click_on_and_the_card(layout, folder, tmp_path):
    names = [Path(path).name for path in load_script("app").example_photos(None)]
    assert names == ["china.jpg", "flower.jpg"]
    for number in range(9):
        photo().save(tmp_path / f"{number}.png")
    examples = load_script("app").example_photos([str(tmp_path)])
    assert len(examples) == 8
    viewer = Viewer(*tiny(id2label={0: "brown_bear", 1: "cat", 2: "zebra"}), "pets")
    page = layout.build(viewer, None, examples, "---\nlicense: mit\n---\n# pets\n![curves](figures/a.png)\nKnows them.")
    kinds = {block.get_block_name(): block for block in page.blocks.values()}
    assert len(kinds["dataset"].samples) == 8
    assert kinds["markdown"].value == "# pets\n\nKnows them."
    scores = layout.see(viewer, (examples[0], "0.png"))[2]
    assert "brown bear" in scores
    assert {block.get_block_name() for block in layout.build(viewer).blocks.values()} & {
        "dataset",
        "accordion",
    } == set()


def test_colours_are_those_of_magma():
    colormaps = pytest.importorskip("matplotlib").colormaps
    values = np.linspace(0, 1, 200, dtype=np.float32)
    assert np.abs(pictures.colours(values) - colormaps["magma"](values)[:, :3] * 255).max() < 12


def test_a_head_is_found_where_its_map_is_drawn():
    heads = np.zeros((2, 3, 2, 2))
    heads[1, 2] = 1.0  # the one that glows all over
    overview = pictures.Overview(np.zeros((40, 60, 3), np.uint8), heads)
    glowing = np.argwhere(np.asarray(overview.picture.convert("L")) > 150)
    assert {overview.at(x, y) for y, x in glowing} == {(2, 3)}
    assert overview.at(10**6, 10**6) == (2, 3)
    frame = np.argwhere(np.asarray(overview.marked(range(1, 2), 2)) != np.asarray(overview.picture))
    assert {overview.at(x, y) for y, x, _ in frame} == {(1, 2)}


def test_patches_are_the_pixels_with_gaps():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    drawn = np.asarray(pictures.patches(pixels, (4, 4)))
    solid = drawn[..., 3].min(axis=1) > 0, drawn[..., 3].min(axis=0) > 0
    assert not solid[0].all()
    scale = pictures.SIDE // 12
    opaque = drawn[drawn[..., 3].max(axis=1) > 0][:, drawn[..., 3].max(axis=0) > 0, :3]
    np.testing.assert_array_equal(opaque[::scale, ::scale], pixels)


def test_only_uploads_are_opened(layout, folder, tmp_path, monkeypatch):
    # What is said to be the path of an upload comes from the browser.
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    inside, outside = tmp_path / "uploads" / "a.png", tmp_path / "secret.png"
    inside.parent.mkdir()
    for path in (inside, outside):
        photo().save(path)
    (tmp_path / "uploads" / "link.png").symlink_to(outside)
    assert layout.uploaded({"path": str(inside), "orig_name": "mine.png"}) == (str(inside), "mine.png")
    assert layout.uploaded(None) is None
    for path in (outside, inside.parent / ".." / "secret.png", inside.parent / "link.png"):
        _, _, message, *_ = layout.see(load(str(folder)), layout.uploaded({"path": str(path)}))
        assert "cannot be read as an image: the file does not exist" in message
        assert str(tmp_path) not in message


def test_models_without_maps_have_a_page_too(layout, tmp_path):
    photo().save(tmp_path / "a.png")
    model = ConvNextForImageClassification(ConvNextConfig(num_labels=3, hidden_sizes=[8] * 4, depths=[1] * 4))
    viewer = Viewer(model, ViTImageProcessorPil(), "convnext")
    assert layout.build(viewer).title == "convnext"
    _, shown, scores, looking, *_, patches, positions = layout.see(viewer, (str(tmp_path / "a.png"), "a.png"))
    assert shown is None
    assert positions is None
    assert layout.NO_MAPS in scores
    assert not looking.visible
    assert patches.size == (pictures.SIDE // 224 * 224,) * 2
    assert "Choose this one again" in layout.draw(None, 1, layout.ROLLOUT)[2]  # of a photo that was deleted since

    relative, processor = tiny(position_embedding="relative_1d")
    *_, positions = layout.see(Viewer(relative, processor, "pets"), (str(tmp_path / "a.png"), "a.png"))
    assert positions is None


def test_numbers_of_a_regression_are_no_percentages(layout, tmp_path):
    photo().save(tmp_path / "a.tiff")
    model, processor = tiny(problem_type="regression", num_labels=1)
    torch.nn.init.constant_(model.classifier.bias, 12.5)
    shown, _, scores, *_ = layout.see(Viewer(model, processor, "age"), (str(tmp_path / "a.tiff"), "a.tiff"))
    assert "%" not in scores
    assert "12." in scores
    assert shown.size == (60, 40)  # no browser shows a .tiff


def test_names_are_shown_as_they_are(layout, folder, tmp_path, monkeypatch):
    photo().save(tmp_path / "a.png")
    viewer, name = load(str(folder)), '<img src=x onerror="alert(1)">.png'
    table = layout.tabulate(viewer, [(str(tmp_path / "a.png"), name), (str(tmp_path / "none.png"), name)])
    _, _, scores, *_ = layout.see(viewer, (str(tmp_path / "a.png"), name))
    for html in (table, scores):
        assert "<img src=x" not in html
        assert "<b>zebra" not in html
        assert "&lt;b&gt;zebra" in html
    assert layout.tabulate(viewer, []) == ""
    monkeypatch.setattr(layout, "MAX_PHOTOS", 1)
    assert "1 more photos were left out" in layout.tabulate(viewer, [(str(tmp_path / "a.png"), name)] * 2)
