# SPDX-License-Identifier: Apache-2.0
"""The command line of fine-tuning: one field, one default, one help text."""

import argparse
import ast
import dataclasses
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..configuration_vit_scratch import VARIANTS, ViTScratchConfig
from .augmentation import PHOTO_SMALLEST_AREA
from .errors import Problems
from .parsing import Parser, refuse_unknown
from .recipe_arguments import RecipeArguments, add_recipe_defaults


_Arguments = TypeVar("_Arguments")

# What a built-in data set changes in the defaults, so that its name alone is a good command.
SOURCE_DEFAULTS: dict[str, dict[str, Any]] = {
    # So small that reading them is no work for another process.
    "digits": {"variant": "Mi/4", "image_size": [8], "num_train_epochs": 40.0, "dataloader_num_workers": 0},
    # A defect is a small part of a cell: most of the cell must stay in view.
    "elpv": {"variant": "Mi/8", "smallest_area": 0.7, "num_train_epochs": 40.0},
}
for _defaults in SOURCE_DEFAULTS.values():
    # The accuracy of an epoch that was chosen on the held-out images is no longer that of images held out.
    _defaults["load_best_model_at_end"] = False
FROM_SCRATCH_VARIANT = "S/16"
FROM_SCRATCH_LEARNING_RATE = 1e-3
FROM_CHECKPOINT_LEARNING_RATE = 1e-4

# Flags of TrainingArguments that would do harm or nothing here: name -> the value that means "not given", and why.
REFUSED_FLAGS: dict[str, tuple[Any, str]] = {
    "hub_token": (None, "it would be written in clear into training_args.bin. Set HF_TOKEN or run `hf auth login`."),
    "do_train": (True, "this script always trains."),
    "do_predict": (False, "this script has no test split. Use scripts/predict.py on the finished model."),
    "prediction_loss_only": (False, "the best epoch is chosen by accuracy, which needs the predictions."),
}


@dataclass
class ModelArguments:
    """What the network starts from."""

    _argument_group_name = "model: what the network starts from"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Fine-tune this model: a folder or a Hub id of a ViTScratch model. Its classifier is kept if its "
            "labels are those of the data, and replaced by a fresh one if not. Example: outputs/pretrained"
        },
    )
    variant: str | None = field(
        default=None,
        metadata={
            "help": "Train from scratch: size/patch. One of "
            + ", ".join(VARIANTS)
            + f". Default: {FROM_SCRATCH_VARIANT}, or what suits a built-in data set. Example: Ti/16"
        },
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "Train from scratch with the architecture of this config.json (a folder or a Hub id) in place of a "
            "--variant. Example: outputs/digits"
        },
    )
    image_processor_name: str | None = field(
        default=None,
        metadata={
            "help": "Take the image processor from this folder or Hub id. Default: that of --model_name_or_path, or "
            "one that fits the architecture."
        },
    )
    image_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "Height and width of the images in pixels, or one number for both; the patch must divide it. "
            "Default: that of the variant or model. Example: 160, or: 96 128"
        },
    )
    patch_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "Height and width of a patch in pixels, or one number for both. Default: that of the variant or "
            "model. Example: 14"
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Other fields of the architecture. Example: drop_path_rate=0.1,hidden_dropout_prob=0.1,pooling=mean"
        },
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where to keep what is downloaded. Default: the cache of Hugging Face."}
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of --model_name_or_path on the Hub."}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run code that comes with --image_processor_name. The model itself never needs this."},
    )


@dataclass
class DataArguments:
    """What to learn from."""

    _argument_group_name = "data: what to learn from"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "digits: 1,797 scanned digits that come with scikit-learn. elpv: 2,624 photographs of solar cells "
            "(pip install elpv-dataset). Anything else: a data set of the Hub, or a folder that holds a copy of one. "
            "Default: digits, unless there is a --train_dir. Example: food101"
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "The configuration of --dataset_name, where it has several."}
    )
    train_dir: str | None = field(
        default=None,
        metadata={
            "help": "Your own images: a folder with one folder for each class; or a .parquet, .csv, .jsonl or .tar "
            "(WebDataset) file; or a quoted pattern for several files. Example: photos/train, or: 'shards/*.tar'"
        },
    )
    validation_dir: str | None = field(
        default=None,
        metadata={"help": "Held-out images, in the form of --train_dir. Default: a part of --train_dir, see the next."},
    )
    train_val_split: float = field(
        default=0.15,
        metadata={
            "help": "The part of the training images to hold out, the same part of every class, where the data has no "
            "validation split. Between 0 and 1."
        },
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "The column of the images. Default: the only one that can be it."}
    )
    label_column_name: str | None = field(
        default=None,
        metadata={"help": "The column of the labels. Default: the only one that can be it. Example: fine_label"},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on no more than so many images, chosen at random. For a quick try."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Hold out no more than so many images, chosen at random. For a quick try."}
    )
    verify_images: bool = field(
        default=True,
        metadata={"help": "Decode every image once before training, to find broken files first. A pass over the data."},
    )
    export_examples: str | None = field(
        default=None,
        metadata={
            "help": "Write ten held-out images to this folder as INDEX_LABEL.png, to try the model on. "
            "Example: examples"
        },
    )


