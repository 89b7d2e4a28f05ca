"""What a GPU's worker makes of its device: a ResNet-50 and a BERT-base in torch, after Clockwork (OSDI'20).

Latency by batch with and without CUDA graphs; throughput through the real worker process, with copies overlapped and
not, against a bare loop of the same model; copies of one model under one SLO after another in a real cluster, with the
predictions' errors; and the bandwidth between host and device. Without a GPU it says so and ends; ``--device cpu`` runs
small models on this host's CPU instead, all but what needs CUDA.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --json
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any, NamedTuple, Self

import gpu_models
import numpy as np
import zmq
from live_cluster import LiveCluster
from telemetry_rows import predictions, rows

from laxity import Client, payload
from nodes.device import DeviceConfig
from nodes.discovery import cuda_devices, parse_devices
from nodes.meter import DeviceMeter
from nodes.worker_process import WorkerProcess
from pipelines.load import load_spec
from pipelines.spec import PipelineSpec

SLOS = (0.0100, 0.0150, 0.0225, 0.0338, 0.0506, 0.0759, 0.114, 0.171, 0.256, 0.384, 0.500)
"""Seconds: from 10 ms, each half as much again."""
LANES = 0.25
"""Gigabytes per second of a lane of PCIe's first generation; from the third on the coding costs less."""


WAYS = {"copies overlapped": 3, "one by one": 1}
"""How many batches are under way."""
TURNS = 8


class Model(NamedTuple):
    name: str
    factory: str
    sample: str
    max_batch: int
    options: dict[str, Any]


ON_GPU = (
    Model("resnet50", "resnet50", "picture", 32, {"channels_last": True, "autocast": "float16"}),
    Model("bert-base", "bert_base", "text", 32, {"autocast": "float16"}),
)
ON_CPU = (
    Model("small-resnet", "small_resnet", "small_picture", 8, {}),
    Model("small-bert", "small_bert", "small_text", 8, {}),
)


def write_spec(directory: Path, model: Model, name: str, **options: Any) -> Path:
    """A pipeline of the model alone, beside the code that makes it."""
    (directory / "gpu_models.py").write_text(Path(gpu_models.__file__).read_text())
    stage = {
        "executor": "torch",
        "model": f"gpu_models:{model.factory}",
        "sample": f"gpu_models:{model.sample}",
        "max_batch": model.max_batch,
        "options": model.options | options,
    }
    path = directory / f"{name}.yaml"
    path.write_text(json.dumps({"name": name, "slo": "500ms", "stages": {"run": stage}, "output": "run"}))
    return path


def latencies(device: DeviceConfig, spec: PipelineSpec, seconds: float) -> dict[str, Any]:
    """By batch size: milliseconds of execution and answers (median, p99), and of inputs (median)."""
    with DeviceMeter(device) as meter:
        times = meter.measure(spec, "run", repeats=1000, seconds=seconds, progress=lambda _: None)
    return {
        "load_ms": round(times.load_seconds * 1e3, 2),
        "memory_mb": round(times.memory_mb, 1),
        "ms": {
            each.batch: [round(value * 1e3, 3) for value in (each.median, each.p99, each.inputs_median)]
            for each in times.batches
        },
    }


class Feeder:
    """Full batches of a stage through a worker process, as an agent has it run them."""

    def __init__(self, device: DeviceConfig, spec: PipelineSpec, model: Model) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._process = WorkerProcess(self._context, device.kind, device.threads)
        self._key, self._batch = spec.model_key("run"), model.max_batch
        self._inputs = [payload.encode(getattr(gpu_models, model.sample)())] * model.max_batch
        self._said: deque[Any] = deque()
        self._numbers = itertools.count(1)
        self._wait("Started")
        self._process.send_hold(self._key, spec, "run", device.type, [(1, 0.0), (model.max_batch, 0.0)])
        self._wait("Held")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop()
        self._process.close(5.0)
        self._context.destroy(linger=0)

    def run(self, ahead: int, seconds: float) -> tuple[float, list[Any]]:
        """Elements per second with ``ahead`` batches under way, and what the worker said of each batch."""
        for _ in range(ahead):
            self._send()
        finished = []
        self._wait("Finished")  # from one end of an execution to another
        begun = time.monotonic()
        while time.monotonic() < begun + seconds:
            self._send()
            finished.append(self._wait("Finished"))
        took = time.monotonic() - begun
        for _ in range(ahead - 1):
            self._wait("Finished")
        return len(finished) * self._batch / took, finished

    def _send(self) -> None:
        now = time.monotonic()
        tasks = [[each.node] for each in self._inputs]
        frames = payload.pack(self._inputs)
        self._process.send_infer(next(self._numbers), self._key, now, now + 60.0, tasks, frames)

    def _wait(self, kind: str) -> Any:
        while True:
            self._said.extend(message for message, _ in self._process.recv())
            while self._said:
                message = self._said.popleft()
                if type(message).__name__ == kind:
                    return message
                if type(message).__name__ == "LoadFailed":
                    raise RuntimeError(message.detail)
            if not self._process.alive():
                raise RuntimeError(f"the worker {self._process.exit_description()}")
            self._process.socket.poll(1000)


