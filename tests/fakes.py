"""Scripted Kubernetes API servers on loopback, for tests and benchmarks.

    Collection      the objects of one resource and the history of their changes
    KubernetesApi   LIST, WATCH and GET over collections, and every way in which they can fail
    RecordedServer  plays one folder of tests/data/recordings, byte for byte
    ModelServer     holds whatever a test puts into it

The transport is in fakes_http.py, objects to put into a model are in fabrik_objects.py. Every server answers any verb
but GET with 405 and keeps it in `violations`, where the fixture's teardown finds it.
"""

from __future__ import annotations

import base64
import bisect
import json
import re
import time
import uuid
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from fakes_http import (
    Access,
    ApiServer,
    Authority,
    Exchange,
    JsonObject,
    Request,
    Response,
    encode,
    refusal,
    status_object,
)
from fakes_logs import PodLogs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "Access",
    "ApiServer",
    "Authority",
    "Collection",
    "JsonObject",
    "KubernetesApi",
    "ModelServer",
    "RecordedServer",
    "Recording",
    "Request",
    "Response",
    "refusal",
    "status_object",
]

Key = tuple[str, str]  # namespace, name

RECORDINGS: Final = Path(__file__).parent / "data" / "recordings"
KUBE_SYSTEM_UID: Final = "5f0c6f0e-6a0e-4c6e-9a53-0d5f7d7f8a11"
REVIEWS: Final = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
LOOK_S: Final = 0.2  # how often an idle watch looks whether its client is still there


class Resource(NamedTuple):
    """What the API calls one kind of object."""

    prefix: str
    api_version: str
    kind: str
    group: str


RESOURCES: Final = {
    "jobs": Resource("/apis/batch/v1", "batch/v1", "Job", "batch"),
    "cronjobs": Resource("/apis/batch/v1", "batch/v1", "CronJob", "batch"),
    "pods": Resource("/api/v1", "v1", "Pod", ""),
    "persistentvolumeclaims": Resource("/api/v1", "v1", "PersistentVolumeClaim", ""),
    "events": Resource("/api/v1", "v1", "Event", ""),
}


# ---------------------------------------------------------------- objects and their changes


class Selector(NamedTuple):
    """What a request asks for: a namespace, labels and fields, equal or unequal."""

    namespace: str
    labels: tuple[tuple[str, str, str], ...] = ()
    fields: tuple[tuple[str, str, str], ...] = ()

    def matches(self, obj: JsonObject) -> bool:
        """Tell whether an object is asked for."""
        metadata = obj.get("metadata", {})
        if self.namespace and metadata.get("namespace") != self.namespace:
            return False
        labels = metadata.get("labels") or {}
        by_label = all((labels.get(key) == value) == (op != "!=") for key, op, value in self.labels)
        return by_label and all((_field(obj, key) == value) == (op != "!=") for key, op, value in self.fields)


def _field(obj: JsonObject, path: str) -> str:
    value: Any = obj
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return "" if value is None else str(value)


def parse_selector(text: str) -> tuple[tuple[str, str, str], ...]:
    """Return the requirements of `a=b,c!=d`; a bare key asks for a label that is there and is not supported."""
    found = (re.fullmatch(r"([^=!]+)(==?|!=)(.*)", part) for part in text.split(",") if part)
    return tuple((match[1], match[2], match[3]) for match in found if match)


class Change(NamedTuple):
    """One step in a resource's history."""

    version: int
    type: str
    object: JsonObject
    line: bytes  # as it goes over the wire
    before: JsonObject | None = None
    cut: int = 0  # where in `line` a chunk of the recording ended, if one did

    def chunks_for(self, selector: Selector) -> list[bytes]:
        """Return what a watch with this selector sees of it, as chunks of the stream."""
        line = self._line_for(selector)
        return [chunk for chunk in (line[: self.cut], line[self.cut :]) if chunk]

    def _line_for(self, selector: Selector) -> bytes:
        """Return the event or nothing; to this watch, an object that leaves its selection is DELETED."""
        if self.type == "BOOKMARK":
            return self.line
        was = self.before is not None and selector.matches(self.before)
        now = self.type != "DELETED" and selector.matches(self.object)
        if not was and not now:
            return b""
        seen = ("MODIFIED" if was else "ADDED") if now else "DELETED"
        return self.line if seen == self.type else event_line(seen, self.object)


