# SPDX-License-Identifier: Apache-2.0
"""Augmentation of whole batches beside PIL's of one image after the other, and runs with all images on the device."""

import numpy as np
import pytest
import torch
from golden_policies import picture
from PIL import Image
from tiny_images import build, build_pretrainer, difference, flags, weights

from modeling_vit_scratch.augmentation import on_device
from modeling_vit_scratch.augmentation import photo as policies
from modeling_vit_scratch.augmentation.on_device import (
    OPERATIONS,
    BatchChain,
    BatchColorJitter,
    BatchErasing,
    BatchPhoto,
    BatchRandAugment,
    operate,
)
from modeling_vit_scratch.augmentation.photo import Chain, ColorJitter, PhotoAugmentation, RandomErasing, auto_augment
from modeling_vit_scratch.common.errors import InputError
from visualizing.commands import augmentation_grid


SIZE = (40, 48)
# The least and the greatest strength; -0.95 and 0.95 for the others.
STRENGTHS = {
    "ShearX": (-0.3, 0.3),
    "ShearY": (-0.3, 0.3),
    "TranslateX": (-20, 20),
    "TranslateY": (-20, 20),
    "Rotate": (-135, 135),
    "Posterize": (0, 8),
    "Solarize": (0, 256),
    "SolarizeAdd": (0, 110),
}
RESAMPLING = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
RANDOM = np.random.default_rng(0)


def pictures(mode: str) -> list[Image.Image]:
    """Parts of a picture, noise, one level alone, two levels, and one pixel more than nothing."""
    whole = picture().convert(mode)
    parts = [whole.crop((4 * n, 3 * n, 4 * n + 100, 3 * n + 90)).resize(SIZE[::-1], 2) for n in range(6)]
    noise = RANDOM.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    two = np.where(noise[..., :1] > 99, np.uint8(250), np.uint8(3)).repeat(3, 2)
    flat = Image.new("RGB", SIZE[::-1], (7, 7, 200))
    one = flat.copy()
    one.putpixel((3, 5), (255, 0, 0))
    return (
        parts
        + [Image.fromarray(noise).convert(mode), Image.fromarray(two).convert(mode)]
        + [image.convert(mode) for image in (flat, one)]
    )


