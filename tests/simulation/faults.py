"""What goes wrong in a simulated world. Each fault begins at once and ends by itself, or when all calms down."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Callable, Final

from simulation.apiserver import ApiServer, Refusal
from simulation.lives import begin_life

if TYPE_CHECKING:
    from fabrik_daemon import ClusterSpec
    from simulation.wiring import Simulated
    from simulation.world import World

RECOVERY_S: Final = 200.0  # after a fault's end, until nothing of it can be missed any more
FORBIDDEN_RECOVERY_S: Final = 420.0
PLAIN: Final = "text/plain; charset=utf-8"


class Trouble:
    """Makes faults, and ends them all."""

    def __init__(self, world: World, simulated: Simulated, servers: list[ApiServer]) -> None:
        self.world = world
        self.chance = world.chance
        self.simulated = simulated
        self.servers = servers
        self.is_calm = False
        self._ends: list[Callable[[], None]] = []

    def make(self) -> None:
        """Let something go wrong."""
        server = self.chance.choice(self.servers)
        if self.chance.random() < 0.3:  # one seldom comes alone
            self.world.after(self.chance.uniform(0.1, 8), partial(self._make, server))
        self._make(server)

    def _make(self, server: ApiServer) -> None:
        name = self.chance.choice(_NAMES)
        if not self.is_calm:
            self.world.note(f"fault: {name} at {server.name}")
            getattr(self, f"_{name}")(server)

    def calm(self) -> None:
        """End all that can be ended."""
        self.is_calm = True
        self.simulated.connection.crash_in = None
        if self.simulated.daemon is not None:
            self.simulated.daemon.cache.crashes_after_commit = False
        ends, self._ends = self._ends, []
        for end in ends:
            end()

    def disturb(self, server: ApiServer, seconds: float, recovery: float = RECOVERY_S) -> None:
        """Note that for so long the daemon may miss something of a server."""
        if not server.traits.bookmarks:
            recovery += 700  # what is silent is found out late
        server.disturbed.append((self.world.now - 1, self.world.now + seconds + recovery))

    def disturb_all(self, seconds: float) -> None:
        for server in self.servers:
            self.disturb(server, seconds)

    def _until(self, seconds: float, end: Callable[[], None]) -> None:
        def once() -> None:
            if end in self._ends:
                self._ends.remove(end)
                end()

        self._ends.append(end)
        self.world.after(seconds, once)

    def _cut_some(self, server: ApiServer, share: float, how: str = "") -> None:
        for peer in list(server.peers):
            if self.chance.random() < share:
                peer.cut(how)

    # Network

    def _drop(self, server: ApiServer) -> None:
        self.disturb(server, 0)
        self._cut_some(server, 0.7)

    def _half_open(self, server: ApiServer) -> None:
        seconds = self.chance.choice((0.0, 0.0, self.chance.uniform(1, 120)))
        self.disturb(server, seconds)
        host = self.world.hosts[f"{server.name}.sim"]
        for stream in list(host.streams):
            if self.chance.random() < 0.7:
                stream.go_silent()
        if seconds:
            self._host_mode(server, self.chance.choice(("silent", "mute")), seconds)

    def _refuse(self, server: ApiServer) -> None:
        seconds = self.chance.uniform(1, 150)
        self.disturb(server, seconds)
        self._cut_some(server, 1.0)
        self._host_mode(server, "refusing", seconds)

    def _host_mode(self, server: ApiServer, mode: str, seconds: float) -> None:
        host = self.world.hosts[f"{server.name}.sim"]
        host.mode = mode
        self._until(seconds, partial(setattr, host, "mode", "up"))

    # The API server

    def _restart(self, server: ApiServer) -> None:
        seconds = self.chance.uniform(0.5, 40)
        self.disturb(server, seconds)
        if self.chance.random() < 0.4:
            for watch in list(server.watches.values()):
                watch.peer.finish()
        self._cut_some(server, 1.0)
        self._host_mode(server, "refusing", seconds)
        server.restart()

    def _compact(self, server: ApiServer) -> None:
        self.disturb(server, 0)
        server.compact()
        if self.chance.random() < 0.5:
            self._cut_some(server, 0.5)

    def _expire(self, server: ApiServer) -> None:
        """A storm of 410: watches, and continue tokens."""
        seconds = self.chance.uniform(5, 100)
        self.disturb(server, seconds)
        server.expires_all = True
        self._until(seconds, partial(setattr, server, "expires_all", False))
        self._cut_some(server, 0.8)

    def _cut_lists(self, server: ApiServer) -> None:
        """Lists break off, and all is listed anew."""
        seconds = self.chance.uniform(20, 150)
        self.disturb(server, seconds)
        server.cuts_lists = self.chance.uniform(0.3, 0.9)
        self._until(seconds, partial(setattr, server, "cuts_lists", 0.0))
        server.compact()
        server.grow(1)
        server.compact()
        self._cut_some(server, 1.0)

    def _answer(self, server: ApiServer, refusal: Refusal, share: float) -> None:
        seconds = self.chance.uniform(3, 100)
        self.disturb(server, seconds)
        server.answer = refusal
        self._until(seconds, partial(setattr, server, "answer", None))
        self._cut_some(server, share)

    def _throttle(self, server: ApiServer) -> None:
        body = b"Too many requests, please try again later.\n"
        self._answer(server, Refusal(429, body, PLAIN, self.chance.choice((None, 1, 5))), 0.6)

    def _break(self, server: ApiServer) -> None:
        status = b'{"metadata":{},"status":"Failure","message":"etcdserver: no leader","code":500}'
        refusals = (Refusal(500, status), Refusal(502, b"", PLAIN), Refusal(503, b"no healthy upstream", PLAIN, 2))
        self._answer(server, self.chance.choice(refusals), 0.6)

    def _forbid(self, server: ApiServer) -> None:
        """A role goes; a watch that is open outlives it."""
        seconds = self.chance.uniform(30, 400)
        self.disturb(server, seconds, FORBIDDEN_RECOVERY_S)
        resource = self.chance.choice(("jobs", "pods", "persistentvolumeclaims", "cronjobs", "events"))
        scope = (resource, self.chance.choice(self.simulated.watched[server.name]))
        server.forbidden.add(scope)
        self._until(seconds, partial(server.forbidden.discard, scope))
        self._cut_some(server, self.chance.choice((0.0, 0.5)))

    def _hang(self, server: ApiServer) -> None:
        seconds = self.chance.uniform(10, 130)
        self.disturb(server, seconds)
        server.is_hung = True

        def wake() -> None:
            server.is_hung = False
            self._cut_some(server, 1.0)

        self._until(seconds, wake)
        self._cut_some(server, 0.4)

    def _store_down(self, server: ApiServer) -> None:
        seconds = self.chance.uniform(10, 100)
        self.disturb(server, seconds)
        server.store_is_down = True

        def mend() -> None:
            server.store_is_down = False
            self._cut_some(server, 1.0)

        self._until(seconds, mend)
        self._cut_some(server, 0.5)

    def _restore(self, server: ApiServer) -> None:
        """The store comes back with an older state, well before whatever anybody has seen."""
        revision = server.lineage.revision_at(self.world.now - self.chance.uniform(60, 600))
        if server.revision - revision < 10 or not server.traits.bookmarks:
            return
        self.disturb(server, 130, RECOVERY_S + 300)
        server.grow(6000)

        def restore() -> None:
            if not self._is_passed(server, revision):
                self.world.note(f"restored: {server.name} to {revision}")
                server.restore(revision)
                self._restart(server)

        self.world.after(130, restore)

    def _is_passed(self, server: ApiServer, revision: int) -> bool:
        """Say whether anybody's version would soon be reached again, which nobody could tell from going on."""
        rows = self.simulated.connection.execute(
            "SELECT resource_version FROM watches WHERE cluster = ? AND resource_version IS NOT NULL", (server.name,)
        )
        versions = [int(version) for (version,) in rows]
        versions += [watch.since for watch in server.watches.values()]
        return any(revision < version < revision + 3000 for version in versions) or revision > server.revision

    def _rebuild(self, server: ApiServer) -> None:
        """Another cluster stands behind the name."""
        self.disturb(server, 0, RECOVERY_S + 300)
        server.rebuild()
        self._restart(server)
        for number in range(self.chance.randint(0, 2)):
            begin_life(server, ("fabrik-runs",), 900 + 10 * server.epochs + number)

    # Credentials

    def _rotate(self, server: ApiServer) -> None:
        self.disturb(server, 0)
        server.token = f"token-{self.chance.getrandbits(32)}"
        if self.chance.random() < 0.5:
            self.simulated.files[f"/sim/{server.name}"] = self.world.now
        self._cut_some(server, 0.5)

    def _break_plugin(self, server: ApiServer) -> None:
        seconds = self.chance.uniform(5, 120)
        self.disturb(server, seconds)
        self.simulated.plugin = self.chance.choice(("fails", "hangs"))
        self._until(seconds, partial(setattr, self.simulated, "plugin", "works"))
        self._rotate(server)

    # The daemon's host

    def _crash(self, _server: ApiServer) -> None:
        if self.simulated.daemon is not None:
            self.disturb_all(60)
            self.simulated.crash()

    def _crash_in_commit(self, _server: ApiServer) -> None:
        self.disturb_all(200)
        self.simulated.connection.crash_in = self.chance.randint(0, 30)

    def _crash_after_commit(self, _server: ApiServer) -> None:
        if self.simulated.daemon is not None:
            self.disturb_all(200)
            self.simulated.daemon.cache.crashes_after_commit = True

    def _stop(self, _server: ApiServer) -> None:
        self.disturb_all(60)
        self.simulated.reactor.stop()

    def _sleep(self, server: ApiServer) -> None:
        seconds = self.chance.uniform(35, 900)
        self.disturb_all(seconds)
        reactor = self.simulated.reactor
        reactor.sleep()
        self._until(seconds, reactor.wake)
        if self.chance.random() < 0.5:
            self._cut_some(server, 1.0)

    def _reload(self, server: ApiServer) -> None:
        """A cluster's entry in clusters.yaml changes, or goes and comes back."""
        daemon = self.simulated.daemon
        spec = next((spec for spec in self.simulated.specs if spec.name == server.name), None)
        if daemon is None or spec is None:
            return
        if self.chance.random() < 0.5:
            self.disturb(server, 0)
            self.simulated.specs[self.simulated.specs.index(spec)] = spec._replace(priority=self.chance.randint(1, 99))
        else:
            seconds = self.chance.uniform(0.1, 300)
            self.disturb(server, seconds)
            self.simulated.specs.remove(spec)
            self._until(seconds, partial(self._add_again, spec))
        daemon.reload()

    def _add_again(self, spec: ClusterSpec) -> None:
        self.simulated.specs.append(spec)
        if self.simulated.daemon is not None:
            self.simulated.daemon.reload()

    def _full_disk(self, _server: ApiServer) -> None:
        self.simulated.connection.is_full = True
        self._until(self.chance.uniform(2, 60), partial(setattr, self.simulated.connection, "is_full", False))

    def _slow(self, _server: ApiServer) -> None:
        self.simulated.clock.is_slow = True
        self._until(self.chance.uniform(20, 200), partial(setattr, self.simulated.clock, "is_slow", False))


_NAMES: Final = (
    *("drop", "drop", "half_open", "half_open", "refuse"),
    *("restart", "compact", "expire", "cut_lists", "throttle", "break", "forbid", "hang", "store_down"),
    *("restore", "rebuild", "rotate", "break_plugin"),
    *("crash", "crash_in_commit", "crash_after_commit", "stop", "sleep", "full_disk", "slow", "reload", "reload"),
)
