"""The Python client of the doors: NumPy in, NumPy out, without JSON in between.

    with Client("http://127.0.0.1:8501") as client:
        outputs = client.predict("mlp", {"x": rows})

`Client` blocks and may be shared by threads, `AsyncClient` is for one event loop. What is said and
how answers read is in `calls`, when to ask again in `retrying`; both are pure. Imports neither JAX
nor Ray.
"""

from __future__ import annotations

from cluster.client.asynchronous import AsyncClient
from cluster.client.blocking import Client
from cluster.client.retrying import Retries
from cluster.client.values import Changed, Classes, Numbers, Outputs, VersionState

__all__ = [
    "AsyncClient",
    "Changed",
    "Classes",
    "Client",
    "Numbers",
    "Outputs",
    "Retries",
    "VersionState",
]
