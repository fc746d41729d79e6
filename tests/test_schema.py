from __future__ import annotations

import json
import sqlite3
import zoneinfo
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import pytest
from fabrik_objects import NAMESPACE, Report, cronjob, event, job, pod, pvc, run_id, time_text
from hypothesis import given, settings
from hypothesis import strategies as st

import fabrik_daemon
from fabrik_daemon import (
    COMMIT_CHANGES,
    CRONJOBS,
    EVENTS,
    FACTS,
    INT_MAX,
    JOBS,
    META,
    MIGRATIONS,
    PODS,
    STATUSES,
    TABLES,
    VOLUMES,
    Change,
    ClusterEvent,
    ClusterRow,
    Commit,
    CronJobFacts,
    EventFacts,
    Facts,
    JobFacts,
    KeptLines,
    LateStatements,
    ObjectKey,
    PodFacts,
    Progress,
    Run,
    Schedule,
    Scope,
    Store,
    TableRow,
    Volume,
    VolumeFacts,
    authorize,
    change_from,
    changes_held_after,
    cluster_statement,
    commit_parts,
    commit_statements,
    epoch_of,
    facts_from,
    facts_from_json,
    format_record,
    retention_statements,
    set_meta,
    upsert,
    watch_statement,
)
from fabrik_daemon import (
    Report as Said,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fabrik_daemon import Statement

SCOPE = Scope("c", JOBS.name, NAMESPACE)
RUN = run_id(1)
NOW = epoch_of(time_text()) or 0.0

SPEC = """
CREATE TABLE runs (
  run_id TEXT PRIMARY KEY,           -- ULID
  cluster TEXT NOT NULL,             -- 'dev-k3s', 'prod'
  namespace TEXT NOT NULL DEFAULT 'fabrik-runs',
  status TEXT CHECK(status IN ('pending', 'running', 'blocked', 'finished', 'failed', 'cancelled')),
  current_task TEXT,                 -- e.g., '16:impl'
  task_status TEXT,                  -- 'in-progress', 'finished', 'failed'
  progress_finished INTEGER,
  progress_total INTEGER,
  spec_id TEXT,
  template TEXT,
  created_at TEXT,                   -- ISO 8601
  updated_at TEXT,
  last_sync_at TEXT                  -- daemon timestamp
);
CREATE TABLE run_events (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  run_id TEXT REFERENCES runs(run_id),
  event_type TEXT CHECK(event_type IN ('status_changed', 'task_completed', 'blocked', 'log_line')),
  payload TEXT,                      -- JSON
  cluster_timestamp TEXT,            -- from K8s
  local_timestamp TEXT               -- when daemon received
);
CREATE INDEX idx_runs_status ON runs(status);
CREATE INDEX idx_runs_cluster ON runs(cluster);
CREATE INDEX idx_events_run_id ON run_events(run_id, cluster_timestamp);
"""  # the specification's own text, but for a comma that SQLite refuses


@pytest.fixture
def database() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute(META)
    for script in MIGRATIONS:
        connection.executescript(script)
    yield connection
    connection.close()


def write(database: sqlite3.Connection, statements: Iterable[Statement]) -> None:
    for sql, values in statements:
        database.execute(sql, values)


def columns(database: sqlite3.Connection, table: str) -> list[tuple[Any, ...]]:
    return [row[1:] for row in database.execute(f"PRAGMA table_info({table})")]


def test_the_specification_s_tables_are_there_column_for_column(database: sqlite3.Connection) -> None:
    specified = sqlite3.connect(":memory:")
    specified.executescript(SPEC)
    for table in ("runs", "run_events"):
        wanted = columns(specified, table)
        assert columns(database, table)[: len(wanted)] == wanted
        for pragma in ("foreign_key_list", "index_list"):
            has = {row[2:] for row in database.execute(f"PRAGMA {pragma}({table})")}
            assert has >= {row[2:] for row in specified.execute(f"PRAGMA {pragma}({table})")}
    assert len(columns(database, "run_events")) == 6
    specified.close()


def test_the_specification_s_indexes_are_there(database: sqlite3.Connection) -> None:
    found = dict(database.execute("SELECT name, sql FROM sqlite_master WHERE type = 'index'").fetchall())
    for line in SPEC.splitlines():
        if line.startswith("CREATE INDEX"):
            assert found[line.split()[2]] == line.rstrip(";")


def test_run_events_number_themselves_without_reuse(database: sqlite3.Connection) -> None:
    database.execute("INSERT INTO run_events (id) VALUES (41)")
    database.execute("DELETE FROM run_events")
    database.execute("INSERT INTO run_events (run_id) VALUES (NULL)")
    assert database.execute("SELECT id FROM run_events").fetchall() == [(42,)]


def test_the_added_columns_and_tables_are_those_decided(database: sqlite3.Connection) -> None:
    added = (
        "id, project, phase, task_attempt, iteration, heartbeat_at, reason, job_name, job_uid, pod_name, schedule_id,"
        " started_at, finished_at, deleted_at"
    )
    assert [column[0] for column in columns(database, "runs")[13:]] == added.split(", ")
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    decided = {"objects", "changes", "schedules", "volumes", "cluster_events", "alerts", "clusters", "watches", "meta"}
    assert tables - {"sqlite_sequence", "runs", "run_events"} == decided


@pytest.mark.parametrize("status", [*STATUSES, None])
def test_the_statuses_and_only_they_can_be_stored(database: sqlite3.Connection, status: str | None) -> None:
    write(database, [upsert(Run("r", "c", "n", status))])
    for wrong in ("unknown", "", f"{status}!"):
        with pytest.raises(sqlite3.IntegrityError):
            write(database, [upsert(Run("x", "c", "n", wrong))])


def test_only_the_four_kinds_of_run_event_can_be_stored(database: sqlite3.Connection) -> None:
    for kind in ("status_changed", "task_completed", "blocked", "log_line"):
        database.execute("INSERT INTO run_events (event_type) VALUES (?)", (kind,))
    with pytest.raises(sqlite3.IntegrityError):
        database.execute("INSERT INTO run_events (event_type) VALUES ('other')")


def test_a_run_needs_its_cluster_and_has_the_usual_namespace(database: sqlite3.Connection) -> None:
    database.execute("INSERT INTO runs (run_id, cluster) VALUES ('a', 'c')")
    assert database.execute("SELECT namespace FROM runs").fetchone() == ("fabrik-runs",)
    with pytest.raises(sqlite3.IntegrityError):
        database.execute("INSERT INTO runs (run_id) VALUES ('b')")


def test_every_row_type_has_its_table_s_columns(database: sqlite3.Connection) -> None:
    for table, kind in TABLES.items():
        assert [column[0] for column in columns(database, table)] == list(kind._fields)


FULL: list[TableRow] = [
    Run("r", "c", "n", "blocked", current_task="16:impl", progress_total=5, reason="m\u202e\U0001f600", deleted_at="x"),
    Schedule("c", "n", "s", schedule="* * * * *", missed=3),
    Volume("c", "n", "v", capacity_bytes=INT_MAX),
    ClusterEvent("c", "n", "e", message="m\x00\u202e", count=7),
]


EMPTY: list[TableRow] = [
    Run("r", "c", "n"),
    Schedule("c", "n", "s"),
    Volume("c", "n", "v"),
    ClusterEvent("c", "n", "e"),
]


@pytest.mark.parametrize("row", FULL, ids=lambda row: type(row).__name__)
def test_a_row_is_read_back_as_it_was_written_and_written_over(database: sqlite3.Connection, row: TableRow) -> None:
    table = next(name for name, kind in TABLES.items() if kind is type(row))
    empty = next(bare for bare in EMPTY if type(bare) is type(row))
    for written in (empty, row, empty):
        write(database, [upsert(written)])
        assert database.execute(f"SELECT * FROM {table}").fetchall() == [tuple(written)]  # noqa: S608


def test_writing_a_run_again_leaves_its_events(database: sqlite3.Connection) -> None:
    database.execute("PRAGMA foreign_keys = ON")
    write(database, [upsert(Run("r", "c", "n"))])
    database.execute("INSERT INTO run_events (run_id) VALUES ('r')")
    write(database, [upsert(Run("r", "c", "n", "running"))])
    assert database.execute("SELECT count(*) FROM run_events").fetchone() == (1,)


def change(row: TableRow, kind: str, seq: int = 1, previous: TableRow | None = None) -> Commit:
    return Commit((Change(seq, kind, row, previous, "at"),))


def test_a_change_is_kept_with_its_row_as_json(database: sqlite3.Connection) -> None:
    run = Run("r", "c", "n", "blocked", phase="human-gate", reason="\u202e\u2028")
    write(database, commit_statements(change(run, "run:added", 17)))
    (stored,) = database.execute("SELECT seq, type, cluster, at, row FROM changes")
    assert stored[:4] == (17, "run:added", "c", "at")
    assert Run(**json.loads(stored[4])) == run
    events = database.execute("SELECT id, run_id, event_type, payload, local_timestamp FROM run_events").fetchall()
    assert [row[:3] + row[4:] for row in events] == [(17, "r", "status_changed", "at"), (18, "r", "blocked", "at")]
    assert json.loads(events[0][3]) == {"from": None, "to": "blocked", "reason": "\u202e\u2028"}


def test_a_run_that_is_removed_takes_its_events_along(database: sqlite3.Connection) -> None:
    run = Run("r", "c", "n", "finished", deleted_at="then")
    write(database, commit_statements(change(run, "run:added")))
    write(database, commit_statements(change(Run("other", "c", "n", "running"), "run:added", 2)))
    write(database, commit_statements(change(run, "run:removed", 3, run)))
    assert database.execute("SELECT run_id FROM runs").fetchall() == [("other",)]
    assert database.execute("SELECT run_id FROM run_events").fetchall() == [("other",)]
    assert database.execute("SELECT count(*) FROM changes").fetchone() == (3,)


def test_a_volume_that_is_deleted_is_still_told_of(database: sqlite3.Connection) -> None:
    write(database, commit_statements(change(Volume("c", "n", "v", deleted_at="then"), "volume:removed")))
    assert database.execute("SELECT deleted_at FROM volumes").fetchall() == [("then",)]
    write(database, commit_statements(change(Volume("c", "n", "v"), "volume:removed", 2)))
    assert database.execute("SELECT count(*) FROM volumes").fetchone() == (0,)


def test_a_schedule_that_is_removed_leaves(database: sqlite3.Connection) -> None:
    for name in ("a", "b"):
        write(database, [upsert(Schedule("c", "n", name))])
    write(database, commit_statements(change(Schedule("c", "n", "a"), "schedule:removed")))
    assert database.execute("SELECT name FROM schedules").fetchall() == [("b",)]


@pytest.mark.parametrize("table", ["volumes", "cluster_events"])
def test_what_leaves_by_retention_leaves_the_cache_too(database: sqlite3.Connection, table: str) -> None:
    store = Store(zoneinfo.ZoneInfo)
    resource, item = (VOLUMES, pvc(1)) if table == "volumes" else (EVENTS, event(pod(1), "BackOff", "m"))
    facts = facts_from(resource.name, item)
    assert facts is not None
    progress = Progress(Scope("c", resource.name, NAMESPACE), "1", "at")
    for commit in (store.replace(progress, [facts], NOW), store.replace(progress, [], NOW), store.tick(NOW + 10, 5)):
        write(database, commit_statements(commit))
    assert database.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)  # noqa: S608


