"""The command line of the built executable: its commands and their help, the spec's spellings, where answers go."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import uuid
from typing import TYPE_CHECKING, Final

import fabrik_objects
import pytest
from commands import Shell, build_cache, refused
from fakes import Access, Authority, ModelServer
from harness import wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fabrik_daemon import COMMANDS, Command, UsageError, make_parser, parse_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fakes import KubernetesApi

    Serve = Callable[[KubernetesApi], None]

TOKEN: Final = "a-bearer-token"
BY_TOKEN: Final = Access(auth="token", ca="data")
KUBECONFIG: Final = """
current-context: one
contexts:
- {name: one, context: {cluster: c, user: u}}
- {name: two, context: {cluster: c, user: u}}
clusters: [{name: c, cluster: {server: "https://127.0.0.1:1"}}]
users: [{name: u, user: {}}]
"""


@pytest.fixture
def shell(executable: Path, unpacked: Path, tmp_path: Path) -> Shell:
    return Shell(executable, unpacked, tmp_path / "user")


def model(authority: Authority, serve: Serve, runs: int = 2) -> ModelServer:
    """Start a server that has some runs."""
    server = ModelServer(authority, token=TOKEN)
    server.uid = str(uuid.uuid4())  # two of one uid would be one cluster
    for number in range(runs):
        server.put("jobs", fabrik_objects.job(number))
    serve(server)
    return server


def configure(shell: Shell, **servers: ModelServer) -> None:
    """Have these clusters followed, in this order of priority."""
    entries = []
    for priority, (name, server) in enumerate(servers.items()):
        path = server.kubeconfig(shell.home / f"{name}.kubeconfig", BY_TOKEN)
        entries.append({"name": name, "kubeconfig": str(path), "priority": priority})
    shell.write(shell.clusters, json.dumps({"clusters": entries}))
    shell.write(shell.config, json.dumps({"timing": {"connect": 1, "resolve": 1, "sync": 20, "stop": 1}}))


# ---------------------------------------------------------------- help and mistakes


def test_help(shell: Shell) -> None:
    texts = {shell.run(*words).stdout for words in (("--help",), ("-h",), ("help",), ("daemon", "--help"))}
    assert len(texts) == 1
    text = texts.pop()
    for command in COMMANDS:
        assert re.search(rf"^  {command.words} +\S", text, re.MULTILINE)
    bare = shell.run()
    assert (bare.code, bare.stderr) == (2, "") or refused(bare, 2)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.words)
def test_help_of_a_command(command: object, shell: Shell) -> None:
    words = getattr(command, "words")  # noqa: B009 - pytest hands it over without its type
    for flag in ("--help", "-h"):
        done = shell.run(*words.split(), flag)
        assert (done.code, done.stderr) == (0, "")
        assert f"usage: fabrik-daemon {words}" in done.stdout
        assert re.search(rf"^examples:\n  fabrik-daemon {words}", done.stdout, re.MULTILINE), done.stdout
    assert shell.run("daemon", *words.split(), "--help").stdout == done.stdout


@pytest.mark.parametrize("group", sorted({command.words.split()[0] for command in COMMANDS if " " in command.words}))
def test_help_of_a_group(group: str, shell: Shell) -> None:
    done = shell.run(group, "--help")
    assert (done.code, done.stderr) == (0, "")
    for command in COMMANDS:
        assert (f"  {command.words} " in done.stdout) == command.words.startswith(f"{group} ")


MISTAKES: Final = {
    "strat": "did you mean 'start'?",
    "runs lst": "did you mean 'list'?",
    "runs": "list",
    "clusters ad": "did you mean 'add'?",
    "xyzzy": "choose from",
    "daemon strat": "did you mean 'start'?",
    "runs list --clustr test": "did you mean '--cluster'?",
    "runs list --limt=5": "did you mean '--limit'?",
    "runs list --statsu running": "did you mean '--status'?",
    "runs list --status runnig": "runnig",
    "runs list --limit many": "many",
    "runs list --limit 0": "'0'",
    "runs list --limit -1": "-1",
    "runs list --limit": "--limit",
    "runs list -o yml": "yml",
    "runs list extra": "extra",
    "runs show": "@latest",
    "runs show a --id b": "name one run",
    "runs list --since soon": "--since: 'soon' is no time",
    "runs list --max-age soon": "soon",
    "runs list --sort-by statsu": "did you mean 'status'?",
    "schedules list --status failed": "--status",
    "clusters add --name x": "--kubeconfig",
    "clusters add --name x --kubeconfig y --priority high": "high",
    "clusters remove": "NAME",
    "sync --fast": "--fast",
    "--config": "--config",
    "--cofnig x runs list": "did you mean '--config'?",
    "--config x": "",
    "runs list --out json": "--out",
    "\x1b[2J": "",
}


def flags_of(command: Command) -> dict[str, bool]:
    """Return a command's flags, and whether each takes a value."""
    help_text = make_parser(command).format_help()
    return {flag: bool(value) for flag, value in re.findall(r"(?<![\w-])(--?[a-z-]+)(?: ([A-Z{]))?", help_text)}


