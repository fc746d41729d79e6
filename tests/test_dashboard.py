"""The dashboard without a terminal: its rows, filters and lines, then every key and view through Textual's pilot."""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING, Any, Final

import pytest
import textual.events
from commands import run_row
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

import fabrik_daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    import textual.app
    import textual.pilot

NOW: Final = time.time()
RUNS: Final = fabrik_daemon.VIEWS["runs"]
MOMENT: Final = fabrik_daemon.Moment(NOW)
HOSTILE: Final = "[bold red]x[/] \x1b[31m\x07\x1b]0;title\x07 \u202egnp.exe\u2066"


def at(seconds_ago: float) -> str:
    """Return a row's time."""
    return fabrik_daemon.format_time(NOW - seconds_ago)


def some_run(number: int, **fields: Any) -> fabrik_daemon.Run:
    """Return a run's row of a minute's age."""
    row = run_row(number, "dev")
    row = row._replace(id=fields.get("run_id", row.id))
    return row._replace(**{"created_at": at(60 + number), "heartbeat_at": at(5), "finished_at": None, **fields})


def cluster(name: str, **fields: Any) -> fabrik_daemon.ClusterView:
    """Return a connected cluster."""
    watch = {"resource": "jobs", "namespace": "fabrik-runs", "state": "watching", "synced_at": at(3), "error": None}
    known = {"server": "https://127.0.0.1:6443", "connected": True, "synced_at": at(3), "last_event_at": at(1)}
    return fabrik_daemon.ClusterView(name, **{**known, "watches": (watch,), **fields})


def all_rows() -> fabrik_daemon.RowsTold:
    """Return a small world: two clusters, one of them away, with a row of everything."""
    runs = [
        some_run(0, run_id="a0", id="a0", status="running", phase="implement", current_task="16:impl", spec_id="cart"),
        some_run(1, run_id="a1", id="a1", status="blocked", phase="human-gate", current_task="17:gate"),
        some_run(2, run_id="b2", id="b2", cluster="prod", status="failed", reason="OOMKilled"),
        some_run(3, run_id="b3", id="b3", cluster="prod", status="finished", finished_at=at(9)),
        some_run(4, run_id="a4", id="a4", status=None, current_task=None),
    ]
    schedule = fabrik_daemon.Schedule(
        "prod", "fabrik-runs", "fabrik-schedule-nightly", "nightly", "0 3 * * *", next_run_at=at(-90), missed=2
    )
    volume = fabrik_daemon.Volume(
        "dev", "fabrik-runs", "data-fabrik-a0", "a0", "Bound", 10 * 2**30, "local-path", at(60)
    )
    warning = fabrik_daemon.ClusterEvent(
        "prod",
        "fabrik-runs",
        "w1",
        "uid",
        "b2",
        "Pod",
        "fabrik-b2-x",
        "BackOff",
        "Back-off restarting",
        5,
        at(60),
        at(6),
    )
    away = cluster("prod", connected=False, synced_at=at(200), error="silent for 70 s", priority=200)
    tables: dict[str, list[Any]] = {
        "runs": runs,
        "schedules": [schedule],
        "volumes": [volume],
        "cluster_events": [warning],
    }
    return fabrik_daemon.RowsTold({**tables, "clusters": [cluster("dev"), away]})


def listing_of(rows: Iterable[fabrik_daemon.Run], **query: Any) -> fabrik_daemon.Listing:
    """Return a list of runs, sorted by age unless told otherwise."""
    field = next(field for field in RUNS.fields if field.title == query.pop("sorted_by", "AGE"))
    asked = fabrik_daemon.Query(field, query.pop("is_reversed", False), **query)
    listing = fabrik_daemon.Listing(RUNS, asked)
    listing.fill({fabrik_daemon.key_of(row): row for row in rows}, asked)
    return listing


def ids(listing: fabrik_daemon.Listing) -> list[str]:
    """Return the ids of a list's rows from top to bottom."""
    return [listing.row_at(index).run_id for index in range(len(listing))]


def text_of(lines: Sequence[fabrik_daemon.Line]) -> str:
    """Return lines as they read."""
    return "\n".join("".join(text for text, _ in line.spans).rstrip() for line in lines)


# Rows and filters -----------------------------------------------------------------------------------------------------