def test_a_resource_version_is_written_after_the_rows_it_stands_for() -> None:
    commit = Commit(
        (Change(1, "run:added", Run("r", "c", "n"), None, "at"),),
        ((ObjectKey("c", "jobs", "n", "j"), None),),
        Progress(SCOPE, "99", "at"),
        20_000,
    )
    tables = [sql.split()[2] for sql, _ in commit_statements(commit)]
    assert tables == ["runs", "changes", "run_events", "objects", "watches", "meta"]
    assert commit_statements(commit)[-1][1] == ("reserved_seq", "20000")
    assert commit_statements(Commit()) == []


@pytest.mark.parametrize(
    ("changed", "known"), [(0, 0), (1, 0), (COMMIT_CHANGES, 3), (COMMIT_CHANGES + 1, 3 * COMMIT_CHANGES), (3, 1001)]
)
def test_the_parts_of_a_commit_write_what_it_writes_and_its_version_last(changed: int, known: int) -> None:
    facts = facts_from(PODS.name, pod(1))
    commit = Commit(
        tuple(Change(n, "run:added", Run(f"r{n}", "c", "n", "running"), None, "at") for n in range(changed)),
        tuple((ObjectKey("c", "pods", "n", f"p{n}"), facts) for n in range(known)),
        Progress(SCOPE, "99", "at"),
        20_000,
        (Volume("c", "n", "v"),),
        kept=KeptLines("r1", (), "at"),
    )
    parts = list(commit_parts(commit))
    assert all(max(len(part.changes), len(part.objects)) <= COMMIT_CHANGES for part in parts)
    written = [list(LateStatements(part)) for part in parts]
    assert sorted(chain(*written), key=repr) == sorted(commit_statements(commit), key=repr)
    assert [part.progress for part in parts] == [None] * (len(parts) - 1) + [commit.progress]
    assert parts[0].reserved_seq == commit.reserved_seq, "before the first number is used"
    assert all(len(LateStatements(part)) for part in parts), "the writer drops what is empty"


