# SPDX-License-Identifier: Apache-2.0
"""The image processor against transformers' own, against NumPy and PIL references, and against broken files."""

import base64
import colorsys
import contextlib
import copy
import functools
import gzip
import http.server
import io
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, ViTImageProcessorPil
from transformers.image_utils import ChannelDimension

from modeling_vit_scratch import image_decoding_vit_scratch
from modeling_vit_scratch.image_decoding_vit_scratch import ImageDecodeError
from modeling_vit_scratch.image_processing_vit_scratch import ViTScratchImageProcessor


HEIGHT, WIDTH = 23, 37
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def random_bytes(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def rgb() -> np.ndarray:
    """Random RGB pixels (H, W, 3)."""
    return random_bytes(HEIGHT, WIDTH, 3)


@pytest.fixture
def plain() -> ViTScratchImageProcessor:
    """A processor that hands the decoded 0..255 values through."""
    return ViTScratchImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)


def values(processor: ViTScratchImageProcessor, images, **settings) -> np.ndarray:
    return processor(images, return_tensors="np", **settings)["pixel_values"]


def decoded(processor: ViTScratchImageProcessor, image, **settings) -> np.ndarray:
    """The decoded values of one image as (H, W, C)."""
    return values(processor, image, **settings)[0].transpose(1, 2, 0)


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


# --- equality with transformers -------------------------------------------------------------------------------------

SETTINGS = [
    {},
    *({"resample": resample} for resample in range(6)),
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"do_resize": False},
    {"size": {"height": 18, "width": 41}},
    {"size": 20},
    {"size": [12, 50]},
    {"size": {"shortest_edge": 19}},
    {"size": 19, "default_to_square": False},
    {"size": {"shortest_edge": 19, "longest_edge": 25}},
    {"size": {"max_height": 40, "max_width": 30}},
    {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 17, "width": 15}},
    {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 27, "width": 15}},
    {"do_resize": False, "do_center_crop": True, "crop_size": 30},
    {"rescale_factor": 1 / 127.5, "image_mean": 0.25, "image_std": 2.0},
    IMAGENET,
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_transformers(settings):
    ours, theirs = ViTScratchImageProcessor(**settings), ViTImageProcessorPil(**settings)
    arrays = [random_bytes(*shape, 3, seed=seed) for seed, shape in enumerate([(23, 37), (40, 31), (30, 30)])]
    batches = {
        "PIL": [Image.fromarray(array) for array in arrays],
        "channels last": arrays,
        "channels first": [array.transpose(2, 0, 1) for array in arrays],
        "tensors": [torch.from_numpy(array) for array in arrays],
    }
    for kind, images in batches.items():
        for our, their in zip(ours(images)["pixel_values"], theirs(images)["pixel_values"], strict=True):
            np.testing.assert_allclose(our, their, rtol=1e-6, atol=1e-5, err_msg=kind)
            assert our.dtype == np.float32

    pil = batches["PIL"][0]
    expected = theirs(pil, return_tensors="pt")["pixel_values"].float()
    torch.testing.assert_close(ours(pil, return_tensors="pt")["pixel_values"], expected, rtol=1e-6, atol=1e-5)
    per_call = ViTScratchImageProcessor()(pil, return_tensors="pt", **settings)["pixel_values"]
    torch.testing.assert_close(per_call, expected, rtol=1e-6, atol=1e-5)


def test_real_photo_sizes_equal_transformers():
    image = Image.fromarray(random_bytes(375, 500, 3))
    ours, theirs = ViTScratchImageProcessor(), ViTImageProcessorPil()
    expected = theirs(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours(image, return_tensors="pt")["pixel_values"], expected, rtol=0, atol=1e-6)


def test_output_types(rgb):
    processor, image = ViTScratchImageProcessor(size=8), Image.fromarray(rgb)
    tensor = processor([image, image], return_tensors="pt", device="cpu")["pixel_values"]
    assert (tensor.shape, tensor.dtype) == ((2, 3, 8, 8), torch.float32)
    assert processor(image, return_tensors="pt", device="meta")["pixel_values"].device.type == "meta"
    array = processor(image, return_tensors="np")["pixel_values"]
    assert (array.shape, array.dtype) == ((1, 3, 8, 8), np.float32)
    as_list = processor([image, image])["pixel_values"]
    assert isinstance(as_list, list)
    assert [item.shape for item in as_list] == [(3, 8, 8)] * 2
    assert processor(image, return_tensors="pt", size={"height": 4, "width": 6})["pixel_values"].shape == (1, 3, 4, 6)


# --- PIL modes, orientation, files ----------------------------------------------------------------------------------


