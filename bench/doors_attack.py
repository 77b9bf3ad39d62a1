"""Clients that mean harm: ``python -m bench.doors_attack HOST PORT SECONDS CONNECTIONS SEED``.

Holds so many connections open at once, each of which misbehaves in one way; when the door ends
one, another of its kind takes its place. The last line on standard output is what each kind was
told, as JSON: kind, then first line's status (or how it ended), then how often.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import uvloop

__all__ = ["EXPECTED", "SHARES", "main"]

Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
Behaviour = Callable[[Reader, Writer, random.Random], Awaitable[None]]

_POST: Final = b"POST /v1/models/mlp:predict HTTP/1.1\r\nHost: x\r\n"
_DRIP_S: Final = 0.5
_DEAF_S: Final = 8.0
_OPENING_AT_ONCE: Final = 200

#: Requests that are none, or that can be read in two ways.
_GARBAGE: Final = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"garbage\r\n\r\n",
    _POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    _POST + b"Content-Length: -1\r\n\r\n",
    _POST
    + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\n\r\n",
    _POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    _POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nx",
    _POST + b"X-Long: " + b"y" * 60_000 + b"\r\n\r\n",
)


async def _silent(reader: Reader, writer: Writer, rng: random.Random) -> None:
    del reader, writer, rng


async def _kept(reader: Reader, writer: Writer, rng: random.Random) -> None:
    del rng
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readuntil(b"ok\n")


async def _head(reader: Reader, writer: Writer, rng: random.Random) -> None:
    del reader
    writer.write(_POST + b"X-Drip: ")
    await _drip(writer, rng)


async def _body(reader: Reader, writer: Writer, rng: random.Random) -> None:
    del reader
    writer.write(_POST + b"Content-Length: 131072\r\n\r\n" + b"1" * 65_536)
    await _drip(writer, rng)


async def _unread(reader: Reader, writer: Writer, rng: random.Random) -> None:
    del rng
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
    await asyncio.sleep(_DEAF_S)
    reader._transport.resume_reading()  # type: ignore[attr-defined]


async def _half(reader: Reader, writer: Writer, rng: random.Random) -> None:
    del reader, rng
    writer.write(_POST + b"Content-Length: 100\r\n\r\n{")
    writer.write_eof()


async def _garbage(reader: Reader, writer: Writer, rng: random.Random) -> None:
    del reader
    writer.write(rng.choice(_GARBAGE))


async def _large(reader: Reader, writer: Writer, rng: random.Random) -> None:
    del reader, rng
    writer.write(_POST + b"Content-Length: 999999999\r\n\r\n" + b"1" * 100_000)


async def _bomb(reader: Reader, writer: Writer, rng: random.Random) -> None:
    del reader, rng
    writer.write(_POST + b"Content-Length: 60000\r\n\r\n" + b"[" * 60_000)


async def _drip(writer: Writer, rng: random.Random) -> None:
    while not writer.is_closing():
        writer.write(b"z")
        await asyncio.sleep(_DRIP_S * (0.5 + rng.random()))


#: How many of a hundred connections do what.
SHARES: Final[Mapping[str, tuple[int, Behaviour]]] = {
    "says nothing": (45, _silent),
    "asks once and stays": (15, _kept),
    "headers drip": (14, _head),
    "body drips": (10, _body),
    "takes no answers": (4, _unread),
    "closes its half": (4, _half),
    "no HTTP, or HTTP that reads in two ways": (4, _garbage),
    "body over the limit": (3, _large),
    "nothing but brackets": (1, _bomb),
}

#: What a door may tell each kind. Silence is an end without a word.
EXPECTED: Final[Mapping[str, frozenset[str]]] = {
    "says nothing": frozenset({"silence"}),
    "asks once and stays": frozenset({"silence"}),
    "headers drip": frozenset({"408"}),
    "body drips": frozenset({"408"}),
    "takes no answers": frozenset({"200", "reset"}),
    "closes its half": frozenset({"silence"}),
    "no HTTP, or HTTP that reads in two ways": frozenset({"400", "431", "501"}),
    "body over the limit": frozenset({"413"}),
    "nothing but brackets": frozenset({"400", "429", "504"}),
}


class _Attack:
    """All connections of a run."""

    def __init__(self, host: str, port: int, seed: int) -> None:
        self._host = host
        self._port = port
        self._rng = random.Random(seed)
        self._opening = asyncio.Semaphore(_OPENING_AT_ONCE)
        self.told: dict[str, Counter[str]] = {kind: Counter() for kind in SHARES}
        self.open = 0
        self.open_max = 0

    async def hold(self, kind: str) -> None:
        """One connection of a kind after the other, for ever."""
        while True:
            try:
                async with self._opening:
                    reader, writer = await asyncio.open_connection(self._host, self._port)
            except OSError:
                self.told[kind]["no connection"] += 1
                await asyncio.sleep(1.0)
                continue
            self.open += 1
            self.open_max = max(self.open_max, self.open)
            try:
                self.told[kind][await self._ending(kind, reader, writer)] += 1
            finally:
                self.open -= 1
                writer.close()
            await asyncio.sleep(self._rng.random())

    async def _ending(self, kind: str, reader: Reader, writer: Writer) -> str:
        behaving = asyncio.ensure_future(SHARES[kind][1](reader, writer, self._rng))
        status = ""
        try:
            if kind in ("asks once and stays", "takes no answers"):
                await behaving
            while data := await reader.read(1 << 16):
                status = status or data[9:12].decode("latin-1")
        except (OSError, asyncio.IncompleteReadError):
            return status or "reset"
        finally:
            behaving.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError, EOFError):
                await behaving
        return status or "silence"


async def _run(host: str, port: int, seconds: float, connections: int, seed: int) -> None:
    attack = _Attack(host, port, seed)
    kinds = [kind for kind, (share, _) in SHARES.items() for _ in range(share)]
    tasks = [
        asyncio.create_task(attack.hold(kinds[number % len(kinds)]))
        for number in range(connections)
    ]
    await asyncio.sleep(seconds)
    told = {kind: dict(counts) for kind, counts in attack.told.items()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    print(json.dumps({"open_max": attack.open_max, "told": told}), flush=True)


def main(arguments: list[str]) -> None:
    """Attack, and tell."""
    host, port, seconds, connections, seed = arguments
    uvloop.run(_run(host, int(port), float(seconds), int(connections), int(seed)))


if __name__ == "__main__":
    main(sys.argv[1:])
