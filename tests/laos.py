"""LAOS for tests: Debian's Prometheus, Alertmanager and Pushgateway on loopback, and a stand-in for Loki."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final

import pytest
from harness import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

JsonObject = dict[str, Any]

READY_S: Final = 60.0  # of a server; the machine may be busy

# grafana.com/docs/loki, "Configuration", limits_config: the defaults.
MAX_LABELS: Final = 15
MAX_LABEL_NAME_BYTES: Final = 1024
MAX_LABEL_VALUE_BYTES: Final = 2048
MAX_LINE_BYTES: Final = 256 * 1024
MAX_METADATA_BYTES: Final = 64 * 1024
MAX_METADATA_ENTRIES: Final = 128
OLDEST_S: Final = 7 * 86400
FUTURE_S: Final = 600
RATE_BYTES_PER_S: Final = 4 * 2**20
BURST_BYTES: Final = 6 * 2**20
MAX_BODY_BYTES: Final = 4 * 2**20  # grpc_server_max_recv_msg_size, of the decompressed push


def program(*names: str) -> str:
    """Return the first of these programs that is here; skip the test where none is."""
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip(f"{names[0]} is not installed (on Debian: apt-get install {names[0]})")
    return found


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def get(url: str) -> Any:
    """Return the JSON at a URL."""
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - of a server that the test started
        return json.load(answer)


class RealServer:
    """One of Debian's servers, in a folder of its own."""

    def __init__(self, folder: Path, names: tuple[str, ...], arguments: Callable[[int], list[str]]) -> None:
        """Prepare it; `arguments` are made from its port."""
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._command = [program(*names), *arguments(self.port)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it is ready."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_until(self._is_ready, READY_S, f"{self._command[0]} is ready")

    def stop(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _is_ready(self) -> bool:
        assert self._process
        assert self._process.poll() is None, (self._folder / "log").read_text()
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5):  # noqa: S310
                return True
        except (OSError, urllib.error.URLError):
            return False


class Alertmanager(RealServer):
    """A real Alertmanager."""

    def __init__(self, folder: Path, configuration: str = "") -> None:
        """Prepare it with a configuration, by default one that tells nobody."""
        folder.mkdir(parents=True, exist_ok=True)
        default = "route: {receiver: nobody, group_wait: 0s}\nreceivers: [{name: nobody}]\n"
        (folder / "alertmanager.yml").write_text(configuration or default)
        super().__init__(
            folder,
            ("prometheus-alertmanager", "alertmanager"),
            lambda port: [
                "--config.file=alertmanager.yml",
                "--storage.path=data",
                f"--web.listen-address=127.0.0.1:{port}",
                "--cluster.listen-address=",
            ],
        )

    def alerts(self) -> list[JsonObject]:
        """Return the alerts that fire."""
        found: list[JsonObject] = get(f"{self.url}/api/v2/alerts")
        return found


class Pushgateway(RealServer):
    """A real Pushgateway."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder,
            ("prometheus-pushgateway", "pushgateway"),
            lambda port: [f"--web.listen-address=127.0.0.1:{port}"],
        )


class Prometheus(RealServer):
    """A real Prometheus, which scrapes targets each second."""

    def __init__(
        self, folder: Path, targets: Mapping[str, str], *, rules: str = "", alertmanager: str = "", scrape: str = "1s"
    ) -> None:
        """Prepare it for targets (job -> host:port) and rules, whose alerts go to an Alertmanager (host:port)."""
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [
            {"job_name": job, "static_configs": [{"targets": [target]}], "honor_labels": job == "pushgateway"}
            for job, target in targets.items()
        ]
        configuration: JsonObject = {
            "global": {"scrape_interval": scrape, "evaluation_interval": "1s"},
            "scrape_configs": jobs,
        }
        if rules:
            (folder / "rules.yml").write_text(rules)
            configuration["rule_files"] = ["rules.yml"]
        if alertmanager:
            to = [{"static_configs": [{"targets": [alertmanager]}]}]
            configuration["alerting"] = {"alertmanagers": to}
        (folder / "prometheus.yml").write_text(json.dumps(configuration))
        super().__init__(
            folder,
            ("prometheus",),
            lambda port: [
                "--config.file=prometheus.yml",
                "--storage.tsdb.path=data",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
        )

    def query(self, expression: str) -> list[JsonObject]:
        """Return what an instant query answers."""
        answer = get(f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}")
        assert answer["status"] == "success", answer
        found: list[JsonObject] = answer["data"]["result"]
        return found

    def value(self, expression: str) -> float | None:
        """Return the one value of a query, None where there is none."""
        found = self.query(expression)
        assert len(found) < 2, found
        return float(found[0]["value"][1]) if found else None


class Push:
    """One push that the Loki stand-in got."""

    def __init__(self, headers: Mapping[str, str], body: JsonObject, entries: int) -> None:
        self.headers = headers
        self.body = body
        self.entries = entries
        self.at = time.monotonic()


class Loki:
    """A stand-in for Loki that refuses what Loki's documentation says it refuses; TLS, if a context is given."""

    def __init__(
        self, *, context: Any = None, takes_metadata: bool = True, clock: Callable[[], float] = time.time
    ) -> None:
        self.changed = threading.Condition()
        self.pushes: list[Push] = []  # that were taken
        self.refusals: list[str] = []
        self.answers: list[tuple[int, dict[str, str]]] = []  # given in place of the next ones, in this order
        self.delay_s = 0.0
        self.takes_metadata = takes_metadata
        self._context = context
        self._clock = clock
        self._level = 0.0
        self._level_at = time.monotonic()
        self._newest: dict[str, int] = {}
        self.port = free_port()
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        """Where it is."""
        return f"{'https' if self._context else 'http'}://localhost:{self.port}"

    def start(self) -> None:
        """Serve; again after `stop`, at the same place."""
        loki = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                time.sleep(loki.delay_s)
                code, more, text = loki.receive(self.path, dict(self.headers), data)
                body = text.encode()
                self.send_response(code)
                for name, value in {**more, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Say nothing."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Say nothing of clients that hang up."""

        self._server = Server(("127.0.0.1", self.port), Handler)
        if self._context is not None:
            self._server.socket = self._context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Be away."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def receive(self, path: str, headers: dict[str, str], data: bytes) -> tuple[int, dict[str, str], str]:
        """Take a push in, or refuse it; return status, headers and text of the answer."""
        with self.changed:
            self.changed.notify_all()
            if self.answers:
                code, more = self.answers.pop(0)
                return code, more, "as the test wants it"
            try:
                body = self._decode(path, headers, data)
                entries = sum(self._check_stream(stream) for stream in body["streams"])
            except ValueError as error:
                self.refusals.append(str(error))
                return 400, {}, str(error)
            if not self._has_room(len(json.dumps(body))):
                return 429, {"Retry-After": "1"}, "ingestion rate limit exceeded"
            self.pushes.append(Push(headers, body, entries))
            return 204, {}, ""

    def lines(self) -> list[tuple[dict[str, str], int, str, dict[str, str]]]:
        """Return what was taken, in its order: labels, time in ns, line, structured metadata."""
        with self.changed:
            return [
                (stream["stream"], int(value[0]), value[1], value[2] if len(value) > 2 else {})
                for push in self.pushes
                for stream in push.body["streams"]
                for value in stream["values"]
            ]

    @staticmethod
    def _decode(path: str, headers: Mapping[str, str], data: bytes) -> JsonObject:
        if path != "/loki/api/v1/push":
            raise ValueError(f"no route {path}")
        if headers.get("Content-Type") != "application/json":
            raise ValueError("unsupported content type")
        if headers.get("Content-Encoding") == "gzip":
            data = gzip.decompress(data)
        if len(data) > MAX_BODY_BYTES:
            raise ValueError("message larger than max")
        body: JsonObject = json.loads(data)
        return body

    def _check_stream(self, stream: JsonObject) -> int:
        labels = stream["stream"]
        if not labels or len(labels) > MAX_LABELS:
            raise ValueError("stream has no labels, or too many")
        for name, value in labels.items():
            if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name) or len(name) > MAX_LABEL_NAME_BYTES:
                raise ValueError(f"label name {name!r}")
            if not isinstance(value, str) or not value or len(value.encode()) > MAX_LABEL_VALUE_BYTES:
                raise ValueError(f"label value {value!r}")
        for value in stream["values"]:
            self._check_value(json.dumps(labels, sort_keys=True), value)
        return len(stream["values"])

    def _check_value(self, stream: str, value: list[Any]) -> None:
        at, line, *more = value
        if not isinstance(at, str) or not at.isdigit() or not isinstance(line, str):
            raise ValueError("a value is [time as text, line]")
        now = self._clock()
        if int(at) / 1e9 < now - OLDEST_S or int(at) / 1e9 > now + FUTURE_S:
            raise ValueError("timestamp too old or too new")
        if len(line.encode()) > MAX_LINE_BYTES:
            raise ValueError("max entry size exceeded")
        if int(at) < self._newest.get(stream, 0):
            raise ValueError("entry out of order")
        self._newest[stream] = int(at)
        for metadata in more:
            if not self.takes_metadata:
                raise ValueError("stream includes structured metadata, but this feature is disallowed by limits")
            if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
                raise ValueError("structured metadata is an object of texts")
            if len(metadata) > MAX_METADATA_ENTRIES or len(json.dumps(metadata)) > MAX_METADATA_BYTES:
                raise ValueError("structured metadata too large")

    def _has_room(self, size: int) -> bool:
        now = time.monotonic()
        self._level = max(0.0, self._level - (now - self._level_at) * RATE_BYTES_PER_S)
        self._level_at = now
        if self._level + size > BURST_BYTES:
            return False
        self._level += size
        return True


@contextlib.contextmanager
def running(*servers: RealServer | Loki) -> Iterator[None]:
    """Start servers, and stop them at the end."""
    with contextlib.ExitStack() as undo:
        for server in servers:
            undo.callback(server.stop)
            server.start()
        yield
