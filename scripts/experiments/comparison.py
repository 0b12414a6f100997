# SPDX-License-Identifier: Apache-2.0
"""Finished runs side by side, from their records: what each started from, how good it got, and what that gains."""

import argparse
import json
from pathlib import Path
from typing import Any

from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.common.records import METRIC_TITLES


# What has to be the same for two results to be comparable, and how to call it.
_SAME = {
    "held-out images": lambda record: [record["n"], *(record["dataset"][name] for name in ("name", "held_out"))],
    "metric": lambda record: record["metric"],
    "epochs": lambda record: record["training"]["epochs"],
    "training images": lambda record: record["dataset"]["num_training_images"],
}


def compare(argv: list[str]) -> None:
    """`scripts/transfer.py compare`: prints the table."""
    parser = argparse.ArgumentParser(
        "transfer.py compare",
        description="Finished runs side by side: what each started from, how good it got, and what it gains over the "
        "first. Says where runs can't be compared: other held-out images, or another budget.",
    )
    parser.add_argument("runs", nargs="+", metavar="run", help="the --output_dir of a run; the first is compared with")
    print(compare_runs(read_runs(parser.parse_args(argv).runs)))


def read_runs(folders: list[str]) -> dict[str, dict[str, Any]]:
    """The records of scripts/finetune.py in these folders. Raises InputError for one without."""
    records = {}
    for folder in folders:
        file = Path(folder, "results.json")
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{folder} has no results.json that can be read: {error}. Give folders of runs."
            ) from error
        if record.get("metric") not in METRIC_TITLES:
            raise InputError(f"{folder} is of no run of scripts/finetune.py: its results.json has no accuracy.")
        records[folder] = record
    return records


def compare_runs(records: dict[str, dict[str, Any]]) -> str:
    """A line for each run, with what it has gained over the first one in points of 100, and what is not the same."""
    (first, *_), width = records.values(), max(len("run"), *map(len, records))
    starts = {name: record["model"]["started_from"] for name, record in records.items()}
    start_width = max(len("started from"), *map(len, starts.values()))
    title = METRIC_TITLES[first["metric"]]
    lines = [f"{'run':<{width}}  {'started from':<{start_width}}  {'held-out ' + title:>18}  {'gain':>12}  {'time':>6}"]
    for name, record in records.items():
        gain = "" if record is first else f"{100 * (record['value'] - first['value']):+.2f} points"
        seconds = f"{record['wall_time_seconds']:.0f} s"
        value = f"{100 * record['value']:.2f} %"
        lines.append(f"{name:<{width}}  {starts[name]:<{start_width}}  {value:>18}  {gain:>12}  {seconds:>6}")
    differs = [what for what, of in _SAME.items() if any(of(record) != of(first) for record in records.values())]
    if differs:
        lines.append(f"Not the same in all of them: {', '.join(differs)}.")
    else:
        lines.append(
            f"Same {first['n']:,} held-out images; {first['dataset']['num_training_images']:,} training images, "
            f"{first['training']['epochs']:g} epochs each."
        )
    return "\n".join(lines)
