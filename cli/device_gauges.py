"""The gauges of nodes' devices as columns of a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Cell = Callable[[dict[str, Any]], str]


def gauge_columns(nodes: list[dict[str, Any]], full: bool) -> list[tuple[str, Cell]]:
    """(head, cell of a node) of the gauges that any of the nodes has; ``full``: also those of the GPUs themselves.
    ``nodes`` are as :func:`cli.node.describe_nodes` has them."""
    columns: list[tuple[str, Cell]] = [("busy", _busy), ("memory MB", _memory)]
    if full:
        columns += [
            ("GPU busy", lambda node: _over(node, "utilization", _mean, lambda part: f"{100 * part:.0f} %")),
            ("GPU memory MB", _gpu_memory),
            ("clocks MHz", _clocks),
            ("°C", lambda node: _over(node, "temperature_c", max, "{:.0f}".format)),
            ("W", lambda node: _over(node, "power_w", sum, "{:.0f}".format)),
        ]
    return [(head, cell) for head, cell in columns if any(map(cell, nodes))]


def _devices(node: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = node["gauges"]["devices"] if node["gauges"] is not None else []
    return found


def _busy(node: dict[str, Any]) -> str:
    parts = [device["utilization"] for device in _devices(node)]
    return f"{100 * _mean(parts):.0f} %" if parts else ""


def _memory(node: dict[str, Any]) -> str:
    devices = _devices(node)
    taken, budget = sum(device["memory_mb"] for device in devices), sum(device["budget_mb"] for device in devices)
    if not taken and not budget:
        return ""
    return f"{taken:,.0f} of {budget:,.0f}" if budget else f"{taken:,.0f}"


def _gpu_memory(node: dict[str, Any]) -> str:
    used = _figures(node, "memory_used_mb")
    return f"{sum(used):,.0f} of {sum(_figures(node, 'memory_total_mb')):,.0f}" if used else ""


def _clocks(node: dict[str, Any]) -> str:
    return " / ".join(filter(None, (_over(node, f"{of}_clock_mhz", min, "{:,.0f}".format) for of in ("sm", "memory"))))


def _over(node: dict[str, Any], gauge: str, take: Callable[[list[float]], float], show: Callable[[float], str]) -> str:
    """One figure over the node's GPUs; '' where none has it."""
    figures = _figures(node, gauge)
    return show(take(figures)) if figures else ""


def _figures(node: dict[str, Any], gauge: str) -> list[float]:
    gpus = [device["gpu"] for device in _devices(node) if device["gpu"] is not None]
    return [gpu[gauge] for gpu in gpus if gpu[gauge] is not None]


def _mean(figures: list[float]) -> float:
    return sum(figures) / len(figures)
