"""From a pipeline's spec to the engine's view of it."""

from __future__ import annotations

from broker.engine.plan import FROM_REQUEST, Pipeline, StagePlan
from broker.engine.stage import Stage
from pipelines.graph import Graph
from pipelines.spec import REQUEST, PipelineSpec


def build_pipeline(spec: PipelineSpec) -> Pipeline:
    """The engine's pipeline of a validated spec."""
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
            )
        )
    outputs = [(name, numbers[source], field) for name, (source, field) in spec.outputs().items()]
    return Pipeline(spec.name, spec.slo, stages, outputs)