def matching(terms: str) -> set[str]:
    """Return the ids of the small world's runs that a filter lets through."""
    return set(ids(listing_of(all_rows().tables["runs"], terms=fabrik_daemon.parse_terms(terms))))


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ("", {"a0", "a1", "b2", "b3", "a4"}),
        ("status:blocked", {"a1"}),
        ("status:bl", {"a1"}),
        ("status:blocked,failed", {"a1", "b2"}),
        ("status:unknown", {"a4"}),
        ("cluster:prod", {"b2", "b3"}),
        ("cluster:prod status:failed", {"b2"}),
        ("!cluster:prod", {"a0", "a1", "a4"}),
        ("oomkilled", {"b2"}),
        ("OOM", {"b2"}),
        ("!oomkilled cluster:prod", {"b3"}),
        ("1[67]:", {"a0", "a1"}),
        ("16:impl", {"a0"}),
        ("task:16", {"a0"}),
        ("spec:cart", {"a0"}),
        ("^a[01]$", {"a0", "a1"}),
        ("a0 b2", set()),
        ("((", set()),
        ("status:run( ", set()),
        ("nosuch:x", set()),
        ("!((", {"a0", "a1", "b2", "b3", "a4"}),
    ],
)
def test_a_filter_lets_through_what_it_says(terms: str, expected: set[str]) -> None:
    assert matching(terms) == expected


def test_attention_puts_blocked_then_failed_runs_first_whichever_way_they_are_sorted() -> None:
    rows = all_rows().tables["runs"]
    assert ids(listing_of(rows, attention=True))[:2] == ["a1", "b2"]
    assert ids(listing_of(rows, attention=True, is_reversed=True))[:2] == ["a1", "b2"]


@pytest.mark.parametrize("field", RUNS.fields, ids=lambda field: field.title)
def test_every_column_sorts_rows_whatever_is_missing(field: fabrik_daemon.Field) -> None:
    empty = fabrik_daemon.Run("z", "dev", "fabrik-runs")
    rows = [*all_rows().tables["runs"], empty]
    up = ids(listing_of(rows, sorted_by=field.title))
    assert sorted(up) == ["a0", "a1", "a4", "b2", "b3", "z"]
    assert ids(listing_of(rows, sorted_by=field.title, is_reversed=True)) == up[::-1]


changes = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.sampled_from([*fabrik_daemon.STATUSES, None]),
        st.sampled_from(["dev", "prod"]),
        st.booleans(),
    ),
    max_size=40,
)


@given(changes, st.sampled_from([field.title for field in RUNS.fields]), st.booleans(), st.booleans())
def test_a_list_that_takes_changes_one_by_one_equals_one_that_is_filled(
    changes: list[tuple[int, str | None, str, bool]], sorted_by: str, is_reversed: bool, attention: bool
) -> None:
    terms = fabrik_daemon.parse_terms("!cluster:prod,nowhere status:bl,f,run,unknown")
    query = {"sorted_by": sorted_by, "is_reversed": is_reversed, "attention": attention, "terms": terms}
    board, taken = fabrik_daemon.Board(), listing_of([], **query)
    for number, status, where, is_removed in changes:
        row = some_run(number % 5, run_id=f"r{number}", status=status, cluster=where, progress_finished=number)
        board.apply("runs", row, is_removed=is_removed)
        taken.put((row.run_id,), None if is_removed else row)
    rows = board.tables["runs"].values()
    assert ids(taken) == ids(listing_of(rows, **query))
    assert all(taken.index_of(taken.key_at(index)) == index for index in range(len(taken)))
    for status in (*fabrik_daemon.STATUSES, fabrik_daemon.UNKNOWN):
        assert board.count(status=status) == sum(fabrik_daemon.shown_status(row) == status for row in rows)


def test_the_cursor_and_what_is_seen_stay_with_their_rows() -> None:
    page = fabrik_daemon.ListPage(RUNS)
    rows: dict[tuple[str, ...], Any] = {(f"r{number}",): some_run(number, run_id=f"r{number}") for number in range(100)}
    page.fill(rows, "", attention=False)
    page.move(50, 20)
    chosen, top = page.selected.run_id, page.top
    for number in range(3):
        page.put((f"new{number}",), some_run(0, run_id=f"new{number}", created_at=at(0)))
    assert (page.selected.run_id, page.index, page.top) == (chosen, 53, top + 3)
    page.put((chosen,), None)
    assert page.index == 53
    page.move(-1000, 20)
    page.put(("newest",), some_run(0, run_id="newest", created_at=at(-9)))
    assert page.selected.run_id == "newest", "at the first row it stays at the first"


# Lines ----------------------------------------------------------------------------------------------------------------


@given(st.text(max_size=40), st.integers(0, 50), st.booleans())
def test_a_text_is_fitted_into_exactly_so_many_cells(text: str, width: int, right: bool) -> None:
    safe = fabrik_daemon.safe_text(text)
    assert cell_len(fabrik_daemon.fit(safe, width, right=right)) == width


