"""Every recorded scenario through the built executable, over TLS: on the way, at the end, after a restart, offline."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import pytest
from expectations import relapses, run_differences, schedule_differences, shown_runs
from fakes import RECORDINGS, RecordedServer
from fakes_http import Access
from harness import Cluster

if TYPE_CHECKING:
    from collections.abc import Callable

    from fakes import Authority, KubernetesApi
    from harness import Daemon

    Serve = Callable[[KubernetesApi], None]
    MakeDaemon = Callable[..., Daemon]

SCENARIOS: Final = [
    f.parent.name for f in sorted(RECORDINGS.glob("*/meta.json")) if f.parent.name[:2] not in {"14", "15"}
]
# What one list at the end cannot tell: in these, an object that mattered is gone by then.
GONE_AT_THE_END: Final = ("06", "07", "08")
TOKEN: Final = "a-bearer-token"


def serve_scenario(scenario: str, authority: Authority, serve: Serve) -> RecordedServer:
    """Start a server for a scenario; nothing of it is released yet."""
    server = RecordedServer(scenario, authority, token=TOKEN)
    server.pages_at_zero = True  # so that pages are asked for, at whatever version the daemon lists
    serve(server)
    return server


def cluster_of(server: RecordedServer, access: Access = Access(auth="token")) -> Cluster:  # noqa: B008 - a tuple
    """Return how a daemon is told of it: the one namespace, or all where all were recorded."""
    everywhere = server.recording.folder.name.startswith("16")
    return Cluster(server, namespaces=["*"] if everywhere else [server.recording.meta["namespace"]], access=access)


def differences(daemon: Daemon, server: RecordedServer, expected: dict[str, Any]) -> list[str]:
    """Return in what the executable's answers differ from the expected rows."""
    namespace = server.recording.meta["namespace"]
    shown = shown_runs(daemon)
    problems = run_differences(expected["runs"], shown, namespace)
    problems += [problem for row in shown for problem in relapses(row)]
    if "schedules" in expected:
        problems += schedule_differences(
            expected["schedules"], daemon.json("query", "SELECT * FROM schedules"), namespace
        )
    return problems


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_scenario(scenario: str, authority: Authority, serve: Serve, make_daemon: MakeDaemon) -> None:
    server = serve_scenario(scenario, authority, serve)
    daemon = make_daemon(cluster_of(server))
    final = server.expect["final"]
    daemon.start()
    for checkpoint in server.expect.get("checkpoints", []):
        server.release(checkpoint["t"])
        daemon.settle()
        assert differences(daemon, server, checkpoint) == [], f"at {checkpoint['t']} s, {checkpoint['label']}"
    server.release_all()
    daemon.settle()
    assert differences(daemon, server, final) == [], "at the end"
    daemon.stop()
    assert differences(daemon, server, final) == [], "with the daemon stopped"
    restarted_at = time.monotonic()
    daemon.start()
    daemon.settle()
    assert differences(daemon, server, final) == [], "after a restart"
    lists = server.asked(lambda seen: seen.at > restarted_at and seen.is_list)
    assert lists == [], "a restart goes on from the committed resource versions"
    server.stop()
    assert differences(daemon, server, final) == [], "with the server gone"
    daemon.stop()
    assert differences(daemon, server, final) == [], "offline"


@pytest.mark.parametrize(
    ("scenario", "stopped_at"),
    [
        ("01-happy-path", 5.731),
        ("06-deadline-exceeded", 7.0),
        ("07-cancelled", 2.1),
        ("08-ttl-after-finished", 2.5),
        ("09-evicted-replaced", 3.023),
        ("10-cronjob", 14.5),
        ("12-malformed-annotations", 12.576),
    ],
)
def test_what_happened_while_the_daemon_was_down(
    scenario: str, stopped_at: float, authority: Authority, serve: Serve, make_daemon: MakeDaemon
) -> None:
    server = serve_scenario(scenario, authority, serve)
    daemon = make_daemon(cluster_of(server))
    server.release(stopped_at)
    daemon.start()
    daemon.settle()
    daemon.stop()
    server.release_all()
    daemon.start()
    daemon.settle()
    assert differences(daemon, server, server.expect["final"]) == []


