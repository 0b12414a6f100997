# SPDX-License-Identifier: Apache-2.0
"""
Copies the code that the guide quotes from the package into its pages, so that they read alike on the website and on a
code host.

    python docs/update_excerpts.py        after a change of the code; a test compares the two

A quoted function stands below a line such as: [encoder_vit_scratch.py](../../x/encoder_vit_scratch.py), `patchify`:
"""

import ast
import re
from pathlib import Path
from textwrap import dedent


DOCS = Path(__file__).parent
QUOTE = re.compile(r"^(\[[\w.]+\]\(([\w./]+\.py)\), `([\w.]+)`[:：])\n\n```py\n.*?^```$", re.MULTILINE | re.DOTALL)


def source(file: Path, name: str) -> str:
    """The text of a function or class of a file, such as `ViTScratchMLP.forward`, without its indentation."""
    text, node = file.read_text(encoding="utf-8"), None
    body = ast.parse(text).body
    for part in name.split("."):
        node = next(found for found in body if getattr(found, "name", None) == part)
        body = node.body
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return dedent("\n".join(text.splitlines()[first - 1 : node.end_lineno]))


def updated(page: Path) -> str:
    """The page's text with the code of today."""

    def quote(found: re.Match) -> str:
        return f"{found[1]}\n\n```py\n{source(page.parent / found[2], found[3])}\n```"

    return QUOTE.sub(quote, page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for path in sorted(DOCS.rglob("*.md")):
        path.write_text(updated(path), encoding="utf-8")
