# SPDX-License-Identifier: Apache-2.0
"""Every kind of source on eight tiny images, the order of labels, and every mistake that is found before training."""

import csv
import os
import shutil
import unicodedata

import datasets
import numpy as np
import pytest
import tiny_images
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tiny_images import CLASSES, class_folders, encoded, image, read
from torch.utils.data import DataLoader
from transformers import ViTImageProcessorPil

from modeling_vit_scratch import ViTScratchImageProcessor
from modeling_vit_scratch.augmentation.photo import PhotoAugmentation
from modeling_vit_scratch.common.errors import InputError, Problems
from modeling_vit_scratch.data.collation import Normalize
from modeling_vit_scratch.data.dataset import Examples, ImageClassificationDataset
from modeling_vit_scratch.data.listing import left_out_line
from modeling_vit_scratch.data.splits import export_examples
from modeling_vit_scratch.evaluation.arguments import parse_arguments as parse_evaluation
from modeling_vit_scratch.evaluation.data import read_evaluation_data
from modeling_vit_scratch.image_decoding_vit_scratch import ImageDecodeError
from modeling_vit_scratch.prediction.arguments import parse_arguments as parse_prediction
from modeling_vit_scratch.prediction.reading import Inputs


DECODER = ViTScratchImageProcessor()


def contents(data):
    """{label name: set of images} over both splits; and that no image is in both."""
    found, count = {}, 0
    for examples in (data.train, data.validation):
        for index, label in enumerate(examples.labels):
            pixels = examples.decode(index, DECODER).tobytes()
            found.setdefault(data.label_names[label], set()).add(pixels)
            count += 1
    assert count == sum(len(images) for images in found.values())
    return found


def refusal(*args, **kwargs):
    with pytest.raises(InputError) as caught:
        read(*args, **kwargs)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def test_class_folders(tmp_path):
    data = read(train_dir=str(class_folders(tmp_path / "pets" / "train")), train_val_split=0.25)
    assert data.label_names == list(CLASSES)
    assert contents(data) == {name: {image(i, n).tobytes() for n in range(4)} for i, name in enumerate(CLASSES)}
    assert (len(data.train), len(data.validation)) == (9, 3)
    assert sorted(data.validation.labels) == [0, 1, 2]  # one of each class
    assert (data.source.name, data.source.license, data.source.hub_id) == ("pets", None, None)


def test_class_folders_below_class_folders_and_files_that_are_no_images(tmp_path):
    class_folders(tmp_path)
    (tmp_path / "cat" / "2024").mkdir()
    (tmp_path / "cat" / "0.png").rename(tmp_path / "cat" / "2024" / "0.PNG")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / "._0.png").write_bytes(b"what macOS leaves behind")
    (tmp_path / ".cache").mkdir()
    assert len(contents(read(train_dir=str(tmp_path), train_val_split=0.25))["cat"]) == 4


def test_training_evaluation_and_prediction_find_the_same_images(tmp_path, monkeypatch, capsys):
    place = class_folders(tmp_path / "photos")
    for name in ("a.heic", "b.HEIC", "no ending", "c.jpg_large"):
        (place / "zebra" / name).write_bytes(encoded(2, 8))
    image(2, 7).save(place / "zebra" / "c.mpo", "JPEG")
    shutil.copytree(place / "cat", place / "dog.jpg")
    for number, file in enumerate(sorted((place / "dog.jpg").iterdir())):
        image(1, 20 + number).save(file)
    shutil.copytree(place / "cat", place / "__MACOSX" / "cat")
    for folder in (".thumbnails", ".ipynb_checkpoints"):
        (place / "cat" / folder).mkdir()
        image(1, 9).save(place / "cat" / folder / "9.png")
    class_folders(tmp_path / "elsewhere", classes=("zebra",), each=2)
    (place / "zebra" / "linked").symlink_to(tmp_path / "elsewhere" / "zebra")
    (place / "zebra" / "circle").symlink_to(place / "zebra")
    data = read(train_dir=str(place), train_val_split=0.25)
    found = {split.name(index) for split in (data.train, data.validation) for index in range(len(split))}
    arguments = parse_prediction(["model", str(place)])
    inputs = Inputs(arguments)
    assert found == {item.path for item in inputs.items()}
    assert len(found) == 19
    line = "Left out: 4 files in the folders (2 .heic, 1 .jpg_large, 1 without an ending). pip install pi-heif"
    assert line in data.describe()
    assert line in left_out_line(inputs.left_out)
    evaluation = read_evaluation_data(parse_evaluation(["model", str(place)]), list(data.label_names), False)
    assert found == {evaluation.examples.name(index) for index in range(len(evaluation.examples))}
    assert line in capsys.readouterr().err
    assert sum("linked" in path for path in found) == 2
    with pytest.raises(InputError, match=r"cat/closed: the folder can't be read: Permission denied"):
        read_with_a_closed_folder(place, monkeypatch)


