"""The demo: its script through the store, and the built executable piped, on a terminal, interrupted and bereaved."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from harness import wait_until
from terminals import Terminal

import fabrik_daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STARTED_AT: Final = 1_800_000_000.0
END_S: Final = 60.0  # for a demo that takes twelve seconds on an idle machine
SUMMARY: Final = {"pending": 1, "running": 1, "blocked": 1, "finished": 8, "failed": 2, "cancelled": 1}

Change = fabrik_daemon.Change


@pytest.fixture(scope="module")
def changes() -> list[Change]:
    """Return what the whole script changes in a store."""
    store = fabrik_daemon.Store(fabrik_daemon.zone_of)
    found: list[Change] = []
    for cluster in fabrik_daemon.DEMO_CLUSTERS:
        for kind in fabrik_daemon.RESOURCES:
            scope = fabrik_daemon.Scope(cluster, kind.name, fabrik_daemon.DEMO_NAMESPACE)
            found += store.replace(fabrik_daemon.Progress(scope, "0", ""), [], STARTED_AT).changes
    for number, step in enumerate(fabrik_daemon.demo_steps(STARTED_AT), 1):
        metadata = step.object["metadata"]
        scope = fabrik_daemon.Scope(step.cluster, step.resource, metadata["namespace"])
        facts = fabrik_daemon.facts_from(step.resource, step.object)
        progress = fabrik_daemon.Progress(scope, str(number), "")
        seen = fabrik_daemon.Seen((metadata["namespace"], metadata["name"]), facts, step.type == "DELETED")
        found += store.observe(progress, [seen], STARTED_AT + step.at_s).changes
    return found


def runs_of(changes: list[Change]) -> list[fabrik_daemon.Run]:
    """Return every state of every run."""
    return [change.row for change in changes if isinstance(change.row, fabrik_daemon.Run)]


def volumes_of(changes: list[Change]) -> list[fabrik_daemon.Volume]:
    """Return every state of every volume."""
    return [change.row for change in changes if isinstance(change.row, fabrik_daemon.Volume)]


def lives_of(changes: list[Change]) -> dict[str, list[str]]:
    """Return the statuses that each run went through, and why where there is a reason.

    Between its Pod's end and its Job's, a run is pending for a moment, by the last row of the table; that is left out.
    """
    lives: dict[str, list[str]] = {}
    for run in runs_of(changes):
        words = f"{run.status} {run.reason}" if run.reason else f"{run.status}"
        life = lives.setdefault(run.run_id, [])
        if run.status in {"finished", "failed"} and life[-1].startswith("pending"):
            life.pop()
        if life[-1:] != [words]:
            life.append(words)
    return lives


def test_the_script_is_the_same_for_the_same_start_and_in_order() -> None:
    steps = fabrik_daemon.demo_steps(STARTED_AT)
    assert steps == fabrik_daemon.demo_steps(STARTED_AT)
    assert [step.at_s for step in steps] == sorted(step.at_s for step in steps)
    assert steps[-1].at_s <= fabrik_daemon.DEMO_S
    assert {step.cluster for step in steps if step.at_s <= 0} == set(fabrik_daemon.DEMO_CLUSTERS)


def test_every_object_is_added_once_before_it_changes_and_not_after_it_is_deleted() -> None:
    known: set[tuple[str, str]] = set()
    for step in fabrik_daemon.demo_steps(STARTED_AT):
        key = step.cluster, step.object["metadata"]["uid"]
        assert (step.type == "ADDED") == (key not in known), step
        (known.discard if step.type == "DELETED" else known.add)(key)


def test_every_status_and_every_phase_is_lived(changes: list[Change]) -> None:
    runs = runs_of(changes)
    assert {run.status for run in runs} == set(fabrik_daemon.STATUSES)
    phases = {"discover", "implement", "validate", "review", "human-gate", "done"}
    assert {run.phase for run in runs if run.phase} == phases
    assert {run.cluster for run in runs if run.status == "blocked"} == {"dev", "prod"}, "in both dialects"
    assert {run.reason for run in runs if run.reason} == {
        "ImagePullBackOff",
        "OOMKilled",
        "DeadlineExceeded",
        "Evicted",
        "JobSuspended",
        "Unschedulable",
    }


@pytest.mark.parametrize(
    "life",
    [
        ["pending", "running", "finished"],
        ["pending", "pending ImagePullBackOff", "pending", "running"],
        ["pending", "running", "failed OOMKilled"],
        ["pending", "running", "failed DeadlineExceeded"],
        ["pending", "running", "cancelled"],
        ["pending", "running", "pending JobSuspended", "pending", "running", "finished"],
        ["pending", "running", "blocked", "running", "finished"],
        ["pending", "running", "blocked"],
        ["pending", "running", "pending Evicted", "pending", "running", "finished"],
        ["pending", "pending Unschedulable"],
    ],
)
def test_a_run_lives_this_life(changes: list[Change], life: list[str]) -> None:
    assert life in lives_of(changes).values()


def test_the_script_ends_as_the_table_does(changes: list[Change]) -> None:
    assert Counter({run.run_id: run.status for run in runs_of(changes)}.values()) == SUMMARY


def test_schedule_volumes_and_warnings_live_too(changes: list[Change]) -> None:
    rows = [change.row for change in changes]
    last_runs = {row.last_run_at for row in rows if isinstance(row, fabrik_daemon.Schedule)}
    assert len(last_runs) == 3, "one before the demo, two in it"
    scheduled = {run.run_id for run in runs_of(changes) if run.schedule_id == "nightly"}
    assert len(scheduled) == 2
    phases = {row.phase for row in volumes_of(changes)}
    assert phases == {"Pending", "Bound"}
    counts: dict[str | None, int] = {}
    for row in rows:
        if isinstance(row, fabrik_daemon.ClusterEvent):
            assert row.run_id
            counts[row.reason] = row.count
    once = {"BackoffLimitExceeded": 1, "DeadlineExceeded": 1, "Evicted": 1}
    assert counts == {"BackOff": 5, "FailedScheduling": 5, **once}


# The executable ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder for temporary files, with a path that a socket's can begin with, and nothing else in reach."""
    assert home.is_dir()
    with tempfile.TemporaryDirectory(prefix="fabrik-", dir="/tmp") as place:
        monkeypatch.setenv("TMPDIR", place)
        yield Path(place)


