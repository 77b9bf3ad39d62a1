"""Status, metadata and the list."""

from __future__ import annotations

import json

from cluster.api import list_body, metadata_body, status_body
from cluster.api.describe import TENSORFLOW_DTYPES
from cluster.epochs import VersionStatus
from shards.manifest import SCHEMA, Created, Manifest
from shards.specs import DTYPES, Spec
from tests.cluster.api_support import signature


def test_status_lists_versions_descending_as_strings() -> None:
    statuses = [
        VersionStatus(servable="m", version=9, state="AVAILABLE"),
        VersionStatus(
            servable="m", version=10, state="END", error_code="DATA_LOSS", error_message='a "b"'
        ),
        VersionStatus(servable="m", version=1, state="UNLOADING"),
    ]
    assert json.loads(status_body(statuses)) == {
        "model_version_status": [
            {
                "version": "10",
                "state": "END",
                "status": {"error_code": "DATA_LOSS", "error_message": 'a "b"'},
            },
            {
                "version": "9",
                "state": "AVAILABLE",
                "status": {"error_code": "OK", "error_message": ""},
            },
            {
                "version": "1",
                "state": "UNLOADING",
                "status": {"error_code": "OK", "error_message": ""},
            },
        ]
    }


def test_the_list_groups_versions_by_servable() -> None:
    statuses = [
        VersionStatus(servable="b", version=1, state="AVAILABLE"),
        VersionStatus(servable="a", version=2, state="AVAILABLE"),
        VersionStatus(servable="b", version=3, state="LOADING"),
    ]
    assert json.loads(list_body(statuses)) == {
        "models": [
            {"name": "a", "versions": [{"version": "2", "state": "AVAILABLE"}]},
            {
                "name": "b",
                "versions": [
                    {"version": "3", "state": "LOADING"},
                    {"version": "1", "state": "AVAILABLE"},
                ],
            },
        ]
    }
    assert json.loads(list_body([])) == {"models": []}


def test_metadata_is_a_signature_def() -> None:
    manifest = Manifest(
        schema=SCHEMA,
        name="m",
        version=123,
        units={},
        signatures={
            "serving_default": signature(
                {"x": Spec(("b", 64)), "text": Spec(("b", "t"), "string")},
                {"scores": Spec(("b", 10), "bfloat16")},
                method="classify",
            )
        },
        created=Created(shardserve="0", jax="0", at="2026-01-01T00:00:00Z"),
    )
    assert json.loads(metadata_body(manifest)) == {
        "model_spec": {"name": "m", "signature_name": "", "version": "123"},
        "metadata": {
            "signature_def": {
                "signature_def": {
                    "serving_default": {
                        "inputs": {
                            "x": {
                                "dtype": "DT_FLOAT",
                                "tensor_shape": {
                                    "dim": [
                                        {"size": "-1", "name": "b"},
                                        {"size": "64", "name": ""},
                                    ],
                                    "unknown_rank": False,
                                },
                                "name": "x:0",
                            },
                            "text": {
                                "dtype": "DT_STRING",
                                "tensor_shape": {
                                    "dim": [
                                        {"size": "-1", "name": "b"},
                                        {"size": "-1", "name": "t"},
                                    ],
                                    "unknown_rank": False,
                                },
                                "name": "text:0",
                            },
                        },
                        "outputs": {
                            "scores": {
                                "dtype": "DT_BFLOAT16",
                                "tensor_shape": {
                                    "dim": [
                                        {"size": "-1", "name": "b"},
                                        {"size": "10", "name": ""},
                                    ],
                                    "unknown_rank": False,
                                },
                                "name": "scores:0",
                            }
                        },
                        "method_name": "tensorflow/serving/classify",
                    }
                }
            }
        },
    }


def test_every_dtype_has_a_tensorflow_name() -> None:
    assert set(TENSORFLOW_DTYPES) == set(DTYPES)
    assert len(set(TENSORFLOW_DTYPES.values())) == len(DTYPES)
