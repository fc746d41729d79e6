"""One scenario through the built executable under every CPython from 3.9 on that this machine has.

Each has an empty home to unpack itself into, and no network but loopback where this system lets us take it away.
"""

from __future__ import annotations

import ctypes
import fcntl
import platform
import socket
import struct
import subprocess
import sys
import threading
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
    from hosts import Host

    Serve = Callable[[KubernetesApi], None]
    MakeHost = Callable[..., Host]

CLONE_NEWNET: Final = 0x40000000
SIOCSIFFLAGS: Final = 0x8914
IFF_UP: Final = 1
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
def test_a_scenario(version: str, python: str, authority: Authority, serve: Serve, make_host: MakeHost) -> None:
    without_network(lambda: play(version, python, authority, serve, make_host))


def play(version: str, python: str, authority: Authority, serve: Serve, make_host: MakeHost) -> None:
    """Follow a recorded scenario to its end, then ask the cache alone."""
    server = RecordedServer(SCENARIO, authority, token="a-bearer-token")
    serve(server)
    host = make_host(Cluster(server, namespaces=[server.recording.meta["namespace"]], access=Access("token", "data")))
    host.python = python
    del host.environment["SHIV_ROOT"]
    home = Path(host.environment["HOME"])
    assert list(home.iterdir()) == []
    host.start()
    server.release_all()
    host.settle()
    assert differences(host, server) == [], version
    host.stop()
    server.stop()
    expected = [{"n": len(server.expect["final"]["runs"])}]
    assert host.json("query", "SELECT count(*) AS n FROM runs") == expected, f"{version}, offline"
    assert "Traceback" not in host.log
    assert "Warning:" not in host.log, "deprecations and unclosed files"
    assert [path.name for path in home.iterdir()] == [".shiv"], "it was unpacked here, and needs nothing else"


def without_network(work: Callable[[], None]) -> None:
    """Do something in a network of its own that has loopback only: threads and processes started meanwhile share it.

    Where this user may not make one, it is done in the network that there is.
    """
    failures: list[BaseException] = []

    def isolated() -> None:
        try:
            if leave_network():
                with socket.socket() as sock, pytest.raises(OSError, match="unreachable"):
                    sock.connect(("192.0.2.1", 443))
            work()
        except BaseException as failure:  # noqa: BLE001 - it is raised again where pytest sees it
            failures.append(failure)

    thread = threading.Thread(target=isolated)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def leave_network() -> bool:
    """Put the calling thread into a new network namespace with loopback up; tell whether that was possible."""
    if sys.platform != "linux":
        return False
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    return True


def differences(daemon: Daemon, server: RecordedServer) -> list[str]:
    """Return in what the executable's answers differ from the expected rows."""
    shown = shown_runs(daemon)
    problems = run_differences(server.expect["final"]["runs"], shown, server.recording.meta["namespace"])
    return problems + [problem for row in shown for problem in relapses(row)]