def group_of(pid: int) -> list[str]:
    """Return the processes of a process group that are no zombies."""
    shown = subprocess.run(["ps", "-A", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in shown.splitlines()]
    return [" ".join(row[2:]) for row in rows if row[0] == str(pid) and not row[1].startswith("Z")]


def nothing_is_left(pid: int, folder: Path) -> None:
    """Check that neither a process nor a file is left."""
    assert group_of(pid) == []
    assert list(folder.iterdir()) == []


@contextlib.contextmanager
def piped_demo(executable: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a demo whose output is a pipe, in a process group of its own."""
    pipe = subprocess.PIPE
    command = [sys.executable, str(executable), "demo"]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def daemon_pid(folder: Path) -> int:
    """Return the demo's daemon, as soon as it holds its lock."""
    wait_until(lambda: any(path.read_text() for path in folder.glob("*/daemon.lock")), END_S, "the demo's daemon")
    return int(next(folder.glob("*/daemon.lock")).read_text())


def test_a_piped_demo_prints_the_final_table_once(executable: Path, folder: Path) -> None:
    with piped_demo(executable) as process:
        out, errors = process.communicate(timeout=END_S)
    assert (process.returncode, errors) == (0, "")
    assert out.count("RUN ") == 1
    assert "\x1b" not in out
    table = [line.split() for line in out.partition("\n\n")[0].splitlines()[1:]]
    assert Counter(row[2] for row in table) == SUMMARY
    assert {row[1] for row in table} == {"dev", "prod"}
    assert "\nvolumes    11 Bound, 1 removed\n" in out
    assert "5 BackOff" in out
    nothing_is_left(process.pid, folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_demo_leaves_nothing_behind(number: signal.Signals, executable: Path, folder: Path) -> None:
    with piped_demo(executable) as process:
        daemon_pid(folder)
        os.killpg(process.pid, number)
        out, errors = process.communicate(timeout=END_S)
    assert (process.returncode, out, errors) == (128 + number, "", "")
    nothing_is_left(process.pid, folder)


def test_a_signal_to_the_demo_alone_ends_its_daemon_too(executable: Path, folder: Path) -> None:
    with piped_demo(executable) as process:
        daemon_pid(folder)
        process.terminate()
        _, errors = process.communicate(timeout=END_S)
    assert (process.returncode, errors) == (143, "")
    nothing_is_left(process.pid, folder)


def test_a_daemon_that_dies_is_told_of(executable: Path, folder: Path) -> None:
    with piped_demo(executable) as process:
        os.kill(daemon_pid(folder), signal.SIGKILL)
        out, errors = process.communicate(timeout=END_S)
    assert (process.returncode, out) == (1, "")
    assert "the demo's daemon was ended by SIGKILL" in errors
    nothing_is_left(process.pid, folder)


@pytest.fixture
def terminals(executable: Path, folder: Path) -> Iterator[Callable[..., Terminal]]:
    """Start demos on terminals; at the end none is left."""
    started: list[Terminal] = []

    def start(*words: str, lines: int = 24, columns: int = 100) -> Terminal:
        command = [sys.executable, str(executable), "demo", *words]
        # os.environ, since a library may have set LINES and COLUMNS behind its back.
        environment = {**os.environ, "TERM": "xterm-256color"}
        started.append(Terminal(command, lines=lines, columns=columns, environment=environment))
        return started[-1]

    assert folder.is_dir()
    yield start
    for terminal in started:
        terminal.kill()


def test_a_demo_on_a_terminal_is_the_dashboard_and_ends_by_itself(
    terminals: Callable[..., Terminal], folder: Path
) -> None:
    terminal = terminals("--speed", "20", lines=14)
    terminal.wait_for("demo: .*● live", "● [0-9]+ running", "0 all .* 1 dev .* 2 prod", "RUN .*CLUSTER .*STATUS")
    assert terminal.close() == 0
    assert "1 pending, 1 running, 1 blocked" in terminal.left
    assert terminal.modes_after == terminal.modes
    nothing_is_left(terminal.pid, folder)


def test_a_demo_that_was_touched_stays_until_it_is_left(terminals: Callable[..., Terminal], folder: Path) -> None:
    terminal = terminals("--speed", "20", lines=30)
    terminal.wait_for("● [0-9]+ running")
    terminal.press(b"a")
    terminal.wait_for("demo: over, q leaves", "◆ 1 ")  # the word leaves where more kinds have to fit
    terminal.read(2.5)  # longer than a demo that nobody touched stays
    terminal.press(b"q")
    assert terminal.close() == 0
    assert "RUN" in terminal.left
    nothing_is_left(terminal.pid, folder)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_it_and_the_terminal_is_as_before(
    number: signal.Signals, code: int, terminals: Callable[..., Terminal], folder: Path
) -> None:
    terminal = terminals()
    terminal.wait_for("demo: [2-9] s of 60 s", "● [0-9]+ running")
    os.kill(terminal.pid, number)
    assert terminal.close() == code
    assert terminal.modes_after == terminal.modes
    assert "\x1b[?25h" in terminal.raw[terminal.raw.index("\x1b[?1049h") :]
    assert "RUN" not in terminal.left
    nothing_is_left(terminal.pid, folder)


def test_a_daemon_that_dies_under_the_dashboard_ends_the_demo(terminals: Callable[..., Terminal], folder: Path) -> None:
    terminal = terminals()
    terminal.wait_for("● [0-9]+ running")
    os.kill(daemon_pid(folder), signal.SIGKILL)
    assert terminal.close() == 1
    assert "the demo's daemon was ended by SIGKILL" in terminal.left
    nothing_is_left(terminal.pid, folder)
