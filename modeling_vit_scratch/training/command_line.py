# SPDX-License-Identifier: Apache-2.0
"""
From a command line to dataclasses: defaults, recipe, flags, and every mistake in one message. torch and transformers
are imported only when the command is valid so far, or has flags that only they can check.
"""

import argparse
import ast
import difflib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import InputError, Problems
from ..common.files import MANIFEST, STATE, damage, find_checkpoints, latest_whole, writing_problem
from ..common.flags import DataArguments, Parser, check_limits, fill, first_look, flag_name, refuse_unknown
from ..recipes.table import (
    ADAPTERS,
    DATA_SETS,
    FINE_TUNING,
    FROM_SCRATCH,
    HEAD_ALONE,
    LENGTH_AND_BATCH,
    RECIPES,
    SAVED_ARCHITECTURE,
    Recipe,
    find_recipe,
    fit_batch_size,
    recipe_table,
)
from .arguments import LAMB, VARIANT_NAMES, ModelArguments, RecipeArguments, TrainingFlags


if TYPE_CHECKING:
    from .trainer import ImageTrainingArguments


# --help: the groups of the flags, in their order.
MOST_USED = (
    "train_dir", "dataset_name", "model_name_or_path", "variant", "image_size", "recipe", "num_train_epochs",
    "per_device_train_batch_size", "learning_rate", "output_dir",
)  # fmt: skip
GROUPS = {
    "data": (
        "validation_dir", "train_val_split", "split_seed", "folds", "dataset_config_name", "image_column_name",
        "label_column_name", "label_separator", "num_channels", "group_column_name", "group_from",
        "drop_overlap", "allow_overlap", "max_train_samples", "max_eval_samples", "verify_images",
        "max_broken_images", "export_examples", "streaming",
    ),
    "model": ("patch_size", "config_overrides", "config_name", "model_revision", "cache_dir"),
    "optimization": (
        "max_steps", "gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "weight_decay",
        "max_grad_norm", "optim", "layer_decay", "head_learning_rate_multiplier", "loss",
        "label_smoothing_factor", "class_weights", "balanced_sampling", "ema_decay", "seed",
    ),
    "augmentation": (
        "smallest_area", "auto_augment", "color_jitter", "random_erasing", "mixup", "cutmix", "aug_repeats",
    ),
    "evaluation and checkpoints": (
        "eval_strategy", "save_strategy", "save_total_limit", "load_best_model_at_end",
        "metric_for_best_model", "early_stopping_patience", "max_hours", "resume_from_checkpoint",
        "per_device_eval_batch_size", "probe",
    ),
    "speed": ("bf16", "dataloader_num_workers", "fast_decode", "images_on_device"),
    "Hub": ("push_to_hub", "hub_model_id", "license"),
}  # fmt: skip
_EPILOG = """Stop with Ctrl-C; continue with the same command and --resume_from_checkpoint True.
`--help all` adds rarely used flags and those of transformers' TrainingArguments, which all work."""
# Flags of TrainingArguments that are refused: name -> the value if it is not given, and the reason.
REFUSED_FLAGS: dict[str, tuple[Any, str]] = {
    "hub_token": (None, "whoever sees the command line sees it. Set HF_TOKEN or run `hf auth login`."),
    "do_train": (True, "this script always trains."),
    "do_predict": (False, "this script has no test split. Use scripts/predict.py on the finished model."),
    "enable_jit_checkpoint": (False, "its signal handler stays behind. Ctrl-C and SIGTERM save a checkpoint anyway."),
    "prediction_loss_only": (False, "the best epoch is chosen by accuracy, which needs the predictions."),
    "bf16_full_eval": (False, "it would round the weights that are then saved. --bf16 also evaluates in bfloat16."),
    "fp16_full_eval": (False, "it would round the weights that are then saved. --fp16 also evaluates in float16."),
    "eval_do_concat_batches": (True, "the metrics are those of all images together."),
    "use_liger_kernel": (False, "it has no kernels for a Vision Transformer."),
    "label_names": (None, "the labels of images are always called `labels`."),
}


