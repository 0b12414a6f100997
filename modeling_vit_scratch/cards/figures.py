# SPDX-License-Identifier: Apache-2.0
"""The figure of a training: its loss and its scores, step by step, as the Trainer has logged them."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..common.records import METRIC_TITLES, title_of


# Blue and orange of Okabe and Ito, which colour-blind people can tell apart, and more of theirs.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_MARKED_UP_TO = 60  # points of which each is marked


def draw_curves(history: list[dict[str, Any]], file: Path) -> bool:
    """
    Draws the losses and, beside them, the scores on held-out images.

    Args:
        history: `log_history` of the Trainer's state.
        file: .png to write; its folder is made.

    Returns:
        Whether there was anything to draw: a curve has two points.
    """
    # Training ends with a log of its runtime. An evaluation after that is of the weights that were kept, which may be
    # those of an earlier step.
    end = next((index for index, log in enumerate(history) if "train_runtime" in log), len(history))
    history = history[: end + 1]
    losses = {"training": _points(history, "loss"), "held-out images": _points(history, "eval_loss")}
    scores = {title_of(metric): _points(history, f"eval_{metric}") for metric in METRIC_TITLES}
    scores |= {
        name: _points(history, name) for name in sorted({key for log in history for key in log}) if _is_probe(name)
    }
    groups = [{name: points for name, points in group.items() if len(points) > 1} for group in (losses, scores)]
    groups = [(title, group) for title, group in zip(("loss", "score on held-out images"), groups) if group]
    if not groups:
        return False
    figure = Figure(figsize=(4.4 * len(groups), 3.2), layout="constrained")
    for axes, (title, group) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups):
        for number, (name, points) in enumerate(group.items()):
            marker = "." if len(points) <= _MARKED_UP_TO else None
            # Of curves that lie on one another, both are seen: later ones are thin and broken.
            style, width = ("-", 1.6) if number == 0 else ("--", 1.0)
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot(*zip(*points), style, color=colour, linewidth=width, marker=marker, markersize=4, label=name)
        axes.set(xlabel="step", title=title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.legend(fontsize=7, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    return True


def _is_probe(name: str) -> bool:
    return name.startswith("probe_")


def _points(history: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """Of each step the last value: a resumed run may have logged one twice."""
    return sorted({log["step"]: log[key] for log in history if key in log}.items())
