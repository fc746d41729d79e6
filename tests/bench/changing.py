"""A server whose runs are changed one after the other at a steady rate, and which notes when each change went out.

It is a process of its own, so that its threads and its client's do not wait for each other; times are of the
monotonic clock, which all processes share.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from typing import TYPE_CHECKING, Any, Final

import fakes_http
from fabrik_objects import Report, job, pod
from harness import wait_until
from pod_server import KubectlServer
from tables import table_of_event, wants_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from multiprocessing.connection import Connection
    from pathlib import Path

    from typing_extensions import Self

WARM_UP: Final = 100  # changes before those that are measured: the first ones grow memory
PATIENCE_S: Final = 120.0


def note_what_is_sent() -> dict[int, float]:
    """Have every watch of a model server note when a change is about to be sent, by its number; make tables, too."""
    sent: dict[int, float] = {}
    send = fakes_http.Exchange.send_chunks

    def send_chunks(self: fakes_http.Exchange, chunks: Iterable[bytes]) -> None:
        listed = list(chunks)
        if wants_table(self.seen):
            listed = [table_of_event(chunk, first=True) for chunk in listed]
        numbers = [number_in(chunk) for chunk in listed]
        now = time.monotonic()
        sent.update((number, now) for number in numbers if number is not None)
        send(self, listed)

    fakes_http.Exchange.send_chunks = send_chunks  # type: ignore[method-assign]
    return sent


def number_in(chunk: bytes) -> int | None:
    """Return the number of the change in an event of a watch, None where there is none."""
    _, found, rest = chunk.partition(b'\\"finished\\":')
    return int(rest.partition(b",")[0]) if found else None


def change(server: KubectlServer, runs: int, rate: float, numbers: range) -> None:
    """Make these changes, one each `1 / rate` seconds, whatever becomes of those before."""
    begun_at = time.monotonic()
    for place, number in enumerate(numbers, 1):
        time.sleep(max(0.0, begun_at + place / rate - time.monotonic()))
        server.put("pods", pod(number % runs, report=Report(task=f"{number}:impl", finished=number, total=10**9)))


def _serve(runs: int, rate: float, kubeconfig: Path, ours: Connection) -> None:
    """Be the server: make the changes that are asked for, and say when they were sent; None ends it."""
    sent = note_what_is_sent()
    server = KubectlServer(fakes_http.Authority(), token="a-bearer-token")
    for number in range(runs):
        server.put("jobs", job(number))
        server.put("pods", pod(number, report=Report(task="0:impl", finished=0, total=10**9)))
    with server:
        server.kubeconfig(kubeconfig, fakes_http.Access(auth="token"))
        ours.send("listens")
        numbers: range | None = ours.recv()
        while numbers is not None:
            with server.changed:
                server.changed.wait_for(lambda: any(watch.resource == "pods" for watch in server.watches), PATIENCE_S)
            ours.send("watched")
            change(server, runs, rate, numbers)
            last = numbers[-1]
            wait_until(lambda last=last: last in sent, PATIENCE_S, "the last change is sent")  # type: ignore[misc]
            ours.send({number: sent[number] for number in numbers if number in sent})
            numbers = ours.recv()
        ours.send(server.violations)


class ChangingServer:
    """That server, and the kubeconfig that reaches it."""

    def __init__(self, runs: int, rate: float, folder: Path) -> None:
        """Prepare it, with runs that changes go round; entering starts it."""
        self.path = folder / "changing.kubeconfig"
        self.made = 0  # changes so far
        self.sent: dict[int, float] = {}  # when each was sent, time.monotonic(), by its number
        processes = multiprocessing.get_context("spawn")
        self._server, theirs = processes.Pipe()
        self._process = processes.Process(target=_serve, args=(runs, rate, self.path, theirs))

    def __enter__(self) -> Self:
        """Start it and wait until it listens."""
        self._process.start()
        assert self._server.recv() == "listens"
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End it; nobody may have asked it for anything but GET."""
        try:
            if kind is None:
                self._server.send(None)
                violations = self._server.recv()
                assert not violations, f"something else than GET was asked for: {violations}"
        finally:
            self._process.kill()
            self._process.join()

    def kubeconfig(self, path: Path, _access: Any = None) -> Path:
        """Write the kubeconfig there."""
        path.write_bytes(self.path.read_bytes())
        return path

    @contextlib.contextmanager
    def changes(self, count: int) -> Iterator[range]:
        """Make so many while the block runs, after a warm-up; yield the numbers of those that are measured.

        They begin when somebody watches pods. Behind the block `sent` has their times.
        """
        first = self.made + 1
        self.made += WARM_UP + count
        self._server.send(range(first, self.made + 1))
        assert self._server.recv() == "watched"
        yield range(first + WARM_UP, self.made + 1)
        self.sent.update(self._server.recv())
