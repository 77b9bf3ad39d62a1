"""Mutual TLS: who gets in, who does not and why, and what becomes of the files."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from pathlib import Path
from typing import Any

import msgspec
import pytest

from batching.errors import FailedPrecondition
from shards.errors import HandshakeRefused, LinkClosed
from shards.orders import TlsFiles
from shards.transport import Limits, Listener, TlsContexts, connect, listen
from shards.wire import FrameKind
from tests.shards.certificates import Authority
from tests.shards.transport_planes import (
    CLUSTER,
    GENERATION,
    NODE,
    SECRET,
    Recorder,
    call,
    closed_at_the_end,
    run,
    until,
)

STRANGERS = Authority()
FILES = CLUSTER.files("node")


async def serve(tls: TlsContexts, handler: Recorder, **limits: Any) -> Listener:
    listener = await listen(
        name="server",
        generation=GENERATION,
        node=NODE,
        secret=SECRET,
        handler=handler,
        tcp_host="127.0.0.1",
        tls=tls,
        limits=Limits(close_timeout_s=0.5, **limits),
    )
    return closed_at_the_end(listener)


def caller(tls: TlsContexts | None, handler: Recorder) -> dict[str, Any]:
    return {"name": "caller", "node": "b", "secret": SECRET, "handler": handler, "tls": tls}


def test_what_crosses_is_not_to_be_read_on_the_way() -> None:
    secret_words = b"nobody is to read this" * 10

    async def scenario(untaken: list[Any]) -> None:
        there, seen = Recorder(), bytearray()
        tls = TlsContexts(FILES)
        listener = await serve(tls, there)
        port = await tap(listener.endpoint.port, seen)
        endpoint = msgspec.structs.replace(listener.endpoint, port=port)
        link = await connect(endpoint, **caller(tls, Recorder()))
        link.send(FrameKind.CALL, call(1), [secret_words])
        await until(lambda: bool(there.frames))
        assert bytes(there.frames[0].body) == secret_words
        assert len(seen) > len(secret_words)
        assert b"nobody" not in seen
        link.close()
        await listener.close()

    run("tls", scenario)


async def tap(port: int, seen: bytearray) -> int:
    """A port that passes everything on to another, and keeps it."""

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            seen.extend(data)
            sink.write(data)
        sink.close()

    async def on_connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.close()
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, back), pump(there, writer))

    server = await asyncio.start_server(on_connect, "127.0.0.1", 0)
    bound: int = server.sockets[0].getsockname()[1]
    return bound


@pytest.mark.parametrize("loop", ["uvloop", "the standard loop"])
def test_a_server_of_another_ca_is_refused_with_words(loop: str) -> None:
    async def scenario(untaken: list[Any]) -> None:
        listener = await serve(TlsContexts(STRANGERS.files("server")), Recorder())
        with pytest.raises(HandshakeRefused, match="not one of this cluster's CA"):
            await connect(listener.endpoint, **caller(TlsContexts(FILES), Recorder()))
        await until(lambda: listener.counters.handshakes_refused == 1)
        await listener.close()

    run(loop, scenario)


@pytest.mark.parametrize("loop", ["uvloop", "the standard loop"])
def test_a_caller_of_another_ca_is_refused_with_words_and_counted(
    loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        listener = await serve(TlsContexts(FILES), there)
        # It trusts the cluster, but has a certificate of its own making.
        stranger = msgspec.structs.replace(STRANGERS.files("caller"), ca=CLUSTER.ca)
        # The verdict may be cut off by the end of the connection that brings it.
        with pytest.raises((HandshakeRefused, LinkClosed)):
            await connect(listener.endpoint, **caller(TlsContexts(stranger), Recorder()))
        await until(lambda: listener.counters.handshakes_refused == 1)
        assert not there.links
        await listener.close()

    with caplog.at_level(logging.WARNING):
        run(loop, scenario)
    assert "server refused a handshake" in caplog.text
    assert "not one of this cluster's CA" in caplog.text


def test_a_caller_without_tls_is_refused_and_counted() -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        listener = await serve(TlsContexts(FILES), there)
        with pytest.raises((HandshakeRefused, LinkClosed)):
            await connect(listener.endpoint, **caller(None, Recorder()))
        await until(lambda: listener.counters.handshakes_refused == 1)
        assert not there.links
        await listener.close()

    run("tls", scenario)


def test_a_server_without_tls_is_refused_with_words() -> None:
    async def scenario(untaken: list[Any]) -> None:
        listener = await listen(
            name="server",
            generation=GENERATION,
            node=NODE,
            secret=SECRET,
            handler=Recorder(),
            tcp_host="127.0.0.1",
            limits=Limits(close_timeout_s=0.5),
        )
        closed_at_the_end(listener)
        limits = Limits(handshake_timeout_s=2.0)
        with pytest.raises((HandshakeRefused, LinkClosed)):
            await connect(
                listener.endpoint, **caller(TlsContexts(FILES), Recorder()), limits=limits
            )
        await listener.close()

    run("tls", scenario)


def test_a_certificate_alone_does_not_let_anybody_in() -> None:
    async def scenario(untaken: list[Any]) -> None:
        tls = TlsContexts(FILES)
        listener = await serve(tls, Recorder())
        arguments = caller(tls, Recorder()) | {"secret": b"another secret"}
        with pytest.raises(HandshakeRefused, match="cluster secret"):
            await connect(listener.endpoint, **arguments)
        await listener.close()

    run("tls", scenario)


def test_older_tls_is_refused() -> None:
    async def scenario(untaken: list[Any]) -> None:
        tls = TlsContexts(FILES)
        listener = await serve(tls, Recorder())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(FILES.ca)
        context.load_cert_chain(FILES.certificate, FILES.key)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", listener.endpoint.port, ssl=context)
        await listener.close()

    run("tls", scenario)


def test_who_connects_and_says_nothing_is_given_up_and_does_not_hold_up_others() -> None:
    async def scenario(untaken: list[Any]) -> None:
        there = Recorder()
        tls = TlsContexts(FILES)
        listener = await serve(tls, there, handshake_timeout_s=0.2)
        with socket.create_connection(("127.0.0.1", listener.endpoint.port)):
            link = await connect(listener.endpoint, **caller(tls, Recorder()))
            await until(lambda: listener.counters.handshakes_refused == 1)
            assert listener.links
            link.close()
        await listener.close()

    run("tls", scenario)


def test_handshakes_under_way_are_bounded_and_given_up_on_close() -> None:
    async def scenario(untaken: list[Any]) -> None:
        listener = await serve(TlsContexts(FILES), Recorder(), links_max=2)
        address = ("127.0.0.1", listener.endpoint.port)
        silent = [socket.create_connection(address) for _ in range(3)]
        await until(lambda: listener.counters.handshakes_refused == 1)
        await listener.close()
        for each in silent:
            each.close()

    run("tls", scenario)


def test_a_certificate_is_renewed_under_a_listener(tmp_path: Path) -> None:
    """First one that nobody trusts; then, in the same files, one of the cluster."""

    def put(files: TlsFiles) -> None:
        for source, name in ((files.certificate, "node.pem"), (files.key, "node.key")):
            fresh = tmp_path / f"{name}.new"
            fresh.write_bytes(Path(source).read_bytes())
            fresh.rename(tmp_path / name)

    async def scenario(untaken: list[Any]) -> None:
        put(STRANGERS.files("old"))
        files = TlsFiles(
            certificate=str(tmp_path / "node.pem"), key=str(tmp_path / "node.key"), ca=CLUSTER.ca
        )
        listener = await serve(TlsContexts(files), Recorder())
        mine = TlsContexts(FILES)
        with pytest.raises(HandshakeRefused):
            await connect(listener.endpoint, **caller(mine, Recorder()))
        put(CLUSTER.files("new"))
        link = await connect(listener.endpoint, **caller(mine, Recorder()))
        link.close()
        await listener.close()

    run("tls", scenario)


def test_text_in_variables_does_as_well_as_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("certificate", "key", "ca"):
        monkeypatch.setenv(f"OUR_{name.upper()}", Path(getattr(FILES, name)).read_text())
    files = TlsFiles(certificate="env:OUR_CERTIFICATE", key="env:OUR_KEY", ca="env:OUR_CA")

    async def scenario(untaken: list[Any]) -> None:
        listener = await serve(TlsContexts(files), Recorder())
        link = await connect(listener.endpoint, **caller(TlsContexts(FILES), Recorder()))
        link.close()
        await listener.close()

    run("tls", scenario)


@pytest.mark.parametrize("wrong", ["certificate", "key", "ca"])
def test_files_that_are_not_what_they_must_be_are_named_and_not_quoted(
    wrong: str, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN NONSENSE-----\nhush\n-----END NONSENSE-----\n")
    for path in (str(broken), str(tmp_path / "missing.pem"), "env:NOT_SET"):
        files = msgspec.structs.replace(FILES, **{wrong: path})
        with pytest.raises(FailedPrecondition, match="data plane") as caught:
            TlsContexts(files)
        assert path.removeprefix("env:") in caught.value.message
        assert "hush" not in caught.value.message


def test_a_key_of_another_certificate_is_refused() -> None:
    files = msgspec.structs.replace(FILES, key=STRANGERS.files("other").key)
    with pytest.raises(FailedPrecondition, match="mismatch"):
        TlsContexts(files)
