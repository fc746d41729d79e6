"""query, config and output on terminals, through the built executable: what scripts, cron and people rely on."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pty
import sqlite3
import subprocess
from typing import TYPE_CHECKING, Any, Final

import pytest
import yaml
from commands import Shell, build_cache, refused, run_row

from fabrik_daemon import LogRing, Timing, config_example, make_log, open_cache, parse_config, upsert

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE: Final = 'a "quoted", cell\nwith a second line\tand a tab; \x1b[2J \u202e=1+1 \u65e5\u672c'
FORMULA: Final = "=cmd|' /C calc'!A0"
ESCAPED: Final = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")


@pytest.fixture(scope="module")
def shell(executable: Path, unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    found = Shell(executable, unpacked, tmp_path_factory.mktemp("scripts") / "user")
    build_cache(found.cache, 20)
    with contextlib.closing(open_cache(str(found.cache), make_log("error", io.StringIO(), LogRing()))) as connection:
        for number in (2, 4):
            row = run_row(number)._replace(reason=HOSTILE, project=FORMULA, current_task='say "no"')
            connection.execute(*upsert(row))
    return found


# ---------------------------------------------------------------- query


def test_hostile_rows_parse_in_every_format(shell: Shell) -> None:
    words = ("query", "SELECT run_id, reason, project, current_task FROM runs WHERE reason IS NOT NULL ORDER BY run_id")
    texts = {output: shell.run(*words, "-o", output).stdout for output in ("json", "jsonl", "yaml", "csv", "tsv")}
    rows = json.loads(texts["json"])
    assert [row["reason"] for row in rows] == [HOSTILE] * 2
    assert [json.loads(line) for line in texts["jsonl"].splitlines()] == rows
    assert yaml.safe_load(texts["yaml"]) == rows
    cells = list(csv.DictReader(io.StringIO(texts["csv"], newline="")))
    assert [(row["reason"], row["project"], row["current_task"]) for row in cells] == [
        (ESCAPED, f"'{FORMULA}", 'say "no"')
    ] * 2
    assert [line.count("\t") for line in texts["tsv"].splitlines()] == [3] * 3
    for text in texts.values():
        assert not set(text) & {"\x1b", "\u202e"}


def test_parameters_files_and_stdin(shell: Shell) -> None:
    statement = "SELECT count(*) AS n FROM runs WHERE status = :status AND progress_finished >= :least LIMIT :limit"
    values = ("--param", "status=failed", "--param", "least=4", "--param", "limit=1")
    file = shell.write(shell.home / "count.sql", statement)
    answers = [shell.run("query", said, *values, "-o", "json").stdout for said in (statement, f"@{file}")]
    piped = subprocess.run(
        [shell.python, str(shell.executable), "query", "-", *values, "-o", "json"],
        env=shell.environment,
        input=statement,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [json.loads(text) for text in (*answers, piped.stdout)] == [[{"n": 3}]] * 3
    hostile = shell.run("query", "SELECT :x AS x", "--param", "x='; DROP TABLE runs; --", "-o", "json")
    assert json.loads(hostile.stdout) == [{"x": "'; DROP TABLE runs; --"}]
    typed = shell.run(
        "query", "SELECT typeof(:a) AS a, typeof(:b) AS b, typeof(:c) AS c", *_params("a=5", "b=1.5", "c=")
    )
    assert typed.stdout.split()[3:] == ["integer", "real", "text"]


def _params(*assignments: str) -> list[str]:
    return [word for assignment in assignments for word in ("--param", assignment)]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("SELECT 1", "--param", "x=1"), "no :x in the statement"),
        (("SELECT :x",), "SQL"),
        (("SELECT 1", "--param", "x"), "NAME=VALUE"),
        (("@nowhere.sql",), "nowhere.sql: no such file"),
        (("SELECT 1", "--fail-if", "row"), "did you mean 'rows'?"),
        ((), "a statement is missing"),
    ],
    ids=str,
)
def test_mistakes_in_a_query(words: tuple[str, ...], part: str, shell: Shell) -> None:
    refused(shell.run("query", *words), 2, part)


def test_what_cron_is_told_by_the_exit_code(shell: Shell) -> None:
    for statement, rows, empty in (("SELECT 1 AS a", 8, 0), ("SELECT 1 AS a WHERE 0", 0, 8)):
        for word, code in (("rows", rows), ("empty", empty)):
            done = shell.run("query", statement, "--fail-if", word, "-o", "csv")
            assert (done.code, done.stdout.splitlines()) == (code, ["a", "1"] if rows else ["a"]), word


def test_columns_of_one_name_do_not_hide_each_other(shell: Shell) -> None:
    done = shell.run("query", "SELECT 1 AS a, 2 AS a, 3 AS b, 4 AS a", "-o", "json")
    assert json.loads(done.stdout) == [{"a": 1, "a_2": 2, "b": 3, "a_3": 4}]


@pytest.mark.parametrize("view", ["v_active", "v_blocked", "v_failures", "v_stale", "v_storage", "v_durations"])
def test_a_ready_made_view_can_be_asked(view: str, shell: Shell) -> None:
    done = shell.run("query", "SELECT * FROM " + view, "-o", "json")  # noqa: S608 - names of ours
    assert done.code == 0, done
    rows = json.loads(done.stdout)
    expected = {"v_active": 11, "v_blocked": 3, "v_failures": 3, "v_stale": 4, "v_storage": 0, "v_durations": 9}
    assert len(rows) == expected[view]


def test_what_views_reckon(shell: Shell, tmp_path: Path) -> None:
    cache = tmp_path / "cache.db"
    build_cache(cache, 1)
    run = run_row(0)._replace(run_id="r", status="finished", started_at="2026-11-23T10:00:00Z")
    run = run._replace(created_at="2026-11-23T09:59:00Z", finished_at="2026-11-23T11:00:00Z")
    with contextlib.closing(sqlite3.connect(cache)) as connection, connection:
        connection.execute(*upsert(run))
        told = [("running", "10:00:01"), ("blocked", "10:10:00"), ("running", "10:30:00"), ("finished", "11:00:00")]
        for status, at in told:
            connection.execute(
                "INSERT INTO run_events (run_id, event_type, payload, local_timestamp)"
                " VALUES ('r', 'status_changed', ?, ?)",
                (json.dumps({"to": status}), f"2026-11-23T{at}.000Z"),
            )
        connection.execute(
            "INSERT INTO volumes (cluster, namespace, name, run_id, phase) VALUES ('c', 'n', 'v', 'r', 'Bound')"
        )
    statement = "SELECT waited_seconds, seconds, blocked_seconds FROM v_durations"
    done = shell.run("query", statement, "--cache", str(cache), "-o", "json")
    assert json.loads(done.stdout) == [{"waited_seconds": 60, "seconds": 3600, "blocked_seconds": 1200}]
    done = shell.run("query", "SELECT run_id, run_status FROM v_storage", "--cache", str(cache), "-o", "json")
    assert json.loads(done.stdout) == [{"run_id": "r", "run_status": "finished"}]


def test_the_schema_is_told_without_a_cache(shell: Shell) -> None:
    done = shell.run("query", "--schema", "--cache", "/nowhere/cache.db", "-o", "jsonl")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.code, done.stderr) == (0, "")
    assert {"table": "runs", "column": "status"}.items() <= rows[
        [row["column"] for row in rows].index("status")
    ].items()
    assert [row for row in rows if not row["meaning"]] == []


# ---------------------------------------------------------------- config


def test_a_config_that_explains_itself(shell: Shell) -> None:
    path = shell.home / "fresh" / "config.yaml"
    done = shell.run("config", "init", "--config", str(path))
    assert (done.code, done.stdout) == (0, f"wrote {path}\n")
    assert path.stat().st_mode & 0o077 == 0
    assert path.read_text() == config_example()
    refused(shell.run("config", "init", "--config", str(path)), 2, "--force")
    path.write_text("broken: [")
    assert shell.run("config", "init", "--force", "--config", str(path)).code == 0
    assert shell.run("config", "check", "--config", str(path)).code == 0


def test_the_example_names_every_key_with_its_default() -> None:
    lines = config_example().splitlines()[1:]
    text = "\n".join(line[2:] if line.startswith("# ") else line for line in lines)
    values = parse_config(text, "config.yaml")
    assert values["timing"] == Timing()
    assert (values["logLevel"], values["autostart"], values["keepLogs"]) == ("info", True, True)
    with pytest.raises(Exception, match="unknown key") as caught:
        parse_config("nonsense: 1", "config.yaml")
    known = str(caught.value).rpartition("choose from ")[2].split(", ")
    assert sorted(values) == sorted(known), "the example lacks a key, or knows one too many"


def test_what_is_set_and_by_what(shell: Shell) -> None:
    path = shell.write(shell.home / "own.yaml", "logLevel: debug\ntiming: {query: 2s}\n")
    rows = json.loads(shell.run("config", "show", "--config", str(path), "-o", "json").stdout)
    said = {row["key"]: (row["value"], row["set_by"]) for row in rows}
    assert said["config"] == (str(path), "--config")
    assert said["socket"] == (shell.environment["FABRIK_SOCKET"], "FABRIK_SOCKET")
    assert said["cache"] == (str(shell.cache), "default")
    assert said["logLevel"] == ("debug", "config.yaml")
    assert said["timing.query"] == ("2s", "config.yaml")
    assert said["timing.relist"] == ("30m", "default")
    assert "KEY" in shell.run("config", "show").stdout
    places = json.loads(shell.run("config", "path", "-o", "json").stdout)
    assert {"name": "cache", "path": str(shell.cache), "exists": True} in places


@pytest.mark.parametrize(
    ("clusters", "part"),
    [
        ("clusters: [{name: a, kubeconfig: nowhere}]", "a: "),
        ("clusters: [{nam: a}]", "did you mean 'name'?"),
        ("clusters: [{name: a, kubeconfig: kc, context: on}]", "did you mean 'one'?"),
    ],
)
def test_a_configuration_that_cannot_be_used(clusters: str, part: str, shell: Shell) -> None:
    folder = shell.home / "checked"
    shell.write(folder / "config.yaml", "logLevel: info\n")
    shell.write(folder / "kc", "contexts: [{name: one, context: {cluster: c}}]\n")
    shell.write(folder / "clusters.yaml", clusters)
    done = shell.run("config", "check", "--config", str(folder / "config.yaml"))
    assert done.code == 2
    assert len(done.complaints) == 1
    assert part in done.complaints[0]
    shell.write(folder / "clusters.yaml", "clusters: [{name: a, kubeconfig: kc, context: one}]")
    assert shell.run("config", "check", "--config", str(folder / "config.yaml")).code == 0


# ---------------------------------------------------------------- terminals


def on_a_terminal(shell: Shell, *words: str, columns: int, **environment: str) -> str:
    """Return what a command writes to a terminal so many columns wide."""
    reading, writing = pty.openpty()
    variables = {**shell.environment, "COLUMNS": str(columns), "TERM": "xterm", **environment}
    try:
        subprocess.run(
            [shell.python, str(shell.executable), *words],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        return os.read(reading, 65536).decode().replace("\r\n", "\n")
    finally:
        os.close(writing)
        os.close(reading)


@pytest.mark.parametrize("columns", [30, 80, 200])
def test_a_table_fits_its_terminal(columns: int, shell: Shell) -> None:
    lines = on_a_terminal(shell, "runs", "list", "--limit", "3", "--color", "never", columns=columns).splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= columns
    assert all(run_row(number).run_id in "".join(lines) for number in (19, 18, 17))


@pytest.mark.parametrize(
    ("words", "environment", "coloured"),
    [
        ((), {}, True),
        ((), {"NO_COLOR": "1"}, False),
        ((), {"NO_COLOR": ""}, True),
        ((), {"TERM": "dumb"}, False),
        (("--color", "never"), {}, False),
        (("--color", "always"), {"NO_COLOR": "1"}, True),
        (("-o", "json"), {}, False),
    ],
    ids=str,
)
def test_colours_on_a_terminal(
    words: tuple[str, ...], environment: dict[str, str], coloured: bool, shell: Shell
) -> None:
    text = on_a_terminal(shell, "runs", "list", "--limit", "6", *words, columns=120, **environment)
    assert ("\x1b[" in text) == coloured


def test_colours_elsewhere(shell: Shell) -> None:
    assert "\x1b" not in shell.run("runs", "list").stdout
    assert "\x1b[31mfailed" in shell.run("runs", "list", "--color", "always").stdout


def test_suggestions_for_values(shell: Shell) -> None:
    for words, part in (
        (("runs", "list", "--status", "runing"), "--status: no 'runing': did you mean 'running'?"),
        (("runs", "list", "-o", "jsn"), "no 'jsn': did you mean 'json'?"),
        (("runs", "wait", "x", "--for", "finish"), "did you mean 'finished'?"),
        (("completion", "bsh"), "did you mean 'bash'?"),
        (("config", "sho"), "did you mean 'show'?"),
    ):
        refused(shell.run(*words), 2, part)


def test_no_row_is_no_error(shell: Shell) -> None:
    for output, text in (("json", "[]\n"), ("jsonl", ""), ("name", ""), ("yaml", "[]\n")):
        done = shell.run("volumes", "list", "-o", output)
        assert (done.code, done.stdout) == (0, text)
    names: Any = shell.run("volumes", "list", "-o", "csv").stdout
    assert names.startswith("cluster,namespace,name,run_id,")
