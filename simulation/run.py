"""Simulates pipelines on a cluster of GPUs in virtual time, with the engines that run in production."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from pipelines.spec import PipelineSpec
from simulation.results import RunResult


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that messages between shard and agents take."""

    control: float = 100e-6
    """Any message, one way."""
    per_request: float = 0.0
    """Beside it, a grant, for each of its requests."""
    response: float = 100e-6
    """A batch's results on their way back."""
    jitter: float = 0.0
    """Up to so much more for each message, drawn evenly."""


class Fault(msgspec.Struct, frozen=True):
    """An agent (one GPU host) that is lost at ``at`` and back at ``back`` (seconds; inf: never)."""

    agent: int
    at: float
    back: float


class Workload(msgspec.Struct, frozen=True):
    """One pipeline, its policy (NAME or NAME:parameter=value,...) and its arrivals in seconds from 0, ascending."""

    spec: PipelineSpec
    policy: str
    arrivals: Any  # npt.NDArray[np.float64]; msgspec has no numpy types


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """The GPUs and how they behave."""

    held: Sequence[Sequence[str]]
    """The model keys (``spec.model_key(stage)``) that each GPU holds."""
    gpus_per_agent: int = 8
    jitter: float = 0.0
    """Standard deviation of the logarithm of execution times."""
    stragglers: float = 0.0
    """The part of batches that take ``straggler_factor`` times as long."""
    straggler_factor: float = 5.0
    network: Network = Network()
    faults: Sequence[Fault] = ()


def simulate(
    workloads: Sequence[Workload],
    cluster: Cluster,
    *,
    seconds: float,
    seed: int = 1,
    trace: str = "",
    progress: Callable[[float], None] | None = None,
) -> list[RunResult]:
    """Run ``seconds`` of arrivals, then until every request has ended; one result a workload, in order.

    The same arguments give the same results. ``progress`` is called now and then with the part (0 to 1) that is done.
    Raises ValueError for a stage without a profile and :class:`pipelines.policies.PolicyError`.
    """
    raise NotImplementedError
