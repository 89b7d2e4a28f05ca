"""The scheduler's own speed: submit -> window -> grant -> done, without sockets, on one core, in virtual time.

Requests come at a steady rate, about three quarters of what the GPUs carry, in drains as a shard takes them from its
sockets: those of one drain are submitted, then ``dispatch`` is called once. The model is Symphony's ResNet-50
(l(b) = 1.082 ms · b + 5.204 ms, SLO 100 ms). Cases: one stage on 1 to 512 GPUs; then 1 to 512 stages, each a pipeline
of its own that requests go to at random, with a GPU each (*own*) or with 64 GPUs that hold all of them (*pool*; where
the stages are more than the GPUs their SLO is longer by as much, so that their batches are not smaller).

Told are requests per second of wall time (of the scheduler's calls and of the interpreted loop that makes them; what
such a loop takes alone, with calls that do nothing, is told as *loop*), µs a request, and how they grow with GPUs and
stages. What the scheduler does once a second (rates, plans) is not in it, because virtual seconds pass faster or slower
than real ones; it is told apart, in ms a second. A plain loop of ``heapq`` pushes and pops, one of each a request, is
measured with each run, because these machines are noisy: what counts is the ratio. At last, stage visits per second in
simulation: lv on 64 GPUs, Poisson arrivals at load 0.85.

    python benchmarks/engine.py
    .venv-compiled/bin/python benchmarks/engine.py           # the compiled engine (`make bench` makes it)
    python benchmarks/engine.py --cases gpus-64,pool-512 --policy symphony --drain 128
    python benchmarks/engine.py --profile gpus-1             # where the time goes, interpreted
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import random
import statistics
import sys
import time
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from simulated_runs import chosen

from broker.engine import scheduler as engine
from broker.engine.fleet import HeldModel
from broker.engine.limits import Limits
from broker.engine.request import Client
from broker.engine.scheduler import Scheduler
from broker.engine.upkeep import REFRESH
from broker.plans import build_pipeline
from broker.process import spare_collector
from cli.scenario import Demand, Hardware, build_scenario
from laxity.outcomes import Outcome
from laxity.payload import encode
from pipelines import load_spec
from pipelines.spec import PipelineSpec, Profile, StageSpec
from simulation.arrivals import prepare
from simulation.run import Cluster, Workload, simulate

ALPHA, BETA, SLO = 1.082e-3, 5.204e-3, 0.1
BATCH = 40
"""l(BATCH) fits twice into the SLO, just about; the rate is LOAD times what the GPUs carry in such batches."""
LOAD = 0.75
TRAVEL = 300e-6
"""Virtual seconds that a batch takes beside its execution."""
WARM_UP = 4.0
"""Virtual seconds in which the scheduler learns rates and makes its plans."""
HEAP = 1024
"""Entries in the heap of the reference."""
POOL = 64
SPLIT_OF_LV = [40, 6, 5, 7, 6]
VISITS_SECONDS = 20.0


class Case(NamedTuple):
    gpus: int
    stages: int
    pooled: bool = False

    def slo(self) -> float:
        return SLO * max(1.0, self.stages / self.gpus)

    def rate(self) -> float:
        return LOAD * self.gpus * BATCH / (ALPHA * BATCH + BETA)


CASES = {
    **{f"gpus-{count}": Case(count, 1) for count in (1, 8, 64, 512)},
    **{f"own-{count}": Case(count, count) for count in (64, 512)},
    **{f"pool-{count}": Case(POOL, count, True) for count in (1, 64, 512)},
}
BASES = {"gpus": "gpus-1", "own": "gpus-1", "pool": "pool-1"}
"""What a kind's cost is compared with."""


class Run(NamedTuple):
    """One run; µs a request save ``upkeep``, in ms of each virtual second."""

    cost: float
    loop: float
    heap: float
    upkeep: float
    batch: float
    good: float


