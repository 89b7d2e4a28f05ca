"""What it costs to be observed: throughput with metrics, traces and scrapes against none of them, and what a scrape
adds to the delay of grants.

*Round trips*: 64-byte requests through client, shard and an emulated node of zero latency, as in ``round_trips.py``.
Two shards are there, each with a node of its own: one as shards are by default (metrics, 1 % of the requests traced,
HTTP) and scraped once in 5 s of its work, the other with none of that (``--no-metrics --traces 0 --http ''``). They
work in turn, a second each; told are medians of round trips/s and of the CPU time that the shard takes for one, and the
medians of both ratios (none : observed for the time) of neighbouring seconds. Where others use the processors too, the
second is the one to go by: it is what the shard could do if it were all that limits.

*Grants*: requests come at a moderate, even rate, and what counts is their latency from when they were due, through a
shard whose nodes take no time: without scrapes; with one every 0.1 s of another shard like it; and of itself; in turn,
a second each. A scrape is a GET of /metrics by another process, and its text is made by a third one: what the scrapes
of another shard add is for want of processors, what those of itself add to that is the shard's own delay. It is done
for one pipeline of one stage, and for 50 pipelines of five stages that are all in use. Told are the medians over the
seconds of p50 and p99, p99.9 of all of them, and the medians of the differences of p99 of neighbouring seconds.

    python benchmarks/observability.py
    python benchmarks/observability.py --engine .venv-compiled/bin/python --runs 9 --json
"""

from __future__ import annotations

import argparse
import json
import select
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import zmq

from laxity import protocol
from laxity.protocol import Hello, Request, Submit
from pipelines import load_spec
from pipelines.load import parse_spec
from pipelines.spec import PipelineSpec

sys.path.append(str(Path(__file__).parent))

from round_trips import CASES, SHARED, Process, cpu_seconds, tell

SCRAPES = 5.0
"""Seconds between two scrapes while round trips are counted."""
OFTEN = 0.1
"""Seconds between two scrapes while grants are timed."""
SLICE = 1.0
"""Seconds of each load: what else goes on on the machine is much the same in two of them."""
PIPELINES, STAGES = 50, 5
RATES = {"one": 500.0, "many": 200.0}
"""Requests per second of each kind of shard while grants are timed."""
STAGE = "  s{}: {{executor: emulated, profile: {{alpha_ms: 0, beta_ms: 0}}, inputs: [{}]}}"


def specs(kind: str) -> list[PipelineSpec]:
    """What a shard of a kind serves."""
    if kind == "one":
        return [load_spec("echo")]
    stages = [STAGE.format(at, f"s{at - 1}" if at else "request") for at in range(STAGES)]
    text = "\n".join(["slo: 2s", "stages:", *stages, f"output: s{STAGES - 1}"])
    return [parse_spec(f"name: many-{at}\n{text}\n", file="many.yaml", root="") for at in range(PIPELINES)]


# ---- the processes ---------------------------------------------------------------------------


def serve_until_end(stop: Callable[[], None]) -> None:
    """A thread that answers the benchmark until it closes this process's standard input."""

    def serve() -> None:
        for line in sys.stdin:
            if line.strip() == "cpu":
                tell(cpu=cpu_seconds())
        stop()

    threading.Thread(target=serve).start()


def role_shard(kind: str, observed: str) -> None:
    import broker.engine.scheduler
    from broker.process import spare_collector
    from broker.shell import Shard, ShardConfig
    from cli.children import laxity
    from cluster.observe.sidecar import Sidecar

    spare_collector()
    shard = Shard(ShardConfig(name="bench") if observed else ShardConfig(name="bench", metrics=False, traces=0))
    for spec in specs(kind):
        shard.apply(spec)
    with ExitStack() as stack:
        http = ""
        if observed:
            command = laxity("observe", "--process", "shard", "--name", "bench")
            http = stack.enter_context(Sidecar("127.0.0.1:*", "", command, shard.source)).address
        compiled = not (broker.engine.scheduler.__file__ or "").endswith(".py")
        serve_until_end(shard.stop)
        tell(frontend=shard.frontend, backend=shard.backend, http=http, compiled=compiled)
        shard.run()


