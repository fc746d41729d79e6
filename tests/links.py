"""What stands between a test and the built daemon: relays, proxies, subscribers, and a daemon held by a longer hand."""

from __future__ import annotations

import base64
import contextlib
import json
import select
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from harness import Daemon, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import TracebackType

    from harness import Cluster
    from typing_extensions import Self

JsonObject = dict[str, Any]

PATIENCE_S: Final = 30.0  # for what takes a moment on an idle machine
ANSWER_S: Final = 20.0
PIECE_BYTES: Final = 64 * 1024


class Listener:
    """Accepts connections on loopback; `serve` has a thread of its own for each."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._socket.getsockname()[1]
        self.open: list[socket.socket] = []
        self.accepted = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and break every connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def serve(self, connection: socket.socket) -> None:
        """Serve one connection; by default, say nothing and keep it."""

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.open.append(connection)
            self.accepted += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.serve(connection)


class Relay(Listener):
    """Forwards TCP to a port of this host, until it falls silent: bytes stop, no FIN either way."""

    def __init__(self, port: int) -> None:
        self.target = port
        self._silent: set[socket.socket] = set()
        self._silent_for_new = False
        super().__init__()

    def fall_silent(self, *, for_new: bool = False) -> None:
        """Forward nothing more on the connections there are; with `for_new`, on those to come neither."""
        self._silent = set(self.open)
        self._silent_for_new = for_new

    def speak(self) -> None:
        """Forward on connections to come; those that fell silent stay so."""
        self._silent_for_new = False

    def serve(self, connection: socket.socket) -> None:
        """Forward both ways until one side ends."""
        if self._silent_for_new:
            self._silent.add(connection)
            return
        with socket.create_connection(("127.0.0.1", self.target)) as upstream:
            self._forward(connection, upstream)

    def _forward(self, connection: socket.socket, upstream: socket.socket) -> None:
        """Copy; a connection that fell silent is kept, so that neither side sees its end."""
        other = {connection: upstream, upstream: connection}
        while True:
            ready = select.select(list(other), [], [], 0.05)[0]
            while connection in self._silent:
                time.sleep(0.05)
            for end in ready:
                data = end.recv(PIECE_BYTES)
                if not data:
                    self.open.remove(connection)
                    connection.close()
                    return
                other[end].sendall(data)


class ConnectProxy(Listener):
    """An HTTP proxy that makes tunnels (RFC 9110, section 9.3.6), for whoever knows `user`, if one is set."""

    def __init__(self, user: str = "", refusal: bytes = b"") -> None:
        self._wanted = f"Basic {base64.b64encode(user.encode()).decode()}" if user else ""
        self._refusal = refusal
        self.asked: list[str] = []
        super().__init__()

    def serve(self, connection: socket.socket) -> None:
        """Read a request's head, answer it and forward."""
        head = b""
        while b"\r\n\r\n" not in head:
            piece = connection.recv(PIECE_BYTES)
            if not piece:
                return
            head += piece
        first, *rest = head.decode("latin-1").split("\r\n")
        self.asked.append(first)
        headers = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in rest if line}
        if self._refusal:
            connection.sendall(self._refusal)
        elif self._wanted and headers.get("proxy-authorization") != self._wanted:
            connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        else:
            host, _, port = first.split(" ")[1].rpartition(":")
            with socket.create_connection((host, int(port))) as upstream:
                connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                self._forward(connection, upstream)
        connection.close()

    @staticmethod
    def _forward(connection: socket.socket, upstream: socket.socket) -> None:
        other = {connection: upstream, upstream: connection}
        while True:
            for end in select.select(list(other), [], [], 1.0)[0]:
                data = end.recv(PIECE_BYTES)
                if not data:
                    return
                other[end].sendall(data)


