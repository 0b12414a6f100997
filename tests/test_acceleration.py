# SPDX-License-Identifier: Apache-2.0
"""`speed_up`: the same logits and gradients in less time, for whoever asks for it, until it is undone; never saved."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_images import build as build_trainer
from tiny_images import class_folders, load_script
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.models import ACCELERATED, ModelBenchmark
from modeling_vit_scratch import (
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchImageProcessor,
    ViTScratchModel,
)
from modeling_vit_scratch.acceleration import speed_up as layers
from modeling_vit_scratch.acceleration.speed_up import only_pooled_output, speed_up, undo_speed_up
from modeling_vit_scratch.prediction.model import Predictor


OPTIONS = {
    "default": {},
    "no bias": {"qkv_bias": False, "hidden_act": "gelu_pytorch_tanh"},
    "all": {
        "num_register_tokens": 2, "layer_scale_init_value": 0.1, "qk_norm": True, "representation_size": 7,
        "position_embedding_placement": "every_layer",
    },
    "shared": {"position_embedding_placement": "every_layer_shared", "position_embedding": "learned_2d"},
    "sincos": {"position_embedding": "sincos_2d", "drop_path_rate": 0.3},
    "relative": {"position_embedding": "relative_1d"},
    "mean": {"pooling": "mean", "use_cls_token": True, "norm_after_pooling": True},
    "distillation": {"use_distillation_token": True, "use_distillation_head": True},
    "hybrid": {"stem_layers": [1, 1], "patch_size": 8},
    "temperature": {"temperature": 1.7},
    "dropout": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.1},
}  # fmt: skip


def build(name: str = "default", **options) -> ViTScratchForImageClassification:
    torch.manual_seed(0)
    config = ViTScratchConfig.from_variant("test/4", num_labels=3, **{**OPTIONS[name], **options})
    model = ViTScratchForImageClassification(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape))
    return model


@pytest.fixture
def tokens_seen(monkeypatch):
    """How many tokens each final LayerNorm has got, seen from below: a hook on it would be respected."""
    seen, original = [], nn.LayerNorm.forward

    def forward(layer, inputs):
        if getattr(layer, "is_final", False):
            seen.append(inputs.shape[1])
        return original(layer, inputs)

    monkeypatch.setattr(nn.LayerNorm, "forward", forward)
    return seen


def watched(model: nn.Module) -> nn.Module:
    model.vit.layernorm.is_final = True
    return model


# The same numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", OPTIONS)
def test_logits_losses_and_gradients_are_those_of_the_plain_model(pixel_values, name, attn_implementation, is_training):
    plain = build(name).double().train(is_training)
    fast = speed_up(copy.deepcopy(plain))
    images, labels = pixel_values.double(), torch.tensor([2, 0])
    outputs = []
    for model in (plain, fast):
        model.set_attn_implementation(attn_implementation)
        torch.manual_seed(1)  # dropout and stochastic depth draw the same
        outputs.append(model(images, labels=labels))
        outputs[-1].loss.backward()
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=0, atol=1e-12)
    for (path, one), other in zip(plain.named_parameters(), fast.parameters()):
        torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=1e-12, msg=path)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "options",
    [{}, {"qkv_bias": False}, OPTIONS["all"], {"position_embedding": "relative_1d"}, {"pooling": "mean"}],
    ids=["plain", "no bias", "all", "relative", "mean"],
)
def test_class_token_alone_gives_the_logits_and_gradients_of_all_tokens(pixel_values, options, attn_implementation):
    short, full = (speed_up(build(**options).double()) for _ in range(2))
    full.load_state_dict(short.state_dict())
    for model in (short, full):
        model.set_attn_implementation(attn_implementation)
    images, labels = pixel_values.double(), torch.tensor([2, 0])
    a, b = short(images, labels=labels), full(images, labels=labels, output_hidden_states=True)
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-12)
    a.loss.backward()
    b.loss.backward()
    for (name, one), other in zip(short.named_parameters(), full.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12, msg=name)


@pytest.fixture
def fused_calls(monkeypatch):
    """Counts the calls of PyTorch's fused attention."""
    calls, original = [], torch.nn.functional.scaled_dot_product_attention

    def attention(*args, **kwargs):
        calls.append(args[0].dtype)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    return calls


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"pooling": "mean", "qkv_bias": False}])
@pytest.mark.parametrize("is_autocast", [True, False])
def test_training_in_bfloat16_has_the_gradients_of_float64_without_fused_attention(
    pixel_values, fused_calls, options, is_autocast
):
    images, labels, exact = pixel_values.bfloat16(), torch.tensor([2, 0]), build(**options).double()
    exact.load_state_dict(build(**options).bfloat16().state_dict())
    plain = copy.deepcopy(exact).to(torch.float32 if is_autocast else torch.bfloat16).train()
    fast, errors = speed_up(copy.deepcopy(plain)), []
    exact(images.double(), labels=labels).loss.backward()
    wanted = torch.cat([weight.grad.flatten() for weight in exact.parameters()])
    fused_calls.clear()
    for model in (fast, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            loss = model(images.float() if is_autocast else images, labels=labels).loss
        loss.backward()
        got = torch.cat([weight.grad.flatten().double() for weight in model.parameters()])
        errors.append((got - wanted).norm() / wanted.norm())
        assert len(fused_calls) == (0 if model is fast else 2)
    assert errors[0] < 0.03
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("why", ["float32", "no gradient", "many tokens", "dropout", "attentions", "another sdpa"])
def test_bfloat16_on_a_cpu_keeps_fused_attention_where_it_is_better_or_asked_for(
    pixel_values, fused_calls, monkeypatch, why
):
    model, seen = speed_up(build("dropout" if why == "dropout" else "default").bfloat16()).train(), []
    if why == "float32":
        model.float()
    if why == "many tokens":
        monkeypatch.setattr(layers, "MOST_TOKENS", 4)
    if why == "another sdpa":
        monkeypatch.setitem(
            ALL_ATTENTION_FUNCTIONS._global_mapping,
            "sdpa",
            lambda *a, **k: seen.append(a) or sdpa_attention_forward(*a, **k),
        )
    with torch.set_grad_enabled(why != "no gradient"):
        outputs = model(pixel_values.to(model.dtype), output_attentions=True if why == "attentions" else None)
    assert len(fused_calls) == (0 if why == "attentions" else 2)
    assert len(seen) == (2 if why == "another sdpa" else 0)
    assert (outputs.attentions is not None) == (why == "attentions")


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh", "gelu_python", "relu"])
def test_without_gradients_the_activation_is_the_same(pixel_values, hidden_act):
    model = speed_up(build(hidden_act=hidden_act))
    with torch.no_grad():
        got = model(pixel_values).logits
    assert torch.equal(got, model(pixel_values).logits)


def test_class_token_alone_saves_seven_percent_of_the_operations_at_twelve_layers():
    config = ViTScratchConfig.from_variant("S/16", num_labels=1000)
    with torch.device("meta"):
        model = speed_up(ViTScratchForImageClassification(config).eval())
        images = torch.empty(1, 3, 224, 224)
    counts = []
    for asked in ({}, {"output_hidden_states": True}):
        with FlopCounterMode(display=False) as counter:
            model(images, **asked)
        counts.append(counter.get_total_flops())
    assert 0.065 < 1 - counts[0] / counts[1] < 0.075


def test_gradient_checkpointing_and_compilation_change_nothing(pixel_values):
    plain, labels = build("all"), torch.tensor([0, 2])
    expected = plain(pixel_values, labels=labels)
    checkpointed = speed_up(copy.deepcopy(plain)).train()
    checkpointed.gradient_checkpointing_enable()
    loss = checkpointed(pixel_values, labels=labels).loss
    torch.testing.assert_close(loss, expected.loss)
    loss.backward()
    expected.loss.backward()
    for (path, one), other in zip(plain.named_parameters(), checkpointed.parameters()):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-6, atol=1e-6, msg=path)
    torch.compiler.reset()
    compiled = torch.compile(speed_up(copy.deepcopy(plain)), fullgraph=True, backend="aot_eager")
    for has_gradients in (True, False):
        with torch.set_grad_enabled(has_gradients):
            torch.testing.assert_close(compiled(pixel_values).logits, expected.logits, rtol=0, atol=1e-5)