def throughput(device: DeviceConfig, spec: PipelineSpec, model: Model, seconds: float) -> dict[str, Any]:
    """Elements per second of the model alone and through a worker, by turns: what else the host does, and how fast its
    clocks run, is the same for all."""
    loop = (
        model.factory,
        model.sample,
        json.dumps(model.options | {"threads": device.threads}),
        device.kind.partition(":")[0],
        model.max_batch,
    )
    alone: list[float] = []
    by_way: dict[str, list[tuple[float, list[Any]]]] = {way: [] for way in WAYS}
    with Feeder(device, spec, model) as feeder, multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(gpu_models.bare_loop, (*loop, 0.5))
        for _ in range(TURNS):
            alone.append(pool.apply(gpu_models.bare_loop, (*loop, seconds / TURNS)))
            for way, ahead in WAYS.items():
                by_way[way].append(feeder.run(ahead, seconds / TURNS))
    found: dict[str, Any] = {"bare_per_second": round(statistics.median(alone), 1)}
    for way, turns in by_way.items():
        batches = [one for _, finished in turns for one in finished]
        execution = np.array([one.execution_us for one in batches], float)
        found[way] = {
            "per_second": round(statistics.median(rate for rate, _ in turns), 1),
            "of_bare": round(statistics.median(rate / bare for (rate, _), bare in zip(turns, alone, strict=True)), 4),
            "executing": round(float(execution.sum()) / 1e6 / sum(len(f) * model.max_batch / r for r, f in turns), 4),
            "execution_ms": round(float(np.median(execution)) / 1e3, 3),
            "input_ms": round(statistics.median(one.input_us for one in batches) / 1e3, 3),
            "output_ms": round(statistics.median(one.output_us for one in batches) / 1e3, 3),
            "execution_p9999_to_median": round(float(np.percentile(execution, 99.99) / np.median(execution)), 3),
        }
    return found


def one_model(model: Model, device: DeviceConfig, seconds: float) -> dict[str, Any]:
    """All about one model on the device, with graphs and without."""
    variants = {"graphs": True, "plain": False} if device.kind != "cpu" else {"plain": False}
    found: dict[str, Any] = {"latency": {}, "throughput": {}}
    with tempfile.TemporaryDirectory(prefix="laxity-gpu-") as place:
        for variant, graphs in variants.items():
            spec = load_spec(str(write_spec(Path(place), model, variant, graphs=graphs)))
            found["latency"][variant] = latencies(device, spec, seconds)
            found["throughput"][variant] = throughput(device, spec, model, 4 * seconds)
    return found


def goodput(model: Model, copies: int, rate: float, seconds: float, engine: str) -> dict[str, Any]:
    """Copies of one model, each a pipeline of its own, under Poisson load: the part of the requests that is answered in
    time, by SLO; and from the telemetry how well executions were predicted."""
    with tempfile.TemporaryDirectory(prefix="laxity-gpu-") as place:
        directory = Path(place)
        names = [f"copy-{number}" for number in range(copies)]
        # A name of its own in the spec makes a model of its own.
        specs = [str(write_spec(directory, model, name)) for name in names]
        sample = getattr(gpu_models, model.sample)()
        by_slo = {}
        with LiveCluster(engine) as cluster:
            cluster.up(*specs, "--telemetry", str(directory / "telemetry"))
            with Client(cluster.addresses(), max_pending=100_000) as client:
                client.wait_ready(60.0)
                for slo in SLOS:
                    counts = poisson(client, names, sample, slo, rate, seconds)
                    by_slo[f"{slo * 1e3:g}"] = {
                        "goodput_per_second": round(counts["ok"] / seconds, 1),
                        "in_time": round(counts["ok"] / max(counts.total(), 1), 4),
                        "outcomes": dict(counts),
                    }
        ran = rows(directory / "telemetry", "actions")
    return {
        "copies": copies,
        "offered_per_second": round(rate, 1),
        "by_slo_ms": by_slo,
        **predictions([row for row in ran if row["kind"] == "INFER" and row["code"] == "ok"]),
    }


