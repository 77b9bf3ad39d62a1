"""Who keeps the GCS: it runs again as it was started, until Ray is stopped."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from batching.errors import FailedPrecondition, NotFound
from cluster.gcs_keeper import (
    Server,
    find_server,
    has_raylet,
    keep,
    keeps_its_state,
    server_to_keep,
)
from cluster.supervision import Intensity
from tests.e2e.running import ROOT, until

KEPT = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": "/nowhere"}
SLEEP = "import time; time.sleep(600)"
#: Lives once, and dies at once whenever it is started again.
FRAIL = (
    "import os, sys, time; from pathlib import Path; been = Path(sys.argv[1]);"
    "been.exists() and sys.exit(1); been.touch(); time.sleep(600)"
)


class Ray:
    """Two processes that look like a head's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Nobody listens on it; it only tells this Ray from others on the machine.
        self.port = 100_000 + secrets.randbelow(10**6)
        self.session = str(folder / "session")

    @contextlib.contextmanager
    def process(
        self, name: str, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        program = self.folder / name
        if not program.exists():
            program.symlink_to(Path(sys.executable).resolve())
        held = subprocess.Popen([str(program), *arguments], env=dict(environment or {}))
        try:
            yield held
        finally:
            held.kill()
            held.wait()

    def server(
        self, script: str = SLEEP, environment: Mapping[str, str] = KEPT
    ) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        options = [f"--gcs_server_port={self.port}", f"--session-dir={self.session}"]
        arguments = ["-c", script, str(self.folder / "been"), *options]
        return self.process("gcs_server", *arguments, environment=environment)

    def raylet(self) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        return self.process("raylet", "-c", SLEEP, f"--store_socket={self.session}/sockets/store")

    def found(self) -> Server:
        server = find_server(self.port)
        assert server is not None
        return server


@pytest.fixture
def ray(tmp_path: Path) -> Iterator[Ray]:
    ray = Ray(tmp_path)
    try:
        yield ray
    finally:
        while (server := find_server(ray.port)) is not None:
            os.kill(server.pid, signal.SIGKILL)


def test_a_server_is_found_by_its_port_with_all_that_starts_it(ray: Ray) -> None:
    assert find_server(ray.port) is None
    with ray.server() as held:
        until("a server", lambda: find_server(ray.port), 30.0)
        found = ray.found()
        assert found.pid == held.pid
        assert list(found.command) == held.args
        assert found.environment.items() >= KEPT.items()
        assert found.session == ray.session
        assert find_server(ray.port + 1) is None


def test_a_raylet_belongs_to_its_session(ray: Ray) -> None:
    assert not has_raylet(ray.session)
    with ray.raylet():
        until("a raylet", lambda: has_raylet(ray.session), 30.0)
        assert not has_raylet(f"{ray.session}-of-another")


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, False),
        ({"RAY_gcs_storage": "memory"}, False),
        ({"RAY_gcs_storage": "rocksdb"}, True),
        ({"RAY_REDIS_ADDRESS": ""}, False),
        ({"RAY_REDIS_ADDRESS": "redis:6379"}, True),
    ],
)
def test_state_is_kept_on_disk_or_in_redis_alone(settings: dict[str, str], kept: bool) -> None:
    server = Server(pid=1, command=("gcs_server",), environment=settings)
    assert keeps_its_state(server) is kept


def test_nothing_to_keep_is_refused(ray: Ray) -> None:
    with pytest.raises(NotFound, match="ray start"):
        server_to_keep(ray.port)


def test_a_server_that_would_come_back_empty_is_left_alone(ray: Ray) -> None:
    with ray.server(environment={}):
        until("a server", lambda: find_server(ray.port), 30.0)
        with pytest.raises(FailedPrecondition, match="RAY_gcs_storage=rocksdb"):
            server_to_keep(ray.port)


def test_a_server_runs_again_until_ray_is_stopped(ray: Ray) -> None:
    with ray.server() as first, ray.raylet() as raylet:
        until("a server", lambda: find_server(ray.port), 30.0)
        command = [sys.executable, "-m", "cluster.gcs_keeper", f"--port={ray.port}"]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as keeper:
            assert keeper.stderr is not None
            assert b"keeping the GCS" in keeper.stderr.readline()
            before = ray.found()
            first.kill()
            first.wait()
            until("another", lambda: find_server(ray.port), 30.0)
            again = ray.found()
            assert again.pid != before.pid
            assert again.command == before.command
            assert again.environment == before.environment

            raylet.kill()
            raylet.wait()
            os.kill(again.pid, signal.SIGTERM)
            _, told = keeper.communicate(timeout=30.0)
    assert keeper.returncode == 0
    assert b"it runs again" in told
    assert b"Ray was stopped" in told
    assert find_server(ray.port) is None


def test_a_server_that_dies_again_and_again_is_tried_after_pauses_until_ray_is_stopped(
    ray: Ray, caplog: pytest.LogCaptureFixture
) -> None:
    few = Intensity(
        crashes_max=2, backoff_first_s=0.01, backoff_s_max=0.01, pause_first_s=0.05, pause_s_max=0.1
    )
    with ray.server(FRAIL) as first, ray.raylet() as raylet:
        until("a server", (ray.folder / "been").exists, 30.0)
        server = ray.found()
        os.kill(first.pid, signal.SIGKILL)
        keeper = threading.Thread(target=keep, args=(server, few))
        keeper.start()
        until("pauses", lambda: caplog.text.count("the GCS died 3 times") >= 2, 30.0)
        raylet.kill()
        raylet.wait()
        keeper.join(30.0)
    assert not keeper.is_alive()
    assert "it runs again" in caplog.text
