"""Start, stop and what lies between, through the built executable: one daemon, socket and cache, whatever happens."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from clients import ANSWER_S, LinesClient
from fabrik_objects import Report, job, pod
from fakes import ModelServer
from harness import READY_S, Cluster, wait_until
from hosts import AS_ROOT, NOBODY, Host, answers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fakes import Authority, KubernetesApi

    MakeHost = Callable[..., Host]
    Serve = Callable[[KubernetesApi], None]

STOP_S: Final = 2.0  # what an orderly stop may take
CATCH_UP_S: Final = 120.0  # thousands of changes pile up while daemons are killed on a busy machine
KILLS: Final = int(os.environ.get("FABRIK_KILLS", "24"))  # each costs a start; FABRIK_KILLS=100 is the full promise
SEED: Final = int(os.environ.get("FABRIK_SEED", "20260216"))


@pytest.fixture
def model(authority: Authority, serve: Serve) -> ModelServer:
    """Return a cluster with one run."""
    server = ModelServer(authority)
    server.put("jobs", job(1))
    server.put("pods", pod(1, report=Report(finished=1)))
    serve(server)
    return server


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that a refusal says."""
    (line,) = done.stderr.splitlines()
    assert line.startswith("fabrik-daemon: ")
    assert done.stdout == ""
    return line


# ---------------------------------------------------------------- start, stop, restart, reload, status


def test_start_returns_with_what_it_watches(model: ModelServer, make_host: MakeHost) -> None:
    host = make_host(Cluster(model, "dev-k3s"))
    done = host.cli("start")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("fabrik-daemon started\n")
    assert "dev-k3s" in done.stdout
    assert str(host.socket) in done.stdout
    (pid,) = host.daemon_pids()
    assert os.getsid(pid) != os.getsid(0)
    assert Path(f"/proc/{pid}/cwd").resolve() == Path("/")
    assert host.json("status")["pid"] == pid == host.lock_pid
    again = host.cli("start")
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith("fabrik-daemon runs already\n")
    assert "dev-k3s" in again.stdout
    assert host.daemon_pids() == [pid]
    stopped = host.cli("stop")
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (0, "fabrik-daemon stopped\n", "")
    assert host.daemon_pids() == []
    assert not host.socket.exists()
    assert not host.crash_file.exists()


@pytest.mark.parametrize("command", ["status", "stop", "reload", "logs", "runs watch --no-start"])
def test_without_a_daemon_the_exit_code_is_4(command: str, model: ModelServer, make_host: MakeHost) -> None:
    done = make_host(Cluster(model)).cli(*command.split())
    assert done.returncode == 4
    assert "not running" in one_line(done)


def test_restart_with_and_without_a_daemon(model: ModelServer, make_host: MakeHost) -> None:
    host = make_host(Cluster(model))
    first = host.cli("restart")
    assert (first.returncode, first.stderr) == (0, "")
    (pid,) = host.daemon_pids()
    second = host.cli("restart")
    assert (second.returncode, second.stderr) == (0, "")
    (other,) = host.daemon_pids()
    assert other != pid
    assert host.json("status")["pid"] == other


def test_status_in_words_and_as_json(model: ModelServer, make_host: MakeHost) -> None:
    host = make_host(Cluster(model, "dev-k3s"))
    host.start()
    status = host.json("status")
    wanted = {"version", "protocol", "pid", "uptime_seconds", "socket", "cache", "runs", "subscribers", "clusters"}
    assert wanted <= set(status)
    words = host.cli("status")
    assert words.returncode == 0
    for told in ("dev-k3s", model.url, "connected", "1 running", str(host.cache)):
        assert told in words.stdout
    model.refuse("pods", 500)
    model.end_watches()
    wait_until(lambda: "NOT CONNECTED" in host.cli("status").stdout, ANSWER_S, "it says that it is not connected")
    assert host.cli("status").returncode == 0


def test_the_daemon_that_is_stopped_by_hand_ends_its_clients(model: ModelServer, make_host: MakeHost) -> None:
    host = make_host(Cluster(model))
    host.launch()
    with LinesClient(host.socket) as subscriber:
        assert subscriber.ask("subscribe")["type"] == "subscribed"
        assert host.cli("stop").returncode == 0
        subscriber.rest()
    assert host.signal(0) < ANSWER_S  # it has ended


