# SPDX-License-Identifier: Apache-2.0
"""What of the page is HTML, and its style. Everything that comes from a model or a file's name is escaped."""

import base64
from html import escape


CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
.gradio-container .html-container { padding: 4px 0 !important; }
.heading h1 { font-size: 2rem; font-weight: 700; letter-spacing: -0.02em; line-height: 1.2; margin: 0 0 0.3rem;
  overflow-wrap: anywhere; }
.heading a { color: inherit; }
.heading p, .page-note { color: var(--body-text-color-subdued); margin: 0; overflow-wrap: anywhere; }
.page-note { margin: 0.6rem 0 0; max-width: 44rem; }
.page-title h2 { font-size: 1.25rem; font-weight: 700; margin: 0.6rem 0 0.1rem; }
.page-title p { color: var(--body-text-color-subdued); margin: 0; max-width: 50rem; }
.bars { list-style: none; margin: 0; padding: 0; display: grid; gap: 0.8rem; }
.bars li { display: grid; grid-template-columns: 1fr auto; gap: 0.25rem 1rem; margin: 0; align-items: baseline; }
.bars .label { overflow-wrap: anywhere; min-width: 0; }
.bars .score, .photos .score { font-variant-numeric: tabular-nums; color: var(--body-text-color-subdued); }
.track { height: 0.55rem; border-radius: 1rem; background: var(--border-color-primary); overflow: hidden; }
.bars .track { grid-column: 1 / -1; }
.fill { height: 100%; border-radius: 1rem; background: var(--neutral-400); }
.bars li:first-child .label, .bars li:first-child .score { font-size: 1.6rem; font-weight: 700; line-height: 1.25;
  color: var(--body-text-color); }
.bars li:first-child .track { height: 0.8rem; }
.bars li:first-child .fill, .photos .fill { background: var(--color-accent); }
.scale { display: flex; gap: 0.6rem; align-items: center; margin-top: 0.6rem; font-size: 0.85rem;
  color: var(--body-text-color-subdued); }
.scale .colours { flex: 0 1 10rem; height: 0.6rem; border-radius: 1rem; background: linear-gradient(90deg, #1c1044,
  #4f127b, #812581, #b5367a, #e55064, #fb8761, #fec287, #fcfdbf); }
.problem { border-left: 4px solid #dc2626; padding: 0.8rem 1rem; border-radius: 0.4rem; overflow-wrap: anywhere;
  background: color-mix(in srgb, #dc2626 12%, transparent); }
.steps { margin: 0.4rem 0 0; padding: 0; list-style: none; display: grid; gap: 0.8rem; }
.steps li { margin: 0; color: var(--body-text-color-subdued); }
.steps b { color: var(--body-text-color); display: block; }
.photos { width: 100%; border-collapse: collapse; margin-top: 0.8rem; border: 0 !important; }
.photos th { text-align: left; font-weight: 600; color: var(--body-text-color-subdued); font-size: 0.85rem; }
.photos th, .photos td { padding: 0.5rem 0.7rem; border: 0; border-bottom: 1px solid var(--border-color-primary);
  vertical-align: middle; overflow-wrap: anywhere; }
.photos tr { background: none; border: 0 !important; }
.photos .picture { width: 72px; }
.photos img { width: 56px; height: 56px; object-fit: cover; border-radius: 0.4rem; margin: 0; display: block; }
.photos .best { width: 34%; }
.photos .best div { display: flex; gap: 0.8rem; justify-content: space-between; font-weight: 600; }
.photos .best .track { margin-top: 0.25rem; height: 0.45rem; }
.photos .others { color: var(--body-text-color-subdued); font-size: 0.9rem; }
.photos .broken { color: #dc2626; }
.dark .photos .broken { color: #f87171; }
.table-head { display: flex; gap: 0.8rem 1.5rem; align-items: center; justify-content: space-between; flex-wrap: wrap; }
.table-head p { margin: 0; }
a.download { background: var(--color-accent); color: #fff !important; padding: 0.5rem 1.1rem; border-radius: 0.5rem;
  text-decoration: none; font-weight: 600; white-space: nowrap; }
a.download:focus-visible { outline: 3px solid var(--color-accent-soft); outline-offset: 2px; }
@media (max-width: 640px) {
  .photos thead { display: none; }
  .photos tr { display: grid; grid-template-columns: 72px 1fr; padding: 0.5rem 0;
    border-bottom: 1px solid var(--border-color-primary) !important; }
  .photos td { border: 0; padding: 0.15rem 0.4rem; }
  .photos .picture { grid-row: 1 / 4; }
  .photos .best, .photos .others, .photos .name, .photos .broken { grid-column: 2; width: auto; }
  .photos .name { font-size: 0.85rem; color: var(--body-text-color-subdued); }
}
"""


def heading(name: str, facts: list[str], link: str | None = None) -> str:
    """The model's name and what it is."""
    title = f'<a href="{escape(link)}" target="_blank" rel="noopener">{escape(name)}</a>' if link else escape(name)
    return f'<header class="heading"><h1>{title}</h1><p>{escape(" · ".join(facts))}</p></header>'


def title(text: str, explanation: str) -> str:
    """Of a part of the page."""
    return f'<div class="page-title"><h2>{escape(text)}</h2><p>{escape(explanation)}</p></div>'


def welcome(steps: list[tuple[str, str]]) -> str:
    """What the page does, before there is a photo."""
    return f'<ul class="steps">{"".join(f"<li><b>{escape(a)}</b>{escape(b)}</li>" for a, b in steps)}</ul>'


def number(score: float, is_probability: bool) -> str:
    """A score for people."""
    return f"{score:.1%}" if is_probability else f"{score:.4g}"


def track(score: float, is_probability: bool) -> str:
    """A bar; of a number that is no probability, none."""
    if not is_probability:
        return ""
    width = f"{min(max(score, 0.0), 1.0):.2%}"
    return f'<div class="track" aria-hidden="true"><div class="fill" style="width: {width}"></div></div>'


def bars(scores: list[tuple[str, float]], is_probability: bool = True) -> str:
    """Classes, as a list that a screen reader reads and bars that the eye does."""
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
    """What the colours of a map mean: `most`, the brightest, in parts of the mean patch."""
    label = f"Colours from no weight to {most:.1f} times the mean patch"
    return (
        f'<div class="scale" role="img" aria-label="{label}"><span>0</span><span class="colours"></span>'
        f"<span>{most:.1f} × the mean patch</span></div>"
    )


def problem(text: str) -> str:
    """What went wrong, which a screen reader says at once."""
    return f'<div class="problem" role="alert">{escape(text)}</div>'


def table(rows: list[tuple[str, str, list[tuple[str, float]] | str]], is_probability: bool, csv: str, file: str) -> str:
    """
    Photos and their classes.

    Args:
        rows: name, picture as a data: URI, and scores, or what is wrong with the photo.
        is_probability: of the scores.
        csv: the table as text, to download.
        file: its name.
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
