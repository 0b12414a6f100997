# SPDX-License-Identifier: Apache-2.0
"""HfArgumentParser for people: it tells all mistakes at once, knows flags of other scripts, and prints a short help."""

import argparse
import difflib
from typing import Any

from transformers import HfArgumentParser

from .errors import Problems


# Flags that people bring along from other scripts and other versions.
FLAGS_ELSEWHERE: dict[str, str] = {
    "--token": "put the token into HF_TOKEN, or run `hf auth login`: command lines are seen by others.",
    "--use_auth_token": "put the token into HF_TOKEN, or run `hf auth login`: command lines are seen by others.",
    "--ignore_mismatched_sizes": "not needed: a classifier for other labels is replaced by a fresh one.",
    "--overwrite_output_dir": "no run writes over another. Choose another --output_dir, or remove the folder.",
    "--evaluation_strategy": "is --eval_strategy now.",
    "--warmup_ratio": "is --warmup_steps now, with a value below 1.",
    "--no_cuda": "is --use_cpu now.",
    "--lamb": "is --optim lamb now.",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling for each flag, and no default where the help text has told it."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = action.option_strings[0]
        return name if action.nargs == 0 else f"{name} {self._format_args(action, action.dest.upper())}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.nargs == 0 and action.option_strings[0].startswith("--no_"):
            return f"The same as --{action.dest} False."
        if action.default in (None, argparse.SUPPRESS, "", []) or "Default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Parser(HfArgumentParser):
    """HfArgumentParser that collects wrong values in place of stopping at the first, and takes no abbreviations."""

    def __init__(self, *dataclass_types: type, **kwargs: Any) -> None:
        super().__init__(list(dataclass_types), allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.problems = Problems()
        self.instead_of_invalid: dict[str, Any] = {}

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            self._note(action, error)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            self._note(action, error)

    def _note(self, action: argparse.Action, error: argparse.ArgumentError) -> None:
        self.problems.add(f"{action.option_strings[0]}: {error.message}")
        self.instead_of_invalid[action.dest] = action.default

    def error(self, message: str) -> None:  # type: ignore[override]
        self.problems.add(message)
        raise self.problems.as_error()


def refuse_unknown(words: list[str], parser: Parser, problems: Problems) -> None:
    """Adds a message for each word that no flag took, with the flag that was meant."""
    known = [option for option in parser._option_string_actions if "_" in option or "-" not in option[2:]]
    for word in words:
        flag = word.split("=")[0].replace("-", "_").replace("__", "--", 1)
        if word.startswith("--") and flag in FLAGS_ELSEWHERE:
            problems.add(f"{flag}: {FLAGS_ELSEWHERE[flag]}")
        elif word.startswith("-"):
            near = difflib.get_close_matches(flag, known, n=1)
            problems.add(f"{word}: there is no such flag. {f'Did you mean {near[0]}?' if near else 'See --help.'}")
    if words and not any(word.startswith("-") for word in words):
        problems.add(f"{' '.join(words)}: belongs to no flag. See --help.")
