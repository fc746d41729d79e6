from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fabrik_daemon import (
    BACKING_OFF,
    CONNECTING,
    FORBIDDEN,
    LISTING,
    STALE,
    UNAUTHORISED,
    WATCHING,
    Advance,
    Apply,
    Get,
    HangUp,
    Keep,
    Refusal,
    Renew,
    ServerTraits,
    Swap,
    Timing,
    Told,
    WatchEvent,
    WatchMachine,
    WatchTarget,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fabrik_daemon import Action

PATH = "/api/v1/namespaces/fabrik-runs/pods"
TIMING = Timing()


def plain() -> ServerTraits:
    """Return the traits of a server that streams no lists."""
    traits = ServerTraits()
    traits.streams_lists = False
    return traits


def machine(
    version: str | None = None,
    jitter: float = 0.5,
    selector: str | None = None,
    traits: ServerTraits | None = None,
) -> WatchMachine:
    target = WatchTarget(PATH, "pods in fabrik-runs", selector)
    return WatchMachine(target, traits or plain(), TIMING, lambda: jitter, version)


def event(version: str = "10", kind: str = "MODIFIED") -> WatchEvent:
    return WatchEvent(kind, {"metadata": {"name": "a", "resourceVersion": version}})


def error(code: int, message: str = "m") -> WatchEvent:
    return WatchEvent("ERROR", {"kind": "Status", "code": code, "message": message})


def get(actions: Sequence[Action]) -> Get:
    (found,) = (action for action in actions if isinstance(action, Get))
    return found


def asked(actions: Sequence[Action]) -> dict[str, str]:
    """Return the query of the one request among the actions."""
    parts = urlsplit(get(actions).target)
    assert parts.path == PATH
    return {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}


def kinds(actions: Sequence[Action]) -> list[type[Action]]:
    return [type(action) for action in actions]


def watching(version: str = "5", jitter: float = 0.5) -> WatchMachine:
    made = machine(version, jitter)
    made.start(0.0)
    made.on_watch_open(0.0)
    return made


def told(actions: Sequence[Action]) -> Told:
    return [action for action in actions if isinstance(action, Told)][-1]


def delay(actions: Sequence[Action], now: float) -> float:
    """Return for how long the machine waits, having hung up."""
    assert kinds(actions)[0] is HangUp
    assert not any(isinstance(action, Get) for action in actions)
    retry_at = told(actions).retry_at
    assert retry_at is not None
    return retry_at - now


# List, then watch


def test_without_a_version_it_lists_first() -> None:
    made = machine()
    actions = made.start(0.0)
    assert kinds(actions) == [Told, Get]
    assert asked(actions) == {"limit": "500", "resourceVersion": "0"}
    assert (get(actions).watch, get(actions).first_page) == (False, True)
    assert (made.state, made.deadline) == (LISTING, TIMING.answer)


def test_a_version_from_the_cache_is_where_it_goes_on() -> None:
    actions = machine("4711").start(0.0)
    assert asked(actions) == {
        "watch": "true",
        "allowWatchBookmarks": "true",
        "resourceVersion": "4711",
        "timeoutSeconds": "450",
    }
    assert get(actions).watch


def test_a_selector_goes_with_every_request() -> None:
    made = machine(selector="team=a,x!=y")
    assert asked(made.start(0.0))["labelSelector"] == "team=a,x!=y"
    assert asked(made.on_page("1", "next", 0.0))["labelSelector"] == "team=a,x!=y"
    assert asked(made.on_page("1", "", 0.0))["labelSelector"] == "team=a,x!=y"


@pytest.mark.parametrize(("jitter", "seconds"), [(0.0, "300"), (0.999, "599")])
def test_a_watch_asks_for_five_to_ten_minutes(jitter: float, seconds: str) -> None:
    assert asked(machine("1", jitter).start(0.0))["timeoutSeconds"] == seconds


def test_pages_follow_each_other_and_the_last_is_swapped_in() -> None:
    made = machine()
    made.start(0.0)
    second = made.on_page("7", "token=/+", 1.0)
    assert asked(second) == {"limit": "500", "continue": "token=/+"}
    assert not get(second).first_page
    last = made.on_page("7", "", 2.0)
    assert last[0] == Swap("7")
    assert asked(last)["resourceVersion"] == "7"


def test_an_open_watch_is_told() -> None:
    made = machine("5")
    made.start(0.0)
    assert made.state == CONNECTING
    assert made.on_watch_open(1.0) == [Told(WATCHING, "", None)]
    assert (made.state, made.deadline) == (WATCHING, 1.0 + TIMING.idle)


@pytest.mark.parametrize("kind", ["ADDED", "MODIFIED", "DELETED"])
def test_events_are_applied_and_move_the_version_on(kind: str) -> None:
    made = watching()
    assert made.on_event(event("9", kind), 1.0) == [Apply(event("9", kind))]
    assert asked(made.on_watch_end(400.0))["resourceVersion"] == "9"


def test_versions_are_opaque() -> None:
    made = watching("9")
    for version in ("10", "zz", "3", "\u00e9&="):
        made.on_event(event(version), 1.0)
        assert asked(made.on_watch_end(400.0))["resourceVersion"] == version
        made.on_watch_open(400.0)


def test_a_bookmark_moves_the_version_on_and_applies_nothing() -> None:
    made = watching()
    assert made.on_event(event("60", "BOOKMARK"), 1.0) == [Advance("60")]
    assert asked(made.on_watch_end(400.0))["resourceVersion"] == "60"


def test_a_version_that_is_plainly_lower_is_another_past() -> None:
    for back in (event("9"), event("9", "BOOKMARK"), event("99", "DELETED")):
        made = watching("100")
        actions = made.on_event(back, 1.0)
        assert kinds(actions)[0] is HangUp
        assert asked(actions) == {"limit": "500"}  # the store's own word
    made = watching("100")
    assert made.on_event(event("100"), 1.0) == [Apply(event("100"))]


def test_a_list_from_the_store_is_believed_whatever_its_version() -> None:
    made = watching("100")
    made.on_event(event("9"), 1.0)
    assert made.on_page("20", "", 2.0)[0] == Swap("20")
    made.on_watch_open(2.0)
    assert made.on_event(event("21"), 3.0) == [Apply(event("21"))]


@pytest.mark.parametrize(
    "bad",
    [
        event("9", "SYNC"),
        event("9", ""),
        event("9", "added"),
        event("", "ADDED"),
        WatchEvent("DELETED", {"metadata": 5}),
    ],
)
def test_an_event_of_no_known_kind_ends_the_connection_but_not_what_is_known(bad: WatchEvent) -> None:
    made = watching()
    actions = made.on_event(bad, 1.0)
    assert delay(actions, 1.0) == pytest.approx(0.4)
    assert "of type" in told(actions).error
    assert asked(made.due(1.4))["resourceVersion"] == "5"


def test_a_clean_end_goes_on_at_once_from_the_last_version() -> None:
    made = watching()
    made.on_event(event("9"), 1.0)
    actions = made.on_watch_end(300.0)
    assert kinds(actions) == [Told, Get]
    assert told(actions) == Told(WATCHING, "", None)


def test_a_watch_that_told_nothing_at_all_in_its_time_lists_anew() -> None:
    silent = watching("90").on_watch_end(300.0)
    assert told(silent).state == LISTING
    assert "resourceVersion" not in get(silent).target
    heard = watching()
    heard.on_event(WatchEvent("BOOKMARK", {"metadata": {"resourceVersion": "7"}}), 60.0)
    assert "resourceVersion=7" in get(heard.on_watch_end(300.0)).target


def test_a_watch_that_ends_at_once_and_empty_is_a_failure() -> None:
    assert delay(watching().on_watch_end(0.99), 0.99) == pytest.approx(0.4)
    assert kinds(watching().on_watch_end(1.0)) == [Told, Get]
    with_event = watching()
    with_event.on_event(event(), 0.1)
    assert kinds(with_event.on_watch_end(0.2)) == [Told, Get]


def test_a_bookmark_alone_does_not_make_an_end_at_once_healthy() -> None:
    made = watching()
    made.on_event(event("9", "BOOKMARK"), 0.1)
    assert delay(made.on_watch_end(0.2), 0.2) > 0
    assert asked(made.due(5.0))["resourceVersion"] == "9"


# Expired


def test_an_expired_version_is_listed_anew_at_once_then_paced() -> None:
    made = watching()
    actions = made.on_event(error(410), 200.0)
    assert kinds(actions) == [HangUp, Told, Told, Get]
    assert asked(actions) == {"limit": "500"}
    made.on_page("20", "", 201.0)
    made.on_watch_open(201.0)
    assert delay(made.on_event(error(410), 202.0), 202.0) == pytest.approx(0.8)
    assert asked(made.due(203.0)) == {"limit": "500"}


def test_an_http_410_is_the_same() -> None:
    made = machine("5")
    made.start(0.0)
    actions = made.on_refusal(Refusal(410, "gone"), 1.0)
    assert kinds(actions) == [HangUp, Told, Told, Get]
    assert asked(actions) == {"limit": "500"}
    assert get(actions).first_page


def test_a_storm_of_410_is_paced() -> None:
    made, now, requests = watching(), 0.0, 0
    while now < 100.0:
        actions = made.on_refusal(Refusal(410, "gone"), now)
        if any(isinstance(action, Get) for action in actions):
            requests += 1
        else:
            now = made.deadline or now
            requests += 1
            made.due(now)
    assert requests < 15


def test_an_expired_continue_token_asks_for_one_list_without_pages() -> None:
    made = machine()
    made.start(0.0)
    made.on_page("7", "token", 1.0)
    actions = made.on_refusal(Refusal(410, "the provided continue parameter is too old"), 2.0)
    assert asked(actions) == {}
    assert get(actions).first_page
    made.on_page("8", "", 3.0)
    made.on_watch_open(3.0)
    assert asked(made.on_event(error(410), 200.0)) == {"limit": "500"}


def test_a_list_that_fails_between_pages_begins_again() -> None:
    made = machine()
    made.start(0.0)
    made.on_page("7", "token", 1.0)
    made.on_failure("reset", 2.0)
    actions = made.due(3.0)
    assert asked(actions) == {"limit": "500", "resourceVersion": "0"}
    assert get(actions).first_page


# Refusals


def test_a_401_renews_the_credentials_once_then_backs_off() -> None:
    made = machine("5")
    made.start(0.0)
    first = made.on_refusal(Refusal(401, "Unauthorized"), 1.0)
    assert kinds(first) == [HangUp, Told, Renew]
    assert told(first) == Told(UNAUTHORISED, told(first).error, None)
    assert "Unauthorized" in told(first).error
    assert made.deadline == 1.0 + TIMING.credentials + TIMING.backoff_max
    again = made.start(2.0)
    assert asked(again)["resourceVersion"] == "5"
    second = made.on_refusal(Refusal(401, "Unauthorized"), 3.0)
    assert delay(second, 3.0) == pytest.approx(0.4)
    assert told(second).state == UNAUTHORISED
    assert Renew not in kinds(second)
    assert asked(made.due(4.0))["resourceVersion"] == "5"
    assert Renew in kinds(made.on_refusal(Refusal(401, "Unauthorized"), 5.0)), "once for each time that it backs off"
    made.start(6.0)
    assert delay(made.on_refusal(Refusal(401, "Unauthorized"), 7.0), 7.0) == pytest.approx(0.8)


def test_credentials_that_never_come_are_tried_again() -> None:
    made = machine("5")
    made.start(0.0)
    made.on_refusal(Refusal(401, "Unauthorized"), 1.0)
    assert made.deadline is not None
    assert asked(made.due(made.deadline))["resourceVersion"] == "5"


def test_a_watch_that_opened_may_renew_again() -> None:
    made = machine("5")
    made.start(0.0)
    made.on_refusal(Refusal(401, "Unauthorized"), 1.0)
    made.start(2.0)
    made.on_watch_open(2.0)
    made.on_watch_end(400.0)
    assert Renew in kinds(made.on_refusal(Refusal(401, "Unauthorized"), 401.0))


def test_a_403_waits_five_minutes_and_says_why() -> None:
    made = machine("5")
    made.start(0.0)
    actions = made.on_refusal(Refusal(403, "pods is forbidden"), 1.0)
    assert delay(actions, 1.0) == pytest.approx(300.0)
    assert told(actions)[:2] == (FORBIDDEN, "no right to watch pods in fabrik-runs: pods is forbidden")
    assert asked(made.due(400.0))["resourceVersion"] == "5"


@pytest.mark.parametrize(("code", "after"), [(429, 7.0), (503, 1.0), (504, 30.0), (500, 0.0)])
def test_what_the_server_asks_leads_over_the_back_off(code: int, after: float) -> None:
    made = machine("5", jitter=0.25)
    made.start(0.0)
    assert delay(made.on_refusal(Refusal(code, "busy", after), 1.0), 1.0) == pytest.approx(after + 0.25)
    assert asked(made.due(50.0))["resourceVersion"] == "5"


@pytest.mark.parametrize("code", [429, 500, 502, 503, 404])
def test_a_refusal_without_a_time_backs_off_and_keeps_the_version(code: int) -> None:
    made = machine("5")
    made.start(0.0)
    actions = made.on_refusal(Refusal(code, "busy"), 1.0)
    assert delay(actions, 1.0) == pytest.approx(0.4)
    assert told(actions)[:2] == (BACKING_OFF, "busy")
    assert asked(made.due(2.0))["resourceVersion"] == "5"


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(400, "invalid resource version: x"),
        Refusal(422, "sendInitialEvents is forbidden"),
        Refusal(504, "Timeout: Too large resource version: 100299, current: 309", 1.0),
    ],
)
def test_a_version_that_the_server_does_not_know_is_given_up(refusal: Refusal) -> None:
    made = machine("5")
    made.start(0.0)
    assert delay(made.on_refusal(refusal, 1.0), 1.0) > 0
    assert asked(made.due(5.0)) == {"limit": "500"}


