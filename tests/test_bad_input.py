"""Bad input of every kind through the built executable: one clear line, the right exit code, and nothing lost."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sqlite3
import uuid
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import fabrik_objects
import pytest
from commands import Shell, build_cache, hash_of, refused, unprivileged_shell
from fakes import Access, Authority, ModelServer
from harness import Cluster, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from commands import Done
    from fakes import KubernetesApi
    from harness import Daemon

    Serve = Callable[[KubernetesApi], None]
    MakeDaemon = Callable[..., Daemon]

TOKEN: Final = "a-bearer-token"
FOLLOWING: Final = [("sync",), ("start", "--foreground")]
SOON: Final = {"resolve": 0.5, "connect": 0.5, "answer": 0.5, "sync": 10, "stop": 1}
READY_S: Final = 30.0


@pytest.fixture
def shell(executable: Path, unpacked: Path, tmp_path: Path) -> Shell:
    return Shell(executable, unpacked, tmp_path / "user")


@pytest.fixture
def nobody(executable: Path) -> Iterator[Shell]:
    for shell in unprivileged_shell(executable):
        if not shell.python:
            pytest.skip("no Python here that a user without rights can start")
        yield shell


def model(authority: Authority | None, serve: Serve, runs: int = 2) -> ModelServer:
    """Start a server that has some runs."""
    server = ModelServer(authority, token=TOKEN)
    server.uid = str(uuid.uuid4())  # two of one uid would be one cluster
    for number in range(runs):
        server.put("jobs", fabrik_objects.job(number))
        server.put("pods", fabrik_objects.pod(number))
    serve(server)
    return server


def configure(shell: Shell, kubeconfig: Path | str, *, name: str = "test", **timing: float) -> None:
    """Have one cluster followed."""
    entry = {"name": name, "kubeconfig": str(kubeconfig)}
    shell.write(shell.clusters, json.dumps({"clusters": [entry]}))
    shell.write(shell.config, json.dumps({"timing": {**SOON, **timing}}))


def kubeconfig_text(server: str = "https://127.0.0.1:1", **user: object) -> str:
    """Return a kubeconfig with one context, `there`."""
    config: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "there",
        "clusters": [{"name": "c", "cluster": {"server": server, "insecure-skip-tls-verify": True}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "there", "context": {"cluster": "c", "user": "u"}}],
    }
    return json.dumps(config, indent=1)


# ---------------------------------------------------------------- kubeconfigs


@pytest.mark.parametrize("words", FOLLOWING, ids=" ".join)
def test_no_kubeconfig_at_all(words: tuple[str, ...], shell: Shell) -> None:
    refused(shell.run(*words), 2, "no cluster", "clusters add")
    assert not shell.cache.exists()


def test_a_kubeconfig_without_any_cluster_of_fabrik(shell: Shell) -> None:
    shell.write(shell.home / ".kube" / "config", kubeconfig_text())
    refused(shell.run("sync"), 2, "no cluster", "clusters add")


BROKEN_KUBECONFIGS: Final[dict[str, tuple[str | bytes, str]]] = {
    "a YAML error": ("apiVersion: v1\nclusters: [\n  - {\n", ":3: "),
    "a tab": ("apiVersion: v1\n\tkind: Config\n", ":2: "),
    "no kubeconfig": ("hello: world\n", ":1: no contexts"),
    "a list": ("- 1\n", ":1: no contexts"),
    "empty": ("", ":1: no contexts"),
    "bytes": (b"\xff\xfe\x00\x01", "UTF-8"),
    "contexts are no list": ("contexts: {a: b}\n", ":1: no contexts"),
    "contexts are numbers": ("contexts: [1, 2]\ncurrent-context: x\n", "kubeconfig"),
    "an alias that holds itself": ("contexts: &a [*a]\n", "kubeconfig"),
    "no server": (kubeconfig_text().replace('"server"', '"sever"'), "server"),
    "another scheme": (kubeconfig_text("ftp://127.0.0.1"), "ftp://127.0.0.1"),
    "no such port": (kubeconfig_text("https://127.0.0.1:99999"), "99999"),
    "no such user": (kubeconfig_text().replace('"user": "u"', '"user": "someone"'), "someone"),
    "no such cluster": (kubeconfig_text().replace('"cluster": "c"', '"cluster": "elsewhere"'), "elsewhere"),
    "no such current context": (
        kubeconfig_text().replace('"current-context": "there"', '"current-context": "ther"'),
        "did you mean 'there'?",
    ),
    "no current context": (
        kubeconfig_text().replace('"current-context": "there"', '"current-context": ""'),
        "no current context",
    ),
    "basic authentication": (kubeconfig_text(username="admin", password="pass-w0rd"), "basic auth"),
    "a certificate that is none": (
        kubeconfig_text(**{"client-certificate-data": "eA==", "client-key-data": "eA=="}),
        "certificate",
    ),
    "base64 that is none": (kubeconfig_text(**{"client-certificate-data": "%", "client-key-data": "%"}), "kubeconfig"),
    "a certificate file that is not there": (
        kubeconfig_text(**{"client-certificate": "/nowhere/c.pem", "client-key": "/nowhere/k.pem"}),
        "/nowhere/c.pem",
    ),
    "a token file that is not there": (kubeconfig_text(tokenFile="/nowhere/token"), "/nowhere/token"),
    "a plugin that is not there": (
        kubeconfig_text(exec={"apiVersion": "client.authentication.k8s.io/v1", "command": "/nowhere/plugin"}),
        "/nowhere/plugin",
    ),
}


def test_broken_kubeconfigs(shell: Shell) -> None:
    """Each is a cluster of its own here, since looking into a kubeconfig takes half a second."""
    entries = []
    for number, (text, _) in enumerate(BROKEN_KUBECONFIGS.values()):
        path = shell.write(shell.home / f"{number:02}.kubeconfig", text)
        entries.append({"name": f"c{number:02}", "kubeconfig": str(path)})
    shell.write(shell.clusters, json.dumps({"clusters": entries}))
    done = shell.run("sync")
    assert (done.code, "Traceback" in done.stderr) == (2, False), done
    assert "pass-w0rd" not in done.stderr
    told = dict(line.removeprefix("fabrik-daemon: ").split(": ", 1) for line in done.complaints)
    assert sorted(told) == [entry["name"] for entry in entries], "one line each"
    for (case, (_, part)), entry in zip(BROKEN_KUBECONFIGS.items(), entries):
        line = told[entry["name"]]
        assert entry["kubeconfig"] in line, case
        assert part in line, case


@pytest.mark.parametrize("case", ["a YAML error", "no such current context", "basic authentication"])
def test_a_daemon_whose_only_kubeconfig_is_broken(case: str, shell: Shell) -> None:
    text, part = BROKEN_KUBECONFIGS[case]
    path = shell.write(shell.home / "broken.kubeconfig", text)
    configure(shell, path)
    refused(shell.run("start", "--foreground"), 2, str(path), part)


@pytest.mark.parametrize("words", FOLLOWING, ids=" ".join)
def test_a_kubeconfig_that_is_not_there(words: tuple[str, ...], shell: Shell) -> None:
    configure(shell, "~/no.kubeconfig")
    refused(shell.run(*words), 2, str(shell.home / "no.kubeconfig"), "no such")


def test_a_kubeconfig_that_is_a_folder(shell: Shell) -> None:
    (shell.home / "folder").mkdir()
    configure(shell, "~/folder")
    refused(shell.run("sync"), 2, str(shell.home / "folder"), "directory")


def test_a_kubeconfig_that_may_not_be_read(nobody: Shell) -> None:
    path = nobody.write(nobody.home / "root.kubeconfig", kubeconfig_text())
    configure(nobody, path)
    give(nobody, nobody.home)
    path.chmod(0)
    refused(nobody.run("sync"), 2, str(path), "ermission denied")


def test_the_other_clusters_of_one_whose_kubeconfig_is_broken(shell: Shell, authority: Authority, serve: Serve) -> None:
    server = model(authority, serve)
    good = server.kubeconfig(shell.home / "good.kubeconfig", Access(auth="token", ca="data"))
    entries = [{"name": "good", "kubeconfig": str(good)}, {"name": "bad", "kubeconfig": "~/no.kubeconfig"}]
    shell.write(shell.clusters, json.dumps({"clusters": entries}))
    done = shell.run("sync")
    assert (done.code, len(done.complaints)) == (5, 1), done
    assert "bad: " in done.complaints[0]
    assert "no.kubeconfig" in done.complaints[0]
    assert len(json.loads(shell.run("runs", "list", "-o", "json").stdout)) == 2


def give(shell: Shell, folder: Path) -> None:
    """Make a folder and all in it the shell's user's."""
    if shell.user is not None:
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, shell.user, shell.user, follow_symlinks=False)


# ---------------------------------------------------------------- servers


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Server(NamedTuple):
    """What stands behind a kubeconfig, and what a command is to say of it."""

    kubeconfig: Path
    parts: tuple[str, ...]
    credentials_s: float = 30.0


def silent(shell: Shell, tls: str) -> tuple[Server, socket.socket]:
    """Return a server that takes connections and says nothing."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http{tls}://127.0.0.1:{listener.getsockname()[1]}"
    return Server(shell.write(shell.home / "kubeconfig", kubeconfig_text(url)), ("answer", "0.5 s")), listener


