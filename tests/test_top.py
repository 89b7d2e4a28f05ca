"""`laxity top`: what is drawn of a cluster, compared with files, and what its keys do.

The files under snapshots/ are written anew by ``LAXITY_SNAPSHOTS=update pytest tests/test_top.py``.
"""

from __future__ import annotations

import asyncio
import html
import os
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from live_views import AT, cluster, many, pipelines
from textual.pilot import Pilot
from textual.widgets import ContentSwitcher

from cli.live.follow import live_views
from cli.live.view import LivePipeline, LiveView
from cli.main import main
from cli.top.app import Top
from cli.top.cells import chart, clean, count, duration, middle, percent, plain, rate, sparkline
from cli.top.command import StoredNodes
from cli.top.details import NodeDetail, PipelineDetail
from cli.top.listing import fit
from cli.top.listings import DROPS, NODES, PIPELINES, STAGES
from cli.top.table import LiveTable
from cluster.records import (
    CoordinatorRecord,
    DevicePlacement,
    DeviceRecord,
    DrainRecord,
    LeaderRecord,
    NodeRecord,
    NodeStateRecord,
    Paths,
    PlacementRecord,
    encode,
)
from cluster.store import open_store, sqlite_url

SNAPSHOTS = Path(__file__).parent / "snapshots"
CELL = 12.2
"""Width of a character in the pictures that textual makes."""
SMALL, LARGE = (80, 24), (140, 40)
PATHS = Paths("local")
Script = Callable[[Pilot[None]], Awaitable[None]]


class Untouched:
    """For those who drain nothing."""

    def drain(self, name: str) -> None:
        raise AssertionError(f"{name} was drained")

    def resume(self, name: str) -> None:
        raise AssertionError(f"{name} was resumed")