def test_a_version_that_a_watch_calls_invalid_is_given_up() -> None:
    made = machine("abc")
    made.start(0.0)
    said = 'resourceVersion: Invalid value: "abc": strconv.ParseUint: parsing "abc": invalid syntax'
    made.on_refusal(Refusal(500, said), 1.0)
    assert asked(made.due(5.0)) == {"limit": "500"}


# Back-off


def test_the_back_off_doubles_to_30_s_with_full_jitter() -> None:
    made, now, waits = machine("5", jitter=1.0), 0.0, []
    made.start(now)
    for _ in range(9):
        waits.append(delay(made.on_failure("refused", now), now))
        now = made.deadline or now
        made.due(now)
    assert waits == pytest.approx([0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0, 30.0])
    assert delay(machine("5", jitter=0.0).on_failure("refused", 1.0), 1.0) == 0.0


def test_thousands_of_failures_overflow_nothing() -> None:
    made = machine("5", jitter=1.0)
    for _ in range(3000):
        wait = delay(made.on_failure("refused", 0.0), 0.0)
    assert wait == 30.0


def failing(times: int) -> WatchMachine:
    made = machine("5", jitter=1.0)
    for _ in range(times):
        made.on_failure("refused", 0.0)
    made.start(0.0)
    made.on_watch_open(0.0)
    return made


