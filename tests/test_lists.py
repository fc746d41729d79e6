"""What a list shows, in memory and in SQL alike; history from changes and events; words that mean a run or a time."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabrik_daemon import (
    LIST_FILTERS,
    META,
    MIGRATIONS,
    RUN_EVENTS,
    STATUSES,
    TABLES,
    UNKNOWN,
    ClusterEvent,
    FabrikError,
    Filter,
    Freshness,
    NotFoundError,
    Run,
    Schedule,
    Selection,
    StaleError,
    StatusEvent,
    StoredChange,
    UsageError,
    Volume,
    blocked_seconds,
    candidates_statement,
    check_age,
    epoch_of,
    format_duration,
    format_time,
    list_statement,
    meanings,
    parse_duration,
    parse_moment,
    parse_selection,
    percentile,
    pick_run,
    run_statistics,
    runs_at,
    schema_columns,
    seconds_between,
    select_rows,
    timeline_of,
    upsert,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

NOW: Final = epoch_of("2026-11-23T12:00:00Z") or 0.0
TIMES: Final = st.none() | st.sampled_from([f"2026-11-23T1{hour}:00:00Z" for hour in range(4)])
WORDS: Final = st.none() | st.sampled_from(["a", "b", "\u65e5", "Z"])
CLUSTERS: Final = st.sampled_from(["dev", "prod"])


def rows_of(kind: type[Any], **columns: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """Return lists of rows of one table with different keys."""
    keys = {"run_id": st.text("01", min_size=1, max_size=4)} if kind is Run else {"name": st.text("ab", max_size=3)}
    fields = {**keys, "cluster": CLUSTERS, "namespace": st.just("ns"), **columns}
    row = st.fixed_dictionaries(fields).map(lambda values: kind(**values))
    return st.lists(row, max_size=8, unique_by=lambda row: row[:1] if kind is Run else row[:3])


RUNS: Final = rows_of(
    Run,
    status=st.none() | st.sampled_from(STATUSES),
    phase=WORDS,
    spec_id=WORDS,
    id=WORDS,
    created_at=TIMES,
    progress_finished=st.none() | st.integers(0, 3),
)
OTHERS: Final = st.one_of(
    rows_of(
        Schedule, last_run_at=TIMES, missed=st.integers(0, 3), suspended=st.integers(0, 1), active=st.integers(0, 1)
    ),
    rows_of(Volume, created_at=TIMES, capacity_bytes=st.none() | st.integers(0, 3), run_id=WORDS),
    rows_of(ClusterEvent, last_at=TIMES, count=st.integers(1, 3), reason=WORDS),
)


@pytest.fixture(scope="module")
def database() -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        for script in (META, *MIGRATIONS):
            connection.executescript(script)
        yield connection


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_sql_and_memory_give_the_same_list(database: sqlite3.Connection, data: st.DataObject) -> None:
    rows = data.draw(RUNS | OTHERS)
    kind = type(rows[0]) if rows else Run
    asked: dict[str, frozenset[str]] = {}
    for column in LIST_FILTERS[kind]:
        values = sorted({str(getattr(row, column)) for row in rows} | {UNKNOWN})
        if data.draw(st.integers(0, 3), label=column) == 0:
            asked[column] = frozenset(data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=2)))
    wanted = Filter(frozenset(data.draw(st.lists(CLUSTERS, max_size=1))), tuple(asked.items()))
    selection = Selection(
        data.draw(st.sampled_from(["", *kind._fields])),
        data.draw(st.booleans()),
        data.draw(st.integers(0, 3)),
        data.draw(st.sampled_from(["", "2026-11-23T11:00:00Z"])),
    )
    table = next(name for name, each in TABLES.items() if each is kind)
    database.execute(f"DELETE FROM {table}")  # noqa: S608 - a name of ours
    for row in rows:
        database.execute(*upsert(row))
    found = [kind(*values) for values in database.execute(*list_statement(kind, wanted, selection))]
    assert found == select_rows(filter(wanted.matches, rows), kind, selection)
    assert wanted.select(rows, kind) == [row for row in rows if wanted.matches(row)]


def test_a_long_list_is_cut_as_a_short_one_is() -> None:
    rows = [Run(f"{number:04}", "dev", "ns", created_at=f"2026-11-23T10:00:{number % 60:02}Z") for number in range(500)]
    whole = select_rows(rows, Run, Selection())
    for limit in (1, 7, 124, 126, 600):
        assert select_rows(rows, Run, Selection(limit=limit)) == whole[:limit]
        assert select_rows(rows, Run, Selection(limit=limit, reverse=True)) == whole[::-1][:limit]


@pytest.mark.parametrize(
    "request_",
    [
        {"limit": -1},
        {"limit": "5"},
        {"limit": True},
        {"since": "soon"},
        {"since": 5},
        {"sortBy": "statsu"},
        {"sortBy": 5},
    ],
    ids=str,
)
def test_a_selection_that_cannot_be_meant(request_: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        parse_selection(request_, Run)


# ---------------------------------------------------------------- which run

SOME: Final = [
    Run("01aa", "dev", "ns", status="blocked", id="01aa", created_at="2026-11-23T10:00:00Z"),
    Run("01ab", "dev", "ns", status="failed", id="01ab", created_at="2026-11-23T11:00:00Z"),
    Run("01ab@prod/ns", "prod", "ns", status=None, id="01ab", created_at="2026-11-23T12:00:00Z"),
    Run("x", "dev", "ns", status="blocked", id="same", created_at="2026-11-23T12:00:00Z"),
    Run("y", "dev", "ns", status="running", id="same", created_at=None),
]


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("01aa", "01aa"),
        ("01ab", "01ab"),
        ("01ab@", "01ab@prod/ns"),
        ("01aa"[:3] + "a", "01aa"),
        ("@latest", "x"),
        ("@blocked", "x"),
        ("@failed", "01ab"),
        ("@unknown", "01ab@prod/ns"),
        ("@running", "y"),
        ("same", UsageError),
        ("01", UsageError),
        ("@lates", UsageError),
        ("@", UsageError),
        ("@finished", NotFoundError),
        ("", NotFoundError),
        ("%", NotFoundError),
        ("02", NotFoundError),
    ],
)
def test_a_word_means_the_same_run_in_memory_and_in_sql(
    word: str, found: str | type[FabrikError], database: sqlite3.Connection
) -> None:
    database.execute("DELETE FROM runs")
    for row in SOME:
        database.execute(*upsert(row))
    candidates = [Run(*values) for values in database.execute(*candidates_statement(word))]
    for runs in (SOME, candidates):
        if isinstance(found, str):
            assert pick_run(runs, word).run_id == found
        else:
            with pytest.raises(found):
                pick_run(runs, word)


# ---------------------------------------------------------------- times


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2h", "2026-11-23T10:00:00Z"),
        ("1d12h", "2026-11-22T00:00:00Z"),
        ("2026-02-16T20:00Z", "2026-02-16T20:00:00Z"),
        ("2026-02-16", "2026-02-16T00:00:00Z"),
        ("2026-02-16 20:00", "2026-02-16T20:00:00Z"),
        ("2026-02-16T20:00:05.5+01:00", "2026-02-16T19:00:05.5Z"),
    ],
)
def test_a_moment(text: str, moment: str) -> None:
    assert parse_moment(text, NOW) == epoch_of(moment)


@pytest.mark.parametrize("text", ["", "soon", "2026-13-01", "2026-02-16T25:00", "2026-02-16T20", "-2h", "20:00"])
def test_what_is_no_moment(text: str) -> None:
    with pytest.raises(ValueError, match="is no time"):
        parse_moment(text, NOW)


@given(st.integers(0, 10**8).map(lambda thousandths: thousandths / 1000))
def test_durations_read_back(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, abs=1e-6)


@given(st.integers(0, 4_000_000_000_000))
def test_a_time_with_thousandths_reads_back(thousandths: int) -> None:
    text = format_time(thousandths // 1000, milliseconds=True)[:-4] + f"{thousandths % 1000:03}Z"
    assert format_time(parse_moment(text, NOW), milliseconds=True) == text


def test_the_age_that_is_allowed() -> None:
    live = Freshness("dev", connected=True, synced_at="2026-11-23T09:00:00Z")
    check_age([live], 1, NOW)
    check_age([live._replace(connected=False)], None, NOW)
    check_age([live._replace(connected=False)], 3 * 3600, NOW)
    for part in (live._replace(connected=False), Freshness("dev", connected=False, synced_at=None)):
        with pytest.raises(StaleError, match="dev"):
            check_age([live, part], 3599, NOW)


# ---------------------------------------------------------------- the past


def stored(run: Run, kind: str, at: str, before: dict[str, Any] | None) -> StoredChange:
    """Return a change as the cache holds it."""
    text = None if before is None else json.dumps(before)
    return StoredChange(run.run_id, kind, at, json.dumps(run._asdict()), text)


A: Final = Run("a", "dev", "ns", status="running", created_at="08", current_task="1", progress_finished=1)
A_LATER: Final = A._replace(status="failed", reason="OOMKilled", finished_at="13")
B: Final = Run("b", "dev", "ns", status="blocked", created_at="07")
NEW: Final = Run("n", "dev", "ns", status="pending", created_at="13")
GONE: Final = Run("g", "dev", "ns", status="finished", created_at="06", finished_at="09")
EVENTS: Final = [
    StatusEvent("a", None, "pending", None, "08"),
    StatusEvent("a", "pending", "running", None, "09"),
    StatusEvent("a", "running", "failed", "OOMKilled", "13"),
]


def test_the_runs_of_a_moment_that_changes_reach() -> None:
    changes = [
        stored(A, "run:added", "11", None),
        stored(A_LATER, "run:updated", "13", {"status": "running", "reason": None, "finished_at": None}),
        stored(NEW, "run:added", "13", None),
        stored(GONE, "run:removed", "14", {}),
    ]
    known = [A_LATER, B, NEW]
    then = {run.run_id: (run, source) for run, source in runs_at("12", known, changes, EVENTS, "11")}
    assert then == {"a": (A, "changes"), "b": (B, "changes"), "g": (GONE, "changes")}
    changes = changes[1:]
    assert {run.run_id: run for run, _ in runs_at("12", known, changes, EVENTS, "11")} == {"a": A, "b": B, "g": GONE}
    now = {run.run_id: run for run, _ in runs_at("15", known, changes, EVENTS, "11")}
    assert now == {"a": A_LATER, "b": B, "n": NEW}


def test_the_runs_of_a_moment_beyond_the_changes() -> None:
    changes = [stored(A_LATER, "run:updated", "13", {"status": "running"})]
    for reach in ("13", None):
        past = runs_at("12", [A_LATER, B, NEW], changes if reach else [], EVENTS, reach)
        found = {run.run_id: (run.status, run.reason, run.current_task, source) for run, source in past}
        assert found == {"a": ("running", None, None, RUN_EVENTS), "b": (None, None, None, RUN_EVENTS)}
    early = {run.run_id: run.status for run, _ in runs_at("08", [A_LATER], changes, EVENTS, "13")}
    assert early == {"a": "pending"}
    assert runs_at("05", [A_LATER, B, NEW], changes, EVENTS, "13") == []
    ended = {run.run_id: run.status for run, _ in runs_at("12", [GONE], changes, [], "13")}
    assert ended["g"] == "finished", "its own end tells"


def event(kind: str, at: str, **payload: object) -> dict[str, Any]:
    return {
        "event_type": kind,
        "payload": payload,
        "cluster_timestamp": f"2026-11-23T{at}:00Z",
        "local_timestamp": None,
    }


def test_a_timeline() -> None:
    events = [
        event("status_changed", "10:00", to="pending", **{"from": None}),
        event("status_changed", "10:05", to="running", **{"from": "pending"}),
        event("task_completed", "10:20", task="1:a", finished=1, total=3),
        event("status_changed", "10:30", to="blocked", reason="gate", **{"from": "running"}),
        event("blocked", "10:30", phase="human-gate"),
        event("log_line", "10:30", line="x"),
        event("status_changed", "11:30", to="running", **{"from": "blocked"}),
    ]
    run = {"status": "running", "started_at": "2026-11-23T10:05:00Z", "current_task": "2:b", "progress_finished": 1}
    steps = [(step["what"], step["seconds"]) for step in timeline_of({**run, "progress_total": 3}, events, NOW)]
    assert steps == [
        ("pending", 300),
        ("running", 1500),
        ("task 1:a done (1/3)", 900),
        ("blocked (gate)", 3600),
        ("running", 1800),
        ("task 2:b (1/3)", 1800),
    ]
    ended = timeline_of({**run, "status": "failed"}, events[:2], NOW)
    assert [(step["what"], step["seconds"]) for step in ended] == [("pending", 300), ("running", None)]
    assert timeline_of({"status": None}, [], NOW) == []


def test_time_blocked_and_statistics() -> None:
    def told(run_id: str, status: str, at: str) -> StatusEvent:
        return StatusEvent(run_id, None, status, None, f"2026-11-23T{at}:00Z")

    events = [
        *(told("a", "blocked", "10:00"), told("b", "running", "10:00"), told("a", "running", "10:10")),
        *(told("a", "blocked", "11:00"), told("a", "blocked", "11:05"), told("c", "blocked", "11:59")),
        told("a", "finished", "11:30"),
    ]
    assert blocked_seconds(events, NOW) == {"a": 600 + 1800, "c": 60}
    ended = [
        Run(
            str(n),
            "dev",
            "ns",
            status="failed" if n == 5 else "finished",
            spec_id="s",
            started_at="2026-11-23T10:00:00Z",
        )
        for n in range(1, 6)
    ]
    ended = [run._replace(finished_at=f"2026-11-23T10:0{run.run_id}:00Z") for run in ended]
    rows = run_statistics([*ended, Run("r", "dev", "ns", status="running")], {"1": 30.0, "r": 5.0}, "spec_id")
    assert rows == [
        {
            **{"spec_id": "s", "runs": 5, "active": 0, "finished": 4, "failed": 1, "cancelled": 0, "success_rate": 0.8},
            **{"median_seconds": 180, "p95_seconds": 300, "blocked_seconds": 30.0},
        },
        {
            **{
                "spec_id": None,
                "runs": 1,
                "active": 1,
                "finished": 0,
                "failed": 0,
                "cancelled": 0,
                "success_rate": None,
            },
            **{"median_seconds": None, "p95_seconds": None, "blocked_seconds": 5.0},
        },
    ]
    assert [percentile([1, 2, 3, 4], part) for part in (0.0, 0.5, 0.75, 0.95, 1.0)] == [1, 2, 3, 4, 4]
    assert seconds_between("2026-11-23T12:00:10Z", "2026-11-23T12:00:00Z") == 0
    assert seconds_between(None, NOW) is None


# ---------------------------------------------------------------- the schema, told


def test_every_table_and_column_has_a_meaning_and_every_meaning_a_column() -> None:
    told, there = meanings(), schema_columns()
    tables = {table for table, _, _ in there}
    assert {table for table, column in told if not column} == tables
    for table, column, _ in there:
        if not table.startswith("v_"):
            assert told.get((table, column)), f"{table}.{column}"
    assert [key for key in told if key[1] and key not in {(table, column) for table, column, _ in there}] == []
