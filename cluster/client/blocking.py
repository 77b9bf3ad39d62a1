"""The client that blocks.

What a call says is `calls`', whether it is made again `retrying`'s, on which connection
`sockets`'.
"""

from __future__ import annotations

import random
import ssl
import time
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
from cluster.client.sockets import SocketPool
from cluster.client.values import Changed, Classes, Numbers, Outputs, VersionState

__all__ = ["Admin", "Client"]

T = TypeVar("T")


class Client:
    """A client of one door. Threads may share it.

    Inputs and examples are arrays by name, which travel as they are; lists, numbers and texts
    travel as JSON, and the server converts them. Errors are those of `batching.errors`, with the
    server's words.

    Args:
        url: of the door, ``http://`` or ``https://``.
        key: an API key; None takes that of ``SHARDSERVE_KEY``, where it is set.
        timeout_s: of a call with all its tries, where the call says nothing else.
        connections_max: open connections; a call for which there is none waits.
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
        self._pool = SocketPool(self._address, connections_max, body_bytes_max)
        self.admin = Admin(self)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls under way end with `Unavailable`."""
        self._pool.close()

    def predict(
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
        """The outputs of a signature, for rows of its inputs.

        Args:
            model: the servable's name.
            inputs: by name, the rows of all instances together.
            version: which; else the newest, or what a split gives.
            label: which, instead of a version.
            signature: its name; empty for the default one.
            timeout_s: of this call with all its tries.
            split_key: calls with the same key go to the same version of a split.
            criticality: less than the servable's own.

        Raises:
            ServingError: the server's refusal, or what kept it from answering.
        """
        options = Options(version, label, signature, split_key, criticality)
        return self.run(calls.predict(model, inputs, options), timeout_s)

    def predict_table(
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
        """The outputs for a table of inputs, as a `pyarrow.Table`; needs pyarrow.

        Args:
            model: the servable's name.
            table: a column for each input: a `pyarrow.Table`, or what exports its interface
                (``__arrow_c_stream__``), as Polars' and pandas' frames do.
            version: as of `predict`, like the rest. Which one answered is in the table's metadata.
            label: which, instead of a version.
            signature: its name.
            timeout_s: of this call.
            split_key: for splits.
            criticality: less than the servable's own.

        Raises:
            ServingError: as for `predict`.
        """
        options = Options(version, label, signature, split_key, criticality)
        return self.run(calls.predict_table(model, table, options), timeout_s)

    def classify(
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
        """Labels and scores of examples.

        Args:
            model: the servable's name.
            examples: a list of features by name; or inputs by name, one row an example.
            context: features that all examples of a list share.
            version: as of `predict`, like the rest.
            label: which, instead of a version.
            signature: its name.
            timeout_s: of this call.
            split_key: for splits.
            criticality: less than the servable's own.

        Raises:
            ServingError: as for `predict`.
        """
        options = Options(version, label, signature, split_key, criticality)
        return self.run(calls.classify(model, examples, context, options), timeout_s)

    def regress(
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
        """A number for each example; takes what `classify` takes.

        Raises:
            ServingError: as for `predict`.
        """
        options = Options(version, label, signature, split_key, criticality)
        return self.run(calls.regress(model, examples, context, options), timeout_s)

    def models(self) -> dict[str, tuple[VersionState, ...]]:
        """Every servable and its versions, newest first."""
        return self.run(calls.models())

    def status(
        self, model: str, *, version: int | None = None, label: str | None = None
    ) -> tuple[VersionState, ...]:
        """The states of a servable's versions, newest first."""
        return self.run(calls.status(model, version, label))

    def metadata(
        self, model: str, *, version: int | None = None, label: str | None = None
    ) -> dict[str, Any]:
        """Signatures, as TensorFlow Serving's REST API describes them."""
        return self.run(calls.metadata(model, version, label))

    def is_ready(self) -> bool:
        """Whether the door answers and no declared servable is still loading."""
        try:
            return self.run(calls.ready(), retries=Retries(attempts_max=1))
        except Unavailable:
            return False

    def metrics(self) -> str:
        """The counters, in Prometheus' text."""
        return self.run(calls.metrics())

    def run(
        self, call: Call[T], timeout_s: float | None = None, retries: Retries | None = None
    ) -> T:
        """Make a call of `cluster.client.calls` or `changes`.

        Args:
            call: what to ask.
            timeout_s: with all its tries; None for the client's own.
            retries: None for the client's own.

        Raises:
            ServingError: of the last try.
        """
        limit_s = (self._timeout_s if timeout_s is None else timeout_s) + call.wait_s
        deadline = time.monotonic() + limit_s
        if is_compressed(call, self._compress_bytes_min):
            call = compressed(call)
        tries: Tries | None = None
        while True:
            try:
                return self._try(call, deadline)
            except ServingError as error:
                if tries is None:
                    tries = Tries(
                        retries or self._retries,
                        self._budget,
                        deadline,
                        is_repeatable=call.is_repeatable,
                        chance=self._chance,
                    )
                pause_s = tries.pause_s(error, time.monotonic())
            if pause_s:
                time.sleep(pause_s)

    def _try(self, call: Call[T], deadline: float) -> T:
        connection = self._pool.take(deadline)
        try:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise DeadlineExceeded("the deadline passed before the request was sent")
            request = request_of(self._address, call, left_s)
            response = connection.ask(request, deadline)
        finally:
            # Whatever ended it: one that is not between two calls is closed, and the server then
            # knows that nobody waits.
            self._pool.give_back(connection)
        if CONTENT_ENCODING in response.headers:
            response = unpacked(response, self._body_bytes_max)
        error = calls.error_in(response)
        if error is not None:
            raise error
        return call.read(response)


class Admin:
    """Changes what is served, where the door allows it and the key may.

    With ``wait_s`` a call returns when every router answers by the change, or raises why not.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    def load(
        self,
        model: str,
        version: int | None = None,
        *,
        label: str | None = None,
        only: bool = False,
        wait_s: float = 0.0,
    ) -> Changed:
        """Load a version beside the others, or the newest; give it a label when it is available."""
        call = changes.change(
            model, "load", wait_s, version=version, label=label, only=only or None
        )
        return self._client.run(call)

    def unload(self, model: str, version: int | None = None, *, wait_s: float = 0.0) -> Changed:
        """Unload a version, or the servable."""
        return self._client.run(changes.change(model, "unload", wait_s, version=version))

    def label(
        self,
        model: str,
        label: str,
        version: int | None,
        *,
        when_available: bool = False,
        wait_s: float = 0.0,
    ) -> Changed:
        """Give a label to a version; None takes it away."""
        call = changes.change(
            model, "label", wait_s, label=label, version=version,
            when_available=when_available or None,
        )  # fmt: skip
        return self._client.run(call)

    def split(self, model: str, weights: Mapping[str, int], *, wait_s: float = 0.0) -> Changed:
        """Share requests that name no version by these weights; empty for none."""
        return self._client.run(changes.change(model, "split", wait_s, weights=dict(weights)))

    def rollback(self, model: str, to: int | None = None, *, wait_s: float = 0.0) -> Changed:
        """Give the newest version up for an older one."""
        return self._client.run(changes.change(model, "rollback", wait_s, to=to))

    def look(self, model: str) -> Changed:
        """Look into the store now, and try again what has failed."""
        return self._client.run(changes.change(model, "look"))

    def config(self) -> dict[str, Any]:
        """The declaration that is in effect, and its digest."""
        return self._client.run(changes.shown())

    def replace(
        self, config: Mapping[str, Any], *, expected: str = "", wait_s: float = 0.0
    ) -> Changed:
        """Declare everything anew; with a digest, only if that is still in effect."""
        return self._client.run(changes.replace(config, expected, wait_s))
