# SPDX-License-Identifier: Apache-2.0
"""transformers' TrainingArguments with our flags and defaults, and checks that need torch or transformers."""

import argparse
import ast
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import OptimizerNames

from ..augmentation.auto_augment import auto_augment
from ..common.errors import InputError, Problems
from ..common.files import MANIFEST, STATE, damage, find_checkpoints, latest_whole
from ..common.flags import METAVARS, CollectsMistakes, HelpFormatter, fill
from ..common.names import license_problem
from ..configuration_vit_scratch import ViTScratchConfig
from ..hub.commit import check_can_publish
from .flags import ModelArguments, RecipeArguments, TrainingFlags


LAMB = "lamb"  # the value of --optim that is this library's own

# Flags of TrainingArguments that are refused: name -> the value if it is not given, and the reason.
REFUSED_FLAGS: dict[str, tuple[Any, str]] = {
    "hub_token": (None, "whoever sees the command line sees it. Set HF_TOKEN or run `hf auth login`."),
    "do_train": (True, "this script always trains."),
    "do_predict": (False, "this script has no test split. Use scripts/predict.py on the finished model."),
    "enable_jit_checkpoint": (
        False,
        "its signal handler stays behind after training. Ctrl-C and SIGTERM save a checkpoint without it.",
    ),
    "prediction_loss_only": (False, "the best epoch is chosen by accuracy, which needs the predictions."),
}


@dataclass
class ImageTrainingArguments(TrainingFlags, TrainingArguments):
    """The arguments of transformers' Trainer, with the defaults of image classification."""

    _argument_group_name = "flags of transformers' TrainingArguments"

    remove_unused_columns: bool = field(default=False, metadata={"help": "Has nothing to remove here."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Report NaN losses as 0. Here, such a loss stops the run."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Search for unused parameters with several processes: there are none."}
    )
    do_train: bool = field(default=True, metadata={"help": "Always."})
    recipe_arguments: RecipeArguments = field(init=False, default_factory=RecipeArguments)

    def __post_init__(self) -> None:
        # Without an accelerator the Trainer needs this for a process group on the CPU, and not to pin memory.
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
        is_lamb = self.optim == LAMB
        if is_lamb:  # transformers accepts the names of its own optimizers only
            self.optim = OptimizerNames.ADAMW_TORCH
        super().__post_init__()
        if is_lamb:
            self.optim = LAMB

    @property
    def optimizer_name(self) -> str:
        """The value of --optim."""
        return OptimizerNames(self.optim).value if self.optim != LAMB else LAMB


def _has_native_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


# ---------------------------------------------------------------------------------------------------------------------
# Flags of the Trainer that `TrainingFlags` does not have


class _TrainerParser(CollectsMistakes, HfArgumentParser):
    def __init__(self) -> None:
        super().__init__([ImageTrainingArguments], add_help=False, usage="", formatter_class=HelpFormatter)


def trainer_help(shown: set[str]) -> str:
    """What `--help all` adds to the flags that are shown."""
    parser = _TrainerParser()
    for action in parser._actions:
        if action.dest in shown or action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS
        elif action.choices:
            action.help += f" One of: {', '.join(map(str, action.choices))}."
        action.metavar = action.metavar or METAVARS.get(action.type, "TEXT")
    text = parser.format_help()
    return text[text.index(ImageTrainingArguments._argument_group_name) :]


def read_trainer_flags(words: list[str], problems: Problems) -> dict[str, Any]:
    """Parses the Trainer's own flags; mistakes go to the problems."""
    parser = _TrainerParser()
    parser.problems = problems
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # the defaults are those of TrainingArguments
    try:
        values = vars(parser.parse_known_args(words)[0])
    except InputError:  # a value is missing: the message is in the problems
        values = {}
    return {name: value for name, value in values.items() if name not in parser.instead_of_invalid}


# ---------------------------------------------------------------------------------------------------------------------
# From values to arguments


