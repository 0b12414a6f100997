# SPDX-License-Identifier: Apache-2.0
"""
Copies of an image: a held-out image that is in the training set, too, is no test, and an image with two labels has a
wrong one. While all files are checked, the pixels tell which images are the same and which are nearly the same.

The same are those with equal files, or with equal sizes and pixels (of larger images 128 x 128 pixels on a grid). Near
copies are re-encoded or resized, or cropped by up to 2 % a side: a perceptual hash tells them, the mean colours and 255
low frequencies of the image in grey. It is compared for all pairs of about the same brightness. Of up to 2,000
images the hashes of ten parts of each are compared, too: they find most copies that are cropped by 5 %.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm.auto import tqdm

from ..common.flags import available_cores
from ..image_decoding_vit_scratch import ImageDecodeError, read_array
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from .dataset import Examples


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
) -> list[Look]:
    """Reads each image once, in threads. Without `decode`, only the identity is found. `num_channels`: of arrays."""
    decoder = ViTScratchImageProcessor()
    settings = {"do_convert_rgb": num_channels is not None, "input_data_format": "channels_last"}
    settings |= {"num_channels": num_channels or 3, "do_eight_bits": num_channels in (1, 3)}
    of_arrays = ViTScratchImageProcessor(**settings)

    def look(index: int) -> Look:
        (image,) = examples.stored([index])
        content = image.content
        with contextlib.suppress(OSError):  # decoding reports it
            if isinstance(content, str) and Path(content).is_file():  # a pipe would be waited for
                content = Path(content).read_bytes()
        # Where there is no file to read, as for a URL, the path counts.
        known = content if isinstance(content, bytes) else image.name.encode("utf-8", "surrogateescape")
        identity = hashlib.sha256(known).hexdigest()[:16]
        if not decode:
            return Look(identity)
        try:
            image = replace(image, content=content or image.content)
            if read_array(image.content) is not None:
                image.decode(of_arrays)
                return Look(identity)
            return Look(identity, None, *pixel_hashes(image.decode(decoder), with_parts))
        except (ImageDecodeError, ValueError) as error:
            return Look(identity, str(error))

    title = "checking images" if decode else "reading images"
    with ThreadPoolExecutor(available_cores()) as pool:  # reading, hashing and decoding do not hold Python's lock
        found = pool.map(look, range(len(examples)))
        return list(tqdm(found, total=len(examples), desc=title, unit="", leave=False, disable=None))


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
    """The pairs of near copies among perceptual hashes (N, 258), and those of the `parts` (N, 10, 255) if given."""
    brightness = hashes[:, :3].mean(axis=1, dtype=np.float32)
    order = np.argsort(brightness, kind="stable")
    brightness, colours, waves = brightness[order], hashes[order, :3].astype(np.float32), hashes[order, 3:]
    some = waves[:: max(1, len(waves) // 500)].astype(np.float32)
    limit, pairs = SIMILARITY, []
    if len(some) > 30:  # the lower half of the pairs tells how alike all images are: copies are in the upper one
        usual = np.arctanh(np.clip((some @ some.T)[np.triu_indices(len(some), 1)], -0.99, 0.99))
        low, quarter = np.quantile(usual, [0.05, 0.25])
        deviation = (quarter - low) / 0.97  # of a normal distribution, whose quartile is 0.674 below the mean
        limit = max(limit, float(np.tanh(quarter + (0.674 + DEVIATIONS) * deviation)))
    for first in range(0, len(waves), 1024):
        block = waves[first : first + 1024].astype(np.float32)
        brightest = brightness[first + len(block) - 1] + MAX_COLOUR_DIFFERENCE
        for start in range(first, int(np.searchsorted(brightness, brightest, "right")), 8192):
            others = waves[start : start + 8192].astype(np.float32)
            is_near = block @ others.T >= limit
            for part in range(0 if parts is None else parts.shape[1]):
                chosen = order[first : first + 1024], order[start : start + 8192]
                ours, theirs = (parts[one, part].astype(np.float32) for one in chosen)
                is_near |= (ours @ others.T >= limit) | (block @ theirs.T >= limit)
            rows, columns = np.nonzero(is_near)
            rows, columns = rows + first, columns + start
            alike = np.abs(colours[rows] - colours[columns]).max(axis=1, initial=0) <= MAX_COLOUR_DIFFERENCE
            chosen = (rows < columns) & alike
            pairs += np.sort(np.stack([order[rows[chosen]], order[columns[chosen]]], axis=1), axis=1).tolist()
    return sorted(map(tuple, pairs))


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
    with_parts = sum(map(len, parts)) <= MAX_WITH_PARTS
    looks = [look for examples in parts for look in look_at(examples, decode, with_parts, num_channels)]
    first: dict[str, int] = {}
    by_file = [first.setdefault(look.identity, index) for index, look in enumerate(looks)]
    same = [first.setdefault(looks[index].pixels or looks[index].identity, index) for index in by_file]
    hashed, near = [index for index, look in enumerate(looks) if same[index] == index and look.hash is not None], None
    if hashed:
        hashes = np.stack([looks[index].hash for index in hashed])
        cut = np.stack([looks[index].parts for index in hashed]) if with_parts else None
        near = [(hashed[a], hashed[b]) for a, b in near_pairs(hashes, cut)]
    broken = {index: look.broken for index, look in enumerate(looks) if look.broken is not None}
    return Copies([look.identity for look in looks], broken, same, near)


def identities(examples: Examples) -> list[str]:
    return [look.identity for look in look_at(examples, decode=False)]


def find_broken(examples: Examples) -> dict[int, str]:
    """Why images can't be read, by index: decodes all, in threads."""
    return {index: look.broken for index, look in enumerate(look_at(examples)) if look.broken is not None}


def listed_below(reasons: list[str]) -> str:
    rest = f"\n       and {len(reasons) - 10} more" if len(reasons) > 10 else ""
    return "".join(f"\n       {reason}" for reason in reasons[:10]) + rest
