"""Every policy on every pipeline and workload, on 64 GPUs in virtual time, and the aims for ``laxity``.

Workloads: seconds 330-450 of the bursty Twitter trace at load 0.85; three superposed copies of the Azure trace, its
busiest 300 s, at 0.6; 300 hours of Wikipedia read as seconds, at 0.9 and 1.2. The traces lie in the folder ``traces``
of LAXITY_SHARED (../shared beside this project unless set); without them nothing is run.

The bound is the fluid one, Σ min(offered, capacity) over the seconds; avoidable drops are those beyond what it leaves;
the floor is the GPU time that the good requests would take in planned batches. Each cell has ``nexus`` with both its
budgets: the better one (*) is the peer.

    python benchmarks/policies.py --save runs.jsonl          # goes on where it was cut off
    python benchmarks/policies.py --pool --markdown          # every GPU serves every stage
    python benchmarks/policies.py --pipelines lv --traces twitter --policies laxity,pard --seconds 20
    python benchmarks/policies.py --gpu-time                 # busy GPU-seconds against the floor, beside pard's
    .venv-compiled/bin/python benchmarks/policies.py         # the compiled engine, five times as fast

A file of saved runs knows nothing of the engine: use another one when that has changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import msgspec
from simulated_runs import (
    CASES,
    GPUS,
    SPLITS,
    Result,
    Run,
    add_options,
    chosen,
    execute,
    execute_all,
    print_json,
    print_table,
    skipped,
)

POLICIES = ["naive", "clipper++", "nexus", "nexus-split", "symphony", "shepherd", "clockwork", "pard", "laxity"]
GPU_TIME = ["pard", "laxity"]
LOADS: list[float | None] = [0.5, 0.85, 0.95]
"""Whose GPU time is compared, at which loads of the Twitter trace."""
HEADING = ["policy", "goodput", "/bound", "drops", "avoidable", "invalid", "busy s", "alloc. s", "/floor"]
HEADING += ["batch", "p99 ms"]

TIE = 0.995
"""As good as a peer: a part of its goodput."""
GAIN = 1.16
"""Aimed-at goodput against nexus and clipper++, where the bound allows it."""
FEWER = 1.6
"""Aimed-at factor of avoidable drops against them."""
LOSING = 0.10
"""Drop rate of a peer from which the two are asked for."""
OF_BOUND, INVALID, OF_FLOOR = 0.99, 0.02, 1.05


class Miss(msgspec.Struct):
    """An aim that was not reached."""

    cell: str
    aim: str
    found: float
    wanted: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", default="lv,tm,ga,da", metavar="NAME,...")
    parser.add_argument("--traces", default=",".join(CASES), metavar="NAME,...", help=f"of {', '.join(CASES)}")
    parser.add_argument("--policies", default=",".join(POLICIES), metavar="NAME,...")
    parser.add_argument("--seconds", type=float, help="only the first so many of each window")
    parser.add_argument("--pool", action="store_true", help="every GPU serves every stage")
    parser.add_argument("--gpu-time", action="store_true", help="GPU time of laxity and pard on Twitter at three loads")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    add_options(parser)
    options = parser.parse_args()
    pipelines = chosen(parser, options.pipelines, SPLITS)
    cases = chosen(parser, options.traces, CASES)
    policies = chosen(parser, options.policies)
    loads: list[float | None] = [None]
    if options.gpu_time:
        cases, policies, loads = ["twitter"], GPU_TIME, LOADS
        if options.pipelines == parser.get_default("pipelines"):
            pipelines = ["lv"]
    runs = [
        Run(pipeline, case, policy, load, options.pool, options.seconds, options.seed)
        for pipeline in pipelines
        for case in cases
        for load in loads
        for policy in policies
    ]
    if skipped([CASES[run.case].trace for run in runs]):
        return
    results = execute_all(execute, runs, options, cell)
    groups: dict[str, dict[str, Result]] = {}
    for run, result in zip(runs, results, strict=True):
        groups.setdefault(cell(msgspec.structs.replace(run, policy="")), {})[run.policy] = result
    check = check_gpu_time if options.gpu_time else check_aims
    misses = [miss for name, group in groups.items() for miss in check(name, group)]
    if options.json:
        print_json(runs, results, misses=msgspec.to_builtins(misses))
        return
    for name, group in groups.items():
        print_cell(name, group, options.markdown)
    checked = sum("laxity" in group for group in groups.values())
    print(f"Aims for laxity in {checked} cells: {f'{len(misses)} missed' if misses else 'all reached'}")
    for miss in misses:
        print(f"- {miss.cell}: {miss.aim}: {miss.found:.4g}, aim {miss.wanted:.4g}")


def cell(run: Run) -> str:
    load = CASES[run.case].load if run.load is None else run.load
    where = "pool" if run.pool else "split"
    name = f"{run.pipeline} {run.case.partition('-')[0]} {load:g} {where}"
    return f"{name} {run.policy}".strip()


def better_nexus(group: dict[str, Result]) -> str:
    """The nexus that is the peer; '' where there is none."""
    return max((name for name in group if name.startswith("nexus")), key=lambda n: group[n]["goodput_rps"], default="")


def check_aims(name: str, group: dict[str, Result]) -> list[Miss]:
    """The aims of one cell that ``laxity`` misses."""
    if "laxity" not in group:
        return []
    ours = group["laxity"]
    nexus = better_nexus(group)
    misses = []

    def at_least(aim: str, found: float, wanted: float) -> None:
        if found < wanted:
            misses.append(Miss(name, aim, found, wanted))

    def at_most(aim: str, found: float, wanted: float) -> None:
        if found > wanted:
            misses.append(Miss(name, aim, found, wanted))

    for peer, theirs in group.items():
        if peer == "laxity" or (peer.startswith("nexus") and peer != nexus):
            continue
        at_least(f"goodput against {peer}'s", ours["goodput_rps"], TIE * theirs["goodput_rps"])
        if peer in ("clipper++", nexus) and theirs["drop_rate"] > LOSING:
            possible = ours["bound_rps"] / theirs["goodput_rps"] - 0.01 if theirs["goodput_rps"] else GAIN
            at_least(f"goodput / {peer}'s", ours["goodput_rps"] / max(theirs["goodput_rps"], 1e-9), min(GAIN, possible))
            at_most(
                f"avoidable drops against {peer}'s / {FEWER}",
                ours["avoidable_drop_rate"],
                theirs["avoidable_drop_rate"] / FEWER,
            )
    if exceeds(ours):
        at_least("goodput / bound", ours["bound_ratio"], OF_BOUND)
    at_most("invalid rate", ours["invalid_rate"], INVALID)
    return misses


def exceeds(result: Result) -> bool:
    """Whether demand exceeds capacity in some of the seconds (by more than Poisson noise does)."""
    return float(result["bound_rps"]) < 0.999 * float(result["offered_rps"])


def check_gpu_time(name: str, group: dict[str, Result]) -> list[Miss]:
    ratio = busy_ratio(group["laxity"])
    return [Miss(name, "busy / floor", ratio, OF_FLOOR)] if ratio > OF_FLOOR else []


def busy_ratio(result: Result) -> float:
    return float(result["gpu_seconds_busy"]) / max(float(result["gpu_seconds_floor"]), 1e-9)


def print_cell(name: str, group: dict[str, Result], markdown: bool) -> None:
    some = next(iter(group.values()))
    split = ",".join(map(str, some["split"])) or "every GPU serves every stage"
    print(f"{'### ' if markdown else ''}{name}")
    if markdown:
        print()
    print(
        f"{some['trace']}, {GPUS} GPUs ({split}), seed {some['seed']}: {some['submitted']:,} requests, offered "
        f"{some['offered_rps']:,.0f}, capacity {some['capacity_rps']:,.0f}, bound {some['bound_rps']:,.0f} per second"
    )
    if markdown:
        print()
    print_table([HEADING, *rows(group)], markdown)
    print()


def rows(group: dict[str, Result]) -> Sequence[Sequence[str]]:
    peer = better_nexus(group) if sum(name.startswith("nexus") for name in group) > 1 else ""
    return [
        [
            name + (" *" if name == peer else ""),
            f"{result['goodput_rps']:,.0f}",
            f"{result['bound_ratio']:.3f}",
            f"{result['drop_rate']:.2%}",
            f"{result['avoidable_drop_rate']:.2%}",
            f"{result['invalid_rate']:.2%}",
            f"{result['gpu_seconds_busy']:,.0f}",
            f"{result['gpu_seconds_allocated']:,.0f}",
            f"{busy_ratio(result):.3f}",
            f"{result['mean_batch']:.1f}",
            f"{result['latency_ms']['p99']:.0f}",
        ]
        for name, result in group.items()
    ]


if __name__ == "__main__":
    main()
