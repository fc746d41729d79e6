from __future__ import annotations

import json
import zoneinfo
from typing import Any

import pytest
from fabrik_objects import NAMESPACE, Report, cronjob, event, job, pod, pvc, run_id, time_text
from hypothesis import given, settings
from hypothesis import strategies as st

from fabrik_daemon import (
    BLOCKED,
    CANCELLED,
    CRONJOBS,
    DELETED,
    EVENTS,
    FAILED,
    FINISHED,
    INT_MAX,
    JOBS,
    NO_REPORT,
    PENDING,
    PODS,
    RUNNING,
    TEXT_MAX_BYTES,
    VANISHED,
    VOLUMES,
    CronJobFacts,
    EventFacts,
    JobFacts,
    Place,
    PodFacts,
    Resource,
    Run,
    Verdict,
    VolumeFacts,
    current_job,
    current_pod,
    ending_of,
    epoch_of,
    facts_from,
    is_gated,
    merge_reports,
    report_from,
    run_row,
    schedule_row,
    status_of,
    warning_row,
)
from fabrik_daemon import Report as Said

JsonObject = dict[str, Any]
RUN = run_id(1)


def job_facts(item: JsonObject, **change: Any) -> JobFacts:
    facts = facts_from(JOBS.name, item)
    assert isinstance(facts, JobFacts)
    return facts._replace(**change)


def pod_facts(item: JsonObject, **change: Any) -> PodFacts:
    facts = facts_from(PODS.name, item)
    assert isinstance(facts, PodFacts)
    return facts._replace(**change)


def event_facts(item: JsonObject) -> EventFacts:
    facts = facts_from(EVENTS.name, item)
    assert isinstance(facts, EventFacts)
    return facts


def cronjob_facts(item: JsonObject) -> CronJobFacts:
    facts = facts_from(CRONJOBS.name, item)
    assert isinstance(facts, CronJobFacts)
    return facts


def said(**annotations: str) -> Said:
    return report_from({"annotations": {f"fabrik.dev/{key}": value for key, value in annotations.items()}})


# The status table

COMPLETE = job_facts(job(1, conditions=["SuccessCriteriaMet", "Complete"]))
FAILED_JOB = job_facts(job(1, conditions=["FailureTarget", "Failed=BackoffLimitExceeded"]))
LATE = job_facts(job(1, conditions=["Failed=DeadlineExceeded"]))
GOING = Verdict(RUNNING, None, None)
ACTIVE = job_facts(job(1))
SUSPENDED = job_facts(job(1, suspend=True))
LABELLED = job_facts(job(1, metadata={"labels": {"fabrik.dev/status": "cancelled"}}))
DELETING = job_facts(job(1, metadata={"deletionTimestamp": time_text(90)}))
GONE = ACTIVE._replace(gone=DELETED, gone_at=time_text(99))
LOST = ACTIVE._replace(gone=VANISHED, gone_at=time_text(99))

WAITING = pod_facts(pod(1, phase="Pending"))
UP = pod_facts(pod(1, report=Report()))
GATED = pod_facts(pod(1, report=Report(phase="human-gate")))
STUCK = pod_facts(pod(1, report=Report(status="blocked")))
STOPPED = pod_facts(pod(1, report=Report(status="cancelled")))
DONE = pod_facts(pod(1, phase="Succeeded"))
BROKEN = pod_facts(pod(1, phase="Failed"))
KILLED = pod_facts(pod(1, phase="Failed", state={"terminated": {"exitCode": 137, "reason": "OOMKilled"}}))
NODE_LOST = pod_facts(pod(1, phase="Unknown", report=Report()))
PULLING = pod_facts(pod(1, phase="Pending", state={"waiting": {"reason": "ImagePullBackOff"}}))
INITIALIZING = pod_facts(pod(1, phase="Pending", state={"waiting": {"reason": "PodInitializing"}}))

