"""The scripted API servers themselves: what they say is what a real one says."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest
from fabrik_objects import NAMESPACE, Report, job, pod, run_id
from fakes import RECORDINGS, RESOURCES, Authority, ModelServer, RecordedServer, Recording, Response
from fakes_http import Access
from harness import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fakes import ApiServer, JsonObject

JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
SCENARIOS = [
    file.parent.name for file in sorted(RECORDINGS.glob("*/meta.json")) if file.parent.name[:2] not in {"14", "15"}
]


class Client:
    """A plain client on one connection."""

    def __init__(self, server: ApiServer, token: str = "") -> None:
        assert server.authority
        context = server.authority.client_context()
        self.connection = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=5, context=context)
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def ask(self, path: str, **query: object) -> http.client.HTTPResponse:
        return self.send("GET", path, **query)

    def send(self, method: str, path: str, **query: object) -> http.client.HTTPResponse:
        self.connection.request(method, f"{path}?{urlencode(query)}" if query else path, headers=self.headers)
        return self.connection.getresponse()

    def get(self, path: str, **query: object) -> tuple[int, Any]:
        response = self.ask(path, **query)
        return response.status, json.loads(response.read())

    def watch(self, path: str, **query: object) -> Iterator[JsonObject]:
        response = self.ask(path, watch="true", allowWatchBookmarks="true", **query)
        for line in response:
            yield json.loads(line)

    def close(self) -> None:
        self.connection.close()


@pytest.fixture
def model(authority: Authority) -> Iterator[ModelServer]:
    with ModelServer(authority) as server:
        yield server
    assert not server.crashes


@pytest.fixture
def client(model: ModelServer) -> Iterator[Client]:
    client = Client(model)
    yield client
    client.close()


def test_a_recorded_list_is_served_byte_for_byte(authority: Authority) -> None:
    with RecordedServer("01-happy-path", authority) as server, _socket(server) as raw:
        raw.sendall(f"GET {JOBS}?limit=500 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        served = b"".join(iter(lambda: raw.recv(65536), b""))
    assert served == (RECORDINGS / "01-happy-path" / "list-jobs.http").read_bytes()


def test_a_recorded_watch_is_served_byte_for_byte(authority: Authority) -> None:
    recording = Recording("12-malformed-annotations")
    expected = b"".join(timed.change.line for timed in recording.events["pods"])
    with RecordedServer("12-malformed-annotations", authority) as server:
        client = Client(server)
        response = client.ask(PODS, watch="true", resourceVersion="341")
        server.release_all()
        served = response.read(len(expected))
        server.end_watches()
        assert response.read() == b""
        client.close()
    assert served == expected
    assert len(expected) > 200_000


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_recorded_event_is_there_and_versions_only_grow(scenario: str) -> None:
    recording = Recording(scenario)
    for entry in recording.meta["requests"]:
        if entry["kind"] == "watch":
            events = recording.events[entry["resource"]]
            versions = [timed.change.version for timed in events]
            assert len(events) == entry["events"]
            assert versions == sorted(versions)
            assert not versions or versions[0] > recording.versions[entry["resource"]]


def test_an_event_that_crosses_a_chunk_is_served_across_chunks(authority: Authority) -> None:
    cut = [timed.change for timed in Recording("10-cronjob").events["events"] if timed.change.cut]
    assert len(cut) == 2
    with RecordedServer("10-cronjob", authority) as server, _socket(server) as raw:
        server.release_all()
        path = f"/api/v1/namespaces/{NAMESPACE}/events?watch=true&resourceVersion={cut[0].version - 1}&timeoutSeconds=1"
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        served = b"".join(iter(lambda: raw.recv(65536), b""))
    head, rest = cut[0].line[: cut[0].cut], cut[0].line[cut[0].cut :]
    assert b"%x\r\n%s\r\n%x\r\n%s\r\n" % (len(head), head, len(rest), rest) in served


def test_events_wait_for_their_time(authority: Authority) -> None:
    with RecordedServer("02-human-gate", authority) as server:
        client = Client(server)
        watch = client.watch(JOBS, resourceVersion="278")
        server.release(1.0)
        types = [next(watch)["type"], next(watch)["type"]]
        server.bookmark()
        types.append(next(watch)["type"])
        server.release_all()
        types += [next(watch)["type"] for _ in range(3)]
        client.close()
    assert types == ["ADDED", "MODIFIED", "BOOKMARK", "MODIFIED", "MODIFIED", "MODIFIED"]


@pytest.mark.parametrize("until", [0.5, 2.8, 5.0, float("inf")])
def test_a_relist_and_a_resumed_watch_tell_together_what_one_watch_tells(authority: Authority, until: float) -> None:
    recording = Recording("07-cancelled")
    whole = [timed.change.version for timed in recording.events["pods"]]
    with RecordedServer("07-cancelled", authority) as server:
        server.release(until)
        client = Client(server)
        _, listed = client.get(PODS, limit=500)
        version = int(listed["metadata"]["resourceVersion"])
        before = [timed.change for timed in recording.events["pods"] if timed.at < until]
        alive = [change.object for change in before[-1:] if change.type != "DELETED"]
        assert [item["metadata"] for item in listed["items"]] == [obj["metadata"] for obj in alive]
        assert not any("kind" in item for item in listed["items"])
        server.release_all()
        rest = [number for number in whole if number > version]
        watch = client.watch(PODS, resourceVersion=str(version))
        assert [int(next(watch)["object"]["metadata"]["resourceVersion"]) for _ in rest] == rest
        assert len(rest) == len(whole) - len(before)
        client.close()


def test_recorded_pages_and_an_expired_token(authority: Authority) -> None:
    with RecordedServer("13-pagination", authority) as server:
        client = Client(server)
        names: list[str] = []
        token = ""
        while not names or token:
            _, page = client.get(JOBS, limit=500, **({"continue": token} if token else {}))
            names += [item["metadata"]["name"] for item in page["items"]]
            token = page["metadata"].get("continue", "")
        assert len(names) == len(set(names)) == 120
        server.expire_next_continue()
        _, page = client.get(JOBS, limit=500)
        status, refused = client.get(JOBS, limit=500, **{"continue": page["metadata"]["continue"]})
        assert (status, refused["reason"]) == (410, "Expired")
        _, rest = client.get(JOBS, **{"continue": refused["metadata"]["continue"]})
        assert [item["metadata"]["name"] for item in rest["items"]] == names[50:]
        assert len(client.get(JOBS)[1]["items"]) == 120
        assert len(client.get(JOBS, limit=500, resourceVersion="0")[1]["items"]) == 120
        client.close()


def test_cluster_scope_and_its_namespaces(authority: Authority) -> None:
    with RecordedServer("16-cluster-scope", authority) as server:
        client = Client(server)
        assert len(client.get("/apis/batch/v1/jobs")[1]["items"]) == 4
        assert len(client.get(JOBS)[1]["items"]) == 2
        assert client.get("/api/v1/namespaces/nowhere/pods")[1]["items"] == []
        selector = "app.kubernetes.io/managed-by=fabrik"
        assert len(client.get("/apis/batch/v1/jobs", labelSelector=selector)[1]["items"]) == 3
        client.close()


def test_only_get_is_answered(model: ModelServer, client: Client) -> None:
    for method in ("POST", "DELETE", "PATCH", "PUT", "BREW"):
        assert client.send(method, JOBS).status == 405
        client.close()
    assert [request.method for request in model.violations] == ["POST", "DELETE", "PATCH", "PUT", "BREW"]


@pytest.mark.parametrize("auth", ["certificate", "certificate-files", "token", "token-file"])
def test_a_kubeconfig_holds_what_its_server_wants(authority: Authority, tmp_path: Path, auth: str) -> None:
    with ModelServer(authority, token="secret") as server:
        access = Access(auth=auth, ca="file", namespace="x")
        config = json.loads(server.kubeconfig(tmp_path / "config", access).read_text())
        wrong = Client(server, "wrong")
        right = Client(server, "secret")
        assert wrong.get("/version")[0] == 401
        assert right.get("/version")[1]["gitVersion"] == "v1.36.2"
        assert right.get("/api/v1/namespaces/kube-system")[1]["metadata"]["uid"] == server.uid
        wrong.close()
        right.close()
    user, cluster = config["users"][0]["user"], config["clusters"][0]["cluster"]
    assert len(user) == (2 if auth.startswith("certificate") else 1)
    assert Path(cluster["certificate-authority"]).read_bytes() == authority.pem


def test_a_certificate_of_another_authority_is_refused(model: ModelServer) -> None:
    stranger = Authority().client_context()
    connection = http.client.HTTPSConnection("127.0.0.1", model.port, timeout=5, context=stranger)
    with pytest.raises(ssl.SSLCertVerificationError):
        connection.request("GET", "/version")
    connection.close()
    wait_until(lambda: model.errors, 5, "the failed handshake is noted")


def test_a_model_lists_pages_and_watches(model: ModelServer, client: Client) -> None:
    for number in range(5):
        model.put("pods", pod(number, report=Report()))
    _, page = client.get(PODS, limit=2)
    model.put("pods", pod(9))
    _, second = client.get(PODS, limit=2, **{"continue": page["metadata"]["continue"]})
    assert second["metadata"]["resourceVersion"] == page["metadata"]["resourceVersion"] == "1005"
    assert second["metadata"]["remainingItemCount"] == 1
    model.expire_continue()
    status, refused = client.get(PODS, **{"continue": second["metadata"]["continue"]})
    assert status == 410
    assert len(client.get(PODS, **{"continue": refused["metadata"]["continue"]})[1]["items"]) == 1
    watch = client.watch(PODS, resourceVersion="1005")
    assert next(watch)["object"]["metadata"]["labels"]["fabrik.dev/run-id"] == run_id(9)
    model.delete("pods", NAMESPACE, pod(0)["metadata"]["name"])
    assert next(watch)["type"] == "DELETED"


@pytest.mark.parametrize("in_stream", [True, False])
def test_a_compacted_version_is_gone_in_both_forms(model: ModelServer, client: Client, in_stream: bool) -> None:
    model.expired_in_stream = in_stream
    model.put("jobs", job(1))
    model.compact()
    response = client.ask(JOBS, watch="true", resourceVersion="1000")
    answer = json.loads(response.read())
    assert response.status == (200 if in_stream else 410)
    assert (answer["object"] if in_stream else answer)["code"] == 410
    assert next(client.watch(JOBS, resourceVersion="", timeoutSeconds=1))["type"] == "ADDED"


def test_versions_that_cannot_be_are_refused(model: ModelServer, client: Client) -> None:
    assert client.get(JOBS, resourceVersion="x")[0] == 400
    assert client.get(JOBS, watch="true", resourceVersion="x")[0] == 500
    assert client.get(JOBS, resourceVersion="1001")[1]["details"]["retryAfterSeconds"] == 1
    assert list(client.watch(JOBS, resourceVersion="1001", timeoutSeconds="0.1")) == []


def test_a_streamed_list_ends_with_its_bookmark(model: ModelServer, client: Client) -> None:
    query = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
    assert client.get(JOBS, watch="true", **query)[0] == 422
    model.initial_events = "stream"
    model.put("jobs", job(1))
    added, end = list(client.watch(JOBS, timeoutSeconds=1, **query))
    assert added["type"] == "ADDED"
    assert end["object"]["metadata"] == {
        "resourceVersion": "1001",
        "annotations": {"k8s.io/initial-events-end": "true"},
    }


def test_a_watch_sees_an_object_leave_its_selection(model: ModelServer, client: Client) -> None:
    watch = client.watch(JOBS, resourceVersion="1000", labelSelector="team=a")
    model.put("jobs", job(1, metadata={"labels": {"team": "b"}}))
    for team in "aab":
        model.put("jobs", job(1, metadata={"labels": {"team": team}}))
    assert [next(watch)["type"] for _ in range(3)] == ["ADDED", "MODIFIED", "DELETED"]


def test_watches_end_cleanly_or_not(model: ModelServer, client: Client) -> None:
    response = client.ask(JOBS, watch="true", resourceVersion="1000")
    model.end_watches()
    assert response.read() == b""
    response = client.ask(JOBS, watch="true", resourceVersion="1000")
    model.put("jobs", job(1))
    response.readline()
    model.end_watches(clean=False, last_words=b"5\r\nab")
    with pytest.raises((http.client.IncompleteRead, ssl.SSLEOFError)):
        response.read()


def test_failures_come_when_told(model: ModelServer, client: Client) -> None:
    model.fail_next(1, Response(429, b"later", {"Retry-After": "1"}, "text/plain"), resource="jobs", verb="list")
    model.refuse("pods")
    assert client.get(PODS)[1]["details"] == {"group": "", "kind": "pods"}
    response = client.ask(JOBS)
    assert (response.status, response.headers["Retry-After"], response.read()) == (429, "1", b"later")
    assert client.get(JOBS)[0] == 200
    model.refuse("pods", 0)
    assert client.get(PODS)[0] == 200


def test_a_held_server_says_nothing_until_it_resumes(model: ModelServer, client: Client) -> None:
    watch = client.watch(JOBS, resourceVersion="1000")
    timer = threading.Timer(0.3, model.resume)
    model.hold()
    model.put("jobs", job(1))
    timer.start()
    assert next(watch)["type"] == "ADDED"
    assert timer.finished.is_set()


def test_a_server_comes_back_on_its_port(model: ModelServer, client: Client) -> None:
    port = model.port
    assert client.get(JOBS)[0] == 200
    model.stop()
    with pytest.raises(OSError):  # noqa: PT011 - reset or refused
        client.get(JOBS)
    client.close()
    model.start()
    assert model.port == port
    assert client.get(JOBS)[0] == 200


def test_run_ids_are_ulids_in_order() -> None:
    ids = [run_id(number) for number in range(100)]
    assert ids == sorted(set(ids))
    assert {len(one) for one in ids} == {26}
    assert set(RESOURCES) == {"jobs", "cronjobs", "pods", "persistentvolumeclaims", "events"}


def _socket(server: ApiServer) -> ssl.SSLSocket:
    assert server.authority
    plain = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    return server.authority.client_context().wrap_socket(plain, server_hostname="127.0.0.1")
