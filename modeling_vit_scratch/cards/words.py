# SPDX-License-Identifier: Apache-2.0
"""How a card writes numbers, names and tables."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..common.metric_titles import NO_PERCENT


def count(number: int) -> str:
    """A number of things: 1,797."""
    return f"{number:,}"


def share(value: float) -> str:
    """Of one: 98.89 %."""
    return f"{100 * value:.2f} %"


def rough(value: float) -> str:
    """Two digits, of an estimate: 0.37, 1,200."""
    return f"{value:,.2g}" if value < 100 else f"{value:,.0f}"


def score(metric: str, value: float) -> str:
    """As people give this metric: most as a share."""
    return f"{value:.4f}" if metric in NO_PERCENT else share(value)


def setting(value: Any) -> str:
    """A value of a table of settings."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting, value))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return name(str(value))
    return count(value) if isinstance(value, int) else f"{value:g}"


def by(size: int | Sequence[int]) -> str:
    """Height and width: 224 x 224."""
    height, width = (size, size) if isinstance(size, int) else size
    return f"{height} x {width}"


def name(text: str) -> str:
    """A name from outside, with nothing in it that Markdown or HTML would read as theirs."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(text.split()))


def names(many: Sequence[str], limit: int = 10) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(map(name, many[:limit]))
    return shown + (f" and {count(len(many) - limit)} more" if len(many) > limit else "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: int = 1) -> str:
    """A table; columns from the index `right` on are numbers."""
    rule = ["---" if column < right else "---:" for column in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def paragraphs(*parts: str | None) -> str:
    """Joined by empty lines, without those that are empty."""
    return "\n\n".join(part for part in parts if part)


def picture(path: str, told: str, width: str | None = None) -> str:
    """A figure of the folder."""
    return f"![{told}]({path})" if width is None else f'<img src="{path}" alt="{told}" width="{width}">'
