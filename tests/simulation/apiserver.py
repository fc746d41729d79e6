"""A model of kube-apiserver and its store, after the recordings: revisions, watch cache, pages, bookmarks, refusals."""

from __future__ import annotations

import base64
import bisect
import email.utils
import json
import urllib.parse
import uuid
import zlib
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Final, NamedTuple

import fabrik_daemon
from simulation.world import Violation

if TYPE_CHECKING:
    from collections.abc import Generator

    from simulation.world import SimStream, World

JsonObject = dict[str, Any]
Key = tuple[str, str, str]  # resource, namespace, name
GROUPS: Final = {"jobs": "/apis/batch/v1", "cronjobs": "/apis/batch/v1"}
BOOKMARK_S: Final = 60.0
REQUESTS_MAX: Final = 200  # within 10 s: ten watches that begin, and their pages
STALE_S: Final = 15.0  # how old the memory may be that answers resource version "0"
REASONS: Final = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 410: "Gone"}


class Version:
    """One state of one object; `truth` says what it means, for the oracle."""

    __slots__ = ("_facts", "body", "key", "raw", "revision", "truth", "uid")

    def __init__(self, key: Key, revision: int, raw: JsonObject, truth: Any) -> None:
        self.key = key
        self.revision = revision
        self.raw = raw
        self.truth = truth
        self.uid: str = raw["metadata"]["uid"]
        self.body = _with_version(raw, revision)
        self._facts: Any = self

    @property
    def facts(self) -> fabrik_daemon.Facts | None:
        if self._facts is self:
            self._facts = fabrik_daemon.facts_from(self.key[0], self.raw)
        facts: fabrik_daemon.Facts | None = self._facts
        return facts


class Happened(NamedTuple):
    """One event in the store's log."""

    revision: int
    key: Key
    line: bytes


class Lineage:
    """What happened to one store, until it was restored from an older state or made anew."""

    def __init__(self) -> None:
        self.history: dict[Key, list[tuple[int, Version | None]]] = {}
        self.log: list[Happened] = []
        self.revisions: list[tuple[float, int]] = []  # when the store was at which revision

    def at(self, revision: int, resource: str, namespace: str) -> list[Version]:
        """Return the objects of a collection as they were, by name."""
        found = []
        for key in sorted(self.history):
            if key[0] == resource and namespace in ("", key[1]):
                version = None
                for since, state in self.history[key]:
                    if since > revision:
                        break
                    version = state
                if version is not None:
                    found.append(version)
        return found

    def revision_at(self, when: float) -> int:
        place = bisect.bisect_right(self.revisions, (when, 1 << 62))
        return self.revisions[max(0, place - 1)][1]

    def fork(self, revision: int, now: float) -> Lineage:
        """Return the same store as it was at a revision."""
        other = Lineage()
        for key, states in self.history.items():
            kept = [state for state in states if state[0] <= revision]
            if kept:
                other.history[key] = kept
        other.log = [event for event in self.log if event.revision <= revision]
        other.revisions = [(now, revision)]
        return other


class Traits(NamedTuple):
    """What kind of server this is."""

    streaming: str = "yes"  # refused, or ignored
    bookmarks: bool = True
    http_410: bool = False  # in place of an ERROR event
    gzip: bool = False


class Refusal(NamedTuple):
    """How the server answers for a while, whatever is asked."""

    code: int
    body: bytes
    content_type: str = "application/json"
    retry_after: int | None = None


class Watch(NamedTuple):
    """An open watch."""

    peer: Peer
    resource: str
    namespace: str
    since: int
    bookmarks: bool
    future: bool


