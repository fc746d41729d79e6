"""The ten cases of "Ten cases to survive", on the built daemon with real sockets; `timing:` alone compresses time.

Case 7 leaves out alerts, which no daemon sends yet. Case 9 (many starts, sockets, folders) is in test_lifecycle.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from fabrik_objects import NAMESPACE, Report, event, job, pod, run_id
from fakes import ModelServer, refusal
from harness import Cluster, wait_until
from links import PATIENCE_S, LooseDaemon, Relay

import fabrik_daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fakes import Authority, KubernetesApi, Request, Response
    from fakes_http import Exchange

    Serve = Callable[[KubernetesApi], None]
    Make = Callable[..., LooseDaemon]

QUICK: Final = {"backoffMin": "100ms", "backoffMax": "1s", "filesCheck": "200ms"}
PODS: Final = int(os.environ.get("FABRIK_TEST_PODS") or 5000)
MIB: Final = 2**20
WAL_BYTES: Final = 64 * MIB
OTHER_UID: Final = "0f0c6f0e-0000-4c6e-9a53-0d5f7d7f8a12"


@pytest.fixture
def make(executable: Path, unpacked: Path, tmp_path: Path) -> Iterator[Make]:
    """Make daemons, not started yet; at the end none is left."""
    daemons: list[LooseDaemon] = []

    def make_one(*clusters: Cluster, config: dict[str, object] | None = None, **timing: object) -> LooseDaemon:
        place = (executable, unpacked, tmp_path / f"daemon{len(daemons)}")
        daemons.append(LooseDaemon(place, clusters, timing={**QUICK, **timing}, config=config))
        return daemons[-1]

    yield make_one
    for daemon in daemons:
        daemon.kill()


class Model(ModelServer):
    """A model that may stand behind a relay, be asked who it is in vain, and change between two pages."""

    def __init__(self, authority: Authority | None = None, *, token: str = "", initial_events: str = "refuse") -> None:
        super().__init__(authority, token=token, initial_events=initial_events)
        self.relay: Relay | None = None
        self.on_identity: Callable[[Exchange], None] | None = None  # in place of the answer
        self.at_page: Callable[[], None] | None = None

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"https://127.0.0.1:{self.relay.port}" if self.relay else super().url

    def answer(self, exchange: Exchange) -> None:
        """Answer, or do not say who it is."""
        if self.on_identity and exchange.seen.path.endswith("/kube-system"):
            self.on_identity(exchange)
        else:
            super().answer(exchange)

    def hang(self, exchange: Exchange) -> None:
        """Never answer."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopping)
        exchange.hang_up()

    def list_page(self, request: Request, resource: str, selector: Any) -> Response:
        """Answer a LIST, after what a test wants to happen before a further page."""
        if self.at_page and "continue" in request.query:
            self.at_page()
        return super().list_page(request, resource, selector)


@contextlib.contextmanager
def heartbeat(server: KubernetesApi, seconds: float = 0.4) -> Iterator[None]:
    """Send bookmarks, as a living server does once a minute."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(seconds):
            server.bookmark()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    yield
    over.set()
    thread.join()


class Flood:
    """Changes a model's pods, as fast as it can or so many a second."""

    def __init__(self, server: ModelServer, runs: int, rate: float = 0) -> None:
        self.server = server
        self.sent = 0
        self._runs = runs
        self._pause_s = 1 / rate if rate else 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Flood:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        chance = random.Random(4)
        for number in count(1):
            if self._over.wait(self._pause_s) if self._pause_s else self._over.is_set():
                return
            report = Report(finished=number % 1000, total=1000, task=f"{number}:impl")
            self.server.put("pods", pod(chance.randrange(self._runs), report=report))
            self.sent = number


def watch_requests(server: KubernetesApi, since: float) -> list[Request]:
    """Return the watches asked for since a time."""
    return server.asked(lambda request: request.is_watch and request.at >= since)


def list_requests(server: KubernetesApi, since: float) -> list[Request]:
    """Return the lists asked for since a time, streamed ones included."""
    return server.asked(
        lambda request: request.at >= since and (request.is_list or "sendInitialEvents" in request.query)
    )


def progress_of(daemon: LooseDaemon, number: int) -> int | None:
    """Return how far a run is, as the daemon tells it."""
    row = daemon.run_rows().get(run_id(number), {})
    return row.get("progress_finished")


# 1. Half-open TCP -----------------------------------------------------------------------------------------------------


def test_a_half_open_connection_is_told_as_stale_and_resumed(authority: Authority, serve: Serve, make: Make) -> None:
    server = Model(authority)
    serve(server)
    with Relay(server.port) as server.relay, heartbeat(server):
        server.put("jobs", job(1))
        daemon = make(Cluster(server), idle="3s", connect="3s")
        daemon.launch()
        daemon.wait_connected()
        subscriber = daemon.subscribe()
        server.put("pods", pod(1, report=Report(finished=1)))
        subscriber.wait_for(lambda event: event.get("progress") == {"finished": 1, "total": 192}, "live events")
        daemon.settle()  # each watch has heard a bookmark: what has not may have a version from nowhere
        server.relay.fall_silent(for_new=True)
        silent_at = time.monotonic()
        server.put("pods", pod(1, report=Report(finished=2)))
        server.put("jobs", job(2))
        told = subscriber.wait_for(lambda event: event["type"] == "cluster:stale", "told as stale", 3 + PATIENCE_S / 2)
        assert "silent for" in told["error"]
        assert not daemon.cluster()["connected"]
        wait_until(
            lambda: {watch["state"] for watch in daemon.cluster()["watches"]} <= {"stale", "connecting", "backing off"},
            PATIENCE_S,
            "no watch says that it watches",
        )
        assert "ago, not connected" in daemon.cli("runs", "list").stderr
        assert run_id(2) not in daemon.run_rows()
        server.relay.speak()
        daemon.wait_connected()
        subscriber.wait_for(lambda event: event.get("progress") == {"finished": 2, "total": 192}, "what was missed")
        wait_until(lambda: run_id(2) in daemon.run_rows(), PATIENCE_S, "the run that was missed")
    assert list_requests(server, silent_at) == [], "resumed, not listed anew"
    runs = [(event["runId"], event["seq"]) for event in subscriber.of("run:added", "run:updated")]
    assert len(set(runs)) == len(runs)
    added = Counter(event["runId"] for event in subscriber.of("run:added"))
    assert added == {run_id(2): 1}
    rows = [json.dumps(event["row"], sort_keys=True) for event in subscriber.of("run:updated")]
    assert len(set(rows)) == len(rows), "nothing is told twice"