def until_stopped(stop: threading.Event) -> Iterator[LiveView]:
    """No views but those that the test hands in."""
    stop.wait()
    yield from ()


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same terminal and the same time of day everywhere."""
    for name in ("NO_COLOR", "TEXTUAL_COLOR_SYSTEM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def drive(
    script: Script,
    view: LiveView | None = None,
    size: tuple[int, int] = SMALL,
    app: Top | None = None,
) -> None:
    """Run the application without a terminal, and the script upon it."""
    top = app if app is not None else Top(until_stopped, Untouched())

    async def run() -> None:
        async with top.run_test(size=size, notifications=True) as pilot:
            if view is not None:
                await show(pilot, view)
            await script(pilot)

    asyncio.run(run())


async def settled(pilot: Pilot[None]) -> list[str]:
    """The screen once it does not change any more: pages come and go in several steps."""
    before: list[str] = []
    while before != (now := screen(pilot)):
        before = now
        await pilot.pause(0.05)
    return now


async def show(pilot: Pilot[None], view: LiveView) -> None:
    """Hand in a view, and wait until it is drawn."""
    pilot.app.post_message(Top.Arrived(view))
    await pilot.pause()
    await pilot.pause()


def screen(pilot: Pilot[None]) -> list[str]:
    """The lines of text on the screen."""
    picture = pilot.app.export_screenshot()
    lines: dict[int, list[str]] = {}
    for x, row, text in re.findall(r'<text[^>]* x="([\d.]+)"[^>]*line-(\d+)\)"[^>]*>([^<]*)</text>', picture):
        cells = lines.setdefault(int(row), [" "] * pilot.app.size.width)
        for number, letter in enumerate(html.unescape(text).replace("\xa0", " ").rstrip("\n")):
            cells[round(float(x) / CELL) + number] = letter
    return ["".join(lines.get(row, [])).rstrip() for row in range(pilot.app.size.height)]


async def until(pilot: Pilot[None], condition: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < ends, f"{what}: not within 30 s; on the screen:\n" + "\n".join(screen(pilot))
        await pilot.pause(0.01)


def names(pilot: Pilot[None]) -> list[str]:
    """The rows of the table that is shown, by what names them."""
    table = table_of(pilot)
    return [table.listing.ident(row) for row in table.rows]


def table_of(pilot: Pilot[None]) -> LiveTable[Any]:
    table = pilot.app.screen_stack[0].query_one("#panes", ContentSwitcher).visible_content
    assert isinstance(table, LiveTable)
    return table


# ---- what is drawn ---------------------------------------------------------------------------


PAGES = {
    "pipelines": "1",
    "stages": "2",
    "nodes": "3",
    "drops": "4",
    "pipeline": "1 enter",
    "stage": "2 enter",
    "node": "3 down enter",
    "drained-node": "down enter",
    "drain": "up d",
    "drop": "4 down down down enter",
    "help": "question_mark",
    "filtered": "2 slash l v enter",
    "sorted": "1 s s S",
}
"""The keys, from where the page before was left by Esc."""


@pytest.mark.parametrize(("size", "pages"), [(SMALL, list(PAGES)), (LARGE, list(PAGES)[:5])], ids=["80x24", "140x40"])
def test_pages_look_as_they_did(size: tuple[int, int], pages: list[str]) -> None:
    found: dict[str, list[str]] = {}

    async def script(pilot: Pilot[None]) -> None:
        for page in pages:
            await pilot.press(*PAGES[page].split())
            found[page] = await settled(pilot)
            await pilot.press("escape")
            await settled(pilot)

    drive(script, cluster(), size)
    for page in pages:
        check(f"{page}-{size[0]}x{size[1]}", found[page])


def test_a_cluster_in_which_nothing_is_yet() -> None:
    async def script(pilot: Pilot[None]) -> None:
        check("empty-80x24", screen(pilot))

    view = LiveView(
        at=AT, cluster="local", store="s", missing="no shard is registered; start one with `laxity broker run`"
    )
    drive(script, view)


def check(name: str, lines: Sequence[str]) -> None:
    """Compare with the file, or write it."""
    path = SNAPSHOTS / f"top-{name}.txt"
    text = "\n".join(lines) + "\n"
    if os.environ.get("LAXITY_SNAPSHOTS") == "update":
        path.write_text(text)
    assert text == path.read_text(), f"{path.name} is another one; see the head of this file"


# ---- what the keys do ------------------------------------------------------------------------


def test_tabs_by_number_by_tab_and_by_click() -> None:
    async def script(pilot: Pilot[None]) -> None:
        shown = [table_of(pilot).listing]
        for key in ("tab", "tab", "4", "tab", "shift+tab", "2"):
            await pilot.press(key)
            shown.append(table_of(pilot).listing)
        assert shown == [PIPELINES, STAGES, NODES, DROPS, PIPELINES, DROPS, STAGES]
        await pilot.click("#tabs", offset=(screen(pilot)[2].index("Nodes"), 0))
        assert table_of(pilot).listing is NODES

    drive(script, cluster())


def test_sorting_by_keys_and_by_a_click_on_a_head() -> None:
    async def script(pilot: Pilot[None]) -> None:
        natural = [pipeline.name for pipeline in pipelines()]
        assert names(pilot) == natural
        await pilot.press("s")
        assert names(pilot) == ["lv", "ocr", "summarise-long-documents", "tm"]
        await pilot.press("s", "S")  # by what is offered, the least first
        assert names(pilot) == ["summarise-long-documents", "ocr", "tm", "lv"]
        head = screen(pilot)[3]
        await pilot.click("#pipelines", offset=(head.index("P99"), 0))
        assert names(pilot) == ["ocr", "lv", "tm", "summarise-long-documents"]
        await pilot.click("#pipelines", offset=(head.index("P99"), 0))
        assert names(pilot) == ["summarise-long-documents", "tm", "lv", "ocr"]
        for _ in range(len(PIPELINES.columns)):
            if not table_of(pilot).order.title:
                break
            await pilot.press("s")
        assert names(pilot) == natural

    drive(script, cluster())


def test_the_cursor_stays_on_its_row_once_it_was_moved() -> None:
    def view(**offered: float) -> LiveView:
        return cluster(
            pipelines=[LivePipeline(name=name, version="1", slo=1.0, offered=value) for name, value in offered.items()]
        )

    async def script(pilot: Pilot[None]) -> None:
        table = table_of(pilot)
        await pilot.press("s", "s")
        assert table.selected.name == "c"
        await show(pilot, view(a=5.0, b=4.0, c=3.0))
        assert table.selected.name == "a", "at the top until it is moved"
        await pilot.press("down")
        assert table.selected.name == "b"
        await show(pilot, view(a=1.0, b=0.5, c=3.0))
        assert (names(pilot), table.selected.name) == (["c", "a", "b"], "b")
        await show(pilot, view(a=1.0, c=3.0))
        assert table.selected.name == "a", "what took its place"
        await show(pilot, cluster(pipelines=[]))
        assert table.selected is None
        await pilot.press("down", "enter", "end", "home", "s")
        await show(pilot, view(a=1.0))
        assert table.selected.name == "a"

    drive(script, view(a=1.0, b=2.0, c=3.0))


def test_filtering_by_parts_and_by_regular_expressions() -> None:
    async def script(pilot: Pilot[None]) -> None:
        await pilot.press("3", "slash", *"GPU-1")
        assert names(pilot) == ["gpu-1", "gpu-10"], "while it is typed"
        await pilot.press("0", "enter", "down")
        assert names(pilot) == ["gpu-10"]
        assert "/GPU-10/ 1 of 6" in screen(pilot)[2]
        await show(pilot, cluster())
        assert names(pilot) == ["gpu-10"], "in later views as well"
        await pilot.press("escape")
        assert len(names(pilot)) == 6
        await pilot.press("slash", *"lo|by", "enter")
        assert names(pilot) == ["gpu-4", "gpu-5"]
        await pilot.press("2", "slash", *"lv/", "slash", "enter")
        assert names(pilot) == [], "a slash is a letter there"
        await pilot.press("3", "slash", *"[", "enter")  # no regular expression
        assert names(pilot) == []
        assert "Nothing matches '['" in "\n".join(screen(pilot))

    drive(script, cluster())


def test_a_page_goes_on_while_it_is_looked_at_and_outlives_its_subject() -> None:
    async def script(pilot: Pilot[None]) -> None:
        await pilot.press("enter")
        assert isinstance(pilot.app.screen, PipelineDetail)
        now = pipelines()
        now[0].offered = 4321.0
        await show(pilot, cluster(pipelines=now))
        assert "offered 4,321/s" in "\n".join(screen(pilot))
        await show(pilot, cluster(pipelines=now[1:]))
        assert "Pipeline lv is gone" in "\n".join(screen(pilot))
        await pilot.press("enter")
        assert screen(pilot)[2].startswith(" Stage lv/detect")
        await pilot.press("escape", "escape")
        assert table_of(pilot).listing is PIPELINES
        await pilot.press("3", "enter")
        assert isinstance(pilot.app.screen, NodeDetail)
        await show(pilot, cluster(nodes=[]))
        await pilot.press("d")
        assert "is gone" in screen(pilot)[2]

    drive(script, cluster())


def test_pausing() -> None:
    async def script(pilot: Pilot[None]) -> None:
        await pilot.press("p")
        await show(pilot, cluster(at=AT + 60.0))
        assert "PAUSED 15:06:40" in screen(pilot)[0]
        await pilot.press("p")
        assert screen(pilot)[0].endswith(" 15:07:40")
        assert "PAUSED" not in screen(pilot)[0]

    drive(script, cluster())


def test_the_store_goes_away_and_comes_back() -> None:
    async def script(pilot: Pilot[None]) -> None:
        stale = "the store has not answered for 7 s: connection refused"
        await show(pilot, msgspec.structs.replace(cluster(), stale=stale))
        check("away-80x24", screen(pilot))
        await show(pilot, cluster())
        assert "store ok" in screen(pilot)[0]
        assert "AWAY" not in "\n".join(screen(pilot))

    drive(script, cluster())


def test_resizing_brings_columns() -> None:
    async def script(pilot: Pilot[None]) -> None:
        for size in (SMALL, LARGE, (40, 10), (20, 5), SMALL):
            await pilot.resize_terminal(*size)
            await pilot.pause()
            if size in (SMALL, LARGE):
                check(f"pipelines-{size[0]}x{size[1]}", screen(pilot))

    drive(script, cluster())


def test_colours_are_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 16 colours keeps its own, and without colours the cursor is still to be seen."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("COLORTERM")

    async def script(pilot: Pilot[None]) -> None:
        first, second = (table_of(pilot).render_line(line) for line in (1, 2))
        assert all(segment.style and segment.style.reverse for segment in first)
        assert not any(segment.style and segment.style.reverse for segment in second)
        assert pilot.app.theme == "ansi-dark"
        fills = set(re.findall(r"-r\d+ \{ fill: (#[0-9a-f]{6})", pilot.app.export_screenshot()))
        assert fills <= {"#000000", "#c5c8c6"}, "what the terminal has where nobody says a colour"
        await pilot.press("enter")
        check("pipeline-80x24", screen(pilot))

    drive(script, cluster())


def test_only_what_is_in_sight_is_drawn() -> None:
    drawn: list[str] = []
    column = replace(PIPELINES.columns[1], cell=lambda row, width: drawn.append(row.name) or rate(row.offered))
    listing = replace(PIPELINES, columns=(PIPELINES.columns[0], column))

    async def script(pilot: Pilot[None]) -> None:
        table: LiveTable[LivePipeline] = LiveTable(listing)
        await pilot.app.mount(table)
        table.show(many())
        await pilot.pause()
        drawn.clear()
        table.show(many())
        await pilot.pause()
        assert 0 < len(drawn) < 4 * SMALL[1]
        table.focus()
        await pilot.press("end")
        assert table.selected.name == "p2999"  # type: ignore[union-attr]
        await pilot.press("s", "pageup")
        assert "p2999" in drawn

    drive(script)


# ---- nodes are drained -----------------------------------------------------------------------


class Stored:
    """A cluster's store that the test fills as its processes would."""

    def __init__(self, directory: Path) -> None:
        self.url = sqlite_url(directory / "store.db")
        self.store = open_store(self.url)

    def put(self, key: str, record: msgspec.Struct) -> None:
        self.store.put(key, encode(record))

    def node(self, name: str, *models: str, state: str = "active") -> None:
        devices = [DeviceRecord(0, "T4", dict.fromkeys(models, "ready"))]
        self.put(PATHS.node(name), NodeRecord(4, "host", "ready", devices))
        self.put(PATHS.placement(name), PlacementRecord({0: DevicePlacement("s0", list(models))} if models else {}))
        if state:
            self.put(PATHS.state(name), NodeStateRecord(state, f"it is {state}", [("T4", 0.0)]))  # type: ignore[arg-type]

    def app(self) -> Top:
        return Top(lambda stop: live_views(self.url, "local", stop), StoredNodes(self.url, "local"))

    def drained(self, name: str) -> bool:
        return self.store.get(PATHS.drain(name)) is not None


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Stored]:
    made = Stored(tmp_path)
    yield made
    made.store.close()


