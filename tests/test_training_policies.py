# SPDX-License-Identifier: Apache-2.0
"""Augmentation policies against what timm and torchvision make of the same picture, and against numpy."""

import json
import pickle
import random

import numpy as np
import pytest
import torch
from golden_policies import FILE, picture, unpack
from PIL import Image, ImageFilter, ImageOps

from modeling_vit_scratch.augmentation.photo import (
    BIG_VISION_RANDAUGMENT,
    OPERATIONS,
    TIMM_RANDAUGMENT,
    TORCHVISION_RANDAUGMENT,
    TORCHVISION_TRIVIALAUGMENT,
    Chain,
    ColorJitter,
    PhotoAugmentation,
    RandAugment,
    RandomErasing,
    ThreeAugment,
    TrivialAugmentWide,
    _operate,
    auto_augment,
)


GOLDEN = json.loads(FILE.read_text())["operations"]
# timm's names for what there is one name for here.
TIMM_NAMES = {name + "Increasing": name for name in OPERATIONS} | {"TranslateXRel": "TranslateX"}
TIMM_NAMES["TranslateYRel"] = "TranslateY"
SCALES = {
    "RandAugment": (TORCHVISION_RANDAUGMENT, 30),
    "TrivialAugmentWide": (TORCHVISION_TRIVIALAUGMENT, 30),
    "timm": (TIMM_RANDAUGMENT, 10),
}


class Fixed:
    """A generator that says what it is told: `random` gives the numbers in turn, `integers` the offsets."""

    def __init__(self, randoms=(), integers=(), uniforms=()):
        self.randoms, self.offsets, self.parts = list(randoms), list(integers), list(uniforms)

    def random(self):
        return self.randoms.pop(0)

    def integers(self, *bounds):
        return self.offsets.pop(0)

    def uniform(self, low, high):
        return low + self.parts.pop(0) * (high - low)


def pixels(image):
    return np.asarray(image).astype(int)


def noise(mode="RGB", size=(20, 14), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(
        mode
    )


# ---------------------------------------------------------------------------------------------------------------------
# Operations and magnitudes


@pytest.mark.parametrize("case", GOLDEN)
def test_an_operation_does_what_it_does_at_home(case):
    home, name, magnitude = case.split(":")
    scales, unit = SCALES[home]
    ours, theirs = TIMM_NAMES.get(name, name), [unpack(text) for text in GOLDEN[case]]
    results = [
        pixels(_operate(picture(), ours, scales[ours], int(magnitude) / unit, Fixed([sign]))) for sign in (0.1, 0.9)
    ]
    # Both signs give both results. One level of difference: torchvision's slopes take the way over an angle.
    for result in results:
        assert min(np.abs(result - array).max() for array in theirs) <= 1
    for array in theirs:
        assert min(np.abs(result - array).max() for result in results) <= 1


def test_every_operation_of_every_dialect_was_compared():
    compared = {tuple(case.split(":")[:2]) for case in GOLDEN}
    for home, (scales, _) in SCALES.items():
        assert {TIMM_NAMES.get(name, name) for place, name in compared if place == home} == set(scales)


def test_every_magnitude_of_torchvision():
    # Where rounding matters: torchvision/transforms/autoaugment.py, num_bins = 31.
    for scales, most in ((TORCHVISION_RANDAUGMENT, 4), (TORCHVISION_TRIVIALAUGMENT, 6)):
        bits = 8 - (torch.arange(31) / ((31 - 1) / most)).round().int()
        assert [scales["Posterize"][0](index / 30, 9) for index in range(31)] == bits.tolist()
        thresholds = torch.linspace(255.0, 0.0, 31)
        ours = [scales["Solarize"][0](index / 30, 9) for index in range(31)]
        assert ours == pytest.approx(thresholds.tolist(), abs=1e-4)


@pytest.mark.parametrize("magnitude", [0, 10, 15, 20])
def test_big_visions_magnitudes(magnitude):
    # big_vision/pp/archive/autoaugment.py, level_to_arg, with translate_const=100 and cutout_const=40.
    level = magnitude / 10
    expected = {
        "Rotate": level * 30.0, "Posterize": int(level * 4), "Solarize": int(level * 256),
        "SolarizeAdd": int(level * 110), "ShearX": level * 0.3, "ShearY": level * 0.3, "TranslateX": level * 100.0,
        "TranslateY": level * 100.0, "Cutout": int(level * 40),
        **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), level * 1.8 + 0.1 - 1),
    }  # fmt: skip
    available = ["AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast"]
    available += ["Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd"]
    assert set(BIG_VISION_RANDAUGMENT) == set(available)
    for name, value in expected.items():
        assert BIG_VISION_RANDAUGMENT[name][0](level, 224) == pytest.approx(value), name
    signed = {name for name, (_, is_signed) in BIG_VISION_RANDAUGMENT.items() if is_signed}
    assert signed == {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}


