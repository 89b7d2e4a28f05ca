"""Deferred against eager dispatch: one model, Poisson arrivals, in virtual time.

For models whose batches pay (β/α large) under a tight SLO: the highest rate with at most 1 % bad, that is dropped or
late, on 8, 16 and 64 GPUs, and how bad it gets beyond it (the cliff). Then the fewest GPUs that carry a given rate.
``laxity`` and ``symphony`` defer; ``nexus``, ``shepherd`` and ``clockwork`` start at once. The network has the delays
of Symphony's own scheduler: 100 µs for a message and up to 100 µs of jitter, 50 µs for each request of a grant, 2 ms
for results. Beside them what that scheduler reaches, deferred and eager, and the bound N·b/l(b) for the largest b with
l(b) + delays <= SLO.

Each rate is tried with several seeds; the first seconds of each run are not counted. Rates are steps of 0.5 % of the
bound, found by bisection.

    python benchmarks/deferral.py --save runs.jsonl           # goes on where it was cut off
    python benchmarks/deferral.py --parts peak --gpus 8 --policies laxity,nexus --seconds 3 --seeds 1
    python benchmarks/deferral.py --parts fewest --rates 24000
    .venv-compiled/bin/python benchmarks/deferral.py          # the compiled engine, five times as fast

A file of saved runs knows nothing of the engine: use another one when that has changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import msgspec
from simulated_runs import Result, add_options, chosen, execute_all, print_json, print_table

from pipelines.spec import PipelineSpec, Profile, StageSpec
from simulation.arrivals import prepare
from simulation.run import Cluster, Network, Workload, simulate

NETWORK = Network(control=100e-6, per_request=50e-6, response=2e-3, jitter=100e-6)
BAD = 0.01
STEP = 0.005
"""Of the bound: how finely the highest rate is found."""
TOP = 1.1
"""Times the bound: where nothing is looked for any more."""
BEYOND = [0.01, 0.02, 0.05, 0.10]
"""How far above the highest rate the cliff is looked for."""
GRACE = 0.01
"""What may be bad there beside 1 % and the excess itself: more is a cliff."""
MOST_GPUS = 128
WARM_UP = 3
"""Seconds of each run that are not counted."""
MAX_BATCH = 256
"""So large that it never binds."""


class Model(msgspec.Struct, frozen=True):
    """l(b) = α·b + β, and the SLO; all in milliseconds."""

    alpha: float
    beta: float
    slo: float

    def latency(self, batch: int) -> float:
        return self.alpha * batch + self.beta

    def bound(self, gpus: int) -> float:
        """Requests per second on ``gpus`` GPUs in the largest batches that can be in time."""
        overhead, each = 1e3 * (NETWORK.control + NETWORK.response), 1e3 * NETWORK.per_request
        fit = [batch for batch in range(1, MAX_BATCH + 1) if self.latency(batch) + overhead + batch * each <= self.slo]
        return gpus * 1e3 * fit[-1] / self.latency(fit[-1])

    def __str__(self) -> str:
        return f"α={self.alpha:g} ms, β={self.beta:g} ms, SLO {self.slo:g} ms"


STEEP = Model(0.4, 12, 50)
RESNET = Model(1.082, 5.204, 100)
OWN = {
    (STEEP, 8): (13_437, 12_058),
    (STEEP, 16): (28_079, 25_458),
    (STEEP, 64): (113_478, 105_193),
    (RESNET, 8): (6_683, 6_683),
    (RESNET, 16): (13_659, 13_659),
    (RESNET, 64): (55_233, 55_233),
}
"""What Symphony's own scheduler carries, deferred and eager."""
THRIFTY = Model(0.2, 20, 50)
"""Of which deferral needs 64 % fewer GPUs in theory."""
PARTS = ["peak", "fewest"]
POLICIES = ["laxity", "symphony", "nexus", "shepherd", "clockwork"]


