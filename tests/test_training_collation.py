# SPDX-License-Identifier: Apache-2.0
"""Mixup and CutMix against torchvision's results and pixel by pixel, and what their random numbers depend on."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_policies import FILE, mixing_inputs
from torch.utils.data import DataLoader

from modeling_vit_scratch.training.collation import MixingCollator, cutmix, mixup


GOLDEN = json.loads(FILE.read_text())["mixing"]


def examples(count=6, epoch=0, seed=3, size=(8, 10)):
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, *size, generator=generator), "labels": i % 4, "key": (seed, epoch, 10 + i)}
        for i in range(count)
    ]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['name']} {case['weight']}")
def test_equal_to_torchvision(case):
    pixels, classes = map(torch.from_numpy, mixing_inputs())
    targets = F.one_hot(classes, 3).float()
    if case["name"] == "mixup":
        mixed, labels = mixup(pixels, targets, case["weight"])
    else:
        mixed, labels = cutmix(pixels, targets, case["weight"], case["column"], case["row"])
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
    mixed, labels = mixup(batch, targets, weight)
    expected = brute_force(pixels, classes, 4, weight)
    assert np.allclose(mixed, expected[0], atol=1e-6)
    assert np.allclose(labels, expected[1], atol=1e-6)
    for column, row in ((0, 0), (5, 3), (9, 6)):
        height, width = 7, 10
        half_width, half_height = int(0.5 * np.sqrt(1 - weight) * width), int(0.5 * np.sqrt(1 - weight) * height)
        box = (column - half_width, row - half_height, column + half_width, row + half_height)
        mixed, labels = cutmix(batch, targets, weight, column, row)
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
            assert set(batch) == {"pixel_values", "labels"}
    one = collate(examples(1))
    assert torch.allclose(one["pixel_values"][0], examples(1)[0]["pixel_values"], atol=1e-6)  # mixed with itself


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
        one = collate(given)["labels"]
        torch.manual_seed(1)
        assert torch.equal(collate(given)["labels"], one)
        batches.append(tuple(one.flatten().tolist()))
    assert len(set(batches)) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_processes_change_nothing(workers):
    loader = DataLoader(examples(12), batch_size=4, collate_fn=MixingCollator(4, 0.8, 1.0), num_workers=workers)
    expected = [MixingCollator(4, 0.8, 1.0)(examples(12)[i : i + 4]) for i in (0, 4, 8)]
    for ours, theirs in zip(loader, expected):
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
        assert torch.equal(ours["labels"], theirs["labels"])


def test_weights_follow_the_beta_distribution_and_both_kinds_are_as_likely():
    from scipy import stats

    # Class 0 beside class 1: the label of an image tells the weight.
    pair, targets, generator = torch.zeros(2, 1, 4, 4), torch.eye(2), np.random.default_rng(0)
    weights = [MixingCollator(2, 0.8).mix(pair, targets, generator)[1][0, 0].item() for _ in range(2000)]
    assert stats.kstest(weights, stats.beta(0.8, 0.8).cdf).pvalue > 0.01
    # A pixel is either's with CutMix, and between them with Mixup.
    pair[1] = 1.0
    both = MixingCollator(2, 0.8, 1.0)
    mixed = [both.mix(pair, targets, generator)[0] for _ in range(1000)]
    is_cut = [bool(((batch == 0) | (batch == 1)).all()) for batch in mixed]
    assert 0.44 < np.mean(is_cut) < 0.56


def test_examples_of_the_evaluation_stay_as_they_are():
    plain = [{key: value for key, value in example.items() if key != "key"} for example in examples()]
    batch = MixingCollator(4, 0.8)(plain)
    assert batch["labels"].tolist() == [0, 1, 2, 3, 0, 1]
    assert torch.equal(batch["pixel_values"], torch.stack([example["pixel_values"] for example in plain]))


@pytest.mark.parametrize("alphas", [(0.0, 0.0), (-1.0, 1.0)])
def test_something_must_be_mixed(alphas):
    with pytest.raises(ValueError, match="must not be negative, and one must be above 0"):
        MixingCollator(4, *alphas)