def test_a_node_is_drained_and_taken_back(stored: Stored) -> None:
    stored.put(PATHS.coordinator("c0"), CoordinatorRecord("h", 1))
    stored.put(PATHS.leader, LeaderRecord("c0", "h", 1))
    for name in ("n1", "n2"):
        stored.node(name, "tm@1/a", "tm@1/b")

    async def script(pilot: Pilot[None]) -> None:
        await pilot.press("3")
        await until(pilot, lambda: names(pilot) == ["n1", "n2"], "the nodes")
        await pilot.press("down", "d")
        assert "Drain n2?" in "\n".join(screen(pilot))
        await pilot.press("n")
        assert not stored.drained("n2")
        await pilot.press("d", "y")
        await until(pilot, lambda: stored.drained("n2"), "the drain")
        await until(pilot, lambda: "Draining n2: 2 models left" in "\n".join(screen(pilot)), "how far it is")
        await pilot.press("d")
        assert "n2 is drained already" in "\n".join(screen(pilot))
        stored.node("n2", state="standby")
        await until(pilot, lambda: "n2 is empty" in "\n".join(screen(pilot)), "that it is empty")
        assert "Draining n2" not in "\n".join(screen(pilot))
        await pilot.press("enter", "r")  # from its page as well
        await until(pilot, lambda: not stored.drained("n2"), "the end of the drain")

    drive(script, app=stored.app())


