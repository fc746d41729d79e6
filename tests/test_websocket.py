"""WebSocket: the codec over wsproto, and the daemon's /v1/stream spoken to by websocket-client."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest
import websocket
import wsproto
from clients import ANSWER_S, WebSocketClient, http_request
from fabrik_objects import run_id
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import World, made_world, report

from fabrik_daemon import REQUEST_MAX_BYTES, HttpRequest, UsageError, WebSocketCodec, accept_websocket

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from fakes import Authority


@pytest.fixture(scope="module")
def world(
    authority: Authority, executable: Path, unpacked: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    with made_world(authority, executable, unpacked, tmp_path_factory.mktemp("world")) as made:
        yield made


def test_changes_arrive(world: World) -> None:
    with WebSocketClient(world.socket) as client:
        assert client.ask("subscribe", clusters=["prod"], id=1)["type"] == "subscribed"
        report(5, 60, server=world.prod)
        event = client.message()
        assert (event["type"], event["runId"], event["progress"]["finished"]) == ("run:updated", run_id(5), 60)


def test_a_ping_is_answered(world: World) -> None:
    with WebSocketClient(world.socket) as client:
        client.connection.ping("are you there")
        frame = client.connection.recv_frame()
        assert (frame.opcode, frame.data) == (websocket.ABNF.OPCODE_PONG, b"are you there")


def test_what_is_no_json_gets_an_error_and_the_connection_goes_on(world: World) -> None:
    with WebSocketClient(world.socket) as client:
        client.connection.send("nonsense")
        assert client.message()["type"] == "error"
        assert client.ask("ping") == {"type": "ping"}


def test_a_close_is_answered_and_the_connection_ends(world: World) -> None:
    with WebSocketClient(world.socket) as client:
        client.connection.send_close(4000, b"enough")
        frame = client.connection.recv_frame()
        assert (frame.opcode, frame.data[:2]) == (websocket.ABNF.OPCODE_CLOSE, (4000).to_bytes(2, "big"))
        assert client.socket.recv(1) == b""


def test_binary_messages_are_refused(world: World) -> None:
    with WebSocketClient(world.socket) as client:
        client.connection.send_binary(b"{}")
        frame = client.connection.recv_frame()
        assert (frame.opcode, frame.data[:2]) == (websocket.ABNF.OPCODE_CLOSE, (1003).to_bytes(2, "big"))
        assert client.socket.recv(1) == b""


def test_our_subprotocol_is_chosen_and_no_other(world: World) -> None:
    with WebSocketClient(world.socket, subprotocols=("fabrik.bearer.c2VjcmV0", "fabrik.v1")) as client:
        assert client.connection.getsubprotocol() == "fabrik.v1"
    with pytest.raises(websocket.WebSocketException, match="Header"):  # which wants one of its own in the answer
        WebSocketClient(world.socket, subprotocols=("fabrik.bearer.c2VjcmV0",))


@pytest.mark.parametrize("target", ["/status", "/v1/runs", "/nothing"])
def test_there_is_one_route(world: World, target: str) -> None:
    with pytest.raises(websocket.WebSocketBadStatusException) as raised:
        WebSocketClient(world.socket, target=target)
    assert raised.value.status_code in {400, 404}
    assert http_request(world.socket, "/status").status == 200


def test_a_query_string_subscribes_at_once(world: World) -> None:
    with WebSocketClient(world.socket, target="/v1/stream?cluster=prod&type=run:*") as client:
        assert client.message()["type"] == "subscribed"
        report(5, 61, server=world.prod)
        assert client.message()["progress"]["finished"] == 61


RAW_HANDSHAKE: Final = (
    b"GET /v1/stream HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.mark.parametrize("before", [b"", b"GET /v1/ping HTTP/1.1\r\nHost: a\r\n\r\n"], ids=["first", "after HTTP"])
def test_a_request_right_behind_the_handshake(world: World, before: bytes) -> None:
    with world.connect() as client:
        client.send(before + RAW_HANDSHAKE + bytes(Frame(TEXT, b'{"action":"ping","id":7}')) + bytes(close(1000)))
        answer = client.rest()
    assert b"HTTP/1.1 101 " in answer
    assert answer.endswith(b'\x81\x16{"type":"ping","id":7}\x88\x02\x03\xe8\n')


def test_pongs_that_nobody_reads_cost_no_memory(world: World) -> None:
    before = resident_kib(world.daemon.pid)
    flood = bytes(Frame(PING, b"x" * 125)) * 4000
    with world.connect() as client:
        client.send(RAW_HANDSHAKE)
        client.socket.settimeout(1.0)
        with contextlib.suppress(TimeoutError, socket.timeout):
            for _ in range(100):
                client.send(flood)
        world.assert_answers()
        assert resident_kib(world.daemon.pid) - before < 8 * 1024
        client.socket.settimeout(ANSWER_S)
        assert client.line().startswith(b"HTTP/1.1 101 ")
    world.assert_answers()


def resident_kib(pid: int) -> int:
    """Return a process's resident memory."""
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(done.stdout)


