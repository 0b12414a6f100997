# SPDX-License-Identifier: Apache-2.0
"""From facts to README.md: the card as a whole, and what keeps it from being written over text that a person wrote."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import Trainer

from ..common.errors import InputError
from ..common.files import write_text
from . import evidence, sections
from .metadata import metadata
from .records import CARD, CURVES, EVALUATIONS, Facts, Wishes, gather, read_facts, read_json, take
from .transfer import take_transfer, transfer
from .words import paragraphs


# The last line: what a person has added, and a digest of the text above, by which changes by hand are found.
_SIGNATURE = re.compile(r"\n<!-- Written by scripts/card\.py (\{.*\}) ([0-9a-f]{16})\. .* -->\n?\Z")


def card_text(facts: Facts) -> str:
    """README.md: metadata, what people read, and the line that says who wrote it."""
    text = f"---\n{metadata(facts).to_yaml()}\n---\n\n{card_body(facts)}"
    ModelCard(text)  # raises if the metadata are none that the Hub would take
    return text + _signature(text, facts.wishes)


def card_body(facts: Facts) -> str:
    """What people read."""
    body = paragraphs(
        f"# {facts.name}",
        sections.summary(facts),
        sections.use(facts),
        sections.architecture(facts),
        sections.data(facts),
        sections.training(facts),
        evidence.evaluation(facts),
        transfer(facts.transfer),
        sections.inside(facts),
        evidence.limits(facts),
        sections.cost(facts),
        sections.terms(facts),
    )
    return f"{body}\n"


def signed_again(before: str, after: str, wishes: Wishes) -> str:
    """
    A card that publishing has changed, signed for what it is now, so that nobody takes it for one changed by hand.

    Args:
        before: the card as it was; if it was changed by hand or has no signature, so it stays.
        after: the same with another licence or place.
        wishes: which these are.
    """
    old, new = _SIGNATURE.search(before), _SIGNATURE.search(after)
    if old is None or new is None or _digest(before[: old.start()]) != old[2]:
        return after
    text = after[: new.start()]
    return text + _signature(text, wishes.over(json.loads(old[1])))


def _signature(text: str, wishes: Wishes) -> str:
    given = json.dumps(wishes.given(), sort_keys=True)
    return f"\n<!-- Written by scripts/card.py {given} {_digest(text)}. What is changed by hand stays. -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def earlier_wishes(folder: Path) -> dict[str, Any] | None:
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
    wishes: Wishes,
    others: Sequence[Path] = (),
    overwrite: bool = False,
    dry_run: bool = False,
    transfer_table: Path | None = None,
) -> str:
    """
    Writes README.md, and the figure of the training, from everything that is in the folder of a finished model.

    Args:
        folder: of the model.
        wishes: what a person adds; the earlier card's stay where there are none.
        others: folders of reports that lie elsewhere, which are copied into that of the model.
        overwrite: also over a card that a person has written or changed.
        dry_run: write nothing.
        transfer_table: the folder of one that lies elsewhere, which is copied, too.

    Returns:
        The text.

    Raises:
        InputError: if a record is missing or of another model, or if the card was changed by hand.
    """
    wishes.check()
    earlier = earlier_wishes(folder)
    if earlier is None and not overwrite and not dry_run:
        raise InputError(
            f"{folder / CARD} was written or changed by hand. Move it away, or write over it: "
            f"scripts/card.py {folder} --overwrite"
        )
    wishes = wishes.over(earlier or {})
    facts = read_facts(folder, wishes, others, transfer_table)
    if not dry_run:
        for place in others:
            take(place, folder)
        if transfer_table is not None:
            take_transfer(transfer_table, folder)
        state = folder / "trainer_state.json"
        if state.is_file():
            _draw(read_json(state).get("log_history", []), folder)
            facts = read_facts(folder, wishes)
    text = card_text(facts)
    if not dry_run:
        write_text(folder / CARD, text)
    return text


def refresh_card(model: str, report: str) -> str | None:
    """
    Writes the card of a model anew after an evaluation, where it is one of ours.

    Args:
        model: of the command line: a folder, or anything else.
        report: the folder of the report.

    Returns:
        What to tell the user; None if the report does not lie in the model's folder, or if there is no card.
    """
    folder = Path(model)
    if not (folder / CARD).is_file() or not Path(report).resolve().is_relative_to((folder / EVALUATIONS).resolve()):
        return None
    try:
        write_card(folder, Wishes())
    except InputError as error:
        return f"The card stays as it is: {error}"
    return f"Written anew: {folder / CARD}"


def write_training_card(trainer: Trainer, record: dict[str, Any]) -> None:
    """
    Writes the card at the end of a training, before its model is there. Whatever goes wrong with it is told: it is no
    reason to lose the model.

    Args:
        trainer: after training.
        record: of it.
    """
    folder = Path(trainer.args.output_dir)
    earlier = earlier_wishes(folder)
    if earlier is None:
        print(f"{folder / CARD} was changed by hand and stays. For a new one: scripts/card.py {folder} --overwrite")
        return
    wishes = Wishes(license=trainer.args.license, hub_model_id=trainer.hub_model_id).over(earlier)
    try:
        _draw(trainer.state.log_history, folder)
        # Evaluations that are there are of weights that this run has replaced.
        facts = gather(folder, trainer.model.config, trainer.processing_class, record, [], wishes)
        write_text(folder / CARD, card_text(facts))
    except Exception as error:
        print(f"warning: no card was written ({type(error).__name__}: {error}). Try scripts/card.py {folder} later.")


def _draw(history: list[dict[str, Any]], folder: Path) -> None:
    try:
        from .figures import draw_curves
    except ImportError:  # no matplotlib: a card without the figure
        return
    draw_curves(history, folder / CURVES)