def poisson(client: Client, names: list[str], sample: Any, slo: float, rate: float, seconds: float) -> Counter[str]:
    """Requests to all pipelines alike, each sent when it is due; how they ended."""
    random = np.random.default_rng(1)
    due = np.cumsum(random.exponential(1.0 / rate, int(rate * seconds)))
    which = random.integers(0, len(names), len(due))
    begun = time.monotonic()
    futures = []
    for at, name in zip(due, which, strict=True):
        left = begun + at - time.monotonic()
        if left > 0:
            time.sleep(left)
        futures.append(client.submit(names[name], sample, slo=slo))
    return Counter(str(future.reply(30.0).outcome) for future in futures)


def link() -> dict[str, Any]:
    """The PCIe link of the first GPU and what it could carry, as its driver has it."""
    try:
        import pynvml
    except ImportError:
        return {"link": "unknown: pip install 'laxity[gpu]'"}
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    generation = pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)
    width = pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)
    lane = LANES * 2 ** (generation - 1) * (0.985 if generation >= 3 else 1.0)
    return {"link": f"PCIe {generation} x{width}", "limit": round(lane * width, 1)}


def copies_per_second() -> dict[str, Any]:
    """Gigabytes per second between host and GPU, and the link's limit."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(gpu_models.bandwidth, (256,)) | link()


def table(results: dict[str, Any]) -> None:
    for name, found in results["models"].items():
        print(f"\n{name}")
        for variant, measured in found["latency"].items():
            print(f"  {variant}: loads in {measured['load_ms']:.1f} ms, {measured['memory_mb']:.0f} MB")
            print(f"  {'batch':>8}{'median ms':>12}{'p99 ms':>10}{'inputs ms':>12}")
            for batch, (median, p99, inputs) in measured["ms"].items():
                print(f"  {batch:>8}{median:>12.3f}{p99:>10.3f}{inputs:>12.3f}")
            flow = found["throughput"][variant]
            print(f"  bare loop, plain: {flow['bare_per_second']:,.0f} a second")
            for way in WAYS:
                each = flow[way]
                print(
                    f"  {way}: {each['per_second']:,.0f} a second, {each['of_bare']:.1%} of bare; executing "
                    f"{each['executing']:.1%} of the time; p99.99/median {each['execution_p9999_to_median']:.3f}"
                )
    found = results["goodput"]
    print(f"\n{found['copies']} copies, {found['offered_per_second']:,.0f} requests a second offered")
    print(f"{'SLO ms':>8}{'in time a second':>18}{'part':>8}")
    for slo, each in found["by_slo_ms"].items():
        print(f"{slo:>8}{each['goodput_per_second']:>18,.1f}{each['in_time']:>8.1%}")
    print(f"predicted too long by {found['over_us']}, too short by {found['under_us']} µs")
    print(f"execution of the commonest batch: {found['execution_us']} µs, p99.99/median {found['p9999_to_median']}")
    if "bandwidth" in results:
        print(f"\nGB/s: {results['bandwidth']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=5.0, help="Of each measurement.")
    parser.add_argument("--copies", type=int, default=15)
    parser.add_argument("--load", type=float, default=0.5, help="Part of the bare loop's throughput that is offered.")
    parser.add_argument("--engine", default=sys.executable, help="The interpreter that runs the cluster.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    gpus = cuda_devices()
    if options.device == "cuda" and not gpus:
        print("There is no GPU here: nothing is measured. (--device cpu tries the script on small models.)")
        return
    device = gpus[0] if options.device == "cuda" else parse_devices("cpu")[0]
    models = ON_GPU if options.device == "cuda" else ON_CPU
    results: dict[str, Any] = {"device": device.type, "models": {}}
    for model in models:
        results["models"][model.name] = one_model(model, device, options.seconds)
    flow = list(results["models"][models[0].name]["throughput"].values())[-1]
    rate = flow["bare_per_second"] * options.load
    results["goodput"] = goodput(models[0], options.copies, rate, options.seconds, options.engine)
    if options.device == "cuda":
        results["bandwidth"] = copies_per_second()
    if options.json:
        print(json.dumps(results))
    else:
        table(results)


if __name__ == "__main__":
    main()