# ---------------------------------------------------------------- a start that fails


def test_a_start_with_a_broken_configuration(model: ModelServer, make_host: MakeHost) -> None:
    host = make_host(Cluster(model))
    (host.root / "config" / "config.yaml").write_text("timing:\n  batch: soon\n")
    done = host.cli("start")
    assert done.returncode == 2
    assert "config.yaml:2: batch:" in one_line(done)


def test_a_start_with_a_broken_list_of_clusters(model: ModelServer, make_host: MakeHost) -> None:
    host = make_host(Cluster(model))
    (host.root / "config" / "clusters.yaml").write_text("clusters:\n- name: a\n  kubeconfg: /x\n")
    done = host.cli("start")
    assert done.returncode == 2
    assert "clusters.yaml:3: unknown key 'kubeconfg'" in one_line(done)
    assert host.daemon_pids() == []


def test_a_start_without_clusters(make_host: MakeHost) -> None:
    done = make_host().cli("start")
    assert done.returncode == 2
    assert "no cluster is configured" in one_line(done)


@pytest.mark.parametrize("content", [None, "]["], ids=["missing", "broken"])
def test_a_start_with_a_useless_kubeconfig(content: str | None, model: ModelServer, make_host: MakeHost) -> None:
    host = make_host(Cluster(model))
    kubeconfig = host.root / "test.kubeconfig"
    if content is None:
        kubeconfig.unlink()
    else:
        kubeconfig.write_text(content)
    done = host.cli("start")
    assert done.returncode == 2
    assert "test.kubeconfig" in one_line(done)
    assert host.daemon_pids() == []


def test_a_start_where_the_cache_cannot_be(model: ModelServer, make_host: MakeHost) -> None:
    host = make_host(Cluster(model))
    (host.root / "file").touch()
    host.environment["FABRIK_CACHE"] = str(host.root / "file" / "cache.db")
    done = host.cli("start")
    assert done.returncode == 1
    assert f"{host.root}/file" in one_line(done)


def test_a_start_where_the_cache_is_a_folder(model: ModelServer, make_host: MakeHost) -> None:
    host = make_host(Cluster(model))
    host.cache.mkdir()
    done = host.cli("start")
    assert done.returncode == 1
    assert str(host.cache) in one_line(done)


def test_a_start_with_a_newer_cache(model: ModelServer, make_host: MakeHost) -> None:
    host = make_host(Cluster(model))
    host.start()
    host.stop()
    with contextlib.closing(sqlite3.connect(host.cache)) as connection:
        connection.execute("UPDATE meta SET value = '9999' WHERE key = 'schema_version'")
        connection.commit()
    done = host.cli("start")
    assert done.returncode == 1
    assert "newer fabrik-daemon" in one_line(done)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_start_while_a_reader_looks_at_the_lock(model: ModelServer, make_host: MakeHost) -> None:
    """Reading commands test the lock for an instant; a daemon that starts in that very instant must not give up."""
    host = make_host(Cluster(model))
    lock = host.cache.with_name("daemon.lock")
    lock.touch()
    with lock.open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        starting = host.popen("start")
        wait_until(
            lambda: starting.poll() is not None or any(has_open(pid, lock) for pid in host.daemon_pids()),
            READY_S,
            "a daemon wants the lock",
        )
        fcntl.flock(reader, fcntl.LOCK_UN)
    _, errors = starting.communicate(timeout=READY_S)
    assert (starting.returncode, errors) == (0, b"")


def has_open(pid: int, path: Path) -> bool:
    """Tell whether a process has a file open."""
    with contextlib.suppress(OSError):
        return any(fd.resolve() == path.resolve() for fd in Path(f"/proc/{pid}/fd").iterdir())
    return False


# ---------------------------------------------------------------- last words