def test_only_two_minutes_of_health_reset_the_back_off() -> None:
    assert delay(failing(3).on_failure("reset", 119.0), 119.0) == pytest.approx(6.4)
    assert delay(failing(3).on_failure("reset", 120.0), 120.0) == pytest.approx(0.8)
    ended = failing(3)
    ended.on_event(event("6"), 60.0)
    ended.on_watch_end(120.0)
    assert delay(ended.on_failure("reset", 121.0), 121.0) == pytest.approx(0.8)


def test_two_minutes_of_health_before_an_error_event_reset_the_back_off() -> None:
    assert Get in kinds(failing(3).on_event(error(410), 200.0))


def test_watches_that_follow_each_other_are_one_time_of_health() -> None:
    made = failing(3)
    made.on_event(event(), 50.0)
    made.on_watch_end(60.0)
    made.on_watch_open(60.0)
    assert delay(made.on_failure("reset", 125.0), 125.0) == pytest.approx(0.8)


def test_waiting_is_not_health() -> None:
    made = machine("5", jitter=1.0)
    for _ in range(3):
        made.on_failure("refused", 0.0)
    assert delay(made.on_failure("refused", 500.0), 500.0) == pytest.approx(6.4)


# Silence


def test_bytes_put_off_the_deadline() -> None:
    made = watching()
    made.heard(50.0)
    assert made.deadline == 50.0 + TIMING.idle
    listing = machine()
    listing.start(0.0)
    listing.heard(50.0)
    assert listing.deadline == 50.0 + TIMING.answer


