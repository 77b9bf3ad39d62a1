"""A signature function, called once with symbolic values, recorded as a graph of units.

Decides whether shapes, dtypes and levels (`shards.levels`) fit where a value meets a unit, so that
a graph that cannot work is refused when it is saved and not when it is served. Does not know JAX,
stores or blobs: a unit is here its name, its inputs and its outputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple

from batching.errors import InvalidArgument
from shards.errors import SpecMismatch
from shards.levels import level_of_call
from shards.manifest import Keys, Node, Pool, Signature
from shards.pooling import POOLED_DTYPES, POOLS
from shards.specs import STRING, Spec

__all__ = [
    "Method",
    "TableCall",
    "UnitCall",
    "Value",
    "Values",
    "annotated",
    "check_parameters",
    "trace",
]

Method = Literal["predict", "classify", "regress"]


class Value:
    """What stands for a tensor while a signature is traced.

    Attributes:
        spec: its dtype and shape.
        ref: what the manifest calls it: ``in:NAME`` or ``N:NAME``.
    """

    __slots__ = ("_graph", "ref", "spec")

    def __init__(self, graph: _Graph, ref: str, spec: Spec) -> None:
        self._graph = graph
        self.ref = ref
        self.spec = spec

    def __repr__(self) -> str:
        return f"<{self.ref} {_text(self.spec)}>"

    def __bool__(self) -> bool:
        raise InvalidArgument(f"{self!r} has no truth while a signature is traced")


class Values(Mapping[str, Value]):
    """The outputs of a unit that has several: ``v["ids"]`` or ``v.ids``."""

    def __init__(self, unit: str, values: Mapping[str, Value]) -> None:
        self._unit = unit
        self._values = dict(values)

    def __getitem__(self, name: str) -> Value:
        try:
            return self._values[name]
        except KeyError:
            known = ", ".join(self._values)
            raise InvalidArgument(
                f"unit {self._unit!r} has no output {name!r}, it has {known}"
            ) from None

    def __getattr__(self, name: str) -> Value:
        # Only for names that are not attributes, so "values" and "items" need brackets.
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class UnitCall:
    """A unit as a signature function calls it: ``trunk(x, mask)`` or ``trunk(x=x, mask=mask)``.

    The call returns a `Value`, or `Values` where the unit has several outputs.
    """

    def __init__(self, name: str, inputs: Mapping[str, Spec], outputs: Mapping[str, Spec]) -> None:
        self.name = name
        self.inputs = dict(inputs)
        self.outputs = dict(outputs)

    def __call__(self, *args: Value, **kwargs: Value) -> Any:
        """Record a call.

        Raises:
            SpecMismatch: a value does not fit; names the unit and the input.
            InvalidArgument: an input is missing, given twice or unknown.
        """
        if len(args) > len(self.inputs):
            raise InvalidArgument(
                f"unit {self.name!r} takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), "
                f"got {len(args)}"
            )
        positional = dict(zip(self.inputs, args, strict=False))
        twice = positional.keys() & kwargs.keys()
        given = {**positional, **kwargs}
        if twice or given.keys() != self.inputs.keys():
            raise InvalidArgument(
                f"unit {self.name!r} takes each of {sorted(self.inputs)} once, got "
                f"{[*positional, *kwargs]}"
            )
        for name, value in given.items():
            if not isinstance(value, Value):
                raise InvalidArgument(
                    f"unit {self.name!r}, input {name!r}: not a value of this signature but "
                    f"{type(value).__name__}"
                )
        values = {name: given[name] for name in self.inputs}
        graph = _common_graph(self.name, values)
        return graph.call(self.name, values, self._unify(graph, values))

    def _unify(self, graph: _Graph, values: Mapping[str, Value]) -> dict[str, Spec]:
        """Bind the unit's symbols to the sizes of the values; the specs of its outputs."""
        try:
            per = level_of_call(self.inputs, {name: v.spec.per for name, v in values.items()})
        except SpecMismatch as error:
            raise SpecMismatch(f"unit {self.name!r}: {error.message}") from None
        sizes: dict[str, int | str] = {}
        for name, wanted in self.inputs.items():
            got = values[name].spec
            where = f"unit {self.name!r}, input {name!r}"
            if got.dtype != wanted.dtype:
                raise SpecMismatch(f"{where}: needs {wanted.dtype}, got {got.dtype}")
            if len(got.shape) != len(wanted.shape):
                raise SpecMismatch(f"{where}: needs {_text(wanted)}, got {_text(got)}")
            for declared, size in zip(wanted.shape, got.shape, strict=True):
                bound = sizes.setdefault(declared, size) if isinstance(declared, str) else declared
                if bound != size:
                    raise SpecMismatch(
                        f"{where}: needs {_text(wanted)}, got {_text(got)}: "
                        f"{declared} is {bound}, not {size}"
                    )
            if wanted.batch is not None and not isinstance(sizes[wanted.batch], str):
                raise SpecMismatch(f"{where}: {_text(got)} does not begin with a batch")
        outputs: dict[str, Spec] = {}
        for name, spec in self.outputs.items():
            for symbol in spec.shape:
                if isinstance(symbol, str) and symbol not in sizes:
                    sizes[symbol] = graph.fresh(symbol)
            shape = tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)
            outputs[name] = Spec(shape, spec.dtype, spec.pad, per)
        return outputs


