"""Installing as a service: what is written, what the host's service manager is told, and whether it takes it."""

from __future__ import annotations

import grp
import json
import os
import plistlib
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from commands import NOBODY, Shell, refused, unprivileged_shell
from fabrik_objects import job
from fakes import Access, ModelServer
from harness import Cluster, wait_until
from systemd import Systemd

import fabrik_daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fakes import Authority, KubernetesApi
    from hosts import Host

    Serve = Callable[[KubernetesApi], None]
    MakeHost = Callable[..., Host]

ROOT: Final = Path(__file__).parent.parent
TEMPLATES: Final = ROOT / "service-templates"
EXPOSURE_MAX: Final = 2.5
PLUGIN_GROUP: Final = 1  # daemon's: every system has it, and nobody is in it
needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
needs_root = pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="only root can be others")

# It notes how it was called; while `running` is there, the service is active, and while `broken` is, all fails.
STUB: Final = """#!/bin/sh
echo "$(basename "$0") $*" >> "{log}"
case "$*" in
  *is-active*|*print*|*status*) test -e "{folder}/running"; exit ;;
esac
test ! -e "{folder}/broken" || {{ echo "Failed to connect to bus: No medium found" >&2; exit 1; }}
"""


class Managed(Shell):
    """A user's shell on a host whose service managers only note what they are told."""

    def __init__(self, executable: Path, unpacked: Path, folder: Path) -> None:
        super().__init__(executable, unpacked, folder / "home")
        self.folder = folder
        self._log = folder / "calls"
        stubs = folder / "stubs"
        stubs.mkdir()
        for name in ("systemctl", "launchctl", "rc-update", "rc-service", "systemd-sysusers"):
            stub = stubs / name
            stub.write_text(STUB.format(log=self._log, folder=folder))
            stub.chmod(0o755)
        self.environment["PATH"] = f"{stubs}:{self.environment['PATH']}"

    @property
    def calls(self) -> list[str]:
        """What the managers were told since the last look."""
        if not self._log.exists():
            return []
        calls = self._log.read_text().splitlines()
        self._log.unlink()
        return calls

    @property
    def unit(self) -> Path:
        """The user's unit."""
        return self.home / ".config" / "systemd" / "user" / "fabrik-daemon.service"

    @property
    def program(self) -> Path:
        """The executable's stable place."""
        return self.home / ".local" / "bin" / "fabrik-daemon"

    def install(self, *words: str, manager: str = "systemd", code: int = 0) -> list[str]:
        """Run install-service; return the lines that it printed."""
        done = self.run("install-service", "--manager", manager, *words)
        assert done.code == code, done.stderr
        return done.stdout.splitlines()


@pytest.fixture
def managed(executable: Path, unpacked: Path, tmp_path: Path) -> Managed:
    """Return a user's shell with an empty home and stand-ins for the service managers."""
    return Managed(executable, unpacked, tmp_path)


# ---------------------------------------------------------------- systemd


def test_installing_for_the_user(managed: Managed) -> None:
    lines = managed.install()
    assert managed.calls == ["systemctl --user daemon-reload", "systemctl --user enable fabrik-daemon.service"]
    assert managed.program.read_bytes() == managed.executable.read_bytes()
    assert stat.S_IMODE(managed.program.stat().st_mode) == 0o755
    assert stat.S_IMODE(managed.unit.stat().st_mode) == 0o600
    assert any("loginctl enable-linger" in line for line in lines)
    assert any("systemctl --user restart fabrik-daemon.service" in line for line in lines), "how to start it now"
    assert managed.unit.read_text() == managed.run("install-service", "--manager", "systemd", "--print").stdout


def test_installing_again_changes_nothing_and_restarts_nothing(managed: Managed) -> None:
    managed.install("--now")
    assert managed.calls[-1] == "systemctl --user restart fabrik-daemon.service"
    (managed.folder / "running").touch()
    before = {path: path.stat() for path in (managed.unit, managed.program)}
    lines = managed.install("--now")
    assert managed.calls[-2:] == [
        "systemctl --user is-active --quiet fabrik-daemon.service",
        "systemctl --user start fabrik-daemon.service",
    ]
    assert [line for line in lines if line.startswith("wrote")] == []
    assert {path: path.stat() for path in before} == before


