"""Lists, one run whole, history and waiting, through the built executable: with a daemon, without one, and fresh."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import signal
import sqlite3
import subprocess
import time
import uuid
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

import fabrik_objects
import pytest
import yaml
from clients import LinesClient, WebSocketClient, http_request
from commands import Done, refused
from fabrik_objects import Report, run_id
from fakes import Access, Authority, ModelServer
from harness import Cluster, wait_until
from hosts import Host

from fabrik_daemon import format_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fakes import KubernetesApi

    Serve = Callable[[KubernetesApi], None]

TOKEN: Final = "a-bearer-token"
BY_TOKEN: Final = Access(auth="token", ca="data")
PATIENCE_S: Final = 30.0
LATENCY_S: Final = 2.0  # of an answer; a query that held the daemon would hold it for its whole 5 s
NAMES: Final = ("dev", "prod")


def server_with_runs(authority: Authority, serve: Serve, numbers: range) -> ModelServer:
    """Start a server with runs: every third is blocked, finished or running."""
    server = ModelServer(authority, token=TOKEN)
    server.uid = str(uuid.uuid4())
    for number in numbers:
        ended = ("Complete",) if number % 3 == 1 else ()
        server.put("jobs", fabrik_objects.job(number, conditions=ended))
        phase = ("human-gate", "done", "implement")[number % 3]
        report = Report(phase=phase, task=f"{number}:impl", finished=number, total=192)
        server.put("pods", fabrik_objects.pod(number, phase="Succeeded" if ended else "Running", report=report))
        server.put("persistentvolumeclaims", fabrik_objects.pvc(number))
    server.put("cronjobs", fabrik_objects.cronjob("nightly"))
    about = fabrik_objects.pod(numbers[0])
    server.put("events", fabrik_objects.event(about, reason="FailedMount", message="no such volume"))
    serve(server)
    return server


def done_of(done: subprocess.CompletedProcess[str]) -> Done:
    """Return what a command left behind, as `refused` takes it."""
    return Done(done.returncode, done.stdout, done.stderr, 0, 0)


class World:
    """Two clusters and a host that follows them."""

    def __init__(self, host: Host, servers: dict[str, ModelServer]) -> None:
        self.host = host
        self.servers = servers

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command."""
        return self.host.cli(*words)

    def rows(self, *words: str) -> list[dict[str, Any]]:
        """Run a list and return its rows."""
        found: list[dict[str, Any]] = self.host.json(*words)
        return found


def make_world(executable: Path, unpacked: Path, root: Path, authority: Authority, serve: Serve) -> World:
    servers = {
        name: server_with_runs(authority, serve, range(first, first + 6)) for name, first in zip(NAMES, (0, 100))
    }
    clusters = [
        Cluster(server, name, access=BY_TOKEN, extra={"priority": place})
        for place, (name, server) in enumerate(servers.items())
    ]
    timing = {"fresh": 5, "connect": 2, "resolve": 2, "backoffMin": 0.2}
    return World(Host(executable, unpacked, root, clusters, timing=timing), servers)


@pytest.fixture
def world(executable: Path, unpacked: Path, tmp_path: Path, authority: Authority, serve: Serve) -> Iterator[World]:
    found = make_world(executable, unpacked, tmp_path / "world", authority, serve)
    with found.host:
        found.host.start()
        found.host.settle()
        yield found


LISTS: Final = (
    ("runs", "list"),
    ("runs", "list", "--cluster", "prod", "--status", "blocked"),
    ("runs", "list", "--phase", "implement", "--phase", "human-gate", "--limit", "3"),
    ("runs", "list", "--spec", "another"),
    ("runs", "list", "--project", "myapp", "--template", "coding", "--namespace", "fabrik-runs"),
    ("runs", "list", "--sort-by", "progress_finished", "--limit", "5"),
    ("runs", "list", "--sort-by", "finished_at", "--reverse"),
    ("runs", "list", "--since", "2020-01-01", "--reverse", "--limit", "2"),
    ("runs", "list", "--since", "0s"),
    ("schedules", "list"),
    ("schedules", "list", "--cluster", "dev", "--sort-by", "schedule"),
    ("schedules", "list", "--status", "waiting", "--status", "active"),
    ("schedules", "list", "--status", "suspended"),
    ("volumes", "list", "--status", "Bound", "--limit", "3"),
    ("volumes", "list", "--reverse"),
    ("volumes", "list", "--phase", "Bound", "--sort-by", "capacity_bytes", "--limit", "4"),
    ("volumes", "list", "--run", run_id(101)),
    ("warnings", "list"),
    ("warnings", "list", "--reason", "FailedMount", "--cluster", "prod"),
)