class Peak(msgspec.Struct, frozen=True):
    """The highest rate that so many GPUs carry."""

    model: Model
    gpus: int
    policy: str
    seconds: int
    seeds: tuple[int, ...]


class Fewest(msgspec.Struct, frozen=True):
    """The fewest GPUs that carry a rate."""

    model: Model
    rate: float
    policy: str
    seconds: int
    seeds: tuple[int, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), metavar="NAME,...", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--gpus", default="8,16,64", metavar="N,...", help="whose highest rates are found")
    parser.add_argument("--rates", default="24000,40000,60000", metavar="N,...", help="that the fewest GPUs carry")
    parser.add_argument("--policies", default=",".join(POLICIES), metavar="NAME,...")
    parser.add_argument("--seconds", type=int, default=10, help=f"of each run, beside {WARM_UP} that are not counted")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each rate, of the seeds from --seed up")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    add_options(parser)
    options = parser.parse_args()
    seeds = tuple(range(options.seed, options.seed + options.seeds))
    policies = chosen(parser, options.policies)
    parts = chosen(parser, options.parts, PARTS)
    searches: list[Peak | Fewest] = []
    if "peak" in parts:
        searches += [
            Peak(model, int(gpus), policy, options.seconds, seeds)
            for model in (STEEP, RESNET)
            for gpus in options.gpus.split(",")
            for policy in policies
        ]
    if "fewest" in parts:
        searches += [
            Fewest(THRIFTY, float(rate), policy, options.seconds, seeds)
            for rate in options.rates.split(",")
            for policy in policies
        ]
    # The longest first, so that no process is left alone with one of them.
    searches.sort(key=lambda search: -(search.rate if isinstance(search, Fewest) else 2 * search.gpus * 1e3))
    results = execute_all(execute, searches, options, label)
    found = dict(zip(searches, results, strict=True))
    peaks = {search: result for search, result in found.items() if isinstance(search, Peak)}
    misses = [miss for search, result in peaks.items() if search.policy == "laxity" for miss in missed(search, result)]
    if options.json:
        print_json(searches, results, misses=misses)
        return
    print(f"Runs of {WARM_UP} + {options.seconds} s, seeds {', '.join(map(str, seeds))}\n")
    for model, gpus in dict.fromkeys((search.model, search.gpus) for search in sorted(peaks, key=lambda s: s.gpus)):
        group = {
            search.policy: result for search, result in peaks.items() if (search.model, search.gpus) == (model, gpus)
        }
        print(
            f"{model}, {gpus} GPUs: highest Poisson rate with at most {BAD:.0%} bad; bound {model.bound(gpus):,.0f}\n"
        )
        print_table(peak_rows(model, gpus, {name: group[name] for name in policies}), options.markdown)
        print()
    if peaks:
        print(f"Aims for laxity: {f'{len(misses)} missed' if misses else 'all reached'}", *misses, sep="\n- ")
        print()
    if "fewest" in parts:
        print(f"{THRIFTY}: fewest GPUs that carry a Poisson rate with at most {BAD:.0%} bad\n")
        rates = [float(rate) for rate in options.rates.split(",")]
        rows = [["policy", *(f"{rate:,.0f}/s" for rate in rates)]]
        for policy in policies:
            numbers = [found[Fewest(THRIFTY, rate, policy, options.seconds, seeds)]["gpus"] for rate in rates]
            rows.append([policy, *(str(number) if number <= MOST_GPUS else f">{MOST_GPUS}" for number in numbers)])
        print_table(rows, options.markdown)


