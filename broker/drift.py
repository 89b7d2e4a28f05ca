"""Telling people when models take another time than their profiles say: once when it begins, once when it is over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from broker.engine.report import StageFigures
from pipelines.profile import DRIFTED

BACK: Final = 0.15
"""The part of a profile by which measurements may still be off when a drift is over."""
LASTING: Final = 10
"""Reports in a row that have to agree: a noisy neighbour of a few seconds is no drift."""


class DriftWatch:
    """Goes through a shard's reports; each (model, device type) by itself."""

    def __init__(self) -> None:
        self._agreeing: dict[tuple[str, str], int] = {}
        """How many reports in a row contradict what was told last."""
        self._told: set[tuple[str, str]] = set()

    def note(self, stages: Iterable[StageFigures]) -> list[str]:
        """Take in a report; what there is to tell now."""
        news: list[str] = []
        seen: set[tuple[str, str]] = set()
        for stage in stages:
            for kind, ratio in stage.drift.items():
                slot = (stage.model, kind)
                seen.add(slot)
                told = slot in self._told
                if (abs(ratio - 1.0) > DRIFTED) == told or (told and abs(ratio - 1.0) > BACK):
                    self._agreeing.pop(slot, None)
                    continue
                self._agreeing[slot] = self._agreeing.get(slot, 0) + 1
                if self._agreeing[slot] < LASTING:
                    continue
                del self._agreeing[slot]
                if told:
                    self._told.discard(slot)
                    news.append(f"{stage.model} takes on {kind} what its profile says again")
                else:
                    self._told.add(slot)
                    news.append(f"{stage.model} takes {ratio:.2f} times what its profile says on {kind}")
        models = {stage.model for stage in stages}
        self._told = {slot for slot in self._told if slot[0] in models}
        self._agreeing = {slot: count for slot, count in self._agreeing.items() if slot in seen}
        return news