def test_an_upgrade_takes_the_old_one_s_place_and_restarts(managed: Managed) -> None:
    managed.install("--now")
    (managed.folder / "running").touch()
    managed.program.write_bytes(b"an older version")
    inode = managed.program.stat().st_ino
    lines = managed.install("--now")
    assert managed.program.read_bytes() == managed.executable.read_bytes()
    assert managed.program.stat().st_ino != inode, "the one that runs keeps its file"
    assert f"wrote {managed.program}" in lines
    assert managed.calls[-1] == "systemctl --user restart fabrik-daemon.service"
    assert [path.name for path in managed.program.parent.iterdir()] == ["fabrik-daemon"]


def test_installing_from_its_own_place(managed: Managed) -> None:
    managed.install()
    done = managed.run("install-service", "--manager", "systemd", program=str(managed.program))
    assert done.code == 0
    assert f"{managed.program}" not in done.stdout


def test_a_dry_run_tells_every_step_and_does_none(managed: Managed) -> None:
    lines = managed.install("--dry-run", "--now", "--on-demand")
    for step in (
        f"would write {managed.program}",
        f"would write {managed.unit}",
        f"would write {managed.unit.with_suffix('.socket')}",
        "would run systemctl --user daemon-reload",
        "would run systemctl --user enable fabrik-daemon.socket",
        "would run systemctl --user restart fabrik-daemon.socket",
    ):
        assert step in lines
    assert [path.name for path in managed.home.iterdir()] == []
    assert managed.calls == ["systemctl --user is-active --quiet fabrik-daemon.socket"], "it has only asked"


def test_a_manager_that_refuses_is_told_in_its_words(managed: Managed) -> None:
    (managed.folder / "broken").touch()
    done = managed.run("install-service", "--manager", "systemd")
    assert done.code == 1
    assert done.stderr.splitlines()[-1] == (
        "fabrik-daemon: systemctl --user daemon-reload: Failed to connect to bus: No medium found"
    )


def test_uninstalling_leaves_settings_and_executable(managed: Managed) -> None:
    managed.write(managed.clusters, "clusters: []")
    managed.install("--on-demand")
    assert managed.calls
    done = managed.run("uninstall-service", "--manager", "systemd")
    assert done.code == 0, done.stderr
    assert managed.calls == [
        "systemctl --user disable --now fabrik-daemon.socket fabrik-daemon.service",
        "systemctl --user daemon-reload",
    ]
    assert list(managed.unit.parent.iterdir()) == []
    assert managed.program.exists()
    assert managed.clusters.exists()
    again = managed.run("uninstall-service", "--manager", "systemd")
    assert (again.code, again.stdout, managed.calls) == (0, "nothing is installed\n", [])


def test_the_unit_takes_along_what_plugins_need(managed: Managed) -> None:
    managed.environment.update(
        PATH=f"{managed.environment['PATH']}:.:relative:/opt/my plugins/bin",
        KUBECONFIG="config-here:/etc/kube/100%",
        HTTPS_PROXY='http://me:"p$a%s\\s"@proxy:3128',
        no_proxy="10.0.0.0/8",
        AWS_PROFILE="prod",
        AWS_SECRET_ACCESS_KEY="a secret",
    )
    managed.install("--env", "EXTRA=1 2")
    environment = unit_environment(managed.unit.read_text())
    assert environment["PATH"].endswith(":/opt/my plugins/bin")
    assert ":.:" not in environment["PATH"]
    assert "relative" not in environment["PATH"]
    assert environment["KUBECONFIG"] == f"{managed.home}/config-here:/etc/kube/100%"
    assert environment["HTTPS_PROXY"] == 'http://me:"p$a%s\\s"@proxy:3128'
    assert (environment["no_proxy"], environment["AWS_PROFILE"], environment["EXTRA"]) == ("10.0.0.0/8", "prod", "1 2")
    assert environment["FABRIK_CONFIG"] == str(managed.config)
    assert "AWS_SECRET_ACCESS_KEY" not in environment
    command = unit_command(managed.unit.read_text())
    assert Path(command[0]).is_absolute()
    assert command[1:] == [str(managed.program), "start", "--foreground"]


