# SPDX-License-Identifier: Apache-2.0
"""From the records of runs to the table: mean and spread over seeds, and what it takes to find them again."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from experiments.plan import Run
from modeling_vit_scratch.cards.values import FINE_TUNED
from modeling_vit_scratch.common.records import command_line, digests


def build_cells(runs: list[Run], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    A cell for each data set, start and way of judging: fine-tuning, and each probe. Of several learning rates from
    scratch the cell is the best one's, by its mean, and `tried` has the means of all.

    Args:
        runs: all, in any order.
        records: of these, as `run_all` returns them.

    Returns:
        Cells with `data`, `start`, `how`, `metric`, `values` (one for each of the `seeds`), `mean`, `std` (of a sample,
        None for one seed), `n` (the seeds), `num_held_out_images`, `num_training_images`, `held_out`, `command`,
        `seconds` (of each run's whole process), `hardware`, `versions`, `git_commit`; and fine-tuned `learning_rate`.
    """
    groups: dict[tuple[str, str, str], dict[float | None, list[tuple[Run, dict[str, Any]]]]] = {}
    for run, record in zip(runs, records):
        key = (run.data, run.kind, run.start)
        groups.setdefault(key, {}).setdefault(run.learning_rate, []).append((run, record))
    cells = []
    for (_, kind, _), by_rate in groups.items():
        if kind == "probe":
            ((_, found),) = by_rate.items()
            cells += [_cell(found, name) for name in found[0][1]["probes"]]
            continue
        tried = {rate: _cell(found, FINE_TUNED) for rate, found in by_rate.items()}
        best = max(tried, key=lambda rate: tried[rate]["mean"])
        if best is not None:
            tried[best]["tried"] = {f"{rate:g}": cell["mean"] for rate, cell in tried.items()}
        cells.append(tried[best])
    return cells


def _cell(found: list[tuple[Run, dict[str, Any]]], how: str) -> dict[str, Any]:
    run, first = found[0]
    is_probe = how != FINE_TUNED
    values = [record["probes"][how]["accuracy"] if is_probe else record["value"] for _, record in found]
    is_seed = [word in ("--seed", "--split_seed") for word in ("", *run.flags)]
    flags = ["SEED" if after else word for word, after in zip(run.flags, is_seed)]
    training = {} if is_probe else {"learning_rate": first["training"]["learning_rate"]}
    return {
        "data": run.data,
        "start": run.start,
        "how": how,
        "metric": "accuracy" if is_probe else first["metric"],
        "values": values,
        "seeds": [run.seed for run, _ in found],
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "n": len(values),
        "num_held_out_images": first["n"],
        "num_training_images": first["dataset"]["num_training_images"],
        "held_out": first["dataset"]["held_out"],
        "command": command_line([f"{run.kind}.py", *flags]),
        "seconds": [record["process_seconds"] for _, record in found],
        "hardware": first["hardware"],
        "versions": first["versions"],
        "git_commit": first["git_commit"],
        **training,
    }


def build_record(cells: list[dict[str, Any]], arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What transfer.json has: the command, the model's name and weights, the notes on data sets and all cells."""
    model, notes = arguments.model_name_or_path, dict(entry.partition("=")[::2] for entry in arguments.notes)
    name = Path(model).resolve().name if Path(model).exists() else model
    return {
        "command": command_line(), "model": name, "weights": digests(Path(model)), "jobs": arguments.jobs,
        "wall_time_seconds": round(seconds, 1),
        "selection": "the last step of every run; where learning rates from scratch were tried, the one with the best "
        "mean on the held-out images, in favour of from scratch",
        "notes": notes, "cells": cells,
    }  # fmt: skip