def over(colors: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    return (colors * (alpha / 255.0) + np.array(background) * (1 - alpha / 255.0)).round()


def srgb_gray_of_lightness(lightness: np.ndarray) -> np.ndarray:
    """CIE L* (0..100) of a neutral colour -> sRGB value (0..255)."""
    f = (lightness + 16) / 116
    luminance = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    gamma = np.where(luminance <= 0.0031308, 12.92 * luminance, 1.055 * luminance.clip(1e-9) ** (1 / 2.4) - 0.055)
    return gamma * 255


def mode_cases(background: tuple[int, int, int]) -> dict[str, tuple[Image.Image, np.ndarray, float]]:
    """For each mode: an image, the RGB values it stands for, computed in NumPy, and the rounding to allow."""
    gray, colors, alpha = random_bytes(HEIGHT, WIDTH, 1), random_bytes(HEIGHT, WIDTH, 3), random_bytes(HEIGHT, WIDTH, 1)
    palette, indices = random_bytes(256, 3, seed=5), gray[..., 0]
    indexed = Image.fromarray(indices)
    indexed.putpalette(palette.tobytes())
    transparent = indexed.copy()
    transparent.info["transparency"] = 7
    opacity = random_bytes(256, seed=6)
    many_transparent = indexed.copy()
    many_transparent.info["transparency"] = opacity.tobytes()
    keyed = Image.fromarray(colors)
    keyed.info["transparency"] = tuple(int(value) for value in colors[3, 4])
    is_key = (colors == colors[3, 4]).all(-1, keepdims=True)
    indexed_alpha = indexed.convert("PA")
    indexed_alpha.putalpha(Image.fromarray(alpha[..., 0]))
    gray_alpha, rgba = np.concatenate([gray, alpha], -1), np.concatenate([colors, alpha], -1)
    # premultiplied by definition: stored = color * alpha
    strong = np.maximum(alpha, 200)
    ink = random_bytes(HEIGHT, WIDTH, 4, seed=7).astype(float)
    luma, blue, red = (colors[..., i].astype(float) for i in range(3))
    jfif = np.stack(
        [
            luma + 1.402 * (red - 128),
            luma - 0.344136 * (blue - 128) - 0.714136 * (red - 128),
            luma + 1.772 * (blue - 128),
        ],
        -1,
    )
    hsv = [[np.multiply(colorsys.hsv_to_rgb(*(pixel / 255.0)), 255) for pixel in row] for row in colors]
    neutral = np.concatenate([gray, np.full_like(gray, 128), np.full_like(gray, 128)], -1)
    lab = Image.merge("LAB", [Image.fromarray(np.ascontiguousarray(neutral[..., i])) for i in range(3)])
    wide = np.random.default_rng(8).integers(0, 65536, (HEIGHT, WIDTH, 1), dtype=np.uint16)
    wide[0, 0], wide[0, 1] = 65535, 0
    floats = np.random.default_rng(9).random((HEIGHT, WIDTH, 1), dtype=np.float32)
    wide_file = Image.open(io.BytesIO(encoded(Image.fromarray(wide[..., 0]))))
    return {
        "1": (Image.fromarray(gray[..., 0] > 99), (gray > 99) * 255, 0),
        "L": (Image.fromarray(gray[..., 0]), gray, 0),
        "LA": (Image.fromarray(gray_alpha), over(gray, alpha, background), 1),
        "La": (Image.fromarray(np.concatenate([gray, strong], -1)).convert("La"), over(gray, strong, background), 2),
        "P": (indexed, palette[indices], 0),
        "P, one transparent": (transparent, np.where((indices == 7)[..., None], background, palette[indices]), 0),
        "P, opacities": (many_transparent, over(palette[indices], opacity[indices][..., None], background), 1),
        "PA": (indexed_alpha, over(palette[indices], alpha, background), 1),
        "RGB": (Image.fromarray(colors), colors, 0),
        "RGB, transparent colour": (keyed, np.where(is_key, background, colors), 0),
        "RGBA": (Image.fromarray(rgba), over(colors, alpha, background), 1),
        "RGBa": (
            Image.fromarray(np.concatenate([colors, strong], -1)).convert("RGBa"),
            over(colors, strong, background),
            2,
        ),
        "RGBX": (Image.fromarray(colors).convert("RGBX"), colors, 0),
        "CMYK": (
            Image.frombytes("CMYK", (WIDTH, HEIGHT), ink.astype(np.uint8).tobytes()),
            (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255,
            1,
        ),
        "YCbCr": (Image.frombytes("YCbCr", (WIDTH, HEIGHT), colors.tobytes()), jfif.clip(0, 255), 2),
        "HSV": (Image.frombytes("HSV", (WIDTH, HEIGHT), colors.tobytes()), np.array(hsv), 3),
        "LAB": (lab, srgb_gray_of_lightness(gray / 2.55), 3),
        "I": (Image.fromarray(wide[..., 0].astype(np.int32)), wide / 257, 0.5),
        "I, 8 bits": (Image.fromarray(gray[..., 0].astype(np.int32)), gray, 0),
        "I;16": (Image.fromarray(wide[..., 0]), wide / 257, 0.5),
        "I;16L": (Image.frombytes("I;16L", (WIDTH, HEIGHT), wide.astype("<u2").tobytes()), wide / 257, 0.5),
        "I;16B": (Image.frombytes("I;16B", (WIDTH, HEIGHT), wide.astype(">u2").tobytes()), wide / 257, 0.5),
        "I;16 of a file": (wide_file, wide / 257, 0.5),
        "F, 0..1": (Image.fromarray(floats[..., 0]), floats * 255, 0.501),
        "F, 0..255": (Image.fromarray(floats[..., 0] * 200), floats * 200, 0.501),
    }


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 60)], ids=["white", "green"])
@pytest.mark.parametrize("case", mode_cases((0, 0, 0)))
def test_every_pil_mode(plain, case, background):
    image, expected, tolerance = mode_cases(background)[case]
    assert image.mode == case.split(",")[0].split(" ")[0]
    untouched = image.mode, image.tobytes()
    expected = np.broadcast_to(expected, (HEIGHT, WIDTH, 3)).astype(float)

    found = decoded(plain, image, background_color=background)
    assert np.abs(found - expected).max() <= tolerance
    assert (image.mode, image.tobytes()) == untouched

    found_gray = decoded(plain, image, background_color=list(background), num_channels=1)
    weights = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    assert found_gray.shape == (HEIGHT, WIDTH, 1)
    assert np.abs(found_gray[..., 0] - expected @ weights).max() <= tolerance + 1