def without_written_at(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without what says when they were written here."""
    return [{key: value for key, value in row.items() if key != "last_sync_at"} for row in rows]


def test_daemon_cache_and_api_servers_give_the_same_lists(world: World) -> None:
    by_daemon = {words: world.rows(*words) for words in LISTS}
    for words, rows in by_daemon.items():
        assert without_written_at(world.rows(*words, "--fresh")) == without_written_at(rows), words
    assert [len(rows) for rows in by_daemon.values()][:4] == [12, 2, 3, 0]
    assert [row["cluster"] for row in by_daemon["schedules", "list"]] == ["dev", "prod"]
    assert len(by_daemon["volumes", "list", "--reverse"]) == 12
    assert by_daemon["runs", "list", "--since", "0s"] == []
    finished = by_daemon["runs", "list", "--sort-by", "finished_at", "--reverse"]
    assert [row["status"] for row in finished] == ["finished"] * 4 + [row["status"] for row in finished[4:]]
    world.host.stop()
    for server in world.servers.values():
        server.stop()
    for words, rows in by_daemon.items():
        done = world.run(*words, "-o", "json")
        assert (done.returncode, json.loads(done.stdout)) == (0, rows), words
        assert "from the cache: dev as of" in done.stderr or "from the cache: prod as of" in done.stderr, words


def test_a_live_answer_says_nothing_beside_itself(world: World) -> None:
    for words in (("runs", "list"), ("volumes", "list", "-o", "csv"), ("runs", "show", "@latest")):
        done = world.run(*words)
        assert (done.returncode, done.stderr) == (0, ""), words
    assert world.run("runs", "list", "--max-age", "1ms").returncode == 0, "what is live is never too old"


def test_what_is_too_old_is_refused(world: World) -> None:
    world.host.stop()
    for words in (("runs", "list"), ("runs", "show", "@latest"), ("query", "SELECT 1"), ("runs", "stats")):
        done = world.run(*words, "--max-age", "1ms")
        assert (done.returncode, done.stdout) == (6, ""), words
        assert ": as of " in done.stderr
        assert world.run(*words, "--max-age", "1h").returncode == 0


def test_fresh_prints_the_rest_where_one_cluster_does_not_answer(world: World) -> None:
    world.host.stop()
    world.servers["prod"].stop()
    began = time.monotonic()
    done = world.run("runs", "list", "--fresh", "-o", "json")
    assert time.monotonic() - began < PATIENCE_S
    assert (done.returncode, len(json.loads(done.stdout))) == (5, 6)
    assert done.stderr.startswith("fabrik-daemon: prod: ")
    assert world.run("runs", "list", "--fresh", "--cluster", "dev").returncode == 0
    none = world.run("runs", "show", run_id(101), "--fresh")
    assert (none.returncode, none.stdout) == (5, "")
    assert "no cluster answered" in none.stderr
    assert world.run("runs", "list", "--fresh", "--cluster", "dve").returncode == 3


def test_fresh_sees_what_the_cache_does_not(world: World) -> None:
    world.host.stop()
    server = world.servers["dev"]
    server.put("jobs", fabrik_objects.job(50))
    server.put("pods", fabrik_objects.pod(2, report=Report(phase="review", task="9:review", finished=9, total=10)))
    assert run_id(50) not in world.run("runs", "list", "-o", "name").stdout
    assert run_id(50) in world.run("runs", "list", "--fresh", "-o", "name").stdout
    shown = world.host.json("runs", "show", run_id(2), "--fresh")
    assert (shown["phase"], shown["current_task"], shown["progress_finished"]) == ("review", "9:review", 9)
    assert world.host.json("runs", "show", run_id(2))["phase"] == "implement", "and keeps nothing of it"
    server.delete("jobs", "fabrik-runs", f"fabrik-{run_id(2)}")
    server.delete("pods", "fabrik-runs", f"fabrik-{run_id(2)}-{run_id(2)[-5:]}")
    gone = world.host.json("runs", "show", run_id(2), "--fresh")
    assert (gone["status"], gone["reason"]) == (None, "VanishedUnseen")


def test_a_run_by_its_beginning_and_by_its_place(world: World) -> None:
    newest = world.rows("runs", "list", "--limit", "1")[0]["run_id"]
    blocked = world.rows("runs", "list", "--status", "blocked", "--limit", "1")[0]["run_id"]
    ids = [row["run_id"] for row in world.rows("runs", "list")]
    longest = next(
        ids[0][:size] for size in range(len(ids[0]), -1, -1) if all(x.startswith(ids[0][:size]) for x in ids)
    )
    for _ in range(2):  # with the daemon, then without
        assert world.host.json("runs", "show", "@latest")["run_id"] == newest
        assert world.host.json("runs", "show", "@blocked")["run_id"] == blocked
        assert world.host.json("runs", "show", newest[:-1])["run_id"] == newest
        assert world.host.json("runs", "show", "--id", newest)["run_id"] == newest
        several = world.run("runs", "show", longest)
        assert (several.returncode, "ambiguous" in several.stderr, "8 others" in several.stderr) == (2, True, True)
        for word, code in (("@failed", 3), ("zzz", 3), ("@lates", 2), ("", 3)):
            assert world.run("runs", "show", word).returncode == code, word
        if world.host.daemon_pids():
            world.host.stop()


def wait_for_run(world: World, run: str, column: str, value: str) -> None:
    """Return when a run's column has a value."""
    wait_until(lambda: world.host.json("runs", "show", run)[column] == value, PATIENCE_S, f"{column} is {value}")


def test_a_run_s_timeline(world: World) -> None:
    server, run = world.servers["dev"], run_id(2)
    for task in ("3:impl", "4:test"):
        server.put("pods", fabrik_objects.pod(2, report=Report(phase="validate", task=task, finished=5, total=192)))
        wait_for_run(world, run, "current_task", task)
    server.put("pods", fabrik_objects.pod(2, report=Report(phase="human-gate", task="4:test", finished=6, total=192)))
    wait_until(lambda: world.host.json("runs", "show", run)["status"] == "blocked", PATIENCE_S, "the gate")
    world.host.settle()
    for _ in range(2):
        shown = world.host.json("runs", "show", run)
        what = [step["what"] for step in shown["timeline"]]
        what = what[what.index("running") :]  # before that it was pending, where its Job was listed first
        assert what[1:] == ["task 2:impl done (5/192)", "task 3:impl done (5/192)", "blocked", "task 4:test (6/192)"]
        assert [step["status"] for step in shown["timeline"]][-5:] == ["running", None, None, "blocked", None]
        table = world.run("runs", "show", run).stdout
        for part in ("timeline\nAT", "volumes\nVOLUME", "task 3:impl done (5/192)", "progress:   6/192 (3 %)"):
            assert part in table, table
        assert "\nevents\n" not in table
        assert "\nevents\nAGE" in world.run("runs", "show", run, "--events").stdout
        if world.host.daemon_pids():
            world.host.stop()


def test_runs_of_an_earlier_time(world: World) -> None:
    before = format_time(time.time(), milliseconds=True)
    old = {row["run_id"]: row for row in world.rows("runs", "list")}
    time.sleep(0.01)  # the next change gets another millisecond
    server = world.servers["dev"]
    server.put("jobs", fabrik_objects.job(2, conditions=("Complete",)))
    server.put("jobs", fabrik_objects.job(60))
    wait_until(lambda: len(world.rows("runs", "list")) == 13, PATIENCE_S, "the new run")
    wait_until(lambda: world.host.json("runs", "show", run_id(2))["status"] == "finished", PATIENCE_S, "the end")
    world.host.settle()
    world.host.stop()
    done = world.run("runs", "list", "--at", before, "-o", "json")
    past = {row.pop("run_id"): row for row in json.loads(done.stdout)}
    assert {row.pop("known_from") for row in past.values()} == {"changes"}
    assert {run: {**row, "run_id": run} for run, row in past.items()} == old, "the rows as they were"
    assert f"as known at {before}" in done.stderr
    connection_rows = world.host.rows("SELECT count(*) AS n FROM changes")
    assert connection_rows[0]["n"] > 12
    early = world.run("runs", "list", "--at", "2020-01-01", "-o", "json")
    assert (early.returncode, json.loads(early.stdout)) == (0, [])
    assert len(json.loads(world.run("runs", "list", "--at", before, "--status", "blocked", "-o", "json").stdout)) == 4


def test_status_and_reason_beyond_the_changes_that_are_held(world: World) -> None:
    server = world.servers["dev"]
    before = format_time(time.time(), milliseconds=True)
    time.sleep(0.01)
    server.put("jobs", fabrik_objects.job(2, conditions=("Complete",)))
    wait_until(lambda: world.host.json("runs", "show", run_id(2))["status"] == "finished", PATIENCE_S, "the end")
    world.host.settle()
    world.host.stop()
    with contextlib.closing(sqlite3.connect(world.host.cache)) as connection, connection:
        connection.execute("DELETE FROM changes")
    done = world.run("runs", "list", "--at", before, "-o", "json")
    past = {row["run_id"]: row for row in json.loads(done.stdout)}
    assert {row["known_from"] for row in past.values()} == {"run_events"}
    assert (past[run_id(2)]["status"], past[run_id(2)]["current_task"]) == ("running", None)
    assert past[run_id(0)]["status"] == "blocked"
    assert "only status and reason" in done.stderr
    assert "KNOWN FROM" in world.run("runs", "list", "--at", before).stdout


def test_statistics(world: World) -> None:
    for _ in range(2):
        rows = world.rows("runs", "stats", "--by", "cluster")
        assert [(row["cluster"], row["runs"], row["active"], row["finished"]) for row in rows] == [
            ("dev", 6, 4, 2),
            ("prod", 6, 4, 2),
        ]
        assert [row["success_rate"] for row in rows] == [1.0, 1.0]
        assert all(row["median_seconds"] == 600 and row["blocked_seconds"] > 0 for row in rows), rows
        table = world.run("runs", "stats", "--cluster", "dev").stdout
        assert table.split("\n")[0].split() == [
            *("SPEC", "RUNS", "ACTIVE", "FINISHED", "FAILED", "CANCELLED", "SUCCESS", "MEDIAN", "P95", "BLOCKED")
        ]
        assert "100 %" in table
        if world.host.daemon_pids():
            world.host.stop()
    assert world.rows("runs", "stats", "--since", "0s") == []


# ---------------------------------------------------------------- waiting and watching


def test_waiting_for_what_is_so_already(world: World) -> None:
    for _ in range(2):
        for words, code, line in (
            ((run_id(1),), 0, f"{run_id(1)} finished\n"),
            ((run_id(1), "--for", "finished"), 0, f"{run_id(1)} finished\n"),
            ((run_id(1), "--for", "failed"), 1, f"{run_id(1)} finished\n"),
            (("--id", run_id(0), "--for", "blocked"), 0, f"{run_id(0)} blocked\n"),
        ):
            done = world.run("runs", "wait", *words)
            assert (done.returncode, done.stdout) == (code, line), words
        assert world.run("runs", "wait", "zzz").returncode == 3
        assert world.run("runs", "wait", "--cluster", "dev", "--spec", "none").returncode == 3
        assert world.run("runs", "wait").returncode == 2
        if world.host.daemon_pids():
            world.host.stop()
    blind = world.run("runs", "wait", run_id(0))
    assert (blind.returncode, blind.stdout) == (4, "")


def test_a_wait_that_times_out(world: World) -> None:
    done = world.run("runs", "wait", run_id(0), run_id(1), "--for", "finished", "--timeout", "300ms")
    assert (done.returncode, done.stdout) == (7, f"{run_id(1)} finished\n")
    assert "timed out" in done.stderr


def test_waiting_outlasts_the_daemon(world: World) -> None:
    server = world.servers["dev"]
    with world.host.popen("runs", "wait", run_id(2), run_id(5), "--timeout", "60s") as waiting:
        wait_until(lambda: world.host.status()["subscribers"] == 1, PATIENCE_S, "it waits")
        server.put("jobs", fabrik_objects.job(2, conditions=("Complete",)))
        assert waiting.stdout
        assert waiting.stdout.readline().decode() == f"{run_id(2)} finished\n"
        world.host.stop()
        server.put("jobs", fabrik_objects.job(5, conditions=("Failed=DeadlineExceeded",)))
        world.host.start()
        output, errors = waiting.communicate(timeout=PATIENCE_S)
    assert (waiting.returncode, output.decode()) == (0, f"{run_id(5)} failed (DeadlineExceeded)\n")
    assert b"waiting for it" in errors


def test_a_list_of_clusters_is_filtered_and_ordered(world: World) -> None:
    def names(*words: str) -> list[str]:
        return [row["name"] for row in world.rows("clusters", "list", *words)]

    assert names() == ["dev", "prod"]
    assert names("--reverse") == ["prod", "dev"]
    assert names("--sort-by", "name", "--reverse", "--limit", "1") == ["prod"]
    assert names("--cluster", "prod", "--status", "connected", "--status", "disabled") == ["prod"]
    assert names("--status", "disconnected") == []
    world.servers["dev"].put("jobs", fabrik_objects.job(2, conditions=("Complete",)))
    wait_until(lambda: names("--since", "1h") == ["dev"], PATIENCE_S, "one has told something, the other not")
    world.servers["prod"].stop()
    wait_until(lambda: names("--status", "disconnected") == ["prod"], PATIENCE_S, "it is away")
    assert names("--sort-by", "status") == ["prod", "dev"]
    table = world.run("clusters", "list", "--cluster", "prod", "--no-headers").stdout.split()
    assert table[:4] == ["prod", f"https://127.0.0.1:{world.servers['prod'].port}", "1", "disconnected"]
    for words, parts in (
        (("--cluster", "pord"), (3, "no cluster 'pord'", "did you mean 'prod'?")),
        (("--status", "up"), (2, "--status: no 'up'", "choose from connected, disabled, disconnected")),
        (("--fresh",), (2, "'clusters list' has no --fresh", "it is for runs list, runs show, schedules list")),
        (("--sort-by", "state"), (2, "no column 'state'", "choose from connected")),
    ):
        refused(done_of(world.run("clusters", "list", *words)), *parts)
    world.host.stop()
    done = world.run("clusters", "list", "-o", "name", "--status", "disconnected")
    assert done.stdout.split() == ["dev", "prod"]
    assert "from the cache: dev as of " in done.stderr, "an answer that is not live says so"


def test_clusters_that_come_and_go_are_watched(world: World) -> None:
    words = ("--watch", "-o", "jsonl", "--status", "connected")
    with world.host.popen("clusters", "list", *words) as clusters, world.host.popen("runs", "list", "-w") as runs:
        assert clusters.stdout
        assert runs.stdout
        assert runs.stderr
        first = [json.loads(clusters.stdout.readline()) for _ in range(2)]
        assert [(row["name"], row["connected"], row["error"]) for row in first] == [
            ("dev", True, None),
            ("prod", True, None),
        ]
        for _ in range(13):
            runs.stdout.readline()
        world.servers["prod"].stop()
        gone = json.loads(clusters.stdout.readline())
        assert (gone["name"], gone["status"], gone["server"]) == ("prod", "disconnected", first[1]["server"])
        assert gone["error"]
        assert runs.stderr.readline().startswith(b"fabrik-daemon: prod: disconnected (")
        world.servers["prod"].start()
        back = json.loads(clusters.stdout.readline())
        assert (back["name"], back["status"], back["error"]) == ("prod", "connected", None)
        for process in (clusters, runs):
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_S) == 130


