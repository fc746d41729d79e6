from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabrik_daemon import (
    INT_MAX,
    JSON_MAX_CHARS,
    TEXT_MAX_BYTES,
    clip,
    epoch_of,
    format_age,
    format_bytes,
    format_time,
    latest,
    list_at,
    nearest,
    object_at,
    parse_duration,
    parse_int,
    parse_json_object,
    parse_quantity,
    text_at,
    time_text,
    ulid_in,
)

ULID = "01jk7v8x9m3qn5r2t4w6y8z0ab"
NOON = 1795435200.0  # 2026-11-23T12:00:00Z
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.parametrize(
    ("text", "epoch"),
    [
        ("2026-11-23T12:00:00Z", NOON),
        ("2026-11-23t12:00:00z", NOON),
        ("2026-11-23 12:00:00Z", NOON),
        ("2026-11-23T12:00:00.250Z", NOON + 0.25),
        ("2026-11-23T13:30:00+01:30", NOON),
        ("2026-11-23T13:30:00+0130", NOON),
        ("2026-11-23T04:00:00-08:00", NOON),
        ("2026-11-23T12:00:00.123456789Z", NOON + 0.123456789),
        ("1970-01-01T00:00:00Z", 0.0),
        ("1969-12-31T23:59:59Z", -1.0),
    ],
)
def test_an_rfc_3339_time_is_read(text: str, epoch: float) -> None:
    assert epoch_of(text) == pytest.approx(epoch, abs=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yesterday",
        "2026-11-23",
        "2026-11-23T12:00:00",
        "2026-02-30T12:00:00Z",
        "2026-11-23T24:00:00Z",
        "2026-11-23T12:60:00Z",
        "0000-01-01T00:00:00Z",
        "0001-01-01T00:00:00+23:59",
        "9999-12-31T23:59:59-23:59",
        "2026-11-23T12:00:00Z\n",
        " 2026-11-23T12:00:00Z",
        "2026-11-23T12:00:00." + "9" * 60 + "Z",
        "\u0662026-11-23T12:00:00Z",
        "x" * 100_000,
        None,
        17,
        ["2026-11-23T12:00:00Z"],
    ],
)
def test_what_is_no_time_is_none(text: object) -> None:
    assert epoch_of(text) is None
    assert time_text(text) is None


@settings(deadline=None)
@given(st.datetimes(min_value=datetime(1, 1, 3), max_value=datetime(9999, 12, 29)), st.integers(-1439, 1439))  # noqa: DTZ001 - the zone is added below
def test_a_time_is_the_same_in_every_zone(moment: datetime, offset: int) -> None:
    whole = moment.replace(microsecond=0, tzinfo=timezone.utc)
    there = whole.astimezone(timezone(timedelta(minutes=offset)))
    assert epoch_of(there.isoformat()) == whole.timestamp()
    assert time_text(there.isoformat()) == whole.isoformat().replace("+00:00", "Z")


@settings(deadline=None, max_examples=400)
@given(
    st.sampled_from((19, 23)),
    st.dictionaries(st.integers(0, 22), st.sampled_from("0129-+:.,TWZ_ \u0662\u00b2"), max_size=3),
)
def test_the_usual_form_of_a_time_is_read_as_any_other(length: int, wrong: dict[int, str]) -> None:
    text = "".join(wrong.get(place, char) for place, char in enumerate("2026-11-23T12:00:00.250"[:length]))
    assert epoch_of(f"{text}Z") == epoch_of(f"{text}+00:00")


def test_a_row_s_time_has_whole_seconds_so_that_it_sorts_as_text() -> None:
    assert time_text("2026-11-23T13:00:00.999+01:00") == "2026-11-23T12:00:00Z"
    assert time_text("1969-12-31T23:59:59.5Z") == "1969-12-31T23:59:59Z"


def test_a_time_at_the_end_of_the_calendar_does_not_raise() -> None:
    assert time_text("9999-12-31T23:59:59.999999999Z") in {None, "9999-12-31T23:59:59Z"}


