"""The built daemon beside Debian's Prometheus, Alertmanager and Pushgateway, and a stand-in for Loki."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final

import pytest
import trustme
from clients import LinesClient, http_request
from fabrik_objects import Report, cronjob, job, pod, pvc, run_id
from fakes import ModelServer
from harness import Cluster, wait_until
from hosts import Host
from laos import Alertmanager, Loki, Prometheus, Pushgateway, free_port, program, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from fakes import Authority

SOON_S: Final = 20.0  # generous: the machine may be busy
PROMISED_S: Final = 2.0  # from the API server's event to an alert that fires
TRIES: Final = 3


@pytest.fixture
def cluster(authority: Authority) -> Iterator[ModelServer]:
    with ModelServer(authority) as server:
        yield server
    assert server.violations == []


@pytest.fixture
def host(executable: Path, unpacked: Path, tmp_path: Path, cluster: ModelServer) -> Iterator[Host]:
    with Host(executable, unpacked, tmp_path / "host", [Cluster(cluster, "dev")]) as made:
        yield made


def configure(host: Host, timing: Mapping[str, object] | None = None, **settings: object) -> None:
    """Write the host's config.yaml."""
    made = {"timing": timing or {}, **settings}
    (host.root / "config" / "config.yaml").write_text(json.dumps(made))


def report(server: ModelServer, number: int, phase: str = "implement", **more: Any) -> None:
    """Have a run report; at its human gate it waits for a person."""
    status = "blocked" if phase == "human-gate" else "running"
    updated = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    server.put("pods", pod(number, report=Report(phase=phase, status=status, updated=updated, **more)))


def begin(server: ModelServer, number: int, phase: str = "implement") -> str:
    """Begin a run and return its id."""
    server.put("jobs", job(number))
    report(server, number, phase)
    return run_id(number)


def metrics_of(host: Host) -> str:
    """Return what /metrics on the Unix socket says."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(host.socket))
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        assert answer.getheader("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"
        return answer.read().decode()


def sample(text: str, name: str) -> float | None:
    """Return one value of an exposition; the name with its labels, as they are written."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else None


def status_word(status: str) -> str:
    return f'fabrik_runs{{cluster="dev",status="{status}"}}'


def test_the_metrics_are_those_of_the_spec_and_clean(host: Host, cluster: ModelServer) -> None:
    gate = begin(cluster, 1, "human-gate")
    begin(cluster, 2)
    cluster.put("jobs", job(3, conditions=["Complete"]))
    cluster.put("cronjobs", cronjob("nightly"))
    configure(host, metrics={"listen": "127.0.0.1:0"})
    host.start()
    with LinesClient(host.socket) as client:
        client.request("subscribe", clusters=["*"])
        client.until(lambda message: message["type"] == "subscribed")
        assert client.ask("runs")["runs"]
        assert client.ask("run", runId="no-such-run")["code"] == "not_found"
        report(cluster, 2, finished=151)
        client.until(lambda message: message.get("runId") == run_id(2))
        text = metrics_of(host)
    values: dict[str, object] = {
        'fabrik_daemon_cache_size{cluster="dev"}': 3,
        'fabrik_daemon_cluster_connected{cluster="dev"}': 1,
        'fabrik_daemon_events_total{cluster="dev",resource="pods"}': 1,
        "fabrik_daemon_events_dropped_total": 0,
        "fabrik_daemon_events_dropped": 0,
        "fabrik_daemon_cache_hit_ratio": 0.5,
        "fabrik_daemon_subscribers": 1,
        'fabrik_daemon_list_total{cluster="dev",resource="jobs",result="success"}': 1,
        'fabrik_daemon_watch_total{cluster="dev",resource="jobs",result="success"}': 1,
        'fabrik_daemon_alerts_direct{cluster="dev"}': 0,
        "fabrik_daemon_event_to_subscriber_seconds_count": 1,
        status_word("blocked"): 1,
        status_word("running"): 1,
        status_word("finished"): 1,
        status_word("failed"): 0,
    }
    assert {name: sample(text, name) for name in values} == values
    lag = sample(text, 'fabrik_daemon_sync_lag_seconds{cluster="dev",resource="pods"}')
    assert lag is not None
    assert 0 <= lag < 60
    assert re.search(rf'^fabrik_run_blocked_since_timestamp_seconds{{.*run_id="{gate}".*}} \S+$', text, re.MULTILINE)
    assert f'run_id="{run_id(3)}"' not in text, "a run that is over has no series of its own"
    assert "_created" not in text
    linted = subprocess.run([program("promtool"), "check", "metrics"], input=text.encode(), capture_output=True)  # noqa: PLW1510
    assert (linted.returncode, linted.stdout, linted.stderr) == (0, b"", b"")


