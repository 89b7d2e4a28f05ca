"""The dashboard in a real browser, beside a real cluster under load."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cluster.records import CoordinatorRecord, Paths, decode, encode, name_of
from cluster.store import open_store, sqlite_url
from cluster.tuning.report import DropReport, ReportRecord
from laxity import Client, LaxityError

playwright = pytest.importorskip("playwright.sync_api")

COMMAND = [sys.executable, "-P", "-m", "cli.main"]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
EXPECTED = ("net::ERR", "401 (Unauthorized)", "403 (Forbidden)")
"""What browsers say of a server that died, and of a token that is not the one."""
WAIT = 30_000
"""Milliseconds for what has to come."""
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
PATHS = Paths("local")


class Cluster:
    """`laxity up lv`, with a coordinator and a node that can be killed for good, and requests until the end."""

    def __init__(self, directory: Path) -> None:
        self._environment = os.environ | {"XDG_RUNTIME_DIR": str(directory)}
        self._environment.pop("LAXITY_STORE", None)
        self._log = (directory / "log").open("wb")
        up = self("up", "lv", "--gpus", "16", "--agents", "2", "--coordinators", "1", "--detach", "--json")
        told = json.loads(up)
        self.url: str = told["dashboard"]
        self.token_file = Path(told["dashboard_token_file"])
        self.token = self.token_file.read_text().strip()
        self.store = sqlite_url(directory / "laxity" / "local" / "store.db")
        extra = ("node", "run", "--store", self.store, "--agent", "extra", "--devices", "emulated:2", "--http", "")
        self.extra = subprocess.Popen([*COMMAND, *extra], env=self._environment, stdout=self._log, stderr=self._log)
        self._stop = threading.Event()
        self._load = threading.Thread(target=self._send, args=(told["addresses"],))
        self._load.start()

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run([*COMMAND, *arguments], env=self._environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _send(self, addresses: list[str]) -> None:
        """Some that can be answered in time, and now and then one that cannot."""
        with Client(",".join(addresses)) as client:
            number = 0
            while not self._stop.wait(0.02):
                number += 1
                with contextlib.suppress(LaxityError):
                    client.submit("lv", b"x", slo=0.03 if number % 10 == 0 else None)

    def dashboard_pid(self) -> int | None:
        """The process that serves the dashboard of this cluster."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().split(b"\0")
                if b"dashboard" in words and str(self.token_file).encode() in words:
                    return int(path.parent.name)
        return None

    def close(self) -> None:
        self._stop.set()
        self._load.join()
        self.extra.kill()
        self.extra.wait()
        self("down")
        self._log.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("up"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no Chromium here: install Debian's package chromium")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=chromium, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def open_page(browser: Any, cluster: Cluster) -> Iterator[Callable[..., Any]]:
    """Opens the dashboard in a window of its own. No page may have complained, or asked anybody else for anything."""
    complaints: list[str] = []
    contexts = []

    def open_one(**options: Any) -> Any:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
        context.set_default_timeout(WAIT)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on(
            "request", lambda asked: complaints.append(asked.url) if not asked.url.startswith(cluster.url) else None
        )
        page.goto(cluster.url)
        page.wait_for_selector("body:not(.waiting) .live[data-state=live]")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert [one for one in complaints if not any(known in one for known in EXPECTED)] == []


def tile(page: Any, name: str) -> str:
    return f".tile[data-tile='{name}'] p b"


def number(page: Any, selector: str) -> float:
    found = page.text_content(selector)
    return float(found.replace(",", "")) if re.fullmatch(r"[\d.,]+", found) else -1.0


def cells(page: Any, node: str) -> Any:
    return page.locator(".node", has=page.get_by_text(node, exact=True)).locator("button.cell")


def states(page: Any, node: str) -> list[str]:
    return [one.get_attribute("data-state") for one in cells(page, node).all()]


def wait_states(page: Any, node: str, expected: set[str]) -> None:
    script = """([node, expected]) => {
      const name = [...document.querySelectorAll('.node .name b')].find((one) => one.textContent === node);
      const cells = name ? [...name.closest('.node').querySelectorAll('button.cell')] : [];
      return cells.length && cells.every((cell) => expected.includes(cell.dataset.state));
    }"""
    page.wait_for_function(script, arg=[node, sorted(expected)])


# ---- looking -----------------------------------------------------------------------------------


def test_numbers_are_live_and_what_is_clicked_shows_more(open_page: Callable[..., Any]) -> None:
    page = open_page()
    goodput = tile(page, "Goodput")
    page.wait_for_function(f'Number(document.querySelector("{goodput}").textContent) > 10')
    line = page.get_attribute(".good-line", "d")
    page.wait_for_function("(before) => document.querySelector('.good-line').getAttribute('d') !== before", arg=line)
    assert number(page, tile(page, "p99")) > 0
    assert page.text_content("#facts").count("coordinator-0") == 1
    assert page.locator(".stage").count() == 5
    assert page.locator(".edges path").count() == 6
    page.hover(".chart svg", position={"x": 700, "y": 60})
    assert "/s good" in page.text_content(".readout")
    # A stage.
    page.click(".stage >> nth=0")
    detail = page.locator("#detail")
    assert "stage of lv" in detail.inner_text()
    assert "load factor" in detail.inner_text()
    page.keyboard.press("Escape")
    assert detail.is_hidden()
    assert page.evaluate("document.activeElement.classList.contains('stage')")
    # A device.
    page.wait_for_selector("button.cell[data-state=busy]")
    page.click("button.cell[data-state=busy] >> nth=0")
    assert "lv/" in detail.inner_text()
    assert "shard-0" in detail.inner_text()
    counts = page.text_content(".counts")
    assert sum(int(count) for count in re.findall(r"\d+", counts)) == page.locator(".node button.cell").count() >= 16


def test_drops_are_told_and_filtered_and_are_never_markup(open_page: Callable[..., Any], cluster: Cluster) -> None:
    store = open_store(cluster.store)
    drop = DropReport(HOSTILE, HOSTILE, HOSTILE, "failed", HOSTILE, 0.0)
    store.put(PATHS.report("evil"), encode(ReportRecord(1, 1.0, [], {}, [], [], [drop])))
    page = open_page()
    page.wait_for_selector(".drops li:has-text('predicted to miss')")
    page.wait_for_selector(".drops li .outcome[data-outcome=failed]")
    hostile = page.locator(".drops li", has=page.locator("[data-outcome=failed]"))
    assert HOSTILE in hostile.first.inner_text()
    assert page.locator("img").count() == 0
    page.select_option("#drops select >> nth=1", "failed")
    assert set(page.locator(".drops .outcome").all_inner_texts()) == {"failed"}
    page.select_option("#drops select >> nth=0", "lv")
    page.wait_for_selector("#drops .empty:has-text('None like that')")
    page.select_option("#drops select >> nth=1", "")
    page.click(".drops .id >> nth=0")
    page.wait_for_selector("#toast.shown:has-text('laxity trace ')")
    assert "owned" not in page.title()
    store.delete(PATHS.report("evil"))
    store.close()


def test_a_phone_and_the_dark(open_page: Callable[..., Any]) -> None:
    page = open_page(viewport={"width": 375, "height": 812}, color_scheme="dark", reduced_motion="reduce")
    page.wait_for_selector(".stage")

    def fits() -> bool:
        return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))

    def brightness() -> int:
        return sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]))

    assert fits()
    boxes = [box.bounding_box() for box in page.locator(".stage").all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 375 for box in boxes)
    page.click(".stage >> nth=0")
    assert fits()
    assert brightness() < 150
    page.click("#theme")
    assert brightness() > 600
    page.reload()
    page.wait_for_selector(".stage")
    assert brightness() > 600
    assert page.evaluate("localStorage.length") == 1


