"""Several hosts on one machine, out of Linux namespaces: what a cluster over a network is tried on.

A host has a network, process ids, a name, and private ``/tmp``, ``/run``, ``/dev/shm`` and home of
its own, and, if it is to, an sshd that lets the operator in. The operator is one more host, without
sshd: the machine at which a person types ``ray up``. It holds the bridge that joins the others, so
nothing of all this is seen from outside, two networks may exist at once under the same addresses,
and no packet can leave. What is shared is the folder: the hosts' network file system.

Nothing is left behind, however the run ends. Each host's first process waits for the end of a pipe
whose other end only we hold; when it is gone, the kernel ends every process of the host, and with
them goes the network. This file does not know what the hosts are for.

Needs root, Linux namespaces, iproute2 and util-linux; for ssh openssh's client and server.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.errors import ContenderFailed, ToolMissing
from bench.report import ROOT

__all__ = ["SUBNET", "Host", "Hosts", "available"]

SUBNET: Final = "10.77.0"

_SSHD: Final = "/usr/sbin/sshd"
_TOOLS: Final = {"ip": "iproute2", "nsenter": "util-linux", "unshare": "util-linux"}
_SSH_TOOLS: Final = {
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    _SSHD: "openssh-server",
}
_END_S: Final = 20.0
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_UNSHARE: Final = ("unshare", "--net", "--mount", "--pid", "--uts", "--fork", "--mount-proc")

#: The first process of a host. Arguments: name, home, configuration of sshd or "", and the paths
#: that stay visible although they lie in a directory that becomes private. dash reaps orphans
#: while it waits for `cat`, as an init must.
_INIT: Final = """
set -eu
hostname "$1"; home="$2"; sshd="$3"; shift 3
mount -t tmpfs kept /mnt
n=0; for path; do mkdir "/mnt/$n"; mount --bind "$path" "/mnt/$n"; n=$((n + 1)); done
for private in /tmp /run /dev/shm "$home"; do
  mount -t tmpfs -o mode=1777 private "$private"
done
chmod 700 "$home"; cp -r /etc/skel/. "$home"; mkdir -p /run/sshd
n=0; for path; do mkdir -p "$path"; mount --move "/mnt/$n" "$path"; n=$((n + 1)); done
umount /mnt
if [ -n "$sshd" ]; then /usr/sbin/sshd -f "$sshd" -E "$home/sshd.log"; fi
echo ready
cat
"""


def available(*, ssh: bool = True) -> str:
    """Why there can be no hosts on this machine, or "" if there can.

    Namespaces are tried, since a container may have them or not.

    Args:
        ssh: whether they are to be reached by ssh.
    """
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    tools = {**_TOOLS, **(_SSH_TOOLS if ssh else {})}
    missing = sorted({package for tool, package in tools.items() if shutil.which(tool) is None})
    if missing:
        return f"not installed: {', '.join(missing)}"
    tried = subprocess.run(
        [*_UNSHARE, "sh", "-c", "ip link add br0 type bridge && mount -t tmpfs try /mnt"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One host.

    Attributes:
        name: its hostname.
        address: of its only interface.
        pid: its first process, as we see it.
    """

    name: str
    address: str
    pid: int


