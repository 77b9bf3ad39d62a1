"""The load that runs beside a benchmark: what it books, and how it ends."""

from __future__ import annotations

import threading

from bench.load import Request
from bench.traffic import Asked, Traffic
from tests.bench.fakes import TinyServer, eventually


def asked(owner: str, read: tuple[int, ...] | None) -> Asked:
    def told(body: bytes) -> tuple[int, ...]:
        if read is None:
            raise ValueError("no answer")
        return read

    return Asked(owner, Request(path=f"/{owner}", body=b"x"), told)


def test_every_kind_is_asked_and_booked_with_what_it_was_told() -> None:
    before = threading.active_count()
    with TinyServer().running() as url:
        kinds = [asked("a", (1, 1)), asked("b", (2,))]
        with Traffic(url, kinds, rate=400.0, seed=1) as traffic:
            assert eventually(lambda: len(traffic.attempts) >= 50)
        owners = {each.owner: each.told for each in traffic.attempts}
    assert owners == {"a": (1, 1), "b": (2,)}
    assert traffic.errors == {}
    assert all(each.is_right and each.took_s > 0 for each in traffic.attempts)
    assert eventually(lambda: threading.active_count() <= before)


def test_bad_statuses_and_bodies_are_errors_in_the_book() -> None:
    with TinyServer(status=503).running() as url:
        with Traffic(url, [asked("a", (1,))], rate=400.0, seed=1) as traffic:
            assert eventually(lambda: len(traffic.attempts) >= 5)
        assert traffic.errors == {"status": len(traffic.attempts)}
    with TinyServer().running() as url:
        with Traffic(url, [asked("a", None)], rate=400.0, seed=1) as traffic:
            assert eventually(lambda: len(traffic.attempts) >= 5)
        assert traffic.errors == {"wrong": len(traffic.attempts)}
    assert not any(each.is_right for each in traffic.attempts)
