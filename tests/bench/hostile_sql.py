#!/usr/bin/env python3
"""Measure how long changes take from the API server's wire to a subscriber while hostile SQL runs beside the daemon.

The rounds take turns, in one run, with one daemon: nothing beside it; processes that only burn processor time, which
tell what the machine itself makes of two more that are busy; the command `query`, again and again; and the daemon's own
`query` request. The SQL never ends, takes all memory it gets, is slow where nothing can interrupt it, or has an answer
of many megabytes. The figures are milliseconds, and ratios to the rounds with nothing beside.

    .venv/bin/python tests/bench/hostile_sql.py [--rounds 3] [--changes 400] [--rate 100] [--beside 2] [-o json]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from bench.stream_latency import note_what_is_sent, number_in, percentile  # noqa: E402
from clients import LinesClient  # noqa: E402 - found through the path above
from fabrik_objects import Report, job, pod  # noqa: E402
from fakes import Authority, ModelServer  # noqa: E402
from harness import Cluster  # noqa: E402
from hosts import Host  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RUNS: Final = 200
SETTLE_S: Final = 1.0  # until what runs beside is under way
NUMBERS: Final = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT "
HOSTILE: Final = (
    NUMBERS + "count(*) FROM n",
    NUMBERS + "i, printf('%.*c', 20000, 'x') AS long FROM n LIMIT 5000",
    "SELECT printf('%.*c', 9000000, 'a') LIKE '%' || printf('%.*c', 40000, 'a') || 'b'",
    NUMBERS + "i, i || '' AS a, i * 2 AS b, 'some words' AS c, i || 'x' AS d FROM n LIMIT 10000",
    "WITH RECURSIVE n(t) AS (SELECT 'xxxxxxxx' UNION ALL SELECT t || t FROM n) SELECT length(t) FROM n",
    NUMBERS + "count(DISTINCT printf('%.*c', 1000, 'x') || i) FROM n",
    "ATTACH 'mine.db' AS mine",
)


class Bench:
    """One daemon with a subscriber, and the changes that it is told."""

    def __init__(self, server: ModelServer, host: Host, subscriber: LinesClient) -> None:
        self.host = host
        self._server = server
        self._subscriber = subscriber
        self._sent = note_what_is_sent()
        self._last = 0  # number of a change

    def latencies(self, changes: int, rate: float) -> list[float]:
        """Make so many changes; return how long each took, in seconds."""
        numbers = range(self._last + 1, self._last + changes + 1)
        self._last = numbers[-1]
        changing = threading.Thread(target=self._change, args=(numbers, rate))
        changing.start()
        received: dict[int, float] = {}
        while len(received) < changes:
            line, now = self._subscriber.line(), time.perf_counter()
            number = number_in(line.replace(b'"', b'\\"'))
            if number is not None:
                received[number] = now
        changing.join()
        return [received[number] - self._sent.pop(number) for number in numbers]

    def _change(self, numbers: range, rate: float) -> None:
        begun_at = time.perf_counter()
        for place, number in enumerate(numbers):
            time.sleep(max(0.0, begun_at + place / rate - time.perf_counter()))
            report = Report(task=f"{number}:impl", finished=number, total=10**9)
            self._server.put("pods", pod(number % RUNS, report=report))


@contextlib.contextmanager
def made_bench() -> Iterator[Bench]:
    """Start a daemon that follows a server, and subscribe."""
    server = ModelServer(Authority())
    for number in range(RUNS):
        server.put("jobs", job(number))
        server.put("pods", pod(number, report=Report(finished=0, total=10**9)))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fabrik-bench-")))
        stack.enter_context(server)
        executable = ROOT / "dist" / "fabrik-daemon"
        host = stack.enter_context(Host(executable, folder / "shiv", folder / "host", [Cluster(server)]))
        host.start()
        host.settle()
        subscriber = stack.enter_context(LinesClient(host.socket, timeout_s=60))
        subscriber.ask("subscribe", clusters=["*"])
        yield Bench(server, host, subscriber)
        host.stop()


def burn(_host: Host, is_over: threading.Event) -> int:
    """Keep a processor busy."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        is_over.wait()
        process.kill()
    return 0