def test_silence_ends_a_watch_that_has_told_something_and_it_goes_on_from_there() -> None:
    made = watching()
    made.on_event(event("9"), 1.0)
    made.heard(1.0)
    assert made.deadline == 1.0 + TIMING.idle
    actions = made.due(71.0)
    assert delay(actions, 71.0) == pytest.approx(0.4)
    assert told(actions)[:2] == (STALE, "silent for 70 s")
    assert asked(made.due(72.0))["resourceVersion"] == "9"


@pytest.mark.parametrize("version", [None, "5"])
def test_a_request_that_is_not_answered_is_given_up(version: str | None) -> None:
    made = machine(version)
    made.start(0.0)
    actions = made.due(TIMING.answer)
    assert delay(actions, TIMING.answer) == pytest.approx(0.4)
    assert told(actions).error == "no answer for 75 s"
    assert asked(made.due(80.0))["resourceVersion"] == (version or "0")


def test_a_server_that_sends_no_bookmarks_gets_its_watch_timeout() -> None:
    made = watching()
    made.due(TIMING.idle)
    assert asked(made.due(71.0)) == {"limit": "500"}  # the version may be one that does not exist yet
    made.on_page("8", "", 72.0)
    made.on_watch_open(72.0)
    assert made.deadline == 72.0 + TIMING.idle, "once may have been the connection's fault"
    made.due(72.0 + TIMING.idle)
    made.due(150.0)
    made.on_page("8", "", 151.0)
    made.on_watch_open(151.0)
    assert made.deadline == 151.0 + 2 * TIMING.watch_timeout + TIMING.idle


