# SPDX-License-Identifier: Apache-2.0
"""From the records of runs to the table: mean and spread over seeds, and what it takes to find them again."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.weights import digests
from ..training.record import METRIC_TITLES, command_line
from .plan import PRETRAINED, SCRATCH, Run


FINE_TUNED = "fine-tuned"
# Of the probes, those that the table shows; the record has all.
SHOWN_PROBES = {"fewshot_5": "5 images a class", "fewshot_10": "10 images a class", "linear": "linear, all images"}


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
    flags = [*run.flags[: run.flags.index("--seed") + 1], "SEED", *run.flags[run.flags.index("--seed") + 2 :]]
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


def find(record: dict[str, Any], data: str, how: str) -> dict[str, dict[str, Any]]:
    """The cells of a row by start."""
    return {cell["start"]: cell for cell in record["cells"] if (cell["data"], cell["how"]) == (data, how)}


def names_of(record: dict[str, Any]) -> list[str]:
    """The data sets, as on the command line."""
    return list(dict.fromkeys(cell["data"] for cell in record["cells"]))


def in_words(cell: dict[str, Any]) -> str:
    spread = "" if cell["std"] is None else f" ± {100 * cell['std']:.1f}"
    return f"{100 * cell['mean']:.1f}{spread} %"


def gain_in_words(row: dict[str, dict[str, Any]]) -> str:
    """Points of 100."""
    return f"{100 * (row[PRETRAINED]['mean'] - row[SCRATCH]['mean']):+.1f}"


def markdown(record: dict[str, Any]) -> str:
    """The tables, what they were measured on and the commands, for README and card."""
    names, model = names_of(record), record["model"]
    tables, commands, hows = [], [], {cell["how"] for cell in record["cells"]}
    rows = {name: find(record, name, FINE_TUNED) for name in names}
    metrics = {cell["metric"] for row in rows.values() for cell in row.values()}
    title = "accuracy" if metrics == {"accuracy"} else "result"
    lines = [
        f"| data | images: training, held out | held-out {title}, from scratch | from `{model}` | gain, points |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cell = row[PRETRAINED]
        of = "" if title == "accuracy" else f" ({METRIC_TITLES[cell['metric']]})"
        images = f"{cell['num_training_images']:,}, {cell['num_held_out_images']:,}"
        told = f"{in_words(row[SCRATCH])} | {in_words(cell)} | {gain_in_words(row)}"
        lines.append(f"| {name}{of} | {images} | {told} |")
        commands += [row[start]["command"] for start in (SCRATCH, PRETRAINED)]
    tables.append("\n".join(lines))
    shown = {how: words for how, words in SHOWN_PROBES.items() if how in hows}
    if shown:
        head = f"| features as they are: random weights, `{model}` | {' | '.join(shown.values())} |"
        lines = [head, "|---" * (1 + len(shown)) + "|"]
        for name in names:
            cells = [find(record, name, how) for how in shown]
            told = [f"{in_words(row[SCRATCH])}, {in_words(row[PRETRAINED])}" if row else "–" for row in cells]
            lines.append(f"| {name} | {' | '.join(told)} |")
            commands += [row[start]["command"] for row in cells[-1:] for start in (SCRATCH, PRETRAINED) if row]
        tables.append("\n".join(lines))
    notes = [f"{name}: {text.rstrip('.')}." for name, text in record["notes"].items()]
    return "\n\n".join([*tables, _circumstances(record), *notes, "\n".join(["```text", *commands, "```", ""])])


def _circumstances(record: dict[str, Any]) -> str:
    rates, tried, machines = {}, {}, {}
    for cell in record["cells"]:
        machine = (
            f"{cell['hardware']}; torch {cell['versions']['torch']}, transformers {cell['versions']['transformers']}"
        )
        machines.setdefault(machine, {})[cell["data"]] = None
    for name in names_of(record):
        row = find(record, name, FINE_TUNED)
        told = f"{row[SCRATCH]['learning_rate']:g} from scratch, {row[PRETRAINED]['learning_rate']:g} from the weights"
        rates.setdefault(told, []).append(name)
        tried |= row[SCRATCH].get("tried", {})
    told = "; ".join(f"{told} ({', '.join(names)})" if len(rates) > 1 else told for told, names in rates.items())
    best = f" From scratch it is the best of {', '.join(tried)} on the held-out images." if len(tried) > 1 else ""
    probes = any(cell["how"] in SHOWN_PROBES for cell in record["cells"])
    draws = " Each seed has three draws of a few images of its own, and its own random weights." if probes else ""
    seeds = sorted({cell["n"] for cell in record["cells"]})
    several = f"Mean ± standard deviation over {' or '.join(map(str, seeds))} seeds" if seeds[-1] > 1 else "One seed"
    where = ". ".join(f"{one} ({', '.join(names)})" if len(machines) > 1 else one for one, names in machines.items())
    return (
        f"{several}, after the last step. The same flags from both starts. Learning rate: {told}.{best}{draws} {where}."
    )
