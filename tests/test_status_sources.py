"""What Smithers reports beside its annotations: its sidecar's /status, and its status.json by exec; both opt-in."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any, Final

import pytest
from fabrik_objects import NAMESPACE, Report, job, pod, run_id
from fakes import ModelServer, refusal
from fakes_http import Access, Response
from harness import Cluster, wait_until
from links import PATIENCE_S, LooseDaemon

import fabrik_daemon
from fabrik_daemon import ClusterSpec, Direct, ReportAsked, Run, Settings, ask_report, fill_run, report_from_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fakes import Authority, KubernetesApi

    Serve = Callable[[KubernetesApi], None]

POD: Final = pod(1)["metadata"]["name"]
SIDECAR: Final = {"name": "smithers-sidecar", "ports": [{"containerPort": 9099}]}
SAID: Final = {
    "runId": run_id(1),
    "phase": "implement",
    "currentTask": "16:impl",
    "taskAttempt": 2,
    "progressFinished": 150,
    "progressTotal": 192,
    "heartbeatAge": 4,
}
EXEC: Final = f"/api/v1/namespaces/{NAMESPACE}/pods/{POD}/exec"


def with_sidecar(report: Report | None = None) -> dict[str, Any]:
    """Return a run's Pod with a sidecar beside it."""
    item = pod(1, report=report)
    item["spec"]["containers"] = [*item["spec"]["containers"], SIDECAR]
    return item


def answer(document: object) -> Response:
    """Return a sidecar's answer."""
    return Response(200, json.dumps(document).encode())


@pytest.fixture
def server(authority: Authority, serve: Serve) -> ModelServer:
    server = ModelServer(authority, token="sesame")
    serve(server)
    server.put("jobs", job(1))
    return server


@pytest.fixture
def start(
    server: ModelServer, executable: Path, unpacked: Path, tmp_path: Path
) -> Iterator[Callable[..., LooseDaemon]]:
    """Start a daemon with some status sources; at the end none is left."""
    daemons: list[LooseDaemon] = []

    def start_one(*sources: str) -> LooseDaemon:
        place = (executable, unpacked, tmp_path / f"daemon{len(daemons)}")
        clusters = [Cluster(server, access=Access(auth="token"))]
        config: dict[str, Any] = {"statusSources": list(sources)} if sources else {"logLevel": "debug"}
        daemons.append(LooseDaemon(place, clusters, timing={"sidecar": "200ms"}, config=config))
        daemons[-1].launch()
        daemons[-1].wait_connected()
        return daemons[-1]

    yield start_one
    for daemon in daemons:
        daemon.kill()


def test_a_sidecar_is_asked_where_that_is_switched_on_and_annotations_are_preferred(
    server: ModelServer, start: Callable[..., LooseDaemon]
) -> None:
    server.put("pods", with_sidecar())
    server.proxied[f"{POD}:9099"] = answer(SAID)
    daemon = start("annotation", "sidecar")
    wait_until(lambda: daemon.run_rows()[run_id(1)]["phase"], PATIENCE_S, "the sidecar was heard")
    row = daemon.run_rows()[run_id(1)]
    names = ("phase", "current_task", "task_attempt", "progress_finished", "progress_total", "status")
    assert [row[name] for name in names] == ["implement", "16:impl", 2, 150, 192, "running"]
    assert row["heartbeat_at"]
    server.proxied[f"{POD}:9099"] = answer({**SAID, "phase": "human-gate"})
    wait_until(lambda: daemon.run_rows()[run_id(1)]["status"] == "blocked", PATIENCE_S, "it is at the gate")
    server.put("pods", with_sidecar(Report(phase="review", task="17:review", finished=151)))
    wait_until(lambda: daemon.run_rows()[run_id(1)]["phase"] == "review", PATIENCE_S, "the annotation leads")
    row = daemon.run_rows()[run_id(1)]
    assert [row[name] for name in names] == ["review", "17:review", 1, 151, 192, "running"]
    server.proxied[f"{POD}:9099"] = refusal(403, "Forbidden", "no")
    wait_until(lambda: "grant get on pods/proxy" in daemon.log, PATIENCE_S, "the right is named")
    daemon.crash()
    server.stop()
    daemon.launch()
    assert daemon.run_rows()[run_id(1)]["phase"] == "review"


def test_nobody_is_asked_unless_that_is_switched_on(server: ModelServer, start: Callable[..., LooseDaemon]) -> None:
    server.put("pods", with_sidecar())
    daemon = start()
    daemon.settle()
    daemon.stop()
    assert server.asked(lambda request: "proxy" in request.path or "exec" in request.path) == []


