"""Triton with its own dynamic batcher against Laxity driving the same Triton server with ready-made batches.

One server process, the same two models twice, two ways to serve the two-stage pipeline that they make within its SLO:

- Triton alone: each model has its dynamic batcher, with a queue policy that rejects what waited too long. The pipeline
  is an ensemble, or chained by the client, which then gives the second model what is left of the SLO as its timeout.
  Which of the two, the batcher's delay and preferred size, and how much of the SLO may be spent in queues are tried out
  first, in the same run, and the best is taken.
- Laxity: a cluster whose devices each hold one of the two models, by the ``triton`` executor. It is told alpha and beta
  in the pipeline's file, as those who tune Triton's timeouts know them.

Each model has ``--gpus`` instances, which in Laxity's case are as many devices.

A batch of b takes alpha*b + beta in both: the models sleep, which takes nothing of this machine's cores, as work on a
GPU of its own would not. Arrivals are those of a bursty trace and come to both from the same open-loop generator, which
counts a request as good that is answered within the SLO from when it was due; the two take turns, so that whatever
else this machine does hits both. The trace lies in the folder ``traces``
of LAXITY_SHARED (../shared beside this project unless set); without it gaps are drawn from a gamma distribution.

    python benchmarks/triton_serving.py
    python benchmarks/triton_serving.py --gpus 1 --loads 0.9 --seeds 1 --seconds 10 --json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cli.load.generator import Generator
from cli.load.port import ClientPort
from cli.load.tally import StepTally
from cli.load.traffic import Kind, Mix
from cli.local_cluster import LocalCluster, Setup
from cli.rundir import RunDirectory
from cluster.layout import AgentLayout
from laxity import Client
from laxity.outcomes import Outcome
from laxity.reply import Reply
from pipelines import PipelineSpec, load_spec
from pipelines.capacity import planned_costs
from simulation.arrivals import prepare
from simulation.metrics import Floats

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from triton_server import TritonServer, find_tritonserver

SHARED = Path(os.environ.get("LAXITY_SHARED", Path(__file__).parents[2] / "shared"))
TRACE = SHARED / "traces" / "twitter_ipa_bursty_per_second.csv"
BURST_FROM = 330.0
"""Where in the trace the first seed's part begins; each seed has the part after the last one's."""
WARM_UP = 3.0
"""Seconds that each system is loaded before it is measured."""
SIZE = 256
"""Floats in a request, and in an answer."""
MAX_BATCH = 16
STAGES = {"detect": (4.0, 24.0), "classify": (4.6, 12.0)}
"""alpha and beta in milliseconds."""
BATCHED = "batched_"
"""Before the names of the models that Triton batches itself."""
MODEL = """
import json, time
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def initialize(self, args):
        said = json.loads(args["model_config"])["parameters"]
        self.alpha, self.beta = (float(said[name]["string_value"]) / 1000 for name in ("alpha", "beta"))

    def execute(self, requests):
        begun = time.monotonic()
        inputs = [pb.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        answers = [pb.InferenceResponse([pb.Tensor("y", x + np.float32(1))]) for x in inputs]
        ends = begun + self.beta + self.alpha * sum(len(x) for x in inputs)
        time.sleep(max(0.0, ends - time.monotonic()))
        return answers
"""
TENSORS = """
max_batch_size: {max_batch}
{instances}
input [{{name: "x" data_type: TYPE_FP32 dims: [{size}]}}]
output [{{name: "y" data_type: TYPE_FP32 dims: [{size}]}}]
"""
SPEC = """
name: two
slo: {slo}ms
stages:
  detect: {{executor: triton, model: detect, max_batch: {max_batch}, options: {{url: "{url}"}},
    profile: {{alpha_ms: {detect[0]}, beta_ms: {detect[1]}}}}}
  classify: {{executor: triton, model: classify, max_batch: {max_batch}, inputs: [detect],
    options: {{url: "{url}"}}, profile: {{alpha_ms: {classify[0]}, beta_ms: {classify[1]}}}}}
output: classify
"""


class Tuning(NamedTuple):
    """How Triton alone is set up."""

    way: str
    """'ensemble' or 'chained'."""
    delay_ms: float
    """max_queue_delay: how long a request may wait for others before its batch begins."""
    preferred: int
    """preferred_batch_size (0: none)."""
    reserve: float
    """What part of the remaining executions (in largest batches) is kept from the time that a request may queue."""

    def __str__(self) -> str:
        preferred = f"preferred {self.preferred}" if self.preferred else "no preferred size"
        return f"{self.way}, delay {self.delay_ms:g} ms, {preferred}, reserve {self.reserve:g}"


class Result(NamedTuple):
    """One run."""

    offered: float
    goodput: float
    late: float
    refused: float
    p99_ms: float
    """Of the good ones."""
    lag_ms: float
    """The generator's, at p99."""


class _Pending(Future[Reply]):
    """What the generator expects of a client's future."""

    def reply(self, timeout: float | None = None) -> Reply:
        return self.result(timeout)


class TritonClient:
    """Triton alone, in the place of Laxity's client."""

    def __init__(self, url: str, tuning: Tuning, slo: float) -> None:
        from tritonclient import grpc

        self._grpc = grpc
        self._client = grpc.InferenceServerClient(url)
        self._tuning = tuning
        self._slo = slo
        self._reserves = reserves(tuning)

    def submit(self, _pipeline: str, payload: Any, _slo: float | None, priority: int = 0) -> _Pending:
        pending = _Pending()
        models = ["both"] if self._tuning.way == "ensemble" else [BATCHED + name for name in STAGES]
        self._infer(models, payload[None], pending, time.monotonic() + self._slo)
        return pending

    def close(self) -> None:
        self._client.close()

    def _infer(self, models: list[str], array: Any, pending: _Pending, deadline: float) -> None:
        given = self._grpc.InferInput("x", list(array.shape), "FP32")
        given.set_data_from_numpy(array)
        timeout = None
        if self._tuning.way == "chained":
            timeout = max(1, int(1e6 * (deadline - time.monotonic() - self._reserves[models[0]])))
        answered = partial(self._answered, models[1:], pending, deadline)
        self._client.async_infer(models[0], [given], answered, timeout=timeout)

    def _answered(self, following: list[str], pending: _Pending, deadline: float, result: Any, error: Any) -> None:
        if error is not None:
            pending.set_result(Reply(Outcome.DROPPED, None, 0.0, "", str(error), 0.0, (), ""))
        elif following:
            self._infer(following, result.as_numpy("y"), pending, deadline)
        else:
            pending.set_result(Reply(Outcome.OK, result.as_numpy("y")[0], 0.0, "", "", 0.0, (), ""))


def reserves(tuning: Tuning) -> dict[str, float]:
    """Seconds of each model's deadline that are kept for its own execution and those after it."""
    times = [(alpha * MAX_BATCH + beta) / 1e3 for alpha, beta in STAGES.values()]
    kept = {BATCHED + name: tuning.reserve * sum(times[index:]) for index, name in enumerate(STAGES)}
    return {"both": kept[BATCHED + next(iter(STAGES))], **kept}


def add_model(server: TritonServer, stage: str, gpus: int, prefix: str = "", batching: str = "") -> None:
    """Put a stage's model into the server's repository."""
    instances = f"instance_group [{{count: {gpus} kind: KIND_CPU}}]"
    tensors = TENSORS.format(max_batch=MAX_BATCH, size=SIZE, instances=instances)
    parameters = "".join(
        f'parameters {{key: "{key}" value {{string_value: "{value}"}}}}\n'
        for key, value in zip(("alpha", "beta"), STAGES[stage], strict=True)
    )
    server.add(prefix + stage, tensors + parameters + batching, MODEL)


def set_up(server: TritonServer, tuning: Tuning, slo: float, gpus: int) -> None:
    """Have the server serve the models with its own batcher."""
    from tritonclient.grpc import InferenceServerClient

    kept = reserves(tuning)
    with InferenceServerClient(server.url) as client:
        for name in kept:
            if client.is_model_ready(name):
                client.unload_model(name)
        for stage in STAGES:
            add_model(server, stage, gpus, BATCHED, _batching(tuning, slo - kept[BATCHED + stage]))
            client.load_model(BATCHED + stage)
        if tuning.way == "ensemble":
            _write_ensemble(server)
            client.load_model("both")


def _batching(tuning: Tuning, queued: float) -> str:
    preferred = f"preferred_batch_size: [{tuning.preferred}]" if tuning.preferred else ""
    return f"""dynamic_batching {{
  {preferred}
  max_queue_delay_microseconds: {1000 * tuning.delay_ms:.0f}
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: {1e6 * queued:.0f}
    allow_timeout_override: true
  }}
}}
"""


def _write_ensemble(server: TritonServer) -> None:
    steps, names = [], ["x", *list(STAGES)[:-1], "y"]
    for stage, given, gives in zip(STAGES, names[:-1], names[1:], strict=True):
        maps = f'input_map {{key: "x" value: "{given}"}} output_map {{key: "y" value: "{gives}"}}'
        steps.append(f'{{model_name: "{BATCHED + stage}" model_version: -1 {maps}}}')
    directory = server.repository / "both"
    (directory / "1").mkdir(parents=True, exist_ok=True)
    tensors = TENSORS.format(max_batch=MAX_BATCH, size=SIZE, instances="")
    (directory / "config.pbtxt").write_text(
        f'platform: "ensemble"\n{tensors}ensemble_scheduling {{step [{", ".join(steps)}]}}\n'
    )


@contextmanager
def laxity(directory: Path, spec: PipelineSpec, gpus: int) -> Iterator[Client]:
    """A cluster with so many devices for each stage, as ``laxity up`` runs it, and a client of it."""
    layouts = [
        AgentLayout(f"agent-{stage}-{number}", "cpu", {0: [spec.model_key(stage)]})
        for stage, number in itertools.product(spec.stages, range(gpus))
    ]
    run = RunDirectory("bench", directory / "run")
    with LocalCluster(run, None, lambda: False, partial(print, file=sys.stderr)) as cluster:
        cluster.start(Setup(specs=[spec], layouts=layouts), lambda _: None)
        addresses = cluster.wait_ready(lambda _: None)
        with Client(",".join(addresses), max_pending=200_000) as client:
            client.wait_ready(20.0)
            yield client


def arrivals(seconds: float, rate: float, seed: int) -> Floats:
    begin = BURST_FROM + seconds * (seed - 1)
    if TRACE.is_file():
        return prepare(str(TRACE), window=(begin, begin + seconds)).draw(rate, seed)
    return prepare("gamma:3", seconds=seconds).draw(rate, seed)


class Latencies(StepTally):
    """Each latency as it was, too: what comes late from Triton counts as late, not as good."""

    def __init__(self) -> None:
        super().__init__(1)
        self.latencies: list[float] = []

    def ended(
        self, kind: int, at: float, now: float, latency: float, outcome: Outcome, stage: str, detail: str
    ) -> None:
        super().ended(kind, at, now, latency, outcome, stage, detail)
        if outcome is Outcome.OK:
            self.latencies.append(latency)


def run(client: Any, times: Floats, seconds: float, slo: float) -> Result:
    tally = Latencies()
    traffic = Mix([Kind("two")], {"two": [np.zeros(SIZE, np.float32)]}, 0)
    Generator(ClientPort(client), traffic, 100_000).open_loop(times, tally, lambda _: False)
    latencies = np.array(tally.latencies)
    good = latencies[latencies <= slo]
    return Result(
        offered=len(times) / seconds,
        goodput=len(good) / seconds,
        late=(len(latencies) - len(good)) / seconds,
        refused=(len(times) - len(latencies)) / seconds,
        p99_ms=1e3 * float(np.quantile(good, 0.99)) if len(good) else float("nan"),
        lag_ms=(tally.lag.quantile(0.99) or 0.0) / 1e3,
    )


def tune(server: TritonServer, slo: float, gpus: int, times: Floats, seconds: float) -> list[tuple[Tuning, Result]]:
    """All that was tried, best first: the way and the time for queues, then the batcher's delay and preferred size."""
    tried: dict[Tuning, Result] = {}

    def attempt(tuning: Tuning) -> None:
        if tuning not in tried:
            set_up(server, tuning, slo, gpus)
            client = TritonClient(server.url, tuning, slo)
            run(client, times[times < 1.0], 1.0, slo)
            tried[tuning] = run(client, times, seconds, slo)
            client.close()
            print(f"  {tuning}: {tried[tuning].goodput:.1f}/s", file=sys.stderr)

    def best() -> Tuning:
        return max(tried, key=lambda tuning: tried[tuning].goodput)

    for way, reserve in itertools.product(("ensemble", "chained"), (0.0, 1.0)):
        attempt(Tuning(way, 0.0, 0, reserve))
    found = best()
    for delay, preferred in ((2.0, 0), (5.0, 0), (5.0, MAX_BATCH), (10.0, MAX_BATCH), (20.0, MAX_BATCH)):
        attempt(found._replace(delay_ms=delay, preferred=preferred))
    found = best()
    for reserve in (0.75, 1.25, 1.5):
        attempt(found._replace(reserve=reserve))
    return sorted(tried.items(), key=lambda entry: -entry[1].goodput)


def medians(results: Sequence[Result]) -> Result:
    return Result(*(statistics.median(values) for values in zip(*results, strict=True)))


def measure(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    slo = options.slo_ms / 1e3
    with TritonServer(directory / "triton") as server:
        for stage in STAGES:
            add_model(server, stage, options.gpus)
        server.start()
        text = SPEC.format(slo=options.slo_ms, max_batch=MAX_BATCH, url=server.url, **STAGES)
        (directory / "two.yaml").write_text(text)
        spec = load_spec(str(directory / "two.yaml"))
        capacity = options.gpus / max(planned_costs(spec).values())
        print("tuning Triton's batcher:", file=sys.stderr)
        drawn = arrivals(options.tune_seconds, options.tune_at * capacity, 1)
        tried = tune(server, slo, options.gpus, drawn, options.tune_seconds)
        set_up(server, tried[0][0], slo, options.gpus)
        alone = TritonClient(server.url, tried[0][0], slo)
        results: dict[str, dict[float, list[Result]]] = {"triton": {}, "laxity": {}}
        with laxity(directory, spec, options.gpus) as ours:
            clients = {"triton": alone, "laxity": ours}
            for client in clients.values():
                run(client, arrivals(WARM_UP, 0.7 * capacity, 1), WARM_UP, slo)
            for load, seed in itertools.product(options.loads, range(1, options.seeds + 1)):
                drawn = arrivals(options.seconds, load * capacity, seed)
                for system, client in clients.items():
                    result = run(client, drawn, options.seconds, slo)
                    results[system].setdefault(load, []).append(result)
                    print(f"  {system} at {load:g}: {result.goodput:.1f}/s of {result.offered:.1f}/s", file=sys.stderr)
        alone.close()
    return {
        "slo_ms": options.slo_ms,
        "gpus": options.gpus,
        "capacity_rps": capacity,
        "arrivals": TRACE.name if TRACE.is_file() else "gamma:3",
        "seconds": options.seconds,
        "seeds": options.seeds,
        "tuned_at": options.tune_at,
        "tried": [{**tuning._asdict(), "goodput": result.goodput} for tuning, result in tried],
        "runs": {
            system: {load: [result._asdict() for result in runs] for load, runs in by_load.items()}
            for system, by_load in results.items()
        },
        "medians": {
            system: {load: medians(runs)._asdict() for load, runs in by_load.items()}
            for system, by_load in results.items()
        },
    }


def show(found: dict[str, Any]) -> None:
    print(
        f"two stages on {found['gpus']} GPUs each, SLO {found['slo_ms']:g} ms, "
        f"capacity {found['capacity_rps']:.0f}/s, {found['arrivals']}, "
        f"medians of {found['seeds']} runs of {found['seconds']:g} s"
    )
    first, *_, last = found["tried"]
    print(f"Triton's batcher at its best of {len(found['tried'])} at load {found['tuned_at']:g}:")
    for what, entry in (("taken", first), ("worst", last)):
        fields = dict(entry)
        goodput = fields.pop("goodput")
        print(f"  {what}: {Tuning(**fields)}: {goodput:.1f}/s")
    print(f"{'':>6}{'':>10}{'Triton alone':^32}{'Laxity on Triton':^32}")
    header = f"{'good/s':>9}{'late/s':>8}{'ref./s':>8}{'p99':>7}"
    print(f"{'load':>6}{'offered/s':>10}{header}{header}{'goodput':>10}")
    for load, alone in found["medians"]["triton"].items():
        ours = found["medians"]["laxity"][load]
        cells = "".join(
            f"{each['goodput']:>9.1f}{each['late']:>8.1f}{each['refused']:>8.1f}{each['p99_ms']:>7.0f}"
            for each in (alone, ours)
        )
        print(f"{load:>6g}{alone['offered']:>10.1f}{cells}{ours['goodput'] / alone['goodput'] - 1:>+10.1%}")
    lag = max(each["lag_ms"] for system in found["medians"].values() for each in system.values())
    print(f"generator's lag at p99: at most {lag:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, help="instances of each model, and devices (default 2)")
    parser.add_argument("--slo-ms", type=float, default=300.0)
    parser.add_argument(
        "--loads", type=lambda text: [float(part) for part in text.split(",")], default="0.7,0.9,1.1,1.5"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each run (default 12)")
    parser.add_argument("--tune-seconds", type=float, default=6.0, help="of each setting that is tried (default 6)")
    parser.add_argument("--tune-at", type=float, default=1.1, help="load at which settings are tried (default 1.1)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if find_tritonserver() is None:
        print("skipped: there is no tritonserver; .ci/triton .venv/bin puts one there")
        return
    with tempfile.TemporaryDirectory(prefix="laxity-triton-") as directory:
        found = measure(options, Path(directory))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


if __name__ == "__main__":
    main()
