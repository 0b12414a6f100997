# SPDX-License-Identifier: Apache-2.0
"""What a card says of the weights on other data: the table of scripts/transfer.py, from its record."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.metric_titles import METRIC_TITLES
from ..common.weights import digests
from .words import paragraphs, picture


# What a run starts from, and how its result was had: fine-tuned, or by a probe.
PRETRAINED, SCRATCH = "pretrained", "scratch"
FINE_TUNED = "fine-tuned"
# Of the probes, those that the table shows; the record has all.
SHOWN_PROBES = {"fewshot_5": "5 images a class", "fewshot_10": "10 images a class", "linear": "linear, all images"}
# Within the model's folder.
FOLDER, RECORD, FIGURE = "transfer", "transfer.json", "transfer.png"


@dataclass(frozen=True)
class Transfer:
    """transfer.json, and whether there is the picture of it."""

    record: dict[str, Any]
    has_figure: bool


def check_transfer(record: dict[str, Any], place: Path, folder: Path) -> None:
    """Raises InputError for what is no transfer table, or of other weights than those in the model's folder."""
    if not record.get("cells") or "weights" not in record:
        raise InputError(f"{place / RECORD} has no cells of a transfer table: make it with scripts/transfer.py.")
    ours = digests(folder)
    if record["weights"] and ours and record["weights"] != ours:
        raise InputError(
            f"{place / RECORD} is of other weights than those in {folder}: their SHA-256 differ. Remove it, or run "
            f"scripts/transfer.py --model_name_or_path {folder}."
        )


def take_transfer(place: Path, folder: Path) -> None:
    """Copies record and picture into the model's folder."""
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    for file in (place / RECORD, place / FIGURE):
        if file.is_file() and file.resolve() != (target / file.name).resolve():
            shutil.copyfile(file, target / file.name)


def transfer(found: Transfer | None) -> str | None:
    """The section; None without a record."""
    if found is None:
        return None
    figure = picture(f"{FOLDER}/{FIGURE}", "Fine-tuned and frozen, from these weights and from none")
    return paragraphs("## Transfer", markdown(found.record).strip(), figure if found.has_figure else None)


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
