from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from fakes import RECORDINGS
from hypothesis import given, settings
from hypothesis import strategies as st

import fabrik_daemon
from fabrik_daemon import (
    PODS,
    HttpClientCodec,
    LineDecoder,
    ListDecoder,
    PodFacts,
    PodLineDecoder,
    ProtocolError,
    Refusal,
    ResponseHead,
    WatchEvent,
    cut_report,
    facts_from,
    parse_json,
    refusal_from_response,
    refusal_from_status,
    slim_line,
)

JsonObject = dict[str, Any]
LISTS = sorted(
    path
    for path in RECORDINGS.glob("*/list-*.http")
    if path.read_bytes().startswith(b"HTTP/1.1 200") and path.name != "list-jobs-metadata-only.http"
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
ITEMS = st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=4), max_size=5)
CUTS = st.lists(st.integers(0, 10_000), max_size=12)


def response(path: Any) -> tuple[ResponseHead, bytes]:
    codec = HttpClientCodec("a")
    codec.send_get("/", {}, compressed=True)
    head, *parts = codec.receive(path.read_bytes())
    assert isinstance(head, ResponseHead)
    return head, b"".join(part for part in parts if isinstance(part, bytes))


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in zip(places, places[1:])]


def decode_list(*pieces: bytes) -> tuple[list[JsonObject], ListDecoder]:
    decoder = ListDecoder()
    items = [item for piece in pieces for item in decoder.receive(piece)]
    return items + list(decoder.receive(b"", last=True)), decoder


# Lines


@settings(deadline=None)
@given(ITEMS, CUTS, st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
def test_a_watch_tells_the_same_events_wherever_it_is_cut(items: list[JsonObject], cuts: list[int], end: bytes) -> None:
    lines = [json.dumps({"type": "ADDED", "object": item}).encode() for item in items]
    decoder = LineDecoder("pods")
    pieces = split(b"".join(line + end for line in lines), cuts)
    found = [event for piece in pieces for event in decoder.receive(piece)]
    assert found == [WatchEvent("ADDED", item) for item in items]


def test_an_unfinished_line_is_no_event() -> None:
    decoder = LineDecoder("pods")
    line = b'{"type":"ADDED","object":{}}'
    assert list(decoder.receive(line)) == []
    assert list(decoder.receive(b"\n" + line[:5])) == [WatchEvent("ADDED", {})]
    assert list(decoder.receive(line[5:] + b"\n")) == [WatchEvent("ADDED", {})]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"null",
        b"5",
        b"{}",
        b'{"type":"ADDED"}',
        b'{"object":{}}',
        b'{"type":5,"object":{}}',
        b'{"type":"ADDED","object":[]}',
        b'{"type":"ADDED","object":null}',
        b'{"type":"ADDED","object":{}}{}',
        b"[" * 5000,
        b'{"type":"ADDED","object":' + b'{"a":' * 5000,
        b"\xff\xfe",
    ],
)
def test_a_line_that_is_no_event_is_an_error(line: bytes) -> None:
    with pytest.raises(ProtocolError, match="no watch event"):
        list(LineDecoder("pods").receive(line + b"\n"))


def test_text_that_is_no_utf_8_is_replaced() -> None:
    (event,) = LineDecoder("pods").receive(b'{"type":"ADDED","object":{"a":"\xff\xed\xa0\x80"}}\n')
    event.object["a"].encode()


def test_a_lone_surrogate_in_an_event_does_not_reach_the_facts() -> None:
    text = (
        '{"type":"ADDED","object":{"metadata":{"name":"data-fabrik-\\ud800","labels":{"fabrik.dev/run-id":"\\udfff"}}}}'
    )
    (event,) = LineDecoder("pods").receive(text.encode() + b"\n")
    facts = facts_from("persistentvolumeclaims", event.object)
    assert facts is not None
    assert (facts.name, facts.id) == ("data-fabrik-?", "?")


