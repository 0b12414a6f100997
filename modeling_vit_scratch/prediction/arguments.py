# SPDX-License-Identifier: Apache-2.0
"""The command line of prediction: which model, which images, what to write and where."""

import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from ..common.errors import Problems
from ..common.parsing import Parser, refuse_unknown


# What --output may end in.
FORMATS = (".parquet", ".csv", ".jsonl")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class PredictionArguments:
    """What to predict with MODEL for every INPUT."""

    _argument_group_name = "prediction"

    output: str | None = field(
        default=None,
        metadata={
            "help": "Write here, in the order of the inputs: a .parquet, .csv or .jsonl file. Broken images are listed "
            "with their reasons in OUTPUT.errors.csv. Default: print a table."
        },
    )
    top_k: int = field(
        default=1,
        metadata={
            "help": "Labels of each image, best first: columns label, score, label_2, score_2 and so on. 0: no labels, "
            "with --embeddings."
        },
    )
    embeddings: bool = field(
        default=False,
        metadata={"help": "Also the column embedding: the pooled output of the encoder, which the classifier sees."},
    )
    fast_decode: bool = field(
        default=True,
        metadata={
            "help": "Decode JPEG photos at 1/2, 1/4 or 1/8 of their sides where that leaves 1.5 times the sides of the "
            "model's input, and resize with torch's kernels (the image processor's do_fast_resize). Pixels then differ "
            "by about one level of 255 on average from those of a pipeline, which decodes in full and resizes with "
            "Pillow, as --no_fast_decode does."
        },
    )
    calibrated: bool = field(default=True, metadata={"help": "Apply the temperature that MODEL has."})
    dtype: str = field(default="float32", metadata={"help": "What the network computes in.", "choices": list(DTYPES)})
    max_broken_images: int | None = field(
        default=None,
        metadata={
            "help": "With more broken images than this the exit status is 1; all the others are predicted all the "
            "same. Default: no limit with --output, 0 without."
        },
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Replace OUTPUT if it is there. An unfinished run with other settings or inputs is thrown away."
        },
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images in a batch, per device."})
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that read images, per device. Default: as many as there are cores for each, at most 8; "
            "0 without --output."
        },
    )
    split: str | None = field(
        default=None, metadata={"help": "The split of a data set of the Hub. Default: the only one. Example: test"}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "The configuration of a data set of the Hub, where it has several."}
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "The column of the images in tables. Default: the only one that can be it."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of MODEL on the Hub."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where to keep what is downloaded. Default: the cache of Hugging Face."}
    )
    model: str = field(init=False, default="")
    inputs: list[str] = field(init=False, default_factory=list)

    @property
    def broken_limit(self) -> float:
        """With more broken images than this the exit status is 1."""
        if self.max_broken_images is not None:
            return self.max_broken_images
        return 0 if self.output is None else float("inf")


def parse_arguments(argv: list[str] | None = None) -> PredictionArguments:
    """
    Parses the command line.

    Raises:
        InputError: with everything that is wrong with it.
    """
    parser = Parser(
        PredictionArguments,
        usage="%(prog)s MODEL INPUT [INPUT ...] [--output labels.parquet] [...]",
        description="Labels, scores and embeddings of images. A run with --output that was stopped or killed at any "
        "moment goes on with the same command, and its file has the same bytes as if it had not been.",
        epilog="Exit status: 0; 1 with more than --max_broken_images broken images; 2 for a mistake that you can mend; "
        "130 after Ctrl-C, 143 after SIGTERM. Several GPUs: accelerate launch scripts/predict.py MODEL INPUT "
        "--output FILE; the file has the same bytes (on CPUs with the same OMP_NUM_THREADS).",
    )
    parser.add_argument("model", metavar="MODEL", help="the folder of a model, its id on the Hub, or a checkpoint")
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help="an image file or URL; a folder, with all images at any depth; a quoted pattern of such ('photos/**/*.jpg'"
        "); a list of paths, one a line (.txt, or - for the standard input), or a table of paths (.csv, .jsonl); a "
        ".parquet file of images; a WebDataset shard (.tar); a data set of the Hub, digits or elpv",
    )
    words = list(sys.argv[1:] if argv is None else argv)
    namespace, unknown = parser.parse_known_args(words)
    refuse_unknown(unknown, parser, parser.problems)
    values = {**vars(namespace), **parser.instead_of_invalid}
    arguments = PredictionArguments(**{one.name: values[one.name] for one in fields(PredictionArguments) if one.init})
    arguments.model, arguments.inputs = values["model"], values["inputs"]
    _check(arguments, parser.problems)
    if parser.problems.messages:
        raise parser.problems.as_error()
    return arguments


def _check(arguments: PredictionArguments, problems: Problems) -> None:
    if arguments.dataloader_num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        arguments.dataloader_num_workers = 0 if arguments.output is None else min(8, share)
    for name, least in (
        ("top_k", 0), ("per_device_eval_batch_size", 1), ("dataloader_num_workers", 0), ("max_broken_images", 0),
    ):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and value < least:
            problems.add(f"--{name} {value} must be at least {least}.")
    if arguments.top_k == 0 and not arguments.embeddings:
        problems.add("--top_k 0 leaves nothing to write. Add --embeddings.")
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
    if output.is_dir():
        problems.add(f"--output {output} is a folder. Give the name of a file in it, e.g. {output / 'labels.parquet'}.")
