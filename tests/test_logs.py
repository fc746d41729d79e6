"""What the containers of runs print, through the built executable: followed over everything that happens to them, read
after their end, from Loki or from what was kept."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import pytest
from fabrik_objects import NAMESPACE, job, pod, run_id, time_text
from fakes import ModelServer, refusal
from fakes_http import Access, ApiServer, Response
from fakes_logs import parse_ns
from harness import Cluster, wait_until
from hosts import Host

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fakes import Authority, KubernetesApi
    from fakes_http import Exchange

    Serve = Callable[[KubernetesApi], None]

PATIENCE_S: Final = 30.0
QUICK: Final = {"backoffMin": "50ms", "backoffMax": "300ms", "connect": "5s", "idle": "1s"}
SECOND: Final = "2026-11-23T12:00:{:02d}"


class Scene:
    """A server with a run, whose container prints what a test says, and a host whose cache knows it."""

    def __init__(self, server: ModelServer, host: Host, number: int = 1) -> None:
        self.server = server
        self.host = host
        self.run = number
        self.id = run_id(number)
        self.pods = 0
        self.restarts = 0
        self.printed: list[str] = []
        self.unread = 0  # lines of the second
        server.put("jobs", job(number))

    @property
    def name(self) -> str:
        """The present Pod's."""
        return f"fabrik-{self.id}-pod{self.pods}"

    def add_pod(self, **kwargs: Any) -> None:
        """Have a Pod follow the present one."""
        self.pods += 1
        self.restarts = 0
        self.server.logs.start(NAMESPACE, self.name)
        self.put_pod(**kwargs)

    def put_pod(self, phase: str = "Running", **status: Any) -> None:
        """Tell of the present Pod as it is."""
        metadata = {"name": self.name, "uid": f"uid-{self.id}-{self.pods}", "creationTimestamp": time_text(self.pods)}
        item = pod(self.run, phase=phase, metadata=metadata)
        item["status"].setdefault("containerStatuses", [{"name": "smithers"}])[0].update(
            restartCount=self.restarts, **status
        )
        self.server.put("pods", item)

    def prints(self, count: int, second: int, fraction: str = "", text: str = "line") -> None:
        """Have it print lines, all at the same time."""
        lines = [f"{text} {len(self.printed) + index}" for index in range(count)]
        self.printed += lines
        self.server.logs.write(NAMESPACE, self.name, [(SECOND.format(second) + fraction + "Z", line) for line in lines])

    def ends(self, *, well: bool = True) -> None:
        """End the container, its Pod and the Job."""
        self.server.logs.end(NAMESPACE, self.name)
        self.put_pod("Succeeded" if well else "Failed")
        self.server.put("jobs", job(self.run, conditions=["Complete" if well else "Failed=BackoffLimitExceeded"]))

    def wait_for_readers(self, count: int) -> None:
        """Wait until so many follow."""
        wait_until(lambda: self.server.logs.following == count, PATIENCE_S, f"{count} follow")

    def log_requests(self) -> list[dict[str, str]]:
        """Return the parameters of the requests for a log so far."""
        return [request.query for request in self.server.asked(lambda request: request.path.endswith("/log"))]