def test_a_line_without_an_end_is_an_error_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fabrik_daemon, "ITEM_MAX_BYTES", 1000)
    decoder = LineDecoder("pods")
    assert list(decoder.receive(b"x" * 1000)) == []
    with pytest.raises(ProtocolError, match="over 1000 bytes"):
        list(decoder.receive(b"x"))


def test_many_lines_are_no_long_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fabrik_daemon, "ITEM_MAX_BYTES", 100)
    decoder = LineDecoder("pods")
    for _ in range(20):
        assert list(decoder.receive(b'{"type":"ADDED",')) == []
        assert list(decoder.receive(b'"object":{}}\n')) == [WatchEvent("ADDED", {})]


@pytest.mark.parametrize(
    ("item", "version"),
    [
        ({"metadata": {"resourceVersion": "17"}}, "17"),
        ({"metadata": {"resourceVersion": "a b"}}, "a b"),
        ({"metadata": {"resourceVersion": 17}}, ""),
        ({"metadata": {}}, ""),
        ({"metadata": None}, ""),
        ({}, ""),
    ],
)
def test_an_event_s_resource_version_is_opaque_text(item: JsonObject, version: str) -> None:
    assert WatchEvent("ADDED", item).resource_version == version


@pytest.mark.parametrize("size", [1000, 2048, 1 << 20])
def test_every_recorded_watch_tells_the_events_that_were_written_down(size: int) -> None:
    recorded = sorted(RECORDINGS.glob("*/watch-*.jsonl"))
    assert len(recorded) > 50
    for lines in recorded:
        _, body = response(lines.with_suffix(".http"))
        decoder = LineDecoder("pods" if "pods" in lines.name else "jobs")
        events = [event for at in range(0, len(body), size) for event in decoder.receive(body[at : at + size])]
        expected = [json.loads(line)["event"] for line in lines.read_text("utf-8").splitlines()]
        for event, whole in zip(events, expected):
            event.object.get("metadata", {}).pop("managedFields", None)
            if "pods" in lines.name and "spec" not in event.object:
                whole["object"].pop("spec", None)
        assert [{"type": event.type, "object": event.object} for event in events] == expected, lines


# Lists


@settings(deadline=None)
@given(ITEMS, CUTS, st.booleans(), st.sampled_from([None, 1]))
def test_a_list_has_the_same_items_wherever_it_is_cut(
    items: list[JsonObject], cuts: list[int], ascii_only: bool, indent: int | None
) -> None:
    whole = {"kind": "JobList", "metadata": {"resourceVersion": "7", "continue": "c"}, "items": items, "more": [1, {}]}
    text = json.dumps(whole, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "replace")
    found, decoder = decode_list(*split(text, cuts))
    assert found == json.loads(text)["items"]
    assert (decoder.resource_version, decoder.continue_token) == ("7", "c")


