# SPDX-License-Identifier: Apache-2.0
"""The files of a transfer table."""

import json
from pathlib import Path
from typing import Any

from modeling_vit_scratch.cards.values import render, transfer_values
from modeling_vit_scratch.common.files import write_text


def markdown(record: dict[str, Any]) -> str:
    """The tables, what they were measured on and the commands, as on a card."""
    return render({"transfer": transfer_values(record)}, "transfer.md")


def write_transfer(record: dict[str, Any], folder: Path) -> None:
    """Writes transfer.json, transfer.md and, where matplotlib is, transfer.png; shows the tables and tells where."""
    text = markdown(record)
    write_text(folder / "transfer.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "transfer.md", text)
    print(text.partition("```text")[0], f"All numbers: {folder / 'transfer.json'}, {folder / 'transfer.md'}", sep="\n")
    try:
        from experiments.figures import draw_transfer
    except ImportError:
        print('No picture: it is drawn with matplotlib, pip install -e ".[plot]"')
        return
    print(f"Picture: {draw_transfer(record, folder / 'transfer.png')}")
