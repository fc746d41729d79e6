from __future__ import annotations

import zoneinfo
from typing import Any

import pytest
from fabrik_objects import NAMESPACE, Report, cronjob, event, job, pod, pvc, run_id, time_text
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fabrik_daemon import (
    BLOCKED,
    CANCELLED,
    CRONJOBS,
    EVENTS,
    FAILED,
    FINISHED,
    JOBS,
    PENDING,
    PODS,
    RUNNING,
    SEQ_BLOCK,
    VOLUMES,
    Change,
    ClusterEvent,
    Commit,
    Facts,
    ObjectKey,
    Progress,
    Resource,
    Run,
    RunEvent,
    Scope,
    Seen,
    Snapshot,
    Store,
    Volume,
    epoch_of,
    facts_from,
    run_events_of,
)

JsonObject = dict[str, Any]
RUN = run_id(1)
NOW = epoch_of(time_text()) or 0.0
MANAGED = {"app.kubernetes.io/managed-by": "fabrik"}


class World:
    """A Store, the time, and what the cache would hold: objects and rows as the commits left them."""

    def __init__(self, *, listed: bool = True) -> None:
        self.store = Store(zoneinfo.ZoneInfo)
        self.now = NOW
        self.version = 0
        self.objects: dict[ObjectKey, Facts] = {}
        self.changes: list[Change] = []
        self.malformed: list[tuple[str, tuple[str, ...]]] = []
        if listed:
            for resource in (JOBS, CRONJOBS, PODS, VOLUMES, EVENTS):
                self.relist(resource)
            self.store.settle()

    def keep(self, commit: Commit) -> Commit:
        self.now += 1
        self.changes += commit.changes
        self.malformed += commit.malformed
        for key, facts in commit.objects:
            if facts is None:
                self.objects.pop(key, None)
            else:
                self.objects[key] = facts
        return commit

    def _progress(self, resource: Resource, cluster: str, namespace: str) -> Progress:
        self.version += 1
        return Progress(Scope(cluster, resource.name, namespace), str(self.version), "now")

    def see(self, resource: Resource, item: JsonObject, cluster: str = "c") -> Commit:
        name = item["metadata"]["namespace"], item["metadata"]["name"]
        progress = self._progress(resource, cluster, NAMESPACE)
        return self.keep(self.store.observe(progress, [Seen(name, facts_from(resource.name, item))], self.now))

    def delete(self, resource: Resource, item: JsonObject) -> Commit:
        name = item["metadata"]["namespace"], item["metadata"]["name"]
        progress = self._progress(resource, "c", NAMESPACE)
        return self.keep(self.store.observe(progress, [Seen(name, facts_from(resource.name, item), True)], self.now))

    def relist(self, resource: Resource, *items: JsonObject, cluster: str = "c", namespace: str = NAMESPACE) -> Commit:
        facts = [found for item in items if (found := facts_from(resource.name, item)) is not None]
        return self.keep(self.store.replace(self._progress(resource, cluster, namespace), facts, self.now))

    def tick(self, seconds: float, retention: float = 1e9) -> Commit:
        self.now += seconds
        return self.keep(self.store.tick(self.now, retention))

    def restart(self) -> None:
        """Begin again from what the cache would hold."""
        tables = self.store.tables
        rows = [row for kind in (Run, Volume, ClusterEvent) for row in tables.rows(kind)]
        synced = [Scope("c", resource.name, NAMESPACE) for resource in (JOBS, CRONJOBS, PODS, VOLUMES, EVENTS)]
        self.store = Store(zoneinfo.ZoneInfo)
        self.store.load(Snapshot(list(self.objects.items()), rows, synced, tables.seq))

    def run(self, key: str = RUN) -> Run:
        run = self.store.tables.run(key)
        assert run is not None
        return run

    def runs(self) -> list[str]:
        return [row.run_id for row in self.store.tables.rows(Run) if isinstance(row, Run)]

    def status(self, key: str = RUN) -> tuple[str | None, str | None]:
        return self.run(key).status, self.run(key).reason

    def told(self) -> list[tuple[str | None, str | None]]:
        """Return every status change of all runs, in order."""
        events = [event for change in self.changes for event in run_events_of(change)]
        return [(e.payload["from"], e.payload["to"]) for e in events if e.event_type == "status_changed"]


