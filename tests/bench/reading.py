"""Measures the daemon's own share of a list: one request on the socket with 10,000 runs known, until it is answered.

The daemon is the built executable; what it knows comes from a cache, and its one cluster does not answer, so that
nothing else is measured. Requests come one after the other on one connection, and each kind has its own percentiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from clients import LinesClient
from commands import build_cache, run_row
from hosts import Host

EXECUTABLE: Final = Path(__file__).parent.parent.parent / "dist" / "fabrik-daemon"
KUBECONFIG: Final = """
current-context: a
contexts: [{name: a, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: "http://127.0.0.1:9"}}]
users: [{name: u, user: {}}]
"""
REQUESTS: Final[dict[str, dict[str, Any]]] = {
    "runs, limit 50": {"action": "runs", "limit": 50},
    "runs, blocked, limit 50": {"action": "runs", "limit": 50, "filter": {"status": ["blocked"]}},
    "runs, by a column, limit 50": {"action": "runs", "limit": 50, "sortBy": "progress_finished", "reverse": True},
    "run": {"action": "run", "runId": ""},
}


def measure(python: str, rounds: int, runs: int) -> dict[str, Any]:
    """Return the percentiles of each kind of request, in milliseconds."""
    with tempfile.TemporaryDirectory(prefix="fb-") as folder:
        root = Path(folder)
        with Host(EXECUTABLE, root / "shiv", root / "host", ()) as host:
            host.python = python
            build_cache(host.cache, runs)
            (host.root / "kc").write_text(KUBECONFIG)
            clusters = [{"name": "test", "kubeconfig": str(host.root / "kc")}]
            (host.root / "config" / "clusters.yaml").write_text(json.dumps({"clusters": clusters}))
            host.launch()
            figures = {}
            with LinesClient(host.socket) as client:
                for name, request in REQUESTS.items():
                    asked = {key: value or run_row(runs // 2).run_id for key, value in request.items()}
                    took = []
                    for _ in range(rounds):
                        began = time.perf_counter()
                        client.ask(**asked)
                        took.append((time.perf_counter() - began) * 1000)
                    cuts = statistics.quantiles(took, n=100)
                    figures[name] = {"p50": cuts[49], "p99": cuts[98], "max": max(took)}
    return {"runs": runs, "rounds": rounds, "ms": figures}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000, metavar="N", help="requests of each kind (default: 1000)")
    parser.add_argument("--runs", type=int, default=10_000, metavar="N", help="runs that are known (default: 10000)")
    parser.add_argument("--python", default="/usr/bin/python3", help="the interpreter (default: /usr/bin/python3)")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="format (default: text)")
    arguments = parser.parse_args()
    figures = measure(arguments.python, arguments.rounds, arguments.runs)
    if arguments.output == "json":
        print(json.dumps(figures, indent=2))
        return 0
    print(f"{figures['runs']} runs, {figures['rounds']} requests each, milliseconds until the answer is read")
    for name, part in figures["ms"].items():
        print(f"  {name:<30}p50 {part['p50']:>7.2f}   p99 {part['p99']:>7.2f}   max {part['max']:>7.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
