"""A daemon in remote mode as others see it over the network: TLS, tokens, HTTP, WebSocket, a reverse proxy in front."""

from __future__ import annotations

import http.client
import itertools
import json
import select
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import trustme
import websocket
from clients import ANSWER_S, Answer
from harness import wait_until
from hosts import Host
from links import PIECE_BYTES, Listener

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from clients import Message
    from harness import Cluster

TOKEN: Final = "correct-horse-battery-staple"
BEARER: Final = {"Authorization": f"Bearer {TOKEN}"}
OTHERS: Final = ("MODE", "WEBSOCKET_PORT", "FABRIK_SOCKET", "FABRIK_CACHE")  # what a client on another host lacks


class Certificate(NamedTuple):
    """A server's certificate for loopback, in files, and the authority that a client must trust."""

    authority: trustme.CA
    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Certificate:
        """Make an authority, and files in a folder."""
        made = cls(trustme.CA(), folder)
        folder.mkdir(parents=True, exist_ok=True)
        made.authority.cert_pem.write_to_path(made.ca)
        made.issue()
        return made

    @property
    def ca(self) -> Path:
        """The authority's file."""
        return self.folder / "ca.pem"

    @property
    def cert(self) -> Path:
        """The certificate's file."""
        return self.folder / "tls.crt"

    @property
    def key(self) -> Path:
        """The key's file."""
        return self.folder / "tls.key"

    def issue(self) -> None:
        """Write a new certificate and its key over the old."""
        leaf = self.authority.issue_cert("localhost", "127.0.0.1")
        leaf.private_key_pem.write_to_path(self.key)
        self.cert.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))

    def client_context(self) -> ssl.SSLContext:
        """Return a client that trusts the authority and nobody else."""
        return ssl.create_default_context(cafile=str(self.ca))

    def server_context(self) -> ssl.SSLContext:
        """Return the server's side."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self.key)
        return context


class RemoteHost(Host):
    """A host whose daemon serves others too: on 127.0.0.1, at a port that stays the same across restarts."""

    def __init__(
        self,
        executable: Path,
        unpacked: Path,
        root: Path,
        clusters: Sequence[Cluster],
        *,
        timing: Mapping[str, object] | None = None,
        tls: Certificate | None = None,
    ) -> None:
        super().__init__(executable, unpacked, root, clusters, timing=timing)
        self.tls = tls
        self._peers = itertools.count()
        self.port = free_port()
        self.token_file = root / "token"
        self.token_file.write_text(TOKEN + "\n")
        self.environment.update(
            MODE="remote",
            WEBSOCKET_PORT=str(self.port),
            FABRIK_LISTEN="127.0.0.1",
            FABRIK_TOKEN_FILE=str(self.token_file),
        )
        if tls is not None:
            self.environment.update(FABRIK_TLS_CERT=str(tls.cert), FABRIK_TLS_KEY=str(tls.key))

    @property
    def url(self) -> str:
        """What `--remote` names it by."""
        return f"{'ws' if self.tls is None else 'wss'}://localhost:{self.port}/daemon"

    def connect(self, source: str = "") -> socket.socket:
        """Return a connection to its port, with TLS where it has that; unless a source is given, of a peer of its own.

        All of 127.0.0.0/8 is this host with Linux, so that one test's refusals do not slow the next.
        """
        if not source:
            number = next(self._peers)
            source = f"127.1.{number // 250}.{number % 250 + 1}" if sys.platform == "linux" else "127.0.0.1"
        sock = socket.create_connection(("127.0.0.1", self.port), ANSWER_S, (source, 0))
        if self.tls is None:
            return sock
        return self.tls.client_context().wrap_socket(sock, server_hostname="localhost")

    def get(self, target: str, headers: Mapping[str, str] | None = None, *, method: str = "GET") -> Answer:
        """Return the answer to a request on a connection of its own, with the token unless headers are given."""
        connection = self.http_connection()
        try:
            connection.request(method, target, headers=dict(BEARER if headers is None else headers))
            return answer_of(connection)
        finally:
            connection.close()

    def http_connection(self) -> http.client.HTTPConnection:
        """Return a connection that takes several requests."""
        connection = http.client.HTTPConnection("localhost", self.port, timeout=ANSWER_S)
        connection.sock = self.connect()
        return connection

    def websocket(self, target: str = "/daemon/v1/stream", **options: Any) -> websocket.WebSocket:
        """Return a WebSocket, with the token unless headers are given."""
        options.setdefault("header", [f"Authorization: Bearer {TOKEN}"])
        sock = self.connect()
        try:
            made: websocket.WebSocket = websocket.create_connection(
                f"ws://localhost:{self.port}{target}", socket=sock, timeout=ANSWER_S, suppress_origin=True, **options
            )
        except BaseException:
            sock.close()
            raise
        return made

    def remote_status(self) -> Message:
        """Return what the daemon's status tells of remote mode, by its Unix socket."""
        found: Message = self.status()["remote"]
        return found

    def client_environment(self, **more: str) -> dict[str, str]:
        """Return the environment of somebody on another host, who has the token and the authority."""
        kept = {name: value for name, value in self.environment.items() if name not in OTHERS}
        kept["FABRIK_CACHE"] = str(self.root / "elsewhere" / "cache.db")
        kept["FABRIK_SOCKET"] = str(self.root / "elsewhere" / "d.sock")
        if self.tls is not None:
            kept["FABRIK_CA_FILE"] = str(self.tls.ca)
        return {**kept, **more}

    def ask(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the other host; `more` is environment, which leads."""
        environment = self.client_environment(**{"FABRIK_REMOTE": self.url, **more})
        return subprocess.run(
            self.command(*words),
            env=environment,
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            check=False,
        )

    def relaunch(self) -> None:
        """Kill it as the kernel would, and start it again."""
        assert self._process
        self._process.kill()
        self._process.wait()
        self._process = None
        self.launch()


def free_port() -> int:
    """Return a port of loopback that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def answer_of(connection: http.client.HTTPConnection) -> Answer:
    """Return the next response of a connection."""
    response = connection.getresponse()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, response.read())


