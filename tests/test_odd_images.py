# SPDX-License-Identifier: Apache-2.0
"""Odd images are read as documented, broken ones told by name: in the processor, prediction, training, evaluation."""

import csv
import gc
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from odd_images import broken_images, odd_images
from PIL import Image
from tiny_images import image, load_script

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.common.errors import InputError, Problems
from modeling_vit_scratch.common.flags import DataArguments
from modeling_vit_scratch.data.copies import find_broken
from modeling_vit_scratch.data.dataset import PhotoPart, StoredImage
from modeling_vit_scratch.data.splits import read_data
from modeling_vit_scratch.evaluation.arguments import parse_arguments as evaluation_arguments
from modeling_vit_scratch.evaluation.data import read_evaluation_data
from modeling_vit_scratch.image_decoding_vit_scratch import ImageDecodeError
from modeling_vit_scratch.page.model import Viewer
from startup.status import run_command_line


pytestmark = [
    pytest.mark.timeout(60),  # a pipe is waited for without end
    pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two folders, and what is in them; and a model."""
    folder = tmp_path_factory.mktemp("odd images")
    for name in ("odd", "broken"):
        (folder / name).mkdir()
    torch.manual_seed(0)
    config = ViTScratchConfig.from_variant("test/4", id2label={0: "odd", 1: "broken"})
    model = ViTScratchForImageClassification(config)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder / "model")
    ViTScratchImageProcessor(size={"height": 16, "width": 24}).save_pretrained(folder / "model")
    return folder, odd_images(folder / "odd"), broken_images(folder / "broken")


def open_files() -> int:
    gc.collect()  # from Python 3.12 on, Pillow's errors hold one file until then
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def in_colour(theirs: Image.Image) -> np.ndarray:
    """Transparency over white, in RGB, by PIL alone."""
    if theirs.has_transparency_data:
        white = Image.new("RGBA", theirs.size, "white")
        theirs = Image.alpha_composite(white, theirs.convert("RGBA"))
    return np.asarray(theirs.convert("RGB"))


def test_every_reader_reads_every_odd_image_as_pil_does(corpus):
    folder, odd, _ = corpus
    processor, before = ViTScratchImageProcessor(size={"height": 16, "width": 24}), open_files()
    page = SimpleNamespace(processor=processor)
    assert len(odd) > 150
    for name, theirs in odd.items():
        path, expected = folder / "odd" / name, in_colour(theirs)
        content, stored = path.read_bytes(), StoredImage(str(path), name)
        with Image.open(path) as opened:
            decoded = {
                "path": processor.decode(path),
                "bytes": processor.decode(content),
                "page": Viewer.read(page, str(path), name),
            }
            decoded["image"] = processor.decode(opened)
        for reader, ours in decoded.items():
            np.testing.assert_array_equal(np.asarray(ours), expected, err_msg=f"{name} by {reader}")
        exact = np.asarray(Image.fromarray(expected).resize((24, 16), 2)).transpose(2, 0, 1).astype(int)
        assert (stored.fit(processor).numpy() == exact).all(), f"{name} in an evaluation"
        whole = (0, 0, *expected.shape[1::-1])
        # Only files of two or more times the sides are decoded at a smaller scale.
        limit = 6 if min(whole[2:]) > 48 or name == "wide.jpg" else 1
        for reader, ours in {
            "fast by path": np.stack(processor.fit(path, do_fast_resize=True)),
            "fast by bytes": np.stack(processor.fit(content, do_fast_resize=True)),
            "training by path": PhotoPart(stored.open(processor), (24, 16), 2, whole).pixels().numpy(),
            "training by bytes": PhotoPart(StoredImage(content, name).open(processor), (24, 16), 2, whole)
            .pixels()
            .numpy(),
        }.items():
            assert abs(ours - exact).max() <= limit, f"{name}, {reader}: {abs(ours - exact).max()}"
        pixel_values = processor(path, return_tensors="pt")["pixel_values"]
        assert pixel_values.shape == (1, 3, 16, 24)
        assert -1 <= pixel_values.min() <= pixel_values.max() <= 1
    assert open_files() == before


def test_the_processor_names_every_broken_image(corpus):
    folder, _, broken = corpus
    processor, before = ViTScratchImageProcessor(), open_files()
    assert len(broken) > 20
    for name, words in broken.items():
        with pytest.raises(ImageDecodeError) as caught:
            processor(folder / "broken" / name)
        message = str(caught.value)
        assert name in message
        assert words in message
        assert len(message.splitlines()) == 1
    assert open_files() == before


def predict(monkeypatch, *argv) -> int:
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, argv), "--dataloader_num_workers", "0"])
    return run_command_line(load_script("predict").main)


@pytest.mark.parametrize("fast", [True, False], ids=["decoded small", "decoded in full"])
def test_prediction_has_a_row_for_each_odd_image_and_a_reason_for_each_broken_one(corpus, tmp_path, monkeypatch, fast):
    folder, odd, broken = corpus
    # By a folder what has the ending of an image; by a list of names whatever there is.
    names = [name for name in broken if name != "folder.jpg"]
    (tmp_path / "list.txt").write_text("".join(f"{folder / 'broken' / name}\n" for name in broken))
    argv = [folder / "model", folder / "odd", tmp_path / "list.txt", folder / "broken", "--top_k", 2]
    argv += ["--output", tmp_path / "a.csv"] + ([] if fast else ["--no_fast_decode"])
    before = open_files()
    assert predict(monkeypatch, *argv) == 0
    assert open_files() <= before + 2  # accelerate's, once
    with open(tmp_path / "a.csv", newline="") as file:
        rows = {Path(row["image"]).name: row for row in csv.DictReader(file)}
    assert rows.keys() == odd.keys()
    model = ViTScratchForImageClassification.from_pretrained(folder / "model").eval()
    processor = ViTScratchImageProcessor.from_pretrained(folder / "model")
    for name, row in rows.items():
        with torch.no_grad():
            logits = model(processor(folder / "odd" / name, return_tensors="pt")["pixel_values"]).logits[0]
        # Only wide.jpg is large enough to be decoded at a smaller scale; others differ by a level or two of 255.
        tolerance = (0.05 if name == "wide.jpg" else 0.01) if fast else 1e-5
        assert float(row["score"]) == pytest.approx(logits.softmax(-1).max().item(), abs=tolerance), name
    with open(tmp_path / "a.csv.errors.csv", newline="") as file:
        errors = [(Path(row["image"]).name, row["reason"]) for row in csv.DictReader(file)]
    assert sorted(name for name, _ in errors) == sorted([*broken, *names])
    for name, reason in errors:
        assert broken[name] in reason
        assert str(folder) not in reason or name in ("to itself.jpg",)


def class_folders(corpus, folder: Path) -> Path:
    """Links to all of them, in a folder for each class, beside a few that are neither odd nor broken."""
    place, odd, broken = corpus
    for kind, names in (("odd", odd), ("broken", broken)):
        (folder / kind).mkdir(parents=True)
        for name in names:
            (folder / kind / name).symlink_to(place / kind / name)
        for number in range(3):
            image(len(kind) % 2, number).save(folder / kind / f"plain {number}.png")
    return folder


def test_training_and_evaluation_name_every_broken_image_before_they_start(corpus, tmp_path):
    folder, odd, broken = corpus
    place, cache, before = class_folders(corpus, tmp_path / "photos"), str(tmp_path / "cache"), open_files()
    named = [name for name in broken if name != "folder.jpg"]  # a folder is no image of its class
    wishes = {"train_dir": str(place), "train_val_split": 0.3}
    with pytest.raises(InputError, match=f"^{len(named)} of {len(odd) + len(named) + 6} images can't be read"):
        read_data(DataArguments(**wishes), 0, Problems(), cache_dir=cache)
    argv = [str(folder / "model"), str(place), "--split", "all", "--output_dir", str(tmp_path / "report")]
    with pytest.raises(InputError, match=f"leave them out with --max_broken_images {len(named)}:"):
        read_evaluation_data(evaluation_arguments(argv), ["odd", "broken"], False)
    argv += ["--max_broken_images", str(len(named))]
    data = read_evaluation_data(evaluation_arguments(argv), ["odd", "broken"], False)
    assert sorted(data.broken.values()) == sorted(named)
    assert len(data.without_broken().examples) == len(odd) + 6
    assert open_files() <= before + 2
    reasons = {place.name: reason for place, reason in reasons_in(data)}
    for name in named:
        assert broken[name] in reasons[name]


def reasons_in(data):
    for index, reason in find_broken(data.examples).items():
        yield Path(data.examples.name(index)), reason


def test_names_that_are_no_text(corpus, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "photos"
    for kind in ("a", "b"):
        (folder / kind).mkdir(parents=True)
        for number in range(3):
            image(0, number).save(folder / kind / f"{number}.png")
    (folder / "a" / "0.png").rename(folder / "a" / os.fsdecode(b"caf\xe9.png"))
    with pytest.raises(InputError, match=r"'caf\\udce9\.png': these names are no UTF-8"):
        read_data(DataArguments(train_dir=str(folder)), 0, Problems(), cache_dir=str(tmp_path / "cache"))
    assert predict(monkeypatch, corpus[0] / "model", folder, "--output", tmp_path / "a.csv") == 0
    assert f"{folder}/a/caf\\xe9.png,odd" in (tmp_path / "a.csv").read_text().replace("broken", "odd")
