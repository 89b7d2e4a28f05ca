"""A step of three times the load, live on emulated GPUs with the autoscaler on: goodput over time, and how long the
cluster takes to recover.

A whole cluster runs on this machine (three etcd members, two coordinators, two shards, 64 emulated GPUs); GPUs that are
not needed rest. Poisson load comes through the SDK: some time at one rate, then at three times that rate, then at the
first again. The page that is written shows offered load, goodput and the GPUs that hold models, second by second.

    python benchmarks/step.py
    python benchmarks/step.py --rate 150 --pipeline tm --html step.html --json
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from pathlib import Path
from typing import Any

from live_cluster import LiveCluster, Load, always, outcomes, seconds_to_recover

from cluster.records import Paths, PlacementRecord, decode
from cluster.store import open_store
from simulation.markup import element, page
from simulation.plots import WIDE, Axis, Line, Mark, line_chart, number, top_of
from simulation.style import style_sheet

FACTOR = 3.0


class Sampler:
    """Looks once a second at how many GPUs are to hold a model."""

    def __init__(self, url: str, cluster: str, load: Load) -> None:
        self._store = open_store(url)
        self._prefix = Paths(cluster).placements
        self._load = load
        self._stop = threading.Event()
        self.samples: list[tuple[float, int]] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(max(0.0, len(self.samples) - self._load.now())):
            entries = self._store.list(self._prefix).entries
            records = [decode(PlacementRecord, entry.key, entry.value) for entry in entries]
            held = sum(1 for record in records for device in record.devices.values() if device.models)
            self.samples.append((self._load.now(), held))

    def stop(self) -> list[tuple[float, int]]:
        self._stop.set()
        self._thread.join()
        self._store.close()
        return self.samples


def draw(result: dict[str, Any], path: Path) -> None:
    """The page with the two charts."""
    seconds = [second + 0.5 for second in range(len(result["offered"]))]
    whole = Axis(label="seconds", high=float(len(seconds)), format=number)
    marks = [Mark(f"{FACTOR:g} x", result["step_at"], True), Mark("1 x", result["back_at"], True)]
    rates = [
        Line(label="good", style="p0", x=seconds, y=[float(good) for good in result["good"]]),
        Line(label="offered", style="load", x=seconds, y=[float(n) for n in result["offered"]], filled=True),
    ]
    top = Axis(label="requests per second", high=top_of(result["offered"], 1.0), format=number)
    held = [Line(label="GPUs", style="p1", x=[at for at, _ in result["gpus"]], y=[n for _, n in result["gpus"]])]
    gpus = Axis(label="GPUs that hold a model", high=64.0, format=number)
    main = element(
        "main",
        element("h1", f"A step of {FACTOR:g} x in load on {result['pipeline']}"),
        element("p", result["text"]),
        element("h2", "Offered and good requests"),
        line_chart("offered and good requests per second", rates, whole, top, WIDE, marks),
        element("h2", "GPUs"),
        line_chart("GPUs that hold a model", held, whole, gpus, WIDE, marks),
    )
    path.write_text(page(f"A step in load on {result['pipeline']}", style_sheet(2, 1), main))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="lv", help="a shipped pipeline (default lv)")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second before the step (default 200)")
    parser.add_argument("--before", type=float, default=60.0, help="seconds before the step (default 60)")
    parser.add_argument("--during", type=float, default=60.0, help="seconds at three times the rate (default 60)")
    parser.add_argument("--after", type=float, default=40.0, help="seconds after it (default 40)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", default=sys.executable, help="interpreter to run the cluster with (default: this)")
    parser.add_argument("--html", type=Path, default=Path("step.html"), help="where the page goes (default step.html)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with LiveCluster(options.engine) as cluster:
        cluster.up(options.pipeline, "--gpus", "64", "--agents", "4", "--store", "etcd", "--rest")
        status = cluster.status()
        load = Load(cluster.addresses(), always(options.pipeline), options.rate, options.seed)
        sampler = Sampler(status["store"], status["cluster"], load)
        try:
            load.sleep_until(options.before)
            load.rate = FACTOR * options.rate
            step_at = load.now()
            load.sleep_until(options.before + options.during)
            load.rate = options.rate
            back_at = load.now()
            load.sleep_until(options.before + options.during + options.after)
        finally:
            submitted, sent = load.stop()
            gpus = sampler.stop()
    end = int(max(one.due for one in sent))
    good = [outcomes(sent, second, second + 1)["ok"] for second in range(end)]
    offered = [sum(outcomes(sent, second, second + 1).values()) for second in range(end)]
    until_back = [one for one in sent if one.due < back_at]
    recovery = seconds_to_recover(until_back, step_at)
    during = outcomes(sent, step_at, back_at)
    at = {int(second): count for second, count in gpus}
    text = (
        f"{submitted:,} requests, {submitted - len(sent)} unaccounted for. From {options.rate:g} to "
        f"{FACTOR * options.rate:g} requests per second: 99 % of each second's requests good again after "
        f"{recovery:.1f} s; {during['ok'] / max(sum(during.values()), 1):.2%} of those of the whole step good. "
        f"GPUs: {at.get(int(step_at) - 1)} before, {at.get(int(back_at) - 1)} at the end of the step, "
        f"{gpus[-1][1]} at the end."
    )
    result = {
        "pipeline": options.pipeline,
        "submitted": submitted,
        "unaccounted": submitted - len(sent),
        "recovered_after_s": recovery,
        "step_at": step_at,
        "back_at": back_at,
        "outcomes": dict(outcomes(sent)),
        "during": dict(during),
        "offered": offered,
        "good": good,
        "gpus": gpus,
        "text": text,
    }
    draw(result, options.html)
    print(json.dumps(result, indent=2) if options.json else f"{text}\nplotted in {options.html}")
    sys.exit(1 if submitted != len(sent) else 0)


if __name__ == "__main__":
    main()
