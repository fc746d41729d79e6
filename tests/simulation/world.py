"""The simulated clock and network, and what stands in for the daemon's reactor and streams."""

from __future__ import annotations

import heapq
import itertools
import random
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Final

import fabrik_daemon

if TYPE_CHECKING:
    from simulation.apiserver import ApiServer, Peer

EPOCH: Final = datetime(2026, 11, 23, 12, 0, tzinfo=timezone.utc).timestamp()
SPLIT_CHANCE: Final = 0.12  # of what a server writes to arrive in pieces


class Crash(BaseException):
    """The daemon's process dies here; nothing of it may catch this."""


class Violation(BaseException):
    """The daemon did what it must not; nothing of it may catch this."""


class World:
    """The clock and all that is to come, in order. One seed gives one world."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.now = 1000.0  # monotonic
        self.hosts: dict[str, Host] = {}
        self.say: Callable[[str], None] | None = None
        self._queue: list[tuple[float, int, Callable[[], object], SimReactor | None]] = []
        self._order = itertools.count()

    def wall(self) -> float:
        return EPOCH + self.now

    def at(self, when: float, call: Callable[[], object], owner: SimReactor | None = None) -> None:
        """Call at a time; what the daemon's process owns dies and sleeps with it."""
        heapq.heappush(self._queue, (max(when, self.now), next(self._order), call, owner))

    def after(self, delay: float, call: Callable[[], object]) -> None:
        self.at(self.now + delay, call)

    def step(self) -> None:
        self.now, _, call, owner = heapq.heappop(self._queue)
        if owner is None:
            call()
        else:
            owner.take(call)

    def run_until(self, end: float) -> None:
        self.at(end, int)
        while self.now < end:
            self.step()

    def note(self, text: str) -> None:
        if self.say is not None:
            self.say(f"{self.now - 1000:9.3f} {text}")


