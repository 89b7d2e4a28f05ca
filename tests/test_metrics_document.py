"""docs/metrics.md has every metric, as families.py tells of it."""

from __future__ import annotations

from pathlib import Path

from cluster.observe.families import BY_NAME, GATEWAY, MOST_STAGES, Family
from laxity.gateway.metrics import SECONDS, Metrics

DOCUMENT = Path(__file__).parent.parent / "docs" / "metrics.md"


def row(family: Family) -> str:
    labels = ", ".join(f"`{label}`" for label in family.labels)
    return f"| `{family.name}` | {family.kind} | {labels} | {family.help} |"


def test_every_metric_has_its_row_and_no_other_is_there() -> None:
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `laxity_")]
    assert rows == [row(family) for family in (*BY_NAME.values(), *GATEWAY)]


def test_the_most_stages_are_told() -> None:
    assert f"A shard tells of {MOST_STAGES} stages" in " ".join(DOCUMENT.read_text().split())


def test_a_gateway_counts_what_is_told_of_it() -> None:
    metrics = Metrics()
    metrics.ended("ocr", "http", "200", 0.1)
    told = [metric for metric in metrics.registry.collect() if metric.name.startswith("laxity_")]
    assert [(each.name, each.type, each.documentation) for each in told] == [
        (family.name, family.kind, family.help) for family in GATEWAY
    ]
    labels = {sample.name: set(sample.labels) for metric in told for sample in metric.samples}
    assert labels["laxity_gateway_requests_total"] == set(GATEWAY[0].labels)
    assert labels["laxity_gateway_request_duration_seconds_bucket"] == {*GATEWAY[1].labels, "le"}
    assert GATEWAY[1].bounds == SECONDS
