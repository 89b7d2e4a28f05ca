"""``laxity simulate``: what is asked for becomes runs, and what they come out as is told."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli.runs import Run, RunDied, execute_all
from cli.scenario import Demand, Hardware, ScenarioError, build_scenario, one_each, parse_loss, parse_policies
from cli.simulate import simulate
from pipelines import load_spec
from pipelines.capacity import capacity, planned_costs, pool_capacity
from pipelines.policies import POLICIES, PolicyError
from simulation.arrivals import prepare
from simulation.results import RunResult
from simulation.run import Cluster, Fault, Workload

DESIGNED = {
    "policy",
    "trace",
    "submitted",
    "goodput_rps",
    "bound_rps",
    "bound_ratio",
    "drop_rate",
    "avoidable_drop_rate",
    "invalid_rate",
    "gpu_seconds_busy",
    "gpu_seconds_allocated",
    "mean_batch",
    "latency_ms",
    "drops_by_stage",
}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(simulate, [*arguments, "--jobs", "1"])


def figures(*arguments: str) -> list[dict[str, Any]]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    for one in found:
        del one["wall_seconds"]
    return found  # type: ignore[no-any-return]


@pytest.fixture
def trace(tmp_path: Path) -> str:
    file = tmp_path / "busy.csv"
    file.write_text("seconds_offset,requests\n" + "".join(f"{second},{10 + second % 5}\n" for second in range(20)))
    return str(file)


def test_figures_of_two_policies_under_one_trace(trace: str) -> None:
    split = ("--gpus", "8", "--split", "4,1,1,1,1")
    found = figures("lv", *split, "--trace", trace, "--window", "5:8", "--load", "0.8", "--policy", "laxity,naive")
    assert [one["policy"] for one in found] == ["laxity", "naive"]
    for one in found:
        assert set(one) >= DESIGNED
        assert not {"series", "latencies_ms"} & set(one)
        assert set(one["latency_ms"]) == {"p50", "p99", "p999"}
        assert one["trace"] == "busy 5:8"
        assert (one["gpus"], one["split"], one["seconds"]) == (8, [4, 1, 1, 1, 1], 3.0)
        assert list(one["drops_by_stage"]) == list(load_spec("lv").stages)
        assert sum(one["outcomes"].values()) == one["submitted"] > 0
        assert one["gpu_seconds_allocated"] == 24.0
        assert 0 < one["goodput_rps"] <= one["offered_rps"]
    # The same requests under every policy.
    assert found[0]["submitted"] == found[1]["submitted"]


def test_the_seed_decides() -> None:
    arguments = ("lv", "--gpus", "8", "--load", "0.9", "--duration", "2s", "--jitter", "0.1", "--stragglers", "0.05")
    assert figures(*arguments) == figures(*arguments)
    assert figures(*arguments) != figures(*arguments, "--seed", "2")


def test_a_table_for_people() -> None:
    result = run(
        "lv", "--gpus", "8", "--load", "0.8", "--duration", "1s", "--policy", "laxity,clipper++", "--seed", "7"
    )
    assert result.exit_code == 0
    for text in (
        "lv under poisson, 1 s, seed 7",
        "8 GPUs: 4 person_detection, 1 face_recognition",
        "SLO 500ms",
        "of 398.2 req/s",
        "fluid bound",
        "clipper++",
        "drops at",
        "pose_recognition",
    ):
        assert text in result.stdout
    assert result.stderr == ""


def test_several_pipelines_share_a_cluster(trace: str) -> None:
    traces = ("--trace", trace, "--trace", "constant", "--duration", "2s")
    found = figures("lv", "tm", "--gpus", "12", *traces, "--rate", "100", "--rate", "200", "--policy", "laxity,nexus")
    assert [(one["policy"], one["pipeline"]) for one in found] == [
        ("laxity", "lv"),
        ("laxity", "tm"),
        ("nexus", "lv"),
        ("nexus", "tm"),
    ]
    assert [one["trace"] for one in found[:2]] == ["busy 0:2", "constant"]
    assert found[1]["submitted"] == 400
    own, others = sum(found[0]["split"]), sum(found[1]["split"])
    assert own + others == 12
    text = run("lv", "tm", "--gpus", "12", *traces, "--rate", "100", "--rate", "200").stdout
    assert f", {others} for others; SLO 500ms" in text


def test_a_single_pipeline_is_run_once_for_each_load() -> None:
    found = figures("tm", "--gpus", "6", "--duration", "2s", "--trace", "constant", "--load", "0.5", "--load", "1")
    assert [round(one["offered_rps"] / one["capacity_rps"], 1) for one in found] == [0.5, 1.0]
    text = run("tm", "--gpus", "6", "--duration", "1s", "--load", "0.5", "--load", "1").stdout
    assert text.count("tm under poisson, 1") == 2


def test_a_pool_serves_more_stages_than_it_has_gpus() -> None:
    (found,) = figures("lv", "--gpus", "3", "--pool", "--duration", "2s", "--load", "0.5", "--trace", "constant")
    assert found["split"] == []
    assert found["goodput_rps"] > 0
    assert found["offered_rps"] == pytest.approx(0.5 * found["capacity_rps"], rel=0.02)


def test_the_planner_scales_a_pool(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    arguments = ("tm", "--gpus", "16", "--trace", "step:1x6,2x6", "--load", "0.3", "--policy", "laxity,pard")
    (static, _), (scaled, _) = figures(*arguments), figures(*arguments, "--autoscale", "--load-time", "500ms")
    assert (static["scaler"], static["moves"], static["gpu_seconds_allocated"]) == ("", 0, 192.0)
    assert scaled["scaler"] == "planner"
    assert scaled["moves"] > 0
    assert scaled["moves_per_hour"] == 300 * scaled["moves"]
    assert scaled["gpu_seconds_loading"] == pytest.approx(0.5 * scaled["loads"])
    assert 0.2 * 192 < scaled["gpu_seconds_allocated"] < 192
    assert (scaled["submitted"], scaled["capacity_rps"]) == (static["submitted"], static["capacity_rps"])
    result = run(*arguments, "--autoscale", "--html", str(file))
    for text in ("16 GPUs: scaled by the planner; SLO 400ms", "GPU-hours", "planner (pard)"):
        assert text in result.stdout
    html = file.read_text(encoding="utf-8")
    assert "Allocated GPUs" in html
    assert "scaled by the planner" in html


def test_the_planner_lets_stages_share_where_there_are_fewer_gpus() -> None:
    (found,) = figures("lv", "--gpus", "3", "--autoscale", "--rate", "20", "--duration", "3s")
    assert found["goodput_rps"] > 0


def test_an_slo_of_ones_own() -> None:
    arguments = ("lv", "--gpus", "8", "--rate", "100", "--duration", "2s")
    (usual,), (short,) = figures(*arguments), figures(*arguments, "--slo", "80ms")
    assert short["latency_ms"]["p999"] <= 80 < usual["latency_ms"]["p999"]


def test_a_lost_host_is_missed() -> None:
    arguments = ("lv", "--gpus", "16", "--rate", "400", "--duration", "4s", "--policy", "pard")
    (whole,), (lost,) = figures(*arguments), figures(*arguments, "--lose", "0@1:2.5")
    assert lost["goodput_rps"] < whole["goodput_rps"]
    assert lost["submitted"] == whole["submitted"]


def test_the_report_is_written_beside_the_table(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    arguments = ("--gpus", "8", "--load", "0.8", "--duration", "2s", "--html", str(file))
    result = run("tm", *arguments, "--policy", "laxity,pard")
    assert result.exit_code == 0
    assert result.stderr == f"Report: {file}\n"
    html = file.read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    assert all(text in html for text in ("laxity", "pard", "text_recognition", "poisson"))


UNPROFILED = """\
name: plain
slo: 1s
stages:
  first: {executor: python, model: "mycode:first"}
