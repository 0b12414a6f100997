# SPDX-License-Identifier: Apache-2.0
"""
Which images are held out, and the record of it.

An image is known by the content of its file: names change when files are moved, renamed or packed into a table, and
copies of one photo must not be on both sides. Its identity is the first 64 bits of the SHA-256 of the file. A record
has the identities of all held-out images and of up to 1,000 training images: results.json, in "dataset", and run.json
of every checkpoint. Later runs and evaluations compare their images with it, wherever these are.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils.hub import cached_file

from ..common.errors import InputError
from ..common.files import MANIFEST, read_manifest


# Training images in a record: those with the lowest identities, which another set of images has, too, if it overlaps.
MAX_TRAINED_ON = 1000
# How results.json named the split when the seed decided it.
_BY_SEED = re.compile(r"([\d.]+) %.* chosen with seed (\d+)")


@dataclass(frozen=True)
class Earlier:
    """What is known of the images of the runs behind a model or a checkpoint."""

    origin: str  # for messages
    records: tuple[dict[str, Any], ...] = ()  # see `images_record`; the last run first
    how: str = "as in its record"  # the last run chose its held-out images
    by_seed: dict[str, Any] | None = None  # the entry "dataset" of a results.json from before there were identities
    is_same_run: bool = False  # of a checkpoint that is resumed

    @cached_property
    def trained_on(self) -> frozenset[str]:
        return frozenset(word for record in self.records for word in record["trained_on"].split())

    @cached_property
    def held_out(self) -> frozenset[str]:
        return frozenset(word for record in self.records for word in record["held_out"].split()) - self.trained_on

    def resolve(self, name: str, rows: list[list[int]], ids: list[str], is_multi_label: bool) -> "Earlier":
        """A record by seed becomes one by identity if the data have the same name, and as many images of one label."""
        record = self.by_seed or {}
        train, held = record.get("num_training_images"), record.get("num_held_out_images")
        match = _BY_SEED.search(str(record.get("held_out")))
        if not record or record.get("name", name) != name or (match is None and train != len(rows)):
            return replace(self, by_seed=None)
        held_out = set()
        if match is not None and not is_multi_label and (train is None or train + held == len(rows)):
            chosen = hold_out_by_seed([row[0] for row in rows], float(match[1]) / 100, int(match[2]))
            held_out = {ids[index] for index in chosen if held in (None, len(chosen))}
        if not held_out and train != len(rows):
            return self
        lists = {"held_out": held_out, "trained_on": sorted(set(ids) - held_out)[:MAX_TRAINED_ON]}
        return replace(self, records=({part: " ".join(sorted(found)) for part, found in lists.items()},), by_seed=None)

    def has_seen(self, ids: list[str]) -> bool | None:
        """Whether any of these images was trained on; None if none is known to be."""
        if not self.trained_on.isdisjoint(ids):
            return True
        return False if self.held_out.issuperset(ids) else None

    def is_data_of(self, ids: list[str]) -> bool:
        """Whether most of what the last of these runs held out is here."""
        held_out = self.records[0]["held_out"].split() if self.records else ()
        return 2 * len(set(ids).intersection(held_out)) > len(held_out)


def read_earlier(
    model: str | None, checkpoint: str | None = None, fraction: float | None = None, **hub: str | None
) -> Earlier | None:
    """
    What is known of the images behind the checkpoint that a run resumes from, or else behind the model that it starts
    from; None if nothing is. `fraction` is that of a run that resumes from a checkpoint without a record, `hub` the
    revision and the cache_dir of a model on the Hub.
    """
    origin = checkpoint or model or ""
    result, manifest = Path(origin, "results.json"), Path(origin, MANIFEST)
    if origin and not Path(origin).exists():
        with suppress(OSError, ValueError):  # whoever loads the model says what is wrong
            found = cached_file(origin, result.name, _raise_exceptions_for_missing_entries=False, **hub)
            result = Path(found) if found else result
    try:
        if origin and checkpoint is None and result.is_file():
            dataset = json.loads(result.read_text(encoding="utf-8")).get("dataset", {})
        elif origin and manifest.is_file():
            dataset = read_manifest(origin)
            if fraction is not None and not dataset.get("images"):
                dataset["held_out"] = f"{100 * fraction:.10g} % chosen with seed {dataset['settings']['--seed']}"
        else:
            return None
    except (ValueError, AttributeError, KeyError) as error:
        raise InputError(f"{origin} has a record that can't be read: {error!r}. Repair it, or remove it.") from error
    how, is_same_run = dataset.get("held_out") or Earlier.how, checkpoint is not None
    if images := dataset.get("images"):
        return Earlier(origin, ({**images, "earlier": []}, *images["earlier"]), how, None, is_same_run)
    return Earlier(origin, (), how, dataset, is_same_run)


def images_record(
    train: tuple[list[str], Sequence[Any]] | None, held_out: tuple[list[str], Sequence[Any]], earlier: Earlier | None
) -> dict[str, Any]:
    """
    The record of identities and labels: "held_out", "trained_on" (up to 1,000), "earlier", the records of the runs that
    it goes on from, and "digest", which another image, label or side changes and another order does not.
    """
    parts, lines = {"trained_on": train or ([], []), "held_out": held_out}, []
    for part, sides in parts.items():
        lines += [f"{part} {identity} {np.asarray(label).tolist()}" for identity, label in zip(*sides)]
    return {
        "identity": "the first 64 bits of the SHA-256 of each file",
        "digest": hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16],
        "held_out": " ".join(sorted(set(held_out[0]))),
        "trained_on": " ".join(sorted(set(parts["trained_on"][0]))[:MAX_TRAINED_ON]),
        "earlier": list(earlier.records[earlier.is_same_run :]) if earlier else [],
    }


def notes(record: dict[str, Any] | None, train: list[str], earlier: Earlier | None) -> list[str]:
    """Lines for the user: held-out images that were trained on before, and the other way round."""
    if record is None or earlier is None:
        return []
    if earlier.by_seed is not None and train:
        return [f"warning: {earlier.origin} was trained on data of this name, and can't tell any more on which images."]
    held_out, found = set(record["held_out"].split()), []
    if both := held_out & earlier.trained_on:
        found.append(
            f"warning: {len(both)} of the {len(held_out)} held-out images are known to be among those that "
            f"{earlier.origin} was trained on: their score will be too high. Keep its --train_val_split and "
            "--split_seed, or give images that it has not seen as --validation_dir."
        )
    if both := set(train) & earlier.held_out:
        found.append(f"Note: {len(both)} images that {earlier.origin} held out are trained on now.")
    return found


def choose_held_out(
    rows: list[list[int]],
    ids: list[str],
    fraction: float,
    split_seed: int = 0,
    earlier: Earlier | None = None,
    groups: Sequence[Any] | None = None,
) -> list[int]:
    """
    The sorted indices of the held-out images, from the labels, the identity and the group of each. A group is on one
    side; without `groups`, only the copies of an image are one.

    Of each label, the groups whose lowest SHA-256 of split seed and identity is lowest: the fraction of its images,
    rounded, at least one and never all. A group that would miss that number by more than it is missed without it is
    passed over. So order and names do not matter; an image that is added or removed moves no other, but for the one at
    the edge of its label, when the rounded number changes or its place is taken. Where images or groups have several
    labels, the rarest label chooses first, and what it has chosen or left counts for the others; one image may then
    move a few groups, of any label. Images that an earlier run held out come first, and those that it trained on last.
    """
    first, last = (earlier.held_out, earlier.trained_on) if earlier else ((), ())
    groups = ids if groups is None else groups
    images: dict[Any, set[str]] = defaultdict(set)
    members: dict[int, dict[Any, set[str]]] = defaultdict(lambda: defaultdict(set))
    for labels, identity, group in zip(rows, ids, groups):
        images[group].add(identity)
        for label in labels or [-1]:  # those without any label are like a label
            members[label][group].add(identity)
    key = {}
    for group, found in images.items():
        lowest = min(hashlib.sha256(f"{split_seed} {identity}".encode()).digest() for identity in found)
        key[group] = not found.isdisjoint(last), found.isdisjoint(first), lowest
    held, decided = set(), set()
    size = {label: sum(map(len, parts.values())) for label, parts in members.items()}
    for label in sorted(members, key=lambda label: (size[label], label)):
        parts = members[label]
        wanted = min(max(1, int(fraction * size[label] + 0.5)), size[label] - 1)
        wanted -= sum(len(found) for group, found in parts.items() if group in held)
        free = sorted(parts.keys() - decided, key=key.__getitem__)
        if wanted > 0 and all(len(parts[group]) >= 2 * wanted for group in free) and held.isdisjoint(parts):
            free = free and [min(free, key=lambda group: len(parts[group]))]
            wanted = max(wanted, len(parts[free[0]])) if free else 0
        for group in free:
            if len(parts[group]) < 2 * wanted and not parts.keys() <= held | {group}:
                held.add(group)
                wanted -= len(parts[group])
        decided |= parts.keys()
    return [index for index, group in enumerate(groups) if group in held]


def choose_folds(rows: list[list[int]], ids: list[str], folds: int, split_seed: int, groups: Any) -> list[list[int]]:
    """The sorted indices of each fold. As `choose_held_out`, from the images that no fold before has held out."""
    rest, found = list(range(len(ids))), []
    for left in range(folds, 1, -1):
        some = groups and [groups[index] for index in rest]
        of_rest = [rows[i] for i in rest], [ids[i] for i in rest]
        found.append([rest[i] for i in choose_held_out(*of_rest, 1 / left, split_seed, groups=some)])
        rest = sorted(set(rest).difference(found[-1]))
    return [*found, rest]


def hold_out_by_seed(labels: list[int], fraction: float, seed: int) -> list[int]:
    """What a run with this seed held out before records had identities, if neither number nor order has changed."""
    count = max(int(np.ceil(fraction * len(labels))), len(set(labels)))
    if min(np.unique(labels, return_counts=True)[1]) < 2 or count > len(labels) - len(set(labels)):
        return []
    from sklearn.model_selection import train_test_split

    _, held = train_test_split(np.arange(len(labels)), test_size=count, stratify=labels, random_state=seed)
    return sorted(held.tolist())
