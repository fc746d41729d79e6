"""The Deployment: valid by Kubernetes' schemas, with exactly the rights used, and a daemon that runs as it says."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import kubernetes_validate
import pytest
import yaml
from commands import Shell, refused
from fabrik_objects import Report, job, pod
from fakes import ModelServer
from harness import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fakes import Authority, KubernetesApi
    from fakes_http import Request

    Serve = Callable[[KubernetesApi], None]

ROOT: Final = Path(__file__).parent.parent
NAME: Final = "fabrik-daemon-remote"
TOKEN: Final = "a-bearer-token"
SERVICE_ACCOUNT: Final = "var/run/secrets/kubernetes.io/serviceaccount"
CLIENT_TOKEN: Final = "0123456789abcdef" * 4
VERSIONS: Final = ("1.29", "1.33", "1.37")

Manifest = dict[str, Any]


@pytest.fixture
def shell(executable: Path, unpacked: Path, tmp_path: Path) -> Shell:
    """Return a shell with an empty home."""
    return Shell(executable, unpacked, tmp_path / "home")


def manifests(shell: Shell, *words: str) -> list[Manifest]:
    """Return the documents of `manifests deployment`."""
    done = shell.run("manifests", "deployment", *words)
    assert (done.code, done.stderr) == (0, ""), done.stderr
    return list(yaml.safe_load_all(done.stdout))


def one(documents: list[Manifest], kind: str) -> Manifest:
    """Return the only document of a kind."""
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def the_pod(documents: list[Manifest]) -> Manifest:
    """Return the Deployment's Pod."""
    spec = one(documents, "Deployment")["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


# ---------------------------------------------------------------- what it says


@pytest.mark.parametrize("version", VERSIONS)
def test_every_document_is_valid(shell: Shell, version: str) -> None:
    documents = manifests(shell)
    assert [document["kind"] for document in documents] == [
        *("Namespace", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "PersistentVolumeClaim", "Deployment"),
        *("Service", "NetworkPolicy", "Ingress"),
    ]
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)
    one(documents, "Deployment")["spec"]["template"]["spec"]["container"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(one(documents, "Deployment"), version, strict=True)


def test_what_belongs_together_does(shell: Shell) -> None:
    documents = manifests(shell, "--set", "namespace=fabrik-two", "--set", "image=registry.example/fabrik:1")
    for document in documents:
        if document["kind"] == "Namespace":
            assert document["metadata"]["name"] == "fabrik-two"
        elif document["kind"] not in ("ClusterRole", "ClusterRoleBinding"):
            assert document["metadata"]["namespace"] == "fabrik-two"
    deployment = one(documents, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["metadata"]["name"] == NAME, "the specification's"
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        one(documents, "Service")["spec"]["selector"],
        one(documents, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    (container,) = the_pod(documents)["containers"]
    assert container["image"] == "registry.example/fabrik:1"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["MODE"] == "remote"
    assert environment["WEBSOCKET_PORT"] == str(ports["http"]) == "8080"
    assert one(documents, "Service")["spec"]["ports"][0]["targetPort"] in ports
    assert {probe: container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "liveness", "readiness")} == {
        "startup": "/healthz",
        "liveness": "/healthz",
        "readiness": "/readyz",
    }
    volumes = {volume["name"] for volume in the_pod(documents)["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    binding = one(documents, "ClusterRoleBinding")
    assert binding["roleRef"]["name"] == one(documents, "ClusterRole")["metadata"]["name"]
    account = one(documents, "ServiceAccount")["metadata"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account["name"], "namespace": "fabrik-two"}]
    assert the_pod(documents)["serviceAccountName"] == account["name"]
    (rule,) = one(documents, "Ingress")["spec"]["rules"]
    assert rule["http"]["paths"][0]["backend"]["service"]["name"] == one(documents, "Service")["metadata"]["name"]


def test_it_may_do_little(shell: Shell) -> None:
    """What the restricted Pod Security Standard asks for, and a file system that cannot be written."""
    documents = manifests(shell)
    spec = the_pod(documents)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert set(container["resources"]) == {"requests", "limits"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert all(set(volume) & {"persistentVolumeClaim", "secret", "configMap"} for volume in spec["volumes"])
    for rule in one(documents, "ClusterRole")["rules"]:
        assert set(rule["verbs"]) <= {"get", "list", "watch"}
        assert "secrets" not in rule["resources"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("deploymnt",), "deployment"),
        (("deployment", "--set", "nmespace=x"), "namespace"),
        (("deployment", "--set", "namespace"), "NAME=VALUE"),
        (("deployment", "--set", "namespace=a\nb"), "one line"),
    ],
)
def test_mistakes(shell: Shell, words: tuple[str, ...], part: str) -> None:
    refused(shell.run("manifests", *words), 2, part)


def test_the_container_only_gets_the_executable(shell: Shell) -> None:
    lines = [line.split() for line in (ROOT / "Containerfile").read_text().splitlines() if line[:1].isupper()]
    said = {words[0]: words[1:] for words in lines}
    assert set(said) == {"FROM", "COPY", "USER", "ENTRYPOINT", "CMD"}
    assert said["COPY"] == ["dist/fabrik-daemon", "/usr/local/bin/fabrik-daemon"]
    assert re.fullmatch(r"\S*python:3\.\d+-slim", said["FROM"][0])
    context = the_pod(manifests(shell))["securityContext"]
    assert said["USER"] == [f"{context['runAsUser']}:{context['runAsGroup']}"]
    assert json.loads(" ".join(said["ENTRYPOINT"])) == ["/usr/local/bin/fabrik-daemon"]


# ---------------------------------------------------------------- what it does


class PodRoot:
    """A root as the Pod's: read-only, its volumes in place, /dev/shm as container runtimes mount it."""

    def __init__(self, folder: Path, spec: Manifest, executable: Path) -> None:
        self.folder = folder
        self.spec = spec
        (self.container,) = spec["containers"]
        for name in ("root", "shm", "etc", "var", "run", "tmp"):
            (folder / name).mkdir()
        for name in ("passwd", "group", "ssl", "ld.so.cache", "localtime", "nsswitch.conf", "hosts", "resolv.conf"):
            source = Path("/etc") / name
            if source.is_dir():
                shutil.copytree(source, folder / "etc" / name, symlinks=True)
            elif source.exists():
                shutil.copy(source, folder / "etc" / name)
        for source in Path("/etc").glob("python3*"):
            shutil.copytree(source, folder / "etc" / source.name)
        (folder / "program").mkdir()
        shutil.copy(executable, folder / "program" / "fabrik-daemon")
        (folder / "var" / "run").symlink_to("/run")
        for mount in self.container["volumeMounts"]:
            self._volume(mount["name"], mount["mountPath"].lstrip("/"))

    def _volume(self, name: str, where: str) -> None:
        path = self.folder / where
        path.mkdir(parents=True)
        group = self.spec["securityContext"]["fsGroup"]
        if name == "cache":
            os.chown(path, 0, group)
            path.chmod(0o2777)  # as the local path provisioner leaves it, with fsGroup
        elif name == "token":
            self.secret(path, {"token": CLIENT_TOKEN + "\n"}, group)

    @staticmethod
    def secret(path: Path, files: dict[str, str], group: int) -> None:
        """Write a volume as kubelet does: a folder of this moment, a link to it, and links through that."""
        moment = path / "..2026_11_23_18_00_00.123"
        moment.mkdir(mode=0o755)
        for name, text in files.items():
            (moment / name).write_text(text)
            (moment / name).chmod(0o440)
            os.chown(moment / name, 0, group)
            (path / name).symlink_to(f"..data/{name}")
        (path / "..data").symlink_to(moment.name)

    def service_account(self, ca: str) -> None:
        """Put the service account's files in place."""
        path = self.folder / "run" / SERVICE_ACCOUNT.partition("run/")[2]
        path.mkdir(parents=True)
        group = self.spec["securityContext"]["fsGroup"]
        self.secret(path, {"token": TOKEN, "ca.crt": ca, "namespace": "fabrik-system"}, group)

    def start(self, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Start the container's command in it."""
        context = self.spec["securityContext"]
        root = self.folder / "root"
        script = f"""
set -e
mount --make-rprivate /
mount --bind / {root}
mount -o remount,bind,ro {root}
for name in etc var run tmp; do
  mount --bind {self.folder}/$name {root}/$name
  mount -o remount,bind,ro {root}/$name
done
mount --bind {self.folder}/var/cache/fabrik {root}/var/cache/fabrik
mount --bind {self.folder}/program {root}/opt
mount -o remount,bind,ro {root}/opt
mount --rbind /proc {root}/proc
mount -t tmpfs -o mode=755 none {root}/dev
touch {root}/dev/null && mount --bind /dev/null {root}/dev/null
touch {root}/dev/urandom && mount --bind /dev/urandom {root}/dev/urandom
mkdir {root}/dev/shm && mount -t tmpfs -o mode=1777,size=64m,nosuid,nodev,noexec none {root}/dev/shm
mount -o remount,ro {root}/dev
exec setpriv --reuid {context["runAsUser"]} --regid {context["runAsGroup"]} --groups {context["fsGroup"]} \\
  --no-new-privs --bounding-set=-all --inh-caps=-all \\
  env -i PATH=/usr/bin:/bin HOME=/ "$@"
"""
        chroot = script.replace("exec setpriv", f"exec chroot {root} setpriv")
        variables = [f"{name}={value}" for name, value in environment.items()]
        command = ["/usr/bin/python3", "/opt/fabrik-daemon", *self.container["args"]]
        with log.open("ab") as output:
            return subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", chroot, "sh", *variables, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )


def may_play_a_pod() -> bool:
    """Tell whether this user may make mounts of its own, and has a Python that a Pod's user can run."""
    if (
        sys.platform != "linux"
        or os.geteuid() != 0
        or not shutil.which("setpriv")
        or not Path("/usr/bin/python3").exists()
    ):
        return False
    tried = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /mnt && setpriv --no-new-privs true"]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


@pytest.fixture
def place() -> Iterator[Path]:
    """Return a folder that the Pod's user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="fabrik-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def ask(port: int, path: str, token: str = "") -> tuple[int, Any]:
    """Return status and body of one request to the daemon."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")
    except (ConnectionError, socket.timeout):
        return 0, None
    finally:
        connection.close()


def used_right(request: Request) -> tuple[str, str, str, str]:
    """Return group, resource, verb and name (of what is not a collection) that a request needs by RBAC."""
    words = request.path.strip("/").split("/")
    group, words = ("", words[2:]) if words[0] == "api" else (words[1], words[3:])
    if words[0] == "namespaces" and len(words) > 2:
        words = words[2:]
    resource = "/".join(words[::2])
    name = words[1] if len(words) > 1 and resource == "namespaces" else ""
    verb = "get" if len(words) > 1 else ("watch" if request.is_watch else "list")
    return group, resource, verb, name


def granted_rights(role: Manifest) -> set[tuple[str, str, str, str]]:
    """Return what a role grants, each right by itself."""
    return {
        (group, resource, verb, name)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for name in rule.get("resourceNames", [""])
    }


@pytest.mark.skipif(not may_play_a_pod(), reason="only root may make mounts of its own")
def test_the_pod_runs_and_uses_exactly_its_rights(
    shell: Shell, authority: Authority, serve: Serve, place: Path
) -> None:
    documents = manifests(shell)
    server = ModelServer(authority, token=TOKEN)
    server.put("jobs", job(1))
    server.put("pods", pod(1, report=Report(finished=1)))
    server.put("jobs", job(2))
    server.put("pods", pod(2))
    serve(server)
    spec = the_pod(documents)
    root = PodRoot(place, spec, shell.executable)
    root.service_account(authority.pem.decode())
    address = urllib.parse.urlsplit(server.url)
    environment = {entry["name"]: entry["value"] for entry in root.container["env"]}
    port = free_port()
    environment.update(
        WEBSOCKET_PORT=str(port),
        KUBERNETES_SERVICE_HOST=str(address.hostname),
        KUBERNETES_SERVICE_PORT=str(address.port),
    )
    log = place / "daemon.log"
    daemon = root.start(environment, log)
    try:
        wait_until(
            lambda: daemon.poll() is not None or ask(port, "/readyz")[0] == 200, 60, "the readiness probe is content"
        )
        assert daemon.poll() is None, log.read_text()
        assert ask(port, "/healthz")[0] == 200
        assert ask(port, "/v1/runs")[0] == 401
        status, answer = ask(port, "/daemon/v1/runs", CLIENT_TOKEN)
        assert (status, len(answer["runs"])) == (200, 2)
        assert (place / "var/cache/fabrik/daemon/cache.db").stat().st_uid == spec["securityContext"]["runAsUser"]
        server.put("pods", pod(2, phase="Failed"))
        server.put("jobs", job(2, conditions=["Failed=BackoffLimitExceeded"]))
        granted = granted_rights(one(documents, "ClusterRole"))
        wait_until(
            lambda: {used_right(request) for request in server.asked(lambda _: True)} >= granted,
            30,
            "every right is used",
        )
        assert {used_right(request) for request in server.asked(lambda _: True)} == granted
    finally:
        daemon.send_signal(signal.SIGTERM)
        code = daemon.wait(30)
    assert code == 0, log.read_text()
    assert "Traceback" not in log.read_text()
