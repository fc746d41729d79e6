#!/usr/bin/env python3
"""Measure what many subscribers cost: how late a change reaches them, the daemon's CPU time and its memory.

A model API server changes one Pod after the other at a steady rate; the time is taken right before the bytes of a
change are handed to TLS, and again when each subscriber has read its event. The subscribers are one process, the
daemon is the built executable. Latencies are of all deliveries together; `last` is that of each change's last one.
With --deaf none of them reads: what is measured then is memory alone.

    .venv/bin/python tests/bench/fanout.py [--subscribers 1,200,1000] [--framing lines|websocket|sse] [-o json]
    .venv/bin/python tests/bench/fanout.py --subscribers 1000 --deaf --changes 20000 --rate 1000
"""

from __future__ import annotations

import argparse
import array
import base64
import contextlib
import json
import os
import platform
import re
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from bench.measuring import cpu_s  # noqa: E402
from bench.stream_latency import GOAL_S, change_all, note_what_is_sent, percentile  # noqa: E402
from fabrik_objects import Report, job, pod  # noqa: E402 - found through the path above
from fakes import Authority, ModelServer  # noqa: E402
from harness import Cluster, wait_until  # noqa: E402
from hosts import Host  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

WARM_UP: Final = 100  # as in stream_latency
WAIT_S: Final = 120.0
NUMBER: Final = re.compile(rb'"finished":(\d+)')
PREFACES: Final = {
    "lines": b"",
    "sse": b"GET /v1/stream HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n\r\n",
    "websocket": b"GET /v1/stream?type=* HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + base64.b64encode(bytes(16)) + b"\r\n\r\n",
}


# ---------------------------------------------------------------- the subscribers' process


def subscribe_all(arguments: argparse.Namespace) -> None:
    """Connect, say so, and read until every subscriber was told of the last change; then say when each was told."""
    socks = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(arguments.count)]
    for sock in socks:
        sock.connect(arguments.socket)
        preface = PREFACES[arguments.framing]
        sock.sendall(preface or b'{"action":"subscribe"}\n')
        sock.settimeout(WAIT_S)
        while b'"subscribed"' not in (data := sock.recv(65536)):
            assert data, "the daemon hung up"
        sock.setblocking(False)
    print("connected", flush=True)
    if arguments.deaf:
        sys.stdin.read()
        return
    last = arguments.changes + WARM_UP
    times = [array.array("d") for _ in range(last + 1)]
    read_until(last, socks, times)
    print(json.dumps({number: list(some) for number, some in enumerate(times) if some}), flush=True)


def read_until(last: int, socks: list[socket.socket], times: list[array.array[float]]) -> None:
    """Note when each change reaches each subscriber; what was read is looked at when nothing is left to be read."""
    poll = select.epoll()
    by_number = {sock.fileno(): sock for sock in socks}
    tails = dict.fromkeys(by_number, b"")
    for number in by_number:
        poll.register(number, select.EPOLLIN)
    waiting, unread = len(socks), [(0, 0.0, b"")][:0]
    while waiting:
        ready = poll.poll(0 if unread else WAIT_S)
        assert ready or unread, f"{waiting} subscribers were not told of the last change within {WAIT_S} s"
        for number, _ in ready:
            data = by_number[number].recv(1 << 20)
            unread.append((number, time.perf_counter(), data))
        if not ready:
            for number, at, received in unread:
                assert received, "the daemon hung up"
                data = tails[number] + received
                end = max(0, data.rfind(b'"row":'))  # the number stands before it
                tails[number] = data[end + 1 :]
                for match in NUMBER.finditer(data, 0, end):
                    times[int(match[1])].append(at)
                    waiting -= int(match[1]) == last
            unread.clear()


# ---------------------------------------------------------------- the daemon


