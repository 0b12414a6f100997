# SPDX-License-Identifier: Apache-2.0
"""
What people put on a model: quantisers, adapters, per-sample gradients, processes. A stock ViT goes the same way beside
ours, so that a failure here is ours.
"""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.acceleration.speed_up import speed_up


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SIZES |= {"image_size": 32, "patch_size": 8, "num_labels": 3}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "stock":
        return ViTForImageClassification(ViTConfig(**SIZES)).eval()
    return ViTScratchForImageClassification(ViTScratchConfig(**SIZES)).eval()


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def torchao(name: str, model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, getattr(quantization, name)())
    return model


def quanto(model: nn.Module) -> nn.Module:
    library = pytest.importorskip("optimum.quanto")
    library.quantize(model, weights=library.qint8)
    library.freeze(model)
    return model


def dynamic(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


QUANTISERS = {
    "torchao int8": lambda model: torchao("Int8WeightOnlyConfig", model),
    "torchao float8": lambda model: torchao("Float8WeightOnlyConfig", model),
    "torchao int8 dynamic": lambda model: torchao("Int8DynamicActivationInt8WeightConfig", model),
    "quanto int8": quanto,
    "torch int8 dynamic": dynamic,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["stock", "ours", "ours, faster"])
@pytest.mark.parametrize("name", list(QUANTISERS))
def test_quantised_weights_give_one_answer_in_every_mode(name, kind, pixel_values):
    model = build(kind)
    with torch.no_grad():
        exact = model(pixel_values).logits
        model = QUANTISERS[name](model)
        quantised = model(pixel_values).logits
        model = speed_up(model) if kind == "ours, faster" else model
        assert 0 < (quantised - exact).abs().max() < 0.5 * exact.abs().max()
        torch.testing.assert_close(model(pixel_values).logits, quantised, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(pixel_values, output_hidden_states=True).logits, quantised, rtol=0, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model(pixel_values).logits, quantised, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(pixel_values, output_attentions=False).logits, quantised, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_a_quantised_folder_opens_as_it_was_saved(kind, pixel_values, tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = build(kind)
    model.save_pretrained(tmp_path / "float")
    wanted = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    quantised = type(model).from_pretrained(tmp_path / "float", quantization_config=wanted).eval()
    assert type(quantised.get_submodule("classifier").weight) is not nn.Parameter
    quantised.save_pretrained(tmp_path / "int8")
    again = type(model).from_pretrained(tmp_path / "int8").eval()
    with torch.inference_mode():
        assert torch.equal(again(pixel_values).logits, quantised(pixel_values).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_eight_bit_linear_layers_of_bitsandbytes(kind, pixel_values, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model = build(kind)
    model.save_pretrained(tmp_path)
    wanted = BitsAndBytesConfig(load_in_8bit=True)
    quantised = type(model).from_pretrained(tmp_path, quantization_config=wanted).eval()
    assert any(type(module).__name__ == "Linear8bitLt" for module in quantised.modules())
    with torch.inference_mode():
        logits = quantised(pixel_values).logits
        torch.testing.assert_close(logits, model(pixel_values).logits, rtol=0, atol=0.1)
        torch.testing.assert_close(logits, quantised(pixel_values, output_hidden_states=True).logits)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("stock", "all-linear"), ("stock", ["q_proj", "v_proj"]), ("ours", "all-linear"), ("ours", ["qkv"])],
)
def test_every_adapter_learns(kind, targets, pixel_values):
    lora = LoraConfig(target_modules=targets, init_lora_weights=False)
    model = get_peft_model(build(kind), lora).train()
    model(pixel_values, labels=torch.tensor([0, 1])).loss.backward()
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert len(adapters) >= 4
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapters)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_per_sample_gradients_sum_to_the_gradient(kind, pixel_values):
    opacus = pytest.importorskip("opacus")
    plain, labels = build(kind).train(), torch.tensor([0, 1])
    plain(pixel_values, labels=labels).loss.backward()
    model = opacus.GradSampleModule(build(kind).train(), loss_reduction="mean")
    model(pixel_values, labels=labels).loss.backward()
    for (name, parameter), expected in zip(model._module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad_sample.mean(0), expected.grad, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_copies_and_pickles_answer_alike(kind, pixel_values):
    model = build(kind)
    with torch.no_grad():
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(pixel_values).logits, model(pixel_values).logits)


class Logits(nn.Module):
    """Of a classifier, as a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["stock", "ours", "ours, faster"])
def test_compiled_exported_and_traced_it_answers_alike(kind, pixel_values):
    model = speed_up(build(kind)) if kind == "ours, faster" else build(kind)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        logits = model(pixel_values).logits
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        exported = torch.export.export(
            model, (), {"pixel_values": pixel_values}, dynamic_shapes={"pixel_values": {0: batch}}
        ).module()
        traced = torch.jit.trace(Logits(model), pixel_values)
        torch.testing.assert_close(compiled(pixel_values).logits, logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(exported(pixel_values=pixel_values[:1]).logits, logits[:1], rtol=0, atol=1e-5)
        torch.testing.assert_close(traced(pixel_values), logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["stock", "ours"])
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_changes_no_number(kind, device_map, pixel_values, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map=device_map).eval()
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)


def test_a_folder_without_the_package_in_other_processes(tmp_path):
    # datasets.map pickles functions with dill, by value if a class's module is no attribute of its package.
    folder = tmp_path / "model"
    build("ours").save_pretrained(folder)
    ViTScratchImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    code = """
import datasets, numpy as np, pickle, sys, torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification

def main():
    folder = sys.argv[1]
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    images = [Image.fromarray(np.full((20, 20, 3), 30 * index, np.uint8)) for index in range(6)]
    data = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))

    def classify(batch):
        with torch.inference_mode():
            return {"logits": model(processor(batch["image"], return_tensors="pt")["pixel_values"]).logits.numpy()}

    found = [data.map(classify, batched=True, batch_size=2, num_proc=n)["logits"][:] for n in (1, 2)]
    np.testing.assert_allclose(*found, rtol=0, atol=1e-6)
    loaded = DataLoader(images, batch_size=2, num_workers=2, collate_fn=processor, multiprocessing_context="spawn")
    assert len(list(loaded)) == 3
    assert type(pickle.loads(pickle.dumps(processor))) is type(processor)
    print("done")

if __name__ == "__main__":
    main()
"""
    script = tmp_path / "main.py"  # a file: spawned processes import it
    script.write_text(code)
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", str(script), str(folder)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "done"
