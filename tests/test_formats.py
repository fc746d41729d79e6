"""Answers for programs and on narrow terminals: each format read back by another reader, columns that give way."""

from __future__ import annotations

import csv
import io
import json
from typing import Any, Final

import pyte
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fabrik_daemon import (
    FORMATS,
    PLAIN,
    RUN_COLUMNS,
    STATUSES,
    UNKNOWN,
    Column,
    Freshness,
    cells_of,
    columns_for,
    columns_with_age,
    cut_text,
    format_answer,
    format_run,
    format_run_event,
    format_table,
    format_yaml,
    name_of,
    painted,
    parse_number,
    safe_text,
)

NOW: Final = 1_790_000_000.0
MACHINE: Final = [output for output in FORMATS if output not in {"table", "wide"}]
CONTROLS: Final = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0), 0x202E, 0x2028)}
TEXTS: Final = st.text(st.characters() | st.sampled_from("\"',;\t\n\r\x1b\x00=+-@\u202e\u65e5"), max_size=12)
VALUES: Final = TEXTS | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False)
ROWS: Final = st.lists(st.fixed_dictionaries({"a": VALUES, "b": VALUES}), min_size=1, max_size=4)
NESTED: Final = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
)
SETTINGS: Final = settings(deadline=None)


def as_a_cell(value: Any) -> str:
    """Return what a spreadsheet's cell may hold of a value, reckoned apart from the program's own way."""
    if not isinstance(value, str):
        return "" if value is None else json.dumps(value)
    first = value.strip()[:1]
    is_formula = first != "" and first in "=+-@\uff1d\uff0b\uff0d\uff20" and value.strip() == value.lstrip()
    return value if not is_formula or parse_number(value) is not None else f"'{value}"


# ---------------------------------------------------------------- for programs


@SETTINGS
@given(ROWS)
def test_json_and_jsonl_read_back_as_the_same_rows(rows: list[dict[str, Any]]) -> None:
    assert json.loads(format_answer(rows, "json")) == rows
    lines = format_answer(rows, "jsonl").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == rows
    assert lines[-1] == ""


@SETTINGS
@given(NESTED)
def test_yaml_reads_back_as_the_same_value(value: Any) -> None:
    assert yaml.safe_load(format_yaml(value)) == value


@pytest.mark.parametrize(
    "word", ["yes", "No", "null", "~", "12", "1.5", "16:impl", "2026-11-23", "a: b", "- a", "#", ""]
)
def test_a_word_that_yaml_would_take_for_something_else_is_quoted(word: str) -> None:
    assert yaml.safe_load(format_yaml({word: word})) == {word: word}


def test_yaml_as_people_read_it() -> None:
    row = {
        "run_id": "01jk7v",
        "status": "blocked",
        "progress_total": 192,
        "reason": None,
        "events": [],
        "spec": "a-b/c",
    }
    assert format_yaml([row, {"x": {"z": [1, "two"]}}]) == (
        '- run_id: "01jk7v"\n  status: blocked\n  progress_total: 192\n  reason: null\n  events: []\n  spec: a-b/c\n'
        "- x:\n    z:\n      - 1\n      - two\n"
    )


@SETTINGS
@given(ROWS)
def test_csv_reads_back_with_python_s_own_reader(rows: list[dict[str, Any]]) -> None:
    table = list(csv.reader(io.StringIO(format_answer(rows, "csv"), newline="")))
    assert table[0] == ["a", "b"]
    assert len(table) == len(rows) + 1
    for cells, row in zip(table[1:], rows):
        for cell, value in zip(cells, row.values()):
            harmless = safe_text(cell, keep="\n\t")
            assert cell == harmless, "nothing in it steers a terminal"
            if isinstance(value, str):
                assert not cell.lstrip()[:1] or cell.lstrip()[0] not in "=+-@" or parse_number(cell) is not None
            if isinstance(value, str) and value.isprintable():
                assert cell == as_a_cell(value)


@SETTINGS
@given(ROWS)
def test_tsv_has_a_line_for_each_row_and_a_cell_for_each_column(rows: list[dict[str, Any]]) -> None:
    lines = format_answer(rows, "tsv").split("\n")
    assert [len(line.split("\t")) for line in lines[:-1]] == [2] * (len(rows) + 1)


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ('=HYPERLINK("http://x")', '\'=HYPERLINK("http://x")'),
        ("+1+cmd|' /C calc'!A0", "'+1+cmd|' /C calc'!A0"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("  =1", "'  =1"),
        ("\t=1", "'\t=1"),
        ("\n=1", "'\n=1"),
        ("\r=1", "'\\r=1"),
        ("\uff1d1", "'\uff1d1"),
        ("-5", "-5"),
        ("+1.5", "+1.5"),
        (-5, "-5"),
        ("-", "'-"),
        ("16:impl", "16:impl"),
        ("a=b", "a=b"),
        (None, ""),
        (True, "true"),
        ([1, "=2"], '[1, "=2"]'),
        ("two\nlines", "two\nlines"),
        ("\x1b[2J", "\\x1b[2J"),
        ('say "hi", twice', 'say "hi", twice'),
    ],
)
def test_a_spreadsheet_gets_no_formula(value: object, cell: str) -> None:
    assert list(csv.reader(io.StringIO(format_answer([{"a": value}], "csv"), newline=""))) == [["a"], [cell]]


