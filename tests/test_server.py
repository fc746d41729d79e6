"""The daemon's socket through the built executable: every request and framing, subscriptions, hostile clients."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest
from clients import ANSWER_S, HttpConnection, LinesClient, WebSocketClient, http_request, http_stream
from fabrik_objects import Report, job, pod, run_id
from fakes import ModelServer
from harness import Cluster, Daemon, wait_until
from hosts import AS_ROOT, Host, answers, as_nobody
from worlds import TOTAL, World, made_world, report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from clients import Message
    from fakes import Authority, KubernetesApi

    MakeDaemon = Callable[..., Daemon]
    MakeHost = Callable[..., Host]
    Serve = Callable[[KubernetesApi], None]

NODE: Final = shutil.which("node") or shutil.which("nodejs")
CURL: Final = shutil.which("curl")
STATUS_KEYS: Final = {
    "version",
    "protocol",
    "pid",
    "uptime_seconds",
    "socket",
    "cache",
    "runs",
    "subscribers",
    "clusters",
}
CLUSTER_KEYS: Final = {"name", "server", "connected", "synced", "last_event_at", "error", "watches"}
WATCH_KEYS: Final = {"resource", "namespace", "state", "error"}
ERROR_KEYS: Final = {"type", "code", "message", "hint"}
ROW_PAGE: Final = 5  # rows of the module's two clusters


@pytest.fixture(scope="module")
def world(
    authority: Authority, executable: Path, unpacked: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    with made_world(authority, executable, unpacked, tmp_path_factory.mktemp("world")) as made:
        yield made


@pytest.fixture(autouse=True)
def no_defects(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test during which a callback of the module's daemon failed."""
    if "world" not in request.fixturenames:
        yield
        return
    daemon = request.getfixturevalue("world").daemon
    before = len(daemon.log)
    yield
    assert "this is a defect" not in daemon.log[before:]


@pytest.fixture
def model(authority: Authority, serve: Serve) -> ModelServer:
    """Return a cluster with one run."""
    server = ModelServer(authority)
    server.put("jobs", job(1))
    serve(server)
    return server


@pytest.fixture
def make_host(executable: Path, unpacked: Path, tmp_path: Path) -> Iterator[Callable[..., Host]]:
    """Make daemons (not started yet) that follow these clusters; at the end none is left."""
    with contextlib.ExitStack() as hosts:
        yield lambda *clusters, **timing: hosts.enter_context(
            Host(executable, unpacked, tmp_path, clusters, timing=timing)
        )


# ---------------------------------------------------------------- every request, in every framing


class Framing(NamedTuple):
    """One way to ask."""

    name: str
    ask: Callable[[Path, str, dict[str, Any]], Message]


def ask_lines(path: Path, action: str, fields: dict[str, Any]) -> Message:
    with LinesClient(path) as client:
        return client.ask(action, **fields)


ROUTES: Final = {
    "status": "/v1/status",
    "ping": "/v1/ping",
    "runs": "/v1/runs",
    "clusters": "/v1/clusters",
    "query": "/v1/query",
    "logs": "/v1/logs",
    "reload": "/v1/reload",
    "shutdown": "/v1/shutdown",
}


def ask_http(path: Path, action: str, fields: dict[str, Any]) -> Message:
    if action == "run":
        return http_request(path, f"/v1/runs/{fields['runId']}?id={fields.get('id', '')}").message
    return http_request(path, ROUTES[action], method="POST", body=json.dumps(fields).encode()).message


def ask_websocket(path: Path, action: str, fields: dict[str, Any]) -> Message:
    with WebSocketClient(path) as client:
        return client.ask(action, **fields)


FRAMINGS: Final = [Framing("lines", ask_lines), Framing("http", ask_http), Framing("websocket", ask_websocket)]


@pytest.fixture(params=FRAMINGS, ids=lambda framing: framing.name)
def ask(request: pytest.FixtureRequest, world: World) -> Callable[..., Message]:
    """Return how to ask the module's daemon, in one framing; every answer echoes the id."""
    framing: Framing = request.param

    def ask_one(action: str, **fields: Any) -> Message:
        message = framing.ask(world.socket, action, {"id": "7-a", **fields})
        assert message["id"] == "7-a"
        return message

    return ask_one