def event_line(kind: str, obj: JsonObject) -> bytes:
    """Return one line of a watch stream."""
    return encode({"type": kind, "object": obj}) + b"\n"


def key_of(obj: JsonObject) -> Key:
    """Return an object's namespace and name."""
    return obj["metadata"].get("namespace", ""), obj["metadata"].get("name", "")


class Collection:
    """The objects of one resource, and how they came to be."""

    def __init__(self, resource: str, objects: Iterable[JsonObject] = ()) -> None:
        """Begin with these objects and no history."""
        self.resource = RESOURCES[resource]
        self.objects = {key_of(obj): obj for obj in objects}
        self.log: list[Change] = []
        self.compacted = 0  # the oldest version a watch may start from

    def apply(self, change: Change) -> None:
        """Take a change in."""
        if change.type != "BOOKMARK":
            key = key_of(change.object)
            change = change._replace(before=self.objects.get(key))
            if change.type == "DELETED":
                self.objects.pop(key, None)
            else:
                self.objects[key] = change.object
        self.log.append(change)

    def position_after(self, version: int) -> int:
        """Return where in the log the first change newer than `version` stands."""
        return bisect.bisect_right([change.version for change in self.log], version)

    def select(self, selector: Selector) -> list[JsonObject]:
        """Return the objects asked for, ordered as the store orders them."""
        return [obj for _, obj in sorted(self.objects.items(), key=lambda item: item[0]) if selector.matches(obj)]

    def bookmark(self, version: int, *, initial_end: bool = False) -> Change:
        """Return a bookmark in the odd form that the API server gives it."""
        metadata: JsonObject = {"resourceVersion": str(version)}
        if initial_end:
            metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
        shell = {"kind": self.resource.kind, "apiVersion": self.resource.api_version, "metadata": metadata}
        if self.resource.kind in {"Job", "Pod"}:
            shell.update({"spec": {"containers": None} if self.resource.kind == "Pod" else {}, "status": {}})
        return Change(version, "BOOKMARK", shell, event_line("BOOKMARK", shell))


# ---------------------------------------------------------------- LIST and WATCH


class Failure(NamedTuple):
    """An answer that comes in place of the right one."""

    response: Response
    resource: str  # or nothing: any
    verb: str  # list, watch, or nothing: any


class Watch(NamedTuple):
    """One open watch."""

    resource: str
    namespace: str
    number: int


_ROUTE: Final = re.compile(
    r"(?P<prefix>/apis/batch/v1|/api/v1)(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<resource>jobs|cronjobs|pods|persistentvolumeclaims|events)(?:/(?P<name>[^/]+)(?P<log>/log)?)?"
)
_INSIDE: Final = re.compile(r"/api/v1/namespaces/[^/]+/pods/(?P<pod>[^/]+)/(?P<what>proxy/status|exec)")
_TOO_OLD_CONTINUE: Final = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new list without "
    "the continue parameter, or use the continue token in this response to retrieve the remainder of the results."
)


