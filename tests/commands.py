"""Runs single commands of the built executable in a home of their own, and says what a good refusal looks like."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Union

import fabrik_daemon

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Word = Union[str, bytes]

COMMAND_S: Final = 60.0  # generous: the machine may be busy
NOBODY: Final = 65534
LOG_LINE: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (DEBUG|INFO|WARNING|ERROR) ")
_CROCKFORD: Final = "0123456789abcdefghjkmnpqrstvwxyz"


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    peak_bytes: int  # resident memory; 0 where the system does not tell

    @property
    def complaints(self) -> list[str]:
        """What it said on stderr beside its log."""
        return [line for line in self.stderr.splitlines() if not LOG_LINE.match(line)]

    @property
    def logged(self) -> list[str]:
        """The lines of its log."""
        return [line for line in self.stderr.splitlines() if LOG_LINE.match(line)]


def refused(done: Done, code: int, *parts: str) -> str:
    """Check that a command ended with this code and one clear line that has these parts; return the line."""
    assert "Traceback" not in done.stderr, done.stderr
    assert len(done.complaints) == 1, done
    line = done.complaints[0]
    assert line.startswith("fabrik-daemon: "), line
    for part in parts:
        assert part in line
    assert (done.code, done.stdout) == (code, ""), done
    assert len(line) < 500, line
    return line


class Shell:
    """A user's home and the commands run in it."""

    def __init__(self, executable: Path, unpacked: Path, home: Path) -> None:
        """Make the home; it has nothing in it."""
        home.mkdir(mode=0o700, parents=True)
        self.home = home
        self.executable = executable
        self.python = sys.executable
        self.user: int | None = None
        self.config = home / ".config" / "fabrik" / "daemon" / "config.yaml"
        self.clusters = self.config.with_name("clusters.yaml")
        self.cache = home / ".cache" / "fabrik" / "daemon" / "cache.db"
        self.environment = {
            **{name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ},
            "HOME": str(home),
            "SHIV_ROOT": str(unpacked),
            "FABRIK_SOCKET": str(home / "d.sock"),
        }

    def write(self, path: Path, text: str | bytes) -> Path:
        """Write a file of the user's, with its folders."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def start(
        self, *words: Word, env: Mapping[str, str] | None = None, stdout: int = subprocess.PIPE, program: str = ""
    ) -> subprocess.Popen[str]:
        """Start a command; `program` is another path to the executable."""
        other = self.user is not None
        return subprocess.Popen(
            [self.python, program or str(self.executable), *words],
            env={**self.environment, **(env or {})},
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            user=self.user,
            group=self.user,
            extra_groups=() if other else None,
        )

    def run(
        self, *words: Word, env: Mapping[str, str] | None = None, stdout: int = subprocess.PIPE, program: str = ""
    ) -> Done:
        """Run a command to its end."""
        began = time.monotonic()
        with self.start(*words, env=env, stdout=stdout, program=program) as process:
            try:
                output, errors = process.communicate(timeout=COMMAND_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise AssertionError(f"{words} did not end within {COMMAND_S} s: {process.communicate()}") from None
        seconds = time.monotonic() - began
        return Done(process.returncode, output or "", errors, seconds, 0)

    def measure(self, *words: Word) -> Done:
        """Run a command to its end, and say how much memory it took; what it says must fit into a pipe."""
        began = time.monotonic()
        with self.start(*words) as process:
            assert process.stdout
            assert process.stderr
            output, errors = process.stdout.read(), process.stderr.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        # What the tests' own process took before the child's first instruction is counted with it, and tells nothing.
        peak = usage.ru_maxrss if usage.ru_maxrss > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss else 0
        peak *= 1 if sys.platform == "darwin" else 1024
        return Done(process.returncode, output, errors, time.monotonic() - began, peak)


def unprivileged_shell(executable: Path) -> Iterator[Shell]:
    """Yield a shell whose user may not write everywhere: where the tests run as root, another than root."""
    root = Path(tempfile.mkdtemp(prefix="fabrik-user-"))  # pytest's own folders let nobody else in
    try:
        root.chmod(0o755)
        own = root / "fabrik-daemon"
        shutil.copyfile(executable, own)
        own.chmod(0o755)
        shell = Shell(own, root / "home" / "shiv", root / "home")
        if os.geteuid() == 0:
            shell.user = NOBODY
            os.chown(shell.home, NOBODY, NOBODY)
            shell.python = next((path for path in (sys.executable, "/usr/bin/python3") if _may_run(path)), "")
        yield shell
    finally:
        shutil.rmtree(root)


def _may_run(python: str) -> bool:
    """Tell whether a user without rights can start this interpreter."""
    command = [python, "-c", "import sys, sqlite3; sys.exit(sys.version_info < (3, 9))"]
    try:
        done = subprocess.run(command, user=NOBODY, group=NOBODY, extra_groups=(), cwd="/", check=False, env={})
    except OSError:
        return False
    return done.returncode == 0


def hash_of(path: Path) -> str:
    """Return a file's hash."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build_cache(path: Path, runs: int, *, cluster: str = "test", runs_per_transaction: int = 1000) -> None:
    """Make the cache that a daemon would have written after following so many runs."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    connection = fabrik_daemon.open_cache(str(path), logging.getLogger("tests"))
    try:
        for first in range(0, runs, runs_per_transaction):
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                for number in range(first, min(runs, first + runs_per_transaction)):
                    connection.execute(*fabrik_daemon.upsert(run_row(number, cluster)))
        now = fabrik_daemon.format_time(time.time(), milliseconds=True)
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            columns = {"server": "https://127.0.0.1:6443", "priority": 1, "last_event_at": now}
            connection.execute(*fabrik_daemon.cluster_statement(cluster, columns))
            for resource_ in fabrik_daemon.RESOURCES:
                scope = fabrik_daemon.Scope(cluster, resource_.name, "fabrik-runs")
                values = {"resource_version": "1000", "synced_at": now, "state": "watching"}
                connection.execute(*fabrik_daemon.watch_statement(scope, values))
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        connection.close()


def run_row(number: int, cluster: str = "test") -> fabrik_daemon.Run:
    """Return the row of one of many runs; a number always makes the same one."""
    created = 1_790_000_000 + number * 37
    value = (created * 1000) << 80 | (number * 0x9E3779B97F4A7C15 & (1 << 80) - 1)
    ulid = "".join(_CROCKFORD[value >> 5 * place & 31] for place in reversed(range(26)))
    status = fabrik_daemon.STATUSES[number % len(fabrik_daemon.STATUSES)]
    ended = status in fabrik_daemon.TERMINAL
    when = fabrik_daemon.format_time(created)
    return fabrik_daemon.Run(
        run_id=ulid,
        cluster=cluster,
        namespace="fabrik-runs",
        status=status,
        current_task=f"{number % 40}:impl",
        task_status=None if status == "pending" else "in-progress",
        progress_finished=number % 192,
        progress_total=192,
        spec_id=f"feature-{number % 100}",
        template="coding",
        created_at=when,
        updated_at=fabrik_daemon.format_time(created + 600),
        last_sync_at=fabrik_daemon.format_time(created + 600, milliseconds=True),
        id=ulid,
        project="myapp",
        phase="implement",
        task_attempt=1,
        iteration=0,
        heartbeat_at=fabrik_daemon.format_time(created + 600),
        job_name=f"fabrik-{ulid}",
        job_uid=f"00000000-0000-4000-8000-{number:012d}",
        pod_name=f"fabrik-{ulid}-abcde",
        started_at=when,
        finished_at=fabrik_daemon.format_time(created + 600) if ended else None,
    )


def memory_is_limited() -> bool:
    """Tell whether this system holds a process to its address space."""
    return sys.platform == "linux" and hasattr(resource, "RLIMIT_AS")
