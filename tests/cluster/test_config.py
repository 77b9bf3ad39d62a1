"""Declarations: what may be said, what silence means, and how mistakes are told."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import config as module
from cluster.config import (
    Address,
    BatchingConfig,
    ClusterConfig,
    CompactConfig,
    Config,
    ConfigInvalid,
    HttpConfig,
    LinkTls,
    Registered,
    SchedulingConfig,
    ServableConfig,
    Shadow,
    VersionPolicy,
    dump,
    fixed_fields_changed,
    load,
    parse,
    parse_size,
    undump,
)
from cluster.doors.settings import Auth, DoorLimits, Tls, is_loopback

CLASSES = (
    Address, Auth, BatchingConfig, ClusterConfig, CompactConfig, Config, DoorLimits, HttpConfig,
    LinkTls, SchedulingConfig, ServableConfig, Shadow, Tls, VersionPolicy,
)  # fmt: skip


WHOLE = """
store: /data/store
servables:
  - name: minilm
    policy: {latest: 2}
    replicas: 2
    shards: 4
    batching: {rows_max: 128, bytes_max: 16MiB}
    deadline_ms: 500
  - name: digits
    policy: {specific: [3, 5]}
  - name: ranker
    policy: {all: true}
cluster:
  name: prod
  devices: 2
  shards: 4
  hosts: 2
  http:
    host: 0.0.0.0
    port: 9501
    tls: {certificate: /tls/crt, key: /tls/key}
    limits: {body_bytes_max: 1MiB, idle_s: 60}
  serve: {port: 9000}
  tls: {certificate: /tls/node.pem, key: "env:NODE_KEY", ca: /tls/ca.pem}
  transport: ray
  auth: {keys: /etc/keys.yaml, open_metrics: true}
  allow_entry_points: ["shop.*", "cluster.demo.*"]
  device_memory: 4GiB
  shard_memory: 512 MB
  host_memory: 1048576
  poll_s: 1
  lease_s: 5
