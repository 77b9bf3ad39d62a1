"""A driver that asks through a `DeploymentHandle`, as an asynchronous Python program does."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
import ray
from ray import serve

from batching.errors import NotFound
from cluster.names import APP, namespace
from tests.e2e.models import TEXTS
from tests.e2e.shared.test_requests import ROWS


async def main(address: str, cluster: str) -> dict[str, Any]:
    """Ask for everything that the test wants to know."""
    ray.init(address, namespace=namespace(cluster), log_to_driver=False)
    handle = serve.get_app_handle(APP)
    rows = await handle.predict.remote("mlp", {"x": np.array(ROWS, np.float32)})
    texts = await handle.predict.remote("words", {"text": TEXTS})
    try:
        await handle.predict.remote("nobody", {"x": [[0.0]]})
    except NotFound:
        error = "NotFound"
    except Exception as other:
        error = repr(other)
    else:
        error = "none"
    [output] = rows.values()
    return {
        "rows": output.tolist(),
        "texts": texts["total"].tolist(),
        "models": await handle.models.remote(),
        "error": error,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
