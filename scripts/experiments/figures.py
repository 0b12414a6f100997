# SPDX-License-Identifier: Apache-2.0
"""The picture of a transfer table: bars of the means, with every seed as a point."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from modeling_vit_scratch.cards.values import (
    FINE_TUNED,
    PRETRAINED,
    SCRATCH,
    SHOWN_PROBES,
    find,
    gain_in_words,
    names_of,
)


_COLORS = {SCRATCH: "#999999", PRETRAINED: "#0072B2"}  # grey and blue, which colour-blind people can tell apart


def draw_transfer(record: dict[str, Any], file: Path) -> Path:
    """
    Draws transfer.json, one part for fine-tuning and one for each probe that the table shows, and returns the file.
    """
    names = names_of(record)
    hows = {cell["how"] for cell in record["cells"]}
    titles = {FINE_TUNED: "fine-tuned"} | {how: f"features: {words}" for how, words in SHOWN_PROBES.items()}
    titles = {how: title for how, title in titles.items() if how in hows}
    labels = {SCRATCH: "from scratch, or random weights", PRETRAINED: f"from {record['model']}"}
    figure = Figure(figsize=(1.2 + 2.4 * len(titles), 1.6 + 0.55 * len(names)), layout="constrained")
    grid = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for axes, (how, title) in zip(grid, titles.items()):
        for place, name in enumerate(names):
            row = find(record, name, how)
            for shift, start in ((-0.2, SCRATCH), (0.2, PRETRAINED)):
                if start not in row:
                    continue
                cell = row[start]
                label = labels[start] if axes is grid[0] and place == 0 else None
                axes.barh(place + shift, 100 * cell["mean"], 0.36, color=_COLORS[start], alpha=0.75, label=label)
                values = [100 * value for value in cell["values"]]
                spread = [place + shift + 0.08 * (i - (len(values) - 1) / 2) for i in range(len(values))]
                axes.plot(values, spread, "o", color="#222222", markersize=2.5)
            if len(row) == 2:
                highest = 100 * max(value for cell in row.values() for value in cell["values"])
                axes.text(highest + 2, place, gain_in_words(row), va="center", fontsize=8)
        axes.set_xlim(0, 118)
        axes.set_xticks(range(0, 101, 25))
        axes.set_yticks(range(len(names)), names)
        axes.set_title(title, loc="left", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].invert_yaxis()
    figure.supxlabel("held-out accuracy in %, each seed a point; the number is the gain in points", fontsize=8)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(file, dpi=150)
    return file