@given(ITEMS, st.data())
@settings(deadline=None, max_examples=50)
def test_a_list_that_is_cut_off_anywhere_is_an_error(items: list[JsonObject], data: st.DataObject) -> None:
    text = json.dumps({"metadata": {"resourceVersion": "7"}, "items": items}).encode()
    end = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(ProtocolError):
        decode_list(text[:end])
    with pytest.raises(ProtocolError):
        decode_list(*split(text[:end], [end // 2, end // 3]))


def test_items_come_as_soon_as_they_are_whole() -> None:
    decoder = ListDecoder()
    assert list(decoder.receive(b'{"items":[{"a":1}')) == []  # what follows it might belong to it
    assert list(decoder.receive(b",")) == [{"a": 1}]
    assert list(decoder.receive(b'{"b":2},{"c"')) == [{"b": 2}]
    assert list(decoder.receive(b":3}]}")) == [{"c": 3}]
    assert list(decoder.receive(b"", last=True)) == []


def test_the_metadata_may_come_last() -> None:
    items, decoder = decode_list(b'{"items":[{"a":1}],"metadata":{"resourceVersion":"9"}}\n')
    assert (items, decoder.resource_version, decoder.continue_token) == ([{"a": 1}], "9", "")


@pytest.mark.parametrize("items", ["null", "[]", "[ ]"])
def test_an_empty_list_has_no_items(items: str) -> None:
    found, decoder = decode_list(b'{"metadata":{"resourceVersion":"5"},"items":%s}' % items.encode())
    assert (found, decoder.resource_version) == ([], "5")


@pytest.mark.parametrize("metadata", ["null", "[]", '{"resourceVersion":5,"continue":null}', "{}"])
def test_a_list_without_a_usable_version_has_none(metadata: str) -> None:
    _, decoder = decode_list(b'{"metadata":%s,"items":[]}' % metadata.encode())
    assert (decoder.resource_version, decoder.continue_token) == ("", "")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b'"text"',
        b"hello",
        b"<html></html>",
        b'{"items":[1]}',
        b'{"items":[[]]}',
        b'{"items":["a"]}',
        b'{"items":[{}',
        b'{"items":[{}]',
        b'{"items":[nonsense]}',
        b'{"items" 5}',
        b"{5:6}",
        b'{"items":[' + b"[" * 5000,
        b'{"a":' + b'{"a":' * 5000,
    ],
)
def test_what_is_no_list_is_an_error(text: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_list(text)


@settings(deadline=None)
@given(st.binary(max_size=60), CUTS)
def test_any_bytes_are_a_list_or_an_error(data: bytes, cuts: list[int]) -> None:
    try:
        items, _ = decode_list(*split(data, cuts))
    except ProtocolError:
        return
    assert all(isinstance(item, dict) for item in items)


@pytest.mark.parametrize("piece", [2048, 100_000, 10 << 20])
def test_an_item_of_3_mb_is_read(piece: int) -> None:
    big = {"metadata": {"name": "a", "annotations": {"x": "\\\u00e9" * 1_000_000}}}
    text = json.dumps({"metadata": {}, "items": [{"b": 1}, big, {"c": 2}]}, ensure_ascii=False).encode()
    items, _ = decode_list(*(text[at : at + piece] for at in range(0, len(text), piece)))
    assert items == [{"b": 1}, big, {"c": 2}]


def test_an_item_without_an_end_is_an_error_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fabrik_daemon, "ITEM_MAX_BYTES", 200_000)
    decoder = ListDecoder()
    list(decoder.receive(b'{"items":[{"a":"'))
    pieces = (item for _ in range(100) for item in decoder.receive(b"x" * 10_000))
    with pytest.raises(ProtocolError, match="over 200000 bytes"):
        list(pieces)


def test_a_lone_surrogate_in_a_list_is_kept_for_the_projection() -> None:
    items, _ = decode_list(b'{"items":[{"a":"\\ud800"},{"b":"\xed\xa0\x80"}]}')
    assert items[0] == {"a": "\ud800"}
    items[1]["b"].encode()


@pytest.mark.parametrize("path", LISTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recorded_list_has_the_items_that_json_finds(path: Any) -> None:
    _, body = response(path)
    whole = json.loads(body)
    for size in (len(body), 2048, 777):
        items, decoder = decode_list(*(body[at : at + size] for at in range(0, len(body), size)))
        assert items == (whole["items"] or [])
        assert decoder.resource_version == whole["metadata"]["resourceVersion"]
        assert decoder.continue_token == whole["metadata"].get("continue", "")


# Refusals


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("list-jobs-401-bad-token", Refusal(401, "Unauthorized")),
        ("watch-pods-401-bad-token", Refusal(401, "Unauthorized")),
        ("list-jobs-429", Refusal(429, "Too many requests, please try again later.", 1.0)),
        ("watch-jobs-429", Refusal(429, "Too many requests, please try again later.", 1.0)),
        ("list-jobs-store-down", Refusal(504, "Timeout: request did not complete within the allotted timeout")),
        ("get-404-wrong-root", Refusal(404, "404 page not found")),
    ],
)
def test_a_recorded_refusal_says_what_it_says(name: str, refusal: Refusal) -> None:
    assert refusal_from_response(*response(RECORDINGS / "15-refusals" / f"{name}.http")) == refusal


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("list-jobs-403-no-role", 'cannot list resource "jobs" in API group "batch" in the namespace "fabrik-runs"'),
        ("list-pods-403-cluster-scope", 'cannot list resource "pods" in API group "" at the cluster scope'),
        ("list-jobs-403-anonymous", 'User "system:anonymous" cannot list'),
        ("watch-pods-403-no-role", 'cannot watch resource "pods"'),
        ("list-jobs-403-revoked", 'cannot list resource "jobs"'),
    ],
)
def test_a_recorded_403_says_which_right_is_missing(name: str, said: str) -> None:
    refusal = refusal_from_response(*response(RECORDINGS / "15-refusals" / f"{name}.http"))
    assert (refusal.code, refusal.is_expired, refusal.retry_after_s) == (403, False, None)
    assert said in refusal.message


