"""The store of ``faults``: a bucket that fills with versions, and a server that can be silent."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from bench.errors import ContenderFailed
from bench.faults_bucket import CREDENTIALS, Bucket
from bench.faults_model import SERVABLES, save
from bench.hosts import available
from cluster.ports import free_ports
from shards.store import open_store
from tests.bench.fakes import eventually

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("nsenter") is None or bool(available(ssh=False)),
        reason="only root enters networks",
    ),
]


def answers(port: int) -> bool:
    """Whether the server says anything to a request within a moment."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=0.3) as peer:
            peer.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return bool(peer.recv(1))
    except TimeoutError:
        return False


def test_versions_appear_whole_and_the_server_can_be_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    save(tmp_path / "source", 1)
    (port,) = free_ports(1)
    bucket = Bucket(tmp_path / "source", network=os.getpid(), address="127.0.0.1", port=port)
    with bucket.running():
        store = open_store(bucket.url)
        assert store.servables() == ()
        bucket.publish(1)
        assert store.servables() == SERVABLES
        for name in SERVABLES:
            assert store.check(name, 1).version == 1
        with pytest.raises(ContenderFailed, match="cannot fill"):
            bucket.publish(2)

        bucket.freeze()
        assert not answers(port)
        bucket.thaw()
        assert eventually(lambda: answers(port))
        with bucket.slow():
            assert eventually(lambda: answers(port)), "by turns"
        assert eventually(lambda: answers(port))
    with pytest.raises(OSError, match="refused"):
        answers(port)
