# SPDX-License-Identifier: Apache-2.0
"""The page of scripts/app.py in a real Chromium: what people do with it, at the width of a desk and of a phone."""

import csv
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.page.model import Viewer


WAY_OUT = 'needs {}: pip install -e ".[app]" playwright, and Chromium (apt-get install chromium)'
pytest.importorskip("gradio", reason=WAY_OUT.format("gradio"))
sync_api = pytest.importorskip("playwright.sync_api", reason=WAY_OUT.format("playwright"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WAY_OUT.format("a browser"))

# Nothing of the browser's own on the network.
FLAGS = ["--no-sandbox", "--headless", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--no-first-run"]
# A camera that shows a clock, and asks nobody.
FLAGS += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
LIT, HEADS = "The photo, bright where the model looks", "A small map for each head, layers from top to bottom"


@pytest.fixture(scope="module")
def viewer() -> Viewer:
    torch.manual_seed(0)
    config = ViTScratchConfig.from_variant("test/4", id2label={0: "brown bear", 1: "cat", 2: "<b>zebra</b>"})
    model = ViTScratchForImageClassification(config)
    torch.nn.init.normal_(model.classifier.weight)
    return Viewer(model, ViTScratchImageProcessor(size={"height": 16, "width": 24}), "pets")


@pytest.fixture(scope="module")
def site(viewer, tmp_path_factory) -> Iterator[str]:
    from modeling_vit_scratch.page.layout import build, launch

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        examples = load_sample_images().filenames[1:]
        page = build(viewer, examples=examples, card="A model of pets.")
        options = {"server_name": "127.0.0.1", "allowed_paths": examples}
        _, url, _ = launch(page, **options, prevent_thread_lock=True, quiet=True)
        yield url
        page.close(verbose=False)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium"), executable_path=CHROMIUM, args=FLAGS, accept_downloads=True
        )
        context.set_default_timeout(20_000)
        context.asked = []
        context.on("request", lambda request: context.asked.append(request.url))
        yield context
        context.close()


@pytest.fixture
def tab(browser, site) -> Iterator[Any]:
    page = browser.new_page()
    page.goto(site)
    page.get_by_role("heading", name="pets").wait_for()
    yield page
    assert "Traceback" not in page.content()
    page.close()
    strangers = {url for url in browser.asked if urlsplit(url).hostname not in ("127.0.0.1", "localhost", None)}
    assert strangers == set()
    assert any("upload" in url for url in browser.asked)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"summer ({number}).png")
    (folder / "broken & small.jpg").write_bytes(b"no picture")
    return [folder / "broken & small.jpg", *sorted(folder.glob("*.png"))]


def give(tab: Any, *files: Path) -> None:
    """Uploads to the part of the page that is shown."""
    tab.locator("[role=tabpanel]:visible input[type=file]").first.set_input_files(files)


def changed(tab: Any, what: str, before: str | None) -> str:
    """The picture of this description, when it is another one than before."""
    picture = tab.get_by_alt_text(what)
    sync_api.expect(picture).not_to_have_attribute("src", before or "")
    return picture.get_attribute("src")


def sticks_out(tab: Any) -> list[str]:
    """What is wider than the window. gradio hides the scroll bar, and cuts it off."""
    return tab.evaluate("""() => [...document.querySelectorAll("body, body *")].filter(
        e => e.checkVisibility({visibilityProperty: true}) && e.getBoundingClientRect().right > innerWidth + 1
        ).map(e => e.outerHTML.slice(0, 300))""")


def test_a_photo_its_classes_and_what_the_model_looks_at(tab, viewer, photos):
    give(tab, photos[1])
    tab.locator(".bars").wait_for()
    shown = [line.split("\n") for line in tab.locator(".bars li").all_inner_texts()]
    expected = viewer.classify(Image.open(photos[1]), "photo")
    assert [[text for text in line if text.strip()] for line in shown] == [
        [label, f"{score:.1%}"] for label, score in expected
    ]
    rollout, heads = changed(tab, LIT, None), changed(tab, HEADS, None)
    caption = tab.locator(".page-note", has_text="ayer").first
    assert "layers 1 to 2" in caption.inner_text()

    slider = tab.get_by_role("slider", name="Layer")
    assert (slider.get_attribute("min"), slider.get_attribute("max"), slider.input_value()) == ("1", "2", "2")
    slider.press("ArrowLeft")
    first = changed(tab, LIT, rollout)
    sync_api.expect(caption).to_contain_text("attention of layer 1.")
    tab.get_by_role("radio", name="3", exact=True).check()
    changed(tab, LIT, first)
    sync_api.expect(caption).to_contain_text("Layer 1, head 3")

    # The second head of the second layer, by a click on its map.
    overview = tab.get_by_alt_text(HEADS)
    changed(tab, HEADS, heads)
    box = overview.bounding_box()
    overview.click(position={"x": box["width"] * 0.375, "y": box["height"] * 0.75})
    sync_api.expect(caption).to_contain_text("Layer 2, head 2")
    sync_api.expect(slider).to_have_value("2")
    sync_api.expect(tab.get_by_role("radio", name="2", exact=True)).to_be_checked()
    for name in ("The photo cut into patches", "Similarity of position embeddings"):
        assert tab.get_by_alt_text(name).evaluate("image => image.naturalWidth") > 300


