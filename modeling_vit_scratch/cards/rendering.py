# SPDX-License-Identifier: Apache-2.0
"""Renders a card from a Jinja template: wrong names are errors, and text from records is escaped for Markdown."""

import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import FileSystemLoader, StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from ..common.errors import InputError
from ..common.records import METRIC_TITLES, format_score, title_of
from ..data.sources import listed


CARD_TEMPLATE = "template.md"


class Absent(StrictUndefined):
    """A value that this model's records don't have: false in a condition, an error where it is printed."""

    __slots__ = ()
    __format__ = StrictUndefined._fail_with_undefined_error

    def __bool__(self) -> bool:
        return False

    @property
    def _undefined_message(self) -> str:
        return f"the records of this model have no {self._undefined_name}. Put a condition around it"


class CardEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox. In that of `ModelCard` a misspelt name prints nothing, and a name from a record may be HTML."""

    def getitem(self, obj: Any, argument: Any) -> Any:
        """As in Jinja; None, which JSON has for what is not known, becomes `Absent`."""
        value = super().getitem(obj, argument)
        return Absent(name=argument) if value is None else value

    getattr = getitem  # keys of records before methods of dictionaries, e.g. a key named "values"


def render(values: dict[str, Any], template: str = CARD_TEMPLATE, text: str | None = None) -> str:
    """Fills in a template of this folder, or the `text` of another one. InputError, with the line, for a mistake."""
    environment = CardEnvironment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, finalize=_escaped, trim_blocks=True,
        lstrip_blocks=True, autoescape=True,  # so that macros and blocks return Markup, which _escaped leaves alone
    )  # fmt: skip
    environment.filters |= FILTERS
    values = {name: Absent(name=name) if value is None else value for name, value in values.items()}
    try:
        chosen = environment.get_template(template) if text is None else environment.from_string(text)
        rendered = chosen.render(values)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise InputError(f"{_where(error, template)}: {error}.") from error
    return re.sub(r"\n{3,}", "\n\n", rendered).strip() + "\n"


def _where(error: Exception, template: str) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.endswith(".py")]
    place = error if isinstance(error, TemplateSyntaxError) else frames[-1] if frames else None
    if place is None:
        return template
    file, line = place.filename, place.lineno
    return f"{template if not file or file.startswith('<') else Path(file).name}, line {line}"


def escape(text: Any) -> Markup:
    """Text on one line, without markup of Markdown or HTML."""
    return Markup(re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", re.sub(r"\s+", " ", str(text))))


def _escaped(value: Any) -> Any:
    if value is None:
        raise UndefinedError("the records of this model have no value for it. Put a condition around it")
    return value if hasattr(value, "__html__") else escape(value)


def number(value: Any, digits: int | None = None) -> Any:
    """1,797 or 0.001; several numbers with commas; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return ", ".join(str(number(one, digits)) for one in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if digits is not None:
        return f"{value:,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def percent(value: float, digits: int = 2) -> str:
    """A fraction as a percentage: 98.89 %."""
    return f"{100 * value:.{digits}f} %"


def size(value: int | Sequence[int]) -> str:
    """Height and width: 224 x 224."""
    height, width = (value, value) if isinstance(value, int) else value
    return f"{height} x {width}"


def url(address: str) -> Markup:
    """A path or an address as the target of a link."""
    return Markup(quote(address, safe="/:?&=#%+,;@!~*'"))


def code(text: Any) -> Markup:
    return Markup("`" + " ".join(str(text).split()).replace("`", "'").replace("|", r"\|") + "`")


def code_block(text: Any, language: str = "text") -> Markup:
    """Code in a fence that is longer than any in the code."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", str(text))), default=0))
    return Markup(f"{fence}{language}\n{str(text).strip()}\n{fence}")


FILTERS = {
    "number": number, "percent": percent, "size": size, "names": listed, "score": format_score,
    "metric_title": title_of, "metric_name": lambda metric: METRIC_TITLES.get(metric, metric),
    "url": url, "code": code, "code_block": code_block,
}  # fmt: skip
