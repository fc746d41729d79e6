from __future__ import annotations

import gzip

import pytest
from fakes import RECORDINGS
from hypothesis import given, settings
from hypothesis import strategies as st

from fabrik_daemon import HEADERS_MAX_BYTES, READ_BYTES, HttpClientCodec, ProtocolError, ResponseEnd, ResponseHead

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 11\r\n\r\nhello\nworld"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nhello\n\r\n5;x=y\r\nworld\r\n0\r\n\r\n"
UNTIL_END = b"HTTP/1.0 200 OK\r\n\r\nhello\nworld"
GZIPPED = gzip.compress(b"hello\nworld")
COMPRESSED = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s" % (len(GZIPPED), GZIPPED)


def codec() -> HttpClientCodec:
    made = HttpClientCodec("k3s.example:6443")
    made.send_get("/", {}, compressed=False)
    return made


def read(made: HttpClientCodec, *pieces: bytes) -> tuple[list[ResponseHead], bytes, list[ResponseEnd]]:
    parts = [part for piece in pieces for part in made.receive(piece)]
    heads = [part for part in parts if isinstance(part, ResponseHead)]
    ends = [part for part in parts if isinstance(part, ResponseEnd)]
    return heads, b"".join(part for part in parts if isinstance(part, bytes)), ends


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    """Return the data in pieces; none is empty, since that would mean the connection's end."""
    places = sorted({cut % len(data) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in zip(places, places[1:])]


def test_a_request_is_a_get_and_says_where_to() -> None:
    made = HttpClientCodec("k3s.example:6443")
    sent = made.send_get(
        "/api/v1/pods?limit=500", {"Authorization": "Bearer t", "Accept": "application/json"}, compressed=True
    )
    assert sent.startswith(b"GET /api/v1/pods?limit=500 HTTP/1.1\r\nHost: k3s.example:6443\r\n")
    assert b"\r\nAuthorization: Bearer t\r\n" in sent
    assert b"\r\nAccept-Encoding: gzip\r\n" in sent
    assert sent.endswith(b"\r\n\r\n")
    assert b"Accept-Encoding" not in HttpClientCodec("a").send_get("/", {}, compressed=False)


@pytest.mark.parametrize("target", ["/a b", "/a\r\nX: y", "/\x00"])
def test_a_target_that_would_break_out_of_its_line_is_not_sent(target: str) -> None:
    with pytest.raises(ProtocolError):
        HttpClientCodec("a").send_get(target, {}, compressed=False)


def test_a_second_request_waits_for_the_first_s_end() -> None:
    made = codec()
    with pytest.raises(ProtocolError):
        made.send_get("/", {}, compressed=False)
    read(made, CHUNKED)
    assert made.send_get("/next", {}, compressed=False).startswith(b"GET /next ")
    assert read(made, PLAIN)[1] == b"hello\nworld"


@pytest.mark.parametrize("response", [PLAIN, CHUNKED, COMPRESSED], ids=["length", "chunked", "gzip"])
@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 500), max_size=8))
def test_a_response_is_the_same_wherever_it_is_cut(response: bytes, cuts: list[int]) -> None:
    heads, body, ends = read(codec(), *split(response, cuts))
    assert [head.status for head in heads] == [200]
    assert body == b"hello\nworld"
    assert ends == [ResponseEnd(reusable=True)]


def test_a_response_byte_by_byte() -> None:
    assert read(codec(), *(bytes([byte]) for byte in CHUNKED))[1:] == (b"hello\nworld", [ResponseEnd(reusable=True)])


@pytest.mark.parametrize("end", range(1, len(CHUNKED)))
def test_a_chunked_body_that_is_cut_off_anywhere_is_an_error(end: int) -> None:
    made = codec()
    _, body, ends = read(made, CHUNKED[:end])
    assert ends == []
    assert b"hello\nworld".startswith(body)
    with pytest.raises(ProtocolError, match="broke off"):
        list(made.receive(b""))


def test_a_body_shorter_than_its_length_is_an_error() -> None:
    made = codec()
    read(made, PLAIN[:-1])
    with pytest.raises(ProtocolError, match="broke off"):
        list(made.receive(b""))


