"""What asks an API server at once: one request, its credentials, its answer as it comes."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import pytest
from fabrik_objects import job, pod
from fakes import ModelServer
from fakes_http import Access

import fabrik_daemon
from fabrik_daemon import Call, ClusterSpec, Direct, Got, ResponseHead, Settings, Timing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fakes import Authority, KubernetesApi

JOBS = "/apis/batch/v1/namespaces/fabrik-runs/jobs"
DEADLINE_S = 30.0


@pytest.fixture
def direct(tmp_path: Path) -> Iterator[Direct]:
    settings = Settings("", "", str(tmp_path / "cache.db"), None, timing=Timing(answer=1.0, connect=5.0))
    made = Direct(settings, io.StringIO())
    yield made
    made.close()


def ask(direct: Direct, spec: ClusterSpec, target: str, max_bytes: int = 2**20) -> Got:
    """Return what came of one GET."""
    got: list[Got] = []

    def done(what: Got) -> None:
        got.append(what)
        direct.reactor.stop()

    direct.get(direct.site(spec), target, done, max_bytes)
    direct.run(DEADLINE_S)
    assert len(got) == 1
    return got[0]


def test_an_answer_comes_whole_and_credentials_that_are_refused_are_read_anew(
    authority: Authority, serve: Callable[[KubernetesApi], None], direct: Direct, tmp_path: Path
) -> None:
    server = ModelServer(authority, token="first")
    serve(server)
    server.put("jobs", job(1))
    path = server.kubeconfig(tmp_path / "kubeconfig", Access(auth="token-file"))
    spec = ClusterSpec("test", str(path))
    got = ask(direct, spec, JOBS)
    assert (got.status, got.complaint) == (200, "")
    assert [item["metadata"]["name"] for item in got.document()["items"]] == [job(1)["metadata"]["name"]]
    server.token = "second"
    path.with_suffix(".token").write_text("second")
    assert ask(direct, spec, JOBS).status == 200
    refused = len(server.asked(lambda request: request.headers.get("authorization") == "Bearer first")) - 1
    assert refused == 1
    server.token = "third"
    assert ask(direct, spec, JOBS).status == 401, "what is refused twice is refused"


def test_what_goes_wrong_is_told_in_words(
    serve: Callable[[KubernetesApi], None], direct: Direct, tmp_path: Path
) -> None:
    server = ModelServer()
    serve(server)
    spec = ClusterSpec("test", str(server.kubeconfig(tmp_path / "kubeconfig")))
    server.refuse("jobs")
    got = ask(direct, spec, JOBS)
    assert got.status == 403
    assert 'cannot list resource "jobs"' in got.complaint
    assert got.document() == {}
    server.refuse("jobs", 0)
    server.put("jobs", job(1))
    assert "over 10 bytes" in ask(direct, spec, JOBS, 10).complaint
    server.hold()
    assert ask(direct, spec, JOBS).complaint == "silent for 1 s"
    server.resume()
    server.stop()
    assert "127.0.0.1" in ask(direct, spec, JOBS).complaint
    assert "no such kubeconfig" in ask(direct, ClusterSpec("none", str(tmp_path / "none")), JOBS).complaint


def test_an_answer_that_goes_on_is_told_as_it_comes_and_may_be_silent(
    serve: Callable[[KubernetesApi], None], direct: Direct, tmp_path: Path
) -> None:
    server = ModelServer()
    serve(server)
    spec = ClusterSpec("test", str(server.kubeconfig(tmp_path / "kubeconfig")))
    direct_lines: list[str] = []

    def add_pod() -> None:
        server.put("pods", pod(7))

    class Lines:
        def on_head(self, head: ResponseHead) -> None:
            assert head.status == 200
            direct.reactor.call_later(1.5, add_pod)  # longer than an answer may take

        def on_body(self, data: bytes) -> None:
            direct_lines.extend(json.loads(line)["type"] for line in data.splitlines())
            direct.reactor.call_later(0, server.end_watches)

        def on_end(self, error: str) -> None:
            direct_lines.append(error)
            direct.reactor.stop()

    Call(direct.site(spec), "/api/v1/namespaces/fabrik-runs/pods?watch=1", Lines(), endless=True)
    direct.run(DEADLINE_S)
    assert direct_lines == ["ADDED", ""]


def test_a_post_carries_its_document() -> None:
    codec = fabrik_daemon.HttpClientCodec("api:6443")
    data = codec.send_post("/apis", {"Authorization": "Bearer x"}, b'{"a":1}')
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.splitlines()[0] == b"POST /apis HTTP/1.1"
    assert b"Content-Length: 7" in head
    assert body == b'{"a":1}'
