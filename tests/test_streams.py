"""What dashboards and scripts build on: lists, filters, cursors, snapshots, and the HTTP side of the socket."""

from __future__ import annotations

import contextlib
import gzip
import json
import signal
import threading
from typing import TYPE_CHECKING, Any, Final

import pytest
from clients import ANSWER_S, HttpConnection, LinesClient, WebSocketClient, http_request
from fabrik_objects import NAMESPACE, Report, cronjob, event, job, pod, pvc, run_id
from fakes import ModelServer
from harness import Cluster, wait_until
from hosts import Host
from worlds import World, made_world, report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from clients import Message
    from fakes import Authority, KubernetesApi

TABLES: Final = ("runs", "schedules", "volumes", "cluster_events", "clusters")


@pytest.fixture(scope="module")
def world(
    authority: Authority, executable: Path, unpacked: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    with made_world(authority, executable, unpacked, tmp_path_factory.mktemp("world")) as made:
        made.dev.put("cronjobs", cronjob("nightly"))
        made.dev.put("events", event(pod(1), "FailedMount", "no such volume"))
        made.daemon.settle()
        yield made


@pytest.fixture(params=[LinesClient, WebSocketClient], ids=["lines", "websocket"])
def client(request: pytest.FixtureRequest, world: World) -> Iterator[Any]:
    with request.param(world.socket) as made:
        yield made


@pytest.fixture
def model(authority: Authority, serve: Callable[[KubernetesApi], None]) -> ModelServer:
    server = ModelServer(authority)
    server.put("jobs", job(1))
    server.put("pods", pod(1, report=Report(finished=0, total=10**6)))
    serve(server)
    return server


@pytest.fixture
def make_host(executable: Path, unpacked: Path, tmp_path: Path) -> Iterator[Callable[..., Host]]:
    """Make daemons (not started yet) that follow these clusters; at the end none is left."""
    with contextlib.ExitStack() as hosts:
        yield lambda *clusters, **timing: hosts.enter_context(
            Host(executable, unpacked, tmp_path, clusters, timing=timing)
        )


# ---------------------------------------------------------------- lists, the same in every framing


@pytest.mark.parametrize(
    ("action", "named", "filters", "wrong"),
    [
        ("runs", [run_id(number) for number in (5, 4, 3, 2, 1)], {}, {}),
        ("runs", [run_id(2)], {"status": ["blocked"]}, {"status": "failed"}),
        ("runs", [run_id(5), run_id(1)], {"phase": ["implement"]}, {"phase": "done"}),
        ("runs", [run_id(3)], {"run_id": [run_id(3)], "namespace": [NAMESPACE]}, {"namespace": "other"}),
        ("schedules", ["fabrik-schedule-nightly"], {"name": ["fabrik-schedule-nightly"]}, {"schedule_id": "x"}),
        ("volumes", [f"data-fabrik-{run_id(1)}"], {"run_id": [run_id(1)]}, {"run_id": run_id(2)}),
        ("warnings", ["FailedMount"], {"reason": ["FailedMount"]}, {"reason": "BackOff"}),
    ],
)
def test_lists(world: World, action: str, named: list[str], filters: Message, wrong: Message) -> None:
    name = {"runs": "run_id", "warnings": "reason"}.get(action, "name")

    def listed(answer: Message) -> list[str]:
        assert (answer["type"], answer["id"]) == (action, 1)
        assert {part["cluster"]: part["connected"] for part in answer["clusters"]} == {"dev-k3s": True, "prod": True}
        return [row[name] for row in answer[action]]

    query = "&".join(f"{column}={value}" for column, values in filters.items() for value in values)
    for wanted, parameters, expected in (
        (filters, query, named),
        (wrong, "&".join(f"{column}={value}" for column, value in wrong.items()), [] if wrong else named),
    ):
        with world.connect() as lines, WebSocketClient(world.socket) as websocket:
            assert listed(lines.ask(action, filter=wanted, id=1)) == expected
            assert listed(websocket.ask(action, filter=wanted, id=1)) == expected
        assert listed(http_request(world.socket, f"/v1/{action}?id=1&{parameters}").message) == expected
        assert listed(http_request(world.socket, f"/daemon/v1/{action}?id=1&{parameters}").message) == expected


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"filter": {"spec": ["x"]}}, "spec_id"),
        ({"filter": {"type": ["run:*"]}}, ""),
        ({"filter": {"status": ["runing"]}}, "running"),
        ({"filter": {"status": 7}}, ""),
        ({"filter": ["status"]}, ""),
        ({"limit": -1}, ""),
    ],
)
def test_a_list_that_cannot_be_meant(client: Any, fields: Message, hint: str) -> None:
    error = client.ask("runs", id="e", **fields)
    assert (error["type"], error["code"], error["id"]) == ("error", "bad_request", "e")
    assert hint in error["hint"]
    assert error["message"]


