"""The messages of README's protocol page, as a running daemon says them.

A block fenced ```json NAME in README holds what is sent (`>`) and what comes (`<`). tests/test_protocol.py compares all
of them with what the built daemon says; this program writes them anew:

    .venv/bin/python tests/protocol.py
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from clients import LinesClient, Message  # noqa: E402 - found through the path above
from fabrik_objects import Report, cronjob, event, job, pod, pvc, run_id  # noqa: E402
from fakes import Authority, ModelServer  # noqa: E402
from harness import Cluster  # noqa: E402
from hosts import Host  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

README: Final = ROOT / "README.md"
COLUMNS: Final = 118
STREAM: Final = "6f1c0e6e-6a0f-4c0b-9d3e-0f6f2a7b1c55"
FIXED: Final = {
    **{"seq": 1042, "pid": 4242, "uptime_seconds": 3600.0, "stream": STREAM},
    **{"clock_skew_seconds": 0.0, "skew_s": 0.0},
}
BLOCK: Final = re.compile(r"^```json ([a-z:-]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NAME: Final = re.compile(r"\b(01[0-9a-hjkmnp-tv-z]{24}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})\b")
_POD: Final = re.compile(r"(fabrik-01[0-9a-z]{24})-[0-9a-z]{5}\b")
_TIME: Final = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


def steady(value: Any, folder: Path) -> Any:
    """Return a message in which what differs from one run to the next is the same: numbers, times, places."""
    if isinstance(value, dict):
        if "event_type" in value:
            value = {**value, "id": FIXED["seq"]}
        return {
            name: FIXED[name] if name in FIXED and item is not None and item != "" else steady(item, folder)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [steady(item, folder) for item in value]
    if isinstance(value, str):
        value = _TIME.sub(lambda match: f"2026-02-16T20:00:00{'.000' if match[1] else ''}Z", value)
        value = re.sub(r"https://127\.0\.0\.1:\d+", "https://127.0.0.1:6443", value)
        value = re.sub(r"/tmp/fabrik-[^/]+/d\.sock", "/tmp/fabrik-daemon.sock", value)
        return value.replace(str(folder / "cache"), "/home/you/.cache/fabrik/daemon")
    return value


class Page:
    """Collects examples."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.examples: dict[str, str] = {}
        self._names: dict[str, str] = {}  # what stands for run ids and uids, which are made of the day's date

    def _named(self, match: re.Match[str]) -> str:
        number = len(self._names) + 1
        uid, ulid = f"00000000-0000-4000-8000-{number:012d}", f"01jk7v8x9m3qn5r2t4w6y8z{number:03d}"
        return match[0] if match[0] == STREAM else self._names.setdefault(match[0], uid if "-" in match[0] else ulid)

    def add(self, name: str, *lines: tuple[str, Message]) -> None:
        """Add an example: what is sent and what comes."""
        wrapped = []
        for arrow, message in lines:
            words = json.dumps(steady(message, self.host.root) if arrow == "<" else message, ensure_ascii=False)
            words = _POD.sub(r"\1-x7k2p", _NAME.sub(self._named, words))
            wrapped += textwrap.wrap(
                words,
                COLUMNS,
                initial_indent=f"{arrow} ",
                subsequent_indent="  ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        self.examples[name] = "".join(f"{line}\n" for line in wrapped)

    def ask(self, name: str, show: Callable[[Message], Message] = lambda answer: answer, **request: Any) -> None:
        """Add a request and its answer."""
        with LinesClient(self.host.socket) as client:
            client.send(json.dumps(request).encode() + b"\n")
            self.add(name, (">", request), ("<", show(client.message())))


def examples(host: Host, model: ModelServer) -> dict[str, str]:
    """Return every example by its name."""
    host.start()
    for resource, item in (
        ("jobs", job(1)),
        ("pods", pod(1, report=Report(finished=150, total=192))),
        ("persistentvolumeclaims", pvc(1)),
        ("cronjobs", cronjob("nightly")),
        ("events", event(pod(1), "FailedMount", "no such volume")),
    ):
        model.put(resource, item)
        host.settle()  # each has a watch of its own: without this their order is open
    page = Page(host)
    add_requests(page)
    with LinesClient(host.socket) as client:
        add_subscription(page, client, model)
    with LinesClient(host.socket) as client:
        add_clusters(page, client)
    page.ask("shutdown", action="shutdown", id=1)
    return page.examples


def first_watch_alone(status: Message) -> Message:
    """Leave out all but one of a cluster's watches; the others look alike."""
    for cluster in status["clusters"]:
        cluster["watches"] = [watch for watch in cluster["watches"] if watch["resource"] == "jobs"]
    return status


def add_requests(page: Page) -> None:
    """Add what is asked once."""
    for action in ("ping", "clusters", "schedules", "volumes", "warnings", "reload"):
        page.ask(action, action=action, id=1)
    page.ask("status", first_watch_alone, action="status", id=1)
    page.ask("runs", action="runs", id=1, clusters=["dev"], filter={"status": ["running", "blocked"]}, limit=10)
    page.ask("run", action="run", id=1, runId=run_id(1))
    page.ask("query", action="query", id=1, sql="SELECT run_id, status FROM runs")
    page.ask("logs", action="logs", id=1, lines=1, level="info")
    page.ask("error", action="runs", id=1, filter={"status": ["runing"]})
    with LinesClient(page.host.socket) as client:
        request = {"action": "logs", "id": 1, "follow": True, "lines": 1, "level": "info"}
        client.send(json.dumps(request).encode() + b"\n")
        page.add("logs-follow", (">", request), ("<", client.message()), ("<", client.message()))


def add_subscription(page: Page, client: LinesClient, model: ModelServer) -> None:
    """Add what a subscriber is told."""
    request = {"action": "subscribe", "id": 1, "clusters": ["*"], "snapshot": True}
    client.send(json.dumps(request).encode() + b"\n")
    page.add("subscribe", (">", request), ("<", client.message()), ("<", client.message()))

    def told(change: Callable[[], object], kind: str = "") -> None:
        change()
        (*_, message) = client.until(lambda message: message["type"] != "seq")
        assert not kind or message["type"] == kind, message
        page.add(message["type"], ("<", message))

    told(lambda: model.put("jobs", job(2)), "run:added")
    told(lambda: model.put("pods", pod(2, report=Report(phase="human-gate", status="blocked"))), "run:updated")
    model.put("jobs", job(4))
    client.until(lambda message: message["type"] == "run:added")
    told(lambda: model.put("jobs", job(4, metadata={"labels": {"fabrik.dev/run-id": run_id(5)}})), "run:removed")
    client.until(lambda message: message["type"] == "run:added")
    told(lambda: model.put("cronjobs", cronjob("weekly", "0 4 * * 1")), "schedule:added")
    told(lambda: model.put("cronjobs", cronjob("weekly", "0 5 * * 1")), "schedule:updated")
    told(lambda: model.delete("cronjobs", "fabrik-runs", "fabrik-schedule-weekly"), "schedule:removed")
    told(lambda: model.put("persistentvolumeclaims", pvc(1, capacity="20Gi")), "volume:updated")
    told(lambda: model.delete("persistentvolumeclaims", "fabrik-runs", f"data-fabrik-{run_id(1)}"), "volume:removed")
    told(lambda: model.put("persistentvolumeclaims", pvc(3)), "volume:added")
    told(lambda: model.put("events", event(pod(1), "FailedMount", "no such volume", count=2)), "warning")
    (*_, message) = client.until(lambda message: message["type"] == "seq")
    page.add("seq", ("<", message))
    request = {"action": "unsubscribe", "id": 2, "subscription": 1}
    client.send(json.dumps(request).encode() + b"\n")
    (*_, message) = client.until(lambda message: message["type"] == "unsubscribed")
    page.add("unsubscribe", (">", request), ("<", {**message, "id": 1}))
    request = {"action": "subscribe", "id": 3, "since": {"stream": STREAM, "seq": 7}, "filter": {"type": ["run:*"]}}
    client.send(json.dumps(request).encode() + b"\n")
    messages = [client.message() for _ in range(3)]
    page.add("lagged", (">", request), *(("<", message) for message in messages[:2]))
    assert messages[2]["type"] == "snapshot"


def add_clusters(page: Page, client: LinesClient) -> None:
    """Add what is told of a cluster: its settings change, so that it is followed anew; then it falls silent."""
    client.ask("subscribe", filter={"type": ["cluster:*"]})
    path = page.host.root / "config" / "clusters.yaml"
    entry = json.loads(path.read_text())["clusters"][0]
    path.write_text(json.dumps({"clusters": [{**entry, "priority": 5}]}))
    with LinesClient(page.host.socket) as other:
        assert other.ask("reload")["type"] == "reload"
    for _ in range(3):
        (*_, message) = client.until(lambda message: message["type"] not in ("seq", "cluster:stale"))
        page.add(message["type"], ("<", message))
    (*_, message) = client.until(lambda message: message["type"] == "cluster:stale")
    page.add("cluster:stale", ("<", message))


def made(executable: Path, unpacked: Path, authority: Authority, folder: Path) -> dict[str, str]:
    """Return the examples of a daemon of one's own."""
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(ModelServer(authority))
        timing = {"idleSeq": "1s", "idle": "8s"}
        host = stack.enter_context(Host(executable, unpacked, folder, [Cluster(model, "dev")], timing=timing))
        return examples(host, model)


def main() -> None:
    """Write the examples into README."""
    with tempfile.TemporaryDirectory() as folder:
        found = made(ROOT / "dist" / "fabrik-daemon", Path(folder, "shiv"), Authority(), Path(folder, "host"))
    text = README.read_text()
    README.write_text(BLOCK.sub(lambda match: f"```json {match[1]}\n{found.get(match[1], '')}```", text))
    missing = found.keys() - {match[1] for match in BLOCK.finditer(text)}
    sys.stdout.write(f"README lacks {sorted(missing)}\n" if missing else "")


if __name__ == "__main__":
    main()