ROWS: list[tuple[str, JobFacts | None, PodFacts | None, str | None, str | None, str | None, str | None]] = [
    # what is known, Job, Pod, ending of an Event, status before -> status, reason
    ("1: Complete", COMPLETE, DONE, None, RUNNING, FINISHED, None),
    ("1: SuccessCriteriaMet", job_facts(job(1, conditions=["SuccessCriteriaMet"])), UP, None, RUNNING, FINISHED, None),
    ("1 without a Pod", COMPLETE, None, None, None, FINISHED, None),
    ("1 before 2", job_facts(job(1, conditions=["FailureTarget", "Complete"])), None, None, None, FINISHED, None),
    ("1 before 3, deleted", COMPLETE._replace(gone=DELETED), DONE, None, FINISHED, FINISHED, None),
    ("1 before 3, label", COMPLETE, STOPPED, None, RUNNING, FINISHED, None),
    ("1 before 4", COMPLETE._replace(gone=VANISHED), BROKEN, FAILED, FINISHED, FINISHED, None),
    ("1 before 6", COMPLETE._replace(suspended=True), None, None, None, FINISHED, None),
    ("1 before 7", COMPLETE, GATED, None, BLOCKED, FINISHED, None),
    ("1 before 8", COMPLETE, UP, None, RUNNING, FINISHED, None),
    ("2: Failed", FAILED_JOB, None, None, RUNNING, FAILED, "BackoffLimitExceeded"),
    ("2: FailureTarget", job_facts(job(1, conditions=["FailureTarget=X"])), None, None, None, FAILED, "X"),
    ("2: the Pod's reason leads", FAILED_JOB, KILLED, None, RUNNING, FAILED, "OOMKilled"),
    ("2: Smithers' reason leads", FAILED_JOB, UP._replace(report=said(reason="broke")), None, None, FAILED, "broke"),
    ("2: DeadlineExceeded leads", LATE, KILLED, None, RUNNING, FAILED, "DeadlineExceeded"),
    ("2 before 3, deleted", FAILED_JOB._replace(gone=DELETED), None, None, FAILED, FAILED, "BackoffLimitExceeded"),
    ("2 before 3, deleting", FAILED_JOB._replace(deleting=True), BROKEN, None, FAILED, FAILED, "Error"),
    ("2 before 3, label", FAILED_JOB, STOPPED, None, RUNNING, FAILED, "BackoffLimitExceeded"),
    ("2 before 4", FAILED_JOB._replace(gone=VANISHED), DONE, FINISHED, None, FAILED, "BackoffLimitExceeded"),
    ("2 before 6", FAILED_JOB._replace(suspended=True), None, None, None, FAILED, "BackoffLimitExceeded"),
    ("2 before 7", FAILED_JOB, GATED, None, BLOCKED, FAILED, "BackoffLimitExceeded"),
    ("3: DELETED", GONE, None, None, RUNNING, CANCELLED, None),
    ("3: deletionTimestamp", DELETING, UP, None, RUNNING, CANCELLED, None),
    ("3: label on the Job", LABELLED, UP, None, RUNNING, CANCELLED, None),
    ("3: label on the Pod", ACTIVE, STOPPED, None, RUNNING, CANCELLED, None),
    ("3: label on a Pod without a Job", None, STOPPED, None, RUNNING, CANCELLED, None),
    ("3: the Pod says why", GONE, UP._replace(report=said(reason="superseded")), None, None, CANCELLED, "superseded"),
    ("3 before 4", LOST._replace(deleting=True), DONE, FINISHED, None, CANCELLED, None),
    ("3 before 4, Pod succeeded", GONE, DONE, None, RUNNING, CANCELLED, None),
    ("3 before 5", None, DONE._replace(report=STOPPED.report), None, None, CANCELLED, None),
    ("3 before 6", SUSPENDED._replace(gone=DELETED), None, None, PENDING, CANCELLED, None),
    ("3 before 7", GONE, GATED, None, BLOCKED, CANCELLED, None),
    ("3 before 8", GONE, UP, None, RUNNING, CANCELLED, None),
    ("4: Pod succeeded", LOST, DONE, None, RUNNING, FINISHED, None),
    ("4: Pod failed", LOST, KILLED, None, RUNNING, FAILED, "OOMKilled"),
    ("4: Completed", LOST, None, FINISHED, RUNNING, FINISHED, None),
    ("4: BackoffLimitExceeded", LOST, None, FAILED, RUNNING, FAILED, "BackoffLimitExceeded"),
    ("4: the Pod before the Event", LOST, DONE, FAILED, RUNNING, FINISHED, None),
    ("4: the Event where the Pod is undecided", LOST, UP, FINISHED, RUNNING, FINISHED, None),
    ("4: nobody knows", LOST, None, None, RUNNING, None, "VanishedUnseen"),
    ("4: nor does a running Pod", LOST, UP, None, RUNNING, None, "VanishedUnseen"),
    ("4 before 6", LOST._replace(suspended=True), None, None, PENDING, None, "VanishedUnseen"),
    ("4 before 7", LOST, GATED, None, BLOCKED, None, "VanishedUnseen"),
    ("5: Succeeded", None, DONE, None, RUNNING, FINISHED, None),
    ("5: Failed", None, KILLED, None, RUNNING, FAILED, "OOMKilled"),
    ("5 before 7", None, DONE._replace(report=GATED.report), None, BLOCKED, FINISHED, None),
    ("5 only without a Job", ACTIVE, DONE, None, RUNNING, PENDING, None),
    ("6: suspended", SUSPENDED, None, None, None, PENDING, "JobSuspended"),
    ("6 before 7", SUSPENDED, GATED, None, BLOCKED, PENDING, "JobSuspended"),
    ("6 before 8", SUSPENDED, UP, None, RUNNING, PENDING, "JobSuspended"),
    ("6 before 9", SUSPENDED, NODE_LOST, None, RUNNING, PENDING, "JobSuspended"),
    ("7: phase human-gate", ACTIVE, GATED, None, RUNNING, BLOCKED, None),
    ("7: phase gate", ACTIVE, pod_facts(pod(1, report=Report(phase="gate"))), None, RUNNING, BLOCKED, None),
    ("7: status blocked", ACTIVE, STUCK, None, RUNNING, BLOCKED, None),
    ("7: without a Job", None, GATED, None, None, BLOCKED, None),
    (
        "7: why",
        ACTIVE,
        STUCK._replace(report=STUCK.report._replace(reason="rate_limit_exhausted")),
        None,
        RUNNING,
        BLOCKED,
        "rate_limit_exhausted",
    ),
    ("7 before 9", ACTIVE, NODE_LOST._replace(report=GATED.report), None, RUNNING, BLOCKED, None),
    ("7 before 10", ACTIVE, WAITING._replace(report=GATED.report), None, None, BLOCKED, None),
    ("8: Running", ACTIVE, UP, None, PENDING, RUNNING, None),
    ("8: without a Job", None, UP, None, None, RUNNING, None),
    (
        "8: whatever word Smithers uses",
        ACTIVE,
        pod_facts(pod(1, report=Report(status="hm"))),
        None,
        None,
        RUNNING,
        None,
    ),
    ("9: Unknown, was running", ACTIVE, NODE_LOST, None, RUNNING, RUNNING, "NodeLost"),
    ("9: Unknown, was blocked", ACTIVE, NODE_LOST, None, BLOCKED, BLOCKED, "NodeLost"),
    ("9: Unknown from the start", ACTIVE, NODE_LOST, None, None, PENDING, "NodeLost"),
    ("10: no Pod yet", ACTIVE, None, None, None, PENDING, None),
    ("10: Pod pending", ACTIVE, WAITING, None, None, PENDING, None),
    ("10: ImagePullBackOff", ACTIVE, PULLING, None, None, PENDING, "ImagePullBackOff"),
    ("10: init containers", ACTIVE, INITIALIZING, None, None, PENDING, None),
    ("10: between two Pods", ACTIVE, UP._replace(gone=DELETED), None, RUNNING, PENDING, None),
    ("10: the gated Pod is gone", ACTIVE, GATED._replace(gone=DELETED), None, BLOCKED, PENDING, None),
    ("10: an unknown Pod phase", ACTIVE, UP._replace(phase="Hibernating"), None, RUNNING, PENDING, None),
]


