# SPDX-License-Identifier: Apache-2.0
"""Mixup and CutMix against torchvision's results and pixel by pixel, and what their random numbers depend on."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_policies import FILE, mixing_inputs
from torch.utils.data import DataLoader

from modeling_vit_scratch.data.collation import ImageCollator, MixingCollator, RepeatedAugmentation, cutmix, mix, mixup


GOLDEN = json.loads(FILE.read_text())["mixing"]


def examples(count=6, epoch=0, seed=3, size=(8, 10)):
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, *size, generator=generator), "labels": i % 4, "key": (seed, epoch, 10 + i)}
        for i in range(count)
    ]


def apply(mixing, pixels, targets):
    """What the device makes of the pixels, and the collator of the labels."""
    count = len(pixels)
    return mix(pixels, torch.full((count,), mixing.weight), torch.tensor([mixing.box] * count)), mixing.mix_labels(
        targets
    )


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['name']} {case['weight']}")
def test_equal_to_torchvision(case):
    pixels, classes = map(torch.from_numpy, mixing_inputs())
    targets = F.one_hot(classes, 3).float()
    if case["name"] == "mixup":
        mixing = mixup(pixels.shape[-2:], case["weight"])
    else:
        mixing = cutmix(pixels.shape[-2:], case["weight"], case["column"], case["row"])
    mixed, labels = apply(mixing, pixels, targets)
    assert torch.allclose(mixed.flatten(), torch.tensor(case["pixels"]), atol=2e-6)
    assert torch.allclose(labels, torch.tensor(case["labels"]), atol=1e-6)


def brute_force(batch, classes, num_labels, weight, box=None):
    """Pixel by pixel. Images (B, C, H, W) and classes as numpy."""
    mixed, labels = np.zeros_like(batch), np.zeros((len(batch), num_labels))
    height, width = batch.shape[-2:]
    for i in range(len(batch)):
        j, from_i = (i - 1) % len(batch), 0
        for y in range(height):
            for x in range(width):
                if box is None:
                    mixed[i, :, y, x] = weight * batch[i, :, y, x] + (1 - weight) * batch[j, :, y, x]
                    continue
                inside = box[0] <= x < box[2] and box[1] <= y < box[3]
                mixed[i, :, y, x] = batch[j, :, y, x] if inside else batch[i, :, y, x]
                from_i += not inside
        share = weight if box is None else from_i / (height * width)
        labels[i, classes[i]] += share
        labels[i, classes[j]] += 1 - share
    return mixed, labels


@pytest.mark.parametrize("weight", [0.0, 0.13, 0.5, 0.91, 1.0])
def test_equal_to_brute_force(weight):
    pixels, classes = mixing_inputs()
    batch, targets = torch.from_numpy(pixels), F.one_hot(torch.from_numpy(classes), 4).float()
    before = batch.clone()
    mixed, labels = apply(mixup(batch.shape[-2:], weight), batch, targets)
    expected = brute_force(pixels, classes, 4, weight)
    assert np.allclose(mixed, expected[0], atol=1e-6)
    assert np.allclose(labels, expected[1], atol=1e-6)
    for column, row in ((0, 0), (5, 3), (9, 6)):
        height, width = 7, 10
        half_width, half_height = int(0.5 * np.sqrt(1 - weight) * width), int(0.5 * np.sqrt(1 - weight) * height)
        box = (column - half_width, row - half_height, column + half_width, row + half_height)
        mixed, labels = apply(cutmix(batch.shape[-2:], weight, column, row), batch, targets)
        expected = brute_force(pixels, classes, 4, weight, box)
        assert np.allclose(mixed, expected[0])
        assert np.allclose(labels, expected[1], atol=1e-6)
    assert torch.equal(batch, before)


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_of_labels_are_probabilities_for_any_batch(alphas, smoothing):
    collate = MixingCollator(4, *alphas, label_smoothing=smoothing)
    for count in (1, 2, 5, 6):
        for epoch in range(20):
            batch = collate(examples(count, epoch))
            assert batch["labels"].shape == (count, 4)
            assert batch["labels"].dtype == torch.float32
            assert torch.allclose(batch["labels"].sum(1), torch.ones(count), atol=1e-6)
            assert batch["labels"].min() >= smoothing / 4 - 1e-7
            assert list(batch) == ["pixel_values", "labels", "keys", "mixing_weights", "mixing_boxes"]
            assert torch.equal(batch["pixel_values"], torch.stack([e["pixel_values"] for e in examples(count)]))
            assert batch["keys"].tolist() == [list(example["key"]) for example in examples(count, epoch)]
            assert {batch[name].shape[0] for name in batch} == {count}
    one = collate(examples(1))
    mixed = mix(one["pixel_values"], one["mixing_weights"], one["mixing_boxes"])
    assert torch.allclose(mixed, one["pixel_values"], atol=1e-6)  # with itself


def test_smoothing_is_that_of_cross_entropy():
    # Mixing smoothed labels is smoothing mixed ones: what torch does with label_smoothing.
    logits = torch.randn(6, 4)
    smooth = MixingCollator(4, 0.8, label_smoothing=0.1)(examples())["labels"]
    plain = MixingCollator(4, 0.8)(examples())["labels"]
    expected = F.cross_entropy(logits, plain, label_smoothing=0.1)
    assert F.cross_entropy(logits, smooth).item() == pytest.approx(expected.item(), abs=1e-6)


def test_random_numbers_depend_on_seed_epoch_and_images_and_nothing_else():
    collate, batches = MixingCollator(4, 0.8, 1.0), []
    for given in (examples(), examples(epoch=1), examples(seed=4), list(reversed(examples()))):
        torch.manual_seed(0)
        one = collate(given)
        torch.manual_seed(1)
        again = collate(given)
        assert all(torch.equal(again[name], one[name]) for name in one)
        batches.append(tuple(one["labels"].flatten().tolist()))
    assert len(set(batches)) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_processes_change_nothing(workers):
    loader = DataLoader(examples(12), batch_size=4, collate_fn=MixingCollator(4, 0.8, 1.0), num_workers=workers)
    expected = [MixingCollator(4, 0.8, 1.0)(examples(12)[i : i + 4]) for i in (0, 4, 8)]
    for ours, theirs in zip(loader, expected):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_weights_follow_the_beta_distribution_and_both_kinds_are_as_likely():
    from scipy import stats

    generator = np.random.default_rng(0)
    weights = [MixingCollator(2, 0.8).draw((4, 4), generator).weight for _ in range(2000)]
    assert stats.kstest(weights, stats.beta(0.8, 0.8).cdf).pvalue > 0.01
    # A pixel is either's with CutMix, and between them with Mixup.
    pair, targets = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 1, 4, 4), torch.eye(2)
    both = MixingCollator(2, 0.8, 1.0)
    mixed = [apply(both.draw((4, 4), generator), pair, targets)[0] for _ in range(1000)]
    is_cut = [bool(((batch == 0) | (batch == 1)).all()) for batch in mixed]
    assert 0.44 < np.mean(is_cut) < 0.56


def test_examples_of_the_evaluation_stay_as_they_are():
    plain = [{key: value for key, value in example.items() if key != "key"} for example in examples()]
    for collate in (MixingCollator(4, 0.8), ImageCollator()):
        batch = collate(plain)
        assert set(batch) == {"pixel_values", "labels"}
        assert batch["labels"].tolist() == [0, 1, 2, 3, 0, 1]
        assert torch.equal(batch["pixel_values"], torch.stack([example["pixel_values"] for example in plain]))


def test_a_plain_batch_knows_its_examples_and_needs_no_labels():
    batch = ImageCollator()(examples())
    assert batch["keys"].tolist() == [[3, 0, 10 + i] for i in range(6)]
    assert batch["keys"].dtype == torch.int64
    assert batch["labels"].tolist() == [0, 1, 2, 3, 0, 1]
    unlabelled = [{"pixel_values": torch.zeros(3, 2, 2, dtype=torch.uint8)}] * 2
    assert ImageCollator()(unlabelled)["pixel_values"].dtype == torch.uint8


@pytest.mark.parametrize("alphas", [(0.0, 0.0), (-1.0, 1.0)])
def test_something_must_be_mixed(alphas):
    with pytest.raises(ValueError, match="must not be negative, and one must be above 0"):
        MixingCollator(4, *alphas)


@pytest.mark.parametrize(("repeats", "processes"), [(2, 1), (3, 1), (3, 2), (4, 3)])
def test_no_image_is_mixed_with_another_version_of_itself(repeats, processes):
    count, size = 60, 12
    for rank in range(processes):
        numbers = list(RepeatedAugmentation(count, repeats, 1, rank, processes))
        for start in range(0, len(numbers) // size * size, size):
            images = torch.tensor(numbers[start : start + size]) % count
            pixels, targets = images.float()[:, None, None, None], F.one_hot(images, count).float()
            zeros, box = torch.zeros(size), torch.tensor([(0, 0, 1, 1)] * size)
            partners = mix(pixels, zeros, box, repeats).flatten()  # with a weight of 0, each is its partner
            assert not (partners == images).any()
            collator = MixingCollator(count, 1.0, repeats=repeats)
            example = {"pixel_values": torch.zeros(1, 1, 1)}
            examples = [{**example, "labels": int(i), "key": (0, 0, int(i))} for i in images]
            batch = collator(examples)
            labels, weight = batch["labels"], batch["mixing_weights"][0]
            expected = weight * targets + (1 - weight) * F.one_hot(partners.long(), count)
            assert torch.allclose(labels, expected)
