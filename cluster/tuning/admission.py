"""How many requests the first stage lets in where a stage behind it cannot keep up.

What a later stage cannot take has been run by those before it for nothing. The proactive drop sees to that as far as
queues tell it; this is for what it leaves: a stage whose devices are all busy and which still has to drop. It must not
cost goodput, so more is let in than such a stage was seen to take, only a state that lasts counts, and all is let in
again as soon as the stage has a device to spare.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final

from cluster.tuning.merge import StageState

LASTS: Final = 5
"""Seconds on end for which a stage must have been unable to keep up."""
BUSY: Final = 0.9
"""The part of a stage's devices that run if it is at its limit."""
LOST: Final = 0.1
"""The part of its arrivals that such a stage does not come to run, at least."""
HEADROOM: Final = 1.3
"""How much more than such a stage can take is let in: it is to have a choice, and is never to wait for work."""
LEAST: Final = 0.05
STEP: Final = 0.1
"""By how much admission goes down in a second at most. It goes up at once."""


class AdmissionTuner:
    """Of one pipeline. ``limit`` is the stage that cannot keep up, '' where all can."""

    def __init__(self) -> None:
        self.admission = 1.0
        self.limit = ""
        self._seen: deque[tuple[float, Mapping[str, StageState]]] = deque(maxlen=LASTS)
        """The last seconds: what was let in, and the stages then."""

    def observe(self, stages: Mapping[str, StageState]) -> None:
        """Another second; the stages in topological order."""
        self._seen.append((self.admission, stages))
        names = list(stages)
        wanted, limit = 1.0, ""
        if len(self._seen) == LASTS and all(list(seen) == names for _, seen in self._seen):
            for name in names[1:]:
                part = self._part(names[0], name)
                if part < wanted:
                    wanted, limit = part, name
        if wanted < self.admission:
            wanted = max(wanted, self.admission - STEP, LEAST)
        self.admission, self.limit = wanted, limit

    def _part(self, first: str, name: str) -> float:
        """What may be let in for this stage's sake."""
        states = [stages[name] for _, stages in self._seen]
        held = name == self.limit  # what is let in already is about what it takes: it need not drop much any more
        devices = states[-1].devices
        for state in states:
            if not devices or state.devices != devices or state.busy < BUSY * devices or not state.dropped:
                return 1.0
        takes = sum(state.started for state in states)
        came = sum(state.arrived for state in states)
        if not held and takes > (1.0 - LOST) * came:
            return 1.0
        let_in = sum(admitted * stages[first].arrived for admitted, stages in self._seen)
        if came <= 0.0 or let_in <= 0.0:
            return 1.0
        would_come = self._seen[-1][1][first].arrived * came / let_in
        return HEADROOM * takes / len(states) / would_come if would_come > 0.0 else 1.0