_INTEGERS: Final = frozenset({"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"})


class TableCall:
    """A table as a signature function uses it: ``words.rows(ids)``, ``words.pool(ids, "mean")``."""

    def __init__(self, name: str, dim: int, dtype: str, keys: Keys = "rows") -> None:
        self.name = name
        self.dim = dim
        self.dtype = dtype
        self.keys = keys

    def rows(self, ids: Value) -> Value:
        """The rows of ids or keys of any shape: that shape and one more dimension.

        Raises:
            SpecMismatch: they are no integers, or no text where keys are.
        """
        self._check_ids(ids)
        outputs = {"rows": Spec((*ids.spec.shape, self.dim), self.dtype, per=ids.spec.per)}
        rows = ids._graph.call(self.name, {"ids": ids}, outputs)
        assert isinstance(rows, Value)
        return rows

    def pool(self, ids: Value, how: Pool = "sum", weights: Value | None = None) -> Value:
        """One float32 row for every bag of ids: the last dimension of `ids` is a bag.

        The rows are pooled where they lie, so what comes back is as much for a bag of a thousand
        ids as for a bag of one. A bag may be padded: an id of -1, or a key of "", is none. A bag
        without ids is a row of zeros.

        Args:
            ids: integers, or text where keys are; at least two dimensions.
            how: ``sum``, ``mean`` over the bag's ids, or ``max`` of every element.
            weights: float32 of the shape of `ids`, for sums: what each row is multiplied by.

        Raises:
            SpecMismatch: ids or weights are not what they must be, or rows of the table's dtype
                cannot be pooled.
            InvalidArgument: there is no such way to pool.
        """
        self._check_ids(ids)
        where = f"table {self.name!r}"
        if how not in POOLS:
            raise InvalidArgument(f"{where}: {how!r} is not one of {', '.join(POOLS)}")
        if self.dtype not in POOLED_DTYPES:
            raise SpecMismatch(f"{where}: rows of {self.dtype} cannot be pooled")
        spec = ids.spec
        if len(spec.shape) < 2:
            raise SpecMismatch(f"{where}: ids to pool need a dimension besides the batch: {ids!r}")
        values = {"ids": ids}
        if weights is not None:
            if how != "sum":
                raise InvalidArgument(f"{where}: weights are for sums")
            wanted = Spec(spec.shape, "float32", per=spec.per)
            given = weights.spec if isinstance(weights, Value) else None
            if given is None or (given.shape, given.dtype, given.per) != (
                wanted.shape, wanted.dtype, wanted.per,
            ):  # fmt: skip
                raise SpecMismatch(f"{where}: weights must be {_text(wanted)}, got {weights!r}")
            values["weights"] = weights
        outputs = {"rows": Spec((*spec.shape[:-1], self.dim), "float32", per=spec.per)}
        rows = _common_graph(self.name, values).call(self.name, values, outputs, how)
        assert isinstance(rows, Value)
        return rows

    def _check_ids(self, ids: Value) -> None:
        if not isinstance(ids, Value):
            raise InvalidArgument(f"table {self.name!r}: ids are no value of this signature")
        if self.keys == "string":
            if ids.spec.dtype != STRING:
                raise SpecMismatch(f"table {self.name!r}, input 'ids': needs text, got {ids!r}")
        elif ids.spec.dtype not in _INTEGERS and not (
            # Row numbers have no use for the last bit, keys that are hashed do.
            self.keys == "hashed" and ids.spec.dtype == "uint64"
        ):
            raise SpecMismatch(f"table {self.name!r}, input 'ids': needs integers, got {ids!r}")