# Whoever asks for more, or looks --------------------------------------------------------------------------------------


def test_the_class_token_is_computed_alone_only_where_nothing_else_is_asked_for(pixel_values, tokens_seen):
    model, mask = watched(speed_up(build())), torch.ones(2, 25, dtype=torch.long)
    ones = [
        {}, {"labels": torch.tensor([0, 1])}, {"output_hidden_states": False}, {"return_dict": False},
        {"labels": torch.tensor([0, 1]), "num_items_in_batch": 2}, {"interpolate_pos_encoding": True},
    ]  # fmt: skip
    all_of_them = [
        {"output_hidden_states": True}, {"output_attentions": True}, {"attention_mask": mask}, {"unknown": 1},
        {"output_hidden_states": [1]},
    ]  # fmt: skip
    for asked in ones + all_of_them:
        model(pixel_values, **asked)
    model(pixel_values, None, mask)
    assert tokens_seen == [1] * len(ones) + [25] * (len(all_of_them) + 1)
    tokens_seen.clear()
    model.config.output_hidden_states = True
    assert len(model(pixel_values).hidden_states) == 3
    model.config.output_hidden_states = False
    model.vit(pixel_values)
    assert tokens_seen == [25, 25]
    plain = build()
    for asked in all_of_them[:3]:
        torch.testing.assert_close(model(pixel_values, **asked).logits, plain(pixel_values, **asked).logits)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("default", 1), ("distillation", 2), ("dropout", 25), ("relative", 25), ("mean", 25), ("all", 1)],
)
def test_in_training_too_unless_random_numbers_would_be_others(pixel_values, tokens_seen, name, tokens):
    model = watched(speed_up(build(name).train()))
    model(pixel_values, labels=torch.tensor([0, 1])).loss.backward()
    assert tokens_seen in ([tokens], [])  # norm_after_pooling has no LayerNorm there
    if name == "dropout":
        model.eval()(pixel_values)
        assert tokens_seen == [25, 1]


