"""An agent is killed with -9 under load and started again: what became of every request.

A cluster of 64 emulated GPUs (four agents) serves ``lv``. Poisson arrivals come through the SDK; after a third of the
time one agent's process is killed, and the cluster starts it again. Afterwards the outcomes that the client saw are put
beside the shard's own counters: both must add up to what was submitted, and nobody may be without an answer.

    python benchmarks/agent_loss.py
    python benchmarks/agent_loss.py --rate 1500 --seconds 30 --json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import Any

from laxity import Client, LaxityError

CLUSTER = f"agent-loss-{os.getpid()}"


def laxity(*arguments: str) -> str:
    command = [sys.executable, "-P", "-m", "cli.main", *arguments, "--cluster", CLUSTER]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def status() -> dict[str, Any]:
    return json.loads(laxity("status", "--json"))  # type: ignore[no-any-return]


def outcome_of(future: Any) -> str:
    try:
        future.result(timeout=30)
    except LaxityError as error:
        return str(error.outcome)
    except TimeoutError:
        return "NO ANSWER"
    return "ok"


def load(client: Client, rate: float, seconds: float, seed: int, kill: int) -> tuple[list[str], list[float]]:
    """(outcome, seconds after the begin) of each request; ``kill`` is the process to kill after a third."""
    source = random.Random(seed)
    futures = []
    stamps = []
    begin = time.monotonic()
    due = 0.0
    killed = False
    while due < seconds:
        left = begin + due - time.monotonic()
        if left > 0:
            time.sleep(left)
        if not killed and due >= seconds / 3:
            os.kill(kill, signal.SIGKILL)
            killed = True
        futures.append(client.submit("lv", b"x" * 1024))
        stamps.append(due)
        due += source.expovariate(rate)
    return [outcome_of(future) for future in futures], stamps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=1000.0, help="requests a second (default 1000)")
    parser.add_argument("--seconds", type=float, default=21.0, help="how long (default 21)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    laxity("up", "lv", "--split", "40,6,5,7,6", "--agents", "4", "--detach")
    try:
        before = status()
        victim = before["agents"][0]  # load consolidates on the first agents
        with Client(before["shards"][0]["frontend"]) as client:
            outcomes, stamps = load(client, options.rate, options.seconds, options.seed, victim["pid"])
        deadline = time.monotonic() + 20
        while True:  # the counters in the store are a second old
            after = status()
            if after["shards"][0]["requests"]["submitted"] >= len(outcomes) or time.monotonic() > deadline:
                break
            time.sleep(0.5)
    finally:
        laxity("down")
    restarted = next(agent for agent in after["agents"] if agent["agent"] == victim["agent"])
    third = options.seconds / 3
    phases = {
        "before": [o for o, at in zip(outcomes, stamps, strict=True) if at < third],
        "4 s after": [o for o, at in zip(outcomes, stamps, strict=True) if third <= at < third + 4],
        "then": [o for o, at in zip(outcomes, stamps, strict=True) if at >= third + 4],
        "client, all": outcomes,
    }
    shard = after["shards"][0]["requests"]
    result = {
        "submitted": len(outcomes),
        "killed": f"{victim['agent']} (process {victim['pid']}, started again as {restarted['pid']})",
        "phases": {name: dict(Counter(found)) for name, found in phases.items()},
        "shard": shard,
        "adds_up": sum(Counter(outcomes).values()) == len(outcomes) == shard["submitted"]
        and shard["in_flight"] == 0
        and "NO ANSWER" not in outcomes
        and all(shard.get(name, 0) == count for name, count in Counter(outcomes).items()),
    }
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        names = ["ok", "dropped", "expired", "rejected", "cancelled", "failed", "unavailable", "NO ANSWER"]
        print(f"{options.rate:g} requests/s of lv on 64 emulated GPUs for {options.seconds:g} s, seed {options.seed}")
        print(f"killed with -9 at {third:g} s: {result['killed']}")
        print(f"{'':<14}{'submitted':>10}" + "".join(f"{name:>12}" for name in names))
        for name, found in phases.items():
            counts = Counter(found)
            print(f"{name:<14}{len(found):>10}" + "".join(f"{counts[n]:>12}" for n in names))
        print(f"{'shard':<14}{shard['submitted']:>10}" + "".join(f"{shard.get(n, 0):>12}" for n in names))
        print("adds up" if result["adds_up"] else "DOES NOT ADD UP")
    sys.exit(0 if result["adds_up"] else 1)


if __name__ == "__main__":
    main()
