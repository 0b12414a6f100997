# SPDX-License-Identifier: Apache-2.0
"""
The network does what its page says, for every tool: a replaced forward is called, hooks of each kind fire on each layer
and see every token, tracers and exporters record what the model computes. Nothing here may depend on what is looked at.
"""

import warnings
from collections import Counter

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from modeling_vit_scratch import (
    ViTScratchBackbone,
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchModel,
)


OPTIONS = {
    "default": {},
    "mean": {"pooling": "mean", "norm_after_pooling": True, "use_cls_token": True},
    "distillation": {"use_distillation_token": True, "use_distillation_head": True, "position_embedding": "learned_2d"},
    "relative": {"position_embedding": "relative_1d", "num_register_tokens": 1},
    "every layer": {
        "position_embedding_placement": "every_layer", "qk_norm": True, "layer_scale_init_value": 0.1,
        "representation_size": 7,
    },
    "shared": {"position_embedding_placement": "every_layer_shared", "position_embedding": "sincos_2d"},
    "hybrid": {"stem_layers": [1, 1], "patch_size": 8},
}  # fmt: skip
# Models: their outputs are no tensors, for which torch has no backward hooks.
RETURN_OUTPUTS = {"", "vit"}
KINDS = [ViTScratchForImageClassification, ViTScratchForMaskedImageModeling, ViTScratchModel, ViTScratchBackbone]


def build(name: str = "default", kind: type = ViTScratchForImageClassification) -> nn.Module:
    torch.manual_seed(0)
    model = kind(ViTScratchConfig.from_variant("test/4", num_labels=3, **OPTIONS[name])).eval()
    with torch.no_grad():  # biases and scales too
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape))
    return model


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """All but the lists of layers, which nobody calls."""
    return {name: module for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}


def result(outputs) -> torch.Tensor:
    names = ("logits", "reconstruction", "pooler_output", "feature_maps")
    found = next(outputs[name] for name in names if name in outputs)
    return found[-1] if isinstance(found, tuple) else found


CASES = [(name, KINDS[0]) for name in OPTIONS] + [("every layer", kind) for kind in KINDS[1:]]


@pytest.mark.parametrize("has_gradients", [True, False])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_replaced_forward_is_called_wherever_it_is(pixel_values, name, kind, has_gradients):
    model, calls = build(name, kind), Counter()

    def replace(name: str, layer: nn.Module) -> None:
        original = layer.forward

        def forward(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        layer.forward = forward

    with torch.set_grad_enabled(has_gradients):
        before = result(model(pixel_values))
        for path, layer in layers_of(model).items():
            replace(path, layer)
        after = result(model(pixel_values))
    assert torch.equal(before, after)
    assert layers_of(model).keys() - calls.keys() == set()


@pytest.mark.parametrize("has_gradients", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_forward_that_computes_something_else_changes_the_logits(pixel_values, name, has_gradients):
    # One layer after the other: what adapters and quantisers do.
    def change(layer: nn.Module) -> None:
        original = layer.forward

        def forward(*args, **kwargs):
            output = original(*args, **kwargs)
            return (output[0].sin(), *output[1:]) if isinstance(output, tuple) else output.sin()

        layer.forward = forward

    model = build(name)
    with torch.set_grad_enabled(has_gradients):
        before = model(pixel_values).logits
        for path, layer in layers_of(model).items():
            # The last layer's relative positions are between patches, at which nobody looks any more.
            if path not in RETURN_OUTPUTS and not path.endswith("layers.1.attention.relative_positions"):
                change(layer)
                assert (model(pixel_values).logits - before).abs().max() > 1e-4, path
                del layer.forward
        assert torch.equal(model(pixel_values).logits, before)


# transformers' hook takes the backbone's states out of the layers before the backward hooks of torch see them.
@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[1] is not ViTScratchBackbone])
def test_hooks_of_every_kind_fire_on_every_layer(pixel_values, name, kind):
    model, fired = build(name, kind), {kind: set() for kind in ("pre", "forward", "backward pre", "backward")}
    unhooked = result(model(pixel_values))
    for path, layer in layers_of(model).items():
        layer.register_forward_pre_hook(lambda *_, path=path: fired["pre"].add(path))
        layer.register_forward_hook(lambda *_, path=path: fired["forward"].add(path))
        if path not in RETURN_OUTPUTS:
            layer.register_full_backward_pre_hook(lambda *_, path=path: fired["backward pre"].add(path))
            layer.register_full_backward_hook(lambda *_, path=path: fired["backward"].add(path))
    hooked = result(model(pixel_values))
    assert torch.equal(hooked, unhooked)
    hooked.sum().backward()
    everything = set(layers_of(model))
    assert (everything - fired["pre"], everything - fired["forward"]) == (set(), set())
    # Identities and dropouts hand on the tensor itself: torch calls backward hooks there, too.
    assert everything - RETURN_OUTPUTS - fired["backward pre"] == set()
    assert everything - RETURN_OUTPUTS - fired["backward"] == set()


