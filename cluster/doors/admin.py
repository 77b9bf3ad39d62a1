"""The admin API: what is declared, read and changed over HTTP.

    GET  /v1/admin/config                                        the declaration and its digest
    PUT  /v1/admin/config                                        a declaration that replaces it
    POST /v1/admin/models/NAME:(load|unload|label|split|rollback|look)     one change
    POST /v1/admin/nodes/NODE:(drain|undrain)                    what is on a node
    POST /v1/admin/rebalance                                     what is on every shard actor

A PUT has the semantics of TensorFlow Serving's reload: it replaces the whole, and a failure leaves
the whole as it was. ``?wait_s=N`` answers when every router answers by the change. Decides what
a request means and who may make it; the controller decides what comes of it.

Where no keys are declared the door listens on this machine alone, and the requests of a browser
that a foreign page has led here are refused: they are for another host, or no JSON.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, unquote

import msgspec
import orjson

from batching.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    ServingError,
    Unavailable,
    error_of,
)
from cluster.access import Keyring, Right
from cluster.api import CONTENT_TYPE
from cluster.doors.awaiting import missing
from cluster.doors.response import Response
from cluster.edits import (
    AskBehind,
    DrainNode,
    Edit,
    Edited,
    LoadVersion,
    LookAgain,
    OfServable,
    Rebalance,
    ReplaceConfig,
    RollBack,
    SetLabel,
    SetSplit,
    Show,
    UnloadVersion,
    decode_edited,
    encode_edit,
)
from cluster.epochs import Epoch

__all__ = ["PREFIX", "Admin", "Change"]

logger = logging.getLogger(__name__)

PREFIX: Final = b"/v1/admin/"

#: Hands an edit (`encode_edit`) to the controller, and its answer back; raises when it is away.
Change = Callable[[bytes], Awaitable[bytes]]

_EDITS: Final[Mapping[str, type[OfServable]]] = {
    "load": LoadVersion,
    "unload": UnloadVersion,
    "label": SetLabel,
    "split": SetSplit,
    "rollback": RollBack,
    "look": LookAgain,
}
_PATH: Final = re.compile(r"config|models/([^/:]+):([a-z]+)")
_NODE: Final = re.compile(r"nodes/([0-9A-Za-z._-]+):(drain|undrain)")
_HERE: Final = re.compile(rb"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.IGNORECASE)
_UNDER_WAY_MAX: Final = 16
_CONTROLLER_S: Final = 30.0
_WAIT_S_MAX: Final = 600.0
_LOOK_S: Final = 0.05


class _Asked(NamedTuple):
    """A request understood.

    Attributes:
        edit: what to change.
        wait_s: how long to wait until it is so.
    """

    edit: Edit
    wait_s: float


class Admin:
    """Answers requests below `PREFIX`.

    Args:
        change: reaches the controller.
        epoch: the router's current one.
        refuse: prints an error.
    """

    def __init__(
        self,
        change: Change,
        epoch: Callable[[], Epoch],
        refuse: Callable[[ServingError], Response],
    ) -> None:
        self._change = change
        self._epoch = epoch
        self._refuse = refuse
        self._tasks: set[asyncio.Task[None]] = set()

    def handle(
        self,
        method: bytes,
        path: bytes,
        headers: Mapping[bytes, bytes],
        body: bytes | bytearray,
        keyring: Keyring | None,
        respond: Callable[[Response], None],
    ) -> None:
        """Answer one request later; ``respond`` is called exactly once.

        Raises:
            ServingError: it is not allowed or not understood; then nothing is answered here.
        """
        if keyring is not None:
            keyring.check(headers, Right.ADMIN)
        else:
            _check_ours(method, headers)
        asked = _understood(method, path, headers, body)
        if len(self._tasks) >= _UNDER_WAY_MAX:
            raise ResourceExhausted(f"{_UNDER_WAY_MAX} changes are under way, the limit", 1000)
        task = asyncio.get_running_loop().create_task(self._run(asked, respond))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, asked: _Asked, respond: Callable[[Response], None]) -> None:
        try:
            began = self._epoch().number
            edited = await self._edited(asked.edit)
            if asked.wait_s:
                await self._wait(asked.edit, edited, began, asked.wait_s)
        except ServingError as error:
            respond(self._refuse(error))
        except Exception:
            logger.exception("an admin request failed for a reason of our own")
            respond(self._refuse(Internal("internal error")))
        else:
            respond(_printed(asked.edit, edited))

    async def _edited(self, edit: Edit) -> Edited:
        try:
            async with asyncio.timeout(_CONTROLLER_S):
                answer = await self._change(encode_edit(edit))
        except Exception as error:
            logger.warning("the controller cannot be asked: %s", error)
            raise Unavailable(
                "the controller is away; whether the change was made is not known", 1000
            ) from error
        edited = decode_edited(answer)
        if edited.code != "OK":
            raise error_of(edited.code, edited.message)
        return edited

    async def _wait(self, edit: Edit, edited: Edited, began: int, wait_s: float) -> None:
        """Wait until this router and every other one answer by a change.

        Raises:
            FailedPrecondition: a version has failed; what served before goes on.
            DeadlineExceeded: it takes too long.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        here = 0
        while True:
            # Once it is so here, later epochs are of other changes.
            waits = [] if here else missing(edit, edited, self._epoch(), began)
            if not waits:
                here = here or self._epoch().number
                waits = await self._behind(here)
                if not waits:
                    return
            if loop.time() >= deadline:
                raise DeadlineExceeded(f"declared, and not available yet: {', '.join(waits)}")
            await asyncio.sleep(_LOOK_S)

    async def _behind(self, epoch: int) -> list[str]:
        """Routers that still answer by an epoch before this one."""
        try:
            edited = await self._edited(AskBehind(epoch=epoch))
        except Unavailable:
            return ["what other routers know, since the controller is away"]
        return [f"router {name}" for name in edited.behind]


