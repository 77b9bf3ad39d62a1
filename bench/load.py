"""Load on an HTTP server: what is sent, what came of it, and the two tools that send it.

`closed_loop` keeps a number of connections busy, with wrk where it is installed and our own
generator where it is not; `open_loop` sends at instants that were drawn beforehand and counts
latency from those, so that a server that stalls is charged for everyone who waited. Both are
deaf to what an answer says beyond its status, unless a check is given.

wrk does not count requests that it never gets an answer for: a benchmark that must know of every
one uses `own_closed_loop` or `open_loop`.

Warm-up is a run of its own whose outcome is dropped. This file does not know what is served.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import uvloop

from bench.errors import LoadFailed, ToolMissing
from bench.generator import Check, Drive
from bench.stats import Histogram

__all__ = [
    "TIMEOUT_S",
    "Outcome",
    "Request",
    "closed_loop",
    "open_loop",
    "own_closed_loop",
    "parse_wrk",
    "poisson_arrivals",
    "run_wrk",
    "tool",
]

_WRK_MARK: Final = "shardserve-wrk"
#: After how long a request is given up, counted from its intended arrival.
TIMEOUT_S: Final = 5.0
#: What wrk is given beyond its duration before it is taken for dead.
_WRK_GRACE_S: Final = 30.0

# wrk's own text rounds percentiles and folds statuses away; this prints every latency it has.
_WRK_REPORT: Final = f"""
local ffi = require("ffi")
ffi.cdef("typedef struct {{ uint64_t count, limit, min, max; uint64_t data[]; }} shardserve_stats;")

done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("{_WRK_MARK} %d %d %d %d %d %d %d\\n", summary.requests,
    summary.duration, e.connect, e.read, e.write, e.timeout, e.status))
  -- Its own iterator begins at the minimum again at each step: after a stall of a second it
  -- would take longer than the run. This is the histogram that it iterates over.
  local s = ffi.cast("shardserve_stats **", latency)[0]
  if s.count > 0 then
    for microseconds = tonumber(s.min), tonumber(s.max) do
      local count = tonumber(s.data[microseconds])
      if count > 0 then
        io.write(string.format("{_WRK_MARK}-latency %d %d\\n", microseconds, count))
      end
    end
  end
end
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One HTTP request.

    Attributes:
        path: with the leading slash.
        body: may be empty.
        method: an HTTP method.
        content_type: of the body.
        headers: other ones, by name.
    """

    path: str
    body: bytes
    method: str = "POST"
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    def wire(self, host: str, headers: Mapping[str, str] | None = None) -> bytes:
        """The request as HTTP/1.1 sends it, with these headers added."""
        more = "".join(
            f"{name}: {value}\r\n" for name, value in {**self.headers, **(headers or {})}.items()
        )
        head = (
            f"{self.method} {self.path} HTTP/1.1\r\nHost: {host}\r\n{more}"
            f"Content-Type: {self.content_type}\r\nContent-Length: {len(self.body)}\r\n\r\n"
        )
        return head.encode() + self.body


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What came of a load.

    Attributes:
        answered: requests that were answered well: a status below 400 and, where there was a
            check, one that the answer passed.
        elapsed_s: how long the load lasted.
        latency_us: of every answer (of wrk: bad statuses too), from its intended arrival.
        errors: kind to number: connect, read, write, timeout, status, wrong; all are there.
        lag_us: how late the generator itself was, in an open loop; else None.
    """

    answered: int
    elapsed_s: float
    latency_us: Histogram
    errors: Mapping[str, int]
    lag_us: Histogram | None = None

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return self.answered / self.elapsed_s

    @property
    def failed(self) -> int:
        """Requests that were not answered well, and connections that could not be made."""
        return sum(self.errors.values())

    def must_be_clean(self, what: str, *, failed_share_max: float = 0.001) -> None:
        """Refuse to go on with an outcome that measured errors more than answers.

        Raises:
            LoadFailed: nothing was answered, or more than this share failed.
        """
        attempted = self.answered + self.failed
        if not self.answered or self.failed > failed_share_max * attempted:
            kinds = ", ".join(f"{kind} {n}" for kind, n in self.errors.items() if n) or "none"
            raise LoadFailed(f"{what}: {self.answered} answered well; errors: {kinds}")


def tool() -> str:
    """What `closed_loop` uses here: ``wrk``, or ``own``."""
    return "wrk" if shutil.which("wrk") else "own"


