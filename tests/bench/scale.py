"""Measures how cost grows with the work: initial sync, memory and cost of a change for more pods and more clusters.

`kubectl get pods -o json` lists the same pods from the same server, right after the daemon. What is to be seen in the
figures per pod and per change is that they stay flat.

    .venv/bin/python tests/bench/scale.py [--sizes 1000x1,10000x1,50000x1,10000x10,10000x50] [--events N] [-o json]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench.measuring import (  # noqa: E402 - found through the path above
    cpu_s,
    kubectl,
    options,
    resident_mb,
    serving,
    show,
)
from harness import wait_until  # noqa: E402
from pod_server import PodServer, Work  # noqa: E402

if TYPE_CHECKING:
    from links import LooseDaemon

PATIENCE_S: Final = 300.0
KUBECTL_PODS: Final = 10_000  # it takes a millisecond and more for each
SETTLE_S: Final = 2.0  # what a start leaves to do


def sync_s(daemon: LooseDaemon, runs: int) -> tuple[float, float]:
    """Start a daemon with an empty cache; return how long until all its runs are rows there, and its processor time."""
    began = time.monotonic()
    daemon.launch()
    wait_until(
        lambda: count(daemon, "pod_name IS NOT NULL") == runs, PATIENCE_S, f"{runs} runs with their pods are cached"
    )
    return time.monotonic() - began, cpu_s(daemon.pid)


def count(daemon: LooseDaemon, condition: str) -> int:
    """Return how many runs the cache has for which this holds."""
    return int(daemon.rows(f"SELECT count(*) AS n FROM runs WHERE {condition}")[0]["n"])  # noqa: S608 - ours


def changes_s(daemon: LooseDaemon, servers: list[PodServer]) -> float:
    """Have the servers send their changes; return the processor time until the last ones are in the cache."""
    assert all(server.is_watched(PATIENCE_S) for server in servers)
    time.sleep(SETTLE_S)
    before = cpu_s(daemon.pid)
    for server in servers:
        server.go()
    wait_until(
        lambda: count(daemon, "current_task = 'last'") == len(servers), PATIENCE_S, "the last changes are in the cache"
    )
    return cpu_s(daemon.pid) - before


def kubectl_s(program: str, server: PodServer) -> float:
    """Return how long `kubectl get pods -o json` takes."""
    environment = {**os.environ, "HOME": str(server.path.parent), "KUBECONFIG": str(server.path)}
    began = time.monotonic()
    command = [program, "get", "pods", "-n", "fabrik-runs", "-o", "json"]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - began


def measure(pods: int, clusters: int, events: int, python: str) -> dict[str, Any]:
    """Return the figures for so many pods and changes, spread over so many clusters."""
    runs, each = pods // clusters, max(1, events // clusters)
    works = [Work(runs, each, uid=str(uuid.uuid4())) for _ in range(clusters)]
    program = kubectl()
    with serving(works, python) as (servers, daemon):
        took, used = sync_s(daemon, runs * clusters)
        memory = resident_mb(daemon.pid)
        changes = changes_s(daemon, servers)
        listed = kubectl_s(program, servers[0]) if program and clusters == 1 and pods <= KUBECTL_PODS else None
    figures: dict[str, Any] = {
        "pods": runs * clusters,
        "clusters": clusters,
        "sync_s": round(took, 2),
        "sync_us_per_pod": round(used / runs / clusters * 1e6, 1),
        "cpu_us_per_change": round(changes / each / clusters * 1e6, 1),
        "memory_mb": round(memory, 1),
    }
    if listed:
        figures["kubectl_s"] = round(listed, 2)
        figures["of_kubectl"] = round(took / listed, 2)
    return figures


def main() -> None:
    """Measure and print."""
    sizes = "1000x1,10000x1,50000x1,10000x10,10000x50"
    parser = options(__doc__)
    parser.add_argument("--sizes", default=sizes, metavar="PODSxCLUSTERS,...", help=f"(default: {sizes})")
    parser.add_argument("--events", type=int, default=10_000, metavar="N", help="changes after it (default: 10000)")
    arguments = parser.parse_args()
    pairs = [size.split("x") for size in arguments.sizes.split(",")]
    rows = [measure(int(pods), int(clusters), arguments.events, arguments.python) for pods, clusters in pairs]
    show(rows, arguments.output)


if __name__ == "__main__":
    main()