def test_white_is_the_default_background(plain):
    image = Image.new("RGBA", (3, 2), (255, 0, 0, 0))
    np.testing.assert_array_equal(decoded(plain, image), np.full((2, 3, 3), 255))
    again = ViTScratchImageProcessor(background_color=[1, 2, 3], do_resize=False, do_rescale=False, do_normalize=False)
    np.testing.assert_array_equal(decoded(again, image)[0, 0], [1, 2, 3])


def test_sixteen_bits_are_scaled_not_clipped(plain):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(ramp / 65535 * 255)
    for image in (ramp, torch.from_numpy(ramp), Image.fromarray(ramp), encoded(Image.fromarray(ramp))):
        np.testing.assert_array_equal(decoded(plain, image)[..., 0], expected)


UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(plain, rgb, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    Image.fromarray(rgb).save(path, exif=exif)
    expected = UPRIGHT[orientation](rgb)
    np.testing.assert_array_equal(expected, np.asarray(ImageOps.exif_transpose(Image.open(path))))
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        np.testing.assert_array_equal(decoded(plain, source), expected)
        np.testing.assert_array_equal(np.asarray(plain.decode(source)), expected)

    jpeg = encoded(Image.fromarray(rgb), "JPEG", exif=exif)
    theirs = ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg)))
    np.testing.assert_array_equal(decoded(plain, jpeg), np.asarray(theirs))


def test_damaged_exif_is_no_reason_to_refuse_a_photo(plain, rgb):
    for file_format in ("PNG", "WEBP"):
        data = encoded(Image.fromarray(rgb), file_format, exif=b"Exif\0\0not a TIFF header", lossless=True)
        np.testing.assert_array_equal(decoded(plain, data), rgb)


def test_every_kind_of_source(plain, rgb, tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(rgb).save(path)
    data = path.read_bytes()
    at_its_end = io.BytesIO(data)
    at_its_end.seek(0, io.SEEK_END)
    with open(path, "rb") as handle:
        sources = [
            path,
            str(path),
            data,
            bytearray(data),
            memoryview(data),
            io.BytesIO(data),
            at_its_end,
            handle,
            "data:image/png;base64," + base64.b64encode(data).decode(),
            Image.open(path),
            Image.fromarray(rgb),
            rgb,
            torch.from_numpy(rgb),
        ]
        found = values(plain, sources)
    np.testing.assert_array_equal(found, np.broadcast_to(rgb.transpose(2, 0, 1), found.shape))
    for source in sources[:4]:
        np.testing.assert_array_equal(np.asarray(plain.decode(source)), rgb)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_first_frame_of_an_animation(plain, file_format):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "lime")]
    options = {} if file_format in ("GIF", "TIFF", "PNG") else {"quality": 100}
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(decoded(plain, data) - [255, 0, 0]).max() <= 3


