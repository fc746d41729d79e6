"""Whom a remote daemon lets in, and what it lets them ask: the core alone, without a socket or a clock."""

from __future__ import annotations

import base64
import itertools
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabrik_daemon import (
    OPEN_ACTIONS,
    REMOTE_ACTIONS,
    REMOTE_REQUESTS_BURST,
    REMOTE_WRONG_TOKEN_COST,
    Exposure,
    Gate,
    HttpRequest,
    RateError,
    RateLimiter,
    RefusedError,
    RemoteAccess,
    Requests,
    TokenError,
    host_of,
    parse_tokens,
    peer_name,
)

if TYPE_CHECKING:
    from collections.abc import Callable

TOKEN: Final = "correct-horse-battery-staple"
OTHER: Final = "another-token-of-this-daemon"
PEER: Final = "192.0.2.7"
SENDS: Final = {"authorization": f"Bearer {TOKEN}"}


def bearer_protocol(token: str) -> str:
    """Return the entry of Sec-WebSocket-Protocol by which a browser shows a token."""
    return "fabrik.bearer." + base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")


def asked(path: str = "/v1/runs", **headers: str) -> HttpRequest:
    """Return a request; `x_y` stands for the header x-y, and the host is the daemon's own unless one is given."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return HttpRequest("GET", path, {}, {"host": "localhost:8080", **named}, b"")


def exposure(**more: Any) -> Exposure:
    return Exposure("127.0.0.1", 8080, token=TOKEN, **more)


def gate(now: Callable[[], float] = lambda: 0.0, **more: Any) -> Gate:
    return Gate(exposure(**more), parse_tokens(f"{TOKEN}\n{OTHER}\n", "tokens"), now)


def refusal(http: HttpRequest, **more: Any) -> RefusedError:
    """Return the error with which a gate refuses; it must have counted it, and must not tell any token."""
    door = gate(**more)
    with pytest.raises(RefusedError) as raised:
        door.check(http, PEER)
    assert raised.value.exit_code == 9
    assert door.refused == 1
    for secret in (TOKEN, OTHER, *http.headers.get("authorization", "").split()[1:]):
        assert secret not in str(raised.value)
    return raised.value


def access(door: Gate | None = None, **headers: str) -> RemoteAccess:
    """Return the access of a client that has shown its token, by HTTP or, with `upgrade`, for a WebSocket."""
    found = RemoteAccess(door or gate(), PEER)
    found.check_http(asked(**{**SENDS, **headers}))
    return found


# Tokens --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {TOKEN}"},
        {"authorization": f"bearer   {TOKEN} "},
        {"authorization": f"Bearer {OTHER}"},
        {"sec_websocket_protocol": f"fabrik.v1, {bearer_protocol(TOKEN)}"},
        {"sec_websocket_protocol": f"{bearer_protocol(OTHER)},fabrik.v1"},
        {"sec_websocket_protocol": f"{bearer_protocol(TOKEN)}=="},
    ],
)
def test_a_token_passes_in_either_header_and_any_of_the_file(headers: dict[str, str]) -> None:
    assert gate().check(asked(**headers), PEER) in parse_tokens(f"{TOKEN}\n{OTHER}", "")


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer "},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": f"Bearer {TOKEN[:-1]}"},
        {"authorization": f"Bearer {TOKEN}, Bearer {TOKEN}"},
        {"authorization": "Bearer wr\xf6ng"},
        {"sec_websocket_protocol": "fabrik.v1, fabrik.bearer."},
        {"sec_websocket_protocol": "fabrik.bearer.%%%"},
        {"sec_websocket_protocol": "fabrik.bearer._w"},
        {"sec_websocket_protocol": bearer_protocol("wrong")},
    ],
)
def test_a_wrong_token_is_refused_as_such(headers: dict[str, str]) -> None:
    error = refusal(asked(**headers))
    assert isinstance(error, TokenError)
    assert (error.http_status, error.code) == (401, "unauthorized")
    assert "not the daemon's" in error.message


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": TOKEN},
        {"cookie": f"token={TOKEN}"},
        {"sec_websocket_protocol": "fabrik.v1"},
    ],
)
def test_no_token_is_told_to_show_one(headers: dict[str, str]) -> None:
    assert refusal(asked(**headers)).message == "this daemon wants a token"


def test_a_token_in_the_url_is_none() -> None:
    http = asked()._replace(query={"token": [TOKEN], "access_token": [TOKEN], "authorization": [f"Bearer {TOKEN}"]})
    assert refusal(http).message == "this daemon wants a token"


def test_a_header_leads_over_the_protocol_list() -> None:
    headers = {"authorization": "Bearer wrong", "sec_websocket_protocol": bearer_protocol(TOKEN)}
    assert isinstance(refusal(asked(**headers)), TokenError)


@given(st.text(max_size=60), st.text(max_size=60))
def test_no_other_header_lets_anyone_in(authorization: str, protocols: str) -> None:
    with pytest.raises(TokenError):
        gate().check(asked(authorization=authorization, sec_websocket_protocol=protocols), PEER)


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/daemon/healthz", "/daemon/readyz/"])
def test_health_needs_neither_token_nor_name(path: str) -> None:
    assert gate().check(asked(path, host="10.42.0.9:8080"), PEER) is None
    assert gate().check(asked(path, host="whatever.example"), PEER) is None


@pytest.mark.parametrize("path", ["/metrics", "/daemon/metrics"])
def test_metrics_need_no_token_but_the_right_name(path: str) -> None:
    assert gate().check(asked(path), PEER) is None
    assert refusal(asked(path, host="evil.example")).http_status == 403


@pytest.mark.parametrize(
    "path", ["/", "/status", "/v1/ping", "/healthz/x", "/daemon", "/daemon/daemon/healthz", "//healthz"]
)
def test_nothing_else_goes_without_a_token(path: str) -> None:
    assert isinstance(refusal(asked(path)), TokenError)


# Host and origin -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8080",
        "127.0.0.1:1",
        "[::1]:8080",
        "10.1.2.3",
        "fabrik.example.com",
        "Fabrik.Example.Com.:443",
    ],
)
def test_addresses_and_own_names_are_taken(host: str) -> None:
    assert gate(hosts=frozenset(["fabrik.example.com"])).check(asked(host=host, **SENDS), PEER)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "127.1",
        "[::1].evil",
        "fabrik.example.com, evil.example",
    ],
)
def test_a_name_that_is_not_the_daemons_is_refused(host: str) -> None:
    error = refusal(asked(host=host, **SENDS), hosts=frozenset(["fabrik.example.com"]))
    assert (error.http_status, error.code) == (403, "refused")
    assert "--allow-host" in error.hint


@pytest.mark.parametrize("origin", ["http://localhost:8080", "https://dash.example.com", "HTTPS://Dash.Example.com"])
def test_own_pages_and_those_that_were_allowed_may_ask(origin: str) -> None:
    assert gate(origins=frozenset(["https://dash.example.com"])).check(asked(origin=origin, **SENDS), PEER)


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "http://dash.example.com",
        "https://dash.example.com.evil",
        "http://localhost:9999",
        "file://",
    ],
)
def test_pages_of_others_may_not(origin: str) -> None:
    error = refusal(asked(origin=origin, **SENDS), origins=frozenset(["https://dash.example.com"]))
    assert (error.http_status, error.code) == (403, "refused")
    assert "--allow-origin" in error.hint


@pytest.mark.parametrize(
    ("authority", "host"),
    [
        ("a.b:80", "a.b"),
        ("[::1]:80", "::1"),
        ("[::1]", "::1"),
        ("A.", "a"),
        ("", ""),
        ("[", ""),
        (":80", ""),
        ("a:b:1", ""),
    ],
)
def test_the_host_of_an_authority(authority: str, host: str) -> None:
    assert host_of(authority) == host


# Requests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", sorted(REMOTE_ACTIONS))
def test_reading_requests_pass_without_kept_logs(action: str) -> None:
    request = {"action": action, "keptLogs": True}
    access().check(request)
    assert request == {"action": action, "keptLogs": False}


@pytest.mark.parametrize("action", ["query", "logs", "reload", "shutdown", "no.such", ""])
def test_other_requests_are_refused(action: str) -> None:
    with pytest.raises(RefusedError) as raised:
        access().check({"action": action})
    assert (raised.value.http_status, raised.value.exit_code, raised.value.code) == (403, 9, "refused")
    assert "runs" in raised.value.hint


def test_every_action_of_the_daemon_is_either_read_remotely_or_kept_at_home() -> None:
    """A new action stays at home until somebody has thought about it; this makes somebody."""
    known = set(vars(Requests(None))["_actions"])  # type: ignore[arg-type]  # nothing is asked of it
    assert known - REMOTE_ACTIONS - OPEN_ACTIONS == {"query", "logs", "reload", "shutdown"}


def test_what_came_by_an_open_route_gets_no_further() -> None:
    found = RemoteAccess(gate(), PEER)
    found.check_http(asked("/healthz"))
    found.check({"action": "healthz"})
    with pytest.raises(TokenError):
        found.check({"action": "runs"})


def test_a_token_holds_for_the_request_that_it_came_with() -> None:
    found = access()
    with pytest.raises(TokenError):
        found.check_http(asked())
    with pytest.raises(TokenError):
        found.check({"action": "runs"})


def test_a_token_that_was_withdrawn_is_good_no_more() -> None:
    door = gate()
    found = access(door, upgrade="websocket")
    assert found.is_good
    door.digests = parse_tokens(OTHER, "")
    assert not found.is_good
    with pytest.raises(TokenError, match="any more"):
        found.check({"action": "ping"})


# Rates ---------------------------------------------------------------------------------------------------------------


def test_a_burst_passes_and_a_flood_does_not() -> None:
    clock = itertools.repeat(100.0)
    door = gate(lambda: next(clock))
    for _ in range(int(REMOTE_REQUESTS_BURST)):
        door.check(asked(**SENDS), PEER)
    with pytest.raises(RateError) as raised:
        door.check(asked(**SENDS), PEER)
    assert (raised.value.http_status, raised.value.code, raised.value.retry_after_s) == (429, "too_many_requests", 1)
    door.check(asked(**SENDS), "192.0.2.8")  # others are not concerned


def test_over_websocket_each_message_counts_and_over_http_each_request_once() -> None:
    burst = int(REMOTE_REQUESTS_BURST)
    by_http = RemoteAccess(gate(), PEER)
    for _ in range(burst):
        by_http.check_http(asked(**SENDS))
        by_http.check({"action": "ping"})
    with pytest.raises(RateError):
        by_http.check_http(asked(**SENDS))
    by_socket = access(upgrade="websocket")
    for _ in range(burst - 1):
        by_socket.check({"action": "ping"})
    with pytest.raises(RateError):
        by_socket.check({"action": "ping"})


def test_guessing_tokens_is_slow_and_ends_no_one_elses_access() -> None:
    now = [0.0]
    door = gate(lambda: now[0])
    refused: list[type] = []
    for _ in range(100):
        with pytest.raises(RefusedError) as raised:
            door.check(asked(authorization="Bearer guess-guess-guess"), PEER)
        refused.append(raised.type)
    guesses = refused.count(TokenError)
    assert guesses <= REMOTE_REQUESTS_BURST / REMOTE_WRONG_TOKEN_COST
    assert set(refused[guesses:]) == {RateError}
    assert door.check(asked(**SENDS), "192.0.2.8")
    now[0] = 60.0
    assert door.check(asked(**SENDS), PEER)


def test_a_proxy_says_for_whom_it_asks_and_only_its_own_word_counts() -> None:
    behind, direct = gate(behind_proxy=True), gate()
    invented = asked(x_forwarded_for="203.0.113.5, 198.51.100.9")
    assert behind.peer_of(invented, PEER) == "198.51.100.9"
    assert direct.peer_of(invented, PEER) == PEER
    assert behind.peer_of(asked(), PEER) == PEER
    assert behind.peer_of(asked(x_forwarded_for="unknown"), PEER) == PEER


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("example.com", ""),
        ("", ""),
    ],
)
def test_a_peer_is_an_address_or_a_network_of_ipv6(address: str, name: str) -> None:
    assert peer_name(address) == name


@given(st.lists(st.tuples(st.integers(0, 30), st.floats(0, 5)), max_size=300))
def test_a_bucket_is_never_more_than_its_burst_and_its_rate_allow(steps: list[tuple[int, float]]) -> None:
    limiter = RateLimiter(per_second=2.0, burst=10.0, peers=5)
    now, taken = 0.0, {}  # type: float, dict[int, list[float]]
    for peer, pause_s in steps:
        now += pause_s
        wait_s = limiter.take(str(peer % 3), now)
        if wait_s == 0:
            taken.setdefault(peer % 3, []).append(now)
        else:
            assert 0 < wait_s <= 0.5 + 1e-6
            assert limiter.take(str(peer % 3), now + wait_s + 1e-6) == 0
            now += wait_s + 1e-6
            taken.setdefault(peer % 3, []).append(now)
    for times in taken.values():
        for first, last in itertools.combinations(range(len(times)), 2):
            assert last - first + 1 <= 10 + 2.0 * (times[last] - times[first]) + 1e-3


def test_the_peers_that_are_remembered_are_bounded() -> None:
    limiter = RateLimiter(1.0, 1.0, peers=3)
    for peer in "abcabcabc":
        limiter.take(peer, 0.0)
    assert limiter.take("a", 0.0) > 0
    for peer in "defg":
        assert limiter.take(peer, 0.0) == 0
    assert len(vars(limiter)["_levels"]) == 3
    assert limiter.take("a", 0.0) == 0, "a was forgotten for d to g"
