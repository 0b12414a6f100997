# SPDX-License-Identifier: Apache-2.0
"""Command lines from dataclasses: a grouped --help, and all mistakes in one message. Imports no torch."""

import argparse
import dataclasses
import difflib
import functools
import math
import operator
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .errors import Problems


# Flags of other scripts and other versions.
FLAGS_ELSEWHERE: dict[str, str] = {
    "--token": "put the token into HF_TOKEN, or run `hf auth login`: command lines are seen by others.",
    "--use_auth_token": "put the token into HF_TOKEN, or run `hf auth login`: command lines are seen by others.",
    "--ignore_mismatched_sizes": "not needed: a classifier for other labels is replaced by a fresh one.",
    "--overwrite_output_dir": "no run overwrites another. Choose another --output_dir, or remove the folder.",
    "--evaluation_strategy": "is --eval_strategy now.",
    "--warmup_ratio": "is --warmup_steps now, with a value below 1.",
    "--no_cuda": "is --use_cpu now.",
    "--lamb": "is --optim lamb now.",
}
# What people type for flags of transformers' examples.
OTHER_NAMES: dict[str, str] = {
    "--lr": "--learning_rate", "--wd": "--weight_decay", "--epochs": "--num_train_epochs",
    "--num_epochs": "--num_train_epochs", "--n_epochs": "--num_train_epochs", "--steps": "--max_steps",
    "--batch_size": "--per_device_train_batch_size", "--bs": "--per_device_train_batch_size",
    "--eval_batch_size": "--per_device_eval_batch_size", "--workers": "--dataloader_num_workers",
    "--num_workers": "--dataloader_num_workers", "--model": "--model_name_or_path", "--arch": "--variant",
    "--data": "--train_dir", "--data_dir": "--train_dir", "--data_path": "--train_dir", "--dataset": "--dataset_name",
    "--val_dir": "--validation_dir", "--out": "--output_dir", "--output": "--output_dir", "--img_size": "--image_size",
    "--size": "--image_size", "--resume": "--resume_from_checkpoint", "--optimizer": "--optim",
    "--scheduler": "--lr_scheduler_type", "--label_smoothing": "--label_smoothing_factor",
    "--grad_clip": "--max_grad_norm", "--freeze_backbone": "--freeze", "--freeze_encoder": "--freeze",
    "--lora": "--lora_rank",
}  # fmt: skip
METAVARS = {int: "N", float: "X", bool: "BOOL"}
LIMITS = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le}

_Arguments = TypeVar("_Arguments")


