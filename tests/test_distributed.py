# SPDX-License-Identifier: Apache-2.0
"""Two processes do what one does: training, held-out metrics, streams, and FSDP2 on the network's own layers."""

import shutil
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from forked import run_script
from safetensors.torch import load_file
from tiny_images import CLASSES, ROOT, build, class_folders, difference, flags, rows, weights
from two_processes import SGD

from conversion.steps import convert
from modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchForMaskedImageModeling
from modeling_vit_scratch.checkpoint.files import CheckpointError


def parquet_shards(folder: Path) -> str:
    """Three files of 8, 5 and 4 rows."""
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    for number, count in enumerate((8, 5, 4)):
        columns = [{**row, "label": CLASSES.index(row["label"])} for row in rows()[:count]]
        datasets.Dataset.from_list(columns, features=features).to_parquet(folder / f"{number}.parquet")
    return str(folder / "*.parquet")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict:
    """What two processes have found, and where."""
    folder = tmp_path_factory.mktemp("two")
    # 24 images to train on, which is three batches of eight, and 9 held out, an odd number for two processes.
    images = str(class_folders(folder / "images", each=11))
    script = ROOT / "tests" / "two_processes.py"
    run_script([script, folder, images, parquet_shards(folder / "shards")], folder, processes=2)
    found = [torch.load(folder / f"found_{rank}.pt", weights_only=False) for rank in range(2)]
    return {"folder": folder, "images": images, "found": found}


def test_two_processes_end_with_the_weights_of_one(two, tmp_path):
    # Not AdamW: it makes steps of full size of the rounding errors in gradients that are zero, as of keys' biases.
    common = ["--gradient_accumulation_steps", "2", "--max_steps", "6", "--dataloader_num_workers", "0", *SGD]
    one = build(tmp_path, *flags(two["images"], "--per_device_train_batch_size", "4", *common))
    one.train()
    first, second = (found["plain"] for found in two["found"])
    assert difference(first["weights"], second["weights"]) == 0.0
    assert difference(first["weights"], weights(one)) < 1e-6
    assert one.samples_by_process == [48]
    assert first["samples"] == second["samples"] == [24, 24]
    # Each epoch of three updates has every image once, in one process or the other.
    for epoch in range(2):
        keys = torch.cat([found["keys"][3 * epoch : 3 * epoch + 3].flatten(0, 1) for found in (first, second)])
        assert sorted(keys.tolist()) == [[42, epoch, index] for index in range(24)]
    scores = one.evaluate()
    for found in (first, second):
        assert found["scores"]["eval_images"] == scores["eval_images"] == 9
        assert found["scores"]["eval_accuracy"] == scores["eval_accuracy"]
        assert found["scores"]["eval_loss"] == pytest.approx(scores["eval_loss"], abs=1e-6)


def test_repeats_of_an_image_are_dealt_to_both_processes(two, tmp_path):
    common = ["--gradient_accumulation_steps", "2", "--max_steps", "6", "--dataloader_num_workers", "0", *SGD]
    one = build(tmp_path, *flags(two["images"], "--per_device_train_batch_size", "4", "--aug_repeats", "3", *common))
    one.train()
    first, second = (found["repeated"] for found in two["found"])
    assert difference(first["weights"], weights(one)) < 1e-6
    assert difference(first["weights"], two["found"][0]["plain"]["weights"]) > 1e-4
    for epoch in range(2):
        numbers = [found["keys"][3 * epoch : 3 * epoch + 3].flatten(0, 1)[:, 2] for found in (first, second)]
        together = torch.stack(numbers, dim=1).flatten()  # dealt in turn
        images = (together % 24).reshape(8, 3)
        assert (images == images[:, :1]).all()
        assert len(set(images[:, 0].tolist())) == 8
        assert (together // 24).reshape(8, 3).tolist() == [[0, 1, 2]] * 8


def test_streams_of_two_processes_are_disjoint_complete_and_resumable(two):
    first, second = (found["streamed"] for found in two["found"])
    numbers = [[tuple(key) for key in found["keys"][:4].flatten(0, 1).tolist()] for found in (first, second)]
    assert not set(numbers[0]) & set(numbers[1])
    assert len(set(numbers[0] + numbers[1])) == 16  # of 17: one would have been a step for one process alone
    assert {epoch for _, epoch, _ in numbers[0]} == {0}
    assert first["samples"] == second["samples"] == [12, 12]
    for found in two["found"]:
        assert difference(found["streamed"]["weights"], found["resumed"]["weights"]) == 0.0
        assert torch.equal(found["streamed"]["keys"][4:], found["resumed"]["keys"])


def test_fsdp_computes_what_the_whole_model_does(two):
    for found in (found["fsdp"] for found in two["found"]):
        differences = {
            name: value for name, value in found.items() if name.split()[0] in ("loss", "gradients", "weights")
        }
        assert len(differences) == 6
        assert max(differences.values()) < 3e-6, differences  # sums in another order: 1.1e-6 was seen
        assert found["has_user_hooks"] is False
        assert 0.4 < found["shards"] < 0.6
        assert found["resumed"] == 0.0


def test_sharded_weights_have_the_average_of_whole_ones(two):
    folder = two["folder"]
    for found in (found["averages"] for found in two["found"]):
        whole, sharded, again = (found[name] for name in ("whole", "sharded", "again"))
        assert difference(sharded["weights"], whole["weights"]) < 1e-7
        assert difference(sharded["weights"], again["weights"]) == 0.0
        # The average was evaluated on the way, and training went on from the weights.
        assert len(whole["losses"]) == 3
        assert sharded["losses"] == pytest.approx(whole["losses"], abs=1e-6)
        assert sharded["losses"] == again["losses"]
    stored = load_file(folder / "whole" / "checkpoint-4" / "average.safetensors")
    merge_fsdp_weights(str(folder / "sharded" / "checkpoint-4" / "average_fsdp_0"), str(folder / "merged"))
    assert difference(load_file(folder / "merged" / "model.safetensors"), stored) < 1e-7


def test_what_was_trained_in_shards_is_saved_whole(two):
    folder, found = two["folder"], two["found"][0]["averages"]
    kinds = {"sharded": ViTScratchForImageClassification, "simmim": ViTScratchForMaskedImageModeling}
    for name, kind in kinds.items():
        model = kind.from_pretrained(folder / name)
        assert difference(dict(model.named_parameters()), found[name]["weights"]) == 0.0
        assert model.config.architectures == [kind.__name__]
    files = [{file.name for file in (folder / name).iterdir() if file.is_file()} for name in ("whole", "sharded")]
    assert files[0] == files[1]
    assert "modeling_vit_scratch.py" in files[0]


def test_a_folder_of_shards_is_refused_with_the_command_that_joins_them(two, tmp_path):
    stored, shards = torch.load(two["folder"] / "stored.pt"), tmp_path / "checkpoint" / "pytorch_model_fsdp_0"
    shutil.copytree(two["folder"] / "pytorch_model_fsdp_0", shards)
    shutil.copy(two["folder"] / "config.json", shards.parent)
    for read in (ViTScratchForImageClassification.from_pretrained, lambda source: convert(source, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=f"accelerate merge-weights {shards} {shards.parent}"):
            read(shards.parent)
    merge_fsdp_weights(str(shards), str(shards.parent))
    model = ViTScratchForImageClassification.from_pretrained(shards.parent)
    assert difference(dict(model.named_parameters()), stored) == 0.0
