"""The transport under tests/fakes.py: throw-away certificates, TLS, HTTP/1.1, who may ask, and what was asked."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import json
import select
import socket
import socketserver
import ssl
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import trustme

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType

    from typing_extensions import Self

JsonObject = dict[str, Any]

STOP_S: Final = 5.0  # how long a stop waits for the connections' threads
GZIP_FROM_BYTES: Final = 128 * 1024  # a real API server compresses larger answers only


class Request(NamedTuple):
    """One request as a server saw it."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case
    at: float  # time.monotonic()

    @property
    def is_watch(self) -> bool:
        """Tell whether it asks for a stream."""
        return self.query.get("watch", "0").lower() not in {"0", "false"}  # as the API server reads a bool

    @property
    def is_list(self) -> bool:
        """Tell whether it asks for objects of a kind at once."""
        *_, last = self.path.split("/")
        return not self.is_watch and last in {"jobs", "cronjobs", "pods", "persistentvolumeclaims", "events"}


class Response(NamedTuple):
    """One whole answer."""

    status: int
    body: bytes
    headers: Mapping[str, str] = MappingProxyType({})
    content_type: str = "application/json"
    raw: bool = False  # `body` is a whole recorded response: status line, headers and all


def encode(value: object) -> bytes:
    """Return JSON as the API server writes it: no spaces, UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def status_object(code: int, reason: str, message: str, **extra: object) -> JsonObject:
    """Return a `Status` of failure."""
    status: JsonObject = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return {**status, "message": message, "reason": reason, **extra, "code": code}


def refusal(code: int, reason: str, message: str, **extra: object) -> Response:
    """Return the answer that carries such a `Status`."""
    return Response(code, encode(status_object(code, reason, message, **extra)))


# ---------------------------------------------------------------- certificates


class Authority:
    """A throw-away certificate authority for one test session."""

    def __init__(self) -> None:
        """Make the authority and a certificate for loopback."""
        self._ca = trustme.CA()
        self._server = self._ca.issue_cert("127.0.0.1", "localhost", "api.fabrik.test")

    @property
    def pem(self) -> bytes:
        """The authority's own certificate."""
        return self._ca.cert_pem.bytes()

    def client_pem(self, name: str) -> tuple[bytes, bytes]:
        """Return a fresh client certificate and its key."""
        leaf = self._ca.issue_cert(f"{name}@fabrik.test", common_name=name)
        return leaf.cert_chain_pems[0].bytes(), leaf.private_key_pem.bytes()

    def server_context(self) -> ssl.SSLContext:
        """Return the server side, which asks for a client certificate and accepts that there is none."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._server.configure_cert(context)
        context.verify_mode = ssl.CERT_OPTIONAL
        context.load_verify_locations(cadata=self.pem.decode())
        return context

    def client_context(self) -> ssl.SSLContext:
        """Return a client that trusts this authority."""
        context = ssl.create_default_context()
        self._ca.configure_trust(context)
        return context


# ---------------------------------------------------------------- transport


class Access(NamedTuple):
    """How a kubeconfig reaches a server."""

    auth: str = ""  # certificate, certificate-files, token, token-file
    ca: str = "data"  # data, file, or nothing
    tls_server_name: str = ""
    insecure: bool = False
    namespace: str = ""
    context: str = "fabrik-test"


class Exchange(BaseHTTPRequestHandler):
    """One connection; each request on it is handed to the server's `answer`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def setup(self) -> None:
        """Shake hands in the connection's own thread."""
        if isinstance(self.request, ssl.SSLSocket):
            self.request.do_handshake()
        super().setup()

    def __getattr__(self, name: str) -> Callable[[], None]:
        """Take every verb, known or not."""
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.seen = Request(self.command, parts.path, query, headers, time.monotonic())
        self.server.api.receive(self)

    def date_time_string(self, timestamp: float | None = None) -> str:
        """Return the time by the server's own clock."""
        return super().date_time_string((time.time() if timestamp is None else timestamp) + self.server.api.clock_s)

    def document(self) -> Any:
        """Return the JSON that the request carries."""
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def send(self, response: Response) -> None:
        """Answer at once."""
        body = response.body
        if response.raw:
            self.wfile.write(body)
            return
        self.send_response(response.status)
        self.send_header("Content-Type", response.content_type)
        if len(body) >= GZIP_FROM_BYTES and "gzip" in self.seen.headers.get("accept-encoding", ""):
            body = gzip.compress(body, 1)
            self.send_header("Content-Encoding", "gzip")
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def start_stream(self, content_type: str = "application/json") -> None:
        """Begin a watch's response, or that of a log that is followed."""
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Cache-Control", "no-cache, private")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def send_chunks(self, chunks: Iterable[bytes]) -> None:
        """Send these as chunks."""
        self.wfile.write(b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks))

    def end_stream(self) -> None:
        """Send the closing chunk."""
        self.wfile.write(b"0\r\n\r\n")

    def send_messages(self, messages: Iterable[bytes]) -> None:
        """Accept a WebSocket (RFC 6455), send these as binary messages, the last in two fragments, and close it."""
        accept = hashlib.sha1(f"{self.headers['Sec-WebSocket-Key']}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode())  # noqa: S324
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(accept.digest()).decode())
        self.send_header("Sec-WebSocket-Protocol", self.headers["Sec-WebSocket-Protocol"].split(",")[0].strip())
        self.end_headers()
        for message in messages:
            half = len(message) // 2
            self.wfile.write(_frame(0x02, message[:half]) + _frame(0x80, message[half:]))
        self.wfile.write(_frame(0x88, b"\x03\xe8"))
        self.close_connection = True

    def hang_up(self, last_words: bytes = b"") -> None:
        """Break the connection without closing chunk or TLS close_notify."""
        if last_words:
            self.wfile.write(last_words)
        self.close_connection = True
        drop(self.connection)

    def client_is_gone(self) -> bool:
        """Tell whether the client closed its side; on a watch it has nothing else to send."""
        return bool(select.select([self.connection], [], [], 0)[0])

    def peer_name(self) -> str:
        """Return the common name in the client's certificate, or nothing."""
        if not isinstance(self.connection, ssl.SSLSocket):
            return ""
        subject: Any = (self.connection.getpeercert() or {}).get("subject", ())
        return next((value for part in subject for key, value in part if key == "commonName"), "")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """Say nothing."""


