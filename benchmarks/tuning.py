"""Tuned λ and window against every fixed setting, and what an admission does where a later stage cannot keep up.

The pipeline lv on 64 GPUs in virtual time: seconds 330-450 of the bursty Twitter trace, the busiest 300 s of three
superposed copies of the Azure trace, and Wikipedia read as seconds; loads as in policies.py. *Tuned* runs the
coordinator's tuner on the engine's reports once a second (simulation/tuned.py). Told is the drop rate, the mean over
the seeds, and how far the tuned one is behind the best fixed one; the aim is never more than 0.3 points. ``laxity``
has a window only: its batches are bound to a GPU when they start, and nothing waits for them.

Then lv with the GPUs of a later stage taken away, tuned with and without admission: goodput, and how much GPU time went
to requests that were not good.

The traces lie in the folder ``traces`` of LAXITY_SHARED (../shared beside this project unless set); without them
nothing is run.

    python benchmarks/tuning.py --seeds 3 --save runs.jsonl      # goes on where it was cut off
    python benchmarks/tuning.py --quantiles 0,0.1,1 --windows 5 --traces twitter --seconds 30
    .venv-compiled/bin/python benchmarks/tuning.py               # the compiled engine, five times as fast

A file of saved runs knows nothing of the engine: use another one when that has changed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import msgspec
from simulated_runs import CASES, SPLITS, Result, add_options, chosen, execute_all, print_json, print_table, skipped

from broker.engine.upkeep import REFRESH
from cli.scenario import Demand, Hardware, build_scenario
from cluster.records import encode
from pipelines import load_spec
from pipelines.capacity import capacity
from simulation.machine import Machine
from simulation.results import public
from simulation.run import Cluster, Workload, simulate
from simulation.tuned import Tuned

PIPELINE = "lv"
QUANTILES = [0.0, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 1.0]
WINDOWS = [1.0, 3.0, 5.0, 7.0]
AIM = 0.003
"""Drop rate that the tuned setting may be behind the best fixed one."""
SPLIT = tuple(SPLITS[PIPELINE])
SHORT = {"2nd stage short": (46, 3, 5, 5, 5), "5th stage short": (46, 6, 5, 5, 2)}
SHORT_CASES = ["twitter", "wikipedia-0.9"]


class TunedRun(msgspec.Struct, frozen=True):
    """One run; ``tuned`` is how: not at all, by the tuner, or by the tuner without admission."""

    case: str
    policy: str
    tuned: str
    seed: int
    seconds: float | None = None
    split: tuple[int, ...] = SPLIT


class Unthinned(Tuned):
    """The tuner without admission."""

    def __call__(self, now: float, machine: Machine) -> None:
        super().__call__(now, machine)
        self.told[-1] = {name: msgspec.structs.replace(record, admission=1.0) for name, record in self.told[-1].items()}


CONTROLS = {"": None, "tuned": Tuned, "without admission": Unthinned}


def execute(run: TunedRun) -> Result:
    """The result's figures; of a tuned run also what was told on the way."""
    case = CASES[run.case]
    spec = load_spec(PIPELINE)
    # The rate stays that of the usual split, whoever is short of GPUs.
    load = case.load * _capacity(SPLIT) / _capacity(run.split)
    demand = Demand(spec=spec, source=case.source(run.seconds), load=load)
    scenario = build_scenario([demand], Hardware(gpus=sum(run.split), split=list(run.split)), run.seed)
    kind = CONTROLS[run.tuned]
    control = kind() if kind is not None else None
    (result,) = simulate(
        [Workload(scenario.specs[0], run.policy, scenario.arrivals[0])],
        Cluster(held=scenario.held),
        seconds=scenario.seconds,
        seed=run.seed,
        trace=scenario.traces[0],
        control=control,
    )
    figures = public(result)
    if control is not None:
        told = [record for records in control.told for record in records.values()]
        figures["told"] = {
            "quantile": _range([record.quantile for record in told]),
            "history": _range([record.history for record in told]),
            "admission": _range([record.admission for record in told]),
            "report_bytes": statistics.mean(len(encode(report)) for report in control.reports),
            "tuning_bytes": statistics.mean(len(encode(record)) for record in told),
        }
    return figures


def _capacity(split: Sequence[int]) -> float:
    spec = load_spec(PIPELINE)
    return capacity(spec, dict(zip(spec.stages, split, strict=True)))