class Follower:
    """`runs logs --follow` beside the test; what it writes is read as it comes."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.errors: list[str] = []
        streams = ((process.stdout, self.lines), (process.stderr, self.errors))
        self._threads = [threading.Thread(target=self._read, args=place, daemon=True) for place in streams]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _read(stream: Any, lines: list[str]) -> None:
        with stream:
            for line in stream:
                lines.append(line.decode().rstrip("\n"))

    def wait_for(self, count: int) -> None:
        """Wait until so many lines were shown."""
        wait_until(lambda: len(self.lines) >= count, PATIENCE_S, f"{count} lines, not {self.lines} {self.errors}")

    def wait_for_words(self, words: str) -> None:
        """Wait until it said so on stderr."""
        wait_until(lambda: any(words in line for line in self.errors), PATIENCE_S, f"{words}: {self.errors}")

    def end(self) -> int:
        """Return its exit code, when all that it wrote was read."""
        code = self.process.wait(PATIENCE_S)
        for thread in self._threads:
            thread.join(PATIENCE_S)
        return code


@pytest.fixture
def scene(authority: Authority, serve: Serve, executable: Path, unpacked: Path, tmp_path: Path) -> Iterator[Scene]:
    server = ModelServer(authority, token="sesame")
    serve(server)
    cluster = Cluster(server, access=Access(auth="token"))
    with Host(executable, unpacked, tmp_path / "host", [cluster], timing=QUICK) as host:
        yield Scene(server, host)


@pytest.fixture
def follow(scene: Scene) -> Iterator[Callable[..., Follower]]:
    """Follow logs; at the end nothing does any more."""
    followers: list[Follower] = []

    def start(*words: str) -> Follower:
        followers.append(Follower(scene.host.popen("runs", "logs", "--follow", *words)))
        return followers[-1]

    yield start
    for follower in followers:
        follower.process.kill()
        follower.end()


def test_followed_over_a_lost_connection_a_restart_and_a_new_pod(scene: Scene, follow: Callable[..., Follower]) -> None:
    """Every line of the scripted server arrives once, and in order."""
    scene.add_pod()
    scene.prints(3, 1, ".5")
    assert scene.host.cli("sync").returncode == 0
    reader = follow(scene.id)
    reader.wait_for(3)
    scene.prints(2, 2)
    scene.prints(3, 2)  # at the very same time
    reader.wait_for(8)

    scene.server.logs.drop(f"{SECOND.format(2)}Z line".encode())  # half a line
    scene.prints(3, 2)  # while nobody reads, still at the same time
    scene.prints(2, 3)
    reader.wait_for(13)

    scene.server.logs.drop()
    scene.prints(2, 4, ".000000001")  # the last words of a container whose reader is away
    scene.server.logs.start(NAMESPACE, scene.name)  # the API server does not know of its restart yet
    asked = len(scene.log_requests())
    wait_until(lambda: len(scene.log_requests()) > asked, PATIENCE_S, "it reads on")
    scene.prints(3, 6)
    scene.restarts = 1
    scene.put_pod()
    reader.wait_for(18)

    scene.prints(1, 7)
    scene.server.logs.end(NAMESPACE, scene.name)
    scene.put_pod("Failed")
    reader.wait_for(19)
    scene.add_pod()
    scene.prints(4, 9)
    reader.wait_for(23)
    scene.ends()
    assert reader.end() == 0
    assert reader.lines == scene.printed
    said = "\n".join(reader.errors)
    assert "was restarted" in said
    assert f"was followed by {scene.name}" in said
    assert "gone" not in said


def test_a_reader_that_has_enough_ends_it_quietly(scene: Scene) -> None:
    scene.add_pod()
    scene.prints(3, 1)
    assert scene.host.cli("sync").returncode == 0
    with scene.host.popen("runs", "logs", scene.id, "--follow") as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"line 0\n"
        process.stdout.close()
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None and time.monotonic() < deadline:
            scene.prints(50, 2)
            time.sleep(0.05)
        assert process.poll() == 0
        assert process.stderr.read() == b""


# Kept -----------------------------------------------------------------------------------------------------------------


def kept(scene: Scene) -> list[dict[str, Any]]:
    """Return the lines that the cache has kept."""
    return scene.host.rows("SELECT * FROM run_events WHERE event_type = 'log_line' ORDER BY id")


def test_the_last_lines_of_a_failed_run_are_fetched_once_and_outlive_pod_and_daemon(scene: Scene) -> None:
    scene.add_pod()
    scene.host.start()
    scene.prints(70, 1)
    scene.ends(well=False)
    wait_until(lambda: len(kept(scene)) == 50, PATIENCE_S, "fifty lines kept")
    rows = kept(scene)
    assert [json.loads(row["payload"])["line"] for row in rows] == scene.printed[-50:]
    assert {row["run_id"] for row in rows} == {scene.id}
    assert rows[0]["cluster_timestamp"] == SECOND.format(1) + "Z"
    scene.host.settle()
    scene.put_pod("Failed", ready=False)  # it changes once more
    scene.host.settle()
    scene.host.stop()
    scene.host.start()
    scene.server.delete("pods", NAMESPACE, scene.name)
    scene.server.logs.forget(NAMESPACE, scene.name)
    scene.host.settle()
    assert len(scene.log_requests()) == 1
    done = scene.host.cli("runs", "logs", scene.id, "--tail", "3")
    assert (done.returncode, done.stdout.splitlines()) == (0, scene.printed[-3:])
    assert "its Pod is gone; these are the last lines, kept when it failed" in done.stderr
    assert [row["id"] for row in kept(scene)] == [row["id"] for row in rows]


def test_what_the_daemon_could_not_keep_before_its_end_it_keeps_after_its_start(scene: Scene) -> None:
    scene.add_pod()
    scene.host.start()
    scene.prints(3, 1)
    scene.server.logs.refused = [refusal(503, "ServiceUnavailable", "not now")]
    scene.ends(well=False)
    wait_until(scene.log_requests, PATIENCE_S, "the log was asked for")
    scene.host.stop()
    assert kept(scene) == []
    scene.host.start()
    wait_until(lambda: len(kept(scene)) == 3, PATIENCE_S, "three lines kept")


def test_a_container_that_fails_while_it_prints_is_kept_to_its_end(scene: Scene) -> None:
    """FailureTarget comes before the Pod's end; what is said at last matters most."""
    scene.add_pod()
    scene.host.start()
    scene.prints(60, 1)
    scene.server.put("jobs", job(scene.run, conditions=["FailureTarget=DeadlineExceeded"]))
    scene.wait_for_readers(1)
    scene.prints(2, 2, text="terminated")
    scene.server.logs.end(NAMESPACE, scene.name)
    scene.server.delete("pods", NAMESPACE, scene.name)
    wait_until(lambda: len(kept(scene)) == 50, PATIENCE_S, "fifty lines kept")
    assert [json.loads(row["payload"])["line"] for row in kept(scene)] == scene.printed[-50:]