def test_times_are_written_in_utc() -> None:
    assert format_time(NOON) == "2026-11-23T12:00:00Z"
    assert format_time(NOON + 0.25, milliseconds=True) == "2026-11-23T12:00:00.250Z"
    assert format_time(NOON, milliseconds=True) == "2026-11-23T12:00:00.000Z"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90.0),
        ("1.5", 1.5),
        ("0", 0.0),
        ("250ms", 0.25),
        ("1.5s", 1.5),
        ("10m", 600.0),
        ("1h30m", 5400.0),
        ("7d", 604800.0),
        ("2w", 1209600.0),
    ],
)
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "soon", "10x", "1h 30m", "-5", "-5s", "nan", "inf", "5s!", "s", "1e400"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["9" * 400 + "d", "99999999999999999999w"])
def test_a_duration_with_a_unit_is_bounded_as_a_bare_number_is(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [  # what kubectl shows (HumanDuration)
        (-1, "0s"),
        (0, "0s"),
        (119.9, "119s"),
        (120, "2m"),
        (125, "2m5s"),
        (599, "9m59s"),
        (600, "10m"),
        (3 * 3600 - 1, "179m"),
        (3 * 3600, "3h"),
        (8 * 3600 - 60, "7h59m"),
        (8 * 3600, "8h"),
        (48 * 3600 - 1, "47h"),
        (48 * 3600, "2d"),
        (49 * 3600, "2d1h"),
        (8 * 86400, "8d"),
        (2 * 365 * 86400 - 1, "729d"),
        (2 * 365 * 86400, "2y"),
        (2 * 365 * 86400 + 5 * 86400, "2y5d"),
        (9 * 365 * 86400, "9y"),
    ],
)
def test_an_age_is_shown_as_kubectl_shows_it(seconds: float, text: str) -> None:
    assert format_age(seconds) == text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1024", 1024),
        ("10Gi", 10 << 30),
        ("1.5Gi", 3 << 29),
        (".5Ki", 512),
        ("5.", 5),
        ("1.5G", 1_500_000_000),
        ("1k", 1000),
        ("1e9", 10**9),
        ("1E3", 1000),
        ("1E", 10**18),
        ("2Ei", 2 << 60),
        ("1500m", 2),
        ("100m", 1),
        ("1n", 1),
        ("99999999999999999999", INT_MAX),
        ("9Ei", INT_MAX),
        ("9e99", INT_MAX),
    ],
)
def test_a_quantity_is_read_and_rounded_up(text: str, size: int) -> None:
    assert parse_quantity(text) == size


@pytest.mark.parametrize("text", ["", "Gi", "-1Gi", "10gi", "10 Gi", "1e", "1e999", "0x10", "1" * 64, None, 10, ["1"]])
def test_what_is_no_quantity_is_none(text: object) -> None:
    assert parse_quantity(text) is None


@pytest.mark.parametrize(
    ("size", "text"), [(None, ""), (0, "0"), (1023, "1023"), (1024, "1Ki"), (10 << 30, "10Gi"), (3 << 29, "1.5Gi")]
)
def test_a_size_is_shown_with_a_binary_unit(size: int | None, text: str) -> None:
    assert format_bytes(size) == text


@settings(deadline=None)
@given(st.integers(0, 1023), st.sampled_from(["", "Ki", "Mi", "Gi", "Ti", "Pi"]))
def test_a_whole_size_is_shown_as_it_was_written(number: int, unit: str) -> None:
    assert format_bytes(parse_quantity(f"{number}{unit}")) == (f"{number}{unit}" if number else "0")


@pytest.mark.parametrize(
    "name",
    [
        f"fabrik-{ULID}",
        f"data-fabrik-{ULID}",
        f"fabrik-{ULID}-ws",
        f"fabrik-{ULID}-x7k2p",
        f"run-{ULID}-workspace",
    ],
)
def test_a_run_s_ulid_is_found_in_the_names_of_its_objects(name: str) -> None:
    assert ulid_in(name) == ULID


