"""Objects as fabrik, its controllers and smithers make them, living and dying; each state carries what it means."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Callable, Final, NamedTuple

from fabrik_objects import run_id

import fabrik_daemon

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from random import Random

    from simulation.apiserver import ApiServer

JsonObject = dict[str, Any]
Life = "Generator[float, None, None]"

OLD_WORDS: Final = {"discover": "interview", "human-gate": "gate"}
DIALECTS: Final = ("both", "json", "labels", "old")
MANAGED: Final = {"app.kubernetes.io/managed-by": "fabrik"}


class Said(NamedTuple):
    """What a row shows of smithers' report."""

    phase: str | None = None
    current_task: str | None = None
    progress_finished: int | None = None
    progress_total: int | None = None
    task_attempt: int | None = None
    iteration: int | None = None
    heartbeat_at: str | None = None


class JobTruth(NamedTuple):
    """What a state of a Job means."""

    id: str
    name: str
    uid: str
    created_at: str
    cronjob: tuple[str, str] | None = None  # name and uid of its owner
    schedule_id: str | None = None
    suspended: bool = False
    started_at: str | None = None
    conditions: tuple[tuple[str, str], ...] = ()  # those that are True, with their reasons
    ended_at: str | None = None
    deleting: bool = False
    cancelled: bool = False  # by its label
    is_fabrik: bool = True

    @property
    def outcome(self) -> str | None:
        kinds = {kind for kind, _ in self.conditions}
        if kinds & {"Complete", "SuccessCriteriaMet"}:
            return "finished"
        return "failed" if kinds & {"Failed", "FailureTarget"} else None


class PodTruth(NamedTuple):
    """What a state of a Pod means."""

    id: str
    name: str
    uid: str
    job_name: str
    job_uid: str
    created_at: str
    phase: str = "Pending"
    reason: str | None = None
    waiting: str | None = None
    exit_code: int | None = None
    ended_at: str | None = None
    deleting: bool = False
    said: Said = Said()
    dialect: str = "both"
    labelled: bool = True


class VolumeTruth(NamedTuple):
    """What a state of a PersistentVolumeClaim means."""

    id: str
    name: str
    uid: str
    created_at: str
    phase: str = "Pending"
    capacity_bytes: int | None = None
    storage_class: str = "local-path"


class ScheduleTruth(NamedTuple):
    """What a state of a CronJob means."""

    schedule_id: str
    name: str
    uid: str
    created_at: str
    schedule: str = "*/5 * * * *"
    time_zone: str | None = "Europe/Berlin"
    suspended: bool = False
    active: int = 0
    last_run_at: str | None = None
    last_success_at: str | None = None


class EventTruth(NamedTuple):
    """What a state of an Event means."""

    id: str
    name: str
    uid: str
    warning: bool
    kind: str
    about: str
    about_uid: str
    reason: str
    repeats: int = 1
    last_at: str | None = None


def report(said: Said, dialect: str) -> tuple[JsonObject, JsonObject, Said]:
    """Return the labels and annotations that say so in a dialect, and what of it a dialect can hold."""
    task, phase = said.current_task or "", said.phase or ""
    progress = {"finished": said.progress_finished, "total": said.progress_total}
    if dialect == "json":
        value = {"phase": phase, "current_task": task, "attempt": said.task_attempt, "progress": progress}
        return {}, {"fabrik.dev/status": json.dumps(value)}, said._replace(iteration=None, heartbeat_at=None)
    labels = {"fabrik.dev/phase": phase, "fabrik.dev/task": task.replace(":", "-")}
    labels["fabrik.dev/status"] = "blocked" if phase == "human-gate" else "running"
    if dialect == "labels":
        return labels, {}, Said(phase, task)
    if dialect == "old":
        labels["fabrik.dev/phase"] = OLD_WORDS.get(phase, phase)
    annotations = {
        "fabrik.dev/task": task,
        "fabrik.dev/progress": json.dumps(progress),
        "fabrik.dev/attempt": str(said.task_attempt),
        "fabrik.dev/iteration": str(said.iteration),
        "fabrik.dev/updated": said.heartbeat_at,
    }
    return labels, annotations, said