@pytest.mark.parametrize(
    ("job_", "pod_", "ending", "was", "status", "reason"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_the_first_row_of_the_status_table_that_matches_decides(
    job_: JobFacts | None,
    pod_: PodFacts | None,
    ending: str | None,
    was: str | None,
    status: str | None,
    reason: str | None,
) -> None:
    assert status_of(job_, pod_, ending, was) == (status, reason)


def test_a_condition_that_is_unknown_or_not_true_ends_nothing() -> None:
    for condition in (
        {"type": "Complete", "status": "False"},
        {"type": "Vanquished", "status": "True"},
        {},
        {"type": 5},
    ):
        item = job(1)
        item["status"]["conditions"] = [condition]
        assert job_facts(item).outcome is None


def test_reports_on_the_job_stand_in_for_those_the_pod_does_not_make() -> None:
    facts = job_facts(job(1), report=said(phase="review", task="1:a", reason="because"))
    row = run_row(
        Place("c", NAMESPACE, RUN), RUN, facts, UP._replace(report=said(phase="implement")), GOING, time_text(90)
    )
    assert (row.phase, row.current_task) == ("implement", "1:a")


def test_a_reason_on_the_job_stands_in_as_every_other_report_does() -> None:
    facts = ACTIVE._replace(report=said(reason="rate_limit_exhausted"))
    assert status_of(facts, STUCK, None, RUNNING) == (BLOCKED, "rate_limit_exhausted")


# Reports


def test_the_json_annotation_is_read_whole() -> None:
    text = (
        '{"phase":"review","current_task":"3:fix","attempt":2,"progress":{"finished":1,"total":4},'
        '"status":"blocked","iteration":5,"updated":"2026-11-23T13:00:00+01:00","reason":"r"}'
    )
    assert said(status=text) == Said("review", "3:fix", "blocked", 2, 5, 1, 4, "2026-11-23T12:00:00Z", "r")


def test_single_annotations_are_read() -> None:
    found = said(
        phase="implement",
        task="16:impl",
        progress='{"finished":0,"total":192}',
        attempt="0",
        iteration="3",
        updated=time_text(),
        reason="r",
    )
    assert found == Said("implement", "16:impl", None, 0, 3, 0, 192, time_text(), "r")


def test_labels_are_read_and_their_task_gets_its_colon_back() -> None:
    labels = {"fabrik.dev/phase": "gate", "fabrik.dev/status": "running", "fabrik.dev/task": "16-impl-api"}
    assert report_from({"labels": labels}) == Said("human-gate", "16:impl-api", "running")


def test_a_task_annotation_keeps_its_dash() -> None:
    assert said(task="16-impl").task == "16-impl"
    assert report_from({"labels": {"fabrik.dev/task": "cleanup-all"}}).task == "cleanup-all"


def test_the_json_annotation_leads_over_single_ones_and_those_over_labels() -> None:
    metadata = {
        "annotations": {
            "fabrik.dev/status": '{"phase":"validate","attempt":0}',
            "fabrik.dev/phase": "implement",
            "fabrik.dev/task": "2:b",
            "fabrik.dev/attempt": "7",
        },
        "labels": {"fabrik.dev/phase": "discover", "fabrik.dev/task": "1-a", "fabrik.dev/status": "running"},
    }
    found = report_from(metadata)
    assert (found.phase, found.task, found.status, found.attempt) == ("validate", "2:b", "running", 0)


def test_finished_and_total_come_from_one_report() -> None:
    assert merge_reports([Said(), Said(finished=0, total=5), Said(finished=3, total=9)])[5:7] == (0, 5)


@pytest.mark.parametrize(("word", "phase"), [("interview", "discover"), ("gate", "human-gate"), ("done", "done")])
def test_older_words_for_a_phase_are_translated(word: str, phase: str) -> None:
    assert said(phase=word).phase == phase
    assert said(status=json.dumps({"phase": word})).phase == phase
    assert is_gated(said(phase=word)) == (phase == "human-gate")


@pytest.mark.parametrize(
    "progress",
    [
        "",
        "150/192",
        "[150,192]",
        "{}",
        '{"finished":1}',
        '{"finished":"1","total":"2"}',
        '{"finished":3,"total":2}',
        '{"finished":-1,"total":2}',
        '{"finished":1.0,"total":2}',
        '{"finished":true,"total":2}',
        '{"finished":NaN,"total":1e999}',
        f'{{"finished":1,"total":{INT_MAX + 1}}}',
        '{"finished":1,"total":' + "9" * 5000 + "}",
        '{"finished":' + "[" * 5000,
    ],
)
def test_a_progress_that_does_not_parse_is_left_out_and_named(progress: str) -> None:
    found = said(progress=progress, phase="review", attempt="2")
    assert (found.finished, found.total) == (None, None)
    assert (found.phase, found.attempt) == ("review", 2)
    assert found.malformed == ("progress",)


def test_every_part_that_does_not_parse_is_named_once_and_the_rest_kept() -> None:
    metadata = {
        "annotations": {
            "fabrik.dev/status": '{"attempt":-1,"phase":["a"],"current_task":"1:a"}',
            "fabrik.dev/attempt": "many",
            "fabrik.dev/updated": "just now",
            "fabrik.dev/iteration": "4",
        }
    }
    found = report_from(metadata)
    assert (found.task, found.iteration, found.attempt, found.phase) == ("1:a", 4, None, None)
    assert sorted(found.malformed) == ["attempt", "phase", "updated"]


@pytest.mark.parametrize("text", ["[" * 5000, "{", "null", "[]", "5", "x" * 300_000])
def test_a_json_annotation_that_does_not_parse_leaves_the_others(text: str) -> None:
    metadata = {
        "annotations": {"fabrik.dev/status": text, "fabrik.dev/task": "2:b"},
        "labels": {"fabrik.dev/phase": "done"},
    }
    found = report_from(metadata)
    assert (found.task, found.phase, found.malformed) == ("2:b", "done", ("status",))


def test_an_object_without_fabrik_s_keys_reports_nothing() -> None:
    assert report_from({"labels": {"app": "x"}, "annotations": {"y": "z"}}) == NO_REPORT
    assert report_from({}) == NO_REPORT
    assert report_from({"labels": None, "annotations": [1]}) == NO_REPORT


KEYS = st.sampled_from(["status", "phase", "task", "progress", "updated", "attempt", "iteration", "reason"])
VALUES = st.text(st.characters(), max_size=20) | st.sampled_from(
    [
        '{"phase":"gate","progress":{"finished":1,"total":2}}',
        '{"attempt":NaN,"updated":5,"reason":"\\ud800"}',
        '{"progress":[],"status":{},"current_task":""}',
        "x" * (TEXT_MAX_BYTES + 5),
        "1e999",
        str(2**70),
        "\ud800",
    ]
)


@settings(deadline=None)
@given(st.dictionaries(KEYS, VALUES), st.dictionaries(KEYS, VALUES))
def test_whatever_is_reported_becomes_values_that_a_row_holds(
    annotations: dict[str, str], labels: dict[str, str]
) -> None:
    metadata = {
        "annotations": {f"fabrik.dev/{key}": value for key, value in annotations.items()},
        "labels": {f"fabrik.dev/{key}": value for key, value in labels.items()},
    }
    found = report_from(metadata)
    for text in (found.phase, found.task, found.status, found.heartbeat_at, found.reason):
        assert text is None or 0 < len(text.encode()) <= TEXT_MAX_BYTES
    for number in (found.attempt, found.iteration, found.finished, found.total):
        assert number is None or 0 <= number <= INT_MAX
    assert (found.finished is None) == (found.total is None)


# Objects


def test_a_run_is_a_job_with_its_label_else_a_ulid_in_its_name() -> None:
    assert job_facts(job(1)).id == RUN
    other = run_id(2)
    assert job_facts(job(1, metadata={"labels": {"fabrik.dev/run-id": other}})).id == other
    bare = job(1)
    del bare["metadata"]["labels"]
    assert job_facts(bare).id == RUN
    bare["metadata"]["name"] = f"fabrik-{RUN}-retry"
    assert job_facts(bare).id == RUN


@pytest.mark.parametrize("name", ["build-7", f"data-fabrik-{RUN}", f"run-{RUN}-workspace", RUN])
def test_another_job_is_no_run(name: str) -> None:
    foreign = job(1)
    foreign["metadata"].update(name=name, labels={"app.kubernetes.io/managed-by": "helm"})
    assert facts_from(JOBS.name, foreign) is None


def scheduled(owner: str = "fabrik-schedule-nightly", labels: dict[str, str] | None = None) -> JsonObject:
    item = job(1)
    reference = {"apiVersion": "batch/v1", "kind": "CronJob", "name": owner, "uid": "u", "controller": True}
    item["metadata"].update(name=f"{owner}-29720040", labels=labels or {}, ownerReferences=[reference])
    return item


def test_a_job_made_by_a_fabrik_schedule_is_a_run_named_like_the_job() -> None:
    facts = job_facts(scheduled())
    assert (facts.id, facts.scheduled, facts.schedule_id) == ("fabrik-schedule-nightly-29720040", True, "nightly")
    managed = job_facts(scheduled("cleanup", {"fabrik.dev/managed-by": "fabrik"}))
    assert (managed.id, managed.scheduled, managed.schedule_id) == ("cleanup-29720040", True, "cleanup")
    labelled = job_facts(scheduled("cleanup", {"fabrik.dev/schedule-id": "night"}))
    assert (labelled.scheduled, labelled.schedule_id) == (True, "night")


def test_a_scheduled_job_with_a_run_id_is_not_named_by_its_schedule() -> None:
    facts = job_facts(scheduled(labels={"fabrik.dev/run-id": RUN}))
    assert (facts.id, facts.scheduled, facts.schedule_id) == (RUN, False, "nightly")


def test_a_job_of_a_foreign_cronjob_is_no_run() -> None:
    assert facts_from(JOBS.name, scheduled("backup")) is None


def test_what_describes_a_run_is_taken_from_its_labels() -> None:
    facts = job_facts(job(1))
    assert (facts.spec_id, facts.template, facts.project) == ("feature-x", "coding", "myapp")
    older = job(1)
    older["metadata"]["labels"] = {"fabrik.dev/run-id": RUN, "fabrik.dev/spec": "older"}
    assert job_facts(older).spec_id == "older"


def test_a_job_s_times_are_read() -> None:
    facts = job_facts(job(1, conditions=["Complete"]))
    assert (facts.created_at, facts.started_at, facts.ended_at) == (time_text(), time_text(), time_text(600))
    failed = job_facts(job(1, conditions=["Failed=X"]))
    assert failed.ended_at == time_text(600)
    unstarted = job(1, metadata={"annotations": {"fabrik.dev/started": time_text(3)}})
    del unstarted["status"]["startTime"]
    assert job_facts(unstarted).started_at == time_text(3)


def test_a_pod_belongs_to_the_run_of_its_label_its_job_or_its_name() -> None:
    assert pod_facts(pod(1)).id == RUN
    bare = pod(1)
    bare["metadata"]["labels"] = {}
    assert pod_facts(bare).id == RUN
    del bare["metadata"]["ownerReferences"]
    assert pod_facts(bare).id == RUN
    bare["metadata"]["name"] = "web-1"
    assert facts_from(PODS.name, bare) is None
    bare["metadata"]["labels"] = {"job-name": f"fabrik-{RUN}"}
    assert pod_facts(bare).id == RUN
    bare["metadata"]["labels"] = {"batch.kubernetes.io/job-name": "fabrik-schedule-nightly-29720040"}
    assert pod_facts(bare).id == "fabrik-schedule-nightly-29720040"


def test_a_pod_knows_its_job() -> None:
    assert pod_facts(pod(1)).job_uid == job_facts(job(1)).uid


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ({"reason": "Evicted", "containerStatuses": [{"state": {"waiting": {"reason": "X"}}}]}, "Evicted"),
        ({"containerStatuses": [{"state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}]}, "OOMKilled"),
        ({"containerStatuses": [{"state": {"terminated": {"exitCode": 2}}}]}, "Error"),
        ({"containerStatuses": [{"state": {"terminated": {"exitCode": 0, "reason": "Completed"}}}]}, None),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}, None),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull"}}}]}, "ErrImagePull"),
        ({"initContainerStatuses": [{"state": {"terminated": {"exitCode": 1, "reason": "Error"}}}]}, "Error"),
        (
            {
                "containerStatuses": [{"state": {"waiting": {"reason": "PodInitializing"}}}],
                "initContainerStatuses": [{"state": {"waiting": {"reason": "CrashLoopBackOff"}}}],
            },
            "CrashLoopBackOff",
        ),
        ({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]}, "Unschedulable"),
        ({"conditions": [{"type": "PodScheduled", "status": "True", "reason": "Unschedulable"}]}, None),
        ({"conditions": [{"type": "Ready", "status": "False", "reason": "ContainersNotReady"}]}, None),
        ({"containerStatuses": None, "conditions": "x"}, None),
    ],
)
def test_a_pod_s_reason_is_its_own_then_its_containers_then_its_scheduling(
    status: JsonObject, reason: str | None
) -> None:
    item = pod(1, phase="Pending")
    item["status"] = {"phase": "Pending", **status}
    assert pod_facts(item).reason == reason


def test_the_current_pod_is_the_newest_that_is_not_being_deleted() -> None:
    old = UP._replace(name="a", uid="1", created_at=time_text(0))
    new = UP._replace(name="b", uid="2", created_at=time_text(9))
    for pods in ([old, new], [new, old]):
        assert current_pod(pods, ACTIVE) is new
    deleting = new._replace(deleting=True)
    assert current_pod([old, deleting], ACTIVE) is old
    older = old._replace(deleting=True)
    assert current_pod([older, deleting], ACTIVE) is deleting
    assert current_pod([old, new._replace(gone=DELETED)], ACTIVE) is old
    assert current_pod([], ACTIVE) is None


def test_another_job_s_pod_is_not_current() -> None:
    other = UP._replace(job_uid="of an older Job")
    assert current_pod([other], ACTIVE) is None
    assert current_pod([other], None) is other
    orphan = UP._replace(job_uid=None)
    assert current_pod([orphan], ACTIVE) is orphan


def test_the_current_job_is_the_newest() -> None:
    old, new = ACTIVE._replace(uid="1"), ACTIVE._replace(uid="0", created_at=time_text(5))
    assert current_job([old, new]) is new
    assert current_job([new, old._replace(gone=DELETED)]) is new
    assert current_job([new._replace(gone=DELETED), old]) is not old
    assert current_job([]) is None


def test_a_volume_is_read() -> None:
    facts = facts_from(VOLUMES.name, pvc(1))
    assert isinstance(facts, VolumeFacts)
    assert (facts.id, facts.phase, facts.capacity_bytes, facts.storage_class) == (RUN, "Bound", 10 << 30, "local-path")
    unbound = facts_from(VOLUMES.name, pvc(1, capacity=""))
    assert isinstance(unbound, VolumeFacts)
    assert (unbound.phase, unbound.capacity_bytes) == ("Pending", None)


@pytest.mark.parametrize("name", [f"data-fabrik-{RUN}", f"fabrik-{RUN}-ws", f"run-{RUN}-workspace"])
def test_an_unlabelled_volume_belongs_to_the_run_in_its_name(name: str) -> None:
    item = pvc(1)
    item["metadata"].update(name=name, labels={})
    facts = facts_from(VOLUMES.name, item)
    assert facts is not None
    assert facts.id == RUN
    item["metadata"]["name"] = "postgres-data"
    assert facts_from(VOLUMES.name, item) is None


def test_a_warning_is_read_and_a_growing_count_is_one_warning() -> None:
    facts = event_facts(event(pod(1), "BackOff", "Back-off pulling image", count=3))
    assert (facts.id, facts.warning, facts.object_kind, facts.reason) == (RUN, True, "Pod", "BackOff")
    assert (facts.count, facts.first_at, facts.last_at) == (3, time_text(), time_text(2))
    assert event_facts(event(pod(1), "BackOff", "Back-off pulling image", count=4)).name == facts.name


def test_the_newer_api_s_events_are_read() -> None:
    item = event(pod(1), "BackOff", "m")
    item.update(count=None, firstTimestamp=None, lastTimestamp=None, eventTime="2026-11-23T12:00:00.123456Z")
    item["series"] = {"count": 5, "lastObservedTime": "2026-11-23T12:01:00.000000Z"}
    facts = event_facts(item)
    assert (facts.count, facts.first_at, facts.last_at) == (5, time_text(), time_text(60))


def test_normal_events_are_left_out_but_for_those_that_tell_how_a_job_ended() -> None:
    assert facts_from(EVENTS.name, event(pod(1), "Pulled", "m", kind="Normal")) is None
    assert facts_from(EVENTS.name, event(pod(1), "Completed", "m", kind="Normal")) is None
    done = event_facts(event(job(1), "Completed", "Job completed", kind="Normal", involved="Job"))
    assert (done.warning, ending_of(done)) == (False, FINISHED)
    failed = event_facts(event(job(1), "BackoffLimitExceeded", "m", involved="Job"))
    assert (failed.warning, ending_of(failed)) == (True, FAILED)
    assert ending_of(event_facts(event(pod(1), "BackoffLimitExceeded", "m"))) is None


def test_an_event_about_a_scheduled_job_or_its_pod_belongs_to_that_job() -> None:
    name = "fabrik-schedule-nightly-29720040"
    about = {"metadata": {"name": name, "namespace": NAMESPACE, "uid": "u"}}
    assert event_facts(event(about, "FailedCreate", "m", involved="Job")).id == name
    about["metadata"]["name"] = f"{name}-x7k2p"
    assert event_facts(event(about, "BackOff", "m")).id == name
    assert event_facts(event(about, "FailedNeedsStart", "m", involved="CronJob")).id == ""


HOSTILE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["metadata", "status", "spec", "conditions", "labels", "annotations", "state", "name", "type", "reason"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(
    st.sampled_from(
        [(JOBS, job(1)), (PODS, pod(1)), (CRONJOBS, cronjob("a")), (VOLUMES, pvc(1)), (EVENTS, event(pod(1), "X", "m"))]
    ),
    st.data(),
)
def test_no_shape_of_an_object_breaks_the_projection(kind: tuple[Resource, JsonObject], data: st.DataObject) -> None:
    resource, whole = kind
    item = json.loads(json.dumps(whole))
    here = item
    while True:  # put something hostile anywhere in it
        key = data.draw(st.sampled_from(sorted(here)))
        if not isinstance(here[key], dict) or not here[key] or data.draw(st.booleans()):
            here[key] = data.draw(HOSTILE)
            break
        here = here[key]
    facts = facts_from(resource.name, item)
    assert facts is None or (facts.name and isinstance(facts.namespace, str))


# Rows


def test_what_follows_from_the_status() -> None:
    facts = pod_facts(pod(1, report=Report(task="1:a", updated=time_text(30))))

    def row(status: str, ended_at: str | None, told: PodFacts = facts) -> Run:
        return run_row(Place("c", NAMESPACE, RUN), RUN, ACTIVE, told, Verdict(status, None, ended_at), time_text(90))

    expected = {PENDING: None, RUNNING: "in-progress", BLOCKED: "in-progress", FINISHED: FINISHED, FAILED: FAILED}
    for status, task_status in expected.items():
        assert row(status, time_text(60)).task_status == task_status
    assert row(RUNNING, None, facts._replace(report=said())).task_status is None
    assert row(RUNNING, time_text(60)).finished_at is None
    ended = row(FINISHED, time_text(60))
    assert (ended.finished_at, ended.updated_at) == (time_text(60), time_text(60))
    assert row(RUNNING, None).updated_at == time_text(30)


def test_a_run_s_row_says_what_its_job_and_pod_say() -> None:
    told = pod_facts(pod(1, report=Report(updated=time_text(30))))
    row = run_row(Place("c", NAMESPACE, RUN), RUN, ACTIVE, told, GOING, time_text(90))
    assert row._replace(pod_name=None, job_uid=None) == Run(
        RUN,
        "c",
        NAMESPACE,
        RUNNING,
        current_task="16:impl",
        task_status="in-progress",
        progress_finished=150,
        progress_total=192,
        spec_id="feature-x",
        template="coding",
        created_at=time_text(),
        updated_at=time_text(30),
        last_sync_at=time_text(90),
        id=RUN,
        project="myapp",
        phase="implement",
        task_attempt=1,
        iteration=0,
        heartbeat_at=time_text(30),
        job_name=f"fabrik-{RUN}",
        started_at=time_text(),
    )
    assert (row.pod_name, row.job_uid) == (UP.name, ACTIVE.uid)


NOW = epoch_of(time_text()) or 0.0  # a Monday, 12:00 UTC


def test_a_schedule_s_next_run_is_reckoned_in_its_time_zone() -> None:
    row = schedule_row("c", cronjob_facts(cronjob("nightly", "30 3 * * *")), NOW, zoneinfo.ZoneInfo)
    assert (row.schedule_id, row.schedule, row.time_zone) == ("nightly", "30 3 * * *", "Europe/Berlin")
    assert row.next_run_at == "2026-11-24T02:30:00Z"
    assert row.missed == 0


@pytest.mark.parametrize(
    ("last", "missed"),
    [(None, 12), ("2026-11-23T11:55:00Z", 0), ("2026-11-23T11:50:00Z", 1), ("2026-11-23T11:30:00Z", 5)],
)
def test_runs_that_are_overdue_count_as_missed(last: str | None, missed: int) -> None:
    facts = cronjob_facts(cronjob("often", "*/5 * * * *"))._replace(created_at="2026-11-23T10:58:00Z", last_run_at=last)
    assert schedule_row("c", facts, NOW - 1, zoneinfo.ZoneInfo).missed == missed


def test_a_run_that_is_due_counts_as_missed_after_a_minute() -> None:
    facts = cronjob_facts(cronjob("often", "*/5 * * * *"))._replace(last_run_at="2026-11-23T11:55:00Z")
    assert [schedule_row("c", facts, NOW + late, zoneinfo.ZoneInfo).missed for late in (0, 59, 60)] == [0, 0, 1]


@pytest.mark.parametrize("expression", ["", "nonsense", "61 * * * *", "0 3 31 2 *"])
def test_a_schedule_that_cannot_be_read_has_no_next_run(expression: str) -> None:
    row = schedule_row("c", cronjob_facts(cronjob("odd", expression)), NOW, zoneinfo.ZoneInfo)
    assert (row.next_run_at, row.missed) == (None, 0)


@pytest.mark.parametrize("name", ["Atlantis/Capital", "../etc/passwd", "/etc/passwd", "\x00"])
def test_a_time_zone_that_is_not_known_here_gives_no_next_run(name: str) -> None:
    facts = cronjob_facts(cronjob("odd"))._replace(time_zone=name)
    assert schedule_row("c", facts, NOW, zoneinfo.ZoneInfo).next_run_at is None


@pytest.mark.parametrize(
    ("macro", "following"), [("@hourly", "2026-11-23T12:00:00Z"), ("@daily", "2026-11-23T23:00:00Z")]
)
def test_a_macro_that_kubernetes_takes_has_a_next_run(macro: str, following: str) -> None:
    row = schedule_row("c", cronjob_facts(cronjob("macro", macro)), NOW - 1, zoneinfo.ZoneInfo)
    assert row.next_run_at == following


def test_a_suspended_schedule_has_no_next_run_and_misses_none() -> None:
    facts = cronjob_facts(cronjob("weekly", "* * * * *", suspend=True))
    row = schedule_row("c", facts, NOW + 86400, zoneinfo.ZoneInfo)
    assert (row.suspended, row.next_run_at, row.missed) == (1, None, 0)


def test_a_schedule_s_past_is_read() -> None:
    status = {"active": [{"name": "a"}], "lastScheduleTime": time_text(1), "lastSuccessfulTime": time_text(2)}
    row = schedule_row("c", cronjob_facts(cronjob("n", status=status)), NOW, zoneinfo.ZoneInfo)
    assert (row.active, row.last_run_at, row.last_success_at) == (1, time_text(1), time_text(2))


def test_a_foreign_cronjob_is_no_schedule() -> None:
    item = cronjob("x")
    item["metadata"].update(name="backup", labels={})
    assert facts_from(CRONJOBS.name, item) is None
    item["metadata"]["labels"] = {"app.kubernetes.io/managed-by": "fabrik"}
    assert cronjob_facts(item).id == "backup"


def test_a_warning_s_row_says_what_its_event_says() -> None:
    facts = event_facts(event(pod(1), "BackOff", "m", count=3))
    row = warning_row("c", facts, RUN)
    assert row[:3] == ("c", NAMESPACE, facts.name)
    assert (row.run_id, row.reason, row.message, row.count) == (RUN, "BackOff", "m", 3)
