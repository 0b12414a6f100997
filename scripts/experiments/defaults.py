# SPDX-License-Identifier: Apache-2.0
"""
How good the default flags of scripts/finetune.py are: beside a grid of settings and a linear probe, on small data.

    python scripts/experiments/defaults.py --model model_cards/vit-tiny-imagenet --data digits clothing=DIR:300

DIR has train*.parquet and test*.parquet. Every run gets N training images as --train_dir, of which it holds out its
own part and chooses its checkpoint by that, and is judged by scripts/evaluate.py on test images that it never sees.
`default` gets no flags but the size of the images; the grid gets learning rate, batch size and steps. The record is
OUTPUT_DIR/defaults.json, the table defaults.md. The same command goes on where it was stopped.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import runpy
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np


SCRIPTS = Path(__file__).parents[1]
sys.path.insert(0, str(SCRIPTS))

from modeling_vit_scratch.common.errors import Problems  # noqa: E402
from modeling_vit_scratch.common.files import write_text  # noqa: E402
from modeling_vit_scratch.common.flags import BUILT_IN, DataArguments  # noqa: E402
from modeling_vit_scratch.common.records import provenance  # noqa: E402
from modeling_vit_scratch.data.sources import read_source  # noqa: E402


DEFAULT, PROBE = "default", "linear probe"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="NAME[=DIR][:N]", help="digits or elpv, or a folder; N images")
    add("--model", help="the checkpoint to start from. Default: from scratch, with --scratch_flags")
    add("--scratch_flags", default="--variant Mi/4", help="the network from scratch")
    add("--image_size", type=int, default=48, help="of all runs, in pixels")
    add("--learning_rate", nargs="*", default=["1e-4x10", "3e-4", "3e-4x10", "1e-3"], help="x10: of the head")
    add("--schedule", nargs="*", default=["16x100", "16x300", "64x100"], help="batch size x steps")
    add("--only_default", action="store_true", help="leave out the grid and the probe")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--max_test_images", type=int, default=1000)
    add("--output_dir", default="outputs/defaults")
    return parser


def prepare(entry: str, maximum: int, folder: Path) -> tuple[str, Path, Path]:
    """The name of a data set, and the files of its training and test images; built-in ones keep 30 % for the test."""
    place, _, count = entry.partition(":")
    name, _, place = place.partition("=")
    if name in BUILT_IN and not place:
        parts = read_source(DataArguments(dataset_name=name), None, Problems()).train.train_test_split(0.3, seed=0)
    else:
        files = {split: [str(file) for file in Path(place).glob(f"{split}*.parquet")] for split in ("train", "test")}
        parts = datasets.load_dataset("parquet", data_files=files)
    sizes = {"train": int(count or len(parts["train"])), "test": maximum}
    paths = {}
    for split, part in parts.items():
        paths[split] = folder / f"{name}-{sizes['train']}-{split}.parquet"
        if not paths[split].exists():
            part.shuffle(seed=0).select(range(min(sizes[split], len(part)))).to_parquet(str(paths[split]))
    return f"{name} {sizes['train']}", paths["train"], paths["test"]


def _script(words: list[str], log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def run_script(name: str, words: list[str], log: Path) -> None:
    """A script in a process that is forked from this one, so that it need not import torch anew."""
    given = ([str(SCRIPTS / f"{name}.py"), *map(str, words)], log)
    process = multiprocessing.get_context("fork").Process(target=_script, args=given)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("\n".join([f"{name}.py ended with {process.exitcode}:", *log.read_text().splitlines()[-10:]]))


def run(kind: str, flags: list[str], start: list[str], seed: int, train: Path, test: Path, folder: Path) -> dict:
    """The result of one run: accuracy and NLL on the test images, steps and seconds of training."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if kind == PROBE:
        words = [start[1], *start[2:], "--train_dir", train, "--validation_dir", test, "--seed", seed]
        run_script("probe", [*words, "--output_dir", folder / "probe"], folder / "log.txt")
        return {"accuracy": json.loads((folder / "probe/results.json").read_text())["probes"]["linear"]["accuracy"]}
    model, begin = folder / "model", time.perf_counter()
    words = [*start, *flags, "--train_dir", train, "--output_dir", model, "--seed", seed, "--report_to", "none"]
    run_script("finetune", [*words, "--dataloader_num_workers", 0, "--verify_images", "False"], folder / "log.txt")
    seconds = time.perf_counter() - begin
    run_script(
        "evaluate", [model, test, "--dataloader_num_workers", 0, "--output_dir", folder / "test"], folder / "test.txt"
    )
    (result,) = (folder / "test").rglob("results.json")
    metrics = {one["metric"]: one["value"] for one in json.loads(result.read_text())["results"]}
    record = json.loads((model / "results.json").read_text())
    found = {name: metrics[name] for name in ("accuracy", "nll")}
    training = {name: record["training"][name] for name in ("steps", "batch_size", "learning_rate")}
    shutil.rmtree(model)
    return {**found, **training, "seconds": round(seconds, 1), "selection": record["selection"]}


