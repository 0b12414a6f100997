# SPDX-License-Identifier: Apache-2.0
"""Programs of a classifier: what they compute without this package, at any batch and size, and what is refused."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import start_script
from PIL import Image
from tiny_images import CLASSES, class_folders, image, load_script
from transformers.exporters import ExportedModel

from exporting.calibration import Difference, check_agreement, read_images
from exporting.export import Comparison, check, compare, export, missing_packages, photographs
from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.common.errors import InputError
from startup.status import run_command_line


def needs(name: str):
    missing = missing_packages(name)
    return pytest.mark.skipif(bool(missing), reason=f'{missing}: pip install -e ".[export]"')


FORMATS = [pytest.param(name, marks=needs(name)) for name in ("torch", "onnx", "openvino")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved classifier of three labels with a temperature, and its processor: 16 rows, 24 columns, patches of 4."""
    torch.manual_seed(0)
    names = dict(enumerate(CLASSES))
    label2id = {name: index for index, name in names.items()}
    config = ViTScratchConfig.from_variant("test/4", id2label=names, label2id=label2id, temperature=1.7)
    model = ViTScratchForImageClassification(config)
    torch.nn.init.normal_(model.classifier.weight)  # made of zeros
    path = tmp_path_factory.mktemp("exported") / "model"
    model.save_pretrained(path)
    ViTScratchImageProcessor(size={"height": 16, "width": 24}).save_pretrained(path)
    return path


def run_script(monkeypatch, *argv) -> int:
    monkeypatch.setattr(sys, "argv", ["scripts/export.py", *map(str, argv)])
    return run_command_line(load_script("export").main)


@pytest.mark.parametrize("name", FORMATS)
def test_a_program_computes_what_its_model_does(folder, tmp_path, monkeypatch, capsys, name):
    class_folders(tmp_path / "pets")
    flags = ("--format", name, "--any_size", "--rounds", 1, "--batch_size", 3, "--dataset", tmp_path / "pets")
    assert run_script(monkeypatch, folder, tmp_path / "program", *flags) == 0
    told = capsys.readouterr().out
    assert "100% have the same best label" in told
    right = [line for line in told.splitlines() if line.startswith("Of 12 images")]
    assert right[0].count(right[0].split(": ")[1].split(" by ")[0]) >= 2  # as many by the program as by the model

    model = ViTScratchForImageClassification.from_pretrained(folder).eval()
    batches = [torch.randn(*shape) for shape in ((5, 3, 16, 24), (1, 3, 16, 24), (2, 3, 8, 8), (2, 3, 40, 12))]
    with torch.no_grad():
        torch.save([(batch, model(batch).logits) for batch in batches], tmp_path / "cases.pt")
    code = f"""
import sys, torch
sys.modules["modeling_vit_scratch"] = None  # a stranger has not got it
from transformers.exporters import ExportedModel
model = ExportedModel.from_pretrained("program", trust_remote_code=True)
{'model.to(config={"INFERENCE_PRECISION_HINT": "f32"})' if name == "openvino" else ""}
for pixel_values, expected in torch.load("cases.pt"):
    got = torch.as_tensor(model(pixel_values=pixel_values).logits)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
"""
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr


@needs("onnx")
def test_weights_of_8_bits_are_nearly_the_model(folder, tmp_path, monkeypatch, capsys):
    assert run_script(monkeypatch, folder, tmp_path / "int8", "--int8", "--rounds", 0) == 0
    model = ViTScratchForImageClassification.from_pretrained(folder).eval()
    program = ExportedModel.from_pretrained(tmp_path / "int8", trust_remote_code=True)
    assert 1e-5 < compare(model, program, torch.randn(4, 3, 16, 24)).difference < 0.5
    import onnx

    # Signed weights overflow on processors with AVX2 and no VNNI: a program must answer alike on all.
    types = {weight.data_type for weight in onnx.load(next((tmp_path / "int8").glob("*.onnx"))).graph.initializer}
    assert onnx.TensorProto.UINT8 in types
    assert onnx.TensorProto.INT8 not in types


def test_weights_of_8_bits_that_are_too_far_from_the_model_are_refused(folder, tmp_path, monkeypatch, capsys):
    check(Comparison(n=10, difference=2.0, relative_difference=0.06, agreement=0.9), "onnx", int8=True)
    for relative, agreement in ((0.3, 1.0), (0.06, 0.7), (float("nan"), 1.0)):
        with pytest.raises(InputError, match="Nothing was written"):
            check(
                Comparison(n=10, difference=0.1, relative_difference=relative, agreement=agreement), "onnx", int8=True
            )
    monkeypatch.setattr("exporting.export.compare", lambda *_: Comparison(10, 2.0, 0.7, 0.6))
    if not missing_packages("onnx"):
        assert run_script(monkeypatch, folder, tmp_path / "int8", "--int8") == 2
        assert "70% of their spread (15% is allowed), and 60% have" in capsys.readouterr().err
        assert not (tmp_path / "int8").exists()


