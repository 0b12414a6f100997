# SPDX-License-Identifier: Apache-2.0
"""From records to README.md: the card as a whole, and what keeps it from overwriting text that a person wrote."""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import Trainer

from ..common.errors import InputError
from ..common.files import write_text
from .records import CARD, CURVES, EVALUATIONS, CardOptions, ModelRecords, copy_report, gather, read_json, read_records
from .rendering import CARD_TEMPLATE, render
from .transfer import copy_transfer
from .values import template_values


# The template of this model's cards, in its folder; without, the one beside this file.
OWN_TEMPLATE = "card_template.md"
# The last line: what a person has added, and a digest of the text above, by which changes by hand are found.
_SIGNATURE = re.compile(r"\n<!-- Written by scripts/card\.py (\{.*\}) ([0-9a-f]{16})\. .* -->\n?\Z")


def card_text(records: ModelRecords, folder: Path, template: Path | None = None) -> str:
    """
    README.md: metadata, what people read, and the line that says who wrote it.

    Args:
        records: of the model.
        folder: of the model, which may have a template of its own.
        template: the one to use instead.

    Raises:
        InputError: if the template can't be read or has a mistake, or if its metadata are none that the Hub would take.
    """
    template = template or folder / OWN_TEMPLATE
    values = template_values(records)
    text = render(values, str(template), _read(template)) if template.is_file() else render(values, CARD_TEMPLATE)
    try:
        ModelCard(text)
    except Exception as error:  # of the YAML reader, of model-index
        raise InputError(f"{template}: the Hub would not take the metadata of this card: {error}") from error
    return text + _signature(text, records.options)


def template_text() -> str:
    """The template that cards are written with, to start one's own from."""
    return (Path(__file__).parent / CARD_TEMPLATE).read_text(encoding="utf-8")


def _read(template: Path) -> str:
    try:
        return template.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{template} can't be read: {error}") from error


def _signature(text: str, options: CardOptions) -> str:
    given = json.dumps(options.given(), sort_keys=True)
    return f"\n<!-- Written by scripts/card.py {given} {_digest(text)}. What is changed by hand stays. -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def stored_options(folder: Path) -> dict[str, Any] | None:
    """What a person had added to the card that is there; None if there is one that was written or changed by hand."""
    file = folder / CARD
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    found = _SIGNATURE.search(text)
    if found is None or _digest(text[: found.start()]) != found[2]:
        return None
    return json.loads(found[1])


def write_card(
    folder: Path,
    options: CardOptions,
    reports: Sequence[Path] = (),
    overwrite: bool = False,
    dry_run: bool = False,
    transfer: Path | None = None,
    template: Path | None = None,
) -> str:
    """
    Writes README.md, and the figure of the training, from everything that is in the folder of a finished model.

    Args:
        folder: of the model.
        options: what a person adds; those of the earlier card stay where there are none.
        reports: folders of reports that lie elsewhere, which are copied into that of the model.
        overwrite: also over a card that a person has written or changed.
        dry_run: write nothing.
        transfer: the folder of a transfer table that lies elsewhere, which is copied, too.
        template: a template that lies elsewhere, which is copied, too: later cards of this model have it again.

    Returns:
        The text.

    Raises:
        InputError: if a record is missing or of another model, if the template has a mistake, or if the card was
            changed by hand.
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
    text = card_text(read_records(folder, options, reports, transfer), folder, template)
    if dry_run:
        return text
    for place in reports:
        copy_report(place, folder)
    if transfer is not None:
        copy_transfer(transfer, folder)
    if template is not None and template.resolve() != (folder / OWN_TEMPLATE).resolve():
        shutil.copyfile(template, folder / OWN_TEMPLATE)
    state = folder / "trainer_state.json"
    if state.is_file():
        _draw(read_json(state).get("log_history", []), folder)
        text = card_text(read_records(folder, options), folder)
    write_text(folder / CARD, text)
    return text


def refresh_card(model: str, report: str) -> str | None:
    """
    Writes the card of a model again after an evaluation, if the report lies in the model's folder.

    Args:
        model: of the command line: a folder, or anything else.
        report: the folder of the report.

    Returns:
        A message for the user; None if the report lies elsewhere, or if there is no card.
    """
    folder = Path(model)
    if not (folder / CARD).is_file() or not Path(report).resolve().is_relative_to((folder / EVALUATIONS).resolve()):
        return None
    try:
        write_card(folder, CardOptions())
    except InputError as error:
        return f"The card stays as it is: {error}"
    return f"Updated: {folder / CARD}"


def write_training_card(trainer: Trainer, record: dict[str, Any]) -> None:
    """
    Writes the card at the end of a training, before its model is saved. If that fails, a warning says so: it is no
    reason to lose the model.

    Args:
        trainer: after training.
        record: of it.
    """
    folder = Path(trainer.args.output_dir)
    earlier = stored_options(folder)
    if earlier is None:
        print(f"{folder / CARD} was changed by hand and stays. For a new one: scripts/card.py {folder} --overwrite")
        return
    options = CardOptions(license=trainer.args.license, hub_model_id=trainer.hub_model_id).over(earlier)
    try:
        _draw(trainer.state.log_history, folder)
        # Evaluations that are there are of weights that this run has replaced.
        records = gather(folder, trainer.model.config, trainer.processing_class, record, [], options)
        write_text(folder / CARD, card_text(records, folder))
    except Exception as error:
        print(f"warning: no card was written ({type(error).__name__}: {error}). Try scripts/card.py {folder} later.")


def card_to_publish(folder: Path, options: CardOptions) -> str | None:
    """
    The card with the place and the licence that the model is published with.

    Args:
        folder: of the model.
        options: place and licence; what the card had before stays where there are none.

    Returns:
        The text; None if there is no card, if it was written or changed by hand, or if its records are not there.
    """
    earlier = stored_options(folder) if (folder / CARD).is_file() else None
    if earlier is None:
        return None
    try:
        return card_text(read_records(folder, options.over(earlier)), folder)
    except InputError:  # publishing looks for what is wrong and says it
        return None


def _draw(history: list[dict[str, Any]], folder: Path) -> None:
    try:
        from .figures import draw_curves
    except ImportError:  # no matplotlib: a card without the figure
        return
    draw_curves(history, folder / CURVES)
