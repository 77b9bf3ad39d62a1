"""Ray Serve with a model of ``ingress``, or with an application that does nothing.

``python -m bench.peer_ray ADDRESS PORT MODEL SEED`` deploys `Inference` on a Ray that runs, with
batches of up to 32 that wait for 1 ms; ``... ADDRESS PORT noop 0`` deploys an ASGI application
beside what Serve has, at /noop. It ends when the deployment answers; what it deployed stays.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import ray
from ray import serve
from ray.serve.config import HTTPOptions

__all__ = ["Inference", "Noop"]

#: Above what any scenario keeps busy, so that nothing waits before it may join a batch.
_ONGOING_MAX: Final = 256


class Inference:
    """The deployment.

    Args:
        name: of the model.
        seed: of its parameters.
    """

    def __init__(self, name: str, seed: int) -> None:
        from bench.ingress_model import MODELS, Compiled

        self._compiled = Compiled(MODELS[name], seed)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.001)  # type: ignore[untyped-decorator, unused-ignore]
    async def batched(self, requests: list[Any]) -> list[Any]:
        """The answers to a batch of requests."""
        return self._compiled.together(requests)

    async def __call__(self, request: Any) -> Any:
        """The answer to one request."""
        import numpy as np
        import orjson
        from starlette.responses import Response

        asked = np.asarray(orjson.loads(await request.body())["instances"], np.float32)
        answers = np.ascontiguousarray(await self.batched(asked))
        body = orjson.dumps({"predictions": answers}, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(body, media_type="application/json")


class Noop:
    """An ASGI application that takes the body and answers two bytes.

    An instance, not a function: Serve takes a function for one that makes an application.
    """

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})


class _Deployed:
    """What Serve wants beside an ASGI application."""


def main(address: str, port: int, name: str, seed: int) -> None:
    """Deploy, and say where."""
    ray.init(address, log_to_driver=False)
    if name == "noop":
        deployment: Any = serve.deployment(
            serve.ingress(Noop())(_Deployed),
            max_ongoing_requests=1024,
            ray_actor_options={"num_cpus": 0},
        )
        serve.run(deployment.bind(), name="noop", route_prefix="/noop")
    else:
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
        options = {"num_cpus": 0}
        deployed: Any = serve.deployment(
            Inference, max_ongoing_requests=_ONGOING_MAX, ray_actor_options=options
        )
        serve.run(deployed.bind(name, seed), name="model", route_prefix="/")
    print(f"serving at http://127.0.0.1:{port}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
