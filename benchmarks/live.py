"""The same pipeline, GPUs, arrivals and seed on a live emulated cluster and in simulation, side by side.

A cluster of emulated GPUs is started in a run directory of its own and loaded with ``laxity load``; then ``laxity
simulate`` runs the same in virtual time. Aims: goodput within 3 % of each other, drop rates within 2 points. Where the
generator lagged or requests were not sent, the live half is no measure of the cluster, and that is said.

The trace lies in the folder ``traces`` of LAXITY_SHARED (../shared beside this project unless set); without it nothing
is run. ``--engine`` names the interpreter of another installation (compiled, say) to run all of it with.

    python benchmarks/live.py
    python benchmarks/live.py --window 330:350 --json
    python benchmarks/live.py --pipeline tm --gpus 8 --load 0.95 --engine .venv-compiled/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster.placement import split_gpus
from pipelines import load_spec
from pipelines.capacity import planned_costs

SHARED = Path(os.environ.get("LAXITY_SHARED", Path(__file__).parents[2] / "shared"))
TRACE = "twitter_ipa_bursty_per_second.csv"
SHOWN = {
    "submitted": "{:,.0f}",
    "capacity_rps": "{:,.1f}",
    "offered_rps": "{:,.1f}",
    "goodput_rps": "{:,.1f}",
    "bound_rps": "{:,.1f}",
    "bound_ratio": "{:.2%}",
    "drop_rate": "{:.2%}",
    "avoidable_drop_rate": "{:.2%}",
}
AIMS = (0.03, 0.02)
"""Differences that are aimed at: goodput, as a part of the simulated one, and drop rate."""
LAG_MS = 5.0


class Cluster:
    """`laxity` with a run directory of its own."""

    def __init__(self, engine: str, runtime: str) -> None:
        self._command = [engine, "-P", "-m", "cli.main"]
        self._environment = os.environ | {"XDG_RUNTIME_DIR": runtime}

    def __call__(self, *arguments: str) -> str:
        command = [*self._command, *arguments]
        return subprocess.run(command, env=self._environment, check=True, stdout=subprocess.PIPE, text=True).stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="lv", help="a shipped pipeline (default lv)")
    parser.add_argument("--gpus", type=int, default=16, help="emulated GPUs (default 16)")
    parser.add_argument("--agents", type=int, default=2, help="agents that play them (default 2)")
    parser.add_argument("--window", default="330:450", help="seconds of the trace (default 330:450)")
    parser.add_argument("--load", default="0.85", help="mean rate / capacity (default 0.85)")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--engine", default=sys.executable, help="interpreter to run it with (default: this one)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    trace = SHARED / "traces" / TRACE
    if not trace.is_file():
        print(f"skipped: there is no trace {trace}; set LAXITY_SHARED to the folder that holds traces/")
        return
    spec = load_spec(options.pipeline)
    split = split_gpus(planned_costs(spec), options.gpus)
    numbers = ",".join(map(str, split.values()))
    arrivals = ["--trace", str(trace), "--window", options.window, "--load", options.load, "--seed", options.seed]
    with tempfile.TemporaryDirectory(prefix="laxity-live-") as runtime:
        laxity = Cluster(options.engine, runtime)
        laxity(
            "up", spec.name, "--executor", "emulated", "--split", numbers, "--agents", str(options.agents), "--detach"
        )
        try:
            (live,) = laxity.json("load", spec.name, *arrivals)["steps"]
        finally:
            laxity("down")
        (simulated,) = laxity.json("simulate", spec.name, "--split", numbers, *arrivals)
    goodput = live["goodput_rps"] / simulated["goodput_rps"] - 1
    drops = live["drop_rate"] - simulated["drop_rate"]
    sound = not live["unsent"] and live["lag_ms"]["p99"] <= LAG_MS
    verdict = {
        "goodput_difference": goodput,
        "drop_rate_difference": drops,
        "generator_kept_up": sound,
        "same_arrivals": live["submitted"] + live["unsent"] == simulated["submitted"],
        "good": abs(goodput) <= AIMS[0] and abs(drops) <= AIMS[1],
    }
    if options.json:
        print(json.dumps({"split": numbers, "live": live, "simulated": simulated} | verdict, indent=2))
        return
    drawn = f"{simulated['trace']}, load {options.load}, seed {options.seed}"
    print(f"{spec.name} on {options.gpus} GPUs ({numbers}), {drawn}")
    print(f"{'':24}{'live':>12}{'simulated':>12}")
    for name, form in SHOWN.items():
        print(f"{name:24}{form.format(live[name]):>12}{form.format(simulated[name]):>12}")
    for name in ("p50", "p99", "p999"):
        print(f"{'latency ' + name + ' ms':24}{live['latency_ms'][name]:>12.1f}{simulated['latency_ms'][name]:>12.1f}")
    for stage, count in simulated["drops_by_stage"].items():
        print(f"{'drops ' + stage:24.23}{live['drops_by_stage'][stage]:>12,}{count:>12,}")
    print(f"goodput differs by {goodput:+.2%} (aim: {AIMS[0]:.0%}), drop rate by {100 * drops:+.2f} points (aim: 2)")
    if not verdict["same_arrivals"]:
        print("NOT the same arrivals: the two drew different requests")
    if not sound:
        lag = live["lag_ms"]["p99"]
        print(f"the generator did NOT keep up: {live['unsent']:,} requests unsent, lag {lag:.1f} ms at p99")


if __name__ == "__main__":
    main()
