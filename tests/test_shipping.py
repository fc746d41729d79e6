"""What is sent to LAOS, and when: logs, alerts and metrics as the core has them, without a clock or a socket."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from laos import Loki, program

from fabrik_daemon import (
    ALERTS_AT_ONCE,
    LOKI_SPOOL_BYTES,
    METRIC_RUNS,
    METRICS,
    REFUSED,
    SEVERITIES,
    TAKEN,
    AlertBook,
    AlertRow,
    Change,
    Histogram,
    Laos,
    LaosService,
    LogSpool,
    Run,
    Sample,
    Schedule,
    Shipment,
    StatusTimes,
    Timing,
    UsageError,
    annotations_of,
    causes_of,
    format_finding,
    format_manifest,
    format_metrics,
    format_time,
    laos_of,
    laos_targets,
    run_samples,
    samples_of_cluster,
    services_from,
    verdict_of,
)

NOW: Final = 1_771_272_000.0  # seconds since 1970; what is monotonic here begins there too
TIMING: Final = Timing()
SERVICE: Final = LaosService("http://laos")


def run(status: str, number: int = 1, **more: Any) -> Run:
    return Run(f"r{number}", "dev", "fabrik-runs", status=status, spec_id="feature-x", **more)


class Book:
    """An AlertBook and what it sends, as an Alertmanager that answers as told would have it."""

    def __init__(self, *, answers: list[int] | None = None) -> None:
        self.book = AlertBook(TIMING, lambda: 0.0, 0.0)
        self.book.clusters = frozenset({"dev"})
        self.answers = answers or []
        self.rows: dict[str, AlertRow] = {}
        self.posts: list[list[dict[str, Any]]] = []

    def see(self, row: Run | Schedule, *, since: float | None = None, skew_s: float = 0.0) -> None:
        self.book.observe(row, causes_of(row, since, TIMING, skew_s))

    def at(self, now: float, *, known: str = "dev", live: str = "dev") -> None:
        """Let the time come; send all that is due then."""
        for row in self.book.check(now, now, known={known}, live={live}):
            self.rows[row.fingerprint] = row
        for row in self.book.forget(now):
            del self.rows[row.fingerprint]
        while True:
            shipment = self.book.due(now)
            if shipment is None:
                return
            assert (shipment.method, shipment.path) == ("POST", "/api/v2/alerts")
            alerts = json.loads(shipment.body())
            status = self.answers.pop(0) if self.answers else 200
            self.posts.append(alerts)
            self.book.on_answer(status, "", None, now)

    @property
    def firing(self) -> list[str]:
        return sorted(json.loads(row.fingerprint)["alertname"] for row in self.rows.values() if row.ends_at is None)


def test_a_gate_fires_is_told_each_minute_and_over_for_fifteen() -> None:
    book = Book()
    book.see(run("blocked", phase="human-gate"), since=NOW - 5)
    book.at(NOW)
    assert book.posts == []
    for second in range(1, 200):
        book.at(NOW + second)
    assert len(book.posts) == 4, "at once, and after one, two and three minutes"
    for post in book.posts:
        assert post[0]["startsAt"] == format_time(NOW - 5, milliseconds=True)
    assert book.posts[0][0]["endsAt"] == format_time(NOW + 1 + 240, milliseconds=True)
    assert book.posts[0][0]["labels"] == {
        "alertname": "FabrikHumanGateBlocked",
        "severity": "P1",
        "cluster": "dev",
        "namespace": "fabrik-runs",
        "run_id": "r1",
        "spec_id": "feature-x",
    }
    del book.posts[:]
    book.see(run("running"))
    for second in range(200, 200 + 2000):
        book.at(NOW + second)
    assert {alert["endsAt"] for post in book.posts for alert in post} == {format_time(NOW + 200, milliseconds=True)}
    assert len(book.posts) == 15
    assert book.rows == {}


def test_a_restart_keeps_the_beginning_and_ends_what_is_over_only_when_the_cluster_has_told() -> None:
    before = Book()
    before.see(run("blocked", phase="human-gate"), since=NOW)
    before.see(run("blocked", 2, phase="human-gate"), since=NOW)
    before.at(NOW + 1)
    after = Book()
    after.rows = dict(before.rows)
    after.book.load_rows(before.rows.values())
    after.see(run("blocked", phase="human-gate"), since=NOW + 77)
    after.at(NOW + 100, known="", live="")
    assert [alert["labels"]["run_id"] for alert in after.posts[0]] == ["r1"], "of the other nobody knows yet"
    assert after.posts[0][0]["startsAt"] == format_time(NOW, milliseconds=True)
    assert len(after.firing) == 2
    after.at(NOW + 101)
    after.at(NOW + 102)
    ended = after.posts[-1][0]
    assert (ended["labels"]["run_id"], ended["endsAt"]) == ("r2", format_time(NOW + 101, milliseconds=True))
    assert after.firing == ["FabrikHumanGateBlocked"]


@pytest.mark.parametrize(
    ("row", "since", "at", "names"),
    [
        (run("blocked", phase="human-gate"), NOW, NOW, ["FabrikHumanGateBlocked"]),
        (run("blocked", phase="implement"), NOW, NOW, ["FabrikHumanGateBlocked"]),
        (run("blocked", reason="rate_limit_exhausted"), NOW, NOW, ["FabrikCredentialsExhausted"]),
        (
            run("blocked", phase="human-gate", reason="rate_limit_exhausted"),
            NOW,
            NOW,
            ["FabrikCredentialsExhausted", "FabrikHumanGateBlocked"],
        ),
        (run("failed", finished_at=format_time(NOW)), None, NOW + 3599, ["FabrikRunFailed"]),
        (run("failed", finished_at=format_time(NOW)), None, NOW + 3601, []),
        (run("failed"), None, NOW, []),
        (run("pending"), NOW, NOW + 599, []),
        (run("pending"), NOW, NOW + 601, ["FabrikRunPending"]),
        (run("running", heartbeat_at=format_time(NOW)), NOW, NOW + 59, []),
        (run("running", heartbeat_at=format_time(NOW)), NOW, NOW + 61, ["FabrikHeartbeatStale"]),
        (run("running"), NOW, NOW + 9999, []),
        (run("finished", finished_at=format_time(NOW)), None, NOW, []),
        (run("cancelled"), None, NOW, []),
        (Schedule("dev", "fabrik-runs", "nightly", missed=2), None, NOW, ["FabrikScheduleMissed"]),
        (Schedule("dev", "fabrik-runs", "nightly"), None, NOW, []),
    ],
)
def test_what_is_worth_an_alert(row: Run | Schedule, since: float | None, at: float, names: list[str]) -> None:
    book = Book()
    book.see(row, since=since)
    book.at(at)
    assert book.firing == names
    for cause in causes_of(row, since, TIMING, 0.0):
        told = annotations_of(cause)
        assert "fabrik-daemon runs show --id r1" in told["description"] or "kubectl" in told["description"]


def test_a_failed_run_fires_for_an_hour() -> None:
    book = Book()
    book.see(run("failed", finished_at=format_time(NOW)))
    book.at(NOW + 1)
    assert book.firing == ["FabrikRunFailed"]
    book.at(NOW + 3601)
    assert book.firing == []


def test_silence_while_a_cluster_is_away_is_nobodys_fault() -> None:
    book = Book()
    book.see(run("running", heartbeat_at=format_time(NOW)))
    book.see(run("pending", 2), since=NOW)
    book.see(run("blocked", 3, phase="human-gate"), since=NOW)
    book.at(NOW + 10_000, live="")
    assert book.firing == ["FabrikHumanGateBlocked"]
    book.at(NOW + 10_001)
    assert book.firing == ["FabrikHeartbeatStale", "FabrikHumanGateBlocked", "FabrikRunPending"]


def test_a_cluster_with_another_clock_is_judged_by_its_own() -> None:
    book = Book()
    book.see(run("running", heartbeat_at=format_time(NOW - 600)), skew_s=-600)
    book.at(NOW + 59)
    assert book.firing == []
    book.at(NOW + 61)
    assert book.firing == ["FabrikHeartbeatStale"]


def test_what_is_refused_bars_nothing_else() -> None:
    """Of a company that is refused each goes alone; the one that was meant is not sent again, the others are."""
    bad = "r3"
    book = Book()
    for number in range(1, 6):
        book.see(run("blocked", number, phase="human-gate"), since=NOW)
    sent: list[str] = []
    posts: list[list[str]] = []
    book.book.check(NOW, NOW, known={"dev"}, live={"dev"})
    now = NOW + 1
    for second in range(200):
        now = NOW + 1 + second
        while (shipment := book.book.due(now)) is not None:
            runs = [alert["labels"]["run_id"] for alert in json.loads(shipment.body())]
            status = 400 if bad in runs else 200
            sent += runs if status == 200 else []
            posts.append(runs)
            assert book.book.on_answer(status, "bad alert", None, now) == (TAKEN if status == 200 else REFUSED)
    assert sorted(set(sent)) == ["r1", "r2", "r4", "r5"]
    assert sent.count("r1") == 4, "at once, and each minute"
    assert posts.count([bad]) == 1


def test_alerts_go_in_companies_and_wait_while_alertmanager_is_away() -> None:
    book = Book(answers=[503, 0, 200])
    for number in range(ALERTS_AT_ONCE + 10):
        book.see(run("blocked", number, phase="human-gate"), since=NOW)
    for second in range(10):
        book.at(NOW + second)
    assert [len(post) for post in book.posts] == [ALERTS_AT_ONCE, ALERTS_AT_ONCE, ALERTS_AT_ONCE, 10]


def test_names_of_a_hostile_cluster_stay_words_of_the_command() -> None:
    row = run("failed", finished_at=format_time(NOW))._replace(run_id="r1; rm -rf '~'")
    told = annotations_of(causes_of(row, None, TIMING, 0.0)[0])["description"]
    assert told.endswith("fabrik-daemon runs show --id 'r1; rm -rf '\\''~'\\'''")


def line(number: int, message: str = "a message", **more: str) -> dict[str, Any]:
    return {"time": format_time(NOW, milliseconds=True), "level": "info", "message": f"{number} {message}", **more}


def spool() -> LogSpool:
    return LogSpool(TIMING, random.Random(1).random, {"job": "fabrik-daemon", "host": "h"}, {"version": "1"})


def test_lines_go_in_batches_and_none_is_taken_for_another() -> None:
    logs, loki = spool(), Loki(clock=lambda: NOW)
    for number in range(3):
        logs.put(line(0 * number, cluster="dev"), 10.0)
    assert (logs.due(10.5), len(logs)) == (None, 3)
    shipment = logs.due(11.0)
    assert shipment is not None
    assert logs.due(99.0) is None, "one at a time"
    loki_answer = receive(loki, shipment)
    assert logs.on_answer(loki_answer, "", None, 11.0) == TAKEN
    assert (logs.sent, logs.dropped, len(logs), logs.deadline) == (3, 0, 0, float("inf"))
    times = [time_ns for _, time_ns, _, _ in loki.lines()]
    assert len(set(times)) == 3, "alike as they are, Loki would keep one of each time"


def receive(loki: Loki, shipment: Shipment) -> int:
    """Have the Loki stand-in take a push."""
    return loki.receive(shipment.path, dict(shipment.headers), shipment.body())[0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(100, 4000), st.sampled_from([40, 1000, 4000]))
def test_an_outage_loses_nothing_within_the_bound_and_counts_what_is_lost_beyond(
    seed: int, count: int, size: int
) -> None:
    """A minute without Loki while lines come; afterwards all is there in order but for the oldest that had no room."""
    chance, logs, loki = random.Random(seed), spool(), Loki(clock=lambda: NOW)
    now, number, held = 0.0, 0, 0
    while now < 300.0:
        if now < 60.0 and number < count:
            for _ in range(count // 60 + 1):
                logs.put(line(number, "x" * size), now)
                number += 1
        shipment = logs.due(now)
        if shipment is not None:
            if now < 60.0:
                status = chance.choice([0, 429, 500, 503])
            else:
                loki._level = 0.0
                status = receive(loki, shipment)
            logs.on_answer(status, "", chance.choice([None, 0.5]), now)
        held = max(held, sum(one.size for one in logs._lines))
        now += 0.25
    assert held <= LOKI_SPOOL_BYTES
    numbers = [int(json.loads(text)["message"].split()[0]) for _, _, text, _ in loki.lines()]
    assert loki.refusals == []
    assert numbers == list(range(logs.dropped, number)), "the newest, in order, once each"
    assert (logs.sent, len(logs)) == (number - logs.dropped, 0)
    if number * (size + 400) < LOKI_SPOOL_BYTES:
        assert logs.dropped == 0
    if number * size > LOKI_SPOOL_BYTES:
        assert logs.dropped > 0


def test_what_a_status_means() -> None:
    assert [verdict_of(status) for status in (200, 204, 400, 413, 422)] == [TAKEN, TAKEN, REFUSED, REFUSED, REFUSED]
    assert {verdict_of(status) for status in (0, 301, 401, 403, 404, 429, 500, 503)} == {"failed"}


def test_a_retry_after_is_kept_to_within_reason() -> None:
    logs = spool()
    logs.put(line(1), 0.0)
    assert logs.due(1.0)
    logs.on_answer(429, "", 5.0, 1.0)
    assert 6.0 <= logs.deadline <= 7.0
    assert logs.due(7.0)
    logs.on_answer(429, "", 86400.0, 7.0)
    assert logs.deadline <= 7.0 + 10 * TIMING.laos_retry_max


def test_where_logs_alerts_and_metrics_go() -> None:
    own = LaosService("http://own")
    overall = Laos(loki=SERVICE, alertmanager=SERVICE, pushgateway=SERVICE)
    clusters = {
        "a": overall,
        "b": Laos(loki=own, alerts="direct").over(overall),
        "c": Laos(alerts="rules").over(overall),
    }
    told = [(t.kind, t.service.url, sorted(t.clusters), t.is_overall) for t in laos_targets(overall, clusters)]
    assert told == [
        ("loki", "http://laos", ["a", "c"], True),
        ("loki", "http://own", ["b"], False),
        ("alertmanager", "http://laos", ["b"], True),
        ("pushgateway", "http://laos", ["a", "b", "c"], True),
    ]


def test_services_are_known_by_port_and_name_and_reached_where_they_can_be() -> None:
    def service(name: str, port: int, **spec: Any) -> dict[str, Any]:
        status = {"loadBalancer": spec.pop("balancer", {})}
        ports = [{"port": port, **({"nodePort": spec.pop("node_port")} if "node_port" in spec else {})}]
        return {
            "metadata": {"name": name, "namespace": "monitoring"},
            "spec": {"ports": ports, **spec},
            "status": status,
        }

    document = {
        "items": [
            service("loki", 3100, type="LoadBalancer", balancer={"ingress": [{"ip": "192.0.2.7"}]}),
            service("prometheus-alertmanager", 9093, type="NodePort", node_port=30093),
            service("prometheus-server", 9090, type="ClusterIP"),
            service("prometheus-pushgateway", 9091, externalIPs=["192.0.2.8"]),
            service("grafana", 3000),
            service("loki-gateway", 80),
        ]
    }
    found = {each.kind: each.url for each in services_from(document, "2001:db8::1", in_cluster=False)}
    assert found == {
        "loki": "http://192.0.2.7:3100",
        "alertmanager": "http://[2001:db8::1]:30093",
        "prometheus": None,
        "pushgateway": "http://192.0.2.8:9091",
    }
    inside = services_from(document, "10.0.0.1", in_cluster=True)
    assert laos_of(inside).prometheus == LaosService("http://prometheus-server.monitoring.svc:9090")
    words = [format_finding(each) for each in services_from(document, "h", in_cluster=False)]
    assert any(
        "prometheus found (monitoring/prometheus-server, ClusterIP), but not reachable" in each for each in words
    )
    assert (
        services_from({"items": [{"spec": {"ports": [{"port": 3100}]}}, {}, {"metadata": 5}]}, "h", in_cluster=True)
        == []
    )


def change(row: Run, before: Run | None = None, at: float = NOW) -> Change:
    return Change(1, "run:updated" if before else "run:added", row, before, format_time(at, milliseconds=True))


def test_since_when_a_run_waits_is_told_by_its_report_where_that_is_earlier() -> None:
    times = StatusTimes()
    times.load([("r9", format_time(NOW - 100)), ("r8", None)])
    running, blocked = run("running"), run("blocked", updated_at=format_time(NOW - 3))
    times.take(change(running))
    times.take(change(blocked, running))
    assert times.of("r1") == NOW - 3
    times.take(change(blocked._replace(updated_at=format_time(NOW + 50)), blocked, NOW + 50))
    assert (times.of("r1"), times.of("r9"), times.of("r8")) == (NOW - 3, NOW - 100, None)
    times.take(change(run("finished"), blocked))
    assert times.of("r1") is None


def test_series_are_bounded_and_those_who_wait_come_first() -> None:
    times = StatusTimes()
    runs = [
        run("running", number, heartbeat_at=format_time(NOW), created_at=format_time(NOW + number))
        for number in range(METRIC_RUNS + 10)
    ]
    runs.append(run("blocked", 99_999, created_at=format_time(NOW - 9999)))
    times.load((each.run_id, format_time(NOW)) for each in runs)
    found = list(run_samples(runs, times, ["dev", "quiet"], NOW))
    own = [each for each in found if each.name.startswith("fabrik_run_")]
    assert len(own) == METRIC_RUNS
    assert own[0].name == "fabrik_run_blocked_since_timestamp_seconds"
    assert Sample("fabrik_runs_omitted", (), 11) in found
    assert Sample("fabrik_runs", ("quiet", "failed"), 0) in found
    assert Sample("fabrik_daemon_cache_size", ("dev",), METRIC_RUNS + 11) in found


def test_the_text_of_every_metric_is_clean(tmp_path: Path) -> None:
    """Whatever labels hold, promtool finds nothing to say."""
    hostile = 'a"b\\c\nd\u2028\ud7ff'
    samples = [
        Sample(name, tuple(f"{hostile}{index}" for index in range(len(labels))), 1.5)
        for name, (kind, _, labels) in METRICS.items()
        if kind != "histogram"
    ]
    histogram = Histogram()
    for seconds in (0.0001, 0.004, 0.03, 99.0):
        histogram.observe(seconds)
    text = format_metrics(samples, {name: histogram for name, (kind, _, _) in METRICS.items() if kind == "histogram"})
    assert b"_created" not in text
    assert b'fabrik_daemon_event_to_cache_seconds_bucket{le="0.005"} 2.0' in text
    assert b'fabrik_daemon_event_to_cache_seconds_bucket{le="+Inf"} 4.0' in text
    linted = subprocess.run([program("promtool"), "check", "metrics"], input=text, capture_output=True, check=False)
    assert (linted.returncode, linted.stdout, linted.stderr) == (0, b"", b"")


def test_a_clusters_own_pushgateway_hears_of_that_cluster_alone() -> None:
    samples = [Sample("fabrik_runs", (name, "failed"), 1) for name in "ab"] + [
        Sample("fabrik_daemon_subscribers", (), 1)
    ]
    assert samples_of_cluster(samples, "a") == [samples[0], samples[2]]


def test_the_rules_do_what_the_daemon_does(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(format_manifest("prometheus-rules", {"form": "file"}))
    shutil.copy(Path(__file__).parent / "data" / "prometheus-rules-test.yml", tmp_path / "test.yml")
    for words in (("check", "rules", "rules.yml"), ("test", "rules", "test.yml")):
        done = subprocess.run([program("promtool"), *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("form", ["service", "scrapeconfig", "cluster"])
def test_what_tells_the_operators_prometheus_of_the_daemon(form: str) -> None:
    text = format_manifest("prometheus", {"form": form, "address": "192.0.2.77", "namespace": "laos", "interval": "7s"})
    documents = {document["kind"]: document for document in yaml.safe_load_all(text)}
    assert all(document["metadata"]["namespace"] == "laos" for document in documents.values())
    if form == "service":
        assert set(documents) == {"Service", "Endpoints", "ServiceMonitor"}
        assert documents["Endpoints"]["subsets"][0]["addresses"] == [{"ip": "192.0.2.77"}]
        assert documents["Endpoints"]["metadata"]["name"] == documents["Service"]["metadata"]["name"]
        selected = documents["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items()
        assert selected <= documents["Service"]["metadata"]["labels"].items()
    elif form == "cluster":
        deployed = yaml.safe_load_all(format_manifest("deployment", {}))
        service = next(document for document in deployed if document["kind"] == "Service")
        monitor = documents["ServiceMonitor"]["spec"]
        assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        assert monitor["namespaceSelector"]["matchNames"] == [service["metadata"]["namespace"]]
        assert monitor["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
    else:
        assert documents["ScrapeConfig"]["spec"]["staticConfigs"] == [{"targets": ["192.0.2.77:9464"]}]


def test_what_tells_a_plain_prometheus_of_the_daemon(tmp_path: Path) -> None:
    (tmp_path / "prometheus.yml").write_text(format_manifest("prometheus", {"form": "file"}))
    command = [program("promtool"), "check", "config", "prometheus.yml"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0


def test_the_operators_rules_are_those_of_the_file() -> None:
    plain = yaml.safe_load(format_manifest("prometheus-rules", {"form": "file"}))
    rules = yaml.safe_load(format_manifest("prometheus-rules", {}))
    assert (rules["kind"], rules["spec"]) == ("PrometheusRule", plain)
    assert {rule["alert"]: rule["labels"]["severity"] for rule in plain["groups"][0]["rules"]} == SEVERITIES


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    board = json.loads(format_manifest("grafana", {}))
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"fabrik_\w+", target["expr"])
    }
    assert len(asked) > 15
    assert {re.sub(r"_bucket$", "", name) for name in asked} <= set(METRICS)
    assert "$$" not in json.dumps(board)


def test_a_form_that_there_is_not_is_told() -> None:
    with pytest.raises(UsageError, match="did you mean 'scrapeconfig'"):
        format_manifest("prometheus", {"form": "scrapecfg"})
