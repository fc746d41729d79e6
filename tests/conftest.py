from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fakes import Authority
from harness import Cluster, Daemon
from hosts import Host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fakes import KubernetesApi

ROOT = Path(__file__).parent.parent

# A shell that starts the tests in the background has them ignore it, and every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def executable() -> Path:
    """Return the path of the built executable, which must be no older than what it is made of."""
    made = ROOT / "dist" / "fabrik-daemon"
    templates = [path for path in (ROOT / "service-templates").rglob("*") if path.is_file()]
    for source in [ROOT / "fabrik_daemon.py", ROOT / "requirements.lock", ROOT / "build.sh", *templates]:
        if not made.exists() or made.stat().st_mtime < source.stat().st_mtime:
            pytest.fail(f"run ./build.sh first: {made} is missing or older than {source.name}", pytrace=False)
    return made


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder where the executable unpacks itself once for all tests."""
    return tmp_path_factory.mktemp("shiv")


@pytest.fixture
def home(tmp_path: Path, unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty home and an environment that leads nowhere else."""
    for name in list(os.environ):
        if name.startswith(("XDG_", "FABRIK_", "SHIV_")) or name == "KUBECONFIG":
            monkeypatch.delenv(name)
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("SHIV_ROOT", str(unpacked))
    return folder


@pytest.fixture(scope="session")
def authority() -> Authority:
    """Return the certificate authority that test clusters use."""
    return Authority()


@pytest.fixture
def serve() -> Iterator[Callable[[KubernetesApi], None]]:
    """Start servers; at the end stop them, and fail if anything but GET was asked of one."""
    servers: list[KubernetesApi] = []

    def start(server: KubernetesApi) -> None:
        server.start()
        servers.append(server)

    yield start
    for server in servers:
        server.stop()
    for server in servers:
        assert server.violations == []
        assert server.crashes == []


@pytest.fixture
def make_daemon(executable: Path, unpacked: Path, tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Make daemons (not started yet) that follow these clusters; at the end none is left."""
    daemons: list[Daemon] = []

    def make(*clusters: Cluster, **timing: object) -> Daemon:
        root = tmp_path / f"daemon{len(daemons)}"
        daemons.append(Daemon(executable, unpacked, root, clusters, timing=timing))
        return daemons[-1]

    yield make
    for daemon in daemons:
        daemon.kill()


@pytest.fixture
def make_host(executable: Path, unpacked: Path, tmp_path: Path) -> Iterator[Callable[..., Host]]:
    """Make hosts whose daemons (not started yet) follow these clusters; at the end no daemon is left."""
    with contextlib.ExitStack() as hosts:
        made: list[Host] = []

        def make(*clusters: Cluster, **timing: object) -> Host:
            root = tmp_path / f"host{len(made)}"
            made.append(hosts.enter_context(Host(executable, unpacked, root, clusters, timing=timing)))
            return made[-1]

        yield make