def as_batch(images: list[Image.Image]) -> torch.Tensor:
    arrays = [np.asarray(image).reshape(*SIZE, -1) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", policies.OPERATIONS)
def test_each_operation_is_pillows(name, mode):
    images = pictures(mode)
    strengths = np.linspace(*STRENGTHS.get(name, (-0.95, 0.95)), len(images))
    strengths = np.float32(np.round(strengths) if name in ("Posterize", "SolarizeAdd") else strengths)
    got = OPERATIONS[name](as_batch(images), torch.from_numpy(strengths))
    expected = as_batch([policies.OPERATIONS[name](image, float(one)) for image, one in zip(images, strengths)])
    assert got.dtype == torch.uint8
    levels = (got.int() - expected.int()).abs()
    if name not in RESAMPLING:
        assert levels.max() == 0
    else:  # float32 beside float64, cut off: what lies at a whole number may fall to either side
        assert (levels.amax((1, 2, 3)) <= 1).sum() >= len(images) - 1  # one point may lie on the edge of an image
        assert (levels > 0).float().mean() < 0.02


def test_every_operation_has_a_twin():
    assert list(OPERATIONS) == list(policies.OPERATIONS)


def test_each_image_gets_its_own_operation():
    names, images = tuple(policies.OPERATIONS), pictures("RGB")[:1] * 40
    chosen, strengths = RANDOM.integers(0, len(names), 40), RANDOM.uniform(0.1, 0.9, 40)
    got = operate(as_batch(images), names, chosen, strengths)
    for place, (number, strength) in enumerate(zip(chosen, strengths)):
        value = torch.tensor([strength], dtype=torch.float32)
        assert torch.equal(got[place], OPERATIONS[names[number]](as_batch(images[:1]), value)[0])


def test_a_part_is_cut_out_and_enlarged_as_pillow_does_it():
    photo, images = BatchPhoto(PhotoAugmentation(SIZE, 2, 0.35)), pictures("RGB")
    draws = RANDOM.random((len(images), photo.num_draws), dtype=np.float32)
    expected = []
    for image, (left, top, right, bottom), row in zip(images, photo.boxes(SIZE, draws), draws):
        part = image.crop((left, top, right, bottom)).resize(SIZE[::-1], Image.Resampling.BILINEAR)
        expected.append(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if row[-1] < 0.5 else part)
    levels = (photo(as_batch(images), draws).int() - as_batch(expected).int()).abs()
    assert levels.max() <= 1
    assert (levels > 0).float().mean() < 0.03
    whole = BatchPhoto(PhotoAugmentation(SIZE, 2, 1.0))
    draws[:, :-1] = 0.5  # the shape of the image
    draws[:, -1] = 0.9  # not mirrored
    assert torch.equal(whole(as_batch(images), draws), as_batch(images))


@pytest.mark.parametrize("smallest_area", [0.08, 0.35])
def test_parts_are_as_those_of_one_image_after_the_other(smallest_area):
    """Two ways to draw, one distribution: the mean of each edge, within four standard errors."""
    count, generator = 4000, np.random.default_rng(1)
    single = PhotoAugmentation(SIZE, Image.Resampling.BILINEAR, smallest_area)
    theirs = np.array([single._random_box(SIZE[1], SIZE[0], generator) for _ in range(count)], dtype=float)
    batch = BatchPhoto(single)
    ours = batch.boxes(SIZE, generator.random((count, batch.num_draws), dtype=np.float32)).astype(float)
    assert ((ours[:, :2] >= 0) & (ours[:, 2:] <= SIZE[::-1]) & (ours[:, :2] < ours[:, 2:])).all()
    error = np.sqrt(ours.var(0) / count + theirs.var(0) / count)
    assert (abs(ours.mean(0) - theirs.mean(0)) < 4 * error).all()
    areas = (ours[:, 2] - ours[:, 0]) * (ours[:, 3] - ours[:, 1])
    assert areas.min() > 0.93 * smallest_area * SIZE[0] * SIZE[1]  # rounded to whole pixels


@pytest.mark.parametrize("name", ["ra", "ta_wide", "rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.25-inc1"])
def test_policies_choose_as_often_and_as_strongly_as_one_by_one(name, monkeypatch):
    """What each operation gets to do, over many images: as with the policy on one image."""
    policy, calls = auto_augment(name), []
    for operation in policies.OPERATIONS:
        monkeypatch.setitem(
            policies.OPERATIONS, operation, lambda image, strength, of=operation: calls.append((of, strength)) or image
        )
    generator, image = np.random.default_rng(2), Image.new("RGB", SIZE[::-1])
    for _ in range(3000):
        policy(image, generator)
    batch = BatchRandAugment(policy)
    draws, ours = generator.random((3000, batch.num_draws), dtype=np.float32), []
    for first in range(0, batch.num_draws, 4):
        chosen, strengths = batch.choose(SIZE, draws[:, first : first + 4])
        ours += [(batch.names[number - 1], strength) for number, strength in zip(chosen, strengths) if number]
    assert abs(len(ours) - len(calls)) < 4 * np.sqrt(len(calls) + 1) * (len(calls) < 3000 * batch.num_draws / 4) + 1
    for operation in batch.names:
        mine, theirs = ([strength for of, strength in pairs if of == operation] for pairs in (ours, calls))
        assert abs(len(mine) - len(theirs)) < 5 * np.sqrt(len(theirs))
        spread = np.std(theirs) / np.sqrt(len(theirs)) + np.std(mine) / np.sqrt(len(mine))
        assert abs(np.mean(mine) - np.mean(theirs)) <= 4 * spread + 1e-9
        assert abs(np.std(mine) - np.std(theirs)) <= 4 * spread + 1e-9
        assert np.min(mine) >= np.min(theirs) - 0.3 * np.std(theirs)


def test_jitter_changes_all_three_in_any_order():
    jitter, images = BatchColorJitter(ColorJitter(0.4)), pictures("RGB")
    draws = RANDOM.random((len(images), 6), dtype=np.float32)
    expected = []
    for image, row in zip(images, draws):
        for step, number in enumerate(row[:3].argsort()):
            strength = float(np.float32(0.4 * (2 * row[3 + step] - 1)))
            image = policies.OPERATIONS[("Brightness", "Contrast", "Color")[number]](image, strength)
        expected.append(image)
    assert torch.equal(jitter(as_batch(images), draws), as_batch(expected))


def test_erased_rectangles():
    erasing, images = BatchErasing(RandomErasing(0.25)), as_batch(pictures("RGB")[6:7] * 2000)
    draws = RANDOM.random((2000, erasing.num_draws), dtype=np.float32)
    boxes, changed = erasing.boxes(SIZE, draws), erasing(images, draws)
    is_changed = (changed != images).any(1)  # (B, H, W)
    assert abs(is_changed.any((1, 2)).float().mean().item() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 2000)
    for place in np.flatnonzero(boxes[:, 2])[:50]:
        left, top, right, bottom = boxes[place].astype(int)
        assert (changed[place, :, top:bottom, left:right] == 128).all()
        outside = is_changed[place].clone()
        outside[top:bottom, left:right] = False
        assert not outside.any()
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (SIZE[0] * SIZE[1])
    areas = areas[areas > 0]
    assert 0.015 < areas.min() < areas.max() < 0.35
    assert abs(areas.mean() - (0.02 + 1 / 3) / 2) < 0.02


# ---------------------------------------------------------------------------------------------------------------------
# Runs

KEPT = ["--images_on_device", "True", "--auto_augment", "rand-m9-mstd0.5-inc1", "--random_erasing", "0.25"]


def test_batches_hold_what_single_images_do_and_do_not_depend_on_each_other(pets, tmp_path):
    trainer = build(tmp_path, *flags(pets, *KEPT, "--color_jitter", "0.3"))
    train_set = trainer.train_dataset
    train_set.set_epoch(3)
    batch = train_set.__getitems__([4, 1, 5])
    assert batch["pixel_values"].shape == (3, *train_set[0]["pixel_values"].shape)
    assert batch["keys"].tolist() == [[trainer.args.seed, 3, index] for index in (4, 1, 5)]
    for place, index in enumerate((4, 1, 5)):
        alone = train_set[index]
        assert torch.equal(alone["pixel_values"], batch["pixel_values"][place])
        assert alone["labels"] == batch["labels"][place] == train_set.examples.label(index)
    train_set.set_epoch(4)
    assert not torch.equal(train_set[4]["pixel_values"], batch["pixel_values"][0])
    assert "RandAugment as in timm" in trainer.describe_augmentation()
    assert augmentation_grid(trainer).shape[1] == 7


def test_held_out_images_are_bit_for_bit_those_of_the_usual_way(pets, tmp_path):
    kept, usual = (build(tmp_path, *flags(pets, *more)).eval_dataset for more in (KEPT, ()))
    assert len(kept) == len(usual) > 0
    for index in range(len(kept)):
        assert torch.equal(kept[index]["pixel_values"], usual[index]["pixel_values"])
        assert kept[index]["labels"] == usual[index]["labels"]


@pytest.mark.parametrize("more", [["--mixup", "0.2"], ["--objective", "mae"]], ids=["labels", "mae"])
def test_resuming_within_an_epoch_is_exact(pets, tmp_path, more):
    more = [*KEPT, *more, "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "2"]
    more += ["--per_device_train_batch_size", "6", "--save_total_limit", "9"]
    make = build_pretrainer if "mae" in more else build
    straight = make(tmp_path / "a", *flags(pets, *more))
    straight.train()
    resumed = make(tmp_path / "b", *flags(pets, *more))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert difference(weights(resumed), weights(straight)) == 0.0
    assert straight.args.dataloader_num_workers == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--auto_augment", "3a"], "not made for whole batches"),
        (["--auto_augment", "randaug(2,10)"], "Cutout"),
        (["--aug_repeats", "3"], "--aug_repeats does not go with --images_on_device"),
        (["--max_broken_images", "3"], "--max_broken_images does not go with --images_on_device"),
    ],
)
def test_what_it_is_not_for(pets, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        build(tmp_path, *flags(pets, "--images_on_device", "True", *more))


def test_images_that_do_not_fit_are_told_of_before_they_are_decoded(pets, tmp_path, monkeypatch):
    monkeypatch.setattr(on_device, "_free_memory", lambda device: 20_000)
    with pytest.raises(
        InputError, match=r"24 images of 3 x 16 x 24 values take 4.84e-05 GB, those to train on twice, and cpu"
    ):
        build(tmp_path, *flags(pets, *KEPT))


def test_the_chain_is_in_the_usual_order():
    steps = PhotoAugmentation(SIZE, 2, 0.5), auto_augment("ta_wide"), ColorJitter(0.3), RandomErasing(0.1)
    told = BatchChain(Chain(*steps)).description.split("; ")
    assert [text.split()[0] for text in told] == ["a", "TrivialAugment", "brightness,", "a"]
