# SPDX-License-Identifier: Apache-2.0
"""
From a command line to dataclasses: defaults, recipe, flags, and every mistake in one message.

--help and mistakes in our flags need neither torch nor transformers. They are imported when the command is valid so
far, or has flags that only transformers can check.
"""

import argparse
import ast
import difflib
import importlib.util
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..common.errors import Problems
from ..common.flags import DataArguments, HelpFormatter, Parser, fill, first_look, flag_name, refuse_unknown, show
from ..recipes.recipe import recipe_table
from ..recipes.table import RECIPES
from .flags import (
    VARIANT_NAMES,
    ModelArguments,
    PretrainingArguments,
    RecipeArguments,
    TrainingFlags,
    defaults_for,
    recipe_defaults,
)


# --help: the groups of the flags, in their order.
MOST_USED = (
    "train_dir", "dataset_name", "model_name_or_path", "variant", "image_size", "recipe", "num_train_epochs",
    "per_device_train_batch_size", "learning_rate", "output_dir",
)  # fmt: skip
GROUPS = {
    "data": (
        "validation_dir", "train_val_split", "dataset_config_name", "image_column_name", "label_column_name",
        "label_separator", "max_train_samples", "max_eval_samples", "verify_images", "max_broken_images",
        "export_examples", "streaming", "shuffle_buffer_size", "label_names_file",
    ),
    "model": (
        "patch_size", "config_overrides", "config_name", "image_processor_name", "model_revision", "cache_dir",
        "trust_remote_code",
    ),
    "optimization": (
        "max_steps", "gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "weight_decay",
        "max_grad_norm", "optim", "layer_decay", "head_learning_rate_multiplier", "loss",
        "label_smoothing_factor", "class_weights", "ema_decay", "ema_warmup", "seed",
    ),
    "augmentation": (
        "smallest_area", "auto_augment", "color_jitter", "random_erasing", "mixup", "cutmix", "aug_repeats",
    ),
    "evaluation and checkpoints": (
        "eval_strategy", "save_strategy", "save_total_limit", "load_best_model_at_end",
        "metric_for_best_model", "resume_from_checkpoint", "per_device_eval_batch_size", "probe", "probe_images",
        "probe_steps",
    ),
    "speed": ("bf16", "dataloader_num_workers", "fast_decode", "images_on_device"),
    "Hub": ("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "license"),
}  # fmt: skip
# Flags whose values only transformers, the network or the Hub's library can check.
CHECKED_LATE = ("config_overrides", "auto_augment", "push_to_hub", "license")


@dataclass(frozen=True)
class Script:
    """What differs between the scripts that train."""

    usage: str
    epilog: str
    output_suffix: str = ""  # of the default output folder
    flags: tuple[type, ...] = ()  # dataclasses of further flags, with a method `check(training, recipe, problems)`
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of --help, before the others


_EPILOG = """Several GPUs: accelerate launch scripts/{name}.py [...].
Stop with Ctrl-C; continue with the same command and --resume_from_checkpoint True.
`--help all` adds the flags of transformers' TrainingArguments, which all work."""
FINETUNE = Script(
    usage="%(prog)s [--train_dir DIR | --dataset_name NAME] [--model_name_or_path MODEL | --variant NAME] [...]",
    epilog=_EPILOG.format(name="finetune"),
)
PRETRAIN = Script(
    usage="%(prog)s [--objective NAME] [--train_dir DIR | --dataset_name NAME] [--variant NAME] [...]",
    epilog="Without labels (--objective mpp, simmim or mae), --train_dir may be any folder of images.\n"
    + _EPILOG.format(name="pretrain"),
    output_suffix="-pretrained",
    flags=(PretrainingArguments,),
    groups={
        "pretraining": (
            "objective", "mask_ratio", "mask_patch_size", "mpp_target", "norm_pix_loss", "decoder_hidden_size",
            "decoder_num_hidden_layers", "decoder_num_attention_heads",
        ),
    },
)  # fmt: skip


def parse_arguments(
    argv: list[str] | None = None,
    script: Script = FINETUNE,
    description: str | None = None,
    defaults: dict[str, Any] | None = None,
) -> tuple[Any, ...]:
    """
    Parses the command line.

    Args:
        argv: the command line; by default that of the process.
        script: the script that has it.
        description: the beginning of --help.
        defaults: of a script that uses these flags for something else than training.

    Returns:
        ModelArguments, DataArguments, ImageTrainingArguments, the script's own flags, and the Problems found in their
        values: the reader of the data adds its own and raises them all.

    Raises:
        InputError: with all mistakes, if there are unknown flags or values of the wrong type, or if no data have to be
            read to find the rest.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    given = first_look(
        argv, "dataset_name", "train_dir", "model_name_or_path", "config_name", "variant", "objective", "recipe"
    )
    if given.recipe == "list":
        show(recipe_table(RECIPES.values()))
        raise SystemExit(0)
    source = given.dataset_name or ("digits" if given.train_dir is None else "")
    parser = build_parser(script, description)
    problems = parser.problems
    try:
        trainer_values, recipe_message = _set_defaults(parser, argv, source, given, defaults or {})
    except ValueError as error:
        problems.add(str(error))
        trainer_values, recipe_message = {}, None

    namespace, rest = parser.parse_known_args(argv)
    trainer_words, unknown = split_words(rest)
    if unknown:
        refuse_unknown(unknown, [*parser.known_flags(), *(f"--{name}" for name in trainer_flags())], problems)
    is_understood = not problems.messages

    values = {**vars(namespace), **parser.instead_of_invalid}
    values["dataset_name"] = values["dataset_name"] or source or None
    values["output_dir"] = values["output_dir"] or _output_dir(source or values["train_dir"], script)
    model_arguments, data_arguments = fill(ModelArguments, values), fill(DataArguments, values)
    recipe_arguments, training_flags = fill(RecipeArguments, values), fill(TrainingFlags, values)
    own = [fill(kind, values) for kind in script.flags]
    is_sound_model = _check_model(model_arguments, problems)
    for arguments in (data_arguments, recipe_arguments, training_flags):
        arguments.check(problems)
    for arguments in own:
        arguments.check(training_flags, recipe_arguments, problems)
    _check_together(training_flags, recipe_arguments, problems)
    # With mistakes, it goes on only where more may be found: in flags that are checked late, and in the user's images.
    is_own_optimizer = values["optim"] != TrainingFlags.optim
    has_late_flags = trainer_words or is_own_optimizer or any(values[name] for name in CHECKED_LATE)
    if problems.messages and not has_late_flags and not (is_understood and data_arguments.train_dir):
        raise problems.as_error()

    from .arguments import build_training_arguments, check_model, read_trainer_flags

    count = len(problems.messages)
    values |= trainer_values | read_trainer_flags(trainer_words, problems)
    is_understood = is_understood and len(problems.messages) == count
    if is_sound_model:
        check_model(model_arguments, problems)
    recipe_arguments.message = recipe_message
    training_arguments = build_training_arguments(values, recipe_arguments, problems)
    if not is_understood:
        raise problems.as_error()
    return model_arguments, data_arguments, training_arguments, *own, problems


def build_parser(script: Script = FINETUNE, description: str | None = None) -> Parser:
    """The parser of our own flags, with the defaults that depend on nothing."""
    return Parser(
        ModelArguments,
        DataArguments,
        *script.flags,
        RecipeArguments,
        TrainingFlags,
        groups={"most used": MOST_USED, **script.groups, **GROUPS},
        more_help=_trainer_help,
        usage=script.usage,
        description=description,
        epilog=script.epilog,
    )


def _trainer_help(shown: set[str]) -> str:
    from .arguments import trainer_help  # here: it imports torch

    return trainer_help(shown)


def _set_defaults(
    parser: Parser, argv: list[str], source: str, given: argparse.Namespace, defaults: dict[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """
    Gives the parser the defaults of this command, so that --help shows them. Returns the defaults of flags that only
    the Trainer has, and a message on the recipe. Raises ValueError for a recipe that this script does not have.
    """
    is_pretraining = "--objective" in parser.known_flags()
    objective = (given.objective or "supervised") if is_pretraining else None
    chosen = defaults_for(source, given, objective)
    is_saved_architecture = bool(given.model_name_or_path or given.config_name)
    batch_size = parser.get_default("per_device_train_batch_size")
    recipe, settings, message = recipe_defaults(argv, batch_size, is_saved_architecture)
    ours = {action.dest for action in parser._actions}
    if recipe is not None and (unknown := sorted(set(settings) - ours - trainer_flags())):
        raise ValueError(
            f"--recipe {recipe.name} is for scripts/{recipe.script}.py: there are no fields {', '.join(unknown)} here."
        )
    chosen |= settings | defaults
    parser.set_defaults(**{name: value for name, value in chosen.items() if name in ours})
    return {name: value for name, value in chosen.items() if name not in ours}, message


@cache
def trainer_flags() -> frozenset[str]:
    """The fields of transformers' TrainingArguments, read from its source, since an import would need torch."""
    (folder,) = importlib.util.find_spec("transformers").submodule_search_locations
    tree = ast.parse(Path(folder, "training_args.py").read_text(encoding="utf-8"))
    kind = next(one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == "TrainingArguments")
    return frozenset(node.target.id for node in kind.body if isinstance(node, ast.AnnAssign))


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Splits words that are none of our flags: the Trainer's flags with their values, and unknown ones."""
    of_trainer, unknown = [], []
    target = unknown
    for word in words:
        if word.startswith("--"):
            name = flag_name(word)[2:]
            target = of_trainer if {name, name.removeprefix("no_")} & trainer_flags() else unknown
        target.append(word)
    return of_trainer, unknown


def _output_dir(source: str, script: Script) -> str:
    """outputs/ and the name of the data: its last part, or for a pattern of files their folder."""
    path = Path(source)
    name = path.name if "*" not in path.name else path.parent.name
    return str(Path("outputs", (name.split(".")[0] or "model") + script.output_suffix))


def _check_model(arguments: ModelArguments, problems: Problems) -> bool:
    """Checks what needs no configuration. Returns whether there was no mistake."""
    count = len(problems.messages)
    starts = [name for name in ("model_name_or_path", "variant", "config_name") if getattr(arguments, name)]
    if len(starts) > 1:
        problems.add(f"--{' and --'.join(starts)} each say what to start from. Keep one of them.")
    for name in ("image_size", "patch_size"):
        size = getattr(arguments, name)
        if size is not None and (len(size) > 2 or min(size) < 1):
            problems.add(f"--{name} {' '.join(map(str, size))}: give one positive number, or two: height and width.")
    name = arguments.variant
    if name and name not in VARIANT_NAMES and not name.startswith("test/"):
        near = difflib.get_close_matches(name, VARIANT_NAMES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        problems.add(f"--variant {name}: there is no variant {name!r}.{hint} Variants: {', '.join(VARIANT_NAMES)}.")
    elif name and len(problems.messages) == count:
        patch = arguments.patch_size or [int(name.split("/")[1])]
        size = arguments.image_size or patch
        if any(size[axis] % patch[axis] for axis in (0, -1)):
            size, patch = " ".join(map(str, size)), " x ".join(map(str, patch))
            problems.add(f"--image_size {size}: the patch of {patch} pixels must divide it.")
    return len(problems.messages) == count


def _check_together(training: TrainingFlags, recipe: RecipeArguments, problems: Problems) -> None:
    if recipe.loss == "bce" and training.label_smoothing_factor:
        problems.add(
            "--loss bce makes a whole class of every probability above 0, and --label_smoothing_factor would put all "
            "classes there. Keep one of them."
        )
    conflicts = {"aug_repeats": recipe.aug_repeats > 1, "max_broken_images": training.max_broken_images > 0}
    for name, is_given in conflicts.items():
        if training.images_on_device and is_given:
            problems.add(f"--{name} does not go with --images_on_device. Keep one of them.")


def show_flags(title: str, *names: str) -> str:
    """The part of finetune.py's --help on these flags, for a script that has them too."""
    formatter, parser = HelpFormatter(""), build_parser()
    formatter.start_section(title)
    formatter.add_arguments([action for name in names for action in parser._actions if action.dest == name])
    formatter.end_section()
    return formatter.format_help()