def test_a_connection_half_open_before_its_first_bookmark_does_not_blind_the_next_ones(
    authority: Authority, serve: Serve, make: Make
) -> None:
    """Bookmarks come after a minute: a link that dies sooner says nothing of the server, which sends them as ever."""
    server = Model(authority)
    serve(server)
    with Relay(server.port) as server.relay:
        daemon = make(Cluster(server), idle="2s", connect="2s")
        daemon.launch()
        daemon.wait_connected()
        subscriber = daemon.subscribe()
        server.relay.fall_silent()
        told = subscriber.wait_for(lambda event: event["type"] == "cluster:stale", "told as stale")
        seconds = re.search(r"silent for (\d+) s", told["error"])
        assert seconds
        assert int(seconds[1]) < 10, "how long it was silent, not how long it might be"
        with heartbeat(server):
            daemon.wait_connected()
            daemon.settle()
            server.relay.fall_silent()
            wait_until(lambda: len(subscriber.of("cluster:stale")) == 2, PATIENCE_S / 2, "told as stale again")
            daemon.wait_connected()


# 2. A streaming list without its end ----------------------------------------------------------------------------------


def test_a_streaming_list_that_never_ends_gives_way_to_a_list_and_is_remembered(
    authority: Authority, serve: Serve, make: Make
) -> None:
    server = Model(authority, initial_events="ignore")
    serve(server)
    server.put("jobs", job(1))
    late = refusal(503, "ServiceUnavailable", "not yet")._replace(headers={"Retry-After": "3"})
    server.fail_next(1, late, resource="pods")
    daemon = make(Cluster(server), initialList="1s")
    daemon.launch()
    began_at = time.monotonic()
    daemon.wait_connected()
    assert set(daemon.run_rows()) == {run_id(1)}
    streamed = [request for request in list_requests(server, 0) if request.is_watch]
    listed = [request for request in list_requests(server, 0) if not request.is_watch]
    assert Counter(request.path.rpartition("/")[2] for request in streamed) == dict.fromkeys(server.collections, 1)
    assert {request.path.rpartition("/")[2] for request in listed} == set(server.collections)
    assert min(request.at for request in listed) - began_at < PATIENCE_S
    pods = server.asked(lambda request: request.path.endswith("/pods"))
    assert ["sendInitialEvents" in request.query for request in pods[:2]] == [True, False], "pods knew it already"
    again_at = time.monotonic()
    server.compact()
    server.put("jobs", job(2))
    server.compact()
    server.end_watches(clean=False)
    wait_until(lambda: run_id(2) in daemon.run_rows(), PATIENCE_S, "listed anew")
    daemon.wait_connected()
    assert not any(request.is_watch for request in list_requests(server, again_at)), "remembered"


# 3. A storm of 410 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_stream", [True, False], ids=["in-stream", "http"])
def test_a_storm_of_expired_versions_is_met_with_pauses(
    in_stream: bool, authority: Authority, serve: Serve, make: Make
) -> None:
    server = Model(authority)
    serve(server)
    server.expired_in_stream = in_stream
    server.put("jobs", job(1))
    daemon = make(Cluster(server), backoffMin="200ms", backoffMax="2s")
    daemon.launch()
    daemon.wait_connected()
    for collection in server.collections.values():
        collection.compacted = 10**9
    server.end_watches(clean=False)
    began_at = time.monotonic()
    window_s = 4.0
    daemon.wait_words("expired")
    wait_until(lambda: time.monotonic() - began_at > window_s, PATIENCE_S, "a window to count in")
    asked = list_requests(server, began_at)
    per_resource = Counter(request.path for request in asked)
    assert len(per_resource) == len(server.collections)
    assert min(per_resource.values()) >= 2, "it is tried again"
    assert max(per_resource.values()) <= 5 + 2 * window_s, "with pauses: about one a second on the average"
    for collection in server.collections.values():
        collection.compacted = 0
    server.put("jobs", job(2))
    wait_until(lambda: run_id(2) in daemon.run_rows(), PATIENCE_S, "the storm is over")
    daemon.wait_connected()


def test_an_expired_continue_token_leads_to_one_list_without_pages(
    authority: Authority, serve: Serve, make: Make
) -> None:
    server = Model(authority)
    serve(server)
    server.pages_at_zero = True
    for number in range(1100):
        server.put("jobs", job(number))
    server.at_page = server.expire_continue
    daemon = make(Cluster(server))
    daemon.launch()
    wait_until(lambda: len(daemon.run_rows()) == 1100, PATIENCE_S, "all runs")
    pages = server.asked(lambda request: request.is_list and request.path.endswith("/jobs"))
    assert ["continue" in request.query for request in pages] == [False, True, False]
    assert "limit" not in pages[-1].query


def test_what_vanished_unseen_is_told_as_such_or_by_what_is_left_of_it(
    authority: Authority, serve: Serve, make: Make
) -> None:
    server = Model(authority)
    serve(server)
    for number in (1, 2, 3, 4):
        server.put("jobs", job(number))
        server.put("pods", pod(number, report=Report(finished=number)))
    daemon = make(Cluster(server))
    daemon.launch()
    daemon.wait_connected()
    wait_until(lambda: len(daemon.run_rows()) == 4, PATIENCE_S, "all runs")
    subscriber = daemon.subscribe()
    server.stop()
    for number in (1, 2, 3):
        server.delete("jobs", NAMESPACE, f"fabrik-{run_id(number)}")
    for number in (1, 3):
        server.delete("pods", NAMESPACE, pod(number)["metadata"]["name"])
    server.put("pods", pod(2, phase="Succeeded"))
    server.put("events", event(job(3), "Completed", "Job completed", kind="Normal", involved="Job"))
    server.compact()
    server.start()
    daemon.wait_connected()
    wanted = {run_id(2): ("finished", None), run_id(3): ("finished", None), run_id(4): ("running", None)}

    def told() -> dict[str, tuple[str | None, str | None]]:
        return {key: (row["status"], row["reason"] or None) for key, row in daemon.run_rows().items()}

    wait_until(lambda: told().get(run_id(1)) == (None, "VanishedUnseen"), PATIENCE_S, "nobody knows what became of 1")
    wait_until(lambda: {**told(), **wanted} == told(), PATIENCE_S, f"evidence counts: {wanted}")
    assert daemon.run_rows()[run_id(1)]["progress_finished"] == 1, "what was last known is kept"
    subscriber.wait_for(
        lambda message: message.get("runId") == run_id(1) and message["row"]["reason"] == "VanishedUnseen", "told"
    )
    shown = daemon.cli("runs", "list").stdout
    assert "unknown" in shown


