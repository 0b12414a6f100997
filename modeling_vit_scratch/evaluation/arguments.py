# SPDX-License-Identifier: Apache-2.0
"""The command line of evaluation: what to evaluate, on which images, and where the report goes."""

import importlib.util
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from ..common.errors import Problems
from ..common.parsing import Parser, refuse_unknown


# Views of each image: 2 is the image and its mirror image; 5 are the corners and the centre; 10 are these and theirs.
CROPS = (1, 2, 5, 10)
# Images in a row of a figure.
MOST_EXAMPLES = 8


@dataclass
class EvaluationArguments:
    """How to evaluate MODEL on DATASET."""

    _argument_group_name = "evaluation"

    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where results.json, predictions.csv and .npz and the figures go. Default: MODEL/evaluation/ and "
            "the name of the data; where MODEL is no folder, outputs/evaluation/ and both names."
        },
    )
    split: str = field(
        default="auto",
        metadata={
            "help": "auto: the validation split of the data; else the images that training held out, if MODEL was "
            "trained on these data; else all. Or: validation, train, all; of a data set of the Hub also any other: "
            "test"
        },
    )
    train_val_split: float | None = field(
        default=None,
        metadata={
            "help": "The part that training held out, where the model's results.json does not say. Example: 0.15"
        },
    )
    seed: int = field(
        default=42, metadata={"help": "Of the images that training held out, of --calibrate and of the intervals."}
    )
    calibrate: bool = field(
        default=False,
        metadata={
            "help": "Fit a temperature to a half of the images, chosen at random, report on the other half, and write "
            "it into MODEL/config.json. Pipelines apply it from then on, from_pretrained(..., calibrated=False) not."
        },
    )
    calibrated: bool = field(default=True, metadata={"help": "Apply the temperature that MODEL has."})
    threshold: float | None = field(
        default=None,
        metadata={
            "help": "Where images have any number of labels: the least probability of an answer, for F1, precision, "
            "recall and exact match. Default: 0.5"
        },
    )
    crops: int = field(
        default=1,
        metadata={
            "help": "Views of each image, whose probabilities are averaged. 2: the image and its mirror image. 5: "
            "corners and centre of the image resized to 8/7 of the input. 10: these and their mirror images.",
            "choices": list(CROPS),
        },
    )
    match_labels: str = field(
        default="name",
        metadata={
            "help": "How labels of data and model belong together: by name, or by index where a model has no names.",
            "choices": ["name", "index"],
        },
    )
    label_map: str | None = field(
        default=None,
        metadata={
            "help": "A file that says what labels of the data are called in the model: in each line of a text one of "
            "the data, a tab or a space, and the model's name or number of it; or .csv; or .json. ImageNet's "
            "LOC_synset_mapping.txt and imagenet_class_index.json are such. Example: wordnet_names.txt"
        },
    )
    max_broken_images: int = field(
        default=0, metadata={"help": "Leave out images that can't be read, up to so many: they are named and counted."}
    )
    save_logits: bool = field(
        default=True,
        metadata={"help": "Also write predictions.npz: the logits and labels of every image, to compute with."},
    )
    examples: int = field(
        default=0,
        metadata={
            "help": "Draw so many images that are right and as many that are wrong, chosen at random, and where MODEL "
            "looks (attention rollout). The card of MODEL shows them: mind whose images they are. Example: 6"
        },
    )
    examples_credit: str | None = field(
        default=None,
        metadata={
            "help": "Whose images --examples shows, where the data don't say. Example: 'photos by Jane Doe, CC BY 4.0'"
        },
    )
    update_card: bool = field(
        default=True,
        metadata={
            "help": "Write the results into MODEL/README.md too, if the report lies in MODEL and the card was not "
            "changed by hand."
        },
    )
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Images in a batch, per device."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read images, per device."})
    image_column_name: str | None = field(
        default=None, metadata={"help": "The column of the images. Default: the only one that can be it."}
    )
    label_column_name: str | None = field(
        default=None,
        metadata={"help": "The column of the labels. Default: the only one that can be it. Example: fine_label"},
    )
    label_separator: str | None = field(
        default=None,
        metadata={"help": "What stands between the labels of an image, where a table has them as text. Example: '|'"},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "The configuration of a data set of the Hub, where it has several."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate no more than so many images, chosen at random. For a quick try."}
    )
    bootstrap_resamples: int = field(
        default=1000, metadata={"help": "How often images are drawn anew for the 95 %% intervals. 0: no intervals."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of MODEL on the Hub."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where to keep what is downloaded. Default: the cache of Hugging Face."}
    )
    model: str = field(init=False, default="")
    dataset: str = field(init=False, default="")