@needs("openvino in int8")
def test_products_of_8_bits_are_nearly_the_model_or_are_refused(folder, tmp_path, monkeypatch, capsys):
    class_folders(tmp_path / "pets", each=40)
    output, flags = tmp_path / "int8", ["--format", "openvino", "--int8", "--calibration_dir", tmp_path / "pets"]
    assert run_script(monkeypatch, folder, output, *flags) == 2
    told = capsys.readouterr().err
    assert "has 120 images" in told
    assert "--calibration_images 20." in told
    flags += ["--calibration_images", 20, "--rounds", 1]
    assert run_script(monkeypatch, folder, output, *flags) == 0
    told = capsys.readouterr().out
    n, right = 100, re.search(r"Right: (\d+) .* in float32, (\d+) .* in int8", told)
    assert f"of {n} images that did not calibrate" in told
    assert told.index("the program in float32") < told.index(f"{output}: ")  # speed, then the file

    import openvino

    # By OpenVINO alone, and without what reads and counts in the script.
    program = openvino.Core().read_model(output / "openvino_model.xml")
    products = [op for op in program.get_ops() if op.get_type_name() in ("MatMul", "Convolution")]
    kinds = [{source.get_node().get_type_name() for source in op.input_values()} for op in products]
    assert sum("FakeQuantize" in kind for kind in kinds) > len(products) / 2
    stored = {op.get_element_type().get_type_name() for op in program.get_ops() if op.get_type_name() == "Constant"}
    assert "i8" in stored
    compiled = openvino.Core().compile_model(program, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    model = ViTScratchForImageClassification.from_pretrained(folder).eval()
    processor = ViTScratchImageProcessor.from_pretrained(folder)
    images = [image(label, number) for label in range(3) for number in range(40)]
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values).logits
    got = torch.as_tensor(compiled(pixel_values.numpy())[0])
    assert 1e-5 < (got - expected).abs().max() < 0.2 * expected.std()
    assert (got.argmax(-1) == expected.argmax(-1)).float().mean() > 0.95
    counted = (expected.argmax(-1) == torch.arange(3).repeat_interleave(40)).sum().item()
    assert counted - 20 <= int(right[1]) <= counted  # of 100 of these 120

    def wrong(*arguments, calibration=None):
        made = export(*arguments)
        if calibration is None:
            return made
        return lambda pixel_values: SimpleNamespace(logits=-torch.as_tensor(made(pixel_values=pixel_values).logits))

    monkeypatch.setattr("exporting.calibration.export", wrong)
    assert run_script(monkeypatch, folder, tmp_path / "wrong", *flags) == 2
    told = capsys.readouterr().err
    assert "0.00% of 100 images have the same best label" in told
    assert "Nothing was written" in told
    assert not (tmp_path / "wrong").exists()


def test_the_least_agreement_is_kept_to():
    difference = Difference(n=200, agreement=0.9699, right=(110, 109))
    with pytest.raises(InputError, match=r"96\.99% of 200 .* asks for 97\.00%.* --min_agreement 0\.969"):
        check_agreement(difference, 0.97)
    check_agreement(difference, 0.969)


def test_calibration_images_need_no_labels(folder, tmp_path):
    model = ViTScratchForImageClassification.from_pretrained(folder)
    examples, has_labels = read_images(str(class_folders(tmp_path / "pets", each=2)), model)
    assert has_labels
    assert examples.labels == [0, 0, 1, 1, 2, 2]
    model.config.id2label = dict(enumerate(reversed(CLASSES)))
    assert read_images(str(tmp_path / "pets"), model)[0].labels == [2, 2, 1, 1, 0, 0]
    model.config.id2label = {0: "cat", 1: "dog", 2: "zebra"}
    examples, has_labels = read_images(str(tmp_path / "pets"), model)
    assert (len(examples), has_labels) == (6, False)
    examples, has_labels = read_images(str(tmp_path / "pets" / "cat"), model)  # loose files
    assert (len(examples), has_labels) == (2, False)
    model.config.problem_type = "regression"
    with pytest.raises(InputError, match="predicts a number"):
        read_images(str(tmp_path / "pets"), model)