def test_kept_lines_are_bounded_and_hostile_ones_change_nothing_else(scene: Scene) -> None:
    scene.add_pod()
    scene.host.start()
    hostile = [b"x" * 300_000, b"\xff\xfe\x00 bad", b"\x1b]0;owned\x07 red", "ä\u202e".encode()]
    scene.server.logs.write(NAMESPACE, scene.name, [(SECOND.format(1) + "Z", text) for text in hostile])
    scene.ends(well=False)
    wait_until(lambda: len(kept(scene)) == 4, PATIENCE_S, "four lines kept")
    assert max(len(row["payload"]) for row in kept(scene)) < 5000
    scene.server.logs.forget(NAMESPACE, scene.name)
    scene.server.delete("pods", NAMESPACE, scene.name)
    done = scene.host.cli("runs", "logs", scene.id)
    assert done.returncode == 0
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", done.stdout)


def test_nothing_is_kept_where_that_is_switched_off(scene: Scene) -> None:
    config = scene.host.root / "config" / "config.yaml"
    config.write_text(json.dumps({"timing": QUICK, "keepLogs": False}))
    scene.add_pod()
    scene.host.start()
    scene.prints(3, 1)
    scene.ends(well=False)
    scene.host.settle()
    scene.host.stop()
    assert scene.log_requests() == []
    assert kept(scene) == []


def test_a_missing_right_is_told_once_and_watches_go_on(scene: Scene) -> None:
    scene.add_pod()
    scene.host.start()
    forbidden = 'pods "x" is forbidden: User "fabrik-daemon" cannot get resource "pods/log" in API group ""'
    scene.server.logs.refused = [refusal(403, "Forbidden", forbidden)] * 9
    scene.ends(well=False)
    wait_until(lambda: "grant get on pods/log" in scene.host.log, PATIENCE_S, "the right is named")
    other = job(2)
    scene.server.put("jobs", other)
    scene.server.put("pods", pod(2, phase="Failed"))
    scene.server.put("jobs", job(2, conditions=["Failed"]))
    scene.host.settle()
    scene.host.stop()
    assert scene.host.log.count("grant get on pods/log") == 1
    assert len(scene.log_requests()) == 1


