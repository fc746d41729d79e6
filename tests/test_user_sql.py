"""SQL that users write, through the built executable: it only reads, ends in time, and stays within its memory."""

from __future__ import annotations

import json
import signal
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from commands import Shell, build_cache, hash_of, memory_is_limited, refused
from harness import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

QUERY_S: Final = 0.5
GRACE_S: Final = 2.0  # what an ended query may take beyond its time
MEMORY_MAX_BYTES: Final = 640 * 2**20  # 512 MiB for the query, and Python itself
RUNS: Final = 200
TASKS: Final = Path("/proc/self/task")
NUMBERS: Final = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000000)"
WITHOUT_END: Final = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


@pytest.fixture(scope="module")
def shared(executable: Path, unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    shell = Shell(executable, unpacked, tmp_path_factory.mktemp("user-sql") / "user")
    build_cache(shell.cache, RUNS)
    shell.write(shell.home / "hasty.yaml", json.dumps({"timing": {"query": QUERY_S}}))
    shell.run("query", "SELECT 1")  # what reading itself leaves beside the cache stands there now
    return shell


@pytest.fixture
def shell(shared: Shell) -> Iterator[Shell]:
    """Return a home with a cache that must be the same afterwards."""
    before, names = hash_of(shared.cache), files_of(shared)
    yield shared
    assert hash_of(shared.cache) == before
    assert files_of(shared) == names
    connection = sqlite3.connect(f"file:{shared.cache}?mode=ro", uri=True)
    found = (
        connection.execute("SELECT count(*) FROM runs").fetchone()[0],
        connection.execute("PRAGMA integrity_check").fetchone()[0],
    )
    connection.close()
    assert found == (RUNS, "ok")


def numbers(select: str) -> str:
    """Return a SELECT on the numbers from 1 to a hundred millions, `n`."""
    return f"{NUMBERS} {select}"


def files_of(shell: Shell) -> list[str]:
    """Return the names of all files of the user's, the journals of the cache aside."""
    names = (str(path.relative_to(shell.home)) for path in shell.home.rglob("*"))
    return sorted(name for name in names if not name.endswith(("-wal", "-shm")))


@pytest.mark.parametrize(
    ("statement", "rows"),
    [
        ("SELECT count(*) AS n FROM runs", [{"n": RUNS}]),
        (
            "select 1 as a, 'b' as b, null as c, 1.5 as d, x'00ff' as e",
            [{"a": 1, "b": "b", "c": None, "d": 1.5, "e": "00ff"}],
        ),
        ("SELECT 1 AS a WHERE 0", []),
        (
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3) SELECT i FROM n",
            [{"i": i} for i in (1, 2, 3)],
        ),
        ("VALUES (1), (2)", [{"column1": 1}, {"column1": 2}]),
        ("SELECT json_extract('{\"a\": [1, 2]}', '$.a[1]') AS a", [{"a": 2}]),
        ("SELECT value FROM json_each('[3]')", [{"value": 3}]),
        (
            "SELECT status, count(*) AS n FROM runs GROUP BY status HAVING status = 'blocked'",
            [{"status": "blocked", "n": 33}],
        ),
        ("/* a comment */ SELECT 1 AS a -- and another", [{"a": 1}]),
        ("SELECT 1 AS a;", [{"a": 1}]),
        ("SELECT name FROM sqlite_master WHERE name = 'idx_runs_status'", [{"name": "idx_runs_status"}]),
        (
            "SELECT max(strftime('%Y', created_at)) AS a, coalesce(null, upper('x')) AS b FROM runs",
            [{"a": "2026", "b": "X"}],
        ),
        ("SELECT i FROM (SELECT 1 AS i) WHERE i IN (SELECT 1) AND EXISTS (SELECT 1 FROM runs)", [{"i": 1}]),
        ("SELECT row_number() OVER (ORDER BY run_id) AS i FROM runs LIMIT 1", [{"i": 1}]),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_reads_is_answered(statement: str, rows: list[dict[str, object]], shell: Shell) -> None:
    done = shell.run("query", statement, "-o", "json")
    assert (done.code, json.loads(done.stdout or "null")) == (0, rows), done


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO runs (run_id, cluster) VALUES ('x', 'y')",
        "REPLACE INTO runs (run_id, cluster) VALUES ('x', 'y')",
        "UPDATE runs SET status = 'finished'",
        "DELETE FROM runs",
        "DROP TABLE runs",
        "CREATE TABLE mine (a)",
        "CREATE TEMP TABLE mine (a)",
        "CREATE VIEW mine AS SELECT 1",
        "ALTER TABLE runs RENAME TO mine",
        "WITH gone AS (SELECT run_id FROM runs) DELETE FROM runs WHERE run_id IN gone",
        "EXPLAIN DELETE FROM runs",
        "ATTACH 'mine.db' AS mine",
        "ATTACH ':memory:' AS mine",
        "VACUUM",
        "VACUUM INTO 'mine.db'",
        "REINDEX",
        "ANALYZE",
        "BEGIN IMMEDIATE",
        "SAVEPOINT mine",
        "PRAGMA query_only = 0",
        "PRAGMA writable_schema = 1",
        "PRAGMA journal_mode = DELETE",
        "PRAGMA wal_checkpoint(TRUNCATE)",
        "PRAGMA user_version = 7",
        "PRAGMA table_info(runs)",
        "SELECT * FROM pragma_journal_mode('delete')",
        "SELECT load_extension('mine.so')",
        "SELECT writefile('mine', 'x')",
        "SELECT readfile('/etc/passwd')",
        "SELECT fts3_tokenizer('simple', x'00')",
        "SELECT zeroblob(1000000000)",
        "SELECT randomblob(1000000000)",
        "SELECT 1; DROP TABLE runs",
        "SELECT 1; SELECT 2",
        "DELETE FROM runs; SELECT 1",
        "INSERT INTO sqlite_master (type) VALUES ('table')",
    ],
)
def test_what_writes_is_refused(statement: str, shell: Shell) -> None:
    refused(shell.run("query", statement), 2, "SQL")


