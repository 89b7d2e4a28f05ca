"""The control plane and the data plane hurt under load, one fault after the other: what became of every request.

A whole cluster runs on this machine: three etcd members (mTLS), two coordinators, two shards, 64 emulated GPUs in four
agents. Poisson load comes through the SDK; each fault has a load of its own, of which each request must be accounted
for. Beside the outcomes: how long until 99 % of the requests of each second were answered in time again.

    python benchmarks/faults.py
    python benchmarks/faults.py --rate 200 --only coordinator,etcd-stopped --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import etcd3aio
from live_cluster import OUTCOMES, LiveCluster, Load, always, outcomes, processes, seconds_to_recover

from cluster.records import LeaderRecord, Paths, decode
from cluster.store import open_store

PIPELINE = "lv"
BEFORE = 5.0
"""Seconds of load before each fault."""
TTL = 5.0
"""The coordinators' lease."""


class Hurt:
    """The cluster, and the ways to hurt it. Each fault returns what was measured beside the outcomes, for people."""

    def __init__(self, cluster: LiveCluster) -> None:
        self.cluster = cluster
        status = cluster.status()
        self.url = status["store"]
        self._store = open_store(self.url)
        self._paths = Paths(status["cluster"])

    # ---- faults ----------------------------------------------------------------------------

    def coordinator(self, load: Load) -> str:
        """the leading coordinator is killed"""
        before = self._leader()
        assert before is not None
        os.kill(before.pid, signal.SIGKILL)
        killed = time.monotonic()
        while (leader := self._leader()) is None or leader.pid == before.pid:
            time.sleep(0.02)
        took = time.monotonic() - killed
        load.sleep_until(BEFORE + 12)
        return f"{before.coordinator}; {leader.coordinator} led after {took:.1f} s (aim: {TTL + 1:g})"

    def etcd_leader(self, load: Load) -> str:
        """the leading etcd member is killed (and started again by its supervisor)"""
        member = self._etcd_leader()
        os.kill(member, signal.SIGKILL)
        load.sleep_until(BEFORE + 15)
        return "started again"

    def etcd_stopped(self, load: Load) -> str:
        """all of etcd stands still for 30 s"""
        members = [process.pid for process in self._etcd()]
        for pid in members:
            os.kill(pid, signal.SIGSTOP)
        load.sleep_until(BEFORE + 30)
        for pid in members:
            os.kill(pid, signal.SIGCONT)
        load.sleep_until(BEFORE + 30 + 15)
        return f"{len(members)} members"

    def shard(self, load: Load) -> str:
        """a shard is killed (and started again by its supervisor)"""
        os.kill(self.cluster.status()["shards"][0]["pid"], signal.SIGKILL)
        load.sleep_until(BEFORE + 15)
        return ""

    def agent(self, load: Load) -> str:
        """an agent with 16 GPUs is killed (and started again by its supervisor)"""
        os.kill(self.cluster.status()["agents"][0]["pid"], signal.SIGKILL)
        load.sleep_until(BEFORE + 15)
        return ""

    def agent_frozen(self, load: Load) -> str:
        """an agent with 16 GPUs is frozen for 20 s and released"""
        agent = self.cluster.status()["agents"][0]
        os.kill(agent["pid"], signal.SIGSTOP)
        load.sleep_until(BEFORE + 15)
        lost = self._state(agent["agent"])
        load.sleep_until(BEFORE + 20)
        os.kill(agent["pid"], signal.SIGCONT)
        load.sleep_until(BEFORE + 35)
        return f"its node was {lost} after 15 s and {self._state(agent['agent'])} 15 s after its release"

    def compaction(self, load: Load) -> str:
        """history is compacted while an agent's watch stands still for 8 s"""
        agent = self.cluster.status()["agents"][1]
        os.kill(agent["pid"], signal.SIGSTOP)
        load.sleep_until(BEFORE + 7)
        revision = asyncio.run(self._compact())
        load.sleep_until(BEFORE + 8)
        os.kill(agent["pid"], signal.SIGCONT)
        load.sleep_until(BEFORE + 23)
        return f"compacted at revision {revision}; its node is {self._state(agent['agent'])}"

    # ---- looking ---------------------------------------------------------------------------

    def _leader(self) -> LeaderRecord | None:
        entry = self._store.get(self._paths.leader)
        return decode(LeaderRecord, entry.key, entry.value) if entry is not None else None

    def _state(self, agent: str) -> str:
        nodes = self.cluster.json("node", "list")
        return next((node["state"] for node in nodes if node["node"] == agent), "unknown")

    def _etcd(self) -> list[Any]:
        ports = {port for _, port in self._endpoints()}
        return [
            process
            for process in processes()
            if process.command[0].rpartition("/")[2] == "etcd" and any(p in " ".join(process.command) for p in ports)
        ]

    def _endpoints(self) -> list[tuple[str, str]]:
        return [tuple(endpoint.split(":")) for endpoint in urlsplit(self.url).netloc.split(",")]  # type: ignore[misc]

    def _client(self, endpoints: list[str]) -> etcd3aio.Etcd3Client:
        query = parse_qs(urlsplit(self.url).query)
        read = {name: open(query[name][0], "rb").read() for name in ("ca", "cert", "key")}  # noqa: SIM115
        return etcd3aio.Etcd3Client(
            endpoints,
            ca_cert=read["ca"],
            cert_chain=read["cert"],
            cert_key=read["key"],
            tls_server_name="localhost",
        )

    def _etcd_leader(self) -> int:
        """The process of the etcd member that leads."""

        async def ask() -> str:
            for host, port in self._endpoints():
                async with self._client([f"{host}:{port}"]) as client:
                    assert client.maintenance is not None
                    status = await client.maintenance.status()
                    if status.leader == status.header.member_id:
                        return port
            raise RuntimeError("no etcd member leads")

        port = asyncio.run(ask())
        return next(process.pid for process in self._etcd() if f":{port}" in " ".join(process.command))

    async def _compact(self) -> int:
        async with self._client([":".join(endpoint) for endpoint in self._endpoints()]) as client:
            assert client.kv is not None
            revision: int = (await client.kv.get("/")).header.revision
            await client.kv.compact(revision)
            return revision


