"""The manifest of a bundle: what a saved version is, as data that refers to blobs.

Everything here is a value that reads from and writes to JSON. Unknown fields are refused, so a
manifest of a newer schema cannot be half understood. Routers read manifests too; nothing here
imports JAX.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from shards.specs import Spec

__all__ = [
    "SCHEMA",
    "BlobRef",
    "Created",
    "CustomUnit",
    "HostUnit",
    "Keys",
    "Leaf",
    "Manifest",
    "MapUnit",
    "Missing",
    "Node",
    "Overlay",
    "Partition",
    "Pool",
    "Program",
    "Reference",
    "Scheme",
    "Signature",
    "Stored",
    "TableUnit",
    "Unit",
    "Warmups",
]

#: 2: tensors and units per request. 3: overlays of partitions. 4: warm-up requests.
#: 5: sparse blobs, look-ups that pool. 6: tables spread by hash or cut by columns, keys that are
#: hashed, default rows. 7: references to units of other servables.
SCHEMA: Final = 7

#: What a table's rows are looked up by: their numbers, or keys that are hashed (`shards.keys`).
Keys = Literal["rows", "hashed", "string"]
#: How rows are given to partitions: ranges of their numbers, ranges of their places after they were
#: spread (`shards.keys`), or all rows to each, of which it has some columns.
Scheme = Literal["range", "hash", "columns"]
Missing = Literal["error", "zero", "default"]


class _Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the manifest's values."""


class BlobRef(_Value, frozen=True, omit_defaults=True):
    """An immutable blob.

    Attributes:
        digest: the hex blake3 of its bytes; of a sparse blob as `shards.sparse` says.
        size: in bytes, holes included.
        data: of a sparse blob, the bytes of its blocks that are not all zeros; None of any other.
    """

    digest: str
    size: int
    data: int | None = None

    @property
    def stored(self) -> int:
        """The bytes that it takes, holes apart."""
        return self.size if self.data is None else self.data


class Leaf(_Value, frozen=True):
    """One parameter array inside a blob, 64-byte aligned at ``offset``."""

    dtype: str
    shape: tuple[int, ...]
    blob: BlobRef
    offset: int = 0


class Program(_Value, frozen=True):
    """A `jax.export` artefact.

    Attributes:
        blob: the serialised artefact.
        platforms: those it was lowered for, e.g. ``("cpu", "cuda", "tpu")``.
        batch: None for a symbolic batch dimension, else the one batch size it was lowered for
            (the fallback where a function cannot be exported with a symbolic batch).
    """

    blob: BlobRef
    platforms: tuple[str, ...]
    batch: int | None = None


class MapUnit(_Value, frozen=True, tag="map"):
    """Rows in, rows out, on a device: ``program(params, *inputs) -> outputs``.

    Where some inputs are per request, the program takes these as ``[requests, ...]``, and after all
    inputs an ``int32[batch]``: which of the requests each row belongs to.

    Attributes:
        id: identity of the unit: equal for equal computations over equal weights.
        inputs: in the order in which the program takes them.
        outputs: in the order in which the program returns them.
        programs: one with a symbolic batch, or one per batch bucket.
        params: leaves in the order in which the program takes them, before the inputs.
        batch_buckets: batch sizes to compile, ascending.
        length_buckets: for every other symbol the sizes to compile, ascending; the last is the
            limit of that symbol.
        donate: indices of inputs whose buffers the program may reuse.
        request_buckets: where some inputs are per request: numbers of requests in a batch to
            compile for, ascending, each for the batch sizes above it; a batch of as many requests
            as rows is always compiled. () for other units.
    """

    id: str
    inputs: dict[str, Spec]
    outputs: dict[str, Spec]
    programs: tuple[Program, ...]
    params: tuple[Leaf, ...]
    batch_buckets: tuple[int, ...]
    length_buckets: dict[str, tuple[int, ...]] = {}
    donate: tuple[int, ...] = ()
    request_buckets: tuple[int, ...] = ()

    @property
    def per_request(self) -> tuple[bool, ...]:
        """For each input whether it is per request; () where none is."""
        found = tuple(spec.per_request for spec in self.inputs.values())
        return found if True in found else ()

    @property
    def program_inputs(self) -> tuple[Spec, ...]:
        """What the program takes after its parameters, the index of requests included."""
        inputs = tuple(self.inputs.values())
        return (*inputs, Spec(inputs[0].shape[:1], "int32")) if self.per_request else inputs

    def requests_of(self, batch: int) -> tuple[int, ...]:
        """For which numbers of requests a batch of this size is compiled; () if none matters."""
        if not self.per_request:
            return ()
        return (*(count for count in self.request_buckets if count < batch), batch)


