"""Ports of this machine: which are free, and whose they are before anybody listens."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.ports import PortClaim, claim_ports, claim_usual, free_ports


def test_routers_of_one_cluster_claim_a_port_together(tmp_path: Path) -> None:
    for _ in range(2):
        PortClaim(8501, "ours", tmp_path)


@pytest.mark.parametrize("owner", ["theirs", "our", "ours, too"])
def test_a_port_that_another_cluster_claims_is_in_use(tmp_path: Path, owner: str) -> None:
    held = PortClaim(8501, "ours", tmp_path)
    with pytest.raises(OSError, match="another cluster") as caught:
        PortClaim(8501, owner, tmp_path)
    assert caught.value.errno == errno.EADDRINUSE
    held.release()


def test_a_port_that_was_given_up_is_free_for_another_cluster(tmp_path: Path) -> None:
    PortClaim(8501, "ours", tmp_path).release()
    PortClaim(8501, "theirs", tmp_path)


def test_a_claim_lasts_as_long_as_any_process_that_inherited_it(tmp_path: Path) -> None:
    claim = PortClaim(8501, "ours", tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[claim.fileno()]
    ) as heir:
        claim.release()
        with pytest.raises(OSError, match="another cluster"):
            PortClaim(8501, "theirs", tmp_path)
        heir.communicate(b"\n")
    PortClaim(8501, "theirs", tmp_path).release()


def test_a_usual_port_that_is_claimed_gives_way_to_another() -> None:
    [taken] = claim_ports(1)
    other = claim_usual(taken.port)
    assert other.port != taken.port
    taken.release()
    again = claim_usual(taken.port)
    assert again.port == taken.port
    for claim in (other, again):
        claim.release()


def test_a_usual_port_that_somebody_has_on_any_interface_gives_way_to_another() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        claim = claim_usual(port)
        assert claim.port != port
        claim.release()


def test_free_ports_are_distinct_and_neither_those_of_rays_workers_nor_of_clients() -> None:
    ports = free_ports(4)
    assert len(set(ports)) == 4
    assert min(ports) >= 20_000
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports) < max(first, 21_000)
