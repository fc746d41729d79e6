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

from bench.measuring import (  # noqa: E402 - found through the path above
    TOKEN,
    WARM_UP,
    Changes,
    bounded,
    followed,
    kubectl,
    model,
    note_what_is_sent,
    options,
    percentiles_ms,
    show,
)
from clients import LinesClient  # noqa: E402
from harness import wait_until  # noqa: E402

if TYPE_CHECKING:
    import argparse
    from multiprocessing.connection import Connection

    Times = dict[int, float]  # when a change was seen, by its number

LOOK_S: Final = 0.0005
PATIENCE_S: Final = 60.0
NUMBER: Final = re.compile(rb'"finished":(\d+)')
TASKS: Final = (
    "SELECT seq, json_extract(row, '$.current_task') FROM changes WHERE seq > ? AND type LIKE 'run:%' ORDER BY seq"
)


# ---------------------------------------------------------------- who sees them


def at_subscriber(socket: Path, changes: Changes, count: int) -> Times:
    """Return when a subscriber had read each change."""
    seen: Times = {}
    with LinesClient(socket, PATIENCE_S) as subscriber:
        subscriber.ask("subscribe", clusters=["*"])
        with changes.being_made(count) as numbers:
            while numbers[-1] not in seen:
                line, now = subscriber.line(), time.perf_counter()
                for number in map(int, NUMBER.findall(line)[:1]):
                    assert number not in seen, f"change {number} was told twice"
                    seen[number] = now
    return {number: at for number, at in seen.items() if number in numbers}


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
        at = time.perf_counter()
        for position, task in rows:  # noqa: B007 - the last one counts afterwards
            times.setdefault(int(task.partition(":")[0]), at)
    connection.close()
    seen.send(times)


def in_cache(cache: Path, changes: Changes, count: int) -> Times:
    """Return when each change could be read in the cache by another process."""
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    reader = processes.Process(target=look, args=(str(cache), changes.made + WARM_UP + count, theirs))
    reader.start()
    assert ours.recv() == "ready"
    with changes.being_made(count) as numbers:
        pass
    seen: Times = ours.recv()
    reader.join()
    return {number: at for number, at in seen.items() if number in numbers}


def at_kubectl(program: str, runs: int, rate: float, count: int) -> Times:
    """Return when each change of a server was a line of kubectl's stdout; the n-th such line is the n-th change."""
    seen: Times = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fabrik-bench-")))
        server = stack.enter_context(model(runs))
        changes = Changes(server, runs, rate)
        command = [program, "get", "pods", "-n", "fabrik-runs", "--watch", "--output-watch-events"]
        environment = {
            **os.environ,
            "HOME": str(folder),
            "KUBECONFIG": str(server.kubeconfig(folder / "config", TOKEN)),
        }
        process = stack.enter_context(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
        stack.enter_context(bounded(process, PATIENCE_S))
        assert process.stdout
        wait_until(lambda: server.watches, PATIENCE_S, "kubectl watches")
        number = 0
        with changes.being_made(count) as numbers:
            for line in process.stdout:
                now = time.perf_counter()
                number += line.startswith(b"MODIFIED")
                seen.setdefault(number, now)
                if number == numbers[-1]:
                    break
    return {number: at for number, at in seen.items() if number in numbers}


# ---------------------------------------------------------------- what comes of it


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the percentiles of each, in milliseconds."""
    sent = note_what_is_sent()
    program = kubectl()
    late: dict[str, list[float]] = {"subscriber": [], "cache": [], "kubectl": []}

    def add(wire_to: str, seen: Times, count: int) -> None:
        assert len(seen) == count, f"{wire_to}: {count - len(seen)} changes of {count} were never seen"
        late[wire_to] += [at - sent[number] for number, at in seen.items()]

    with followed(arguments.runs, arguments.python) as (server, host):
        changes = Changes(server, arguments.runs, arguments.rate)
        each = max(1, arguments.changes // arguments.turns)
        for _ in range(arguments.turns):
            add("subscriber", at_subscriber(host.socket, changes, each), each)
            if program:
                add("kubectl", at_kubectl(program, arguments.runs, arguments.rate, each), each)
        add("cache", in_cache(host.cache, changes, arguments.cached), arguments.cached)
    shares = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
    return [
        {"wire_to": name, "changes": len(times), **percentiles_ms(times, **shares)}
        for name, times in late.items()
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