@dataclass(frozen=True)
class Script:
    """What differs between the scripts that train."""

    name: str
    usage: str
    defaults: Callable[[str, argparse.Namespace], dict[str, Any]]  # from the built-in data set (else "") and some flags
    note: str = ""  # for the end of --help
    output_suffix: str = ""  # of the default output folder
    flags: tuple[type, ...] = ()  # dataclasses of further flags, with a method `check(training, recipe, problems)`
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of --help, before the others


FINETUNE = Script(
    name="finetune",
    usage="%(prog)s [--train_dir DIR | --dataset_name NAME] [--model_name_or_path MODEL | --variant NAME] [...]",
    defaults=lambda source, given: FINE_TUNING if given.model_name_or_path else {},
    note="Where no flag names them, epochs, batch and learning rates follow from the images, and the run says why.\n",
    groups={"adaptation": ("freeze", "lora_rank", "teacher_model")},
)


def parse_arguments(
    argv: list[str] | None = None,
    script: Script = FINETUNE,
    description: str | None = None,
    defaults: dict[str, Any] | None = None,
) -> tuple[Any, ...]:
    """
    ModelArguments, DataArguments, ImageTrainingArguments, the script's own flags, and Problems, which go on with the
    data. Raises InputError with all mistakes if the data can't show more. `defaults`: of a script of another purpose.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    given = first_look(
        argv, "dataset_name", "train_dir", "model_name_or_path", "config_name", "variant", "objective", "recipe",
        "freeze", "lora_rank", "early_stopping_patience",
    )  # fmt: skip
    if given.recipe == "list":
        print(recipe_table(RECIPES.values()), flush=True)
        raise SystemExit(0)
    source = given.dataset_name or ("digits" if given.train_dir is None else "")
    parser = build_parser(script, description)
    problems = parser.problems
    trainer_values, recipe_message = {}, None
    with problems.collected():
        trainer_values, recipe_message = _set_defaults(parser, script, argv, source, given, defaults or {})

    namespace, rest = parser.parse_known_args(argv)
    trainer_words, unknown = split_words(rest)
    if unknown:
        refuse_unknown(unknown, [*parser.known_flags(), *(f"--{name}" for name in trainer_flags())], problems)
    values = {**vars(namespace), **parser.instead_of_invalid}
    if values["optim"] != TrainingFlags.optim and values["optim"] not in optimizers():
        problems.add(f"--optim: invalid choice: {values['optim']!r} (choose from {', '.join(optimizers())})")
        values["optim"] = TrainingFlags.optim
    is_understood = not problems.messages

    values["dataset_name"] = values["dataset_name"] or source or None
    values["output_dir"] = values["output_dir"] or _output_dir(source or values["train_dir"], script)
    model_arguments, data_arguments = fill(ModelArguments, values), fill(DataArguments, values)
    recipe_arguments, training_flags = fill(RecipeArguments, values), fill(TrainingFlags, values)
    own = [fill(kind, values) for kind in script.flags]
    is_sound_model = _check_model(model_arguments, problems)
    for arguments in (data_arguments, recipe_arguments, training_flags, *own):
        check_limits(arguments, problems)
    data_arguments.check(problems)
    training_flags.check(recipe_arguments, problems)
    for arguments in own:
        arguments.check(training_flags, recipe_arguments, problems)
    if not data_arguments.folds:  # each has a folder of its own
        values["resume_from_checkpoint"] = _checkpoint_to_resume(training_flags, problems)
    examples = Path(data_arguments.export_examples or "")
    is_new = data_arguments.export_examples is not None and values["resume_from_checkpoint"] is None
    if is_new and examples.is_dir() and any(examples.iterdir()):
        problems.add(f"--export_examples {examples} has files in it. Give a new folder.")
    # With mistakes, it goes on only where more may be found: in flags that only transformers, the network or the Hub's
    # library can check, and in the user's images.
    late_flags = [values[name] for name in ("config_overrides", "auto_augment", "push_to_hub")]
    has_late_flags = trainer_words or any(late_flags)
    if problems.messages and not has_late_flags and not (is_understood and data_arguments.train_dir):
        raise problems.as_error()

    count = len(problems.messages)
    values |= trainer_values | _read_trainer_flags(trainer_words, problems)
    is_understood = is_understood and len(problems.messages) == count
    if is_sound_model:
        _check_configuration(model_arguments, problems)
    recipe_arguments.message = recipe_message
    plan = _plan(argv, script, source, given, defaults or {}, values["optim"])
    recipe_arguments.plan, recipe_arguments.open_flags = plan
    training_arguments = _build_training_arguments(values, recipe_arguments, problems)
    if not is_understood:
        raise problems.as_error()
    return model_arguments, data_arguments, training_arguments, *own, problems


def build_parser(script: Script = FINETUNE, description: str | None = None) -> Parser:
    """The parser of our own flags, with the defaults that depend on nothing."""
    kinds = ModelArguments, DataArguments, *script.flags, RecipeArguments, TrainingFlags
    groups = {"most used": MOST_USED, **script.groups, **GROUPS}
    epilog = f"{script.note}Several GPUs: accelerate launch scripts/{script.name}.py [...].\n{_EPILOG}"
    texts = {"usage": script.usage, "description": description, "epilog": epilog}
    return Parser(*kinds, groups=groups, more_help=_more_help, **texts)


def _set_defaults(
    parser: Parser, script: Script, argv: list[str], source: str, given: argparse.Namespace, defaults: dict[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """Gives the parser this command's defaults; returns those of the Trainer's flags, and a message on the recipe."""
    chosen = {**FROM_SCRATCH, **DATA_SETS.get(source, {}), **script.defaults(source, given)}
    is_saved_architecture = bool(given.model_name_or_path or given.config_name)
    if given.early_stopping_patience:
        chosen.pop("load_best_model_at_end", None)
    chosen |= HEAD_ALONE if given.freeze == "encoder" else ADAPTERS if given.lora_rank else {}
    if is_saved_architecture:
        chosen |= SAVED_ARCHITECTURE
    elif given.variant and given.variant != chosen["variant"]:
        chosen |= {"image_size": None, "patch_size": None}  # these go with the default variant
    batch_size = parser.get_default("per_device_train_batch_size")
    recipe, settings, message = recipe_defaults(argv, batch_size, is_saved_architecture)
    ours = {action.dest for action in parser._actions}
    if recipe is not None and (unknown := ", ".join(sorted(set(settings) - ours - trainer_flags()))):
        owner = f"scripts/{recipe.script}.py"
        raise ValueError(f"--recipe {recipe.name} is for {owner}: there are no fields {unknown} here.")
    chosen |= settings | defaults
    parser.set_defaults(**{name: value for name, value in chosen.items() if name in ours})
    return {name: value for name, value in chosen.items() if name not in ours}, message


def _plan(
    argv: list[str], script: Script, source: str, given: argparse.Namespace, defaults: dict[str, Any], optimizer: str
) -> tuple[str, frozenset[str]]:
    """What `recipes.table` is to plan, and the flags that the command leaves to it."""
    named = {flag_name(word)[2:] for word in argv if word.startswith("--")} | defaults.keys()
    named |= DATA_SETS.get(source, {}).keys()
    if script is not FINETUNE or given.recipe or "adam" not in optimizer or named & {*LENGTH_AND_BATCH}:
        return "", frozenset()
    start = "checkpoint" if given.model_name_or_path else "scratch"
    start = "head" if given.freeze == "encoder" else "adapters" if given.lora_rank else start
    others = {"learning_rate", "head_learning_rate_multiplier", "metric_for_best_model"}
    return start, frozenset({*LENGTH_AND_BATCH, *others} - named)


def recipe_defaults(
    argv: list[str], per_device: int, is_saved_architecture: bool
) -> tuple[Recipe | None, dict[str, Any], str | None]:
    """The recipe that argv names, its fields for this machine's batch size, and a message; or None, {} and None."""

    def count(text: str | None) -> int | None:  # the parser reports other values
        return int(text) if text is not None and text.isdecimal() and int(text) > 0 else None

    given = first_look(argv, "recipe", "per_device_train_batch_size", "gradient_accumulation_steps")
    if given.recipe is None:
        return None, {}, None
    recipe = find_recipe(given.recipe)
    fields = {"image_size": None, "patch_size": None, **recipe.fields}
    if "variant" in fields and is_saved_architecture:
        fields = {name: value for name, value in fields.items() if name not in ("variant", "config_overrides")}
    elif "variant" not in fields:
        fields.pop("patch_size")
    per_device = count(given.per_device_train_batch_size) or per_device
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation, changed = fit_batch_size(recipe, per_device, processes, count(given.gradient_accumulation_steps))
    batch = f"{per_device * processes * accumulation} = {per_device} images x {processes} processes x {accumulation}"
    scaled = ", ".join(f"{name} {value:g}" for name, value in changed.items())
    comparison = f"; the recipe's is {recipe.batch_size}, so: {scaled}" if changed else ", as in the recipe"
    message = f"Recipe {recipe.describe()}\n    batch: {batch} accumulated{comparison}"
    return recipe, {**fields, "gradient_accumulation_steps": accumulation, **changed}, message


