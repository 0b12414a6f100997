# SPDX-License-Identifier: Apache-2.0
"""The arrays of the figures against brute force in NumPy, scikit-learn, closed forms, and autograd spelled out."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity
from torch import nn

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchModel
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.visualization.arrays import (
    attention_distances,
    attention_rollout,
    grad_cam,
    head_maps,
    mean_distance,
    patch_distances,
    patch_filters,
    position_similarity,
    rollout_maps,
    watch_attention,
)


HYBRID = {"variant": "R+Ti/16", "image_size": [64, 128], "hidden_size": 32, "num_hidden_layers": 2}
HYBRID |= {"intermediate_size": 64, "num_attention_heads": 4, "stem_width_factor": 0.5}
KINDS = {
    "plain": {},
    "registers": {"num_register_tokens": 3},
    "mean": {"pooling": "mean"},
    "mean_norm_after": {"pooling": "mean", "norm_after_pooling": True, "use_cls_token": True},
    "distilled": {"use_distillation_token": True, "use_distillation_head": True, "num_register_tokens": 1},
    "patch_is_rectangle": {"patch_size": [4, 8]},
    "relative": {"position_embedding": "relative_1d", "qk_norm": True},
    "sincos_scaled": {"position_embedding": "sincos_2d", "layer_scale_init_value": 0.1, "representation_size": 16},
    "hybrid": HYBRID,
}


def network(kind: str = "plain", spread: float = 0.3, **fields) -> ViTScratchForImageClassification:
    """A tiny model whose attention is far from uniform."""
    fields = {"variant": "test/4", "num_labels": 3, **KINDS[kind], **fields}
    torch.manual_seed(0)
    model = ViTScratchForImageClassification(ViTScratchConfig.from_variant(fields.pop("variant"), **fields)).eval()
    for parameter in model.parameters():
        parameter.data += spread * torch.randn_like(parameter)
    return model


def photos(model: nn.Module, number: int = 2) -> torch.Tensor:
    shape = (number, model.config.num_channels, *model.config.image_hw)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def eager_weights(model: ViTScratchForImageClassification, pixel_values: torch.Tensor) -> list[np.ndarray]:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(pixel_values, output_attentions=True).attentions
    return [weights.double().numpy() for weights in attentions]


@pytest.mark.parametrize("kind", KINDS)
def test_maps_distances_and_rollout_equal_brute_force_on_eager_weights(kind):
    model = network(kind)
    pixel_values, config = photos(model), model.config
    model.set_attn_implementation("sdpa")
    ours_maps, ours_distances = head_maps(model, pixel_values), attention_distances(model, pixel_values)
    ours_rollout, ours_rolled = attention_rollout(model, pixel_values), rollout_maps(model, pixel_values)
    (rows, columns), prefix = config.grid_hw, config.num_prefix_tokens
    weights = eager_weights(model, pixel_values)
    assert max(layer.max() for layer in weights) > 2 / (rows * columns)
    if config.pooling == "cls":
        theirs_maps = np.stack([layer[:, :, 0, prefix:] for layer in weights], axis=1)
    else:
        theirs_maps = np.stack([layer[:, :, prefix:, prefix:].mean(axis=2) for layer in weights], axis=1)
    assert ours_maps.shape == (2, config.num_hidden_layers, config.num_attention_heads, rows, columns)
    assert np.abs(ours_maps - theirs_maps.reshape(ours_maps.shape)).max() < 1e-5

    theirs_distances = np.zeros(ours_distances.shape)
    for image, layer, head in np.ndindex(theirs_distances.shape):
        means = []
        for asking in range(rows * columns):
            total = reach = 0.0
            for seen in range(rows * columns):
                weight = weights[layer][image, head, prefix + asking, prefix + seen]
                down = (seen // columns - asking // columns) * config.patch_hw[0]
                right = (seen % columns - asking % columns) * config.patch_hw[1]
                total, reach = total + weight, reach + weight * math.sqrt(down**2 + right**2)
            means.append(reach / total)
        theirs_distances[image, layer, head] = np.mean(means)
    assert np.abs(ours_distances - theirs_distances).max() < 1e-4  # pixels

    theirs_rollout = np.stack([np.eye(weights[0].shape[-1])] * 2)
    for layer in weights:
        for image in range(2):
            mixing = layer[image].mean(axis=0) + np.eye(layer.shape[-1])
            theirs_rollout[image] = mixing / mixing.sum(axis=1, keepdims=True) @ theirs_rollout[image]
    assert np.abs(ours_rollout - theirs_rollout).max() < 1e-5
    assert np.abs(ours_rollout.sum(axis=-1) - 1).max() < 1e-12
    one = theirs_rollout[:, 0] if config.pooling == "cls" else theirs_rollout[:, prefix:].mean(axis=1)
    assert np.abs(ours_rolled - one[:, prefix:].reshape(2, rows, columns)).max() < 1e-5


def test_another_size_than_the_stored_one_and_half_precision():
    model = network("registers")
    pixel_values = torch.randn(1, 3, 24, 16, generator=torch.Generator().manual_seed(2))
    figures = (head_maps, attention_distances, rollout_maps)
    exact = [figure(model, pixel_values) for figure in figures]
    assert exact[0].shape[-2:] == exact[2].shape[-2:] == (6, 4)
    model = model.to(torch.bfloat16)
    for figure, theirs in zip(figures, exact):
        ours = figure(model, pixel_values)
        assert 0 < np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max()
    assert np.abs(attention_rollout(model, pixel_values).sum(axis=-1) - 1).max() < 1e-12
    rows = []
    watch_attention(model, pixel_values, lambda index, weights: rows.append(weights.sum(dim=-1)))
    assert torch.stack(rows).sub(1).abs().max() < 1e-6


def test_watching_leaves_no_trace_and_needs_no_dropout():
    model = network(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    model.vit.layers[0].eval()
    pixel_values = photos(model)
    seen = []
    watch_attention(model, pixel_values, lambda index, weights: seen.append((index, tuple(weights.shape))))
    assert seen == [(0, (2, 4, 25, 25)), (1, (2, 4, 25, 25))]
    assert np.array_equal(head_maps(model, pixel_values), head_maps(model, pixel_values))
    grad_cam(model, pixel_values)
    assert model.training
    assert not model.vit.layers[0].training
    assert model.vit.layers[1].training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ZeroDivisionError):
        watch_attention(model, pixel_values, lambda index, weights: 1 / 0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_uniform_attention_has_the_closed_form_distance_and_identity_none():
    # On one row of n patches of p pixels, the mean |i - j| p over all pairs is p (n^2 - 1) / (3 n).
    model = network(image_size=[4, 48], num_register_tokens=2)
    for layer in model.vit.layers:
        layer.attention.qkv.weight.data.zero_()
        layer.attention.qkv.bias.data.zero_()
    assert np.abs(attention_distances(model, photos(model)) - 4 * (12**2 - 1) / (3 * 12)).max() < 1e-5
    # An identity in the patches, and anything to and from the tokens before them.
    distances = torch.from_numpy(patch_distances((3, 4), (4, 8)))
    weights = torch.zeros(1, 2, 14, 14)
    weights[..., 2:, 2:] = torch.eye(12) * 0.5
    weights[..., :, :2] = 0.25
    assert mean_distance(weights, distances, 2).abs().max() == 0
    # Every patch looks at its right neighbour, those of the last column at the first: 8, 8, 8 and 24 pixels.
    weights[..., 2:, 2:] = torch.kron(torch.eye(3), torch.roll(torch.eye(4), 1, dims=1)) * 0.5
    assert mean_distance(weights, distances, 2).tolist() == [[12.0, 12.0]]
    weights[..., 2:, 2:] = 0.0
    assert mean_distance(weights, distances, 2).tolist() == [[0.0, 0.0]]


def test_filters_are_those_of_scikit_learn():
    model = network("patch_is_rectangle", num_channels=1, hidden_size=48)
    ours = patch_filters(model, 10)
    weight = model.vit.embeddings.patch_embeddings.projection.weight.detach().double().numpy()
    theirs = PCA(n_components=10, svd_solver="full").fit(weight.reshape(48, -1))
    assert (ours.components.shape, ours.num_filters) == ((10, 4, 8, 1), 48)
    components = ours.components.transpose(0, 3, 1, 2).reshape(10, -1)
    signs = np.sign((components * theirs.components_).sum(axis=1, keepdims=True))
    assert np.abs(components - signs * theirs.components_).max() < 1e-10
    assert np.abs(ours.explained - theirs.explained_variance_ratio_).max() < 1e-12
    assert (np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1) > 0).all()
    assert patch_filters(network()).components.shape == (28, 4, 4, 3)
    assert patch_filters(network(num_channels=1, hidden_size=16)).components.shape == (16, 4, 4, 1)


def test_filters_of_a_hybrid_are_the_standardised_ones_of_its_root():
    model = network("hybrid")
    ours = patch_filters(model, 4)
    weight = model.vit.embeddings.patch_embeddings.stem.root_conv.weight.detach().double().numpy()
    weight = weight.reshape(weight.shape[0], -1)
    weight = (weight - weight.mean(axis=1, keepdims=True)) / weight.std(axis=1, keepdims=True)
    theirs = PCA(n_components=4, svd_solver="full").fit(weight).components_
    components = ours.components.transpose(0, 3, 1, 2).reshape(4, -1)
    assert ours.components.shape == (4, 7, 7, 3)
    assert np.abs(np.abs((components * theirs).sum(axis=1)) - 1).max() < 1e-6  # the forward adds 1e-5 to the deviation


@pytest.mark.parametrize("kind", ["learned_1d", "learned_2d", "sincos_2d"])
def test_similarity_of_positions_is_the_cosine_of_what_the_network_adds(kind):
    model = network(position_embedding=kind)
    encoder, zeros = model.vit.embeddings, torch.zeros(1, 25, 32)
    added = encoder.position_embeddings(zeros, grid=(4, 6))[0, 1:].detach().double().numpy()
    ours = position_similarity(model)
    assert ours.shape == (4, 6, 4, 6)
    assert np.abs(ours.reshape(24, 24) - cosine_similarity(added)).max() < 1e-9
    assert np.abs(ours[1, 2, 1, 2] - 1) < 1e-12
    added = encoder.position_embeddings(torch.zeros(1, 7, 32), grid=(2, 3))[0, 1:].detach().double().numpy()
    assert np.abs(position_similarity(model, (2, 3)).reshape(6, 6) - cosine_similarity(added)).max() < 1e-9


def test_models_without_places_say_so_and_zeros_are_like_nothing():
    for kind, reason in {"none": "does not know where", "relative_1d": "distances between patches"}.items():
        with pytest.raises(InputError, match=f"position_embedding='{kind}'.*{reason}.*learned_1d"):
            position_similarity(network(position_embedding=kind))
    model = network()
    model.vit.embeddings.position_embeddings.weight.data[:, 1] = 0
    similarity = position_similarity(model)
    assert (similarity[0, 0] == 0).all()
    assert np.isfinite(similarity).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "patch_is_rectangle"])
def test_grad_cam_is_autograd_through_the_last_layer_spelled_out(kind):
    model = network(kind)
    pixel_values, prefix = photos(model, 3), model.config.num_prefix_tokens
    ours, classes, logits = grad_cam(model, pixel_values)
    with torch.no_grad():
        outputs = model(pixel_values, output_hidden_states=True)
    assert np.abs(logits - outputs.logits.numpy()).max() < 1e-5
    assert classes.tolist() == outputs.logits.argmax(dim=1).tolist()
    vit, last, before = model.vit, model.vit.layers[-1], outputs.hidden_states[-2]

    def logit(tokens: torch.Tensor) -> torch.Tensor:
        states = before + last.layer_scale_attention(last.attention(tokens, grid=model.config.grid_hw)[0])
        states = vit.layernorm(states + last.layer_scale_mlp(last.mlp(last.layernorm_after(states))))
        logits = model.classifier(vit.pooler(states))
        if model.distillation_classifier is not None:
            logits = (logits + model.distillation_classifier(states[:, 1])) / 2
        return logits[range(3), classes].sum()

    tokens = last.layernorm_before(before).detach()
    gradient = torch.autograd.functional.jacobian(logit, tokens)[:, prefix:].double().numpy()
    patches = tokens[:, prefix:].double().numpy()
    theirs = np.stack([np.maximum(patches[i] @ gradient[i].mean(axis=0), 0) for i in range(3)])
    assert theirs.max() > 0
    assert np.abs(ours.reshape(3, -1) - theirs).max() < 1e-4 * theirs.max()
    chosen, _, _ = grad_cam(model, pixel_values, classes=[2, 0, 1])
    assert [np.abs(chosen[i] - ours[i]).max() < 1e-6 for i in range(3)] == [k == c for k, c in zip(classes, (2, 0, 1))]


def test_grad_cam_of_frozen_models_and_its_errors():
    model = network()
    pixel_values = photos(model)
    expected, _, _ = grad_cam(model, pixel_values)
    model.requires_grad_(False)
    with torch.no_grad():
        assert np.array_equal(grad_cam(model, pixel_values)[0], expected)
    half, _, _ = grad_cam(model.to(torch.bfloat16), pixel_values, classes=[0, 1])
    assert np.isfinite(half).all()
    with pytest.raises(InputError, match="no class 3: the model has the classes 0 to 2"):
        grad_cam(model, pixel_values, classes=[0, 3])
    for without in (network(num_labels=0), ViTScratchModel(model.config)):
        with pytest.raises(InputError, match="no classifier"):
            grad_cam(without, pixel_values)
