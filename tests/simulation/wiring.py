"""The real daemon on the simulated world: what is put in place of its names for time, chance, sockets and threads."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Callable, Final, NoReturn

import fabrik_daemon
from simulation.readers import WANTED, Reader, SimServer
from simulation.world import Crash, SimReactor, SimStream, Violation, World

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

JsonObject = dict[str, Any]
COMMIT_DELAY_S: Final = 0.4  # the writer's thread is this late at most


class _Later(BaseException):
    """What the simulated `sleep` raises out of the writer's thread."""


class SimTime:
    """Stands in for the module `time`."""

    gmtime = staticmethod(time.gmtime)

    def __init__(self, world: World) -> None:
        self._world = world
        self.is_slow = False  # decoding takes long, so that callbacks give way

    def time(self) -> float:
        return self._world.wall()

    def monotonic(self) -> float:
        if self.is_slow:
            self._world.now += 0.003
        return self._world.now

    def monotonic_ns(self) -> int:
        return int(self.monotonic() * 1e9)

    @staticmethod
    def sleep(_seconds: float) -> NoReturn:
        raise _Later


class SimLog:
    """Stands in for the daemon's log: what must never be logged ends the simulation."""

    _NEVER: Final = ("left out", "defect", "damaged", "cannot be read")

    def __init__(self, world: World) -> None:
        self._world = world

    def log(self, _level: int, message: str, *values: object, extra: object = None) -> None:
        if any(words in message for words in self._NEVER):
            raise Violation(f"logged: {message % values}")
        if self._world.say is not None:
            self._world.note(f"  log: {message % values}")

    def info(self, message: str, *values: object, extra: object = None) -> None:
        self.log(20, message, *values)

    warning = error = exception = debug = info

    def getChild(self, _name: str) -> SimLog:  # noqa: N802 - logging's own name
        return self


class CrashingConnection(sqlite3.Connection):
    """The cache's database in memory, which a crash or a full disk may strike at any statement."""

    crash_in: int | None = None  # statements
    is_full = False
    commits = 0

    def execute(self, sql: str, values: Any = (), /) -> sqlite3.Cursor:
        if self.crash_in is not None:
            self.crash_in -= 1
            if self.crash_in < 0:
                self.crash_in = None
                raise Crash("inside a commit")
        if self.is_full and sql.startswith("INSERT"):
            raise sqlite3.OperationalError("database or disk is full")
        return super().execute(sql, values)