def flag(default: Any, help: str, **more: Any) -> Any:
    """A field of a dataclass that is a flag. `more`: argparse's `choices` and `metavar`, and limits as in `LIMITS`."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


class Parser(argparse.ArgumentParser):
    """
    Flags from the fields of dataclasses (`kinds`), made by `flag`. Mistakes are collected in `problems`. --help shows
    the fields in `groups`, by title; `more_help` returns what `--help all` adds to this parser's.
    """

    def __init__(
        self,
        *kinds: type,
        groups: dict[str, Iterable[str]],
        more_help: Callable[["Parser"], str] | None = None,
        **kwargs: Any,
    ) -> None:
        form = functools.partial(HelpFormatter, max_help_position=30)  # a longer flag has a line of its own
        super().__init__(add_help=False, allow_abbrev=False, formatter_class=form, **kwargs)
        self.problems, self.instead_of_invalid = Problems(), {}  # the defaults of flags with a mistake
        self.kinds, self.more_help, self.shown = kinds, more_help, {name for names in groups.values() for name in names}
        fields = {field.name: (kind, field) for kind in kinds for field in dataclasses.fields(kind) if field.init}
        hints = {kind: typing.get_type_hints(kind) for kind in kinds}
        for title, names in groups.items():
            group = self.add_argument_group(title)
            for name in names:
                kind, field = fields.pop(name)
                _add_flag(group, field, hints[kind][name], flag_metadata(kind, name))
        for name, (kind, field) in fields.items():
            _add_flag(self, field, hints[kind][name], {**flag_metadata(kind, name), "help": argparse.SUPPRESS})
        self.add_argument("-h", "--help", nargs="?", action=_Help, help=argparse.SUPPRESS)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """As argparse does it. ~ is the home folder, also in --flag=~/folder, which shells leave as it is."""
        home, words = os.path.expanduser("~"), sys.argv[1:] if args is None else args
        words = [re.sub(r"(^|^--\w+=)~(?=/|$)", lambda found: found[1] + home, word) for word in words]
        return super().parse_known_args(words, namespace)

    def parse(self, kind: type[_Arguments], argv: list[str] | None, check: Callable[..., None]) -> _Arguments:
        """A command line (default: of this process) as a dataclass. InputError with all mistakes; `check` adds some."""
        namespace, unknown = self.parse_known_args(argv)
        refuse_unknown(unknown, self.known_flags(), self.problems)
        values = {**vars(namespace), **self.instead_of_invalid}
        arguments = fill(kind, values)
        for action in self._get_positional_actions():
            setattr(arguments, action.dest, values[action.dest])
        check_limits(arguments, self.problems)
        check(arguments, self.problems)
        if self.problems.messages:
            raise self.problems.as_error()
        return arguments

    def known_flags(self) -> list[str]:
        return [option for option in self._option_string_actions if "-" not in option[2:]]

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        return self._collect(action, super()._get_value, arg_string)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        self._collect(action, super()._check_value, value)

    def _collect(self, action: argparse.Action, check: Callable[[argparse.Action, Any], Any], value: Any) -> Any:
        try:
            return check(action, value)
        except argparse.ArgumentError as error:
            self.problems.add(f"{action.option_strings[0]}: {error.message}")
            self.instead_of_invalid[action.dest] = action.default

    def error(self, message: str) -> None:  # type: ignore[override]
        self.problems.add(message)
        raise self.problems.as_error()


class _Help(argparse.Action):
    """--help, and --help all."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        text = parser.format_help()
        if values == "all" and parser.more_help is not None:
            text += f"\n{parser.more_help(parser)}"
        print(text.rstrip(), flush=True)
        parser.exit()


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows one spelling of each flag, and its default unless the help text has it."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = action.option_strings[0]
        if action.nargs == 0 or (action.nargs == "?" and not action.default):
            return name
        if action.nargs == "?":
            return f"{name} {action.metavar or 'BOOL'}"
        return f"{name} {self._format_args(action, action.metavar or action.dest.upper())}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default in (None, argparse.SUPPRESS, "", []) or default is False or "Default:" in action.help:
            return action.help
        values = default if isinstance(default, list) else [default]
        text = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
        return f"{action.help} (default: {text})"


def flag_metadata(kind: type, name: str) -> dict[str, Any]:
    """The metadata of a field, from this class or the nearest base that has a help text."""
    fields = (getattr(base, "__dataclass_fields__", {}).get(name) for base in kind.__mro__)
    return next((dict(field.metadata) for field in fields if field is not None and field.metadata), {})


def _add_flag(group: Any, field: dataclasses.Field, hint: Any, metadata: dict[str, Any]) -> None:
    """A flag in both spellings, --like_this and --like-this; also --no_like_this if it is on by default."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        parts = [part for part in typing.get_args(hint) if part is not types.NoneType]
        hint = next((kind for kind in (bool, str) if kind in parts), parts[0])
    options = {name: value for name, value in metadata.items() if name not in LIMITS}
    options["default"] = None if field.default is dataclasses.MISSING else field.default
    if typing.get_origin(hint) is list:
        (hint,), options["nargs"] = typing.get_args(hint), "+"
    if hint is bool:
        options |= {"nargs": "?", "const": True}
    options["type"] = _boolean if hint is bool else hint
    if "choices" not in options:
        options.setdefault("metavar", METAVARS.get(hint, "TEXT"))
    name = field.name
    group.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **options)
    if hint is bool and field.default:
        negative = (f"--no_{name}", f"--no-{name.replace('_', '-')}")
        group.add_argument(*negative, dest=name, action="store_false", default=True, help=argparse.SUPPRESS)


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "t", "y", "1"):
        return True
    if text.lower() in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False.")


def fill(kind: type[_Arguments], values: dict[str, Any]) -> _Arguments:
    """An instance of a dataclass from the values of its fields; others are ignored."""
    names = (field.name for field in dataclasses.fields(kind) if field.init)
    return kind(**{name: values[name] for name in names if name in values})


def first_look(argv: list[str], *names: str) -> argparse.Namespace:
    """The values of a few flags, on which the defaults of others depend; None if not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?")
    return parser.parse_known_args(argv)[0]


