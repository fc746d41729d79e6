"""Following a run's log against a model of kubelet and API server: whatever happens, each line comes once, in order."""

from __future__ import annotations

import random
from typing import Final, NamedTuple

import pytest
from fakes_logs import format_ns, parse_ns
from hypothesis import given
from hypothesis import strategies as st

from fabrik_daemon import (
    CloseLog,
    ContainerView,
    FindPods,
    LogAction,
    LogCursor,
    LogDecoder,
    LogLine,
    LogMachine,
    LogOver,
    LogWish,
    OpenLog,
    Pause,
    PodView,
    Say,
    ShowLine,
    Timing,
    pod_view,
)

SEEDS: Final = 300
STEPS: Final = 400
LAG_S: Final = 3.0  # what the API server is behind the kubelet at most


class Life:
    """One instance of a container, as the kubelet knows it."""

    def __init__(self) -> None:
        self.lines: list[LogLine] = []
        self.ended = False


class Pod:
    """A Pod: its container's lives, and what the API server has heard of them."""

    def __init__(self, number: int) -> None:
        self.name = f"pod-{number}"
        self.created_at = f"2026-11-23T12:00:{number:02d}Z"
        self.lives = [Life()]
        self.over = False
        self.told = (0, "running", False)  # restarts, state and whether it is over, as the API server knows them

    def hear(self) -> None:
        """Let the API server hear how it is."""
        self.told = len(self.lives) - 1, "terminated" if self.lives[-1].ended else "running", self.over

    def view(self) -> PodView:
        """Return what the API server says of it."""
        number, state, over = self.told
        phase = "Failed" if over else "Running"
        container = ContainerView("main", number, state, "")
        return PodView(self.name, f"uid-{self.name}", self.created_at, phase, False, "main", (container,))


class Reading(NamedTuple):
    """An open log: what it still has to deliver goes on while its container lives."""

    life: Life
    position: int
    follow: bool


class World:
    """One run of a scenario that a seed decides."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.machine = LogMachine(LogWish(follow=True), Timing(), self.random.random)
        self.pods = [Pod(0)]
        self.job_over = False
        self.ns = parse_ns("2026-11-23T12:00:00Z")
        self.count = 0
        self.printed: list[str] = []
        self.shown: list[str] = []
        self.said: list[str] = []
        self.reading: Reading | None = None
        self.waits = False
        self.unbroken = False  # what is read now could not be read again
        self.paused_s = 0.0  # since the API server heard
        self.end: LogOver | None = None

    @property
    def life(self) -> Life:
        """The present container's."""
        return self.pods[-1].lives[-1]

    def run(self) -> None:
        """Let things happen, then let them end."""
        self.do(self.machine.due())
        for _ in range(STEPS):
            self.step()
        if not self.life.ended:
            self.print()
        self.life.ended = self.pods[-1].over = self.job_over = True
        for pod in self.pods:
            pod.hear()
        for _ in range(STEPS):
            if self.end is None:
                self.deliver()
                self.wake()

    def step(self) -> None:
        """Let one thing happen."""
        happens = self.random.choices(
            [self.print, self.deliver, self.drop, self.wake, self.hear, self.restart, self.replace, self.look],
            [30, 40, 4, 20, 10, 2, 1, 2],
        )
        happens[0]()

    def print(self) -> None:
        """Have the container print some lines; many at one moment, some alike."""
        if not self.life.ended:
            for _ in range(self.random.randint(1, 5)):
                self.ns += self.random.choice([0, 0, 0, 1, 300_000_000, 1_700_000_000])
                alike = self.printed and self.random.random() < 0.3
                text = self.printed[-1] if alike else f"line {self.count}"
                self.count += 1
                self.printed.append(text)
                self.life.lines.append(LogLine(format_ns(self.ns), text))

    def deliver(self) -> None:
        """Have the open log bring some lines, or its end."""
        for _ in range(self.random.randint(1, 4)):
            reading = self.reading
            if reading is None:
                return
            if reading.position < len(reading.life.lines):
                self.reading = reading._replace(position=reading.position + 1)
                self.do(self.machine.on_line(reading.life.lines[reading.position]))
            elif not reading.follow or reading.life.ended:
                self.reading, self.unbroken = None, False
                self.do(self.machine.on_log_end(200, ""))

    def drop(self) -> None:
        """Break the connection, with what is on its way."""
        if self.reading is not None and not self.unbroken:
            self.reading = None
            self.do(self.machine.on_log_end(0, "the connection broke"))

    def wake(self) -> None:
        """Let a pause be over."""
        if self.waits:
            self.waits = False
            if self.paused_s > LAG_S:
                self.hear()
            self.do(self.machine.due())

    def look(self) -> None:
        """Let the log be silent for long."""
        if self.reading is not None:
            self.do(self.machine.due())

    def hear(self) -> None:
        """Let the API server hear how the Pods are."""
        self.paused_s = 0.0
        for pod in self.pods:
            pod.hear()

    def restart(self) -> None:
        """Restart the container.

        The kubelet keeps one life before the present one: what came before that was read, or its reading goes on. That
        the present one is asked for right after it was found that the one before has no news takes but a moment.
        """
        lives, reading = self.pods[-1].lives, self.reading
        before = sum(len(life.lines) for pod in self.pods for life in pod.lives) - len(self.life.lines)
        is_read = reading is not None and not reading.follow and len(lives) > 1 and reading.life is lives[-2]
        is_away = reading is None and self.waits
        may_restart = is_read if len(self.shown) < before else is_away or self.reads_present()
        if self.shown and may_restart:  # the first that is shown is where following begins
            self.unbroken = len(self.shown) < before
            self.life.ended = True
            lives.append(Life())
            self.ns += 1_000

    def reads_present(self) -> bool:
        """Tell whether the present container's log is open."""
        return self.reading is not None and self.reading.life is self.life

    def replace(self) -> None:
        """Let the Pod fail and another take its place."""
        if self.pods[-1].told[0] == len(self.pods[-1].lives) - 1 and len(self.pods) < 5:
            self.life.ended = self.pods[-1].over = True
            self.pods[-1].hear()
            self.pods.append(Pod(len(self.pods)))
            self.ns += 1_000

    def do(self, actions: list[LogAction]) -> None:
        """Do what the machine wants."""
        for action in actions:
            if isinstance(action, ShowLine):
                self.shown.append(action.line.text)
            elif isinstance(action, OpenLog):
                self.open(action)
            elif isinstance(action, CloseLog):
                self.reading = None
            elif isinstance(action, Pause):
                self.waits = True
                self.paused_s += action.seconds
            elif isinstance(action, FindPods):
                self.do(self.machine.on_pods([pod.view() for pod in self.pods], over=self.job_over))
            elif isinstance(action, Say):
                self.said.append(action.text)
            elif isinstance(action, LogOver):
                self.end = action

    def open(self, wanted: OpenLog) -> None:
        """Open a log as the kubelet does: it knows of a restart at once."""
        assert self.reading is None
        pod = next(pod for pod in self.pods if pod.name == wanted.pod)
        if wanted.previous and len(pod.lives) < 2:
            self.do(self.machine.on_log_end(400, "previous terminated container not found"))
            return
        life = pod.lives[-2 if wanted.previous else -1]
        since = parse_ns(wanted.since) if wanted.since else 0
        position = next((i for i, line in enumerate(life.lines) if parse_ns(line.time) >= since), len(life.lines))
        self.reading = Reading(life, position, wanted.follow)


