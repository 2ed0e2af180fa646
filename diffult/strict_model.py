"""The base class of all settings."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from diffult.errors import shown

_LARGEST = 2**63  # what numpy and torch count up to


class StrictModel(BaseModel):
    """Frozen settings that refuse unknown keys, text or truth values in place of numbers, and what no file can hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if kind in (int, float, int | None, float | None) and type(value) in (bool, str):
            raise ValueError(f"expected a number, got {shown(value)}")
        for part in value if isinstance(value, list | tuple) else [value]:
            _check(part)
        return value


def _check(value: Any) -> None:
    if isinstance(value, int) and abs(value) >= _LARGEST:
        raise ValueError("the number is too large")
    if isinstance(value, str) and "\0" in value:
        raise ValueError("a text cannot hold a null character")
    if isinstance(value, str) and not _is_text(value):
        raise ValueError(f"{value!a} has bytes that are not UTF-8; rename it, or make a link to it of another name")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # a byte of a file's name, as the system gave it
        return False
    return True
