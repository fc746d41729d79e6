"""Upgrades and downgrades: the cache stays, versions that differ are told of and get on, a cache can be made anew."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import socket
import sqlite3
import tempfile
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from fabrik_objects import Report, job, pod
from fakes import ModelServer
from harness import Cluster, wait_until

import fabrik_daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fakes import Authority, KubernetesApi
    from hosts import Host

    MakeHost = Callable[..., Host]
    Serve = Callable[[KubernetesApi], None]
    Edit = Callable[[dict[str, Any]], object]

NEXT: Final = "77.0.0"


@pytest.fixture
def host(authority: Authority, serve: Serve, make_host: MakeHost) -> Host:
    """Return a host with one cluster that has two runs."""
    server = ModelServer(authority)
    for number in (1, 2):
        server.put("jobs", job(number))
        server.put("pods", pod(number, report=Report(finished=number)))
    serve(server)
    return make_host(Cluster(server, "dev"))


def next_version(executable: Path, path: Path) -> None:
    """Write the executable as another version would be: it says so, and its copy goes by another name."""
    with zipfile.ZipFile(executable) as source, zipfile.ZipFile(path, "w") as target:
        build_id = json.loads(source.read("environment.json"))["build_id"].encode()
        for name in source.namelist():
            data = source.read(name)
            if name == "tree.zip":
                data = _retold(data)
            target.writestr(name, data.replace(build_id, build_id[::-1]) if name != "tree.zip" else data)


def _retold(tree: bytes) -> bytes:
    told = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(tree)) as source, zipfile.ZipFile(told, "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename == "site-packages/fabrik_daemon.py":
                data, count = re.subn(rb'^__version__ = ".*"$', f'__version__ = "{NEXT}"'.encode(), data, flags=re.M)
                assert count == 1
            target.writestr(entry, data)
    return told.getvalue()


def test_an_upgrade_in_place_and_back(host: Host, executable: Path, tmp_path: Path) -> None:
    program, newer = tmp_path / "bin" / "fabrik-daemon", tmp_path / "newer"
    program.parent.mkdir()
    shutil.copy(executable, program)
    next_version(executable, newer)
    own = fabrik_daemon.__version__

    def cli(*words: str) -> str:
        done = host.run_as(program, *words)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    def version() -> str:
        return str(json.loads(cli("status", "-o", "json"))["version"])

    (cluster,) = host.clusters
    cli("start")
    wait_until(lambda: '"synced": true' in cli("status", "-o", "json"), 30, "it is synced")
    before = json.loads(cli("runs", "list", "-o", "json"))
    assert len(before) == 2
    stream = host.rows("SELECT value FROM meta WHERE key = 'stream'")
    lists = len(cluster.server.asked(is_list))

    newer.replace(program)
    skewed = host.run_as(program, "runs", "list", "-o", "json")
    assert skewed.returncode == 0, skewed.stderr
    assert f"the daemon is version {own}, this is {NEXT}" in skewed.stderr
    assert [row["run_id"] for row in json.loads(skewed.stdout)] == [row["run_id"] for row in before]
    cli("restart")
    assert version() == NEXT
    assert "is version" not in host.run_as(program, "runs", "list").stderr
    assert {row["run_id"] for row in json.loads(cli("runs", "list", "-o", "json"))} == {row["run_id"] for row in before}
    assert len(cluster.server.asked(is_list)) == lists, "it goes on from where the older one was"

    shutil.copy(executable, tmp_path / "older")
    (tmp_path / "older").replace(program)
    assert f"the daemon is version {NEXT}, this is {own}" in host.run_as(program, "status").stderr
    cli("restart")
    assert version() == own
    assert host.rows("SELECT value FROM meta WHERE key = 'stream'") == stream, "cursors of clients are still good"
    assert len(cluster.server.asked(is_list)) == lists
    cli("stop")


def is_list(request: Any) -> bool:
    """Tell whether a request is for a list."""
    return not request.is_watch and request.path.rpartition("/")[2] in {"jobs", "pods", "events", "cronjobs"}


# ---------------------------------------------------------------- versions that differ


@contextlib.contextmanager
def between(real: Path, edit: Edit) -> Iterator[Path]:
    """Serve at another path what a daemon answers, each message edited."""
    folder = Path(tempfile.mkdtemp(prefix="fabrik-"))
    path = folder / "d.sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(8)

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(client,), daemon=True).start()

    def answer(client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as daemon:
            daemon.connect(str(real))
            with client.makefile("rwb") as asked, daemon.makefile("rwb") as told:
                for line in asked:
                    told.write(line)
                    told.flush()
                    message = json.loads(told.readline())
                    edit(message)
                    asked.write(json.dumps(message).encode() + b"\n")
                    asked.flush()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield path
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        shutil.rmtree(folder)


def as_older(message: dict[str, Any]) -> None:
    """Leave out what an older daemon does not say."""
    message.pop("speaks", None)


def as_newer(message: dict[str, Any]) -> None:
    """Say what a newer daemon may say."""
    message["speaks"] = [NEXT, 99]
    message["brand_new"] = {"a": [1]}
    for name in ("runs", "clusters"):
        if isinstance(message.get(name), list):
            for row in message[name]:
                row["brand_new"] = "x"


@pytest.mark.parametrize(
    ("edit", "told"), [(as_older, "an older version"), (as_newer, f"version {NEXT}")], ids=["older", "newer"]
)
def test_a_daemon_of_another_version_is_told_of_and_asked_all_the_same(edit: Edit, told: str, host: Host) -> None:
    host.start()
    with between(host.socket, edit) as path:
        for words in (("status",), ("runs", "list"), ("clusters", "list"), ("runs", "list", "-o", "json")):
            done = host.cli("--socket", str(path), *words)
            assert done.returncode == 0, done.stderr
            assert f"the daemon is {told}, this is {fabrik_daemon.__version__}" in done.stderr
            assert done.stderr.count("the daemon is ") == 1
            assert "dev" in done.stdout
            assert "speaks" not in done.stdout
    host.stop()


def test_one_version_says_nothing(host: Host) -> None:
    host.start()
    for words in (("status",), ("runs", "list")):
        assert "version" not in host.cli(*words).stderr
    host.stop()


# ---------------------------------------------------------------- a cache made anew


def test_a_newer_cache_is_refused_and_can_be_made_anew(host: Host) -> None:
    host.start()
    host.settle()
    host.stop()
    with contextlib.closing(sqlite3.connect(host.cache)) as connection:
        connection.execute("UPDATE meta SET value = '9999' WHERE key = 'schema_version'")
        connection.commit()
    before = host.cache.read_bytes()
    refused = host.cli("start")
    assert refused.returncode == 1
    assert "--rebuild-cache" in refused.stderr
    assert host.cache.read_bytes() == before
    done = host.cli("start", "--rebuild-cache")
    assert done.returncode == 0, done.stderr
    (aside,) = [path for path in host.cache.parent.glob("cache.db.replaced-*") if path.name[-1].isdigit()]
    assert str(aside) in done.stderr
    assert aside.read_bytes() == before, "whole, for the newer one to come back"
    wait_until(lambda: host.rows("SELECT count(*) AS n FROM runs")[0]["n"] == 2, 30, "both runs are in the new one")
    assert host.cli("stop").returncode == 0


def test_a_cache_in_use_is_not_made_anew(host: Host) -> None:
    host.start()
    inode = host.cache.stat().st_ino
    done = host.cli("start", "--rebuild-cache")
    assert done.returncode == 1
    assert "runs already" in done.stderr.splitlines()[-1]
    assert host.cache.stat().st_ino == inode
    host.stop()


def test_where_there_is_no_cache_none_is_put_aside(host: Host) -> None:
    done = host.cli("start", "--rebuild-cache")
    assert done.returncode == 0, done.stderr
    assert not list(host.cache.parent.glob("*replaced*"))
    assert host.cache.exists()
    assert host.cli("stop").returncode == 0