def not_there(shell: Shell, _authority: Authority, _serve: Serve) -> Server:
    return Server(shell.write(shell.home / "k", kubeconfig_text(f"https://127.0.0.1:{free_port()}")), ("refused",))


def of_another_authority(shell: Shell, authority: Authority, serve: Serve) -> Server:
    server = model(Authority(), serve)
    path = server.kubeconfig(shell.home / "k", Access(auth="token", ca="data"))
    text = path.read_text()
    impostor = ModelServer(authority, token=TOKEN)
    other = json.loads(impostor.kubeconfig(shell.home / "o", Access(auth="token", ca="data")).read_text())
    config = json.loads(text)
    data = other["clusters"][0]["cluster"]["certificate-authority-data"]
    config["clusters"][0]["cluster"]["certificate-authority-data"] = data
    return Server(shell.write(path, json.dumps(config)), ("certificate",))


def of_another_name(shell: Shell, authority: Authority, serve: Serve) -> Server:
    server = model(authority, serve)
    access = Access(auth="token", ca="data", tls_server_name="elsewhere.fabrik.test")
    return Server(server.kubeconfig(shell.home / "k", access), ("certificate", "elsewhere.fabrik.test"))


def without_tls(shell: Shell, _authority: Authority, serve: Serve) -> Server:
    server = model(None, serve)
    return Server(shell.write(shell.home / "k", kubeconfig_text(f"https://127.0.0.1:{server.port}")), ("TLS",))