# 4. Lower versions, another cluster -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bookmarks", [True, False], ids=["bookmarks", "silent"])
def test_a_store_that_was_restored_is_listed_anew(
    bookmarks: bool, authority: Authority, serve: Serve, make: Make
) -> None:
    """A server meets a watch from the future with 200 and silence: a bookmark tells, or the silence does."""
    server = Model(authority)
    serve(server)
    for number in (1, 2, 3):
        server.put("jobs", job(number))
    daemon = make(Cluster(server), idle="2s")
    daemon.launch()
    daemon.wait_connected()
    server.rewind(400)
    del server.collections["jobs"].objects[NAMESPACE, f"fabrik-{run_id(3)}"]
    server.put("jobs", job(4))
    with heartbeat(server) if bookmarks else contextlib.nullcontext():
        wait_until(lambda: run_id(4) in daemon.run_rows(), PATIENCE_S, "listed anew")
        wait_until(lambda: daemon.run_rows()[run_id(3)]["status"] is None, PATIENCE_S, "missing, and told so")
        version = server.put("jobs", job(5))
        wait_until(lambda: run_id(5) in daemon.run_rows(), PATIENCE_S, "followed from the lower version")
    assert version < 1000
    assert {daemon.run_rows()[run_id(number)]["status"] for number in (1, 2)} == {"pending"}


def test_a_watch_that_could_not_see_the_store_restored_is_told_by_the_others(
    authority: Authority, serve: Serve, make: Make
) -> None:
    """When it may watch again, the new history has passed its version, and the server goes on as if nothing were."""
    server = Model(authority)
    serve(server)
    for number in (1, 2):
        server.put("jobs", job(number))
        server.put("pods", pod(number, report=Report(finished=number)))
    daemon = make(Cluster(server), idle="2s", forbiddenRetry="3s")
    daemon.launch()
    daemon.wait_connected()
    with heartbeat(server):
        wait_until(lambda: daemon.watch("pods")["state"] == "watching", PATIENCE_S, "pods are watched")
        server.refuse("pods")
        server.end_watches()
        wait_until(lambda: daemon.watch("pods")["state"] == "forbidden", PATIENCE_S, "pods are forbidden")
        last = server.version("pods")
        server.rewind(400)
        del server.collections["pods"].objects[NAMESPACE, pod(2)["metadata"]["name"]]
        server.put("jobs", job(3))
        wait_until(lambda: run_id(3) in daemon.run_rows(), PATIENCE_S, "the restored store is listed")
        server.rewind(last + 10, server.uid)  # it counts on, past what the watch of pods has seen
        server.refuse("pods", 0)
        wait_until(lambda: daemon.watch("pods")["state"] == "watching", PATIENCE_S, "pods are watched again")
        shown = "SELECT name FROM objects WHERE resource = 'pods' AND json_extract(facts, '$.gone') IS NULL"
        expected = [{"name": pod(1)["metadata"]["name"]}]
        wait_until(lambda: daemon.rows(shown) == expected, PATIENCE_S, "the Pod that is no more")


@pytest.mark.parametrize("version", [400, 5000], ids=["lower", "higher"])
def test_another_cluster_behind_the_same_name_is_listed_anew(
    version: int, authority: Authority, serve: Serve, make: Make
) -> None:
    server = Model(authority)
    serve(server)
    server.put("jobs", job(1))
    server.put("pods", pod(1, report=Report(finished=77)))
    server.put("jobs", job(2, conditions=["Complete"]))
    daemon = make(Cluster(server), idle="3s")
    daemon.launch()
    wait_until(lambda: progress_of(daemon, 1) == 77, PATIENCE_S, "the first cluster's runs")
    with heartbeat(server):
        for name in ("jobs", "pods"):
            server.collections[name].objects.clear()
        server.rewind(version, uid=OTHER_UID)
        server.put("jobs", job(3))
        wait_until(lambda: daemon.cluster()["uid"] == OTHER_UID, PATIENCE_S, "another identity")
        wait_until(lambda: run_id(3) in daemon.run_rows(), PATIENCE_S, "the other cluster's runs")
        daemon.wait_connected()
        wait_until(
            lambda: daemon.run_rows()[run_id(1)]["status"] in {None, "running"}, PATIENCE_S, "the old run, not guessed"
        )
    rows = daemon.run_rows()
    assert rows[run_id(1)]["progress_finished"] == 77
    assert rows[run_id(2)]["status"] == "finished"