@pytest.mark.parametrize(
    ("finished", "total"), [(0, 48), (47, 48), (48, 48), (60, 48), (1, 0), (0, 0), (10**18, 10**18)]
)
@pytest.mark.parametrize("width", [8, 10, 18, 44])
def test_a_progress_bar_is_as_wide_as_its_column_and_full_only_at_the_end(
    finished: int, total: int, width: int
) -> None:
    row = some_run(0, progress_finished=finished, progress_total=total)
    spans = fabrik_daemon.progress_bar(row, width, 7)
    text = "".join(text for text, _ in spans)
    assert len(text) == width
    assert "─" in text or finished >= total or width < 11


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 200, 500])
@pytest.mark.parametrize("name", sorted(fabrik_daemon.VIEWS))
@pytest.mark.parametrize("is_wide", [False, True])
def test_no_line_of_a_list_is_wider_than_the_screen(width: int, name: str, is_wide: bool) -> None:
    desk = fabrik_daemon.Desk()
    desk.take(all_rows())
    page = desk.lists[name]
    page.is_wide = is_wide
    lines = page.draw(width, 20, desk.moment(NOW))
    assert len(lines) > 1
    for line in lines:
        assert sum(cell_len(text) for text, _ in line.spans) <= max(width, 3), text_of([line])


def test_at_80_columns_all_that_matters_of_a_run_is_seen() -> None:
    desk = fabrik_daemon.Desk()
    desk.take(all_rows())
    heading, *lines = text_of(desk.lists["runs"].draw(80, 20, desk.moment(NOW))).splitlines()
    titles = ["RUN", "CLUSTER", "STATUS", "PHASE", "TASK", "PROGRESS", "BEAT", "AGE"]
    assert [title.rstrip("↓") for title in heading.split()][:8] == titles
    assert re.match(r" a0 +dev +● running +implement +16:impl +[━─]*.* 0/192 +5s +60s", lines[0])


def test_timelines_tell_what_happened_and_when() -> None:
    events = [
        {"event_type": "status_changed", "payload": {"from": None, "to": "pending"}, "cluster_timestamp": at(90)},
        {"event_type": "status_changed", "payload": {"from": "pending", "to": "running"}, "cluster_timestamp": at(80)},
        {
            "event_type": "task_completed",
            "payload": {"task": "1:scan", "finished": 1, "total": 9},
            "cluster_timestamp": at(50),
        },
        {"event_type": "status_changed", "payload": {"from": "running", "to": "blocked"}, "cluster_timestamp": at(40)},
        {"event_type": "blocked", "payload": {"phase": "human-gate", "task": "2:gate"}, "cluster_timestamp": at(40)},
        {"event_type": "log_line", "payload": {"line": "the last words"}, "cluster_timestamp": at(30)},
        {"event_type": "status_changed", "payload": None, "cluster_timestamp": None, "local_timestamp": at(20)},
    ]
    row = some_run(0, status="blocked", current_task="2:gate", task_attempt=3)
    text = text_of(fabrik_daemon.run_lines(row, {"events": events}, 100, MOMENT))
    assert re.search(
        r"○ pending\n.*\+10s +● running\n.*\+30s +│ 1:scan done  1/9\n.*\+10s +◆ blocked  human-gate", text
    )
    assert re.search(r"▸ 2:gate  attempt 3  now", text)
    assert text.endswith("LAST LOG LINES\n   the last words")


@pytest.mark.parametrize("make", ["run", "describe", "yaml", "list", "log"])
def test_text_from_a_cluster_is_never_markup_and_never_steers_the_terminal(make: str) -> None:
    names = ("current_task", "spec_id", "reason", "namespace", "pod_name", "project")
    row = some_run(0, run_id="r", **dict.fromkeys(names, HOSTILE))
    events = [{"event_type": "log_line", "payload": {"line": HOSTILE}}]
    if make == "run":
        lines = fabrik_daemon.run_lines(row, {"events": events}, 300, MOMENT)
    elif make == "describe":
        lines = fabrik_daemon.describe_lines(row, 300, MOMENT)
    elif make == "yaml":
        lines = fabrik_daemon.yaml_lines(row, 300)
    elif make == "list":
        page = fabrik_daemon.ListPage(RUNS)
        page.fill({("r",): row}, "", attention=False)
        lines = page.draw(300, 20, MOMENT)
    else:
        log = fabrik_daemon.LogPage(row)
        log.add([(at(1), HOSTILE)], "somewhere")
        lines = log.draw(300, 20, MOMENT)
    text = text_of(lines)
    assert "[bold red]x[/]" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2066]", text)
    strips = [fabrik_daemon.Painter("dark").paint(line, 300) for line in lines]
    assert "[bold red]x[/]" in "\n".join(strip.text for strip in strips)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-256color"}, "dark"),
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, "dark"),
        ({"TERM": "xterm-256color", "COLORFGBG": "0;15"}, "light"),
        ({"TERM": "xterm-256color", "COLORFGBG": "15;default;0"}, "dark"),
        ({"TERM": "xterm"}, "ansi"),
        ({"TERM": "linux"}, "ansi"),
        ({"TERM": "vt100"}, "plain"),
        ({"TERM": "xterm-mono"}, "plain"),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, "plain"),
        ({"TERM": "xterm-256color", "NO_COLOR": ""}, "dark"),
    ],
)
def test_colours_suit_the_terminal(environment: dict[str, str], expected: str) -> None:
    assert fabrik_daemon.palette_for("auto", environment) == expected
    assert fabrik_daemon.palette_for("light", environment) == ("plain" if environment.get("NO_COLOR") else "light")


