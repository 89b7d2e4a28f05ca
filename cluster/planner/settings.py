"""What a person may set of the planner."""

from __future__ import annotations

import msgspec


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How demand becomes devices. Times are seconds."""

    headroom: float = 0.015
    """The part of a device's throughput in planned batches that is left free whatever the load does."""
    shortfall: float = 0.0225
    """The part of all arrivals that the forecasts, with their margin, may have missed lately. Requests are lost later
    than that: queues and the headroom make up for most of it."""
    memory: float = 120.0
    """For how long forecasts' errors are remembered."""
    patience: float = 30.0
    """The longest that a need must have been lower before devices are given back to rest."""
    thrift: float = 0.03
    """The part of the devices that patience may cost: where the need goes up and down faster, it is shorter."""
    hysteresis: float = 0.01
    """A device is given back only where the others could carry this part more than what is needed."""
    replicas: int = 2
    """The shards over which a pipeline is spread where each of its stages has that many devices."""
    shard_rate: float = 20_000.0
    """The stage visits per second that one shard is given at most; a pipeline with more is split over several."""
    loss_patience: float = 1.0
    """For how long a node that is missing keeps its placement (its lease has ended by then)."""
    node_patience: float = 30.0
    """For how long a node must have been empty before it is put to rest."""
    rest: bool = True
    """True: devices that are not needed rest. False: all devices of active nodes are given out, max-min by cost, and
    moved only where demand requires it."""
    load_seconds: float = 2.0
    """How long loading a model takes where its profile does not say."""
    settle: float = 2.0
    """For how long models stay after the last request has been sent to them (routes take a while to reach everybody,
    reports to come in)."""
    retry: float = 120.0
    """After how long a model that could not be loaded on a device may be tried there again."""
