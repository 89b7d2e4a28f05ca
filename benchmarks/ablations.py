"""PARD's ablations, and what its two parameters do, beside the paper's figures (EuroSys'26, arXiv 2602.08747).

The pipeline lv on 64 GPUs in virtual time, at seconds 330-450 of the bursty Twitter trace and load 0.85: how much each
variant drops, and at which stages. The paper has other models, rates and traces, so what can be compared are orders and
ratios: Kendall's τ over the variants that it gives figures of, and each rate over pard's. Then λ, the quantile of the
downstream batch wait, and the window over which queueing delays are averaged, for traces of different burstiness (CV of
the rate from second to second). The traces lie in the folder ``traces`` of LAXITY_SHARED (../shared beside this project
unless set); without them nothing is run.

    python benchmarks/ablations.py --save runs.jsonl          # goes on where it was cut off
    python benchmarks/ablations.py --parts variants --seconds 20
    python benchmarks/ablations.py --parts variants --load 0.6    # about as much to drop as in the paper
    python benchmarks/ablations.py --pipeline da --markdown   # the paper's figures are lv's
    .venv-compiled/bin/python benchmarks/ablations.py         # the compiled engine, five times as fast

A file of saved runs knows nothing of the engine: use another one when that has changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import combinations

from simulated_runs import (
    CASES,
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

PAPER = {
    "pard": 2.1,
    "pard-instant": 2.6,
    "pard-hbf": 3.1,
    "pard-sf": 4.5,
    "pard-upper": 4.8,
    "pard-lower": None,
    "pard-fcfs": 5.8,
    "pard-oc": 6.4,
    "pard-lbf": 6.6,
    "pard-split": 7.5,
    "pard-wcl": None,
    "pard-back": 9.5,
    "nexus": None,
    "laxity": None,
}
"""Drop rates in percent that the paper reports for its lv under its tweet trace; None: none given."""
PLACES = {
    "pard": "87% in the first two",
    "pard-back": "95% in the last",
    "pard-sf": "76% in the last",
    "pard-split": "51% in the first two",
    "nexus": "51-97% in the later half",
}
LAMBDAS = [0, 0.05, 0.075, 0.1, 0.15, 0.3, 0.6, 1]
HISTORIES = [0.5, 1, 2, 3, 5, 7, 10]
PARTS = ["variants", "lambda", "history"]
SWEPT = ["twitter", "azure", "wikipedia-0.9"]
TIE = 0.0005
"""Drop rates that differ by no more than so much are equal."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), metavar="NAME,...", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--pipeline", default="lv", choices=SPLITS)
    parser.add_argument("--load", type=float, help="of all traces (default: 0.85 Twitter, 0.6 Azure, 0.9 Wikipedia)")
    parser.add_argument("--seconds", type=float, help="only the first so many of each window")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    add_options(parser)
    options = parser.parse_args()
    parts = chosen(parser, options.parts, PARTS)

    def run(case: str, policy: str) -> Run:
        return Run(options.pipeline, case, policy, options.load, seconds=options.seconds, seed=options.seed)

    runs: list[Run] = []
    if "variants" in parts:
        runs += [run("twitter", policy) for policy in PAPER]
    for part, values in (("lambda", LAMBDAS), ("history", HISTORIES)):
        if part in parts:
            runs += [run(case, f"pard:{part}={value:g}") for case in SWEPT for value in values]
    if skipped([CASES[one.case].trace for one in runs]):
        return
    results = execute_all(execute, runs, options, lambda one: f"{one.pipeline} {one.case} {one.policy}")
    by_run = dict(zip(runs, results, strict=True))
    variants = {policy: by_run[run("twitter", policy)] for policy in PAPER} if "variants" in parts else {}
    order = compare(variants) if variants else {}
    if options.json:
        print_json(runs, results, order=order)
        return
    if variants:
        some = variants["pard"]
        load = some["offered_rps"] / some["capacity_rps"]
        print(f"{options.pipeline}, {some['trace']}, load {load:.2f}, seed {options.seed}\n")
        print_table(variant_rows(variants), options.markdown)
        print(
            f"\nKendall's τ with the paper's order: {order['tau']:.2f} ({order['agree']} pairs agree, {order['differ']}"
            f" do not, {order['tied']} tied here)"
        )
        for pair in order["otherwise"]:
            print(f"- {pair}")
        print()
    for part, values in (("lambda", LAMBDAS), ("history", HISTORIES)):
        if part in parts:
            table = {case: [by_run[run(case, f"pard:{part}={value:g}")] for value in values] for case in SWEPT}
            print(f"Drop rate of pard by {part}{' in seconds' if part == 'history' else ''} (best: *)\n")
            print_table(sweep_rows(table, values), options.markdown)
            print()
    if "lambda" in parts:
        print("The paper: the best λ always lies within 0.075-0.15.")
    if "history" in parts:
        print("The paper: the best window is 5-7 s for CV < 0.5, 3-5 s for 0.5-1, 1-3 s from 1 on.")