# ---- doing -------------------------------------------------------------------------------------


def test_a_node_is_drained_and_taken_back_by_who_signed_in(open_page: Callable[..., Any], cluster: Cluster) -> None:
    page = open_page()
    page.click(".node .name:has-text('agent-1')")
    detail = page.locator("#detail")
    detail.get_by_role("button", name="Sign in").click()
    page.fill("input[name=token]", "not the token at all")
    page.click("#sign-in [type=submit]")
    page.wait_for_selector("#sign-in .problem:has-text('not the token')")
    page.fill("input[name=token]", cluster.token)
    page.keyboard.press("Enter")
    detail.get_by_role("button", name="Drain node…").click()
    detail.get_by_role("button", name="Drain it").click()
    wait_states(page, "agent-1", {"draining", "standby"})
    page.reload()  # the browser stays signed in
    page.wait_for_selector("#session:has-text('Sign out')")
    page.click(".node .name:has-text('agent-1')")
    detail.get_by_role("button", name="Take it back").click()
    wait_states(page, "agent-1", {"busy", "idle", "loading", "standby"})
    page.wait_for_selector("#detail button:has-text('Drain node')")
    page.click("#session")
    page.wait_for_selector("#session:has-text('Sign in')")
    assert page.context.cookies() == []


def test_nothing_is_shown_before_somebody_signs_in_where_that_is_needed(browser: Any, cluster: Cluster) -> None:
    command = [*COMMAND, "dashboard", "--store", cluster.store, "--http-token-file", str(cluster.token_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout is not None
        page = browser.new_page()
        page.set_default_timeout(WAIT)
        page.goto(serving.stdout.readline().split()[-1])
        page.wait_for_selector("#banner:has-text('Sign in to see this cluster')")
        assert page.locator(".stage").count() == 0
        page.fill("#sign-in input[name=token]", cluster.token)
        page.keyboard.press("Enter")
        page.wait_for_selector("body:not(.waiting) .live[data-state=live]")
        page.wait_for_selector(".stage")
        assert page.locator("#sign-in").is_hidden()
        page.click("#session")
        page.wait_for_selector("#banner:has-text('Sign in to see this cluster')")
        assert page.locator(".stage").count() == 0
        page.close()
        serving.send_signal(signal.SIGINT)
        assert serving.wait(20) == 0


def test_an_agent_that_dies_is_lost_and_a_server_that_dies_comes_back(
    open_page: Callable[..., Any], cluster: Cluster
) -> None:
    page = open_page()
    wait_states(page, "extra", {"busy", "idle", "standby"})
    cluster.extra.send_signal(signal.SIGKILL)
    before = cluster.dashboard_pid()
    assert before is not None
    os.kill(before, signal.SIGKILL)
    page.wait_for_selector("body.old .live[data-state=lost]")
    assert "Nobody answers" in page.text_content("#banner")
    assert states(page, "agent-0") != []  # what was seen last stays
    page.wait_for_selector("body:not(.old) .live[data-state=live]")
    assert cluster.dashboard_pid() != before
    assert page.locator("#banner").is_hidden()
    wait_states(page, "extra", {"lost"})
    assert cells(page, "extra").first.text_content() == "×"


# ---- what it answers, whoever asks ---------------------------------------------------------------


def ask(url: str, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of an answer."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=20)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, None if body is None else json.dumps(body), sent)
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()
    connection.close()
    return found


def test_what_browsers_are_told_to_be_careful_with(cluster: Cluster) -> None:
    for path in ("/", "/static/app.js", "/static/base.css", "/api/view", "/nothing"):
        status, headers, text = ask(cluster.url, "GET", path)
        assert status == (404 if path == "/nothing" else 200)
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == ("no-store" if path.startswith("/api") else "no-cache")
        assert "access-control-allow-origin" not in headers
        assert not re.search(r"https?://(?!www\.w3\.org)", text.replace(cluster.url, "")) or path == "/api/view"
    assert ask(cluster.url, "GET", "/static/../app.py")[0] == 404
    view = json.loads(ask(cluster.url, "GET", "/api/view")[2])
    assert view["leader"] == "coordinator-0"
    assert {node["name"] for node in view["nodes"]} >= {"agent-0", "agent-1"}


def test_a_name_that_leads_here_is_not_this_hosts(cluster: Cluster) -> None:
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "[", "a:b:c"):
        for path in ("/", "/api/view", "/static/app.js"):
            assert ask(cluster.url, "GET", path, host=host)[0] in (400, 421), host
    for host in ("localhost", "LOCALHOST:8000", "laxity.localhost", "127.0.0.1", "[::1]:80", "10.1.2.3"):
        assert ask(cluster.url, "GET", "/api/session", host=host)[0] == 200, host


def test_bodies_that_make_no_sense_are_refused(cluster: Cluster) -> None:
    address = urlsplit(cluster.url)
    head = b"POST /api/sign-in HTTP/1.1\r\nHost: localhost\r\nX-Laxity-Request: 1\r\nContent-Length: 13\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), 20.0) as connection:
        connection.sendall(head + b'{"token":"\xff"}')
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")
    with socket.create_connection((address.hostname, address.port), 20.0) as connection:
        connection.sendall(head + b'{"token":')
    assert ask(cluster.url, "GET", "/api/session")[0] == 200


def test_nothing_is_changed_for_who_may_not(cluster: Cluster) -> None:
    own = {"x_laxity_request": "1"}
    drain = "/api/nodes/agent-0/drain"
    assert ask(cluster.url, "POST", drain)[0] == 403
    assert ask(cluster.url, "POST", drain, **own)[0] == 401
    assert ask(cluster.url, "POST", drain, **own, cookie=f"laxity-local=99999999999.{'0' * 64}")[0] == 401
    token = {"token": cluster.token}
    assert ask(cluster.url, "POST", "/api/sign-in", token)[0] == 403
    assert ask(cluster.url, "POST", "/api/sign-in", token, **own, sec_fetch_site="cross-site")[0] == 403
    assert ask(cluster.url, "POST", "/api/sign-in", {"token": "x" * 32}, **own)[0] == 403
    assert ask(cluster.url, "POST", "/api/sign-in", {"token": "x" * 5000}, **own)[0] == 413
    assert ask(cluster.url, "POST", "/api/sign-in", [], **own)[0] == 400
    status, headers, _ = ask(cluster.url, "POST", "/api/sign-in", token, **own)
    assert status == 200
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    cookie = cookie.partition(";")[0]
    assert json.loads(ask(cluster.url, "GET", "/api/session", cookie=cookie)[2])["signed_in"]
    assert ask(cluster.url, "POST", drain, cookie=cookie)[0] == 403
    status, _, text = ask(cluster.url, "POST", "/api/nodes/nobody/drain", **own, cookie=cookie)
    assert (status, "there is no node 'nobody'" in text) == (409, True)
    assert ask(cluster.url, "GET", drain, **own, cookie=cookie)[0] == 405
    assert (cluster.token_file.stat().st_mode & 0o777) == 0o600
    # A coordinator's own has no token: it only shows.
    store = open_store(cluster.store)
    (entry,) = store.list(PATHS.coordinators).entries
    store.close()
    shows = decode(CoordinatorRecord, entry.key, entry.value).http
    assert name_of(entry.key) == "coordinator-0"
    assert json.loads(ask(shows, "GET", "/api/session")[2]) == {
        "possible": False,
        "needed": False,
        "signed_in": False,
    }
    assert ask(shows, "POST", "/api/sign-in", token, **own)[0] == 403
    assert ask(shows, "POST", drain, **own, cookie=cookie)[0] == 401
    store = open_store(cluster.store)
    assert store.list(PATHS.drains).entries == []
    store.close()


def test_the_command_ends_at_once_also_while_somebody_watches(cluster: Cluster) -> None:
    command = [*COMMAND, "dashboard", "--store", cluster.store]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout is not None
        url = serving.stdout.readline().split()[-1]
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
        connection.request("GET", "/api/events")
        stream = connection.getresponse()
        assert stream.readline().startswith(b"retry:")
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(20) == 0
        connection.close()
