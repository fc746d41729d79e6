"""Reading commands that ask a daemon on another host: what they print, how they are refused, and how they reconnect."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from typing import TYPE_CHECKING, Final

import pytest
from fabrik_objects import Report, job, pod, run_id
from fakes import ModelServer
from harness import Cluster, wait_until
from links import Relay
from remotes import TOKEN, Certificate, RemoteHost, ReverseProxy, Watch, free_port

import fabrik_daemon
from fabrik_daemon import NotRunningError, RemoteClient, RemoteDaemon, Timing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from subprocess import CompletedProcess

    from clients import Message
    from fakes import Authority

SETTLE_S: Final = 30.0
TIMING: Final = {"batch": "10ms", "remoteBackoffMin": "50ms", "remoteBackoffMax": "200ms"}
TOTAL: Final = 10**6


def model_server(authority: Authority) -> Iterator[ModelServer]:
    with ModelServer(authority) as server:
        server.put("jobs", job(1))
        report(server, 3)
        yield server
    assert server.violations == []
    assert server.crashes == []


def report(server: ModelServer, finished: int) -> None:
    """Have run 1 report its progress."""
    server.put("pods", pod(1, report=Report(phase="implement", status="running", finished=finished, total=TOTAL)))


def running(root: Path, model: ModelServer, executable: Path, unpacked: Path) -> Iterator[RemoteHost]:
    """Yield a running daemon with TLS; nothing of what it logs has the token."""
    tls, cluster = Certificate.make(root / "tls"), [Cluster(model, "dev")]
    with RemoteHost(executable, unpacked, root / "remote", cluster, timing=TIMING, tls=tls) as host:
        host.start()
        yield host
        assert TOKEN not in host.log
        assert "this is a defect" not in host.log


@pytest.fixture(scope="module")
def remote(
    authority: Authority, executable: Path, unpacked: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RemoteHost]:
    """Return a daemon that all tests share which leave it as it is."""
    for model in model_server(authority):
        yield from running(tmp_path_factory.mktemp("shared"), model, executable, unpacked)


@pytest.fixture
def model(authority: Authority) -> Iterator[ModelServer]:
    yield from model_server(authority)


@pytest.fixture
def own(model: ModelServer, executable: Path, unpacked: Path, tmp_path: Path) -> Iterator[RemoteHost]:
    """Return a daemon of the test's own."""
    yield from running(tmp_path, model, executable, unpacked)


def refused(done: CompletedProcess[str], code: int, *parts: str) -> None:
    """Check that a command ended with this code and one line that has these parts, and no token."""
    assert done.returncode == code, done
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert TOKEN not in done.stderr


def test_reading_commands_ask_the_daemon_there_and_say_so(remote: RemoteHost) -> None:
    listed = remote.ask("runs", "list", "-o", "json")
    assert listed.returncode == 0, listed.stderr
    assert [run["run_id"] for run in json.loads(listed.stdout)] == [run_id(1)]
    assert listed.stderr == "", "all of it is live"
    shown = remote.ask("runs", "show", "--id", run_id(1), "-o", "json")
    assert json.loads(shown.stdout)["progress_finished"] == 3
    clusters = remote.ask("clusters", "list", "-o", "json")
    assert [row["name"] for row in json.loads(clusters.stdout)] == ["dev"]
    for kind in ("schedules", "volumes", "warnings"):
        done = remote.ask(kind, "list", "-o", "json")
        assert (done.returncode, json.loads(done.stdout)) == (0, []), done.stderr
    waited = remote.ask("runs", "wait", run_id(1), "--timeout", "500ms")
    assert waited.returncode == 7, waited.stderr
    status = json.loads(remote.ask("status", "-o", "json").stdout)
    assert status["pid"] == remote.pid
    assert TOKEN not in json.dumps(status)
    assert not (remote.root / "elsewhere").exists(), "nothing is kept on this host"


def test_the_flags_say_the_same_as_the_environment(remote: RemoteHost) -> None:
    assert remote.tls
    url = f"https://localhost:{remote.port}/"
    flags = ["--remote", url, "--token-file", str(remote.token_file), "--ca-file", str(remote.tls.ca)]
    nothing = {"FABRIK_REMOTE": "", "FABRIK_TOKEN_FILE": "", "FABRIK_CA_FILE": ""}
    for words in (["runs", "list", *flags], [*flags, "runs", "list"]):
        assert remote.ask(*words, **nothing).returncode == 0
    assert remote.ask("runs", "list", FABRIK_TOKEN_FILE="", FABRIK_TOKEN=TOKEN).returncode == 0


