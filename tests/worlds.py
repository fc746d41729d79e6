"""Two clusters with five runs and a daemon that follows them, for tests of what its socket says."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final, NamedTuple

from clients import LinesClient, http_request
from fabrik_objects import Report, job, pod, pvc
from fakes import ModelServer
from harness import Cluster
from hosts import Host

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fakes import Authority

TOTAL: Final = 10**6  # tasks of each run; more finished than these would be no progress


class World(NamedTuple):
    """A daemon that follows two clusters, dev-k3s with four runs and prod with one."""

    daemon: Host
    dev: ModelServer
    prod: ModelServer
    socket: Path

    def connect(self) -> LinesClient:
        """Return a new connection to its socket."""
        return LinesClient(self.socket)

    def assert_answers(self) -> None:
        """Fail unless it answers a new client, in both framings."""
        with self.connect() as client:
            assert client.ask("ping", id="alive") == {"type": "ping", "id": "alive"}
        assert http_request(self.socket, "/status").message["pid"] == self.daemon.pid


def report(number: int, finished: int, *, phase: str = "implement", server: ModelServer) -> int:
    """Have a run report its progress; `human-gate` blocks it."""
    status = "blocked" if phase == "human-gate" else "running"
    return server.put("pods", pod(number, report=Report(phase=phase, status=status, finished=finished, total=TOTAL)))


@contextlib.contextmanager
def made_world(authority: Authority, executable: Path, unpacked: Path, folder: Path) -> Iterator[World]:
    """Make the clusters, start the daemon, and check at the end that it only ever read."""
    with ModelServer(authority) as dev, ModelServer(authority) as prod:
        prod.uid = "11111111-2222-4333-8444-555555555555"
        for number in (1, 2, 3):
            dev.put("jobs", job(number))
        report(1, 10, server=dev)
        report(2, 20, phase="human-gate", server=dev)
        dev.put("persistentvolumeclaims", pvc(1))
        dev.put("jobs", job(4, conditions=["Complete"]))
        prod.put("jobs", job(5))
        report(5, 50, server=prod)
        clusters = [Cluster(dev, "dev-k3s"), Cluster(prod, "prod")]
        daemon = Host(executable, unpacked, folder, clusters, timing={"batch": "10ms"})
        try:
            daemon.start()
            yield World(daemon, dev, prod, daemon.socket)
        finally:
            daemon.kill()
        assert [*dev.violations, *dev.crashes, *prod.violations, *prod.crashes] == []