class Overlay(_Value, frozen=True):
    """Rows that replace some of a partition's; `shards.overlays` says what its blob looks like."""

    rows: int
    blob: BlobRef


class Partition(_Value, frozen=True):
    """Consecutive rows ``[first_row, first_row + rows)`` of a table; of columns, all of its rows.

    Attributes:
        first_row: in the order in which rows lie (`TableUnit.scheme`).
        blob: the base: raw row-major bytes of every row.
        overlays: rows that replace the base's; of two for one row the later wins.
    """

    first_row: int
    rows: int
    blob: BlobRef
    overlays: tuple[Overlay, ...] = ()

    @property
    def blobs(self) -> tuple[BlobRef, ...]:
        """The base's, then the overlays'."""
        return (self.blob, *(overlay.blob for overlay in self.overlays))


class TableUnit(_Value, frozen=True, tag="table"):
    """A table of rows of one shape, looked up by integer id or by a key.

    Attributes:
        id: identity: hash of dtype, dim and the digests of the partitions and their overlays.
        missing: what an id outside ``[0, rows)`` yields: ``error`` fails the request, ``zero``
            yields a row of zeros and ``default`` the default row, and both are counted.
        stored: how rows lie in blobs, where that is not as `dtype` (`shards.stored_rows`).
        scheme: which rows, or columns, each partition has.
        columns: of the scheme ``columns``: how many each partition has; () of any other.
        keys: what rows are looked up by. Every key has a row, so none is missing.
        default: the row of what is missing, where that is declared; else ().
    """

    id: str
    dtype: str
    dim: int
    rows: int
    partitions: tuple[Partition, ...]
    missing: Missing = "error"
    stored: Stored | None = None
    scheme: Scheme = "range"
    columns: tuple[int, ...] = ()
    keys: Keys = "rows"
    default: tuple[float, ...] = ()

    def piece(self, partition: int) -> TableUnit:
        """A partition of columns as the narrow table that it is to whoever holds it.

        Its id is `shards.orders.part_address` of this one's.
        """
        start = sum(self.columns[:partition])
        width = self.columns[partition]
        return msgspec.structs.replace(
            self,
            id=f"{self.id}/{partition}",
            dim=width,
            partitions=(self.partitions[partition],),
            scheme="range",
            columns=(),
            default=self.default[start : start + width],
        )


class HostUnit(_Value, frozen=True, tag="host"):
    """Pre- or post-processing by a registered entry point, run in a worker process per request.

    Attributes:
        id: identity: hash of entry point, options and files.
        entry_point: ``"module:attribute"``, importable and on the workers' allow-list. The
            attribute is called once with ``(files: dict[str, bytes], options: dict)`` and returns a
            callable from ``dict[str, ndarray]`` to ``dict[str, ndarray]``.
        files: file name to blob.
        options: plain JSON values.
    """

    id: str
    entry_point: str
    inputs: dict[str, Spec]
    outputs: dict[str, Spec]
    files: dict[str, BlobRef] = {}
    options: dict[str, str | int | float | bool] = {}


