"""What the commands do with Ray: up, down, apply, deploy, status, and edits of the declaration.

The only part of the command line that imports Ray, and only after Ray's environment is set: Ray
reads its settings when it is imported.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.status import Status

from batching.errors import FailedPrecondition, NotFound
from cluster import local_ray
from cluster.config import Config
from cluster.edits import DrainNode, Edit, Rebalance
from cluster.environment import MARK
from cluster.ports import claim_ports
from cluster.processes import end_all
from cluster.specs import warnings_about
from shards.store import LocalStore, open_store
from shards.transport import TlsContexts

__all__ = ["apply", "deploy", "down", "edit", "edit_node", "rebalance", "status", "up", "versions"]

_ANY: Final = frozenset({"0.0.0.0", "::", ""})


def up(
    config: Config,
    *,
    ray: str = "auto",
    cpus: int | None = None,
    timeout_s: float = 300.0,
    with_serve: bool = True,
    console: Console,
) -> dict[str, Any]:
    """Start a Ray if needed, deploy, apply, wait.

    Returns:
        ``rest`` and ``serve`` base URLs, and ``ray``, the address.

    Raises:
        ServingError: with one line that says what to do.
    """
    _check_store(config)
    name = config.cluster.name
    address = _address(ray)
    if address is not None:
        return _bring_up(config, address, timeout_s, with_serve=with_serve, console=console)
    local_ray.check_down(name)
    _check_ports(config, with_serve=with_serve)
    if config.cluster.tls is not None:
        TlsContexts(config.cluster.tls.files())  # on the only node there is: a mistake is told now
    with console.status("starting Ray"):
        local = local_ray.start(name, cpus)
    os.environ.update(local.environment())
    console.print(f"Ray is up at {local.address}")
    try:
        return _bring_up(config, local.address, timeout_s, with_serve=with_serve, console=console)
    except BaseException:
        _disconnect()
        local_ray.stop(name, keep_logs=True)
        console.print(f"the cluster is down again; its logs are in {local.directory}/ray")
        raise


def deploy(
    config: Config, *, ray: str, timeout_s: float, with_serve: bool = True, console: Console
) -> dict[str, Any]:
    """Put everything onto a Ray that runs.

    Raises:
        ServingError: there is none, or it does not become ready.
    """
    _check_store(config)
    address = _running_address(config.cluster.name, ray)
    return _bring_up(config, address, timeout_s, with_serve=with_serve, console=console)


def apply(config: Config, *, ray: str, wait_s: float, console: Console) -> None:
    """Declare what a running cluster serves, and wait for it.

    Raises:
        ServingError: no such cluster, or the declaration is refused, or it does not become ready.
    """
    _check_store(config)
    controller = _controller(config.cluster.name, ray)
    from cluster import deployment

    try:
        deployment.apply(controller, config)
        if wait_s > 0:
            with console.status("applying") as line:
                found = deployment.wait_ready(controller, config, wait_s, _progress(line))
            for name, servable in found["servables"].items():
                if servable["rollout"] != "ok":
                    console.print(f"{name}: {servable['rollout']}", soft_wrap=True)
    finally:
        _disconnect()


def status(cluster: str, *, ray: str) -> dict[str, Any]:
    """The controller's status.

    Raises:
        NotFound: no such cluster.
    """
    controller = _controller(cluster, ray)
    from cluster import deployment

    try:
        return deployment.status(controller)
    finally:
        _disconnect()


def edit(
    cluster: str,
    change: Edit,
    servable: str,
    version: int | None = None,
    *,
    ray: str,
    wait_s: float,
    console: Console,
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Change what a running cluster declares, and wait until it is so.

    Args:
        cluster: its name.
        change: what to change.
        servable: of which servable.
        version: that must be available in the end; None for whatever is aspired then.
        ray: where the cluster is.
        wait_s: how long to wait; 0 for not at all.
        console: for what is waited for.

    Returns:
        What changed in the declaration, and the servable's status by its name.

    Raises:
        ServingError: no such cluster, or the change is refused, or it does not come about.
    """
    controller = _controller(cluster, ray)
    from cluster import deployment

    try:
        told = deployment.edit(controller, change).changes
        if wait_s > 0:
            with console.status("waiting") as line:
                deployment.wait_settled(controller, servable, version, wait_s, line.update)
        return told, _servables(deployment.status(controller), servable)
    finally:
        _disconnect()


