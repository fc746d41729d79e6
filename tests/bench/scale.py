"""Measures how cost grows with the work: initial sync and memory for more pods, and for more clusters.

`kubectl get pods -o json` lists the same pods from the same server, the two by turns.

    .venv/bin/python tests/bench/scale.py [--pods 1000,10000] [--clusters 1,10] [-o json]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench.measuring import cpu_s, resident_mb, serving  # noqa: E402 - found through the path above
from harness import wait_until  # noqa: E402
from pod_server import PodServer, Work  # noqa: E402

if TYPE_CHECKING:
    from links import LooseDaemon

PATIENCE_S: Final = 600.0


def sync_s(daemon: LooseDaemon, runs: int) -> tuple[float, float]:
    """Start a daemon with an empty cache; return how long until all its runs are rows there, and its processor time."""
    began = time.monotonic()
    daemon.launch()
    wait_until(lambda: rows_of(daemon) == runs, PATIENCE_S, f"{runs} runs with their pods are in the cache")
    return time.monotonic() - began, cpu_s(daemon.pid)


def rows_of(daemon: LooseDaemon) -> int:
    """Return how many runs the cache has whose Pod is known."""
    try:
        return int(daemon.rows("SELECT count(*) AS n FROM runs WHERE pod_name IS NOT NULL")[0]["n"])
    except (OSError, IndexError, AssertionError):
        return -1
    except Exception as error:  # noqa: BLE001 - sqlite3's, while the cache is being made
        return -2 if "no such table" in str(error) else -3


def kubectl_s(server: PodServer) -> float:
    """Return how long `kubectl get pods -o json` takes."""
    began = time.monotonic()
    command = ["kubectl", "--kubeconfig", str(server.path), "get", "pods", "-n", "fabrik-runs", "-o", "json"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - began


def measure(pods: int, clusters: int, rounds: int, python: str) -> dict[str, Any]:
    """Return the figures for so many pods, spread over so many clusters."""
    works = [Work(pods // clusters, uid=str(uuid.uuid4())) for _ in range(clusters)]
    with serving(works, python) as (servers, daemon):
        took, used, lists = [], [], []
        memory = 0.0
        for turn in range(rounds):
            if turn:
                daemon.crash()
                shutil.rmtree(daemon.cache.parent)
                daemon.cache.parent.mkdir(mode=0o700)
            seconds, cpu = sync_s(daemon, pods // clusters * clusters)
            took.append(seconds)
            used.append(cpu)
            memory = resident_mb(daemon.pid)
            if shutil.which("kubectl"):
                lists.append(sum(kubectl_s(server) for server in servers))
    figures: dict[str, Any] = {
        "pods": pods,
        "clusters": clusters,
        "sync_s": round(statistics.median(took), 2),
        "cpu_us_per_pod": round(statistics.median(used) / pods * 1e6, 1),
        "memory_mb": round(memory, 1),
    }
    if lists:
        figures["kubectl_s"] = round(statistics.median(lists), 2)
        figures["of_kubectl"] = round(statistics.median(took) / statistics.median(lists), 2)
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pods", default="1000,10000", metavar="N,N", help="how many (default: 1000,10000)")
    parser.add_argument("--clusters", default="1", metavar="N,N", help="over how many clusters (default: 1)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often each (default: 3)")
    parser.add_argument("--python", default=sys.executable, help="the daemon's interpreter (default: this one)")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="format (default: text)")
    arguments = parser.parse_args()
    counts = [int(word) for word in arguments.pods.split(",")]
    spread = [int(word) for word in arguments.clusters.split(",")]
    rows = [measure(pods, clusters, arguments.rounds, arguments.python) for pods in counts for clusters in spread]
    if arguments.output == "json":
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