@pytest.mark.parametrize(
    ("statement", "part"),
    [
        ("SELEC 1", 'near "SELEC"'),
        ("SELECT * FROM rnus", "no such table: rnus"),
        ("SELECT stauts FROM runs", "no such column: stauts"),
        ("SELECT 'an open string", "SQL"),
        ("SELECT nosuch(1)", "no such function: nosuch"),
        ("SELECT ?", "SQL"),
        ("SELECT :name", "SQL"),
        ("SELECT '\x1b]0;title\x07' FROM nowhere", "no such table"),
        ("", "no statement"),
        ("   \n\t", "no statement"),
        (";", "no statement"),
        ("-- only a comment", "no statement"),
        ("SELECT " + "(" * 2000 + "1" + ")" * 2000, "SQL"),
        ("SELECT " + "1, " * 3000 + "1", "SQL"),
        ("SELECT abs(-9223372036854775808)", "integer overflow"),
        ("SELECT json('{')", "malformed JSON"),
    ],
    ids=lambda text: ascii(text[:25]),
)
def test_what_is_wrong_is_told(statement: str, part: str, shell: Shell) -> None:
    line = refused(shell.run("query", statement), 2, "SQL", part)
    assert "\x1b" not in line


def test_what_is_no_text_is_told(shell: Shell) -> None:
    refused(shell.run("query", b"SELECT '\xff'"), 2, "SQL")
    refused(shell.run("query"), 2, "SQL")
    refused(shell.run("query", "SELECT", "1"), 2, "query --help")


