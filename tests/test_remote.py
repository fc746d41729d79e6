"""Remote mode through the built executable: real TLS, who is let in and who is not, limits, and what never is told.

What clients do is done here with http.client, raw sockets and websocket-client; commands are in test_remote_commands.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import sqlite3
import ssl
import time
import warnings
from typing import TYPE_CHECKING, Any, Final

import pytest
import websocket
from clients import ANSWER_S, LinesClient, http_request
from cryptography.hazmat.primitives import serialization
from fabrik_objects import Report, job, pod, run_id
from fakes import ModelServer
from harness import Cluster, wait_until
from hosts import answers
from links import PIECE_BYTES
from remotes import BEARER, TOKEN, Certificate, RemoteHost, answer_of, ask, is_closed, message_of

import fabrik_daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fakes import Authority

    MakeRemote = Callable[..., RemoteHost]

QUICK: Final = {"batch": "10ms", "filesCheck": "100ms"}
SETTLE_S: Final = 20.0
PEER: Final = "127.0.0.1"
EVIL: Final = {**BEARER, "Host": "evil.example"}


def bearer_protocol(token: str) -> str:
    """Return the entry of Sec-WebSocket-Protocol by which a browser shows a token."""
    return "fabrik.bearer." + base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")


@pytest.fixture(scope="module")
def model(authority: Authority) -> Iterator[ModelServer]:
    with ModelServer(authority) as server:
        server.put("jobs", job(1))
        server.put("pods", pod(1, report=Report(phase="implement", status="running", finished=3, total=10)))
        yield server
    assert server.violations == []
    assert server.crashes == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate.make(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def remote(
    model: ModelServer,
    certificate: Certificate,
    executable: Path,
    unpacked: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RemoteHost]:
    """Return a daemon with TLS that all tests share which leave it as it is; what it says never holds its token."""
    root = tmp_path_factory.mktemp("remote")
    with RemoteHost(executable, unpacked, root, [Cluster(model)], timing=QUICK, tls=certificate) as host:
        host.environment["FABRIK_ALLOWED_HOSTS"] = "fabrik.example.com"
        host.environment["FABRIK_ALLOWED_ORIGINS"] = "https://dash.example.com"
        host.start()
        yield host
        status = json.dumps(host.status())
        host.stop()
        assert "this is a defect" not in host.log
        for told in (status, host.log, *(path.read_bytes().decode("latin-1") for path in host.cache.parent.iterdir())):
            assert TOKEN not in told
            assert base64.b64encode(TOKEN.encode()).decode()[:20] not in told


@pytest.fixture
def make_remote(model: ModelServer, executable: Path, unpacked: Path, tmp_path: Path) -> Iterator[MakeRemote]:
    """Make daemons in remote mode, not started yet; at the end none is left, and none has had a defect."""
    hosts: list[RemoteHost] = []

    def make(*, tls: Certificate | None = None, **timing: object) -> RemoteHost:
        root = tmp_path / f"remote{len(hosts)}"
        hosts.append(RemoteHost(executable, unpacked, root, [Cluster(model)], timing={**QUICK, **timing}, tls=tls))
        return hosts[-1]

    yield make
    for host in hosts:
        host.kill()
    for host in hosts:
        assert "this is a defect" not in host.log
        assert TOKEN not in host.log


# What is served ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/daemon"])
@pytest.mark.parametrize(
    ("route", "key"),
    [
        *(("/status", "clusters"), ("/v1/status", "version"), ("/v1/runs", "runs"), ("/v1/clusters", "clusters")),
        *((f"/v1/{name}", name) for name in ("schedules", "volumes", "warnings")),
    ],
)
def test_reading_routes_stand_under_both_paths(remote: RemoteHost, prefix: str, route: str, key: str) -> None:
    answer = remote.get(prefix + route)
    assert answer.status == 200
    assert key in answer.message


@pytest.mark.parametrize("route", ["/metrics", "/daemon/metrics"])
def test_metrics_are_told_without_a_token(remote: RemoteHost, route: str) -> None:
    answer = remote.get(route, {})
    assert answer.status == 200
    assert b"fabrik_daemon_cluster_connected" in answer.body


@pytest.mark.parametrize("route", ["/healthz", "/readyz", "/daemon/healthz", "/daemon/readyz"])
def test_health_is_told_without_a_token_and_under_any_name(remote: RemoteHost, route: str) -> None:
    assert remote.get(route, {}).status == 200
    assert remote.get(route, {"Host": "10.42.0.7:8080"}).status == 200


def test_a_run_is_shown_without_its_kept_log_lines(remote: RemoteHost) -> None:
    """Lines as the daemon keeps them of a failed run: its own host sees them, others do not, however they ask."""
    with contextlib.closing(sqlite3.connect(remote.cache, timeout=ANSWER_S)) as cache, cache:
        line = "INSERT INTO run_events (id, run_id, event_type, payload) VALUES (?, ?, 'log_line', ?)"
        cache.execute(line, (2**60, run_id(1), json.dumps({"line": "password=hunter2"})))
    here = http_request(remote.socket, f"/v1/runs/{run_id(1)}").message["run"]
    assert "hunter2" in json.dumps(here)
    shown = [remote.get(f"/v1/runs/{run_id(1)}").message["run"]]
    with contextlib.closing(remote.http_connection()) as connection:
        connection.request("POST", f"/v1/runs/{run_id(1)}", b'{"keptLogs": true}', BEARER)
        shown.append(answer_of(connection).message["run"])
    with contextlib.closing(remote.websocket()) as stream:
        shown.append(ask(stream, "run", runId=run_id(1), keptLogs=True)["run"])
    for run in shown:
        assert run["run_id"] == run_id(1)
        assert len(run["events"]) == len(here["events"]) - 1
        assert "hunter2" not in json.dumps(run)


def test_a_websocket_serves_every_reading_request(remote: RemoteHost) -> None:
    with contextlib.closing(remote.websocket()) as connection:
        for number, action in enumerate(("ping", "status", "runs", "schedules", "volumes", "warnings", "clusters")):
            answer = ask(connection, action, id=number)
            assert (answer["type"], answer["id"]) == (action, number)
        assert ask(connection, "run", runId=run_id(1))["run"]["run_id"] == run_id(1)


def test_changes_come_over_websocket_and_server_sent_events(remote: RemoteHost, model: ModelServer) -> None:
    stream = remote.http_connection()
    stream.request("GET", "/daemon/v1/stream", headers={**BEARER, "Accept": "text/event-stream"})
    response = stream.getresponse()
    assert response.getheader("Content-Type") == "text/event-stream"
    with contextlib.closing(remote.websocket()) as connection, contextlib.closing(stream):
        assert ask(connection, "subscribe")["type"] == "subscribed"
        model.put("pods", pod(1, report=Report(phase="implement", status="running", finished=4, total=10)))
        while message_of(connection)["type"] != "run:updated":
            pass
        lines = iter(response.readline, b"")
        assert any(b'"type":"run:updated"' in line for line in lines)


# TLS -----------------------------------------------------------------------------------------------------------------


def test_tls_is_1_2_at_least_and_names_its_protocol(remote: RemoteHost) -> None:
    with contextlib.closing(remote.connect()) as sock:
        assert isinstance(sock, ssl.SSLSocket)
        assert sock.version() in {"TLSv1.2", "TLSv1.3"}
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", remote.port), ANSWER_S) as sock, pytest.raises((ssl.SSLError, OSError)):
        old.wrap_socket(sock)


def test_plain_http_on_the_tls_port_gets_nothing(remote: RemoteHost) -> None:
    with socket.create_connection(("127.0.0.1", remote.port), ANSWER_S) as sock:
        sock.sendall(f"GET /healthz HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
        assert is_closed(sock)
    assert remote.get("/healthz").status == 200


def test_a_client_that_trusts_others_goes_no_further(remote: RemoteHost) -> None:
    sock = socket.create_connection(("127.0.0.1", remote.port), ANSWER_S)
    with contextlib.closing(sock), pytest.raises(ssl.SSLCertVerificationError):
        ssl.create_default_context().wrap_socket(sock, server_hostname="localhost")
    assert remote.get("/healthz").status == 200


def test_new_certificates_are_taken_up_and_broken_ones_are_not(make_remote: MakeRemote, tmp_path: Path) -> None:
    certificate = Certificate.make(tmp_path / "tls")
    host = make_remote(tls=certificate)
    host.launch()

    def serial() -> object:
        with contextlib.closing(host.connect()) as sock:
            assert isinstance(sock, ssl.SSLSocket)
            found = sock.getpeercert()
            assert found
            return found["serialNumber"]

    first = serial()
    certificate.issue()
    wait_until(lambda: serial() != first, SETTLE_S, "the new certificate is shown")
    second = serial()
    certificate.key.write_text("no key")
    wait_until(lambda: "goes on with the token and certificate from before" in host.log, SETTLE_S, "it is told")
    assert serial() == second
    certificate.issue()
    wait_until(lambda: serial() != second, SETTLE_S, "the third certificate is shown")


# Who is not let in ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong-wrong-wrong"}, {"Cookie": f"token={TOKEN}"}])
@pytest.mark.parametrize("route", ["/", "/status", "/v1/runs", "/v1/stream", "/daemon/v1/clusters", "/v1/none"])
def test_without_the_token_nothing_is_served(remote: RemoteHost, route: str, headers: dict[str, str]) -> None:
    answer = remote.get(route, headers)
    assert answer.status == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert (answer.message["code"], answer.message["exit_code"]) == ("unauthorized", 9)


def test_a_token_in_the_url_is_not_taken(remote: RemoteHost) -> None:
    assert remote.get(f"/v1/runs?token={TOKEN}&access_token={TOKEN}", {}).status == 401


@pytest.mark.parametrize(
    ("method", "target"),
    [("GET", "/v1/query?sql=SELECT+1"), ("GET", "/v1/logs"), ("POST", "/v1/reload"), ("POST", "/v1/shutdown")],
)
@pytest.mark.parametrize("prefix", ["", "/daemon"])
def test_what_is_not_for_remote_clients_is_refused(remote: RemoteHost, method: str, target: str, prefix: str) -> None:
    answer = remote.get(prefix + target, method=method)
    assert answer.status == 403
    assert (answer.message["code"], answer.message["exit_code"]) == ("refused", 9)
    assert answers(remote.socket)


@pytest.mark.parametrize("request_", [{"action": "query", "sql": "SELECT 1"}, {"action": "logs", "follow": True}])
def test_what_is_not_for_remote_clients_is_refused_over_websocket(
    remote: RemoteHost, request_: dict[str, object]
) -> None:
    with contextlib.closing(remote.websocket()) as connection:
        connection.send(json.dumps({**request_, "id": 7}))
        answer = message_of(connection)
        assert (answer["type"], answer["code"], answer["exit_code"], answer["id"]) == ("error", "refused", 9, 7)
        assert ask(connection, "ping") == {"type": "ping"}


def test_the_unix_socket_still_serves_everything(remote: RemoteHost) -> None:
    with LinesClient(remote.socket) as client:
        assert client.ask("query", sql="SELECT 1 AS one")["rows"]
        assert client.ask("logs", lines=1)["lines"]
    assert http_request(remote.socket, "/v1/runs").status == 200


@pytest.mark.parametrize("route", ["/v1/runs", "/v1/stream", "/metrics"])
def test_a_name_that_was_pointed_here_is_refused(remote: RemoteHost, route: str) -> None:
    """A web page whose name is made to point here ("DNS rebinding") comes with its own name in Host."""
    for host in ("evil.example", f"evil.example:{remote.port}", "localhost.evil.example"):
        answer = remote.get(route, {**BEARER, "Host": host})
        assert (answer.status, answer.message["code"]) == (403, "refused")
    assert remote.get("/v1/runs", {**BEARER, "Host": "Fabrik.Example.com"}).status == 200


def test_pages_of_other_hosts_are_refused(remote: RemoteHost) -> None:
    own = {"Host": f"localhost:{remote.port}", "Origin": f"https://localhost:{remote.port}"}
    for origin, status in (("https://evil.example", 403), ("null", 403), ("https://dash.example.com", 200)):
        assert remote.get("/v1/runs", {**BEARER, "Origin": origin}).status == status
    assert remote.get("/v1/runs", {**BEARER, **own}).status == 200


def test_a_browser_shows_its_token_as_a_protocol_and_it_is_not_echoed(remote: RemoteHost) -> None:
    offers = ["fabrik.v1", bearer_protocol(TOKEN)]
    with contextlib.closing(remote.websocket(header=[], subprotocols=offers)) as connection:
        assert connection.subprotocol == "fabrik.v1"
        assert "fabrik.bearer" not in json.dumps(connection.headers)
        assert ask(connection, "runs")["runs"]
    with contextlib.closing(remote.connect()) as sock:
        offered = f"Sec-WebSocket-Protocol: {bearer_protocol(TOKEN)}\r\n"
        sock.sendall(upgrade_request(offered))
        head = sock.recv(4096).decode()
        assert head.startswith("HTTP/1.1 101 ")
        assert "protocol" not in head.lower()


def upgrade_request(more: str) -> bytes:
    """Return the handshake of a WebSocket, byte for byte."""
    upgrade = "Host: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    return f"GET /v1/stream HTTP/1.1\r\n{upgrade}{key}{more}\r\n".encode()


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"header": []}, 401),
        ({"header": ["Authorization: Bearer wrong-wrong-wrong"]}, 401),
        ({"header": [], "subprotocols": ["fabrik.v1"]}, 401),
        ({"header": [], "subprotocols": ["fabrik.v1", bearer_protocol("wrong-wrong-wrong")]}, 401),
        ({"header": [], "subprotocols": ["fabrik.v1", f"fabrik.bearer.{TOKEN}"]}, 401),
        ({"host": "evil.example"}, 403),
        ({"suppress_origin": False, "origin": "https://evil.example"}, 403),
    ],
)
def test_websockets_are_refused_before_they_are_any(remote: RemoteHost, options: dict[str, Any], status: int) -> None:
    suppress = options.pop("suppress_origin", True)
    sock = remote.connect()
    with contextlib.closing(sock), pytest.raises(websocket.WebSocketBadStatusException) as raised:
        websocket.create_connection(
            f"ws://localhost:{remote.port}/v1/stream",
            socket=sock,
            suppress_origin=suppress,
            **{"header": [f"Authorization: Bearer {TOKEN}"], **options},
        )
    assert raised.value.status_code == status


def test_health_is_no_way_round_the_token(remote: RemoteHost) -> None:
    """A WebSocket must not begin on a path that needs no token."""
    for path in ("/healthz", "/readyz", "/metrics"):
        with contextlib.closing(remote.connect()) as sock:
            sock.sendall(upgrade_request("").replace(b"/v1/stream", path.encode()))
            assert not sock.recv(4096).startswith(b"HTTP/1.1 101")
    with contextlib.closing(remote.http_connection()) as connection:
        connection.request("GET", "/v1/runs", headers=BEARER)
        assert answer_of(connection).status == 200
        connection.request("GET", "/v1/runs")
        assert answer_of(connection).status == 401, "a token holds for its own request only"


def test_json_lines_are_for_the_unix_socket(remote: RemoteHost) -> None:
    with contextlib.closing(remote.connect()) as sock:
        sock.sendall(b'{"action": "runs"}\n\n')
        answer = sock.recv(4096)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert is_closed(sock)


# Tokens change -------------------------------------------------------------------------------------------------------


def test_a_new_token_is_taken_up_and_the_old_one_ends(make_remote: MakeRemote) -> None:
    host = make_remote()
    host.start()
    kept, dropped = host.websocket(), host.websocket()
    with contextlib.closing(kept), contextlib.closing(dropped):
        host.token_file.write_text(f"{TOKEN}\nthe-next-token-of-this-daemon\n")
        new = {"Authorization": "Bearer the-next-token-of-this-daemon"}
        wait_until(lambda: host.get("/status", new).status == 200, SETTLE_S, "the new token is good")
        assert host.get("/status").status == 200, "both are good while clients change over"
        assert ask(kept, "ping") == {"type": "ping"}
        host.token_file.write_text("the-next-token-of-this-daemon\n")
        wait_until(lambda: host.get("/status").status == 401, SETTLE_S, "the old token is good no more")
        for connection in (kept, dropped):
            assert connection.sock
            assert is_closed(connection.sock), "who came with the old token must come again"
        host.token_file.write_text("short\n")
        wait_until(lambda: "goes on with the token" in host.log, SETTLE_S, "a useless token is told")
        assert host.get("/status", new).status == 200
    assert "the-next-token-of-this-daemon" not in host.log
    assert "short" not in host.log


# Limits --------------------------------------------------------------------------------------------------------------


def test_slow_senders_are_cut_off(make_remote: MakeRemote, certificate: Certificate) -> None:
    host = make_remote(tls=certificate, request="1s")
    host.start()
    silent = socket.create_connection(("127.0.0.1", host.port), ANSWER_S)  # never shakes hands
    halting = socket.create_connection(("127.0.0.1", host.port), ANSWER_S)
    halting.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc")  # begins to
    quiet, dripping, partial = host.connect(), host.connect(), host.connect()
    partial.sendall(b"POST /v1/runs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    dripping.sendall(b"GET /v1/runs HTTP/1.1\r\nHost: localhost\r\n")
    began = time.monotonic()
    dripping.settimeout(0.1)
    answer = b""
    while not answer and time.monotonic() - began < ANSWER_S:
        with contextlib.suppress(socket.timeout, ssl.SSLWantReadError):
            dripping.sendall(b"X: y\r\n")
            answer = dripping.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408 "), answer
    for sock in (silent, halting, quiet, partial):
        assert is_closed(sock)
        sock.close()
    dripping.close()
    wait_until(lambda: host.remote_status()["connections"] == 0, SETTLE_S, "no connection is held")


def test_a_stream_outlasts_the_time_that_a_request_may_take(make_remote: MakeRemote) -> None:
    host = make_remote(request="500ms", ping="30s", idleSeq="200ms")
    host.start()
    stream = host.http_connection()
    stream.request("GET", "/v1/stream", headers=BEARER)
    response = stream.getresponse()
    with contextlib.closing(stream), contextlib.closing(host.websocket()) as connection:
        assert ask(connection, "subscribe")["type"] == "subscribed"
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            assert response.readline(), "the stream goes on"
            assert message_of(connection)


def test_connections_that_ask_nothing_more_are_let_go(make_remote: MakeRemote) -> None:
    host = make_remote(ping="300ms")
    host.start()
    with contextlib.closing(host.http_connection()) as connection:
        connection.request("GET", "/v1/runs", headers=BEARER)
        assert answer_of(connection).status == 200
        assert is_closed(connection.sock)
    with contextlib.closing(host.websocket()) as talking:
        until = time.monotonic() + 1.5
        talking.settimeout(0.1)
        while time.monotonic() < until:  # websocket-client answers pings while it reads
            with contextlib.suppress(websocket.WebSocketTimeoutException):
                talking.recv()
        talking.settimeout(ANSWER_S)
        assert ask(talking, "ping") == {"type": "ping"}


def test_long_headers_and_bodies_are_refused(remote: RemoteHost) -> None:
    for headers in ({"X-Long": "x" * 20_000}, {f"X-{number}": "x" * 500 for number in range(60)}):
        with contextlib.closing(remote.http_connection()) as connection:
            connection.request("GET", "/v1/runs", headers={**BEARER, **headers})
            assert answer_of(connection).status == 400
            assert connection.sock is None, "the daemon said that it closes"
    with contextlib.closing(remote.connect()) as sock:
        sock.sendall(b"POST /v1/runs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n" + b" " * 70_000)
        assert sock.recv(4096).startswith(b"HTTP/1.1 400 ")
        assert is_closed(sock)
    with contextlib.closing(remote.connect()) as sock:  # never ends
        with contextlib.suppress(OSError):
            sock.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 1_000_000)
        assert is_closed(sock)
    assert remote.get("/status").status == 200


def test_one_peer_cannot_have_every_connection(make_remote: MakeRemote) -> None:
    host = make_remote()
    host.start()
    most = fabrik_daemon.REMOTE_CONNECTIONS_EACH
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(contextlib.closing(host.connect(PEER))) for _ in range(most)]
        wait_until(lambda: host.remote_status()["connections"] == most, SETTLE_S, "all of them are held")
        more = stack.enter_context(contextlib.closing(host.connect(PEER)))
        assert is_closed(more)
        assert host.get("/status").status == 200, "another peer is not concerned"
        assert host.remote_status()["turned_away"] >= 1
        assert answers(host.socket), "nor is the Unix socket"
        held[0].close()
        wait_until(lambda: host.remote_status()["connections"] < most, SETTLE_S, "one is gone")
        assert host.get("/status").status == 200
    wait_until(lambda: "refused" in host.log, SETTLE_S, "it is logged")


HOSTILE: Final = (
    b"",
    b"\0" * 5000,
    b"\x16\x03\x01\xff\xff" + b"\xff" * 3000,
    b"{" * 5000,
    b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 5000,
    b"GET /v1/runs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
    b"GET /v1/runs HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n",
    b"POST /v1/runs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET http://evil.example/v1/runs HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)


@pytest.mark.parametrize("over_tls", [False, True])
def test_hostile_connections_leave_nothing_behind(
    make_remote: MakeRemote, certificate: Certificate, over_tls: bool
) -> None:
    """Of many peers, so that no limit of one helps; half of them hang up at once, the others wait for the end."""
    host = make_remote(tls=certificate if over_tls else None)
    host.start()
    descriptors = host.root.joinpath("/proc", str(host.pid), "fd")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else 0
    for number in range(300):
        data = HOSTILE[number % len(HOSTILE)]
        is_raw = over_tls and number % 3 == 0
        sock = host.connect() if not is_raw else socket.create_connection(("127.0.0.1", host.port), ANSWER_S)
        with contextlib.closing(sock), contextlib.suppress(OSError):
            sock.sendall(data)
            if number % 2 and not is_raw:
                sock.shutdown(socket.SHUT_WR)
                assert b"200" not in sock.recv(PIECE_BYTES)[:16]
    wait_until(lambda: host.remote_status()["connections"] == 0, SETTLE_S, "no connection is held")
    assert host.get("/v1/runs").status == 200
    assert answers(host.socket)
    if before:
        wait_until(lambda: len(list(descriptors.iterdir())) <= before + 3, SETTLE_S, "no descriptor is left")


def test_handshakes_are_counted_too(make_remote: MakeRemote, certificate: Certificate) -> None:
    """They cost a server more than its clients."""
    host = make_remote(tls=certificate)
    host.start()
    for _ in range(2000):
        with contextlib.suppress(OSError), contextlib.closing(host.connect(PEER)):
            pass
        if host.remote_status()["turned_away"]:
            break
    assert host.remote_status()["turned_away"]
    assert host.get("/status").status == 200, "another peer is not concerned"


def test_who_asks_too_often_is_told_to_wait(make_remote: MakeRemote) -> None:
    host = make_remote()
    host.start()
    with contextlib.closing(host.http_connection()) as connection:
        statuses = []
        for _ in range(2000):
            connection.request("GET", "/v1/ping", headers=BEARER)
            answer = answer_of(connection)
            statuses.append(answer.status)
            if answer.status == 429:
                break
        assert statuses.count(200) >= fabrik_daemon.REMOTE_REQUESTS_BURST - 1, "the connection counts as well"
        assert (answer.status, answer.message["code"]) == (429, "too_many_requests")
        assert int(answer.headers["retry-after"]) >= 1
        assert answers(host.socket)
        time.sleep(int(answer.headers["retry-after"]))
        connection.request("GET", "/v1/ping", headers=BEARER)
        assert answer_of(connection).status == 200


def test_guessing_is_slow(make_remote: MakeRemote) -> None:
    host = make_remote()
    host.start()
    with contextlib.closing(host.http_connection()) as connection:
        statuses = []
        for number in range(40):
            connection.request("GET", "/v1/ping", headers={"Authorization": f"Bearer guess-{number:016d}"})
            statuses.append(answer_of(connection).status)
    assert set(statuses) == {401, 429}
    assert statuses.count(401) < 25
    assert statuses[0] == 401


def test_behind_a_proxy_each_of_its_clients_has_a_rate_of_its_own(make_remote: MakeRemote) -> None:
    host = make_remote()
    host.environment["FABRIK_BEHIND_PROXY"] = "1"
    host.start()
    one, other = ({"X-Forwarded-For": f"198.51.100.1, {client}"} for client in ("203.0.113.9", "203.0.113.10"))
    with contextlib.closing(host.http_connection()) as connection:
        status = 0
        for number in range(100):
            headers = {**one, "Authorization": f"Bearer guess-{number:016d}"}
            connection.request("GET", "/v1/ping", headers=headers)
            status = answer_of(connection).status
            if status == 429:
                break
        connection.request("GET", "/v1/ping", headers={**other, **BEARER})
        assert (status, answer_of(connection).status) == (429, 200)
        most = fabrik_daemon.REMOTE_CONNECTIONS_EACH
        with contextlib.ExitStack() as stack:
            for _ in range(most + 5):
                stack.enter_context(contextlib.closing(host.connect(PEER)))
            wait_until(lambda: host.remote_status()["connections"] > most, SETTLE_S, "a proxy is many")


# Starting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"FABRIK_TOKEN_FILE": ""}, "remote mode needs a token"),
        ({"FABRIK_TOKEN_FILE": "/none"}, "/none: No such file or directory"),
        ({"FABRIK_TOKEN_FILE": "", "FABRIK_TOKEN": "short"}, "can be guessed"),
        ({"FABRIK_LISTEN": "*"}, "without TLS, tokens would cross the network"),
        ({"FABRIK_TLS_CERT": "/none", "FABRIK_TLS_KEY": "/none"}, "/none: No such file or directory"),
        ({"WEBSOCKET_PORT": "eighty"}, "is no port"),
        ({"MODE": "remot"}, "did you mean 'remote'?"),
    ],
)
def test_what_would_not_be_safe_does_not_start(make_remote: MakeRemote, environment: dict[str, str], said: str) -> None:
    host = make_remote()
    host.environment.update(environment)
    done = host.cli("start")
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert host.daemon_pids() == []


def test_certificates_that_do_not_load_are_told_with_their_files(make_remote: MakeRemote, tmp_path: Path) -> None:
    certificate, other = Certificate.make(tmp_path / "one"), Certificate.make(tmp_path / "two")
    host = make_remote(tls=certificate)
    host.environment["FABRIK_TLS_KEY"] = str(other.key)
    done = host.cli("start")
    assert done.returncode == 2
    assert f"{certificate.cert} and {other.key} do not load" in done.stderr
    key = serialization.load_pem_private_key(certificate.key.read_bytes(), None)
    pem, traditional = serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL
    certificate.key.write_bytes(key.private_bytes(pem, traditional, serialization.BestAvailableEncryption(b"secret")))
    host.environment["FABRIK_TLS_KEY"] = str(certificate.key)
    done = host.cli("start")
    assert done.returncode == 2
    assert f"{certificate.key}: the key is encrypted" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not socket.has_ipv6, reason="this host has no IPv6")
def test_it_listens_on_ipv6_where_that_is_asked(make_remote: MakeRemote) -> None:
    host = make_remote()
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("loopback has no IPv6")
    host.environment["FABRIK_LISTEN"] = "::1"
    host.launch()
    assert host.remote_status()["listen"] == f"[::1]:{host.port}"
    done = host.ask("status", "-o", "json", "--remote", f"ws://[::1]:{host.port}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pid"] == host.pid


def test_a_port_that_is_taken(make_remote: MakeRemote) -> None:
    host = make_remote()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        host.environment["WEBSOCKET_PORT"] = str(taken.getsockname()[1])
        done = host.cli("start")
    assert done.returncode == 2
    assert f"127.0.0.1:{host.environment['WEBSOCKET_PORT']}: Address already in use" in done.stderr


def test_flags_start_it_in_the_background_with_paths_of_this_folder(make_remote: MakeRemote, tmp_path: Path) -> None:
    host = make_remote(tls=Certificate.make(tmp_path / "tls"))
    port = host.environment["WEBSOCKET_PORT"]
    for name in ("MODE", "WEBSOCKET_PORT", "FABRIK_LISTEN", "FABRIK_TOKEN_FILE", "FABRIK_TLS_CERT", "FABRIK_TLS_KEY"):
        del host.environment[name]
    words = ["--mode", "remote", "--listen", "127.0.0.1", "--port", port, "--token-file", "token"]
    tls = ["--tls-cert", "../tls/tls.crt", "--tls-key", "../tls/tls.key", "--allow-host", "fabrik.example.com"]
    done = host.cli("start", *words, *tls)
    assert done.returncode == 0, done.stderr
    assert host.remote_status() == {
        "listen": f"127.0.0.1:{port}",
        "tls": True,
        "behind_proxy": False,
        "connections": 0,
        "turned_away": 0,
        "refused": 0,
    }
    assert host.get("/v1/runs", {**BEARER, "Host": "fabrik.example.com"}).status in {200, 503}
    assert host.cli("restart").returncode == 0
    assert host.status()["remote"] is None, "without the flags it serves this host alone"
    assert host.cli("stop").returncode == 0


def text_of(path: Path) -> str:
    """Return a file's text, empty where there is none."""
    return path.read_text() if path.exists() else ""