def role_node(kind: str, address: str) -> None:
    from nodes.agent import Agent, AgentConfig, Work
    from nodes.device import DeviceConfig

    served = {spec.model_key(stage): (spec, stage) for spec in specs(kind) for stage in spec.stages}
    told = threading.Event()

    def changed(states: list) -> None:  # type: ignore[type-arg]
        ready = all(len(device.models) == len(served) for device in states) and all(
            state == "ready" for device in states for state in device.models.values()
        )
        if ready and not told.is_set():
            told.set()
            tell(ready=True)

    agent = Agent(AgentConfig(name="bench", devices=[DeviceConfig("emulated", "emulated")]), changed)
    agent.place({0: Work("bench", served)})
    agent.follow({"bench": address})
    serve_until_end(agent.stop)
    agent.run()


def role_scraper(url: str) -> None:
    """Scrapes as it is told, in seconds between two (0: not at all), and answers when none is under way how often it
    did since, the median time that it took and the bytes of the last one."""
    request = urllib.request.Request(f"{url}/metrics", headers={"Accept-Encoding": "gzip"})
    taken: list[float] = []
    size = 0
    interval = due = 0.0
    tell(ready=True)
    while True:
        left = max(due - time.monotonic(), 0.0) if interval else None
        if select.select([sys.stdin], [], [], left)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            tell(scrapes=len(taken), ms=statistics.median(taken) * 1e3 if taken else 0.0, bytes=size)
            taken.clear()
            interval, due = float(line), time.monotonic()
            continue
        begin = time.monotonic()
        with urllib.request.urlopen(request, timeout=30.0) as response:
            size = len(response.read())
        taken.append(time.monotonic() - begin)
        due = max(due + interval, time.monotonic())


# ---- a shard, its node, and who scrapes it -------------------------------------------------------


class Scrapes(NamedTuple):
    """How many there were, what one took (median), and the bytes of its answer (compressed)."""

    scrapes: int
    ms: float
    bytes: int


class Observed:
    """A shard of a kind with a node, and a scraper where it is ``observed``."""

    def __init__(self, python: str, kind: str, observed: bool) -> None:
        process = partial(Process, python, file=__file__)
        self.shard = process("shard", kind, "yes" if observed else "")
        self._node = process("node", kind, str(self.shard.told["backend"]))
        self._scraper = process("scraper", str(self.shard.told["http"])) if observed else None
        self.frontend = str(self.shard.told["frontend"])

    def scrape(self, interval: float) -> Scrapes:
        """Have it scraped this often from now on; how that went until now."""
        if self._scraper is None:
            return Scrapes(0, 0.0, 0)
        return Scrapes(**self._scraper.ask(str(interval)))  # type: ignore[arg-type]

    def end(self) -> None:
        for process in (self._scraper, self._node, self.shard):
            if process is not None:
                process.end()


# ---- round trips ---------------------------------------------------------------------------------


class Turn(NamedTuple):
    """One turn of a shard: round trips/s, and the shard's CPU µs a round trip."""

    rate: float
    broker: float


def turn(shard: Observed, case: str, count: int, scraped: bool) -> Turn:
    shard.scrape(SCRAPES if scraped else 0.0)
    before = shard.shard.cpu()
    seconds = CASES[case](shard.frontend, count)
    spent = shard.shard.cpu() - before
    shard.scrape(0.0)
    return Turn(count / seconds, spent / count * 1e6)


