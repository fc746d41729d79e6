"""Subscribers of the simulated daemon: they read late, hang up and come back, and know just what they were told."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import fabrik_daemon
from simulation.world import Violation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from simulation.wiring import Simulated
    from simulation.world import SimReactor

JsonObject = dict[str, Any]

_BUSY: Final = fabrik_daemon.Filter(columns=(("status", frozenset(("running", "blocked", "unknown"))),))
_RUNS: Final = fabrik_daemon.Filter(types=frozenset(fabrik_daemon.EVENT_TYPES[fabrik_daemon.Run]))
WANTED: Final = (fabrik_daemon.Filter(), _BUSY, fabrik_daemon.Filter(), _BUSY, _RUNS)
_TABLES: Final = {"run": "runs", "schedule": "schedules", "volume": "volumes", "warning": "cluster_events"}


class SimServer:
    """Stands in for the daemon's socket server: it wakes simulated subscribers."""

    remote = requests = None

    def __init__(self, reactor: SimReactor, *_parts: object) -> None:
        self._reactor = reactor
        self.readers: dict[fabrik_daemon.Subscription, Reader] = {}

    def open(self, _path: str, _group: str | None = None) -> None:
        pass

    keep = close = lambda self: None

    def wake(self, subscriptions: Iterable[fabrik_daemon.Subscription]) -> None:
        for subscription in subscriptions:
            if subscription in self.readers:
                self.readers[subscription].wake()


class Reader:
    """A subscriber whose view of the rows is made of what it was told, over every connection that it ever had.

    It begins with a snapshot and comes back with the cursor of what it was told last.
    """

    def __init__(self, simulated: Simulated, wanted: fabrik_daemon.Filter) -> None:
        self.wanted = wanted
        self.delay = 0.3
        self.rows: dict[tuple[object, ...], JsonObject] = {}
        self.connected: set[str] = set()
        self.cursor: fabrik_daemon.Cursor | None = None  # None: the view is of no use
        self.subscription: fabrik_daemon.Subscription | None = None
        self._simulated = simulated
        self._is_due = False
        self._lack: fabrik_daemon.Lack | None = None  # what is being read out of the cache for it
        self._stream = ""

    def connect(self) -> None:
        """Subscribe, to what follows the cursor or else to everything."""
        bus = self._simulated.daemon.bus
        wish = fabrik_daemon.Wish(self.wanted, since=self.cursor, snapshot=True)
        self.subscription = bus.subscribe(wish, {})
        self._simulated.daemon.server.readers[self.subscription] = self
        self._is_due, self._lack = False, None
        self.wake()

    def restless(self) -> None:
        """Hang up, in the midst of whatever it is being told, and come back after a while."""
        world = self._simulated.world
        if self.subscription is not None:
            self._simulated.daemon.bus.unsubscribe(self.subscription)
            del self._simulated.daemon.server.readers[self.subscription]
            self.subscription = None
        world.at(world.now + world.chance.choice((0.0, 5.0, 200.0)), self._come_back)
        world.at(world.now + world.chance.uniform(250, 600), self.restless)

    def _come_back(self) -> None:
        if self.subscription is None and self._simulated.is_ready:
            self.connect()

    def wake(self) -> None:
        """Read before long."""
        if not self._is_due:
            world = self._simulated.world
            self._is_due = True
            world.at(world.now + world.chance.uniform(0, self.delay), self.read, self._simulated.reactor)

    def read(self) -> None:
        """Take what there is; what is to be read out of the cache comes later."""
        self._is_due = False
        subscription = self.subscription
        if subscription is None:
            return
        world = self._simulated.world
        some = world.chance.choice((1, 10, 1000))  # then it hangs up, maybe
        for _ in range(some):
            line = subscription.take()
            if line is None:
                break
            self._take(json.loads(line))
        else:
            self.wake()
        if subscription.lack is not None:
            self._lack, subscription.lack = subscription.lack, None
            supply = partial(self._supply, self._lack)
            world.at(world.now + world.chance.uniform(0, 1), supply, self._simulated.reactor)

    def _supply(self, lack: fabrik_daemon.Lack) -> None:
        if self._lack is lack:
            self._lack = None
            lack.take(lack.read())
            self.wake()

    def read_all(self) -> None:
        """Connect where it is not, and take everything."""
        if self.subscription is None:
            self.connect()
        subscription = self.subscription
        assert subscription is not None
        while True:
            line = subscription.take()
            if line is not None:
                self._take(json.loads(line))
            elif subscription.lack is not None:
                self._lack, subscription.lack = subscription.lack, None
            elif self._lack is not None:
                self._supply(self._lack)
            else:
                return

    def _take(self, told: JsonObject) -> None:
        kind = told["type"]
        if kind == "subscribed":
            self._stream = told["stream"]
            if self.cursor is None:
                self._forget()
        elif kind == "lagged":
            self._forget()
            self.cursor = None
        elif kind == "snapshot":
            self._take_snapshot(told)
        elif kind == "seq":
            self._move_to(told["seq"])
        else:
            self._take_event(kind, told)

    def _forget(self) -> None:
        self.rows.clear()
        self.connected.clear()

    def _take_snapshot(self, told: JsonObject) -> None:
        for table in fabrik_daemon.TABLES:
            self._take_rows(table, told[table])
        self.connected |= {row["name"] for row in told["clusters"] if row["connected"]}
        if told["last"]:
            self.cursor = fabrik_daemon.Cursor(self._stream, told["seq"])

    def _move_to(self, seq: int) -> None:
        if self.cursor is None or seq < self.cursor.seq:
            raise Violation(f"told up to {seq} after {self.cursor}")
        self.cursor = self.cursor._replace(seq=seq)

    def _take_event(self, kind: str, told: JsonObject) -> None:
        if self.cursor is None or told["seq"] <= self.cursor.seq:
            raise Violation(f"seq {told['seq']} was told after {self.cursor}")
        if "history" not in told:
            self._simulated.on_live(told["seq"])
        self._move_to(told["seq"])
        row, name = told["row"], _TABLES.get(kind.partition(":")[0])
        if name is None:
            (self.connected.add if row["connected"] else self.connected.discard)(row["name"])
            return
        before = self.rows.get(_key(name, row))
        if name == "runs":
            self._check_run(kind, told, before)
        if told.get("left") or kind.endswith(":removed"):
            self.rows.pop(_key(name, row), None)
        else:
            self._take_rows(name, [row])

    def _check_run(self, kind: str, told: JsonObject, before: JsonObject | None) -> None:
        """One who is told of everything, and not that it lagged, has seen the status that is left."""
        self._simulated.on_run(before, told["row"])
        if self.wanted.columns:
            return
        if (before is None) != (kind == "run:added"):
            raise Violation(f"{kind} of {told['runId']}, of which {before} is known")
        if before is not None and before["status"] != told["previousStatus"]:
            raise Violation(f"{told['runId']} was {told['previousStatus']}, but {before['status']} was told last")

    @staticmethod
    def key(row: fabrik_daemon.TableRow) -> tuple[object, ...]:
        """Return what names a row in the view."""
        table = next(name for name, kind in fabrik_daemon.TABLES.items() if kind is type(row))
        return _key(table, row._asdict())

    def _take_rows(self, table: str, rows: Iterable[JsonObject]) -> None:
        for row in rows:
            if table != "volumes" or not row["deleted_at"]:  # one that was deleted is told as removed
                self.rows[_key(table, row)] = row


def _key(table: str, row: JsonObject) -> tuple[object, ...]:
    return (table, row["run_id"]) if table == "runs" else (table, row["cluster"], row["namespace"], row["name"])
