"""What every section of the settings has in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class StrictModel(BaseModel):
    """Settings that know their keys, do not change, and take values as they are typed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """'7' is text and true is a truth value: neither is taken for a number."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if kind in (int, float, int | None, float | None) and type(value) in (bool, str):
            raise ValueError(f"expected a number, got {value!r}")
        return value
