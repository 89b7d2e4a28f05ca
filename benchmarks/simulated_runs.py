"""What the simulating benchmarks share: the scenarios, and runs in several processes that are saved as they finish.

Not a benchmark itself. Simulations run with the interpreter that the benchmark is started with. The compiled engine is
about five times as fast as the source: `make bench` makes `.venv-compiled`, whose interpreter runs any of these files.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from broker.engine import scheduler
from cli.scenario import Demand, Hardware, build_scenario, parse_policies
from pipelines import load_spec
from pipelines.policies import PolicyError
from simulation.arrivals import Source, prepare
from simulation.results import public
from simulation.run import Cluster, Workload, simulate

J = TypeVar("J", bound=msgspec.Struct)
Result = dict[str, Any]

TRACES = Path(os.environ.get("LAXITY_SHARED", Path(__file__).parents[2] / "shared")) / "traces"
GPUS = 64
SPLITS = {"tm": [49, 8, 7], "lv": [40, 6, 5, 7, 6], "ga": [42, 4, 6, 6, 6], "da": [44, 7, 7, 6]}
"""GPUs of each stage, in the order in which the shipped pipelines name them (of da: person, pose, face, expression)."""


class Case(msgspec.Struct, frozen=True):
    """A workload by name: part of a trace, at a mean rate of ``load`` times the capacity."""

    trace: str
    window: tuple[float, float]
    load: float
    as_seconds: bool = False
    superpose: int = 1

    def source(self, seconds: float | None = None) -> Source:
        """Its arrivals; only the first ``seconds`` of the window where those are given."""
        begin, end = self.window
        window = (begin, end if seconds is None else min(end, begin + seconds))
        path = str(TRACES / self.trace)
        return prepare(path, as_seconds=self.as_seconds, superpose=self.superpose, window=window)

    def cv(self) -> float:
        """Coefficient of variation of the rate from second to second."""
        rates = self.source().rates  # type: ignore[attr-defined]  # a trace's
        return float(rates.std() / rates.mean())


TWITTER = Case("twitter_ipa_bursty_per_second.csv", (330, 450), 0.85)
AZURE = Case("azure_llm2023_code_arrivals.csv", (1126, 1426), 0.6, superpose=3)
"""The 300 s of the three copies that have the highest mean rate: 1.31 times that of the whole, CV 1.26."""
WIKIPEDIA = Case("wikipedia_en_2014-03_4weeks_hourly.csv", (0, 300), 0.9, as_seconds=True)
"""Its first 300 rows: twelve days, which are like all others."""
CASES = {
    "twitter": TWITTER,
    "azure": AZURE,
    "wikipedia-0.9": WIKIPEDIA,
    "wikipedia-1.2": msgspec.structs.replace(WIKIPEDIA, load=1.2),
}


class Run(msgspec.Struct, frozen=True):
    """One pipeline on 64 GPUs under one policy; everything that its result depends on, save the engine."""

    pipeline: str
    case: str
    policy: str
    load: float | None = None
    """In place of the case's."""
    pool: bool = False
    seconds: float | None = None
    seed: int = 1


def execute(run: Run) -> Result:
    """The result's figures, as ``laxity simulate --json`` prints them."""
    case = CASES[run.case]
    load = case.load if run.load is None else run.load
    demand = Demand(spec=load_spec(run.pipeline), source=case.source(run.seconds), load=load)
    hardware = Hardware(gpus=GPUS, split=None if run.pool else SPLITS[run.pipeline], pool=run.pool)
    scenario = build_scenario([demand], hardware, run.seed)
    (result,) = simulate(
        [Workload(scenario.specs[0], run.policy, scenario.arrivals[0])],
        Cluster(held=scenario.held),
        seconds=scenario.seconds,
        seed=run.seed,
        trace=scenario.traces[0],
    )
    return public(result)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all of these benchmarks have; they go into :func:`execute_all`."""
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="add each finished run to FILE; skip what is there")
    parser.add_argument("--json", action="store_true", help="print runs and results as JSON")


def chosen(parser: argparse.ArgumentParser, text: str, known: Collection[str] | None = None) -> list[str]:
    """The names of a list on the command line, of those that are known; without any known: policies."""
    if known is not None:
        names = text.split(",")
        for name in names:
            if name not in known:
                parser.error(f"unknown {name!r}; there are {', '.join(known)}")
        return names
    try:
        return parse_policies(text)
    except PolicyError as error:
        parser.error(str(error))


def execute_all(
    worker: Callable[[J], Result], runs: Sequence[J], options: argparse.Namespace, label: Callable[[J], str]
) -> list[Result]:
    """``worker``'s results for ``runs``, in order, from several processes; told on stderr, and saved, as they come."""
    found: dict[str, Result] = {}
    if options.save is not None and options.save.exists():
        with options.save.open() as file:
            found = {_key(line["run"]): line["result"] for line in map(json.loads, file)}
    runs_by_key = {_key(msgspec.to_builtins(run)): run for run in runs}
    missing = {key: run for key, run in runs_by_key.items() if key not in found}
    kind = "source" if scheduler.__file__.endswith(".py") else "compiled"
    _tell(f"{len(missing)} runs to do, {len(runs_by_key) - len(missing)} there already; the engine is {kind}")
    begun = time.perf_counter()
    # Not forked: the workers would inherit the state of this process' threads.
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(worker, run): key for key, run in missing.items()}
        try:
            for number, future in enumerate(as_completed(pending), 1):
                key = pending[future]
                found[key] = future.result()
                if options.save is not None:
                    with options.save.open("a") as file:
                        file.write(json.dumps({"run": json.loads(key), "result": found[key]}) + "\n")
                _tell(f"{number}/{len(missing)} {label(missing[key])}, {time.perf_counter() - begun:.0f} s")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[_key(msgspec.to_builtins(run))] for run in runs]


def print_json(runs: Sequence[J], results: Sequence[Result], **more: object) -> None:
    pairs = [{"run": msgspec.to_builtins(run), "result": result} for run, result in zip(runs, results, strict=True)]
    print(json.dumps({"runs": pairs} | more, indent=2))


def print_table(rows: Sequence[Sequence[str]], markdown: bool = False) -> None:
    """The first row is the heading, the first column is the name of each row."""
    if markdown:
        rule = ["---", *["--:"] * (len(rows[0]) - 1)]
        for row in (rows[0], rule, *rows[1:]):
            print("| " + " | ".join(row) + " |")
    else:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            print(f"{row[0]:{widths[0]}}", *cells, sep="  ")


def skipped(traces: Sequence[str]) -> bool:
    """Whether one of the traces is not there; says so."""
    for trace in traces:
        if not (TRACES / trace).is_file():
            print(f"skipped: there is no trace {TRACES / trace}; set LAXITY_SHARED to the folder that holds traces/")
            return True
    return False


def _key(run: object) -> str:
    return json.dumps(run, sort_keys=True)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
