"""What a door says about servables and about itself: every request that is not inference.

Lists, states, signatures, health, readiness, counters. Everything is read from the current epoch
and answered at once, but for counters, which wait a moment for those of the node's devices.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from batching.errors import NotFound
from cluster.access import Keyring, Right
from cluster.api import (
    CONTENT_TYPE,
    Call,
    Verb,
    error_body,
    list_body,
    metadata_body,
    status_body,
)
from cluster.device_reports import DeviceReports
from cluster.doors.response import Response
from cluster.doors.siblings import Siblings
from cluster.metrics import Metrics
from cluster.router import Router

__all__ = ["Describing"]

_TEXT: Final = "text/plain; charset=utf-8"


class Describing:
    """Answers what is asked about a router.

    Args:
        router: whose epoch is described.
        metrics: what is counted.
        devices: what devices count, where this door tells it.
        siblings: the node's other routers, where there are any.
    """

    def __init__(
        self,
        router: Router,
        metrics: Metrics,
        devices: DeviceReports | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        self._router = router
        self._metrics = metrics
        self._devices = devices
        self._siblings = siblings

    def describe(
        self, call: Call, headers: Mapping[bytes, bytes], keyring: Keyring | None
    ) -> Response:
        """Answer about servables: which there are, their states, their signatures.

        Args:
            call: a request line understood.
            headers: of the request.
            keyring: who may see what; None lets anybody see everything.

        Raises:
            ServingError: there is no such thing, or it is not for this key.
        """
        routes = self._router.routes
        routes.check_known()
        epoch = routes.epoch
        if call.verb is Verb.LIST:
            if keyring is None:
                return _ok(list_body(epoch.statuses))
            names = {status.servable for status in epoch.statuses}
            seen = keyring.visible(headers, names)
            return _ok(list_body([each for each in epoch.statuses if each.servable in seen]))
        if keyring is not None:
            keyring.check(headers, Right.METADATA, call.servable)
        if call.verb is Verb.METADATA:
            served = routes.find(call.servable, call.version, call.label)
            return _ok(metadata_body(served.manifest))
        version = call.version
        if call.label is not None:
            version = routes.find(call.servable, None, call.label).version
        statuses = [
            status
            for status in epoch.statuses
            if status.servable == call.servable and version in (None, status.version)
        ]
        if not statuses:
            what = "any versions" if version is None else f"version {version}"
            raise NotFound(f"Could not find {what} of model {call.servable}")
        return _ok(status_body(statuses))

    def elsewhere(
        self,
        method: bytes,
        path: bytes,
        headers: Mapping[bytes, bytes],
        keyring: Keyring | None,
        respond: Callable[[Response], None],
    ) -> None:
        """Answer a path that is not below ``/v1/``: health, readiness, counters.

        Args:
            method: as on the wire.
            path: as on the wire.
            headers: of the request.
            keyring: as of `describe`.
            respond: called once, now or in a moment.

        Raises:
            ServingError: the key may not; then nothing is answered here.
        """
        where = path.partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            where = b""
        if where == b"/healthz":
            respond(Response(200, _TEXT, b"", b"ok\n"))
        elif where == b"/readyz":
            respond(self._ready(names_are_open=keyring is None))
        elif where in (b"/metrics", b"/monitoring/prometheus/metrics"):
            if keyring is not None:
                keyring.check(headers, Right.METRICS)
            if self._devices is None:
                self._count(b"", respond)
            else:
                self._devices.read(lambda text: self._count(text, respond))
        else:
            respond(Response(404, CONTENT_TYPE, b"", error_body("Not Found")))

    def _count(self, devices: bytes, respond: Callable[[Response], None]) -> None:
        def then(counters: bytes) -> None:
            respond(Response(200, Metrics.CONTENT_TYPE, b"", counters + devices))

        siblings = self._siblings
        told = then if siblings is None else partial(siblings.read, then=then)
        later = asyncio.get_running_loop().call_soon
        self._metrics.scrape(self._router, time.monotonic, later, told)

    def _ready(self, *, names_are_open: bool) -> Response:
        epoch = self._router.routes.epoch
        if epoch.number == 0:
            return Response(503, _TEXT, b"", b"no routing table yet\n")
        # What failed or is on its way out is not waited for: one bad servable must not take the
        # good ones out of a load balancer.
        coming = {
            status.servable
            for status in epoch.statuses
            if status.state in ("START", "LOADING") and status.error_code == "OK"
        }
        waiting = sorted(coming - set(epoch.servables))
        if waiting:
            # Anybody may ask, so names are told only where anybody may know them.
            what = ", ".join(waiting) if names_are_open else f"{len(waiting)} servables"
            text = f"not available yet: {what}\n"
            return Response(503, _TEXT, b"", text.encode())
        return Response(200, _TEXT, b"", b"ready\n")


def _ok(body: bytes) -> Response:
    return Response(200, CONTENT_TYPE, b"", body)