def read_with_a_closed_folder(place, monkeypatch):
    (place / "cat" / "closed").mkdir()
    read_folder = os.listdir

    def listdir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return read_folder(path)

    monkeypatch.setattr(os, "listdir", listdir)
    read(train_dir=str(place), train_val_split=0.25)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["007", "7", "01", "1"], ["007", "01", "1", "7"]),
        (["None", "NA", "null", "NaN"], ["NA", "NaN", "None", "null"]),
        (["2", "10", "9", "-1"], ["-1", "2", "9", "10"]),  # numbers are in the order of numbers
        (["1.0", "1", "2", "3"], ["1", "1.0", "2", "3"]),
    ],
)
def test_labels_in_csv_are_what_stands_in_the_file(tmp_path, labels, names):
    lines = ["file_name,category"]
    for number in range(8):
        image(1, number).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{labels[number % 4]}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    data = read(train_dir=str(tmp_path / "table.csv"), train_val_split=0.5)
    assert data.label_names == names
    assert sorted(data.train.labels + data.validation.labels) == [0, 0, 1, 1, 2, 2, 3, 3]
    lines[5] = "4.png,"
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="1 images of the training split have no label"):
        read(train_dir=str(tmp_path / "table.csv"), train_val_split=0.5)


def test_a_validation_folder_may_lack_a_class_but_not_shift_the_others(tmp_path):
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "val", classes=("zebra", "cat"), each=1)
    data = read(train_dir=str(tmp_path / "train"), validation_dir=str(tmp_path / "val"), allow_overlap=True)
    assert data.label_names == list(CLASSES)
    assert data.validation.labels == [1, 2]
    assert data.validation.decode(1, DECODER).tobytes() == image(2, 0).tobytes()
    assert len(data.train) == 12


EXPECTED = {name: {image(CLASSES.index(name), n).tobytes() for n in numbers} for name, numbers in
            (("zebra", range(0, 8, 2)), ("cat", range(1, 8, 2)))}  # fmt: skip


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_tables(tmp_path, kind):
    if kind == "parquet":
        file = tiny_images.parquet(tmp_path / "animals.parquet")
    else:
        file = tiny_images.table(tmp_path / f"animals.{kind}", "," if kind == "csv" else None)
    data = read(tmp_path / "cache", train_dir=str(file), train_val_split=0.25)
    assert data.label_names == ["cat", "zebra"]
    assert contents(data) == EXPECTED
    assert data.source.name == "animals"


def test_webdataset_and_patterns(tmp_path):
    for name in ("a", "b"):
        tiny_images.webdataset(tmp_path / f"{name}.tar")
    data = read(tmp_path / "cache", train_dir=str(tmp_path / "[ab].tar"), train_val_split=0.25)
    assert data.label_names == ["1", "2"]  # whole numbers keep their order, and name themselves
    assert len(data.train) + len(data.validation) == 16
    one = read(tmp_path / "cache", train_dir=str(tmp_path / "a.tar"), train_val_split=0.25)
    assert contents(one) == {"1": EXPECTED["cat"], "2": EXPECTED["zebra"]}


def test_a_folder_in_the_form_of_the_hub_with_its_own_order_of_labels(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["zebra", "cat"])})
    rows = [{**row, "label": row["label"]} for row in tiny_images.rows()]
    for split in ("train", "validation"):
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "animals" / f"{split}.parquet")
    data = read(tmp_path / "cache", dataset_name=str(tmp_path / "animals"), allow_overlap=True)
    assert data.label_names == ["zebra", "cat"]
    assert data.train.labels == data.validation.labels == [0, 1] * 4
    assert data.split == "the validation split of the data"
    assert data.source.name == "animals"  # a local copy: its path is nobody's business
    assert data.source.hub_id is None


