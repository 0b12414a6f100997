# SPDX-License-Identifier: Apache-2.0
"""`do_fast_resize` beside the exact way: within the levels that its documentation tells, and exact where it must be."""

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import AutoImageProcessor, ViTImageProcessorPil

from modeling_vit_scratch import ViTScratchImageProcessor, image_processing_vit_scratch
from modeling_vit_scratch.image_decoding_vit_scratch import ImageDecodeError


BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
PHOTOS = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640 x 427


def encoded(image, form="JPEG", orientation=None, **options):
    buffer = io.BytesIO()
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][274] = orientation
    image.save(buffer, form, **({"quality": 92} | options))
    return buffer.getvalue()


def noise(height, width, channels=3):
    return np.random.default_rng(height).integers(0, 256, (height, width, channels), dtype=np.uint8)


def levels(image, **settings):
    """Mean and maximum of the difference from the exact way, from 0 to 255."""
    processor = ViTScratchImageProcessor(**settings)
    exact, fast = (np.stack(processor.fit(image, do_fast_resize=is_fast)) for is_fast in (False, True))
    assert (exact.shape, exact.dtype) == (fast.shape, fast.dtype)
    difference = abs(exact.astype(int) - fast)
    return difference.mean(), difference.max()


@pytest.fixture
def decoded_sizes(monkeypatch):
    """(width, height) of what is resized the fast way."""
    sizes, resize = [], image_processing_vit_scratch.fast_resize

    def record(image, *more):
        if hasattr(image, "load"):
            image.load()
        sizes.append(image.size)
        return resize(image, *more)

    monkeypatch.setattr(image_processing_vit_scratch, "fast_resize", record)
    return sizes


@pytest.mark.parametrize("size", [(40, 45), (31, 3), (90, 10)])
@pytest.mark.parametrize("resample", [BILINEAR, BICUBIC])
def test_the_axis_that_pillow_13_resizes_first(size, resample, monkeypatch):
    monkeypatch.setattr(image_processing_vit_scratch, "PILLOW_CHOOSES_AXIS", True)
    image, (width, height) = Image.fromarray(noise(80, 60)), size
    halfway = (60, height) if 80 - height > max(0, 2 * (60 - width)) else (width, 80)  # ImagingResampleInner
    exact = image.resize(halfway, resample).resize(size, resample)
    difference = abs(np.asarray(exact).astype(int) - image_processing_vit_scratch.fast_resize(image, size, resample))
    assert difference.max() <= (1 if resample == BILINEAR else 2)


@pytest.mark.parametrize("size", [(224, 224), (37, 61), (600, 300), (1, 1)])
@pytest.mark.parametrize("resample", [BILINEAR, BICUBIC])
def test_decoded_images_are_within_a_level_or_two(size, resample):
    limit = 1 if resample == BILINEAR else 2
    settings = {"size": dict(zip(("height", "width"), size)), "resample": resample}
    for image in (*PHOTOS, noise(403, 301), torch.from_numpy(noise(55, 301)).permute(2, 0, 1), noise(2, 999)):
        mean, most = levels(image, **settings)
        assert most <= limit
        assert mean < 0.02 or size == (1, 1)
    for channels in (1, 3):
        assert levels(noise(301, 403, 1)[..., 0], num_channels=channels, **settings)[1] <= limit
        assert levels(PHOTOS[0].convert("LA"), num_channels=channels, **settings)[1] <= limit
        assert levels(noise(301, 403, 4), num_channels=channels, **settings)[1] <= limit  # laid over white first
        assert levels(encoded(PHOTOS[0], "PNG"), num_channels=channels, **settings)[1] <= limit
        assert levels(PHOTOS[0].quantize(), num_channels=channels, **settings)[1] <= limit


