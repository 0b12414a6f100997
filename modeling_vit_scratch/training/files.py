# SPDX-License-Identifier: Apache-2.0
"""The files of images: which can't be read, and some written out to try a model on."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from ..image_processing_vit_scratch import ImageDecodeError, ViTScratchImageProcessor
from .errors import Problems


if TYPE_CHECKING:
    from .data import ImageData
    from .examples import Examples


def check_files(splits: dict[str, "Examples"], problems: Problems) -> None:
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


def find_broken(splits: dict[str, "Examples"]) -> dict[tuple[str, int], str]:
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


def export_examples(data: "ImageData", folder: str | None, maximum: int = 10) -> Path | None:
    """
    Writes held-out images, spread over the whole split, as INDEX_LABEL.png.

    Returns:
        The first file; None if no folder is wanted.
    """
    if folder is None:
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    decoder, count = ViTScratchImageProcessor(num_channels=data.source.num_channels), len(data.validation)
    indices = np.unique(np.linspace(0, count - 1, min(maximum, count)).round().astype(int)).tolist()
    files = []
    for index in indices:
        labels = data.validation.labels[index]
        labels = np.flatnonzero(labels).tolist() if isinstance(labels, np.ndarray) else [labels]
        label = re.sub(r"[^\w.+-]+", "-", "+".join(data.label_names[one] for one in labels) or "none")[:100]
        files.append(Path(folder, f"{index}_{label}.png"))
        data.validation.decode(index, decoder).save(files[-1])
    return files[0]
