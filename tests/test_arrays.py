# SPDX-License-Identifier: Apache-2.0
"""Images of many channels, .npy and TIFF: training, evaluation, prediction, and the image processor of the folder."""

import csv
import json

import numpy as np
import pytest
import torch
from forked import run_script
from tiny_images import ROOT, build
from transformers import AutoImageProcessor

from modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.augmentation.photo import PhotoAugmentation
from modeling_vit_scratch.common.errors import InputError


CHANNELS = 13


def array(label, number):
    """uint16 (16, 24, 13), as satellites give: 8 bits would leave some twenty of its levels."""
    values = np.random.default_rng((label, number)).normal(1500, 200, (16, 24, CHANNELS))
    values[..., 5 + label] += 900
    return values.clip(0, 10_000).astype(np.uint16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of the data, that of the model, and its trainer."""
    folder = tmp_path_factory.mktemp("arrays")
    for label, name in enumerate(("lake", "town")):
        (folder / "data" / name).mkdir(parents=True)
        for number in range(8):
            np.save(folder / "data" / name / f"{number}.npy", array(label, number))
    flags = ["--train_dir", str(folder / "data"), "--num_channels", "13", "--train_val_split", "0.25"]
    trainer = build(folder / "model", *flags, "--max_steps", "3", "--save_strategy", "no", "--eval_strategy", "no")
    trainer.train()
    trainer.save_model()
    return folder, trainer


def test_mean_and_standard_deviation_are_those_of_the_training_images(trained):
    folder, trainer = trained
    names = map(trainer.train_dataset.name, range(len(trainer.train_dataset)))
    pixels = np.concatenate([np.load(name).reshape(-1, CHANNELS) for name in names]).astype(np.float64)
    saved = json.loads((folder / "model" / "preprocessor_config.json").read_text())
    np.testing.assert_allclose(saved["image_mean"], pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(saved["image_std"], pixels.std(axis=0), rtol=1e-9)
    assert (saved["do_eight_bits"], saved["rescale_factor"], saved["num_channels"]) == (False, 1.0, 13)
    assert trainer.model.config.num_channels == 13
    batch = trainer.prepare_batch(next(iter(trainer.get_train_dataloader())))["pixel_values"]
    assert batch.shape[1:] == (13, 16, 24)
    assert abs(float(batch.mean())) < 0.5 < float(batch.std()) < 1.5


def test_the_folder_takes_arrays_and_files_and_all_commands_agree(trained, tmp_path):
    folder, _ = trained
    processor = AutoImageProcessor.from_pretrained(folder / "model", trust_remote_code=True)
    file, values = folder / "data" / "town" / "3.npy", array(1, 3)
    pixels = processor(values, return_tensors="pt")["pixel_values"]
    expected = (values - np.array(processor.image_mean)) / np.array(processor.image_std)
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0), expected, atol=1e-5)
    for same in (str(file), file.read_bytes(), torch.tensor(values.astype(np.int32))):
        assert torch.equal(processor(same, return_tensors="pt")["pixel_values"], pixels)
    model = ViTScratchForImageClassification.from_pretrained(folder / "model")
    score = model(pixels).logits.softmax(-1).max().item()
    words = [folder / "model", folder / "data"]
    predict = [ROOT / "scripts" / "predict.py", *words, "--output", "p.csv", "--dataloader_num_workers", "0"]
    run_script(predict, tmp_path)
    rows = {row["image"]: row for row in csv.DictReader((tmp_path / "p.csv").read_text().splitlines())}
    assert float(rows[str(file)]["score"]) == pytest.approx(score, abs=1e-5)
    evaluate = [ROOT / "scripts" / "evaluate.py", *words, "--split", "all", "--output_dir", "report"]
    run_script([*evaluate, "--bootstrap_resamples", "0"], tmp_path)
    found = np.load(tmp_path / "report" / "predictions.npz")
    row = found["label_names"].tolist().index("town") * 8 + 3
    assert found["image"][row] == "3.npy"
    np.testing.assert_allclose(found["logits"][row, 0], model(pixels).logits[0].detach(), atol=1e-5)


def test_a_part_of_an_array_is_that_of_each_channel():
    values = np.random.default_rng(0).normal(size=(20, 30, 5)).astype(np.float32)
    augment = PhotoAugmentation((8, 8), 2, smallest_area=0.3)
    whole = augment(values, np.random.default_rng(1))
    assert whole.shape == (5, 8, 8)
    for channel in range(5):
        one = augment(values[..., channel : channel + 1], np.random.default_rng(1))
        np.testing.assert_array_equal(whole[channel], one[0])
    same = PhotoAugmentation((20, 30), 2, smallest_area=1.0)
    results = [same(values, np.random.default_rng(seed)).transpose(1, 2, 0) for seed in range(20)]
    flipped = [np.array_equal(result, values[:, ::-1]) for result in results]
    assert 0 < sum(flipped) < 20


def test_what_does_not_fit_is_named(trained, tmp_path):
    folder, _ = trained
    flags = ["--train_dir", str(folder / "data"), "--train_val_split", "0.25", "--max_steps", "1"]
    with pytest.raises(InputError, match="Augmentation policies know grey and colour images, not 13 channels"):
        build(tmp_path / "a", *flags, "--num_channels", "13", "--auto_augment", "ra")
    with pytest.raises(InputError, match=r"lake.\d.npy has 13 channels, but the processor is for 12"):
        build(tmp_path / "b", *flags, "--num_channels", "12")
    with pytest.raises(InputError, match=r"13 channels, but the processor is for 3 \(num_channels\)"):
        build(tmp_path / "b", *flags)
    with pytest.raises(InputError, match="--images_on_device keeps 8 bits"):
        build(tmp_path / "c", *flags, "--num_channels", "13", "--images_on_device")
    with pytest.raises(InputError, match="--num_channels does not go with --streaming and --export_examples"):
        build(tmp_path / "d", *flags, "--num_channels", "13", "--export_examples", str(tmp_path / "e"))
    processor = ViTScratchImageProcessor(num_channels=13, do_eight_bits=False)
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        processor(str(tmp_path / "pickle.npy"))
    np.save(tmp_path / "nan.npy", np.full((4, 4, 13), np.nan))
    with pytest.raises(ValueError, match="must have finite numbers"):
        processor(str(tmp_path / "nan.npy"))


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiff_files_of_many_channels_are_the_same_arrays(tmp_path, planar):
    tifffile, values = pytest.importorskip("tifffile"), array(0, 1)
    stored = values if planar == "contig" else np.moveaxis(values, -1, 0)
    tifffile.imwrite(tmp_path / "image.tif", stored, photometric="minisblack", planarconfig=planar)
    processor = ViTScratchImageProcessor(num_channels=13, do_eight_bits=False, rescale_factor=1.0)
    for file in (tmp_path / "image.tif", (tmp_path / "image.tif").read_bytes()):
        np.testing.assert_array_equal(processor.decode(file), values)
