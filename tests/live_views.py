"""A cluster as it might be seen, made by hand: what is drawn of it is compared with files."""

from __future__ import annotations

import math

from cli.live.view import (
    HISTORY,
    DeviceState,
    LiveDevice,
    LiveDrop,
    LiveNode,
    LivePipeline,
    LiveShard,
    LiveStage,
    LiveView,
)

AT = 1_750_000_000.0
"""The moment of the view: 15:06:40 UTC."""


def history(base: float, capacity: float, burst: int = 40) -> list[tuple[int, float, float, float]]:
    """Load that swings, with one burst some seconds ago, at something that can do so much."""
    points = []
    for ago in reversed(range(HISTORY)):
        offered = base * (1.0 + 0.15 * math.sin(ago / 9.0))
        if burst <= ago < burst + 25:
            offered *= 1.0 + 1.4 * math.sin((ago - burst) / 25.0 * math.pi)
        good = min(offered, capacity)
        points.append((int(AT) - ago, offered, good, offered - good))
    return points


def stage(name: str, *inputs: str, **known: object) -> LiveStage:
    return LiveStage(name=name, inputs=list(inputs) or ["request"], **known)  # type: ignore[arg-type]


def pipelines() -> list[LivePipeline]:
    lv = [
        stage("detect", devices=4, arrived=820.0, started=812.0, batches=104.0, batch=7.8, dropped=8.0, waiting=31,
              queued=0.0183, execution=0.0121, slack=0.0094, least_slack=0.0011, load_factor=1.08, order="lbf"),
        stage("crop", "detect", map=True, devices=2, arrived=2440.0, started=2440.0, batches=153.0, batch=15.9,
              waiting=12, queued=0.0042, execution=0.0053, slack=0.031, least_slack=0.012, load_factor=0.71,
              order="lbf"),
        stage("recognise", "crop", devices=3, arrived=2440.0, started=2431.0, batches=305.0, batch=7.9, dropped=1.5,
              waiting=44, queued=0.0096, execution=0.0088, slack=0.0152, least_slack=-0.0004, load_factor=0.93,
              order="hbf"),
    ]  # fmt: skip
    tm = [
        stage("classify", devices=6, arrived=312.4, started=312.0, batches=52.0, batch=6.0, waiting=3, queued=0.0021,
              execution=0.0184, slack=0.112, least_slack=0.064, load_factor=0.42, order="hbf"),
        stage("translate", "classify", devices=4, arrived=312.0, started=312.0, batches=39.0, batch=8.0, waiting=5,
              queued=0.0061, execution=0.0462, slack=0.0871, least_slack=0.0403, load_factor=0.66),
    ]  # fmt: skip
    return [
        LivePipeline(
            name="lv", version="4f1c09aa", slo=0.5, offered=820.0, good=797.6, in_flight=41, latency=(0.124, 0.487),
            outcomes={"ok": 797.6, "dropped": 19.2, "expired": 3.0, "failed": 0.2}, quantile=0.32, window=4.0,
            admission=0.93, policy="planned", stages=lv, outputs=["recognise"], history=history(780.0, 1000.0),
        ),
        LivePipeline(
            name="tm", version="91d200b7", slo=0.4, offered=312.4, good=312.0, in_flight=18, latency=(0.081, 0.164),
            outcomes={"ok": 312.0}, quantile=0.1, window=8.0, admission=1.0, policy="planned", stages=tm,
            outputs=["translate"], history=history(300.0, 900.0),
        ),
        LivePipeline(
            name="ocr", version="0b77e3d1", slo=1.5, offered=0.25, good=0.25, in_flight=0, latency=(0.412, 0.533),
            outcomes={"ok": 0.25}, policy="planned", stages=[stage("text", devices=1, arrived=0.25, started=0.25,
            batches=0.25, batch=1.0, execution=0.391, slack=0.71, least_slack=0.66)], outputs=["text"],
            history=[(int(AT) - ago, 0.25, 0.25, 0.0) for ago in reversed(range(20))],
        ),
        LivePipeline(
            name="summarise-long-documents", version="77aa10c3", slo=2.0, policy="symphony",
            waits_for="stage embed is being loaded",
            stages=[stage("embed", failed="on gpu-3, device 1: out of memory")],
        ),
    ]  # fmt: skip


