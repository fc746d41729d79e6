"""One scenario through the built executable under every CPython from 3.9 on that this machine has."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from expectations import relapses, run_differences, shown_runs
from fakes import Access, RecordedServer
from harness import Cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fakes import Authority, KubernetesApi
    from harness import Daemon

    Serve = Callable[[KubernetesApi], None]
    MakeDaemon = Callable[..., Daemon]

SCENARIO: Final = "01-happy-path"
ASK: Final = """
import platform, sys
sys.exit(platform.python_implementation() != "CPython" or sys.version_info < (3, 9) or print(platform.python_version()))
"""


def interpreters() -> Iterator[tuple[str, str]]:
    """Yield version and path of every CPython that can run the program, each version once."""
    paths = [*sorted(Path.home().glob(".pyenv/versions/*/bin/python3")), Path("/usr/bin/python3")]
    found = {platform.python_version(): sys.executable}
    for path in paths:
        if path.exists():
            done = subprocess.run([str(path), "-c", ASK], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                found.setdefault(done.stdout.strip(), str(path))
    yield from sorted(found.items(), key=lambda item: [int(part) for part in item[0].split(".") if part.isdigit()])


@pytest.mark.parametrize(("version", "python"), interpreters(), ids=lambda value: value if value[0].isdigit() else "")
def test_a_scenario(version: str, python: str, authority: Authority, serve: Serve, make_daemon: MakeDaemon) -> None:
    server = RecordedServer(SCENARIO, authority, token="a-bearer-token")
    serve(server)
    daemon = make_daemon(
        Cluster(server, namespaces=[server.recording.meta["namespace"]], access=Access("token", "data"))
    )
    daemon.python = python
    daemon.start()
    server.release_all()
    daemon.settle()
    assert differences(daemon, server) == [], version
    daemon.stop()
    server.stop()
    expected = [{"n": len(server.expect["final"]["runs"])}]
    assert daemon.json("query", "SELECT count(*) AS n FROM runs") == expected, f"{version}, offline"
    assert "Traceback" not in daemon.log
    assert "Warning:" not in daemon.log, "deprecations and unclosed files"


def differences(daemon: Daemon, server: RecordedServer) -> list[str]:
    """Return in what the executable's answers differ from the expected rows."""
    shown = shown_runs(daemon)
    problems = run_differences(server.expect["final"]["runs"], shown, server.recording.meta["namespace"])
    return problems + [problem for row in shown for problem in relapses(row)]