# ---------------------------------------------------------------- subscriptions: what is asked for


RUN_1, RUN_2, LEFT = "run:updated 1", "run:updated 2", "run:updated 2 left"
VOLUME, WARNING = "volume:updated", "warning"


@pytest.mark.parametrize(
    ("filters", "told"),
    [
        ({"run_id": [run_id(1)]}, [RUN_1, VOLUME, WARNING]),
        ({"type": ["run:*"]}, [RUN_1, RUN_2, RUN_2]),
        ({"type": ["warning", "volume:updated"]}, [VOLUME, WARNING]),
        ({"type": ["volume:*"], "run_id": [run_id(1)]}, [VOLUME]),
        ({"phase": ["validate"]}, [RUN_2, LEFT]),
        ({"phase": ["validate"], "status": ["blocked"]}, []),
        ({"project": ["myapp"], "template": ["coding"], "spec_id": ["feature-x"]}, [RUN_1, RUN_2, RUN_2]),
        ({"project": ["no-such"]}, []),
        ({"namespace": [NAMESPACE]}, [RUN_1, RUN_2, VOLUME, WARNING, RUN_2]),
        ({"type": ["*"]}, [RUN_1, RUN_2, VOLUME, WARNING, RUN_2]),
        ({"type": ["run:added", "run:removed", "schedule:*", "cluster:*"]}, []),
    ],
)
def test_filters(client: Any, world: World, filters: Message, told: list[str]) -> None:
    step = world.dev.version("pods")  # a number that no other test has
    report(2, step, server=world.dev)
    world.daemon.settle()
    client.ask("subscribe", filter=filters, clusters=["dev-k3s"], id="f")
    report(1, step + 1, server=world.dev)
    world.daemon.settle()  # each collection has a watch of its own: without this their order is open
    report(2, step + 1, phase="validate", server=world.dev)
    world.daemon.settle()
    world.dev.put("persistentvolumeclaims", pvc(1, capacity=f"{step}Gi"))
    world.daemon.settle()
    world.dev.put("events", event(pod(1), "FailedMount", "no such volume", count=step))
    world.daemon.settle()
    report(2, step + 2, server=world.dev)
    world.daemon.settle()
    client.request("ping", id="end")
    seen = []
    while (message := client.message())["type"] != "ping":
        assert message["id"] == "f"
        number = {run_id(1): " 1", run_id(2): " 2"}.get(message.get("runId", ""), "")
        seen.append(f"{message['type']}{number}{' left' if message.get('left') else ''}")
    assert seen == told


@pytest.mark.parametrize(
    "fields",
    [
        {"filter": {"type": ["runs:*"]}},
        {"filter": {"reason": ["x"]}},
        {"snapshot": "yes"},
        {"since": 7},
        {"since": {"stream": "x"}},
        {"since": {"stream": "x", "seq": -1}},
        {"since": {"stream": "x", "seq": True}},
        {"since": "no-number"},
        {"includeHistory": -1},
    ],
)
def test_a_subscription_that_cannot_be_meant(client: Any, world: World, fields: Message) -> None:
    error = client.ask("subscribe", id=[1], **fields)
    assert (error["type"], error["code"], error["id"]) == ("error", "bad_request", [1])
    assert world.daemon.status()["subscribers"] == 0


def test_several_subscriptions_on_one_connection(client: Any, world: World) -> None:
    assert client.ask("subscribe", id=1, clusters=["prod"])["id"] == 1
    assert client.ask("subscribe", id="two", filter={"run_id": [run_id(5)]})["id"] == "two"
    assert client.ask("subscribe", id=1)["code"] == "bad_request"
    report(5, 301, server=world.prod)
    both = [client.message(), client.message()]
    assert {message["id"] for message in both} == {1, "two"}
    assert len({message["seq"] for message in both}) == 1
    assert client.ask("unsubscribe", id="u", subscription=1) == {"type": "unsubscribed", "id": "u", "subscription": 1}
    assert client.ask("unsubscribe", id="v", subscription=1)["code"] == "not_found"
    report(5, 302, server=world.prod)
    assert client.message()["id"] == "two"
    assert client.ask("unsubscribe") == {"type": "unsubscribed"}
    report(5, 303, server=world.prod)
    world.daemon.settle()
    assert client.ask("ping", id=9) == {"type": "ping", "id": 9}
    assert world.daemon.status()["subscribers"] == 0


