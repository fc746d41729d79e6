"""Completion in real shells: bash, and zsh and fish where they are installed, each in a terminal, by the Tab key."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from commands import Shell, build_cache, run_row

from fabrik_daemon import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_S: Final = 30.0
QUIET_S: Final = 0.5  # a shell that says nothing for so long has said all; only for what must not come
READY: Final = "ready>"
SETUP: Final = {
    "bash": "bind 'set bell-style none'; PS1='ready> '",
    "zsh": "unsetopt zle_bracketed_paste; autoload -U compinit; compinit -u -D; PS1='ready> '",
    "fish": "function fish_prompt; echo 'ready> '; end; function fish_greeting; end",
}
START: Final = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-f", "-i"], "fish": ["--no-config", "-i"]}
LOAD: Final = {
    "bash": "source <(fabrik-daemon completion bash)",
    "zsh": "source <(fabrik-daemon completion zsh)",
    "fish": "fabrik-daemon completion fish | source",
}


@pytest.fixture(scope="module")
def home(executable: Path, unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Return a home with a cache, and the program under its name in the PATH."""
    shell = Shell(executable, unpacked, tmp_path_factory.mktemp("completion") / "user")
    build_cache(shell.cache, 12)
    folder = shell.home / "bin"
    folder.mkdir()
    program = folder / "fabrik-daemon"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{executable}" "$@"\n')
    program.chmod(0o755)
    shell.environment["PATH"] = f"{folder}:{os.environ['PATH']}"
    return shell


def complete(home: Shell, line: str, shell: str = "fish", current: str = "") -> list[str]:
    """Return what the program offers at the end of a line."""
    done = home.run("_complete", shell, current, line)
    assert (done.code, done.stderr) == (0, "")
    return done.stdout.splitlines()


def words(home: Shell, line: str) -> list[str]:
    """Return the words offered, without what they mean."""
    return [found.partition("\t")[0] for found in complete(home, line)]


def test_words_of_commands(home: Shell) -> None:
    assert set(words(home, "fabrik-daemon ")) == {command.words.split()[0] for command in COMMANDS}
    assert words(home, "fabrik-daemon ru") == ["runs"]
    assert set(words(home, "fabrik daemon clusters ")) == {"list", "add", "discover", "test", "remove"}
    assert "show\tshow one run whole" in complete(home, "fabrik-daemon runs ")
    assert words(home, "fabrik-daemon --cache /x ru") == ["runs"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("runs list --status ", ["pending", "running", "blocked", "finished", "failed", "cancelled", "unknown"]),
        ("runs list --status=f", ["--status=finished", "--status=failed"]),
        ("runs list --cluster ", ["test"]),
        ("runs list --cluster t", ["test"]),
        ("runs list -o js", ["json", "jsonl"]),
        ("runs list --phase ", ["implement"]),
        ("runs list --project my", ["myapp"]),
        ("volumes list --sort-by ca", ["capacity_bytes"]),
        ("clusters remove ", ["test"]),
        ("completion ", ["bash", "zsh", "fish"]),
        ("runs wait --for ", ["finished", "failed", "blocked", "terminal"]),
        ("runs show @", ["@latest", "@blocked", "@failed", "@running"]),
        ("runs list --sta", ["--status"]),
        ("nonsense ", []),
        ("runs list --limit ", []),
    ],
)
def test_values(line: str, expected: list[str], home: Shell) -> None:
    assert words(home, f"fabrik-daemon {line}") == expected


def test_runs_the_newest_first(home: Shell) -> None:
    ids = [run_row(number).run_id for number in reversed(range(12))]
    assert words(home, "fabrik-daemon runs show 0") == ids
    assert words(home, f"fabrik-daemon runs logs --id {ids[3][:-1]}") == [ids[3]]
    meaning = complete(home, f"fabrik-daemon runs show {ids[0][:-1]}")[0].partition("\t")[2]
    assert meaning == "cancelled feature-11"


def test_bash_gets_the_part_of_the_word_that_it_replaces(home: Shell) -> None:
    assert complete(home, "fabrik-daemon runs list --status=bl", "bash", "bl") == ["blocked"]
    assert complete(home, "fabrik-daemon runs list --status=", "bash", "") == [
        *("pending", "running", "blocked", "finished", "failed", "cancelled", "unknown")
    ]
    assert complete(home, "fabrik-daemon runs show @bl", "bash", "@bl") == ["@blocked"]


