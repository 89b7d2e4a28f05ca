"""A cluster in a few figures: what stands above everything else."""

from __future__ import annotations

from collections import Counter

from cli.live.view import DeviceState, LiveNode, LiveView
from cli.top.cells import Span, Tone, clean, clock, count, percent, rate, share_tone

_DROPPED = ("dropped", "expired", "failed", "unavailable")
"""Outcomes of requests that were let in and got no answer: all that the list of drops has."""
DEVICE_TONES: dict[DeviceState, Tone] = {
    "busy": "good",
    "idle": "accent",
    "loading": "warn",
    "draining": "warn",
    "standby": "quiet",
    "lost": "bad",
}
"""Every state of a device; each has a letter of its own, the first (lost: X)."""


def letter(state: str) -> str:
    """'B', 'I', 'L' (loading), 'D', 'S', and 'X' for one that is lost."""
    return "X" if state == "lost" else state[0].upper()


def share(good: float, ended: float) -> float | None:
    """The part of what ended that ended well; None where nothing did."""
    return min(good / ended, 1.0) if ended else None


def ended(outcomes: dict[str, float]) -> float:
    """Requests per second that ended, but for those that their callers gave up."""
    return sum(value for outcome, value in outcomes.items() if outcome != "cancelled")


def dropped(outcomes: dict[str, float]) -> float:
    return sum(outcomes.get(outcome, 0.0) for outcome in _DROPPED)


def emptying(node: LiveNode) -> bool:
    """Whether somebody wants a node empty that is not yet."""
    return node.drained and (node.state == "active" or held(node) > 0)


def held(node: LiveNode) -> int:
    """Models that its devices hold or are to hold."""
    return sum(len(device.models) for device in node.devices)


def cluster_line(view: LiveView) -> list[Span]:
    """Which cluster this is, who leads it, and how its store does."""
    spans: list[Span] = [("laxity ", "quiet"), (clean(view.cluster), "strong"), ("  ", "")]
    if view.leader:
        spans += [("leader ", "quiet"), (clean(view.leader), "")]
        others = len(set(view.coordinators) - {view.leader})
        if others:
            spans.append((f" (+{others})", "quiet"))
    elif view.fixed_plan:
        spans.append(("fixed plan, no coordinator", "quiet"))
    else:
        spans.append(("NO LEADER", "bad"))
    spans += [("  shards ", "quiet"), (str(len(view.shards)), "" if view.shards else "bad")]
    spans.append(("  store ", "quiet"))
    spans.append(("AWAY", "bad") if view.stale else ("ok", "good"))
    return spans


def trouble_line(view: LiveView) -> str:
    """What is wrong with all of it, '' where nothing is."""
    if view.stale:
        known = ", the figures are the last ones" if view.pipelines or view.nodes else ""
        return f"STORE AWAY{known}: {clean(view.stale)}"
    return clean(view.missing)


def figures_line(view: LiveView, words: bool = True) -> list[Span]:
    """What comes in, what of it ends well, and what the devices do, in words or in letters."""
    offered = sum(pipeline.offered for pipeline in view.pipelines)
    good = sum(pipeline.good for pipeline in view.pipelines)
    gone = sum(dropped(pipeline.outcomes) for pipeline in view.pipelines)
    part = share(good, sum(ended(pipeline.outcomes) for pipeline in view.pipelines))
    spans: list[Span] = [("offered ", "quiet"), (f"{rate(offered)}/s", "strong"), ("  good ", "quiet")]
    spans.append((f"{rate(good)}/s", "strong"))
    if part is not None:
        spans += [(" ", ""), (percent(part), share_tone(part))]
    spans += [("  dropped ", "quiet"), (f"{rate(gone)}/s", "bad" if gone else ""), ("  GPUs ", "quiet")]
    states = Counter(device.state for node in view.nodes for device in node.devices)
    shown = [state for state in DEVICE_TONES if states[state] or state in ("busy", "idle")]
    for number, state in enumerate(shown):
        name = f" {state}" if words else letter(state)
        spans.append((" " if number else "", ""))
        spans.append((f"{count(states[state])}{name}", DEVICE_TONES[state] if states[state] else "quiet"))
    return spans


def time_of(view: LiveView) -> str:
    return clock(view.at) if view.at else "--:--:--"
