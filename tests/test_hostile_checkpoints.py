# SPDX-License-Identifier: Apache-2.0
"""A checkpoint or processor of an unkind or unlucky person runs no code and fills no memory: it ends in an error."""

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_images import CLASSES

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.checkpoint.conversion import load_checkpoint
from modeling_vit_scratch.checkpoint.files import CheckpointError, open_tensors
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.common.pretrained import load_pretrained
from modeling_vit_scratch.configuration_vit_scratch import MOST, VARIANTS
from modeling_vit_scratch.prediction.arguments import parse_arguments
from modeling_vit_scratch.prediction.model import load_predictor
from modeling_vit_scratch.prediction.reading import Inputs
from modeling_vit_scratch.prediction.running import print_table


BIG = 10**9
MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
def little_memory():
    """So much and no more can be taken in a test: who takes more gets another error than the one that is expected."""
    resource = pytest.importorskip("resource")
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("does not tell how much memory it has")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + 1000 * MEBIBYTE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    config = ViTScratchConfig.from_variant("test/4", id2label=dict(enumerate(CLASSES)))
    ViTScratchForImageClassification(config).save_pretrained(folder)
    ViTScratchImageProcessor(size={"height": 16, "width": 24}).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def load(folder: Path):
    return load_pretrained(ViTScratchForImageClassification, "MODEL", str(folder), {})


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that nobody means


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": BIG}, "hidden_size=1000000000 is above 65,536"),
        ({"hidden_size": BIG, "num_attention_heads": 7}, "hidden_size"),
        ({"num_hidden_layers": BIG}, "num_hidden_layers=1000000000 is above 1,000"),
        ({"num_hidden_layers": 900, "intermediate_size": 500_000}, r"describes at least [\d,]+ parameters"),
        ({"intermediate_size": BIG}, "intermediate_size"),
        ({"representation_size": BIG}, "representation_size"),
        ({"num_channels": BIG}, "num_channels"),
        ({"num_register_tokens": BIG}, "num_register_tokens"),
        ({"image_size": 10**6}, "image_size"),
        ({"image_size": [16, 10**12]}, "image_size"),
        ({"image_size": [60_000, 60_000]}, "describes at least"),
        ({"image_size": [60_000, 60_000], "position_embedding": "relative_1d"}, "describes at least"),
        ({"stem_layers": [BIG], "patch_size": 4}, "stem_layers"),
        ({"stem_layers": [900], "stem_width_factor": 90}, "describes at least"),
        ({"stem_layers": [1], "stem_width_factor": BIG}, "stem_width_factor"),
        ({"num_labels": BIG, "id2label": None, "label2id": None}, "num_labels"),
        ({"id2label": ["a", "b", "c"]}, "id2label must be a dictionary, got list"),
        ({"id2label": "abc"}, "id2label must be a dictionary, got str"),
        ({"label2id": [1]}, "label2id must be a dictionary, got list"),
        ({"id2label": {"a": "x"}}, r"keys of id2label must be whole numbers from 0 on, got \['a'\]"),
        ({"id2label": {"0": ["x"]}, "label2id": None}, "must be text"),
        ({"id2label": {"0": None}, "label2id": None}, "must be text"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps"),
    ],
    ids=str,
)
def test_a_config_of_absurd_numbers_is_refused_before_anything_is_made(folder, fields, words):
    change(folder / "config.json", **fields)
    with pytest.raises(InputError, match=words):
        load(folder)


def test_the_limits_are_far_from_what_people_have():
    for name, fields in VARIANTS.items():
        for field in fields.keys() & MOST.keys():
            assert 10 * np.max(fields[field], initial=0) <= MOST[field], (name, field)


def test_a_folder_that_grows_within_reason_still_opens(good):
    model, info = ViTScratchForImageClassification.from_pretrained(good, num_hidden_layers=6, output_loading_info=True)
    assert len(model.vit.layers) == 6
    assert any(name.startswith("vit.layers.5.") for name in info["missing_keys"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": {"height": 10**6, "width": 10**6}}, "size may not have more than"),
        ({"size": {"height": BIG, "width": 1}}, "size may not have more than"),
        ({"do_center_crop": True, "crop_size": {"height": 10**6, "width": 10**6}}, "crop_size may not have more than"),
        (
            {"num_channels": BIG, "image_mean": 0.5, "image_std": 0.5},
            "num_channels must be 10,000 or less, got 1000000000",
        ),
        ({"image_mean": [0.5] * 1000}, "image_mean has 1000 values"),
        ({"size": {"height": 9_000, "width": 9_000}}, "per_device_eval_batch_size 64 of them 77.8 GB; this machine"),
        ({"size": {"shortest_edge": 10**6}}, "of different sizes"),
        ({"crop_pct": 1e-9}, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_processor_of_absurd_sizes_is_refused(folder, tmp_path, monkeypatch, capsys, fields, words):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"total": 24 << 30}))
    change(folder / "preprocessor_config.json", **fields)
    (tmp_path / "x.png").write_bytes(png())
    arguments = parse_arguments([str(folder), str(tmp_path / "x.png")])
    if words is None:  # it depends on the image
        assert print_table(load_predictor(arguments), Inputs(arguments), arguments) == 1
        assert "the result must have from 1 to" in capsys.readouterr().err
        return
    with pytest.raises(InputError, match=words):
        print_table(load_predictor(arguments), Inputs(arguments), arguments)