def test_digits_are_those_of_scikit_learn():
    data = read(dataset_name="digits")
    assert data.label_names == list("0123456789")
    assert (len(data.train), len(data.validation), data.source.num_channels) == (1528, 269, 1)
    raw = {(image * 255 / 16).round().astype(np.uint8).tobytes(): target for image, target in zip(*digits())}
    decoder = ViTScratchImageProcessor(num_channels=1)
    for index in range(0, 269, 30):
        assert raw[data.validation.decode(index, decoder).tobytes()] == data.validation.labels[index]


def digits():
    bunch = load_digits()
    return bunch.images, bunch.target


def test_elpv_counts_are_those_of_its_authors():
    pytest.importorskip("elpv_dataset")
    data = read(dataset_name="elpv", verify_images=False)
    assert data.label_names == ["functional", "defective"]
    labels = data.train.labels + data.validation.labels
    assert (labels.count(0), labels.count(1)) == (1803, 821)
    assert data.train.decode(0, DECODER).size == (300, 300)
    assert data.source.license == "cc-by-nc-sa-4.0"


def test_elpv_says_what_to_install(monkeypatch):
    monkeypatch.setattr("modeling_vit_scratch.data.sources.importlib.util.find_spec", lambda name: None)
    assert "pip install elpv-dataset" in refusal(dataset_name="elpv")


def test_a_data_set_that_is_nowhere(tmp_path):
    assert "--dataset_name nobody/nothing can't be read" in refusal(tmp_path, dataset_name="nobody/nothing")


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def test_fewer_samples_on_request():
    data = read(dataset_name="digits", max_train_samples=50, max_eval_samples=20)
    assert (len(data.train), len(data.validation)) == (50, 20)
    assert data.label_names == list("0123456789")


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_everything_wrong_with_folders_is_told_in_one_message(tmp_path):
    train, validation = class_folders(tmp_path / "train"), class_folders(tmp_path / "val", each=1)
    (train / "empty").mkdir()
    shutil.rmtree(train / "zebra")
    image(0, 9).save(train / "loose.png")
    (train / "cat" / "zero.jpg").write_bytes(b"")
    (train / "cat" / "cut.png").write_bytes(encoded(1, 0)[:200])
    (validation / "cat" / "text.png").write_text("no image")
    problems = Problems()
    problems.add("--train_val_split 2 must lie between 0 and 1")
    flags = {"train_val_split": 2.0, "allow_overlap": True}
    message = refusal(train_dir=str(train), validation_dir=str(validation), problems=problems, **flags)
    for part in (
        "5 problems", "--train_val_split 2", "'empty' has no images", "loose.png", "'zebra' (1 images)",
        "3 of 14 images", "zero.jpg", "cut.png", "text.png",
    ):  # fmt: skip
        assert part in message


def test_of_many_broken_files_ten_are_named(tmp_path):
    class_folders(tmp_path)
    for number in range(12):
        (tmp_path / "cat" / f"bad{number:02}.png").write_bytes(b"bad")
    message = refusal(train_dir=str(tmp_path))
    assert message.count("bad") == 10
    assert "and 2 more" in message
    assert len(read(train_dir=str(tmp_path), verify_images=False).train) > 12


@pytest.mark.parametrize(
    ("classes", "each", "arguments", "part"),
    [
        (("cat",), 4, {}, "All 4 training images are of one class, 'cat'"),
        (CLASSES, 1, {}, "Classes with one image"),
        (CLASSES, 2, {"train_val_split": 0.9}, "Choose 0.5 at most"),
        (CLASSES, 4, {"max_train_samples": 2}, "2 training images are fewer than the 3 classes"),
        ((), 0, {}, "no class folders"),
    ],
)
def test_too_little_to_learn_from(tmp_path, classes, each, arguments, part):
    class_folders(tmp_path, classes, each)
    assert part in refusal(train_dir=str(tmp_path), **arguments)


