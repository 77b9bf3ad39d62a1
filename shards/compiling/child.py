"""The compile process: a child of a device actor that may crash, hang or run out of memory.

It lowers its own priority below everything else on the machine, ends with its parent, and sets its
own limits, before it reads anything: then it tries units (`shards.compiling.trial`) until the
channel closes. It is started as ``python -m shards.compiling.child DESCRIPTOR PARENT``, never
forked from the actor: locks of JAX's threads would be copied as they happen to be.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from batching.errors import Code, ServingError
from shards.compiling.channel import Channel
from shards.compiling.last_place import take_the_last_place
from shards.compiling.messages import KEY_BYTES, Doing, Done, Refused, Settings, Trial

__all__ = ["end_with", "main"]

_PR_SET_PDEATHSIG: Final = 1
_MESSAGE_CHARACTERS_MAX: Final = 2048


def main(arguments: Sequence[str]) -> int:
    """Try units until the parent closes the channel.

    Args:
        arguments: the descriptor of the channel, and the parent's process id.
    """
    descriptor, parent = (int(argument) for argument in arguments)
    end_with(parent)
    sock = socket.socket(fileno=descriptor)
    key = sock.recv(KEY_BYTES, socket.MSG_WAITALL)
    if len(key) != KEY_BYTES:
        return 0
    channel = Channel(sock, key, is_parent=False)
    try:
        settings = channel.receive(Settings)
        take_the_last_place(settings.is_patient)
        _start_jax(settings)
        _limit_memory(settings.memory_bytes_max)
        channel.send(Done())
        while True:
            _serve(channel, settings, channel.receive(Trial))
            _forget()
    except (EOFError, BrokenPipeError):
        return 0


def _serve(channel: Channel, settings: Settings, trial: Trial) -> None:
    from shards.compiling.trial import try_unit

    def tell(step: str) -> None:
        _limit_time(settings.step_cpu_s_max)
        channel.send(Doing(step=step))

    try:
        for compiled in try_unit(trial, settings, tell):
            channel.send(compiled)
    except ServingError as error:
        channel.send(_refused(error.code, error.message))
    except MemoryError as error:
        text = f"it takes more memory than a trial may have: {error}"
        channel.send(_refused(Code.RESOURCE_EXHAUSTED, text))
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        channel.send(_refused(Code.UNAVAILABLE, f"it cannot be tried: {error}"))
    except Exception as error:
        text = f"it cannot be tried: {type(error).__name__}: {error}"
        channel.send(_refused(Code.FAILED_PRECONDITION, text))
    else:
        channel.send(Done())
    finally:
        _limit_time(None)


def _forget() -> None:
    """Give back what the trial took: nothing of one unit's programs is wanted for another's.

    Without it the process grows by some megabytes a trial for the first dozen.
    """
    import jax

    jax.clear_caches()  # type: ignore[no-untyped-call]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _refused(code: str, message: str) -> Refused:
    return Refused(code=str(code), message=message[:_MESSAGE_CHARACTERS_MAX])


def end_with(parent: int) -> None:
    """Have the kernel end this process when the parent's thread that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(0)


def _start_jax(settings: Settings) -> None:
    import jax

    values: dict[str, object] = {
        "jax_platforms": "cpu",
        "jax_enable_x64": settings.enable_x64,
        "jax_cpu_enable_async_dispatch": False,
    }
    for name, value in values.items():
        jax.config.update(name, value)  # type: ignore[no-untyped-call]
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", settings.device_count)  # type: ignore[no-untyped-call]
    jax.devices()
    # Imported now, while nobody waits.
    import shards.compiling.trial  # noqa: F401

    # What is here lives as long as this process: without this, looking for a trial's garbage
    # among it takes longer than many a trial (70 of 95 ms).
    gc.collect()
    gc.freeze()


def _limit_memory(bytes_max: int) -> None:
    """Bound what this process may allocate from here on. Files that it maps do not count."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmData:"))
    limit = int(line.split()[1]) * 1024 + bytes_max
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _limit_time(cpu_s: int | None) -> None:
    """Bound the processor time from here on; the kernel ends the process with SIGXCPU."""
    soft = resource.RLIM_INFINITY if cpu_s is None else int(time.process_time()) + 1 + cpu_s
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
