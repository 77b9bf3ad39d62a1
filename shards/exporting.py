"""A Python function and its parameters, exported as portable programs.

Decides how a function becomes programs: parameters are arguments (never constants), every array is
passed flat and without names, the batch is symbolic where JAX can do it and one program a bucket
where it cannot. Decides what is refused, and says why. Does not know stores or manifests, nor how
programs are compiled again (`shards.programs`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jax
import numpy as np
from jax import export

from batching.errors import InvalidArgument, ServingError
from shards.canonical import CanonicalProgram, artefact_of, canonical, module_of, used_arguments
from shards.custom_calls import refuse_foreign_calls
from shards.errors import ExportFailed, SpecMismatch
from shards.leaves import Array, dtype_name
from shards.parameters import FlatParameters, flatten
from shards.specs import REQUESTS, STRING, Spec, dtype_of

__all__ = [
    "BATCH_BUCKETS",
    "PLATFORMS",
    "REQUEST_BUCKETS",
    "Artefact",
    "ExportedUnit",
    "export_unit",
    "first_lines",
]

logger = logging.getLogger(__name__)

#: What a program is lowered for unless the caller says otherwise.
PLATFORMS: Final = ("cpu", "cuda", "tpu")

_KNOWN_PLATFORMS: Final = ("cpu", "cuda", "rocm", "tpu")

#: Batch sizes that are compiled unless the caller says otherwise.
BATCH_BUCKETS: Final = (1, 8, 32, 128)

#: Numbers of requests in a batch that are compiled, besides one a row, for units that take inputs
#: per request. One user's many items fill batches alone; a second size keeps a batch that two or
#: three users share from moving memory for as many users as it has rows.
REQUEST_BUCKETS: Final = (1, 8)

#: More constants than this inside one program are taken for weights in a closure.
_CONSTANT_BYTES_MAX: Final = 1 << 20

#: Lines of JAX's message that an error repeats.
_MESSAGE_LINES: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """One program, ready to be stored.

    Attributes:
        data: the serialised export; equal for equal computations.
        text: its normalised StableHLO, for the unit's identity.
        platforms: those it was lowered for.
        batch: None for any batch, else the one it was lowered for.
    """

    data: bytes
    text: str
    platforms: tuple[str, ...]
    batch: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedUnit:
    """What `export_unit` made of a function; the fields are those of `shards.manifest.MapUnit`.

    Attributes:
        leaves: the parameters that the function uses, in program order.
        notices: what was not done as asked, and why, for people.
    """

    inputs: dict[str, Spec]
    outputs: dict[str, Spec]
    programs: tuple[Artefact, ...]
    leaves: tuple[Array, ...]
    batch_buckets: tuple[int, ...]
    length_buckets: dict[str, tuple[int, ...]]
    request_buckets: tuple[int, ...]
    donate: tuple[int, ...]
    notices: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What is to be exported, checked."""

    inputs: dict[str, Spec]
    batch: str
    batch_buckets: tuple[int, ...]
    length_buckets: dict[str, tuple[int, ...]]
    request_buckets: tuple[int, ...]
    donate: tuple[int, ...]
    constant_bytes_max: int

    @property
    def is_mixed(self) -> bool:
        """Whether some inputs are per request."""
        return any(spec.per_request for spec in self.inputs.values())