def test_real_cells_are_within_a_level():
    package = importlib.util.find_spec("elpv_dataset")
    if package is None:
        pytest.skip('needs pip install -e ".[samples]"')
    cells = sorted(Path(package.origin).parent.glob("data/images/*.png"))[:20]
    assert len(cells) == 20
    for cell in cells:
        for side in (64, 224):
            mean, most = levels(cell, size=side, num_channels=1)
            assert most <= 1
            assert mean < 0.01


@pytest.mark.parametrize("settings", [
    {"resample": Image.Resampling.LANCZOS}, {"resample": Image.Resampling.NEAREST}, {"resample": Image.Resampling.BOX},
    {"num_channels": 4}, {"do_convert_rgb": False, "do_normalize": False}, {"do_resize": False},
])  # fmt: skip
def test_what_torch_lacks_is_exact(settings):
    assert levels(Image.fromarray(noise(120, 90, 4), "RGBA"), size=50, **settings) == (0, 0)


def test_many_channels_are_resized_one_by_one():
    assert levels(noise(120, 90, 6), size=50, num_channels=6)[1] <= 1


@pytest.mark.parametrize("resample", [BILINEAR, BICUBIC])
def test_large_images_are_reduced_in_two_steps(resample, monkeypatch):
    monkeypatch.setattr(image_processing_vit_scratch, "LARGE", 200_000)
    for photo in PHOTOS:
        for side in (64, 48):
            mean, most = levels(photo, size=side, resample=resample)
            assert 0 < mean < 1
            assert most <= 12
        assert levels(photo, size=224, resample=resample) == (0, 0)  # by less than 6: Pillow does nothing else


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize(("size", "limit"), [((640, 424), 12), ((4001, 1000), 12), ((120, 100), 1)])
def test_jpeg_files_that_torch_resizes_are_turned_too(orientation, size, limit):
    content = encoded(PHOTOS[0].resize(size), orientation=orientation)
    for settings in ({"size": {"height": 40, "width": 50}}, {"size": {"shortest_edge": 45}}):
        mean, most = levels(content, **settings)
        assert mean < 1.5
        assert most <= limit


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("settings", [
    {"size": {"height": 50, "width": 34}}, {"size": 40, "crop_pct": 0.9}, {"size": {"shortest_edge": 45}},
    {"size": {"longest_edge": 70}}, {"size": 40, "do_center_crop": True, "crop_size": {"height": 50, "width": 20}},
])  # fmt: skip
def test_jpeg_files_of_any_orientation(orientation, settings, decoded_sizes):
    # Smooth, without symmetry, and steep: a shift by one pixel of the result is 5 levels.
    y, x = np.mgrid[:427, :641]
    smooth = Image.fromarray(np.stack([255 * x / 641, 255 * y / 427, 255 - 255 * x / 641], axis=-1).astype(np.uint8))
    mean, most = levels(encoded(smooth, orientation=orientation), **settings)
    assert mean < 0.6
    assert most <= 3
    assert decoded_sizes[0] in {(321, 214), (161, 107), (81, 54)}  # as stored, at a scale that does not divide it
    for photo in PHOTOS:
        mean, most = levels(encoded(photo, orientation=orientation), **settings)
        assert mean < 1.3
        assert most <= 17


def test_jpeg_files_keep_half_as_many_pixels_again_as_the_result_has(decoded_sizes):
    photo = encoded(PHOTOS[0].resize((800, 600)))
    for size, expected in {(50, 66): 100, (51, 40): 200, (100, 100): 200, (200, 66): 400, (201, 66): 800}.items():
        levels(photo, size=dict(zip(("height", "width"), size)))
        assert decoded_sizes.pop()[0] == expected


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_colour_modes_of_jpeg_files(mode, channels):
    mean, most = levels(encoded(PHOTOS[1].convert(mode)), size=64, num_channels=channels)
    assert mean < 1
    assert most <= 12
    if mode == "CMYK":
        assert levels(encoded(PHOTOS[1].convert(mode)), size=64, num_channels=4)[0] < 1


