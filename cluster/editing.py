"""What an edit makes of the latest declaration, and how the controller answers one.

`edited` turns a declaration into the next, or says why it cannot be; whatever it needs to know
beyond the declaration it takes from a `View` of each servable. It changes nothing itself: the new
declaration goes the way of every declaration, so it is durable, and takes effect when the versions
that it names can answer. `take_edit` does all of it in one go on the controller's loop thread: no
other change comes between the declaration that an edit reads and the one that it makes.

The rules are TensorFlow Serving's where it has one: a label is given only to a version that is
available, and a declaration replaces the whole of the one before it, or nothing of it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any, Final

import msgspec

from batching.errors import FailedPrecondition, InvalidArgument, NotFound, ServingError
from cluster.config import Config, ServableConfig, VersionPolicy, dump, undump
from cluster.control import ControlCore
from cluster.edits import (
    AskBehind,
    DrainNode,
    Edit,
    Edited,
    LoadVersion,
    LookAgain,
    Rebalance,
    ReplaceConfig,
    RollBack,
    SetLabel,
    SetSplit,
    Show,
    UnloadVersion,
    View,
    decode_edit,
    encode_edited,
)
from cluster.fields import FieldError
from cluster.signals import Declared, Event, Look, NodesDrained, RebalanceAsked
from cluster.traffic import is_version, version_of

__all__ = ["changes", "digest_of", "edited", "take_edit"]

_NOTHING: Final = View()


def edited(config: Config | None, edit: Edit, views: Mapping[str, View]) -> Config | None:
    """The declaration after an edit.

    Args:
        config: what is declared; None before anything is.
        edit: what to change.
        views: by servable, of those that are known.

    Raises:
        NotFound: no such servable or version.
        FailedPrecondition: not now, for a reason that it tells.
        InvalidArgument: what would come of it cannot be meant.
    """
    match edit:
        case ReplaceConfig():
            return _replaced(config, edit)
        case Show() | DrainNode() | Rebalance() | AskBehind():
            return config
    if config is None:
        raise FailedPrecondition("nothing is declared yet: run `shardserve up` or `apply`")
    found = next((each for each in config.servables if each.name == edit.servable), None)
    view = views.get(edit.servable, _NOTHING)
    if found is None and not isinstance(edit, LoadVersion):
        known = ", ".join(each.name for each in config.servables) or "nothing"
        raise NotFound(f"{edit.servable!r} is not declared; declared are: {known}")
    try:
        after = _edited_servable(found or ServableConfig(name=edit.servable), edit, view)
        # In its place, so that nothing else seems to have changed.
        kept = [after if each is found else each for each in config.servables]
        if found is None:
            kept.append(after)
        servables = tuple(each for each in kept if each is not None)
        return dataclasses.replace(config, servables=servables)
    except FieldError as error:
        raise InvalidArgument(f"{edit.servable}: {error}") from error


def _edited_servable(
    servable: ServableConfig,
    edit: LoadVersion | UnloadVersion | SetLabel | SetSplit | RollBack | LookAgain,
    view: View,
) -> ServableConfig | None:
    match edit:
        case LoadVersion():
            return _with_version(servable, edit, view)
        case UnloadVersion():
            return _without(servable, edit.version, view)
        case SetLabel():
            return _labelled(servable, edit, view)
        case SetSplit():
            for target in edit.weights:
                version = version_of(target, servable.labels)
                if version is not None and version not in view.available:
                    raise _unavailable(servable.name, f"share of requests to {target}", version)
            return dataclasses.replace(servable, split=edit.weights)
        case RollBack():
            return _rolled_back(servable, edit.to, view)
        case LookAgain():
            return servable


def _with_version(servable: ServableConfig, edit: LoadVersion, view: View) -> ServableConfig:
    version, policy, labels = edit.version, servable.policy, servable.labels
    if version is None:
        if edit.label or edit.only:
            raise InvalidArgument("a label, or `only`, needs a version: NAME:VERSION")
        if policy.latest is None:
            policy = VersionPolicy(latest=1)
    elif edit.only:
        policy = VersionPolicy(specific=(version,))
    elif version not in view.aspired:
        policy = _specific({*view.aspired, *policy.specific, version})
    if edit.label:
        assert version is not None
        labels = {**labels, edit.label: version}
    return dataclasses.replace(servable, policy=policy, labels=labels)


def _without(servable: ServableConfig, version: int | None, view: View) -> ServableConfig | None:
    if version is None:
        return None
    users = servable.rollout.users().get(version)
    if users:
        raise FailedPrecondition(
            f"version {version} of {servable.name} is used by {' and '.join(users)}; "
            "change that first"
        )
    # One that is declared, and not complete in the store, can be taken back as well.
    declared = {*view.aspired, *servable.policy.specific}
    if version not in declared:
        shown = ", ".join(map(str, sorted(declared))) or "none"
        raise NotFound(f"version {version} of {servable.name} is not declared; these are: {shown}")
    rest = declared - {version}
    if not rest:
        raise FailedPrecondition(
            f"version {version} is the only one of {servable.name}; unload {servable.name} itself "
            "to serve none"
        )
    return dataclasses.replace(servable, policy=_specific(rest))


def _labelled(servable: ServableConfig, edit: SetLabel, view: View) -> ServableConfig:
    name, label, version = servable.name, edit.label, edit.version
    labels = {key: value for key, value in servable.labels.items() if key != label}
    if version is None:
        if label not in servable.labels:
            raise NotFound(f"{name} has no label {label!r}")
        return dataclasses.replace(servable, labels=labels)
    if not edit.when_available and version not in view.available:
        raise _unavailable(name, f"label {label}", version)
    if version not in view.available and version not in view.complete:
        raise NotFound(f"the store has no complete version {version} of {name}")
    return dataclasses.replace(servable, labels={**labels, label: version})


def _rolled_back(servable: ServableConfig, to: int | None, view: View) -> ServableConfig:
    name = servable.name
    if not view.aspired:
        raise FailedPrecondition(f"{name} has no version that could be given up")
    newest = max(view.aspired)
    older = [version for version in view.complete if version < newest]
    if to is None:
        if not older:
            raise NotFound(f"the store has no version of {name} that is older than {newest}")
        to = max(older)
    elif to not in older:
        shown = ", ".join(map(str, older)) or "none"
        raise NotFound(f"version {to} of {name} is not older than {newest} and complete: {shown}")
    split: dict[str, int] = {}
    for target, weight in servable.split.items():
        moved = str(to) if is_version(target) and int(target) == newest else target
        split[moved] = split.get(moved, 0) + weight
    shadow = servable.shadow
    if shadow is not None and version_of(shadow.to, servable.labels) == newest:
        shadow = None  # copies for the version that answers would compare it with itself
    return dataclasses.replace(
        servable,
        policy=_specific({*view.aspired, to} - {newest}),
        labels={
            label: to if version == newest else version
            for label, version in servable.labels.items()
        },
        split=split,
        shadow=shadow,
    )


def _replaced(config: Config | None, edit: ReplaceConfig) -> Config:
    if edit.expected and (config is None or digest_of(config) != edit.expected):
        raise FailedPrecondition(
            "the declaration has changed since it was read; read it and change it again"
        )
    try:
        document = json.loads(edit.config)
    except ValueError as error:
        raise InvalidArgument(f"a declaration is JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidArgument("a declaration is an object with `servables`")
    if config is not None:
        if "servables" not in document:
            # Rather than taking everything away from whoever has forgotten it.
            raise InvalidArgument("servables: is missing; write [] to serve nothing")
        current = json.loads(dump(config))
        document = {"store": current["store"], "cluster": current["cluster"], **document}
    return undump(json.dumps(document).encode())


def _specific(versions: Iterable[int]) -> VersionPolicy:
    return VersionPolicy(specific=tuple(sorted(versions)))


def _unavailable(name: str, what: str, version: int) -> FailedPrecondition:
    return FailedPrecondition(
        f"Request to assign {what} to version {version} of model {name}, which is not currently "
        "available for inference"
    )


def take_edit(core: ControlCore, request: bytes, feed: Callable[[Event], None]) -> bytes:
    """Change what is declared, or say why not.

    Args:
        core: whose declaration it is.
        request: an `Edit`.
        feed: hands an event to the core and carries out what follows.
    """
    before = core.config
    try:
        try:
            edit = decode_edit(request)
        except msgspec.MsgspecError as error:
            raise InvalidArgument(f"not an edit: {error}") from None
        if isinstance(edit, AskBehind):
            return encode_edited(Edited(behind=core.behind(edit.epoch)))
        after = edited(before, edit, core.views())
        if after is not None and after != before:
            feed(Declared(config=after))
        if isinstance(edit, DrainNode):
            return _drained(core, edit, feed)
        if isinstance(edit, Rebalance):
            return _rebalanced(core, edit, feed)
        if isinstance(edit, LoadVersion | LookAgain):
            # What is to be loaded may have been saved since the store was last looked into.
            feed(Look(servable=edit.servable))
    except ServingError as error:
        return encode_edited(Edited(code=error.code, message=error.message))
    return encode_edited(
        Edited(
            changes=changes(before, after),
            config=b"" if after is None else dump(after),
            digest="" if after is None else digest_of(after),
            epoch=0 if core.epoch is None else core.epoch.number,
        )
    )


def _drained(core: ControlCore, edit: DrainNode, feed: Callable[[Event], None]) -> bytes:
    """Drain a node or undo it; what is declared stays as it is."""
    before, after = core.drained, core.drained_after(edit)
    if before != after:
        feed(NodesDrained(nodes=after))
    (node, *_) = [*(before ^ after), ""]
    told = f"nodes.{node}: {'drained -> serving' if edit.undo else 'serving -> drained'}"
    config = core.config
    return encode_edited(
        Edited(
            changes=(told,) if node else (),
            config=b"" if config is None else dump(config),
            digest="" if config is None else digest_of(config),
        )
    )


def _rebalanced(core: ControlCore, edit: Rebalance, feed: Callable[[Event], None]) -> bytes:
    """Say what makes load even, and begin with it unless that is all that was asked for."""
    config, balance = core.config, core.balance()
    if config is None:
        raise FailedPrecondition("nothing is declared yet: run `shardserve up` or `apply`")
    if not edit.dry_run:
        feed(RebalanceAsked())
    return encode_edited(
        Edited(
            changes=tuple(balance["moves"]),
            config=dump(config),
            digest=digest_of(config),
            balance=msgspec.json.encode(balance),
        )
    )


def digest_of(config: Config) -> str:
    """What tells one declaration from another."""
    document = json.dumps(json.loads(dump(config)), sort_keys=True)
    return blake2b(document.encode(), digest_size=16).hexdigest()


def changes(before: Config | None, after: Config | None) -> tuple[str, ...]:
    """What is declared differently, as ``path: old -> new``, a line each."""
    old, new = dict(_flat(before)), dict(_flat(after))
    return tuple(
        f"{path}: {_shown(old, path)} -> {_shown(new, path)}"
        for path in dict.fromkeys([*old, *new])
        if old.get(path) != new.get(path)
    )


def _shown(values: Mapping[str, object], path: str) -> str:
    return json.dumps(values[path]) if path in values else "(nothing)"


def _flat(config: Config | None) -> Iterator[tuple[str, object]]:
    if config is None:
        return
    document: dict[str, Any] = json.loads(dump(config))
    for servable in document.pop("servables"):
        name = servable.pop("name")
        policy = {key: value for key, value in servable.pop("policy").items() if value}
        yield f"{name}.policy", policy
        yield from _leaves(name, servable)
    yield from _leaves("", document)


def _leaves(path: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _leaves(f"{path}.{key}" if path else key, below)
    elif value is not None:
        yield path, value
