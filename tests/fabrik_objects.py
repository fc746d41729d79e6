"""Kubernetes objects as fabrik and its controllers make them, in the shape that tests/data/recordings shows.

Every builder takes the run's number or id, and `metadata` (labels, annotations, uid, creationTimestamp, ...) that is
laid over what it would put there. The same arguments make the same object.
"""

from __future__ import annotations

import json
import uuid
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

JsonObject = dict[str, Any]

NAMESPACE: Final = "fabrik-runs"
START: Final = datetime(2026, 11, 23, 12, 0, tzinfo=timezone.utc)
_CROCKFORD: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_IMAGE: Final = "ghcr.io/acme/fabrik-smithers:1.8.2"
_SMITHERS: Final = {"name": "smithers", "image": _IMAGE, "command": ["bun", "run", "/app/smithers.ts"], "resources": {}}


def time_text(seconds: float = 0) -> str:
    """Return the time so long after START, as Kubernetes writes it."""
    return (START + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def run_id(number: int) -> str:
    """Return the lower-case ULID of the run started `number` seconds after START."""
    value = (int(START.timestamp() * 1000) + number * 1000) << 80 | (number * 0x9E3779B97F4A7C15 & (1 << 80) - 1)
    return "".join(_CROCKFORD[value >> 5 * place & 31] for place in reversed(range(26)))


class Report(NamedTuple):
    """What smithers tells about itself on its Pod."""

    phase: str = "implement"
    status: str = "running"
    task: str = "16:impl"
    finished: int = 150
    total: int = 192
    attempt: int = 1
    updated: str = ""

    def labels(self) -> dict[str, str]:
        """Return its labels; none can hold a colon."""
        task = self.task.replace(":", "-")
        return {"fabrik.dev/phase": self.phase, "fabrik.dev/status": self.status, "fabrik.dev/task": task}

    def annotations(self) -> dict[str, str]:
        """Return its annotations."""
        progress = json.dumps({"finished": self.finished, "total": self.total}, separators=(",", ":"))
        return {
            "fabrik.dev/task": self.task,
            "fabrik.dev/progress": progress,
            "fabrik.dev/attempt": str(self.attempt),
            "fabrik.dev/iteration": "0",
            "fabrik.dev/updated": self.updated or time_text(),
        }


def job(
    run: int | str,
    *,
    namespace: str = NAMESPACE,
    conditions: Sequence[str] = (),
    suspend: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> JsonObject:
    """Return a run's Job; `conditions` are those that are True: Complete, Failed=DeadlineExceeded, ..."""
    run = _id_of(run)
    meta = _metadata("Job", f"fabrik-{run}", namespace, _run_labels(run), metadata)
    status: JsonObject = {"startTime": meta["creationTimestamp"], "active": 1, "ready": 0, "terminating": 0}
    if conditions:
        status = {"startTime": meta["creationTimestamp"], "conditions": [_condition(text) for text in conditions]}
        if "Complete" in conditions:
            status.update({"completionTime": time_text(600), "succeeded": 1})
    elif suspend:
        status = {"conditions": [_condition("Suspended=JobSuspended")]}
    template = {"metadata": {"labels": meta["labels"]}, "spec": {"containers": [_SMITHERS], "restartPolicy": "Never"}}
    spec = {"parallelism": 1, "backoffLimit": 0, "suspend": suspend, "template": template}
    return {"metadata": meta, "spec": spec, "status": status}


def pod(
    run: int | str,
    *,
    namespace: str = NAMESPACE,
    phase: str = "Running",
    report: Report | None = None,
    state: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> JsonObject:
    """Return a run's Pod; `state` is that of its container, by default the one that goes with `phase`."""
    run = _id_of(run)
    owner = f"fabrik-{run}"
    labels = {**_run_labels(run), "batch.kubernetes.io/job-name": owner, "job-name": owner}
    meta = _metadata("Pod", f"{owner}-{run[-5:]}", namespace, labels, None)
    uid = _uid("Job", namespace, owner)
    meta["ownerReferences"] = [{"apiVersion": "batch/v1", "kind": "Job", "name": owner, "uid": uid, "controller": True}]
    if report:
        meta["labels"] = {**labels, **report.labels()}
        meta["annotations"] = report.annotations()
    status: JsonObject = {"phase": phase, "qosClass": "BestEffort"}
    state = _STATES.get(phase) if state is None else state
    if state:
        container = {"name": "smithers", "image": _IMAGE, "restartCount": 0, "ready": phase == "Running"}
        status["containerStatuses"] = [{**container, "state": dict(state), "lastState": {}}]
        status["startTime"] = meta["creationTimestamp"]
    spec = {"containers": [_SMITHERS], "restartPolicy": "Never", "nodeName": "k3s-agent-1" if state else ""}
    return {"metadata": _overlay(meta, metadata), "spec": spec, "status": status}


_STATES: Final[dict[str, JsonObject]] = {
    "Running": {"running": {"startedAt": time_text(4)}},
    "Succeeded": {"terminated": {"exitCode": 0, "reason": "Completed", "finishedAt": time_text(600)}},
    "Failed": {"terminated": {"exitCode": 1, "reason": "Error", "finishedAt": time_text(600)}},
}


def pvc(
    run: int | str, *, namespace: str = NAMESPACE, capacity: str = "10Gi", metadata: Mapping[str, Any] | None = None
) -> JsonObject:
    """Return a run's workspace; without a capacity it is still Pending."""
    run = _id_of(run)
    labels = {**_MANAGED, "fabrik.dev/run-id": run}
    meta = _metadata("PersistentVolumeClaim", f"data-fabrik-{run}", namespace, labels, metadata)
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": capacity or "10Gi"}}}
    status = {"phase": "Bound", "capacity": {"storage": capacity}} if capacity else {"phase": "Pending"}
    return {"metadata": meta, "spec": {**spec, "storageClassName": "local-path"}, "status": status}


def cronjob(
    schedule_id: str,
    schedule: str = "0 3 * * *",
    *,
    namespace: str = NAMESPACE,
    suspend: bool = False,
    status: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> JsonObject:
    """Return a schedule."""
    labels = {**_MANAGED, "fabrik.dev/schedule-id": schedule_id}
    meta = _metadata("CronJob", f"fabrik-schedule-{schedule_id}", namespace, labels, metadata)
    spec = {"schedule": schedule, "timeZone": "Europe/Berlin", "concurrencyPolicy": "Forbid", "suspend": suspend}
    return {"metadata": meta, "spec": {**spec, "jobTemplate": {"spec": {}}}, "status": dict(status or {})}


def event(
    about: JsonObject, reason: str, message: str, *, count: int = 1, kind: str = "Warning", involved: str = "Pod"
) -> JsonObject:
    """Return an Event about an object of the kind `involved`; the same reason about it makes the same Event."""
    target = about["metadata"]
    name = f"{target['name']}.{uuid.uuid5(uuid.NAMESPACE_OID, reason).hex[:16]}"
    reference = {"kind": involved, "namespace": target["namespace"], "name": target["name"], "uid": target["uid"]}
    return {
        "metadata": _metadata("Event", name, target["namespace"], {}, None),
        "involvedObject": reference,
        "reason": reason,
        "message": message,
        "type": kind,
        "count": count,
        "firstTimestamp": time_text(),
        "lastTimestamp": time_text(count - 1),
        "source": {"component": "kubelet"},
        "eventTime": None,
        "reportingComponent": "kubelet",
        "reportingInstance": "",
    }


_MANAGED: Final = {"app.kubernetes.io/managed-by": "fabrik", "fabrik.dev/managed-by": "fabrik"}


def _id_of(run: int | str) -> str:
    return run_id(run) if isinstance(run, int) else run


def _run_labels(run: str) -> dict[str, str]:
    spec = {"fabrik.dev/spec-id": "feature-x", "fabrik.dev/template": "coding", "fabrik.dev/project": "myapp"}
    return {**_MANAGED, "fabrik.dev/run-id": run, **spec}


def _uid(kind: str, namespace: str, name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{kind}/{namespace}/{name}"))


def _metadata(
    kind: str, name: str, namespace: str, labels: Mapping[str, str], over: Mapping[str, Any] | None
) -> JsonObject:
    made: JsonObject = {"name": name, "namespace": namespace, "uid": _uid(kind, namespace, name)}
    return _overlay({**made, "creationTimestamp": time_text(), "labels": dict(labels)}, over)


def _overlay(metadata: JsonObject, over: Mapping[str, Any] | None) -> JsonObject:
    merged = {**metadata, **(over or {})}
    for key in ("labels", "annotations"):
        if over and key in over:
            merged[key] = {**metadata.get(key, {}), **over[key]}
    return merged


def _condition(text: str) -> JsonObject:
    name, _, reason = text.partition("=")
    times = {"lastProbeTime": time_text(600), "lastTransitionTime": time_text(600)}
    return {"type": name, "status": "True", **times, "reason": reason, "message": reason}
