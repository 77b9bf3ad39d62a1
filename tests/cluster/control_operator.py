"""Somebody who changes all the time what a simulated cluster declares, and what must hold of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from cluster.config import Config
from cluster.control import ControlCore, Event
from cluster.editing import take_edit
from cluster.edits import (
    Edit,
    LoadVersion,
    RollBack,
    SetLabel,
    SetSplit,
    UnloadVersion,
    decode_edited,
    encode_edit,
)
from cluster.epochs import Epoch


class Operator:
    """Labels, splits, loads, unloads and rolls back at random; looks at what is published."""

    def __init__(self) -> None:
        #: kind of edit and code to how often
        self.edits: Counter[str] = Counter()
        self._named: dict[str, dict[str, int]] = {}
        self._taken: set[tuple[str, str]] = set()

    def operate(
        self,
        chance: random.Random,
        complete: Mapping[str, Sequence[int]],
        core: ControlCore,
        feed: Callable[[Event], None],
    ) -> None:
        """Make one change; whatever comes of it is counted."""
        edit = _edit(chance, complete)
        edited = decode_edited(take_edit(core, encode_edit(edit), feed))
        self.edits[f"{type(edit).__name__} {edited.code}"] += 1
        if isinstance(edit, SetLabel) and edit.version is None and edited.code == "OK":
            # It may be declared again before an epoch is without it.
            self._taken.add((edit.servable, edit.label))

    def check(self, epoch: Epoch, config: Config, *, died_lately: bool) -> None:
        """A label names what the epoch serves; it moves only to where it should be.

        While no actor dies it does not disappear, as long as it is declared.
        """
        declared = {servable.name: servable.labels for servable in config.servables}
        for name, labels in epoch.labels.items():
            for label, version in labels.items():
                assert version in epoch.servables[name], (name, label, version)
                before = self._named.get(name, {}).get(label)
                wanted = declared.get(name, {}).get(label)
                assert version in (before, wanted), (name, label, before, wanted, version)
        for name, before_all in self._named.items():
            for label in before_all.keys() & declared.get(name, {}).keys():
                is_there = label in epoch.labels.get(name, {})
                # Of a version that no actor holds any more, a new reign knows nothing.
                is_excused = died_lately or (name, label) in self._taken
                assert is_there or is_excused, (name, label)
        for name, shares in epoch.splits.items():
            assert {share.version for share in shares} <= epoch.servables[name].keys()
        self._taken.clear()
        self._named = epoch.labels


def _edit(chance: random.Random, complete: Mapping[str, Sequence[int]]) -> Edit:
    name = chance.choice(sorted(complete))
    version = chance.choice(complete[name])
    label = chance.choice(("stable", "canary"))
    found: Edit = chance.choice(
        (
            LoadVersion(servable=name, version=version),
            LoadVersion(servable=name, version=version, only=True, label=label),
            LoadVersion(servable=name, version=version, label=label),
            UnloadVersion(servable=name, version=version),
            SetLabel(servable=name, label=label, version=version),
            SetLabel(servable=name, label=label, version=version, when_available=True),
            SetLabel(servable=name, label=label),
            SetSplit(servable=name, weights={str(version): 1, label: 2}),
            SetSplit(servable=name, weights={}),
            RollBack(servable=name),
            LoadVersion(servable=name),
        )
    )
    return found