@pytest.mark.parametrize("restarted", [False, True], ids=["started once", "asked to start again meanwhile"])
def test_last_words(restarted: bool, model: ModelServer, make_host: MakeHost) -> None:
    host = make_host(Cluster(model))
    assert host.cli("start").returncode == 0
    if restarted:
        assert host.cli("start").returncode == 0
    (pid,) = host.daemon_pids()
    os.kill(pid, signal.SIGSEGV)
    wait_until(lambda: not host.daemon_pids(), ANSWER_S, "it has died")
    status = host.cli("status")
    assert status.returncode == 4
    assert "its last words" in status.stderr
    assert "Segmentation fault" in status.stderr
    assert "last words" not in host.cli("status").stderr, "they are told once to whoever asks"
    started = host.cli("start")
    assert started.returncode == 0
    assert "Segmentation fault" in started.stderr
    assert started.stdout.startswith("fabrik-daemon started\n")
    assert host.cli("start").stderr == "", "they are told once to whoever starts it"


def test_asking_while_it_starts_keeps_its_last_words(model: ModelServer, make_host: MakeHost) -> None:
    """Its crash file is empty while all is well; whoever looks then must leave it there."""
    host = make_host(Cluster(model))
    assert host.cli("start").returncode == 0
    (pid,) = host.daemon_pids()
    hidden = host.socket.with_suffix(".hidden")
    host.socket.rename(hidden)  # as if it did not listen yet
    assert host.cli("status").returncode == 4
    hidden.rename(host.socket)
    os.kill(pid, signal.SIGSEGV)
    wait_until(lambda: not host.daemon_pids(), ANSWER_S, "it has died")
    assert "Segmentation fault" in host.cli("status").stderr


def test_a_killed_daemon_has_no_last_words_and_starts_again(model: ModelServer, make_host: MakeHost) -> None:
    host = make_host(Cluster(model))
    assert host.cli("start").returncode == 0
    (pid,) = host.daemon_pids()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not host.daemon_pids(), ANSWER_S, "it has died")
    assert host.socket.exists()
    assert host.cli("status").returncode == 4
    done = host.cli("start")
    assert (done.returncode, done.stderr) == (0, "")
    assert host.json("status")["pid"] != pid


# ---------------------------------------------------------------- fifty at once


def test_fifty_starts_at_once(model: ModelServer, make_host: MakeHost) -> None:
    host = make_host(Cluster(model))
    assert host.cli("--version").returncode == 0  # it has unpacked itself
    starting = [host.popen("start") for _ in range(50)]
    outcomes = [(*process.communicate(timeout=300), process.returncode) for process in starting]
    assert [code for *_, code in outcomes] == [0] * 50, [errors for _, errors, code in outcomes if code]
    assert [errors for _, errors, _ in outcomes if errors] == []
    (pid,) = host.daemon_pids()
    told = {line for output, *_ in outcomes for line in output.decode().splitlines() if line.startswith("version:")}
    assert {line.split(", pid ")[1].split(",")[0] for line in told} == {str(pid)}
    assert host.json("status")["pid"] == pid
    assert [path.name for path in host.socket.parent.iterdir()] == [host.socket.name], "no private folder is left"


# ---------------------------------------------------------------- reload


def clusters_followed(host: Host) -> list[str]:
    return [cluster["name"] for cluster in host.status()["clusters"]]


def test_clusters_come_and_go_in_a_running_daemon(
    model: ModelServer, authority: Authority, make_host: MakeHost
) -> None:
    host = make_host(Cluster(model, "dev-k3s"))
    host.start()
    with ModelServer(authority) as prod:
        prod.uid = "11111111-2222-4333-8444-555555555555"
        prod.put("jobs", job(2))
        kubeconfig = prod.kubeconfig(host.root / "prod.kubeconfig")
        done = host.cli("clusters", "add", "--name", "prod", "--kubeconfig", str(kubeconfig), "--priority", "1")
        assert (done.returncode, done.stderr) == (0, "")
        wait_until(
            lambda: (
                {"prod"}
                == {each["name"] for each in host.status()["clusters"] if each["name"] == "prod" and each["connected"]}
            ),
            ANSWER_S,
            "the new cluster is followed",
        )
        assert clusters_followed(host) == ["prod", "dev-k3s"]
        assert {run["cluster"] for run in host.json("runs", "list")} == {"dev-k3s", "prod"}
        with model.changed:
            undisturbed = {watch.number for watch in model.watches}
        done = host.cli("clusters", "remove", "prod")
        assert (done.returncode, done.stderr) == (0, "")
        assert clusters_followed(host) == ["dev-k3s"]
        wait_until(lambda: not prod.watches, ANSWER_S, "its watches are closed")
        with model.changed:
            assert {watch.number for watch in model.watches} == undisturbed, "the other cluster's go on"
        assert prod.violations == []
    host.stop()


