"""The other Python clients that ingest is measured against: their environments, and the bare watch loop of each.

They do less than the daemon: they take each change, as JSON or as objects, look at one annotation, and drop it.
"""

from __future__ import annotations

import json
import subprocess
import venv
from pathlib import Path
from typing import Final, NamedTuple

PLACE: Final = Path(__file__).resolve().parents[2] / "build"
ENVIRONMENTS: Final = {
    "peers-35": ("kubernetes==35.0.0",),
    "peers-newest": ("kubernetes", "kubernetes_asyncio", "lightkube", "kr8s"),
}
_VERSIONS: Final = """
import importlib.metadata, json, sys
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""
_BEGIN: Final = """
import os, sys
kubeconfig = os.environ["KUBECONFIG"]
def seen(task):
    if task == "last":
        print("last", flush=True)
        sys.stdin.read()  # until its time was taken
        os._exit(0)
"""
_WATCH: Final = """
from kubernetes import client, config, watch
config.load_kube_config(kubeconfig)
api = client.CoreV1Api()
version = api.list_namespaced_pod("fabrik-runs").metadata.resource_version
for event in watch.Watch().stream(api.list_namespaced_pod, "fabrik-runs", resource_version=version):
    seen(event["object"].metadata.annotations["fabrik.dev/task"])
"""


class Peer(NamedTuple):
    """A client: what it is called, the package and environment that it is in, and a program for $KUBECONFIG.

    The program says `last` when it has the last change, and lives on until its stdin ends.
    """

    name: str
    package: str
    environment: str
    loop: str

    @property
    def program(self) -> str:
        """The whole program."""
        return _BEGIN + self.loop

    @property
    def python(self) -> str:
        """The interpreter that has it."""
        return str(PLACE / self.environment / "bin" / "python")


PEERS: Final = (
    Peer("kubernetes 35 Watch", "kubernetes", "peers-35", _WATCH),
    Peer("kubernetes Watch", "kubernetes", "peers-newest", _WATCH),
    Peer(
        "kubernetes informer",
        "kubernetes",
        "peers-newest",
        """
import threading
from kubernetes import client, config
from kubernetes.informer import MODIFIED, SharedInformer
config.load_kube_config(kubeconfig)
informer = SharedInformer(client.CoreV1Api().list_namespaced_pod, namespace="fabrik-runs")
informer.add_event_handler(MODIFIED, lambda pod: seen(pod.metadata.annotations["fabrik.dev/task"]))
informer.start()
threading.Event().wait()
""",
    ),
    Peer(
        "kubernetes_asyncio",
        "kubernetes_asyncio",
        "peers-newest",
        """
import asyncio
from kubernetes_asyncio import client, config, watch
async def main():
    await config.load_kube_config(kubeconfig)
    api = client.CoreV1Api()
    version = (await api.list_namespaced_pod("fabrik-runs")).metadata.resource_version
    async for event in watch.Watch().stream(api.list_namespaced_pod, "fabrik-runs", resource_version=version):
        seen(event["object"].metadata.annotations["fabrik.dev/task"])
asyncio.run(main())
""",
    ),
    Peer(
        "kr8s",
        "kr8s",
        "peers-newest",
        """
import kr8s
for kind, pod in kr8s.api(kubeconfig=kubeconfig).watch("pods", namespace="fabrik-runs"):
    seen(pod.annotations["fabrik.dev/task"])
""",
    ),
    Peer(
        "lightkube",
        "lightkube",
        "peers-newest",
        """
from lightkube import Client, KubeConfig
from lightkube.resources.core_v1 import Pod
client = Client(KubeConfig.from_file(kubeconfig).get())
pods = client.list(Pod, namespace="fabrik-runs")
list(pods)
for kind, pod in client.watch(Pod, namespace="fabrik-runs", resource_version=pods.resourceVersion):
    seen(pod.metadata.annotations["fabrik.dev/task"])
""",
    ),
)


def make_environments() -> None:
    """Make the environments below build/ that are not there yet."""
    for name, packages in ENVIRONMENTS.items():
        made = PLACE / name / "made"
        if made.exists():
            continue
        venv.create(PLACE / name, with_pip=True, clear=True)
        subprocess.run([str(PLACE / name / "bin" / "python"), "-m", "pip", "install", "-q", *packages], check=True)
        made.touch()


def installed() -> dict[str, Peer]:
    """Return the peers whose environments are there, by name and version."""
    found = {}
    for environment, packages in ENVIRONMENTS.items():
        peers = [peer for peer in PEERS if peer.environment == environment]
        if (PLACE / environment / "made").exists():
            names = [package.partition("==")[0] for package in packages]
            done = subprocess.run([peers[0].python, "-c", _VERSIONS, *names], stdout=subprocess.PIPE, check=True)
            versions = json.loads(done.stdout)
            found.update({f"{peer.name} ({versions[peer.package]})": peer for peer in peers})
    return found