def export_unit(
    fn: Callable[..., Any],
    params: Any,
    inputs: Mapping[str, Spec],
    *,
    batch_buckets: Sequence[int] = BATCH_BUCKETS,
    length_buckets: Mapping[str, Sequence[int]] | None = None,
    request_buckets: Sequence[int] = REQUEST_BUCKETS,
    donate: Sequence[str | int] = (),
    platforms: Sequence[str] = PLATFORMS,
    constant_bytes_max: int = _CONSTANT_BYTES_MAX,
) -> ExportedUnit:
    """Export ``fn(params, **inputs)``.

    Where the function cannot be exported with a symbolic batch, one program is made for every
    batch bucket; where it cannot be lowered for all platforms, it is lowered for the current one.
    Either is logged and recorded in `ExportedUnit.notices`.

    Args:
        fn: returns an array (named ``outputs``), a dict of arrays (named by its keys, in its
            order) or a tuple (``output_0``, ``output_1``, ...). Row i of every output must depend
            on row i of the inputs only.
        params: any pytree; its arrays become arguments of the program.
        inputs: input name to spec, in the order in which the program is to take them. All begin
            with the same batch symbol. ``fn`` is given a row for every row of the batch of what is
            per request, too; the program repeats it on the device.
        batch_buckets: batch sizes that will be compiled.
        length_buckets: for every other symbol, the sizes that will be compiled; the largest is
            that symbol's limit, and may be relied upon in ``fn``.
        request_buckets: where inputs are per request: numbers of requests in a batch that will be
            compiled, besides one a row.
        donate: names or indices of inputs whose memory outputs may take.
        platforms: what to lower for.
        constant_bytes_max: constants that a program may hold.

    Raises:
        InvalidArgument: buckets, inputs or donations do not fit together.
        SpecMismatch: a dtype or shape that cannot be served.
        ProgramRefused: it makes a custom call that is not allowed.
        ExportFailed: JAX refused; the message has its first lines and, where known, advice.
    """
    request = _request(
        inputs, batch_buckets, length_buckets, request_buckets, donate, constant_bytes_max
    )
    parameters = flatten(params)
    failures: list[tuple[str, Exception]] = []
    for batches, targets in _plans(request, _platforms(platforms)):
        try:
            programs, kept, outputs = _export_pruned(fn, parameters, request, batches, targets)
        except ServingError:
            raise  # one of ours: another plan would meet it too
        except Exception as error:  # JAX and the user's function raise what they like
            failures.append((f"{_batch_text(batches)} for {', '.join(targets)}", error))
            continue
        notices = (*parameters.notices, *(_notice(*failure) for failure in failures))
        for notice in notices:
            logger.info("%s", notice)
        return ExportedUnit(
            inputs=request.inputs,
            outputs=outputs,
            programs=programs,
            leaves=tuple(parameters.arrays[index] for index in kept),
            batch_buckets=request.batch_buckets,
            length_buckets=request.length_buckets,
            request_buckets=request.request_buckets,
            donate=request.donate,
            notices=notices,
        )
    raise _export_failed(failures) from failures[-1][1]


# --- what is asked -----------------------------------------------------------------------------


def _request(
    inputs: Mapping[str, Spec],
    batch_buckets: Sequence[int],
    length_buckets: Mapping[str, Sequence[int]] | None,
    request_buckets: Sequence[int],
    donate: Sequence[str | int],
    constant_bytes_max: int,
) -> _Request:
    if not inputs:
        raise InvalidArgument("a unit needs at least one input")
    batch = _batch_symbol(inputs)
    is_mixed = any(spec.per_request for spec in inputs.values())
    if is_mixed and all(spec.per_request for spec in inputs.values()):
        raise InvalidArgument(
            "every input of the unit is per request: leave that out, and give the unit values that "
            "are per request; then it runs once for a request"
        )
    lengths = {
        str(symbol): None for spec in inputs.values() for symbol in spec.shape[1:]
        if isinstance(symbol, str)
    }  # fmt: skip
    given = {name: _ladder(sizes, name) for name, sizes in (length_buckets or {}).items()}
    if batch in lengths or given.keys() != lengths.keys():
        raise InvalidArgument(
            f"length_buckets must name every symbol but the batch {batch!r}: it names "
            f"{sorted(given)}, the inputs use {sorted(lengths)}"
        )
    names = list(inputs)
    indices = [names.index(item) if item in inputs else item for item in donate]  # type: ignore[arg-type]
    if any(not isinstance(index, int) or not 0 <= index < len(names) for index in indices):
        raise InvalidArgument(f"donate={tuple(donate)} does not name inputs of {names}")
    return _Request(
        inputs=dict(inputs),
        batch=batch,
        batch_buckets=_ladder(batch_buckets, batch),
        length_buckets={symbol: given[symbol] for symbol in lengths},
        request_buckets=_ladder(request_buckets, "requests") if is_mixed else (),
        donate=tuple(sorted({int(index) for index in indices})),
        constant_bytes_max=constant_bytes_max,
    )


