"""What it costs to be closed to strangers: requests through client, shard and an emulated node of zero latency with
CURVE on all connections, against the same in plain text.

Beside them, in the same run, libzmq alone on the same work, with CURVE and without: a bare client, a ROUTER and a
DEALER that hand on (``zmq_proxy``), an echoing worker. What CURVE costs there it costs anybody; what it costs here
beyond that is ours. All four are there at once and work in turn, a second each; told are medians of the seconds, and
of what neighbouring seconds have to one another. The client is one of bare pyzmq.

*Requests/s*, with many in flight: 64 bytes, one in a message and 128 in a message, and 600 KB. There and back, each
payload goes over four connections. *p50* and *p99* are messages' round trips, and latency where one is in flight.
*CPU* is what the process in the middle takes for a request, all its threads; *of all*
that of client, middle and node together, which is what counts where others use the processors, too.

    python benchmarks/curve.py
    python benchmarks/curve.py --engine .venv-compiled/bin/python --turns 15 --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import zmq

from cluster.records import KeyRecord, PublicKey
from laxity import protocol
from laxity.curve import name_socket, secure_client
from laxity.keys import KeyFile, Role, ServerKey, new_pair, read_key_file, write_key_file
from laxity.payload import encode, pack
from laxity.protocol import Hello

sys.path.append(str(Path(__file__).parent))

from round_trips import Process, cpu_seconds, tell

SLICE = 1.0
"""Seconds of each turn: what else goes on on the machine is much the same in two of them."""
KINDS = ["zmq", "zmq curve", "laxity", "laxity curve"]


class Case(NamedTuple):
    """Payloads of ``size`` bytes, ``shared`` in a message, ``window`` of them in flight."""

    name: str
    size: int
    shared: int
    window: int


CASES = [
    Case("64 B, one a message", 64, 1, 2048),
    Case("64 B, 128 a message", 64, 128, 2048),
    Case("600 KB", 600_000, 1, 8),
    Case("64 B, one in flight", 64, 1, 1),
    Case("600 KB, one in flight", 600_000, 1, 1),
]


# ---- libzmq alone --------------------------------------------------------------------------------


def open_socket(context: zmq.Context[Any], kind: int) -> zmq.Socket[Any]:
    socket = context.socket(kind)
    socket.set(zmq.SNDHWM, 100_000)
    socket.set(zmq.RCVHWM, 100_000)
    return socket


def serve_until_end(stop: Callable[[], object]) -> None:
    """A thread that answers the benchmark until it closes this process's standard input."""

    def serve() -> None:
        for line in sys.stdin:
            if line.strip() == "cpu":
                tell(cpu=cpu_seconds())
        stop()

    threading.Thread(target=serve).start()


def role_proxy(keys: str) -> None:
    """libzmq's proxy between a ROUTER and a DEALER; ``keys``: the directory of the keys, '' for plain connections."""
    context = zmq.Context()
    front, back = open_socket(context, zmq.ROUTER), open_socket(context, zmq.DEALER)
    for socket in (front, back) if keys else ():
        socket.set(zmq.CURVE_SERVER, 1)  # without a ZAP handler whoever has a key is let in
        socket.set(zmq.CURVE_SECRETKEY, read_key_file(Path(keys, "bench")).secret.encode())
    ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in (front, back)]
    serve_until_end(lambda: os._exit(0))  # the proxy goes on for ever
    tell(frontend=f"tcp://127.0.0.1:{ports[0]}", backend=f"tcp://127.0.0.1:{ports[1]}")
    zmq.proxy(front, back)


def role_echo(keys: str, address: str) -> None:
    """The proxy's worker: sends back what comes, without copying what is large."""
    context = zmq.Context()
    socket = open_socket(context, zmq.DEALER)
    connect(socket, address, keys, "node")
    stop = threading.Event()
    serve_until_end(stop.set)
    tell(ready=True)
    more = int(zmq.SNDMORE)
    while not stop.is_set():
        if not socket.poll(100):
            continue
        sender = socket.recv()
        body = socket.recv(copy=False)
        socket.send(sender, more)
        socket.send(body, copy=len(body) < zmq.COPY_THRESHOLD)
    context.destroy(0)


