"""The API server of benchmarks: a process of its own that serves runs and sends their pods' changes.

The changes are those of a recorded Pod, ids, names, versions and progress made to vary; they are bytes before the
clock starts, and so are the items of lists, so that the server costs little while a client is measured.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import fabrik_objects
from fakes import RECORDINGS, RESOURCES, JsonObject, ModelServer, Selector, parse_response
from fakes_http import Access, Authority, Exchange, Request, Response, encode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from multiprocessing.connection import Connection
    from pathlib import Path

    from typing_extensions import Self

RECORDED: Final = RECORDINGS / "01-happy-path" / "watch-pods.http"
FIRST_VERSION: Final = 1_000_000
WRITE_BYTES: Final = 1 << 20
_PROGRESS: Final = re.compile(rb'\\"finished\\":\d+,\\"total\\":\d+')
_VERSION: Final = re.compile(rb'"resourceVersion":"\d+"')
_TASK: Final = b'"fabrik.dev/task":"16:impl"'


_VERBS: Final = ["get", "list", "watch"]
_PODS: Final = {"name": "pods", "singularName": "pod", "namespaced": True, "kind": "Pod", "verbs": _VERBS}
_DISCOVERY: Final[dict[str, JsonObject]] = {
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
    "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [_PODS]},
}


class Work(NamedTuple):
    """What the server is to send."""

    runs: int
    events: int = 0
    uid: str = "00000000-0000-4000-8000-000000000001"  # of kube-system
    whole: bool = False  # the Pod as recorded, 10 KB; else without its init containers, 5 KB

    def lines(self) -> Iterator[bytes]:
        """Yield the events, each one line; the last one's task is `last`."""
        templates = [_of_run(recorded_event(self.whole), number) for number in range(min(self.runs, self.events))]
        for number in range(self.events):
            template = templates[number % len(templates)]
            line = _VERSION.sub(b'"resourceVersion":"%d"' % (FIRST_VERSION + number), template, 1)
            said = rb"\"finished\":%d,\"total\":%d" % (number // self.runs, self.events)
            line = _PROGRESS.sub(said.replace(b"\\", b"\\\\"), line, 1)
            yield line.replace(_TASK, b'"fabrik.dev/task":"last"') if number == self.events - 1 else line

    def pods(self) -> Iterator[JsonObject]:
        """Yield each run's Pod as it is before the changes."""
        for number in range(self.runs):
            yield json.loads(_of_run(recorded_event(self.whole), number))["object"]


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
    pod = json.loads(line)["object"]["metadata"]
    made = fabrik_objects.pod(number)["metadata"]
    old, new = pod["labels"]["fabrik.dev/run-id"].encode(), made["labels"]["fabrik.dev/run-id"].encode()
    name = pod["name"].replace(old.decode(), new.decode()).encode()
    line = line.replace(old, new).replace(name, made["name"].encode())
    line = line.replace(pod["uid"].encode(), made["uid"].encode())
    return line.replace(pod["ownerReferences"][0]["uid"].encode(), made["ownerReferences"][0]["uid"].encode())


class _PodServer(ModelServer):
    """Serves the runs; the watches of pods send what was made beforehand, when told to."""

    def __init__(self, authority: Authority, work: Work) -> None:
        super().__init__(authority, token="a-bearer-token")
        self.go = threading.Event()
        self.uid = work.uid
        self._items: dict[str, bytes] = {}
        self.body = b"".join(b"%x\r\n%s\r\n" % (len(line), line) for line in work.lines())
        for number in range(work.runs):
            self.put("jobs", fabrik_objects.job(number))
        for pod in work.pods():
            self.put("pods", pod)

    def other(self, path: str) -> Response:
        """Tell kubectl what there is, too."""
        found = _DISCOVERY.get(path)
        return Response(200, encode(found)) if found else super().other(path)

    def list_response(self, resource: str, metadata: JsonObject, items: Iterable[JsonObject]) -> Response:
        """Return a list as the model does, its items' bytes made once."""
        names = RESOURCES[resource]
        head = encode({"kind": f"{names.kind}List", "apiVersion": names.api_version, "metadata": metadata, "items": []})
        return Response(200, head[:-2] + b",".join(self._bytes_of(item) for item in items) + b"]}")

    def _bytes_of(self, item: JsonObject) -> bytes:
        key = item["metadata"]["uid"]
        if key not in self._items:
            self._items[key] = encode(
                {name: value for name, value in item.items() if name not in {"kind", "apiVersion"}}
            )
        return self._items[key]

    def _watch(self, exchange: Exchange, resource: str, selector: Selector) -> None:
        if resource != "pods" or "sendInitialEvents" in exchange.seen.query or not self.body:
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
        for resource in ("pods", "jobs"):  # makes the items' bytes
            server.list_page(Request("GET", "", {}, {}, 0.0), resource, Selector(""))
        server.kubeconfig(kubeconfig, Access(auth="token"))
        ours.send(server.port)
        while ours.recv() == "go":
            server.go.set()


class PodServer:
    """That server in a process of its own, and the kubeconfig that reaches it."""

    def __init__(self, work: Work, folder: Path, name: str = "pods") -> None:
        """Prepare it; entering starts it."""
        self.path = folder / f"{name}.kubeconfig"
        processes = multiprocessing.get_context("spawn")
        self._server, theirs = processes.Pipe()
        self._process = processes.Process(target=_serve, args=(work, self.path, theirs))

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
        path.write_bytes(self.path.read_bytes())
        return path
