"""What `up` refuses before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from batching.errors import FailedPrecondition
from cluster import bringup, local_ray
from cluster.config import Address, ClusterConfig, Config, HttpConfig, LinkTls


def test_certificates_that_cannot_be_used_are_told_before_ray_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDSERVE_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(local_ray, "start", lambda *_: pytest.fail("Ray was started"))
    missing = str(tmp_path / "node.pem")
    config = Config(
        store=str(tmp_path),
        cluster=ClusterConfig(
            http=HttpConfig(port=0),
            serve=Address(port=0),
            tls=LinkTls(certificate=missing, key=missing, ca=missing),
        ),
    )
    with pytest.raises(FailedPrecondition, match=r"data plane's .*node\.pem: No such file"):
        bringup.up(config, console=Console(quiet=True))
