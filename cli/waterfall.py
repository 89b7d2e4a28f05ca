"""One request's trace as a waterfall: what its time went into, stage by stage, and why it was dropped."""

from __future__ import annotations

import time
from typing import Final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from cluster.observe.trace import Estimate, StageSpan, TraceRecord

KINDS: Final = {
    "waiting": ("·", "", "waiting"),
    "chosen": ("░", "cyan", "window shut"),
    "forced": ("▒", "red", "no device"),
    "way": ("─", "dim", "on the way"),
    "input": ("▏", "yellow", "input"),
    "execution": ("█", "green", "execution"),
    "output": ("▕", "yellow", "output"),
}
"""What a stage's time goes into: how it is drawn, and called. Where several share a column the last one is drawn."""
NAME: Final = 22
"""Columns for a stage's name at most."""
LEFT: Final = 9
"""Columns for the budget that was left."""
STYLE: Final = {"ok": "green", "dropped": "red", "expired": "red", "failed": "red", "unavailable": "red"}
"""Of outcomes."""


class Waterfall:
    """Draws a trace at the console's width."""

    def __init__(self, trace: TraceRecord) -> None:
        self._trace = trace

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        trace = self._trace
        yield from _head(trace)
        if trace.spans:
            name = max(len("stage"), *(min(len(span.stage), NAME) for span in trace.spans))
            across = max(options.max_width - name - LEFT - 4, 10)
            total = max([trace.latency, *(max(end for _, end in parts(trace, span).values()) for span in trace.spans)])
            table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
            table.add_column(width=name, overflow="ellipsis", no_wrap=True)
            table.add_column(width=across, no_wrap=True)
            table.add_column(width=LEFT, justify="right", no_wrap=True)
            end = ms(total)
            scale = "0" + end.rjust(across - 1)
            table.add_row(Text("stage", "dim"), Text(scale, "dim"), Text("left", "dim"))
            for span in trace.spans:
                left = Text(ms(span.remaining), "red" if span.remaining < 0.0 else "")
                table.add_row(Text(span.stage, "bold"), _bar(trace, span, total, across), left)
            yield Text()
            yield table
            yield _legend(trace)
            yield Text()
            for span in trace.spans:
                yield Text.assemble((f"{span.stage}: ", "bold"), told(span))
        if trace.estimate is not None:
            yield Text()
            yield Text(reckoning(trace.estimate), "red")


def ms(seconds: float) -> str:
    """'41.2 ms', or '12.50 s' from ten seconds on."""
    return f"{seconds * 1e3:.1f} ms" if abs(seconds) < 10.0 else f"{seconds:.2f} s"


def reckoning(estimate: Estimate) -> str:
    """The sum that led to a drop, in words."""
    had = f"Dropped {ms(estimate.at)} after it came: it had {ms(estimate.remaining)} left at {estimate.stage!r}"
    if not estimate.size:  # a policy that drops only what is too late before it begins
        return f"{had}; a device could begin in {ms(estimate.wait)} at the earliest: {ms(estimate.short)} too late."
    needed = [
        f"{ms(estimate.wait)} for a device",
        f"{ms(estimate.execution)} (p99, batch of {estimate.size})",
        f"{ms(estimate.downstream)} behind it",
    ]
    return f"{had}; needed {' + '.join(needed)} = {ms(estimate.short)} too much."


def parts(trace: TraceRecord, span: StageSpan) -> dict[str, tuple[float, float]]:
    """From when to when a stage's time went into which of :data:`KINDS`. How much of the waiting was forced is known,
    not when: it is taken to be the end of it."""
    end = span.ended if span.ended >= 0.0 else max(trace.latency, span.queued)
    if span.granted < 0.0:
        return {"waiting": (span.queued, end)}
    free = max(span.granted - span.forced, span.queued)
    found = {"chosen": (span.queued, free), "forced": (free, span.granted), "way": (span.granted, end)}
    if span.started >= 0.0:
        executed = span.started + span.execution
        found["input"] = (max(span.started - span.input, span.granted), span.started)
        found["execution"] = (span.started, executed)
        found["output"] = (executed, executed + span.output)
    return found


def told(span: StageSpan) -> str:
    """A stage in words."""
    if span.granted < 0.0:
        return "waited, and was given to no device"
    wait = span.granted - span.queued
    said = [f"waited {ms(wait)}"]
    way = span.ended - span.granted - span.execution - span.input - span.output
    if span.forced > 0.00005:
        said[0] += f" ({ms(span.forced)} of it for a device)"
    if span.started >= 0.0:
        if span.input > 0.0:
            said.append(f"input {ms(span.input)}")
        said.append(f"execution {ms(span.execution)} (predicted {ms(span.predicted)})")
        if span.output > 0.0:
            said.append(f"output {ms(span.output)}")
        if span.ended >= 0.0:
            said.append(f"on the way {ms(max(way, 0.0))}")
    where = f"{span.device}, in a batch of {span.size} (number {span.batch})"
    if span.batches > 1:
        where += f", the last of {span.batches}"
    if span.items > 1:
        where += f"; {span.items} items"
    if span.attempts > 1:
        where += f"; given to a device {span.attempts} times"
    if span.ended < 0.0:
        where += "; it did not end" if span.started < 0.0 else "; it did not end well"
    return f"{', '.join(said)}; on {where}"


def _head(trace: TraceRecord) -> list[Text]:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(trace.at)) + f".{int(trace.at % 1.0 * 1e3):03d}"
    version = f" version {trace.version}" if trace.version else ""
    where = f" at stage {trace.stage!r}" if trace.stage else ""
    came = Text(f"{trace.pipeline}{version}, at shard {trace.shard} since {at}")
    outcome = Text.assemble(
        (trace.outcome, STYLE.get(trace.outcome, "")), f"{where} after {ms(trace.latency)} of {ms(trace.budget)}"
    )
    if trace.cold:
        outcome.append("; it waited for a model to be loaded")
    lines = [Text(trace.request, "bold"), came, outcome]
    if trace.detail:
        lines.append(Text(trace.detail))
    if trace.traceparent:
        lines.append(Text(f"traceparent {trace.traceparent}", "dim"))
    return lines


def _bar(trace: TraceRecord, span: StageSpan, total: float, across: int) -> Text:
    cells = [(" ", "")] * across
    found = parts(trace, span)
    for kind, (glyph, style, _) in KINDS.items():
        begin, end = found.get(kind, (0.0, 0.0))
        if end <= begin or total <= 0.0:
            continue
        first = min(int(begin / total * across), across - 1)
        last = max(min(round(end / total * across), across), first + 1)
        cells[first:last] = [(glyph, style)] * (last - first)
    return Text.assemble(*cells)


def _legend(trace: TraceRecord) -> Text:
    """What is drawn of it."""
    drawn = {kind for span in trace.spans for kind, (begin, end) in parts(trace, span).items() if end > begin}
    found = [
        Text.assemble((glyph, style), (f" {name}", "dim"))
        for kind, (glyph, style, name) in KINDS.items()
        if kind in drawn
    ]
    return Text("  ").join(found)
