"""The counters of all routers of a node, for whoever reads them from one.

Where several routers share a port a reader's connection ends at any of them. Each tells its own
counters over a Unix socket of its own, and whoever is asked asks the others, waits for a moment,
and tells all of them, with a label that says whose each is. A router that does not answer is told
of as down.

Knows text and sockets; not what is counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

__all__ = ["Siblings", "labelled", "together"]

_PATIENCE_S: Final = 0.25
#: Text is made in turns that requests pass between; who asks does not wait for so long.
_TELLING_S: Final = 1.0
#: Of one router's text; thousands of versions have some megabytes.
_BYTES_MAX: Final = 64 << 20
_HEAD: Final = b"# HELP "
_UP: Final = (
    b"# HELP serving_router_up Whether this router of the node told its counters.\n"
    b"# TYPE serving_router_up gauge\n"
)


def labelled(text: bytes, router: str) -> bytes:
    """Metrics in Prometheus' text form with one more label, ``router``, at every sample.

    Args:
        text: whole lines.
        router: without quotes and backslashes.
    """
    label = f'router="{router}"'.encode()
    lines = text.split(b"\n")
    for index, line in enumerate(lines):
        if not line or line.startswith(b"#"):
            continue
        # A name has neither a brace nor a blank; the first of them ends it.
        end = line.find(b" ")
        brace = line.find(b"{", 0, end)
        if brace < 0:
            lines[index] = b"%b{%b}%b" % (line[:end], label, line[end:])
        else:
            lines[index] = b"%b{%b,%b" % (line[:brace], label, line[brace + 1 :])
    return b"\n".join(lines)


def together(texts: Mapping[str, bytes | None]) -> bytes:
    """Labelled texts as one, in which all samples of a metric stand together, as the form wants.

    Args:
        texts: by router; None of one that did not answer.
    """
    families: dict[bytes, list[bytes]] = {}
    for text in texts.values():
        # What stands before the first head is nobody's.
        for family in (text or b"").split(_HEAD)[1:]:
            name = family[: family.find(b" ")]
            known = families.get(name)
            if known is None:
                families[name] = [_HEAD, family]
            else:
                # Without the rest of its HELP line, and its TYPE line.
                known.append(family.split(b"\n", 2)[-1])
    up = b"".join(
        b'serving_router_up{router="%b"} %d\n' % (router.encode(), text is not None)
        for router, text in texts.items()
    )
    return b"".join(piece for pieces in families.values() for piece in pieces) + _UP + up


class Siblings:
    """The other routers of this node. Everything happens on the loop's thread.

    Args:
        own: this router's number.
        sockets: of every router of the node, this one included, by number.
    """

    def __init__(self, own: str, sockets: Mapping[str, Path]) -> None:
        self._own = own
        self._sockets = sockets
        self._server: asyncio.Server | None = None
        self._reading: set[asyncio.Task[None]] = set()

    async def open(self, tell: Callable[[Callable[[bytes], None]], None]) -> None:
        """Tell siblings who ask.

        Args:
            tell: calls what it is given with this router's text, once, now or in a moment.

        Raises:
            OSError: the socket cannot be made.
        """

        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            told: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            tell(lambda text: None if told.done() else told.set_result(text))
            try:
                writer.write(await asyncio.wait_for(told, _TELLING_S))
                await writer.drain()
            except (OSError, TimeoutError):
                pass  # who asked has long given up
            finally:
                writer.close()

        path = self._sockets[self._own]
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of the process that was here before
        self._server = await asyncio.start_unix_server(answer, path)

    def close(self) -> None:
        """Tell nobody any more."""
        if self._server is not None:
            self._server.close()
        for task in self._reading:
            task.cancel()

    def read(self, own: bytes, then: Callable[[bytes], None]) -> None:
        """All routers' counters, in a moment.

        Args:
            own: this router's, labelled.
            then: told the text, once.
        """
        task = asyncio.get_running_loop().create_task(self._read(own, then))
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)

    async def _read(self, own: bytes, then: Callable[[bytes], None]) -> None:
        others = [each for each in self._sockets if each != self._own]
        found = await asyncio.gather(*(_told(_ask(self._sockets[each])) for each in others))
        texts = {**dict(zip(others, found, strict=True)), self._own: own}
        then(together({each: texts[each] for each in self._sockets}))


async def _ask(path: Path) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        text = bytearray()
        while piece := await reader.read(1 << 16):
            text += piece
            if len(text) > _BYTES_MAX:
                raise OSError("more counters than anybody has")
        return bytes(text)
    finally:
        writer.close()


async def _told(answer: Awaitable[bytes]) -> bytes | None:
    try:
        return await asyncio.wait_for(answer, _PATIENCE_S) or None
    except (OSError, TimeoutError):
        return None