def test_nothing_is_offered_that_a_shell_would_run(home: Shell, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "cache.db"
    build_cache(cache, 1)
    with contextlib.closing(sqlite3.connect(cache)) as connection, connection:
        for number, name in enumerate(("x;touch$IFS$HOME/pwned", "$(id)", "a b", "`id`", "x\ny", "\x1b[2J", "good-1")):
            connection.execute(
                "INSERT INTO runs (run_id, cluster, spec_id) VALUES (?, 'test', ?)", (f"{name}{number}", name)
            )
    done = home.run("_complete", "fish", "", "fabrik-daemon runs list --spec ", env={"FABRIK_CACHE": str(cache)})
    assert done.stdout == "feature-0\ngood-1\n"
    runs = home.run("_complete", "bash", "", "fabrik-daemon runs show ", env={"FABRIK_CACHE": str(cache)}).stdout
    assert {line for line in runs.splitlines() if not line.startswith("@")} == {"good-16", run_row(0).run_id}
    assert not set(runs) & set(";$`\x1b ")


@pytest.mark.parametrize("cache", ["/nowhere/cache.db", "/dev/null"])
def test_without_a_cache_there_is_nothing_and_no_error(cache: str, home: Shell) -> None:
    done = home.run("_complete", "bash", "", "fabrik-daemon runs show ", env={"FABRIK_CACHE": cache})
    assert (done.code, done.stdout, done.stderr) == (0, "", "")


class Terminal:
    """An interactive shell in a terminal."""

    def __init__(self, shell: str, home: Shell) -> None:
        """Start it with the completion loaded."""
        self._pid, self._file = pty.fork()
        if self._pid == 0:
            os.chdir(home.home)
            program = shutil.which(shell) or shell
            environment = {**home.environment, "TERM": "dumb" if shell != "fish" else "xterm", "COLUMNS": "200"}
            os.execve(program, [shell, *START[shell]], environment)  # noqa: S606 - words, no shell of ours
        self.text = ""
        self.type(SETUP[shell] + "\n")
        self.type(LOAD[shell] + "\n")
        self.type("echo loa''ded\n")
        self.wait_for("loaded\r\n")

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._file, text.encode())

    def wait_for(self, part: str) -> str:
        """Return what was shown up to and with a part, once it is there."""
        deadline = time.monotonic() + PATIENCE_S
        while part not in self.text:
            assert time.monotonic() < deadline, f"{part!r} is not in {self.text!r}"
            if select.select([self._file], [], [], 0.1)[0]:
                self.text += os.read(self._file, 65536).decode("utf-8", "replace")
        before, _, self.text = self.text.partition(part)
        return before + part

    def close(self) -> None:
        """End it."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._file)


@pytest.fixture(params=["bash", "zsh", "fish"])
def terminal(request: pytest.FixtureRequest, home: Shell) -> Iterator[Terminal]:
    if not shutil.which(request.param):
        pytest.skip(f"{request.param} is not installed here")
    found = Terminal(request.param, home)
    yield found
    found.close()


def test_the_tab_key_in_a_real_shell(terminal: Terminal) -> None:
    run = run_row(7).run_id
    for typed, expected in (
        ("fabrik-daemon sched\tli\t", "fabrik-daemon schedules list "),
        ("fabrik-daemon runs list --status blo\t", "fabrik-daemon runs list --status blocked "),
        ("fabrik-daemon runs list --status=blo\t", "fabrik-daemon runs list --status=blocked"),
        ("fabrik-daemon runs list --cluster te\t", "fabrik-daemon runs list --cluster test "),
        (f"fabrik-daemon runs show {run[:-2]}\t", f"fabrik-daemon runs show {run}"),
        ("fabrik-daemon runs show @lat\t", "fabrik-daemon runs show @latest"),
    ):
        for key in typed.replace("\t", "\t\0").split("\0"):
            terminal.type(key)
            time.sleep(QUIET_S if key.endswith("\t") else 0)  # a second key before the answer to Tab would be lost
        terminal.type("\x01echo '<\x05>'\n")  # to the line's begin and end: what it has become is printed
        shown = terminal.wait_for(">\r\n").replace("\r\n", "\n").rpartition("<")[2][:-2]
        assert shown.strip() == expected.strip(), typed


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_what_its_shell_takes(shell: str, home: Shell) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed here")
    script = home.run("completion", shell).stdout
    assert subprocess.run([program, "-n"], input=script, text=True, check=True, capture_output=True).stderr == ""