class KubernetesApi(ApiServer):
    """LIST, WATCH and GET over collections, as kube-apiserver speaks them, and the ways in which they fail.

    `initial_events` says how it meets sendInitialEvents: "refuse" (422, a server without WatchList), "ignore" (a server
    that does not know the parameter) or "stream". `pages_at_zero`: a server without watch cache, which honours `limit`
    at resource version "0" too.
    """

    initial_events = "refuse"
    pages_at_zero = False

    def __init__(
        self, authority: Authority | None = None, *, token: str = "", certificate_required: bool = False
    ) -> None:
        """Begin with empty collections."""
        super().__init__(authority, token=token, certificate_required=certificate_required)
        self.collections = {name: Collection(name) for name in RESOURCES}
        self.logs = PodLogs(self.changed)  # what the pods' containers printed
        self.uid = KUBE_SYSTEM_UID
        self.proxied: dict[str, Response] = {}  # "pod:port" -> what its /status answers
        self.files: dict[str, bytes] = {}  # Pod -> what exec prints of a file; it must be allowed by `writable`
        self.others: dict[str, JsonObject] = {}  # what else is read, by path
        self.denied: set[str] = set()  # rights that a review denies: "list jobs", "get pods/log"
        self.expired_in_stream = True  # how a watch is told that its version is too old: ERROR event, else HTTP 410
        self.watches: set[Watch] = set()
        self._failures: list[Failure] = []
        self._refused_resources: dict[str, int] = {}
        self._pages: dict[str, tuple[int, list[JsonObject]]] = {}
        self._held = False
        self._generation = 0  # watches of an older generation end
        self._clean_end = True
        self._last_words = b""
        self._watch_number = 0

    def version(self, resource: str) -> int:
        """Return the newest version that a list of this resource may claim."""
        raise NotImplementedError

    # -- what a test does to it

    def fail_next(self, count: int, response: Response, *, resource: str = "", verb: str = "") -> None:
        """Answer the next `count` requests (of that resource and verb) so."""
        with self.changed:
            self._failures += [Failure(response, resource, verb)] * count

    def refuse(self, resource: str, status: int = 403) -> None:
        """Refuse a resource from now on; status 0 allows it again. Open watches stay open, as on a real server."""
        with self.changed:
            self._refused_resources[resource] = status

    def hold(self) -> None:
        """Accept everything and say nothing, also on open watches, until `resume`."""
        with self.changed:
            self._held = True

    def resume(self) -> None:
        """Undo `hold`."""
        with self.changed:
            self._held = False
            self.changed.notify_all()

    def end_watches(self, *, clean: bool = True, last_words: bytes = b"") -> None:
        """End every open watch: by a closing chunk, else by a broken connection, `last_words` being its last bytes."""
        with self.changed:
            self._generation += 1
            self._clean_end, self._last_words = clean, last_words
            self.changed.notify_all()

    def bookmark(self) -> None:
        """Send a bookmark on every open watch."""
        with self.changed:
            for name, collection in self.collections.items():
                collection.apply(collection.bookmark(self.version(name)))
            self.changed.notify_all()

    def compact(self) -> None:
        """Forget the history: versions before now and continue tokens are too old from here on."""
        with self.changed:
            for name, collection in self.collections.items():
                collection.compacted = self.version(name)
            self.expire_continue()

    def expire_continue(self) -> None:
        """Make every continue token handed out so far too old."""
        self._pages = {token: (-1, items) for token, (_, items) in self._pages.items()}

    # -- what it answers

    def answer(self, exchange: Exchange) -> None:
        """Find out what is asked for, and answer or stream it."""
        request = exchange.seen
        self._wait_while_held()
        if request.path == REVIEWS:
            exchange.send(self._review(exchange.document()))
            return
        inside = _INSIDE.fullmatch(request.path)
        if inside:
            self._inside(exchange, inside["pod"], inside["what"])
            return
        route = _ROUTE.fullmatch(request.path)
        if not route or RESOURCES[route["resource"]].prefix != route["prefix"]:
            exchange.send(self.other(request.path))
            return
        resource = route["resource"]
        fault = self._fault(resource, "watch" if request.is_watch else "list") or self._version_fault(request, resource)
        if fault:
            exchange.send(fault)
        elif route["log"]:
            self.logs.answer(exchange, route["namespace"] or "", route["name"])
        elif route["name"]:
            exchange.send(self._one(resource, (route["namespace"] or "", route["name"])))
        else:
            query = request.query
            fields = parse_selector(query.get("fieldSelector", ""))
            selector = Selector(route["namespace"] or "", parse_selector(query.get("labelSelector", "")), fields)
            if request.is_watch:
                self._watch(exchange, resource, selector)
            else:
                exchange.send(self.list_page(request, resource, selector))

    def _wait_while_held(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not self._held or self.stopping)

    def _inside(self, exchange: Exchange, pod: str, what: str) -> None:
        """Answer for a Pod itself: its sidecar, or a command in it."""
        pod = unquote(pod)
        if what == "proxy/status":
            exchange.send(self.proxied.get(pod) or refusal(404, "NotFound", f'pods "{pod}" not found'))
        elif pod in self.files:
            output = self.files[pod]
            status = {"kind": "Status", "status": "Success"} if output else status_object(500, "", "command terminated")
            exchange.send_messages([b"\1", b"\2", b"\1" + output, b"\3" + encode(status)])
        else:
            exchange.send(refusal(404, "NotFound", f'pods "{pod}" not found'))

    def _review(self, review: JsonObject) -> Response:
        asked = review["spec"]["resourceAttributes"]
        part = f"/{asked['subresource']}" if "subresource" in asked else ""
        allowed = f"{asked['verb']} {asked['resource']}{part}" not in self.denied
        return Response(201, encode({**review, "status": {"allowed": allowed}}))

    def other(self, path: str) -> Response:
        if path.rstrip("/") == "/version":
            _, body, _ = parse_response((RECORDINGS / "15-refusals" / "get-version.http").read_bytes())
            return Response(200, body)
        if path == "/api/v1/namespaces/kube-system":
            metadata = {"name": "kube-system", "uid": self.uid, "resourceVersion": "4"}
            namespace = {"kind": "Namespace", "apiVersion": "v1", "metadata": metadata, "status": {"phase": "Active"}}
            return Response(200, encode(namespace))
        if path in self.others:
            return Response(200, encode(self.others[path]))
        return refusal(404, "NotFound", "the server could not find the requested resource", details={})

    def _fault(self, resource: str, verb: str) -> Response | None:
        with self.changed:
            for failure in self._failures:
                if failure.resource in {"", resource} and failure.verb in {"", verb}:
                    self._failures.remove(failure)
                    return failure.response
            status = self._refused_resources.get(resource)
        if not status:
            return None
        group = RESOURCES[resource].group
        name = f"{resource}.{group}" if group else resource
        message = (
            f'{name} is forbidden: User "fabrik-daemon" cannot {verb} resource "{resource}" in API group "{group}"'
        )
        return refusal(status, "Forbidden", message, details={"group": group, "kind": resource})

    def _version_fault(self, request: Request, resource: str) -> Response | None:
        """Return what a version that cannot be, or is not yet, is told; a watch from a later one just waits."""
        text = request.query.get("resourceVersion") or "0"
        if not text.isdigit():
            message = f'resourceVersion: Invalid value: "{text}": strconv.ParseUint: parsing "{text}": invalid syntax'
            listed = refusal(400, "BadRequest", f"invalid resource version: {message}")
            return refusal(500, "", message) if request.is_watch else listed
        with self.changed:
            newest = self.version(resource)
        if request.is_watch or int(text) <= newest:
            return None
        message = f"Timeout: Too large resource version: {text}, current: {newest}"
        cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
        details = {"causes": [cause], "retryAfterSeconds": 1}
        return refusal(504, "Timeout", message, details=details)._replace(headers={"Retry-After": "1"})

    def _one(self, resource: str, key: Key) -> Response:
        with self.changed:
            obj = self.collections[resource].objects.get(key)
        if obj is None:
            return refusal(404, "NotFound", f'{resource} "{key[1]}" not found', details={"name": key[1]})
        return Response(200, encode(obj))

    def list_page(self, request: Request, resource: str, selector: Selector) -> Response:
        """Return a LIST, or the page of one that is asked for."""
        token = request.query.get("continue", "")
        limit = int(request.query.get("limit") or 0)
        if request.query.get("resourceVersion") == "0" and not self.pages_at_zero:
            limit = 0
        with self.changed:
            if not token:
                version, items = self.version(resource), self.collections[resource].select(selector)
            elif token in self._pages:
                version, items = self._pages[token]
                if version < 0:
                    return self._expired_token(resource, items)
            else:
                return refusal(400, "BadRequest", "invalid continue token: continue key is not valid")
            metadata: JsonObject = {"resourceVersion": str(version)}
            if 0 < limit < len(items):
                metadata["continue"] = self._new_page(version, items[limit:])
                metadata["remainingItemCount"] = len(items) - limit
        return self.list_response(resource, metadata, items[:limit] if limit else items)

    def list_response(self, resource: str, metadata: JsonObject, items: Iterable[JsonObject]) -> Response:
        """Return a list; its items lose kind and apiVersion, as on a real server."""
        names = RESOURCES[resource]
        bare = [{key: value for key, value in item.items() if key not in {"kind", "apiVersion"}} for item in items]
        head = {"kind": f"{names.kind}List", "apiVersion": names.api_version}
        return Response(200, encode({**head, "metadata": metadata, "items": bare}))

    def _new_page(self, version: int, items: Sequence[JsonObject]) -> str:
        token = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        self._pages[token] = (version, list(items))
        return token

    def _expired_token(self, resource: str, rest: Sequence[JsonObject]) -> Response:
        """Return the 410 whose own token leads to the rest as it is now."""
        objects = self.collections[resource].objects
        now = [objects[key_of(obj)] for obj in rest if key_of(obj) in objects]
        status = status_object(410, "Expired", _TOO_OLD_CONTINUE)
        status["metadata"] = {"continue": self._new_page(self.version(resource), now)}
        return Response(410, encode(status))

    def _watch(self, exchange: Exchange, resource: str, selector: Selector) -> None:
        query = exchange.seen.query
        initial = query.get("sendInitialEvents") == "true"
        if initial and self.initial_events == "refuse":
            exchange.send(_no_watch_list())
            return
        text = query.get("resourceVersion", "")
        with self.changed:
            collection = self.collections[resource]
            from_nothing = text in {"", "0"} or (initial and self.initial_events == "stream")
            start = self.version(resource) if from_nothing else int(text)
            cursor = Cursor(resource, selector, start, collection.position_after(start), self._generation)
            expired = start < collection.compacted
            chunks = [event_line("ADDED", obj) for obj in collection.select(selector)] if from_nothing else []
            if from_nothing and self.initial_events == "stream" and query.get("allowWatchBookmarks") == "true":
                chunks.append(collection.bookmark(start, initial_end=True).line)
        status = status_object(410, "Expired", f"too old resource version: {start} ({collection.compacted})")
        if expired and not self.expired_in_stream:
            exchange.send(Response(410, encode(status)))
            return
        exchange.start_stream()
        if expired:
            exchange.send_chunks([event_line("ERROR", status)])
            exchange.end_stream()
            return
        exchange.send_chunks(chunks)
        self._stream(exchange, cursor)

    def _stream(self, exchange: Exchange, cursor: Cursor) -> None:
        """Send changes as they come, until a test, the client or the time limit ends it."""
        deadline = time.monotonic() + float(exchange.seen.query.get("timeoutSeconds") or 3600)
        with self.changed:
            self._watch_number += 1
            watch = Watch(cursor.resource, cursor.selector.namespace, self._watch_number)
            self.watches.add(watch)
            self.changed.notify_all()
        try:
            while time.monotonic() < deadline:
                with self.changed:
                    chunks, cursor = ([], cursor) if self._held else cursor.read(self.collections[cursor.resource])
                    ended = self.stopping or cursor.generation != self._generation
                    if not chunks and not ended:
                        self.changed.wait(LOOK_S)
                exchange.send_chunks(chunks)
                if self.stopping or (ended and not self._clean_end):
                    exchange.hang_up(self._last_words)
                    return
                if ended:
                    break
                if not chunks and exchange.client_is_gone():
                    exchange.hang_up()
                    return
            exchange.end_stream()
        finally:
            with self.changed:
                self.watches.discard(watch)
                self.changed.notify_all()