def test_every_kind_of_file_goes_the_same_way(tmp_path):
    photo, processor = encoded(PHOTOS[1]), ViTScratchImageProcessor(size=32, do_fast_resize=True)
    (tmp_path / "photo.jpg").write_bytes(photo)
    values = [processor(photo, return_tensors="np")["pixel_values"]]
    values += [processor(source, return_tensors="np")["pixel_values"] for source in (
        str(tmp_path / "photo.jpg"), tmp_path / "photo.jpg", bytearray(photo), io.BytesIO(photo), [photo],
    )]  # fmt: skip
    assert all(np.array_equal(values[0], value) for value in values)
    exact = processor(photo, do_fast_resize=False, return_tensors="np")["pixel_values"]
    assert np.array_equal(exact, ViTScratchImageProcessor(size=32)(photo, return_tensors="np")["pixel_values"])
    assert 0 < abs(values[0] - exact).max() < 0.15
    opened = Image.open(tmp_path / "photo.jpg")  # the user's, and not to be changed
    processor(opened)
    assert opened.size == (640, 427)


def test_a_batch_is_its_images_and_values_are_those_of_transformers_to_a_level():
    photo, processor = PHOTOS[0], ViTScratchImageProcessor(size=96, do_fast_resize=True)
    sources = [photo, np.asarray(PHOTOS[1]), encoded(photo), encoded(PHOTOS[1].convert("RGBA"), "PNG")]
    batch = processor(sources, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch, torch.cat([processor(one, return_tensors="pt")["pixel_values"] for one in sources]))
    stock = ViTImageProcessorPil(size={"height": 96, "width": 96})(PHOTOS, return_tensors="pt")["pixel_values"]
    assert (batch[:2] - stock).abs().max() <= 1.001 / 127.5
    units = np.asarray(photo) / np.float32(255)  # came as 0..1, and leaves so
    as_they_are = processor(units, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert (as_they_are - (batch[:1] + 1) / 2).abs().max() < 1e-6


def test_the_setting_is_saved_read_and_checked(tmp_path):
    ViTScratchImageProcessor().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["do_fast_resize"] is False
    ViTScratchImageProcessor(do_fast_resize=True).save_pretrained(tmp_path)
    assert ViTScratchImageProcessor.from_pretrained(tmp_path).do_fast_resize
    remote = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True, size=64)
    photo = encoded(PHOTOS[0])
    assert remote.do_fast_resize
    assert np.array_equal(remote.fit(photo), ViTScratchImageProcessor(size=64).fit(photo, do_fast_resize=True))
    with pytest.raises(Exception, match="do_fast_resize"):
        ViTScratchImageProcessor(do_fast_resize="torchvision")


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 no photo", encoded(PHOTOS[0])[:5000], b"%!PS-Adobe-3.0"])
def test_broken_files_are_named(tmp_path, content):
    processor = ViTScratchImageProcessor(do_fast_resize=True)
    (tmp_path / "broken.jpg").write_bytes(content)
    with pytest.raises(ImageDecodeError, match=r"broken\.jpg cannot be read as an image"):
        processor(tmp_path / "broken.jpg")
    with pytest.raises(ImageDecodeError, match=r"image 2 of the batch"):
        processor([PHOTOS[0], content])


def test_mistakes_are_those_of_the_exact_way():
    processor = ViTScratchImageProcessor(do_fast_resize=True)
    with pytest.raises(TypeError, match="is of type int"):
        processor(7)
    with pytest.raises(ValueError, match="would give 0x3"):
        processor(encoded(Image.new("RGB", (600, 2))), size={"longest_edge": 3})
    with pytest.raises(ImageDecodeError, match="does not exist"):
        processor("nowhere.jpg")
    assert levels(encoded(PHOTOS[0]), do_resize=False) == (0, 0)


def test_jpeg_files_of_other_modes_are_converted_before_they_are_resized():
    for orientation in (None, 6):
        content = encoded(PHOTOS[0].convert("CMYK"), orientation=orientation)
        assert levels(content, size={"height": 64, "width": 64})[1] <= 1
