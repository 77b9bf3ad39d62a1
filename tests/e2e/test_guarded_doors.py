"""Doors with keys and certificates, on a real cluster."""

from __future__ import annotations

import hashlib
import http.client
import os
import signal
import ssl
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import trustme

from tests.e2e import models
from tests.e2e.running import Cluster, is_open, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

SECRET = "the-key-of-this-test"
OTHER = "another-key-of-this-test"
BODY = b'{"instances": [[1.0, 2.0, 3.0, 4.0]]}'


#: So large that it is read in a process of its own.
LARGE = b'{"instances": [' + b",".join([b"[0.1234567890, 0.1, 0.2, 0.3333333333]"] * 4000) + b"]}"


def keys_text(secret: str) -> str:
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return f"keys: [{{name: tester, sha256: {digest}, predict: [mlp], metadata: ['*']}}]"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster with keys at both doors and TLS at the direct port, not up yet."""
    authority = trustme.CA()
    leaf = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    leaf.cert_chain_pems[0].write_to_path(str(tmp_path / "crt.pem"))
    leaf.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    cluster = Cluster(
        tmp_path,
        f"guarded-{os.getpid()}",
        shards=0,
        hosts=0,
        auth={"keys": "keys.yaml"},
        http={"port": 0, "tls": {"certificate": "crt.pem", "key": "key.pem"}},
    )
    cluster.environment["SSL_CERT_FILE"] = str(tmp_path / "ca.pem")
    models.save_mlp(cluster.store, 1)
    cluster.declare({"name": "mlp"})
    yield cluster
    if cluster.ray_file():
        cluster.down()


def status(
    cluster: Cluster,
    url: str,
    key: str,
    path: str = "/v1/models/mlp:predict",
    body: bytes = BODY,
) -> int:
    parts = urlsplit(url)
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=str(cluster.folder / "ca.pem"))
        connection = http.client.HTTPSConnection(parts.netloc, timeout=30.0, context=context)
    else:
        connection = http.client.HTTPConnection(parts.netloc, timeout=30.0)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        connection.request("POST" if path.endswith("predict") else "GET", path, body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


def takes(cluster: Cluster, url: str, key: str) -> bool:
    """Whether a key is good at a door; one that is about to open takes none."""
    try:
        return status(cluster, url, key) == 200
    except OSError:
        return False


def door_of(cluster: Cluster) -> dict[str, Any]:
    """The direct port's, as the controller knows it; nobody's where it knows of none."""
    doors: list[dict[str, Any]] = cluster.status()["doors"]
    return doors[0] if doors else {"warnings": [], "error": ""}


def warning(cluster: Cluster) -> dict[str, Any] | None:
    """The door, once it warns of its keys."""
    door = door_of(cluster)
    return door if "not YAML" in str(door["warnings"]) else None


def test_both_doors_ask_for_keys_and_new_keys_count_without_a_restart(cluster: Cluster) -> None:
    keys = cluster.folder / "keys.yaml"
    keys.write_text(keys_text(SECRET))
    cluster.up()
    assert cluster.rest.startswith("https://")
    for url in (cluster.rest, cluster.serve):
        assert status(cluster, url, "", "/healthz") == 200
        assert status(cluster, url, "") == 401
        assert status(cluster, url, OTHER) == 401
        assert status(cluster, url, SECRET) == 200
        assert status(cluster, url, SECRET, body=LARGE) == 200
        assert status(cluster, url, SECRET, "/metrics") == 403
    cluster.environment["SHARDSERVE_KEY"] = SECRET
    told = cluster.run("predict", "mlp", "--url", cluster.rest, "--data", BODY.decode())
    assert '"predictions"' in told.stdout, told.stderr

    keys.write_text(keys_text(OTHER))
    for url in (cluster.rest, cluster.serve):
        until("the new key", partial(takes, cluster, url, OTHER), 60.0)
        assert status(cluster, url, SECRET) == 401

    # Broken, the file keeps the keys that were read, but for a door that opens anew.
    keys.write_text("keys: [")
    warned = until("a warning", lambda: warning(cluster), 30.0)
    assert takes(cluster, cluster.rest, OTHER)
    os.kill(warned["pid"], signal.SIGKILL)
    until("a closed door", lambda: "not YAML" in door_of(cluster)["error"], 60.0)
    assert not is_open(cluster.rest)
    keys.write_text(keys_text(SECRET))
    until("an open door", partial(takes, cluster, cluster.rest, SECRET), 60.0)
