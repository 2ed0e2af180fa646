"""What done.json and metrics.json hold. A file is checked when it is read: what follows may then index it freely."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffult.errors import UserError
from diffult.runs.files import read_json

Count = Annotated[int, Field(ge=0, lt=2**63)]
Percent = Annotated[float, Field(ge=0, le=100)]
Seconds = Annotated[float, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Stage(_Record):
    """Of done.json of any stage."""

    hash: str
    files: list[str]
    seconds: Seconds
    packed: str | None = None


class PackStage(Stage):
    fingerprint: str
    held_out: dict[str, str]
    place: dict[str, str]


class Tally(_Record):
    drawn: Count
    accepted: Count
    id: Count
    aid: Count
    ood: Count


class Generation(Tally):
    nfe: Count
    images_per_s: Seconds | None
    by_class: dict[str, Tally]


class GenerateStage(Stage):
    generation: Generation


class Accuracy(_Record):
    """Of a method, in percent; None without test images."""

    top1: Percent
    many: Percent | None
    medium: Percent | None
    few: Percent | None
    by_class: list[Percent | None] | None = None


class Copies(_Record):
    share: Percent | None
    by_class: dict[str, Percent | None]
    expected: Percent = 5.0


class Metrics(_Record):
    """Of metrics.json, beside an `Accuracy` of each method by its name."""

    model_config = ConfigDict(extra="allow")
    name: str
    hash: str
    seed: int
    device: str | None = None
    torch: str | None = None
    seconds: dict[str, Seconds]
    generation: Generation
    copies: Copies | None = None
    validation: dict[str, Accuracy] = {}


def check(model: type[BaseModel], content: Any, file: Path, otherwise: str, *within: str) -> None:
    """Raises UserError, with what to do, if the content of a file, within these keys, is not of this form."""
    try:
        model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (*within, *first["loc"])))[:120]
        raise UserError(f"{file}: damaged ({where}: {first['msg']}); {otherwise}") from None


def check_stage(name: str, record: Any, file: Path) -> None:
    """Raises UserError if a done.json of this stage lacks something."""
    models: dict[str, type[Stage]] = {"pack": PackStage, "generate": GenerateStage}
    check(models.get(name, Stage), record, file, "delete it to run the stage again")


def read_metrics(file: Path, digest: str, methods: Sequence[str]) -> dict[str, Any] | None:
    """metrics.json; None if there is none of this hash.

    Raises:
        UserError: it is damaged, or lacks one of the methods.
    """
    metrics = read_json(file) if file.exists() else {}
    if metrics.get("hash") != digest:
        return None
    otherwise = f"delete it and run python -m diffult.evaluate --run {file.parent}"
    check(Metrics, metrics, file, otherwise)
    for method in methods:
        check(Accuracy, metrics.get(method), file, otherwise, method)
    # Others with an accuracy would be taken for methods, too.
    return {name: value for name, value in metrics.items() if name in (*Metrics.model_fields, *methods)}


def check_classes(metrics: dict[str, Any], classes: Sequence[str], file: Path) -> None:
    """Raises UserError if metrics are not of these classes."""
    tables = [metrics["generation"]["by_class"], metrics.get("copies", {}).get("by_class", {})]
    rows = [row for row in metrics.values() if isinstance(row, dict) and "top1" in row]
    rows += metrics.get("validation", {}).values()
    lengths = {len(row["by_class"]) for row in rows if row.get("by_class") is not None}
    if any(set(table) - set(classes) for table in tables) or lengths - {len(classes)}:
        raise UserError(f"{file}: is not of the classes of this run; delete it and run python -m diffult.evaluate")