def test_a_token_of_the_environment_goes_to_the_daemon_and_no_further(make_remote: MakeRemote) -> None:
    """What the daemon starts, exec plugins for one, must not find it."""
    host = make_remote()
    host.environment.update(FABRIK_TOKEN=TOKEN, FABRIK_TOKEN_FILE="")
    plugin = host.root / "plugin"
    plugin.write_text(f'#!/bin/sh\nenv > "{host.root}/seen"\nexit 1\n')
    plugin.chmod(0o700)
    kubeconfig = host.root / "test.kubeconfig"
    text = json.loads(kubeconfig.read_text())
    user = {
        "exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(plugin), "interactiveMode": "Never"}
    }
    text["users"] = [{**entry, "user": user} for entry in text["users"]]
    kubeconfig.write_text(json.dumps(text))
    host.launch()
    wait_until(lambda: "FABRIK_CACHE" in text_of(host.root / "seen"), SETTLE_S, "the plugin has run")
    assert TOKEN not in (host.root / "seen").read_text()
    assert host.get("/status").status == 200


def test_clusters_come_from_a_folder_of_kubeconfigs(make_remote: MakeRemote, model: ModelServer) -> None:
    host = make_remote()
    folder = host.root / "mounted"
    (folder / "..data").mkdir(parents=True)
    for name in ("dev", "prod.yaml"):
        model.kubeconfig(folder / name)
    host.clusters = []
    (host.root / "config" / "clusters.yaml").unlink()
    host.environment["FABRIK_KUBECONFIG"] = str(folder)
    host.launch()

    def names() -> list[str]:
        return [row["name"] for row in host.get("/v1/clusters").message["clusters"]]

    assert names() == ["fabrik-test", "prod"]
    model.kubeconfig(folder / "staging")
    wait_until(lambda: "staging" in names(), SETTLE_S, "a file that came later is followed too")
