"""Filters, and what the bus tells whom: groups, queues, lag, snapshots, what only the cache still holds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fabrik_daemon
from fabrik_daemon import (
    EVENT_TYPES,
    LIST_FILTERS,
    SCHEDULE_STATES,
    STREAM_FILTERS,
    Bus,
    Change,
    ClusterEvent,
    ClusterRow,
    Cursor,
    Filter,
    Held,
    Past,
    Run,
    Schedule,
    Subscription,
    UsageError,
    Volume,
    Wish,
    parse_filter,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fabrik_daemon import Row

RUN: Final = Run("r@c/n", "c", "n", "running", spec_id="s", project="p", phase="implement", id="r")


def wanting(**filters: Any) -> Filter:
    clusters = filters.pop("clusters", [])
    return parse_filter({"clusters": clusters, "filter": filters}, STREAM_FILTERS)


@pytest.mark.parametrize(
    ("filters", "row", "matches"),
    [
        ({}, RUN, True),
        ({"status": ["running", "blocked"]}, RUN, True),
        ({"status": "blocked"}, RUN, False),
        ({"status": ["unknown"]}, RUN._replace(status=None), True),
        ({"status": ["running"], "project": ["p"]}, RUN, True),
        ({"status": ["running"], "project": ["q"]}, RUN, False),
        ({"template": ["t"]}, RUN, False),
        ({"run_id": ["r"]}, RUN, True),
        ({"run_id": ["r@c/n"]}, RUN, True),
        ({"run_id": ["x"]}, RUN, False),
        ({"clusters": ["c", "d"]}, RUN, True),
        ({"clusters": ["*"]}, RUN, True),
        ({"clusters": ["d"]}, RUN, False),
        ({"status": []}, RUN, True),
        ({"status": ["unknown"]}, Volume("c", "n", "v"), False),
        ({"run_id": ["r"]}, Volume("c", "n", "v", run_id="r"), True),
        ({"namespace": ["n"]}, Schedule("c", "n", "s"), True),
        ({"namespace": ["n"]}, ClusterRow("c"), False),
        ({"clusters": ["c"]}, ClusterRow("c"), True),
    ],
)
def test_what_a_filter_asks_for(filters: dict[str, Any], row: Row, matches: bool) -> None:
    assert wanting(**filters).matches(row) == matches


@given(st.sampled_from([Run, Schedule, Volume, ClusterEvent]), st.data())
def test_every_key_of_a_filter_is_a_column_of_its_rows(kind: Any, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([key for key in LIST_FILTERS[kind] if key != "state"]))
    assert key in kind._fields
    value = "running" if key == "status" else data.draw(st.text(min_size=1, max_size=5))
    row = kind(*("x" for _ in kind._fields))._replace(**{key: value})
    assert parse_filter({"filter": {key: [value]}}, LIST_FILTERS[kind]).matches(row)
    assert parse_filter({"filter": {key: ["blocked"]}}, LIST_FILTERS[kind]).matches(row) == (value == "blocked")


@pytest.mark.parametrize(
    ("row", "state"),
    [
        (Schedule("c", "n", "a"), "waiting"),
        (Schedule("c", "n", "a", active=2), "active"),
        (Schedule("c", "n", "a", active=2, suspended=1), "suspended"),
    ],
)
def test_a_schedule_is_asked_for_by_its_state(row: Schedule, state: str) -> None:
    for each in SCHEDULE_STATES:
        assert parse_filter({"filter": {"state": [each]}}, LIST_FILTERS[Schedule]).matches(row) == (each == state)
    with pytest.raises(UsageError, match="no state 'suspend'"):
        parse_filter({"filter": {"state": ["suspend"]}}, LIST_FILTERS[Schedule])


@pytest.mark.parametrize(
    ("words", "types"),
    [
        ([], set()),
        (["run:*"], set(EVENT_TYPES[Run])),
        (["warning", "cluster:stale"], {"warning", "cluster:stale"}),
        ("*", {name for names in EVENT_TYPES.values() for name in names}),
    ],
)
def test_event_types(words: Any, types: set[str]) -> None:
    assert wanting(type=words).types == types


@pytest.mark.parametrize(
    "filters", [{"type": ["run"]}, {"type": ["warning:*"]}, {"status": ["Running"]}, {"spec": ["s"]}, {"phase": [1]}]
)
def test_what_no_filter_is(filters: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        wanting(**filters)


class World:
    """A bus over rows and a cache that are lists."""

    def __init__(self, first: int = 0, upto: int = 0) -> None:
        self.rows: list[Row] = []
        self.cache: list[Change] = []
        self.pruned = 0
        self.bus = Bus(
            Past(Cursor("s", first), (), upto, [range(upto + 1, first)]), lambda _wanted: self.rows, self.held
        )

    def held(self, seq: int) -> Held:
        return Held([change for change in self.cache if change.seq > seq][:3], seq >= self.pruned)

    def change(self, seq: int, row: Run = RUN, before: Run | None = RUN, kind: str = "run:updated") -> None:
        change = Change(seq, kind, row, before, "2026")
        self.cache.append(change)
        self.bus.publish([change])


def told(subscription: Subscription) -> list[dict[str, Any]]:
    """Return all that a subscription has to tell, as one reads that has time for it."""
    found = []
    while True:
        line = subscription.take()
        if line is not None:
            found.append(json.loads(line))
        elif subscription.lack is not None:
            lack, subscription.lack = subscription.lack, None
            lack.take(lack.read())
        else:
            return found


def seqs(messages: Sequence[dict[str, Any]]) -> list[int]:
    return [message["seq"] for message in messages if message["type"] == "run:updated"]


def test_one_who_leaves_is_told_and_then_no_more() -> None:
    world = World()
    subscription = world.bus.subscribe(Wish(wanting(status=["running"])), {"id": 1})
    world.change(1, RUN._replace(status="blocked"))
    world.change(2, RUN._replace(status="blocked"), RUN._replace(status="blocked"))
    world.change(3, RUN, None, "run:removed")
    world.bus.unsubscribe(subscription)
    world.change(4)
    messages = told(subscription)
    assert [(one["type"], one["seq"], one.get("left"), one["id"]) for one in messages] == [
        ("subscribed", 0, None, 1),
        ("run:updated", 1, True, 1),
        ("run:removed", 3, True, 1),
    ]
    assert len(world.bus) == 0


def test_lines_are_shared_and_only_marked_when_taken() -> None:
    """A thousand subscribers who do not read hold one copy of each line."""
    world = World()
    subscriptions = [world.bus.subscribe(Wish(), {"id": number}) for number in range(3)]
    world.change(1)
    queued = {id(line) for subscription in subscriptions for line in subscription._queue}
    assert len(queued) == 1
    assert [told(subscription)[-1]["id"] for subscription in subscriptions] == [0, 1, 2]


@pytest.mark.parametrize("limit", ["SUBSCRIBER_QUEUE_LINES", "SUBSCRIBER_QUEUE_BYTES"])
def test_who_does_not_read_lags_and_nobody_else(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fabrik_daemon, limit, 5 if limit.endswith("LINES") else 4000)
    world = World()
    world.rows = [RUN]
    lazy, eager = world.bus.subscribe(Wish(), {}), world.bus.subscribe(Wish(), {})
    seen = []
    for seq in range(1, 21):
        world.change(seq)
        seen += seqs(told(eager))
    assert seen == list(range(1, 21))
    messages = told(lazy)
    assert [message["type"] for message in messages] == ["subscribed", "lagged", "snapshot"]
    assert messages[1]["dropped"] == world.bus.dropped == 20
    assert (messages[2]["seq"], messages[2]["last"], len(messages[2]["runs"])) == (20, True, 1)
    world.change(21)
    assert seqs(told(lazy)) == [21]


def test_since_out_of_the_cache_then_memory_then_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fabrik_daemon, "HISTORY_EVENTS", 4)
    world = World()
    for seq in range(1, 21):
        world.change(seq)
    subscription = world.bus.subscribe(Wish(since=Cursor("s", 2)), {})
    assert subscription.lack is not None
    messages = told(subscription)
    assert seqs(messages) == list(range(3, 21))
    assert all(message["history"] for message in messages[1:])
    world.change(21)
    assert seqs(told(subscription)) == [21]


def test_since_while_changes_go_on_and_memory_moves_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fabrik_daemon, "HISTORY_EVENTS", 4)
    world = World()
    for seq in range(1, 11):
        world.change(seq)
    subscription = world.bus.subscribe(Wish(since=Cursor("s", 0)), {})
    seen, seq = [], 10
    while subscription.lack is not None:
        lack, subscription.lack = subscription.lack, None
        held = lack.read()
        for _ in range(2):  # each piece is three changes: it gains one on those that come
            seq += 1
            world.change(seq)
        lack.take(held)
        while (line := subscription.take()) is not None:
            seen += seqs([json.loads(line)])
    assert seen == list(range(1, seq + 1))


@pytest.mark.parametrize("trouble", ["pruned", "not written yet"])
def test_what_the_cache_does_not_hold_is_a_lag(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fabrik_daemon, "HISTORY_EVENTS", 4)
    world = World()
    for seq in range(1, 11):
        world.change(seq)
    if trouble == "pruned":
        world.pruned = 3
    else:
        world.cache.clear()
    messages = told(world.bus.subscribe(Wish(since=Cursor("s", 2)), {}))
    assert [message["type"] for message in messages] == ["subscribed", "lagged", "snapshot"]
    assert messages[1]["dropped"] is None


def test_who_unsubscribes_while_the_cache_is_read_is_told_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fabrik_daemon, "HISTORY_EVENTS", 1)
    world = World()
    for seq in range(1, 5):
        world.change(seq)
    subscription = world.bus.subscribe(Wish(since=Cursor("s", 0)), {})
    lack = subscription.lack
    assert lack is not None
    world.bus.unsubscribe(subscription)
    lack.take(lack.read())
    assert len(world.bus) == 0


@pytest.mark.parametrize(("seq", "lags"), [(40, False), (50, False), (51, True), (9_999, True), (10_000, False)])
def test_numbers_that_a_crash_took_along_are_of_no_use(seq: int, lags: bool) -> None:
    """What was told under them may never have been written: who was told it knows more than the daemon does."""
    world = World(first=10_000, upto=50)
    world.pruned = 0
    world.cache = [Change(number, "run:updated", RUN, RUN, "2026") for number in range(41, 51)]
    world.bus._history_after = 40
    kinds = [message["type"] for message in told(world.bus.subscribe(Wish(since=Cursor("s", seq)), {}))]
    assert ("lagged" in kinds) == lags
