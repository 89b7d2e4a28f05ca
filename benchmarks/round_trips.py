"""Round trips of 64-byte requests through client, shard and an emulated node of zero latency.

Beside them, in the same run, libzmq's own ``zmq_proxy`` on the same work (a bare client, the proxy, an echoing
worker), because these machines are noisy: what counts is the ratio. Each case is run several times, all in turn, and
the medians are told. ``--engine`` names the interpreter of another installation (compiled, say) to compare with.

    python benchmarks/round_trips.py
    python benchmarks/round_trips.py --engine .venv-compiled/bin/python --rounds 5 --json
    python benchmarks/round_trips.py --profile single     # where the shard's time goes
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import zmq

PAYLOAD = b"x" * 64
WINDOW = 2048
"""Requests that a client keeps in flight."""
SHARED = 128
"""Requests in one SUBMIT where they share messages."""


# ---- the processes ---------------------------------------------------------------------------


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def tell(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def role_proxy() -> None:
    """libzmq's proxy between a ROUTER and a DEALER, steered over a third socket."""
    context = zmq.Context()
    front, back, control = context.socket(zmq.ROUTER), context.socket(zmq.DEALER), context.socket(zmq.PAIR)
    for socket in (front, back):
        socket.set(zmq.SNDHWM, 100_000)
        socket.set(zmq.RCVHWM, 100_000)
    ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in (front, back)]
    control.bind("inproc://control")

    def end() -> None:
        command = context.socket(zmq.PAIR)
        command.connect("inproc://control")
        for line in sys.stdin:
            if line.strip() == "cpu":
                tell(cpu=cpu_seconds())
        command.send(b"TERMINATE")
        command.close()

    thread = threading.Thread(target=end)
    thread.start()
    tell(frontend=f"tcp://127.0.0.1:{ports[0]}", backend=f"tcp://127.0.0.1:{ports[1]}")
    zmq.proxy_steerable(front, back, None, control)
    thread.join()
    context.destroy(0)


