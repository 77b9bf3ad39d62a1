"""The REST door behind TLS: what it shows, whom it takes, and certificates that change."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
import trustme

from batching.errors import FailedPrecondition
from cluster.doors.certificates import server_context
from cluster.doors.rest import RestDoor
from cluster.doors.service import Service
from cluster.doors.settings import DoorLimits, Tls
from cluster.doors.watched import Watched, follow
from tests.cluster.rest_clients import LOOPS, Client, FakeService, get, post, run_on, until

CA = trustme.CA()
OTHER_CA = trustme.CA()


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def issue(directory: Path, ca: trustme.CA = CA, *, clients: trustme.CA | None = None) -> Tls:
    """A fresh certificate for 127.0.0.1, put in place as a person would: by renaming."""
    leaf = ca.issue_cert("127.0.0.1")
    for name, pem in (("crt", leaf.cert_chain_pems[0]), ("key", leaf.private_key_pem)):
        pem.write_to_path(str(directory / "new"))
        os.replace(directory / "new", directory / name)
    client_ca = ""
    if clients is not None:
        clients.cert_pem.write_to_path(str(directory / "ca"))
        client_ca = str(directory / "ca")
    return Tls(certificate=str(directory / "crt"), key=str(directory / "key"), client_ca=client_ca)


def trusting(ca: trustme.CA = CA, *, identity: trustme.CA | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    if identity is not None:
        identity.issue_cert("client@example.org").configure_cert(context)
    return context


class Scene:
    def __init__(self, door: RestDoor, service: FakeService, port: int) -> None:
        self.door = door
        self.service = service
        self.port = port
        self._clients: list[Client] = []

    async def client(self, context: ssl.SSLContext) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port, ssl=context))
        self._clients.append(client)
        return client

    async def refused(self, context: ssl.SSLContext) -> None:
        """Ask; with TLS 1.3 a client learns of its refusal when it reads."""
        client = await self.client(context)
        client.send(get("/echo/stranger"))
        await client.reply()

    async def serial_after(self, before: int) -> int:
        """Of the certificate that new clients see, once it is another."""
        while True:
            serial = await self.serial_shown()
            if serial != before:
                return serial
            await asyncio.sleep(0.01)

    async def serial_shown(self) -> int:
        """Of the certificate that a new client sees."""
        client = await self.client(trusting())
        client.send(get("/echo"))
        assert (await client.reply()).status == 200
        found = client._writer.get_extra_info("ssl_object").getpeercert()
        return int(found["serialNumber"], 16)

    async def close(self) -> None:
        for client in self._clients:
            await client.close()
        await self.door.close(grace_s=0.1)


@asynccontextmanager
async def door_open(tls: Tls, limits: DoorLimits | None = None) -> AsyncIterator[Scene]:
    service = FakeService()
    door = RestDoor(cast(Service, service), limits)
    context, _ = server_context(tls)
    scene = Scene(door, service, await door.open("127.0.0.1", 0, context=context))
    try:
        yield scene
    finally:
        await scene.close()


def test_requests_large_and_small_are_answered(loop: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with door_open(issue(tmp_path)) as scene:
            client = await scene.client(trusting())
            for size in (0, 10, 1 << 20, 3):
                client.send(post("/echo", "x" * size))
                assert len((await client.reply()).json["body"]) == size
            client.send(get("/echo/1") + get("/big") + get("/echo/2", "Connection: close"))
            statuses = [(await client.reply()).status for _ in range(3)]
            assert statuses == [200, 200, 200]

    run_on(loop, scenario)


def test_a_refusal_arrives_and_the_connection_closes(loop: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        limits = DoorLimits(body_bytes_max=1000)
        async with door_open(issue(tmp_path), limits) as scene:
            client = await scene.client(trusting())
            client.send(post("/echo", "x" * 2000))
            reply = await client.reply()
            assert (reply.status, reply.headers["connection"]) == (413, "close")
            await client.close()
            await until(lambda: not scene.door.connections)

    run_on(loop, scenario)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_1_2_and_1_3_are_spoken(loop: str, tmp_path: Path, version: ssl.TLSVersion) -> None:
    async def scenario() -> None:
        async with door_open(issue(tmp_path)) as scene:
            context = trusting()
            context.minimum_version = context.maximum_version = version
            client = await scene.client(context)
            client.send(get("/echo"))
            assert (await client.reply()).status == 200

    run_on(loop, scenario)


def test_older_versions_are_not_offered(tmp_path: Path) -> None:
    context, _ = server_context(issue(tmp_path))
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_plain_http_to_a_tls_port_reaches_no_service(loop: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with door_open(issue(tmp_path)) as scene:
            client = Client(*await asyncio.open_connection("127.0.0.1", scene.port))
            client.send(get("/echo"))
            assert b"200" not in await client.rest()
            await client.close()
            assert scene.service.paths == []

    run_on(loop, scenario)


def test_only_clients_of_the_declared_authority_are_served(loop: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with door_open(issue(tmp_path, clients=CA)) as scene:
            client = await scene.client(trusting(identity=CA))
            client.send(get("/echo/known"))
            assert (await client.reply()).status == 200
            for stranger in (None, OTHER_CA):
                with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
                    await scene.refused(trusting(identity=stranger))
            assert scene.service.paths == [b"/echo/known"]

    run_on(loop, scenario)


def test_a_client_that_never_shakes_hands_is_cut(loop: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with door_open(issue(tmp_path), DoorLimits(head_s=0.1)) as scene:
            client = Client(*await asyncio.open_connection("127.0.0.1", scene.port))
            assert await asyncio.wait_for(client.rest(), 10.0) == b""
            await client.close()
            assert not scene.door.connections

    run_on(loop, scenario)


def test_changed_certificates_are_shown_to_new_clients_and_cut_no_old_one(
    tmp_path: Path,
) -> None:
    """On uvloop, as routers run. asyncio's own server forgets a client that it has just accepted
    when it is closed (CPython's `Server._attach`), which is what makes it unfit here."""

    async def scenario() -> None:
        tls = issue(tmp_path)
        watched = Watched(lambda: server_context(tls))
        async with door_open(tls) as scene:
            following = asyncio.create_task(follow(watched, scene.door.use_certificates, 0.01))
            old = await scene.client(trusting())
            old.send(get("/later"))
            await until(lambda: len(scene.service.waiting) == 1)
            seen = [await scene.serial_shown()]
            for _ in range(2):
                issue(tmp_path)
                seen.append(await scene.serial_after(seen[-1]))
            assert len(set(seen)) == 3
            scene.service.answer_one()
            assert (await old.reply()).json == "late"
            old.send(get("/echo"))
            assert (await old.reply()).status == 200
            following.cancel()

    run_on("uvloop", scenario)


def test_certificates_that_do_not_fit_keep_the_last_good(tmp_path: Path) -> None:
    tls = issue(tmp_path)
    watched = Watched(lambda: server_context(tls))
    watched.poll()
    good = watched.value
    (tmp_path / "crt").write_bytes(OTHER_CA.issue_cert("127.0.0.1").cert_chain_pems[0].bytes())
    assert not watched.poll()
    assert "KEY_VALUES_MISMATCH" in watched.error
    assert watched.value is good
    issue(tmp_path)
    assert watched.poll()
    assert (watched.error, watched.value is good) == ("", False)


@pytest.mark.parametrize(
    ("name", "content"), [("crt", b"not pem"), ("key", b""), ("ca", b"x"), ("crt", None)]
)
def test_bad_files_are_named_and_not_shown(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    tls = issue(tmp_path, clients=CA)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FailedPrecondition, match="certificates") as caught:
        server_context(tls)
    assert str(tmp_path / name) in caught.value.message
