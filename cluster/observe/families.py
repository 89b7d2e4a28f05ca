"""Every metric that a process of a cluster tells Prometheus: its name, kind, labels and meaning.

Engines count (``broker/engine/metrics.py``, the agents' and coordinators' own); what they counted becomes Prometheus'
text in another process, when somebody asks (``exporter.py``). Dashboards, alert rules and docs/metrics.md are made for
these names. Labels are bounded: pipelines and stages are those that are served, the rest are fixed words or numbers.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

SECONDS: Final = [
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
    0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0,
]  # fmt: skip
"""Upper bounds of what takes time. A value equal to a bound belongs below it; one bucket more is above the last."""
SIGNED_SECONDS: Final = [
    -1.0, -0.3, -0.1, -0.03, -0.01, -0.005, -0.003, -0.002, -0.001, -0.0005, 0.0,
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.03, 0.1, 0.3, 1.0,
]  # fmt: skip
"""Of differences."""
SIZES: Final = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 256.0]
"""Of batches."""

Kind = Literal["counter", "gauge", "histogram"]


class Family(msgspec.Struct, frozen=True):
    """One metric. ``name`` is without the ``_total`` that Prometheus puts behind counters."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    bounds: tuple[float, ...] = ()


def _seconds(name: str, labels: tuple[str, ...], help: str) -> Family:
    return Family(name, "histogram", labels, help, tuple(SECONDS))


PROCESS: Final = [
    Family("laxity_build_info", "gauge", ("process", "name", "release"), "1; which process this is, and its version."),
    Family("laxity_start_time_seconds", "gauge", (), "When the process started, in Unix seconds."),
]

_P = ("shard", "pipeline")
_S = ("shard", "pipeline", "stage")
SHARD: Final = [
    Family("laxity_requests_submitted", "counter", _P, "Requests taken in."),
    Family(
        "laxity_requests",
        "counter",
        ("shard", "pipeline", "stage", "outcome"),
        "Requests that ended, by outcome and the stage where they did (empty for ok and where no stage is to blame).",
    ),
    Family("laxity_requests_in_flight", "gauge", _P, "Requests that have not ended."),
    _seconds("laxity_request_latency_seconds", _P, "From arrival at the shard to the end, of requests that ended ok."),
    Family("laxity_stage_arrivals", "counter", _S, "Elements that came to a stage (items, for map stages)."),
    _seconds("laxity_stage_budget_at_enqueue_seconds", _S, "Remaining latency budget of elements when they came."),
    _seconds("laxity_stage_budget_at_dispatch_seconds", _S, "Remaining latency budget of elements when granted."),
    _seconds(
        "laxity_stage_queueing_seconds",
        (*_S, "kind"),
        "Waiting of elements until granted: forced (no device was free) and chosen (the window was not open).",
    ),
    _seconds("laxity_stage_batch_wait_seconds", _S, "PARD's batch wait: from being put into a batch to its start."),
    _seconds("laxity_stage_execution_seconds", _S, "Execution of batches."),
    Family("laxity_stage_batch_size", "histogram", _S, "Elements in a batch.", tuple(SIZES)),
    _seconds("laxity_stage_window_slack_seconds", _S, "From the grant of a batch to the closing of its window."),
    Family(
        "laxity_stage_prediction_error_seconds",
        "histogram",
        _S,
        "Predicted (mean) less measured execution of batches.",
        tuple(SIGNED_SECONDS),
    ),
    Family("laxity_batches", "counter", (*_S, "code"), "Batches that ended, by the code that the agent gave."),
    Family("laxity_stage_queue_depth", "gauge", _S, "Elements that wait."),
    Family("laxity_stage_devices", "gauge", _S, "Devices that have the model in their memory."),
    Family("laxity_stage_drop_probability", "gauge", _S, "Part of the arrivals of the last second dropped here."),
    Family("laxity_stage_load_factor", "gauge", _S, "Arrival rate over the devices' rate at the target batch (mu)."),
    Family("laxity_stage_order", "gauge", (*_S, "order"), "1 for the order by which the stage drops at present."),
    Family("laxity_pipeline_quantile", "gauge", _P, "Lambda: the quantile of batch waits that drops count on."),
    Family("laxity_pipeline_history_seconds", "gauge", _P, "The time over which queueing is averaged."),
    Family("laxity_pipeline_admission_ratio", "gauge", _P, "The part of the requests that is let in."),
    Family("laxity_pipeline_slo_seconds", "gauge", _P, "The latency objective."),
    Family("laxity_clients", "gauge", ("shard",), "Services that are connected."),
    Family("laxity_agents", "gauge", ("shard",), "Agents that are heard."),
    Family("laxity_devices", "gauge", ("shard",), "Devices that work for the shard."),
    Family("laxity_payload_bytes", "gauge", ("shard",), "Bytes of payloads that are held."),
    Family("laxity_connections", "gauge", ("shard", "peer"), "Connections to the port for a kind of peer."),
    Family("laxity_refused", "counter", ("shard", "reason"), "Connections, greetings and messages that were refused."),
    Family("laxity_agents_lost", "counter", ("shard",), "Agents that fell silent or whose connection broke."),
    Family("laxity_reconnects", "counter", ("shard", "peer"), "Greetings of peers (client, agent) known already."),
    Family("laxity_heartbeats", "counter", ("shard", "peer"), "Heartbeats that came."),
    Family("laxity_malformed_messages", "counter", ("shard",), "Messages that were none of the protocol."),
    Family("laxity_undeliverable_answers", "counter", ("shard",), "Answers whose service was gone."),
    Family("laxity_traces", "counter", ("shard",), "Requests whose trace was kept."),
]
"""A pipeline's name is empty for requests to unknown ones. Stages beyond :data:`MOST_STAGES` share one series, whose
pipeline is ``_other``."""
MOST_STAGES: Final = 500

