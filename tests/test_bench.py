"""Each benchmark runs from end to end, with little to do; what it measures is nobody's concern here."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from bench import run

if TYPE_CHECKING:
    from collections.abc import Iterator

BENCH: Final = Path(__file__).parent / "bench"
SMALL: Final = {
    "ingest": ["--events", "40", "--runs", "5"],
    "latency": ["--changes", "8", "--turns", "1", "--cached", "20"],
    "fanout": ["--subscribers", "3", "--changes", "10", "--rate", "200", "--runs", "5"],
    "cli": ["--runs", "10", "--turns", "1"],
    "scale": ["--sizes", "20x2", "--events", "40"],
    "idle": ["--clusters", "2", "--seconds", "0.1"],
    "hostile_sql": ["--changes", "8", "--rounds", "1", "--beside", "1"],
}


def small(name: str, unpacked: Path) -> Any:
    """Run a benchmark with little to do and return what it printed."""
    environment = {**os.environ, "SHIV_ROOT": str(unpacked)}
    command = [sys.executable, str(BENCH / f"{name}.py"), *SMALL[name], "-o", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def numbers(figures: Any) -> Iterator[float]:
    """Yield every figure, however deep."""
    for value in figures.values() if isinstance(figures, dict) else figures:
        if isinstance(value, (dict, list)):
            yield from numbers(value)
        elif not isinstance(value, (str, type(None))):
            yield value


def everything() -> dict[str, Any]:
    """Return figures shaped as all benchmarks' together."""
    return {
        "ingest": {
            "cpu_us": {
                "fabrik-daemon": 60.0,
                "bare json.loads": 40.0,
                "kubectl get -w": 400.0,
                "kubectl get -w -o json": 600.0,
                "kubernetes informer (37.0.2)": 300.0,
                "kr8s (1)": None,
                "lightkube (1)": 55.0,
            }
        },
        "latency": [
            {"wire_to": "subscriber", "p99_ms": 2.0, "p999_ms": 3.0},
            {"wire_to": "cache", "p99_ms": 100.0, "p999_ms": 300.0},
            {"wire_to": "kubectl", "p99_ms": 4.0, "p999_ms": 5.0},
        ],
        "fanout": [{"subscribers": 1, "cpu_us_per_delivery": 900.0}, {"subscribers": 1000, "cpu_us_per_delivery": 7.0}],
        "cli": {"runs": 500, "ms": {"runs list": 60.0, "kubectl get jobs": 80.0}},
        "scale": [{"pods": 10_000, "clusters": 1, "of_kubectl": 0.5, "memory_mb": 110.0}],
        "idle": [{"clusters": 1, "memory_mb": 40.0}, {"clusters": 5, "cpu_percent": 0.1}],
    }


@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name: str, executable: Path, unpacked: Path) -> None:
    assert executable.exists()
    found = list(numbers(small(name, unpacked)))
    assert found
    assert all(math.isfinite(number) for number in found)


def test_there_is_a_small_one_of_each() -> None:
    assert list(SMALL) == [*run.KINDS, "hostile_sql"]


def test_goals_are_held_against_figures() -> None:
    verdicts = {goal.what: (round(value, 2), verdict) for goal, value, verdict in run.reached(everything())}
    assert len(verdicts) == len(run.GOALS)
    change = "processor time for a change, everything included, of "
    assert verdicts[f"{change}bare `json.loads`"] == (1.5, "reached")
    assert verdicts[f"{change}the official Python informer"] == (0.2, "missed")
    assert verdicts["wire to cache, p99.9 at 200/s"] == (300.0, "missed")
    assert verdicts["processor time for each delivery to 1,000 subscribers"] == (7.0, "reached")


def test_what_was_not_measured_is_not_told() -> None:
    found = {"ingest": {"cpu_us": {"fabrik-daemon": 60.0, "bare json.loads": 40.0, "lightkube (1)": None}}}
    assert [value for _, value, _ in run.reached(found)] == [1.5]
    assert run.markdown(found, run.machine()).count("lightkube") == 0


def test_medians_of_rounds() -> None:
    rounds = [{"a": [{"x": 1.0, "y": "one"}], "b": None}, {"a": [{"x": 5.0, "y": "one"}], "b": 2}, {"a": [{"x": 3.0}]}]
    assert run.median_of(rounds) == {"a": [{"x": 3.0, "y": "one"}], "b": 2}


def test_earlier_figures_fill_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    earlier, readme = tmp_path / "earlier.json", tmp_path / "README.md"
    earlier.write_text(json.dumps({"machine": run.machine(), "figures": everything()}))
    readme.write_text("before\n<!-- written by tests/bench/run.py -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(run, "README", readme)
    monkeypatch.setattr(sys, "argv", ["run.py", "--from", str(earlier), "-o", "markdown", "--readme"])
    run.main()
    printed = capsys.readouterr().out
    assert (
        f"before\n<!-- written by tests/bench/run.py -->\n{printed.strip()}\n<!-- end -->\nafter\n"
        == readme.read_text()
    )
    assert "| lightkube (1) | 1.4 | 0.9 |" in printed
    assert run.TABLES.search((run.HERE.parents[1] / "README.md").read_text()), "README has a place for them"


def test_other_benchmarks_can_be_imported() -> None:
    for script in BENCH.glob("*.py"):
        importlib.import_module(f"bench.{script.stem}")