def test_the_port_tells_metrics_and_nothing_else(host: Host) -> None:
    configure(host, metrics={"listen": "127.0.0.1:0"})
    host.start()
    connection = http.client.HTTPConnection(host.status()["metrics"], timeout=10)
    found = []
    for method, path in (("GET", "/metrics"), ("GET", "/status"), ("GET", "/v1/runs"), ("POST", "/v1/shutdown")):
        connection.request(method, path)
        answer = connection.getresponse()
        answer.read()
        found.append(answer.status)
    connection.close()
    assert found == [200, 404, 404, 404]


def test_an_address_that_is_taken_is_told_in_one_line(host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        configure(host, metrics={"listen": address})
        done = host.cli("start", "--foreground")
    assert done.returncode == 2
    assert f"fabrik-daemon: metrics.listen {address}: Address already in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_prometheus_scrapes_the_daemon_and_answers_with_the_right_values(
    host: Host, cluster: ModelServer, tmp_path: Path
) -> None:
    port = free_port()
    begin(cluster, 1, "human-gate")
    begin(cluster, 2)
    configure(host, metrics={"listen": f"127.0.0.1:{port}"})
    prometheus = Prometheus(tmp_path / "prometheus", {"fabrik-daemon": f"127.0.0.1:{port}"})
    host.start()
    with running(prometheus):
        wait_until(lambda: prometheus.value("up") == 1, SOON_S, "Prometheus scrapes")
        assert prometheus.value('fabrik_runs{cluster="dev",status="blocked"}') == 1
        assert prometheus.value("sum(fabrik_runs)") == 2
        assert prometheus.value("fabrik_daemon_cache_size") == 2
        assert prometheus.value("fabrik_daemon_cluster_connected") == 1
        report(cluster, 1)
        wait_until(lambda: prometheus.value('fabrik_runs{status="blocked"}') == 0, SOON_S, "the gate is open")
        assert prometheus.value('fabrik_runs{status="running"}') == 2
        dashboard = json.loads(host.cli("manifests", "grafana").stdout)
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                prometheus.query(target["expr"].replace("$cluster", ".*"))  # fails for what does not parse


def firing(alertmanager: Alertmanager) -> list[tuple[str, str]]:
    """Return name and run of each alert that fires."""
    return sorted((alert["labels"]["alertname"], alert["labels"].get("run_id", "")) for alert in alertmanager.alerts())


def test_a_human_gate_fires_at_once_stays_one_alert_over_a_restart_and_resolves(
    host: Host, cluster: ModelServer, tmp_path: Path
) -> None:
    alertmanager = Alertmanager(tmp_path / "alertmanager")
    configure(host, laos={"alerts": "direct", "alertmanager": {"url": alertmanager.url}})
    for number in range(1, TRIES + 1):
        begin(cluster, number)
    cluster.put("jobs", job(9, conditions=["Failed=BackoffLimitExceeded"]))  # long ago: over, and silent
    with running(alertmanager):
        host.start()
        took: list[float] = []
        for number in range(1, TRIES + 1):  # the machine may be busy
            put_at = time.monotonic()
            report(cluster, number, "human-gate")
            wanted = [("FabrikHumanGateBlocked", run_id(each)) for each in range(1, number + 1)]
            wait_until(lambda: firing(alertmanager) == sorted(wanted), SOON_S, "the gate's alert fires")  # noqa: B023
            took.append(time.monotonic() - put_at)
            if took[-1] < PROMISED_S:
                break
        assert min(took) < PROMISED_S, took
        before = {alert["fingerprint"]: alert for alert in alertmanager.alerts()}
        first = next(iter(before.values()))
        assert first["labels"] == {
            "alertname": "FabrikHumanGateBlocked",
            "severity": "P1",
            "cluster": "dev",
            "namespace": "fabrik-runs",
            "run_id": run_id(1),
            "spec_id": "feature-x",
        }
        assert f"fabrik-daemon runs show --id {run_id(1)}" in first["annotations"]["description"]
        ends_in_s = time.mktime(time.strptime(first["endsAt"][:19], "%Y-%m-%dT%H:%M:%S")) - time.mktime(time.gmtime())
        assert 180 < ends_in_s <= 241, "four intervals ahead"
        host.stop()
        host.launch()
        taken = 'fabrik_daemon_deliveries_total{result="taken",target="alertmanager"}'
        wait_until(lambda: (sample(metrics_of(host), taken) or 0) >= 1, SOON_S, "alerts are sent again")
        after = {alert["fingerprint"]: alert for alert in alertmanager.alerts()}
        assert after.keys() == before.keys()
        assert [alert["startsAt"] for alert in after.values()] == [alert["startsAt"] for alert in before.values()]
        assert sample(metrics_of(host), 'fabrik_daemon_alerts_direct{cluster="dev"}') == 1
        for number in range(1, len(before) + 1):
            report(cluster, number)
        wait_until(lambda: firing(alertmanager) == [], SOON_S, "the alert is over when the gate is passed")
        (service,) = host.status()["laos"]
        assert (service["target"], service["url"], service["error"]) == ("alertmanager", alertmanager.url, None)
        host.stop()


