"""What things are called in Ray."""

from __future__ import annotations

from typing import Final

__all__ = ["APP", "CONTROLLER", "INGRESS", "namespace", "router_name"]

#: Actor names are unique within a namespace; a cluster has one of its own.
CONTROLLER: Final = "controller"
#: The Ray Serve application and its one deployment.
APP: Final = "shardserve"
INGRESS: Final = "Ingress"


def namespace(cluster: str) -> str:
    """The Ray namespace of a cluster's actors."""
    return f"shardserve-{cluster}"


def router_name(node: str, index: int = 0) -> str:
    """The name of a node's router actor; the first has no number."""
    return f"router-{node[:16]}-{index}" if index else f"router-{node[:16]}"
