"""Links between the processes of a cluster: ordered frames over a proven connection.

`listen` and `connect` make links over sockets; `shards.transport.raycalls` makes the same links
over Ray actor calls, for hosts whose ports are closed, and is not imported here. What a frame is,
see `shards.wire`; who may connect, see `shards.handshake`.
"""

from __future__ import annotations

from shards.handshake import PeerInfo
from shards.transport._link import Counters, Limits, Link, LinkHandler
from shards.transport.sockets import Listener, connect, listen
from shards.transport.tls import TlsContexts

__all__ = [
    "Counters",
    "Limits",
    "Link",
    "LinkHandler",
    "Listener",
    "PeerInfo",
    "TlsContexts",
    "connect",
    "listen",
]
