#!/usr/bin/env python3
"""Measure how long a change takes from the API server's wire to a subscriber on the daemon's Unix socket.

A model API server on loopback, over TLS, changes one Pod after the other at a steady rate; the time is taken right
before the bytes of a change are handed to TLS, and again when its event has been read from the socket. Both ends are
this process, the daemon is the built executable. The goal is a p99 under 10 ms.

    .venv/bin/python tests/bench/stream_latency.py [--changes 1000] [--rate 200] [--runs 100] [-o json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

import fakes_http  # noqa: E402 - found through the path above
from clients import LinesClient  # noqa: E402
from fabrik_objects import Report, job, pod  # noqa: E402
from fakes import Authority, ModelServer  # noqa: E402
from harness import Cluster  # noqa: E402
from hosts import Host  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

GOAL_S: Final = 0.010
WARM_UP: Final = 100  # changes before those that are measured: the first ones grow memory


def note_what_is_sent() -> dict[int, float]:
    """Have every exchange of a model server note when a change is about to be sent, by its number."""
    sent: dict[int, float] = {}
    send = fakes_http.Exchange.send_chunks

    def send_chunks(self: fakes_http.Exchange, chunks: Iterable[bytes]) -> None:
        listed = list(chunks)
        numbers = [number_in(chunk) for chunk in listed]
        now = time.perf_counter()
        sent.update((number, now) for number in numbers if number is not None)
        send(self, listed)

    fakes_http.Exchange.send_chunks = send_chunks  # type: ignore[method-assign]
    return sent


def number_in(chunk: bytes) -> int | None:
    """Return the number of the change in a chunk of a watch, None where there is none."""
    _, found, rest = chunk.partition(b'\\"finished\\":')
    return int(rest.partition(b",")[0]) if found else None


def change_all(server: ModelServer, arguments: argparse.Namespace) -> None:
    """Make the changes, one each `1 / rate` seconds, whatever becomes of those before."""
    begun_at = time.perf_counter()
    for number in range(1, arguments.changes + WARM_UP + 1):
        time.sleep(max(0.0, begun_at + number / arguments.rate - time.perf_counter()))
        report = Report(task=f"{number}:impl", finished=number, total=10**9)
        server.put("pods", pod(number % arguments.runs, report=report))


def measure(arguments: argparse.Namespace) -> list[float]:
    """Return each change's latency in seconds."""
    sent = note_what_is_sent()
    server = ModelServer(Authority())
    for number in range(arguments.runs):
        server.put("jobs", job(number))
        server.put("pods", pod(number, report=Report(finished=0, total=10**9)))
    executable = ROOT / "dist" / "fabrik-daemon"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fabrik-bench-")))
        stack.enter_context(server)
        host = stack.enter_context(Host(executable, folder / "shiv", folder / "host", [Cluster(server)]))
        host.start()
        host.settle()
        with LinesClient(host.socket, timeout_s=60) as subscriber:
            subscriber.ask("subscribe", clusters=["*"])
            changing = threading.Thread(target=change_all, args=(server, arguments))
            changing.start()
            received = read_all(subscriber, arguments.changes + WARM_UP)
            changing.join()
        host.stop()
    return [received[number] - sent[number] for number in sorted(received) if number > WARM_UP]


def read_all(subscriber: LinesClient, count: int) -> dict[int, float]:
    """Return when the event of each change was read, by its number."""
    received: dict[int, float] = {}
    while len(received) < count:
        line, now = subscriber.line(), time.perf_counter()
        number = number_in(line.replace(b'"', b'\\"'))
        assert number not in received, f"change {number} was told twice"
        if number is not None:
            received[number] = now
    return received


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is not below this share of them."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def figures(latencies: Sequence[float], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured, in milliseconds, and on what."""
    points = {"p50": percentile(latencies, 0.5), "p90": percentile(latencies, 0.9), "p99": percentile(latencies, 0.99)}
    return {
        "benchmark": "stream_latency",
        "changes": len(latencies),
        "rate_per_s": arguments.rate,
        "runs": arguments.runs,
        **{f"{name}_ms": round(value * 1000, 3) for name, value in points.items()},
        "max_ms": round(max(latencies) * 1000, 3),
        "goal_p99_ms": GOAL_S * 1000,
        "met": points["p99"] < GOAL_S,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
    }


def main() -> int:
    """Measure, print, and say with the exit code whether the goal was met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--changes", type=int, default=1000, metavar="N", help="how many (default: 1000)")
    parser.add_argument("--rate", type=float, default=200, metavar="N", help="changes a second (default: 200)")
    parser.add_argument("--runs", type=int, default=100, metavar="N", help="runs that they go round (default: 100)")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="format (default: table)")
    arguments = parser.parse_args()
    result = figures(measure(arguments), arguments)
    if arguments.output == "json":
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name:<14}{value}")
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