def parse_arguments(argv: list[str] | None = None) -> EvaluationArguments:
    """
    Parses the command line.

    Raises:
        InputError: with everything that is wrong with it.
    """
    parser = Parser(
        EvaluationArguments,
        usage="%(prog)s MODEL DATASET [...]",
        description="Evaluates a model on labelled images: accuracies, F1, NLL, Brier score and ECE with 95 % "
        "intervals, scores of each class, confusion matrix and reliability diagram; of models that give an image any "
        "number of labels mean average precision, F1, and curves of precision and recall.",
        epilog="Several GPUs: accelerate launch scripts/evaluate.py MODEL DATASET.",
    )
    parser.add_argument("model", metavar="MODEL", help="the folder of a model, its id on the Hub, or a checkpoint")
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help="digits, elpv, a folder with a folder for each class or with a metadata.jsonl, a .parquet, .csv, .jsonl "
        "or .tar file or a quoted pattern of such, or a data set of the Hub",
    )
    namespace, unknown = parser.parse_known_args(list(sys.argv[1:] if argv is None else argv))
    refuse_unknown(unknown, parser, parser.problems)
    values = {**vars(namespace), **parser.instead_of_invalid}
    arguments = EvaluationArguments(**{one.name: values[one.name] for one in fields(EvaluationArguments) if one.init})
    arguments.model, arguments.dataset = values["model"], values["dataset"]
    _check(arguments, parser.problems)
    if parser.problems.messages:
        raise parser.problems.as_error()
    return arguments


def _check(arguments: EvaluationArguments, problems: Problems) -> None:
    for name, least in (
        ("per_device_eval_batch_size", 1), ("dataloader_num_workers", 0), ("bootstrap_resamples", 0), ("seed", 0),
        ("max_broken_images", 0), ("examples", 0),
    ):  # fmt: skip
        if getattr(arguments, name) < least:
            problems.add(f"--{name} {getattr(arguments, name)} must be at least {least}.")
    if arguments.examples > MOST_EXAMPLES:
        problems.add(f"--examples {arguments.examples} must be at most {MOST_EXAMPLES}.")
    if arguments.examples and importlib.util.find_spec("matplotlib") is None:
        problems.add(f'--examples {arguments.examples} are drawn with matplotlib: pip install -e ".[plot]"')
    if arguments.max_eval_samples is not None and arguments.max_eval_samples < 1:
        problems.add(f"--max_eval_samples {arguments.max_eval_samples} must be at least 1.")
    if arguments.train_val_split is not None and not 0.0 < arguments.train_val_split < 1.0:
        problems.add(f"--train_val_split {arguments.train_val_split:g} must lie between 0 and 1, e.g. 0.15.")
    if arguments.threshold is not None and not 0.0 < arguments.threshold < 1.0:
        problems.add(f"--threshold {arguments.threshold:g} must lie between 0 and 1, e.g. 0.5.")
    if arguments.label_map and arguments.match_labels == "index":
        problems.add("--label_map gives labels other names, which --match_labels index does not look at. Keep one.")
    if arguments.calibrate and not Path(arguments.model, "config.json").is_file():
        problems.add(f"--calibrate writes into the folder of a model, and {arguments.model} has no config.json.")
    if arguments.calibrate and arguments.crops != 1:
        problems.add("--calibrate is for the image as pipelines see it. Leave out --crops.")
    folder = _output_dir(arguments)
    arguments.output_dir = str(folder)
    if Path(folder, "results.json").exists():
        problems.add(f"--output_dir {folder} already has a report in it. Choose another, or remove the folder.")


def _output_dir(arguments: EvaluationArguments) -> Path:
    if arguments.output_dir:
        return Path(arguments.output_dir)
    model, path = Path(arguments.model), Path(arguments.dataset)
    is_general = "*" in path.name or path.stem == "metadata"
    data = (path.absolute().parent.name if is_general else path.stem or path.name) or "data"
    return model / "evaluation" / data if model.is_dir() else Path("outputs", "evaluation", model.stem, data)
