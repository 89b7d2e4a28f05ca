"""Policies: four parts (order, budget, form, window), and what the named ones are made of.

Sources: PARD (arXiv 2602.08747) with its ablations and the baselines clipper++, nexus and naive as it runs them;
Symphony (arXiv 2308.07470); Nexus (SOSP'19); Clockwork (OSDI'20); Shepherd (NSDI'23).
"""

from typing import Final

from broker.engine.form_deferred import FormDeferred
from broker.engine.form_eager import FormAll, FormEarly, FormLargest, FormProactive, FormStrategies, FormUnexpired
from broker.engine.form_planned import FormPlanned
from broker.engine.formed import Form
from broker.engine.order import Order
from broker.engine.window import DeferredWindow, EagerWindow, PlannedWindow, Window

# order
FCFS: Final = 0
LBF: Final = 1
HBF: Final = 2
ADAPTIVE: Final = 3
INSTANT: Final = 4

# budget: what a stage's deadline is
END_TO_END: Final = 0
SPLIT: Final = 1
"""Its share of the SLO, counted from the request's arrival: what earlier stages left over is forwarded."""
WORST_CASE: Final = 2
"""As SPLIT, by the longest times lately measured."""

# what is foreseen of the stages behind a stage (L_sub)
NOTHING: Final = 0
EXECUTION: Final = 1
FORCED: Final = 2
"""Σq + Σd, q being forced waiting only."""
WAITING: Final = 3
"""Σq + Σd + w, PARD's."""

# target batch
COMMON: Final = 0
"""The largest common batch that fits twice into the SLO (Nexus)."""
STAGGERED: Final = 1
"""Symphony's bound within the stage's share."""
UNBOUNDED: Final = 2
"""The stage's largest batch: the form decides."""
PLANNED: Final = 3
"""Planned over the whole pipeline (batch_plan.py)."""


class Policy:
    """See the module's text. ``collects``: batches are put together while their GPU is busy. ``prunes``: who cannot
    make it even alone ends at once. ``runs_late``: a request is run on although its deadline has passed."""

    def __init__(self, name: str, form: Form) -> None:
        self.name = name
        self.form = form
        self.order = LBF
        self.budget = END_TO_END
        self.foresees = NOTHING
        self.targets = COMMON
        self.window: Window = EagerWindow()
        self.collects = False
        self.prunes = False
        self.runs_late = False
        self.sheds = False
        """DAGOR-like: a stage whose queueing delay is too long has the stages before it admit less."""
        self.preempts = False
        self.quantile = 0.1
        """λ: the quantile of the downstream batch wait."""
        self.history = 5.0
        """Seconds over which queueing delays are averaged."""
        self.tunes_quantile = False
        self.tunes_history = False
        """Whether these may be set at run time: they matter, and were not given."""

    def tunes_admission(self) -> bool:
        """Whether less may be let in where a stage cannot keep up: the others drop as their papers have it."""
        return self.foresees in (FORCED, WAITING)

    def new_order(self) -> Order:
        """The order that a stage begins with."""
        fixed = self.order in (FCFS, LBF, HBF)
        return Order(fixed, self.order == HBF, self.order == ADAPTIVE)


def make_policy(name: str, parameters: dict[str, float]) -> Policy:
    """The policy of a name of :data:`pipelines.policies.POLICIES`; KeyError for another. ``parameters`` are those of
    :data:`pipelines.policies.PARAMETERS`."""
    if name == "laxity":
        policy = Policy(name, FormPlanned())
        policy.foresees = FORCED
        policy.targets = PLANNED
        policy.window = PlannedWindow()
        policy.prunes = True
    elif name == "naive":
        policy = Policy(name, FormAll())
        policy.order = FCFS
        policy.runs_late = True
    elif name == "clipper++":
        policy = Policy(name, FormUnexpired())
        policy.order = FCFS
        policy.budget = SPLIT
        policy.runs_late = True
    elif name in ("nexus", "nexus-split"):
        policy = Policy(name, FormEarly())
        policy.budget = SPLIT if name == "nexus-split" else END_TO_END
    elif name == "symphony":
        policy = Policy(name, FormDeferred())
        policy.budget = SPLIT
        policy.targets = STAGGERED
        policy.window = DeferredWindow()
        policy.prunes = True
    elif name == "shepherd":
        policy = Policy(name, FormLargest())
        policy.budget = SPLIT
        policy.targets = UNBOUNDED
        policy.prunes = True
        policy.preempts = True
    elif name == "clockwork":
        policy = Policy(name, FormStrategies())
        policy.budget = SPLIT
        policy.targets = UNBOUNDED
        policy.prunes = True
    else:
        policy = _pard(name)
    policy.quantile = parameters.get("lambda", policy.quantile)
    policy.history = parameters.get("history", policy.history)
    if name == "pard-lower":
        policy.quantile = 0.0
    elif name == "pard-upper":
        policy.quantile = 1.0
    elif policy.foresees == WAITING:
        policy.tunes_quantile = "lambda" not in parameters
    policy.tunes_history = policy.foresees in (FORCED, WAITING) and "history" not in parameters
    return policy


def _pard(name: str) -> Policy:
    """PARD and its ablations (section 5.4)."""
    policy = Policy(name, FormProactive())
    policy.order = ADAPTIVE
    policy.foresees = WAITING
    policy.collects = True
    policy.prunes = True
    variant = name.removeprefix("pard-")
    if variant in ("pard", "lower", "upper"):
        pass
    elif variant == "back":
        policy.foresees = NOTHING
    elif variant == "sf":
        policy.foresees = EXECUTION
    elif variant == "oc":
        policy.foresees = NOTHING
        policy.sheds = True
    elif variant == "split":
        policy.foresees = NOTHING
        policy.budget = SPLIT
    elif variant == "wcl":
        policy.foresees = NOTHING
        policy.budget = WORST_CASE
    elif variant == "fcfs":
        policy.order = FCFS
    elif variant == "hbf":
        policy.order = HBF
    elif variant == "lbf":
        policy.order = LBF
    elif variant == "instant":
        policy.order = INSTANT
    else:
        raise KeyError(name)
    return policy


LAXITY: Final = make_policy("laxity", {})
"""The default."""