def test_objects_are_kept_as_facts_and_forgotten(database: sqlite3.Connection) -> None:
    facts = facts_from(PODS.name, pod(1, report=Report(), metadata={"annotations": {"fabrik.dev/iteration": "1"}}))
    assert isinstance(facts, PodFacts)
    key = ObjectKey("c", PODS.name, facts.namespace, facts.name)
    for seen in (facts, facts._replace(phase="Failed")):
        write(database, commit_statements(Commit(objects=((key, seen),))))
        (stored,) = database.execute("SELECT cluster, resource, namespace, name, uid, run, facts FROM objects")
        assert stored[:6] == (*key, facts.uid, RUN)
        assert facts_from_json(PODS.name, stored[6]) == seen
    write(database, commit_statements(Commit(objects=((key, None),))))
    assert database.execute("SELECT count(*) FROM objects").fetchone() == (0,)


def test_some_columns_of_a_cluster_and_a_watch_are_written_alone(database: sqlite3.Connection) -> None:
    write(database, [cluster_statement("c", {"server": "https://a", "priority": 1})])
    write(database, [cluster_statement("c", {"connected": 1})])
    write(database, [cluster_statement("c", {"error": "gone"})])
    found = database.execute("SELECT name, server, priority, connected, error FROM clusters").fetchall()
    assert found == [("c", "https://a", 1, 1, "gone")]
    write(database, [watch_statement(SCOPE, {"state": "watching"})])
    write(database, commit_statements(Commit(progress=Progress(SCOPE, "7", "at"))))
    write(database, [watch_statement(SCOPE, {"state": "listing", "error": "e"})])
    found = database.execute(
        "SELECT cluster, resource, namespace, resource_version, synced_at, state FROM watches"
    ).fetchall()
    assert found == [("c", "jobs", NAMESPACE, "7", "at", "listing")]


