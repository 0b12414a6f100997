# SPDX-License-Identifier: Apache-2.0
"""Merged tokens: nothing changes where they are equal or none is merged, and else what the paper's words say."""

import math

import pytest
import torch

from modeling_vit_scratch import ViTScratchBackbone, ViTScratchConfig, ViTScratchForImageClassification, ViTScratchModel
from modeling_vit_scratch.acceleration.token_merging import match, merge_tokens


def build(kind=ViTScratchForImageClassification, **changes):
    config = ViTScratchConfig.from_variant("test/4", num_labels=3, **{"zero_init_head": False, **changes})
    model = kind(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def run(model, images):
    with torch.no_grad():
        return model(images)


@pytest.mark.parametrize(
    "changes", [{}, {"pooling": "mean"}, {"num_register_tokens": 2, "qk_norm": True}, {"layer_scale_init_value": 0.5}],
    ids=str,
)  # fmt: skip
def test_no_token_merged_is_the_model_itself(pixel_values, changes):
    model = build(**changes)
    before = run(model, pixel_values).logits
    merge_tokens(model, 4)
    merged = run(model, pixel_values).logits
    assert (merged - before).abs().max() > 1e-6
    merge_tokens(model, 0)
    assert torch.equal(run(model, pixel_values).logits, before)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("number", [1, 5, 100])
def test_equal_tokens_may_be_merged_without_a_difference(number, pooling):
    # Without positions the patches of a plain wall are equal, and a mean of n of them counts n times.
    model = build(position_embedding="none", pooling=pooling, num_hidden_layers=4)
    wall = torch.randn(1, 3, 4, 4).tile(1, 1, 4, 6)
    before = run(model, wall).logits
    merge_tokens(model, number)
    torch.testing.assert_close(run(model, wall).logits, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("num_prefix_tokens", "count"), [(0, 3), (1, 4), (2, 2), (3, 100)])
def test_matching_is_that_of_the_paper_pair_by_pair(num_prefix_tokens, count):
    keys = torch.randn(3, 13, 8, dtype=torch.float64)
    target, remaining = match(keys, count, num_prefix_tokens)
    for image, goes in zip(keys, target.tolist()):
        pairs = []
        for even in range(0, 13, 2):
            if even < num_prefix_tokens:
                continue
            cosines = {
                odd: float(image[even] @ image[odd] / image[even].norm() / image[odd].norm())
                for odd in range(1, 13, 2) if odd >= num_prefix_tokens
            }  # fmt: skip
            odd = max(cosines, key=cosines.get)
            pairs.append((cosines[odd], even, odd))
        groups = {index: {index} for index in range(13)}
        for _, even, odd in sorted(pairs, reverse=True)[:count]:
            groups[odd] |= groups.pop(even)
        assert remaining == len(groups)
        assert {frozenset(i for i in range(13) if goes[i] == place) for place in range(remaining)} == {
            frozenset(group) for group in groups.values()
        }
        assert goes[:num_prefix_tokens] == list(range(num_prefix_tokens))  # before the others, as they were


def test_a_layer_by_hand(pixel_values):
    """Two layers; in between, tokens are merged to means of their groups, which count for as many in the second."""
    model = build(ViTScratchModel, num_hidden_layers=2)
    layers, seen = model.layers, {}
    hook = layers[0].attention.qkv.register_forward_hook(lambda layer, inputs, output: seen.update(qkv=output))
    merge_tokens(model, 6)
    got = run(model, pixel_values).last_hidden_state
    hook.remove()
    merge_tokens(model, 0)
    assert got.shape == (2, 25, 32)
    with torch.no_grad():
        states = model.embeddings(pixel_values)
        key = seen["qkv"].unflatten(-1, (3, 4, 8))[:, :, 1].mean(dim=2)
        target, remaining = match(key, 6, 1)
        first = layers[0]
        attended, _ = first.attention(first.layernorm_before(states), None, (4, 6), None)
        states = states + attended
        for image in range(2):
            members = [(target[image] == place).nonzero().flatten() for place in range(remaining)]
            tokens = torch.stack([states[image, group].mean(dim=0) for group in members])
            tokens = tokens + first.mlp(first.layernorm_after(tokens))
            # In the second layer, a token that stands for n is there n times: the definition of its weight.
            copies = torch.cat([tokens[place].expand(len(group), -1) for place, group in enumerate(members)])
            after = layers[1](copies[None], None, (4, 6), None)[0]
            expected = torch.empty(25, 32)
            expected[torch.cat(members)] = after
            torch.testing.assert_close(got[image], model.layernorm(expected), atol=1e-5, rtol=1e-5)


def test_feature_maps_keep_their_shape(pixel_values):
    model = build(ViTScratchBackbone)
    merge_tokens(model, 5)
    (features,) = run(model, pixel_values).feature_maps
    assert features.shape == (2, 32, 4, 6)
    assert math.isfinite(features.sum())


def test_what_can_not_be_merged_is_told(pixel_values):
    for changes in ({"position_embedding": "relative_1d"}, {"position_embedding_placement": "every_layer"}):
        with pytest.raises(ValueError, match="no position of their own"):
            merge_tokens(build(**changes), 3)
    with pytest.raises(ValueError, match="tokens_per_layer=-1"):
        merge_tokens(build(), -1)
    model = build()
    merge_tokens(model, 3)
    with pytest.raises(ValueError, match="attention weights"):
        model(pixel_values, output_attentions=True)
