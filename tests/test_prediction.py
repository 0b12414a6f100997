# SPDX-License-Identifier: Apache-2.0
"""scripts/predict.py: every kind of input, three formats, the numbers of pipelines, kills, two processes."""

import csv
import io
import json
import math
import os
import signal
import sys
import tarfile
import tracemalloc
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator
from forked import run_forked
from tiny_images import CLASSES, ROOT, encoded, image, load_script
from transformers import pipeline

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.acceleration import speed_up as speed_up_module
from modeling_vit_scratch.common.errors import InputError, TrainingInterrupted, on_screen
from modeling_vit_scratch.common.processes import StopSignals
from modeling_vit_scratch.data.listing import Item
from modeling_vit_scratch.prediction import job as jobs
from modeling_vit_scratch.prediction import model as model_module
from modeling_vit_scratch.prediction import reading
from modeling_vit_scratch.prediction.arguments import parse_arguments
from modeling_vit_scratch.prediction.model import Prediction, load_predictor
from modeling_vit_scratch.prediction.reading import Inputs
from modeling_vit_scratch.prediction.running import finish, open_job, run_job
from startup.status import run_command_line


SCRIPT = ROOT / "scripts" / "predict.py"


def save_model(folder: Path, **fields) -> Path:
    """The tiny model with a classifier that is sure of something, and its processor."""
    torch.manual_seed(0)
    fields = {"id2label": dict(enumerate(CLASSES)), **fields}
    model = ViTScratchForImageClassification(ViTScratchConfig.from_variant("test/4", **fields))
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    ViTScratchImageProcessor(size={"height": 16, "width": 24}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model; and photos/ with 13 images at several depths, two of them broken, among what is none."""
    folder = tmp_path_factory.mktemp("predicted")
    save_model(folder / "model")
    photos = folder / "photos"
    (photos / "b" / "c").mkdir(parents=True)
    (photos / ".hidden").mkdir()
    for number in range(5):
        image(number % 3, number, (200, 136)).save(photos / f"{number}.JPG", quality=90)
        image(number % 3, number).save(photos / "b" / f"{number}.png")
    image(0, 9).save(photos / "b" / "c" / 'with "quotes", and\na line.png')
    image(0, 9).save(photos / ".hidden" / "1.png")
    (photos / "b" / "broken.png").write_bytes(encoded(0, 1)[:300])
    (photos / "b" / "empty.jpg").write_bytes(b"")
    (photos / "notes.txt").write_text("no photo")
    return folder


@pytest.fixture
def here(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


def predict(monkeypatch, *argv) -> int:
    """Runs the script in this process. Returns its exit status."""
    words = list(map(str, argv))
    if "--output" in words and "--dataloader_num_workers" not in words:
        words += ["--dataloader_num_workers", "0"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    return run_command_line(load_script("predict").main)


def names_of(*inputs, **wishes) -> list[str]:
    arguments = parse_arguments(["model", *map(str, inputs), *(f"--{key}={value}" for key, value in wishes.items())])
    return [item.name for item in Inputs(arguments).items()]


def table_in(file: Path) -> list[dict]:
    if file.suffix == ".parquet":
        return pyarrow.parquet.read_table(file).to_pylist()
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    with open(file, newline="") as opened:
        rows = list(csv.DictReader(opened))
    numbers = {name for name in rows[0] if name.startswith("score")}
    values = {"embedding": json.loads, **dict.fromkeys(numbers, float)}
    return [{name: values.get(name, str)(value) for name, value in row.items()} for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Which images


def test_a_folder_is_read_to_every_depth_in_the_order_of_names(here, tmp_path):
    found = names_of("photos")
    assert found == sorted(found, key=lambda name: [*map(str, Path(name).parts)])
    assert set(found) == {str(p) for p in Path("photos").rglob("*.*") if p.is_file() and ".hidden" not in p.parts} - {
        "photos/notes.txt"
    }
    (tmp_path / "circle").mkdir()
    (tmp_path / "circle" / "back").symlink_to(tmp_path / "circle")
    (tmp_path / "circle" / "1.png").write_bytes(encoded(0, 1))
    for given in (tmp_path / "circle", tmp_path / "circle" / "**" / "*.png"):
        assert names_of(given) == [str(tmp_path / "circle" / "1.png")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no files with the ending of an image"):
        names_of(tmp_path / "empty")


@pytest.mark.parametrize("pattern", ["photos/*.JPG", "photos/**/*.png", "photos/b/[0-2].png", "**/?.png", "p*/b/c/*"])
def test_patterns_match_what_glob_does(here, pattern):
    import glob

    assert names_of(pattern) == sorted(glob.glob(pattern, recursive=True), key=lambda name: Path(name).parts)


def test_lists_and_tables_name_files_beside_them(here, tmp_path, monkeypatch):
    wanted = ["photos/0.JPG", "photos/b/1.png"]
    Path("list.txt").write_text("\n".join(wanted) + "\n\n")
    Path("list.csv").write_text("label,file_name\n" + "".join(f"cat,{name}\n" for name in wanted))
    Path("list.jsonl").write_text("".join(json.dumps({"image": name, "n": 1}) + "\n" for name in wanted))
    for file in ("list.txt", "list.csv", "list.jsonl"):
        assert names_of(file) == wanted
        monkeypatch.chdir(tmp_path)  # relative to the list, not to where the command runs
        arguments = parse_arguments(["model", str(here / file)])
        items = list(Inputs(arguments).items())
        assert [item.name for item in items] == wanted
        assert all(os.path.exists(item.path) for item in items)
        monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "stdin", io.StringIO("photos/0.JPG\nphotos/b/1.png"))
    assert names_of("-") == wanted
    Path("bad.jsonl").write_text('{"image": "photos/0.JPG"}\n{"image": 3}\n')
    with pytest.raises(InputError, match=r"bad\.jsonl can't be read as JSON lines, row 2: .*holds 3, and not a path"):
        names_of("bad.jsonl")


def test_mistakes_in_inputs_are_told_together(here):
    with pytest.raises(InputError) as caught:
        names_of("photos", "nothing/*.png", "nothing.parquet", "photos/notes.txt")
    assert "2 problems" in str(caught.value)
    assert "nothing matches" in str(caught.value)
    assert "nothing.parquet does not exist" in str(caught.value)
    assert names_of("missing.png") == ["missing.png"]  # told with the broken ones: others go on


def shard(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file


def test_the_same_images_get_the_same_labels_from_every_kind_of_input(here, tmp_path, monkeypatch):
    contents = [encoded(number % 3, number) for number in range(5)]
    shard(tmp_path / "a.tar", {f"{i}.{end}": c for i, c in enumerate(contents) for end in ("png", "cls")})
    rows = [{"image": {"bytes": content, "path": None}, "label": 0} for content in contents]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_list(rows, features=features)
    # Three row groups, none of them as long as a batch.
    data.to_parquet(tmp_path / "a.parquet", batch_size=2)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *_, **__: datasets.DatasetDict(test=data, other=data))
    paths = [f"photos/b/{number}.png" for number in range(5)]
    found = {}
    for number, inputs in enumerate([paths, [tmp_path / "a.tar"], [tmp_path / "a.parquet"], ["someone/pets"]]):
        more = ["--split", "test"] if number == 3 else []
        output = tmp_path / f"{number}.jsonl"
        argv = ["model", *inputs, "--output", output, "--per_device_eval_batch_size", 2, *more]
        assert predict(monkeypatch, *argv) == 0
        found[number] = table_in(output)
    assert [row["image"] for row in found[1]] == [f"{tmp_path}/a.tar/{number}.png" for number in range(5)]
    assert [row["image"] for row in found[2]] == [f"{tmp_path}/a.parquet#{number}" for number in range(5)]
    assert [row["image"] for row in found[3]] == [f"someone/pets#{number}" for number in range(5)]
    labels = [[(row["label"], row["score"]) for row in table] for table in found.values()]
    assert len(set(labels[0])) == 5
    assert labels[0] == labels[1] == labels[2] == labels[3]
    with pytest.raises(InputError, match=r"has the splits test, other\. Give one with --split"):
        names_of("someone/pets")


def test_damaged_shards_and_row_groups_lose_no_more_than_they_must(here, tmp_path, monkeypatch):
    contents = [encoded(0, number) for number in range(6)]
    whole = shard(tmp_path / "a.tar", {f"{i}.png": content for i, content in enumerate(contents)}).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        starts = [member.offset for member in archive]
    damages = {
        "in an image": whole[: starts[3] - 700],
        "between two": whole[: starts[3]],
        "in a header": whole[: starts[3] + 100],
        "a header": whole[: starts[3]] + bytes([255]) * 512 + whole[starts[3] + 512 :],
    }
    for name, content in damages.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        assert predict(monkeypatch, "model", tmp_path / f"{name}.tar", "--output", tmp_path / f"{name}.csv") == 0
        readable = 2 if name == "in an image" else 3
        assert len(table_in(tmp_path / f"{name}.csv")) == readable
        errors = table_in(tmp_path / f"{name}.csv.errors.csv")
        assert errors[-1]["image"] == str(tmp_path / f"{name}.tar")
        assert f"after {2}.png" in errors[-1]["reason"]
    file = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"image": [{"bytes": c, "path": None} for c in contents]}).to_parquet(file, batch_size=2)
    column = pyarrow.parquet.ParquetFile(file).metadata.row_group(1).column(0)
    damaged = bytearray(file.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    damaged[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    file.write_bytes(damaged)
    assert predict(monkeypatch, "model", file, "--output", tmp_path / "p.csv") == 0
    assert [row["image"][-2:] for row in table_in(tmp_path / "p.csv")] == ["#0", "#1", "#4", "#5"]
    errors = table_in(tmp_path / "p.csv.errors.csv")
    assert [row["image"][-2:] for row in errors] == ["#2", "#3"]
    assert all("row group 1 can't be read" in row["reason"] for row in errors)


def test_listing_holds_no_list(here, tmp_path):
    peaks = []
    for count in (2_000, 20_000):
        (tmp_path / "many.txt").write_text("".join(f"https://example.org/{i:099d}.jpg\n" for i in range(count)))
        job = jobs.Job(tmp_path / f"{count}.csv", 16)
        arguments = parse_arguments(["model", str(tmp_path / "many.txt")])
        tracemalloc.start()
        job.start(Inputs(arguments).items(), {}, False)
        for _, items in job.share(job.missing()):
            assert items
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert job.count == count
    assert peaks[1] < peaks[0] + 100_000  # 18,000 names more are two million bytes


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def test_three_formats_say_the_same_and_broken_images_have_a_file_of_their_own(here, tmp_path, monkeypatch, capsys):
    found = {}
    for ending in ("csv", "jsonl", "parquet"):
        output = tmp_path / f"labels.{ending}"
        status = predict(monkeypatch, "model", "photos", "--output", output, "--top_k", 2, "--embeddings")
        assert status == 0
        printed = capsys.readouterr().out
        assert f"Written: {output} (11 images)." in printed
        assert f"2 broken images, with the reasons: {output}.errors.csv" in printed
        found[ending] = table_in(output)
        errors = table_in(tmp_path / f"labels.{ending}.errors.csv")
        assert [row["image"] for row in errors] == ["photos/b/broken.png", "photos/b/empty.jpg"]
        assert "truncated" in errors[0]["reason"]
        assert "empty (0 bytes)" in errors[1]["reason"]
    assert {path.name for path in tmp_path.iterdir()} == {
        name for end in found for name in (f"labels.{end}", f"labels.{end}.errors.csv")
    }
    columns = ["image", "label", "score", "label_2", "score_2", "embedding"]
    for rows in zip(*found.values()):
        assert all(list(row) == columns for row in rows)
        for name in ("image", "label", "label_2"):
            assert len({row[name] for row in rows}) == 1
        for name in ("score", "score_2"):
            assert rows[0][name] == rows[1][name] == round(rows[2][name], 6)
        vectors = [np.float32(row["embedding"]) for row in rows]
        assert vectors[0].shape == (32,)
        np.testing.assert_array_equal(vectors[0], vectors[2])
        np.testing.assert_array_equal(vectors[1], vectors[2])
    assert any("\n" in row["image"] for row in found["csv"])
    argv = ["model", "photos", "--output", tmp_path / "labels.csv", "--overwrite"]
    assert predict(monkeypatch, *argv, "--max_broken_images", 1) == 1
    assert predict(monkeypatch, *argv, "--max_broken_images", 2) == 0
    assert predict(monkeypatch, *argv[:-1]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ({"temperature": 2.5}, []),
        ({"temperature": 2.5}, ["--no_calibrated"]),
        ({"problem_type": "multi_label_classification"}, []),
        ({"representation_size": 20, "pooling": "mean"}, []),
        ({"id2label": {0: "only"}}, []),
    ],
    ids=["calibrated", "not calibrated", "several labels", "tanh layer", "one label"],
)
def test_scores_are_a_pipeline_s_and_embeddings_the_model_s(here, tmp_path, monkeypatch, fields, flags):
    model_folder = save_model(tmp_path / "model", **fields)
    paths = [*(f"photos/{number}.JPG" for number in range(5)), "photos/b/0.png"]
    top_k = min(3, len(fields.get("id2label", CLASSES)))
    argv = ["model", *paths, "--output", tmp_path / "a.parquet", "--top_k", top_k, "--embeddings"]
    argv = [model_folder, *argv[1:], "--no_fast_decode", "--per_device_eval_batch_size", 4, *flags]
    assert predict(monkeypatch, *argv) == 0
    classify = pipeline("image-classification", model=str(model_folder))
    classify.model.config.calibrated = not flags
    encoder, processor = classify.model.vit, classify.image_processor
    for path, row in zip(paths, table_in(tmp_path / "a.parquet")):
        theirs = classify(path, top_k=top_k)
        ends = ["", "_2", "_3"][:top_k]
        assert [row[f"label{end}"] for end in ends] == [one["label"] for one in theirs]
        np.testing.assert_allclose([row[f"score{end}"] for end in ends], [one["score"] for one in theirs], atol=1e-6)
        with torch.no_grad():
            pooled = encoder(processor(path, return_tensors="pt")["pixel_values"]).pooler_output[0]
        np.testing.assert_allclose(row["embedding"], pooled, atol=1e-5)
    if "problem_type" in fields:
        assert abs(sum(row[f"score{end}"] for end in ends) - 1) > 0.1


def test_pixels_are_the_processor_s_or_of_a_photo_decoded_small(here):
    processor = ViTScratchImageProcessor(size={"height": 16, "width": 24}, crop_pct=0.9)
    files = [f"photos/{number}.JPG" for number in range(5)]
    arguments = parse_arguments(["model", *files])
    items = [(item, None) for item in Inputs(arguments).items()]
    exact = processor(files, return_tensors="np", do_rescale=False, do_normalize=False)["pixel_values"]
    full = reading.ItemDataset(processor, fast_decode=False)[0, items].pixels
    np.testing.assert_array_equal(full.numpy(), exact)
    fast = reading.ItemDataset(processor, fast_decode=True)[0, items].pixels
    difference = np.abs(fast.numpy() - exact)
    assert 0 < difference.mean() < 3  # --help: about one level on photos; these are noise


def test_threads_with_images_of_their_own_answer_for_these(place):
    flags = ["--top_k", "3", "--embeddings", "--output", "any.csv"]
    predictor, before = load_predictor(parse_arguments([str(place / "model"), "x", *flags])), torch.get_num_threads()
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 3, 16, 24), dtype=np.uint8))
    answers = {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            many = [predictor(pixels) for _ in range(5)]
            assert all(np.array_equal(one, other) for answer in many for one, other in zip(answer, many[0]))
            assert torch.get_num_threads() == threads
            answers[threads] = many[0]
    finally:
        torch.set_num_threads(before)
    one_by_one = [np.concatenate(values) for values in zip(*(predictor(image[None])[:3] for image in pixels))]
    for answer in answers.values():
        assert np.array_equal(answer.labels, one_by_one[0])
        np.testing.assert_allclose(answer.scores, one_by_one[1], atol=1e-6)
        np.testing.assert_allclose(answer.embeddings, one_by_one[2], atol=1e-5)


def test_embeddings_of_a_model_without_a_classifier(here, tmp_path, monkeypatch, capsys):
    config = ViTScratchConfig.from_variant("test/4", num_labels=0)
    ViTScratchForImageClassification(config).save_pretrained(tmp_path / "encoder")
    argv = [tmp_path / "encoder", "photos/0.JPG", "--output", tmp_path / "a.parquet"]
    assert predict(monkeypatch, *argv) == 2
    assert "no trained classifier" in capsys.readouterr().err
    assert predict(monkeypatch, *argv, "--top_k", 0, "--embeddings") == 0
    assert table_in(tmp_path / "a.parquet")[0].keys() == {"image", "embedding"}
    assert predict(monkeypatch, "model", "photos", "--output", tmp_path / "b.csv", "--top_k", 4) == 2
    assert "--top_k 4: MODEL model has 3 labels" in capsys.readouterr().err


def test_a_torch_that_is_built_for_a_gpu_without_one_computes_on_the_cpu(here, monkeypatch):
    def accelerator(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")  # what torch answers there

    monkeypatch.setattr(torch.accelerator, "current_accelerator", accelerator)
    assert predict(monkeypatch, "model", "photos/0.JPG") == 0


def test_a_table_on_the_screen(here, monkeypatch, capsys):
    assert predict(monkeypatch, "model", "photos", "--top_k", 3) == 1
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 1 + 11 * 3
    assert sum(float(line.split()[-1]) for line in lines[1:4]) == pytest.approx(1, abs=2e-4)
    assert any(r"and\na line.png" in line for line in lines)
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert [line.split(":")[1].strip() for line in errors] == ["photos/b/broken.png", "photos/b/empty.jpg"]
    assert on_screen("caf\udce9 \x1b[31m ü 猫") == "caf\\xe9 \\x1b[31m ü 猫"


def test_labels_do_not_steer_the_terminal_and_damaged_weights_are_no_answer(here, tmp_path, monkeypatch, capsys):
    names = {0: "cat\x1b]0;owned\x07", **{index: name for index, name in enumerate(CLASSES) if index}}
    model = ViTScratchForImageClassification.from_pretrained("model", id2label=names)
    model.save_pretrained(tmp_path / "model")
    assert predict(monkeypatch, tmp_path / "model", "photos/0.JPG", "--top_k", 3) == 0
    shown = capsys.readouterr().out
    assert r"cat\x1b]0;owned\x07" in shown
    assert "\x1b" not in shown
    model.classifier.weight.data[1, 1] = math.nan
    model.save_pretrained(tmp_path / "model")
    for argv in ([], ["--output", tmp_path / "a.csv"], ["--output", tmp_path / "b.csv", "--top_k", 0, "--embeddings"]):
        is_sick = "--embeddings" not in argv  # the encoder is whole
        assert predict(monkeypatch, tmp_path / "model", "photos/0.JPG", *argv) == (2 if is_sick else 0)
        assert ("outputs are NaN or infinite" in capsys.readouterr().err) == is_sick
    assert not (tmp_path / "a.csv").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Kills, several processes


KINDS = ("replace", "fsync", "unlink", "rmdir", "mkdir")


@pytest.fixture(scope="module")
def runner(place):
    """A run of the whole script behind the command line, with a model that is loaded once; and its arguments."""
    folder, accelerator = place, Accelerator(cpu=True)
    predictor = load_predictor(parse_arguments([str(folder / "model"), "x"]))

    def run(output: Path, *flags: str) -> tuple[int, int]:
        argv = [str(folder / "model"), str(folder / "photos"), "--output", str(output), "--dataloader_num_workers", "0"]
        arguments = parse_arguments([*argv, "--per_device_eval_batch_size", "2", *flags])
        inputs = Inputs(arguments)
        job, missing, _ = open_job(predictor, inputs, arguments, accelerator)
        run_job(job, missing, predictor, inputs, arguments, accelerator)
        return finish(job)

    return run


def test_an_embedding_is_as_wide_as_what_the_classifier_sees(here, tmp_path, monkeypatch):
    model = save_model(tmp_path / "model", pooling="cls_mean")
    assert predict(monkeypatch, model, "photos/0.JPG", "--output", tmp_path / "o.parquet", "--embeddings") == 0
    (row,) = table_in(tmp_path / "o.parquet")
    classifier = load_predictor(parse_arguments([str(model), "x"])).model.classifier
    assert len(row["embedding"]) == classifier.in_features == 64


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def run_until(run, moment: int) -> bool:
    """Whether a run, in another process, ended before it was killed: at a change of the disk, or as it wrote."""
    child = os.fork()
    if not child:
        try:
            left, write_table, rows_of = [moment], pyarrow.parquet.write_table, jobs._rows

            def dying(change):
                def do(*args, **kwargs):
                    left[0] -= 1
                    if left[0] < 0:
                        if change is write_table:  # in the middle of it
                            args[1].write(b"PAR1")
                            args[1].flush()
                        os._exit(9)  # as SIGKILL: nothing is cleaned up
                    return change(*args, **kwargs)

                return do

            for name in KINDS:
                setattr(os, name, dying(getattr(os, name)))
            pyarrow.parquet.write_table, jobs._rows = dying(write_table), dying(rows_of)
            run()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_change_of_the_disk_and_run_again_the_bytes_are_the_same(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "BLOCK", 6)
    (tmp_path / "whole").mkdir()
    assert runner(tmp_path / "whole" / "a.csv") == (11, 2)
    wanted = contents(tmp_path / "whole")
    assert wanted.keys() == {"a.csv", "a.csv.errors.csv"}
    moment, went_on, is_complete = 0, 0, False
    while not is_complete:
        folder = tmp_path / str(moment)
        folder.mkdir()
        is_complete = run_until(lambda folder=folder: runner(folder / "a.csv"), moment)
        left = contents(folder)
        for name in left.keys() & wanted.keys():  # a file is whole, or not there
            assert left[name] == wanted[name]
        if not is_complete and "a.csv" in left and not (folder / "a.csv.parts" / "job.json").exists():
            with pytest.raises(InputError, match="is there already"):  # it is complete
                runner(folder / "a.csv")
        elif not is_complete:
            went_on += len(list(folder.glob("a.csv.parts/*-*.part"))) > 0
            runner(folder / "a.csv")
        assert contents(folder) == wanted
        moment += 1
    assert moment > 15
    assert went_on > 5


def test_what_is_done_is_not_done_again_and_another_run_is_refused(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "BLOCK", 4)
    output = tmp_path / "a.jsonl"
    read, done = reading.ItemDataset._read, []

    def stopping(self, item, content):
        done.append(item.name)
        if len(done) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, item, content)

    monkeypatch.setattr(reading.ItemDataset, "_read", stopping)
    with pytest.raises(
        TrainingInterrupted, match=r"with 8 of 13 images predicted.*run the same command again"
    ) as caught:
        runner(output)
    assert caught.value.number == signal.SIGTERM
    with pytest.raises(InputError, match=r"--top_k: 2 now, 1 then"):
        runner(output, "--top_k", "2")
    assert runner(output) == (11, 2)
    assert len(done) == len(set(done)) == 13
    with pytest.raises(InputError, match="is there already"):
        runner(output)
    assert runner(output, "--top_k", "2", "--overwrite") == (11, 2)


def test_images_that_were_exchanged_under_their_names_begin_a_new_run(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(0, 0))
    item = Item("a.png", str(tmp_path / "a.png"))
    jobs.Job(tmp_path / "o.csv", 2).start([item], {}, False)
    assert jobs.Job(tmp_path / "o.csv", 2).start([item], {}, False)
    (tmp_path / "a.png").write_bytes(encoded(1, 1))
    with pytest.raises(InputError, match="files of images"):
        jobs.Job(tmp_path / "o.csv", 2).start([item], {}, False)


def test_no_input_and_no_foreign_file_is_written_over(here, tmp_path, monkeypatch, capsys):
    listing = tmp_path / "labels.csv"
    listing.write_text(f"file_name\n{here / 'photos' / '0.JPG'}\n")
    before = listing.read_bytes()
    for flags in ([], ["--overwrite"]):
        assert predict(monkeypatch, "model", listing, "--output", listing, *flags) == 2
    (tmp_path / "link.csv").symlink_to(listing)
    assert predict(monkeypatch, "model", listing, "--output", tmp_path / "link.csv", "--overwrite") == 2
    assert "an input. Give another --output" in capsys.readouterr().err
    assert listing.read_bytes() == before
    foreign = tmp_path / "o.csv.errors.csv"
    foreign.write_text("mine")
    assert predict(monkeypatch, "model", listing, "--output", tmp_path / "o.csv", "--overwrite") == 2
    assert foreign.read_text() == "mine"


def test_rows_that_two_have_written_count_once(tmp_path):
    """A process that outlives its run may write what the next run does again."""
    job = jobs.Job(tmp_path / "a.csv", 2)
    job.start([Item(str(number), "a") for number in range(7)], {}, False)
    for first, end in ((0, 2), (1, 3), (2, 3), (3, 4)):
        numbers = range(2 * first, min(2 * end, 7))
        nothing = np.zeros((len(numbers), 0))
        job.write_part(
            first,
            end,
            jobs.part_rows(list(map(str, numbers)), [None] * len(numbers), Prediction(nothing, nothing, None)),
        )
    assert job.missing() == []
    assert [name for part in job.read_parts() for name in part["image"].to_pylist()] == list("0123456")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_goes_on_with_the_threads_that_it_was_begun_with(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "BLOCK", 4)
    assert not run_until(lambda: runner(tmp_path / "a.parquet"), 10)
    torch.set_num_threads(2)  # another machine, or another number of processes
    seen = []
    monkeypatch.setattr(jobs.Job, "write_part", lambda *_: seen.append(torch.get_num_threads()))
    try:
        with pytest.raises(RuntimeError, match="accounts for"):  # nothing was written
            runner(tmp_path / "a.parquet")
    finally:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
    assert threads == 1
    assert set(seen) == {1}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_one_run_at_a_time(tmp_path):
    job = jobs.Job(tmp_path / "a.csv", 2)
    job.start([Item("a", "a")], {}, False)

    def start() -> None:
        with pytest.raises(InputError, match="Another run is at work"):
            jobs.Job(tmp_path / "a.csv", 2).start([Item("a", "a")], {}, False)

    assert run_until(start, 10)


def test_the_end_of_a_shell_is_no_signal(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # exported by someone, who was no launcher
    with StopSignals() as stop:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert stop.poll() == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_go_on_where_one_was_killed_and_write_the_same_bytes(runner, here, tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    runner(tmp_path / "one" / "a.parquet")
    monkeypatch.setattr(jobs, "BLOCK", 4)
    run_until(lambda: runner(tmp_path / "two" / "a.parquet"), 12)
    assert len(list(tmp_path.glob("two/a.parquet.parts/[0-9]*.part"))) in (1, 2)  # of 4
    argv = [str(here / "model"), str(here / "photos"), "--output", str(tmp_path / "two" / "a.parquet")]
    argv += ["--per_device_eval_batch_size", "2", "--dataloader_num_workers", "1"]

    def one_of_two(rank: int) -> None:
        with open(tmp_path / f"{rank}.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
            status = predict(monkeypatch, *argv)
        assert status == 0, (tmp_path / f"{rank}.log").read_text()

    run_forked(one_of_two, 2)
    assert "Going on with" in (tmp_path / "0.log").read_text()
    assert "2 broken images" in (tmp_path / "0.log").read_text()
    assert "broken images" not in (tmp_path / "1.log").read_text()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output", "a.txt"], "must end in one of .parquet, .csv, .jsonl"),
        (["--top_k", "-1"], "--top_k -1 must be at least 0"),
        (["--top_k", "0", "--output", "a.csv"], "leaves nothing to write"),
        (["--embeddings"], "--embeddings is for a file"),
        (["--per_device_eval_batch_size", "0"], "must be at least 1"),
        (["--output", "."], "is a folder"),
        (["--topk", "3"], "--topk"),
    ],
)
def test_refused_commands(flags, words):
    with pytest.raises(InputError) as caught:
        parse_arguments(["model", "photos", *flags])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("gain", "spread", "wanted"), [(7.0, 0.1, "bfloat16"), (7.0, 5.0, "float32"), (0.2, 0.1, "float32")]
)
def test_dtype_auto_takes_bfloat16_where_it_is_faster_and_agrees(place, monkeypatch, capsys, gain, spread, wanted):
    monkeypatch.setattr(model_module, "bfloat16_gain", lambda: gain)
    model = ViTScratchForImageClassification.from_pretrained(place / "model")
    torch.nn.init.normal_(model.classifier.weight, std=spread)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    name, reason = model_module.choose_dtype(model, torch.device("cpu"))
    assert name == wanted, reason
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    arguments = parse_arguments([str(place / "model"), "photo.jpg", "--dtype", "auto"])
    predictor = load_predictor(arguments)
    assert f"--dtype auto: {arguments.dtype}, " in capsys.readouterr().err
    assert {weight.dtype for weight in predictor.model.parameters()} == {getattr(torch, arguments.dtype)}
    monkeypatch.setattr(speed_up_module, "bfloat16_gain", lambda: gain)
    load_predictor(parse_arguments([str(place / "model"), "photo.jpg", "--dtype", "bfloat16"]))
    assert ("5.0 times more slowly" in capsys.readouterr().err) == (gain < 1)
