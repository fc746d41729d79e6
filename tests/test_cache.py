from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import stat
import threading
from typing import TYPE_CHECKING

import pytest
from fabrik_objects import NAMESPACE, Report, job, pod, run_id
from harness import wait_until

import fabrik_daemon
from fabrik_daemon import (
    BATCH_OPERATIONS,
    JOBS,
    LOST_GAPS,
    MIGRATIONS,
    PODS,
    SEQ_BLOCK,
    AlreadyRunningError,
    CacheError,
    CacheReader,
    CacheThread,
    Change,
    Commit,
    ObjectKey,
    Progress,
    Run,
    Scope,
    SingleInstance,
    Timing,
    cluster_statement,
    commit_statements,
    facts_from,
    is_kept_up,
    open_cache,
    prepare_cache_folder,
    resume_from,
    set_meta,
    upsert,
    watch_statement,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fabrik_daemon import Statement

LOG = logging.getLogger("test.cache")
TIMING = Timing()
SCOPE = Scope("c", JOBS.name, NAMESPACE)
WAIT_S = 10.0  # nothing here takes so long, unless it never comes


class Alarm(logging.Handler):
    """Says when a message was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: dict[str, threading.Event] = {}

    def on(self, text: str) -> threading.Event:
        return self.heard.setdefault(text, threading.Event())

    def emit(self, record: logging.LogRecord) -> None:
        for text, heard in self.heard.items():
            if text in record.getMessage():
                heard.set()


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    handler = Alarm()
    LOG.addHandler(handler)
    LOG.setLevel(logging.DEBUG)
    yield handler
    LOG.removeHandler(handler)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "cache.db")


@pytest.fixture
def connection(path: str) -> Iterator[sqlite3.Connection]:
    made = open_cache(path, LOG)
    yield made
    made.close()


def read(path: str, sql: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path)
    rows = connection.execute(sql).fetchall()
    connection.close()
    return rows


def run(key: str, **columns: object) -> Statement:
    return upsert(Run(key, "c", "n")._replace(**columns))  # type: ignore[arg-type]  # what is wrong on purpose


def written(
    path: str, connection: sqlite3.Connection, units: list[list[Statement]], timing: Timing = TIMING
) -> CacheThread:
    """Have units written by a thread that finds them all waiting, and wait for its end."""
    thread = CacheThread(path, connection, timing, LOG)
    for unit in units:
        thread.put(unit)
    thread.start()
    assert thread.close(WAIT_S)
    return thread


def traced(connection: sqlite3.Connection) -> list[str]:
    said: list[str] = []
    connection.set_trace_callback(lambda sql: said.append(sql.split()[0]))
    return said


# Batches


def test_what_waits_is_written_in_one_transaction(connection: sqlite3.Connection, path: str) -> None:
    said = traced(connection)
    written(path, connection, [[run(f"r{number}")] for number in range(BATCH_OPERATIONS)])
    assert (said.count("BEGIN"), said.count("COMMIT")) == (1, 1)
    assert read(path, "SELECT count(*) FROM runs") == [(BATCH_OPERATIONS,)]


def test_a_batch_ends_at_its_limit_but_never_inside_a_unit(connection: sqlite3.Connection, path: str) -> None:
    said = traced(connection)
    size = BATCH_OPERATIONS * 3 // 5
    units = [[run(f"{unit}-{number}") for number in range(size)] for unit in range(4)]
    written(path, connection, units)
    transactions = " ".join(said).split("BEGIN")[1:]
    assert [part.count("INSERT") for part in transactions] == [2 * size, 2 * size]
    assert read(path, "SELECT count(*) FROM runs") == [(4 * size,)]


def test_an_empty_unit_is_nothing(connection: sqlite3.Connection, path: str) -> None:
    said = traced(connection)
    written(path, connection, [[], []])
    assert said == []


def test_a_commit_is_one_transaction_with_its_rows_before_its_bookmark(
    connection: sqlite3.Connection, path: str
) -> None:
    commit = Commit(
        (Change(5, "run:added", Run("r", "c", "n", "running"), None, "at"),),
        progress=Progress(SCOPE, "99", "at"),
        reserved_seq=20_000,
    )
    statements: list[str] = []
    connection.set_trace_callback(statements.append)
    written(path, connection, [commit_statements(commit)])
    verbs = [" ".join(sql.split()[:3]) for sql in statements]
    assert verbs[0] == "BEGIN IMMEDIATE"
    assert verbs[-1] == "COMMIT"
    assert verbs.count("COMMIT") == 1
    assert verbs.index("INSERT INTO runs") < verbs.index("INSERT INTO watches")
    assert read(path, "SELECT resource_version FROM watches") == [("99",)]


@pytest.mark.parametrize(
    "bad",
    [
        {"progress_total": 2**70},
        {"reason": "\ud800"},
        {"status": "no such status"},
        {"reason": object()},
        {"cluster": None},
    ],
    ids=["2**70", "lone surrogate", "CHECK", "no SQL type", "NOT NULL"],
)
def test_one_bad_row_never_spoils_a_batch(connection: sqlite3.Connection, path: str, bad: dict[str, object]) -> None:
    units = [[run("a")], [run("b"), run("bad", **bad), run("c")], [run("d")]]
    thread = written(path, connection, units)
    assert [key for (key,) in read(path, "SELECT run_id FROM runs ORDER BY 1")] == ["a", "b", "c", "d"]
    assert thread.error is None


def test_a_nan_in_a_number_s_column_spoils_nothing(connection: sqlite3.Connection, path: str) -> None:
    written(path, connection, [[run("a")], [run("b", progress_total=float("nan"))], [run("c")]])
    assert read(path, "SELECT run_id, progress_total FROM runs ORDER BY 1") == [("a", None), ("b", None), ("c", None)]


def test_the_thread_goes_on_after_a_bad_row(connection: sqlite3.Connection, path: str, alarm: Alarm) -> None:
    said = alarm.on("a row cannot be written")
    thread = CacheThread(path, connection, Timing(batch=0.0), LOG)
    thread.start()
    thread.put([run("bad", reason="\ud800")])
    assert said.wait(WAIT_S)
    thread.put([run("good")])
    assert thread.close(WAIT_S)
    assert read(path, "SELECT run_id FROM runs") == [("good",)]


# A full disk


def fill(connection: sqlite3.Connection) -> None:
    """Let the file grow no further, as on a full disk."""
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")


BIG = "x" * 100_000


def test_a_full_disk_is_waited_for_and_nothing_is_lost(connection: sqlite3.Connection, path: str, alarm: Alarm) -> None:
    full, again = alarm.on("trying again"), alarm.on("can be written again")
    fill(connection)
    thread = CacheThread(path, connection, Timing(cache_retry=0.01, batch=0.0), LOG)
    thread.start()
    thread.put([run("a", reason=BIG), *commit_statements(Commit(progress=Progress(SCOPE, "7", "at")))])
    assert full.wait(WAIT_S)
    wait_until(lambda: "full" in (thread.error or ""), WAIT_S, "the reason why nothing can be written")
    assert read(path, "SELECT count(*) FROM runs") == [(0,)]
    assert read(path, "SELECT count(*) FROM watches") == [(0,)]  # never ahead of its rows
    thread.put([run("b")])
    connection.execute("PRAGMA max_page_count = 100000")
    assert again.wait(WAIT_S)
    assert thread.close(WAIT_S)
    assert thread.error is None
    assert read(path, "SELECT run_id FROM runs ORDER BY 1") == [("a",), ("b",)]
    assert read(path, "SELECT resource_version FROM watches") == [("7",)]


def test_an_orderly_stop_does_not_wait_for_a_full_disk(connection: sqlite3.Connection, path: str, alarm: Alarm) -> None:
    gave_up = alarm.on("gave up writing 1 units")
    fill(connection)
    written(path, connection, [[run("a", reason=BIG)]], Timing(cache_retry=0.01))
    assert gave_up.is_set()
    assert read(path, "SELECT count(*) FROM runs") == [(0,)]


def test_a_bad_row_on_a_full_disk_does_not_bring_the_cache_ahead_of_its_rows(
    connection: sqlite3.Connection, path: str
) -> None:
    fill(connection)
    progress = commit_statements(Commit(progress=Progress(SCOPE, "7", "at")))
    written(
        path, connection, [[run("bad", reason="\ud800"), run("good", reason=BIG), *progress]], Timing(cache_retry=0.01)
    )
    assert read(path, "SELECT run_id FROM runs") == []
    assert read(path, "SELECT resource_version FROM watches") == []


def test_another_writer_is_waited_for(connection: sqlite3.Connection, path: str, alarm: Alarm) -> None:
    locked, again = alarm.on("trying again"), alarm.on("can be written again")
    connection.execute("PRAGMA busy_timeout = 0")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    thread = CacheThread(path, connection, Timing(cache_retry=0.01), LOG)
    thread.start()
    thread.put([run("a")])
    assert locked.wait(WAIT_S)
    other.execute("COMMIT")
    other.close()
    assert again.wait(WAIT_S)
    assert thread.close(WAIT_S)
    assert read(path, "SELECT run_id FROM runs") == [("a",)]


# Opening


def test_a_new_cache_is_ours_alone_and_in_wal_mode(path: str) -> None:
    before = os.umask(0o002)
    try:
        connection = open_cache(path, LOG)
    finally:
        assert os.umask(before) == 0o002
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600  # noqa: PTH116 - as the program sees it
    connection.close()


def test_a_cache_s_folder_is_made_for_us_alone(tmp_path: Path) -> None:
    prepare_cache_folder(str(tmp_path / "a" / "cache.db"))
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    prepare_cache_folder(str(tmp_path / "a" / "cache.db"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="--cache"):
        prepare_cache_folder(str(tmp_path / "file" / "cache.db"))


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(CacheError, match="not writable"):
        prepare_cache_folder(str(tmp_path / "cache.db"))


def test_opening_again_keeps_what_is_there(path: str) -> None:
    connection = open_cache(path, LOG)
    written(path, connection, [[run("a")]])
    open_cache(path, LOG).close()
    assert read(path, "SELECT run_id FROM runs") == [("a",)]


def test_a_step_of_the_schema_is_taken_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = open_cache(path, LOG)
    written(path, connection, [[run("a")]])
    planted = (
        "CREATE TABLE extra (x TEXT);\nINSERT INTO extra VALUES ('a;b');\nALTER TABLE runs ADD COLUMN colour TEXT;\n"
    )
    monkeypatch.setattr(fabrik_daemon, "MIGRATIONS", (*MIGRATIONS, planted))
    for _ in range(2):
        open_cache(path, LOG).close()
        assert read(path, "SELECT x FROM extra") == [("a;b",)]
        assert read(path, "SELECT run_id, colour FROM runs") == [("a", None)]
        assert read(path, "SELECT value FROM meta WHERE key = 'schema_version'") == [(str(len(MIGRATIONS) + 1),)]


def test_a_step_that_fails_leaves_the_cache_as_it_was(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_cache(path, LOG).close()
    monkeypatch.setattr(
        fabrik_daemon, "MIGRATIONS", (*MIGRATIONS, "CREATE TABLE extra (x TEXT);\nCREATE TABLE runs (y);\n")
    )
    with pytest.raises(CacheError, match="already exists"):
        open_cache(path, LOG)
    assert read(path, "SELECT name FROM sqlite_master WHERE name = 'extra'") == []
    assert read(path, "SELECT value FROM meta WHERE key = 'schema_version'") == [(str(len(MIGRATIONS)),)]


def test_a_cache_of_a_newer_program_is_left_alone(connection: sqlite3.Connection, path: str) -> None:
    connection.execute(*set_meta("schema_version", str(len(MIGRATIONS) + 1)))
    connection.close()
    with pytest.raises(CacheError, match="newer fabrik-daemon"):
        open_cache(path, LOG)
    with pytest.raises(CacheError, match="has schema"):
        CacheReader(path)
    assert not [name for name in os.listdir(os.path.dirname(path)) if "damaged" in name]  # noqa: PTH120, PTH208 - as the program sees it


def test_a_file_that_is_no_database_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache.db").write_text("no database" * 100)
    with caplog.at_level(logging.WARNING):
        open_cache(str(tmp_path / "cache.db"), LOG).close()
    (aside,) = tmp_path.glob("*.damaged-*")
    assert aside.read_text() == "no database" * 100
    assert "set aside" in caplog.text
    assert read(str(tmp_path / "cache.db"), "SELECT count(*) FROM runs") == [(0,)]


def test_what_a_crash_left_beside_a_damaged_cache_is_set_aside_with_it(tmp_path: Path) -> None:
    (tmp_path / "live").mkdir()
    live = open_cache(str(tmp_path / "live" / "cache.db"), LOG)
    live.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    live.execute(*run("a"))
    for suffix in ("", "-wal", "-shm"):  # as they are after a crash
        shutil.copy(tmp_path / "live" / f"cache.db{suffix}", tmp_path)
    live.close()
    size = (tmp_path / "cache.db-wal").stat().st_size
    damaged = (tmp_path / "cache.db").read_bytes()
    (tmp_path / "cache.db").write_bytes(b"\xff" * 4096 + damaged[4096:])
    made = open_cache(str(tmp_path / "cache.db"), LOG)
    assert made.execute("SELECT count(*) FROM runs").fetchone() == (0,)
    made.close()
    assert [file.stat().st_size for file in tmp_path.glob("*.damaged-*-wal")] == [size]


def test_a_damaged_cache_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache.db"
    connection = open_cache(str(path), LOG)
    for number in range(50):
        connection.execute(*run(f"r{number}", reason="x" * 2000))
    connection.close()
    damaged = bytearray(path.read_bytes())
    for page in range(4096, len(damaged), 4096):
        damaged[page : page + 64] = b"\xff" * 64
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        made = open_cache(str(path), LOG)
    assert made.execute("SELECT count(*) FROM runs").fetchone() == (0,)
    made.close()
    assert "damaged" in caplog.text
    (aside,) = (file for file in tmp_path.glob("*.damaged-*") if file.name[-1].isdigit())
    assert aside.stat().st_size == len(damaged)


def test_a_cache_where_nothing_can_be_made_is_told(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="unable to open"):
        open_cache(str(tmp_path / "nowhere" / "cache.db"), LOG)


# Resuming


def test_a_start_takes_over_what_the_cache_holds(connection: sqlite3.Connection, path: str) -> None:
    facts = facts_from(PODS.name, pod(1, report=Report()))
    assert facts is not None
    key = ObjectKey("c", PODS.name, facts.namespace, facts.name)
    row = Run("r", "c", "n", "running", last_sync_at="at")
    commit = Commit((Change(3, "run:added", row, None, "at"),), ((key, facts),), Progress(SCOPE, "99", "at"), 20_000)
    written(
        path,
        connection,
        [
            commit_statements(commit),
            [cluster_statement("c", {"server": "s"})],
            [watch_statement(Scope("c", "pods", "n"), {"state": "listing"})],
        ],
    )
    found = resume_from(path, again := open_cache(path, LOG), LOG)
    assert found.snapshot.rows == [row]
    assert [found_key for found_key, _ in found.snapshot.objects] == [key]
    assert found.snapshot.synced == (SCOPE,)
    assert found.versions == {SCOPE: ("99", "at")}
    assert found.snapshot.reserved_seq == 20_000
    again.close()


def test_numbers_are_reserved_before_any_is_given_out(connection: sqlite3.Connection, path: str) -> None:
    first = resume_from(path, connection, LOG).snapshot.reserved_seq
    stream = read(path, "SELECT value FROM meta WHERE key = 'stream'")
    second = resume_from(path, connection, LOG).snapshot.reserved_seq  # as after a crash
    assert (first, second) == (0, SEQ_BLOCK)
    assert read(path, "SELECT value FROM meta WHERE key = 'reserved_seq'") == [(str(2 * SEQ_BLOCK),)]
    assert read(path, "SELECT value FROM meta WHERE key = 'stream'") == stream
    assert len(str(stream[0][0])) == 36


def test_what_a_crash_took_along_stays_lost_for_every_later_start(connection: sqlite3.Connection, path: str) -> None:
    starts = [resume_from(path, connection, LOG).past for _ in range(150)]  # none of them wrote a change
    told = [past.cursor.seq + 5 for past in starts]
    for count in (2, 3, 150):
        lost = starts[count - 1].lost
        assert all(any(seq in gap for gap in lost) for seq in told[: count - 1])
        assert not any(starts[count - 2].cursor.seq in gap for gap in lost), "what was told as the beginning holds"
    assert len(starts[-1].lost) == LOST_GAPS


def test_facts_that_cannot_be_read_are_left_out_and_told(
    connection: sqlite3.Connection, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    facts = facts_from(JOBS.name, job(1))
    assert facts is not None
    key = ObjectKey("c", JOBS.name, NAMESPACE, f"fabrik-{run_id(1)}")
    for sql, values in commit_statements(Commit(objects=((key, facts),))):
        connection.execute(sql, values)
    connection.execute("INSERT INTO objects VALUES ('c', 'jobs', 'n', 'broken', 'u', 'r', '{')")
    connection.execute("INSERT INTO objects VALUES ('c', 'secrets', 'n', 'other', 'u', 'r', '{}')")
    with caplog.at_level(logging.WARNING):
        assert [found for found, _ in resume_from(path, connection, LOG).snapshot.objects] == [key]
    assert "c/jobs/n/broken" in caplog.text
    assert "c/secrets/n/other" in caplog.text


# Reading


def test_reading_needs_no_daemon_and_sees_what_it_writes(connection: sqlite3.Connection, path: str) -> None:
    reader = CacheReader(path)
    assert reader.rows("SELECT * FROM runs") == []
    connection.execute(*run("a", reason="r"))
    assert reader.rows("SELECT run_id, reason FROM runs WHERE run_id = ?", ("a",)) == [{"run_id": "a", "reason": "r"}]
    with pytest.raises(CacheError, match="cannot be read"):
        reader.rows("DELETE FROM runs")
    reader.connection.close()


def test_no_cache_says_what_to_do(path: str) -> None:
    with pytest.raises(CacheError, match="fabrik-daemon start"):
        CacheReader(path)
    assert not os.path.exists(path)  # noqa: PTH110 - reading makes nothing


def test_a_file_that_is_no_cache_is_told(tmp_path: Path) -> None:
    (tmp_path / "cache.db").write_text("no database" * 100)
    with pytest.raises(CacheError, match="not a database"):
        CacheReader(str(tmp_path / "cache.db"))
    (tmp_path / "cache.db").write_bytes(b"")
    with pytest.raises(CacheError, match="no such table"):
        CacheReader(str(tmp_path / "cache.db"))


def test_a_read_only_folder_is_read_and_nothing_is_made_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "odd?name#100%"
    folder.mkdir()
    path = str(folder / "cache.db")
    written(path, open_cache(path, LOG), [[run("a")]])
    before = sorted(file.name for file in folder.iterdir())
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    reader = CacheReader(path)
    assert reader.rows("SELECT run_id FROM runs") == [{"run_id": "a"}]
    assert sorted(file.name for file in folder.iterdir()) == before == ["cache.db"]
    reader.connection.close()


def test_a_wal_beside_a_read_only_cache_is_read_too(
    connection: sqlite3.Connection, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.execute(*run("a"))
    assert os.path.getsize(path + "-wal") > 0  # noqa: PTH202 - as the program sees it
    monkeypatch.setattr(os, "access", lambda *_: False)
    reader = CacheReader(path)
    assert reader.rows("SELECT run_id FROM runs") == [{"run_id": "a"}]
    reader.connection.close()


def test_how_fresh_each_cluster_s_part_is(connection: sqlite3.Connection, path: str) -> None:
    statements = [
        cluster_statement("late", {"priority": 2, "connected": 1}),
        cluster_statement("early", {"priority": 1, "connected": 0, "error": "refused"}),
        cluster_statement("new", {"priority": 3}),
        watch_statement(Scope("late", "jobs", "n"), {"synced_at": "2026-02"}),
        watch_statement(Scope("late", "pods", "n"), {"synced_at": "2026-01"}),
        watch_statement(Scope("late", "events", "n"), {"state": "forbidden"}),
        watch_statement(Scope("early", "jobs", "n"), {"synced_at": "2026-03"}),
        watch_statement(Scope("new", "jobs", "n"), {"synced_at": "2026-03"}),
        watch_statement(Scope("new", "pods", "n"), {"state": "listing"}),
    ]
    for sql, values in statements:
        connection.execute(sql, values)
    reader = CacheReader(path)
    assert [part[:4] for part in reader.freshness()] == [
        ("early", False, "2026-03", "refused"),
        ("late", False, "2026-01", None),  # nobody keeps it up
        ("new", False, None, None),
    ]
    assert [part.cluster for part in reader.freshness()] == ["early", "late", "new"]
    reader.connection.close()
    instance = SingleInstance(path)
    instance.acquire()
    reader = CacheReader(path)
    assert [part.connected for part in reader.freshness()] == [False, True, False]
    reader.connection.close()
    instance.release()


# One daemon


def test_a_second_daemon_is_told_who_runs(path: str) -> None:
    first, second = SingleInstance(path), SingleInstance(path)
    first.acquire()
    with pytest.raises(AlreadyRunningError, match=rf"pid {os.getpid()}\b"):
        second.acquire()
    assert is_kept_up(path)
    first.release()
    first.release()
    assert not is_kept_up(path)
    second.acquire()
    second.release()


def test_a_lock_is_for_us_alone_and_one_folder(tmp_path: Path) -> None:
    assert not is_kept_up(str(tmp_path / "cache.db"))
    assert list(tmp_path.iterdir()) == []
    instance = SingleInstance(str(tmp_path / "cache.db"))
    instance.acquire()
    assert stat.S_IMODE((tmp_path / "daemon.lock").stat().st_mode) == 0o600
    assert not is_kept_up(str(tmp_path / "other" / "cache.db"))
    instance.release()


def test_a_lock_where_nothing_can_be_made_is_told(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"daemon\.lock: No such file"):
        SingleInstance(str(tmp_path / "nowhere" / "cache.db")).acquire()
