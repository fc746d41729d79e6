"""What the benchmarks share: their options, a daemon over servers of pods, the operating system's figures."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from bench.changing import ChangingServer  # noqa: E402 - found through the path above
from harness import Cluster  # noqa: E402
from links import LooseDaemon  # noqa: E402
from pod_server import PodServer, Work  # noqa: E402

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Mapping, Sequence

EXECUTABLE: Final = ROOT / "dist" / "fabrik-daemon"
SETTLE_S: Final = 1.0  # what a start leaves to do is not what is measured


# ---------------------------------------------------------------- options and output


def options(text: str | None) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes; `text` is its docstring."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the daemon and its commands")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="format (default: text)")
    return parser


def show(rows: Sequence[Mapping[str, Any]], output: str) -> None:
    """Print rows of figures, one a line, or as a list in JSON."""
    if output == "json":
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


# ---------------------------------------------------------------- the operating system's figures


def cpu_s(pid: int) -> float:
    """Return the processor time that a process and its threads, ended ones too, have used, in seconds."""
    return time.clock_gettime((~pid << 3) | 2)  # its CPU-time clock, as clock_getcpuclockid(3) makes the number


def thread_cpu_s(pid: int) -> tuple[float, float]:
    """Return the processor time of a process's first thread, and of the other ones there are, in seconds."""
    used = {int(task.name): (task / "schedstat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()}
    seconds = {task: int(text.split()[0]) / 1e9 for task, text in used.items()}
    return seconds[pid], sum(seconds.values()) - seconds[pid]


def cpu_of(pid: int, seconds: float) -> float:
    """Return the processor time that a process uses in so many seconds, as a share of one core."""
    before, began = cpu_s(pid), time.monotonic()
    time.sleep(seconds)
    return (cpu_s(pid) - before) / (time.monotonic() - began)


def resident_mb(pid: int) -> float:
    """Return a process's resident memory in MB, pages that it shares with others included."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1.024 / 1000


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that so many of the others do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def percentiles_ms(seconds: Sequence[float], **shares: float) -> dict[str, float]:
    """Return percentiles by name, and the largest value, in milliseconds."""
    return {f"{name}_ms": round(percentile(seconds, share) * 1000, 2) for name, share in {**shares, "max": 1}.items()}


# ---------------------------------------------------------------- peers


def kubectl() -> str | None:
    """Return where kubectl is; where it only chooses among its neighbours, as Google Cloud's does, the newest."""
    found = shutil.which("kubectl")
    if not found:
        return None
    versions = list(Path(found).resolve().parent.glob("kubectl.1.[0-9]*"))
    return str(max(versions, key=lambda path: int(path.suffix[1:]), default=found))


@contextlib.contextmanager
def bounded(process: subprocess.Popen[bytes], seconds: float) -> Iterator[None]:
    """End a process after so many seconds, and when it is done with."""
    patience = threading.Timer(seconds, process.kill)
    patience.start()
    try:
        yield
    finally:
        patience.cancel()
        process.kill()


# ---------------------------------------------------------------- daemons and what they follow


def unpacked(folder: Path) -> Path:
    """Return where the executable unpacks itself: $SHIV_ROOT, else below a folder."""
    place = Path(os.environ.get("SHIV_ROOT") or folder / "shiv")
    place.mkdir(mode=0o700, exist_ok=True)
    return place


@contextlib.contextmanager
def serving(works: Sequence[Work], python: str = sys.executable) -> Iterator[tuple[list[PodServer], LooseDaemon]]:
    """Yield servers and a daemon that is configured for them, not yet started."""
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fabrik-bench-")))
        servers = [stack.enter_context(PodServer(work, root, f"c{number}")) for number, work in enumerate(works)]
        place = (EXECUTABLE, unpacked(root), root / "daemon")
        clusters = [Cluster(server, f"c{number}") for number, server in enumerate(servers)]  # type: ignore[arg-type]
        daemon = LooseDaemon(place, clusters)
        daemon.python = python
        stack.callback(daemon.kill)
        yield servers, daemon


@contextlib.contextmanager
def followed(runs: int, rate: float, python: str = sys.executable) -> Iterator[tuple[ChangingServer, LooseDaemon]]:
    """Yield a server whose runs can be changed, and a daemon that follows it."""
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fabrik-bench-")))
        server = stack.enter_context(ChangingServer(runs, rate, root))
        daemon = LooseDaemon((EXECUTABLE, unpacked(root), root / "daemon"), [Cluster(server)])  # type: ignore[arg-type]
        daemon.python = python
        stack.callback(daemon.kill)
        daemon.launch()
        daemon.wait_connected()
        time.sleep(SETTLE_S)
        yield server, daemon
        daemon.stop()
