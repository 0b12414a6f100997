# SPDX-License-Identifier: Apache-2.0
"""From a command line to the dataclasses of flags: defaults, recipe, flags, and every mistake in one message."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..common.checkpoints import MANIFEST, STATE, damage, find_checkpoints, latest_whole
from ..common.errors import InputError, Problems
from ..common.licenses import license_problem
from ..common.parsing import Parser, refuse_unknown
from ..configuration_vit_scratch import ViTScratchConfig
from ..data.arguments import SOURCE_DEFAULTS, DataArguments
from ..hub.commit import check_can_publish
from .arguments import (
    FROM_CHECKPOINT_LEARNING_RATE,
    FROM_SCRATCH_LEARNING_RATE,
    FROM_SCRATCH_VARIANT,
    REFUSED_FLAGS,
    ImageTrainingArguments,
    ModelArguments,
    config_fields,
    pixels,
)
from .recipe_arguments import RecipeArguments, add_recipe_defaults


_Arguments = TypeVar("_Arguments")


@dataclass(frozen=True)
class Script:
    """
    What the command line of a script has of its own.

    Attributes:
        usage, description, epilog: for --help.
        output_suffix: what the default output folder has after the name of the data.
        flags: dataclasses of flags beside the common ones, each with a method `check(training_arguments, problems)`.
        seen: the flags whose values `defaults` gets.
        defaults: from the name of the source and these values to the defaults that differ.
    """

    usage: str
    description: str
    epilog: str
    output_suffix: str = ""
    flags: tuple[type, ...] = ()
    seen: tuple[str, ...] = ()
    defaults: Callable[[str, argparse.Namespace], dict[str, Any]] = lambda source, seen: {}


FINETUNE = Script(
    usage="%(prog)s [--variant S/16 | --model_name_or_path MODEL] [--dataset_name NAME | --train_dir DIR] [...]",
    description="Trains a Vision Transformer to classify images, from scratch or from a model of this library, on "
    "the stock Trainer of transformers. Without flags: the digits of scikit-learn, in a minute or two on a CPU.",
    epilog="Several GPUs: accelerate launch scripts/finetune.py [...]. Stop with Ctrl-C; go on with the same "
    "command and --resume_from_checkpoint True.",
)


def build_parser(source: str = "digits", from_checkpoint: bool = False, script: Script = FINETUNE) -> Parser:
    """The parser, with the defaults of a source and of a starting point: so that --help shows what would be used."""
    kinds = (ModelArguments, DataArguments, *script.flags, RecipeArguments, ImageTrainingArguments)
    parser = Parser(*kinds, usage=script.usage, description=script.description, epilog=script.epilog)
    defaults = dict(SOURCE_DEFAULTS.get(source, {"variant": FROM_SCRATCH_VARIANT}))
    if from_checkpoint:
        defaults["learning_rate"] = FROM_CHECKPOINT_LEARNING_RATE
    parser.set_defaults(**defaults)
    return parser


def parse_arguments(argv: list[str] | None = None, script: Script = FINETUNE) -> tuple[Any, ...]:
    """
    Parses the command line.

    Returns:
        ModelArguments, DataArguments, ImageTrainingArguments, the script's own flags, and last the Problems, which are
        the mistakes found in their values: whoever reads the data adds to them what it finds and raises them all.

    Raises:
        InputError: where the command line as such can't be understood: unknown flags, values of the wrong type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    seen = _first_look(argv, "dataset_name", "train_dir", "model_name_or_path", "config_name", "variant", *script.seen)
    source = seen.dataset_name or ("digits" if seen.train_dir is None else "")
    from_checkpoint = bool(seen.model_name_or_path or seen.config_name)
    parser = build_parser(source, from_checkpoint, script)
    if seen.config_name and not seen.model_name_or_path:
        parser.set_defaults(learning_rate=FROM_SCRATCH_LEARNING_RATE)
    parser.set_defaults(**script.defaults(source, seen))
    if from_checkpoint:
        parser.set_defaults(variant=None, image_size=None, patch_size=None)
    elif seen.variant and seen.variant != parser.get_default("variant"):
        parser.set_defaults(image_size=None, patch_size=None)  # these went with the variant that was not taken

    problems = parser.problems
    try:
        told = add_recipe_defaults(parser, argv, from_checkpoint)
    except ValueError as error:
        problems.add(str(error))
        raise problems.as_error() from error

    namespace, unknown = parser.parse_known_args(argv)
    refuse_unknown(unknown, parser, problems)
    is_understood = not problems.messages

    values = {**vars(namespace), **parser.instead_of_invalid}
    values["dataset_name"] = values["dataset_name"] or source or None
    slug = _source_slug(source or values["train_dir"]) + script.output_suffix
    values["output_dir"] = values["output_dir"] or str(Path("outputs", slug))
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
    own = [_fill(kind, values) for kind in script.flags]
    for arguments in own:
        arguments.check(training_arguments, problems)
    _check_training_arguments(training_arguments, problems)
    _resolve_resume(training_arguments, problems)
    if not is_understood:
        raise problems.as_error()
    return model_arguments, data_arguments, training_arguments, *own, problems