class CustomUnit(_Value, frozen=True, tag="custom"):
    """A unit of a kind that an installed package registered: rows in, rows out, on shard actors.

    Attributes:
        id: identity: hash of kind, combine, options and the partitions' files.
        kind: a name of `shards.custom.UNIT_KINDS`.
        partitions: for each its files, by name. Every partition is asked the same.
        combine: a name of `shards.combines.COMBINES`: how the partitions' answers become one. ""
            where there is one partition.
        options: plain JSON values.
    """

    id: str
    kind: str
    inputs: dict[str, Spec]
    outputs: dict[str, Spec]
    partitions: tuple[dict[str, BlobRef], ...]
    combine: str = ""
    options: dict[str, str | int | float | bool] = {}


Unit = MapUnit | TableUnit | HostUnit | CustomUnit

Pool = Literal["sum", "mean", "max"]

Stored = Literal["int8"]


class Reference(_Value, frozen=True, omit_defaults=True):
    """A unit of another servable, and what is relied on of it (`shards.references`).

    Attributes:
        servable: whose unit it is.
        unit: its name there.
        version: which is meant; None where a label says.
        label: as the cluster declares it; "" where a version is meant.
        kind: what sort of unit it is.
        inputs: of any but a table, in order.
        outputs: of any but a table, in order.
        lengths: of a unit on a device: for every symbol but the batch the largest size.
        dtype: of a table's rows.
        dim: of a table's rows.
        keys: what rows of a table are looked up by.
    """

    servable: str
    unit: str
    version: int | None = None
    label: str = ""
    kind: Literal["map", "table", "host", "custom"] = "map"
    inputs: dict[str, Spec] = {}
    outputs: dict[str, Spec] = {}
    lengths: dict[str, int] = {}
    dtype: str = ""
    dim: int = 0
    keys: Keys = "rows"


class Node(_Value, frozen=True):
    """One call of a unit inside a signature.

    Attributes:
        unit: the unit's local name, a key of `Manifest.units` or of `Manifest.references`.
        inputs: the unit's input name to a value: ``"in:NAME"`` for an input of the signature, or
            ``"N:NAME"`` for output NAME of node N (nodes are in topological order).
            A table has one input, ``ids`` (integers or text of any shape), and one output, ``rows``
            (the shape of ids plus the row dimension).
        pool: of a table: what becomes of the rows of each bag of ids, which is the last dimension
            of ``ids``; the row dimension then takes its place. An id of -1, or "", is none. Sums
            may have an input ``weights`` of the shape of ``ids``. Rows that are pooled are float32.
    """

    unit: str
    inputs: dict[str, str]
    pool: Pool | None = None


class Signature(_Value, frozen=True):
    """A named, typed entry into a servable.

    Attributes:
        method: ``classify`` signatures yield ``scores`` [b, k] (and may yield ``classes`` [b, k]
            strings); ``regress`` signatures yield ``outputs`` [b] or [b, 1].
        inputs: name to spec, in declared order.
        outputs: name to spec, in declared order.
        returns: output name to a value, written as in `Node.inputs`.
        labels: for ``classify``: the label of each of the k scores, or empty.
    """

    method: Literal["predict", "classify", "regress"]
    inputs: dict[str, Spec]
    outputs: dict[str, Spec]
    nodes: tuple[Node, ...]
    returns: dict[str, str]
    labels: tuple[str, ...] = ()


class Created(_Value, frozen=True):
    """Which software wrote the bundle, and when (ISO 8601, UTC)."""

    shardserve: str
    jax: str
    at: str


class Warmups(_Value, frozen=True):
    """Requests that a version answers before it is available (`shards.recorded`)."""

    requests: int
    blob: BlobRef


class Manifest(_Value, frozen=True):
    """One servable version. Keys of `units` are local names; identities are inside.

    Those of `references` are local names, too, of units that other servables have.
    """

    schema: int
    name: str
    version: int
    units: dict[str, Unit]
    signatures: dict[str, Signature]
    created: Created
    warmups: Warmups | None = None
    references: dict[str, Reference] = {}