@pytest.mark.parametrize("has_gradients", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_hook_anywhere_sees_every_token(pixel_values, name, has_gradients):
    model, shapes = build(name), {}

    def note(path: str, output) -> None:
        output = output[0] if isinstance(output, tuple) else output
        shapes[path] = tuple(getattr(output, "last_hidden_state", output).shape)

    with torch.set_grad_enabled(has_gradients):
        for path, layer in layers_of(model.vit).items():  # one at a time: nobody else looks
            handle = layer.register_forward_hook(lambda _, inputs, output, path=path: note(path, output))
            model(pixel_values)
            handle.remove()
    tokens = model.config.num_prefix_tokens + np.prod(model.config.grid_hw)
    for path in ("", "layernorm", "layers.0", "layers.1", "layers.1.mlp.fc1", "layers.1.attention.qkv", "embeddings"):
        assert shapes[path][:2] == (2, tokens), path
    for path in (path for path in shapes if path.startswith("layers.0.")):
        assert shapes[path.replace("layers.0.", "layers.1.")] == shapes[path]


@pytest.mark.parametrize("has_gradients", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_what_else_is_asked_for_changes_no_logits(pixel_values, name, has_gradients):
    model = build(name)
    with torch.set_grad_enabled(has_gradients):
        logits = model(pixel_values).logits
        assert torch.equal(model(pixel_values, output_hidden_states=True).logits, logits)
        assert torch.equal(model(pixel_values).logits, logits)
        attentions = model(pixel_values, output_attentions=True)
    torch.testing.assert_close(attentions.logits, logits, rtol=0, atol=2e-6)  # eager attention, spelled out


def test_gradients_change_nothing(pixel_values):
    for name in OPTIONS:
        model = build(name)
        with torch.no_grad():
            expected = model(pixel_values).logits
        torch.testing.assert_close(model(pixel_values).logits, expected, rtol=0, atol=2e-6)  # torch's own kernels


# Tools ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_layers_get_tensors_by_position_and_all_else_by_name(pixel_values, name, kind):
    # Opacus takes `[tensor.detach() for tensor in inputs]` of each layer with weights of its own, and captum replaces
    # what `vit.embeddings` gets: neither can handle None or a number there.
    model, inputs = build(name, kind), {}
    for path, layer in layers_of(model).items():
        layer.register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args}))
    model(pixel_values)
    for path, args in inputs.items():
        assert len(args) == 1 or path == "", path
        assert torch.is_tensor(args[0]), path


@pytest.mark.parametrize("name", OPTIONS)
def test_each_layer_with_weights_can_be_computed_again_from_its_input(pixel_values, name):
    # Per-sample gradients as Opacus computes them: the layer alone, on each image, against autograd's sum.
    model, activations, gradients = build(name), {}, {}
    own = {path: dict(layer.named_parameters(recurse=False)) for path, layer in layers_of(model).items()}
    for path, layer in layers_of(model).items():
        if own[path]:
            layer.register_forward_hook(lambda _, args, __, path=path: activations.update({path: args[0].detach()}))
            layer.register_full_backward_hook(lambda _, __, grads, path=path: gradients.update({path: grads[0]}))
    model(pixel_values).logits.sum().backward()
    alone = build(name)  # without hooks
    for path in gradients:
        layer = alone.get_submodule(path)

        def product(weights, inputs, output_gradient, layer=layer):
            return (functional_call(layer, weights, (inputs[None],))[0] * output_gradient).sum()

        weights = {key: weight.detach() for key, weight in layer.named_parameters()}
        each = vmap(grad(product), in_dims=(None, 0, 0))(weights, activations[path], gradients[path])
        for key, weight in own[path].items():
            torch.testing.assert_close(each[key].sum(0), weight.grad, rtol=1e-4, atol=1e-5, msg=f"{path}.{key}")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("has_gradients", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_traces_give_the_logits_of_any_batch(pixel_values, name, has_gradients):
    model, others = build(name), torch.randn(5, 3, 16, 24)
    with torch.set_grad_enabled(has_gradients):
        traced = torch.jit.trace(model, pixel_values, strict=False)
        torch.testing.assert_close(traced(others)["logits"], model(others).logits, rtol=0, atol=2e-6)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


@pytest.mark.parametrize("name", OPTIONS)
def test_the_older_onnx_exporter_leaves_the_batch_open(pixel_values, name, tmp_path):
    model = Logits(build(name)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (pixel_values,), tmp_path / "model.onnx", dynamo=False, input_names=["pixels"],
            output_names=["logits"], dynamic_axes={"pixels": {0: "batch"}, "logits": {0: "batch"}},
        )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for images in (pixel_values, torch.randn(5, 3, 16, 24), torch.randn(1, 3, 16, 24)):
        (logits,) = session.run(None, {"pixels": images.numpy()})
        np.testing.assert_allclose(logits, model(images).detach(), rtol=0, atol=1e-5)


def test_the_patch_projection_is_a_convolution_to_everybody(pixel_values):
    model = build()
    projection, seen = model.vit.embeddings.patch_embeddings.projection, []
    assert isinstance(projection, nn.Conv2d)
    projection.register_forward_hook(lambda _, inputs, output: seen.append(output))
    model(pixel_values)
    expected = nn.functional.conv2d(pixel_values, projection.weight, projection.bias, stride=projection.stride)
    assert seen[0].shape == (2, 32, 4, 6)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-5)
