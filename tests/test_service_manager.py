"""The built daemon under systemd's protocol: readiness, reload, status, watchdog, stop, and a socket that it opened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from clients import LinesClient
from fabrik_objects import Report, job, pod
from fakes import ModelServer
from harness import Cluster, wait_until
from hosts import answers
from systemd import Systemd, above, listener

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fakes import Authority, KubernetesApi
    from hosts import Host

    MakeHost = Callable[..., Host]
    Serve = Callable[[KubernetesApi], None]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="systemd is Linux's")

STOP_S: Final = 2.0


@pytest.fixture
def host(authority: Authority, serve: Serve, make_host: MakeHost) -> Host:
    """Return a host with one cluster that has one run."""
    server = ModelServer(authority)
    server.put("jobs", job(1))
    server.put("pods", pod(1, report=Report(finished=1)))
    serve(server)
    return make_host(Cluster(server, "dev"))


@pytest.fixture
def place() -> Iterator[Path]:
    """Return a folder whose path is short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="fabrik-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def systemd(place: Path) -> Iterator[Systemd]:
    """Return a manager that has started nothing yet."""
    with Systemd(place) as manager:
        yield manager


def start(systemd: Systemd, host: Host, **how: object) -> None:
    """Start the host's daemon as a service."""
    systemd.start(host.command("start", "--foreground"), host.environment, host.root / "daemon.log", **how)  # type: ignore[arg-type]