def test_the_last_cluster_can_be_removed_from_a_running_daemon(model: ModelServer, make_host: MakeHost) -> None:
    """Either the daemon lets go of it or the user is told that it does not; never neither."""
    host = make_host(Cluster(model))
    host.start()
    done = host.cli("clusters", "remove", "test")
    assert clusters_followed(host) == [] or done.stderr, "it is followed still, and nobody says so"


def test_a_reload_that_fails_is_told_and_changes_nothing(model: ModelServer, make_host: MakeHost) -> None:
    host = make_host(Cluster(model))
    host.start()
    clusters_file = host.root / "config" / "clusters.yaml"
    good = clusters_file.read_text()
    clusters_file.write_text("clusters: 5\n")
    done = host.cli("reload")
    assert done.returncode == 2
    assert "clusters.yaml:1" in one_line(done)
    assert clusters_followed(host) == ["test"]
    clusters_file.write_text(good)
    done = host.cli("reload")
    assert (done.returncode, done.stdout) == (0, "reloaded: nothing changed\n")


def test_sighup_reloads(model: ModelServer, make_host: MakeHost) -> None:
    host = make_host(Cluster(model))
    host.start()
    clusters_file = host.root / "config" / "clusters.yaml"
    entries = json.loads(clusters_file.read_text())
    entries["clusters"].append({**entries["clusters"][0], "name": "second"})
    clusters_file.write_text(json.dumps(entries))
    os.kill(host.pid, signal.SIGHUP)
    wait_until(lambda: clusters_followed(host) == ["second", "test"], ANSWER_S, "the second cluster is followed")
    clusters_file.write_text("][")
    os.kill(host.pid, signal.SIGHUP)
    wait_until(lambda: "not reloaded" in host.log, ANSWER_S, "what is wrong is logged")
    assert clusters_followed(host) == ["second", "test"]


def test_a_reload_to_a_useless_kubeconfig_does_not_end_the_daemon(model: ModelServer, make_host: MakeHost) -> None:
    """At start that is an error of the user's to see at once; a daemon that runs says it in status, and waits."""
    host = make_host(Cluster(model), backoffMax="200ms")
    host.start()
    clusters_file = host.root / "config" / "clusters.yaml"
    entries = json.loads(clusters_file.read_text())
    entries["clusters"][0]["kubeconfig"] += ".new"
    clusters_file.write_text(json.dumps(entries))
    assert host.cli("reload").returncode == 0
    wait_until(lambda: host.status()["clusters"][0]["error"], ANSWER_S, "status says what is wrong")
    shutil.copy(host.root / "test.kubeconfig", host.root / "test.kubeconfig.new")
    wait_until(lambda: host.status()["clusters"][0]["connected"], ANSWER_S, "it is followed again")


def test_a_reload_repeats_nothing(model: ModelServer, make_host: MakeHost) -> None:
    """A cluster whose entry changed goes on from where it is now, not from where the daemon once began."""
    host = make_host(Cluster(model))
    host.start()
    host.settle()
    host.stop()
    host.start()
    for finished in range(2, 12):
        model.put("pods", pod(1, report=Report(finished=finished)))
    host.settle()
    clusters_file = host.root / "config" / "clusters.yaml"
    entries = json.loads(clusters_file.read_text())
    entries["clusters"][0]["priority"] = 7
    with LinesClient(host.socket) as subscriber:
        assert subscriber.ask("subscribe")["type"] == "subscribed"
        clusters_file.write_text(json.dumps(entries))
        assert host.cli("reload").stdout == "reloaded: changed test\n"
        host.wait_for_watches()
        model.put("pods", pod(1, report=Report(finished=100)))
        seen = subscriber.until(lambda message: (message.get("progress") or {}).get("finished") == 100)
    runs = [message["progress"]["finished"] for message in seen if message["type"].startswith("run:")]
    assert runs == [100]


# ---------------------------------------------------------------- the socket's place


@pytest.fixture
def place() -> Iterator[Path]:
    """Return a short folder for sockets."""
    with tempfile.TemporaryDirectory(prefix="fabrik-") as folder:
        yield Path(folder)


