"""Measures what many subscribers cost: the daemon's processor time, how late a change reaches them, and its memory.

A model API server changes one Pod after the other at a steady rate; the time is taken right before the bytes of a
change are handed to TLS, and again when each subscriber has read its event. The subscribers are one process, the
daemon is the built executable. Processor time is of all that it does, over all deliveries: with few subscribers it is
mostly that of taking changes in. Latencies are of all deliveries together; `last` is that of each change's last one.
With --deaf none of them reads: what is measured then is memory alone.

    .venv/bin/python tests/bench/fanout.py [--subscribers 1,10,100,1000] [--framing lines|websocket|sse] [-o json]
    .venv/bin/python tests/bench/fanout.py --subscribers 1000 --deaf --changes 20000 --rate 1000
"""

from __future__ import annotations

import argparse
import array
import base64
import json
import re
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench.changing import WARM_UP  # noqa: E402 - found through the path above
from bench.measuring import cpu_s, followed, options, percentiles_ms, resident_mb, show  # noqa: E402
from harness import wait_until  # noqa: E402

WAIT_S: Final = 120.0
LAST: Final = "SELECT count(*) AS n FROM runs WHERE progress_finished = ?"
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
    last = WARM_UP + arguments.changes
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
            unread.append((number, time.monotonic(), data))
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


def measure(count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what so many subscribers cost."""
    words = ["--count", str(count), "--changes", str(arguments.changes), "--framing", arguments.framing]
    words += ["--deaf"] if arguments.deaf else []
    with followed(arguments.runs, arguments.rate, arguments.python) as (server, daemon):
        command = [sys.executable, __file__, "--socket", str(daemon.socket_path), *words]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as readers:
            assert readers.stdin
            assert readers.stdout
            assert readers.stdout.readline() == b"connected\n"
            before_s = cpu_s(daemon.pid)
            with server.changes(arguments.changes) as numbers:
                told = {} if arguments.deaf else json.loads(readers.stdout.readline())
            wait_until(lambda: daemon.rows(LAST, numbers[-1])[0]["n"], WAIT_S, "the last change is in the cache")
            used_s, memory_mb = cpu_s(daemon.pid) - before_s, resident_mb(daemon.pid)
            dropped = daemon.ask("status")["events_dropped"]
            readers.stdin.close()
        wait_until(lambda: daemon.ask("status")["subscribers"] == 0, WAIT_S, "the subscribers are let go")
        late = [[at - server.sent[number] for at in told.get(str(number), ())] for number in numbers]
    assert arguments.deaf or all(len(times) == count for times in late), "each is told of each change once"
    return {
        "subscribers": count,
        "cpu_us_per_delivery": round(used_s / count / (WARM_UP + arguments.changes) * 1e6, 1),
        **({} if arguments.deaf else latencies(late)),
        "memory_mb": round(memory_mb, 1),
        "events_dropped": dropped,
    }


def latencies(late: list[list[float]]) -> dict[str, float]:
    """Return percentiles in milliseconds, of each delivery and of each change's last one."""
    shares = {"p50": 0.5, "p99": 0.99}
    last = percentiles_ms([max(times) for times in late], **shares)
    return {
        **percentiles_ms([at for times in late for at in times], **shares),
        **{f"last_{name}": value for name, value in last.items()},
    }


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--subscribers", default="1,10,100,1000", metavar="N,...", help="(default: 1,10,100,1000)")
    parser.add_argument("--changes", type=int, default=100, metavar="N", help="how many (default: 100)")
    parser.add_argument("--rate", type=float, default=10, metavar="N", help="changes a second (default: 10)")
    parser.add_argument("--runs", type=int, default=100, metavar="N", help="runs that they go round (default: 100)")
    parser.add_argument("--framing", choices=tuple(PREFACES), default="lines", help="how they speak (default: lines)")
    parser.add_argument("--deaf", action="store_true", help="let none of them read")
    parser.add_argument("--socket", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.socket:
        subscribe_all(arguments)
        return
    show([measure(int(count), arguments) for count in arguments.subscribers.split(",")], arguments.output)


if __name__ == "__main__":
    main()