def test_palettes_keep_to_what_they_promise() -> None:
    roles = ("", "dim", "key", "selected", "notice", "brand", "match", "chosen", *fabrik_daemon.STATUS_MARKS)
    for role in roles:
        for base in ("", "selected", "bar", "away"):
            plain = fabrik_daemon.style_of("plain", role, base)
            assert (plain.color, plain.bgcolor) == (None, None)
            ansi = fabrik_daemon.style_of("ansi", role, base)
            assert all(colour is None or (colour.number or 0) < 16 for colour in (ansi.color, ansi.bgcolor))
            for palette in ("dark", "light"):
                style = fabrik_daemon.style_of(palette, role, base)
                assert contrast(style) > (2.6 if role == "dim" or base == "away" else 3.0), (palette, role, base)


def contrast(style: Any) -> float:
    """Return the contrast of a text with its background (WCAG 2.1)."""

    def luminance(colour: Any) -> float:
        parts = [part / 255 for part in colour.triplet]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])

    bright, dark = sorted((luminance(style.color), luminance(style.bgcolor)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


# Keys and views -------------------------------------------------------------------------------------------------------


class ToldFeed:
    """Stands in for the feed: tells what a test says, and notes what it is asked."""

    def __init__(self, tell: Callable[[Any], None]) -> None:
        self.tell = tell
        self.asked: list[str] = []
        self.log = ""
        self.clusters_every_ticks = 1
        self.calls: list[str] = []

    def start(self) -> None:
        """Tell the small world."""
        self.tell(all_rows())
        self.tell(fabrik_daemon.SourceTold("live", is_live=True))

    def close(self) -> None:
        """Note it."""
        self.calls.append("close")

    def ask_details(self, run_id: str) -> None:
        """Note whose, and tell something."""
        self.asked.append(run_id)
        event = {"event_type": "status_changed", "payload": {"to": "running"}, "cluster_timestamp": at(30)}
        self.tell(fabrik_daemon.DetailsTold(run_id, {"events": [event]}))

    def ask_clusters(self) -> None:
        """Note it."""
        self.calls.append("clusters")

    def follow_log(self, run_id: str) -> None:
        """Note whose log is followed."""
        self.log = run_id


class Shown:
    """The dashboard under Textual's pilot."""

    def __init__(self, app: textual.app.App[int], pilot: textual.pilot.Pilot[int], desk: Any, feed: ToldFeed) -> None:
        self.app = app
        self.pilot = pilot
        self.desk = desk
        self.feed = feed

    @property
    def lines(self) -> list[str]:
        """What stands on the screen, as far as it is drawn by the dashboard's own widgets."""
        lines = []
        for widget in sorted(self.app.query("#above, Rows, #below"), key=lambda widget: widget.region.y):
            lines += [widget.render_line(y).text.rstrip() for y in range(widget.size.height)]
        return lines

    @property
    def text(self) -> str:
        """The same, as one text."""
        return "\n".join(self.lines)

    @property
    def ids(self) -> list[str]:
        """The ids in the list that is seen."""
        return [match[1] for line in self.lines[4:-1] if (match := re.match(r"[ ▌]([ab]\d+)\b", line))]

    @property
    def selected(self) -> str:
        """The run under the cursor."""
        return str(self.desk.listed.selected.run_id)

    async def press(self, *keys: str) -> str:
        """Press keys; return what stands there then."""
        for key in keys:
            await self.pilot.press(key)
        await self.pilot.pause()
        return self.text

    async def type(self, text: str) -> str:
        """Type a text."""
        names = {" ": "space", ":": "colon", "/": "slash", "@": "at", "!": "exclamation_mark", "-": "minus"}
        return await self.press(*(names.get(char, char) for char in text))

    async def tell(self, *messages: Any) -> str:
        """Have the feed tell something; return what stands there then."""
        for message in messages:
            self.feed.tell(message)
        await self.pilot.pause()
        self.app.draw()  # type: ignore[attr-defined]
        await self.pilot.pause()
        return self.text


def on_screen(
    test: Callable[[Shown], Coroutine[Any, Any, None]],
    *,
    size: tuple[int, int] = (100, 30),
    palette: str = "dark",
    has_bell: bool = False,
) -> None:
    """Run a test on a dashboard that shows the small world."""

    async def run() -> None:
        desk = fabrik_daemon.Desk()
        desk.has_bell = has_bell
        feeds: list[ToldFeed] = []

        def make_feed(tell: Callable[[Any], None]) -> Any:
            feeds.append(ToldFeed(tell))
            return feeds[0]

        app = fabrik_daemon.make_dashboard(desk, make_feed, fabrik_daemon.DashboardOptions(palette))
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            shown = Shown(app, pilot, desk, feeds[0])
            await shown.press("f")  # whatever it says: what was told has been taken by then
            desk.say("")
            await shown.tell()
            await test(shown)
        assert feeds[0].calls[-1] == "close"

    asyncio.run(run())


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
def test_the_first_screen(size: tuple[int, int]) -> None:
    async def test(shown: Shown) -> None:
        assert len(shown.lines) == size[1]
        assert re.match(r" fabrik  runs 5 +● live$", shown.lines[0])
        assert shown.lines[1] == " ● 1 running  ◆ 1 blocked  ✗ 1 failed  ✓ 1 finished  ? 1 unknown"
        assert re.match(r" 0 all 5   1 dev 3   2 prod 2 ⚠ \d+m\d*s? old", shown.lines[2])
        assert " ".join(shown.lines[3].split()).startswith("RUN CLUSTER STATUS PHASE")
        assert shown.ids == ["a0", "a1", "b2", "b3", "a4"]
        assert re.search(r"^▌a1 .*◆ blocked", shown.text, re.MULTILINE)
        assert re.search(r"prod \(\d+m", shown.text)
        assert "Enter open" in shown.lines[-1]
        assert "q quit" in shown.lines[-1]

    on_screen(test, size=size)


def test_up_and_down() -> None:
    async def test(shown: Shown) -> None:
        for keys, expected in (
            ("j", "a1"),
            ("down", "b2"),
            ("k", "a1"),
            ("up", "a0"),
            ("up", "a0"),
            ("G", "a4"),
            ("down", "a4"),
            ("g g", "a0"),
            ("end", "a4"),
            ("home", "a0"),
            ("pagedown", "a4"),
            ("pageup", "a0"),
            ("space", "a4"),
            ("ctrl+b", "a0"),
            ("ctrl+f", "a4"),
            ("ctrl+u", "a0"),
            ("ctrl+d", "a4"),
        ):
            await shown.press(*keys.split())
            assert shown.selected == expected, keys

    on_screen(test)


@pytest.mark.parametrize("key", ["enter", "right"])
def test_a_run_is_opened_and_left(key: str) -> None:
    async def test(shown: Shown) -> None:
        text = await shown.press("j", "j", key)
        assert "runs > run b2" in text
        assert "✗ failed  OOMKilled" in text
        assert re.search(r"as of \d+m", text)
        assert "TIMELINE" in await shown.tell()
        assert shown.feed.asked == ["b2"]
        for back in ("escape", "h", "left"):
            await shown.press(back)
            assert "runs > run" not in shown.text
            assert shown.selected == "b2", "the cursor is where it was"
            await shown.press(key)

    on_screen(test)


def test_an_open_run_is_live() -> None:
    async def test(shown: Shown) -> None:
        await shown.press("enter")
        assert "0/192" in shown.text
        row = all_rows().tables["runs"][0]._replace(progress_finished=96, current_task="17:test")
        text = await shown.tell(fabrik_daemon.ChangeTold("runs", row))
        assert "96/192" in text
        assert "17:test" in text
        assert shown.feed.asked == ["a0", "a0"], "its history is asked for anew"

    on_screen(test)


def test_views() -> None:
    async def test(shown: Shown) -> None:
        for keys, title, row in (
            ("g s", "schedules 1", r"nightly +prod .*0 3 .* (in \d+s|now)"),
            ("g v", "storage 1", r"data-fabrik-a0 +dev +Bound +10Gi"),
            ("g w", "warnings 1", r"5 +prod.* BackOff +pod/fabrik-b2-x +Back-off restarting"),
            ("g c", "clusters 2", r"prod +○ away \d+m\d*s? .*silent for 70 s"),
            ("g r", "runs 5", r"a0 +dev +● running"),
        ):
            text = await shown.press(*keys.split())
            assert f" {title} " in shown.lines[0], keys
            assert re.search(row, text), keys
            assert "g …" not in shown.lines[-1]
            assert "g …" in await shown.press("g"), "the keys that may follow are shown"
            await shown.press("x")

    on_screen(test)


def test_logs_follow_search_and_times() -> None:
    async def test(shown: Shown) -> None:
        for opened in ("l", "g l"):
            text = await shown.press(*opened.split())
            assert "logs of a0" in text
            assert shown.feed.log == "a0"
            await shown.press("escape")
            assert shown.feed.log == "", "nothing is followed that is not seen"
        await shown.press("l")
        lines = [(at(100 - number), f"line {number}") for number in range(100)]
        text = await shown.tell(fabrik_daemon.LogTold("a0", lines, "from its Pod"))
        assert "from its Pod, followed" in text
        assert "line 99" in text
        assert "line 9\n" not in text
        assert "line 100" in await shown.tell(fabrik_daemon.LogTold("a0", [(at(0), "line 100")], "from its Pod"))
        await shown.press("g", "g")
        assert "line 0" in shown.text
        assert "followed" not in shown.lines[3]
        assert "line 101" not in await shown.tell(fabrik_daemon.LogTold("a0", [(at(0), "line 101")], "from its Pod"))
        assert "line 101" in await shown.press("f")
        clock = fabrik_daemon.clock_time(at(100))
        await shown.press("g", "g", "t")
        assert f"\n {clock} line 0" in shown.text
        await shown.press("slash")
        await shown.type("line 5")
        await shown.press("enter")
        assert "line 5" in shown.lines[4]
        assert "line 50" in (await shown.press("n"), shown.lines[4])[1]
        assert "line 51" in (await shown.press("n"), shown.lines[4])[1]
        assert "line 50" in (await shown.press("N"), shown.lines[4])[1]

    on_screen(test, size=(80, 24))


def test_describe_yaml_and_help() -> None:
    async def test(shown: Shown) -> None:
        assert re.search(r"current_task +16:impl", await shown.press("d"))
        assert re.search(r"current_task: 16:impl", await shown.press("y"))
        await shown.press("escape", "escape", "g", "c", "j")
        assert re.search(
            r"error +silent for 70 s[\s\S]*WATCHES[\s\S]*jobs in fabrik-runs +watching", await shown.press("enter")
        )
        text = await shown.press("?")
        assert "no key changes a cluster" in text or "blocked and failed runs first" in text
        shown_keys = text_of(fabrik_daemon.help_lines(100))
        for key in fabrik_daemon.KEYS:
            assert key.words in shown_keys, key
        assert "clusters 2" in await shown.press("escape", "escape")

    on_screen(test)


def test_the_filter_is_live() -> None:
    async def test(shown: Shown) -> None:
        await shown.press("slash")
        await shown.type("status:b")
        assert shown.ids == ["a1"]
        await shown.press("backspace")
        assert len(shown.ids) == 5, "status: alone asks for nothing"
        await shown.type("fail")
        assert shown.ids == ["b2"]
        await shown.press("enter")
        assert shown.ids == ["b2"]
        assert "runs 1 of 5  /status:fail" in shown.lines[0]
        await shown.tell(fabrik_daemon.ChangeTold("runs", some_run(7, run_id="a7", status="failed")))
        assert shown.ids == ["b2", "a7"]
        await shown.press("escape")
        assert len(shown.ids) == 6
        await shown.press("slash")
        await shown.type("!a cluster:dev")
        assert "no runs like that" in shown.text
        await shown.press("escape")
        assert len(shown.ids) == 6

    on_screen(test)


def test_a_filter_is_completed() -> None:
    async def test(shown: Shown) -> None:
        await shown.press("slash")
        await shown.type("sta")
        await shown.press("tab")
        await shown.type("blo")
        await shown.press("tab")
        assert shown.desk.listed.filter == "status:blocked"
        await shown.type(" cluster:p")
        await shown.press("tab", "enter")
        assert shown.desk.listed.filter == "status:blocked cluster:prod"

    on_screen(test)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("clusters", "clusters 2"),
        ("storage", "storage 1"),
        ("volumes", "storage 1"),
        ("schedules @prod", "schedules 1"),
        ("schedules @dev", "no schedules"),
        ("runs @prod", "runs 2 of 5"),
        ("runs status:blocked", "runs 1 of 5  /status:blocked"),
        ("run a1", "runs > run a1"),
        ("logs b2", "logs of b2"),
        ("logs", "logs of a0"),
        ("run nosuch", "no runs begin with 'nosuch'"),
        ("run a", "3 runs begin with 'a'"),
        ("sort cluster", "CLUSTER↑"),
        ("sort nosuch", "sort by run, cluster"),
        ("cluster prod", "runs 2 of 5"),
        ("cluster nosuch", "no cluster 'nosuch'"),
        ("filter !dev", "runs 2 of 5  /!dev"),
        ("attention", "▌attention"),
        ("theme nosuch", "themes are dark, light"),
        ("help", "half a page down"),
        ("rnus", "no command 'rnus': did you mean 'runs'"),
        ("", "runs 5"),
    ],
)
def test_commands(command: str, expected: str) -> None:
    async def test(shown: Shown) -> None:
        await shown.press("colon")
        await shown.type(command)
        assert expected in await shown.press("enter")

    on_screen(test)