@pytest.mark.parametrize("how", ["hangs", "breaks off", "503", "429", "rubbish", "403"])
def test_a_server_that_does_not_say_who_it_is_at_first_is_asked_again(
    how: str, authority: Authority, serve: Serve, make: Make
) -> None:
    """One question without an answer must not be the last one, even where the watches are in no trouble at all."""
    server = Model(authority)
    serve(server)
    asked: list[Exchange] = []
    answers = {
        "503": refusal(503, "ServiceUnavailable", "no leader"),
        "429": refusal(429, "TooManyRequests", "try again later"),
        "rubbish": refusal(200, "OK", "not a namespace"),
        "403": refusal(403, "Forbidden", "namespaces is forbidden"),
    }

    def evade(exchange: Exchange) -> None:
        asked.append(exchange)
        if how in answers:
            exchange.send(answers[how])
        elif how == "hangs":
            server.hang(exchange)
        else:
            exchange.hang_up(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{")

    server.on_identity = evade
    server.put("jobs", job(1))
    daemon = make(Cluster(server), identity="500ms", answer="2s", forbiddenRetry="1s")
    daemon.launch()
    daemon.wait_connected()
    wait_until(lambda: len(asked) > 1, PATIENCE_S, "asked again who it is")
    assert daemon.cluster()["uid"] is None
    server.on_identity = None
    wait_until(lambda: daemon.cluster()["uid"] == server.uid, PATIENCE_S, "who it is")
    assert daemon.cluster()["connected"]


def test_an_answer_from_before_the_trouble_is_not_the_last_word_on_who_a_server_is(
    authority: Authority, serve: Serve, make: Make
) -> None:
    """The first cluster's answer may be under way while the watches are back already, from another cluster."""
    server = Model(authority)
    serve(server)
    asked, released = threading.Event(), threading.Event()

    def answer_late(exchange: Exchange) -> None:
        server.on_identity = None
        said = server.other(exchange.seen.path)
        asked.set()
        released.wait(PATIENCE_S)
        exchange.send(said)

    server.on_identity = answer_late
    server.put("jobs", job(1))
    daemon = make(Cluster(server), identity="500ms")
    daemon.launch()
    daemon.wait_connected()
    assert asked.is_set()
    server.collections["jobs"].objects.clear()
    server.rewind(5000, uid=OTHER_UID)
    server.put("jobs", job(3))
    wait_until(lambda: run_id(3) in daemon.run_rows(), PATIENCE_S, "the other cluster's runs")
    daemon.wait_connected()
    released.set()
    wait_until(lambda: daemon.cluster()["uid"] == OTHER_UID, PATIENCE_S, "another identity")
    daemon.wait_connected()


def test_who_a_server_is_is_asked_now_and_then(authority: Authority, serve: Serve, make: Make) -> None:
    """A balancer may hand over to another cluster at the clean end of a watch, with nothing else to tell."""
    server = Model(authority)
    serve(server)
    server.put("jobs", job(1))
    daemon = make(Cluster(server), relist="2s")
    daemon.launch()
    daemon.wait_connected()
    wait_until(lambda: daemon.cluster()["uid"] == server.uid, PATIENCE_S, "who it is")
    server.uid = OTHER_UID
    wait_until(lambda: daemon.cluster()["uid"] == OTHER_UID, PATIENCE_S, "another identity")
    daemon.wait_connected()


def test_events_that_came_with_the_end_of_a_connection_are_not_lost(
    authority: Authority, serve: Serve, make: Make
) -> None:
    """A proxy may join events into one chunk; what is longer than a callback may last is not cut by the end behind it.

    Two chunks are there with the end when the daemon wakes up; it must take in both wholly, or the second not at all.
    """
    server = Model(authority)
    serve(server)
    for number in range(120):
        server.put("jobs", job(number))
    daemon = make(Cluster(server), sleep="60s")
    daemon.launch()
    wait_until(lambda: len(daemon.run_rows()) == 120, PATIENCE_S, "all runs")
    lines = []
    for number in range(120):
        server.put("pods", pod(number, report=Report(finished=number + 1)))
        change = server.collections["pods"].log.pop()
        lines.append(change.line)
        server.collections["pods"].compacted = 0
    joined = [b"".join(lines[:119]), b"".join(lines[119:])]
    assert sum(map(len, joined)) < 250_000
    words = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in joined)
    os.kill(daemon.pid, signal.SIGSTOP)
    server.end_watches(clean=False, last_words=words)
    wait_until(lambda: not server.watches, PATIENCE_S, "all is sent, and the connections ended")
    os.kill(daemon.pid, signal.SIGCONT)
    wait_until(lambda: progress_of(daemon, 119) == 120, PATIENCE_S, "the last event")
    missing = [number for number in range(120) if progress_of(daemon, number) != number + 1]
    assert missing == []


# 5. Exec plugins ------------------------------------------------------------------------------------------------------


SECRET: Final = "sesame-4711"
TOKEN: Final = f"{SECRET}-token"
CREDENTIAL: Final = """{"apiVersion": "%s", "kind": "ExecCredential", "status": {"token": "%s"%s}}"""
PLUGINS: Final = {
    "hang": "sleep 1000 & echo $! >>$PIDS; echo $$ >>$PIDS; wait",
    "prompt": f"printf 'Password {SECRET}: ' >&2; read answer || exit 7; echo $answer",
    "fail": f"echo 'no {SECRET} today' >&2; exit 3",
    "rubbish": f"echo '{SECRET} is {{not JSON'",
    "empty": "true",
    "endless": f"echo $$ >>$PIDS; exec yes {SECRET}",
}
WORDS: Final = {
    "hang": "took over",
    "prompt": "process returned 7",
    "fail": "process returned 3",
    "rubbish": "failed to decode",
    "empty": "failed to decode",
    "endless": "",
}


def with_plugin(server: ModelServer, folder: Path, name: str, script: str, version: str = "v1") -> Cluster:
    """Return a cluster whose credentials come from a plugin, a shell script that may write to $PIDS."""
    folder.mkdir(exist_ok=True)
    plugin = folder / f"{name}-plugin"
    plugin.write_text(f"#!/bin/sh\nPIDS={folder / name}.pids\necho >>{folder / name}.calls\n{script}\n")
    plugin.chmod(0o755)
    kubeconfig = server.kubeconfig(folder / f"{name}.yaml")
    document = json.loads(kubeconfig.read_text())
    document["users"][0]["user"] = {
        "exec": {
            "apiVersion": f"client.authentication.k8s.io/{version}",
            "command": str(plugin),
            "env": [{"name": "PLUGIN_PASSWORD", "value": f"{SECRET}-env"}],
            "interactiveMode": "IfAvailable",
            "provideClusterInfo": False,
        }
    }
    kubeconfig.write_text(json.dumps(document))
    return Cluster(server, name, extra={"kubeconfig": str(kubeconfig)})


def calls_of(folder: Path, name: str) -> int:
    """Return how often a plugin was run."""
    path = folder / f"{name}.calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


def is_alive(pid: int) -> bool:
    """Tell whether a process runs, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def credential(version: str, token: str, expires: str = "") -> str:
    """Return the script that prints a credential."""
    also = f', "expirationTimestamp": "{expires}"' if expires else ""
    return f"cat <<END\n{CREDENTIAL % (f'client.authentication.k8s.io/{version}', token, also)}\nEND"


def test_plugins_that_hang_prompt_fail_and_print_rubbish_hurt_their_own_cluster_only(
    authority: Authority, serve: Serve, make: Make, tmp_path: Path
) -> None:
    good = Model(authority)
    serve(good)
    bad = Model(authority, token=TOKEN)
    serve(bad)
    folder = tmp_path / "plugins"
    clusters = [with_plugin(bad, folder, name, script) for name, script in PLUGINS.items()]
    daemon = make(*clusters, Cluster(good), credentials="4s", backoffMax="60s")
    daemon.launch()
    daemon.wait_connected()
    subscriber = daemon.subscribe()
    late = []
    for number in range(40):
        sent_at = time.monotonic()
        good.put("jobs", job(number))
        subscriber.wait_for(lambda event, number=number: event.get("runId") == run_id(number), "live")  # type: ignore[misc]
        late.append(subscriber.times[-1] - sent_at)
    assert sorted(late)[len(late) // 2] < 0.5
    for name, words in WORDS.items():
        said = daemon.wait_words(words or f"{name}", name, 2 * PATIENCE_S)
        assert name in said, "it names the plugin or the file"
        assert (
            "run it by hand" in said or "its plugin by hand" in said or "exec plugin" in said or "credentials" in said
        )
        assert not daemon.cluster(name)["connected"]
    pids = [int(pid) for name in PLUGINS for pid in read_words(folder / f"{name}.pids")]
    assert len(pids) >= 3
    wait_until(lambda: not any(map(is_alive, pids)), PATIENCE_S, "the plugins and their children are gone")
    assert SECRET.encode() not in daemon.everything_said()
    assert daemon.cluster()["connected"]
    daemon.stop()


def read_words(path: Path) -> list[str]:
    """Return a file's words; none where there is no file."""
    return path.read_text().split() if path.exists() else []


def test_plugins_that_hang_in_many_clusters_do_not_hold_up_another(
    authority: Authority, serve: Serve, make: Make, tmp_path: Path
) -> None:
    """Name look-up, credentials and queries of one cluster never wait for another's plugin."""
    good, bad = Model(authority), Model(authority, token=TOKEN)
    serve(good)
    serve(bad)
    good.put("jobs", job(1))
    folder = tmp_path / "plugins"
    clusters = [with_plugin(bad, folder, f"hang{number}", PLUGINS["hang"]) for number in range(6)]
    daemon = make(*clusters, Cluster(good), credentials="25s")
    daemon.launch()
    wait_until(lambda: calls_of(folder, "hang0"), PATIENCE_S, "the first plugin runs")
    daemon.wait_connected(timeout_s=15)
    wait_until(lambda: run_id(1) in daemon.run_rows(), 5, "its runs")
    asked_at = time.monotonic()
    assert daemon.ask("query", sql="SELECT 1").get("rows") == [[1]]
    assert time.monotonic() - asked_at < 8


def children_of(pid: int) -> list[int]:
    """Return the processes that descend from one."""
    found = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in (line.split() for line in found.splitlines())}

    def descends(child: int) -> bool:
        return child != pid and (parents.get(child) == pid or (child in parents and descends(parents[child])))

    return [child for child in parents if descends(child)]