def job_json(namespace: str, truth: JobTruth) -> JsonObject:
    labels: JsonObject = {}
    if truth.is_fabrik:
        labels = {**MANAGED, "fabrik.dev/spec-id": "feature-x", "fabrik.dev/project": "myapp"}
    if truth.is_fabrik and truth.cronjob is None:
        labels["fabrik.dev/run-id"] = truth.id
    if truth.cancelled:
        labels["fabrik.dev/status"] = "cancelled"
    metadata = _metadata(namespace, truth, labels)
    if truth.cronjob:
        metadata["ownerReferences"] = [{"kind": "CronJob", "name": truth.cronjob[0], "uid": truth.cronjob[1]}]
    if truth.deleting:
        metadata["deletionTimestamp"] = truth.created_at
        metadata["finalizers"] = ["foregroundDeletion"]
    conditions = [
        {"type": kind, "status": "True", "reason": reason, "lastTransitionTime": truth.ended_at}
        for kind, reason in truth.conditions
    ]
    if truth.suspended or truth.started_at:
        conditions.insert(0, {"type": "Suspended", "status": str(truth.suspended), "reason": "JobSuspended"})
    status = {"startTime": truth.started_at, "conditions": conditions}
    if ("Complete", "CompletionsReached") in truth.conditions:
        status["completionTime"] = truth.ended_at
    return {"metadata": metadata, "spec": {"suspend": truth.suspended}, "status": status}


def pod_json(namespace: str, truth: PodTruth) -> JsonObject:
    labels: JsonObject = {**MANAGED, "batch.kubernetes.io/job-name": truth.job_name}
    if truth.labelled:
        labels["fabrik.dev/run-id"] = truth.id
    annotations: JsonObject = {}
    if truth.said.phase is not None:
        more, annotations, _ = report(truth.said, truth.dialect)
        labels.update(more)
    metadata = {**_metadata(namespace, truth, labels), "annotations": annotations}
    metadata["ownerReferences"] = [{"kind": "Job", "name": truth.job_name, "uid": truth.job_uid}]
    if truth.deleting:
        metadata["deletionTimestamp"] = truth.created_at
    state: JsonObject = {}
    if truth.exit_code is not None:
        state = {"terminated": {"exitCode": truth.exit_code, "reason": truth.reason, "finishedAt": truth.ended_at}}
    elif truth.waiting:
        state = {"waiting": {"reason": truth.waiting}}
    status: JsonObject = {"phase": truth.phase, "containerStatuses": [{"name": "smithers", "state": state}]}
    if truth.reason and truth.exit_code is None:
        status["reason"] = truth.reason
    return {"metadata": metadata, "spec": {}, "status": status}


def volume_json(namespace: str, truth: VolumeTruth) -> JsonObject:
    status: JsonObject = {"phase": truth.phase}
    if truth.capacity_bytes is not None:
        status["capacity"] = {"storage": f"{truth.capacity_bytes >> 30}Gi"}
    labels = {**MANAGED, "fabrik.dev/run-id": truth.id}
    spec = {"storageClassName": truth.storage_class}
    return {"metadata": _metadata(namespace, truth, labels), "spec": spec, "status": status}


def schedule_json(namespace: str, truth: ScheduleTruth) -> JsonObject:
    labels = {**MANAGED, "fabrik.dev/schedule-id": truth.schedule_id}
    spec = {"schedule": truth.schedule, "timeZone": truth.time_zone, "suspend": truth.suspended}
    status: JsonObject = {"active": [{}] * truth.active, "lastScheduleTime": truth.last_run_at}
    status["lastSuccessfulTime"] = truth.last_success_at
    return {"metadata": _metadata(namespace, truth, labels), "spec": spec, "status": status}


def event_json(namespace: str, truth: EventTruth) -> JsonObject:
    about = {"kind": truth.kind, "name": truth.about, "uid": truth.about_uid, "namespace": namespace}
    return {
        "metadata": {"name": truth.name, "namespace": namespace, "uid": truth.uid},
        "involvedObject": about,
        "type": "Warning" if truth.warning else "Normal",
        "reason": truth.reason,
        "message": f"{truth.reason} about {truth.about}",
        "count": truth.repeats,
        "firstTimestamp": truth.last_at,
        "lastTimestamp": truth.last_at,
    }


