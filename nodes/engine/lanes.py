"""The lanes of one device: what is copied, executed and paged when. It runs where the work is done, beside the device.

A worker decides nothing by itself: every action comes with a window, and one that did not begin inside it fails and
never runs late (Clockwork, OSDI'20, section 5.2). As there, a device has one queue for each kind of work, keyed by
``earliest``: inputs (host to device), execution, outputs (device to host) and weights (LOAD and UNLOAD). Each does one
thing at a time, and the lanes go on beside one another: while a batch executes, the next one's input is copied and the
last one's output.

``now``, ``earliest`` and ``latest`` are seconds on one monotonic clock. Every call may give orders: take them with
``take_orders``, carry them out, and tell of each one's end with the method named for it; also where the batch was
dropped, or was too late, in the meantime: the lane is taken until then. Call ``tick`` at ``next_wake``.
"""

from __future__ import annotations

from typing import Final

NEVER: Final = 1e18
MAX_BATCHES: Final = 3
"""Batches that a worker has at most: one executes, one waits with its input, the output of one is fetched."""


class Order:
    """Base of the orders."""


class CopyIn(Order):
    """Prepare a batch's input and bring it to the device; ``copied_in`` ends it."""

    def __init__(self, batch: int) -> None:
        self.batch = batch


class Execute(Order):
    """Run a batch, alone; ``executed`` ends it."""

    def __init__(self, batch: int) -> None:
        self.batch = batch


class CopyOut(Order):
    """Bring a batch's output to the host; ``copied_out`` ends it."""

    def __init__(self, batch: int) -> None:
        self.batch = batch


class PageIn(Order):
    """Carry out a LOAD; ``paged`` ends it."""

    def __init__(self, action: int) -> None:
        self.action = action


class PageOut(Order):
    """Carry out an UNLOAD; ``paged`` ends it."""

    def __init__(self, action: int) -> None:
        self.action = action


class TooLate(Order):
    """This batch, or LOAD or UNLOAD, did not begin within its window and never will: answer so."""

    def __init__(self, number: int, is_batch: bool) -> None:
        self.number = number
        self.is_batch = is_batch


class _Job:
    """A batch or an action that has not begun, or whose input is being copied."""

    def __init__(self, number: int, earliest: float, latest: float, loads: bool) -> None:
        self.number = number
        self.earliest = earliest
        self.latest = latest
        self.loads = loads
        """Of an action: LOAD rather than UNLOAD."""
        self.gone = False
        """Dropped, or too late, while its input was being copied."""


