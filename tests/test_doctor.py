"""`doctor` on the built executable: each planted fault is found, and the fix that it names ends it."""

from __future__ import annotations

import base64
import contextlib
import datetime
import fcntl
import json
import socket
import sqlite3
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Final

import pytest
import trustme
from fakes import REVIEWS, Authority, ModelServer
from fakes_http import Access, ApiServer, Response
from harness import Cluster
from hosts import Host

import fabrik_daemon

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fakes import KubernetesApi
    from fakes_http import Exchange

    Serve = Callable[[KubernetesApi], None]

Finding = dict[str, Any]
Fix = Callable[[], object]

TIMING: Final = {"connect": "3s", "resolve": "3s", "answer": "5s", "sync": "20s"}


class Ward:
    """A host in good order, with one cluster, and what a test spoils on it."""

    def __init__(self, server: ModelServer, host: Host) -> None:
        self.server = server
        self.host = host
        self.config = host.root / "config" / "config.yaml"
        self.clusters = host.root / "config" / "clusters.yaml"
        self.kubeconfig = host.root / "test.kubeconfig"
        self.write_kubeconfig()
        for path in (self.config, self.clusters):
            path.chmod(0o600)

    def write_kubeconfig(self, access: Access | None = None) -> None:
        """Write the cluster's kubeconfig as it should be."""
        self.server.kubeconfig(self.kubeconfig, access or Access(auth="token"))
        self.kubeconfig.chmod(0o600)

    def change_kubeconfig(self, part: str, **changes: object) -> Fix:
        """Change its cluster or user; return what undoes that."""
        document = json.loads(self.kubeconfig.read_text())
        document[f"{part}s"][0][part].update(changes)
        self.kubeconfig.write_text(json.dumps(document))
        return self.write_kubeconfig

    def change_config(self, **changes: object) -> Fix:
        """Change config.yaml; return what undoes that."""
        before = self.config.read_text()
        self.config.write_text(json.dumps({**json.loads(before), **changes}, indent=1))
        return lambda: self.config.write_text(before)

    def change_clusters(self, **changes: object) -> Fix:
        """Change the entry of clusters.yaml; return what undoes that."""
        before = self.clusters.read_text()
        entry = {**json.loads(before)["clusters"][0], **changes}
        self.clusters.write_text(json.dumps({"clusters": [entry]}, indent=1))
        return lambda: self.clusters.write_text(before)

    def look(self, *flags: str) -> list[Finding]:
        """Return the problems that doctor finds."""
        done = self.host.cli("doctor", "-o", "json", *flags)
        assert "Traceback" not in done.stderr, done.stderr
        problems = [row for row in json.loads(done.stdout) if row["level"] == "problem"]
        assert done.returncode == (1 if problems else 0), done
        return problems

    def run(self, *words: str) -> Fix:
        """Return a fix that is a command."""

        def fix() -> None:
            done = self.host.cli(*words)
            assert done.returncode == 0, done.stderr

        return fix


@pytest.fixture
def ward(authority: Authority, serve: Serve, executable: Path, unpacked: Path, tmp_path: Path) -> Iterator[Ward]:
    server = ModelServer(authority, token="sesame")
    serve(server)
    cluster = Cluster(server, access=Access(auth="token"))
    with Host(executable, unpacked, tmp_path / "host", [cluster], timing=TIMING) as host:
        yield Ward(server, host)


# What is planted: each returns what its fix does ---------------------------------------------------------------------


def unknown_key(ward: Ward) -> Fix:
    return ward.change_config(logLevle="info")


def unknown_key_of_a_cluster(ward: Ward) -> Fix:
    return ward.change_clusters(namespace="fabrik-runs")


def no_kubeconfig(ward: Ward) -> Fix:
    ward.kubeconfig.unlink()
    return ward.write_kubeconfig


def readable_kubeconfig(ward: Ward) -> Fix:
    ward.kubeconfig.chmod(0o644)
    return lambda: ward.kubeconfig.chmod(0o600)


def wrong_ca(ward: Ward) -> Fix:
    other = base64.b64encode(Authority().pem).decode()
    return ward.change_kubeconfig("cluster", **{"certificate-authority-data": other})


