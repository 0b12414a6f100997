# SPDX-License-Identifier: Apache-2.0
"""Repeated augmentation beside the arithmetic of DeiT's sampler, and in runs."""

import math
import multiprocessing
from collections import Counter

import pytest
import torch
from tiny_images import build, difference, flags, weights

from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.data.collation import BalancedSampling, RepeatedAugmentation


def published(order, repeats, replicas, rank, selected):
    """
    DeiT's RASampler from its definition: a list of every image `repeats` times in a row, filled up from its start until
    it can be dealt to all replicas, of which this one takes every so manieth, and of these the first `selected`.
    """
    row = [image for image in order for _ in range(repeats)]
    total = math.ceil(len(order) * repeats / replicas) * replicas
    row += row[: total - len(row)]
    return row[rank:total:replicas][:selected]


@pytest.mark.parametrize(("count", "repeats", "replicas"), [(512, 3, 2), (23, 3, 4), (23, 2, 1), (7, 4, 3), (2, 2, 5)])
def test_each_process_sees_what_the_published_sampler_gives_it(count, repeats, replicas):
    selected = math.ceil(count / replicas)
    for epoch in (0, 3):
        samplers = [RepeatedAugmentation(count, repeats, 5, rank, replicas) for rank in range(replicas)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(5 + epoch)).tolist()
        for rank, sampler in enumerate(samplers):
            numbers = list(sampler)
            assert len(sampler) == len(numbers) == selected
            assert [number % count for number in numbers] == published(order, repeats, replicas, rank, selected)
        # No number twice: each repetition of an image has random numbers of its own.
        together = [number for sampler in samplers for number in sampler]
        assert len(set(together)) == min(len(together), count * repeats)


def test_an_epoch_is_as_long_as_the_published_one_but_for_its_rounding():
    assert len(RepeatedAugmentation(1_281_167, 3, world_size=8)) == 160_146
    assert math.floor(1_281_167 // 256 * 256 / 8) == 160_128  # DeiT's


def test_repetitions_are_of_one_image_with_one_label_and_different_pixels(pets, tmp_path):
    trainer = build(tmp_path, *flags(pets, "--aug_repeats", "3"))
    train_set, count = trainer.train_dataset, len(trainer.train_dataset)
    first, second, third = train_set.__getitems__([4, 4 + count, 4 + 2 * count])
    assert first["labels"] == second["labels"] == third["labels"]
    assert [one["key"][2] for one in (first, second, third)] == [4, 4 + count, 4 + 2 * count]
    assert train_set.name(4) == train_set.name(4 + 2 * count)
    assert train_set.name(4) != train_set.name(5)
    pixels = [one["pixel_values"] for one in (first, second, third)]
    assert not torch.equal(pixels[0], pixels[1])
    assert not torch.equal(pixels[1], pixels[2])
    assert torch.equal(pixels[0], build(tmp_path, *flags(pets)).train_dataset[4]["pixel_values"])
    assert "each image 3 times in a row" in trainer.describe_augmentation()
    assert len(trainer.get_train_dataloader()) == len(build(tmp_path, *flags(pets)).get_train_dataloader())


def test_resuming_within_an_epoch_is_exact_for_any_number_of_workers(pets, tmp_path):
    more = ["--aug_repeats", "3", "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "2"]
    more += ["--per_device_train_batch_size", "6", "--mixup", "0.2", "--save_total_limit", "9"]  # 3 steps in an epoch
    ends = {}
    for workers in ("0", "2"):
        straight = build(tmp_path / workers, *flags(pets, *more, "--dataloader_num_workers", workers))
        straight.train()
        assert multiprocessing.active_children() == []  # those that read images have ended with the run
        ends[workers] = weights(straight)
    resumed = build(tmp_path / "resumed", *flags(pets, *more, "--dataloader_num_workers", "2"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "0" / "checkpoint-4"))
    assert difference(ends["2"], ends["0"]) == 0.0
    assert difference(weights(resumed), ends["0"]) == 0.0
    other = build(tmp_path / "once", *flags(pets, *more[2:]))
    other.train()
    assert difference(weights(other), ends["0"]) > 1e-4


@pytest.mark.parametrize("labels", [[0] * 90 + [2] * 7 + [5] * 3, [1, 0, 0, 0, 0], [0, 1, 2]])
def test_balanced_classes_come_equally_often_and_images_of_a_class_too(labels):
    count, classes, seen = len(labels), set(labels), []
    for epoch in (0, 3):
        sampler = BalancedSampling(labels, 5)
        sampler.set_epoch(epoch)
        numbers = list(sampler)
        seen.append(numbers)
        assert len(numbers) == len(set(numbers)) == count  # each repetition has random numbers of its own
        of_classes = Counter(labels[number % count] for number in numbers)
        assert set(of_classes) == classes
        assert max(of_classes.values()) - min(of_classes.values()) <= 1
        for label in classes:
            times = Counter(number % count for number in numbers if labels[number % count] == label)
            of_images = [times[index] for index in range(count) if labels[index] == label]
            assert max(of_images) - min(of_images) <= 1
        parts = [BalancedSampling(labels, 5, rank, 2) for rank in range(2)]
        for part in parts:
            part.set_epoch(epoch)
        dealt = [number for pair in zip(*parts) for number in pair]  # two processes have the batches of one
        assert dealt[:count] == numbers
    assert seen[0] != seen[1]


def test_a_balanced_run_resumes_exactly_and_says_so(pets, tmp_path):
    more = ["--balanced_sampling", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    straight = build(tmp_path / "straight", *flags(pets, *more))
    assert "every class equally often" in straight.describe_augmentation()
    straight.train()
    resumed = build(tmp_path / "resumed", *flags(pets, *more))
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert difference(weights(resumed), weights(straight)) == 0.0
    assert isinstance(straight.get_train_dataloader().batch_sampler.sampler, BalancedSampling)
    frozen = build(tmp_path / "frozen", *flags(pets, *more, "--freeze", "encoder"))
    frozen.train()
    assert frozen.state.global_step == 4


def test_refused(pets, tmp_path):
    with pytest.raises(InputError, match="--balanced_sampling and --aug_repeats each say how often"):
        build(tmp_path, *flags(pets, "--balanced_sampling", "--aug_repeats", "3"))
    with pytest.raises(InputError, match="--aug_repeats 0 must be at least 1"):
        build(tmp_path, *flags(pets, "--aug_repeats", "0"))
