# SPDX-License-Identifier: Apache-2.0
"""Streams: every record once, whoever reads it; the same order and pixels for any workers, and after a resumption."""

import itertools
from collections import Counter
from pathlib import Path

import datasets
import pytest
from tiny_images import CLASSES, build, difference, read, rows, table, webdataset, weights

from modeling_vit_scratch.common.errors import InputError, Problems, TrainingStopped
from modeling_vit_scratch.common.flags import DataArguments
from modeling_vit_scratch.data.splits import read_data
from modeling_vit_scratch.data.streams import (
    ROWS_PER_SHARD,
    ImageStream,
    RecordOrder,
    Shard,
    StreamBatches,
    StreamDataset,
)


COUNTS = (5, 1, 8, 3)
ALL = {shard * ROWS_PER_SHARD + row for shard, count in enumerate(COUNTS) for row in range(count)}


class Rows(list):
    """As much of datasets.IterableDataset as a shard needs; counts what is read."""

    read = 0

    def skip(self, count):
        for row in self[count:]:
            Rows.read += 1
            yield row


def stream(counts=COUNTS, known=True) -> ImageStream:
    shards = [
        Shard(Rows({"image": b"", "label": row % 3} for row in range(count)), f"{i}.tar", count if known else None)
        for i, count in enumerate(counts)
    ]
    return ImageStream(shards, "image", "label", list(CLASSES))


def batches(rank=0, world_size=1, batch_size=2, buffer_size=3, seed=0, **options) -> StreamBatches:
    source = stream(**options)
    order = RecordOrder(source, seed, buffer_size, rank, world_size)
    return StreamBatches(StreamDataset(source, None, buffer_size), order, batch_size)


def numbers(given, epoch=0) -> list[list[int]]:
    given.dataset.set_epoch(epoch)
    return [[record.number for record in batch] for batch in given]


# 17 records: for 1, 2 and 3 processes the tail is shared; 4 and 5 processes leave out what would be a step for some.
@pytest.mark.parametrize(
    ("world_size", "batch_size", "left_out"), [(1, 4, 0), (2, 4, 1), (2, 3, 0), (3, 4, 0), (4, 2, 1), (5, 2, 0)]
)
def test_an_epoch_has_every_record_once_over_all_processes(world_size, batch_size, left_out):
    orders = []
    for epoch in range(2):
        parts = [numbers(batches(rank, world_size, batch_size), epoch) for rank in range(world_size)]
        assert len({len(part) for part in parts}) == 1  # a step of one process is a step of all
        assert all(batch for part in parts for batch in part)
        counts = Counter(itertools.chain.from_iterable(itertools.chain.from_iterable(parts)))
        assert set(counts.values()) == {1}
        assert len(ALL - counts.keys()) == left_out < world_size
        assert counts.keys() <= ALL
        orders.append(parts)
    assert orders[0] != orders[1]


