"""Simulates several runs at once, each in a process of its own."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import msgspec

from pipelines import PipelineSpec
from simulation.results import RunResult
from simulation.run import Cluster, Workload, simulate


class RunDied(Exception):
    """A run's process ended without a result."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One call of :func:`simulation.run.simulate`."""

    workloads: list[Workload]
    cluster: Cluster
    seconds: float
    seed: int

    def execute(self, progress: Callable[[float], None]) -> list[RunResult]:
        return simulate(self.workloads, self.cluster, seconds=self.seconds, seed=self.seed, progress=progress)


def execute_all(runs: Sequence[Run], jobs: int, progress: Callable[[int, float], None]) -> list[list[RunResult]]:
    """The results of all runs in order, ``jobs`` of them at a time; ``progress`` gets a run's number and the part (0 to
    1) of it that is done. What a run raises is raised; :class:`RunDied` where its process was killed."""
    if jobs == 1 or len(runs) == 1:
        return [run.execute(partial(progress, number)) for number, run in enumerate(runs)]
    results: list[list[RunResult]] = [[] for _ in runs]
    waiting = list(enumerate(runs))[::-1]
    running: dict[Connection, tuple[int, SpawnProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, run = waiting.pop()
                reading, process = _start(run)
                running[reading] = (number, process)
            for ready in connection.wait(list(running)):
                assert isinstance(ready, Connection)
                number, process = running[ready]
                try:
                    message = ready.recv()
                except EOFError:
                    process.join()
                    raise RunDied(
                        f"the process of a run ended with status {process.exitcode}; if it was killed for lack of "
                        "memory, try fewer --jobs"
                    ) from None
                if isinstance(message, float):
                    progress(number, message)
                elif isinstance(message, Exception):
                    raise message
                else:
                    results[number] = message
                    del running[ready]
                    process.join()
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return results


def _start(run: Run) -> tuple[Connection, SpawnProcess]:
    context = get_context("spawn")
    reading, writing = context.Pipe(duplex=False)
    # A spec's version, and with it the names of its models, outlives msgspec's own encoding but not pickle's: what is
    # left out of the version as a default is told by identity.
    specs = [msgspec.json.encode(workload.spec) for workload in run.workloads]
    process = context.Process(target=_work, args=(run, specs, writing), daemon=True)
    process.start()
    # The child's end must be open in the child alone, or its death would not be seen.
    writing.close()
    return reading, process


def _work(run: Run, specs: list[bytes], pipe: Connection) -> None:
    # Ctrl-C is the parent's, which ends its children; a parent that was killed is noticed by the next send.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    workloads = [
        msgspec.structs.replace(workload, spec=msgspec.json.decode(spec, type=PipelineSpec))
        for workload, spec in zip(run.workloads, specs, strict=True)
    ]
    try:
        pipe.send(msgspec.structs.replace(run, workloads=workloads).execute(pipe.send))
    except BrokenPipeError:
        pass
    except Exception as error:
        pipe.send(error)