def execute(search: Peak | Fewest) -> Result:
    if isinstance(search, Fewest):
        return {"gpus": smallest(1, MOST_GPUS + 1, lambda gpus: trial(search, search.rate, gpus)["bad"] <= BAD)}
    unit = STEP * search.model.bound(search.gpus)
    first_bad = smallest(1, round(TOP / STEP) + 1, lambda n: trial(search, n * unit, search.gpus)["bad"] > BAD)
    rate = (first_bad - 1) * unit
    if rate == 0.0:
        return {"rate": 0.0, "bad": 0.0, "mean_batch": 0.0, "busy": 0.0, "beyond": [1.0] * len(BEYOND)}
    beyond = [trial(search, rate * (1 + excess), search.gpus)["bad"] for excess in BEYOND]
    return {"rate": rate, **trial(search, rate, search.gpus), "beyond": beyond}


def smallest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The smallest number from ``low`` up that a condition holds for, if it then holds for all above; else ``high``."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def trial(search: Peak | Fewest, rate: float, gpus: int) -> Result:
    """How one rate fares: the bad part of the requests, over all seeds."""
    model = search.model
    stage = StageSpec(
        executor="emulated", profile=Profile(alpha_ms=model.alpha, beta_ms=model.beta), max_batch=MAX_BATCH
    )
    spec = PipelineSpec(name="one", slo=model.slo / 1e3, stages={"model": stage}, output="model")
    cluster = Cluster(held=[[spec.model_key("model")]] * gpus, network=NETWORK)
    seconds = WARM_UP + search.seconds
    offered = good = 0
    batches, busy = [], []
    for seed in search.seeds:
        arrivals = prepare("poisson", seconds=seconds).draw(rate, seed)
        workload = Workload(spec, search.policy, arrivals)
        (result,) = simulate([workload], cluster, seconds=seconds, seed=seed)
        offered += sum(result.series.offered[WARM_UP:])
        good += sum(result.series.good[WARM_UP:])
        batches.append(result.mean_batch)
        busy.append(result.gpu_seconds_busy / result.gpu_seconds_allocated)
    return {
        "bad": 1 - good / max(offered, 1),
        "mean_batch": sum(batches) / len(batches),
        "busy": sum(busy) / len(busy),
    }


def label(search: Peak | Fewest) -> str:
    amount = f"{search.gpus} GPUs" if isinstance(search, Peak) else f"{search.rate:,.0f}/s"
    return f"{search.model}, {amount}, {search.policy}"


def missed(search: Peak, result: Result) -> list[str]:
    """The aims that ``laxity`` misses on some GPUs: to carry more than Symphony's own, and to have no cliff."""
    where = f"{search.model}, {search.gpus} GPUs"
    misses = []
    own = max(OWN.get((search.model, search.gpus), (0, 0)))
    if result["rate"] <= own:
        misses.append(f"{where}: {result['rate']:,.0f} per second, Symphony's own {own:,}")
    for excess, bad in zip(BEYOND, result["beyond"], strict=True):
        allowed = BAD + excess / (1 + excess) + GRACE
        if bad > allowed:
            misses.append(f"{where}: {bad:.1%} bad at {excess:.0%} above the highest rate, {allowed:.1%} would be due")
    return misses


def peak_rows(model: Model, gpus: int, group: dict[str, Result]) -> list[list[str]]:
    bound = model.bound(gpus)
    rows = [["policy", "rate", "/bound", "batch", "busy", "bad", *(f"+{excess:.0%}" for excess in BEYOND)]]
    for name, result in group.items():
        rows.append(
            [
                name,
                f"{result['rate']:,.0f}",
                f"{result['rate'] / bound:.3f}",
                f"{result['mean_batch']:.1f}",
                f"{result['busy']:.1%}",
                f"{result['bad']:.2%}",
                *(f"{bad:.2%}" for bad in result["beyond"]),
            ]
        )
    for name, rate in zip(
        ("Symphony's own, deferred", "Symphony's own, eager"), OWN.get((model, gpus), ()), strict=False
    ):
        rows.append([name, f"{rate:,}", f"{rate / bound:.3f}", *["-"] * (len(rows[0]) - 3)])
    return rows


if __name__ == "__main__":
    main()
