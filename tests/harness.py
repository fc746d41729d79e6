"""Runs the built executable as a user would: its own home, configuration, cache and socket, real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fakes_http import Access

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fakes import KubernetesApi

Row = dict[str, Any]

READY_S: Final = 20.0  # the executable unpacks itself at its first start
SETTLE_S: Final = 10.0
STOP_S: Final = 10.0
POLL_S: Final = 0.02


def wait_until(holds: Callable[[], object], timeout_s: float, what: str) -> None:
    """Return as soon as `holds` does; fail past the deadline, telling what was waited for."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(POLL_S)


class Cluster(NamedTuple):
    """One entry of clusters.yaml and the server behind it."""

    server: KubernetesApi
    name: str = "test"
    namespaces: Sequence[str] = ("fabrik-runs",)
    access: Access = Access()
    extra: Mapping[str, object] = MappingProxyType({})


class Daemon:
    """One daemon with its own home under `root`; the executable unpacks itself in `unpacked`, once for all tests."""

    def __init__(
        self, executable: Path, unpacked: Path, root: Path, clusters: Sequence[Cluster], *, timing: Mapping[str, object]
    ) -> None:
        self.root = root
        self.cache = root / "cache" / "cache.db"
        self.clusters = clusters
        self._sockets = Path(tempfile.mkdtemp(prefix="fabrik-"))  # a socket's path has 104 bytes at most
        self._process: subprocess.Popen[bytes] | None = None
        self._temporary = root / "tmp"
        self.python = sys.executable
        self._executable = executable
        self._write_configuration(timing)
        self._environment = {
            **{name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ},
            "HOME": str(root / "home"),
            "SHIV_ROOT": str(unpacked),
            "TMPDIR": str(self._temporary),
            "FABRIK_CONFIG": str(root / "config" / "config.yaml"),
            "FABRIK_CACHE": str(self.cache),
            "FABRIK_SOCKET": str(self._sockets / "d.sock"),
        }

    def _write_configuration(self, timing: Mapping[str, object]) -> None:
        folder = self.root / "config"
        for path in (folder, self.root / "home", self.cache.parent, self._temporary):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        entries = []
        for cluster in self.clusters:
            kubeconfig = cluster.server.kubeconfig(self.root / f"{cluster.name}.kubeconfig", cluster.access)
            entry = {"name": cluster.name, "kubeconfig": str(kubeconfig), "context": cluster.access.context}
            entries.append({**entry, "namespaces": list(cluster.namespaces), **cluster.extra})
        (folder / "clusters.yaml").write_text(json.dumps({"clusters": entries}, indent=2))  # JSON is YAML
        (folder / "config.yaml").write_text(json.dumps({"timing": timing} if timing else {}))

    def kill(self) -> None:
        """End it at once, running or not, and clean up."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None
        shutil.rmtree(self._sockets, ignore_errors=True)

    @property
    def pid(self) -> int:
        """The running daemon's process id."""
        assert self._process, "the daemon is not running"
        return self._process.pid

    @property
    def log(self) -> str:
        """What every start so far wrote to stdout and stderr."""
        path = self.root / "daemon.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start it in the foreground and wait until it watches everything it should."""
        assert not self._process, "the daemon is running already"
        with (self.root / "daemon.log").open("ab") as log:
            command = [self.python, str(self._executable), "start", "--foreground"]
            self._process = subprocess.Popen(
                command, env=self._environment, cwd=self.root, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.wait_for_watches()

    def wait_for_watches(self) -> None:
        """Wait until every watch is open and its list in the cache."""
        wait_until(lambda: all(map(self._watches, self.clusters)), READY_S, "every watch open and synced")

    def _watches(self, cluster: Cluster) -> bool:
        """Tell whether five watches per namespace are open, their lists in the cache."""
        assert self._process
        assert self._process.poll() is None, f"the daemon ended with {self._process.returncode}:\n{self.log}"
        wanted = 5 * len(cluster.namespaces)
        with cluster.server.changed:
            open_watches = len(cluster.server.watches)
        synced = "SELECT count(*) AS n FROM watches WHERE cluster = ? AND synced_at IS NOT NULL"
        return open_watches >= wanted and self.rows(synced, cluster.name)[0]["n"] >= wanted

    def stop(self) -> None:
        """Ask it to end, as systemd does; it must, in good order."""
        assert self._process, "the daemon is not running"
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the daemon goes on {STOP_S} s after SIGTERM:\n{self.log}") from None
        self._process = None
        assert code == 0, f"the daemon ended with {code}:\n{self.log}"
        assert list(self._temporary.iterdir()) == [], "temporary files, maybe keys, are left"

    def cli(self, *words: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command of the executable in the same environment."""
        return subprocess.run(
            [self.python, str(self._executable), *words],
            env=self._environment,
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=timeout_s,
            check=False,
        )

    def json(self, *words: str) -> Any:
        """Run a command with `-o json` and return what it printed; it must succeed."""
        done = self.cli(*words, "-o", "json")
        assert done.returncode == 0, f"{words} ended with {done.returncode}: {done.stderr}\n{self.log}"
        return json.loads(done.stdout)

    def rows(self, statement: str, *values: object) -> list[Row]:
        """Read the cache file itself; a table that is not there yet is empty."""
        if not self.cache.exists():
            return [{"n": 0}]
        connection = sqlite3.connect(f"file:{self.cache}?mode=ro", uri=True, timeout=5)
        connection.row_factory = sqlite3.Row
        try:
            return [dict(row) for row in connection.execute(statement, values)]
        except sqlite3.OperationalError:
            return [{"n": 0}]
        finally:
            connection.close()

    def settle(self) -> None:
        """Wait until all that the servers have sent so far is in the cache: a bookmark goes behind it."""
        for cluster in self.clusters:
            cluster.server.bookmark()
        wait_until(lambda: not any(map(self._behind, self.clusters)), SETTLE_S, "all that was sent is in the cache")

    def _behind(self, cluster: Cluster) -> bool:
        server = cluster.server
        statement = "SELECT resource, resource_version FROM watches WHERE cluster = ?"
        seen = {(row["resource"], row["resource_version"]) for row in self.rows(statement, cluster.name)}
        return any((name, str(server.version(name))) not in seen for name in server.collections)