_D = ("node", "device")
AGENT: Final = [
    Family("laxity_device_busy_seconds", "counter", _D, "Time in which batches executed."),
    Family("laxity_device_models_resident", "gauge", _D, "Models in the device's memory."),
    Family("laxity_device_memory_bytes", "gauge", _D, "What they take there."),
    Family("laxity_device_memory_budget_bytes", "gauge", _D, "What they may take (0: not known)."),
    Family("laxity_device_actions", "counter", (*_D, "kind", "code"), "HOLD, LOAD, UNLOAD and INFER that ended."),
    Family("laxity_device_worker_deaths", "counter", _D, "Worker processes that died or had to be killed."),
    _seconds("laxity_device_load_seconds", _D, "LOADs that went well."),
    Family("laxity_node_shards", "gauge", ("node",), "Shards that the agent is connected to."),
    Family("laxity_node_shard_reconnects", "counter", ("node",), "Connections to shards made again."),
    Family("laxity_node_heartbeats", "counter", ("node",), "Heartbeats sent to shards."),
    Family("laxity_gpu_utilization_ratio", "gauge", _D, "The driver's own figure."),
    Family("laxity_gpu_memory_used_bytes", "gauge", _D, "The driver's own figure, of all processes."),
    Family("laxity_gpu_temperature_celsius", "gauge", _D, "The driver's own figure."),
    Family("laxity_gpu_power_watts", "gauge", _D, "The driver's own figure."),
]

_C = ("coordinator",)
COORDINATOR: Final = [
    Family("laxity_coordinator_leader", "gauge", _C, "1 while it leads."),
    Family("laxity_coordinator_store_up", "gauge", _C, "1 while the store answers."),
    Family("laxity_coordinator_moves", "counter", _C, "Devices that were given other work."),
    _seconds("laxity_coordinator_plan_seconds", _C, "Making plans."),
    Family("laxity_nodes", "gauge", (*_C, "state"), "Nodes by state, as the leader sees them."),
    Family("laxity_devices_allocated", "gauge", (*_C, "pipeline"), "Devices placed for a pipeline."),
]

GATEWAY: Final = [
    Family(
        "laxity_gateway_requests",
        "counter",
        ("pipeline", "protocol", "status"),
        "Inference requests that ended, by pipeline (empty for those that are not served), protocol (http, grpc) and "
        "status code.",
    ),
    Family(
        "laxity_gateway_request_duration_seconds",
        "histogram",
        ("pipeline", "protocol"),
        "From an inference request's arrival at the gateway to its end.",
        (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
    ),
    Family("laxity_gateway_requests_in_flight", "gauge", (), "Inference requests under way."),
]
"""Gateways count these themselves (``laxity/gateway/metrics.py``), and serve them where they serve HTTP."""

BY_NAME: Final = {family.name: family for family in (*PROCESS, *SHARD, *AGENT, *COORDINATOR)}
