"""The log endpoint of a Pod, as kube-apiserver and kubelet speak it (PodLogOptions), and the ways in which it ends.

`PodLogs` holds what containers printed: for each container its instances, the first before a restart, the last being
the present one. `sinceTime` is cut to whole seconds, as on its way to the kubelet; `previous` reads the instance before
the present one.
"""

from __future__ import annotations

import calendar
import re
import threading
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from fakes_http import Response, refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fakes_http import Exchange, Request

LOOK_S: Final = 0.2
_TIME: Final = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?Z")


class Printed(NamedTuple):
    """One line, and when it was printed."""

    ns: int
    text: bytes


class Instance:
    """One life of a container."""

    def __init__(self) -> None:
        self.lines: list[Printed] = []
        self.ended = False


class Place(NamedTuple):
    """Where a container is."""

    namespace: str
    pod: str
    container: str


class Position(NamedTuple):
    """Where a stream begins."""

    line: int
    generation: int


def parse_ns(text: str) -> int:
    """Return the nanoseconds since 1970 of a time in UTC."""
    match = _TIME.fullmatch(text)
    assert match, text
    seconds = calendar.timegm(tuple(int(part) for part in match.groups()[:6]))
    return seconds * 10**9 + int((match[7] or "0").ljust(9, "0"))


def format_ns(ns: int) -> str:
    """Return a time as the kubelet writes it, zeros at the end left out."""
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ns // 10**9))
    fraction = f"{ns % 10**9:09d}".rstrip("0")
    return f"{text}.{fraction}Z" if fraction else f"{text}Z"


class PodLogs:
    """What the containers of a model's Pods printed."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._containers: dict[Place, list[Instance]] = {}
        self._generation = 0  # streams of an older one are broken off
        self._tail = b""  # the last bytes of those
        self.following = 0  # streams that are open now
        self.refused: list[Response] = []  # what the next requests are told

    def start(self, namespace: str, pod: str, container: str = "smithers") -> None:
        """Begin a container's life, the next one where it had one already."""
        with self._changed:
            instances = self._containers.setdefault(Place(namespace, pod, container), [])
            if instances:
                instances[-1].ended = True
            instances.append(Instance())
            self._changed.notify_all()

    def end(self, namespace: str, pod: str, container: str = "smithers") -> None:
        """End a container's present life."""
        with self._changed:
            self._containers[Place(namespace, pod, container)][-1].ended = True
            self._changed.notify_all()

    def forget(self, namespace: str, pod: str) -> None:
        """Forget a Pod, as when it is deleted; its streams end."""
        with self._changed:
            for place in [place for place in self._containers if place[:2] == (namespace, pod)]:
                self._containers.pop(place)[-1].ended = True
            self._changed.notify_all()

    def write(
        self, namespace: str, pod: str, lines: Sequence[tuple[str, str | bytes]], container: str = "smithers"
    ) -> None:
        """Print lines, each with its time."""
        with self._changed:
            instance = self._containers[Place(namespace, pod, container)][-1]
            encoded = [(when, text if isinstance(text, bytes) else text.encode()) for when, text in lines]
            instance.lines += [Printed(parse_ns(when), text) for when, text in encoded]
            self._changed.notify_all()

    def drop(self, last_words: bytes = b"") -> None:
        """Break every open stream off, `last_words` being its last bytes."""
        with self._changed:
            self._generation += 1
            self._tail = last_words
            self._changed.notify_all()

    def answer(self, exchange: Exchange, namespace: str, pod: str) -> None:
        """Answer one request for a log."""
        request = exchange.seen
        with self._changed:
            refused = self.refused.pop(0) if self.refused else None
            found = refused or self._find(request, namespace, pod)
            lines = [] if isinstance(found, Response) else self._selected(found, request)
            position = 0 if isinstance(found, Response) else len(found.lines)
            generation = self._generation
        if isinstance(found, Response):
            exchange.send(found)
        elif request.query.get("follow") == "true":
            self._stream(exchange, found, lines, Position(position, generation))
        else:
            limit = int(request.query.get("limitBytes") or 2**62)
            body = b"".join(self._line(line, request) for line in lines)[:limit]
            exchange.send(Response(200, body, content_type="text/plain"))

    def _find(self, request: Request, namespace: str, pod: str) -> Instance | Response:
        name = request.query.get("container", "")
        known = [place.container for place in self._containers if place[:2] == (namespace, pod)]
        if not known:
            return refusal(404, "NotFound", f'pods "{pod}" not found', details={"name": pod, "kind": "pods"})
        if name not in known:
            return refusal(400, "BadRequest", f"container {name} is not valid for pod {pod}")
        instances = self._containers[Place(namespace, pod, name)]
        if request.query.get("previous") != "true":
            return instances[-1]
        if len(instances) < 2:
            message = f'previous terminated container "{name}" in pod "{pod}" not found'
            return refusal(400, "BadRequest", message)
        return instances[-2]

    @staticmethod
    def _selected(instance: Instance, request: Request) -> list[Printed]:
        query, lines = request.query, list(instance.lines)
        if "sinceTime" in query:
            since = parse_ns(query["sinceTime"]) // 10**9 * 10**9
            lines = [line for line in lines if line.ns >= since]
        if "sinceSeconds" in query:
            since = time.time_ns() - int(query["sinceSeconds"]) * 10**9
            lines = [line for line in lines if line.ns >= since]
        return lines[-int(query["tailLines"]) :] if "tailLines" in query else lines

    @staticmethod
    def _line(line: Printed, request: Request) -> bytes:
        stamped = request.query.get("timestamps") == "true"
        return (format_ns(line.ns).encode() + b" " if stamped else b"") + line.text + b"\n"

    def _stream(self, exchange: Exchange, instance: Instance, lines: list[Printed], begin: Position) -> None:
        position = begin.line
        with self._changed:
            self.following += 1
            self._changed.notify_all()
        exchange.start_stream("text/plain")
        try:
            while True:
                exchange.send_chunks([self._line(line, exchange.seen) for line in lines])
                with self._changed:
                    lines, position = instance.lines[position:], len(instance.lines)
                    broken = begin.generation != self._generation or exchange.server.api.stopping
                    ended = instance.ended
                    if not lines and not broken and not ended:
                        self._changed.wait(LOOK_S)
                if broken:  # what was printed meanwhile is not sent
                    exchange.hang_up(b"%x\r\n%s\r\n" % (len(self._tail), self._tail) if self._tail else b"")
                    return
                if ended and not lines:
                    exchange.end_stream()
                    return
                if not lines and exchange.client_is_gone():
                    exchange.hang_up()
                    return
        finally:
            with self._changed:
                self.following -= 1
                self._changed.notify_all()
