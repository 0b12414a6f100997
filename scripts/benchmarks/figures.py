# SPDX-License-Identifier: Apache-2.0
"""The picture of a benchmark: images per second of everybody, with the quartiles over the rounds."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.timing import OURS


_OURS, _THEIRS = "#0072B2", "#999999"  # blue and grey, which colour-blind people can tell apart


def draw_benchmark(record: dict[str, Any], file: Path) -> Path:
    """
    Draws a record of scripts/benchmark.py, one part for each set of photos or batch size, and returns the file.
    """
    if "sets" in record:
        parts = record["sets"]
    else:
        what = "{task}, {variant}, {image_size} pixels, {dtype}, {device}".format(**record["benchmark"])
        parts = {f"{what}, batch {size}": batch for size, batch in record["batches"].items()}
    rows = max(len(part["summary"]) for part in parts.values())
    figure = Figure(figsize=(7.5, 0.9 * len(parts) + 0.32 * rows * len(parts) + 0.4), layout="constrained")
    for axes, (title, part) in zip(np.atleast_1d(figure.subplots(len(parts), 1)), parts.items()):
        names = list(part["summary"])[::-1]
        # From the seconds of a round to images per second: the median round's rate gives the number of images.
        rates = [part["summary"][name]["images_per_second"] for name in names]
        medians = [np.median(part["seconds"][name]) for name in names]
        spread = [
            np.abs(rate * median / np.percentile(part["seconds"][name], [75, 25]) - rate)
            for name, rate, median in zip(names, rates, medians)
        ]
        axes.barh(names, rates, xerr=np.transpose(spread), height=0.7, ecolor="#333333",
                  color=[_OURS if name.startswith(OURS) else _THEIRS for name in names])  # fmt: skip
        for place, (name, rate, error) in enumerate(zip(names, rates, spread)):
            faster, told = part["summary"][name]["times_faster"], f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
            if name != OURS:  # of ours done otherwise, how many times faster it is; of others, how many times ours is
                told += f"  ({1 / faster:.2f} x)" if name.startswith(OURS) else f"  (ours: {faster:.2f} x)"
            axes.text(rate + error[1] + 0.01 * max(rates), place, told, va="center", fontsize=8)
        axes.set_xlim(0, 1.4 * max(rate + error[1] for rate, error in zip(rates, spread)))
        axes.set_title(title, loc="left", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(f"{record.get('item', 'image')}s per second: median and quartiles of the rounds", fontsize=8)
    figure.savefig(file, dpi=150)
    return file
