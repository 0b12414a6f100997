# SPDX-License-Identifier: Apache-2.0
"""The command line of evaluation: what to evaluate, on which images, and where the report goes."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from ..common.errors import Problems
from ..common.files import writing_problem
from ..common.flags import HubFlags, LabelFlags, Parser, ReadingFlags, SeedFlag, flag


# Images in a row of the figure.
MAX_EXAMPLES = 8
TOP_K = 5  # of top-5 accuracy
# --help: the groups of the flags, in their order.
GROUPS = {
    "most used": (
        "split", "output_dir", "label_map", "match_labels", "crops", "calibrate", "coverage", "min_accuracy",
        "label_issues", "threshold", "examples", "per_device_eval_batch_size", "dataloader_num_workers",
    ),
    "data": (
        "train_val_split", "dataset_config_name", "image_column_name", "label_column_name", "label_separator",
        "group_column_name", "group_from", "allow_overlap", "max_eval_samples", "max_broken_images", "seed",
    ),
    "model": ("calibrated", "model_revision", "cache_dir"),
    "report": ("save_logits", "bootstrap_resamples", "examples_credit", "update_card"),
}  # fmt: skip


@dataclass
class EvaluationArguments(LabelFlags, ReadingFlags, SeedFlag, HubFlags):
    """How to evaluate MODEL on DATASET."""

    dataloader_num_workers: int = 0
    output_dir: str | None = flag(
        None,
        "Folder for results.json, predictions and figures. Default: MODEL/evaluation/ and the name of the data; where "
        "MODEL is no folder, outputs/evaluation/ and both names.",
        metavar="DIR",
    )
    split: str = flag(
        "auto",
        "auto: the validation split of the data; else the images that training held out, if MODEL was trained on these "
        "data; else all. Or: validation, train, all, or the name of a split on the Hub.",
        metavar="NAME",
    )
    calibrate: bool = flag(
        False,
        "Fit a temperature to a random half of the images, report on the other half, and write it into "
        "MODEL/config.json. Pipelines then apply it; from_pretrained(..., calibrated=False) does not. With one label "
        "per image also fit --coverage and --min_accuracy, to the other half; with several a threshold for each label. "
        "Both are for predict.py.",
    )
    coverage: float | None = flag(
        None, "With --calibrate: how often the set of labels has the right one. Default: 0.9", above=0, below=1
    )
    min_accuracy: float | None = flag(
        None,
        "With --calibrate: the accuracy of the answers whose score is high enough. Of others predict.py says that it "
        "does not know. Default: 0.95",
        above=0,
        below=1,
    )
    label_issues: bool = flag(
        False,
        "In place of a report, look for wrong labels among the images (all, unless --split says which): a table and a "
        "sheet of the most doubtful ones, to look at. Needs pip install cleanlab.",
    )
    calibrated: bool = flag(True, "Apply the temperature of MODEL.")
    threshold: float | None = flag(
        None, "Minimum probability of a label, where images have several. Default: 0.5", above=0, below=1
    )
    crops: int = flag(
        1,
        "Views of each image whose probabilities are averaged. 2: with the mirror image. 5: corners and centre at 8/7 "
        "of the input size. 10: both.",
        choices=(1, 2, 5, 10),
    )
    match_labels: str = flag(
        "name", "Match the labels of data and model by name, or by index.", choices=("name", "index")
    )
    label_map: str | None = flag(
        None,
        "File with the model's name for each label of the data: text lines of both, .csv or .json. ImageNet's "
        "LOC_synset_mapping.txt and imagenet_class_index.json work. Example: wordnet_names.txt",
        metavar="FILE",
    )
    save_logits: bool = flag(True, "Also write predictions.npz: logits and labels of every image.")
    examples: int = flag(
        0,
        "Draw N right and N wrong images, chosen at random, with attention rollout. The model card shows them: mind "
        "whose images they are.",
        at_least=0,
    )
    examples_credit: str | None = flag(
        None, "Credit for --examples, where the data have none. Example: 'photos by Jane Doe, CC BY 4.0'"
    )
    update_card: bool = flag(
        True, "Write the results into MODEL/README.md too, unless it was changed by hand or the report is elsewhere."
    )
    bootstrap_resamples: int = flag(1000, "Bootstrap resamples for the 95 %% intervals. 0: no intervals.", at_least=0)
    model: str = field(init=False, default="")
    problem_type: str | None = field(init=False, default=None)  # "regression" if MODEL's is that
    dataset: str = field(init=False, default="")


def parse_arguments(argv: list[str] | None = None, description: str | None = None) -> EvaluationArguments:
    """Raises InputError with everything that is wrong with a command line (default: of this process)."""
    usage, epilog = "%(prog)s MODEL DATASET [...]", "Several GPUs: accelerate launch scripts/evaluate.py MODEL DATASET."
    parser = Parser(EvaluationArguments, groups=GROUPS, usage=usage, description=description, epilog=epilog)
    parser.add_argument("model", metavar="MODEL", help="the folder of a model, its id on the Hub, or a checkpoint")
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help="digits, elpv, a folder with one folder per class or with a metadata.jsonl, a .parquet, .csv, .jsonl or "
        ".tar file, a quoted pattern of such, or a data set of the Hub",
    )
    return parser.parse(EvaluationArguments, argv, _check)


def _check(arguments: EvaluationArguments, problems: Problems) -> None:
    if arguments.examples > MAX_EXAMPLES:
        problems.add(f"--examples {arguments.examples} must be at most {MAX_EXAMPLES}.")
    if arguments.examples and importlib.util.find_spec("matplotlib") is None:
        problems.add(f'--examples {arguments.examples} are drawn with matplotlib: pip install -e ".[plot]"')
    if arguments.label_map and arguments.match_labels == "index":
        problems.add("--label_map renames labels, which --match_labels index does not look at. Keep one.")
    if arguments.calibrate and not Path(arguments.model, "config.json").is_file():
        problems.add(f"--calibrate writes into the folder of a model, and {arguments.model} has no config.json.")
    if arguments.calibrate and arguments.crops != 1:
        problems.add("--calibrate is for the image as pipelines see it. Leave out --crops.")
    for name in ("coverage", "min_accuracy"):
        if getattr(arguments, name) is not None and not arguments.calibrate:
            problems.add(f"--{name} is fitted by --calibrate. Give both.")
    if arguments.label_issues:
        arguments.split = "all" if arguments.split == "auto" else arguments.split
        missing = [name for name in ("cleanlab", "matplotlib") if importlib.util.find_spec(name) is None]
        if missing:
            problems.add(f"--label_issues needs pip install {' '.join(missing)}")
    if not arguments.output_dir:
        model, path = Path(arguments.model), Path(arguments.dataset)
        is_general = "*" in path.name or path.stem == "metadata"
        data = (path.absolute().parent.name if is_general else path.stem) or "data"
        folder = model / "evaluation" / data if model.is_dir() else Path("outputs", "evaluation", model.stem, data)
        arguments.output_dir = str(folder)
    folder = Path(arguments.output_dir)
    patterns = ("results.json", "regression.json", "predictions.*", "*.png", "label_issues.csv")
    written = [file.name for pattern in patterns for file in folder.glob(pattern)]
    if reason := writing_problem(folder):
        problems.add(f"--output_dir {folder}: {reason} Give one that can.")
    elif written:
        problems.add(
            f"--output_dir {folder} already has a report in it ({written[0]}). Choose another, or remove the folder."
        )