def test_a_server_that_does_send_bookmarks_is_held_to_them_again() -> None:
    made = watching()
    made.due(TIMING.idle)  # the connection was dead from the start
    made.due(71.0)
    made.on_page("8", "", 72.0)
    made.on_watch_open(72.0)
    made.on_event(event("9", "BOOKMARK"), 132.0)
    made.heard(132.0)
    assert made.deadline == 132.0 + TIMING.idle


# Streamed lists

END = WatchEvent(
    "BOOKMARK", {"metadata": {"resourceVersion": "50", "annotations": {"k8s.io/initial-events-end": "true"}}}
)


def streaming() -> tuple[WatchMachine, ServerTraits]:
    traits = ServerTraits()
    made = machine(traits=traits)
    actions = made.start(0.0)
    assert asked(actions) == {
        "watch": "true",
        "allowWatchBookmarks": "true",
        "timeoutSeconds": "450",
        "sendInitialEvents": "true",
        "resourceVersionMatch": "NotOlderThan",
    }
    made.on_watch_open(0.0)
    return made, traits


def test_an_initial_list_is_kept_until_its_end_and_then_swapped_in() -> None:
    made, _ = streaming()
    assert made.state == LISTING
    for version in ("9", "3"):  # without order
        assert made.on_event(event(version, "ADDED"), 1.0) == [Keep(event(version, "ADDED"))]
    assert made.on_event(event("4", "BOOKMARK"), 1.0) == []
    assert made.on_event(END, 2.0) == [Swap("50"), Told(WATCHING, "", None)]
    assert made.on_event(event("51"), 3.0) == [Apply(event("51"))]
    assert asked(made.on_watch_end(400.0))["resourceVersion"] == "51"


