"""When a router's epoch is as a change wants it."""

from __future__ import annotations

import json

import pytest

from cluster.doors.awaiting import missing
from cluster.edits import (
    Edit,
    Edited,
    LoadVersion,
    ReplaceConfig,
    RollBack,
    SetLabel,
    SetSplit,
    UnloadVersion,
)
from cluster.epochs import Epoch
from tests.cluster.routing_fakes import AB, epoch, plain


def at(number: int, *versions: int, **labels: int) -> Epoch:
    served = [(plain("m", version), AB) for version in versions]
    return epoch(number, *served, labels={"m": labels} if labels else None)


def declared(*specific: int) -> Edited:
    servable = {"name": "m", "policy": {"specific": specific}}
    return Edited(config=json.dumps({"servables": [servable]}).encode(), epoch=7)


@pytest.mark.parametrize(
    ("edit", "before", "waits", "after"),
    [
        (LoadVersion(servable="m", version=2), at(7, 1), ["m:2"], at(8, 1, 2)),
        (LoadVersion(servable="m"), at(7), ["m"], at(8, 3)),
        (
            LoadVersion(servable="m", version=2, label="a"),
            at(7, 1, 2),
            ["label a of m"],
            at(8, 1, 2, a=2),
        ),
        (
            SetLabel(servable="m", label="a", version=2, when_available=True),
            at(7, 1, 2, a=1),
            ["label a of m"],
            at(8, 1, 2, a=2),
        ),
        (SetLabel(servable="m", label="a"), at(7, 1, a=1), ["label a of m"], at(8, 1)),
        (UnloadVersion(servable="m", version=2), at(7, 1, 2), ["m:2 is served"], at(8, 1)),
        (UnloadVersion(servable="m"), at(7, 1), ["m is served"], at(8)),
        (RollBack(servable="m"), at(7, 2), ["m:1"], at(8, 1)),
        (ReplaceConfig(config=b""), at(7), ["m"], at(8, 1)),
        (SetSplit(servable="m", weights={"1": 1}), at(6, 1), ["epoch 7"], at(7, 1)),
        (LoadVersion(servable="m", version=1), at(6, 1), ["epoch 7"], at(7, 1)),
    ],
)
def test_what_is_missing(edit: Edit, before: Epoch, waits: list[str], after: Epoch) -> None:
    assert missing(edit, declared(1), before, began=1) == waits
    assert missing(edit, declared(1), after, began=1) == []