@pytest.mark.parametrize("in_stream", [True, False], ids=["as an ERROR event", "as HTTP 410"])
def test_what_happened_while_the_history_was_lost(
    in_stream: bool, authority: Authority, serve: Serve, make_daemon: MakeDaemon
) -> None:
    server = serve_scenario("01-happy-path", authority, serve)
    server.expired_in_stream = in_stream
    daemon = make_daemon(cluster_of(server))
    server.release(5.731)
    daemon.start()
    daemon.settle()
    daemon.stop()
    server.release_all()
    server.bookmark()
    server.compact()
    daemon.start()
    daemon.settle()
    assert differences(daemon, server, server.expect["final"]) == []


@pytest.mark.parametrize("clean", [True, False], ids=["cleanly", "broken"])
def test_watches_that_end_on_the_way(clean: bool, authority: Authority, serve: Serve, make_daemon: MakeDaemon) -> None:
    server = serve_scenario("02-human-gate", authority, serve)
    daemon = make_daemon(cluster_of(server))
    daemon.start()
    for checkpoint in server.expect["checkpoints"]:
        server.release(checkpoint["t"])
        daemon.settle()
        server.end_watches(clean=clean, last_words=b"" if clean else b"2000\r\n{")
        daemon.wait_for_watches()
        assert differences(daemon, server, checkpoint) == [], checkpoint["label"]
    server.release_all()
    daemon.settle()
    assert differences(daemon, server, server.expect["final"]) == []


@pytest.mark.parametrize("initial_events", ["refuse", "ignore", "stream"])
@pytest.mark.parametrize("namespaces", [["*"], ["team-a", "fabrik-runs"]], ids=["everywhere", "two namespaces"])
def test_servers_with_and_without_streaming_lists(
    initial_events: str, namespaces: list[str], authority: Authority, serve: Serve, make_daemon: MakeDaemon
) -> None:
    server = serve_scenario("16-cluster-scope", authority, serve)
    server.initial_events = initial_events
    daemon = make_daemon(cluster_of(server)._replace(namespaces=namespaces), initialList="1s")
    daemon.start()
    server.release_all()
    daemon.settle()
    assert differences(daemon, server, server.expect["final"]) == []


def test_the_lower_namespace_has_the_plain_id(authority: Authority, serve: Serve, make_daemon: MakeDaemon) -> None:
    server = serve_scenario("16-cluster-scope", authority, serve)
    daemon = make_daemon(cluster_of(server))
    assert daemon.cli("sync").returncode == 0
    keys = {row["run_id"]: row["namespace"] for row in daemon.json("runs", "list")}
    twice = "01m84az44dnfs2bc7v6rfh6y2h"
    assert (keys[twice], keys[f"{twice}@test/team-a"]) == ("fabrik-runs", "team-a")


def test_an_expired_continue_token(authority: Authority, serve: Serve, make_daemon: MakeDaemon) -> None:
    server = serve_scenario("13-pagination", authority, serve)
    server.expire_next_continue()
    daemon = make_daemon(cluster_of(server))
    daemon.start()
    daemon.settle()
    assert differences(daemon, server, server.expect["final"]) == []
    assert server.asked(lambda request: "continue" in request.query)


@pytest.mark.parametrize("auth", ["certificate", "certificate-files", "token", "token-file"])
@pytest.mark.parametrize("ca", ["data", "file"])
def test_ways_to_log_in(auth: str, ca: str, authority: Authority, serve: Serve, make_daemon: MakeDaemon) -> None:
    by_certificate = auth.startswith("certificate")
    token = "" if by_certificate else TOKEN
    server = RecordedServer("02-human-gate", authority, token=token, certificate_required=by_certificate)
    serve(server)
    server.release_all()
    daemon = make_daemon(cluster_of(server, Access(auth=auth, ca=ca, tls_server_name="api.fabrik.test")))
    done = daemon.cli("sync")
    assert (done.returncode, differences(daemon, server, server.expect["final"])) == (0, []), done.stderr