def _check_ours(method: bytes, headers: Mapping[bytes, bytes]) -> None:
    if _HERE.fullmatch(headers.get(b"host", b"")) is None:
        raise PermissionDenied("without keys, admin requests are for this machine by its own name")
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if method != b"GET" and kind != b"application/json":
        raise InvalidArgument("admin requests carry content-type: application/json")


def _understood(
    method: bytes, path: bytes, headers: Mapping[bytes, bytes], body: bytes | bytearray
) -> _Asked:
    where, _, query = path[len(PREFIX) :].decode("latin-1").partition("?")
    match = _PATH.fullmatch(where)
    name, verb = match.groups() if match else (None, None)
    if match and verb is None and method == b"GET":
        return _Asked(Show(), 0.0)
    if match and verb is None and method == b"PUT":
        expected = headers.get(b"if-match", b"").decode("latin-1").strip('"')
        return _Asked(ReplaceConfig(config=bytes(body), expected=expected), _wait_s(query))
    if where == "rebalance" and method == b"POST":
        return _Asked(_converted(body, {}, Rebalance, where), 0.0)
    node = _NODE.fullmatch(where)
    if node and method == b"POST":
        return _Asked(DrainNode(node=node[1], undo=node[2] == "undrain"), 0.0)
    kind = _EDITS.get(verb or "")
    if kind is None or name is None or method != b"POST":
        line = f"{method.decode('latin-1')} {path.decode('latin-1')}"
        raise InvalidArgument(f"Malformed request: {line}")
    edit = _converted(body, {"servable": unquote(name)}, kind, verb or "")
    return _Asked(edit, _wait_s(query))


def _converted(
    body: bytes | bytearray, more: Mapping[str, str], kind: type[OfServable | Rebalance], what: str
) -> Edit:
    try:
        fields = msgspec.json.decode(body, type=dict[str, object]) if body else {}
        edit = msgspec.convert({**fields, **more}, kind)
    except msgspec.MsgspecError as error:
        raise InvalidArgument(f"{what}: {error}") from None
    assert isinstance(edit, Edit)
    return edit


def _wait_s(query: str) -> float:
    text = dict(parse_qsl(query)).get("wait_s", "0")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _WAIT_S_MAX:
        raise InvalidArgument(f"wait_s is a number of seconds from 0 to {_WAIT_S_MAX:g}")
    return seconds


def _printed(edit: Edit, edited: Edited) -> Response:
    document: dict[str, object] = {"changes": edited.changes, "digest": edited.digest}
    if isinstance(edit, Show):
        document = {
            "config": orjson.loads(edited.config) if edited.config else None,
            "digest": edited.digest,
        }
    if edited.balance:
        document["balance"] = orjson.loads(edited.balance)
    tag = f'etag: "{edited.digest}"\r\n'.encode() if edited.digest else b""
    return Response(200, CONTENT_TYPE, tag, orjson.dumps(document))