def test_bytes_do_not_put_off_the_end_that_an_initial_list_must_have() -> None:
    made, traits = streaming()
    made.heard(20.0)
    made.on_event(event("9", "ADDED"), 20.0)
    assert made.deadline == TIMING.initial_list
    actions = made.due(TIMING.initial_list)
    assert kinds(actions) == [HangUp, Told, Get]
    assert asked(actions) == {"limit": "500", "resourceVersion": "0"}
    assert not traits.streams_lists


@pytest.mark.parametrize("code", [400, 405, 422, 501])
def test_a_server_that_refuses_to_stream_a_list_is_remembered(code: int) -> None:
    traits = ServerTraits()
    made = machine(traits=traits)
    made.start(0.0)
    assert asked(made.on_refusal(Refusal(code, "m"), 1.0)) == {"limit": "500", "resourceVersion": "0"}
    assert not traits.streams_lists
    assert asked(machine(traits=traits).start(2.0)) == {"limit": "500", "resourceVersion": "0"}


def test_a_stream_that_ends_inside_its_initial_list_is_not_believed() -> None:
    made, traits = streaming()
    made.on_event(event("9", "ADDED"), 1.0)
    assert not any(isinstance(action, Swap) for action in made.on_watch_end(5.0))
    assert not traits.streams_lists


def test_a_connection_that_breaks_inside_an_initial_list_streams_it_again() -> None:
    made, traits = streaming()
    made.on_failure("reset", 1.0)
    assert asked(made.due(2.0))["sendInitialEvents"] == "true"
    assert traits.streams_lists


def test_a_consistent_list_comes_every_half_hour() -> None:
    made = watching()
    made.on_event(error(410), 0.0)
    made.on_page("6", "", 0.0)
    made.on_watch_open(0.0)
    now = 0.0
    while made.deadline > now + TIMING.idle - 1.0:
        now += 60.0
        made.heard(now)
        made.on_event(event("7", "BOOKMARK"), now)
        assert now < TIMING.relist * 1.1
    now = made.deadline
    assert now == TIMING.relist
    actions = made.due(now)
    assert kinds(actions)[0] is HangUp
    assert asked(actions) == {"limit": "500"}


def test_a_recycled_connection_goes_on_a_moment_later() -> None:
    made = watching()
    actions = made.recycle("the host slept", 1.0)
    assert delay(actions, 1.0) == pytest.approx(0.4)
    assert told(actions)[:2] == (STALE, "the host slept")
    assert asked(made.due(2.0))["resourceVersion"] == "5"


# Anything


