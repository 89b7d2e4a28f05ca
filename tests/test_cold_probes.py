"""One bad measurement must not close a model for ever, also one that has to be loaded before anything can be measured
of it again."""

from __future__ import annotations

import itertools

import pytest

from broker.engine.fleet import HeldModel
from broker.engine.limits import Limits
from broker.engine.request import Client, Request
from broker.engine.scheduler import Scheduler
from broker.plans import build_pipeline
from laxity.outcomes import Outcome
from laxity.payload import encode
from pipelines import parse_spec

RUN = 0.010
LOAD = 0.050
SPEC = """
name: {name}
slo: 400ms
stages: {{s: {{executor: emulated, profile: {{alpha_ms: 0, beta_ms: 10}}, max_batch: 4, inputs: [request]{cost}}}}}
output: s
"""
COST = ", cost: {buckets: [10, 100]}"


class World:
    """Pipelines a and b on one device that has room for one of their models at a time, in virtual time."""

    def __init__(self, cost: str = "") -> None:
        self.scheduler = Scheduler(Limits(), overhead=0.0005)
        self.now = 0.0
        self.run_takes = RUN
        self.load_takes = LOAD
        self.loads = 0
        self.client = Client("c")
        self._ids = itertools.count()
        self._due: list[tuple[float, int, str, int]] = []
        models = []
        for name in "ab":
            spec = parse_spec(SPEC.format(name=name, cost=cost), file="x.yaml", root="")
            self.scheduler.apply(build_pipeline(spec))
            models.append(HeldModel(spec.model_key("s"), "", 100, [(1, RUN), (4, RUN)], False, 100.0, LOAD))
        self.scheduler.report("agent", 0, "gpu", models, 150.0)
        self.scheduler.pull("agent", 0, 0.0)

    def ask(self, name: str, until: float) -> Request:
        """A request, and everything that happens until then."""
        request = self.scheduler.submit(
            self.now, self.client, next(self._ids), name, self.now, -1.0, 0, encode("x" * 5), False
        )
        assert request is not None
        self.run(until)
        return request

    def run(self, until: float) -> None:
        while self.now < until:
            for batch in self.scheduler.dispatch(self.now):
                self._due.append((self.now + self.run_takes, batch.number, "batch", len(batch.tasks)))
            for page in self.scheduler.take_pages():
                takes = self.load_takes if page.load else 0.0
                self.loads += page.load
                self._due.append((self.now + takes, page.action, "page", 0))
            self.scheduler.take_ended()
            first = min(self._due, default=(until, 0, "", 0))
            self.now = max(self.now, min(until, first[0], self.scheduler.next_wake()))
            if first[2] and first[0] <= self.now:
                self._due.remove(first)
                if first[2] == "page":
                    assert self.scheduler.acted(self.now, "agent", first[1], "ok", self.load_takes, "")
                else:
                    answers = [encode("y")] * first[3]
                    assert self.scheduler.done(self.now, "agent", first[1], "ok", self.run_takes, answers, {}, "")
                    self.scheduler.pull("agent", 0, self.now)


@pytest.mark.parametrize("cost", ["", COST])
def test_an_outlier_in_execution_does_not_close_a_model_that_is_paged_out(cost: str) -> None:
    world = World(cost)
    assert world.ask("a", 0.5).outcome is Outcome.OK
    world.run_takes = 2.0
    assert world.ask("a", 3.0).outcome is Outcome.EXPIRED
    world.run_takes = RUN
    assert world.ask("b", 5.0).outcome is Outcome.OK, "and a is paged out"
    loads = world.loads
    assert world.ask("a", 5.1).outcome is Outcome.DROPPED
    outcomes = [world.ask("a", world.now + 0.5).outcome for _ in range(6)]
    assert outcomes.count(Outcome.DROPPED) <= 2, outcomes
    assert outcomes[-3:] == [Outcome.OK] * 3
    assert world.loads == loads + 1


def test_an_outlier_in_loading_does_not_close_a_model() -> None:
    world = World()
    world.load_takes = 5.0
    world.ask("a", 6.0)
    world.load_takes = LOAD
    for turn in range(6):
        world.ask("b", world.now + 3.0)
        outcomes = [world.ask("a", world.now + 0.5).outcome for _ in range(6)]
        assert outcomes[-1] is Outcome.OK, (turn, outcomes)
    assert outcomes[0] is Outcome.OK, "known to be loaded in time again"