def memory_of(pid: int) -> int:
    """Return a process's resident bytes, 0 where it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
def test_a_plugin_of_either_version_works(
    version: str, authority: Authority, serve: Serve, make: Make, tmp_path: Path
) -> None:
    server = Model(authority, token=TOKEN)
    serve(server)
    server.put("jobs", job(1))
    folder = tmp_path / "plugins"
    daemon = make(with_plugin(server, folder, "works", credential(version, TOKEN), version))
    daemon.launch()
    daemon.wait_connected("works")
    assert set(daemon.run_rows("works")) == {run_id(1)}
    assert calls_of(folder, "works") == 1
    assert SECRET.encode() not in daemon.everything_said()


def test_a_credential_is_renewed_before_it_expires(
    authority: Authority, serve: Serve, make: Make, tmp_path: Path
) -> None:
    server = Model(authority)
    serve(server)
    folder = tmp_path / "plugins"
    number, expires = (
        f"$(wc -l <{folder / 'renewed.calls'} | tr -d ' ')",
        "$(date -u -d '+8 seconds' +%Y-%m-%dT%H:%M:%SZ)",
    )
    cluster = with_plugin(server, folder, "renewed", credential("v1", f"{SECRET}-{number}", expires))
    daemon = make(cluster, renewBefore="5s")
    daemon.launch()
    daemon.wait_connected("renewed")
    assert calls_of(folder, "renewed") == 1
    began_at = time.monotonic()
    wait_until(lambda: calls_of(folder, "renewed") == 2, PATIENCE_S, "renewed ahead")
    assert time.monotonic() - began_at < 7
    wait_until(lambda: calls_of(folder, "renewed") == 3, PATIENCE_S, "and again")
    assert time.monotonic() - began_at > 2, "not at every turn"
    assert daemon.cluster("renewed")["connected"], "no watch was disturbed"
    server.end_watches()

    def tokens() -> set[str]:
        return {request.headers["authorization"] for request in watch_requests(server, began_at)}

    wait_until(tokens, PATIENCE_S, "watches that go on with the newer credential")
    assert f"Bearer {SECRET}-1" not in tokens()


def test_a_credential_shorter_than_the_time_ahead_does_not_run_the_plugin_all_the_time(
    authority: Authority, serve: Serve, make: Make, tmp_path: Path
) -> None:
    """A token of 50 s, renewed 60 s ahead by default, is always due; half of its life is soon enough."""
    server = Model(authority)
    serve(server)
    folder = tmp_path / "plugins"
    expires = "$(date -u -d '+50 seconds' +%Y-%m-%dT%H:%M:%SZ)"
    daemon = make(with_plugin(server, folder, "short", credential("v1", TOKEN, expires)))
    daemon.launch()
    daemon.wait_connected("short")
    began_at = time.monotonic()
    wait_until(lambda: time.monotonic() - began_at > 4, PATIENCE_S, "a window to count in")
    assert calls_of(folder, "short") <= 2


def test_a_token_refused_is_renewed_by_one_call_for_all_watches(
    authority: Authority, serve: Serve, make: Make, tmp_path: Path
) -> None:
    server = Model(authority, token=f"{SECRET}-1")
    serve(server)
    folder = tmp_path / "plugins"
    number = f"$(wc -l <{folder / 'refused.calls'} | tr -d ' ')"
    daemon = make(with_plugin(server, folder, "refused", credential("v1", f"{SECRET}-{number}")), backoffMin="2s")
    daemon.launch()
    daemon.wait_connected("refused")
    server.token = f"{SECRET}-2"
    server.end_watches()
    wait_until(lambda: calls_of(folder, "refused") >= 2, PATIENCE_S, "renewed")
    daemon.wait_connected("refused")
    assert calls_of(folder, "refused") == 2


def test_a_plugin_that_fails_later_is_told_of(authority: Authority, serve: Serve, make: Make, tmp_path: Path) -> None:
    """A person who reads only "Unauthorized" does not know what to do."""
    server = Model(authority, token=TOKEN)
    serve(server)
    folder = tmp_path / "plugins"
    cluster = with_plugin(
        server, folder, "later", f"[ $(wc -l <{folder / 'later.calls'}) = 1 ] || exit 3\n" + credential("v1", TOKEN)
    )
    daemon = make(cluster)
    daemon.launch()
    daemon.wait_connected("later")
    server.token = "another"
    server.end_watches()
    wait_until(lambda: not daemon.cluster("later")["connected"], PATIENCE_S, "refused")
    daemon.wait_words("process returned 3", "later", PATIENCE_S / 2)


# 6. A subscriber that never reads -------------------------------------------------------------------------------------


def test_a_subscriber_that_never_reads_lags_alone_in_bounded_memory(
    authority: Authority, serve: Serve, make: Make
) -> None:
    server = Model(authority)
    serve(server)
    runs = 50
    for number in range(runs):
        server.put("jobs", job(number))
    daemon = make(Cluster(server))
    daemon.launch()
    wait_until(lambda: len(daemon.run_rows()) == runs, PATIENCE_S, "all runs")
    before = daemon.resident_bytes
    other = daemon.subscribe()
    deaf = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for sock in deaf:
        sock.connect(str(daemon.socket_path))
        sock.sendall(b'{"action":"subscribe","clusters":["*"]}\n')
    with Flood(server, runs) as flood:
        wait_until(lambda: flood.sent > 14_000, 2 * PATIENCE_S, "a flood larger than any queue")
        assert daemon.ask("ping")["type"] != "error"
    server.put("jobs", job(runs))
    server.put("pods", pod(runs, report=Report(task="last")))
    other.wait_for(lambda event: event.get("currentTask") == "last", "the other hears the last", 2 * PATIENCE_S)
    assert other.of("lagged", "snapshot") == []
    seqs = [event["seq"] for event in other.of("run:updated", "run:added")]
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs))), "without a gap"
    assert daemon.resident_bytes - before < 120 * MIB
    for sock in deaf:
        check_that_it_resumes(daemon, server, sock, runs)
        sock.close()


def check_that_it_resumes(daemon: LooseDaemon, server: ModelServer, sock: socket.socket, runs: int) -> None:
    """Let a subscriber read at last: `lagged`, the rows as they are, then what follows them."""
    sock.settimeout(PATIENCE_S)
    with sock.makefile("rb") as file:
        messages = (json.loads(line) for line in file)
        seq = 0
        for message in messages:
            if message["type"] == "lagged":
                assert message["dropped"] > 0
                break
            assert message["seq"] >= seq
            seq = message["seq"]
        rows = {}
        for message in messages:
            assert message["type"] == "snapshot"
            rows.update({row["run_id"]: row for row in message["runs"]})
            seq = message["seq"]
            if message["last"]:
                break
        assert len(rows) == runs + 1
        assert {row["id"]: row["current_task"] for row in rows.values()} == {
            key: row["current_task"] for key, row in daemon.run_rows().items()
        }
        finished = server.version("pods")
        server.put("pods", pod(0, report=Report(finished=finished, total=10**6)))
        following = next(messages)
        assert following["seq"] == seq + 1
        assert following["progress"]["finished"] == finished


def test_a_client_that_asks_and_never_reads_does_not_fill_the_memory(
    authority: Authority, serve: Serve, make: Make
) -> None:
    server = Model(authority)
    serve(server)
    for number in range(1000):
        server.put("jobs", job(number))
    daemon = make(Cluster(server))
    daemon.launch()
    wait_until(lambda: len(daemon.run_rows()) == 1000, PATIENCE_S, "all runs")
    before = daemon.resident_bytes
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(daemon.socket_path))
        sock.settimeout(2)
        with contextlib.suppress(OSError):  # a daemon that takes no more for now, or hangs up, is right
            sock.sendall(b'{"action":"runs"}\n' * 300)
        assert daemon.ask("ping")["type"] != "error"
        assert daemon.resident_bytes - before < 100 * MIB


# 7. Sleep -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_daemon_that_was_stopped_makes_all_connections_anew(
    busy: bool, authority: Authority, serve: Serve, make: Make
) -> None:
    """Stopped as a laptop that sleeps: both clocks go on. It may be stopped in the middle of its work, too."""
    server = Model(authority)
    serve(server)
    for number in range(30):
        server.put("jobs", job(number))
    daemon = make(Cluster(server), sleep="1500ms")
    daemon.launch()
    daemon.wait_connected()
    with Flood(server, 30) if busy else contextlib.nullcontext():
        for _ in range(2 if busy else 1):
            slept_at = check_that_sleep_is_noticed(daemon, server)
    server.put("jobs", job(99))
    server.delete("jobs", NAMESPACE, f"fabrik-{run_id(0)}")
    wait_until(lambda: daemon.run_rows()[run_id(0)]["status"] == "cancelled", PATIENCE_S, "what was deleted then")
    wait_until(lambda: run_id(99) in daemon.run_rows(), PATIENCE_S, "what was added then")
    daemon.wait_connected()
    assert list_requests(server, slept_at) == [], "resumed"


def check_that_sleep_is_noticed(daemon: LooseDaemon, server: ModelServer) -> float:
    """Stop the daemon for longer than it may be; return when."""
    slept_at = time.monotonic()
    os.kill(daemon.pid, signal.SIGSTOP)
    time.sleep(2.5)
    woken_at = time.monotonic()
    os.kill(daemon.pid, signal.SIGCONT)

    def resources() -> set[str]:
        return {request.path.rpartition("/")[2] for request in watch_requests(server, woken_at)}

    wait_until(lambda: resources() == set(server.collections), PATIENCE_S, "all five watches over new connections")
    assert "slept" in daemon.log
    return slept_at


# 8. The cache ---------------------------------------------------------------------------------------------------------


def state_at(server: ModelServer, resource: str, version: int) -> dict[str, str]:
    """Return what the objects of a resource told at a version, as the cache keeps it, by name."""
    state: dict[str, str] = {}
    for change in server.collections[resource].log:
        if change.type == "BOOKMARK" or change.version > version:
            continue
        name = change.object["metadata"]["name"]
        if change.type == "DELETED":
            state.pop(name, None)
        else:
            facts = fabrik_daemon.facts_from(resource, change.object)
            assert facts is not None
            state[name] = fabrik_daemon.format_record(facts)
    return state


def cached(path: Path, resource: str) -> tuple[int, dict[str, str]]:
    """Return up to which version the cache is, and what it holds, gone objects left out."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)
    try:
        connection.execute("BEGIN")
        found = connection.execute("SELECT resource_version FROM watches WHERE resource = ?", (resource,)).fetchone()
        rows = connection.execute("SELECT name, facts FROM objects WHERE resource = ?", (resource,)).fetchall()
    finally:
        connection.close()
    version = int(found[0]) if found and found[0] else 0
    return version, {name: facts for name, facts in rows if not json.loads(facts).get("gone")}