class ApiServer:
    """One API server and its store."""

    def __init__(self, world: World, name: str, traits: Traits) -> None:
        self.world = world
        self.name = name
        self.traits = traits
        self.uid = self.new_uid()
        self.revision = world.chance.randint(1000, 9000)
        self.lineage = Lineage()
        self.lineages = [self.lineage]
        self.lineage.revisions.append((world.now, self.revision))
        self.objects: dict[Key, Version] = {}
        self.timeline: dict[Key, list[tuple[float, Version | None]]] = {}  # what was there when, restores included
        self.uids: dict[str, list[Version]] = {}  # every state an object ever had
        self.deleted_at: dict[str, float] = {}
        self.window_start = self.revision
        # A restored store counts on from a lower revision. A watch from before that resumes when the count has passed
        # its own version gets what came later in the new history, and nothing in the protocol tells the two apart:
        # until it lists, at the latest when all is listed anew, it may show what the restoring undid. (etcd's guide
        # has who restores bump the revision for this reason.)
        self.overtaken: set[tuple[str, str]] = set()  # resource and namespace
        self._listed: set[tuple[str, str]] = set()  # ever
        self._unlisted: set[tuple[str, str]] = set()  # of those, not since the restoring
        self.epochs = 0
        self.disturbed: list[tuple[float, float]] = []  # when something may have gone unseen
        self.token = "token-0"
        self.shared: list[str] = []  # namespaces with the run that other places have too
        self.answer: Refusal | None = None
        self.forbidden: set[tuple[str, str]] = set()
        self.is_hung = False
        self.store_is_down = False
        self.expires_all = False
        self.cuts_lists = 0.0  # chance that a list is cut off
        self.peers: dict[Peer, None] = {}
        self.watches: dict[Peer, Watch] = {}
        self._requests: list[float] = []  # when, the last ones
        self._lives: list[Generator[float, None, None]] = []

    def new_uid(self) -> str:
        return str(uuid.UUID(int=self.world.chance.getrandbits(128)))

    # Objects

    def live(self, life: Generator[float, None, None]) -> None:
        """Let a life's steps happen, each after the time it asks for."""
        self._lives.append(life)
        self._next(life)

    def _next(self, life: Generator[float, None, None]) -> None:
        if life not in self._lives:
            return
        if self.store_is_down:
            self.world.after(5, partial(self._next, life))  # nothing can be written
            return
        delay = next(life, None)
        if delay is None:
            self._lives.remove(life)
        else:
            self.world.after(delay, partial(self._next, life))

    def end_lives(self) -> None:
        self._lives.clear()

    def put(self, key: Key, raw: JsonObject, truth: Any) -> None:
        """Add or change an object."""
        self._bump(self.world.chance.choice((1, 1, 2, 4)))
        kind = "MODIFIED" if key in self.objects else "ADDED"
        version = self.objects[key] = Version(key, self.revision, raw, truth)
        self.uids.setdefault(version.uid, []).append(version)
        self._record(key, version)
        self._emit(key, kind, version.body)

    def delete(self, key: Key) -> None:
        """Delete an object, if it is there."""
        last = self.objects.pop(key, None)
        if last is not None:
            self._bump(1)
            self.deleted_at[last.uid] = self.world.now
            self._record(key, None)
            self._emit(key, "DELETED", _with_version(last.raw, self.revision))

    def _bump(self, by: int) -> None:
        self.revision += by
        self.lineage.revisions.append((self.world.now, self.revision))

    def grow(self, by: int) -> None:
        """Let so much else happen in the store."""
        self._bump(by)

    def _record(self, key: Key, version: Version | None) -> None:
        self.lineage.history.setdefault(key, []).append((self.revision, version))
        self.timeline.setdefault(key, []).append((self.world.now, version))

    def _emit(self, key: Key, kind: str, body: bytes) -> None:
        line = _line(kind, body)
        self.lineage.log.append(Happened(self.revision, key, line))
        for watch in list(self.watches.values()):
            if watch.resource == key[0] and watch.namespace in ("", key[1]) and self.revision > watch.since:
                watch.peer.chunk(line)

    # Trouble

    def restart(self) -> None:
        """Come back with an empty watch cache."""
        self.window_start = self.revision

    def restore(self, revision: int) -> None:
        """Have the state that the store had at a revision, and go on from there."""
        self.end_lives()
        self._unlisted |= self._listed
        self.lineage = self.lineage.fork(revision, self.world.now)
        self._begin_again(revision)

    def rebuild(self) -> None:
        """Be another, empty cluster."""
        self.end_lives()
        self.lineage = Lineage()
        self.uid = self.new_uid()
        self.lineage.revisions.append((self.world.now, 10))
        self._begin_again(10)

    def _begin_again(self, revision: int) -> None:
        self.epochs += 1
        self.lineages.append(self.lineage)
        self.revision = self.window_start = revision
        before = self.objects
        states = {key: states[-1][1] for key, states in self.lineage.history.items()}
        self.objects = {key: version for key, version in states.items() if version is not None}
        for key in sorted({*before, *self.objects}):
            version = self.objects.get(key)
            if version is not before.get(key):
                self.timeline[key].append((self.world.now, version))
        for key, version in before.items():
            if key not in self.objects or self.objects[key].uid != version.uid:
                self.deleted_at[version.uid] = self.world.now
        for version in self.objects.values():
            self.deleted_at.pop(version.uid, None)

    def compact(self) -> None:
        self.window_start = self.revision

    # Connections

    def accept(self, stream: SimStream) -> Peer:
        peer = Peer(self, stream)
        self.peers[peer] = None
        return peer

    def request(self, peer: Peer, target: str, headers: dict[str, str]) -> None:
        self._requests = [when for when in self._requests if when > self.world.now - 10] + [self.world.now]
        if len(self._requests) > REQUESTS_MAX and "continue=" not in target:
            raise Violation(f"{self.name}: {len(self._requests)} requests within 10 s, now {target}")
        if self.is_hung:
            return
        parts = urllib.parse.urlsplit(target)
        query = dict(urllib.parse.parse_qsl(parts.query))
        if self.answer is not None:
            refusal = self.answer
            peer.respond(refusal.code, refusal.body, refusal.content_type, refusal.retry_after)
        elif headers.get("authorization") != f"Bearer {self.token}":
            peer.refuse(401, "Unauthorized", "Unauthorized")
        elif parts.path == "/api/v1/namespaces/kube-system":
            peer.respond(200, json.dumps({"metadata": {"name": "kube-system", "uid": self.uid}}).encode())
        else:
            self._collection(peer, parts.path, query, gzip="gzip" in headers.get("accept-encoding", ""))

    def _collection(self, peer: Peer, path: str, query: dict[str, str], *, gzip: bool) -> None:
        *front, resource = path.split("/")
        namespace = front[-1] if front[-2:-1] == ["namespaces"] else ""
        if (resource, namespace) in self.forbidden:
            peer.refuse(403, "Forbidden", f'{resource} is forbidden: User "sim" cannot list resource "{resource}"')
        elif query.get("watch") == "true":
            self._watch(peer, resource, namespace, query)
        else:
            self._list(peer, resource, namespace, query, gzip=gzip)

    # Lists

    def _list(self, peer: Peer, resource: str, namespace: str, query: dict[str, str], *, gzip: bool) -> None:
        asked, token = query.get("resourceVersion", ""), query.get("continue", "")
        limit, start = int(query.get("limit", "0")), ""
        revision = self.revision
        if self.store_is_down and asked != "0":
            body = _status(504, "Timeout", "Timeout: request did not complete within the allotted timeout")
            self.world.after(60, partial(peer.respond, 504, body, "text/plain"))
            return
        if token:
            revision, start = json.loads(base64.b64decode(token))
            if self.expires_all or revision < self.window_start:
                said = "The provided continue parameter is too old to display a consistent list result."
                peer.refuse(410, "Expired", said)
                return
        elif asked and asked != "0" and int(asked) > self.revision:
            message = f"Timeout: Too large resource version: {asked}, current: {self.revision}"
            details = {"causes": [{"reason": "ResourceVersionTooLarge"}], "retryAfterSeconds": 1}
            body = _status(504, "Timeout", message, details)
            self.world.after(3, partial(peer.respond, 504, body, "application/json", 1))
            return
        elif asked:
            oldest = self.lineage.revision_at(self.world.now - STALE_S)
            revision = self.world.chance.randint(max(min(int(asked), revision), min(oldest, revision)), revision)
            limit = 0  # it comes from memory, whole
        versions = self.lineage.at(revision, resource, namespace)
        self._note_listed(resource, namespace)
        self._answer_list(peer, versions, (revision, start, limit), gzip=gzip)

    def _note_listed(self, resource: str, namespace: str) -> None:
        self._listed.add((resource, namespace))
        self._unlisted.discard((resource, namespace))
        self.overtaken.discard((resource, namespace))

    def _answer_list(self, peer: Peer, versions: list[Version], page: tuple[int, Any, int], *, gzip: bool) -> None:
        revision, start, limit = page
        if start:
            versions = [version for version in versions if list(version.key[1:]) > start]
        metadata: JsonObject = {"resourceVersion": str(revision)}
        if limit and len(versions) > limit:
            versions = versions[:limit]
            after = list(versions[-1].key[1:])
            metadata["continue"] = base64.b64encode(json.dumps([revision, after]).encode()).decode()
        head = b'{"kind":"List","apiVersion":"v1","metadata":%s,"items":[' % json.dumps(metadata).encode()
        body = head + b",".join(version.body for version in versions) + b"]}\n"
        packed = zlib.compressobj(1, zlib.DEFLATED, 31) if gzip and self.traits.gzip else None
        if packed is not None:
            body = packed.compress(body) + packed.flush()
        if self.cuts_lists and self.world.chance.random() < self.cuts_lists:
            peer.respond_partly(body, gzip=packed is not None)
        else:
            peer.respond(200, body, encoding="gzip" if packed is not None else "")

    # Watches

    def _watch(self, peer: Peer, resource: str, namespace: str, query: dict[str, str]) -> None:
        asked, streamed = query.get("resourceVersion", ""), "sendInitialEvents" in query
        if streamed and self.traits.streaming == "refused":
            peer.refuse(422, "Invalid", 'ListOptions.meta.k8s.io "" is invalid: sendInitialEvents: Forbidden')
            return
        since = int(asked) if asked else 0
        too_old = self.expires_all or since < self.window_start
        if since and too_old and self.traits.http_410:
            peer.refuse(410, "Expired", f"too old resource version: {since} ({self.window_start})")
            return
        peer.open_watch()
        if self.store_is_down:
            return  # it says 200 and nothing
        if since and too_old:
            message = f"too old resource version: {since} ({self.window_start})"
            peer.chunk(_line("ERROR", _status(410, "Expired", message)))
            peer.finish()
            return
        if not since:
            self._send_initial(peer, resource, namespace, query)
            since = self.revision
        else:
            self._note_resumed(resource, namespace, since)
            for event in self.lineage.log[bisect.bisect_right(self.lineage.log, (since, ("~", "", ""), b"")) :]:
                if event.key[0] == resource and namespace in ("", event.key[1]):
                    peer.chunk(event.line)
        if peer.is_over:
            return
        bookmarks = self.traits.bookmarks and query.get("allowWatchBookmarks") == "true"
        watch = Watch(peer, resource, namespace, since, bookmarks, since > self.revision)
        self.watches[peer] = watch
        seconds = float(query.get("timeoutSeconds", "1800"))
        self.world.after(seconds, partial(self._end, watch))
        if bookmarks:
            self.world.after(seconds - 2, partial(self._bookmark, watch, again=False))
            self.world.after(self.world.chance.uniform(0.97, 1.02) * BOOKMARK_S, partial(self._bookmark, watch))

    def _note_resumed(self, resource: str, namespace: str, since: int) -> None:
        if (resource, namespace) in self._unlisted and since <= self.revision:
            self.overtaken.add((resource, namespace))

    def _send_initial(self, peer: Peer, resource: str, namespace: str, query: dict[str, str]) -> None:
        """Send what there is, in any order, then what happened meanwhile, then the bookmark that ends it."""
        self._note_listed(resource, namespace)
        asked = query.get("resourceVersion", "")
        behind = self.world.chance.uniform(0, STALE_S) if self.world.chance.random() < 0.3 else 0.0
        revision = min(self.revision, self.lineage.revision_at(self.world.now - behind))
        versions = self.lineage.at(revision, resource, namespace)
        self.world.chance.shuffle(versions)
        lines = [_line("ADDED", version.body) for version in versions]
        if asked != "0":
            lines += [
                event.line
                for event in self.lineage.log
                if event.revision > revision and event.key[0] == resource and namespace in ("", event.key[1])
            ]
        if self.traits.streaming == "yes":
            lines.append(_bookmark_line(self.revision, initial=True))
        if self.cuts_lists and self.world.chance.random() < self.cuts_lists:
            for line in lines[: self.world.chance.randint(0, len(lines) - 1)] if lines else ():
                peer.chunk(line)
            peer.cut()
            return
        if len(lines) > 1 and self.world.chance.random() < 0.3:
            for line in lines:
                peer.chunk(line)
        elif lines:
            peer.chunk(b"".join(lines))

    def _bookmark(self, watch: Watch, *, again: bool = True) -> None:
        if self.watches.get(watch.peer) is not watch:
            return
        if self.revision >= watch.since and not self.is_hung and not self.store_is_down:
            watch.peer.chunk(_bookmark_line(self.revision))
        if again:
            self.world.after(BOOKMARK_S, partial(self._bookmark, watch))

    def _end(self, watch: Watch) -> None:
        if self.watches.get(watch.peer) is watch and not self.is_hung:
            watch.peer.finish()