def test_operations_against_numpy():
    image = noise()
    before = pixels(image)
    for bits in range(0, 9):
        kept = 0 if bits == 0 else before // 2 ** (8 - bits) * 2 ** (8 - bits)
        assert (pixels(OPERATIONS["Posterize"](image, bits)) == kept).all()
    assert (pixels(OPERATIONS["SolarizeAdd"](image, 110)) == np.where(before < 128, before + 110, before)).all()
    assert (
        pixels(OPERATIONS["SolarizeAdd"](image, 220)) == np.where(before < 128, (before + 220).clip(0, 255), before)
    ).all()
    assert (pixels(OPERATIONS["Solarize"](image, 90)) == np.where(before < 90, before, 255 - before)).all()
    assert (pixels(OPERATIONS["Invert"](image, 0)) == 255 - before).all()
    for change in (-0.9, 0.5, 2.7):
        brighter = (before * (1 + change)).clip(0, 255)
        assert np.abs(pixels(OPERATIONS["Brightness"](image, change)) - brighter).max() <= 1
        grey = pixels(image.convert("L"))
        contrasted = (round(grey.mean()) + (1 + change) * (before - round(grey.mean()))).clip(0, 255)
        assert np.abs(pixels(OPERATIONS["Contrast"](image, change)) - contrasted).max() <= 1
        coloured = (grey[..., None] + (1 + change) * (before - grey[..., None])).clip(0, 255)
        assert np.abs(pixels(OPERATIONS["Color"](image, change)) - coloured).max() <= 1
    moved = pixels(OPERATIONS["TranslateX"](image, 3))
    assert (moved[:, :-3] == before[:, 3:]).all()
    assert (moved[:, -3:] == 128).all()


@pytest.mark.parametrize(
    "scales", [TORCHVISION_RANDAUGMENT, TORCHVISION_TRIVIALAUGMENT, TIMM_RANDAUGMENT, BIG_VISION_RANDAUGMENT]
)
def test_a_grey_image_is_changed_as_its_three_equal_channels(scales):
    grey = noise("L")
    for name, scale in scales.items():
        generators = [Fixed([0.9], [7, 5]), Fixed([0.9], [7, 5])]
        one = _operate(grey, name, scale, 0.4, generators[0])
        three = _operate(grey.convert("RGB"), name, scale, 0.4, generators[1])
        assert one.mode == "L"
        assert (pixels(three) == pixels(one)[..., None]).all(), name


def test_cutout_is_a_square_that_the_border_cuts():
    cut = pixels(_operate(noise(), "Cutout", BIG_VISION_RANDAUGMENT["Cutout"], 0.1, Fixed([], [18, 6])))
    expected = pixels(noise())
    expected[2:10, 14:20] = 128  # 4 pixels to each side of column 18 and row 6
    assert (cut == expected).all()


# ---------------------------------------------------------------------------------------------------------------------
# Policies


POLICIES = {name: auto_augment(name) for name in ("ra", "ta_wide", "3a", "rand-m9-mstd0.5-inc1", "randaug(2,15)")} | {
    "jitter": ColorJitter(0.4),
    "erasing": RandomErasing(0.5),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_policy_depends_on_its_generator_alone(name, mode):
    policy, image = POLICIES[name], noise(mode)
    before = image.tobytes()
    random.seed(1)
    first = [policy(image, np.random.default_rng((5, i))).tobytes() for i in range(40)]
    random.seed(2)
    again = [pickle.loads(pickle.dumps(policy))(image, np.random.default_rng((5, i))).tobytes() for i in range(40)]
    assert first == again
    assert image.tobytes() == before  # never in place
    assert len(set(first)) > (1 if mode == "L" and name == "3a" else 8)
    result = policy(image, np.random.default_rng(0))
    assert (result.mode, result.size) == (image.mode, image.size)


def test_names_are_those_of_their_homes():
    ours = auto_augment("rand-m7-n3-p0.25-mstd0.5-inc1")
    assert (ours.dialect, ours.magnitude, ours.num_operations) == ("timm", 7, 3)
    assert (ours.probability, ours.magnitude_std) == (0.25, 0.5)
    assert auto_augment("rand-m9-inc1").probability == 0.5  # timm's default
    assert auto_augment("rand-m9-inc1").num_operations == 2
    ours = auto_augment("randaug(2,20)")
    assert (ours.dialect, ours.num_operations, ours.magnitude, ours.probability) == ("big_vision", 2, 20, 1)
    ours = auto_augment("ra")  # torchvision.transforms.RandAugment()
    assert (ours.dialect, ours.num_operations, ours.magnitude, ours.probability) == ("torchvision", 2, 9, 1)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("autoaugment", "Choose ra, ta_wide"),
        ("rand-m9", "inc1"),
        ("rand-x9-inc1", "'x9'"),
        ("rand-m11-inc1", "between 0 and 10"),
        ("randaug(0,10)", "at least 1 operation"),
        ("rand-m9-p2-inc1", "probability"),
    ],
)
def test_refused(name, part):
    with pytest.raises(ValueError, match=part.replace("(", r"\(")):
        auto_augment(name)


