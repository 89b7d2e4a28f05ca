"""L_sub by hand: Σd, Σq + Σd, Σq + Σd + w along chains, and the maximum over the paths of graphs."""

from __future__ import annotations

import pytest

from broker.engine.downstream import downstream
from broker.engine.plan import Pipeline, StagePlan
from broker.engine.policy import make_policy
from broker.engine.predictor import LatencyTable
from broker.engine.stage import Stage
from broker.plans import build_pipeline
from pipelines.load import load_spec
from pipelines.policies import POLICIES

MS = 1e-3
BIN = 0.5
"""A bin of the batch waits' distributions, and a little more, in ms."""
CHAIN: dict[str, list[str]] = {"a": [], "b": ["a"], "c": ["b"]}
FORK: dict[str, list[str]] = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}


class Graph:
    """A pipeline whose stages take, in batches of any size, ``execution`` ms, and where requests have lately waited
    ``queued`` ms in the queue and ``batch_waits`` ms for their batch to start."""

    def __init__(
        self,
        policy: str,
        parents: dict[str, list[str]],
        execution: dict[str, float],
        queued: dict[str, float] | None = None,
        batch_waits: dict[str, list[float]] | None = None,
    ) -> None:
        names = list(parents)
        plans = [
            StagePlan(
                name,
                Stage(f"p@1/{name}", "", 8, 1000),
                [(names.index(parent), "") for parent in sources] or [(-1, "")],
                False,
                1,
            )
            for name, sources in parents.items()
        ]
        self.pipeline = Pipeline("p", 1.0, plans, [("", len(plans) - 1, "")], make_policy(policy, {}))
        self.tables: list[LatencyTable | None] = []
        for plan in plans:
            self.tables.append(LatencyTable(8, [(1, execution[plan.name] * MS), (8, execution[plan.name] * MS)]))
            waits = plan.stage.waits
            for wait in (batch_waits or {}).get(plan.name, [0.0]):
                waits.note((queued or {}).get(plan.name, 0.0) * MS, wait * MS)
            waits.end_period()

    def behind(self, hop_ms: float = 0.0) -> list[float]:
        """L_sub by stage, in ms."""
        return [seconds / MS for seconds in downstream(self.pipeline, self.tables, [hop_ms * MS] * len(self.tables))]


def evenly(most_ms: float, count: int = 1000) -> list[float]:
    return [(at + 0.5) * most_ms / count for at in range(count)]


# ---- chains --------------------------------------------------------------------------------------

EXECUTION = {"a": 10.0, "b": 20.0, "c": 40.0}
QUEUED = {"a": 100.0, "b": 3.0, "c": 5.0}
BATCH_WAITS = {"a": evenly(10.0), "b": evenly(20.0), "c": evenly(40.0)}


@pytest.mark.parametrize("policy", ["pard-back", "pard-oc", "pard-split", "pard-wcl", "nexus", "symphony", "naive"])
def test_nothing_is_foreseen(policy: str) -> None:
    assert Graph(policy, CHAIN, EXECUTION, QUEUED, BATCH_WAITS).behind(1.0) == [0.0, 0.0, 0.0]


def test_executions_alone() -> None:
    """b and c behind a, c behind b, each with its way to the device and back."""
    graph = Graph("pard-sf", CHAIN, EXECUTION, QUEUED, BATCH_WAITS)
    assert graph.behind() == pytest.approx([60.0, 40.0, 0.0])
    assert graph.behind(1.0) == pytest.approx([62.0, 41.0, 0.0])


@pytest.mark.parametrize("policy", ["laxity", "pard-lower"])
def test_queueing_and_execution(policy: str) -> None:
    graph = Graph(policy, CHAIN, EXECUTION, QUEUED, BATCH_WAITS)
    assert graph.behind(1.0) == pytest.approx([20 + 40 + 3 + 5 + 2, 40 + 5 + 1, 0.0])


def test_the_longest_batch_wait_is_an_execution() -> None:
    graph = Graph("pard-upper", CHAIN, EXECUTION, QUEUED, BATCH_WAITS)
    assert graph.behind() == pytest.approx([2 * 20 + 2 * 40 + 3 + 5, 2 * 40 + 5, 0.0])


@pytest.mark.parametrize("policy", ["pard", "pard-instant", "pard-fcfs", "pard-hbf", "pard-lbf"])
def test_queueing_execution_and_a_quantile_of_the_batch_waits(policy: str) -> None:
    """λ = 0.1. Behind b there is one wait, uniform to 40: 4. Behind a the sum of one to 20 and one to 40, which is
    below x <= 20 with probability x² / 1600: 12.65."""
    graph = Graph(policy, CHAIN, EXECUTION, QUEUED, BATCH_WAITS)
    assert graph.behind() == pytest.approx([68 + 160**0.5, 45 + 4.0, 0.0], abs=BIN)