def flag_name(word: str) -> str:
    """The flag of a word, with underscores and without value: --max-steps=3 is --max_steps."""
    return word.split("=")[0].replace("-", "_").replace("__", "--", 1)


def check_limits(arguments: Any, problems: Problems) -> None:
    """Adds a message for each value outside of the limits of its flag; None is no value."""
    for field in dataclasses.fields(arguments):
        value, metadata = getattr(arguments, field.name), flag_metadata(type(arguments), field.name)
        limits = {name: limit for name, limit in metadata.items() if name in LIMITS}
        if value is not None and not all(LIMITS[name](value, limit) for name, limit in limits.items()):
            words = " and ".join(f"{name.replace('_', ' ')} {limit:g}" for name, limit in limits.items())
            problems.add(f"--{field.name} {value:g} must be {words}.")


def refuse_unknown(words: list[str], known: Iterable[str], problems: Problems) -> None:
    """Adds a problem for each word that belongs to no flag, with the closest known flag."""
    known = list(known)
    for word in words:
        name = flag_name(word)
        if word.startswith("--") and name in FLAGS_ELSEWHERE:
            problems.add(f"{name}: {FLAGS_ELSEWHERE[name]}")
        elif word.startswith("-"):
            usual = OTHER_NAMES.get(name)
            near = [usual] if usual in known else difflib.get_close_matches(name, known, n=1)
            problems.add(f"{word}: there is no such flag. {f'Did you mean {near[0]}?' if near else 'See --help.'}")
    if words and not any(word.startswith("-") for word in words):
        problems.add(f"{' '.join(words)}: belongs to no flag. See --help.")


# Minimum area of the random crop of a photo. The usual 0.08 is for a million images.
PHOTO_SMALLEST_AREA = 0.35


@dataclass
class HubFlags:
    model_revision: str = flag("main", "Branch, tag or commit.", metavar="REVISION")
    cache_dir: str | None = flag(None, "Folder for downloads. Default: Hugging Face's.", metavar="DIR")


@dataclass
class ImageFlags:
    dataset_config_name: str | None = flag(None, "Configuration of a data set of the Hub.", metavar="NAME")
    image_column_name: str | None = flag(None, "Column of the images. Default: detected.", metavar="NAME")


@dataclass
class LabelFlags(ImageFlags):
    label_column_name: str | None = flag(None, "Column of the labels. Default: detected.", metavar="NAME")
    label_separator: str | None = flag(
        None, "Separator of labels in a text column, for images with several. Example: '|'", metavar="TEXT"
    )
    train_val_split: float | None = flag(
        None, "Fraction of each class to hold out, where the data have no validation split.", above=0, below=1
    )
    split_seed: int = flag(
        0, "Which images that fraction is. Not --seed, so that no run trains on what another has held out.", at_least=0
    )
    group_column_name: str | None = flag(
        None, "Column of the patient, video or other group of an image. A group is on one side.", metavar="NAME"
    )
    group_from: str | None = flag(
        None, r"As --group_column_name, by a regular expression on each path. Example: '(patient\d+)_'", metavar="REGEX"
    )
    allow_overlap: bool = flag(False, "Accept the same image in training and held out, or with two labels.")
    max_eval_samples: int | None = flag(None, "Evaluate on at most N images, chosen at random.", at_least=1)