def that_wants_tls(shell: Shell, authority: Authority, serve: Serve) -> Server:
    server = model(authority, serve)
    return Server(shell.write(shell.home / "k", kubeconfig_text(f"http://127.0.0.1:{server.port}")), ("test: ",))


def that_refuses_the_token(shell: Shell, authority: Authority, serve: Serve) -> Server:
    server = model(authority, serve)
    path = server.kubeconfig(shell.home / "k", Access(auth="token", ca="data"))
    server.token = "another"
    return Server(path, ("Unauthorized", "credentials"))


def that_forbids_everything(shell: Shell, authority: Authority, serve: Serve) -> Server:
    server = model(authority, serve)
    for resource in server.collections:
        server.refuse(resource)
    return Server(server.kubeconfig(shell.home / "k", Access(auth="token", ca="data")), ("forbidden", "list"))


def plugin(shell: Shell, *command: str) -> Path:
    """Write a kubeconfig whose user is known by an exec plugin."""
    words = {"apiVersion": "client.authentication.k8s.io/v1", "command": command[0], "args": command[1:]}
    return shell.write(shell.home / "k", kubeconfig_text(exec={**words, "interactiveMode": "Never"}))


def whose_plugin_fails(shell: Shell, _authority: Authority, _serve: Serve) -> Server:
    return Server(plugin(shell, "false"), ("'false'", "1"))


