# SPDX-License-Identifier: Apache-2.0
"""Parameter groups, schedules against the paper's code, optimizers against numpy, averages against their sum."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.training.optimization import (
    WeightAverage,
    decay_parameter_names,
    describe_groups,
    layer_number,
    parameter_groups,
)


@pytest.fixture
def model():
    config = ViTScratchConfig.from_variant(
        "test/4", num_labels=3, num_register_tokens=2, qk_norm=True, layer_scale_init_value=0.1, representation_size=8,
        position_embedding_placement="every_layer",
    )  # fmt: skip
    return ViTScratchForImageClassification(config)


# ---------------------------------------------------------------------------------------------------------------------
# Parameter groups


def test_kernels_decay_and_nothing_else(model):
    layer = {"attention.qkv.weight", "attention.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
    assert set(decay_parameter_names(model)) == {
        *(f"vit.layers.{i}.{name}" for i in range(2) for name in layer),
        "vit.embeddings.patch_embeddings.projection.weight", "vit.pooler.dense.weight", "classifier.weight",
    }  # fmt: skip
    groups = parameter_groups(model, 1e-3, 0.3)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [group["lr"] for group in groups] == [1e-3, 1e-3]


def test_layers_are_counted_from_the_input():
    numbers = {
        "vit.embeddings.cls_token": 0, "vit.embeddings.patch_embeddings.projection.bias": 0,
        "vit.embeddings.position_embeddings.weight": 0, "vit.layers.0.mlp.fc1.weight": 1,
        "vit.later_position_embeddings.0.weight": 2, "vit.layers.11.layernorm_before.bias": 12,
        "vit.layernorm.weight": 13, "vit.pooler.dense.weight": 13, "classifier.bias": 13,
    }  # fmt: skip
    assert {name: layer_number(name, 12) for name in numbers} == numbers


def test_rates_of_layers_and_head(model):
    groups = parameter_groups(model, 1e-3, 0.05, layer_decay=0.5, head_learning_rate_multiplier=7.0)
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    named = dict(model.named_parameters())
    assert sorted(of) == sorted(id(parameter) for parameter in named.values())
    assert sum(len(group["params"]) for group in groups) == len(named)  # each once
    for name, parameter in named.items():
        group = of[id(parameter)]
        assert group["weight_decay"] == (0.05 if name in decay_parameter_names(model) else 0.0), name
        expected = 7e-3 if name.startswith("classifier") else 1e-3 * 0.5 ** (3 - layer_number(name, 2))
        assert group["lr"] == pytest.approx(expected), name
    assert groups[0]["lr"] == 1e-3  # what the Trainer reports
    # Only the head differs.
    groups = parameter_groups(model, 1e-3, 0.05, head_learning_rate_multiplier=0.1)
    assert [(group["layer"], group["lr"]) for group in groups] == [
        *[("everything else", 1e-3)] * 2, *[("head", pytest.approx(1e-4))] * 2
    ]  # fmt: skip


def test_frozen_weights_are_in_no_group(model):
    model.vit.embeddings.requires_grad_(False)
    groups = parameter_groups(model, 1e-3, 0.05, layer_decay=0.7)
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])
    assert "embeddings" not in {group["layer"] for group in groups}


def test_the_table_counts_every_parameter_once(model):
    table = describe_groups(parameter_groups(model, 1e-3, 0.05, layer_decay=0.5))
    header, *rows = table.splitlines()
    assert "decay 0.05" in header
    assert [row.split("  ")[0] for row in rows] == ["after the layers", "layer 2", "layer 1", "embeddings", "head"]
    counts = [int(number.replace(",", "")) for row in rows for number in row.split()[-2:]]
    assert sum(counts) == model.num_parameters()
    names = set(decay_parameter_names(model))
    assert sum(counts[::2]) == sum(p.numel() for name, p in model.named_parameters() if name in names)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules and optimizers


def official_rate(step, total_steps, base, decay_type, warmup_steps, linear_end=1e-5):
    """vit_jax/utils.py, create_learning_rate_schedule, in plain Python."""
    rate = base
    progress = min(max((step - warmup_steps) / float(total_steps - warmup_steps), 0.0), 1.0)
    if decay_type == "linear":
        rate = linear_end + (rate - linear_end) * (1.0 - progress)
    elif decay_type == "cosine":
        rate = rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    if warmup_steps:
        rate = rate * min(1.0, step / warmup_steps)
    return rate


@pytest.mark.parametrize(
    ("decay_type", "flags"),
    [
        ("cosine", {"lr_scheduler_type": "cosine"}),
        ("linear", {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-5, "power": 1.0}}),
    ],
)
@pytest.mark.parametrize(("total", "warmup", "base"), [(500, 100, 0.03), (331, 0, 8e-4), (20, 7, 3e-3)])
def test_the_stock_schedules_are_the_official_ones(model, tmp_path, decay_type, flags, total, warmup, base):
    arguments = TrainingArguments(
        str(tmp_path), learning_rate=base, warmup_steps=warmup, max_steps=total, use_cpu=True, **flags
    )
    trainer = Trainer(model, arguments)
    trainer.optimizer = torch.optim.SGD(parameter_groups(model, base, 0.0, layer_decay=0.5), lr=base)
    scheduler = trainer.create_scheduler(total)
    for step in range(total + 1):
        expected = official_rate(step, total, base, decay_type, warmup)
        rates = dict(zip((group["layer"] for group in trainer.optimizer.param_groups), scheduler.get_last_lr()))
        assert rates["head"] == pytest.approx(expected, abs=1e-9)
        assert rates["layer 1"] == pytest.approx(expected * 0.5**2, abs=1e-9)
        trainer.optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_optimizers_against_numpy(model, tmp_path, optim):
    momentum = {"optim_args": "momentum=0.9"} if optim == "sgd" else {}
    arguments = TrainingArguments(str(tmp_path), learning_rate=0.02, optim=optim, use_cpu=True, **momentum)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = kind(parameter_groups(model, 0.02, 0.1, layer_decay=0.5), **settings)
    assert settings.get("fused", False) == (optim == "adamw_torch_fused")
    groups = optimizer.param_groups
    ours = [(parameter, group) for group in groups for parameter in group["params"]]
    theirs = [parameter.detach().double().numpy().copy() for parameter, _ in ours]
    first, second = [0 * value for value in theirs], [0 * value for value in theirs]
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 4):
        for i, (parameter, group) in enumerate(ours):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradient, rate = parameter.grad.double().numpy(), group["lr"]
            if optim == "sgd":
                # optax.sgd(momentum): a trace that decays, and L2 in the gradient where torch is asked to decay.
                gradient = gradient + group["weight_decay"] * theirs[i]
                first[i] = gradient + 0.9 * first[i]
                theirs[i] = theirs[i] - rate * first[i]
                continue
            # Loshchilov and Hutter, algorithm 2: the decay is not in the moments.
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            change = first[i] / (1 - 0.9**step) / (np.sqrt(second[i] / (1 - 0.999**step)) + 1e-8)
            theirs[i] = theirs[i] - rate * (change + group["weight_decay"] * theirs[i])
        optimizer.step()
    for (parameter, _), value in zip(ours, theirs):
        assert np.allclose(parameter.detach().numpy(), value, atol=2e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The average


def no_best():
    return SimpleNamespace(load_best_model_at_end=False)


def run(average, model, steps, start=0, seed=0, history=None):
    """Steps of random changes; the state's step counts from 1 after the first, as the Trainer's does."""
    for step in range(start + 1, start + steps + 1):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        if history is not None:
            history.append([parameter.detach().double().clone() for parameter in model.parameters()])
        average.on_step_end(no_best(), SimpleNamespace(global_step=step), None, model=model)


def begin(average, model):
    average.on_train_begin(no_best(), SimpleNamespace(global_step=0), None, model=model)
    return average


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_the_sum_it_is_said_to_be(warmup):
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    average, history = begin(WeightAverage(0.9, warmup), model), []
    start = [parameter.detach().double().clone() for parameter in model.parameters()]
    run(average, model, 30, history=history)
    decays = [min(0.9, (1 + n) / (10 + n)) if warmup else 0.9 for n in range(1, 31)]
    # Weight of the start, and of the weights after each step: its share times all later decays.
    shares = [math.prod(decays), *((1 - d) * math.prod(decays[n + 1 :]) for n, d in enumerate(decays))]
    assert sum(shares) == pytest.approx(1.0)
    for i, ours in enumerate(average.average.values()):
        theirs = sum(share * values[i] for share, values in zip(shares, [start, *history]))
        assert torch.allclose(ours.double(), theirs, atol=1e-6)


def test_without_warmup_it_is_the_geometric_series():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    average = begin(WeightAverage(0.99, warmup=False), model)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for step in range(1, 201):
        average.on_step_end(no_best(), SimpleNamespace(global_step=step), None, model=model)
    assert average.average["weight"].item() == pytest.approx(1 - 0.99**200, abs=1e-5)


def test_saved_and_restored_it_goes_on_with_the_same_bits(tmp_path):
    straight, resumed = nn.Linear(4, 3), nn.Linear(4, 3)
    resumed.load_state_dict(straight.state_dict())
    one = begin(WeightAverage(0.99), straight)
    run(one, straight, 10)
    two = begin(WeightAverage(0.99), resumed)
    run(two, resumed, 4)
    two.save(str(tmp_path))
    three = WeightAverage(0.99)
    three.start_from = str(tmp_path)
    run(begin(three, resumed), resumed, 6, start=4)
    for name in one.average:
        assert torch.equal(one.average[name], three.average[name])
        assert not torch.equal(one.average[name], dict(straight.named_parameters())[name])


def test_evaluation_sees_the_average_and_training_does_not(tmp_path):
    model = nn.Linear(4, 3)
    average = begin(WeightAverage(0.9), model)
    run(average, model, 5)
    own = model.weight.detach().clone()
    with average.applied_to(model):
        assert torch.equal(model.weight, average.average["weight"])
    assert torch.equal(model.weight, own)
    with pytest.raises(KeyError), average.applied_to(model):  # an evaluation that fails leaves the weights alone, too
        raise KeyError
    assert torch.equal(model.weight, own)
    average.on_train_end(no_best(), SimpleNamespace(), None, model=model)
    assert torch.equal(model.weight, average.average["weight"])
    average.save(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_in_the_end_the_model_is_the_average_of_the_best_checkpoint(tmp_path):
    model = nn.Linear(4, 3)
    average = begin(WeightAverage(0.9), model)
    run(average, model, 5)
    average.save(str(tmp_path))
    best = average.average["weight"].clone()
    run(average, model, 5, start=5)
    arguments = SimpleNamespace(load_best_model_at_end=True)
    average.on_train_end(arguments, SimpleNamespace(best_model_checkpoint=str(tmp_path)), None, model=model)
    assert torch.equal(model.weight, best)


def test_half_precision_weights_have_a_full_precision_average():
    model = nn.Linear(4, 3).bfloat16()
    average = begin(WeightAverage(0.9), model)
    run(average, model, 3)
    assert average.average["weight"].dtype == torch.float32
    with average.applied_to(model):
        assert model.weight.dtype == torch.bfloat16


def test_a_checkpoint_without_an_average_and_a_decay_out_of_range_are_refused(tmp_path):
    average = WeightAverage(0.9)
    average.start_from = str(tmp_path)
    with pytest.raises(InputError, match="no average of the weights"):
        begin(average, nn.Linear(2, 2))
    for decay in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match=r"between 0 and 1"):
            WeightAverage(decay)


# ---------------------------------------------------------------------------------------------------------------------
# Rounding


def _steps_of(optimizer, parts, **overrides):
    """The network after six steps, the batch cut into parts, as processes and accumulation do."""
    torch.manual_seed(0)
    config = ViTScratchConfig.from_variant("test/4", num_labels=3, zero_init_head=False, **overrides)
    network, generator = ViTScratchForImageClassification(config), torch.Generator().manual_seed(1)
    steps = optimizer(network.parameters())
    for _ in range(6):
        images = torch.randn(8, 3, 16, 24, generator=generator)
        labels = torch.randint(0, 3, (8,), generator=generator)
        for part in range(parts):
            (network(images[part::parts], labels=labels[part::parts]).loss / parts).backward()
        steps.step()
        steps.zero_grad()
    return network.requires_grad_(False)


def _apart(first, second, in_key_biases):
    """The largest difference of the biases of keys, or of all other weights."""
    apart = 0.0
    for (name, ours), theirs in zip(first.named_parameters(), second.parameters()):
        if name.endswith("qkv.bias"):
            queries, keys, values = (ours - theirs).abs().chunk(3)
            difference = keys if in_key_biases else torch.cat([queries, values])
        else:
            difference = torch.zeros(1) if in_key_biases else (ours - theirs).abs()
        apart = max(apart, difference.max().item())
    return apart


def test_adam_makes_steps_of_the_rounding_in_key_biases_which_change_nothing():
    # A bias of the keys adds the same to all scores of a query, which the softmax takes out again: its gradient is
    # rounding alone. Adam divides it by its own size, and steps at the full rate in a random direction.
    def adam(parameters):
        return torch.optim.AdamW(parameters, lr=1e-3)

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.05)

    one, two = _steps_of(adam, 1), _steps_of(adam, 2)
    assert _apart(one, two, in_key_biases=True) > 1e-4
    assert _apart(one, two, in_key_biases=False) < 2e-6
    images = torch.randn(4, 3, 16, 24, generator=torch.Generator().manual_seed(2))
    assert (one(images).logits - two(images).logits).abs().max() < 2e-6
    assert _apart(_steps_of(sgd, 1), _steps_of(sgd, 2), in_key_biases=True) < 1e-6
    assert _apart(_steps_of(adam, 1, qkv_bias=False), _steps_of(adam, 2, qkv_bias=False), in_key_biases=False) < 2e-6