def test_an_environment_that_no_unit_can_hold(managed: Managed) -> None:
    managed.environment["AWS_PROFILE"] = "two\nlines"
    refused(managed.run("install-service", "--manager", "systemd"), 2, "AWS_PROFILE", "one line")
    assert list(managed.home.iterdir()) == []


def unit_environment(unit: str) -> dict[str, str]:
    """Return a unit's environment, read as systemd does: quotes, backslashes, specifiers."""
    words = [word for line in re.findall(r"^Environment=(.*)$", unit, re.MULTILINE) for word in shlex.split(line)]
    return dict(word.replace("%%", "%").split("=", 1) for word in words)


def unit_command(unit: str) -> list[str]:
    """Return a unit's command, read as systemd does."""
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    return [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line)]


def printed(shell: Shell, *words: str) -> str:
    """Return the unit that install-service prints."""
    done = shell.run("install-service", "--manager", "systemd", "--print", *words)
    assert (done.code, done.stderr) == (0, ""), done.stderr
    return done.stdout


@needs_systemd
@pytest.mark.parametrize("on_demand", [False, True], ids=["", "on demand"])
@pytest.mark.parametrize("system", [False, True], ids=["user", "system"])
def test_systemd_finds_nothing_to_complain_of(system: bool, on_demand: bool, managed: Managed, tmp_path: Path) -> None:
    """Paths that need quoting are among them: systemd checks that the command can be executed."""
    odd = tmp_path / "a 100% odd $place"
    odd.mkdir()
    python = odd / "python3"
    python.symlink_to(sys.executable)
    installation = fabrik_daemon.Installation(
        manager="systemd",
        system=system,
        on_demand=on_demand,
        root="",
        home=str(tmp_path),
        program="/usr/local/bin/fabrik-daemon",
        command=(str(python), "/usr/local/bin/fabrik-daemon"),
        environment={"PATH": f"{odd}:/usr/bin", "KUBECONFIG": '/a "quoted" \\ one'},
        socket="/run/fabrik/daemon.sock",
        crash_file="",
    )
    units = []
    for file in installation.files():
        if file.path.endswith((".service", ".socket")):
            units.append(tmp_path / Path(file.path).name)
            units[-1].write_bytes(file.content)
    assert len(units) == 1 + on_demand
    done = verify(units, system=system)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    python.unlink()
    broken = verify(units, system=system)
    assert "is not executable" in broken.stderr, "the check checks"


def verify(units: list[Path], *, system: bool) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze verify."""
    scope = [] if system else ["--user"]
    command = ["systemd-analyze", *scope, "--man=no", "verify", *map(str, units)]
    env = {"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(units[0].parent), "HOME": str(units[0].parent)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@needs_systemd
def test_the_system_unit_is_exposed_little(managed: Managed, tmp_path: Path) -> None:
    unit = tmp_path / "fabrik-daemon.service"
    managed.python = system_python()
    unit.write_text(printed(managed, "--system"))
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found
    assert float(found[1]) <= EXPOSURE_MAX


def in_a_home(python: str) -> bool:
    """Tell whether an interpreter, or the one behind it, is in somebody's home."""
    return os.path.realpath(python).startswith(("/root/", "/home/"))


def system_python() -> str:
    """Return an interpreter outside homes, that a service's user can run."""
    paths = [path for path in (sys.executable, "/usr/bin/python3") if not in_a_home(path)]
    path = paths[0] if paths else "false"
    if subprocess.run([path, "-c", "import sys; sys.exit(sys.version_info < (3, 9))"], check=False).returncode:
        pytest.skip("no interpreter of the system's")
    return path


def test_an_interpreter_in_a_home_is_none_for_the_system(managed: Managed) -> None:
    if not in_a_home(sys.executable):
        pytest.skip("this Python is in no home")
    for words in (("--system", "--dry-run"), ("--system", "--print")):
        refused(managed.run("install-service", "--manager", "systemd", *words), 1, "/usr/bin/python3", "--system")


