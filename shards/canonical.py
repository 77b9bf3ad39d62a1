"""Programs without a trace of where they were written.

An export of `jax.export` embeds file paths, line numbers, and the names of functions and modules:
the same function exported from two files gives two artefacts. Here an export is made canonical:
debug information goes, the module and its private functions are named by their place, so that equal
computations give equal bytes and equal text.

With `shards.compiling.handover` this is a file that reaches for JAX's internals: for an MLIR
context with JAX's dialects, the StableHLO version that exports are written for, and the removal of
dead code. Does not know units, stores or hashes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax import export
from jax._src.export import _export as jax_export
from jax._src.interpreters import mlir as jax_mlir
from jax._src.interpreters import partial_eval
from jax.extend.mlir import ir, passmanager

__all__ = ["CanonicalProgram", "artefact_of", "canonical", "module_of", "used_arguments"]


class CanonicalProgram(NamedTuple):
    """An export made canonical.

    Attributes:
        exported: byte-equal for equal computations.
        text: its StableHLO, equal for equal computations.
        constants: bytes of the constants inside; one value repeated counts once.
    """

    exported: jax.export.Exported
    text: str
    constants: int


def canonical(exported: jax.export.Exported) -> CanonicalProgram:
    """Strip an export of debug information and names.

    Args:
        exported: of a function from a flat tuple to a flat tuple, so that its trees hold no names
            either.

    Returns:
        An export that computes the same.
    """
    with jax_mlir.make_ir_context():
        module = exported.mlir_module(serialized=False)
        passmanager.PassManager.parse("builtin.module(strip-debuginfo)").run(module.operation)
        _rename(module)
        program = dataclasses.replace(
            exported,
            fun_name="unit",
            mlir_module_serialized=jax_export._module_to_bytecode(module),
            _get_vjp=None,
        )
        text = module.operation.get_asm(enable_debug_info=False)
        return CanonicalProgram(program, text, _constant_bytes(module))


def artefact_of(exported: jax.export.Exported) -> bytes:
    """An export as bytes that reading and writing does not change.

    JAX writes two equal shapes once or twice, depending on whether they are one object; in what
    was read they are one.
    """
    written = export.deserialize(bytearray(exported.serialize()))
    return bytes(written.serialize())


@contextlib.contextmanager
def module_of(exported: jax.export.Exported) -> Iterator[Any]:
    """The MLIR module of an export, to look at while the context is open."""
    with jax_mlir.make_ir_context():
        yield exported.mlir_module(serialized=False)


def used_arguments(traced: jax.stages.Traced) -> tuple[int, ...]:
    """Indices of the flat arguments that the outputs of a traced function depend on."""
    jaxpr = traced.jaxpr.jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return tuple(index for index, is_used in enumerate(used) if is_used)


def _rename(module: Any) -> None:
    """Name the module and its private functions by their place in the module.

    JAX lowers functions in the order of their calls, so the place is the same wherever the
    function was written. Two passes, because a user's function may bear one of our names.
    """
    root = module.operation
    root.attributes["sym_name"] = ir.StringAttr.get("unit")
    private = [op for op in module.body.operations if _symbol(op) not in ("", "main")]
    for stage in ("_shardserve_renaming_", "f"):
        for place, op in enumerate(private):
            old, new = _symbol(op), f"{stage}{place}"
            ir.SymbolTable.replace_all_symbol_uses(old, new, root)
            ir.SymbolTable.set_symbol_name(op, new)


def _symbol(op: Any) -> str:
    attributes = op.attributes
    return ir.StringAttr(attributes["sym_name"]).value if "sym_name" in attributes else ""


def _constant_bytes(module: Any) -> int:
    total = 0

    def visit(op: Any) -> Any:
        nonlocal total
        if op.name == "stablehlo.constant":
            shaped = ir.RankedTensorType(op.results[0].type)
            count = 1
            for size in () if _is_splat(op) else shaped.shape:
                count *= size
            total += (count * _bits(shaped.element_type) + 7) // 8
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return total


def _is_splat(op: Any) -> bool:
    try:
        value = op.attributes["value"]
    except TypeError:  # MLIR's Python cannot read constants of complex numbers
        return False
    return isinstance(value, ir.DenseElementsAttr) and value.is_splat


def _bits(element: Any) -> int:
    for kind in (ir.IntegerType, ir.FloatType):
        if isinstance(element, kind):
            return int(kind(element).width)
    return 128  # complex, or a type that this file does not know: count it as large