@pytest.fixture
def world() -> World:
    return World()


def test_a_run_s_life(world: World) -> None:
    world.see(JOBS, job(1))
    world.see(PODS, pod(1, phase="Pending"))
    world.see(PODS, pod(1, report=Report()))
    world.see(PODS, pod(1, report=Report(phase="human-gate")))
    world.see(PODS, pod(1, report=Report()))
    world.see(PODS, pod(1, phase="Succeeded", report=Report(phase="done", finished=192)))
    world.see(JOBS, job(1, conditions=["SuccessCriteriaMet", "Complete"]))
    assert world.told() == [
        (None, PENDING),
        (PENDING, RUNNING),
        (RUNNING, BLOCKED),
        (BLOCKED, RUNNING),
        (RUNNING, PENDING),
        (PENDING, FINISHED),
    ]
    run = world.run()
    assert (run.status, run.phase, run.progress_finished, run.finished_at) == (FINISHED, "done", 192, time_text(600))


def test_the_same_thing_seen_twice_is_no_change(world: World) -> None:
    world.see(JOBS, job(1))
    world.see(PODS, pod(1, report=Report()))
    for commit in (world.see(JOBS, job(1)), world.see(PODS, pod(1, report=Report()))):
        assert (commit.changes, commit.objects) == ((), ())
        assert commit.progress is not None
    assert world.relist(JOBS, job(1)).changes == ()


def test_a_heartbeat_changes_the_heartbeat_and_nothing_else(world: World) -> None:
    world.see(JOBS, job(1))
    world.see(PODS, pod(1, report=Report(updated=time_text(10))))
    before = world.run()
    (change,) = world.see(PODS, pod(1, report=Report(updated=time_text(40)))).changes
    assert change.type == "run:updated"
    assert run_events_of(change) == []
    differing = {name for name in Run._fields if getattr(change.row, name) != getattr(before, name)}
    assert differing == {"heartbeat_at", "updated_at", "last_sync_at"}
    assert world.run().heartbeat_at == time_text(40)


def test_pods_that_go_on_after_their_job_was_deleted_bring_nothing_back(world: World) -> None:
    world.see(JOBS, job(1))
    world.see(PODS, pod(1, report=Report()))
    world.delete(JOBS, job(1))
    ended = world.run()
    assert ended.status == CANCELLED
    assert ended.deleted_at is not None
    deleting = {"deletionTimestamp": time_text(90)}
    world.see(PODS, pod(1, report=Report(updated=time_text(70)), metadata=deleting))
    world.see(PODS, pod(1, phase="Failed", report=Report(updated=time_text(80)), metadata=deleting))
    world.delete(PODS, pod(1, phase="Failed", report=Report(), metadata=deleting))
    assert world.told() == [(None, PENDING), (PENDING, RUNNING), (RUNNING, CANCELLED)]
    assert world.run().finished_at == ended.finished_at


def test_a_finished_run_stays_when_its_job_s_time_to_live_ends(world: World) -> None:
    world.see(JOBS, job(1, conditions=["Complete"]))
    world.see(JOBS, job(1, conditions=["Complete"], metadata={"deletionTimestamp": time_text(700)}))
    world.delete(JOBS, job(1, conditions=["Complete"], metadata={"deletionTimestamp": time_text(700)}))
    run = world.run()
    assert (run.status, run.finished_at) == (FINISHED, time_text(600))
    assert run.deleted_at is not None
    assert len(world.told()) == 1


def test_a_job_that_a_relist_lacks_vanished_unseen(world: World) -> None:
    world.see(JOBS, job(1))
    world.see(PODS, pod(1, report=Report()))
    world.relist(JOBS)
    assert world.status() == (None, "VanishedUnseen")
    assert world.run().deleted_at is not None
    assert world.run().finished_at is None