def run(hurt: Hurt, fault: Callable[[Load], str], rate: float, seed: int) -> dict[str, Any]:
    """One fault under load."""
    load = Load(hurt.cluster.addresses(), always(PIPELINE), rate, seed)
    try:
        load.sleep_until(BEFORE)
        note = fault(load)
    finally:
        submitted, sent = load.stop()
    counts = outcomes(sent)
    return {
        "fault": fault.__doc__,
        "submitted": submitted,
        **{name: counts[name] for name in OUTCOMES},
        "unaccounted": submitted - len(sent),
        "ok_before": outcomes(sent, 0.0, BEFORE)["ok"] / max(sum(outcomes(sent, 0.0, BEFORE).values()), 1),
        "recovered_after_s": seconds_to_recover(sent, BEFORE),
        "note": note,
    }


def main() -> None:
    faults = ["coordinator", "etcd_leader", "etcd_stopped", "shard", "agent", "agent_frozen", "compaction"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=300.0, help="requests a second (default 300)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help=f"some of {','.join(name.replace('_', '-') for name in faults)}")
    parser.add_argument("--engine", default=sys.executable, help="interpreter to run the cluster with (default: this)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chosen = options.only.replace("-", "_").split(",") if options.only else faults
    results = []
    with LiveCluster(options.engine) as cluster:
        cluster.up(PIPELINE, "--gpus", "64", "--agents", "4", "--store", "etcd")
        hurt = Hurt(cluster)
        for name in chosen:
            results.append(run(hurt, getattr(hurt, name), options.rate, options.seed))
            if not options.json:
                show(results[-1], first=len(results) == 1)
    if options.json:
        print(json.dumps(results, indent=2))
    sys.exit(1 if any(result["unaccounted"] for result in results) else 0)


def show(result: dict[str, Any], first: bool) -> None:
    names = ["submitted", *OUTCOMES, "unaccounted"]
    if first:
        print("".join(f"{name:>12}" for name in names) + f"{'99 % again':>12}")
    print(f"{result['fault']}" + (f": {result['note']}" if result["note"] else ""))
    print("".join(f"{result[name]:>12,}" for name in names) + f"{result['recovered_after_s']:>10.1f} s", flush=True)


if __name__ == "__main__":
    main()