def test_two_class_folders_that_look_alike_and_tables_without_rows(tmp_path):
    class_folders(tmp_path / "a")
    for form in ("NFC", "NFD"):
        shutil.copytree(tmp_path / "a" / "cat", tmp_path / "a" / unicodedata.normalize(form, "café"))
    assert "two class folders look alike, 'café'" in refusal(train_dir=str(tmp_path / "a"))
    for name, text in (("a.csv", ""), ("b.csv", "file_name,label\n"), ("c.jsonl", "")):
        (tmp_path / name).write_text(text)
        assert f"{name} can't be read as" in refusal(tmp_path, train_dir=str(tmp_path / name))
        with pytest.raises(InputError, match=f"{name}: no images in it"):
            list(Inputs(parse_prediction(["model", str(tmp_path / name)])).items())


def test_paths_in_tables_are_beside_the_table_for_all_readers(tmp_path, monkeypatch):
    file = tiny_images.table(tmp_path / "t.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    columns = {"image": [row["file_name"] for row in rows], "label": [row["category"] for row in rows]}
    write_table(tmp_path / "t.parquet", **columns)
    file.write_text(file.read_text(), encoding="utf-16")
    expected = {str(tmp_path / row["file_name"]) for row in rows}
    for name in ("t.csv", "t.parquet"):
        data = read(tmp_path / "cache", train_dir=str(tmp_path / name), train_val_split=0.25)
        assert {part.name(index) for part in (data.train, data.validation) for index in range(len(part))} == expected
        inputs = Inputs(parse_prediction(["model", str(tmp_path / name)]))
        items = list(inputs.items())
        assert {item.path if item.start is None else inputs.read(item) for item in items} == expected
    columns["image"] = [f"http://127.0.0.1/{number}.png" for number in range(8)]
    urls = write_table(tmp_path / "u.parquet", **columns)
    data = read(tmp_path / "cache", train_dir=urls, train_val_split=0.25, verify_images=False)
    assert {part.name(index) for part in (data.train, data.validation) for index in range(len(part))} == set(
        columns["image"]
    )
    image(0, 3).save(tmp_path / "pictures" / "extra.png")
    (tmp_path / "t.csv").rename(tmp_path / "metadata.csv")
    assert "1 without a row in metadata.csv" in read(train_dir=str(tmp_path), train_val_split=0.25).describe()


def test_a_folder_of_splits_or_files_is_no_folder_of_classes(tmp_path):
    class_folders(tmp_path / "a" / "train")
    for name in ("Test", "val"):
        class_folders(tmp_path / "a" / name)
        message = refusal(train_dir=str(tmp_path / "a"))
        assert f"--train_dir {tmp_path / 'a' / 'train'} --validation_dir {tmp_path / 'a' / name}" in message
    (tmp_path / "b").mkdir()
    tiny_images.parquet(tmp_path / "b" / "x.parquet")
    assert f"--train_dir {tmp_path / 'b' / 'x.parquet'}" in refusal(train_dir=str(tmp_path / "b"))


def test_places_that_can_not_be_read(tmp_path):
    message = refusal(train_dir=str(tmp_path / "no"), validation_dir=str(tmp_path / "nor"))
    assert "--train_dir" in message
    assert "--validation_dir" in message
    (tmp_path / "a.txt").write_text("")
    assert "files of one kind among .parquet" in refusal(train_dir=str(tmp_path / "a.txt"))
    (tmp_path / "b.parquet").write_text("not parquet")
    assert "can't be read as parquet" in refusal(tmp_path, train_dir=str(tmp_path / "b.parquet"))


def write_table(file, **columns):
    datasets.Dataset.from_dict(columns).to_parquet(file)
    return str(file)


def test_columns_are_found_if_there_is_one_way_and_listed_if_not(tmp_path):
    pictures = [{"bytes": encoded(i % 2, i), "path": None} for i in range(8)]
    file = write_table(tmp_path / "t.parquet", left=pictures, image=pictures, fine=[0, 1] * 4, category=list("ab") * 4)
    assert read(tmp_path, train_dir=file, train_val_split=0.25).label_names == ["a", "b"]
    data = read(tmp_path, train_dir=file, label_column_name="fine", image_column_name="left", train_val_split=0.25)
    assert data.label_names == ["0", "1"]
    message = refusal(tmp_path, train_dir=file, label_column_name="coarse", image_column_name="right")
    for part in ("2 problems", "--label_column_name coarse", "--image_column_name right", "'left', 'image', 'fine'"):
        assert part in message
    file = write_table(tmp_path / "u.parquet", picture=pictures, label=[0, 1] * 4, category=list("ab") * 4)
    message = refusal(tmp_path, train_dir=file)
    assert "several columns could be the labels: label, category. Name it with --label_column_name" in message
    assert "no image column found. Name it with --image_column_name. Its columns: 'picture', 'label'" in message


@pytest.mark.parametrize(
    ("labels", "part"),
    [
        ([[0.5], [1.0]] * 4, "one name or whole number"),
        ([None, "a", "b", "a"] * 2, "2 images of the training split have no label"),
    ],
)
def test_labels_that_are_none(tmp_path, labels, part):
    pictures = [{"bytes": encoded(0, i), "path": None} for i in range(8)]
    assert part in refusal(tmp_path, train_dir=write_table(tmp_path / "t.parquet", image=pictures, label=labels))


def test_images_that_are_none(tmp_path):
    assert "images must be paths" in refusal(
        tmp_path, train_dir=write_table(tmp_path / "t.parquet", image=list(range(8)), label=[0, 1] * 4)
    )
    pictures = [{"bytes": encoded(0, i), "path": None} for i in range(7)] + [None]
    file = write_table(tmp_path / "u.parquet", image=pictures, label=[0, 1] * 4)
    assert "is missing: the row has neither bytes nor a path" in refusal(tmp_path, train_dir=file)


def class_label_table(file, names, labels):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    pictures = [{"bytes": encoded(0, i), "path": None} for i in range(len(labels))]
    datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features).to_parquet(file)
    return str(file)


