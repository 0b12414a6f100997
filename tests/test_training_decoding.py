# SPDX-License-Identifier: Apache-2.0
"""JPEG photos at reduced scale beside photos decoded in full: every orientation, colour mode, and what is broken."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_images import lossless_jpeg
from PIL import Image
from tiny_images import build, flags

from modeling_vit_scratch import ViTScratchImageProcessor
from modeling_vit_scratch.augmentation.photo import PhotoAugmentation
from modeling_vit_scratch.data.dataset import Photo, PhotoPart, StoredImage
from modeling_vit_scratch.image_decoding_vit_scratch import ImageDecodeError, is_scalable_jpeg


DECODER = ViTScratchImageProcessor()


def photo(width=403, height=301):
    """Smooth, without symmetry, and steep enough to show a shift by a few pixels."""
    y, x = np.mgrid[:height, :width]
    red = 255 * x / width
    green = 255 * y / height
    return Image.fromarray(np.stack([red, green, 255 - (red + green) / 2], axis=-1).astype(np.uint8))


def encoded(image, form="JPEG", orientation=None, **options):
    buffer = io.BytesIO()
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][274] = orientation
    image.save(buffer, form, **({"quality": 95} | options))
    return buffer.getvalue()


def both(content, size, box, decoder=DECODER, resample=2):
    """Reduced and exact, as arrays of whole numbers, and how many pixels were decoded along x."""
    reduced = Photo(content, decoder, "photo")
    exact = decoder.decode(content)
    assert (reduced.width, reduced.height) == exact.size
    part, where = reduced.decode(size, box)
    ours, theirs = part.resize(size, resample, box=where), exact.resize(size, resample, box=box)
    assert (ours.size, ours.mode) == (theirs.size, theirs.mode)
    return np.asarray(ours).astype(int), np.asarray(theirs).astype(int), reduced


@pytest.mark.parametrize("orientation", [None, *range(1, 9), 0, 77])
@pytest.mark.parametrize("scale", [8, 4, 2])
def test_the_same_part_of_the_upright_photo_whatever_its_orientation(orientation, scale):
    content = encoded(photo(), orientation=orientation)
    box = (33.3, 21.7, 33.3 + 31 * scale, 21.7 + 24 * scale)  # fits both ways round
    ours, theirs, reduced = both(content, (30, 23), box)
    assert reduced.image.size == (-(-403 // scale), -(-301 // scale))
    # A shift by one decoded pixel, or by the 5 / 8 of one that an end of 403 lacks, is 0.6 * 5 levels at scale 8.
    assert abs((ours - theirs).mean(axis=(0, 1))).max() < 0.5
    assert abs(ours - theirs).max() <= 3


def test_the_scale_is_the_smallest_with_a_pixel_for_each_pixel_of_the_result():
    content = encoded(photo(400, 320))
    widths = {(50, 40): 50, (51, 40): 100, (50, 41): 100, (100, 80): 100, (101, 80): 200, (200, 161): 400}
    for size, width in widths.items():
        assert both(content, size, (0, 0, 400, 320))[2].image.width == width
    assert both(content, (50, 40), (0, 0, 399, 320))[2].image.width == 100


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_part_that_is_not_reduced_is_exact(orientation):
    ours, theirs, _ = both(encoded(photo(), orientation=orientation), (150, 160), (1.5, 2.5, 290.5, 300.25))
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", [{}, {"progressive": True, "subsampling": 0}])
def test_colour_modes(mode, channels, options):
    decoder = ViTScratchImageProcessor(num_channels=channels)
    ours, theirs, reduced = both(encoded(photo().convert(mode), **options), (40, 30), (0, 0, 403, 301), decoder)
    assert reduced.image.width == 51
    assert abs(ours - theirs).max() <= 3


def test_four_channels_of_cmyk_are_kept():
    decoder = ViTScratchImageProcessor(num_channels=4)
    ours, theirs, _ = both(encoded(photo().convert("CMYK")), (40, 30), (0, 0, 403, 301), decoder)
    assert ours.shape == (30, 40, 4)
    assert abs(ours - theirs).max() <= 3


def test_a_photo_with_a_second_picture_in_its_file():
    content = encoded(photo(), "MPO", save_all=True, append_images=[Image.new("RGB", (403, 301))])
    assert Image.open(io.BytesIO(content)).format == "MPO"
    ours, theirs, reduced = both(content, (40, 30), (0, 0, 403, 301))
    assert reduced.image.width == 51
    assert abs(ours - theirs).max() <= 3


def noisy(width, height, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels[..., :3]).convert(mode) if mode != "CMYK" else Image.fromarray(pixels, "CMYK")


def levels(part, exact):
    """Mean and maximum of the difference from 0 to 255, of a part the fast way and an image of it."""
    pixels = part.pixels()
    assert (pixels.dtype, pixels.shape[1:]) == (torch.uint8, exact.size[::-1])
    assert pixels.is_contiguous()
    exact = np.asarray(exact).reshape(*exact.size[::-1], -1).transpose(2, 0, 1).astype(int)
    difference = abs(pixels.numpy() - exact)
    return difference.mean(), difference.max()


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("CMYK", 4)])
@pytest.mark.parametrize("is_mirrored", [False, True])
def test_a_resized_part_is_pillows_to_one_level(resample, mode, channels, is_mirrored):
    decoder, box = ViTScratchImageProcessor(num_channels=channels), (31, 7, 231, 167)
    for form, size in (("JPEG", (224, 180)), ("JPEG", (150, 130)), ("TIFF", (50, 60))):
        stored = StoredImage(encoded(noisy(250, 180, mode), form), "x")
        exact = stored.decode(decoder).crop(box).resize(size, resample)
        exact = exact.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_mirrored else exact
        part = PhotoPart(stored.open(decoder), size, resample, box, is_mirrored)
        mean, most = levels(part, exact)
        assert most <= 1
        assert mean < 0.05 or size[0] > 200  # noise that is enlarged is the worst there is


def test_filters_that_torch_lacks_are_pillows():
    stored, box = StoredImage(encoded(noisy(90, 60)), "x"), (3, 5, 80, 59)
    exact = stored.decode(DECODER).crop(box).resize((60, 40), Image.Resampling.LANCZOS)
    part = PhotoPart(stored.open(DECODER), (60, 40), Image.Resampling.LANCZOS, box)
    assert levels(part, exact) == (0, 0)


def test_pillow_keeps_large_images_in_pieces():
    ramp = Image.linear_gradient("L").resize((2100, 2050)).convert("RGB")
    stored, box = StoredImage(encoded(ramp, "BMP"), "x"), (0, 0, 2100, 2050)
    exact = stored.decode(DECODER).resize((24, 16), 2)
    assert levels(PhotoPart(stored.open(DECODER), (24, 16), 2, box), exact)[1] <= 1


def test_pixels_do_not_depend_on_the_number_of_threads():
    stored, threads, results = StoredImage(encoded(noisy(500, 375)), "x"), torch.get_num_threads(), []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(PhotoPart(stored.open(DECODER), (224, 224), 2, (10, 20, 490, 370)).pixels())
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_reduced_part_is_the_part_to_what_reducing_changes():
    # 12 of 255 levels of a smooth photo are a shift by one pixel at scale 8: there is none.
    content, box = encoded(photo(400, 320)), (80, 40, 320, 280)
    exact = DECODER.decode(content).crop(box).resize((30, 30), 2)
    mean, most = levels(PhotoPart(StoredImage(content, "x").open(DECODER), (30, 30), 2, box), exact)
    assert mean < 0.5
    assert most <= 3


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_other_formats_are_decoded_in_full(form):
    content = encoded(photo(), form)
    assert np.array_equal(np.asarray(Photo(content, DECODER, "x").image), np.asarray(DECODER.decode(content)))


def test_random_numbers_do_not_depend_on_how_a_photo_is_decoded(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(encoded(photo(), orientation=6))
    augment, after = PhotoAugmentation((24, 32), 2), []
    stored = StoredImage(str(tmp_path / "photo.jpg"), "x")
    for image in (stored.open(DECODER), stored.decode(DECODER)):
        generator = np.random.default_rng(1)
        result = augment(image, generator)
        result = np.asarray(result.to_image() if isinstance(result, PhotoPart) else result).astype(int)
        after.append((result, generator.random()))
    assert after[0][1] == after[1][1]
    assert abs(after[0][0] - after[1][0]).max() <= 5  # 301 is not of whole pixels at scale 2


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 no photo", encoded(photo())[:2000]])
def test_broken_files_are_named(tmp_path, content):
    file = str(tmp_path / "broken.jpg")
    Path(file).write_bytes(content)
    with pytest.raises(ImageDecodeError, match=r"broken\.jpg"):
        Photo(file, DECODER, file).decode((24, 16), (0, 0, 403, 301))
    with pytest.raises(ImageDecodeError, match="image 7"):
        Photo(content, DECODER, "image 7").decode((24, 16), (0, 0, 403, 301))
    with pytest.raises(ImageDecodeError, match="does not exist"):
        Photo(str(tmp_path / "nowhere.jpg"), DECODER, "nowhere.jpg")


def test_training_decodes_reduced_if_wanted_and_evaluation_never(tmp_path):
    for first, label in enumerate("ab"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "pets" / label / f"{number}.jpg").write_bytes(encoded(photo(400 + 8 * number + 4 * first)))
    data = flags(str(tmp_path / "pets"), "--allow_overlap")  # the photos look alike
    fast, exact = build(tmp_path / "a", *data), build(tmp_path / "b", *data, "--fast_decode", "False")
    ours, theirs = (trainer.train_dataset[0]["pixel_values"].int() for trainer in (fast, exact))
    assert 0 < (ours - theirs).abs().max() <= 3
    held_out = fast.eval_dataset
    whole = held_out.examples.decode(0, DECODER).resize((24, 16), held_out.processor.resample)
    assert np.array_equal(held_out[0]["pixel_values"].permute(1, 2, 0), np.asarray(whole))
    digits = build(tmp_path / "c", "--dataset_name", "digits", "--max_train_samples", "20", "--verify_images", "False")
    assert not digits.train_dataset.fast_decode
    assert digits.train_dataset[0]["pixel_values"].shape == (1, 16, 24)


@pytest.mark.parametrize(
    "padding", [b"", b"\xff\xe1\x00\x06Exif", b"\xff\xfe\x00\x02junk\xff\x00\xff\xff\xff\xfe\x00\x02"]
)
def test_lossless_jpeg_files_are_decoded_at_full_size(padding):
    # libjpeg can't scale them, and Pillow would write past the end of an image that `draft` has made smaller.
    content = lossless_jpeg((400, 300))
    content = content[:2] + padding + content[2:]
    processor = ViTScratchImageProcessor(size={"height": 32, "width": 32}, do_fast_resize=True)
    assert (np.stack(processor.fit(content, name="photo")) == 128).all()
    photo = StoredImage(content, "photo").open(DECODER)
    assert not photo.is_decoded
    assert (PhotoPart(photo, (32, 32), 2, (0, 0, 400, 300)).pixels() == 128).all()


@pytest.mark.parametrize("frame", [0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF])
def test_only_frames_that_libjpeg_scales_are_scaled(frame):
    image = Image.open(io.BytesIO(lossless_jpeg(frame=frame)))
    assert not is_scalable_jpeg(image)
    assert Image.open(io.BytesIO(lossless_jpeg(frame=0xC3))).fp.tell() == image.fp.tell()
    for options in ({}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(300)}):
        assert is_scalable_jpeg(Image.open(io.BytesIO(encoded(photo(), **options))))