class Lanes:
    """See the module's text."""

    def __init__(self, copies: bool, overlap_loads: bool) -> None:
        """``copies``: whether batches have inputs and outputs to be copied; without, they execute and are done.
        ``overlap_loads``: whether weights are paged while a batch executes; where both take the same cores, they
        exclude one another and the one with the smaller ``earliest`` comes first."""
        self._copies = copies
        self._overlap = overlap_loads
        self._inputs: list[_Job] = []
        """Batches whose input is yet to be copied. This and the next two are in the order of ``earliest``."""
        self._ready: list[_Job] = []
        """Batches that can execute."""
        self._weights: list[_Job] = []
        self._outputs: list[int] = []
        """Batches whose output is yet to be copied, in the order in which they ran."""
        self._copying_in: _Job | None = None
        self._executing: _Job | None = None
        self._copying_out = False
        self._paging: _Job | None = None
        self._orders: list[Order] = []

    def take_orders(self) -> list[Order]:
        """What is to be done, in order."""
        orders = self._orders
        if orders:
            self._orders = []
        return orders

    def next_wake(self) -> float:
        """When ``tick`` has something to do if nothing happens before."""
        wake = NEVER
        if self._ready:
            if self._can_execute():
                wake = self._ready[0].earliest
            for job in self._ready:
                if job.latest < wake:
                    wake = job.latest
        if self._weights:
            if self._can_page():
                wake = min(wake, self._weights[0].earliest)
            for job in self._weights:
                if job.latest < wake:
                    wake = job.latest
        for job in self._inputs:
            if job.latest < wake:
                wake = job.latest
        copying = self._copying_in
        if copying is not None and not copying.gone and copying.latest < wake:
            wake = copying.latest
        return wake

    def tick(self, now: float) -> None:
        """Begin what can begin, and refuse what can no more."""
        if self._inputs:
            self._inputs = self._in_time(now, self._inputs, False)
            if self._inputs and self._copying_in is None:
                job = self._inputs.pop(0)
                self._copying_in = job
                self._orders.append(CopyIn(job.number))
        copying = self._copying_in
        if copying is not None and not copying.gone and now >= copying.latest:
            copying.gone = True
            self._orders.append(TooLate(copying.number, True))
        if self._ready or self._weights:
            self._begin(now)
        if self._outputs and not self._copying_out:
            self._copying_out = True
            self._orders.append(CopyOut(self._outputs[0]))

    # ---- what is to be done ----------------------------------------------------------------

    def infer(self, now: float, batch: int, earliest: float, latest: float) -> None:
        """Execute a batch within its window. Its input is copied as soon as the lane is free."""
        _insert(self._inputs if self._copies else self._ready, _Job(batch, earliest, latest, False))
        self.tick(now)

    def load(self, now: float, action: int, earliest: float, latest: float) -> None:
        """Page a model in within the window. LOADs and UNLOADs with the same ``earliest`` keep their order."""
        _insert(self._weights, _Job(action, earliest, latest, True))
        self.tick(now)

    def unload(self, now: float, action: int, earliest: float, latest: float) -> None:
        """Page a model out within the window."""
        _insert(self._weights, _Job(action, earliest, latest, False))
        self.tick(now)

    def drop(self, now: float, batch: int) -> bool:
        """Take out a batch that has not begun to execute; whether it was. It is heard of no more then."""
        found = _take(self._inputs, batch) or _take(self._ready, batch)
        copying = self._copying_in
        if copying is not None and copying.number == batch and not copying.gone:
            copying.gone = True
            found = True
        if found:
            self.tick(now)
        return found

    # ---- what was done ---------------------------------------------------------------------

    def copied_in(self, now: float, batch: int) -> None:
        """A batch's input is on the device; or could not be brought there, and the batch was dropped."""
        job = self._copying_in
        if job is None or job.number != batch:
            raise ValueError(f"the input of batch {batch} is not being copied")
        self._copying_in = None
        if not job.gone:
            _insert(self._ready, job)
        self.tick(now)

    def executed(self, now: float, batch: int, failed: bool = False) -> None:
        """A batch was executed. One that ``failed`` has no output to be copied."""
        job = self._executing
        if job is None or job.number != batch:
            raise ValueError(f"batch {batch} does not execute")
        self._executing = None
        if self._copies and not failed:
            self._outputs.append(batch)
        self.tick(now)

    def copied_out(self, now: float, batch: int) -> None:
        """A batch's output is on the host, or could not be brought there."""
        if not self._copying_out or self._outputs[0] != batch:
            raise ValueError(f"the output of batch {batch} is not being copied")
        self._copying_out = False
        self._outputs.pop(0)
        self.tick(now)

    def paged(self, now: float, action: int) -> None:
        """A LOAD or an UNLOAD was carried out, well or not."""
        job = self._paging
        if job is None or job.number != action:
            raise ValueError(f"action {action} is not being carried out")
        self._paging = None
        self.tick(now)

    # ---- inside ----------------------------------------------------------------------------

    def _can_execute(self) -> bool:
        return self._executing is None and (self._overlap or self._paging is None)

    def _can_page(self) -> bool:
        return self._paging is None and (self._overlap or self._executing is None)

    def _begin(self, now: float) -> None:
        """Execute and page what can begin. What could only have begun up to now is refused then, so that whoever waits
        for it knows at once."""
        self._ready = self._in_time(now, self._ready, True)
        self._weights = self._in_time(now, self._weights, True)
        paged_first = bool(self._weights) and (not self._ready or self._weights[0].earliest <= self._ready[0].earliest)
        if paged_first:
            self._begin_page(now)
        if self._ready and self._can_execute() and now >= self._ready[0].earliest:
            job = self._ready.pop(0)
            self._executing = job
            self._orders.append(Execute(job.number))
        if not paged_first:
            self._begin_page(now)
        self._ready = self._in_time(now, self._ready, False)
        self._weights = self._in_time(now, self._weights, False)

    def _begin_page(self, now: float) -> None:
        if self._weights and self._can_page() and now >= self._weights[0].earliest:
            job = self._weights.pop(0)
            self._paging = job
            self._orders.append(PageIn(job.number) if job.loads else PageOut(job.number))

    def _in_time(self, now: float, jobs: list[_Job], could_begin: bool) -> list[_Job]:
        """Those of ``jobs`` that may still begin; the others are refused. ``could_begin``: whether one whose window
        closes right now may."""
        for job in jobs:
            if now > job.latest or (now == job.latest and not could_begin):
                break
        else:
            return jobs
        kept: list[_Job] = []
        for job in jobs:
            if now > job.latest or (now == job.latest and not could_begin):
                self._orders.append(TooLate(job.number, jobs is not self._weights))
            else:
                kept.append(job)
        return kept


def _insert(jobs: list[_Job], job: _Job) -> None:
    """Into the order of ``earliest``, behind those with the same."""
    at = len(jobs)
    while at > 0 and jobs[at - 1].earliest > job.earliest:
        at -= 1
    jobs.insert(at, job)


def _take(jobs: list[_Job], number: int) -> bool:
    for index, job in enumerate(jobs):
        if job.number == number:
            jobs.pop(index)
            return True
    return False