class Subscriber:
    """A client on the daemon's socket that keeps every message, and when it came."""

    def __init__(self, path: Path, request: Mapping[str, object]) -> None:
        self.messages: list[JsonObject] = []
        self.times: list[float] = []  # time.monotonic(), one for each message
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._socket.makefile("rb") as file:
            for line in file:
                now = time.monotonic()
                self.messages.append(json.loads(line))
                self.times.append(now)

    def of(self, *types: str) -> list[JsonObject]:
        """Return the messages of some types so far."""
        return [message for message in list(self.messages) if message["type"] in types]

    def wait_for(self, wanted: Callable[[JsonObject], bool], what: str, timeout_s: float = PATIENCE_S) -> JsonObject:
        """Return the first message that is wanted, as soon as there is one."""
        wait_until(lambda: any(map(wanted, list(self.messages))), timeout_s, what)
        return next(message for message in self.messages if wanted(message))

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class LooseDaemon(Daemon):
    """A daemon that a test starts without waiting for its watches, asks over its socket, crashes and starts again."""

    def __init__(
        self,
        place: tuple[Path, Path, Path],  # executable, where it unpacks itself, root
        clusters: Sequence[Cluster] = (),
        *,
        timing: Mapping[str, object] | None = None,
        config: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        executable, unpacked, root = place
        super().__init__(executable, unpacked, root, clusters, timing=timing or {})
        self.folder = root / "config"
        if config:
            text = json.dumps({**config, **({"timing": timing} if timing else {})})
            (self.folder / "config.yaml").write_text(text)
        self._environment.update(environment or {})
        self._subscribers: list[Subscriber] = []

    @property
    def socket_path(self) -> Path:
        """Where it listens."""
        return Path(self._environment["FABRIK_SOCKET"])

    @property
    def home(self) -> Path:
        """Its user's home."""
        return self.root / "home"

    def launch(self, limit: Callable[[], None] | None = None) -> None:
        """Start it in the foreground and wait until it answers; `limit` runs in the child before the executable."""
        self.spawn(limit)
        wait_until(self._answers, PATIENCE_S, "the daemon answers on its socket")

    def spawn(self, limit: Callable[[], None] | None = None) -> None:
        """Start it and wait for nothing."""
        with (self.root / "daemon.log").open("ab") as log:
            command = [self.python, str(self._executable), "start", "--foreground"]
            self._process = subprocess.Popen(
                command,
                env=self._environment,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=limit,  # noqa: PLW1509 - no other thread holds a lock that the child needs
            )

    def _answers(self) -> bool:
        assert self._process
        assert self._process.poll() is None, f"the daemon ended with {self._process.returncode}:\n{self.log}"
        try:
            return bool(self.ask("ping")["type"] != "error")
        except OSError:
            return False

    def wait_for_end(self) -> int:
        """Return its exit code, when it ends by itself."""
        assert self._process
        code = self._process.wait(PATIENCE_S)
        self._process = None
        return code

    def crash(self) -> None:
        """End it with SIGKILL; it may be started again."""
        assert self._process
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._process = None

    def kill(self) -> None:
        """End it and everything that listens to it."""
        for subscriber in self._subscribers:
            subscriber.close()
        super().kill()

    def ask(self, action: str, **fields: object) -> JsonObject:
        """Return the answer to one request over the socket."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(ANSWER_S)
            sock.connect(str(self.socket_path))
            sock.sendall(json.dumps({"action": action, **fields}).encode() + b"\n")
            with sock.makefile("rb") as file:
                answer: JsonObject = json.loads(file.readline())
        return answer

    def subscribe(self, **fields: object) -> Subscriber:
        """Return a subscriber that was told `subscribed`."""
        request = {"action": "subscribe", "clusters": ["*"], **fields}
        subscriber = Subscriber(self.socket_path, request)
        self._subscribers.append(subscriber)
        subscriber.wait_for(lambda message: message["type"] in {"subscribed", "error"}, "subscribed")
        return subscriber

    def cluster(self, name: str = "test") -> JsonObject:
        """Return what `status` says of a cluster; nothing where it does not know it."""
        found: list[JsonObject] = self.ask("status")["clusters"]
        return next((cluster for cluster in found if cluster["name"] == name), {"connected": False, "error": None})

    def watch(self, resource: str, cluster: str = "test") -> JsonObject:
        """Return what `status` says of one watch."""
        found: list[JsonObject] = self.cluster(cluster).get("watches", [])
        return next((watch for watch in found if watch["resource"] == resource), {"state": None, "error": None})

    def wait_connected(self, *names: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait until clusters are followed whole."""
        for name in names or ("test",):
            wait_until(lambda name=name: self.cluster(name)["connected"], timeout_s, f"{name} is connected")  # type: ignore[misc]

    def wait_words(self, words: str, cluster: str = "test", timeout_s: float = PATIENCE_S) -> str:
        """Wait until a cluster's error has these words; return it whole."""
        wait_until(lambda: words in (self.cluster(cluster)["error"] or ""), timeout_s, f"{cluster} says {words!r}")
        return str(self.cluster(cluster)["error"])

    def run_rows(self, cluster: str = "test") -> dict[str, JsonObject]:
        """Return the runs of a cluster that the daemon knows, by their plain id."""
        rows = self.ask("runs").get("runs", [])
        return {row["id"]: row for row in rows if row["cluster"] == cluster}

    def everything_said(self) -> bytes:
        """Return all that it wrote or told anywhere: log, status, its log ring, cache files, and the CLI's words."""
        said = [json.dumps(self.ask(action)).encode() for action in ("status", "clusters")]
        said.append(json.dumps(self.ask("logs", lines=2000)).encode())
        for words in (("status",), ("clusters", "list"), ("logs",)):
            done = self.cli(*words)
            said += [done.stdout.encode(), done.stderr.encode()]
        files = [self.root / "daemon.log", *(path for path in self.cache.parent.rglob("*") if path.is_file())]
        return b"\n".join([*said, *(path.read_bytes() for path in files)])

    @property
    def resident_bytes(self) -> int:
        """How much memory it holds."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")


def write_clusters(path: Path, entries: Iterable[Mapping[str, object]]) -> None:
    """Write a clusters.yaml, whole at once as an editor does."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"clusters": list(entries)}, indent=2))
    new.replace(path)
