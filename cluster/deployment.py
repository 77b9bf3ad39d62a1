"""Bringing the cluster's own actors and the Serve application onto a Ray that runs.

Everything here can be repeated: what exists is found, not made again. Used by the command line;
runs as a Ray driver, so its process can end when it is done.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client

from batching.errors import DeadlineExceeded, FailedPrecondition, Unavailable, error_of
from cluster.app import AppArgs, build
from cluster.config import Config, dump
from cluster.controller import Controller
from cluster.edits import AskBehind, Edit, Edited, ReplaceConfig, decode_edited, encode_edit
from cluster.environment import MARK
from cluster.names import APP, CONTROLLER, namespace
from cluster.nodes import alive_nodes, of_the_head, on_node
from cluster.settling import unbalanced, undrained, unsettled
from cluster.specs import ControllerSpec
from shards.orders import encode

__all__ = [
    "apply",
    "attach",
    "create_controller",
    "edit",
    "find_controller",
    "run_serve",
    "shut_down",
    "status",
    "stop_other_nodes",
    "wait_http",
    "wait_ready",
    "wait_balanced",
    "wait_drained",
    "wait_settled",
]

logger = logging.getLogger(__name__)

_CALL_S = 60.0
#: A store that answers has been looked into by then; it is asked when a load is declared.
_LISTED_S = 5.0


def attach(address: str, cluster: str) -> None:
    """Connect this process to a Ray as a driver.

    Raises:
        Unavailable: nothing answers there, or it is another version of Ray, or wants another token.
    """
    try:
        ray.init(
            address,
            namespace=namespace(cluster),
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise Unavailable(f"cannot connect to Ray at {address}: {reason}") from error


def create_controller(config: Config, directory: Path, cache_directory: Path) -> ActorHandle:
    """The cluster's controller, made if it is not there.

    Args:
        config: names the cluster and its store.
        directory: on every node, for the actors' sockets.
        cache_directory: on every node, for compiled programs; outlives the cluster.
    """
    found = find_controller(config.cluster.name)
    if found is not None:
        return found
    spec = ControllerSpec(
        cluster=config.cluster.name,
        store=config.store,
        directory=str(directory),
        cache_directory=str(cache_directory),
    )
    actor = ray.remote(Controller).options(
        name=CONTROLLER,
        namespace=namespace(config.cluster.name),
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_concurrency=1000,
        num_cpus=0,
        enable_task_events=False,
        resources=of_the_head(),
    )
    handle: ActorHandle = actor.remote(encode(spec), secrets.token_bytes(32))
    return handle


def find_controller(cluster: str) -> ActorHandle | None:
    """The cluster's controller, or None."""
    try:
        return ray.get_actor(CONTROLLER, namespace=namespace(cluster))
    except ValueError:
        return None


def apply(controller: ActorHandle, config: Config) -> None:
    """Declare what should be served.

    Raises:
        ServingError: the controller refuses it, with its words.
    """
    edit(controller, ReplaceConfig(config=dump(config)))


def edit(controller: ActorHandle, change: Edit) -> Edited:
    """Change what is declared.

    Returns:
        What has changed, and what is declared now.

    Raises:
        ServingError: the controller refuses it, with its words.
    """
    found = decode_edited(ray.get(controller.edit.remote(encode_edit(change)), timeout=_CALL_S))
    if found.code != "OK":
        raise error_of(found.code, found.message)
    return found