def expired_client_certificate(ward: Ward) -> Fix:
    leaf = trustme.CA().issue_cert("me@x", not_after=datetime.datetime(2025, 1, 2, tzinfo=datetime.timezone.utc))
    pair = {
        "client-certificate-data": base64.b64encode(leaf.cert_chain_pems[0].bytes()).decode(),
        "client-key-data": base64.b64encode(leaf.private_key_pem.bytes()).decode(),
    }
    ward.change_kubeconfig("user", **pair)
    return ward.write_kubeconfig


def expired_token(ward: Ward) -> Fix:
    claims = base64.urlsafe_b64encode(json.dumps({"exp": 1700000000}).encode()).decode().rstrip("=")
    ward.server.token = f"e30.{claims}.c2ln"
    ward.write_kubeconfig()

    def fix() -> None:
        ward.server.token = "new"
        ward.write_kubeconfig()

    return fix


def refused_token(ward: Ward) -> Fix:
    return ward.change_kubeconfig("user", token="other")


def failing_plugin(ward: Ward) -> Fix:
    plugin = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "/nonexistent/login",
        "interactiveMode": "Never",
    }
    return ward.change_kubeconfig("user", exec=plugin)


def server_that_is_not_there(ward: Ward) -> Fix:
    ward.server.stop()
    return ward.server.start


def wrong_server_name(ward: Ward) -> Fix:
    return ward.change_kubeconfig("cluster", **{"tls-server-name": "elsewhere.test"})


def forbidden_resource(ward: Ward) -> Fix:
    ward.server.refuse("cronjobs")
    return lambda: ward.server.refuse("cronjobs", 0)


def clock_an_hour_off(ward: Ward) -> Fix:
    ward.server.clock_s = 3600

    def fix() -> None:
        ward.server.clock_s = 0

    return fix


def twin(ward: Ward) -> Fix:
    (entry,) = json.loads(ward.clusters.read_text())["clusters"]
    ward.clusters.write_text(json.dumps({"clusters": [entry, {**entry, "name": "again"}]}))
    return ward.run("clusters", "remove", "test")


def open_folder(ward: Ward) -> Fix:
    ward.host.cache.parent.chmod(0o777)
    return lambda: ward.host.cache.parent.chmod(0o700)


def open_socket_folder(ward: Ward) -> Fix:
    ward.host.socket.parent.chmod(0o777)
    return lambda: ward.host.socket.parent.chmod(0o700)


def damaged_cache(ward: Ward) -> Fix:
    ward.run("sync")()
    with contextlib.closing(sqlite3.connect(ward.host.cache)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    size = ward.host.cache.stat().st_size
    with ward.host.cache.open("r+b") as file:
        file.seek(3 * 4096)
        file.write(b"\xff" * (size - 3 * 4096))
    return ward.run("sync")


def no_cache_at_all(ward: Ward) -> Fix:
    ward.host.cache.write_bytes(b"This is no database." * 100)
    ward.host.cache.chmod(0o600)
    return ward.run("sync")


def held_lock(ward: Ward) -> Fix:
    lock = ward.host.cache.with_name("daemon.lock").open("w")
    lock.write("12345\n")
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock.close  # the process that holds it ends


def stale_socket(ward: Ward) -> Fix:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(ward.host.socket))
    return ward.host.socket.unlink


def crash_record(ward: Ward) -> Fix:
    ward.host.crash_file.write_text("Fatal Python error: Segmentation fault\n\nThread 0x1\n")
    ward.host.crash_file.chmod(0o600)
    return ward.run("start")


def other_version(ward: Ward) -> Fix:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(ward.host.socket))
    listener.listen()

    def serve() -> None:
        connection = listener.accept()[0]
        with connection:
            connection.recv(65536)
            connection.sendall(b'{"type": "status", "version": "9.9.9", "protocol": 99, "clusters": []}\n')

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()

    def fix() -> None:
        thread.join(10)
        listener.close()
        ward.host.socket.unlink()
        ward.run("restart")()

    return fix


def service_of_another_place(ward: Ward) -> Fix:
    unit = Path(ward.host.environment["HOME"]) / ".config" / "systemd" / "user" / "fabrik-daemon.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\nExecStart=/nonexistent/fabrik-daemon start --foreground\n")

    def fix() -> None:
        unit.write_text(f"[Service]\nExecStart={ward.host.python} /usr/bin/env start --foreground\n")

    return fix