def test_a_list_that_goes_on_says_first_what_is_away(world: World) -> None:
    world.servers["prod"].stop()
    away = ("clusters", "list", "--status", "disconnected")
    wait_until(lambda: world.rows(*away), PATIENCE_S, "it is away")
    with world.host.popen("volumes", "list", "-w") as watching:
        assert watching.stderr
        line = watching.stderr.readline()
        assert line.startswith(b"fabrik-daemon: from the daemon: dev live; prod as of "), line
        watching.kill()
    refused(done_of(world.run("runs", "list", "-w", "--cluster", "pord")), 3, "no cluster 'pord'")
    refused(done_of(world.run("runs", "list", "-w", "--max-age", "0s")), 6, "prod: as of ")


def test_a_row_that_leaves_a_list_that_goes_on_is_shown_as_it_leaves(world: World) -> None:
    server = world.servers["dev"]
    words = ("schedules", "list", "-w", "--cluster", "dev", "--status", "waiting", "-o", "jsonl")
    with world.host.popen(*words) as watching:
        assert watching.stdout
        assert json.loads(watching.stdout.readline())["suspended"] == 0
        server.put("cronjobs", fabrik_objects.cronjob("nightly", suspend=True))
        server.put("cronjobs", fabrik_objects.cronjob("nightly", "0 4 * * *", suspend=True))
        server.put("cronjobs", fabrik_objects.cronjob("weekly"))
        rows = [json.loads(watching.stdout.readline()) for _ in range(2)]
        assert [(row["schedule_id"], row["suspended"]) for row in rows] == [("nightly", 1), ("weekly", 0)]
        watching.kill()
    assert [row["schedule_id"] for row in world.rows("schedules", "list", "--status", "suspended")] == ["nightly"]


