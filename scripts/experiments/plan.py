# SPDX-License-Identifier: Apache-2.0
"""From one command line to the flags of all runs that a transfer table takes, each checked before any starts."""

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from modeling_vit_scratch.cards.values import PRETRAINED, SCRATCH
from modeling_vit_scratch.common.errors import InputError, Problems
from modeling_vit_scratch.common.flags import BUILT_IN
from modeling_vit_scratch.data.sources import FILE_READERS
from modeling_vit_scratch.recipes.table import LENGTH_AND_BATCH
from modeling_vit_scratch.training.arguments import ModelArguments, TrainingFlags
from modeling_vit_scratch.training.build import load_encoder
from modeling_vit_scratch.training.command_line import parse_arguments


# The last step is what counts: nothing is chosen on held-out images, and nothing is evaluated or saved on the way.
FIXED_FLAGS = ("--eval_strategy", "no", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True")
# Flags of the runs that this command sets itself, and what to give in their place.
OWN_FLAGS = {
    "seed": "--seeds", "split_seed": "--seeds", "output_dir": "--output_dir before --data, which is the table's",
    "variant": None,
    "config_name": None, "image_processor_name": None, "train_dir": "--data NAME=PLACE",
    "dataset_name": "--data NAME=PLACE", "resume_from_checkpoint": "the same command, which goes on where it stopped",
    "push_to_hub": None, "export_examples": None, "eval_strategy": None, "save_strategy": None,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """
    One run of scripts/finetune.py or scripts/probe.py.

    Attributes:
        kind: the script, without its ending.
        data: the name of the data set.
        start: PRETRAINED or SCRATCH.
        seed: of the run.
        learning_rate: where the run from scratch has one of its own.
        flags: all that the script gets, but --output_dir.
    """

    kind: str
    data: str
    start: str
    seed: int
    learning_rate: float | None
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its folder."""
        rate = "" if self.learning_rate is None else f"-{self.learning_rate:g}"
        return f"{self.kind}-{self.data}-{self.start}{rate}-{self.seed}"


def source_flags(name: str, place: str | None) -> list[str]:
    """What finetune.py calls a PLACE."""
    if place is None:
        return ["--dataset_name", name]
    looks_like_a_path = place.startswith(("/", ".", "~")) or place.count("/") > 1 or "*" in place
    if looks_like_a_path or Path(place).exists() or Path(place).suffix.lower() in FILE_READERS:
        return ["--train_dir", place]
    return ["--dataset_name", place]


def plan_runs(arguments: argparse.Namespace, common: list[str]) -> list[Run]:
    """
    All runs of the table, with the flags of each checked; writes the architecture of the runs from scratch to
    OUTPUT_DIR/architectures: the pretrained model's, in the size that the flags ask for.

    Args:
        arguments: of `arguments.build_parser`.
        common: flags of finetune.py for all data sets.

    Raises:
        InputError: with all that is wrong with the command line.
    """
    problems = Problems()
    places = dict(entry.partition("=")[::2] for entry in arguments.data)
    for name, place in places.items():
        if not place and name not in BUILT_IN:
            problems.add(f"--data {name}: only {' and '.join(BUILT_IN)} go by the name alone. Give NAME=PLACE.")
        if not name or not all(sign.isalnum() or sign in "-_.+ " for sign in name):
            problems.add(f"--data {name}: it names folders and rows of the table. Take letters, digits, - and _.")
    if len(places) < len(arguments.data):
        problems.add(f"--data {' '.join(arguments.data)}: a name is there twice.")
    own = {name: shlex.split(text) for name, text in named("--flags", arguments.flags, places, problems).items()}
    named("--notes", arguments.notes, places, problems)
    if len(set(arguments.seeds)) < len(arguments.seeds):
        problems.add(f"--seeds {' '.join(map(str, arguments.seeds))}: one is there twice, and would count twice.")
    if arguments.jobs < 1:
        problems.add(f"--jobs {arguments.jobs} must be at least 1.")
    for word in (word for words in (common, *own.values()) for word in words if word.startswith("--")):
        flag = word.partition("=")[0][2:].replace("-", "_")
        if flag in OWN_FLAGS:
            instead = f"Give {OWN_FLAGS[flag]}." if OWN_FLAGS[flag] else "Leave it out."
            problems.add(f"--{flag}: scripts/transfer.py sets it for every run. {instead}")
    if problems.messages:
        raise problems.as_error()

    logging.set_verbosity_error()  # each data set's model is loaded, and says that its classifier is not
    logging.disable_progress_bar()
    runs = []
    for name, place in places.items():
        flags = [*source_flags(name, place or None), *common, *own.get(name, [])]
        if not {"--recipe", *(f"--{flag}" for flag in LENGTH_AND_BATCH)} & {*flags}:
            # Without, length and batch would follow from the start, and both are to get the same.
            flags += ["--per_device_train_batch_size", str(TrainingFlags.per_device_train_batch_size)]
        start = ["--model_name_or_path", arguments.model_name_or_path]
        model_arguments = _check(name, [*flags, *start, *FIXED_FLAGS], problems)
        if model_arguments is None:
            continue
        architecture = Path(arguments.output_dir, "architectures", name)
        scratch = write_architecture(model_arguments, architecture)
        for seed in arguments.seeds:
            seeds = ("--split_seed", str(seed), "--seed", str(seed))
            ending = (*FIXED_FLAGS, *seeds)
            runs.append(Run("finetune", name, PRETRAINED, seed, None, (*flags, *start, *ending)))
            for rate in arguments.scratch_learning_rate or [None]:
                own_rate = () if rate is None else ("--learning_rate", f"{rate:g}")
                runs.append(Run("finetune", name, SCRATCH, seed, rate, (*flags, *scratch, *own_rate, *ending)))
            if not arguments.skip_probes:
                probe = (arguments.model_name_or_path, *flags, *seeds)
                runs.append(Run("probe", name, PRETRAINED, seed, None, probe))
                runs.append(Run("probe", name, SCRATCH, seed, None, (*probe, "--random_weights")))
    if problems.messages:
        raise problems.as_error()
    # Those that take longest first, seed by seed: the last ones to end are short.
    return sorted(runs, key=lambda run: run.kind == "probe")


def named(flag: str, entries: list[str], places: dict[str, str], problems: Problems) -> dict[str, str]:
    """NAME=TEXT entries by name, each a data set's."""
    found = {}
    for entry in entries:
        name, equals, text = entry.partition("=")
        if not equals or name not in places:
            problems.add(f"{flag} {entry}: give NAME=TEXT, with a NAME of --data: {', '.join(places)}.")
        found[name] = text
    return found


def _check(name: str, flags: list[str], problems: Problems) -> ModelArguments | None:
    """The flags of a run as the script will read them; what is wrong with them goes to the problems."""
    try:
        model_arguments, data_arguments, *_, found = parse_arguments([*flags, "--output_dir", "outputs/transfer/check"])
    except InputError as error:
        problems.add(f"{name}: {error}")
        return None
    for flag in ("train_dir", "validation_dir"):
        place = getattr(data_arguments, flag)
        if place is not None and "*" not in place and not Path(place).expanduser().exists():
            found.add(f"--{flag} {place} does not exist.")
    if found.messages:
        problems.add(f"{name}: {found.as_error()}")
        return None
    return model_arguments


def write_architecture(arguments: ModelArguments, folder: Path) -> list[str]:
    """
    Writes configuration and image processor of the model that the flags name, as the flags change them.

    Returns:
        The flags that train this network from scratch. Like the network that is fine-tuned, it has neither the tanh
        layer nor the distillation head that pretraining may have had before its classifier.
    """
    encoder, processor = load_encoder(arguments)
    encoder.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    left_out = {"representation_size": None, "use_distillation_head": False}
    changes = [f"{name}={value}" for name, value in left_out.items() if getattr(encoder.config, name) != value]
    flags = ["--config_name", str(folder), "--image_processor_name", str(folder)]
    if changes:
        flags += ["--config_overrides", ",".join([*filter(None, [arguments.config_overrides]), *changes])]
    return flags
