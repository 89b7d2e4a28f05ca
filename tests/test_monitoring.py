"""The alert rules and the Grafana dashboard, with a real Prometheus that scrapes a live cluster."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cluster.observe.families import BY_NAME
from laxity import Client, LaxityError

FILES = Path(__file__).parent.parent / "ansible/roles/monitoring/files"
RULES = FILES / "laxity-rules.yaml"
DASHBOARD = json.loads((FILES / "laxity-grafana.json").read_text())
COMMAND = [sys.executable, "-P", "-m", "cli.main"]
WAIT = 60.0

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="needs prometheus and promtool (Debian's package: prometheus)",
)


def queries() -> dict[str, str]:
    """Every query of the dashboard, by panel and letter, as Grafana would send it."""
    found = {}
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"].replace("$__rate_interval", "10s").replace("$pipeline", ".*")
            found[f"{panel['title']} {target['refId']}"] = query
    return found


def test_alerts_fire_when_they_should_and_not_otherwise(tmp_path: Path) -> None:
    if not shutil.which("promtool"):
        pytest.skip("needs promtool (Debian's package: prometheus)")
    for file in (RULES, Path(__file__).parent / "alert_rules.yaml"):
        shutil.copy(file, tmp_path)
    for what in (["check", "rules", "laxity-rules.yaml"], ["test", "rules", "alert_rules.yaml"]):
        result = subprocess.run(["promtool", *what], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


def test_only_names_that_are_told_are_used() -> None:
    """Nothing is asked for that no process tells, and nothing that is told is left out of sight."""
    text = RULES.read_text() + json.dumps(DASHBOARD)
    used = {
        re.sub(r"_(total|bucket|sum|count)$", "", name) if name not in BY_NAME else name
        for name in re.findall(r"\blaxity_\w+", text)
    }
    assert used - BY_NAME.keys() == set()


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


class Prometheus:
    """A Prometheus of its own on a port that was free, with the rules, that scrapes these addresses every second."""

    def __init__(self, directory: Path, targets: list[str]) -> None:
        shutil.copy(RULES, directory)
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [RULES.name],
            "scrape_configs": [{"job_name": "laxity", "static_configs": [{"targets": targets}]}],
        }
        (directory / "prometheus.yml").write_text(json.dumps(config))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        arguments = [f"--web.listen-address={self.address}", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
        with (directory / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(["prometheus", *arguments], cwd=directory, stdout=log, stderr=log)
        self._log = directory / "prometheus.log"

    def get(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer of its API; None while it is not there."""
        assert self._process.poll() is None, self._log.read_text()
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None
        except OSError:
            return None

    def eventually(self, holds: Callable[[], Any], what: Callable[[], str]) -> None:
        pause = threading.Event()
        ends = time.monotonic() + WAIT
        while not holds():
            assert time.monotonic() < ends, what()
            pause.wait(0.3)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)


class Traffic:
    """Requests of a few kinds, one after the other, until it is closed."""

    def __init__(self, address: str) -> None:
        self._client = Client(address)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._ends.wait(0.005):
            number += 1
            # One in eight can never make it: it is dropped, or refused.
            self._client.submit("lv", "x", 0.05 if number % 8 == 0 else None)

    def close(self) -> None:
        self._ends.set()
        self._thread.join()
        with suppress(LaxityError):
            self._client.close()


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    directory = tmp_path_factory.mktemp("monitoring")
    environment = os.environ | {"XDG_RUNTIME_DIR": str(directory)}

    def laxity(*arguments: str) -> str:
        result = subprocess.run([*COMMAND, *arguments], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    laxity("up", "lv", "--gpus", "8", "--agents", "2", "--coordinators", "1", "--detach")
    try:
        seen = json.loads(laxity("status", "--json"))
        services = [*seen["shards"], *seen["agents"], *seen["coordinators"]]
        assert len(services) == 4
        traffic = Traffic(seen["shards"][0]["frontend"])
        try:
            running = Prometheus(directory, [service["http"].removeprefix("http://") for service in services])
            try:
                yield running
            finally:
                running.close()
        finally:
            traffic.close()
    finally:
        laxity("down")


@needs_prometheus
@pytest.mark.timeout(180)
def test_every_panel_has_data(prometheus: Prometheus) -> None:
    missing = queries()

    def complete() -> bool:
        for name, query in list(missing.items()):
            data = prometheus.get("query", query=query)
            if data is not None and data["result"] and all(one["value"][1] != "NaN" for one in data["result"]):
                del missing[name]
        return not missing

    prometheus.eventually(complete, lambda: f"no data for {missing}")
    targets = prometheus.get("targets")["activeTargets"]
    assert [target["lastError"] for target in targets] == [""] * 4


@needs_prometheus
@pytest.mark.timeout(180)
def test_every_rule_is_evaluated(prometheus: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        data = prometheus.get("rules")
        return [rule for group in data["groups"] for rule in group["rules"]] if data else []

    prometheus.eventually(
        lambda: rules() and all(rule["health"] == "ok" for rule in rules()),
        lambda: str([(rule["name"], rule["health"], rule.get("lastError")) for rule in rules()]),
    )
    assert {rule["name"] for rule in rules()} == set(re.findall(r"alert: (\w+)", RULES.read_text()))


@needs_prometheus
@pytest.mark.timeout(180)
def test_everything_that_is_told_is_described(prometheus: Prometheus) -> None:
    def told() -> dict[str, Any]:
        return prometheus.get("metadata") or {}

    def named() -> set[str]:
        # What only NVIDIA's driver tells is not there without one.
        return {name for name in BY_NAME if not name.startswith("laxity_gpu_")}

    def missing() -> set[str]:
        return {name for name in named() if name not in told() and f"{name}_total" not in told()}

    prometheus.eventually(lambda: not missing(), lambda: f"not told: {missing()}")
    assert {name for name in told() if name.startswith("laxity_")} <= {*BY_NAME, *(f"{name}_total" for name in BY_NAME)}