def test_a_list_that_goes_on(world: World) -> None:
    server = world.servers["dev"]
    words = ("runs", "list", "-w", "--cluster", "dev", "--status", "running", "--status", "finished", "-o", "jsonl")
    with world.host.popen(*words) as watching:
        assert watching.stdout
        first = [json.loads(watching.stdout.readline()) for _ in range(4)]
        assert {row["status"] for row in first} == {"running", "finished"}
        server.put("jobs", fabrik_objects.job(2, conditions=("Complete",)))
        changed = json.loads(watching.stdout.readline())
        assert (changed["run_id"], changed["status"]) == (run_id(2), "finished")
        watching.send_signal(signal.SIGINT)
        assert watching.wait(PATIENCE_S) == 130
    with world.host.popen("volumes", "list", "--watch", "--cluster", "dev") as watching:
        assert watching.stdout
        lines = [watching.stdout.readline() for _ in range(7)]
        assert lines[0].split()[0] == b"VOLUME"
        server.put("persistentvolumeclaims", fabrik_objects.pvc(70))
        line = watching.stdout.readline()
        assert line.index(b"dev") == lines[0].index(b"CLUSTER"), "it stands under the same titles"
        watching.kill()


def test_what_watches_starts_a_daemon_and_what_asks_once_does_not(world: World) -> None:
    world.host.stop()
    for words in (("runs", "list"), ("runs", "show", "@latest"), ("query", "SELECT 1"), ("runs", "wait", run_id(0))):
        world.run(*words)
    assert world.run("runs", "watch", "--no-start").returncode == 4
    assert world.run("runs", "list", "-w", "--no-start").returncode == 4
    assert world.host.daemon_pids() == []
    with world.host.popen("runs", "watch", "-o", "json") as watching:
        assert watching.stdout
        assert json.loads(watching.stdout.readline())["type"] == "subscribed"
        assert len(world.host.daemon_pids()) == 1
        watching.kill()
    assert world.run("stop").returncode == 0
    config = world.host.root / "config" / "config.yaml"
    config.write_text(json.dumps({"autostart": False}))
    assert world.run("runs", "watch").returncode == 4