def test_status(ask: Callable[..., Message], world: World) -> None:
    status = ask("status")
    assert status["type"] == "status"
    assert set(status) >= STATUS_KEYS
    assert (status["pid"], status["runs"], status["protocol"]) == (world.daemon.pid, ROW_PAGE, 1)
    assert Path(status["cache"]) == world.daemon.cache
    assert [cluster["name"] for cluster in status["clusters"]] == ["dev-k3s", "prod"]
    for cluster in status["clusters"]:
        assert set(cluster) >= CLUSTER_KEYS
        assert (cluster["connected"], cluster["synced"], cluster["error"]) == (True, True, None)
        assert len(cluster["watches"]) == 5
        assert all(set(watch) >= WATCH_KEYS and watch["state"] == "watching" for watch in cluster["watches"])


def test_ping(ask: Callable[..., Message]) -> None:
    assert ask("ping")["type"] == "ping"


def test_runs_list(ask: Callable[..., Message]) -> None:
    answer = ask("runs")
    assert [run["run_id"] for run in answer["runs"]] == [run_id(number) for number in (5, 4, 3, 2, 1)]
    assert {part["cluster"]: bool(part["synced_at"]) for part in answer["clusters"]} == {"dev-k3s": True, "prod": True}
    assert answer["runs"][0]["progress_finished"] == 50


def test_runs_list_of_a_cluster_a_status_and_so_many(ask: Callable[..., Message]) -> None:
    def listed(**fields: Any) -> list[str]:
        return [run["run_id"] for run in ask("runs", **fields)["runs"]]

    assert listed(clusters=["prod"]) == [run_id(5)]
    assert listed(clusters=["*"], limit=2) == [run_id(5), run_id(4)]
    assert listed(filter={"status": ["running", "blocked"]}) == [run_id(5), run_id(2), run_id(1)]
    assert listed(clusters=["dev-k3s"], filter={"status": ["finished"]}) == [run_id(4)]
    assert listed(filter={"status": ["cancelled"]}) == []


def test_runs_show(ask: Callable[..., Message]) -> None:
    run = ask("run", runId=run_id(1))["run"]
    assert (run["run_id"], run["status"], run["cluster"]) == (run_id(1), "running", "dev-k3s")
    assert [volume["name"] for volume in run["volumes"]] == [f"data-fabrik-{run_id(1)}"]
    assert run["events"][0]["event_type"] == "status_changed"


def test_query(ask: Callable[..., Message]) -> None:
    answer = ask("query", sql="SELECT run_id, progress_finished FROM runs WHERE status = 'blocked'")
    assert (answer["columns"], answer["rows"]) == (["run_id", "progress_finished"], [[run_id(2), 20]])


def test_clusters_list(ask: Callable[..., Message], world: World) -> None:
    answer = ask("clusters")
    assert [row["name"] for row in answer["clusters"]] == ["dev-k3s", "prod"]
    assert [row["server"] for row in answer["clusters"]] == [world.dev.url, world.prod.url]
    assert all(row["connected"] for row in answer["clusters"])


def test_logs(ask: Callable[..., Message]) -> None:
    lines = ask("logs", lines=1000)["lines"]
    assert any(line["message"] == "dev-k3s: following fabrik-runs" for line in lines)
    assert {"time", "level", "message"} == set(lines[0])
    assert ask("logs", lines=2)["lines"] == ask("logs", lines=1000)["lines"][-2:]
    assert ask("logs", lines=1000, level="error")["lines"] == []


def test_reload_where_nothing_changed(ask: Callable[..., Message]) -> None:
    answer = ask("reload")
    assert [answer[what] for what in ("added", "changed", "removed")] == [[], [], []]


