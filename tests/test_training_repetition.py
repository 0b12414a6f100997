# SPDX-License-Identifier: Apache-2.0
"""Repeated augmentation beside the arithmetic of DeiT's sampler, and in runs."""

import math
import multiprocessing

import pytest
import torch
from tiny_images import build, difference, flags, weights

from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.data.collation import RepeatedAugmentation


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


def test_refused(pets, tmp_path):
    with pytest.raises(InputError, match="--aug_repeats 0 must be at least 1"):
        build(tmp_path, *flags(pets, "--aug_repeats", "0"))
