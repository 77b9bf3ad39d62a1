"""Hosts out of namespaces: apart from each other and from us, and gone without a trace."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.errors import ContenderFailed, ToolMissing
from bench.hosts import SUBNET, Host, Hosts, available
from bench.report import ROOT

REASON, REASON_SSH = available(ssh=False), available()
needs_hosts = pytest.mark.skipif(bool(REASON), reason=f"NO NAMESPACE HOSTS: {REASON}")
needs_ssh = pytest.mark.skipif(bool(REASON_SSH), reason=f"NO SSH TO HOSTS: {REASON_SSH}")


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("hosts"), ssh=not REASON_SSH) as net:
        yield net


def until(look: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ssh(
    net: Hosts, host: Host, command: str, within_s: int = 30
) -> subprocess.CompletedProcess[str]:
    patience = f"ConnectTimeout={within_s}"  # the greeting of a busy host is part of it
    options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", patience]
    flags = [word for option in options for word in ("-o", option)]
    there = f"root@{host.address}"
    return net.run(net.operator, ["ssh", *flags, "-i", str(net.key), there, command])


@needs_hosts
def test_a_host_has_a_name_and_an_address_of_its_own(net: Hosts) -> None:
    assert [host.address for host in net.hosts] == [f"{SUBNET}.1", f"{SUBNET}.2"]
    for host in net.hosts:
        assert net.run(host, ["hostname"]).stdout.strip() == host.name
        assert host.address in net.run(host, ["ip", "-4", "-br", "address"]).stdout


@needs_hosts
@pytest.mark.parametrize("directory", ["/tmp", "/dev/shm", "/run", str(Path.home())])
def test_what_a_host_writes_there_is_seen_by_itself_only(net: Hosts, directory: str) -> None:
    one, two = net.hosts
    file = f"{directory}/mark-of-{one.name}"
    assert net.run(one, ["touch", file]).returncode == 0
    assert net.run(one, ["test", "-e", file]).returncode == 0
    assert net.run(two, ["test", "-e", file]).returncode == 1
    assert not Path(file).exists()


@needs_hosts
def test_the_folder_is_shared(net: Hosts) -> None:
    one, two = net.hosts
    net.run(one, ["sh", "-c", f"echo seen >{net.folder}/shared"])
    assert net.run(two, ["cat", f"{net.folder}/shared"]).stdout == "seen\n"
    assert (net.folder / "shared").read_text() == "seen\n"


@needs_hosts
def test_our_python_and_checkout_are_seen_by_a_host(net: Hosts) -> None:
    script = "import bench.hosts, sys; print(sys.prefix)"
    told = net.run(net.hosts[0], [sys.executable, "-c", script], folder=ROOT)
    assert told.stdout.strip() == sys.prefix, told.stderr


@needs_ssh
def test_the_operator_reaches_every_host_by_ssh(net: Hosts) -> None:
    for host in net.hosts:
        assert ssh(net, host, "hostname").stdout.strip() == host.name


@needs_ssh
def test_a_host_that_was_cut_off_is_silent_until_it_is_healed(net: Hosts) -> None:
    one, two = net.hosts
    net.cut(two)
    try:
        assert "timed out" in ssh(net, two, "hostname", within_s=1).stderr
        assert ssh(net, one, "hostname").returncode == 0
    finally:
        net.heal(two)
    assert ssh(net, two, "hostname").stdout.strip() == two.name


@needs_ssh
def test_joined_puts_our_sockets_onto_their_network(net: Hosts) -> None:
    address = (net.hosts[0].address, 22)
    ours = os.readlink("/proc/thread-self/ns/net")
    with net.joined(), socket.create_connection(address, timeout=30.0) as connection:
        assert connection.recv(4) == b"SSH-"
        assert os.readlink("/proc/thread-self/ns/net") != ours
    assert os.readlink("/proc/thread-self/ns/net") == ours


@needs_hosts
def test_a_command_that_fails_says_so(net: Hosts) -> None:
    done = net.run(net.hosts[0], ["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


@needs_hosts
def test_a_command_has_the_given_environment_and_nothing_of_ours(
    net: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OURS", "1")
    told = net.run(net.hosts[0], ["env"], environment={"THEIRS": "2"}).stdout.splitlines()
    assert "THEIRS=2" in told
    assert "OURS=1" not in told


@needs_hosts
def test_a_command_that_takes_too_long_is_killed(net: Hosts) -> None:
    host = net.hosts[0]
    assert net.run(host, ["sleep", "1234"], timeout_s=0.1).returncode == -signal.SIGKILL
    until(lambda: net.pids(host, "sleep 1234") == [])


@needs_hosts
def test_pids_are_those_of_the_host_and_may_be_signalled(net: Hosts) -> None:
    one, two = net.hosts
    net.run(one, ["sh", "-c", "sleep 2345 & sleep 2346 &"])
    # A child that has not yet become what it is to run still bears the whole line of its parent.
    until(lambda: len(net.pids(one, "sleep 2345")) == len(net.pids(one, "sleep 2346")) == 1)
    [pid] = net.pids(one, "sleep 2345")
    assert len(net.pids(one)) == 2
    assert net.pids(two) == []
    os.kill(pid, signal.SIGKILL)
    until(lambda: net.pids(one, "sleep 2345") == [])
    net.run(one, ["pkill", "sleep"])
    until(lambda: net.pids(one) == [])


@needs_hosts
def test_an_orphan_that_ends_leaves_no_zombie(net: Hosts) -> None:
    host = net.hosts[0]
    net.run(host, ["sh", "-c", "cp /bin/true /tmp/orphan; (/tmp/orphan &)"])
    until(lambda: "orphan" not in net.run(host, ["ps", "-eo", "comm"]).stdout)


@needs_ssh
def test_two_networks_may_exist_at_once(net: Hosts, tmp_path: Path) -> None:
    with Hosts(tmp_path, count=1) as other:
        [host] = other.hosts
        assert host.address == net.hosts[0].address
        other.run(host, ["touch", "/tmp/other"])
        assert ssh(other, host, "ls /tmp").stdout.split().count("other") == 1
        assert "other" not in ssh(net, net.hosts[0], "ls /tmp").stdout.split()


@needs_hosts
def test_nothing_is_left_at_the_end(tmp_path: Path) -> None:
    before = Path("/proc/net/dev").read_text().count("\n")
    with Hosts(tmp_path, ssh=False) as net:
        for host in net.hosts:
            net.run(host, ["sh", "-c", "trap '' TERM HUP; sleep 3456 &"])
        held = [pid for host in net.hosts for pid in (host.pid, *net.pids(host))]
        assert len(held) == 4
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in held))
    until(lambda: Path("/proc/net/dev").read_text().count("\n") <= before)


@needs_hosts
def test_nothing_is_left_when_the_run_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from bench.hosts import Hosts\n"
        f"with Hosts(Path({str(tmp_path)!r}), ssh=False) as net:\n"
        "    for host in net.hosts: net.run(host, ['sh', '-c', 'sleep 4567 &'])\n"
        "    print(*[p for h in net.hosts for p in (h.pid, *net.pids(h))], flush=True)\n"
        "    sys.stdin.read()"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert run.stdin is not None
    assert run.stdout is not None
    with run.stdin, run.stdout:
        held = [int(word) for word in run.stdout.readline().split()]
        assert len(held) == 4
        run.kill()
        run.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in held))


@needs_hosts
def test_a_host_that_cannot_start_is_told_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.hosts._INIT", "echo no such luck; exit 1")
    with pytest.raises(ContenderFailed, match="no such luck"), Hosts(tmp_path, ssh=False):
        pass


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "ip" else "/bin/true")
    assert available() == "not installed: iproute2"
    with pytest.raises(ToolMissing, match="iproute2"), Hosts(tmp_path):
        pass


def test_ssh_needs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: None if "ssh" in tool else "/bin/true")
    assert available() == "not installed: openssh-client, openssh-server"
    assert "openssh" not in available(ssh=False)


def test_only_root_can_have_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in available()
