"""How an actor is to start, by what is declared. Does not know nodes, Ray or what is running."""

from __future__ import annotations

from cluster.settings import ClusterConfig
from cluster.specs import ControllerSpec
from shards.orders import ActorKind, ActorSpec

__all__ = ["actor_spec"]


def actor_spec(
    cluster: ClusterConfig,
    controller: ControllerSpec,
    name: str,
    kind: ActorKind,
    *,
    platforms: str = "cpu",
    log: str = "INFO",
) -> ActorSpec:
    """What the actor of this name and kind is started with.

    Args:
        cluster: as declared.
        controller: what the controller was started with.
        name: of the actor.
        kind: of the actor.
        platforms: see `ActorSpec`.
        log: see `ActorSpec`.
    """
    capacity = {
        "device": cluster.device_memory,
        "shard": cluster.shard_memory,
        "host": cluster.host_memory,
    }[kind]
    return ActorSpec(
        kind=kind,
        name=name,
        directory=controller.directory,
        capacity_bytes=capacity,
        tcp_host="auto",
        allow_entry_points=cluster.allow_entry_points,
        cache_directory=controller.cache_directory,
        tls=cluster.tls.files() if cluster.tls else None,
        blob_cache=cluster.cache.path or f"{controller.cache_directory}/blobs",
        blob_cache_bytes=cluster.cache.size,
        policy=cluster.batching.policy,
        guard_s=cluster.batching.guard_s,
        credit_s=cluster.batching.credit_s,
        admission=cluster.batching.admission,
        platforms=platforms,
        log=log,
    )