# Read -----------------------------------------------------------------------------------------------------------------


def test_a_log_is_read_as_it_stands(scene: Scene) -> None:
    scene.add_pod()
    scene.prints(5, 1, ".25")
    scene.server.logs.start(NAMESPACE, scene.name, "sidecar")
    scene.server.logs.write(NAMESPACE, scene.name, [(SECOND.format(2) + "Z", "beside")], "sidecar")
    item = scene.server.collections["pods"].objects[NAMESPACE, scene.name]
    item["spec"]["containers"] = [*item["spec"]["containers"], {"name": "sidecar"}]
    beside = {**item["status"]["containerStatuses"][0], "name": "sidecar"}
    item["status"]["containerStatuses"] = [*item["status"]["containerStatuses"], beside]
    scene.server.put("pods", item)
    assert scene.host.cli("sync").returncode == 0

    def read(*words: str) -> list[str]:
        done = scene.host.cli("runs", "logs", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    assert read("--id", scene.id) == scene.printed
    assert read(scene.id, "--tail", "2", "--timestamps") == [
        f"{SECOND.format(1)}.25Z {line}" for line in scene.printed[-2:]
    ]
    assert read(scene.id, "--container", "sidecar") == ["beside"]
    assert read(scene.id, "--since", "1h") == [], "the lines' own time lies in another year"
    scene.server.logs.refused = [refusal(503, "ServiceUnavailable", "not now")]
    assert read(scene.id) == scene.printed, "a server that is busy is asked again"

    scene.server.logs.start(NAMESPACE, scene.name)
    scene.server.logs.write(NAMESPACE, scene.name, [(SECOND.format(3) + "Z", "after")])
    scene.restarts = 1
    item["status"]["containerStatuses"][0]["restartCount"] = 1
    scene.server.put("pods", item)
    assert read(scene.id) == ["after"]
    assert read(scene.id, "--previous") == scene.printed

    done = scene.host.cli("runs", "logs", scene.id, "--container", "smitters")
    assert done.returncode == 1
    assert "no container 'smitters': did you mean 'smithers'?" in done.stderr


def test_several_runs_are_told_apart_by_name_and_colour(scene: Scene) -> None:
    other = Scene(scene.server, scene.host, 2)
    for one in (scene, other):
        one.add_pod()
        one.prints(3, 1, text=f"of {one.run}:")
    assert scene.host.cli("sync").returncode == 0
    assert scene.host.cli("runs", "logs", "--phase", "review").returncode == 3
    assert scene.host.cli("runs", "logs", "@latest").stdout.splitlines()[0].startswith("of ")
    done = scene.host.cli("runs", "logs", "--status", "running", "--spec", "feature-x")
    assert done.returncode == 0, done.stderr
    wanted = [f"{one.id} | {line}" for one in (scene, other) for line in one.printed]
    assert sorted(done.stdout.splitlines()) == sorted(wanted)
    coloured = scene.host.cli("runs", "logs", scene.id, other.id, "--color", "always").stdout
    prefixes = {line.partition("| ")[0] for line in coloured.splitlines()}
    assert len(prefixes) == 2
    assert all(prefix.startswith("\x1b[3") for prefix in prefixes)
    assert len({prefix[:5] for prefix in prefixes}) == 2, "each has a colour of its own"


def test_what_a_pod_prints_is_harmless_on_a_terminal(scene: Scene) -> None:
    scene.add_pod()
    hostile = "\x1b[31mred\x1b[0m\tand \x1b]0;title\x07 \x9b2J \u202eback \r over".encode()
    scene.server.logs.write(
        NAMESPACE, scene.name, [(SECOND.format(1) + "Z", hostile), (SECOND.format(1) + "Z", b"\xff")]
    )
    assert scene.host.cli("sync").returncode == 0
    done = scene.host.cli("runs", "logs", scene.id)
    assert done.stdout == "red\tand \\x1b]0;title\\x07 \\x9b2J \\u202eback \\r over\n\ufffd\n"


def test_what_cannot_be_read_is_told(scene: Scene) -> None:
    scene.pods = 1
    scene.put_pod("Pending", state={"waiting": {"reason": "ImagePullBackOff"}})
    assert scene.host.cli("sync").returncode == 0
    done = scene.host.cli("runs", "logs", scene.id)
    assert (done.returncode, done.stdout) == (1, "")
    assert "waits: ImagePullBackOff; no lines of it were kept" in done.stderr
    assert scene.host.cli("runs", "logs").returncode == 2
    assert scene.host.cli("runs", "logs", "--status", "blocked").returncode == 3
    assert scene.host.cli("runs", "logs", scene.id, "-p", "-f").returncode == 2
    scene.server.refuse("pods")
    done = scene.host.cli("runs", "logs", scene.id)
    assert done.returncode == 1
    assert 'cannot list resource "pods"' in done.stderr
    scene.server.stop()
    done = scene.host.cli("runs", "logs", scene.id)
    assert done.returncode == 5
    assert "Connection refused" in done.stderr


class Loki(ApiServer):
    """Answers query_range as Loki does: at most `limit` lines, of a time from `start` on and before `end`."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str, str]] = []  # time, Pod, text

    def answer(self, exchange: Exchange) -> None:
        query = exchange.seen.query
        assert exchange.seen.path == "/loki/api/v1/query_range"
        pods = re.search(r'pod=~"((?:[^"\\]|\\.)*)"', query["query"])
        assert pods
        pattern = json.loads(f'"{pods[1]}"')
        found = [line for line in self.lines if int(query["start"]) <= line[0] < int(query["end"])]
        found = [line for line in found if re.fullmatch(pattern, line[1])]
        limit = int(query["limit"])
        found = found[:limit] if query["direction"] == "forward" else found[-limit:][::-1]
        streams: dict[str, list[list[str]]] = {}
        for at, name, text in found:
            streams.setdefault(name, []).append([str(at), text])
        result = [{"stream": {"pod": name, "container": "smithers"}, "values": rows} for name, rows in streams.items()]
        exchange.send(Response(200, json.dumps({"status": "success", "data": {"result": result}}).encode()))


def test_when_the_pod_is_gone_loki_has_its_log(scene: Scene) -> None:
    scene.server.put("jobs", job(scene.run, conditions=["Complete"]))
    loki = Loki()
    began = parse_ns(SECOND.format(1) + "Z")
    loki.lines = [
        (began + 10**6 * (number // 7), f"fabrik-{scene.id}-{number % 2}abcd", f"old {number}")
        for number in range(2300)
    ]
    loki.lines.sort()
    loki.lines.append((began, "fabrik-other-x", "not ours"))
    with loki:
        secret = scene.host.root / "secret"
        secret.write_text("tell\n")
        service = {"url": f"{loki.url}/", "tenant": "fabrik", "bearerTokenFile": str(secret)}
        config = scene.host.root / "config" / "config.yaml"
        config.write_text(json.dumps({"timing": QUICK, "laos": {"loki": service}}))
        assert scene.host.cli("sync").returncode == 0
        done = scene.host.cli("runs", "logs", scene.id)
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.splitlines()) == sorted(text for _, _, text in loki.lines[:-1])
        times = {text: at for at, _, text in loki.lines}
        shown = [times[line] for line in done.stdout.splitlines()]
        assert shown == sorted(shown)
        assert f"its Pod is gone; these 2300 lines are from Loki, {loki.url}" in done.stderr
        done = scene.host.cli("runs", "logs", scene.id, "--tail", "2")
        assert done.stdout.splitlines() == [text for _, _, text in loki.lines[-3:-1]]
        asked = loki.asked(lambda request: True)[-1]
        assert asked.headers["x-scope-orgid"] == "fabrik"
        assert asked.headers["authorization"] == "Bearer tell"
        loki.lines = []
        done = scene.host.cli("runs", "logs", scene.id)
        assert done.returncode == 1
        assert "it has no line of it; no lines of it were kept" in done.stderr
    done = scene.host.cli("runs", "logs", scene.id)
    assert "Connection refused; no lines of it were kept" in done.stderr