def available_cores() -> int:
    """The cores that this process may use, by its affinity and the quota of its container; workers are as many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or a quota of "max"
        return cores


@dataclass
class ReadingFlags:
    per_device_eval_batch_size: int = flag(128, "Batch size per device, without gradients.", at_least=1)
    dataloader_num_workers: int | None = flag(
        None, "Worker processes per device that decode images; if not set, as many as the cores allow.", at_least=0
    )
    max_broken_images: int | None = flag(0, "Skip up to N images that can't be read; each is named.", at_least=0)


@dataclass
class FastDecodeFlag:
    fast_decode: bool = flag(
        True,
        "Decode JPEG photos at reduced scale: faster, and pixels differ by about 1 of 255 levels. Evaluation does not.",
    )


@dataclass
class SeedFlag:
    seed: int = flag(42, "Random seed.", at_least=0)


# Data sets that need no file.
BUILT_IN = ("digits", "elpv")


@dataclass
class DataArguments(LabelFlags):
    """What to learn from."""

    dataset_name: str | None = flag(
        None,
        "digits (comes with scikit-learn), elpv (solar cells: pip install elpv-dataset), or any data set of the Hub. "
        "Default: digits, without a --train_dir. Example: food101",
        metavar="NAME",
    )
    train_dir: str | None = flag(
        None,
        "Your images: a folder with one folder per class, or with a metadata.jsonl, .csv or .parquet; a .parquet, "
        ".csv, .jsonl or .tar (WebDataset) file; or a quoted pattern: 'shards/*.tar'",
        metavar="DIR",
    )
    validation_dir: str | None = flag(None, "Held-out images. Default: see --train_val_split.", metavar="DIR")
    train_val_split: float = 0.15
    streaming: bool = flag(
        False,
        "Read training images during training, for data larger than the disk. Needs held-out images, and --max_steps "
        "for formats other than Parquet.",
    )
    shuffle_buffer_size: int = flag(2048, "With --streaming: images in the shuffle buffer.", at_least=1)
    label_names_file: str | None = flag(
        None, "With --streaming: a text file with one label per line, where the data have only numbers.", metavar="FILE"
    )
    problem_type: str | None = flag(
        None,
        "regression: learn the numbers of the label column. Default: detected, from floats and lists of labels.",
        choices=("regression",),
    )
    num_channels: int | None = flag(
        None,
        "Channels of .npy files (H, W, C) and TIFF files. Their mean and std are measured. Example: 13",
        at_least=1,
    )
    max_train_samples: int | None = flag(None, "Train on at most N images, chosen at random.", at_least=1)
    folds: int | None = flag(
        None, "Train N models, each in a folder of its own. Every image is held out once. Example: 5", at_least=2
    )
    fold: int = dataclasses.field(init=False, default=0)  # which of them
    drop_overlap: bool = flag(
        False, "Train without copies and near copies of given held-out images, and without images with two labels."
    )
    verify_images: bool = flag(True, "Decode every image once before training, to find broken files and copies first.")
    export_examples: str | None = flag(None, "Save ten held-out images here to try the model.", metavar="DIR")

    def check(self, problems: Problems) -> None:
        """Adds what is wrong with the values, but for limits of single flags."""
        if self.dataset_name and self.train_dir:
            problems.add("--dataset_name and --train_dir each say what to learn from. Keep one of them.")
        if self.validation_dir and not self.train_dir:
            problems.add("--validation_dir goes with --train_dir. Give that too, or leave this out.")
        if self.dataset_config_name and self.dataset_name in (None, *BUILT_IN):
            problems.add("--dataset_config_name goes with a --dataset_name of the Hub. Leave it out.")
        if self.streaming and self.dataset_name in BUILT_IN:
            problems.add(f"--streaming: {self.dataset_name} is small and here already. Leave it out.")
        if self.folds and (self.validation_dir or self.streaming or self.export_examples):
            problems.add(
                "--folds does not go with --validation_dir, --streaming and --export_examples. Leave them out."
            )
        if self.num_channels not in (None, 1, 3) and (self.streaming or self.export_examples):
            problems.add("--num_channels does not go with --streaming and --export_examples. Leave them out.")
        if self.problem_type and (self.streaming or self.folds or self.label_separator):
            problems.add("--problem_type does not go with --streaming, --folds and --label_separator. Leave them out.")
        if self.allow_overlap and self.drop_overlap:
            problems.add("--allow_overlap and --drop_overlap are two answers to one question. Keep one of them.")
        if self.group_column_name and self.group_from:
            problems.add("--group_column_name and --group_from each say what the groups are. Keep one of them.")
        if self.streaming and (self.group_column_name or self.group_from):
            problems.add("--streaming reads no groups before training: give a --validation_dir that shares none.")
        if self.streaming and self.max_train_samples is not None:
            problems.add(
                "--max_train_samples chooses from all images, which --streaming can't. Give --max_steps instead."
            )
        if self.label_names_file and not self.streaming:
            problems.add("--label_names_file goes with --streaming. Leave it out: all labels are read before training.")
        if self.export_examples and Path(self.export_examples).is_file():
            problems.add(f"--export_examples {self.export_examples} is a file. Give a folder.")
