"""Prometheus' text of what a process counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from cluster.observe.families import BY_NAME, Family
from cluster.observe.figures import Figures, HistogramFigures, Sample
from laxity.version import __version__


def exposition(figures: Figures, accept: str) -> tuple[bytes, str]:
    """The text, and its content type: OpenMetrics for whoever accepts that, else Prometheus' own."""
    registry = CollectorRegistry()
    registry.register(FiguresCollector(figures))
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is none
        encode, content_type = choose_encoder("")
    return encode(registry), content_type


class FiguresCollector(Collector):
    """The families of one moment's figures, and what the system knows of the process (``process_*``)."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        figures = self._figures
        yield metric(BY_NAME["laxity_build_info"], [([figures.process, figures.name, __version__], 1.0)])
        yield metric(BY_NAME["laxity_start_time_seconds"], [([], figures.started_at)])
        for name, samples in figures.samples.items():
            yield metric(BY_NAME[name], samples)
        yield from ProcessCollector(pid=lambda: figures.pid, registry=None).collect()


def metric(family: Family, samples: Iterable[Sample]) -> Metric:
    """One family. A histogram with bounds below zero has neither sum nor count: OpenMetrics knows none there."""
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
        bounds = [*map(str, family.bounds), "+Inf"]
        for labels, value in samples:
            if isinstance(value, HistogramFigures):
                histogram.add_metric(labels, list(zip(bounds, accumulate(value.buckets), strict=True)), value.sum)
        return histogram
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    made = kind(family.name, family.help, labels=family.labels)
    for labels, value in samples:
        if not isinstance(value, HistogramFigures):
            made.add_metric(labels, value)
    return made
