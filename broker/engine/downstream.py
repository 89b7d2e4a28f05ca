"""What is still to come for a request behind a stage (L_sub): the estimates that the proactive drop rests on.

PARD (arXiv 2602.08747, section 4): L_sub = Σq + Σd + w, the maximum over the paths behind the stage. q is the mean
queueing delay of a stage, d its execution at its current batch size, and w the λ-quantile of the summed batch waits.
``laxity`` counts forced waiting only as q, and no w: its batches are bound to a GPU when they start.
"""

from broker.engine.plan import Pipeline, StagePlan
from broker.engine.policy import EXECUTION, NOTHING, WAITING
from broker.engine.predictor import LatencyTable
from broker.engine.waits import BINS, convolve, quantile


def downstream(pipeline: Pipeline, tables: list[LatencyTable | None], hops: list[float]) -> list[float]:
    """L_sub of each stage in seconds. ``hops`` are what each stage's batches take beside their execution."""
    policy = pipeline.policy
    count = len(pipeline.stages)
    if policy.foresees == NOTHING:
        return [0.0] * count
    times: list[float] = []
    executions: list[float] = []
    for number in range(count):
        plan = pipeline.stages[number]
        table = tables[number]
        typical = plan.lead.typical_batch()
        execution = plan.rounds(typical) * table.mean(typical) if table is not None else 0.0
        waiting = plan.lead.waits.queued
        if plan.cost is not None:
            execution, waiting = _over_lanes(plan, execution, waiting)
        if policy.foresees == EXECUTION:
            waiting = 0.0
        executions.append(execution)
        times.append(execution + hops[number] + waiting)
    if policy.foresees != WAITING or pipeline.quantile <= 0.0:
        return pipeline.downstream(times)
    if pipeline.quantile >= 1.0:
        return pipeline.downstream([times[number] + executions[number] for number in range(count)])
    return _with_batch_waits(pipeline, times, executions)


def _over_lanes(plan: StagePlan, execution: float, waiting: float) -> tuple[float, float]:
    """The mean execution and queueing delay of a stage's lanes, by their arrivals: before it, nobody knows which lane a
    request will go to. What is given where nothing arrives."""
    rate = total_execution = total_waiting = 0.0
    for lane in plan.stage.lanes:
        if lane.table is not None and lane.rate > 0.0:
            typical = lane.typical_batch()
            rate += lane.rate
            total_execution += lane.rate * plan.rounds(typical) * lane.table.mean(typical)
            total_waiting += lane.rate * lane.waits.queued
    if rate <= 0.0:
        return execution, waiting
    return total_execution / rate, total_waiting / rate


def _with_batch_waits(pipeline: Pipeline, times: list[float], executions: list[float]) -> list[float]:
    """Σq + Σd + w: along a path the times add up, and the batch waits' distributions are convolved. Each stage goes
    on from the child whose sum is the largest."""
    count = len(pipeline.stages)
    width = sum(executions) / (BINS - 1)
    behind = [0.0] * count
    fixed = [0.0] * count
    """Σq + Σd of the path taken behind a stage."""
    waits: list[list[float]] = [[] for _ in range(count)]
    """Distribution of the summed batch waits of that path; [] where nothing is behind."""
    lengths = [0] * count
    for number in range(count - 1, -1, -1):
        for child in pipeline.stages[number].children:
            own = pipeline.stages[child].lead.waits.distribution(width)
            summed = convolve(own, waits[child]) if lengths[child] else own
            base = times[child] + fixed[child]
            total = base + quantile(summed, pipeline.quantile, width, lengths[child] + 1)
            if total > behind[number]:
                behind[number] = total
                fixed[number] = base
                waits[number] = summed
                lengths[number] = lengths[child] + 1
    return behind