def test_meta_is_written_over(database: sqlite3.Connection) -> None:
    write(database, [set_meta("a", "1"), set_meta("a", "2"), set_meta("b", "3")])
    assert dict(database.execute("SELECT key, value FROM meta").fetchall()) == {
        "a": "2",
        "b": "3",
        "changes_after": "0",
    }


def test_old_history_goes(database: sqlite3.Connection) -> None:
    write(database, [upsert(Run("r", "c", "n"))])
    for seq in (1, 100_000, 100_001, 200_000):
        database.execute("INSERT INTO changes (seq, type, at, row) VALUES (?, 't', 'a', '{}')", (seq,))
    for run, at in (("r", "2020"), ("gone", "2020"), ("gone", "2030")):
        database.execute("INSERT INTO run_events (run_id, local_timestamp) VALUES (?, ?)", (run, at))
    write(database, retention_statements(200_000, "2025"))
    assert [seq for (seq,) in database.execute("SELECT seq FROM changes")] == [100_000, 100_001, 200_000]
    assert meta(database, "changes_after") == "99999"
    assert database.execute("SELECT run_id, local_timestamp FROM run_events ORDER BY id").fetchall() == [
        ("r", "2020"),
        ("gone", "2030"),
    ]


# Facts

WORDS = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
COUNTS = st.none() | st.integers(0, INT_MAX)
REPORTS = st.builds(
    Said,
    WORDS,
    WORDS,
    WORDS,
    COUNTS,
    COUNTS,
    COUNTS,
    COUNTS,
    WORDS,
    WORDS,
    st.lists(st.text(max_size=3), max_size=2).map(tuple),
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
OTHER_FACTS = st.one_of(
    st.builds(CronJobFacts, TEXT, TEXT, TEXT, TEXT, WORDS, WORDS, st.booleans(), st.integers(0, 9), WORDS),
    st.builds(VolumeFacts, TEXT, TEXT, TEXT, TEXT, WORDS, COUNTS, WORDS, WORDS, WORDS, WORDS),
    st.builds(EventFacts, TEXT, TEXT, TEXT, TEXT, st.booleans(), WORDS, WORDS, WORDS, WORDS, WORDS, st.integers(0, 9)),
)
REPORTED_FACTS = st.one_of(
    st.builds(
        JobFacts, TEXT, TEXT, TEXT, TEXT, st.booleans(), REPORTS, suspended=st.booleans(), outcome=WORDS, gone=WORDS
    ),
    st.builds(PodFacts, TEXT, TEXT, TEXT, TEXT, REPORTS, phase=WORDS, deleting=st.booleans(), gone_at=WORDS),
)


def resource_of(facts: Facts) -> str:
    return next(name for name, kind in FACTS.items() if kind is type(facts))


@settings(deadline=None)
@given(OTHER_FACTS)
def test_facts_are_read_back_as_they_were_written(facts: Facts) -> None:
    assert facts_from_json(resource_of(facts), format_record(facts)) == facts


@settings(deadline=None)
@given(REPORTED_FACTS)
def test_facts_with_a_report_are_read_back_as_they_were_written(facts: Facts) -> None:
    assert facts_from_json(resource_of(facts), format_record(facts)) == facts


@pytest.mark.parametrize(
    ("resource", "item"),
    [
        (JOBS, job(1, conditions=["Failed=X"])),
        (PODS, pod(1, report=Report(), metadata={"annotations": {"fabrik.dev/attempt": "many"}})),
        (CRONJOBS, cronjob("n")),
        (VOLUMES, pvc(1)),
        (EVENTS, event(pod(1), "X", "\u202e\n\u2028")),
    ],
    ids=["jobs", "pods", "cronjobs", "volumes", "events"],
)
def test_the_facts_of_a_real_object_are_read_back(resource: Any, item: dict[str, Any]) -> None:
    facts = facts_from(resource.name, item)
    assert isinstance(facts, tuple)
    if isinstance(facts, PodFacts):
        facts = facts._replace(report=facts.report._replace(iteration=1))
    assert facts_from_json(resource.name, format_record(facts)) == facts


def test_facts_of_another_version_are_read_as_far_as_they_go() -> None:
    facts = VolumeFacts("n", "v", "u", "i")
    newer = {**json.loads(format_record(facts)), "colour": "red"}
    assert facts_from_json(VOLUMES.name, json.dumps(newer)) == facts
    reported = {"namespace": "n", "name": "p", "uid": "u", "id": "i", "report": {"mood": "good", "task": "1:a"}}
    assert facts_from_json(PODS.name, json.dumps(reported)) == PodFacts("n", "p", "u", "i", Said(task="1:a"))


@pytest.mark.parametrize("text", ["", "{", "{}", '{"name":"v"}'])
def test_facts_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        facts_from_json(VOLUMES.name, text)


@pytest.mark.parametrize(
    ("resource", "text"), [("pods", "[]"), ("pods", "5"), ("jobs", '{"report":3}'), ("events", "[]")]
)
def test_facts_of_another_shape_are_refused(resource: str, text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        facts_from_json(resource, text)


# The authorizer


def test_the_authorizer_s_codes_are_sqlite_s() -> None:
    names = [name for name in dir(fabrik_daemon) if name.startswith("SQLITE_")]
    assert len(names) == 6
    for name in names:
        wanted = 33 if name == "SQLITE_RECURSIVE" else getattr(sqlite3, name)  # Python before 3.11 does not name it
        assert getattr(fabrik_daemon, name) == wanted == getattr(sqlite3, name, 33)


@pytest.fixture
def guarded(database: sqlite3.Connection) -> sqlite3.Connection:
    write(database, [upsert(Run("r", "c", "n", "running"))])
    database.set_authorizer(lambda action, first, second, _database, _source: authorize(action, first, second))
    return database


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM runs WHERE status = 'running'",
        "SELECT status, count(*) FROM runs GROUP BY 1 ORDER BY 2",
        "SELECT upper(run_id) || substr(cluster, 1), strftime('%s', 'now'), COALESCE(NULL, 1) FROM runs",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3) SELECT * FROM n",
        "SELECT run_id LIKE 'r%', run_id GLOB 'r*' FROM runs",
        "SELECT row_number() OVER (ORDER BY run_id) FROM runs",
        "SELECT name FROM sqlite_master",
        "SELECT json_extract('{\"a\": 1}', '$.a')",
    ],
)
def test_reading_is_allowed(guarded: sqlite3.Connection, sql: str) -> None:
    assert guarded.execute(sql).fetchall()


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM runs",
        "UPDATE runs SET status = 'failed'",
        "INSERT INTO runs (run_id, cluster) VALUES ('x', 'c')",
        "DROP TABLE runs",
        "CREATE TABLE x (y)",
        "CREATE TEMP TABLE x (y)",
        "CREATE VIEW x AS SELECT 1",
        "ATTACH ':memory:' AS other",
        "VACUUM",
        "VACUUM INTO 'copy.db'",
        "PRAGMA query_only = 0",
        "PRAGMA writable_schema = 1",
        "BEGIN",
        "SAVEPOINT a",
        "REINDEX",
        "ANALYZE",
        "SELECT load_extension('x')",
        "SELECT writefile('x', 'y')",
        "SELECT readfile('x')",
        "SELECT randomblob(1000000000)",
        "SELECT zeroblob(1000000000)",
        "SELECT sqlite_version()",
        "SELECT * FROM pragma_table_info('runs')",
    ],
)
def test_everything_else_is_denied(guarded: sqlite3.Connection, sql: str) -> None:
    with pytest.raises(sqlite3.DatabaseError):
        guarded.execute(sql).fetchall()
    guarded.set_authorizer(lambda *_: 0)
    assert guarded.execute("SELECT run_id, status FROM runs").fetchall() == [("r", "running")]