VALUES: Final = (
    "1",
    "0",
    "5m",
    "json",
    "table",
    "failed",
    "bash",
    "deployment",
    "prod",
    "A=1",
    "-1",
    "-x",
    "",
    "a=b",
    "-",
)


@st.composite
def lines(draw: st.DrawFn) -> tuple[Command, list[str]]:
    """Draw a command and words behind it, most of them right. Python 3.9's argparse breaks at `--reverse=`."""
    command = draw(st.sampled_from(COMMANDS))
    flags = flags_of(command)
    words: list[str] = []
    for _ in range(draw(st.integers(0, 4))):
        flag, value = draw(st.sampled_from(sorted(flags))), draw(st.sampled_from(VALUES))
        usual = [flag, value] if flags[flag] else [flag]
        words += draw(st.sampled_from((usual, usual, [f"{flag}={value or 7}"], [flag], [value], [flag[:-1]], ["--"])))
    return command, words


def said(read: Callable[[], object]) -> object:
    """Return what was read, or what was said of a mistake."""
    try:
        return vars(read())
    except UsageError as error:
        return str(error)


@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow])
@given(lines())
def test_plain_words_say_what_argparse_reads_in_them(line: tuple[Command, list[str]]) -> None:
    command, words = line
    assert said(lambda: parse_arguments(command, words)) == said(lambda: make_parser(command).parse_args(words))


def test_a_list_imports_only_what_it_needs(shell: Shell) -> None:
    build_cache(shell.cache, 10)
    shell.run("--version")  # the first start unpacks the executable
    for words in ("runs list --limit 5", "warnings list --since=1d -o jsonl --cluster test"):
        done = shell.run(*words.split(), env={"PYTHONPROFILEIMPORTTIME": "1"})
        assert done.code == 0, done.stderr
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "sqlite3" in imported
        assert not imported & {"argparse", "gettext", "locale", "typing", "dataclasses", "yaml", "socket", "logging"}


@pytest.mark.parametrize("words", MISTAKES, ids=ascii)
def test_a_mistake_is_told(words: str, shell: Shell) -> None:
    line = refused(shell.run(*words.split()), 2, MISTAKES[words])
    assert line.isprintable()


def test_a_word_that_is_no_text(shell: Shell) -> None:
    refused(shell.run(b"\xff\xfe"), 2)
    refused(shell.run("runs", b"\xff"), 2)


# ---------------------------------------------------------------- the spec's spellings


@pytest.mark.parametrize("name", ["fabrik", "fabrik-daemon", "anything"])
def test_a_link_to_the_executable(name: str, shell: Shell) -> None:
    build_cache(shell.cache, 3)
    link = shell.home / name
    link.symlink_to(shell.executable)
    for words in (("runs", "list"), ("daemon", "runs", "list")):
        done = shell.run(*words, "-o", "json", program=str(link))
        assert (done.code, len(json.loads(done.stdout))) == (0, 3), done
    done = shell.run("daemon", "query", "SELECT count(*) AS n FROM runs", "-o", "json", program=str(link))
    assert json.loads(done.stdout) == [{"n": 3}]
    assert shell.run("--version", program=str(link)).stdout == shell.run("--version").stdout


def test_the_spec_s_daemon(shell: Shell, authority: Authority, serve: Serve) -> None:
    server = model(authority, serve)
    configure(shell, test=server)
    link = shell.home / "fabrik"
    link.symlink_to(shell.executable)
    config = shell.config.rename(shell.config.with_name("other.yaml"))
    with shell.start("daemon", "start", "--foreground", "--config", str(config), program=str(link)) as daemon:
        try:
            wait_until(lambda: len(server.watches) == 5, 30, "every watch is open")
            wait_until(lambda: synced_watches(shell) == 5, 30, "every list is in the cache")
            listed = json.loads(shell.run("daemon", "clusters", "list", "-o", "json", program=str(link)).stdout)
            done = shell.run("runs", "list", "-o", "json", program=str(link))
        finally:
            daemon.send_signal(signal.SIGINT)
            _, errors = daemon.communicate()
    assert daemon.returncode in {0, 130}, errors
    assert [(row["name"], row["connected"], row["server"]) for row in listed] == [("test", True, server.url)]
    assert len(json.loads(done.stdout)) == 2
    assert "not connected" not in done.stderr


