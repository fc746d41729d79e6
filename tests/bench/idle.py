"""Measures what a daemon costs that has nothing to do: quiet clusters, for a minute.

.venv/bin/python tests/bench/idle.py [--clusters 1,5] [--runs N] [--seconds N] [-o json]
"""

from __future__ import annotations

import sys
import time
import uuid
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench.measuring import cpu_of, options, resident_mb, serving, show  # noqa: E402 - found through the path above
from pod_server import Work  # noqa: E402


def measure(clusters: int, runs: int, seconds: float, python: str) -> dict[str, float]:
    """Return the share of a core in percent, and memory in MB."""
    works = [Work(runs, uid=str(uuid.uuid4())) for _ in range(clusters)]
    with serving(works, python) as (_, daemon):
        daemon.launch()
        daemon.wait_connected(*(f"c{number}" for number in range(clusters)))
        time.sleep(3.0)  # what a start leaves to do
        share = cpu_of(daemon.pid, seconds)
        return {
            "clusters": clusters,
            "runs": runs * clusters,
            "cpu_percent": round(share * 100, 3),
            "memory_mb": round(resident_mb(daemon.pid), 1),
        }


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--clusters", default="1,5", metavar="N,...", help="how many (default: 1,5)")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="in each, with their pods (default: 20)")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="N", help="how long (default: 60)")
    arguments = parser.parse_args()
    counts = map(int, arguments.clusters.split(","))
    rows = [measure(count, arguments.runs, arguments.seconds, arguments.python) for count in counts]
    show(rows, arguments.output)


if __name__ == "__main__":
    main()