def test_an_unknown_function_or_none_is_denied() -> None:
    assert authorize(31, None, "fts3_tokenizer") == 1
    assert authorize(31, None, None) == 1
    assert authorize(31, None, "COUNT") == 0
    assert authorize(19, "query_only", "0") == 1


# ---------------------------------------------------------------- the stream: what a subscriber who comes back is told


def meta(database: sqlite3.Connection, key: str) -> str:
    (value,) = database.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    assert isinstance(value, str)
    return value


ROW: Final = Run("r", "c", "n", "running", progress_finished=3, project="p", reason="\u2028 \u2603")


@pytest.mark.parametrize(
    "change",
    [
        Change(7, "run:added", ROW, None, "2026"),
        Change(7, "run:updated", ROW._replace(status="blocked", reason=None, spec_id="s"), ROW, "2026"),
        Change(7, "run:removed", ROW, ROW, "2026"),
        Change(7, "schedule:updated", Schedule("c", "n", "s", active=1), Schedule("c", "n", "s"), "2026"),
        Change(7, "volume:removed", Volume("c", "n", "v", deleted_at="2026"), Volume("c", "n", "v"), "2026"),
        Change(7, "warning", ClusterEvent("c", "n", "e", count=2), ClusterEvent("c", "n", "e"), "2026"),
        Change(7, "cluster:stale", ClusterRow("c", error="silent"), None, "2026"),
    ],
    ids=lambda change: change.type,
)
def test_a_change_comes_back_as_it_was_told(database: sqlite3.Connection, change: Change) -> None:
    if isinstance(change.row, (Run, Schedule, Volume, ClusterEvent)):
        write(database, [upsert(change.row)])
    write(database, commit_statements(Commit((change,))))
    stored = database.execute("SELECT seq, type, at, row, before FROM changes").fetchone()
    assert change_from(*stored) == change


