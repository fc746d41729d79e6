"""Clients of the daemon's socket as others would write them: JSON lines and HTTP, raw bytes included."""

from __future__ import annotations

import http.client
import json
import socket
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import websocket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

Message = dict[str, Any]

ANSWER_S: Final = 20.0  # others may keep this machine busy


class LinesClient:
    """One connection to the socket that speaks JSON lines; reading fails past a deadline."""

    def __init__(self, path: str | Path, timeout_s: float = ANSWER_S) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(timeout_s)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self._timeout_s = timeout_s
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.socket.sendall(data)

    def request(self, action: str, **fields: Any) -> None:
        """Send a request with a newline behind it."""
        self.send(json.dumps({"action": action, **fields}).encode() + b"\n")

    def line(self) -> bytes:
        """Return the next line; b"" where the daemon has hung up."""
        while b"\n" not in self._buffer:
            try:
                piece = self.socket.recv(65536)
            except ConnectionResetError:
                piece = b""
            if not piece:
                rest, self._buffer = self._buffer, b""
                return rest
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def message(self) -> Message:
        """Return the next message."""
        line = self.line()
        assert line, "the daemon hung up"
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    def ask(self, action: str, **fields: Any) -> Message:
        """Return the answer to a request."""
        self.request(action, **fields)
        return self.message()

    def until(self, wanted: Callable[[Message], bool]) -> list[Message]:
        """Return the messages up to the first that is wanted."""
        deadline = time.monotonic() + self._timeout_s
        messages = [self.message()]
        while not wanted(messages[-1]):
            assert time.monotonic() < deadline, f"not among {len(messages)} messages, the last: {messages[-1]}"
            messages.append(self.message())
        return messages

    def rest(self) -> bytes:
        """Return everything until the daemon hangs up."""
        return b"".join(iter(lambda: self.line() + b"\n", b"\n"))

    def silent_for(self, seconds: float) -> bool:
        """Tell whether nothing comes for so long."""
        if b"\n" in self._buffer:
            return False
        self.socket.settimeout(seconds)
        try:
            self._buffer += self.socket.recv(65536)
        except socket.timeout:
            return True
        finally:
            self.socket.settimeout(self._timeout_s)
        return False


class HttpConnection(http.client.HTTPConnection):
    """http.client over a Unix socket."""

    def __init__(self, path: str | Path, timeout_s: float = ANSWER_S) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = str(path)

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(self._path)
        except OSError:
            self.sock.close()
            raise


class Answer(NamedTuple):
    """An HTTP response."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def message(self) -> Message:
        """The body as one JSON object."""
        found = json.loads(self.body)
        assert isinstance(found, dict)
        return found


def http_request(path: str | Path, target: str, *, method: str = "GET", body: bytes | None = None) -> Answer:
    """Return the answer to one HTTP request on a connection of its own."""
    connection = HttpConnection(path)
    try:
        connection.request(method, target, body)
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, response.read())
    finally:
        connection.close()


def http_stream(path: str | Path, target: str) -> Iterator[Message]:
    """Yield the messages of an HTTP answer that goes on; closing the generator hangs up."""
    connection = HttpConnection(path)
    try:
        connection.request("GET", target)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        assert response.getheader("Content-Type") == "application/x-ndjson"
        for line in response:
            yield json.loads(line)
    finally:
        connection.close()


class WebSocketClient:
    """One WebSocket to the socket, spoken by websocket-client."""

    def __init__(self, path: str | Path, target: str = "/v1/stream", subprotocols: Sequence[str] = ()) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(ANSWER_S)
        try:
            self.socket.connect(str(path))
            url = f"ws://localhost{target}"
            self.connection = websocket.create_connection(url, socket=self.socket, subprotocols=list(subprotocols))
        except (OSError, websocket.WebSocketException):
            self.socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Hang up without a word."""
        self.socket.close()

    def request(self, action: str, **fields: Any) -> None:
        """Send a request."""
        self.connection.send(json.dumps({"action": action, **fields}))

    def message(self) -> Message:
        """Return the next message."""
        text = self.connection.recv()
        assert text, "the daemon hung up"
        message = json.loads(text)
        assert isinstance(message, dict)
        return message

    def ask(self, action: str, **fields: Any) -> Message:
        """Return the answer to a request."""
        self.request(action, **fields)
        return self.message()