@pytest.mark.parametrize(
    "garbage", [b"", b"[" * 5000, b'{"phase": 7, "progress": "x", "heartbeatAge": 1e999}', b"<html>"]
)
def test_a_sidecars_garbage_harms_nothing(
    garbage: bytes, server: ModelServer, start: Callable[..., LooseDaemon]
) -> None:
    server.put("pods", with_sidecar())
    server.proxied[f"{POD}:9099"] = Response(200, garbage)
    daemon = start("sidecar")
    asked = len(server.requests)
    wait_until(lambda: len(server.requests) > asked + 2, PATIENCE_S, "the sidecar was asked again")
    row = daemon.run_rows()[run_id(1)]
    assert (row["status"], row["phase"], row["progress_total"]) == ("running", None, None)
    assert "defect" not in daemon.log


def asked(server: ModelServer, tmp_path: Path, *sources: str) -> ReportAsked:
    """Return what a run's own processes say, asked at once."""
    path = server.kubeconfig(tmp_path / "kubeconfig", Access(auth="token"))
    settings = Settings("", "", str(tmp_path / "cache.db"), None, timing=fabrik_daemon.Timing(answer=3.0))
    direct = Direct(settings, io.StringIO())
    found: list[ReportAsked] = []

    def done(what: ReportAsked) -> None:
        found.append(what)
        direct.reactor.call_soon(direct.reactor.stop)

    run = Run(run_id(1), "test", NAMESPACE, "running", pod_name=POD)
    ask_report(direct.site(ClusterSpec("test", str(path))), run, sources, done)
    direct.run(PATIENCE_S)
    direct.close()
    assert len(found) == 1
    return found[0]


def test_exec_reads_the_workspace(server: ModelServer, tmp_path: Path) -> None:
    server.writable = frozenset([EXEC])
    server.put("pods", pod(1))
    server.files[POD] = json.dumps({"phase": "validate", "current_task": "3:test", "pad": "x" * 9000}).encode()
    said = asked(server, tmp_path, "annotation", "exec")
    assert (said.report.phase, said.report.task, said.troubles) == ("validate", "3:test", ())
    (request,) = server.asked(lambda request: request.path == EXEC)
    assert request.query["command"] == "/workspace/.smithers/status.json"
    assert request.headers["authorization"] == "Bearer sesame"
    assert request.headers["sec-websocket-protocol"] == "v5.channel.k8s.io, v4.channel.k8s.io"
    server.files[POD] = b""
    assert asked(server, tmp_path, "exec").troubles == ("exec: command terminated",)
    del server.files[POD]
    assert asked(server, tmp_path, "exec").troubles == (f'exec: pods "{POD}" not found',)


def test_the_sidecar_leads_over_the_workspace(server: ModelServer, tmp_path: Path) -> None:
    server.writable = frozenset([EXEC])
    server.put("pods", with_sidecar())
    server.proxied[f"{POD}:9099"] = answer({"phase": "review"})
    server.files[POD] = json.dumps({"phase": "implement", "current_task": "3:impl"}).encode()
    said = asked(server, tmp_path, "sidecar", "exec")
    assert (said.report.phase, said.report.task, said.troubles) == ("review", "3:impl", ())


def test_what_is_asked_without_sources_is_nothing(server: ModelServer, tmp_path: Path) -> None:
    said = asked(server, tmp_path, "annotation")
    assert said == ReportAsked(fabrik_daemon.NO_REPORT, ())
    assert server.requests == []
    assert asked(server, tmp_path, "sidecar").troubles == ("sidecar: its Pod is gone",)


def test_a_report_fills_only_what_annotations_leave_open() -> None:
    report = report_from_status({**SAID, "phase": "gate", "status": "cancelled"}, 1_790_000_000)
    assert (report.phase, report.status, report.heartbeat_at) == ("human-gate", None, "2026-09-21T14:13:16Z")
    run = Run("x", "test", NAMESPACE, "running", current_task="1:plan")
    filled = fill_run(run, report)
    assert (filled.current_task, filled.phase, filled.progress_total) == ("1:plan", "human-gate", 192)
    assert filled.status == "blocked"
    over = run._replace(status="failed")
    assert fill_run(over, report) == over


def test_a_fresh_run_is_read_by_exec_where_that_is_switched_on(
    server: ModelServer, executable: Path, unpacked: Path, tmp_path: Path
) -> None:
    server.writable = frozenset([EXEC])
    server.put("pods", pod(1))
    server.files[POD] = json.dumps({"phase": "gate", "current_task": "3:test"}).encode()
    place = (executable, unpacked, tmp_path / "daemon")
    cluster = Cluster(server, access=Access(auth="token"))
    daemon = LooseDaemon(place, [cluster], config={"statusSources": ["exec"]})
    row = daemon.json("runs", "show", run_id(1), "--fresh")
    assert (row["status"], row["phase"], row["current_task"]) == ("blocked", "human-gate", "3:test")
    (daemon.folder / "config.yaml").write_text("{}")
    row = daemon.json("runs", "show", run_id(1), "--fresh")
    assert (row["status"], row["phase"]) == ("running", None)
    assert len(server.asked(lambda request: request.path == EXEC)) == 1
