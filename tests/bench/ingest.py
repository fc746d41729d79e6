"""Measures what taking in a change costs: pods' changes as fast as the server can send them, over TLS.

The figures are the operating system's processor time, per change. The daemon's counts from before the first change is
sent until the last one is a row in cache.db and a line at one subscriber. Clients that are measured beside it do less:
they take the changes and drop them; theirs counts from when the server has seen their watch open until they say that
they have the last one. The limit that every figure is held against is `json.loads` over the same lines in a bare loop.

kubectl is measured twice: as `kubectl get -w --output-watch-events`, for which API servers make tables, without pods'
specs and states, and with -o json, for which it takes whole pods, as all others do.

    .venv/bin/python tests/bench/ingest.py [--events N] [--with-peers] [-o json]
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench.measuring import SETTLE_S, bounded, cpu_s, kubectl, options, resident_mb, serving, thread_cpu_s  # noqa: E402
from bench.peers import installed, make_environments  # noqa: E402
from harness import wait_until  # noqa: E402
from pod_server import PodServer, Work, recorded_event  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Ends = Callable[[Iterable[bytes]], bool]  # reads a client's lines until it has the last change; False: they ended

PATIENCE_S: Final = 240.0  # for the daemon, and for each client
BARE: Final = """
import json, sys, time
lines = sys.stdin.buffer.read().splitlines()
began = time.process_time()
for line in lines:
    json.loads(line)
print(time.process_time() - began)
"""


def bare_s(work: Work, python: str) -> float:
    """Return the processor time of json.loads over the lines, in a process of its own."""
    done = subprocess.run([python, "-c", BARE], input=b"".join(work.lines()), capture_output=True, check=True)
    return float(done.stdout)


def daemon_figures(work: Work, python: str) -> dict[str, float]:
    """Return the daemon's processor time, in all and by thread, in seconds, and its memory afterwards in MB."""
    with serving([work], python) as ((server,), daemon):
        daemon.launch()
        daemon.wait_connected("c0")
        assert server.is_watched(PATIENCE_S)
        subscriber = daemon.subscribe()
        time.sleep(SETTLE_S)
        before, threads_before, began = cpu_s(daemon.pid), thread_cpu_s(daemon.pid), time.monotonic()
        server.go()
        wait_until(
            lambda: any(line.get("currentTask") == "last" for line in list(subscriber.messages)[-3:]),
            PATIENCE_S,
            "the last change reaches the subscriber",
        )
        wait_until(lambda: daemon.rows("SELECT 1 FROM runs WHERE current_task = 'last'"), PATIENCE_S, "and the cache")
        used, threads, took = cpu_s(daemon.pid) - before, thread_cpu_s(daemon.pid), time.monotonic() - began
        return {
            "cpu_s": used,
            "main_s": threads[0] - threads_before[0],
            "others_s": threads[1] - threads_before[1],
            "wall_s": took,
            "memory_mb": resident_mb(daemon.pid),
        }


def client_s(work: Work, command: list[str], ends: Ends) -> float | None:
    """Return the processor time of a client from its open watch to the last change; None where it does not get there.

    The client finds the server by $KUBECONFIG.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fabrik-bench-")))
        server = stack.enter_context(PodServer(work, folder))
        environment = {**os.environ, "HOME": str(folder), "KUBECONFIG": str(server.path)}
        process = stack.enter_context(
            subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        )
        stack.enter_context(bounded(process, PATIENCE_S))
        assert process.stdout
        ended: list[bool] = []
        reader = threading.Thread(target=lambda: ended.append(ends(process.stdout or ())), daemon=True)
        reader.start()
        if not server.is_watched(PATIENCE_S / 4):
            return None
        time.sleep(SETTLE_S)
        before = cpu_s(process.pid)
        server.go()
        reader.join(PATIENCE_S)
        return cpu_s(process.pid) - before if ended == [True] else None


def says(words: bytes) -> Ends:
    """Return what waits for words in a line."""
    return lambda lines: any(words in line for line in lines)


def counts(events: int) -> Ends:
    """Return what waits for so many lines of changes."""

    def ends(lines: Iterable[bytes]) -> bool:
        changes = (line for line in lines if line.startswith(b"MODIFIED"))
        return sum(1 for _ in itertools.islice(changes, events)) == events

    return ends


def measure(work: Work, python: str, *, with_peers: bool) -> dict[str, Any]:
    """Return the processor time per change of everybody, in microseconds, and what else is known of the daemon."""
    daemon = daemon_figures(work, python)
    found: dict[str, float | None] = {"fabrik-daemon": daemon["cpu_s"], "bare json.loads": bare_s(work, python)}
    words = [kubectl() or "", "get", "pods", "-n", "fabrik-runs", "--watch", "--output-watch-events"]
    if words[0]:
        found["kubectl get -w"] = client_s(work, words, counts(work.events))
        found["kubectl get -w -o json"] = client_s(work, [*words, "-o", "json"], says(b'"fabrik.dev/task":"last"'))
    for name, peer in installed().items() if with_peers else ():
        found[name] = client_s(work, [peer.python, "-c", peer.program], says(b"last"))

    def each(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds / work.events * 1e6, 1)

    return {
        "events": work.events,
        "bytes": len(recorded_event(work.whole)),
        "runs": work.runs,
        "cpu_us": {name: each(seconds) for name, seconds in found.items()},
        "daemon": {
            "main_thread_us": each(daemon["main_s"]),
            "other_threads_us": each(daemon["others_s"]),
            "wall_us": each(daemon["wall_s"]),
            "memory_mb": round(daemon["memory_mb"], 1),
        },
    }


def main() -> None:
    """Measure once and print."""
    parser = options(__doc__)
    parser.add_argument("--events", type=int, default=20_000, metavar="N", help="how many changes (default: 20000)")
    parser.add_argument("--runs", type=int, default=500, metavar="N", help="of how many runs (default: 500)")
    parser.add_argument("--whole", action="store_true", help="pods as recorded, of 10 KB")
    parser.add_argument("--with-peers", action="store_true", help="measure other Python clients, too")
    arguments = parser.parse_args()
    if arguments.with_peers:
        make_environments()
    work = Work(arguments.runs, arguments.events, whole=arguments.whole)
    figures = measure(work, arguments.python, with_peers=arguments.with_peers)
    if arguments.output == "json":
        print(json.dumps(figures, indent=2))
        return
    print("{events} changes of {bytes} bytes, {runs} runs: processor time for each".format(**figures))
    ours = figures["cpu_us"]["fabrik-daemon"]
    for name, value in figures["cpu_us"].items():
        print(f"  {name:<30}{value or 0:>9.1f} us" + (f"   daemon: {ours / value:.2f} of it" if value else "   failed"))
    print("  of the daemon: " + "  ".join(f"{name} {value}" for name, value in figures["daemon"].items()))


if __name__ == "__main__":
    main()
