"""Scenarios 14 and 15 of the recordings, every response: served byte for byte, and what the daemon concludes.

One daemon follows one cluster for each response. Its server is a model that plays the recorded bytes once, in place of
one answer, and behaves from then on. What a daemon never asks for (POST, discovery, a Table) comes all the same, as the
answer to a LIST: a client must not take it for one.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest
from fabrik_objects import job, run_id
from fakes import RECORDINGS, ModelServer, parse_response
from fakes_http import Access
from harness import Cluster, wait_until
from links import PATIENCE_S, LooseDaemon

import fabrik_daemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fakes import Authority, Request
    from fakes_http import Exchange

PROTOCOL: Final = "14-watch-protocol"
REFUSALS: Final = "15-refusals"
MARK: Final = 7  # the run that the model knows, and the recordings do not
RUN: Final = "01m84b0a6dh1jhpmkpkwz6m9pz"  # the run of scenario 14
IDLE_S: Final = 3.0
FORBIDDEN_S: Final = 2.0
EMPTY_S: Final = 1.2  # a watch that ends sooner and told nothing counts as a failure


class Played(NamedTuple):
    """One recorded response, what it answers and what comes of it."""

    scenario: str
    file: str
    resource: str
    verb: str  # what it answers: list, watch, or stream (a watch that asks for the initial list)
    state: str = ""  # the first state told with an error
    error: str = ""  # words of it
    wait_s: float = 0.0  # until the next request, at the least
    after: str = ""  # what the next request goes on from: the "last" version, the "same", "0", "paged" or "token"
    end: str = "keep"  # keep (the connection goes on), break, open (silence)
    pause_s: float = 0.0  # before its last chunk
    runs: int = 0  # the rows that its objects make

    @property
    def cluster(self) -> str:
        """The name of the cluster that plays it."""
        return f"c{self.scenario[:2]}-{self.file}"


def listed(file: str, scenario: str = PROTOCOL, **also: Any) -> Played:
    """Return a list that is taken as it is."""
    return Played(scenario, file, file.split("-")[1], "list", runs=also.pop("runs", 1), **also)


def watched(file: str, after: str, **also: Any) -> Played:
    """Return a watch that goes on from a version."""
    return Played(also.pop("scenario", PROTOCOL), file, file.split("-")[1], "watch", after=after, **also)


def failed(file: str, error: str, **also: Any) -> Played:
    """Return a refusal in scenario 15; the daemon backs off and asks the same again."""
    state = also.pop("state", "backing off")
    verb = "watch" if file.startswith("watch") else "list"
    resource = "pods" if "-pods-" in file else "jobs"
    return Played(REFUSALS, file, resource, verb, state, error, **also)


NOT_FOUND: Final = "the server could not find the requested resource"
NO_LIST: Final = "no JSON|no list|cut off"
ALL: Final = (
    listed("list-pods", after="last"),
    listed("list-jobs-rv0", after="last"),
    listed("list-pods-before-kill", after="last"),
    listed("list-pods-relist", after="last"),
    watched("watch-pods-timeout8", after="last", runs=1),
    watched("watch-cronjobs-bookmarks75", after="last", pause_s=EMPTY_S),
    watched("watch-jobs-no-bookmarks", after="same", pause_s=EMPTY_S),
    watched("watch-pods-no-rv", after="last", runs=1),
    watched("watch-jobs-rv0", after="last", runs=1),
    watched("watch-pods-selector", after="last", runs=1),
    watched("watch-pods-future-rv", after="same", pause_s=EMPTY_S),
    Played(PROTOCOL, "watch-pods-watchlist", "pods", "stream", after="last", runs=1),
    Played(PROTOCOL, "watch-cronjobs-watchlist-empty", "cronjobs", "stream", after="last", pause_s=EMPTY_S),
    Played(PROTOCOL, "watch-jobs-watchlist-no-match", "jobs", "stream", after="0"),
    Played(
        PROTOCOL,
        "list-jobs-rv-too-large",
        "jobs",
        "list",
        "backing off",
        "Too large resource version: 100299",
        wait_s=1.0,
        after="paged",
    ),
    Played(
        PROTOCOL, "list-jobs-rv-invalid", "jobs", "list", "backing off", "invalid resource version", 0.0, after="paged"
    ),
    watched("watch-jobs-rv-invalid", state="backing off", error='Invalid value: "abc"', after="paged"),
    watched(
        "watch-jobs-killed", state="backing off", error="the connection broke off", after="last", end="break", runs=1
    ),
    watched(
        "watch-pods-killed-mid-chunk", state="backing off", error="the connection broke off", after="last", end="break"
    ),
    watched(
        "watch-cronjobs-killed-idle", state="backing off", error="the connection broke off", after="same", end="break"
    ),
    watched("watch-pods-stale-rv", state="listing", error="the resource version expired", after="paged"),
    watched("watch-pods-rv1", state="listing", error="the resource version expired", after="paged"),
    Played(
        PROTOCOL, "list-pods-stale-exact", "pods", "list", "listing", "the resource version expired", after="paged"
    ),
    watched("watch-pods-graceful-shutdown", after="same", pause_s=EMPTY_S),
    failed("list-jobs-401-bad-token", "Unauthorized", state="unauthorised", after="0"),
    failed("list-jobs-403-no-role", 'no right to list jobs in fabrik-runs: .*cannot list resource "jobs"',
           state="forbidden", wait_s=FORBIDDEN_S - 0.5, after="0"),
    failed("list-pods-403-cluster-scope", 'no right to list pods in .*cannot list resource "pods"',
           state="forbidden", wait_s=FORBIDDEN_S - 0.5, after="0"),
    failed("list-jobs-403-anonymous", 'User "system:anonymous" cannot list resource "jobs"', state="forbidden",
           wait_s=FORBIDDEN_S - 0.5, after="0"),
    failed("watch-pods-401-bad-token", "Unauthorized", state="unauthorised", after="same"),
    failed("watch-pods-403-no-role", 'no right to watch pods in fabrik-runs: .*cannot watch resource "pods"',
           state="forbidden", wait_s=FORBIDDEN_S - 0.5, after="same"),
    failed("get-404-wrong-resource", NOT_FOUND, after="0"),
    failed("get-404-wrong-version", NOT_FOUND, after="0"),
    failed("get-404-wrong-root", "404 page not found", after="0"),
    failed("get-404-missing-object", "not found", after="0"),
    listed("list-jobs-missing-namespace", REFUSALS, runs=0, after="last"),
    failed("list-jobs-406-accept", "406: Not Acceptable", after="0"),
    listed("list-jobs-406-fallback", REFUSALS, runs=0, after="last"),
    failed("post-415-content-type", "the body of the request was in an unknown format", after="0"),
    failed("get-405-method", "does not allow this method", after="0"),
    failed("get-version", NO_LIST, after="0"),
    failed("get-version-slash", NO_LIST, after="0"),
    failed("get-api", NO_LIST, after="0"),
    failed("get-apis-batch", NO_LIST, after="0"),
    failed("get-apis-batch-v1", NO_LIST, after="0"),
    failed("get-table", NO_LIST, after="0"),
    failed("list-jobs-429", "Too many requests, please try again later.", wait_s=1.0, after="0"),
    failed("watch-jobs-429", "Too many requests, please try again later.", wait_s=1.0, after="same"),
    listed("list-jobs-allowed", REFUSALS, runs=0, after="last"),
    watched("watch-jobs-role-revoked", scenario=REFUSALS, after="last", runs=1),
    failed("list-jobs-403-revoked", "no right to list jobs in fabrik-runs", state="forbidden",
           wait_s=FORBIDDEN_S - 0.5, after="0"),
    watched("watch-jobs-store-down", scenario=REFUSALS, state="stale", error="silent for", end="open",
            wait_s=IDLE_S - 0.5, after="paged"),
    failed("list-jobs-store-down", "Timeout: request did not complete within the allotted timeout", after="0"),
    listed("list-jobs-store-down-rv0", REFUSALS, runs=1, after="last"),
    failed("get-readyz-store-down", NO_LIST, after="0"),
    listed("list-jobs-gzip", REFUSALS, runs=61, after="last"),
    listed("list-jobs-gzip-small", REFUSALS, runs=0, after="token"),
    listed("list-jobs-metadata-only", REFUSALS, runs=0, after="token"),
)  # fmt: skip


def owner_of_the_pod() -> str:
    """Return the uid of the Job whose Pod scenario 14 is about."""
    body = parse_response((RECORDINGS / PROTOCOL / "list-pods-relist.http").read_bytes())[1]
    return str(json.loads(body)["items"][0]["metadata"]["ownerReferences"][0]["uid"])


class Player(ModelServer):
    """A model that answers one request with recorded bytes."""

    def __init__(self, played: Played, authority: Authority) -> None:
        super().__init__(authority, token="a-token")
        self.initial_events = "stream" if played.verb == "stream" else "refuse"
        self.uid = f"uid-of-{played.cluster}"
        self.played = played
        self.raw = (RECORDINGS / played.scenario / f"{played.file}.http").read_bytes()
        self.at = 0.0  # when it was played, on time.monotonic()
        self.number = -1  # of the request that it answered
        self._version = 200  # older than all recordings
        self.put("jobs", job(MARK))
        if played.scenario == PROTOCOL and played.resource == "pods":
            self.put("jobs", job(RUN, metadata={"uid": owner_of_the_pod()}))

    def answer(self, exchange: Exchange) -> None:
        """Play once, in place of the first answer to what it belongs to."""
        request = exchange.seen
        streams = "sendInitialEvents" in request.query
        verb = "stream" if streams else "watch" if request.is_watch else "list"
        with self.changed:
            mine = self.number < 0 and verb == self.played.verb and request.path.endswith(f"/{self.played.resource}")
            if mine:
                self.number = self.requests.index(request)
                self._version = max(self._version, int(last_version(self) or 0))
        if mine:
            self._play(exchange)
        else:
            super().answer(exchange)

    def _play(self, exchange: Exchange) -> None:
        if self.played.pause_s:
            exchange.wfile.write(self.raw[:-5])
            time.sleep(self.played.pause_s)
            exchange.wfile.write(self.raw[-5:])
        else:
            exchange.wfile.write(self.raw)
        self.at = time.monotonic()
        if self.played.end == "break":
            exchange.hang_up()
        elif self.played.end == "open":
            with self.changed:
                self.changed.wait_for(lambda: self.stopping, PATIENCE_S)
            exchange.hang_up()

    def following(self) -> Request | None:
        """Return the next request for the same resource after the one played."""
        with self.changed:
            rest = self.requests[self.number + 1 :] if self.number >= 0 else []
        return next((request for request in rest if request.path.endswith(f"/{self.played.resource}")), None)

    @property
    def asked(self) -> Request:  # type: ignore[override]
        """The request that was answered so."""
        return self.requests[self.number]


def keep_alive(players: list[Player], over: threading.Event) -> None:
    """Send bookmarks, so that only what is meant to be silent is."""
    while not over.wait(IDLE_S / 4):
        for player in players:
            player.bookmark()


@pytest.fixture(scope="module")
def world(
    executable: Path, unpacked: Path, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LooseDaemon, dict[str, Player]]]:
    """Let one daemon meet every response, each as a cluster of its own."""
    players = {played.cluster: Player(played, authority) for played in ALL}
    for player in players.values():
        player.start()
    clusters = [Cluster(player, name, access=Access(auth="token")) for name, player in players.items()]
    timing = {
        "connect": "60s",
        "identity": "30s",
        "backoffMin": "100ms",
        "backoffMax": "1s",
        "idle": f"{IDLE_S}s",
        "forbiddenRetry": f"{FORBIDDEN_S}s",
    }
    place = (executable, unpacked, tmp_path_factory.mktemp("refusals"))
    over = threading.Event()
    daemon = LooseDaemon(place, clusters, timing=timing, config={"logLevel": "debug"})
    try:
        daemon.launch()
        threading.Thread(target=keep_alive, args=(list(players.values()), over), daemon=True).start()
        yield daemon, players
    finally:
        over.set()
        daemon.kill()
        for player in players.values():
            player.stop()
    for player in players.values():
        assert player.violations == []
        assert player.crashes == []


def last_version(player: Player) -> str:
    """Return the version that the last whole event or the list of a response brings one up to; empty for none."""
    body = parse_response(player.raw)[1]
    body = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
    if player.played.after in {"0", "paged", "same"}:
        return ""
    if player.played.verb == "list":
        return str(json.loads(body)["metadata"]["resourceVersion"])
    *lines, _unfinished = body.split(b"\n")
    return str(json.loads(lines[-1])["object"]["metadata"]["resourceVersion"]) if lines else ""


def reported(player: Player) -> tuple[int | None, str | None]:
    """Return what the last object of a recorded response tells of its run's progress; nothing where there is none."""
    body = parse_response(player.raw)[1]
    if player.played.verb == "list":
        objects = json.loads(body).get("items", [])
    else:
        events = [json.loads(line) for line in body.split(b"\n")[:-1]] if b"\n" in body else []
        objects = [event["object"] for event in events if event["type"] in {"ADDED", "MODIFIED"}]
    if not objects:
        return None, None
    annotations = objects[-1]["metadata"].get("annotations", {})
    progress = json.loads(annotations.get("fabrik.dev/progress", "{}"))
    return progress.get("finished"), annotations.get("fabrik.dev/task")


