"""Runs the benchmarks and holds their figures against what they must reach, as ratios of one run.

    .venv/bin/python tests/bench/run.py [ingest|latency|fanout|cli|scale|idle]... [--rounds N] [--with-peers] [-o json]

Without a name all of them run. Figures are medians of the rounds, processor time is the operating system's, and what
runs is the built executable over real sockets. --with-peers makes build/peers, an environment with the other Python
clients, for ingest. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import venv
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

HERE: Final = Path(__file__).resolve().parent
PEERS: Final = ("kubernetes==35.0.0", "lightkube", "kr8s", "kubernetes_asyncio")
NAMES: Final = ("ingest", "latency", "fanout", "cli", "scale", "idle")
Figures = dict[str, Any]


class Goal(NamedTuple):
    """What a figure must reach."""

    what: str
    figure: Callable[[Figures], float]
    at_most: float


def of(name: str, *path: str) -> Callable[[Figures], float]:
    """Return what reads a figure of a benchmark; not a number where it lacks."""

    def read(found: Figures) -> float:
        value: Any = found.get(name)
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return float("nan") if value is None else float(value)

    return read


def over(one: Callable[[Figures], float], other: Callable[[Figures], float]) -> Callable[[Figures], float]:
    """Return what reads the ratio of two figures."""
    return lambda found: one(found) / (other(found) or float("nan"))


_DAEMON: Final = of("ingest", "fabrik-daemon")
GOALS: Final = (
    Goal("CPU per change, of bare json.loads", over(_DAEMON, of("ingest", "bare json.loads")), 1.5),
    Goal("CPU per change, of kubectl get --watch", over(_DAEMON, of("ingest", "kubectl get --watch")), 0.18),
    Goal("CPU per change, of kubernetes Watch", over(_DAEMON, of("ingest", "kubernetes Watch")), 0.12),
    Goal("CPU per change, of lightkube", over(_DAEMON, of("ingest", "lightkube")), 1.0),
    Goal("wire to subscriber, p99 in ms", of("latency", "subscriber_p99_ms"), 10),
    Goal("wire to cache, p99 in ms", of("latency", "cache_p99_ms"), 250),
    Goal("CPU per delivery to 1,000 subscribers in us", of("fanout", "cpu_us_per_delivery"), 15),
    Goal("memory with a quiet cluster in MB", of("idle", "one", "memory_mb"), 45),
    Goal("five quiet clusters, % of a core", of("idle", "five", "cpu_percent"), 0.3),
    Goal("memory at 10,000 runs with their pods in MB", of("scale", "memory_mb"), 120),
    Goal("initial sync of 10,000 pods, of kubectl get", of("scale", "of_kubectl"), 0.6),
    Goal("runs list, of kubectl version --client", of("cli", "of_kubectl"), 0.8),
)


def run(script: str, *words: str) -> Any:
    """Run one benchmark and return what it measured."""
    command = [sys.executable, str(HERE / f"{script}.py"), *words, "-o", "json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    return json.loads(done.stdout)


def ingest(peers: str) -> Figures:
    """Return the processor time per change, in microseconds, of everybody."""
    figures: Figures = run("ingest", *(("--peers", peers) if peers else ()))
    return figures


def latency(_peers: str) -> Figures:
    """Return how late a change is, in milliseconds."""
    stream, cache = run("stream_latency"), run("latency")
    return {"subscriber_p99_ms": stream["p99_ms"], "cache_p99_ms": cache["p99_ms"]}


def fanout(_peers: str) -> Figures:
    """Return what 1,000 subscribers cost."""
    report = run("fanout", "--subscribers", "1,1000")
    return {"cpu_us_per_delivery": report["cpu_us_per_event_of_a_further_subscriber"]}


def cli(_peers: str) -> Figures:
    """Return what a command takes."""
    figures = run("startup")
    return {**figures["median_ms"], "of_kubectl": figures["ratio_to"].get("kubectl")}


def scale(_peers: str) -> Figures:
    """Return what 10,000 pods cost."""
    (figures,) = run("scale", "--pods", "10000", "--rounds", "1")
    return dict(figures)


def idle(_peers: str) -> Figures:
    """Return what nothing costs."""
    return {"one": run("idle", "--clusters", "1", "--seconds", "5"), "five": run("idle", "--seconds", "60")}


def peers_python() -> str:
    """Return the interpreter of an environment with the peers, which is made where there is none."""
    place = HERE.parent.parent / "build" / "peers"
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PEERS], check=True)
    return str(python)


def median_of(rounds: list[Any]) -> Any:
    """Return the medians of figures that are shaped alike."""
    if isinstance(rounds[0], dict):
        return {name: median_of([each.get(name) for each in rounds]) for name in rounds[0]}
    numbers = [value for value in rounds if isinstance(value, (int, float))]
    return statistics.median(numbers) if numbers else rounds[0]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *NAMES], metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often each runs (default: 3)")
    parser.add_argument("--with-peers", action="store_true", help="measure other Python clients, too")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="format (default: text)")
    arguments = parser.parse_args()
    peers = peers_python() if arguments.with_peers else ""
    kinds: dict[str, Callable[[str], Figures]] = {
        "ingest": ingest,
        "latency": latency,
        "fanout": fanout,
        "cli": cli,
        "scale": scale,
        "idle": idle,
    }
    found = {
        name: median_of([kinds[name](peers) for _ in range(arguments.rounds)]) for name in arguments.names or NAMES
    }
    if arguments.output == "json":
        print(json.dumps(found, indent=2))
        return
    print(f"Python {platform.python_version()}, {os.cpu_count()} cpus, load {os.getloadavg()[0]:.1f}")
    for goal in GOALS:
        value = goal.figure(found)
        if value == value:  # noqa: PLR0124 - else it was not measured
            verdict = "reached" if value <= goal.at_most else "missed"
            print(f"  {goal.what:<48}{value:>10.2f}   at most {goal.at_most:g}: {verdict}")


if __name__ == "__main__":
    main()