def test_subscriptions_of_one_connection_are_bounded(world: World) -> None:
    with world.connect() as client:
        for number in range(32):
            assert client.ask("subscribe", id=number)["type"] == "subscribed"
        assert client.ask("subscribe", id="one more")["code"] == "bad_request"
        assert client.ask("ping") == {"type": "ping"}
        assert world.daemon.status()["subscribers"] == 32
    wait_until(lambda: world.daemon.status()["subscribers"] == 0, ANSWER_S, "they are let go")


# ---------------------------------------------------------------- subscriptions: how they begin, and go on


class View:
    """What a subscriber makes of what it is told, as README says: rows by what names them, and a cursor."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, ...], Message] = {}
        self.stream = ""
        self.seq: int | None = None  # None: the rows are of no use
        self.lagged = 0

    @property
    def since(self) -> Message:
        """How to go on: after what was told last, else from a snapshot."""
        return {"snapshot": True} if self.seq is None else {"since": {"stream": self.stream, "seq": self.seq}}

    def take(self, message: Message) -> None:
        """Take in one message; numbers must rise."""
        kind = message["type"]
        if kind == "subscribed":
            self.stream = message["stream"]
        elif kind == "lagged":
            self.lagged, self.seq = self.lagged + 1, None
            self.rows.clear()
        elif kind == "snapshot":
            for table in TABLES:
                self.rows.update({_key(table, row): row for row in message[table]})
            self.seq = message["seq"] if message["last"] else None
        elif kind == "seq":
            self.seq = message["seq"]
        else:
            assert self.seq is not None
            assert message["seq"] > self.seq, "an event came twice"
            self.seq = message["seq"]
            tables = {"run": "runs", "schedule": "schedules", "volume": "volumes", "warning": "cluster_events"}
            key = _key(tables.get(kind.partition(":")[0], "clusters"), message["row"])
            if message.get("left") or kind.endswith(":removed"):
                self.rows.pop(key, None)
            else:
                self.rows[key] = message["row"]

    def table(self, name: str) -> list[Message]:
        """Return the rows of a table, in the order of its list."""
        return sorted((row for key, row in self.rows.items() if key[0] == name), key=str)


def _key(table: str, row: Message) -> tuple[str, ...]:
    names = {"runs": ("run_id",), "clusters": ("name",)}.get(table, ("cluster", "namespace", "name"))
    return (table, *(row[name] for name in names))


def test_a_snapshot_begins_with_the_rows_and_goes_on_with_what_follows(client: Any, world: World) -> None:
    view = View()
    client.request("subscribe", snapshot=True, id="s")
    while view.seq is None:
        view.take(client.message())
    assert len(view.table("clusters")) == 2
    assert all(row["connected"] for row in view.table("clusters"))
    with world.connect() as lists:
        for table, action in (("runs", "runs"), ("volumes", "volumes"), ("cluster_events", "warnings")):
            assert view.table(table) == sorted(lists.ask(action)[action], key=str)
        report(5, 400 + world.prod.version("pods"), server=world.prod)
        view.take(client.message())
        assert view.table("runs") == sorted(lists.ask("runs")["runs"], key=str)


def test_a_snapshot_holds_what_is_asked_for(world: World) -> None:
    with world.connect() as client:
        client.ask("subscribe", snapshot=True, clusters=["prod"], filter={"type": ["run:*"]})
        snapshot = client.message()
    assert [row["run_id"] for row in snapshot["runs"]] == [run_id(5)]
    assert [snapshot[table] for table in TABLES[1:]] == [[], [], [], []]


def test_since_goes_on_where_one_was(client: Any, world: World) -> None:
    with world.connect() as first:
        subscribed = first.ask("subscribe", clusters=["prod"])
        for finished in (411, 412, 413):
            report(5, finished, server=world.prod)
        told = [first.message() for _ in range(3)]
    client.ask("subscribe", clusters=["prod"], since={"stream": subscribed["stream"], "seq": told[0]["seq"]})
    again = [client.message() for _ in range(2)]
    assert again == [{**message, "history": True} for message in told[1:]]
    report(5, 414, server=world.prod)
    live = client.message()
    assert (live["progress"]["finished"], "history" in live) == (414, False)


@pytest.mark.parametrize("since", [{"stream": "another", "seq": 1}, {"seq": 10**9}], ids=["stream", "future"])
def test_a_cursor_that_is_of_no_use_gets_lagged_and_a_snapshot(client: Any, world: World, since: Message) -> None:
    stream = world.daemon.status()["stream"]
    client.ask("subscribe", since={"stream": stream, **since}, filter={"type": ["run:*"]}, clusters=["prod"])
    assert client.message() == {"type": "lagged", "dropped": None}
    snapshot = client.message()
    assert (snapshot["type"], [row["run_id"] for row in snapshot["runs"]]) == ("snapshot", [run_id(5)])


def test_include_history_and_a_snapshot_end_in_the_rows_of_now(world: World) -> None:
    with world.connect() as client:
        client.ask("subscribe", includeHistory=2, snapshot=True, clusters=["prod"], filter={"type": ["run:*"]})
        told = [client.message() for _ in range(3)]
    assert [message["type"] for message in told] == ["run:updated", "run:updated", "snapshot"]
    assert told[2]["runs"] == [told[1]["row"]]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_since_goes_on_over_a_restart_as_far_as_the_cache_reaches(
    end: signal.Signals, model: ModelServer, make_host: Callable[..., Host]
) -> None:
    """More changes than a start takes into memory: the first ones are read out of the cache."""
    count = 1500
    host = make_host(Cluster(model))
    host.start()
    view = View()
    with LinesClient(host.socket) as client:
        client.request("subscribe", snapshot=True)
        while view.seq is None:
            view.take(client.message())
    for finished in range(1, count + 1):
        model.put("pods", pod(1, report=Report(finished=finished, total=10**6)))
    host.settle()
    host.signal(end)
    model.put("pods", pod(1, report=Report(finished=count + 1, total=10**6)))
    host.start()
    with LinesClient(host.socket) as client:
        client.request("subscribe", **view.since)
        told: list[int] = []
        while not told or told[-1] != count + 1:
            message = client.message()
            view.take(message)
            told += [message["progress"]["finished"]] if message["type"] == "run:updated" else []
        assert view.lagged == 0
        assert told == list(range(1, count + 2))
    with LinesClient(host.socket) as client:
        assert view.table("runs") == client.ask("runs")["runs"]


def test_who_is_told_nothing_is_told_how_far_the_stream_is(model: ModelServer, make_host: Callable[..., Host]) -> None:
    host = make_host(Cluster(model), idleSeq="200ms")
    host.start()
    with LinesClient(host.socket) as client, WebSocketClient(host.socket) as other:
        subscribed = client.ask("subscribe", id=1, filter={"status": ["failed"]})
        assert client.message() == {"type": "seq", "seq": subscribed["seq"], "id": 1}
        other.ask("subscribe", filter={"status": ["failed"]})
        model.put("pods", pod(1, report=Report(finished=1, total=10**6)))
        for one in (client, other):
            while (message := one.message())["seq"] == subscribed["seq"]:
                assert message["type"] == "seq"
            assert message["type"] == "seq"


@contextlib.contextmanager
def churning(model: ModelServer, runs: int) -> Iterator[None]:
    """Have runs report, stop at their gate, go and come anew, all the while."""
    done = threading.Event()

    def churn() -> None:
        finished = 0
        while not done.wait(0.002):
            finished += 1
            number = finished % runs + 1
            phase = "human-gate" if finished % 7 == 0 else "implement"
            model.put("pods", pod(number, report=Report(phase=phase, finished=finished, total=10**6)))
            if finished % 50 == 0:
                model.delete("jobs", NAMESPACE, job(number)["metadata"]["name"])
                model.put("jobs", job(number, metadata={"uid": f"again-{finished}"}))

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def read_the_rest(host: Host, view: View, fields: Message) -> None:
    """Bring a view up to what the daemon has; nothing changes any more."""
    with LinesClient(host.socket) as client:
        client.request("subscribe", **fields, **view.since)
        while not client.silent_for(0.5):
            view.take(client.message())


def test_a_client_killed_a_hundred_times_knows_the_rows_that_the_daemon_has(
    model: ModelServer, make_host: Callable[..., Host]
) -> None:
    """It hangs up in the midst of whatever it is told, under a load of changes, and comes back with its cursor."""
    runs = 20
    host = make_host(Cluster(model))
    for number in range(2, runs + 1):
        model.put("jobs", job(number))
    host.start()
    blocked: Message = {"filter": {"status": ["blocked"]}}
    views: list[tuple[View, Message]] = [(View(), {}), (View(), blocked)]
    with churning(model, runs):
        for life in range(100):
            for view, fields in views:
                with (WebSocketClient if life % 2 else LinesClient)(host.socket) as client:
                    client.request("subscribe", **fields, **view.since)
                    for _ in range(life % 13 + 2):
                        view.take(client.message())
    host.settle()
    with LinesClient(host.socket) as client:
        rows = sorted(client.ask("runs")["runs"], key=str)
    for view, fields in views:
        read_the_rest(host, view, fields)
        assert view.table("runs") == [row for row in rows if not fields or row["status"] == "blocked"]
        assert view.lagged == 0


# ---------------------------------------------------------------- HTTP


def test_health_and_readiness(model: ModelServer, make_host: Callable[..., Host]) -> None:
    model.hold()
    host = make_host(Cluster(model))
    host.launch()
    assert http_request(host.socket, "/healthz").status == 200
    answer = http_request(host.socket, "/readyz")
    assert (answer.status, answer.message["code"]) == (503, "not_synced")
    model.resume()
    host.wait_for_watches()
    answer = http_request(host.socket, "/readyz")
    assert (answer.status, answer.message["clusters"][0]["connected"]) == (200, True)


def get(path: Path, target: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of a GET with these headers."""
    with contextlib.closing(HttpConnection(path)) as connection:
        connection.request("GET", target, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


@pytest.mark.parametrize("target", ["/v1/runs", "/v1/schedules?cluster=prod", "/v1/volumes", "/v1/warnings"])
def test_a_list_that_is_known_is_not_sent_again(world: World, target: str) -> None:
    """Bookmarks come once a minute and move synced_at: one may fall between two of these requests, not two."""
    for _ in range(3):
        status, headers, body = get(world.socket, target)
        assert (status, headers["cache-control"]) == (200, "no-cache")
        assert json.loads(body)["clusters"]
        again = [get(world.socket, target, If_None_Match=tag) for tag in (headers["etag"], f'"x", {headers["etag"]}')]
        if all(status == 304 for status, _, _ in again):
            break
    else:
        pytest.fail("it never was 304")
    assert all((body, head["etag"]) == (b"", headers["etag"]) for _, head, body in again)
    assert get(world.socket, target, If_None_Match='"other"')[0] == 200
    assert get(world.socket, target, If_None_Match="*")[0] == 304


def test_a_list_that_changed_has_another_tag(world: World) -> None:
    tags = {}
    for finished in (501, 502):
        report(5, finished, server=world.prod)
        world.daemon.settle()
        tags[finished] = get(world.socket, "/v1/runs")[1]["etag"]
    assert len(set(tags.values())) == 2
    _, headers, body = get(world.socket, "/v1/runs", If_None_Match=tags[501])
    assert json.loads(body)["runs"]
    assert get(world.socket, "/v1/runs?limit=1")[1]["etag"] != headers["etag"]
    assert get(world.socket, "/v1/runs?status=blocked")[1]["etag"] != headers["etag"]


def test_answers_are_compressed_where_asked(world: World) -> None:
    status, headers, plain = get(world.socket, "/v1/query?sql=SELECT%201", Accept_Encoding="identity")
    assert (status, "content-encoding" in headers, headers["vary"]) == (200, False, "Accept-Encoding")
    for accepted in ("gzip", "deflate, gzip;q=0.5", "GZIP"):
        _, headers, packed = get(world.socket, "/v1/query?sql=SELECT%201", Accept_Encoding=accepted)
        assert headers["content-encoding"] == "gzip"
        assert json.loads(gzip.decompress(packed))["rows"] == json.loads(plain)["rows"]
    for accepted in ("gzip;q=0", "br", ""):
        assert "content-encoding" not in get(world.socket, "/v1/runs", Accept_Encoding=accepted)[1]
    assert json.loads(gzip.decompress(get(world.socket, "/v1/runs", Accept_Encoding="gzip")[2]))["runs"]


@pytest.mark.parametrize("target", ["/v1/runs?statu=running", "/v1/stream?cluster=prod&since=7", "/v1/volumes?type=x"])
def test_a_parameter_that_no_request_has_is_an_error(world: World, target: str) -> None:
    answer = http_request(world.socket, target)
    assert (answer.status, answer.message["code"]) == (400, "bad_request")


class EventSource:
    """Server-Sent Events, read as WHATWG's HTML has it."""

    def __init__(self, path: Path, target: str, **headers: str) -> None:
        self._connection = HttpConnection(path)
        self._connection.request("GET", target, headers={"Accept": "text/event-stream", **headers})
        self._response = self._connection.getresponse()
        assert self._response.getheader("Content-Type") == "text/event-stream"
        self.last_id = ""

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def message(self) -> Message:
        """Return the next event's data."""
        data = []
        while line := self._response.readline().decode().rstrip("\n"):
            name, _, value = line.partition(": ")
            if name == "id":
                self.last_id = value
            else:
                assert name == "data"
                data.append(value)
        message = json.loads("\n".join(data))
        assert isinstance(message, dict)
        return message


def test_server_sent_events_go_on_after_the_last_id(world: World) -> None:
    with contextlib.closing(EventSource(world.socket, "/v1/stream?cluster=prod&type=run:*")) as source:
        assert source.message()["type"] == "subscribed"
        assert source.last_id == ""
        report(5, 601, server=world.prod)
        first = source.message()
        assert source.last_id == f"{world.daemon.status()['stream']}:{first['seq']}"
        last_id = source.last_id
    report(5, 602, server=world.prod)
    world.daemon.settle()
    headers = {"Last-Event-ID": last_id}
    with contextlib.closing(EventSource(world.socket, "/v1/stream?cluster=prod&type=run:*", **headers)) as source:
        assert source.message()["type"] == "subscribed"
        missed = source.message()
        assert (missed["progress"]["finished"], missed["history"]) == (602, True)
        report(5, 603, server=world.prod)
        assert source.message()["progress"]["finished"] == 603


# ---------------------------------------------------------------- those who are slow, or not there


def test_a_request_must_come_to_its_end(model: ModelServer, make_host: Callable[..., Host]) -> None:
    host = make_host(Cluster(model), request="300ms")
    host.start()
    with LinesClient(host.socket) as lines, LinesClient(host.socket) as http, LinesClient(host.socket) as idle:
        assert idle.ask("ping") == {"type": "ping"}
        lines.send(b'{"action":"ping","id":')
        http.send(b"GET /status HTTP/1.1\r\nHost: a")
        assert json.loads(lines.line())["message"] == "a request must come within 0.3 s"
        assert lines.rest() == b""
        assert http.rest().startswith(b"HTTP/1.1 408 ")
        assert idle.ask("ping") == {"type": "ping"}, "one that asks nothing may be silent as long as it likes"


def test_a_websocket_client_that_is_gone_is_let_go(model: ModelServer, make_host: Callable[..., Host]) -> None:
    host = make_host(Cluster(model), ping="1s")
    host.start()
    with WebSocketClient(host.socket) as deaf, WebSocketClient(host.socket) as alive, LinesClient(host.socket) as lines:
        for client in (deaf, alive, lines):
            client.ask("subscribe", filter={"type": ["run:removed"]})
        assert host.status()["subscribers"] == 3
        pings = 0
        while host.status()["subscribers"] == 3:
            _, frame = alive.connection.recv_data_frame(control_frame=True)  # which answers a ping
            pings += frame.opcode == 9
        assert pings
        while (frame := deaf.connection.recv_frame()).opcode == 9 or frame.opcode == 1:
            pings += 1
        assert (frame.opcode, int.from_bytes(frame.data[:2], "big")) == (8, 1001)
        assert host.status()["subscribers"] == 2
        assert alive.ask("ping") == {"type": "ping"}
        assert lines.ask("ping") == {"type": "ping"}


def test_a_websocket_is_told_that_the_daemon_goes(model: ModelServer, make_host: Callable[..., Host]) -> None:
    host = make_host(Cluster(model))
    host.start()
    with WebSocketClient(host.socket) as client:
        client.ask("subscribe")
        host.stop()
        frame = client.connection.recv_frame()
        assert (frame.opcode, int.from_bytes(frame.data[:2], "big")) == (8, 1001)