@cache
def _transformers_class(name: str) -> list[ast.stmt]:
    """The body of a class of transformers' training_args.py, from its source: an import would need torch."""
    (folder,) = importlib.util.find_spec("transformers").submodule_search_locations
    tree = ast.parse(Path(folder, "training_args.py").read_text(encoding="utf-8"))
    return next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def trainer_flags() -> frozenset[str]:
    """The fields of transformers' TrainingArguments."""
    body = _transformers_class("TrainingArguments")
    return frozenset(node.target.id for node in body if isinstance(node, ast.AnnAssign))


def optimizers() -> list[str]:
    """The values of --optim: transformers' OptimizerNames and our own."""
    body = _transformers_class("OptimizerNames")
    return [*(node.value.value for node in body if isinstance(node, ast.Assign)), LAMB]


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


_RARE = "rarely used"
_TITLE = "flags of transformers' TrainingArguments"


def _trainer_parser(hidden: set[str]) -> Parser:
    from .trainer import ImageTrainingArguments  # here: it imports torch

    names = [field.name for field in fields(ImageTrainingArguments) if field.init and field.name not in hidden]
    return Parser(ImageTrainingArguments, groups={_TITLE: names})


def _more_help(parser: Parser) -> str:
    """What `--help all` adds to the flags that are shown."""
    ours = {field.name for kind in parser.kinds for field in fields(kind) if field.init}
    rare = Parser(*parser.kinds, groups={_RARE: sorted(ours - parser.shown)})
    sections = {_RARE: rare, _TITLE: _trainer_parser(ours)}
    return "\n".join(title + more.format_help().partition(title)[2] for title, more in sections.items())


