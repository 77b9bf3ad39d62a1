"""The admin API's calls: each the edit that it asks for, and how its answer reads. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from batching.errors import DataLoss
from cluster.client.calls import Call, document_in, header_value
from cluster.client.reception import Response
from cluster.client.values import Changed

__all__ = ["change", "replace", "shown"]

_JSON: Final = "content-type: application/json\r\n"
_CONFIG: Final = "/v1/admin/config"


def change(model: str, verb: str, wait_s: float = 0.0, **fields: object) -> Call[Changed]:
    """Ask for an edit of one servable.

    Args:
        model: its name.
        verb: load, unload, label, split, rollback or look.
        wait_s: how long the server may wait until what was asked for is available.
        fields: of the edit; those that are None are left out.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    path = f"/v1/admin/models/{quote(model, safe='')}:{verb}"
    return _asked("POST", path, given, wait_s)


def replace(config: Mapping[str, Any], expected: str, wait_s: float) -> Call[Changed]:
    """Ask to declare everything anew.

    Args:
        config: ``{"servables": [...]}``.
        expected: digest of the declaration that is replaced; empty for any.
        wait_s: as of `change`.
    """
    tag = f'if-match: "{header_value("if-match", expected)}"\r\n' if expected else ""
    return _asked("PUT", _CONFIG, config, wait_s, tag)


def shown() -> Call[dict[str, Any]]:
    """Ask for the declaration that is in effect, and its digest."""
    return Call("GET", _CONFIG, document_in)


def _asked(
    method: str, path: str, document: Mapping[str, Any], wait_s: float, more: str = ""
) -> Call[Changed]:
    query = f"?wait_s={wait_s:g}" if wait_s else ""
    body = json.dumps(document).encode()
    # The controller may have done it before its answer was lost, so nothing is asked twice.
    return Call(
        method,
        path + query,
        _changed,
        _JSON + more,
        [body],
        is_repeatable=False,
        wait_s=wait_s,
    )


def _changed(response: Response) -> Changed:
    document = document_in(response)
    changes = document.get("changes")
    if not isinstance(changes, list):
        raise DataLoss("the answer does not say what changed")
    return Changed(tuple(map(str, changes)), str(document.get("digest", "")))
