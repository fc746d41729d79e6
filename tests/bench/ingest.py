"""Measures what taking in a change costs: pods' changes as fast as the server can send them, over TLS.

The clock is the operating system's: processor time of the daemon from before the first change is sent until the last
one is a row in cache.db and a line at one subscriber, over the number of changes. The limit that every figure is held
against is `json.loads` over the same lines in a bare loop.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from harness import Cluster, wait_until  # noqa: E402 - found through the path above
from links import LooseDaemon  # noqa: E402
from pod_server import PodServer, Work, recorded_event  # noqa: E402

TICKS: Final = os.sysconf("SC_CLK_TCK")
PATIENCE_S: Final = 120.0
BARE: Final = """
import json, sys, time
lines = sys.stdin.buffer.read().splitlines()
began = time.process_time()
for line in lines:
    json.loads(line)
print(time.process_time() - began)
"""


class Ingest(NamedTuple):
    """Figures of one round, per change."""

    cpu_us: float
    wall_us: float
    bare_us: float  # json.loads of the same lines
    rss_mb: float

    @property
    def ratio(self) -> float:
        """Processor time over that of bare parsing."""
        return self.cpu_us / self.bare_us


def cpu_s(pid: int) -> float:
    """Return the processor time that a process and its threads have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def bare_s(work: Work, python: str = sys.executable) -> float:
    """Return the processor time of json.loads over the lines, in a process of its own."""
    done = subprocess.run([python, "-c", BARE], input=b"".join(work.lines()), capture_output=True, check=True)
    return float(done.stdout)


def measure(work: Work, python: str = sys.executable) -> Ingest:
    """Run server, daemon and subscriber once."""
    with tempfile.TemporaryDirectory(prefix="fabrik-bench-") as name:
        root = Path(name)
        (root / "shiv").mkdir(mode=0o700)
        with PodServer(work, root) as server:
            place = (ROOT / "dist" / "fabrik-daemon", root / "shiv", root / "daemon")
            daemon = LooseDaemon(place, [Cluster(server, "bench")])  # type: ignore[arg-type]  # writes a kubeconfig too
            daemon.python = python
            try:
                daemon.launch()
                daemon.wait_connected("bench")
                subscriber = daemon.subscribe()
                time.sleep(1.0)  # what a start leaves to do is not what is measured
                before, began = cpu_s(daemon.pid), time.monotonic()
                server.go()
                wait_until(
                    lambda: any(line.get("currentTask") == "last" for line in list(subscriber.messages)[-3:]),
                    PATIENCE_S,
                    "the last change reaches the subscriber",
                )
                wait_until(
                    lambda: daemon.rows("SELECT 1 FROM runs WHERE current_task = 'last'"), PATIENCE_S, "and the cache"
                )
                used, took = cpu_s(daemon.pid) - before, time.monotonic() - began
                rss_mb = daemon.resident_bytes / 1e6
            finally:
                daemon.kill()
    bare = bare_s(work, python)
    cpu_us, wall_us, bare_us = (round(seconds / work.events * 1e6, 1) for seconds in (used, took, bare))
    return Ingest(cpu_us, wall_us, bare_us, round(rss_mb, 1))


def main() -> None:
    """Measure once and print."""
    work = Work(500, int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
    figures = measure(work)
    print(f"{work.events} changes of {len(recorded_event(work.whole))} bytes, {work.runs} runs")
    print(json.dumps({**figures._asdict(), "ratio": round(figures.ratio, 2)}))
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024, "MB at most")


if __name__ == "__main__":
    main()