def test_commands_are_completed() -> None:
    async def test(shown: Shown) -> None:
        await shown.press("colon")
        assert "clusters  cluster" in await shown.type("cl"), "what it may become is shown"
        await shown.press("tab", "space")
        await shown.type("@p")
        assert "clusters @prod" in await shown.press("tab")
        await shown.press("enter")
        assert shown.desk.cluster == "prod"
        await shown.press("colon", "escape")
        assert "g …" in await shown.press("g"), "keys mean keys again"

    on_screen(test)


def test_keys_in_one_burst_reach_the_prompt() -> None:
    async def test(shown: Shown) -> None:
        for key in ("/", *"status:blocked"):
            shown.app.post_message(textual.events.Key(key, key))
        await shown.pilot.pause()
        await shown.tell()
        assert shown.desk.listed.filter == "status:blocked"

    on_screen(test)


def test_clusters_are_chosen() -> None:
    async def test(shown: Shown) -> None:
        for keys, expected in (
            ("tab", "a0 a1 a4"),
            ("tab", "b2 b3"),
            ("tab", "a0 a1 b2 b3 a4"),
            ("2", "b2 b3"),
            ("1", "a0 a1 a4"),
            ("9", "a0 a1 a4"),
            ("0", "a0 a1 b2 b3 a4"),
            ("1 escape", "a0 a1 b2 b3 a4"),
        ):
            await shown.press(*keys.split())
            assert shown.ids == expected.split(), keys
        await shown.press("2")
        assert shown.lines[1] == " ✗ 1 failed  ✓ 1 finished", "the counts are of what is seen"

    on_screen(test)


