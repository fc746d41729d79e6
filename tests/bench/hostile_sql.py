"""Measures how late changes are, from the API server's wire to a subscriber, while hostile SQL runs beside the daemon.

The rounds take turns, in one run, with one daemon: nothing beside it; processes that only burn processor time, which
tell what the machine itself makes of as many more that are busy; the command `query`, again and again; the daemon's own
`query` request. The SQL never ends, takes all the memory it gets, is slow where nothing can interrupt it, or has an
answer of many megabytes. Figures are those of the median round: milliseconds, and ratios to nothing beside.

    .venv/bin/python tests/bench/hostile_sql.py [--rounds 3] [--changes 300] [--rate 100] [--beside 2] [-o json]
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench.latency import to_subscriber  # noqa: E402 - found through the path above
from bench.measuring import followed, options, percentile, show  # noqa: E402
from clients import LinesClient  # noqa: E402

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from links import LooseDaemon

    Work = Callable[[LooseDaemon, threading.Event], int]

RUNS: Final = 200
PATIENCE_S: Final = 60.0
UNDER_WAY_S: Final = 1.0  # until what runs beside has begun
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


# ---------------------------------------------------------------- what runs beside


def burn(host: LooseDaemon, is_over: threading.Event) -> int:
    """Keep a processor busy."""
    with subprocess.Popen([host.python, "-c", "while True: pass"]) as process:
        is_over.wait()
        process.kill()
    return 0


def by_command(host: LooseDaemon, is_over: threading.Event) -> int:
    """Run one hostile query after the other by the command; return how many ended."""
    for ended, statement in enumerate(itertools.cycle(HOSTILE), 1):
        host.cli("query", statement, "-o", "json")
        if is_over.is_set():
            return ended
    raise AssertionError


def by_request(host: LooseDaemon, is_over: threading.Event) -> int:
    """Send one hostile query after the other to the daemon; return how many it answered."""
    for answered, statement in enumerate(itertools.cycle(HOSTILE), 1):
        with LinesClient(host.socket_path, PATIENCE_S) as client:
            client.request("query", sql=statement)
            client.line()
        if is_over.is_set():
            return answered
    raise AssertionError


BESIDE: Final[dict[str, Work | None]] = {
    "nothing": None,
    "burning": burn,
    "command": by_command,
    "request": by_request,
}


# ---------------------------------------------------------------- what comes of it


class Round(NamedTuple):
    """How late each change was, in seconds, and how many queries ended meanwhile."""

    late: list[float]
    queries: int


def measure_round(host: LooseDaemon, work: Work | None, late: Callable[[], list[float]], beside: int) -> Round:
    """Measure while so many threads do some work."""
    is_over, counts = threading.Event(), list[int]()

    def go_on() -> None:
        if work is not None:
            counts.append(work(host, is_over))

    threads = [threading.Thread(target=go_on) for _ in range(beside)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(UNDER_WAY_S)
        found = late()
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    return Round(found, sum(counts))


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each kind of company."""
    rounds: dict[str, list[Round]] = {kind: [] for kind in BESIDE}
    with followed(RUNS, arguments.rate, arguments.python) as (server, host):

        def late() -> list[float]:
            return to_subscriber(host.socket_path, server, arguments.changes)

        late()  # the first ones grow memory
        for kind in list(BESIDE) * arguments.rounds:
            rounds[kind].append(measure_round(host, BESIDE[kind], late, arguments.beside))

    def median_ms(kind: str, share: float) -> float:
        return 1000 * float(statistics.median(percentile(each.late, share) for each in rounds[kind]))

    return [
        {
            "beside": kind,
            "queries": sum(each.queries for each in rounds[kind]),
            "p50_ms": round(median_ms(kind, 0.5), 2),
            "p99_ms": round(median_ms(kind, 0.99), 2),
            "p50_ratio": round(median_ms(kind, 0.5) / median_ms("nothing", 0.5), 2),
            "p99_ratio": round(median_ms(kind, 0.99) / median_ms("nothing", 0.99), 2),
        }
        for kind in BESIDE
    ]


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each kind (default: 3)")
    parser.add_argument("--changes", type=int, default=300, metavar="N", help="in each round (default: 300)")
    parser.add_argument("--rate", type=float, default=100, metavar="N", help="changes a second (default: 100)")
    parser.add_argument("--beside", type=int, default=2, metavar="N", help="queries at a time (default: 2)")
    arguments = parser.parse_args()
    show(measure(arguments), arguments.output)


if __name__ == "__main__":
    main()