def test_an_end_between_responses_is_none() -> None:
    made = codec()
    read(made, PLAIN)
    assert list(made.receive(b"")) == []


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    made = codec()
    assert read(made, UNTIL_END)[1:] == (b"hello\nworld", [])
    assert list(made.receive(b"")) == [ResponseEnd(reusable=False)]


def test_a_server_that_closes_is_not_asked_again() -> None:
    made = codec()
    closing = PLAIN.replace(b"Content-Type", b"Connection: close\r\nContent-Type")
    assert read(made, closing)[2] == [ResponseEnd(reusable=False)]
    with pytest.raises(ProtocolError):
        made.send_get("/", {}, compressed=False)


def test_header_names_are_in_lower_case() -> None:
    (head,), _, _ = read(codec(), PLAIN.replace(b"Content-Type", b"RETRY-AFTER"))
    assert head.headers["retry-after"] == "application/json"


def test_an_interim_response_is_passed_over() -> None:
    heads, body, _ = read(codec(), b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + PLAIN)
    assert [head.status for head in heads] == [200]
    assert body == b"hello\nworld"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno header\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * (HEADERS_MAX_BYTES + 1),
    ],
)
def test_bytes_that_are_no_response_are_an_error(data: bytes) -> None:
    with pytest.raises(ProtocolError) as raised:
        list(codec().receive(data))
    assert raised.value.exit_code == 5


def test_an_encoding_that_was_not_asked_for_is_an_error() -> None:
    with pytest.raises(ProtocolError, match="'br'"):
        list(codec().receive(COMPRESSED.replace(b"gzip", b"br", 1)))


def test_damaged_compression_is_an_error() -> None:
    with pytest.raises(ProtocolError, match="damaged"):
        list(codec().receive(COMPRESSED.replace(GZIPPED, b"x" * len(GZIPPED))))


@pytest.mark.parametrize("size", [READ_BYTES - 1, READ_BYTES, READ_BYTES + 1, 3 * READ_BYTES, 40 * READ_BYTES + 7])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_few_compressed_bytes_that_say_much_say_it_piece_by_piece(size: int, is_chunked: bool) -> None:
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    packed = gzip.compress(body)
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n"
    if is_chunked:
        data = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(packed), packed)
    else:
        data = head + b"Content-Length: %d\r\n\r\n%s" % (len(packed), packed)
    _head, *pieces, end = codec().receive(data)
    assert isinstance(end, ResponseEnd)
    assert b"".join(piece for piece in pieces if isinstance(piece, bytes)) == body
    assert max(len(piece) for piece in pieces if isinstance(piece, bytes)) <= READ_BYTES


def test_the_next_response_may_be_uncompressed() -> None:
    made = codec()
    read(made, COMPRESSED)
    made.send_get("/", {}, compressed=True)
    assert read(made, PLAIN)[1] == b"hello\nworld"


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_response_or_an_error(data: bytes) -> None:
    made = codec()
    try:
        read(made, *split(data, [7]) if data else [], b"")
    except ProtocolError:
        return


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_a_recorded_gzip_list_is_the_same_in_pieces(size: int) -> None:
    recorded = (RECORDINGS / "15-refusals" / "list-jobs-gzip.http").read_bytes()
    (head,), body, ends = read(codec(), recorded)
    assert head.headers["content-encoding"] == "gzip"
    assert body.startswith(b'{"kind":"JobList"')
    assert len(body) > 128 * 1024
    assert len(ends) == 1
    assert read(codec(), *(recorded[at : at + size] for at in range(0, len(recorded), size)))[1] == body


@pytest.mark.parametrize("name", ["watch-jobs-killed", "watch-pods-killed-mid-chunk", "watch-cronjobs-killed-idle"])
def test_a_recorded_stream_of_a_killed_server_is_an_error(name: str) -> None:
    made = codec()
    (head,), _, ends = read(made, (RECORDINGS / "14-watch-protocol" / f"{name}.http").read_bytes())
    assert (head.status, ends) == (200, [])
    with pytest.raises(ProtocolError, match="broke off"):
        list(made.receive(b""))


@pytest.mark.parametrize("name", ["watch-pods-timeout8", "watch-pods-stale-rv", "watch-pods-graceful-shutdown"])
def test_a_recorded_stream_that_ended_cleanly_ends(name: str) -> None:
    _, _, ends = read(codec(), (RECORDINGS / "14-watch-protocol" / f"{name}.http").read_bytes())
    assert len(ends) == 1
