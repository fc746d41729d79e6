"""WebSocket: the codec over wsproto, and the daemon's /v1/stream spoken to by websocket-client."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import websocket
from clients import WebSocketClient, http_request
from fabrik_objects import run_id
from worlds import World, made_world, report

if TYPE_CHECKING:
    from collections.abc import Iterator
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
