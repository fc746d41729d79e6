"""Runs the benchmarks and holds their figures against what they must reach, as ratios of one run.

    .venv/bin/python tests/bench/run.py [ingest|latency|fanout|cli|scale|idle]... [--rounds N] [--with-peers]
                                        [-o text|json|markdown] [--from FILE] [--readme]

Without a name all of them run, each --rounds times, in turns; figures are medians of the rounds. Processor time is the
operating system's, and what runs is the built executable over real sockets. --with-peers measures other Python clients
in ingest, in environments that it makes below build/. --from takes figures of an earlier -o json, measuring nothing
but what is named. --readme puts the tables into README.md. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Figure = Callable[["Figures"], "float | None"]

HERE: Final = Path(__file__).resolve().parent
README: Final = HERE.parents[1] / "README.md"
TABLES: Final = re.compile(r"(?<=<!-- written by tests/bench/run.py -->\n).*?(?=<!-- end -->)", re.DOTALL)
Figures = dict[str, Any]


# ---------------------------------------------------------------- what is run


def run(script: str, *words: str) -> Any:
    """Run one benchmark and return what it measured."""
    command = [sys.executable, str(HERE / f"{script}.py"), *words, "-o", "json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(f"{script}.py ended with {done.returncode}")
    return json.loads(done.stdout)


def idle() -> Any:
    """Return what quiet clusters cost: one for its memory, five for a minute."""
    return [*run("idle", "--clusters", "1", "--seconds", "5"), *run("idle", "--clusters", "5")]


KINDS: Final[dict[str, Callable[[], Any]]] = {
    "ingest": lambda: run("ingest"),
    "latency": lambda: run("latency"),
    "fanout": lambda: run("fanout"),
    "cli": lambda: run("cli"),
    "scale": lambda: run("scale"),
    "idle": idle,
}


def median_of(rounds: list[Any]) -> Any:
    """Return the medians of figures that are shaped alike; what was not measured each time is left out."""
    first = rounds[0]
    if isinstance(first, dict):
        return {name: median_of([each.get(name) for each in rounds]) for name in first}
    if isinstance(first, list):
        return [median_of(list(each)) for each in zip(*rounds)]
    numbers = [value for value in rounds if isinstance(value, (int, float))]
    return statistics.median(numbers) if numbers else first


def machine() -> dict[str, Any]:
    """Return what it was measured on, and when."""
    words = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "processor": words[0].partition(":")[2].strip() if words else platform.machine(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }


# ---------------------------------------------------------------- what must be reached


class Goal(NamedTuple):
    """What a figure must reach."""

    what: str
    figure: Figure
    at_most: float
    unit: str = ""


def of(name: str, key: str, **row: Any) -> Figure:
    """Return what reads a figure of a benchmark, in the row that has these values; None where it lacks."""

    def read(found: Figures) -> float | None:
        rows = found.get(name) or []
        return next((each.get(key) for each in rows if row.items() <= each.items()), None)

    return read


def cpu_of(client: str) -> Figure:
    """Return what reads a client's processor time per change."""

    def read(found: Figures) -> float | None:
        times: dict[str, float] = found.get("ingest", {}).get("cpu_us", {})
        return next((time for name, time in times.items() if name.partition(" (")[0] == client), None)

    return read


def wall_of(command: str) -> Figure:
    """Return what reads a command's wall time."""
    return lambda found: found.get("cli", {}).get("ms", {}).get(command)


def over(one: Figure, other: Figure) -> Figure:
    """Return what reads the ratio of two figures."""

    def read(found: Figures) -> float | None:
        above, below = one(found), other(found)
        return above / below if above is not None and below else None

    return read


_DAEMON: Final = cpu_of("fabrik-daemon")
_P99: Final = of("latency", "p99_ms", wire_to="subscriber")
_CHANGE: Final = "processor time for a change, everything included, of"
GOALS: Final = (
    Goal(f"{_CHANGE} bare `json.loads`", over(_DAEMON, cpu_of("bare json.loads")), 1.5),
    Goal(f"{_CHANGE} `kubectl get -w --output-watch-events`", over(_DAEMON, cpu_of("kubectl get -w")), 0.18),
    Goal(f"{_CHANGE} the official Python informer", over(_DAEMON, cpu_of("kubernetes informer")), 0.12),
    Goal(f"{_CHANGE} lightkube's bare watch loop", over(_DAEMON, cpu_of("lightkube")), 1.0),
    Goal(
        "wire to subscriber, p99 at 200/s, of `kubectl get -w`",
        over(_P99, of("latency", "p99_ms", wire_to="kubectl")),
        1.0,
    ),
    Goal("initial sync of 10,000 pods, of `kubectl get pods -o json`", of("scale", "of_kubectl", pods=10_000), 0.6),
    Goal(
        "`runs list`, of `kubectl get jobs`, 500 of them", over(wall_of("runs list"), wall_of("kubectl get jobs")), 0.8
    ),
    Goal("wire to subscriber, p99 at 200/s", _P99, 10, "ms"),
    Goal("wire to cache, p99.9 at 200/s", of("latency", "p999_ms", wire_to="cache"), 250, "ms"),
    Goal(
        "processor time for each delivery to 1,000 subscribers",
        of("fanout", "cpu_us_per_delivery", subscribers=1000),
        15,
        "µs",
    ),
    Goal("memory with one quiet cluster", of("idle", "memory_mb", clusters=1), 45, "MB"),
    Goal("memory at 10,000 runs with their pods", of("scale", "memory_mb", pods=10_000), 120, "MB"),
    Goal("five quiet clusters, of a core", of("idle", "cpu_percent", clusters=5), 0.3, "%"),
)