@pytest.mark.parametrize(
    "statement",
    [
        WITHOUT_END,
        numbers("SELECT max(i) FROM n"),
        "SELECT count(*) FROM runs a, runs b, runs c, runs d, runs e WHERE a.status || b.status = c.status || d.status",
        "SELECT printf('%.*c', 9000000, 'a') LIKE '%' || printf('%.*c', 40000, 'a') || 'b'",
        "SELECT printf('%.*c', 9000000, 'a') GLOB '*' || printf('%.*c', 40000, 'a') || 'b'",
    ],
    ids=["no end", "large", "join", "LIKE", "GLOB"],
)
def test_what_is_slow_is_ended(statement: str, shell: Shell) -> None:
    start_up = shell.run("--version").seconds
    done = shell.measure("query", "--config", "hasty.yaml", statement)
    refused(done, 1, "0.5 s", "timing.query")
    assert done.seconds < QUERY_S + GRACE_S + 3 * start_up


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT length(printf('%.*c', 999999999, 'x'))",
        "SELECT printf('%.*c', 2000000000, 'x')",
        "SELECT hex(printf('%.*c', 400000000, 'x'))",
        "SELECT hex(zeroblob(900000000))",
        "SELECT replace(printf('%.*c', 100000000, 'x'), 'x', 'yyyyyyyy')",
        numbers("SELECT group_concat(printf('%.*c', 1000000, 'x')) FROM n"),
        "WITH RECURSIVE n(t) AS (SELECT 'xxxxxxxx' UNION ALL SELECT t || t FROM n) SELECT length(t) FROM n",
        numbers("SELECT json_group_array(printf('%.*c', 1000000, 'x')) FROM n"),
        numbers("SELECT i, printf('%.*c', 1000000, 'x') FROM n"),
        numbers("SELECT count(DISTINCT printf('%.*c', 1000, 'x') || i) FROM n"),
        numbers("SELECT i FROM n ORDER BY printf('%.*c', 1000, 'x') || i LIMIT 1 OFFSET 90000000"),
    ],
    ids=lambda text: text.split(") SELECT ")[-1][:40],
)
def test_what_is_large_is_ended(statement: str, shell: Shell) -> None:
    start_up = shell.run("--version").seconds
    done = shell.measure("query", "--config", "hasty.yaml", statement)
    assert done.code in {1, 2}, done
    refused(done, done.code)
    assert done.seconds < QUERY_S + GRACE_S + 3 * start_up
    if memory_is_limited():
        assert done.peak_bytes < MEMORY_MAX_BYTES


@pytest.mark.skipif(not memory_is_limited(), reason="this system does not hold a process to its memory")
@pytest.mark.parametrize("output", ["table", "json", "csv"])
def test_rows_that_fit_and_do_not_once_they_are_written_are_refused_in_a_line(output: str, shell: Shell) -> None:
    done = shell.run(
        "query",
        numbers("SELECT printf(:form, 1000000, 1) AS text FROM n LIMIT 300"),
        "--param",
        "form=%0*d",
        "-o",
        output,
    )
    assert (done.code, done.stdout, done.stderr.count("\n")) == (1, "", 2)
    assert "fabrik-daemon: the query needs too much memory: make it smaller, or ask for less of it\n" in done.stderr


def test_only_so_many_rows_are_shown(shell: Shell) -> None:
    done = shell.run("query", "SELECT a.run_id FROM runs a, runs b LIMIT 20000", "-o", "json")
    assert (done.code, len(json.loads(done.stdout))) == (0, 10_000)
    assert "only the first 10000 rows" in done.stderr


def test_an_answer_is_harmless(shell: Shell) -> None:
    done = shell.run("query", "SELECT char(27) || '[2J' AS a, char(0, 8, 0x9b, 0x202e, 0xd800) AS b, char(10) AS c")
    assert done.code == 0, done
    assert len(done.stdout.splitlines()) == 2
    assert not {"\x1b", "\x00", "\x08", "\x9b", "\u202e"} & set(done.stdout)


@pytest.mark.skipif(not TASKS.exists(), reason="only Linux shows a process's threads as files")
def test_an_interrupt_ends_a_query(shell: Shell, tmp_path: Path) -> None:
    patient = shell.write(tmp_path / "config.yaml", "timing: {query: 60s}\n")
    with shell.start("query", "--config", str(patient), WITHOUT_END) as process:
        tasks = TASKS.parent.parent / str(process.pid) / "task"
        wait_until(lambda: len(list(tasks.iterdir())) > 1, 30, "the query has its thread")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "")