def test_both_recorded_forms_of_an_expired_version_are_told_apart_from_others() -> None:
    _, body = response(RECORDINGS / "14-watch-protocol" / "watch-pods-stale-rv.http")
    (event,) = LineDecoder("pods").receive(body)
    assert refusal_from_status(500, event.object).is_expired
    for path in ("14-watch-protocol/list-pods-stale-exact.http", "13-pagination/list-jobs-page2-expired.http"):
        assert refusal_from_response(*response(RECORDINGS / path)).is_expired
    too_large = refusal_from_response(*response(RECORDINGS / "14-watch-protocol" / "list-jobs-rv-too-large.http"))
    assert (too_large.code, too_large.retry_after_s, too_large.is_expired) == (504, 1.0, False)


@pytest.mark.parametrize(
    ("headers", "body", "refusal"),
    [
        ({}, b"", Refusal(502, "HTTP 502")),
        ({}, b"<html>\n  bad   gateway</html>", Refusal(502, "<html> bad gateway</html>")),
        ({}, b"x" * 300, Refusal(502, "x" * 200)),
        ({}, b'{"status":"Failure","reason":"Why","code":410}', Refusal(502, "Why")),
        ({}, b'{"message":"m","details":{"retryAfterSeconds":7}}', Refusal(502, "m", 7.0)),
        ({"retry-after": "3"}, b'{"message":"m","details":{"retryAfterSeconds":7}}', Refusal(502, "m", 3.0)),
        ({"retry-after": "999999"}, b"", Refusal(502, "HTTP 502", 3600.0)),
        ({"retry-after": "Mon, 23 Nov 2026 12:00:00 GMT"}, b"", Refusal(502, "HTTP 502")),
        ({"retry-after": "-1"}, b"", Refusal(502, "HTTP 502")),
        ({}, b"[" * 5000, Refusal(502, "[" * 200)),
        ({}, b"\xff\xfe", Refusal(502, "\ufffd\ufffd")),
    ],
)
def test_any_refusal_says_something(headers: dict[str, str], body: bytes, refusal: Refusal) -> None:
    assert refusal_from_response(ResponseHead(502, headers), body) == refusal


def test_an_error_event_says_its_own_code() -> None:
    assert refusal_from_status(500, {"code": 410, "reason": "Expired"}) == Refusal(410, "Expired")
    assert refusal_from_status(500, {}) == Refusal(500, "HTTP 500")
    assert refusal_from_status(500, {"code": "x", "message": 5, "details": []}) == Refusal(500, "HTTP 500")


# What is left out before a line is parsed


