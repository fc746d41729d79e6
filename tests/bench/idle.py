"""Measures what a daemon costs that has nothing to do: quiet clusters, for a minute.

.venv/bin/python tests/bench/idle.py [--clusters N] [--runs N] [--seconds N] [-o json]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import uuid
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench.measuring import cpu_of, resident_mb, serving  # noqa: E402 - found through the path above
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clusters", type=int, default=5, metavar="N", help="how many (default: 5)")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="in each, with their pods (default: 20)")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="N", help="how long (default: 60)")
    parser.add_argument("--python", default=sys.executable, help="the daemon's interpreter (default: this one)")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="format (default: text)")
    arguments = parser.parse_args()
    figures = measure(arguments.clusters, arguments.runs, arguments.seconds, arguments.python)
    if arguments.output == "json":
        print(json.dumps(figures, indent=2))
    else:
        print("{clusters} clusters, {runs} runs: {cpu_percent} % of a core, {memory_mb} MB".format(**figures))


if __name__ == "__main__":
    main()