def _plans(
    request: _Request, wanted: tuple[str, ...]
) -> dict[tuple[tuple[int, ...] | None, tuple[str, ...]], None]:
    """For which batches (None: any) and platforms to export; the best first."""
    current = (export.default_export_platform(),)
    each = request.batch_buckets
    return dict.fromkeys([(None, wanted), (None, current), (each, wanted), (each, current)])


def _platforms(platforms: Sequence[str]) -> tuple[str, ...]:
    unknown = [platform for platform in platforms if platform not in _KNOWN_PLATFORMS]
    if unknown or not platforms:  # JAX would lower for a platform that does not exist
        raise InvalidArgument(f"platforms {platforms}: choose from {', '.join(_KNOWN_PLATFORMS)}")
    return tuple(dict.fromkeys(platforms))


def _batch_symbol(inputs: Mapping[str, Spec]) -> str:
    found = {name: spec.batch for name, spec in inputs.items()}
    symbol = next(iter(found.values()))
    for name, spec in inputs.items():
        if spec.batch is None or spec.batch != symbol:
            raise InvalidArgument(
                f"input {name!r} {spec.shape}: the inputs of a unit begin with one batch symbol, "
                f"here {symbol!r}"
            )
        if spec.dtype == STRING:
            raise InvalidArgument(
                f"input {name!r}: a device does not take strings, a host unit does"
            )
        read_as = jax.dtypes.canonicalize_dtype(dtype_of(spec.dtype))
        if read_as != dtype_of(spec.dtype):
            raise SpecMismatch(
                f"input {name!r} is {spec.dtype}, which JAX reads as {read_as}: declare that, or "
                f"turn jax_enable_x64 on here and where it is served"
            )
    assert symbol is not None  # the loop has refused it
    return symbol


def _ladder(sizes: Sequence[int], symbol: str) -> tuple[int, ...]:
    ladder = tuple(sorted({int(size) for size in sizes}))
    if not ladder or ladder[0] < 1:
        raise InvalidArgument(f"buckets of {symbol!r} must be positive: {tuple(sizes)}")
    return ladder


# --- exporting ---------------------------------------------------------------------------------


def _export_pruned(
    fn: Callable[..., Any],
    parameters: FlatParameters,
    request: _Request,
    batches: tuple[int, ...] | None,
    platforms: tuple[str, ...],
) -> tuple[tuple[Artefact, ...], tuple[int, ...], dict[str, Spec]]:
    """Export, and once more without the parameters that no program uses.

    Unused parameters (a pooler that nobody reads, the state of a dropout) would be stored, loaded
    and counted in the unit's identity for nothing.
    """
    every = tuple(range(len(parameters.arrays)))
    programs, used, outputs = _export_batches(fn, parameters, every, request, batches, platforms)
    if used != every:
        programs, _, outputs = _export_batches(fn, parameters, used, request, batches, platforms)
    return programs, used, outputs


