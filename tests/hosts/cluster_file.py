"""Our `cluster.yaml`, for two hosts that are namespaces: what is changed of it, and nothing else.

The commands that install and start, the environment and the file mounts stay as they are shipped.
They meet machines as an image with the dependencies would make them: `~/shardserve` is there, and
pip asks no index. So `setup_commands` finds an environment, and installs our wheel into it alone.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Final

import yaml

from bench.hosts import Host, Hosts

__all__ = ["FILE", "SHIPPED", "adapted", "documents", "prepare"]

FILE: Final = Path(__file__).resolve().parents[2] / "cluster.yaml"
#: The name of the file without any variant.
SHIPPED: Final = "as it is"

_RAY: Final = "from ray.scripts.scripts import main; main()"


def documents() -> dict[str, dict[str, Any]]:
    """The file as it is, and with each variant in its place."""
    text = FILE.read_text()
    base: dict[str, Any] = yaml.safe_load(text)
    found = {SHIPPED: base}
    pieces = re.split(r"^# --- Variant: (.+?) -+$", text, flags=re.MULTILINE)[1:]
    for name, piece in zip(pieces[::2], pieces[1::2], strict=True):
        lines = [line[3:] for line in piece.splitlines() if line.startswith("#| ")]
        found[name] = {**base, **yaml.safe_load("\n".join(lines))}
    return found


def adapted(document: dict[str, Any], net: Hosts) -> dict[str, Any]:
    """A cluster file for these hosts: other addresses, another user and key, that many workers."""
    head, *workers = net.hosts
    return {
        **document,
        "provider": {
            **document["provider"],
            "head_ip": head.address,
            "worker_ips": [worker.address for worker in workers],
        },
        "auth": {"ssh_user": "root", "ssh_private_key": str(net.key)},
        "min_workers": len(workers),
        "max_workers": len(workers),
    }


def prepare(net: Hosts, host: Host) -> None:
    """Make of a host what an image with our dependencies, and without us, would make of it."""
    packages = [path for path in sys.path if path.endswith("-packages")]
    steps = [
        f"{sys.executable} -m venv --without-pip ~/shardserve",
        # Read after the environment's own folder. An editable installation in there is itself a
        # .pth file, which Python does not follow from here.
        "cd ~/shardserve/lib/python*/site-packages",
        f"printf '%s\\n' {' '.join(packages)} >image.pth",
        "cd ~/shardserve/bin",
        "printf '#!/bin/sh\\nexec ~/shardserve/bin/python -m pip \"$@\"\\n' >pip",
        f"printf '#!%s\\n{_RAY}\\n' ~/shardserve/bin/python >ray",
        "chmod +x pip ray",
        "mkdir -p ~/.config/pip && cd ~/.config/pip",
        "printf '[global]\\nno-index = true\\ndisable-pip-version-check = true\\n' >pip.conf",
    ]
    done = net.run(host, ["bash", "-euc", "\n".join(steps)])
    assert done.returncode == 0, done.stderr