def resident_mib(pid: int) -> float:
    """Return a process's resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def followed(arguments: argparse.Namespace) -> Iterator[tuple[ModelServer, Host]]:
    """Yield a model server with runs, and a daemon that follows it."""
    server = ModelServer(Authority())
    for number in range(arguments.runs):
        server.put("jobs", job(number))
        server.put("pods", pod(number, report=Report(finished=0, total=10**9)))
    executable = ROOT / "dist" / "fabrik-daemon"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fabrik-bench-")))
        stack.enter_context(server)
        host = stack.enter_context(Host(executable, folder / "shiv", folder / "host", [Cluster(server)]))
        host.start()
        host.settle()
        yield server, host
        host.stop()


def measure(count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what so many subscribers cost."""
    sent = note_what_is_sent()
    with followed(arguments) as (server, host):
        before_mib = resident_mib(host.pid)
        words = ["--socket", str(host.socket), "--count", str(count), "--changes", str(arguments.changes)]
        words += ["--framing", arguments.framing, *(["--deaf"] if arguments.deaf else [])]
        with subprocess.Popen(
            [sys.executable, __file__, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as readers:
            assert readers.stdin
            assert readers.stdout
            assert readers.stdout.readline() == b"connected\n"
            connected_mib, began_s = resident_mib(host.pid), cpu_s(host.pid)
            changing = threading.Thread(target=change_all, args=(server, arguments))
            changing.start()
            told = {} if arguments.deaf else json.loads(readers.stdout.readline())
            changing.join()
            host.settle()
            took_s, after_mib = cpu_s(host.pid) - began_s, resident_mib(host.pid)
            status = host.status()
            readers.stdin.close()
        wait_until(lambda: host.status()["subscribers"] == 0, WAIT_S, "the subscribers are let go")
    deliveries = [at - sent[number] for number, times in items(told) for at in times]
    lasts = [max(times) - sent[number] for number, times in items(told)]
    assert arguments.deaf or len(deliveries) == count * arguments.changes, "each is told of each change once"
    return {
        "subscribers": count,
        "changes": arguments.changes,
        **({} if arguments.deaf else latencies(deliveries, lasts)),
        "cpu_s": round(took_s, 2),
        "mib_before": round(before_mib, 1),
        "mib_connected": round(connected_mib, 1),
        "mib_after": round(after_mib, 1),
        "events_dropped": status["events_dropped"],
    }


def items(told: dict[str, list[float]]) -> list[tuple[int, list[float]]]:
    """Return when each change after the warm-up was read."""
    return [(int(number), times) for number, times in told.items() if int(number) > WARM_UP]


def latencies(deliveries: list[float], lasts: list[float]) -> dict[str, float]:
    """Return percentiles in milliseconds."""
    shares = {"p50": 0.5, "p99": 0.99}
    return {
        **{f"{name}_ms": round(percentile(deliveries, share) * 1000, 3) for name, share in shares.items()},
        **{f"last_{name}_ms": round(percentile(lasts, share) * 1000, 3) for name, share in shares.items()},
    }


def main() -> int:
    """Measure, print, and say with the exit code whether p99 is under its goal with up to 200 subscribers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subscribers", default="1,200,1000", metavar="N,...", help="how many (default: 1,200,1000)")
    parser.add_argument("--changes", type=int, default=300, metavar="N", help="how many (default: 300)")
    parser.add_argument("--rate", type=float, default=10, metavar="N", help="changes a second (default: 10)")
    parser.add_argument("--runs", type=int, default=100, metavar="N", help="runs that they go round (default: 100)")
    parser.add_argument("--framing", choices=tuple(PREFACES), default="lines", help="how they speak (default: lines)")
    parser.add_argument("--deaf", action="store_true", help="let none of them read")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="format (default: table)")
    parser.add_argument("--socket", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.socket:
        subscribe_all(arguments)
        return 0
    results = [measure(int(count), arguments) for count in arguments.subscribers.split(",")]
    one, most = results[0], results[-1]
    further = (most["cpu_s"] - one["cpu_s"]) / max(1, (most["subscribers"] - one["subscribers"]) * one["changes"])
    host = {"python": platform.python_version(), "cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}
    report = {"benchmark": "fanout", "framing": arguments.framing, "rate_per_s": arguments.rate, **host}
    report["cpu_us_per_event_of_a_further_subscriber"] = round(further * 1e6, 1)
    if arguments.output == "json":
        print(json.dumps({**report, "results": results}, indent=2))
    else:
        for result in (report, *results):
            print("  ".join(f"{name} {value}" for name, value in result.items()))
    late = [result for result in results if result["subscribers"] <= 200 and result.get("p99_ms", 0) >= GOAL_S * 1000]
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
