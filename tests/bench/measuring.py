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

import fakes_http  # noqa: E402 - found through the path above
from fabrik_objects import Report, job, pod  # noqa: E402
from harness import Cluster  # noqa: E402
from hosts import Host  # noqa: E402
from links import LooseDaemon  # noqa: E402
from pod_server import KubectlServer, PodServer, Work  # noqa: E402
from tables import table_of_event, wants_table  # noqa: E402

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterable, Iterator, Mapping, Sequence

EXECUTABLE: Final = ROOT / "dist" / "fabrik-daemon"
TOKEN: Final = fakes_http.Access(auth="token")
WARM_UP: Final = 100  # changes before those that are measured: the first ones grow memory


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
def model(runs: int) -> Iterator[KubectlServer]:
    """Yield a server in this process with runs that can be changed."""
    server = KubectlServer(fakes_http.Authority(), token="a-bearer-token")
    for number in range(runs):
        server.put("jobs", job(number))
        server.put("pods", pod(number, report=Report(task="0:impl", finished=0, total=10**9)))
    with server:
        yield server
    assert not server.violations, f"something else than GET was asked for: {server.violations}"


@contextlib.contextmanager
def followed(runs: int, python: str = sys.executable) -> Iterator[tuple[KubectlServer, Host]]:
    """Yield such a server, and a daemon that follows it."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fabrik-bench-")))
        server = stack.enter_context(model(runs))
        host = stack.enter_context(Host(EXECUTABLE, unpacked(folder), folder / "host", [Cluster(server, access=TOKEN)]))
        host.python = python
        host.start()
        host.settle()
        yield server, host
        host.stop()


# ---------------------------------------------------------------- one change after the other


def note_what_is_sent() -> dict[int, float]:
    """Have every watch of a model server note when a change is about to be sent, by its number; make tables, too."""
    sent: dict[int, float] = {}
    send = fakes_http.Exchange.send_chunks

    def send_chunks(self: fakes_http.Exchange, chunks: Iterable[bytes]) -> None:
        listed = list(chunks)
        if wants_table(self.seen):
            listed = [table_of_event(chunk, first=True) for chunk in listed]
        numbers = [number_in(chunk) for chunk in listed]
        now = time.perf_counter()
        sent.update((number, now) for number in numbers if number is not None)
        send(self, listed)

    fakes_http.Exchange.send_chunks = send_chunks  # type: ignore[method-assign]
    return sent


def number_in(chunk: bytes) -> int | None:
    """Return the number of the change in an event of a watch, None where there is none."""
    _, found, rest = chunk.partition(b'\\"finished\\":')
    return int(rest.partition(b",")[0]) if found else None


class Changes:
    """Changes to runs, one each `1 / rate` seconds, whatever becomes of those before."""

    def __init__(self, server: KubectlServer, runs: int, rate: float) -> None:
        """Make none yet; they go round so many runs."""
        self._server = server
        self._runs = runs
        self._rate = rate
        self.made = 0  # so far

    def make(self, count: int) -> None:
        """Make so many, numbered on from those before."""
        begun_at = time.perf_counter()
        for number in range(1, count + 1):
            time.sleep(max(0.0, begun_at + number / self._rate - time.perf_counter()))
            self.made += 1
            report = Report(task=f"{self.made}:impl", finished=self.made, total=10**9)
            self._server.put("pods", pod(self.made % self._runs, report=report))

    @contextlib.contextmanager
    def being_made(self, count: int) -> Iterator[range]:
        """Make so many while the block runs, after a warm-up; yield the numbers of those that are measured."""
        numbers = range(self.made + WARM_UP + 1, self.made + WARM_UP + count + 1)
        making = threading.Thread(target=self.make, args=(WARM_UP + count,))
        making.start()
        try:
            yield numbers
        finally:
            making.join()