def states_told(daemon: LooseDaemon, player: Player) -> list[str]:
    """Return the states of the watch that met the response, with their errors, as the log tells them."""
    begin = f"{player.played.cluster}: {player.played.resource} in fabrik-runs: "
    return [line.partition(begin)[2] for line in daemon.log.splitlines() if begin in line]


def test_every_recorded_response_is_played() -> None:
    played = {(one.scenario, f"{one.file}.http") for one in ALL}
    recorded = {
        (path.parent.name, path.name) for name in (PROTOCOL, REFUSALS) for path in (RECORDINGS / name).glob("*.http")
    }
    assert played == recorded


@pytest.mark.parametrize("played", ALL, ids=lambda played: f"{played.scenario[:2]}-{played.file}")
def test_what_a_response_makes_the_daemon_do_next(played: Played, world: tuple[LooseDaemon, dict[str, Player]]) -> None:
    _, players = world
    player = players[played.cluster]
    wait_until(lambda: player.following() is not None, PATIENCE_S, f"{played.file} is played, and asked on after it")
    following = player.following()
    assert following
    assert following.at - player.at >= played.wait_s - 0.1
    query = following.query
    if played.after in {"0", "paged"}:
        assert not following.is_watch
        assert query.get("resourceVersion") == ("0" if played.after == "0" else None)
        assert query["limit"] == "500"
    elif played.after == "token":
        assert query["continue"] == json.loads(parse_response(player.raw)[1])["metadata"]["continue"]
    else:
        version = {"same": player.asked.query.get("resourceVersion"), "last": None}.get(played.after, played.after)
        assert query.get("watch") == "true"
        assert query["resourceVersion"] == (version or last_version(player))
        assert "sendInitialEvents" not in query


