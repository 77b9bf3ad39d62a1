"""What an operator does to a running cluster, over the admin API of its direct port.

Over HTTP and not by the command line, since a command is a process that attaches to Ray: its start
alone takes a processor for a second, and what is measured is what a change does to requests.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson

from bench.errors import ContenderFailed

__all__ = ["Operator", "metric"]

_LOOK_S: Final = 0.05
_CALL_S: Final = 330.0


class Operator:
    """Changes versions and looks at them.

    Args:
        url: scheme, host and port of the direct REST door, which must have its admin API open.
        timeout_s: how long a change may take.
    """

    def __init__(self, url: str, timeout_s: float = 120.0) -> None:
        self._url = url
        self._timeout_s = timeout_s

    def load(self, servable: str, version: int, *, only: bool) -> None:
        """Load a version, beside the others or in their place; returns when it is available.

        Raises:
            ContenderFailed: it did not become available.
        """
        body = {"version": version, "only": only}
        self._post(f"/v1/admin/models/{servable}:load?wait_s={self._timeout_s:g}", body)
        if only:
            self.until_only(servable, version)

    def unload(self, servable: str) -> None:
        """Unload a servable with all its versions; returns when they are gone.

        Raises:
            ContenderFailed: they were not unloaded.
        """
        self._post(f"/v1/admin/models/{servable}:unload", {})
        self._until(
            f"{servable} to be unloaded",
            lambda: not {*self.states(servable).values()} - {"END"},
        )

    def roll_back(self, servable: str, to: int) -> None:
        """Give the newest version up for an older one; returns when that alone is there.

        Raises:
            ContenderFailed: it is not.
        """
        self._post(f"/v1/admin/models/{servable}:rollback", {"to": to})
        self.until_only(servable, to)

    def until_only(self, servable: str, version: int) -> None:
        """Wait until a version is available and no other is there any more.

        Raises:
            ContenderFailed: that does not come to be.
        """

        def holds() -> bool:
            found = {key: each for key, each in self.states(servable).items() if each != "END"}
            return found == {version: "AVAILABLE"}

        self._until(f"{servable} to be at version {version} alone", holds)

    def states(self, servable: str) -> dict[int, str]:
        """The state of every version that is known."""
        try:
            document = orjson.loads(self.get(f"/v1/models/{servable}"))
        except urllib.error.HTTPError:
            return {}
        return {int(each["version"]): each["state"] for each in document["model_version_status"]}

    def metrics(self) -> str:
        """What Prometheus would be told."""
        return self.get("/metrics").decode()

    def get(self, path: str) -> bytes:
        """The body of an answer.

        Raises:
            urllib.error.HTTPError: it is an error.
        """
        with urllib.request.urlopen(self._url + path, timeout=_CALL_S) as answer:
            body: bytes = answer.read()
            return body

    def put(self, path: str, body: Mapping[str, Any]) -> None:
        """Put a document.

        Raises:
            ContenderFailed: it is refused.
        """
        self._send("PUT", path, body)

    def _post(self, path: str, body: Mapping[str, Any]) -> None:
        self._send("POST", path, body)

    def _send(self, method: str, path: str, body: Mapping[str, Any]) -> None:
        headers = {"content-type": "application/json"}
        sent = orjson.dumps(body)
        request = urllib.request.Request(self._url + path, sent, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_CALL_S) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace")[:500]
            raise ContenderFailed(f"{method} {path}: {error.code}: {told}") from error

    def _until(self, what: str, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not holds():
            if time.monotonic() > deadline:
                raise ContenderFailed(f"waited {self._timeout_s:g} s for {what}")
            time.sleep(_LOOK_S)


def metric(text: str, name: str) -> float:
    """The sum of a metric's samples over all labels; 0 where there is none."""
    total = 0.0
    for line in text.splitlines():
        if line.startswith(name) and line[len(name) : len(name) + 1] in ("{", " "):
            total += float(line.rpartition(" ")[2])
    return total