def test_splits_with_labels_in_different_orders(tmp_path):
    train = class_label_table(tmp_path / "a.parquet", ["cat", "dog"], [0, 1] * 4)
    validation = class_label_table(tmp_path / "b.parquet", ["dog", "cat"], [0, 1] * 4)
    assert "different orders: training cat, dog; validation dog, cat" in refusal(
        tmp_path, train_dir=train, validation_dir=validation
    )
    unlabelled = class_label_table(tmp_path / "c.parquet", ["cat", "dog"], [-1, 1])
    assert "1 images of the validation split have no label" in refusal(
        tmp_path, train_dir=train, validation_dir=unlabelled
    )


# ---------------------------------------------------------------------------------------------------------------------
# What the model gets


def examples(count=6):
    images = datasets.Dataset.from_list(
        [{"image": {"bytes": encoded(0, n), "path": f"{n}.png"}} for n in range(count)]
    ).cast_column("image", datasets.Image(decode=False))
    return Examples(images, [n % 3 for n in range(count)])


PROCESSOR = ViTScratchImageProcessor(size={"height": 16, "width": 24})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"crop_pct": 0.8, "resample": 3},
        {"do_center_crop": True, "crop_size": {"height": 8, "width": 40}, "resample": 0},
        {"do_resize": False},
        {"size": {"shortest_edge": 12}, "do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
        {"image_mean": 0.3, "image_std": [0.1, 0.2, 0.3], "rescale_factor": 1 / 127.5},
        {"num_channels": 1, "image_mean": 0.45, "image_std": 0.225},
        {"num_channels": 7, "do_convert_rgb": False, "image_mean": 0.5, "image_std": 0.25},
    ],
)
def test_held_out_images_are_bit_for_bit_what_the_processor_makes_of_the_files(settings):
    processor = ViTScratchImageProcessor(**{"size": {"height": 16, "width": 24}, **settings})
    dataset, normalize = ImageClassificationDataset(examples(), processor), Normalize(processor)
    for index in range(6):
        item = dataset[index]
        assert item["labels"] == index % 3
        assert item["pixel_values"].dtype == torch.uint8
        expected = processor(image(0, index), return_tensors="pt")["pixel_values"]
        assert torch.equal(normalize(item["pixel_values"][None]), expected)


def test_four_channels_go_the_same_way(tmp_path):
    processor = ViTScratchImageProcessor(num_channels=4, size=6, image_mean=[0.1, 0.2, 0.3, 0.4], image_std=[0.5] * 4)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    column = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]})
    one = Examples(column.cast_column("image", datasets.Image(decode=False)), [0])
    ours = Normalize(processor)(ImageClassificationDataset(one, processor)[0]["pixel_values"][None])
    assert torch.equal(ours, processor(tmp_path / "a.png", return_tensors="pt")["pixel_values"])
    turned = ImageClassificationDataset(one, processor, 4, PhotoAugmentation((6, 6), 2))[0]["pixel_values"]
    assert (turned.shape, turned.dtype) == ((4, 6, 6), torch.uint8)