def wait_settled(
    controller: ActorHandle,
    servable: str,
    version: int | None,
    timeout_s: float,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Wait until one servable is as declared, and every router answers by it.

    Args:
        controller: asked several times a second.
        servable: its name.
        version: that must be available in the end; None for whatever is aspired.
        timeout_s: how long to wait.
        progress: told what is waited for.

    Raises:
        FailedPrecondition: a version has failed; what served before goes on.
        NotFound: the store has no such version.
        DeadlineExceeded: it takes too long; says what is missing.
    """
    began = time.monotonic()
    epoch = 0
    while True:
        elapsed_s = time.monotonic() - began
        listed = elapsed_s > _LISTED_S
        told = status(controller)
        # Once it is so, later epochs are of other changes.
        waits = "" if epoch else unsettled(told, servable, version, listed=listed)
        if not waits:
            epoch = epoch or told["epoch"]
            waits = _behind(controller, epoch)
            if not waits:
                return
        progress(f"{servable}: {waits}")
        if elapsed_s > timeout_s:
            raise DeadlineExceeded(f"{servable} is declared, and not so yet: {waits}")
        time.sleep(0.1)


def wait_drained(
    controller: ActorHandle,
    node: str,
    timeout_s: float,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Wait until no actor is left on a drained node.

    Args:
        controller: asked several times a second.
        node: its id, or the beginning of it.
        timeout_s: how long to wait.
        progress: told what is waited for.

    Raises:
        DeadlineExceeded: it takes too long; says what is still there. It goes on all the same.
        FailedPrecondition: it is not drained any more.
    """
    deadline = time.monotonic() + timeout_s
    while waits := undrained(status(controller), node):
        progress(waits)
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"node {node} is being drained, and is not yet: {waits}")
        time.sleep(0.1)


def _behind(controller: ActorHandle, epoch: int) -> str:
    """Which routers are still to follow; empty once none is."""
    late = edit(controller, AskBehind(epoch=epoch)).behind
    return f"{', '.join(late)} behind epoch {epoch}" if late else ""


def wait_balanced(
    controller: ActorHandle, timeout_s: float, progress: Callable[[str], None] = lambda _: None
) -> None:
    """Wait until a rebalance is done.

    Args:
        controller: asked several times a second.
        timeout_s: how long to wait.
        progress: told what is waited for.

    Raises:
        DeadlineExceeded: it takes too long; says what is on its way. It goes on all the same.
    """
    deadline = time.monotonic() + timeout_s
    while waits := unbalanced(status(controller)):
        progress(waits)
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"tables are still moved: {waits}")
        time.sleep(0.1)


def status(controller: ActorHandle) -> dict[str, Any]:
    """The controller's status, as plain values."""
    found: dict[str, Any] = ray.get(controller.status.remote(), timeout=_CALL_S)
    return found