class SimCache(fabrik_daemon.CacheThread):
    """The real writer without its thread: batches are written at simulated moments."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.simulation: Simulated
        self._units: deque[fabrik_daemon.WriteUnit] = deque()
        self._retried: list[fabrik_daemon.WriteUnit] = []
        self._due = False
        self.crashes_after_commit = False
        self.is_dead = False

    def attach(self, simulated: Simulated) -> None:
        self.simulation = simulated

    def start(self) -> None:
        self._schedule()

    @property
    def is_idle(self) -> bool:
        return not self._units and not self._retried

    def put(self, unit: fabrik_daemon.WriteUnit) -> None:
        if unit and not self.is_dead:
            self._units.append(unit)
            self._schedule()

    def held(self, seq: int) -> fabrik_daemon.Held:
        return fabrik_daemon.CacheReader.held(self.simulation, seq)  # type: ignore[arg-type]  # it has a connection

    def close(self, timeout: float) -> bool:
        self._stopping = True
        while not self.is_dead and not self.is_idle:
            self._turn()
        return timeout > 0

    def _schedule(self, delay: float | None = None) -> None:
        if (not self._due and self._units) or delay is not None:
            self._due = True
            world = self.simulation.world
            wait = world.chance.uniform(0.0, COMMIT_DELAY_S) if delay is None else delay
            world.at(world.now + wait, self._flush, self.simulation.reactor)

    def _flush(self) -> None:
        self._due = False
        try:
            self._turn()
        except _Later:
            self._schedule(self._timing.cache_retry)
            return
        self._schedule()

    def _turn(self) -> None:
        """Write one batch, cut as the real thread cuts it."""
        units, self._retried = self._retried, []
        while not units or (self._units and sum(map(len, units)) < fabrik_daemon.BATCH_OPERATIONS):
            if not self._units:
                break
            units.append(self._units.popleft())
        if not units:
            return
        try:
            self._write(units)
        except _Later:
            self._retried = units
            raise
        except Crash:
            self.is_dead = True
            raise
        if self.crashes_after_commit:
            self.is_dead = True
            raise Crash("after a commit")


class SimCredentials:
    """Stands in for Credentials: hands out what the server takes at present, late, or fails."""

    def __init__(self, simulated: Simulated, reactor: SimReactor) -> None:
        self._simulated = simulated
        self._world = simulated.world
        self._reactor = reactor

    def close(self) -> None:
        pass

    def resolve(
        self,
        spec: fabrik_daemon.ClusterSpec,
        done: Callable[[fabrik_daemon.Connection | fabrik_daemon.FabrikError], None],
    ) -> None:
        def finish() -> None:
            if self._simulated.plugin != "works":
                done(fabrik_daemon.ConfigError(f"{spec.kubeconfig}: its plugin failed"))
                return
            host = f"{spec.name}.sim"
            server = self._world.hosts[host].server
            files = fabrik_daemon.file_times([spec.kubeconfig])
            done(fabrik_daemon.Connection(f"http://{host}:6443", token=server.token, files=files))

        delay = 30.0 if self._simulated.plugin == "hangs" else self._world.chance.uniform(0.05, 0.6)
        self._world.at(self._world.now + delay, finish, self._reactor)


class Simulated:
    """One daemon after the other over one database, each until it is stopped or crashes."""

    def __init__(
        self, world: World, specs: Sequence[fabrik_daemon.ClusterSpec], timing: fabrik_daemon.Timing, page: int
    ) -> None:
        self.world = world
        self.specs = list(specs)
        self.page = page
        self.watched = {spec.name: spec.namespaces for spec in specs}
        self.queue_lines = self.history = 10_000
        self.batch = 100
        self.settings = fabrik_daemon.Settings(
            "", "/sim/clusters.yaml", "/sim/cache.db", None, timing=timing, keep_logs=False
        )
        self.connection = sqlite3.connect(":memory:", isolation_level=None, factory=CrashingConnection)
        fabrik_daemon._migrate(self.connection, "the simulated cache")
        self.connection.execute("INSERT INTO meta (key, value) VALUES ('stream', 'simulated')")
        self.clock = SimTime(world)
        self.log = SimLog(world)
        self.files: dict[str, float] = {}
        self.plugin = "works"  # or fails, or hangs
        self.reactor = SimReactor(world)
        self.daemon: Any = None  # while one runs
        self.readers = [Reader(self, wanted) for wanted in WANTED]
        self.last_seq = 0  # ever told
        self.is_ready = False
        self.connected_since: dict[str, float] = {}
        self.starts = 0

    def run(self) -> tuple[Any, str]:
        """Let one daemon run; return its store and how it ended."""
        self.reactor = SimReactor(self.world)
        self.connected_since.clear()
        self.starts += 1
        self.world.note("the daemon starts")
        daemon = None
        try:
            daemon = self.daemon = fabrik_daemon.Daemon(self.settings, lambda: self.specs, None)  # type: ignore[arg-type]
            daemon.run(self._on_ready)
        except Crash as crash:
            self.world.note(f"the daemon crashes {crash}")
            return daemon and daemon.store, "crash"
        except fabrik_daemon.FabrikError as error:  # no cluster or no disk at the start: whoever runs it tries again
            self.world.note(f"the daemon gives up: {error}")
            return daemon and daemon.store, "stop"
        else:
            return daemon.store, "crash" if self.connection.is_full else "stop"
        finally:
            self.connection.crash_in = None
            self.reactor.close()
            for reader in self.readers:
                reader.subscription = None
            self.daemon, self.is_ready = None, False
            self.connected_since.clear()

    def crash(self, how: str = "now") -> NoReturn:
        """Kill the daemon; to be called from an event of the world."""
        if self.daemon is not None:
            self.daemon.cache.is_dead = True
        raise Crash(how)

    def _on_ready(self) -> None:
        self._began_at, self.is_ready = self.last_seq, True
        for reader in self.readers:
            reader.connect()

    def on_live(self, seq: int) -> None:
        """What a daemon tells first has a number that none before it ever told."""
        if seq <= self._began_at:
            raise Violation(f"seq {seq} was told after {self._began_at} by a daemon before")
        self.last_seq = max(self.last_seq, seq)

    def on_run(self, before: JsonObject | None, row: JsonObject) -> None:
        """What a Pod told last is never taken back, as long as its server's store keeps what it has."""
        same = before is not None and all(before[name] == row[name] for name in ("job_uid", "pod_name"))
        if before is not None and same and not self.world.hosts[f"{row['cluster']}.sim"].server.epochs:
            for name in ("heartbeat_at", "progress_finished"):
                if before[name] is not None and (row[name] is None or row[name] < before[name]):
                    raise Violation(f"told again: {name} {row[name]} after {before[name]} of {row}")

    def on_cluster_written(self, cluster: fabrik_daemon.Cluster) -> None:
        name = cluster.spec.name
        if not cluster.is_connected:
            self.connected_since.pop(name, None)
        else:
            self.connected_since.setdefault(name, self.world.now)

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Put the simulation in place of the daemon's names."""
        write_cluster = fabrik_daemon.Follower.write_cluster

        def written(follower: fabrik_daemon.Follower, cluster: fabrik_daemon.Cluster) -> None:
            self.on_cluster_written(cluster)
            write_cluster(follower, cluster)

        def cache(*parts: Any) -> SimCache:
            made = SimCache(*parts)
            made.attach(self)
            return made

        replaced: list[tuple[object, str, object]] = [
            (fabrik_daemon, "time", self.clock),
            (fabrik_daemon, "random", random.Random(self.world.seed + 1)),
            (fabrik_daemon, "Reactor", lambda _log: self.reactor),
            (fabrik_daemon, "Stream", SimStream),
            (fabrik_daemon, "Server", SimServer),
            (fabrik_daemon, "CacheThread", cache),
            (fabrik_daemon, "Credentials", lambda reactor, _timing: SimCredentials(self, reactor)),
            (fabrik_daemon, "SingleInstance", lambda _cache: _Lock()),
            (fabrik_daemon, "open_cache", lambda _path, _log: self.connection),
            (fabrik_daemon, "prepare_cache_folder", lambda _cache: None),
            (fabrik_daemon, "make_log", lambda _level, _errors, _ring: self.log),
            (fabrik_daemon, "choose_socket", lambda _settings: "/sim/socket"),
            (fabrik_daemon, "raise_descriptor_limit", lambda: None),
            (fabrik_daemon, "file_times", lambda paths: tuple((path, self.files.get(path, 0.0)) for path in paths)),
            (fabrik_daemon, "LIST_PAGE_ITEMS", self.page),
            (fabrik_daemon, "COMMIT_CHANGES", self.page),
            (fabrik_daemon, "SUBSCRIBER_QUEUE_LINES", self.queue_lines),
            (fabrik_daemon, "SNAPSHOT_ROWS", 7),
            (fabrik_daemon, "BATCH_OPERATIONS", self.batch),
            (fabrik_daemon, "HISTORY_EVENTS", self.history),
            (fabrik_daemon, "HISTORY_LOADED", min(self.history, 1000)),
            (fabrik_daemon, "REPLAYED_AT_ONCE", 5 if self.history < 1000 else 200),
            (fabrik_daemon.ServiceManager, "attend", lambda _manager, _reload, _stop: None),
            (fabrik_daemon.Follower, "write_cluster", written),
        ]
        with replacing(replaced):
            yield


class _Lock:
    acquire = release = lambda self: None


@contextlib.contextmanager
def replacing(replaced: Iterable[tuple[object, str, object]]) -> Iterator[None]:
    """Set attributes, and set them back at the end."""
    before = []
    try:
        for owner, name, value in replaced:
            before.append((owner, name, owner.__dict__[name]))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