def test_start_reload_and_stop(systemd: Systemd, host: Host) -> None:
    start(systemd, host)
    systemd.until("READY", "1")
    assert answers(host.socket), "who is told that it is ready may ask it"
    systemd.until("STATUS", "following dev")

    before = time.monotonic_ns() // 1000
    systemd.signal(signal.SIGHUP)
    reloading = systemd.until("RELOADING", "1")
    assert before <= int(reloading.values["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    systemd.until("READY", "1")
    with LinesClient(host.socket) as client:
        client.ask("reload")
    systemd.until("RELOADING", "1")
    systemd.until("READY", "1")

    began = time.monotonic()
    assert systemd.stop() == 0
    assert time.monotonic() - began < STOP_S
    systemd.until("STOPPING", "1")
    assert {told.pid for told in systemd.told} == {told.pid for told in systemd.told[:1]}, "all from the main process"


def test_a_reload_that_fails_ends_too(systemd: Systemd, host: Host) -> None:
    start(systemd, host)
    systemd.until("READY", "1")
    (host.root / "config" / "clusters.yaml").write_text("clusters: nonsense")
    systemd.signal(signal.SIGHUP)
    systemd.until("RELOADING", "1")
    systemd.until("READY", "1")
    assert answers(host.socket)
    assert "not reloaded: " in host.log
    assert systemd.stop() == 0


def test_the_status_tells_who_is_away(systemd: Systemd, host: Host) -> None:
    start(systemd, host)
    systemd.until("STATUS", "following dev")
    (cluster,) = host.clusters
    cluster.server.stop()
    systemd.until("STATUS", "no cluster is connected; not connected: dev")
    assert systemd.stop() == 0


def test_a_wrong_configuration_is_never_ready_and_not_worth_a_restart(systemd: Systemd, host: Host) -> None:
    (host.root / "config" / "config.yaml").write_text("nonsense: 1")
    start(systemd, host)
    assert systemd.wait() == 2, "RestartPreventExitStatus"
    with pytest.raises(BlockingIOError):
        systemd.next(timeout_s=0)
    assert systemd.told == []


def test_the_watchdog_hears_from_a_loop_that_turns_and_from_no_other(systemd: Systemd, host: Host) -> None:
    start(systemd, host, watchdog_s=1.0)
    systemd.until("READY", "1")
    heard = [systemd.until("WATCHDOG", "1").at for _ in range(4)]
    assert heard[-1] - heard[0] < 3 * 1.0, "each time in half the interval, or a busy machine's whole"
    systemd.signal(signal.SIGSTOP)
    assert systemd.is_silent(1.5)
    systemd.signal(signal.SIGCONT)
    systemd.until("WATCHDOG", "1")
    systemd.signal(signal.SIGABRT)  # as systemd does when it has heard nothing
    assert systemd.wait() == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in host.log, "the journal tells where it hung"


def test_without_a_watchdog_none_is_told(systemd: Systemd, host: Host) -> None:
    host.environment.update(WATCHDOG_USEC="200000")
    # The variable names another process: it is that one's.
    systemd.start(
        ["/usr/bin/env", f"WATCHDOG_PID={os.getpid()}", *host.command("start", "--foreground")],
        host.environment,
        host.root / "daemon.log",
    )
    systemd.until("STATUS", "following dev")
    assert systemd.stop() == 0
    systemd.until("STOPPING", "1")
    assert not any("WATCHDOG" in told.values for told in systemd.told)


def test_an_abstract_notify_socket(place: Path, host: Host) -> None:
    with Systemd(place, abstract=True) as systemd:
        start(systemd, host)
        systemd.until("READY", "1")
        assert systemd.stop() == 0


def test_a_manager_that_does_not_listen_changes_nothing(host: Host, place: Path) -> None:
    host.environment["NOTIFY_SOCKET"] = str(place / "nobody")
    host.start()
    host.stop()
    assert "systemd was not told 'READY=1'" in host.log


def test_a_socket_that_systemd_opened(systemd: Systemd, host: Host, place: Path) -> None:
    path = place / "given.sock"
    with listener(path) as given, LinesClient(path) as early:
        early.request("status")  # before there is a daemon: it waits in the backlog
        for _ in range(2):
            start(systemd, host, sockets=[given])
            systemd.until("READY", "1")
            assert json.loads(host.cli("--socket", str(path), "status", "-o", "json").stdout)["socket"] == str(path)
            assert not host.socket.exists(), "it listens nowhere else"
            before = path.stat()
            assert systemd.stop() == 0
            assert (path.stat().st_ino, path.stat().st_mode) == (before.st_ino, before.st_mode), "it is systemd's"
        assert early.message()["clusters"][0]["name"] == "dev"


def test_a_given_socket_is_not_made_again(systemd: Systemd, make_host: MakeHost, host: Host, place: Path) -> None:
    host = make_host(*host.clusters, socketCheck="50ms")
    path = place / "given.sock"
    with listener(path) as given, LinesClient(path) as client:
        start(systemd, host, sockets=[given])
        systemd.until("READY", "1")
        path.unlink()
        # Ten turns of what would make it again, were it the daemon's own.
        assert client.silent_for(0.5)
        assert client.ask("ping") == {"type": "ping"}
        assert not path.exists()
        assert systemd.stop() == 0


@pytest.mark.parametrize("kind", ["a file", "TCP", "not listening", "of another process"])
def test_what_is_given_in_vain(kind: str, systemd: Systemd, host: Host, place: Path) -> None:
    path = place / "given.sock"
    if kind == "TCP":
        given = above(socket.create_server(("127.0.0.1", 0)))
    elif kind == "not listening":
        given = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        given.bind(str(path))
        given = above(given)
    else:
        given = listener(path)
    command = host.command("start", "--foreground")
    if kind == "a file":
        command = ["/bin/sh", "-c", 'exec 3</dev/null; exec "$@"', "service", *command]
    elif kind == "of another process":
        command = ["/usr/bin/env", f"LISTEN_PID={os.getpid()}", *command]
    with given:
        systemd.start(command, host.environment, host.root / "daemon.log", sockets=[given])
        systemd.until("READY", "1")
        assert answers(host.socket), "it opens its own"
        assert systemd.stop() == 0
    assert kind == "of another process" or "from systemd is" in host.log


def test_helpers_do_not_take_the_variables_for_theirs(systemd: Systemd, host: Host, place: Path) -> None:
    """An exec plugin is a helper's child: what it sees, every helper has seen."""
    seen = place / "seen"
    plugin = place / "plugin"
    plugin.write_text(f"#!/bin/sh\nenv > {seen}.new\nls /proc/self/fd > {seen}.fds\nmv {seen}.new {seen}\nexit 1\n")
    plugin.chmod(0o755)
    for kubeconfig in host.root.glob("*.kubeconfig"):
        content = json.loads(kubeconfig.read_text())
        content["users"][0]["user"] = {
            "exec": {
                "apiVersion": "client.authentication.k8s.io/v1",
                "command": str(plugin),
                "interactiveMode": "Never",
            }
        }
        kubeconfig.write_text(json.dumps(content))
    with listener(place / "given.sock") as given:
        start(systemd, host, sockets=[given], watchdog_s=60)
        wait_until(seen.exists, 30, "the plugin has run")
        names = {line.partition("=")[0] for line in seen.read_text().splitlines()}
        assert "HOME" in names
        assert not names & {
            "NOTIFY_SOCKET",
            "WATCHDOG_USEC",
            "WATCHDOG_PID",
            "LISTEN_FDS",
            "LISTEN_PID",
            "LISTEN_FDNAMES",
        }