def whose_plugin_prints_rubbish(shell: Shell, _authority: Authority, _serve: Serve) -> Server:
    return Server(plugin(shell, "echo", "\x1b[2Jhi"), ("'echo'",))


def whose_plugin_hangs(shell: Shell, _authority: Authority, _serve: Serve) -> Server:
    return Server(plugin(shell, "sleep", "600"), ("plugin", "2 s"), credentials_s=2)


SERVERS: Final = [
    not_there,
    of_another_authority,
    of_another_name,
    without_tls,
    that_wants_tls,
    that_refuses_the_token,
    that_forbids_everything,
    whose_plugin_fails,
    whose_plugin_prints_rubbish,
    whose_plugin_hangs,
]


@pytest.mark.parametrize("make", SERVERS, ids=lambda make: make.__name__)
def test_a_server_that_cannot_be_used(
    make: Callable[[Shell, Authority, Serve], Server], shell: Shell, authority: Authority, serve: Serve
) -> None:
    build_cache(shell.cache, 3)
    server = make(shell, authority, serve)
    configure(shell, server.kubeconfig, credentials=server.credentials_s)
    refused(shell.run("sync"), 5, "fabrik-daemon: test: ", *server.parts)
    assert_three_runs_are_still_told(shell)


@pytest.mark.parametrize("tls", ["s", ""], ids=["TLS", "HTTP"])
def test_a_server_that_never_answers(tls: str, shell: Shell) -> None:
    build_cache(shell.cache, 3)
    server, listener = silent(shell, tls)
    with listener:
        configure(shell, server.kubeconfig)
        done = shell.run("sync")
    assert done.seconds < 1.5 + 10
    refused(done, 5, "fabrik-daemon: test: ", *server.parts)
    assert_three_runs_are_still_told(shell)


def test_a_server_that_takes_the_request_and_never_answers(shell: Shell, authority: Authority, serve: Serve) -> None:
    server = model(authority, serve)
    server.hold()
    configure(shell, server.kubeconfig(shell.home / "k", Access(auth="token", ca="data")), sync=1, answer=30)
    refused(shell.run("sync"), 5, "fabrik-daemon: test: ", "in time")
    done = shell.run("runs", "list")
    refused(done, 1, "not yet synced", "test")


def assert_three_runs_are_still_told(shell: Shell) -> None:
    done = shell.run("runs", "list", "-o", "json")
    assert (done.code, len(json.loads(done.stdout)), len(done.complaints)) == (0, 3, 1), done
    assert re.search(r"\btest:? as of \d+s ago, not connected", done.complaints[0])


@pytest.mark.parametrize(
    "make",
    [not_there, that_refuses_the_token, of_another_name, whose_plugin_fails],
    ids=lambda make: make.__name__,
)
def test_a_daemon_outlives_a_server_that_cannot_be_used(
    make: Callable[[Shell, Authority, Serve], Server], shell: Shell, authority: Authority, serve: Serve
) -> None:
    server = make(shell, authority, serve)
    configure(shell, server.kubeconfig)
    with shell.start("start", "--foreground") as daemon:
        try:
            wait_until(lambda: told_error(shell), READY_S, "the cluster's error in the cache")
            listed = json.loads(shell.run("clusters", "list", "-o", "json").stdout)
            assert daemon.poll() is None
        finally:
            daemon.send_signal(signal.SIGTERM)
            _, errors = daemon.communicate()
    assert daemon.returncode == 0, errors
    assert [(row["name"], row["connected"]) for row in listed] == [("test", False)]
    for part in server.parts:
        assert part in listed[0]["error"]
    assert "Traceback" not in errors


def told_error(shell: Shell) -> str:
    """Return what the cache says is wrong with a cluster."""
    if not shell.cache.exists():
        return ""
    connection = sqlite3.connect(f"file:{shell.cache}?mode=ro", uri=True)
    try:
        found = connection.execute("SELECT error FROM clusters WHERE error IS NOT NULL").fetchone()
    except sqlite3.OperationalError:  # its tables are not there yet
        return ""
    finally:
        connection.close()
    return str(found[0]) if found else ""