def test_attention_and_sorting() -> None:
    async def test(shown: Shown) -> None:
        assert "blocked and failed runs first" in await shown.press("a")
        assert shown.ids[:2] == ["a1", "b2"]
        await shown.press("a")
        assert shown.ids == ["a0", "a1", "b2", "b3", "a4"]
        await shown.press("S")
        assert shown.ids == ["a4", "b3", "b2", "a1", "a0"]
        seen = set()
        for _ in RUNS.fields:
            await shown.press("s")
            heading = shown.lines[3]
            seen |= set(re.findall(r"(\w+)[↑↓]", heading))
        assert {"RUN", "CLUSTER", "STATUS", "TASK", "PROGRESS", "AGE"} <= seen
        await shown.press("colon")
        await shown.type("sort status")
        await shown.press("enter")
        assert shown.ids == ["a1", "b2", "b3", "a0", "a4"]

    on_screen(test)


def test_wide_shows_all_columns() -> None:
    async def test(shown: Shown) -> None:
        assert "NAMESPACE" not in shown.lines[3]
        await shown.press("w")
        assert re.search("SPEC +PROJECT +TEMPLATE +NAMESPACE", shown.lines[3])
        await shown.press("w")
        assert "NAMESPACE" not in shown.lines[3]

    on_screen(test, size=(200, 60))


