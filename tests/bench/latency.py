"""Measures how late a change is: from the API server's wire to a subscriber, to a row in cache.db, and to kubectl.

A model API server on loopback, over TLS, changes one Pod after the other at a steady rate. The time counts from right
before the bytes of a change are handed to TLS until its event was read from the daemon's socket, until another process
could read it in SQLite, or until the line of `kubectl get -w --output-watch-events` was read from its stdout: by turns
in one run, by one clock. The daemon is the built executable.

    .venv/bin/python tests/bench/latency.py [--changes 1000] [--cached 2000] [--rate 200] [-o json]
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench.changing import WARM_UP, ChangingServer  # noqa: E402 - found through the path above
from bench.measuring import bounded, followed, kubectl, options, percentiles_ms, show  # noqa: E402
from clients import LinesClient  # noqa: E402

if TYPE_CHECKING:
    import argparse
    from multiprocessing.connection import Connection

    Times = dict[int, float]  # when each change was seen, by its number

LOOK_S: Final = 0.0005
PATIENCE_S: Final = 60.0
NUMBER: Final = re.compile(rb'"finished":(\d+)')
TASKS: Final = (
    "SELECT seq, json_extract(row, '$.current_task') FROM changes WHERE seq > ? AND type LIKE 'run:%' ORDER BY seq"
)


# ---------------------------------------------------------------- who sees them


def late(server: ChangingServer, numbers: range, seen: Times) -> list[float]:
    """Return how long each of these changes took, in seconds; each must have been seen."""
    missing = [number for number in numbers if number not in seen]
    assert not missing, f"{len(missing)} changes of {len(numbers)} were never seen"
    return [seen[number] - server.sent[number] for number in numbers]


def to_subscriber(socket: Path, server: ChangingServer, count: int) -> list[float]:
    """Return how long changes take until a subscriber has read them."""
    seen: Times = {}
    with LinesClient(socket, PATIENCE_S) as subscriber:
        subscriber.ask("subscribe", clusters=["*"])
        with server.changes(count) as numbers:
            while numbers[-1] not in seen:
                line, now = subscriber.line(), time.monotonic()
                assert line, "the daemon hung up"
                for number in map(int, NUMBER.findall(line)[:1]):
                    assert number not in seen, f"change {number} was told twice"
                    seen[number] = now
    return late(server, numbers, seen)


def look(cache: str, last: int, seen: Connection) -> None:
    """Ask SQLite all the time whether anything was committed; send when each change could be read."""
    connection = sqlite3.connect(f"file:{cache}?mode=ro", uri=True, isolation_level=None)
    position, version = connection.execute("SELECT coalesce(max(seq), 0) FROM changes").fetchone()[0], -1
    times: Times = {}
    seen.send("ready")
    ends_at = time.monotonic() + PATIENCE_S
    while last not in times and time.monotonic() < ends_at:
        now = connection.execute("PRAGMA data_version").fetchone()[0]
        if now == version:
            time.sleep(LOOK_S)
            continue
        version = now
        rows = connection.execute(TASKS, (position,)).fetchall()
        at = time.monotonic()
        for position, task in rows:  # noqa: B007 - the last one counts afterwards
            times.setdefault(int(task.partition(":")[0]), at)
    connection.close()
    seen.send(times)


def to_cache(cache: Path, server: ChangingServer, count: int) -> list[float]:
    """Return how long changes take until another process can read them in the cache."""
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    reader = processes.Process(target=look, args=(str(cache), server.made + WARM_UP + count, theirs))
    reader.start()
    assert ours.recv() == "ready"
    with server.changes(count) as numbers:
        pass
    seen: Times = ours.recv()
    reader.join()
    return late(server, numbers, seen)


def to_kubectl(program: str, runs: int, rate: float, count: int) -> list[float]:
    """Return how long changes take to be lines of kubectl's stdout; the n-th such line is the n-th change."""
    seen: Times = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fabrik-bench-")))
        server = stack.enter_context(ChangingServer(runs, rate, folder))
        command = [program, "get", "pods", "-n", "fabrik-runs", "--watch", "--output-watch-events"]
        environment = {**os.environ, "HOME": str(folder), "KUBECONFIG": str(server.path)}
        process = stack.enter_context(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
        stack.enter_context(bounded(process, PATIENCE_S))
        assert process.stdout
        with server.changes(count) as numbers:
            for line in process.stdout:
                now = time.monotonic()
                if line.startswith(b"MODIFIED"):
                    seen[len(seen) + 1] = now
                if numbers[-1] in seen:
                    break
    return late(server, numbers, seen)


# ---------------------------------------------------------------- what comes of it


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the percentiles of each, in milliseconds."""
    program = kubectl()
    told, shown = [], []
    with followed(arguments.runs, arguments.rate, arguments.python) as (server, daemon):
        each = max(1, arguments.changes // arguments.turns)
        for _ in range(arguments.turns):
            told += to_subscriber(daemon.socket_path, server, each)
            shown += to_kubectl(program, arguments.runs, arguments.rate, each) if program else []
        cached = to_cache(daemon.cache, server, arguments.cached)
    shares = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
    return [
        {"wire_to": name, "changes": len(times), **percentiles_ms(times, **shares)}
        for name, times in (("subscriber", told), ("cache", cached), ("kubectl", shown))
        if times
    ]


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--changes", type=int, default=1000, metavar="N", help="as they are told (default: 1000)")
    parser.add_argument(
        "--turns", type=int, default=4, metavar="N", help="that subscriber and kubectl take (default: 4)"
    )
    parser.add_argument("--cached", type=int, default=2000, metavar="N", help="as they are cached (default: 2000)")
    parser.add_argument("--rate", type=float, default=200, metavar="N", help="changes a second (default: 200)")
    parser.add_argument("--runs", type=int, default=100, metavar="N", help="runs that they go round (default: 100)")
    arguments = parser.parse_args()
    show(measure(arguments), arguments.output)


if __name__ == "__main__":
    main()