def test_clusters_in_another_order(world: World) -> None:
    for words, names in (
        ((), ["dev", "prod"]),
        (("--reverse",), ["prod", "dev"]),
        (("--sort-by", "name", "--reverse", "--limit", "1"), ["prod"]),
        (("--sort-by", "error"), ["dev", "prod"]),
    ):
        assert [row["name"] for row in world.rows("clusters", "list", *words)] == names, words


HOSTILE: Final = (
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
    "SELECT printf('%.*c', 9000000, 'a') LIKE '%' || printf('%.*c', 40000, 'a') || 'b'",
    "WITH RECURSIVE n(t) AS (SELECT 'xxxxxxxx' UNION ALL SELECT t || t FROM n) SELECT length(t) FROM n",
)


def test_the_daemon_goes_on_under_hostile_sql(world: World) -> None:
    running = [world.host.popen("query", statement) for statement in HOSTILE]
    server, asked = world.servers["dev"], 0
    with LinesClient(world.host.socket) as client:
        while any(process.poll() is None for process in running):
            began = time.monotonic()
            assert client.ask("runs", limit=1)["runs"]
            assert time.monotonic() - began < LATENCY_S
            asked += 1
            time.sleep(0.05)
    codes = [process.wait() for process in running]
    for process in running:
        process.communicate()
    assert asked > 5
    assert all(code in {1, 2} for code in codes), codes
    server.put("jobs", fabrik_objects.job(80))
    wait_until(lambda: len(world.rows("runs", "list")) == 13, PATIENCE_S, "changes still come")
    assert world.host.rows("PRAGMA integrity_check")[0]["integrity_check"] == "ok"