NASTY = st.sampled_from(
    (
        ',"managedFields":[',
        ']},"spec":{',
        ',"status":{',
        '},"spec":{"a":1},"status":{"phase":"Failed"',
        "]",
        "[{",
        '\\"',
        "\\",
        '"',
        "\u2028",
    )
)
NAMES_OF_MEMBERS = st.sampled_from(("name", "metadata", "spec", "status", "object", "type"))  # of all but managedFields
HOSTILE = st.lists(NASTY | st.text(max_size=5), max_size=6).map("".join)
MEMBERS = st.recursive(
    st.none() | st.booleans() | st.integers() | HOSTILE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HOSTILE | NAMES_OF_MEMBERS, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def pods(draw: st.DrawFn) -> JsonObject:
    """A pod as no API server would write it: members in any order, with any values."""
    metadata = {
        "name": draw(HOSTILE),
        "annotations": draw(st.dictionaries(HOSTILE, HOSTILE, max_size=3)),
        "ownerReferences": draw(st.lists(st.dictionaries(NAMES_OF_MEMBERS, MEMBERS, max_size=3), max_size=2)),
        "managedFields": draw(st.lists(MEMBERS, max_size=2)),
    }
    members = {
        "metadata": shuffled(draw, metadata),
        "spec": draw(MEMBERS),
        "status": draw(MEMBERS),
        "extra": draw(MEMBERS),
    }
    return shuffled(draw, members)


def shuffled(draw: st.DrawFn, members: JsonObject) -> JsonObject:
    names = draw(st.permutations(sorted(members)))
    return {name: members[name] for name in names[: draw(st.integers(2, len(names)))]}


@settings(max_examples=300, deadline=None)
@given(pods(), st.sampled_from(("pods", "jobs")), st.booleans(), st.booleans())
def test_leaving_members_out_before_parsing_changes_no_other(
    pod: JsonObject, resource_name: str, ascii_only: bool, compact: bool
) -> None:
    separators = (",", ":") if compact else (", ", ": ")
    line = json.dumps({"type": "ADDED", "object": pod}, ensure_ascii=ascii_only, separators=separators).encode()
    (event,) = LineDecoder(resource_name).receive(line + b"\n")
    expected = json.loads(line)["object"]
    if isinstance(expected.get("metadata"), dict) and "managedFields" not in event.object.get("metadata", {}):
        expected["metadata"].pop("managedFields", None)
    for member in ("spec", "extra") if resource_name == "pods" else ():
        if member not in event.object:
            expected.pop(member, None)
    assert event.object == expected


@pytest.mark.parametrize("resource_name", ["pods", "jobs", "cronjobs", "persistentvolumeclaims", "events"])
def test_the_lines_of_a_real_server_lose_their_managed_fields_unparsed(resource_name: str) -> None:
    for recorded in sorted(RECORDINGS.glob(f"*/watch-{resource_name}*.http")):
        for line in response(recorded)[1].splitlines():
            parsed = parse_json(line.decode("utf-8", "replace"))
            if parsed is None or "managedFields" not in line.decode("utf-8", "replace"):
                continue
            keeps_spec = resource_name != "pods"
            slim = slim_line(line, keeps_spec=keeps_spec)
            shape_is_met = b'},"spec":{' in line and (keeps_spec or b',"status":{' in line)
            assert (slim is not None) == shape_is_met, line
            if slim is not None:
                del parsed["object"]["metadata"]["managedFields"]
                if not keeps_spec:
                    del parsed["object"]["spec"]
                assert json.loads(slim) == parsed


# Pods whose report alone is new


@functools.cache
def recorded_lines() -> list[bytes]:
    """Return every whole event of a Pod that was recorded, in its order."""
    recorded = sorted(RECORDINGS.glob("*/watch-pods*.http"))
    lines = [line for path in recorded for line in response(path)[1].splitlines()]
    return [line for line in lines if line.startswith(b'{"type":"') and line.endswith(b"}}}")]


@functools.cache
def recorded_running() -> bytes:
    return next(line for line in recorded_lines() if b'"phase":"Running"' in line and cut_report(line))


def running_line(annotations: JsonObject, **also: Any) -> bytes:
    """Return an event of a running Pod as an API server writes it, with such annotations and members of metadata."""
    event = json.loads(recorded_running())
    metadata = event["object"]["metadata"]
    members = {**metadata, **also, "annotations": annotations, "managedFields": metadata["managedFields"]}
    order = [*(name for name in metadata if name not in ("managedFields", "annotations")), "annotations"]
    order = [name for name in order if name not in ("ownerReferences", "finalizers")]
    order += ["ownerReferences", "finalizers", "managedFields"]
    event["object"]["metadata"] = {name: members[name] for name in order if name in members}
    return json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")


def told(decoder: LineDecoder, line: bytes) -> tuple[str, tuple[str, str], str, Any]:
    """Return what a line tells through a decoder: type, names, version and facts."""
    (event,) = decoder.receive(line + b"\n")
    return event.type, event.name, event.resource_version, event.project(PODS.name)


def test_the_lines_of_a_real_server_tell_the_same_whether_the_pod_is_known() -> None:
    decoder, lines = PodLineDecoder(), recorded_lines()
    assert sum(cut_report(line) is not None for line in lines) > len(lines) / 2
    for line in [*lines, *lines]:
        (event,) = LineDecoder("jobs").receive(line + b"\n")  # whose spec is kept
        expected = event.type, event.name, event.resource_version, event.project(PODS.name)
        assert told(decoder, line) == expected, line


REPORTS = st.dictionaries(
    st.sampled_from(["phase", "task", "progress", "status", "attempt", "updated", "reason"]).map("fabrik.dev/".__add__)
    | st.sampled_from(['},"ownerReferences":[', ',"annotations":{', "x"]),
    st.sampled_from(
        ['{"finished":1,"total":2}', '{"phase":"gate"}', "3", "2026-02-16T20:00:00Z", "", "\\", '"', "}", "{", "},"]
    )
    | st.text(max_size=5)
    | HOSTILE,
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(REPORTS, st.sampled_from(["7", "80", "a", "1-2", "\\", "ü"])), min_size=1, max_size=6))
def test_a_report_alone_tells_the_same_as_the_whole_line(reports: list[tuple[JsonObject, str]]) -> None:
    decoder = PodLineDecoder()
    for report, version in reports:
        line = running_line(report, resourceVersion=version)
        assert told(decoder, line) == told(LineDecoder("pods"), line), line


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"phase":"Running"', b'"phase":"Failed"'),
        (b'"fabrik.dev/phase":"', b'"fabrik.dev/phase":"x'),
        (b'"restartCount":0', b'"restartCount":1'),
        (b'"type":"MODIFIED"', b'"type":"DELETED"'),
        (b'"uid":"', b'"uid":"0'),
        (b'"generation":1', b'"generation":1,"deletionTimestamp":"2026-02-16T20:00:00Z"'),
    ],
)
def test_what_is_new_besides_the_report_is_seen(before: bytes, after: bytes) -> None:
    decoder, line = PodLineDecoder(), running_line({"fabrik.dev/task": "1:a"})
    changed = line.replace(before, after)
    assert changed != line
    for each in (line, changed, line):
        assert told(decoder, each) == told(LineDecoder("pods"), each)