class Hosts:
    """A network of hosts and an operator, for as long as the context lasts.

    Args:
        count: hosts, without the operator.
        ssh: whether the operator can come in by it.
        folder: absolute; seen by all of them under the same path. With ssh it gets ``id``, the key
            that opens every host to ``root``.

    Attributes:
        hosts: the hosts.
        operator: where commands are typed.
        key: private half of the key.
    """

    def __init__(self, folder: Path, count: int = 2, *, ssh: bool = True) -> None:
        assert folder.is_absolute()
        assert 1 <= count < 250
        self.folder = folder
        self.key = folder / "id"
        self.hosts: tuple[Host, ...] = ()
        self.operator = Host(name="", address="", pid=0)
        self._count = count
        self._ssh = ssh
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Hosts:
        """Make them.

        Raises:
            ToolMissing: this machine cannot have any; see `available`.
            ContenderFailed: one did not start; with what it said.
        """
        if reason := available(ssh=self._ssh):
            raise ToolMissing(f"no namespace hosts: {reason}")
        with contextlib.ExitStack() as cleanup:
            self._start(cleanup)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """End every process of every host; the kernel takes the rest away."""
        self._cleanup.close()

    def _start(self, cleanup: contextlib.ExitStack) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        sshd = self._write_sshd() if self._ssh else None
        names = ["operator", *(f"host{number}" for number in range(1, self._count + 1))]
        # All at once: each takes a moment to mount what is its own.
        booted = [
            cleanup.enter_context(_boot(name, self._kept(), sshd if number else None))
            for number, name in enumerate(names)
        ]
        operator, *hosts = [_first_process(process) for process in booted]
        self.operator = Host(name="operator", address=f"{SUBNET}.254", pid=operator)
        self._wire_operator()
        self.hosts = tuple(
            Host(name=names[number], address=f"{SUBNET}.{number}", pid=pid)
            for number, pid in enumerate(hosts, start=1)
        )
        for host in self.hosts:
            self._wire(host)

    def run(
        self,
        host: Host,
        command: Sequence[str],
        *,
        timeout_s: float = 60.0,
        environment: Mapping[str, str] | None = None,
        folder: str | Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end, whatever that is.

        It may leave processes behind: they are the host's, and keep nothing of ours open.

        Args:
            host: of these hosts, or the operator.
            command: program and arguments.
            timeout_s: after which it is killed, with status -9.
            environment: added to that of a fresh login of root.
            folder: where to run it; the home if not given.
        """
        home = str(Path.home())
        variables = {"HOME": home, "USER": "root", "LANG": "C.UTF-8", "PATH": _PATH}
        settings = [
            f"{name}={value}" for name, value in {**variables, **(environment or {})}.items()
        ]
        entering = ["nsenter", "-t", str(host.pid), "--mount", "--pid", "--net", "--uts"]
        clean = ["env", "-i", "-C", str(folder or home), *settings]
        limit = ["timeout", "--signal=KILL", f"{timeout_s:g}"]
        # Files, not pipes: a daemon that inherited a pipe would keep us waiting for its end.
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            done = subprocess.run(
                [*entering, *clean, *limit, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                check=False,
            )
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(
                list(command), done.returncode, out.read(), err.read()
            )

    def cut(self, host: Host) -> None:
        """Take a host off the network: its packets and those to it are lost from now on."""
        self._ip(self.operator, "link", "set", host.name, "down")

    def heal(self, host: Host) -> None:
        """Put a host back onto the network."""
        self._ip(self.operator, "link", "set", host.name, "up")

    def pids(self, host: Host, containing: str = "") -> list[int]:
        """The processes of a host, as we see them, but for its own few.

        Args:
            host: of these hosts, or the operator.
            containing: only those in whose command line this occurs.
        """
        space = os.readlink(f"/proc/{host.pid}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == host.pid:
                continue
            try:
                is_ours = os.readlink(entry / "ns/pid") == space
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # it ended meanwhile
            line = b" ".join(words).decode(errors="replace").strip()
            # A zombie has no command line; `cat` is what a first process waits for.
            is_theirs = is_ours and line not in ("", "cat") and not line.startswith("sshd:")
            if is_theirs and containing in line:
                found.append(int(entry.name))
        return sorted(found)

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Within it, the calling thread, and programs it starts, are on the operator's network.

        Only new sockets are: those that are open stay where they were opened.
        """
        with (
            open("/proc/thread-self/ns/net", "rb") as ours,
            open(f"/proc/{self.operator.pid}/ns/net", "rb") as theirs,
        ):
            _enter_network(theirs.fileno())
            try:
                yield
            finally:
                _enter_network(ours.fileno())

    def _kept(self) -> list[str]:
        """What must stay visible: the folder, this checkout, and the Python that runs us."""
        paths = {self.folder, ROOT, Path(sys.prefix), Path(sys.base_prefix)}
        paths |= {Path(path) for path in sys.path if path.endswith("-packages")}
        private = (Path("/tmp"), Path("/run"), Path("/dev/shm"), Path.home())
        wanted = {path for path in paths if any(map(path.is_relative_to, private))}
        outermost = {p for p in wanted if not any(p != q and p.is_relative_to(q) for q in wanted)}
        return [str(path) for path in sorted(outermost)]

    def _write_sshd(self) -> Path:
        for name in ("id", "host_key"):
            path = self.folder / name
            if not path.exists():
                make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
                subprocess.run(make, check=True, stdin=subprocess.DEVNULL)
        config = self.folder / "sshd_config"
        settings = {
            "HostKey": self.folder / "host_key",
            "AuthorizedKeysFile": self.folder / "id.pub",
            "PermitRootLogin": "prohibit-password",
            # The folder belongs to whoever runs the tests, not to a home directory.
            "StrictModes": "no",
            "UsePAM": "no",
            "PidFile": "none",
        }
        config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        return config

    def _wire_operator(self) -> None:
        self._ip(self.operator, "link", "set", "lo", "up")
        self._ip(self.operator, "link", "add", "br0", "type", "bridge")
        self._ip(self.operator, "address", "add", f"{SUBNET}.254/24", "dev", "br0")
        self._ip(self.operator, "link", "set", "br0", "up")

    def _wire(self, host: Host) -> None:
        peer = ["peer", "name", "eth0", "netns", str(host.pid)]
        self._ip(self.operator, "link", "add", host.name, "type", "veth", *peer)
        self._ip(self.operator, "link", "set", host.name, "master", "br0", "up")
        self._ip(host, "link", "set", "lo", "up")
        self._ip(host, "address", "add", f"{host.address}/24", "dev", "eth0")
        self._ip(host, "link", "set", "eth0", "up")
        # It leads nowhere, but programs ask it which address is theirs.
        self._ip(host, "route", "add", "default", "via", f"{SUBNET}.254")

    def _ip(self, host: Host, *arguments: str) -> None:
        # In the host's network, but among our processes and programs.
        done = subprocess.run(
            ["nsenter", "-t", str(host.pid), "--net", "ip", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ContenderFailed(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextlib.contextmanager
def _boot(name: str, kept: Sequence[str], sshd: Path | None) -> Iterator[subprocess.Popen[bytes]]:
    script = ["sh", "-c", _INIT, "init", name, str(Path.home()), str(sshd or ""), *kept]
    process = subprocess.Popen(
        [*_UNSHARE, "--kill-child", *script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A Ctrl-C is for us: we end them in order.
        start_new_session=True,
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _first_process(process: subprocess.Popen[bytes]) -> int:
    """The process that is 1 in its host, once that is ready."""
    assert process.stdout is not None
    said = b""
    while not said.endswith(b"ready\n"):
        line = process.stdout.readline()
        if not line:
            raise ContenderFailed(f"a host did not start: {said.decode(errors='replace').strip()}")
        said += line
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[1]) == process.pid:
                return int(entry.parent.name)
    raise ContenderFailed("a host that is ready has no first process")


def _enter_network(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    clone_newnet = 0x40000000
    if libc.setns(descriptor, clone_newnet):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