@SETTINGS
@given(ROWS, st.sampled_from(MACHINE))
def test_no_format_lets_anything_through_that_steers_a_terminal(rows: list[dict[str, Any]], output: str) -> None:
    allowed = {"\n", "\t"} if output in {"csv", "tsv"} else {"\n"}
    assert not set(format_answer(rows, output)) & (CONTROLS - allowed)


def test_titles_and_names_of_columns() -> None:
    rows = [{"a": 1, "b": None}, {"b": "x", "a": 2}]
    assert format_answer(rows, "csv") == "a,b\n1,\n2,x\n"
    assert format_answer(rows, "tsv", titles=False) == "1\t\n2\tx\n"
    assert format_answer([], "csv", names=["a", "b"]) == "a,b\n"
    assert format_answer([], "csv") == ""
    assert format_answer({"a": {"b": 1}}, "csv") == 'a\n"{""b"": 1}"\n'
    assert format_answer([], "json") == "[]\n"
    assert format_answer([], "yaml") == "[]\n"
    assert format_answer([], "jsonl") + format_answer([], "name") == ""


def test_names() -> None:
    volume = {"cluster": "dev", "namespace": "ns", "name": "data", "run_id": "01jk"}
    run = {"run_id": "01jk", "cluster": "dev", "namespace": "ns"}
    rows: list[dict[str, Any]] = [run, volume, {"name": "prod", "server": "x"}, {"count": 5, "x": 1}, {}]
    assert [name_of(row) for row in rows] == ["01jk", "dev/ns/data", "prod", 5, None]
    assert format_answer([{"run_id": "a\nb\x1b"}], "name") == "a\\nb\\x1b\n"


@pytest.mark.parametrize(
    ("text", "number"),
    [("1", 1), ("-1.5", -1.5), ("+2", 2), ("1.", 1), (".5", None), ("", None), ("1e5", None), ("\u0661", None)],
)
def test_plain_numbers(text: str, number: float | None) -> None:
    assert parse_number(text) == number


# ---------------------------------------------------------------- on terminals

RUN: Final[dict[str, Any]] = {
    "run_id": "01jk7v8x9m3qn5r2t4w6y8z0ab",
    "cluster": "production",
    "namespace": "fabrik-runs",
    "status": "blocked",
    "phase": "human-gate",
    "current_task": "16:implement-the-whole-thing",
    "progress_finished": 150,
    "progress_total": 192,
    "created_at": "2026-09-20T10:00:00Z",
    "reason": "rate_limit_exhausted",
}


@pytest.mark.parametrize("width", range(1, 200, 7))
def test_a_table_fits_every_terminal(width: int) -> None:
    lines = format_table(RUN_COLUMNS, [RUN], NOW, width).splitlines()
    assert max(map(cells_of, lines)) <= width
    if width >= 26:
        assert lines[1].startswith(RUN["run_id"]), "what is copied from a list stays whole"
    if width >= 80:
        assert "blocked" in lines[1]


def test_what_gives_way_on_a_terminal() -> None:
    titles = [format_table(RUN_COLUMNS, [RUN], NOW, width).split("\n")[0].split() for width in (200, 120, 80, 40)]
    assert titles[0] == ["RUN", "CLUSTER", "STATUS", "PHASE", "TASK", "PROGRESS", "HEARTBEAT", "AGE", "REASON"]
    assert titles[1] == titles[0], "long texts are cut before anything leaves"
    assert titles[2] == ["RUN", "CLUSTER", "STATUS", "PHASE", "TASK", "AGE"]
    assert titles[3] == ["RUN", "STATUS"]
    assert "16:implement-the-whole-thing" in format_table(RUN_COLUMNS, [RUN], NOW, None)


def test_long_texts_share_what_room_there_is() -> None:
    rows = [{"a": "x" * 40, "b": "y" * 20, "c": "z"}]
    line = format_table(columns_for("abc"), rows, NOW, 40).splitlines()[1]
    assert (cells_of(line), line[-1]) == (40, "z")
    assert line.count("~") == 2


