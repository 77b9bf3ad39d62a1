"""What a bundle is, for people and for scripts.

Decides how a manifest is summed up; reads manifests and file sizes, and blobs only to verify them.
Does not know JAX, nor the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, assert_never

from shards.checking import blobs_of, leaf_bytes, unit_blobs
from shards.levels import node_levels
from shards.manifest import (
    CustomUnit,
    HostUnit,
    Manifest,
    MapUnit,
    Reference,
    Signature,
    TableUnit,
    Unit,
)
from shards.references import named, units_called
from shards.specs import Per, Spec
from shards.store import Store

__all__ = ["describe", "render", "verify"]


def describe(manifest: Manifest, store: Store | None = None) -> dict[str, Any]:
    """A bundle as plain values, ready to be printed as JSON.

    Args:
        manifest: the bundle.
        store: where it lies, to name it; None leaves it out.

    Returns:
        Name, version, schema, software, sizes, signatures and units.
    """
    blobs = blobs_of(manifest)
    called = units_called(manifest)
    described: dict[str, Any] = {
        "name": manifest.name,
        "version": manifest.version,
        "schema": manifest.schema,
        "created": manifest.created.at,
        "shardserve": manifest.created.shardserve,
        "jax": manifest.created.jax,
        "blobs": len(blobs),
        "bytes": sum(blob.size for blob in blobs.values()),
        "warmups": 0 if manifest.warmups is None else manifest.warmups.requests,
        "signatures": {
            name: _signature(s, node_levels(s, called)) for name, s in manifest.signatures.items()
        },
        "units": {name: _unit(unit) for name, unit in manifest.units.items()},
        "references": {name: _reference(one) for name, one in manifest.references.items()},
    }
    return described if store is None else {"store": store.url, **described}


def verify(store: Store, name: str, version: int) -> dict[str, Any]:
    """Read every blob of a version and compare it with its digest.

    Returns:
        How much was found sound.

    Raises:
        BundleNotFound: no such version.
        BundleIncomplete: no manifest, or a blob is missing or short; says which.
        BundleCorrupt: a manifest or blob is broken; says which.
        BundleForeign: not ours, or too new.
    """
    blobs = blobs_of(store.verify(name, version))
    size = sum(blob.size for blob in blobs.values())
    return {"name": name, "version": version, "blobs": len(blobs), "bytes": size}


def render(described: dict[str, Any]) -> str:
    """What `describe` returned, as text for a terminal."""
    software = f"shardserve {described['shardserve']}, jax {described['jax']}"
    lines = [
        f"{described['name']} version {described['version']}"
        + (f"  in {described['store']}" if "store" in described else ""),
        f"  saved {described['created']} by {software}, schema {described['schema']}",
        f"  {_size(described['bytes'])} in {described['blobs']} blobs",
    ]
    if described["warmups"]:
        lines.append(f"  {described['warmups']} warm-up requests")
    for name, signature in described["signatures"].items():
        lines.append(f"signature {name} ({signature['method']})")
        lines += [f"  in   {key}: {text}" for key, text in signature["inputs"].items()]
        lines += [f"  out  {key}: {text}" for key, text in signature["outputs"].items()]
        lines += [f"  call {call}" for call in signature["calls"]]
        if signature["labels"]:
            lines.append(f"  labels {', '.join(signature['labels'])}")
    for name, unit in described["units"].items():
        lines.append(f"unit {name} ({unit['kind']})  {_size(unit['bytes'])}  id {unit['id'][:16]}")
        lines += [
            f"  {key.replace('_', ' ')}: {_plain(value)}"
            for key, value in unit.items()
            if key not in ("kind", "bytes", "id") and value not in ((), [], {}, None)
        ]
    for name, reference in described["references"].items():
        lines.append(f"unit {name} ({reference['kind']})  is {reference['to']}")
    return "\n".join(lines)


def _reference(reference: Reference) -> dict[str, Any]:
    return {
        "to": named(reference),
        "kind": reference.kind,
        "inputs": _specs(reference.inputs),
        "outputs": _specs(reference.outputs),
        **({"row": f"{reference.dtype}[{reference.dim}]"} if reference.kind == "table" else {}),
    }


def _signature(signature: Signature, levels: Sequence[Per]) -> dict[str, Any]:
    calls = [
        f"{index} = {node.unit}{f'.{node.pool}' if node.pool else ''}"
        f"({', '.join(f'{k}={v}' for k, v in node.inputs.items())})"
        + (" once a request" if level == "request" else "")
        for index, (node, level) in enumerate(zip(signature.nodes, levels, strict=True))
    ]
    return {
        "method": signature.method,
        "inputs": _specs(signature.inputs),
        "outputs": {
            name: f"{_spec(spec)} = {signature.returns[name]}"
            for name, spec in signature.outputs.items()
        },
        "calls": calls,
        "labels": list(signature.labels),
    }


def _unit(unit: Unit) -> dict[str, Any]:
    blobs = {blob.digest: blob for blob in unit_blobs(unit)}
    common: dict[str, Any] = {"id": unit.id, "bytes": sum(blob.size for blob in blobs.values())}
    if any(blob.data is not None for blob in blobs.values()):
        common["stored_bytes"] = sum(blob.stored for blob in blobs.values())
    match unit:
        case MapUnit():
            return {"kind": "map", **common, **_map(unit)}
        case TableUnit():
            return {
                "kind": "table",
                **common,
                "rows": unit.rows,
                "row": f"{unit.dtype}[{unit.dim}]"
                + (f", stored as {unit.stored} and a scale" if unit.stored else ""),
                "missing": unit.missing,
                **_form(unit),
                "partitions": [part.rows for part in unit.partitions],
                **_overlays(unit),
            }
        case HostUnit():
            return {
                "kind": "host",
                **common,
                "entry_point": unit.entry_point,
                "inputs": _specs(unit.inputs),
                "outputs": _specs(unit.outputs),
                "files": {name: blob.size for name, blob in unit.files.items()},
                "options": dict(unit.options),
            }
        case CustomUnit():
            return {
                "kind": unit.kind,
                **common,
                "inputs": _specs(unit.inputs),
                "outputs": _specs(unit.outputs),
                "partitions": [
                    sum(blob.size for blob in files.values()) for files in unit.partitions
                ],
                "combine": unit.combine,
                "options": dict(unit.options),
            }
        case _:
            assert_never(unit)


def _form(unit: TableUnit) -> dict[str, Any]:
    """What is not as it usually is: keys that are hashed, rows that are not in ranges."""
    form: dict[str, Any] = {}
    if unit.keys != "rows":
        form["keys"] = unit.keys
    if unit.scheme != "range":
        form["partitioned_by"] = unit.scheme
    if unit.columns:
        form["columns"] = list(unit.columns)
    return form


def _overlays(unit: TableUnit) -> dict[str, Any]:
    """For each partition the rows of its overlays; nothing of a table without any."""
    overlays = [overlay for part in unit.partitions for overlay in part.overlays]
    if not overlays:
        return {}
    return {
        "overlays": [[overlay.rows for overlay in part.overlays] for part in unit.partitions],
        "overlay_rows": sum(overlay.rows for overlay in overlays),
        "overlay_bytes": sum({each.blob.digest: each.blob.size for each in overlays}.values()),
    }


def _map(unit: MapUnit) -> dict[str, Any]:
    return {
        "inputs": _specs(unit.inputs),
        "outputs": _specs(unit.outputs),
        "platforms": sorted({name for program in unit.programs for name in program.platforms}),
        "batch": "any" if unit.programs[0].batch is None else "one program a bucket",
        "batch_buckets": list(unit.batch_buckets),
        "length_buckets": {name: list(sizes) for name, sizes in unit.length_buckets.items()},
        "request_buckets": list(unit.request_buckets),
        "donate": [list(unit.inputs)[index] for index in unit.donate],
        "parameters": len(unit.params),
        "parameter_bytes": sum(leaf_bytes(leaf) for leaf in unit.params),
        "program_bytes": sum(program.blob.size for program in unit.programs),
    }


def _specs(specs: dict[str, Spec]) -> dict[str, str]:
    return {name: _spec(spec) for name, spec in specs.items()}


def _spec(spec: Spec) -> str:
    pad = f" pad {spec.pad:g}" if spec.pad else ""
    per = " per request" if spec.per_request else ""
    return f"{spec.dtype}[{','.join(map(str, spec.shape))}]{pad}{per}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _size(size: int) -> str:
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"
