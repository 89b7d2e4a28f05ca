"""The load generator's arithmetic in virtual time: a server that is a rule, and a clock that moves when waited for."""

from __future__ import annotations

import heapq
import json
import math
from collections import deque
from collections.abc import Callable

import click
import numpy as np
import pytest

from cli.load.generator import Ended, Generator, Sent
from cli.load.page import render
from cli.load.ranges import by_pipeline, parse_parts, parse_range
from cli.load.results import Demand, Measured, StepResult, public, step_result
from cli.load.steps import Done, Steadiness, Step, judged, run_step, run_steps
from cli.load.tally import MOST_BINS, Series, StepTally
from cli.load.traffic import Kind, Mix
from laxity.outcomes import Outcome
from simulation.arrivals import prepare

Server = Callable[[float], tuple[float, Outcome]]
"""When (and how) a request that is sent at some time ends."""


class World:
    """Where requests go in virtual time; ``cost`` is what sending one takes the generator."""

    def __init__(self, server: Server, cost: float = 0.0) -> None:
        self.ended: deque[Ended] = deque()
        self.now = 1000.0
        self.most = 0
        self.sent: list[Sent] = []
        self._start = self.now
        self._server = server
        self._cost = cost
        self._under_way: list[tuple[float, int, Sent, Outcome]] = []

    def clock(self) -> float:
        return self.now

    def send(self, sent: Sent) -> None:
        self.now += self._cost
        self._deliver()
        ends, outcome = self._server(self.now - self._start)
        self.sent.append(sent)
        heapq.heappush(self._under_way, (self._start + ends, len(self.sent), sent, outcome))
        self.most = max(self.most, len(self._under_way))
        self._deliver()

    def wait(self, seconds: float, for_answers: bool) -> None:
        assert seconds >= 0
        until = self.now + seconds
        if for_answers and self._under_way:
            until = min(until, max(self._under_way[0][0], self.now))
        self.now = until
        self._deliver()

    def _deliver(self) -> None:
        while self._under_way and self._under_way[0][0] <= self.now:
            at, _, sent, outcome = heapq.heappop(self._under_way)
            detail = "" if outcome is Outcome.OK else f"{outcome} at {at - self._start:.1f}"
            self.ended.append(Ended(sent, at, outcome, "" if outcome is Outcome.OK else "detect", detail))


def takes(seconds: float) -> Server:
    return lambda now: (now + seconds, Outcome.OK)


def stalls(now: float) -> tuple[float, Outcome]:
    """10 ms, but from second 2 to 4 nothing is answered."""
    return (4.0 if 2.0 <= now < 4.0 else now) + 0.01, Outcome.OK


def generator(world: World, most: int = 10_000, payload: bytes = b"x") -> Generator:
    return Generator(world, Mix([Kind("lv")], {"lv": [payload]}, 1), most)


def never(_elapsed: float) -> bool:
    return False


def constant(rate: float, seconds: float):
    return prepare("constant", seconds=seconds).draw(rate, 1)


def latencies_ms(tally: StepTally, part: float) -> float:
    (whole,) = tally.of_intervals()
    found = whole.latency.quantile(part)
    assert found is not None
    return found / 1e3


def test_an_open_loop_sends_when_requests_are_due() -> None:
    world, tally, arrivals = World(takes(0.01)), StepTally(1), constant(100, 10)
    assert generator(world).open_loop(arrivals, tally, never) == math.inf
    assert [sent.at for sent in world.sent] == arrivals.tolist()
    assert (tally.submitted, tally.ok, tally.not_good) == (1000, 1000, 0)
    assert latencies_ms(tally, 0.5) == latencies_ms(tally, 1.0) == pytest.approx(10, rel=0.002)
    assert tally.lag.most < 1.0
    assert [one.outcomes[Outcome.OK] for one in tally.series.bins] == [100] * 10


def test_a_stall_is_not_omitted() -> None:
    """Of the 200 requests that were due while the server stalled, the first waited for two seconds, the last hardly.
    A closed loop sends one of them, and shows one."""
    world, open_tally = World(stalls), StepTally(1)
    generator(world).open_loop(constant(100, 10), open_tally, never)
    assert latencies_ms(open_tally, 0.79) < 20
    assert latencies_ms(open_tally, 0.9) == pytest.approx(1000, rel=0.03)
    assert latencies_ms(open_tally, 0.99) == pytest.approx(1900, rel=0.03)
    closed_tally = StepTally(1)
    generator(World(stalls)).closed_loop(1, 10.0, closed_tally, never)
    assert latencies_ms(closed_tally, 0.99) < 20
    assert latencies_ms(closed_tally, 1.0) == pytest.approx(2010, rel=0.02)


def test_a_late_generator_says_so_and_does_not_flatter() -> None:
    """Sending takes 20 ms, and one is due each 10 ms: the hundredth is a second late, as its latency says."""
    world, tally = World(takes(0.01), cost=0.02), StepTally(1)
    generator(world).open_loop(constant(100, 1), tally, never)
    assert tally.lag.most / 1e6 == pytest.approx(1.0, rel=0.03)
    assert latencies_ms(tally, 1.0) == pytest.approx(1020, rel=0.03)


