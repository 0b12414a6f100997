# SPDX-License-Identifier: Apache-2.0
"""The folder for browsers: what stock transformers, ONNX Runtime, node and Chromium make of it."""

import base64
import contextlib
import functools
import http.server
import io
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import RepoCard
from PIL import Image
from sklearn.datasets import load_sample_images
from test_publishing import CARD, error, hub, publish  # noqa: F401
from tiny_images import ROOT, load_script
from transformers import AutoConfig, ViTConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from exporting.export import export, missing_packages
from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.common.errors import InputError


if missing := missing_packages("web"):
    pytest.skip(f'{missing}: pip install -e ".[export]"', allow_module_level=True)
from exporting import web


LABELS = {0: "brown_bear", 1: "cat", 2: "</script><b>zebra</b>"}
TERMS = "license: other\nlicense_name: terms\nlicense_link: https://example.com"
FILES = {
    "card.md", "config.json", "examples/1.jpg", "examples/2.jpg", "export.json", "index.html", "onnx/model.onnx",
    "onnx/model_quantized.onnx", "pixels.js", "preprocessor_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders of a model and of its export, what the script printed, and the model, exported once: that is slow."""
    torch.manual_seed(0)
    config = ViTScratchConfig.from_variant("test/4", id2label=LABELS, temperature=1.7)
    model = ViTScratchForImageClassification(config)
    torch.nn.init.normal_(model.classifier.weight)
    path = tmp_path_factory.mktemp("web") / "pets <3"
    model.save_pretrained(path)
    ViTScratchImageProcessor(size={"height": 16, "width": 24}).save_pretrained(path)
    (path / "README.md").write_text(CARD.replace("license: apache-2.0", TERMS))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        exported = export(model.eval(), "onnx")
        patch.setattr(web, "export", lambda model, name: exported)
        load_script("export").main([str(path), str(path.parent / "site"), "--format", "web"])
        yield path, path.parent / "site", printed.getvalue(), model


def test_stock_transformers_and_onnx_runtime_open_the_folder(made):
    folder, site, printed, model = made
    assert {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()} == FILES
    assert "onnx/model.onnx" in printed
    assert "onnx/model_quantized.onnx" in printed
    assert printed.count("100% have the same best label") == 2

    config = AutoConfig.from_pretrained(site)
    assert type(config) is ViTConfig
    assert config.architectures == ["ViTForImageClassification"]
    assert config.id2label == LABELS
    assert (config.hidden_size, config.patch_size) == (model.config.hidden_size, model.config.patch_size)
    assert json.loads((site / "config.json").read_text())["model_type"] == "vit"
    images = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    stock = ViTImageProcessorPil.from_pretrained(site)(images, return_tensors="pt")["pixel_values"]
    own = ViTScratchImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(stock, own, atol=1e-6, rtol=0)

    for path, atol in (("onnx/model.onnx", 1e-4), ("onnx/model_quantized.onnx", 0.5)):
        content = (site / path).read_bytes()
        assert str(ROOT).encode() not in content  # nor another path of this machine
        assert b"/site-packages/" not in content
        session = web.InferenceSession(content)
        assert [value.name for value in (*session.get_inputs(), *session.get_outputs())] == ["pixel_values", "logits"]
        for pixel_values in (own, torch.randn(1, 3, 16, 24), torch.randn(5, 3, 16, 24)):
            (logits,) = session.run(None, {"pixel_values": pixel_values.numpy()})
            with torch.no_grad():  # the temperature is in the graph
                torch.testing.assert_close(torch.tensor(logits), model(pixel_values).logits, atol=atol, rtol=0)


def test_the_page_says_what_it_is_of(made):
    text = (made[1] / "index.html").read_text()
    assert "<title>pets &lt;3</title>" in text
    assert "{{" not in text
    settings = json.loads(text.partition('id="settings">')[2].partition("</script>")[0])
    assert settings["labels"] == list(LABELS.values())
    assert settings["link"] == "card.md"
    assert (settings["is_multi_label"], settings["is_calibrated"]) == (False, True)
    assert settings["programs"] == {
        path: (made[1] / path).stat().st_size for path in ("onnx/model.onnx", "onnx/model_quantized.onnx")
    }
    assert f"onnxruntime-web@{web.ONNXRUNTIME_WEB}/" in settings["onnxruntime"]


PROCESSORS = {
    "bilinear": {"size": {"height": 16, "width": 24}},
    "bicubic": {"size": {"height": 48, "width": 20}, "resample": 3, "image_mean": [0.485, 0.456, 0.406]},
    "larger": {"size": {"height": 500, "width": 700}, "resample": 3, "image_std": [0.2, 0.3, 0.4]},
    "crop": {"size": {"shortest_edge": 50}, "do_center_crop": True, "crop_size": {"height": 40, "width": 45}},
    "padded": {"size": {"shortest_edge": 30}, "do_center_crop": True, "crop_size": {"height": 40, "width": 64}},
    "timm": {"size": {"height": 32, "width": 32}, "crop_pct": 0.9, "resample": 3},
    "gray": {"size": {"height": 8, "width": 8}, "num_channels": 1, "do_normalize": False},
    "bytes": {"size": {"height": 9, "width": 500}, "do_rescale": False},
}
NODE = """
const fs = require("fs"), { Image } = JSON.parse(fs.readFileSync(0));
const script = fs.readFileSync(process.argv[2], "utf8").split('<script id="pixels">')[1].split("</script>")[0];
const made = (0, eval)(script + "; pixelValues");
for (const { settings, width, height, data } of Image) {
  const image = { data: new Uint8ClampedArray(Buffer.from(data, "base64")), width, height };
  const { values, dims } = made(image, settings);
  process.stdout.write(JSON.stringify([dims, Buffer.from(values.buffer).toString("base64")]) + "\\n");
}
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node (nodejs.org)")
def test_the_page_resizes_as_pillow_does(tmp_path):
    (tmp_path / "run.js").write_text(NODE)
    photo = Image.fromarray(load_sample_images().images[0][:300])
    rows = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 7, 3), dtype=np.uint8))
    cases, expected = [], []
    for fields in PROCESSORS.values():
        processor = ViTScratchImageProcessor(**fields)
        settings = web.pixel_settings(processor, processor.num_channels)
        settings |= {"rows_first": web.PILLOW_CHOOSES_AXIS}
        for image in (photo, rows):
            data = base64.b64encode(image.convert("RGBA").tobytes()).decode()
            cases.append({"settings": settings, "width": image.width, "height": image.height, "data": data})
            expected.append(processor(image, return_tensors="np")["pixel_values"])
    command = ["node", "run.js", str(Path(web.__file__).with_name("page.html"))]
    done = subprocess.run(command, input=json.dumps({"Image": cases}), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line, values in zip(done.stdout.splitlines(), expected, strict=True):
        dims, content = json.loads(line)
        got = np.frombuffer(base64.b64decode(content), np.float32).reshape(dims)
        np.testing.assert_array_equal(got, values)


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_stock_processor_makes_the_same_pixels(name):
    processor = ViTScratchImageProcessor(**PROCESSORS[name])
    if name in ("gray", "padded"):  # the stock one has no gray, and pads otherwise
        return
    stock = ViTImageProcessorPil(**web.pixel_settings(processor, 3))
    image = Image.fromarray(load_sample_images().images[1])
    got, expected = (made(image, return_tensors="np")["pixel_values"] for made in (stock, processor))
    np.testing.assert_allclose(got, expected, atol=2e-6 if processor.do_rescale else 1e-3)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"do_resize": False}, "do_resize false"),
        ({"resample": 1}, "resample 1"),
        ({"size": {"longest_edge": 20}}, "size {'longest_edge': 20}"),
        ({"size": {"height": 20, "width": 30}, "crop_pct": 0.9}, "crop_pct 0.9"),
        ({"num_channels": 4}, "images of 4 channels"),
    ],
)
def test_pixels_that_the_page_can_not_prepare_are_named(fields, part):
    processor = ViTScratchImageProcessor(**fields)
    with pytest.raises(InputError, match=part):
        web.pixel_settings(processor, processor.num_channels)


def test_a_program_of_8_bits_that_is_too_far_is_left_out(made, monkeypatch):
    folder, _, _, model = made

    def check(comparison, name, int8):
        if int8:
            raise InputError("It is too far. Nothing was written. Take another.")

    monkeypatch.setattr(web, "check", check)
    images = [Image.new("RGB", (30, 20))]
    processor = ViTScratchImageProcessor.from_pretrained(folder)
    built = web.build(model, processor, images, "pets", link="https://example.com")
    assert built.lines[1] == "onnx/model_quantized.onnx is left out. It is too far."
    assert FILES - set(built.files) == {"card.md", "examples/2.jpg", "onnx/model_quantized.onnx"}
    config = json.loads(built.files["config.json"])
    assert config["transformers.js_config"] == {"dtype": "fp32"}  # else it asks for 8 bits in a browser


def test_a_static_space_holds_the_model_and_its_licence(made, hub, tmp_path, monkeypatch, capsys):  # noqa: F811
    model, site = Path(shutil.copytree(made[0], tmp_path / "pets")), made[1]
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photo.png")
    static = ("--space", "--static", model, "owner/pets", "--images", tmp_path / "photo.png")
    publish(*static)
    shown = capsys.readouterr().out
    for part in ("onnx/model_quantized.onnx: ", "sdk: static", "bytes  index.html", "publish it first", "--yes"):
        assert part in shown, part
    assert hub.repositories == {}
    publish(model, "owner/pets", "--yes", "--private")
    assert "holds its weights: add --private" in error(*static, "--yes")
    publish(*static, "--yes", "--private")
    repository = hub.repositories["spaces/owner/pets"]
    files = repository.files()
    assert set(files) == FILES - {"card.md", "examples/2.jpg"} | {"README.md", ".gitattributes"}
    assert files["onnx/model.onnx"] == (site / "onnx/model.onnx").read_bytes()
    assert b'"link": "https://huggingface.co/owner/pets"' in files["index.html"]
    card = RepoCard(files["README.md"].decode()).data.to_dict()
    assert (card["sdk"], card["app_file"], card["models"]) == ("static", "index.html", ["owner/pets"])
    assert (card["license"], card["license_name"], card["license_link"]) == ("other", "terms", "https://example.com")
    assert len(card["short_description"]) <= 60

    repository.add("main", {**files, "examples/9.jpg": b"", "notes.txt": b"mine"}, "more")
    publish(*static, "--yes", "--private")  # an update: it is ours
    assert set(repository.files()) == set(files) | {"notes.txt"}
    (model / "README.md").unlink()
    assert "no card with a licence" in error(*static)
    assert "--static goes with --space" in error("--static", model, "owner/pets")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'needs onnx, onnxscript, onnxruntime: pip install -e ".[export]"' in error(*static)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MODULES = [ROOT / "node_modules", *map(Path, filter(None, os.environ.get("NODE_PATH", "").split(os.pathsep)))]
RUNTIME = next((path for path in (m / "onnxruntime-web" / "dist" for m in MODULES) if path.is_dir()), None)


@pytest.fixture(scope="module")
def tab(made):
    """The page in Chromium, from a server of files, with ONNX Runtime Web from npm in place of the CDN."""
    reason = "needs playwright, Chromium, and onnxruntime-web from npm: see docs/howto/export.md"
    sync_api = pytest.importorskip("playwright.sync_api", reason=reason)
    if not CHROMIUM or not RUNTIME:
        pytest.skip(reason)
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=made[1])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def from_npm(route):
        name = route.request.url.rpartition("/")[2]
        kind = "application/wasm" if name.endswith("wasm") else "text/javascript"
        headers = {"Access-Control-Allow-Origin": "*"}
        route.fulfill(path=RUNTIME / name, content_type=kind, headers=headers)

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--headless"])
        page = browser.new_page()
        page.set_default_timeout(20_000)
        page.route("https://cdn.jsdelivr.net/**", from_npm)
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        yield page
        browser.close()
    server.shutdown()


def test_the_browser_computes_the_logits_of_given_pixels(made, tab):
    pixel_values = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = made[3](pixel_values).logits[0]
    for path, atol in (("onnx/model.onnx", 1e-4), ("onnx/model_quantized.onnx", 0.5)):
        run = "([values, dims, path]) => logitsOf({ values: new Float32Array(values), dims }, path).then(Array.from)"
        got = tab.evaluate(run, [pixel_values.flatten().tolist(), [1, 3, 16, 24], path])
        torch.testing.assert_close(torch.tensor(got), expected, atol=atol, rtol=0)
    assert tab.evaluate("import('./pixels.js').then(module => module.scoresOf([0, 0], true))") == [0.5, 0.5]


def test_a_photo_in_the_browser_has_the_scores_that_it_has_here(made, tab, tmp_path):
    folder, _, _, model = made
    processor = ViTScratchImageProcessor.from_pretrained(folder)
    turned = Image.fromarray(load_sample_images().images[0])
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    for file in (*map(Path, load_sample_images().filenames), tmp_path / "turned.jpg", tmp_path / "clear.png"):
        with torch.no_grad():
            expected = model(**processor(str(file), return_tensors="pt")).logits[0].softmax(-1)
        tab.locator("#file").set_input_files(file)
        tab.locator("#status", has_text="Classified in").wait_for()
        got = tab.evaluate("classify(document.getElementById('file').files[0])")
        torch.testing.assert_close(torch.tensor(got), expected, atol=0.01, rtol=0)
        best = LABELS[int(expected.argmax())].replace("_", " ")
        assert tab.locator("#scores .label").first.inner_text() == best
        assert tab.locator("#scores .score").all_inner_texts() == [f"{100 * s:.1f}%" for s in sorted(got, reverse=True)]


def test_a_file_that_is_no_photo_is_said(tab, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    tab.locator("#file").set_input_files(tmp_path / "broken.jpg")
    tab.get_by_text("broken.jpg is no photo that this browser reads").wait_for()
    tab.get_by_alt_text("Example 1").click()
    tab.locator("#scores li").first.wait_for()
