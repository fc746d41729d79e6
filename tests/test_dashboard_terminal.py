"""The built executable's dashboard on terminals: a real daemon below it, killed and back; signals, colours, tmux."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from commands import build_cache, run_row
from fabrik_objects import Report, job, pod, run_id
from fakes import ModelServer
from harness import Cluster, wait_until
from remotes import RemoteHost
from terminals import ENTER, ESCAPE, Terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fakes import Authority
    from hosts import Host

    Open = Callable[..., Terminal]

ROOT: Final = Path(__file__).resolve().parent.parent
QUICK: Final = {"batch": "10ms"}
TOLD_S: Final = 2.0  # a dashboard says within that time that its daemon is gone
NEVER_S: Final = 30.0
CSI: Final = re.compile(r"\x1b\[([0-9;]*)m")


@pytest.fixture
def server(authority: Authority) -> Iterator[ModelServer]:
    with ModelServer(authority) as made:
        for number in range(3):
            made.put("jobs", job(number))
            made.put("pods", pod(number, report=Report(phase="implement", status="running", finished=3, total=192)))
        yield made
    assert made.violations == []
    assert made.crashes == []


@pytest.fixture
def host(make_host: Callable[..., Host], server: ModelServer) -> Host:
    made = make_host(Cluster(server, "dev"), **QUICK)
    made.start()
    made.settle()
    return made


@pytest.fixture
def open_terminal() -> Iterator[Open]:
    """Start dashboards on terminals; at the end none is left."""
    started: list[Terminal] = []

    def start(host: Host, *words: str, lines: int = 24, columns: int = 80, **variables: str) -> Terminal:
        environment = {**host.environment, "TERM": "xterm-256color", **variables}
        command = host.command("dashboard", *words)
        started.append(Terminal(command, lines=lines, columns=columns, environment=environment))
        return started[-1]

    yield start
    for terminal in started:
        terminal.kill()


def report(server: ModelServer, number: int, finished: int, status: str = "running") -> None:
    """Have a run report its progress."""
    phase = "human-gate" if status == "blocked" else "implement"
    server.put("pods", pod(number, report=Report(phase=phase, status=status, finished=finished, total=192)))


def left_in_order(terminal: Terminal) -> None:
    """Check that a terminal is as it was: its modes, its screen, its cursor, its mouse."""
    assert terminal.modes_after == terminal.modes
    after = terminal.raw[terminal.raw.rindex("\x1b[?1049l") - 400 :]
    assert "\x1b[?25h" in after
    assert "\x1b[?1000l" in after
    assert terminal.raw.count("\x1b[?1049h") == terminal.raw.count("\x1b[?1049l")


@pytest.mark.parametrize(("lines", "columns"), [(24, 80), (60, 200)])
def test_changes_are_shown_as_they_come(
    lines: int, columns: int, host: Host, server: ModelServer, open_terminal: Open
) -> None:
    terminal = open_terminal(host, lines=lines, columns=columns)
    terminal.wait_for("● live", "● 3 running", r"1 dev 3", r"3/192")
    assert len(terminal.lines[0]) <= columns
    report(server, 1, 77)
    terminal.wait_for(r" 77/192")
    report(server, 1, 78, status="blocked")
    terminal.wait_for("◆ 1 blocked", "^▌.*◆ blocked", "waiting at a human gate")
    terminal.press(b"a")
    terminal.wait_for("▌attention")
    server.put("jobs", job(7))
    terminal.wait_for(r"1 dev 4", "○ pending")
    terminal.press(b"q")
    assert terminal.close() == 0
    left_in_order(terminal)


def test_a_daemon_that_is_killed_is_missed_at_once_and_found_again(
    host: Host, server: ModelServer, open_terminal: Open
) -> None:
    terminal = open_terminal(host, "--no-start")
    terminal.wait_for("● live", "● 3 running")
    host.signal(signal.SIGKILL)
    assert terminal.wait_for("○ no daemon: the cache") < TOLD_S
    terminal.wait_for("● 3 running", r"3/192", r"⚠ \d+s old")
    report(server, 0, 99)
    host.start()
    terminal.wait_for("● live", r"99/192")
    terminal.wait_for(r"1 dev 3 *$", within_s=NEVER_S)
    report(server, 0, 100)
    terminal.wait_for(r"100/192")
    terminal.press(b"q")
    assert terminal.close() == 0


def test_a_daemon_is_started_where_none_runs(
    make_host: Callable[..., Host], server: ModelServer, open_terminal: Open
) -> None:
    host = make_host(Cluster(server, "dev"), **QUICK)
    terminal = open_terminal(host)
    terminal.wait_for("● live", "● 3 running")
    assert len(host.daemon_pids()) == 1
    terminal.press(b"q")
    assert terminal.close() == 0
    assert len(host.daemon_pids()) == 1, "it goes on"
    assert host.cli("stop").returncode == 0


def test_without_daemon_and_cache_it_says_so_and_with_a_cache_shows_that(
    make_host: Callable[..., Host], server: ModelServer, open_terminal: Open
) -> None:
    host = make_host(Cluster(server, "dev"))
    terminal = open_terminal(host, "--no-start")
    terminal.wait_for("no daemon: nothing is known yet", "no runs")
    build_cache(host.cache, 1000)
    terminal.wait_for("no daemon: the cache", "runs 1000")
    terminal.press(b"G")
    terminal.wait_for(run_row(0).run_id[-5:])
    terminal.press(b"q")
    assert terminal.close() == 0


def test_a_run_its_history_and_its_log(host: Host, server: ModelServer, open_terminal: Open) -> None:
    name = pod(2)["metadata"]["name"]
    server.logs.start("fabrik-runs", name)
    server.logs.write("fabrik-runs", name, [(f"2026-02-16T12:00:0{number}Z", f"line {number}") for number in range(3)])
    terminal = open_terminal(host, lines=30, columns=100)
    terminal.wait_for("● live", r"3/192")
    terminal.press(b":run " + run_id(2).encode(), ENTER)
    terminal.wait_for(f"runs > run {run_id(2)}", "TIMELINE", "● running", "namespace +fabrik-runs")
    terminal.press(b"l")
    terminal.wait_for("line 0", "line 2", "followed")
    server.logs.write("fabrik-runs", name, [("2026-02-16T12:00:09Z", "and one more")])
    terminal.wait_for("and one more")
    readers = children_of(terminal.pid)
    assert len(readers) == 1
    terminal.press(b"h")
    terminal.wait_for("runs > run ")
    wait_until(lambda: not children_of(terminal.pid), NEVER_S, "nobody reads a log that nobody sees")
    terminal.press(b"l")
    terminal.wait_for("and one more")
    terminal.press(b"q")
    assert terminal.close() == 0


def children_of(pid: int) -> list[str]:
    """Return the processes that a process has started and that go on."""
    shown = subprocess.run(["ps", "-A", "-o", "ppid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in shown.splitlines()]
    return [row[2] for row in rows if row[0] == str(pid) and not row[1].startswith("Z")]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_it_and_gives_the_terminal_back(
    number: signal.Signals, code: int, host: Host, open_terminal: Open
) -> None:
    terminal = open_terminal(host)
    terminal.wait_for("● live")
    os.kill(terminal.pid, number)
    assert terminal.close() == code
    left_in_order(terminal)


def test_a_defect_gives_the_terminal_back_and_is_told(host: Host, open_terminal: Open, tmp_path: Path) -> None:
    script = tmp_path / "defect.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        "import fabrik_daemon\n"
        "def fail(*_): raise ZeroDivisionError('planted')\n"
        "fabrik_daemon.Desk.set_filter = fail\n"
        "sys.argv[1:] = ['dashboard', '--no-start']\n"
        "fabrik_daemon.run()\n"
    )
    terminal = Terminal([sys.executable, str(script)], environment={**host.environment, "TERM": "xterm-256color"})
    try:
        terminal.wait_for("● live")
        terminal.press(b"/x")
        assert terminal.close() == 1
    finally:
        terminal.kill()
    left_in_order(terminal)
    assert "planted" in terminal.left
    assert "please report" in terminal.left


def test_a_suspended_dashboard_comes_back(host: Host, open_terminal: Open) -> None:
    terminal = open_terminal(host)
    terminal.wait_for("● live")
    terminal.press(b"\x1a")
    terminal.wait_for_raw("\x1b[?1049l")
    wait_until(lambda: state_of(terminal.pid) == "T", NEVER_S, "it is stopped")
    os.kill(terminal.pid, signal.SIGCONT)
    wait_until(lambda: terminal.read(0.1) and terminal.raw.count("\x1b[?1049h") == 2, NEVER_S, "its screen is back")
    terminal.press(b"?")
    terminal.wait_for("half a page down")
    terminal.press(b"q")
    assert terminal.close() == 0
    left_in_order(terminal)


def state_of(pid: int) -> str:
    """Return how a process is: T means stopped."""
    return subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout[:1]


def test_a_terminal_that_changes_its_size(host: Host, open_terminal: Open) -> None:
    terminal = open_terminal(host, lines=24, columns=80)
    terminal.wait_for("● live", "Enter open")
    terminal.resize(40, 160)
    terminal.wait_for(r"Tab cluster  \? help  q quit")
    wait_until(lambda: terminal.read(0.1) or terminal.lines[39].startswith(" Enter"), NEVER_S, "the last line")
    terminal.resize(10, 40)
    wait_until(lambda: terminal.read(0.1) or terminal.lines[9].startswith(" Enter"), NEVER_S, "the last line")
    terminal.press(b"q")
    assert terminal.close() == 0


@pytest.mark.parametrize(
    ("variables", "allowed"),
    [
        ({"NO_COLOR": "1"}, r"0|1|2|3|4|7|22|23|24|27|39|49"),
        ({"TERM": "xterm", "COLORTERM": ""}, r"0|1|2|3|4|7|22|23|24|27|39|49|3[0-7]|4[0-7]|9[0-7]|10[0-7]"),
    ],
    ids=["NO_COLOR", "16 colours"],
)
def test_a_terminal_gets_no_colours_that_it_does_not_know(
    variables: dict[str, str], allowed: str, host: Host, server: ModelServer, open_terminal: Open
) -> None:
    report(server, 1, 9, status="blocked")
    terminal = open_terminal(host, **variables)
    terminal.wait_for("● live", "◆ 1 blocked", "● 2 running")
    terminal.press(b"j", b"?")
    terminal.wait_for("half a page down")
    terminal.press(b"q")
    assert terminal.close() == 0
    screen = terminal.raw.partition("\x1b[?1049h")[2].partition("\x1b[?1049l")[0]
    used = {part for codes in CSI.findall(screen) for part in (codes or "0").split(";")}
    assert {part for part in used if not re.fullmatch(allowed, part.lstrip("0") or "0")} == set()
    assert "7" in used, "the row under the cursor is still seen"


def test_no_terminal_no_dashboard(host: Host) -> None:
    done = host.cli("dashboard")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "fabrik-daemon: the dashboard needs a terminal: use 'fabrik-daemon runs list' or 'runs watch'\n"
    )


def test_the_daemon_of_another_host(
    server: ModelServer, executable: Path, unpacked: Path, tmp_path: Path, open_terminal: Open
) -> None:
    with RemoteHost(executable, unpacked, tmp_path / "remote", [Cluster(server, "far")], timing=QUICK) as remote:
        remote.start()
        remote.settle()
        elsewhere = {name: str(tmp_path / "elsewhere" / name) for name in ("FABRIK_CACHE", "FABRIK_SOCKET", "HOME")}
        flags = ("--remote", remote.url, "--token-file", str(remote.token_file))
        terminal = open_terminal(remote, *flags, MODE="", FABRIK_TOKEN_FILE="", **elsewhere)
        terminal.wait_for("● live", "● 3 running", "1 far 3")
        report(server, 1, 77)
        terminal.wait_for(r" 77/192")
        remote.signal(signal.SIGKILL)
        terminal.wait_for("○ not connected", within_s=NEVER_S)
        report(server, 1, 88)
        remote.start()
        terminal.wait_for("● live", r" 88/192")
        terminal.press(b":run " + run_id(1).encode(), ENTER)
        terminal.wait_for("TIMELINE")
        terminal.press(ESCAPE)
        terminal.wait_for("runs 3")
        terminal.press(b"q")
        assert terminal.close() == 0
        assert not (tmp_path / "elsewhere" / "FABRIK_CACHE").exists()
        remote.stop()


@pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux here")
@pytest.mark.parametrize(("lines", "columns"), [(24, 80), (60, 200)])
def test_a_session_of_the_demo_under_tmux(lines: int, columns: int, executable: Path, home: Path) -> None:
    """Play the demo as a person does who looks around in it; every screen is captured as tmux sees it."""
    with tempfile.TemporaryDirectory(prefix="fabrik-", dir="/tmp") as folder:
        tmux = ["tmux", "-S", f"{folder}/tmux", "-f", "/dev/null"]
        environment = {**os.environ, "TMPDIR": folder, "TERM": "xterm-256color", "HOME": str(home)}
        command = f"exec {sys.executable} {executable} demo --speed 4"

        def run(*words: str) -> str:
            return subprocess.run([*tmux, *words], env=environment, capture_output=True, text=True, check=True).stdout

        def wait_for(*patterns: str) -> None:
            def shown() -> bool:
                screen = run("capture-pane", "-p")
                return all(re.search(pattern, screen, re.MULTILINE) for pattern in patterns)

            try:
                wait_until(shown, 60, json.dumps(patterns))
            except AssertionError as error:
                raise AssertionError(f"{error}\n{run('capture-pane', '-p')}") from None

        def press(*keys: str) -> None:
            run("send-keys", *keys)

        run("new-session", "-d", "-x", str(columns), "-y", str(lines), command, ";", "set", "remain-on-exit", "on")
        try:
            wait_for("demo: .* s of 60 s .*● live", "● [0-9]+ running", "PROGRESS")
            press("/", "status:run", "Enter")
            wait_for(r"/status:run", "● running")
            press("Enter")
            wait_for("runs > run ", "TIMELINE", "● running")
            press("y")
            wait_for("cluster: (dev|prod)")
            press("g", "c")
            wait_for("clusters 2", "5/5")
            press("g", "s")
            wait_for("nightly")
            press("g", "r", ":", "filter", "Enter", "a")
            wait_for("▌attention", "✗ [1-9] failed", "^▌")
            press("?")
            wait_for("half a page down")
            press("q")
            wait_until(lambda: "1" in run("list-panes", "-F", "#{pane_dead}"), 60, "the demo has ended")
            assert "RUN" in run("capture-pane", "-p", "-S", "-200")
        finally:
            run("kill-server")
