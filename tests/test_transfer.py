# SPDX-License-Identifier: Apache-2.0
"""A transfer table: its runs have the flags they should, are repeated only if they must, and add up as numpy adds."""

import json
import os
import shlex
import signal
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from forked import start_script
from tiny_images import class_folders, load_script

from experiments.arguments import build_parser
from experiments.plan import Run, plan_runs, source_flags
from experiments.running import environment, run_all
from experiments.summary import build_cells, build_record
from experiments.writing import markdown
from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.cards.values import PRETRAINED, SCRATCH, find, gain_in_words
from modeling_vit_scratch.common.errors import InputError, TrainingStopped
from modeling_vit_scratch.training.build import build_model, load_encoder
from modeling_vit_scratch.training.command_line import parse_arguments
from startup.status import run_command_line


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with two sets of images and a model that was pretrained with labels on images of 16 x 24 pixels."""
    class_folders(tmp_path / "pets" / "train", each=8)
    class_folders(tmp_path / "pets" / "test", each=2)
    config = ViTScratchConfig.from_variant("test/4", num_labels=7, representation_size=12)
    ViTScratchForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTScratchImageProcessor(size={"height": 16, "width": 24}, image_mean=[0.4] * 3).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*words):
    arguments, common = build_parser("").parse_known_args(["--model_name_or_path", "model", *words])
    return arguments, plan_runs(arguments, common)


PETS = ("--data", "pets=pets/train", "--flags", "pets=--validation_dir pets/test --max_steps 3 --allow_overlap")


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def test_both_starts_get_the_same_network_and_flags(workplace):
    _, runs = plan(*PETS, "--image_size", "8", "16", "--config_overrides", "hidden_dropout_prob=0.1", "--seeds", "5")
    pretrained, scratch, *probes = runs
    assert [(run.kind, run.start) for run in runs] == [
        ("finetune", PRETRAINED), ("finetune", SCRATCH), ("probe", PRETRAINED), ("probe", SCRATCH),
    ]  # fmt: skip
    read = [parse_arguments([*run.flags, "--output_dir", "out"]) for run in (pretrained, scratch)]
    names = ("num_train_epochs", "max_steps", "seed", "weight_decay", "warmup_steps", "eval_strategy")
    assert [getattr(read[0][2], name) for name in names] == [getattr(read[1][2], name) for name in names]
    assert [(arguments[2].seed, arguments[2].max_steps, arguments[1].validation_dir) for arguments in read] == (
        [(5, 3, "pets/test")] * 2
    )
    assert [arguments[2].learning_rate for arguments in read] == [1e-4, 1e-3]  # what finetune.py takes from each start
    models, processors, _ = zip(*(build_model(arguments[0], ["a", "b"], 3, 0) for arguments in read))
    theirs, ours = (model.config.to_diff_dict() for model in models)
    assert {name for name in ours | theirs if ours.get(name) != theirs.get(name)} <= {"_name_or_path", "architectures"}
    assert ours["image_size"] == [8, 16]
    assert ours["hidden_dropout_prob"] == 0.1
    assert models[0].num_parameters() == models[1].num_parameters()
    name = "vit.embeddings.patch_embeddings.projection.weight"
    assert not torch.equal(*(dict(model.named_parameters())[name] for model in models))
    assert processors[0].to_dict() == processors[1].to_dict()
    assert list(processors[1].image_mean) == [0.4] * 3
    assert [run.flags[0] for run in probes] == ["model", "model"]
    assert "--random_weights" in probes[1].flags


def test_learning_rates_from_scratch_are_runs_of_their_own(workplace):
    _, runs = plan(*PETS, "--learning_rate", "1e-2", "--scratch_learning_rate", "3e-4", "3e-3", "--skip_probes")
    assert len(runs) == 9
    rates = {run.name: parse_arguments([*run.flags, "--output_dir", "out"])[2].learning_rate for run in runs}
    assert rates["finetune-pets-pretrained-0"] == 1e-2
    assert rates["finetune-pets-scratch-0.0003-2"] == 3e-4
    assert rates["finetune-pets-scratch-0.003-1"] == 3e-3


def test_places_are_folders_files_or_names_of_the_hub(workplace):
    assert source_flags("digits", None) == ["--dataset_name", "digits"]
    for place in ("pets/train", "pets.parquet", "shards/*.tar", "/data/pets", "./pets", "a/b/c"):
        assert source_flags("pets", place) == ["--train_dir", place]
    for place in ("food101", "someone/food"):
        assert source_flags("food", place) == ["--dataset_name", place]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "pets"], "--data pets: only digits and elpv go by the name alone"),
        (["--data", "a/b=pets/train"], "--data a/b: it names folders"),
        (["--data", "digits", "digits"], "a name is there twice"),
        (["--data", "digits", "--flags", "pets=--max_steps 3"], "--flags pets=--max_steps 3: give NAME=TEXT"),
        (["--data", "digits", "--seeds", "1", "1"], "--seeds 1 1: one is there twice"),
        (["--data", "digits", "--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--data", "digits", "--seed", "3"], "--seed: scripts/transfer.py sets it for every run. Give --seeds"),
        (["--data", "digits", "--variant=S/16"], "--variant: scripts/transfer.py sets it"),
        (["--data", "digits", "--num_train_epoch", "3"], "digits: --num_train_epoch: there is no such flag. Did you"),
        (["--data", "digits", "--max_train_samples", "0"], "digits: --max_train_samples 0 must be at least 1"),
        (["--data", "pets=./puts"], "pets: --train_dir ./puts does not exist"),
        (["--data", "digits", "--image_size", "9"], "9"),
    ],
)
def test_mistakes_are_told_before_anything_runs(words, message, workplace):
    with pytest.raises(InputError) as error:
        plan(*words)
    assert message in str(error.value)


def test_runs_share_the_cores_and_the_gpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert "OMP_NUM_THREADS" not in environment(1, None)
    assert environment(4, 2) == {**os.environ, "OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "2"}
    assert environment(32, None)["OMP_NUM_THREADS"] == "1"


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def scripts(tmp_path):
    """A finetune.py that writes what its flags say, in no time, and counts how often it was started."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "finetune.py").write_text(
        "import json, pathlib, sys, time\n"
        "value, output = sys.argv[1], pathlib.Path(sys.argv[sys.argv.index('--output_dir') + 1])\n"
        "with open('started', 'a') as file: file.write('x')\n"
        "output.mkdir(parents=True)\n"
        "(output / 'model.safetensors').write_text('')\n"
        "if value == 'hang': print('hangs', flush=True); time.sleep(60)\n"
        "if value == 'fail': sys.exit('error: too few images')\n"
        "(output / 'results.json').write_text(json.dumps({'metric': 'accuracy', 'value': float(value), 'n': 10}))\n"
    )
    return folder