def test_an_event_tells_how_a_vanished_job_ended_whenever_it_comes(world: World) -> None:
    completed = event(job(1), "Completed", "Job completed", kind="Normal", involved="Job")
    world.see(JOBS, job(1))
    world.relist(JOBS)
    world.see(EVENTS, completed)
    assert world.status() == (FINISHED, None)
    world.see(JOBS, job(2))
    world.see(EVENTS, event(job(2), "BackoffLimitExceeded", "m", involved="Job"))
    world.relist(JOBS)
    assert world.status(run_id(2)) == (FAILED, "BackoffLimitExceeded")


def test_an_event_about_another_job_of_that_name_tells_nothing(world: World) -> None:
    world.see(EVENTS, event(job(1, metadata={"uid": "older"}), "Completed", "m", kind="Normal", involved="Job"))
    world.see(JOBS, job(1))
    world.relist(JOBS)
    assert world.status() == (None, "VanishedUnseen")


def test_an_event_tells_of_a_job_that_only_its_label_makes_a_run(world: World) -> None:
    item = job(1, metadata={"name": "build-7"})
    world.see(JOBS, item)
    world.relist(JOBS)
    world.see(EVENTS, event(item, "Completed", "m", kind="Normal", involved="Job"))
    assert world.status() == (FINISHED, None)


def test_surviving_pods_tell_how_a_vanished_job_ended(world: World) -> None:
    world.see(JOBS, job(1))
    world.see(PODS, pod(1, report=Report()))
    world.relist(JOBS)
    world.see(PODS, pod(1, phase="Failed", state={"terminated": {"exitCode": 137, "reason": "OOMKilled"}}))
    assert world.status() == (FAILED, "OOMKilled")


def test_a_vanished_job_that_a_relist_shows_again_goes_on(world: World) -> None:
    world.see(JOBS, job(1))
    world.see(PODS, pod(1))
    world.relist(JOBS)
    world.relist(JOBS, job(1))
    assert world.status() == (RUNNING, None)
    assert world.run().deleted_at is None


def test_an_object_that_leaves_the_label_selection_and_returns_goes_on(world: World) -> None:
    world.see(JOBS, job(1))
    world.see(PODS, pod(1))
    world.delete(JOBS, job(1))
    assert world.run().status == CANCELLED
    world.see(JOBS, job(1))
    assert world.status() == (RUNNING, None)
    assert (world.run().deleted_at, world.run().finished_at) == (None, None)


def test_a_pod_that_is_gone_leaves_its_run_pending_until_the_next(world: World) -> None:
    world.see(JOBS, job(1))
    world.see(PODS, pod(1))
    world.delete(PODS, pod(1))
    assert world.run().status == PENDING
    world.see(PODS, pod(1, metadata={"name": f"fabrik-{RUN}-two", "uid": "two", "creationTimestamp": time_text(30)}))
    assert (world.run().status, world.run().pod_name) == (RUNNING, f"fabrik-{RUN}-two")


@pytest.mark.parametrize("conditions", [["Complete"], ["Failed=X"]])
def test_a_terminal_run_never_goes_back(world: World, conditions: list[str]) -> None:
    world.see(JOBS, job(1, conditions=conditions))
    ended = world.status()
    world.see(JOBS, job(1))
    world.see(PODS, pod(1, report=Report(phase="human-gate")))
    world.relist(JOBS, job(1))
    assert world.status() == ended
    assert world.run().finished_at == time_text(600)
    assert len(world.told()) == 1


@pytest.mark.parametrize("conditions", [["Complete"], ["Failed=X"]])
def test_a_new_job_with_the_same_id_starts_the_run_again(world: World, conditions: list[str]) -> None:
    world.see(JOBS, job(1, conditions=conditions))
    world.see(JOBS, job(1, metadata={"uid": "second", "creationTimestamp": time_text(900)}))
    run = world.run()
    assert (run.status, run.job_uid, run.finished_at) == (PENDING, "second", None)
    world.delete(JOBS, job(1, conditions=conditions))  # tells of the first
    assert world.run().status == PENDING


def test_of_two_jobs_with_one_id_the_newest_is_the_run(world: World) -> None:
    old = job(1)
    new = job(1, metadata={"name": f"fabrik-{RUN}-b", "uid": "new", "creationTimestamp": time_text(60)})
    world.see(JOBS, new)
    world.see(JOBS, old)
    assert world.run().job_uid == "new"
    assert world.delete(JOBS, old).changes == ()
    assert world.status() == (PENDING, None)
    world.delete(JOBS, new)
    assert world.run().status == CANCELLED