def test_how_clusters_are_is_asked_for_as_long_as_a_daemon_answers() -> None:
    async def test(shown: Shown) -> None:
        await shown.pilot.pause(1.2)
        assert "clusters" in shown.feed.calls
        await shown.tell(fabrik_daemon.SourceTold("no daemon: the cache"))
        shown.feed.calls.clear()
        await shown.pilot.pause(1.2)
        assert shown.feed.calls == []

    on_screen(test)


def test_an_id_is_copied() -> None:
    async def test(shown: Shown) -> None:
        assert "copied a1" in await shown.press("j", "c")
        assert shown.app.clipboard == "a1"
        await shown.press("g", "v", "c")
        assert shown.app.clipboard == "data-fabrik-a0"

    on_screen(test)


def test_the_bell_rings_at_a_new_human_gate_if_it_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(shown: Shown) -> None:
        rung: list[int] = []
        monkeypatch.setattr(shown.app, "bell", lambda: rung.append(1))
        gate = some_run(0, run_id="a0", status="blocked")
        text = await shown.tell(fabrik_daemon.ChangeTold("runs", gate))
        assert "waiting at a human gate: a0" in text
        assert rung == []
        assert "is on" in await shown.press("b")
        await shown.tell(fabrik_daemon.ChangeTold("runs", gate._replace(updated_at=at(0))))
        assert rung == [], "it waited already"
        await shown.tell(fabrik_daemon.ChangeTold("runs", some_run(9, run_id="a9", status="blocked")))
        assert rung == [1]
        rows = {"runs": [*all_rows().tables["runs"], some_run(8, run_id="a8", status="blocked")]}
        await shown.tell(fabrik_daemon.RowsTold(rows))
        assert rung == [1, 1], "one that came while no daemon answered rings too"
        assert "is off" in await shown.press("b")

    on_screen(test)


@pytest.mark.parametrize("palette", fabrik_daemon.PALETTES)
def test_themes(palette: str) -> None:
    async def test(shown: Shown) -> None:
        assert shown.ids == ["a0", "a1", "b2", "b3", "a4"]
        row = shown.app.query_one("Rows").render_line(2)
        colours = {segment.style.color.name for segment in row if segment.style and segment.style.color}
        assert bool(colours) == (palette != "plain")
        await shown.press("T")
        assert shown.app.theme == ("fabrik-light" if palette == "dark" else "fabrik-dark")
        await shown.press("colon")
        await shown.type("theme ansi")
        await shown.press("enter")
        assert shown.app.theme == "ansi-dark"

    on_screen(test, palette=palette)