def _export_batches(
    fn: Callable[..., Any],
    parameters: FlatParameters,
    kept: tuple[int, ...],
    request: _Request,
    batches: tuple[int, ...] | None,
    platforms: tuple[str, ...],
) -> tuple[tuple[Artefact, ...], tuple[int, ...], dict[str, Spec]]:
    """Export one program for every batch, or one for any where `batches` is None."""
    programs: list[Artefact] = []
    used: set[int] = set()
    outputs: dict[str, Spec] | None = None
    for batch in (None,) if batches is None else batches:
        program, names, arguments = _export_one(fn, parameters, kept, request, batch, platforms)
        specs = _output_specs(program.exported.out_avals, names, request, batch)
        if outputs is not None and specs != outputs:
            raise SpecMismatch(f"outputs depend on the batch: {outputs} and {specs}")
        outputs = specs
        used |= {kept[index] for index in arguments if index < len(kept)}
        data = artefact_of(program.exported)
        programs.append(
            Artefact(
                data=data, text=program.text, platforms=program.exported.platforms, batch=batch
            )
        )
    assert outputs is not None  # a ladder is never empty
    return tuple(programs), tuple(sorted(used)), outputs


def _export_one(
    fn: Callable[..., Any],
    parameters: FlatParameters,
    kept: tuple[int, ...],
    request: _Request,
    batch: int | None,
    platforms: tuple[str, ...],
) -> tuple[CanonicalProgram, tuple[str, ...], tuple[int, ...]]:
    names: tuple[str, ...] = ()
    positions = {index: position for position, index in enumerate(kept)}

    def unit(*arguments: Any) -> tuple[Any, ...]:
        nonlocal names
        # A parameter that is not kept is used by nothing that is returned: zeros that take no
        # memory stand in for it.
        leaves = [
            arguments[positions[index]] if index in positions
            else np.broadcast_to(np.zeros((), array.dtype), array.shape)
            for index, array in enumerate(parameters.arrays)
        ]  # fmt: skip
        names, values = _named(
            fn(parameters.rebuild(leaves), **_rows(request, arguments[len(kept) :]))
        )
        return values

    arrays = [parameters.arrays[index] for index in kept]
    leaf_avals = [_aval(array.shape, array.dtype) for array in arrays]
    jitted = jax.jit(unit)
    avals = (*leaf_avals, *_input_avals(request, batch))
    traced = jitted.trace(*avals)
    if len(kept) == len(parameters.arrays):
        # Before lowering writes them into the module: there may be gigabytes of them.
        _refuse_constants(sum(np.asarray(c).nbytes for c in traced.jaxpr.consts), request)
    program = canonical(export.export(jitted, platforms=platforms)(*avals))
    with module_of(program.exported) as module:
        refuse_foreign_calls(module, "the function")
    _refuse_constants(program.constants, request)
    if program.exported.nr_devices != 1:
        raise ExportFailed(f"the function is written for {program.exported.nr_devices} devices")
    return program, names, used_arguments(traced)


def _rows(request: _Request, arguments: Sequence[Any]) -> dict[str, Any]:
    """What the user's function is given: a row of every input for every row of the batch.

    The barrier keeps XLA from computing on what is not yet repeated, where that would round
    differently: an answer is bit-equal to that for repeated inputs, and does not depend on how many
    requests share the batch.
    """
    if not request.is_mixed:
        return dict(zip(request.inputs, arguments, strict=True))
    *arrays, index = arguments
    rows = dict(zip(request.inputs, arrays, strict=True))
    for name, spec in request.inputs.items():
        if spec.per_request:
            repeated = rows[name].at[index].get(mode="promise_in_bounds")
            rows[name] = jax.lax.optimization_barrier(repeated)  # type: ignore[no-untyped-call]
    return rows


def _refuse_constants(found: int, request: _Request) -> None:
    if found > request.constant_bytes_max:
        raise ExportFailed(
            f"the program holds {found:,} bytes of constants: pass weights through params, not "
            f"through a closure or a global (allowed: {request.constant_bytes_max:,})"
        )