def test_an_older_pod_that_ends_after_a_newer_began_tells_nothing(world: World) -> None:
    world.see(JOBS, job(1))
    world.see(PODS, pod(1, phase="Failed"))
    world.see(PODS, pod(1, metadata={"name": "two", "uid": "2", "creationTimestamp": time_text(30)}))
    assert world.run().status == RUNNING
    assert world.delete(PODS, pod(1, phase="Failed")).changes == ()


def test_an_ended_run_keeps_the_last_pod_s_reason_in_whatever_order_its_pods_are_removed(world: World) -> None:
    first = pod(1, phase="Failed", report=Report(task="1:a"))
    later = {"name": f"fabrik-{RUN}-two", "uid": "2", "creationTimestamp": time_text(30)}
    killed = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    last = pod(1, phase="Failed", state=killed, report=Report(task="2:b"), metadata=later)
    for item in (first, last):
        world.see(PODS, item)
    world.see(JOBS, job(1, conditions=["Failed=BackoffLimitExceeded"]))
    assert (world.run().reason, world.run().current_task) == ("OOMKilled", "2:b")
    world.delete(PODS, last)
    assert (world.run().reason, world.run().current_task) == ("OOMKilled", "2:b")


def test_before_jobs_are_listed_pods_make_no_run() -> None:
    world = World(listed=False)
    world.relist(PODS, pod(1, phase="Succeeded"))
    assert world.runs() == []
    world.relist(JOBS, job(1))
    assert world.status() == (PENDING, None)


def test_a_pod_without_a_job_is_no_run_where_jobs_can_be_read(world: World) -> None:
    world.see(PODS, pod(1))
    assert world.runs() == []


def test_where_jobs_may_not_be_read_pods_tell_of_runs_provisionally() -> None:
    world = World(listed=False)
    world.keep(world.store.forbid(Scope("c", JOBS.name, NAMESPACE), NOW))
    world.relist(PODS, pod(1, phase="Succeeded"))
    assert world.status() == (FINISHED, None)
    world.relist(JOBS, job(1))  # the right was granted
    assert world.run().status == PENDING


def test_a_right_that_is_lost_does_not_unmake_what_is_known(world: World) -> None:
    world.see(JOBS, job(1))
    assert world.keep(world.store.forbid(Scope("c", JOBS.name, NAMESPACE), NOW)).changes == ()
    world.see(PODS, pod(2))
    assert world.runs() == [RUN]


def test_the_same_id_in_two_namespaces_is_two_runs() -> None:
    world = World(listed=False)
    other = job(1, namespace="team-b")
    world.relist(JOBS, other, job(1), namespace="")
    assert world.runs() == [RUN, f"{RUN}@c/team-b"]
    world.delete(JOBS, other)
    assert (world.run().status, world.run(f"{RUN}@c/team-b").status) == (PENDING, CANCELLED)
    assert world.run(f"{RUN}@c/team-b").id == RUN


def test_the_same_id_in_two_clusters_is_two_runs_and_the_plain_id_stays_where_it_was_given(world: World) -> None:
    world.relist(JOBS, cluster="d")
    world.see(JOBS, job(1), cluster="d")
    world.see(JOBS, job(1))
    assert world.runs() == [RUN, f"{RUN}@c/{NAMESPACE}"]
    assert world.run().cluster == "d"
    world.restart()
    world.see(JOBS, job(1, suspend=True))
    assert world.run(f"{RUN}@c/{NAMESPACE}").reason == "JobSuspended"
    assert world.run().cluster == "d"


def test_until_every_cluster_is_listed_the_lower_place_takes_the_plain_id() -> None:
    world = World(listed=False)
    world.relist(JOBS, job(1), cluster="d")
    world.relist(VOLUMES, pvc(1), cluster="d")
    world.relist(JOBS, job(1))
    assert sorted(world.runs()) == [RUN, f"{RUN}@d/{NAMESPACE}"]
    assert world.run().cluster == "c"
    assert keys_of_followers(world) == [f"{RUN}@d/{NAMESPACE}"]