def compare(variants: dict[str, Result]) -> Result:
    """Kendall's τ (a: ties count as neither) over the variants that the paper gives figures of."""
    given = [(name, rate) for name, rate in PAPER.items() if rate is not None]
    agree, differ, otherwise = 0, 0, []
    pairs = list(combinations(given, 2))
    for (one, paper_one), (other, paper_other) in pairs:
        ours, theirs = variants[one]["drop_rate"], variants[other]["drop_rate"]
        if abs(ours - theirs) <= TIE:
            continue
        if (ours < theirs) == (paper_one < paper_other):
            agree += 1
        else:
            differ += 1
            otherwise.append(f"{one} {ours:.2%}, {other} {theirs:.2%}; the paper: {paper_one}%, {paper_other}%")
    return {
        "tau": (agree - differ) / len(pairs),
        "agree": agree,
        "differ": differ,
        "tied": len(pairs) - agree - differ,
        "otherwise": otherwise,
    }


def variant_rows(variants: dict[str, Result]) -> Sequence[Sequence[str]]:
    stages = list(variants["pard"]["drops_by_stage"])
    heading = ["policy", "drops", "/pard", "paper", "/pard", "avoidable", "goodput", "invalid"]
    rows = [[*heading, *(f"at {number}" for number in range(1, len(stages) + 1)), "first two", "paper's place"]]
    ours = variants["pard"]["drop_rate"]
    theirs = PAPER["pard"]
    assert theirs is not None
    for name, result in variants.items():
        drops = list(result["drops_by_stage"].values())
        parts = [drop / max(sum(drops), 1) for drop in drops]
        paper = PAPER[name]
        rows.append(
            [
                name,
                f"{result['drop_rate']:.2%}",
                f"{result['drop_rate'] / ours:.2f}" if ours else "-",
                f"{paper}%" if paper is not None else "-",
                f"{paper / theirs:.2f}" if paper is not None else "-",
                f"{result['avoidable_drop_rate']:.2%}",
                f"{result['goodput_rps']:,.0f}",
                f"{result['invalid_rate']:.2%}",
                *(f"{part:.0%}" for part in parts),
                f"{sum(parts[:2]):.0%}",
                PLACES.get(name, "-"),
            ]
        )
    return rows


def sweep_rows(table: dict[str, list[Result]], values: Sequence[float]) -> Sequence[Sequence[str]]:
    rows = [["trace", "CV", *(f"{value:g}" for value in values)]]
    for case, results in table.items():
        rates = [result["drop_rate"] for result in results]
        marked = [f"{rate:.2%}{'*' if rate == min(rates) else ' '}" for rate in rates]
        load = results[0]["offered_rps"] / results[0]["capacity_rps"]
        rows.append([f"{case.partition('-')[0]} {load:.2f}", f"{CASES[case].cv():.2f}", *marked])
    return rows


if __name__ == "__main__":
    main()