def round_trips(python: str, duration: float, runs: int) -> list[dict[str, object]]:
    both = {"plain": Observed(python, "one", False), "observed": Observed(python, "one", True)}
    rows: list[dict[str, object]] = []
    for case in CASES:
        for shard in both.values():
            turn(shard, case, SHARED * 100, True)
        first = turn(both["plain"], case, SHARED * 200, False)
        count = max(round(first.rate * SLICE / SHARED), 1) * SHARED
        turns: dict[str, list[Turn]] = {"plain": [], "observed": []}
        for number in range(max(round(duration * runs / SLICE), 1)):
            for name in list(both) if number % 2 else reversed(both):  # which goes first takes turns, too
                turns[name].append(turn(both[name], case, count, number % round(SCRAPES / SLICE) == 0))
        plain, observed = turns["plain"], turns["observed"]
        pairs = list(zip(plain, observed, strict=True))
        rows.append(
            {
                "case": case,
                "plain_per_s": round(statistics.median(one.rate for one in plain)),
                "observed_per_s": round(statistics.median(one.rate for one in observed)),
                "ratio": round(statistics.median(other.rate / one.rate for one, other in pairs), 3),
                "plain_broker_us": round(statistics.median(one.broker for one in plain), 2),
                "observed_broker_us": round(statistics.median(one.broker for one in observed), 2),
                "broker_ratio": round(statistics.median(one.broker / other.broker for one, other in pairs), 3),
            }
        )
    for shard in both.values():
        shard.end()
    return rows


# ---- grants --------------------------------------------------------------------------------------


