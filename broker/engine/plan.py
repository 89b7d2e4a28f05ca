"""What the engine has to know of a pipeline: its graph as numbers, ready for the hot path."""

from typing import TYPE_CHECKING, Final

from broker.engine.cost import CostKey
from broker.engine.policy import LAXITY, Policy
from broker.engine.stage import Stage
from laxity.payload import Payload

if TYPE_CHECKING:
    from broker.engine.batch_plan import BatchPlan
    from broker.engine.metrics import PipelineMetrics
    from broker.engine.tuning import Tuning

FROM_REQUEST: Final = -1
"""The source number that stands for the request's own payload."""


SMOOTHING_ITEMS: Final = 0.1
"""Weight of the newest request in a map stage's mean number of items."""


class StagePlan:
    """One stage's place in its pipeline.

    ``sources`` are (stage number or :data:`FROM_REQUEST`, field or '') of its inputs; ``parents`` and
    ``children`` are stage numbers, each once.
    """

    def __init__(
        self,
        name: str,
        stage: Stage,
        sources: list[tuple[int, str]],
        is_map: bool,
        max_items: int,
        cost: CostKey | None = None,
    ) -> None:
        self.name = name
        self.stage = stage
        """All of it; the last of its lanes, where ``cost`` has it have several."""
        self.lead = stage
        """The lane with the most work, for which batches are planned (planner.py)."""
        self.cost = cost
        if cost is not None:
            stage.split(cost.parts(), cost.scale)
        self.sources = sources
        self.is_map = is_map
        self.takes_request = not is_map and cost is None and sources == [(FROM_REQUEST, "")]
        """Whether its input is the request's payload as it is, whatever that is."""
        self.max_items = max_items
        self.parents: list[int] = sorted({source for source, _ in sources if source != FROM_REQUEST})
        self.children: list[int] = []
        self.items = 0.0
        """Moving mean of the items that a request brings (map stages); 0 before the first."""

    def lane(self, inputs: list[Payload]) -> Stage:
        """Where an element with these inputs is queued."""
        return self.stage if self.cost is None else self.stage.lanes[self.cost.lane(inputs)]

    def note_items(self, count: int) -> None:
        """A request brought so many items."""
        self.items += SMOOTHING_ITEMS * (count - self.items) if self.items else count

    def items_or_one(self) -> float:
        """How many elements a request brings here on average."""
        return self.items if self.is_map and self.items > 1.0 else 1.0

    def rounds(self, batch: int) -> float:
        """How many batches of ``batch`` one request needs here one behind another; 1 but for map stages."""
        if not self.is_map or self.items <= 0.0:
            return 1.0
        gpus = self.stage.devices if self.stage.devices > 0 else 1
        rounds = self.items / (batch * gpus)
        return rounds if rounds > 1.0 else 1.0


class Pipeline:
    """A pipeline as the engine runs it; stages are numbered in topological order.

    ``outputs`` are (name, stage number or :data:`FROM_REQUEST`, field); one entry named '' means that the
    answer is that value itself. ``slo`` is in seconds.
    """

    def __init__(
        self,
        name: str,
        slo: float,
        stages: list[StagePlan],
        outputs: list[tuple[str, int, str]],
        policy: Policy = LAXITY,
    ) -> None:
        self.name = name
        self.policy = policy
        self.quantile = policy.quantile
        """λ at present (tuning.py)."""
        self.slo = slo
        self.stages = stages
        self.lanes: list[Stage] = [lane for plan in stages for lane in plan.stage.lanes]
        """Its queues, in the order of the stages."""
        self.outputs = outputs
        self.whole_answer = -1
        """The stage whose whole answer is the pipeline's, where it is that simple; else -1."""
        if len(outputs) == 1 and outputs[0][0] == "" and outputs[0][2] == "" and outputs[0][1] >= 0:
            self.whole_answer = outputs[0][1]
        self.parent_counts: list[int] = [len(stage.parents) for stage in stages]
        self.roots: list[int] = [index for index, stage in enumerate(stages) if not stage.parents]
        self.batch_plan: BatchPlan | None = None
        """What the batches were planned to be, for the inputs in ``planned_for``."""
        self.planned_for: list[int] = []
        self.retired = False
        """No longer takes new requests; those in flight finish."""
        self.in_flight = 0
        self.metrics: PipelineMetrics | None = None
        """Of all versions; None where nothing is counted."""
        self.asleep = False
        """Nobody has asked for it of late: nothing is brought up to date until somebody does (upkeep.py)."""
        self.quiet = 0
        """Periods in a row in which nothing came and nothing was in flight."""
        self.rated = 0
        """The period after which it was last brought up to date."""
        self.tuning: Tuning | None = None
        """What it was last told to be right for it."""
        for index, stage in enumerate(stages):
            for lane in stage.stage.lanes:
                lane.pipeline = stage.stage.key.rpartition("/")[0]
                lane.slo = slo
                lane.depth = index
                lane.adopt(policy)
            for parent in stage.parents:
                if parent >= index:
                    raise ValueError(f"stage {stage.name!r} stands before its input {stages[parent].name!r}")
                stages[parent].children.append(index)

    def id(self) -> str:
        """'pipeline@version', as models' keys have it."""
        return self.stages[0].stage.pipeline if self.stages else self.name

    def same_version(self, other: "Pipeline") -> bool:
        """Whether both are of one spec: a model's key has its digest."""
        return [plan.stage.key for plan in self.stages] == [plan.stage.key for plan in other.stages]

    def downstream(self, times: list[float]) -> list[float]:
        """For each stage the longest Σ of ``times`` over the stages behind it (itself not counted)."""
        after = [0.0] * len(self.stages)
        for index in range(len(self.stages) - 1, -1, -1):
            longest = 0.0
            for child in self.stages[index].children:
                path = times[child] + after[child]
                if path > longest:
                    longest = path
            after[index] = longest
        return after

    def upstream(self, times: list[float]) -> list[float]:
        """For each stage the longest Σ of ``times`` over the stages before it (itself not counted)."""
        before = [0.0] * len(self.stages)
        for index, stage in enumerate(self.stages):
            for parent in stage.parents:
                path = before[parent] + times[parent]
                if path > before[index]:
                    before[index] = path
        return before