def role_echo(address: str) -> None:
    """The proxy's worker: sends back what comes."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.SNDHWM, 100_000)
    socket.set(zmq.RCVHWM, 100_000)
    socket.connect(address)
    stop = threading.Event()

    def end() -> None:
        for line in sys.stdin:
            if line.strip() == "cpu":
                tell(cpu=cpu_seconds())
        stop.set()

    threading.Thread(target=end, daemon=True).start()
    tell(ready=True)
    recv, send, again, more = socket.recv, socket.send, int(zmq.NOBLOCK), int(zmq.SNDMORE)
    while not stop.is_set():
        if not socket.poll(100):
            continue
        try:
            while True:
                sender = recv(again)
                body = recv()
                send(sender, more)
                send(body)
        except zmq.Again:
            pass
    context.destroy(0)


def role_shard(profile: str) -> None:
    """A shard that serves the shipped pipeline ``echo``."""
    import broker.engine.scheduler
    from broker.process import spare_collector
    from broker.shell import Shard, ShardConfig
    from pipelines import load_spec

    spare_collector()
    shard = Shard(ShardConfig(name="bench"))
    shard.apply(load_spec("echo"))
    compiled = not (broker.engine.scheduler.__file__ or "").endswith(".py")

    def end() -> None:
        for line in sys.stdin:
            if line.strip() == "cpu":
                tell(cpu=cpu_seconds())
        shard.stop()

    threading.Thread(target=end).start()
    tell(frontend=shard.frontend, backend=shard.backend, compiled=compiled)
    if profile:
        profiler = cProfile.Profile()
        profiler.runcall(shard.run)
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(22)
    else:
        shard.run()


def role_agent(address: str) -> None:
    """An agent with one emulated device of zero latency."""
    from nodes.agent import Agent, AgentConfig, Work
    from nodes.device import DeviceConfig
    from pipelines import load_spec

    spec = load_spec("echo")

    told = threading.Event()

    def changed(states: list) -> None:  # type: ignore[type-arg]
        if not told.is_set() and all(state == "ready" for device in states for state in device.models.values()):
            told.set()
            tell(ready=True)

    agent = Agent(AgentConfig(name="bench", devices=[DeviceConfig("emulated", "emulated")]), changed)
    agent.place({0: Work("bench", {spec.model_key("echo"): (spec, "echo")})})
    agent.follow({"bench": address})

    def end() -> None:
        for line in sys.stdin:
            if line.strip() == "cpu":
                tell(cpu=cpu_seconds())
        agent.stop()

    threading.Thread(target=end).start()
    agent.run()


# ---- the clients: each returns the seconds that ``count`` round trips took -------------------------


def bare_proxy(address: str, count: int) -> float:
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.SNDHWM, 100_000)
    socket.set(zmq.RCVHWM, 100_000)
    socket.connect(address)
    socket.send(PAYLOAD)
    socket.recv()
    send, recv, again = socket.send, socket.recv, int(zmq.NOBLOCK)
    sent = received = 0
    begin = time.perf_counter()
    while received < count:
        while sent < count and sent - received < WINDOW:
            send(PAYLOAD)
            sent += 1
        recv()
        received += 1
        try:
            while True:
                recv(again)
                received += 1
        except zmq.Again:
            pass
    seconds = time.perf_counter() - begin
    context.destroy(0)
    return seconds


def bare_laxity(address: str, count: int, shared: int) -> float:
    """A client of bare pyzmq; ``shared`` requests a SUBMIT."""
    from laxity import protocol
    from laxity.protocol import Hello

    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.SNDHWM, 100_000)
    socket.set(zmq.RCVHWM, 100_000)
    socket.connect(address)
    socket.send(protocol.encode(Hello(protocol.VERSION, f"bench-{time.time_ns()}")))
    socket.recv_multipart()
    decode = msgspec.msgpack.Decoder(protocol.ToClient).decode
    more, again = int(zmq.SNDMORE), int(zmq.NOBLOCK)
    # Headers by hand, as a fast client would make them: [2, sent_us, [[id, "echo", nil, [0, 64]], ...]]
    head = struct.Struct(">BBBQ").pack
    tail = b"\xa4echo\xc0\x92\x00\x40"
    count_of = b"\x91" if shared == 1 else struct.pack(">BH", 0xDC, shared)
    body = PAYLOAD * shared
    sent = received = 0
    ok = 0
    begin = time.perf_counter()
    while received < count:
        while sent < count and sent - received <= WINDOW - shared:
            stamp = time.monotonic_ns() // 1000
            header = head(0x93, 0x02, 0xCF, stamp) + count_of
            header += b"".join([b"\x94\xce" + (sent + i).to_bytes(4) + tail for i in range(shared)])
            socket.send(header, more)
            socket.send(body)
            sent += shared
        flags = 0
        try:
            while True:
                message = decode(socket.recv(flags))
                while socket.get(zmq.RCVMORE):
                    socket.recv()
                flags = again
                if type(message) is protocol.Result:
                    received += len(message.answers)
                    for answer in message.answers:
                        ok += answer.outcome == "ok"
        except zmq.Again:
            pass
    seconds = time.perf_counter() - begin
    context.destroy(0)
    if ok != count:
        raise SystemExit(f"only {ok} of {count} requests ended ok")
    return seconds


def sdk(address: str, count: int) -> float:
    """``laxity.Client.map`` over ``count`` payloads."""
    from laxity import Client

    with Client(address) as client:
        client.infer("echo", PAYLOAD)
        begin = time.perf_counter()
        answered = sum(1 for answer in client.map("echo", (PAYLOAD for _ in range(count)), max_in_flight=WINDOW))
        seconds = time.perf_counter() - begin
    if answered != count:
        raise SystemExit(f"only {answered} of {count} requests were answered")
    return seconds


# ---- the runs ------------------------------------------------------------------------------------------


class Process:
    """A role in a process of its own; it ends when its standard input does."""

    def __init__(self, python: str, *arguments: str, file: str = __file__) -> None:
        self.process = subprocess.Popen(
            [python, "-P", file, "--role", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.told = self.read()

    def read(self) -> dict[str, object]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a benchmark process ended early with status {self.process.wait()}")
        return json.loads(line)  # type: ignore[no-any-return]

    def ask(self, line: str) -> dict[str, object]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.read()

    def cpu(self) -> float:
        return float(str(self.ask("cpu")["cpu"]))

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


CASES: dict[str, Callable[[str, int], float]] = {
    "single": lambda address, count: bare_laxity(address, count, 1),
    "shared": lambda address, count: bare_laxity(address, count, SHARED),
    "sdk": sdk,
}


class Run(NamedTuple):
    """One run: round trips/s, and CPU µs a round trip in the broker, the client and the node."""

    rate: float
    broker: float
    client: float
    node: float


def measured(broker: Process, node: Process, work: Callable[[], float], count: int) -> Run:
    before = broker.cpu(), cpu_seconds(), node.cpu()
    seconds = work()
    after = broker.cpu(), cpu_seconds(), node.cpu()
    spent = [(b - a) / count * 1e6 for a, b in zip(before, after, strict=True)]
    return Run(count / seconds, *spent)


def run_proxy(count: int) -> Run:
    proxy = Process(sys.executable, "proxy")
    worker = Process(sys.executable, "echo", str(proxy.told["backend"]))
    run = measured(proxy, worker, lambda: bare_proxy(str(proxy.told["frontend"]), count), count)
    worker.end()
    proxy.end()
    return run


def run_laxity(python: str, case: str, count: int, profile: str = "") -> tuple[Run, bool]:
    """The run, and whether the shard's engine is compiled."""
    shard = Process(python, "shard", profile)
    agent = Process(python, "agent", str(shard.told["backend"]))
    address = str(shard.told["frontend"])
    CASES[case](address, SHARED * 8)
    run = measured(shard, agent, lambda: CASES[case](address, count), count)
    agent.end()
    shard.end()
    return run, bool(shard.told["compiled"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--engine", action="append", default=[], help="another interpreter to run shard and agent with")
    parser.add_argument("--requests", type=int, default=50_000, help="round trips a run (default 50000)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each case (default 5)")
    parser.add_argument("--profile", choices=list(CASES), help="profile the shard in one case instead")
    parser.add_argument("--json", action="store_true", help="print the medians as JSON")
    options = parser.parse_args()
    if options.role:
        role, *arguments = options.role
        {"proxy": role_proxy, "echo": role_echo, "shard": role_shard, "agent": role_agent}[role](*arguments)
        return
    count = options.requests // SHARED * SHARED
    if options.profile:
        run_laxity(sys.executable, options.profile, count, "yes")
        return
    engines = [sys.executable, *options.engine]
    default = Path(__file__).parent.parent / ".venv-compiled" / "bin" / "python"
    if not options.engine and default.exists():
        engines.append(str(default))

    results: dict[str, list[Run]] = {}
    for _ in range(options.rounds):
        results.setdefault("zmq_proxy", []).append(run_proxy(count))
        for engine in engines:
            for case in CASES:
                run, compiled = run_laxity(engine, case, count)
                name = f"{case}, {'compiled' if compiled else 'interpreted'}"
                if len(options.engine) > 1 and engine != sys.executable:
                    name += f", {engine}"
                results.setdefault(name, []).append(run)
    rows = []
    for name, runs in results.items():
        ratios = [run.rate / reference.rate for run, reference in zip(runs, results["zmq_proxy"], strict=True)]
        rows.append(
            {
                "case": name,
                "round_trips_per_s": round(statistics.median(run.rate for run in runs)),
                "broker_cpu_us": round(statistics.median(run.broker for run in runs), 2),
                "client_cpu_us": round(statistics.median(run.client for run in runs), 2),
                "node_cpu_us": round(statistics.median(run.node for run in runs), 2),
                "ratio_to_zmq_proxy": round(statistics.median(ratios), 3),
            }
        )
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"64 B round trips, {count} a run, {WINDOW} in flight, medians of {options.rounds}; CPU µs a round trip")
    width = max(24, *(len(row["case"]) + 1 for row in rows))
    print(f"{'case':<{width}}{'round trips/s':>15}{'x zmq_proxy':>13}{'broker':>9}{'client':>9}{'node':>9}")
    for row in rows:
        print(
            f"{row['case']:<{width}}{row['round_trips_per_s']:>15,}{row['ratio_to_zmq_proxy']:>13.2f}"
            f"{row['broker_cpu_us']:>9.2f}{row['client_cpu_us']:>9.2f}{row['node_cpu_us']:>9.2f}"
        )


if __name__ == "__main__":
    main()
