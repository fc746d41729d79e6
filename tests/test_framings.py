"""How requests come out of bytes, whole, byte by byte and split anywhere: JSON lines, HTTP, routes, parameters."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabrik_daemon import (
    REQUEST_MAX_BYTES,
    Cursor,
    FabrikError,
    FullAccess,
    HttpFraming,
    HttpRequest,
    HttpServerCodec,
    ProtocolError,
    RequestDecoder,
    UsageError,
    format_server_sent,
    framing_for,
    parse_cursor,
    request_from_http,
    takes_gzip,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

cuts = st.lists(st.integers(0, 3000), max_size=10)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
requests = st.dictionaries(st.text(max_size=8), values, max_size=4)


def split(data: bytes, at: list[int]) -> list[bytes]:
    """Return the data in pieces; none is empty, since that would mean the connection's end."""
    places = sorted({cut % (len(data) + 1) for cut in at} | {0, len(data)})
    return [data[start:end] for start, end in zip(places, places[1:])]


def decoded(pieces: Iterable[bytes]) -> list[object]:
    """Return the requests in some pieces, `None` for each that is none; the end comes behind them."""
    decoder = RequestDecoder()
    found: list[object] = []
    for piece in [*pieces, b""]:
        found += [None if isinstance(said, UsageError) else said for said in decoder.receive(piece)]
    return found


@settings(deadline=None)
@given(st.lists(requests, max_size=4), st.sampled_from(["\n", "\r\n", "", "  ", "\n\n"]), cuts)
def test_json_requests_are_the_same_wherever_they_are_cut(sent: list[Any], between: str, at: list[int]) -> None:
    data = "".join(json.dumps(one, ensure_ascii=False) + between for one in sent).encode("utf-8", "replace")
    wanted = [json.loads(json.dumps(one, ensure_ascii=False).encode("utf-8", "replace")) for one in sent]
    assert decoded([data] if data else []) == wanted
    assert decoded(split(data, at)) == wanted
    assert decoded(bytes([byte]) for byte in data) == wanted


@settings(deadline=None)
@given(st.binary(max_size=300), cuts)
def test_any_bytes_are_requests_or_errors(data: bytes, at: list[int]) -> None:
    """What is no JSON ends at its line's end, however it comes; nothing else is promised of it."""
    for pieces in ([data] if data else [], split(data, at), [bytes([byte]) for byte in data]):
        assert all(said is None or isinstance(said, dict) for said in decoded(pieces))


