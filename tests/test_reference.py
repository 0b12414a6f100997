# SPDX-License-Identifier: Apache-2.0
"""Ours against theirs: transformers' ViT on the same weights, a float64 forward in numpy, scipy's resize."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from reference import numpy_logits, transformers_keys, transformers_twin

from modeling_vit_scratch import (
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchModel,
)
from modeling_vit_scratch.acceleration.speed_up import speed_up


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Weights far from their initialisation: at zero or one, a forgotten parameter would not show."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.eval()


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("image_size", [16, [16, 24], [24, 8]])
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("is_accelerated", [False, True])
def test_logits_states_attentions_and_gradients_equal_transformers(
    attn_implementation, image_size, hidden_act, is_accelerated
):
    config = ViTScratchConfig.from_variant("test/4", image_size=image_size, hidden_act=hidden_act, num_labels=5)
    ours = randomised(ViTScratchForImageClassification(config))
    ours.set_attn_implementation(attn_implementation)
    theirs = transformers_twin(ours)
    images, labels = torch.randn(3, 3, *config.image_hw), torch.tensor([0, 4, 2])
    asked = {"output_hidden_states": True, "output_attentions": True}

    a, b = ours(images, labels=labels, **asked), theirs(images, labels=labels, **asked)
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=1e-5)
    for name in ("hidden_states", "attentions"):
        assert len(a[name]) == len(b[name]) > 0
        for one, other in zip(a[name], b[name]):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)

    if is_accelerated:  # without the extra outputs: the last layer for the class token alone
        speed_up(ours)
    a = ours(images, labels=labels)
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-5)
    a.loss.backward()
    b.loss.backward()
    gradients = transformers_keys({name: parameter.grad for name, parameter in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-5, msg=name)


def test_masked_image_modeling_equals_transformers():
    config = ViTScratchConfig.from_variant("test/4", image_size=16)  # theirs takes squares only
    ours = randomised(ViTScratchForMaskedImageModeling(config))
    theirs = transformers_twin(ours)
    images, mask = torch.randn(2, 3, 16, 16), torch.rand(2, 16) < 0.5
    a, b = ours(images, bool_masked_pos=mask), theirs(images, bool_masked_pos=mask)
    torch.testing.assert_close(a.reconstruction, b.reconstruction, rtol=0, atol=1e-5)
    torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=1e-5)


def test_another_size_equals_transformers_interpolation():
    config = ViTScratchConfig.from_variant("test/4", image_size=16, position_embedding_interpolation="bicubic")
    ours = randomised(ViTScratchModel(config, add_pooling_layer=False))
    theirs = transformers_twin(ours)
    images = torch.randn(2, 3, 24, 40)
    a, b = ours(images), theirs(images, interpolate_pos_encoding=True)
    torch.testing.assert_close(a.last_hidden_state, b.last_hidden_state, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patch_size": [4, 8], "num_channels": 1, "qkv_bias": False},
        {"hidden_act": "gelu_pytorch_tanh", "representation_size": 10},
        {"pooling": "mean"},
        {"pooling": "mean", "use_cls_token": True, "num_register_tokens": 2},
        {"num_register_tokens": 3, "cls_token_position": False},
        {"layer_scale_init_value": 0.1, "qk_norm": True, "layer_norm_eps": 1e-2},
        {"position_embedding": "learned_2d"},
        {"position_embedding": "sincos_2d"},
        {"position_embedding": "relative_1d", "num_register_tokens": 1},
        {"position_embedding": "none"},
        {"position_embedding_placement": "every_layer", "num_hidden_layers": 3},
        {"position_embedding_placement": "every_layer_shared"},
        {"position_embedding": "learned_2d", "position_embedding_placement": "every_layer", "num_register_tokens": 2},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "default",
)
def test_every_architecture_equals_the_equations_in_float64(options):
    config = ViTScratchConfig.from_variant("test/4", num_labels=3, **options)
    model = randomised(ViTScratchForImageClassification(config))
    images = torch.randn(2, config.num_channels, *config.image_hw)
    expected = numpy_logits(model.state_dict(), config, images)
    with torch.no_grad():
        np.testing.assert_allclose(model(images).logits, expected, rtol=0, atol=1e-5)
        speed_up(model)  # the class token alone in the last layer
        np.testing.assert_allclose(model(images).logits, expected, rtol=0, atol=1e-5)
        full = model(images, output_hidden_states=True).logits  # every token in the last layer
        np.testing.assert_allclose(full, expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(model.double()(images.double()).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", [(2, 3), (4, 6), (7, 5), (9, 13)])
def test_bilinear_positions_equal_the_zoom_of_the_papers_code(config, grid):
    model = ViTScratchModel(config)
    table = model.embeddings.position_embeddings
    got = table(torch.zeros(1, 1 + grid[0] * grid[1], 32), grid=grid).detach().numpy()[0]
    stored = table.weight[0].detach().numpy()
    zoomed = scipy.ndimage.zoom(stored[1:].reshape(4, 6, 32), (grid[0] / 4, grid[1] / 6, 1), order=1)
    np.testing.assert_allclose(got[1:], zoomed.reshape(-1, 32), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(got[0], stored[0])  # the class token stays where it is
