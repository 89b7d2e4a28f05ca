"""A GPU node's models and workers hurt under load: what became of every request, and how long until all was well.

One agent with this host's CPU, a coordinator and a shard. Poisson load comes through the SDK; each fault has a load of
its own, of which each request must be accounted for.

    python benchmarks/node_faults.py
    python benchmarks/node_faults.py --only worker,poison --json
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from live_cluster import OUTCOMES, LiveCluster, Load, always, outcomes, processes, seconds_to_recover

BEFORE = 4.0
"""Seconds of load before each fault."""
MODELS = '''
import time

import numpy


def steady(items):
    """20 ms and 1 ms an element; raises for a poisonous one."""
    time.sleep(0.02 + 0.001 * len(items))
    if b"poison" in items:
        raise ValueError("this input is poisonous")
    return items


def greedy(items):
    """Asks for more memory than there is for batches of more than 4."""
    if len(items) > 4:
        numpy.empty(len(items) << 50, numpy.uint8)
    time.sleep(0.02)
    return items


class Broken:
    def __init__(self):
        raise RuntimeError("the weights are damaged")

    def __call__(self, items):
        return items


def sample():
    return b"x"
'''


def write_specs(directory: Path) -> None:
    (directory / "models.py").write_text(MODELS)
    for name, model, more in (
        ("steady", "steady", ", sample: 'models:sample'"),
        ("greedy", "greedy", ", profile: {alpha_ms: 0.01, beta_ms: 21}"),
        ("broken", "Broken", ""),
    ):
        stage = f"{{executor: python, model: 'models:{model}', max_batch: 16{more}}}"
        text = f"name: {name}\nslo: 1500ms\nstages:\n  run: {stage}\noutput: run\n"
        (directory / f"{name}.yaml").write_text(text)


class Faults:
    """Each returns the load's requests and what there is to say besides."""

    def __init__(self, cluster: LiveCluster, directory: Path, rate: float, seed: int) -> None:
        self._cluster = cluster
        self._directory = directory
        self._rate = rate
        self._seed = seed

    def load(self, choose: Any = None) -> Load:
        return Load(self._cluster.addresses(), choose or always("steady"), self._rate, self._seed)

    def clean_up(self) -> None:
        """Delete what was applied for a fault."""
        for pipeline in self._cluster.status()["pipelines"]:
            if pipeline["name"] != "steady":
                self._cluster("pipeline", "delete", pipeline["name"], "--yes")

    def worker(self) -> tuple[Load, str]:
        """the worker is killed in the middle of a batch"""
        load = self.load()
        load.sleep_until(BEFORE)
        agents = {agent["pid"] for agent in self._cluster.status()["agents"]}
        pids = [p.pid for p in processes() if "nodes.worker" in p.command and agents & _parents(p.command)]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        load.sleep_until(BEFORE + 12)
        return load, f"{len(pids)} worker"

    def poison(self) -> tuple[Load, str]:
        """one input in about 64 is poisonous"""

        def choose(random: Random) -> tuple[str, bytes]:
            return "steady", b"poison" if random.random() < 1 / 64 else b"good"

        load = Load(
            self._cluster.addresses(), choose, self._rate, self._seed, check=lambda _, answer: answer == b"good"
        )
        load.sleep_until(BEFORE + 12)
        return load, "only these fail"

    def memory(self) -> tuple[Load, str]:
        """batches of more than 4 run out of memory"""
        self._cluster("pipeline", "apply", str(self._directory / "greedy.yaml"))
        load = self.load(always("greedy"))
        load.sleep_until(BEFORE + 12)
        return load, "each batch runs again in halves"

    def broken(self) -> tuple[Load, str]:
        """a model is applied whose load fails"""
        load = self.load()
        load.sleep_until(BEFORE)
        try:
            self._cluster("pipeline", "apply", str(self._directory / "broken.yaml"))
            said = "which nobody noticed"
        except subprocess.CalledProcessError as error:
            said = f"apply said so and ended with {error.returncode}"
        load.sleep_until(BEFORE + 12)
        return load, said


def _parents(command: list[str]) -> set[int]:
    """The agent that a worker says is its parent."""
    return {int(command[at + 1]) for at, word in enumerate(command[:-1]) if word == "--parent"}


FAULTS = ("worker", "poison", "memory", "broken")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(FAULTS), help=f"Of {', '.join(FAULTS)}.")
    parser.add_argument("--rate", type=float, default=120.0, help="Requests per second.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", default=sys.executable, help="The interpreter that runs the cluster.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="laxity-faults-") as place, LiveCluster(options.engine) as cluster:
        directory = Path(place)
        write_specs(directory)
        cluster.up(str(directory / "steady.yaml"), "--coordinators", "1")
        faults = Faults(cluster, directory, options.rate, options.seed)
        for name in options.only.split(","):
            fault = getattr(faults, name)
            print(f"{fault.__doc__} ...", file=sys.stderr)
            load, note = fault()
            submitted, sent = load.stop()
            faults.clean_up()
            counts: Counter[str] = outcomes(sent)
            results.append(
                {
                    "fault": fault.__doc__,
                    "note": note,
                    "submitted": submitted,
                    **{outcome: counts[outcome] for outcome in OUTCOMES},
                    "unaccounted": submitted - sum(counts[outcome] for outcome in OUTCOMES),
                    "seconds_to_recover": seconds_to_recover(sent, BEFORE),
                }
            )
    if options.json:
        print(json.dumps(results))
        return
    print(f"{'submitted':>11}" + "".join(f"{name:>12}" for name in [*OUTCOMES, "unaccounted", "99 % again"]))
    for result in results:
        print(f"{result['fault']}: {result['note']}")
        numbers = [result[name] for name in [*OUTCOMES, "unaccounted"]]
        print(
            f"{result['submitted']:>11,}"
            + "".join(f"{number:>12,}" for number in numbers)
            + f"{result['seconds_to_recover']:>10.1f} s"
        )


if __name__ == "__main__":
    main()