def test_the_system_unit_names_no_home_and_nothing_in_tmp(managed: Managed) -> None:
    managed.python = system_python()
    managed.environment.update(
        PATH="/home/me/bin:/root/bin:/usr/bin:/bin",
        KUBECONFIG="/home/me/.kube/config:/etc/kube/config",
        CLOUDSDK_CONFIG="/home/me/.config/gcloud",
        HTTPS_PROXY="http://me:secret@proxy:3128",
    )
    done = managed.run("install-service", "--manager", "systemd", "--system", "--dry-run")
    assert done.code == 0
    assert "/home/me/.kube/config" in done.stderr
    assert "password in HTTPS_PROXY" in done.stderr
    unit = printed(managed, "--system")
    environment = unit_environment(unit)
    assert (environment["PATH"], environment["KUBECONFIG"]) == ("/usr/bin:/bin", "/etc/kube/config")
    assert "CLOUDSDK_CONFIG" not in environment
    settings = "\n".join(line for line in unit.splitlines() if not line.startswith("#"))
    assert "/tmp" not in settings
    assert "/home" not in settings
    for setting in ("User=fabrik", "RuntimeDirectory=fabrik", "StateDirectory=fabrik", "Type=notify"):
        assert setting in settings


@needs_root
@pytest.mark.skipif(not shutil.which("systemctl"), reason="no systemctl here")
@pytest.mark.parametrize("on_demand", [False, True], ids=["", "on demand"])
def test_installing_into_an_image(on_demand: bool, executable: Path, unpacked: Path, tmp_path: Path) -> None:
    """The real systemctl and systemd-sysusers, below a folder."""
    image = tmp_path / "image"
    for name in ("passwd", "group"):
        (image / "etc").mkdir(parents=True, exist_ok=True)
        (image / "etc" / name).write_text("root:x:0:0:root:/root:/bin/sh\n" if name == "passwd" else "root:x:0:\n")
    shell = Shell(executable, unpacked, tmp_path / "home")
    shell.python = system_python()
    words = ("--manager", "systemd", "--system", "--root", str(image), *(["--on-demand"] if on_demand else []))
    done = shell.run("install-service", *words)
    assert done.code == 0, done.stderr
    assert (image / "usr/local/bin/fabrik-daemon").read_bytes() == executable.read_bytes()
    assert "fabrik:" in (image / "etc/passwd").read_text()
    assert "fabrik:" in (image / "etc/group").read_text()
    assert stat.S_IMODE((image / "etc/fabrik/daemon/clusters.yaml").stat().st_mode) == 0o640
    unit, target = ("fabrik-daemon.socket", "sockets") if on_demand else ("fabrik-daemon.service", "multi-user")

    def systemctl(*told: str) -> str:
        command = ["systemctl", f"--root={image}", *told]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    assert systemctl("is-enabled", unit) == "enabled"
    assert (image / f"etc/systemd/system/{target}.target.wants" / unit).is_symlink()
    systemctl("disable", unit)
    assert systemctl("is-enabled", unit) == "disabled"
    systemctl("enable", "fabrik-daemon")  # the spec's
    assert systemctl("is-enabled", "fabrik-daemon") == "enabled"
    kept = {"config.yaml", "clusters.yaml"}
    again = shell.run("install-service", *words)
    assert again.code == 0
    assert "wrote" not in again.stdout
    shell.python = sys.executable  # whichever: it is not the one of the unit
    removed = shell.run("uninstall-service", *words[:5])
    assert removed.code == 0, removed.stderr
    assert systemctl("is-enabled", "fabrik-daemon") == ""
    assert {path.name for path in (image / "etc/fabrik/daemon").iterdir()} == kept


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--root", "/x"], "--system"),
        (["--manager", "launchd", "--system"], "without|leave out --system"),
        (["--manager", "openrc"], "--system"),
        (["--manager", "launchd", "--on-demand"], "systemd"),
        (["--manager", "upstart"], "choose from.*openrc"),
        (["--env", "NOVALUE"], "NAME=VALUE"),
    ],
)
def test_what_cannot_be_meant(words: list[str], told: str, managed: Managed) -> None:
    if "--manager" not in words:
        words = ["--manager", "systemd", *words]
    line = refused(managed.run("install-service", *words), 2)
    assert re.search(told, line)
    assert list(managed.home.iterdir()) == []


def test_the_system_s_service_needs_root(executable: Path) -> None:
    for shell in unprivileged_shell(executable):
        done = shell.run("install-service", "--manager", "systemd", "--system")
        refused(done, 2, "needs root")


