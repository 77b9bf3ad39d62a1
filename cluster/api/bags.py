"""Bags of different length in a JSON body, made alike before they become arrays.

An input that a signature only pools may be written with bags as long as they are: the shorter ones
are filled with what pooling takes for none. Decides which inputs these are, how long bags become
and how much filling is too much. Everything else that may be wrong with a body is left for the
reading that follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from batching.errors import InvalidArgument
from shards.bags import NO_ID
from shards.manifest import Signature
from shards.specs import STRING, Spec

__all__ = ["Bags"]

#: Places that the bags of all inputs may have once they are filled: a single long bag must not make
#: a small body into gigabytes.
_PLACES_MAX: Final = 1 << 22
#: The same where there are so few ids and bags that the body may be read on a router's loop (it
#: takes 2 bytes for each at least): one place takes 80 ns.
_FEW: Final = 4096
_PLACES_OF_FEW_MAX: Final = 1 << 16


class _Bag(NamedTuple):
    """An input whose rows are bags: its spec, and what fills a place."""

    spec: Spec
    fill: object


class Bags:
    """The inputs of a signature that may be ragged.

    Args:
        signature: the signature.
    """

    def __init__(self, signature: Signature) -> None:
        self._bags: dict[str, _Bag] = {}
        #: pairs of ids and weights that belong together
        self._pairs: set[tuple[str, str]] = set()
        others = {value for value in signature.returns.values()}
        pooled: set[tuple[str, str]] = set()
        for node in signature.nodes:
            if node.pool is None:
                others.update(node.inputs.values())
                continue
            pooled.update(node.inputs.items())
            if "weights" in node.inputs:
                self._pairs.add((node.inputs["ids"], node.inputs["weights"]))
        for role, value in sorted(pooled):
            where, _, name = value.partition(":")
            spec = signature.inputs.get(name) if where == "in" else None
            if spec is None or value in others or len(spec.shape) < 2:
                continue
            if role == "weights":
                self._bags[name] = _Bag(spec, 0.0)
            elif not spec.dtype.startswith("uint"):  # which have no number for none
                self._bags[name] = _Bag(spec, "" if spec.dtype == STRING else NO_ID)

    def __bool__(self) -> bool:
        return bool(self._bags)

    def filled(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs whose bags had to be filled, filled.

        Args:
            values: inputs by name, as lists.

        Raises:
            InvalidArgument: a bag is longer than is declared, has not as many weights as ids, or
                filling takes too much.
        """
        lengths: dict[str, list[int]] = {}
        for name, bag in self._bags.items():
            found = _lengths(values.get(name), _depth(bag.spec, values.get(name)))
            if found:
                lengths[name] = found
        widths: dict[int | str, int] = {}
        for name, found in lengths.items():
            size = self._bags[name].spec.shape[-1]
            if isinstance(size, int) and max(found) > size:
                raise InvalidArgument(
                    f"input {name!r}: a bag of {max(found)}, at most {size} are declared"
                )
            longest = size if isinstance(size, int) else max(found)
            widths[size] = max(widths.get(size, 0), longest)
        ragged = {
            name
            for name, found in lengths.items()
            if any(length != widths[self._bags[name].spec.shape[-1]] for length in found)
        }
        if ragged:
            self._check_pairs(lengths)
            self._check_places({name: lengths[name] for name in sorted(ragged)}, widths)
        return {name: self._fill(name, values[name], widths) for name in ragged}

    def _check_places(
        self, lengths: Mapping[str, list[int]], widths: Mapping[int | str, int]
    ) -> None:
        given = sum(len(found) + sum(found) for found in lengths.values())
        most = _PLACES_MAX if given > _FEW else min(_PLACES_OF_FEW_MAX, _PLACES_MAX)
        places = 0
        for name, found in lengths.items():
            width = widths[self._bags[name].spec.shape[-1]]
            places += len(found) * width
            if places > most:
                raise InvalidArgument(
                    f"input {name!r}: {len(found)} bags filled up to {width} are more than "
                    f"{most} places"
                )

    def _check_pairs(self, lengths: Mapping[str, list[int]]) -> None:
        for pair in self._pairs:
            ids, weights = (value.partition(":")[2] for value in pair)
            if lengths.get(ids) != lengths.get(weights):
                raise InvalidArgument(
                    f"inputs {ids!r} and {weights!r}: bags have not as many weights as ids"
                )

    def _fill(self, name: str, value: Any, widths: Mapping[int | str, int]) -> Any:
        bag = self._bags[name]
        width = widths[bag.spec.shape[-1]]
        return _filled(value, _depth(bag.spec, value), width, bag.fill)


def _depth(spec: Spec, value: Any) -> int:
    """How many lists a bag lies in; what is per request may leave its only row's list out."""
    depth = len(spec.shape) - 1
    if spec.per_request and _rank(value) == depth:
        return depth - 1
    return depth


def _rank(value: Any) -> int:
    rank = 0
    while isinstance(value, list):
        rank += 1
        value = next((each for each in value if each != []), None)
    return rank


def _lengths(value: Any, depth: int) -> list[int] | None:
    """The length of every bag, None where these are no such lists."""
    try:
        return list(_each(value, depth))
    except TypeError:
        return None


def _each(value: Any, depth: int) -> Iterator[int]:
    if not isinstance(value, list):
        raise TypeError
    if not depth:
        yield len(value)
        return
    for inner in value:
        yield from _each(inner, depth - 1)


def _filled(value: Any, depth: int, width: int, fill: object) -> Any:
    if not depth:
        return value + [fill] * (width - len(value))
    return [_filled(inner, depth - 1, width, fill) for inner in value]
