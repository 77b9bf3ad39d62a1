"""What declared values share: sizes in words, and complaints that name a field.

Imports no pydantic: routers read values of these classes and never validate a declaration.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

__all__ = ["FieldError", "Size", "check_at_least", "parse_size"]

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]i?B|B)?")
_UNITS: Final = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}


class FieldError(ValueError):
    """A value out of range; carries the field, so that the path can end in it."""

    def __init__(self, field_name: str, problem: str) -> None:
        super().__init__(field_name, problem)
        self.field_name = field_name
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.field_name}: {self.problem}"


def parse_size(value: object) -> object:
    """Bytes from ``4GiB``, ``512 MB`` or a plain integer; anything else is left to be refused.

    Raises:
        ValueError: text that is not a size.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    unit = (match[2] or "B") if match else ""
    unit = "kB" if unit == "KB" else unit
    if match is None or unit not in _UNITS:
        raise ValueError(f"{value!r} is not a size; write bytes, or a number with B, MiB, GiB ...")
    return int(float(match[1]) * _UNITS[unit])


class _ParsedAsSize:
    """Tells pydantic, if it asks, to read sizes in words."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(parse_size, handler(source))


Size = Annotated[int, _ParsedAsSize()]


def check_at_least(owner: object, least: float, *names: str) -> None:
    """Refuse an owner of which one of these fields is set and less.

    Raises:
        FieldError: names the field.
    """
    for name in names:
        value = getattr(owner, name)
        if value is not None and value < least:
            raise FieldError(name, f"must be at least {least}, got {value}")
