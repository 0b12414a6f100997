# SPDX-License-Identifier: Apache-2.0
"""The files of images: which can't be read, and some written out to try a model on."""

import os
from concurrent.futures import ThreadPoolExecutor

from tqdm.auto import tqdm

from ..common.errors import Problems
from ..image_decoding_vit_scratch import ImageDecodeError
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from .dataset import Examples


def check_files(splits: dict[str, Examples], problems: Problems) -> None:
    """Adds the images that can't be read to the problems."""
    reasons = list(find_broken(splits).values())
    if reasons:
        problems.add(
            f"{len(reasons)} of {sum(map(len, splits.values()))} images can't be read. Repair or remove them, or let "
            "others take the place of up to N in training with --verify_images False --max_broken_images N:"
            + listed_below(reasons)
        )


def listed_below(reasons: list[str]) -> str:
    """The first of them, each on a line, and how many more there are."""
    rest = f"\n       and {len(reasons) - 10} more" if len(reasons) > 10 else ""
    return "".join(f"\n       {reason}" for reason in reasons[:10]) + rest


def find_broken(splits: dict[str, Examples]) -> dict[tuple[str, int], str]:
    """
    Decodes every image, in threads: decoding does not hold Python's lock. Returns why some can't be read, by split and
    index.
    """
    decoder = ViTScratchImageProcessor()
    places = [(split, index) for split, examples in splits.items() for index in range(len(examples))]

    def broken(place: tuple[str, int]) -> str | None:
        split, index = place
        try:
            splits[split].decode(index, decoder)
        except (ImageDecodeError, ValueError) as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = list(tqdm(pool.map(broken, places), total=len(places), desc="checking images", unit="", leave=False))
    return {place: reason for place, reason in zip(places, reasons) if reason is not None}