def test_what_would_be_too_many_is_not_sent() -> None:
    world, tally = World(lambda now: (5.0, Outcome.OK)), StepTally(1)
    generator(world, most=10).open_loop(constant(100, 4), tally, never)
    assert world.most == 10
    assert (tally.submitted, tally.offered, tally.not_good) == (10, 400, 390)
    assert sum(one.unsent for one in tally.series.bins) == 390


def test_bytes_under_way_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.load.generator.MOST_BYTES", 1000)
    world, tally = World(lambda now: (5.0, Outcome.OK)), StepTally(1)
    generator(world, payload=b"x" * 300).open_loop(constant(100, 1), tally, never)
    assert world.most == 3
    large, tally = World(takes(0.001)), StepTally(1)
    generator(large, payload=b"x" * 3000).open_loop(constant(100, 1), tally, never)
    assert tally.submitted == 100  # one alone may be larger


def test_a_closed_loop_keeps_so_many_under_way() -> None:
    world, tally = World(takes(0.1)), StepTally(1)
    assert generator(world).closed_loop(4, 10.0, tally, never) == math.inf
    assert world.most == 4
    assert tally.submitted == pytest.approx(400, abs=4)
    assert latencies_ms(tally, 0.5) == pytest.approx(100, rel=0.002)
    limited = StepTally(1)
    generator(World(takes(0.1))).closed_loop(4, math.inf, limited, never, 10)
    assert limited.submitted == limited.ok == 10


def test_stopping_early() -> None:
    world, tally = World(takes(0.1)), StepTally(1)
    stopped_at = generator(world).open_loop(constant(100, 10), tally, lambda elapsed: elapsed > 2.0)
    assert 2.0 < stopped_at < 2.5
    assert tally.submitted == tally.ok == pytest.approx(100 * stopped_at, abs=2)


def run(server: Server, step: Step, steadiness: Steadiness | None = None, warmup: int = 0) -> tuple[World, Done]:
    world = World(server)
    done = run_step(generator(world), step, 1, 99.0, steadiness, warmup, lambda: False, lambda *_: None)
    return world, done


def test_measured_until_steady() -> None:
    """Slow for 2 s, and so are the first that end in the third: the intervals that agree are those behind."""
    step = Step(Demand("", concurrency=2), None, 10.0)
    _, done = run(lambda now: (now + (0.1 if now < 2.0 else 0.02), Outcome.OK), step, Steadiness(1.0, 10, 5.0))
    assert (done.measured.first, done.measured.last, done.measured.steady) == (3, 6, True)
    assert (done.measured.begin, done.measured.seconds) == (3.0, 3.0)
    assert judged(done, 99.0) == pytest.approx(20, rel=0.01)


def test_what_never_gets_steady_is_told() -> None:
    step = Step(Demand("", rate=50.0), constant(50, 4.0), 4.0)
    _, done = run(lambda now: (now + 0.01 * 2 ** int(now), Outcome.OK), step, Steadiness(1.0, 4, 5.0))
    assert (done.measured.first, done.measured.last, done.measured.steady) == (1, 4, False)


def test_warming_up_is_not_counted() -> None:
    for step in (Step(Demand("", rate=50.0), constant(50, 2), 2.0), Step(Demand("", concurrency=3), None, 2.0)):
        world, done = run(takes(0.05), step, warmup=30)
        assert len(world.sent) == done.tally.submitted + 30


def test_no_more_steps_above_the_threshold() -> None:
    steps = [Step(Demand("", concurrency=number), None, 1.0) for number in (1, 2, 4, 8)]

    def contended(step: Step) -> Done:
        return run(takes(0.01 * (step.demand.concurrency or 0)), step)[1]

    done = run_steps(steps, contended, 99.0, 30.0, lambda: False)
    assert [one.step.demand.concurrency for one in done] == [1, 2, 4]
    assert run_steps(steps, contended, 99.0, None, lambda: True) == []


def mixed_result(seconds: float = 4.0) -> StepResult:
    kinds = [Kind("lv", 0.1, 0, 3.0), Kind("lv", 0.3, 0, 1.0), Kind("tm", None, 0, 4.0)]
    world, tally, arrivals = World(drops), StepTally(3), constant(100, seconds)
    mix = Mix(kinds, {"lv": [b"a", b"b"], "tm": [b"c"]}, 1)
    Generator(world, mix, 50).open_loop(arrivals, tally, never)
    measured = Measured(0, None, 0.0, seconds, None, False)
    stages = {"lv": ("detect", "other"), "tm": ("detect",)}
    return step_result(Demand("100/s", rate=100.0), kinds, tally, measured, 99.0, stages, arrivals, 80.0)


def drops(now: float) -> tuple[float, Outcome]:
    return now + 0.02, Outcome.DROPPED if now >= 2.0 else Outcome.OK


