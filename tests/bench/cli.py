"""Measures the wall time of common commands, beside kubectl's on the same server.

Daemon, server and commands are processes of their own. The commands take turns, so that a busy machine disturbs all
alike; everything is warm: unpacked, compiled, in memory, kubectl's discovery in its cache. startup.py tells what the
time of one command is made of.

    .venv/bin/python tests/bench/cli.py [--runs N] [--turns N] [-o json]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import fabrik_objects  # noqa: E402 - found through the path above
from bench.measuring import kubectl, options, serving  # noqa: E402
from pod_server import Work  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from links import LooseDaemon

OURS: Final = {
    "--version": ("--version",),
    "status": ("status",),
    "runs list": ("runs", "list"),
    "runs show": ("runs", "show", fabrik_objects.run_id(7)),
    "schedules list": ("schedules", "list"),
    "query": ("query", "SELECT status, count(*) FROM runs GROUP BY status"),
}
KUBECTL: Final = {
    "kubectl version --client": ("version", "--client"),
    "kubectl get jobs": ("get", "jobs", "-n", "fabrik-runs"),
}


def commands(daemon: LooseDaemon, kubeconfig: Path) -> dict[str, Callable[[], None]]:
    """Return what is measured, by name; each runs to its end and must succeed."""

    def ours(words: tuple[str, ...]) -> Callable[[], None]:
        def run() -> None:
            done = daemon.cli(*words)
            assert done.returncode == 0, f"{' '.join(words)} ended with {done.returncode}: {done.stderr}"

        return run

    def theirs(program: str, words: tuple[str, ...]) -> Callable[[], None]:
        environment = {**os.environ, "HOME": str(kubeconfig.parent), "KUBECONFIG": str(kubeconfig)}

        def run() -> None:
            subprocess.run([program, *words], env=environment, capture_output=True, encoding="utf-8", check=True)

        return run

    found = {name: ours(words) for name, words in OURS.items()}
    program = kubectl()
    if program:
        found.update({name: theirs(program, words) for name, words in KUBECTL.items()})
    return found


def measure(runs: int, turns: int, python: str) -> dict[str, Any]:
    """Return the medians in milliseconds."""
    with serving([Work(runs)], python) as ((server,), daemon):
        daemon.launch()
        daemon.wait_connected("c0")
        todo = commands(daemon, server.path)
        took: dict[str, list[float]] = {name: [] for name in todo}
        for turn in range(turns + 1):
            for name, run in todo.items():
                began = time.perf_counter()
                run()
                if turn:  # the first one unpacks and fills caches
                    took[name].append(time.perf_counter() - began)
    return {"runs": runs, "ms": {name: round(statistics.median(times) * 1000, 1) for name, times in took.items()}}


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--runs", type=int, default=500, metavar="N", help="runs that there are (default: 500)")
    parser.add_argument("--turns", type=int, default=15, metavar="N", help="how often each runs (default: 15)")
    parser.set_defaults(python="/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable)
    arguments = parser.parse_args()
    figures = measure(arguments.runs, arguments.turns, arguments.python)
    if arguments.output == "json":
        print(json.dumps(figures, indent=2))
        return
    print(f"{figures['runs']} runs, medians of {arguments.turns} turns")
    for name, value in figures["ms"].items():
        print(f"  {name:<26}{value:>8.1f} ms")


if __name__ == "__main__":
    main()