class Cursor(NamedTuple):
    """How far a watch has read."""

    resource: str
    selector: Selector
    start: int
    position: int
    generation: int

    def read(self, collection: Collection) -> tuple[list[bytes], Cursor]:
        """Return the chunks that came since, and where the next ones begin."""
        new = collection.log[self.position :]
        fresh = [change for change in new if change.type == "BOOKMARK" or change.version > self.start]
        chunks = [chunk for change in fresh for chunk in change.chunks_for(self.selector)]
        return chunks, self._replace(position=self.position + len(new))


def _no_watch_list() -> Response:
    """Return what a server without the WatchList feature says to sendInitialEvents."""
    detail = "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled"
    cause = {"reason": "FieldValueForbidden", "message": f"Forbidden: {detail}", "field": "sendInitialEvents"}
    message = f'ListOptions.meta.k8s.io "" is invalid: sendInitialEvents: Forbidden: {detail}'
    details = {"group": "meta.k8s.io", "kind": "ListOptions", "causes": [cause]}
    return refusal(422, "Invalid", message, details=details)


# ---------------------------------------------------------------- a recording


def parse_response(raw: bytes) -> tuple[int, bytes, list[bytes]]:
    """Return the status, body and chunks of a recorded HTTP response; one that breaks off yields its whole chunks."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    if b"transfer-encoding: chunked" not in head.lower():
        return status, rest, []
    chunks: list[bytes] = []
    while True:
        size, found, rest = rest.partition(b"\r\n")
        length = int(size, 16) if found else 0
        if not length or len(rest) < length:
            return status, b"".join(chunks), chunks
        chunks.append(rest[:length])
        rest = rest[length + 2 :]


class Timed(NamedTuple):
    """One recorded event."""

    at: float  # seconds since the start of the scenario
    change: Change


class Recording:
    """One folder of tests/data/recordings."""

    def __init__(self, scenario: str) -> None:
        """Read the folder."""
        self.folder = RECORDINGS / scenario
        self.meta: JsonObject = json.loads((self.folder / "meta.json").read_text())
        self.events: dict[str, list[Timed]] = {name: [] for name in RESOURCES}
        self.lists: dict[tuple[str, str, str], bytes] = {}  # by path, label selector and continue token
        self.items: dict[str, list[JsonObject]] = {name: [] for name in RESOURCES}
        self.versions: dict[str, int] = {}
        for entry in self.meta["requests"]:
            if entry["kind"] == "list" and entry["status"] == 200 and not entry.get("note"):
                self._add_list(entry)
            elif entry["kind"] == "watch":
                self._add_watch(entry)
        newest = max(self.versions.values(), default=1)
        self.versions = {name: self.versions.get(name, newest) for name in RESOURCES}

    def raw(self, file: str) -> bytes:
        """Return one recorded response."""
        return (self.folder / file).read_bytes()

    def _add_list(self, entry: JsonObject) -> None:
        parts = urlsplit(entry["request_line"].split(" ")[1])
        query = dict(parse_qsl(parts.query))
        raw = self.raw(entry["file"])
        self.lists[parts.path, query.get("labelSelector", ""), query.get("continue", "")] = raw
        body = json.loads(parse_response(raw)[1])
        names = RESOURCES[entry["resource"]]
        kind = {"kind": names.kind, "apiVersion": names.api_version}
        known = {key_of(item) for item in self.items[entry["resource"]]}
        self.items[entry["resource"]] += [{**kind, **item} for item in body["items"] if key_of(item) not in known]
        self.versions.setdefault(entry["resource"], int(body["metadata"]["resourceVersion"]))

    def _add_watch(self, entry: JsonObject) -> None:
        _, body, chunks = parse_response(self.raw(entry["file"]))
        times = [json.loads(line)["t"] for line in self.raw(entry["jsonl"]).splitlines()]
        edges = list(accumulate(len(chunk) for chunk in chunks))
        start = 0
        for at, line in zip(times, body.splitlines(keepends=True)):
            event = json.loads(line)
            version = int(event["object"]["metadata"]["resourceVersion"])
            end = start + len(line)
            cut = next((edge - start for edge in edges if start < edge < end), 0)
            change = Change(version, event["type"], event["object"], line, cut=cut)
            self.events[entry["resource"]].append(Timed(at, change))
            start = end


class RecordedServer(KubernetesApi):
    """Plays one recording: what was recorded before `release(t)`, and nothing of what came later."""

    def __init__(
        self,
        scenario: str,
        authority: Authority | None = None,
        *,
        token: str = "",
        certificate_required: bool = False,
    ) -> None:
        """Load the scenario; nothing is released yet."""
        super().__init__(authority, token=token, certificate_required=certificate_required)
        self.recording = Recording(scenario)
        self.collections = {name: Collection(name, items) for name, items in self.recording.items.items()}
        for name, collection in self.collections.items():
            collection.compacted = self.recording.versions[name]
        self._waiting = {name: list(timed) for name, timed in self.recording.events.items()}
        self._expire_next_continue = False

    @property
    def expect(self) -> JsonObject:
        """What meta.json says a correct client shows."""
        expected: JsonObject = self.recording.meta["expect"]
        return expected

    def release(self, until: float) -> None:
        """Let every event recorded before `until` go out on the watches."""
        with self.changed:
            for name, waiting in self._waiting.items():
                count = sum(timed.at < until for timed in waiting)
                for timed in waiting[:count]:
                    self.collections[name].apply(timed.change)
                del waiting[:count]
            self.changed.notify_all()

    def release_all(self) -> None:
        """Let everything go out."""
        self.release(float("inf"))

    def version(self, resource: str) -> int:
        """Return the newest version released, but none that an event of this resource yet to come has already."""
        seen = [change.version for collection in self.collections.values() for change in collection.log[-1:]]
        newest = max([self.recording.versions[resource], *seen])
        waiting = self._waiting[resource]
        return min(newest, waiting[0].change.version - 1) if waiting else newest

    def expire_next_continue(self) -> None:
        """Answer the next continue token with the recorded 410."""
        self._expire_next_continue = True

    def list_page(self, request: Request, resource: str, selector: Selector) -> Response:
        """Answer with the recorded bytes where they still tell the truth."""
        query = request.query
        token = query.get("continue", "")
        if token and self._expire_next_continue:
            self._expire_next_continue = False
            return self._recorded_410()
        recorded = self.recording.lists.get((request.path, query.get("labelSelector", ""), token), b"")
        is_page = token or b'"continue":"' in recorded[:2048]
        wants_page = "limit" in query and (self.pages_at_zero or query.get("resourceVersion") != "0")
        if recorded and self._is_as_recorded(resource) and not selector.fields and (wants_page or not is_page):
            return Response(200, recorded, raw=True)
        return super().list_page(request, resource, selector)

    def _recorded_410(self) -> Response:
        """Return the answer to an expired token; the token that it offers leads to the rest."""
        raw = self.recording.raw("list-jobs-page2-expired.http")
        offered = json.loads(parse_response(raw)[1])["metadata"]["continue"]
        first_page = parse_response(self.recording.raw("list-jobs-page1.http"))[1]
        rest = self.recording.items["jobs"][len(json.loads(first_page)["items"]) :]
        self._pages[offered] = (self.version("jobs"), rest)
        return Response(410, raw, raw=True)

    def _is_as_recorded(self, resource: str) -> bool:
        unchanged = not self.collections[resource].log
        return unchanged and self.version(resource) == self.recording.versions[resource]


# ---------------------------------------------------------------- a model


class ModelServer(KubernetesApi):
    """Holds what a test puts into it; one resource version counts for all resources."""

    def __init__(self, authority: Authority | None = None, *, token: str = "", initial_events: str = "refuse") -> None:
        """Begin empty."""
        super().__init__(authority, token=token)
        self.initial_events = initial_events
        self._version = 1000

    def version(self, resource: str) -> int:
        """Return the newest version."""
        return self._version

    def put(self, resource: str, obj: JsonObject) -> int:
        """Add or change an object; return its new resource version."""
        with self.changed:
            collection = self.collections[resource]
            return self._commit(collection, "MODIFIED" if key_of(obj) in collection.objects else "ADDED", obj)

    def delete(self, resource: str, namespace: str, name: str) -> int:
        """Remove an object; return the version of its end."""
        with self.changed:
            collection = self.collections[resource]
            return self._commit(collection, "DELETED", collection.objects[namespace, name])

    def rewind(self, version: int, uid: str = KUBE_SYSTEM_UID) -> None:
        """Go back to a lower version without history: a restored store or, with another uid, another cluster."""
        with self.changed:
            self._version = version
            self.uid = uid
            for collection in self.collections.values():
                collection.log.clear()
        self.end_watches(clean=False)

    def _commit(self, collection: Collection, kind: str, obj: JsonObject) -> int:
        self._version += 1
        names = collection.resource
        metadata = {**obj["metadata"], "resourceVersion": str(self._version)}
        obj = {"kind": names.kind, "apiVersion": names.api_version, **obj, "metadata": metadata}
        collection.apply(Change(self._version, kind, obj, event_line(kind, obj)))
        self.changed.notify_all()
        return self._version