def test_asking_for_hidden_states_once_does_not_cost_later_calls_the_shortcut(pixel_values, tokens_seen):
    model = watched(speed_up(build()))
    model(pixel_values)
    model(pixel_values, output_hidden_states=True)
    model(pixel_values)
    assert tokens_seen == [1, 25, 1]


def test_a_hook_on_the_last_layer_sees_every_token(pixel_values):
    model, seen = speed_up(build()), []
    handle = model.vit.layers[-1].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model(pixel_values)
    handle.remove()
    model.vit.layers[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model(pixel_values)
    assert seen == [(2, 25, 32), (2, 25, 32)]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("has_gradients", [True, False])
def test_hooks_see_what_they_would_see_whenever_they_come(pixel_values, has_gradients, when):
    paths = [path for path, layer in build().vit.named_modules() if not isinstance(layer, nn.ModuleList)]
    kinds = ["register_forward_hook", "register_forward_pre_hook"]
    for path in paths:
        for kind in kinds:
            plain, model, seen = build(), build(), []

            def note(_, inputs, output=None, seen=seen):
                output = inputs[0] if output is None else output
                output = output[0] if isinstance(output, tuple) else output
                seen.append(getattr(output, "last_hidden_state", output))  # no copy: nobody may write over it

            for one in (plain, model):
                if one is model and when == "after":
                    speed_up(model)
                getattr(one.vit.get_submodule(path), kind)(note)
                if one is model and when == "before":
                    speed_up(model)
                with torch.set_grad_enabled(has_gradients):
                    one(pixel_values)
            half = len(seen) // 2
            for expected, got in zip(seen[:half], seen[half:], strict=True):
                torch.testing.assert_close(got, expected, rtol=0, atol=2e-6, msg=f"{kind} {path}")


@pytest.mark.parametrize("is_global", [False, True])
def test_backward_and_global_hooks_see_every_token(pixel_values, is_global):
    model, shapes = speed_up(build()), []

    def note(module, inputs, outputs):
        if module is model.vit.layernorm:
            shapes.append(tuple(outputs[0].shape))

    register = nn.modules.module.register_module_full_backward_hook if is_global else None
    handle = register(note) if is_global else model.vit.layernorm.register_full_backward_hook(note)
    try:
        model(pixel_values).logits.sum().backward()
    finally:
        handle.remove()
    assert shapes == [(2, 25, 32)]


def test_who_looks_at_the_mlp_or_changes_it_gets_what_torch_would_give(config, pixel_values):
    model = speed_up(ViTScratchForImageClassification(config).eval())
    seen = {}
    first, second = (layer.mlp for layer in model.vit.layers)
    first.fc1.register_forward_hook(lambda layer, inputs, output: seen.update(before=output))
    second.activation.register_forward_hook(lambda layer, inputs, output: seen.update(inputs=inputs[0], after=output))
    with torch.no_grad():
        model(pixel_values, output_hidden_states=True)
        assert (seen["before"] < -0.2).any()  # no GELU is
        assert torch.equal(seen["after"], second.activation(seen["inputs"]))
        tokens = torch.randn(1, 2, config.hidden_size)
        first.activation = torch.nn.ReLU()
        assert torch.equal(first(tokens), first.fc2(first.fc1(tokens).relu()))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_replaced_forward_counts_whenever_it_comes(pixel_values, when):
    for path in [path for path, layer in build().vit.named_modules() if not isinstance(layer, nn.ModuleList) and path]:
        for has_gradients in (True, False):
            answers = []
            for is_fast in (False, True):
                model = build()
                layer = model.vit.get_submodule(path)
                if is_fast and when == "after":
                    speed_up(model)

                def forward(*args, original=layer.forward, **kwargs):
                    output = original(*args, **kwargs)
                    return (output[0].sin(), *output[1:]) if isinstance(output, tuple) else output.sin()

                layer.forward = forward
                if is_fast and when == "before":
                    speed_up(model)
                with torch.set_grad_enabled(has_gradients):
                    answers.append(model(pixel_values).logits)
            torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=5e-6, msg=path)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_on_the_fused_projection_reaches_the_class_token(pixel_values, when):
    lora = LoraConfig(
        target_modules=["qkv", "proj", "fc1", "fc2"], modules_to_save=["classifier"], init_lora_weights=False
    )
    model = build()
    before = model(pixel_values).logits
    plain = get_peft_model(copy.deepcopy(model), lora).eval()
    if when == "before":
        adapted = speed_up(get_peft_model(copy.deepcopy(model), lora).eval())
    else:
        adapted = get_peft_model(speed_up(copy.deepcopy(model)), lora).eval()
    adapted.load_state_dict(plain.state_dict())
    short = adapted(pixel_values).logits
    assert (short - before).abs().max() > 1e-3
    full = adapted(pixel_values, output_hidden_states=True).logits
    torch.testing.assert_close(short, full, rtol=0, atol=1e-5)
    torch.testing.assert_close(short, plain(pixel_values).logits, rtol=0, atol=1e-5)
    adapted(pixel_values, labels=torch.tensor([0, 1])).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert any("layers.1.attention.qkv.lora_B" in name for name in trained)
    assert all("lora" in name or "classifier" in name for name in trained)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(pixel_values).logits, short, rtol=0, atol=1e-5)