def _range(values: Sequence[float]) -> list[float]:
    return [min(values), statistics.mean(values), max(values)] if values else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", default=",".join(CASES), metavar="NAME,...", help=f"of {', '.join(CASES)}")
    parser.add_argument("--quantiles", default=",".join(f"{value:g}" for value in QUANTILES), metavar="λ,...")
    parser.add_argument("--windows", default=",".join(f"{value:g}" for value in WINDOWS), metavar="SECONDS,...")
    parser.add_argument("--seeds", type=int, default=1, help="from --seed on (default 1)")
    parser.add_argument("--seconds", type=float, help="only the first so many of each window")
    parser.add_argument("--no-short", action="store_true", help="leave out the pipelines with a stage that is short")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    add_options(parser)
    options = parser.parse_args()
    cases = chosen(parser, options.traces, CASES)
    quantiles, windows = options.quantiles.split(","), options.windows.split(",")
    fixed = [f"pard:lambda={quantile},history={window}" for quantile in quantiles for window in windows]
    fixed += [f"laxity:history={window}" for window in windows]
    seeds = range(options.seed, options.seed + options.seeds)
    settings = [(policy, "") for policy in fixed] + [("pard", "tuned"), ("laxity", "tuned")]
    runs = [
        TunedRun(case, policy, tuned, seed, options.seconds)
        for seed in seeds
        for case in cases
        for policy, tuned in settings
    ]
    short_cases = [] if options.no_short else [case for case in cases if case in SHORT_CASES]
    short = [
        TunedRun(case, policy, tuned, options.seed, options.seconds or 120.0, split)
        for case in short_cases
        for split in SHORT.values()
        for policy in ("pard", "laxity")
        for tuned in ("without admission", "tuned")
    ]
    if skipped([CASES[case].trace for case in cases]):
        return
    results = execute_all(execute, runs + short, options, label)
    if options.json:
        print_json(runs + short, results)
        return
    by_run = dict(zip([label(run) for run in runs + short], results, strict=True))
    misses = [miss for case in cases for miss in print_case(case, by_run, settings, seeds, options)]
    if short:
        print_short(short, by_run, options.markdown)
    print(f"Aim (at most {AIM:.1%} of drop rate behind the best): {'missed' if misses else 'reached'}")
    for miss in misses:
        print(f"- {miss}")


def label(run: TunedRun) -> str:
    return f"{run.case} {run.policy} {run.tuned} {run.split} seed {run.seed}"


def print_case(
    case: str,
    results: dict[str, Result],
    settings: Sequence[tuple[str, str]],
    seeds: Sequence[int],
    options: argparse.Namespace,
) -> list[str]:
    """The drop rates of one workload; what is behind by too much."""

    def rate(policy: str, tuned: str = "") -> float:
        runs = [TunedRun(case, policy, tuned, seed, options.seconds) for seed in seeds]
        return statistics.mean(results[label(run)]["drop_rate"] for run in runs)

    told = results[label(TunedRun(case, "pard", "tuned", seeds[0], options.seconds))]["told"]
    print(f"{'### ' if options.markdown else ''}{case}, CV {CASES[case].cv():.2f}, drop rate by λ and window\n")
    windows = options.windows.split(",")
    rows = [["", *(f"{window} s" for window in windows)]]
    for quantile in options.quantiles.split(","):
        rates = [rate(f"pard:lambda={quantile},history={window}") for window in windows]
        rows.append([f"pard λ={quantile}", *(f"{each:.2%}" for each in rates)])
    rows.append(["laxity", *(f"{rate(f'laxity:history={window}'):.2%}" for window in windows)])
    print_table(rows, options.markdown)
    print()
    misses = []
    for name in ("pard", "laxity"):
        best = min((rate(policy), policy) for policy, tuned in settings if policy.startswith(f"{name}:") and not tuned)
        tuned = rate(name, "tuned")
        behind = tuned - best[0]
        print(f"{name} tuned {tuned:.2%}, best fixed {best[0]:.2%} ({best[1]}): {behind * 100:+.2f} points")
        if behind > AIM:
            misses.append(f"{case} {name}: {behind * 100:.2f} points behind {best[1]}")
    ranges = [f"{name} {low:.3g} to {high:.3g} (mean {mean:.3g})" for name, (low, mean, high) in list(told.items())[:3]]
    print(f"told: {', '.join(ranges)}; {told['report_bytes']:.0f} bytes a report, {told['tuning_bytes']:.0f} a tuning")
    print(f"(one of each every {REFRESH:g} s)\n")
    return misses


def print_short(runs: Sequence[TunedRun], results: dict[str, Result], markdown: bool) -> None:
    rows = [["", "goodput/s", "drops", "invalid", "busy GPU s"]]
    for run in runs:
        result = results[label(run)]
        which = next(name for name, split in SHORT.items() if split == run.split)
        rows.append(
            [
                f"{run.case.partition('-')[0]}, {which}, {run.policy}, {run.tuned}",
                f"{result['goodput_rps']:,.0f}",
                f"{result['drop_rate']:.2%}",
                f"{result['invalid_rate']:.1%}",
                f"{result['gpu_seconds_busy']:,.0f}",
            ]
        )
    print_table(rows, markdown)
    print()


if __name__ == "__main__":
    main()
