"""What README shows of lists, history, SQL, pipelines, cron and exit codes, word for word, in a home with a cache."""

from __future__ import annotations

import contextlib
import csv
import re
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from commands import Shell, build_cache, run_row

from fabrik_daemon import MATCHED_EXIT_CODE, FabrikError, format_time

if TYPE_CHECKING:
    from collections.abc import Iterator

README: Final = (Path(__file__).parent.parent / "README.md").read_text()
COMMAND_S: Final = 120


def commands() -> list[str]:
    """Return the commands of README that want a cache, in order."""
    found = []
    for body in re.findall(r"^```console with-cache\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        joined = re.sub(r"\\\n\s*", "", body)
        found += [line[2:].strip() for line in joined.splitlines() if line.startswith("$ ")]
    return found


@pytest.fixture(scope="module")
def shell(executable: Path, unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    found = Shell(executable, unpacked, tmp_path_factory.mktemp("readme") / "user")
    build_cache(found.cache, 30, cluster="prod")
    for folder in (found.home / "dist", found.home / ".local" / "bin"):
        folder.mkdir(parents=True)
        program = folder / "fabrik-daemon"
        program.write_text(f'#!/bin/sh\nexec "{found.python}" "{executable}" "$@"\n')
        program.chmod(0o755)
    return found


def run(shell: Shell, command: str, program: str = "bash") -> subprocess.CompletedProcess[str]:
    """Run a line as README's reader, or cron, would."""
    words = [program, "-euo", "pipefail", "-c", command] if program == "bash" else ["/bin/sh", "-c", command]
    return subprocess.run(
        words,
        env=shell.environment,
        cwd=shell.home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )


def test_readme_shows_commands_of_every_kind() -> None:
    text = "\n".join(commands())
    for part in (
        "-o csv |",
        "-o jsonl |",
        "-o name |",
        "--at",
        "--param",
        "@blocked",
        "stats",
        "completion",
        "--since",
    ):
        assert part in text


@pytest.mark.parametrize("command", commands())
def test_every_command_as_it_is_written(command: str, shell: Shell) -> None:
    done = run(shell, command)
    assert done.returncode == 0, done
    said = [line for line in done.stderr.splitlines() if "from the cache: prod as of" not in line]
    assert [line for line in said if "as known at" not in line] == [], done.stderr


def test_what_the_pipelines_print(shell: Shell) -> None:
    by_csv, by_name, by_jsonl = (run(shell, line).stdout for line in commands() if "|" in line)
    rows = list(csv.DictReader(by_csv.splitlines()))
    assert (len(rows), list(rows[0])) == (30, ["run_id", "cluster", "status"])
    ids = {
        status: [run_row(n).run_id for n in range(29, -1, -1) if run_row(n).status == status]
        for status in ("failed", "blocked")
    }
    assert re.findall(r"^run: +(\S+)$", by_name, re.MULTILINE) == ids["failed"]
    assert by_jsonl.split() == ids["blocked"]


def test_the_line_for_cron(shell: Shell) -> None:
    (line,) = re.findall(r"^```crontab\n(.*?)\n```$", README, re.MULTILINE | re.DOTALL)
    *when, command = line.split(" ", 5)
    assert (len(when), "%" in command) == (5, False), "cron takes % for a newline"
    done = run(shell, command, "sh")
    assert (done.returncode, done.stdout) == (0, ""), done
    with contextlib.closing(sqlite3.connect(shell.cache)) as connection, connection:
        ago = format_time(time.time() - 7200, milliseconds=True)
        connection.execute(
            "INSERT INTO run_events (run_id, event_type, payload, local_timestamp) VALUES (?, 'blocked', '{}', ?)",
            (run_row(2).run_id, ago),
        )
    done = run(shell, command, "sh")
    assert (done.returncode, done.stdout) == (8, f"{run_row(2).run_id}\t\n"), done


def exit_codes_of(kind: type[FabrikError]) -> Iterator[int]:
    """Yield the exit codes of an error and of all its kinds."""
    yield kind.exit_code
    for below in kind.__subclasses__():
        yield from exit_codes_of(below)


def test_the_table_of_exit_codes_is_whole() -> None:
    table = README[README.index("| exit code | |") :]
    codes = [int(code) for code in re.findall(r"^\| (\d+) \| ", table[: table.index("\n\n")], re.MULTILINE)]
    assert set(codes) == {0, 130, MATCHED_EXIT_CODE, *exit_codes_of(FabrikError)}
    assert codes == sorted(codes)


UNREACHABLE: Final = """
current-context: a
contexts: [{name: a, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: "http://127.0.0.1:9"}}]
users: [{name: u, user: {}}]
"""


def test_exit_codes(shell: Shell) -> None:
    """Those of interrupts and of waiting in vain stand in test_user_sql.py and test_reading.py."""
    finished, blocked = run_row(3).run_id, run_row(2).run_id
    shell.write(shell.home / "kc", UNREACHABLE)
    shell.write(shell.clusters, f"clusters: [{{name: prod, kubeconfig: {shell.home / 'kc'}}}]")
    for words, code in (
        (f"runs wait {finished}", 0),
        (f"runs wait {finished} --for failed", 1),
        (f"runs wait {blocked}", 4),
        ("runs list --status finishd", 2),
        ("runs show zzz", 3),
        ("runs list --cluster elsewhere", 3),
        ("stop", 4),
        ("runs list --fresh", 5),
        ("runs list --max-age 1ms", 6),
        ("query 'SELECT 1' --fail-if rows", 8),
        ("stop --remote wss://localhost/daemon", 9),
    ):
        done = run(shell, f"dist/fabrik-daemon {words}")
        assert done.returncode == code, (words, done)
