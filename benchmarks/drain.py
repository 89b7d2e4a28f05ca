"""Maintenance under load: nodes are drained, agents and shards asked to end and come back, the configuration is read
again. What became of every request: nothing but `ok` is expected.

A whole cluster runs on this machine: two coordinators, two shards and 64 emulated GPUs in four agents, on a file or
(``--etcd``) on three etcd members. Poisson load comes through the SDK; each deed has a load of its own.

    python benchmarks/drain.py
    python benchmarks/drain.py --rate 500 --only shard,node --json
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from live_cluster import OUTCOMES, LiveCluster, Load, always, outcomes

from cluster.records import Paths, PlacementRecord, decode, name_of
from cluster.store import open_store

PIPELINE = "lv"
BEFORE = 3.0
"""Seconds of load before each deed, and after it."""


class Maintenance:
    """The cluster, and what people do to it. Each returns what was seen beside the outcomes, for people."""

    def __init__(self, cluster: LiveCluster) -> None:
        self.cluster = cluster
        status = cluster.status()
        self._store = open_store(status["store"])
        self._paths = Paths(status["cluster"])

    def node(self, load: Load) -> str:
        """a node with 16 GPUs is drained (node drain --wait) and taken back"""
        began = time.monotonic()
        self.cluster("node", "drain", "agent-1", "--why", "maintenance", "--wait")
        took = time.monotonic() - began
        self.cluster("node", "resume", "agent-1")
        return f"empty after {took:.1f} s"

    def restart_drained(self, load: Load) -> str:
        """a drained agent gets SIGTERM, comes back, and is taken back"""
        self.cluster("node", "drain", "agent-2", "--wait")
        took = self._restart("agents", "agent", "agent-2")
        self.cluster("node", "resume", "agent-2")
        return f"back after {took:.1f} s"

    def agent(self, load: Load) -> str:
        """an agent with 16 GPUs that nobody drained gets SIGTERM and comes back"""
        return f"back after {self._restart('agents', 'agent', 'agent-0'):.1f} s"

    def shard(self, load: Load) -> str:
        """each of both shards gets SIGTERM and comes back, one after the other"""
        before = self._owners()
        took = []
        for shard in ("shard-0", "shard-1"):
            took.append(self._restart("shards", "shard", shard))
            time.sleep(BEFORE)
        moved = sum(owner != before.get(device) for device, owner in self._owners().items())
        return f"back after {' and '.join(f'{seconds:.1f} s' for seconds in took)}; {moved} devices have other shards"

    def coordinator(self, load: Load) -> str:
        """the leading coordinator gets SIGTERM and comes back"""
        leader = self.cluster.status()["leader"]
        took = self._restart("coordinators", "coordinator", leader)
        return f"back after {took:.1f} s; {self.cluster.status()['leader']} leads"

    def reload(self, load: Load) -> str:
        """every shard, agent and coordinator gets SIGHUP"""
        status = self.cluster.status()
        pids = [one["pid"] for what in ("shards", "agents", "coordinators") for one in status[what]]
        for pid in pids:
            os.kill(pid, signal.SIGHUP)
        time.sleep(1.0)
        status = self.cluster.status()
        after = [one["pid"] for what in ("shards", "agents", "coordinators") for one in status[what]]
        return f"{len(set(pids) & set(after))} of {len(pids)} processes go on"

    def _restart(self, what: str, key: str, name: str) -> float:
        """Seconds from SIGTERM until the process is registered again."""

        def pid() -> int | None:
            return next((one["pid"] for one in self.cluster.status()[what] if one[key] == name), None)

        before = pid()
        assert before is not None
        began = time.monotonic()
        os.kill(before, signal.SIGTERM)
        while pid() in (None, before):
            if time.monotonic() > began + 60.0:
                raise RuntimeError(f"{name} does not come back")
            time.sleep(0.1)
        return time.monotonic() - began

    def _owners(self) -> dict[tuple[str, int], str]:
        """The shard that each device works for."""
        prefix = self._paths.placements
        return {
            (name_of(entry.key), number): device.shard
            for entry in self._store.list(prefix).entries
            for number, device in decode(PlacementRecord, entry.key, entry.value).devices.items()
        }


def run(maintenance: Maintenance, deed: Callable[[Load], str], rate: float, seed: int) -> dict[str, Any]:
    """One deed under load."""
    load = Load(maintenance.cluster.addresses(), always(PIPELINE), rate, seed)
    try:
        load.sleep_until(BEFORE)
        note = deed(load)
        load.sleep_until(load.now() + BEFORE)
    finally:
        submitted, sent = load.stop()
    counts = outcomes(sent)
    return {
        "deed": deed.__doc__,
        "submitted": submitted,
        **{name: counts[name] for name in OUTCOMES},
        "unaccounted": submitted - len(sent),
        "not_ok": submitted - counts["ok"],
        "note": note,
    }


def main() -> None:
    deeds = ["node", "restart_drained", "agent", "shard", "coordinator", "reload"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=300.0, help="requests a second (default 300)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help=f"some of {','.join(name.replace('_', '-') for name in deeds)}")
    parser.add_argument("--etcd", action="store_true", help="three members of etcd in place of a file")
    parser.add_argument("--rest", action="store_true", help="let GPUs rest that are not needed")
    parser.add_argument("--engine", default=sys.executable, help="interpreter to run the cluster with (default: this)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chosen = options.only.replace("-", "_").split(",") if options.only else deeds
    results = []
    with LiveCluster(options.engine) as cluster:
        store = ["--store", "etcd"] if options.etcd else ["--coordinators", "2", "--shards", "2"]
        cluster.up(PIPELINE, "--gpus", "64", "--agents", "4", *store, *(["--rest"] if options.rest else []))
        maintenance = Maintenance(cluster)
        for name in chosen:
            results.append(run(maintenance, getattr(maintenance, name), options.rate, options.seed))
            if not options.json:
                show(results[-1], first=len(results) == 1)
    if options.json:
        print(json.dumps(results, indent=2))
    sys.exit(1 if any(result["not_ok"] for result in results) else 0)


def show(result: dict[str, Any], first: bool) -> None:
    names = ["submitted", *OUTCOMES, "unaccounted"]
    if first:
        print("".join(f"{name:>12}" for name in names))
    print(f"{result['deed']}" + (f": {result['note']}" if result["note"] else ""))
    print("".join(f"{result[name]:>12,}" for name in names), flush=True)


if __name__ == "__main__":
    main()