@given(st.lists(st.sampled_from(Run._fields[3:]), max_size=5), st.text(max_size=20))
def test_what_was_other_before_is_kept_whatever_it_was(names: list[str], text: str) -> None:
    row = Run(**{**ROW._asdict(), **dict.fromkeys(names, text)})
    change = Change(7, "run:updated", row, ROW, "2026")
    *_, (_, values) = [one for one in commit_statements(Commit((change,))) if "INTO changes" in one[0]]
    seq, kind, _, at, row_text, before_text = values
    assert change_from(seq, kind, at, row_text, before_text) == change


def test_a_change_of_another_version_keeps_what_is_known_of_it() -> None:
    told = change_from(1, "run:updated", "2026", '{"run_id":"r","cluster":"c","namespace":"n","new":1}', '{"old":2}')
    assert told == Change(1, "run:updated", Run("r", "c", "n"), Run("r", "c", "n"), "2026")


def test_a_cache_of_the_first_schema_keeps_its_changes_but_nobody_goes_on_from_them() -> None:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute(META)
    connection.executescript(MIGRATIONS[0])
    connection.execute("INSERT INTO changes VALUES (41, 'run:added', 'c', '2026', '{}')")
    connection.executescript(MIGRATIONS[1])
    assert meta(connection, "changes_after") == "41"
    assert connection.execute("SELECT seq, before FROM changes").fetchall() == [(41, None)]
    connection.close()


def test_how_far_changes_reach_back_never_falls(database: sqlite3.Connection) -> None:
    for seq, held in ((500, "500"), (200, "500"), (-3, "500"), (10_000, "10000")):
        write(database, [changes_held_after(seq)])
        assert meta(database, "changes_after") == held
