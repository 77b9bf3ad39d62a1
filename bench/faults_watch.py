"""Says all the time what a cluster says of itself: one line of JSON for every status.

To the status it adds ``addresses``, of the nodes that Ray takes for alive.

A program of its own, run where the cluster's Ray can be reached. While the controller is away it
says nothing. Usage: ``python -m bench.faults_watch ADDRESS CLUSTER``, with the cluster's
environment; it ends when its standard input does.
"""

from __future__ import annotations

import json
import sys
import threading

import ray
from ray.exceptions import RayError

from cluster import deployment

__all__ = ["main"]

_EVERY_S = 0.2


def main(address: str, cluster: str) -> None:
    """Print statuses until standard input ends."""
    deployment.attach(address, cluster)
    ended = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    while not ended.wait(_EVERY_S):
        try:
            controller = deployment.find_controller(cluster)
            if controller is not None:
                status = deployment.status(controller)
                status["addresses"] = {
                    node["NodeID"]: node["NodeManagerAddress"]
                    for node in ray.nodes()
                    if node["Alive"]
                }
                print(json.dumps(status), flush=True)
        except (RayError, TimeoutError):
            continue  # it is away; the next look may find it


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