def ask(connection: websocket.WebSocket, action: str, **fields: Any) -> Message:
    """Return the answer to a request over a WebSocket."""
    connection.send(json.dumps({"action": action, **fields}))
    return message_of(connection)


def message_of(connection: websocket.WebSocket) -> Message:
    """Return the next message of a WebSocket."""
    text = connection.recv()
    assert text, "the daemon hung up"
    message = json.loads(text)
    assert isinstance(message, dict)
    return message


def is_closed(sock: socket.socket, timeout_s: float = ANSWER_S) -> bool:
    """Tell whether the other end closes within so long; what it says before is dropped."""
    sock.settimeout(timeout_s)
    try:
        while sock.recv(PIECE_BYTES):
            pass
    except (socket.timeout, ssl.SSLWantReadError):
        return False
    except OSError:
        return True
    return True


class ReverseProxy(Listener):
    """Ends TLS and forwards to a daemon, as an ingress does: a path's prefix goes or stays, and it says who asks."""

    def __init__(self, certificate: Certificate, port: int, *, strip: str = "", client: str = "203.0.113.9") -> None:
        self._context = certificate.server_context()
        self._target = port
        self._strip = strip
        self._client = client
        super().__init__()

    def serve(self, connection: socket.socket) -> None:
        """Forward one connection: its first request's head with X-Forwarded-For, then bytes both ways."""
        with self._context.wrap_socket(connection, server_side=True) as secured:
            head, rest = self._head(secured)
            first, _, lines = head.partition("\r\n")
            method, target, version = first.split(" ")
            if self._strip and target.startswith(self._strip + "/"):
                target = target[len(self._strip) :]
            forwarded = f"X-Forwarded-For: 198.51.100.1, {self._client}\r\nX-Forwarded-Proto: https\r\n"
            with socket.create_connection(("127.0.0.1", self._target)) as upstream:
                upstream.sendall(f"{method} {target} {version}\r\n{forwarded}{lines}\r\n\r\n".encode("latin-1") + rest)
                self._copy(secured, upstream)

    @staticmethod
    def _head(connection: ssl.SSLSocket) -> tuple[str, bytes]:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = connection.recv(PIECE_BYTES)
            if not piece:
                raise ConnectionError
            data += piece
        head, _, rest = data.partition(b"\r\n\r\n")
        return head.decode("latin-1"), rest

    @staticmethod
    def _copy(secured: ssl.SSLSocket, upstream: socket.socket) -> None:
        other: dict[socket.socket, socket.socket] = {secured: upstream, upstream: secured}
        while True:
            ready = [secured] if secured.pending() else select.select(list(other), [], [])[0]
            for end in ready:
                data = end.recv(PIECE_BYTES)
                if not data:
                    return
                other[end].sendall(data)


class Watch:
    """`runs watch -o json --remote`, beside the test: what it prints, and what it says on stderr."""

    def __init__(self, host: RemoteHost, *words: str, **more: str) -> None:
        self.process = subprocess.Popen(
            host.command("runs", "watch", "-o", "json", "--remote", host.url, *words),
            env=host.client_environment(**more),
            cwd=host.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        self.messages: list[Message] = []
        self.complaints: list[str] = []
        self._threads = [threading.Thread(target=read, daemon=True) for read in (self._read, self._listen)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe
            pipe.close()

    @property
    def events(self) -> list[Message]:
        """The events of runs so far."""
        return [message for message in list(self.messages) if str(message["type"]).startswith("run:")]

    def wait_for(self, kind: str, count: int = 1, timeout_s: float = 30.0) -> None:
        """Wait until messages of a kind were printed."""
        wait_until(
            lambda: sum(message["type"] == kind for message in list(self.messages)) >= count,
            timeout_s,
            f"{count} of {kind} among {self.messages[-3:]}, {self.complaints}",
        )

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.messages.append(json.loads(line))

    def _listen(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.complaints.append(line)
