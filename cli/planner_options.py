"""The planner's settings as options of ``coordinator run``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import click
import msgspec

from cli.options import check_duration
from cluster.planner.settings import Settings
from pipelines.duration import format_duration

PARTS = {
    "headroom": "The part (0 to 1) of a device's throughput that is left free whatever the load does.",
    "shortfall": "The part of all arrivals that forecasts, with their margin, may have missed lately.",
    "thrift": "The part of the devices that patience may cost: where the need goes up and down faster, it is shorter.",
    "hysteresis": "A device is given back only where the others could carry this part more than what is needed.",
}
TIMES = {
    "memory": "For how long the forecasts' errors are remembered.",
    "patience": "The longest that a need must have been lower before devices rest.",
    "loss_patience": "For how long a node that is missing keeps its placement, after its lease has ended.",
    "node_patience": "For how long a node must have been empty before it is put to rest.",
    "load_seconds": "How long loading a model takes where its profile does not say.",
    "settle": "For how long models stay after the last request has been sent to them.",
    "retry": "After how long a model that could not be loaded on a device may be tried there again.",
}
COUNTS = {"replicas": "Shards over which a pipeline is spread where each of its stages has that many devices."}
RATES = {"shard_rate": "Stage visits per second that one shard is given at most; busier pipelines are split."}
SWITCHES = {"rest": "Let devices rest that are not needed, or have all of them hold models."}


def planner_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command an option for each setting."""
    for field in reversed(msgspec.structs.fields(Settings)):
        command = _option(field.name, field.default)(command)
    return command


def _option(name: str, usual: Any) -> Callable[..., Any]:
    flag = f"--{name.replace('_', '-')}"
    option = partial(click.option, default=usual, show_default=True, show_envvar=True)
    if name in SWITCHES:
        return option(f"{flag}/--no-{name.replace('_', '-')}", help=SWITCHES[name])
    if name in TIMES:
        seconds = format_duration(usual)
        return option(flag, default=seconds, callback=check_duration, metavar="TIME", help=TIMES[name])
    if name in COUNTS:
        return option(flag, type=click.IntRange(min=1), metavar="N", help=COUNTS[name])
    if name in RATES:
        return option(flag, type=click.FloatRange(0.0, min_open=True), metavar="RATE", help=RATES[name])
    return option(flag, type=click.FloatRange(0.0, 1.0), metavar="PART", help=PARTS.get(name))