def paced(address: str, names: Sequence[str], rate: float, seconds: float) -> list[float]:
    """Latencies of requests to ``names`` in turn, from when they were due; those that did not end ok last for ever."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(address)
    socket.send(protocol.encode(Hello(protocol.VERSION, f"paced-{time.time_ns()}")))
    socket.recv_multipart()
    decode = msgspec.msgpack.Decoder(protocol.ToClient).decode
    node = msgspec.Raw(b"\x92\x00\x40")  # 64 bytes
    count = round(rate * seconds)
    latencies = [float("inf")] * count
    begin = time.monotonic() + 0.01
    sent = received = 0
    while received < count:
        now = time.monotonic()
        while sent < count and begin + sent / rate <= now:
            request = Request(sent, names[sent % len(names)], None, node)  # type: ignore[arg-type]
            socket.send(protocol.encode(Submit(time.monotonic_ns() // 1000, [request])), zmq.SNDMORE)
            socket.send(b"x" * 64)
            sent += 1
        due = begin + sent / rate - time.monotonic() if sent < count else 5.0
        # Whole milliseconds: the last one is spent looking.
        if not socket.poll(max(int(due * 1e3), 0)):
            if sent == count:
                break
            continue
        message = decode(socket.recv_multipart()[0])
        if isinstance(message, protocol.Result):
            now = time.monotonic()
            for answer in message.answers:
                received += 1
                if answer.outcome == "ok":
                    latencies[answer.id] = now - begin - answer.id / rate
    context.destroy(0)
    return latencies


def grants(python: str, kind: str, duration: float, runs: int) -> dict[str, object]:
    shard, other = Observed(python, kind, True), Observed(python, kind, True)
    names = [spec.name for spec in specs(kind)]
    for one in (shard, other):
        paced(one.frontend, names, RATES[kind], 3.0)  # plans are made, all stages have been used
        one.scrape(OFTEN)
        paced(one.frontend, names, RATES[kind], 1.0)  # the process that speaks HTTP has begun
        one.scrape(0.0)
    slices: dict[str, list[list[float]]] = {"quiet": [], "beside": [], "scraped": []}
    scrapes: list[Scrapes] = []
    for number in range(max(round(duration * runs / SLICE), 1)):
        order = list(slices)
        for which in order[number % 3 :] + order[: number % 3]:
            scraped = {"quiet": None, "beside": other, "scraped": shard}[which]
            if scraped is not None:
                scraped.scrape(OFTEN)
            slices[which].append(paced(shard.frontend, names, RATES[kind], SLICE))
            if scraped is not None:
                scrapes.append(scraped.scrape(0.0))
    for one in (shard, other):
        one.end()
    row: dict[str, object] = {
        "case": kind,
        "rate": RATES[kind],
        "stages": len(names) * (STAGES if kind == "many" else 1),
    }
    for which, taken in slices.items():
        row[f"{which}_p50_ms"] = round(statistics.median(percentile(one, 50.0) for one in taken), 3)
        row[f"{which}_p99_ms"] = round(statistics.median(percentile(one, 99.0) for one in taken), 3)
        row[f"{which}_p999_ms"] = round(percentile([latency for one in taken for latency in one], 99.9), 3)
    for base in ("quiet", "beside"):
        added = [
            percentile(x, 99.0) - percentile(y, 99.0) for x, y in zip(slices["scraped"], slices[base], strict=True)
        ]
        row[f"p99_above_{base}_ms"] = round(statistics.median(added), 3)
    row["scrapes"] = sum(one.scrapes for one in scrapes)
    row["scrape_ms"] = round(statistics.median(one.ms for one in scrapes), 1)
    row["scrape_bytes"] = scrapes[-1].bytes
    return row


def percentile(latencies: Sequence[float], part: float) -> float:
    """In ms."""
    ordered = sorted(latencies)
    return ordered[min(int(part / 100.0 * len(ordered)), len(ordered) - 1)] * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--engine", help="another interpreter to run shards and nodes with")
    parser.add_argument(
        "--duration", type=float, default=5.0, metavar="SECONDS", help="of load in each run (default 5)"
    )
    parser.add_argument("--runs", type=int, default=5, help="runs of each kind (default 5)")
    parser.add_argument("--only", choices=["round-trips", "grants"], help="leave out the other")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    options = parser.parse_args()
    if options.role:
        role, *arguments = options.role
        {"shard": role_shard, "node": role_node, "scraper": role_scraper}[role](*arguments)
        return
    default = Path(__file__).parent.parent / ".venv-compiled" / "bin" / "python"
    python = options.engine or (str(default) if default.exists() else sys.executable)
    trips = round_trips(python, options.duration, options.runs) if options.only != "grants" else []
    timed = (
        [grants(python, kind, options.duration, options.runs) for kind in RATES]
        if options.only != "round-trips"
        else []
    )
    if options.json:
        print(json.dumps({"round_trips": trips, "grants": timed}, indent=2))
        return
    if trips:
        print("64 B round trips, medians of seconds; the shard's CPU µs a round trip; and ratios")
        print(f"{'case':<10}{'none/s':>10}{'observed/s':>12}{'ratio':>8}{'CPU none':>10}{'observed':>10}{'ratio':>8}")
        for row in trips:
            print(
                f"{row['case']:<10}{row['plain_per_s']:>10,}{row['observed_per_s']:>12,}{row['ratio']:>8.3f}"
                f"{row['plain_broker_us']:>10.2f}{row['observed_broker_us']:>10.2f}{row['broker_ratio']:>8.3f}"
            )
    if timed:
        print(f"\nrequests' latency in ms, medians of seconds; one scrape every {OFTEN:g} s")
        print(
            f"{'stages':>6}{'rate':>6}  {'scraped':<14}{'p50':>8}{'p99':>8}{'p99.9':>9}{'this adds':>11}{'scrape':>9}"
        )
        for row in timed:
            for which, name in (("quiet", "none"), ("beside", "another shard"), ("scraped", "this shard")):
                less = f"{row[f'p99_above_{which}_ms']:>11.2f}" if which != "scraped" else f"{'':>11}"
                print(
                    f"{row['stages']:>6}{row['rate']:>6.0f}  {name:<14}{row[f'{which}_p50_ms']:>8.2f}"
                    f"{row[f'{which}_p99_ms']:>8.2f}{row[f'{which}_p999_ms']:>9.2f}{less}{row['scrape_ms']:>9.1f}"
                )


if __name__ == "__main__":
    main()