def check_not_ahead(path: Path, server: ModelServer) -> None:
    """Check that the cache holds exactly what was at the version it claims: neither ahead of its data nor behind."""
    for resource_name in ("jobs", "pods"):
        version, held = cached(path, resource_name)
        assert held == (state_at(server, resource_name, version) if version else {}), resource_name


def test_a_cache_is_never_ahead_of_its_data_however_its_daemon_dies(
    authority: Authority, serve: Serve, make: Make
) -> None:
    server = Model(authority)
    serve(server)
    for number in range(60):
        server.put("jobs", job(number))
    chance = random.Random(8)
    daemon = make(Cluster(server), batch="5ms")
    for _ in range(4):
        with Flood(server, 60, rate=400):
            daemon.launch()
            daemon.wait_connected()
            time.sleep(chance.uniform(0.05, 0.6))
            gone = chance.randrange(60)
            with contextlib.suppress(KeyError):
                server.delete("jobs", NAMESPACE, f"fabrik-{run_id(gone)}")
            time.sleep(chance.uniform(0.0, 0.03))
            daemon.crash()
        check_not_ahead(daemon.cache, server)
    daemon.launch()
    daemon.wait_connected()
    with heartbeat(server):
        wait_until(lambda: cached(daemon.cache, "pods")[1] == state_at(server, "pods", 10**9), PATIENCE_S, "converged")
    check_not_ahead(daemon.cache, server)


