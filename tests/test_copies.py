# SPDX-License-Identifier: Apache-2.0
"""Copies of an image, near copies and groups: found, named, and on one side of a split."""

import io
import json
import shutil

import datasets
import numpy as np
import pytest
from accelerate import PartialState
from forked import run_forked
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter
from tiny_images import read

from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.data.copies import draw_near_copies, near_pairs, pixel_hashes
from modeling_vit_scratch.data.held_out import choose_held_out


def picture(number: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """A soft landscape of random colours with shapes on it: like a photo, most of it is in the low frequencies."""
    random = np.random.default_rng(number)
    rough = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(rough)
    for _ in range(6):
        x, y = random.integers(0, size[0]), random.integers(0, size[1])
        width, height = random.integers(8, 40, 2)
        draw.ellipse((x, y, x + width, y + height), fill=tuple(random.integers(0, 256, 3).tolist()))
    return rough.filter(ImageFilter.GaussianBlur(1))


def encoded(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def smaller(image: Image.Image, factor: float) -> Image.Image:
    size = round(image.width * factor), round(image.height * factor)
    return image.resize(size, Image.Resampling.LANCZOS)


def hashes(images):
    return np.stack([pixel_hashes(image)[1] for image in images])


def test_near_copies_are_found_and_a_thousand_different_pictures_are_not():
    images = [picture(number) for number in range(1000)]
    originals = hashes(images)
    assert near_pairs(originals) == []
    parts = np.stack([pixel_hashes(image, with_parts=True)[2] for image in images])
    assert near_pairs(originals, parts) == []
    changes = {
        "re-encoded": lambda image: encoded(image, 40),
        "smaller": lambda image: smaller(image, 0.6),
        "larger and re-encoded": lambda image: encoded(smaller(image, 1.7), 60),
        "cropped": lambda image: image.crop((1, 1, image.width - 1, image.height - 1)),
    }
    for name, change in changes.items():
        pairs = near_pairs(np.concatenate([originals[:120], hashes(map(change, images[:120]))]))
        found = sum(pair in set(pairs) for pair in zip(range(120), range(120, 240)))
        assert found >= (100 if name == "cropped" else 119), name
        assert len(pairs) == found
    cuts = {"middle": (0.05, 0.05, 0.95, 0.95), "corner": (0, 0.05, 0.95, 1), "left": (0.05, 0, 1, 1)}
    for name, edges in cuts.items():
        cropped = [
            image.crop([round(edge * image.size[i % 2]) for i, edge in enumerate(edges)]) for image in images[:120]
        ]
        several = [pixel_hashes(encoded(image, 85), with_parts=True) for image in cropped]
        whole, cut = (np.stack([one[i] for one in several]) for i in (1, 2))
        pairs = near_pairs(np.concatenate([originals[:120], whole]), np.concatenate([parts[:120], cut]))
        found = sum(pair in set(pairs) for pair in zip(range(120), range(120, 240)))
        assert found >= 108, name
        assert len(pairs) == found


def planted(count, seed):
    """
    Hashes like those of photos, every tenth near another: at about the limit of similarity, half of them by noise in
    the strongest numbers alone. Colours are in steps of 12, so that some of two blocks differ by as much.
    """
    random = np.random.default_rng(seed)
    colours = random.normal(115, 45, (count, 1)) + random.normal(0, 15, (count, 3))
    waves = random.normal(size=(count, 255)) * np.arange(1, 256) ** -0.35
    copies, originals = random.permutation(count)[: count // 5 // 2 * 2].reshape(2, -1)
    noise = random.normal(size=(len(copies), 255)) * np.where(
        random.random((len(copies), 1)) < 0.5, 1, np.arange(255) < 8
    )
    noise *= np.linalg.norm(waves[originals], axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
    waves[copies] = waves[originals] + random.uniform(0.3, 0.6, (len(copies), 1)) * noise
    colours[copies] = colours[originals] + random.uniform(-20, 20, (len(copies), 3))
    waves /= np.linalg.norm(waves, axis=1, keepdims=True)
    return np.float16(np.concatenate([np.clip(colours / 12, 0, 21).round() * 12, waves], axis=1))


@pytest.mark.parametrize("count", [2, 40, 9000])
def test_near_pairs_are_those_of_all_pairs(count):
    """In blocks, and with numbers left out where these can't matter, no pair is lost, and none added."""
    originals = planted(count, seed=count)
    colours, waves = originals[:, :3].astype(np.float64), originals[:, 3:].astype(np.float32)
    expected = []
    for first in range(0, count, 1000):
        one, other = np.argwhere(waves[first : first + 1000] @ waves.T >= 0.9).T + [[first], [0]]
        alike = np.abs(colours[one] - colours[other]).max(axis=1, initial=0) <= 16
        expected += [(int(a), int(b)) for a, b in zip(one[alike], other[alike]) if a < b]
    assert near_pairs(originals) == expected
    assert count < 9000 or 200 < len(expected) < 700


def folders(place, numbers, names=("a", "b")):
    """Pictures of these numbers, in turn in a folder for each class."""
    for index, number in enumerate(numbers):
        folder = place / names[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / f"{number}.png")
    return place


@pytest.fixture
def overlapping(tmp_path):
    """Of 8 held-out images 2 are in the training set, in other files, and 3 are near copies."""
    train, held_out = folders(tmp_path / "train", range(40)), folders(tmp_path / "val", range(100, 108))
    Image.open(train / "a" / "0.png").save(held_out / "a" / "copy.bmp")
    shutil.copy(train / "b" / "1.png", held_out / "b" / "same.png")
    for number in (2, 4, 6):
        Image.open(train / "a" / f"{number}.png").save(held_out / "a" / f"near{number}.jpg", quality=70)
    return {"train_dir": str(train), "validation_dir": str(held_out)}


def test_copies_on_both_sides_of_a_given_split_are_refused_left_out_or_accepted(overlapping):
    with pytest.raises(InputError, match=r"2 of the 13 held-out images are training images, too") as raised:
        read(**overlapping)
    for part in ("copy.bmp (a) is ", "same.png (b) is ", "--drop_overlap", "--allow_overlap"):
        assert part in str(raised.value)
    accepted = read(**overlapping, allow_overlap=True)
    sentence = "2 of 13 held-out images are in the training set, 3 near copies. Their score is too high."
    assert sentence in accepted.describe()
    assert (accepted.overlap["in_training"], accepted.overlap["near_copies"], len(accepted.train)) == (2, 3, 40)
    assert sorted(accepted.overlap["near_pairs"]) == [[f"a/near{n}.jpg", f"a/{n}.png"] for n in (2, 4, 6)]
    dropped = read(**overlapping, drop_overlap=True)
    assert (len(dropped.train), len(dropped.validation)) == (35, 13)
    assert "0 of 13 held-out images are in the training set, 0 near copies." in dropped.describe()
    assert "is not known: no file was read" in read(**overlapping, verify_images=False).describe()


def test_an_image_with_two_labels(tmp_path):
    place = folders(tmp_path / "pets", range(20))
    Image.open(place / "a" / "4.png").save(place / "b" / "again.webp", lossless=True)
    with pytest.raises(InputError, match=r"2 images are there with two different labels") as raised:
        read(train_dir=str(place))
    assert "again.webp (b) is " in str(raised.value)
    assert "4.png (a)" in str(raised.value)
    data = read(train_dir=str(place), allow_overlap=True)
    assert len(data.train) + len(data.validation) == 21
    data = read(train_dir=str(place), drop_overlap=True)
    assert len(data.train) + len(data.validation) == 19


def test_a_random_split_keeps_copies_and_near_copies_together(tmp_path):
    place = folders(tmp_path / "pets", range(30))
    for number in range(0, 30, 3):
        folder = place / "ab"[number % 2]
        original = Image.open(folder / f"{number}.png")
        original.save(folder / f"{number}.bmp")
        for quality in (50, 80):
            original.save(folder / f"{number} {quality}.jpg", quality=quality)
    data = read(train_dir=str(place), train_val_split=0.3)
    sides = [{part.name(i).rsplit("/")[-1].split(".")[0].split(" ")[0] for i in range(len(part))}
             for part in (data.train, data.validation)]  # fmt: skip
    assert not sides[0] & sides[1]
    assert 0.2 < len(data.validation) / 60 < 0.4
    assert (
        data.overlap["sentence"]
        == f"0 of {len(data.validation)} held-out images are in the training set, 0 near copies."
    )
    loose = read(train_dir=str(place), train_val_split=0.3, allow_overlap=True)
    assert loose.overlap["near_copies"] > 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), min_size=4, max_size=120),
    st.floats(0.05, 0.6),
    st.integers(0, 3),
)
def test_no_group_is_cut_and_each_label_is_on_both_sides_where_it_has_two_groups(images, fraction, seed):
    rows, groups = [[label] for label, _ in images], [group for _, group in images]
    ids = [f"{index:016x}" for index in range(len(images))]
    held = set(choose_held_out(rows, ids, fraction, seed, groups=groups))
    assert not {groups[i] for i in held} & {groups[i] for i in range(len(ids)) if i not in held}
    one_label = all(len({label for label, other in images if other == group}) == 1 for group in groups)
    for label in {label for label, _ in images} if one_label else ():
        own = {index for index, row in enumerate(rows) if row == [label]}
        if len({groups[index] for index in own}) > 1:
            assert 0 < len(own & held) < len(own)


def test_groups_from_a_column_or_from_paths_stay_on_one_side_and_where_they_were(tmp_path):
    place = tmp_path / "scans"
    for patient in range(24):
        folder = place / "ab"[patient % 2]
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(1 + patient % 5):
            picture(10 * patient + number).save(folder / f"patient{patient}_{number}.png")
    rows = [
        {"image": {"bytes": file.read_bytes(), "path": None}, "label": file.parent.name, "who": file.name.split("_")[0]}
        for file in sorted(place.glob("*/*.png"))
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "scans.parquet")
    flags = {"train_dir": str(place), "train_val_split": 0.3, "group_from": r"(patient\d+)_"}

    def patients(data):
        return [
            {part.name(i).rsplit("/")[-1].split("_")[0] for i in range(len(part))}
            for part in (data.train, data.validation)
        ]

    first = read(**flags)
    train, held_out = patients(first)
    assert not train & held_out
    assert abs(len(first.validation) - 0.3 * len(rows)) <= 4
    table = read(tmp_path, train_dir=str(tmp_path / "scans.parquet"), train_val_split=0.3, group_column_name="who")
    assert table.images["held_out"] == first.images["held_out"]
    picture(999).save(place / "a" / "patient99_0.png")
    moved = patients(read(**flags))[1] ^ held_out
    assert len(moved - {"patient99"}) <= 3
    with pytest.raises(InputError, match="matches 0 of the"):
        read(**{**flags, "group_from": "(doctor)"})
    with pytest.raises(InputError, match="no regular expression"):
        read(**{**flags, "group_from": "("})
    shutil.copytree(place, tmp_path / "val")
    for file in (tmp_path / "val").glob("*/*.png"):
        Image.open(file).rotate(90, expand=True).save(file)
    with pytest.raises(InputError, match=r"25 groups are on both sides, e\.g\. "):
        read(**flags, validation_dir=str(tmp_path / "val"))


def test_the_record_the_card_and_the_last_lines_say_what_is_on_both_sides(overlapping, tmp_path):
    from modeling_vit_scratch.cards.records import dataset_metadata, result_message

    data = read(**overlapping, allow_overlap=True)
    metadata = json.loads(json.dumps(dataset_metadata(data)))
    assert metadata["overlap"]["near_copies"] == 3
    record = {"metric": "accuracy", "value": 0.5, "n": 13, "selection": "the last step", "dataset": metadata}
    assert "held-out images are in the training set, 3 near copies." in result_message(
        {**record, "training": {"broken_images": 0}}, "outputs/x"
    )
    assert draw_near_copies(data.near_copies, str(tmp_path / "out"))
    sheet = Image.open(tmp_path / "out" / "near_copies.png")
    assert sheet.height > 3 * 300
    pixels = np.asarray(sheet.convert("L"))
    tiles = [
        pixels[top + 20 : top + 200, left : left + 200]
        for top in range(0, sheet.height, sheet.height // 3)
        for left in (0, 300)
    ]
    assert all(tile.std() > 5 for tile in tiles[:6])  # a picture, no white paper
    for left, right in zip(tiles[:6:2], tiles[1:6:2]):
        assert np.corrcoef(left.ravel(), right.ravel())[0, 1] > 0.8  # and the two of a pair look alike
    assert draw_near_copies([], str(tmp_path / "none")) == []


def look_in_a_process(rank, place, out):
    PartialState()
    data = read(train_dir=place, train_val_split=0.3)
    (out / f"{rank}.json").write_text(json.dumps([data.images, data.overlap]))


def test_two_processes_split_as_one(tmp_path):
    place = folders(tmp_path / "pets", range(12))
    Image.open(place / "a" / "0.png").save(place / "a" / "0.jpg", quality=60)
    data = read(train_dir=str(place), train_val_split=0.3)
    run_forked(look_in_a_process, 2, str(place), tmp_path)
    expected = json.dumps([data.images, data.overlap])
    assert [(tmp_path / f"{rank}.json").read_text() for rank in (0, 1)] == [expected, expected]