def test_the_mouse() -> None:
    async def test(shown: Shown) -> None:
        await shown.pilot.click("Rows", offset=(5, 3))
        assert shown.selected == "b2"
        await shown.pilot.click("Rows", offset=(shown.lines[3].index("STATUS"), 0))
        await shown.tell()
        assert shown.ids == ["a1", "b2", "b3", "a0", "a4"]
        await shown.pilot.click("#above", offset=(shown.lines[2].index("prod"), 2))
        await shown.tell()
        assert shown.ids == ["b2", "b3"]
        await shown.pilot.click("#above", offset=(2, 2))
        await shown.pilot.click("#above", offset=(shown.lines[1].index("blocked"), 1))
        await shown.tell()
        assert shown.ids == ["a1"]
        await shown.pilot.click("Rows", offset=(5, 1), times=2)
        assert "runs > run a1" in await shown.tell()
        await shown.pilot.click("#above", offset=(2, 0))
        assert "runs 1 of 5" in await shown.tell()

    on_screen(test)


def test_ten_thousand_rows_are_drawn_only_where_they_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(shown: Shown) -> None:
        rows = [run_row(number) for number in range(10_000)]
        await shown.tell(fabrik_daemon.RowsTold({"runs": rows}))
        drawn: list[int] = []
        row_at = fabrik_daemon.Listing.row_at

        def note_row_at(listing: fabrik_daemon.Listing, index: int) -> Any:
            drawn.append(index)
            return row_at(listing, index)

        monkeypatch.setattr(fabrik_daemon.Listing, "row_at", note_row_at)
        began = time.perf_counter()
        for key in ("pagedown", "G", "home", "j"):
            drawn.clear()
            await shown.press(key)
            assert len(drawn) < 200
        await shown.tell(fabrik_daemon.ChangeTold("runs", rows[-1]._replace(status="failed", reason="Planted")))
        assert "Planted" in shown.text
        assert time.perf_counter() - began < 10
        await shown.press("slash")
        assert "runs 1 of 10000" in await shown.type("planted")

    on_screen(test, size=(120, 50))


def test_scrolling_moves_what_is_seen_and_not_the_cursor() -> None:
    async def test(shown: Shown) -> None:
        rows = [some_run(number, run_id=f"a{number}") for number in range(200)]
        await shown.tell(fabrik_daemon.RowsTold({"runs": rows}))
        for _ in range(5):
            shown.app.query_one("Rows").post_message(mouse_scroll(shown.app.query_one("Rows")))
        await shown.tell()
        assert "a0" not in shown.ids
        assert shown.selected == "a0"
        await shown.press("j")
        assert shown.ids[0] == shown.selected == "a1", "the next key brings the cursor back into sight"

    on_screen(test, size=(80, 24))


def mouse_scroll(widget: Any) -> Any:
    """Return what a turn of the wheel sends."""
    return textual.events.MouseScrollDown(
        widget, 5, 5, 0, 1, 0, shift=False, meta=False, ctrl=False, screen_x=5, screen_y=9
    )


def test_a_resize_is_followed() -> None:
    async def test(shown: Shown) -> None:
        await shown.pilot.resize_terminal(60, 12)
        await shown.tell()
        assert len(shown.lines) == 12
        assert max(map(len, shown.lines)) <= 60
        await shown.pilot.resize_terminal(240, 70)
        await shown.tell()
        assert len(shown.lines) == 70
        assert "REASON" in shown.lines[3]
        for size in ((20, 5), (5, 3), (1, 1), (100, 30)):
            await shown.pilot.resize_terminal(*size)
            await shown.tell()
        assert shown.ids == ["a0", "a1", "b2", "b3", "a4"]

    on_screen(test, size=(80, 24))


def test_where_rows_come_from_is_always_said() -> None:
    async def test(shown: Shown) -> None:
        text = await shown.tell(
            fabrik_daemon.SourceTold("no daemon: the cache"), fabrik_daemon.NoticeTold("the daemon has ended")
        )
        assert "○ no daemon: the cache" in shown.lines[0]
        assert "the daemon has ended" in text
        assert shown.ids == ["a0", "a1", "b2", "b3", "a4"], "what was known is still shown"
        await shown.tell(fabrik_daemon.SourceTold("live", is_live=True))
        assert "● live" in shown.lines[0]

    on_screen(test)


@pytest.mark.parametrize("key", ["q", "ctrl+c", "ctrl+q"])
def test_it_is_left(key: str) -> None:
    async def test(shown: Shown) -> None:
        await shown.press(key)
        assert shown.app.return_code == 0
        assert shown.app.return_value in {0, None}

    on_screen(test)