class Shard:
    """A scheduler with its pipelines and GPUs, and the loop that a shell would be."""

    def __init__(self, case: Case, policy: str, drain: int, seed: int, spans: bool) -> None:
        self.scheduler = Scheduler(Limits(1 << 60, 1 << 60, 1 << 60), spans=spans)
        self.names = [f"p{number}" for number in range(case.stages)]
        self.client = Client("bench")
        self.payload = encode(b"x" * 64)
        self.drain = drain
        self.interval = drain / case.rate()
        self.now = self.next_drain = 0.0
        self.submitted = self.ended = self.batches = 0
        self.upkeep = 0.0
        """Wall seconds of what is done once a (virtual) second."""
        self._refresh_at = 0.0
        self._random = random.Random(seed)
        self._seconds = [0.0, *(ALPHA * batch + BETA for batch in range(1, 257))]
        self._ends: list[tuple[float, int, str, int]] = []
        """(when, batch, agent, elements) of what runs."""
        model = StageSpec(executor="emulated", profile=Profile(alpha_ms=ALPHA * 1e3, beta_ms=BETA * 1e3), max_batch=160)
        held = []
        for name in self.names:
            spec = PipelineSpec(name=name, slo=case.slo(), stages={"model": model}, output="model")
            self.scheduler.apply(build_pipeline(spec, policy))
            points = [(batch, self._seconds[batch]) for batch in range(1, 161)]
            held.append(HeldModel(spec.model_key("model"), "", 100, points))
        each = case.stages // case.gpus if not case.pooled and case.stages > 1 else 0
        for gpu in range(case.gpus):
            models = held[gpu * each : (gpu + 1) * each] if each else held
            self.scheduler.report(f"agent-{gpu}", 0, "emulated", models)
            self.scheduler.pull(f"agent-{gpu}", 0, 0.0)

    def choose(self, requests: int) -> list[list[str]]:
        """The pipelines that they are for, by drain."""
        names = self._random.choices(self.names, k=requests)
        return [names[at : at + self.drain] for at in range(0, requests, self.drain)]

    def run(self, drains: list[list[str]]) -> None:
        """The hot loop."""
        scheduler, client, payload, ends, seconds = self.scheduler, self.client, self.payload, self._ends, self._seconds
        submit, dispatch, next_wake = scheduler.submit, scheduler.dispatch, scheduler.next_wake
        done, pull, take_ended = scheduler.done, scheduler.pull, scheduler.take_ended
        clock = time.perf_counter
        number = self.submitted
        next_drain = self.next_drain
        now = self.now
        at = 0
        while at < len(drains):
            wake = next_wake()
            now = max(now, min(next_drain, wake))
            if ends and ends[0][0] < now:
                now = ends[0][0]
            while ends and ends[0][0] <= now:
                _, batch_number, agent, size = heappop(ends)
                done(now, agent, batch_number, "ok", seconds[size], [payload] * size, {}, "")
                pull(agent, 0, now)
            if next_drain <= now:
                for name in drains[at]:
                    submit(now, client, number, name, now, -1.0, 0, payload, False)
                    number += 1
                at += 1
                next_drain += self.interval
            if now >= self._refresh_at:
                begin = clock()
                grants = dispatch(now)
                self.upkeep += clock() - begin
                self._refresh_at = now + REFRESH
            else:
                grants = dispatch(now)
            for batch in grants:
                size = len(batch.tasks)
                heappush(ends, (now + TRAVEL + seconds[size], batch.number, batch.device.agent, size))
            self.batches += len(grants)
            self.ended += len(take_ended())
        self.submitted = number
        self.next_drain = next_drain
        self.now = now

    def good(self) -> int:
        return self.scheduler.ledger.ended_by[Outcome.OK]

    def loop(self, requests: int) -> float:
        """µs a request that the loop over drains takes with calls of as many arguments that do nothing."""
        drains = self.choose(requests)
        done = self.scheduler.done
        results, failures = [self.payload], {}  # type: ignore[var-annotated]
        begin = time.perf_counter()
        for names in drains:
            for name in names:
                done(0.0, name, -1, "ok", 0.0, results, failures, "")
        return (time.perf_counter() - begin) / requests * 1e6


def heap_cost(requests: int) -> float:
    """µs for a push and a pop on a heap of (time, number)."""
    heap = [(random.random(), number) for number in range(HEAP)]
    heapify(heap)
    begin = time.perf_counter()
    for number in range(requests):
        heappush(heap, (heap[0][0] + 1.0, number))
        heappop(heap)
    return (time.perf_counter() - begin) / requests * 1e6


def measure(case: Case, policy: str, drain: int, requests: int, seed: int, spans: bool) -> Run:
    shard = Shard(case, policy, drain, seed, spans)
    shard.run(shard.choose(int(WARM_UP * case.rate())))
    ended, good, batches, upkeep, start = shard.ended, shard.good(), shard.batches, shard.upkeep, shard.now
    heap = heap_cost(100_000)
    drains = shard.choose(requests)
    begin = time.perf_counter()
    shard.run(drains)
    wall = time.perf_counter() - begin
    spent = shard.upkeep - upkeep
    return Run(
        (wall - spent) / requests * 1e6,
        shard.loop(100_000),
        heap,
        spent / (shard.now - start) * 1e3,
        (shard.ended - ended) / max(shard.batches - batches, 1),
        (shard.good() - good) / max(shard.ended - ended, 1),
    )


