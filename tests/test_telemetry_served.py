"""What shards and agents write as telemetry while they serve."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.telemetry_rows import KINDS, Files
from cluster.telemetry import ActionRow, RequestRow
from laxity import Dropped, LaxityError
from nodes.device import DeviceConfig
from pipelines.load import parse_spec
from pipelines.spec import PipelineSpec

SLOW = """
name: slow
slo: 30s
stages:
  slow: {executor: emulated, profile: {alpha_ms: 0, beta_ms: 200}, max_batch: 1}
output: slow
"""


def written(directory: Path) -> tuple[list[ActionRow], list[RequestRow]]:
    files = Files([directory], KINDS)
    found = list(files.rows())
    files.end()
    assert (files.troubles.malformed, files.troubles.unfinished, files.troubles.strange) == (0, 0, [])
    assert not any(row.lost for row in found)
    actions = [row for row in found if isinstance(row, ActionRow)]
    return actions, [row for row in found if isinstance(row, RequestRow)]


def test_every_request_and_action_leaves_one_row(cluster: Any, echo: PipelineSpec, tmp_path: Path) -> None:
    cluster.start(telemetry=str(tmp_path))
    cluster.serve(echo, parse_spec(SLOW, file="slow.yaml", root=""), telemetry=str(tmp_path))
    client = cluster.client()
    for number in range(20):
        assert client.infer("echo", number) == number
    with pytest.raises(Dropped):
        client.infer("slow", 1, slo=0.1)
    cluster.settle(ok=20, dropped=1)
    cluster.close()
    cluster.agents.clear()
    actions, requests = written(tmp_path)
    assert Counter(row.outcome for row in requests) == {"ok": 20, "dropped": 1}
    assert len({row.id for row in requests}) == 21
    good = [row for row in requests if row.outcome == "ok"]
    assert all((row.met, row.cold, row.shard, row.pipeline) == (1, 0, "s0", "echo") for row in good)
    assert all(0 < row.latency_us <= row.budget_us == row.slo_us == 30_000_000 for row in good)
    assert not any(row.met for row in requests if row.outcome != "ok")
    batches = [row for row in actions if row.kind == "INFER"]
    assert sum(row.batch for row in batches) == len(good)
    for row in batches:
        assert (row.agent, row.device, row.model, row.code, row.shard) == ("a0", 0, echo.model_key("echo"), "ok", "s0")
        assert row.start_us is not None
        assert row.earliest_us <= row.start_us <= row.latest_us
    (dropped,) = [row for row in requests if row.outcome == "dropped"]
    assert (dropped.pipeline, dropped.stage) == ("slow", "slow")
    assert 0 < dropped.budget_us <= 100_000
    holds = [row for row in actions if row.kind == "HOLD"]
    assert [(row.model.partition("@")[0], row.code) for row in holds] == [("echo", "ok"), ("slow", "ok")]


def test_what_a_worker_did_and_how_it_failed_is_told(
    cluster: Any, user_pipeline: Callable[..., PipelineSpec], tmp_path: Path
) -> None:
    spec = user_pipeline("def model(values):\n    return [1 // value for value in values]\n", "max_batch: 1")
    cluster.start(telemetry=str(tmp_path / "rows"))
    cluster.serve(spec, devices=[DeviceConfig("cpu", "cpu")], telemetry=str(tmp_path / "rows"))
    client = cluster.client()
    answers = [client.submit("user", value) for value in (1, 0, 1)]
    assert [isinstance(answer.exception(20.0), LaxityError) for answer in answers] == [False, True, False]
    cluster.settle(ok=2, failed=1)
    cluster.close()
    cluster.agents.clear()
    actions, requests = written(tmp_path / "rows")
    (failed,) = [row for row in requests if row.outcome == "failed"]
    assert failed.stage == "stage"
    assert "division" in failed.detail
    codes = Counter(row.code for row in actions if row.kind == "INFER")
    assert codes["ok"] == 2
    assert codes["model_error"] >= 1
    for row in actions:
        if row.kind == "INFER" and row.code == "ok":
            assert row.start_us is not None
            assert row.duration_us > 0
            assert row.earliest_us <= row.start_us <= row.latest_us


def test_paging_is_told_with_the_memory_that_it_takes(cluster: Any, tmp_path: Path) -> None:
    specs = [
        parse_spec(
            f"name: m{number}\nslo: 30s\nstages:\n"
            "  s: {executor: emulated, max_batch: 1, profile: {alpha_ms: 0, beta_ms: 1, load_ms: 2, memory_mb: 100}}\n"
            "output: s\n",
            file=f"m{number}.yaml",
            root="",
        )
        for number in range(3)
    ]
    cluster.start(telemetry=str(tmp_path))
    device = DeviceConfig("emulated", "emulated", memory_mb=200.0)
    cluster.serve(*specs, devices=[device], telemetry=str(tmp_path))
    client = cluster.client()
    for _ in range(4):
        for spec in specs:
            client.infer(spec.name, 1)
    cluster.settle(ok=12)
    cluster.close()
    cluster.agents.clear()
    actions, requests = written(tmp_path)
    assert all(row.memory_mb <= 200.0 for row in actions)
    assert max(row.memory_mb for row in actions) == 200.0
    assert not [row for row in actions if row.start_us is not None and row.start_us > row.latest_us]
    loads = [row for row in actions if row.kind == "LOAD" and row.code == "ok"]
    assert loads
    assert all(row.start_us is not None and row.duration_us >= 2000 for row in loads)
    assert any(row.cold for row in requests)