class _Listener(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, api: ApiServer, port: int, context: ssl.SSLContext | None) -> None:
        self.api = api
        self._context = context
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Exchange)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = self.socket.accept()
        if self._context:
            connection = self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        if isinstance(request, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                request.settimeout(0)  # sends close_notify and does not wait for the client's
                request.unwrap()
        super().shutdown_request(request)
        self._open.discard(request)

    def drop_all(self) -> None:
        """Break every connection; each one's own thread then closes it."""
        deadline = time.monotonic() + STOP_S
        while self._open and time.monotonic() < deadline:
            for connection in list(self._open):
                drop(connection)
            time.sleep(0.005)

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.api.on_connection_error()


def _frame(first: int, data: bytes) -> bytes:
    """Return a frame of a server's WebSocket."""
    size = bytes([len(data)]) if len(data) < 126 else b"\x7e" + len(data).to_bytes(2, "big")
    return bytes([first]) + size + data


def drop(connection: socket.socket) -> None:
    """Break a connection below TLS, so that no close_notify is sent."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


class ApiServer:
    """A server on 127.0.0.1 that knows who may ask and remembers what was asked; `answer` is for subclasses."""

    def __init__(
        self, authority: Authority | None = None, *, token: str = "", certificate_required: bool = False
    ) -> None:
        """Prepare a server: over TLS if there is an authority; with a token or certificate required if so said."""
        self.authority = authority
        self.token = token
        self.port = 0
        self.requests: list[Request] = []
        self.violations: list[Request] = []
        self.clock_s = 0.0  # how far its clock is ahead
        self.writable: frozenset[str] = frozenset()  # paths that a test allows to be posted to
        self.errors: list[str] = []  # connections that broke, failed handshakes among them
        self.crashes: list[str] = []  # mistakes of this file
        self.changed = threading.Condition()
        self.stopping = False
        self._certificate_required = certificate_required
        self._listener: _Listener | None = None

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop."""
        self.stop()

    def start(self) -> None:
        """Listen; after a stop, on the same port again."""
        context = self.authority.server_context() if self.authority else None
        self.stopping = False
        self._listener = _Listener(self, self.port, context)
        self.port = self._listener.server_address[1]
        threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening and break every connection, as a killed server does; twice is once."""
        with self.changed:
            listener, self._listener = self._listener, None
            self.stopping = True
            self.changed.notify_all()
        if listener:
            listener.shutdown()
            listener.server_close()
            listener.drop_all()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{'https' if self.authority else 'http'}://127.0.0.1:{self.port}"

    def receive(self, exchange: Exchange) -> None:
        """Note a request, refuse what may not be asked, and answer the rest."""
        request = exchange.seen
        with self.changed:
            self.requests.append(request)
            if not self._may_ask(request):
                self.violations.append(request)
            self.changed.notify_all()
        refused = self._refused(exchange)
        if refused:
            exchange.send(refused)
        else:
            self.answer(exchange)

    def _may_ask(self, request: Request) -> bool:
        """Tell whether a request only reads, or was allowed by the test: reviews, and commands in a Pod."""
        if request.method == "GET" and not request.path.endswith("/exec"):
            return True
        return request.method in {"GET", "POST"} and request.path in self.writable

    def _refused(self, exchange: Exchange) -> Response | None:
        request = exchange.seen
        if not self._may_ask(request):
            message = "the server does not allow this method on the requested resource"
            refused = refusal(405, "MethodNotAllowed", message, details={})
            return refused._replace(headers={"Connection": "close"})  # a body may stand unread
        if self._certificate_required and exchange.peer_name():
            return None
        if self.token and request.headers.get("authorization") == f"Bearer {self.token}":
            return None
        return refusal(401, "Unauthorized", "Unauthorized") if self.token or self._certificate_required else None

    def answer(self, exchange: Exchange) -> None:
        """Answer one request."""
        exchange.send(refusal(404, "NotFound", "the server could not find the requested resource", details={}))

    def on_connection_error(self) -> None:
        """Keep the exception in flight."""
        error = sys.exc_info()[1]
        (self.errors if isinstance(error, OSError) else self.crashes).append(repr(error))

    def asked(self, wanted: Callable[[Request], bool]) -> list[Request]:
        """Return the requests so far for which `wanted` holds."""
        with self.changed:
            return [request for request in self.requests if wanted(request)]

    def kubeconfig(self, path: Path, access: Access = Access()) -> Path:  # noqa: B008 - a tuple never changes
        """Write a kubeconfig for this server to `path`, key and token files beside it; return the path."""
        cluster: JsonObject = {"server": self.url}
        if access.insecure:
            cluster["insecure-skip-tls-verify"] = True
        elif self.authority and access.ca:
            cluster.update(_pem_entry(path, "certificate-authority", self.authority.pem, as_file=access.ca == "file"))
        if access.tls_server_name:
            cluster["tls-server-name"] = access.tls_server_name
        context = {"cluster": "test", "user": "test", **({"namespace": access.namespace} if access.namespace else {})}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": access.context,
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": self._user(path, access)}],
            "contexts": [{"name": access.context, "context": context}],
        }
        path.write_text(json.dumps(config, indent=2))  # JSON is YAML
        return path

    def _user(self, path: Path, access: Access) -> JsonObject:
        if access.auth == "token":
            return {"token": self.token}
        if access.auth == "token-file":
            file = path.with_suffix(".token")
            file.write_text(self.token)
            return {"tokenFile": str(file)}
        if access.auth and self.authority:
            certificate, key = self.authority.client_pem("fabrik-daemon")
            as_file = access.auth == "certificate-files"
            user = _pem_entry(path, "client-certificate", certificate, as_file=as_file)
            return {**user, **_pem_entry(path, "client-key", key, as_file=as_file)}
        return {}


def _pem_entry(path: Path, name: str, pem: bytes, *, as_file: bool) -> JsonObject:
    """Return a kubeconfig entry `name` that holds the PEM, or names a file beside `path` that does."""
    if not as_file:
        return {f"{name}-data": base64.b64encode(pem).decode()}
    file = path.with_suffix(f".{name}.pem")
    file.write_bytes(pem)
    file.chmod(0o600)
    return {name: str(file)}
