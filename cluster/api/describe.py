"""What a servable is and how it fares, as JSON: status, metadata and the list of servables.

Status and metadata have TensorFlow Serving's shapes, which are printed protocol buffers: integers
of 64 bits are strings. The list of all servables is ours, TensorFlow Serving refuses to give one::

    {"models": [{"name": "mlp", "versions": [{"version": "2", "state": "AVAILABLE"}, ...]}, ...]}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

import orjson

from cluster.epochs import VersionStatus
from shards.manifest import Manifest, Signature
from shards.specs import STRING, Spec

__all__ = ["TENSORFLOW_DTYPES", "list_body", "metadata_body", "status_body"]

#: A spec's dtype to the name of TensorFlow's `DataType` enumerator.
TENSORFLOW_DTYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "bool": "DT_BOOL",
        "int8": "DT_INT8",
        "int16": "DT_INT16",
        "int32": "DT_INT32",
        "int64": "DT_INT64",
        "uint8": "DT_UINT8",
        "uint16": "DT_UINT16",
        "uint32": "DT_UINT32",
        "uint64": "DT_UINT64",
        "float16": "DT_HALF",
        "bfloat16": "DT_BFLOAT16",
        "float32": "DT_FLOAT",
        "float64": "DT_DOUBLE",
        STRING: "DT_STRING",
    }
)


def status_body(statuses: Iterable[VersionStatus]) -> bytes:
    """The status of one servable's versions, highest first."""
    return orjson.dumps(
        {
            "model_version_status": [
                {
                    "version": str(one.version),
                    "state": one.state,
                    "status": {"error_code": one.error_code, "error_message": one.error_message},
                }
                for one in _descending(statuses)
            ]
        }
    )


def list_body(statuses: Iterable[VersionStatus]) -> bytes:
    """All servables by name, each with its versions, highest first."""
    servables: dict[str, list[dict[str, str]]] = {}
    for one in _descending(statuses):
        servables.setdefault(one.servable, []).append(
            {"version": str(one.version), "state": one.state}
        )
    return orjson.dumps(
        {"models": [{"name": name, "versions": servables[name]} for name in sorted(servables)]}
    )


def metadata_body(manifest: Manifest) -> bytes:
    """The signatures of a version in the shape of TensorFlow's ``SignatureDef``.

    A symbolic size is ``"-1"`` with the symbol as the dimension's name, so that a client can see
    which sizes must agree. What is per request begins with a ``"1"`` whose name is ``request``.
    """
    signatures = {name: _signature(one) for name, one in manifest.signatures.items()}
    return orjson.dumps(
        {
            "model_spec": {
                "name": manifest.name,
                "signature_name": "",
                "version": str(manifest.version),
            },
            "metadata": {"signature_def": {"signature_def": signatures}},
        }
    )


def _descending(statuses: Iterable[VersionStatus]) -> list[VersionStatus]:
    return sorted(statuses, key=lambda one: one.version, reverse=True)


def _signature(signature: Signature) -> dict[str, object]:
    return {
        "inputs": {name: _tensor(name, spec) for name, spec in signature.inputs.items()},
        "outputs": {name: _tensor(name, spec) for name, spec in signature.outputs.items()},
        "method_name": f"tensorflow/serving/{signature.method}",
    }


def _tensor(name: str, spec: Spec) -> dict[str, object]:
    dims = [_dim(size) for size in spec.shape]
    if spec.per_request:
        dims[0] = {"size": "1", "name": "request"}
    return {
        "dtype": TENSORFLOW_DTYPES[spec.dtype],
        "tensor_shape": {"dim": dims, "unknown_rank": False},
        "name": f"{name}:0",
    }


def _dim(size: int | str) -> dict[str, str]:
    if isinstance(size, str):
        return {"size": "-1", "name": size}
    return {"size": str(size), "name": ""}