"""


def test_a_whole_declaration_is_read() -> None:
    assert parse(WHOLE) == Config(
        store="/data/store",
        servables=(
            ServableConfig(
                name="minilm",
                policy=VersionPolicy(latest=2),
                replicas=2,
                shards=4,
                batching=BatchingConfig(rows_max=128, bytes_max=16 << 20),
                deadline_ms=500,
            ),
            ServableConfig(name="digits", policy=VersionPolicy(specific=(3, 5))),
            ServableConfig(name="ranker", policy=VersionPolicy(all=True)),
        ),
        cluster=ClusterConfig(
            name="prod",
            devices=2,
            shards=4,
            hosts=2,
            http=HttpConfig(
                host="0.0.0.0",
                port=9501,
                tls=Tls(certificate="/tls/crt", key="/tls/key"),
                limits=DoorLimits(body_bytes_max=1 << 20, idle_s=60.0),
            ),
            serve=Address(port=9000),
            tls=LinkTls(certificate="/tls/node.pem", key="env:NODE_KEY", ca="/tls/ca.pem"),
            transport="ray",
            auth=Auth(keys="/etc/keys.yaml", open_metrics=True),
            allow_entry_points=("shop.*", "cluster.demo.*"),
            device_memory=4 << 30,
            shard_memory=512_000_000,
            host_memory=1 << 20,
            poll_s=1.0,
            lease_s=5.0,
        ),
    )


def test_silence_means_the_documented_defaults() -> None:
    parsed = parse("store: s\nservables: [{name: m}]")
    assert parsed.servables[0].policy == VersionPolicy(latest=1)
    http = HttpConfig(host="127.0.0.1", port=8501, tls=None, limits=DoorLimits())
    assert parsed.cluster.http == http
    assert parsed.cluster.auth is None
    assert parsed.cluster.serve == Address(host="127.0.0.1", port=8000)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("store: s\nservables: [{name: m, polcy: {}}]",
         "servables[0].polcy: unknown key; did you mean policy"),
        ("store: s\ncluster: {htpp: {}}", "cluster.htpp: unknown key; did you mean http"),
        ("store: s\ncluster: {http: {prot: 1}}",
         "cluster.http.prot: unknown key; did you mean port"),
        ("store: s\nservables: [{name: m, policy: {newest: 1}}]",
         "servables[0].policy.newest: unknown key; known are latest, specific, all"),
        ("store: s\nservables: [{name: m, batching: {rows: 1}}]",
         "servables[0].batching.rows: unknown key; did you mean rows_max"),
        ("servables: []", "store: is missing"),
        ("store: s\nservables: [{replicas: 1}]", "servables[0].name: is missing"),
        ("store: ''", "store: must name a directory"),
        ("store: 7", "store: input should be a valid string, got 7"),
        ("store: s\nservables: {name: m}",
         "servables: input should be a valid array, got a mapping"),
        ("store: s\nservables: [{name: m, replicas: '2'}]",
         "servables[0].replicas: input should be a valid integer, got '2'"),
        ("store: s\nservables: [{name: m, replicas: true}]",
         "servables[0].replicas: input should be a valid integer, got True"),
        ("store: s\nservables: [{name: m, replicas: 0}]",
         "servables[0].replicas: must be at least 1, got 0"),
        ("store: s\nservables: [{name: m, shards: 1, placement: messages}]",
         "servables[0].placement: messages takes as few shard actors as have room"),
        ("store: s\nservables: [{name: m, placement: best}]",
         "servables[0].placement: "),
        ("store: s\nservables: [{name: m, shards: 4}]",
         "servables[0].shards: 4 shard actors are asked for, but cluster.shards is 1; raise that"),
        ("store: s\nservables: [{name: m}, {name: m}]", "servables[1].name: 'm' is declared twice"),
        ("store: s\nservables: [{name: _m}]", "servables[0].name: '_m' is not a name"),
        ("store: s\nservables: [{name: m/n}]", "servables[0].name: 'm/n' is not a name"),
        ("store: s\nservables: [{name: m, policy: {}}]", "servables[0].policy: give exactly one"),
        ("store: s\nservables: [{name: m, policy: {latest: 1, all: true}}]",
         "servables[0].policy: give exactly one"),
        ("store: s\nservables: [{name: m, policy: {latest: 0}}]",
         "servables[0].policy.latest: must be at least 1, got 0"),
        ("store: s\nservables: [{name: m, policy: {specific: [0]}}]",
         "servables[0].policy.specific: a version is at least 1, got 0"),
        ("store: s\nservables: [{name: m, policy: {specific: [1, 1]}}]",
         "servables[0].policy.specific: a version is named twice"),
        ("store: s\nservables: [{name: m, tier: nvme}]",
         "servables[0].budget: tier: nvme needs one"),
        ("store: s\ncluster: {device_memory: 4 gigs}",
         "cluster.device_memory: '4 gigs' is not a size"),
        ("store: s\ncluster: {device_memory: 0}", "cluster.device_memory: must be at least 1"),
        ("store: s\ncluster: {http: {processes: 0}}",
         "cluster.http.processes: auto, or 1 to 64, not 0"),
        ("store: s\ncluster: {http: {port: 65536}}",
         "cluster.http.port: must be between 0 and 65535, got 65536"),
        ("store: s\ncluster: {tls: {certificate: c, key: 'env:', ca: a}}",
         "cluster.tls.key: must name a file, or a variable as env:NAME"),
        ("store: s\ncluster: {tls: {certificate: c, key: k}}", "cluster.tls.ca: is missing"),
        ("store: s\ncluster: {http: {tls: {key: k}}}", "cluster.http.tls.certificate: is missing"),
        ("store: s\ncluster: {http: {tls: {certificate: '', key: k}}}",
         "cluster.http.tls.certificate: must name a file"),
        ("store: s\ncluster: {http: {limits: {idle: 1}}}",
         "cluster.http.limits.idle: unknown key; did you mean idle_s"),
        ("store: s\ncluster: {http: {limits: {head_s: 0}}}",
         "cluster.http.limits.head_s: must be at least 0.01, got 0"),
        ("store: s\ncluster: {http: {limits: {bodies_bytes_max: 1MiB}}}",
         "cluster.http.limits.bodies_bytes_max: must be at least body_bytes_max"),
        ("store: s\ncluster: {auth: {keys: ''}}", "cluster.auth.keys: must name a file"),
        ("store: s\ncluster: {auth: {}}", "cluster.auth.keys: is missing"),
        ("store: s\ncluster: {load_parallel: 0}",
         "cluster.load_parallel: must be at least 1, got 0"),
        ("store: s\ncluster: {load_parallel_start: 0}",
         "cluster.load_parallel_start: must be at least 1, got 0"),
        ("store: s\ncluster: {poll_s: 0}", "cluster.poll_s: must be at least 0.05, got 0"),
        ("store: s\ncluster: {allow_entry_points: ['*']}",
         "cluster.allow_entry_points: '*' would allow every entry point"),
        ("store: s\nstore: t", "key 'store' is given twice"),
        ("store: 2026-01-01", "not plain data"),
        ("store: s\ncluster: {poll_s: .nan}", "not plain data"),
        ("- store", "a declaration is a mapping with a store, got a list"),
        ("", "a declaration is a mapping with a store, got nothing"),
        ("store: [", "not YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_path(text: str, problem: str) -> None:
    with pytest.raises(ConfigInvalid, match=re.escape(problem)):
        parse(text)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ConfigInvalid) as caught:
        parse("stor: s\nservables: [{name: m, replicas: 0}, {nme: n}]")
    assert str(caught.value).splitlines() == [
        "store: is missing",
        "servables[0].replicas: must be at least 1, got 0",
        "servables[1].name: is missing",
        "servables[1].nme: unknown key; did you mean name",
        "stor: unknown key; did you mean store",
    ]


def test_values_are_checked_in_python_too() -> None:
    with pytest.raises(ValueError, match="replicas: must be at least 1"):
        ServableConfig(name="m", replicas=0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("17", 17), ("17B", 17), ("1kB", 1000), ("1KB", 1000), ("1KiB", 1024),
     ("1.5 MiB", 3 << 19), (" 4GiB ", 4 << 30), ("2TB", 2 * 10**12), ("1TiB", 1 << 40)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 giB", "1GiBs", "0x10", "1e3"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_a_relative_store_lies_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "servables.yaml").write_text("store: ./store")
    assert load(tmp_path / "servables.yaml").store == str((tmp_path / "store").resolve())


def test_files_of_certificates_lie_beside_the_declaration_and_variables_nowhere(
    tmp_path: Path,
) -> None:
    text = "store: s\ncluster: {tls: {certificate: node.pem, key: 'env:KEY', ca: /tls/ca.pem}}"
    (tmp_path / "servables.yaml").write_text(text)
    tls = load(tmp_path / "servables.yaml").cluster.tls
    assert tls is not None
    assert tls == LinkTls(certificate=str(tmp_path / "node.pem"), key="env:KEY", ca="/tls/ca.pem")
    assert tls.files().key == "env:KEY"


def test_relative_files_of_doors_lie_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "servables.yaml").write_text(
        "store: store\ncluster:\n  auth: {keys: keys.yaml}\n"
        "  http: {tls: {certificate: tls/crt, key: /k, client_ca: ''}}"
    )
    cluster = load(tmp_path / "servables.yaml").cluster
    assert cluster.auth == Auth(keys=str(tmp_path / "keys.yaml"))
    assert cluster.http.tls == Tls(certificate=str(tmp_path / "tls/crt"), key="/k")


@pytest.mark.parametrize(
    ("host", "wanted"),
    [("127.0.0.1", True), ("127.0.0.53", True), ("localhost", True), ("::1", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("", False)],
)  # fmt: skip
def test_loopback_is_known(host: str, wanted: bool) -> None:
    assert is_loopback(host) == wanted


def test_an_absolute_store_stays(tmp_path: Path) -> None:
    (tmp_path / "servables.yaml").write_text("store: /data/store")
    assert load(tmp_path / "servables.yaml").store == "/data/store"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"nowhere\.yaml: cannot be read"):
        load(tmp_path / "nowhere.yaml")


def test_mistakes_in_a_file_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "servables.yaml").write_text("stor: s")
    with pytest.raises(ConfigInvalid, match=r"servables\.yaml:\nstore: is missing"):
        load(tmp_path / "servables.yaml")


def test_the_example_in_the_module_is_a_declaration() -> None:
    assert module.__doc__ is not None
    example = module.__doc__[module.__doc__.index("    store:") :]
    parsed = parse(example)
    assert parsed.servables[0].shards == 4
    assert parsed.cluster.shard_memory == 2 << 30


@pytest.mark.parametrize("kind", CLASSES)
def test_every_field_is_documented_and_every_documented_field_exists(kind: type) -> None:
    assert kind.__doc__ is not None
    documented = re.findall(r"^        (\w+): ", kind.__doc__, flags=re.MULTILINE)
    assert documented == [field.name for field in dataclasses.fields(kind)]


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ConfigInvalid("a.b: c")))  # noqa: S301 - our own bytes
    assert (type(error), str(error)) == (ConfigInvalid, "a.b: c")


def test_what_a_running_cluster_cannot_change_is_named() -> None:
    old = parse("store: s")
    new = parse("store: t\ncluster: {devices: 3, http: {port: 1}, poll_s: 9}")
    assert fixed_fields_changed(old, old) == ()
    assert fixed_fields_changed(old, new) == ("store", "cluster.http")
    other = parse("store: s\ncluster: {batching: {policy: edf}}")
    assert fixed_fields_changed(old, other) == ("cluster.batching",)
    keyed = parse("store: s\ncluster: {auth: {keys: k}}")
    assert fixed_fields_changed(old, keyed) == ("cluster.auth",)


@pytest.mark.parametrize(
    ("batching", "problem"),
    [
        ("{policy: best}", r"batching\.policy: no policy 'best'; use effsafe, round-robin"),
        ("{policy: edf, guard_ms: 1}", r"batching\.guard_ms: policy edf has no guard"),
        ("{guard_ms: -1}", r"batching\.guard_ms"),
        ("{credit_ms: -0.5}", r"batching\.credit_ms"),
    ],
)
def test_how_batches_are_chosen_is_checked(batching: str, problem: str) -> None:
    with pytest.raises(ConfigInvalid, match=problem):
        parse(f"store: s\ncluster: {{batching: {batching}}}")


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True)
counts = st.integers(1, 1 << 40)
policies = st.one_of(
    st.builds(VersionPolicy, latest=counts),
    st.builds(
        VersionPolicy,
        specific=st.lists(counts, min_size=1, unique=True).map(tuple),
    ),
    st.just(VersionPolicy(all=True)),
)
servables = st.builds(
    ServableConfig,
    name=names,
    policy=policies,
    replicas=counts,
    shards=st.one_of(st.none(), st.integers(1, 8)),
    batching=st.builds(BatchingConfig, rows_max=counts, bytes_max=counts),
    compact=st.none() | st.builds(CompactConfig, overlays=st.integers(1, 8)),
    deadline_ms=counts,
)
configs = st.builds(
    Config,
    store=st.text(min_size=1, max_size=20),
    servables=st.lists(servables, max_size=3, unique_by=lambda each: each.name).map(tuple),
    cluster=st.builds(
        ClusterConfig, name=names, shards=st.integers(8, 99), poll_s=st.floats(0.05, 1e6)
    ),
)


@given(configs)
def test_what_is_kept_is_what_was_declared(value: Config) -> None:
    assert undump(dump(value)) == value


@given(st.text(max_size=200))
def test_any_text_is_a_declaration_or_a_typed_error(text: str) -> None:
    with contextlib.suppress(ConfigInvalid):
        assert isinstance(parse(text), Config)


def test_a_policy_and_a_source_of_a_package_are_read_with_their_options() -> None:
    found = parse(
        """
store: s
servables:
- name: m
  policy: {registered: {name: at-most, options: {version: 5}}}
  source: {name: released, options: {file: /etc/released}}
"""
    )
    assert found.servables[0].policy == VersionPolicy(
        registered=Registered(name="at-most", options={"version": 5})
    )
    assert found.servables[0].source == Registered(
        name="released", options={"file": "/etc/released"}
    )
    assert undump(dump(found)) == found