def _input_avals(request: _Request, batch: int | None) -> list[jax.ShapeDtypeStruct]:
    symbols = ([request.batch] if batch is None else []) + list(request.length_buckets)
    # However the batch is exported, how many requests share it is left open.
    symbols += [REQUESTS] if request.is_mixed else []
    limits = [f"{symbol}<={sizes[-1]}" for symbol, sizes in request.length_buckets.items()]
    # All symbols are made at once: JAX compares only symbols of one scope.
    made = export.symbolic_shape(",".join(symbols), constraints=limits) if symbols else ()
    sizes: dict[str, Any] = dict(zip(symbols, made, strict=True))
    if batch is not None:
        sizes[request.batch] = batch
    avals = []
    for spec in request.inputs.values():
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        if spec.per_request:
            shape[0] = sizes[REQUESTS]
        avals.append(_aval(tuple(shape), dtype_of(spec.dtype)))
    if request.is_mixed:
        avals.append(_aval((sizes[request.batch],), np.int32))
    return avals


def _aval(shape: tuple[Any, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


def _named(result: Any) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Names and values of what a function returned."""
    if isinstance(result, Mapping):
        names, values = tuple(result), tuple(result.values())
    elif isinstance(result, tuple | list):
        names, values = tuple(f"output_{i}" for i in range(len(result))), tuple(result)
    else:
        names, values = ("outputs",), (result,)
    if not values:
        raise SpecMismatch("the function returns nothing")
    for name, value in zip(names, values, strict=True):
        if not isinstance(name, str):
            raise SpecMismatch(f"the function returns a dict with the key {name!r}, not a name")
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            raise SpecMismatch(f"output {name!r} is not an array but a {type(value).__name__}")
    return names, values


def _output_specs(
    avals: Sequence[Any], names: Sequence[str], request: _Request, batch: int | None
) -> dict[str, Spec]:
    symbols = {request.batch, *request.length_buckets}
    first = request.batch if batch is None else str(batch)
    specs = {}
    for name, aval in zip(names, avals, strict=True):
        shape = [dim if isinstance(dim, int) else str(dim) for dim in aval.shape]
        text = "[" + ",".join(map(str, shape)) + "]"
        if not shape or str(shape[0]) != first:
            raise SpecMismatch(f"output {name!r} {text} has not one row for every row of the batch")
        shape[0] = request.batch
        if request.batch in shape[1:]:
            raise SpecMismatch(f"output {name!r} {text} mixes the rows of a batch")
        unknown = [dim for dim in shape if isinstance(dim, str) and dim not in symbols]
        if unknown:
            raise SpecMismatch(f"output {name!r} {text}: size {unknown[0]} is not a plain symbol")
        specs[name] = Spec(tuple(shape), dtype_name(aval.dtype))
    return specs


# --- saying why --------------------------------------------------------------------------------


def _batch_text(batches: tuple[int, ...] | None) -> str:
    return "with a symbolic batch" if batches is None else f"with batches {batches}"


def first_lines(error: Exception) -> str:
    """The beginning of an error's message on one line; JAX's messages fill pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: " + " / ".join(lines[:_MESSAGE_LINES])


def _notice(how: str, error: Exception) -> str:
    return f"not exported {how}: {first_lines(error)}"


def _export_failed(failures: Sequence[tuple[str, Exception]]) -> ExportFailed:
    # The last plan is the plainest, so its failure is closest to the cause.
    text = first_lines(failures[-1][1])
    advice = next((advice for word, advice in _ADVICE if word in text), "")
    return ExportFailed(f"the function cannot be exported: {text}{advice and '. ' + advice}")


_ADVICE: Final = (
    ("callback", "Calls back into Python cannot be exported: move them to a host unit"),
    ("Concretiz", "The program's path must not depend on values: use jax.lax.cond or jnp.where"),
    ("TracerBool", "The program's path must not depend on values: use jax.lax.cond or jnp.where"),
    ("inconclusive", "Give the symbol a limit in length_buckets that settles the comparison"),
    ("unexpected keyword", "The function is called as fn(params, **inputs), by input name"),
)