@pytest.mark.parametrize(
    ("action", "fields", "code"),
    [
        ("run", {"runId": "01jk7v8x9m3qn5r2t4w6y8z0ab"}, "not_found"),
        ("runs", {"clusters": ["pord"]}, "not_found"),
        ("runs", {"filter": {"status": ["runing"]}}, "bad_request"),
        ("runs", {"limit": "five"}, "bad_request"),
        ("query", {"sql": "DELETE FROM runs"}, "bad_request"),
        ("query", {}, "bad_request"),
        ("logs", {"level": "loud"}, "bad_request"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_error(ask: Callable[..., Message], action: str, fields: dict[str, Any], code: str) -> None:
    error = ask(action, **fields)
    assert set(error) >= ERROR_KEYS
    assert (error["type"], error["code"]) == ("error", code)
    assert error["message"]


def test_an_unknown_action_is_told_the_nearest(world: World) -> None:
    with world.connect() as client:
        error = client.ask("rnus", id=1)
    assert (error["type"], error["code"], error["id"]) == ("error", "bad_request", 1)
    assert "'runs'" in error["hint"]


@pytest.mark.parametrize("identity", [0, "", "a", None, [1, {"b": 2}], 1.5, "\u2028\x1b[31m"])
def test_any_id_is_echoed(world: World, identity: object) -> None:
    with world.connect() as client:
        assert client.ask("ping", id=identity) == {"type": "ping", "id": identity}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_what_no_json_parser_reads_is_never_sent(world: World, number: str) -> None:
    with world.connect() as client:
        client.send(b'{"action":"ping","id":' + number.encode() + b"}\n")
        line = client.line()
    json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_without_an_id_none_is_sent(world: World) -> None:
    with world.connect() as client:
        assert client.ask("ping") == {"type": "ping"}


# ---------------------------------------------------------------- HTTP


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
@pytest.mark.parametrize("url", ["http://localhost/status", "http://localhost/daemon/v1/status"])
def test_curl_gets_the_status(world: World, url: str) -> None:
    done = subprocess.run(
        [str(CURL), "-sS", "--fail", "--max-time", "20", "--unix-socket", str(world.socket), url],
        capture_output=True,
        check=True,
    )
    status = json.loads(done.stdout)
    assert set(status) >= STATUS_KEYS
    assert status["clusters"][0]["watches"][0]["resource"]


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
def test_curl_posts_a_large_query(world: World) -> None:
    sql = "SELECT 1 AS one -- " + "x" * 1_040_000
    done = subprocess.run(
        [str(CURL), "-sS", "--max-time", "30", "--unix-socket", str(world.socket), "http://localhost/v1/query", "-d@-"],
        input=json.dumps({"sql": sql}).encode(),
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout).get("rows") == [[1]], done.stdout[:300]


def test_get_takes_parameters(world: World) -> None:
    listed = http_request(world.socket, "/v1/runs?cluster=dev-k3s&status=running&status=blocked&limit=1").message
    assert [run["run_id"] for run in listed["runs"]] == [run_id(2)]
    assert http_request(world.socket, "/v1/query?sql=SELECT%201%20AS%20n").message["rows"] == [[1]]
    assert len(http_request(world.socket, "/v1/logs?lines=3").message["lines"]) == 3


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/runs/01jk7v8x9m3qn5r2t4w6y8z0ab", 404),
        ("GET", "/v1/runs?status=runing", 400),
        ("GET", "/v1/runs?limit=%C2%B2", 400),
        ("GET", "/v1/runs?limit=-1", 400),
        ("GET", "//[", 404),
        ("GET", "/v1/reload", 405),
        ("GET", "/v1/shutdown", 405),
        ("DELETE", "/v1/runs", 405),
    ],
)
def test_an_http_error_has_its_status(world: World, method: str, target: str, status: int) -> None:
    answer = http_request(world.socket, target, method=method)
    assert answer.status == status
    assert set(answer.message) >= ERROR_KEYS
    assert answer.headers["content-type"] == "application/json"
    world.assert_answers()


@pytest.mark.parametrize("target", ["/status", "/v1/runs", "/v1/runs/nothing", "/v1/query?sql=SELECT%201"])
def test_head_is_get_without_its_body(world: World, target: str) -> None:
    answer = http_request(world.socket, target, method="HEAD")
    assert answer.body == b""
    assert answer.status == http_request(world.socket, target).status
    world.assert_answers()


def test_one_http_connection_takes_many_requests(world: World) -> None:
    connection = HttpConnection(world.socket)
    with contextlib.closing(connection):
        for target in ("/status", "/v1/runs", "/nothing", "/v1/query?sql=SELECT%201", "/status"):
            connection.request("GET", target)
            assert json.loads(connection.getresponse().read())["type"]


def test_http_1_0_gets_its_answer_and_the_end(world: World) -> None:
    with world.connect() as client:
        client.send(b"GET /status HTTP/1.0\r\n\r\n")
        head, _, body = client.rest().partition(b"\r\n\r\n")
    assert b" 200 " in head.split(b"\r\n")[0]
    assert json.loads(body)["pid"] == world.daemon.pid


def test_thousands_of_pipelined_http_requests_are_all_answered(world: World) -> None:
    count = 3000
    with world.connect() as client:
        sender = threading.Thread(target=client.send, args=(b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n" * count,))
        sender.start()
        answered = 0
        with contextlib.suppress(socket.timeout):
            while answered < count:
                answered += client.line().startswith(b"HTTP/1.1 404")
        sender.join(ANSWER_S)
    assert answered == count
    world.assert_answers()


# ---------------------------------------------------------------- how requests arrive


def test_a_request_split_byte_by_byte(world: World) -> None:
    with world.connect() as client:
        for byte in b'{"action": "runs", "id": "\xc3\xa4}{", "limit": 1}\n':
            client.send(bytes([byte]))
        answer = client.message()
    assert (answer["type"], answer["id"], len(answer["runs"])) == ("runs", "ä}{", 1)


def test_an_http_request_split_byte_by_byte(world: World) -> None:
    with world.connect() as client:
        for byte in b"GET /v1/runs?limit=1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n":
            client.send(bytes([byte]))
        assert client.rest().startswith(b"HTTP/1.1 200")


def test_several_requests_in_one_packet(world: World) -> None:
    with world.connect() as client:
        client.send(
            b'{"action":"ping","id":1}\n\n  {"action":"status","id":2}{"action":"ping","id":3}\r\n{"action":"ping"'
        )
        assert [client.message()["id"] for _ in range(3)] == [1, 2, 3]
        client.send(b',"id":4}')
        assert client.message()["id"] == 4


def test_no_newline_is_needed(world: World) -> None:
    with world.connect() as client:
        client.send(b'{"action":"ping","id":{"deep":["}"]}}')
        assert client.message()["type"] == "ping"


@pytest.mark.parametrize(
    "request_bytes",
    [b'{"action":"query","sql":"SELECT 1"}', b"GET /v1/query?sql=SELECT%201 HTTP/1.1\r\nHost: a\r\n\r\n"],
    ids=["lines", "http"],
)
def test_a_half_closed_client_still_gets_its_answer(world: World, request_bytes: bytes) -> None:
    with world.connect() as client:
        client.send(request_bytes)
        client.socket.shutdown(socket.SHUT_WR)
        rest = client.rest()  # and the end of the connection
    assert b'"rows":[[1]]' in rest


def test_a_half_closed_client_gets_a_large_answer_however_slowly_it_reads(world: World) -> None:
    counted = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c LIMIT 9000)"
    sql = f"{counted} SELECT n, '{'x' * 200}' FROM c"  # noqa: S608 - the SQL is the test's own
    with world.connect() as client:
        client.request("query", sql=sql)
        client.socket.shutdown(socket.SHUT_WR)
        wait_until(lambda: select.select([client.socket], [], [], 0)[0], ANSWER_S, "the answer has begun")
        world.assert_answers()
        answer = client.message()
    assert len(answer["rows"]) == 9000


# ---------------------------------------------------------------- subscriptions


def events(messages: list[Message]) -> list[tuple[str, str, int]]:
    """Return what run events tell: type, run and progress."""
    kept = [message for message in messages if message["type"].startswith("run:")]
    return [(message["type"], message["runId"], message["progress"]["finished"]) for message in kept]


def finished_is(count: int) -> Callable[[Message], bool]:
    return lambda message: (message.get("progress") or {}).get("finished") == count


def test_a_subscription(world: World) -> None:
    with world.connect() as client:
        subscribed = client.ask("subscribe", id="s", clusters=["*"])
        assert (subscribed["type"], subscribed["id"]) == ("subscribed", "s")
        assert subscribed["stream"]
        report(1, 11, server=world.dev)
        (event,) = client.until(finished_is(11))
        assert event["seq"] == subscribed["seq"] + 1
        wanted = {"type": "run:updated", "cluster": "dev-k3s", "runId": run_id(1), "namespace": "fabrik-runs"}
        state = {"status": "running", "previousStatus": "running", "phase": "implement", "currentTask": "16:impl"}
        assert event.items() >= {**wanted, **state, "progress": {"finished": 11, "total": TOTAL}}.items()
        assert (event["row"]["run_id"], event["row"]["progress_finished"]) == (run_id(1), 11)
        assert {"clusterTimestamp", "localTimestamp"} <= set(event)
        assert "history" not in event
        world.dev.put("jobs", job(6))
        first = client.message()
        assert (first["type"], first["runId"], first["previousStatus"]) == ("run:added", run_id(6), None)
        world.dev.put("pods", pod(6, report=Report(finished=1)))
        assert {one["type"] for one in client.until(finished_is(1))} == {"run:updated"}
        assert world.daemon.json("status")["subscribers"] == 1
    wait_until(lambda: world.daemon.json("status")["subscribers"] == 0, ANSWER_S, "a subscriber that hung up is let go")


def test_subscribing_over_http(world: World) -> None:
    stream = http_stream(world.socket, "/v1/stream?cluster=prod&includeHistory=1")
    assert next(stream)["type"] == "subscribed"
    history = next(stream)
    assert (history["history"], history["cluster"]) == (True, "prod")
    report(1, 12, server=world.dev)
    report(5, 51, server=world.prod)
    event = next(stream)
    assert (event["runId"], event["progress"]["finished"]) == (run_id(5), 51)
    stream.close()  # type: ignore[attr-defined]
    world.assert_answers()


def test_a_subscription_to_one_cluster(world: World) -> None:
    with world.connect() as client:
        client.ask("subscribe", clusters=["prod"])
        report(1, 13, server=world.dev)
        report(5, 52, server=world.prod)
        assert events(client.until(finished_is(52))) == [("run:updated", run_id(5), 52)]


def test_a_run_that_leaves_the_filter_is_told_once(world: World) -> None:
    with world.connect() as client:
        client.ask("subscribe", clusters=["*"], filter={"status": ["blocked"]})
        report(1, 14, server=world.dev)  # not blocked: not told
        report(2, 21, phase="human-gate", server=world.dev)
        report(2, 22, server=world.dev)  # it leaves
        report(2, 23, server=world.dev)  # not told
        report(2, 24, phase="human-gate", server=world.dev)  # it is back
        told = client.until(finished_is(24))
    assert [(message["progress"]["finished"], message.get("left", False)) for message in told] == [
        (21, False),
        (22, True),
        (24, False),
    ]
    assert (told[1]["previousStatus"], told[1]["status"]) == ("blocked", "running")


def test_history_is_what_matched_at_its_own_time(world: World) -> None:
    for finished, phase in ((30, "implement"), (31, "human-gate"), (32, "implement"), (33, "implement")):
        report(2, finished, phase=phase, server=world.dev)
    world.daemon.settle()
    with world.connect() as client:
        client.ask("subscribe", filter={"status": ["blocked"]}, clusters=["dev-k3s"], includeHistory=2)
        told = [client.message() for _ in range(2)]
        assert [(one["progress"]["finished"], one.get("left", False)) for one in told] == [(31, False), (32, True)]
        assert all(one["history"] is True for one in told)
        report(2, 34, phase="human-gate", server=world.dev)
        live = client.message()
        assert (live["progress"]["finished"], "history" in live) == (34, False)


def test_between_history_and_live_there_is_no_gap_and_no_repeat(world: World) -> None:
    """Subscribers come all the while changes do; each must see one unbroken row of numbers, history then live."""
    count = 600
    for finished in range(101, 131):
        report(5, finished, server=world.prod)
    world.daemon.settle()

    def churn() -> None:
        for finished in range(1, count + 1):
            report(5, 130 + finished, server=world.prod)
            time.sleep(0.001)

    churning = threading.Thread(target=churn)
    churning.start()
    clients: list[LinesClient] = []
    while churning.is_alive() and len(clients) < 40:
        clients.append(world.connect())
        clients[-1].request("subscribe", clusters=["prod"], includeHistory=20)
        time.sleep(0.01)
    churning.join()
    with contextlib.ExitStack() as all_clients:
        for client in clients:
            all_clients.enter_context(client)
        for client in clients:
            messages = client.until(finished_is(130 + count))
            assert messages[0]["type"] == "subscribed"
            assert [one["seq"] for one in messages if one.get("history")] <= [messages[0]["seq"]]
            seqs = [one["seq"] for one in messages[1:]]
            told = [one["progress"]["finished"] for one in messages[1:]]
            flags = [one.get("history", False) for one in messages[1:]]
            assert flags == sorted(flags, reverse=True), "history comes first"
            assert sum(flags) == 20
            assert told[20:] == list(range(told[19] + 1, 131 + count)), "live goes on where history ends"
            assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
            assert seqs[19] == messages[0]["seq"]


def test_logs_follow(world: World) -> None:
    with world.connect() as client:
        subscribed = client.ask("logs", follow=True, lines=1, level="info", id=9)
        assert (subscribed["type"], subscribed["id"]) == ("subscribed", 9)
        assert client.message()["type"] == "log"
        with world.connect() as other:
            other.ask("reload")
        message = client.message()
        assert (message["type"], message["level"]) == ("log", "info")
        assert message["message"].startswith("reloaded")


@pytest.mark.parametrize(
    ("action", "fields"),
    [
        ("subscribe", {"clusters": ["nothing-comes-from-there"]}),
        ("logs", {"follow": True, "lines": 0, "level": "error"}),
    ],
    ids=["subscribe", "logs"],
)
def test_those_who_hang_up_are_let_go_though_nothing_is_to_be_told(
    action: str, fields: dict[str, Any], model: ModelServer, make_host: MakeHost
) -> None:
    """No line is due to them, so nothing but the connection's end can tell; 1,000 of them must not shut others out."""
    daemon = make_host(Cluster(model))
    daemon.launch()
    for number in range(1100):
        wait_until(lambda: answers(daemon.socket), ANSWER_S, f"it answers after {number}")
        with LinesClient(daemon.socket) as client:
            assert client.ask(action, **fields)["type"] == "subscribed"
    wait_until(lambda: daemon.status()["subscribers"] == 0, ANSWER_S, "all are let go")


@pytest.mark.parametrize(
    "fields", [{"action": "subscribe"}, {"action": "logs", "follow": True}], ids=["events", "logs"]
)
def test_a_half_closed_subscriber_is_told_all_the_same(fields: dict[str, Any], world: World) -> None:
    with world.connect() as client:
        client.send(json.dumps(fields).encode())
        client.socket.shutdown(socket.SHUT_WR)
        assert client.message()["type"] == "subscribed"
        report(5, 53, server=world.prod)
        world.daemon.cli("reload")
        client.until(
            finished_is(53) if fields["action"] == "subscribe" else lambda one: "reloaded" in one.get("message", "")
        )


@pytest.mark.skipif(NODE is None, reason="node is not installed")
@pytest.mark.parametrize("updates", [1, 30], ids=["little to tell", "much to tell at once"])
def test_the_client_of_the_specification(world: World, updates: int) -> None:
    first = 100 * updates
    for finished in range(first, first + updates):
        report(1, finished, server=world.dev)
    world.daemon.settle()
    script = Path(__file__).parent / "data" / "spec_client.js"
    environment = {**os.environ, "FABRIK_SOCKET": str(world.socket)}
    client = subprocess.Popen(
        [str(NODE), str(script)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert client.stdout
    assert client.stderr
    try:
        wait_until(
            lambda: http_request(world.socket, "/status").message["subscribers"] or client.poll() is not None,
            ANSWER_S,
            "the client has subscribed",
        )
        for finished in range(first + updates, first + 2 * updates):
            report(1, finished, server=world.dev)
        seen: list[Message] = []
        watchdog = threading.Timer(ANSWER_S, client.kill)
        watchdog.start()
        for line in client.stdout:
            seen.append(json.loads(line))
            if finished_is(first + 2 * updates - 1)(seen[-1]):
                break
        watchdog.cancel()
        client.kill()
        assert client.stderr.read() == b""
    finally:
        client.kill()
        client.wait()
        client.stdout.close()
        client.stderr.close()
    assert seen[0]["type"] == "subscribed"
    history = [one for one in seen if one.get("history")]
    assert len(history) <= 100
    told = [one["progress"]["finished"] for one in seen[1:] if one["runId"] == run_id(1) and one["progress"]]
    assert told[-2 * updates :] == list(range(first, first + 2 * updates))


# ---------------------------------------------------------------- hostile and unlucky clients

GARBAGE: Final = [
    b"\x00\x01\x02\xff\xfe\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n",  # a TLS ClientHello
    b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/query HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/query HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    b"POST /v1/query HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nnot json!",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    b"[1, 2, 3]\n",
    b'"words"\n',
    b"}}}}\n",
    b"{" * 100_000 + b"\n",
    b"[" * 100_000 + b"]" * 100_000 + b"\n",
    b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"\n",
    b'{"action":' + b"9" * 6000 + b"}\n",
    b'{"action":"ping","action":["x"]}\n',
    b'{"action":"runs","clusters":{"a":1}}\n',
    b'{"action":"runs","filter":[]}\n',
    b'{"action":"runs","limit":true}\n',
    b'{"action":"subscribe","includeHistory":-1}\n',
    b'{"action":"subscribe","includeHistory":"many"}\n',
    b'{"action":"run","runId":"\\ud800"}\n',
    b'{"action":"query","sql":"SELECT \\u0000"}\n',
    b'{"action":"query","sql":"\\ud800"}\n',
    b'{"action":"logs","level":["info"]}\n',
    b'{"action":"ping","cache":["/"]}\n',
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_gets_an_error(world: World, garbage: bytes) -> None:
    with world.connect() as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.send(garbage)
        line = client.line()
        while line and not line.startswith(b"{"):  # the head of an HTTP response
            line = client.line()
        error = json.loads(line)
    assert set(error) >= ERROR_KEYS
    assert error["type"] == "error"
    assert "defect" not in error["message"]
    world.assert_answers()


def test_after_an_error_the_connection_goes_on(world: World) -> None:
    with world.connect() as client:
        client.send(b'{nonsense}\n\xff\xfe\n{"action":"ping","id":1}\n')
        assert [client.message()["type"] for _ in range(3)] == ["error", "error", "ping"]


@pytest.mark.parametrize(
    "prefix",
    [b'{"action":"ping","id":"', b"\xff", b"POST /v1/query HTTP/1.1\r\nHost: a\r\nContent-Length: 10000000\r\n\r\n"],
    ids=["json", "garbage", "http"],
)
def test_a_line_of_10_mb_gets_an_error(world: World, prefix: bytes) -> None:
    before = resident_kib(world.daemon.pid)
    with world.connect() as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.send(prefix + b"x" * 10_000_000)
        rest = client.rest()
    assert b'"type":"error"' in rest
    assert b"1048576 bytes" in rest
    assert resident_kib(world.daemon.pid) - before < 16 * 1024
    world.assert_answers()


@pytest.mark.parametrize(
    "half", [b'{"action": "sta', b"GET /status HTTP/1.1\r\nHo", b" "], ids=["json", "http", "blank"]
)
def test_half_a_request_and_silence_disturb_nobody(world: World, half: bytes) -> None:
    clients = [world.connect() for _ in range(200)]
    for client in clients:
        client.send(half)
    world.assert_answers()
    for client in clients:
        client.close()
    world.assert_answers()


def test_a_thousand_connections_opened_and_dropped(world: World) -> None:
    descriptors = len(os.listdir(f"/proc/{world.daemon.pid}/fd")) if sys.platform == "linux" else 0  # noqa: PTH208
    for number in range(1000):
        with world.connect() as client:
            client.send((b"", b"{", b'{"action":"status"}\n', b"GET /status HTTP/1.1\r\n")[number % 4])
    world.assert_answers()
    held = []
    for _ in range(1000):
        held.append(world.connect())
    for client in held:
        client.close()
    wait_until(lambda: answers(world.socket), ANSWER_S, "it answers again")
    world.assert_answers()
    if sys.platform == "linux":
        fds = Path(f"/proc/{world.daemon.pid}/fd")
        wait_until(lambda: len(list(fds.iterdir())) <= descriptors + 8, ANSWER_S, "all are let go")


def resident_kib(pid: int) -> int:
    """Return a process's resident memory."""
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_client_that_asks_and_never_reads_costs_no_memory(world: World) -> None:
    """Its answers pile up somewhere: in its own requests, which are no longer taken in."""
    before = resident_kib(world.daemon.pid)
    request = b'{"action":"runs"}\n' * 1000
    with world.connect() as client:
        client.socket.settimeout(1.0)
        with contextlib.suppress(socket.timeout):
            for _ in range(100):
                client.send(request)
        world.assert_answers()
        grown = resident_kib(world.daemon.pid) - before
    assert grown < 64 * 1024, f"{grown} KiB more"
    world.assert_answers()


def test_a_subscriber_that_never_reads_under_a_flood(
    authority: Authority, serve: Serve, make_daemon: MakeDaemon
) -> None:
    server = ModelServer(authority)
    serve(server)
    server.put("jobs", job(1))
    daemon = make_daemon(Cluster(server))
    daemon.start()
    path = Path(daemon.json("status")["socket"])
    changes = 9000  # of about 1.3 KB each: beyond what one subscriber may have waiting

    def changed_to(finished: int) -> None:
        server.put("pods", pod(1, report=Report(finished=finished, total=2 * changes)))

    changed_to(0)
    daemon.settle()
    with LinesClient(path, timeout_s=60) as lazy, LinesClient(path, timeout_s=60) as eager:
        assert lazy.ask("subscribe", clusters=["*"])["type"] == "subscribed"
        assert eager.ask("subscribe", clusters=["*"])["type"] == "subscribed"
        before = resident_kib(daemon.pid)
        told: list[int] = []
        lags: list[Message] = []

        def read() -> None:
            while not told or told[-1] < changes:
                message = eager.message()
                if message["type"] == "lagged":
                    lags.append(message)
                    return
                told.append(message["progress"]["finished"])

        reader = threading.Thread(target=read)
        reader.start()
        for finished in range(1, changes + 1):
            changed_to(finished)
            if finished % 100 == 0:
                wait_until(lambda seen=finished: lags or (told and told[-1] > seen - 400), 60, "the other one gets all")  # type: ignore[misc]
        reader.join(60)
        assert not lags, "the one that reads has lagged because of the other"
        assert told == list(range(1, changes + 1))
        grown = resident_kib(daemon.pid) - before
        answered_in = time.monotonic()
        with LinesClient(path) as third:
            assert third.ask("ping") == {"type": "ping"}
        assert time.monotonic() - answered_in < 5
        received = lazy.until(lambda message: message["type"] == "lagged")
        assert [one["progress"]["finished"] for one in received[:-1]] == list(range(1, len(received)))
        assert http_request(path, "/status").message["events_dropped"] >= received[-1]["dropped"] > 0
        (snapshot,) = lazy.until(lambda message: message["type"] == "snapshot")
        assert [row["progress_finished"] for row in snapshot["runs"]] == [changes]
        assert snapshot["last"] is True
        changed_to(changes + 1)
        assert lazy.message()["progress"]["finished"] == changes + 1, "after the snapshot it goes on live"
    limit = 8 + 16 + 24  # MiB: the queue of one, the last events for includeHistory, and room
    assert grown < limit * 1024, f"{grown} KiB more"


def test_what_history_keeps_is_bounded_however_long_its_texts(
    authority: Authority, serve: Serve, make_host: MakeHost
) -> None:
    server = ModelServer(authority)
    serve(server)
    server.put("jobs", job(1))
    daemon = make_host(Cluster(server))
    daemon.start()
    before = resident_kib(daemon.pid)
    for finished in range(5000):
        told = Report(task=f"{finished}:" + "x" * 4000, finished=finished, total=5000)
        server.put("pods", pod(1, report=told))
        if finished % 250 == 0:
            daemon.settle()
    daemon.settle()
    grown = resident_kib(daemon.pid) - before
    assert grown < 40 * 1024, f"{grown} KiB more"


def test_four_thousand_runs_take_6_kb_each_once_they_were_listed(
    authority: Authority, serve: Serve, make_host: MakeHost
) -> None:
    server, runs = ModelServer(authority), 4000
    serve(server)
    daemon = make_host(Cluster(server))
    daemon.start()
    before = resident_kib(daemon.pid)
    daemon.stop()
    for number in range(runs):
        server.put("jobs", job(number))
        server.put("pods", pod(number, report=Report(finished=1, total=2)))
    server.compact()
    daemon.start()
    counted = "SELECT count(*) AS n FROM runs WHERE pod_name IS NOT NULL"
    wait_until(lambda: daemon.rows(counted)[0]["n"] == runs, 60, "all are in the cache")
    grown = resident_kib(daemon.pid) - before
    assert grown < 8 * runs, f"{grown} KiB more"


# ---------------------------------------------------------------- who may ask


@pytest.mark.skipif(not AS_ROOT, reason="only root can be another user")
@pytest.mark.parametrize("request_bytes", [b'{"action":"ping"}\n', b"GET /status HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_a_peer_of_another_user_is_refused(world: World, request_bytes: bytes) -> None:
    """Even where the socket's mode would let it in."""
    world.socket.parent.chmod(0o755)
    world.socket.chmod(0o666)
    try:
        with as_nobody():
            client = world.connect()
    finally:
        world.socket.chmod(0o600)
        world.socket.parent.chmod(0o700)
    with client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.send(request_bytes)
        assert client.rest() == b""
    world.assert_answers()


# ---------------------------------------------------------------- what is not known yet


@pytest.mark.parametrize("framing", [framing.ask for framing in FRAMINGS], ids=[framing.name for framing in FRAMINGS])
def test_what_is_not_synced_is_an_error_and_never_an_empty_list(
    framing: Callable[[Path, str, dict[str, Any]], Message],
    authority: Authority,
    serve: Serve,
    make_host: MakeHost,
) -> None:
    server = ModelServer(authority)
    server.put("jobs", job(1))
    server.hold()
    serve(server)
    daemon = make_host(Cluster(server))
    daemon.launch()
    path = daemon.socket
    for action, fields in (
        ("runs", {}),
        ("runs", {"clusters": ["test"]}),
        ("runs", {"filter": {"status": ["running"]}}),
        ("run", {"runId": run_id(1)}),
        ("query", {"sql": "SELECT * FROM runs"}),
    ):
        error = framing(path, action, fields)
        assert (error["type"], error.get("code")) == ("error", "not_synced"), action
        assert "test" in error["message"], action
    status = framing(path, "status", {})
    assert (status["clusters"][0]["synced"], status["clusters"][0]["connected"]) == (False, False)
    assert framing(path, "runs", {"clusters": ["no-such"]})["code"] == "not_found"
    for words in (["runs", "list"], ["runs", "show", "--id", run_id(1)], ["query", "SELECT 1"]):
        done = daemon.cli(*words)
        assert (done.returncode, done.stdout) == (1, ""), words
        assert "not yet synced" in done.stderr, words
    server.resume()
    daemon.wait_for_watches()
    assert [run["run_id"] for run in framing(path, "runs", {})["runs"]] == [run_id(1)]