def test_alerts_are_sent_only_where_that_is_switched_on(host: Host, cluster: ModelServer, tmp_path: Path) -> None:
    alertmanager = Alertmanager(tmp_path / "alertmanager")
    configure(host, laos={"alertmanager": {"url": alertmanager.url}}, timing={"alertResend": "200ms"})
    begin(cluster, 1, "human-gate")
    with running(alertmanager):
        host.start()
        report(cluster, 1, "human-gate", finished=151)
        host.settle()
        time.sleep(1)  # nothing tells that nothing happens
        assert firing(alertmanager) == []
        assert 'target="alertmanager"' not in metrics_of(host)


def test_rules_fire_in_prometheus_and_keep_silent_where_the_daemon_itself_sends(
    host: Host, cluster: ModelServer, tmp_path: Path
) -> None:
    port = free_port()
    alertmanager = Alertmanager(tmp_path / "alertmanager")
    rules = host.cli("manifests", "prometheus-rules", "--set", "form=file").stdout
    prometheus = Prometheus(
        tmp_path / "prometheus",
        {"fabrik-daemon": f"127.0.0.1:{port}"},
        rules=rules,
        alertmanager=alertmanager.url.partition("//")[2],
    )
    laos = {"alerts": "rules", "alertmanager": {"url": alertmanager.url}}
    configure(host, metrics={"listen": f"127.0.0.1:{port}"}, laos=laos)
    begin(cluster, 1)
    with running(alertmanager, prometheus):
        host.start()
        report(cluster, 1, "human-gate")
        gate = [("FabrikHumanGateBlocked", run_id(1))]
        wait_until(lambda: firing(alertmanager) == gate, SOON_S, "the rule fires")
        labels = alertmanager.alerts()[0]["labels"]
        assert labels == {
            "alertname": "FabrikHumanGateBlocked",
            "severity": "P1",
            "cluster": "dev",
            "namespace": "fabrik-runs",
            "run_id": run_id(1),
            "spec_id": "feature-x",
        }, "the same as those of an alert that the daemon sends"
        report(cluster, 1)
        wait_until(lambda: prometheus.query("ALERTS") == [], SOON_S, "the rule is over")
        host.stop()
        configure(host, metrics={"listen": f"127.0.0.1:{port}"}, laos={**laos, "alerts": "direct"})
        host.launch()
        report(cluster, 1, "human-gate")
        blocked = "fabrik_run_blocked_since_timestamp_seconds"
        wait_until(lambda: prometheus.query(blocked), SOON_S, "Prometheus knows that the run is blocked")
        wait_until(lambda: firing(alertmanager) == gate, SOON_S, "the daemon's alert fires")
        assert prometheus.query("ALERTS") == []


def test_the_pushgateway_has_the_metrics_of_a_host_that_cannot_be_reached(
    host: Host, cluster: ModelServer, tmp_path: Path
) -> None:
    gateway = Pushgateway(tmp_path / "pushgateway")
    prometheus = Prometheus(tmp_path / "prometheus", {"pushgateway": gateway.url.partition("//")[2]})
    begin(cluster, 1, "human-gate")
    configure(host, laos={"pushgateway": {"url": gateway.url}}, timing={"push": "200ms"})
    with running(gateway, prometheus):
        host.start()
        blocked = f'fabrik_runs{{job="fabrik-daemon",instance="{socket.gethostname()}",status="blocked"}}'
        wait_until(lambda: prometheus.value(blocked) == 1, SOON_S, "Prometheus scrapes what was pushed")
        report(cluster, 1)
        wait_until(lambda: prometheus.value(blocked) == 0, SOON_S, "a push takes the place of those before")


