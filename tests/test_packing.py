# SPDX-License-Identifier: Apache-2.0
"""Packed images: logits, losses and gradients of each image alone, whatever the sizes and the architecture."""

import pytest
import torch

from benchmarks.packed import classify_packed
from benchmarks.packing import difference, mixed_images, packing_ways
from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification


SIZES = [(16, 24), (8, 8), (40, 12), (16, 24), (4, 4), (8, 8), (24, 24)]


def build(**changes) -> ViTScratchForImageClassification:
    config = ViTScratchConfig.from_variant("test/4", num_labels=3, **{"zero_init_head": False, **changes})
    model = ViTScratchForImageClassification(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # biases too
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator) for size in SIZES]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pooling": "mean", "num_register_tokens": 2},
        {"position_embedding": "sincos_2d", "qk_norm": True},
        {"position_embedding": "none", "layer_scale_init_value": 0.1},
        {"position_embedding_placement": "every_layer", "temperature": 1.5},
        {"position_embedding_placement": "every_layer_shared", "position_embedding": "learned_2d"},
        {"use_distillation_token": True, "use_distillation_head": True, "representation_size": 24},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_logits_are_those_of_each_image_alone(images, changes):
    model = build(**changes)
    with torch.no_grad():
        alone = torch.cat([model(image[None]).logits for image in images])
        packed = classify_packed(model, images).logits
    assert alone.std() > 0.01
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    assert model.config._attn_implementation == "sdpa"  # as before


def test_an_image_does_not_see_its_neighbours(images):
    model = build()
    with torch.no_grad():
        before = classify_packed(model, images).logits
        images[1] = images[1] + 100.0
        after = classify_packed(model, images).logits
    assert not torch.equal(before[1], after[1])
    others = [index for index in range(len(images)) if index != 1]
    torch.testing.assert_close(after[others], before[others], atol=1e-6, rtol=0)


def test_gradients_are_those_of_the_mean_loss(images):
    model, labels = build(), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    loss = sum(model(image[None], labels=labels[i : i + 1]).loss for i, image in enumerate(images)) / len(images)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    packed = classify_packed(model, images, labels).loss
    torch.testing.assert_close(packed, loss)
    for got, wanted in zip(torch.autograd.grad(packed, list(model.parameters())), expected):
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-4)


def test_what_can_not_be_packed_is_told(images):
    with pytest.raises(ValueError, match="relative_1d"):
        classify_packed(build(position_embedding="relative_1d"), images)
    with pytest.raises(ValueError, match=r"drop_path_rate=0\.1"):
        classify_packed(build(drop_path_rate=0.1).train(), images)
    with pytest.raises(ValueError, match="no image"):
        classify_packed(build(), [])
    with pytest.raises(ValueError, match="don't divide the image height 10"):
        classify_packed(build(), [torch.zeros(3, 10, 8)])


def test_all_ways_of_the_benchmark_give_the_same_logits():
    model = build(image_size=32)
    images = mixed_images(model.config, 5)
    assert len({tuple(image.shape) for image in images}) > 2
    ways = packing_ways(model, images)
    assert next(iter(ways.values()))().shape == (5, 3)
    assert difference(ways) < 1e-5