@pytest.mark.skipif(sys.platform != "linux" or Path("/run/systemd/system").exists(), reason="a service manager runs")
def test_a_host_without_a_service_manager(managed: Managed) -> None:
    refused(managed.run("install-service"), 1, "--manager")


# ---------------------------------------------------------------- launchd, OpenRC


def test_a_launchd_agent(managed: Managed) -> None:
    managed.environment["HTTPS_PROXY"] = "http://a&b:<c>@proxy"
    managed.install("--now", manager="launchd")
    path = managed.home / "Library" / "LaunchAgents" / "fabrik.daemon.plist"
    agent = plistlib.loads(path.read_bytes())
    assert agent["Label"] == "fabrik.daemon"
    interpreter, *words = agent["ProgramArguments"]
    assert Path(interpreter).is_absolute()
    assert words == [str(managed.program), "start", "--foreground", "--detach"]
    assert (agent["RunAtLoad"], agent["KeepAlive"]) == (True, {"SuccessfulExit": False})
    assert agent["EnvironmentVariables"]["HTTPS_PROXY"] == "http://a&b:<c>@proxy"
    assert agent["EnvironmentVariables"]["PATH"].startswith(f"{managed.folder}/stubs:")
    assert agent["StandardErrorPath"] == str(managed.cache.with_name("daemon.crash"))
    assert managed.cache.parent.is_dir(), "launchd makes no folders"
    domain = f"gui/{os.getuid()}"
    assert managed.calls == [
        f"launchctl print {domain}/fabrik.daemon",
        f"launchctl bootout {domain}/fabrik.daemon",
        f"launchctl enable {domain}/fabrik.daemon",
        f"launchctl bootstrap {domain} {path}",
    ]
    done = managed.run("uninstall-service", "--manager", "launchd")
    assert done.code == 0
    assert managed.calls == [f"launchctl bootout {domain}/fabrik.daemon"]
    assert not path.exists()


def test_a_launchd_agent_starts_with_the_next_login(managed: Managed) -> None:
    lines = managed.install(manager="launchd")
    assert managed.calls == []
    agent = managed.home / "Library" / "LaunchAgents" / "fabrik.daemon.plist"
    assert f"launchctl load {agent}" in lines[-1], "as the specification has it"


def test_an_openrc_script(managed: Managed, tmp_path: Path) -> None:
    managed.python = system_python()
    managed.environment["NO_PROXY"] = "it's a $place"
    done = managed.run("install-service", "--manager", "openrc", "--system", "--print")
    assert (done.code, done.stderr) == (0, "")
    script = tmp_path / "fabrik-daemon"
    script.write_text(done.stdout)
    supervisor = managed.write(managed.folder / "stubs" / "supervise-daemon", '#!/bin/sh\necho "supervise-daemon $*"\n')
    supervisor.chmod(0o755)  # the script's PATH leads there
    # What openrc-run does: reads the script as shell, then calls its functions.
    program = """
set -eu
RC_SVCNAME=fabrik-daemon
checkpath() { echo "checkpath $*"; }
ebegin() { :; }
eend() { return "$1"; }
. "$1"
printf '%s\\n' "$supervisor" "$command" "$command_user" "$NO_PROXY" "$FABRIK_SOCKET"
eval "printf '%s\\n' $command_args"
start_pre
reload
"""
    ran = subprocess.run(["sh", "-c", program, "sh", str(script)], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines() == [
        "supervise-daemon",
        managed_command(managed)[0],
        "fabrik:fabrik",
        "it's a $place",
        "/run/fabrik/daemon.sock",
        *managed_command(managed)[1:],
        "checkpath --directory --owner fabrik:fabrik --mode 0755 /run/fabrik",
        "checkpath --directory --owner fabrik:fabrik --mode 0700 /var/lib/fabrik /var/cache/fabrik",
        "supervise-daemon fabrik-daemon --signal HUP",
    ]


def managed_command(managed: Managed) -> list[str]:
    """Return the command of the system's unit, which OpenRC's must be too."""
    return unit_command(printed(managed, "--system"))


# ---------------------------------------------------------------- what runs in the end


def test_the_unit_is_all_that_the_daemon_needs(
    managed: Managed, authority: Authority, serve: Serve, make_host: MakeHost
) -> None:
    """A service starts with an empty environment: its plugin is found, and its cluster followed, by the unit alone."""
    server = ModelServer(authority, token="a-bearer-token")
    server.put("jobs", job(1))
    serve(server)
    credential = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": "a-bearer-token"},
    }
    plugins = managed.folder / "my plugins"
    plugin = managed.write(plugins / "fabrik-test-plugin", f"#!/bin/sh\necho '{json.dumps(credential)}'\n")
    plugin.chmod(0o755)
    path = managed.folder / "kubeconfig"
    server.kubeconfig(path, Access(context="fabrik-dev"))
    kubeconfig = json.loads(path.read_text())
    kubeconfig["users"][0]["user"] = {
        "exec": {"apiVersion": credential["apiVersion"], "command": plugin.name, "interactiveMode": "Never"}
    }
    path.write_text(json.dumps(kubeconfig))
    managed.environment["PATH"] += f":{plugins}"
    managed.environment["KUBECONFIG"] = str(path)
    managed.install()
    unit = managed.unit.read_text()
    with tempfile.TemporaryDirectory(prefix="fabrik-") as place, Systemd(Path(place)) as systemd:
        # systemd itself gives HOME; SHIV_ROOT saves the test an unpacking.
        environment = {
            **unit_environment(unit),
            "HOME": str(managed.home),
            "SHIV_ROOT": managed.environment["SHIV_ROOT"],
        }
        systemd.start(unit_command(unit), environment, managed.folder / "daemon.log")
        systemd.until("READY", "1")
        with server.changed:
            assert server.changed.wait_for(lambda: len(server.watches) >= 5, 30)
        systemd.until("STATUS", "following fabrik-dev")
        assert systemd.stop() == 0


