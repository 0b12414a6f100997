# SPDX-License-Identifier: Apache-2.0
"""The held-out part stays when files come, go and change their names; later runs and evaluations keep to it."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from sklearn.model_selection import train_test_split
from tiny_images import CLASSES, build, class_folders, image, read

from modeling_vit_scratch.common.errors import InputError, Problems
from modeling_vit_scratch.common.flags import DataArguments
from modeling_vit_scratch.data.held_out import choose_held_out
from modeling_vit_scratch.data.splits import read_data
from modeling_vit_scratch.evaluation.arguments import parse_arguments
from modeling_vit_scratch.evaluation.data import read_evaluation_data


RANDOM = np.random.default_rng(0)


def images_of(data):
    """The held-out and the training images of a run, as pixels."""
    return tuple(
        {image_bytes(examples, index) for index in range(len(examples))} for examples in (data.validation, data.train)
    )


def image_bytes(examples, index):
    row = examples.images[index]["image"]
    return row["bytes"] or Path(row["path"]).read_bytes()


def test_an_image_that_comes_or_goes_moves_at_most_the_one_at_the_edge_of_its_class():
    ids, labels = [f"{number:016x}" for number in range(200)], RANDOM.integers(5, size=200).tolist()
    rows = [[label] for label in labels]
    held = {ids[index] for index in choose_held_out(rows, ids, 0.2)}
    shares = np.bincount([labels[ids.index(one)] for one in held]) - 0.2 * np.bincount(labels)
    assert np.abs(shares).max() <= 0.5
    order = RANDOM.permutation(200).tolist()
    assert {ids[order[i]] for i in choose_held_out([rows[i] for i in order], [ids[i] for i in order], 0.2)} == held
    for index in range(200):
        rest = [other for other in range(200) if other != index]
        without = {ids[rest[i]] for i in choose_held_out([rows[i] for i in rest], [ids[i] for i in rest], 0.2)}
        changed = (held ^ without) - {ids[index]}
        assert len(changed) <= 1
        assert all(labels[ids.index(one)] == labels[index] for one in changed)
    assert {ids[index] for index in choose_held_out(rows, ids, 0.1)} < held
    assert {ids[index] for index in choose_held_out(rows, ids, 0.2, split_seed=1)} != held


def test_with_several_labels_each_has_its_share_and_few_images_move():
    hot = RANDOM.random((300, 6)) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.02]
    rows, ids = [np.flatnonzero(row).tolist() for row in hot], [f"{number:016x}" for number in range(300)]
    held = choose_held_out(rows, ids, 0.2)
    assert abs(len(held) - 60) < 15
    assert np.abs(hot[held].sum(axis=0) - 0.2 * hot.sum(axis=0)).max() < 6
    for index in range(0, 300, 7):
        rest = [other for other in range(300) if other != index]
        without = {rest[i] for i in choose_held_out([rows[i] for i in rest], [ids[i] for i in rest], 0.2)}
        assert len((set(held) ^ without) - {index}) <= 12


def test_small_classes_have_one_on_each_side_and_copies_of_an_image_are_on_one(tmp_path):
    assert len(choose_held_out([[0], [0], [1], [1], [1]], list("abcde"), 0.01)) == 2
    place = class_folders(tmp_path / "pets", each=6)
    for file in list(place.glob("*/*.png")):
        shutil.copy(file, file.with_name(f"copy of {file.name}"))
    held_out, train = images_of(read(train_dir=str(place), train_val_split=0.4))
    assert len(held_out) == 6
    assert not held_out & train
    for name in CLASSES[:2]:
        shutil.rmtree(place / name)
        image(0, 0).save((class_folders(place, classes=(name,), each=1) / name) / "again.png")
    with pytest.raises(InputError, match=r"Classes with one image, or copies of one, .*: brown bear"):
        read(train_dir=str(place))


def test_names_order_format_and_seed_do_not_matter(tmp_path):
    place = class_folders(tmp_path / "pets")
    flags = {"train_val_split": 0.25}
    held_out, train = images_of(read(train_dir=str(place), **flags))
    for number, file in enumerate(sorted(place.glob("*/*.png"))):
        file.rename(file.with_name(f"{97 * number % 12}.PNG"))
    place.rename(tmp_path / "moved")
    assert images_of(read(train_dir=str(tmp_path / "moved"), seed=5, **flags)) == (held_out, train)
    files = sorted((tmp_path / "moved").glob("*/*"), reverse=True)
    columns = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "label": [file.parent.name for file in files],
    }
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "pets.parquet")
    assert images_of(read(tmp_path, train_dir=str(tmp_path / "pets.parquet"), **flags)) == (held_out, train)
    assert images_of(read(train_dir=str(tmp_path / "moved"), split_seed=1, **flags))[0] != held_out


def record(folder, data):
    """What a run leaves of its images in the folder of its model."""
    folder.mkdir(exist_ok=True)
    dataset = {"name": "x", "held_out": data.split, "images": data.images, "num_training_images": data.num_train}
    (folder / "results.json").write_text(json.dumps({"dataset": dataset}))
    return folder


def evaluated(model, place, *flags):
    data = read_evaluation_data(parse_arguments([str(model), str(place), *flags]), list(CLASSES), False)
    return {image_bytes(data.examples, index) for index in range(len(data.examples))}, data


def test_evaluation_finds_the_held_out_images_again_whatever_was_added_and_renamed(tmp_path):
    place = class_folders(tmp_path / "pets", each=8)
    data = read(train_dir=str(place), train_val_split=0.25)
    held_out, train = images_of(data)
    model = record(tmp_path / "model", data)
    for name in CLASSES:
        image(0, 100 + CLASSES.index(name)).save(place / name / "0a.png")
        (place / name / "7.png").rename(place / name / "00.png")
    place.rename(tmp_path / "photos")
    found, report = evaluated(model, tmp_path / "photos")
    assert found == held_out
    assert report.seen_in_training is False
    assert report.description == "held out from training: 25 % of each class, chosen by a hash of each file"
    assert evaluated(model, tmp_path / "photos", "--split", "all")[1].seen_in_training is True
    assert evaluated(model, tmp_path / "photos", "--split", "train")[0] > train
    trained = class_folders(tmp_path / "trained", each=8)
    for file in trained.glob("*/*.png"):
        if file.read_bytes() not in train:
            file.unlink()
    with pytest.raises(InputError, match="MODEL was trained on 18 or more of these 18 images"):
        evaluated(model, trained)
    others = class_folders(tmp_path / "others", each=5)
    for number, file in enumerate(sorted(others.glob("*/*.png"))):
        image(1, 70 + number).save(file)
    assert evaluated(model, others)[1].seen_in_training is None
    shutil.copy(next(trained.glob("cat/*.png")), others / "cat" / "4.png")  # a test set with an image of the training's
    found, report = evaluated(model, others)
    assert (len(found), report.description) == (14, "all images but 1 that MODEL was trained on")


def test_a_run_that_starts_from_a_model_holds_out_what_that_held_out(tmp_path):
    place = class_folders(tmp_path / "pets", each=8)
    first = read(train_dir=str(place), train_val_split=0.25)
    held_out, train = images_of(first)
    model = record(tmp_path / "model", first)
    second = read(train_dir=str(place), train_val_split=0.25, split_seed=3, seed=9, start=model)
    assert images_of(second) == (held_out, train)
    assert second.notes == []
    assert images_of(read(train_dir=str(place), train_val_split=0.25, split_seed=3))[0] != held_out
    more = read(train_dir=str(place), train_val_split=0.5, start=model)
    assert images_of(more)[0] > held_out
    assert "warning: 6 of the 12 held-out images are known to be among those that" in more.describe()
    fewer = read(train_dir=str(place), train_val_split=0.13, start=model)
    assert f"Note: 3 images that {model} held out are trained on now." in fewer.notes[0]
    # What the first model of three has seen is seen.
    other = class_folders(tmp_path / "other", classes=CLASSES[:2], each=4)
    for number, file in enumerate(sorted(other.glob("*/*.png"))):
        image(2, 50 + number).save(file)
    middle = record(tmp_path / "middle", read(train_dir=str(other), train_val_split=0.25, start=model))
    assert images_of(read(train_dir=str(place), train_val_split=0.25, split_seed=3, start=middle)) == (held_out, train)


def test_images_trained_on_without_labels_are_known_to_fine_tuning(tmp_path):
    place = class_folders(tmp_path / "pets", each=8)
    unlabelled = tmp_path / "all"
    unlabelled.mkdir()
    for file in place.glob("*/*.png"):
        shutil.copy(file, unlabelled / f"{file.parent.name} {file.name}")
    arguments = DataArguments(train_dir=str(unlabelled), train_val_split=0.25)
    pretraining = read_data(arguments, 0, Problems(), needs_labels=False)
    model = record(tmp_path / "model", pretraining)
    data = read(train_dir=str(place), train_val_split=0.25, start=model)
    held_out, before = images_of(data)[0], images_of(pretraining)[0]
    assert len(held_out & before) == sum(min(2, count) for count in counts(place, before))
    known = len(held_out - before)
    assert ("among those that" in data.describe()) == bool(known)


def counts(place, contents):
    return [sum(file.read_bytes() in contents for file in (place / name).iterdir()) for name in CLASSES]


def test_a_checkpoint_has_the_record_and_resuming_compares_it(tmp_path, capsys):
    place = class_folders(tmp_path / "pets", each=8)
    flags = ["--train_dir", str(place), "--train_val_split", "0.25", "--max_steps", "2", "--eval_strategy", "no"]
    flags += ["--save_steps", "1", "--save_strategy", "steps", "--dataloader_num_workers", "0"]
    run = build(tmp_path / "run", *flags)
    run.train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    manifest = json.loads((checkpoint / "run.json").read_text())
    held_out = {image_bytes(run.eval_dataset.examples, index) for index in range(6)}
    assert len(manifest["images"]["held_out"].split()) == 6
    assert evaluated(checkpoint, place)[0] == held_out
    shutil.move(place / "cat" / "3.png", place / "zebra" / "moved.png")
    resumed = build(tmp_path / "run", *flags, "--resume_from_checkpoint", str(checkpoint), "--split_seed", "4")
    found = {image_bytes(resumed.eval_dataset.examples, index) for index in range(len(resumed.eval_dataset))}
    assert len(found & held_out) >= 5
    capsys.readouterr()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert "input images and labels: " in capsys.readouterr().err
    # A checkpoint from before there were records goes on with the images that its seed chose.
    shutil.move(place / "zebra" / "moved.png", place / "cat" / "3.png")
    for name in ("images", "files"):
        del manifest[name]
    manifest["settings"] = {"--seed": 7}
    (checkpoint / "run.json").write_text(json.dumps({**manifest, "files": {}}))
    old = build(tmp_path / "run", *flags, "--resume_from_checkpoint", str(checkpoint))
    files = [str(place / name / f"{number}.png") for name in CLASSES for number in range(8)]
    expected = train_test_split(files, test_size=6, stratify=np.arange(24) // 8, random_state=7)[1]
    examples = old.eval_dataset.examples
    assert [examples.name(index) for index in range(len(examples))] == sorted(expected)