def test_how_fresh_an_answer_is_comes_from_there(own: RemoteHost, model: ModelServer) -> None:
    model.stop()
    wait_until(lambda: not own.status()["clusters"][0]["connected"], SETTLE_S, "the daemon has noticed")
    done = own.ask("runs", "list")
    assert done.returncode == 0
    assert f"from the daemon at localhost:{own.port}/daemon: dev as of " in done.stderr
    assert "not connected" in done.stderr


def test_refusals_end_with_9_and_say_why(remote: RemoteHost, tmp_path: Path) -> None:
    refused(remote.ask("runs", "list", FABRIK_TOKEN_FILE=""), 9, "wants a token", "--token-file or FABRIK_TOKEN")
    wrong = {"FABRIK_TOKEN": "wrong-wrong-wrong"}
    refused(remote.ask("runs", "list", **wrong), 9, "this token is not the daemon's")
    refused(remote.ask("runs", "watch", **wrong), 9, "this token is not the daemon's")
    other = Certificate.make(tmp_path / "other")
    refused(remote.ask("runs", "list", FABRIK_CA_FILE=str(other.ca)), 9, "certificate is not accepted", "--ca-file")
    refused(remote.ask("runs", "list", FABRIK_CA_FILE=""), 9, "certificate is not accepted")
    by_address = f"wss://127.0.0.2:{remote.port}"
    done = remote.ask("runs", "list", "--remote", by_address)
    assert done.returncode in {4, 9}, "nobody is there, or somebody whose certificate has another name"


@pytest.mark.parametrize(
    "words",
    [
        ("stop",),
        ("runs", "stats"),
        ("reload",),
        ("logs",),
        ("query", "SELECT 1"),
        ("start",),
        ("sync",),
        ("clusters", "remove", "dev"),
    ],
)
def test_what_is_for_the_daemons_own_host_is_refused(remote: RemoteHost, words: tuple[str, ...]) -> None:
    refused(remote.ask(*words, "--remote", remote.url), 9, f"'{' '.join(words[:2])}'".replace(" SELECT 1", ""))
    assert remote.status()["pid"] == remote.pid


def test_what_only_a_cache_can_answer_is_not_answered_from_the_wrong_one(remote: RemoteHost) -> None:
    refused(remote.ask("runs", "list", "--at", "1m"), 2, "--at reads the cache of this host")
    for words in (("query", "SELECT 1"), ("runs", "stats")):
        nowhere = {"FABRIK_REMOTE": remote.url, "FABRIK_CACHE": ""}
        refused(remote.ask(*words, **nowhere), 9, "reads the cache of this host, and FABRIK_REMOTE is set", "--cache")


def test_a_place_on_this_host_leads_over_the_environment(remote: RemoteHost) -> None:
    done = remote.cli("runs", "list", "--socket", str(remote.socket))
    assert run_id(1) in done.stdout
    remote.environment["FABRIK_REMOTE"] = f"wss://localhost:{free_port()}"
    try:
        assert remote.cli("runs", "list", "--socket", str(remote.socket)).returncode == 0
        refused(remote.cli("runs", "list"), 4, "no daemon answers")
        assert remote.cli("logs", "-n", "1").returncode == 0, "it is for the daemon here, whatever else is set"
    finally:
        del remote.environment["FABRIK_REMOTE"]


def test_nobody_or_somebody_else_at_the_url(remote: RemoteHost) -> None:
    refused(remote.ask("runs", "list", "--remote", f"ws://localhost:{free_port()}"), 4, "no daemon answers at ws://")
    refused(remote.ask("status", "--remote", "wss://no-such-host.invalid/daemon"), 4, "no daemon answers")
    refused(remote.ask("runs", "list", "--remote", f"ws://localhost:{remote.port}"), 4, "no daemon answers at ws://")
    with other_server() as (url, _):
        refused(remote.ask("runs", "list", "--remote", url), 4, "no daemon at", "HTTP 404")


class _Other(http.server.BaseHTTPRequestHandler):
    """Somebody else's web server: it knows nothing, and sends those away who ask for /moved."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        if self.path.startswith("/other"):  # a WebSocket, but not ours
            key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            self.send_response(101)
            self.send_header("Upgrade", "websocket")
            self.send_header("Connection", "Upgrade")
            digest = hashlib.sha1(key.encode()).digest()  # noqa: S324 - RFC 6455 has it so
            self.send_header("Sec-WebSocket-Accept", base64.b64encode(digest).decode())
        elif self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", f"ws://{self.headers['Host']}/elsewhere")
        else:
            self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def other_server() -> Iterator[tuple[str, list[str]]]:
    """Run somebody else's web server; yield its URL and the paths that it was asked for."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Other) as server:
        server.asked = []  # type: ignore[attr-defined]  # a handler finds nothing else again
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_address[1]}", server.asked  # type: ignore[attr-defined]
        server.shutdown()


