"""Measures how long a change on the wire takes to be a row in cache.db.

A daemon (dist/fabrik-daemon) follows a scripted API server over TLS. One change after another goes out on its watch,
each a new task of some run; another process asks SQLite all the time whether anything was committed, and notes when
it can read the change. The time counts from before the server writes the event to after the row was read.
Ends with 1 if a change took a second or more, or never came.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sqlite3
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path.insert(0, str(Path(__file__).parent.parent))

import fabrik_objects
from fakes import Access, Authority, ModelServer
from harness import Cluster, Daemon

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

ROOT: Final = Path(__file__).parent.parent.parent
RUNS: Final = 50
LIMIT_S: Final = 1.0
LOOK_S: Final = 0.0005
PATIENCE_S: Final = 30.0
TASKS: Final = (
    "SELECT seq, json_extract(row, '$.current_task') FROM changes WHERE seq > ? AND type LIKE 'run:%' ORDER BY seq"
)


def look(cache: str, changes: int, seen: Connection) -> None:
    """Be the reader: send when each change could be read, and how many commits there were."""
    connection = sqlite3.connect(f"file:{cache}?mode=ro", uri=True, isolation_level=None)
    last, version, commits = connection.execute("SELECT coalesce(max(seq), 0) FROM changes").fetchone()[0], -1, 0
    times: dict[int, float] = {}
    seen.send("ready")
    ends_at = time.monotonic() + PATIENCE_S
    while len(times) < changes and time.monotonic() < ends_at:
        now = connection.execute("PRAGMA data_version").fetchone()[0]
        if now == version:
            time.sleep(LOOK_S)
            continue
        version, commits = now, commits + 1
        rows = connection.execute(TASKS, (last,)).fetchall()
        at = time.monotonic()
        ends_at = at + PATIENCE_S
        for last, task in rows:  # noqa: B007 - the last one counts afterwards
            number = int(task.partition(":")[0]) if task else 0
            if number:
                times.setdefault(number, at)
    connection.close()
    seen.send((times, commits))


def measure(changes: int, per_second: float, python: str) -> dict[str, Any]:
    """Run daemon, server and reader, and return the figures."""
    server = ModelServer(Authority(), token="a-bearer-token")
    for number in range(RUNS):
        server.put("jobs", fabrik_objects.job(number))
        server.put("pods", fabrik_objects.pod(number, report=fabrik_objects.Report(task="0:impl")))
    with server, tempfile.TemporaryDirectory(prefix="fabrik-bench-") as folder:
        cluster = Cluster(server, access=Access(auth="token", ca="data"))
        daemon = Daemon(ROOT / "dist" / "fabrik-daemon", Path(folder) / "shiv", Path(folder), [cluster], timing={})
        daemon.python = python
        try:
            daemon.start()
            daemon.settle()
            sent, (seen, commits) = play(server, str(daemon.cache), changes, per_second)
            daemon.stop()
        finally:
            daemon.kill()
    if server.violations:
        raise SystemExit(f"the daemon asked for something else than GET: {server.violations}")
    took = sorted(seen[number] - at for number, at in sent.items() if number in seen)
    return {
        "changes": changes,
        "changes_per_second": round(changes / (sent[changes] - sent[1]), 1) if changes > 1 else None,
        "commits": commits,
        "missing": changes - len(took),
        "p50_ms": milliseconds(took, 0.5),
        "p99_ms": milliseconds(took, 0.99),
        "max_ms": milliseconds(took, 1.0),
    }


def play(
    server: ModelServer, cache: str, changes: int, per_second: float
) -> tuple[dict[int, float], tuple[dict[int, float], int]]:
    """Send the changes; return when each was sent, and what the reader saw."""
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    reader = processes.Process(target=look, args=(cache, changes, theirs))
    reader.start()
    ours.recv()
    sent: dict[int, float] = {}
    began = time.monotonic()
    for number in range(1, changes + 1):
        time.sleep(max(0.0, began + number / per_second - time.monotonic()))
        pod = fabrik_objects.pod(number % RUNS, report=fabrik_objects.Report(task=f"{number}:impl"))
        sent[number] = time.monotonic()
        server.put("pods", pod)
    seen: tuple[dict[int, float], int] = ours.recv()
    reader.join()
    return sent, seen


def milliseconds(took: list[float], share: float) -> float | None:
    """Return the time within which this share of the changes came."""
    return round(took[max(0, -int(-len(took) * share // 1) - 1)] * 1000, 1) if took else None


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=1000, metavar="N", help="how many changes (default: 1000)")
    parser.add_argument("--rate", type=float, default=200, metavar="N", help="changes a second (default: 200)")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the daemon (default: this one)")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="format (default: text)")
    arguments = parser.parse_args()
    figures = measure(arguments.changes, arguments.rate, arguments.python)
    if arguments.output == "json":
        print(json.dumps(figures, indent=2))
    else:
        print("{changes} changes at {changes_per_second}/s in {commits} commits, {missing} missing".format(**figures))
        print("wire to cache.db: p50 {p50_ms} ms, p99 {p99_ms} ms, max {max_ms} ms".format(**figures))
    return int(bool(figures["missing"]) or figures["max_ms"] >= LIMIT_S * 1000)


if __name__ == "__main__":
    sys.exit(main())
