"""Many more models than a device's memory holds, asked for by a Zipf law (Clockwork, OSDI'20, section 6.3).

Distinct small networks (each with weights of its own), one pipeline each, on this host's CPU as a device with a memory
budget. Poisson load comes through the SDK. Each answer is checked against the network that was asked for. What is told
about windows, memory and cold starts is read from the telemetry.

    python benchmarks/many_models.py
    python benchmarks/many_models.py --models 100 --resident 10 --rate 50 --duration 20
    python benchmarks/many_models.py --executor emulated --models 3600 --resident 150 --rate 500
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from bisect import bisect_right
from collections import Counter, OrderedDict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from live_cluster import Check, Choice, LiveCluster, Load
from telemetry_rows import percentiles, rows

WIDTH = 512
"""Of the networks' layers: two of them are 2 MiB of weights."""
EMULATED = "profile: {alpha_ms: 0.5, beta_ms: 1.5, load_ms: 8, memory_mb: 100}"
"""About a ResNet-50's on a V100 (Clockwork, table 1), at the tenth part of its latency."""


def weights_of(seed: int) -> list[np.ndarray[Any, Any]]:
    """The weights of the network's two dense layers."""
    random = np.random.default_rng(seed)
    return [random.normal(0.0, WIDTH**-0.5, (WIDTH, WIDTH)).astype(np.float32) for _ in range(2)]


def network(path: Path, seed: int) -> float:
    """Write a network; its megabytes."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = weights_of(seed)
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "w1"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph(
        nodes, "network", ends[:1], ends[1:], [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return sum(w.nbytes for w in weights) / 2**20


def write_specs(directory: Path, models: int, executor: str, slo_ms: int) -> tuple[list[str], float]:
    """The pipelines' files, and the megabytes of one model."""
    (directory / "sample.py").write_text(
        f"import numpy\n\n\ndef one():\n    return numpy.ones({WIDTH}, numpy.float32)\n"
    )
    specs = []
    megabytes = 100.0
    for number in range(models):
        if executor == "emulated":
            stage = f"{{executor: emulated, max_batch: 16, {EMULATED}}}"
        else:
            megabytes = network(directory / f"m{number}.onnx", number)
            memory = f"profile: {{memory_mb: {megabytes}, latency_ms: {{1: 1.0}}}}"
            stage = f"{{executor: onnx, model: m{number}.onnx, max_batch: 8, sample: 'sample:one', {memory}}}"
        path = directory / f"m{number}.yaml"
        path.write_text(f"name: m{number}\nslo: {slo_ms}ms\nstages:\n  run: {stage}\noutput: run\n")
        specs.append(str(path))
    return specs, megabytes


def zipf(models: int, exponent: float, executor: str) -> Choice:
    """The k-th model is asked for in proportion to k ** -exponent."""
    sums = list(itertools.accumulate((k + 1) ** -exponent for k in range(models)))
    payload: Any = b"x" * 256 if executor == "emulated" else np.ones(WIDTH, np.float32)

    def choose(random: Random) -> tuple[str, Any]:
        return f"m{bisect_right(sums, random.random() * sums[-1])}", payload

    return choose


def right_answers(models: int) -> Check:
    """Compares answers with what numpy reckons."""
    known = {}
    for number in range(models):
        first, second = weights_of(number)
        known[f"m{number}"] = np.maximum(np.ones(WIDTH, np.float32) @ first, 0.0) @ second

    return lambda pipeline, answer: np.allclose(answer, known[pipeline], rtol=1e-3, atol=1e-3)


def lru_hit_rate(requests: list[dict[str, str]], resident: int) -> float:
    """What keeping the models used last would have come to, if each had been loaded at once."""
    arrivals = sorted((float(row["at"]) - float(row["latency_us"]) / 1e6, row["pipeline"]) for row in requests)
    held: OrderedDict[str, None] = OrderedDict()
    hits = 0
    for _, model in arrivals:
        if model in held:
            hits += 1
            held.move_to_end(model)
        else:
            held[model] = None
            if len(held) > resident:
                held.popitem(last=False)
    return hits / max(len(arrivals), 1)


def told(actions: list[dict[str, str]], requests: list[dict[str, str]], resident: int) -> dict[str, Any]:
    """What the telemetry says of the run."""
    ran = [row for row in actions if row["kind"] in ("INFER", "LOAD", "UNLOAD") and row["start_us"] != ""]
    late = [row for row in ran if float(row["start_us"]) > float(row["latest_us"])]
    loads = [float(row["duration_us"]) / 1e3 for row in actions if row["kind"] == "LOAD" and row["code"] == "ok"]
    answered = [row for row in requests if row["outcome"] == "ok"]
    cold = [float(row["latency_us"]) / 1e3 for row in answered if row["cold"] == "1"]
    warm = [float(row["latency_us"]) / 1e3 for row in answered if row["cold"] != "1"]
    return {
        "actions": dict(Counter(f"{row['kind']} {row['code']}" for row in actions)),
        "started_after_their_window": len(late),
        "most_memory_mb": max((float(row["memory_mb"]) for row in actions), default=0.0),
        "hit_rate": len([row for row in requests if row["cold"] != "1"]) / max(len(requests), 1),
        "hit_rate_of_lru": lru_hit_rate(requests, resident),
        "load_ms": percentiles(loads),
        "cold_latency_ms": percentiles(cold),
        "warm_latency_ms": percentiles(warm),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=400)
    parser.add_argument("--resident", type=int, default=40, help="How many the device's memory holds.")
    parser.add_argument("--executor", choices=["onnx", "emulated"], default="onnx")
    parser.add_argument("--rate", type=float, default=100.0, help="Requests per second.")
    parser.add_argument("--duration", type=float, default=60.0, help="Seconds of load.")
    parser.add_argument("--zipf", type=float, default=1.0, help="The law's exponent.")
    parser.add_argument("--slo", type=int, default=500, help="Milliseconds.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", default=sys.executable, help="The interpreter that runs the cluster.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="laxity-many-") as place, LiveCluster(options.engine) as cluster:
        directory = Path(place)
        specs, megabytes = write_specs(directory, options.models, options.executor, options.slo)
        memory = round(megabytes * options.resident)
        telemetry = directory / "telemetry"
        cluster.up(*specs, "--memory", str(memory), "--telemetry", str(telemetry), *_gpus(options.executor))
        choose = zipf(options.models, options.zipf, options.executor)
        check = right_answers(options.models) if options.executor == "onnx" else None
        load = Load(cluster.addresses(), choose, options.rate, options.seed, check)
        load.sleep_until(options.duration)
        submitted, sent = load.stop()
        cluster.down()
        found = told(rows(telemetry, "actions"), rows(telemetry, "requests"), options.resident)
    ended = Counter(one.outcome for one in sent)
    result = {
        "models": options.models,
        "budget_mb": memory,
        "submitted": submitted,
        "outcomes": dict(ended),
        "unaccounted": submitted - len(sent),
        "goodput_part": round(ended["ok"] / submitted, 4),
        **found,
    }
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name.replace('_', ' '):>28}: {value}")


def _gpus(executor: str) -> list[str]:
    return ["--gpus", "1"] if executor == "emulated" else []


if __name__ == "__main__":
    main()