def table(runs: list[dict[str, Any]]) -> str:
    """The default, the probe and the best setting of the grid, by data and start: means over seeds, with spread."""
    lines = ["| data | start | setting | n | accuracy | NLL | seconds |", "|---|---|---|---:|---:|---:|---:|"]
    cells: dict[tuple, dict[str, list[dict]]] = {}
    for one in runs:
        cells.setdefault((one["data"], one["start"]), {}).setdefault(one["setting"], []).append(one)

    def mean(found: list[dict], name: str) -> str:
        values = [one[name] for one in found if name in one]
        scale, digits = (100, 1) if name == "accuracy" else (1, 2 if name == "nll" else 0)
        spread = f" ± {scale * np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{scale * np.mean(values):.{digits}f}{spread}" if values else ""

    for (data, start), settings in cells.items():
        grid = {name: found for name, found in settings.items() if name[0].isdigit()}
        ranked = sorted(grid, key=lambda name: -np.mean([one["accuracy"] for one in grid[name]]))
        names = [name for name in settings if name not in grid] + ranked
        for name in names:
            label = f"best of {len(grid)}: {name}" if ranked and name == ranked[0] else name
            found = settings[name]
            cols = " | ".join(mean(found, part) for part in ("accuracy", "nll", "seconds"))
            lines.append(f"| {data} | {start} | {label} | {len(found)} | {cols} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = build_parser().parse_args()
    folder = Path(arguments.output_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "defaults.json"
    record = json.loads(file.read_text()) if file.exists() else {"runs": [], "commands": []}
    record |= {**provenance(), "commands": [*dict.fromkeys([*record["commands"], " ".join(sys.argv[1:])])]}
    size = ["--image_size", str(arguments.image_size)]
    start = ["--model_name_or_path", arguments.model] if arguments.model else arguments.scratch_flags.split()
    name_of_start = Path(arguments.model).name if arguments.model else "scratch " + arguments.scratch_flags
    settings = {DEFAULT: []}
    if not arguments.only_default:
        settings |= {PROBE: []} if arguments.model else {}
        for schedule, rate in itertools.product(arguments.schedule, arguments.learning_rate):
            (batch, steps), (encoder, _, head) = schedule.split("x"), rate.partition("x")
            flags = ["--learning_rate", encoder, "--per_device_train_batch_size", batch, "--max_steps", steps]
            flags += ["--head_learning_rate_multiplier", head or "1", "--metric_for_best_model", "loss"]
            settings[f"{rate}, {schedule}"] = flags
    prepared = [prepare(entry, arguments.max_test_images, folder) for entry in arguments.data]
    for seed, (data, train, test), (setting, flags) in itertools.product(arguments.seeds, prepared, settings.items()):
        key = {"data": data, "start": f"{name_of_start}, {arguments.image_size} px", "setting": setting, "seed": seed}
        if any(key.items() <= done.items() for done in record["runs"]):
            continue
        result = run(setting, flags, [*start, *size], seed, train, test, folder / "run")
        record["runs"].append(key | result)
        print(*key.values(), result, flush=True)
        write_text(file, json.dumps(record, indent=1) + "\n")
        write_text(folder / "defaults.md", table(record["runs"]))


if __name__ == "__main__":
    main()