def test_another_last_layer_is_left_alone(pixel_values):
    model = speed_up(build())
    model.vit.layers[-1] = build().vit.layers[-1]
    assert only_pooled_output(model.vit) == {}
    torch.testing.assert_close(model(pixel_values).logits, build()(pixel_values).logits)


# Undone, copied, saved ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_undone_it_is_the_model_that_it_was(pixel_values, name):
    model, plain = build(name), build(name)
    assert speed_up(model) is model
    speed_up(model)  # a second time changes nothing
    assert len(model._forward_pre_hooks) == 1
    with torch.no_grad():
        model(pixel_values)
    assert undo_speed_up(model) is model
    for one, other in zip(model.modules(), plain.modules()):
        assert type(one) is type(other)
        assert one.__dict__.keys() == other.__dict__.keys()
        assert not one._forward_pre_hooks
        assert not one._forward_pre_hooks_with_kwargs
    with torch.no_grad():
        assert torch.equal(model(pixel_values).logits, plain(pixel_values).logits)


def test_undoing_leaves_the_hooks_of_others(pixel_values):
    model, calls = build(), []
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    speed_up(model)
    model.register_forward_pre_hook(lambda *_: calls.append("after"))
    undo_speed_up(model)(pixel_values)
    assert calls == ["before", "after"]


