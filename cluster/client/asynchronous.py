"""The client for an event loop: as `cluster.client.blocking`, and with the same words.

A call that is cancelled closes its connection, so the server cancels the request.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TypeVar

from batching.errors import (
    DeadlineExceeded,
    ServingError,
    Unavailable,
)
from cluster.client import calls, changes
from cluster.client.address import BODY_BYTES_MAX, address_of, request_of
from cluster.client.calls import Call, Examples, Inputs, Options
from cluster.client.compressing import CONTENT_ENCODING, compressed, is_compressed, unpacked
from cluster.client.retrying import Budget, Retries, Tries
from cluster.client.streams import StreamPool
from cluster.client.values import Changed, Classes, Numbers, Outputs, VersionState

__all__ = ["AsyncAdmin", "AsyncClient"]

T = TypeVar("T")


class AsyncClient:
    """A client of one door, for one event loop. See `Client` for what its calls take and give.

    Args:
        url: of the door, ``http://`` or ``https://``.
        key: an API key; None takes that of ``SHARDSERVE_KEY``, where it is set.
        timeout_s: of a call with all its tries, where the call says nothing else.
        connections_max: open connections; a call for which there is none waits its turn.
        retries: when calls are made again.
        tls: how to trust an HTTPS door; None trusts what OpenSSL does.
        body_bytes_max: the largest answer that is taken.
        compress_bytes_min: inference requests of so many bytes are sent in gzip; None sends none.
        accept_encoding: ``zstd`` or ``gzip`` asks for answers that are compressed where it pays.

    Raises:
        InvalidArgument: the URL is none.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8501",
        *,
        key: str | None = None,
        timeout_s: float = 10.0,
        connections_max: int = 32,
        retries: Retries | None = None,
        tls: ssl.SSLContext | None = None,
        body_bytes_max: int = BODY_BYTES_MAX,
        compress_bytes_min: int | None = None,
        accept_encoding: str = "",
    ) -> None:
        self._address = address_of(url, key, tls, accept_encoding)
        self._body_bytes_max = body_bytes_max
        self._timeout_s = timeout_s
        self._compress_bytes_min = compress_bytes_min
        self._retries = retries or Retries()
        self._budget = Budget(self._retries)
        self._chance = random.Random()
        self._pool = StreamPool(self._address, connections_max, body_bytes_max)
        self.admin = AsyncAdmin(self)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; calls under way end with `Unavailable`."""
        await self._pool.close()

    async def predict(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: int | None = None,
        label: str | None = None,
        signature: str = "",
        timeout_s: float | None = None,
        split_key: str = "",
        criticality: str = "",
    ) -> Outputs:
        """As `Client.predict`."""
        options = Options(version, label, signature, split_key, criticality)
        return await self.run(calls.predict(model, inputs, options), timeout_s)

    async def predict_table(
        self,
        model: str,
        table: Any,
        *,
        version: int | None = None,
        label: str | None = None,
        signature: str = "",
        timeout_s: float | None = None,
        split_key: str = "",
        criticality: str = "",
    ) -> Any:
        """As `Client.predict_table`."""
        options = Options(version, label, signature, split_key, criticality)
        # Beside the loop: it may have to import pyarrow first.
        call = await asyncio.to_thread(calls.predict_table, model, table, options)
        return await self.run(call, timeout_s)

    async def classify(
        self,
        model: str,
        examples: Examples,
        *,
        context: Inputs | None = None,
        version: int | None = None,
        label: str | None = None,
        signature: str = "",
        timeout_s: float | None = None,
        split_key: str = "",
        criticality: str = "",
    ) -> Classes:
        """As `Client.classify`."""
        options = Options(version, label, signature, split_key, criticality)
        return await self.run(calls.classify(model, examples, context, options), timeout_s)

    async def regress(
        self,
        model: str,
        examples: Examples,
        *,
        context: Inputs | None = None,
        version: int | None = None,
        label: str | None = None,
        signature: str = "",
        timeout_s: float | None = None,
        split_key: str = "",
        criticality: str = "",
    ) -> Numbers:
        """As `Client.regress`."""
        options = Options(version, label, signature, split_key, criticality)
        return await self.run(calls.regress(model, examples, context, options), timeout_s)

    async def models(self) -> dict[str, tuple[VersionState, ...]]:
        """As `Client.models`."""
        return await self.run(calls.models())

    async def status(
        self, model: str, *, version: int | None = None, label: str | None = None
    ) -> tuple[VersionState, ...]:
        """As `Client.status`."""
        return await self.run(calls.status(model, version, label))

    async def metadata(
        self, model: str, *, version: int | None = None, label: str | None = None
    ) -> dict[str, Any]:
        """As `Client.metadata`."""
        return await self.run(calls.metadata(model, version, label))

    async def is_ready(self) -> bool:
        """As `Client.is_ready`."""
        try:
            return await self.run(calls.ready(), retries=Retries(attempts_max=1))
        except Unavailable:
            return False

    async def metrics(self) -> str:
        """As `Client.metrics`."""
        return await self.run(calls.metrics())

    async def run(
        self, call: Call[T], timeout_s: float | None = None, retries: Retries | None = None
    ) -> T:
        """As `Client.run`."""
        loop = asyncio.get_running_loop()
        limit_s = (self._timeout_s if timeout_s is None else timeout_s) + call.wait_s
        deadline = loop.time() + limit_s
        if is_compressed(call, self._compress_bytes_min):
            # Beside the loop: it lets go of the interpreter, and large bodies take long.
            call = await asyncio.to_thread(compressed, call)
        tries: Tries | None = None
        while True:
            try:
                return await self._try(call, deadline)
            except ServingError as error:
                if tries is None:
                    tries = Tries(
                        retries or self._retries,
                        self._budget,
                        deadline,
                        is_repeatable=call.is_repeatable,
                        chance=self._chance,
                    )
                pause_s = tries.pause_s(error, loop.time())
            if pause_s:
                await asyncio.sleep(pause_s)

    async def _try(self, call: Call[T], deadline: float) -> T:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(deadline):
                connection = await self._pool.take()
                try:
                    left_s = max(deadline - loop.time(), 0.001)
                    request = request_of(self._address, call, left_s)
                    response = await connection.ask(request)
                finally:
                    # Whatever ended it: one that is not between two calls is closed, and the
                    # server then knows that nobody waits.
                    self._pool.give_back(connection)
        except TimeoutError:
            raise DeadlineExceeded("the answer did not come in time") from None
        if CONTENT_ENCODING in response.headers:
            # As compressing: a few bytes may hold many.
            response = await asyncio.to_thread(unpacked, response, self._body_bytes_max)
        error = calls.error_in(response)
        if error is not None:
            raise error
        return call.read(response)


class AsyncAdmin:
    """Changes what is served; see `Admin`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def load(
        self,
        model: str,
        version: int | None = None,
        *,
        label: str | None = None,
        only: bool = False,
        wait_s: float = 0.0,
    ) -> Changed:
        """As `Admin.load`."""
        call = changes.change(
            model, "load", wait_s, version=version, label=label, only=only or None
        )
        return await self._client.run(call)

    async def unload(
        self, model: str, version: int | None = None, *, wait_s: float = 0.0
    ) -> Changed:
        """As `Admin.unload`."""
        return await self._client.run(changes.change(model, "unload", wait_s, version=version))

    async def label(
        self,
        model: str,
        label: str,
        version: int | None,
        *,
        when_available: bool = False,
        wait_s: float = 0.0,
    ) -> Changed:
        """As `Admin.label`."""
        call = changes.change(
            model, "label", wait_s, label=label, version=version,
            when_available=when_available or None,
        )  # fmt: skip
        return await self._client.run(call)

    async def split(
        self, model: str, weights: Mapping[str, int], *, wait_s: float = 0.0
    ) -> Changed:
        """As `Admin.split`."""
        return await self._client.run(changes.change(model, "split", wait_s, weights=dict(weights)))

    async def rollback(self, model: str, to: int | None = None, *, wait_s: float = 0.0) -> Changed:
        """As `Admin.rollback`."""
        return await self._client.run(changes.change(model, "rollback", wait_s, to=to))

    async def look(self, model: str) -> Changed:
        """As `Admin.look`."""
        return await self._client.run(changes.change(model, "look"))

    async def config(self) -> dict[str, Any]:
        """As `Admin.config`."""
        return await self._client.run(changes.shown())

    async def replace(
        self, config: Mapping[str, Any], *, expected: str = "", wait_s: float = 0.0
    ) -> Changed:
        """As `Admin.replace`."""
        return await self._client.run(changes.replace(config, expected, wait_s))
