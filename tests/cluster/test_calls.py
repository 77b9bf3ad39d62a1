"""Calls from Python: what is converted, what is refused, what comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from batching.allowance import SHEDDABLE
from batching.errors import DeadlineExceeded, InvalidArgument, NotFound, ServingError, Unavailable
from cluster.doors.calls import call
from shards.specs import Spec, dtype_of
from tests.cluster.routing_fakes import (
    AB,
    Bench,
    VirtualLoop,
    epoch,
    floats,
    host_unit,
    manifest,
    map_unit,
    plain,
    run_virtually,
    turns,
)


def model(dtype: str) -> tuple[Any, Any]:
    """One map unit that takes ``x`` of a dtype."""
    x = {"x": Spec(("b",), dtype)}
    if dtype == "string":
        unit = host_unit(inputs={"text": x["x"]})
        found = manifest(
            {"unit": unit}, [("unit", {"text": "in:x"})], x, {"y": Spec(("b",))}, {"y": "0:ids"}
        )
        return found, {"unit": [["a"]]}
    nodes = [("unit", {"x": "in:x"})]
    found = manifest({"unit": map_unit(inputs=x)}, nodes, x, {"y": Spec(("b",))}, {"y": "0:y"})
    return found, {"unit": [["a"]]}


def sent(dtype: str, value: Any) -> Any:
    """What the actor gets for an input, or the error that the caller gets."""

    async def scenario(loop: VirtualLoop) -> Any:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, model(dtype)))
        asking = asyncio.create_task(call(bench.router, "model", {"x": value}))
        await turns()
        if bench.actors["a"].asked:
            asked = bench.actors["a"].take()
            asked.answer(np.zeros(asked.item.rows, np.float32))
            await asking
            bench.router.close()
            return asked.arrays[0]
        bench.router.close()
        with pytest.raises(InvalidArgument) as caught:
            await asking
        return caught.value

    return run_virtually(scenario)


@pytest.mark.parametrize(
    ("dtype", "value", "wanted"),
    [
        ("float32", [1, 2], [1.0, 2.0]),
        ("float32", [1.5, 2.5], [1.5, 2.5]),
        ("float32", np.array([1.1]), [np.float32(1.1)]),
        ("float32", np.array([True, False]), [1.0, 0.0]),
        ("float32", [1e300, -1e300, 1e-300], [np.inf, -np.inf, 0.0]),
        ("float16", [70000.0], [np.inf]),
        ("bfloat16", [1.0, 2.5], [1.0, 2.5]),
        ("float32", np.array([2.5], dtype_of("bfloat16")), [2.5]),
        ("int32", [1, -2], [1, -2]),
        ("int32", np.array([5], np.uint64), [5]),
        ("int8", [-128, 127], [-128, 127]),
        ("uint64", [2**64 - 1], [2**64 - 1]),
        ("int64", np.array([True]), [1]),
        ("bool", [True, False], [True, False]),
        ("string", ["a", "ü"], [b"a", "ü".encode()]),
        ("string", np.array(["a", "bc"]), [b"a", b"bc"]),
        ("string", np.array([b"a", b"bc"]), [b"a", b"bc"]),
        ("string", [b"\xff"], [b"\xff"]),
    ],
)
def test_an_input_is_converted_where_nothing_but_precision_is_lost(
    dtype: str, value: Any, wanted: Any
) -> None:
    array = sent(dtype, value)
    assert not isinstance(array, Exception), array
    assert array.dtype == dtype_of(dtype)
    assert array.tolist() == wanted


@pytest.mark.parametrize(
    ("dtype", "value", "text"),
    [
        ("int32", [1.0], "must be int32, got float64"),
        ("int8", [128], "must be int8, got int64 from 128 to 128"),
        ("uint8", [0, -1], "must be uint8, got int64 from -1 to 0"),
        ("int64", np.array([2**63], np.uint64), "must be int64"),
        ("bool", [0, 1], "must be bool, got int64"),
        ("float32", ["1.0"], "must be float32, got <U3"),
        ("float32", [1j], "must be float32, got complex128"),
        ("float32", [None], "must be float32, got object"),
        ("float32", [[1.0], [1.0, 2.0]], "is not an array"),
        ("float32", [[1.0]], "must have shape"),
        ("float32", 1.0, "must have shape"),
        ("int64", [10**30], "must be int64, got object"),
        ("string", [1], "must be text or bytes, got int"),
        ("string", ["\ud800"], "is not an array of text"),
        ("string", [["a"], ["b", "c"]], "must be text or bytes, got list"),
    ],
)
def test_an_input_that_would_be_changed_is_refused(dtype: str, value: Any, text: str) -> None:
    error = sent(dtype, value)
    assert isinstance(error, InvalidArgument), error
    assert text in str(error)
    assert "'x'" in str(error)


def test_an_empty_list_has_no_dtype_of_its_own() -> None:
    assert "at least one row" in str(sent("int32", []))


def refusal(inputs: Mapping[str, Any], **asked: Any) -> ServingError:
    async def scenario(loop: VirtualLoop) -> ServingError:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), AB), labels={"model": {"stable": 1}}))
        try:
            with pytest.raises(ServingError) as caught:
                await call(bench.router, asked.pop("servable", "model"), inputs, **asked)
        finally:
            bench.router.close()
        return caught.value

    return run_virtually(scenario)


@pytest.mark.parametrize(
    ("asked", "kind", "text"),
    [
        ({"servable": "other"}, NotFound, "Latest(other)"),
        ({"version": 2}, NotFound, "Specific(model, 2)"),
        ({"label": "nope"}, InvalidArgument, "Unrecognized servable version label"),
        ({"signature": "nope"}, InvalidArgument, "not found in signature def"),
        ({"version": 1, "label": "stable"}, InvalidArgument, "not both"),
    ],
)
def test_what_is_not_served_is_refused(asked: Any, kind: type[Exception], text: str) -> None:
    error = refusal({"x": [1.0]}, **asked)
    assert type(error) is kind
    assert text in str(error)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [({}, "Missing but required: {x}"), ({"x": [1.0], "z": [2]}, "Sent extra: {z}")],
)
def test_inputs_must_be_those_of_the_signature(inputs: Any, text: str) -> None:
    assert text in str(refusal(inputs))


def test_the_version_that_answered_comes_with_the_answer() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(version=8), {"unit": [["a"]]})))
        asking = asyncio.create_task(call(bench.router, "model", {"x": [1.0, 2.0]}))
        await turns()
        bench.actors["a"].take().answer(floats(3, 4))
        version, outputs = await asking
        assert (version, outputs["y"].tolist()) == (8, [3.0, 4.0])
        bench.router.close()

    run_virtually(scenario)


def test_an_answer_is_the_callers_own_and_does_not_keep_its_frame() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), {"unit": [["a"]]})))
        asking = asyncio.create_task(call(bench.router, "model", {"x": [1.0]}))
        await turns()
        bench.actors["a"].take().answer(floats(3))
        _, outputs = await asking
        outputs["y"][0] = 9  # a row of a frame could not be written
        assert outputs["y"].base is None
        bench.router.close()

    run_virtually(scenario)


def test_an_actors_error_is_raised() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), {"unit": [["a"]]})))
        asking = asyncio.create_task(call(bench.router, "model", {"x": [1.0]}))
        await turns()
        bench.actors["a"].take().refuse("UNAVAILABLE", "away")
        with pytest.raises(Unavailable, match="away"):
            await asking
        bench.router.close()

    run_virtually(scenario)


def test_a_timeout_is_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        monkeypatch.setattr("time.monotonic", loop.time)
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), {"unit": [["a"]]})))
        began = loop.time()
        with pytest.raises(DeadlineExceeded):
            await call(bench.router, "model", {"x": [1.0]}, timeout_s=0.5)
        assert loop.time() - began == pytest.approx(0.5, abs=0.012)
        bench.router.close()

    run_virtually(scenario)


def test_a_caller_that_gives_up_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        monkeypatch.setattr("time.monotonic", loop.time)
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), {"unit": [["a"]]})))
        asking = asyncio.create_task(call(bench.router, "model", {"x": [1.0]}, timeout_s=1.0))
        await turns()
        asking.cancel()
        await turns()
        assert asking.cancelled()
        actor = bench.actors["a"]
        assert actor.link.cancelled == [actor.take().item.request]
        bench.check_at_rest()
        bench.router.close()

    run_virtually(scenario)


def test_a_call_may_be_less_critical_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        monkeypatch.setattr("time.monotonic", loop.time)
        bench = Bench(loop)
        await bench.router.adopt(epoch(1, (plain(), {"unit": [["a"]]})))
        with pytest.raises(InvalidArgument, match="no criticality 'urgent'"):
            await call(bench.router, "model", {"x": [1.0]}, criticality="urgent")
        asking = asyncio.create_task(
            call(bench.router, "model", {"x": [1.0]}, criticality="sheddable")
        )
        await turns()
        ((header, _),) = bench.actors["a"].link.calls
        assert header.criticality == SHEDDABLE
        asking.cancel()
        await turns()
        bench.router.close()

    run_virtually(scenario)