def test_why_a_node_cannot_be_drained_is_told(stored: Stored) -> None:
    stored.node("n1", "tm@1/a", state="")  # nobody ever decided of it: the plan is fixed

    async def script(pilot: Pilot[None]) -> None:
        await pilot.press("3")
        await until(pilot, lambda: names(pilot) == ["n1"], "the node")
        await pilot.press("d", "y")
        await until(pilot, lambda: "coordinators, which" in " ".join(screen(pilot)), "why not")
        assert not stored.drained("n1")

    drive(script, app=stored.app())


def test_a_drain_of_somebody_else_is_seen(stored: Stored) -> None:
    stored.put(PATHS.leader, LeaderRecord("c0", "h", 1))
    stored.put(PATHS.coordinator("c0"), CoordinatorRecord("h", 1))
    stored.put(PATHS.drain("n1"), DrainRecord("new memory"))
    stored.node("n1", "tm@1/a")

    async def script(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "Draining n1: 1 model left" in "\n".join(screen(pilot)), "the drain")

    drive(script, app=stored.app())


# ---- without a terminal ----------------------------------------------------------------------


def test_one_view_for_pipes_and_programs(stored: Stored) -> None:
    stored.put(PATHS.coordinator("c0"), CoordinatorRecord("h", 1))
    stored.node("n1", "tm@1/a")
    for arguments in ([], ["--once"]):
        result = CliRunner().invoke(main, ["top", "--store", stored.url, *arguments])
        assert result.exit_code == 0, result.output
        assert "laxity local  NO LEADER" in result.stdout
        assert re.search(r"^n1 +active +I ", result.stdout, re.MULTILINE)
        assert "No pipeline is served" in result.stdout
    result = CliRunner().invoke(main, ["top", "--json", "--store", stored.url])
    seen = msgspec.json.decode(result.stdout, type=LiveView)
    assert [node.name for node in seen.nodes] == ["n1"]