@dataclass
class ImageTrainingArguments(TrainingArguments):
    """The arguments of transformers' Trainer, with the defaults of image classification."""

    _argument_group_name = "training: every argument of transformers' TrainingArguments, and at the end our own"

    output_dir: str | None = field(
        default=None,
        metadata={"help": "Where the model goes. Default: outputs/ and the name of the data. Example: outputs/pets"},
    )
    num_train_epochs: float = field(default=10.0, metadata={"help": "How often to go through the training images."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images in a training batch, per device."})
    per_device_eval_batch_size: int = field(
        default=128, metadata={"help": "Images in an evaluation batch, per device."}
    )
    learning_rate: float = field(
        default=FROM_SCRATCH_LEARNING_RATE,
        metadata={
            "help": f"The highest learning rate. {FROM_SCRATCH_LEARNING_RATE:g} from scratch, "
            f"{FROM_CHECKPOINT_LEARNING_RATE:g} with --model_name_or_path."
        },
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls. Example: linear"})
    warmup_steps: float = field(
        default=0.1,
        metadata={"help": "Steps over which the learning rate rises; below 1, this part of all steps. Example: 500"},
    )
    weight_decay: float = field(
        default=0.05,
        metadata={"help": "AdamW's decay of the weights of dense layers and patches; nothing else decays."},
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to save a checkpoint: no, steps, epoch or best."}
    )
    logging_strategy: str = field(default="epoch", metadata={"help": "When to report the loss: no, steps or epoch."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep: the best and the latest."})
    load_best_model_at_end: bool | None = field(
        default=None,
        metadata={
            "help": "Finish with the checkpoint of the best epoch. Default: if checkpoints are saved when they are "
            "evaluated.",
            "nargs": "?",
            "const": True,
        },
    )
    metric_for_best_model: str | None = field(
        default="accuracy",
        metadata={"help": "What makes a checkpoint the best: accuracy, macro_f1, top5_accuracy or loss."},
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Compute in bfloat16. Default: if the hardware is made for it and --fp16 is off.",
            "nargs": "?",
            "const": True,
        },
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that read images, per device. Default: up to 8; where the CPU trains, 2. The number "
            "changes nothing but the speed."
        },
    )
    dataloader_persistent_workers: bool | None = field(
        default=None,
        metadata={
            "help": "Keep these processes from one epoch to the next. Default: if there are any.",
            "nargs": "?",
            "const": True,
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Has nothing to remove here."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Search for unused parameters with several processes: there are none."}
    )
    do_train: bool = field(default=True, metadata={"help": "Always."})
    recipe_arguments: RecipeArguments = field(init=False, default_factory=RecipeArguments)
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Go on where a run stopped: True for the latest checkpoint in --output_dir, or a checkpoint."
        },
    )

    smallest_area: float = field(
        default=PHOTO_SMALLEST_AREA,
        metadata={
            "help": "Photos are trained on in random parts; a part has at least this share of the area, 1 for as "
            "much as has the shape of the input. Example: 0.08, for a million images"
        },
    )

    def __post_init__(self) -> None:
        # On a machine without accelerator this is what use_cpu means; the Trainer needs to hear it to start a process
        # group on the CPU, and not to pin memory.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = self.save_strategy == self.eval_strategy != "no"
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _has_native_bf16()
        if self.dataloader_num_workers is None:
            cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            self.dataloader_num_workers = 0 if cores < 2 else min(2 if self.use_cpu else 8, cores)
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        super().__post_init__()


def _has_native_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


# ---------------------------------------------------------------------------------------------------------------------
# Parsing


def build_parser(source: str = "digits", from_checkpoint: bool = False) -> Parser:
    """The parser, with the defaults of a source and of a starting point: so that --help shows what would be used."""
    parser = Parser(
        ModelArguments,
        DataArguments,
        RecipeArguments,
        ImageTrainingArguments,
        usage="%(prog)s [--variant S/16 | --model_name_or_path MODEL] [--dataset_name NAME | --train_dir DIR] [...]",
        description="Trains a Vision Transformer to classify images, from scratch or from a model of this library, on "
        "the stock Trainer of transformers. Without flags: the digits of scikit-learn, in a minute or two on a CPU.",
        epilog="Several GPUs: accelerate launch scripts/finetune.py [...]. Stop with Ctrl-C; go on with the same "
        "command and --resume_from_checkpoint True.",
    )
    defaults = dict(SOURCE_DEFAULTS.get(source, {"variant": FROM_SCRATCH_VARIANT}))
    if from_checkpoint:
        defaults = {
            name: value for name, value in defaults.items() if name not in ("variant", "image_size", "patch_size")
        }
        defaults["learning_rate"] = FROM_CHECKPOINT_LEARNING_RATE
    parser.set_defaults(**defaults)
    return parser


def parse_arguments(
    argv: list[str] | None = None,
) -> tuple[ModelArguments, DataArguments, ImageTrainingArguments, Problems]:
    """
    Parses the command line.

    Returns:
        The three dataclasses, and the mistakes found in their values: whoever reads the data adds to them what it finds
        and raises them all.

    Raises:
        InputError: where the command line as such can't be understood: unknown flags, values of the wrong type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("dataset_name", "train_dir", "model_name_or_path", "config_name", "variant"):
        first_look.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?")
    seen, _ = first_look.parse_known_args(argv)
    source = seen.dataset_name or ("digits" if seen.train_dir is None else "")
    architecture_given = bool(seen.model_name_or_path or seen.config_name)
    parser = build_parser(source, from_checkpoint=architecture_given)
    if seen.config_name and not seen.model_name_or_path:
        parser.set_defaults(learning_rate=FROM_SCRATCH_LEARNING_RATE)
    if seen.variant and seen.variant != SOURCE_DEFAULTS.get(source, {}).get("variant"):
        parser.set_defaults(image_size=None, patch_size=None)  # these went with the variant that was not taken

    problems = parser.problems
    try:
        told = add_recipe_defaults(parser, argv, architecture_given)
    except ValueError as error:
        problems.add(str(error))
        raise problems.as_error() from error

    namespace, unknown = parser.parse_known_args(argv)
    refuse_unknown(unknown, parser, problems)
    is_understood = not problems.messages

    values = {**vars(namespace), **parser.instead_of_invalid}
    values["dataset_name"] = values["dataset_name"] or source or None
    values["output_dir"] = values["output_dir"] or str(Path("outputs", _source_slug(source or values["train_dir"])))
    model_arguments, data_arguments = _fill(ModelArguments, values), _fill(DataArguments, values)
    _check_model_arguments(model_arguments, problems)
    _check_data_arguments(data_arguments, problems)
    try:
        training_arguments = _fill(ImageTrainingArguments, values)
    except (ValueError, TypeError, ImportError) as error:
        problems.add(str(error))
        raise problems.as_error() from error
    training_arguments.recipe_arguments = _fill(RecipeArguments, values)
    training_arguments.recipe_arguments.told = told
    training_arguments.recipe_arguments.check(problems)
    _check_training_arguments(training_arguments, problems)
    _resolve_resume(training_arguments, problems)
    if not is_understood:
        raise problems.as_error()
    return model_arguments, data_arguments, training_arguments, problems


def _fill(kind: type[_Arguments], values: dict[str, Any]) -> _Arguments:
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind) if field.init})


def _source_slug(source: str) -> str:
    """A folder name for the data: its last name, or for a pattern of files, the folder they are in."""
    path = Path(source)
    name = path.name if "*" not in path.name else path.parent.name
    return name.split(".")[0] or "model"


def pixels(size: list[int] | None) -> int | list[int] | None:
    """The value of --image_size or --patch_size as the configuration takes it."""
    return size[0] if size is not None and len(size) == 1 else size


def config_fields(text: str | None) -> dict[str, Any]:
    """
    The value of --config_overrides as fields of the configuration.

    Raises:
        ValueError: for anything but NAME=VALUE with fields that no other flag and not the data set.
    """
    fields: dict[str, Any] = {}
    for part in re.split(r",(?![^\[]*\])", text or ""):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not part.strip():
            continue
        if not equals or name not in ViTScratchConfig.__annotations__:
            raise ValueError(f"--config_overrides {part.strip()}: give NAME=VALUE with a field of the configuration.")
        if name in ("image_size", "patch_size", "num_channels"):
            raise ValueError(
                f"--config_overrides {name}: leave it out. --image_size and --patch_size are flags, the "
                "data say how many channels there are."
            )
        try:
            fields[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[name] = value
    return fields


def _check_model_arguments(arguments: ModelArguments, problems: Problems) -> None:
    starts = [name for name in ("model_name_or_path", "variant", "config_name") if getattr(arguments, name)]
    if len(starts) > 1:
        problems.add(f"--{' and --'.join(starts)} each say what to start from. Keep one of them.")
    for name in ("image_size", "patch_size"):
        size = getattr(arguments, name)
        if size is not None and (len(size) > 2 or min(size) < 1):
            problems.add(f"--{name} {' '.join(map(str, size))}: give one positive number, or two: height and width.")
            setattr(arguments, name, None)
    try:
        fields = config_fields(arguments.config_overrides)
    except ValueError as error:
        problems.add(str(error))
        return
    if arguments.variant and len(starts) == 1:
        overrides = {name: pixels(getattr(arguments, name)) for name in ("image_size", "patch_size")}
        overrides = {name: value for name, value in overrides.items() if value is not None}
        try:
            ViTScratchConfig.from_variant(arguments.variant, **overrides, **fields)
        except ValueError as error:
            problems.add(f"--variant {arguments.variant}: {error}")


def _check_data_arguments(arguments: DataArguments, problems: Problems) -> None:
    if arguments.dataset_name and arguments.train_dir:
        problems.add("--dataset_name and --train_dir each say what to learn from. Keep one of them.")
    if arguments.validation_dir and not arguments.train_dir:
        problems.add("--validation_dir goes with --train_dir. Give that too, or leave this out.")
    if arguments.dataset_config_name and arguments.dataset_name in (None, *SOURCE_DEFAULTS):
        problems.add("--dataset_config_name goes with a --dataset_name of the Hub. Leave it out.")
    if not 0.0 < arguments.train_val_split < 1.0:
        problems.add(f"--train_val_split {arguments.train_val_split:g} must lie between 0 and 1, e.g. 0.15.")
    for name in ("max_train_samples", "max_eval_samples"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            problems.add(f"--{name} {value} must be at least 1. Leave it out to use all images.")
    if arguments.export_examples and Path(arguments.export_examples).is_file():
        problems.add(f"--export_examples {arguments.export_examples} is a file. Give a folder.")


def _check_training_arguments(arguments: ImageTrainingArguments, problems: Problems) -> None:
    for name, (absent, reason) in REFUSED_FLAGS.items():
        if getattr(arguments, name) != absent:
            problems.add(f"--{name}: {reason}")
    at_least_one = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    for name in at_least_one:
        if getattr(arguments, name) < 1:
            problems.add(f"--{name} {getattr(arguments, name)} must be at least 1.")
    if arguments.num_train_epochs <= 0 and arguments.max_steps <= 0:
        problems.add(f"--num_train_epochs {arguments.num_train_epochs:g} must be above 0.")
    if not arguments.learning_rate > 0:
        problems.add(f"--learning_rate {arguments.learning_rate:g} must be above 0, e.g. 1e-3.")
    if not 0.0 <= arguments.label_smoothing_factor < 1.0:
        problems.add(f"--label_smoothing_factor {arguments.label_smoothing_factor:g} must be at least 0 and below 1.")
    if not 0.0 < arguments.smallest_area <= 1.0:
        problems.add(f"--smallest_area {arguments.smallest_area:g} must be above 0 and at most 1.")
    if arguments.weight_decay < 0:
        problems.add(f"--weight_decay {arguments.weight_decay:g} must not be negative.")


def _resolve_resume(arguments: ImageTrainingArguments, problems: Problems) -> None:
    """Turns --resume_from_checkpoint into a folder or None, and refuses to write over an earlier run."""
    output, wish = Path(arguments.output_dir), arguments.resume_from_checkpoint
    if wish is None or wish.lower() in ("false", "no", "0"):
        arguments.resume_from_checkpoint = None
        if (output / "config.json").exists() or (output.is_dir() and get_last_checkpoint(str(output))):
            problems.add(
                f"--output_dir {output} already has a model in it. Choose another --output_dir, remove the folder, or "
                "go on where it stopped with --resume_from_checkpoint True."
            )
    elif wish.lower() in ("true", "yes", "1"):
        arguments.resume_from_checkpoint = get_last_checkpoint(str(output)) if output.is_dir() else None
        if arguments.resume_from_checkpoint is None:
            problems.add(
                f"--resume_from_checkpoint {wish}: there is no checkpoint in {output}. Leave it out to start a new run."
            )
    elif not Path(wish, "trainer_state.json").is_file():
        problems.add(f"--resume_from_checkpoint {wish} is not a checkpoint: it has no trainer_state.json.")
