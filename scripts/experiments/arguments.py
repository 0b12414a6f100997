# SPDX-License-Identifier: Apache-2.0
"""The command line of scripts/transfer.py."""

import argparse


def build_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="the pretrained model: a folder, a file or a Hub id of any ViT")
    add("--data", nargs="+", required=True, metavar="NAME[=PLACE]", help="the data sets: digits and elpv by their "
        "names alone; else NAME=PLACE, where PLACE is what finetune.py takes as --train_dir, or the name of a data set "
        "of the Hub. Example: digits pets=photos/pets")  # fmt: skip
    add("--flags", nargs="+", default=[], metavar="NAME=FLAGS", help="flags of finetune.py for one data set only. "
        "Example: pets='--validation_dir photos/test --num_train_epochs 30'")  # fmt: skip
    add("--notes", nargs="+", default=[], metavar="NAME=TEXT", help="what readers of a figure should know of a data "
        "set, e.g. how it was split; goes into the record and below the table")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run for each. Default: 0 1 2")
    add("--scratch_learning_rate", nargs="+", type=float, help="learning rates for the runs from scratch: all are "
        "tried, and the best one counts, chosen on the same held-out images, in favour of from scratch. Default: that "
        "of the flags, or what finetune.py takes from scratch. Example: 3e-4 1e-3")  # fmt: skip
    add("--jobs", type=int, default=1, help="runs at a time; they share the cores, and take turns on several GPUs")
    add("--skip_probes", action="store_true", help="leave out the second table: features without fine-tuning")
    add("--keep_models", action="store_true", help="keep the weights of every fine-tuned model")
    add("--output_dir", default="outputs/transfer", help="where all goes. Default: outputs/transfer")
    return parser
