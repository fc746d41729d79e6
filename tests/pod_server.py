"""The API server of benchmarks: a process of its own that serves runs and sends their pods' changes.

The changes are those of a recorded Pod, ids, names, versions and progress made to vary; they are bytes before the
clock starts, so that the server costs little while a client is measured.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import fabrik_objects
from fakes import RECORDINGS, ModelServer, Selector, parse_response
from fakes_http import Access, Authority, Exchange

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from typing_extensions import Self

RECORDED: Final = RECORDINGS / "01-happy-path" / "watch-pods.http"
FIRST_VERSION: Final = 1_000_000
WRITE_BYTES: Final = 1 << 20
_PROGRESS: Final = re.compile(rb'\\"finished\\":\d+,\\"total\\":\d+')
_VERSION: Final = re.compile(rb'"resourceVersion":"\d+"')
_TASK: Final = b'"fabrik.dev/task":"16:impl"'


class Work(NamedTuple):
    """What the server is to send."""

    runs: int
    events: int
    whole: bool = False  # the Pod as recorded, 10 KB; else without its init containers, 5 KB

    def lines(self) -> Iterator[bytes]:
        """Yield the events, each one line; the last one's task is `last`."""
        templates = [_of_run(recorded_event(self.whole), number) for number in range(self.runs)]
        for number in range(self.events):
            line = _VERSION.sub(b'"resourceVersion":"%d"' % (FIRST_VERSION + number), templates[number % self.runs], 1)
            said = rb"\"finished\":%d,\"total\":%d" % (number // self.runs, self.events)
            line = _PROGRESS.sub(said.replace(b"\\", b"\\\\"), line, 1)
            yield line.replace(_TASK, b'"fabrik.dev/task":"last"') if number == self.events - 1 else line


def recorded_event(whole: bool) -> bytes:
    """Return one MODIFIED event of a running Pod, as a real API server sent it."""
    line = parse_response(RECORDED.read_bytes())[2][9]
    if whole:
        return line
    event = json.loads(line)
    pod = event["object"]
    del pod["spec"]["initContainers"], pod["status"]["initContainerStatuses"]
    del pod["metadata"]["managedFields"][0]
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


def _of_run(line: bytes, number: int) -> bytes:
    event = json.loads(line)
    made, pod = fabrik_objects.pod(number)["metadata"], event["object"]["metadata"]
    old, new = pod["labels"]["fabrik.dev/run-id"].encode(), made["labels"]["fabrik.dev/run-id"].encode()
    line = line.replace(old, new).replace(
        pod["name"].replace(old.decode(), new.decode()).encode(), made["name"].encode()
    )
    line = line.replace(pod["uid"].encode(), made["uid"].encode())
    return line.replace(pod["ownerReferences"][0]["uid"].encode(), made["ownerReferences"][0]["uid"].encode())


class _PodServer(ModelServer):
    """Serves the runs; the watches of pods send what was made beforehand, when told to."""

    def __init__(self, authority: Authority, work: Work) -> None:
        super().__init__(authority, token="a-bearer-token")
        self.go = threading.Event()
        self.body = b"".join(b"%x\r\n%s\r\n" % (len(line), line) for line in work.lines())
        for number in range(work.runs):
            self.put("jobs", fabrik_objects.job(number))
            self.put("pods", fabrik_objects.pod(number, report=fabrik_objects.Report(task="0:impl")))

    def _watch(self, exchange: Exchange, resource: str, selector: Selector) -> None:
        if resource != "pods" or "sendInitialEvents" in exchange.seen.query:
            super()._watch(exchange, resource, selector)
            return
        exchange.start_stream()
        self.go.wait()
        for start in range(0, len(self.body), WRITE_BYTES):
            exchange.wfile.write(self.body[start : start + WRITE_BYTES])
        while not exchange.client_is_gone():
            time.sleep(0.1)


def _serve(work: Work, kubeconfig: Path, ours: Connection) -> None:
    with _PodServer(Authority(), work) as server:
        server.kubeconfig(kubeconfig, Access(auth="token"))
        ours.send(server.port)
        while ours.recv() == "go":
            server.go.set()


class PodServer:
    """That server in a process of its own, and the kubeconfig that reaches it."""

    def __init__(self, work: Work, folder: Path) -> None:
        """Prepare it; entering starts it."""
        self._kubeconfig = folder / "pods.kubeconfig"
        processes = multiprocessing.get_context("spawn")
        self._server, theirs = processes.Pipe()
        self._process = processes.Process(target=_serve, args=(work, self._kubeconfig, theirs))

    def __enter__(self) -> Self:
        """Start it and wait until it listens."""
        self._process.start()
        self._server.recv()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._process.kill()
        self._process.join()

    def go(self) -> None:
        """Send the changes on every watch of pods."""
        self._server.send("go")

    def kubeconfig(self, path: Path, _access: Any = None) -> Path:
        """Write the kubeconfig there."""
        path.write_bytes(self._kubeconfig.read_bytes())
        return path
