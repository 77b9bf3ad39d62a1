"""The actors' shells, without Ray: what they refuse of a controller that has been succeeded."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from shards.actors import HostActor
from shards.orders import ActorReport, ActorSpec, Outcome, decode, encode


class Exited(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostActor]:
    def exit_process(status: int) -> None:
        raise Exited(status)

    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    monkeypatch.setattr("os._exit", exit_process)
    spec = ActorSpec(kind="host", name="host-0", directory=str(tmp_path), capacity_bytes=1 << 20)
    actor = HostActor(encode(spec), b"s" * 32)
    yield actor
    actor._io.run(actor._listener.close())
    actor._io.close()


def test_an_actor_lets_jax_use_what_it_is_told_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "n"))
    spec = ActorSpec(
        kind="host", name="h", directory=str(tmp_path), capacity_bytes=1, platforms="cpu"
    )
    actor = HostActor(encode(spec), b"s" * 32)
    actor._io.run(actor._listener.close())
    actor._io.close()
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def socket_of(actor: HostActor) -> Path:
    report = decode(asyncio.run(actor.report()), ActorReport)
    return Path(report.endpoint.path)


def test_a_controller_that_was_succeeded_cannot_stop_an_actor(actor: HostActor) -> None:
    asyncio.run(actor.unload(5, "nobody", 1))
    refusal = decode(asyncio.run(actor.stop(4)), Outcome)
    assert (refusal.code, "term 4 refused" in refusal.message) == ("FAILED_PRECONDITION", True)
    assert socket_of(actor).is_socket()


@pytest.mark.parametrize("term", [5, 6])
def test_the_controller_that_reigns_can(actor: HostActor, term: int) -> None:
    asyncio.run(actor.unload(5, "nobody", 1))
    path = socket_of(actor)
    with pytest.raises(Exited):
        asyncio.run(actor.stop(term))
    assert not path.exists(), "it listens no more"
