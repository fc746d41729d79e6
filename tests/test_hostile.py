"""Hostile clients one after the other: the daemon answers the next one, and takes no more memory.

FABRIK_HOSTILE=10000 makes as many connections as the requirement says; the default is some hundreds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest
from clients import ANSWER_S, LinesClient, http_request
from harness import wait_until
from worlds import World, made_world

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fakes import Authority

CONNECTIONS: Final = int(os.environ.get("FABRIK_HOSTILE", "600"))
WARM_UP: Final = 150
GROWN_KIB: Final = 12 * 1024  # what allocators keep; ten thousand connections get no more than six hundred
HEAD: Final = b"Host: a\r\n"
UPGRADE: Final = (
    b"GET /v1/stream HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
# Two requests where a proxy sees one, or one where it sees two: RFC 9112, section 11.2.
SMUGGLED: Final = [
    b"POST /v1/ping HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /status",
    b"POST /v1/ping HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
    b"POST /v1/ping HTTP/1.1\r\nHost: a\r\nContent-Length: +2\r\n\r\n{}",
    b"POST /v1/ping HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/ping HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    b"POST /v1/ping HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/ping HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    b"POST /v1/ping HTTP/1.1\r\nHost: a\r\nHost: b\r\nContent-Length: 2\r\n\r\n{}",
    b"GET /v1/ping HTTP/1.1\r\nHost: a\r\n X: folded\r\nContent-Length 5\r\n\r\n",
    b"GET /v1/ping HTTP/1.1\r\n\r\n",
    b"GET /v1/ping\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET  /v1/ping  HTTP/1.1\r\nHost: a\r\n\r\n",
]
FRAMES: Final = [
    b"\x81\x05hello",  # not masked
    b"\x8f\x80abcd",
    b"\xc1\x81abcdx",
    b"\x89\xfe\x00\x7eabcd" + b"x" * 126,
    b"\x81\xff\xff\xff\xff\xff\xff\xff\xff\xffabcd",
    b"\x81\xfe\x00\x01abcdx",
    b"\x81\x82\x00\x00\x00\x00\xc3\x28",
    b"\x01\x81\x00\x00\x00\x00x" * 300,
    b"\x80\x81\x00\x00\x00\x00x",
    b"\x88\x81\x00\x00\x00\x00x",
]


def garbage(chance: random.Random, client: LinesClient) -> None:
    client.send(chance.randbytes(chance.choice((1, 100, 60_000))))


def endless(chance: random.Random, client: LinesClient) -> None:
    client.send(chance.choice((b"{", b'{"a":"', b"[", b" ", b"G", b"\xff")) * chance.choice((1000, 200_000)))


def slow(chance: random.Random, client: LinesClient) -> None:
    text = chance.choice((b'{"action":"status"}', b"GET /status HTTP/1.1\r\nHost: a\r\n\r\n", UPGRADE))
    for byte in text[: chance.randint(1, len(text))]:
        client.send(bytes([byte]))


def half_closed(chance: random.Random, client: LinesClient) -> None:
    client.send(
        chance.choice((b'{"action":"runs"}', b'{"action":', b"GET /v1/runs HTTP/1.1\r\nHost: a\r\n\r\n", UPGRADE))
    )
    client.socket.shutdown(socket.SHUT_WR)


def huge_headers(chance: random.Random, client: LinesClient) -> None:
    some = b"X-%d: %s\r\n" % (chance.randint(0, 9), b"x" * chance.choice((100, 10_000)))
    client.send(b"GET /status HTTP/1.1\r\n" + HEAD + some * chance.choice((1, 30, 1500)) + b"\r\n")


def bad_text(chance: random.Random, client: LinesClient) -> None:
    text = chance.choice((b"\xff\xfe", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\\ud800", b"\\u0000"))
    client.send(b'{"action":"runs","id":"' + text * chance.randint(1, 1000) + b'"}\n')


def deep(chance: random.Random, client: LinesClient) -> None:
    depth = chance.choice((100, 5000, 200_000))
    text = chance.choice(
        (b"[" * depth, b'{"a":' * depth, b'{"action":"ping","id":' + b"[" * depth + b"]" * depth + b"}")
    )
    client.send(
        chance.choice((b"", b"POST /v1/ping HTTP/1.1\r\nHost: a\r\nContent-Length: 400000\r\n\r\n")) + text + b"\n"
    )


def bad_frames(chance: random.Random, client: LinesClient) -> None:
    client.send(UPGRADE)
    for _ in range(chance.randint(1, 3)):
        client.send(chance.choice([*FRAMES, chance.randbytes(300)]))


def smuggled(chance: random.Random, client: LinesClient) -> None:
    client.send(chance.choice(SMUGGLED) * chance.choice((1, 1, 20)))


def greedy(chance: random.Random, client: LinesClient) -> None:
    request = chance.choice((b'{"action":"runs"}\n', b"GET /v1/runs HTTP/1.1\r\nHost: a\r\n\r\n"))
    client.send(request * chance.choice((1, 200)))


KINDS: Final[list[Callable[[random.Random, LinesClient], None]]] = [
    *(garbage, endless, slow, half_closed, huge_headers, bad_text, deep, bad_frames, smuggled, greedy)
]


@pytest.fixture(scope="module")
def world(
    authority: Authority, executable: Path, unpacked: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    with made_world(authority, executable, unpacked, tmp_path_factory.mktemp("world")) as made:
        yield made
        assert "this is a defect" not in made.daemon.log


def attack(world: World, chance: random.Random) -> None:
    """Be one hostile client: it reads a little, or to the end, or nothing, and goes."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, socket.timeout), world.connect() as client:
        client.socket.settimeout(0.5)
        chance.choice(KINDS)(chance, client)
        if chance.random() < 0.5:
            client.socket.settimeout(0.05)
            client.socket.recv(chance.choice((1, 65536)))


def resident_kib(pid: int) -> int:
    """Return a process's resident memory."""
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def descriptors(pid: int) -> int:
    """Return how many files a process has open; 0 where the system does not tell."""
    return len(os.listdir(f"/proc/{pid}/fd")) if sys.platform == "linux" else 0  # noqa: PTH208


def test_hostile_clients_in_sequence(world: World) -> None:
    chance = random.Random(20260216)
    pid = world.daemon.pid
    for _ in range(WARM_UP):
        attack(world, chance)
    world.assert_answers()
    before, open_before = resident_kib(pid), descriptors(pid)
    for number in range(CONNECTIONS):
        attack(world, chance)
        if number % 100 == 0:
            world.assert_answers()
    world.assert_answers()
    assert resident_kib(pid) - before < GROWN_KIB
    wait_until(lambda: descriptors(pid) <= open_before + 4, ANSWER_S, "all are let go")


@pytest.mark.parametrize("request_bytes", SMUGGLED, ids=range(len(SMUGGLED)))
def test_what_could_be_read_in_two_ways_is_refused_and_nothing_after_it_is_read(
    world: World, request_bytes: bytes
) -> None:
    with world.connect() as client:
        client.send(request_bytes + b"GET /status HTTP/1.1\r\nHost: a\r\n\r\n")
        client.socket.shutdown(socket.SHUT_WR)
        answer = client.rest()
    assert answer.startswith(b"HTTP/1.1 400 "), answer[:200]
    assert answer.count(b"HTTP/1.1 ") == 1
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "bad_request"
    assert http_request(world.socket, "/v1/ping").message == {"type": "ping"}