def test_a_full_disk_stops_the_cache_and_not_the_stream(authority: Authority, serve: Serve, make: Make) -> None:
    """A limit on the size of files stands for the full disk: writes fail alike, and no root is needed."""
    server = Model(authority)
    serve(server)
    for number in range(40):
        server.put("jobs", job(number))
    daemon = make(Cluster(server), cacheRetry="100ms")
    daemon.launch()
    daemon.wait_connected()
    subscriber = daemon.subscribe()
    hard = resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (4096, hard))
    for number in range(40):
        server.put("pods", pod(number, report=Report(finished=number + 1)))
    wait_until(lambda: daemon.ask("status")["cache_error"], PATIENCE_S, "status says that the cache is not written")
    server.put("pods", pod(0, report=Report(finished=191)))
    subscriber.wait_for(lambda event: event.get("progress", {}) == {"finished": 191, "total": 192}, "the stream lives")
    assert progress_of(daemon, 0) == 191
    check_not_ahead(daemon.cache, server)
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (hard, hard))
    wait_until(lambda: not daemon.ask("status")["cache_error"], PATIENCE_S, "written again")
    wait_until(lambda: cached(daemon.cache, "pods")[1] == state_at(server, "pods", 10**9), PATIENCE_S, "caught up")
    check_not_ahead(daemon.cache, server)


