# SPDX-License-Identifier: Apache-2.0
"""
Copies of an image: a held-out image that is in the training set, too, is no test, and an image with two labels has a
wrong one. While all files are checked, the pixels tell which images are the same and which are nearly the same.

The same are those with equal files, or with equal sizes and pixels (of larger images 128 x 128 pixels on a grid). Near
copies are re-encoded or resized, or cropped by up to 2 % a side: a perceptual hash tells them, the mean colours and 255
low frequencies of the image in grey. It is compared for all pairs of about the same brightness. Of up to 2,000
images the hashes of ten parts of each are compared, too: they find most copies that are cropped by 5 %.

`ImagesOfBothSides` says what must not be on both sides of a split: the same image, a near copy of it, its group.
"""

import contextlib
import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..common.errors import Problems, take_in_hand
from ..common.flags import DataArguments, LabelFlags, available_cores
from ..image_decoding_vit_scratch import ImageDecodeError, read_array
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from .collation import prepare_workers
from .dataset import Examples, StoredImage
from .held_out import Earlier


GRID, SIDE, FREQUENCIES = 128, 32, 16  # smaller images than SIDE have no detail that could tell them apart
# Near copies are as similar as this (a cosine) at least. Of 4.7 million pairs of different photos none was.
SIMILARITY = 0.9
# In data where all images look alike: as many standard deviations above the similarity of most pairs.
DEVIATIONS = 9.0
MAX_COLOUR_DIFFERENCE = 16.0  # of 255, in each channel
MAX_WITH_PARTS = 2_000  # images whose parts are compared, too: that is twenty times the work


def _cosines(start: float, width: float, count: int) -> np.ndarray:
    """The lowest frequencies on `count` pixels of which a part is seen, from 0 to 1: (FREQUENCIES, count)."""
    place = ((np.arange(count) + 0.5) / count - start) / width
    waves = np.cos(np.pi * np.outer(np.arange(FREQUENCIES), place)) * (np.abs(place - 0.5) <= 0.5)
    waves[0] /= np.sqrt(2.0)
    return waves.astype(np.float32)


_DCT = _cosines(0.0, 1.0, SIDE)
# Parts with 95 % of height and width, at nine places, and with 90 % in the middle.
_PARTS = np.concatenate([_cosines(*part, GRID) for part in ((0.0, 0.95), (0.025, 0.95), (0.05, 0.95), (0.05, 0.9))])
_PLACES = [(row, column) for row in range(3) for column in range(3)] + [(3, 3)]


class Look(NamedTuple):
    """What a look at an image tells."""

    identity: str  # see `held_out`
    broken: str | None = None  # why it can't be decoded
    pixels: str | None = None  # equal for equal pixels
    hash: np.ndarray | None = None  # (258,) float16: the mean colours, and 255 numbers of length 1
    parts: np.ndarray | None = None  # (10, 255) float16: those of its parts


