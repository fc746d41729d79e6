"""Defects to plant into the daemon: the simulation must catch each of them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Callable, Final

import fabrik_daemon
from simulation.wiring import replacing

if TYPE_CHECKING:
    from collections.abc import Iterator

Replaced = list[tuple[object, str, object]]


def dropped_bookmark() -> Replaced:
    """A bookmark's version is not kept."""
    return [(fabrik_daemon.Follower, "on_bookmark", lambda _follower, _scope, _version: None)]


def unordered_version() -> Replaced:
    """The version of an initial list's synthetic ADDED is taken for how far it got."""
    real = fabrik_daemon.WatchMachine.on_event

    def on_event(machine: Any, event: Any, now: float) -> Any:
        if machine._request.initial and event.type == "ADDED":
            machine._position.advance(event.resource_version)
        return real(machine, event, now)

    return [(fabrik_daemon.WatchMachine, "on_event", on_event)]


def missing_delete() -> Replaced:
    """A relist does not tell of what vanished meanwhile."""
    real = fabrik_daemon.Store._bury

    def bury(store: Any, draft: Any, key: Any, facts: Any, how: str) -> None:
        if how != fabrik_daemon.VANISHED:
            real(store, draft, key, facts, how)

    return [(fabrik_daemon.Store, "_bury", bury)]


def ignored_delete() -> Replaced:
    """A DELETED event does nothing."""

    real = fabrik_daemon.Store.observe

    def observe(store: Any, progress: Any, seen: Any, now: float) -> Any:
        return real(store, progress, [one for one in seen if not one.deleted], now)

    return [(fabrik_daemon.Store, "observe", observe)]


def version_first() -> Replaced:
    """The version is committed before the rows that it stands for."""
    real = fabrik_daemon.Follower.take

    def take(follower: Any, commit: Any, *also: Any) -> None:
        if commit.progress is not None:
            follower._cache.put([fabrik_daemon._progress_statement(commit.progress)])
        real(follower, commit, *also)

    return [(fabrik_daemon.Follower, "take", take)]


def old_page() -> Replaced:
    """What a list that broke off had brought is kept for the next one."""
    real = fabrik_daemon.Watcher._get
    return [(fabrik_daemon.Watcher, "_get", lambda watcher, get: real(watcher, get._replace(first_page=False)))]


def expired_is_an_end() -> Replaced:
    """A 410 is taken for a watch's clean end."""
    return [(fabrik_daemon.WatchMachine, "_expired", lambda machine, now: machine._watch(now))]


def resumed_from_zero() -> Replaced:
    """A watch goes on from version 0: what is there comes again, what was deleted does not."""
    real = fabrik_daemon._Position.watch_query

    def watch_query(position: Any, seconds: float, *, streams_list: bool) -> dict[str, str]:
        query = real(position, seconds, streams_list=streams_list)
        return {**query, "resourceVersion": "0"} if not streams_list else query

    return [(fabrik_daemon._Position, "watch_query", watch_query)]


def ignored_uid() -> Replaced:
    """Another cluster behind the name goes unnoticed."""
    real = fabrik_daemon.Cluster._on_identity

    def on_identity(cluster: Any, uid: str | None) -> None:
        real(cluster, None if cluster.uid else uid)

    return [(fabrik_daemon.Cluster, "_on_identity", on_identity)]


def deaf_to_silence() -> Replaced:
    """A watch that falls silent is waited for, without end."""
    real = fabrik_daemon.WatchMachine.due

    def due(machine: Any, now: float) -> Any:
        if machine.state == fabrik_daemon.WATCHING and machine._request.is_open and now >= machine._due_at:
            machine._due_at = now + 600
            return []
        return real(machine, now)

    return [(fabrik_daemon.WatchMachine, "due", due)]


def reissued_seq() -> Replaced:
    """A crash gives the same numbers out again."""
    real = fabrik_daemon.Tables.load

    def load(tables: Any, rows: Any, reserved_seq: int) -> None:
        real(tables, rows, max(0, reserved_seq - fabrik_daemon.SEQ_BLOCK))

    return [(fabrik_daemon.Tables, "load", load)]


def older_uid() -> Replaced:
    """The end of an object's predecessor ends the object."""
    real = fabrik_daemon.RunBook._holds
    return [(fabrik_daemon.RunBook, "_holds", staticmethod(lambda before, job: real(before, job) or job is not None))]


def cut_off_is_whole() -> Replaced:
    """A list that breaks off counts as whole."""
    real = fabrik_daemon.Watcher._process

    def process(watcher: Any, codec: Any, data: bytes) -> Iterator[None]:
        if not data and not watcher._reader.is_watch and not watcher._reader.is_refused:
            watcher._hang_up()
            watcher._do(watcher._machine.on_page(watcher._reader.list.resource_version, "", watcher._reactor.now()))
            return iter(())
        return real(watcher, codec, data)

    return [(fabrik_daemon.Watcher, "_process", process)]


def forgotten_crash() -> Replaced:
    """Who was told what a crash took along is not told that it is void."""
    real = fabrik_daemon.Bus.__init__

    def begin(bus: Any, past: Any, rows: Any, held: Any) -> None:
        real(bus, past._replace(lost=()), rows, held)

    return [(fabrik_daemon.Bus, "__init__", begin)]


def forgotten_before() -> Replaced:
    """The cache does not keep what a row was before a change: who comes back never hears that one left."""
    return [(fabrik_daemon, "_before_text", lambda _change: None)]


def gap_after_cache() -> Replaced:
    """Who was given what only the cache holds goes on live, past what memory holds."""
    return [(fabrik_daemon.Bus, "_after", lambda _bus, _wanted, _seq: iter(()))]


def repeat_after_cache() -> Replaced:
    """What memory holds is told from its beginning to one whom the cache told some of it."""
    real = fabrik_daemon.Bus._after
    return [(fabrik_daemon.Bus, "_after", lambda bus, wanted, seq: real(bus, wanted, min(seq, bus._history_after)))]


def snapshot_too_new() -> Replaced:
    """A snapshot is of the moment when it is read, while what follows begins earlier."""
    real = fabrik_daemon.Bus._snapshot

    def snapshot(bus: Any, wanted: Any) -> Iterator[bytes]:
        yield from real(bus, wanted)

    return [(fabrik_daemon.Bus, "_snapshot", snapshot)]


def silent_loss() -> Replaced:
    """What a subscriber did not read is dropped, and nobody says so."""

    def lag(subscription: Any, _dropped: int | None) -> None:
        subscription._queue.clear()

    return [(fabrik_daemon.Subscription, "lag", lag)]


PLANTS: Final[dict[str, Callable[[], Replaced]]] = {
    plant.__name__.replace("_", "-"): plant
    for plant in (
        *(dropped_bookmark, unordered_version, missing_delete, ignored_delete, version_first, old_page),
        *(expired_is_an_end, resumed_from_zero, ignored_uid, deaf_to_silence),
        *(reissued_seq, older_uid, cut_off_is_whole),
        *(forgotten_crash, forgotten_before, gap_after_cache, repeat_after_cache, snapshot_too_new, silent_loss),
    )
}


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """Plant a defect."""
    with replacing(PLANTS[name]()):
        yield
