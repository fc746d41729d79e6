"""What the benchmarks share: a daemon over servers of pods, and the operating system's figures of a process."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

ROOT: Final = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from harness import Cluster  # noqa: E402 - found through the path above
from links import LooseDaemon  # noqa: E402
from pod_server import PodServer, Work  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TICKS: Final = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """Return the processor time that a process and its threads have used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def cpu_of(pid: int, seconds: float) -> float:
    """Return the processor time that a process uses in so many seconds, as a share of one core."""
    before, began = cpu_s(pid), time.monotonic()
    time.sleep(seconds)
    return (cpu_s(pid) - before) / (time.monotonic() - began)


def resident_mb(pid: int) -> float:
    """Return the memory of a process that is its own, in MB: resident without what files share."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return sizes["Rss"] / 1000


@contextlib.contextmanager
def serving(works: Sequence[Work], python: str = sys.executable) -> Iterator[tuple[list[PodServer], LooseDaemon]]:
    """Yield servers and a daemon that is configured for them, not yet started."""
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fabrik-bench-")))
        (root / "shiv").mkdir(mode=0o700)
        servers = [stack.enter_context(PodServer(work, root, f"c{number}")) for number, work in enumerate(works)]
        place = (ROOT / "dist" / "fabrik-daemon", root / "shiv", root / "daemon")
        clusters = [Cluster(server, f"c{number}") for number, server in enumerate(servers)]  # type: ignore[arg-type]
        daemon = LooseDaemon(place, clusters)
        daemon.python = python
        stack.callback(daemon.kill)
        yield servers, daemon
