from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabrik_daemon import (
    CLUSTER_COLUMNS,
    EVENT_COLUMNS,
    RUN_COLUMNS,
    VOLUME_COLUMNS,
    WARNING_COLUMNS,
    Column,
    Freshness,
    age_of,
    columns_for,
    epoch_of,
    event_detail,
    format_freshness,
    format_json,
    format_run,
    format_table,
    safe_text,
)

NOW = epoch_of("2026-11-23T12:00:00Z") or 0.0
CONTROLS = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))]
BIDI = [chr(code) for code in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))]
SEPARATORS = ["\u2028", "\u2029"]
HIDDEN = ["\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\ufff9", "\ufffa", "\ufffb"]
HARMFUL = [*CONTROLS, *BIDI, *SEPARATORS, *HIDDEN, "\ud800", "\udfff"]
ESCAPES = "\x1b]0;title\x07\x1b[31m\x9b2J\u202eevil\r\n"
TEXTS = st.text(st.characters() | st.sampled_from(HARMFUL), max_size=12)
ROWS = st.lists(st.dictionaries(st.sampled_from("abc"), TEXTS | st.integers() | st.none(), max_size=3), max_size=4)


def cells(text: str) -> int:
    """Return how many cells a terminal gives to a text, reckoned apart from the program's own way."""
    return sum(
        0
        if unicodedata.category(char) in {"Mn", "Me", "Cf"} or "\u1160" <= char <= "\u11ff"
        else 1 + (unicodedata.east_asian_width(char) in {"W", "F"})
        for char in text
    )


@pytest.mark.parametrize("char", HARMFUL, ids=lambda char: f"U+{ord(char):04X}")
def test_no_harmful_character_reaches_the_output(char: str) -> None:
    text = f"a{char}b"
    assert char not in safe_text(text)
    assert safe_text(text).startswith("a\\")
    assert safe_text(text).endswith("b")
    table = format_table(columns_for(["x"]), [{"x": text}], NOW, None)
    assert char not in table.replace("\n", "") and table.count("\n") == 2  # noqa: PT018 - one promise
    shown = format_json({"x": text, text: 1})
    assert char not in shown.replace("\n", "")
    assert json.loads(shown) == {"x": text, text: 1}
    run = format_run({"run_id": text, "cluster": text, "namespace": text, "reason": text, "status": text}, NOW, None)
    assert char not in run.replace("\n", "")


def test_every_character_that_is_a_control_or_turns_text_around_is_harmful() -> None:
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    for code in range(0x110000):
        char = chr(code)
        if unicodedata.category(char) in {"Cc", "Zl", "Zp", "Cs"} or unicodedata.bidirectional(char) in turning:
            assert safe_text(char) != char, hex(code)


@pytest.mark.parametrize(
    "text",
    ["plain", "16:impl", "Gr\u00fc\u00dfe", "\u65e5\u672c\u8a9e", "\U0001f600", "\u05e9\u05dc\u05d5\u05dd", "a\\n"],
)
def test_harmless_text_stands_as_it_is(text: str) -> None:
    assert safe_text(text) == text
    assert json.loads(format_json(text)) == text
    assert text.replace("\\", "\\\\") in format_json(text)


def test_anything_can_be_shown() -> None:
    assert [safe_text(value) for value in (None, 5, True, 1.5)] == ["", "5", "True", "1.5"]


@settings(deadline=None)
@given(ROWS, st.none() | st.integers(1, 60))
def test_a_table_has_a_line_for_each_row_none_too_wide_and_nothing_harmful(
    rows: list[dict[str, Any]], width: int | None
) -> None:
    text = format_table(columns_for("abc"), rows, NOW, width)
    lines = text.split("\n")
    assert len(lines) == len(rows) + 2
    assert lines[-1] == ""
    assert not set(text) & (set(HARMFUL) - {"\n"})
    for line in lines:
        assert width is None or cells(line) <= width


@settings(deadline=None)
@given(ROWS)
def test_columns_begin_at_the_same_cell_in_every_line(rows: list[dict[str, Any]]) -> None:
    marked = (*columns_for("abc"), Column("|", lambda _row, _now: "|"))
    lines = format_table(marked, rows, NOW, None).splitlines()
    assert len({cells(line) for line in lines}) == 1


def test_wide_and_combining_characters_are_aligned() -> None:
    rows = [{"a": "\u65e5\u672c", "b": "x"}, {"a": "abcd", "b": "x"}, {"a": "e\u0301", "b": "x"}]
    lines = format_table(columns_for("ab"), rows, NOW, None).splitlines()
    assert lines == ["a      b", "\u65e5\u672c   x", "abcd   x", "e\u0301      x"]


def test_numbers_stand_at_the_right() -> None:
    columns = (Column("N", lambda row, _now: str(row["n"]), right=True), Column("X", lambda _row, _now: "x"))
    assert format_table(columns, [{"n": 5}, {"n": 150}], NOW, None) == "  N   X\n  5   x\n150   x\n"


@pytest.mark.parametrize(("width", "line"), [(7, "abcdefg"), (6, "abcde~"), (1, "~")])
def test_a_line_that_is_too_long_is_marked(width: int, line: str) -> None:
    assert format_table(columns_for("a"), [{"a": "abcdefg"}], NOW, width).splitlines()[1] == line


def test_a_wide_character_is_not_cut_in_half() -> None:
    assert format_table(columns_for("a"), [{"a": "\u65e5\u672c\u8a9e"}], NOW, 4).splitlines()[1] == "\u65e5~"


