"""Measures what taking in a change costs: pods' changes as fast as the server can send them, over TLS.

The clock is the operating system's: processor time of the daemon from before the first change is sent until the last
one is a row in cache.db and a line at one subscriber, over the number of changes. Peers do less: they take the
events, as JSON or as objects, and drop them. The limit that every figure is held against is `json.loads` over the
same lines in a bare loop.

    .venv/bin/python tests/bench/ingest.py [--events N] [--peers PYTHON] [-o json]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench.measuring import cpu_s, resident_mb, serving  # noqa: E402 - found through the path above
from harness import wait_until  # noqa: E402
from pod_server import PodServer, Work, recorded_event  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Mapping

PATIENCE_S: Final = 240.0
PEER_S: Final = 60.0
BARE: Final = """
import json, sys, time
lines = sys.stdin.buffer.read().splitlines()
began = time.process_time()
for line in lines:
    json.loads(line)
print(time.process_time() - began)
"""
# Each takes the watch until the last change has come; it says when it is ready, and then what it used.
_PEER: Final = """
import signal, sys, time
kubeconfig, begun = sys.argv[1], []
signal.alarm(60)  # some peers wait for ever where they meet what they do not know
def ready():
    begun.append(time.process_time())
    print("ready", flush=True)
def ended(task):
    if task == "last":
        print(time.process_time() - begun[0], flush=True)
        sys.exit()
"""
PEERS: Final[Mapping[str, str]] = {
    "kubernetes Watch": """
from kubernetes import client, config, watch
config.load_kube_config(kubeconfig)
api = client.CoreV1Api()
version = api.list_namespaced_pod("fabrik-runs").metadata.resource_version
ready()
for event in watch.Watch().stream(api.list_namespaced_pod, "fabrik-runs", resource_version=version):
    ended(event["object"].metadata.annotations["fabrik.dev/task"])
""",
    "lightkube": """
from lightkube import Client, KubeConfig
from lightkube.resources.core_v1 import Pod
client = Client(KubeConfig.from_file(kubeconfig).get())
pods = client.list(Pod, namespace="fabrik-runs")
list(pods)
ready()
for kind, pod in client.watch(Pod, namespace="fabrik-runs", resource_version=pods.resourceVersion):
    ended(pod.metadata.annotations["fabrik.dev/task"])
""",
    "kr8s": """
import kr8s
api = kr8s.api(kubeconfig=kubeconfig)
ready()
for kind, pod in api.watch("pods", namespace="fabrik-runs"):
    ended(pod.annotations["fabrik.dev/task"])
""",
    "kubernetes_asyncio": """
import asyncio
from kubernetes_asyncio import client, config, watch
async def main():
    await config.load_kube_config(kubeconfig)
    api = client.CoreV1Api()
    version = (await api.list_namespaced_pod("fabrik-runs")).metadata.resource_version
    ready()
    async for event in watch.Watch().stream(api.list_namespaced_pod, "fabrik-runs", resource_version=version):
        ended(event["object"].metadata.annotations["fabrik.dev/task"])
asyncio.run(main())
""",
}


def bare_s(work: Work, python: str = sys.executable) -> float:
    """Return the processor time of json.loads over the lines, in a process of its own."""
    done = subprocess.run([python, "-c", BARE], input=b"".join(work.lines()), capture_output=True, check=True)
    return float(done.stdout)


def daemon_s(work: Work, python: str = sys.executable) -> tuple[float, float, float]:
    """Return the daemon's processor time and the time it took, in seconds, and its memory afterwards in MB."""
    with serving([work], python) as ((server,), daemon):
        daemon.launch()
        daemon.wait_connected("c0")
        subscriber = daemon.subscribe()
        time.sleep(1.0)  # what a start leaves to do is not what is measured
        before, began = cpu_s(daemon.pid), time.monotonic()
        server.go()
        wait_until(
            lambda: any(line.get("currentTask") == "last" for line in list(subscriber.messages)[-3:]),
            PATIENCE_S,
            "the last change reaches the subscriber",
        )
        wait_until(lambda: daemon.rows("SELECT 1 FROM runs WHERE current_task = 'last'"), PATIENCE_S, "and the cache")
        return cpu_s(daemon.pid) - before, time.monotonic() - began, resident_mb(daemon.pid)


def kubectl_s(work: Work) -> float:
    """Return the processor time of `kubectl get --watch` over the same changes, NaN where it takes too long."""
    with tempfile.TemporaryDirectory(prefix="fabrik-bench-") as name, PodServer(work, Path(name)) as server:
        command = ["kubectl", "--kubeconfig", str(server.path), "get", "pods", "-n", "fabrik-runs"]
        command += ["--watch-only", "--output-watch-events", "-o", "json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            time.sleep(2.0)
            assert process.stdout
            before = cpu_s(process.pid)
            patience = threading.Timer(PEER_S, process.kill)
            patience.start()
            server.go()
            for line in process.stdout:
                if b'"fabrik.dev/task":"last"' in line:
                    break
                if not patience.is_alive():
                    return float("nan")
            used: float = cpu_s(process.pid) - before
            patience.cancel()
            process.kill()
    return used


def peer_s(work: Work, python: str, program: str) -> float:
    """Return the processor time of another client over the same changes; not a number where it did not get there."""
    with tempfile.TemporaryDirectory(prefix="fabrik-bench-") as name, PodServer(work, Path(name)) as server:
        command = [python, "-c", _PEER + program, str(server.path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout
            if process.stdout.readline():
                server.go()
            return float(process.stdout.readline() or "nan")


def measure(work: Work, python: str, peers: str) -> dict[str, float]:
    """Return the processor time per change of everybody, in microseconds, and what else is known of the daemon."""
    used, took, memory_mb = daemon_s(work, python)
    found = {"fabrik-daemon": used, "bare json.loads": bare_s(work, python)}
    if shutil.which("kubectl"):
        found["kubectl get --watch"] = kubectl_s(work)
    for name, program in PEERS.items() if peers else ():
        found[name] = peer_s(work, peers, program)
    figures = {name: round(seconds / work.events * 1e6, 1) for name, seconds in found.items()}
    return {
        **figures,
        "daemon's time per change": round(took / work.events * 1e6, 1),
        "daemon's MB": round(memory_mb, 1),
    }


def main() -> None:
    """Measure once and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=20_000, metavar="N", help="how many changes (default: 20000)")
    parser.add_argument("--runs", type=int, default=500, metavar="N", help="of how many runs (default: 500)")
    parser.add_argument("--whole", action="store_true", help="pods as recorded, of 10 KB")
    parser.add_argument("--python", default=sys.executable, help="the daemon's interpreter (default: this one)")
    parser.add_argument("--peers", default="", metavar="PYTHON", help="an interpreter that has the peers")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="format (default: text)")
    arguments = parser.parse_args()
    work = Work(arguments.runs, arguments.events, whole=arguments.whole)
    figures = measure(work, arguments.python, arguments.peers)
    if arguments.output == "json":
        print(json.dumps(figures, indent=2))
        return
    print(f"{work.events} changes of {len(recorded_event(work.whole))} bytes, {work.runs} runs, {os.cpu_count()} cpus")
    daemon = figures["fabrik-daemon"]
    for name, value in figures.items():
        ratio = f"  daemon is {daemon / value:.2f} x" if "daemon" not in name and value else ""
        print(f"  {name:<26}{value:>9.1f} {'' if 'MB' in name else 'us'}{ratio}")


if __name__ == "__main__":
    main()
