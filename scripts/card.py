# SPDX-License-Identifier: Apache-2.0
"""
Writes the card of a model, README.md, from the records in its folder: its training, evaluations and transfer table.

    python scripts/card.py outputs/pets --license apache-2.0
    python scripts/card.py outputs/pets --evaluation outputs/pets-evaluated       copies the report into it first
    python scripts/card.py outputs/pretrained --transfer outputs/transfer         the same with a transfer table
    python scripts/card.py outputs/pets --dry_run                                 shows it, and writes nothing
    python scripts/card.py --template > mine.md                                   the default template, to edit it
    python scripts/card.py outputs/pets --template mine.md

Training and evaluation write the card by themselves; this is for what only a person knows, for reports from elsewhere
and for a template of your own. A number that no record has is not printed; a card that was changed by hand is not
written over.
"""

import argparse
from pathlib import Path

from startup.quick import before_torch, run_command_line


NAMES = """
names that a template may use (Jinja; see the default one):
  card_data           the metadata, as YAML
  name, location      the title; what the example loads: a path or a Hub id
  task, is_encoder, is_multi_label, labels, num_parameters
  config              config.json, and image_hw, patch_hw, grid_hw
  processor           preprocessor_config.json, and interpolation
  training            results.json of the training, and settings, results, probes, earlier (runs, the last first),
                      runs_from_scratch, selected_on_held_out, held_out_from_same_source
  evaluations         for each report its results.json, and title, folder, figures, main, metrics, num_bins, classes,
                      num_classes, class_metric, most_frequent, is_multi_label, is_small, absent, few, few_images,
                      worst, confusions, calibration
  best_evaluation     the first of them on images that the model was not trained on
  transfer            the tables of transfer.json: include "transfer.md"
  emissions           what codecarbon reports (finetune.py --report_to codecarbon): grams, kwh, country, version
  figures             the pictures in the folder, as paths; sheet_credit: whose photos figures/sheet.png shows
  license, license_name, license_link, license_is_of_data, base_license, base_model, version, oldest_transformers

filters, beside Jinja's own:
  number, percent, score(metric), metric_name, metric_title, size, names, url, code, code_block(language)

A name that does not exist is an error. What a model has no record of is false in a condition, and an error where it is
printed. The template is kept in the model's folder as card_template.md, and later cards are written with it; remove
that file to go back to the default.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=NAMES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
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
    parser.add_argument(
        "--license",
        help="by the Hub's name, e.g. apache-2.0. Default: that of restricted weights it started from, else the data's",
    )
    parser.add_argument("--license_name", help="of a license that is other. Example: imagenet-terms")
    parser.add_argument("--license_link", metavar="URL", help="where it can be read")
    parser.add_argument("--base_model", metavar="USER/NAME", help="on the Hub, what the training started from")
    parser.add_argument("--hub_model_id", metavar="USER/NAME", help="where it is published, for the example of use")
    parser.add_argument(
        "--template", nargs="?", const="", metavar="FILE",
        help="a template of your own for this model's cards. Without FILE, show the default template",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="also over a card that was changed by hand")
    parser.add_argument("--dry_run", action="store_true", help="show the card and write nothing")
    return parser


def main(argv: list[str] | None = None) -> None:
    with before_torch():
        arguments = build_parser().parse_args(argv)

    # After the command line, so that --help is quick.
    from modeling_vit_scratch.cards.records import CardOptions
    from modeling_vit_scratch.cards.writing import template_text, write_card
    from modeling_vit_scratch.common.errors import InputError

    if arguments.template == "":
        print(template_text(), end="")
        return
    if arguments.folder is None:
        raise InputError("Give the folder of a finished model, e.g. outputs/digits.")
    names = ("license", "license_name", "license_link", "base_model", "hub_model_id")
    options = CardOptions(**{name: getattr(arguments, name) for name in names})
    text = write_card(
        arguments.folder,
        options,
        arguments.evaluation,
        arguments.overwrite,
        arguments.dry_run,
        arguments.transfer,
        Path(arguments.template) if arguments.template else None,
    )
    if arguments.dry_run:
        print(text)
    else:
        print(f"Written: {arguments.folder / 'README.md'}. Look at it before you publish it.")


if __name__ == "__main__":
    raise SystemExit(run_command_line(main))
