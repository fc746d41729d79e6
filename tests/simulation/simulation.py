"""One simulated hour from one seed: servers, objects, faults, a daemon, and the oracle that watches it."""

from __future__ import annotations

import gc
import traceback
from typing import TYPE_CHECKING, Callable, Final, NamedTuple

import fabrik_daemon
from simulation.apiserver import ApiServer, Traits
from simulation.faults import Trouble
from simulation.lives import begin_life
from simulation.oracle import Oracle
from simulation.wiring import Simulated
from simulation.world import Host, Violation, World

if TYPE_CHECKING:
    from random import Random

CHECK_S: Final = 16.0
SETTLE_S: Final = 460.0
SETTLE_WITHOUT_BOOKMARKS_S: Final = 900.0


class Outcome(NamedTuple):
    """How a seed went."""

    seed: int
    problem: str  # empty: all was well
    simulated_s: float
    events: int
    faults: int
    starts: int


class Simulation:
    """The world of one seed."""

    def __init__(self, seed: int, say: Callable[[str], None] | None = None) -> None:
        self.world = World(seed)
        self.world.say = say
        chance = self.world.chance
        count = chance.choice((1, 1, 1, 1, 1, 2, 2, 3))
        self.servers = [ApiServer(self.world, f"c{number}", _traits(chance)) for number in range(count)]
        self.namespaces = [_namespaces(chance) for _ in self.servers]
        specs = []
        for server, namespaces in zip(self.servers, self.namespaces):
            self.world.hosts[f"{server.name}.sim"] = Host(server)
            watched = ("",) if chance.random() < 0.15 else namespaces
            specs.append(fabrik_daemon.ClusterSpec(server.name, f"/sim/{server.name}", namespaces=watched))
        relist = chance.choice((1800.0, 1800.0, 500.0))
        timing = fabrik_daemon.Timing(files_check=30.0, socket_check=3600.0, relist=relist)
        self.simulated = Simulated(self.world, specs, timing, page=chance.choice((2, 3, 5, 500)))
        self.simulated.batch = chance.choice((1, 5, 100))
        if chance.random() < 0.4:
            self.simulated.queue_lines = 25
            for reader in self.simulated.readers[:2]:
                reader.delay = chance.choice((100.0, 200.0))
        self.simulated.history = chance.choice((8, 40, 10_000))
        self.oracle = Oracle(self.simulated, self.servers)
        self.trouble = Trouble(self.world, self.simulated, self.servers)
        self.faults = 0
        self._over = False

    def run(self) -> Outcome:
        """Let it all happen; return what went wrong, if anything did."""
        problem = ""
        gc.disable()
        try:
            with self.simulated.patched():
                self._schedule()
                self._live()
        except Violation as violation:
            problem = str(violation)
        except Exception:  # noqa: BLE001 - whatever it is, its seed should be told
            problem = traceback.format_exc()
        finally:
            self.simulated.connection.close()
            gc.enable()
        events = sum(len(lineage.log) for server in self.servers for lineage in server.lineages[:1])
        return Outcome(self.world.seed, problem, self.world.now - 1000, events, self.faults, self.simulated.starts)

    def _schedule(self) -> None:
        world, chance = self.world, self.world.chance
        calm_at = world.now + chance.uniform(700, 1500)
        number = 0
        for server, namespaces in zip(self.servers, self.namespaces):
            for _ in range(chance.randint(4, 10)):
                number += 1
                when = world.now + max(0.0, chance.uniform(-200, calm_at - world.now + 60))
                world.at(when, lambda server=server, spaces=namespaces, n=number: begin_life(server, spaces, n))  # type: ignore[misc]
        if chance.random() > 0.07:
            for _ in range(chance.randint(2, 9)):
                world.at(chance.uniform(world.now + 20, calm_at), self._go_wrong)
        for _ in range(2):
            world.at(chance.uniform(world.now + 200, calm_at), self.oracle.check_database)
        for reader in self.simulated.readers:
            world.at(world.now + chance.uniform(20, 400), reader.restless)
        world.at(calm_at, self.trouble.calm)
        quiet_at = calm_at + 150
        world.at(quiet_at, self._quieten)
        slow = any(not server.traits.bookmarks for server in self.servers)
        world.at(quiet_at + (SETTLE_WITHOUT_BOOKMARKS_S if slow else SETTLE_S), self._end)
        world.after(CHECK_S, self._check)

    def _go_wrong(self) -> None:
        self.faults += 1
        self.trouble.make()

    def _quieten(self) -> None:
        for server in self.servers:
            server.end_lives()

    def _check(self) -> None:
        self.oracle.check_marks()
        self.world.after(CHECK_S, self._check)

    def _end(self) -> None:
        self.oracle.check_all()
        self._over = True
        self.simulated.reactor.stop()

    def _live(self) -> None:
        chance = self.world.chance
        start_at = self.world.now + chance.uniform(0, 150)
        for server in self.servers:
            server.disturbed.append((0.0, start_at + 60))
        self.world.run_until(start_at)
        while not self._over:
            store, how = self.simulated.run()
            self.oracle.check_database()
            if how == "stop" and store is not None:
                self.oracle.check_same(store)
            if not self._over:
                self.trouble.disturb_all(45)
                self.world.run_until(self.world.now + chance.uniform(0.5, 40))


def _traits(chance: Random) -> Traits:
    bookmarks = chance.random() < 0.88
    streaming = (
        chance.choice(("yes", "yes", "refused", "ignored")) if bookmarks else chance.choice(("refused", "ignored"))
    )
    return Traits(streaming, bookmarks, http_410=chance.random() < 0.3, gzip=chance.random() < 0.3)


def _namespaces(chance: Random) -> tuple[str, ...]:
    return ("fabrik-runs",) if chance.random() < 0.7 else ("fabrik-runs", "fabrik-runs-b")
