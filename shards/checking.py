"""From the bytes of a manifest to a manifest that may be trusted to be consistent.

Decides which bytes are a manifest of ours, and whether everything it names exists inside it: so
that nobody downstream needs to ask whether a node's unit is there or a leaf fits into its blob.
Does not know where the bytes come from, nor whether the blobs are there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Final, assert_never

import msgspec

from shards.errors import BundleCorrupt, BundleForeign, SpecMismatch
from shards.levels import node_levels
from shards.manifest import (
    SCHEMA,
    BlobRef,
    CustomUnit,
    HostUnit,
    Leaf,
    Manifest,
    MapUnit,
    Node,
    Reference,
    Signature,
    TableUnit,
    Unit,
    Warmups,
)
from shards.pooling import POOLED_DTYPES
from shards.recorded import BYTES_MAX, REQUESTS_MAX
from shards.references import units_called
from shards.sparse import BLOCK
from shards.specs import DTYPES, STRING, dtype_of
from shards.stored_rows import row_bytes

__all__ = [
    "ALIGNMENT",
    "ENTRY_POINT",
    "OVERLAYS_MAX",
    "blobs_of",
    "check_manifest",
    "decode_manifest",
    "encode_manifest",
    "leaf_bytes",
    "overlay_offset",
    "unit_blobs",
]

#: Every leaf starts at a multiple of this: XLA maps aligned host memory without a copy.
ALIGNMENT: Final = 64

#: Overlays that a partition may have: each is a mapping, and where there are several each row that
#: is replaced takes memory of its own. A delta that would make one more folds them into one.
OVERLAYS_MAX: Final = 8

# Made here, while one thread imports: msgspec lays a type out when it is first decoded, and another
# thread that decodes it meanwhile ends the process.
_MANIFESTS: Final = msgspec.json.Decoder(Manifest)

#: ``module:attribute``.
ENTRY_POINT: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON for people and programs."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Read a manifest and check that it is consistent.

    Args:
        data: the bytes of ``servable.json``.
        where: how error messages name it.

    Raises:
        BundleCorrupt: not JSON, or ours but broken.
        BundleForeign: JSON that is not ours, or of a schema that this code does not read.
    """
    try:
        header = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BundleCorrupt(f"{where}: the manifest is not JSON: {error}") from None
    schema = header.get("schema") if isinstance(header, dict) else None
    if type(schema) is not int or schema < 1:
        raise BundleForeign(f"{where}: not a bundle manifest: it has no schema number")
    if schema > SCHEMA:
        raise BundleForeign(
            f"{where}: written with manifest schema {schema}, this version of shardserve reads "
            f"up to schema {SCHEMA}: upgrade it, or save the bundle with an older one"
        )
    try:
        manifest = _MANIFESTS.decode(data)
    except (msgspec.DecodeError, ValueError) as error:
        raise BundleCorrupt(f"{where}: the manifest does not parse: {error}") from None
    check_manifest(manifest, where)
    return manifest


def leaf_bytes(leaf: Leaf) -> int:
    """How many bytes a leaf takes inside its blob."""
    return math.prod(leaf.shape) * dtype_of(leaf.dtype).itemsize