# ---------------------------------------------------------------- config.yaml and clusters.yaml

CONFIGS: Final = {
    "a YAML error": ("timing:\n  idle: [5s\n", 3, ""),
    "a tab": ("timing:\n\tidle: 5s\n", 2, ""),
    "two documents": ("cache: a\n---\ncache: b\n", 2, ""),
    "a control character": ("cache: a\x01b\n", 1, ""),
    "an alias to nowhere": ("cache: *a\n", 1, ""),
    "a list": ("- cache: a\n", 1, "key: value"),
    "a word": ("hello\n", 1, "key: value"),
    "an unknown key": ("cache: a\ntimming:\n  idle: 5s\n", 2, "did you mean 'timing'?"),
    "a key like none": ("xyzzy: 1\n", 1, "choose from"),
    "a key that is a list": ("? [a, b]\n: c\n", 1, ""),
    "a key twice": ("cache: a\nsocket: b\ncache: c\n", 3, "cache"),
    "another type": ("cache: [a, b]\n", 1, "cache"),
    "no value": ("\ncache:\n", 2, "cache"),
    "timing that is a number": ("timing: 5\n", 1, ""),
    "an unknown interval": ("timing:\n  batch: 1s\n  idel: 5s\n", 3, "did you mean 'idle'?"),
    "an interval twice": ("timing:\n  idle: 5s\n  idle: 6s\n", 3, "idle"),
    "a bad duration": ("timing:\n  idle: soon\n", 2, "'soon'"),
    "a unit that is none": ("timing:\n  idle: 5 parsecs\n", 2, "'5 parsecs'"),
    "a negative duration": ("timing:\n  idle: -5s\n", 2, "'-5s'"),
    "a duration below zero": ("timing:\n  idle: -5\n", 2, "'-5'"),
    "no number": ("timing:\n  idle: .nan\n", 2, "idle"),
    "not a number": ("timing:\n  idle: nan\n", 2, "idle"),
    "without end": ("timing:\n  idle: inf\n", 2, "idle"),
    "beyond all numbers": ("timing:\n  idle: 1e999\n", 2, "idle"),
    "beyond all durations": (f"timing:\n  idle: {'9' * 40}d\n", 2, "idle"),
    "a level that is none": ("logLevel: warn\n", 1, "did you mean 'warning'?"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_broken_config(case: str, shell: Shell) -> None:
    text, line, part = CONFIGS[case]
    shell.write(shell.config, text)
    refused(shell.run("runs", "list"), 2, f"{shell.config}:{line}: ", part)


@pytest.mark.parametrize(
    "words",
    [
        *FOLLOWING,
        ("runs", "show", "--id", "x"),
        ("query", "SELECT 1"),
        ("clusters", "list"),
        ("clusters", "remove", "x"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_every_command_minds_a_broken_config(words: tuple[str, ...], shell: Shell) -> None:
    shell.write(shell.config, "timing:\n  idel: 5s\n")
    refused(shell.run(*words), 2, f"{shell.config}:2: ", "did you mean 'idle'?")


def test_a_config_that_cannot_be_read(shell: Shell) -> None:
    shell.write(shell.config, b"cache: \xff\n")
    refused(shell.run("runs", "list"), 2, str(shell.config), "UTF-8")
    refused(shell.run("runs", "list", "--config", "elsewhere.yaml"), 2, "elsewhere.yaml", "no such file")
    refused(shell.run("runs", "list", "--config", str(shell.home)), 2, str(shell.home), "directory")


CLUSTERS: Final = {
    "a YAML error": ("clusters:\n  - name: a\n   kubeconfig: b\n", 3, ""),
    "a list": ("- name: a\n  kubeconfig: b\n", 1, "key: value"),
    "another key": ("cluster:\n  - name: a\n", 1, "did you mean 'clusters'?"),
    "a mapping": ("clusters:\n  a: b\n", 1, "list"),
    "twice": ("clusters: []\nclusters: []\n", 2, "clusters"),
    "a cluster that is a word": ("clusters:\n  - a\n", 2, "key: value"),
    "no name": ("clusters:\n  - kubeconfig: b\n", 2, "name"),
    "no kubeconfig": ("clusters:\n  - name: a\n", 2, "kubeconfig"),
    "an unknown key": ("clusters:\n  - name: a\n    kubeConfig: b\n", 3, "did you mean 'kubeconfig'?"),
    "a key twice": ("clusters:\n  - name: a\n    kubeconfig: b\n    name: c\n", 4, "name"),
    "a name twice": ("clusters:\n  - {name: a, kubeconfig: b}\n  - {name: a, kubeconfig: c}\n", 3, "'a'"),
    "a name with a slash": ("clusters:\n  - name: a/b\n    kubeconfig: b\n", 2, "'a/b'"),
    "a name that is a list": ("clusters:\n  - name: [a]\n    kubeconfig: b\n", 2, "name"),
    "a priority in words": ("clusters:\n  - name: a\n    kubeconfig: b\n    priority: first\n", 4, "whole number"),
    "half a priority": ("clusters:\n  - name: a\n    kubeconfig: b\n    priority: 1.5\n", 4, "whole number"),
    "a priority beyond all": (f"clusters:\n  - name: a\n    kubeconfig: b\n    priority: {'9' * 30}\n", 4, "priority"),
    "enabled or not": ("clusters:\n  - name: a\n    kubeconfig: b\n    enabled: maybe\n", 4, "true or false"),
    "one namespace": ("clusters:\n  - name: a\n    kubeconfig: b\n    namespaces: c\n", 4, "list"),
    "no namespace": ("clusters:\n  - name: a\n    kubeconfig: b\n    namespaces: []\n", 4, "namespaces"),
    "a bad namespace": (
        "clusters:\n  - name: a\n    kubeconfig: b\n    namespaces: [Fabrik_Runs]\n",
        2,
        "'Fabrik_Runs'",
    ),
}


@pytest.mark.parametrize("case", CLUSTERS)
def test_a_broken_list_of_clusters(case: str, shell: Shell) -> None:
    text, line, part = CLUSTERS[case]
    shell.write(shell.clusters, text)
    refused(shell.run("sync"), 2, f"{shell.clusters}:{line}: ", part)
    assert not shell.cache.exists()


@pytest.mark.parametrize(
    "words",
    [
        ("start", "--foreground"),
        ("clusters", "list"),
        ("clusters", "add", "--name", "b", "--kubeconfig", "kubeconfig"),
        ("clusters", "remove", "a"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_broken_list_of_clusters_stays_as_it_is(words: tuple[str, ...], shell: Shell) -> None:
    shell.write(shell.home / "kubeconfig", kubeconfig_text())
    text = "clusters:\n  - name: a\n    kubeConfig: b\n"
    shell.write(shell.clusters, text)
    refused(shell.run(*words), 2, f"{shell.clusters}:3: ", "did you mean 'kubeconfig'?")
    assert shell.clusters.read_text() == text


def test_what_is_known_can_be_read_whatever_clusters_yaml_says(shell: Shell) -> None:
    build_cache(shell.cache, 3)
    shell.write(shell.clusters, "clusters: [\n")
    assert_three_runs_are_still_told(shell)


# ---------------------------------------------------------------- runs and clusters nobody knows


def test_a_run_that_nobody_knows(shell: Shell) -> None:
    build_cache(shell.cache, 3)
    before = hash_of(shell.cache)
    for name in ("01jk7v8x9m3qn5r2t4w6y8z0ab", "", "'; DROP TABLE runs; --", "%", "*", "\x1b[2J", "x" * 10_000):
        line = refused(shell.run("runs", "show", "--id", name), 3)
        assert "\x1b" not in line
    refused(shell.run("runs", "show", "--id", b"\xff\xfe"), 3)
    assert hash_of(shell.cache) == before


def test_a_cluster_that_nobody_knows(shell: Shell) -> None:
    build_cache(shell.cache, 3)
    refused(shell.run("runs", "list", "--cluster", "tset"), 3, "'tset'", "did you mean 'test'?")
    refused(shell.run("clusters", "remove", "test"), 3, "'test'")
    shell.write(shell.clusters, "clusters: [{name: prod, kubeconfig: x}]\n")
    refused(shell.run("clusters", "remove", "prdo"), 3, "'prdo'", "did you mean 'prod'?")


def test_an_id_that_two_clusters_know(shell: Shell) -> None:
    build_cache(shell.cache, 2)
    connection = sqlite3.connect(shell.cache)
    with connection:
        keys = [str(row[0]) for row in connection.execute("SELECT run_id FROM runs ORDER BY run_id")]
        for key in keys:
            connection.execute(
                "UPDATE runs SET id = 'nightly-1', run_id = 'nightly-1@' || ? WHERE run_id = ?", (key, key)
            )
    connection.close()
    line = refused(shell.run("runs", "show", "--id", "nightly-1"), 2, "ambiguous")
    assert all(f"nightly-1@{key}" in line for key in keys)
    shown = shell.run("runs", "show", "--id", f"nightly-1@{keys[0]}", "-o", "json")
    assert json.loads(shown.stdout)["id"] == "nightly-1"


# ---------------------------------------------------------------- the cache


def test_two_daemons_at_once(authority: Authority, serve: Serve, make_daemon: MakeDaemon) -> None:
    server = model(authority, serve)
    daemon = make_daemon(Cluster(server, access=Access(auth="token", ca="data")))
    daemon.start()
    second = daemon.cli("start", "--foreground")
    assert second.stderr.splitlines() == [second.stderr.rstrip("\n")]
    assert f"(pid {daemon.pid})" in second.stderr
    assert "already" in second.stderr
    assert (second.returncode, second.stdout) == (0, ""), "`start` when already running is done"
    synced = daemon.cli("sync")
    assert (synced.returncode, len(synced.stderr.splitlines())) == (0, 1), synced.stderr
    server.put("jobs", fabrik_objects.job(7))
    daemon.settle()
    assert len(daemon.json("runs", "list")) == 3, "the first goes on"


def test_no_cache_yet(shell: Shell) -> None:
    for words in (("runs", "list"), ("runs", "show", "--id", "x"), ("query", "SELECT 1")):
        refused(shell.run(*words), 1, str(shell.cache), "sync")
    assert not shell.cache.parent.exists(), "reading makes nothing"


def not_sqlite(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"this is my diary, not a database\n" * 400)


def flipped_page(path: Path) -> None:
    build_cache(path, 500)
    data = bytearray(path.read_bytes())
    data[4096:8192] = b"\xa5" * 4096
    data[-4096:] = b"\xa5" * 4096
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    build_cache(path, 500)
    path.write_bytes(path.read_bytes()[: 4096 * 3 + 100])


@pytest.mark.parametrize("spoil", [not_sqlite, flipped_page, cut_short], ids=lambda spoil: spoil.__name__)
def test_a_cache_that_is_damaged(
    spoil: Callable[[Path], None], shell: Shell, authority: Authority, serve: Serve
) -> None:
    spoil(shell.cache)
    before = hash_of(shell.cache)
    for words in (("runs", "list"), ("query", "SELECT count(*), max(spec_id) FROM runs")):
        refused(shell.run(*words), 1, str(shell.cache))
    assert hash_of(shell.cache) == before, "reading changes nothing"
    server = model(authority, serve)
    configure(shell, server.kubeconfig(shell.home / "k", Access(auth="token", ca="data")), answer=30)
    done = shell.run("sync")
    assert (done.code, done.complaints) == (0, []), done
    aside = [
        path
        for path in shell.cache.parent.iterdir()
        if "damaged" in path.name and not path.name.endswith(("-wal", "-shm"))
    ]
    assert [hash_of(path) for path in aside] == [before], "it is set aside whole"
    warnings = [line for line in done.logged if " WARNING " in line]
    assert len(warnings) == 1
    assert str(aside[0]) in warnings[0]
    assert len(json.loads(shell.run("runs", "list", "-o", "json").stdout)) == 2, "and made anew from the cluster"


def test_a_cache_of_another_program(shell: Shell, authority: Authority, serve: Serve) -> None:
    shell.cache.parent.mkdir(parents=True)
    connection = sqlite3.connect(shell.cache)
    with connection:
        connection.execute("CREATE TABLE runs (kilometres INTEGER)")
        connection.execute("INSERT INTO runs VALUES (42)")
    connection.close()
    before = hash_of(shell.cache)
    refused(shell.run("runs", "list"), 1, str(shell.cache))
    server = model(authority, serve)
    configure(shell, server.kubeconfig(shell.home / "k", Access(auth="token", ca="data")))
    refused(shell.run("sync"), 1, str(shell.cache))
    assert hash_of(shell.cache) == before, "it is not ours to change"


def test_a_cache_of_a_newer_version(shell: Shell, authority: Authority, serve: Serve) -> None:
    build_cache(shell.cache, 3)
    connection = sqlite3.connect(shell.cache)
    with connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'schema_version'")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    before = hash_of(shell.cache)
    server = model(authority, serve)
    configure(shell, server.kubeconfig(shell.home / "k", Access(auth="token", ca="data")))
    for words in (("runs", "list"), ("query", "SELECT 1"), ("sync",), ("start", "--foreground")):
        refused(shell.run(*words), 1, str(shell.cache), "schema")
    assert hash_of(shell.cache) == before


def test_a_cache_that_is_a_folder(shell: Shell, authority: Authority, serve: Serve) -> None:
    shell.cache.mkdir(parents=True)
    server = model(authority, serve)
    configure(shell, server.kubeconfig(shell.home / "k", Access(auth="token", ca="data")))
    for words in (("runs", "list"), ("sync",), ("start", "--foreground")):
        refused(shell.run(*words), 1, str(shell.cache))


@pytest.mark.parametrize("words", FOLLOWING, ids=" ".join)
def test_a_cache_folder_that_may_not_be_written(words: tuple[str, ...], nobody: Shell) -> None:
    build_cache(nobody.cache, 3)
    configure(nobody, nobody.write(nobody.home / "k", kubeconfig_text()))
    give(nobody, nobody.home)
    nobody.cache.parent.chmod(0o500)
    before = hash_of(nobody.cache)
    refused(nobody.run(*words), 1, str(nobody.cache.parent), "--cache")
    done = nobody.run("runs", "list", "-o", "json")
    assert (done.code, len(json.loads(done.stdout))) == (0, 3), "what is known can be read all the same"
    assert hash_of(nobody.cache) == before
    refused(nobody.run(*words, "--cache", str(nobody.cache.parent / "deeper" / "cache.db")), 1, "deeper", "--cache")


def test_a_cache_that_may_not_be_written_or_read(nobody: Shell) -> None:
    build_cache(nobody.cache, 3)
    configure(nobody, nobody.write(nobody.home / "k", kubeconfig_text()))
    give(nobody, nobody.home)
    nobody.cache.chmod(0o400)
    refused(nobody.run("sync"), 1, str(nobody.cache))
    nobody.cache.chmod(0)
    refused(nobody.run("runs", "list"), 1, str(nobody.cache))
    refused(nobody.run("sync"), 1, str(nobody.cache))
    assert sorted(path.name for path in nobody.cache.parent.iterdir() if "damaged" in path.name) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no disk that is always full")  # noqa: PTH110
def test_an_output_that_takes_nothing(shell: Shell) -> None:
    build_cache(shell.cache, 300)
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        for words in (("runs", "list"), ("query", "SELECT 1"), ("--help",), ("--version",), ("runs", "list", "--help")):
            done: Done = shell.run(*words, stdout=full.fileno())
            told = [line for line in done.complaints if "as of" not in line]
            assert (done.code, len(told)) == (1, 1), done
            assert "No space left" in told[0]