class Peer:
    """The server's end of a connection."""

    def __init__(self, server: ApiServer, stream: SimStream) -> None:
        self._server = server
        self.stream = stream
        self._received = b""
        self.is_over = False

    def receive(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received and not self.is_over:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            line, *rest = head.decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in rest)}
            request = partial(self._server.request, self, line.split(" ")[1], headers)
            self._server.world.after(
                self._server.world.chance.uniform(0.0005, 0.02), partial(self._unless_over, request)
            )

    def _unless_over(self, call: Callable[[], None]) -> None:
        if not self.is_over:
            call()

    def close(self) -> None:
        self.is_over = True
        self._server.peers.pop(self, None)
        self._server.watches.pop(self, None)

    def cut(self, how: str = "") -> None:
        """Break the connection off: an end, with or without a piece of a chunk before it, or a reset."""
        how = how or self._server.world.chance.choice(("end", "mid-chunk", "mid-line", "reset"))
        if self in self._server.watches and how == "mid-chunk":
            line = _bookmark_line(self._server.revision)
            self.stream.deliver(
                (b"%x\r\n%s\r\n" % (len(line), line))[: self._server.world.chance.randint(1, len(line))]
            )
        elif self in self._server.watches and how == "mid-line":
            line = _bookmark_line(self._server.revision)[: self._server.world.chance.randint(1, 60)]
            self.stream.deliver(b"%x\r\n%s\r\n" % (len(line), line))
        if how == "reset":
            self.stream.reset()
        else:
            self.stream.end()
        self.close()

    def finish(self) -> None:
        """End a chunked response."""
        self._server.watches.pop(self, None)
        self._write(b"0\r\n\r\n")

    def chunk(self, data: bytes) -> None:
        if data and not self._server.is_hung:
            self._write(b"%x\r\n%s\r\n" % (len(data), data))

    def open_watch(self) -> None:
        self._write(self._head(200, "application/json", ["Transfer-Encoding: chunked"]))

    def refuse(self, code: int, reason: str, message: str) -> None:
        self.respond(code, _status(code, reason, message))

    def respond(
        self,
        code: int,
        body: bytes,
        content_type: str = "application/json",
        retry_after: int | None = None,
        encoding: str = "",
    ) -> None:
        more = [f"Retry-After: {retry_after}"] if retry_after is not None else []
        more += [f"Content-Encoding: {encoding}"] if encoding else []
        if code == 200 and self._server.world.chance.random() < 0.5:
            cut = self._server.world.chance.randint(0, len(body))
            chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:cut], body[cut:]) if part)
            self._write(self._head(code, content_type, [*more, "Transfer-Encoding: chunked"]) + chunks + b"0\r\n\r\n")
        else:
            self._write(self._head(code, content_type, [*more, f"Content-Length: {len(body)}"]) + body)

    def respond_partly(self, body: bytes, *, gzip: bool) -> None:
        more = ["Content-Encoding: gzip"] if gzip else []
        cut = self._server.world.chance.randint(0, len(body) - 1)
        self._write(self._head(200, "application/json", [*more, f"Content-Length: {len(body)}"]) + body[:cut])
        self.cut()

    def _head(self, code: int, content_type: str, more: list[str]) -> bytes:
        date = email.utils.formatdate(self._server.world.wall(), usegmt=True)
        lines = [f"HTTP/1.1 {code} {REASONS.get(code, 'No')}", f"Content-Type: {content_type}", f"Date: {date}", *more]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def _write(self, data: bytes) -> None:
        if not self.is_over:
            self.stream.deliver(data)


def _with_version(raw: JsonObject, revision: int) -> bytes:
    return json.dumps({**raw, "metadata": {**raw["metadata"], "resourceVersion": str(revision)}}).encode()


def _line(kind: str, body: bytes) -> bytes:
    return b'{"type":"%s","object":%s}\n' % (kind.encode(), body)


def _bookmark_line(revision: int, *, initial: bool = False) -> bytes:
    metadata: JsonObject = {"resourceVersion": str(revision)}
    if initial:
        metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
    return _line("BOOKMARK", json.dumps({"metadata": metadata, "spec": {"containers": None}, "status": {}}).encode())


def _status(code: int, reason: str, message: str, details: JsonObject | None = None) -> bytes:
    said: JsonObject = {"kind": "Status", "status": "Failure", "message": message, "reason": reason, "code": code}
    return json.dumps({**said, "details": details} if details else said).encode()