@pytest.mark.parametrize("first", range(0, SEEDS, 50))
def test_each_line_comes_once_and_in_order(first: int) -> None:
    restarts = drops = 0
    for seed in range(first, first + 50):
        world = World(seed)
        world.run()
        assert world.end == LogOver(), f"seed {seed}: {world.end}, {world.said}"
        assert world.shown == world.printed, f"seed {seed}: {world.said}"
        restarts += sum(len(pod.lives) - 1 for pod in world.pods)
        drops += world.said.count("the connection broke; trying again")
    assert restarts > 20
    assert drops > 20


@given(st.lists(st.binary(max_size=30), max_size=20), st.lists(st.integers(0, 400), max_size=12))
def test_lines_are_the_same_however_they_are_cut(texts: list[bytes], cuts: list[int]) -> None:
    lines = [text.replace(b"\n", b"").replace(b"\r", b"") for text in texts]
    body = b"".join(b"2026-11-23T12:00:01.5Z " + line + b"\n" for line in lines)
    edges = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    decoder = LogDecoder()
    found = [line for start, end in zip(edges, edges[1:]) for line in decoder.receive(body[start:end])]
    assert found == [LogLine("2026-11-23T12:00:01.5Z", line.decode("utf-8", "replace")) for line in lines]
    assert list(decoder.end()) == []


def test_a_line_without_end_is_cut_and_the_next_is_whole() -> None:
    decoder = LogDecoder()
    pieces = [b"2026-11-23T12:00:01Z ", *[b"x" * 100_000] * 9, b"\n2026-11-23T12:00:02Z last"]
    lines = [line for piece in pieces for line in decoder.receive(piece)]
    assert [len(line.text) for line in lines] == [256 * 1024 - len(pieces[0])]
    assert list(decoder.end()) == [LogLine("2026-11-23T12:00:02Z", "last")]


def test_the_kubelets_own_words_are_shown_and_move_nothing() -> None:
    cursor = LogCursor()
    assert cursor.take(LogLine("", "unable to retrieve container logs for containerd://x")) is True
    assert cursor.since is None
    line = LogLine("2026-11-23T12:00:05.9Z", "a")
    assert cursor.take(line) is True
    assert cursor.since == "2026-11-23T12:00:04Z"
    cursor.resume(may_differ=False)
    assert cursor.is_behind
    assert cursor.take(LogLine("2026-11-23T12:00:04.9Z", "before the tail")) is False
    assert cursor.take(line) is False
    assert not cursor.is_behind
    assert cursor.take(line) is True, "the same words at the same time, once more"


def test_hostile_pods_are_viewed_without_harm() -> None:
    for item in (
        {},
        {"metadata": 7, "spec": [], "status": "x"},
        {"status": {"containerStatuses": [{"name": 7, "restartCount": -1, "state": {"running": []}}]}},
        {"spec": {"containers": [{"name": None}, 7]}, "metadata": {"annotations": {"x": []}}},
    ):
        view = pod_view(item)
        assert view.container("none") is None
        assert isinstance(view.culprit, str)