@pytest.fixture
def place() -> Iterator[Path]:
    """Return a folder whose path is short enough for sockets, and which everybody may enter."""
    folder = Path(tempfile.mkdtemp(prefix="fabrik-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


ASK: Final = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.settimeout(20)
try:
    sock.connect(sys.argv[1])
    sock.sendall(b'{"action": "ping"}\\n')
    print(sock.recv(100).decode().strip() or "hung up")
except (ConnectionResetError, BrokenPipeError):
    print("hung up")
except PermissionError:
    print("not let in")
"""


def ask_as(path: Path, user: int, *groups: int) -> str:
    """Return what a user in these groups hears from the daemon."""
    done = subprocess.run(
        ["/usr/bin/python3", "-c", ASK, str(path)],
        capture_output=True,
        text=True,
        check=True,
        user=user,
        group=user,
        extra_groups=groups,
        cwd="/",
        env={},
    )
    return done.stdout.strip()


@needs_root
def test_a_group_s_members_are_let_in_and_nobody_else(
    authority: Authority, serve: Serve, make_host: MakeHost, place: Path
) -> None:
    system_python()
    server = ModelServer(authority)
    serve(server)
    host = make_host(Cluster(server))
    path = place / "d.sock"
    host.environment.update(FABRIK_SOCKET=str(path), FABRIK_SOCKET_GROUP=grp.getgrgid(PLUGIN_GROUP).gr_name)
    host.start()
    assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_gid) == (0o660, PLUGIN_GROUP)
    assert ask_as(path, NOBODY, PLUGIN_GROUP) == '{"type":"ping"}'
    assert ask_as(path, NOBODY) == "not let in"
    path.chmod(0o666)  # were the mode all there is, this would let them in
    assert ask_as(path, NOBODY) == "hung up"
    assert ask_as(path, NOBODY, PLUGIN_GROUP) == '{"type":"ping"}'
    host.stop()


def test_a_group_that_does_not_exist(authority: Authority, serve: Serve, make_host: MakeHost) -> None:
    server = ModelServer(authority)
    serve(server)
    host = make_host(Cluster(server))
    host.environment["FABRIK_SOCKET_GROUP"] = "no-such-group"
    done = host.cli("start", "--foreground")
    assert done.returncode == 2
    assert "no group 'no-such-group'" in done.stderr.splitlines()[-1]


IN_A_HOST_OF_ITS_OWN: Final = """
mount -t tmpfs none /run && mkdir /run/fabrik && mount --bind "$1" /run/fabrik && shift && exec "$@"
"""


@needs_root
def test_the_system_s_daemon_answers_where_there_is_no_own(
    executable: Path, authority: Authority, serve: Serve, make_host: MakeHost, place: Path
) -> None:
    """Commands without settings of their own find /run/fabrik/daemon.sock, and trust the user who has /run/fabrik."""
    python = system_python()
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    server = ModelServer(authority)
    server.put("jobs", job(1))
    serve(server)
    host = make_host(Cluster(server))
    run = place / "run"
    run.mkdir()
    # The daemon is another user's; that user has a home and the run folder.
    own = place / "fabrik-daemon"
    shutil.copyfile(executable, own)
    for folder in (run, place / "home"):
        folder.mkdir(exist_ok=True)
        os.chown(folder, NOBODY, NOBODY)
    config = place / "config"
    shutil.copytree(host.root / "config", config)
    kubeconfig = next(host.root.glob("*.kubeconfig"))
    shutil.copy(kubeconfig, config / "kubeconfig")
    text = (config / "clusters.yaml").read_text().replace(str(kubeconfig), str(config / "kubeconfig"))
    (config / "clusters.yaml").write_text(text)
    for path in (config, *config.iterdir()):
        path.chmod(0o755)
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(place / "home"),
        "FABRIK_CONFIG": str(config / "config.yaml"),
        "FABRIK_SOCKET": str(run / "daemon.sock"),
    }
    with (host.root / "daemon.log").open("ab") as log:
        daemon = subprocess.Popen(
            [python, str(own), "start", "--foreground"],
            env=environment,
            user=NOBODY,
            group=NOBODY,
            extra_groups=(),
            cwd="/",
            stdout=log,
            stderr=log,
        )
    try:
        wait_until(lambda: daemon.poll() is not None or "listed" in host.log, 60, "it has listed")
        assert daemon.poll() is None, host.log

        def cli(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
            command = ["unshare", "--mount", "sh", "-c", IN_A_HOST_OF_ITS_OWN, "sh", str(run), python, str(executable)]
            own_env = {"PATH": os.environ["PATH"], "HOME": str(host.root / "home"), "TMPDIR": str(host.root / "tmp")}
            own_env["SHIV_ROOT"] = host.environment["SHIV_ROOT"]
            return subprocess.run(
                [*command, *words], capture_output=True, text=True, check=False, env={**own_env, **env}
            )

        status = cli("status", "-o", "json")
        assert status.returncode == 0, status.stderr
        assert json.loads(status.stdout)["pid"] == daemon.pid
        runs = cli("runs", "list", "-o", "json")
        assert len(json.loads(runs.stdout)) == 1, runs.stderr
        for words in (("stop",), ("reload",)):
            assert cli(*words).returncode == 4, "it is not ours to stop"
        assert cli("status", FABRIK_CACHE=str(place / "other.db")).returncode == 4, "it has another cache"
        os.chown(run, 12345, 12345)
        assert cli("status").returncode == 4, "that is not who has /run/fabrik"
        assert daemon.poll() is None
    finally:
        daemon.terminate()
        assert daemon.wait(30) == 0


# ---------------------------------------------------------------- templates


@needs_root
def test_settings_that_are_written_again_stay_readable_to_the_service(managed: Managed) -> None:
    """As root adds a cluster to what the service's group may read."""
    clusters = managed.write(managed.clusters, "clusters: []\n")
    os.chown(clusters, 0, PLUGIN_GROUP)
    clusters.chmod(0o640)
    kubeconfig = managed.write(managed.home / "kubeconfig", "contexts: [{name: a, context: {cluster: a, user: a}}]")
    done = managed.run("clusters", "add", "--name", "a", "--kubeconfig", str(kubeconfig), "--context", "a")
    assert done.code == 0, done.stderr
    assert "name: a" in clusters.read_text()
    assert (stat.S_IMODE(clusters.stat().st_mode), clusters.stat().st_gid) == (0o640, PLUGIN_GROUP)


def test_every_template_is_used() -> None:
    source = (ROOT / "fabrik_daemon.py").read_text(encoding="utf-8")
    words = {word.replace("$form", "*") for word in re.findall(r'"([a-z.$-]+)"', source)}
    for path in TEMPLATES.iterdir():
        assert any(path.match(word) for word in words if word.strip("*.$-")), path.name