def test_a_query_s_column_names_are_made_safe_too() -> None:
    assert "\x1b" not in format_table(columns_for(["\x1b[31m"]), [], NOW, None)


@settings(deadline=None)
@given(
    st.recursive(
        TEXTS | st.none() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=8
    )
)
def test_json_is_the_same_value_and_harmless(value: Any) -> None:
    text = format_json(value)
    assert json.loads(text) == value
    assert not set(text) & (set(HARMFUL) - {"\n"})
    assert text.endswith("\n")


ROW = {
    "run_id": "01jk",
    "cluster": "dev",
    "namespace": "fabrik-runs",
    "status": "blocked",
    "phase": "human-gate",
    "current_task": "16:impl",
    "progress_finished": 0,
    "progress_total": 192,
    "heartbeat_at": "2026-11-23T11:59:30Z",
    "created_at": "2026-11-23T10:00:00Z",
    "reason": "rate_limit_exhausted",
}


def cells_of(columns: tuple[Column, ...], row: dict[str, Any]) -> dict[str, str]:
    return {column.title: column.cell(row, NOW) for column in columns}


def test_a_run_in_a_list() -> None:
    assert cells_of(tuple(column for column in RUN_COLUMNS if not column.wide), ROW) == {
        "RUN": "01jk",
        "CLUSTER": "dev",
        "STATUS": "blocked",
        "PHASE": "human-gate",
        "TASK": "16:impl",
        "PROGRESS": "0/192",
        "HEARTBEAT": "30s",
        "AGE": "120m",
        "REASON": "rate_limit_exhausted",
    }
    ended = cells_of(RUN_COLUMNS, {**ROW, "status": None, "finished_at": "x", "progress_total": None})
    assert (ended["STATUS"], ended["HEARTBEAT"], ended["PROGRESS"]) == ("unknown", "", "")


def test_clusters_volumes_and_warnings_in_a_list() -> None:
    cluster = {"name": "dev", "server": "https://a", "priority": 0, "status": "disconnected", "error": None}
    assert list(cells_of(CLUSTER_COLUMNS, cluster).values()) == ["dev", "https://a", "0", "disconnected", "", ""]
    volume = {"name": "v", "phase": "Bound", "capacity_bytes": 10 << 30, "storage_class": None}
    assert list(cells_of(VOLUME_COLUMNS, volume).values()) == ["v", "Bound", "10Gi", ""]
    warning = {"last_at": "2026-11-23T11:59:00Z", "count": 3, "reason": "BackOff", "object_kind": "Pod", "message": "m"}
    assert list(cells_of(WARNING_COLUMNS, warning).values()) == ["60s", "3", "BackOff", "Pod/", "m"]


@pytest.mark.parametrize(
    ("kind", "payload", "detail"),
    [
        ("status_changed", {"from": "pending", "to": "running", "reason": None}, "pending -> running"),
        ("status_changed", {"from": None, "to": "failed", "reason": "OOMKilled"}, "failed (OOMKilled)"),
        (
            "status_changed",
            {"from": "running", "to": None, "reason": "VanishedUnseen"},
            "running -> unknown (VanishedUnseen)",
        ),
        ("task_completed", {"task": "1:a", "finished": 0, "total": None}, "task 1:a, finished 0"),
        ("blocked", None, ""),
    ],
)
def test_a_run_s_event_in_one_line(kind: str, payload: dict[str, Any] | None, detail: str) -> None:
    row = {"event_type": kind, "payload": payload, "local_timestamp": "2026-11-23T11:59:55.000Z"}
    assert event_detail(row) == detail
    assert list(cells_of(EVENT_COLUMNS, row).values()) == ["5s", kind, detail]


def test_a_run_shown_whole() -> None:
    volumes = [{"name": "data", "phase": "Bound", "capacity_bytes": 1024}]
    lines = format_run({**ROW, "volumes": volumes, "warnings": []}, NOW, 60).splitlines()
    assert lines[:3] == [
        "run:        01jk",
        "cluster:    dev, namespace fabrik-runs",
        "status:     blocked (rate_limit_exhausted)",
    ]
    assert "progress:   0/192 (0 %)" in lines
    assert "heartbeat:  30s ago" in lines
    assert not any(line.startswith(("pod:", "spec:", "warnings", "attempt:")) for line in lines)
    assert lines[-3:] == ["volumes", "VOLUME   PHASE   CAPACITY   CLASS", "data     Bound        1Ki"]
    assert format_run({**ROW, "status": None, "reason": ESCAPES}, NOW, 30).count("\x1b") == 0
    assert max(cells(line) for line in format_run({**ROW, "reason": "x" * 90}, NOW, 30).splitlines()) == 30


def test_how_old_an_answer_is() -> None:
    parts = [
        Freshness("a", connected=True, synced_at="2026-11-23T11:59:58Z"),
        Freshness("b", connected=False, synced_at="2026-11-23T11:00:00Z", error="refused"),
        Freshness("c", connected=False, synced_at=None),
    ]
    assert format_freshness("the cache", parts, NOW) == (
        "from the cache: a live; b as of 60m ago, not connected (refused); c not yet synced"
    )


def test_an_age_of_nothing_is_empty() -> None:
    assert [age_of(value, NOW) for value in (None, "", "soon", 5)] == [""] * 4
    assert age_of("2026-11-23T13:00:00Z", NOW) == "0s"
