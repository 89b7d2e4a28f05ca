"""How long the planner takes, and what it has the coordinator write, at 64, 512 and 4,096 GPUs.

Pipelines of five stages (those of live video) share the GPUs; their rates wander as a bursty trace does, so that each
second some devices move. Reported: seconds for ``plan()`` and ``observe()``, moves, and bytes per second of the records
that change (placement, serving) and of the shards' reports, as they lie in the store.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time

from cluster.planner.planner import Planner
from cluster.planner.settings import Settings
from cluster.planner.view import ClusterView, DeviceId, DeviceView, NodeView, Placed, Plan, Served
from cluster.records import DevicePlacement, PlacementRecord, ServingRecord, encode
from cluster.tuning.report import ReportRecord, StageReport
from pipelines.spec import PipelineSpec, Profile, StageSpec

SIZES = ((64, 2, 2), (512, 8, 12), (4096, 64, 96), (4096, 512, 96))
"""(GPUs, shards, pipelines)."""
PER_NODE = 8
STAGES = {
    "person": (9.844, 3.0),
    "face": (1.067, 6.3),
    "expression": (1.081, 2.38),
    "eyes": (1.414, 3.52),
    "pose": (1.288, 3.95),
}
REQUESTS_PER_GPU = 40.0
"""Of the mean rate: the five stages together run about 65 requests per second on a GPU."""
SKETCH = 24
"""Entries of a sketch of batch waits in a report."""


def pipeline(number: int) -> PipelineSpec:
    before = "request"
    stages = {}
    for name, (alpha, beta) in STAGES.items():
        profile = Profile(alpha_ms=alpha, beta_ms=beta, load_ms=1500, memory_mb=900)
        stages[name] = StageSpec(executor="emulated", profile=profile, inputs=[before], max_batch=64)
        before = name
    return PipelineSpec(name=f"video-{number}", slo=0.5, stages=stages, output=before)


class Cluster:
    """Devices that load at once what a plan says."""

    def __init__(self, gpus: int, shards: int, pipelines: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.specs = {spec.name: spec for spec in (pipeline(number) for number in range(pipelines))}
        self.keys = {name: [spec.model_key(stage) for stage in spec.stages] for name, spec in self.specs.items()}
        self.versions = {name: spec.version for name, spec in self.specs.items()}
        self.nodes = [f"node-{number}" for number in range(gpus // PER_NODE)]
        self.shards = [f"shard-{number}" for number in range(shards)]
        weights = [self.random.paretovariate(1.2) for _ in self.specs]
        total = sum(weights)
        self.rates = {
            name: REQUESTS_PER_GPU * gpus * weight / total for name, weight in zip(self.specs, weights, strict=True)
        }
        self.states = dict.fromkeys(self.nodes, "active")
        self.placement: dict[DeviceId, Placed] = {}
        self.serving: dict[str, Served] = {}

    def measured(self, second: int) -> dict[str, float]:
        """A slow wave, other for each pipeline, and bursts."""
        rates = {}
        for number, (name, rate) in enumerate(self.rates.items()):
            wave = 1.0 + 0.3 * math.sin(second / 20.0 + number)
            now = max(0.0, self.random.gauss(rate * wave, 0.08 * rate))
            rates.update(dict.fromkeys(self.keys[name], now))
        return rates

    def view(self) -> ClusterView:
        nodes = {}
        for node in self.nodes:
            devices = [
                DeviceView("A100", 40_000.0, self.placement.get((node, number), Placed()).models)
                for number in range(PER_NODE)
            ]
            nodes[node] = NodeView(self.states[node], devices)
        return ClusterView(
            nodes=nodes,
            shards=self.shards,
            pipelines=self.specs,
            serving=self.serving,
            placement=self.placement,
            in_flight={f"{name}@{version}": 10 for name, version in self.versions.items()},
        )

    def adopt(self, plan: Plan) -> int:
        """Carry a plan out; the bytes of the records that it changes."""
        size = 0
        nodes = {move.device[0] for move in plan.moves}
        for node in nodes:
            devices = {
                number: DevicePlacement(plan.placement[node, number].shard, sorted(plan.placement[node, number].models))
                for number in range(PER_NODE)
                if (node, number) in plan.placement
            }
            size += len(encode(PlacementRecord(devices)))
        for name, served in plan.serving.items():
            if served != self.serving.get(name):
                size += len(encode(ServingRecord(self.versions[name], served.spec, served.shards)))
        self.placement, self.serving = plan.placement, plan.serving
        self.states = {node: state for node, (state, _) in plan.states.items()}
        return size

    def report_bytes(self) -> int:
        """Of one second's reports of all shards."""
        served: dict[str, list[str]] = {}
        for name, of in self.serving.items():
            for shard in of.shards:
                served.setdefault(shard, []).append(name)
        size = 0
        for names in served.values():
            stages = [
                StageReport(key, 1234, 1230, 99, 3, 17, 12, 0.0123, 0.0456, list(range(100, 100 + SKETCH)), {})
                for name in names
                for key in self.keys[name]
            ]
            in_flight = {f"{name}@{self.versions[name]}": 321 for name in names}
            agents = self.nodes[: max(1, len(self.nodes) // len(served))]
            size += len(encode(ReportRecord(1000, 1.0, stages, in_flight, agents)))
        return size


def measure(gpus: int, shards: int, pipelines: int, seconds: int, seed: int) -> dict[str, float]:
    cluster = Cluster(gpus, shards, pipelines, seed)
    planner = Planner(Settings())
    planning, observing, written, moves = [], [], [], 0
    for second in range(seconds):
        rates = cluster.measured(second)
        view = cluster.view()
        start = time.perf_counter()
        planner.observe(float(second), rates)
        middle = time.perf_counter()
        plan = planner.plan(float(second), view)
        end = time.perf_counter()
        size = cluster.adopt(plan)
        if second >= seconds // 3:  # what follows the first placement
            observing.append(middle - start)
            planning.append(end - middle)
            written.append(size)
            moves += len(plan.moves)
    return {
        "gpus": gpus,
        "shards": shards,
        "pipelines": pipelines,
        "gpus_placed": len(cluster.placement),
        "plan_ms_median": statistics.median(planning) * 1e3,
        "plan_ms_max": max(planning) * 1e3,
        "observe_ms_median": statistics.median(observing) * 1e3,
        "moves_per_second": moves / len(planning),
        "plan_bytes_per_second": statistics.mean(written),
        "report_bytes_per_second": cluster.report_bytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=90, help="how many seconds each cluster is planned for")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    rows = [measure(*size, options.seconds, options.seed) for size in SIZES]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(
        f"{'GPUs':>6}{'shards':>8}{'pipelines':>11}{'placed':>8}{'plan ms':>9}{'max':>8}{'observe ms':>12}"
        f"{'moves/s':>9}{'plan B/s':>10}{'reports B/s':>13}"
    )
    for row in rows:
        print(
            f"{row['gpus']:>6}{row['shards']:>8}{row['pipelines']:>11}{row['gpus_placed']:>8}"
            f"{row['plan_ms_median']:>9.1f}{row['plan_ms_max']:>8.1f}{row['observe_ms_median']:>12.2f}"
            f"{row['moves_per_second']:>9.1f}{row['plan_bytes_per_second']:>10.0f}{row['report_bytes_per_second']:>13}"
        )


if __name__ == "__main__":
    main()