@pytest.mark.parametrize(
    "name",
    [
        ULID,
        f"fabrik-{ULID}x",
        f"fabrik-{ULID}-",
        f"fabrik-{ULID.upper()}",
        f"fabrik-{ULID[:-1]}",
        f"fabrik-8{ULID[1:]}",  # beyond the year 10889, where ULIDs end
        f"fabrik-{ULID[:-1]}u",  # no Crockford letter
        f"run-{ULID}",
        f"my-fabrik-{ULID}",
        "",
    ],
)
def test_other_names_hold_no_ulid(name: str) -> None:
    assert ulid_in(name) is None


def test_text_is_cut_and_bindable() -> None:
    assert clip("a" * (TEXT_MAX_BYTES + 1)) == "a" * TEXT_MAX_BYTES
    assert clip("\u20ac" * TEXT_MAX_BYTES) == "\u20ac" * (TEXT_MAX_BYTES // 3)  # bytes, and no half character
    assert clip("a\ud800b") == "a?b"
    assert [clip(value) for value in ("", None, 5, ["a"], {"a": 1})] == [None] * 5


@settings(deadline=None)
@given(st.text(st.characters()))
def test_clipped_text_can_always_be_encoded(text: str) -> None:
    clipped = clip(text)
    assert (clipped is None) == (not text)
    assert len((clipped or "").encode()) <= TEXT_MAX_BYTES


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (0, 0),
        (INT_MAX, INT_MAX),
        ("0", 0),
        ("007", 7),
        (str(INT_MAX), INT_MAX),
        (INT_MAX + 1, None),
        (str(INT_MAX + 1), None),
        (-1, None),
        ("-1", None),
        ("+1", None),
        ("1" * 5000, None),
        ("\u0661", None),
        ("\u00b2", None),
        ("1.0", None),
        (1.0, None),
        (float("nan"), None),
        (True, None),
        ("", None),
        (" 1", None),
        (None, None),
        ([1], None),
    ],
)
def test_a_count_is_a_whole_number_that_sqlite_holds(value: object, number: int | None) -> None:
    assert parse_int(value) == number
    assert type(parse_int(value)) is type(number)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        '{"a":' * 5000,
        '{"a":' + "1" * 5000 + "}",
        "[1]",
        "null",
        '"text"',
        "{",
        "{'a': 1}",
        '{"a": 1} {"b": 2}',
        '{"a":"' + "x" * JSON_MAX_CHARS + '"}',
        "",
        None,
        {"a": 1},
    ],
)
def test_what_is_no_json_object_is_none(text: object) -> None:
    found = parse_json_object(text)
    assert found is None or found == {"a": int("1" * 4000 + "1" * 1000)}  # Python before 3.11 reads long integers


def test_a_json_object_is_read() -> None:
    assert parse_json_object('{"a": {"b": [1, "\\ud800"]}}') == {"a": {"b": [1, "\ud800"]}}


@settings(deadline=None)
@given(JSON, st.lists(st.sampled_from("abc"), min_size=1, max_size=3))
def test_nothing_that_json_can_hold_breaks_the_access_to_it(value: object, path: list[str]) -> None:
    item = {"a": json.loads(json.dumps(value))}
    assert isinstance(object_at(item, *path), dict)
    assert all(isinstance(found, dict) for found in list_at(item, *path))
    assert isinstance(text_at(item, *path), (str, type(None)))


def test_what_is_there_is_found() -> None:
    item = {"a": {"b": [{"c": 1}, "x", None, {"d": 2}], "e": "text"}}
    assert object_at(item, "a") is item["a"]
    assert object_at(item) is item
    assert list_at(item, "a", "b") == [{"c": 1}, {"d": 2}]
    assert text_at(item, "a", "e") == "text"


def test_the_latest_time_leaves_out_unknown_ones() -> None:
    assert latest(None, "2026-01-01T00:00:00Z", None, "2026-01-02T00:00:00Z") == "2026-01-02T00:00:00Z"
    assert latest(None, None) is None
    assert latest() is None


def test_a_mistyped_word_brings_the_nearest_known_one() -> None:
    assert nearest("kubeconfg", ["name", "kubeconfig"]) == "did you mean 'kubeconfig'?"
    assert nearest("zzz", ["name", "kubeconfig"]) == "choose from kubeconfig, name"