def overlay_offset(rows: int) -> int:
    """Where the rows begin in the blob of an overlay: behind their positions, aligned."""
    return -(-8 * rows // ALIGNMENT) * ALIGNMENT


def unit_blobs(unit: Unit) -> Iterator[BlobRef]:
    """Every blob a unit refers to, in order, with repetitions."""
    match unit:
        case MapUnit():
            yield from (program.blob for program in unit.programs)
            yield from (leaf.blob for leaf in unit.params)
        case TableUnit():
            yield from (blob for partition in unit.partitions for blob in partition.blobs)
        case HostUnit():
            yield from unit.files.values()
        case CustomUnit():
            yield from (blob for files in unit.partitions for blob in files.values())
        case _:
            assert_never(unit)


def blobs_of(manifest: Manifest) -> dict[str, BlobRef]:
    """Every blob of a bundle once, by digest, in order of first mention."""
    found = {blob.digest: blob for unit in manifest.units.values() for blob in unit_blobs(unit)}
    if manifest.warmups is not None:
        found.setdefault(manifest.warmups.blob.digest, manifest.warmups.blob)
    return found


def check_manifest(manifest: Manifest, where: str) -> None:
    """Hold a manifest against itself.

    Raises:
        BundleCorrupt: says what does not fit, and where.
    """
    if not manifest.signatures:
        raise BundleCorrupt(f"{where}: no signature")
    for name, unit in manifest.units.items():
        _check_unit(unit, f"{where}: unit {name!r}")
    for name, reference in manifest.references.items():
        _check_reference(manifest, name, reference, f"{where}: reference {name!r}")
    called = units_called(manifest)
    for name, signature in manifest.signatures.items():
        _check_signature(signature, called, f"{where}: signature {name!r}")
    if manifest.warmups is not None:
        _check_warmups(manifest.warmups, f"{where}: warm-up requests")


def _check_blob(blob: BlobRef, where: str) -> None:
    # A digest becomes a file name: anything else could name a file outside the store.
    data_max = -(-max(blob.size, 0) // BLOCK) * BLOCK
    sound = blob.data is None or (0 <= blob.data <= data_max and blob.data % BLOCK == 0)
    if not _DIGEST.fullmatch(blob.digest) or blob.size < 0 or not sound:
        raise BundleCorrupt(f"{where}: {blob.digest!r} of {blob.size} bytes is not a blob")


def _check_reference(manifest: Manifest, name: str, reference: Reference, where: str) -> None:
    if name in manifest.units:
        raise BundleCorrupt(f"{where} has the name of a unit")
    if reference.servable == manifest.name or not reference.servable or not reference.unit:
        raise BundleCorrupt(f"{where} means no unit of another servable")
    version = reference.version
    if (version is None) != bool(reference.label) or (version is not None and version < 1):
        raise BundleCorrupt(f"{where} means neither a version nor a label, or both")
    if reference.kind == "table":
        is_described = reference.dtype in DTYPES and reference.dim >= 1
    else:
        is_described = bool(reference.inputs and reference.outputs)
    if not is_described:
        raise BundleCorrupt(f"{where} does not say what the {reference.kind} unit is given")


def _check_warmups(warmups: Warmups, where: str) -> None:
    _check_blob(warmups.blob, where)
    if not 1 <= warmups.requests <= REQUESTS_MAX or warmups.blob.size > BYTES_MAX:
        raise BundleCorrupt(
            f"{where}: {warmups.requests} in {warmups.blob.size} bytes; at most {REQUESTS_MAX} in "
            f"{BYTES_MAX} are read"
        )


def _check_unit(unit: Unit, where: str) -> None:
    for blob in unit_blobs(unit):
        _check_blob(blob, where)
    match unit:
        case MapUnit():
            _check_map(unit, where)
        case TableUnit():
            _check_table(unit, where)
        case HostUnit():
            if not ENTRY_POINT.fullmatch(unit.entry_point):
                raise BundleCorrupt(f"{where}: {unit.entry_point!r} is not an entry point")
            _check_off_device(unit, where)
        case CustomUnit():
            if not unit.inputs or not unit.outputs or not unit.partitions:
                raise BundleCorrupt(f"{where}: has no input, no output or no partition")
            if len(unit.partitions) > 1 and not unit.combine:
                raise BundleCorrupt(f"{where}: has several partitions and no combine")
            _check_off_device(unit, where)
        case _:
            assert_never(unit)


def _check_map(unit: MapUnit, where: str) -> None:
    if not unit.programs or not unit.inputs or not unit.outputs:
        raise BundleCorrupt(f"{where}: has no program, no input or no output")
    if any(spec.dtype == STRING for spec in (*unit.inputs.values(), *unit.outputs.values())):
        raise BundleCorrupt(f"{where}: a device does not take strings")
    requests = (unit.request_buckets,) if unit.per_request else ()
    ladders = (unit.batch_buckets, *unit.length_buckets.values(), *requests)
    if any(not ladder or list(ladder) != sorted({*ladder}) or ladder[0] < 1 for ladder in ladders):
        raise BundleCorrupt(f"{where}: buckets must be positive and ascending")
    per_request = [spec.per_request for spec in unit.inputs.values()]
    if all(per_request) or any(spec.per_request for spec in unit.outputs.values()):
        raise BundleCorrupt(f"{where}: every input, or an output, is declared per request")
    if unit.request_buckets and not unit.per_request:
        raise BundleCorrupt(f"{where}: has buckets of requests, and no input per request")
    if any(not 0 <= index < len(unit.inputs) for index in unit.donate):
        raise BundleCorrupt(f"{where}: donates an input it does not have")
    batches = [program.batch for program in unit.programs]
    if batches != [None] and batches != list(unit.batch_buckets):
        raise BundleCorrupt(f"{where}: programs for batches {batches}, not one for every bucket")
    for index, leaf in enumerate(unit.params):
        try:
            end = leaf.offset + leaf_bytes(leaf)
        except SpecMismatch as error:
            raise BundleCorrupt(f"{where}: parameter {index}: {error}") from None
        fits = leaf.dtype != STRING and min((0, *leaf.shape)) == 0 and end <= leaf.blob.size
        if not fits or leaf.offset < 0 or leaf.offset % ALIGNMENT:
            raise BundleCorrupt(f"{where}: parameter {index} does not fit into its blob")


def _check_off_device(unit: HostUnit | CustomUnit, where: str) -> None:
    specs = (*unit.inputs.values(), *unit.outputs.values())
    if any(spec.per_request for spec in specs):
        raise BundleCorrupt(
            f"{where}: only units on a device take inputs per request beside others"
        )


def _check_table(unit: TableUnit, where: str) -> None:
    if unit.dtype == STRING or unit.dtype not in DTYPES or unit.dim < 1 or not unit.partitions:
        raise BundleCorrupt(f"{where}: {unit.dtype!r} x {unit.dim} is not a row of a table")
    if unit.stored is not None and unit.dtype != "float32":
        raise BundleCorrupt(f"{where}: {unit.stored} is not a way to store {unit.dtype}")
    _check_form(unit, where)
    row, at = row_bytes(unit), 0
    for index, partition in enumerate(unit.partitions):
        if unit.columns:
            # Each has all rows, and some columns of them.
            row, at = row_bytes(unit.piece(index)), 0
        if partition.first_row != at or partition.rows < 0:
            raise BundleCorrupt(f"{where}: partition {index} does not begin at row {at}")
        if partition.blob.size != partition.rows * row:
            raise BundleCorrupt(
                f"{where}: partition {index} has {partition.rows} rows of {row} bytes, its blob "
                f"{partition.blob.size} bytes"
            )
        if len(partition.overlays) > OVERLAYS_MAX:
            raise BundleCorrupt(
                f"{where}: partition {index} has {len(partition.overlays)} overlays, at most "
                f"{OVERLAYS_MAX} are read"
            )
        for overlay in partition.overlays:
            fits = 1 <= overlay.rows <= partition.rows
            if not fits or overlay.blob.size != overlay_offset(overlay.rows) + overlay.rows * row:
                raise BundleCorrupt(
                    f"{where}: an overlay of {overlay.rows} rows in {overlay.blob.size} bytes does "
                    f"not fit partition {index}, which has {partition.rows} rows of {row} bytes"
                )
        at += partition.rows
        if unit.columns and at != unit.rows:
            raise BundleCorrupt(f"{where}: partition {index} holds {at} rows, not {unit.rows}")
    if at != unit.rows:
        raise BundleCorrupt(f"{where}: the partitions hold {at} rows, not {unit.rows}")


def _check_form(unit: TableUnit, where: str) -> None:
    # What is whole is known by the unit's own id, its only piece would not be.
    is_cut = sum(unit.columns) == unit.dim and min(unit.columns, default=0) > 0
    is_cut = is_cut and len(unit.columns) > 1
    if (unit.scheme == "columns") != bool(unit.columns) or (
        unit.columns and (not is_cut or len(unit.columns) != len(unit.partitions) or unit.rows < 1)
    ):
        raise BundleCorrupt(
            f"{where}: {len(unit.partitions)} partitions by {unit.scheme} of {unit.dim} columns "
            f"are not {list(unit.columns)}"
        )
    if (unit.missing == "default") != bool(unit.default) or (
        unit.default and len(unit.default) != unit.dim
    ):
        raise BundleCorrupt(f"{where}: a default row of {len(unit.default)} is not {unit.missing}")
    if unit.keys != "rows" and unit.rows < 1:
        raise BundleCorrupt(f"{where}: keys of a table without rows")


def _names(unit: Unit, node: Node, where: str) -> tuple[set[str], set[str]]:
    """The names of what a call gives a unit, and of its outputs."""
    if isinstance(unit, TableUnit):
        if node.pool is not None and unit.dtype not in POOLED_DTYPES:
            raise BundleCorrupt(f"{where} pools rows of {unit.dtype}, which cannot be")
        is_weighted = node.pool == "sum" and "weights" in node.inputs
        return {"ids", "weights"} if is_weighted else {"ids"}, {"rows"}
    if node.pool is not None:
        raise BundleCorrupt(f"{where} pools what is no table")
    return {*unit.inputs}, {*unit.outputs}


def _check_signature(signature: Signature, units: Mapping[str, Unit], where: str) -> None:
    known = {f"in:{name}" for name in signature.inputs}
    for index, node in enumerate(signature.nodes):
        unit = units.get(node.unit)
        if unit is None:
            raise BundleCorrupt(f"{where}: node {index} calls {node.unit!r}, which is no unit")
        inputs, outputs = _names(unit, node, f"{where}: node {index}")
        if node.inputs.keys() != inputs:
            raise BundleCorrupt(
                f"{where}: node {index} gives {node.unit!r} the inputs {sorted(node.inputs)}, "
                f"it takes {sorted(inputs)}"
            )
        for value in node.inputs.values():
            if value not in known:  # also refuses a node that reads a later one
                raise BundleCorrupt(f"{where}: node {index} reads {value!r}, which is not there")
        known |= {f"{index}:{name}" for name in outputs}
    for name, value in signature.returns.items():
        if value not in known:
            raise BundleCorrupt(f"{where}: output {name!r} is {value!r}, which is not there")
    if signature.returns.keys() != signature.outputs.keys():
        raise BundleCorrupt(f"{where}: returns do not match the declared outputs")
    try:
        node_levels(signature, units)
    except SpecMismatch as error:
        raise BundleCorrupt(f"{where}: {error.message}") from None