def run_of(value, seed=0):
    return Run("finetune", "pets", PRETRAINED, seed, None, (value,))


def test_finished_runs_are_not_repeated(scripts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [run_of("0.5", 0), run_of("0.75", 1)]
    assert [record["value"] for record in run_all(runs, scripts, tmp_path / "runs", jobs=2)] == [0.5, 0.75]
    records = run_all([*runs, run_of("1", 2)], scripts, tmp_path / "runs", jobs=1, keep_models=True)
    assert [record["value"] for record in records] == [0.5, 0.75, 1]
    assert (tmp_path / "started").read_text() == "xxx"
    weights = sorted(path.parent.name for path in (tmp_path / "runs").rglob("model.safetensors"))
    assert weights == ["finetune-pets-pretrained-2"]
    with pytest.raises(InputError, match=r"finetune-pets-pretrained-1 is of a run with other flags"):
        run_all([run_of("0.5", 1)], scripts, tmp_path / "runs", jobs=1)


def test_a_run_that_fails_stops_all_and_says_why(scripts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [run_of("0.5", 0), run_of("fail", 1), run_of("hang", 2)]
    with pytest.raises(TrainingStopped, match=r"(?s)pretrained-1 ended with status 1.*error: too few images"):
        run_all(runs, scripts, tmp_path / "runs", jobs=1)
    assert (tmp_path / "runs" / "finetune-pets-pretrained-0" / "results.json").exists()
    # What has failed runs again, in a new folder.
    records = run_all([runs[0], run_of("0.25", 1)], scripts, tmp_path / "runs", jobs=1)
    assert [record["value"] for record in records] == [0.5, 0.25]


def test_sigterm_ends_all_processes(scripts, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys; from pathlib import Path\n"
        "from startup.status import run_command_line\n"
        "from experiments.plan import Run\n"
        "from experiments.running import run_all\n"
        "runs = [Run('finetune', 'pets', 'pretrained', seed, None, ('hang',)) for seed in range(3)]\n"
        "sys.exit(run_command_line(lambda: run_all(runs, Path('scripts'), Path('runs'), jobs=2)))\n"
    )
    run = start_script([program], tmp_path, tmp_path / "log")
    started, logs = tmp_path / "started", tmp_path / "runs"
    end = time.monotonic() + 60
    while not (started.exists() and started.read_text() == "xx" and len(list(logs.glob("*.part"))) == 2):
        assert time.monotonic() < end
        time.sleep(0.05)
    children = psutil.Process(run.process.pid).children()
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.wait(timeout=60) == 143
    assert "0 of 3 runs are finished. The same command goes on." in run.printed
    assert len(children) == 2
    assert not psutil.wait_procs(children, timeout=10)[1]


# ---------------------------------------------------------------------------------------------------------------------
# The table


def records_of(values, rate, **more):
    facts = {"num_training_images": 24, "held_out": "the validation split of the data"}
    common = {"n": 6, "dataset": facts, "hardware": "CPU", "versions": {"torch": "2", "transformers": "5"}}
    common |= {"git_commit": None, "process_seconds": 2.0}
    if rate is None:
        return [{**common, "probes": {"linear": {"accuracy": value}}} for value in values]
    return [{**common, "metric": "accuracy", "value": value, "training": {"learning_rate": rate}} for value in values]


def test_cells_are_means_and_sample_deviations_and_scratch_takes_its_best_rate():
    pretrained, slow, fast, linear = [0.9, 0.8, 0.95], [0.5, 0.4, 0.3], [0.6, 0.55, 0.2], [0.7, 0.7, 0.1]
    runs, records = [], []
    for kind, start, rate, values in (
        ("finetune", PRETRAINED, None, pretrained), ("finetune", SCRATCH, 1e-4, slow),
        ("finetune", SCRATCH, 1e-3, fast), ("probe", PRETRAINED, None, linear), ("probe", SCRATCH, None, slow),
    ):  # fmt: skip
        runs += [Run(kind, "pets", start, seed, rate, ("--x", "1", "--seed", str(seed))) for seed in (0, 1, 2)]
        records += records_of(values, None if kind == "probe" else rate or 1e-5)
    cells = build_cells(runs, records)
    arguments = build_parser("").parse_args(["--model_name_or_path", "me/vit", "--data", "pets=x", "--notes", "pets=n"])
    record = json.loads(json.dumps(build_record(cells, arguments, 3.0)))
    row = find(record, "pets", "fine-tuned")
    np.testing.assert_allclose(row[PRETRAINED]["mean"], np.mean(pretrained))
    np.testing.assert_allclose(row[PRETRAINED]["std"], np.std(pretrained, ddof=1))
    assert (row[SCRATCH]["values"], row[SCRATCH]["learning_rate"], row[SCRATCH]["n"]) == (fast, 1e-3, 3)
    assert row[SCRATCH]["tried"] == {"0.0001": pytest.approx(0.4), "0.001": pytest.approx(0.45)}
    assert row[SCRATCH]["command"] == "python scripts/finetune.py --x 1 --seed SEED"
    assert gain_in_words(row) == "+43.3"
    text = markdown(record)
    assert "| pets | 24, 6 | 45.0 ± 21.8 % | 88.3 ± 7.6 % | +43.3 |" in text
    assert "| pets | 40.0 ± 10.0 %, 50.0 ± 34.6 % |" in text
    assert "0.001 from scratch, 1e-05 from the weights.\nFrom scratch, it is the best of 0.0001, 0.001" in text
    assert "\npets: n.\n" in text


def test_the_command_makes_the_table(workplace, monkeypatch, capsys):
    def run_here(self, run, partial, device):
        """In this process, which has the imports behind it."""
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [f"{run.kind}.py", *run.flags, "--output_dir", str(partial)])
            load_script(run.kind).main()
        return 1.0

    monkeypatch.setattr("experiments.running._Crew._run", run_here)
    flags = [*PETS, "--seeds", "1", "--dataloader_num_workers", "0"]
    monkeypatch.setattr(sys, "argv", ["transfer.py", "--model_name_or_path", "model", *flags])
    assert run_command_line(load_script("transfer").main) == 0
    folder = workplace / "outputs" / "transfer"
    record = json.loads((folder / "transfer.json").read_text())
    assert {cell["how"] for cell in record["cells"]} == {"fine-tuned", "knn", "fewshot_1", "fewshot_5", "linear"}
    assert {(cell["n"], cell["num_training_images"], cell["num_held_out_images"]) for cell in record["cells"]} == {
        (1, 24, 6)
    }  # fmt: skip
    row = find(record, "pets", "fine-tuned")
    told = json.loads((folder / "runs" / "finetune-pets-scratch-1" / "results.json").read_text())
    assert row[SCRATCH]["values"] == [told["value"]]
    assert told["model"]["started_from"] == "scratch"
    assert shlex.split(row[SCRATCH]["command"])[-2:] == ["--seed", "SEED"]
    assert (folder / "transfer.md").read_text().startswith("| data | images")
    assert (folder / "transfer.png").stat().st_size > 1000
    assert not list(folder.rglob("model.safetensors"))
    assert "All numbers: outputs/transfer/transfer.json" in capsys.readouterr().out


def test_random_weights_are_the_same_network_and_those_of_the_seed(workplace):
    arguments = parse_arguments(["--model_name_or_path", "model"])[0]
    stored = load_encoder(arguments)[0].state_dict()
    first, again, other = (load_encoder(arguments, seed)[0].state_dict() for seed in (8, 8, 9))
    assert {name: value.shape for name, value in stored.items()} == {name: v.shape for name, v in first.items()}
    name = max(stored, key=lambda name: stored[name].numel())
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], stored[name])