@contextlib.contextmanager
def small_disk(place: Path, options: str) -> Iterator[None]:
    """Mount a disk of its own at a folder; skips where this user may not."""
    place.mkdir(parents=True, exist_ok=True)
    if os.geteuid() or not sys.platform.startswith("linux"):
        pytest.skip("only root may mount a disk")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(place)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("this root may not mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_really_full(authority: Authority, serve: Serve, make: Make) -> None:
    server = Model(authority)
    serve(server)
    for number in range(40):
        server.put("jobs", job(number))
    daemon = make(Cluster(server), cacheRetry="100ms")
    with small_disk(daemon.cache.parent, "size=8m,mode=0700"):
        daemon.launch()
        daemon.wait_connected()
        filler = daemon.cache.parent / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with Flood(server, 40, rate=300):
            wait_until(lambda: daemon.ask("status")["cache_error"], PATIENCE_S, "status says that the disk is full")
        assert "full" in daemon.ask("status")["cache_error"]
        check_not_ahead(daemon.cache, server)
        filler.unlink()
        wait_until(lambda: not daemon.ask("status")["cache_error"], PATIENCE_S, "written again")
        wait_until(lambda: cached(daemon.cache, "pods")[1] == state_at(server, "pods", 10**9), PATIENCE_S, "caught up")
        check_not_ahead(daemon.cache, server)
        daemon.stop()


def test_a_read_only_disk_is_read_and_refused_for_writing(authority: Authority, serve: Serve, make: Make) -> None:
    server = Model(authority)
    serve(server)
    server.put("jobs", job(1))
    daemon = make(Cluster(server))
    with small_disk(daemon.cache.parent, "size=8m,mode=0700"):
        daemon.launch()
        daemon.wait_connected()
        wait_until(lambda: cached(daemon.cache, "jobs")[1], PATIENCE_S, "in the cache")
        daemon.stop()
        subprocess.run(["mount", "-o", "remount,ro", str(daemon.cache.parent)], check=True)
        shown = daemon.cli("runs", "list")
        assert run_id(1) in shown.stdout, shown.stderr
        assert "not connected" in shown.stderr
        daemon.spawn()
        assert daemon.wait_for_end() != 0
        last = daemon.log.splitlines()[-1]
        assert "Traceback" not in daemon.log
        assert str(daemon.cache.parent) in last
        assert "ead-only" in last or "not writable" in last


def damage(path: Path, first_page: int = 2) -> None:
    """Overwrite the cache's pages from this one on."""
    size = path.stat().st_size
    page = 4096
    assert size > first_page * page
    with path.open("r+b") as file:
        file.seek((first_page - 1) * page)
        file.write(random.Random(1).randbytes(size - (first_page - 1) * page))


def test_a_damaged_cache_is_set_aside_and_made_anew(authority: Authority, serve: Serve, make: Make) -> None:
    server = Model(authority)
    serve(server)
    for number in range(20):
        server.put("jobs", job(number))
    daemon = make(Cluster(server))
    daemon.launch()
    wait_until(lambda: len(cached(daemon.cache, "jobs")[1]) == 20, PATIENCE_S, "in the cache")
    daemon.stop()
    damage(daemon.cache)
    before = daemon.cache.read_bytes()
    daemon.launch()
    daemon.wait_connected()
    assert len(daemon.run_rows()) == 20
    aside = list(daemon.cache.parent.glob("cache.db.damaged-*"))
    assert [path.read_bytes() for path in aside if not path.name.endswith(("-wal", "-shm"))] == [before]
    assert "damaged" in daemon.log
    assert "damaged" in json.dumps(daemon.ask("logs", lines=100, level="warning"))
    wait_until(lambda: len(cached(daemon.cache, "jobs")[1]) == 20, PATIENCE_S, "in the new cache")


def test_a_cache_damaged_under_a_daemon_never_claims_what_it_lacks(
    authority: Authority, serve: Serve, make: Make
) -> None:
    server = Model(authority)
    serve(server)
    for number in range(300):
        server.put("jobs", job(number))
    daemon = make(Cluster(server), cacheRetry="100ms")
    daemon.launch()
    wait_until(lambda: len(cached(daemon.cache, "jobs")[1]) == 300, PATIENCE_S, "in the cache")
    subscriber = daemon.subscribe()
    connection = sqlite3.connect(daemon.cache, timeout=10)
    wait_until(lambda: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0, 10, "no WAL is left")
    connection.close()
    damage(daemon.cache, 3)
    for number in range(300):
        server.put("pods", pod(number, report=Report(finished=number + 1, total=300)))
    subscriber.wait_for(lambda event: event.get("progress") == {"finished": 300, "total": 300}, "the stream lives on")
    wait_until(
        lambda: daemon.ask("status")["cache_error"] or list(daemon.cache.parent.glob("cache.db.damaged-*")),
        PATIENCE_S / 2,
        "status says that the cache is damaged, or it has been set aside",
    )
    daemon.crash()
    daemon.launch()
    daemon.wait_connected()
    with heartbeat(server):
        wait_until(lambda: progress_of(daemon, 299) == 300, PATIENCE_S, "made anew from the cluster")
        wait_until(
            lambda: cached(daemon.cache, "pods")[1] == state_at(server, "pods", 10**9), PATIENCE_S, "nothing is missing"
        )


# 9. Many starts, sockets, folders -------------------------------------------------------------------------------------


def test_the_ninth_case_has_its_own_file() -> None:
    assert (Path(__file__).parent / "test_lifecycle.py").exists()


# 10. Many pods, hostile SQL, a pinned reader --------------------------------------------------------------------------

HOSTILE: Final = (
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
    "SELECT count(*) FROM objects a, objects b, objects c WHERE a.facts LIKE '%x%y%z%' || b.name || c.name",
    "SELECT count(*) FROM runs WHERE printf('%.*c', 400000000, 'x') LIKE '%y%'",
)


def test_many_pods_in_churn_with_hostile_queries_and_a_pinned_reader(
    authority: Authority, serve: Serve, make: Make
) -> None:
    server = Model(authority)
    serve(server)
    for number in range(PODS):
        server.put("jobs", job(number))
        server.put("pods", pod(number, report=Report(finished=0)))
    server.compact()
    daemon = make(Cluster(server), query="1s")
    daemon.launch()
    wait_until(lambda: len(daemon.run_rows()) == PODS, PATIENCE_S + PODS / 200, "all runs")
    wait_until(lambda: len(cached(daemon.cache, "pods")[1]) == PODS, PATIENCE_S + PODS / 200, "in the cache")
    before = daemon.resident_bytes
    pinned = sqlite3.connect(f"file:{daemon.cache}?mode=ro", uri=True)
    pinned.execute("BEGIN")
    pinned.execute("SELECT count(*) FROM runs").fetchone()
    subscriber = daemon.subscribe()
    with Flood(server, PODS) as flood:
        for sql in HOSTILE:
            asked_at = time.monotonic()
            answer = daemon.ask("query", sql=sql)
            assert answer["type"] == "error", answer
            assert time.monotonic() - asked_at < 12
            asked_at = time.monotonic()
            assert daemon.ask("ping")["type"] != "error"
            assert time.monotonic() - asked_at < 5
        wait_until(lambda: flood.sent > 5000, PATIENCE_S, "churn")
    server.put("jobs", job(PODS))
    subscriber.wait_for(lambda event: event.get("runId") == run_id(PODS), "all is told", PATIENCE_S)
    assert daemon.resident_bytes - before < 250 * MIB
    wal = Path(f"{daemon.cache}-wal")
    assert wal.stat().st_size < WAL_BYTES + 16 * MIB
    pinned.close()
    wait_until(lambda: run_id(PODS) in {row["id"] for row in cache_runs(daemon)}, PATIENCE_S, "the cache catches up")


def cache_runs(daemon: LooseDaemon) -> list[dict[str, Any]]:
    """Return the runs in the cache file."""
    return daemon.rows("SELECT id FROM runs")


def test_a_pinned_reader_bounds_the_wal_and_status_says_so(authority: Authority, serve: Serve, make: Make) -> None:
    """Over 64 MB of WAL, writes are merged to the last row per run and committed every 5 s."""
    server = Model(authority)
    serve(server)
    for number in range(300):
        server.put("jobs", job(number))
    daemon = make(Cluster(server), batch="1ms")
    daemon.launch()
    wait_until(lambda: len(cached(daemon.cache, "jobs")[1]) == 300, PATIENCE_S, "in the cache")
    pinned = sqlite3.connect(f"file:{daemon.cache}?mode=ro", uri=True)
    pinned.execute("BEGIN")
    pinned.execute("SELECT count(*) FROM runs").fetchone()
    wal = Path(f"{daemon.cache}-wal")
    with Flood(server, 300, rate=1500):
        wait_until(lambda: wal.stat().st_size > WAL_BYTES, 60, "a WAL that cannot be taken back")
        wait_until(
            lambda: "WAL" in (daemon.ask("status").get("cache_error") or ""), 15, "status says that a reader pins it"
        )
        grown = wal.stat().st_size
        time.sleep(6)
        assert wal.stat().st_size - grown < 8 * MIB
    pinned.close()
    wait_until(lambda: not daemon.ask("status")["cache_error"], PATIENCE_S, "and that it no longer does")