def closed_loop(
    url: str, requests: Sequence[Request], *, connections: int, duration_s: float
) -> Outcome:
    """Keep ``connections`` busy for a while, each with one request at a time.

    Args:
        url: scheme, host and port.
        requests: sent in turn.
        connections: how many.
        duration_s: for how long; wrk measures whole seconds, so it is rounded up there.

    Raises:
        LoadFailed: the tool could not run at all; requests that fail are counted.
    """
    run = run_wrk if tool() == "wrk" else own_closed_loop
    return run(url, requests, connections=connections, duration_s=duration_s)


def run_wrk(
    url: str, requests: Sequence[Request], *, connections: int, duration_s: float
) -> Outcome:
    """`closed_loop` by ``wrk -t1``.

    Raises:
        ToolMissing: wrk is not installed.
        LoadFailed: wrk failed, or could not connect.
    """
    if shutil.which("wrk") is None:
        raise ToolMissing("wrk is not installed: apt-get install wrk")
    seconds = max(1, int(np.ceil(duration_s)))
    with tempfile.TemporaryDirectory(prefix="shardserve-wrk-") as folder:
        script = _write_wrk_script(Path(folder), requests)
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script)]
        command += ["--timeout", f"{TIMEOUT_S:g}s", url]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds + _WRK_GRACE_S
            )
        except subprocess.TimeoutExpired as error:
            raise LoadFailed(f"wrk on {url} did not end") from error
    if done.returncode:
        raise LoadFailed(f"wrk on {url}: {(done.stderr or done.stdout).strip()}")
    return parse_wrk(done.stdout, connections=connections)


def parse_wrk(text: str, *, connections: int) -> Outcome:
    """The outcome in what our wrk script printed.

    Args:
        text: standard output.
        connections: what wrk was given.

    Raises:
        LoadFailed: the script's lines are not there, or do not add up.
    """
    head: list[int] = []
    latencies: list[tuple[int, int]] = []
    for line in text.splitlines():
        match line.split():
            case [word, *numbers] if word == _WRK_MARK:
                head = [int(number) for number in numbers]
            case [word, microseconds, count] if word == f"{_WRK_MARK}-latency":
                latencies.append((int(microseconds), int(count)))
    if not head:
        raise LoadFailed(f"wrk printed no summary:\n{text}")
    total, microseconds_spent, connect, read, write, timeout, status = head
    pairs = np.asarray(latencies, np.int64).reshape(-1, 2)
    values, counts = pairs[:, 0], pairs[:, 1]
    if total >= connections:
        counts = _measured(values, counts, interval=microseconds_spent // (total // connections))
    # An answer that comes after the timeout is complete, but its latency is not recorded.
    if np.any(counts < 0) or counts.sum() != total - timeout:
        raise LoadFailed(f"wrk counted {total} answers and {counts.sum()} latencies")
    return Outcome(
        answered=total - status - timeout,
        elapsed_s=microseconds_spent / 1e6,
        latency_us=Histogram(
            values=values[counts > 0].astype(np.float64), counts=counts[counts > 0]
        ),
        errors={
            "connect": connect,
            "read": read,
            "write": write,
            "timeout": timeout,
            "status": status,
            "wrong": 0,
        },
    )


def _measured(
    values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], *, interval: int
) -> npt.NDArray[np.int64]:
    """The counts without the samples that wrk made up.

    wrk takes a closed loop for an open one whose rate is what it reached: for every latency of
    ``n`` over twice the mean interval of a connection, it adds latencies of ``n`` less one
    interval, less two, and so on, as long as they exceed the interval. So the samples added at
    one value are those that are now one interval above it, and can be taken away again.
    """
    above = np.searchsorted(values, values + interval)
    above_is_there = above < values.size
    above_is_there[above_is_there] = values[above[above_is_there]] == (
        values[above_is_there] + interval
    )
    added = np.zeros_like(counts)
    added[above_is_there] = counts[above[above_is_there]]
    return counts - np.where(values > interval, added, 0)