def scheduled_job() -> JsonObject:
    owner = {"kind": "CronJob", "name": "fabrik-schedule-nightly", "uid": "u"}
    item = job(1, metadata={"name": "fabrik-schedule-nightly-29720040", "ownerReferences": [owner]})
    item["metadata"]["labels"] = dict(MANAGED)
    return item


def test_a_scheduled_job_is_always_named_with_its_place(world: World) -> None:
    world.see(JOBS, scheduled_job())
    key = f"fabrik-schedule-nightly-29720040@c/{NAMESPACE}"
    assert world.runs() == [key]
    assert (world.run(key).id, world.run(key).schedule_id) == ("fabrik-schedule-nightly-29720040", "nightly")
    item = pod(1)
    item["metadata"].update(labels={**MANAGED, "batch.kubernetes.io/job-name": "fabrik-schedule-nightly-29720040"})
    item["metadata"]["ownerReferences"] = [
        {"kind": "Job", "name": "fabrik-schedule-nightly-29720040", "uid": scheduled_job()["metadata"]["uid"]}
    ]
    world.see(PODS, item)
    assert world.status(key) == (RUNNING, None)
    world.see(EVENTS, event(scheduled_job(), "FailedCreate", "m", involved="Job"))
    (warning,) = world.store.tables.rows(ClusterEvent)
    assert isinstance(warning, ClusterEvent)
    assert warning.run_id == key


def test_volumes_and_warnings_that_come_before_their_run_get_its_key(world: World) -> None:
    for resource, item in ((VOLUMES, pvc(1)), (EVENTS, event(pod(1), "BackOff", "m"))):
        world.see(resource, item)
    assert keys_of_followers(world) == [RUN, RUN]
    world.relist(JOBS, job(1), cluster="d")  # takes the plain id meanwhile
    assert world.runs() == [RUN]
    world.see(JOBS, job(1))
    key = f"{RUN}@c/{NAMESPACE}"
    assert keys_of_followers(world) == [key, key]
    for resource, item in ((VOLUMES, pvc(1, capacity="")), (EVENTS, event(pod(1), "BackOff", "m", count=2))):
        world.see(resource, item)
    assert keys_of_followers(world) == [key, key]


def keys_of_followers(world: World) -> list[str | None]:
    rows = [row for kind in (Volume, ClusterEvent) for row in world.store.tables.rows(kind)]
    return [row.run_id for row in rows if isinstance(row, (Volume, ClusterEvent))]


def test_a_volume_s_life(world: World) -> None:
    world.see(VOLUMES, pvc(1, capacity=""))
    world.see(VOLUMES, pvc(1))
    world.delete(VOLUMES, pvc(1))
    assert [change.type for change in world.changes] == ["volume:added", "volume:updated", "volume:removed"]
    rows = [change.row for change in world.changes if isinstance(change.row, Volume)]
    assert [(row.phase, row.capacity_bytes) for row in rows] == [
        ("Pending", None),
        ("Bound", 10 << 30),
        ("Bound", 10 << 30),
    ]
    assert (rows[1].deleted_at is None, rows[2].deleted_at is None) == (True, False)


def test_a_warning_outlives_its_event_and_is_told_again_when_its_count_grows(world: World) -> None:
    for count in (1, 2):
        world.see(EVENTS, event(pod(1), "BackOff", "m", count=count))
    world.relist(EVENTS)
    assert [change.type for change in world.changes] == ["warning", "warning"]
    (row,) = world.store.tables.rows(ClusterEvent)
    assert isinstance(row, ClusterEvent)
    assert row.count == 2


def test_a_schedule_s_life(world: World) -> None:
    world.see(CRONJOBS, cronjob("nightly", "0 * * * *"))
    (change,) = world.tick(3600).changes
    assert change.type == "schedule:updated"
    world.see(CRONJOBS, cronjob("nightly", "0 * * * *", suspend=True))
    world.delete(CRONJOBS, cronjob("nightly"))
    assert [change.type for change in world.changes] == [
        "schedule:added",
        "schedule:updated",
        "schedule:updated",
        "schedule:removed",
    ]
    assert world.objects == {}