@pytest.mark.parametrize(("world_size", "by_shard"), [(1, True), (2, True), (3, False), (4, True)])
def test_without_counts_a_round_has_every_record_once_over_all_processes(world_size, by_shard):
    seen = {0: [], 1: []}
    for rank in range(world_size):
        source = stream(known=False)
        order = RecordOrder(source, 0, 3, rank, world_size)
        shards = set()
        for record in itertools.takewhile(lambda record: record.epoch < 4, order.endless()):
            if record.epoch in seen:
                seen[record.epoch].append(record.number)
            if record.epoch == 0:
                shards.add(record.number // ROWS_PER_SHARD)
        assert not by_shard or len(shards) == len(COUNTS) / world_size
    assert sorted(seen[0]) == sorted(ALL)
    assert sorted(seen[1]) == sorted(ALL)
    assert seen[0] != seen[1]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_reading_from_the_middle_is_reading_from_the_start(tmp_path, known, rank):
    def first(given, count):
        return [[record.number for record in batch] for batch in itertools.islice(given, count)]

    for skipped in range(4):
        whole = batches(rank, 2, known=known)
        expected = first(whole, 4)
        resumed = batches(rank, 2, known=known)
        if not known:
            whole.save(tmp_path, skipped)
            resumed.load(tmp_path)
        resumed.skip(0, skipped)
        Rows.read = 0
        assert first(resumed, 4) == [[]] * skipped + expected[skipped:]
        if skipped == 3:
            assert Rows.read < 3 * 2 + 3  # six records came before; no more than the block of the first was read again


def test_an_endless_stream_goes_on_from_any_record():
    for seed in range(4):
        order, blocks = RecordOrder(stream(known=False), seed, 1), {}
        whole = [record.number for record in itertools.islice(order.endless(0, blocks), 40)]
        resumed = [next(order.endless(first, {first: blocks[first]})).number for first in range(40)]
        assert resumed == whole


def test_a_block_is_shuffled_within_itself_and_memory_holds_one():
    # One shard in its own order, blocks of 3: each block has its own records, not in their order everywhere.
    flat = list(itertools.chain.from_iterable(numbers(batches(counts=(12,), buffer_size=3))))
    assert [sorted(flat[i : i + 3]) for i in range(0, 12, 3)] == [[i, i + 1, i + 2] for i in range(0, 12, 3)]
    assert flat != sorted(flat)
    given = batches(counts=(12,), buffer_size=3)
    Rows.read = 0
    next(iter(given))  # two records out of the first block, two of the next in
    assert Rows.read == 5


def test_drop_last_leaves_out_the_batch_that_is_not_full():
    given = batches(batch_size=4)
    given.drop_last = True
    assert [len(batch) for batch in numbers(given)] == [4, 4, 4, 4]


def test_a_place_of_another_order_is_refused(tmp_path):
    given = batches(known=False)
    next(iter(given))
    given.save(tmp_path, 1)
    with pytest.raises(InputError, match=r"another order: then .*'seed': 0.*, now .*'seed': 1"):
        batches(known=False, seed=1).load(tmp_path)


def test_a_shard_that_breaks_off_says_where():
    class Broken(Rows):
        def skip(self, count):
            yield self[0]
            raise ConnectionError("the server went away")

    source = ImageStream([Shard(Broken([{"image": b"", "label": 0}]), "a.tar")], "image", "label", ["x", "y"])
    with pytest.raises(TrainingStopped, match=r"a\.tar can't be read after row 1: the server went away"):
        list(source.read(0))


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.fixture
def held_out(pets) -> str:
    return pets


@pytest.fixture
def names(tmp_path) -> str:
    (tmp_path / "names.txt").write_text("\n".join(CLASSES) + "\n")
    return str(tmp_path / "names.txt")


def shards(folder: Path, kind: str) -> str:
    """Three files of one kind; those of Parquet with 8, 5 and 3 rows."""
    folder.mkdir()
    for i, count in enumerate((8, 5, 3)):
        if kind == "parquet":
            datasets.Dataset.from_list(rows()[:count]).to_parquet(folder / f"{i}.parquet")
        else:
            {"tar": webdataset, "csv": table, "jsonl": lambda file: table(file, None)}[kind](folder / f"{i}.{kind}")
    return str(folder / f"*.{kind}")


@pytest.mark.parametrize(("kind", "count"), [("parquet", 16), ("tar", None), ("csv", None), ("jsonl", None)])
def test_every_kind_of_file_gives_the_images_and_labels_that_are_in_it(tmp_path, held_out, names, kind, count):
    place = shards(tmp_path / "shards", kind)
    data = read(tmp_path / "cache", train_dir=place, validation_dir=held_out, streaming=True, label_names_file=names)
    assert data.label_names == list(CLASSES)
    assert data.num_train == count
    assert len(data.validation) == 24
    records = list(data.train.read(1))
    assert [CLASSES[record.label] for record in records] == [row["label"] for row in rows()][: len(records)]
    expected = [row["image"]["bytes"] for row in rows()]
    stored = [c if isinstance(c, bytes) else Path(c).read_bytes() for c in (r.image.content for r in records)]
    assert stored == expected[: len(records)]
    assert data.train.name(records[3].number) == f"1.{kind}, row 3"


def test_a_data_set_of_the_hub_brings_its_names_and_held_out_images(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    for split, count in (("train-00000", 8), ("train-00001", 4), ("validation-00000", 6)):
        columns = [{**row, "label": CLASSES.index(row["label"])} for row in rows()[:count]]
        (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(columns, features=features).to_parquet(
            tmp_path / "set" / "data" / f"{split}.parquet"
        )
    data = read(tmp_path / "cache", dataset_name=str(tmp_path / "set"), streaming=True)
    assert (data.num_train, len(data.validation), data.label_names) == (12, 6, list(CLASSES))
    assert "12 training and 6 held-out images" in data.describe()


def test_without_labels_to_learn_none_need_be_told(tmp_path, held_out):
    arguments = DataArguments(train_dir=shards(tmp_path / "shards", "tar"), validation_dir=held_out, streaming=True)
    data = read_data(arguments, 0, Problems(), str(tmp_path / "cache"), needs_labels=False)
    assert (data.label_names, set(data.validation.labels)) == ([], {0})
    assert {record.label for record in data.train.read(0)} == {0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation_dir": None}, "no part that can be held out at random"),
        ({"label_names_file": None}, "Give --label_names_file FILE"),
        ({"label_names_file": "nowhere.txt"}, "nowhere.txt is not a file"),
        ({"train_dir": "."}, "is a folder: --streaming reads files"),
        ({"label_names_file": "two"}, r"0.parquet, row 0.*: the label 'zebra' in column 'label' is none of the 2"),
    ],
)  # fmt: skip
def test_what_can_be_wrong_is_told_before_training(tmp_path, held_out, names, change, message):
    if change.get("label_names_file") == "two":
        (tmp_path / "two.txt").write_text("cat\nbrown bear\n")
        change = {"label_names_file": str(tmp_path / "two.txt")}
    place = shards(tmp_path / "shards", "parquet")
    arguments = {"train_dir": place, "validation_dir": held_out, "label_names_file": names, **change}
    with pytest.raises(InputError, match=message):
        read(tmp_path / "cache", streaming=True, **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def run_flags(place: str, held_out: str, names: str, *more: str) -> list[str]:
    flags = ["--train_dir", place, "--validation_dir", held_out, "--label_names_file", names, "--streaming"]
    flags += ["--shuffle_buffer_size", "5", "--eval_strategy", "no", "--logging_strategy", "steps", "--mixup", "0.2"]
    return [*flags, "--save_strategy", "steps", "--save_steps", "5", *more]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_resuming_in_an_epoch_gives_the_weights_of_a_run_without_a_stop(tmp_path, held_out, names, kind):
    # Parquet: 4 batches in an epoch, and 5 steps are one epoch and a quarter. Tar: no epochs, 24 records in a round.
    place = shards(tmp_path / "shards", kind)
    whole = build(
        tmp_path / "a", *run_flags(place, held_out, names, "--max_steps", "8", "--dataloader_num_workers", "0")
    )
    whole.train()
    resumed = build(
        tmp_path / "b", *run_flags(place, held_out, names, "--max_steps", "8", "--dataloader_num_workers", "2")
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert resumed.state.global_step == 8
    assert difference(weights(whole), weights(resumed)) == 0.0


def test_an_endless_stream_needs_a_number_of_steps(tmp_path, held_out, names):
    place = shards(tmp_path / "shards", "tar")
    with pytest.raises(InputError, match=r"no epochs\. Give --max_steps N --save_strategy steps"):
        build(tmp_path / "a", *run_flags(place, held_out, names, "--save_strategy", "epoch"))
    with pytest.raises(InputError, match="--aug_repeats shuffles all images, which a stream can't"):
        build(tmp_path / "b", *run_flags(place, held_out, names, "--max_steps", "2", "--aug_repeats", "2"))


def test_a_broken_image_is_named(tmp_path, held_out, names):
    (tmp_path / "shards").mkdir()
    broken = [{"image": {"bytes": b"no image", "path": "x.png"}, "label": "cat"}] * 4
    datasets.Dataset.from_list(broken).to_parquet(tmp_path / "shards" / "0.parquet")
    run = build(tmp_path / "a", *run_flags(str(tmp_path / "shards" / "*.parquet"), held_out, names))
    with pytest.raises(Exception, match=r"0\.parquet, row \d \(x\.png\)"):
        run.train()
