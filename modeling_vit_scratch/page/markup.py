# SPDX-License-Identifier: Apache-2.0
"""The HTML of the page. Everything that comes from a model or from the name of a file is escaped."""

import base64
from html import escape
from pathlib import Path


CSS = Path(__file__).with_name("style.css").read_text(encoding="utf-8")


def heading(name: str, details: list[str], link: str | None = None) -> str:
    """The name of the model, and details."""
    title = f'<a href="{escape(link)}" target="_blank" rel="noopener">{escape(name)}</a>' if link else escape(name)
    return f'<header class="heading"><h1>{title}</h1><p>{escape(" · ".join(details))}</p></header>'


def title(text: str, explanation: str) -> str:
    """The title of a part of the page."""
    return f'<div class="page-title"><h2>{escape(text)}</h2><p>{escape(explanation)}</p></div>'


def welcome(steps: list[tuple[str, str]]) -> str:
    """The empty page: a list of titles and explanations."""
    return f'<ul class="steps">{"".join(f"<li><b>{escape(a)}</b>{escape(b)}</li>" for a, b in steps)}</ul>'


def number(score: float, is_probability: bool) -> str:
    """A score for people."""
    return f"{score:.1%}" if is_probability else f"{score:.4g}"


def track(score: float, is_probability: bool) -> str:
    """A bar for a probability."""
    if not is_probability:
        return ""
    width = f"{min(max(score, 0.0), 1.0):.2%}"
    return f'<div class="track" aria-hidden="true"><div class="fill" style="width: {width}"></div></div>'


def bars(scores: list[tuple[str, float]], is_probability: bool = True) -> str:
    """Classes and scores, as a list with bars."""
    rows = "".join(
        f'<li><span class="label">{escape(label)}</span> <span class="score">{number(score, is_probability)}</span>'
        f"{track(score, is_probability)}</li>"
        for label, score in scores
    )
    return f'<ol class="bars" aria-label="Classes, the most likely first">{rows}</ol>'


def note(text: str) -> str:
    """A line of explanation."""
    return f'<p class="page-note">{escape(text)}</p>'


def scale(most: float) -> str:
    """The colours of a map up to `most`, relative to the mean patch."""
    label = f"Colours from no weight to {most:.1f} times the mean patch"
    return (
        f'<div class="scale" role="img" aria-label="{label}"><span>0</span><span class="colours"></span>'
        f"<span>{most:.1f} × the mean patch</span></div>"
    )


def problem(text: str) -> str:
    """A message that screen readers announce."""
    return f'<div class="problem" role="alert">{escape(text)}</div>'


def table(rows: list[tuple[str, str, list[tuple[str, float]] | str]], is_probability: bool, csv: str, file: str) -> str:
    """
    Photos and their classes, with a download.

    Args:
        rows: name, picture as a data: URI, and scores, or the reason why there are none.
        is_probability: whether the scores are probabilities.
        csv, file: content and name of the download.
    """
    broken = sum(isinstance(scores, str) for _, _, scores in rows)
    count = f"{len(rows)} photo{'s' * (len(rows) != 1)}" + (f", {broken} of them can't be read" if broken else "")
    link = f"data:text/csv;charset=utf-8;base64,{base64.b64encode(csv.encode()).decode()}"
    head = "".join(f'<th scope="col">{text}</th>' for text in ("Photo", "Name", "Class", "Then"))
    body = "".join(_row(name, picture, scores, is_probability) for name, picture, scores in rows)
    return (
        f'<div class="table-head"><p role="status">{count}</p>'
        f'<a class="download" href="{link}" download="{escape(file)}">Download as CSV</a></div>'
        f'<table class="photos"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    )


def _row(name: str, picture: str, scores: list[tuple[str, float]] | str, is_probability: bool) -> str:
    if isinstance(scores, str):
        return (
            f'<tr><td class="picture"></td><td class="name">{escape(name)}</td>'
            f'<td class="broken" colspan="2">{escape(scores)}</td></tr>'
        )
    (label, score), *others = scores
    rest = ", ".join(f"{escape(other)} {number(value, is_probability)}" for other, value in others)
    return (
        f'<tr><td class="picture"><img src="{picture}" alt=""></td><td class="name">{escape(name)}</td>'
        f'<td class="best"><div><span>{escape(label)}</span><span class="score">{number(score, is_probability)}</span>'
        f'</div>{track(score, is_probability)}</td><td class="others">{rest}</td></tr>'
    )
