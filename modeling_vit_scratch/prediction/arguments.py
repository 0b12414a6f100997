# SPDX-License-Identifier: Apache-2.0
"""The command line of prediction: which model, which images, what to write and where."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ..common.errors import Problems
from ..common.files import writing_problem
from ..common.flags import FastDecodeFlag, HubFlags, ImageFlags, Parser, ReadingFlags, available_cores, flag


# What --output may end in.
FORMATS = (".parquet", ".csv", ".jsonl")
# --help: the groups of the flags, in their order.
GROUPS = {
    "most used": (
        "output", "top_k", "embeddings", "overwrite", "max_broken_images", "per_device_eval_batch_size",
        "dataloader_num_workers", "dtype", "backend", "fast_decode", "split",
    ),
    "data": ("dataset_config_name", "image_column_name"),
    "model": ("calibrated", "model_revision", "cache_dir"),
}  # fmt: skip


@dataclass
class PredictionArguments(ImageFlags, ReadingFlags, FastDecodeFlag, HubFlags):
    per_device_eval_batch_size: int = 64
    output: str | None = flag(
        None,
        "Write the predictions to this .parquet, .csv or .jsonl file, in the order of the inputs; broken images go to "
        "OUTPUT.errors.csv. Default: print a table.",
        metavar="FILE",
    )
    top_k: int = flag(
        1,
        "Labels per image, best first: columns label, score, label_2, score_2, ... 0: none, with --embeddings.",
        at_least=0,
    )
    embeddings: bool = flag(False, "Also write the encoder's pooled output, which the classifier sees.")
    calibrated: bool = flag(True, "Apply the temperature of MODEL.")
    dtype: str = flag(
        "float32",
        "Precision of the network. auto: bfloat16 where the processor computes it faster and the model's scores for "
        "made-up images stay within 0.02; else float32.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    backend: str = flag(
        "auto",
        "What computes on a CPU. auto: openvino where it is installed, for 10,000 images and more; else torch.",
        choices=("auto", "torch", "openvino"),
    )
    max_broken_images: int | None = flag(
        None,
        "Exit with status 1 if more than N images are broken; the others are predicted. Default: no limit; 0 for a "
        "table.",
        at_least=0,
    )
    overwrite: bool = flag(
        False, "Replace OUTPUT if it exists, and discard an unfinished run with other settings or inputs."
    )
    split: str | None = flag(None, "Split of a Hub data set. Default: the only one. Example: test", metavar="NAME")
    model: str = field(init=False, default="")
    inputs: list[str] = field(init=False, default_factory=list)


def parse_arguments(argv: list[str] | None = None, description: str | None = None) -> PredictionArguments:
    """Raises InputError with everything that is wrong with a command line (default: of this process)."""
    parser = Parser(
        PredictionArguments,
        groups=GROUPS,
        usage="%(prog)s MODEL INPUT [INPUT ...] [--output labels.parquet] [...]",
        description=description,
        epilog="Exit status: 0; 1 with more than --max_broken_images broken images; 2 for a mistake that you can fix; "
        "130 after Ctrl-C, 143 after SIGTERM. Several GPUs: accelerate launch scripts/predict.py MODEL INPUT "
        "--output FILE; the file has the same bytes (on CPUs with the same OMP_NUM_THREADS).",
    )
    parser.add_argument("model", metavar="MODEL", help="the folder of a model, its id on the Hub, or a checkpoint")
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help="an image file or URL; a folder, searched at any depth; a quoted pattern ('photos/**/*.jpg'); a list of "
        "paths (.txt, or - for standard input) or a table of them (.csv, .jsonl); a .parquet file of images; a "
        "WebDataset shard (.tar); a data set of the Hub, digits or elpv",
    )
    return parser.parse(PredictionArguments, argv, _check)


def _check(arguments: PredictionArguments, problems: Problems) -> None:
    if arguments.dataloader_num_workers is None:
        share = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        arguments.dataloader_num_workers = 0 if arguments.output is None else min(8, share)
    if arguments.max_broken_images is None:
        arguments.max_broken_images = 0 if arguments.output is None else sys.maxsize
    if arguments.top_k == 0 and not arguments.embeddings:
        problems.add("--top_k 0 leaves nothing to write. Add --embeddings.")
    if arguments.backend == "openvino" and arguments.dtype == "float16":
        problems.add("--backend openvino computes in float32 or bfloat16. Give --dtype bfloat16, or --backend torch.")
    if arguments.output is None:
        for name in ("embeddings", "overwrite"):
            if getattr(arguments, name):
                problems.add(f"--{name} is for a file. Give --output labels.parquet.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            problems.add("Several processes write a file. Give --output labels.parquet.")
        return
    output = Path(arguments.output)
    if output.suffix.lower() not in FORMATS:
        problems.add(f"--output {output} must end in one of {', '.join(FORMATS)}, to say what to write.")
    if reason := writing_problem(output.parent):
        problems.add(f"--output {output}: {reason}")
    if output.is_dir():
        problems.add(f"--output {output} is a folder. Give the name of a file in it, e.g. {output / 'labels.parquet'}.")
