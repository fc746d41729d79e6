"""The API servers of benchmarks: one that kubectl can talk to, and a process that serves runs and their changes.

The changes are those of a recorded Pod, with ids, names, and what each report changes: version, progress, and when, in
its annotation and in managedFields. They are bytes before the clock starts, and so are the items of lists, so that the
server costs little while a client is measured.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import re
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import fabrik_objects
from fakes import RECORDINGS, RESOURCES, JsonObject, ModelServer, Selector, parse_response
from fakes_http import Access, Authority, Exchange, Request, Response, encode
from tables import table_of_event, table_of_list, wants_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.connection import Connection
    from pathlib import Path

    from typing_extensions import Self

RECORDED: Final = RECORDINGS / "01-happy-path" / "watch-pods.http"
FIRST_VERSION: Final = 1_000_000
WRITE_BYTES: Final = 1 << 20
SCHEDULES: Final = 5
_PROGRESS: Final = re.compile(rb'\\"finished\\":\d+,\\"total\\":\d+')
_VERSION: Final = re.compile(rb'"resourceVersion":"\d+"')
_REPORTED: Final = re.compile(rb'("fabrik\.dev/updated":"|"manager":"smithers",[^{}]*"time":")[^"]*')
_TASK: Final = b'"fabrik.dev/task":"16:impl"'


def _resource(name: str, singular: str, kind: str) -> JsonObject:
    verbs = ["get", "list", "watch"]
    return {"name": name, "singularName": singular, "namespaced": True, "kind": kind, "verbs": verbs}


def _resources(version: str, *resources: JsonObject) -> JsonObject:
    return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}


_BATCH: Final = {"groupVersion": "batch/v1", "version": "v1"}
_DISCOVERY: Final[dict[str, JsonObject]] = {
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {
        "kind": "APIGroupList",
        "apiVersion": "v1",
        "groups": [{"name": "batch", "versions": [_BATCH], "preferredVersion": _BATCH}],
    },
    "/api/v1": _resources("v1", _resource("pods", "pod", "Pod")),
    "/apis/batch/v1": _resources("batch/v1", _resource("jobs", "job", "Job")),
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
            line = _REPORTED.sub(rb"\g<1>%s" % fabrik_objects.time_text(number // self.runs).encode(), line)
            yield line.replace(_TASK, b'"fabrik.dev/task":"last"') if number == self.events - 1 else line

    def pods(self) -> Iterator[JsonObject]:
        """Yield each run's Pod as it is before the changes."""
        for number in range(self.runs):
            yield json.loads(_of_run(recorded_event(self.whole), number))["object"]


@functools.lru_cache(maxsize=2)
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


class KubectlServer(ModelServer):
    """A model that kubectl can talk to: it says what there is, and makes tables of lists."""

    def other(self, path: str) -> Response:
        """Tell what there is, too."""
        found = _DISCOVERY.get(path)
        return Response(200, encode(found)) if found else super().other(path)

    def list_page(self, request: Request, resource: str, selector: Selector) -> Response:
        """Return a list as it is asked for."""
        response = super().list_page(request, resource, selector)
        if response.status == 200 and wants_table(request):
            return response._replace(body=table_of_list(response.body))
        return response


class _PodServer(KubectlServer):
    """Serves the runs; the watches of pods send what was made beforehand, when told to."""

    def __init__(self, authority: Authority, work: Work, opened: Callable[[], None]) -> None:
        super().__init__(authority, token="a-bearer-token")
        self.go = threading.Event()
        self.uid = work.uid
        self._opened = opened
        self._items: dict[str, bytes] = {}
        self._lines = list(work.lines())
        self._body = _chunks(self._lines)
        for number in range(work.runs):
            self.put("jobs", fabrik_objects.job(number))
        for pod in work.pods():
            self.put("pods", pod)
        for number in range(SCHEDULES):
            self.put("cronjobs", fabrik_objects.cronjob(f"schedule-{number}"))

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
        if resource != "pods" or "sendInitialEvents" in exchange.seen.query or not self._lines:
            super()._watch(exchange, resource, selector)
            return
        body = self._body
        if wants_table(exchange.seen):
            body = _chunks(table_of_event(line, first=not number) for number, line in enumerate(self._lines))
        exchange.start_stream()
        self._opened()
        self.go.wait()
        for start in range(0, len(body), WRITE_BYTES):
            exchange.wfile.write(body[start : start + WRITE_BYTES])
        while not exchange.client_is_gone():
            time.sleep(0.1)


def _chunks(lines: Iterable[bytes]) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(line), line) for line in lines)


def _serve(work: Work, kubeconfig: Path, ours: Connection) -> None:
    with _PodServer(Authority(), work, lambda: ours.send("watched")) as server:
        for resource in ("pods", "jobs"):  # makes the items' bytes
            server.list_page(Request("GET", "", {}, {}, 0.0), resource, Selector(""))
        server.kubeconfig(kubeconfig, Access(auth="token"))
        ours.send("listens")
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
        assert self._server.recv() == "listens"
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._process.kill()
        self._process.join()

    def is_watched(self, timeout_s: float) -> bool:
        """Wait until a client has opened a watch of pods; tell whether one has."""
        return self._server.poll(timeout_s) and self._server.recv() == "watched"

    def go(self) -> None:
        """Send the changes on every watch of pods."""
        self._server.send("go")

    def kubeconfig(self, path: Path, _access: Any = None) -> Path:
        """Write the kubeconfig there."""
        path.write_bytes(self.path.read_bytes())
        return path