def test_no_cluster_is_told_as_status_tells_it(stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for arguments in ([], ["--store", stored.url], ["--cluster", "a/b"]):
        found = [CliRunner().invoke(main, [command, *arguments]) for command in ("top", "status")]
        assert found[0].exit_code == found[1].exit_code != 0
        assert found[0].stderr.replace("top", "status") == found[1].stderr


# ---- cells -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (rate(0.0), "0"),
        (rate(0.25), "0.25"),
        (rate(9.999), "10.0"),
        (rate(1234.5), "1,234"),
        (rate(56_700), "56.7k"),
        (rate(1.234e6), "1.23M"),
        (count(1234), "1,234"),
        (duration(None), "-"),
        (duration(0.0), "0ms"),
        (duration(0.00042), "0.42ms"),
        (duration(-0.0004), "-0.40ms"),
        (duration(0.142), "142ms"),
        (duration(0.99999), "1.00s"),
        (duration(90), "90s"),
        (duration(600), "10m"),
        (percent(None), "-"),
        (percent(0.99999), "99.9%"),
        (percent(1.0), "100%"),
        (clean("a\n\x1b[31mb\x07"), "a b "),
        (middle("0123456789", 7), "012…789"),
    ],
)
def test_numbers_as_people_read_them(made: str, text: str) -> None:
    assert made == text


@given(st.floats(0.0, 1e8), st.floats(0.0, 3e4))
def test_numbers_fit_their_columns(value: float, seconds: float) -> None:
    assert len(rate(value)) <= 7
    assert len(duration(seconds)) <= 6
    assert len(percent(min(value, 1.0))) <= 5


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), max_size=30), st.integers(0, 50), st.integers(1, 8))
def test_charts_are_as_wide_as_they_are_to_be(points: list[tuple[float, float]], width: int, height: int) -> None:
    history = [(number, offered, good, 0.0) for number, (offered, good) in enumerate(points)]
    assert len(plain(sparkline(history, width))) == width
    lines = chart(history, width + 10, height)
    assert [len(plain(line)) for line in lines] == [width + 10] * height


@given(st.integers(20, 300))
def test_columns_fit(width: int) -> None:
    for listing in (PIPELINES, STAGES, NODES, DROPS):
        fitted = fit(listing.columns, listing.rows(cluster()), width)
        assert sum(size + 1 for _, size in fitted) - 1 <= max(
            width, sum(c.width + 1 for c in listing.columns if not c.rank)
        )
        assert {column.title for column in listing.columns if not column.rank} <= {column.title for column, _ in fitted}