def test_another_version_is_refused(remote: RemoteHost) -> None:
    with other_server() as (url, _):
        refused(remote.ask("runs", "list", "--remote", f"{url}/other"), 9, "does not speak fabrik.v1")


def test_a_redirect_is_not_followed(remote: RemoteHost) -> None:
    with other_server() as (url, asked):
        refused(remote.ask("runs", "list", "--remote", f"{url}/moved"), 4, "no daemon")
        assert asked == ["/moved/v1/stream"], "the token would have gone along"


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["--remote", "fabrik.example.com"], {}, "write wss://host/daemon"),
        (["--remote", f"wss://me:{TOKEN}@localhost"], {}, "a secret has no place in a URL"),
        (["--remote", "ws://fabrik.example.com"], {}, "plain text to fabrik.example.com"),
        (["--token-file", "/none"], {}, "/none: no such file"),
        ([], {"FABRIK_CA_FILE": "/none"}, "/none: No such file"),
        ([], {"FABRIK_CA_FILE": "/dev/null"}, "/dev/null:"),
    ],
)
def test_wrong_settings_are_told_in_one_line(
    remote: RemoteHost, words: list[str], environment: dict[str, str], said: str
) -> None:
    refused(remote.ask("runs", "list", *words, **environment), 2, said)


@pytest.mark.parametrize("strip", ["", "/daemon"])
def test_behind_a_reverse_proxy(
    model: ModelServer, executable: Path, unpacked: Path, tmp_path: Path, strip: str
) -> None:
    """An ingress ends TLS and forwards with or without the path's prefix; the daemon knows clients by its word."""
    certificate = Certificate.make(tmp_path / "tls")
    with RemoteHost(executable, unpacked, tmp_path / "r", [Cluster(model, "dev")], timing=TIMING) as host:
        host.environment["FABRIK_BEHIND_PROXY"] = "true"
        host.start()
        with ReverseProxy(certificate, host.port, strip=strip) as proxy:
            url, ca = f"wss://localhost:{proxy.port}/daemon", str(certificate.ca)
            done = host.ask("runs", "list", "--remote", url, FABRIK_CA_FILE=ca)
            assert done.returncode == 0, done.stderr
            assert run_id(1) in done.stdout


# runs watch ----------------------------------------------------------------------------------------------------------


def progress(events: list[Message]) -> list[int]:
    """Return what run 1 had finished, event by event."""
    return [event["row"]["progress_finished"] for event in events]


def test_a_watch_goes_on_where_it_broke_off(own: RemoteHost, model: ModelServer) -> None:
    """Its daemon is killed and started again; what happens meanwhile comes once, in order."""
    with Watch(own) as watch:
        watch.wait_for("subscribed")
        expected: list[int] = []
        for turn in range(3):
            for step in range(3):
                expected.append(100 * turn + 10 * step + 10)
                report(model, expected[-1])
                watch.wait_for("run:updated", len(expected))
            own.settle()  # what was told is in the cache: a crash takes nothing back
            own.relaunch()
            expected.append(100 * turn + 99)
            report(model, expected[-1])
            watch.wait_for("run:updated", len(expected))
        assert progress(watch.events) == expected
        seqs = [event["seq"] for event in watch.events]
        assert seqs == sorted(set(seqs))
        assert [message["type"] for message in watch.messages].count("subscribed") == 1
        assert "lagged" not in {message["type"] for message in watch.messages}
        broken = [line for line in watch.complaints if "trying again" in line]
        again = [line for line in watch.complaints if "connected again" in line]
        assert (len(broken), len(again)) == (3, 3), watch.complaints
        assert TOKEN not in "".join(watch.complaints)
        model.put("jobs", job(1, conditions=["Complete"]))
        watch.wait_for("run:updated", len(expected) + 1)
        assert watch.events[-1]["status"] == "finished"