def visits(policy: str, seed: int) -> float:
    """Simulated stage visits per second of wall time."""
    demand = Demand(spec=load_spec("lv"), source=prepare("poisson", seconds=VISITS_SECONDS), load=0.85)
    scenario = build_scenario([demand], Hardware(gpus=sum(SPLIT_OF_LV), split=SPLIT_OF_LV), seed)
    workload = Workload(scenario.specs[0], policy, scenario.arrivals[0])
    (result,) = simulate([workload], Cluster(held=scenario.held), seconds=scenario.seconds, seed=seed)
    return result.stage_visits / result.wall_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), metavar="NAME,...", help=f"of {', '.join(CASES)}")
    parser.add_argument("--policy", default="laxity")
    parser.add_argument("--drain", type=int, default=32, help="requests submitted between two dispatches (default 32)")
    parser.add_argument("--requests", type=int, default=300_000, help="measured in each run (default 300000)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each case (default 5)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--spans", action="store_true", help="keep how stages went, as shards do that keep traces")
    parser.add_argument("--no-visits", action="store_true", help="leave out the simulation")
    parser.add_argument("--profile", metavar="CASE", choices=list(CASES), help="profile a case instead (interpreted)")
    parser.add_argument("--json", action="store_true", help="print the medians as JSON")
    options = parser.parse_args()
    names = chosen(parser, options.cases, CASES)
    chosen(parser, options.policy)
    compiled = not (engine.__file__ or "").endswith(".py")
    if options.profile:
        if compiled:
            parser.error("a compiled engine cannot be looked into: profile with the source's interpreter")
        profile(CASES[options.profile], options)
        return
    spare_collector()
    runs: dict[str, list[Run]] = {name: [] for name in names}
    rates = []
    for number in range(options.rounds):
        for name in names:
            seed = options.seed + number
            runs[name].append(
                measure(CASES[name], options.policy, options.drain, options.requests, seed, options.spans)
            )
        if not options.no_visits:
            rates.append(visits(options.policy, options.seed))
    rows = [summary(name, runs) for name in names]
    simulated = round(statistics.median(rates)) if rates else None
    if options.json:
        print(json.dumps({"compiled": compiled, "cases": rows, "visits_per_s": simulated}, indent=2))
        return
    print(
        f"{'compiled' if compiled else 'interpreted'}, {options.policy}, drains of {options.drain}, "
        f"{options.requests} requests a run, medians of {options.rounds}; µs a request"
    )
    print(
        f"{'case':<10}{'requests/s':>12}{'µs':>8}{'loop':>7}{'heap':>7}{'x heap':>8}{'growth':>8}"
        f"{'upkeep ms/s':>13}{'batch':>7}{'good':>8}"
    )
    for row in rows:
        growth = f"{row['growth']:.2f}" if row["growth"] is not None else "-"
        print(
            f"{row['case']:<10}{row['requests_per_s']:>12,}{row['us']:>8.3f}{row['loop_us']:>7.3f}{row['heap_us']:>7.3f}"
            f"{row['times_heap']:>8.2f}{growth:>8}{row['upkeep_ms_per_s']:>13.2f}{row['batch']:>7.1f}{row['good']:>8.2%}"
        )
    if simulated is not None:
        print(f"simulated stage visits per second of wall time (lv, 64 GPUs): {simulated:,}")


def summary(name: str, runs: dict[str, list[Run]]) -> dict[str, object]:
    cost, loop, heap, upkeep, batch, good = (statistics.median(figures) for figures in zip(*runs[name], strict=True))
    base = runs.get(BASES[name.partition("-")[0]])
    growth = None
    if base is not None:
        # Within a round: those were measured close to one another.
        growth = statistics.median(run.cost / first.cost for run, first in zip(runs[name], base, strict=True))
    return {
        "case": name,
        "requests_per_s": round(1e6 / cost),
        "us": cost,
        "loop_us": loop,
        "heap_us": heap,
        "times_heap": statistics.median(run.cost / run.heap for run in runs[name]),
        "growth": growth,
        "upkeep_ms_per_s": upkeep,
        "batch": batch,
        "good": good,
    }


def profile(case: Case, options: argparse.Namespace) -> None:
    shard = Shard(case, options.policy, options.drain, options.seed, options.spans)
    shard.run(shard.choose(int(WARM_UP * case.rate())))
    profiler = cProfile.Profile()
    profiler.runcall(shard.run, shard.choose(options.requests))
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