class AnyServer(RuleBasedStateMachine):
    """A server that answers whatever it likes, and a caller that keeps to the contract."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.jitter = 0.5
        self.connected = False
        self.request: Get | None = None  # sent and not yet answered whole
        self.open = False
        self.initial = False  # a list is being streamed
        self.versions = {""}  # that the server or the cache ever told
        self.tokens: set[str] = set()
        self.counter = 0

    @initialize(resumes=st.booleans())
    def begin(self, resumes: bool) -> None:
        if resumes:
            self.versions.add("cached")
        target = WatchTarget(PATH, "pods")
        self.machine = WatchMachine(target, ServerTraits(), TIMING, lambda: self.jitter, "cached" if resumes else None)
        self.do(self.machine.start(self.now))

    def do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, HangUp):
                self.connected, self.request, self.open = False, None, False
            elif isinstance(action, Get):
                assert self.request is None, "two requests at a time"
                self.connected, self.request, self.open = True, action, False
                self.initial = "sendInitialEvents" in action.target
                self.check_request(action)
            elif isinstance(action, (Apply, Advance)):
                assert self.open, "an event before its watch is open"
                assert not self.initial, "an event of a list that is not whole"
            elif isinstance(action, Keep):
                assert self.initial
            elif isinstance(action, Told):
                assert action.state in {CONNECTING, LISTING, WATCHING, BACKING_OFF, FORBIDDEN, UNAUTHORISED, STALE}
                assert action.retry_at is None or action.retry_at >= self.now

    def check_request(self, request: Get) -> None:
        query = {name: values[0] for name, values in parse_qs(urlsplit(request.target).query).items()}
        assert request.watch == ("watch" in query)
        if request.watch:
            assert ("resourceVersion" in query) != ("sendInitialEvents" in query)
            assert query.get("resourceVersion", "cached") in self.versions - {""} | {"cached"}
            assert 300 <= int(query["timeoutSeconds"]) <= 600
        else:
            assert "continue" not in query or query["continue"] in self.tokens
            assert query.get("resourceVersion", "0") in self.versions - {""} | {"0"}
            assert request.first_page == ("continue" not in query)

    def fresh(self) -> str:
        self.counter += 1
        return f"v{self.counter}"

    @rule(seconds=st.sampled_from([0.0, 0.1, 5.0, 60.0, 200.0]), jitter=st.floats(0, 0.999))
    def time_passes(self, seconds: float, jitter: float) -> None:
        self.jitter = jitter
        assert self.machine.deadline is not None
        self.now = max(self.now, min(self.now + seconds, self.machine.deadline))
        if self.now >= self.machine.deadline:
            self.do(self.machine.due(self.now))

    @precondition(lambda self: self.request is not None and not self.open)
    @rule(
        code=st.sampled_from([400, 401, 403, 404, 410, 422, 429, 500, 503, 504]),
        after=st.none() | st.floats(0, 60),
        message=st.sampled_from(["m", "Too large resource version"]),
    )
    def refused(self, code: int, after: float | None, message: str) -> None:
        self.request = None
        self.do(self.machine.on_refusal(Refusal(code, message, after), self.now))

    @precondition(lambda self: self.request is not None and not self.request.watch)
    @rule(more=st.booleans())
    def page(self, more: bool) -> None:
        version, token = self.fresh(), self.fresh() if more else ""
        self.versions.add(version)
        self.tokens.add(token)
        self.request = None
        actions = self.machine.on_page(version, token, self.now)
        assert (Swap(version) in actions) == (not more)
        self.do(actions)

    @precondition(lambda self: self.request is not None and self.request.watch and not self.open)
    @rule()
    def opened(self) -> None:
        self.machine.heard(self.now)
        self.open = True
        self.do(self.machine.on_watch_open(self.now))

    @precondition(lambda self: self.open)
    @rule(kind=st.sampled_from(["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "NEWS", "ERROR"]), whole=st.booleans())
    def told(self, kind: str, whole: bool) -> None:
        self.machine.heard(self.now)
        version = self.fresh() if whole else ""
        item: dict[str, Any] = {"metadata": {"resourceVersion": version}, "code": 410}
        told = WatchEvent(kind, item)
        self.versions.add(version)
        actions = self.machine.on_event(told, self.now)
        known = kind in {"ADDED", "MODIFIED", "DELETED"} and whole and not self.initial
        assert (Apply in kinds(actions)) == known
        self.do(actions)

    @precondition(lambda self: self.open and self.initial)
    @rule()
    def initial_list_ended(self) -> None:
        self.machine.heard(self.now)
        version = self.fresh()
        self.versions.add(version)
        metadata = {"resourceVersion": version, "annotations": {"k8s.io/initial-events-end": "true"}}
        actions = self.machine.on_event(WatchEvent("BOOKMARK", {"metadata": metadata}), self.now)
        assert Swap(version) in actions
        self.initial = False
        self.do(actions)

    @precondition(lambda self: self.open)
    @rule()
    def ended(self) -> None:
        self.request, self.open = None, False
        self.do(self.machine.on_watch_end(self.now))

    @precondition(lambda self: self.connected)
    @rule()
    def broke(self) -> None:
        self.do(self.machine.on_failure("reset", self.now))

    @precondition(lambda self: self.machine.state == UNAUTHORISED and not self.connected)
    @rule()
    def credentials_came(self) -> None:
        self.do(self.machine.start(self.now))

    @invariant()
    def there_is_always_a_deadline(self) -> None:
        if hasattr(self, "machine"):
            assert self.machine.deadline is not None
            assert self.now <= self.machine.deadline <= self.now + 3600

    @invariant()
    def it_waits_or_has_asked(self) -> None:
        if hasattr(self, "machine"):
            waits = self.machine.state in {BACKING_OFF, FORBIDDEN, UNAUTHORISED, STALE}
            assert waits == (self.request is None)


AnyServer.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
test_whatever_the_server_does = AnyServer.TestCase
