"""The rows of a comparison: methods, with settings of their own where they have any."""

from __future__ import annotations

import re
from dataclasses import dataclass

from diffult.config import Config
from diffult.errors import UserError
from diffult.longtail.methods import find_method

_OWN = ("extractor", "unet", "diffusion", "generate", "classifier")  # sections of which a row may have its own settings


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a method, with settings of its own.

    Attributes:
        name: as it is typed, METHOD or METHOD@section.key=value@...
        title: its name in tables.
        synthetic: whether the method trains on synthetic images too.
    """

    name: str
    method: str
    settings: tuple[str, ...]
    title: str
    synthetic: bool


def parse_row(text: str, title: str | None = None) -> Row:
    """Raises UserError for an unknown method, or a setting that is not a row's own."""
    name, *settings = (part.strip() for part in text.split("@"))
    try:
        method = find_method(name)
    except ValueError as error:
        raise UserError(f"--methods {text}: {error}") from None
    for setting in settings:
        section, _, key = setting.partition("=")[0].strip().partition(".")
        if section not in _OWN or (section, key) == ("classifier", "methods"):
            raise UserError(
                f"--methods {text}: a row's own settings are of {', '.join(_OWN)}, not {section + '.' + key!r}; "
                "give --set for all rows"
            )
    title = title or ", ".join((method.title, *settings))
    return Row("@".join((name, *settings)), name, tuple(settings), title, method.synthetic)


def parse_rows(text: str) -> list[Row]:
    """Rows apart by commas, except those in brackets."""
    return [parse_row(part.strip()) for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def ablation(config: Config) -> list[Row]:
    """The paper's ablation (Shao et al. 2024): one part more a row, then one verdict of the filter alone. Filter and
    weight are the preset's; where it has none, those of the paper."""
    generated = {
        "diffusion.cbdm": "true",
        "diffusion.aid": "false",
        "generate.filter": "none",
        "classifier.omega": "1.0",
    }
    aid = {"diffusion.aid": "true"}
    filtered = aid | {"generate.filter": config.generate.filter if config.generate.filter != "none" else "distance"}
    weighted = filtered | {"classifier.omega": str(config.classifier.omega if config.classifier.omega != 1 else 0.3)}
    table: list[tuple[str, str, dict[str, str]]] = [
        ("Baseline", "ce", {}),
        ("+ generated, with L_CBDM", "diffult", {}),
        ("+ L_AID", "diffult", aid),
        (f"+ filter ({filtered['generate.filter']})", "diffult", filtered),
        (f"+ weight ({weighted['classifier.omega']})", "diffult", weighted),
        ("With L_CBDM, ID alone", "diffult", {"generate.filter": "id"}),
        ("With L_CBDM, AID alone", "diffult", {"generate.filter": "aid"}),
        ("With L_CBDM, OOD alone", "diffult", {"generate.filter": "ood"}),
    ]
    return [
        parse_row("@".join([method, *(f"{key}={value}" for key, value in (generated | own).items())]), title)
        for title, method, own in table
    ]
