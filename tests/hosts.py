"""A user's machine for one daemon that is started in every way there is, also in ways that fail."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from clients import LinesClient
from harness import READY_S, Daemon, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from harness import Cluster
    from typing_extensions import Self

AS_ROOT: Final = os.geteuid() == 0
NOBODY: Final = 65534


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Be another user for a moment; only root can."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


class Host(Daemon):
    """A daemon's home, configuration and socket; whatever was started here is gone at the end."""

    def __init__(
        self,
        executable: Path,
        unpacked: Path,
        root: Path,
        clusters: Sequence[Cluster],
        *,
        timing: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(executable, unpacked, root, clusters, timing=timing or {})
        self.socket = self._sockets / "d.sock"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    def kill(self) -> None:
        """End every daemon of this cache at once, and clean up."""
        for pid in self.daemon_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        super().kill()

    @property
    def environment(self) -> dict[str, str]:
        """What commands run here see; it may be changed."""
        return self._environment

    @property
    def crash_file(self) -> Path:
        """Where a background daemon's last words are."""
        return self.cache.with_name("daemon.crash")

    @property
    def lock_pid(self) -> int:
        """Who wrote the lock file."""
        return int(self.cache.with_name("daemon.lock").read_text())

    def command(self, *words: str) -> list[str]:
        """Return the command line that runs the executable."""
        return [self.python, str(self._executable), *words]

    def run_as(self, program: Path, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of another executable in the same environment."""
        return subprocess.run(
            [self.python, str(program), *words],
            env=self._environment,
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            check=False,
        )

    def popen(self, *words: str) -> subprocess.Popen[bytes]:
        """Run a command beside the test; its output goes to pipes."""
        return subprocess.Popen(
            self.command(*words),
            env=self._environment,
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def launch(self, *, until_it_answers: bool = True) -> None:
        """Start it in the foreground; return when its socket answers, whatever it knows by then."""
        with (self.root / "daemon.log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command("start", "--foreground"),
                env=self._environment,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        if until_it_answers:
            wait_until(lambda: answers(self.socket), READY_S, "the socket answers")

    def catch_up(self, timeout_s: float) -> None:
        """Wait until all that was sent is in the cache, however much piled up while no daemon ran."""
        for cluster in self.clusters:
            cluster.server.bookmark()
        wait_until(lambda: not any(map(self._behind, self.clusters)), timeout_s, "all that was sent is in the cache")

    def signal(self, number: int) -> float:
        """Send the foreground daemon a signal; return how long it took to end, in seconds."""
        assert self._process
        sent_at = time.monotonic()
        self._process.send_signal(number)
        self._process.wait(30)
        self._process = None
        return time.monotonic() - sent_at

    def status(self) -> dict[str, Any]:
        """Return what the daemon says of itself."""
        with LinesClient(self.socket) as client:
            return client.ask("status")

    def daemon_pids(self) -> list[int]:
        """Return the processes that are a daemon of this cache, by their command line and environment."""
        if sys.platform != "linux":
            with contextlib.suppress(OSError, ValueError):
                return [self.lock_pid]
            return []
        found = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is_ours(pid)]  # noqa: PTH208
        # A helper looks like the daemon that has forked it until it runs its own program.
        return [pid for pid in found if parent_of(pid) not in found]

    def _is_ours(self, pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123
                words = file.read().split(b"\0")
            with open(f"/proc/{pid}/environ", "rb") as file:  # noqa: PTH123
                home = f"HOME={self.environment['HOME']}".encode() in file.read().split(b"\0")
        except OSError:
            return False
        return home and b"--foreground" in words


def parent_of(pid: int) -> int:
    """Return a process's parent, 0 where there is no such process any more."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def answers(path: Path) -> bool:
    """Tell whether a daemon answers at a socket."""
    try:
        with LinesClient(path, timeout_s=10) as client:
            return client.ask("ping") == {"type": "ping"}
    except (OSError, AssertionError):
        return False