@pytest.fixture
def server(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_url(plain, rgb, tmp_path, server):
    transparent = Image.fromarray(np.dstack([rgb, np.zeros((HEIGHT, WIDTH), np.uint8)]))
    Image.fromarray(rgb).save(tmp_path / "picture.png")
    transparent.save(tmp_path / "transparent.png")
    (tmp_path / "page.jpg").write_text("<html>")
    np.testing.assert_array_equal(decoded(plain, f"{server}/picture.png"), rgb)
    assert decoded(plain, f"{server}/transparent.png").min() == 255
    for missing, reason in (("missing.png", "404"), ("page.jpg", "no image format")):
        with pytest.raises(ImageDecodeError, match=rf"{server}/{missing} cannot be read as an image: .*{reason}"):
            plain(f"{server}/{missing}")


class Endless(http.server.BaseHTTPRequestHandler):
    """Bodies without an end: /fast, /slow, and /bomb, which is small before it is unpacked; redirects in a circle."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path == "/circle":
            self.send_response(302)
            self.send_header("Location", "/circle")
            self.end_headers()
            return
        self.send_response(200)
        if self.path == "/bomb":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        pieces = {"/bomb": gzip.compress(bytes(10_000_000)), "/slow": bytes(1000), "/fast": bytes(100_000)}
        with contextlib.suppress(OSError):  # the reader has gone
            while True:
                self.wfile.write(pieces[self.path])
                time.sleep(0.05 if self.path == "/slow" else 0)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("fast", "more than 1 MB"),
        ("bomb", "more than 1 MB"),
        ("slow", "did not arrive within 0.5 seconds"),
        ("circle", "redirects"),
    ],
)
def test_a_url_costs_no_more_than_its_limits(plain, monkeypatch, path, words):
    monkeypatch.setattr(image_decoding_vit_scratch, "MAX_URL_BYTES", 1_000_000)
    monkeypatch.setattr(image_decoding_vit_scratch, "URL_TIMEOUT_SECONDS", 0.5)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ImageDecodeError, match=words):
            plain(f"http://127.0.0.1:{httpd.server_port}/{path}")
    finally:
        httpd.shutdown()
        httpd.socket.close()


# --- arrays and tensors ---------------------------------------------------------------------------------------------

VALUE_RULES = [
    (np.bool_, [0, 1], [0, 255]),
    (np.uint8, [0, 1, 255], [0, 1, 255]),
    (np.uint16, [0, 1, 128, 129, 256, 65535], [0, 0, 0, 1, 1, 255]),
    (np.uint16, [0, 255], [0, 1]),
    (np.int8, [0, 1, 127], [0, 1, 127]),
    (np.int16, [0, 1, 255], [0, 1, 255]),
    (np.int16, [0, 257, 32767], [0, 1, 127]),
    (np.int32, [0, 255], [0, 255]),
    (np.int64, [0, 1, 256, 65535], [0, 0, 1, 255]),
    (np.uint32, [0, 65535], [0, 255]),
    (np.float32, [0, 0.5, 1], [0, 128, 255]),
    (np.float64, [0, 0.25, 1.0000001], [0, 64, 255]),
    (np.float32, [0, 0.4, 0.6, 254.6], [0, 0, 1, 255]),
    (np.float16, [-0.0005, 0.25, 1], [0, 64, 255]),
    (np.float32, [1.5, 255.0001], [2, 255]),
    (">u2", [0, 65535], [0, 255]),
    (">f4", [0, 0.2], [0, 51]),
]


@pytest.mark.parametrize(("dtype", "given", "expected"), VALUE_RULES)
def test_value_rules(plain, dtype, given, expected):
    array = np.array([given], dtype=dtype)
    if array.dtype.kind == "f" and array.max() <= 1.001:
        plain = ViTScratchImageProcessor(do_resize=False, do_normalize=False, rescale_factor=1)
    np.testing.assert_array_equal(decoded(plain, array)[0, :, 0], expected)
    if array.dtype.isnative:
        np.testing.assert_array_equal(decoded(plain, torch.from_numpy(array))[0, :, 0], expected)


def test_tensors_that_numpy_lacks(rgb):
    processor = ViTScratchImageProcessor(do_resize=False, do_normalize=False, rescale_factor=1)
    whole = torch.from_numpy(rgb).to(torch.bfloat16)
    np.testing.assert_array_equal(decoded(processor, whole), whole.float().numpy())
    parts = (torch.from_numpy(rgb) / 255).to(torch.bfloat16).requires_grad_()
    np.testing.assert_array_equal(decoded(processor, parts), (parts.detach().float() * 255).round().numpy())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_unit_floats_equal_the_bytes_they_came_from(rgb, dtype):
    processor = ViTScratchImageProcessor(size=16)
    floats = (rgb / dtype(255)).astype(dtype)
    np.testing.assert_array_equal(values(processor, floats), values(processor, rgb))
    np.testing.assert_array_equal(values(processor, rgb.astype(dtype)), values(processor, rgb))
    # what transformers' users do with images in 0..1
    np.testing.assert_allclose(values(processor, floats, do_rescale=False), values(processor, rgb), atol=1e-6)
    np.testing.assert_allclose(
        values(processor, [torch.from_numpy(floats), Image.fromarray(rgb)], do_rescale=False, do_normalize=False),
        values(processor, [rgb, rgb], do_normalize=False) * np.array([1, 255]).reshape(2, 1, 1, 1),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([[0.0, np.nan]]), "nan"),
        (np.array([[0.0, np.inf]]), "inf"),
        (np.array([[-0.1, 0.5]]), "-0.1 to 0.5"),
        (np.array([[0.0, 256.0]]), "0 to 256: expected 0..1 or 0..255"),
        (np.array([[-1, 3]]), "int64 values from -1 to 3"),
        (np.array([[0, 65536]]), "0 to 65536"),
        (np.array([[0j]]), "complex128"),
        (np.array([["a"]]), "dtype <U1"),
        (np.zeros((0, 4, 3), np.uint8), r"no pixels: its shape is \(0, 4, 3\)"),
        (np.zeros(5, np.uint8), r"shape \(5,\)"),
        (np.zeros((1, 1, 4, 4, 3), np.uint8), r"shape \(1, 1, 4, 4, 3\)"),
        (np.zeros((8, 28, 28), np.uint8), r"shape \(8, 28, 28\).*\(B, 1, H, W\)"),
        (Image.new("RGB", (0, 5)), r"no pixels: its width and height are \(0, 5\)"),
    ],
)
def test_refused_arrays(array, words):
    with pytest.raises(ValueError, match=words):
        ViTScratchImageProcessor()(array)


def test_layouts(plain, rgb):
    channels_first = rgb.transpose(2, 0, 1)
    for array in (rgb, channels_first, torch.from_numpy(rgb), torch.from_numpy(channels_first.copy())):
        np.testing.assert_array_equal(decoded(plain, array), rgb)
    gray = np.repeat(rgb[..., :1], 3, -1)
    for array in (rgb[..., 0], rgb[..., :1], channels_first[:1]):
        np.testing.assert_array_equal(decoded(plain, array), gray)
    rgba = random_bytes(HEIGHT, WIDTH, 4)
    for array, bands in ((rgba, rgba), (rgba.transpose(2, 0, 1), rgba), (rgba[..., 2:], rgba[..., 2:])):
        np.testing.assert_array_equal(decoded(plain, array), decoded(plain, Image.fromarray(bands.copy())))


@pytest.mark.parametrize(
    ("shape", "first"),
    [
        ((3, 9, 3), True),
        ((1, 9, 3), False),
        ((4, 9, 3), False),
        ((3, 9, 4), True),
        ((1, 9, 4), True),
        ((2, 9, 3), False),
    ],
)
def test_ambiguous_layouts(plain, shape, first):
    array = random_bytes(*shape)
    expected, other = ("channels_first", "channels_last") if first else ("channels_last", "channels_first")
    inferred = decoded(plain, array)
    np.testing.assert_array_equal(inferred, decoded(plain, array, input_data_format=expected))
    np.testing.assert_array_equal(inferred, decoded(plain, array, input_data_format=ChannelDimension(expected)))
    assert inferred.shape != decoded(plain, array, input_data_format=other).shape
    np.testing.assert_array_equal(np.asarray(plain.decode(array, input_data_format=expected)), inferred)


def test_ambiguity_is_read_as_transformers_does():
    array = random_bytes(3, 9, 3)
    ours, theirs = ViTScratchImageProcessor(size=8), ViTImageProcessorPil(size=8)
    np.testing.assert_allclose(values(ours, array), theirs(array, return_tensors="np")["pixel_values"], atol=1e-6)


def test_batches_equal_single_images(rgb):
    processor = ViTScratchImageProcessor(size={"height": 9, "width": 12})
    tall = random_bytes(50, 20, 3, seed=1)
    mixed = [Image.fromarray(tall), rgb, torch.from_numpy(rgb.transpose(2, 0, 1).copy()), tall / 255, rgb[..., 0]]
    singles = np.concatenate([values(processor, image) for image in mixed])
    np.testing.assert_array_equal(values(processor, mixed), singles)
    np.testing.assert_array_equal(values(processor, tuple(mixed)), singles)
    np.testing.assert_array_equal(values(processor, [mixed[:2], mixed[2:]]), singles)

    batch = np.stack([rgb, rgb[::-1]])
    expected = values(processor, [rgb, rgb[::-1]])
    for four_dimensional in (batch, batch.transpose(0, 3, 1, 2), torch.from_numpy(batch), [batch[:1], batch[1:]]):
        np.testing.assert_array_equal(values(processor, four_dimensional), expected)
    gray_batch = torch.from_numpy(batch[..., :1]).permute(0, 3, 1, 2)
    np.testing.assert_array_equal(values(processor, gray_batch), values(processor, list(batch[..., 0])))


def test_images_of_several_sizes_need_a_list(rgb):
    processor = ViTScratchImageProcessor(size={"shortest_edge": 8})
    images = [rgb, rgb.transpose(1, 0, 2)]
    assert [item.shape for item in processor(images)["pixel_values"]] == [(3, 8, 12), (3, 12, 8)]
    with pytest.raises(ValueError, match=r"\(3, 8, 12\) and \(3, 12, 8\) do not fit .* do_center_crop"):
        processor(images, return_tensors="pt")


# --- number of channels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 4, 5, 13])
def test_channels_are_resized_independently(channels):
    array = random_bytes(HEIGHT, WIDTH, channels)
    mean, std = np.linspace(0.1, 0.6, channels), np.linspace(0.2, 0.9, channels)
    processor = ViTScratchImageProcessor(
        num_channels=channels, size={"height": 9, "width": 14}, image_mean=list(mean), image_std=list(std)
    )
    resized = [np.asarray(Image.fromarray(array[..., c]).resize((14, 9), 2)) for c in range(channels)]
    expected = (np.stack(resized) / 255 - mean[:, None, None]) / std[:, None, None]
    for image in (array, array.transpose(2, 0, 1), torch.from_numpy(array)):
        np.testing.assert_allclose(values(processor, image)[0], expected, atol=1e-5)
    np.testing.assert_array_equal(processor.decode(array.transpose(2, 0, 1)), array)


def test_four_bands_of_a_pil_image_are_kept():
    pixels = random_bytes(HEIGHT, WIDTH, 4)
    processor = ViTScratchImageProcessor(num_channels=4, do_rescale=False, do_normalize=False, size=8)
    for mode in ("RGBA", "CMYK"):
        image = Image.frombytes(mode, (WIDTH, HEIGHT), pixels.tobytes())
        assert processor.decode(image).mode == mode
        np.testing.assert_array_equal(decoded(processor, image), np.asarray(image.resize((8, 8), 2)))
    premultiplied = Image.frombytes("RGBA", (WIDTH, HEIGHT), pixels.tobytes()).convert("RGBa")
    assert processor.decode(premultiplied).mode == "RGBA"


def test_gray_processor(rgb):
    processor = ViTScratchImageProcessor(num_channels=1, size=8)
    assert processor.image_mean == processor.image_std == (0.5,)
    gray = Image.fromarray(rgb).convert("L")
    expected = np.asarray(gray.resize((8, 8), 2), dtype=np.float64)[None, None] / 127.5 - 1
    for image in (Image.fromarray(rgb), rgb, gray, np.asarray(gray), np.asarray(gray)[None]):
        np.testing.assert_allclose(values(processor, image), expected, atol=1e-6)
        assert processor.decode(image).mode == "L"


def test_conversion_can_be_switched_off(rgb):
    processor = ViTScratchImageProcessor(do_convert_rgb=False, do_resize=False, image_mean=0.5, image_std=0.5)
    cases = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4, "1": 1, "P": 3, "I;16": 1, "LA": 2}
    for mode, channels in cases.items():
        assert values(processor, Image.fromarray(rgb).convert("L").convert(mode)).shape[1] == channels, mode
    assert values(processor, random_bytes(9, 9, 7), input_data_format="channels_last").shape == (1, 7, 9, 9)
    assert ViTScratchImageProcessor(do_convert_rgb=None).do_convert_rgb is True


@pytest.mark.parametrize(
    ("num_channels", "image", "words"),
    [
        (5, random_bytes(8, 8, 3), "has 3 channels, but the processor is for 5"),
        (4, Image.new("RGB", (8, 8)), r"has 3 channels, but the processor is for 4"),
        (3, random_bytes(8, 8, 5), "neither the first nor the last axis is a channel axis"),
        (1, Image.new("RGB", (8, 8)), None),
    ],
)
def test_wrong_number_of_channels(num_channels, image, words):
    processor = ViTScratchImageProcessor(num_channels=num_channels)
    if words is None:
        assert values(processor, image).shape[1] == num_channels
        return
    with pytest.raises(ValueError, match=words):
        processor(image)


def test_input_data_format_with_too_many_channels():
    with pytest.raises(ValueError, match="has 5 channels, but the processor is for 3"):
        ViTScratchImageProcessor()(random_bytes(8, 8, 5), input_data_format="channels_last")


# --- size -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop_pct", [0.5, 0.875, 0.9, 1.0, 1])
@pytest.mark.parametrize("size", [(224, 224), (24, 24), (20, 31)])
def test_crop_pct(size, crop_pct):
    image = Image.fromarray(random_bytes(75, 101, 3))
    for picture in (image, image.transpose(Image.Transpose.TRANSPOSE)):
        width, height = picture.size
        target = [math.floor(edge / crop_pct) for edge in size]
        scale = max(target[0] / height, target[1] / width)
        if size[0] == size[1]:
            new_height, new_width = (
                (target[0], int(target[0] * width / height))
                if height < width
                else (int(target[0] * height / width), target[0])
            )
        else:
            new_height, new_width = round(height * scale), round(width * scale)
        resized = picture.resize((new_width, new_height), Image.Resampling.BICUBIC)
        top, left = (new_height - size[0]) // 2, (new_width - size[1]) // 2
        expected = np.asarray(resized)[top : top + size[0], left : left + size[1]] / 127.5 - 1
        processor = ViTScratchImageProcessor(size=size, crop_pct=crop_pct, resample=3)
        found = values(processor, picture)[0].transpose(1, 2, 0)
        assert found.shape == (*size, 3)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    plain_resize = ViTScratchImageProcessor(size=size, resample=3)
    np.testing.assert_array_equal(values(processor, picture, crop_pct=None), values(plain_resize, picture))


def test_settings_that_change_after_init_are_checked_and_those_that_do_not_are_as_given():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    processor, again = ViTScratchImageProcessor(size=16), ViTScratchImageProcessor(size=24, image_mean=0.25)
    assert "_checked" not in processor.to_dict()
    processor.size, processor.image_mean = {"height": 24, "width": 24}, np.array(0.25)  # of no type of ours
    np.testing.assert_array_equal(values(processor, photo), values(again, photo))
    np.testing.assert_array_equal(values(copy.deepcopy(again), photo), values(again, photo, size=24))
    processor.crop_pct = 2.0
    with pytest.raises(ValueError, match="crop_pct must be above 0 and at most 1, got 2"):
        processor(photo, return_tensors="pt")


def test_crop_pct_is_shortest_edge_and_center_crop():
    image = Image.fromarray(random_bytes(375, 500, 3))
    ours = values(ViTScratchImageProcessor(crop_pct=0.9), image)
    theirs = ViTImageProcessorPil(size={"shortest_edge": 248}, do_center_crop=True, crop_size=224)
    np.testing.assert_allclose(ours, theirs(image, return_tensors="np")["pixel_values"], atol=1e-6)


def test_longest_edge():
    processor = ViTScratchImageProcessor(size={"longest_edge": 10})
    assert values(processor, random_bytes(20, 40, 3)).shape == (1, 3, 5, 10)
    assert values(processor, random_bytes(41, 20, 3)).shape == (1, 3, 10, 4)


@pytest.mark.parametrize("shape", [(1, 20000), (20000, 1)])
def test_extreme_shapes(shape):
    array = random_bytes(*shape, 3)
    assert values(ViTScratchImageProcessor(), array).shape == (1, 3, 224, 224)
    for settings in ({"size": {"shortest_edge": 224}}, {"crop_pct": 0.9}):
        with pytest.raises(ValueError, match=rf"resizing {shape[0]}x{shape[1]} .* to {Image.MAX_IMAGE_PIXELS} pixels"):
            ViTScratchImageProcessor(**settings)(array)
    with pytest.raises(ValueError, match="must have from 1 to"):
        ViTScratchImageProcessor(size={"longest_edge": 224})(array)


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop_pct": 0.0}, "crop_pct must be above 0 and at most 1, got 0.0"),
        ({"crop_pct": 1.1}, "got 1.1"),
        ({"crop_pct": 0.9, "do_center_crop": True, "crop_size": 20}, "leave out do_center_crop"),
        ({"crop_pct": 0.9, "do_resize": False}, "crop_pct needs do_resize"),
        ({"crop_pct": 0.9, "size": {"shortest_edge": 20}}, "size with height and width"),
        ({"image_mean": [0.5, 0.5]}, "image_mean has 2 values but num_channels is 3"),
        ({"image_std": [0.5]}, "image_std has 1 values but num_channels is 3"),
        ({"image_mean": [0.5] * 3, "num_channels": 5}, "image_mean has 3 values but num_channels is 5"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std must be above 0"),
        ({"num_channels": 0}, "num_channels must be 1 or more, got 0"),
        ({"background_color": (0, 0)}, "background_color must be three numbers"),
        ({"background_color": (0, 0, 256)}, "background_color must be three numbers"),
        ({"size": {"height": 0, "width": 8}}, "size must be 1 or more"),
        ({"size": {"height": 8}}, "size must have one of"),
        ({"size": {"min_pixels": 8, "max_pixels": 9}}, "max_pixels is not supported"),
        ({"do_center_crop": True}, "crop_size` must be specified"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 9}}, "crop_size must have height and width"),
        ({"resample": 99}, "resample must be one of"),
        ({"do_pad": True}, "do_pad is not supported"),
        ({"data_format": "channels_last"}, "always .B, C, H, W."),
        ({"input_data_format": "chw"}, "input_data_format must be channels_first or channels_last, got 'chw'"),
    ],
    ids=str,
)
def test_refused_settings(rgb, settings, words):
    with pytest.raises(ValueError, match=words):
        ViTScratchImageProcessor(**settings)
    with pytest.raises(ValueError, match=words):
        ViTScratchImageProcessor()(rgb, **settings)


def test_all_problems_are_told_at_once():
    with pytest.raises(ValueError, match=r"image_std must be above 0.*crop_pct must be above 0"):
        ViTScratchImageProcessor(image_std=0.0, crop_pct=2.0)


def test_unknown_settings_are_refused(rgb):
    with pytest.raises(TypeError, match="crop_percent"):
        ViTScratchImageProcessor(crop_percent=0.9)
    with pytest.raises(TypeError, match="crop_percent"):
        ViTScratchImageProcessor()(rgb, crop_percent=0.9)


def test_whole_numbers_will_do_for_statistics(rgb):
    processor = ViTScratchImageProcessor(do_resize=False, rescale_factor=1, image_mean=[0, 0, 0], image_std=1)
    np.testing.assert_array_equal(decoded(processor, rgb), rgb)
    np.testing.assert_array_equal(decoded(processor, rgb, rescale_factor=2, image_mean=0), rgb * 2.0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": 384, "crop_pct": 0.95, "resample": 3, **IMAGENET},
        {"size": {"shortest_edge": 20, "longest_edge": 40}, "do_center_crop": True, "crop_size": 16},
        {"num_channels": 5, "image_mean": 0.25, "image_std": [0.1, 0.2, 0.3, 0.4, 0.5]},
        {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_convert_rgb": False},
        {"background_color": [0, 10, 20], "rescale_factor": 1 / 128},
    ],
    ids=str,
)
def test_save_and_load(tmp_path, settings):
    processor = ViTScratchImageProcessor(**settings)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "ViTScratchImageProcessor"
    for key, value in settings.items():
        is_square = key in ("size", "crop_size") and isinstance(value, int)
        assert saved[key] == ({"height": value, "width": value} if is_square else value)
    for loaded in (ViTScratchImageProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is ViTScratchImageProcessor
        assert loaded.to_dict() == processor.to_dict()
        assert loaded.backend == "pil"
    array = random_bytes(30, 40, 5 if processor.num_channels == 5 else 3)
    np.testing.assert_array_equal(values(loaded, array), values(processor, array))


def test_settings_of_stock_checkpoints_load(tmp_path):
    """The preprocessor_config.json of google/vit-base-patch16-224, and what transformers 4's fast processor wrote."""
    old = {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ViTFeatureExtractor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "size": 224,
    }
    nulls = dict.fromkeys(["crop_size", "device", "disable_grouping", "do_center_crop", "do_convert_rgb", "pad_size"])
    fast = {**old, **nulls, "size": {"height": 224, "width": 224}, "data_format": "channels_first"}
    for settings in (old, fast):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        loaded = ViTScratchImageProcessor.from_pretrained(tmp_path)
        image = Image.new("RGBA", (9, 9), (3, 4, 5, 0))
        np.testing.assert_array_equal(values(loaded, image), np.ones((1, 3, 224, 224)))
    gray = ViTScratchImageProcessor.from_pretrained(tmp_path, num_channels=1, image_mean=0.5, image_std=0.5)
    assert values(gray, image).shape == (1, 1, 224, 224)


# --- what can not be read -------------------------------------------------------------------------------------------


def broken_files(folder: Path) -> dict[str, str]:
    """Name of a file -> words that tell what is wrong with it."""
    jpeg = encoded(Image.fromarray(random_bytes(64, 64, 3)), "JPEG")
    png = encoded(Image.fromarray(random_bytes(64, 64, 3)))
    (folder / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "header.jpg").write_bytes(jpeg[:15])
    (folder / "truncated.png").write_bytes(png[: len(png) // 2])
    (folder / "damaged.png").write_bytes(png[:60] + bytes(500) + png[560:])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not a photo")
    (folder / "folder.jpg").mkdir()
    return {
        "truncated.jpg": "truncated",
        "header.jpg": "",
        "truncated.png": "truncated",
        "damaged.png": "",
        "empty.jpg": r"empty \(0 bytes\)",
        "text.jpg": "no image format that Pillow knows",
        "folder.jpg": "a folder",
        "missing.jpg": "does not exist",
    }


def test_broken_files_are_named(tmp_path, rgb):
    processor = ViTScratchImageProcessor()
    for name, reason in broken_files(tmp_path).items():
        path = tmp_path / name
        for source in (path, str(path), [Image.fromarray(rgb), path]):
            with pytest.raises(ImageDecodeError, match=rf"{name} cannot be read as an image: .*{reason}") as caught:
                processor(source)
            assert caught.value.__suppress_context__
            assert caught.value.__cause__ is None
            assert len(str(caught.value).splitlines()) == 1
        with pytest.raises(ImageDecodeError, match=name):
            processor.decode(path)
        if path.is_file():
            with pytest.raises(ImageDecodeError, match=r"image 3 of the batch \(index 2\) cannot be read as an image"):
                processor([rgb, rgb, path.read_bytes()])
            with open(path, "rb") as handle, pytest.raises(ImageDecodeError, match=name):
                processor(handle)
    with pytest.raises(ImageDecodeError, match=r"truncated.jpg"):
        processor(Image.open(tmp_path / "truncated.jpg"))
    with pytest.raises(ImageDecodeError, match=r"^the image cannot be read"):
        processor.decode("data:image/png;base64,AAAA")
    assert issubclass(ImageDecodeError, ValueError)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("L", (60, 50)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert values(ViTScratchImageProcessor(size=8), path).shape == (1, 3, 8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageDecodeError, match=r"bomb.png .*3000 pixels.*limit of 2000.*MAX_IMAGE_PIXELS"):
        ViTScratchImageProcessor(size=8)(path)


@pytest.mark.parametrize("nothing", [[], (), [[]], np.zeros((0, 8, 8, 3), np.uint8)], ids=str)
def test_empty_batches(nothing):
    with pytest.raises(ValueError, match="no images: the list or batch is empty"):
        ViTScratchImageProcessor()(nothing)


@pytest.mark.parametrize(("source", "kind"), [(None, "NoneType"), (3, "int"), ({"a": 1}, "dict"), (object(), "object")])
def test_things_that_are_no_image(rgb, source, kind):
    with pytest.raises(TypeError, match=rf"image 1 of the batch \(index 0\) is of type {kind}: expected a path"):
        ViTScratchImageProcessor()(source)
    with pytest.raises(TypeError, match=rf"image 2 of the batch \(index 1\) is of type {kind}"):
        ViTScratchImageProcessor()([rgb, source])


# --- torchvision ----------------------------------------------------------------------------------------------------


def test_same_values_from_the_folder_alone_and_without_torchvision(rgb, tmp_path):
    """A fresh process that has neither this package nor torchvision loads the saved folder: the code is in it."""
    processor = ViTScratchImageProcessor(crop_pct=0.9, size=16)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["auto_map"] == {"AutoImageProcessor": "image_processing_vit_scratch.ViTScratchImageProcessor"}
    Image.fromarray(rgb).save(tmp_path / "picture.png")
    script = """
import sys
sys.modules["torchvision"] = None  # `import torchvision` raises
import numpy, transformers
processor = transformers.AutoImageProcessor.from_pretrained(".", trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules."), type(processor)
numpy.save("values.npy", processor("picture.png", return_tensors="np")["pixel_values"])
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)
    np.testing.assert_array_equal(np.load(tmp_path / "values.npy"), values(processor, rgb))
