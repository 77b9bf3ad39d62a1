"""A Ray of a bench's own, for contenders that are Ray actors. Imports it when it is asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Final

from bench.errors import ContenderFailed
from bench.report import ROOT

__all__ = ["own_ray"]

#: Ray reads these when its processes start. A worker would run at nice 15.
_ENVIRONMENT: Final = {
    "RAY_worker_niceness": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTHONPATH": str(ROOT),
}


@contextlib.contextmanager
def own_ray(processors: int, store_bytes: int) -> Iterator[Any]:
    """Start Ray, and end it with the context; yields the module.

    Args:
        processors: that it may give to actors.
        store_bytes: of its object store.

    Raises:
        ContenderFailed: it did not start.
    """
    kept = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        import ray

        try:
            ray.init(
                address="local",
                num_cpus=processors,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=store_bytes,
            )
        except Exception as error:  # of whatever kind, there is nothing to compare with
            raise ContenderFailed(f"Ray did not start: {error}") from error
        try:
            yield ray
        finally:
            ray.shutdown()
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