def test_figures_of_a_mix() -> None:
    result = mixed_result()
    total = result.total
    assert (total.offered, total.submitted, total.unsent) == (400, 400, 0)
    assert total.offered_rps == 100.0
    assert total.goodput_rps == total.outcomes["ok"] / 4.0 == pytest.approx(50, abs=1.5)
    assert total.slo_attainment == pytest.approx(0.5, abs=0.02)
    assert (result.capacity_rps, result.bound_rps) == (80.0, 80.0)
    assert result.bound_ratio == pytest.approx(50 / 80, abs=0.02)
    assert [part.pipeline for part in result.pipelines] == ["lv", "tm"]
    assert sum(part.offered for part in result.pipelines) == sum(part.offered for part in result.kinds) == 400
    assert result.pipelines[0].offered == pytest.approx(200, abs=40)
    assert result.kinds[0].offered == pytest.approx(150, abs=35)
    assert list(total.drops_by_stage) == ["lv/detect", "lv/other", "tm/detect"]
    assert sum(total.drops_by_stage.values()) == total.outcomes["dropped"]
    assert {(end.stage, end.outcome) for end in total.ends} == {("lv/detect", "dropped"), ("tm/detect", "dropped")}
    assert total.ends[0].first.startswith("dropped at 2.")
    assert total.latency_ms["p50"] == total.latency_ms["judged"] == pytest.approx(20, rel=0.002)
    plain = public(result)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["goodput_rps"] == total.goodput_rps


def test_nothing_good_has_figures_too() -> None:
    kinds = [Kind("lv")]
    tally = StepTally(1)
    tally.sent(0, 0.0, 0.0)
    tally.ended(0, 0.0, 0.1, 0.1, Outcome.EXPIRED, "", "late")
    result = step_result(Demand(""), kinds, tally, Measured(0, None, 0.0, 1.0, None, True), 99.0, {}, None, None)
    assert result.total.latency_ms["p99"] == result.total.slo_attainment == 0.0
    assert result.bound_rps is None
    assert "interrupted" in render([result], "lv", [], "")


def test_the_page_needs_nothing_else() -> None:
    text = render([mixed_result(), mixed_result(700.0)], "lv, tm <&>", ["about it"], "laxity load lv:3 tm:1")
    assert "lv, tm &lt;&amp;&gt;" in text
    assert "Drops by stage and reason" in text
    assert "Goodput by load" in text
    assert "prefers-color-scheme: dark" in text
    without = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not [word for word in ("http", "<script", "@import", "url(") if word in without]
    assert "nan" not in text.lower().replace("finance", "")


def test_a_long_step_takes_no_more_memory() -> None:
    series = Series()
    for second in range(10_000):
        series.at(float(second)).offered += 1
    assert len(series.bins) <= MOST_BINS
    assert series.width == 32.0
    assert sum(one.offered for one in series.bins) == 10_000
    assert {one.offered for one in series.bins[:-1]} == {32}


def test_a_mix_is_drawn_by_its_parts() -> None:
    kinds = [Kind("a", None, 0, 1.0), Kind("b", 0.2, 1, 3.0)]
    payloads = {"a": ["x"], "b": ["y", "z"]}

    def draw(seed: int) -> list[tuple[str, object, float | None, int]]:
        mix = Mix(kinds, payloads, seed)
        return [call[1:5] for call in (mix.next() for _ in range(4000))]

    drawn = draw(1)
    assert drawn == draw(1) != draw(2)
    counts = {what: drawn.count(what) for what in set(drawn)}
    assert counts == {
        ("a", "x", None, 0): pytest.approx(1000, abs=120),
        ("b", "y", 0.2, 1): pytest.approx(1500, abs=140),
        ("b", "z", 0.2, 1): pytest.approx(1500, abs=140),
    }


def test_ranges() -> None:
    assert parse_range("100") == [100.0]
    assert parse_range("1:4") == [1.0, 2.0, 3.0, 4.0]
    assert parse_range("0.5:1.1:0.2") == [0.5, 0.7, 0.9, 1.1]
    assert np.allclose(parse_range("10:25:10"), [10, 20])
    for wrong in ("", "x", "1:2:3:4", "0", "-1:4", "nan", "inf", "1:2:0", "5:1", "1:1000"):
        with pytest.raises(ValueError, match="range"):
            parse_range(wrong)


def test_parts() -> None:
    assert parse_parts("1:2,3", int) == [(1, 2.0), (3, 1.0)]
    for wrong in ("1:0", "1:x", "1:-2", "1:inf", "x"):
        with pytest.raises(ValueError, match=r"part|invalid"):
            parse_parts(wrong, int)
    assert by_pipeline(["lv=1", "2"], ["lv", "tm"], "--slo") == {"lv": ["1"], "tm": ["2"]}
    with pytest.raises(click.UsageError, match="no pipeline 'la'"):
        by_pipeline(["la=1"], ["lv"], "--slo")
    assert by_pipeline(["la=1"], ["lv"], "--input-data") == {"lv": ["la=1"]}