def test_a_request_that_is_too_long_is_an_error_at_once() -> None:
    decoder = RequestDecoder()
    for _ in range(REQUEST_MAX_BYTES // 1000):
        assert list(decoder.receive(b"[" * 1000)) == []
    with pytest.raises(ProtocolError):
        list(decoder.receive(b"[" * 1000))


POST: Final = b"POST /v1/query?limit=5 HTTP/1.1\r\nHost: a\r\nContent-Length: 15\r\n\r\n" + b'{"sql":"SELECT"}'[:15]
CHUNKED: Final = (
    b"POST /v1/ping HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'5\r\n{"id"\r\n4;x=y\r\n:17}\r\n0\r\nTrailer: x\r\n\r\n'
)
GET: Final = b"GET /v1/runs?cluster=a&cluster=b&status=x%20y HTTP/1.1\r\nHost: a\r\nX: 1\r\nx: 2\r\n\r\n"


def asked(pieces: Iterable[bytes]) -> list[HttpRequest]:
    """Return the requests in some pieces; each is answered before the next is looked at."""
    codec = HttpServerCodec()
    found: list[HttpRequest] = []

    def answer(some: Iterable[HttpRequest]) -> None:
        for http in some:
            found.append(http)
            assert codec.head(200, []).startswith(b"HTTP/1.1 200 ")
            codec.end()

    for piece in pieces:
        answer(codec.receive(piece))
        before = -1
        while before != len(found):
            before = len(found)
            answer(codec.next_requests())
    return found


@settings(deadline=None)
@given(st.lists(st.sampled_from([POST, CHUNKED, GET]), min_size=1, max_size=4), cuts)
def test_http_requests_are_the_same_wherever_they_are_cut(sent: list[bytes], at: list[int]) -> None:
    data = b"".join(sent)
    whole = asked([data])
    assert len(whole) == len(sent)
    assert asked(split(data, at)) == whole
    assert asked(bytes([byte]) for byte in data) == whole


def test_what_an_http_request_holds() -> None:
    (http,) = asked([GET])
    assert (http.method, http.path, http.body) == ("GET", "/v1/runs", b"")
    assert http.query == {"cluster": ["a", "b"], "status": ["x y"]}
    assert http.headers == {"host": "a", "x": "1, 2"}
    assert [one.body for one in asked([CHUNKED])] == [b'{"id":17}']


@settings(deadline=None)
@given(st.binary(max_size=300), cuts)
def test_any_bytes_are_http_or_an_error(data: bytes, at: list[int]) -> None:
    for pieces in ([data] if data else [], split(data, at), [bytes([byte]) for byte in data]):
        try:
            asked(pieces)
        except ProtocolError:
            continue


@settings(deadline=None)
@given(st.sampled_from([POST, CHUNKED, GET]), st.integers(0, 200), st.integers(0, 255), cuts)
def test_a_request_with_one_wrong_byte_is_one_or_none_wherever_it_is_cut(
    sent: bytes, place: int, byte: int, at: list[int]
) -> None:
    data = bytearray(sent)
    data[place % len(data)] = byte

    def outcome(pieces: Iterable[bytes]) -> object:
        try:
            return asked(pieces)
        except ProtocolError:
            return "refused"

    assert outcome(split(bytes(data), at)) == outcome([bytes(data)])


@pytest.mark.parametrize(
    ("data", "framing"),
    [(b"GET ", "HttpFraming"), (b"{", "LinesFraming"), (b"\n", "LinesFraming"), (b"\x16\x03", "LinesFraming")],
)
def test_the_first_byte_tells(data: bytes, framing: str) -> None:
    assert type(framing_for(data, FullAccess())).__name__ == framing


def request_of(target: str, method: str = "GET", body: bytes = b"", **headers: str) -> dict[str, Any]:
    (http,) = asked([f"{method} {target} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body])
    return request_from_http(http._replace(headers={name.replace("_", "-"): text for name, text in headers.items()}))


@pytest.mark.parametrize(
    ("target", "request_"),
    [
        ("/status", {"action": "status"}),
        ("/daemon/status/", {"action": "status"}),
        ("/v1/runs/abc%20d", {"action": "run", "runId": "abc d"}),
        ("/v1/runs?cluster=a&cluster=*", {"action": "runs", "clusters": ["a", "*"]}),
        (
            "/v1/volumes?phase=Bound&run_id=a&run_id=b",
            {"action": "volumes", "filter": {"phase": ["Bound"], "run_id": ["a", "b"]}},
        ),
        ("/v1/stream?snapshot&type=run:*", {"action": "subscribe", "snapshot": True, "filter": {"type": ["run:*"]}}),
        ("/v1/stream?snapshot=false&since=s:7", {"action": "subscribe", "snapshot": False, "since": "s:7"}),
        ("/v1/stream?includeHistory=10&id=7", {"action": "subscribe", "includeHistory": 10, "id": 7}),
        ("/v1/logs?follow=1&lines=3", {"action": "logs", "follow": True, "lines": 3}),
    ],
)
def test_routes_and_parameters(target: str, request_: dict[str, Any]) -> None:
    assert request_of(target) == request_


def test_an_event_source_goes_on_after_its_last_id() -> None:
    assert request_of("/v1/stream?since=s:1", last_event_id="s:9")["since"] == "s:9"
    assert "since" not in request_of("/v1/runs", last_event_id="s:9")


@pytest.mark.parametrize("target", ["/", "/v2/runs", "/v1", "/v1/runs/a?limt=5", "/v1/runs?runid=7"])
def test_what_is_no_route_or_parameter(target: str) -> None:
    with pytest.raises(FabrikError):
        request_of(target)


@pytest.mark.parametrize(
    ("said", "cursor"),
    [(None, None), ("s:7", Cursor("s", 7)), ("a:b:0", Cursor("a:b", 0)), ({"stream": "s", "seq": 0}, Cursor("s", 0))],
)
def test_cursors(said: object, cursor: Cursor | None) -> None:
    assert parse_cursor(said) == cursor


@pytest.mark.parametrize(
    "said", ["7", "s:", "s:x", 7, [], {}, {"stream": "s"}, {"stream": 1, "seq": 1}, {"stream": "s", "seq": 2**70}]
)
def test_what_is_no_cursor(said: object) -> None:
    with pytest.raises(UsageError, match="since must be a cursor"):
        parse_cursor(said)


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        ("gzip", True),
        ("br;q=1, gzip;q=0.1", True),
        ("x-gzip", True),
        ("", False),
        ("deflate", False),
        ("gzip;q=0", False),
        ("gzip; q=0.000", False),
        ("*", False),
    ],
)
def test_who_takes_gzip(header: str, taken: bool) -> None:
    assert takes_gzip(HttpRequest("GET", "/", {}, {"accept-encoding": header}, b"")) == taken


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        (b'{"type":"run:added","seq":7}\n', b'id: s:7\ndata: {"type":"run:added","seq":7}\n\n'),
        (b'{"type":"warning","seq":8}\n', b'id: s:8\ndata: {"type":"warning","seq":8}\n\n'),
        (b'{"type":"seq","seq":9}\n', b'id: s:9\ndata: {"type":"seq","seq":9}\n\n'),
        (b'{"type":"subscribed","stream":"s","seq":9}\n', b'data: {"type":"subscribed","stream":"s","seq":9}\n\n'),
        (b'{"type":"snapshot","seq":9,"last":false}\n', b'data: {"type":"snapshot","seq":9,"last":false}\n\n'),
        (b'{"type":"lagged","dropped":1}\n', b'data: {"type":"lagged","dropped":1}\n\n'),
    ],
)
def test_server_sent_events(line: bytes, sent: bytes) -> None:
    assert format_server_sent(line, "s") == sent


def test_a_refusal_is_a_whole_response() -> None:
    framing = HttpFraming(FullAccess())
    told = framing.refuse(UsageError("no", "yes"))
    head, _, body = told.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert json.loads(body)["hint"] == "yes"