def _first_look(argv: list[str], *names: str) -> argparse.Namespace:
    """The values of a few flags, on which the defaults of others depend."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?")
    return parser.parse_known_args(argv)[0]


def _fill(kind: type[_Arguments], values: dict[str, Any]) -> _Arguments:
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind) if field.init})


def _source_slug(source: str) -> str:
    """A folder name for the data: its last name, or for a pattern of files, the folder they are in."""
    path = Path(source)
    name = path.name if "*" not in path.name else path.parent.name
    return name.split(".")[0] or "model"


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
    if arguments.streaming and arguments.dataset_name in SOURCE_DEFAULTS:
        problems.add(f"--streaming: {arguments.dataset_name} is small and here already. Leave it out.")
    if arguments.streaming and arguments.max_train_samples is not None:
        problems.add("--max_train_samples chooses from all images, which --streaming can't. Give --max_steps instead.")
    if arguments.shuffle_buffer_size < 1:
        problems.add(
            f"--shuffle_buffer_size {arguments.shuffle_buffer_size} must be at least 1, which shuffles no more."
        )
    if arguments.label_names_file and not arguments.streaming:
        problems.add("--label_names_file goes with --streaming. Leave it out: all labels are read before training.")
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
    if arguments.max_broken_images < 0:
        problems.add(f"--max_broken_images {arguments.max_broken_images} must not be negative.")
    if arguments.weight_decay < 0:
        problems.add(f"--weight_decay {arguments.weight_decay:g} must not be negative.")
    if arguments.recipe_arguments.loss == "bce" and arguments.label_smoothing_factor:
        problems.add(
            "--loss bce makes a whole class of every probability above 0, and --label_smoothing_factor would put all "
            "classes there. Keep one of them."
        )
    if arguments.images_on_device:
        for name, is_given in (
            ("aug_repeats", arguments.recipe_arguments.aug_repeats > 1),
            ("max_broken_images", arguments.max_broken_images > 0),
        ):
            if is_given:
                problems.add(f"--{name} does not go with --images_on_device. Keep one of them.")
    _check_probe(arguments, problems)
    _check_hub(arguments, problems)


def _check_hub(arguments: ImageTrainingArguments, problems: Problems) -> None:
    """What can be known of a push without asking the Hub, which the trainer does before it trains."""
    wishes = ("hub_model_id", "hub_private_repo", "hub_revision")
    given = [f"--{name}" for name in wishes if getattr(arguments, name) is not None]
    if given and not arguments.push_to_hub:
        problems.add(f"{' '.join(given)}: nothing is pushed without --push_to_hub. Add it, or leave this out.")
    if arguments.push_to_hub and arguments.process_index == 0:
        name = arguments.hub_model_id or Path(arguments.output_dir).absolute().name
        try:
            check_can_publish(name)
        except InputError as error:
            problems.add(f"--push_to_hub to {name}: {error}")
    if arguments.license is not None and (reason := license_problem(arguments.license)):
        problems.add(f"--license {arguments.license}: {reason}")


def _check_probe(arguments: ImageTrainingArguments, problems: Problems) -> None:
    for name in ("probe_images", "probe_steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            problems.add(f"--{name} {value} must be at least 1.")
    if arguments.probe_steps is not None and not arguments.probe:
        problems.add(f"--probe_steps {arguments.probe_steps} says when, not what. Add --probe knn fewshot.")
    if arguments.probe and arguments.probe_steps is None and arguments.eval_strategy == "no":
        problems.add("--probe has no time to run at: add --probe_steps, or an --eval_strategy other than no.")


def _resolve_resume(arguments: ImageTrainingArguments, problems: Problems) -> None:
    """Turns --resume_from_checkpoint into a folder or None, and refuses to write over an earlier run."""
    output, wish = Path(arguments.output_dir), arguments.resume_from_checkpoint
    if wish is None or wish.lower() in ("false", "no", "0"):
        arguments.resume_from_checkpoint = None
        if (output / "config.json").exists() or find_checkpoints(output):
            problems.add(
                f"--output_dir {output} already has a model in it. Choose another --output_dir, remove the folder, or "
                "go on where it stopped with --resume_from_checkpoint True."
            )
    elif wish.lower() in ("true", "yes", "1"):
        latest, damaged = latest_whole(output)
        arguments.resume_from_checkpoint = None if latest is None else str(latest)
        if latest is None and damaged:
            reasons = "; ".join(f"{checkpoint.name}: {reason}" for checkpoint, reason in damaged.items())
            problems.add(
                f"--resume_from_checkpoint {wish}: no checkpoint in {output} is whole ({reasons}). Name one to try it "
                "all the same, or remove the folder to start a new run."
            )
        elif latest is None:
            problems.add(
                f"--resume_from_checkpoint {wish}: there is no checkpoint in {output}. Leave it out to start a new run."
            )
    elif not Path(wish, STATE).is_file():
        problems.add(f"--resume_from_checkpoint {wish} is not a checkpoint: it has no {STATE}.")
    elif Path(wish, MANIFEST).is_file() and (reason := damage(wish)):
        # Without run.json, it is of another program or of an earlier version, and nothing is known of its files.
        problems.add(f"--resume_from_checkpoint {wish} is damaged: {reason}. Choose another one, or True.")