def _metadata(namespace: str, truth: Any, labels: JsonObject) -> JsonObject:
    metadata = {"name": truth.name, "namespace": namespace, "uid": truth.uid, "labels": labels}
    return {**metadata, "creationTimestamp": truth.created_at}


_MAKERS: Final[dict[str, Callable[[str, Any], JsonObject]]] = {
    "jobs": job_json,
    "pods": pod_json,
    "persistentvolumeclaims": volume_json,
    "cronjobs": schedule_json,
    "events": event_json,
}


class Actor:
    """Makes and changes the objects of one run, or of one schedule."""

    def __init__(self, server: ApiServer, namespace: str, label_id: str) -> None:
        self.server = server
        self.chance: Random = server.world.chance
        self.namespace = namespace
        self.id = label_id
        self.dialect = self.chance.choice(DIALECTS)

    def now(self) -> str:
        return fabrik_daemon.format_time(self.server.world.wall() // 1)

    def set(self, resource: str, truth: Any) -> Any:
        raw = _MAKERS[resource](self.namespace, truth)
        self.server.put((resource, self.namespace, truth.name), raw, truth)
        return truth

    def drop(self, resource: str, truth: Any) -> None:
        key = (resource, self.namespace, truth.name)
        if key in self.server.objects and self.server.objects[key].uid == truth.uid:
            self.server.delete(key)

    def job(self, name: str = "", **more: Any) -> JobTruth:
        name = name or f"fabrik-{self.id}"
        made = JobTruth(self.id, name, self.server.new_uid(), self.now(), **more)
        started = None if made.suspended else made.created_at
        job: JobTruth = self.set("jobs", made._replace(started_at=started))
        return job

    def pod(self, job: JobTruth) -> PodTruth:
        suffix = f"{self.chance.getrandbits(24):06x}"
        labelled = job.cronjob is None and self.chance.random() < 0.7
        made = PodTruth(self.id, f"{job.name}-{suffix}", self.server.new_uid(), job.name, job.uid, self.now())
        pod: PodTruth = self.set("pods", made._replace(dialect=self.dialect, labelled=labelled))
        return pod

    def say(self, pod: PodTruth, phase: str, done: int, attempt: int = 1) -> PodTruth:
        said = Said(phase, f"{1 + done // 10}:impl", done, 192, attempt, done // 40, self.now())
        told: PodTruth = self.set("pods", pod._replace(phase="Running", said=said))
        return told

    def tell(self, kind: str, about: Any, reason: str, *, warning: bool = True, repeats: int = 1) -> None:
        name = f"{about.name}.{abs(zlib_hash(reason)):08x}"
        key = ("events", self.namespace, name)
        known = self.server.objects.get(key)
        uid = known.uid if known is not None else self.server.new_uid()
        self.set(
            "events", EventTruth(self.id, name, uid, warning, kind, about.name, about.uid, reason, repeats, self.now())
        )

    def pause(self, most: float) -> float:
        """Return a while: often short, sometimes up to so many seconds."""
        return self.chance.uniform(0.05, 2.0) if self.chance.random() < 0.4 else self.chance.uniform(0.5, most)

    # Parts of lives

    def volume(self) -> Iterator[float]:
        made = VolumeTruth(self.id, f"data-fabrik-{self.id}", self.server.new_uid(), self.now())
        self.set("persistentvolumeclaims", made)
        yield self.pause(4)
        self.set(
            "persistentvolumeclaims", made._replace(phase="Bound", capacity_bytes=self.chance.choice((5, 10)) << 30)
        )

    def work(self, pod: PodTruth, steps: int, attempt: int = 1) -> Generator[float, None, PodTruth]:
        """Let a Pod run and report, now and then at the human gate."""
        yield self.pause(10)
        if self.chance.random() < 0.2:
            pod = self.set("pods", pod._replace(waiting="ImagePullBackOff"))
            for repeats in range(1, self.chance.randint(2, 4)):
                self.tell("Pod", pod, "BackOff", repeats=repeats)
                yield self.pause(30)
            pod = pod._replace(waiting=None)
        done = 0
        for _ in range(steps):
            phase = (
                "human-gate" if self.chance.random() < 0.2 else self.chance.choice(("discover", "implement", "review"))
            )
            done = min(192, done + self.chance.randint(0, 40))
            pod = self.say(pod, phase, done, attempt)
            yield self.pause(90 if phase == "human-gate" else 45)
            if self.chance.random() < 0.06:
                pod = self.set("pods", pod._replace(phase="Unknown"))
                yield self.pause(60)
        return pod

    def finish(self, job: JobTruth, pod: PodTruth) -> Generator[float, None, JobTruth]:
        pod = self.say(pod, "done", 192)
        yield self.pause(5)
        self.set("pods", pod._replace(phase="Succeeded", reason="Completed", exit_code=0, ended_at=self.now()))
        yield self.pause(3)
        job = self.set(
            "jobs", job._replace(conditions=(("SuccessCriteriaMet", "CompletionsReached"),), ended_at=self.now())
        )
        yield self.pause(3)
        conditions = (*job.conditions, ("Complete", "CompletionsReached"))
        job = self.set("jobs", job._replace(conditions=conditions, ended_at=self.now()))
        self.tell("Job", job, "Completed", warning=False)
        return job

    def fail(self, job: JobTruth, pod: PodTruth, reason: str) -> Generator[float, None, JobTruth]:
        deadline = reason == "DeadlineExceeded"
        why = reason if deadline else "BackoffLimitExceeded"
        if not deadline:
            ended = pod._replace(phase="Failed", reason=reason, exit_code=137, ended_at=self.now())
            pod = self.set("pods", ended)
            yield self.pause(4)
        job = self.set("jobs", job._replace(conditions=(("FailureTarget", why),), ended_at=self.now()))
        yield self.pause(4)
        job = self.set("jobs", job._replace(conditions=(*job.conditions, ("Failed", why)), ended_at=self.now()))
        self.tell("Job", job, why)
        if deadline:
            yield self.pause(3)
            self.drop("pods", pod)
        return job

    def remove(self, job: JobTruth, *, foreground: bool) -> Iterator[float]:
        """Delete a Job: straight, its Pods after it; or its Pods first, with a finalizer, as its TTL does."""
        pods = [
            version.truth
            for key, version in self.server.objects.items()
            if key[0] == "pods" and key[1] == self.namespace and version.truth.job_uid == job.uid
        ]
        if foreground:
            job = self.set("jobs", job._replace(deleting=True))
            yield self.pause(3)
        else:
            self.drop("jobs", job)
            yield self.pause(2)
        for pod in pods:
            going = self.set("pods", pod._replace(deleting=True))
            yield self.pause(4)
            self.drop("pods", going)
        if foreground:
            yield self.pause(2)
            self.drop("jobs", job)
        if self.chance.random() < 0.5:
            yield self.pause(20)
            volume = self.server.objects.get(("persistentvolumeclaims", self.namespace, f"data-fabrik-{self.id}"))
            if volume is not None:
                self.server.delete(volume.key)


def zlib_hash(text: str) -> int:
    """Return the same number for the same text, in every process."""
    value = 7
    for character in text:
        value = (value * 31 + ord(character)) % (1 << 32)
    return value


def run_life(actor: Actor) -> Generator[float, None, None]:
    """Live through one of the ways that a run can go."""
    chance = actor.chance
    way = chance.choice(
        ("well", "well", "well", "fails", "deadline", "cancelled", "label", "evicted", "suspended", "short")
    )
    job = actor.job(suspended=way == "suspended")
    if chance.random() < 0.6:
        yield from actor.volume()
    if way == "suspended":
        yield actor.pause(120)
        job = actor.set("jobs", job._replace(suspended=False, started_at=actor.now()))
    if way == "short":
        yield actor.pause(3)
        actor.drop("jobs", job)
        return
    yield actor.pause(5)
    pod = yield from actor.work(actor.pod(job), chance.randint(0, 6))
    if way == "evicted":
        pod = actor.set("pods", pod._replace(phase="Failed", reason="Evicted", exit_code=None))
        actor.tell("Pod", pod, "Evicted")
        yield actor.pause(12)
        following = actor.pod(job)
        yield actor.pause(2)
        actor.drop("pods", actor.set("pods", pod._replace(deleting=True)))
        pod = yield from actor.work(following, chance.randint(1, 3), attempt=2)
    if way in ("fails", "deadline"):
        job = yield from actor.fail(job, pod, "DeadlineExceeded" if way == "deadline" else "OOMKilled")
    elif way == "label":
        job = actor.set("jobs", job._replace(cancelled=True))
    elif way != "cancelled":
        job = yield from actor.finish(job, pod)
    yield from _afterlife(actor, job, way)


def _afterlife(actor: Actor, job: JobTruth, way: str) -> Generator[float, None, None]:
    chance = actor.chance
    yield actor.pause(400)
    if way == "cancelled" or chance.random() < 0.5:
        yield from actor.remove(job, foreground=chance.random() < 0.5)
        if chance.random() < 0.3:
            yield 2 + actor.pause(60)  # the same id again, by another Job
            again = actor.job()
            pod = yield from actor.work(actor.pod(again), 2)
            if chance.random() < 0.5:
                yield from actor.finish(again, pod)
    elif chance.random() < 0.2:
        yield 2.0
        other = actor.job(name=f"fabrik-{actor.id}-retry")  # a second Job with the id: the newest is the run
        pod = yield from actor.work(actor.pod(other), 1)
        if chance.random() < 0.5:
            actor.drop("jobs", job)
        yield from actor.finish(other, pod)


def schedule_life(actor: Actor) -> Generator[float, None, None]:
    """Live as a CronJob whose Jobs carry no run id."""
    chance = actor.chance
    made = ScheduleTruth(actor.id, f"fabrik-schedule-{actor.id}", actor.server.new_uid(), actor.now())
    schedule: ScheduleTruth = actor.set("cronjobs", made)
    jobs: list[tuple[Actor, JobTruth]] = []
    for _ in range(chance.randint(1, 4)):
        yield actor.pause(300)
        number = int(actor.server.world.wall() // 60)
        job_actor = Actor(actor.server, actor.namespace, f"{schedule.name}-{number}")
        if ("jobs", actor.namespace, job_actor.id) in actor.server.objects:
            continue
        job = job_actor.job(job_actor.id, cronjob=(schedule.name, schedule.uid), schedule_id=actor.id)
        schedule = actor.set("cronjobs", schedule._replace(active=1, last_run_at=actor.now()))
        pod = yield from job_actor.work(job_actor.pod(job), 1)
        job = yield from job_actor.finish(job, pod)
        schedule = actor.set("cronjobs", schedule._replace(active=0, last_success_at=actor.now()))
        jobs.append((job_actor, job))
        if len(jobs) > 1:
            old_actor, old = jobs.pop(0)
            yield from old_actor.remove(old, foreground=False)
    if chance.random() < 0.3:
        schedule = actor.set("cronjobs", schedule._replace(suspended=True))
        yield actor.pause(200)
        if chance.random() < 0.5:
            actor.drop("cronjobs", schedule)


def foreign_life(actor: Actor) -> Generator[float, None, None]:
    """Live as something that is none of fabrik's business."""
    job = actor.job(f"backup-{actor.id[-6:]}", is_fabrik=False)
    yield actor.pause(60)
    actor.drop("jobs", job)


def begin_life(server: ApiServer, namespaces: tuple[str, ...], number: int) -> None:
    """Let something new begin to live on a server."""
    chance = server.world.chance
    namespace = chance.choice(namespaces)
    kind = chance.random()
    if kind < 0.12:
        server.live(schedule_life(Actor(server, namespace, f"s{number}")))
    elif kind < 0.17:
        server.live(foreign_life(Actor(server, namespace, run_id(number))))
    else:
        shared = chance.random() < 0.05 and namespace not in server.shared  # an id that another place may have as well
        server.shared += [namespace] if shared else []
        server.live(run_life(Actor(server, namespace, run_id(1 if shared else 100 + number))))
