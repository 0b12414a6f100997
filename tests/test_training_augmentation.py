# SPDX-License-Identifier: Apache-2.0
"""Augmentation against Pillow's own operations, where it should do nothing, and for images of any shape."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from modeling_vit_scratch.augmentation.photo import DigitAugmentation, PhotoAugmentation


def picture(width, height, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


class Fixed:
    """A generator that gives the numbers it was made with, as parts of the range that is asked for."""

    def __init__(self, *parts):
        self.parts = list(parts)

    def uniform(self, low, high, size=None):
        if size is not None:
            return np.array([low + self.parts.pop(0) * (high - low) for _ in range(size)])
        return low + self.parts.pop(0) * (high - low)

    def integers(self, end):
        return int(self.parts.pop(0) * (end - 1))

    def random(self):
        return self.parts.pop(0)


def test_the_whole_photo_unmirrored_is_a_plain_resize():
    photo = picture(60, 40)
    augmented = PhotoAugmentation((16, 24), Image.Resampling.BICUBIC)(photo, Fixed(1.0, 0.5, 0.5, 0.5, 0.9))
    expected = photo.resize((24, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(augmented), np.asarray(expected))


def test_the_smallest_part_of_a_photo_is_cropped_where_the_generator_says_and_mirrored():
    photo = picture(60, 40)
    augment = PhotoAugmentation((16, 24), Image.Resampling.BILINEAR, smallest_area=0.25)
    augmented = augment(photo, Fixed(0.0, 0.5, 0.0, 1.0, 0.1))  # a quarter of the area: half of both sides
    expected = photo.crop((0, 20, 30, 40)).resize((24, 16), Image.Resampling.BILINEAR).transpose(0)
    assert np.array_equal(np.asarray(augmented), np.asarray(expected))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (7, 9), (100, 30)])
def test_photos_of_any_shape_get_the_size_of_the_model(size):
    augment, generator = PhotoAugmentation((16, 24), Image.Resampling.BILINEAR), np.random.default_rng(0)
    for _ in range(20):
        assert augment(picture(*size), generator).size == (24, 16)


@pytest.mark.parametrize("smallest", [0.08, 0.35])
def test_parts_are_whole_pixels_keep_their_share_and_are_anywhere(smallest):
    augment, generator = PhotoAugmentation((10, 10), 2, smallest), np.random.default_rng(0)
    boxes = np.array([augment._random_box(80, 60, generator) for _ in range(4000)])
    assert boxes.dtype.kind == "i"
    (left, top, right, bottom), scales = boxes.T, []
    assert left.min() == top.min() == 0
    assert (right.max(), bottom.max()) == (80, 60)
    shares = (right - left) * (bottom - top) / 4800
    assert smallest * 0.9 < shares.min() < smallest * 1.1  # reducible parts are cut to multiples of the scale
    assert shares.max() >= 0.95
    # The place is uniform: the mean of 4000 is its middle, give or take four standard errors.
    for start, length, whole in ((left, right - left, 80), (top, bottom - top, 60)):
        free = whole - length > 12
        place = start[free] / (whole - length)[free]
        assert abs(place.mean() - 0.5) < 0.05
    for box in boxes[:500]:
        width, height = box[2] - box[0], box[3] - box[1]
        scales.append(max(scale for scale in (1, 2, 4, 8) if min(width, height) >= 10 * scale or scale == 1))
        assert not (box % scales[-1]).any()
    assert len(set(scales)) >= 2


def test_a_digit_that_is_not_moved_is_not_changed():
    digit = picture(8, 8, "L")
    augmented = DigitAugmentation((8, 8))(digit, Fixed(0.5, 0.5, 0.5, 0.5))
    assert np.array_equal(np.asarray(augmented), np.asarray(digit))


def test_a_digit_is_moved_as_affine_grid_moves_it():
    digit = picture(8, 8, "L")
    augmented = DigitAugmentation((8, 8), rotation=30, zoom=0.2, shift=0.25)(digit, Fixed(0.9, 0.8, 0.7, 0.4))
    angle, zoom, right, down = np.radians(0.8 * 30), 1 + 0.6 * 0.2, 0.4 * 0.25, -0.2 * 0.25
    cosine, sine = np.cos(angle) / zoom, np.sin(angle) / zoom
    theta = torch.tensor([[[cosine, -sine, 2 * right], [sine, cosine, 2 * down]]], dtype=torch.float32)
    image = torch.from_numpy(np.asarray(digit).astype(np.float32))[None, None]
    grid = F.affine_grid(theta, (1, 1, 8, 8), align_corners=False)
    theirs = F.grid_sample(image, grid, padding_mode="border", align_corners=False)[0, 0].numpy()
    inside = (grid[0].abs() < 1 - 1 / 8).all(-1).numpy()  # at the border Pillow and torch differ on what is outside
    assert inside.sum() > 20
    assert np.abs(np.asarray(augmented) - theirs)[inside].max() <= 1


def test_a_digit_can_be_enlarged_on_the_way():
    assert DigitAugmentation((24, 16))(picture(8, 8, "L"), np.random.default_rng(0)).size == (16, 24)