def test_a_long_answer_of_the_daemon_to_sql_is_whole_or_refused(world: World) -> None:
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i, 'ü' || i AS name FROM n"
    with LinesClient(world.host.socket) as lines, WebSocketClient(world.host.socket) as socket:
        answers = [client.ask("query", sql=f"{numbers} LIMIT 10000", id=7) for client in (lines, socket)]
        answers.append(http_request(world.host.socket, "/v1/query?" + urlencode({"sql": numbers, "id": 7})).message)
        for answer, is_cut in zip(answers, (False, False, True)):
            assert (answer["type"], answer["columns"], answer["is_cut"]) == ("query", ["i", "name"], is_cut)
            assert [tuple(row) for row in answer["rows"]] == [(i, f"ü{i}") for i in range(1, 10_001)]
            assert [part["cluster"] for part in answer["clusters"]] == ["dev", "prod"]
        long = "SELECT printf('%.*c', 20000, 'x') FROM runs a, runs b, runs c LIMIT 1000"
        refusal = lines.ask("query", sql=long)
        assert (refusal["type"], refusal["code"], refusal["exit_code"]) == ("error", "failed", 1)
        assert refusal["message"] == "the answer is over 16 MiB"
        assert lines.ask("query", sql="SELECT nothing")["code"] == "bad_request"
        assert lines.ask("query", sql='SELECT 1 AS "error"')["rows"] == [[1]]


# ---------------------------------------------------------------- formats of real rows


def test_every_list_in_every_format(world: World) -> None:
    for words in (
        ("runs", "list"),
        ("schedules", "list"),
        ("volumes", "list"),
        ("warnings", "list"),
        ("clusters", "list"),
    ):
        rows = world.rows(*words)
        texts = {
            output: world.run(*words, "-o", output).stdout for output in ("jsonl", "yaml", "csv", "tsv", "name", "wide")
        }
        assert [json.loads(line) for line in texts["jsonl"].splitlines()] == rows
        assert yaml.safe_load(texts["yaml"]) == rows
        assert [list(row) for row in csv.DictReader(io.StringIO(texts["csv"]))] == [list(row) for row in rows]
        assert len(texts["tsv"].splitlines()) == len(rows) + 1
        assert len(set(texts["name"].splitlines())) == len(rows)
        assert world.run(*words, "-o", "csv", "--no-headers").stdout == texts["csv"].partition("\n")[2]
        plain = world.run(*words).stdout
        assert len(plain.splitlines()) == len(rows) + 1
        assert world.run(*words, "--no-headers").stdout.count("\n") == len(rows)
