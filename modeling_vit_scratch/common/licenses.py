# SPDX-License-Identifier: Apache-2.0
"""Which licences a model card can name: hf.co/docs/hub/repositories-licenses."""

import re
from typing import Any


_IDENTIFIER = re.compile(r"[a-z0-9.-]+")


def license_problem(license: Any, name: str | None = None, link: str | None = None) -> str | None:
    """
    What is wrong with the licence of a model; None if nothing is.

    Args:
        license: the Hub's identifier, e.g. apache-2.0, or "other".
        name, link: of the licence; "other" needs both.
    """
    if not isinstance(license, str) or not _IDENTIFIER.fullmatch(license):
        return "it is no name of the Hub's, e.g. apache-2.0, cc-by-4.0 (hf.co/docs/hub/repositories-licenses)."
    if license == "other" and not (name and link):
        return (
            "add license_name and license_link: scripts/card.py FOLDER --license other --license_name NAME "
            "--license_link URL."
        )
    return None