# ---------------------------------------------------------------------------------------------------------------------
# Runs side by side


def test_two_runs_are_compared_and_what_differs_is_said(tmp_path, monkeypatch, capsys):
    facts = {"name": "pets", "held_out": "15 %", "num_training_images": 1527}
    record = {"metric": "accuracy", "value": 0.8, "n": 270, "dataset": facts, "training": {"epochs": 4.0}}
    runs = {"a": {"model": {"started_from": "scratch"}}, "b": {"model": {"started_from": "vit"}, "value": 0.9255}}
    runs["c"] = {"model": {"started_from": "vit"}, "training": {"epochs": 9.0}, "n": 100}
    for name, more in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({**record, "wall_time_seconds": 33.3, **more}))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "results.json").write_text('{"probes": {}}')
    monkeypatch.chdir(tmp_path)

    def compare(*words):
        monkeypatch.setattr(sys, "argv", ["transfer.py", "compare", *words])
        status = run_command_line(load_script("transfer").main)
        return status, *capsys.readouterr()

    status, told, _ = compare("a", "b")
    assert status == 0
    assert [line.split() for line in told.splitlines()[1:3]] == [
        ["a", "scratch", "80.00", "%", "33", "s"], ["b", "vit", "92.55", "%", "+12.55", "points", "33", "s"],
    ]  # fmt: skip
    assert "Same 270 held-out images; 1,527 training images, 4 epochs each." in told
    assert "Not the same in all of them: held-out images, epochs." in compare("a", "b", "c")[1]
    assert compare("a", "e")[0] == 2
    assert "d is of no run of scripts/finetune.py" in compare("a", "d")[2]