def look_at(
    examples: Examples, decode: bool = True, with_parts: bool = False, num_channels: int | None = None
) -> Iterator[Look]:
    """
    Reads each image once, in their order. Without `decode`, only the identity is found. `num_channels`: of arrays. In
    processes, as many as there are cores: threads would wait for each other, for Python's lock.
    """
    settings = {"do_convert_rgb": num_channels is not None, "input_data_format": "channels_last"}
    settings |= {"num_channels": num_channels or 3, "do_eight_bits": num_channels in (1, 3)}
    decoders = (ViTScratchImageProcessor(), ViTScratchImageProcessor(**settings)) if decode else None
    look, workers = partial(_look_at, examples, decoders, with_parts), min(8, available_cores(), len(examples) // 50)
    # One process would not be faster than this one, and to start some takes as long as fifty small images.
    loader = DataLoader(
        range(len(examples)), 16, num_workers=workers if workers > 1 else 0, collate_fn=look,
        generator=torch.Generator(),  # of its own: a loader draws a seed
    )  # fmt: skip
    prepare_workers(loader)
    title = "checking images" if decode else "reading images"
    looks = itertools.chain.from_iterable(loader)
    return iter(tqdm(looks, total=len(examples), desc=title, unit="", leave=False, disable=None))


def _look_at(
    examples: Examples, decoders: tuple[ViTScratchImageProcessor, ...] | None, with_parts: bool, indices: list[int]
) -> list[Look]:
    """`decoders`: that of photos and that of arrays."""
    looks = []
    for image in examples.stored(indices):
        take_in_hand(image.name)
        content = image.content
        with contextlib.suppress(OSError):  # decoding reports it
            if isinstance(content, str) and Path(content).is_file():  # a pipe would be waited for
                content = Path(content).read_bytes()
        # Where there is no file to read, as for a URL, the path counts.
        known = content if isinstance(content, bytes) else image.name.encode("utf-8", "surrogateescape")
        look = Look(hashlib.sha256(known).hexdigest()[:16])
        try:
            image = replace(image, content=content or image.content)
            if decoders and read_array(image.content) is not None:
                image.decode(decoders[1])
            elif decoders:
                look = Look(look.identity, None, *pixel_hashes(image.decode(decoders[0]), with_parts))
        except (ImageDecodeError, ValueError) as error:
            look = Look(look.identity, str(error))
        looks.append(look)
    return looks


def pixel_hashes(image: Image.Image, with_parts: bool = False) -> tuple[str, np.ndarray | None, np.ndarray | None]:
    """Of an RGB image: a hash of its pixels, and the perceptual hashes, if it is not too small for that."""
    size = image.size
    if max(size) > GRID:
        image = image.resize((GRID, GRID), Image.Resampling.NEAREST)
    pixels = hashlib.sha256(b"%d %d " % size + image.tobytes()).hexdigest()[:16]
    if min(size) < SIDE:
        return pixels, None, None
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)  # (32, 32, 3)
    grey = np.float32([0.299, 0.587, 0.114])
    hashed, parts = np.concatenate([small.mean(axis=(0, 1)), _unit(_DCT @ (small @ grey) @ _DCT.T)]), None
    if with_parts:
        fine = np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX).convert("L"), dtype=np.float32)
        waves = (_PARTS @ fine @ _PARTS.T).reshape(4, FREQUENCIES, 4, FREQUENCIES)
        parts = np.stack([_unit(waves[row, :, column]) for row, column in _PLACES]).astype(np.float16)
    return pixels, hashed.astype(np.float16), parts


def _unit(waves: np.ndarray) -> np.ndarray:
    waves = waves.ravel()[1:]
    waves = np.sign(waves) * np.sqrt(np.abs(waves))  # or the largest few would decide
    return waves / max(np.linalg.norm(waves), 1.0)


