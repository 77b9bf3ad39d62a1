"""Both clients against a real door, and against servers that break off, say nothing or refuse."""

from __future__ import annotations

import asyncio
import gzip
import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import trustme

from batching.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from cluster.client import AsyncClient, Client, Retries
from tests.cluster.api_support import f32, texts
from tests.cluster.client_peers import CLOSE, RESET, SILENCE, Ask, answer, peer, refusal, response
from tests.cluster.serving import Cluster

X = {"x": f32([2, 3])}
QUICK = Retries(pause_s=0.001)


class Blocking:
    """Calls methods of a `Client`."""

    def __init__(self, url: str, **options: Any) -> None:
        self.client = Client(url, **options)

    def __call__(self, method: str, *values: Any, **options: Any) -> Any:
        found: Any = self.client
        for name in method.split("."):
            found = getattr(found, name)
        return found(*values, **options)

    def close(self) -> None:
        self.client.close()


class Async:
    """Calls methods of an `AsyncClient` on a loop of its own."""

    def __init__(self, url: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self.client = AsyncClient(url, **options)

    def __call__(self, method: str, *values: Any, **options: Any) -> Any:
        async def run() -> Any:
            found: Any = self.client
            for name in method.split("."):
                found = getattr(found, name)
            return await found(*values, **options)

        return self._runner.run(run())

    def close(self) -> None:
        self._runner.run(self.client.close())
        self._runner.close()


@pytest.fixture(params=[Blocking, Async], ids=["blocking", "async"])
def make(request: pytest.FixtureRequest) -> Iterator[Ask]:
    made: list[Any] = []

    def make_one(url: str, **options: Any) -> Any:
        made.append(request.param(url, **options))
        return made[-1]

    yield make_one
    for each in made:
        each.close()


@pytest.fixture
def cluster(half_plus_two_cluster: Cluster) -> Cluster:
    return half_plus_two_cluster


def url_of(cluster: Cluster) -> str:
    return f"http://127.0.0.1:{cluster.port}"


# A real door


def test_arrays_go_in_and_arrays_come_out(cluster: Cluster, make: Ask) -> None:
    ask = make(url_of(cluster))
    for options, version, wanted in (
        ({}, 123, [3.0, 3.5]),
        ({"version": 100}, 100, [4.0, 4.5]),
        ({"label": "old"}, 100, [4.0, 4.5]),
    ):
        for inputs in (X, {"x": [2, 3.0]}, {"x": np.array([2, 3], np.float32)[::1]}):
            outputs = ask("predict", "half_plus_two", inputs, **options)
            assert outputs.version == version
            [found] = outputs.values()
            assert (found.dtype, found.tolist()) == (np.float32, wanted)
    words = ask("predict", "half_plus_two", {"t": np.array(["a", "é"])}, signature="text")
    assert words["t_bytes"].tolist() == [b"a", "é".encode()]
    assert ask("predict", "half_plus_two", {"t": texts([b"\xff"])}, signature="text")[
        "t_bytes"
    ].tolist() == [b"\xff"]
    pairs = ask("predict", "half_plus_two", {"x": f32([[1, 2], [3, 4]])}, signature="pairs")
    assert pairs["sum"].tolist() == [3.0, 7.0]
    assert np.isnan(pairs["nan"]).all()


def test_large_tensors_go_in_and_out(cluster: Cluster, make: Ask) -> None:
    rows = np.arange(100_000, dtype=np.float32).reshape(-1, 2)
    ask = make(url_of(cluster))
    options = {"signature": "pairs", "timeout_s": 30.0}
    outputs = ask("predict", "half_plus_two", {"x": rows[:2000]}, **options)
    assert outputs["same"].tobytes() == rows[:2000].tobytes()


def test_requests_are_compressed_where_it_is_asked_for_and_pays(
    cluster: Cluster, make: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[Any] = []
    real = cluster.service.handle

    def handle(method: bytes, path: bytes, headers: Any, body: Any, respond: Any) -> Any:
        heads.append((headers.get(b"content-encoding"), len(body)))
        return real(method, path, headers, body, respond)

    monkeypatch.setattr(cluster.service, "handle", handle)
    options = {"signature": "pairs", "timeout_s": 30.0}
    noise = np.random.default_rng(0).bytes(16_000)
    same = np.zeros((2000, 2), np.float32)
    random = np.frombuffer(noise, np.uint16).astype(np.float32).reshape(-1, 2)
    for bytes_min, rows, encoding in (
        (None, same, None),
        (20_000, same, None),
        (1000, same, b"gzip"),
        (1000, random, b"gzip"),
    ):
        ask = make(url_of(cluster), compress_bytes_min=bytes_min)
        outputs = ask("predict", "half_plus_two", {"x": rows}, **options)
        assert outputs["same"].tobytes() == rows.tobytes()
        found, nbytes = heads.pop()
        assert found == encoding
        assert (nbytes < rows.nbytes) == (encoding is not None)


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_answers_come_compressed_where_it_is_asked_for_and_pays(
    cluster: Cluster, make: Ask, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    heads: list[bytes] = []
    real = cluster.service.handle

    def handle(method: bytes, path: bytes, headers: Any, body: Any, respond: Any) -> Any:
        def seen(response: Any) -> None:
            heads.append(response.headers)
            respond(response)

        return real(method, path, headers, body, seen)

    monkeypatch.setattr(cluster.service, "handle", handle)
    ask = make(url_of(cluster), accept_encoding=encoding)
    for count in (1, 300, 2000):
        rows = np.zeros((count, 2), np.float32)
        outputs = ask("predict", "half_plus_two", {"x": rows}, signature="pairs", timeout_s=30.0)
        assert outputs["same"].tobytes() == rows.tobytes()
        assert (f"content-encoding: {encoding}".encode() in heads.pop()) == (count > 1)
    with pytest.raises(InvalidArgument, match="gzip, zstd"):
        make(url_of(cluster), accept_encoding="br")


def test_tables_go_in_and_tables_come_out(cluster: Cluster, make: Ask) -> None:
    ask = make(url_of(cluster), accept_encoding="zstd", compress_bytes_min=10_000)
    table = pa.table({"x": pa.array([2.0, 3.0], pa.float32())})
    found = ask("predict_table", "half_plus_two", table)
    assert found.column(0).to_pylist() == [3.0, 3.5]
    assert found.schema.metadata == {b"version": b"123"}
    for rows in (1, 2000):  # beside others, and compressed both ways
        pairs = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(2 * rows, np.float32)), 2)
        table = pa.table({"x": pairs}).replace_schema_metadata({"mine": "kept to myself"})
        options = {"signature": "pairs", "version": 123, "timeout_s": 30.0}
        found = ask("predict_table", "half_plus_two", table, **options)
        assert found["sum"].to_pylist() == [2.0] * rows
        assert found["same"].combine_chunks().flatten().to_numpy().tolist() == [1.0] * 2 * rows
    nulls = pa.table({"x": pa.array([1.0, None], pa.float32())})
    with pytest.raises(InvalidArgument, match="'x' has nulls"):
        ask("predict_table", "half_plus_two", nulls)
    with pytest.raises(InvalidArgument, match="a dict is no Arrow table"):
        ask("predict_table", "half_plus_two", {"x": [1.0]})


@pytest.mark.parametrize("said", ["gzip", "zstd", "br"])
def test_an_answer_that_cannot_be_unpacked_is_data_loss(make: Ask, said: str) -> None:
    broken = response(200, b"not compressed", f"content-encoding: {said}\r\n")
    with peer(broken) as server, pytest.raises(DataLoss, match="cannot be unpacked"):
        make(server.url, accept_encoding="zstd", retries=Retries(attempts_max=1))("predict", "m", X)
    bomb = response(200, gzip.compress(bytes(10_000)), "content-encoding: gzip\r\n")
    with peer(bomb) as server, pytest.raises(DataLoss, match="larger than the client takes"):
        make(
            server.url,
            accept_encoding="gzip",
            body_bytes_max=9_999,
            retries=Retries(attempts_max=1),
        )("predict", "m", X)


def test_examples_are_classified_and_regressed(cluster: Cluster, make: Ask) -> None:
    ask = make(url_of(cluster))
    for examples in ([{"x": 2.0}, {"x": 3.0}], X):
        classes = ask("classify", "half_plus_two", examples, signature="classify_x_to_y")
        assert (classes.labels.shape, classes.version) == ((2, 1), 123)
        assert classes.scores.tolist() == [[3.0], [3.5]]
        numbers = ask("regress", "half_plus_two", examples, signature="regress_x_to_y")
        assert (numbers.values.tolist(), numbers.version) == ([3.0, 3.5], 123)


def test_a_door_describes_what_it_serves(cluster: Cluster, make: Ask) -> None:
    ask = make(url_of(cluster))
    assert [each.version for each in ask("models")["half_plus_two"]] == [123, 100, 99]
    [state] = ask("status", "half_plus_two", label="stable")
    assert (state.version, state.state, state.error_code) == (123, "AVAILABLE", "OK")
    metadata = ask("metadata", "half_plus_two", version=100)
    assert metadata["model_spec"]["version"] == "100"
    assert ask("is_ready") is True
    assert "serving_requests" in ask("metrics")


def test_refusals_are_the_servers_own_errors(cluster: Cluster, make: Ask) -> None:
    ask = make(url_of(cluster))
    with pytest.raises(NotFound, match="nobody"):
        ask("predict", "nobody", X)
    with pytest.raises(InvalidArgument, match="input 'x' must have shape"):
        ask("predict", "half_plus_two", {"x": f32([[1]])})
    with pytest.raises(InvalidArgument, match="'x': no input is float64"):
        ask("predict", "half_plus_two", {"x": np.array([1.0])})
    with pytest.raises(InvalidArgument, match="Expected regression signature"):
        ask("regress", "half_plus_two", X)
    assert ask("predict", "half_plus_two", X).version == 123


def test_threads_share_a_client(cluster: Cluster) -> None:
    wrong: list[object] = []
    with Client(url_of(cluster), connections_max=3) as client:

        def ask(first: int) -> None:
            for n in range(20):
                [found] = client.predict("half_plus_two", {"x": f32([first, n])}).values()
                if found.tolist() != [first / 2 + 2, n / 2 + 2]:
                    wrong.append(found)

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len(client._pool._idle) <= 3


def test_tasks_share_a_client(cluster: Cluster) -> None:
    async def run() -> None:
        async with AsyncClient(url_of(cluster), connections_max=3) as client:

            async def ask(n: int) -> None:
                [found] = (await client.predict("half_plus_two", {"x": f32([n])})).values()
                assert found.tolist() == [n / 2 + 2]

            await asyncio.gather(*(ask(n) for n in range(60)))
            assert len(client._pool._idle) <= 3
            assert client._pool._places == 3

    asyncio.run(run())


# Faults


def test_a_connection_is_used_again(make: Ask) -> None:
    with peer(answer(1), answer(2), answer(3)) as server:
        ask = make(server.url)
        assert [ask("predict", "m", X)["y"][0] for _ in range(3)] == [1, 2, 3]
        assert server.connections == 1


def test_one_that_the_server_closes_is_not(make: Ask) -> None:
    with peer([answer(1, headers="connection: close\r\n"), CLOSE], answer(2)) as server:
        ask = make(server.url)
        assert [ask("predict", "m", X)["y"][0] for _ in range(2)] == [1, 2]
        assert server.connections == 2


@pytest.mark.parametrize(
    "fault",
    [
        RESET,
        CLOSE,
        [answer()[:30], CLOSE],
        [answer()[:-3], CLOSE],
        [answer()[:-3], RESET],
        refusal(503, "UNAVAILABLE", 1),
        refusal(429, "RESOURCE_EXHAUSTED", 1),
    ],
    ids=["reset", "closed", "half a head", "half a body", "reset in the body", "503", "429"],
)
def test_what_may_pass_is_asked_again(make: Ask, fault: Any) -> None:
    with peer(fault, fault, answer(5)) as server:
        assert make(server.url, retries=QUICK)("predict", "m", X)["y"][0] == 5
        assert len(server.requests) == 3


def test_what_does_not_pass_is_told(make: Ask) -> None:
    with peer(*[refusal(429, "RESOURCE_EXHAUSTED", 1)] * 4) as server:
        with pytest.raises(ResourceExhausted, match="why"):
            make(server.url, retries=QUICK)("predict", "m", X)
        assert len(server.requests) == 4
    with pytest.raises(Unavailable, match="nothing answers at http://127"):
        make(server.url, retries=QUICK)("predict", "m", X)


def test_what_must_not_be_done_twice_is_not(make: Ask) -> None:
    for fault in (CLOSE, refusal(503, "UNAVAILABLE", 1)):
        with peer(fault, answer()) as server:
            with pytest.raises(Unavailable):
                make(server.url, retries=QUICK)("admin.load", "m", 3)
            assert len(server.requests) == 1


def test_a_server_that_says_nothing_is_waited_for_until_the_deadline(make: Ask) -> None:
    for act in (SILENCE, [answer()[:-3], SILENCE]):
        with peer(cast(Any, act)) as server:
            with pytest.raises(DeadlineExceeded):
                make(server.url)("predict", "m", X, timeout_s=0.05)
            [told_ms] = re.findall(rb"x-request-timeout-ms: (\d+)", server.requests[0])
            assert 1 <= int(told_ms) <= 50


def test_a_call_that_gave_up_leaves_its_place_to_the_next(make: Ask) -> None:
    with peer(SILENCE, answer()) as server:
        ask = make(server.url, connections_max=1)
        with pytest.raises(DeadlineExceeded):
            ask("predict", "m", X, timeout_s=0.05)
        # The place of the call that gave up is free again.
        assert ask("predict", "m", X)["y"][0] == 7


@pytest.mark.parametrize(
    "body",
    [
        response(200, b'{"outputs":[1]}', "content-type: application/json\r\n"),
        response(200, b"nonsense", "inference-header-content-length: 8\r\n"),
        b"no HTTP at all\r\n\r\n",
    ],
)
def test_an_answer_that_is_none_is_data_loss(make: Ask, body: bytes) -> None:
    with peer(body, answer()) as server:
        ask = make(server.url)
        with pytest.raises(DataLoss):
            ask("predict", "m", X)
        assert ask("predict", "m", X)["y"][0] == 7


def test_a_server_that_refuses_a_body_is_heard(make: Ask) -> None:
    with peer([refusal(413), CLOSE]) as server, pytest.raises(InvalidArgument, match="why"):
        make(server.url)("predict", "m", {"x": np.zeros(1 << 20, np.float32)})


def test_admin_calls_say_what_is_asked(make: Ask) -> None:
    done = response(200, b'{"changes":["loads m:3"],"digest":"abc"}')
    with peer(*[done] * 4, response(200, b'{"config":{},"digest":"abc"}')) as server:
        ask = make(server.url, key="secret")
        changed = ask("admin.load", "m", 3, label="canary", wait_s=2.0)
        assert (changed.changes, changed.digest) == (("loads m:3",), "abc")
        ask("admin.split", "m", {"stable": 9})
        ask("admin.rollback", "m")
        ask("admin.replace", {"servables": []}, expected="abc")
        assert ask("admin.config")["digest"] == "abc"
        firsts = [head.split(b" HTTP")[0] for head in server.requests]
        assert firsts == [
            b"POST /v1/admin/models/m:load?wait_s=2",
            b"POST /v1/admin/models/m:split",
            b"POST /v1/admin/models/m:rollback",
            b"PUT /v1/admin/config",
            b"GET /v1/admin/config",
        ]
        assert all(b"authorization: Bearer secret" in head for head in server.requests)
        assert b'if-match: "abc"' in server.requests[3]


def test_what_is_closed_answers_nothing_more(make: Ask) -> None:
    with peer(answer()) as server:
        ask = make(server.url)
        ask("predict", "m", X)
        ask("close")
        with pytest.raises(Unavailable, match="the client is closed"):
            ask("predict", "m", X)


def test_a_cancelled_call_closes_its_connection_and_frees_its_place() -> None:
    async def run(url: str) -> None:
        async with AsyncClient(url, connections_max=1) as client:
            first = asyncio.create_task(client.predict("m", X))
            second = asyncio.create_task(client.predict("m", X))
            await asyncio.sleep(0)
            second.cancel()
            first.cancel()
            await asyncio.gather(first, second, return_exceptions=True)
            assert (first.cancelled(), second.cancelled()) == (True, True)
            assert (await client.predict("m", X))["y"][0] == 7

    with peer(answer(), answer()) as server:
        asyncio.run(run(server.url))


def test_closing_ends_calls_under_way() -> None:
    with peer(SILENCE) as server:
        client = Client(server.url, retries=Retries(attempts_max=1))
        ended: list[Exception] = []

        def ask() -> None:
            try:
                client.predict("m", X)
            except Unavailable as error:
                ended.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        while not server.requests:
            thread.join(0.001)
        client.close()
        thread.join(5.0)
        assert [type(each).__mro__[1] for each in ended] == [Unavailable]


def test_a_door_behind_tls_is_asked_if_it_is_trusted(make: Ask) -> None:
    ca, server_side = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(server_side)
    trusting = ssl.create_default_context()
    ca.configure_trust(trusting)
    with peer(answer(3), tls=server_side) as server:
        assert make(server.url, tls=trusting)("predict", "m", X)["y"][0] == 3
        with pytest.raises(FailedPrecondition, match="is not trusted"):
            make(server.url)("predict", "m", X)
        assert len(server.requests) == 1


def test_a_client_needs_neither_jax_nor_ray() -> None:
    script = (
        "import sys, cluster.client\n"
        "print({'jax', 'ray', 'pydantic', 'yaml', 'pyarrow', 'uvloop'} & set(sys.modules))"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == "set()"