def run_serve(config: Config, port: int) -> int:
    """Deploy the Serve application.

    Args:
        config: names the cluster and the interface of the door.
        port: of the door, where Serve does not run yet; one that runs cannot be moved.

    Returns:
        The port of the door.

    Raises:
        Unavailable: Serve does not come up; with the reason it gives.
    """
    address = config.cluster.serve
    # Serve says what it does on standard output at length; the command line says it better.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(
            proxy_location=ProxyLocation.EveryNode,
            http_options=HTTPOptions(host=address.host, port=port),
        )
        serve.run(build(AppArgs(cluster=config.cluster.name)), name=APP, route_prefix="/")
    except (RayError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        alert = next((line for line in lines if "ALERT" in line), lines[-1] if lines else "")
        raise Unavailable(f"the Ray Serve door does not open: {alert[:500]}") from error
    return int(_get_global_client().http_config.port)


def wait_ready(
    controller: ActorHandle,
    config: Config,
    timeout_s: float,
    progress: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Wait until every declared servable has an available version and every door is open.

    And until every router answers by an epoch in which that is so.

    Args:
        controller: asked several times a second.
        config: what was declared.
        timeout_s: how long to wait.
        progress: given every status.

    Returns:
        The last status.

    Raises:
        FailedPrecondition: a servable or a door has failed, and says why.
        DeadlineExceeded: it takes too long; says what is missing.
    """
    deadline = time.monotonic() + timeout_s
    wanted = {servable.name for servable in config.servables}
    epoch = 0
    while True:
        now = status(controller)
        progress(now)
        broken = [door["error"] for door in now["doors"] if door["error"]]
        if broken:
            raise FailedPrecondition("; ".join(broken))
        waiting: list[str] = []
        failed: list[str] = []
        for name in sorted(wanted):
            states = _states(now, name)
            if "AVAILABLE" in states:
                continue
            problem = _problem(now, name)
            (failed if problem and states == {"END"} else waiting).append(
                f"{name}: {problem or ', '.join(sorted(states)) or 'no version yet'}"
            )
        if failed and not waiting:
            raise FailedPrecondition("; ".join(failed))
        if not waiting and not failed and now["doors"]:
            # Later epochs are of other changes.
            epoch = epoch or now["epoch"]
            waits = _behind(controller, epoch)
            if not waits:
                return now
            waiting.append(waits)
        if time.monotonic() > deadline:
            raise DeadlineExceeded("not ready: " + "; ".join([*waiting, *failed] or ["no door"]))
        time.sleep(0.1)


def shut_down(cluster: str, *, with_serve: bool = True) -> bool:
    """End the cluster's actors; the Ray itself goes on.

    Args:
        cluster: its name.
        with_serve: also end the Serve application, which drains for half a minute.

    Returns:
        Whether there was anything to end.
    """
    has_app = with_serve and APP in serve.status().applications
    if has_app:
        serve.delete(APP)
    controller = find_controller(cluster)
    if controller is not None:
        ray.get(controller.shut_down.remote(), timeout=_CALL_S)
        ray.kill(controller)
    return has_app or controller is not None


def stop_other_nodes() -> tuple[str, int]:
    """End Ray, and HAProxy with it, on every node but this one: all that carries the node's mark.

    Returns:
        The mark (`MARK`) of this node, and how many others there were.

    Raises:
        FailedPrecondition: a node carries no mark, so nobody knows which processes are its own.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = alive_nodes()
    marks = dict(zip(nodes, ray.get([_on(node, _mark) for node in nodes]), strict=True))
    if not all(marks.values()):
        raise FailedPrecondition(
            f"this Ray was started without {MARK} in its environment, so its processes cannot be "
            "told from others: run `ray stop` on every node, and end its haproxy"
        )
    others = [node for node in nodes if node != here]
    for asked in [_on(node, _stop_node) for node in others]:
        # A node may be gone before it can answer.
        with contextlib.suppress(RayError):
            ray.get(asked, timeout=_CALL_S)
    return marks[here], len(others)


def _on(node: str, function: Callable[[], object]) -> Any:
    """A future of a function's result on a node."""
    remote = ray.remote(function)
    return remote.options(num_cpus=0, max_retries=0, scheduling_strategy=on_node(node)).remote()


def _mark() -> str:
    return os.environ.get(MARK, "")


def _stop_node() -> None:
    """Runs on a node: leave a process there that ends all others of the mark."""
    script = f"from cluster.processes import end_all; end_all({MARK!r}, {_mark()!r})"
    # Twice removed: Ray ends the children of a worker together with it.
    subprocess.run(
        ["sh", "-c", '"$@" </dev/null >/dev/null 2>&1 &', "sh", sys.executable, "-c", script],
        env={name: value for name, value in os.environ.items() if name != MARK},
        start_new_session=True,
        check=True,
    )


def _states(status: dict[str, Any], name: str) -> set[str]:
    versions = status["servables"].get(name, {}).get("versions", [])
    return {version["state"] for version in versions}


def _problem(status: dict[str, Any], name: str) -> str:
    servable = status["servables"].get(name, {})
    errors = [
        f"version {version['version']}: {version['error_message']}"
        for version in servable.get("versions", [])
        if version["error_message"]
    ]
    listing = servable.get("listing", "")
    if not errors and listing not in ("ok", "not listed yet"):
        errors.append(listing)
    return "; ".join(errors)


def wait_http(url: str, timeout_s: float) -> None:
    """Wait until a URL answers 200.

    Raises:
        DeadlineExceeded: it does not; says what it answered last.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2.0):
                return
        except OSError as error:
            last = str(error)
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"{url} does not answer: {last}")
        time.sleep(0.1)