class _Graph:
    """The nodes of one signature, as they are recorded."""

    def __init__(self, symbols: set[str]) -> None:
        self.nodes: list[Node] = []
        self._symbols = symbols
        self._made: dict[tuple[str, Pool | None, tuple[str, ...]], Value | Values] = {}

    def fresh(self, symbol: str) -> str:
        """A symbol that nothing in this graph has yet: two calls have two lengths."""
        name, number = symbol, 2
        while name in self._symbols:
            name, number = f"{symbol}_{number}", number + 1
        self._symbols.add(name)
        return name

    def call(
        self,
        unit: str,
        values: Mapping[str, Value],
        outputs: Mapping[str, Spec],
        pool: Pool | None = None,
    ) -> Value | Values:
        inputs = {name: value.ref for name, value in values.items()}
        # Units have no state: the same unit on the same values is the same node.
        key = (unit, pool, tuple(inputs.values()))
        if key not in self._made:
            index = len(self.nodes)
            self.nodes.append(Node(unit=unit, inputs=inputs, pool=pool))
            made = {name: Value(self, f"{index}:{name}", spec) for name, spec in outputs.items()}
            self._made[key] = next(iter(made.values())) if len(made) == 1 else Values(unit, made)
        return self._made[key]


def trace(
    fn: Callable[..., Any],
    inputs: Mapping[str, Spec],
    method: Method = "predict",
    labels: tuple[str, ...] = (),
) -> Signature:
    """Call a signature function once with symbolic values and record what it does.

    Args:
        fn: called with one `Value` for each input, by name. It returns a dict of values; or a
            tuple, named ``output_0``, ...; or one value, named ``scores`` for classify and
            ``outputs`` otherwise.
        inputs: input name to spec.
        method: what the signature promises of its outputs.
        labels: for classify: the label of each score.

    Raises:
        InvalidArgument: the function does not return values, or not what the method promises.
        SpecMismatch: values do not fit the units they are given to.
    """
    if not inputs:
        raise InvalidArgument("a signature needs at least one input")
    batches = {spec.batch for spec in inputs.values()}
    if len(batches) != 1 or None in batches:
        shapes = ", ".join(f"{name} {_text(spec)}" for name, spec in inputs.items())
        raise InvalidArgument(f"inputs of a signature begin with one batch symbol: {shapes}")
    graph = _Graph({s for spec in inputs.values() for s in spec.shape if isinstance(s, str)})
    values = {name: Value(graph, f"in:{name}", spec) for name, spec in inputs.items()}
    returned = _returned(fn(**values), method)
    for name, value in returned.items():
        if not isinstance(value, Value) or value._graph is not graph:
            raise InvalidArgument(f"output {name!r} is not a value of this signature: {value!r}")
        if value.spec.batch not in batches:
            raise InvalidArgument(f"output {name!r} {_text(value.spec)} has lost the batch")
        if value.spec.per_request:
            raise InvalidArgument(
                f"output {name!r} {_text(value.spec)} has one row for the whole request: what a "
                f"signature yields depends on an input that is not per request"
            )
    _check_method(method, {name: value.spec for name, value in returned.items()}, labels)
    nodes, refs = _pruned(graph.nodes, {name: value.ref for name, value in returned.items()})
    return Signature(
        method=method,
        inputs=dict(inputs),
        outputs={name: value.spec for name, value in returned.items()},
        nodes=nodes,
        returns=refs,
        labels=labels,
    )


def annotated(fn: Callable[..., Any]) -> dict[str, Spec]:
    """The specs with which a signature function annotates its parameters.

    Raises:
        InvalidArgument: a parameter has none.
    """
    try:
        parameters = inspect.signature(fn, eval_str=True).parameters
    except NameError as error:
        raise InvalidArgument(f"annotations of {fn.__name__} cannot be read: {error}") from None
    specs = {name: parameter.annotation for name, parameter in parameters.items()}
    for name, spec in specs.items():
        if not isinstance(spec, Spec):
            raise InvalidArgument(
                f"parameter {name!r} of {fn.__name__} is not annotated with a shards.Spec: "
                f"annotate it, or give inputs={{...}}"
            )
    return specs