class SimReactor:
    """Stands in for the daemon's Reactor: the same calls, on the simulated clock."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.is_closed = False
        self._running = False
        self.is_asleep = False
        self._deferred: list[Callable[[], object]] = []
        self._on_sleep: Callable[[], None] = lambda: None

    def now(self) -> float:
        return self.world.now

    def call_at(self, at: float, callback: Callable[[], None]) -> fabrik_daemon.Timer:
        timer = fabrik_daemon.Timer(at, callback)

        def fire() -> None:
            if timer.callback is not None:
                timer.callback()

        self.world.at(at, fire, self)
        return timer

    def call_later(self, delay: float, callback: Callable[[], None]) -> fabrik_daemon.Timer:
        return self.call_at(self.world.now + delay, callback)

    def call_soon(self, callback: Callable[[], object]) -> None:
        self.world.at(self.world.now, callback, self)

    def call_every(self, seconds: float, work: Callable[[], None]) -> None:
        def turn() -> None:
            self.call_later(seconds, turn)
            work()

        self.call_later(seconds, turn)

    def run_blocking(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        def finish() -> None:
            try:
                result = work()
            except Exception as error:  # noqa: BLE001 - as the pool's futures do
                done(None, error)
            else:
                done(result, None)

        self.world.at(self.world.now + self.world.chance.uniform(0.001, 0.05), finish, self)

    def watch_sleep(self, _seconds: float, callback: Callable[[], None]) -> None:
        self._on_sleep = callback

    def take(self, call: Callable[[], object]) -> None:
        if self.is_closed:
            return
        if self.is_asleep:
            self._deferred.append(call)
            return
        try:
            call()
        except Exception as error:
            raise Violation(f"a callback of the daemon failed: {error!r}") from error

    def sleep(self) -> None:
        """Let the host sleep: the world goes on, the daemon does not."""
        self.is_asleep = True

    def wake(self) -> None:
        """Let the host wake up; what happened meanwhile is found at once."""
        if not self.is_asleep:
            return
        self.is_asleep = False
        deferred, self._deferred = self._deferred, []
        for call in (self._on_sleep, *deferred):
            self.take(call)

    def run(self) -> None:
        self._running = True
        while self._running:
            self.world.step()

    def stop(self) -> None:
        self._running = False

    def close(self) -> None:
        self.is_closed = True


class Host:
    """Where an API server is reached."""

    def __init__(self, server: ApiServer) -> None:
        self.server = server
        self.mode = "up"  # or refusing, or silent, or mute: it accepts, and that is all
        self.streams: list[SimStream] = []  # that stand


class SimStream:
    """Stands in for the daemon's Stream; the network between splits, delays, loses and cuts."""

    def __init__(self, reactor: SimReactor, handler: fabrik_daemon.StreamHandler) -> None:
        self._reactor = reactor
        self._handler = handler
        self._world = reactor.world
        self._latency = self._world.chance.uniform(0.001, 0.03)
        self._host: Host | None = None
        self._peer: Peer | None = None
        self._output = b""
        self._inbox: list[bytes] = []
        self._paused = False
        self._arrives_at = 0.0
        self._lost = 0  # what was under way before this many cuts is lost
        self.is_half_open = False
        self.is_closed = False
        self.pending_bytes = 0

    def connect(self, route: fabrik_daemon.Route, timing: fabrik_daemon.Timing) -> None:
        host = self._host = self._world.hosts[route.endpoint.host]
        delay = timing.connect if host.mode == "silent" else self._latency
        self._world.at(self._world.now + delay, partial(self._connected, host, host.mode), self._reactor)

    def _connected(self, host: Host, mode: str) -> None:
        if self.is_closed:
            return
        if mode == "mute" and host.mode == "mute":
            self.is_half_open = True
            self._handler.on_open()
            return
        if mode != "up" or host.mode != "up":
            self._fail("did not answer within 10 s" if mode == "silent" else "connection refused")
            return
        self._peer = host.server.accept(self)
        host.streams.append(self)
        self._handler.on_open()
        self.send(b"")

    def send(self, data: bytes) -> None:
        self._output += data
        if self._peer is not None and self._output and not self.is_closed and not self.is_half_open:
            self._world.at(self._world.now + self._latency, partial(self._peer.receive, self._output))
            self._output = b""

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self._reactor.call_soon(partial(self._arrive, self._lost, b""))

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            if self._host is not None and self in self._host.streams:
                self._host.streams.remove(self)
            if self._peer is not None and not self.is_half_open:
                self._world.at(self._world.now + self._latency, self._peer.close)

    def deliver(self, data: bytes) -> None:
        """Bring the client what the server wrote, some time."""
        if self.is_closed or self.is_half_open:
            return
        chance = self._world.chance
        pieces = [data]
        if len(data) > 1 and chance.random() < SPLIT_CHANCE:
            cuts = sorted(chance.randrange(1, len(data)) for _ in range(chance.randint(1, 3)))
            pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)])]
        for number, piece in enumerate(pieces):
            delay = self._latency + (chance.uniform(0, 0.3) if number else 0)
            self._arrives_at = max(self._arrives_at, self._world.now + delay)
            self._world.at(self._arrives_at, partial(self._arrive, self._lost, piece), self._reactor)

    def _arrive(self, lost: int, data: bytes) -> None:
        if self.is_closed or self.is_half_open or lost != self._lost:
            return
        if data:
            self._inbox.append(data)
        if self._inbox and not self._paused:
            waiting, self._inbox = b"".join(self._inbox), []
            self._handler.on_data(waiting)

    def end(self) -> None:
        """Bring the client the end of the connection, after what is under way."""
        self._arrives_at = max(self._arrives_at, self._world.now + self._latency)
        self._world.at(self._arrives_at, partial(self._ended, self._lost), self._reactor)

    def _ended(self, lost: int) -> None:
        if self.is_closed or self.is_half_open or lost != self._lost:
            return
        if self._paused:
            self._world.at(self._world.now + 0.01, partial(self._ended, lost), self._reactor)
        else:
            self._handler.on_data(b"")

    def reset(self) -> None:
        """Break the connection; what is under way is lost."""
        self._lost += 1
        self._world.at(self._world.now + self._latency, partial(self._fail, "the connection broke"), self._reactor)

    def go_silent(self) -> None:
        """Let no byte pass any more, either way, and tell nobody."""
        self.is_half_open = True

    def _fail(self, error: str) -> None:
        if not self.is_closed and not self.is_half_open:
            self.close()
            self._handler.on_error(error)
