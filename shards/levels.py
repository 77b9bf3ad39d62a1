"""Which units of a signature run once for a whole request, and which once for every row.

A value is of the request where it is an input that is declared so, or comes from a unit that was
given nothing but such values. A device unit that takes some inputs per request and others per row
is given both, and repeats the former on the device; any other unit is given values of one level.
The rule is the same where a signature is traced, where a manifest is checked, and where a request
is planned; it is here, once. This file does not know JAX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from shards.errors import SpecMismatch
from shards.manifest import Node, Signature, TableUnit, Unit
from shards.specs import Per, Spec

__all__ = ["level_of_call", "node_levels"]

#: What a table is given. Whether it looks up once for a request or for every row is the ids'.
_IDS: Final = {"ids": Spec(("b",), "int64")}
_WEIGHTED: Final = {**_IDS, "weights": Spec(("b",))}


def level_of_call(inputs: Mapping[str, Spec], given: Mapping[str, Per]) -> Per:
    """The level at which a unit runs, which is that of its outputs.

    Args:
        inputs: the unit's.
        given: the level of the value that each of them is given.

    Raises:
        SpecMismatch: names the input whose value is of the wrong level.
    """
    rows = [name for name, spec in inputs.items() if not spec.per_request]
    for name in inputs.keys() - set(rows):
        if given[name] != "request":
            raise SpecMismatch(f"input {name!r} is per request, and is given a value for every row")
    level: Per = given[rows[0]] if rows else "row"
    for name in rows:
        if given[name] != level:
            once = next(each for each in rows if given[each] == "request")
            raise SpecMismatch(
                f"input {once!r} is given a value of the whole request and other inputs one for "
                f'every row: declare it with per="request", and the device repeats it'
            )
    return level


def node_levels(signature: Signature, units: Mapping[str, Unit]) -> tuple[Per, ...]:
    """The level of every node of a signature.

    Raises:
        SpecMismatch: a unit is given values of levels that it does not take.
    """
    levels: list[Per] = []
    for node in signature.nodes:
        given = {name: _level_of(value, signature, levels) for name, value in node.inputs.items()}
        unit = units[node.unit]
        try:
            levels.append(level_of_call(_inputs_of(unit, node), given))
        except SpecMismatch as error:
            raise SpecMismatch(f"unit {node.unit!r}: {error.message}") from None
    for name, value in signature.returns.items():
        if _level_of(value, signature, levels) != "row":
            raise SpecMismatch(f"output {name!r} has one row for the whole request")
    return tuple(levels)


def _inputs_of(unit: Unit, node: Node) -> Mapping[str, Spec]:
    if isinstance(unit, TableUnit):
        return _WEIGHTED if "weights" in node.inputs else _IDS
    return unit.inputs


def _level_of(value: str, signature: Signature, levels: Sequence[Per]) -> Per:
    where, _, name = value.partition(":")
    return signature.inputs[name].per if where == "in" else levels[int(where)]