class Sink:
    """Takes what Alertmanager's receivers send, and tells metrics of others."""

    def __init__(self, exposition: str = "") -> None:
        got: dict[str, list[dict[str, Any]]] = {}

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                got.setdefault(self.path, []).append(body)
                self.send_response(202)
                self.end_headers()

            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(exposition.encode())

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Say nothing."""

        self.got = got
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Take no more."""
        self.server.shutdown()
        self.server.server_close()


def test_a_real_alertmanager_takes_and_renders_the_routes_and_receivers(
    host: Host, cluster: ModelServer, tmp_path: Path
) -> None:
    sink = Sink()
    try:
        words = ("--set", f"pagerduty_url={sink.url}/pd", "--set", f"zulip_url={sink.url}/zulip")
        made = host.cli("manifests", "alertmanager", *words)
        (tmp_path / "alertmanager.yml").write_text(made.stdout)
        checked = subprocess.run(
            [program("amtool"), "check-config", str(tmp_path / "alertmanager.yml")], capture_output=True, check=False
        )
        assert checked.returncode == 0, checked
        alertmanager = Alertmanager(tmp_path / "alertmanager", made.stdout)
        configure(host, laos={"alerts": "direct", "alertmanager": {"url": alertmanager.url}})
        begin(cluster, 1)
        failing = begin(cluster, 2)
        with running(alertmanager):
            host.start()
            report(cluster, 1, "human-gate")
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            failed = job(2, conditions=["Failed=BackoffLimitExceeded"])
            failed["status"]["conditions"][0]["lastTransitionTime"] = now
            cluster.put("jobs", failed)
            wait_until(lambda: len(sink.got) == 2, SOON_S, "both receivers are told")
        assert sink.got["/pd"][0]["payload"]["summary"] == f"Run {run_id(1)} blocked on human gate"
        assert "fabrik-daemon runs show" in sink.got["/pd"][0]["payload"]["custom_details"]["what_to_do"]
        assert [alert["labels"]["alertname"] for alert in sink.got["/zulip"][0]["alerts"]] == ["FabrikRunFailed"]
        assert sink.got["/zulip"][0]["commonLabels"]["run_id"] == failing
    finally:
        sink.close()


def talk(host: Host, count: int) -> None:
    """Have the daemon write so many lines to its log."""
    with LinesClient(host.socket) as client:
        for _ in range(count):
            assert client.ask("reload")["type"] == "reload"


def logged(host: Host) -> list[str]:
    """Return the messages of the daemon's log."""
    with LinesClient(host.socket) as client:
        return [line["message"] for line in client.ask("logs", lines=2000)["lines"]]


def complaints(host: Host) -> list[str]:
    """Return what the daemon's log says of Loki."""
    return [line for line in logged(host) if line.startswith("loki at")]


def reloads(loki: Loki) -> int:
    return sum(json.loads(text)["message"].startswith("reloaded:") for _, _, text, _ in loki.lines())


QUICK: Final = {"logBatch": "50ms", "backoffMin": "50ms", "laosRetryMax": "200ms"}


def test_loki_takes_every_line_with_few_labels_and_the_rest_as_metadata(host: Host) -> None:
    loki = Loki()
    configure(host, laos={"loki": {"url": loki.url, "tenant": "fabrik"}}, timing=QUICK)
    with running(loki):
        host.start()
        talk(host, 30)
        wait_until(lambda: reloads(loki) == 30, SOON_S, "every line is in Loki")
        wait_until(lambda: len(loki.lines()) == len(logged(host)), SOON_S, "as many as in the ring")
        host.stop()
    assert "SIGTERM: stopping" in loki.lines()[-1][2]
    assert loki.refusals == []
    labels = [labels for labels, _, _, _ in loki.lines()]
    assert all(label.keys() <= {"job", "host", "cluster", "level"} for label in labels)
    assert {label["job"] for label in labels} == {"fabrik-daemon"}
    assert "dev" in {label.get("cluster") for label in labels}
    listed = next(line for line in loki.lines() if "dev: listed" in line[2])
    assert (listed[0]["cluster"], listed[0]["level"]) == ("dev", "info")
    assert listed[3]["pid"].isdigit()
    assert json.loads(listed[2])["message"].startswith("dev: listed")
    assert all(push.headers["X-Scope-OrgID"] == "fabrik" for push in loki.pushes)
    assert all(push.headers["Content-Encoding"] == "gzip" for push in loki.pushes)
    assert len(loki.pushes) < 20, "in batches"


