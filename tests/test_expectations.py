"""The comparison with a recording's expectations: it must see every kind of difference."""

from __future__ import annotations

import json
from typing import Any

import pytest
from expectations import relapses, run_differences, schedule_differences
from fakes import Recording

NAMESPACE = "fabrik-runs"


def right_rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return what 04-oom-killed expects, and rows that hold just that."""
    expected = Recording("04-oom-killed").meta["expect"]["final"]["runs"]
    run_id = expected[0]["run_id"]
    volume = {"name": expected[0]["pvc"]["name"], "phase": "Bound", "capacity_bytes": 10737418240, "deleted_at": None}
    warning = {"reason": "BackoffLimitExceeded", "message": "Job has reached the specified backoff limit"}
    place = {"run_id": run_id, "id": run_id, "cluster": "test", "namespace": NAMESPACE}
    report = {"phase": "implement", "current_task": "9:impl", "progress_finished": 77, "progress_total": 192}
    rest = {"status": "failed", "reason": "OOMKilled", "task_attempt": 1}
    return expected, [{**place, **report, **rest, "volumes": [volume], "warnings": [warning], "events": []}]


def test_right_rows_have_no_differences() -> None:
    expected, rows = right_rows()
    assert run_differences(expected, rows, NAMESPACE) == []


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("run_id", "other"),
        ("id", "other"),
        ("namespace", "other"),
        ("cluster", "other"),
        ("status", "running"),
        ("status", None),
        ("phase", None),
        ("current_task", "9-impl"),
        ("progress_finished", None),
        ("progress_total", 193),
        ("reason", "BackoffLimitExceeded"),
        ("task_attempt", None),
        ("volumes", []),
        ("volumes", [{"name": "other"}]),
        ("warnings", []),
    ],
)
def test_a_wrong_value_is_told(column: str, value: object) -> None:
    expected, rows = right_rows()
    rows[0][column] = value
    assert run_differences(expected, rows, NAMESPACE)


@pytest.mark.parametrize(("column", "value"), [("phase", "Pending"), ("capacity_bytes", 10), ("capacity_bytes", None)])
def test_a_wrong_volume_is_told(column: str, value: object) -> None:
    expected, rows = right_rows()
    rows[0]["volumes"][0][column] = value
    assert len(run_differences(expected, rows, NAMESPACE)) == 1


def test_what_is_not_known_may_not_be_made_up() -> None:
    expected, rows = right_rows()
    run = {**expected[0], "phase": None, "current_task": None, "progress": None, "pvc": None}
    del run["attempt"]
    assert len(run_differences([run], rows, NAMESPACE)) == 6
    assert len(run_differences([{**run, "phase_any": True}], rows, NAMESPACE)) == 1


def test_missing_and_unexpected_runs_are_told() -> None:
    expected, rows = right_rows()
    assert len(run_differences(expected, [], NAMESPACE)) == 2
    assert any("nobody expects" in problem for problem in run_differences([], rows, NAMESPACE))


def test_the_second_place_of_an_id_has_its_place_in_its_key() -> None:
    expected, rows = right_rows()
    both = [{**expected[0], "namespace": "team-a"}, expected[0]]
    second = {**rows[0], "run_id": f"{rows[0]['id']}@test/team-a", "namespace": "team-a"}
    assert run_differences(both, [second, rows[0]], NAMESPACE) == []
    assert run_differences(both, [second, {**rows[0], "run_id": f"{rows[0]['id']}@test/{NAMESPACE}"}], NAMESPACE)
    assert run_differences(both, [{**second, "run_id": rows[0]["id"]}, rows[0]], NAMESPACE)


def test_a_wrong_schedule_is_told() -> None:
    expected = Recording("10-cronjob").meta["expect"]["final"]["schedules"]
    rows = [
        {**row, "namespace": NAMESPACE, "suspended": int(row["suspended"]), "last_run_at": row["last_schedule_time"]}
        for row in expected
    ]
    rows = [{**row, "last_success_at": row["last_successful_time"]} for row in rows]
    assert schedule_differences(expected, rows, NAMESPACE) == []
    assert len(schedule_differences(expected, [{**rows[0], "last_run_at": None}, rows[1]], NAMESPACE)) == 1
    assert len(schedule_differences(expected, rows[:1], NAMESPACE)) == 1
    assert len(schedule_differences(expected[:1], rows, NAMESPACE)) == 1


def test_a_run_that_leaves_a_terminal_status_is_told() -> None:
    steps = [("pending", "running"), ("running", "finished"), ("finished", "running")]
    events = [
        {"id": number, "event_type": "status_changed", "payload": json.dumps({"from": before, "to": after})}
        for number, (before, after) in enumerate(steps)
    ]
    assert len(relapses({"run_id": "x", "events": events})) == 1
    assert relapses({"run_id": "x", "events": events[:2]}) == []
