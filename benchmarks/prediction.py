"""How well batches' execution is predicted, by executor, and how steady it is: Clockwork's section 6.5.

Each executor runs a model of some milliseconds on this host's CPU (``emulated``: none) under bursty load through a real
cluster. The telemetry has for each batch what the shard expected and what it took.

    python benchmarks/prediction.py
    python benchmarks/prediction.py --only torch --duration 60 --json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from live_cluster import LiveCluster, Load
from many_models import WIDTH, network
from telemetry_rows import predictions, rows

MODELS = """
import numpy
import time

WEIGHTS = numpy.random.default_rng(0).normal(0.0, 0.04, (512, 512)).astype(numpy.float32)


def multiply(items):
    batch = numpy.stack(items)
    for _ in range(20):
        batch = numpy.maximum(batch @ WEIGHTS, 0.0)
    return batch


def network():
    import torch

    layers = []
    for _ in range(12):
        layers += [torch.nn.Linear(512, 512), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers)


def one():
    return numpy.ones(512, numpy.float32)
"""
STAGES = {
    "python": "{executor: python, model: 'models:multiply', max_batch: 16, sample: 'models:one'}",
    "onnx": "{executor: onnx, model: network.onnx, max_batch: 16, sample: 'models:one'}",
    "torch": "{executor: torch, model: 'models:network', max_batch: 16, sample: 'models:one'}",
    "emulated": "{executor: emulated, max_batch: 16, profile: {alpha_ms: 0.5, beta_ms: 2}, options: {jitter: 0.01}}",
}


def measure(executor: str, options: argparse.Namespace) -> dict[str, Any]:
    """Load one executor; microseconds of error and of execution."""
    with tempfile.TemporaryDirectory(prefix="laxity-prediction-") as place, LiveCluster(options.engine) as cluster:
        directory = Path(place)
        (directory / "models.py").write_text(MODELS)
        network(directory / "network.onnx", 1)
        spec = directory / "model.yaml"
        spec.write_text(f"name: model\nslo: 200ms\nstages:\n  run: {STAGES[executor]}\noutput: run\n")
        gpus = ["--gpus", "1"] if executor == "emulated" else []
        cluster.up(str(spec), "--telemetry", str(directory / "telemetry"), *gpus)
        value: Any = b"x" * 256 if executor == "emulated" else np.ones(WIDTH, np.float32)

        def choose(random: Random) -> tuple[str, Any]:
            return "model", value

        load = Load(cluster.addresses(), choose, options.rate, options.seed)
        for step in range(int(options.duration)):
            load.rate = options.rate * (0.5 if step % 4 else 2.5)  # bursts, so that batches of all sizes come
            load.sleep_until(step + 1.0)
        submitted, sent = load.stop()
        cluster.down()
        ran = [
            row for row in rows(directory / "telemetry", "actions") if row["kind"] == "INFER" and row["code"] == "ok"
        ]
    return {
        "executor": executor,
        "submitted": submitted,
        "ok": sum(one.outcome == "ok" for one in sent),
        **predictions(ran),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(STAGES), help=f"Of {', '.join(STAGES)}.")
    parser.add_argument("--rate", type=float, default=150.0, help="Requests per second, on average.")
    parser.add_argument("--duration", type=float, default=32.0, help="Seconds of load for each.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", default=sys.executable, help="The interpreter that runs the cluster.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = [measure(executor, options) for executor in options.only.split(",")]
    if options.json:
        print(json.dumps(results))
        return
    print("microseconds; execution is of the commonest batch size")
    print(
        f"{'executor':>10}{'batches':>9}{'over p50':>10}{'p99':>9}{'under p50':>11}{'p99':>9}{'median':>9}{'p99.99':>9}"
    )
    for result in results:
        over, under, took = result["over_us"], result["under_us"], result["execution_us"]
        numbers = (over.get("p50", 0), over.get("p99", 0), under.get("p50", 0), under.get("p99", 0))
        print(
            f"{result['executor']:>10}{result['batches']:>9,}{numbers[0]:>10,.0f}{numbers[1]:>9,.0f}"
            f"{numbers[2]:>11,.0f}{numbers[3]:>9,.0f}{took['p50']:>9,.0f}{took['p99.99']:>9,.0f}"
        )


if __name__ == "__main__":
    main()