def png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "[1]", '"a"', "{", "null", "\0"], ids=repr)
def test_json_of_another_kind_is_refused(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=r"^MODEL can't be loaded: \S+"):
        load(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Files of weights


class Code:
    """Pickled, it is a call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "code has run"),)


def archive_with(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.npy", content)
    return buffer.getvalue()


def header(shape: str, kind: str = "<f4") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def test_pickles_are_not_run(folder, tmp_path):
    torch.save({"x": torch.zeros(2), "y": Code(tmp_path)}, tmp_path / "zip.pt")
    torch.save({"x": torch.zeros(2), "y": Code(tmp_path)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Code(tmp_path)))
    np.savez(tmp_path / "arrays.npz", x=np.array([Code(tmp_path)], dtype=object))
    for file in ("zip.pt", "old.bin", "plain.pth", "arrays.npz"):
        with pytest.raises(CheckpointError, match=f"{file}.*run code"):
            open_tensors(tmp_path / file)
    (folder / "model.safetensors").unlink()
    for file in ("zip.pt", "old.bin", "plain.pth"):
        shutil.copy(tmp_path / file, folder / "pytorch_model.bin")
        with pytest.raises(InputError, match="MODEL can't be loaded"):
            load(folder)
    assert not (tmp_path / "code has run").exists()


def test_code_beside_the_weights_is_not_run(folder, tmp_path, capfd):
    for file in folder.glob("*.py"):
        file.write_text(f"import os\nos.mkdir({str(tmp_path / 'code has run')!r})\n")
    change(folder / "config.json", auto_map={"AutoModelForImageClassification": "modeling_vit_scratch.Other"})
    load(folder)
    assert not (tmp_path / "code has run").exists()


def test_files_that_would_become_more_than_they_are_are_refused_unread(tmp_path):
    repeated = torch.zeros(1).expand(10**12)
    torch.save({"x": repeated}, tmp_path / "repeated.pt")
    (tmp_path / "claim.npz").write_bytes(archive_with(header("(1000000, 1000000)") + bytes(64)))
    (tmp_path / "two claims.npz").write_bytes(archive_with(header(f"({10**30},)") + bytes(64)))
    for file in ("repeated.pt", "claim.npz", "two claims.npz"):
        with pytest.raises(CheckpointError, match=f"{file}: [0-9,]+ bytes that would become"):
            open_tensors(tmp_path / file)
    (tmp_path / "wide.npz").write_bytes(archive_with(header("(1,)", f"|V{10**9}")))
    with pytest.raises(CheckpointError, match="of the unknown type"):
        open_tensors(tmp_path / "wide.npz")
    with zipfile.ZipFile(tmp_path / "layers.npz", "w") as archive:  # big_vision's layers, in one array of nothing
        for name in ("embedding/kernel", "Transformer/encoderblock/LayerNorm_0/bias", "Transformer/posembed_input/x"):
            archive.writestr(f"{name}.npy", header("(1000000000, 0)"))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "layers.npz")


@pytest.mark.parametrize(
    "content",
    [
        (2**62).to_bytes(8, "little") + b"{}",
        (2**40).to_bytes(8, "little") + b"{" + bytes(100),
        (1000).to_bytes(8, "little") + b"{}",
        bytes(8) + b"{",
    ],
    ids=["a header of exabytes", "of a terabyte", "longer than the file", "empty"],
)
def test_damaged_safetensors_are_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="MODEL can't be loaded"):
        load(folder)
    with pytest.raises(CheckpointError):
        open_tensors(folder / "model.safetensors")


@pytest.mark.parametrize("shape", [[10**12], [2**32, 2**32], [-1]], ids=str)
def test_safetensors_that_claim_more_than_they_hold_are_refused(folder, shape):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}
    text = json.dumps({"vit.layernorm.weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(InputError, match="MODEL can't be loaded"):
        load(folder)
