# SPDX-License-Identifier: Apache-2.0
"""--label_map: what the labels of the data are called in the model, e.g. n01440764 is "tench, Tinca tinca"."""

import csv
import json
from pathlib import Path
from typing import Any

from ..common.errors import Problems


def read_label_map(file: str, label_names: list[str], problems: Problems) -> dict[str, str]:
    """
    From labels of the data to the model's.

    Args:
        file: a text with a label of the data and one of the model in each line, between them a tab or, if there is
            none, the first space (as in ImageNet's LOC_synset_mapping.txt); a .csv with these two columns; or JSON, an
            object from labels of the data to the model's, or keras's imagenet_class_index.json. A label of the model
            may be its name or its number.
        label_names: the model's, in the order of its logits.
        problems: the mistakes found so far; in case of a new one, what could be read is returned.
    """
    path = Path(file)
    if not path.is_file():
        problems.add(f"--label_map {file} is not a file.")
        return {}
    try:
        pairs = _pairs(path)
    except (ValueError, OSError, csv.Error) as error:
        problems.add(f"--label_map {file} can't be read: {error}.")
        return {}
    known, found, unknown = set(label_names), {}, []
    for theirs, ours in pairs:
        name = str(ours).strip()
        if name not in known and name.isdecimal() and int(name) < len(label_names):
            name = label_names[int(name)]
        if name in known:
            found[str(theirs).strip()] = name
        else:
            unknown.append(name)
    if unknown:
        problems.add(
            f"--label_map {file}: {len(unknown)} labels on its right side are none of the {len(label_names)} of the "
            f"model, nor a number below that, e.g. {unknown[0]!r}."
        )
    return found


def _pairs(path: Path) -> list[tuple[Any, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        table = json.loads(text)
        if not isinstance(table, dict):
            raise ValueError("it must be an object, {label of the data: label of the model}")
        # Keras's index is the other way round: {"0": ["n01440764", "tench"]}.
        return [(value[0], key) if isinstance(value, list) and value else (key, value) for key, value in table.items()]
    lines = [line for line in text.splitlines() if line.strip()]
    if path.suffix == ".csv":
        pairs = list(csv.reader(lines))
    else:
        pairs = [line.split("\t" if "\t" in line else None, maxsplit=1) for line in lines]
    wrong = next((number for number, pair in enumerate(pairs, start=1) if len(pair) != 2), None)
    if wrong is not None:
        raise ValueError(f"line {wrong} has no two columns")
    return pairs
