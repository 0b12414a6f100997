# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose weights are in oneDNN's blocks: the same layers, only faster on a CPU."""

import copy
import pickle

import pytest
import torch
from torch import nn

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.acceleration import speed_up as layers
from modeling_vit_scratch.acceleration.speed_up import BlockedLinear, is_available, speed_up


pytestmark = pytest.mark.skipif(not is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def also_small_products(monkeypatch):
    monkeypatch.setattr(layers, "SMALL", 0)


def both(**options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    config = ViTScratchConfig.from_variant("test/4", num_labels=3, zero_init_head=False, **options)
    model = ViTScratchForImageClassification(config).eval()
    return model, speed_up(copy.deepcopy(model))


@pytest.mark.parametrize(
    "options", [{}, {"qkv_bias": False}, {"position_embedding": "relative_1d", "pooling": "mean"}, {"qk_norm": True}]
)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_logits_are_those_of_the_plain_layers(pixel_values, options, dtype, atol):
    plain, blocked = (model.to(dtype) for model in both(**options))
    assert sum(isinstance(layer, BlockedLinear) for layer in blocked.modules()) == 2 * 4 + 1
    with torch.inference_mode():
        wanted, got = plain(pixel_values).logits, blocked(pixel_values).logits
        again = blocked(pixel_values, output_hidden_states=True).logits  # the last layer in full
    assert wanted.abs().max() > 0.05
    torch.testing.assert_close(got, wanted, atol=atol, rtol=0)
    torch.testing.assert_close(again, wanted, atol=atol, rtol=0)


def test_the_blocked_weight_is_what_is_used(pixel_values):
    _, blocked = both()
    layer = blocked.vit.layers[0].mlp.fc1
    with torch.no_grad():
        before = blocked(pixel_values).logits
        state, _, weight = layer._blocked
        layer._blocked = (state, torch.ops.mkldnn._reorder_linear_weight(2 * weight, None), weight)
        assert not torch.equal(blocked(pixel_values).logits, before)


def test_training_is_that_of_the_plain_layers_and_what_it_changes_is_seen(pixel_values):
    plain, blocked = both(pooling="mean")  # the class token alone has other sums
    for _ in range(2):
        for model in (plain, blocked):
            with torch.no_grad():
                model(pixel_values)
            loss = model(pixel_values, labels=torch.tensor([0, 2])).loss
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.5 * parameter.grad
    for name, weight in plain.named_parameters():
        assert torch.equal(blocked.get_parameter(name), weight), name
    with torch.no_grad():
        torch.testing.assert_close(blocked(pixel_values).logits, plain(pixel_values).logits, atol=2e-6, rtol=0)


@pytest.mark.parametrize("assign", [False, True])
def test_other_weights_are_seen(pixel_values, assign):
    plain, blocked = both()

    def load():  # copies, which nobody has changed since they were made
        blocked.load_state_dict({name: value.clone() for name, value in plain.state_dict().items()}, assign=assign)

    with torch.no_grad():
        load()
        before = blocked(pixel_values).logits
        for weight in plain.parameters():
            weight += 0.1 * torch.randn_like(weight)
        load()
        assert not torch.allclose(blocked(pixel_values).logits, before, atol=0.01)
        torch.testing.assert_close(blocked(pixel_values).logits, plain(pixel_values).logits, atol=5e-6, rtol=0)


def test_it_is_copied_pickled_saved_and_cast_like_the_plain_one(pixel_values, tmp_path):
    plain, blocked = both()
    with torch.no_grad():
        wanted = blocked(pixel_values).logits
        for model in (copy.deepcopy(blocked), pickle.loads(pickle.dumps(blocked))):
            assert torch.equal(model(pixel_values).logits, wanted)
        assert blocked.double()(pixel_values.double()).logits.dtype == torch.float64
        blocked.float()
    assert list(blocked.state_dict()) == list(plain.state_dict())
    blocked.save_pretrained(tmp_path)
    loaded = ViTScratchForImageClassification.from_pretrained(tmp_path)
    assert not any(isinstance(layer, BlockedLinear) for layer in loaded.modules())


def test_hooked_layers_and_subclasses_stay():
    model, _ = both()
    seen = []
    model.vit.layers[0].mlp.fc1.register_forward_hook(lambda *values: seen.append(values))
    model.vit.layers[0].mlp.fc2 = nn.modules.linear.NonDynamicallyQuantizableLinear(64, 32)
    speed_up(model)
    kept = model.vit.layers[0].mlp
    assert (type(kept.fc1), type(kept.fc2)) == (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
    with torch.no_grad():
        model(torch.zeros(1, 3, 16, 24))
    assert len(seen) == 1


def test_it_can_be_exported(pixel_values):
    _, blocked = both()
    with torch.no_grad():
        wanted = blocked(pixel_values).logits
        program = torch.export.export(blocked, (pixel_values,))
        got = program.module()(pixel_values).logits
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=0)
    assert "mkldnn" not in str(program.graph)


def test_where_the_operators_fail_all_stays_as_it_was(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("not on this processor")

    is_available.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", fail)
    try:
        assert not is_available()
        _, model = both()
        assert not any(isinstance(layer, BlockedLinear) for layer in model.modules())
    finally:
        is_available.cache_clear()


def test_small_products_stay_with_the_library_that_is_quicker_to_call(pixel_values, monkeypatch):
    _, blocked = both()
    with torch.no_grad():
        monkeypatch.setattr(layers, "SMALL", 10**9)
        blocked(pixel_values)
        assert not any("_blocked" in layer.__dict__ for layer in blocked.modules())
        blocked.to(torch.bfloat16)(pixel_values)  # whose weights are reordered in each call otherwise
        assert "_blocked" in blocked.classifier.__dict__


def test_what_training_changes_behind_its_back_is_seen(pixel_values):
    plain, blocked = both()
    with torch.no_grad():
        before = blocked(pixel_values).logits
        for model in (plain, blocked):
            for weight in model.parameters():
                weight.data += 0.1  # as peft merges adapters: no count of changes has it
        blocked.train()
        assert not any("_blocked" in layer.__dict__ for layer in blocked.modules())  # nor is the memory held
        blocked.eval()
        assert not torch.allclose(blocked(pixel_values).logits, before, atol=0.01)
        torch.testing.assert_close(blocked(pixel_values).logits, plain(pixel_values).logits, atol=5e-6, rtol=0)
