"""The environment that Ray must be started with for this system to work as it was measured.

The two Serve flags turn Ray Serve's Python proxy (hundreds of requests a second) into HAProxy in
front of the replica (thousands). Ray reads all of these when a process starts, so they belong into
the environment of `ray start`; `cluster.yaml` states the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["MARK", "SERVE_FLAGS", "haproxy_environment", "ray_environment"]

#: Every process that `up` starts, directly or not, carries this variable, so `down` knows its own.
MARK: Final = "SHARDSERVE_UP"

SERVE_FLAGS: Final = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Serve's fallback proxy takes 8500 and 9500 otherwise; 8500 is where gRPC belongs.
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": "18500",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": "19500",
    # Workers run at nice 15 unless told otherwise, which ruins the tail beside any other load.
    "RAY_worker_niceness": "0",
    # A node that is cut off is known to be gone after ten seconds, not after fifteen. With three
    # failures it is less than six, but less is dear: a node that only stood still for so long, as a
    # virtual machine may, loses its actors and loads all their weights anew.
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "5",
    "RAY_health_check_timeout_ms": "1000",
    # A HAProxy that died is noticed when three checks have failed: 3 s instead of 30.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # How long everything on a node waits for a head that is away before it ends itself. Requests
    # need no head, so it may be away for long; Ray's own patience is a minute.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 << 20),
}


def ray_environment(directory: Path, mark: str) -> dict[str, str]:
    """Variables for a Ray of our own.

    Args:
        directory: private to this Ray; gets the token and HAProxy's files.
        mark: value of `MARK`.
    """
    return {
        **SERVE_FLAGS,
        **haproxy_environment(str(directory / "h")),
        MARK: mark,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(directory / "auth_token"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def haproxy_environment(directory: str) -> dict[str, str]:
    """Variables that keep HAProxy's files in a directory.

    Args:
        directory: private to the user: whoever may open HAProxy's admin socket, and its mode lets
            everybody, commands it. At most 27 characters: 80 come behind it, and the path of a
            socket has 107.
    """
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{directory}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{directory}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": directory,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{directory}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{directory}/metrics.sock",
    }
