"""From a pipeline's spec to the engine's view of it."""

from __future__ import annotations

from broker.engine.cost import CostKey
from broker.engine.plan import FROM_REQUEST, Pipeline, StagePlan
from broker.engine.policy import make_policy
from broker.engine.stage import Stage
from pipelines.graph import Graph
from pipelines.policies import parse_policy
from pipelines.spec import REQUEST, PipelineSpec, StageSpec


def build_pipeline(spec: PipelineSpec, policy: str = "") -> Pipeline:
    """The engine's pipeline of a validated spec, under its own policy or another one. Raises
    :class:`~pipelines.policies.PolicyError`."""
    policy_name, parameters = parse_policy(policy or spec.policy)
    order = Graph(spec).order
    numbers = {name: number for number, name in enumerate(order)}
    numbers[REQUEST] = FROM_REQUEST
    stages = []
    for name in order:
        stage = spec.stages[name]
        stages.append(
            StagePlan(
                name,
                Stage(spec.model_key(name), "", stage.max_batch, stage.max_queue),
                [(numbers[source], field) for source, field in stage.sources()],
                stage.map,
                stage.max_items,
                _cost_key(stage),
            )
        )
    outputs = [(name, numbers[source], field) for name, (source, field) in spec.outputs().items()]
    return Pipeline(spec.name, spec.slo, stages, outputs, make_policy(policy_name, parameters))


def _cost_key(stage: StageSpec) -> CostKey | None:
    cost = stage.cost
    if cost is None:
        return None
    source = list(stage.named_inputs()).index(cost.input) if cost.input else 0
    return CostKey(source, cost.field, cost.axis, list(cost.buckets), cost.profiled or 0)
