#!/usr/bin/env python3
"""Measure the dashboard on a pseudo-terminal: how soon it shows something, how soon a change, what it costs idle.

- First screen: from the start of the executable, warm, on a cache with 10,000 runs and no daemon, until the newest run
  stands on the terminal. Goal: a median under 400 ms.
- Change: a model API server changes a Pod; the time from just before until its figures are read from the terminal, the
  daemon between them. Goal: a p99 under 100 ms.
- Idle: the processor time that it takes while runs of 10,000 report nothing and ages go on. Goal: under 1 %.

    .venv/bin/python tests/bench/dashboard.py [--starts 15] [--changes 100] [--idle 30] [--runs 10000] [-o json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench.measuring import cpu_s, percentile  # noqa: E402
from commands import build_cache, run_row  # noqa: E402 - found through the path above
from fabrik_objects import Report, job, pod  # noqa: E402
from fakes import Authority, ModelServer  # noqa: E402
from harness import Cluster  # noqa: E402
from hosts import Host  # noqa: E402
from terminals import Terminal  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EXECUTABLE: Final = ROOT / "dist" / "fabrik-daemon"
FIRST_SCREEN_S: Final = 0.400
CHANGE_S: Final = 0.100
IDLE_SHARE: Final = 0.01
TURN_S: Final = 0.2  # between two changes


def dashboard(environment: Mapping[str, str], *words: str) -> Terminal:
    """Start a dashboard that is wide enough for whole ids."""
    command = [sys.executable, str(EXECUTABLE), "dashboard", "--no-start", *words]
    terminal = Terminal(command, lines=40, columns=140, environment={**environment, "TERM": "xterm-256color"})
    terminal.is_drawn = False  # pyte takes longer than what is measured
    return terminal


def leave(terminal: Terminal) -> None:
    """Leave a dashboard as a person does."""
    terminal.press(b"q")
    assert terminal.close() == 0


def measure_starts(folder: Path, runs: int, starts: int) -> list[tuple[float, float]]:
    """Return the seconds of each start until the newest run stood there, and those of processor time among them.

    The first, which unpacks, is left out.
    """
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "SHIV_ROOT": str(folder / "shiv")}
    cache = folder / "cache" / "cache.db"
    build_cache(cache, runs)
    newest = run_row(runs - 1).run_id
    taken = []
    for _ in range(starts + 1):
        began = time.perf_counter()
        terminal = dashboard({**environment, "FABRIK_CACHE": str(cache), "FABRIK_SOCKET": str(folder / "none.sock")})
        terminal.wait_for_raw(newest)
        taken.append((time.perf_counter() - began, cpu_s(terminal.pid)))
        leave(terminal)
    return taken[1:]


def measure_changes(terminal: Terminal, server: ModelServer, changes: int) -> list[float]:
    """Return how long each change of a run that is seen took to the terminal."""
    taken = []
    for number in range(changes):
        time.sleep(TURN_S)
        figures = 10_000 + number
        began = time.perf_counter()
        server.put("pods", pod(0, report=Report(task=f"{number}:impl", finished=figures, total=99_999)))
        terminal.wait_for_raw(str(figures)[-3:] + "/99999")
        taken.append(time.perf_counter() - began)
    return taken


def measure_idle(terminal: Terminal, seconds: float) -> float:
    """Return the share of one processor that a dashboard takes which nobody touches."""
    before, began = cpu_s(terminal.pid), time.monotonic()
    while time.monotonic() < began + seconds:
        terminal.read(0.5)
    return (cpu_s(terminal.pid) - before) / (time.monotonic() - began)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all figures."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fabrik-bench-")))
        starts = measure_starts(folder / "starts", arguments.runs, arguments.starts)
        server = ModelServer(Authority())
        for number in range(20):
            server.put("jobs", job(number))
            server.put("pods", pod(number, report=Report(finished=0, total=48)))
        stack.enter_context(server)
        host = stack.enter_context(Host(EXECUTABLE, folder / "shiv", folder / "host", [Cluster(server)]))
        build_cache(host.cache, arguments.runs, cluster="old")
        host.start()
        host.settle()
        terminal = dashboard(host.environment)
        terminal.wait_for_raw("live")
        terminal.press(b":cluster test\r")
        terminal.wait_for_raw("0/48")
        changes = measure_changes(terminal, server, arguments.changes)
        idle = measure_idle(terminal, arguments.idle)
        leave(terminal)
        host.stop()
    return figures(starts, changes, idle, arguments.runs)


def figures(starts: Sequence[tuple[float, float]], changes: Sequence[float], idle: float, runs: int) -> dict[str, Any]:
    """Return what was measured, and on what."""
    first, p99 = statistics.median(wall for wall, _ in starts), percentile(changes, 0.99)
    return {
        "benchmark": "dashboard",
        "runs": runs,
        "first_screen_median_ms": round(first * 1000, 1),
        "first_screen_best_ms": round(min(starts)[0] * 1000, 1),
        "first_screen_cpu_ms": round(statistics.median(cpu for _, cpu in starts) * 1000, 1),
        "change_p50_ms": round(percentile(changes, 0.5) * 1000, 1),
        "change_p99_ms": round(p99 * 1000, 1),
        "idle_percent": round(idle * 100, 2),
        "met": first < FIRST_SCREEN_S and p99 < CHANGE_S and idle < IDLE_SHARE,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
    }


def main() -> int:
    """Measure, print, and say with the exit code whether the goals were met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--starts", type=int, default=15, metavar="N", help="starts (default: 15)")
    parser.add_argument("--changes", type=int, default=100, metavar="N", help="changes (default: 100)")
    parser.add_argument("--idle", type=float, default=30, metavar="S", help="seconds of idleness (default: 30)")
    parser.add_argument("--runs", type=int, default=10_000, metavar="N", help="runs in the cache (default: 10,000)")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="format (default: table)")
    result = measure(parser.parse_args())
    if "json" in sys.argv:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name:<24}{value}")
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