def synced_watches(shell: Shell) -> int:
    """Return how many lists are in the cache, by asking as a user does."""
    done = shell.run("query", "SELECT count(*) AS n FROM watches WHERE synced_at IS NOT NULL", "-o", "json")
    return int(json.loads(done.stdout)[0]["n"]) if done.code == 0 else 0


@pytest.mark.parametrize(
    "add", [("clusters", "add"), ("daemon", "clusters", "add"), ("daemon", "add-cluster")], ids=" ".join
)
def test_clusters_round_trip(add: tuple[str, ...], shell: Shell) -> None:
    shell.write(shell.home / "kubeconfig", KUBECONFIG)
    for name, priority in (("late", "20"), ("early", "-5"), ("middle", "10"), ("also-middle", "10")):
        done = shell.run(*add, "--name", name, "--kubeconfig", "kubeconfig", "--priority", priority)
        assert (done.code, done.stderr, len(done.stdout.splitlines())) == (0, "", 1)
    more = ("--context", "two", "--namespace", "team-a", "--namespace", "team-b", "--label-selector", "a=b")
    assert shell.run(*add, "--name", "last", "--kubeconfig", "~/kubeconfig", *more).code == 0
    assert shell.clusters.stat().st_mode & 0o077 == 0
    rows = json.loads(shell.run("daemon", "clusters", "list", "-o", "json").stdout)
    assert [row["name"] for row in rows] == ["early", "also-middle", "middle", "late", "last"]
    for row in rows:
        assert {"name", "server", "priority", "connected", "error"} <= set(row)
        assert (row["connected"], row["error"]) == (False, None)
    table = shell.run("clusters", "list").stdout.splitlines()
    assert [line.split()[0] for line in table[1:]] == [row["name"] for row in rows]
    text = shell.clusters.read_text()
    for part in ("context: two", "- team-a", "labelSelector: a=b", f"kubeconfig: {shell.home}/kubeconfig"):
        assert part in text
    for row in rows:
        assert shell.run("daemon", "clusters", "remove", row["name"]).code == 0
    assert json.loads(shell.run("clusters", "list", "-o", "json").stdout) == []


def test_a_cluster_that_cannot_be_added(shell: Shell) -> None:
    shell.write(shell.home / "kubeconfig", KUBECONFIG)
    shell.write(shell.home / "broken", "contexts: [\n")
    add = ("clusters", "add", "--name", "test", "--kubeconfig")
    assert shell.run(*add, "kubeconfig").code == 0
    before = shell.clusters.read_text()
    refused(shell.run(*add, "kubeconfig"), 2, "'test'", str(shell.clusters))
    other = ("clusters", "add", "--name", "other", "--kubeconfig")
    refused(shell.run(*other, "nowhere"), 2, f"{shell.home}/nowhere", "o such file")
    refused(shell.run(*other, "broken"), 2, f"{shell.home}/broken:2: ")
    refused(shell.run(*other, "kubeconfig", "--context", "tow"), 2, "'tow'", "did you mean 'two'?")
    refused(shell.run(*other, "kubeconfig", "--namespace", "Team A"), 2, "'Team A'")
    refused(shell.run("clusters", "add", "--name", "a/b", "--kubeconfig", "kubeconfig"), 2, "'a/b'")
    assert shell.clusters.read_text() == before


def test_a_cluster_is_found_in_the_usual_kubeconfig(shell: Shell) -> None:
    text = KUBECONFIG.replace("name: two, context: {", "name: k3d-fabrik, context: {")
    shell.write(shell.home / ".kube" / "config", text)
    rows = json.loads(shell.run("clusters", "list", "-o", "json").stdout)
    assert [row["name"] for row in rows] == ["k3d-fabrik"]
    elsewhere = shell.write(shell.home / "elsewhere", text.replace("k3d-fabrik", "fabrik-prod"))
    done = shell.run("clusters", "list", "-o", "json", env={"KUBECONFIG": f"/nowhere:{elsewhere}"})
    assert [row["name"] for row in json.loads(done.stdout)] == ["fabrik-prod"]


# ---------------------------------------------------------------- sync, and answers without a daemon


