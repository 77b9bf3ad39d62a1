"""The keys file: what it may say, what its mistakes are called, and that it is read again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from batching.errors import FailedPrecondition, Unauthenticated
from cluster.access import Key, Keyring, Right, digest_of
from cluster.doors.settings import Auth
from cluster.keyfile import keys_of, read_keys

SECRET = "0123456789abcdef-secret"
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()


def written(directory: Path, text: str) -> Path:
    path = directory / "keys.yaml"
    path.write_text(text)
    return path


def headers(secret: str = SECRET) -> dict[bytes, bytes]:
    return {b"x-api-key": secret.encode()}


@pytest.mark.parametrize("where", [f"sha256: {DIGEST}", "file: a.key", "env: A_KEY"])
def test_a_secret_comes_from_digest_file_or_environment(tmp_path: Path, where: str) -> None:
    (tmp_path / "a.key").write_text(f"{SECRET}\nnot this line")
    path = written(tmp_path, f"keys: [{{name: a, {where}, predict: ['*'], admin: true}}]")
    ring, files = read_keys(path, environ={"A_KEY": SECRET + "\n"})
    assert ring.check(headers(), Right.PREDICT, "mlp") == "a"
    assert ring.check(headers(), Right.ADMIN) == "a"
    assert set(files) == {path} | ({tmp_path / "a.key"} if "file" in where else set())


def test_the_example_in_the_module_is_a_keys_file(tmp_path: Path) -> None:
    import cluster.keyfile as module

    assert module.__doc__ is not None
    example = module.__doc__[module.__doc__.index("    keys:") : module.__doc__.index("Secrets")]
    (tmp_path / "prometheus.key").write_text(SECRET)
    path = written(tmp_path, example.replace("2c26b46b68ffc68ff99b...", "ab" * 32))
    ring, _ = read_keys(path)
    assert ring.check(headers(), Right.METRICS) == "prometheus"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("keys: [", "line 1: not YAML"),
        ("", "Expected `object`, got `null`"),
        ("[]", "Expected `object`, got `array`"),
        ("{}", "missing required field `keys`"),
        ("keys: []\nmore: 1", "unknown field `more`"),
        ("keys: [{sha256: ab}]", r"missing required field `name` - at `\$.keys\[0\]`"),
        (f"keys: [{{name: a, key: {SECRET}}}]", "unknown field `key`"),
        (f"keys: [{{name: a, metrics: {SECRET}}}]", "Expected `bool`, got `str`"),
        (f"keys: [{{name: a, sha256: {SECRET}}}]", "key 'a': sha256 must be 64 hexadecimal"),
        ("keys: [{name: a}]", "key 'a': give exactly one of sha256, file, env"),
        (f"keys: [{{name: a, sha256: {DIGEST}, env: B}}]", "give exactly one of"),
        (f"keys: [{{name: '', sha256: {DIGEST}}}]", "a key needs a name"),
        ("keys: [{name: a, file: nowhere}]", "nowhere cannot be read: No such file"),
        ("keys: [{name: a, file: short.key}]", "a secret is 16 to 512 ASCII characters"),
        ("keys: [{name: a, file: binary.key}]", "is not UTF-8 text"),
        ("keys: [{name: a, file: large.key}]", "is larger than"),
        ("keys: [{name: a, env: NOT_SET}]", "environment variable NOT_SET is not set"),
        (f"keys: [{{name: a, sha256: {DIGEST}}}, {{name: a, sha256: {'cd' * 32}}}]",
         "two keys have the same name"),
        (f"keys: [{{name: a, sha256: {DIGEST}}}, {{name: b, sha256: {DIGEST}}}]",
         "two keys have the same secret"),
        ("keys: [" + f"{{name: a, sha256: {DIGEST}}}, " * 1025 + "]", "more than 1024 keys"),
        ("keys: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_and_never_shows_a_secret(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "short.key").write_text("secret")
    (tmp_path / "binary.key").write_bytes(b"\xff" * 40)
    (tmp_path / "large.key").write_bytes(b"x" * ((1 << 20) + 1))
    path = written(tmp_path, text)
    with pytest.raises(FailedPrecondition, match=why) as caught:
        read_keys(path, environ={})
    assert str(path) in caught.value.message
    assert SECRET not in caught.value.message


def test_a_keys_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"keys\.yaml cannot be read: No such file"):
        keys_of(Auth(keys=str(tmp_path / "keys.yaml")))


def test_changed_keys_take_effect_and_a_broken_file_keeps_the_last_good(tmp_path: Path) -> None:
    path = written(tmp_path, f"keys: [{{name: a, sha256: {DIGEST}, admin: true}}]")
    keys = keys_of(Auth(keys=str(path)))
    keys.poll()
    assert not keys.poll()

    path.write_text("keys: [")
    assert not keys.poll()
    assert "not YAML" in keys.error
    assert keys.value.check(headers(), Right.ADMIN) == "a"

    path.unlink()
    assert not keys.poll()
    assert "cannot be read" in keys.error
    assert keys.value.check(headers(), Right.ADMIN) == "a"

    written(tmp_path, f"keys: [{{name: b, sha256: {'ab' * 32}}}]")
    assert keys.poll()
    assert keys.error == ""
    with pytest.raises(Unauthenticated):
        keys.value.check(headers(), Right.ADMIN)


def test_a_secrets_own_file_is_watched_too(tmp_path: Path) -> None:
    secret = tmp_path / "a.key"
    secret.write_text(SECRET)
    keys = keys_of(
        Auth(keys=str(written(tmp_path, "keys: [{name: a, file: a.key, metrics: true}]")))
    )
    keys.poll()
    renamed = tmp_path / "new"
    renamed.write_text("another-secret-1234")
    os.replace(renamed, secret)
    assert keys.poll()
    assert keys.value.check(headers("another-secret-1234"), Right.METRICS) == "a"
    with pytest.raises(Unauthenticated):
        keys.value.check(headers(), Right.METRICS)


def test_open_metrics_are_the_declarations_to_say(tmp_path: Path) -> None:
    path = written(tmp_path, "keys: []")
    for is_open in (True, False):
        ring = keys_of(Auth(keys=str(path), open_metrics=is_open)).value
        assert is_open == may_scrape(ring)


def may_scrape(ring: Keyring) -> bool:
    try:
        ring.check({}, Right.METRICS)
    except Unauthenticated:
        return False
    return True


def test_a_key_by_hand_is_the_same_key(tmp_path: Path) -> None:
    path = written(tmp_path, f"keys: [{{name: a, sha256: {DIGEST.upper()}, metadata: [m]}}]")
    ring, _ = read_keys(path)
    by_hand = Keyring([Key(name="a", digest=digest_of(SECRET), metadata=("m",))])
    for each in (ring, by_hand):
        assert each.visible(headers(), ["m", "n"]) == {"m"}