def test_an_example_and_the_card_are_a_click_away(tab, photos):
    tab.locator("[class*=gallery] button, .gallery-item").first.click()
    tab.locator(".bars").wait_for()
    tab.get_by_alt_text(LIT).wait_for()
    tab.get_by_role("button", name="Model card").click()
    tab.get_by_text("A model of pets.").wait_for()
    give(tab, photos[1])  # a visitor's own comes after


def test_a_broken_file_is_named_and_the_next_one_works(tab, photos, tmp_path):
    (tmp_path / "empty.png").touch()
    alert, drop = tab.locator(".problem"), tab.get_by_text("Drop a photo here")
    for path in (photos[0], tmp_path / "empty.png"):
        give(tab, path)
        sync_api.expect(alert).to_contain_text(f"{path.name} cannot be read as an image: ")
        assert alert.get_attribute("role") == "alert"
        assert tab.locator(".bars").count() == 0
        drop.wait_for()
    give(tab, photos[2])
    tab.locator(".bars").wait_for()
    tab.get_by_alt_text(LIT).wait_for()
    assert alert.count() == 0
    give(tab, photos[0])
    alert.wait_for()
    sync_api.expect(tab.get_by_alt_text(LIT)).not_to_be_visible()


def test_the_camera_takes_a_photo(tab):
    tab.get_by_label("Capture from camera").click()
    tab.get_by_text("Click to Access Webcam").click()
    tab.wait_for_function("document.querySelector('video')?.readyState === 4")  # it shows something
    tab.get_by_label("capture photo").click()
    tab.locator(".bars").wait_for()
    tab.get_by_alt_text(LIT).wait_for()


def test_several_photos_are_a_table_and_a_csv(tab, viewer, photos):
    tab.get_by_role("tab", name="Several photos").click()
    give(tab, *photos)
    tab.locator("table.photos").wait_for()
    assert tab.locator(".table-head p").inner_text() == "4 photos, 1 of them can't be read"
    rows = tab.locator("table.photos tbody tr")
    assert rows.count() == 4
    assert "broken & small.jpg cannot be read" in rows.first.inner_text()
    with tab.expect_download() as download:
        tab.get_by_role("link", name="Download as CSV").click()
    assert download.value.suggested_filename == "pets.csv"
    head, *lines = csv.reader(io.StringIO(Path(download.value.path()).read_text()))
    assert head == ["image", "label", "score", "label_2", "score_2", "label_3", "score_3", "problem"]
    assert [line[0] for line in lines] == [path.name for path in photos]
    for path, line, row in zip(photos[1:], lines[1:], rows.all_inner_texts()[1:]):
        scores = viewer.classify(Image.open(path), path.name)
        assert line[1:-1] == [text for label, score in scores for text in (label, f"{score:.6f}")]
        assert re.search(rf"{re.escape(scores[0][0])}\s+{scores[0][1]:.1%}", row)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_scrolls_sideways_and_everything_has_a_name(tab, photos, scheme):
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.emulate_media(color_scheme=scheme)
    tab.reload()
    tab.get_by_role("heading", name="pets").wait_for()
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    assert sticks_out(tab) == []
    give(tab, photos[1])
    tab.get_by_alt_text(LIT).wait_for()
    assert sticks_out(tab) == []
    unnamed = tab.evaluate("""() => [...document.querySelectorAll("button, input:not([type=file]), a, img")].filter(
        e => e.checkVisibility() && ![e, ...e.querySelectorAll("[alt], [aria-label]")].some(
            e => e.ariaLabel || e.alt || e.innerText || e.labels?.length)).map(e => e.outerHTML)""")
    assert unnamed == []
    tab.get_by_role("tab", name="Several photos").click()
    give(tab, *photos)
    tab.locator("table.photos").wait_for()
    assert sticks_out(tab) == []
