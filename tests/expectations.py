"""Compares what the executable shows with what a recording's meta.json expects, as recordings/README.md defines it."""

from __future__ import annotations

import json
from collections import defaultdict
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from harness import Daemon

Row = dict[str, Any]

TERMINAL: Final = ("finished", "failed", "cancelled")
FEW: Final = 5  # so many runs are each asked for with `runs show`; more of them are read in one query
PARTS: Final = {
    "volumes": "SELECT * FROM volumes",
    "warnings": "SELECT * FROM cluster_events",
    "events": "SELECT * FROM run_events",
}
UNITS: Final = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


def shown_runs(daemon: Daemon) -> list[Row]:
    """Return the rows of `runs list`, each with its `volumes`, `warnings` and `events`."""
    rows: list[Row] = daemon.json("runs", "list", "--limit", "1000")
    if len(rows) <= FEW:
        shown = [daemon.json("runs", "show", "--id", row["run_id"]) for row in rows]
        for row, show in zip(rows, shown):
            assert {key: show.get(key) for key in row} == row, "runs show and runs list differ"
        return shown
    parts = {name: by_run(daemon.json("query", statement)) for name, statement in PARTS.items()}
    return [{**row, **{name: part[row["run_id"]] for name, part in parts.items()}} for row in rows]


def by_run(rows: Iterable[Row]) -> defaultdict[str, list[Row]]:
    """Return the rows of each run."""
    found: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["run_id"]].append(row)
    return found


def run_differences(expected: Sequence[Row], shown: Sequence[Row], namespace: str, cluster: str = "test") -> list[str]:
    """Return, one a line, in what the shown runs differ from the expected ones; runs that nobody expects included."""
    rows = {(row["id"], row["cluster"], row["namespace"]): row for row in shown}
    problems: list[str] = []
    for run in expected:
        place = (run["run_id"] or run["job"], cluster, run.get("namespace", namespace))
        row = rows.pop(place, None)
        if row is None:
            problems.append(f"{place}: no such run; there are {sorted(rows)}")
        else:
            problems += [f"{place}: {problem}" for problem in row_differences(run, row)]
    problems += [f"{place}: nobody expects this run" for place in rows]
    return problems + _key_differences(expected, shown)


def _key_differences(expected: Sequence[Row], shown: Sequence[Row]) -> list[str]:
    """Check the keys: the label id at one place, `<id>@<cluster>/<namespace>` at others and for scheduled Jobs."""
    labels = {run["run_id"] for run in expected if run["run_id"]}
    plain = [row["run_id"] for row in shown if row["run_id"] in labels]
    problems = [f"{label}: {plain.count(label)} runs have the plain id" for label in labels if plain.count(label) != 1]
    rest = [row for row in shown if row["run_id"] not in labels]
    wrong = [row["run_id"] for row in rest if row["run_id"] != f"{row['id']}@{row['cluster']}/{row['namespace']}"]
    return problems + [f"{key}: a key in the wrong form" for key in wrong]


def row_differences(expected: Row, row: Row) -> list[str]:
    """Return in what one shown run differs from the expected one."""
    problems = [_unlike("status", row["status"], expected.get("status_any_of", [expected["status"]]))]
    if not expected.get("phase_any"):
        problems += _report_differences(expected, row)
    if expected["reason"]:
        problems.append(_unlike("reason", row["reason"], expected["reason"][:1]))
    if expected.get("job"):
        problems.append(_unlike("job_name", row["job_name"], [expected["job"]]))
    if "schedule_id" in expected:
        problems.append(_unlike("schedule_id", row["schedule_id"], [expected["schedule_id"]]))
    texts = [f"{warning['reason']}: {warning['message']}" for warning in row["warnings"]]
    problems += [f"no warning has {part!r}: {texts}" for part in expected["warnings"] if not _in_any(part, texts)]
    problems += _volume_differences(expected["pvc"], row["volumes"])
    return [problem for problem in problems if problem]


def _report_differences(expected: Row, row: Row) -> list[str]:
    tasks = expected.get("current_task_any_of", [expected["current_task"]])
    problems = [
        _unlike("phase", row["phase"], [expected["phase"]]),
        _unlike("current_task", row["current_task"], tasks),
    ]
    if not expected.get("progress_any"):
        progress = expected["progress"] or {"finished": None, "total": None}
        problems.append(_unlike("progress_finished", row["progress_finished"], [progress["finished"]]))
        problems.append(_unlike("progress_total", row["progress_total"], [progress["total"]]))
        problems.append(_unlike("task_attempt", row["task_attempt"], [expected.get("attempt")]))
    if "iteration" in expected:
        problems.append(_unlike("iteration", row["iteration"], [expected["iteration"]]))
    return problems


def _volume_differences(expected: Row | None, volumes: Sequence[Row]) -> list[str]:
    """Compare the one volume; where none is expected, a deleted one may still be told of."""
    if expected is None:
        return [f"a volume {volume['name']}" for volume in volumes if not volume["deleted_at"]]
    found = [volume for volume in volumes if volume["name"] == expected["name"]]
    if len(found) != 1 or len(volumes) != 1:
        return [f"volumes {[volume['name'] for volume in volumes]}, not {expected['name']}"]
    capacity = expected["capacity"] and int(expected["capacity"][:-2]) * UNITS[expected["capacity"][-2:]]
    return [
        _unlike("volume's phase", found[0]["phase"], [expected["phase"]]),
        _unlike("volume's capacity", found[0]["capacity_bytes"], [capacity]),
    ]


def schedule_differences(expected: Sequence[Row], shown: Sequence[Row], namespace: str) -> list[str]:
    """Return in what the shown schedules differ from the expected ones."""
    rows = {row["schedule_id"]: row for row in shown}
    problems: list[str] = []
    for schedule in expected:
        row = rows.pop(schedule["schedule_id"], None)
        if row is None:
            problems.append(f"{schedule['schedule_id']}: no such schedule")
            continue
        wanted = {name: schedule[name] for name in ("name", "schedule", "time_zone", "suspended", "active")}
        wanted["namespace"] = schedule.get("namespace", namespace)
        found = [_unlike(name, row[name], [value]) for name, value in wanted.items()]
        for name, other in (("last_run_at", "last_schedule_time"), ("last_success_at", "last_successful_time")):
            found.append(_unlike(name, _moment(row[name]), [_moment(schedule[other])]))
        problems += [f"{schedule['schedule_id']}: {problem}" for problem in found if problem]
    return problems + [f"{key}: nobody expects this schedule" for key in rows]


def relapses(row: Row) -> list[str]:
    """Return the status changes of a run that left a terminal status."""
    changes = [event for event in row["events"] if event["event_type"] == "status_changed"]
    payloads = [event["payload"] for event in sorted(changes, key=lambda event: int(event["id"]))]
    said = [json.loads(payload) if isinstance(payload, str) else payload for payload in payloads]
    return [f"{row['run_id']}: {change}" for change in said if change["from"] in TERMINAL]


def _unlike(name: str, got: object, wanted: Sequence[object]) -> str:
    return "" if got in wanted else f"{name} is {got!r}, not {' or '.join(map(repr, wanted))}"


def _in_any(part: str, texts: Iterable[str]) -> bool:
    return any(part in text for text in texts)


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None
