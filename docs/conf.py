# SPDX-License-Identifier: Apache-2.0
"""Sphinx builds these pages: `make docs`. What it makes needs no network: system fonts, equations as MathML."""

import html
import re
import sys
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils.nodes import SkipNode


sys.path.insert(0, str(Path(__file__).parent.parent))

project = "modeling_vit_scratch"
author = "the authors of modeling_vit_scratch"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["pictures"]

default_role = "code"  # docstrings have code between single backticks, as Markdown
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "modeling_vit_scratch"
html_static_path = ["static"]
html_css_files = ["guide.css"]
html_copy_source = html_show_copyright = False
# The search stays English, which finds Chinese words as parts of sentences; that of "zh" lacks its stemmer (9.0.4).
html_math_renderer = "mathml"


def render(visitor: Any, node: Any, display: str) -> None:
    """LaTeX to MathML, which browsers draw by themselves; what \\tag{} has is the equation's number in the paper."""
    latex = node.astext()
    number = re.search(r"\\tag\{(.*?)\}", latex)
    formula = latex2mathml.converter.convert(re.sub(r"\\tag\{.*?\}", "", latex).strip(), display=display)
    if display == "inline":
        visitor.body.append(formula)
        return
    side = f'<span class="number">({html.escape(number.group(1))})</span>' if number else ""
    visitor.body.append(f'<div class="equation">{formula}{side}</div>\n')


def render_inline(visitor: Any, node: Any) -> None:
    render(visitor, node, "inline")
    raise SkipNode


def render_block(visitor: Any, node: Any) -> None:
    render(visitor, node, "block")
    raise SkipNode


def tell_language(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """The Chinese pages say that they are: readers' programs and fonts go by it."""
    if page.startswith("zh/"):
        context["language"] = "zh-Hans"


def keep_tables(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """An indented block of a module's docstring is shown as it stands: the legend of shapes, commands."""
    if what == "module":
        for index in range(len(lines) - 2):
            if lines[index].endswith(":") and not lines[index + 1] and lines[index + 2].startswith("    "):
                lines[index] += ":"


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", keep_tables)
    app.add_html_math_renderer("mathml", (render_inline, None), (render_block, None))
    app.connect("html-page-context", tell_language)