@pytest.mark.parametrize(
    "make", [lambda: ColorJitter(0), lambda: RandomErasing(1.5), lambda: RandAugment("timm", 2, -1)]
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()


def test_operations_are_drawn_evenly_and_as_often_as_asked(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "modeling_vit_scratch.augmentation.photo._operate",
        lambda image, name, scale, fraction, generator: (seen.append((name, fraction)), image)[1],
    )
    generator, image, times = np.random.default_rng(0), noise(), 3000
    for _ in range(times):
        auto_augment("ra")(image, generator)
    counts = [[name for name, _ in seen].count(name) for name in TORCHVISION_RANDAUGMENT]
    assert len(seen) == 2 * times
    assert {fraction for _, fraction in seen} == {9 / 30}
    assert min(counts) > 0.8 * 2 * times / 14
    assert max(counts) < 1.2 * 2 * times / 14

    seen.clear()
    for _ in range(times):
        auto_augment("rand-m9-mstd0.5-inc1")(image, generator)
    fractions = np.array([fraction for _, fraction in seen])
    assert abs(len(seen) / (2 * times) - 0.5) < 0.03
    assert fractions.max() == 1.0  # the noise stops at timm's greatest magnitude
    assert abs(np.median(fractions) - 0.9) < 0.01

    seen.clear()
    for _ in range(times):
        TrivialAugmentWide()(image, generator)
    assert len(seen) == times
    assert {round(30 * fraction, 6) for _, fraction in seen} == set(range(31))


def test_three_augment_is_grey_or_solarised_or_blurred():
    image = noise()
    expected = {0: image.convert("L").convert("RGB"), 1: ImageOps.solarize(image)}
    expected[2] = image.filter(ImageFilter.GaussianBlur(0.1 + 0.5 * 1.9))
    for choice, result in expected.items():
        ours = ThreeAugment()(image, Fixed(integers=[choice], uniforms=[0.5]))
        assert ours.tobytes() == result.tobytes()


def test_colour_jitter_changes_each_factor_within_its_strength_in_any_order(monkeypatch):
    seen = []
    for name in ("Brightness", "Contrast", "Color"):
        monkeypatch.setitem(OPERATIONS, name, lambda image, change, name=name: (seen.append((name, change)), image)[1])
    generator = np.random.default_rng(0)
    for _ in range(600):
        ColorJitter(0.3)(noise(), generator)
    orders = {tuple(name for name, _ in seen[i : i + 3]) for i in range(0, len(seen), 3)}
    assert len(orders) == 6
    for name in ("Brightness", "Contrast", "Color"):
        changes = [change for other, change in seen if other == name]
        assert len(changes) == 600
        assert -0.3 <= min(changes) < -0.28
        assert 0.28 < max(changes) <= 0.3


def test_random_erasing_erases_one_rectangle_of_the_promised_size_in_the_promised_share():
    image, erasing, generator = Image.new("RGB", (48, 32), (7, 7, 7)), RandomErasing(0.25), np.random.default_rng(0)
    shares, shapes = [], []
    for _ in range(1500):
        erased = pixels(erasing(image, generator))[..., 0]
        rows, columns = np.nonzero(erased == 128)
        if len(rows) == 0:
            assert (erased == 7).all()
            continue
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert height * width == len(rows)  # one rectangle, and full
        shares.append(len(rows) / (48 * 32))
        shapes.append(height / width)
    assert abs(len(shares) / 1500 - 0.25) < 0.04
    assert 0.01 < min(shares) < 0.04
    assert 0.29 < max(shares) < 0.36
    assert min(shapes) < 0.5
    assert max(shapes) > 2


def test_a_chain_is_its_steps_in_order_with_one_generator():
    steps = [PhotoAugmentation((9, 12), Image.Resampling.BILINEAR), ThreeAugment(), RandomErasing(1.0)]
    chain, one, two = Chain(*steps), np.random.default_rng(3), np.random.default_rng(3)
    expected = noise()
    for step in steps:
        expected = step(expected, two)
    assert chain(noise(), one).tobytes() == expected.tobytes()
    assert one.random() == two.random()
    for step in steps:
        assert step.description in chain.description