# ---------------------------------------------------------------- the codec: Autobahn's server cases, by their numbers


class Frame(NamedTuple):
    """One frame of a client, masked as the RFC wants it; `masked` and `length` make wrong ones."""

    opcode: int
    payload: bytes = b""
    fin: bool = True
    rsv: int = 0
    masked: bool = True

    def __bytes__(self) -> bytes:
        size = len(self.payload)
        short = size if size < 126 else 126 if size < 65536 else 127
        length = b"" if size < 126 else size.to_bytes(2 if size < 65536 else 8, "big")
        head = bytes([self.fin << 7 | self.rsv << 4 | self.opcode, self.masked << 7 | short]) + length
        key = b"\x01\x80\xff\x00" if self.masked else b""
        return head + key + bytes(byte ^ (key[at % 4] if key else 0) for at, byte in enumerate(self.payload))


TEXT, BINARY, MORE, CLOSE, PING, PONG = 1, 2, 0, 8, 9, 10


class Told(NamedTuple):
    """What a codec made of a client's bytes: messages, pongs, and with which code it closed."""

    messages: list[str]
    pongs: list[bytes]
    code: int | None


def told(pieces: Iterable[bytes]) -> Told:
    """Return what a new codec makes of some pieces."""
    codec = WebSocketCodec()
    messages, pongs, code = [], [], None
    for piece in pieces:
        for said in codec.receive(piece):
            if isinstance(said, str):
                messages.append(said)
            elif said[0] == 0x80 | PONG:
                pongs.append(said[2:])
            else:
                assert said[0] == 0x80 | CLOSE
                assert code is None, "it closes once"
                assert not codec.is_open
                code = int.from_bytes(said[2:4], "big")
    assert codec.is_open == (code is None)
    return Told(messages, pongs, code)


def close(code: int, reason: bytes = b"") -> Frame:
    return Frame(CLOSE, code.to_bytes(2, "big") + reason)


