"""The product's doors as contenders of ``ingress``: one cluster, asked at its direct port and 8000.

Started by its command line, as its users start it. The no-op application is deployed on the same
Serve, so that the same HAProxy stands before both.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

import numpy as np
import orjson
import yaml

from bench.ingress_model import Model, draw, forward_of
from bench.ingress_peers import predictions
from bench.ingress_ray import deploy
from bench.load import Request
from bench.peers import Answers, await_answer
from bench.product import declaration, start_doors

__all__ = ["Door", "our_doors", "save"]

_AVAILABLE_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """A door that is open, asked in one form.

    Attributes:
        name: what tables call it.
        url: scheme, host and port.
        model: what is asked.
        form: of the bodies; ``noop`` is JSON for the application that does nothing.
    """

    name: str
    url: str
    model: Model
    form: Literal["json", "raw", "noop"] = "json"

    def running(self, folder: Path) -> AbstractContextManager[str]:
        """It runs already."""
        del folder
        return nullcontext(self.url)

    def request(self, instances: list[list[float]]) -> Request:
        """What asks for these rows."""
        path = "/noop" if self.form == "noop" else f"/v1/models/{self.model.name}:predict"
        if self.form != "raw":
            return Request(path=path, body=orjson.dumps({"instances": instances}))
        rows = np.asarray(instances, np.float32)
        head = orjson.dumps({"inputs": [{"name": "x", "dtype": "float32", "shape": [*rows.shape]}]})
        return Request(
            path=path,
            body=head + rows.tobytes(),
            content_type="application/octet-stream",
            headers={"Inference-Header-Content-Length": str(len(head))},
        )

    def answers(self, body: bytes) -> Answers:
        """The rows in an answer."""
        if self.form != "raw":
            return predictions(body)
        # Blanks follow the head, and numbers the blanks, to the end.
        head, _ = json.JSONDecoder().raw_decode(body.decode("latin-1"))
        shape = head["outputs"][0]["shape"]
        return np.frombuffer(body[-4 * int(np.prod(shape)) :], np.float32).reshape(shape)


@contextlib.contextmanager
def our_doors(model: Model, seed: int, folder: Path, *, with_serve: bool) -> Iterator[list[Door]]:
    """A cluster that serves a model, for as long as the context lasts.

    Args:
        model: what it serves.
        seed: of the model's parameters.
        folder: for its store and logs.
        with_serve: also open port 8000, with the no-op application beside.

    Yields:
        ``product`` and ``product-binary`` on the direct port; ``product-serve`` and ``noop-serve``.
    """
    save(model, seed, folder / "store")
    config = folder / "servables.yaml"
    config.write_text(declaration(folder / "store", [{"name": model.name}]))
    with start_doors(config, folder=folder, serve=with_serve) as urls:
        doors = [
            Door(name="product", url=urls["rest"], model=model),
            Door(name="product-binary", url=urls["rest"], model=model, form="raw"),
        ]
        if with_serve:
            _deploy_noop(config, urls["serve"], folder)
            doors.append(Door(name="product-serve", url=urls["serve"], model=model))
            doors.append(Door(name="noop-serve", url=urls["serve"], model=model, form="noop"))
        for door in doors:
            asked = door.request(draw(model, 1, seed))
            await_answer(door.url, asked, timeout_s=_AVAILABLE_S)
        yield doors


def _deploy_noop(config: Path, url: str, folder: Path) -> None:
    # Here, as it belongs to the product: benches that do not need it load nothing of it.
    from cluster.local_ray import find

    local = find(yaml.safe_load(config.read_text())["cluster"]["name"])
    assert local is not None, "a cluster that is up has a Ray"
    port = urlsplit(url).port
    assert port is not None
    deploy(local.address, port, "noop", 0, folder, local.environment())


def save(model: Model, seed: int, store: Path) -> None:
    """Save a model as a bundle of the same name."""
    # Here, since it imports JAX.
    import shards

    shards.save(
        forward_of(model),
        model.parameters(seed),
        store,
        model.name,
        version=1,
        inputs={"x": shards.Spec(("b", model.widths[0]))},
        batch_buckets=model.buckets,
    )
