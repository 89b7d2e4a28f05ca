"""What the gateway counts."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS: Final = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
)  # fmt: skip
UNKNOWN: Final = ""
"""Stands for the names of pipelines that are not served: anybody can think of any number of them."""


class Metrics:
    """Counters of one gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._ended = Counter(
            "laxity_gateway_requests",
            "Inference requests that ended, by pipeline (empty for those that are not served), protocol (http, grpc) "
            "and status code.",
            ["pipeline", "protocol", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "laxity_gateway_request_duration_seconds",
            "From an inference request's arrival at the gateway to its end.",
            ["pipeline", "protocol"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "laxity_gateway_requests_in_flight", "Inference requests under way.", registry=self.registry
        )
        ProcessCollector(registry=self.registry)

    def ended(self, pipeline: str, protocol: str, status: str, seconds: float) -> None:
        """A request ended."""
        self._ended.labels(pipeline, protocol, status).inc()
        self._seconds.labels(pipeline, protocol).observe(seconds)

    def text(self) -> bytes:
        """Prometheus' text."""
        return generate_latest(self.registry)
