"""Measures the executable itself: its size and entries, and its first and later starts under each Python.

A cold start unpacks the executable into an empty home and compiles what it needs; a warm one finds both done. The bare
interpreter (`python3 -I -S -c pass`) stands beside, for what a warm start adds to it. Medians of several starts.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parent.parent))

from test_versions import interpreters

EXECUTABLE: Final = Path(__file__).parent.parent.parent / "dist" / "fabrik-daemon"


def seconds(home: Path, *command: str) -> float:
    """Run a command with this home and return how long it took."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
    began = time.perf_counter()
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def print_size() -> None:
    """Print how large the executable is, and how many files it holds."""
    with zipfile.ZipFile(EXECUTABLE) as outer:
        packed = outer.read("tree.zip")
        entries = len(outer.namelist())
    with zipfile.ZipFile(io.BytesIO(packed)) as tree:
        files = tree.infolist()
    size = EXECUTABLE.stat().st_size / 1e6
    print(f"{EXECUTABLE.name}: {size:.2f} MB, {entries} entries; in its tree {len(files)} files,")
    print(f"{sum(file.file_size for file in files) / 1e6:.1f} MB unpacked")


def print_starts(version: str, python: str, cold_rounds: int, warm_rounds: int) -> None:
    """Print the starts under one Python."""
    command = (python, str(EXECUTABLE), "--version")
    cold = []
    for _ in range(cold_rounds):
        with tempfile.TemporaryDirectory() as home:
            cold.append(seconds(Path(home), *command))
    with tempfile.TemporaryDirectory() as home:
        seconds(Path(home), *command)
        seconds(Path(home), *command)
        pairs = [
            (seconds(Path(home), *command), seconds(Path(home), python, "-I", "-S", "-c", "pass"))
            for _ in range(warm_rounds)
        ]
    warm, bare = (statistics.median(column) * 1000 for column in zip(*pairs))
    print(f"{version:<10} cold {statistics.median(cold):6.2f} s   warm {warm:6.1f} ms   bare {bare:6.1f} ms")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cold", type=int, default=3, help="cold starts under each Python (default: 3)")
    parser.add_argument("--warm", type=int, default=20, help="warm starts under each Python (default: 20)")
    arguments = parser.parse_args()
    print_size()
    for version, python in interpreters():
        print_starts(version, python, arguments.cold, arguments.warm)


if __name__ == "__main__":
    main()