def _read_trainer_flags(words: list[str], problems: Problems) -> dict[str, Any]:
    """Parses the Trainer's own flags; mistakes go to the problems."""
    parser = _trainer_parser(set())
    parser.problems = problems
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # the defaults are those of TrainingArguments
    try:
        values = vars(parser.parse_known_args(words)[0])
    except InputError:  # a value is missing: the message is in the problems
        values = {}
    return {name: value for name, value in values.items() if name not in parser.instead_of_invalid}


def _build_training_arguments(
    values: dict[str, Any], recipe_arguments: RecipeArguments, problems: Problems
) -> "ImageTrainingArguments":
    """The arguments of the Trainer. If it refuses the values, raises InputError with all problems."""
    from transformers.integrations import get_reporting_integration_callbacks

    from ..augmentation.photo import auto_augment
    from ..hub.commit import check_can_publish
    from .trainer import ImageTrainingArguments

    try:
        arguments = fill(ImageTrainingArguments, values)
    except (ValueError, TypeError, ImportError) as error:
        problems.add(str(error))
        raise problems.as_error() from error
    arguments.recipe_arguments = recipe_arguments
    if arguments.train_sampling_strategy not in ("random", "sequential"):
        problems.add(f"--train_sampling_strategy {arguments.train_sampling_strategy}: images have no length to go by.")
    if arguments.dataloader_multiprocessing_context and not arguments.dataloader_num_workers:
        problems.add("--dataloader_multiprocessing_context is for --dataloader_num_workers above 0. Leave it out.")
    for callback in get_reporting_integration_callbacks(arguments.report_to):
        try:
            callback()
        except (RuntimeError, ImportError) as error:
            problems.add(f"--report_to: {error}")
    for name, (absent, reason) in REFUSED_FLAGS.items():
        if getattr(arguments, name) != absent:
            problems.add(f"--{name}: {reason}")
    if recipe_arguments.auto_augment:
        with problems.collected():
            auto_augment(recipe_arguments.auto_augment)
    if arguments.push_to_hub and arguments.process_index == 0:  # without the Hub; the trainer asks it before it trains
        name = arguments.hub_model_id or Path(arguments.output_dir).absolute().name
        with problems.collected(f"--push_to_hub to {name}: "):
            check_can_publish(name)
    return arguments