def service_that_failed(ward: Ward) -> Fix:
    service_of_another_place(ward)()
    program = ward.host.root / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho failed\n")
    program.chmod(0o755)
    ward.host.environment["PATH"] = f"{program.parent}:{ward.host.environment['PATH']}"
    return lambda: program.write_text("#!/bin/sh\necho active\n")


def expired_server_certificate(ward: Ward) -> Fix:
    good, expired = ward.server.authority, Authority()
    when = datetime.datetime(2025, 1, 2, tzinfo=datetime.timezone.utc)
    expired._server = expired._ca.issue_cert("127.0.0.1", not_before=when.replace(year=2024), not_after=when)

    def serve_with(authority: Authority | None) -> None:
        ward.server.stop()
        ward.server.authority = authority
        ward.server.start()
        ward.write_kubeconfig()

    serve_with(expired)
    return lambda: serve_with(good)


def unreachable_loki(ward: Ward) -> Fix:
    return ward.change_config(laos={"loki": {"url": f"http://127.0.0.1:{free_port()}"}})


def loki_without_its_password(ward: Ward) -> Fix:
    secret = ward.config.with_name("token")
    ward.change_clusters(laos={"loki": {"url": LAOS.url, "bearerTokenFile": str(secret)}})
    return lambda: secret.write_text("secret")


def cluster_that_nobody_named(ward: Ward) -> Fix:
    ward.clusters.unlink()
    return ward.run(
        "clusters", "add", "--name", "test", "--kubeconfig", str(ward.kubeconfig), "--context", "fabrik-test"
    )


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Laos(ApiServer):
    """Answers every GET, as a service of LAOS that is ready."""

    def answer(self, exchange: Exchange) -> None:
        exchange.send(Response(200, b'{"status":"success"}'))


LAOS: Final = Laos()

# fault, check, words of the message, words of the fix
FAULTS: Final[dict[Callable[[Ward], Fix], tuple[str, str, str]]] = {
    unknown_key: ("configuration", "unknown key 'logLevle'", "did you mean 'logLevel'"),
    unknown_key_of_a_cluster: ("configuration", "unknown key 'namespace'", "namespaces"),
    cluster_that_nobody_named: ("configuration", "no cluster is configured", "clusters add"),
    no_kubeconfig: ("credentials", "no such kubeconfig", "correct the path"),
    readable_kubeconfig: ("credentials", "others may read it", "chmod go-rwx"),
    expired_client_certificate: ("credentials", "the client certificate expired on 2025-01-02", "renew it in"),
    expired_token: ("credentials", "the token expired on 2023-11-14", "renew it in"),
    refused_token: ("credentials", "the credentials are refused", "log in anew"),
    failing_plugin: ("credentials", "exec plugin '/nonexistent/login'", "install it"),
    wrong_ca: ("cluster", "certificate is not accepted", "copy its kubeconfig"),
    wrong_server_name: ("cluster", "elsewhere.test", "tls-server-name"),
    server_that_is_not_there: ("cluster", "Connection refused", "start the cluster"),
    twin: ("cluster", "the same cluster as again", "clusters remove test"),
    forbidden_resource: ("rights", "may not list cronjobs.batch", "grant it to this user: list cronjobs.batch"),
    clock_an_hour_off: ("clock", "ahead of this host's", "timedatectl"),
    open_folder: ("folders", "others may write to it", "chmod go-rwx"),
    open_socket_folder: ("socket", "others may write in", "chmod go-w"),
    damaged_cache: ("cache", "malformed", "sync"),
    no_cache_at_all: ("cache", "not a database", "sync"),
    held_lock: ("daemon", "process 12345 holds it", "kill 12345"),
    stale_socket: ("socket", "nobody answers at it", "rm "),
    crash_record: ("daemon", "Segmentation fault", "fabrik-daemon start"),
    other_version: ("daemon", "version 9.9.9 runs", "fabrik-daemon restart"),
    service_of_another_place: ("service", "/nonexistent/fabrik-daemon, which is not there", "install-service"),
    service_that_failed: ("service", "systemd gave it up", "journalctl --user -u fabrik-daemon"),
    expired_server_certificate: ("cluster", "certificate has expired", "renew the server's certificate"),
    unreachable_loki: ("laos", "Connection refused", "correct its url"),
    loki_without_its_password: ("laos", "No such file", "write that file"),
}