def near_pairs(hashes: np.ndarray, parts: np.ndarray | None = None) -> list[tuple[int, int]]:
    """
    The pairs of near copies among perceptual hashes (N, 258), and those of the `parts` (N, 10, 255) if given. Blocks
    whose colours may be near are compared, first in short: that tells most images apart, and misses no pair.
    """
    brightness = hashes[:, :3].mean(axis=1, dtype=np.float32)
    some = np.argsort(brightness, kind="stable")[:: max(1, len(hashes) // 500)]
    some = hashes[some, 3:].astype(np.float32)
    limit, pairs = SIMILARITY, set()
    if len(some) > 30:  # the lower half of the pairs tells how alike all images are: copies are in the upper one
        usual = np.arctanh(np.clip((some @ some.T)[np.triu_indices(len(some), 1)], -0.99, 0.99))
        low, quarter = np.quantile(usual, [0.05, 0.25])
        deviation = (quarter - low) / 0.97  # of a normal distribution, whose quartile is 0.674 below the mean
        limit = max(limit, float(np.tanh(quarter + (0.674 + DEVIATIONS) * deviation)))
    colours, short = hashes[:, :3].astype(np.float32), None
    if parts is None:
        axes = np.linalg.eigh(some.T @ some)[1][:, :-32:-1]  # the 31 along which images vary most
        steps = (hashes[first : first + 4096, 3:] for first in range(0, len(hashes), 4096))
        short = np.concatenate([_shortened(waves, axes) for waves in steps])
    # Images of like colours, in blocks with bounds.
    blocks = np.array_split(np.lexsort((colours // MAX_COLOUR_DIFFERENCE).T), math.ceil(len(colours) / 512))
    lowest, highest = (np.stack([bound(colours[block], axis=0) for block in blocks]) for bound in (np.min, np.max))
    for number, ours in enumerate(blocks):
        gaps = np.maximum(lowest[number:] - highest[number], lowest[number] - highest[number:])
        close = number + np.flatnonzero((gaps <= MAX_COLOUR_DIFFERENCE).all(axis=1))
        for start in range(0, len(close), 16):
            rows, columns = ours, np.concatenate([blocks[index] for index in close[start : start + 16]])
            if short is not None:
                may_be = np.flatnonzero(short[rows] @ short[columns].T >= limit - 0.001)
                rows, columns = rows[np.unique(may_be // len(columns))], columns[np.unique(may_be % len(columns))]
            one, other = (hashes[chosen, 3:].astype(np.float32) for chosen in (rows, columns))
            is_near = one @ other.T >= limit
            for part in range(0 if parts is None else parts.shape[1]):
                cut, other_cut = (parts[chosen, part].astype(np.float32) for chosen in (rows, columns))
                is_near |= (cut @ other.T >= limit) | (one @ other_cut.T >= limit)
            first, second = (chosen[found] for chosen, found in zip((rows, columns), np.nonzero(is_near)))
            alike = np.abs(colours[first] - colours[second]).max(axis=1, initial=0) <= MAX_COLOUR_DIFFERENCE
            found = np.sort(np.stack([first, second], axis=1)[alike & (first != second)], axis=1)
            pairs.update(map(tuple, found.tolist()))
    return sorted(pairs)


def _shortened(waves: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """
    (N, A + 1): the numbers (N, 255) along orthonormal axes (255, A), and the length of the rest. The products of these
    are never below those of the numbers (Cauchy-Schwarz).
    """
    waves = waves.astype(np.float32)
    along = waves @ axes
    rest = (waves**2).sum(axis=1) - (along**2).sum(axis=1)
    return np.column_stack([along, np.sqrt(rest.clip(0))])


@dataclass(frozen=True)
class Copies:
    """What was found of N images."""

    ids: list[str]
    broken: dict[int, str]
    same: list[int]  # the first image that this one is the same as: itself, if there is none
    near: list[tuple[int, int]] | None  # pairs of such first images; None if they were not looked for

    def groups(self, *more: Sequence[Any]) -> list[int]:
        """Numbers of groups: copies, near copies, and images with an equal value in `more` (not None) are in one."""
        edges, count = [*enumerate(self.same), *(self.near or [])], len(self.ids)
        for values in more:
            first: dict[Any, int] = {}
            edges += [(index, first.setdefault(one, index)) for index, one in enumerate(values) if one is not None]
        rows, columns = zip(*edges)
        graph = coo_array((np.ones(len(edges), dtype=bool), (rows, columns)), shape=(count, count))
        return connected_components(graph, directed=False)[1].tolist()

    def across(self, train: Sequence[int], held_out: Sequence[int]) -> tuple[dict[int, int], dict[int, int]]:
        """The held-out images that are in the training part, and those with a near copy there, each with one of it."""
        there = {self.same[index]: index for index in reversed(train)}
        nearby: dict[int, int] = {}
        for one, other in self.near or []:
            nearby.update({a: there[b] for a, b in ((one, other), (other, one)) if b in there and a not in nearby})
        exact = {index: there[self.same[index]] for index in held_out if self.same[index] in there}
        near = {i: nearby[self.same[i]] for i in held_out if i not in exact and self.same[i] in nearby}
        return exact, near

    def with_two_labels(self, labels: Sequence[Any]) -> dict[int, int]:
        """The images whose copy has another label, each with that copy."""
        pairs = [(index, first) for index, first in enumerate(self.same) if index != first]
        found = {index: first for index, first in pairs if np.any(labels[index] != labels[first])}
        return found | {first: index for index, first in reversed(found.items())}


def find_copies(parts: Sequence[Examples], decode: bool = True, num_channels: int | None = None) -> Copies:
    """The copies among the images of all parts, in their order. Without `decode`, only equal files are found."""
    count = sum(map(len, parts))
    with_parts = count <= MAX_WITH_PARTS
    ids, broken, same, hashed, cut, first = [], {}, [], [], [], {}
    hashes = np.empty((count, 258), dtype=np.float16)  # in one piece, which goes back to the system
    looks = (look for examples in parts for look in look_at(examples, decode, with_parts, num_channels))
    for index, look in enumerate(looks):
        ids.append(look.identity)
        by_file = first.setdefault(look.identity, index)
        same.append(first.setdefault(look.pixels or look.identity, index) if by_file == index else same[by_file])
        if look.broken is not None:
            broken[index] = look.broken
        if same[index] == index and look.hash is not None:
            hashes[len(hashed)] = look.hash
            hashed.append(index)
            cut.append(look.parts)
    pairs = near_pairs(hashes[: len(hashed)], np.stack(cut) if with_parts else None) if hashed else None
    return Copies(ids, broken, same, pairs and [(hashed[a], hashed[b]) for a, b in pairs])


def identities(examples: Examples) -> list[str]:
    return [look.identity for look in look_at(examples, decode=False)]


def find_broken(examples: Examples) -> dict[int, str]:
    """Why images can't be read, by index: decodes all."""
    return {index: look.broken for index, look in enumerate(look_at(examples)) if look.broken is not None}


def listed_below(reasons: list[str]) -> str:
    rest = f"\n       and {len(reasons) - 10} more" if len(reasons) > 10 else ""
    return "".join(f"\n       {reason}" for reason in reasons[:10]) + rest


# --- Both sides of a split --------------------------------------------------------------------------------------------


MAX_PAIRS, MAX_PAIRS_IN_SHEET = 100, 24  # of near copies in a record
_TILE = 300  # pixels of an image in the sheet of near copies


def read_groups(
    dataset: datasets.Dataset, images: datasets.Dataset, arguments: LabelFlags, split: str, problems: Problems
) -> list[Any] | None:
    """The group of each image, from --group_column_name or --group_from; None if that can't be read."""
    column, pattern = arguments.group_column_name, arguments.group_from
    if column in dataset.column_names:
        return list(dataset[column])
    if column is not None:
        names = ", ".join(map(repr, dataset.column_names))
        problems.add(f"--group_column_name {column}: the {split} split has no such column. Its columns: {names}.")
        return None
    try:
        expression = re.compile(pattern)
    except re.error as error:
        problems.add(f"--group_from {pattern!r} is no regular expression: {error}.")
        return None
    paths = [str((row or {}).get("path")) for row in images["image"]]
    matches = [expression.search(path.replace("\\", "/")) for path in paths]
    if missing := [path for path, match in zip(paths, matches) if match is None]:
        problems.add(
            f"--group_from {pattern!r} matches {len(paths) - len(missing)} of the {len(paths)} paths of the {split} "
            f"split; not, for example, {missing[0]}. Let it match all."
        )
    return [match and (match.groups() or match[0]) for match in matches]


@dataclass(frozen=True)
class ImagesOfBothSides:
    """All images of a run, numbered: those of the training split, then those of a validation split of its own."""

    parts: Sequence[Examples]
    copies: Copies | None  # None if no image was looked at
    groups: list[Any]  # of each image; [] if there are none
    label_names: list[str]
    arguments: DataArguments
    problems: Problems

    @property
    def labels(self) -> list[Any]:
        return [label for part in self.parts for label in part.labels]

    def image(self, index: int) -> StoredImage:
        first = len(self.parts[0])
        part, index = (self.parts[0], index) if index < first else (self.parts[1], index - first)
        return part.stored([index])[0]

    def with_two_labels(self) -> set[int]:
        """The images to leave out because a copy has another label. That there are any is a problem without flags."""
        found = {} if self.copies is None or self.arguments.allow_overlap else self.copies.with_two_labels(self.labels)
        if not found or self.arguments.drop_overlap:
            return set(found)
        pairs = {index: other for index, other in found.items() if other < index}
        self._refuse(f"{len(found)} images are there with two different labels. Correct these", pairs)
        return set()

    def kept_together(self, earlier: Earlier | None) -> list[int] | None:
        """The groups of images that are on one side; None where only equal files are. A resumed run is as it was."""
        is_same_run = earlier is not None and earlier.is_same_run
        if self.arguments.allow_overlap or (is_same_run and not self.groups):
            return None
        return self.copies.groups(self.groups)

    def compare(
        self, train: list[int], held_out: list[int], is_given: bool
    ) -> tuple[list[int], dict[str, Any], list[tuple[StoredImage, StoredImage]]]:
        """
        The training images to keep, the record of what is on both sides, and pairs of near copies. What is on both
        sides of a given split is a problem without flags.
        """
        arguments, copies = self.arguments, self.copies
        start = "Whether held-out images are in the training set is not known"
        if arguments.streaming:
            return train, {"sentence": f"{start}: a stream is not read before training."}, []
        if copies is None:
            return train, {"sentence": f"{start}: no file was read before training (--verify_images False)."}, []
        groups = self.groups if len(self.groups) == len(copies.ids) else [None] * len(copies.ids)
        of_held_out = {groups[index] for index in held_out} - {None}
        if is_given and arguments.drop_overlap:
            exact, near = copies.across(held_out, train)
            train = [i for i in train if i not in exact | near and groups[i] not in of_held_out]
        exact, near = copies.across(train, held_out)
        if is_given and not arguments.allow_overlap:
            if exact:
                self._refuse(f"{len(exact)} of the {len(held_out)} held-out images are training images, too", exact)
            if both := of_held_out.intersection(groups[index] for index in train):
                names = ", ".join(sorted(map(str, both))[:10])
                self.problems.add(f"{len(both)} groups are on both sides, e.g. {names}. {_WAY_OUT}.")
        count = f"{len(exact):,} of {len(held_out):,} held-out images are in the training set"
        known = "near copies were not looked for" if copies.near is None else f"{len(near):,} near copies"
        pairs = [tuple(map(self.image, pair)) for pair in list(near.items())[:MAX_PAIRS]]
        record = {
            "sentence": f"{count}, {known}.{' Their score is too high.' if exact else ''}",
            "in_training": len(exact),
            "near_copies": None if copies.near is None else len(near),
            "near_pairs": [["/".join(image.name.split("/")[-2:]) for image in pair] for pair in pairs],
        }
        return train, record, pairs

    def check_files(self, used: list[int]) -> None:
        """Adds the images that can't be read to the problems."""
        if self.copies and (reasons := [self.copies.broken[index] for index in used if index in self.copies.broken]):
            self.problems.add(
                f"{len(reasons)} of {len(used)} images can't be read. Repair or remove them, or let others take the "
                "place of up to N in training with --verify_images False --max_broken_images N:" + listed_below(reasons)
            )

    def _refuse(self, what: str, pairs: dict[int, int]) -> None:
        labels = self.labels

        def named(index: int) -> str:
            if isinstance(labels[index], float):
                return f"{self.image(index).name} ({labels[index]:g})"
            own = np.flatnonzero(labels[index]) if isinstance(labels[index], np.ndarray) else [labels[index]]
            return f"{self.image(index).name} ({', '.join(self.label_names[one] for one in own) or 'no label'})"

        names = [f"{named(index)} is {named(other)}" for index, other in pairs.items()]
        self.problems.add(f"{what}. {_WAY_OUT}:{listed_below(names)}")


_WAY_OUT = (
    "Leave what is on both sides, or has two labels, out of training with --drop_overlap, or accept it with "
    "--allow_overlap"
)


def draw_near_copies(pairs: list[tuple[StoredImage, StoredImage]], folder: str) -> list[str]:
    """Draws held-out images beside the training images that they look like, if there are any. A line for the user."""
    if not pairs:
        return []
    decoder, shown, file = ViTScratchImageProcessor(), pairs[:MAX_PAIRS_IN_SHEET], Path(folder, "near_copies.png")
    sheet = Image.new("RGB", (2 * _TILE, (_TILE + 16) * len(shown)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, pair in enumerate(shown):
        for column, (part, image) in enumerate(zip(("held out", "training"), pair)):
            left, top = column * _TILE, number * (_TILE + 16)
            name = Path(image.name).name.encode("ascii", "replace").decode()  # what Pillow's own font has
            draw.text((left + 4, top + 2), f"{part}: {name}", fill="black")
            sheet.paste(ImageOps.contain(image.decode(decoder), (_TILE - 4, _TILE - 4)), (left, top + 16))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
    return [f"Look at {len(shown)} of {len(pairs)} near copies: {file}"]
