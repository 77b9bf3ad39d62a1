"""Writing bundles: units, tables and signatures composed in Python, committed whole or not at all.

    with shards.Bundle.create("store", "ranker", version=7) as bundle:
        words = bundle.table("words", rows, partitions=4)
        trunk = bundle.unit("trunk", trunk_fn, trunk_params, inputs={"x": shards.Spec(("b", 64))})

        @bundle.signature("serving_default", inputs={"ids": shards.Spec(("b",), "int32")})
        def score(ids):
            return {"outputs": trunk(words.rows(ids))}

Decides what goes into a manifest. Blobs are written as units are added; the manifest, which makes
the version exist, is written on a clean exit only. Blobs that an abandoned bundle leaves behind are
harmless: they are named by their content. JAX is imported only where a function is exported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from batching.errors import FailedPrecondition, InvalidArgument
from shards.checking import ENTRY_POINT, check_manifest
from shards.converting import convert
from shards.cutting import Rows
from shards.identity import custom_identity, host_identity, map_identity
from shards.leaves import digest_of_leaf, put_leaves
from shards.manifest import (
    SCHEMA,
    BlobRef,
    CustomUnit,
    HostUnit,
    Keys,
    Manifest,
    MapUnit,
    Missing,
    Program,
    Scheme,
    Signature,
    Unit,
    Warmups,
)
from shards.provenance import created_now, plain_options, refuse_per_request
from shards.recorded import Recorded
from shards.referring import Referring
from shards.sparse_rows import SparseRows
from shards.specs import Spec
from shards.store import Store, check_name, new_version, open_store, read
from shards.table_saving import TableForm, put_table
from shards.tracing import (
    Method,
    TableCall,
    UnitCall,
    annotated,
    check_parameters,
    trace,
)
from shards.warmups import put_warmups

if TYPE_CHECKING:
    from shards.delta import Delta

__all__ = ["Bundle"]

_F = TypeVar("_F", bound=Callable[..., Any])

_UNIT_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,127}")
_SIGNATURE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,127}")


class Bundle(Referring):
    """A bundle that is being written; use `Bundle.create` in a ``with`` statement.

    Attributes:
        name: of the servable.
        version: of the servable.
        notices: what was not done as asked, and why, for people.
    """

    def __init__(self, store: Store, name: str, version: int, *, overwrite: bool = False) -> None:
        super().__init__(store, name)
        self.version = version
        self.notices: list[str] = []
        self._overwrite = overwrite
        self._units: dict[str, Unit] = {}
        self._signatures: dict[str, Signature] = {}
        self._recorded: list[Recorded] = []
        self._manifest: Manifest | None = None

    @classmethod
    def create(
        cls,
        store: str | Path | Store,
        name: str,
        version: int | None = None,
        *,
        overwrite: bool = False,
    ) -> Bundle:
        """Begin a version.

        Args:
            store: the store or its path; a directory is made if need be.
            name: of the servable.
            version: a positive integer; None for one more than the highest there is.
            overwrite: replace a version that exists. Those who serve it are not told.

        Raises:
            InvalidArgument: the name or version may not be used.
            FailedPrecondition: the version exists.
        """
        opened = open_store(store)
        check_name(name)
        opened.create()
        number = new_version(opened, name, version, overwrite=overwrite)
        return cls(opened, name, number, overwrite=overwrite)

    @staticmethod
    def delta(
        store: str | Path | Store,
        name: str,
        base: int | None = None,
        version: int | None = None,
        *,
        overwrite: bool = False,
    ) -> Delta:
        """Begin a version that is another one but for some rows of tables, or some units.

        Args:
            store: the store or its path.
            name: of the servable.
            base: which version it begins as; None for the highest.
            version: as in `create`.
            overwrite: as in `create`.

        Raises:
            InvalidArgument: the version may not be used.
            FailedPrecondition: the version exists.
            BundleNotFound: there is no such base.
            ServingError: whatever is wrong with the base.
        """
        from shards.delta import Delta

        opened = open_store(store)
        manifest = read(opened, name, base)
        number = new_version(opened, name, version, overwrite=overwrite)
        return Delta(opened, manifest, number, overwrite=overwrite)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.commit()

    @property
    def manifest(self) -> Manifest:
        """The manifest, once it is committed.

        Raises:
            FailedPrecondition: it is not.
        """
        if self._manifest is None:
            raise FailedPrecondition(f"{self.name}/{self.version} is not committed yet")
        return self._manifest

    # --- units ---------------------------------------------------------------------------------

    def unit(
        self,
        name: str,
        fn: Callable[..., Any],
        params: Any,
        *,
        inputs: Mapping[str, Spec],
        batch_buckets: Sequence[int] | None = None,
        length_buckets: Mapping[str, Sequence[int]] | None = None,
        request_buckets: Sequence[int] | None = None,
        donate: Sequence[str | int] = (),
        platforms: Sequence[str] | None = None,
    ) -> UnitCall:
        """Add a function over rows, ``fn(params, **inputs)``; see `exporting.export_unit`.

        Returns:
            The unit, to be called in a signature function.

        Raises:
            InvalidArgument: the name is taken, or buckets and inputs do not fit together.
            SpecMismatch: a dtype or shape that cannot be served.
            ExportFailed: JAX refused the function.
        """
        from shards.exporting import BATCH_BUCKETS, PLATFORMS, REQUEST_BUCKETS, export_unit

        self._check_new(name)
        exported = export_unit(
            fn,
            params,
            inputs,
            batch_buckets=BATCH_BUCKETS if batch_buckets is None else batch_buckets,
            length_buckets=length_buckets,
            request_buckets=REQUEST_BUCKETS if request_buckets is None else request_buckets,
            donate=donate,
            platforms=PLATFORMS if platforms is None else platforms,
        )
        self.notices += [f"unit {name!r}: {notice}" for notice in exported.notices]
        leaves = put_leaves(self._store, exported.leaves)
        pairs = zip(exported.leaves, leaves, strict=True)
        digests = [digest_of_leaf(array, leaf) for array, leaf in pairs]
        identity = map_identity(
            [artefact.text for artefact in exported.programs],
            exported.inputs.values(),
            exported.outputs.values(),
            exported.donate,
            [
                (leaf.dtype, leaf.shape, digest)
                for leaf, digest in zip(leaves, digests, strict=True)
            ],
        )
        self._units[name] = MapUnit(
            id=identity,
            inputs=exported.inputs,
            outputs=exported.outputs,
            programs=tuple(
                Program(
                    blob=self._store.put(artefact.data),
                    platforms=artefact.platforms,
                    batch=artefact.batch,
                )
                for artefact in exported.programs
            ),
            params=leaves,
            batch_buckets=exported.batch_buckets,
            length_buckets=exported.length_buckets,
            donate=exported.donate,
            request_buckets=exported.request_buckets,
        )
        return UnitCall(name, exported.inputs, exported.outputs)

    def table(
        self,
        name: str,
        rows: Rows | SparseRows,
        *,
        partitions: int = 1,
        partition: Scheme = "range",
        keys: Keys = "rows",
        missing: Missing = "error",
        default: Any = None,
        dtype: str | None = None,
    ) -> TableCall:
        """Add a table whose rows are looked up by their number, or by a key.

        Args:
            name: of the unit.
            rows: an array ``[rows, dim]``; or, for ranges, a callable from a partition's index to
                its rows: an array, or an iterable of arrays; or `SparseRows`, of a table that is
                mostly zeros.
            partitions: how many pieces; a piece is the least that a shard can hold. A table of one
                lies whole on one shard.
            partition: how rows come to pieces: consecutive ones (``range``); spread by a fixed
                permutation, so that neighbours are apart and pieces are asked alike (``hash``); or
                all rows to each, which has some of their columns (``columns``).
            keys: what rows are looked up by: their numbers (``rows``); any integers (``hashed``) or
                text (``string``), which `shards.hashed_rows` makes into numbers. Several keys may
                then have one row, and none is missing.
            missing: what an id outside the table does: fail the request, or yield zeros, or
                (``default``) the default row.
            default: that row, ``[dim]``.
            dtype: what rows of floats are saved as: ``float32``, ``float16``, ``bfloat16``; or
                ``int8``, with a scale for each row, which are looked up as float32. None saves
                them as they are.

        Returns:
            The table, whose ``rows(ids)`` is called in a signature function.

        Raises:
            InvalidArgument: the name is taken, or there is nothing to cut.
            SpecMismatch: rows of different widths or dtypes, or of a dtype that cannot be saved.
        """
        self._check_new(name)
        form = TableForm(partition, partitions, keys, missing, default, dtype)
        unit = put_table(self._store, name, rows, form)
        self._units[name] = unit
        return TableCall(name, unit.dim, unit.dtype, unit.keys)

    def host(
        self,
        name: str,
        entry_point: str,
        *,
        inputs: Mapping[str, Spec],
        outputs: Mapping[str, Spec],
        files: Mapping[str, str | Path | bytes] | None = None,
        options: Mapping[str, str | int | float | bool] | None = None,
    ) -> UnitCall:
        """Add pre- or post-processing that runs in a worker process, by name only.

        Args:
            name: of the unit.
            entry_point: ``"module:attribute"``. It is not imported here; workers import it if it
                is on their allow-list, and call it once with ``(files, options)``.
            inputs: input name to spec; strings are allowed.
            outputs: output name to spec.
            files: file name to its path or content.
            options: plain values.

        Raises:
            InvalidArgument: the name is taken, or something is not what it must be.
        """
        self._check_new(name)
        if not ENTRY_POINT.fullmatch(entry_point):
            raise InvalidArgument(f"host unit {name!r}: {entry_point!r} is not 'module:attribute'")
        if not inputs or not outputs:
            raise InvalidArgument(f"host unit {name!r} needs inputs and outputs")
        refuse_per_request(name, inputs, outputs)
        refs = self._put_files(files or {})
        plain = plain_options(name, options)
        self._units[name] = HostUnit(
            id=host_identity(entry_point, plain, refs),
            entry_point=entry_point,
            inputs=dict(inputs),
            outputs=dict(outputs),
            files=refs,
            options=plain,
        )
        return UnitCall(name, inputs, outputs)

    def custom(
        self,
        name: str,
        kind: str,
        partitions: Sequence[Mapping[str, str | Path | bytes]],
        *,
        inputs: Mapping[str, Spec],
        outputs: Mapping[str, Spec],
        combine: str = "",
        options: Mapping[str, str | int | float | bool] | None = None,
    ) -> UnitCall:
        """Add a unit of a kind that an installed package registered (`shards.custom`).

        Args:
            name: of the unit.
            kind: as it is registered. It need not be installed here, but where it is served.
            partitions: for each the files that it is opened from: file name to path or content.
            inputs: input name to spec; every partition is given all of them.
            outputs: output name to spec, of each partition and of the whole.
            combine: how the partitions' answers become one: ``sum``, ``mean``, ``max``,
                ``concat``, ``topk`` or a registered name; needed for several partitions.
            options: plain values.

        Raises:
            InvalidArgument: the name is taken, or something is not what it must be.
        """
        self._check_new(name)
        if not inputs or not outputs or not partitions:
            raise InvalidArgument(f"unit {name!r} needs inputs, outputs and partitions")
        if len(partitions) > 1 and not combine:
            raise InvalidArgument(f"unit {name!r} has {len(partitions)} partitions, no combine")
        refuse_per_request(name, inputs, outputs)
        plain = plain_options(name, options)
        parts = tuple(self._put_files(files) for files in partitions)
        self._units[name] = CustomUnit(
            id=custom_identity(kind, combine, plain, parts),
            kind=kind,
            inputs=dict(inputs),
            outputs=dict(outputs),
            partitions=parts,
            combine=combine,
            options=plain,
        )
        return UnitCall(name, inputs, outputs)

    def _put_files(self, files: Mapping[str, str | Path | bytes]) -> dict[str, BlobRef]:
        return {
            name: self._store.put(
                content if isinstance(content, bytes) else Path(content).read_bytes()
            )
            for name, content in files.items()
        }

    def _check_new(self, name: str) -> None:
        if not _UNIT_NAME.fullmatch(name):
            raise InvalidArgument(f"{name!r} is not a unit name")
        super()._check_new(name)
        if name in self._units:
            raise InvalidArgument(f"the bundle has a unit {name!r} already")

    # --- signatures ----------------------------------------------------------------------------

    def signature(
        self,
        name: str = "serving_default",
        *,
        method: Method = "predict",
        inputs: Mapping[str, Spec] | None = None,
        labels: Sequence[str] = (),
    ) -> Callable[[_F], _F]:
        """Decorate the function that says how a signature's answer is made of units.

        Args:
            name: of the signature.
            method: ``predict``, ``classify`` or ``regress``.
            inputs: input name to spec; None takes the annotations of the function's parameters,
                as in ``def embed(text: shards.Spec(("b",), "string"))``.
            labels: for classify: the label of each score.

        Raises:
            InvalidArgument: the name is taken, or the function does not fit its inputs or method.
            SpecMismatch: values do not fit the units they are given to.
        """

        def decorate(fn: _F) -> _F:
            specs = annotated(fn) if inputs is None else inputs
            self._add_signature(name, fn, specs, method, labels)
            return fn

        return decorate

    def _add_signature(
        self,
        name: str,
        fn: Callable[..., Any],
        inputs: Mapping[str, Spec],
        method: Method,
        labels: Sequence[str],
    ) -> None:
        if not _SIGNATURE_NAME.fullmatch(name):
            raise InvalidArgument(f"{name!r} is not a signature name")
        if name in self._signatures:
            raise InvalidArgument(f"the bundle has a signature {name!r} already")
        if method not in ("predict", "classify", "regress"):
            raise InvalidArgument(f"{method!r} is not predict, classify or regress")
        check_parameters(fn, inputs)
        self._signatures[name] = trace(fn, inputs, method, tuple(labels))

    def warmup(self, signature: str, inputs: Mapping[str, Any]) -> None:
        """Add a request that a version answers, wherever it is loaded, before it is available.

        Args:
            signature: one that the bundle has.
            inputs: by name, as a client would send them; copied, and kept until the bundle is
                committed.

        Raises:
            InvalidArgument: no such signature, or the inputs are not what it takes.
        """
        known = self._signatures.get(signature)
        if known is None:
            raise InvalidArgument(f"the bundle has no signature {signature!r} to warm up")
        arrays, rows = convert(known.inputs, inputs)
        if rows < 1:
            raise InvalidArgument("a warm-up request needs at least one row")
        copied = {name: array.copy() for name, array in arrays.items()}
        self._recorded.append(Recorded(signature=signature, inputs=copied))

    def _put_warmups(self) -> Warmups | None:
        return put_warmups(self._store, self._recorded, f"{self.name}/{self.version}")

    def commit(self) -> Manifest:
        """Write the manifest, which makes the version exist. Called by a clean ``with`` exit.

        Raises:
            FailedPrecondition: the version exists by now, or the bundle has no signature.
            InvalidArgument: there are more warm-up requests than a bundle may have.
        """
        if not self._signatures:
            raise FailedPrecondition(f"{self.name}/{self.version} has no signature")
        manifest = Manifest(
            schema=SCHEMA,
            name=self.name,
            version=self.version,
            units=dict(self._units),
            signatures=dict(self._signatures),
            created=created_now(),
            warmups=self._put_warmups(),
            references=dict(self._references),
        )
        # What cannot be read back must not be written.
        check_manifest(manifest, f"{self.name}/{self.version}")
        self._store.write_manifest(manifest, overwrite=self._overwrite)
        self._manifest = manifest
        return manifest