@pytest.fixture(scope="module", autouse=True)
def laos() -> Iterator[None]:
    with LAOS:
        yield


# Those that can stand together are looked at together; each is planted before those that its fix needs ended.
GROUPS: Final = (
    (crash_record, unknown_key, readable_kubeconfig, service_of_another_place),
    (stale_socket, unknown_key_of_a_cluster, service_that_failed),
    (expired_server_certificate,),
    (cluster_that_nobody_named, open_socket_folder),
    (damaged_cache, wrong_ca, open_folder, unreachable_loki),
    (no_cache_at_all, expired_token),
    (held_lock, expired_client_certificate),
    (forbidden_resource, clock_an_hour_off, loki_without_its_password),
    (refused_token,),
    (failing_plugin,),
    (no_kubeconfig,),
    (server_that_is_not_there,),
    (wrong_server_name,),
    (twin,),
    (other_version,),
)


def test_every_fault_is_planted() -> None:
    assert sorted(plant.__name__ for group in GROUPS for plant in group) == sorted(plant.__name__ for plant in FAULTS)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: " and ".join(plant.__name__ for plant in group))
def test_a_planted_fault_is_found_and_its_fix_ends_it(group: tuple[Callable[[Ward], Fix], ...], ward: Ward) -> None:
    fixes = [plant(ward) for plant in group]
    problems = ward.look()
    for plant in group:
        check, words, fix_words = FAULTS[plant]
        found = [row for row in problems if words in row["message"] and row["check"] == check]
        assert len(found) == 1, f"{plant.__name__}: {problems}"
        assert fix_words in found[0]["fix"]
    for fix in reversed(fixes):
        fix()
    assert ward.look() == []


def test_a_host_in_good_order(ward: Ward) -> None:
    assert ward.look() == []
    done = ward.host.cli("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("no problems found\n")
    ward.server.refuse("jobs")
    done = ward.host.cli("doctor")
    assert done.returncode == 1
    assert done.stdout.endswith("1 problem found\n")
    assert "-> grant it to this user: list jobs.batch in namespace fabrik-runs" in done.stdout


def test_rights_are_reviewed_only_where_that_was_asked_for(ward: Ward) -> None:
    ward.server.writable = frozenset([REVIEWS])
    ward.server.denied = {"watch pods", "get pods/log"}
    assert ward.look() == []
    assert ward.server.asked(lambda request: request.method != "GET") == []
    problems = ward.look("--rbac")
    assert sorted(row["message"].partition(",")[0] for row in problems) == [
        "it may not get pods/log in namespace fabrik-runs",
        "it may not watch pods in namespace fabrik-runs",
    ]
    posted = ward.server.asked(lambda request: request.method != "GET")
    assert {(request.method, request.path) for request in posted} == {("POST", REVIEWS)}
    ward.server.denied = set()
    assert ward.look("--rbac") == []


def test_what_the_daemons_watches_met_is_told(ward: Ward) -> None:
    ward.server.refuse("events")
    ward.run("start")()
    assert {row["check"] for row in ward.look()} == {"rights", "watches"}
    ward.server.refuse("events", 0)
    ward.run("restart")()
    assert ward.look() == []


def test_when_certificates_and_tokens_end(authority: Authority) -> None:
    when = datetime.datetime(2051, 3, 4, 5, 6, 7, tzinfo=datetime.timezone.utc)  # GeneralizedTime, past 2049
    for not_after in (when, when.replace(year=2031)):
        pem = trustme.CA().issue_cert("x@y", not_after=not_after).cert_chain_pems[0].bytes().decode()
        assert fabrik_daemon.certificate_expiry(pem) == not_after.timestamp()
        body = pem.splitlines()[1:-1]
        for cut in range(0, len(body), 3):
            broken = "\n".join(["-----BEGIN CERTIFICATE-----", *body[:cut], "-----END CERTIFICATE-----"])
            assert fabrik_daemon.certificate_expiry(broken) in (None, not_after.timestamp())
    assert fabrik_daemon.certificate_expiry("") is None
    assert fabrik_daemon.certificate_expiry(authority.pem.decode()) is not None
    for token in ("", "sesame", "a.b.c", "a.e30.c", "a.eyJleHAiOi0xfQ.c"):
        assert fabrik_daemon.token_expiry(token) is None
