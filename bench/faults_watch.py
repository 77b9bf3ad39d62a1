"""Says all the time what a cluster says of itself: one line of JSON for every status.

A program of its own, run where the cluster's Ray can be reached. While the controller is away it
says nothing. Usage: ``python -m bench.faults_watch ADDRESS CLUSTER``, with the cluster's
environment; it ends when its standard input does.
"""

from __future__ import annotations

import json
import sys
import threading

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
                print(json.dumps(deployment.status(controller)), flush=True)
        except (RayError, TimeoutError):
            continue  # it is away; the next look may find it


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
