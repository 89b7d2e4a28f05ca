"""Who watches a cluster through the dashboard's server: one follower for all, and nobody waits for the slow."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from cli.dashboard.watching import MOST_WATCHERS, TooManyWatchers, Watchers
from cli.live.follow import live_views
from cli.live.view import LiveView
from cluster.records import BrokerRecord, Paths, PipelineRecord, encode
from cluster.store import open_store, sqlite_url
from cluster.tuning.report import PipelineReport, ReportRecord
from pipelines import load_spec

LV = load_spec("lv")
PATHS = Paths("here")


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store with one pipeline, of which a shard reports."""
    made = sqlite_url(tmp_path / "store.db")
    store = open_store(made)
    store.put(PATHS.broker("s0"), encode(BrokerRecord("tcp://127.0.0.1:1", "tcp://127.0.0.1:2", 3, "h")))
    store.put(PATHS.pipeline("lv"), encode(PipelineRecord(LV.version, LV)))
    store.put(PATHS.report("s0"), encode(ReportRecord(1, 1.0, [], {}, [], [PipelineReport("lv", 30, {"ok": 20})])))
    store.close()
    return made


def parsed(event: bytes) -> tuple[str, LiveView]:
    name, data = event.decode().strip().split("\n")
    assert "\n" not in data
    return name.removeprefix("event: "), msgspec.json.decode(data.removeprefix("data: "), type=LiveView)


async def begun(events: AsyncIterator[bytes]) -> tuple[str, LiveView]:
    assert (await anext(events)).startswith(b"retry:")
    return parsed(await anext(events))


def followers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "live views"]


def test_all_watch_one_follower_which_ends_after_the_last(url: str) -> None:
    async def scenario() -> None:
        watchers = Watchers(url, "here", linger=0.0)
        first, second = watchers.events(), watchers.events()
        (kind, view), (other, its) = await asyncio.gather(begun(first), begun(second))
        assert (kind, other) == ("full", "full")
        assert view == its
        assert [(one.name, one.offered) for one in view.pipelines] == [("lv", 30.0)]
        (follower,) = followers()
        assert (await watchers.view()).pipelines[0].good == 20.0
        kind, view = parsed(await anext(first))
        assert kind == "next"
        await first.aclose()  # type: ignore[attr-defined]
        assert follower.is_alive()
        await second.aclose()  # type: ignore[attr-defined]
        await asyncio.to_thread(follower.join, 20)
        assert not follower.is_alive()

    asyncio.run(scenario())


def test_who_is_slow_misses_views_and_too_many_are_refused(url: str) -> None:
    async def scenario() -> None:
        watchers = Watchers(url, "here", linger=0.0)
        slow, quick = watchers.events(), watchers.events()
        await asyncio.gather(begun(slow), begun(quick))
        for _ in range(2):
            _, last = parsed(await anext(quick))
        _, view = parsed(await anext(slow))
        assert view.at == last.at  # not the one that came in between
        others = [watchers.events() for _ in range(MOST_WATCHERS - 2)]
        await asyncio.gather(*(anext(events) for events in others))
        with pytest.raises(TooManyWatchers):
            watchers.events()
        await others.pop().aclose()  # type: ignore[attr-defined]
        others.append(watchers.events())
        (follower,) = followers()
        for events in (slow, quick, *others):
            await events.aclose()  # type: ignore[attr-defined]
        await asyncio.to_thread(follower.join, 20)

    asyncio.run(scenario())


def test_a_store_that_cannot_be_opened_yet_is_told_and_waited_for(tmp_path: Path) -> None:
    directory = tmp_path / "later"
    directory.write_text("in the way")
    stop = threading.Event()
    views = live_views(sqlite_url(directory / "store.db"), "here", stop)
    assert "cannot be reached" in next(views).stale
    directory.unlink()
    directory.mkdir()
    view = next(views)
    while view.stale:
        view = next(views)
    assert view.pipelines == []
    stop.set()
    assert list(views) == []