def test_a_key_tells_what_a_training_example_is_a_function_of():
    dataset = train_set(seed=5)
    dataset.set_epoch(3)
    assert dataset[4]["key"] == (5, 3, 4)
    assert set(ImageClassificationDataset(examples(), PROCESSOR)[4]) == {"pixel_values", "labels"}


def test_another_processor_works_too_also_for_grey_images(tmp_path):
    class_folders(tmp_path)
    for file in tmp_path.glob("*/*.png"):
        Image.open(file).convert("L").save(file)
    examples = read(train_dir=str(tmp_path)).train
    stock = ViTImageProcessorPil(size={"height": 16, "width": 24})
    grey = examples.decode(0, DECODER)
    expected = stock(grey, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(ImageClassificationDataset(examples, stock)[0]["pixel_values"], expected)
    train = ImageClassificationDataset(examples, stock, 3, PhotoAugmentation((16, 24), 2))
    assert train[0]["pixel_values"].shape == (3, 16, 24)
    assert train[0]["pixel_values"].dtype == torch.float32  # its own arithmetic, whatever that is
    pixel_values = train[0]["pixel_values"][None]
    assert Normalize(stock)(pixel_values) is pixel_values


def train_set(seed=0, **settings):
    processor = ViTScratchImageProcessor(size={"height": 16, "width": 24}, **settings)
    return ImageClassificationDataset(examples(), processor, augmentation=PhotoAugmentation((16, 24), 2), seed=seed)


def pixels(dataset):
    return torch.stack([dataset[index]["pixel_values"] for index in range(len(dataset))])


def test_augmentation_is_a_function_of_seed_epoch_and_index_alone():
    dataset, again = train_set(), train_set()
    first = pixels(dataset)
    torch.manual_seed(1)
    assert torch.equal(pixels(again), first)
    dataset.set_epoch(1)
    second = pixels(dataset)
    assert not torch.equal(second, first)
    again.set_epoch(1)
    assert torch.equal(torch.stack([again[i]["pixel_values"] for i in reversed(range(6))]).flip(0), second)
    assert not torch.equal(pixels(train_set(seed=1)), first)


@pytest.mark.parametrize(
    "settings", [{"crop_pct": 0.5}, {"do_center_crop": True, "crop_size": {"height": 8, "width": 8}}]
)
def test_nothing_is_cropped_twice(settings):
    item = train_set(**settings)[0]
    assert item["pixel_values"].shape == (3, 16, 24)
    assert torch.equal(item["pixel_values"], train_set()[0]["pixel_values"])


def test_workers_that_outlive_an_epoch_see_the_next_one():
    dataset = train_set()
    loader = DataLoader(dataset, batch_size=6, num_workers=1, persistent_workers=True)
    first = next(iter(loader))["pixel_values"]
    dataset.set_epoch(1)
    second = next(iter(loader))["pixel_values"]
    assert torch.equal(second, pixels(dataset))
    assert not torch.equal(first, second)


def test_a_file_that_breaks_after_the_check_is_named(tmp_path):
    class_folders(tmp_path)
    data = read(train_dir=str(tmp_path))
    broken = data.train.images[2]["image"]["path"]
    with open(broken, "r+b") as file:
        file.truncate(100)
    with pytest.raises(ImageDecodeError, match=broken.replace(".", r"\.")):
        ImageClassificationDataset(data.train, PROCESSOR)[2]


def test_exported_examples_are_held_out_images_with_their_labels(tmp_path):
    data = read(train_dir=str(class_folders(tmp_path / "in")), train_val_split=0.5)
    first = export_examples(data, str(tmp_path / "out"), maximum=4)
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == 4
    assert first in files
    for file in files:
        index, label = file.stem.split("_")
        assert data.label_names[data.validation.labels[int(index)]].replace(" ", "-") == label
        assert Image.open(file).tobytes() == data.validation.decode(int(index), DECODER).tobytes()
    assert export_examples(data, None) is None
