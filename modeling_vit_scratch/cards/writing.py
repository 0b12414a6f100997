# SPDX-License-Identifier: Apache-2.0
"""Writes README.md and the learning curves from the records, and keeps a card that a person wrote or changed."""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

from ..common.errors import InputError
from ..common.files import write_text
from ..common.records import METRIC_TITLES, license_note, title_of
from .records import CARD, CURVES, EVALUATIONS, CardOptions, ModelRecords, copy_records, gather, read_json, read_records
from .values import CARD_TEMPLATE, render, template_values


if TYPE_CHECKING:  # writing a card needs no trainer
    from transformers import Trainer


# The template of this model's cards, in its folder; without, the one beside this file.
OWN_TEMPLATE = "card_template.md"
# The last line: what a person has added, and a digest of the text above, by which changes by hand are found.
_SIGNATURE = re.compile(r"\n<!-- Written by scripts/card\.py (\{.*\}) ([0-9a-f]{16})\. .* -->\n?\Z")
# Blue and orange of Okabe and Ito, which colour-blind people can tell apart, and more of theirs.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def card_text(records: ModelRecords, template: Path | None = None) -> str:
    """README.md, by the `template`, that of the model's folder, or the default."""
    template = template or records.folder / OWN_TEMPLATE
    try:
        own = template.read_text(encoding="utf-8") if template.is_file() else None
    except (OSError, ValueError) as error:
        raise InputError(f"{template} can't be read: {error}") from error
    text = render(template_values(records), CARD_TEMPLATE if own is None else str(template), own)
    try:
        ModelCard(text)
    except Exception as error:  # of the YAML reader, of model-index
        raise InputError(f"{template}: the Hub would not take the metadata of this card: {error}") from error
    given = json.dumps(records.options.given(), sort_keys=True)
    return f"{text}\n<!-- Written by scripts/card.py {given} {_digest(text)}. What is changed by hand stays. -->\n"


def template_text() -> str:
    return (Path(__file__).parent / CARD_TEMPLATE).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def stored_options(folder: Path) -> dict[str, Any] | None:
    """The options that a card was written with; {} without a card; None if it was written or changed by hand."""
    file = folder / CARD
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    found = _SIGNATURE.search(text)
    if found is None or _digest(text[: found.start()]) != found[2]:
        return None
    return json.loads(found[1])


def write_card(
    folder: Path, options: CardOptions, reports: Sequence[Path] = (), overwrite: bool = False, dry_run: bool = False,
    transfer: Path | None = None, template: Path | None = None,
) -> str:  # fmt: skip
    """
    Writes README.md and the learning curves into the folder of a finished model, and returns the text. Where `options`
    are None, those of the earlier card stay. What lies elsewhere is copied into the folder, for later cards.
    """
    earlier = stored_options(folder)
    if earlier is None and not overwrite and not dry_run:
        raise InputError(
            f"{folder / CARD} was written or changed by hand. Move it away, or write over it: "
            f"scripts/card.py {folder} --overwrite"
        )
    options = options.over(earlier or {})
    options.check()
    if template is not None and not template.is_file():
        raise InputError(f"--template {template} is no file. Start from the default: scripts/card.py --template > FILE")
    records = read_records(folder, options, reports, transfer)
    if records.training and (note := license_note(options.license, records.training["model"]["license"])):
        print(note, file=sys.stderr)
    text = card_text(records, template)
    if dry_run:
        return text
    copy_records(folder, reports, transfer)
    if template is not None and template.resolve() != (folder / OWN_TEMPLATE).resolve():
        shutil.copyfile(template, folder / OWN_TEMPLATE)
    state = folder / "trainer_state.json"
    if state.is_file():
        draw_curves(read_json(state).get("log_history", []), folder / CURVES)
        text = card_text(read_records(folder, options))
    write_text(folder / CARD, text)
    return text


def refresh_card(model: str, report: str) -> str | None:
    """Writes a card again, after an evaluation into the folder of its model. Returns a message for the user."""
    folder = Path(model)
    if not (folder / CARD).is_file() or not Path(report).resolve().is_relative_to((folder / EVALUATIONS).resolve()):
        return None
    try:
        write_card(folder, CardOptions())
    except InputError as error:
        return f"The card stays as it is: {error}"
    return f"Updated: {folder / CARD}"


def write_training_card(trainer: "Trainer", record: dict[str, Any]) -> None:
    """Writes the card before the model is saved. An error is only a warning: it is no reason to lose the model."""
    folder = Path(trainer.args.output_dir)
    earlier = stored_options(folder)
    if earlier is None:
        print(f"{folder / CARD} was changed by hand and stays. For a new one: scripts/card.py {folder} --overwrite")
        return
    options = CardOptions(*trainer.args.terms, hub_model_id=trainer.hub_model_id).over(earlier)
    if note := license_note(options.license, record["model"].get("license")):
        print(note)
    try:
        draw_curves(trainer.state.log_history, folder / CURVES)
        # Evaluations that are there are of weights that this run has replaced.
        records = ModelRecords(folder, trainer.model.config, trainer.processing_class, record, [], options)
        write_text(folder / CARD, card_text(gather(records)))
    except Exception as error:
        print(f"warning: no card was written ({type(error).__name__}: {error}). Try scripts/card.py {folder} later.")


def card_to_publish(folder: Path, options: CardOptions) -> str | None:
    """The card with these options; None if there is none, if it was changed by hand, or if records are missing."""
    earlier = stored_options(folder) if (folder / CARD).is_file() else None
    if earlier is None:
        return None
    try:
        return card_text(read_records(folder, options.over(earlier)))
    except InputError:  # publishing finds what is wrong, and reports it
        return None


def draw_curves(history: list[dict[str, Any]], file: Path) -> None:
    """Draws losses and scores of the Trainer's `log_history`, with two points or more. Nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    # Training ends with a log of its runtime. An evaluation after that is of the weights that were kept, which may be
    # those of an earlier step.
    end = next((index for index, log in enumerate(history) if "train_runtime" in log), len(history))
    history = history[: end + 1]
    probes = sorted({key for log in history for key in log if key.startswith("probe_")})
    scores = {title_of(metric): f"eval_{metric}" for metric in METRIC_TITLES} | dict(zip(probes, probes))
    panels, losses = {}, {"training": "loss", "held-out images": "eval_loss"}
    for title, keys in (("loss", losses), ("score on held-out images", scores)):
        # Of each step the last value: a resumed run may have logged one twice.
        curves = {
            name: sorted({log["step"]: log[key] for log in history if key in log}.items()) for name, key in keys.items()
        }
        if curves := {name: points for name, points in curves.items() if len(points) > 1}:
            panels[title] = curves
    if not panels:
        return
    figure = Figure(figsize=(4.4 * len(panels), 3.2), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for number, (name, points) in enumerate(curves.items()):
            marker = "." if len(points) <= 60 else None
            # Of curves that lie on one another, both are seen: later ones are thin and broken.
            style, width = ("-", 1.6) if number == 0 else ("--", 1.0)
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot(*zip(*points), style, color=colour, linewidth=width, marker=marker, markersize=4, label=name)
        axes.set(xlabel="step", title=title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.legend(fontsize=7, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
