"""Does LAOS's trouble reach a subscriber? Latency from the wire to a subscriber, with LAOS well, away, deaf or wrong.

    python tests/bench/laos.py [--samples N] [--rate N] [--rounds N] [-o json]

A model API server sends changes of pods at a steady rate; a subscriber on the daemon's socket notes when each arrives.
The daemon logs at level debug, pushes metrics each second and is scraped each second, and every change is one of a run
at its human gate, so that alerts are always at stake. In turn: LAOS is not configured; Loki, Alertmanager and
Pushgateway take everything; their ports are closed; they accept and never answer; they answer 500 after a second.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import socket
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from bench.measuring import percentile  # noqa: E402 - found through the path above
from clients import LinesClient  # noqa: E402
from fabrik_objects import Report, job, pod  # noqa: E402
from fakes import Authority, ModelServer  # noqa: E402
from harness import Cluster  # noqa: E402
from hosts import Host  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

RUNS: Final = 50
WARM_S: Final = 3.0  # before measuring, for the daemon to meet LAOS's trouble
SCRAPE_S: Final = 1.0
TIMING: Final = {
    "push": "1s",
    "logBatch": "200ms",
    "alertResend": "1s",
    "laosAnswer": "2s",
    "laosRetryMax": "1s",
    "backoffMin": "200ms",
}
SERVICES: Final = ("loki", "alertmanager", "pushgateway")


class Figures(NamedTuple):
    """What one round measured, in milliseconds."""

    laos: str
    samples: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    requests: int  # that LAOS was sent meanwhile


class Service:
    """All of LAOS in one: it answers every request alike, after a while."""

    def __init__(self, status: int, delay_s: float) -> None:
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                service.requests += 1
                time.sleep(delay_s)
                with suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def do_PUT(self) -> None:
                self.do_POST()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Say nothing."""

        self.requests = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        self.server.shutdown()
        self.server.server_close()


class Nobody:
    """A port behind which nobody answers; where it is closed, nobody is there at all."""

    requests = 0

    def __init__(self, *, is_closed: bool) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = int(self._socket.getsockname()[1])
        if is_closed:
            self._socket.close()

    def close(self) -> None:
        """Let the port go."""
        self._socket.close()


def laos_named(name: str) -> Service | Nobody | None:
    """Return LAOS in the state of a name."""
    if name == "none":
        return None
    if name in ("away", "deaf"):
        return Nobody(is_closed=name == "away")
    return Service(200, 0.0) if name == "well" else Service(500, 1.0)


STATES: Final = ("none", "well", "away", "deaf", "wrong and slow")


@contextmanager
def scraping(address: str) -> Iterator[None]:
    """Scrape the daemon as Prometheus does."""
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(SCRAPE_S):
            connection = http.client.HTTPConnection(address, timeout=10)
            connection.request("GET", "/metrics", headers={"Accept-Encoding": "gzip"})
            connection.getresponse().read()
            connection.close()

    thread = threading.Thread(target=scrape)
    thread.start()
    yield
    over.set()
    thread.join()


def measure(name: str, samples: int, rate: float) -> Figures:
    """Return how long changes take while LAOS is in this state."""
    root = Path(tempfile.mkdtemp(prefix="fabrik-bench-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        server = stack.enter_context(ModelServer(Authority()))
        for number in range(RUNS):
            server.put("jobs", job(number))
        (root / "shiv").mkdir(mode=0o700)
        executable = ROOT / "dist" / "fabrik-daemon"
        host = stack.enter_context(Host(executable, root / "shiv", root / "daemon", [Cluster(server, "A")]))
        settings: dict[str, object] = {"timing": TIMING, "logLevel": "debug", "metrics": {"listen": "127.0.0.1:0"}}
        laos = laos_named(name)
        if laos is not None:
            stack.callback(laos.close)
            service = {"url": f"http://127.0.0.1:{laos.port}"}
            settings["laos"] = {"alerts": "direct", **dict.fromkeys(SERVICES, service)}
        (host.root / "config" / "config.yaml").write_text(json.dumps(settings))
        host.start()
        stack.enter_context(scraping(host.status()["metrics"]))
        client = stack.enter_context(LinesClient(host.socket))
        client.request("subscribe", clusters=["A"], filter={"type": ["run:*"]})
        client.message()
        time.sleep(WARM_S)
        took = latencies(server, client, samples, rate)
        p50, p99, worst = (round(1000 * percentile(took, share), 2) for share in (0.5, 0.99, 1.0))
        return Figures(name, samples, p50, p99, worst, laos.requests if laos else 0)


def latencies(server: ModelServer, client: LinesClient, samples: int, rate: float) -> list[float]:
    """Return how long each change took from the server to the subscriber, in seconds."""
    sent: dict[str, float] = {}
    arrived: dict[str, float] = {}

    def read() -> None:
        while len(arrived) < samples:
            task = str(client.message().get("currentTask"))
            if task in sent:
                arrived[task] = time.monotonic()

    reader = threading.Thread(target=read)
    reader.start()
    began_at = time.monotonic()
    for number in range(samples):
        task = f"{number}:sample"
        report = Report(phase="human-gate", status="blocked", finished=number, total=samples, task=task)
        changed = pod(number % RUNS, report=report)
        sent[task] = time.monotonic()
        server.put("pods", changed)
        time.sleep(max(0.0, began_at + (number + 1) / rate - time.monotonic()))
    reader.join()
    return [at - sent[task] for task, at in arrived.items()]


def main() -> None:
    """Measure in every state and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3, help="the median by p99 is shown")
    parser.add_argument("--rate", type=float, default=200.0, help="changes a second")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    arguments = parser.parse_args()
    rounds = [[measure(name, arguments.samples, arguments.rate) for name in STATES] for _ in range(arguments.rounds)]
    rows = [sorted(of, key=lambda figures: figures.p99_ms)[len(of) // 2] for of in zip(*rounds)]
    if arguments.output == "json":
        print(json.dumps([row._asdict() for row in rows], indent=2))
        return
    print(f"{'LAOS':<16}{'samples':>8}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}{'requests':>10}")
    for row in rows:
        figures = f"{row.p50_ms:>9.2f}{row.p99_ms:>9.2f}{row.max_ms:>9.2f}{row.requests:>10}"
        print(f"{row.laos:<16}{row.samples:>8}{figures}")


if __name__ == "__main__":
    main()
