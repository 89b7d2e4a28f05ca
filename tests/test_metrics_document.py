"""docs/metrics.md has every metric, as families.py tells of it."""

from __future__ import annotations

from pathlib import Path

from cluster.observe.families import BY_NAME, MOST_STAGES, Family

DOCUMENT = Path(__file__).parent.parent / "docs" / "metrics.md"


def row(family: Family) -> str:
    labels = ", ".join(f"`{label}`" for label in family.labels)
    return f"| `{family.name}` | {family.kind} | {labels} | {family.help} |"


def test_every_metric_has_its_row_and_no_other_is_there() -> None:
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `laxity_")]
    assert rows == [row(family) for family in BY_NAME.values()]


def test_the_most_stages_are_told() -> None:
    assert f"A shard tells of {MOST_STAGES} stages" in " ".join(DOCUMENT.read_text().split())