def test_a_watch_under_load_ends_up_with_what_is(own: RemoteHost, model: ModelServer) -> None:
    """Killed at any moment, also before what it told was written: then it says so, and begins anew."""
    done = threading.Event()
    last = [3]

    def work() -> None:
        while not done.wait(0.002):
            last[0] += 1
            report(model, last[0])

    worker = threading.Thread(target=work)
    with Watch(own) as watch:
        watch.wait_for("subscribed")
        worker.start()
        try:
            for _ in range(5):
                told = len(watch.messages)
                wait_until(lambda before=told: len(watch.messages) > before + 20, SETTLE_S, "it follows")  # type: ignore[misc]
                own.relaunch()
        finally:
            done.set()
            worker.join()
        wait_until(lambda: row_of(watch.messages)["progress_finished"] == last[0], SETTLE_S, "it has caught up")
        told_by_events: list[int] = []
        for message in watch.messages:
            if message["type"] == "lagged":
                told_by_events.clear()  # numbers go on, but what was told may be told again by what follows
            elif message["type"].startswith("run:"):
                told_by_events.append(message["seq"])
                assert told_by_events == sorted(set(told_by_events)), "no change is told twice, or out of order"


def row_of(messages: list[Message]) -> Message:
    """Return run 1 as somebody has it who takes events and snapshots as they come."""
    row: Message = {"progress_finished": None}
    for message in list(messages):
        rows = (
            message.get("runs", []) if message["type"] == "snapshot" else [message["row"]] if "row" in message else []
        )
        row = next((found for found in rows if found.get("run_id") == run_id(1)), row)
    return row


def test_a_watch_survives_a_network_that_falls_silent(own: RemoteHost, model: ModelServer) -> None:
    """No end, no reset: only its own clock tells a client that nobody is there any more."""
    config = own.root / "elsewhere" / "config.yaml"
    config.parent.mkdir()
    config.write_text(json.dumps({"timing": {**TIMING, "idle": "1s"}}))
    with Relay(own.port) as relay:
        url = f"wss://localhost:{relay.port}/daemon"
        with Watch(own, "--remote", url, FABRIK_CONFIG=str(config)) as watch:
            watch.wait_for("subscribed")
            report(model, 10)
            watch.wait_for("run:updated", 1)
            relay.fall_silent()
            report(model, 20)
            watch.wait_for("run:updated", 2)
            assert progress(watch.events) == [10, 20]
            assert any("does not answer" in line for line in watch.complaints)


def test_a_watch_ends_when_its_token_is_withdrawn(own: RemoteHost) -> None:
    with Watch(own, FABRIK_TOKEN_FILE="", FABRIK_TOKEN=TOKEN) as watch:
        watch.wait_for("subscribed")
        own.token_file.write_text("the-next-token-of-this-daemon\n")
        assert watch.process.wait(SETTLE_S) == 9
        wait_until(lambda: len(watch.complaints) == 2, SETTLE_S, "what it says was read")
        assert "trying again" in watch.complaints[0]
        assert "not the daemon's" in watch.complaints[1]


def test_a_cache_made_anew_begins_with_what_is(own: RemoteHost, model: ModelServer) -> None:
    """A cursor of another stream is worth nothing: the watch is told so, and then all there is."""
    with Watch(own) as watch:
        watch.wait_for("subscribed")
        report(model, 10)
        watch.wait_for("run:updated")
        own.stop()
        for path in own.cache.parent.iterdir():
            path.unlink()
        own.launch()
        watch.wait_for("lagged")
        watch.wait_for("snapshot")
        report(model, 20)
        wait_until(lambda: 20 in progress(watch.events), SETTLE_S, "it follows the new stream")


# The client by itself ------------------------------------------------------------------------------------------------


def test_a_daemon_of_another_version_is_told_of_once(remote: RemoteHost, monkeypatch: pytest.MonkeyPatch) -> None:
    assert remote.tls
    target = RemoteDaemon(remote.url, TOKEN, str(remote.tls.ca))
    told: list[str] = []
    for version, count in ((fabrik_daemon.__version__, 0), ("77.0.0", 1)):
        monkeypatch.setattr(fabrik_daemon, "__version__", version)
        with contextlib.closing(RemoteClient(target, Timing(), told.append)) as client:
            assert client.ask("ping") == client.ask("ping") == {"type": "ping"}
        assert len(told) == count
    assert told == ["the daemon there is version 0.1.0, this is 77.0.0"]


def test_a_request_that_is_cut_off_says_so(remote: RemoteHost) -> None:
    assert remote.tls
    with Relay(remote.port) as relay:
        target = RemoteDaemon(f"wss://localhost:{relay.port}", TOKEN, str(remote.tls.ca))
        client = RemoteClient(target, Timing(), lambda line: None)
        with contextlib.closing(client):
            assert client.ask("ping") == {"type": "ping"}
            relay.close()
            with pytest.raises(NotRunningError, match=r"the connection to the daemon broke|ended the connection"):
                client.ask("ping")