output: first
"""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["lvv", "--gpus", "8", "--load", "1"], "neither a file nor a shipped pipeline"),
        (["lv", "--load", "1"], "say how many GPUs"),
        (["lv", "--gpus", "8"], "give either --rate"),
        (["lv", "--gpus", "8", "--load", "1", "--rate", "5"], "give either --rate"),
        (["lv", "--gpus", "8", "--load", "0"], "x>0"),
        (["lv", "--gpus", "8", "--load", "1"], "poisson has no end"),
        (["lv", "--gpus", "4", "--load", "1", "--duration", "1s"], "4 GPUs cannot be divided over 5 stages"),
        (["lv", "--gpus", "4", "--load", "1", "--duration", "1s"], "--pool"),
        (["lv", "--gpus", "8", "--split", "4,4", "--load", "1", "--duration", "1s"], "2 numbers for 5 stages"),
        (["lv", "--gpus", "8", "--split", "1,1,1,1,1", "--load", "1", "--duration", "1s"], "adds up to 5 GPUs, not 8"),
        (["lv", "--split", "1,x", "--load", "1"], "no list of numbers"),
        (["lv", "--split", "4", "--pool", "--load", "1"], "leave out --split"),
        (["lv", "--gpus", "5", "--split", "1,1,1,1,1", "--autoscale", "--load", "1"], "leave out --split and --pool"),
        (["lv", "--gpus", "8", "--autoscale", "--load", "1", "--load-time", "soon"], "--load-time"),
        (["lv", "--gpus", "8", "--load", "1", "--duration", "1s", "--policy", "parrd"], "did you mean 'pard'?"),
        (["lv", "--gpus", "8", "--load", "1", "--duration", "1s", "--policy", "pard:x=1"], "no parameter 'x'"),
        (["lv", "--gpus", "8", "--load", "1", "--duration", "1s", "--policy", ""], "unknown policy ''"),
        (["lv", "--gpus", "8", "--load", "1", "--trace", "gone.csv"], "there is no trace file 'gone.csv'"),
        (["lv", "--gpus", "8", "--load", "1", "--window", "5"], "BEGIN:END"),
        (["lv", "--gpus", "8", "--rate", "0.001", "--duration", "1s"], "no request falls into 1 s"),
        (["lv", "lv", "--gpus", "16", "--load", "1", "--duration", "1s"], "two of the SPECs are named 'lv'"),
        (["lv", "tm", "--gpus", "16", *["--load", "1"] * 3, "--duration", "1s"], "--load is given 3 times for 2 SPECs"),
        (["lv", "--gpus", "8", "--slo", "1s", "--slo", "2s", "--load", "1"], "--slo is given 2 times"),
        (["lv", "--gpus", "8", "--load", "1", "--duration", "1s", "--slo", "5ms"], "no request can meet 5ms"),
        (["lv", "--gpus", "8", "--load", "1", "--duration", "1s", "--lose", "1@2"], "no host 1"),
        (["lv", "--gpus", "8", "--load", "1", "--duration", "1s", "--lose", "0@2:1"], "HOST@SECOND"),
        (["lv", "--gpus", "8", "--load", "1", "--duration", "1s", "--html", "gone/r.html"], "no directory 'gone'"),
        (["lv", "--gpus", "8", "--load", "1", "--network-delay", "-1"], "no duration"),
        (["lv", "tm", "--gpus", "8", "--load", "1", "--trace", "step:1x2", "--trace", "step:1x3"], "2 s and 3 s"),
        ([], "SPEC"),
    ],
)
def test_wrong_use(arguments: list[str], told: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stdout == ""


def test_a_window_outside_of_the_trace(trace: str) -> None:
    result = run("lv", "--gpus", "8", "--load", "1", "--trace", trace, "--window", "10:50")
    assert result.exit_code == 2
    assert "choose one within 0:20" in result.stderr


def test_a_stage_without_a_profile(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text(UNPROFILED)
    (tmp_path / "mycode.py").write_text("def first(items):\n    return items\n")
    result = run(str(tmp_path / "plain.yaml"), "--gpus", "2", "--rate", "5", "--duration", "1s")
    assert result.exit_code == 2
    assert "stage 'first' of pipeline 'plain' has no profile" in result.stderr


def test_a_bad_pipeline_file_fails(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("name: bad\n")
    result = run(str(file), "--gpus", "2", "--rate", "5", "--duration", "1s")
    assert result.exit_code == 1
    assert "bad.yaml" in result.stderr


def test_policies_of_a_list() -> None:
    assert parse_policies("laxity,pard:lambda=0.2,history=3,nexus") == ["laxity", "pard:lambda=0.2,history=3", "nexus"]
    everything = parse_policies("all,ablations")
    assert set(everything) == set(POLICIES)
    assert "pard-back" not in parse_policies("all")
    assert parse_policies("ablations")[0] == "pard"
    with pytest.raises(PolicyError):
        parse_policies("history=3")


def test_losses() -> None:
    assert parse_loss("2@10:20", 3) == Fault(2, 10.0, 20.0)
    assert parse_loss("0@1.5", 1) == Fault(0, 1.5, math.inf)
    for bad in ("", "1", "x@1", "0@", "0@nan", "0@1:", "-1@2"):
        with pytest.raises(ScenarioError):
            parse_loss(bad, 3)


def test_options_are_given_once_for_all_or_once_for_each() -> None:
    assert one_each([], 2, "--x", "runs", None) == [None, None]
    assert one_each([5], 2, "--x", "runs", None) == [5, 5]
    assert one_each([5, 6], 2, "--x", "runs", None) == [5, 6]
    with pytest.raises(ScenarioError, match="--x is given 2 times for 3 runs"):
        one_each([5, 6], 3, "--x", "runs", None)


def demand(name: str, **of: float) -> Demand:
    return Demand(spec=load_spec(name), source=prepare("constant", seconds=10.0), **of)


def test_loads_are_of_what_a_pipelines_own_gpus_carry() -> None:
    scenario = build_scenario([demand("lv", load=0.5), demand("tm", load=0.9)], Hardware(gpus=24), 1)
    for spec, arrivals, load in zip(scenario.specs, scenario.arrivals, (0.5, 0.9), strict=True):
        gpus = {stage: sum(spec.model_key(stage) in held for held in scenario.held) for stage in spec.stages}
        assert len(arrivals) == pytest.approx(10 * load * capacity(spec, gpus), abs=1)
    assert len(scenario.held) == 24


def test_gpus_follow_the_rates() -> None:
    def gpus(*rates: float) -> int:
        lv, tm = demand("lv", rate=rates[0]), demand("tm", rate=rates[1])
        held = build_scenario([lv, tm], Hardware(gpus=40), 1).held
        return sum(model.startswith("lv@") for (model,) in held)

    assert gpus(300, 100) > gpus(100, 100) > gpus(100, 300)


def test_loads_in_a_pool_add_up() -> None:
    demands = [demand("lv", load=0.7), demand("tm", load=0.7)]
    scenario = build_scenario(demands, Hardware(gpus=10, pool=True), 1)
    specs = scenario.specs
    assert scenario.held == [[spec.model_key(stage) for spec in specs for stage in spec.stages]] * 10
    total = sum(map(len, scenario.arrivals)) / 10
    assert total == pytest.approx(0.7 * pool_capacity(specs, [0.5, 0.5], 10), rel=0.01)
    work = sum(len(a) / 10 * sum(planned_costs(s).values()) for s, a in zip(specs, scenario.arrivals, strict=True))
    assert work == pytest.approx(0.7 * 10, rel=0.01)


def a_run(policy: str, seed: int = 1) -> Run:
    scenario = build_scenario([demand("tm", rate=50.0)], Hardware(gpus=3), seed)
    workloads = [Workload(scenario.specs[0], policy, scenario.arrivals[0])]
    return Run(workloads=workloads, cluster=Cluster(held=scenario.held), seconds=scenario.seconds, seed=seed)


def outcome(results: list[list[RunResult]]) -> list[Any]:
    return [(one.policy, one.goodput_rps, one.gpu_seconds_busy, one.series) for many in results for one in many]


def test_processes_of_their_own_change_nothing() -> None:
    runs = [a_run("laxity"), a_run("pard"), a_run("nexus")]
    done: dict[int, float] = {}
    apart = execute_all(runs, 2, done.__setitem__)
    together = execute_all(runs, 1, lambda *_: None)
    assert outcome(apart) == outcome(together)
    assert done == {0: 1.0, 1: 1.0, 2: 1.0}


def test_what_a_run_raises_is_raised() -> None:
    with pytest.raises(PolicyError, match="unknown policy"):
        execute_all([a_run("laxity"), a_run("nothing")], 2, lambda *_: None)


class Deadly(Workload, frozen=True):
    """Ends the process that it is unpickled in, and is well in the one that it was made in."""

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return os._exit, (7,)


def test_a_run_whose_process_dies_is_told() -> None:
    run = a_run("laxity")
    (workload,) = run.workloads
    deadly = Run(
        workloads=[Deadly(workload.spec, workload.policy, workload.arrivals)],
        cluster=run.cluster,
        seconds=run.seconds,
        seed=run.seed,
    )
    with pytest.raises(RunDied, match="status 7"):
        execute_all([deadly, run], 2, lambda *_: None)