def edit_node(
    cluster: str, change: DrainNode, *, ray: str, wait_s: float, console: Console
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Drain a node of a running cluster, or undo that.

    Args:
        cluster: its name.
        change: which node.
        ray: where the cluster is.
        wait_s: how long to wait until no actor is there; 0 for not at all.
        console: for what is waited for.

    Returns:
        What changed, and the status of all nodes.

    Raises:
        ServingError: no such cluster or node, or there is no room elsewhere, or it takes too long.
    """
    controller = _controller(cluster, ray)
    from cluster import deployment

    try:
        told = deployment.edit(controller, change).changes
        if wait_s > 0:
            with console.status("waiting") as line:
                deployment.wait_drained(controller, change.node, wait_s, line.update)
        return told, deployment.status(controller)["nodes"]
    finally:
        _disconnect()


def rebalance(
    cluster: str, *, dry_run: bool, ray: str, wait_s: float, console: Console
) -> dict[str, Any]:
    """Make the load of a running cluster's shard actors even, or say what that would take.

    Args:
        cluster: its name.
        dry_run: only say it.
        ray: where the cluster is.
        wait_s: how long to wait until it is done; 0 for not at all.
        console: for what is waited for.

    Returns:
        As `cluster.rebalancing.Rebalancing.explained`, from before anything was moved.

    Raises:
        ServingError: no such cluster, or it takes too long.
    """
    controller = _controller(cluster, ray)
    from cluster import deployment

    try:
        found = deployment.edit(controller, Rebalance(dry_run=dry_run)).balance
        if wait_s > 0 and not dry_run:
            with console.status("waiting") as line:
                deployment.wait_balanced(controller, wait_s, line.update)
        told: dict[str, Any] = json.loads(found)
        return told
    finally:
        _disconnect()


def versions(cluster: str, servable: str, look: Edit | None, *, ray: str) -> dict[str, Any]:
    """The status of one servable, or of all, by name.

    Args:
        cluster: its name.
        servable: empty for all.
        look: an edit to make before, or None.
        ray: where the cluster is.

    Raises:
        NotFound: no such cluster or servable.
    """
    controller = _controller(cluster, ray)
    from cluster import deployment

    try:
        if look is not None:
            deployment.edit(controller, look)
        found = _servables(deployment.status(controller), servable)
    finally:
        _disconnect()
    if servable and not found:
        raise NotFound(f"{servable!r} is not declared")
    return found


def _servables(status: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in status["servables"].items() if name in ("", key)}


def down(cluster: str, *, keep_logs: bool = False, with_ray: bool = False) -> str:
    """End a cluster: with the Ray that `up` started, or leaving somebody else's Ray running.

    Args:
        cluster: its name.
        keep_logs: of the Ray that `up` started.
        with_ray: also end a Ray that `up` did not start, on every node.

    Returns:
        What was ended, in words.

    Raises:
        NotFound: there is nothing to end.
    """
    if local_ray.find(cluster) is not None:
        ended = local_ray.stop(cluster, keep_logs=keep_logs)
        return f"{ended} processes ended"
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        raise NotFound(f"no cluster {cluster!r} was started here, and RAY_ADDRESS is not set")
    from cluster import deployment

    deployment.attach(address, cluster)
    try:
        if not deployment.shut_down(cluster, with_serve=not with_ray) and not with_ray:
            raise NotFound(f"Ray at {address} has no cluster {cluster!r}")
        mark, others = deployment.stop_other_nodes() if with_ray else ("", 0)
    finally:
        _disconnect()
    if with_ray:
        # Last, and without a connection to it: what one is connected to takes one along.
        end_all(MARK, mark)
        return f"its actors are ended, and Ray on {others + 1} nodes"
    return f"its actors are ended; Ray at {address} is not ours and runs on"


def _bring_up(
    config: Config, address: str, timeout_s: float, *, with_serve: bool, console: Console
) -> dict[str, Any]:
    from cluster import deployment

    name = config.cluster.name
    serve_port = config.cluster.serve.port
    # Held until HAProxy listens, which is after everything else has been started.
    claims = claim_ports(1) if with_serve and not serve_port else []
    deployment.attach(address, name)
    try:
        with console.status("starting the controller") as line:
            controller = deployment.create_controller(
                config, _socket_directory(name, address), _cache_directory()
            )
            deployment.apply(controller, config)
            if with_serve:
                line.update("starting the Ray Serve door")
                serve_port = deployment.run_serve(config, serve_port or claims[0].port)
            found = deployment.wait_ready(controller, config, timeout_s, _progress(line))
            scheme = "http" if config.cluster.http.tls is None else "https"
            rest = _url(scheme, config.cluster.http.host, found["doors"][0]["port"])
            serve = ""
            if with_serve:
                serve = _url("http", config.cluster.serve.host, serve_port)
                line.update("waiting for the Ray Serve door")
                deployment.wait_http(f"{serve}/readyz", timeout_s)
        for warning in _warnings(config, found, with_serve=with_serve):
            console.print(f"warning: {warning}")
        console.print(f"serving {', '.join(s.name for s in config.servables) or 'nothing yet'}")
    finally:
        _disconnect()
        for claim in claims:
            claim.release()
    return {"rest": rest, "serve": serve, "ray": address}


def _warnings(config: Config, found: dict[str, Any], *, with_serve: bool) -> list[str]:
    """What is dangerous about the doors, in words."""
    told = [f"REST door: {text}" for door in found["doors"] for text in door["warnings"]]
    if with_serve:
        cluster = config.cluster
        dangers = warnings_about(cluster.serve.host, cluster.auth, has_tls=False)
        told += [f"Ray Serve door: {text}" for text in dangers]
    return told


def _progress(line: Status) -> Callable[[dict[str, Any]], None]:
    def show(found: dict[str, Any]) -> None:
        parts = [
            f"{name}:{version['version']} {version['step']}"
            for name, servable in found["servables"].items()
            for version in servable["versions"]
        ]
        line.update("loading " + (", ".join(parts) or "…"))

    return show


def _address(ray: str) -> str | None:
    """The address to connect to, or None to start one."""
    if ray == "local":
        return None
    if ray != "auto":
        return ray
    return os.environ.get("RAY_ADDRESS") or None


def _running_address(cluster: str, ray: str) -> str:
    """The Ray on which a cluster runs; sets its environment.

    Raises:
        NotFound: none is known.
    """
    address = _address(ray)
    if address is not None:
        return address
    local = local_ray.find(cluster)
    if local is None or not local.is_running():
        raise NotFound(
            f"cluster {cluster!r} is not up on this machine: run `shardserve up`, or name a "
            "running Ray with --ray or RAY_ADDRESS"
        )
    os.environ.update(local.environment())
    return local.address


def _controller(cluster: str, ray: str) -> Any:
    address = _running_address(cluster, ray)
    from cluster import deployment

    deployment.attach(address, cluster)
    controller = deployment.find_controller(cluster)
    if controller is None:
        raise NotFound(f"Ray at {address} has no cluster {cluster!r}: run `shardserve deploy`")
    return controller


def _disconnect() -> None:
    import ray

    ray.shutdown()


def _check_store(config: Config) -> None:
    store = open_store(config.store)
    if isinstance(store, LocalStore) and not store.path.is_dir():
        raise NotFound(
            f"the store {config.store} is not a directory: save a bundle there first, or correct "
            "`store` in the declaration"
        )
    known = set(store.servables())
    missing = sorted(servable.name for servable in config.servables if servable.name not in known)
    if missing:
        raise NotFound(
            f"the store {config.store} has no {', '.join(missing)}; it has "
            f"{', '.join(sorted(known)) or 'nothing'}: save it there first, or leave it out and "
            "declare it with `shardserve apply` once it is there"
        )


def _check_ports(config: Config, *, with_serve: bool) -> None:
    http, serve = config.cluster.http, config.cluster.serve
    doors = {"cluster.http.port": (http.host, http.port)}
    if with_serve:
        doors["cluster.serve.port"] = (serve.host, serve.port)
    for path, (host, port) in doors.items():
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise FailedPrecondition(
                    f"cannot listen on {host}:{port} ({error.strerror}): end what "
                    f"listens there, or set {path} to another port (0 takes a free one)"
                ) from error


def _socket_directory(cluster: str, address: str) -> Path:
    """Where actors put their sockets: with a Ray of ours, in what `down` takes away."""
    local = local_ray.find(cluster)
    if local is not None and local.address == address:
        return Path(local.directory) / "sockets"
    return Path("/tmp") / f"shardserve-{os.getuid()}" / cluster


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shardserve"


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://{'127.0.0.1' if host in _ANY else host}:{port}"
