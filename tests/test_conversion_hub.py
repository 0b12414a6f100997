# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a Hub that answers, and of one that does not, from a loopback server that speaks its protocol."""

import re
from pathlib import Path

import pytest
import torch
from loopback_hub import LoopbackHub, Repository
from reference import transformers_twin
from test_publishing import connect
from tiny_images import load_script

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification


def convert(monkeypatch, folder: Path) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["scripts/convert.py", "user/vit", "out"])
    load_script("convert").main()


def test_a_repository_with_a_bin_file_only(tmp_path, monkeypatch):
    ours = ViTScratchForImageClassification(ViTScratchConfig.from_variant("test/4", num_labels=3)).eval()
    theirs = transformers_twin(ours)
    theirs.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with LoopbackHub() as hub:
        connect(monkeypatch, hub, tmp_path / "cache")
        hub.repositories["user/vit"] = Repository("user", private=False)
        files = {name: (tmp_path / name).read_bytes() for name in ("config.json", "pytorch_model.bin")}
        hub.repositories["user/vit"].add("main", files, "a model")
        convert(monkeypatch, tmp_path)
    asked = [path.rsplit("/", 1)[-1] for _, path in hub.requests]
    assert asked.index("model.safetensors") < asked.index("pytorch_model.bin")
    converted = ViTScratchForImageClassification.from_pretrained(tmp_path / "out").eval()
    images = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(converted(images).logits, theirs(images).logits, rtol=0, atol=1e-5)


def test_a_hub_that_is_not_there_is_asked_for_one_file_only(tmp_path, monkeypatch, capsys, caplog):
    with LoopbackHub() as hub:
        connect(monkeypatch, hub, tmp_path / "cache")
    # From here on nobody listens there.
    with pytest.raises(SystemExit) as ended:
        convert(monkeypatch, tmp_path)
    assert ended.value.code == 1
    assert "user/vit: neither a file nor a folder, and the Hub does not give it" in capsys.readouterr().err
    assert set(re.findall(r"resolve/main/(\S+)", caplog.text)) == {"model.safetensors"}