@needs("onnx")
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_every_kind_of_position_as_onnx(pooling, tmp_path):
    """In a process of its own: ONNX Runtime once died of relative positions with a class token."""
    kinds = ["learned_2d", "sincos_2d", "relative_1d", "none"]
    script = tmp_path / "export_all.py"
    script.write_text(f"""
import torch
from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from exporting.export import check, compare, export
for kind in {kinds}:
    fields = dict(num_labels=3, num_hidden_layers=1, position_embedding=kind, pooling={pooling!r})
    config = ViTScratchConfig.from_variant("test/4", **fields)
    model = ViTScratchForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight)
    check(compare(model, export(model, "onnx"), torch.randn(3, 3, 16, 24)), "onnx")
    print("right:", kind, flush=True)
""")
    run = start_script([script], tmp_path, tmp_path / "log")
    assert run.wait() == 0, run.printed[-2000:]
    assert [line for line in run.printed.splitlines() if line.startswith("right:")] == [f"right: {k}" for k in kinds]


def test_a_program_that_computes_something_else_is_not_written(folder):
    model = ViTScratchForImageClassification.from_pretrained(folder).eval()

    def wrong(pixel_values):
        output = model(pixel_values=pixel_values)
        output.logits = output.logits + 2e-4
        return output

    comparison = compare(model, wrong, torch.randn(2, 3, 16, 24))
    assert comparison.agreement == 1
    with pytest.raises(InputError, match=r"2.0e-04 \(1e-04 is allowed\).*Nothing was written"):
        check(comparison, "torch")

    def nothing(pixel_values):
        return {"logits": torch.full((len(pixel_values), 3), torch.nan)}

    with pytest.raises(InputError, match="nan"):
        check(compare(model, nothing, torch.randn(2, 3, 16, 24)), "torch")


@pytest.mark.parametrize(
    ("flags", "part", "status"),
    [
        (("--format", "torch", "--int8"), "--int8 goes with --format onnx", 2),
        (("--format", "openvino", "--int8"), "give --calibration_dir DIR", 2),
        (("--int8", "--calibration_dir", "pets"), "--calibration_dir goes with --format openvino --int8", 2),
        (("--format", "openvino", "--int8", "--calibration_dir", "pets", "--min_agreement", "97"), "from 0 to 1", 2),
        (("--rounds", "-1"), "--rounds -1", 2),
        (("--images", "broken.png"), "broken.png", 1),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(folder, tmp_path, monkeypatch, capsys, flags, part, status):
    monkeypatch.chdir(tmp_path)
    Path("broken.png").write_bytes(b"broken")
    monkeypatch.setattr("exporting.export.missing_packages", lambda name: [])
    assert run_script(monkeypatch, folder, "program", *flags) == status
    assert part in capsys.readouterr().err
    assert not Path("program").exists()


def test_a_folder_is_not_overwritten(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert run_script(monkeypatch, folder, tmp_path / "mine", "--format", "torch") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_only_an_earlier_program_is_replaced(folder, tmp_path, monkeypatch, capsys):
    """Not the model, not the folder that holds it or the images, nothing that no export wrote."""
    outputs, picture = tmp_path / "outputs", tmp_path / "outputs" / "photo.png"
    shutil.copytree(folder, outputs / "model")
    Image.new("RGB", (30, 20)).save(picture)
    before = {path: path.read_bytes() for path in outputs.rglob("*") if path.is_file()}
    flags = ("--format", "torch", "--rounds", 0, "--images", picture, picture, "--overwrite")
    (tmp_path / "link").symlink_to(outputs / "model")
    for output, part in (
        (outputs / "model", "is or holds"), (outputs, "is or holds"), (picture, "is or holds"),
        (tmp_path / "link", "is or holds"),
    ):  # fmt: skip
        assert run_script(monkeypatch, outputs / "model", output, *flags) == 2
        assert part in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text("{}")
    for name in ("config.json", "export.json"):  # also where it looks like a program, with one file more
        assert run_script(monkeypatch, outputs / "model", tmp_path / "other", *flags) == 2
        assert "it holds results.json" in capsys.readouterr().err
        (tmp_path / "other" / name).write_text("{}")
    assert {path: path.read_bytes() for path in outputs.rglob("*") if path.is_file()} == before

    program = tmp_path / "program"
    for _ in range(2):
        assert run_script(monkeypatch, outputs / "model", program, *flags) == 0
        assert (program / "export.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "other", "outputs", "program"]
    (program / "notes.txt").write_text("mine")
    assert run_script(monkeypatch, outputs / "model", program, *flags) == 2
    assert (program / "notes.txt").read_text() == "mine"


def test_a_package_that_is_missing_is_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_packages("onnx") == ["onnx", "onnxscript", "onnxruntime"]


def test_the_photographs_are_real():
    images = photographs()
    assert len(images) == 10
    assert all(isinstance(image, Image.Image) and min(image.size) > 200 for image in images)