CASES: Final[dict[str, tuple[list[Frame], Told]]] = {
    **{
        f"1.1 text of {size}": ([Frame(TEXT, b"*" * size)], Told(["*" * size], [], None))
        for size in (0, 125, 126, 127, 128, 65535, 65536)
    },
    "1.2 binary is not taken": ([Frame(BINARY, b"x")], Told([], [], 1003)),
    **{f"2 ping of {size}": ([Frame(PING, b"p" * size)], Told([], [b"p" * size], None)) for size in (0, 1, 125)},
    "2.5 ping too long": ([Frame(PING, b"p" * 126)], Told([], [], 1002)),
    "2.7 pong unasked": ([Frame(PONG, b"x"), Frame(PING, b"y")], Told([], [b"y"], None)),
    "2.10 ten pings": ([Frame(PING, b"%d" % n) for n in range(10)], Told([], [b"%d" % n for n in range(10)], None)),
    **{f"3 reserved bits {rsv}": ([Frame(TEXT, b"x", rsv=rsv)], Told([], [], 1002)) for rsv in range(1, 8)},
    **{f"4 opcode {code}": ([Frame(code)], Told([], [], 1002)) for code in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "4 opcode after a message": ([Frame(TEXT, b"hi"), Frame(5)], Told(["hi"], [], 1002)),
    "5.1 ping in fragments": ([Frame(PING, b"a", fin=False), Frame(MORE, b"b")], Told([], [], 1002)),
    "5.3 text in fragments": ([Frame(TEXT, b"a", fin=False), Frame(MORE, b"b")], Told(["ab"], [], None)),
    "5.6 ping between": (
        [Frame(TEXT, b"a", fin=False), Frame(PING, b"p"), Frame(MORE, b"b")],
        Told(["ab"], [b"p"], None),
    ),
    "5.9 nothing to continue": ([Frame(MORE, b"x")], Told([], [], 1002)),
    "5.15 nothing to continue after": (
        [Frame(TEXT, b"a", fin=False), Frame(MORE, b"b"), Frame(MORE, b"c", fin=False)],
        Told(["ab"], [], 1002),
    ),
    "5.18 text inside of text": ([Frame(TEXT, b"a", fin=False), Frame(TEXT, b"b")], Told([], [], 1002)),
    "6.2 UTF-8 in fragments": (
        [Frame(TEXT, "Hello-\u00b5@".encode(), fin=False), Frame(MORE, "\u00df\u00f6".encode())],
        Told(["Hello-\u00b5@\u00df\u00f6"], [], None),
    ),
    "6.2.3 cut inside a character": (
        [Frame(TEXT, b"\xce", fin=False), Frame(MORE, b"\xba")],
        Told(["\u03ba"], [], None),
    ),
    "6.3 not UTF-8": (
        [Frame(TEXT, b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited")],
        Told([], [], 1007),
    ),
    "6.4 not UTF-8, told before the end": ([Frame(TEXT, b"\xf4\x90", fin=False)], Told([], [], 1007)),
    "6.6 cut off inside a character": ([Frame(TEXT, b"\xce")], Told([], [], 1007)),
    "6.22 noncharacters": ([Frame(TEXT, "\ufffe\uffff".encode())], Told(["\ufffe\uffff"], [], None)),
    "7.1 close after a message": ([Frame(TEXT, b"hi"), close(1000)], Told(["hi"], [], 1000)),
    "7.1.5 close inside a message": (
        [Frame(TEXT, b"a", fin=False), close(1000), Frame(MORE, b"b")],
        Told([], [], 1000),
    ),
    "7.1.3 nothing after the close": ([close(1000), Frame(PING, b"x"), Frame(TEXT, b"y")], Told([], [], 1000)),
    "7.3.2 close of one byte": ([Frame(CLOSE, b"\x03")], Told([], [], 1002)),
    "7.3.5 close with the longest reason": ([close(1000, b"*" * 123)], Told([], [], 1000)),
    "7.3.6 close too long": ([close(1000, b"*" * 124)], Told([], [], 1002)),
    "7.5 close with what is not UTF-8": ([close(1000, b"\xce\xba\xed\xa0\x80")], Told([], [], 1007)),
    **{
        f"7.7 close {code}": ([close(code)], Told([], [], code))
        for code in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999)
    },
    **{
        f"7.9 close {code}": ([close(code)], Told([], [], 1002))
        for code in (0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999)
    },
    "9 a message as long as may be": (
        [Frame(TEXT, b"*" * REQUEST_MAX_BYTES)],
        Told(["*" * REQUEST_MAX_BYTES], [], None),
    ),
    "9 a message too long": ([Frame(TEXT, b"*" * (REQUEST_MAX_BYTES + 1))], Told([], [], 1009)),
    "9 a message too long in fragments": (
        [Frame(TEXT, b"*" * 2**19, fin=False), Frame(MORE, b"*" * 2**19, fin=False), Frame(MORE, b"*")],
        Told([], [], 1009),
    ),
    "unmasked": ([Frame(TEXT, b"x", masked=False)], Told([], [], 1002)),
    "compressed, which was never agreed on": ([Frame(TEXT, b"\xf2H\xcd\xc9\xc9\x07\x00", rsv=4)], Told([], [], 1002)),
}


@pytest.mark.parametrize("frames", CASES.values(), ids=CASES)
@pytest.mark.parametrize("size", [10**9, 1, 1000], ids=["whole", "byte by byte", "in pieces"])
def test_autobahn_case(frames: tuple[list[Frame], Told], size: int) -> None:
    data = b"".join(map(bytes, frames[0]))
    size = 997 if size == 1 and len(data) > 2**17 else size  # a million bytes one by one would take a minute
    assert told(data[at : at + size] for at in range(0, len(data), size)) == frames[1]


def test_a_message_too_long_is_known_before_it_has_come() -> None:
    """The length is in its head, but a head may lie: what counts is what came."""
    head = b"\x81\xff" + (2**40).to_bytes(8, "big") + b"\x00\x00\x00\x00"
    codec = WebSocketCodec()
    assert list(codec.receive(head + b"*" * 1000)) == []
    (said,) = [said for _ in range(1100) for said in codec.receive(b"*" * 1000)]
    assert isinstance(said, bytes)
    assert said[2:4] == (1009).to_bytes(2, "big")


frames_of_a_client = st.lists(
    st.builds(
        Frame,
        st.sampled_from((TEXT, TEXT, MORE, MORE, PING, PONG, BINARY, CLOSE, 5)),
        st.one_of(st.text(max_size=20).map(str.encode), st.binary(max_size=130), st.just(b"\x03\xe8")),
        fin=st.booleans(),
        rsv=st.sampled_from((0, 0, 0, 0, 4)),
    ),
    max_size=8,
)


@settings(deadline=None)
@given(frames_of_a_client, st.lists(st.integers(0, 2000), max_size=10))
def test_frames_mean_the_same_wherever_they_are_cut(frames: list[Frame], cuts: list[int]) -> None:
    data = b"".join(map(bytes, frames))
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    whole = told([data])
    assert told(data[start:end] for start, end in zip(places, places[1:])) == whole
    assert told(bytes([byte]) for byte in data) == whole


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_frames_or_the_end(data: bytes) -> None:
    assert told([data]) == told(bytes([byte]) for byte in data)


@settings(deadline=None)
@given(st.lists(st.text(max_size=200), min_size=1, max_size=5), st.integers(1, 50))
def test_what_we_send_is_what_a_client_reads(texts: list[str], size: int) -> None:
    codec, client = WebSocketCodec(), wsproto.connection.Connection(wsproto.connection.ConnectionType.CLIENT)
    for text in texts:
        parts = [text[at : at + size] for at in range(0, len(text), size)] or [""]
        for number, part in enumerate(parts):
            client.receive_data(codec.text(part.encode("utf-8", "replace"), last=number == len(parts) - 1))
    read = "".join(
        event.data + ("\n" if event.message_finished else "")
        for event in client.events()
        if isinstance(event, wsproto.events.TextMessage)
    )
    assert read == "".join(text.encode("utf-8", "replace").decode() + "\n" for text in texts)


HANDSHAKE: Final = {
    "connection": "keep-alive, Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def test_the_handshake_of_the_rfc() -> None:
    headers = dict(accept_websocket(HttpRequest("GET", "/", {}, HANDSHAKE, b"")))
    assert headers == {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
    }


def test_no_extension_is_ever_taken_up() -> None:
    offered = {**HANDSHAKE, "sec-websocket-extensions": "permessage-deflate; client_max_window_bits"}
    assert "Sec-WebSocket-Extensions" not in dict(accept_websocket(HttpRequest("GET", "/", {}, offered, b"")))


@pytest.mark.parametrize(
    ("method", "over", "status"),
    [
        ("POST", {}, 400),
        ("GET", {"connection": "keep-alive"}, 400),
        ("GET", {"sec-websocket-key": "c2hvcnQ="}, 400),
        ("GET", {"sec-websocket-key": ""}, 400),
        ("GET", {"sec-websocket-version": "8"}, 426),
        ("GET", {"sec-websocket-version": ""}, 426),
    ],
)
def test_a_handshake_that_is_none(method: str, over: dict[str, str], status: int) -> None:
    with pytest.raises(UsageError) as raised:
        accept_websocket(HttpRequest(method, "/", {}, {**HANDSHAKE, **over}, b""))
    assert raised.value.http_status == status
