"""What a program may call besides XLA's own operations.

A program from a store is data, but a custom call names code of the process that runs it: a Python
function that was registered there, a kernel that the program brings along, a way out to the host.
Decides which targets a program may name: those that JAX itself lowers to, with an implementation
that only computes on its operands. Everything else is refused by name, when a bundle is saved and
again before a stored program is compiled. Does not know where programs come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from shards.errors import ProgramRefused

__all__ = ["ALLOWED_TARGETS", "EXCLUDED_TARGETS", "refuse_foreign_calls"]

#: Precisions that LAPACK's routines come in: float32, float64, complex64, complex128.
_ALL: Final = "sdcz"
_REAL: Final = "sd"
_COMPLEX: Final = "cz"

_LAPACK: Final = {
    "gees": _ALL, "geev": _ALL, "gehrd": _ALL, "geqrf": _ALL, "gesdd": _ALL, "getrf": _ALL,
    "gtsv": _ALL, "potrf": _ALL, "sytrd": _REAL, "hetrd": _COMPLEX, "syevd": _REAL,
    "heevd": _COMPLEX, "trsm": _ALL, "orgqr": _REAL, "ungqr": _COMPLEX,
}  # fmt: skip

_CUDA: Final = (
    "cu_lu_pivots_to_permutation", "cu_threefry2x32_ffi", "cusolver_geqrf_ffi",
    "cusolver_gesvd_ffi", "cusolver_gesvdj_ffi", "cusolver_getrf_ffi", "cusolver_orgqr_ffi",
    "cusolver_potrf_ffi", "cusolver_syevd_ffi", "cusolver_sytrd_ffi", "cusparse_gtsv2_ffi",
)  # fmt: skip

_ROCM: Final = (
    "hip_lu_pivots_to_permutation", "hip_threefry2x32_ffi", "hipsolver_geqrf_ffi",
    "hipsolver_gesdd_ffi", "hipsolver_gesvd_ffi", "hipsolver_gesvdj_ffi", "hipsolver_getrf_ffi",
    "hipsolver_orgqr_ffi", "hipsolver_potrf_ffi", "hipsolver_syevd_ffi", "hipsolver_sytrd_ffi",
)  # fmt: skip

_TPU: Final = ("Eigh", "Qr", "ProductOfElementaryHouseholderReflectors", "LuDecomposition",
               "ApproxTopK")  # fmt: skip

#: Words of the compiler: they annotate, allocate or are rewritten, and call nothing.
_COMPILER: Final = (
    "AllocateBuffer", "SPMDFullToShardShape", "SPMDShardToFullShape", "Sharding",
    "annotate_device_placement", "shape_assertion", "stablehlo.dynamic_approx_top_k",
    "stablehlo.dynamic_reduce_window", "stablehlo.dynamic_rng_bit_generator",
    "stablehlo.dynamic_top_k",
)  # fmt: skip

#: Targets that a program may name.
ALLOWED_TARGETS: Final = frozenset(
    (*(f"lapack_{kind}{name}_ffi" for name, kinds in _LAPACK.items() for kind in kinds),
     *_CUDA, *_ROCM, *_TPU, *_COMPILER)
)  # fmt: skip

#: Targets whose artefacts JAX keeps readable and which are refused all the same: TensorFlow's
#: runtime, and kernels that a program brings along (Pallas), whose memory accesses nobody checks.
EXCLUDED_TARGETS: Final = frozenset({"tf.call_tf_function", "tpu_custom_call", "mosaic_gpu_v2"})

#: Dialects that JAX exports: everything that is not a custom call computes on its operands...
_DIALECTS: Final = frozenset({"builtin", "chlo", "func", "sdy", "shape", "stablehlo"})
#: ...but for these, which talk to the host or wait for other programs.
_REACHING_OUT: Final = frozenset(
    {"stablehlo.infeed", "stablehlo.outfeed", "stablehlo.recv", "stablehlo.send"}
)


def refuse_foreign_calls(module: Any, what: str) -> None:
    """Refuse a module that calls what it must not.

    Args:
        module: an MLIR module of StableHLO.
        what: how messages name the program.

    Raises:
        ProgramRefused: names the first offender.
    """
    for operation in _operations(module.operation):
        name = operation.name
        if name.partition(".")[0] not in _DIALECTS or name in _REACHING_OUT:
            raise ProgramRefused(f"{what} uses the operation {name!r}, which is not allowed")
        if name == "stablehlo.custom_call":
            target = operation.attributes["call_target_name"].value
            if target not in ALLOWED_TARGETS:
                raise ProgramRefused(
                    f"{what} makes the custom call {target!r}, which is not allowed: a program "
                    "may only call what JAX itself lowers to and what stays on the device"
                )


def _operations(root: Any) -> Iterator[Any]:
    # By hand and not by recursion: a hostile module may be nested deeper than Python's stack.
    waiting = [root]
    while waiting:
        operation = waiting.pop()
        yield operation
        for region in operation.regions:
            for block in region:
                waiting.extend(inner.operation for inner in block)