def test_lambda_chooses_the_quantile() -> None:
    graph = Graph("pard", {"a": [], "b": ["a"]}, {"a": 1.0, "b": 100.0}, None, {"b": evenly(100.0)})
    for part in (0.05, 0.5, 0.9):
        graph.pipeline.quantile = part
        assert graph.behind() == pytest.approx([100.0 + part * 100.0, 0.0], abs=BIN)


def test_without_measured_waits_only_executions_are_left() -> None:
    graph = Graph("pard", CHAIN, EXECUTION)
    assert graph.behind() == pytest.approx([60.0, 40.0, 0.0], abs=BIN)


def test_a_stage_counts_with_its_typical_batch() -> None:
    graph = Graph("pard-sf", {"a": [], "b": ["a"]}, {"a": 1.0, "b": 1.0})
    graph.tables[1] = LatencyTable(8, [(1, 10 * MS), (8, 80 * MS)])
    graph.pipeline.stages[1].stage.target = 8
    assert graph.behind() == pytest.approx([80.0, 0.0])
    graph.pipeline.stages[1].stage.granted(3)
    assert graph.behind() == pytest.approx([30.0, 0.0])


def test_a_map_stage_counts_with_the_rounds_of_its_items() -> None:
    """Twelve items in batches of 4 on two devices: one and a half rounds of 10 ms."""
    graph = Graph("pard-sf", {"a": [], "b": ["a"]}, {"a": 1.0, "b": 10.0})
    plan = graph.pipeline.stages[1]
    plan.is_map = True
    plan.note_items(12)
    plan.stage.devices = 2
    plan.stage.granted(4)
    assert graph.behind() == pytest.approx([15.0, 0.0])


def test_a_stage_that_nobody_serves_takes_no_time() -> None:
    graph = Graph("pard", CHAIN, EXECUTION)
    graph.tables[1] = None
    assert graph.behind() == pytest.approx([40.0, 40.0, 0.0], abs=BIN)
    graph.tables[2] = None
    assert graph.behind() == pytest.approx([0.0, 0.0, 0.0], abs=BIN)


# ---- graphs --------------------------------------------------------------------------------------


def test_the_shape_of_da() -> None:
    """person -> {pose, face} -> expression: the path over the slower of the two counts, whichever that is."""
    pipeline = build_pipeline(load_spec("da"), "pard-sf")
    numbers = {plan.name.partition("_")[0]: number for number, plan in enumerate(pipeline.stages)}
    for slower, faster in (("pose", "face"), ("face", "pose")):
        times = {"person": 10.0, slower: 60.0, faster: 20.0, "expression": 30.0}
        tables: list[LatencyTable | None] = [None] * len(pipeline.stages)
        for name, number in numbers.items():
            tables[number] = LatencyTable(64, [(1, times[name] * MS), (64, times[name] * MS)])
        behind = downstream(pipeline, tables, [0.0] * len(tables))
        assert {name: behind[number] / MS for name, number in numbers.items()} == pytest.approx(
            {"person": 90.0, "pose": 30.0, "face": 30.0, "expression": 0.0}
        )


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("pard-sf", 60 + 30),  # over b by d
        ("laxity", 20 + 50 + 30),  # over c by q + d
        ("pard-lower", 20 + 50 + 30),
        ("pard-upper", 2 * 60 + 2 * 30),  # over b by 2 d: 20 + 50 + 20 over c are less
        ("pard", 20 + 50 + 30),
    ],
)
def test_the_path_that_is_longest_in_all_counts(policy: str, expected: float) -> None:
    """a -> {b, c} -> d: b executes for long, at c requests wait for long."""
    execution = {"a": 10.0, "b": 60.0, "c": 20.0, "d": 30.0}
    graph = Graph(policy, FORK, execution, {"c": 50.0})
    assert graph.behind()[0] == pytest.approx(expected, abs=BIN)


def test_batch_waits_decide_between_paths_too() -> None:
    """b and c alike but for their batch waits: 50 at b always, none at c. No wait at d."""
    execution = {"a": 10.0, "b": 60.0, "c": 60.0, "d": 30.0}
    for waiting in "bc":
        graph = Graph("pard", FORK, execution, None, {waiting: [50.0] * 10})
        assert graph.behind() == pytest.approx([140.0, 30.0, 30.0, 0.0], abs=1.0)


@pytest.mark.parametrize("policy", POLICIES)
def test_more_behind_is_never_less(policy: str) -> None:
    graph = Graph(policy, FORK, {"a": 1.0, "b": 5.0, "c": 3.0, "d": 7.0}, {"c": 9.0}, {"b": evenly(5.0)})
    a, b, c, d = graph.behind(0.5)
    assert a >= b >= d == 0.0
    assert a >= c >= d