def test_an_outage_of_loki_loses_nothing_and_its_refusals_are_not_repeated(host: Host) -> None:
    """A minute's outage at 1 s a batch and 30 s between attempts; here 3 s at 50 ms and 200 ms."""
    loki = Loki()
    configure(host, laos={"loki": {"url": loki.url}}, timing=QUICK)
    with running(loki):
        host.start()
        talk(host, 5)
        wait_until(lambda: reloads(loki) == 5, SOON_S, "the first lines")
        loki.stop()
        ends_at, told = time.monotonic() + 3, 5
        while time.monotonic() < ends_at:
            talk(host, 20)
            told += 20
            time.sleep(0.1)
        loki.answers = [(503, {}), (429, {"Retry-After": "0"}), (500, {})]
        loki.start()
        wait_until(lambda: reloads(loki) == told, SOON_S, "what was said meanwhile")
        times = [at for _, at, _, _ in loki.lines()]
        assert len(set(times)) == len(times)
        assert loki.refusals == []
        text = metrics_of(host)
        assert sample(text, 'fabrik_daemon_log_lines_total{result="dropped",target="loki"}') == 0
        assert (sample(text, 'fabrik_daemon_deliveries_total{result="failed",target="loki"}') or 0) > 3
        loki.answers = [(400, {})]
        talk(host, 1)
        dropped = 'fabrik_daemon_log_lines_total{result="dropped",target="loki"}'
        wait_until(lambda: (sample(metrics_of(host), dropped) or 0) >= 1, SOON_S, "what was refused is counted")
        talk(host, 1)
        wait_until(lambda: reloads(loki) == told + 1, SOON_S, "the next line")
    assert ["takes what it is sent again" in line for line in complaints(host)] == [False, True, False, True]


def test_a_loki_without_structured_metadata_gets_the_lines_without(host: Host) -> None:
    loki = Loki(takes_metadata=False)
    configure(host, laos={"loki": {"url": loki.url}}, timing=QUICK)
    with running(loki):
        host.start()
        talk(host, 3)
        wait_until(lambda: reloads(loki) == 3, SOON_S, "every line is in Loki")
        assert len(loki.refusals) == 1
        assert sample(metrics_of(host), 'fabrik_daemon_log_lines_total{result="dropped",target="loki"}') == 0