def connect(socket: zmq.Socket[Any], address: str, keys: str, name: str) -> None:
    if keys:
        mine, server = read_key_file(Path(keys, name)), read_key_file(Path(keys, "bench"))
        secure_client(socket, mine.pair, server.public)
    name_socket(socket)
    socket.connect(address)


# ---- what the client does ------------------------------------------------------------------------


class Turn(NamedTuple):
    """One turn: requests/s, the median and the 99th percentile of messages' round trips in seconds, and the CPU time
    for one request in the process in the middle and in all three."""

    rate: float
    p50: float
    p99: float
    middle: float
    all: float


class BareClient:
    """A client of libzmq alone."""

    def __init__(self, address: str, keys: str) -> None:
        self._context = zmq.Context()
        self.socket = open_socket(self._context, zmq.DEALER)
        connect(self.socket, address, keys, "client")
        self.greet()

    def greet(self) -> None:
        """Return when the connection stands."""
        self.socket.send(b"x")
        self.socket.recv()

    def messages(self, case: Case) -> Callable[[int], list[Any]]:
        """The frames of the message with the requests from a number on."""
        body = b"x" * (case.size * case.shared)
        return lambda number: [body]

    def answered(self, frames: list[Any], case: Case) -> int:
        """Requests that a message answers."""
        return case.shared

    def run(self, case: Case, count: int) -> tuple[float, list[float]]:
        """Seconds for so many requests, and those of each message's round trip."""
        socket, make = self.socket, self.messages(case)
        copy = case.size * case.shared < zmq.COPY_THRESHOLD
        again = int(zmq.NOBLOCK)
        began: list[float] = []
        taken: list[float] = []
        sent = received = 0
        clock = time.perf_counter
        begin = clock()
        while received < count:
            while sent < count and sent - received <= case.window - case.shared:
                began.append(clock())
                socket.send_multipart(make(sent), copy=copy)
                sent += case.shared
            flags = 0
            try:
                while True:
                    frames = socket.recv_multipart(flags, copy=copy)
                    flags = again
                    number = self.answered(frames, case)
                    received += number
                    # One node answers all, in the order in which they were sent.
                    taken.append(clock() - began[(received - 1) // case.shared])
            except zmq.Again:
                pass
        return clock() - begin, taken

    def close(self) -> None:
        self._context.destroy(0)


class LaxityClient(BareClient):
    """A client of bare pyzmq that speaks Laxity's protocol."""

    def greet(self) -> None:
        self.socket.send(protocol.encode(Hello(protocol.VERSION, f"client-{time.time_ns()}")))
        self.socket.recv_multipart()
        self._decode = msgspec.msgpack.Decoder(protocol.ToClient).decode

    def messages(self, case: Case) -> Callable[[int], list[Any]]:
        payload = encode(b"x" * case.size)
        body = pack([payload] * case.shared)
        # Headers by hand, as a fast client would make them: [2, sent_us, [[id, "echo", nil, node], ...]]
        head = struct.Struct(">BBBQ").pack
        tail = b"\xa4echo\xc0" + protocol.encode(payload.node)
        array = b"\x91" if case.shared == 1 else struct.pack(">BH", 0xDC, case.shared)

        def make(number: int) -> list[Any]:
            header = head(0x93, 0x02, 0xCF, time.monotonic_ns() // 1000) + array
            parts = [b"\x94\xce" + (number + at).to_bytes(4) + tail for at in range(case.shared)]
            return [header + b"".join(parts), *body]

        return make

    def answered(self, frames: list[Any], case: Case) -> int:
        header = frames[0]
        message = self._decode(header if isinstance(header, bytes) else header.buffer)
        if type(message) is not protocol.Result:
            return 0
        wrong = [answer for answer in message.answers if answer.outcome != "ok"]
        if wrong:
            raise SystemExit(f"a request did not end ok: {wrong[0]}")
        return len(message.answers)


# ---- Laxity's processes --------------------------------------------------------------------------

ROLES: dict[str, Role] = {"bench": "shard", "node": "node", "client": "client"}
"""Whose keys there are, and what they may do."""


def record_of(keys: str, name: str) -> KeyRecord:
    """As the store would have it."""
    return KeyRecord(role=ROLES[name], publics=[PublicKey(read_key_file(Path(keys, name)).public, 0.0)])


def role_shard(keys: str) -> None:
    import broker.engine.scheduler
    from broker.process import spare_collector
    from broker.shell import Shard, ShardConfig
    from pipelines import load_spec

    spare_collector()
    shard = Shard(ShardConfig(name="bench", key=f"{keys}/bench" if keys else ""))
    shard.admit({name: record_of(keys, name) for name in ROLES} if keys else {})
    shard.apply(load_spec("echo"))
    serve_until_end(shard.stop)
    compiled = not (broker.engine.scheduler.__file__ or "").endswith(".py")
    tell(frontend=shard.frontend, backend=shard.backend, compiled=compiled)
    shard.run()


def role_node(keys: str, address: str) -> None:
    from nodes.agent import Agent, AgentConfig, Work
    from nodes.device import DeviceConfig
    from pipelines import load_spec

    spec = load_spec("echo")
    told = threading.Event()

    def changed(states: list[Any]) -> None:
        if not told.is_set() and all(state == "ready" for device in states for state in device.models.values()):
            told.set()
            tell(ready=True)

    devices = [DeviceConfig("emulated", "emulated")]
    agent = Agent(AgentConfig(name="node", devices=devices, key=f"{keys}/node" if keys else ""), changed)
    agent.place({0: Work("bench", {spec.model_key("echo"): (spec, "echo")})})
    agent.follow(
        {"bench": address}, [ServerKey("bench", address, [read_key_file(f"{keys}/bench").public])] if keys else []
    )
    serve_until_end(agent.stop)
    agent.run()


# ---- the runs ------------------------------------------------------------------------------------


class Served:
    """One kind: what is in the middle, and its node."""

    def __init__(self, kind: str, python: str, keys: str) -> None:
        process = partial(Process, file=__file__)
        self._keys = keys
        bare = kind.startswith("zmq")
        self._client = BareClient if bare else LaxityClient
        self.middle = process(sys.executable, "proxy", keys) if bare else process(python, "shard", keys)
        backend = str(self.middle.told["backend"])
        self._node = process(sys.executable, "echo", keys, backend) if bare else process(python, "node", keys, backend)

    def turn(self, case: Case, count: int) -> Turn:
        client = self._client(str(self.middle.told["frontend"]), self._keys)
        before = self.middle.cpu(), self._node.cpu(), cpu_seconds()
        seconds, taken = client.run(case, count)
        after = self.middle.cpu(), self._node.cpu(), cpu_seconds()
        client.close()
        spent = [(b - a) / count for a, b in zip(before, after, strict=True)]
        return Turn(count / seconds, percentile(taken, 50.0), percentile(taken, 99.0), spent[0], sum(spent))

    def end(self) -> None:
        self._node.end()
        self.middle.end()


def percentile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(part / 100.0 * len(ordered)), len(ordered) - 1)]


def write_keys(directory: str) -> None:
    for name, role in ROLES.items():
        pair = new_pair()
        key = KeyFile(cluster="bench", name=name, role=role, public=pair.public, secret=pair.secret)
        write_key_file(Path(directory, name), key)


def measure(served: dict[str, Served], case: Case, turns: int) -> dict[str, list[Turn]]:
    counts: dict[str, int] = {}
    for kind, one in served.items():
        count = 10 * case.shared
        while True:  # until it has taken long enough to know how many fill a turn
            rate = one.turn(case, count).rate
            if count / rate > SLICE / 4:
                break
            count *= 4
        counts[kind] = max(round(rate * SLICE / case.shared), 1) * case.shared
    results: dict[str, list[Turn]] = {kind: [] for kind in served}
    kinds = list(served)
    for number in range(turns):
        at = number % len(kinds)
        for kind in kinds[at:] + kinds[:at]:  # which goes first takes turns, too
            results[kind].append(served[kind].turn(case, counts[kind]))
    return results


def summary(case: Case, results: dict[str, list[Turn]]) -> list[dict[str, Any]]:
    rows = []
    for kind, turns in results.items():
        row: dict[str, Any] = {
            "case": case.name,
            "kind": kind,
            "per_s": round(statistics.median(turn.rate for turn in turns), 1),
            "p50_ms": round(statistics.median(turn.p50 for turn in turns) * 1e3, 3),
            "p99_ms": round(statistics.median(turn.p99 for turn in turns) * 1e3, 3),
            "cpu_us": round(statistics.median(turn.middle for turn in turns) * 1e6, 2),
            "all_cpu_us": round(statistics.median(turn.all for turn in turns) * 1e6, 2),
        }
        if kind.endswith(" curve"):
            pairs = list(zip(results[kind.removesuffix(" curve")], turns, strict=True))
            row["ratio"] = round(statistics.median(closed.rate / plain.rate for plain, closed in pairs), 3)
            row["p50_added_ms"] = round(statistics.median(closed.p50 - plain.p50 for plain, closed in pairs) * 1e3, 3)
            row["cpu_added_us"] = round(
                statistics.median(closed.middle - plain.middle for plain, closed in pairs) * 1e6, 2
            )
            row["all_cpu_added_us"] = round(
                statistics.median(closed.all - plain.all for plain, closed in pairs) * 1e6, 2
            )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--engine", help="another interpreter to run the shard and its node with")
    parser.add_argument("--turns", type=int, default=9, help="seconds of each case and kind (default 9)")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    options = parser.parse_args()
    if options.role:
        role, *arguments = options.role
        {"proxy": role_proxy, "echo": role_echo, "shard": role_shard, "node": role_node}[role](*arguments)
        return
    default = Path(__file__).parent.parent / ".venv-compiled" / "bin" / "python"
    python = options.engine or (str(default) if default.exists() else sys.executable)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as keys, ExitStack() as stack:
        write_keys(keys)
        served = {}
        for kind in KINDS:
            served[kind] = Served(kind, python, keys if kind.endswith("curve") else "")
            stack.callback(served[kind].end)
        for case in CASES:
            rows += summary(case, measure(served, case, options.turns))
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'':<36}{'requests/s':>11}{'x plain':>9}{'p50 ms':>9}{'added':>8}{'p99 ms':>9}", end="")
    print(f"{'CPU µs':>9}{'added':>9}{'of all':>9}{'added':>9}")
    for row in rows:
        if "ratio" in row:
            ratio, p50 = f"{row['ratio']:.3f}", f"{row['p50_added_ms']:.3f}"
            cpu, whole = f"{row['cpu_added_us']:.2f}", f"{row['all_cpu_added_us']:.2f}"
        else:
            ratio = p50 = cpu = whole = ""
        print(
            f"{row['case']:<22}{row['kind']:<14}{row['per_s']:>11,.0f}{ratio:>9}{row['p50_ms']:>9.3f}{p50:>8}"
            f"{row['p99_ms']:>9.3f}{row['cpu_us']:>9.2f}{cpu:>9}{row['all_cpu_us']:>9.2f}{whole:>9}"
        )


if __name__ == "__main__":
    main()
