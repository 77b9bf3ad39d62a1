"""What a manifest says besides what it computes: who wrote it, and a unit's plain options.

Decides which options may be written down and which specs only units on a device may have. Does not
know stores or programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata

from batching.errors import InvalidArgument
from shards.manifest import Created
from shards.specs import Spec

__all__ = ["created_now", "plain_options", "refuse_per_request"]


def created_now() -> Created:
    """This software, at this moment."""
    return Created(
        shardserve=_version_of("shardserve"),
        jax=_version_of("jax"),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def refuse_per_request(unit: str, *specs: Mapping[str, Spec]) -> None:
    """Refuse specs per request of a unit that does not run on a device.

    Raises:
        InvalidArgument: names the tensor.
    """
    for name, spec in [pair for some in specs for pair in some.items()]:
        if spec.per_request:
            raise InvalidArgument(
                f"unit {unit!r}, {name!r}: only units on a device take inputs per request beside "
                f"others; any unit runs once for a request if all it is given is per request"
            )


def plain_options(
    unit: str, options: Mapping[str, str | int | float | bool] | None
) -> dict[str, str | int | float | bool]:
    """The options of a unit, copied.

    Raises:
        InvalidArgument: one is no plain value.
    """
    for key, value in (options or {}).items():
        if not isinstance(key, str) or not isinstance(value, str | int | float | bool):
            raise InvalidArgument(f"unit {unit!r}: option {key!r} is no plain value")
    return dict(options or {})