def reached(found: Figures) -> Iterator[tuple[Goal, float, str]]:
    """Yield each goal that was measured, its value, and whether it was reached."""
    for goal in GOALS:
        value = goal.figure(found)
        if value is not None:
            yield goal, value, "reached" if value <= goal.at_most else "missed"


# ---------------------------------------------------------------- how it is told


def text(found: Figures) -> str:
    """Return the goals, and beneath them all figures."""
    lines = []
    for goal, value, verdict in reached(found):
        lines.append(f"{goal.what:<76} {value:>8.2f} {goal.unit:<2} at most {goal.at_most:g}: {verdict}")
    for name, figures in found.items():
        lines += ["", name]
        for row in figures if isinstance(figures, list) else [figures]:
            lines.append("  " + "  ".join(f"{key} {value}" for key, value in row.items()))
    return "\n".join(lines)


def table(titles: list[str], rows: list[list[Any]]) -> list[str]:
    """Return a Markdown table, its first column to the left and the others to the right."""
    rule = "|".join(["", "---", *["---:"] * (len(titles) - 1), ""])
    return [*("| " + " | ".join(map(str, row)) + " |" for row in [titles]), rule] + [
        "| " + " | ".join(map(str, row)) + " |" for row in rows
    ]


def markdown(found: Figures, where: dict[str, Any]) -> str:
    """Return the tables of README."""
    lines = ["Measured on {date}: {processor}, {cpus} cores, CPython {python}.".format(**where), ""]
    lines += table(
        ["", "measured", "at most", ""],
        [
            [goal.what, f"{value:.2f} {goal.unit}".strip(), f"{goal.at_most:g} {goal.unit}".strip(), verdict]
            for goal, value, verdict in reached(found)
        ],
    )
    ours, bare = _DAEMON(found), cpu_of("bare json.loads")(found)
    if ours and bare:
        clients = sorted(found["ingest"]["cpu_us"].items(), key=lambda item: item[1] or float("inf"))
        rows = [[name, f"{time / bare:.1f}", f"{time / ours:.1f}"] for name, time in clients if time]
        lines += ["", *table(["processor time for a change", "of `json.loads`", "of the daemon's"], rows)]
    if found.get("scale"):
        lines += [
            "",
            *table(["pods", *_SCALE], [[row["pods"], *map(row.get, _SCALE.values())] for row in found["scale"]]),
        ]
    if found.get("fanout"):
        rows = [[row["subscribers"], row["cpu_us_per_delivery"]] for row in found["fanout"]]
        lines += ["", *table(["subscribers", "processor time for a delivery, µs"], rows)]
    if found.get("cli"):
        lines += [
            "",
            *table(["command", "wall time, ms"], [[f"`{name}`", ms] for name, ms in found["cli"]["ms"].items()]),
        ]
    return "\n".join(lines) + "\n"


_SCALE: Final = {
    "clusters": "clusters",
    "initial sync, s": "sync_s",
    "processor time for a pod, µs": "sync_us_per_pod",
    "for a change, µs": "cpu_us_per_change",
    "memory, MB": "memory_mb",
}


def report(found: Figures, where: dict[str, Any], output: str) -> str:
    """Return all of it in a format."""
    if output == "markdown":
        return markdown(found, where)
    if output == "text":
        return "{date}, {processor}, {cpus} cores, load {load}, CPython {python}\n\n".format(**where) + text(found)
    goals = [
        {"what": goal.what, "value": round(value, 3), "unit": goal.unit, "at_most": goal.at_most, "verdict": verdict}
        for goal, value, verdict in reached(found)
    ]
    return json.dumps({"goals": goals, "machine": where, "figures": found}, indent=2)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *KINDS], metavar="NAME", help=", ".join(KINDS))
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often each runs (default: 3)")
    parser.add_argument("--with-peers", action="store_true", help="measure other Python clients, too")
    parser.add_argument("--from", dest="earlier", type=Path, metavar="FILE", help="figures of an earlier -o json")
    parser.add_argument("--readme", action="store_true", help="put the tables into README.md, too")
    parser.add_argument("-o", "--output", choices=("text", "json", "markdown"), default="text")
    arguments = parser.parse_args()
    kinds = dict(KINDS)
    if arguments.with_peers:
        kinds["ingest"] = lambda: run("ingest", "--with-peers")
    earlier = json.loads(arguments.earlier.read_text()) if arguments.earlier else {}
    names = arguments.names or ([] if earlier else list(KINDS))
    where = machine() if names else earlier["machine"]
    rounds = [{name: kinds[name]() for name in names} for _ in range(arguments.rounds)]
    measured = median_of(rounds)
    found = {name: measured.get(name, earlier.get("figures", {}).get(name)) for name in KINDS}
    found = {name: figures for name, figures in found.items() if figures}
    print(report(found, where, arguments.output))
    if arguments.readme:
        tables = markdown(found, where)
        README.write_text(TABLES.sub(lambda _: tables, README.read_text()))


if __name__ == "__main__":
    main()