def refused(host: Host, path: Path) -> str:
    """Start at a socket that must be refused; return the one line said."""
    done = host.cli("start", "--socket", str(path))
    assert done.returncode == 2, done
    assert host.daemon_pids() == []
    return one_line(done)


def test_a_stale_socket_is_replaced(model: ModelServer, make_host: MakeHost) -> None:
    host = make_host(Cluster(model))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(str(host.socket))
        stale.listen()
    inode = host.socket.stat().st_ino
    assert host.cli("start").returncode == 0
    assert host.socket.stat().st_ino != inode
    assert host.socket.stat().st_mode & 0o777 == 0o600
    assert answers(host.socket)


def test_a_live_listener_of_somebody_else_is_never_replaced(
    model: ModelServer, make_host: MakeHost, place: Path
) -> None:
    host, path = make_host(Cluster(model)), place / "other.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        other.listen()
        inode = path.stat().st_ino
        done = host.cli("start", "--socket", str(path), "--foreground")
        assert done.returncode == 2
        assert str(path) in done.stderr.splitlines()[-1]
        assert path.stat().st_ino == inode


def test_start_at_a_listener_that_is_no_daemon_says_so(model: ModelServer, make_host: MakeHost, place: Path) -> None:
    host, path = make_host(Cluster(model)), place / "other.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        other.listen()

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"220 mail.example.com ESMTP\r\n")

        threading.Thread(target=answer, daemon=True).start()
        done = host.cli("start", "--socket", str(path))
    assert done.returncode in {1, 2, 4}
    one_line(done)


@pytest.mark.parametrize("kind", ["file", "folder", "link to a file"])
def test_what_is_no_socket_is_never_replaced(kind: str, model: ModelServer, make_host: MakeHost, place: Path) -> None:
    path = place / "d.sock"
    (place / "file").write_text("mine")
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(place / "file")
    assert str(path) in refused(make_host(Cluster(model)), path)
    assert path.is_dir() if kind == "folder" else path.read_text() == "mine"
    assert path.is_symlink() == (kind == "link to a file")


@pytest.mark.skipif(not AS_ROOT, reason="only root can make another user's files")
@pytest.mark.parametrize("kind", ["socket", "file"])
def test_another_users_path_is_never_replaced(kind: str, model: ModelServer, make_host: MakeHost, place: Path) -> None:
    path = place / "d.sock"
    if kind == "socket":
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
            stale.bind(str(path))
    else:
        path.touch()
    os.chown(path, NOBODY, NOBODY)
    inode = path.stat().st_ino
    assert "another user" in refused(make_host(Cluster(model)), path)
    assert path.stat().st_ino == inode


def test_a_folder_that_others_may_write_is_refused(model: ModelServer, make_host: MakeHost, place: Path) -> None:
    folder = place / "open"
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "deeper").mkdir(mode=0o700)
    host = make_host(Cluster(model))
    assert f"others may write in {folder}" in refused(host, folder / "d.sock")
    assert f"others may write in {folder}" in refused(host, folder / "deeper" / "d.sock")
    (place / "link").symlink_to(folder)
    assert f"others may write in {folder}" in refused(host, place / "link" / "d.sock")
    assert [path.name for path in folder.iterdir()] == ["deeper"]
    folder.chmod(0o1777)  # sticky, as /tmp is
    done = host.cli("start", "--socket", str(folder / "d.sock"))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not AS_ROOT, reason="only root can make another user's files")
def test_a_folder_of_another_user_is_refused(model: ModelServer, make_host: MakeHost, place: Path) -> None:
    folder = place / "theirs"
    folder.mkdir(mode=0o755)
    os.chown(folder, NOBODY, NOBODY)
    assert "another user" in refused(make_host(Cluster(model)), folder / "d.sock")


@pytest.mark.skipif(not AS_ROOT, reason="only root can make another user's files")
def test_a_folder_behind_another_users_link_is_refused(model: ModelServer, make_host: MakeHost, place: Path) -> None:
    """They could let it point elsewhere at any moment."""
    place.chmod(0o1777)
    (place / "ours").mkdir(mode=0o700)
    (place / "link").symlink_to(place / "ours")
    os.lchown(place / "link", NOBODY, NOBODY)
    assert str(place / "link") in refused(make_host(Cluster(model)), place / "link" / "d.sock")


