"""By which plane an actor is reached, and when that changes."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

import pytest

from cluster.dialing import Dialing
from cluster.specs import Membership, Transport
from shards.errors import HandshakeRefused, LinkClosed
from shards.orders import Endpoint, TlsFiles
from shards.transport import Link, LinkHandler

HANDLER = cast(LinkHandler, None)


class Plane:
    """Opens links, or fails as it is told to; a link is the plane's own name."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name = name
        self.error = error
        self.dialled: list[int] = []

    async def dial(self, endpoint: Endpoint, handler: LinkHandler) -> Link:
        self.dialled.append(endpoint.generation)
        if self.error is not None:
            raise self.error
        link: Any = self.name
        return cast(Link, link)


def tried(
    transport: Transport, sockets: Plane, calls: Plane, *generations: int
) -> list[str | type[Exception]]:
    """What came of dialling one actor again and again, in these generations."""
    dialing = Dialing(transport, sockets.dial, calls.dial)

    async def scenario() -> list[str | type[Exception]]:
        outcomes: list[str | type[Exception]] = []
        for generation in generations:
            endpoint = Endpoint(actor="shard-0", generation=generation, node="n")
            try:
                outcomes.append(cast(str, await dialing.dial(endpoint, HANDLER)))
            except Exception as error:
                outcomes.append(type(error))
        return outcomes

    return asyncio.run(scenario())


def test_sockets_come_first_and_nothing_else_is_tried_while_they_answer() -> None:
    calls = Plane("calls")
    assert tried("auto", Plane("sockets"), calls, 1, 1) == ["sockets", "sockets"]
    assert calls.dialled == []


def test_two_closed_ports_in_a_row_lead_to_ray_calls_and_stay_with_them() -> None:
    sockets = Plane("sockets", LinkClosed("connection refused"))
    assert tried("auto", sockets, Plane("calls"), 1, 1, 1) == [LinkClosed, "calls", "calls"]
    assert sockets.dialled == [1, 1]


def test_another_process_of_that_name_is_looked_for_at_its_own_port() -> None:
    sockets = Plane("sockets", LinkClosed("connection refused"))
    found = tried("auto", sockets, Plane("calls"), 1, 1, 2, 2)
    assert found == [LinkClosed, "calls", LinkClosed, "calls"]


def test_an_actor_that_ray_does_not_reach_either_is_looked_for_again_at_its_port() -> None:
    sockets = Plane("sockets", LinkClosed("connection refused"))
    calls = Plane("calls", LinkClosed("Ray knows no shard-0"))
    assert tried("auto", sockets, calls, 1, 1, 1) == [LinkClosed] * 3
    assert sockets.dialled == [1, 1, 1]
    assert calls.dialled == [1, 1]


def test_an_actor_whose_port_has_answered_is_not_looked_for_elsewhere() -> None:
    sockets, calls = Plane("sockets"), Plane("calls")
    dialing = Dialing("auto", sockets.dial, calls.dial)
    endpoint = Endpoint(actor="shard-0", generation=1, node="n")

    async def scenario() -> None:
        await dialing.dial(endpoint, HANDLER)
        sockets.error = LinkClosed("connection refused")
        for _ in range(4):
            with pytest.raises(LinkClosed):
                await dialing.dial(endpoint, HANDLER)

    asyncio.run(scenario())
    assert calls.dialled == []


def test_a_refused_handshake_is_an_answer() -> None:
    calls = Plane("calls")
    refused = Plane("sockets", HandshakeRefused("wrong secret"))
    assert tried("auto", refused, calls, 1, 1, 1) == [HandshakeRefused] * 3
    assert calls.dialled == []


@pytest.mark.parametrize(("transport", "found"), [("sockets", LinkClosed), ("ray", "calls")])
def test_one_plane_alone_is_used_where_that_is_declared(transport: Transport, found: Any) -> None:
    sockets = Plane("sockets", LinkClosed("connection refused"))
    assert tried(transport, sockets, Plane("calls"), 1, 1, 1) == [found] * 3


def test_the_log_says_once_loudly_that_ports_are_closed(caplog: pytest.LogCaptureFixture) -> None:
    sockets = Plane("sockets", LinkClosed("shard-0 cannot be reached: connection refused"))
    with caplog.at_level(logging.INFO, "cluster.dialing"):
        tried("auto", sockets, Plane("calls"), 1, 1, 1, 2, 2)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "connection refused; it is reached by Ray calls instead" in caplog.records[0].message


@pytest.mark.parametrize(
    ("declared", "with_tls", "planes"),
    [
        ("auto", False, "auto"),
        ("auto", True, "sockets"),
        ("ray", True, "ray"),
        ("sockets", False, "sockets"),
    ],
)
def test_a_closed_port_does_not_lead_out_of_tls(
    declared: Transport, with_tls: bool, planes: Transport
) -> None:
    tls = TlsFiles(certificate="c", key="k", ca="a") if with_tls else None
    assert Membership(secret=b"s", tls=tls, transport=declared).planes == planes