def device(number: int, state: DeviceState, utilization: float = 0.0, *models: str) -> LiveDevice:
    return LiveDevice(
        number=number, type="A100", state=state, utilization=utilization, models=list(models),
        shard="shard-0" if models else "", memory_mb=3120.0 * len(models), budget_mb=40960.0,
    )  # fmt: skip


def nodes() -> list[LiveNode]:
    lv, tm = ("lv/detect", "lv/recognise"), ("tm/classify", "tm/translate")

    def node(name: str, state: str, why: str, *devices: LiveDevice, drained: bool = False) -> LiveNode:
        host = f"10.0.0.{name.rpartition('-')[2]}"
        return LiveNode(
            name=name, host=host, state=state, why=why, drained=drained,  # type: ignore[arg-type]
            registered=state != "lost", devices=list(devices),
        )  # fmt: skip

    return [
        node("gpu-1", "active", "it is needed", *(device(n, "busy", 0.93 - 0.04 * n, *lv) for n in range(4))),
        node("gpu-2", "active", "it is needed", device(0, "busy", 0.61, *tm), device(1, "busy", 0.55, *tm),
             device(2, "idle", 0.0, "ocr/text"), device(3, "loading", 0.0, "lv/crop")),
        node("gpu-3", "draining", "new memory", device(0, "draining", 0.12, "lv/crop"), device(1, "draining"),
             drained=True),
        node("gpu-4", "standby", "it is not needed: the load fits 3 nodes", *(device(n, "standby") for n in range(4))),
        node("gpu-5", "lost", "its lease vanished", device(0, "lost"), device(1, "lost")),
        node("gpu-10", "active", "it is needed", *(device(n, "busy" if n % 3 else "idle", 0.4 * (n % 3 > 0), *tm)
             for n in range(12))),
    ]  # fmt: skip


def drops() -> list[LiveDrop]:
    reasons = [
        ("lv", "detect", "dropped", "estimated 41 ms late: 18 ms until a GPU is free, 12 ms to run, 95 ms behind it"),
        ("lv", "recognise", "dropped", "estimated 3 ms late: 9 ms until a GPU is free, 8.8 ms to execute"),
        ("lv", "detect", "expired", "the deadline passed in the queue"),
        ("lv", "crop", "failed", "ValueError: cannot reshape\n\x1b[31marray of size 0\x1b[0m"),
        ("tm", "", "unavailable", "agent gpu-5 was lost twice under it"),
    ]  # fmt: skip
    return [
        LiveDrop(at=AT - 1.3 * number, request=f"7d41c2f09e5b4a61b9d03c7f1e8a2d64-{1204 - number}",
                 pipeline=pipeline, stage=stage, outcome=outcome, detail=detail, shard="shard-0")
        for number, (pipeline, stage, outcome, detail) in enumerate(reasons)
    ]  # fmt: skip


def cluster(**known: object) -> LiveView:
    """Everything at once: load and drops, a node of each state, a pipeline that waits."""
    fields: dict[str, object] = {
        "at": AT,
        "cluster": "local",
        "store": "sqlite:///run/laxity/local/store.db",
        "leader": "coordinator-0",
        "coordinators": ["coordinator-0", "coordinator-1"],
        "pipelines": pipelines(),
        "nodes": nodes(),
        "shards": [LiveShard(name="shard-0", host="10.0.0.1", frontend="tcp://10.0.0.1:7100", in_flight=59)],
        "drops": drops(),
    }
    return LiveView(**(fields | known))  # type: ignore[arg-type]


def many(pipelines: int = 3000, nodes: int = 64) -> LiveView:
    """A large cluster: thousands of pipelines, hundreds of devices."""
    return cluster(
        pipelines=[
            LivePipeline(
                name=f"p{number:04}", version="1", slo=0.2, offered=float(number % 97), good=float(number % 97),
                outcomes={"ok": float(number % 97)}, stages=[stage("a", arrived=1.0), stage("b", "a", arrived=1.0)],
                history=[(int(AT) - ago, 5.0, 5.0, 0.0) for ago in range(60)],
            )
            for number in range(pipelines)
        ],
        nodes=[
            LiveNode(
                name=f"gpu-{number}", host="h", state="active", why="", drained=False, registered=True,
                devices=[device(n, "busy", 0.5, "p0001/a") for n in range(4)],
            )
            for number in range(nodes)
        ],
    )  # fmt: skip