def test_an_overlong_path_is_refused(model: ModelServer, make_host: MakeHost, place: Path) -> None:
    host = make_host(Cluster(model))
    folder = place / ("x" * 100)
    folder.mkdir()
    line = refused(host, folder / "d.sock")
    assert "long" in line.rpartition("d.sock")[2]
    assert "no-such-folder" in refused(host, place / "no-such-folder" / "d.sock")


def test_the_longest_path_that_a_socket_may_have(model: ModelServer, make_host: MakeHost, place: Path) -> None:
    """What is said of the limit must be true: a path of 103 bytes is not longer than 103 bytes."""
    host = make_host(Cluster(model))
    path = place / ("d" * (103 - len(bytes(place)) - 1))
    assert len(bytes(path)) == 103
    done = host.cli("start", "--socket", str(path))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_vanished_socket_is_made_again(model: ModelServer, make_host: MakeHost) -> None:
    host = make_host(Cluster(model), socketCheck="100ms")
    host.launch()
    with LinesClient(host.socket) as before:
        host.socket.unlink()
        wait_until(lambda: host.socket.exists() and answers(host.socket), ANSWER_S, "the socket is there again")
        assert before.ask("ping")["type"] == "ping", "whoever was connected still is"
    assert host.socket.stat().st_mode & 0o777 == 0o600
    host.socket.unlink()
    host.socket.write_text("somebody else's")
    wait_until(lambda: "cannot be made again" in host.log, ANSWER_S, "another's file is left alone, and that is told")
    assert host.socket.read_text() == "somebody else's"
    host.socket.unlink()
    wait_until(lambda: host.socket.exists() and answers(host.socket), ANSWER_S, "the socket is there again")


# ---------------------------------------------------------------- ends


class Load(threading.Thread):
    """Changes the progress of some runs as fast as it is told to, until `ended`; every run counts upwards."""

    def __init__(self, server: ModelServer, runs: int, pause_s: float) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.server = server
        self._runs = runs
        self._pause_s = pause_s

    def run(self) -> None:
        """Put one change after the other."""
        finished = 0
        while not self.ended.is_set():
            finished += 1
            for number in range(1, self._runs + 1):
                self.server.put("pods", pod(number, report=Report(finished=finished, total=10**6)))
            if finished % 10 == 0:
                self.server.bookmark()
            self.ended.wait(self._pause_s)


def progress_in(host: Host) -> dict[str, int]:
    """Return each run's progress in the cache."""
    return {row["run_id"]: row["progress_finished"] or 0 for row in host.rows("SELECT * FROM runs")}


def progress_at(server: ModelServer, version: int) -> dict[str, int]:
    """Return each run's progress as of a resource version of Pods."""
    with server.changed:
        log = list(server.collections["pods"].log)
    found: dict[str, int] = {}
    for change in log:
        if change.type != "BOOKMARK" and change.version <= version:
            metadata = change.object["metadata"]
            told = json.loads(metadata["annotations"]["fabrik.dev/progress"])
            found[metadata["labels"]["fabrik.dev/run-id"]] = told["finished"]
    return found


def test_sigterm_ends_within_2_s_with_all_that_was_told_in_the_cache(model: ModelServer, make_host: MakeHost) -> None:
    host = make_host(Cluster(model))
    runs = 20
    for number in range(2, runs + 1):
        model.put("jobs", job(number))
    host.start()
    load = Load(model, runs, 0.01)
    told: dict[str, int] = {}
    with LinesClient(host.socket) as subscriber:
        subscriber.request("subscribe")
        load.start()
        ends_at = time.monotonic() + 2
        while time.monotonic() < ends_at:
            message = subscriber.message()
            if message["type"] == "run:updated":
                told[message["runId"]] = message["progress"]["finished"]
        took: list[float] = []
        stopping = threading.Thread(target=lambda: took.append(host.signal(signal.SIGTERM)))
        stopping.start()
        for line in subscriber.rest().splitlines():
            message = json.loads(line)
            if message["type"] == "run:updated":
                told[message["runId"]] = message["progress"]["finished"]
        stopping.join()
    load.ended.set()
    load.join()
    assert took[0] < STOP_S
    assert "Traceback" not in host.log
    assert len(told) == runs
    cached = progress_in(host)
    assert {run: cached[run] for run in told if cached[run] < told[run]} == {}, (
        "the last it wrote it need not have told"
    )