def test_exit_codes_of_sync(shell: Shell, authority: Authority, serve: Serve) -> None:
    refused(shell.run("sync"), 2, "no cluster")
    here, there = model(authority, serve), model(authority, serve, runs=0)
    there.put("jobs", fabrik_objects.job(9))
    configure(shell, here=here, there=there)
    done = shell.run("sync")
    assert (done.code, done.complaints, done.stdout) == (0, [], "")
    there.stop()
    here.put("jobs", fabrik_objects.job(5))
    done = shell.run("sync")
    assert (done.code, len(done.complaints)) == (5, 1), done
    assert "there: " in done.complaints[0]
    rows = json.loads(shell.run("runs", "list", "-o", "json").stdout)
    assert sorted(row["cluster"] for row in rows) == ["here", "here", "here", "there"]


def test_one_right_that_is_missing(shell: Shell, authority: Authority, serve: Serve) -> None:
    server = model(authority, serve)
    server.refuse("events")
    configure(shell, test=server)
    done = shell.run("sync")
    assert (done.code, len(done.complaints)) == (0, 1), done
    assert "events" in done.complaints[0]
    assert len(json.loads(shell.run("runs", "list", "-o", "json").stdout)) == 2


def test_answers_without_a_daemon_say_how_old_they_are(shell: Shell, authority: Authority, serve: Serve) -> None:
    server = model(authority, serve)
    configure(shell, test=server)
    assert shell.run("sync").code == 0
    server.stop()
    run = json.loads(shell.run("runs", "list", "-o", "json").stdout)[0]["run_id"]
    for words in (
        ("runs", "list"),
        ("runs", "show", "--id", run),
        ("query", "SELECT 1"),
        ("runs", "list", "-o", "json"),
    ):
        done = shell.run(*words)
        assert done.code == 0
        assert re.fullmatch(r"fabrik-daemon: .*\btest:? as of \d+s ago, not connected\n", done.stderr), done.stderr
        assert "as of" not in done.stdout


def test_nothing_was_ever_synced(shell: Shell, authority: Authority, serve: Serve) -> None:
    server = model(authority, serve)
    configure(shell, test=server)
    server.stop()
    assert shell.run("sync").code == 5
    for words in (("runs", "list"), ("runs", "list", "-o", "json"), ("query", "SELECT * FROM runs")):
        refused(shell.run(*words), 1, "not yet synced", "test")


def test_one_of_two_was_never_synced(shell: Shell, authority: Authority, serve: Serve) -> None:
    here, there = model(authority, serve), model(authority, serve)
    configure(shell, here=here, there=there)
    there.stop()
    assert shell.run("sync").code == 5
    done = shell.run("runs", "list", "-o", "json")
    assert (done.code, len(json.loads(done.stdout))) == (0, 2)
    assert re.search(r"\bthere:? not yet synced", done.stderr)
    refused(shell.run("runs", "list", "--cluster", "there"), 1, "not yet synced", "there")


# ---------------------------------------------------------------- where answers go


@contextlib.contextmanager
def closed_pipe() -> Iterator[int]:
    """Yield the end of a pipe that nobody reads."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        yield write_end
    finally:
        os.close(write_end)


@pytest.mark.parametrize(
    "words",
    [
        ("runs", "list"),
        ("runs", "list", "-o", "json"),
        ("query", "SELECT 1"),
        ("clusters", "list"),
        ("--help",),
        ("--version",),
        ("runs", "list", "--help"),
    ],
    ids=" ".join,
)
def test_a_pipe_that_nobody_reads(words: tuple[str, ...], shell: Shell) -> None:
    build_cache(shell.cache, 1000)
    with closed_pipe() as pipe:
        done = shell.run(*words, stdout=pipe)
    assert [line for line in done.stderr.splitlines() if "as of" not in line] == []
    assert done.code in {0, 141}


def test_a_pipe_whose_reader_has_enough(shell: Shell) -> None:
    build_cache(shell.cache, 5000)
    with shell.start("runs", "list", "-o", "json") as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "[\n"
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode in {0, 141}, len(errors.splitlines())) == (True, 1), errors


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_shell_that_closed_a_stream(closed: str, shell: Shell) -> None:
    build_cache(shell.cache, 3)
    line = f'exec "$0" "$1" runs list {closed}'
    done = subprocess.run(
        ["/bin/sh", "-c", line, shell.python, str(shell.executable)],
        env=shell.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if ">&-" not in closed:
        assert len(done.stdout.splitlines()) == 4


def test_an_output_that_cannot_write_every_letter(shell: Shell) -> None:
    build_cache(shell.cache, 1)
    done = shell.run("query", "SELECT 'ü→😀' AS a", env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert done.code == 0, done
    assert "Traceback" not in done.stderr