def check_parameters(fn: Callable[..., Any], inputs: Mapping[str, Spec]) -> None:
    """Hold a signature function against the inputs it is to be called with.

    Raises:
        InvalidArgument: it does not take them.
    """
    try:
        inspect.signature(fn).bind(**dict.fromkeys(inputs))
    except TypeError as error:
        raise InvalidArgument(
            f"the signature's function does not take its inputs: {error}"
        ) from None


def _returned(result: Any, method: Method) -> dict[str, Any]:
    if isinstance(result, Mapping):
        named = dict(result)
    elif isinstance(result, tuple | list):
        named = {f"output_{index}": value for index, value in enumerate(result)}
    else:
        named = {"scores" if method == "classify" else "outputs": result}
    if not named:
        raise InvalidArgument("a signature needs at least one output")
    return named


def _check_method(method: Method, outputs: Mapping[str, Spec], labels: tuple[str, ...]) -> None:
    if labels and method != "classify":
        raise InvalidArgument(f"labels belong to classify, not to {method}")
    if method == "classify":
        _check_classify(outputs, labels)
    elif method == "regress":
        spec = outputs.get("outputs")
        if spec is None or spec.dtype == STRING or spec.row_shape not in ((), (1,)):
            raise InvalidArgument(
                f"regress yields 'outputs' [b] or [b,1], this signature yields {_listed(outputs)}"
            )


def _check_classify(outputs: Mapping[str, Spec], labels: tuple[str, ...]) -> None:
    spec, classes = outputs.get("scores"), outputs.get("classes")
    if spec is None or spec.dtype == STRING or len(spec.row_shape) != 1:
        raise InvalidArgument(
            f"classify yields 'scores' [b,k], this signature yields {_listed(outputs)}"
        )
    if classes is not None and (classes.dtype, classes.shape) != (STRING, spec.shape):
        raise InvalidArgument(f"'classes' must be strings of the shape of scores {_text(spec)}")
    if labels and classes is not None:
        raise InvalidArgument("give labels or an output 'classes', not both")
    if labels and spec.row_shape != (len(labels),):
        raise InvalidArgument(f"{len(labels)} labels for scores {_text(spec)}")


class _Pruned(NamedTuple):
    nodes: tuple[Node, ...]
    returns: dict[str, str]


def _pruned(nodes: list[Node], returns: Mapping[str, str]) -> _Pruned:
    """Drop the nodes that no output depends on, and number the rest anew."""
    needed = {node for ref in returns.values() for node in _nodes_of(ref)}
    for index in reversed(range(len(nodes))):
        if index in needed:
            needed |= {node for ref in nodes[index].inputs.values() for node in _nodes_of(ref)}
    numbers = {old: new for new, old in enumerate(sorted(needed))}

    def moved(ref: str) -> str:
        for old in _nodes_of(ref):
            return f"{numbers[old]}:{ref.partition(':')[2]}"
        return ref

    return _Pruned(
        tuple(
            Node(
                unit=nodes[old].unit,
                inputs={name: moved(ref) for name, ref in nodes[old].inputs.items()},
                pool=nodes[old].pool,
            )
            for old in numbers
        ),
        {name: moved(ref) for name, ref in returns.items()},
    )


def _nodes_of(ref: str) -> tuple[int, ...]:
    """The node that a reference names, or nothing for an input of the signature."""
    node = ref.partition(":")[0]
    return () if node == "in" else (int(node),)


def _common_graph(unit: str, values: Mapping[str, Value]) -> _Graph:
    graphs = {id(value._graph): value._graph for value in values.values()}
    if len(graphs) != 1:
        raise InvalidArgument(f"unit {unit!r} is given values of different signatures")
    return next(iter(graphs.values()))


def _text(spec: Spec) -> str:
    per = " per request" if spec.per_request else ""
    return spec.dtype + "[" + ",".join(map(str, spec.shape)) + "]" + per


def _listed(specs: Mapping[str, Spec]) -> str:
    return ", ".join(f"{name} {_text(spec)}" for name, spec in specs.items())
