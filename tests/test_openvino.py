# SPDX-License-Identifier: Apache-2.0
"""Models compiled by OpenVINO: torch's outputs for any batch and kind of model, and predict.py with them."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_prediction import here, place, predict, table_in  # noqa: F401
from tiny_images import load_script

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchModel
from modeling_vit_scratch.acceleration import openvino
from modeling_vit_scratch.acceleration.openvino import Program
from modeling_vit_scratch.acceleration.speed_up import speed_up
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.prediction import job as jobs
from modeling_vit_scratch.prediction import model as predictors
from modeling_vit_scratch.prediction import reading


pytest.importorskip("openvino", reason='pip install -e ".[openvino]"')


def classifier(**fields) -> ViTScratchForImageClassification:
    config = ViTScratchConfig.from_variant("test/4", num_labels=3, zero_init_head=False, **fields)
    return speed_up(ViTScratchForImageClassification(config).eval())


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"temperature": 1.7}, torch.float32),
        ({"position_embedding": "rope_2d", "pooling": "mean"}, torch.float32),
        ({"position_embedding": "relative_1d", "pooling": "map"}, torch.float32),
        ({}, torch.bfloat16),
    ],
)
def test_logits_and_embeddings_are_torch_s(fields, dtype):
    model = classifier(**fields).to(dtype)
    program = Program(model, (3, 16, 24), True, threads=1)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    for count in (1, 5):
        pixel_values = torch.randn(count, 3, 16, 24)
        seen = []
        hook = model.classifier.register_forward_pre_hook(lambda layer, inputs, seen=seen: seen.append(inputs[0]))
        with torch.inference_mode():
            expected = model(pixel_values.to(dtype)).logits.float()
        hook.remove()
        logits, embeddings = program(pixel_values)
        assert (logits - expected).abs().max() < tolerance * expected.abs().max()
        assert (embeddings - seen[0].float()).abs().max() < tolerance * seen[0].abs().max()


def test_an_encoder_gives_its_pooled_output_and_threads_get_their_own():
    model = speed_up(ViTScratchModel(ViTScratchConfig.from_variant("test/4")).eval())
    program = Program(model, (3, 16, 24), True, threads=2, streams=2)
    parts = torch.randn(24, 3, 16, 24).split(2)
    with torch.inference_mode():
        expected = torch.cat([model(part).pooler_output for part in parts])
    with ThreadPoolExecutor(2) as pool:
        torch.testing.assert_close(torch.cat([one for (one,) in pool.map(program, parts)]), expected)


def test_what_is_not_torch_s_is_refused(monkeypatch):
    with pytest.raises(InputError, match=r"not torch\.float16 on cpu"):
        Program(classifier().half(), (3, 16, 24), False, threads=1)
    with pytest.raises(InputError, match="can't compile this model"):
        Program(classifier(), (3, 15, 24), False, threads=1)
    compile_model = openvino._compile

    def compile_another(outputs, *arguments):
        return compile_model(openvino._Outputs(classifier(), False).eval(), *arguments)

    monkeypatch.setattr(openvino, "_compile", compile_another)
    with pytest.raises(InputError, match="does not compute what torch does: they differ by"):
        Program(classifier(), (3, 16, 24), False, threads=1)
    monkeypatch.setattr(openvino, "is_installed", lambda: False)
    with pytest.raises(InputError, match="is not installed: pip install"):
        Program(classifier(), (3, 16, 24), False, threads=1)


def test_predict_writes_what_torch_does_and_goes_on_with_what_it_was_begun_with(here, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(jobs, "BLOCK", 4)
    flags = ["model", "photos", "--embeddings", "--top_k", "2", "--per_device_eval_batch_size", "2", "--output"]
    assert predict(monkeypatch, *flags, tmp_path / "torch.jsonl") == 0  # auto, and not worth it
    monkeypatch.setattr(predictors, "PAYS_FROM", 0)
    assert predict(monkeypatch, *flags, tmp_path / "auto.jsonl") == 0
    read, left = reading.ItemDataset._read, [7]

    def stopping(self, item, content):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, item, content)

    monkeypatch.setattr(reading.ItemDataset, "_read", stopping)
    stopped = tmp_path / "stopped.jsonl"
    assert predict(monkeypatch, *flags, stopped, "--backend", "openvino") == 143
    settings = json.loads((tmp_path / "stopped.jsonl.parts" / "job.json").read_text())
    assert settings["backend"].startswith("openvino 20")
    monkeypatch.setattr(predictors, "PAYS_FROM", 1e30)
    capsys.readouterr()
    assert predict(monkeypatch, *flags, stopped, "--backend", "torch") == 2
    assert "backend: torch now, openvino" in capsys.readouterr().err
    assert predict(monkeypatch, *flags, stopped) == 0
    assert stopped.read_bytes() == (tmp_path / "auto.jsonl").read_bytes()
    ours, theirs = table_in(tmp_path / "torch.jsonl"), table_in(stopped)
    assert ours != theirs  # somebody else computed, and rounded
    assert [row["label"] for row in ours] == [row["label"] for row in theirs]
    for one, other in zip(ours, theirs):
        assert other["score_2"] == pytest.approx(one["score_2"], abs=1e-5)
        assert other["embedding"] == pytest.approx(one["embedding"], abs=1e-4)


def test_torch_computes_where_openvino_can_not_and_it_is_told(here, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(predictors, "PAYS_FROM", 0)

    def fail(*_, **__):
        raise InputError("OpenVINO can't compile this model: it is Tuesday.")

    monkeypatch.setattr(predictors, "Program", fail)
    flags = ("model", "photos/0.JPG", "--output", tmp_path / "a.csv")
    assert predict(monkeypatch, *flags) == 0
    assert "torch computes: OpenVINO can't compile this model: it is Tuesday." in capsys.readouterr().err
    assert predict(monkeypatch, *flags, "--overwrite", "--backend", "openvino") == 2
    assert "it is Tuesday. Give --backend torch" in capsys.readouterr().err
    assert not (tmp_path / "a.csv.parts").exists()
    assert predict(monkeypatch, *flags, "--overwrite", "--backend", "openvino", "--dtype", "float16") == 2
    assert "--backend openvino computes in float32 or bfloat16" in capsys.readouterr().err


def test_the_page_has_the_same_scores(here, monkeypatch):  # noqa: F811
    app = load_script("app")
    viewer = app.open_viewer("model", "main", False)
    assert viewer.scorer is not viewer.model
    image = viewer.read("photos/0.JPG", "0.JPG")
    assert dict(viewer.classify(image, "0.JPG")) == pytest.approx(dict(viewer.explain(image, "0.JPG").scores), abs=1e-5)
