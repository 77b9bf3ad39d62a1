"""`servables.yaml` read and written: what a person declares, checked before anything acts on it.

Strict: an unknown key, a key given twice, a wrong type or a value out of range is refused with its
path and what to do. What a declaration may say is in `cluster.settings`, whose values are offered
here as well. Does not know which versions exist, which actors run, or who reads the values.

    store: ./store                  # relative to the file's directory
    servables:
      - name: minilm
        policy: {latest: 1}
        shards: 4
    cluster:
      shards: 4
      shard_memory: 2GiB
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import TypeAdapter, ValidationError

from cluster.doors.settings import RequestLog, Tls
from cluster.fields import FieldError, parse_size
from cluster.servable_settings import (
    BatchingConfig,
    CompactConfig,
    Registered,
    ServableConfig,
    Transition,
    VersionPolicy,
)
from cluster.settings import (
    Address,
    CacheConfig,
    ClusterConfig,
    Config,
    ConfigInvalid,
    HttpConfig,
    LinkTls,
    SchedulingConfig,
)
from cluster.traffic import Shadow

__all__ = [
    "Address",
    "BatchingConfig",
    "CacheConfig",
    "ClusterConfig",
    "CompactConfig",
    "Config",
    "ConfigInvalid",
    "HttpConfig",
    "LinkTls",
    "Registered",
    "RequestLog",
    "SchedulingConfig",
    "ServableConfig",
    "Shadow",
    "Transition",
    "VersionPolicy",
    "dump",
    "fixed_fields_changed",
    "load",
    "parse",
    "parse_size",
    "undump",
]

_ADAPTER: Final = TypeAdapter(Config)


def load(path: str | Path) -> Config:
    """Read a declaration from a file; relative paths are taken from the file's directory.

    Raises:
        ConfigInvalid: the file cannot be read, or does not say what a declaration may say.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{file}: cannot be read: {error}") from error
    try:
        config = parse(text)
    except ConfigInvalid as error:
        raise ConfigInvalid(f"{file}:\n{error}") from error
    cluster = _with_paths_beside(file.parent, config.cluster)
    servables = tuple(_with_log_beside(file.parent, each) for each in config.servables)
    config = dataclasses.replace(config, servables=servables, cluster=cluster)
    if "://" in config.store:
        return config
    return dataclasses.replace(config, store=str((file.parent / config.store).resolve()))


def _with_log_beside(directory: Path, servable: ServableConfig) -> ServableConfig:
    """Its log's directory, made absolute; it is one of every node."""
    if servable.log is None:
        return servable
    path = str((directory / servable.log.directory).absolute())
    return dataclasses.replace(servable, log=dataclasses.replace(servable.log, directory=path))


def _with_paths_beside(directory: Path, cluster: ClusterConfig) -> ClusterConfig:
    """Its files of keys and certificates, made absolute. They are read on every node, not here."""

    def beside(name: str) -> str:
        return name if name.startswith("env:") else str((directory / name).absolute())

    links, door, auth = cluster.tls, cluster.http.tls, cluster.auth
    if links is not None:
        links = LinkTls(
            certificate=beside(links.certificate), key=beside(links.key), ca=beside(links.ca)
        )
    if door is not None:
        door = Tls(
            certificate=beside(door.certificate),
            key=beside(door.key),
            client_ca=beside(door.client_ca) if door.client_ca else "",
        )
    if auth is not None:
        auth = dataclasses.replace(auth, keys=beside(auth.keys))
    http = dataclasses.replace(cluster.http, tls=door)
    return dataclasses.replace(cluster, http=http, tls=links, auth=auth)


def parse(text: str) -> Config:
    """A declaration from YAML text.

    Raises:
        ConfigInvalid: with one line per mistake: its path, what is wrong, what to do.
    """
    try:
        raw = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigInvalid(f"not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigInvalid(f"a declaration is a mapping with a store, got {_type_text(raw)}")
    try:
        document = json.dumps(raw, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigInvalid(f"a value is not plain data: {error}; quote it") from error
    return undump(document.encode())


def dump(config: Config) -> bytes:
    """The declaration as JSON, for the durable state; `undump` reads it back."""
    return _ADAPTER.dump_json(config)


def undump(data: bytes) -> Config:
    """A declaration from JSON.

    Raises:
        ConfigInvalid: as `parse`.
    """
    try:
        # Strict validation refuses mappings for dataclasses, except when they come as JSON.
        return _ADAPTER.validate_json(data)
    except ValidationError as error:
        problems = [_problem_text(details) for details in error.errors()]
        raise ConfigInvalid("\n".join(problems)) from error


def fixed_fields_changed(old: Config, new: Config) -> tuple[str, ...]:
    """Paths that differ although a running cluster cannot change them."""
    pairs = {
        "store": (old.store, new.store),
        "cluster.name": (old.cluster.name, new.cluster.name),
        "cluster.http": (old.cluster.http, new.cluster.http),
        "cluster.serve": (old.cluster.serve, new.cluster.serve),
        "cluster.tls": (old.cluster.tls, new.cluster.tls),
        "cluster.transport": (old.cluster.transport, new.cluster.transport),
        "cluster.auth": (old.cluster.auth, new.cluster.auth),
        "cluster.allow_entry_points": (
            old.cluster.allow_entry_points,
            new.cluster.allow_entry_points,
        ),
        "cluster.device_memory": (old.cluster.device_memory, new.cluster.device_memory),
        "cluster.shard_memory": (old.cluster.shard_memory, new.cluster.shard_memory),
        "cluster.host_memory": (old.cluster.host_memory, new.cluster.host_memory),
        "cluster.batching": (old.cluster.batching, new.cluster.batching),
        "cluster.cache": (old.cluster.cache, new.cluster.cache),
    }
    return tuple(path for path, (before, after) in pairs.items() if before != after)


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is given twice", key.start_mark
                )
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _problem_text(details: Any) -> str:
    """One mistake as ``path: what is wrong``."""
    location: tuple[str | int, ...] = details["loc"]
    path = _path_text(location)
    match details["type"]:
        case "unexpected_keyword_argument":
            return f"{path}: unknown key{_suggestion(location)}"
        case "missing":
            return f"{path}: is missing"
        case "value_error":
            cause = details["ctx"]["error"]
            if isinstance(cause, FieldError):
                return f"{_path_text((*location, cause.field_name))}: {cause.problem}"
            return f"{path}: {cause}"
        case _:
            text = str(details["msg"])
            return f"{path}: {text[0].lower()}{text[1:]}, got {_type_text(details['input'])}"


def _path_text(location: tuple[str | int, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.lstrip(".") or "declaration"


def _suggestion(location: tuple[str | int, ...]) -> str:
    owner = _class_at(location[:-1])
    known = [each.name for each in dataclasses.fields(owner)]
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {close[0]}" if close else f"; known are {', '.join(known)}"


def _class_at(location: tuple[str | int, ...]) -> type[Any]:
    """The dataclass whose field the location names."""
    found: Any = Config
    for part in location:
        if isinstance(part, str):
            found = typing.get_type_hints(found)[part]
        elif typing.get_origin(found) is tuple:
            found = typing.get_args(found)[0]
        if isinstance(found, types.UnionType):
            found = next(arg for arg in typing.get_args(found) if arg is not type(None))
    assert isinstance(found, type)
    return found


def _type_text(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing"}
    name = names.get(type(value))
    return name if name is not None and not isinstance(value, str) else repr(value)