def by_command(host: Host, is_over: threading.Event) -> int:
    """Run one hostile query after the other by the command; return how many ended."""
    ended = 0
    for statement in itertools.cycle(HOSTILE):
        with host.popen("query", statement, "-o", "json") as process:
            reading = threading.Thread(target=process.communicate)
            reading.start()
            while process.poll() is None and not is_over.wait(0.01):
                pass
            process.kill()
            reading.join()
        if is_over.is_set():
            return ended
        ended += 1
    return ended


def by_request(host: Host, is_over: threading.Event) -> int:
    """Send one hostile query after the other to the daemon; return how many it answered."""
    answered = 0
    for statement in itertools.cycle(HOSTILE):
        with LinesClient(host.socket, timeout_s=60) as client:
            client.send(json.dumps({"action": "query", "sql": statement}).encode() + b"\n")
            client.line()
        answered += 1
        if is_over.is_set():
            return answered
    return answered


KINDS: Final[dict[str, Callable[[Host, threading.Event], int] | None]] = {
    "nothing": None,
    "burning": burn,
    "command": by_command,
    "request": by_request,
}


class Round(NamedTuple):
    """The latencies of one round, in seconds, and how many queries ended meanwhile."""

    latencies: list[float]
    queries: int


def measure(arguments: argparse.Namespace) -> dict[str, list[Round]]:
    """Return the rounds, by what ran beside."""
    found: dict[str, list[Round]] = {kind: [] for kind in KINDS}
    with made_bench() as bench:
        bench.latencies(arguments.changes, arguments.rate)  # the first ones grow memory
        for kind in list(KINDS) * arguments.rounds:
            found[kind].append(measure_round(bench, KINDS[kind], arguments))
    return found


def measure_round(
    bench: Bench, work: Callable[[Host, threading.Event], int] | None, options: argparse.Namespace
) -> Round:
    """Measure with so many threads beside that do some work until the round is over."""
    is_over, counts = threading.Event(), list[int]()

    def beside() -> None:
        if work is not None:
            counts.append(work(bench.host, is_over))

    threads = [threading.Thread(target=beside) for _ in range(options.beside)]
    for thread in threads:
        thread.start()
    time.sleep(SETTLE_S)
    latencies = bench.latencies(options.changes, options.rate)
    is_over.set()
    for thread in threads:
        thread.join()
    return Round(latencies, sum(counts))


def figures(found: dict[str, list[Round]]) -> list[dict[str, Any]]:
    """Return a row for each kind of company: milliseconds of its median round, and ratios to none."""

    def of(kind: str, share: float) -> float:
        return statistics.median(percentile(each.latencies, share) for each in found[kind])

    return [
        {
            "beside": kind,
            "queries": sum(each.queries for each in rounds),
            "p50_ms": round(1000 * of(kind, 0.5), 2),
            "p99_ms": round(1000 * of(kind, 0.99), 2),
            "p50_ratio": round(of(kind, 0.5) / of("nothing", 0.5), 2),
            "p99_ratio": round(of(kind, 0.99) / of("nothing", 0.99), 2),
        }
        for kind, rounds in found.items()
    ]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each kind (default: 3)")
    parser.add_argument("--changes", type=int, default=400, metavar="N", help="in each round (default: 400)")
    parser.add_argument("--rate", type=float, default=100, metavar="N", help="changes a second (default: 100)")
    parser.add_argument("--beside", type=int, default=2, metavar="N", help="queries at a time (default: 2)")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="format (default: table)")
    arguments = parser.parse_args()
    rows = figures(measure(arguments))
    if arguments.output == "json":
        load = round(os.getloadavg()[0], 2)
        print(json.dumps({"benchmark": "hostile_sql", "cpus": os.cpu_count(), "load": load, "rows": rows}, indent=2))
        return 0
    print("".join(f"{name:>11}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value!s:>11}" for value in row.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