def test_an_object_that_is_fabrik_s_no_more_leaves(world: World) -> None:
    item = job(1, metadata={"name": "build-7"})
    world.see(JOBS, item)
    assert world.runs() == [RUN]
    item["metadata"]["labels"] = {}
    world.see(JOBS, item)
    assert world.runs() == []
    assert [change.type for change in world.changes] == ["run:added", "run:removed"]
    assert world.objects == {}


def test_a_job_whose_run_id_changes_is_another_run(world: World) -> None:
    world.see(JOBS, job(1, metadata={"name": "build-7"}))
    world.see(JOBS, job(2, metadata={"name": "build-7", "uid": job(1)["metadata"]["uid"]}))
    assert world.runs() == [run_id(2)]


def test_what_does_not_parse_is_reported_once_a_run(world: World) -> None:
    broken = {"annotations": {"fabrik.dev/attempt": "many"}}
    world.see(JOBS, job(1))
    for second in range(3):
        world.see(PODS, pod(1, report=Report(updated=time_text(second)), metadata=broken))
    assert world.malformed == [(RUN, ("attempt",))]
    world.see(JOBS, job(2, metadata=broken))
    assert world.malformed[1:] == [(run_id(2), ("attempt",))]


def test_a_run_leaves_by_retention_only_when_its_job_is_gone(world: World) -> None:
    world.see(JOBS, job(1, conditions=["Complete"]))
    world.see(PODS, pod(1, phase="Succeeded"))
    world.see(JOBS, job(2))
    world.tick(10_000, retention=5000)
    assert world.runs() == [RUN, run_id(2)]
    world.delete(PODS, pod(1, phase="Succeeded"))
    world.delete(JOBS, job(1, conditions=["Complete"]))
    world.tick(0, retention=50_000)
    assert world.runs() == [RUN, run_id(2)]
    assert [change.type for change in world.tick(0, retention=5000).changes] == ["run:removed"]
    assert world.runs() == [run_id(2)]
    assert [key.name for key in world.objects] == [f"fabrik-{run_id(2)}"]


def test_old_warnings_and_deleted_volumes_leave_by_retention(world: World) -> None:
    world.see(EVENTS, event(pod(1), "BackOff", "m"))
    world.see(VOLUMES, pvc(1))
    world.see(VOLUMES, pvc(2))
    world.delete(VOLUMES, pvc(2))
    world.tick(10_000, retention=50_000)
    assert len(world.store.tables.rows(ClusterEvent) + world.store.tables.rows(Volume)) == 3
    world.tick(0, retention=5000)
    assert [row[2] for row in world.store.tables.rows(Volume)] == [f"data-fabrik-{RUN}"]
    assert world.store.tables.rows(ClusterEvent) == []


def test_a_relist_touches_its_own_scope_alone() -> None:
    world = World(listed=False)
    world.relist(JOBS, job(1), job(2, namespace="team-b"), namespace="")
    world.relist(JOBS, job(3), cluster="d")
    world.relist(JOBS)  # of one namespace
    assert world.status() == (None, "VanishedUnseen")
    assert world.status(run_id(2)) == (PENDING, None)
    assert world.status(run_id(3)) == (PENDING, None)
    world.relist(PODS, namespace="")
    assert world.status(run_id(2)) == (PENDING, None)


def test_every_commit_carries_how_far_its_scope_was_followed(world: World) -> None:
    progress = Progress(Scope("c", JOBS.name, NAMESPACE), "opaque", "now")
    assert world.store.advance(progress, NOW) == Commit(progress=progress)
    facts = facts_from(JOBS.name, job(1))
    assert facts is not None
    name = (NAMESPACE, facts.name)
    for commit in (
        world.store.observe(progress, [Seen(name, facts)], NOW),
        world.store.observe(progress, [Seen(name, facts, True)], NOW),
        world.store.replace(progress, [facts], NOW),
        world.store.observe(progress, [Seen(("x", "y"), None)], NOW),
    ):
        assert commit.progress == progress