def test_a_cluster_whose_certificate_nobody_vouches_for(
    authority: Authority, serve: Serve, make_daemon: MakeDaemon
) -> None:
    server = serve_scenario("02-human-gate", authority, serve)
    server.release_all()
    strict = make_daemon(cluster_of(server, Access(auth="token", ca="")))
    lax = make_daemon(cluster_of(server, Access(auth="token", insecure=True)))
    assert strict.cli("sync").returncode == 5
    assert server.requests == []
    assert lax.cli("sync").returncode == 0
    assert differences(lax, server, server.expect["final"]) == []


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name[:2] not in GONE_AT_THE_END])
def test_one_sync_of_a_scenario_that_is_over(
    scenario: str, authority: Authority, serve: Serve, make_daemon: MakeDaemon
) -> None:
    server = serve_scenario(scenario, authority, serve)
    server.release_all()
    daemon = make_daemon(cluster_of(server))
    done = daemon.cli("sync")
    assert done.returncode == 0, done.stderr
    assert differences(daemon, server, server.expect["final"]) == []


def test_a_sync_keeps_a_finished_run_that_is_gone(authority: Authority, serve: Serve, make_daemon: MakeDaemon) -> None:
    server = serve_scenario("08-ttl-after-finished", authority, serve)
    daemon = make_daemon(cluster_of(server))
    server.release(server.expect["checkpoints"][0]["t"])
    assert daemon.cli("sync").returncode == 0
    server.release_all()
    assert daemon.cli("sync").returncode == 0
    assert differences(daemon, server, server.expect["final"]) == []
    assert daemon.json("runs", "list")[0]["deleted_at"]


def test_a_sync_does_not_guess_what_became_of_a_run(
    authority: Authority, serve: Serve, make_daemon: MakeDaemon
) -> None:
    server = serve_scenario("07-cancelled", authority, serve)
    daemon = make_daemon(cluster_of(server))
    server.release(2.1)
    assert daemon.cli("sync").returncode == 0
    assert [row["status"] for row in daemon.json("runs", "list")] == ["running"]
    server.release_all()
    assert daemon.cli("sync").returncode == 0
    assert [(row["status"], row["reason"]) for row in daemon.json("runs", "list")] == [(None, "VanishedUnseen")]


def test_a_sync_tells_of_a_cluster_that_does_not_answer(
    authority: Authority, serve: Serve, make_daemon: MakeDaemon
) -> None:
    here = serve_scenario("02-human-gate", authority, serve)
    gone = serve_scenario("03-json-status", authority, serve)
    here.release_all()
    daemon = make_daemon(cluster_of(here), cluster_of(gone)._replace(name="gone"))
    gone.stop()
    done = daemon.cli("sync")
    assert done.returncode == 5
    assert "gone" in done.stderr
    assert "Traceback" not in done.stderr
    assert differences(daemon, here, here.expect["final"]) == []


def test_a_warning_that_repeats_is_one_warning(authority: Authority, serve: Serve, make_daemon: MakeDaemon) -> None:
    server = serve_scenario("05-image-pull-backoff", authority, serve)
    counts = {
        timed.change.object["metadata"]["uid"]: timed.change.object["count"]
        for timed in server.recording.events["events"]
        if timed.change.object["type"] == "Warning"
    }
    daemon = make_daemon(cluster_of(server))
    daemon.start()
    server.release_all()
    daemon.settle()
    warnings = shown_runs(daemon)[0]["warnings"]
    assert {row["uid"]: row["count"] for row in warnings} == counts
    assert len(warnings) == len(counts)
