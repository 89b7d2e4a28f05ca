"""The pictures in the documentation: the dashboard and `laxity top` while a burst comes and an agent dies, and the
report of the load that was it. Everything in them was measured while this ran; it takes about two minutes.

    python benchmarks/pictures.py [--gpus 16] [--load 0.85] [--engine .venv-compiled/bin/python] [--to docs/images]

It needs a Chromium, and the trace of Twitter (LAXITY_SHARED).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

from live_cluster import LiveCluster, processes
from playwright.sync_api import Page, sync_playwright

from cli.live.follow import live_views
from cli.top.app import Top
from cli.top.command import StoredNodes

TRACE = Path(os.environ.get("LAXITY_SHARED", "../shared")) / "traces/twitter_ipa_bursty_per_second.csv"
BEGIN, END = 365, 435
KILL_AT = 42.0
"""Seconds from the beginning of the load: the burst is there by then."""
LOOK_AT = 52.0
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def draw_page(page: Page, to: Path) -> None:
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.screenshot(path=to / ("dashboard-burst.png" if scheme == "light" else "dashboard-burst-dark.png"))
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 375, "height": 812})
    page.screenshot(path=to / "dashboard-phone.png")


async def draw_top(url: str, look: asyncio.Event, to: Path) -> None:
    """`laxity top` as it looks once ``look`` is set, on two of its sheets."""
    app = Top(lambda stop: live_views(url, "local", stop), StoredNodes(url, "local"))
    async with app.run_test(size=(132, 26)) as pilot:
        await look.wait()
        for key, name in (("1", "pipelines"), ("2", "stages"), ("3", "nodes")):
            await pilot.press(key)
            await pilot.pause(1.5)
            (to / f"top-{name}.svg").write_text(app.export_screenshot(title=f"laxity top: {name}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=16)
    parser.add_argument("--load", type=float, default=0.85)
    parser.add_argument("--engine", default=sys.executable)
    parser.add_argument("--to", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    browser_path = shutil.which("chromium")
    if browser_path is None or not TRACE.exists():
        sys.exit("this needs a chromium, and the traces: set LAXITY_SHARED to where they are")
    options.to.mkdir(parents=True, exist_ok=True)
    with LiveCluster(options.engine) as cluster, sync_playwright() as playwright:
        up = cluster.up("lv", "--gpus", str(options.gpus), "--agents", "4", "--coordinators", "1")
        browser = playwright.chromium.launch(executable_path=browser_path, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1440, "height": 1180}, device_scale_factor=1)
        page.goto(up["dashboard"])
        store = cluster.status()["store"]
        look = asyncio.Event()
        loop = asyncio.new_event_loop()
        top = threading.Thread(target=loop.run_until_complete, args=(draw_top(store, look, options.to),))
        top.start()
        load = cluster.start(
            *("load", "lv", "--trace", str(TRACE), "--window", f"{BEGIN}:{END}", "--load", str(options.load)),
            *("--seed", "1", "--html", str(options.to / "load-report.html")),
        )
        page.wait_for_timeout(KILL_AT * 1e3)
        # Its supervisor starts it again, each time a little later; it dies each time before it has registered.
        for _ in range(int((LOOK_AT - KILL_AT) / 0.25)):
            for process in processes():
                if "agent-1" in process.command and "node" in process.command:
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
            page.wait_for_timeout(250)
        draw_page(page, options.to)
        loop.call_soon_threadsafe(look.set)
        top.join()
        print(load.communicate()[0])
        page.set_viewport_size({"width": 1200, "height": 1500})
        page.goto((options.to / "load-report.html").absolute().as_uri())
        page.screenshot(path=options.to / "load-report.png", full_page=True)
        for svg in options.to.glob("top-*.svg"):
            page.set_viewport_size({"width": 1640, "height": 760})
            page.goto(svg.absolute().as_uri())
            page.screenshot(path=svg.with_suffix(".png"))
            svg.unlink()
        browser.close()


if __name__ == "__main__":
    main()