def test_annotations_that_are_no_json_are_no_event_also_of_a_pod_that_is_known() -> None:
    decoder, line = PodLineDecoder(), running_line({"fabrik.dev/task": "1:a"})
    told(decoder, line)
    with pytest.raises(ProtocolError, match="no watch event"):
        told(decoder, line.replace(b'"1:a"', b'"1:a'))


def test_only_what_is_new_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = PodLineDecoder()
    told(decoder, running_line({"fabrik.dev/task": "1:a"}))
    monkeypatch.setattr(LineDecoder, "_event", None)
    facts = told(decoder, running_line({"fabrik.dev/task": "2:b"}, resourceVersion="99"))[3]
    assert isinstance(facts, PodFacts)
    assert facts.report.task == "2:b"


def test_pods_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fabrik_daemon, "PODS_REMEMBERED", 3)
    decoder = PodLineDecoder()
    for number in range(10):
        told(decoder, running_line({}, uid=f"uid-{number}"))
        assert len(decoder._known) <= 3


def test_a_sidecar_is_found_in_a_line_as_a_real_server_writes_it() -> None:
    sidecar = b'"containers":[{"name":"smithers-sidecar","ports":[{"containerPort":8080}]},'
    line = running_line({"fabrik.dev/task": "1:a"}).replace(b'"containers":[', sidecar, 1)
    decoder = PodLineDecoder()
    assert [told(decoder, each)[3].sidecar_port for each in (line, line)] == [8080, 8080]