def test_sequence_numbers_rise_and_each_history_event_has_its_own(world: World) -> None:
    for number in range(3):
        world.see(JOBS, job(number))
        world.see(PODS, pod(number, report=Report(phase="human-gate")))
    numbers = [change.seq for change in world.changes]
    assert numbers == sorted(set(numbers))
    events = [event for change in world.changes for event in run_events_of(change)]
    assert len({event.id for event in events}) == len(events)
    assert [event.id for event in events if event.event_type == "status_changed"] == numbers
    assert world.store.tables.seq == max(event.id for event in events)


def test_numbers_are_reserved_in_blocks_before_they_run_out() -> None:
    world = World()
    reserved = 2 * SEQ_BLOCK  # as the cache does at start
    world.store.load(Snapshot((), (), [Scope("c", JOBS.name, NAMESPACE)], SEQ_BLOCK))
    for number in range(3 * SEQ_BLOCK // 2):
        commit = world.see(JOBS, job(1, suspend=number % 2 == 0))
        assert [change.seq for change in commit.changes] == [SEQ_BLOCK + number + 1]
        assert commit.changes[0].seq <= reserved
        if commit.reserved_seq is not None:
            assert commit.reserved_seq > reserved
            reserved = commit.reserved_seq
    assert reserved > 2 * SEQ_BLOCK


def test_a_restart_goes_on_where_the_cache_was(world: World) -> None:
    world.see(JOBS, job(1))
    world.see(PODS, pod(1, report=Report()))
    world.see(JOBS, job(2, conditions=["Complete"]))
    world.delete(JOBS, job(2, conditions=["Complete"]))
    world.see(JOBS, job(3))
    world.relist(JOBS, job(1))
    before = {key: world.run(key) for key in world.runs()}
    told = len(world.changes)
    world.restart()
    world.relist(JOBS, job(1))
    world.relist(PODS, pod(1, report=Report()))
    assert {key: world.run(key) for key in world.runs()} == before
    assert world.changes[told:] == []
    world.delete(JOBS, job(1))
    assert world.run().status == CANCELLED
    assert world.changes[told].seq > world.changes[told - 1].seq


def test_what_a_change_tells_of_a_run_s_history() -> None:
    run = Run(RUN, "c", NAMESPACE, RUNNING, current_task="1:a", progress_finished=1, progress_total=2, job_uid="u")
    blocked = run._replace(status=BLOCKED, phase="human-gate", reason="r", updated_at="then")
    assert run_events_of(Change(7, "run:updated", blocked, run, "now")) == [
        RunEvent(7, RUN, "status_changed", {"from": RUNNING, "to": BLOCKED, "reason": "r"}, "then"),
        RunEvent(8, RUN, "blocked", {"phase": "human-gate", "task": "1:a", "reason": "r"}, "then"),
    ]
    onward = run._replace(current_task="2:b")
    (done,) = run_events_of(Change(7, "run:updated", onward, run, "now"))
    assert (done.event_type, done.payload) == ("task_completed", {"task": "1:a", "finished": 1, "total": 2})
    finished = run._replace(status=FINISHED)
    kinds = [event.event_type for event in run_events_of(Change(7, "run:updated", finished, run, "now"))]
    assert kinds == ["status_changed", "task_completed"]
    assert run_events_of(Change(7, "run:updated", onward, finished, "now"))[0].event_type == "status_changed"
    again = onward._replace(job_uid="another")
    assert run_events_of(Change(7, "run:updated", again, run, "now")) == []
    assert run_events_of(Change(7, "run:removed", run, run, "now")) == []
    assert run_events_of(Change(7, "volume:added", Volume("c", "n", "v"), None, "now")) == []


# Order

JOB_ENDS = [
    job(1),
    job(1, suspend=True),
    job(1, conditions=["SuccessCriteriaMet", "Complete"]),
    job(1, conditions=["FailureTarget", "Failed=BackoffLimitExceeded"]),
    job(1, conditions=["Failed=DeadlineExceeded"]),
    job(1, metadata={"labels": {"fabrik.dev/status": "cancelled"}}),
    job(1, metadata={"deletionTimestamp": time_text(90)}),
]
SECOND = {"name": f"fabrik-{RUN}-two", "uid": "2", "creationTimestamp": time_text(30)}
POD_ENDS = [
    [pod(1, phase="Pending")],
    [pod(1, report=Report())],
    [pod(1, report=Report(phase="human-gate"))],
    [pod(1, phase="Succeeded", report=Report(phase="done"))],
    [pod(1, phase="Failed")],
    [pod(1, phase="Failed"), pod(1, report=Report(attempt=2), metadata=SECOND)],
    [pod(1, report=Report(), metadata={"deletionTimestamp": time_text(9)}), pod(1, phase="Pending", metadata=SECOND)],
    [],
]
EVENT_ENDS = [
    [],
    [event(job(1), "Completed", "m", kind="Normal", involved="Job")],
    [event(job(1), "BackoffLimitExceeded", "m", involved="Job"), event(pod(1), "BackOff", "m")],
]
ENDS = st.tuples(
    st.sampled_from(JOB_ENDS),
    st.sampled_from(["there", "deleted", "vanished"]),
    st.sampled_from(POD_ENDS),
    st.booleans(),
    st.sampled_from(EVENT_ENDS),
)


def steps_of(
    job_: JsonObject, job_end: str, pods: list[JsonObject], first_pod_gone: bool, events: list[JsonObject]
) -> list[list[tuple[str, Resource, JsonObject]]]:
    """Return what is seen of each object, in the order that holds for it alone."""
    jobs: list[tuple[str, Resource, JsonObject]] = [("see", JOBS, job_)]
    if job_end != "there":
        jobs.append((job_end, JOBS, job_))
    lanes = [jobs, *([("see", PODS, item)] for item in pods), *([("see", EVENTS, item)] for item in events)]
    if first_pod_gone and pods:
        lanes[1].append(("deleted", PODS, pods[0]))
    return lanes


def take(world: World, how: str, resource: Resource, item: JsonObject) -> None:
    if how == "see":
        world.see(resource, item)
    elif how == "deleted":
        world.delete(resource, item)
    else:
        world.relist(resource)


def play(lanes: list[list[tuple[str, Resource, JsonObject]]], order: list[int]) -> Run:
    world, waiting = World(), [list(lane) for lane in lanes]
    for index in order:
        how, resource, item = waiting[index].pop(0)
        take(world, how, resource, item)
    return world.run()._replace(finished_at=None, deleted_at=None, updated_at=None, last_sync_at=None)


@settings(deadline=None, max_examples=300)
@given(ENDS, st.data())
def test_the_order_in_which_final_facts_arrive_makes_no_difference(
    ends: tuple[JsonObject, str, list[JsonObject], bool, list[JsonObject]], data: st.DataObject
) -> None:
    _, job_end, pods, _, _ = ends
    assume(
        job_end != "vanished" or len(pods) < 2
    )  # the first Pod that ended decides, and a terminal run never goes back
    lanes = steps_of(*ends)
    order = [index for index, lane in enumerate(lanes) for _ in lane]
    assert play(lanes, data.draw(st.permutations(order))) == play(lanes, order)


STEPS = st.one_of(
    st.sampled_from([("see", JOBS, item) for item in JOB_ENDS]),
    st.sampled_from([("see", PODS, item) for pods in POD_ENDS for item in pods]),
    st.sampled_from([("see", EVENTS, item) for events in EVENT_ENDS for item in events]),
    st.sampled_from([("deleted", JOBS, job(1)), ("deleted", PODS, pod(1)), ("vanished", JOBS, job(1))]),
    st.sampled_from([("see", JOBS, job(2)), ("see", VOLUMES, pvc(1)), ("see", CRONJOBS, cronjob("n"))]),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(STEPS, max_size=25))
def test_whatever_happens_the_stream_and_the_rows_agree(steps: list[tuple[str, Resource, JsonObject]]) -> None:
    world = World()
    for how, resource, item in steps:
        take(world, how, resource, item)
    last: dict[str, Run] = {}
    for change in world.changes:
        if isinstance(change.row, Run):
            assert change.previous == last.get(change.row.run_id)
            assert change.row != change.previous
            last[change.row.run_id] = change.row
    assert last == {key: world.run(key) for key in world.runs()}
    numbers = [change.seq for change in world.changes]
    assert numbers == sorted(set(numbers))
    for run in last.values():
        assert (run.finished_at is not None) == (run.status in {FINISHED, FAILED, CANCELLED})
