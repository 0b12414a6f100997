# SPDX-License-Identifier: Apache-2.0
"""What of the page is HTML, and its style. Everything that comes from a model or a file name is escaped."""

from html import escape


CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.heading h1 { font-size: 1.9rem; font-weight: 700; letter-spacing: -0.02em; margin: 0 0 0.2rem;
  overflow-wrap: anywhere; }
.heading p { color: var(--body-text-color-subdued); margin: 0; }
.bars { list-style: none; margin: 0; padding: 0; display: grid; gap: 0.7rem; }
.bars li { display: grid; grid-template-columns: 1fr auto; gap: 0.25rem 1rem; margin: 0; }
.bars .label { overflow-wrap: anywhere; min-width: 0; }
.bars .score { font-variant-numeric: tabular-nums; color: var(--body-text-color-subdued); }
.bars .track { grid-column: 1 / -1; height: 0.55rem; border-radius: 1rem; background: var(--border-color-primary); }
.bars .fill { height: 100%; border-radius: 1rem; background: var(--neutral-400); }
.bars li:first-child .label { font-size: 1.5rem; font-weight: 700; line-height: 1.25; }
.bars li:first-child .score { font-size: 1.5rem; font-weight: 700; color: var(--body-text-color); line-height: 1.25; }
.bars li:first-child .fill { background: var(--color-accent); }
.note { color: var(--body-text-color-subdued); }
.problem { border-left: 4px solid var(--error-border-color, #dc2626); padding: 0.8rem 1rem; border-radius: 0.4rem;
  background: var(--error-background-fill); overflow-wrap: anywhere; }
"""


def heading(name: str, facts: list[str]) -> str:
    """The model's name and what it is."""
    return f'<header class="heading"><h1>{escape(name)}</h1><p>{escape(" · ".join(facts))}</p></header>'


def bars(scores: list[tuple[str, float]], count: int, is_probability: bool = True) -> str:
    """The best `count` classes, as a list that a screen reader reads and bars that the eye does."""
    rows = []
    for label, score in scores[:count]:
        number = f"{score:.1%}" if is_probability else f"{score:.4g}"
        width = f"{min(max(score, 0.0), 1.0):.2%}"
        track = f'<div class="track" aria-hidden="true"><div class="fill" style="width: {width}"></div></div>'
        rows.append(
            f'<li><span class="label">{escape(label)}</span> <span class="score">{number}</span>'
            f"{track if is_probability else ''}</li>"
        )
    return f'<ol class="bars" aria-label="Classes, the most likely first">{"".join(rows)}</ol>'


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def problem(text: str) -> str:
    """What went wrong, which a screen reader says at once."""
    return f'<div class="problem" role="alert">{escape(text)}</div>'