def build_training_arguments(
    values: dict[str, Any], recipe_arguments: RecipeArguments, problems: Problems
) -> ImageTrainingArguments:
    """
    The arguments of the Trainer. Mistakes in the values of the flags go to the problems.

    Raises:
        InputError: with all problems, if the Trainer refuses the values.
    """
    optimizers = [*(name.value for name in OptimizerNames), LAMB]
    if values["optim"] not in optimizers:
        problems.add(f"--optim: invalid choice: {values['optim']!r} (choose from {', '.join(optimizers)})")
        values = {**values, "optim": TrainingFlags.optim}
    try:
        arguments = fill(ImageTrainingArguments, values)
    except (ValueError, TypeError, ImportError) as error:
        problems.add(str(error))
        raise problems.as_error() from error
    arguments.recipe_arguments = recipe_arguments
    for name, (absent, reason) in REFUSED_FLAGS.items():
        if getattr(arguments, name) != absent:
            problems.add(f"--{name}: {reason}")
    try:
        if recipe_arguments.auto_augment:
            auto_augment(recipe_arguments.auto_augment)
    except ValueError as error:
        problems.add(str(error))
    _check_hub(arguments, problems)
    _resolve_resume(arguments, problems)
    return arguments


def check_model(arguments: ModelArguments, problems: Problems) -> None:
    """Adds what the configuration refuses of --variant and its flags."""
    try:
        fields = config_fields(arguments.config_overrides)
    except ValueError as error:
        problems.add(str(error))
        return
    if arguments.variant and not arguments.model_name_or_path and not arguments.config_name:
        try:
            ViTScratchConfig.from_variant(arguments.variant, **sizes(arguments), **fields)
        except ValueError as error:
            problems.add(f"--variant {arguments.variant}: {error}")


def _check_hub(arguments: ImageTrainingArguments, problems: Problems) -> None:
    """Checks a push without the Hub; the trainer asks the Hub before it trains."""
    if arguments.push_to_hub and arguments.process_index == 0:
        name = arguments.hub_model_id or Path(arguments.output_dir).absolute().name
        try:
            check_can_publish(name)
        except InputError as error:
            problems.add(f"--push_to_hub to {name}: {error}")
    if arguments.license is not None and (reason := license_problem(arguments.license)):
        problems.add(f"--license {arguments.license}: {reason}")


def _resolve_resume(arguments: ImageTrainingArguments, problems: Problems) -> None:
    """Turns --resume_from_checkpoint into a folder or None, and refuses to overwrite an earlier run."""
    output, given = Path(arguments.output_dir), arguments.resume_from_checkpoint
    if given is None or given.lower() in ("false", "no", "0"):
        arguments.resume_from_checkpoint = None
        if (output / "config.json").exists() or find_checkpoints(output):
            problems.add(
                f"--output_dir {output} already has a model in it. Choose another --output_dir, remove the folder, or "
                "continue it with --resume_from_checkpoint True."
            )
    elif given.lower() in ("true", "yes", "1"):
        latest, damaged = latest_whole(output)
        arguments.resume_from_checkpoint = None if latest is None else str(latest)
        if latest is None and damaged:
            reasons = "; ".join(f"{checkpoint.name}: {reason}" for checkpoint, reason in damaged.items())
            problems.add(
                f"--resume_from_checkpoint {given}: no checkpoint in {output} is whole ({reasons}). Name one to try it "
                "all the same, or remove the folder to start a new run."
            )
        elif latest is None:
            problems.add(
                f"--resume_from_checkpoint {given}: there is no checkpoint in {output}. Leave it out for a new run."
            )
    elif not Path(given, STATE).is_file():
        problems.add(f"--resume_from_checkpoint {given} is not a checkpoint: it has no {STATE}.")
    elif Path(given, MANIFEST).is_file() and (reason := damage(given)):
        # A checkpoint of another program or an earlier version has no run.json to check it by.
        problems.add(f"--resume_from_checkpoint {given} is damaged: {reason}. Choose another one, or True.")


def sizes(arguments: ModelArguments) -> dict[str, int | list[int]]:
    """--image_size and --patch_size, if given, as fields of the configuration."""
    given = {"image_size": arguments.image_size, "patch_size": arguments.patch_size}
    return {name: size[0] if len(size) == 1 else size for name, size in given.items() if size is not None}


def config_fields(text: str | None) -> dict[str, Any]:
    """
    Parses --config_overrides to fields of the configuration.

    Raises:
        ValueError: for anything but NAME=VALUE, and for fields that another flag or the data determine.
    """
    fields: dict[str, Any] = {}
    for part in re.split(r",(?![^\[]*\])", text or ""):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not part.strip():
            continue
        if not equals or name not in ViTScratchConfig.__annotations__:
            raise ValueError(f"--config_overrides {part.strip()}: give NAME=VALUE with a field of the configuration.")
        if name in ("image_size", "patch_size", "num_channels"):
            reason = "--image_size and --patch_size are flags, the data say how many channels there are."
            raise ValueError(f"--config_overrides {name}: leave it out. {reason}")
        try:
            fields[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[name] = value
    return fields