@pytest.mark.parametrize("played", ALL, ids=lambda played: f"{played.scenario[:2]}-{played.file}")
def test_what_the_daemon_says_of_a_response(played: Played, world: tuple[LooseDaemon, dict[str, Player]]) -> None:
    daemon, players = world
    player = players[played.cluster]
    wait_until(lambda: player.following() is not None, PATIENCE_S, f"{played.file} is played, and asked on after it")
    told = [line for line in states_told(daemon, player) if ": " in line and "continue token" not in line]
    if played.state:
        assert told
        state, _, error = told[0].partition(": ")
        assert state == played.state
        assert re.search(played.error, error), error
        assert len(error) < 500
    else:
        assert told == []


@pytest.mark.parametrize("played", ALL, ids=lambda played: f"{played.scenario[:2]}-{played.file}")
def test_the_daemon_ends_where_the_server_is(played: Played, world: tuple[LooseDaemon, dict[str, Player]]) -> None:
    """Whatever was met on the way, the watch goes on in the end, and no run was made up or lost."""
    daemon, players = world
    daemon.wait_connected(played.cluster)
    wait_until(
        lambda: daemon.watch(played.resource, played.cluster)["state"] == fabrik_daemon.WATCHING, PATIENCE_S, "watching"
    )
    rows = daemon.run_rows(played.cluster)
    known = set(rows) - {run_id(MARK)}
    if played.state and played.verb == "list":
        assert run_id(MARK) in rows, "a refusal was taken for a list"
    if played.scenario == PROTOCOL and played.resource == "pods":
        shown = rows[RUN]["progress_finished"], rows[RUN]["current_task"]
        assert shown == reported(players[played.cluster])
        assert len(known) == 1
    else:
        assert len(known) == played.runs, known