@pytest.mark.parametrize("kind", [ViTScratchForImageClassification, ViTScratchForMaskedImageModeling, ViTScratchModel])
def test_nothing_of_it_is_saved(pixel_values, tmp_path, kind):
    torch.manual_seed(0)
    model = kind(ViTScratchConfig.from_variant("test/4", num_labels=3)).eval()
    model.save_pretrained(tmp_path / "plain")
    keys = list(model.state_dict())
    speed_up(model)
    with torch.no_grad():
        model(pixel_values)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "fast")
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("plain", "fast")]
    assert files[0] == files[1]
    assert "encoder_vit_scratch.py" in files[0]
    loaded = kind.from_pretrained(tmp_path / "fast")
    assert not any("acceleration" in type(layer).__module__ for layer in loaded.modules())


def test_copies_are_as_fast_and_as_undoable(pixel_values, tokens_seen):
    model = watched(speed_up(build()))
    with torch.no_grad():
        expected = model(pixel_values).logits
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(pixel_values).logits, expected)
            assert tokens_seen[-1] == 1
            undo_speed_up(copied)(pixel_values)
            assert tokens_seen[-1] == 25
            assert type(copied.vit.layers[-1]) is type(build().vit.layers[-1])
        model(pixel_values)
    assert tokens_seen[-1] == 1  # the copies' undoing was theirs


def test_an_encoder_alone_computes_every_token_unless_it_is_told(pixel_values):
    plain, encoder = build().vit, speed_up(build().vit)
    assert encoder(pixel_values).last_hidden_state.shape == (2, 25, 32)
    assert only_pooled_output(plain) == {}
    pooled = encoder(pixel_values, **only_pooled_output(encoder))
    assert pooled.last_hidden_state.shape == (2, 1, 32)
    torch.testing.assert_close(pooled.pooler_output, plain(pixel_values).pooler_output)
    assert only_pooled_output(speed_up(ViTScratchModel(plain.config, add_pooling_layer=False))) == {}


def test_a_subclass_that_reads_the_tokens_gets_them(pixel_values):
    class Segmenter(ViTScratchForImageClassification):
        def forward(self, pixel_values, **kwargs):
            return self.vit(pixel_values, **kwargs).last_hidden_state

    model = speed_up(Segmenter(build().config))
    assert model(pixel_values).shape == (2, 25, 32)


def test_training_prediction_the_page_and_the_benchmark_make_the_call(tmp_path):
    trainer = build_trainer(tmp_path / "out", "--train_dir", str(class_folders(tmp_path / "pets")))
    build().save_pretrained(tmp_path / "saved")
    processor = ViTScratchImageProcessor(size={"height": 16, "width": 24})
    processor.save_pretrained(tmp_path / "saved")
    models = {
        "training": trainer.model,
        "prediction": Predictor(build(), processor, top_k=1, has_embeddings=True).model,
        "page": load_script("app").open_viewer(str(tmp_path / "saved"), "main", False).model,
        "benchmark": ModelBenchmark("training", "Mi/8", 16, peers=()).models()[0][ACCELERATED],
    }
    for name, model in models.items():
        assert only_pooled_output(model.vit.eval()) == {"num_queries": 1}, name


def test_embeddings_for_predictions_cost_no_token_more(pixel_values, tokens_seen):
    model, expected = watched(build()), build()
    processor = ViTScratchImageProcessor(size={"height": 16, "width": 24})
    pixels = torch.randint(256, (2, 3, 16, 24), dtype=torch.uint8)
    found = Predictor(model, processor, top_k=2, has_embeddings=True)(pixels).embeddings
    assert tokens_seen == [1]
    values = processor(list(pixels), return_tensors="pt", do_resize=False)["pixel_values"]
    torch.testing.assert_close(torch.from_numpy(found), expected.vit(values).pooler_output.detach(), rtol=0, atol=1e-5)