def test_sigint_ends_it_in_order_too(model: ModelServer, make_host: MakeHost) -> None:
    host = make_host(Cluster(model))
    host.start()
    assert host.signal(signal.SIGINT) < STOP_S
    assert not host.socket.exists()
    assert "Traceback" not in host.log


def assert_whole(host: Host, server: ModelServer) -> None:
    """Fail where the cache of a daemon that was killed is damaged, or behind its own bookmark."""
    with contextlib.closing(sqlite3.connect(host.cache)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        connection.execute("BEGIN")
        watches = dict(connection.execute("SELECT resource, resource_version FROM watches"))
        rows = dict(connection.execute("SELECT run_id, progress_finished FROM runs"))
        changes = connection.execute(
            "SELECT json_extract(row, '$.run_id'), json_extract(row, '$.progress_finished')"
            " FROM changes WHERE type LIKE 'run:%' ORDER BY seq"
        )
        newest = dict(changes.fetchall())
        reserved, last = connection.execute(
            "SELECT (SELECT value FROM meta WHERE key = 'reserved_seq'), (SELECT max(seq) FROM changes)"
        ).fetchone()
    assert set(watches) == set(server.collections)
    expected = progress_at(server, int(watches["pods"]))
    assert {run: rows.get(run) for run in expected} == expected, "rows are not as of their own bookmark"
    assert newest == {run: rows[run] for run in newest}, "the stream's last word is not what the row says"
    assert int(last or 0) <= int(reserved), "a number was given out that is not reserved"


class Lane:
    """One daemon under load that is killed again and again."""

    def __init__(self, host: Host, server: ModelServer, chance: random.Random) -> None:
        self.host = host
        self.server = server
        self.chance = chance

    def kill_often(self, kills: int) -> None:
        """Kill it while it starts, follows or writes; each next start goes on from there without any list."""
        host, server = self.host, self.server
        host.start()
        host.settle()
        synced_at = time.monotonic()
        host.signal(signal.SIGKILL)
        load = Load(server, 10, 0.03)
        load.start()
        try:
            useful = sum(self._killed() for _ in range(kills))
        finally:
            load.ended.set()
            load.join()
        assert useful > kills // 4, "nearly all kills came before anything was written"
        host.start()
        host.catch_up(CATCH_UP_S)
        assert progress_in(host) == progress_at(server, server.version("pods"))
        lists = server.asked(lambda seen: seen.at > synced_at and seen.is_list)
        assert lists == [], "a restart goes on from the committed resource versions"
        assert "damaged" not in host.log
        assert host.signal(signal.SIGTERM) < ANSWER_S

    def _killed(self) -> bool:
        """Start it and kill it at a random moment; tell whether it wrote anything."""
        before = sum(progress_in(self.host).values())
        self.host.launch(until_it_answers=False)
        if self.chance.random() < 0.75:  # else: somewhere on its way up
            wait_until(lambda: sum(progress_in(self.host).values()) > before, READY_S, "it follows")
        time.sleep(self.chance.random() * 0.3)
        self.host.signal(signal.SIGKILL)
        assert_whole(self.host, self.server)
        return sum(progress_in(self.host).values()) > before


def test_sigkill_at_random_moments_never_leaves_the_cache_behind_its_bookmark(
    authority: Authority, serve: Serve, make_host: MakeHost
) -> None:
    lanes = []
    for number, batch in enumerate(("1ms", "50ms")):
        server = ModelServer(authority)
        for run in range(1, 11):
            server.put("jobs", job(run))
            server.put("pods", pod(run, report=Report(finished=0, total=10**6)))
        serve(server)
        lanes.append(Lane(make_host(Cluster(server), batch=batch), server, random.Random(SEED + number)))
    with concurrent.futures.ThreadPoolExecutor(len(lanes)) as pool:
        for killed in [pool.submit(lane.kill_often, KILLS // len(lanes)) for lane in lanes]:
            killed.result()
