# SPDX-License-Identifier: Apache-2.0
"""
Writes the card of a model, README.md, from the records in its folder: its training, evaluations and transfer table.

    python scripts/card.py outputs/pets --license apache-2.0
    python scripts/card.py outputs/pets --evaluation outputs/pets-evaluated       takes the report into the folder first
    python scripts/card.py outputs/pretrained --transfer outputs/transfer         the same with a transfer table
    python scripts/card.py outputs/pets --dry_run                                 shows it, and writes nothing

Training and evaluation write it by themselves; this is for what only a person knows, and for reports from elsewhere.
A number that no record has is not printed; a card that was changed by hand is not written over.
"""

import argparse
from pathlib import Path

from startup.quick import before_torch, run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, nargs="?", help="of a finished model, e.g. outputs/pets")
    parser.add_argument(
        "--evaluation", type=Path, nargs="+", default=[], metavar="FOLDER",
        help="reports of scripts/evaluate.py that lie elsewhere: results.json and figures are copied to "
        "evaluation/NAME in the model's folder. Those that are there already need not be named",
    )  # fmt: skip
    parser.add_argument(
        "--transfer", type=Path, metavar="FOLDER",
        help="the --output_dir of scripts/transfer.py for this model: its table and picture are copied to transfer/ in "
        "the model's folder",
    )  # fmt: skip
    parser.add_argument("--license", help="of the model, by the Hub's name, e.g. apache-2.0. Default: that of the data")
    parser.add_argument("--base_model", metavar="USER/NAME", help="on the Hub, what the training started from")
    parser.add_argument("--hub_model_id", metavar="USER/NAME", help="where it is published, for the example of use")
    parser.add_argument(
        "--power_watts", type=float, help="that the training drew. Default: assumed by the names of the processors"
    )
    parser.add_argument(
        "--carbon_intensity", type=float,
        help="of the electricity, in grams of CO2 equivalent per kWh. Default: the world's mean. Example: 56",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="also over a card that was changed by hand")
    parser.add_argument("--dry_run", action="store_true", help="show the card and write nothing")
    parser.add_argument(
        "--template", action="store_true", help="show what all cards have in common, as in model_cards/TEMPLATE.md"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    with before_torch():
        arguments = build_parser().parse_args(argv)

    from modeling_vit_scratch.cards.records import Wishes
    from modeling_vit_scratch.cards.template import template
    from modeling_vit_scratch.cards.writing import write_card
    from modeling_vit_scratch.common.errors import InputError

    if arguments.template:
        print(template(), end="")
        return
    if arguments.folder is None:
        raise InputError("Give the folder of a finished model, e.g. outputs/digits.")
    names = ("license", "base_model", "hub_model_id", "power_watts", "carbon_intensity")
    wishes = Wishes(**{name: getattr(arguments, name) for name in names})
    own = (arguments.folder, wishes, arguments.evaluation, arguments.overwrite, arguments.dry_run)
    text = write_card(*own, arguments.transfer)
    if arguments.dry_run:
        print(text)
    else:
        print(f"Written: {arguments.folder / 'README.md'}. Look at it before you publish it.")


if __name__ == "__main__":
    run(main)
