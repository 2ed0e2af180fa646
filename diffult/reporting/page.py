"""The templates of the reports, and what they may call."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from diffult.reporting.text import counted, duration, number, readable, signed, speed


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("diffult.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: readable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {filter_.__name__: filter_ for filter_ in (counted, duration, number, signed, speed)}
    return environment


def render_page(template: str, **values: Any) -> str:
    """A template of diffult/reporting/templates as HTML."""
    return _environment().get_template(template).render(**values)