def test_wide_shows_every_column_whole() -> None:
    text = format_table(RUN_COLUMNS, [RUN], NOW, None, PLAIN._replace(wide=True))
    assert [title for title in ("NAMESPACE", "SPEC", "POD", "REASON") if title not in text] == []
    assert "NAMESPACE" not in format_table(RUN_COLUMNS, [RUN], NOW, None)


def test_a_table_without_titles() -> None:
    assert format_table(columns_for("a"), [{"a": "x"}], NOW, None, PLAIN._replace(titles=False)) == "x\n"


@SETTINGS
@given(st.lists(st.text("ab\u65e5\u0301\U0001f600\u1100 ", max_size=10), min_size=1, max_size=4))
def test_wide_and_combining_characters_are_aligned_on_a_real_screen(texts: list[str]) -> None:
    columns = (*columns_for("a"), Column("|", lambda _row, _now: "|"))  # pyte takes what has no width for unprintable
    screen = pyte.Screen(60, 10)
    pyte.Stream(screen).feed(format_table(columns, [{"a": text} for text in texts], NOW, 60).replace("\n", "\r\n"))
    bars = {[x for x in range(60) if screen.buffer[y][x].data == "|"][-1] for y in range(len(texts) + 1)}
    assert len(bars) == 1


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
def test_a_cut_text_keeps_to_its_width(width: int) -> None:
    assert cells_of(cut_text("\u65e5\u672ce\u0301x", width)) <= width
    assert cut_text("abc", 0) == ""


def test_colours_change_nothing_but_colours() -> None:
    rows = [{**RUN, "status": status} for status in (*STATUSES, None)]
    for width in (None, 60, 120):
        plain = format_table(RUN_COLUMNS, rows, NOW, width)
        coloured = format_table(RUN_COLUMNS, rows, NOW, width, PLAIN._replace(colour=True))
        screen = pyte.Screen(200, 12)
        pyte.Stream(screen).feed(coloured.replace("\n", "\r\n"))
        assert [line.rstrip() for line in screen.display[: len(rows) + 1]] == plain.splitlines()
        colours = {screen.buffer[y][x].fg for y in range(len(rows) + 1) for x in range(60)}
        assert {"red", "green", "cyan"} <= colours
        assert "\x1b" not in plain


def test_what_a_cluster_says_brings_no_colour_of_its_own() -> None:
    hostile = {**RUN, "status": "\x1b[31mfake", "reason": "\x1b]0;t\x07", "current_task": "\x1b[0m"}
    text = format_table(RUN_COLUMNS, [hostile], NOW, None, PLAIN._replace(colour=True))
    assert "\x1b" not in text
    assert painted("", "31") == ""
    assert painted("x", "") == "x"


def test_a_run_and_its_changes_in_colour() -> None:
    style = PLAIN._replace(colour=True)
    assert "\x1b[1;33mblocked (rate_limit_exhausted)\x1b[0m\n" in format_run(RUN, NOW, 80, style)
    row = {**RUN, "reason": None}
    event = {"type": "run:updated", "row": row, "previousStatus": "running", "status": "blocked", "cluster": "dev"}
    event["localTimestamp"] = "2026-11-23T11:59:55.000Z"
    assert "\x1b[1;33mrunning -> blocked\x1b[0m" in format_run_event(event, None, style)
    assert "\x1b" not in format_run_event(event, None)
    assert cells_of(format_run_event(event, 30, style)[:-1]) == 30


def test_a_run_with_its_last_log_lines() -> None:
    log = [{"line": "built 3 of 4"}, {"line": "\x1b[2Jgone"}, None]
    text = format_run(
        {**RUN, "log": log, "timeline": [{"at": RUN["created_at"], "what": "running", "seconds": 90}]}, NOW, 60
    )
    assert "\nlast log lines\nbuilt 3 of 4\n\\x1b[2Jgone\n" in text
    assert "\ntimeline\nAT                    TOOK   WHAT\n2026-09-20 10:00:00    90s   running\n" in text


def test_rows_of_a_cluster_that_is_away_say_so() -> None:
    parts = [Freshness("production", connected=False, synced_at="2026-09-21T10:00:00Z")]
    columns, rows = columns_with_age(RUN_COLUMNS, [RUN], parts)
    assert "AS OF" in [column.title for column in columns]
    assert "AS OF" in format_table(columns, rows, NOW, 80)
    live = [parts[0]._replace(connected=True)]
    assert columns_with_age(RUN_COLUMNS, [RUN], live)[0] is RUN_COLUMNS
    assert UNKNOWN not in format_table(columns, rows, NOW, 80)