def own_closed_loop(
    url: str,
    requests: Sequence[Request],
    *,
    connections: int,
    duration_s: float,
    check: Check | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Outcome:
    """`closed_loop` by our own generator, which can also check what answers say.

    Args:
        url: scheme, host and port.
        requests: sent in turn.
        connections: how many.
        duration_s: for how long.
        check: whether the body that answers the request of this index is right.
        timeout_s: after how long a request is given up.

    Raises:
        LoadFailed: no connection could be made.
    """
    return _drive(
        url, requests, connections, check, timeout_s, duration_s=duration_s, arrivals=None
    )


def open_loop(
    url: str,
    requests: Sequence[Request],
    *,
    arrivals_s: npt.NDArray[np.float64],
    connections: int,
    check: Check | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Outcome:
    """Send at given instants, whatever has become of the requests before.

    Latency counts from the intended arrival. Where every connection is busy, a request waits for
    one, and its waiting counts.

    Args:
        url: scheme, host and port.
        requests: sent in turn.
        arrivals_s: seconds after the start, ascending; drawn beforehand, as by
            `poisson_arrivals`.
        connections: the most that are open.
        check: whether the body that answers the request of this index is right.
        timeout_s: after how long a request is given up.

    Raises:
        LoadFailed: no connection could be made.
    """
    if arrivals_s.size == 0 or np.any(np.diff(arrivals_s) < 0) or arrivals_s[0] < 0:
        raise ValueError("arrivals must ascend from 0, and be at least one")
    return _drive(
        url,
        requests,
        connections,
        check,
        timeout_s,
        duration_s=float(arrivals_s[-1]),
        arrivals=arrivals_s,
    )


def poisson_arrivals(rate: float, duration_s: float, *, seed: int) -> npt.NDArray[np.float64]:
    """Instants of a Poisson process, in seconds after its start."""
    generator = np.random.default_rng(seed)
    # The count is Poisson and, given the count, the instants are uniform: no tail to redraw.
    count = int(generator.poisson(rate * duration_s))
    return np.sort(generator.uniform(0.0, duration_s, count))


def _drive(
    url: str,
    requests: Sequence[Request],
    connections: int,
    check: Check | None,
    timeout_s: float,
    *,
    duration_s: float,
    arrivals: npt.NDArray[np.float64] | None,
) -> Outcome:
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    wires = [request.wire(f"{host}:{port}") for request in requests]

    async def run() -> Outcome:
        drive = Drive(
            (host, port),
            wires,
            connections=connections,
            duration_s=duration_s,
            arrivals_s=arrivals,
            timeout_s=timeout_s,
            check=check,
        )
        elapsed_s = await drive.run()
        return Outcome(
            answered=len(drive.latencies_ns),
            elapsed_s=elapsed_s,
            latency_us=Histogram.of(np.asarray(drive.latencies_ns) / 1e3),
            errors=dict(drive.errors),
            lag_us=None if arrivals is None else Histogram.of(np.asarray(drive.lags_ns) / 1e3),
        )

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def _write_wrk_script(folder: Path, requests: Sequence[Request]) -> Path:
    """A Lua script that sends the requests in turn; bodies go by file, so they need no quoting."""
    lines = [
        "local function slurp(path)",
        '  local file = assert(io.open(path, "rb"))',
        '  local text = file:read("*a")',
        "  file:close()",
        "  return text",
        "end",
    ]
    for index, request in enumerate(requests):
        body = folder / f"body{index}"
        body.write_bytes(request.body)
        lines += [
            f"local method{index}, path{index} = {_lua(request.method)}, {_lua(request.path)}",
            f"local headers{index} = {{{_lua_headers(request)}}}",
            f"local body{index} = slurp({_lua(str(body))})",
        ]
    if len(requests) == 1:
        # Without a request() wrk formats the request once, and Lua is out of the way.
        lines += [
            "wrk.method, wrk.path, wrk.body = method0, path0, body0",
            "for name, value in pairs(headers0) do wrk.headers[name] = value end",
        ]
    else:
        indices = range(len(requests))
        wires = (f"wrk.format(method{i}, path{i}, headers{i}, body{i})" for i in indices)
        lines += [
            "local wires, turn = {}, 0",
            # Not before init: only then does wrk know its Host header.
            "init = function(arguments)",
            f"  wires = {{{', '.join(wires)}}}",
            "end",
            "request = function()",
            "  turn = turn % #wires + 1",
            "  return wires[turn]",
            "end",
        ]
    script = folder / "load.lua"
    script.write_text("\n".join(lines) + _WRK_REPORT)
    return script


def _lua_headers(request: Request) -> str:
    """Entries of a Lua table."""
    headers = {"Content-Type": request.content_type, **request.headers}
    return ", ".join(f"[{_lua(name)}] = {_lua(value)}" for name, value in headers.items())


def _lua(text: str) -> str:
    """A Lua string literal."""
    # Every byte by its number: nothing to escape, and nothing that Lua could read otherwise.
    return "'" + "".join(f"\\{byte:03d}" for byte in text.encode()) + "'"
