# SPDX-License-Identifier: Apache-2.0
"""The network's own promises: what must stay true whatever the weights are."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from modeling_vit_scratch import (
    ViTScratchBackbone,
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchModel,
)


ALL_MODELS = [ViTScratchModel, ViTScratchForImageClassification, ViTScratchForMaskedImageModeling, ViTScratchBackbone]
EVERYTHING = {
    "num_register_tokens": 2,
    "layer_scale_init_value": 0.1,
    "qk_norm": True,
    "representation_size": 7,
    "position_embedding_placement": "every_layer",
}


def classifier(**options) -> ViTScratchForImageClassification:
    config = ViTScratchConfig.from_variant("test/4", **{"num_labels": 3, **options})
    return ViTScratchForImageClassification(config).eval()


# Precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {}, {**EVERYTHING, "drop_path_rate": 0.1}, {"position_embedding": "relative_1d"},
        {"use_distillation_token": True, "position_embedding": "learned_2d"},
        {"use_cls_token": False, "pooling": "mean", "position_embedding": "sincos_2d"},
    ],
    ids=["plain", "all", "relative", "distillation", "mean"],
)  # fmt: skip
def test_under_autocast_the_sum_of_branches_is_in_half_precision(pixel_values, options):
    config = ViTScratchConfig.from_variant("test/4", num_labels=3, **options)
    model = ViTScratchForMaskedImageModeling(config).train()
    types = []
    for layer in model.vit.layers:
        layer.register_forward_hook(lambda module, inputs, output: types.extend([inputs[0].dtype, output.dtype]))
    masked = torch.arange(24).reshape(1, 24).expand(len(pixel_values), -1) % 3 == 0
    with torch.autocast("cpu", torch.bfloat16):
        model(pixel_values, masked).loss.backward()
    assert set(types) == {torch.bfloat16}
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert model.vit.embeddings.mask_token.grad.abs().max() > 0


# Attention implementations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, EVERYTHING, {"position_embedding": "relative_1d"}], ids=["plain", "all", "relative"]
)
def test_implementations_agree_and_all_show_true_attentions(pixel_values, options):
    model = classifier(**options)
    logits, attentions = {}, {}
    names = ["eager", "sdpa"] + (["flex_attention"] if not options else [])  # flex compiles: slow on a CPU
    with torch.no_grad():
        for name in names:
            model.set_attn_implementation(name)
            logits[name] = model(pixel_values).logits
            attentions[name] = model(pixel_values, output_attentions=True).attentions
    tokens = 24 + model.config.num_prefix_tokens
    for name in logits:
        torch.testing.assert_close(logits[name], logits["eager"], rtol=0, atol=1e-5)
        assert [a.shape for a in attentions[name]] == [(2, 4, tokens, tokens)] * 2
        for one, other in zip(attentions[name], attentions["eager"]):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
            torch.testing.assert_close(one.sum(-1), torch.ones(2, 4, tokens), rtol=0, atol=1e-5)


def test_attentions_can_be_asked_of_the_config(pixel_values):
    model = classifier(output_attentions=True)
    model.set_attn_implementation("sdpa")
    assert len(model(pixel_values).attentions) == 2
    assert model(pixel_values, output_attentions=False).attentions is None


def test_flash_attention_refuses_relative_positions(pixel_values):
    model = classifier(position_embedding="relative_1d")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2' can't add relative positions.*'sdpa'"):
        model(pixel_values)


# Any size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position_embedding", ["learned_1d", "learned_2d", "sincos_2d", "relative_1d", "none"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "bicubic_antialias"])
def test_any_size_that_the_patch_divides_works(position_embedding, interpolation):
    model = classifier(position_embedding=position_embedding, position_embedding_interpolation=interpolation)
    for height, width in ((4, 4), (16, 24), (24, 16), (40, 8)):
        assert torch.isfinite(model(torch.randn(1, 3, height, width)).logits).all()


def test_resampling_keeps_a_plane_a_plane(config):
    # A position that grows evenly from left to right and from top to bottom must do so on every grid.
    table = ViTScratchModel(config).embeddings.position_embeddings
    plane = torch.linspace(0, 1, 4)[:, None] + 10 * torch.linspace(0, 1, 6)
    with torch.no_grad():
        table.weight[:, 1:] = plane.flatten()[:, None]
        got = table(torch.zeros(1, 1 + 7 * 11, 32), grid=(7, 11))[0, 1:, 0].reshape(7, 11)
    expected = torch.linspace(0, 1, 7)[:, None] + 10 * torch.linspace(0, 1, 11)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_relative_distances_on_a_larger_grid_are_those_of_the_same_places(config):
    config.position_embedding = "relative_1d"
    table = ViTScratchModel(config).layers[0].attention.relative_positions
    query = torch.randn(1, 4, 25, 8)
    # Every second place of a 7 x 11 grid is a place of the stored 4 x 6 grid.
    large = torch.zeros(1, 4, 1 + 77, 8)
    places = torch.arange(77).reshape(7, 11)[::2, ::2].flatten()
    large[:, :, 1 + places] = query[:, :, 1:]
    got = table(large, grid=(7, 11))[:, :, 1 + places][:, :, :, 1 + places]
    torch.testing.assert_close(got, table(query, grid=(4, 6))[:, :, 1:, 1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 25), r"Patches of 4 don't divide the image width 25.*24 or 28"),
        ((1, 3, 2, 24), r"Patches of 4 don't divide the image height 2.*to 4\."),
        ((1, 1, 16, 24), r"\(batch, 3 channels, height, width\), got \(1, 1, 16, 24\)"),
        ((3, 16, 24), r"got \(3, 16, 24\)"),
    ],
)
def test_an_image_that_cannot_work_gets_the_sizes_that_would(shape, message):
    with pytest.raises(ValueError, match=message):
        classifier()(torch.zeros(shape))


def test_pixels_that_no_processor_has_seen_are_refused():
    with pytest.raises(ValueError, match=r"got torch.uint8: use the image processor"):
        classifier()(torch.zeros(1, 3, 16, 24, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got None"):
        classifier()(None)


# Masks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_masked_patches_count_for_nothing(attn_implementation, pooling):
    # Without positions, patches that are masked out can as well be cut off.
    model = classifier(position_embedding="none", pooling=pooling)
    model.set_attn_implementation(attn_implementation)
    images = torch.randn(2, 3, 16, 24)
    prefix = model.config.num_prefix_tokens
    mask = torch.ones(2, prefix + 24, dtype=torch.long)
    mask[:, prefix + 12 :] = 0  # the lower half
    expected = model(images[:, :, :8]).logits
    torch.testing.assert_close(model(images, attention_mask=mask).logits, expected, rtol=0, atol=1e-5)
    asked = model(images, attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(asked.logits, expected, rtol=0, atol=1e-5)
    assert asked.attentions[0][..., prefix + 12 :].abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"attention_mask must have the shape"):
        model(images, attention_mask=mask[:, 1:])


def test_mask_tokens_hide_what_they_replace():
    config = ViTScratchConfig.from_variant("test/4")
    model = ViTScratchForMaskedImageModeling(config).eval()
    images, mask = torch.randn(2, 3, 24, 16), torch.zeros(2, 6, 4, dtype=torch.bool)
    mask[:, 1, 2] = True  # rows 4 to 7, columns 8 to 11
    other = images.clone()
    other[:, :, 4:8, 8:12] += 1
    a, b = model(images, bool_masked_pos=mask), model(other, bool_masked_pos=mask)
    torch.testing.assert_close(a.reconstruction, b.reconstruction, rtol=0, atol=0)
    error = (a.reconstruction - images).abs()[:, :, 4:8, 8:12].mean()
    torch.testing.assert_close(a.loss, error, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"\(batch, patches\) = \(2, 24\), got \(2, 23\)"):
        model(images, bool_masked_pos=mask.flatten(1)[:, 1:])
    with pytest.raises(ValueError, match=r"use_mask_token=True"):
        ViTScratchModel(config)(images, bool_masked_pos=mask)


# Losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
def test_classes_of_any_integer_type_give_the_cross_entropy(pixel_values, dtype, problem_type):
    model, labels = classifier(problem_type=problem_type), torch.tensor([2, 1])
    outputs = model(pixel_values, labels=labels.to(dtype))
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))
    assert model.config.problem_type == problem_type  # forward writes nothing


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
def test_probabilities_give_the_soft_cross_entropy(pixel_values, problem_type):
    model, labels = classifier(problem_type=problem_type), torch.tensor([[0.2, 0.8, 0.0], [1.0, 0.0, 0.0]])
    outputs = model(pixel_values, labels=labels)
    expected = -(labels * outputs.logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(outputs.loss, expected)
    assert model.config.problem_type == problem_type


def test_multi_label_and_regression_losses(pixel_values):
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    for targets in (labels, labels.long(), labels.bool()):
        outputs = classifier(problem_type="multi_label_classification")(pixel_values, labels=targets)
        torch.testing.assert_close(outputs.loss, F.binary_cross_entropy_with_logits(outputs.logits, labels))
    outputs = classifier(problem_type="regression")(pixel_values, labels=labels)
    torch.testing.assert_close(outputs.loss, F.mse_loss(outputs.logits, labels))
    outputs = classifier(num_labels=1)(pixel_values, labels=torch.tensor([1.5, -2.0]))
    torch.testing.assert_close(outputs.loss, F.mse_loss(outputs.logits[:, 0], torch.tensor([1.5, -2.0])))


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        (None, torch.tensor([2, 0, 1, 1])),
        (None, torch.tensor([2, -100, 1, 1])),
        ("single_label_classification", torch.rand(4, 3).softmax(-1)),
        ("multi_label_classification", (torch.rand(4, 3) < 0.5).float()),
        ("regression", torch.randn(4, 3)),
    ],
)
def test_parts_of_a_batch_add_up_to_its_loss(problem_type, labels):
    # What Trainer does under gradient accumulation, with its own count of items; the parts are of unequal size.
    model, images = classifier(problem_type=problem_type), torch.randn(4, 3, 16, 24)
    whole = model(images, labels=labels).loss
    count = labels.ne(-100).sum()
    parts = [model(images[s], labels=labels[s], num_items_in_batch=count).loss for s in (slice(0, 3), slice(3, 4))]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0.0, 1.0]), r"shape \(2,\), torch.float32, don't fit logits of shape \(2, 3\)"),
        (torch.tensor([[1, 0, 1], [0, 0, 1]]), r"problem_type='multi_label_classification'"),
        (torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]), r"rows of float labels must sum to 1"),
        (torch.tensor([0, 1, 2]), r"shape \(3,\)"),
    ],
)
def test_labels_that_could_mean_two_things_are_refused(pixel_values, labels, message):
    with pytest.raises(ValueError, match=message):
        classifier()(pixel_values, labels=labels)


def test_the_loss_is_float32_and_does_not_depend_on_the_name_of_the_class(pixel_values):
    class Renamed(ViTScratchForImageClassification):
        pass

    model = Renamed(classifier().config).to(torch.bfloat16).eval()
    outputs = model(pixel_values, labels=torch.tensor([0, 1]))
    assert (outputs.logits.dtype, outputs.loss.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits.float(), torch.tensor([0, 1])))


# Initialisation, dropout, stochastic depth ----------------------------------------------------------------------------


def test_initialisation_is_that_of_the_papers_code():
    config = ViTScratchConfig.from_variant("Ti/16", num_register_tokens=4, representation_size=192, zero_init_head=True)
    model = ViTScratchForImageClassification(config)
    state = model.state_dict()
    width, mlp = 192, 768
    for layer in range(12):
        name = f"vit.layers.{layer}"
        bounds = {f"{name}.attention.proj": 2 * width, f"{name}.mlp.fc1": width + mlp, f"{name}.mlp.fc2": width + mlp}
        matrices = {key: (state[f"{key}.weight"], fan) for key, fan in bounds.items()}
        # q, k and v are matrices of their own: the fused one must not have the bound of a (3D, D) matrix.
        matrices |= {
            part: (weight, 2 * width) for part, weight in zip("qkv", state[f"{name}.attention.qkv.weight"].chunk(3))
        }
        for key, (weight, fan) in matrices.items():
            bound = math.sqrt(6 / fan)
            assert 0.99 * bound < weight.abs().max() <= bound, key
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02), key
        for key in ("attention.qkv", "attention.proj"):
            assert not state[f"{name}.{key}.bias"].any()
        for key in ("mlp.fc1", "mlp.fc2"):
            assert state[f"{name}.{key}.bias"].std().item() == pytest.approx(1e-6, rel=0.2)
    for key, fan_in in (("vit.embeddings.patch_embeddings.projection", 768), ("vit.pooler.dense", width)):
        assert state[f"{key}.weight"].std().item() == pytest.approx(fan_in**-0.5, rel=0.02)  # lecun
        assert not state[f"{key}.bias"].any()
    assert state["vit.embeddings.position_embeddings.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert state["vit.embeddings.register_tokens"].std().item() == pytest.approx(0.02, rel=0.2)
    assert not state["vit.embeddings.cls_token"].any()
    assert not state["classifier.weight"].any()
    assert not state["classifier.bias"].any()


@pytest.mark.parametrize("model_class", ALL_MODELS)
def test_every_parameter_is_initialised(model_class):
    for options in (EVERYTHING, {"position_embedding": "learned_2d"}, {"position_embedding": "relative_1d"}):
        config = ViTScratchConfig.from_variant("test/4", **options)
        with torch.device("meta"):
            model = model_class(config)
        model = model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        for module in model.modules():
            module._is_hf_initialized = False
        model.initialize_weights()
        assert [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()] == []


def test_dropout_is_where_the_paper_puts_it(pixel_values):
    model = classifier(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    model.set_attn_implementation("eager")
    dropped = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda m, i, o, name=name: dropped.append(name))
    model(pixel_values)
    layer = ["attention.dropout", "mlp.dropout", "mlp.dropout"]  # after proj, after GELU, after fc2: B.1
    expected = ["vit.embeddings.dropout"] + [f"vit.layers.{i}.{name}" for i in range(2) for name in layer]
    assert dropped == expected
    weights = model(pixel_values, output_attentions=True).attentions[0]
    assert 0.3 < (weights == 0).float().mean() < 0.7
    model.eval()
    torch.testing.assert_close(model(pixel_values).logits, model(pixel_values).logits, rtol=0, atol=0)


def test_stochastic_depth_grows_linearly_and_keeps_the_mean():
    model = classifier(drop_path_rate=0.4, num_hidden_layers=5)
    assert [layer.drop_path.rate for layer in model.vit.layers] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    drop_path = model.vit.layers[4].drop_path.train()
    kept = drop_path(torch.ones(20_000, 2, 3))
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert (kept == kept[:, :1, :1]).all()  # whole images
    assert kept.mean().item() == pytest.approx(1, abs=0.03)


# transformers' machinery ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", ALL_MODELS)
def test_keys_on_disk_are_the_names_of_the_modules(model_class, tmp_path):
    model = model_class(ViTScratchConfig.from_variant("test/4", **EVERYTHING))
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == model.state_dict().keys()
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=0, msg=name)


def test_a_classifier_loads_into_the_backbone_and_the_encoder(tmp_path, pixel_values):
    model = classifier(num_register_tokens=1, representation_size=5)
    model.save_pretrained(tmp_path)
    states = model(pixel_values, output_hidden_states=True).hidden_states
    backbone, info = ViTScratchBackbone.from_pretrained(
        tmp_path, out_features=["stem", "stage2"], output_loading_info=True
    )
    assert not info["missing_keys"]
    maps = backbone.eval()(pixel_values).feature_maps
    assert [m.shape for m in maps] == [(2, 32, 4, 6)] * 2
    assert backbone.channels == [32, 32]
    for feature_map, state in zip(maps, (states[0], states[2])):
        expected = model.vit.layernorm(state)[:, 2:].reshape(2, 4, 6, 32).permute(0, 3, 1, 2)
        torch.testing.assert_close(feature_map, expected, rtol=0, atol=1e-6)
    encoder = ViTScratchModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(encoder(pixel_values).last_hidden_state[:, 0], model.vit.layernorm(states[-1])[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [EVERYTHING, {"position_embedding": "relative_1d"}, {"position_embedding": "sincos_2d"}]
)
def test_half_precision_takes_float32_pixels_of_any_size(dtype, options):
    model = classifier(**options)
    images = torch.randn(2, 3, 8, 32)
    expected = model(images).logits
    logits = model.to(dtype)(images).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "options", [EVERYTHING, {"position_embedding": "relative_1d"}, {"position_embedding": "sincos_2d"}]
)
def test_gradient_checkpointing_changes_no_gradient(pixel_values, options):
    plain, checkpointed = (classifier(**options).train() for _ in range(2))
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model(pixel_values, labels=torch.tensor([0, 2])).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("options", [EVERYTHING, {"position_embedding": "relative_1d"}])
def test_compiles_without_a_graph_break(pixel_values, options):
    model = classifier(**options)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for images in (pixel_values, torch.randn(2, 3, 24, 24)):
        torch.testing.assert_close(compiled(images).logits, model(images).logits, rtol=0, atol=1e-5)
    labels = torch.tensor([0, 1])
    torch.testing.assert_close(compiled(images, labels=labels).loss, model(images, labels=labels).loss)


@pytest.mark.parametrize(
    "options", [{}, EVERYTHING, {"position_embedding": "relative_1d"}, {"position_embedding": "sincos_2d"},
                {"position_embedding_interpolation": "bicubic"}],
)  # fmt: skip
def test_exports_with_open_batch_and_size(options):
    model = classifier(**options)
    batch, rows, columns = (torch.export.Dim(name, min=1, max=64) for name in ("batch", "rows", "columns"))
    shapes = {"pixel_values": {0: batch, 2: 4 * rows, 3: 4 * columns}}
    program = torch.export.export(
        model, (), {"pixel_values": torch.randn(2, 3, 20, 12)}, dynamic_shapes=shapes
    ).module()
    for shape in ((1, 3, 16, 24), (3, 3, 40, 28), (2, 3, 8, 8)):  # export takes a row of one patch apart
        images = torch.randn(shape)
        torch.testing.assert_close(program(pixel_values=images).logits, model(images).logits, rtol=0, atol=1e-5)


def test_device_map_and_meta_device_loading(tmp_path, pixel_values):
    model = classifier(**EVERYTHING)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    for device_map in ("cpu", "auto", {"": "cpu"}):
        loaded = ViTScratchForImageClassification.from_pretrained(tmp_path, device_map=device_map).eval()
        torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values).logits, rtol=0, atol=1e-6)
    parts = {"vit.embeddings", "vit.later_position_embeddings", "vit.layernorm", "vit.pooler", "classifier"}
    device_map = {**dict.fromkeys(parts, "cpu"), "vit.layers": "disk"}
    offloaded = ViTScratchForImageClassification.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    ).eval()
    torch.testing.assert_close(offloaded(pixel_values).logits, model(pixel_values).logits, rtol=0, atol=1e-6)


def test_lora_on_the_fused_projection_reaches_the_class_token(pixel_values):
    from peft import LoraConfig, get_peft_model

    model = classifier()
    before = model(pixel_values).logits
    lora = LoraConfig(
        target_modules=["qkv", "proj", "fc1", "fc2"], modules_to_save=["classifier"], init_lora_weights=False
    )
    adapted = get_peft_model(copy.deepcopy(model), lora).eval()
    short = adapted(pixel_values).logits
    assert (short - before).abs().max() > 1e-3
    full = adapted(pixel_values, output_hidden_states=True).logits
    torch.testing.assert_close(short, full, rtol=0, atol=1e-5)
    adapted(pixel_values, labels=torch.tensor([0, 1])).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert any("layers.1.attention.qkv.lora_B" in name for name in trained)
    assert all("lora" in name or "classifier" in name for name in trained)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(pixel_values).logits, short, rtol=0, atol=1e-5)


def test_nothing_is_tied_and_a_batch_equals_its_rows(pixel_values):
    model = classifier(**EVERYTHING)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(pointers) == len(set(pointers))
    rows = torch.cat([model(image[None]).logits for image in pixel_values])
    np.testing.assert_allclose(model(pixel_values).logits.detach(), rows.detach(), rtol=0, atol=1e-6)


def test_return_dict_false_gives_a_tuple_and_no_labels_give_features(pixel_values):
    loss, logits = classifier()(pixel_values, labels=torch.tensor([0, 1]), return_dict=False)
    assert (loss.shape, logits.shape) == ((), (2, 3))
    for kind in ALL_MODELS:
        model = kind(ViTScratchConfig.from_variant("test/4", return_dict=False)).eval()
        assert isinstance(model(pixel_values), tuple)
        torch.testing.assert_close(model(pixel_values), model(pixel_values, return_dict=True).to_tuple())
    assert classifier(num_labels=0)(pixel_values).logits.shape == (2, 32)
