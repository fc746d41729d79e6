"""Does one cluster's trouble reach another's? Latency from the wire of cluster A to a subscriber, alone and in company.

    python tests/bench/isolation.py [--samples N] [--rate N] [-o json]

A model API server sends changes of cluster A's pods at a steady rate; a subscriber on the daemon's socket notes when
each arrives. First A is alone; then, in turn and all together: B is dead (its port is closed), C hangs (it accepts and
never answers), D is forbidden (403 on everything), E floods (a process of its own changes pods as fast as it can).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from bench.measuring import percentile  # noqa: E402 - found through the path above
from fabrik_objects import Report, job, pod  # noqa: E402
from fakes import Authority, ModelServer  # noqa: E402
from harness import Cluster, wait_until  # noqa: E402
from links import Listener, LooseDaemon  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RUNS: Final = 50
SETTLE_S: Final = 3.0  # before measuring, for the others to be in trouble
TIMING: Final = {"backoffMin": "200ms", "backoffMax": "2s", "connect": "2s", "answer": "5s", "forbiddenRetry": "2s"}


class Figures(NamedTuple):
    """What one round measured, in milliseconds."""

    company: str
    samples: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    others: int  # events of other clusters that the subscriber's daemon took in meanwhile, a second


class Foreign(ModelServer):
    """A server for whose sake only a port is needed."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port


@contextmanager
def dead() -> Iterator[ModelServer]:
    """Yield a cluster whose port is closed."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    yield Foreign(port)


@contextmanager
def hung() -> Iterator[ModelServer]:
    """Yield a cluster that accepts and never answers."""
    with Listener() as listener:
        yield Foreign(listener.port)


@contextmanager
def forbidden() -> Iterator[ModelServer]:
    """Yield a cluster that refuses everything."""
    with ModelServer() as server:
        server.uid = "forbidden"
        for resource in server.collections:
            server.refuse(resource)
        yield server


@contextmanager
def flooding() -> Iterator[ModelServer]:
    """Yield a cluster that changes as fast as it can, in a process of its own."""
    command = [sys.executable, __file__, "--flood"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        yield Foreign(int(process.stdout.readline()))
        process.stdin.close()
        process.kill()


def flood() -> None:
    """Be the flooding cluster, until killed: its changes wait for a watch, and history is forgotten as it goes."""
    with ModelServer() as server:
        server.uid = "flooding"
        for number in range(RUNS):
            server.put("jobs", job(number))
        print(server.port, flush=True)
        pods = server.collections["pods"]
        number = 0
        while True:
            number += 1
            server.put(
                "pods", pod(number % RUNS, report=Report(finished=number % 1000, total=1000, task=f"{number}:f"))
            )
            if number % 100 == 0 and not any(watch.resource == "pods" for watch in server.watches):
                time.sleep(0.01)
            if len(pods.log) > 200_000:
                return


COMPANY: Final = {"B dead": dead, "C hung": hung, "D forbidden": forbidden, "E flooding": flooding}


def measure(company: Sequence[str], samples: int, rate: float) -> Figures:
    """Return how long changes of A take, beside these others."""
    root = Path(tempfile.mkdtemp(prefix="fabrik-bench-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        server = stack.enter_context(ModelServer(Authority()))
        for number in range(RUNS):
            server.put("jobs", job(number))
        others = [Cluster(stack.enter_context(COMPANY[name]()), name.split()[0]) for name in company]
        unpacked = root / "shiv"
        unpacked.mkdir(mode=0o700)
        place = (ROOT / "dist" / "fabrik-daemon", unpacked, root / "daemon")
        daemon = LooseDaemon(place, [Cluster(server, "A"), *others], timing=TIMING)
        stack.callback(daemon.kill)
        daemon.launch()
        daemon.wait_connected("A")
        time.sleep(SETTLE_S)
        mine = daemon.subscribe(clusters=["A"])
        seq_before, began_at = seq_of(daemon), time.monotonic()
        sent: dict[str, float] = {}
        for number in range(samples):
            task = f"{number}:sample"
            sent[task] = time.monotonic()
            server.put("pods", pod(number % RUNS, report=Report(finished=number, total=samples, task=task)))
            time.sleep(max(0.0, began_at + (number + 1) / rate - time.monotonic()))
        wait_until(
            lambda: sum(1 for message in list(mine.messages) if message.get("currentTask") in sent) >= samples,
            60,
            "every sample arrives",
        )
        elapsed_s = time.monotonic() - began_at
        changes = seq_of(daemon) - seq_before - samples
        late = [
            (at - sent[message["currentTask"]]) * 1000
            for message, at in zip(mine.messages, mine.times)
            if message.get("currentTask") in sent
        ]
    p50, p99 = percentile(late, 0.5), percentile(late, 0.99)
    shown = ", ".join(company) or "alone"
    return Figures(
        shown, len(late), round(p50, 2), round(p99, 2), round(max(late), 2), max(0, int(changes / elapsed_s))
    )


def seq_of(daemon: LooseDaemon) -> int:
    """Return the number of the daemon's last change."""
    subscriber = daemon.subscribe(clusters=["A"])
    subscriber.close()
    return int(subscriber.messages[0]["seq"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--rate", type=float, default=50.0, help="changes of A a second")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    parser.add_argument("--flood", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.flood:
        os.nice(19)  # what is measured is the daemon, not who gets the processor
        flood()
        return
    rounds: list[tuple[str, ...]] = [(), *((name,) for name in COMPANY), tuple(COMPANY)]
    figures = [measure(company, arguments.samples, arguments.rate) for company in rounds]
    alone = figures[0]
    rows: list[dict[str, Any]] = [
        {
            **one._asdict(),
            "p50_ratio": round(one.p50_ms / alone.p50_ms, 2),
            "p99_ratio": round(one.p99_ms / alone.p99_ms, 2),
        }
        for one in figures
    ]
    if arguments.output == "json":
        print(json.dumps(rows, indent=2))
        return
    print(f"{'company of A':44}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}{'p50 x':>8}{'p99 x':>8}{'others/s':>10}")
    for row in rows:
        figures_of = f"{row['p50_ms']:9.2f}{row['p99_ms']:9.2f}{row['max_ms']:9.2f}"
        print(f"{row['company']:44}{figures_of}{row['p50_ratio']:8.2f}{row['p99_ratio']:8.2f}{row['others']:10}")


if __name__ == "__main__":
    main()
