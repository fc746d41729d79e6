"""Measures what a query costs: `runs list --limit 50` on a cache with 10,000 runs, and what its start is made of.

The executable, a bare interpreter (`python3 -I -S -c pass`) and `kubectl version --client` take turns, so that a busy
machine disturbs all alike; what counts is the ratio of medians. Everything is warm: unpacked, compiled, in memory.
Then the parts: each is the median of many processes that measure themselves, `python -X importtime` names the modules.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from commands import build_cache

EXECUTABLE: Final = Path(__file__).parent.parent.parent / "dist" / "fabrik-daemon"
WORDS: Final = ("runs", "list", "--limit", "50")
PARTS: Final = """
import sys, time
began = time.perf_counter()
sys.path.insert(0, sys.argv[1])
import fabrik_daemon
module = time.perf_counter()
fabrik_daemon.main(sys.argv[2:], open("/dev/null", "w"), open("/dev/null", "w"))
first = time.perf_counter()
fabrik_daemon.main(sys.argv[2:], open("/dev/null", "w"), open("/dev/null", "w"))
again = time.perf_counter()
print(module - began, first - module, again - first)
"""


class Place(NamedTuple):
    """A home with a cache, and the interpreter to use in it."""

    python: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every process: nothing of the caller's."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "SHIV_ROOT": str(self.folder / "shiv"),
            "FABRIK_CACHE": str(self.folder / "cache" / "cache.db"),
        }

    def seconds(self, *command: str) -> float:
        """Run a command to its end, its output going nowhere, and return how long it took."""
        began = time.perf_counter()
        done = subprocess.run(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        took = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
        return took

    def output(self, *command: str) -> tuple[str, str]:
        """Run a command and return what it wrote to stdout and stderr."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True)
        return done.stdout, done.stderr


def take_turns(place: Place, rounds: int) -> dict[str, list[float]]:
    """Run each command once a round; return the times of each."""
    bare = (place.python, "-I", "-S", "-c", "pass")
    commands: dict[str, tuple[str, ...]] = {
        "runs list": (place.python, str(EXECUTABLE), *WORDS),
        "--version": (place.python, str(EXECUTABLE), "--version"),
        "bare": bare,
        "bare with site": (place.python, "-I", "-c", "pass"),
    }
    kubectl = shutil.which("kubectl")
    if kubectl:
        commands["kubectl"] = (kubectl, "version", "--client")
    for command in commands.values():  # the first start unpacks and compiles
        place.seconds(*command)
    took: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            took[name].append(place.seconds(*command))
    return took


def parts(place: Place, rounds: int) -> dict[str, float]:
    """Return the medians of what the program's own process spends: its module, its command first and again."""
    tree = str(next((place.folder / "shiv").glob("*/site-packages")))
    found = [place.output(place.python, "-c", PARTS, tree, *WORDS)[0].split() for _ in range(rounds)]
    module, first, again = (statistics.median(map(float, column)) for column in zip(*found))
    return {"module": module, "command": first - again, "query": again}


def imports(place: Place) -> list[tuple[str, float, float]]:
    """Return what `-X importtime` says: module, its own and its cumulated seconds, the dearest first."""
    _, text = place.output(place.python, "-X", "importtime", str(EXECUTABLE), *WORDS)
    rows = [line[len("import time:") :].split("|") for line in text.splitlines() if line.startswith("import time:")]
    found = [(name.strip(), int(own) / 1e6, int(total) / 1e6) for own, total, name in rows[1:]]
    return sorted(found, key=lambda row: -row[2])


def measure(python: str, rounds: int, runs: int) -> dict[str, Any]:
    """Return all figures, in milliseconds."""
    with tempfile.TemporaryDirectory(prefix="fabrik-bench-") as folder:
        place = Place(python, Path(folder))
        build_cache(place.folder / "cache" / "cache.db", runs)
        took = take_turns(place, rounds)
        inside = parts(place, rounds)
        modules = imports(place)
    median = {name: statistics.median(times) for name, times in took.items()}
    whole, bare = median["runs list"], median["bare"]
    site = median["bare with site"] - bare
    made_of = {"interpreter": bare, "site": site, **inside}
    made_of["executable and end"] = whole - sum(made_of.values())
    return {
        "runs": runs,
        "rounds": rounds,
        "median_ms": {name: round(seconds * 1000, 2) for name, seconds in median.items()},
        "least_ms": {name: round(min(times) * 1000, 2) for name, times in took.items()},
        "ratio_to": {name: round(whole / median[name], 2) for name in ("bare", "kubectl") if name in median},
        "made_of_ms": {name: round(seconds * 1000, 2) for name, seconds in made_of.items()},
        "imports_ms": [[name, round(own * 1000, 2), round(total * 1000, 2)] for name, own, total in modules[:25]],
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, metavar="N", help="how often each runs (default: 25)")
    parser.add_argument("--runs", type=int, default=10_000, metavar="N", help="runs in the cache (default: 10000)")
    parser.add_argument("--python", default="/usr/bin/python3", help="the interpreter (default: /usr/bin/python3)")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="format (default: text)")
    arguments = parser.parse_args()
    figures = measure(arguments.python, arguments.rounds, arguments.runs)
    if arguments.output == "json":
        print(json.dumps(figures, indent=2))
        return 0
    print(f"{' '.join(WORDS)} at {figures['runs']} runs, medians of {figures['rounds']} rounds")
    for name, value in figures["median_ms"].items():
        print(f"  {name:<20}{value:>8} ms   least {figures['least_ms'][name]:>7} ms")
    print("  " + ", ".join(f"{value} x {name}" for name, value in figures["ratio_to"].items()))
    print("made of")
    for name, value in figures["made_of_ms"].items():
        print(f"  {name:<20}{value:>8} ms")
    print("imports, own and cumulated (-X importtime, which slows them down)")
    for name, own, total in figures["imports_ms"]:
        print(f"  {name:<28}{own:>8}{total:>8} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
