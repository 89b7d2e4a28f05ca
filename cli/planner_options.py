"""The planner's settings as options of ``coordinator run``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from cli.options import check_duration
from cluster.planner.settings import Settings
from pipelines.duration import format_duration

_PARTS = {
    "headroom": "The part (0 to 1) of a device's throughput that is left free whatever the load does.",
    "coverage": "The part of the remembered time for which the margin over the forecast would have been enough.",
    "hysteresis": "A device is given back only where the others could carry this part more than what is needed.",
}
_TIMES = {
    "memory": "For how long the arrivals' burstiness is remembered.",
    "patience": "For how long a need must have been lower before devices rest.",
    "loss_patience": "For how long a node that is missing keeps its placement, after its lease has ended.",
    "node_patience": "For how long a node must have been empty before it is put to rest.",
    "load_seconds": "How long loading a model takes where its profile does not say.",
    "settle": "For how long models stay after the last request has been sent to them.",
    "retry": "After how long a model that could not be loaded on a device may be tried there again.",
}
PLANNER_OPTIONS = (*_PARTS, *_TIMES, "replicas", "shard_rate", "rest")
"""All of them, by the names of the settings."""


def planner_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command an option for each setting, with the environment's variables shown in its help."""
    usual = Settings()
    options = [_part(name, text, getattr(usual, name)) for name, text in _PARTS.items()]
    options += [_time(name, text, getattr(usual, name)) for name, text in _TIMES.items()]
    options += [
        click.option(
            "--replicas",
            type=click.IntRange(min=1),
            default=usual.replicas,
            show_default=True,
            show_envvar=True,
            metavar="N",
            help="Shards over which a pipeline is spread where each of its stages has that many devices.",
        ),
        click.option(
            "--shard-rate",
            type=click.FloatRange(min=0, min_open=True),
            default=usual.shard_rate,
            show_default=True,
            show_envvar=True,
            metavar="RATE",
            help="Stage visits per second that one shard is given at most; busier pipelines are split.",
        ),
        click.option(
            "--rest/--no-rest",
            default=usual.rest,
            show_default=True,
            show_envvar=True,
            help="Let devices rest that are not needed, or have all of them hold models.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _part(name: str, text: str, usual: float) -> Callable[..., Any]:
    return click.option(
        _flag(name),
        type=click.FloatRange(0.0, 1.0),
        default=usual,
        show_default=True,
        show_envvar=True,
        metavar="PART",
        help=text,
    )


def _time(name: str, text: str, usual: float) -> Callable[..., Any]:
    return click.option(
        _flag(name),
        default=format_duration(usual),
        callback=check_duration,
        show_default=True,
        show_envvar=True,
        metavar="TIME",
        help=text,
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