def test_loki_with_a_certificate_of_its_own_authority_and_a_password(host: Host, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    (tmp_path / "password").write_text("open sesame\n")
    loki = Loki(context=context)
    service = {"url": loki.url, "username": "fabrik", "passwordFile": str(tmp_path / "password")}
    configure(host, laos={"loki": {**service, "caFile": str(tmp_path / "ca.pem")}}, timing=QUICK)
    with running(loki):
        host.start()
        wait_until(loki.lines, SOON_S, "lines over TLS")
        assert loki.pushes[0].headers["Authorization"] == "Basic ZmFicmlrOm9wZW4gc2VzYW1l"
        host.stop()
        configure(host, laos={"loki": service}, timing=QUICK)
        host.launch()
        wait_until(lambda: complaints(host), SOON_S, "a certificate that is not trusted is told")
        assert "certificate" in complaints(host)[0]
        assert "sesame" not in host.log


def told_of(finished: int) -> Callable[[Mapping[str, Any]], bool]:
    return lambda message: (message.get("progress") or {}).get("finished") == finished


@contextlib.contextmanager
def deaf() -> Iterator[str]:
    """Accept connections and never answer."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


def test_laos_that_never_answers_delays_no_subscriber(host: Host, cluster: ModelServer) -> None:
    begin(cluster, 1)
    with deaf() as url:
        services = {name: {"url": url} for name in ("loki", "alertmanager", "pushgateway")}
        configure(host, laos={"alerts": "direct", **services}, timing={"push": "100ms", "logBatch": "50ms"})
        host.start()
        with LinesClient(host.socket) as client:
            client.request("subscribe", clusters=["*"])
            client.until(lambda message: message["type"] == "subscribed")
            for finished in range(151, 171):
                put_at = time.monotonic()
                report(cluster, 1, "human-gate", finished=finished)
                client.until(told_of(finished))
                assert time.monotonic() - put_at < 5, "what LAOS gets is 10 s"
        assert http_request(host.socket, "/status").status == 200
        stopped_in = host.signal(15)
        assert stopped_in < 5


def test_services_of_laos_are_found_in_the_cluster_where_that_is_asked(
    host: Host, cluster: ModelServer, tmp_path: Path
) -> None:
    loki, alertmanager = Loki(), Alertmanager(tmp_path / "alertmanager")
    node_ports = {
        "loki": (3100, loki.port),
        "alertmanager": (9093, alertmanager.port),
        "pushgateway": (9091, free_port()),
    }
    items = [
        {
            "metadata": {"name": f"laos-{name}", "namespace": "monitoring"},
            "spec": {"type": "NodePort", "ports": [{"port": port, "nodePort": node_port}]},
        }
        for name, (port, node_port) in node_ports.items()
    ]
    prometheus = {"metadata": {"name": "prometheus-server", "namespace": "monitoring"}}
    items.append({**prometheus, "spec": {"type": "ClusterIP", "ports": [{"port": 9090}]}})
    cluster.others["/api/v1/namespaces/monitoring/services"] = {"kind": "ServiceList", "items": items}
    configure(host, laos={"discover": True, "alerts": "direct"}, timing=QUICK)
    begin(cluster, 1, "human-gate")
    with running(loki, alertmanager):
        host.start()
        wait_until(loki.lines, SOON_S, "the log goes to the cluster's Loki")
        wait_until(lambda: firing(alertmanager), SOON_S, "alerts go to the cluster's Alertmanager")
        said = "\n".join(logged(host))
    assert f"dev: loki found at http://127.0.0.1:{loki.port} (monitoring/laos-loki, NodePort)" in said
    assert "dev: prometheus found (monitoring/prometheus-server, ClusterIP), but not reachable from here" in said
    assert "dev: pushgateway found (monitoring/laos-pushgateway, NodePort), but not reachable from here" in said
    asked = cluster.asked(lambda request: "/services" in request.path)
    assert {request.method for request in asked} == {"GET"}
    assert {request.path.split("/")[4] for request in asked} == {"monitoring", "fabrik-monitoring"}


def test_what_volumes_use_comes_from_prometheus(host: Host, cluster: ModelServer, tmp_path: Path) -> None:
    exposition = (
        "# TYPE kubelet_volume_stats_used_bytes gauge\n"
        f'kubelet_volume_stats_used_bytes{{namespace="fabrik-runs",persistentvolumeclaim="data-fabrik-{run_id(1)}"}} '
        f"{3 * 2**30}\n"
    )
    kubelet = Sink(exposition)
    prometheus = Prometheus(tmp_path / "prometheus", {"kubelet": kubelet.url.partition("//")[2]})
    begin(cluster, 1)
    for number in (1, 2):
        cluster.put("persistentvolumeclaims", pvc(number))
    configure(host, laos={"prometheus": {"url": prometheus.url}})
    try:
        with running(prometheus):
            host.start()
            wait_until(lambda: prometheus.query("kubelet_volume_stats_used_bytes"), SOON_S, "the kubelet is scraped")
            listed = host.json("volumes", "list", "--usage")
            assert {row["name"]: row["used_bytes"] for row in listed} == {
                f"data-fabrik-{run_id(1)}": 3 * 2**30,
                f"data-fabrik-{run_id(2)}": None,
            }
            assert "USED" in host.cli("volumes", "list", "--usage").stdout.splitlines()[0]
            assert "used_bytes" not in host.json("volumes", "list")[0]
            shown = host.cli("runs", "show", run_id(1)).stdout
            assert re.search(r"10Gi +3Gi", shown), shown
        away = host.cli("runs", "show", run_id(1))
        assert (away.returncode, "what volumes use is not known: Prometheus at" in away.stderr) == (0, True)
        configure(host)
        refused = host.cli("volumes", "list", "--usage")
        assert refused.returncode == 2
        assert "no Prometheus is configured" in refused.stderr
    finally:
        kubelet.close()
