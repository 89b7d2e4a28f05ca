"""One term of a leading coordinator: it looks at the records, asks the planner and the tuner, writes what they say."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import msgspec

from cluster.coordinator.changes import changes, tuning_changes
from cluster.coordinator.figures import CoordinatorCounts
from cluster.coordinator.presence import Presence
from cluster.coordinator.provider import Provider
from cluster.coordinator.view import Records, arrival_rates, heard, view_of
from cluster.decoded import Decoded
from cluster.election import Election, NotLeaderError
from cluster.membership import Follower
from cluster.planner.planner import Planner
from cluster.planner.settings import Settings
from cluster.planner.view import Move, Plan
from cluster.records import Paths, TuningRecord
from cluster.store.base import Delete, Entry, Operation, Put, Unchanged
from cluster.tuning.merge import believed
from cluster.tuning.report import ReportRecord
from cluster.tuning.tuner import Tuner

log = logging.getLogger("laxity.coordinator")

PERIOD = 1.0
"""Seconds between two looks at the shards' reports."""
PAUSE = 0.25
"""Seconds between two plans at least: hundreds of shards report at different moments."""
REPORT_LASTS = 3.5
"""Seconds for which a report that was not followed by another still counts."""
WAITED_FOR = 30.0
"""Seconds for which rates are not judged while a shard is silent."""
RENEW = 3.0
"""Seconds after which tuning is written again although nothing changed: shards do not trust what is old."""
BOOT = 300.0
"""Seconds that a machine which was powered up has to register."""
SHOWN_WITHIN = 5.0
"""Seconds after which a write that the follower does not show is taken for overwritten."""
MOST_WRITES = 60
"""Operations in one transaction (etcd takes 128 by default, and 1.5 MiB)."""
MOST_BYTES = 700_000


class CoordinatorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How a coordinator is set up. ``provider_up`` and ``provider_down`` are commands in which ``{node}`` stands for a
    node's name ('': machines are not powered up or down). ``ttl`` is its lease's in seconds; ``forget`` the
    seconds after which the state of a node that does not come back is deleted."""

    name: str
    settings: Settings = Settings()
    provider_up: str = ""
    provider_down: str = ""
    ttl: float = 5.0
    forget: float = 86_400.0


LIVE = frozenset({"forget", *Settings.__struct_fields__})
"""What :meth:`Leader.configure` changes while it leads."""


class Leader:
    """See the module's text. One object for each term; ``now`` is monotonic, in seconds."""

    def __init__(
        self,
        config: CoordinatorConfig,
        paths: Paths,
        election: Election,
        provider: Provider,
        counts: CoordinatorCounts,
        now: float,
    ) -> None:
        self._config = config
        self._paths = paths
        self._election = election
        self._provider = provider
        self._counts = counts
        self.term = election.term
        """It writes in no other: what it knows may be outdated by then."""
        self._planner = Planner(config.settings)
        self._tuner = Tuner()
        self._decoded = Decoded()
        self._nodes = Presence(config.ttl, now)
        self._shards = Presence(config.ttl, now)
        self._reports: dict[str, tuple[ReportRecord, float]] = {}
        """The latest of each shard, without what cannot be true, and when it came."""
        self._seen: dict[str, ReportRecord] = {}
        self._observed_at = now
        self._plan_at = now
        self._planned_at = now - PAUSE
        self._changed = False
        self._renewed_at = now
        self._written: dict[str, int] = {}
        """Revisions of this term's writes that the follower has not shown yet, by key."""
        self._written_at = now
        self._problems: dict[str, str] = {}
        self._silent_since: dict[str, float] = {}
        self.moves = 0

    def configure(self, config: CoordinatorConfig) -> None:
        """Go on with these settings, of which those in :data:`LIVE` may be others than before. A planner with others
        begins as a new leader's does: with what lies in the store, and it moves nothing until it has measured rates."""
        if config.settings != self._config.settings:
            self._planner = Planner(config.settings)
        self._config = config

    def outage_ended(self, now: float) -> None:
        """The store was away and is back: who is not registered need not be gone."""
        self._nodes.outage_ended(now)
        self._shards.outage_ended(now)

    def step(self, now: float, follower: Follower, changed: bool) -> None:
        """Do what is due. ``changed``: whether the follower's entries did. Raises what the election's writes do."""
        entries = follower.entries
        self._changed = changed or self._changed
        for key in [key for key, revision in self._written.items() if _shows(entries.get(key), revision)]:
            del self._written[key]
        if self._written and now < self._written_at + SHOWN_WITHIN:
            return  # a plan made on what is not there any more would undo what was just written
        self._decoded.update(entries)
        self._take_reports(now)
        observed = now >= self._observed_at + PERIOD
        if not (observed or now >= self._plan_at or (self._changed and now >= self._planned_at + PAUSE)):
            return
        records = Records(self._paths, self._decoded)
        reports = self._fresh(now)
        if observed:
            self._observe(now, records, reports)
        self._plan(now, records, reports)

    # ---- reports ---------------------------------------------------------------------------

    def _take_reports(self, now: float) -> None:
        present = self._decoded.under(ReportRecord, self._paths.reports)
        for shard, report in present.items():
            if self._seen.get(shard) is not report:
                self._reports[shard] = (believed(shard, report), now)
                self._seen[shard] = report
        for shard in self._seen.keys() - present.keys():
            del self._reports[shard], self._seen[shard]

    def _fresh(self, now: float) -> dict[str, ReportRecord]:
        return {shard: report for shard, (report, came) in self._reports.items() if now < came + REPORT_LASTS}

    def _observe(self, now: float, records: Records, reports: Mapping[str, ReportRecord]) -> None:
        # The clock's seconds, not those of this loop's turns: rates are compared over whole periods.
        self._observed_at = max(self._observed_at + PERIOD, now - PERIOD)
        if not self._silent(now, records, reports):
            self._planner.observe(now, arrival_rates(reports))
        self._tuner.observe(now, reports)
        tuned = {name: record for name, record in self._tuner.tuning(now).items() if name in records.serving}
        present = self._decoded.under(TuningRecord, self._paths.tuning)
        renew = now >= self._renewed_at + RENEW
        if renew:
            self._renewed_at = now
        self._write(now, tuning_changes(self._paths, present, tuned, renew), wait=False)

    def _silent(self, now: float, records: Records, reports: Mapping[str, ReportRecord]) -> bool:
        """Whether a shard that should be there has not reported of late: the rates of the others alone would look like
        less load. One that has been silent for long is no longer waited for."""
        there = {shard for shard in records.known_shards() if self._shards.missing(now, shard) == 0.0}
        self._silent_since = {shard: self._silent_since.get(shard, now) for shard in there - reports.keys()}
        return any(now < since + WAITED_FOR for since in self._silent_since.values())

    # ---- the plan --------------------------------------------------------------------------

    def _plan(self, now: float, records: Records, reports: Mapping[str, ReportRecord]) -> None:
        self._planned_at = now
        self._changed = False
        self._nodes.update(now, records.known_nodes(), records.nodes.keys() | heard(reports))
        self._shards.update(now, records.known_shards(), records.brokers.keys())
        view = view_of(now, records, reports, self._nodes, self._shards, self._config.settings.loss_patience)
        began = time.perf_counter()
        plan = self._planner.plan(now, view)
        self._counts.planned(plan, time.perf_counter() - began)
        self._plan_at = plan.again_at
        for model, why in plan.problems.items():
            if self._problems.get(model) != why:
                log.warning("%s: %s", model, why, extra={"model": model})
        self._problems = plan.problems
        forgotten = [*self._forget(now, records, plan), *(Delete(key) for key in records.stale_profiles())]
        keys = {operation.key for operation in forgotten}
        operations = [write for write in changes(self._paths, records, plan) if write.key not in keys] + forgotten
        if operations:
            self._tell(plan)
            self._write(now, operations, wait=True)
        self._power(now, records, plan)

    def _forget(self, now: float, records: Records, plan: Plan) -> list[Operation]:
        """Take away what is left of nodes that nobody expects any more (hosts change their names)."""
        holding = {node for node, _ in plan.placement}
        gone = [
            node
            for node, (state, _) in plan.states.items()
            if state == "lost"
            and self._nodes.missing(now, node) > self._config.forget
            and node not in records.drains
            and node not in holding
        ]
        return [Delete(key) for node in gone for key in (self._paths.state(node), self._paths.placement(node))]

    def _power(self, now: float, records: Records, plan: Plan) -> None:
        wanted: dict[str, bool] = {}
        for node, (state, _) in plan.states.items():
            before = records.states.get(node)
            if state == "active":
                wanted[node] = True
                if before is not None and before.state == "standby" and node not in records.nodes:
                    self._nodes.expect(node, now + BOOT)
            elif state == "standby" and node not in records.drains:
                wanted[node] = False
        # Who is not registered need not be away: not while it is unknown who is (after an outage, in a new term).
        settled = self._nodes.settled(now)
        there = {node: node in records.nodes or (up and not settled) for node, up in wanted.items()}
        self._provider.step(now, wanted, there)

    def _tell(self, plan: Plan) -> None:
        self._counts.moves += len(plan.moves)
        for move in plan.moves:
            self.moves += 1
            node, device = move.device
            log.info("%s", _sentence(move), extra={"agent": node, "device": device})
        if plan.moves:
            cost = sum(move.cost for move in plan.moves)
            log.info("%d moves, which cost %.1f GPU-seconds; %d in this term", len(plan.moves), cost, self.moves)

    # ---- writing ---------------------------------------------------------------------------

    def _write(self, now: float, operations: Sequence[Operation], *, wait: bool) -> None:
        """Write, in the order given and fenced by the election; ``wait``: plan no more until the follower shows it."""
        batch: list[Operation] = []
        size = 0
        for operation in operations:
            bytes_more = len(operation.value) if isinstance(operation, Put) else 0
            if batch and (len(batch) >= MOST_WRITES or size + bytes_more > MOST_BYTES):
                self._commit(now, batch, wait)
                batch, size = [], 0
            batch.append(operation)
            size += bytes_more
        if batch:
            self._commit(now, batch, wait)

    def _commit(self, now: float, batch: Sequence[Operation], wait: bool) -> None:
        revision = self._election.transaction(now, [Unchanged(self._paths.leader, self.term)], batch)
        if revision is None:
            raise NotLeaderError("the term in which this was planned is over; nothing was written")
        if wait:
            self._written_at = now
            self._written.update({operation.key: revision for operation in batch if isinstance(operation, Put)})


def _shows(entry: Entry | None, revision: int) -> bool:
    return entry is not None and entry.mod_revision >= revision


def _sentence(move: Move) -> str:
    node, number = move.device
    parts = [f"takes on {', '.join(sorted(move.gains))}"] if move.gains else []
    parts += [f"gives up {', '.join(sorted(move.loses))}"] if move.loses else []
    return f"{node} device {number} {' and '.join(parts) or 'changes its shard'}: {move.why}"