def _check_configuration(arguments: ModelArguments, problems: Problems) -> None:
    """Adds what the configuration refuses of --variant and its flags."""
    from ..configuration_vit_scratch import ViTScratchConfig

    with problems.collected():
        fields = arguments.config_fields()
        if arguments.variant and not arguments.model_name_or_path and not arguments.config_name:
            with problems.collected(f"--variant {arguments.variant}: "):
                ViTScratchConfig.from_variant(arguments.variant, **fields)


# Beside checkpoints.
_WRITTEN = ("config.json", "model.safetensors", "preprocessor_config.json", "results.json", "README.md")


def _checkpoint_to_resume(arguments: TrainingFlags, problems: Problems) -> str | None:
    """The folder of --resume_from_checkpoint. Without one, the folder of an earlier run is a mistake."""
    output, given = Path(arguments.output_dir), arguments.resume_from_checkpoint
    if reason := writing_problem(output):
        problems.add(f"--output_dir {output}: {reason}")
        return None
    if given == "auto":
        given = "True" if find_checkpoints(output) else None
    if given is None or given.lower() in ("false", "no", "0"):
        if any((output / name).exists() for name in _WRITTEN) or find_checkpoints(output):
            problems.add(
                f"--output_dir {output} already has a model in it, or files of such names. Choose another "
                "--output_dir, remove the folder, or continue it with --resume_from_checkpoint True."
            )
        return None
    if given.lower() in ("true", "yes", "1"):
        latest, damaged = latest_whole(output, read=True)
        if latest is not None:
            return str(latest)
        reason = f"there is no checkpoint in {output}. Leave it out for a new run."
        if damaged:
            reasons = "; ".join(f"{checkpoint.name}: {reason}" for checkpoint, reason in damaged.items())
            reason = f"no checkpoint in {output} is whole ({reasons}). Name one to try it all the same, or remove the "
            reason += "folder to start a new run."
        problems.add(f"--resume_from_checkpoint {given}: {reason}")
        return None
    if not Path(given, STATE).is_file():
        problems.add(f"--resume_from_checkpoint {given} is not a checkpoint: it has no {STATE}.")
    elif Path(given, MANIFEST).is_file() and (reason := damage(given, read=True)):
        # A checkpoint of another program or an earlier version has no run.json to check it by.
        problems.add(f"--resume_from_checkpoint {given} is damaged: {reason}. Choose another one, or True.")
    return given
